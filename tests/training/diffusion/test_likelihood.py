"""Likelihood: the probability-flow ODE gives the mixture's own log-density, in every gauge."""

import math

import torch

from training.diffusion import edm, flow, log_likelihood, vp
from training.diffusion.samplers import karras_grid, uniform_grid


def grid_of(path, steps: int):
    return karras_grid(path, steps, sigma_min=0.002, sigma_max=80.0)


def test_likelihood_converges_to_the_exact_one_at_second_order(mixture):
    x, path = mixture.draw(40)[0], edm()
    errors = [
        (log_likelihood(mixture.denoiser(path), path, x, grid_of(path, n)) - mixture.log_prob(x))
        .abs().mean().item()
        for n in (20, 40, 80, 160)
    ]  # fmt: skip
    assert 3 < errors[0] / errors[1] < 8
    assert 3 < errors[1] / errors[2] < 8
    assert all(e < b for e, b in zip(errors[1:], (0.143, 0.032, 0.008), strict=True)), errors


def test_likelihood_is_the_same_in_every_gauge(mixture):
    x = mixture.draw(20)[0]
    values = [
        log_likelihood(mixture.denoiser(path), path, x, grid_of(path, 30))
        for path in (edm(), vp(), flow())
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-11)


def test_hutchinson_s_estimate_has_the_exact_mean(mixture):
    """In the plane the four sign vectors are two probes and their negatives: their mean is
    exact."""
    path, x = vp(), mixture.draw(20)[0]
    grid = grid_of(path, 20)
    exact = log_likelihood(mixture.denoiser(path), path, x, grid)
    probes = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    estimates = [
        log_likelihood(mixture.denoiser(path), path, x, grid, probe=probe.expand_as(x))
        for probe in probes
    ]
    torch.testing.assert_close((estimates[0] + estimates[1]) / 2, exact)
    assert (estimates[0] - exact).abs().max() > 1e-3


def test_pure_noise_at_the_grid_s_end_is_left_out(gaussian):
    """Flow's a(1) = 0 has no s/a; with the data's spread in the prior, the rest suffices."""
    x, path = gaussian.draw(10)[0], flow()
    got = log_likelihood(gaussian.denoiser(path), path, x, uniform_grid(200), data_std=0.6)
    assert (got - gaussian.log_prob(x)).abs().max() < 0.01


def test_conditional_likelihood(mixture):
    # Far enough up for the prior: at 80 the component's mean still costs .02 nats.
    (x, y), path = mixture.draw(60), edm(1000.0)
    x = x[y == 1]
    cond = {"y": torch.full((len(x),), 1)}
    got = log_likelihood(mixture.denoiser(path), path, x, karras_grid(path, 160), cond)
    squares = (x - mixture.means[1]).square().sum(1) / (2 * 0.16)
    wanted = -squares - math.log(2 * math.pi * 0.16)
    assert (got - wanted).abs().mean() < 0.01
