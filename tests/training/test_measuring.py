"""What is measured on samples that were held out."""

from __future__ import annotations

import pytest
import torch

from training import measuring, stages, validation
from training.stage import to_tensors


def heldout_loss(stage, unseen, count: int, batch: int) -> float:
    return validation.heldout_losses(stage, unseen, count, batch)["heldout_loss"]


@pytest.mark.parametrize(
    ("kind", "encodings"),
    [
        ("autoencoder", ["pixels"]),
        ("classifier", ["pixels"]),
        ("clip", ["pixels"]),
        ("t5", []),
        ("base", ["autoencoder", "clip", "t5"]),
    ],
)
def test_the_heldout_loss_is_a_function_of_the_weights(line, kind, encodings):
    stage = stages.load(line.stages[kind]).train()
    unseen = measuring.heldout(line.loader(*encodings))
    assert unseen.samples == 16
    loss = heldout_loss(stage, unseen, 16, 16)
    torch.rand(3)
    assert heldout_loss(stage, unseen, 16, 16) == loss
    assert stage.training
    with torch.no_grad():
        losses = stage.eval().heldout_loss(to_tensors(unseen.rows(range(16))))
        assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
        for parameter in stage.parameters():
            parameter.mul_(1.1)
    assert heldout_loss(stage, unseen, 16, 16) != loss
    if not stage.compares_rows:
        apart = heldout_loss(stage, unseen, 16, 5)
        assert apart == pytest.approx(heldout_loss(stage, unseen, 16, 16), rel=1e-4)


@pytest.mark.parametrize("kind", ["base", "classifier", "noisy_clip"])
def test_losses_by_noise_level_are_means_over_their_rows(line, kind):
    stage = stages.load(line.stages[kind])
    encodings = {"base": ["autoencoder", "clip", "t5"]}.get(kind, ["pixels"])
    unseen = measuring.heldout(line.loader(*encodings))
    told = validation.heldout_losses(stage, unseen, 16, 16)
    batch = to_tensors(unseen.rows(range(16)))
    diffusion, position = stage.config.diffusion, batch["position"]
    times = diffusion.draw_times(0, position, "heldout/time" if kind == "base" else "time")
    edges = diffusion.build_times()(torch.tensor([0.25, 0.5, 0.75]))
    names = diffusion.build_times()(torch.tensor([0.125, 0.375, 0.625, 0.875])).tolist()
    with torch.no_grad():
        losses = stage.heldout_loss(batch)
    wanted = {
        f"{validation.BY_TIME}{name:.3g}": losses[band].mean().item()
        for place, name in enumerate(names)
        if (band := torch.bucketize(times, edges) == place).any()
    }
    assert len(wanted) > 2
    assert told == pytest.approx(wanted | {"heldout_loss": losses.mean().item()}, rel=1e-5)


@pytest.mark.parametrize("kind", ["autoencoder", "base", "classifier"])
def test_flops_are_those_that_a_plan_counts(line, kind):
    from training import planning
    from training.config import TrainingConfig

    stage = stages.load(line.stages[kind]).train().requires_grad_(True)
    encodings = {"base": ["autoencoder", "clip", "t5"]}.get(kind, ["pixels"])
    loader = line.loader(*encodings)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    found = measuring.flops_per_image(stage, loader)
    assert all(torch.equal(before[name], it) for name, it in stage.state_dict().items())
    assert stage.training and all(p.grad is None for p in stage.parameters())
    batch = to_tensors(loader.rows(range(2)))
    update = planning.carry_out(stage, TrainingConfig(batch=2), batch)
    assert found == pytest.approx(update.flops_per_image, rel=0.05)
