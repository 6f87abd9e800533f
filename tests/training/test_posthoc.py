"""Averages of a length that was chosen after the training."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training import checkpoint, posthoc, results
from training.job import Job, World, run
from training.stage import Stage
from training.supervision import Stopped


@dataclass(frozen=True)
class WanderConfig:
    kind: str = "wander"


class Wander(Stage):
    """Chases targets that are new in each batch: at a high rate its weights never settle."""

    kind = "wander"

    def __init__(self, config: WanderConfig):
        super().__init__(config)
        self.net = nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, batch):
        return {"loss": (self.net(batch["x"]) - batch["y"]).square().mean(1)}


class Targets:
    def batches(self, start_step: int = 0, prefetch: int = 2):
        while True:
            x, y = np.random.default_rng(start_step).normal(size=(2, 8, 6)).astype(np.float32)
            yield {"x": x, "y": y}
            start_step += 1


def build(job: Job, world: World):
    return Wander(WanderConfig()), Targets(), "d"


def wandering(output: Path, *sigma_rel: float, **training) -> Job:
    made = {
        "images": 8 * 320,
        "batch": 8,
        "learning_rate": 0.05,
        "checkpoint_images": 8 * 50,
        "log_images": 8 * 10,
        "threads": 1,
        "ema_sigma_rel": list(sigma_rel),
        "ema_snapshot_images": 8 * 20,
    }
    return Job(
        kind="wander", fingerprint="f", config={}, training=made | training, output=str(output)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    run(wandering(output, 0.05, 0.1), build=build)
    return output


def snapshots(stage_dir: Path) -> dict[str, bytes]:
    paths = checkpoint.visible(stage_dir / results.AVERAGES)
    return {path.name: (path / checkpoint.TENSORS).read_bytes() for path in paths}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in other) ** 0.5


def test_snapshots_are_at_the_stated_images_and_hold_nothing_else(trained):
    assert [int(name) for name in snapshots(trained)] == list(range(160, 2561, 160))
    state = checkpoint.load(trained / results.AVERAGES / "000000000320", "f")
    names = {f"power/{s}/net.{p}" for s in ("0.05", "0.1") for p in ("weight", "bias")}
    assert state.tensors.keys() == names


def test_a_third_length_is_what_tracking_it_would_have_given(trained, tmp_path):
    for sigma_rel in (0.075, 0.15):
        direct = tmp_path / str(sigma_rel)
        run(wandering(direct, sigma_rel, ema_snapshot_images=0), build=build)
        assert [int(name) for name in snapshots(direct)] == [2560]
        state = checkpoint.load(direct / results.AVERAGES / "000000002560")
        wanted = state.part(f"power/{sigma_rel}")
        found = posthoc.average(trained, sigma_rel)
        assert (found.images_seen, found.snapshots) == (2560, 16)
        last = checkpoint.load(checkpoint.visible(direct / results.CHECKPOINTS)[-1])
        smoothed = distance(last.part("weights"), wanted)
        assert smoothed > 0.1
        assert distance(found.weights, wanted) < 0.01 * smoothed


def test_a_length_and_a_time_of_a_snapshot_give_just_that(trained):
    found = posthoc.average(trained, 0.1, images_seen=1600)
    state = checkpoint.load(trained / results.AVERAGES / "000000001600")
    for name, tensor in state.part("power/0.1").items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-6, atol=1e-7)
    assert found.profile_error < 1e-6


@pytest.mark.parametrize("stops", [1, 7, 23])
def test_interrupted_training_leaves_the_same_snapshots(trained, tmp_path, stops):
    asked = iter([False] * (10 * stops - 1) + [True])  # once per update
    with pytest.raises(Stopped):
        run(wandering(tmp_path, 0.05, 0.1), World(stop=lambda: next(asked)), build=build)
    run(wandering(tmp_path, 0.05, 0.1), build=build)
    assert snapshots(tmp_path) == snapshots(trained)


def test_no_checkpoint_goes_on_behind_a_snapshot_that_failed(trained, tmp_path, monkeypatch):
    save = checkpoint.Saver.save

    def full(self, state, **how):
        if self.directory.name == results.AVERAGES and state.images_seen == 800:
            raise OSError("disk full")
        save(self, state, **how)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", full)
        with pytest.raises(OSError, match="disk full"):
            run(wandering(tmp_path, 0.05, 0.1), build=build)
    reached = [int(p.name) for p in checkpoint.visible(tmp_path / results.CHECKPOINTS)]
    assert reached == [400]
    run(wandering(tmp_path, 0.05, 0.1), build=build)
    assert snapshots(tmp_path) == snapshots(trained)


def test_tracking_changes_nothing_else(trained, tmp_path):
    run(wandering(tmp_path), build=build)
    weights = [(d / results.WEIGHTS).read_bytes() for d in (trained, tmp_path)]
    assert weights[0] == weights[1]
    assert not (tmp_path / results.AVERAGES).exists()


def test_an_export_is_the_stage_with_other_weights(trained, tmp_path):
    told = posthoc.export(trained, tmp_path / "longer", 0.2)
    weights, own = (load_file(d / results.WEIGHTS) for d in (tmp_path / "longer", trained))
    assert weights.keys() == own.keys()
    for name, tensor in posthoc.average(trained, 0.2).weights.items():
        assert weights[name].equal(tensor)
        assert not weights[name].equal(own[name])
    assert weights["frozen"].equal(own["frozen"]) and weights["scale"].equal(own["scale"])
    config = [(d / results.CONFIG).read_text() for d in (trained, tmp_path / "longer")]
    assert config[0] == config[1]
    wanted = {"images_seen": 2560, "of": "f", "sigma_rel": 0.2, "snapshots": 16}
    assert wanted.items() <= told.items()
    assert posthoc.storage.read_json(str(tmp_path / "longer" / posthoc.AVERAGED)) == told


def test_what_cannot_be_added_up_says_why(trained, tmp_path):
    with pytest.raises(ValueError, match=r"no snapshot of averages at 200 images .* are: 160, 320"):
        posthoc.average(trained, 0.1, images_seen=200)
    with pytest.raises(ValueError, match="none at all.*ema_sigma_rel"):
        posthoc.average(tmp_path, 0.1)
    with pytest.raises(ValueError, match="no finished stage"):
        posthoc.export(tmp_path, tmp_path / "out", 0.1)
    with pytest.raises(ValueError, match="sigma_rel must lie between"):
        posthoc.average(trained, 0.3)
    short = wandering(tmp_path / "short", 0.05, 0.1, images=8 * 20)
    run(replace(short, fingerprint="g"), build=build)
    path = checkpoint.visible(tmp_path / "short" / results.AVERAGES)[0]
    os.truncate(path / checkpoint.TENSORS, 100)
    with pytest.raises(checkpoint.Damaged, match="100 bytes"):
        posthoc.average(tmp_path / "short", 0.1)
