"""Stages beside each other, stopped in three ways: told to, failed, their caller killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from training import checkpoint, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# clip and sr1, which hears nothing, begin at once; the base would follow.
WORDS = (
    "run", "shapes-glide", "noisy_clip=null", 'base.config.listens=["clip"]',
    "sr1.config.listens=[]", "parallel=2", "data.scenes=300", "data.ingest.shard_samples=100",
    "data.dataset=few", "executor.kind=local",
    *(f"{stage}.training.{key}" for stage in ("clip", "sr1") for key in (
        "images=200000", "batch=16", "log_images=32", "checkpoint_images=100000",
    )),
)  # fmt: skip


def command_of(pid: int) -> bytes:
    """Its command line; empty for one that has ended, whether it was waited for or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def children_of(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            child, rest = stat.read_text().split(" ", 1)
            parents[int(child)] = int(rest.rsplit(")", 1)[1].split()[1])
    return [child for child, parent in parents.items() if parent == pid and command_of(child)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_stages_stop_together_and_go_on_where_they_were(darkroom, tmp_path):
    home = type(darkroom)(tmp_path / "home")
    # A server of its own, to be found by where it keeps its files.
    home.environment["PREFECT_HOME"] = str(tmp_path / "prefect")
    log = tmp_path / "log"

    def start() -> subprocess.Popen[str]:
        with log.open("a") as err:
            return subprocess.Popen(
                home.command(*WORDS, "--json"), env=home.environment, text=True,
                stdout=subprocess.PIPE, stderr=err,
            )  # fmt: skip

    def wait(what: Callable[[], object], it: subprocess.Popen[str], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert it.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.1)

    def seen() -> dict[str, int]:
        """Stage -> the images of its last log line."""
        found = {it.name.partition("-")[0]: it for it in (home.home / "stages").glob("*-*")}
        return {name: results.history(it)[-1]["images_seen"] for name, it in found.items()
                if results.history(it)}  # fmt: skip

    def kept() -> dict[str, str]:
        """Stage -> the images of its newest checkpoint."""
        found = {it.name.partition("-")[0]: it for it in (home.home / "stages").glob("*-*")}
        newest = {name: checkpoint.visible(it / "checkpoints") for name, it in found.items()}
        return {name: paths[-1].name for name, paths in newest.items() if paths}

    with contextlib.ExitStack() as after:
        first = after.enter_context(start())
        after.callback(first.kill)
        wait(lambda: len(seen()) == 2, first)
        started = children_of(first.pid)
        assert len(started) == 4, "two stages, Prefect's server and who ends that"
        assert kept() == {}
        first.send_signal(signal.SIGTERM)
        said = json.loads(first.communicate(timeout=120)[0].splitlines()[-1])
        assert first.returncode == 128 + signal.SIGTERM, log.read_text()[-4000:]
        assert "goes on from here" in said["error"]
        assert not any(map(command_of, started))
        assert set(kept()) == {"clip", "sr1"}
        lines = seen()

        # One that fails ends the other, and is named.
        (stage,) = (home.home / "stages").glob("sr1-*")
        order = (stage / results.JOB).read_bytes()
        (stage / results.JOB).write_text("{}")
        second = after.enter_context(start())
        after.callback(second.kill)
        said = json.loads(second.communicate(timeout=300)[0].splitlines()[-1])
        assert second.returncode == 1
        assert "stage sr1: TypeError" in said["error"], said
        (stage / results.JOB).write_bytes(order)
        lines = seen()  # the other may have got further

        third = after.enter_context(start())
        after.callback(third.kill)
        wait(lambda: all(seen()[name] > lines[name] for name in lines), third)
        started = children_of(third.pid)
        stages = [it for it in started if b"flows.parallel" in command_of(it)]
        assert len(stages) == 2
        for it in {*started} - {*stages}:
            after.callback(kill, it)
        before = kept()
        third.kill()
        third.wait()
        end = time.monotonic() + 90
        while alive := [it for it in stages if command_of(it)]:
            assert time.monotonic() < end, (alive, log.read_text()[-4000:])
            time.sleep(0.1)
        while alive := [it for it in started if command_of(it)]:
            assert time.monotonic() < end, (alive, "Prefect's server outlives who was killed")
            time.sleep(0.1)
        now = kept()
        assert all(now[name] > before[name] for name in before), log.read_text()[-4000:]
        for it in (home.home / "stages").glob("*-*"):
            images = [record["images_seen"] for record in results.history(it)]
            assert images == list(range(32, images[-1] + 1, 32)), "none twice, none left out"
