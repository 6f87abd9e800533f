"""Dead workers, dead drivers, and a host that is cut off: nothing is lost but the last interval.

Run as a script, this file is the command that is disturbed: `test_survival.py SPEC.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.test_distributed import BATCH, Lines, assert_close, drawn, job, rays
from tests.training.test_distributed import build as build_line
from training import checkpoint, distributed, results
from training.distributed import fit
from training.job import Job, run
from training.loop import World

INTERVAL = BATCH * 10
CLOCKS = ("seconds", "images_per_second", "data_wait_share")


class Unlucky(Lines):
    """Takes as long for a batch as the file `pace` says; where a file is named after a step and a
    rank, that worker is killed, so many seconds later as is written in it."""

    def _misfortune(self, step: int) -> None:
        time.sleep(float(Path(self.meta["pace"]).read_text()))
        fate = Path(self.meta["kills"], f"{step}.{self.world.rank}")
        if fate.exists():
            delay = float(fate.read_text())
            fate.unlink()
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def build(job: Job, world: World):
    stage, _, digest = build_line(job, world)
    return stage, Unlucky(job, world), digest


class Trouble:
    """A training by a command of its own, and what is done to it."""

    def __init__(self, directory: Path, steps: int, workers: int = 2, **training):
        directory.mkdir()
        self.output, self.pace, self.kills = (directory / n for n in ("stage", "pace", "kills"))
        self.kills.mkdir()
        self.go(0)
        meta = {"log": True, "pace": str(self.pace), "kills": str(self.kills)}
        made = job(self.output, workers, micro_batch=5, dropout=0.2, **meta)
        self.job = replace(made, training=made.training | {"images": BATCH * steps} | training)
        self.spec, self.log = directory / "spec.json", directory / "log"
        self.spec.write_text(json.dumps(self.job.to_json()))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONWARNINGS": "ignore",
            "RAY_AUTH_MODE": "disabled",
            "DARKROOM_TEST": str(directory),  # whatever descends from it is found by that
        }
        self.environment.pop("RAY_ADDRESS", None)

    def go(self, seconds: float) -> None:
        """How long a batch takes from now on."""
        self.pace.with_suffix(".new").write_text(str(seconds))
        self.pace.with_suffix(".new").rename(self.pace)

    def start(self, *before: str, **environment: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [*before, sys.executable, __file__, str(self.spec)],
                env=self.environment | environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def logged(self) -> int:
        return max((r["images_seen"] for r in results.history(self.output)), default=0)

    def workers(self) -> list[int]:
        """How many there were at each log point."""
        return [r["workers"] for r in results.history(self.output)]

    def until(self, what: Callable[[], object], driver: subprocess.Popen[bytes]) -> None:
        """Wait until `what` is true; the driver must not end before."""
        while not what():
            assert driver.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def done(self, driver: subprocess.Popen[bytes]) -> None:
        assert driver.wait() == 0, self.log.read_text()[-4000:]

    def repeated(self, workers: tuple[int, ...]) -> int:
        """How many rows were computed more often than once."""
        logs = [Path(f"{self.output}.{n}.{rank}") for n in workers for rank in range(n)]
        rows = [json.loads(line)[0] for log in logs for line in log.read_text().splitlines()]
        assert set(rows) == set(range(self.job.training["images"]))
        return len(rows) - len(set(rows))


@contextlib.contextmanager
def nothing_left(*troubles: Trouble) -> Iterator[None]:
    """Kills what is left of them: Ray outlives its driver by some seconds."""
    marks = [f"DARKROOM_TEST={t.environment['DARKROOM_TEST']}\0".encode() for t in troubles]
    try:
        yield
    finally:
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if any(mark in path.read_bytes() for mark in marks):
                    os.kill(int(path.parent.name), signal.SIGKILL)


def lines(stage_dir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in results.history(stage_dir)]


@rays
def test_ten_dead_workers_and_three_dead_drivers_change_no_bit(tmp_path, rounds):
    """One fit, its workers killed at random moments; its driver too, and the same command again."""
    dead_workers, dead_drivers = rounds((2, 1), (10, 3))
    steps, chance = rounds(60, 300), random.Random(7)
    calm, hit = Trouble(tmp_path / "calm", steps), Trouble(tmp_path / "hit", steps)
    for step in chance.sample(range(5, steps - 5), dead_workers):
        fate = hit.kills / f"{step}.{chance.randrange(2)}"
        fate.write_text(str(chance.uniform(0, 0.2)))
    moments = sorted(chance.sample(range(100, BATCH * steps - 100), dead_drivers))
    with nothing_left(calm, hit):
        calm.done(calm.start())
        hit.go(0.02)
        for moment in moments:
            driver = hit.start()
            hit.until(lambda moment=moment: hit.logged() >= moment, driver)
            driver.kill()
            driver.wait()
        hit.done(hit.start())
    assert not list(hit.kills.iterdir())
    assert lines(hit.output) == lines(calm.output)
    weights = [(t.output / results.WEIGHTS).read_bytes() for t in (hit, calm)]
    assert weights[0] == weights[1]
    # A worker may have begun a batch when another one dies.
    assert calm.repeated((2,)) == 0
    assert hit.repeated((2,)) <= (dead_workers + dead_drivers) * (INTERVAL + BATCH)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.GROW_SECONDS = 5
    fit(Job.from_json(json.loads(Path(sys.argv[1]).read_text())), build=build)
