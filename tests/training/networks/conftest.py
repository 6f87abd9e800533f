"""Tiny networks of every kind that reads captions, and conditions for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from training.networks import (
    ContextConfig,
    DiTConfig,
    EfficientUNetConfig,
    NetworkConfig,
    PriorConfig,
    UNetConfig,
    build,
)

CONTEXTS = (ContextConfig("clip", 12, 10), ContextConfig("t5", 7, standardized=True))
TINY: dict[str, tuple[type, dict]] = {
    "unet": (UNetConfig, {"channels": 16, "blocks": 1, "head_width": 8, "context_width": 8}),
    "dit": (DiTConfig, {"width": 16, "depth": 2, "head_width": 8, "feedforward": 2}),
    "mmdit": (DiTConfig, {"width": 16, "depth": 2, "head_width": 8, "text": "joint"}),
    "efficient_unet": (
        EfficientUNetConfig,
        {
            "in_channels": 4,
            "low_channels": 0,
            "channels": 8,
            "channel_mult": (1, 2),
            "blocks": (1, 2),
            "attention": (0, 1),
            "head_width": 8,
            "context_width": 8,
        },
    ),
    "prior": (PriorConfig, {"vector": 6, "width": 16, "depth": 2, "head_width": 8}),
}


@pytest.fixture(autouse=True)
def _known_draws():
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., NetworkConfig]:
    """The small config of a kind, with changes."""

    def make(kind: str, **changes) -> NetworkConfig:
        config, fields = TINY[kind]
        return config(**{"contexts": CONTEXTS, **fields, **changes})

    return make


@pytest.fixture
def awake() -> Callable[[NetworkConfig], nn.Module]:
    """A network with nothing at zero any more, so that every path reaches the output."""

    def make(config: NetworkConfig) -> nn.Module:
        network = build(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return network.eval()

    return make


@pytest.fixture
def cond() -> dict[str, Tensor]:
    """Captions of different lengths for three rows, none of them empty."""
    row = torch.arange(3)[:, None]
    return {
        "clip_tokens": torch.randn(3, 5, 12),
        "clip_mask": torch.arange(5) < 2 + row,
        "clip_pooled": torch.randn(3, 10),
        "t5_tokens": torch.randn(3, 6, 7),
        "t5_mask": torch.arange(6) < 1 + 2 * row,
    }
