"""What a network predicts, and the denoiser D(x, t, cond) -> E[x0 | x_t = x, cond] made of it.

A prediction is the second row of a 2 x 2 system: (x, F) = [[a, s], [p, n]] (x0, eps). Solved for x0
it says how to read a network's output; read forwards it is the training target. Networks, losses,
guidance and samplers all meet at the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .path import Data, Level, Path, Time, like

Cond = Mapping[str, Tensor]
"""Leaves [batch, ...]. An absent key is the null condition; so is a row whose "keep" is False."""
Denoiser = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x [batch, ...], t [] or [batch], cond) -> the estimate of x0, shaped like x."""
Network = Callable[[Tensor, Tensor, Cond], Tensor]
"""(c_in x, label [batch], cond) -> F; knows nothing of diffusion."""
NULL: Cond = {}
MEAN = "mean"
"""The leaf of a condition that says where the data is expected."""


@dataclass(frozen=True)
class Prediction:
    """F = p x0 + n eps."""

    name: str
    row: Callable[[Tensor, Tensor, float], tuple[Tensor | float, Tensor | float]]
    """(a, s, sigma_data) -> (p, n)"""
    sigma_data: float = 1.0
    """Standard deviation of the data that the network's input is normalised for."""
    divides_by_a: bool = False

    def target(self, x0: Data, eps: Data, level: Level) -> Data:
        """What the network should say at this level; free of cancellation at both ends."""
        p, n = self.row(*level, self.sigma_data)
        return p * x0 + n * eps

    def solve(self, level: Level) -> tuple[Tensor, Tensor]:
        """(k, o) with x0 = k x + o F; squared error in F is the x0-error weighted by 1 / o^2."""
        a, s = level
        s = s.clamp(min=1e-30)  # at the data itself: the limit, not 0/0
        p, n = self.row(a, s, self.sigma_data)
        determinant = a * n - s * p
        return n / determinant, -s / determinant


def input_scale(level: Level, sigma_data: float) -> Tensor:
    """c_in: what brings x_t to unit variance."""
    a, s = level
    return (s**2 + (a * sigma_data) ** 2).rsqrt()


def _edm_row(a: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Karras et al. 2022, table 1, in any gauge; with sigma_data 1 it is -v."""
    c_in = input_scale((a, s), sigma_data)
    return s / sigma_data * c_in, -a * sigma_data * c_in


PREDICTIONS = {
    prediction.name: prediction
    for prediction in (
        Prediction("x0", lambda a, s, _: (1.0, 0.0)),
        Prediction("eps", lambda a, s, _: (0.0, 1.0), divides_by_a=True),
        Prediction("score", lambda a, s, _: (0.0, -1 / s), divides_by_a=True),
        Prediction("v", lambda a, s, _: (-s, a)),
        Prediction("flow", lambda a, s, _: (-1.0, 1.0)),
        Prediction("edm", _edm_row, sigma_data=0.5),
    )
}


@dataclass(frozen=True)
class Model:
    """A network as a denoiser. The state x and all coefficients stay in float32 or better.

    The network sees its input at unit variance and, with label "noise", log(s/a)/4 (EDM's c_noise):
    two gauges of one path then show it the same numbers. With label "time" it sees t.

    Where cond has a "mean", shaped like x, the data is expected there: what the network sees and
    says is of x0 - mean, whose state is x - a mean (residual diffusion: SRDiff, Li et al. 2022),
    and sigma_data is the deviation of what is left.
    """

    network: Network
    path: Path
    prediction: Prediction = field(default_factory=lambda: PREDICTIONS["flow"])
    label: Literal["noise", "time"] = "noise"
    dtype: torch.dtype | None = None
    """What the network's input is cast to, for weights that are not float32; not for autocast."""
    learned_variance: bool = False
    """The network returns twice the channels: F, and where log-variance lies between the bounds."""

    def __post_init__(self):
        if self.prediction.divides_by_a and self.path.ends_in_pure_noise:
            raise ValueError(
                f"prediction {self.prediction.name!r} on path {self.path.name!r}: it divides by a, "
                "and a(1) = 0 here; use prediction 'v', 'flow' or 'x0', or a path that keeps some "
                "signal (vp, or a beta table without zero_terminal_snr)"
            )

    def __call__(self, x: Data, t: Time, cond: Cond = NULL) -> Data:
        return self.estimate(x, t, cond)[0]

    def estimate(self, x: Data, t: Time, cond: Cond = NULL) -> tuple[Data, Tensor | None]:
        """The estimate of x0, and the fraction of a model with learned variance."""
        x = _at_least_float32(x)
        out, fraction = self.predict(x, t, cond)
        return self.read(out, x, t, cond), fraction

    def read(self, out: Tensor, x: Data, t: Time, cond: Cond = NULL) -> Data:
        """x0 of a network's output F."""
        k, o = self.prediction.solve(self.path.at(t, x))
        if (mean := cond.get(MEAN)) is None:
            return k * x + o * out
        return mean + k * self._left(x, t, mean) + o * out

    def target(self, x0: Data, eps: Data, level: Level, cond: Cond = NULL) -> Data:
        """What F should be."""
        mean = cond.get(MEAN)
        return self.prediction.target(x0 if mean is None else x0 - mean, eps, level)

    def _left(self, x: Data, t: Time, mean: Data) -> Data:
        return x - self.path.at(t, x)[0] * mean

    def predict(self, x: Data, t: Time, cond: Cond = NULL) -> tuple[Tensor, Tensor | None]:
        """F, and of a model with learned variance the fraction by which `ddim` interpolates."""
        x = _at_least_float32(x)
        mean = cond.get(MEAN)
        shown = self.shown(x if mean is None else self._left(x, t, mean), t)
        out = self.network(shown, self.labels(t, x), cond).to(x.dtype)
        channels = x.shape[1] * (1 + self.learned_variance)
        if out.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"network: got output {tuple(out.shape)} for input {tuple(x.shape)}, wanted "
                f"{channels} channels (learned_variance is {self.learned_variance})"
            )
        if not self.learned_variance:
            return out, None
        out, fraction = out.chunk(2, dim=1)
        return out, (fraction + 1) / 2

    def shown(self, x: Data, t: Time) -> Data:
        """c_in x: the network's input, of unit variance at every level."""
        c_in = input_scale(self.path.at(t, x), self.prediction.sigma_data)
        return (c_in * x).to(self.dtype or x.dtype)

    def labels(self, t: Time, x: Data) -> Tensor:
        """The noise level as the network is told it, [batch]."""
        if self.label == "noise":
            a, s = self.path(t)
            t = (s / a).log().clamp(-8, 8) / 4
        if t.ndim == 0 and t.device.type == "cpu":
            return torch.full((x.shape[0],), t.item(), dtype=x.dtype, device=x.device)
        return t.to(x).expand(x.shape[0])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def regauge(source: Path, target: Path) -> Callable[[Denoiser], Denoiser]:
    """A denoiser of `source` made one of `target`: same s/a, input scaled to the source's gauge."""

    def guide(denoise: Denoiser) -> Denoiser:
        def regauged(x: Data, t: Time, cond: Cond) -> Data:
            a, s = target(t)
            t = source.inv(s / a)
            scale = torch.hypot(*source(t)) / torch.hypot(a, s)
            return denoise(like(scale, x) * x, t, cond)

        return regauged

    return guide
