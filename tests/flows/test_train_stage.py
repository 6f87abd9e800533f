"""Where a stage is trained."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest

from flows import train_stage
from flows.line import Line
from flows.recipe import load
from flows.settings import Settings
from pipeline import manifest
from pipeline.manifest import Manifest, Shard
from training import distributed, tracking


@pytest.mark.parametrize(
    ("address", "executor", "workers", "session", "away"),
    [
        (None, "auto", 1, False, False),
        (None, "ray", 1, False, False),  # Ray of this machine: it would only take cores away
        (None, "auto", 2, True, False),
        ("head:6379", "auto", 1, True, True),
        ("head:6379", "ray", 1, True, True),
        ("head:6379", "auto", 2, True, True),
        ("head:6379", "processes", 1, False, False),
    ],
)
def test_where_a_cluster_is_named_even_one_worker_is_there(
    tmp_path, monkeypatch, address, executor, workers, session, away
):
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = [f"executor.kind={executor}", f"autoencoder.training.workers={workers}"]
    line = Line(load("shapes", words), Settings(tmp_path / "home", "sqlite://"))
    shard = Shard("train-000000", "train", 4, 100, "0" * 64)
    manifest.publish(Manifest(line.dataset, 1, None, (shard,)))
    sessions, fits = [], []

    def fit(job, on_progress, force_ray):
        fits.append((job.training_config().workers, force_ray))
        return {"measured": {}, "images_seen": 0}

    def ray_session(wanted):
        sessions.append(wanted)
        return nullcontext()

    monkeypatch.setattr(distributed, "fit", fit)
    monkeypatch.setattr(tracking, "Run", MagicMock())
    monkeypatch.setattr(train_stage, "ray_session", ray_session)
    train_stage.train(line, "autoencoder", line.manifest())
    assert (sessions, fits) == ([session], [(workers, away)])
