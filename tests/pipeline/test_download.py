"""Pictures from the web: a server on loopback that does what servers do, and worse."""

import gzip
import hashlib
import http.server
import io
import json
import random
import socket
import threading
import time
import tracemalloc
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from pipeline import download as downloads
from pipeline import ingest as ingesting
from pipeline import outcomes, passes, storage
from pipeline.download import Downloader, DownloadRules, is_public, is_remote
from pipeline.execute import Executor, run
from pipeline.ingest import IngestRules, ingest
from pipeline.outcomes import Rejected

BODY = b"x" * 1000


def picture(index: int) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Counts what it is asked; `busy` answers of 503 come first for /busy."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.busy = 2
        self.open = self.most = 0
        self.guard = threading.Lock()
        self.pictures: dict[str, bytes] = {}
        self.patience = threading.Event()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    down = False

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.leave()
        self.end_headers()
        self.wfile.write(body)

    def drip(self, wait: float):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 512)
                time.sleep(wait)
        except OSError:
            pass

    def do_GET(self):
        server = self.server
        with server.guard:
            server.asked.append(self.path)
            server.open += 1
            server.most = max(server.most, server.open)
        self.counted = True
        try:
            self.route(server)
        finally:
            self.leave()

    def leave(self):
        """Not under way any more: who has the whole answer may ask for the next one at once."""
        with self.server.guard:
            self.server.open -= self.counted
            self.counted = False

    def route(self, server: Server):
        name, _, rest = self.path.lstrip("/").partition("?")
        if self.down:
            self.answer(503)
        elif name == "good":
            self.answer(200, BODY)
        elif name == "slow-good":
            time.sleep(0.05)
            self.answer(200, BODY)
        elif name == "patient":
            self.answer(200 if server.patience.wait(25) else 404, BODY)
        elif name == "busy":
            server.busy -= 1
            self.answer(503 if server.busy >= 0 else 200, BODY, Retry_After="7")
        elif name == "redirect":
            self.answer(302, Location=rest)
        elif name == "endless":
            self.drip(0)
        elif name == "drip":
            self.drip(0.05)
        elif name == "packed":
            self.answer(200, gzip.compress(bytes(10_000_000)), Content_Encoding="gzip")
        elif name == "large":
            self.answer(200, b"", Content_Length=str(1 << 40))
        elif name == "robots":
            self.answer(200, BODY, X_Robots_Tag=rest.replace("%20", " "))
        elif name == "said":  # header=value&header=value, each as often as it is there
            self.send_response(302 if "Location=" in rest else 200)
            for part in ("Content-Length=1000", *unquote(rest).split("&")):
                self.send_header(*part.split("=", 1))
            self.leave()
            self.end_headers()
            self.wfile.write(BODY)
        elif name == "astray":
            self.answer(302, Location="http://[::1")
        elif name == "umlaut":
            self.answer(302, Location="/\u00c3\u00a4.png")  # UTF-8 as it is, in latin-1
        elif name == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            try:
                while True:
                    self.wfile.write(b"X: y\r\n")
                    time.sleep(0.05)
            except OSError:
                pass
        elif name == "said-later":
            self.answer(503, Retry_After=rest)
        elif name == "strange-wait":
            self.answer(503, Retry_After="\u00b2")
        elif name == "cut":
            self.answer(200, b"half", Content_Length="1000")
            self.close_connection = True
        elif name == "hangs-up":  # once
            first = server.asked.count(self.path) == 1
            self.answer(200, bytes(90_000 if first else 100_000), Content_Length="100000")
            self.close_connection = first
        elif name in server.pictures:
            self.answer(200, server.pictures[name])
        else:
            self.answer(404)


@pytest.fixture
def server(served):
    with served(Server()) as it:
        yield it


HERE = DownloadRules(private_hosts=("127.0.0.1",), seconds=1.0, retries=2)


def refused(url: str, rules: DownloadRules = HERE, max_bytes: int = 100_000) -> tuple[str, str]:
    with (
        Downloader(rules, max_bytes, sleep=lambda seconds: None) as get,
        pytest.raises(Rejected) as error,
    ):
        get(url)
    return error.value.reason, error.value.detail


def test_a_picture_arrives_through_redirects(server):
    with Downloader(HERE) as get:
        assert get(server.url("/good")) == BODY
        assert get(server.url(f"/redirect?{server.url('/redirect?/good')}")) == BODY
        assert get(server.url("/good#part")) == BODY
    assert server.asked[-1] == "/good"


@pytest.mark.parametrize("private", [(), ("10.0.0.1",), ("localhost",)])
def test_an_address_that_is_not_public_gets_no_request(server, private):
    rules = DownloadRules(private_hosts=private)
    reason, detail = refused(server.url("/good"), rules)
    assert reason == "private_address"
    assert "127.0.0.1" in detail
    assert not server.asked


def test_a_redirect_to_a_private_address_is_refused(server):
    """`localhost` is 127.0.0.1 by another name, and only the first may be reached."""
    inside = server.url("/good", "localhost")
    reason, _ = refused(server.url(f"/redirect?{inside}"))
    assert reason == "private_address"
    assert server.asked == [f"/redirect?{inside}"]


def test_what_counts_is_the_address_that_is_connected(server, monkeypatch):
    """DNS rebinding: a name that was public when looked up, and is not when it is connected."""
    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: public)

    def connect(address: object, timeout: float, *_: object, **__: object) -> socket.socket:
        made = socket.socket()
        made.settimeout(timeout)
        made.connect(("127.0.0.1", server.server_port))
        return made

    monkeypatch.setattr(socket, "create_connection", connect)
    reason, detail = refused("http://pictures.example/a.png", DownloadRules())
    assert reason == "private_address"
    assert detail.startswith("pictures.example is 127.0.0.1, of a private network")
    assert not server.asked


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "http:///a.png",
        "http://exa mple.com\0/",
        "http://[::1",
        "http://example.com:99999/",
        "pipe:cat /etc/passwd",
        "http://" + "a" * 300 + ".com/",
        "http://example.com/\ud800",
    ],
)
def test_only_the_web_is_asked(url):
    assert refused(url, DownloadRules(retries=0, seconds=1.0))[0] == "reference"


def test_redirects_lead_neither_off_the_web_nor_round_and_round(server):
    assert refused(server.url("/redirect?file:///etc/passwd"))[0] == "reference"
    assert refused(server.url("/redirect?/redirect?/redirect"))[0] != "reference"
    loop = "/redirect?" * 8
    assert refused(server.url(loop + "/good"))[0] == "redirects"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "http_status"),
        ("/endless", "too_many_bytes"),
        ("/large", "too_many_bytes"),
        ("/packed", "packed"),
        ("/robots?noai", "opted_out"),
        ("/robots?all,%20noimageindex", "opted_out"),
        ("/robots?darkroom:%20noindex", "opted_out"),
        ("/robots?noai,%20max-image-preview:large", "opted_out"),
        ("/robots?otherbot:%20nofollow,%20darkroom:%20noai", "opted_out"),
        ("/robots?noindex,%20unavailable_after:%2025%20Jun%202010", "opted_out"),
        ("/robots?none", "opted_out"),
        ("/said?X-Robots-Tag=all&X-Robots-Tag=NoAI", "opted_out"),
        ("/said?X-Robots-Tag=otherbot:%20noai&x-robots-tag=darkroom:%20none", "opted_out"),
        ("/said?tdm-reservation=1", "opted_out"),
        ("/said?TDM-Reservation=0&tdm-reservation=%201", "opted_out"),
        ("/said?Location=/good&X-Robots-Tag=noimageai", "opted_out"),
        ("/said?Location=/good&tdm-reservation=1", "opted_out"),
        ("/astray", "reference"),
    ],
)
def test_what_a_server_may_not_do_is_a_reason(server, path, reason):
    assert refused(server.url(path))[0] == reason
    assert len(server.asked) == 1, "asked again in vain"


def test_opt_outs_of_others_and_of_those_who_do_not_honour_them(server):
    with Downloader(HERE) as get:
        assert get(server.url("/robots?otherbot:%20noai")) == BODY
        assert get(server.url("/said?tdm-reservation=0&X-Robots-Tag=nofollow")) == BODY
        assert get(server.url("/said?Location=/good&X-Robots-Tag=otherbot:%20noai")) == BODY
    with Downloader(DownloadRules(private_hosts=("127.0.0.1",), honour_opt_out=False)) as get:
        assert get(server.url("/robots?noai")) == BODY
        assert get(server.url("/said?Location=/good&tdm-reservation=1")) == BODY


def test_a_slow_drip_ends_at_the_deadline(server):
    started = time.monotonic()
    reason, detail = refused(
        server.url("/drip"), DownloadRules(private_hosts=("127.0.0.1",), seconds=0.4, retries=1)
    )
    assert (reason, len(server.asked)) == ("unreachable", 2)
    assert "out of time" in detail or "ReadTimeout" in detail
    assert time.monotonic() - started < 5


def test_headers_that_never_end_do(server):
    started = time.monotonic()
    rules = DownloadRules(private_hosts=("127.0.0.1",), seconds=0.4, retries=0)
    assert refused(server.url("/headers"), rules)[0] == "unreachable"
    assert time.monotonic() - started < 5


def test_what_servers_write_into_headers(server):
    server.pictures["%C3%A4.png"] = BODY
    with Downloader(HERE) as get:
        assert get(server.url("/umlaut")) == BODY
    assert refused(server.url("/strange-wait"))[0] == "unreachable"


def test_private_hosts_are_meant_however_they_are_written(server):
    rules = DownloadRules(private_hosts=("LocalHost",), user_agent="darkroom/1.0 (+https://x.y)")
    with Downloader(rules) as get:
        assert get(server.url("/good", "LOCALHOST")) == BODY
    assert refused(server.url("/robots?darkroom:%20noai", "localhost"), rules)[0] == "opted_out"


def test_a_server_that_says_later_is_asked_later(server):
    waits: list[float] = []
    with Downloader(HERE, sleep=waits.append) as get:
        assert get(server.url("/busy")) == BODY
    assert len(waits) == 2 and all(7.0 <= it <= 10.0 for it in waits)
    server.busy = 100
    assert refused(server.url("/busy"))[0] == "unreachable"
    assert refused(server.url("/cut"))[0] == "unreachable"
    assert refused("http://127.0.0.1:1/a.png")[0] == "unreachable"


def waits_of(rules: DownloadRules, url: str) -> list[float]:
    waits: list[float] = []
    with Downloader(rules, sleep=waits.append) as get, pytest.raises(Rejected, match="unreachable"):
        get(url)
    return waits


def spread(waits: list[float], least: float, most: float) -> bool:
    """Whether they lie between the two, and in each fifth of what is between."""
    fifths = {int(5 * (it - least) / (most - least)) for it in waits if least <= it < most}
    return all(least <= it <= most for it in waits) and fifths == {*range(5)}


def test_a_crowd_does_not_return_together(server):
    """Full jitter where nothing is said, and some on top of what is: that is said to all alike."""
    random.seed(0)
    rules = DownloadRules(private_hosts=("127.0.0.1",), retries=6, total_seconds=1000)
    dead = [waits_of(rules, "http://127.0.0.1:1/a.png") for _ in range(60)]
    for attempt, waits in enumerate(zip(*dead, strict=True)):
        assert spread([*waits], 0.0, min(30.0, 2.0**attempt)), attempt
    server.busy = 10_000
    told = [waits_of(rules, server.url("/busy")) for _ in range(10)]
    assert spread([it for waits in told for it in waits], 7.0, 10.0)
    assert len({*map(tuple, told)}) == 10


def test_a_wait_of_hours_is_not_waited(server):
    rules = DownloadRules(private_hosts=("127.0.0.1",), retries=1, total_seconds=1000)
    (wait,) = waits_of(rules, server.url("/said-later?86400"))
    assert 30.0 <= wait <= 33.0


def test_tries_and_waits_end_together(server):
    """Ten tries of .4 seconds with waits of up to half a minute between them: no more than one."""
    rules = DownloadRules(private_hosts=("127.0.0.1",), seconds=0.4, retries=10, total_seconds=1.0)
    server.busy = 100
    for path in ("/drip", "/busy", "/said-later?1"):
        started = time.monotonic()
        with Downloader(rules) as get, pytest.raises(Rejected, match="unreachable"):
            get(server.url(path))
        assert time.monotonic() - started < 3
    assert server.asked.count("/busy") == 1, "who must wait for longer than there is gives up"


def test_a_resolver_that_hangs_is_left_alone(server, monkeypatch):
    """It knows no time-out of its own; the name is asked for once, however many want to know."""
    asked, released, look_up = [], threading.Event(), socket.getaddrinfo

    def stalled(host, *arguments, **options):
        if host != "slow.example":
            return look_up(host, *arguments, **options)
        asked.append(host)
        released.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "no word")

    monkeypatch.setattr(socket, "getaddrinfo", stalled)
    rules = DownloadRules(private_hosts=("127.0.0.1",), seconds=0.3, retries=2, total_seconds=1.5)
    started = time.monotonic()
    try:
        with Downloader(rules, sleep=lambda seconds: None) as get:
            urls = [f"http://slow.example/{i}.png" for i in range(8)] + [server.url("/good")]
            *slow, good = get.all(urls)
    finally:
        released.set()
    assert time.monotonic() - started < 5
    assert good == BODY
    assert {it.reason for it in slow} == {"unreachable"}
    assert all("no word from the resolver" in it.detail for it in slow)
    assert len(asked) == 1


def test_many_at_a_time_in_order_and_no_more_than_allowed(server):
    rules = DownloadRules(private_hosts=("127.0.0.1",), concurrency=4)
    urls = [server.url(f"/{'missing' if i % 5 == 0 else 'slow-good'}?{i}") for i in range(24)]
    with Downloader(rules) as get:
        found = [*get.all(urls)]
    for i, it in enumerate(found):
        assert it.reason == "http_status" if i % 5 == 0 else it == BODY
    assert 2 <= server.most <= 4
    assert sorted(server.asked) == sorted(url.split(str(server.server_port))[1] for url in urls)


@pytest.mark.parametrize(("most_bytes", "least", "most"), [(1 << 20, 60, 60), (2500, 4, 6)])
def test_one_that_is_slow_does_not_hold_up_the_others(server, monkeypatch, most_bytes, least, most):
    """All the others may come before the first of 4 at a time, or those whose bytes are more than
    allowed: three of them, and the two that were under way by then."""
    monkeypatch.setattr(downloads, "_AHEAD_BYTES", most_bytes)
    rules = DownloadRules(private_hosts=("127.0.0.1",), concurrency=4, retries=0)
    urls = [server.url(f"/{'good' if i else 'patient'}?{i}") for i in range(60)]
    counts: list[int] = []

    def let_go():
        deadline = time.monotonic() + 20
        while len(server.asked) < least and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # for those that should not be asked
        counts.append(len(server.asked))
        server.patience.set()

    thread = threading.Thread(target=let_go)
    thread.start()
    with Downloader(rules) as get:
        assert [*get.all(urls)] == [BODY] * 60
    thread.join()
    assert least <= counts[0] <= most
    assert len(server.asked) == 60
    assert server.most <= 4


@pytest.fixture
def peak():
    """The most bytes that Python has held beside those it holds now."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()


def test_bodies_on_their_way_are_held_within_the_budget(server, monkeypatch, peak):
    """Eight at a time of four megabytes, in room for six, and the one whose turn it is beside."""
    size, most = 4 << 20, 6 << 20
    monkeypatch.setattr(downloads, "_AHEAD_BYTES", most)
    bodies = [bytes([i]) * size for i in range(4)]
    server.pictures = {str(i): bodies[i % 4] for i in range(24)}
    rules = DownloadRules(private_hosts=("127.0.0.1",), concurrency=8, retries=0)
    urls = [server.url(f"/{i if i else 'patient'}") for i in range(24)]
    early: list[int] = []

    def let_go():  # the others come first, as far as they may
        deadline = time.monotonic() + 20
        while len(server.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        early.append(len(server.asked))
        server.patience.set()

    thread = threading.Thread(target=let_go)
    with Downloader(rules) as get:
        assert get(server.url("/good")) == BODY  # what a pool is made of is no body
        thread.start()
        before, answers = peak(), get.all(urls)
        for i in range(24):
            assert next(answers) == (bodies[i % 4] if i else BODY)
        assert next(answers, None) is None
    thread.join()
    # BytesIO has an eighth more than it is asked for; sockets and h11 have buffers of their own
    assert before + most < peak() < before + 1.125 * (most + size) + (3 << 20)
    assert early[0] >= 4
    assert len(server.asked) == 25, "none was asked for twice"


def test_a_body_is_held_once(server, peak):
    size = 32 << 20
    server.pictures["large.png"] = bytes(size)
    before = peak()
    with Downloader(HERE) as get:
        assert len(get(server.url("/large.png"))) == size
    assert peak() - before < 1.3 * size


def test_waiting_for_room_is_no_part_of_the_deadlines(server, monkeypatch):
    """Who asks takes longer in all than a download may take: that is of servers' time alone."""
    monkeypatch.setattr(downloads, "_AHEAD_BYTES", 1 << 20)
    server.pictures = {str(i): bytes([i]) * (4 << 20) for i in range(6)}
    rules = DownloadRules(
        private_hosts=("127.0.0.1",), concurrency=4, retries=0, seconds=0.8, total_seconds=0.8
    )
    with Downloader(rules) as get:
        for i, found in enumerate(get.all(server.url(f"/{i}") for i in range(6))):
            assert found == server.pictures[str(i)]
            time.sleep(0.5)
    assert len(server.asked) == 6


def test_a_server_that_hangs_up_on_one_that_waits_is_asked_again(server, monkeypatch):
    """Without `retries`, as it is not the server's fault; nor does a dead one hold up the end."""
    monkeypatch.setattr(downloads, "_AHEAD_BYTES", 2000)
    rules = DownloadRules(private_hosts=("127.0.0.1",), concurrency=3, retries=0, seconds=5.0)
    server.pictures["b"] = bytes(1 << 20)
    urls = [server.url(f"/{it}") for it in ("patient", "hangs-up", "b")]
    timer = threading.Timer(0.6, server.patience.set)
    timer.start()
    with Downloader(rules) as get:
        assert [len(it) for it in get.all(urls)] == [1000, 100_000, 1 << 20]
    timer.join()
    assert server.asked.count("/hangs-up") == 2


def test_who_stops_asking_waits_for_no_more_than_is_under_way(server, monkeypatch):
    monkeypatch.setattr(downloads, "_AHEAD_BYTES", 0)
    rules = DownloadRules(private_hosts=("127.0.0.1",), concurrency=4)
    with Downloader(rules) as get:
        answers = get.all(server.url(f"/good?{i}") for i in range(60))
        assert next(answers) == BODY
        answers.close()
    assert len(server.asked) < 10


def test_what_is_asked_for_is_written_in_ascii():
    canonical = downloads._canonical("http://user:word@BÜCHER.example:8080/ä b.png?q=ö&x=1#top")
    assert canonical == ("http://xn--bcher-kva.example:8080/%C3%A4%20b.png?q=%C3%B6&x=1")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("fec0::1", False),
        ("64:ff9b:1::a9fe:a9fe", False),
        ("64:ff9b::808:808", True),
        ("::ffff:0:7f00:1", False),
        ("::7f00:1", False),
        ("5f00::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_remote_is_the_web_alone():
    assert is_remote("https://a/b")
    assert is_remote("HTTP://a/b")
    assert not is_remote("s3://a/b")
    assert not is_remote("http:/a/b")
    assert not is_remote("/a/http://b")


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"retries": -1}, {"seconds": 0}, {"total_seconds": 0}]
)
def test_rules_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="download: got"):
        DownloadRules(**wrong)


def table(tmp_path, rows):
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_table_of_urls_becomes_a_data_set(server, tmp_path):
    server.pictures = {f"{i}.png": picture(i) for i in range(40)}
    rows = [{"url": server.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(40)]
    rows[1]["sha256"] = hashlib.sha256(picture(1)).hexdigest()
    rows[2]["sha256"] = "0" * 64
    rows[6]["md5"] = hashlib.md5(picture(6)).hexdigest()
    rows[7]["md5"] = "0" * 32
    rows[3]["url"] = server.url("/gone.png")
    rows[4]["url"] = server.url("/3.png", "localhost")
    rows[5]["url"] = server.url("/busy")
    server.busy = 10_000
    source = table(tmp_path, rows)
    rules = IngestRules(
        download=DownloadRules(private_hosts=("127.0.0.1",), retries=0, concurrency=3)
    )
    dataset = str(tmp_path / "dataset")
    first = ingest([source], dataset, rules)
    reasons = {k: v for k, v in first.counts.items() if k.startswith("rejected:")}
    assert reasons == {
        "rejected:hash_mismatch": 2,
        "rejected:http_status": 1,
        "rejected:private_address": 1,
        "rejected:unreachable": 1,
    }
    assert first.counts["kept"] == 35
    assert server.most <= 3

    # The server has got well, and the table has grown: the new row is fetched, and what could not
    # be reached; nothing else.
    server.pictures["40.png"] = picture(40)
    server.asked.clear()
    server.busy = 0
    grown = table(tmp_path, [*rows, {"url": server.url("/40.png"), "caption": "picture 40"}])
    second = ingest([grown], dataset, rules)
    assert sorted(server.asked) == ["/40.png", "/busy"]
    assert second.counts["seen"] == 41
    assert second.counts["kept"] == 36
    assert "rejected:unreachable" not in second.counts  # what came was no picture: another reason
    assert second.counts["rejected:not_image"] == 1
    assert ingest([grown], dataset, rules).reused


def test_what_could_not_be_reached_is_tried_again(tmp_path, server):
    """Nothing was published: the same command asks again, and a host that is named now is asked."""
    server.pictures = {f"{i}.png": picture(i) for i in range(3)}
    rows = [{"url": server.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(3)]
    source, dataset = table(tmp_path, rows), str(tmp_path / "dataset")
    with pytest.raises(ValueError, match="3 private_address"):
        ingest([source], dataset, IngestRules())
    named = IngestRules(download=DownloadRules(private_hosts=("127.0.0.1",), retries=0))
    away, server.pictures = server.pictures, {}
    Handler.down = True
    try:
        with pytest.raises(ValueError, match="3 unreachable"):
            ingest([source], dataset, named)
    finally:
        Handler.down = False
    server.pictures = away
    assert ingest([source], dataset, named).counts["kept"] == 3


def test_a_run_cut_short_fetches_again_only_what_was_out_of_reach(tmp_path, server, monkeypatch):
    """One dead link in every unit: what the others gave is kept all the same."""
    server.pictures = {f"{i}.png": picture(i) for i in range(128)}
    rows = [{"url": server.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(128)]
    for place in (3, 40, 70, 100):
        rows[place]["url"] = f"http://127.0.0.1:1/{place}.png"
    source, dataset = table(tmp_path, rows), str(tmp_path / "dataset")
    rules = IngestRules(
        download=DownloadRules(private_hosts=("127.0.0.1",), retries=0), heldout_share=0
    )
    write, done = storage.publish_bytes, []

    def cut(url, data, durable=True):
        write(url, data, durable)
        if url.endswith(".jsonl"):
            done.append(url)
            if len(done) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(storage, "publish_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        ingest([source], dataset, rules)
    monkeypatch.setattr(storage, "publish_bytes", write)
    assert len(server.asked) == 3 * 31
    server.pictures["late.png"] = picture(200)
    server.asked.clear()
    result = ingest([source], dataset, rules)
    assert len(server.asked) == 31
    assert result.counts["kept"] == 124
    assert result.counts["rejected:unreachable"] == 4
    again = ingest([source], str(tmp_path / "undisturbed"), rules)
    assert again.manifest.digest == result.manifest.digest
    assert again.manifest.inputs == result.manifest.inputs


def test_urls_that_stay_dead_do_not_stop_the_growth(tmp_path, server):
    server.pictures = {f"{i}.png": picture(i) for i in range(12)}
    good = [{"url": server.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(10)]
    dead = [{"url": f"http://127.0.0.1:1/{i}.png", "caption": f"gone {i}"} for i in range(5)]
    rules = IngestRules(download=DownloadRules(private_hosts=("127.0.0.1",), retries=0))
    dataset = str(tmp_path / "dataset")
    ingest([table(tmp_path, [*good, *dead])], dataset, rules)
    more = [{"url": server.url("/10.png"), "caption": "picture 10"}]
    grown = ingest([table(tmp_path, [*good, *dead, *more])], dataset, rules)
    assert grown.counts["kept"] == 11
    assert grown.counts["rejected:unreachable"] == 5
    assert grown.counts["seen"] == 16


def test_what_is_tried_again_is_named_once_however_many_rows_there_were(
    tmp_path, server, monkeypatch
):
    """Not once for each batch of the rows of the version before."""
    server.pictures = {f"{i}.png": picture(i) for i in range(11)}
    good = [{"url": server.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(10)]
    dead = [{"url": f"http://127.0.0.1:1/{i}.png", "caption": f"gone {i}"} for i in range(5)]
    more = [{"url": server.url("/10.png"), "caption": "picture 10"}]
    rules = IngestRules(download=DownloadRules(private_hosts=("127.0.0.1",), retries=0))
    name, named, took = passes.row_name, [], []
    monkeypatch.setattr(passes, "row_name", lambda *it: named.append(it) or name(*it))
    for rows_at_once in (100, 4):
        monkeypatch.setattr(outcomes, "_GROUP", rows_at_once)
        dataset = str(tmp_path / str(rows_at_once))
        ingest([table(tmp_path, [*good, *dead])], dataset, rules)
        named.clear()
        grown = ingest([table(tmp_path, [*good, *dead, *more])], dataset, rules)
        assert (grown.counts["seen"], grown.counts["rejected:unreachable"]) == (16, 5)
        took.append(len(named))
    assert took[0] == took[1]


@pytest.mark.parametrize(
    ("executor", "all_workers", "each"),
    [
        (Executor(), 16, 16),
        (Executor(kind="processes", workers=2), 16, 8),
        (Executor(kind="processes", workers=2), 5, 2),
        (Executor(kind="processes", workers=2), 1, 1),
        (Executor(kind="processes", workers=40), 16, 8),  # there are but two units
    ],
)
def test_the_workers_of_a_run_share_its_downloads(
    server, tmp_path, monkeypatch, executor, all_workers, each
):
    server.pictures = {f"{i}.png": picture(i) for i in range(40)}
    rows = [{"url": server.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(40)]
    given = []

    def noted(factory, units, **options):
        if factory.func is passes.reader:
            given.append((len(units), factory.args[2].concurrency))
        return run(factory, units, **options | {"executor": Executor()})

    monkeypatch.setattr(passes, "run", noted)
    download = DownloadRules(private_hosts=("127.0.0.1",), concurrency=all_workers)
    result = ingest(
        [table(tmp_path, rows)], str(tmp_path / "set"), IngestRules(download=download), executor
    )
    assert given == [(2, each)]
    assert result.counts["kept"] == 40
    assert result.manifest.rules["download"]["concurrency"] == all_workers


def test_how_pictures_are_fetched_does_not_decide_what_they_are(tmp_path, server):
    server.pictures = {"a.png": picture(0)}
    source = table(tmp_path, [{"url": server.url("/a.png"), "caption": "x"}])
    dataset = str(tmp_path / "dataset")
    rules = IngestRules(download=HERE)
    ingest([source], dataset, rules)
    other = IngestRules(download=DownloadRules(concurrency=2, private_hosts=("127.0.0.1",)))
    assert ingest([source], dataset, other).reused
    assert ingesting.unchanged([source], dataset, other) is not None
