"""The autoencoder: shapes, limits, size, and that it can learn."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from training.networks import Autoencoder, AutoencoderConfig


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 4),
        ({"patch": 1, "channel_mult": (1, 2, 2), "latent_channels": 3}, 4),
        ({"patch": 4, "channel_mult": (1, 2), "attention": True, "head_width": 8}, 8),
        ({"patch": 1, "channel_mult": (1,), "in_channels": 1}, 1),
    ],
)
def test_shapes_and_factor(changes, factor):
    config = AutoencoderConfig(**{"channels": 16, **changes})
    network = Autoencoder(config)
    x = torch.randn(2, config.in_channels, 3 * factor, 2 * factor)
    moments = network.encode(x)
    assert config.factor == factor
    assert moments.shape == (2, 2 * config.latent_channels, 3, 2)
    assert network.decode(moments.chunk(2, dim=1)[0]).shape == x.shape
    assert AutoencoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_dense_latent_is_one_vector_that_sees_the_whole_picture():
    torch.manual_seed(0)
    sizes = {"patch": 2, "channels": 8, "channel_mult": (1, 2), "latent_channels": 6, "dense": 16}
    config = AutoencoderConfig(**sizes)
    network = Autoencoder(config)
    x = torch.randn(2, 3, 16, 16)
    moments = network.encode(x)
    assert config.factor == 16
    assert moments.shape == (2, 12, 1, 1)
    assert network.decode(moments[:, :6]).shape == x.shape
    for corner in ((0, 0), (0, 15), (15, 0), (15, 15)):
        other = x.clone()
        other[0, :, corner[0], corner[1]] += 1
        changed = (network.encode(other) != moments).flatten(1)
        assert changed[0].all()
        assert not changed[1].any()
    with pytest.raises(ValueError, match="made for pictures of 16 x 16 pixels, got 32 x 16"):
        network.encode(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match=r"dense must be a multiple of .* = 4 pixels, got 18"):
        AutoencoderConfig(**{**sizes, "dense": 18})
    with pytest.raises(ValueError, match="dense: a codebook's latents are maps"):
        AutoencoderConfig(**sizes, codebook={"codes": 4})


def test_the_log_variance_is_clamped():
    network = Autoencoder(AutoencoderConfig(channels=8))
    last = network.encoder[-1]
    assert isinstance(last, torch.nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        last.bias.copy_(torch.tensor([99.0] * 5 + [-99.0] * 3))
    mean, logvar = network.encode(torch.zeros(1, 3, 8, 8)).chunk(2, dim=1)
    assert mean.min() > 90
    assert (logvar.amin(), logvar.amax()) == (-30, 20)


def test_the_default_has_its_stated_size():
    with torch.device("meta"):
        network = Autoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in network.parameters()) == 853_652


def test_it_learns_one_picture():
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderConfig(channels=16, channel_mult=(1, 1)))
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    weights = list(network.parameters())
    loss = torch.tensor(torch.inf)
    for _ in range(60):  # plain descent: importing torch.optim takes longer than all of this
        loss = (network(x) - x).square().mean()
        with torch.no_grad():
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.1 * slope
    assert loss < 0.1 * x.var()


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        Autoencoder(AutoencoderConfig(channels=8)).encode(torch.zeros(1, 3, 10, 8))
