"""The U-Net of ADM and LDM: residual blocks told by AdaGN, transformers that read text, long skips.

(x [B, C, H, W], label [B], cond) -> [B, C', H, W]; it knows nothing of diffusion. Its output starts
at exactly 0.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import Cond, Conditioning, ContextConfig, Told, check_contexts, context_width
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


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """U-Net for pixels or latents of any size (Dhariwal & Nichol 2021; Rombach et al. 2022)."""

    kind: Literal["unet"] = "unet"
    in_channels: int = 4
    out_channels: int = 0
    """0: as many as come in."""
    learned_variance: bool = False
    """Twice the output channels: the second half is for the variance (Nichol & Dhariwal 2021)."""
    patch: int = 1
    """Side of the squares of pixels folded into channels: no work at full resolution."""
    channels: int = 64
    """Width of the first level; a multiple of 8."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Width of each level over `channels`; each level after the first halves height and width."""
    blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (0, 1)
    """Transformers after each residual block, per level; the middle has the last's, at least 1."""
    head_width: int = 32
    feedforward: int = 2
    """Hidden width of a transformer's feed-forward over its width; 0 leaves it out (ADM)."""
    qk_norm: bool = False
    dropout: float = 0.0
    embedding: int = 0
    """Width of the label embedding; 0: four times `channels`."""
    contexts: tuple[ContextConfig, ...] = ()
    context_width: int = 128
    """Common width to which the contexts' tokens are projected."""
    classes: int = 0
    """Number of classes of cond["y"]; 0: unconditional on class."""
    low_channels: int = 0
    """Channels of cond["low"], the picture to enlarge; with it comes cond["level"]."""
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
        if not self.channel_mult or len(self.attention) != len(self.channel_mult):
            raise ValueError(
                f"attention needs one number per level, got {self.attention} "
                f"for channel_mult {self.channel_mult}"
            )
        if self.blocks < 1 or self.patch < 1:
            raise ValueError(
                f"blocks and patch must be at least 1, got {self.blocks} and {self.patch}"
            )
        for width, depth in zip(self.widths, self.attention, strict=True):
            if (depth or width == self.widths[-1]) and width % self.head_width:
                raise ValueError(
                    f"head_width {self.head_width} must divide the width {width} of a level with "
                    "attention"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.channel_mult)

    def state_width(self, block: int) -> int:
        """Channels of what a Tap takes after a block on the way down or in the middle. ValueError
        where there is none."""
        widths = [w for w in self.widths for _ in range(self.blocks)] + 2 * [self.widths[-1]]
        if block > len(widths):
            raise no_such_block(block, len(widths))
        return widths[block - 1]


class Block(nn.Module):
    """A residual block and the transformers after it."""

    def __init__(self, config: UNetConfig, width: int, out: int, embedding: int, depth: int):
        super().__init__()
        self.residual = ResBlock(width, out, embedding, config.dropout)
        self.transformers = nn.ModuleList(
            SpatialTransformer(
                out,
                config.head_width,
                context_width=context_width(config.contexts, config.context_width),
                feedforward=config.feedforward,
                qk_norm=config.qk_norm,
            )
            for _ in range(depth)
        )

    def forward(self, x: Image, told: Told) -> Image:
        x = self.residual(x, told.embedding)
        for transformer in self.transformers:
            x = transformer(x, told.context, told.mask)
        return x


class Contraction(nn.Module):
    """The way down and the middle: a picture -> its features, and what the way up will read."""

    def __init__(self, config: UNetConfig, embedding: int):
        super().__init__()
        self.recompute = config.recompute
        widths = config.widths
        width = widths[0]
        channels = config.in_channels + config.low_channels
        self.stem = conv3(channels * config.patch**2, width)
        self.skip_widths = [width]
        self.shrink = nn.ModuleList(Downsample(w, w) for w in widths[:-1])
        self.levels = nn.ModuleList()
        for level, (out, depth) in enumerate(zip(widths, config.attention, strict=True)):
            if level:
                self.skip_widths.append(width)
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(Block(config, width, out, embedding, depth))
                width = out
                self.skip_widths.append(width)
            self.levels.append(blocks)
        depth = max(1, config.attention[-1])
        self.middle = nn.ModuleList(Block(config, width, width, embedding, d) for d in (depth, 0))

    def forward(self, x: Image, told: Told, tap: Tap | None = None) -> tuple[Image, list[Tensor]]:
        numbers = itertools.count(1)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips: list[Tensor] = [h]
        for level, blocks in enumerate(self.levels):
            assert isinstance(blocks, nn.ModuleList)
            if level:
                h = self.shrink[level - 1](h)
                skips.append(h)
            for block in blocks:
                h = run(block, h, told, recompute=self.recompute)
                skips.append(h)
                if tap and tap.block == next(numbers):
                    tap.states = h
        for block in self.middle:
            h = run(block, h, told, recompute=self.recompute)
            if tap and tap.block == next(numbers):
                tap.states = h
        return h, skips


class Expansion(nn.Module):
    """The way up: each block reads what the way down left."""

    def __init__(self, config: UNetConfig, embedding: int, skip_widths: list[int]):
        super().__init__()
        self.recompute = config.recompute
        widths = config.widths
        width = widths[-1]
        skip_widths = list(skip_widths)
        self.grow = nn.ModuleList(Upsample(w, w) for w in widths[:0:-1])
        self.levels = nn.ModuleList()
        for out, depth in zip(widths[::-1], config.attention[::-1], strict=True):
            blocks = nn.ModuleList()
            for _ in range(config.blocks + 1):
                blocks.append(Block(config, width + skip_widths.pop(), out, embedding, depth))
                width = out
            self.levels.append(blocks)
        assert not skip_widths

    def forward(self, h: Image, skips: list[Tensor], told: Told) -> Image:
        for level, blocks in enumerate(self.levels):
            assert isinstance(blocks, nn.ModuleList)
            if level:
                h = self.grow[level - 1](h, skips[-1].shape[-2:])
            for block in blocks:
                h = run(joined, block, h, skips.pop(), told, recompute=self.recompute)
        return h


def joined(block: nn.Module, h: Image, skip: Image, told: Told) -> Image:
    """The block of both along the channels."""
    return block(torch.cat([h, skip], dim=1), told)


class UNet(nn.Module):
    """forward(x, label, cond): cond as Conditioning reads it, and "low" with low_channels."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        embedding = config.embedding or 4 * config.channels
        self.conditioning = Conditioning(
            embedding,
            config.context_width,
            config.contexts,
            config.classes,
            config.low_channels > 0,
        )
        self.down = Contraction(config, embedding)
        self.up = Expansion(config, embedding, self.down.skip_widths)
        out = (config.out_channels or config.in_channels) * (1 + config.learned_variance)
        self.norm = group_norm(config.widths[0])
        self.out = zeroed(conv3(config.widths[0], out * config.patch**2))

    @property
    def outer(self) -> tuple[nn.Module, ...]:
        """What takes in and gives out, which an optimizer may tell from what is between."""
        return self.conditioning, self.down.stem, self.out

    def forward(
        self, x: Image, label: Labels, cond: Cond | None = None, tap: Tap | None = None
    ) -> Image:
        cond = cond or {}
        told = self.conditioning(label, cond)
        x = fold(join_low(x, cond, self.config.low_channels), self.config.patch)
        h, skips = self.down(x, told, tap)
        h = self.up(h, skips, told)
        return unfold(self.out(F.silu(self.norm(h))), self.config.patch)


def join_low(x: Image, cond: Cond, channels: int) -> Image:
    """x and cond["low"], enlarged bilinearly to x's size, along the channels."""
    if not channels:
        return x
    low = cond.get("low")
    if low is None or low.shape[1] != channels:
        found = "none" if low is None else f"{low.shape[1]}"
        raise ValueError(
            f'an enlarging network: cond["low"] must have {channels} channels, got {found}'
        )
    if low.shape[-2:] != x.shape[-2:]:
        low = F.interpolate(low, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([x, low.to(x.dtype)], dim=1)


def fold(x: Image, patch: int) -> Image:
    """Space to depth: [B, C, H, W] -> [B, C patch^2, H / patch, W / patch]."""
    if x.shape[-2] % patch or x.shape[-1] % patch:
        raise ValueError(
            f"height and width must be multiples of {patch}, got {tuple(x.shape[-2:])}"
        )
    return F.pixel_unshuffle(x, patch) if patch > 1 else x


def unfold(x: Image, patch: int) -> Image:
    """Depth to space: the inverse of `fold`."""
    return F.pixel_shuffle(x, patch) if patch > 1 else x
