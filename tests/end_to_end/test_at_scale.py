"""The presets of real size, narrow and shallow, on a few pictures: everything else is theirs.

Pretrained encoders of the kinds that they name, latents at an eighth of the side, buckets of aspect
ratio, bf16, both kinds of network, and the start at 512 px from the weights learnt at 256 (here:
128 from 64).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    """Folders as the hub's snapshots of AutoencoderKL, open_clip and T5 are."""
    from diffusers import AutoencoderKL
    from open_clip.model import CLIP
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from training import contrastive, stages

    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    levels["up_block_types"] = ("UpDecoderBlock2D",) * 4
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, **levels
    ).save_pretrained(root / "autoencoder")

    text = {"vocabulary": 49408, "context": 77, "width": 16, "heads": 2, "layers": 1}
    image = {"kind": "vit", "side": 16, "width": 32, "layers": 1}
    config = contrastive.model_config(
        stages.config_of("clip", {"embed": 12, "image": image, "text": text})
    )
    (root / "clip").mkdir()
    save_file(CLIP(**config).state_dict(), root / "clip" / "open_clip_model.safetensors")
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (root / "clip" / "open_clip_config.json").write_text(json.dumps(described))

    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 3}
    T5EncoderModel(T5Config(vocab_size=384, **sizes)).save_pretrained(root / "t5")
    ByT5Tokenizer().save_pretrained(root / "t5")
    return {name: str(root / name) for name in ("autoencoder", "clip", "t5")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Squares, wide and tall ones, smooth enough to be told from noise."""
    folder = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    captions = []
    for number in range(90):
        size = ((160, 160), (200, 136), (136, 200))[number % 3]
        seeds = draws.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(seeds).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{number:03d}.png"
        )
        captions.append({"file": f"{number:03d}.png", "caption": f"clouds of colour, no. {number}"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    return str(folder)


NARROW = {
    "unet": {"channels": 32, "context_width": 32, "head_width": 32},
    "dit": {"width": 64, "depth": 2, "head_width": 16},
}


LITTLE = {
    "data.ingest.min_side": 64,
    "data.encode.multiple": 16,
    "executor.kind": "local",
    "base.training.images": 24,
    "base.training.batch": 8,
    "base.training.warmup_images": 0,
    "base.training.log_images": 8,
    "base.training.checkpoint_images": 24,
    "base.training.compile": False,  # a compiler is not on every machine
    "sampler.steps": 2,
    "evaluation.prompts": 16,
    "evaluation.sweep_prompts": 8,
    "evaluation.reference_count": 16,
    "evaluation.train_count": 32,
    "evaluation.kid_block": 8,
    "evaluation.heldout_loss_samples": 16,
    "evaluation.guidance_scales": [2.0],
    "gate.absolute": {},
    "gate.min_samples": 8,
}


@pytest.fixture(scope="module")
def little(encoders, pictures):
    """The overrides that make a preset little."""

    def little(preset: str, side: int, **more: Any) -> list[str]:
        values = LITTLE | {
            **{f"{name}.pretrained": where for name, where in encoders.items()},
            **{f"base.config.network.{k}": v for k, v in NARROW[preset.split("-")[1]].items()},
            "data.sources": [pictures],
            "data.side": side,
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    return little


def stage_of(directory: str) -> dict[str, Any]:
    return json.loads(Path(directory, "stage.json").read_text())


def test_the_unet_trains_in_bf16_on_what_clip_says_alone(darkroom, little):
    done = darkroom("train", "latent-unet-256", "base", *little("latent-unet-256", 64))
    stage = stage_of(done["directory"])
    assert stage["images_seen"] == 24
    assert stage["measured"]["latent_shape"] == [4, 8, 8]
    assert [it["name"] for it in stage["encodings"]] == ["autoencoder", "clip"]
    lines = Path(done["directory"], "history.jsonl").read_text().splitlines()
    losses = [(it["loss"], it["skipped"]) for it in map(json.loads, lines)]
    assert len(losses) == 3
    assert all(np.isfinite(loss) and not skipped for loss, skipped in losses)


def test_the_small_dit_goes_the_whole_way_and_the_large_one_starts_from_it(darkroom, little):
    words = ("train", "latent-dit-512", "base", *little("latent-dit-512", 128))
    assert "latent-dit-256 has no champion here" in darkroom(*words, code=2)["error"]
    first = darkroom("run", "latent-dit-256", *little("latent-dit-256", 64))
    assert first["alias"] == "champion"
    assert np.isfinite(first["scorecard"]["clip_score"])
    directory = darkroom(*words)["directory"]
    large, small = stage_of(directory), stage_of(stage_of(directory)["parent"])
    assert small["measured"]["latent_shape"] == [4, 8, 8]
    assert max(large["measured"]["latent_shape"]) >= 16
    assert large["parameters"] == small["parameters"]
    (latents,) = [it for it in large["encodings"] if it["name"] == "autoencoder"]
    assert [128, 128] in latents["buckets"]
    assert len(latents["buckets"]) > 4
    for name in ("shift", "scale"):  # of the latents that the weights were trained on
        assert large["measured"][name] == small["measured"][name]
    kept, moved = (
        load_file(Path(it, "weights.safetensors"))["network.enter.weight"]
        for it in (large["parent"], directory)
    )
    assert 0 < (moved - kept).abs().max() <= 3 * 1e-4 * 1.1, "3 updates of at most the rate"
