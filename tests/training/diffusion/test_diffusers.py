"""The published schedulers, as diffusers has them, take the same trajectory as our steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.diffusion import ddim, dpmpp2m, flow, heun, normal, sample, shift, table, unipc
from training.diffusion.path import Path, named_betas
from training.diffusion.prediction import NULL
from training.diffusion.samplers import Step, leading_grid, prior, trailing_grid, uniform_grid

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, about numpy's

T, STEPS = 1000, 20
START = normal(0, "start", torch.arange(6), (2, 3)).double()


def ours(mixture, path: Path, step: Step, grid: Tensor, start: Tensor) -> Tensor:
    """The mixture is in the plane: each picture's three columns are three points of it."""
    return sample(columns(mixture.denoiser(path)), step, start, grid)


def columns(denoise):
    def pictures(x: Tensor, t: Tensor, cond) -> Tensor:
        points = x.transpose(1, 2).reshape(-1, 2)
        return denoise(points, t, NULL).reshape(len(x), 3, 2).transpose(1, 2)

    return pictures


def theirs(mixture, scheduler, path: Path, start: Tensor, kind: str = "epsilon", **step) -> Tensor:
    """Their loop, its network replaced by the exact denoiser at the level of each of its
    timesteps."""
    x = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep).double()
        t = (timestep.double() + 1) / T
        a, s = path(t)
        x0 = columns(mixture.denoiser(path))(scaled, t, NULL)
        eps = (scaled - a * x0) / s
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[kind]
        x = scheduler.step(out, timestep, x, **step).prev_sample
    return x


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted.double(), rtol=0, atol=1e-5)


def of(scheduler) -> Path:
    return table(scheduler.betas.double())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim(mixture, schedule):
    scheduler = diffusers.DDIMScheduler(beta_schedule=schedule, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    path = of(scheduler)
    grid = leading_grid(STEPS, T)
    got = ours(mixture, path, ddim(path), grid, START)
    close(got, theirs(mixture, scheduler, path, START))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2"),
     ("sigmoid", "sigmoid")],
)  # fmt: skip
def test_beta_tables(name, schedule):
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    wanted = diffusers.DDPMScheduler(beta_schedule=schedule, **ends).betas.double()
    torch.testing.assert_close(named_betas(name), wanted, rtol=1e-5, atol=0)


def test_ddim_with_zero_terminal_snr(mixture):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, rescale_betas_zero_snr=True,
        prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    path = of(scheduler)
    assert path.ends_in_pure_noise
    got = ours(mixture, path, ddim(path), uniform_grid(STEPS), START)
    close(got, theirs(mixture, scheduler, path, START, "v_prediction"))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_step(mixture, variance):
    scheduler = diffusers.DDPMScheduler(
        variance_type=f"fixed_{variance}", clip_sample=False, prediction_type="sample"
    )
    # Its float32 table loses 1 - a^2 near the data.
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    path, z = of(scheduler), normal(0, "z", torch.arange(6), (2, 3)).double()
    for timestep in (1, 10, 500, 999):
        t, u = (torch.tensor(s / T, dtype=torch.float64) for s in (timestep + 1, timestep))
        x0 = columns(mixture.denoiser(path))(START, t, NULL)
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # their noise comes from a generator of their own
            module = diffusers.schedulers.scheduling_ddpm
            patch.setattr(module, "randn_tensor", lambda *_, **__: z)
            wanted = scheduler.step(x0, timestep, START).prev_sample
        step = ddim(path, 1, variance)
        close(step(columns(mixture.denoiser(path)), START, t, u, NULL, lambda _: z, []), wanted)


def in_unit_gauge(path: Path, grid: Tensor) -> Tensor:
    """Their Euler and Heun run on x/a, from init_noise_sigma = sqrt(sigma^2 + 1) times the
    start."""
    a, s = path(grid[0])
    return START * a * ((s / a) ** 2 + 1).sqrt()


def test_euler(mixture):
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    path, grid = of(scheduler), leading_grid(STEPS, T)
    got = ours(mixture, path, ddim(path), grid, in_unit_gauge(path, grid))
    close(got, theirs(mixture, scheduler, path, START))


def test_heun(mixture):
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="leading"
    )
    scheduler.set_timesteps(STEPS)
    path, grid = of(scheduler), leading_grid(STEPS, T)
    got = ours(mixture, path, heun(path), grid, in_unit_gauge(path, grid))
    close(got, theirs(mixture, scheduler, path, START))


def test_where_we_differ_from_their_tables_they_are_off():
    """Their noise levels come from a float32 product of 1 - beta: near the data 1 - a^2 is a small
    difference of rounded numbers. State 1 is known without a product, s^2/a^2 = beta/(1 - beta)."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(T)
    beta = scheduler.betas[0].double()
    exact = (beta / (1 - beta)).sqrt()
    level = of(scheduler).ratio(torch.tensor(1 / T, dtype=torch.float64))
    torch.testing.assert_close(level, exact, rtol=1e-12, atol=0)
    assert (scheduler.sigmas[-2].double() / exact - 1).abs() > 1e-5


@pytest.mark.parametrize(
    ("name", "make"),
    [("DPMSolverMultistepScheduler", dpmpp2m), ("UniPCMultistepScheduler", unipc)],
)
def test_multistep(mixture, name, make):
    scheduler = getattr(diffusers, name)(timestep_spacing="trailing", final_sigmas_type="zero")
    scheduler.set_timesteps(STEPS)
    path = of(scheduler)
    got = ours(mixture, path, make(path), trailing_grid(STEPS, T), START)
    close(got, theirs(mixture, scheduler, path, START))


def test_flow_euler(mixture):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=uniform_grid(STEPS)[:-1].tolist())
    path = flow()
    x = START
    for timestep in scheduler.timesteps:
        t = timestep.double() / T
        x0 = columns(mixture.denoiser(path))(x, t, NULL)
        x = scheduler.step((x - x0) / t, timestep, x).prev_sample.double()
    shifted = shift(path, 3)
    start = prior(shifted, START, torch.ones((), dtype=torch.float64))
    close(ours(mixture, shifted, ddim(shifted), uniform_grid(STEPS), start), x)
