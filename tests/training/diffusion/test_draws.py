"""Draws: functions of (seed, purpose, position), and as random as random numbers need be."""

import math

import pytest
import torch
from torch import Tensor

from training.diffusion import normal, uniform
from training.diffusion.draws import stratified, stream

ROWS = torch.arange(20_000)


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("shape", [(), (5,), (4, 8, 8), (3, 7, 5)])
def test_rows_do_not_depend_on_who_draws_them(draw, shape):
    """Bit for bit: one worker, several, other batch sizes, another order."""
    rows = torch.arange(1000, 1192)
    whole = draw(7, "noise", rows, shape)
    assert whole.shape == (192, *shape)
    assert whole.dtype == torch.float32
    for size in (1, 13, 64):
        assert torch.equal(
            whole, torch.cat([draw(7, "noise", part, shape) for part in rows.split(size)])
        )
    assert torch.equal(whole.flip(0), draw(7, "noise", rows.flip(0), shape))


def test_seed_purpose_and_position_all_matter():
    base = normal(0, "noise", ROWS[:100], (50,))
    for other in (
        normal(1, "noise", ROWS[:100], (50,)),
        normal(0, "time", ROWS[:100], (50,)),
        normal(0, "noise", ROWS[1:101], (50,)),
        normal(0, "noise", ROWS[:100] + (1 << 40), (50,)),
    ):
        assert not (base == other).any()
        assert abs(correlation(base, other)) < 4 / math.sqrt(base.numel())


def test_known_values_hold_for_ever():
    """A change here changes every trained model: SplitMix64, computed with Python's integers."""
    import hashlib

    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = int.from_bytes(hashlib.blake2b(b"3/noise", digest_size=8).digest(), "little")
    got = uniform(3, "noise", torch.tensor([0, 5, 1 << 50]), (4,))
    for row, position in enumerate((0, 5, 1 << 50)):
        hashed = mix((position * golden + key) & mask)
        for column in range(4):
            word = mix((hashed + mix((column + 1) * golden & mask)) & mask)
            assert got[row, column].item() == ((word >> 41) + 0.5) / (1 << 23)


def test_uniform_draws_are_uniform_and_open():
    u = uniform(0, "u", ROWS, (10,)).double()
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    expected = u.numel() / 100
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 99) < 5 * math.sqrt(2 * 99)
    for bit in range(1, 20):  # every bit is fair
        odd = (u * 2**bit).floor() % 2
        assert abs(odd.mean() - 0.5) < 5 * 0.5 / math.sqrt(u.numel())


def test_normal_draws_are_normal():
    z = normal(0, "z", ROWS, (9,)).double()
    n = z.numel()
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    ordered = torch.special.ndtr(z.flatten()).sort().values
    distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 2 / math.sqrt(n)  # Kolmogorov-Smirnov: p < .001
    assert 4 < z.abs().max() < 7.6


def test_neighbours_are_uncorrelated():
    """Along columns, along positions, across the cosine and sine halves, and in squares."""
    z = normal(0, "z", ROWS, (16,)).double()
    bound = 5 / math.sqrt(z.shape[0] * 14)
    for change in (lambda x: x, torch.square):
        y = change(z)
        assert abs(correlation(y[:, 1:], y[:, :-1])) < bound
        assert abs(correlation(y[:, 8:], y[:, :8])) < bound * 1.5
        for lag in (1, 2, 64, 4096):
            assert abs(correlation(y[lag:], y[:-lag])) < bound * 1.2
    covariance = torch.cov(z.T)
    assert (covariance - torch.eye(16)).abs().max() < 6 / math.sqrt(z.shape[0])


def test_words_do_not_collide():
    u = normal(0, "z", ROWS, (20,))
    assert u.unique().numel() > 0.98 * u.numel()  # float32 itself repeats some


def test_stratified_draws_fill_every_batch_evenly():
    rows = torch.arange(5000, 5000 + 256)
    u = stratified(0, "time", rows).sort().values
    distance = (u - (torch.arange(256) + 0.5) / 256).abs().max()
    assert distance < 2 / 256 * math.log(256)
    independent = uniform(0, "time", rows).sort().values
    assert (independent - (torch.arange(256) + 0.5) / 256).abs().max() > distance
    over_seeds = torch.cat([stratified(seed, "time", rows[:1]) for seed in range(2000)])
    assert abs(over_seeds.mean() - 0.5) < 5 / math.sqrt(12 * 2000)
    halves = [stratified(0, "time", part) for part in rows.split(100)]
    assert torch.equal(torch.cat(halves), stratified(0, "time", rows))


def test_a_stream_repeats_and_its_calls_differ():
    x = torch.zeros(3, 5, dtype=torch.float64)
    first, second = stream(0, "step", ROWS[:3]), stream(0, "step", ROWS[1:3])
    a, b = first(x), first(x)
    assert a.dtype == x.dtype
    assert not (a == b).any()
    assert torch.equal(second(x[1:]), a[1:])
    assert torch.equal(second(x[1:]), b[1:])


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
