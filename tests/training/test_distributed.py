"""Who computes does not change what is computed: workers of torch's process groups, and of Ray.

Run as a script, this file forks the workers of a group: `test_distributed.py DIRECTORY WORKERS`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.plan import BatchPlan
from training import checkpoint, results
from training.distributed import fit, of_process_group
from training.job import Job, run
from training.loop import Diverged, World
from training.stage import Stage

BATCH, STEPS = 10, 60


@dataclass(frozen=True)
class LineConfig:
    kind: str = "line"


class Line(Stage):
    """A network whose noise comes from the position; `sometimes` is used by few rows."""

    kind = "line"

    def __init__(self, config: LineConfig):
        super().__init__(config)
        self.net = nn.Sequential(nn.Linear(4, 24), nn.SiLU(), nn.Linear(24, 4))
        self.sometimes = nn.Parameter(torch.zeros(4))

    def forward(self, batch):
        x, rare = batch["x"], batch["position"] % 10 == 9
        out = self.net(x + 0.1 * torch.sin(batch["position"].float() + self.seed)[:, None])
        if rare.any():
            out = out + rare[:, None] * self.sometimes
        loss = (out - x.flip(1)).square().mean(1)
        return {"loss": loss, "size": out.detach().abs().mean()}


class Lines:
    def __init__(self, job: Job, world: World):
        self.plan, self.world, self.meta = BatchPlan((30, 41), "d", 5, BATCH), world, job.meta
        self.data = np.random.default_rng(0).normal(size=(71, 4)).astype(np.float32)

    def batches(self, start_step: int = 0, prefetch: int = 2):
        step = start_step
        while True:
            self._misfortune(step)
            rows, indices = self.plan.slice(step, self.world.rank, self.world.size)
            keys = [f"k{i}" for i in indices.tolist()]
            x = self.data[indices] * (np.nan if step in self.meta.get("poison", ()) else 1)
            yield {"x": x, "position": step * BATCH + rows, "key": keys}
            step += 1

    def _misfortune(self, step: int) -> None:
        time.sleep(self.meta.get("pause", 0))
        once = Path(self.meta.get("die_once", "/nowhere"))
        if step == 35 and self.world.rank == 1 and once.exists():
            once.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def build(job: Job, world: World):
    return Line(LineConfig()), Lines(job, world), "d"


def job(output: Path, workers: int = 1, **meta) -> Job:
    training = {
        "images": BATCH * STEPS,
        "batch": BATCH,
        "learning_rate": 1e-2,
        "checkpoint_images": BATCH * 10,
        "log_images": BATCH * 4,
        "ema_halflife_images": 100,
        "workers": workers,
        "threads": 1,
    }
    return Job(
        kind="line", fingerprint="f", config={}, training=training, output=str(output), meta=meta
    )


def reached(stage_dir: Path) -> int:
    state = checkpoint.newest(stage_dir / results.CHECKPOINTS)
    return state.images_seen if state else 0


def assert_close(one: Path, other: Path) -> None:
    """Promise 3: losses differ by at most 1e-5 of their value, and so do weights of theirs."""
    for a, b in zip(results.history(one), results.history(other), strict=True):
        for name in ("loss", "size", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert (a["images_seen"], a["step"]) == (b["images_seen"], b["step"])
    first, second = (load_file(d / results.WEIGHTS) for d in (one, other))
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-5 * tensor.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    fit(job(output), build=build)
    return output


def test_one_worker_is_this_process(alone, tmp_path):
    records = []
    done = fit(job(tmp_path), records.append, build=build)
    assert done == results.committed(tmp_path)
    assert records == results.history(tmp_path)
    assert (tmp_path / results.WEIGHTS).read_bytes() == (alone / results.WEIGHTS).read_bytes()


def test_three_workers_with_uneven_shares_do_what_one_does(alone, tmp_path):
    """Interrupted after 3 log points as three, and finished as two: the global sequence goes on."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, __file__, str(tmp_path / "group")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"stopped_at": 120}
    assert_close(tmp_path / "group", alone)


def work(rank: int, size: int, output: Path, stop_after: int | None) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{output}.{size}", rank=rank, world_size=size
    )
    asked = []

    def stop() -> bool:
        asked.append(rank)
        return rank == 1 and len(asked) == stop_after

    world = of_process_group(rank, size, torch.device("cpu"), stop)
    run(job(output, size), world, None, build)
    torch.distributed.destroy_process_group()


def group(size: int, output: Path, stop_after: int | None) -> None:
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                work(rank, size, output, stop_after)
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def rays(test):
    """Minutes on a busy machine, and Ray has warnings of its own."""
    for mark in (pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def ray():
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    ray.shutdown()  # the session of other folders' tests, where they ran before
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@rays
def test_rays_workers_do_what_one_does_even_when_one_dies(alone, tmp_path, ray):
    """F5: rank 1 is killed at step 35; both start again from the checkpoint at step 30."""
    (tmp_path / "die").touch()
    records, output = [], tmp_path / "stage"
    done = fit(job(output, 2, die_once=str(tmp_path / "die")), records.append, build=build)
    assert not (tmp_path / "die").exists()
    assert done == results.committed(output)
    assert_close(output, alone)
    assert [r["images_seen"] for r in records] == [r["images_seen"] for r in results.history(alone)]
    assert not (output / "ray").exists()


@rays
def test_a_signal_makes_rays_workers_write_a_checkpoint(alone, tmp_path, ray):
    """F2 with several workers: it is obeyed at the next log point."""

    def terminate(record):
        if record["images_seen"] == 80:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            fit(job(tmp_path, 2, pause=0.2), terminate, build=build)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert results.committed(tmp_path) is None
    assert 80 < reached(tmp_path) < BATCH * STEPS
    assert reached(tmp_path) % (BATCH * 4) == 0
    run(replace(job(tmp_path), meta={}), build=build)
    assert_close(tmp_path, alone)


@rays
def test_what_would_diverge_again_is_not_tried_again(tmp_path, ray):
    poisoned = job(tmp_path, 1, poison=list(range(20, 30)))
    with pytest.raises(Diverged, match="step 23") as caught:
        fit(poisoned, force_ray=True, build=build)
    assert len(caught.value.keys) == 4 * BATCH


if __name__ == "__main__":
    import torch._dynamo  # DistributedDataParallel imports it; once is enough

    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    group(3, directory, stop_after=3)
    print(json.dumps({"stopped_at": reached(directory)}))
    group(2, directory, stop_after=None)
