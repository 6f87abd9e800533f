"""Pictures through a frozen network's eyes: known distances, and gradients where they belong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from training import contrastive, stages
from training.encoders.perceptual import load
from training.perceptual import Perceptual, PerceptualConfig, distance

TINY: dict[str, Any] = {"channels": 8, "channel_mult": [1, 2], "latent_channels": 3}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> str:
    """A pretrained CLIP with a ResNet, as open_clip publishes it, batch norms included."""
    from open_clip.model import CLIP

    folder = tmp_path_factory.mktemp("clip")
    image = {"kind": "resnet", "side": 32, "width": 8, "head_width": 32}
    text = {"vocabulary": 600, "context": 16, "width": 16, "heads": 2, "layers": 1}
    config = contrastive.model_config(
        stages.config_of("clip", {"embed": 12, "image": image, "text": text})
    )
    torch.manual_seed(0)
    model = CLIP(**config)
    for norm in model.visual.modules():
        if isinstance(norm, nn.BatchNorm2d):  # residual branches begin at 0, and say nothing then
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.1)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    prepared = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    described = {"model_cfg": config, "preprocess_cfg": prepared}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return str(folder)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_directions_count_and_lengths_do_not():
    along = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    across = along.flip(1)
    for other, wanted in ((3 * along, 0), (across, 2), (-along, 4), (along + across, 2 - 2**0.5)):
        assert distance([along], [other]).item() == pytest.approx(wanted, abs=1e-5)
    assert distance([along, along], [across, along]).item() == pytest.approx(1, abs=1e-5)
    half = torch.cat([along[..., :2], across[..., :2]], dim=-1)
    assert distance([along], [half]).item() == pytest.approx(1, abs=1e-5)


def test_where_all_channels_are_silent_the_gradient_is_finite():
    silent = torch.zeros(1, 3, 2, 2, requires_grad=True)
    distance([torch.ones(1, 3, 2, 2)], [silent]).sum().backward()
    assert silent.grad is not None and silent.grad.isfinite().all()
    assert silent.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["stage", "resnet"])
def test_equal_pictures_are_0_apart_and_blurred_ones_further_the_more(kind, line, resnet, scenes):
    perceptual = Perceptual(line.stages["clip"] if kind == "stage" else resnet)
    x = torch.from_numpy(scenes[0][:8]).float() / 127.5 - 1
    assert not perceptual(x, x.clone()).any()
    apart = [perceptual(x, blurred(x, size)) for size in (3, 5, 9)]
    assert (apart[0] > 0).all()
    means = [it.mean().item() for it in apart]
    assert means == sorted(means)
    torch.testing.assert_close(perceptual(x[2:4], blurred(x, 5)[2:4]), apart[1][2:4])


def blurred(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.avg_pool2d(F.pad(x, [size // 2] * 4, mode="replicate"), size, 1)


def test_it_is_lpips_of_the_towers_own_maps(resnet):
    """Against its own blocks, prepared as its config says, at a size it was not made for."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{resnet}", precision="fp32", load_weights=True)
    visual: Any = model.visual.eval()
    x, y = noise(2, 3, 48, 64), noise(2, 3, 48, 64, seed=1)

    def maps(it):
        mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
        found = [visual.stem(((it + 1) / 2 - mean) / std)]
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            found.append(layer(found[-1]))
        return found

    wanted = sum(
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(maps(x), maps(y), strict=True)
    )
    found = Perceptual(resnet)(x, y)
    torch.testing.assert_close(found, wanted / 5, rtol=1e-3, atol=1e-4)


def stage_with(tower: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return stages.create(
        "autoencoder",
        {"network": TINY, "perceptual": {"tower": tower, "weight": 2.0}, **config},
    )


def rows(scenes) -> dict[str, Any]:
    return {"pixels": torch.from_numpy(scenes[0][:4]), "position": torch.arange(4)}


def test_the_tower_is_frozen_and_no_part_of_the_stage(resnet, scenes):
    """Batch norms would show training mode: their statistics move with every look."""
    stage = stage_with(resnet).train()
    plain = stages.create("autoencoder", {"network": TINY})
    before = stage.perceptual.features(torch.device("cpu"))(noise(2, 3, 16, 16))
    stage(rows(scenes))["loss"].sum().backward()
    after = stage.perceptual.features(torch.device("cpu"))(noise(2, 3, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert stage.state_dict().keys() == plain.state_dict().keys()
    assert {n for n, _ in stage.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert all(p.grad is not None for p in stage.parameters())


def test_its_gradient_is_in_the_second_picture_alone(resnet):
    x, y = noise(2, 3, 32, 32).requires_grad_(), noise(2, 3, 32, 32, seed=1).requires_grad_()
    Perceptual(resnet)(x, y).sum().backward()
    assert x.grad is None
    assert y.grad is not None and y.grad.abs().amax((1, 2, 3)).min() > 0


def test_the_stage_adds_it_with_its_weight(line, scenes):
    tower = line.stages["clip"]
    stage, plain = stage_with(tower), stages.create("autoencoder", {"network": TINY})
    plain.load_state_dict(stage.state_dict())
    told, without = stage(rows(scenes)), plain(rows(scenes))
    added = (told["loss"] - without["loss"]).mean()
    assert told["perceptual"] > 1e-3
    torch.testing.assert_close(added, 2 * told["perceptual"], rtol=1e-3, atol=1e-5)


def test_the_lines_own_clip_is_the_input(line, scenes):
    config = {"network": TINY, "perceptual": {}}
    found = stages.create("autoencoder", config, {"clip": line.stages["clip"]})
    assert found.perceptual.tower == line.stages["clip"]
    assert found(rows(scenes))["perceptual"] > 0
    lost = stages.create("autoencoder", config)  # as when a finished one is loaded: it may be gone
    assert lost.encode(rows(scenes)["pixels"]).shape == (4, 6, 4, 4)
    with pytest.raises(ValueError, match="names no network and the stage has no input 'clip'"):
        lost(rows(scenes))


def test_a_tower_that_optimises_pixels_brings_them_near(resnet):
    """What a gradient is for: descending it from noise, the distance falls by half."""
    perceptual, x = Perceptual(resnet), noise(1, 3, 32, 32)
    y = noise(1, 3, 32, 32, seed=2).requires_grad_()
    first = perceptual(x, y).item()
    for _ in range(40):
        (slope,) = torch.autograd.grad(perceptual(x, y).sum(), y)
        with torch.no_grad():
            y -= 0.5 * slope / slope.norm()
    assert perceptual(x, y).item() < 0.5 * first


@pytest.mark.parametrize("kind", ["resnet", "vit", "timm"])
def test_vision_models_of_transformers(kind, tmp_path):
    """Their own hidden states: those of a ResNet at any size, of a ViT at the one it reads."""
    from transformers import (
        ResNetConfig,
        ResNetModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    torch.manual_seed(0)
    prepared = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    if kind == "timm":
        made_of_timm(tmp_path)
        channels, side = 96, None
    elif kind == "resnet":
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
        ResNetModel(config).save_pretrained(tmp_path)
        channels, side = 16, None
    else:
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=7,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=24,
            patch_size=8,
        )
        ViTModel(config).save_pretrained(tmp_path)
        channels, side = 16, 24
    if kind != "timm":
        ViTImageProcessor(**prepared).save_pretrained(tmp_path)
    x = noise(2, 3, 32, 32).requires_grad_()
    maps = load(str(tmp_path))(x)
    assert len(maps) == {"resnet": 3, "vit": 5, "timm": 5}[kind]
    assert maps[-1].shape[:2] == (2, channels)
    assert maps[-1].shape[2:] == ((10, 1) if side else maps[-1].shape[2:])
    distance(load(str(tmp_path))(noise(2, 3, 32, 32, seed=1)), maps).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    if kind == "resnet":
        model = ResNetModel.from_pretrained(tmp_path).eval()
        mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
        seen = ((x + 1) / 2 - mean) / std
        wanted = model(pixel_values=seen, output_hidden_states=True).hidden_states
        for ours, theirs in zip(maps, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def made_of_timm(folder) -> None:
    """A small network in the form timm publishes them, VGGs among them."""
    import timm

    model = timm.create_model("test_resnet", pretrained=False)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    described = {
        "architecture": "test_resnet",
        "num_classes": 1000,
        "pretrained_cfg": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "input_size": [3, 160, 160],
        },
    }
    (folder / "config.json").write_text(json.dumps(described))


def test_what_is_no_tower_is_refused_with_a_reason(line, tmp_path):
    with pytest.raises(ValueError, match="is a stage of kind 't5', wanted clip"):
        load(line.stages["t5"])
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no vision model of transformers and no CLIP"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="weight must be positive"):
        PerceptualConfig(weight=0)
