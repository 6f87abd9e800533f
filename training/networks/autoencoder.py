"""The autoencoders of latent diffusion: pictures in [-1, 1] <-> a small Gaussian, or vectors of a
codebook (Rombach et al. 2022, section 3.1: KL-reg and VQ-reg).

Squares of `patch` x `patch` pixels are folded into channels, so that no convolution runs at full
resolution: the downsampling factor is patch * 2^(levels - 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .codebook import Codebook, CodebookConfig
from .layers import (
    Downsample,
    Image,
    ResBlock,
    SpatialTransformer,
    Upsample,
    conv3,
    freeze,
    group_norm,
)
from .unet import fold, unfold

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Convolutional autoencoder (Rombach et al. 2022, section 3.1); by default 0.85 M, f = 4."""

    kind: Literal["autoencoder"] = "autoencoder"
    in_channels: int = 3
    latent_channels: int = 4
    patch: int = 2
    """Side of the squares of pixels folded into channels; 1: convolve the pixels themselves."""
    channels: int = 48
    """Width of the first level; a multiple of 8."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Width of each level over `channels`; each level after the first halves height and width."""
    blocks: int = 1
    """Residual blocks per level, in the encoder and in the decoder."""
    dense: int = 0
    """Side in pixels of the pictures whose latent is one vector, [C', 1, 1]: a dense layer between
    the last level and it, each way (Kingma & Welling 2014, appendix C). 0: latents are maps, and
    pictures of any size."""
    attention: bool = False
    """A self-attention in the middle of encoder and decoder."""
    head_width: int = 32
    codebook: CodebookConfig | None = None
    """Vectors that latents are replaced by before they are decoded; None: Gaussians instead."""

    def __post_init__(self):
        freeze(self, codebook=CodebookConfig)
        if self.channels % 8:
            raise ValueError(
                f"channels must be a multiple of 8 (GroupNorm groups), got {self.channels}"
            )
        if not self.channel_mult or self.patch < 1 or self.blocks < 1 or self.latent_channels < 1:
            raise ValueError(
                f"channel_mult, patch, blocks, latent_channels must not be empty or 0, got {self}"
            )
        if self.dense < 0 or self.dense % self.halved:
            raise ValueError(
                f"dense must be a multiple of patch * 2^(levels - 1) = {self.halved} pixels, got "
                f"{self.dense}"
            )
        if self.dense and self.codebook:
            raise ValueError("dense: a codebook's latents are maps of vectors; set dense to 0")
        if self.attention and self.widths[-1] % self.head_width:
            raise ValueError(
                f"head_width {self.head_width} must divide the last width {self.widths[-1]}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.channel_mult)

    @property
    def halved(self) -> int:
        """Pixels per position of the last level, along a side."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def factor(self) -> int:
        """Pixels per latent position, along a side."""
        return self.dense or self.halved


def middle(config: AutoencoderConfig, width: int) -> list[nn.Module]:
    attention = (
        [SpatialTransformer(width, config.head_width, feedforward=0)] if config.attention else []
    )
    return [*attention, ResBlock(width, width)]


class Autoencoder(nn.Module):
    """encode, decode; forward decodes the mean of what it encoded."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        pixels = config.in_channels * config.patch**2
        widths = config.widths

        down: list[nn.Module] = [conv3(pixels, widths[0])]
        for level, width in enumerate(widths):
            if level:
                down.append(Downsample(widths[level - 1], width))
            down += [ResBlock(width, width) for _ in range(config.blocks)]
        down += middle(config, widths[-1])
        encoded = config.latent_channels * (1 if config.codebook else 2)
        last, first = conv3(widths[-1], encoded), conv3(config.latent_channels, widths[-1])
        if config.dense:
            side = config.dense // config.halved
            whole = (widths[-1], side, side)
            last = nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(whole), encoded), nn.Unflatten(1, (encoded, 1, 1))
            )
            first = nn.Sequential(
                nn.Flatten(),
                nn.Linear(config.latent_channels, math.prod(whole)),
                nn.Unflatten(1, whole),
            )
        self.encoder = nn.Sequential(*down, group_norm(widths[-1]), nn.SiLU(), last)

        up: list[nn.Module] = [first, *middle(config, widths[-1])]
        for level, width in reversed(list(enumerate(widths))):
            up += [ResBlock(width, width) for _ in range(config.blocks)]
            if level:
                up.append(Upsample(width, widths[level - 1]))
        self.decoder = nn.Sequential(
            *up, group_norm(widths[0]), nn.SiLU(), conv3(widths[0], pixels)
        )
        self.codebook = (
            Codebook(config.codebook, config.latent_channels) if config.codebook else None
        )

    @property
    def outer(self) -> tuple[nn.Module, ...]:
        """What takes in and gives out, which an optimizer may tell from what is between."""
        return self.encoder[0], self.encoder[-1], self.decoder[0], self.decoder[-1]

    def encode(self, x: Image) -> Image:
        """Pictures [B, C, H, W] in [-1, 1] -> moments [B, 2 C', H / f, W / f].

        The first half is the mean, the second the log-variance, clamped to [-30, 20]. With a
        codebook they are the latents [B, C', H / f, W / f] themselves, not quantised yet: `decode`
        does that, so that what a diffusion model learns is continuous (VQ-reg).
        """
        factor = self.config.factor
        if self.config.dense and x.shape[-2:] != (factor, factor):
            raise ValueError(
                f"this autoencoder was made for pictures of {factor} x {factor} pixels, got "
                f"{x.shape[-1]} x {x.shape[-2]}"
            )
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, got {tuple(x.shape[-2:])}"
            )
        h = fold(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        h = self.encoder(h)
        if self.codebook is not None:
            return h
        mean, logvar = h.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def mean(self, encoded: Image) -> Image:
        """The latents [B, C', h, w] of what `encode` gave: the mean, where it is a Gaussian."""
        return encoded if self.codebook is not None else encoded.chunk(2, dim=1)[0]

    def decode(self, z: Image) -> Image:
        """Latents [B, C', h, w] -> pictures [B, C, f h, f w], about in [-1, 1]: not clamped."""
        return self.draw(z if self.codebook is None else self.codebook(z).z)

    def draw(self, z: Image) -> Image:
        """`decode` of what needs no quantising, or has been quantised."""
        h = self.decoder(z.contiguous(memory_format=torch.channels_last))
        return unfold(h, self.config.patch)

    @property
    def last_weight(self) -> Tensor:
        """The decoder's last weight: balances an adversarial loss (Esser et al. 2021, eq. 7)."""
        last = self.decoder[-1]
        assert isinstance(last, nn.Conv2d)
        return last.weight

    def forward(self, x: Image) -> Image:
        return self.decode(self.mean(self.encode(x)))
