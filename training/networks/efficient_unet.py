"""Imagen's Efficient U-Net: parameters and blocks at low resolution, almost nothing at full.

Each level halves *before* its blocks on the way down and doubles *after* them on the way up: full
resolution sees the first and last convolutions and nothing else. Skips are scaled by 1 / sqrt 2
(Saharia et al. 2022, appendix B). What the first convolution makes also goes to the last one, so
that what is to be said of single pixels need not pass through half the resolution: of the noise in
v the widths of small networks lost most. The same contract as UNet; made to enlarge pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import (
    Cond,
    Conditioning,
    ContextConfig,
    Told,
    check_contexts,
    context_width,
)
from .layers import (
    Downsample,
    Image,
    Labels,
    ResBlock,
    SpatialTransformer,
    Tap,
    Upsample,
    conv3,
    freeze,
    group_norm,
    no_such_block,
    run,
    zeroed,
)
from .unet import join_low


@dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig:
    """By default Imagen's 64 -> 256 network without text (Saharia et al. 2022, appendix F)."""

    kind: Literal["efficient_unet"] = "efficient_unet"
    in_channels: int = 3
    out_channels: int = 0
    """0: as many as come in."""
    learned_variance: bool = False
    """Twice the output channels: the second half is for the variance (Nichol & Dhariwal 2021)."""
    channels: int = 128
    """Width of the first level; a multiple of 8."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    """Width of each level over `channels`; each, the first too, halves height and width."""
    blocks: tuple[int, ...] = (2, 4, 8, 8)
    """Residual blocks per level, down and up alike: more where they cost little."""
    attention: tuple[int, ...] = (0, 0, 0, 1)
    """Transformers after the residual blocks of a level, down and up alike."""
    head_width: int = 64
    feedforward: int = 2
    """Hidden width of a transformer's feed-forward over its width; 0 leaves it out."""
    qk_norm: bool = False
    dropout: float = 0.0
    embedding: int = 0
    """Width of the label embedding; 0: four times `channels`."""
    contexts: tuple[ContextConfig, ...] = ()
    context_width: int = 512
    """Common width to which the contexts' tokens are projected."""
    classes: int = 0
    """Number of classes of cond["y"]; 0: unconditional on class."""
    low_channels: int = 3
    """Channels of cond["low"], the picture to enlarge; with it comes cond["level"]. 0: none."""
    recompute: bool = False
    """In training, compute the blocks' insides again rather than keep them: less memory, about a
    third more work, the same numbers."""

    def __post_init__(self):
        freeze(self, contexts=ContextConfig)
        check_contexts(self.contexts)
        if self.channels % 8:
            raise ValueError(
                f"channels must be a multiple of 8 (GroupNorm groups), got {self.channels}"
            )
        levels = {len(self.channel_mult), len(self.blocks), len(self.attention)}
        if len(levels) > 1 or not self.channel_mult or min(self.blocks) < 1:
            raise ValueError(
                "channel_mult, blocks (at least 1) and attention need one number per level, got "
                f"{self.channel_mult}, {self.blocks} and {self.attention}"
            )
        for width, depth in zip(self.widths, self.attention, strict=True):
            if depth and width % self.head_width:
                raise ValueError(
                    f"head_width {self.head_width} must divide the width {width} of a level with "
                    "attention"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.channel_mult)

    def state_width(self, block: int) -> int:
        """Channels of what a Tap takes after all blocks of a level on the way down. ValueError
        where there is none."""
        if block > len(self.widths):
            raise no_such_block(block, len(self.widths))
        return self.widths[block - 1]


class Level(nn.Module):
    """The residual blocks of one level and the transformers after them."""

    def __init__(self, config: EfficientUNetConfig, level: int, width: int, embedding: int):
        super().__init__()
        self.recompute = config.recompute
        out = config.widths[level]
        self.residuals = nn.ModuleList(
            ResBlock(out if i else width, out, embedding, config.dropout)
            for i in range(config.blocks[level])
        )
        self.transformers = nn.ModuleList(
            SpatialTransformer(
                out,
                config.head_width,
                context_width=context_width(config.contexts, config.context_width),
                feedforward=config.feedforward,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.attention[level])
        )

    def forward(self, x: Image, told: Told) -> Image:
        for block in self.residuals:
            x = run(block, x, told.embedding, recompute=self.recompute)
        for transformer in self.transformers:
            x = run(transformer, x, told.context, told.mask, recompute=self.recompute)
        return x


class EfficientUNet(nn.Module):
    """forward(x, label, cond): cond as Conditioning reads it, and "low" with low_channels."""

    def __init__(self, config: EfficientUNetConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        embedding = config.embedding or 4 * config.channels
        self.conditioning = Conditioning(
            embedding,
            config.context_width,
            config.contexts,
            config.classes,
            config.low_channels > 0,
        )
        self.stem = conv3(config.in_channels + config.low_channels, widths[0])
        outer = (widths[0], *widths[:-1])
        self.shrink = nn.ModuleList(Downsample(a, b) for a, b in zip(outer, widths, strict=True))
        self.down = nn.ModuleList(Level(config, i, w, embedding) for i, w in enumerate(widths))
        last = len(widths) - 1
        self.up = nn.ModuleList(
            Level(config, i, widths[i] * (1 if i == last else 2), embedding)
            for i in reversed(range(len(widths)))
        )
        self.grow = nn.ModuleList(
            Upsample(b, a) for a, b in zip(outer[::-1], widths[::-1], strict=True)
        )
        out = (config.out_channels or config.in_channels) * (1 + config.learned_variance)
        self.norm = group_norm(2 * widths[0])
        self.out = zeroed(conv3(2 * widths[0], out))

    @property
    def outer(self) -> tuple[nn.Module, ...]:
        """What takes in and gives out, which an optimizer may tell from what is between."""
        return self.conditioning, self.stem, self.out

    def forward(
        self, x: Image, label: Labels, cond: Cond | None = None, tap: Tap | None = None
    ) -> Image:
        cond = cond or {}
        told = self.conditioning(label, cond)
        x = join_low(x, cond, self.config.low_channels)
        h = stem = self.stem(x.contiguous(memory_format=torch.channels_last))
        sizes: list[torch.Size] = []
        skips: list[Tensor] = []
        for number, (shrink, level) in enumerate(zip(self.shrink, self.down, strict=True), 1):
            sizes.append(h.shape[-2:])
            h = level(shrink(h), told)
            skips.append(h)
            if tap and tap.block == number:
                tap.states = h
        skips.pop()  # the last level goes on upwards from where it is
        for i, (level, grow) in enumerate(zip(self.up, self.grow, strict=True)):
            if i:
                h = torch.cat([h, skips.pop() * 2**-0.5], dim=1)
            h = grow(level(h, told), sizes.pop())
        h = torch.cat([h, stem * 2**-0.5], dim=1)
        return self.out(F.silu(self.norm(h)))
