"""The base stage: what it is told, and when not; draws by position; latents of deviation 1."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import denoising, stages
from training.diffusion import DiffusionConfig, SamplerConfig, classifier_free, uniform
from training.networks import ContextConfig
from training.results import JOB, committed, history
from training.stage import to_tensors
from training.stages import reconstruct

TINY = {"channels": 8, "channel_mult": [1], "attention": [1], "head_width": 8, "blocks": 1}
FIELDS = ("autoencoder", "clip", "t5")


@pytest.fixture(scope="module")
def base(line):
    return stages.load(line.stages["base"])


@pytest.fixture(scope="module")
def batch(line):
    return to_tensors(line.loader(*FIELDS).batch(0))


class Still:
    """A loader of one batch."""

    def __init__(self, batch):
        self.whole, self.samples = batch, len(batch["position"])

    def batch(self, step):
        return self.whole

    def rows(self, indices):
        kept = {n: v[indices] if isinstance(v, np.ndarray) else v for n, v in self.whole.items()}
        return kept | {"position": np.asarray(indices)}


def random_batch(rows=8, channels=3, side=4):
    draws = np.random.default_rng(0)
    moments = draws.normal(size=(rows, 2 * channels, side, side)).astype(np.float16)
    return {"moments": moments, "position": np.arange(rows)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "network",
    [{}, {"kind": "dit", "width": 32, "depth": 2, "head_width": 8, "feedforward": 2}],
    ids=["unet", "dit"],
)
def test_compiled_it_has_the_losses_that_it_has_otherwise(line, tmp_path, network):
    """Within 1e-5 of their value. In a process of its own: no compiler sees through what checks
    shapes here."""
    outputs = [tmp_path / "plain", tmp_path / "compiled"]
    for output in outputs:
        asked = json.loads(Path(line.stages["base"], JOB).read_bytes())
        asked["config"]["network"] = network or asked["config"]["network"]
        asked["training"] |= {"images": 96, "log_images": 16, "threads": 1}
        asked["training"]["compile"] = output.name == "compiled"
        Path(f"{output}.json").write_text(json.dumps(asked | {"output": str(output)}))
    script = """
import json, sys
from training.job import Job, run
for path in sys.argv[1:]:
    run(Job.from_json(json.load(open(path))))
"""
    command = [sys.executable, "-c", script, *(f"{output}.json" for output in outputs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    wanted, found = ([it["loss"] for it in history(output)] for output in outputs)
    assert len(wanted) == 6
    assert found == pytest.approx(wanted, rel=1e-5)


def test_its_learning_lowers_the_loss(line):
    losses = [record["loss"] for record in line.history("base")]
    assert np.mean(losses[-3:]) < losses[0] - 0.2
    measured = committed(line.stages["base"])["measured"]
    assert measured["heldout_fixed_loss"] == pytest.approx(measured["fixed_loss"], rel=0.3)


def test_what_the_config_leaves_out_is_taken_from_the_inputs(base):
    network = base.config.network
    assert network.in_channels == 3
    assert network.contexts == (ContextConfig("clip", 64, 24), ContextConfig("t5", 32, 32))


def test_it_listens_to_whom_it_is_told(line):
    inputs = {n: line.stages[n] for n in FIELDS}
    made = stages.create("base", {"network": TINY, "listens": ["t5"]}, inputs)
    assert [c.name for c in made.config.network.contexts] == ["t5"]
    assert (
        stages.create("base", {"network": TINY, "listens": []}, inputs).config.network.contexts
        == ()
    )
    with pytest.raises(
        ValueError, match="listens names glove, the inputs are autoencoder, clip, t5"
    ):
        stages.create("base", {"network": TINY, "listens": ["glove"]}, inputs)


def test_what_all_captions_share_is_taken_from_features_that_are_standardized():
    """A large vector that all share: without it the features are as if it had not been there."""
    draws = np.random.default_rng(0)
    rows, length, width = 64, 5, 8
    mask = np.arange(length) < draws.integers(1, length + 1, (rows, 1))
    words = draws.normal(size=(rows, length, width))
    pooled = draws.normal(size=(rows, width))
    shared, spread = draws.normal(size=width) * 50, np.geomspace(0.01, 10, width)

    def stage_of(standardized, offset, scale):
        found = random_batch(rows=rows) | {
            "t5_tokens": (np.where(mask[:, :, None], words * scale + offset, 1e4)).astype("f4"),
            "t5_mask": mask,
            "t5_pooled": (pooled * scale + offset).astype("f4"),
        }
        network = {**TINY, "in_channels": 3, "contexts": [{"name": "t5", "width": width,
            "pooled_width": width, "standardized": standardized}]}  # fmt: skip
        torch.manual_seed(0)
        stage = stages.create("base", {"network": network})
        with torch.no_grad():
            for it in stage.parameters():
                it.add_(torch.randn_like(it) * 0.1)
        stage.prepare(Still(found))
        told = stage.network.conditioning(torch.zeros(rows), stage.cond(to_tensors(found)))
        return stage, told

    plain, given = stage_of(True, shared, spread), stage_of(True, 0, 1)
    for one, other in zip(plain[1], given[1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    standards = dict(plain[0].network.conditioning.contexts[0].standards)
    real = torch.tensor(words[mask] * spread + shared, dtype=torch.float32)
    standard = standards["tokens"](real)
    torch.testing.assert_close(standard.mean(0), torch.zeros(width), atol=1e-2, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(width), atol=1e-2, rtol=0)
    held = {name for name in plain[0].exported() if ".standards." in name}
    assert len(held) == 4, "a finished stage carries what was measured"
    # Else the vector drowns what captions differ in.
    apart = [it.embedding.std(0).mean() for _, it in (stage_of(False, shared, spread), plain)]
    assert apart[0] < 0.5 * apart[1]


def test_who_is_standardized_must_be_heard(line):
    inputs = {n: line.stages[n] for n in FIELDS}
    made = stages.create("base", {"network": TINY, "standardized": ["t5"]}, inputs)
    assert [c.standardized for c in made.config.network.contexts] == [False, True]
    config = {"network": TINY, "listens": ["clip"], "standardized": ["t5"]}
    with pytest.raises(ValueError, match="standardized names t5, heard are clip"):
        stages.create("base", config, inputs)


def test_widths_that_the_encoders_do_not_have_are_refused(line):
    inputs = {n: line.stages[n] for n in FIELDS}
    wrong = {**TINY, "contexts": [{"name": "clip", "width": 77}]}
    with pytest.raises(ValueError, match=r"clip has width 77 .* the encoder gives 64 and 24"):
        stages.create("base", {"network": wrong}, inputs)
    with pytest.raises(ValueError, match="in_channels is 7, the autoencoder has 3"):
        stages.create("base", {"network": {**TINY, "in_channels": 7}}, inputs)


def test_latents_are_those_that_the_autoencoder_measured(line, base):
    measured = committed(line.stages["autoencoder"])["measured"]
    assert base.shift.tolist() == pytest.approx(measured["shift"])
    assert base.scale.tolist() == pytest.approx(measured["scale"])
    assert base.latent_shape.tolist() == [3, 4, 4]
    z = base.latents(to_tensors(line.loader(*FIELDS).rows(np.arange(64))), 3)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.12, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.12, rtol=0)


def test_latents_of_an_unknown_autoencoder_are_measured():
    found = random_batch(rows=256)
    found["moments"][:, :3] = found["moments"][:, :3] * 4 + 2
    found["moments"][:, 3:] = -20
    stage = stages.create("base", {"network": {**TINY, "in_channels": 3}})
    stage.prepare(Still(found))
    z = stage.latents(to_tensors(found), 0)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        stage.unscaled(z), to_tensors(found)["moments"][:, :3], atol=1e-2, rtol=0
    )


@pytest.mark.parametrize(
    ("high", "wide", "side"), [(6, 6, 6), (88, 48, 64), (52, 76, 64), (12, 20, 16)]
)
def test_what_is_drawn_is_square_whatever_most_pictures_are(high, wide, side):
    """The sizes are some of buckets(64, multiple=8 or 4) and of buckets(16, multiple=4)."""
    moments = np.zeros((2, 6, high, wide), np.float16)
    stage = stages.create("base", {"network": {**TINY, "in_channels": 3}})
    stage.adapt(Still({"moments": moments, "position": np.arange(2)}))
    assert stage.latent_shape.tolist() == [3, side, side]


def test_measuring_again_measures_the_same():
    found = random_batch(rows=64)
    stage = stages.create("base", {"network": {**TINY, "in_channels": 3}})
    stage.prepare(Still(found))
    first = stage.scale.clone()
    stage.prepare(Still(found))
    assert torch.equal(stage.scale, first)


def test_a_transformer_takes_the_place_of_the_unet(line):
    network = {"kind": "dit", "width": 16, "depth": 1, "head_width": 8, "patch": 2}
    made = stages.create("base", {"network": network}, {n: line.stages[n] for n in FIELDS})
    assert made.config.network.in_channels == 3
    made.prepare(loader := line.loader(*FIELDS))
    assert made(to_tensors(loader.batch(0)))["loss"].shape == (16,)


def test_encoders_without_a_posterior_give_the_latent_itself():
    found = random_batch()
    found["moments"] = found["moments"][:, :3]
    stage = stages.create("base", {"network": {**TINY, "in_channels": 3}})
    z = stage.latents(to_tensors(found), 0)
    assert torch.equal(z, to_tensors(found)["moments"])


def test_pixels_can_be_denoised_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)
    stage = stages.create("base", {"network": TINY, "data": "pixels", "preview": {"steps": 2}})
    stage.prepare(Still(found := {"pixels": pixels, "position": np.arange(4)}))
    assert torch.equal(stage.latents(to_tensors(found), 0), torch.from_numpy(pixels) / 127.5 - 1)
    assert stage.preview(Still(found), 0).shape == (4, 8, 8, 3)


def test_an_untrained_network_costs_the_variance_of_its_target():
    """Its output is 0 and the target eps - x0: 1 and the latents' second moment, scaled to 1."""
    stage = stages.create("base", {"network": {**TINY, "in_channels": 3}})
    found = random_batch(rows=256)
    found["moments"][:, 3:] = -20
    stage.prepare(Still(found))
    assert stage(to_tensors(found))["loss"].mean().item() == pytest.approx(2, abs=0.05)


def test_a_row_is_drawn_by_its_position_alone(base, batch):
    whole = base(batch)["loss"]
    part = {n: v[4:7] for n, v in batch.items() if isinstance(v, torch.Tensor)}
    torch.testing.assert_close(base(part)["loss"], whole[4:7], rtol=1e-4, atol=1e-5)
    later = {**batch, "position": batch["position"] + 16}
    assert (base(later)["loss"] != whole).all()


def told(stage, batch):
    """The conditions that the network sees in one forward pass."""
    seen = []
    hook = stage.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    stage(batch)
    hook.remove()
    return seen[0]


def test_captions_are_dropped_row_by_row_as_often_as_asked(base, batch):
    few = {
        n: v[:1].expand(2000, *v.shape[1:]) for n, v in batch.items() if isinstance(v, torch.Tensor)
    }
    few["position"] = torch.arange(2000)
    base.config = replace(base.config, caption_dropout=0.3, context_dropout=0.2)
    try:
        cond = told(base, few)
    finally:
        base.config = replace(base.config, caption_dropout=0.1, context_dropout=0.0)
    assert torch.equal(cond["keep"], uniform(0, "keep", few["position"]) >= 0.3)
    # Within four deviations of a binomial.
    for name, share in {"keep": 0.7, "clip_keep": 0.8, "t5_keep": 0.8}.items():
        assert cond[name].float().mean().item() == pytest.approx(
            share, abs=4 * (0.21 / 2000) ** 0.5
        )
    both = (cond["clip_keep"] & cond["t5_keep"]).float().mean().item()
    assert both == pytest.approx(0.64, abs=0.045), "the encoders are dropped independently"


def test_each_encoder_falls_silent_as_often_as_is_asked_of_it(base, batch):
    few = {
        n: v[:1].expand(2000, *v.shape[1:]) for n, v in batch.items() if isinstance(v, torch.Tensor)
    }
    few["position"] = torch.arange(2000)
    usual = base.config
    try:
        seen = []
        for dropout in ({"clip": 0.1, "t5": 0.5}, {"t5": 0.5}, {"clip": 0.2, "t5": 0.2}, 0.2):
            base.config = replace(usual, caption_dropout=0.0, context_dropout=dropout)
            seen.append(told(base, few))
    finally:
        base.config = usual
    unlike, alone, alike, one = seen
    for name, share in {"clip": 0.1, "t5": 0.5}.items():
        dropped = ~unlike[f"{name}_keep"]
        assert torch.equal(dropped, uniform(0, f"keep/{name}", few["position"]) < share)
        # Within four deviations of a binomial.
        away = 4 * (share * (1 - share) / 2000) ** 0.5
        assert dropped.float().mean().item() == pytest.approx(share, abs=away)
    silent = (~unlike["clip_keep"] & ~unlike["t5_keep"]).float().mean().item()
    assert silent == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 2000) ** 0.5), "the product"
    assert "clip_keep" not in alone, "who is not named loses nothing"
    assert torch.equal(alone["t5_keep"], unlike["t5_keep"])
    for name in ("clip_keep", "t5_keep"):
        assert torch.equal(alike[name], one[name]), "one number is the same for all"


def test_a_row_that_lost_every_encoder_is_what_guidance_leads_away_from(base, batch):
    cond, x, t = base.cond(batch), torch.randn(16, 3, 4, 4), torch.full((16,), 0.5)
    gone = torch.zeros(16, dtype=torch.bool)
    silent = {**cond, "clip_keep": gone, "t5_keep": gone}
    with torch.no_grad():
        away = classifier_free(0.0)(base.model)(x, t, cond)
        assert torch.equal(base.model(x, t, silent), away)
        half = base.model(x, t, {**cond, "t5_keep": gone})
    assert (half - away).abs().max() > 1e-4
    assert (half - base.model(x, t, cond)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_dropout": 1.0}, r"base: context_dropout must lie in \[0, 1\), got 1.0"),
        (
            {"context_dropout": {"t5": 0.5, "clip": -0.1}},
            r"base: context_dropout.clip must lie in \[0, 1\), got -0.1",
        ),
        ({"context_dropout": {"t5": "half"}}, r"base.context_dropout.t5: got 'half', wanted float"),
        ({"context_dropout": "half"}, r"base.context_dropout: got 'half', wanted float"),
        (
            {"context_dropout": {"t5": 0.5, "glove": 0.5}, "listens": ["clip", "t5"]},
            "context_dropout names glove, heard are clip, t5",
        ),
        ({"context_dropout": {"t5": 0.5}, "listens": []}, "names t5, heard are none"),
    ],
)
def test_what_cannot_fall_silent_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        stages.config_of("base", change)


def test_who_falls_silent_must_be_heard(line):
    inputs = {n: line.stages[n] for n in FIELDS}
    made = stages.create("base", {"network": TINY, "context_dropout": {"t5": 0.5}}, inputs)
    assert made.config.silences == {"clip": 0.0, "t5": 0.5}
    described = json.loads(json.dumps(asdict(made.config)))
    assert stages.config_of("base", described) == made.config
    with pytest.raises(ValueError, match="context_dropout names glove, heard are clip, t5"):
        stages.create("base", {"network": TINY, "context_dropout": {"glove": 0.5}}, inputs)


def test_without_dropout_nothing_is_dropped_on_fixed_triples(base, batch):
    first, second = base.heldout_loss(batch, 4), base.heldout_loss(batch, 4)
    assert torch.equal(first, second)
    assert not torch.equal(first, base.heldout_loss(batch, 5))
    seen = []
    hook = base.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    base.heldout_loss(batch)
    hook.remove()
    assert set(seen[0]) == {
        f"{e}_{part}" for e in ("clip", "t5") for part in ("tokens", "mask", "pooled")
    }


def test_a_dropped_caption_has_no_say(base, batch):
    nothing = {**base.cond(batch), "keep": torch.zeros(16, dtype=torch.bool)}
    other = {n: v.flip(0) for n, v in nothing.items()}
    x, label = torch.randn(16, 3, 4, 4), torch.zeros(16)
    torch.testing.assert_close(base.network(x, label, nothing), base.network(x, label, other))
    heard = {**base.cond(batch), "keep": torch.ones(16, dtype=torch.bool)}
    assert (base.network(x, label, heard) - base.network(x, label, nothing)).abs().max() > 1e-4


@pytest.mark.parametrize("diffusion", ["v", "edm", "eps", "learned variance", "uncertainty"])
def test_other_diffusions_train_through_the_same_stage(diffusion):
    config = {
        "v": {"path": "cosine", "prediction": "v", "weight": "min_snr"},
        "edm": {"path": "edm", "prediction": "edm", "times": "lognormal", "times_mean": -1.2},
        "eps": {"path": "ddpm_linear", "prediction": "eps", "times": "discrete"},
        "learned variance": {"path": "ddpm_cosine", "prediction": "eps", "times": "discrete"},
        "uncertainty": {"path": "edm", "prediction": "edm", "uncertainty": True},
    }[diffusion]
    torch.manual_seed(0)
    network = {**TINY, "in_channels": 3, "learned_variance": diffusion == "learned variance"}
    stage = stages.create("base", {"network": network, "diffusion": config})
    found = random_batch(rows=32)
    stage.prepare(Still(found))
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = stage(to_tensors(found))["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_learned_variance_is_trained_and_drawn_with():
    """The bound alone moves it, and sampling by it needs no second call."""
    network = {**TINY, "in_channels": 3, "learned_variance": True}
    diffusion = {"path": "ddpm_linear", "prediction": "eps", "times": "discrete"}
    preview = {"kind": "ddim", "eta": 1.0, "steps": 5, "variance": "learned"}
    described = {"network": network, "diffusion": diffusion, "preview": preview}
    stage = stages.create("base", described)
    found = random_batch(rows=32)
    stage.prepare(Still(found))
    head = [p for p in stage.network.parameters() if p.shape[:1] == (6,)]
    assert head, "no output of twice the channels"
    stage(to_tensors(found))["loss"].mean().backward()
    assert all((p.grad[3:] != 0).any() for p in head)
    calls = []
    stage.network.register_forward_pre_hook(lambda *_: calls.append(1))
    config = reconstruct(SamplerConfig, preview)
    x = config.sample(stage.model, torch.randn(2, 3, 4, 4))
    assert x.shape == (2, 3, 4, 4)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="learned_variance and diffusion.uncertainty"):
        stages.create("base", {**described, "diffusion": {"uncertainty": True}})


def test_a_learned_uncertainty_weighs_training_alone():
    described = {
        "network": {**TINY, "in_channels": 3},
        "diffusion": {"path": "edm", "prediction": "edm", "uncertainty": True},
    }
    stage, batch = stages.create("base", described), to_tensors(random_batch())
    before = stage(batch)["loss"], stage.heldout_loss(batch)
    with torch.no_grad():
        stage.uncertainty.linear.weight += 0.1
    assert (stage(batch)["loss"] != before[0]).all()
    assert torch.equal(stage.heldout_loss(batch), before[1])


def test_previews_of_large_pictures_are_fewer(line, base, monkeypatch):
    base.inputs = {"autoencoder": line.stages["autoencoder"]}
    places = math.prod(base.latent_shape.tolist()[1:])
    for room, count in ((3 * places + 1, 3), (places - 1, 1), (99 * places, 16)):
        monkeypatch.setattr(denoising, "PREVIEWED", room)
        assert len(base.preview(line.loader(*FIELDS), 0)) == count


def test_previews_are_drawn_from_fixed_captions(line, base):
    base.inputs = {"autoencoder": line.stages["autoencoder"]}
    first = base.preview(line.loader(*FIELDS), 0)
    assert first.shape == (16, 16, 16, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(base.preview(line.loader(*FIELDS), 0), first)
    assert (base.preview(line.loader(*FIELDS), 1) != first).any()
    calls, beats = [], []
    counted = base.network.register_forward_hook(lambda *_: calls.append(len(beats)))
    base.preview(line.loader(*FIELDS), 0, lambda: beats.append(len(calls)))
    counted.remove()
    assert calls == list(range(len(beats))), "a sign of life after each call of the network"
    assert len(beats) > 1
    assert not any("codec" in name for name in base.state_dict())


def test_a_batch_that_lacks_words_is_refused(base, batch):
    without = {n: v for n, v in batch.items() if not n.startswith("clip")}
    with pytest.raises(ValueError, match="no clip_tokens, clip_mask, clip_pooled"):
        base(without)
    with pytest.raises(ValueError, match="no moments"):
        base({n: v for n, v in batch.items() if n != "moments"})
    five = {**batch, "moments": torch.zeros(16, 5, 4, 4)}
    with pytest.raises(
        ValueError, match="moments with 5 channels for a network with in_channels 3"
    ):
        base(five)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_dropout": 1.0}, r"caption_dropout must lie in \[0, 1\)"),
        ({"network": {"low_channels": 3}}, "low_channels: nothing is enlarged"),
        (
            {"diffusion": {"path": "flow", "prediction": "eps"}},
            "base.diffusion: prediction 'eps' on path 'flow'",
        ),
        ({"diffusion": {"weight": "snrr"}}, "base.diffusion.weight: got 'snrr'"),
    ],
)
def test_configs_say_why_they_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        stages.config_of("base", changes)


def test_the_default_diffusion_is_flow_with_logit_normal_times():
    assert stages.CONFIGS["base"]().diffusion == DiffusionConfig(path="flow", times="logit_normal")


def test_bits_per_dim_of_a_gaussian_are_those_of_its_density():
    """An untrained network says 0, which by EDM's preconditioning is the denoiser of N(0, .5^2)."""
    config = {
        "network": TINY,
        "data": "pixels",
        "diffusion": {"path": "edm", "prediction": "edm", "times": "lognormal"},
    }
    stage = stages.create("base", config)
    draws = np.random.default_rng(0)
    x = np.clip(draws.normal(size=(6, 3, 8, 8)) * 0.3, -1, 1)
    batch = {"pixels": np.round((x + 1) * 127.5).astype(np.uint8), "position": np.arange(6)}
    stage.prepare(Still(batch))
    found = stage.bits_per_dim(to_tensors(batch), seed=3)
    square = np.square(batch["pixels"] / 127.5 - 1).reshape(6, -1).mean(1)
    nats = 0.5 * np.log(2 * np.pi * 0.25) + square / (2 * 0.25)
    assert found.numpy() == pytest.approx(np.log2(127.5) + nats / np.log(2), abs=0.01)
    with pytest.raises(ValueError, match="data 'pixels'"):
        stages.create("base", {"network": TINY}).bits_per_dim({})


@pytest.mark.parametrize("augment", ["none", "noise"])
def test_bits_per_dim_of_what_is_enlarged_are_those_around_it(augment):
    """An untrained network that learns what the small picture lacks is the denoiser of
    N(mean, .5^2), the mean being the small picture enlarged."""
    config = {
        "network": TINY,
        "data": "pixels",
        "low": {"side": 4, "augment": augment, "strongest": 0.005, "residual": True},
        "diffusion": {"path": "edm", "prediction": "edm", "times": "lognormal"},
    }
    stage = stages.create("base", config)
    draws = np.random.default_rng(0)
    coarse = np.kron(draws.normal(size=(6, 3, 4, 4)) * 0.4, np.ones((1, 1, 2, 2)))
    x = np.clip(coarse + draws.normal(size=coarse.shape) * 0.1, -1, 1)
    batch = {"pixels": np.round((x + 1) * 127.5).astype(np.uint8), "position": np.arange(6)}
    stage.prepare(Still(batch))
    told = to_tensors(batch)
    mean = stage.cond(told, 3, "heldout/")["mean"].double().numpy()
    assert mean.std() > 0.1, "to leave it out would be seen"
    found = stage.bits_per_dim(told, seed=3)
    square = np.square(batch["pixels"] / 127.5 - 1 - mean).reshape(6, -1).mean(1)
    nats = 0.5 * np.log(2 * np.pi * 0.25) + square / (2 * 0.25)
    assert found.numpy() == pytest.approx(np.log2(127.5) + nats / np.log(2), abs=0.01)


def test_a_warm_start_goes_on_at_another_resolution(line, tmp_path):
    """A DiT's weights know no size; what is drawn is as large as the data that it went on with."""
    from PIL import Image

    from pipeline.encode import encode, pixels_spec
    from pipeline.execute import Executor
    from training.job import Job, run

    network = {"kind": "dit", "width": 32, "depth": 2, "head_width": 16, "patch": 4}
    done = {}
    for side, parent in ((8, None), (16, 8)):
        spec = pixels_spec(side)
        encode(line.data, [spec], None, Executor(kind="local"))
        encoding = {"name": spec.name, "kind": spec.kind, "fingerprint": spec.fingerprint}
        rate = 1e-12 if parent else 1e-3
        done[side] = run(
            Job(
                kind="base",
                fingerprint=f"at {side}",
                config={"data": "pixels", "network": network, "preview": {"steps": 2}},
                training={
                    "images": 64,
                    "batch": 16,
                    "ema_halflife_images": 0,
                    "learning_rate": rate,
                },
                dataset=line.data.dataset,
                version=line.data.version,
                encodings=(encoding,),
                output=str(tmp_path / str(side)),
                parent=parent and str(tmp_path / str(parent)),
            )
        )
    assert [it["measured"]["latent_shape"] for it in done.values()] == [[3, 8, 8], [3, 16, 16]]
    small, large = (stages.load(tmp_path / str(side)) for side in (8, 16))
    ours = dict(large.network.named_parameters())
    for name, weights in small.network.named_parameters():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=1e-9, msg=name)
    for side in (8, 16):
        with Image.open(tmp_path / str(side) / "preview.png") as sheet:
            assert sheet.size[0] - 2 * 5 == 4 * side, "rows of 4, gaps of 2"
