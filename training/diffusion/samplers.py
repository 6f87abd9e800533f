"""From noise to data: a step carries x from time t to time u, and `sample` is a loop over a grid.

`ddim`, in its gauge-free form, is DDPM, DDIM, Euler, Euler-ancestral and flow Euler. The others
work on (x/a, s/a), where all paths are one curve; from pure noise (a = 0) and to the data (s_u = 0)
s/a is of no use, and every step is a ddim step. Guidance is not known here: it wraps the denoiser.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .path import Data, Path, Time, like, moebius
from .prediction import NULL, Cond, Denoiser, Model

Noise = Callable[[Tensor], Tensor]
"""x -> standard normal draws shaped like x; `draws.stream` makes one that repeats."""
Past = list[tuple[Tensor, Tensor, Tensor]]
"""(t, x, D(x, t)) at the earlier times of this trajectory, for the multistep methods."""
Step = Callable[[Denoiser, Tensor, Tensor, Tensor, Cond, Noise, Past], Tensor]
"""(denoise, x, t, u, cond, noise, past) -> x at u."""
Variance = Literal["small", "large"] | Callable[[Tensor, Tensor, Cond], Tensor]
Grid = Float[Tensor, " times"]


def sample(
    denoise: Denoiser,
    step: Step,
    x: Data,
    grid: Grid,
    cond: Cond = NULL,
    *,
    corrector: Step | None = None,
    noise: Noise = torch.randn_like,
) -> Data:
    """x carried along the grid, from x at grid[0] (see `prior`) to x at grid[-1].

    A corrector is a step with u = t, applied after each step but the one that reaches the data.
    Gradients flow through it; wrap it in torch.no_grad() to make pictures.
    """
    past: Past = []
    for t, u in itertools.pairwise(grid.unbind()):
        x = step(denoise, x, t, u, cond, noise, past)
        if corrector is not None and u > 0:
            x = corrector(denoise, x, u, u, cond, noise, [])
    return x


def prior(path: Path, eps: Data, t: Time) -> Data:
    """Where sampling starts: nothing but noise at level t. float32 at least."""
    eps = eps.to(torch.promote_types(eps.dtype, torch.float32))
    return path.at(t, eps)[1] * eps


# Grids: the n + 1 times of n steps, decreasing to exactly 0; float64 and on the host.


def uniform_grid(steps: int) -> Grid:
    """1, ..., 1/n, 0. On a beta table whose T is a multiple of n: "trailing" (Lin et al. 2024)."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def trailing_grid(steps: int, table_steps: int) -> Grid:
    """The uniform grid rounded to the states of a beta table."""
    _fits(steps, table_steps)
    return (uniform_grid(steps) * table_steps).round() / table_steps


def leading_grid(steps: int, table_steps: int) -> Grid:
    """Every (T // n)-th state counted from the data, as DDIM was published: it starts below t = 1,
    so that pure noise is never seen. State i + 1 is what others call timestep i."""
    _fits(steps, table_steps)
    states = torch.arange(steps, dtype=torch.float64).flip(0) * (table_steps // steps) + 1
    return _to_data(states / table_steps)


def shifted_grid(steps: int, factor: float) -> Grid:
    """The uniform grid with more of its steps at high noise, for a path not shifted itself."""
    return moebius(uniform_grid(steps), factor)


def karras_grid(
    path: Path,
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Grid:
    """Levels s/a evenly spaced in (s/a)^(1/rho) (Karras et al. 2022, eq. 5), then the data."""
    last = path.ratio(torch.ones((), dtype=torch.float64)).item()
    sigma_max = last if sigma_max is None else sigma_max
    if not 0 < sigma_min < sigma_max < math.inf or sigma_max > last * (1 + 1e-9):
        raise ValueError(
            f"karras grid on path {path.name!r}: got s/a from {sigma_min} to {sigma_max}, wanted "
            f"0 < sigma_min < sigma_max, finite and at most the path's {last}; name sigma_max (80?)"
        )
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _to_data(path.inv(torch.linspace(*ends, steps, dtype=torch.float64) ** rho).clamp(max=1))


def _to_data(times: Tensor) -> Grid:
    return torch.cat([times, times.new_zeros(1)])


def _fits(steps: int, table_steps: int) -> None:
    if not 1 <= steps <= table_steps:
        raise ValueError(f"grid: got {steps} steps, wanted 1 to the table's {table_steps}")


def ddim(path: Path, eta: float = 0.0, variance: Variance = "small") -> Step:
    """DDIM (Song et al. 2021a, eq. 12) in any gauge and, with eta 0, in either direction.

    eta 0 is the probability-flow ODE's Euler step, eta 1 DDPM's ancestral one. `variance` is the
    fresh noise's: DDPM's beta-tilde ("small") or beta ("large"), or a callable (x, t, cond) that
    says where in [0, 1] its logarithm lies between them (`learned`; iDDPM, eq. 15).
    """

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        (a, s), (a_u, s_u) = path.at(t, x), path.at(u, x)
        if _none(s):  # at the data no noise can be told: follow the path's scale to the next level
            return a_u / a * x
        x0 = denoise(x, t, cond)
        if eta == 0 or _none(s_u):
            return path.back(x, x0, t, u)
        small, large = (eta * like(width, x) for width in path.posterior(t, u))
        if variance == "small":
            fresh = small
        elif variance == "large":
            fresh = large
        else:
            share = variance(x, t, cond)
            fresh = small ** (1 - share) * large**share  # exact at both bounds
        return path.back(x, x0, t, u, small) + fresh * noise(x)

    return step


def learned(model: Model) -> tuple[Denoiser, Variance]:
    """A model with learned variance as a denoiser, and the variance of its own last call as `ddim`
    wants it: no second call. A guided call has the null condition's rows first; the captions' count
    (GLIDE)."""
    last: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0, fraction = model.estimate(x, t, cond)
        if fraction is None:
            raise ValueError(
                "variance 'learned': this model has learned_variance False; use 'small' or 'large'"
            )
        last[:] = [fraction]
        return x0

    return denoise, lambda x, t, cond: last[0][-len(x) :]


def heun(path: Path) -> Step:
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1): order 2, two
    calls."""
    first_order = ddim(path)

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        (a, s), (a_u, s_u) = path.at(t, x), path.at(u, x)
        if _none(a) or _none(s) or _none(s_u):
            return first_order(denoise, x, t, u, cond, noise, past)

        def slope(y: Tensor, t: Tensor) -> Tensor:
            a, s = path.at(t, y)
            return (y - denoise(a * y, t, cond)) * a / s

        return a_u * trapezoid(slope, path, x / a, t, u)

    return step


def trapezoid(
    slope: Callable[[Tensor, Tensor], Tensor], path: Path, y: Tensor, t: Tensor, u: Tensor
) -> Tensor:
    """y at u by Heun's method on dy/dsigma = slope(y, t), with sigma = s/a."""
    stride = like(path.ratio(u) - path.ratio(t), y)
    first = slope(y, t)
    return y + stride * (first + slope(y + stride * first, u)) / 2


def dpmpp2m(path: Path) -> Step:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): order 2 at one call a step."""

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        x0 = denoise(x, t, cond)
        return _exponential(path, x, x0, t, u, past)

    return step


def unipc(path: Path) -> Step:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023): 2M, each result corrected by the evaluation
    that the next step makes anyway; order 3 at one call a step."""

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        x0 = denoise(x, t, cond)
        if past:
            x = _corrected(path, x, x0, t, past)
        return _exponential(path, x, x0, t, u, past)

    return step


def _exponential(path: Path, x: Tensor, x0: Tensor, t: Tensor, u: Tensor, past: Past) -> Tensor:
    """x_u = (s_u/s) x + a_u (1 - e^-h) D', with D' the estimate extrapolated by half a step."""
    (a, s), (a_u, s_u) = path.at(t, x), path.at(u, x)
    aim = x0
    if past and not _none(s_u):
        before, _, x0_before = past[-1]
        aim = x0 + (x0 - x0_before) * like(_gain(path, t, u) / _gain(path, before, t) / 2, x)
    if not _none(a):
        past[:] = [*past[-1:], (t, x, x0)]
    return s_u / s * x + (a_u - a * s_u / s) * aim


def _corrected(path: Path, x: Tensor, x0: Tensor, t: Tensor, past: Past) -> Tensor:
    """UniC: the last step taken again, now that the estimate at its end is known."""
    origin, x_origin, x0_origin = past[-1]
    (_, s_o), (a, s) = path.at(origin, x), path.at(t, x)
    h = _gain(path, origin, t)
    b = torch.expm1(-h)
    if len(past) == 1:
        slope = (x0 - x0_origin) / 2
    else:
        earlier, _, x0_earlier = past[-2]
        r = -_gain(path, earlier, origin) / h
        # Two conditions on two weights: the expansion of e^-h is matched to second order.
        first, second = (b / -h - 1) / b, 2 * ((b / -h - 1) / -h - 0.5) / b
        weight_earlier = (first - second) / (1 - r)
        weight_now = first - weight_earlier
        slope = like(weight_earlier / r, x) * (x0_earlier - x0_origin)
        slope = slope + like(weight_now, x) * (x0 - x0_origin)
    return s / s_o * x_origin - a * like(b, x) * (x0_origin + slope)


def _gain(path: Path, t: Tensor, u: Tensor) -> Tensor:
    """h = log(a_u/s_u) - log(a/s)."""
    return (path.ratio(t) / path.ratio(u)).log()


def euler_maruyama(path: Path) -> Step:
    """The reverse SDE (Song et al. 2021b, eq. 6) on y = x/a, whose drift by sigma^2 is (y -
    D)/sigma^2."""
    first_order = ddim(path)

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        (a, s), (a_u, s_u) = path.at(t, x), path.at(u, x)
        if _none(a) or _none(s_u):
            return first_order(denoise, x, t, u, cond, noise, past)
        variance, lost = (s / a) ** 2, (s / a) ** 2 - (s_u / a_u) ** 2
        y = x / a
        return a_u * (y - lost / variance * (y - denoise(x, t, cond)) + lost.sqrt() * noise(x))

    return step


def langevin(path: Path, step_size: float = 0.1, repeats: int = 1) -> Step:
    """Langevin dynamics at level t: x += e/2 score + sqrt(e) z, with e = step_size s^2 (NCSN's is
    .2).

    As a corrector: score-SDE's signal-to-noise ratio r is step_size 2 r^2 (its .16 is .05), their
    |z| / |score| being about s in many dimensions. Unlike theirs, a row's step depends on no other
    row.
    """

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        a, s = path.at(t, x)
        for _ in range(repeats):
            drift = step_size / 2 * (a * denoise(x, t, cond) - x)
            x = x + drift + step_size**0.5 * s * noise(x)
        return x

    return step


def annealed(path: Path, step_size: float = 0.1, repeats: int = 20) -> Step:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), denoised at the end."""
    settle, denoised = langevin(path, step_size, repeats), ddim(path)

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        (a, _), (a_u, s_u) = path.at(t, x), path.at(u, x)
        if _none(a):
            return denoised(denoise, x, t, u, cond, noise, past)
        x = settle(denoise, x, t, t, cond, noise, past)
        return denoised(denoise, x, t, u, cond, noise, past) if _none(s_u) else a_u / a * x

    return step


STEPS: dict[str, Callable[[Path], Step]] = {
    "ddim": ddim,
    "heun": heun,
    "dpmpp2m": dpmpp2m,
    "unipc": unipc,
    "euler_maruyama": euler_maruyama,
    "annealed": annealed,
}


def invert(
    denoise: Denoiser, path: Path, x0: Data, grid: Grid, cond: Cond = NULL, *, rounds: int = 0
) -> Data:
    """The noise that deterministic `ddim` takes to x0: the grid backwards, exact as its steps
    shrink.

    Each of `rounds` fixed-point rounds a step asks the denoiser where the step really starts
    (Pan et al. 2023): they converge where s/a grows by little in a step (an eighth will do), and
    undo `ddim` exactly. What its last step forgets, from the least noise to the data, is lost.
    """
    forward = ddim(path)

    def step(
        denoise: Denoiser, x: Tensor, t: Tensor, u: Tensor, cond: Cond, noise: Noise, past: Past
    ) -> Tensor:
        back = forward(denoise, x, t, u, cond, noise, past)
        for _ in range(0 if _none(path.at(t, x)[1]) else rounds):
            back = path.back(x, denoise(back, u, cond), t, u)
        return back

    return sample(denoise, step, x0, grid.flip(0), cond)


def slerp(x: Data, y: Data, share: float) -> Data:
    """From x to y on the great circle, row by row: noise stays as long as noise is."""
    cosine = (x * y).flatten(1).sum(1) / (_norm(x) * _norm(y)).flatten()
    angle = like(cosine.clamp(-1, 1).acos(), x)
    small = angle < 1e-6
    safe = torch.where(small, torch.ones_like(angle), angle)
    arc = (torch.sin((1 - share) * safe) * x + torch.sin(share * safe) * y) / torch.sin(safe)
    return torch.where(small, torch.lerp(x, y, share), arc)


def _norm(x: Tensor) -> Tensor:
    return like(x.flatten(1).square().sum(1).sqrt(), x)


def _none(coefficient: Tensor) -> bool:
    """Whether any row's coefficient is 0; free of synchronisation for a time on the host."""
    return bool((coefficient == 0).any())
