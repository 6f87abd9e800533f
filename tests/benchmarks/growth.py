"""Ten times the samples: python -m tests.benchmarks.growth [--counts 10000 100000]

Seconds (of the clock; of the processor) and peak memory of one process that ingests tiny pictures
from a folder, encodes them as pixels, or loads one epoch of batches, each stage in a fresh process,
by the number of samples; of the memory, what is files that are mapped, which the machine takes back
when it needs to. What a row has more than the row above it says how the stage grows: ten times the
samples may take 10.5 times the seconds. With DARKROOM_SOAK set, a million tiny latents are written,
encoded and loaded as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import images, manifest, storage
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.load import Loader
from pipeline.schema import EncoderSpec, Encoding
from pipeline.shards import ShardSample, write_shard
from tests.benchmarks.targets import at_most

ROOT = Path(__file__).resolve().parents[2]
SIDE, BATCH = 16, 256
TINY = EncoderSpec("latents", "image", "tiny", {"batch": 2048}, side=2)
MILLION = 1_000_000
SLACK = 1.05  # of the samples' ratio


def pictures(folder: Path, count: int) -> None:
    """Noise of 16 x 16 pixels, a PNG each, with captions that are all different."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with open(folder / "captions.jsonl", "w") as table:
        for number in range(count):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            name = f"{number:07d}.png"
            (folder / name).write_bytes(images.encode(Image.fromarray(pixels), "png"))
            table.write(json.dumps({"file": name, "caption": f"noise, number {number}"}) + "\n")


def latents(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {"moments": pixels.reshape(len(pixels), -1)[:, :8].astype(np.float16)}


# ---- stages: what a fresh process does -----------------------------------------------------------


def run_ingest(folder: Path, data: str) -> None:
    ingest([str(folder)], data, IngestRules(), Executor())


def run_encode(_: Path, data: str) -> None:
    version = manifest.latest(data)
    assert version
    encode(version, [pixels_spec(SIDE)], None, Executor())


def run_load(_: Path, data: str) -> None:
    version, spec = manifest.latest(data), pixels_spec(SIDE)
    assert version
    epoch(version, Encoding.at(data, spec.name, spec.kind, spec.fingerprint))


def run_tiny_write(_: Path, data: str) -> None:
    png = images.encode(Image.new("RGB", (2, 2)), "png")
    count, size = int(os.environ["SAMPLES"]), IngestRules().shard_samples
    written = [
        write_shard(
            (
                ShardSample(f"{number:032x}", png, "png", (f"picture {number}",))
                for number in range(start, min(start + size, count))
            ),
            data,
            "train",
        )
        for start in range(0, count, size)
    ]
    manifest.publish(manifest.Manifest(storage.absolute(data), 1, None, tuple(written)))


def run_tiny_encode(_: Path, data: str) -> None:
    encode(manifest.read(data, 1), [TINY], lambda _: latents, Executor())


def run_tiny_load(_: Path, data: str) -> None:
    epoch(manifest.read(data, 1), Encoding.at(data, TINY.name, TINY.kind, TINY.fingerprint))


def epoch(version: manifest.Manifest, encoding: Encoding) -> None:
    loader = Loader(version, [encoding], global_batch=BATCH, seed=0, captions=False)
    for step in range(-(-loader.samples // BATCH)):
        loader.batch(step)


STAGES = {
    "ingest": run_ingest,
    "encode": run_encode,
    "load": run_load,
    "tiny write": run_tiny_write,
    "tiny encode": run_tiny_encode,
    "tiny load": run_tiny_load,
}


def fresh(stage: str, count: int, *places: Path) -> tuple[float, ...]:
    """(seconds, processor seconds, MiB at most, MiB of files at the end) of a stage in a process of
    its own, which has imported all that this module does.
    """
    command = [sys.executable, "-m", "tests.benchmarks.growth", "--inside", stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAMPLES": str(count)}
    ran = subprocess.run(
        [*command, *map(str, places)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return tuple(map(float, ran.stdout.split()[-4:]))


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        stage, folder, data = sys.argv[2:]
        start, began = time.perf_counter(), time.process_time()
        STAGES[stage](Path(folder), data)
        seconds, cpu = time.perf_counter() - start, time.process_time() - began
        status = Path("/proc/self/status").read_text()
        files = int(status.split("RssFile:")[1].split()[0])
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(seconds, cpu, most / 1024, files / 1024)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="medians of this many")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    options = parser.parse_args()
    runs = [(count, ("ingest", "encode", "load")) for count in options.counts]
    if os.environ.get("DARKROOM_SOAK"):
        tiny = ("tiny write", "tiny encode", "tiny load")
        runs += [(MILLION // 10, tiny), (MILLION, tiny)]
    before: dict[str, tuple[int, float, float, float]] = {}  # samples, seconds, processor, own MiB
    columns = (("samples", 8), ("seconds", 9), ("processor", 9), ("peak (files)", 16))
    print(" " * 12, *(f"{name:>{width}s}" for name, width in columns), "  times each")
    for count, stages in runs:
        took: dict[str, list[tuple[float, ...]]] = {stage: [] for stage in stages}
        with tempfile.TemporaryDirectory(prefix="darkroom-") as scratch:
            folder = Path(scratch, "pictures")
            if "ingest" in stages:
                pictures(folder, count)
            for turn in range(options.rounds):
                for stage in stages:
                    took[stage].append(fresh(stage, count, folder, Path(scratch, f"data{turn}")))
        for stage, runs_of in took.items():
            seconds, cpu, room, files = map(statistics.median, zip(*runs_of, strict=True))
            line = f"{stage:12s} {count:8d} {seconds:9.2f} {cpu:9.2f} {room:6.0f} ({files:.0f}) MiB"
            if stage in before:
                samples, wall, processor, own = before[stage]
                bound = SLACK * count / samples
                for now, then in ((seconds, wall), (cpu, processor)):
                    line += f"   {now / then:.2f} ({at_most(now / then, bound, 'x')})"
                line += f", {room - files - own:+.0f} MiB"
            before[stage] = (count, seconds, cpu, room - files)
            print(line, flush=True)


if __name__ == "__main__":
    main()
