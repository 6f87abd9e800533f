"""Systems of several parts, on data so simple that their results are known in closed form."""

import pytest
import torch
from torch import Tensor

from training.diffusion import Path, cosine, ddim, flow, heun, normal, sample
from training.diffusion.guidance import clip_loss
from training.diffusion.samplers import invert, prior, uniform_grid

ROWS = torch.arange(20_000)


def noise(name: str) -> Tensor:
    return normal(0, name, ROWS, (1,)).double()


def exact(name: str) -> Tensor:
    """Noise whose sample mean is 0."""
    drawn = noise(name)
    return drawn - drawn.mean()


def gaussian_denoiser(path: Path, mean: Tensor | float, variance: float):
    """E[x0 | x_t] on N(mean, variance)."""

    def denoise(x: Tensor, t: Tensor, cond) -> Tensor:
        a, s = path(t)
        return mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)

    return denoise


@pytest.mark.parametrize(("level", "wanted"), [(0.0, 0.5), (0.2, 0.48), (0.5, 0.375)])
def test_conditioning_augmentation_forgets_the_first_stage_s_bias(level, wanted):
    """Super-resolution from a noised low picture (cascaded diffusion, Ho et al. 2022).

    Data and low picture are the same N(0, 1); the second stage knows low~ = a low + s eps. A bias d
    of the first stage becomes d a^2/(a^2 + s^2) in the output, and the output's variance stays 1.
    `level` is s where a^2 + s^2 = 1.
    """
    path, bias = cosine(), 0.5
    t = path.inv(torch.tensor(level / (1 - level**2) ** 0.5, dtype=torch.float64))
    a, s = path(t)
    low = path.noise(exact("low") + bias, exact("augment"), t)
    known = a / (a**2 + s**2)  # E[x0 | low~] = known low~, with variance s^2 / (a^2 + s^2)
    spread = (s**2 / (a**2 + s**2)).item()
    second = gaussian_denoiser(path, known * low, max(spread, 1e-9))
    out = sample(second, heun(path), exact("second"), uniform_grid(60))
    assert out.mean().item() == pytest.approx(wanted, abs=0.001)
    assert out.var().item() == pytest.approx(1, abs=0.05)


def test_a_prior_and_a_decoder_compose_to_the_data():
    """unCLIP (Ramesh et al. 2022): p(x | y) = int p(x | z, y) p(z | y), both stages drawn by
    diffusion."""
    path, y = cosine(), 0.4
    z = sample(gaussian_denoiser(path, 1.2 * y, 0.25), heun(path), noise("z"), uniform_grid(60))
    decoder = gaussian_denoiser(path, 0.8 * z + 0.44 * y, 0.16)
    x = sample(decoder, heun(path), noise("x"), uniform_grid(60))
    assert x.mean().item() == pytest.approx(0.8 * 1.2 * y + 0.44 * y, abs=0.02)
    assert x.var().item() == pytest.approx(0.8**2 * 0.25 + 0.16, rel=0.05)


def test_finetuning_through_the_sampler_moves_pictures_along_the_text():
    """DiffusionCLIP (Kim et al. 2022): invert, then train D so that its sample moves as the text
    does.

    With a linear "CLIP" the picture that loses nothing is x_ref + k u; without the CLIP term x_ref
    is where training stays.
    """
    path, grid = flow(), uniform_grid(12)
    x_ref = normal(0, "ref", torch.arange(8), (3,)).double()
    before = gaussian_denoiser(path, 0.3, 1.0)
    noisy = invert(before, path, x_ref, grid)
    reference = sample(before, ddim(path), noisy, grid)
    assert (reference - x_ref).abs().mean() < 0.2
    text = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64).expand(8, 3)

    def trained(clip_share: float) -> Tensor:
        start = 0.05 if clip_share else 0.0
        move = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([move], lr=0.03)
        denoise = lambda x, t, cond: before(x, t, cond) + move
        for _ in range(40):
            x = sample(denoise, ddim(path), noisy, grid)
            clip = clip_loss(x, reference, text, torch.zeros_like(text)).mean()
            (clip_share * clip + 0.05 * (x - reference).abs().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (sample(denoise, ddim(path), noisy, grid) - reference).detach()

    assert torch.nn.functional.cosine_similarity(trained(1.0), text).min() > 0.98
    assert (trained(0.0) == 0).all()  # what the reference is, it stays


def test_the_start_is_the_path_s_noise_level():
    """Variance-exploding sampling must start at s(1) eps, not at eps."""
    from training.diffusion import edm

    one = torch.ones((), dtype=torch.float64)
    assert prior(edm(), noise("x"), one).std().item() == pytest.approx(80, rel=0.02)
    assert prior(flow(), noise("x"), one).std().item() == pytest.approx(1, rel=0.02)
