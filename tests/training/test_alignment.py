"""REPA: states that are drawn to a frozen encoder's features, and what must not feel it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from training import checkpoint, encoders, posthoc, results, stages
from training.alignment import Alignment, AlignmentConfig
from training.config import TrainingConfig
from training.encoders.perceptual import patches
from training.encoders.sources import Source
from training.job import Job, run
from training.loop import train
from training.networks import DiTConfig, EfficientUNetConfig, Tap, UNetConfig, build

SIDE = 16
CLIP: dict[str, Any] = {
    "embed": 24,
    "image": {"kind": "vit", "side": SIDE, "patch": 4, "width": 32, "layers": 1},
    "text": {"vocabulary": 600, "context": 16, "width": 16, "layers": 1, "heads": 2},
}
DIT = DiTConfig(in_channels=3, width=32, depth=4, head_width=16, patch=2)
EFFICIENT = EfficientUNetConfig(
    in_channels=3, channels=16, channel_mult=(1, 2), blocks=(1, 1), attention=(0, 1),
    head_width=16, low_channels=0,
)  # fmt: skip
UNET = UNetConfig(in_channels=3, channels=16, channel_mult=(1, 2), attention=(0, 0), head_width=16)


@pytest.fixture(scope="module")
def tower() -> Source:
    """An image tower of ours, of its first weights."""
    torch.manual_seed(1)
    return Source("clip", "clip", False, stages.create("clip", CLIP))


def base(tower: Source, network: Any = DIT, **alignment: Any) -> Any:
    torch.manual_seed(0)
    asked = {"block": 2, "hidden": 64, "width": 32, **alignment}
    config = {"network": network, "data": "pixels", "alignment": asked if alignment else None}
    stage = stages.create("base", stages.config_of("base", config))
    if alignment:
        stage.alignment.tower = tower
    return stage


class Scenes:
    """Endless batches of 8 of the drawn scenes."""

    def __init__(self, scenes):
        self.pixels = scenes[0]

    def batches(self, start_step: int = 0, prefetch: int = 2):
        for step in range(start_step, 10**6):
            position = torch.arange(8 * step, 8 * step + 8).numpy()
            yield {"pixels": self.pixels[position % len(self.pixels)], "position": position}


TRAINING = TrainingConfig(images=8 * 5, batch=8, learning_rate=1e-3, max_grad_norm=0.1)


def test_equal_directions_are_1_and_opposite_ones_minus_1(tower):
    alignment = Alignment(AlignmentConfig(width=32), 32, tower)
    alignment.projector = nn.Identity()
    x = torch.randn(3, 3, SIDE, SIDE).clamp(-1, 1)
    seen = patches(tower)(x)
    assert seen.shape == (3, 32, 4, 4)
    for states, wanted in ((3 * seen, 1.0), (-seen, -1.0)):
        torch.testing.assert_close(alignment(states, x), torch.full((3,), wanted))
    half = torch.cat([seen[:, :, :2], -seen[:, :, 2:]], dim=2)
    torch.testing.assert_close(alignment(half, x), torch.zeros(3), atol=1e-5, rtol=0)
    # States of other places are held against features in between.
    finer = F.interpolate(seen, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(alignment(finer, x), torch.ones(3))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("network", "block"), [(DIT, 2), (UNET, 3), (UNET, 6), (EFFICIENT, 1)])
def test_blocks_before_learn_by_it_and_blocks_after_do_not(tower, network, block, recompute):
    """With all weights off their zeros, through which nothing would pass."""
    network = replace(network, recompute=recompute)
    made = build(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    x = torch.randn(2, 3, SIDE, SIDE).clamp(-1, 1)
    alignment = Alignment(AlignmentConfig(width=32, hidden=16), network.state_width(block), tower)
    tap = Tap(block)
    plain, tapped = made(x, torch.rand(2)), made(x, torch.rand(2), tap=tap)
    assert plain.shape == tapped.shape
    alignment(tap.states, x).sum().backward()
    if isinstance(network, DiTConfig):
        blocks = list(made.blocks)
    elif isinstance(network, EfficientUNetConfig):
        blocks = list(made.down)
        assert all(p.grad is None for p in made.up.parameters())
    else:
        blocks = [it for level in made.down.levels for it in level] + list(made.down.middle)
        assert all(p.grad is None for p in made.up.parameters())
    for number, it in enumerate(blocks, 1):
        reached = [p.grad is not None and bool(p.grad.any()) for p in it.parameters()]
        assert any(reached) == (number <= block), number
    assert all(p.grad.any() for p in alignment.projector.parameters())
    seen = patches(tower).network
    assert not any(p.requires_grad or p.grad is not None for p in seen.parameters())


def test_a_weight_of_0_trains_bit_for_bit_as_without_it(tower, scenes):
    aligned, plain = base(tower, weight=0.0), base(tower)
    told = [
        [(float(p.loss), float(p.grad_norm)) for p in train(it, Scenes(scenes), TRAINING)]
        for it in (aligned, plain)
    ]
    assert told[0] == told[1]
    assert all(norm > TRAINING.max_grad_norm for _, norm in told[0][1:]), "nothing was clipped"
    for name, tensor in plain.state_dict().items():
        assert tensor.equal(aligned.state_dict()[name]), name
    assert aligned.exported().keys() == plain.exported().keys()


@pytest.mark.parametrize("network", [DIT, UNET, EFFICIENT], ids=lambda it: it.kind)
def test_alignment_rises_and_the_picture_is_learnt(tower, scenes, network):
    stage = base(tower, network, weight=0.5)
    config = replace(TRAINING, images=8 * 30, learning_rate=3e-3, max_grad_norm=1.0)
    before = stage.heldout_loss(next(_tensors(scenes))).mean()
    rise = [float(p.metrics["alignment"]) for p in train(stage, Scenes(scenes), config)]
    assert rise[0] < 0.2
    assert sum(rise[-5:]) / 5 > 0.6
    assert stage.heldout_loss(next(_tensors(scenes))).mean() < 0.9 * before


def _tensors(scenes):
    for batch in Scenes(scenes).batches():
        yield {name: torch.from_numpy(it) for name, it in batch.items()}


def test_what_is_looked_at_is_the_loss_without_it(tower, scenes):
    aligned, plain = base(tower, weight=0.5).eval(), base(tower).eval()
    batch = next(_tensors(scenes))
    assert aligned.heldout_loss(batch).equal(plain.heldout_loss(batch))
    found = aligned(batch)
    wanted = plain(batch)["loss"]
    torch.testing.assert_close(found["loss"].mean(), wanted.mean() - 0.5 * found["alignment"])
    torch.testing.assert_close(found["denoising"], wanted.mean())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"network": {"kind": "dit", "depth": 4}}, "alignment.block: there is no block 8.*1 to 4"),
        (
            {"network": {"kind": "unet", "blocks": 2}},
            "alignment.block: there is no block 8.*1 to 6",
        ),
        ({"network": {"kind": "efficient_unet"}}, "alignment.block: there is no block 8.*1 to 4"),
        ({"network": {"kind": "prior"}, "data": "embedding"}, "alignment: .*'prior' has no"),
    ],
)
def test_networks_that_show_no_such_states_are_refused(config, told):
    with pytest.raises(ValueError, match=told):
        stages.config_of("base", {"alignment": {}, **config})


def test_a_tower_that_is_not_known_is_asked_for(tower, scenes):
    with pytest.raises(ValueError, match=r"alignment\.width: it is not known"):
        stages.create("base", {"network": DIT, "alignment": {"block": 1}})
    nobody = base(tower, weight=0.5)
    nobody.alignment.tower = ""
    with pytest.raises(ValueError, match=r"alignment\.tower names no network"):
        nobody(next(_tensors(scenes)))
    with pytest.raises(ValueError, match=r"alignment\.width is 31.*have 32 channels"):
        base(tower, weight=0.5, width=31)(next(_tensors(scenes)))


@pytest.mark.parametrize("side", [0, 28])
def test_of_a_vision_transformer_the_patches_alone_are_taken(tmp_path, side):
    """As DINOv2 with registers has them: normalised, without the class token and the registers."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    prepared = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(prepared | {"image_std": [0.5] * 3})
    )
    size = side or 42
    x = torch.randn(2, 3, size, size).clamp(-1, 1)
    with torch.no_grad():
        found = patches(str(tmp_path), side=side)(x)
        wanted = model(pixel_values=x).last_hidden_state[:, 1 + config.num_register_tokens :]
    assert found.shape == (2, 24, size // 14, size // 14)
    torch.testing.assert_close(found.flatten(2).mT, wanted)
    assert encoders.shapes.patch_width(str(tmp_path)) == 24


def test_a_line_trains_with_its_own_clip_and_leaves_the_projector_behind(line, tmp_path):
    """Latents from one encoding, clean pictures from another; the projector is in checkpoints."""
    from pipeline.encode import pixels_spec

    described = json.loads((Path(line.stages["base"]) / results.JOB).read_bytes())
    pixels = pixels_spec(SIDE)
    described["config"] |= {"alignment": {"block": 2, "hidden": 32}}
    described["training"] |= {"images": 64, "checkpoint_images": 64, "ema_sigma_rel": [0.05, 0.1]}
    described["encodings"] += [
        {"name": pixels.name, "kind": pixels.kind, "fingerprint": pixels.fingerprint}
    ]
    job = Job.from_json({**described, "output": str(tmp_path / "base"), "fingerprint": "aligned"})
    run(job)
    weights = load_file(tmp_path / "base" / results.WEIGHTS)
    assert weights.keys() == load_file(f"{line.stages['base']}/{results.WEIGHTS}").keys()
    (path,) = checkpoint.visible(tmp_path / "base" / results.CHECKPOINTS)
    tensors = checkpoint.load(path).tensors
    for part in ("weights", "ema"):
        assert f"{part}/alignment.projector.0.weight" in tensors
    assert not any("tower" in name or "visual" in name for name in tensors)
    loaded: Any = stages.load(tmp_path / "base")
    assert loaded.config.alignment.width == 32
    assert results.history(tmp_path / "base")[-1]["alignment"] <= 1
    posthoc.export(tmp_path / "base", tmp_path / "longer", 0.07)
    assert stages.load(tmp_path / "longer").exported().keys() == weights.keys()
