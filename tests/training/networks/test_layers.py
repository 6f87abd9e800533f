"""Layers at their start are known functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.networks.layers import (
    AdaGN,
    CrossAttention,
    ResBlock,
    SpatialTransformer,
    fourier,
    group_norm,
)


def test_adagn_is_group_norm_at_first():
    h, embedding = torch.randn(2, 16, 5, 4), torch.randn(2, 8)
    layer = AdaGN(16, 8)
    assert torch.equal(layer(h, embedding), layer.norm(h))
    torch.testing.assert_close(layer(h, embedding), F.group_norm(h, 4))


def test_adagn_scales_by_one_plus():
    """GN(h) (1 + y_s) + y_b, with y linear in the embedding."""
    h, embedding = torch.randn(2, 16, 5, 4), torch.randn(2, 8)
    layer = AdaGN(16, 8)
    torch.nn.init.normal_(layer.modulation.weight)
    y = embedding @ layer.modulation.weight.T
    scale, shift = y[:, :16, None, None], y[:, 16:, None, None]
    torch.testing.assert_close(layer(h, embedding), F.group_norm(h, 4) * (1 + scale) + shift)


@pytest.mark.parametrize(("width", "groups"), [(320, 32), (96, 24), (40, 10), (8, 2), (3, 1)])
def test_groups_divide_the_width_and_hold_four_channels(width, groups):
    assert group_norm(width).num_groups == groups


def test_blocks_are_the_identity_at_first():
    x = torch.randn(2, 16, 4, 6)
    context, mask = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(ResBlock(16, 16, 8)(x, torch.randn(2, 8)), x)
    assert torch.equal(SpatialTransformer(16, 8, context_width=5)(x, context, mask), x)


def test_cross_attention_averages_the_values_it_may_see():
    """With keys at zero every allowed token has the same weight, and no other has any."""
    layer = CrossAttention(4, 4, 2)
    with torch.no_grad():
        layer.kv.weight.zero_()
        layer.kv.bias.zero_()
        layer.kv.weight[4:] = torch.eye(4)
        layer.out.weight.copy_(torch.eye(4))
    context = torch.randn(2, 5, 4)
    mask = torch.tensor([[True, True, False, False, True], [False, False, False, True, False]])
    out = layer(torch.randn(2, 3, 4), context, mask)
    torch.testing.assert_close(out[0], context[0, [0, 1, 4]].mean(0).expand(3, -1))
    torch.testing.assert_close(out[1], context[1, 3].expand(3, -1))


def test_fourier_features_tell_labels_apart():
    """Unit-length pairs, and a kernel that falls off: near labels look alike, far ones do not."""
    label = torch.linspace(-2, 2, 81)
    features = fourier(label, 64)
    torch.testing.assert_close(features[:, :32] ** 2 + features[:, 32:] ** 2, torch.ones(81, 32))
    alike = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    assert alike.diagonal(1).min() > 0.6  # 0.05 apart
    assert alike.diagonal(1).max() < 0.7
    assert max(alike.diagonal(k).abs().max() for k in range(20, 81)) < 0.3  # 1 and more apart
