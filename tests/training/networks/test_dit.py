"""The diffusion transformer: published sizes, rotary positions, shapes."""

from __future__ import annotations

import pytest
import torch

from training.networks import ContextConfig, DiT, DiTConfig
from training.networks.dit import rotary

POSITIONS = {384: 98_304, 768: 196_608, 1024: 262_144, 1152: 294_912}
"""256 fixed sine positions: the published models hold them as parameters, ours turn by rotation."""


@pytest.mark.parametrize(
    ("depth", "width", "heads", "published"),
    [
        (12, 384, 6, 32_963_360),
        (12, 768, 12, 130_512_416),
        (24, 1024, 16, 458_102_816),
        (28, 1152, 16, 675_129_632),
    ],
)
def test_the_published_sizes(depth, width, heads, published):
    """DiT-S/B/L/XL with patch 2 (table 1: 33, 130, 458, 675 M), to the last parameter.

    All parameters count: both label embeddings, 1000 classes and the null, mean and variance out.
    """
    config = DiTConfig(
        depth=depth,
        width=width,
        head_width=width // heads,
        classes=1000,
        learned_variance=True,
        qk_norm=False,
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(config).parameters())
    assert count + POSITIONS[width] == published


def test_rotation_keeps_lengths_and_knows_differences_only():
    rotate = rotary(5, 7, 8, torch.device("cpu"))
    q, k = torch.randn(2, 8)
    turned_q, turned_k = (rotate(x.expand(1, 1, 35, 8))[0, 0].unflatten(0, (5, 7)) for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(5, 7))
    torch.testing.assert_close(turned_q[0, 0], q)
    logits = torch.einsum("hwd,yxd->hwyx", turned_q, turned_k)
    torch.testing.assert_close(logits[1:, 2:, 1:, 2:], logits[:-1, :-2, :-1, :-2])
    assert (logits[0, 0, 0, 1] - logits[0, 0, 1, 0]).abs() > 1e-3  # rows are not columns
    assert (logits[0, 0, 0, 1] - logits[0, 0, 0, 2]).abs() > 1e-3


@pytest.mark.parametrize("kind", ["dit", "mmdit"])
@pytest.mark.parametrize(
    ("changes", "shape", "channels"),
    [
        ({"patch": 1, "learned_variance": True}, (3, 5), 8),
        ({"patch": 4, "in_channels": 3, "out_channels": 1, "qk_norm": False}, (8, 4), 1),
        ({"depth": 1, "head_width": 4}, (2, 6), 4),
    ],
)
def test_shapes(tiny, awake, cond, kind, changes, shape, channels):
    config = tiny(kind, **changes)
    out = awake(config)(torch.randn(3, config.in_channels, *shape), torch.rand(3), cond)
    assert out.shape == (3, channels, *shape)
    assert out.isfinite().all()
    assert out.std() > 0


def test_patches_come_back_where_they_were(awake):
    """With attention out of the way, one pixel reaches its own patch alone."""
    network = awake(DiTConfig(in_channels=2, width=16, depth=1, head_width=8, patch=2))
    for parameter in network.blocks[0].picture.out.parameters():
        torch.nn.init.zeros_(parameter)
    x, label = torch.randn(1, 2, 8, 6), torch.rand(1)
    moved = x.clone()
    moved[0, 1, 5, 2] += 1
    changed = (network(moved, label) - network(x, label)).abs().amax((0, 1)) > 1e-6
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[4:6, 2:4] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18, "head_width": 6}, "multiple of 4"),
        ({"width": 20}, "divide width 20"),
        ({"depth": 0}, "at least 1"),
        ({"text": "joint", "contexts": (ContextConfig("clip", 0, 8),)}, "context with tokens"),
    ],
)
def test_configs_are_refused_with_a_reason(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny("dit", **changes)


def test_a_size_that_does_not_fit_is_refused(tiny, awake, cond):
    with pytest.raises(ValueError, match="multiples of 2"):
        awake(tiny("dit"))(torch.zeros(3, 4, 5, 4), torch.zeros(3), cond)
