"""What checkpoints take from a training: python -m tests.benchmarks.checkpoints [--pairs N]

The training is that of `tests.benchmarks.step`, 3.9 M parameters at batch 64, with its state saved
by `checkpoint.Saver` as the trainer does. Blocks of 100 updates take turns: one begins with a save,
whose writing goes on behind it, and one without. The ratio is that of the seconds without to those
with, the median over the pairs. Then what a save of 25 M parameters (weights, averages, two moments
of AdamW: 400 MB) takes: how long the training stands still for the copy, and the processor's
seconds of the thread that writes it, fsync and SHA-256 included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks import step
from training.checkpoint import Saver
from training.loop import Progress, TrainingConfig, train
from training.networks import UNetConfig

LARGE = UNetConfig(
    channels=136, embedding=640, channel_mult=(1, 2), head_width=34, contexts=step.NETWORK.contexts
)


def blocks(folder: str, into: Path, pairs: int, every: int) -> dict[str, list[float]]:
    """Seconds of blocks of `every` updates, with a save and without."""
    batches = step.loader(folder, 64)
    stage = step.stage_of(step.NETWORK, batches)
    updates = train(stage, batches, TrainingConfig(images=10**9, batch=64))
    progress = next(updates)
    took: dict[str, list[float]] = {"with": [], "without": []}
    with Saver(into) as saver:
        for turn in range(-1, 2 * pairs):
            name = ("with", "without")[turn % 2]
            start = time.perf_counter()
            if name == "with":
                saver.save(progress.state)
            for _ in range(every):
                progress = next(updates)
            if turn >= 0:
                took[name].append(time.perf_counter() - start)
            saver.wait()  # of what is left then, the block without one is to know nothing
    updates.close()
    return took


def saves(folder: str, into: Path, count: int) -> tuple[int, list[float], list[float]]:
    """(parameters, seconds of standstill, processor seconds behind it) of large saves."""
    batches = step.loader(folder, 2)
    stage = step.stage_of(LARGE, batches)
    stalls, behind = [], []
    updates = train(stage, batches, TrainingConfig(images=10**9, batch=2))
    with Saver(into) as saver:
        for turn in range(-1, count):  # the first one allocates
            progress: Progress = next(updates)
            state = progress.state
            process, start = time.process_time(), time.perf_counter()
            mine = time.thread_time()
            saver.save(state)
            stall = time.perf_counter() - start
            saver.wait()
            others = (time.process_time() - process) - (time.thread_time() - mine)
            if turn >= 0:
                stalls.append(stall)
                behind.append(others)
    updates.close()
    return sum(p.numel() for p in stage.network.parameters()), stalls, behind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--every", type=int, default=100, help="updates between saves")
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="darkroom-") as temporary:
        folder = str(Path(temporary, "data"))
        step.write(folder, 1024)
        took = blocks(folder, Path(temporary, "small"), options.pairs, options.every)
        parameters, stalls, behind = saves(folder, Path(temporary, "large"), options.saves)
    found = sorted(b / a for a, b in zip(took["with"], took["without"], strict=True))
    print(
        f"a save every {options.every} updates: without / with {statistics.median(found):.3f} "
        f"({found[0]:.3f} to {found[-1]:.3f}); load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{parameters / 1e6:.1f} M parameters: standstill {1000 * statistics.median(stalls):.0f} "
        f"ms ({1000 * min(stalls):.0f} to {1000 * max(stalls):.0f}), behind it "
        f"{statistics.median(behind):.2f} s of processor"
    )


if __name__ == "__main__":
    main()
