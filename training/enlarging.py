"""The smaller picture that a stage enlarges, and the damage that is done to it: in a cascade what
the stage before it drew, for a base (SR3, Saharia et al. 2021) what a caller gives.

A stage that has only seen small copies of real pictures believes every mistake of the stage before
it. Conditioning augmentation (CDM, Ho et al. 2022, section 4) shows it damaged copies and tells it
how damaged they are: by Gaussian noise at low resolution, by a Gaussian blur at high resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .diffusion import Model, normal, uniform
from .diffusion.prediction import MEAN

Picture = Float[Tensor, "batch channel height width"]
Strength = Float[Tensor, " batch"]
PIXELS_VARIANCE = 0.4
"""Of pictures in [-1, 1], about."""
LARGEST_BLUR = 4.0
"""Deviation in pixels of the small picture: the kernel's length is bounded by it."""


@dataclass(frozen=True, kw_only=True)
class LowConfig:
    """What picture is enlarged."""

    kind: Literal["low"] = "low"
    side: int
    """Of the small picture, in pixels; the side of the large one is a multiple."""
    augment: Literal["noise", "blur", "none"] = "noise"
    """noise: that of the stage's own path, which holds for sampling too; blur: training alone has
    it as a rule."""
    strongest: float = 0.5
    """The damage of each row is drawn evenly from 0 to this: a time of the path from 0 to 1 (Imagen
    goes to 1), or the deviation of the blur in pixels of the small picture (CDM: .6)."""
    residual: bool = False
    """What is learnt is what the small picture, enlarged, lacks (SRDiff, Li et al. 2022), at every
    noise level: for prediction edm with a sigma_data of about its deviation. A small network learns
    that in a tenth of the pictures that it needs to learn to repeat what it is told."""

    def __post_init__(self):
        if self.side < 1:
            raise ValueError(f"low.side: got {self.side}, wanted at least 1 pixel")
        most = LARGEST_BLUR if self.augment == "blur" else 1.0
        if not 0 <= self.strongest <= most:
            raise ValueError(
                f"low.strongest: got {self.strongest}, wanted 0 to {most:g} for {self.augment}"
            )

    def check(self, strength: float, where: str) -> None:
        """ValueError for a damage that was not trained for."""
        most = 0.0 if self.augment == "none" else self.strongest
        if not 0 <= strength <= most:
            raise ValueError(
                f"{where}: got {strength:g}, and it learnt {self.augment} from 0 to {most:g}"
            )

    def draw(self, seed: int, position: Tensor, purpose: str = "") -> Strength:
        """How strongly each row at these global positions is damaged."""
        return uniform(seed, f"{purpose}level", position).float() * self.strongest

    def told(
        self, x: Picture, strength: Strength, model: Model, noise: Picture, side: int
    ) -> dict[str, Tensor]:
        """The condition's "low", damaged, its "level", and with `residual` the "mean" of pictures
        of `side` pixels. `noise` is standard normal, like x."""
        if self.augment == "blur":
            low = expected = blurred(x, strength, self.strongest)
            level = strength
        elif self.augment == "none":
            low, expected, level = x, x, torch.zeros_like(strength)
        else:
            a, s = model.path.at(strength, x)
            low, level = a * x + s * noise, model.labels(strength, x)
            # The linear estimate of x, and x itself where there is no noise.
            expected = low * (a * PIXELS_VARIANCE / (a**2 * PIXELS_VARIANCE + s**2))
        more = {MEAN: enlarged(expected, side)} if self.residual else {}
        return {"low": low, "level": level, **more}

    def noise(self, seed: int, position: Tensor, x: Picture, purpose: str = "") -> Picture:
        """What `told` damages the rows at these global positions by."""
        return normal(seed, f"{purpose}level/noise", position, tuple(x.shape[1:])).to(x)


def shrunk(x: Picture, side: int) -> Picture:
    """Square pictures as means over squares of pixels: [batch, channel, side, side].

    ValueError unless they are squares of a multiple of `side`.
    """
    height, width = x.shape[-2:]
    if height != width or height % side:
        raise ValueError(
            f"pictures of {width} x {height} pixels cannot be shrunk to {side} x {side}: "
            "wanted squares whose side is a multiple of it"
        )
    return F.avg_pool2d(x, height // side) if height > side else x


def enlarged(x: Picture, side: int) -> Picture:
    """Squares of `side` pixels, bilinear."""
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def blurred(x: Picture, deviation: Strength, most: float = LARGEST_BLUR) -> Picture:
    """Each row under a Gaussian of its own deviation, in pixels, at most `most` (the kernel is made
    for it, without a look at the device); 0 leaves it. Edges are repeated.
    """
    reach = max(1, math.ceil(3 * most))
    place = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (place / deviation.clamp(min=1e-3)[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).to(x)
    rows, channels, height, width = x.shape
    kernel = weights.repeat_interleave(channels, 0)[:, None]  # [rows channels, 1, length]
    flat = x.reshape(1, rows * channels, height, width)
    flat = F.pad(flat, (reach,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None], groups=rows * channels)
    return F.conv2d(flat, kernel[..., None], groups=rows * channels).reshape(x.shape)
