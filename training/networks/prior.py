"""unCLIP's prior: from captions to picture embeddings (Ramesh et al. 2022, section 2.2).

(x [B, d], label [B], cond) -> [B, d]. The sequence is the text, what was told, the noised vector
and a learned query, at whose place the answer is read. Attention goes both ways: the text encoder
gave the tokens their places already, and without a causal order masked ones cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .conditioning import Cond, Conditioning, ContextConfig, check_contexts
from .layers import Labels, Transformer, Vectors, freeze, linear, zeroed


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A transformer on vectors."""

    kind: Literal["prior"] = "prior"
    vector: int = 512
    """Width of the vectors it denoises: the picture embedding's."""
    width: int = 512
    depth: int = 8
    head_width: int = 64
    feedforward: int = 3
    """Hidden width of the gated feed-forward over `width`."""
    qk_norm: bool = True
    contexts: tuple[ContextConfig, ...] = ()
    """unCLIP's is CLIP's text: its tokens, and its pooled vector, which is told with the label."""
    classes: int = 0
    """Number of classes of cond["y"]; 0: unconditional on class."""

    def __post_init__(self):
        freeze(self, contexts=ContextConfig)
        check_contexts(self.contexts)
        if self.width % self.head_width:
            raise ValueError(
                f"head_width must divide width, got {self.head_width} for {self.width}"
            )
        if self.vector < 1 or self.depth < 1:
            raise ValueError(
                f"vector and depth must be at least 1, got {self.vector} and {self.depth}"
            )


class Prior(nn.Module):
    """forward(x, label, cond): cond as Conditioning reads it. The output starts at exactly 0."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.conditioning = Conditioning(width, width, config.contexts, config.classes)
        self.enter = linear(config.vector, width)
        self.places = nn.Parameter(torch.randn(3, width) * 0.02)
        """What was told, the vector, the query: who is who."""
        self.blocks = nn.ModuleList(
            Transformer(
                width,
                config.head_width,
                feedforward=config.feedforward,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.leave = zeroed(nn.Linear(width, config.vector))

    @property
    def outer(self) -> tuple[nn.Module, ...]:
        """What takes in and gives out, which an optimizer may tell from what is between."""
        return self.conditioning, self.enter, self.leave

    def forward(self, x: Vectors, label: Labels, cond: Cond | None = None) -> Vectors:
        if x.shape[-1] != self.config.vector:
            raise ValueError(
                f"vectors are {x.shape[-1]} wide, the prior was made for {self.config.vector}"
            )
        embedding, text, mask = self.conditioning(label, cond or {})
        vector = self.enter(x)
        told = torch.stack([embedding, vector, torch.zeros_like(vector)], dim=1) + self.places
        h: Tensor = told
        if text is not None:
            h = torch.cat([text, told], dim=1)
            mask = torch.cat([mask, mask.new_ones(told.shape[:2])], dim=1)
        for block in self.blocks:
            h = block(h, mask=mask)
        return self.leave(self.norm(h[:, -1]))
