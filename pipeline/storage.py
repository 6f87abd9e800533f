"""A file is visible whole or not at all, wherever it lies.

Every path is an fsspec URL; plain local paths are URLs too and take a road that needs no fsspec.
What is published under a name first exists under a hidden one beside it (local disks) or in one
upload (object stores). Hidden names say which process wrote them, so `sweep` can tell what a killed
run left behind from what a living one is writing; of other machines' it knows but the age. A store
that is out of reach is asked again; what fails in the end is an OSError that names the URL, and on
a full disk `NoRoom`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

_HOST = socket.gethostname().replace(".", "-")
_COUNTER = itertools.count()
_S3 = ("s3://", "s3a://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Scheme -> the extra of pyproject.toml with what reads it."""
_TRIES = 8
_LONGEST_WAIT = 32.0
_CONNECT_SECONDS, _STALL_SECONDS = 5, 15
_SLOWEST_UPLOAD = 1 << 18  # bytes per second
_BUFFER = 1 << 20
_IN_USE_SECONDS = 600
"""For which a file that was asked of the cache stays there: by then it is open."""
_SPARE_SHARE = 0.01
_FOREIGN_SECONDS = 86_400
"""After which nobody writes a draft any more. Nothing locks encoders out, and units of downloads
take hours where servers are slow."""


class NoRoom(OSError):
    """A full disk: which, and what is left of it."""


def is_full(error: BaseException) -> bool:
    """Whether a full disk, a quota or a limit on the size of a file is what went wrong."""
    number = getattr(error, "errno", None)
    if number is None and "os error 28" in str(error):  # safetensors writes from Rust
        return True
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Damaged(OSError):
    """A file that cannot be read, and will not be."""


def is_local(url: str) -> bool:
    """Whether the URL is a path of this machine (`x`, `/x`, `file:///x`)."""
    return "://" not in url or url.startswith("file://")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of the URL and the path inside it."""
    from fsspec import core  # pyright: ignore[reportMissingTypeStubs]

    library: Any = core
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write there too
    if url.startswith(("http://", "https://")):
        from .download import source_client

        options["get_client"] = source_client
    if url.startswith(_S3):
        # One request at a time for each call: s3fs holds what it moves at once in memory, 50 MB a
        # request, and asks for the size before each read of a whole file.
        options["max_concurrency"] = 1
        # botocore and s3fs each try five times, not knowing of each other: 25 stalls of 15 s. Here
        # each tries once, and `_ask` again.
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _STALL_SECONDS,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            **library.conf.get("s3", {}).get("config_kwargs", {}),
        }
    try:
        files, path = library.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://", 1)[0])
        cure = f"; install darkroom[{extra}]" if extra else ""
        raise ImportError(f"{url}: {error}{cure}") from None
    if url.startswith(_S3):
        files.retries = 1
    return files, path


def local_path(url: str) -> str:
    """A local URL as a plain path."""
    return url.removeprefix("file://")


def absolute(url: str) -> str:
    """The same place in one spelling, independent of the working directory; no slash at the end."""
    if is_local(url):
        return os.path.abspath(os.path.expanduser(local_path(url)))
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """Parts below a URL, separated by single slashes."""
    return "/".join([url.rstrip("/") if url != "/" else "", *(part.strip("/") for part in parts)])


def parent(url: str) -> str:
    """The folder a file lies in."""
    return os.path.dirname(local_path(url)) or "." if is_local(url) else url.rsplit("/", 1)[0]


def exists(url: str) -> bool:
    """Whether a file or folder lies there."""
    if is_local(url):
        return os.path.exists(local_path(url))
    return _ask(url, lambda files, path: files.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole content. FileNotFoundError where there is none."""
    if is_local(url):
        return Path(local_path(url)).read_bytes()
    return _ask(url, lambda files, path: files.cat_file(path))


def read_at_most(url: str, most: int) -> bytes:
    """The whole content, or `most` + 1 bytes or more of what is longer."""
    if not is_local(url):
        with open_read(url) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return file.read(min(size, most) + 1)  # room is made for all that is asked for
    with open(local_path(url), "rb", 0) as file:
        size = os.fstat(file.fileno()).st_size
        return file.readall() if size <= most else file.read(most + 1)


def open_read(url: str) -> IO[bytes]:
    """The file opened for reading from any position."""
    if is_local(url):
        return open(local_path(url), "rb")
    return io.BufferedReader(_Reader(url), 1 << 16)


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The pieces `(offset, length)` of one file, in the order asked, each of that length.

    `Damaged` where the file ends before; OSError where a server sends more than it was asked for.
    """
    if is_local(url):
        with open(local_path(url), "rb", 0) as file:
            found = [os.pread(file.fileno(), length, offset) for offset, length in ranges]
        _check_lengths(url, ranges, found)
        return found
    pieces: dict[int, bytes] = {}

    def missing(files: Any, path: str) -> None:
        left = [number for number in range(len(ranges)) if number not in pieces]
        starts = [ranges[number][0] for number in left]
        ends = [sum(ranges[number]) for number in left]
        answers = files.cat_ranges([path] * len(left), starts, ends, on_error="return")
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        pieces.update(
            it for it in zip(left, answers, strict=True) if not isinstance(it[1], Exception)
        )
        if failed:
            raise failed[0]

    _ask(url, missing)
    found = [pieces[number] for number in range(len(ranges))]
    _check_lengths(url, ranges, found)
    return found


def read_json(url: str) -> Any:
    """The parsed JSON content. ValueError names the file when it is none."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise ValueError(f"{url}: not JSON ({error})") from None


def list_names(url: str) -> list[str]:
    """Sorted base names in a folder, hidden ones left out; [] where there is no folder."""
    if is_local(url):
        try:
            names = os.listdir(local_path(url))
        except (FileNotFoundError, NotADirectoryError):
            return []
    else:
        try:
            entries = _ask(url, lambda files, path: files.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries]
    return sorted(name for name in names if not name.startswith("."))


def list_stamps(url: str, linked: bool = False) -> dict[str, str]:
    """Path below a folder -> "size-time", all files in all its folders, sorted; hidden ones left
    out, and folders that are links too, but for `linked`.

    The time is the modification time in nanoseconds, or what the object store gives in its place.
    """
    found: dict[str, str] = {}
    if is_local(url):
        folders = [("", local_path(url), frozenset[tuple[int, int]]())]
        while folders:
            prefix, folder, above = folders.pop()
            status = os.stat(folder)
            above |= {(status.st_dev, status.st_ino)}
            for entry in os.scandir(folder):
                if entry.name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing or to itself, or it has just gone
                    continue
                if stat.S_ISREG(status.st_mode):
                    found[prefix + entry.name] = _stamp(status)
                elif (
                    stat.S_ISDIR(status.st_mode)
                    and (linked or not entry.is_symlink())
                    and (status.st_dev, status.st_ino) not in above  # a link back has no end
                ):
                    folders.append((f"{prefix}{entry.name}/", entry.path, above))
    else:
        root = filesystem(url)[1].strip("/")
        entries = _ask(url, lambda files, path: files.find(path, detail=True))
        for name, info in entries.items():
            relative = name.strip("/").removeprefix(root).strip("/")
            if relative and not any(part.startswith(".") for part in relative.split("/")):
                found[relative] = _remote_stamp(info)
    return dict(sorted(found.items()))


def stamp(url: str) -> str | None:
    """ "size-time" of one file, as in `list_stamps`; None where there is no plain file."""
    if is_local(url):
        try:
            status = os.stat(local_path(url))
        except (OSError, ValueError):
            return None
        return _stamp(status) if stat.S_ISREG(status.st_mode) else None
    try:
        info = _ask(url, lambda files, path: files.info(path))
    except FileNotFoundError:
        return None
    return _remote_stamp(info) if info["type"] == "file" else None


def is_html(url: str) -> bool:
    """Whether a web server answers a page, and says so."""
    try:
        info = _ask(url, lambda files, path: files.info(path))
    except FileNotFoundError:
        return False
    if info.get("mimetype") != "text/html":
        return False
    with open_read(url) as file:  # some servers say so of all that they do not know
        return file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


@contextlib.contextmanager
def draft(folder: str, durable: bool = True) -> Generator[tuple[IO[bytes], Callable[[str], None]]]:
    """A hidden file to write into, and a function that publishes it under a URL, once.

    For local folders the file lies below `folder`, so that publishing is a rename, in a hidden
    folder of its own, for some libraries write beside what they are to write. What is not published
    is removed. `NoRoom` where the disk is full.
    """
    place = local_path(folder) or "." if is_local(folder) else tempfile.gettempdir()
    with contextlib.ExitStack() as after, room(place):  # which looks before the draft is removed
        if is_local(folder):
            os.makedirs(place, exist_ok=True)
            own = _hidden(os.path.join(place, "draft"))
            os.mkdir(own)
        else:
            own = tempfile.mkdtemp(prefix="darkroom-")
        after.callback(shutil.rmtree, own, ignore_errors=True)
        hidden = os.path.join(own, "draft")
        with open(hidden, "wb", _BUFFER) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)

            def publish(url: str) -> None:
                file.flush()
                try:
                    # safetensors puts a file of its own, that others may not read, in its place
                    os.chmod(hidden, mode)
                except FileNotFoundError:
                    raise FileNotFoundError(
                        errno.ENOENT,
                        "what was written was removed meanwhile, by a take-down on another "
                        "machine, as a rule; run again",
                        url,
                    ) from None
                publish_file(hidden, url, durable)

            yield file, publish


def unnamed(folder: str) -> IO[bytes]:
    """A file to write and read that has no name: on the disk of a local folder, else where
    temporary files go. It is gone when it is closed, and when the process dies.
    """
    place = local_path(folder) if is_local(folder) else None
    if place:
        os.makedirs(place, exist_ok=True)
    return tempfile.TemporaryFile(dir=place)


@contextlib.contextmanager
def publishing(url: str, durable: bool = True) -> Generator[IO[bytes]]:
    """A file to write into that appears under `url` if the block ends well, replacing what was
    there. Where it need not be `durable`, a machine that loses its power may lose what is in it.
    """
    with draft(parent(url), durable) as (file, publish):
        yield file
        publish(url)


def publish_bytes(url: str, data: bytes, durable: bool = True) -> None:
    """Make the file hold `data`, replacing what was there."""
    if is_local(url):
        with publishing(url, durable) as file:
            file.write(data)
    else:
        _ask(url, lambda files, path: _upload(files, len(data), "pipe_file", path, data))


def publish_json(url: str, obj: Any) -> None:
    """`publish_bytes` of the canonical JSON text (sorted keys, indent 1)."""
    publish_bytes(url, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """Canonical JSON text: one object, one spelling. NaN, which is not JSON, is a ValueError."""
    return (json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def publish_file(local: str | os.PathLike[str], url: str, durable: bool = True) -> None:
    """Move a local file to `url`, replacing what was there; the local name is gone afterwards."""
    source = os.fspath(local)
    if is_local(url):
        target = local_path(url)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        if durable:
            with open(source, "rb") as file:
                os.fsync(file.fileno())
        try:
            os.replace(source, target)
        except OSError:  # another disk: copy beside the target, then rename
            with open(source, "rb") as file, publishing(url) as out:
                shutil.copyfileobj(file, out, 1 << 20)
            os.unlink(source)
    else:
        size = os.path.getsize(source)
        _ask(url, lambda files, path: _upload(files, size, "put_file", source, path))
        os.unlink(source)


def create_exclusive(url: str, data: bytes) -> bool:
    """Create the file with `data`. True: we did; False: it was there already and stays as it is."""
    if not is_local(url):
        mark = {"Metadata": {"writer": uuid.uuid4().hex}} if url.startswith(_S3) else {}

        def create(files: Any, path: str) -> None:
            _upload(files, len(data), "pipe_file", path, data, mode="create", **mark)

        try:
            _ask(url, create)
        except FileExistsError:
            # It may be ours: the answer to a write that did succeed gets lost, and it is repeated.
            there = {"Metadata": _ask(url, lambda files, path: files.metadata(path))} if mark else 0
            return there == mark
        return True
    with draft(parent(url)) as (file, _):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, local_path(url))  # unlike rename, link refuses to replace
        except FileExistsError:
            return False
    return True


def delete(url: str) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    if is_local(url):
        path = local_path(url)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        _ask(url, lambda files, path: files.rm(path, recursive=True))


def local_copy(url: str) -> Path:
    """A local file with the content of `url`: local files as they are, remote ones through a cache.

    The cache (`$DARKROOM_HOME/cache`) goes by URL alone, so it is for names that never change their
    content: shards, encodings, weights. Of its disk it leaves a share free (`_make_room`), so the
    path is to be opened at once, and asked for again to be opened again.
    """
    if is_local(url):
        return Path(local_path(url))
    target = _cached(url)
    if not _use(target):
        with _fetched(url, target.parent) as (_, publish):
            publish(str(target))
    return target


@contextlib.contextmanager
def reading(url: str) -> Generator[IO[bytes]]:
    """The file, opened to be read this once: of a remote one that the cache does not have, nothing
    stays on this machine.
    """
    path = Path(local_path(url)) if is_local(url) else _cached(url)
    with contextlib.ExitStack() as after:
        if is_local(url) or _use(path):
            file = after.enter_context(open(path, "rb"))
        else:
            with _fetched(url, path.parent) as (fetched, _):  # outlived by what was opened in it
                file = after.enter_context(open(fetched.name, "rb"))
        yield file


def forget(url: str) -> None:
    """Delete what `local_copy` keeps of a remote file on this machine."""
    if not is_local(url):
        _cached(url).unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(url: str, all_foreign: bool = False) -> None:
    """Remove the hidden drafts that dead processes of this machine left in a local folder, and
    those of other machines, whose processes cannot be asked, that nobody has written to for a day.

    With `all_foreign` none of another machine's stays: who still writes one fails, and publishes
    nothing.
    """
    if not is_local(url) or not os.path.isdir(local_path(url)):
        return
    for entry in os.scandir(local_path(url)):
        parts = entry.name.rsplit(".", 4)  # .name.host.pid.count.tmp
        if entry.name.startswith(".") and len(parts) == 5 and parts[-1] == "tmp":
            host, pid = parts[1:3]
            if host != _HOST:
                left = all_foreign or time.time() - _written_at(entry.path) > _FOREIGN_SECONDS
            else:
                left = pid.isdigit() and not _alive(int(pid))
            if left:
                shutil.rmtree(entry.path, ignore_errors=True)


_sweep_once = functools.cache(sweep)


@contextlib.contextmanager
def lock(url: str) -> Generator[None]:
    """One process at a time, on local disks: a second waits. The lock of a killed process is free
    at once.

    Object stores have no such lock; there the create-exclusive version file decides.
    """
    if not is_local(url):
        yield
        return
    import fcntl

    path = local_path(url)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ask(url: str, question: Callable[[Any, str], Any]) -> Any:
    """What the file system of a remote URL answers, asked again while it is out of reach.

    Waits have full jitter (Brooker 2015): a crowd that failed together does not return together.
    """
    files, path = filesystem(url)
    for attempt in itertools.count(1):
        try:
            return question(files, path)
        except NoRoom:
            raise
        except Exception as error:  # the stores' own have no base class in common
            if attempt < _TRIES and _passing(error):
                time.sleep(random.uniform(0, min(_LONGEST_WAIT, 2.0 ** (attempt - 2))))
                continue
            said = (error.strerror if isinstance(error, OSError) else "") or str(error)
            if not isinstance(error, OSError) or not said:
                said = f"{type(error).__name__}: {said}".strip(": ")
            if _passing(error):
                said += f" ({attempt} tries; run again once it answers)"
            raise OSError(_error_number(error), said, url) from error
    raise AssertionError


def _check_lengths(url: str, ranges: Sequence[tuple[int, int]], found: Sequence[bytes]) -> None:
    for (offset, length), piece in zip(ranges, found, strict=True):
        if len(piece) == length:
            continue
        said = f"from byte {offset:,} on: got {len(piece):,} bytes, wanted {length:,}"
        if len(piece) < length:
            raise Damaged(errno.EIO, f"{said}; the file is cut, copy it anew", url)
        raise OSError(  # of the whole file, most likely: a picture would be anything
            errno.EIO,
            f"{said}; the server ignores Range: copy the file here, or serve it by one that knows "
            "partial answers (nginx, an object store; not python -m http.server)",
            url,
        )


def _upload(files: Any, size: int, method: str, *args: Any, **options: Any) -> None:
    """`pipe_file` or `put_file` with a deadline: clients of S3 wait for ever until they may write.

    (aiohttp counts the seconds of a stall only once a request is out.)
    """
    if not files.async_impl:
        getattr(files, method)(*args, **options)
        return
    from fsspec import asyn  # pyright: ignore[reportMissingTypeStubs]

    library: Any = asyn
    seconds = _STALL_SECONDS + size / _SLOWEST_UPLOAD
    library.sync(files.loop, getattr(files, f"_{method}"), *args, timeout=seconds, **options)


_PASSING = frozenset({errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EPIPE, errno.ECONNRESET})
_PASSING_NAMES = frozenset(
    {"ClientConnectionError", "ClientPayloadError", "ConnectionError", "FSTimeoutError"}
    | {"HTTPClientError", "IncompleteReadError", "ResponseParserError", "TimeoutError"}
)
"""Of fsspec, botocore, aiohttp and Python: by name, for any of them may be missing."""
_LASTING = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
}


def _passing(error: Exception) -> bool:
    """Whether trying again may help."""
    if isinstance(error, OSError) and (isinstance(error, tuple(_LASTING)) or error.errno):
        return error.errno in _PASSING
    if (status := getattr(error, "status", None)) is not None:
        return status in (408, 429, 500, 502, 503, 504)
    return any(kind.__name__ in _PASSING_NAMES for kind in type(error).__mro__)


def _error_number(error: Exception) -> int:
    """The one by which Python makes an OSError of the same kind."""
    known = next((number for kind, number in _LASTING.items() if isinstance(error, kind)), None)
    return known or getattr(error, "errno", None) or errno.EIO


class _Reader(io.RawIOBase):
    """A remote file whose reads are asked for by `_ask`."""

    def __init__(self, url: str):
        self._url = url
        self._file = _ask(url, lambda files, path: files.open(path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        start = self._file.tell()

        def read(*_: Any) -> bytes:
            if self._file.tell() != start:
                self._file.seek(start)
            return self._file.read(len(buffer))

        data = _ask(self._url, read)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def append_line(file: io.FileIO, line: bytes) -> None:
    """Append to an unbuffered file with one writer, all of the line or nothing. `NoRoom` where the
    disk is full."""
    with room(os.fsdecode(file.name), len(line)):
        end, written = file.seek(0, os.SEEK_END), 0
        try:
            # A disk that fills up takes what fits and says so at the next write only.
            while written < len(line):
                written += file.write(line[written:])
        except BaseException:
            file.truncate(end)  # or the next line is glued to a part of this one
            raise


@contextlib.contextmanager
def room(place: str, wanted: int = 0) -> Generator[None]:
    """A full disk, whoever noticed it, becomes `NoRoom`; `place` is a local path on it, `wanted`
    how many bytes were to be written where that is known."""
    try:
        yield
    except NoRoom:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        number = getattr(error, "errno", None) or errno.ENOSPC
        path = Path(place).absolute()  # which may not have been made yet
        room = shutil.disk_usage(next(it for it in (path, *path.parents) if it.exists()))
        asked = f"{wanted:,} bytes were to be written, " if wanted else ""
        raise NoRoom(
            number,
            f"{os.strerror(number)} ({asked}{room.free:,} of {room.total:,} bytes are free); "
            "make room and run again",
            place,
        ) from error


def _cached(url: str) -> Path:
    name = hashlib.blake2b(url.encode(), digest_size=8).hexdigest() + "-" + url.rsplit("/", 1)[-1]
    return Path(os.environ.get("DARKROOM_HOME", ".darkroom"), "cache", name)


@contextlib.contextmanager
def _fetched(url: str, cache: Path) -> Generator[tuple[IO[bytes], Callable[[str], None]]]:
    """A draft in the cache that holds a remote file."""
    _make_room(cache)
    with draft(str(cache)) as (file, publish):
        _ask(url, lambda files, path: files.get_file(path, file.name))
        yield file, publish


def _use(target: Path) -> bool:
    """Whether a file is in the cache. If so it is used from now on: it stays for _IN_USE_SECONDS.

    The lock is for `_evict`: it finds the file used, or has removed it before it is looked at here.
    """
    import fcntl

    try:
        with open(target, "rb") as file:
            with contextlib.suppress(OSError):  # another user's, or the disk knows no locks
                fcntl.flock(file, fcntl.LOCK_SH)
                # Its time of writing stays: by that the loader knows what it has looked through.
                written = os.fstat(file.fileno()).st_mtime_ns
                os.utime(file.fileno(), ns=(time.time_ns(), written))
            return os.fstat(file.fileno()).st_nlink > 0
    except FileNotFoundError:
        return False


def _make_room(cache: Path) -> None:
    """Where less of the disk is free than `$DARKROOM_CACHE_FREE`, remove what was not used for the
    longest time, and a little more, not to look through the cache for each file that comes.

    What was used just now, or is mapped by this process, stays: then the disk gets fuller.
    """
    if not cache.is_dir():
        return
    _sweep_once(str(cache))
    disk = shutil.disk_usage(cache)
    short = disk.total * _share_left_free() - disk.free
    if short <= 0:
        return
    sweep(str(cache))
    mapped, before = _mapped_names(), time.time() - _IN_USE_SECONDS
    found: list[tuple[float, int, str]] = []
    for entry in os.scandir(cache):
        with contextlib.suppress(FileNotFoundError):  # others make room, too
            if entry.is_file(follow_symlinks=False) and entry.name not in mapped:
                status = entry.stat()
                found.append((_used_at(status), status.st_size, entry.path))
    short += disk.total * _SPARE_SHARE
    for used_at, size, path in sorted(found):
        if short <= 0 or used_at >= before:
            return
        if _evict(path, before):
            short -= size


def _evict(path: str, before: float) -> bool:
    """Remove a file of the cache, unless it has been used since. Whether it is gone."""
    import fcntl

    try:
        with open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if gone := _used_at(os.fstat(file.fileno())) < before:
                os.unlink(path)
            fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open
            return gone
    except FileNotFoundError:
        return True
    except OSError:  # in use, or another user's
        return False


def _used_at(status: os.stat_result) -> float:
    return max(status.st_atime, status.st_mtime)


def _share_left_free() -> float:
    given = os.environ.get("DARKROOM_CACHE_FREE") or "0.1"
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(given)) <= 1:
            return share
    raise ValueError(
        f"DARKROOM_CACHE_FREE: got {given!r}, wanted the share of the disk that the cache leaves "
        "free, from 0 to 1"
    )


def _mapped_names() -> set[str]:
    """Of the files that this process has mapped, where the system tells."""
    try:
        maps = Path("/proc/self/maps").read_bytes()
    except OSError:
        return set()
    return {os.fsdecode(line.rpartition(b"/")[2]) for line in maps.splitlines()}


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _remote_stamp(info: Mapping[str, Any]) -> str:
    times = ("ETag", "etag", "md5", "mtime", "LastModified", "Last-Modified", "last_modified")
    times += ("created",)
    time = next((info[name] for name in times if info.get(name)), "")
    return f"{info['size']}-{time.timestamp() if isinstance(time, datetime) else time}"


def _hidden(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.{_HOST}.{os.getpid()}.{next(_COUNTER)}.tmp")


def _written_at(draft: str) -> float:
    """When a draft was made, or last written to."""
    times = [0.0]
    with contextlib.suppress(FileNotFoundError):  # it was published just now
        times.append(os.stat(draft).st_mtime)
        times += [entry.stat().st_mtime for entry in os.scandir(draft)]
    return max(times)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
