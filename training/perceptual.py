"""How far two pictures are apart in the eyes of a network: LPIPS' distance of its features.

Zhang et al. 2018, section 3, eq. 1, with all channels alike: their weights were fitted to one
network's. The network is frozen and stays outside of whoever learns from it: it is no part of its
weights, checkpoints or averages, and never in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from .encoders.sources import Source

Image = Float[Tensor, "batch channel height width"]
Map = Float[Tensor, "batch _ _ _"]
Features = Callable[[Image], list[Map]]
"""Pictures in [-1, 1] -> feature maps [B, C, h, w] of several layers, with gradients."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """Whose eyes, and what they weigh."""

    kind: Literal["perceptual"] = "perceptual"
    weight: float = 1.0
    tower: str = ""
    """A CLIP stage's directory, or a folder or hub id with a CLIP of open_clip or a vision model of
    transformers; by default the CLIP among the stage's inputs, which is the line's own."""

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(
                f"weight must be positive, got {self.weight}; leave perceptual out to do without"
            )


class Perceptual:
    """(x, y) -> their distance. The network is opened where the first pictures are."""

    def __init__(self, tower: str | Source):
        self.tower = tower
        self.opened: dict[torch.device, Features] = {}

    def __call__(self, x: Image, y: Image) -> Float[Tensor, " batch"]:
        """The distance of rows, with gradients in y alone."""
        features = self.features(y.device)
        with torch.no_grad():
            wanted = features(x)
        return distance(wanted, features(y))

    def features(self, device: torch.device) -> Features:
        if not self.tower:
            raise ValueError(
                "perceptual.tower names no network and the stage has no input 'clip': name a CLIP "
                "stage's directory, or a folder with a pretrained network"
            )
        if device not in self.opened:
            from .encoders.perceptual import load

            self.opened[device] = load(self.tower, device)
        return self.opened[device]


def distance(ours: Sequence[Map], theirs: Sequence[Map]) -> Float[Tensor, " batch"]:
    """|u - v|^2 of the channels' directions u, v at each place: means over places, then layers.

    In [0, 4]; 2 where directions are at right angles.
    """
    apart = [
        (_unit(a) - _unit(b)).square().sum(1).flatten(1).mean(1)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(apart).mean(0)


def _unit(x: Map) -> Map:
    x = x.float()
    # Where all channels are 0, as after a ReLU, a norm has no gradient: this has.
    return x * (x.square().sum(1, keepdim=True) + 1e-6).rsqrt()
