"""The noise-aware classifier: heads that look for themselves, and learn."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from training.networks import Classifier, ClassifierConfig, HeadConfig

HEADS = (HeadConfig("colour", 8), HeadConfig("shape", 6))


def tiny(**changes) -> ClassifierConfig:
    fields = {"heads": HEADS, "channels": 16, "blocks": 1, "head_width": 8}
    return ClassifierConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "shape"), [({}, (8, 8)), ({"patch": 2, "in_channels": 3}, (6, 10)), ({}, (5, 3))]
)
def test_logits_by_head_are_even_at_first(changes, shape):
    config = tiny(**changes)
    logits = Classifier(config)(torch.randn(2, config.in_channels, *shape), torch.rand(2))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        "colour": (2, 8),
        "shape": (2, 6),
    }
    assert all((value == 0).all() for value in logits.values())


def test_heads_look_for_themselves(awake):
    """Each sees picture and noise level, gives the picture a gradient, and pools in its own way."""
    network = awake(tiny())
    x, label = torch.randn(2, 4, 8, 8, requires_grad=True), torch.rand(2)
    logits = network(x, label)
    later = network(x, label + 0.5)
    pooled = []
    network.pool.register_forward_hook(lambda m, _, out: pooled.append(out))
    network(x, label)
    assert (pooled[0][:, 0] - pooled[0][:, 1]).abs().amax(1).min() > 1e-3
    for name in logits:
        (gradient,) = torch.autograd.grad(logits[name].square().sum(), x, retain_graph=True)
        assert gradient.abs().amax((1, 2, 3)).min() > 0
        assert (later[name] - logits[name]).abs().amax(1).min() > 1e-5


def test_it_learns_which_side_is_bright():
    network = Classifier(tiny(heads=(HeadConfig("side", 2),), in_channels=1, channels=8))
    x = torch.zeros(2, 1, 4, 4)
    x[0, :, :, :2] = x[1, :, :, 2:] = 1
    label, truth = torch.zeros(2), torch.tensor([0, 1])
    weights = list(network.parameters())
    loss = torch.tensor(torch.inf)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(network(x, label)["side"], truth)
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight -= 0.3 * slope
    assert loss < 0.1


def test_config_round_trip_and_refusals():
    config = tiny()
    assert ClassifierConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match="different names"):
        tiny(heads=(HeadConfig("a", 2), HeadConfig("a", 3)))
    with pytest.raises(ValueError, match="a head at least"):
        Classifier(tiny(heads=()))
    with pytest.raises(ValueError, match="at least 2 classes"):
        HeadConfig("colour", 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny(channels=9)
