"""The U-Nets: shapes, the picture to enlarge, where the work is done, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.networks import ContextConfig, EfficientUNet, EfficientUNetConfig, UNet, UNetConfig


@pytest.mark.parametrize(
    ("changes", "shape", "channels"),
    [
        ({"in_channels": 3, "contexts": ()}, (7, 9), 3),
        ({"channels": 24, "channel_mult": (1, 2, 3), "attention": (0, 0, 2)}, (6, 5), 4),
        ({"channel_mult": (1,), "attention": (1,), "feedforward": 0}, (3, 4), 4),
        ({"in_channels": 3, "patch": 2, "learned_variance": True}, (12, 8), 6),
        ({"in_channels": 3, "out_channels": 5, "qk_norm": True}, (4, 4), 5),
        ({"contexts": (ContextConfig("clip", pooled_width=10),)}, (1, 2), 4),
        ({"channel_mult": (2, 1), "blocks": 3, "dropout": 0.5}, (4, 4), 4),
    ],
)
def test_unet_shapes(tiny, awake, cond, changes, shape, channels):
    config = tiny("unet", **changes)
    out = awake(config)(torch.randn(3, config.in_channels, *shape), torch.rand(3), cond)
    assert out.shape == (3, channels, *shape)
    assert out.isfinite().all()
    assert out.std() > 0


@pytest.mark.parametrize(
    ("changes", "shape", "channels"),
    [
        ({"in_channels": 3, "learned_variance": True}, (9, 7), 6),
        ({"channel_mult": (1,), "blocks": (2,), "attention": (1,)}, (3, 2), 4),
        ({"channel_mult": (3, 1, 2), "blocks": (1, 1, 2), "attention": (0, 0, 1)}, (11, 8), 4),
    ],
)
def test_efficient_unet_shapes(tiny, awake, cond, changes, shape, channels):
    config = tiny("efficient_unet", **changes)
    out = awake(config)(torch.randn(3, config.in_channels, *shape), torch.rand(3), cond)
    assert out.shape == (3, channels, *shape)
    assert out.isfinite().all()
    assert out.std() > 0


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        # SDXL (Podell et al. 2023, table 1: 2.6 B), by its published weights
        ({"attention": (0, 2, 10), "width": 2048, "pooled": 2816, "head": 64}, 2_567_463_684),
        # Stable Diffusion 1 (Rombach et al. 2022), which has a level more: 860 M
        ({"channel_mult": (1, 2, 4, 4), "attention": (1, 1, 1, 0), "width": 768}, 859_520_964),
    ],
)
def test_sizes_of_the_published_class(changes, published):
    """To a percent or two: LDM's transformers are wrapped in projections, which ours are not."""
    made = {"channel_mult": (1, 2, 4), "pooled": 0, "head": 40} | changes
    context = ContextConfig("text", made["width"], made["pooled"])
    config = UNetConfig(
        channels=320,
        channel_mult=made["channel_mult"],
        attention=made["attention"],
        head_width=made["head"],
        feedforward=4,
        contexts=(context,),
        context_width=made["width"],
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(config).parameters())
    assert count == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("kind", ["unet", "dit", "efficient_unet"])
def test_the_picture_to_enlarge_and_its_level(tiny, awake, kind):
    network = awake(tiny(kind, contexts=(), low_channels=4))
    x, label, low = torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 4, 4, 4)
    out = network(x, label, {"low": low})
    clean = {"low": low, "level": torch.zeros(3), "keep": torch.zeros(3, dtype=torch.bool)}
    enlarged = {"low": F.interpolate(low, scale_factor=2, mode="bilinear")}
    torch.testing.assert_close(network(x, label, clean), out)
    torch.testing.assert_close(network(x, label, enlarged), out)
    for changed in ({"low": low, "level": torch.full((3,), 0.7)}, {"low": -low}):
        assert (network(x, label, changed) - out).abs().amax((1, 2, 3)).min() > 1e-4
    with pytest.raises(ValueError, match="must have 4 channels, got none"):
        network(x, label, {})


def convolutions_by_side(network: nn.Module, *args) -> dict[int, int]:
    """How many 3 x 3 convolutions write a map of each side."""
    sides: dict[int, int] = {}

    def count(module, _, out):
        if module.kernel_size == (3, 3):
            sides[out.shape[-1]] = sides.get(out.shape[-1], 0) + 1

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(*args)
    return sides


def test_the_efficient_unet_works_at_low_resolution():
    """Down before, up after: at full size only the first, the last and the last doubling."""
    shared = {"in_channels": 3, "channels": 8, "channel_mult": (1, 2)}
    config = EfficientUNetConfig(blocks=(1, 3), attention=(0, 0), low_channels=0, **shared)
    plain = UNetConfig(blocks=2, head_width=8, **shared)
    args = torch.randn(1, 3, 16, 16), torch.rand(1)
    # per level: the halving, two per residual block each way, the doubling of the level below
    assert convolutions_by_side(EfficientUNet(config), *args) == {16: 3, 8: 1 + 4 + 1, 4: 1 + 12}
    assert convolutions_by_side(UNet(plain), *args)[16] == 1 + 2 * 2 + 1 + 2 * 3 + 1


def test_the_efficient_unet_scales_its_skips(tiny, awake):
    """With the way up's first level silenced, its input is the skip alone, over sqrt 2."""
    network = awake(tiny("efficient_unet", contexts=()))
    seen = {}
    network.down[0].register_forward_hook(lambda m, _, out: seen.update(down=out))
    network.up[1].register_forward_pre_hook(lambda m, args: seen.update(up=args[0]))
    network(torch.randn(1, 4, 8, 8), torch.rand(1))
    joined, skip = seen["up"], seen["down"]
    assert joined.shape[1] == 2 * skip.shape[1]
    torch.testing.assert_close(joined[:, skip.shape[1] :] * 2**0.5, skip)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("unet", {"channels": 20}, "multiple of 8"),
        ("unet", {"attention": (1,)}, "one number per level"),
        ("unet", {"head_width": 24}, "must divide"),
        ("unet", {"blocks": 0}, "at least 1"),
        ("efficient_unet", {"blocks": (1,)}, "one number per level"),
        ("efficient_unet", {"head_width": 3}, "must divide"),
        ("efficient_unet", {"channels": 12}, "multiple of 8"),
    ],
)
def test_configs_are_refused_with_a_reason(tiny, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(kind, **changes)


def test_contexts_must_say_what_they_bring():
    with pytest.raises(ValueError, match="neither tokens nor a pooled vector"):
        ContextConfig("clip")
    with pytest.raises(ValueError, match="set pooled_width"):
        ContextConfig("clip", 12, 0, 4)
