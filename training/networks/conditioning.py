"""What a network is told: label, class, level, contexts -> one embedding and one masked sequence.

There is one null, in training and sampling alike: a context that is absent, a row with `keep` False
and a row whose tokens are all masked see the same learned token instead, so that every row has
something to attend to. Masked tokens never reach a weight: neither their content nor their number
nor their place changes an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LabelEmbedding, Labels, Mask, Tokens, Vectors

Cond = Mapping[str, Tensor]


@dataclass(frozen=True)
class ContextConfig:
    """An encoder's fields: {name}_tokens [B, L, width], _mask [B, L], _pooled [B, pooled_width]."""

    name: str
    width: int = 0
    """Width of the tokens; 0 when there are none."""
    pooled_width: int = 0
    """Width of the pooled vector; 0 when there is none."""
    pooled_tokens: int = 0
    """Extra tokens made of the pooled vector (unCLIP, Ramesh et al. 2022, section 2.1: 4)."""
    standardized: bool = False
    """Whether each feature is first brought to mean 0 and deviation 1 by what `Context` holds."""

    def __post_init__(self):
        if not self.name or min(self.width, self.pooled_width, self.pooled_tokens) < 0:
            raise ValueError(f"a context needs a name and widths >= 0, got {self}")
        if not self.width and not self.pooled_width:
            raise ValueError(
                f"context {self.name!r} has neither tokens nor a pooled vector: set one width"
            )
        if self.pooled_tokens and not self.pooled_width:
            raise ValueError(
                f"context {self.name!r}: pooled_tokens need a pooled vector: set pooled_width"
            )

    @property
    def has_tokens(self) -> bool:
        return bool(self.width or self.pooled_tokens)


class Told(NamedTuple):
    """What the layers read."""

    embedding: Vectors
    """[B, E], after its SiLU."""
    context: Tokens | None
    """[B, L, D]; None when no context has tokens."""
    mask: Mask | None
    """[B, L], True where there is something to read: somewhere in each row."""


def flags(cond: Cond, key: str, label: Labels) -> Tensor:
    """cond[key] as bool [B], all True when absent."""
    flag = cond.get(key)
    return torch.ones_like(label, dtype=torch.bool) if flag is None else flag.bool()


def wide(tensor: Tensor, key: str, width: int) -> Tensor:
    if tensor.shape[-1] != width:
        raise ValueError(
            f"cond[{key!r}] is {tensor.shape[-1]} wide, the network was made for {width}: "
            "encode the captions with the encoder the model was trained with"
        )
    return tensor


def summary(width: int, embedding: int) -> nn.Sequential:
    """A vector of an encoder -> its share of the embedding."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, embedding),
        nn.SiLU(),
        nn.Linear(embedding, embedding),
    )


class Standard(nn.Module):
    """(features - shift) * scale, each feature by its own; whoever trains the network measures both
    and sets them. What all captions have in common is gone, and what they differ in is left."""

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.shift) * self.scale


class Context(nn.Module):
    """One encoder's fields -> a share of the embedding, tokens of the common width, their mask."""

    def __init__(self, config: ContextConfig, embedding: int, width: int):
        super().__init__()
        self.config = config
        if config.standardized:
            self.standards = nn.ModuleDict(
                {
                    part: Standard(width)
                    for part, width in (("tokens", config.width), ("pooled", config.pooled_width))
                    if width
                }
            )
        if config.has_tokens:
            self.mark = nn.Parameter(torch.randn(width) * 0.02)
            self.null = nn.Parameter(torch.randn(width) * 0.02)
        if config.width:
            # Encoders' features differ in scale by orders of magnitude: normalise, then project.
            self.tokens = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, width))
            self.mean = summary(config.width, embedding)
        if config.pooled_width:
            self.pooled = summary(config.pooled_width, embedding)
            self.null_pooled = nn.Parameter(torch.zeros(embedding))
        if config.pooled_tokens:
            self.pooled_tokens = nn.Sequential(
                nn.LayerNorm(config.pooled_width),
                nn.Linear(config.pooled_width, config.pooled_tokens * width),
            )

    def forward(
        self, label: Labels, keep: Tensor, cond: Cond
    ) -> tuple[Vectors | None, Tokens | None, Mask | None]:
        config, name = self.config, self.config.name
        keep = keep & flags(cond, f"{name}_keep", label)
        pooled = cond.get(f"{name}_pooled")
        tokens = cond.get(f"{name}_tokens") if config.width else None

        added = None
        if config.pooled_width:
            added = self.null_pooled.expand(len(label), -1)
            if pooled is not None:
                pooled = wide(pooled, f"{name}_pooled", config.pooled_width)
                pooled = self.standards["pooled"](pooled) if config.standardized else pooled
                # Zeros before, a choice after: what is dropped, even a NaN, leaves no gradient.
                pooled = torch.where(keep[:, None], pooled, 0).to(self.null_pooled.dtype)
                added = torch.where(keep[:, None], self.pooled(pooled), added)
        if not config.has_tokens:
            return added, None, None

        parts: list[Tensor] = []
        masks: list[Tensor] = []
        if tokens is not None:
            tokens = wide(tokens, f"{name}_tokens", config.width)
            tokens = self.standards["tokens"](tokens) if config.standardized else tokens
            mask = cond.get(f"{name}_mask")
            mask = (
                tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            )
            mask = mask & keep[:, None]
            tokens = torch.where(mask[:, :, None], tokens, 0).to(self.null.dtype)
            parts.append(self.tokens(tokens))
            masks.append(mask)
            # What the words say by being there is learnt long before cross-attention finds them
            # (Imagen, Saharia et al. 2022, appendix B.2 adds the text's mean as well).
            counted = mask.sum(1, keepdim=True)
            # A layer for each state before the mean reads what their mean no longer tells (deep
            # sets, Zaheer et al. 2017). Others stay as they were: trained networks depend on it.
            heard = self.tokens[0](tokens)
            heard = self.mean[:-1](heard) if config.standardized else heard
            heard = (heard * mask[:, :, None]).sum(1) / counted.clamp(min=1)
            mean = self.mean[-1](heard) if config.standardized else self.mean(heard)
            mean = torch.where(counted > 0, mean, 0)
            added = mean if added is None else added + mean
        if config.pooled_tokens and pooled is not None:
            parts.append(self.pooled_tokens(pooled).unflatten(1, (config.pooled_tokens, -1)))
            masks.append(keep[:, None].expand(-1, config.pooled_tokens))
        empty = ~torch.cat(masks, dim=1).any(dim=1) if masks else torch.ones_like(keep)
        parts.append(self.null.expand(len(label), 1, -1).to(parts[0].dtype if parts else None))
        masks.append(empty[:, None])
        return added, torch.cat(parts, dim=1) + self.mark, torch.cat(masks, dim=1)


class Conditioning(nn.Module):
    """label [B], cond -> Told.

    Reads cond's "y" (class, int [B]), "level" ([B], how "low" was damaged; absent: 0),
    "keep" (bool [B]; False is the null for class and contexts), and for each context {name}_tokens,
    {name}_mask (absent: all True), {name}_pooled, and {name}_keep, which drops that context alone.
    What is absent is null; what is not configured is not read.
    """

    def __init__(
        self,
        embedding: int,
        context_width: int,
        contexts: tuple[ContextConfig, ...] = (),
        classes: int = 0,
        level: bool = False,
    ):
        super().__init__()
        self.label = LabelEmbedding(embedding)
        self.level = LabelEmbedding(embedding) if level else None
        self.null_class = classes
        self.classes = nn.Embedding(classes + 1, embedding) if classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        self.contexts = nn.ModuleList(Context(c, embedding, context_width) for c in contexts)

    def forward(self, label: Labels, cond: Cond) -> Told:
        keep = flags(cond, "keep", label)
        embedding = self.label(label)
        if self.level is not None:
            level = cond.get("level")
            embedding = embedding + self.level(torch.zeros_like(label) if level is None else level)
        if self.classes is not None:
            y = cond.get("y")
            null = torch.full_like(label, self.null_class, dtype=torch.long)
            embedding = embedding + self.classes(
                null if y is None else torch.where(keep, y.long(), null)
            )
        tokens: list[Tensor] = []
        masks: list[Tensor] = []
        for context in self.contexts:
            added, part, mask = context(label, keep, cond)
            if added is not None:
                embedding = embedding + added
            if part is not None and mask is not None:
                tokens.append(part)
                masks.append(mask)
        if not tokens:
            return Told(F.silu(embedding), None, None)
        return Told(F.silu(embedding), torch.cat(tokens, dim=1), torch.cat(masks, dim=1))


def check_contexts(contexts: tuple[ContextConfig, ...]) -> None:
    """Refuses two contexts of one name: they would read the same fields."""
    names = [c.name for c in contexts]
    if len(set(names)) != len(names):
        raise ValueError(f"contexts must have different names, got {names}")


def context_width(contexts: tuple[ContextConfig, ...], width: int) -> int:
    """Width of the tokens that cross-attention reads: 0 when no context has any."""
    return width if any(c.has_tokens for c in contexts) else 0
