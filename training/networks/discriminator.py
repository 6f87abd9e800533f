"""A discriminator of patches (Isola et al. 2017, section 3.2.2): is this square a piece of a photo?

Its 4 x 4 convolutions see overlapping squares of one size, and each gets a logit of its own. Group
norms take the place of batch norms: a picture's logits know nothing of its neighbours, and nothing
has to be remembered beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import nn

from .layers import Image, group_norm


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """PatchGAN; by default, at 64 channels and 3 halvings, the paper's 70 x 70."""

    kind: Literal["discriminator"] = "discriminator"
    in_channels: int = 3
    channels: int = 64
    """Width of the first layer, a multiple of 8; it doubles with each halving, 8 times at most."""
    layers: int = 3
    """Halvings of the side."""

    def __post_init__(self):
        if self.channels % 8 or self.channels < 8 or self.layers < 1 or self.in_channels < 1:
            raise ValueError(
                f"channels must be a multiple of 8, layers and in_channels at least 1, got {self}"
            )

    @property
    def patch(self) -> int:
        """Side in pixels of the square behind a logit: 16, 34, 70 for 1, 2, 3 layers."""
        return 9 * 2**self.layers - 2

    @property
    def least(self) -> int:
        """The shortest side of a picture that gets a logit, in pixels."""
        return 3 * 2**self.layers


class Discriminator(nn.Module):
    """Pictures [B, C, H, W] -> logits [B, 1, h, w], high where they look real."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [_conv4(config.in_channels, widths[0], 2), _leaky()]
        for number, (width, out) in enumerate(pairwise(widths), 1):
            stride = 2 if number < config.layers else 1
            layers += [_conv4(width, out, stride), group_norm(out), _leaky()]
        self.layers = nn.Sequential(*layers, _conv4(widths[-1], 1, 1))

    def forward(self, x: Image) -> Image:
        if min(x.shape[-2:]) < self.config.least:
            raise ValueError(
                f"the discriminator sees pictures of {self.config.least} pixels or more at "
                f"{self.config.layers} layers, got {tuple(x.shape[-2:])}: set fewer layers"
            )
        return self.layers(x)


def _conv4(width: int, out: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(width, out, 4, stride=stride, padding=1)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)
