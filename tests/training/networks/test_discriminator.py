"""The discriminator of patches: published squares, one logit for each, rows apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.networks import Discriminator, DiscriminatorConfig
from training.networks.layers import GroupNorm


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_published_square(layers, patch):
    """Isola et al. 2017, section 4.4: 16, 70; without the norms, which see the whole picture."""
    config = DiscriminatorConfig(channels=8, layers=layers)
    network = Discriminator(config)
    for name, module in list(network.layers.named_children()):
        if isinstance(module, GroupNorm):
            setattr(network.layers, name, nn.Identity())
    x = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = network(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1))
    for axis in (0, 1):
        inside = seen.sum(axis).nonzero().flatten()
        assert inside[-1] - inside[0] + 1 == patch == config.patch


def test_the_published_widths():
    """C64-C128-C256-C512 and one convolution to a logit."""
    network = Discriminator(DiscriminatorConfig())
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.stride[0]) for c in convs] == [
        (64, 2), (128, 2), (256, 2), (512, 1), (1, 1)
    ]  # fmt: skip
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1, 2, 2)


def test_rows_do_not_see_each_other():
    network = Discriminator(DiscriminatorConfig(channels=8, layers=2))
    x = torch.randn(3, 3, 16, 20)
    torch.testing.assert_close(network(x[1:2]), network(x)[1:2])


def test_the_least_picture_gets_one_logit_and_a_smaller_one_a_reason():
    config = DiscriminatorConfig(channels=8, layers=2)
    assert Discriminator(config)(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"12 pixels or more at 2 layers, got \(20, 11\)"):
        Discriminator(config)(torch.zeros(1, 3, 20, 11))


@pytest.mark.parametrize("changes", [{"channels": 12}, {"layers": 0}, {"channels": 0}])
def test_configs_are_refused_with_a_reason(changes):
    with pytest.raises(ValueError, match="multiple of 8, layers and in_channels at least 1"):
        DiscriminatorConfig(**changes)
