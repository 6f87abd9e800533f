"""How fast encoded shards become batches: python -m tests.benchmarks.loader [--samples N]

Latent moments 8x8x8 and unpadded text of 40 to 80 tokens x 64, float16, in global random order, one
thread of one process, warm page cache. The table gives samples per second of the clock and of one
core's time, each the best of five runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline import manifest, storage
from pipeline.encode import encode
from pipeline.execute import Executor
from pipeline.load import Loader
from pipeline.schema import EncoderSpec
from pipeline.shards import ShardSample, write_shard

LATENTS = EncoderSpec("latents", "image", "latents", {"batch": 256}, side=8)
TEXT = EncoderSpec("t5", "text", "t5", {"batch": 256})


def build(spec: EncoderSpec):
    rng = np.random.default_rng(0)

    def latents(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"moments": rng.standard_normal((len(pixels), 8, 8, 8)).astype(np.float16)}

    def text(captions: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
        tokens = [
            rng.standard_normal((n, 64)).astype(np.float16)
            for n in rng.integers(40, 81, len(captions))
        ]
        return tokens, np.stack([rows.mean(0) for rows in tokens])

    return latents if spec.kind == "image" else text


def dataset(folder: str, samples: int, shard_samples: int = 2048) -> manifest.Manifest:
    """Made once; a folder that holds it is used again."""
    if not (data := manifest.latest(folder)):
        from PIL import Image

        from pipeline.images import encode as file_of

        png = file_of(Image.new("RGB", (8, 8)), "png")
        shards = [
            write_shard(
                [
                    ShardSample(f"{n:032x}", png, "png", (f"picture number {n} of many",))
                    for n in range(start, min(start + shard_samples, samples))
                ],
                folder,
                "train",
            )
            for start in range(0, samples, shard_samples)
        ]
        manifest.publish(manifest.Manifest(storage.absolute(folder), 1, None, tuple(shards)))
        data = manifest.read(folder, 1)
    return data


def rates(loader: Loader, steps: int, prefetch: int) -> tuple[float, float]:
    """Samples per second: of the clock, and of processor time."""
    for step in range(2 * len(loader.shards)):
        loader.batch(step)
    wall, cpu = [], []
    for run in range(5):
        batches = loader.batches(run * steps, prefetch)
        start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(batches)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
        batches.close()
    samples = steps * loader.plan.global_batch
    return samples / min(wall), samples / min(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = dataset(options.folder or str(Path(scratch, "data")), options.samples)
        encodings = encode(data, [LATENTS, TEXT], build, Executor(kind="local"))
        chosen = list(encodings.values())
        print(f"{data.samples()} samples, {len(data.shards)} shards, batch {options.batch}")
        for name, some, captions, prefetch in (
            ("latents", chosen[:1], False, 0),
            ("latents + text", chosen, False, 0),
            ("latents + text + captions", chosen, True, 0),
            ("latents + text + captions, prefetched", chosen, True, 2),
        ):
            loader = Loader(data, some, global_batch=options.batch, seed=0, captions=captions)
            clock, core = rates(loader, options.steps, prefetch)
            print(f"{name:40s} {clock:10,.0f}/s {core:10,.0f}/s of a core")


if __name__ == "__main__":
    main()
