"""What a training logs of itself is what it is called, by answers that are known without it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from training import job, results
from training.config import TrainingConfig
from training.job import Job, Speed, Window, World, run
from training.stage import Stage

BATCH, STEPS, LOGGED, WIDTH = 8, 12, 4, 16
FLOPS = 2 * 2 * WIDTH
"""Of an image: a multiplication and an addition by each weight, and again for its gradient."""
PEAK = 1e6


@dataclass(frozen=True)
class SlopeConfig:
    kind: str = "slope"


class Slope(Stage):
    """loss = w . x, whose gradient is the mean of x, whatever w is; it takes `seconds`."""

    kind = "slope"
    seconds = 0.0

    def __init__(self):
        super().__init__(SlopeConfig())
        self.weight = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, batch):
        time.sleep(self.seconds)
        return {"loss": self.weight(batch["x"])[:, 0]}


def rows(step: int, count: int) -> np.ndarray:
    """Each as the other, so that the mean over some is that over all."""
    x = np.random.default_rng(step).normal(size=(1, WIDTH)).astype(np.float32)
    return np.repeat(x, count, 0)


class Rows:
    def __init__(self, count: int, seconds: float):
        self.count, self.seconds = count, seconds

    def batches(self, start_step: int = 0, prefetch: int = 2):
        for step in range(start_step, STEPS):
            time.sleep(self.seconds)
            yield {"x": rows(step, self.count), "position": np.arange(self.count)}


def logged(
    output: Path, world: World | None = None, waits: float = 0, works: float = 0, **training: Any
) -> list[dict[str, Any]]:
    """Of a training whose batches and updates take so many seconds each."""

    def build(made: Job, world: World):
        stage = Slope()
        stage.seconds = works
        return stage, Rows(BATCH // world.size, waits), "d"

    training |= {"images": BATCH * STEPS, "batch": BATCH, "log_images": BATCH * LOGGED}
    made = Job(kind="slope", fingerprint="f", config={}, training=training, output=str(output))
    run(made, world, None, build)
    return results.history(output)


def alike(size: int) -> World:
    """The first of workers that all compute what it does."""
    return World(size=size, sum=lambda tensor: tensor * size)


@pytest.mark.parametrize("workers", [1, 2])
def test_utilisation_is_a_share_of_what_all_workers_could_do(tmp_path, monkeypatch, workers):
    asked = []

    def rate(*what):
        asked.append(what)
        return PEAK

    monkeypatch.setattr(job, "matmul_rate", rate)
    records = logged(tmp_path, alike(workers), accelerator="probe", workers=workers)
    assert asked == [("probe", "fp32", "cpu")]
    assert len(records) == STEPS // LOGGED
    for record in records:
        done = FLOPS * record["images_per_second"]
        assert record["flops_per_second"] == pytest.approx(done)
        assert record["model_flops_utilisation"] == pytest.approx(done / (PEAK * workers))


def test_without_a_rate_there_is_no_utilisation(tmp_path):
    for record in logged(tmp_path):
        assert "model_flops_utilisation" not in record
        assert record["flops_per_second"] == pytest.approx(FLOPS * record["images_per_second"])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gradient_norm_is_that_of_the_whole_batch_before_it_is_clipped(tmp_path, workers):
    records = logged(tmp_path, alike(workers), workers=workers, max_grad_norm=0.01)
    norms = [np.linalg.norm(rows(step, 1)) for step in range(STEPS)]
    wanted = np.mean(np.reshape(norms, (-1, LOGGED)), 1)
    assert [it["grad_norm"] for it in records] == pytest.approx(wanted.tolist(), rel=1e-5)


@pytest.mark.parametrize(("waits", "works", "more"), [(0.04, 0, True), (0, 0.04, False)])
def test_the_data_wait_share_says_who_waits_for_whom(tmp_path, waits, works, more):
    records = logged(tmp_path, None, waits, works)
    assert all((it["data_wait_share"] > 0.5) is more for it in records)
    assert all(0 <= it["data_wait_share"] <= 1 for it in records)
    assert all(0 < it["images_per_second"] < BATCH / 0.04 for it in records)


def test_memory_is_the_most_that_the_process_had(tmp_path):
    """By what it surely had, and by what the kernel says where it says it."""
    status = Path("/proc/self/status")

    def most(otherwise: float) -> float:
        lines = status.read_text().splitlines() if status.exists() else []
        found = (int(it.split()[1]) << 10 for it in lines if it.startswith("VmHWM"))
        return next(found, otherwise)

    had = torch.ones(64 << 20, dtype=torch.int32)
    before = most(otherwise=had.nbytes)
    for record in logged(tmp_path):
        assert 0.9 * before <= record["peak_memory_bytes"] <= 1.1 * most(otherwise=1 << 40)


def test_a_window_counts_its_own_updates_and_no_time_aside(monkeypatch):
    """Two windows of four updates, half a second each, of which three tenths wait for data."""
    now = [100.0]
    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    window = Window({"seconds": 7.0}, Speed(FLOPS, 3 * PEAK), "cpu")
    seen = 0
    for turn in range(2):
        for _ in range(4):
            now[0] += 0.5
            seen += BATCH
            norm, no = torch.tensor(2.0 + turn), torch.tensor(False)
            update: Any = SimpleNamespace(
                loss=norm, grad_norm=norm, skipped=no, metrics={}, images=BATCH,
                data_wait_seconds=0.3, images_seen=seen, step=seen // BATCH, learning_rate=1e-3,
            )  # fmt: skip
            window.add(update)
        with window.aside():
            now[0] += 10
        told = window.close(update)
        assert told["images_per_second"] == pytest.approx(16)
        assert told["data_wait_share"] == pytest.approx(0.6)
        assert told["flops_per_second"] == pytest.approx(16 * FLOPS)
        assert told["model_flops_utilisation"] == pytest.approx(16 * FLOPS / (3 * PEAK))
        assert told["grad_norm"] == 2.0 + turn
        assert told["seconds"] == pytest.approx(7 + 12 * (turn + 1))


def test_all_workers_devices_together_are_the_peak(monkeypatch):
    monkeypatch.setattr(job, "matmul_rate", lambda *what: PEAK)
    config = TrainingConfig(accelerator="h100")
    assert job._peak(config, World(size=3)) == 3 * PEAK
    assert job._peak(TrainingConfig(), World(size=3)) is None
