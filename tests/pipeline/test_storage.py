"""What is published is whole; what exists is not created again; what a dead process left goes."""

import contextlib
import errno
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import storage

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "data")
    else:
        from fsspec.implementations.memory import MemoryFileSystem

        yield "memory://data"
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def test_what_is_written_is_read(root):
    url = storage.join(root, "a", "b.bin")
    assert not storage.exists(url)
    storage.publish_bytes(url, b"one")
    storage.publish_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    storage.publish_json(storage.join(root, "a", "c.json"), {"b": 1, "a": [None, "é"]})
    assert storage.read_json(storage.join(root, "a", "c.json")) == {"a": [None, "é"], "b": 1}
    assert storage.list_names(storage.join(root, "a")) == ["b.bin", "c.json"]
    assert storage.list_names(storage.join(root, "nowhere")) == []
    assert storage.read_ranges(url, [(1, 2), (0, 1)]) == [b"wo", b"t"]
    with pytest.raises(storage.Damaged, match="from byte 1 on: got 2 bytes, wanted 3; .*b.bin"):
        storage.read_ranges(url, [(0, 1), (1, 3)])
    with storage.open_read(url) as file:
        assert file.read(2) == b"tw"
    storage.delete(storage.join(root, "a"))
    assert not storage.exists(url)
    storage.delete(storage.join(root, "a"))


def test_json_text_is_canonical(tmp_path):
    assert storage.json_bytes({"b": 1, "a": 2}) == storage.json_bytes({"a": 2, "b": 1})
    with pytest.raises(ValueError):
        storage.json_bytes(float("nan"))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json"):
        storage.read_json(str(tmp_path / "x.json"))


def test_created_once(root):
    url = storage.join(root, "versions", "1.json")
    assert storage.create_exclusive(url, b"first")
    assert not storage.create_exclusive(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert storage.list_names(storage.join(root, "versions")) == ["1.json"]


def test_one_of_many_threads_creates(tmp_path):
    url, wins = str(tmp_path / "ledger" / "1.json"), []
    threads = [
        threading.Thread(
            target=lambda i=i: wins.append(storage.create_exclusive(url, b"%d" % i * 9999) and i)
        )
        for i in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [win for win in wins if win]
    assert storage.read_bytes(url) == b"%d" % winner * 9999


def test_a_file_moves_into_place(root, tmp_path):
    made = tmp_path / "made.bin"
    made.write_bytes(b"x" * 1000)
    url = storage.join(root, "deep", "er", "name.bin")
    storage.publish_file(made, url)
    assert storage.read_bytes(url) == b"x" * 1000
    assert not made.exists()


def test_an_error_while_writing_leaves_nothing(root):
    url = storage.join(root, "f.bin")
    storage.publish_bytes(url, b"old")

    def fail():
        with storage.publishing(url) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes(url) == b"old"
    if storage.is_local(root):
        assert os.listdir(root) == ["f.bin"]


def test_stamps_change_with_content(root):
    storage.publish_bytes(storage.join(root, "a", "x"), b"1")
    storage.publish_bytes(storage.join(root, "y"), b"22")
    before = storage.list_stamps(root)
    assert list(before) == ["a/x", "y"]
    assert storage.stamp(storage.join(root, "y")) == before["y"]
    assert storage.stamp(storage.join(root, "z")) is None
    assert storage.stamp(root) is None
    storage.publish_bytes(storage.join(root, "a", "x"), b"333")
    after = storage.list_stamps(root)
    assert after["a/x"] != before["a/x"]
    assert after["y"] == before["y"]


def test_remote_files_come_through_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    storage.publish_bytes("memory://cached/shard.tar", b"abc")
    copy = storage.local_copy("memory://cached/shard.tar")
    assert copy.read_bytes() == b"abc"
    storage.delete("memory://cached/shard.tar")
    assert storage.local_copy("memory://cached/shard.tar") == copy
    assert storage.sha256(copy).startswith("ba7816bf8f01cfea")
    assert storage.local_copy(str(copy)) == copy


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk of 1,000 bytes for a cache, of which 450 are to stay free; `keep(name)` takes 100."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    monkeypatch.setenv("DARKROOM_CACHE_FREE", "0.45")
    monkeypatch.setattr(
        storage.shutil,
        "disk_usage",
        lambda _: SimpleNamespace(
            total=1000, free=1000 - sum(it.stat().st_size for it in cache.iterdir() if it.is_file())
        ),
    )

    def keep(name, hours=0):
        url = f"memory://disk/{name}"
        storage.publish_bytes(url, 100 * name[:1].encode())
        copy = storage.local_copy(url)
        os.utime(copy, (time.time() - 3600 * hours,) * 2)
        return copy

    return keep


def test_the_cache_leaves_some_of_its_disk_free(disk):
    old = [disk(f"{number}.bin", hours=10 - number) for number in range(5)]
    assert storage.local_copy("memory://disk/0.bin") == old[0]  # used again
    written = old[1].stat().st_mtime_ns
    disk("x.bin")
    assert all(it.exists() for it in old)  # 500 bytes were free
    disk("y.bin")
    assert [it.exists() for it in old] == [True, False, True, True, True]
    assert storage.local_copy("memory://disk/1.bin").read_bytes() == 100 * b"1"
    assert old[1].stat().st_mtime_ns > written
    assert [it.exists() for it in old] == [True, True, False, True, True]


def test_what_is_in_use_stays_in_the_cache(disk, tmp_path):
    held, fresh = disk("held.bin"), [disk(f"{number}.bin") for number in range(5)]
    with open(held, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        os.utime(held, (0, 0))
        fresh.append(disk("6.bin"))
        assert held.exists()
    os.utime(held, (0, 0))
    fresh.append(disk("7.bin"))
    assert not held.exists()
    assert all(it.exists() for it in fresh)
    assert {it.name for it in (tmp_path / "cache").iterdir()} == {it.name for it in fresh}


def test_what_is_used_while_room_is_made_stays(disk):
    copy, before = disk("a.bin", hours=1), time.time() - 60
    written = copy.stat().st_mtime_ns
    assert storage.local_copy("memory://disk/a.bin") == copy
    assert copy.stat().st_mtime_ns == written  # by which a loader knows it
    assert not storage._evict(str(copy), before) and copy.exists()
    os.utime(copy, (0, 0))
    assert storage._evict(str(copy), before) and not copy.exists()


def test_whoever_opens_a_copy_while_others_make_room_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    storage.publish_bytes("memory://busy/a.bin", b"abc")
    copy, done, evicted = storage.local_copy("memory://busy/a.bin"), threading.Event(), 0

    def make_room():
        nonlocal evicted
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - storage._used_at(copy.stat()) > 0.03:
                    evicted += storage._evict(str(copy), time.time() - 0.03)

    # As if the minutes that a copy stays were 30 ms: one that is opened later may be gone, and
    # whoever asks again has it. (A file's time of writing may be 10 ms behind.)
    thread = threading.Thread(target=make_room)
    thread.start()
    try:
        for _ in range(60):
            time.sleep(0.032)
            asked = time.time()
            path = storage.local_copy("memory://busy/a.bin")
            try:
                assert path.read_bytes() == b"abc"
            except FileNotFoundError:
                assert time.time() - asked > 0.015
    finally:
        done.set()
        thread.join()
    assert evicted > 10


def test_what_is_read_once_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    cache, url = tmp_path / "cache", "memory://once/shard.tar"
    storage.publish_bytes(url, b"abc")
    with storage.reading(url) as file:
        assert os.listdir(cache) == []  # a process that is killed here leaves nothing
        assert file.read() == b"abc"
    assert os.listdir(cache) == []
    copy = storage.local_copy(url)
    with storage.reading(url) as file:
        assert os.path.samefile(file.fileno(), copy)
    with storage.reading(str(copy)) as file:
        assert file.read() == b"abc"
    assert copy.exists()
    with pytest.raises(FileNotFoundError), storage.reading(str(tmp_path / "nowhere")):
        pass


def test_what_a_killed_process_was_fetching_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / "cache" / f".draft.{storage._HOST}.{dead.pid}.0.tmp"
    left.mkdir(parents=True)
    storage.publish_bytes("memory://left/a.bin", b"abc")
    copy = storage.local_copy("memory://left/a.bin")
    assert os.listdir(tmp_path / "cache") == [copy.name]


@pytest.mark.parametrize("given", ["ten", "nan", "-0.1", "10"])
def test_a_wrong_share_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    monkeypatch.setenv("DARKROOM_CACHE_FREE", given)
    (tmp_path / "cache").mkdir()
    with pytest.raises(ValueError, match=rf"DARKROOM_CACHE_FREE: got '{given}', .* from 0 to 1"):
        storage.local_copy("memory://share/a.bin")


def test_join_and_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://b/d/", "x", "y.tar") == "s3://b/d/x/y.tar"
    assert storage.join("/", "x") == "/x"
    assert storage.absolute("data/") == f"{tmp_path}/data"
    assert storage.absolute("s3://b/d/") == "s3://b/d"
    assert storage.is_local("file:///x")
    assert not storage.is_local("memory://x")


@pytest.mark.parametrize(
    ("url", "library", "extra"),
    [("gs://b/x", "gcsfs", "gcs"), ("s3://b/x", "s3fs", "s3"), ("az://b/x", "adlfs", None)],
)
def test_a_store_whose_driver_is_missing_names_what_to_install(monkeypatch, url, library, extra):
    loaded = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(loaded, url.split(":")[0], raising=False)
    said = f"^{url}: .*nstall {library} .*" + (rf"; install darkroom\[{extra}\]$" if extra else "")
    with pytest.raises(ImportError, match=said):
        storage.read_bytes(url)
    if extra:
        project = tomllib.loads(PROJECT.read_text())["project"]
        assert any(it.startswith(library) for it in project["optional-dependencies"][extra])


def test_only_the_dead_are_swept(tmp_path):
    code = (
        "import sys, os, signal; from pipeline import storage\n"
        "with storage.publishing(sys.argv[1]) as f:\n"
        "    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.bin")])
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    assert storage.list_names(str(tmp_path)) == []
    with storage.publishing(str(tmp_path / "y.bin")) as file:
        storage.sweep(str(tmp_path))
        assert len(os.listdir(tmp_path)) == 1, "ours is still being written"
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["y.bin"]


def foreign(folder: Path, number: int, *hours: float) -> str:
    """A draft of another machine, made and written to so long ago; its name."""
    draft = folder / f".draft.pod-1.7.{number}.tmp"
    draft.mkdir()
    (draft / "draft").write_bytes(b"half")
    for path, ago in zip((draft, draft / "draft"), hours, strict=True):
        os.utime(path, (time.time() - 3600 * ago,) * 2)
    return draft.name


def test_drafts_of_other_machines_are_swept_once_nobody_writes_them(tmp_path):
    old, slow, young = (
        foreign(tmp_path, number, *hours)
        for number, hours in enumerate([(25, 25), (25, 1), (1, 1)])
    )
    storage.sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([slow, young]), old
    ahead = foreign(tmp_path, 3, -1, -1)  # another machine's clock
    with storage.publishing(str(tmp_path / "x")) as file:
        storage.sweep(str(tmp_path))
        assert {slow, young, ahead} < {*os.listdir(tmp_path)}
        storage.sweep(str(tmp_path), all_foreign=True)
        file.write(b"ours")
    assert os.listdir(tmp_path) == ["x"]


def test_a_draft_that_was_taken_away_is_not_published_and_says_why(tmp_path):
    def write():
        with storage.publishing(str(tmp_path / "x")) as file:
            shutil.rmtree(os.path.dirname(file.name))

    with pytest.raises(FileNotFoundError, match=r"by a take-down .*run again: '.*/x'"):
        write()
    assert os.listdir(tmp_path) == []


def test_a_second_process_waits_for_the_lock(tmp_path):
    url, log = str(tmp_path / ".lock"), tmp_path / "log"
    code = (
        "import sys, time; from pipeline import storage\n"
        "with storage.lock(sys.argv[1]):\n"
        "    open(sys.argv[2], 'a').write('in '); time.sleep(0.3)\n"
        "    open(sys.argv[2], 'a').write('out ')\n"
    )
    command = [sys.executable, "-c", code, url, str(log)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert log.read_text() == "in out in out "


def test_nothing_heavy_is_imported():
    code = (
        "import sys, pipeline.storage, pipeline.manifest\n"
        "print([m for m in ('fsspec', 'pyarrow', 'PIL', 'numpy', 'torch') if m in sys.modules])"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", code]).decode()) == []


def test_waits_for_a_store_have_full_jitter(monkeypatch):
    """A crowd that failed together does not return together."""
    random.seed(0)
    rounds: list[list[float]] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: rounds[-1].append(seconds))

    def away(files, path):
        raise ConnectionResetError(errno.ECONNRESET, "no answer")

    for _ in range(60):
        rounds.append([])
        with pytest.raises(OSError, match="8 tries; run again once it answers"):
            storage._ask("memory://jitter", away)
    assert [len(waits) for waits in rounds] == [7] * 60
    for attempt, waits in enumerate(zip(*rounds, strict=True), start=1):
        most = min(32.0, 2.0 ** (attempt - 2))
        assert all(0 <= it <= most for it in waits)
        assert {int(5 * it / most) for it in waits} >= {*range(5)}, attempt
