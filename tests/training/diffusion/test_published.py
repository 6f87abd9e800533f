"""The published samplers' own loops, written out from their papers: ours take the same steps."""

import itertools

import pytest
import torch
from torch import Tensor

from training.diffusion import (
    ddim,
    dpmpp2m,
    edm,
    euler_maruyama,
    flow,
    heun,
    langevin,
    normal,
    sample,
    subvp,
    table,
    ve,
    vp,
)  # fmt: skip
from training.diffusion.draws import stream
from training.diffusion.path import Path, named_betas
from training.diffusion.prediction import NULL
from training.diffusion.samplers import karras_grid, prior, shifted_grid, uniform_grid

LINEAR = table(named_betas("linear"), "linear")
ROWS = torch.arange(9)


def start() -> Tensor:
    return normal(0, "x", ROWS, (2,)).double()


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_s_fifty_steps(mixture, eta):
    """Song et al. 2021, eq. 12 and 16, from the cumulative products alone."""
    kept = torch.cat([torch.ones(1).double(), torch.cumprod(1 - named_betas("linear"), 0)])
    denoise, noise, x = mixture.denoiser(LINEAR), stream(0, "z", ROWS), start()
    for i, j in itertools.pairwise(range(1000, -1, -20)):
        x0 = denoise(x, torch.tensor(i / 1000, dtype=torch.float64), NULL)
        eps = (x - kept[i].sqrt() * x0) / (1 - kept[i]).sqrt()
        sigma = eta * ((1 - kept[i] / kept[j]) * (1 - kept[j]) / (1 - kept[i])).sqrt()
        fresh = sigma * noise(x) if eta and j else 0
        x = kept[j].sqrt() * x0 + (1 - kept[j] - sigma**2).sqrt() * eps + fresh
    ours = ddim(LINEAR, eta)
    same(sample(denoise, ours, start(), uniform_grid(50), noise=stream(0, "z", ROWS)), x)


def euler(denoise, x: Tensor, t: Tensor, u: Tensor, noise, past) -> Tensor:
    return x + (u - t) * (x - denoise(x, t)) / t


def euler_ancestral(denoise, x: Tensor, t: Tensor, u: Tensor, noise, past) -> Tensor:
    up = u * (1 - (u / t) ** 2).sqrt()
    x = x + (x - denoise(x, t)) / t * ((u**2 - up**2).sqrt() - t)
    return x + up * noise(x) if u else x


def edm_heun(denoise, x: Tensor, t: Tensor, u: Tensor, noise, past) -> Tensor:
    """Karras et al. 2022, algorithm 1."""
    slope = (x - denoise(x, t)) / t
    there = x + (u - t) * slope
    if not u:
        return there
    return x + (u - t) * (slope + (there - denoise(there, u)) / u) / 2


def multistep(denoise, x: Tensor, t: Tensor, u: Tensor, noise, past) -> Tensor:
    """Lu et al. 2022, algorithm 2, with alpha = 1."""
    x0, h = denoise(x, t), (t / u).log()
    aim = x0
    if past and u:
        x0_before, h_before = past[-1]
        aim = x0 + h / (2 * h_before) * (x0 - x0_before)
    past.append((x0, h))
    return u / t * x - torch.expm1(-h) * aim


@pytest.mark.parametrize(
    ("loop", "ours"),
    [
        (euler, ddim(edm())),
        (euler_ancestral, ddim(edm(), 1)),
        (edm_heun, heun(edm())),
        (multistep, dpmpp2m(edm())),
    ],
    ids=["euler", "euler-ancestral", "heun", "dpmpp2m"],
)
def test_samplers_of_the_edm_family(mixture, loop, ours):
    path, noise = edm(), stream(0, "z", ROWS)
    grid = karras_grid(path, 18)
    past: list = []
    x = 80 * start()
    denoise = lambda x, sigma: mixture.denoiser(path)(x, path.inv(sigma), NULL)
    for t, u in itertools.pairwise(path.ratio(grid)):
        x = loop(denoise, x, t, u, noise, past)
    got = sample(mixture.denoiser(path), ours, 80 * start(), grid, noise=stream(0, "z", ROWS))
    same(got, x)


def test_flow_matching_s_euler(mixture):
    """Lipman et al. 2023: x += (u - t) v, v = (x - x0)/t, from pure noise."""
    denoise, x = mixture.denoiser(flow()), start()
    for t, u in itertools.pairwise(uniform_grid(20)):
        x = x + (u - t) * (x - denoise(x, t, NULL)) / t
    same(sample(denoise, ddim(flow()), start(), uniform_grid(20)), x)


@pytest.mark.parametrize("path", [vp(), subvp(), ve()], ids=lambda path: path.name)
def test_euler_maruyama_solves_the_published_sde(mixture, path):
    """Song et al. 2021b, eq. 6: dx = [f x - g^2 score] dt + g dw, in the limit of small steps."""
    t, dt = torch.tensor(0.5, dtype=torch.float64), 1e-4
    denoise, x, z = mixture.denoiser(path), start(), normal(0, "z", ROWS, (2,)).double()
    (f, g2), (a, s) = path.rates(t), path(t)
    score = (a * denoise(x, t, NULL) - x) / s**2
    wanted = x - (f * x - g2 * score) * dt + (g2 * dt) ** 0.5 * z
    got = euler_maruyama(path)(denoise, x, t, t - dt, NULL, lambda _: z, [])
    assert (got - wanted).abs().max() < 0.01 * (wanted - x).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "step", "grid", "corrector", "measured"),
    [
        (LINEAR, ddim(LINEAR, 1), uniform_grid(1000), None, (0.010, 0.009, 0.006)),
        (LINEAR, ddim(LINEAR, 1, "large"), uniform_grid(1000), None, (0.010, 0.009, 0.006)),
        (LINEAR, ddim(LINEAR), uniform_grid(50), None, (0.007, 0.026, 0.001)),
        (LINEAR, ddim(LINEAR), uniform_grid(10), None, (0.023, 0.102, 0.018)),
        (vp(), euler_maruyama(vp()), uniform_grid(1000), None, (0.011, 0.008, 0.007)),
        (vp(), heun(vp()), uniform_grid(40), None, (0.002, 0.009, 0.002)),
        (ve(), ddim(ve(), 1), uniform_grid(500), None, (0.007, 0.011, 0.005)),
        (ve(), ddim(ve(), 1), uniform_grid(250), langevin(ve(), 0.05), (0.009, 0.012, 0.005)),
        (edm(), heun(edm()), karras_grid(edm(), 18), None, (0.006, 0.033, 0.004)),
        (edm(), dpmpp2m(edm()), karras_grid(edm(), 18), None, (0.009, 0.047, 0.005)),
        (flow(), ddim(flow()), uniform_grid(50), None, (0.007, 0.019, 0.001)),
        (flow(), ddim(flow()), shifted_grid(50, 3), None, (0.008, 0.026, 0.001)),
        (flow(), euler_maruyama(flow()), uniform_grid(200), None, (0.004, 0.005, 0.003)),
        (subvp(), ddim(subvp()), uniform_grid(100), None, (0.005, 0.017, 0.001)),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_moments_of_twenty_thousand_samples(mixture, path, step, grid, corrector, measured):
    """Three times what was measured once, or three times the noise of so many samples."""
    rows = torch.arange(20_000)
    x = prior(path, normal(0, "start", rows, (2,)).double(), grid[0])
    noise = stream(0, "noise", rows)
    x = sample(mixture.denoiser(path), step, x, grid, corrector=corrector, noise=noise)
    errors = mixture.errors(x)
    limits = [3 * max(m, n) for m, n in zip(measured, (0.01, 0.01, 0.005), strict=True)]
    assert all(e < limit for e, limit in zip(errors, limits, strict=True)), (errors, limits)
