"""A file is visible whole or not at all, wherever it lies.

Every path is an fsspec URL; plain local paths are URLs too and take a road that needs no fsspec.
What is published under a name first exists under a hidden one beside it (local disks) or in one
upload (object stores). Hidden names say which process wrote them, so `sweep` can tell what a killed
run left behind from what a living one is writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

_HOST = socket.gethostname().replace(".", "-")
_COUNTER = itertools.count()


def is_local(url: str) -> bool:
    """Whether the URL is a path of this machine (`x`, `/x`, `file:///x`)."""
    return "://" not in url or url.startswith("file://")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of the URL and the path inside it."""
    from fsspec import core  # pyright: ignore[reportMissingTypeStubs]

    library: Any = core
    return library.url_to_fs(url)


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
    files, path = filesystem(url)
    return files.exists(path)


def read_bytes(url: str) -> bytes:
    """The whole content. FileNotFoundError where there is none."""
    if is_local(url):
        return Path(local_path(url)).read_bytes()
    files, path = filesystem(url)
    return files.cat_file(path)


def open_read(url: str) -> IO[bytes]:
    """The file opened for reading from any position."""
    if is_local(url):
        return open(local_path(url), "rb")
    files, path = filesystem(url)
    return files.open(path, "rb")


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The pieces `(offset, length)` of one file, in the order asked."""
    if is_local(url):
        with open(local_path(url), "rb") as file:
            return [os.pread(file.fileno(), length, offset) for offset, length in ranges]
    files, path = filesystem(url)
    starts = [offset for offset, _ in ranges]
    ends = [offset + length for offset, length in ranges]
    return files.cat_ranges([path] * len(ranges), starts, ends, on_error="raise")


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
        files, path = filesystem(url)
        try:
            files.invalidate_cache(path)
            names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name for name in names if not name.startswith("."))


def list_stamps(url: str) -> dict[str, str]:
    """Path below a folder -> "size-time", all files in all its folders, sorted; hidden ones left
    out.

    The time is the modification time in nanoseconds, or what the object store gives in its place.
    """
    found: dict[str, str] = {}
    if is_local(url):
        folders = [("", local_path(url))]
        while folders:
            prefix, folder = folders.pop()
            for entry in os.scandir(folder):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append((f"{prefix}{entry.name}/", entry.path))
                elif entry.is_file():
                    found[prefix + entry.name] = _stamp(entry.stat())
    else:
        files, path = filesystem(url)
        files.invalidate_cache(path)
        root = path.strip("/")
        for name, info in files.find(path, detail=True).items():
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
    files, path = filesystem(url)
    files.invalidate_cache(path)
    try:
        info = files.info(path)
    except FileNotFoundError:
        return None
    return _remote_stamp(info) if info["type"] == "file" else None


@contextlib.contextmanager
def draft(folder: str) -> Generator[tuple[IO[bytes], Callable[[str], None]]]:
    """A hidden file to write into, and a function that publishes it under a URL, once.

    For local folders the file lies in `folder`, so that publishing is a rename. What is not
    published is removed.
    """
    if is_local(folder):
        os.makedirs(local_path(folder) or ".", exist_ok=True)
        hidden = _hidden(os.path.join(local_path(folder), "draft"))
    else:
        handle, hidden = tempfile.mkstemp(prefix="darkroom-")
        os.close(handle)
    try:
        with open(hidden, "wb") as file:

            def publish(url: str) -> None:
                file.flush()
                publish_file(hidden, url)

            yield file, publish
    finally:
        Path(hidden).unlink(missing_ok=True)


@contextlib.contextmanager
def publishing(url: str) -> Generator[IO[bytes]]:
    """A file to write into that appears under `url` if the block ends well, replacing what was
    there.
    """
    with draft(parent(url)) as (file, publish):
        yield file
        publish(url)


def publish_bytes(url: str, data: bytes) -> None:
    """Make the file hold `data`, replacing what was there."""
    if is_local(url):
        with publishing(url) as file:
            file.write(data)
    else:
        files, path = filesystem(url)
        files.pipe_file(path, data)


def publish_json(url: str, obj: Any) -> None:
    """`publish_bytes` of the canonical JSON text (sorted keys, indent 1)."""
    publish_bytes(url, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """Canonical JSON text: one object, one spelling. NaN, which is not JSON, is a ValueError."""
    return (json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def publish_file(local: str | os.PathLike[str], url: str) -> None:
    """Move a local file to `url`, replacing what was there; the local name is gone afterwards."""
    source = os.fspath(local)
    if is_local(url):
        target = local_path(url)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        try:
            os.replace(source, target)
        except OSError:  # another disk: copy beside the target, then rename
            with open(source, "rb") as file, publishing(url) as out:
                shutil.copyfileobj(file, out, 1 << 20)
            os.unlink(source)
    else:
        files, path = filesystem(url)
        files.put_file(source, path)
        os.unlink(source)


def create_exclusive(url: str, data: bytes) -> bool:
    """Create the file with `data`. True: we did; False: it was there already and stays as it is."""
    if not is_local(url):
        files, path = filesystem(url)
        try:
            files.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
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
    files, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        files.rm(path, recursive=True)


def local_copy(url: str) -> Path:
    """A local file with the content of `url`: local files as they are, remote ones through a cache.

    The cache (`$DARKROOM_HOME/cache`) goes by URL alone, so it is for names that never change their
    content: shards, encodings, weights.
    """
    if is_local(url):
        return Path(local_path(url))
    name = hashlib.blake2b(url.encode(), digest_size=8).hexdigest() + "-" + url.rsplit("/", 1)[-1]
    target = Path(os.environ.get("DARKROOM_HOME", ".darkroom"), "cache", name)
    if not target.exists():
        files, path = filesystem(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = _hidden(str(target))
        try:
            files.get_file(path, hidden)
            os.replace(hidden, target)
        finally:
            Path(hidden).unlink(missing_ok=True)
    return target


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(url: str) -> None:
    """Remove the hidden files that dead processes of this machine left in a local folder."""
    if not is_local(url) or not os.path.isdir(local_path(url)):
        return
    for entry in os.scandir(local_path(url)):
        parts = entry.name.rsplit(".", 4)  # .name.host.pid.count.tmp
        if entry.name.startswith(".") and len(parts) == 5 and parts[-1] == "tmp":
            host, pid = parts[1:3]
            if host == _HOST and pid.isdigit() and not _alive(int(pid)):
                Path(entry.path).unlink(missing_ok=True)


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


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _remote_stamp(info: Mapping[str, Any]) -> str:
    times = ("ETag", "etag", "md5", "mtime", "LastModified", "created")
    time = next((info[name] for name in times if info.get(name)), "")
    return f"{info['size']}-{time.timestamp() if isinstance(time, datetime) else time}"


def _hidden(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.{_HOST}.{os.getpid()}.{next(_COUNTER)}.tmp")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
