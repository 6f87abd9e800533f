"""Autoencoders of diffusers: from a folder, a part of one, a hub id; and what bfloat16 costs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from training.encoders import build, spec_of
from training.encoders.autoencoder import open_codec
from training.encoders.shapes import latent_channels
from training.encoders.sources import open_source

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
CHANNELS = 4


@pytest.fixture
def pixels(scenes) -> np.ndarray:
    """In C order: another one takes another path through a convolution, a last bit apart."""
    return np.ascontiguousarray(scenes[0])


def model_of(kind: str, **config):
    """A small one; its weights are not those it starts with, which are partly zero."""
    import diffusers

    deep = {
        "latent_channels": CHANNELS, "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
    }  # fmt: skip
    configs = {
        "AutoencoderKL": {
            "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": CHANNELS,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        "AutoencoderTiny": {
            "latent_channels": CHANNELS, "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
        },
        "AutoencoderDC": deep | {
            "attention_head_dim": 8,
            "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**configs[kind] | config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


def encoded_by(model, pixels: np.ndarray) -> torch.Tensor:
    """What diffusers' own call gives: mean and log-variance, or the latent."""
    with torch.no_grad():
        found = model.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    if type(model).__name__ == "AutoencoderKL":
        return torch.cat([found.latent_dist.mean, found.latent_dist.logvar], 1)
    return found.latents if type(model).__name__ == "AutoencoderTiny" else found.latent


def rms_error(what: str, half: np.ndarray, single: np.ndarray) -> float:
    """In standard deviations of what is right."""
    error = (half.astype(np.float64) - single) / single.std(dtype=np.float64)
    rms = np.sqrt(np.square(error).mean())
    print(f"{what}: rms {rms:.5f}, most {np.abs(error).max():.4f} standard deviations")
    return rms


def codec_of(where: str):
    return open_codec(open_source(where, "autoencoder"))


@pytest.mark.parametrize("part", ["", "#vae"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_numbers_are_those_of_diffusers(kind, part, tmp_path, pixels):
    import diffusers

    model_of(kind).save_pretrained(tmp_path / part[1:])
    where, pixels = f"{tmp_path}{part}", pixels[:3]
    model = getattr(diffusers, kind).from_pretrained(tmp_path / part[1:]).eval()
    codec = codec_of(where)
    assert {p.dtype for p in codec.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in codec.parameters())
    wanted = encoded_by(model, pixels)
    assert torch.equal(codec.encode(torch.from_numpy(pixels)), wanted)
    spec = spec_of(where, "autoencoder", side=16)
    (field,) = build(spec)(pixels).items()
    assert field[0] == "moments"
    np.testing.assert_array_equal(field[1], wanted.half().numpy())
    posterior = kind == "AutoencoderKL"
    assert wanted.shape == (3, 2 * CHANNELS if posterior else CHANNELS, 8, 8)

    z = wanted[:, :CHANNELS]
    shown = codec.decode(z)
    with torch.no_grad():
        again = ((model.decode(z).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(shown, again)
    assert shown.shape == pixels.shape
    assert latent_channels(where) == CHANNELS
    wide = codec.encode(torch.from_numpy(pixels[:, :, :8]))
    assert wide.shape[2:] == (4, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_neither_shifted_nor_scaled(kind, tmp_path, pixels):
    """A config's factors are for whoever denoises: the base measures its own."""
    factors = {"scaling_factor": 0.3}
    if kind != "AutoencoderDC":
        factors["shift_factor"] = 0.7
    found = []
    for name, config in (("plain", {}), ("scaled", factors)):
        model_of(kind, **config).save_pretrained(tmp_path / name)
        codec = codec_of(str(tmp_path / name))
        z = codec.encode(torch.from_numpy(pixels[:2]))
        found.append((z, codec.decode(z[:, :CHANNELS])))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_are_computed_with_in_single(kind, variant, tmp_path, pixels):
    model = model_of(kind).half()
    model.save_pretrained(tmp_path, variant=variant)
    assert any(".fp16." in file.name for file in tmp_path.iterdir()) == (variant == "fp16")
    codec = codec_of(str(tmp_path))
    assert {p.dtype for p in codec.parameters()} == {torch.float32}
    wanted = encoded_by(model.float(), pixels)
    assert torch.equal(codec.encode(torch.from_numpy(pixels)), wanted)


def test_another_class_is_refused(tmp_path):
    model_of("AutoencoderTiny").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match=r"describes a VQModel, wanted AutoencoderKL, .*TinyF2"):
        codec_of(str(tmp_path))


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The hub's client without a network; its cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache_of_the_hubs_client(offline, tmp_path, pixels):
    model = model_of("AutoencoderTiny")
    repository = offline / "models--someone--tiny"
    model.save_pretrained(repository / "snapshots" / ("a" * 40) / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    model.save_pretrained(tmp_path / "local")
    spec = spec_of("someone/tiny#vae", "autoencoder", side=16)
    assert spec.fingerprint == spec_of(str(tmp_path / "local"), "autoencoder", 16).fingerprint
    wanted = encoded_by(model, pixels[:2]).half().numpy()
    np.testing.assert_array_equal(build(spec)(pixels[:2])["moments"], wanted)


def test_a_hub_id_out_of_reach_says_what_to_do(offline):
    with pytest.raises(ValueError, match=r"someone/else: no such folder, and not fetched .*; give"):
        spec_of("someone/else", "autoencoder", side=16)


def test_bfloat16_is_another_encoder_that_must_be_asked_for(tmp_path, line):
    model_of("AutoencoderTiny").save_pretrained(tmp_path)
    for where, name, side in (
        (str(tmp_path), "autoencoder", 16),
        (line.stages["autoencoder"], "autoencoder", 16),
        (line.stages["clip"], "clip", None),
        (line.stages["t5"], "t5", None),
    ):
        default, single, half = (
            spec_of(where, name, side, **options).fingerprint
            for options in ({}, {"precision": "fp32"}, {"precision": "bf16"})
        )
        assert default == single != half
    with pytest.raises(ValueError, match="precision is 'fp16', wanted fp32 or bf16"):
        spec_of(str(tmp_path), "autoencoder", 16, precision="fp16")


@pytest.mark.parametrize(
    ("kind", "most"),
    [("stage", 0.01), ("AutoencoderKL", 0.02), ("AutoencoderTiny", 0.01), ("AutoencoderDC", 0.05)],
)
def test_latents_in_bfloat16_are_some_percent_off(kind, most, tmp_path, line, pixels):
    """bfloat16 keeps 8 bits: half a unit in the last place is 2^-9, .2 %, and layers add theirs.
    Linear attention, a quotient of two sums, suffers most."""
    where = line.stages["autoencoder"]
    if kind != "stage":
        model_of(kind).save_pretrained(tmp_path)
        where = str(tmp_path)
    single, half = (
        build(spec_of(where, "autoencoder", 16, precision=precision))(pixels)["moments"]
        for precision in ("fp32", "bf16")
    )
    assert half.dtype == np.float16
    assert 1e-4 < rms_error(kind, half, single) < most


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_text_in_bfloat16_is_a_percent_off(name, line, scenes):
    captions = scenes[1]
    found = [
        build(spec_of(line.stages[name], name, precision=precision))(captions)
        for precision in ("fp32", "bf16")
    ]
    (words, pooled), (half_words, half_pooled) = found
    assert half_pooled.dtype == half_words[0].dtype == np.float16
    error = rms_error(f"{name} tokens", np.concatenate(half_words), np.concatenate(words))
    assert 1e-4 < error < 0.01
    assert 1e-4 < rms_error(f"{name} pooled", half_pooled, pooled) < 0.01
