"""darkroom plan: counts of what would be trained and stored, and nothing is fetched or written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from flows.plan import encoder_shapes, plan
from flows.presets import PRESETS
from flows.recipe import RecipeError, load
from training import accelerators, planning, stages
from training.denoising import PREVIEWED
from training.generator import StageSampler
from training.stages import reconstruct

AT_SCALE = ("latent-unet-256", "latent-dit-256", "latent-dit-512")
PUBLISHED = ("sd-512", "glide-64-256", "imagen-64-256-1024", "unclip-64-256-1024")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


SMALL = 'base.config.network={"kind": "dit", "width": 32, "depth": 1, "head_width": 16}'
PRETRAINED = [
    "autoencoder.pretrained=stabilityai/sd-vae-ft-mse",
    "clip.pretrained=laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "t5.pretrained=google/flan-t5-xl",
]
QUICK = [SMALL, *PRETRAINED]


def test_a_plan_adds_up(home):
    words = [SMALL, 'autoencoder.config={"network": {"channels": 8}}', *PRETRAINED[1:]]
    told = plan("shapes", words, device="h100", workers=2, price=3.0)
    assert list(told["stages"]) == ["autoencoder", "base"]
    base = told["stages"]["base"]
    assert (base["batch"], base["workers"], base["rows_at_once"]) == (64, 2, 32)
    assert base["images"] == pytest.approx(100_000, abs=64)
    assert base["fits"]
    memory = dict(base["memory"])
    assert memory.pop("total") == sum(memory.values())
    hours = [it["images"] / it["images_per_second"] / 3600 for it in told["stages"].values()]
    assert told["device_hours"] == pytest.approx(2 * sum(hours))
    assert told["cost"] == pytest.approx(3 * told["device_hours"])
    stored = told["storage"]
    each = dict(stored["bytes_per_sample"])
    assert stored["samples"] == 24_000
    assert each["pixels"] == 3 * 32 * 32
    assert each["latents"] == 2 * 2 * 4 * 8 * 8  # half precision, mean and log-variance
    assert each.pop("total") == pytest.approx(sum(each.values()))
    assert stored["total_bytes"] == pytest.approx(24_000 * sum(each.values()))
    for word in (
        "autoencoder",
        "2 x 32",
        "activations",
        "device-hours",
        "assumptions",
        "29 tokens",
    ):
        assert word in told["text"]
    assert max(map(len, told["text"].splitlines())) <= 120
    assert not list(home.iterdir()), "nothing is written"


def test_it_counts_the_stage_that_a_run_would_train():
    told = plan("shapes", QUICK, device="h100")
    recipe = load("shapes", QUICK)
    config = stages.config_of("base", recipe.base.config)
    stage = stages.create("base", planning.informed(config, encoder_shapes(recipe)))
    counted = told["stages"]["base"]["parameters"]
    assert counted == sum(p.numel() for p in stage.parameters())
    assert {c.width for c in stage.config.network.contexts} == {2 * 768, 2048}


def test_to_learn_what_is_lacking_costs_what_the_whole_does():
    """The mean is added to what the network says: it has no weights, and is no matrix product."""
    told = {
        residual: plan(
            "shapes-sr3",
            [f"base.config.low.residual={json.dumps(residual)}", PRETRAINED[1]],
            device="h100",
        )["stages"]["base"]
        for residual in (True, False)
    }
    stage = stages.create("base", stages.config_of("base", load("shapes-sr3").base.config))
    assert stage.config.low.residual
    assert told[True]["parameters"] == sum(p.numel() for p in stage.parameters())
    for key in ("parameters", "flops_per_image", "forward_flops_per_image", "checkpoint_bytes"):
        assert told[True][key] == told[False][key]


def test_alignment_is_counted_with_the_network_that_it_looks_through():
    """The recipe's own CLIP, which is not trained yet: it only looks, and its weights are held."""
    asked = 'base.config.alignment={"block": 1, "hidden": 256}'
    quick = ["autoencoder.pretrained=stabilityai/sd-vae-ft-mse", "t5.pretrained=google/flan-t5-xl"]
    plain, aligned = (plan("shapes", [*quick, *it], device="h100") for it in ([], [asked]))
    one, other = plain["stages"]["base"], aligned["stages"]["base"]
    channels = load("shapes").base.config["network"]["channels"]
    projector = (channels + 1) * 256 + 257 * 256 + 257 * 512
    assert other["parameters"] - one["parameters"] == projector
    looking = other["memory"]["weights"] - one["memory"]["weights"] - 4 * projector
    assert 0 < looking < 4 * plain["stages"]["clip"]["parameters"]
    looked = other["forward_flops_per_image"] - one["forward_flops_per_image"]
    assert 0 < looked < other["flops_per_image"] - one["flops_per_image"] < 3 * looked
    assert "clip" in load("shapes", [asked]).inputs("base")
    assert load("shapes", [asked]).sees_pixels("base")
    with pytest.raises(RecipeError, match=r"alignment.tower: laion/.* is not here"):
        plan("shapes", [*QUICK, asked], device="h100")


def test_what_is_stored_of_a_data_set_that_is_there_is_read_from_it(home):
    from pipeline import manifest
    from pipeline.manifest import Manifest, Shard

    shards = (Shard("a", "train", 60, 9_000, "0" * 64), Shard("b", "heldout", 40, 1_000, "1" * 64))
    manifest.publish(Manifest(str(home / "datasets" / "shapes"), 1, None, shards))
    stored = plan("shapes", QUICK, device="h100")["storage"]
    assert (stored["samples"], stored["bytes_per_sample"]["pictures"]) == (100, 100.0)
    more = plan("shapes", QUICK, device="h100", samples=7)["storage"]
    assert more["total_bytes"] == pytest.approx(7 * more["bytes_per_sample"]["total"])


def test_without_a_base_no_encodings_are_stored():
    stored = plan("shapes-vae", [], device="h100")["storage"]
    each = dict(stored["bytes_per_sample"])
    assert each.pop("total") == sum(each.values())
    assert set(each) == {"pictures", "pixels"}
    for name, kept in {"shapes": {"latents", "clip", "t5"}, "shapes-sr3": {"clip"}}.items():
        each = plan(name, [], device="h100")["storage"]["bytes_per_sample"]
        assert set(each) == {"pictures", "pixels", "total"} | kept


def test_unknown_encoders_are_planned_and_named():
    told = plan("shapes", [*QUICK, "t5.pretrained=somebody/their-t5"], "h100")
    assert list(told["stages"]) == ["base"]
    warned = "\n".join(told["warnings"])
    assert "t5.pretrained: somebody/their-t5 is not here and not known" in warned
    assert "autoencoder" not in warned
    assert told["storage"]["bytes_per_sample"]["latents"] == 2 * 2 * 4 * (32 / 8) ** 2


def test_buckets_and_mirrors_are_in_the_storage():
    squares = plan("latent-dit-512", ["data.encode.max_aspect=1", SMALL], "h100", samples=10)
    buckets = plan("latent-dit-512", [SMALL], "h100", samples=10)
    flipped = plan("latent-dit-512", [SMALL, "data.encode.flip=true"], "h100", samples=10)
    sizes = [it["storage"]["bytes_per_sample"]["latents"] for it in (squares, buckets, flipped)]
    assert sizes[0] == 2 * 2 * 4 * 64 * 64
    assert sizes[0] < sizes[1] < 1.1 * sizes[0]
    assert sizes[2] == 2 * sizes[1]
    assert any("bucket with the most pixels" in it for it in buckets["assumptions"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"device": "h10"}, r"--device: no device 'h10'; did you mean 'h100'\?"),
        ({"workers": 0}, r"--workers must be at least 1, got 0"),
        (
            {"overrides": ["base.training.micro_batch=16"], "workers": 8},
            r"base.training: micro_batch 16 cuts a batch of 64 into 4, too few for 8 workers",
        ),
        ({"workers": 5}, r"clip.training: .* 5 workers .* do not divide"),
        ({"samples": -3}, r"--samples must be at least 1, got -3"),
        ({"price": -1.0}, r"--price must not be negative, got -1"),
        ({"overrides": ["base.config.network.chanels=8"]}, r"did you mean 'channels'"),
        ({"overrides": ["base.trainin.images=8"]}, r"did you mean 'training'"),
        ({"overrides": ["base.training.btch=8"]}, r"did you mean 'batch'"),
    ],
)
def test_what_is_wrong_is_refused_with_the_nearest(words, told):
    with pytest.raises(RecipeError, match=told):
        plan("shapes", **({"overrides": [], "device": "h100"} | words))


def test_a_wrong_device_is_bad_usage(home):
    command = [sys.executable, "-m", "flows", "plan", "shapes", "--device", "h1000", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'h100'" in json.loads(done.stdout.splitlines()[-1])["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AT_SCALE, *PUBLISHED])
def test_presets_of_real_size_build_and_learn_on_the_meta_device(name):
    recipe = load(name)
    shapes = encoder_shapes(recipe)
    assert all(shape.known == "as published" for shape in shapes.values())
    size = (recipe.data.side, recipe.data.side)
    if recipe.data.encode.max_aspect > 1:
        size = recipe.data.encode.buckets(recipe.data.side)[0]
    for part in recipe.drawing:
        config = planning.informed(stages.config_of("base", recipe.stage(part).config), shapes)
        with torch.device("meta"):
            stage = stages.create("base", config)
            batch = planning.batch_of(config, 2, size, planning.Captions(), shapes)
        stage(batch)["loss"].sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in stage.parameters()), part


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_systems_are_asked_at_states_that_they_learn(name):
    recipe = load(name)
    for part in recipe.drawing:
        diffusion = stages.config_of("base", recipe.stage(part).config).diffusion
        given = recipe.sampler if part == "base" else recipe.samplers[part]
        grid = reconstruct(StageSampler, given).build_grid(diffusion.build_path())
        states = grid * diffusion.table_steps
        if diffusion.times == "discrete":
            torch.testing.assert_close(states, states.round(), atol=1e-9, rtol=0)
        assert grid[0] > 0.95 and grid[-1] == 0


def test_a_caption_is_heard_without_the_embedding_in_a_twentieth():
    """Ramesh et al. 2022, section 5.1: so often unCLIP's decoder learns what GLIDE does."""
    config = load("unclip-64-256-1024").stage("base").config
    assert config["caption_dropout"] == 0
    silences = config["context_dropout"]
    assert silences["clip_image"] * (1 - silences["t5"]) == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_systems_claim_what_the_plan_says(name):
    claimed = " ".join((PRESETS[name].__doc__ or "").split()).partition("By `plan`")[2]
    told = plan(name, [], device="h100", workers=64)
    said = re.findall(r"(prior|base|sr1|sr2) ([\d,]+) M parameters, ([\d,]+) device-hours", claimed)
    assert [part for part, _, _ in said] == list(told["stages"])
    for part, parameters, hours in said:
        it = told["stages"][part]
        assert int(parameters.replace(",", "")) == pytest.approx(it["parameters"] / 1e6, abs=0.51)
        assert int(hours.replace(",", "")) == pytest.approx(it["device_hours"], abs=0.51)
    assert ("not fit" in claimed) == (not all(it["fits"] for it in told["stages"].values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_SCALE)
def test_presets_of_real_size_claim_what_the_plan_says(name):
    claimed = " ".join((PRESETS[name].__doc__ or "").split())
    told = plan(name, [], device="h100", workers=8)
    base = told["stages"]["base"]
    for value, unit in [
        (base["parameters"] / 1e6, " M parameters"),
        (base["flops_per_image"] / 1e9, " GFLOP an image"),
        (base["memory"]["total"] / 1e9, " GB"),
        (told["device_hours"], " device-hours"),
    ]:
        (number,) = re.findall(rf"([\d,]+){unit}", claimed)
        assert int(number.replace(",", "")) == pytest.approx(value, abs=0.51), unit
    assert ("fit" in claimed) == (not base["fits"])


@pytest.mark.parametrize("name", [*AT_SCALE, *PUBLISHED])
def test_presets_of_real_size_are_watched_for_less_than_a_hundredth_of_the_time(name):
    """Against the three forwards of an update, in fp32; who draws keeps all workers waiting."""
    rates, workers = accelerators.accelerator("h100").matmul, 8 if name in AT_SCALE else 64
    recipe = load(name)
    for part in recipe.drawing:
        config = stages.config_of("base", recipe.stage(part).config)
        training = stages.training_of(recipe.stage(part).training)
        side = config.side or recipe.data.side // 8
        pictures = 0 if config.data == "embedding" else max(1, min(16, PREVIEWED // side**2))
        drawn = 2 * config.preview.steps * pictures * workers / training.preview_images
        measured = training.heldout_pictures / training.checkpoint_images
        assert measured > 0
        assert rates["bf16"] / rates["fp32"] * (measured + drawn) / 3 < 0.01, part
        assert training.keep_best
        assert training.patience_images == 0
