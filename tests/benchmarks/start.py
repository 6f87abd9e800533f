"""From `darkroom train` to its first update: python -m tests.benchmarks.start [--workers 2]

The command trains the autoencoder of `shapes`, on data that are there. Each turn is a fresh process
on a home of its own: first it starts from nothing, then, when it has a checkpoint, it is killed
(SIGKILL, with all that it has started), and the same command goes on. What each phase took is what
the command says itself, counted from the start of its process; beside it stands what the clock
showed here until that line came, and what the processor did for it meanwhile, which other work on
the machine changes least. Modules lie in the page cache, for the data were made just before. Ray
lowers the priority of its processes (nice 15), which beside other work starves them: here it does
not.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import processes

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
CLOCK, PROCESSOR = "until it was said, by the clock", "by the processor"


def words(images: int, workers: int) -> list[str]:
    training = {
        "images": images,
        "batch": BATCH,
        "log_images": BATCH,
        "checkpoint_images": 2 * BATCH,
        "workers": workers,
        "threads": 1,
    }
    return ["data.scenes=2000", "executor.kind=local"] + [
        f"autoencoder.training.{name}={value}" for name, value in training.items()
    ]


def command(asked: list[str]) -> list[str]:
    return [sys.executable, "-m", "flows", "train", "shapes", "autoencoder", *asked]


def phases(line: str) -> dict[str, float]:
    """Of `autoencoder: started in 5.0 s: torch 3.0, first update 2.0`; {} of another line."""
    found = re.search(r"started in ([\d.]+) s: (.*)", line)
    if found is None:
        return {}
    named = dict(part.rsplit(" ", 1) for part in found[2].split(", "))
    return {name: float(taken) for name, taken in named.items()} | {"together": float(found[1])}


def begin(asked: list[str], home: Path, log: Path) -> tuple[dict[str, float], subprocess.Popen]:
    """(phases of a start, the process, which trains on)."""
    spent, since = processes.processor_seconds(), time.perf_counter()
    with log.open("wb") as out:
        it = subprocess.Popen(
            command(asked),
            cwd=ROOT,
            env={"RAY_worker_niceness": "0", **os.environ, "DARKROOM_HOME": str(home)},
            stdout=subprocess.DEVNULL,
            stderr=out,
        )
    while not (found := phases(log.read_text())):
        if it.poll() is not None:
            raise SystemExit(f"darkroom train ended with {it.returncode}:\n{log.read_text()}")
        time.sleep(0.02)
    found[CLOCK] = time.perf_counter() - since
    found[PROCESSOR] = processes.processor_seconds() - spent
    return found, it


def turn(home: Path, asked: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """(from nothing, after SIGKILL)."""
    log = home / "log"
    cold, it = begin(asked, home, log)
    while not any(home.glob("stages/autoencoder-*/checkpoints/[0-9]*")):
        time.sleep(0.1)
    processes.end(it.pid)
    it.wait()
    again, it = begin(asked, home, log)
    processes.end(it.pid)
    it.wait()
    if "first weights" in again:
        raise SystemExit(f"it did not go on from its checkpoint:\n{log.read_text()}")
    return cold, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="more than one: under Ray Train")
    options = parser.parse_args()
    asked = words(10**7, options.workers)
    told: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="darkroom-", ignore_cleanup_errors=True) as temporary:
        first = Path(temporary, "data")
        environment = os.environ | {"DARKROOM_HOME": str(first)}
        made = command(words(2 * BATCH, 1))
        subprocess.run(made, cwd=ROOT, env=environment, check=True, capture_output=True)
        for number in range(options.turns):
            home = Path(temporary, str(number))
            home.mkdir()
            (home / "datasets").symlink_to(first / "datasets")
            told.append(turn(home, asked))
    print(
        f"darkroom train, {options.workers} worker{'s' * (options.workers > 1)}, medians of "
        f"{options.turns}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for title, starts in {
        "from nothing": [cold for cold, _ in told],
        "after SIGKILL": [again for _, again in told],
    }.items():
        print(f"{title}:")
        for name in dict.fromkeys(name for it in starts for name in it):
            taken = [it.get(name, 0.0) for it in starts]
            print(
                f"  {name:32s} {statistics.median(taken):6.1f} s "
                f"({min(taken):.1f} to {max(taken):.1f})"
            )


if __name__ == "__main__":
    main()
