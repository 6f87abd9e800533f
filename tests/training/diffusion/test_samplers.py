"""Samplers: on a mixture whose denoiser is exact, whatever is wrong is the sampler's."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.diffusion import (
    PREDICTIONS,
    Model,
    Path,
    SamplerConfig,
    cosine,
    ddim,
    dpmpp2m,
    edm,
    euler_maruyama,
    flow,
    heun,
    langevin,
    normal,
    sample,
    shift,
    subvp,
    table,
    unipc,
    ve,
    vp,
)  # fmt: skip
from training.diffusion.draws import stream
from training.diffusion.path import named_betas, zero_terminal_snr
from training.diffusion.prediction import NULL
from training.diffusion.samplers import (
    STEPS,
    annealed,
    invert,
    karras_grid,
    leading_grid,
    prior,
    shifted_grid,
    slerp,
    trailing_grid,
    uniform_grid,
)  # fmt: skip

N = 3000
LINEAR = table(named_betas("linear"), "linear")
SHORT = table(named_betas("linear", 200), "linear-200")


def draw(mixture, path: Path, step, grid, corrector=None, rows: int = N) -> Tensor:
    position = torch.arange(rows)
    start = prior(path, normal(0, "start", position, (2,)).double(), grid[0])
    noise = stream(0, "noise", position)
    return sample(mixture.denoiser(path), step, start, grid, corrector=corrector, noise=noise)


def levels(path: Path, sigmas: Tensor) -> Tensor:
    return torch.cat([path.inv(sigmas), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("path", "step", "grid", "tolerance"),
    [
        (SHORT, ddim(SHORT, eta=1), uniform_grid(200), (0.06, 0.12, 0.03)),
        (SHORT, ddim(SHORT, eta=1, variance="large"), uniform_grid(200), (0.06, 0.12, 0.03)),
        (LINEAR, ddim(LINEAR), uniform_grid(50), (0.05, 0.12, 0.02)),
        (LINEAR, ddim(LINEAR), uniform_grid(10), (0.1, 0.3, 0.04)),
        (vp(), euler_maruyama(vp()), uniform_grid(200), (0.06, 0.12, 0.03)),
        (vp(), heun(vp()), uniform_grid(40), (0.05, 0.08, 0.02)),
        (subvp(), ddim(subvp()), uniform_grid(100), (0.05, 0.1, 0.02)),
        (ve(), ddim(ve(), eta=1), uniform_grid(200), (0.06, 0.12, 0.03)),
        (edm(), heun(edm()), karras_grid(edm(), 18), (0.05, 0.08, 0.02)),
        (edm(), dpmpp2m(edm()), karras_grid(edm(), 18), (0.05, 0.1, 0.02)),
        (edm(), unipc(edm()), karras_grid(edm(), 18), (0.05, 0.08, 0.02)),
        (flow(), ddim(flow()), uniform_grid(50), (0.05, 0.1, 0.02)),
        (flow(), ddim(flow()), shifted_grid(50, 3), (0.05, 0.12, 0.02)),
        (flow(), dpmpp2m(flow()), uniform_grid(16), (0.05, 0.08, 0.02)),
        (flow(), euler_maruyama(flow()), uniform_grid(200), (0.06, 0.08, 0.02)),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_samples_have_the_mixture_s_moments_and_shares(mixture, path, step, grid, tolerance):
    errors = mixture.errors(draw(mixture, path, step, grid))
    assert all(e < bound for e, bound in zip(errors, tolerance, strict=True)), errors


@pytest.mark.slow
def test_ddpm_and_annealed_langevin_at_full_length(mixture):
    for step in (ddim(LINEAR, eta=1), ddim(LINEAR, eta=1, variance="large")):
        errors = mixture.errors(draw(mixture, LINEAR, step, uniform_grid(1000)))
        assert all(e < b for e, b in zip(errors, (0.05, 0.08, 0.025), strict=True)), errors
    path = ve(0.01, 10.0)
    grid = levels(path, torch.logspace(1, -2, 60, dtype=torch.float64))
    errors = mixture.errors(draw(mixture, path, annealed(path, 0.1, 20), grid))
    assert all(e < b for e, b in zip(errors, (0.15, 0.12, 0.08), strict=True)), errors


def test_a_corrector_repairs_a_poor_predictor(mixture):
    """Predictor-corrector: ten DDIM steps with Langevin after each beat ten alone."""
    path, grid = ve(0.01, 10.0), uniform_grid(10)
    alone = mixture.errors(draw(mixture, path, ddim(path), grid, rows=2000))
    helped = mixture.errors(draw(mixture, path, ddim(path), grid, langevin(path, 0.2, 15), 2000))
    assert helped[1] < alone[1] / 2


def endpoint_error(gaussian, path: Path, step, steps: int) -> float:
    """Against the ODE's closed form on N(m, v): x/a - m grows as sqrt(v + (s/a)^2)."""
    grid = karras_grid(path, steps, sigma_min=0.05, sigma_max=20.0, rho=3.0)[:-1]
    x = prior(path, normal(0, "start", torch.arange(16), (2,)).double(), grid[0])
    (a, _), (a_u, _) = path(grid[0]), path(grid[-1])
    width = [(gaussian.widths**2 + path.ratio(t) ** 2).sqrt() for t in (grid[0], grid[-1])]
    truth = a_u * (gaussian.means + (x / a - gaussian.means) * width[1] / width[0])
    return (sample(gaussian.denoiser(path), step, x, grid) - truth).abs().max().item()


@pytest.mark.parametrize("path", [edm(), vp(), flow()], ids=lambda path: path.name)
@pytest.mark.parametrize(("make", "order"), [(ddim, 1), (heun, 2), (dpmpp2m, 2), (unipc, 3)])
def test_step_converges_at_its_stated_order(gaussian, path, make, order):
    coarse, fine = (endpoint_error(gaussian, path, make(path), n) for n in (64, 256))
    assert order - 0.15 < math.log(coarse / fine) / math.log(4) < order + 0.6


@pytest.mark.parametrize("make", [*STEPS.values(), lambda path: ddim(path, eta=1)])
def test_all_paths_are_one_curve(mixture, make):
    """The same levels s/a and the same noise give the same pictures in every gauge."""
    sigmas = torch.logspace(1.3, -2, 15, dtype=torch.float64)
    paths = [edm(), vp(), ve(), cosine(), flow(), shift(flow(), 3), subvp(), LINEAR]
    results = []
    for path in paths:
        grid = levels(path, sigmas)
        start = sigmas[0] * path(grid[0])[0] * normal(0, "start", torch.arange(20), (2,)).double()
        noise = stream(0, "noise", torch.arange(20))
        results.append(sample(mixture.denoiser(path), make(path), start, grid, noise=noise))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    "path", [flow(), cosine(), table(zero_terminal_snr(named_betas("linear")), "zero-snr")],
    ids=lambda path: path.name,
)  # fmt: skip
def test_every_step_starts_from_pure_noise(mixture, make, path):
    x = draw(mixture, path, make(path), uniform_grid(20), rows=400)
    assert x.isfinite().all()
    assert mixture.errors(x)[2] < 0.25


def test_pure_noise_is_left_exactly():
    """At a = 0 the first ddim step from eps is a_u mean + s_u eps, whatever the path."""
    eps = torch.randn(3, 2, dtype=torch.float64)
    one, half = torch.tensor([1.0, 0.5], dtype=torch.float64).unbind()
    for path in (flow(), cosine()):
        a_u, s_u = path(half)
        x = ddim(path)(lambda x, t, cond: 0 * x + 3, eps, one, half, NULL, torch.randn_like, [])
        torch.testing.assert_close(x, a_u * 3 + s_u * eps)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_one_step_to_all_steps_of_a_table(mixture, steps):
    """S = T and S = 1 included: no off-by-one between states and times."""
    path = table(named_betas("linear", 50), "linear-50")
    for grid in (uniform_grid(steps), trailing_grid(steps, 50), leading_grid(steps, 50)):
        assert len(grid) == steps + 1
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()
        for make in (ddim, heun, dpmpp2m, unipc, euler_maruyama):
            assert draw(mixture, path, make(path), grid, rows=10).isfinite().all()
    torch.testing.assert_close(leading_grid(50, 50), uniform_grid(50))
    torch.testing.assert_close(trailing_grid(50, 50), uniform_grid(50))
    with pytest.raises(ValueError, match="table's 50"):
        trailing_grid(51, 50)


def test_karras_grid_is_the_published_one():
    """EDM's 18 levels: 80 first, .002 last but one, and 40.8 at the tenth from the end's
    formula."""
    path = edm()
    sigmas = path.ratio(karras_grid(path, 18))
    i = torch.arange(18, dtype=torch.float64)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigmas[:-1], wanted)
    assert sigmas[-1] == 0
    with pytest.raises(ValueError, match="sigma_max"):
        karras_grid(flow(), 18)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_step_is_ddpm_s(mixture, variance):
    """Ho et al. 2020, eq. 6 and 7, from betas alone."""
    betas = named_betas("linear")
    kept = torch.cumprod(1 - betas, 0)
    i = 500  # from state i + 1 to state i
    x, z = torch.randn(2, 4, 2, dtype=torch.float64).unbind()
    t, u = (torch.tensor(state / 1000, dtype=torch.float64) for state in (i + 1, i))
    x0 = mixture.denoiser(LINEAR)(x, t, NULL)
    mean = kept[i - 1].sqrt() * betas[i] / (1 - kept[i]) * x0
    mean = mean + (1 - kept[i - 1]) * (1 - betas[i]).sqrt() / (1 - kept[i]) * x
    width = betas[i] if variance == "large" else betas[i] * (1 - kept[i - 1]) / (1 - kept[i])
    got = ddim(LINEAR, 1, variance)(mixture.denoiser(LINEAR), x, t, u, NULL, lambda _: z, [])
    torch.testing.assert_close(got, mean + width.sqrt() * z, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("fraction", "variance"), [(0.0, "small"), (1.0, "large")])
def test_learned_variance_meets_its_bounds_bit_for_bit(mixture, fraction, variance):
    grid = uniform_grid(20)
    learned = ddim(SHORT, 1, lambda x, t, cond: torch.full_like(x, fraction))
    assert torch.equal(
        draw(mixture, SHORT, learned, grid, rows=9),
        draw(mixture, SHORT, ddim(SHORT, 1, variance), grid, rows=9),
    )


def test_learned_variance_costs_no_call(mixture):
    """One call a step, guided or not; of a guided one, the captioned rows' variance counts."""
    calls = []

    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        calls.append(len(x))
        time = SHORT.inv((4 * label).exp())
        estimate = mixture.denoiser(SHORT)(x, time, cond)
        large = cond.get("keep", torch.ones(len(x), dtype=torch.bool)).to(x)
        return torch.cat([estimate, (2 * large - 1)[:, None].expand_as(x)], 1)

    model = Model(network, SHORT, PREDICTIONS["x0"], learned_variance=True)
    eps = normal(0, "start", torch.arange(6), (2,)).double()
    cond = {"y": torch.arange(6) % 3}
    for guidance, variance in ((1.0, "large"), (3.0, "large"), (0.0, "small")):
        config = SamplerConfig(kind="ddim", eta=1, steps=20, guidance=guidance)
        drawn = [
            replace(config, variance=name).sample(
                model, eps, cond, noise=stream(0, "n", torch.arange(6))
            )
            for name in ("learned", variance)
        ]
        assert torch.equal(*drawn)
        assert calls == [12 if guidance == 3 else 6] * 40
        calls.clear()
    plain = replace(model, learned_variance=False, network=lambda x, label, cond: x)
    with pytest.raises(ValueError, match="learned_variance False"):
        SamplerConfig(kind="ddim", eta=1, variance="learned").sample(plain, eps)
    with pytest.raises(ValueError, match="samplers.learned"):
        SamplerConfig(kind="ddim", eta=1, variance="learned").build_step(SHORT)


def test_ddim_is_deterministic_bit_for_bit(mixture):
    first, second = (draw(mixture, LINEAR, ddim(LINEAR), uniform_grid(20), rows=8) for _ in "ab")
    assert torch.equal(first, second)


def test_inversion_error_shrinks_with_the_step(mixture):
    path, x0 = LINEAR, mixture.draw(100)[0]
    errors = []
    for steps in (50, 100, 200, 400):
        grid = uniform_grid(steps)
        noise = invert(mixture.denoiser(path), path, x0, grid)
        back = sample(mixture.denoiser(path), ddim(path), noise, grid)
        errors.append((back - x0).abs().mean().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 1.5 < coarse / fine < 2.6
    assert errors[-1] < 0.008


def test_inversion_with_enough_rounds_is_exact(mixture):
    """Eighty steps from the data at s/a = .001 up to 8, and down again."""
    for path in (LINEAR, flow(), edm()):
        grid = levels(path, torch.logspace(0.9, -3, 80, dtype=torch.float64))
        x0, denoise = mixture.draw(100)[0], mixture.denoiser(path)
        errors = []
        for rounds in (0, 3, 20):
            noise = invert(denoise, path, x0, grid, rounds=rounds)
            errors.append((sample(denoise, ddim(path), noise, grid) - x0).abs().mean().item())
        assert errors[0] > 0.01
        assert errors[1] < errors[0] / 20
        assert errors[2] < 1e-5


def test_slerp_keeps_the_norm_and_meets_its_ends():
    x, y = normal(0, "x", torch.arange(8), (2, 3, 3, 3)).double().unbind(1)
    y = y * (x.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1))[:, None, None, None]
    for share in (0.0, 0.3, 1.0):
        norm = slerp(x, y, share).flatten(1).norm(dim=1)
        torch.testing.assert_close(norm, x.flatten(1).norm(dim=1))
    torch.testing.assert_close(slerp(x, y, 0.0), x)
    torch.testing.assert_close(slerp(x, y, 1.0), y)
    torch.testing.assert_close(slerp(x, x, 0.4), x)


def test_annealing_repairs_what_plain_langevin_cannot():
    """Song & Ermon 2019, fig. 3: from a uniform start over N(-5)/5 + 4 N(5)/5, the small mode's
    share is about a half with plain Langevin dynamics and a fifth, the truth, with annealed."""

    def denoise(x: Tensor, t: Tensor, cond) -> Tensor:
        variance = 1 + path(t)[1] ** 2
        means = torch.tensor([-5.0, 5.0], dtype=x.dtype)
        logits = (
            torch.tensor([0.2, 0.8]).log() - ((x[..., None] - means) ** 2).sum(1) / 2 / variance
        )
        each = means + (x[..., None] - means) / variance
        return (logits.softmax(-1)[:, None] * each).sum(-1)

    path, rows = ve(0.01, 20.0), 1000
    start = 16 * torch.rand(rows, 2, generator=torch.Generator().manual_seed(0)).double() - 8
    noise = stream(0, "noise", torch.arange(rows))
    small = lambda x: (x.sum(1) < 0).double().mean().item()

    still = path.inv(torch.tensor(0.1, dtype=torch.float64))
    plain = start
    for _ in range(300):
        plain = langevin(path, 10.0)(denoise, plain, still, still, NULL, noise, [])
    assert small(plain) == pytest.approx(0.5, abs=0.04)

    grid = levels(path, torch.logspace(math.log10(20), -1, 12, dtype=torch.float64))
    wide = prior(path, normal(0, "wide", torch.arange(rows), (2,)).double(), grid[0])
    x = sample(denoise, annealed(path, 0.15, 30), wide, grid, noise=noise)
    assert small(x) == pytest.approx(0.2, abs=0.04)


def test_rows_do_not_see_each_other(mixture):
    """A picture depends on its own start and noise, not on its batch."""
    path, position = flow(), torch.arange(6)
    for make in (*STEPS.values(), lambda path: ddim(path, 0.7)):
        whole, part = (
            sample(
                mixture.denoiser(path),
                make(path),
                prior(path, normal(0, "x", rows, (2,)), torch.ones(())),
                uniform_grid(5),
                noise=stream(0, "n", rows),
            )
            for rows in (position, position[2:4])
        )
        torch.testing.assert_close(whole[2:4], part, rtol=0, atol=1e-6)


def test_times_of_a_batch_do_what_a_time_of_all_does(mixture):
    t, u = torch.tensor([0.6, 0.4], dtype=torch.float64).unbind()
    x = normal(0, "x", torch.arange(4), (2,)).double()
    for path in (flow(), LINEAR):
        for make in STEPS.values():
            noise = stream(0, "n", torch.arange(4)), stream(0, "n", torch.arange(4))
            one = make(path)(mixture.denoiser(path), x, t, u, NULL, noise[0], [])
            each = make(path)(
                mixture.denoiser(path), x, t.expand(4), u.expand(4), NULL, noise[1], []
            )
            torch.testing.assert_close(one, each, rtol=0, atol=1e-12)


def test_state_is_float32_at_least(mixture):
    path = flow()
    start = prior(path, torch.randn(3, 2).bfloat16(), torch.ones(()))
    assert start.dtype == torch.float32
    for make in STEPS.values():
        x = sample(mixture.denoiser(path), make(path), start, uniform_grid(4))
        assert x.dtype in (torch.float32, torch.float64)
