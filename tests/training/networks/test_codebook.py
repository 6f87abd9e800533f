"""The codebook: the nearest vector, a gradient that passes it by, and a loss for each side."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from training.networks import (
    Autoencoder,
    AutoencoderConfig,
    Codebook,
    CodebookConfig,
    perplexity,
)


@pytest.fixture
def codebook() -> Codebook:
    made = Codebook(CodebookConfig(codes=37, commitment=0.25), 3)
    torch.nn.init.normal_(made.vectors)
    return made


def test_each_place_takes_the_nearest_vector(codebook):
    z = torch.randn(4, 3, 5, 6)
    apart = z.double().movedim(1, -1)[..., None, :] - codebook.vectors.double()
    wanted = apart.square().sum(-1).argmin(-1)
    found = codebook(z)
    assert torch.equal(found.codes, wanted)
    assert torch.equal(found.z, codebook.vectors[wanted].movedim(-1, 1))
    assert len(wanted.unique()) > 20


def test_it_is_nearest_in_bfloat16_autocast_too(codebook):
    z = torch.randn(2, 3, 8, 8)
    exact = codebook.nearest(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(z), exact)
        assert codebook(z).z.dtype == torch.float32


def test_vectors_stay_what_they_are(codebook):
    z = codebook.vectors.detach().T.reshape(1, 3, 37, 1)
    found = codebook(z)
    assert torch.equal(found.z, z)
    assert found.codes.flatten().tolist() == list(range(37))
    assert not found.distance.any()


def test_the_gradient_passes_straight_through(codebook):
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    slope = torch.randn(2, 3, 4, 4)
    codebook(z).z.backward(slope)
    assert z.grad is not None
    assert torch.equal(z.grad, slope)
    assert codebook.vectors.grad is None


def test_its_loss_pulls_each_side_by_its_own_weight():
    """d/de (z - e)^2 = 2 (e - z), d/dz = 2 commitment (z - e), and no other vector."""
    codebook = Codebook(CodebookConfig(codes=2, commitment=0.25), 1)
    codebook.vectors.data = torch.tensor([[1.0], [9.0]])
    z = torch.tensor(2.0).view(1, 1, 1, 1).requires_grad_()
    distance = codebook(z).distance
    assert distance.item() == pytest.approx(1.25)
    distance.sum().backward()
    assert z.grad is not None and codebook.vectors.grad is not None
    assert z.grad.item() == pytest.approx(2 * 0.25 * 1)
    assert codebook.vectors.grad.flatten().tolist() == [-2.0, 0.0]


def test_perplexity_is_the_number_of_vectors_in_use():
    assert perplexity(torch.full((37,), 5.0)).item() == pytest.approx(37, rel=1e-5)
    assert perplexity(torch.tensor([3.0, 3.0, 0.0, 0.0])).item() == pytest.approx(2)
    assert perplexity(torch.tensor([0.0, 8.0])).item() == pytest.approx(1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(torch.tensor([3.0, 1.0])).item() == pytest.approx(math.exp(entropy))


def test_every_use_is_counted(codebook):
    codes = torch.tensor([[0, 5, 5], [36, 5, 0]])
    counts = codebook.counts(codes)
    assert counts.nonzero().flatten().tolist() == [0, 5, 36]
    assert counts[[0, 5, 36]].tolist() == [2, 3, 1]


def test_it_begins_with_places_and_no_two_vectors_alike(codebook):
    places = 5 + 0.1 * torch.randn(8, 3)
    codebook.start_at(places, 1)
    apart = torch.cdist(codebook.vectors, places).amin(1)
    assert apart.max() < 0.02
    assert torch.pdist(codebook.vectors.detach()).min() > 0
    assert (torch.cdist(places, codebook.vectors).amin(1) < 0.02).all()  # all of them are there
    first = codebook.vectors.detach().clone()
    codebook.start_at(places, 1)
    assert torch.equal(codebook.vectors, first)


def test_an_autoencoder_quantises_on_decoding():
    config = AutoencoderConfig(channels=8, latent_channels=3, codebook=CodebookConfig(codes=16))
    network = Autoencoder(config)
    assert network.codebook is not None
    torch.nn.init.normal_(network.codebook.vectors)
    z = network.encode(torch.randn(2, 3, 16, 16))
    assert z.shape == (2, 3, 4, 4)
    assert network.mean(z) is z
    snapped = network.codebook(z).z
    assert torch.equal(network.decode(z), network.draw(snapped))
    assert torch.equal(network.decode(snapped), network.decode(z))
    assert not torch.equal(network.draw(z), network.decode(z))


def test_its_config_survives_json():
    config = AutoencoderConfig(codebook=CodebookConfig(codes=16, commitment=0.5))
    again = AutoencoderConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("changes", [{"codes": 1}, {"commitment": -0.1}, {"revive_images": -1}])
def test_configs_are_refused_with_a_reason(changes):
    with pytest.raises(ValueError, match="codes must be at least 2, commitment and revive_images"):
        CodebookConfig(**changes)
