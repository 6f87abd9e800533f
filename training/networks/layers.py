"""The layers all networks share: each starts as a known function and learns to depart from it.

Residual branches and modulations start at zero, so that at first a block is the identity and AdaGN
is GroupNorm. Feature maps [batch, channel, height, width] are best in channels-last memory: tokens
[batch, height * width, channel] are then a view. Embeddings come to the layers after their SiLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Only the batch has a name: layers change every other axis between argument and result.
Image = Float[Tensor, "batch _ _ _"]  # channel, height, width
Tokens = Float[Tensor, "batch _ _"]  # token, width
Heads = Float[Tensor, "batch _ _ _"]  # head, token, depth
Mask = Bool[Tensor, "batch _"]  # token
Vectors = Float[Tensor, "batch _"]  # width
Labels = Float[Tensor, "batch"]  # one number
Zeroed = TypeVar("Zeroed", bound=nn.Module)


def freeze(config: Any, **nested: type) -> None:
    """For `__post_init__`: JSON's lists become tuples, mappings in named fields dataclasses."""
    for name, value in vars(config).items():
        make = nested.get(name)
        if make and isinstance(value, Mapping):
            object.__setattr__(config, name, make(**value))
        if isinstance(value, (list, tuple)):
            items = (make(**v) if make and isinstance(v, Mapping) else v for v in value)
            object.__setattr__(config, name, tuple(items))


@dataclass
class Tap:
    """Given to a network, it takes along the states after one of its blocks, [B, C, h, w]."""

    block: int
    """Counted from 1."""
    states: Image | None = None


def no_such_block(block: int, blocks: int) -> ValueError:
    return ValueError(f"there is no block {block} whose states could be taken, but 1 to {blocks}")


def run(block: Callable[..., Any], *args: Any, recompute: bool = False) -> Any:
    """block(*args), whose inside `recompute` forgets and computes again on the way back.

    The numbers stay the same, dropout's draws too; memory falls to the blocks' arguments and one
    block's inside, for one more forward in each step (Chen et al. 2016).
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def zeroed(module: Zeroed) -> Zeroed:
    """The module with all its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def linear(width: int, out: int) -> nn.Linear:
    """Xavier weights and no bias at first, as transformers want (Peebles & Xie 2023)."""
    layer = nn.Linear(width, out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv3(width: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride=stride, padding=1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32: exact, and on CPUs five times faster than in bfloat16."""

    def forward(self, input: Image) -> Image:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


def group_norm(width: int) -> GroupNorm:
    """GroupNorm with as many groups as divide `width`: at most 32, each of at least 4 channels."""
    limit = max(1, min(32, width // 4))
    groups = next(g for g in range(limit, 0, -1) if width % g == 0)
    return GroupNorm(groups, width)


def fourier(label: Labels, width: int, low: float = 0.5, high: float = 64.0) -> Vectors:
    """Cosines and sines of `label`, frequencies geometric from `low` to `high` radians per unit.

    Made for labels a few units wide: t in [0, 1], or a quarter of the log noise-to-signal ratio. In
    float32; the frequencies are computed, so that a network made on the meta device loses nothing.
    """
    exponent = torch.linspace(0, 1, width // 2, device=label.device)
    frequency = torch.exp(math.log(low) + exponent * math.log(high / low))
    angle = label.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class LabelEmbedding(nn.Module):
    """A number per sample (noise level, augmentation level) -> [batch, width]."""

    def __init__(self, width: int, features: int = 256):
        super().__init__()
        self.features = features
        self.up = nn.Linear(features, width)
        self.out = nn.Linear(width, width)

    def forward(self, label: Labels) -> Vectors:
        return self.out(F.silu(self.up(fourier(label, self.features).to(self.up.weight.dtype))))


class AdaGN(nn.Module):
    """Adaptive group normalisation (Dhariwal & Nichol 2021, section 3): GN(h) (1 + scale) + shift.

    Scale and shift are linear in the embedding and start at zero: at first AdaGN(h, e) == GN(h).
    """

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm = group_norm(width)
        self.modulation = zeroed(nn.Linear(embedding, 2 * width))

    def forward(self, h: Image, embedding: Vectors) -> Image:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(h), 1 + scale)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): the identity (or the skip's projection) at first.

    With an embedding the second norm is AdaGN.
    """

    def __init__(self, width: int, out: int, embedding: int = 0, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(width)
        self.conv1 = conv3(width, out)
        self.norm2 = AdaGN(out, embedding) if embedding else group_norm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv3(out, out))
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Image, embedding: Vectors | None = None) -> Image:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) if embedding is None else self.norm2(h, embedding)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.conv = conv3(width, out, stride=2)

    def forward(self, x: Image) -> Image:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour to `size` (default: twice height and width), then a convolution."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.conv = conv3(width, out)

    def forward(self, x: Image, size: tuple[int, int] | None = None) -> Image:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def split_heads(x: Tokens, head_width: int) -> Heads:
    return rearrange(x, "b n (h d) -> b h n d", d=head_width)


def attend(q: Heads, k: Heads, v: Heads, mask: Mask | None = None) -> Tokens:
    """Softmax attention, heads joined again; keys where `mask` is False have weight exactly zero.

    Each row of the mask needs one True (Conditioning sees to it).
    """
    allowed = None if mask is None else mask[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The CPU kernel's bfloat16 backward is three times slower than its float32 one.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=allowed)
        out = out.to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return rearrange(out, "b h n d -> b n (h d)")


class QKNorm(nn.Module):
    """Normalised queries and keys, per head: bounded logits (Dehghani et al. 2023, section 2)."""

    def __init__(self, head_width: int):
        super().__init__()
        self.q = nn.Parameter(torch.ones(head_width))
        self.k = nn.Parameter(torch.ones(head_width))

    def forward(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        # The fused kernel wants one dtype.
        shape = self.q.shape
        return (
            F.rms_norm(q, shape, self.q.to(q.dtype), 1e-6),
            F.rms_norm(k, shape, self.k.to(k.dtype), 1e-6),
        )


class Unchanged(nn.Module):
    """Stands where QKNorm would."""

    def forward(self, q: Heads, k: Heads) -> tuple[Heads, Heads]:
        return q, k


class SelfAttention(nn.Module):
    """Tokens -> tokens; zero at first."""

    def __init__(self, width: int, head_width: int, qk_norm: bool = False):
        super().__init__()
        self.head_width = head_width
        self.qkv = linear(width, 3 * width)
        self.qk_norm = QKNorm(head_width) if qk_norm else Unchanged()
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        q, k, v = (split_heads(y, self.head_width) for y in self.qkv(x).chunk(3, dim=-1))
        q, k = self.qk_norm(q, k)
        return self.out(attend(q, k, v, mask))


class CrossAttention(nn.Module):
    """Queries from x, keys and values from the context where `mask` is True; zero at first."""

    def __init__(self, width: int, context_width: int, head_width: int, qk_norm: bool = False):
        super().__init__()
        self.head_width = head_width
        self.q = linear(width, width)
        self.kv = linear(context_width, 2 * width)
        self.qk_norm = QKNorm(head_width) if qk_norm else Unchanged()
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tokens, context: Tokens, mask: Mask | None = None) -> Tokens:
        q = split_heads(self.q(x), self.head_width)
        k, v = (split_heads(y, self.head_width) for y in self.kv(context).chunk(2, dim=-1))
        q, k = self.qk_norm(q, k)
        return self.out(attend(q, k, v, mask))


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): out(gelu(gate(x)) * value(x)); zero at first."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = linear(width, 2 * hidden)
        self.out = zeroed(nn.Linear(hidden, width))

    def forward(self, x: Tokens) -> Tokens:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.out(F.gelu(gate) * value)


class Transformer(nn.Module):
    """Self-attention, cross-attention, feed-forward: normed, residual, the identity at first.

    No cross-attention where `context_width` is 0, no feed-forward where `feedforward` is 0.
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        *,
        context_width: int = 0,
        feedforward: int = 2,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, head_width, qk_norm)
        self.cross_attention = None
        if context_width:
            self.norm2 = nn.LayerNorm(width)
            self.cross_attention = CrossAttention(width, context_width, head_width, qk_norm)
        self.feedforward = None
        if feedforward:
            self.norm3 = nn.LayerNorm(width)
            self.feedforward = GatedFeedForward(width, feedforward * width)

    def forward(
        self,
        x: Tokens,
        context: Tokens | None = None,
        context_mask: Mask | None = None,
        mask: Mask | None = None,
    ) -> Tokens:
        x = x + self.self_attention(self.norm1(x), mask)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm2(x), context, context_mask)
        if self.feedforward is not None:
            x = x + self.feedforward(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """A Transformer on the positions of a feature map.

    LDM's (Rombach et al. 2022, appendix E.2) without its projections.
    """

    def __init__(self, width: int, head_width: int, **options: Any):
        super().__init__()
        self.tokens = Transformer(width, head_width, **options)

    def forward(self, x: Image, context: Tokens | None = None, mask: Mask | None = None) -> Image:
        tokens = self.tokens(rearrange(x, "b c h w -> b (h w) c"), context, mask)
        return rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[-2])
