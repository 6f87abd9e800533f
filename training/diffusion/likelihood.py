"""log p(x0) by the probability-flow ODE's change of variables (Song et al. 2021b, sec. 4.3)."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from .objective import directional, trace
from .path import Data, Path
from .prediction import NULL, Cond, Denoiser
from .samplers import Grid, trapezoid


def log_likelihood(
    denoise: Denoiser,
    path: Path,
    x0: Data,
    grid: Grid,
    cond: Cond = NULL,
    *,
    probe: Data | None = None,
    data_std: float = 0.0,
) -> Float[Tensor, " batch"]:
    """log p(x0) [batch] in nats, on a sampler's grid run backwards by Heun's method (second order).

    On (x/a, s/a) the ODE is dy/dsigma = (y - D)/sigma, of divergence (d - tr dD/dy)/sigma, so that
    all gauges agree. Of the grid the times count at which s/a is neither 0 nor infinite: x0 is
    taken as a sample at the least of them, and y as one of N(0, sigma^2 + data_std^2) at the
    greatest. Without `probe` the trace is exact, at a backward pass for each element of a row; with
    one (+-1 or standard normal, like x0) it is Hutchinson's unbiased estimate, at a single pass.
    """
    size = x0[0].numel()

    divergences: list[Tensor] = []
    """In log sigma, of which the part d is then exact; two for each step."""

    def slope(y: Tensor, t: Tensor) -> Tensor:
        """dy/dsigma"""
        a, s = path.at(t, y)

        def estimate(y: Tensor) -> Tensor:
            return denoise(a * y, t, cond)

        with torch.no_grad():  # of the results: the traces differentiate all the same
            d, jacobian = trace(estimate, y) if probe is None else directional(estimate, y, probe)
        divergences.append(size - jacobian)
        return (y - d) * a / s

    times = [t for t in grid.flip(0).unbind() if 0 < path.ratio(t) < math.inf]
    y, change = x0, torch.zeros_like(x0.flatten(1)[:, 0])
    for t, u in itertools.pairwise(times):
        y = trapezoid(slope, path, y, t, u)
        change = (
            change + (path.ratio(u) / path.ratio(t)).log() * (divergences[-2] + divergences[-1]) / 2
        )
    variance = (path.ratio(times[-1]) ** 2 + data_std**2).to(x0)
    squares = y.flatten(1).square().sum(1)
    return change - squares / (2 * variance) - size / 2 * (2 * math.pi * variance).log()
