"""A classifier of noisy pictures, for classifier guidance: log p(y | x_t) at every noise level.

Half a U-Net with attention pooling (Dhariwal & Nichol 2021, section 4); one head per attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from .conditioning import Conditioning
from .layers import CrossAttention, Image, Labels, freeze, zeroed
from .unet import Contraction, UNetConfig, fold


@dataclass(frozen=True)
class HeadConfig:
    """One question: its name and the number of its answers."""

    name: str
    classes: int

    def __post_init__(self):
        if not self.name or self.classes < 2:
            raise ValueError(f"a head needs a name and at least 2 classes, got {self}")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Noise-aware classifier; the fields it shares with UNetConfig mean the same."""

    kind: Literal["classifier"] = "classifier"
    heads: tuple[HeadConfig, ...] = ()
    """A network needs one at least; a stage fills them in."""
    in_channels: int = 4
    patch: int = 1
    channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 1)
    head_width: int = 32
    feedforward: int = 2
    dropout: float = 0.0

    def __post_init__(self):
        freeze(self, heads=HeadConfig)
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names):
            raise ValueError(f"a classifier needs heads of different names, got {names}")
        assert self.trunk  # refuses what a U-Net would

    @property
    def trunk(self) -> UNetConfig:
        """The U-Net of which this is the way down."""
        return UNetConfig(
            in_channels=self.in_channels,
            patch=self.patch,
            channels=self.channels,
            channel_mult=self.channel_mult,
            blocks=self.blocks,
            attention=self.attention,
            head_width=self.head_width,
            feedforward=self.feedforward,
            dropout=self.dropout,
        )


class Classifier(nn.Module):
    """forward(x [B, C, H, W], label [B]) -> logits by head, each [B, classes], all 0 at first."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if not config.heads:
            raise ValueError("a classifier needs a head at least, got none")
        self.config = config
        trunk = config.trunk
        width = trunk.widths[-1]
        embedding = 4 * config.channels
        self.conditioning = Conditioning(embedding, 0)
        self.down = Contraction(trunk, embedding)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(len(config.heads), width) * 0.02)
        self.pool = CrossAttention(width, width, config.head_width)
        nn.init.xavier_uniform_(self.pool.out.weight)  # a residual nobody adds to must not be 0
        self.heads = nn.ModuleList(zeroed(nn.Linear(width, h.classes)) for h in config.heads)

    @property
    def outer(self) -> tuple[nn.Module, ...]:
        """What takes in and gives out, which an optimizer may tell from what is between."""
        return self.conditioning, self.down.stem, self.heads

    def forward(
        self, x: Image, label: Labels, cond: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """`cond` is taken for the networks' common contract and not read."""
        told = self.conditioning(label, {})
        h, _ = self.down(fold(x, self.config.patch), told)
        tokens = self.norm(rearrange(h, "b c h w -> b (h w) c"))
        pooled = self.pool(self.queries.expand(len(x), -1, -1), tokens)
        return {
            config.name: head(pooled[:, i])
            for i, (config, head) in enumerate(zip(self.config.heads, self.heads, strict=True))
        }
