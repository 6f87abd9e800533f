"""Stored pictures into latents: python -m tests.benchmarks.encode [--rounds N]

What `pipeline.encode` takes, from the shards on disk to the published files, against the bare
encoder on the same pictures, decoded, fitted and batched in memory beforehand. The encoder is a
convolutional autoencoder's (Rombach et al. 2022) with fixed random weights, and both give it the
same threads. Each round is a fresh process that does both, in turns the one or the other first. The
ratio is that of the bare seconds to ours: the median over the rounds; that of the processor's
seconds tells more than the clock on a busy machine. Loading the pictures is what else there is to
do: its seconds, alone and on one thread, are shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import images, manifest, shards, storage
from pipeline.encode import encode
from pipeline.execute import Executor
from pipeline.schema import EncoderSpec
from pipeline.shards import ShardSample, write_shard
from training.autoencoding import to_unit
from training.networks import AutoencoderConfig, build

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dataset(folder: str, samples: int, side: int, shard_samples: int) -> manifest.Manifest:
    """Smooth pictures of `side` x 3/2 `side` pixels, as photographs are stored."""
    rng = np.random.default_rng(0)

    def sample(number: int) -> ShardSample:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 36, 3), np.uint8))
        data = images.encode(coarse.resize((side * 3 // 2, side)), "jpg")
        return ShardSample(f"{number:032x}", data, "jpg", (f"picture {number}",))

    written = [
        write_shard(map(sample, range(start, min(start + shard_samples, samples))), folder, "train")
        for start in range(0, samples, shard_samples)
    ]
    manifest.publish(manifest.Manifest(storage.absolute(folder), 1, None, tuple(written)))
    return manifest.read(folder, 1)


def encoder(channels: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """uint8 [n, 3, height, width] -> moments float16 [n, 8, height / 8, width / 8]."""
    torch.manual_seed(0)
    config = AutoencoderConfig(patch=2, channels=channels, channel_mult=(1, 2, 4))
    network: Any = build(config).to(DEVICE).eval().requires_grad_(False)

    @torch.inference_mode()
    def encoded(pixels: np.ndarray) -> dict[str, np.ndarray]:
        moments = network.encode(to_unit(torch.from_numpy(pixels).to(DEVICE)))
        return {"moments": moments.to(torch.float16).cpu().numpy()}

    return encoded


def measure(
    folder: str, channels: int, side: int, batch: int, bare_first: bool
) -> dict[str, float]:
    data, network = manifest.read(folder, 1), encoder(channels)
    start, took = time.perf_counter(), dict[str, float]()
    pictures = [
        images.fit(images.decode(sample.image)[0], side)
        for shard in data.shards
        for sample in shards.read_shard(data.url("shards", f"{shard.name}.tar"))
    ]
    took["loading"] = time.perf_counter() - start
    batches = [np.stack(pictures[at : at + batch]) for at in range(0, len(pictures), batch)]
    del pictures
    network(batches[0])

    def bare() -> None:
        for pixels in batches:
            network(pixels)

    def ours() -> None:
        name = f"bench{time.time_ns()}"
        spec = EncoderSpec("latents", "image", name, {"batch": batch}, side=side)
        made = encode(data, [spec], lambda _: network, Executor(kind="local"))
        storage.delete(made["latents"].url)

    for name, work in (("bare", bare), ("ours", ours))[:: 1 if bare_first else -1]:
        start, before = time.perf_counter(), time.process_time()
        work()
        took[name] = time.perf_counter() - start
        took[f"{name}, processor"] = time.process_time() - before
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--shard-samples", type=int, default=160)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=64, help="of the encoder's first level")
    parser.add_argument("--inside", nargs=2, metavar=("FOLDER", "ROUND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.channels, options.side, options.batch)
    if options.inside:
        folder, turn = options.inside
        print(json.dumps(measure(folder, *shape, bare_first=int(turn) % 2 == 0)))
        return
    took: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="darkroom-") as folder:
        dataset(folder, options.samples, options.side, options.shard_samples)
        for turn in range(options.rounds):
            command = [sys.executable, "-m", "tests.benchmarks.encode", *sys.argv[1:]]
            command += ["--inside", folder, str(turn)]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(ran.stderr)
            took.append(json.loads(ran.stdout.splitlines()[-1]))
            print(f"# round {turn + 1}: {took[-1]}", file=sys.stderr, flush=True)
    print(
        f"{options.samples} pictures of {options.side} px, {len(os.sched_getaffinity(0))} cores, "
        f"{DEVICE}"
    )
    for name in ("bare", "ours", "loading"):
        seconds = statistics.median(it[name] for it in took)
        print(f"{name:8s} {seconds:8.2f} s {options.samples / seconds:8.1f} pictures/s")
    for what in ("", ", processor"):
        ratios = [it[f"bare{what}"] / it[f"ours{what}"] for it in took]
        print(
            f"bare / ours{what}: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
