"""An exponential moving average of the weights whose memory is counted in images, so it outlives a
change of batch size.

After n more images the old average counts 2^(-n / halflife). While few images were seen the
halflife is a share of them (the ramp of Karras et al. 2022, EDM, as in its code): a short run is
not dominated by its random beginning.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .stage import trainable


class Ema:
    """The average of a module's trainable parameters, in float32, on their device; frozen ones
    have no average.

    `ramp` is the halflife as a share of the images seen, until it reaches `halflife_images`; 0
    switches it off, as a warm start wants, whose first weights are good ones. A halflife of 0
    follows the weights exactly.
    """

    def __init__(self, module: nn.Module, halflife_images: float, ramp: float = 0.05):
        self.halflife_images, self.ramp, self.images_seen = halflife_images, ramp, 0
        self._parameters = trainable(module)
        self._live: list[Tensor] = list(self._parameters.values())
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
        return dict(zip(self._parameters, self._average, strict=True))

    def load(self, tensors: dict[str, Tensor], images_seen: int) -> None:
        """Go on from saved `tensors()`."""
        for name, average in self.tensors().items():
            average.copy_(tensors[name])
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
