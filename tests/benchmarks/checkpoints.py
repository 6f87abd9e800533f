"""What checkpoints take from a training: python -m tests.benchmarks.checkpoints [--pairs N]

The training is that of `tests.benchmarks.step`, 3.9 M parameters at batch 64, with its state saved
by `checkpoint.Saver` as the trainer does. Blocks of ten updates take turns: one begins with a save,
whose writing goes on behind it and has ended before the block does, and one is without. What a save
costs is the difference, the median over the pairs; the ratio is that of 100 updates without a save
to 100 with one. (Blocks of 100 would drown it: their seconds vary by 4 % on an idle machine, a save
takes less than 1 %.) Then what a save of 25 M parameters (weights, averages, two moments
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

from tests.benchmarks import step, targets
from tests.benchmarks.step import PROCESSOR
from training.checkpoint import Saver
from training.config import TrainingConfig
from training.loop import Progress, train
from training.networks import UNetConfig

LARGE = UNetConfig(
    channels=136, embedding=640, channel_mult=(1, 2), head_width=34, contexts=step.NETWORK.contexts
)

RATIO, STALL_MS, BEHIND_SECONDS = 0.99, 300, 1.5
"""Targets: without / with a save every 100 updates; what a save of LARGE takes."""


def blocks(folder: str, into: Path, pairs: int, length: int) -> dict[str, list[float]]:
    """Seconds of blocks of `length` updates, with a save and without, by the clock and of the
    processor."""
    batches = step.loader(folder, 64)
    stage = step.stage_of(step.NETWORK, batches)
    updates = train(stage, batches, TrainingConfig(images=10**9, batch=64))
    progress = next(updates)
    took = {name + of: list[float]() for name in ("with", "without") for of in ("", PROCESSOR)}
    with Saver(into) as saver:
        for turn in range(-1, 2 * pairs):
            name = ("with", "without")[turn % 2]
            start, before = time.perf_counter(), time.process_time()
            if name == "with":
                saver.save(progress.state)
            for _ in range(length):
                progress = next(updates)
            saver.wait()  # what is left then counts here, and the block without a save is without
            if turn >= 0:
                took[name].append(time.perf_counter() - start)
                took[name + PROCESSOR].append(time.process_time() - before)
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
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--block", type=int, default=10, help="updates in one block")
    parser.add_argument("--every", type=int, default=100, help="updates between saves")
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="darkroom-") as temporary:
        folder = str(Path(temporary, "data"))
        step.write(folder, 1024)
        took = blocks(folder, Path(temporary, "small"), options.pairs, options.block)
        parameters, stalls, behind = saves(folder, Path(temporary, "large"), options.saves)
    for of in ("", PROCESSOR):
        pairs = zip(took["with" + of], took["without" + of], strict=True)
        costs = sorted(a - b for a, b in pairs)
        updates = options.every * statistics.median(took["without" + of]) / options.block
        middle = costs[len(costs) // 4], statistics.median(costs), costs[-len(costs) // 4]
        most, ratio, least = (updates / (updates + cost) for cost in middle)
        print(
            f"a save every {options.every} updates: without / with{of} {ratio:.4f} (half of them "
            f"{least:.4f} to {most:.4f}), {1000 * middle[1]:.0f} ms a save in "
            f"{updates:.1f} s; load {os.getloadavg()[0]:.1f}; {targets.at_least(ratio, RATIO)}"
        )
    stall, writing = 1000 * statistics.median(stalls), statistics.median(behind)
    print(
        f"{parameters / 1e6:.1f} M parameters: standstill {stall:.0f} ms "
        f"({1000 * min(stalls):.0f} to {1000 * max(stalls):.0f}; "
        f"{targets.at_most(stall, STALL_MS, 'ms')}), behind it {writing:.2f} s of processor "
        f"({targets.at_most(writing, BEHIND_SECONDS, 's')})"
    )


if __name__ == "__main__":
    main()
