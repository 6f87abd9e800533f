"""How long each shapes recipe trains here: python -m tests.benchmarks.budgets [RECIPE...]

Every stage learns for a few updates, as its recipe has it otherwise, on fewer scenes. The median
speed of the later ones says how long all of its pictures take; encoding is counted by the scene.
Beside it stands how fast the machine multiplied matrices before and after. Shared machines vary by
more than that tells, for a small network waits for memory: hold recipes against each other.
Recipes share stages, and each is measured once. What a training does besides, held-out losses and
previews, is not in it: less than a hundredth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

MINUTES = 20
SCENES = 1200
BEFORE, UPDATES = 8, 24


def measured(name: str, known: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of a recipe's training; `known` holds pictures a second by stage."""
    from flows.build_dataset import encode_pixels, encode_stages, ingest_sources
    from flows.line import Line
    from flows.recipe import DENOISING, load
    from flows.settings import settings
    from flows.train_stage import make_job
    from training import job, stages

    whole = load(name)
    asked = {it: stages.training_of(whole.stage(it).training) for it in whole.stages}
    words = [f"data.scenes={SCENES}", "executor.kind=local"]
    for stage, config in asked.items():
        few = {"images": config.batch * (BEFORE + UPDATES), "log_images": config.batch}
        words += [f"{stage}.training.{key}={value}" for key, value in few.items()]
    line = Line(load(name, words), settings())
    began = time.perf_counter()
    ingest_sources(line)
    data = line.manifest()
    encode_pixels(line, data)
    encoding = time.perf_counter() - began
    took: dict[str, float] = {}
    for stage, config in asked.items():
        if stage in DENOISING:
            began = time.perf_counter()
            encode_stages(line, data, (stage,))
            encoding += time.perf_counter() - began
        it = make_job(line, stage, data)
        if it.fingerprint not in known:
            told: list[dict[str, Any]] = []
            job.run(it, on_progress=told.append)
            later = [now["images_per_second"] for now in told[BEFORE:]]
            known[it.fingerprint] = statistics.median(later)
        took[stage] = config.images / known[it.fingerprint]
    return {"data": encoding * whole.data.scenes / SCENES, **took}


def main() -> None:
    from flows.presets import PRESETS
    from training.accelerators import probe

    shapes = [name for name in PRESETS if name.startswith("shapes")]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=shapes)
    options = parser.parse_args()
    known: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="darkroom-") as home:
        os.environ["DARKROOM_HOME"] = home
        for name in options.recipes:
            before = probe().matmul["fp32"]
            took = measured(name, known)
            rate = (before + probe().matmul["fp32"]) / 2e9
            minutes = sum(took.values()) / 60
            met = "met" if minutes < MINUTES else "MISSED"
            parts = ", ".join(f"{part} {seconds / 60:.1f}" for part, seconds in took.items())
            told = f"{name:20s} {minutes:5.1f} min ({parts}) at {rate:.0f} GFLOP/s"
            print(f"{told}; under {MINUTES}: {met}", flush=True)


if __name__ == "__main__":
    main()
