"""Full disks and dead processes: a clear error or none, nothing partial, and the same bytes in the
end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import manifest, storage
from pipeline.download import DownloadRules
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest

ROOT = Path(__file__).resolve().parents[2]
RULES = IngestRules(shard_samples=24, min_heldout=8)
SIDES = (8, 64)


def fill(folder: Path, count: int, side: int = 32) -> str:
    """A source of noise, which no format makes small."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    lines = []
    for number in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, "PNG")
        (folder / f"{number}.png").write_bytes(out.getvalue())
        os.utime(folder / f"{number}.png", (1, 1))
        lines.append(json.dumps({"file": f"{number}.png", "caption": f"noise {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    os.utime(folder / "captions.jsonl", (1, 1))
    return str(folder)


def the_line(source: str, dataset: str, executor: Executor | None = None) -> None:
    version = ingest([source], dataset, RULES, executor).manifest
    for side in SIDES:
        encode(version, [pixels_spec(side)], None, executor or Executor())


def tree(path: str | Path) -> dict[str, bytes]:
    """Relative path -> bytes of everything below, hidden files and all."""
    root = Path(path)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def visible(path: str | Path) -> dict[str, bytes]:
    """What a reader may meet of it."""
    return {name: data for name, data in tree(path).items() if "/." not in f"/{name}"}


def hidden(path: str | Path) -> list[str]:
    return sorted(tree(path).keys() - visible(path).keys() - {".lock"})


def whole(dataset: str) -> bool:
    """Whether a version is there, all of whose shards are what it says."""
    version = manifest.latest(dataset)
    for shard in version.shards if version else ():
        assert storage.sha256(f"{dataset}/shards/{shard.name}.tar") == shard.sha256
    return version is not None


# ---- F3: a disk that is full --------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A tmpfs, and a function that makes it larger."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs of our own: {mounted.stderr.strip() or 'not root'}")
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}k", str(place)], check=True
        )
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def refused(work: Callable[[], object]) -> storage.NoRoom | None:
    try:
        work()
    except storage.NoRoom as error:
        return error
    return None


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_with_more_room(tmp_path):
    source = fill(tmp_path / "in", 72)
    the_line(source, str(tmp_path / "calm"))
    size, failed = 64, []
    with small_disk(tmp_path / "disk", size) as grow:
        dataset = f"{tmp_path}/disk/set"
        while error := refused(lambda: the_line(source, dataset)):
            assert str(error.filename).startswith(dataset), error
            assert "No space left on device" in str(error)
            assert f"of {size << 10:,} bytes are free); make room and run again" in str(error)
            failed.append(Path(error.filename).name)
            assert hidden(dataset) == [], "what was half written is in nobody's way"
            whole(dataset)
            size += 48
            grow(size)
        assert tree(dataset) == tree(tmp_path / "calm")
    assert {"staging", "shards"} <= set(failed), failed
    assert any(name == pixels_spec(SIDES[1]).fingerprint for name in failed), failed


def stored(url: str) -> dict[str, bytes]:
    """What lies in a remote data set."""
    return {name: storage.read_bytes(f"{url}/{name}") for name in storage.list_stamps(url)}


def test_a_full_temporary_disk_is_a_clear_error_as_well(tmp_path, monkeypatch):
    """There a run keeps its lines and drafts where the data set is remote."""
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    calm, dataset = (f"memory://full-temporary-disk-{it}" for it in ("calm", "set"))
    source = fill(tmp_path / "in", 72)
    ingest([source], calm, RULES)
    size, failed = 4, []
    with small_disk(tmp_path / "disk", size) as grow:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
        while error := refused(lambda: ingest([source], dataset, RULES)):
            assert str(error.filename).startswith(f"{tmp_path}/disk"), error
            assert f"of {size << 10:,} bytes are free); make room and run again" in str(error)
            failed.append(size)
            assert manifest.latest(dataset) is None
            assert os.listdir(tmp_path / "disk") == []
            size *= 2
            assert size <= 512, failed
            grow(size)
    assert failed[0] == 4
    assert len(failed) > 2
    assert stored(dataset) == stored(calm)


FILLS_AND_DIES = """
import os, signal, sys
from pipeline import storage
with storage.draft(sys.argv[1]) as (file, _):
    try:
        while True:
            file.write(bytes(4096))
            file.flush()
    except OSError:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("folder", ["staging", "shards", f"encodings/{pixels_spec(8).fingerprint}"])
def test_what_a_killed_run_left_makes_room_for_the_next(tmp_path, folder):
    source = fill(tmp_path / "in", 20)
    the_line(source, str(tmp_path / "calm"))
    with small_disk(tmp_path / "disk", 2048):
        dataset = f"{tmp_path}/disk/set"
        if folder.startswith("encodings"):
            ingest([source], dataset, RULES)
        killed = subprocess.run([sys.executable, "-c", FILLS_AND_DIES, f"{dataset}/{folder}"])
        assert killed.returncode == -signal.SIGKILL
        assert os.statvfs(dataset).f_bavail == 0
        the_line(source, dataset)
        assert tree(dataset) == tree(tmp_path / "calm")


NO_LARGE_FILES = """
import resource, sys
from pipeline import storage
from pipeline.ingest import IngestRules, ingest
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    ingest([sys.argv[1]], sys.argv[2], IngestRules(shard_samples=24, min_heldout=8))
except storage.NoRoom as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "where"), [(50_000, "staging"), (110_000, "shards")])
def test_a_quota_is_a_clear_error_as_well(tmp_path, limit, where):
    """No root needed: a limit on the size of a file stands for the disk."""
    source, dataset = fill(tmp_path / "in", 30), str(tmp_path / "set")
    command = [sys.executable, "-c", NO_LARGE_FILES, source, dataset, str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert "File too large (" in ran.stdout, ran.stderr
    assert f"{dataset}/{where}" in ran.stdout
    assert manifest.latest(dataset) is None
    assert hidden(dataset) == []
    ingest([source], dataset, RULES)
    ingest([source], str(tmp_path / "calm"), RULES)
    assert tree(dataset) == tree(tmp_path / "calm")


# ---- F1: a process that dies while it downloads --------------------------------------------------

READS_A_TABLE = """
import sys
from pipeline.download import DownloadRules
from pipeline.ingest import IngestRules, ingest
download = DownloadRules(private_hosts=(sys.argv[3],))
ingest([sys.argv[1]], sys.argv[2], IngestRules(shard_samples=24, min_heldout=8, download=download))
"""


def test_a_run_killed_while_downloading_asks_again_for_what_was_under_way_alone(tmp_path, gallery):
    rows, unit = 112, 32
    source, dataset = gallery.table(tmp_path / "table.jsonl", rows), tmp_path / "set"
    rules = replace(RULES, download=DownloadRules(private_hosts=(gallery.host,)))
    ingest([source], str(tmp_path / "calm"), rules)
    assert gallery.taken() == [*range(rows)]
    command = [sys.executable, "-c", READS_A_TABLE, source, str(dataset), gallery.host]
    gallery.hold_after(2 * unit + 10)
    killed = subprocess.Popen(command)
    gallery.wait_until_held(30)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not whole(str(dataset))
    gallery.release()
    ingest([source], str(dataset), rules)
    times = Counter(gallery.taken())
    assert {times[number] for number in range(2 * unit)} == {1}, "these were committed"
    assert {times[number] for number in range(2 * unit, 3 * unit)} == {1, 2}
    assert {times[number] for number in range(3 * unit, rows)} == {1}
    assert tree(dataset) == tree(tmp_path / "calm")


# ---- F1 and F5: processes of this machine that die -----------------------------------------------


def test_the_work_of_dead_processes_is_done_by_others(tmp_path):
    source, struck = fill(tmp_path / "in", 200), []
    ingest([source], str(tmp_path / "calm"), RULES)

    def strike(stage: str, done: int, total: int) -> None:
        workers = [pid for pid in descendants(os.getpid()) if working(pid)]
        if done in (1, 3) and workers:
            os.kill(workers[0], signal.SIGKILL)
            struck.append(stage)

    ingest([source], str(tmp_path / "set"), RULES, Executor(kind="processes", workers=2), strike)
    assert struck == ["read", "read", "write", "write"]
    assert visible(tmp_path / "set") == visible(tmp_path / "calm")


def working(pid: int) -> bool:
    """Whether the server of forks, our child, has forked it."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        server = Path(f"/proc/{parent}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return b"forkserver" in server and parent != os.getpid() and state != "Z"
    return False


READS_WITH_PROCESSES = """
import sys
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
ingest([sys.argv[1]], sys.argv[2], IngestRules(shard_samples=24, min_heldout=8),
       Executor(kind="processes", workers=2), lambda *it: print(*it, flush=True))
print("end")
"""


def test_a_run_with_processes_that_is_killed_ends_like_an_undisturbed_one(tmp_path):
    source, dataset = fill(tmp_path / "in", 200), str(tmp_path / "set")
    ingest([source], str(tmp_path / "calm"), RULES)
    command = [sys.executable, "-c", READS_WITH_PROCESSES, source, dataset]
    for lines in (3, 11):
        killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert killed.stdout
        said = [killed.stdout.readline() for _ in range(lines)]
        assert all(said)
        killed.kill()  # the caller alone: its workers see that it is gone
        assert "end" not in killed.communicate()[0].splitlines()
        whole(dataset)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert visible(dataset) == visible(tmp_path / "calm")


# ---- F1 and F5: processes that die under Ray -----------------------------------------------------

RAY_RULES = IngestRules(shard_samples=48, min_heldout=8, max_side=64)
ROWS, UNIT = 400, 32
STORE = 100 << 20

Strike = Callable[[str, int], None]


def descendants(pid: int) -> list[int]:
    """The processes below one, the nearest first."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for it in found:
        found += children.get(it, [])
    return found[1:]


def busy(root: int) -> list[int]:
    """The processes below one that do a unit of work for Ray Data now."""
    found = []
    for pid in descendants(root):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            if title.startswith(b"ray::") and b"MapBatches" in title:
                found.append(pid)
    return found


def line_on_ray(source: str, dataset: str, strike: Strike = lambda stage, done: None) -> None:
    """Ingest and encode on a session that is there; a line is printed as each unit is done."""
    print("ready", flush=True)

    def progress(stage: str, done: int, total: int) -> None:
        print(stage, done, total, flush=True)
        strike(stage, done)

    executor = Executor(kind="ray", workers=2)
    version = ingest([source], dataset, RAY_RULES, executor, progress).manifest
    specs = [pixels_spec(200)]
    encode(version, specs, None, executor, lambda done, of: progress("encode", done, of))


def undisturbed(source: str, dataset: str, place: str) -> None:
    import ray

    session = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
    ray.init("local", **session, log_to_driver=False, configure_logging=False, _temp_dir=place)
    line_on_ray(source, dataset)
    print("end", flush=True)


def kill_workers(source: str, dataset: str, place: str) -> None:
    """Two in each stage, while they work."""
    import ray

    struck: list[str] = []

    def strike(stage: str, done: int) -> None:
        if done and struck.count(stage) < 2:
            for pid in first(lambda: busy(os.getpid()))[:1]:
                os.kill(pid, signal.SIGKILL)
                struck.append(stage)

    session = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
    ray.init("local", **session, log_to_driver=False, configure_logging=False, _temp_dir=place)
    line_on_ray(source, dataset, strike)
    print("end", *struck, flush=True)


def kill_raylet(source: str, dataset: str, place: str, when: str) -> None:
    """The one of the second of two nodes, while a worker of its own works."""
    import ray
    from ray.cluster_utils import Cluster

    struck: list[str] = []
    options = {"num_cpus": 1, "object_store_memory": STORE, "temp_dir": place}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    second = cluster.add_node(**options)
    cluster.wait_for_nodes()
    raylet = second.all_processes["raylet"][0].process.pid

    def strike(stage: str, done: int) -> None:
        if stage == when and done and not struck and first(lambda: busy(raylet)):
            cluster.remove_node(second, allow_graceful=False)
            struck.append(stage)

    line_on_ray(source, dataset, strike)
    print("end", *struck, flush=True)


def first(look: Callable[[], list[int]]) -> list[int]:
    """What is found before five seconds are over."""
    end = time.monotonic() + 5
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("faults", sys.argv[1])
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
getattr(faults, sys.argv[2])(*sys.argv[3:])
"""


@pytest.fixture
def on_ray():
    """A function that starts a function of this file in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:

        def start(work: Callable[..., None], source: str, dataset: str, *more: str):
            command = [sys.executable, "-c", LOAD, __file__, work.__name__]
            for _ in range(4):
                process = subprocess.Popen(
                    [*command, source, dataset, place, *more],  # sockets need short names
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
                assert process.stdout
                if process.stdout.readline() == "ready\n":
                    return process
                _, error = process.communicate()
                # Ray gives its processes half a minute, which is too short on a busy machine.
                assert "timed out during startup" in error, error[-3000:]
            pytest.fail("Ray did not start in four tries")

        yield start


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A source that keeps two workers busy for some seconds, and what becomes of it."""
    place = tmp_path_factory.mktemp("undisturbed")
    source = fill(place / "in", ROWS, side=200)
    version = ingest([source], str(place / "calm"), RAY_RULES).manifest
    encode(version, [pixels_spec(200)], None, Executor())
    return source, visible(place / "calm")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_tree_of_processes_that_is_killed_ends_like_an_undisturbed_one(
    tmp_path, rounds, photographs, on_ray
):
    source, wanted = photographs
    units = -(-ROWS // UNIT) + 2 * sum(name.endswith(".tar") for name in wanted)
    rng = random.Random(6)
    for number in range(rounds(1, 10)):
        dataset = str(tmp_path / str(number))
        killed = on_ray(undisturbed, source, dataset)
        for _ in range(rng.randint(1, units)):  # each stage says one line more than it has units
            assert killed.stdout.readline(), killed.communicate()[1][-3000:]
        time.sleep(rng.uniform(0, 0.1))
        for pid in [killed.pid, *descendants(killed.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said, _ = killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert "end" not in said.splitlines()
        whole(dataset)
        said, error = on_ray(undisturbed, source, dataset).communicate()
        assert "end" in said.splitlines(), error[-3000:]
        assert visible(dataset) == wanted
        shutil.rmtree(dataset)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("work", "when", "struck"),
    [
        (kill_workers, [], ["read", "read", "write", "write", "encode", "encode"]),
        (kill_raylet, ["read"], ["read"]),
        (kill_raylet, ["encode"], ["encode"]),
    ],
    ids=["workers", "a raylet while reading", "a raylet while encoding"],
)
def test_the_work_of_the_dead_is_done_elsewhere(tmp_path, photographs, on_ray, work, when, struck):
    source, wanted = photographs
    said, error = on_ray(work, source, str(tmp_path / "set"), *when).communicate()
    assert " ".join(["end", *struck]) in said.splitlines(), (said, error[-3000:])
    assert visible(tmp_path / "set") == wanted  # the next run takes drafts of dead workers away
