"""Dead workers, dead drivers, and a host that is cut off: nothing is lost but the last interval.

Run as a script, this file is the command that is disturbed: `test_survival.py SPEC.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
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
from tests.training.test_job import CLOCKS
from training import distributed, results
from training.distributed import fit
from training.job import Job, run
from training.loop import World

INTERVAL = BATCH * 10


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


class Host:
    """A network, mount and process namespace, behind a bridge in another one; it ends with `off`.

    `ray` is where it keeps what Ray has in /tmp/ray, `log` what was said in it.
    """

    def __init__(self, directory: Path):
        directory.mkdir()
        (directory / "ray").mkdir()
        self.log = directory / "log"
        Path("/tmp/ray").mkdir(exist_ok=True)
        begin = f"mount --bind {directory}/ray /tmp/ray && mount -t tmpfs tmpfs /dev/shm"
        begin += " && ip link set lo up && echo up && exec sleep infinity"
        separate = ("--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        self._unshare = subprocess.Popen(
            ["unshare", *separate, "sh", "-c", begin],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with self._unshare.stdout as out:
            if (said := out.readline()) != "up\n":
                self.off()
                pytest.skip(f"no namespaces can be made here: {said.strip()}")
        ours = self._unshare.pid
        self.pid = int(Path(f"/proc/{ours}/task/{ours}/children").read_text())

    @property
    def enter(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--")

    def __call__(self, command: str) -> None:
        enter = ("nsenter", "--target", str(self.pid), "--net")  # the network alone: pids are ours
        done = subprocess.run([*enter, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr.strip()}"

    def cable(self, other: Host, name: str, address: str) -> None:
        """`eth0` here is the end of a cable that is `name` in the other's bridge."""
        other(f"ip link add {name} type veth peer name eth0 netns {self.pid}")
        other(f"ip link set {name} master bridge up")
        self(f"ip address add {address}/24 dev eth0")
        self("ip link set eth0 up")

    def ray(self, *options: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """A node with room for one worker, once it is up."""
        ray = Path(sys.executable).with_name("ray")
        said = self.log.read_text() if self.log.exists() else ""
        with self.log.open("ab") as out:
            node = subprocess.Popen(
                [*self.enter, sys.executable, ray, "start", "--num-cpus=1", "--block", *options],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        while "block forever" not in self.log.read_text()[len(said) :]:
            assert node.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.1)
        return node

    def off(self) -> None:
        self._unshare.kill()
        self._unshare.wait()


@pytest.fixture
def hosts(tmp_path) -> Iterator[tuple[Host, Host, Host]]:
    """Two hosts, 10.77.0.1 and 10.77.0.2, and the switch between them."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("two hosts are network namespaces: needs Linux and root")
    if missing := [it for it in ("ip", "unshare", "nsenter") if not shutil.which(it)]:
        pytest.skip(f"two hosts need {', '.join(missing)}: iproute2 and util-linux")
    with contextlib.ExitStack() as stack:
        found = []
        for name in ("switch", "one", "two"):
            found.append(Host(tmp_path / name))
            stack.callback(found[-1].off)
        switch, one, two = found
        switch("ip link add bridge type bridge")
        switch("ip link set bridge up")
        one.cable(switch, "one", "10.77.0.1")
        two.cable(switch, "two", "10.77.0.2")
        yield one, two, switch


HEAD = "10.77.0.1:6399"
BEGIN = ("--head", "--port=6399", "--node-ip-address=10.77.0.1", "--include-dashboard=false")
JOIN = (f"--address={HEAD}", "--node-ip-address=10.77.0.2")
THERE = {
    "RAY_ADDRESS": HEAD,
    "GLOO_SOCKET_IFNAME": "eth0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}


@rays
def test_a_host_is_cut_off_and_comes_back(tmp_path, hosts):
    """What is drawn and the losses are those of one worker that nothing happened to."""
    one, two, switch = hosts
    it = Trouble(tmp_path / "trouble", 600, min_workers=1)
    whole = Trouble(tmp_path / "whole", 600, workers=1)
    environment = it.environment | {  # dead after 5 s of silence, and not after 25
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_initial_delay_ms": "0",
    }
    with nothing_left(it):
        one.ray(*BEGIN, environment=environment)
        node = two.ray(*JOIN, environment=environment)
        it.go(0.05)
        driver = it.start(*one.enter, **THERE)
        it.until(lambda: it.logged() >= 350, driver)
        switch("ip link set two down")
        it.until(lambda: 1 in it.workers(), driver)
        switch("ip link set two up")
        node.wait()  # a raylet that was given up ends itself; whoever watches it starts another
        two.ray(*JOIN, environment=environment)
        it.go(0.3)
        it.until(lambda: it.workers()[-1] == 2, driver)
        it.go(0)
        it.done(driver)
    run(whole.job, build=build)
    assert_close(it.output, whole.output)
    spans = [n for n, before in zip(it.workers(), [0, *it.workers()], strict=False) if n != before]
    assert spans == [2, 1, 2]
    assert it.repeated((1, 2)) <= 2 * (INTERVAL + BATCH)
    found = drawn(it.output.parent, "stage", 2) | drawn(it.output.parent, "stage", 1)
    assert found == drawn(whole.output.parent, "stage", 1)


@rays
def test_a_host_that_is_about_to_be_taken_away_costs_nothing(tmp_path, hosts):
    """F2 of a spot instance: told beforehand, all write a checkpoint, and the other goes on."""
    one, two, _ = hosts
    never = {"checkpoint_images": 10**6}
    it = Trouble(tmp_path / "trouble", 400, min_workers=1, **never)
    whole = Trouble(tmp_path / "whole", 400, workers=1, **never)
    with nothing_left(it):
        one.ray(*BEGIN, environment=it.environment)
        two.ray(*JOIN, environment=it.environment)
        it.go(0.2)
        driver = it.start(*one.enter, **THERE)
        it.until(lambda: it.logged() >= 120, driver)
        ray = Path(sys.executable).with_name("ray")
        drain = ("drain-node", f"--address={HEAD}", "--reason=DRAIN_NODE_REASON_PREEMPTION")
        drain += ("--reason-message=spot", "--deadline-remaining-seconds=100")
        subprocess.run(
            [*two.enter, sys.executable, ray, *drain], check=True, env=it.environment, timeout=100
        )
        it.until(lambda: 1 in it.workers(), driver)
        it.go(0)
        it.done(driver)
    assert "a node is about to be taken away: going on from 000000000" in it.log.read_text()
    run(whole.job, build=build)
    assert_close(it.output, whole.output)
    assert sorted(set(it.workers())) == [1, 2]
    assert it.repeated((1, 2)) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.GROW_SECONDS = 5
    fit(Job.from_json(json.loads(Path(sys.argv[1]).read_text())), build=build)
