"""Noise levels: x_t = a(t) x0 + s(t) eps, with eps ~ N(0, I), t = 0 the data and t = 1 the noise.

A level is a projective point (a : s). Its scale is a gauge: VP, VE, EDM and flow matching are
gauges of one object, and nothing downstream may depend on the choice. Times have shape [batch], or
[] for all rows (then best float64 and on the host: the coefficients are exact, and reading them
synchronises nothing).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Time = Float[Tensor, "*batch"]
Data = Float[Tensor, "batch *size"]
Level = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Path:
    """A curve of noise levels from the data to the noise, in closed form."""

    name: str
    level: Callable[[Tensor], Level]
    """t -> (a, s)"""
    inverse: Callable[[Tensor], Tensor]
    """s/a in [0, inf] -> t"""
    slope: Callable[[Tensor], Level]
    """t -> (a'/a, (s^2)'): both are finite at the data, where s' itself need not be."""

    def __call__(self, t: Time) -> Level:
        return self.level(t)

    def at(self, t: Time, x: Data) -> Level:
        """(a, s) shaped to multiply `x`."""
        a, s = self.level(t)
        return like(a, x), like(s, x)

    def inv(self, ratio: Time) -> Time:
        """The time at which s/a is `ratio`; infinity is pure noise."""
        return self.inverse(ratio)

    def ratio(self, t: Time) -> Time:
        """s/a, the noise level in the gauge a = 1 (the sigma of EDM)."""
        a, s = self.level(t)
        return s / a

    def snr(self, t: Time) -> Time:
        """a^2 / s^2."""
        a, s = self.level(t)
        return (a / s) ** 2

    def rates(self, t: Time) -> Level:
        """f and g^2 of dx = f x dt + g dw (Song et al. 2021b, eq. 5) with the path's marginals."""
        f, variance_slope = self.slope(t)
        return f, variance_slope - 2 * f * self.level(t)[1] ** 2

    def noise(self, x0: Data, eps: Data, t: Time) -> Data:
        """A draw of q(x_t | x0)."""
        a, s = self.at(t, x0)
        return a * x0 + s * eps

    def added(self, t: Time, u: Time) -> Time:
        """Standard deviation of q(x_u | x_t) for u >= t: less than s_u, as x_t is noisy too."""
        (a, s), (a_u, s_u) = self.level(t), self.level(u)
        return (s_u**2 - (a_u / a * s) ** 2).clamp(min=0).sqrt()

    def renoise(self, x: Data, eps: Data, t: Time, u: Time) -> Data:
        """A draw of q(x_u | x_t) for u >= t."""
        return self.at(u, x)[0] / self.at(t, x)[0] * x + like(self.added(t, u), x) * eps

    def posterior(self, t: Time, u: Time) -> Level:
        """Standard deviations (small, large) of q(x_u | x_t, x0), u < t.

        The small one is exact for a known x0; the large one is DDPM's beta, which is defined in the
        gauge a^2 + s^2 = 1 alone (Ho et al. 2020, sec. 3.2).
        """
        (a, s), (a_u, s_u) = self.level(t), self.level(u)
        scale, scale_u = torch.hypot(a, s), torch.hypot(a_u, s_u)
        beta = (1 - (a / a_u * scale_u / scale) ** 2).clamp(min=0)
        return s_u / s * self.added(u, t), scale_u * beta.sqrt()

    def back(self, x: Data, x0: Data, t: Time, u: Time, fresh: Tensor | None = None) -> Data:
        """The mean of x_u given x_t and x0, when noise of deviation `fresh` is still to be added:
        x0 at the level u, and what `fresh` leaves of the noise in x_t."""
        (a, s), (a_u, s_u) = self.at(t, x), self.at(u, x)
        kept = s_u if fresh is None else (s_u**2 - fresh**2).clamp(min=0).sqrt()
        return a_u * x0 + kept / s * (x - a * x0)

    @functools.cached_property
    def ends_in_pure_noise(self) -> bool:
        """Whether a(1) = 0: nothing of x0 can be told from x_1, nor x0 be had from eps."""
        return self.level(torch.ones((), dtype=torch.float64))[0].item() == 0


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """[] or [batch] with as many trailing axes as `x` has."""
    return (
        coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1))
        if coefficient.ndim
        else coefficient
    )


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Variance-preserving SDE with linear beta (Song et al. 2021b, eq. 11)."""
    total, rate, when = _linear_beta(beta_min, beta_max)
    return Path(
        "vp",
        lambda t: ((-total(t) / 2).exp(), (-torch.expm1(-total(t))).sqrt()),
        lambda ratio: when(torch.log1p(ratio**2)),
        lambda t: (-rate(t) / 2, rate(t) * (-total(t)).exp()),
    )


def subvp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Sub-VP SDE: the drift of VP with s = 1 - a^2 (Song et al. 2021b, sec. 3.4)."""
    total, rate, when = _linear_beta(beta_min, beta_max)

    def slope(t: Tensor) -> Level:
        a2, s = (-total(t)).exp(), -torch.expm1(-total(t))
        return -rate(t) / 2, 2 * s * rate(t) * a2

    return Path(
        "subvp",
        lambda t: ((-total(t) / 2).exp(), -torch.expm1(-total(t))),
        lambda ratio: when(2 * torch.asinh(ratio / 2)),
        slope,
    )


def _linear_beta(low: float, high: float) -> tuple[Callable[[Tensor], Tensor], ...]:
    """B(t) = integral of beta, beta(t), and t(B) in the form that does not cancel."""
    rise = high - low
    return (
        lambda t: t * (low + rise / 2 * t),
        lambda t: low + rise * t,
        lambda total: 2 * total / (low + (low**2 + 2 * rise * total).sqrt()),
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    """Variance-exploding SDE (Song et al. 2021b, eq. 9), started from the data itself: s(0) = 0.

    s^2 = sigma_min^2 ((sigma_max / sigma_min)^2t - 1), geometric but for the last sigma_min.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"path ve: got sigma_min {sigma_min} and sigma_max {sigma_max}, wanted "
            "0 < sigma_min < sigma_max"
        )
    growth = 2 * math.log(sigma_max / sigma_min)
    return Path(
        "ve",
        lambda t: (torch.ones_like(t), sigma_min * torch.expm1(growth * t).sqrt()),
        lambda ratio: torch.log1p((ratio / sigma_min) ** 2) / growth,
        lambda t: (torch.zeros_like(t), sigma_min**2 * growth * (growth * t).exp()),
    )


def edm(sigma_max: float = 80.0) -> Path:
    """a = 1, s = sigma_max t (Karras et al. 2022, table 1); its times are noise levels."""
    if not sigma_max > 0:
        raise ValueError(f"path edm: got sigma_max {sigma_max}, wanted more than 0")
    return Path(
        "edm",
        lambda t: (torch.ones_like(t), sigma_max * t),
        lambda ratio: ratio / sigma_max,
        lambda t: (torch.zeros_like(t), 2 * sigma_max**2 * t),
    )


def cosine() -> Path:
    """a = cos(pi t / 2), s = sin(pi t / 2): iDDPM's schedule without its offset and clip."""
    half = math.pi / 2
    return Path(
        "cosine",
        # cos written as a sine: exactly 0 at t = 1, in every precision.
        lambda t: (torch.sin(half * (1 - t)), torch.sin(half * t)),
        lambda ratio: torch.atan(ratio) / half,
        lambda t: (-half * torch.tan(half * t), half * torch.sin(math.pi * t)),
    )


def flow() -> Path:
    """Straight lines, a = 1 - t, s = t (rectified flow, Liu et al. 2023; Lipman et al. 2023)."""
    return Path(
        "flow",
        lambda t: (1 - t, t),
        lambda ratio: 1 / (1 + 1 / ratio),
        lambda t: (-1 / (1 - t), 2 * t),
    )


def table(betas: Float[Tensor, " steps"], name: str = "table") -> Path:
    """The DDPM chain of T steps: time i/T is the state after i of them, a^2 = prod(1 - beta).

    Between two states a^2 is interpolated linearly, so that the inverse is exact everywhere.
    """
    log_kept = torch.log1p(-betas.double()).cumsum(0)
    zero = torch.zeros(1, dtype=torch.float64, device=betas.device)
    kept, lost = torch.cat([zero, log_kept]).exp(), -torch.expm1(torch.cat([zero, log_kept]))
    steps = len(betas)

    @functools.cache
    def knots(device: torch.device) -> Level:
        return kept.to(device), lost.to(device)

    def segment(t: Tensor) -> tuple[Tensor, Tensor, Level, Level]:
        """a^2, s^2 at t, with both at the two ends of the step that t lies in."""
        all_kept, all_lost = knots(t.device)
        place = t.double() * steps
        index = place.long().clamp(0, steps - 1)
        # Not all_kept[index]: the index of a single time would be read from the device first.
        begin = all_kept.take(index), all_lost.take(index)
        end = all_kept.take(index + 1), all_lost.take(index + 1)
        part = place - index
        return torch.lerp(begin[0], end[0], part), torch.lerp(begin[1], end[1], part), begin, end

    def level(t: Tensor) -> Level:
        a2, s2, _, _ = segment(t)
        return a2.sqrt().to(t.dtype), s2.sqrt().to(t.dtype)

    def inverse(ratio: Tensor) -> Tensor:
        _, all_lost = knots(ratio.device)
        s2 = 1 / (1 + ratio.double() ** -2)
        index = (torch.searchsorted(all_lost, s2.contiguous(), right=True) - 1).clamp(0, steps - 1)
        part = (s2 - all_lost[index]) / (all_lost[index + 1] - all_lost[index])
        return ((index + part.clamp(0, 1)) / steps).to(ratio.dtype)

    def slope(t: Tensor) -> Level:
        a2, _, (_, begin), (_, end) = segment(t)
        fall = (end - begin) * steps
        return (-fall / (2 * a2)).to(t.dtype), fall.to(t.dtype)

    return Path(name, level, inverse, slope)


def named_betas(name: str, steps: int = 1000) -> Float[Tensor, " steps"]:
    """The published beta tables (float64), stretched to `steps` as iDDPM does (1000 / steps).

    linear: Ho et al. 2020. scaled_linear: linear in sqrt(beta), what Stable Diffusion calls
    "linear". cosine: Nichol & Dhariwal 2021, eq. 17, clipped at .999. sigmoid: GeoDiff.
    """
    stretch = 1000 / steps
    at = functools.partial(torch.linspace, steps=steps, dtype=torch.float64)
    if name == "linear":
        betas = stretch * at(1e-4, 0.02)
    elif name == "scaled_linear":
        betas = stretch * at(0.00085**0.5, 0.012**0.5) ** 2
    elif name == "sigmoid":
        betas = stretch * (torch.sigmoid(at(-6, 6)) * (0.02 - 1e-4) + 1e-4)
    elif name == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - kept[1:] / kept[:-1]
    else:
        raise ValueError(f"betas: got {name!r}, wanted linear, scaled_linear, cosine or sigmoid")
    return betas.clamp(max=0.999)


def zero_terminal_snr(betas: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """The table moved so that a(1) = 0 and the first level stays (Lin et al. 2024, algorithm 1)."""
    a = torch.log1p(-betas.double()).cumsum(0).div(2).exp()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return 1 - torch.cat([a[:1] ** 2, (a[1:] / a[:-1]) ** 2])


def moebius(t: Time, factor: float) -> Time:
    """kt / (1 + (k - 1) t): on the flow path it multiplies s/a by exactly k (SD3, eq. 23)."""
    return factor * t / (factor * t + (1 - t))


def shift(path: Path, factor: float) -> Path:
    """The path run through `moebius`: factor > 1 spends more of its time at high noise."""
    if not factor > 0:
        raise ValueError(
            f"shift: got {factor}, wanted a factor above 0 (1 leaves the path as it is)"
        )

    def slope(t: Tensor) -> Level:
        speed = factor / (1 + (factor - 1) * t) ** 2
        f, variance_slope = path.slope(moebius(t, factor))
        return f * speed, variance_slope * speed

    return Path(
        f"{path.name}*{factor:g}",
        lambda t: path.level(moebius(t, factor)),
        lambda ratio: moebius(path.inverse(ratio), 1 / factor),
        slope,
    )
