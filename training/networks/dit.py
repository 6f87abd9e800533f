"""Diffusion transformers: patches are tokens, conditions modulate (adaLN-zero), text is read.

(x [B, C, H, W], label [B], cond) -> [B, C', H, W]. Each block starts as the identity,
the output at exactly 0. Positions enter by rotation alone (2-D RoPE): any size will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import nn

from .conditioning import Cond, Conditioning, ContextConfig, check_contexts, context_width
from .layers import (
    CrossAttention,
    Heads,
    Image,
    Labels,
    Mask,
    QKNorm,
    Tap,
    Tokens,
    Unchanged,
    Vectors,
    attend,
    freeze,
    linear,
    no_such_block,
    run,
    split_heads,
    zeroed,
)
from .unet import join_low

Rotate = Callable[[Heads], Heads]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Diffusion transformer (Peebles & Xie 2023), by default XL/2 with QK-norm and without text."""

    kind: Literal["dit"] = "dit"
    in_channels: int = 4
    out_channels: int = 0
    """0: as many as come in."""
    learned_variance: bool = False
    """Twice the output channels: the second half is for the variance (Nichol & Dhariwal 2021)."""
    patch: int = 2
    width: int = 1152
    depth: int = 28
    head_width: int = 72
    """A multiple of 4: half of a head turns with the row, half with the column."""
    feedforward: int = 4
    """Hidden width of the feed-forward over `width`."""
    qk_norm: bool = True
    text: Literal["cross", "joint"] = "cross"
    """cross: the picture reads the text; joint: text is a second stream (Esser et al. 2024)."""
    contexts: tuple[ContextConfig, ...] = ()
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
        if self.head_width % 4 or self.width % self.head_width:
            raise ValueError(
                f"head_width must be a multiple of 4 and divide width {self.width}, "
                f"got {self.head_width}"
            )
        if self.patch < 1 or self.depth < 1:
            raise ValueError(
                f"patch and depth must be at least 1, got {self.patch} and {self.depth}"
            )
        if self.text == "joint" and not context_width(self.contexts, self.width):
            raise ValueError(
                'text="joint" needs a context with tokens: set its width or pooled_tokens'
            )

    def state_width(self, block: int) -> int:
        """Channels of what a Tap takes after a block. ValueError where there is none."""
        if block > self.depth:
            raise no_such_block(block, self.depth)
        return self.width


def rotary(height: int, width: int, head_width: int, device: torch.device) -> Rotate:
    """2-D rotary positions (Su et al. 2021, on two axes) of height x width tokens, row by row.

    Half of the pairs turn by the row, half by the column, at frequencies from 1 down to 1/100
    radians: logits depend on differences of positions alone.
    """
    share = torch.arange(head_width // 4, device=device) / (head_width // 4)
    frequency = 100.0**-share
    rows = torch.arange(height, device=device)[:, None] * frequency
    columns = torch.arange(width, device=device)[:, None] * frequency
    angle = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: Heads) -> Heads:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    return rotate


def modulate(x: Tokens, shift: Vectors, scale: Vectors) -> Tokens:
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Stream(nn.Module):
    """One stream of a block: what it brings to the attention, what it does with the answer.

    adaLN-zero (Peebles & Xie 2023, section 3.2): shift, scale and gate of both branches are linear
    in the embedding and start at zero. A `silent` stream is only read: nothing comes back to it.
    """

    def __init__(self, config: DiTConfig, silent: bool = False):
        super().__init__()
        width = config.width
        self.head_width = config.head_width
        self.silent = silent
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(width, (2 if silent else 6) * width))
        self.qkv = linear(width, 3 * width)
        self.qk_norm = QKNorm(config.head_width) if config.qk_norm else Unchanged()
        if not silent:
            self.out = linear(width, width)
            self.feedforward = nn.Sequential(
                linear(width, config.feedforward * width),
                nn.GELU(approximate="tanh"),
                linear(config.feedforward * width, width),
            )

    def bring(
        self, x: Tokens, embedding: Vectors
    ) -> tuple[Heads, Heads, Heads, tuple[Vectors, ...]]:
        """Queries, keys and values, and the modulations left for `take`."""
        shift, scale, *rest = self.modulation(embedding).chunk(2 if self.silent else 6, dim=1)
        qkv = self.qkv(modulate(self.norm(x), shift, scale))
        q, k, v = (split_heads(y, self.head_width) for y in qkv.chunk(3, dim=-1))
        return *self.qk_norm(q, k), v, tuple(rest)

    def attended(self, x: Tokens, heard: Tokens, gate: Vectors) -> Tokens:
        return torch.addcmul(x, gate[:, None], self.out(heard))

    def fed(self, x: Tokens, shift: Vectors, scale: Vectors, gate: Vectors) -> Tokens:
        hidden = self.feedforward(modulate(self.norm(x), shift, scale))
        return torch.addcmul(x, gate[:, None], hidden)


class CrossBlock(nn.Module):
    """Self-attention of the picture, cross-attention to the text, feed-forward."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = context_width(config.contexts, config.width)
        self.picture = Stream(config)
        self.cross_attention = None
        if width:
            self.norm = nn.LayerNorm(config.width)
            self.cross_attention = CrossAttention(
                config.width, width, config.head_width, config.qk_norm
            )

    def forward(
        self, x: Tokens, text: Tokens | None, mask: Mask | None, embedding: Vectors, rotate: Rotate
    ) -> tuple[Tokens, Tokens | None]:
        q, k, v, (gate, *rest) = self.picture.bring(x, embedding)
        x = self.picture.attended(x, attend(rotate(q), rotate(k), v), gate)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm(x), text, mask)
        return self.picture.fed(x, *rest), text


class JointBlock(nn.Module):
    """One attention over picture and text, each with weights of its own (Esser et al. 2024)."""

    def __init__(self, config: DiTConfig, last: bool):
        super().__init__()
        self.picture = Stream(config)
        self.text = Stream(config, silent=last)

    def forward(
        self, x: Tokens, text: Tokens, mask: Mask, embedding: Vectors, rotate: Rotate
    ) -> tuple[Tokens, Tokens]:
        q, k, v, (gate, *rest) = self.picture.bring(x, embedding)
        text_q, text_k, text_v, text_rest = self.text.bring(text, embedding)
        q, k, v = (
            torch.cat(pair, dim=2)
            for pair in ((rotate(q), text_q), (rotate(k), text_k), (v, text_v))
        )
        seen = mask.new_ones(x.shape[:2])
        heard = attend(q, k, v, torch.cat([seen, mask], dim=1))
        x = self.picture.fed(self.picture.attended(x, heard[:, : x.shape[1]], gate), *rest)
        if not self.text.silent:
            gate, *rest = text_rest
            text = self.text.fed(self.text.attended(text, heard[:, x.shape[1] :], gate), *rest)
        return x, text


class DiT(nn.Module):
    """forward(x, label, cond): cond as Conditioning reads it, and "low" with low_channels."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.conditioning = Conditioning(
            width, width, config.contexts, config.classes, config.low_channels > 0
        )
        self.enter = linear((config.in_channels + config.low_channels) * config.patch**2, width)
        self.blocks = nn.ModuleList(
            JointBlock(config, last=i == config.depth - 1)
            if config.text == "joint"
            else CrossBlock(config)
            for i in range(config.depth)
        )
        out = (config.out_channels or config.in_channels) * (1 + config.learned_variance)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.leave = zeroed(nn.Linear(width, out * config.patch**2))

    @property
    def outer(self) -> tuple[nn.Module, ...]:
        """What takes in and gives out, which an optimizer may tell from what is between."""
        return self.conditioning, self.enter, self.leave

    def forward(
        self, x: Image, label: Labels, cond: Cond | None = None, tap: Tap | None = None
    ) -> Image:
        cond = cond or {}
        patch = self.config.patch
        embedding, text, mask = self.conditioning(label, cond)
        x = join_low(x, cond, self.config.low_channels)
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"height and width must be multiples of {patch}, got {tuple(x.shape[-2:])}"
            )
        height, width = x.shape[-2] // patch, x.shape[-1] // patch
        rotate = rotary(height, width, self.config.head_width, x.device)
        h = self.enter(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch))
        for number, block in enumerate(self.blocks, 1):
            h, text = run(block, h, text, mask, embedding, rotate, recompute=self.config.recompute)
            if tap and tap.block == number:
                tap.states = rearrange(h, "b (h w) c -> b c h w", h=height)
        h = self.leave(modulate(self.norm(h), *self.modulation(embedding).chunk(2, dim=1)))
        return rearrange(h, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=patch, q=patch)
