"""Moving averages of the weights whose memory is counted in images, so they outlive a change of
batch size.

The exponential one: after n more images the old average counts 2^(-n / halflife). While few images
were seen the halflife is a share of them (the ramp of Karras et al. 2022, EDM, as in its code): a
short run is not dominated by its random beginning.

Averages by power functions (Karras et al. 2024, EDM2, section 3) are there to choose the length
afterwards: what the weights were at image u counts u^gamma, so an average's length is a share
`sigma_rel` of the training so far, and snapshots of two such averages add up to any other.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .sharding import fill, like, local
from .stage import copy_exactly, trainable


class Ema:
    """The average of a module's trainable parameters, in float32, on their device; frozen ones
    have no average, and of a sharded module each worker averages its rows.

    `ramp` is the halflife as a share of the images seen, until it reaches `halflife_images`; 0
    switches it off, as a warm start wants, whose first weights are good ones. A halflife of 0
    follows the weights exactly.
    """

    def __init__(self, module: nn.Module, halflife_images: float, ramp: float = 0.05):
        self.halflife_images, self.ramp, self.images_seen = halflife_images, ramp, 0
        self._parameters = trainable(module)
        self._live = [local(p) for p in self._parameters.values()]
        self._average = [p.detach().float().clone() for p in self._live]

    @torch.no_grad()
    def update(self, images_seen: int) -> None:
        """Move towards the weights as they are now, at `images_seen` images."""
        new, self.images_seen = images_seen - self.images_seen, images_seen
        halflife = (
            min(self.halflife_images, self.ramp * images_seen)
            if self.ramp
            else self.halflife_images
        )
        weight = 1 - 0.5 ** (new / halflife) if halflife > 0 else 1.0
        torch._foreach_lerp_(self._average, self._live, weight)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, not copied."""
        pairs = zip(self._parameters.items(), self._average, strict=True)
        return {name: like(p, average) for (name, p), average in pairs}

    def load(self, tensors: dict[str, Tensor], images_seen: int) -> None:
        """Go on from saved `tensors()`."""
        for name, average in self.tensors().items():
            fill(average, tensors[name])
        self.images_seen = images_seen

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the trainable parameters of a module of the same build by the averages."""
        for name, parameter in trainable(module).items():
            parameter.copy_(self.tensors()[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averages inside, and afterwards its own weights again, bit for
        bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._live, self._average, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)


LONGEST_SIGMA_REL = 12**-0.5
"""That of the plain mean of all weights so far, gamma = 0."""


class PowerAverages:
    """Averages of a module's trainable parameters by power functions, one per `sigma_rel`, in
    float32. Without any it does nothing.

    Of the first weights nothing is left after the first update.
    """

    def __init__(self, module: nn.Module, sigma_rel: Sequence[float]):
        self.images_seen = 0
        self._parameters = trainable(module)
        self._live = [local(p) for p in self._parameters.values()]
        self._averages = {s: [p.detach().float().clone() for p in self._live] for s in sigma_rel}
        self._powers = {s: gamma(s) + 1 for s in sigma_rel}

    @torch.no_grad()
    def update(self, images_seen: int) -> None:
        """Take in the weights as they are now, at `images_seen` images: they count the profile's
        integral over the images since the last update (EDM2, eq. 127)."""
        new, self.images_seen = images_seen - self.images_seen, images_seen
        for sigma_rel, averages in self._averages.items():
            weight = 1 - (1 - new / images_seen) ** self._powers[sigma_rel]
            torch._foreach_lerp_(averages, self._live, weight)

    def tensors(self) -> dict[str, Tensor]:
        """The averages as "sigma_rel/parameter name", not copied."""
        return {
            f"{sigma_rel:g}/{name}": like(p, average)
            for sigma_rel, averages in self._averages.items()
            for (name, p), average in zip(self._parameters.items(), averages, strict=True)
        }

    def load(self, tensors: dict[str, Tensor], images_seen: int) -> None:
        """Go on from saved `tensors()`. ValueError when they are of other lengths."""
        copy_exactly(tensors, self.tensors(), "the checkpoint's power-function averages")
        self.images_seen = images_seen


def gamma(sigma_rel: float) -> float:
    """The exponent of the profile u^gamma on [0, t] whose standard deviation is `sigma_rel` t.

    The variance of that profile is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, eq. 123),
    which is a cubic equation for gamma. ValueError unless 0 < sigma_rel < 12^-0.5.
    """
    if not 0 < sigma_rel < LONGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel must lie between 0 and {LONGEST_SIGMA_REL:.4f} (the mean of all weights), "
            f"got {sigma_rel}"
        )
    wanted = sigma_rel**-2
    cubic = np.polynomial.Polynomial([12 - wanted, 16 - wanted, 7, 1])
    return float(cubic.roots().real.max())


def mixture(
    snapshots: Sequence[tuple[float, float]], images_seen: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """What snapshots, (images, sigma_rel) each, must be multiplied by to add up to the average of
    another length, and how far off it is.

    Least squares between the profiles (EDM2, eq. 151 and algorithm 3) among the factors that add up
    to 1, so that weights that never moved are exact. (EDM2 divides by the sum afterwards: on random
    walks of 4 to 16 snapshots up to twice the error.) The factors are float64 [snapshots]; the
    error is the norm of the difference of the profiles, as a share of the wanted one's.
    """
    times = np.array([[images / images_seen for images, _ in snapshots] + [1.0]])
    gammas = np.array([[gamma(s) for _, s in snapshots] + [gamma(sigma_rel)]])
    products = _inner_product(times, gammas, times.T, gammas.T)
    count = len(snapshots)
    ones = np.ones((count, 1))
    system = np.block([[products[:-1, :-1], ones], [ones.T, np.zeros((1, 1))]])
    wanted = np.append(products[:-1, -1], 1.0)
    factors = np.linalg.lstsq(system, wanted, rcond=None)[0][:-1]
    difference = np.append(factors, -1.0)
    off = max(difference @ products @ difference, 0.0) / products[-1, -1]
    return factors, float(off**0.5)


def _inner_product(t_a: np.ndarray, g_a: np.ndarray, t_b: np.ndarray, g_b: np.ndarray):
    """The integral of the product of the profiles (gamma + 1) u^gamma / t^(gamma + 1) on [0, t]."""
    common = np.minimum(t_a, t_b)
    scale = (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) / common
    return scale * (common / t_a) ** (g_a + 1) * (common / t_b) ** (g_b + 1)
