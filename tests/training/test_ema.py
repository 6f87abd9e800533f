"""The average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.ema import Ema


def linear(value: float) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def average(ema: Ema) -> float:
    return ema.tensors()["weight"].item()


def test_half_of_the_past_is_left_after_a_halflife():
    module = linear(1.0)
    ema = Ema(module, halflife_images=1000, ramp=0)
    nn.init.constant_(module.weight, 0.0)
    for images_seen in range(100, 2001, 100):
        ema.update(images_seen)
        assert average(ema) == pytest.approx(0.5 ** (images_seen / 1000), rel=1e-5)


def test_changing_weights_are_averaged_by_the_closed_form():
    module, decay = linear(3.0), 0.5 ** (64 / 500)
    ema = Ema(module, halflife_images=500, ramp=0)
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    for step, weight in enumerate(weights.tolist()):
        nn.init.constant_(module.weight, weight)
        ema.update(64 * (step + 1))
    powers = decay ** torch.arange(49, -1, -1).double()
    expected = decay**50 * 3.0 + (1 - decay) * (powers * weights).sum()
    assert average(ema) == pytest.approx(expected.item(), rel=1e-5)


def test_the_clock_is_images_so_the_batch_does_not_matter():
    def after(batch: int) -> float:
        module = linear(1.0)
        ema = Ema(module, halflife_images=1000, ramp=0)
        nn.init.constant_(module.weight, 0.0)
        for images_seen in range(batch, 961, batch):
            ema.update(images_seen)
        return average(ema)

    assert after(32) == pytest.approx(after(96), rel=1e-5)


def test_the_ramp_forgets_the_random_beginning():
    module = linear(1.0)
    ema = Ema(module, halflife_images=1e9, ramp=0.05)
    nn.init.constant_(module.weight, 0.0)
    expected = 1.0
    for images_seen in range(10, 1001, 10):
        ema.update(images_seen)
        expected *= 0.5 ** (10 / (0.05 * images_seen))
        assert average(ema) == pytest.approx(expected, rel=1e-4)
    assert expected < 1e-20


def test_a_slow_average_moves_at_all():
    """In bfloat16 an average at 0.9999 per step never does."""
    module = linear(1.0)
    ema = Ema(module, halflife_images=64 * 6931, ramp=0)
    nn.init.constant_(module.weight, 0.999)
    ema.update(64)
    assert 0.9999 < average(ema) < 1.0


def test_a_halflife_of_zero_follows_exactly():
    module = linear(1.0)
    ema = Ema(module, halflife_images=0)
    nn.init.constant_(module.weight, 0.1)
    ema.update(1)
    assert ema.tensors()["weight"].equal(module.weight)


def test_applied_gives_the_weights_back_bit_for_bit():
    torch.manual_seed(0)
    module = nn.Linear(7, 5)
    ema = Ema(module, halflife_images=100, ramp=0)
    with torch.no_grad():
        module.weight.add_(torch.randn(5, 7))
    ema.update(10)
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    averages = {n: t.clone() for n, t in ema.tensors().items()}
    with pytest.raises(KeyError), ema.applied():  # noqa: PT012
        assert all(p.equal(averages[n]) for n, p in module.named_parameters())
        raise KeyError
    assert all(p.equal(weights[n]) for n, p in module.named_parameters())
    assert all(t.equal(averages[n]) for n, t in ema.tensors().items())
    assert not module.weight.equal(averages["weight"])


def test_frozen_parameters_have_no_average():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert list(Ema(module, 10).tensors()) == ["weight"]


def test_a_loaded_average_goes_on_as_if_never_interrupted():
    module = linear(1.0)
    unbroken, before = Ema(module, 1000), Ema(module, 1000)
    nn.init.constant_(module.weight, 0.5)
    unbroken.update(64)
    before.update(64)
    after = Ema(linear(9.0), 1000)
    after.load({n: t.clone() for n, t in before.tensors().items()}, images_seen=64)
    after.copy_to(module)
    assert module.weight.item() == average(unbroken)
    nn.init.constant_(module.weight, 0.5)
    again = Ema(module, 1000)
    again.load(after.tensors(), images_seen=64)
    unbroken.update(128)
    again.update(128)
    assert average(again) == average(unbroken)
