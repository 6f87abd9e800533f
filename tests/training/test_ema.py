"""The averages against their closed forms, and against one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from training.ema import Ema, PowerAverages, gamma, mixture


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


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_gives_a_profile_of_that_relative_deviation(sigma_rel):
    power = gamma(sigma_rel)
    u = (np.arange(200_000) + 0.5) / 200_000
    profile = (power + 1) * u**power / len(u)
    assert profile.sum() == pytest.approx(1, abs=1e-6)
    mean = (profile * u).sum()
    assert (profile * (u - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


def test_gamma_has_the_papers_values():
    """EDM2, section 3.1: lengths of 5 % and 10 % are gamma 16.97 and 6.94."""
    assert gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, float("nan")])
def test_lengths_that_no_profile_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel must lie between 0 and 0.2887"):
        gamma(sigma_rel)


def powers_of(module: nn.Linear, weights, sigma_rel, batch: int = 1):
    """Averages after each of the weights, one more batch of images seen each time."""
    averages = PowerAverages(module, sigma_rel)
    for step, weight in enumerate(weights):
        nn.init.constant_(module.weight, weight)
        averages.update(batch * (step + 1))
        yield {name: tensor.item() for name, tensor in averages.tensors().items()}


def test_weights_count_a_power_of_when_they_were():
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    module = linear(1e6)  # of which nothing is left
    *_, last = powers_of(module, weights.tolist(), (0.05, 0.2), batch=64)
    ends = torch.arange(51).double() / 50
    for sigma_rel in (0.05, 0.2):
        shares = (ends ** (gamma(sigma_rel) + 1)).diff()
        assert shares.sum().item() == pytest.approx(1)
        expected = (shares * weights).sum().item()
        assert last[f"{sigma_rel:g}/weight"] == pytest.approx(expected, rel=1e-5)


def test_power_averages_go_on_as_if_never_interrupted():
    weights = torch.randn(20, generator=torch.Generator().manual_seed(1)).tolist()
    module = linear(0.0)
    *_, unbroken = powers_of(module, weights, (0.05, 0.1))
    before, after = PowerAverages(module, (0.05, 0.1)), PowerAverages(module, (0.05, 0.1))
    for step, weight in enumerate(weights):
        if step == 11:
            after.load({n: t.clone() for n, t in before.tensors().items()}, images_seen=11)
        nn.init.constant_(module.weight, weight)
        (before if step < 11 else after).update(step + 1)
    assert {name: t.item() for name, t in after.tensors().items()} == unbroken
    with pytest.raises(ValueError, match="averages is of another network: 0.1/weight"):
        PowerAverages(module, (0.05,)).load(before.tensors(), images_seen=11)


def test_snapshots_of_two_lengths_add_up_to_a_third():
    """A random walk far from 0, lengths 0.05 and 0.1: within 1e-3 of what averaging smoothes away
    with snapshots at 16 times, for lengths between theirs and near; within 5e-3 with 8."""
    steps, each = 4000, 250
    walks = 10 + np.cumsum(np.random.default_rng(0).normal(size=(steps, 64)), 0) / steps**0.5

    def track(sigma_rel: float) -> dict[int, np.ndarray]:
        average, kept = np.zeros(64), {}
        for k, weights in enumerate(walks, 1):
            average += (1 - (1 - 1 / k) ** (gamma(sigma_rel) + 1)) * (weights - average)
            if k % each == 0:
                kept[k] = average.copy()
        return kept

    snapshots = {(k, s): kept for s in (0.05, 0.1) for k, kept in track(s).items()}
    assert len(snapshots) == 32
    for at, tolerance in ((steps, 1e-3), (steps // 2, 5e-3)):
        usable = {key: kept for key, kept in snapshots.items() if key[0] <= at}
        for sigma_rel in (0.06, 0.075, 0.15):
            factors, off = mixture(list(usable), at, sigma_rel)
            found = sum(f * kept for f, kept in zip(factors, usable.values(), strict=True))
            direct = track(sigma_rel)[at]
            smoothed = np.linalg.norm(direct - walks[at - 1])
            assert np.linalg.norm(found - direct) <= tolerance * smoothed, sigma_rel
            assert 0 < off < 10 * tolerance


def test_what_was_snapshotted_is_found_again_alone():
    snapshots = [(images, s) for images in (100, 200, 300) for s in (0.05, 0.1)]
    factors, off = mixture(snapshots, 300, 0.1)
    np.testing.assert_allclose(factors, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert off < 1e-6


def test_the_error_is_that_of_the_profiles_and_factors_add_up_to_one():
    snapshots = [(images, s) for images in (500, 1000) for s in (0.05, 0.1)]
    factors, off = mixture(snapshots, 1000, 0.2)
    u = np.arange(0.5, 1000)

    def profile(images: float, sigma_rel: float) -> np.ndarray:
        power = gamma(sigma_rel)
        return np.where(u < images, (power + 1) * (u / images) ** power / images, 0)

    wanted = profile(1000, 0.2)
    together = sum(f * profile(*one) for f, one in zip(factors, snapshots, strict=True))
    assert off == pytest.approx(
        np.linalg.norm(together - wanted) / np.linalg.norm(wanted), rel=0.01
    )
    assert factors.sum() == pytest.approx(1, abs=1e-12)
