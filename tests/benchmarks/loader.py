"""Encoded samples into training batches: python -m tests.benchmarks.loader [--rounds N]

A sample is what a latent model reads of a picture of 256 px: float16 moments [8, 32, 32] (16 KiB),
20 to 77 text tokens of width 768, unpadded (73 KiB on average), and a pooled vector; 16,384 of them
are 1.5 GB, in 16 shards. All contenders have the same samples and give batches of 256, moments and
pooled vectors stacked; in turns, each in a fresh process:

    ours         pipeline.load.Loader as the trainer has it: one process, whose thread makes batches
                 ahead; global random order, the same for any number of workers; captions too, and
                 the text padded to the longest of the batch, with a mask
    webdataset   raw members of tars, shards in random order and then a shuffle buffer of 1000
                 samples (so its order is no global one); text not padded
    streaming    mosaicml-streaming, raw columns of MDS, its own shuffle, which is a global one for
                 so few samples; text not padded

Peers run in a torch DataLoader with 0 and with 2 workers; a ratio is to the better of the two in
the same round, and its median is over the rounds. Warm: the files were read before; the rate is of
the passes after the first, three seconds or more of them, the first few batches of each left out
(`measure`); in the first pass what is in the page cache is not mapped yet. Started is from the
start of the process to its first batch. Processor time is that of all processes of the contender,
in the same passes. Cold: the files' pages were dropped from the page cache (what lies below this
machine may keep them); the rate is of the whole first pass, but without imports. Shared storage:
how much of the data our loader asks a server on loopback for.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import images, manifest, storage
from pipeline.encode import encode
from pipeline.execute import Executor
from pipeline.load import Loader
from pipeline.schema import EncoderSpec, Encoding
from pipeline.shards import ShardSample, write_shard
from tests.benchmarks.peers import loading

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.benchmarks.loader"
LATENTS = EncoderSpec("latents", "image", "latents", {"batch": 256}, side=8)
TEXT = EncoderSpec("text", "text", "text", {"batch": 256})
PEERS = ("webdataset", "streaming")
WORKERS = (0, 2)

# ---- our data set --------------------------------------------------------------------------------


def numbered(number: int) -> ShardSample:
    """A picture of one colour, and a caption, from either of which its number can be read."""
    picture = Image.new("RGB", (8, 8), tuple(number.to_bytes(3, "big")))
    data = images.encode(picture, "png")
    return ShardSample(f"{number:032x}", data, "png", (f"picture number {number}",))


def build(spec: EncoderSpec) -> Callable[..., Any]:
    """Encoders that look the samples of the benchmark up."""

    def latents(pixels: np.ndarray) -> dict[str, np.ndarray]:
        numbers = pixels[:, :, 0, 0].astype(np.int64) @ [1 << 16, 1 << 8, 1]
        return {"moments": np.stack([loading.sample(int(n)).moments for n in numbers])}

    def text(captions: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
        known = [loading.sample(int(caption.rsplit(" ", 1)[1])) for caption in captions]
        return [one.tokens for one in known], np.stack([one.pooled for one in known])

    return latents if spec.kind == "image" else text


def write_ours(folder: Path, samples: int) -> None:
    """Encoded by `pipeline.encode`, as many samples a shard as the peers' have."""
    size, made = loading.SHARD_SAMPLES, []
    for start in range(0, samples, size):
        some = map(numbered, range(start, min(start + size, samples)))
        made.append(write_shard(some, str(folder), "train"))
    manifest.publish(manifest.Manifest(storage.absolute(str(folder)), 1, None, tuple(made)))
    encode(manifest.read(str(folder), 1), [LATENTS, TEXT], build, Executor(kind="local"))


def open_ours(url: str, worker: int = 0, workers: int = 1) -> Loader:
    data = manifest.read(url, 1)
    encodings = [Encoding.at(url, it.name, it.kind, it.fingerprint) for it in (LATENTS, TEXT)]
    return Loader(
        data, encodings, global_batch=loading.BATCH, seed=0, worker=worker, workers=workers
    )


def read_ours(url: str) -> Iterator[loading.Batch]:
    """Without end."""
    return map(plain, open_ours(url).batches())


def plain(batch: dict[str, Any]) -> loading.Batch:
    return loading.Batch(
        np.array([int(key, 16) for key in batch["key"]]),
        batch["moments"],
        batch["text_tokens"],
        batch["text_mask"].sum(1),
        batch["text_pooled"],
    )


# ---- contenders: what the parent starts ----------------------------------------------------------


class Contender:
    """Ours, or a peer with a number of workers."""

    def __init__(self, name: str, workers: int = 0):
        self.name, self.workers = name, workers
        self.title = f"{name}, {workers} workers" if name in PEERS else name

    def write(self, folder: Path, samples: int) -> None:
        if self.name in PEERS:
            said(self._command("write", folder, samples))
        else:
            write_ours(folder, samples)

    def run(self, folder: Path, steps: int) -> dict[str, Any]:
        born = time.monotonic()
        return json.loads(said(self._command("read", folder, self.workers, steps, born)))

    def _command(self, verb: str, folder: Path, *numbers: float) -> list[str]:
        if self.name not in PEERS:
            return ours(verb, str(folder), *numbers)
        from tests.benchmarks.peers.environment import environment

        python = str(environment(self.name) / "python")
        words = ["-m", loading.__name__, verb, self.name, str(folder), *map(str, numbers)]
        return [python, *words]


def ours(verb: str, url: str, *numbers: float) -> list[str]:
    return [sys.executable, "-m", MODULE, "--inside", verb, url, *map(str, numbers)]


CONTENDERS = [Contender("ours"), *(Contender(peer, n) for peer in PEERS for n in WORKERS)]


def said(command: list[str], **more: str) -> str:
    """The last line that a fresh process says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{ran.stderr[-4000:]}")
    return (ran.stdout.splitlines() or [""])[-1]


def files_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def warm(folder: Path) -> None:
    for path in files_below(folder):
        with open(path, "rb") as file:
            while file.read(1 << 22):
                pass


def cool(folder: Path) -> None:
    """Drop the files' pages from the page cache; only pages that are on the disk can go."""
    for path in files_below(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- shared storage ------------------------------------------------------------------------------


class Traffic:
    """What a server was asked for: bytes sent as answers to how many requests for files."""

    def __init__(self) -> None:
        self.requests = self.bytes = 0

    def taken(self) -> tuple[int, int]:
        """(bytes, requests) since the last call."""
        got = self.bytes, self.requests
        self.bytes = self.requests = 0
        return got


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Traffic]]:
    """(the URL of a folder on loopback, what it is asked for)."""
    traffic, lock = Traffic(), threading.Lock()

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def copyfile(self, source: Any, outputfile: Any) -> None:
            with lock:
                traffic.requests += 1
            while data := source.read(1 << 20):
                outputfile.write(data)
                with lock:
                    traffic.bytes += len(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", traffic
    finally:
        server.shutdown()
        server.server_close()


def shared_storage(folder: Path, scratch: Path, steps: int) -> list[tuple[str, int, int]]:
    """(what was done, bytes, requests) of passes over our data set behind a server."""

    def run(*cases: tuple[str, tuple[int, int, int]]) -> None:
        """(cache, (worker, workers, steps)), at the same time, in a process each."""
        started = [
            subprocess.Popen(
                ours("pass", url, *numbers),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "DARKROOM_HOME": str(scratch / cache)},
            )
            for cache, numbers in cases
        ]
        if sum(abs(process.wait()) for process in started):
            raise SystemExit("a pass over served data failed")

    found: list[tuple[str, int, int]] = []
    with serving(folder) as (url, traffic):
        for title, cases in (
            ("the first batch", [("batch", (0, 1, 1))]),
            ("the first pass", [("a", (0, 1, steps))]),
            ("a pass with that cache", [("a", (0, 1, steps))]),
            ("... of two workers on a machine each", [("b", (0, 2, steps)), ("c", (1, 2, steps))]),
            ("... of two workers on one machine", [("d", (0, 2, steps)), ("d", (1, 2, steps))]),
        ):
            run(*cases)
            found.append((title, *traffic.taken()))
    return found


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return inside(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16384, help="whole batches for each worker")
    parser.add_argument("--folder", type=Path, help="where the data sets are, or shall stay")
    options = parser.parse_args()
    steps = options.samples // loading.BATCH
    if options.samples % (loading.BATCH * max(WORKERS)) or steps <= loading.SKIPPED:
        parser.error(
            f"--samples {options.samples}: wanted a multiple of {loading.BATCH * max(WORKERS)} "
            f"and more than {loading.SKIPPED} batches of {loading.BATCH}"
        )
    took: dict[str, list[dict[str, Any]]] = {it.title: [] for it in CONTENDERS}
    cold: dict[str, list[dict[str, Any]]] = {it.title: [] for it in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="darkroom-") as scratch:
        folder = options.folder or Path(scratch)
        for one in CONTENDERS:
            own = folder / f"{one.name}-{options.samples}"
            if not (ready := own.with_suffix(".ready")).exists():
                own.mkdir(parents=True)
                one.write(own, options.samples)
                ready.touch()
        for turn in range(options.rounds):
            for one in CONTENDERS[:: -1 if turn % 2 else 1]:
                own = folder / f"{one.name}-{options.samples}"
                for runs, prepare in ((cold, cool), (took, warm)):
                    prepare(own)
                    runs[one.title].append(it := one.run(own, steps))
                    print(
                        f"# round {turn + 1}: {one.title}, {prepare.__name__}: {it}",
                        file=sys.stderr,
                        flush=True,
                    )
        report(took, cold)
        own = folder / f"ours-{options.samples}"
        whole = sum(path.stat().st_size for path in files_below(own / "encodings"))
        print(f"\nour loader over HTTP; {whole / 1e6:,.0f} MB are encoded:")
        for title, size, requests in shared_storage(own, Path(scratch), steps):
            print(f"{title:50s} {size / 1e6:8,.0f} MB {size / whole:6.2f} x {requests:5d} files")


def report(took: dict[str, list[dict[str, Any]]], cold: dict[str, list[dict[str, Any]]]) -> None:
    def median(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, runs))

    def cold_rate(it: dict[str, Any]) -> float:
        return it["samples"] / it["cold"]

    print(f"{'':22s}   warm/s  first pass/s  started  processor us each   cold/s  read KB each")
    for name, runs in took.items():
        print(
            f"{name:22s} {median(runs, lambda it: it['later']):8,.0f} "
            f"{median(runs, lambda it: it['first']):13,.0f} "
            f"{median(runs, lambda it: it['started']):6.1f} s "
            f"{median(runs, lambda it: 1e6 * it['later_cpu']):18.1f} "
            f"{median(cold[name], cold_rate):8,.0f} "
            f"{median(cold[name], lambda it: it['disk'] / it['samples'] / 1e3):13.1f}"
        )
    for peer in PEERS:
        for what, runs, value in (
            ("warm", took, lambda it: it["later"]),
            ("first pass", took, lambda it: it["first"]),
            ("by processor time", took, lambda it: 1 / it["later_cpu"]),
            ("cold", cold, cold_rate),
        ):
            best = [
                max(map(value, several))
                for several in zip(
                    *(runs[it.title] for it in CONTENDERS if it.name == peer), strict=True
                )
            ]
            each = [value(it) / other for it, other in zip(runs["ours"], best, strict=True)]
            print(
                f"ours / {peer}, {what}: {statistics.median(each):.2f} "
                f"({min(each):.2f} to {max(each):.2f})"
            )


def inside(verb: str, url: str, *numbers: str) -> None:
    if verb == "pass":
        worker, workers, steps = map(int, numbers)
        loader = open_ours(url, worker, workers)
        for step in range(steps):
            loader.batch(step)
        return
    print(json.dumps(loading.measure(read_ours(url), int(numbers[1]), float(numbers[2]))))


if __name__ == "__main__":
    main()
