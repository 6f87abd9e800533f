"""Pictures from URLs that strangers wrote: bounded in bytes, time and number, and never a way in.

A table of URLs is outside input. A name may resolve to this machine, its network or a cloud's
metadata service, at the first look or at the second, or after a redirect: so what counts is the
address that is *connected*, checked before a byte is sent. Answers are read up to a cap and a
deadline, unpacked never, and not at all where the site opts out.

Who names a table on a private server means the pictures beside it too: its host stays free to be
where it was when the table was opened (`OpenedRules`), and nowhere else.
"""

from __future__ import annotations

import collections
import functools
import io
import ipaddress
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from .outcomes import Rejected

SCHEMES = ("http", "https")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Words of X-Robots-Tag by which a site says that its pictures are not to be collected."""
_RESERVED = "tdm-reservation"
"""The header of TDMRep (W3C 2022); 1: rights to mine text and data are reserved."""
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_SAFE = "/%:@!$&'()*+,;=~-._?"
_LONGEST_WAIT = 30.0
_JITTER = 3.0
"""Seconds, at most, on top of the wait that a server asks for."""
_AHEAD_BYTES = 128 << 20
"""Of pictures on their way and of those that wait for one that is slow to come. If the others
waited with it, a twentieth of slow URLs would make all of them fifteen times as slow."""


@dataclass(frozen=True, kw_only=True)
class DownloadRules:
    """How pictures are fetched from the web."""

    kind: Literal["download"] = "download"
    concurrency: int = 16
    """Downloads at a time. The workers of a run share them, but each has one at least."""
    seconds: float = 30.0
    """For one try of one picture, from the look-up of the host's name to the last byte."""
    total_seconds: float = 120.0
    """For all tries of one picture and the waits between them."""
    retries: int = 3
    """More tries after a time-out, a broken connection or an answer that says "later"."""
    user_agent: str = "darkroom"
    honour_opt_out: bool = True
    """Whether pictures are left where X-Robots-Tag says noai, noimageai, noindex, noimageindex or
    none, to all or to this user agent, and where tdm-reservation says 1."""
    private_hosts: tuple[str, ...] = ()
    """Names or addresses that may be on a private network: your own picture servers."""

    def __post_init__(self):
        if self.concurrency < 1 or self.retries < 0 or min(self.seconds, self.total_seconds) <= 0:
            raise ValueError(
                f"download: got concurrency {self.concurrency}, retries {self.retries}, seconds "
                f"{self.seconds}, total_seconds {self.total_seconds}; wanted at least 1, at least "
                "0, more than 0 both"
            )
        if not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise ValueError(f"download: user_agent must be plain ASCII, got {self.user_agent!r}")
        hosts = tuple(_ascii_host(host) for host in self.private_hosts)  # as they are connected
        object.__setattr__(self, "private_hosts", hosts)

    def deciding(self) -> dict[str, Any]:
        """What decides whether a picture may be had; the rest only how fast."""
        return {name: getattr(self, name) for name in ("honour_opt_out", "private_hosts")} | {
            "user_agent": self.user_agent
        }

    def frees(self, host: str, address: str) -> bool:
        """Whether this host may be at this address of a private network."""
        return host in self.private_hosts


@dataclass(frozen=True, kw_only=True)
class OpenedRules(DownloadRules):
    """The rules of a run that has opened its sources; versions state those that it was given."""

    opened: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Hosts of sources on a private network, each with the addresses that it had there."""

    @classmethod
    def of(cls, rules: DownloadRules, sources: Iterable[str]) -> OpenedRules:
        """With the hosts of these URLs, of those that were opened in this process."""
        hosts = {urlsplit(url).hostname or "" for url in sources if is_remote(url)}
        opened = ((host, _private_addresses(host)) for host in sorted(map(_ascii_host, hosts)))
        return cls(**vars(rules), opened=tuple(it for it in opened if it[1]))

    def deciding(self) -> dict[str, Any]:
        return super().deciding() | {"opened": self.opened}

    def frees(self, host: str, address: str) -> bool:
        return super().frees(host, address) or address in dict(self.opened).get(host, ())


_given: dict[str, set[str]] = {}
"""By name of a host, all addresses that this process was given for it when it opened sources."""


async def source_client(**options: Any) -> Any:
    """The session by which fsspec opens sources on the web; notes where their hosts are.

    Asking the resolver ourselves, before or after, would not tell: it may be a stranger's, who
    says "here" to that question and "on the web" to the one by which the table is fetched.
    """
    import aiohttp

    class Noting(aiohttp.ThreadedResolver):
        async def resolve(self, host: str, *arguments: Any, **named: Any) -> Any:
            found = await super().resolve(host, *arguments, **named)
            _given.setdefault(host.lower(), set()).update(it["host"] for it in found)
            return found

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Noting()), **options)


def _private_addresses(host: str) -> tuple[str, ...]:
    """Where a source's host is on a private network; nowhere if any of its addresses is public."""
    try:
        given = {str(ipaddress.ip_address(host))}  # an address is nobody's to change
    except ValueError:
        given = _given.get(host, set[str]())
    if any(map(is_public, given)):
        return ()
    if "0.0.0.0" in given:  # noqa: S104 (nothing is bound: who asks there is answered from here)
        given = {*given, "127.0.0.1"}
    return tuple(sorted(filter(_may_be_ours, given)))


class _Later(Exception):
    """Worth another try, after `wait` seconds if the server said so."""

    def __init__(self, detail: str, wait: float | None = None):
        super().__init__(detail)
        self.wait = wait


class _Room:
    """Room for the bytes of the downloads of one `all`: on their way, and waiting for their turn.

    Whose turn it is goes on whatever that takes, so that no more than `most` bytes and one body are
    held, and nobody waits for ever: all others wait for turns alone, and a turn ends with the
    deadlines of its download.
    """

    def __init__(self, most: int):
        self._most, self._changed = most, threading.Condition()
        self._held = self._turn = 0
        self._over = False

    def take(self, number: int, count: int) -> float:
        """Wait until so many bytes more may be held of a download (0: until any may), and count
        them; the seconds it waited. `Rejected`: nobody waits for it any more.
        """

        def fits() -> bool:
            room = self._most - self._held
            return self._over or number == self._turn or max(count, 1) <= room

        with self._changed:
            started = None if fits() else time.monotonic()
            self._changed.wait_for(fits)
            if self._over:
                raise Rejected("unreachable", "nobody waits for it")
            self._held += count
        return 0.0 if started is None else time.monotonic() - started

    def leave(self, count: int) -> None:
        with self._changed:
            self._held -= count
            self._changed.notify_all()

    def next_turn(self) -> None:
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


class _Share:
    """What one download has of the room, and the seconds that it waited for it.

    It waits with its connection open, as to begin anew would cost its server all bytes twice. These
    seconds are no part of its deadlines, which bound what servers take; nothing is read meanwhile,
    so a dead server has no part in them. One that hangs up on it meanwhile is asked again, which
    does not count as one of the tries.
    """

    def __init__(self, room: _Room, number: int):
        self._room, self._number = room, number
        self._held, self.waited = 0, 0.0

    def take(self, count: int) -> None:
        self.waited += self._room.take(self._number, count)
        self._held += count

    def drop(self) -> None:
        self._room.leave(self._held)
        self._held = 0


class _Deadline:
    """So many seconds from now, and as many more as its download will wait for room."""

    def __init__(self, seconds: float, share: _Share):
        self._share, self._moment = share, time.monotonic() + seconds - share.waited

    def left(self) -> float:
        return self._moment + self._share.waited - time.monotonic()


def is_remote(url: str) -> bool:
    return url.split("://", 1)[0].lower() in SCHEMES if "://" in url else False


class Downloader:
    """Fetches by one connection pool; safe to use from many threads. A context manager."""

    def __init__(
        self,
        rules: DownloadRules | None = None,
        max_bytes: int = 1 << 30,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.rules, self.max_bytes, self._sleep = rules or DownloadRules(), max_bytes, sleep

    @functools.cached_property
    def _pool(self) -> Any:
        import httpcore

        return httpcore.ConnectionPool(
            max_connections=self.rules.concurrency,
            max_keepalive_connections=self.rules.concurrency,
            keepalive_expiry=10.0,
            ssl_context=httpcore.default_ssl_context(),
            network_backend=_guarded(self.rules.frees),
        )

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, *error: object) -> None:
        if "_pool" in vars(self):
            self._pool.close()

    def __call__(self, url: str) -> bytes:
        """The picture's bytes. `Rejected` says why there are none; "unreachable" may change."""
        return self._fetch(url, _Share(_Room(0), 0))  # it is its turn

    def _fetch(self, url: str, share: _Share) -> bytes:
        end, attempt = _Deadline(self.rules.total_seconds, share), 0
        while True:
            waited = share.waited
            try:
                return self._follow(
                    url, _Deadline(min(end.left(), self.rules.seconds), share), share
                )
            except _Later as later:
                share.drop()
                wait = _wait(attempt, later.wait)
                attempt += share.waited == waited
                if attempt > self.rules.retries or wait >= end.left():
                    raise Rejected("unreachable", f"{url}: {later}") from None
                self._sleep(wait)

    def all(self, urls: Iterable[str]) -> Generator[bytes | Rejected]:
        """Each URL's bytes or refusal, in order; no more than `concurrency` are awaited at a time.

        What comes before its turn is held. Of that, what is on its way and what was given last, no
        more than `_AHEAD_BYTES` and one body are held at a time.
        """
        wanted = [*urls]
        room = _Room(_AHEAD_BYTES)

        def one(number: int) -> tuple[bytes | Rejected, _Share]:
            share = _Share(room, number)
            try:
                share.take(0)
                return self._fetch(wanted[number], share), share
            except Rejected as refused:
                share.drop()
                return refused, share

        with ThreadPoolExecutor(self.rules.concurrency, "download") as threads:
            # They start in this order, so the one that is to be given next is never behind another.
            futures = collections.deque(threads.submit(one, it) for it in range(len(wanted)))
            try:
                while futures:
                    found, share = futures.popleft().result()
                    yield found
                    del found  # the caller's is the only one
                    share.drop()
                    room.next_turn()
            finally:
                for future in futures:
                    future.cancel()
                room.close()

    def _follow(self, url: str, deadline: _Deadline, share: _Share) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            found = self._get(_canonical(url), deadline, share)
            if isinstance(found, bytes):
                return found
            try:
                url = urljoin(url, found)
            except ValueError as error:
                raise Rejected("reference", f"{url}: led to {found[:200]!r}: {error}") from None
        raise Rejected("redirects", f"{url}: more than {_MAX_REDIRECTS}")

    def _get(self, url: str, deadline: _Deadline, share: _Share) -> bytes | str:
        """The body, or where it is said to be."""
        import httpcore

        headers = {
            "Host": urlsplit(url).netloc,
            "User-Agent": self.rules.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
        }
        # Of a connection's own waits `_guarded` makes what is left until then: a server that sends
        # a header a minute would have a time-out of its own for each.
        timeout = {**dict.fromkeys(("connect", "read", "write"), deadline), "pool": _left(deadline)}
        try:
            with self._pool.stream(
                "GET", url, headers=list(headers.items()), extensions={"timeout": timeout}
            ) as response:
                return self._body(url, response, deadline, share)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise _Later(f"{type(error).__name__} {error}".strip()) from None
        except httpcore.UnsupportedProtocol as error:
            raise Rejected("reference", f"{url}: {error}") from None

    def _body(self, url: str, response: Any, deadline: _Deadline, share: _Share) -> bytes | str:
        answer = {name.decode("latin-1").lower(): value for name, value in response.headers}
        said = {name: value.decode("latin-1") for name, value in answer.items()}
        if "location" in answer:  # often UTF-8 as it is
            said["location"] = quote(answer["location"], safe=_SAFE + "#[]")
        led = response.status in _REDIRECTS and "location" in said
        # The site that leads elsewhere has its say too.
        asked = self.rules.honour_opt_out and (led or response.status == 200)
        if asked and (why := _opt_out(response.headers, self.rules.user_agent)):
            raise Rejected("opted_out", f"{url}: {why}")
        if led:
            return said["location"]
        if response.status in _TRANSIENT:
            raise _Later(f"HTTP {response.status}", _seconds(said.get("retry-after", "")))
        if response.status != 200:
            raise Rejected("http_status", f"{url}: HTTP {response.status}")
        if said.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise Rejected("packed", f"{url}: Content-Encoding {said['content-encoding']}, unasked")
        length = said.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            raise Rejected("too_many_bytes", f"{url}: {length} bytes, allowed {self.max_bytes}")
        body = io.BytesIO()  # hands out the bytes that it holds, where a bytearray's are copied
        for chunk in response.iter_stream():
            if body.tell() + len(chunk) > self.max_bytes:
                raise Rejected("too_many_bytes", f"{url}: more than {self.max_bytes}")
            share.take(len(chunk))
            body.write(chunk)
            _left(deadline)
        return body.getvalue()


def _left(deadline: _Deadline) -> float:
    left = deadline.left()
    if left <= 0:
        raise _Later("out of time")
    return left


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() else None


def _wait(attempt: int, asked: float | None) -> float:
    """Seconds until the next try. A crowd that failed together does not return together: full
    jitter (Brooker 2015), or some on top of what the server asks for, which it asks of all alike.
    """
    if asked is None:
        return random.uniform(0, min(_LONGEST_WAIT, 2.0**attempt))
    return min(asked, _LONGEST_WAIT) + random.uniform(0, _JITTER)


def _opt_out(headers: Iterable[tuple[bytes, bytes]], user_agent: str) -> str:
    """The header that asks us to leave, or ""; each may be there more than once."""
    for raw, value in headers:
        name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
        if name == "x-robots-tag" and (word := _robots(text, user_agent)):
            return f"X-Robots-Tag {word}"
        if name == _RESERVED and "1" in map(str.strip, text.split(",")):
            return f"{_RESERVED} 1"
    return ""


def _robots(tag: str, user_agent: str) -> str:
    """The word by which a tag like `noindex` or `otherbot: noai, noindex` asks us to leave. A name
    holds for the words after it, up to the next name."""
    me = user_agent.split("/")[0].strip().lower()
    meant = True
    for word in tag.lower().split(","):
        name, colon, rest = word.partition(":")
        if colon and not name.strip().startswith(("max-", "unavailable_after")):
            meant, word = name.strip() == me, rest
        if meant and word.strip() in _OPT_OUT:
            return word.strip()
    return ""


def _canonical(url: str) -> str:
    """The URL in ASCII, without fragment or credentials. Rejected: not the web."""
    try:
        parts = urlsplit(url)
        host, port = _ascii_host(parts.hostname or ""), parts.port
        path, query = (quote(it, safe=_SAFE) for it in (parts.path or "/", parts.query))
    except (UnicodeError, ValueError) as error:
        raise Rejected("reference", f"{url[:200]!r}: {error}") from None
    if parts.scheme.lower() not in SCHEMES or not _HOST.fullmatch(host):
        raise Rejected("reference", f"{url[:200]!r}: wanted http:// or https:// and a host")
    place = f"[{host}]" if ":" in host else host
    return urlunsplit(
        (
            parts.scheme.lower(),
            place if port is None else f"{place}:{port}",
            path,
            query,
            "",
        )
    )


def _ascii_host(host: str) -> str:
    return host.lower() if ":" in host else host.lower().encode("idna").decode()


def _guarded(frees: Callable[[str, str], bool]) -> Any:
    """A network on which only public addresses answer, and those that are freed for a host, and
    whose time-outs are `_Deadline`s, not seconds."""
    import httpcore

    plain = httpcore.SyncBackend()
    asked: dict[tuple[str, int], Future[list[Any]]] = {}
    guard = threading.Lock()

    def resolved(host: str, port: int, seconds: float | None) -> list[Any]:
        """What the resolver says, which knows no time-out: it is left alone after so many seconds.
        Who asks for the same name meanwhile waits for the same answer, so that as many threads
        stay with a resolver that hangs as there are names, and none that the process would wait
        for.
        """
        with guard:
            if (answer := asked.get((host, port))) is None:
                answer = asked[host, port] = Future()
                threading.Thread(target=look_up, args=(host, port, answer), daemon=True).start()
        try:
            return answer.result(seconds)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host}: no word from the resolver") from None
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None

    def look_up(host: str, port: int, answer: Future[list[Any]]) -> None:
        found: list[Any] = []
        failed: BaseException | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except BaseException as error:  # the one who asked raises it
            failed = error
        with guard:
            del asked[host, port]
        if failed:
            answer.set_exception(failed)
        else:
            answer.set_result(found)

    def left(deadline: _Deadline | None, late: type[Exception]) -> float | None:
        if deadline is None:
            return None
        if (seconds := deadline.left()) <= 0:
            raise late("out of time")
        return seconds

    class Stream(httpcore.NetworkStream):
        def __init__(self, stream: httpcore.NetworkStream):
            self._stream = stream

        def read(self, max_bytes: int, timeout: Any = None) -> bytes:
            return self._stream.read(max_bytes, left(timeout, httpcore.ReadTimeout))

        def write(self, buffer: bytes, timeout: Any = None) -> None:
            self._stream.write(buffer, left(timeout, httpcore.WriteTimeout))

        def close(self) -> None:
            self._stream.close()

        def start_tls(
            self, ssl_context: Any, server_hostname: Any = None, timeout: Any = None
        ) -> httpcore.NetworkStream:
            seconds = left(timeout, httpcore.ConnectTimeout)
            return Stream(self._stream.start_tls(ssl_context, server_hostname, seconds))

        def get_extra_info(self, info: str) -> Any:
            return self._stream.get_extra_info(info)

    class Guarded(httpcore.NetworkBackend):
        def connect_tcp(
            self, host: str, port: int, timeout: Any = None, *args: Any, **options: Any
        ) -> httpcore.NetworkStream:
            found = resolved(host, port, left(timeout, httpcore.ConnectTimeout))
            last: Exception = httpcore.ConnectError(f"{host} has no address")
            for address in dict.fromkeys(str(it[4][0]) for it in found):
                seconds = left(timeout, httpcore.ConnectTimeout)
                try:
                    allowed(host, address)
                    stream = plain.connect_tcp(address, port, seconds, *args, **options)
                except (Rejected, httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    last = error  # a server of one's own may have an address that is not free
                    continue
                try:
                    allowed(host, stream.get_extra_info("server_addr")[0])
                except OSError as error:  # gone already
                    stream.close()
                    raise httpcore.ConnectError(str(error)) from None
                except Rejected:
                    stream.close()
                    raise
                return Stream(stream)
            raise last

        def connect_unix_socket(self, *args: Any, **options: Any) -> httpcore.NetworkStream:
            raise Rejected("reference", "a unix socket")

        def sleep(self, seconds: float) -> None:
            plain.sleep(seconds)

    def allowed(host: str, address: str) -> None:
        if not is_public(address) and not frees(host, address):
            raise Rejected(
                "private_address",
                f"{host} is {address}, of a private network; if it is yours, name it in "
                "data.ingest.download.private_hosts",
            )

    return Guarded()


_OPEN = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNIQUE_LOCAL = ipaddress.ip_network("fc00::/7")
_PROVIDERS = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "168.63.129.16/32", "100.100.100.200/32")
        + ("fd00:ec2::254/128", "fd20:ce::254/128"),
    )
)
"""Where clouds answer their own machines, beside 169.254.169.254."""


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, and so is one that is wrapped in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        wrapped = [it for it in (ip.sixtofour, *(ip.teredo or ())) if it is not None]
        return ip in _OPEN and ip.is_global and all(is_public(str(it)) for it in wrapped)
    return ip.is_global and not ip.is_multicast and not any(ip in it for it in _PROVIDERS)


def _may_be_ours(address: str) -> bool:
    """Whether a server of one's own may be at a private address: where clouds answer their own
    machines (link-local addresses above all) nobody's is, nor at one that is wrapped in another.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if is_public(address) or any(ip in it for it in _PROVIDERS):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        return ip.is_loopback or ip in _UNIQUE_LOCAL
    return not (ip.is_link_local or ip.is_multicast)
