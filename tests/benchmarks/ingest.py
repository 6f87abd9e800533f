"""Photographs into shards of 256 px: python -m tests.benchmarks.ingest [--rounds N]

The photographs are repeated, each copy with a comment of its own in its file, so that every key is
new and the work on pixels stays the same. In turns, each in a fresh process:

    bare          read the file, decode it behind the same guard, resize, encode; nothing kept
    ours          pipeline.ingest from the folder, all its bookkeeping on, by two processes
    ours, Ray     the same by Ray Data
    ours, served  the same from URLs, by the server that img2dataset is given
    img2dataset   from a threaded static server on loopback, on the same cores

"bare" and "ours" also run on one core, one process each. A steady rate leaves out starting: ours
is the whole call of `ingest` in a process that has ingested 64 pictures before;
img2dataset's is by its own clock, which runs within a shard, over all its processes; it is given no
more shards than its processes do before they are replaced. The whole call is the wall of the
process, from its start to its end. Processor time is that of all processes which a contender has
started, in its steady work (for img2dataset: beyond what it takes for the 64), with the server's:
on a busy machine it tells more than the clock. Ratios are medians over the rounds, of neighbours in
time. The last table gives the PSNR of what was stored against the picture decoded in full and
reduced by Lanczos' filter.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import io
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import images, manifest, shards
from pipeline.download import DownloadRules
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from tests.benchmarks.processes import processor_seconds

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "exercises_pd"
SIDE, PROCESSES, WARM, SHOWN = 256, 2, 64, 120
DECODE = images.DecodePolicy(draft_side=SIDE)  # as ingest has it; `same_files` sees that

# ---- the pictures --------------------------------------------------------------------------------


def repeated(data: bytes, copy: int) -> bytes:
    """A JPEG file with a comment behind its first segment: another key, the same pixels."""
    at = 4 + int.from_bytes(data[4:6], "big")
    text = b"copy %d" % copy
    return data[:at] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[at:]


def photographs(source: Path, scratch: Path, count: int) -> dict[str, Path]:
    """Folders of `count` pictures, of the first half of them, and of a few to warm up with."""
    lines = listed(source)
    known = {line["file"]: (source / line["file"]).read_bytes() for line in lines}
    folders = {"all": scratch / "all", "half": scratch / "half", "warm": scratch / "warm"}
    rows: list[dict[str, str]] = []
    for folder in folders.values():
        folder.mkdir(parents=True)
    for number in range(count):
        line, copy = lines[number % len(lines)], number // len(lines)
        rows.append({"file": f"{number:06d}.jpg", "caption": line["caption"]})
        (folders["all"] / rows[-1]["file"]).write_bytes(repeated(known[line["file"]], copy))
    for name, some in (("all", rows), ("half", rows[: count // 2]), ("warm", rows[-WARM:])):
        for row in some if name != "all" else ():
            os.link(folders["all"] / row["file"], folders[name] / row["file"])
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folders[name] / "captions.jsonl").write_text(text)
    return folders


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return [row["file"] for row in listed(folder)]


def table_of_urls(folder: Path, port: int, into: Path) -> Path:
    with open(into, "w") as file:
        for row in listed(folder):
            url = f"http://127.0.0.1:{port}/{row['file']}"
            file.write(json.dumps({"url": url, "caption": row["caption"]}) + "\n")
    return into


# ---- what runs in a fresh process ----------------------------------------------------------------


def run_bare(folder: Path, processes: int) -> dict[str, Any]:
    files = [folder / name for name in names(folder)]
    context = multiprocessing.get_context("fork")
    taken, ends = context.Value("q", 0), context.SimpleQueue()
    ready = context.Barrier(processes + 1)

    def loop() -> None:
        ready.wait()
        while True:
            with taken.get_lock():
                start, taken.value = taken.value, taken.value + 8
            if start >= len(files):
                break
            for file in files[start : start + 8]:
                data = file.read_bytes()
                image, info = images.decode(data, DECODE)
                images.store(image, data, info, SIDE)
        ends.put(time.perf_counter())

    workers = [context.Process(target=loop) for _ in range(processes)]
    for worker in workers:
        worker.start()
    before = processor_seconds()
    ready.wait()
    start = time.perf_counter()
    end = max(ends.get() for _ in workers)
    for worker in workers:
        worker.join()
    cpu = processor_seconds() - before
    return {"pictures": len(files), "seconds": end - start, "cpu": cpu}


def run_ours(folder: Path, warm: Path, out: Path, executor: Executor) -> dict[str, Any]:
    """From a folder or, where it is a file, from a table of URLs."""
    rules = IngestRules(max_side=SIDE, download=DownloadRules(private_hosts=("127.0.0.1",)))
    if executor.kind == "ray":
        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        import ray

        ray.init(
            address="local",
            num_cpus=max(4, executor.workers),
            include_dashboard=False,
            object_store_memory=256 << 20,
            log_to_driver=False,
            configure_logging=False,
        )
    ingest([str(warm)], f"{out}-warm", rules, executor)
    start, before = time.perf_counter(), processor_seconds()
    result = ingest([str(folder)], str(out), rules, executor)
    seconds, cpu = time.perf_counter() - start, processor_seconds() - before
    return {"pictures": result.counts["seen"], "seconds": seconds, "cpu": cpu}


def run_server(folder: Path) -> None:
    """Serve a folder until stdin is closed; then say how much processor time it took."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1024  # 5 by default: connections then wait a second for their repeat

    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    print(time.process_time(), flush=True)


# ---- contenders: what the parent starts ----------------------------------------------------------


def fresh(*words: str | Path, core: int | None = None) -> dict[str, Any]:
    """What a fresh process of this module measured, and its wall."""
    # not by -m: each of our workers would import this module once more
    start = "from tests.benchmarks.ingest import main; main()"
    command = [sys.executable, "-c", start, "--inside", *map(str, words)]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    said, whole, _ = watched(command)
    return {**json.loads(said.splitlines()[-1]), "whole": whole}


def watched(command: list[str]) -> tuple[str, float, float]:
    """What a command says, its wall and its processor seconds."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    start, before = time.perf_counter(), processor_seconds()
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{ran.stderr[-4000:]}")
    return ran.stdout, time.perf_counter() - start, processor_seconds() - before


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[int, Callable[[], float]]]:
    """(port, a function that ends the server and gives its processor seconds)."""
    command = [sys.executable, "-m", "tests.benchmarks.ingest", "--inside", "server", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin and stdout

        def end() -> float:
            stdin.close()
            return float(stdout.readline())

        try:
            yield int(stdout.readline()), end
        finally:
            stdin.close()


def bare(folders: dict[str, Path], _: Path) -> dict[str, Any]:
    return fresh("bare", folders["all"], str(PROCESSES))


def ours(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    return fresh("processes", folders["all"], folders["warm"], out)


def ours_on_ray(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    return fresh("ray", folders["all"], folders["warm"], out)


def bare_alone(folders: dict[str, Path], _: Path) -> dict[str, Any]:
    return fresh("bare", folders["half"], "1", core=0)


def ours_alone(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    return fresh("local", folders["half"], folders["warm"], out, core=0)


def ours_served(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    with serving(folders["all"]) as (port, end):
        urls = table_of_urls(folders["all"], port, out.with_name("urls.jsonl"))
        result = fresh("processes", urls, folders["warm"], out)
        server = end()
    return {**result, "server": server, "cpu": result["cpu"] + server}


def img2dataset(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    *_, starting = _img2dataset(folders["warm"], out.with_name("warm"))
    measured, whole, cpu = _img2dataset(folders["all"], out)
    return {**measured, "whole": whole, "cpu": cpu - starting + measured["server"]}


def _img2dataset(folder: Path, out: Path) -> tuple[dict[str, Any], float, float]:
    """(what it says of itself, its wall, its processor seconds)."""
    from tests.benchmarks.peers.environment import environment

    count = len(names(folder))
    with serving(folder) as (port, end):
        arguments = {
            "url_list": table_of_urls(folder, port, out.with_name("urls.jsonl")),
            "input_format": "jsonl",
            "url_col": "url",
            "caption_col": "caption",
            "output_folder": out,
            "output_format": "webdataset",
            "resize_mode": "keep_ratio",
            "resize_only_if_bigger": True,
            "image_size": SIDE,
            "processes_count": PROCESSES,
            "thread_count": 32,
            # a pool's process is replaced after 5 shards
            "number_sample_per_shard": -(-count // (4 * PROCESSES)),
        }
        command = [str(environment("img2dataset") / "img2dataset")]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        _, whole, cpu = watched(command)
        server = end()
    stats = [json.loads(file.read_text()) for file in out.glob("*_stats.json")]
    done = sum(shard["successes"] for shard in stats)
    if done != count:
        raise SystemExit(f"img2dataset: {done} of {count} pictures: {stats[:1]}")
    seconds = sum(shard["duration"] for shard in stats) / PROCESSES
    return {"pictures": done, "seconds": seconds, "server": server}, whole, cpu


CONTENDERS: dict[str, Callable[[dict[str, Path], Path], dict[str, Any]]] = {
    "bare": bare,
    "ours": ours,
    "ours, Ray": ours_on_ray,
    "img2dataset": img2dataset,
    "ours, served": ours_served,
    "bare, one core": bare_alone,
    "ours, one core": ours_alone,
}
AGAINST = (
    ("ours", "bare"),
    ("ours", "img2dataset"),
    ("ours, served", "img2dataset"),
    ("ours, one core", "bare, one core"),
)

# ---- what the pictures look like -----------------------------------------------------------------


def stored(out: Path) -> Iterator[tuple[str, bytes]]:
    """(file, what became of it) of our shards, or of img2dataset's."""
    if found := manifest.latest(str(out)):
        for shard in found.shards:
            for sample in shards.read_shard(found.url("shards", f"{shard.name}.tar")):
                yield re.split("[#/]", sample.meta["source"])[-1], sample.image
        return
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as members:
            pictures = {m.name[:-4]: m for m in members if m.name.endswith(".jpg")}
            for key, member in pictures.items():
                about = members.extractfile(f"{key}.json")
                picture = members.extractfile(member)
                assert about and picture
                yield json.load(about)["url"].rsplit("/", 1)[1], picture.read()


def psnr(out: Path, folder: Path) -> tuple[float, int]:
    """Mean PSNR in dB of some stored pictures, and their number; against the file decoded in full
    and reduced with Pillow's Lanczos filter in one step.

    Files that had to be turned or whose colours had to be converted are left out: not all do that.
    """
    found: list[float] = []
    some = set(names(folder)[:: max(1, len(names(folder)) // SHOWN)])
    for name, data in stored(out):
        if name in some:
            full, info = images.decode((folder / name).read_bytes())
            if not info["plain"]:
                continue
            shown = Image.open(io.BytesIO(data)).convert("RGB")
            wanted = full.resize(shown.size, Image.Resampling.LANCZOS)
            error = np.asarray(shown, np.float64) - np.asarray(wanted, np.float64)
            found.append(10 * np.log10(255**2 / np.mean(error**2)))
    return statistics.mean(found), len(found)


def same_files(out: Path, folder: Path) -> bool:
    """Whether the bare loop makes the very files that ingest has stored."""
    some = set(names(folder)[:: max(1, len(names(folder)) // SHOWN)])
    for name, found in stored(out):
        if name in some:
            data = (folder / name).read_bytes()
            image, info = images.decode(data, DECODE)
            if images.store(image, data, info, SIDE)[1] != found:
                return False
    return True


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return inside(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=14000, help="60 s on two cores, or more")
    parser.add_argument("--source", type=Path, default=PHOTOGRAPHS, help="JPEGs, captions.jsonl")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    options = parser.parse_args()
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    quality: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="darkroom-") as scratch:
        folders = photographs(options.source, Path(scratch, "pictures"), options.pictures)
        for turn in range(options.rounds):
            for name in options.only[:: -1 if turn % 2 else 1]:
                out = Path(scratch, "out", "data")
                out.parent.mkdir()
                took[name].append(CONTENDERS[name](folders, out))
                if not turn and out.exists():
                    level, count = psnr(out, folders["all"])
                    quality[name] = f"{level:6.2f} dB over {count} pictures"
                    if name != "img2dataset" and not same_files(out, folders["all"]):
                        raise SystemExit(f"{name} stores other files than the bare loop makes")
                shutil.rmtree(out.parent)
                it = took[name][-1]
                print(f"# round {turn + 1}: {name}: {it}", file=sys.stderr, flush=True)
    report(took, quality)


def report(took: dict[str, list[dict[str, Any]]], quality: dict[str, str]) -> None:
    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, took[name]))

    def rate(it: dict[str, Any]) -> float:
        return it["pictures"] / it["seconds"]

    def core_ms(it: dict[str, Any]) -> float:
        return 1000 * it["cpu"] / it["pictures"]

    print(f"{'':16s} pictures  steady/s  whole call  of it apart  processor ms each (server)")
    for name, runs in took.items():
        server = median(name, lambda it: 1000 * it.get("server", 0) / it["pictures"])
        print(
            f"{name:16s} {runs[0]['pictures']:8d} {median(name, rate):9.1f} "
            f"{median(name, lambda it: it['whole']):9.1f} s "
            f"{median(name, lambda it: it['whole'] - it['seconds']):10.1f} s "
            f"{median(name, core_ms):12.2f} ({server:.2f})"
        )
    for name, other in AGAINST:
        if name in took and other in took:
            pairs = list(zip(took[name], took[other], strict=True))
            steady = [rate(a) / rate(b) for a, b in pairs]
            whole = [b["whole"] / b["pictures"] * a["pictures"] / a["whole"] for a, b in pairs]
            cpu = [core_ms(b) / core_ms(a) for a, b in pairs]
            print(
                f"{name} / {other}: steady {statistics.median(steady):.3f} "
                f"({min(steady):.3f} to {max(steady):.3f}), whole {statistics.median(whole):.3f}, "
                f"by processor time {statistics.median(cpu):.3f}"
            )
    for name, text in quality.items():
        print(f"{name:16s} {text}")


def inside(kind: str, *words: str) -> None:
    if kind == "server":
        return run_server(Path(words[0]))
    if kind == "bare":
        measured = run_bare(Path(words[0]), int(words[1]))
    else:
        chosen: Any = kind
        executor = Executor(kind=chosen, workers=0 if kind == "local" else PROCESSES)
        measured = run_ours(Path(words[0]), Path(words[1]), Path(words[2]), executor)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
