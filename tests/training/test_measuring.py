"""What is measured on samples that were held out."""

from __future__ import annotations

import pytest
import torch

from training import measuring, stages
from training.stage import to_tensors


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
    loss = measuring.heldout_loss(stage, unseen, 16, 16)
    torch.rand(3)
    assert measuring.heldout_loss(stage, unseen, 16, 16) == loss
    assert stage.training
    with torch.no_grad():
        losses = stage.eval().heldout_loss(to_tensors(unseen.rows(range(16))))
        assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
        for parameter in stage.parameters():
            parameter.mul_(1.1)
    assert measuring.heldout_loss(stage, unseen, 16, 16) != loss
    if not stage.compares_rows:
        apart = measuring.heldout_loss(stage, unseen, 16, 5)
        assert apart == pytest.approx(measuring.heldout_loss(stage, unseen, 16, 16), rel=1e-4)
