"""Noise levels: inverses, rates, and the chains and schedules they stand for."""

import math

import pytest
import torch

from training.diffusion import Path, cosine, edm, flow, shift, subvp, table, ve, vp
from training.diffusion.path import named_betas, zero_terminal_snr

LINEAR = table(named_betas("linear"), "linear")
ZERO_SNR = table(zero_terminal_snr(named_betas("scaled_linear")), "zero_snr")
PATHS = [vp(), subvp(), ve(), edm(), cosine(), flow(), shift(flow(), 3.0), LINEAR, ZERO_SNR]
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def times(count: int = 301, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Strictly between data and noise, and between the states of a table of 1000."""
    return (torch.arange(count, dtype=dtype) + 0.37) / count


@by_name
def test_inverse_finds_the_time_of_a_level(path: Path):
    torch.testing.assert_close(path.inv(path.ratio(times())), times(), rtol=0, atol=1e-13)
    single = times(dtype=torch.float32)
    torch.testing.assert_close(path.inv(path.ratio(single)), single, rtol=0, atol=1e-6)


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_begin_at_the_data_exactly(path: Path, dtype: torch.dtype):
    a, s = path(torch.zeros((), dtype=dtype))
    assert (a.item(), s.item()) == (1, 0)
    assert path.inv(torch.zeros((), dtype=dtype)) == 0
    assert a.dtype == s.dtype == dtype


@by_name
def test_only_some_paths_end_in_pure_noise(path: Path):
    pure = path.name in {"cosine", "flow", "flow*3", "zero_snr"}
    assert path.ends_in_pure_noise == pure
    for dtype in (torch.float32, torch.float64):
        a, s = path(torch.ones((), dtype=dtype))
        assert (a == 0) == pure
        if pure:
            assert s == 1
            assert path.inv(torch.full((), math.inf, dtype=dtype)) == 1


@by_name
def test_levels_solve_their_differential_equation(path: Path):
    """x = a x0 + s eps is the solution of dx = f x dt + g dw: a' = f a and (s^2)' = 2 f s^2 +
    g^2."""
    t = times().requires_grad_()
    a, s = path(t)
    f, g2 = path.rates(t.detach())
    if a.requires_grad:
        (a_slope,) = torch.autograd.grad(a.sum(), t, retain_graph=True)
        torch.testing.assert_close(a_slope, f * a, rtol=1e-9, atol=1e-9)
    else:
        assert (f == 0).all()
    (variance_slope,) = torch.autograd.grad((s**2).sum(), t)
    torch.testing.assert_close(variance_slope, 2 * f * s**2 + g2, rtol=1e-9, atol=1e-9)
    assert (g2 > 0).all()


def test_rates_of_score_sde_are_its_own():
    t = times()
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(vp().rates(t), (-beta / 2, beta))
    a = vp()(t)[0]
    torch.testing.assert_close(subvp().rates(t), (-beta / 2, beta * (1 - a**4)))
    growth = 2 * math.log(5000)
    torch.testing.assert_close(ve().rates(t)[1], 1e-4 * growth * torch.exp(growth * t))


def test_the_chain_of_a_table_has_its_marginals():
    """1000 steps of N(sqrt(1 - beta) x, beta) on N(m, v) give mean a m and variance a^2 v + s^2."""
    betas, mean, variance = named_betas("linear"), 0.7, 0.3
    for state, beta in enumerate(betas.tolist(), start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if state in (1, 10, 500, 1000):
            a, s = LINEAR(torch.tensor(state / 1000, dtype=torch.float64))
            assert a.item() * 0.7 == pytest.approx(mean, rel=1e-13)
            assert (a**2 * 0.3 + s**2).item() == pytest.approx(variance, rel=1e-13)


@by_name
def test_renoising_reaches_the_later_level(path: Path):
    """q(x_u | x_t) q(x_t) = q(x_u): the variances add up, where adding s_u - s_t would not."""
    t, u = (torch.tensor(time, dtype=torch.float64) for time in (0.25, 0.6))
    x, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    added, kept = path.renoise(zero, x, t, u), path.renoise(x, zero, t, u)
    (a, s), (a_u, s_u) = path(t), path(u)
    assert (kept * a).item() == pytest.approx(a_u.item())
    assert ((kept * s) ** 2 + added**2).item() == pytest.approx((s_u**2).item())


def test_renoising_known_value():
    """In the VP gauge from a = .8 to a = .5: sqrt(.75 - .36 (.5/.8)^2) = .781."""
    path, a = cosine(), torch.tensor([0.8, 0.5], dtype=torch.float64)
    t, u = path.inv((1 - a**2).sqrt() / a).unbind()
    x = torch.ones(1, 1, dtype=torch.float64)
    assert path.renoise(0 * x, x, t, u).item() == pytest.approx(0.7806, abs=1e-4)


def test_posterior_widths_are_the_beta_and_beta_tilde_of_ddpm():
    betas = named_betas("cosine", 50)
    path, kept = table(betas), torch.cumprod(1 - betas, 0)
    t = torch.arange(2, 51, dtype=torch.float64) / 50
    small, large = path.posterior(t, t - 1 / 50)
    torch.testing.assert_close(large**2, betas[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        small**2, betas[1:] * (1 - kept[:-1]) / (1 - kept[1:]), rtol=1e-9, atol=1e-12
    )


def test_beta_tables_are_the_published_ones():
    linear = named_betas("linear")
    assert (linear[0].item(), linear[-1].item()) == pytest.approx((1e-4, 0.02))
    scaled = named_betas("scaled_linear")
    assert (scaled[0].item(), scaled[-1].item()) == pytest.approx((0.00085, 0.012))
    assert torch.cumprod(1 - scaled, 0)[-1].item() == pytest.approx(0.0047, abs=5e-5)
    assert named_betas("cosine")[-1] == 0.999
    assert named_betas("linear", 100)[-1].item() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="scaled_linear"):
        named_betas("quadratic")


def test_zero_terminal_snr_moves_the_end_and_keeps_the_start():
    betas = named_betas("scaled_linear")
    moved = zero_terminal_snr(betas)
    assert moved[0].item() == pytest.approx(betas[0].item(), rel=1e-9)
    assert moved[-1] == 1
    assert ((moved > 0) & (moved <= 1)).all()


def test_shift_multiplies_the_noise_of_flow_exactly():
    t = times()
    torch.testing.assert_close(shift(flow(), 3.0).ratio(t), 3 * flow().ratio(t), rtol=1e-11, atol=0)
    with pytest.raises(ValueError, match="above 0"):
        shift(flow(), 0.0)


def test_levels_are_accurate_in_float32_near_the_data():
    t = torch.tensor([1e-5, 1e-3], dtype=torch.float64)
    for path in PATHS:
        torch.testing.assert_close(
            path(t.float())[1].double(), path(t)[1], rtol=2e-5 if path is LINEAR else 2e-6, atol=0
        )
