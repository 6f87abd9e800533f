"""Autoencoders with a codebook or with judges, from the job to the generator that decodes by them.

Each is trained twice, once stopped in between: the same bytes come out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.load import Loader
from pipeline.schema import Encoding
from tests.training.test_job import CLOCKS
from training import checkpoint, encoders, results, stages
from training.assembling import assemble
from training.encoders.autoencoder import open_codec
from training.encoders.sources import open_source
from training.generator import Generator
from training.job import Job, World, run, warm_start
from training.networks import perplexity
from training.supervision import Stopped

SIDE = 16
NETWORK = {"channels": 8, "channel_mult": [1, 2], "latent_channels": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "vq": {"network": {**NETWORK, "codebook": {"codes": 24}}, "measured_pictures": 64},
    "judged": {
        "network": NETWORK,
        "perceptual": {"weight": 0.5},
        "adversarial": {"start_images": 160, "discriminator": {"channels": 8, "layers": 2}},
        "measured_pictures": 64,
    },
}


@dataclass(frozen=True)
class Made:
    config: dict[str, Any]
    undisturbed: Path
    resumed: Path
    spec: Any
    """The encoder of the first of them."""

    @property
    def measured(self) -> dict[str, Any]:
        done = results.committed(self.undisturbed)
        assert done is not None
        return done["measured"]


def encodings(specs) -> tuple[dict[str, Any], ...]:
    return tuple({"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint} for s in specs)


@pytest.fixture(scope="module", params=VARIANTS)
def made(request, line, tmp_path_factory) -> Made:
    root, config = tmp_path_factory.mktemp(request.param), VARIANTS[request.param]
    job = Job(
        kind="autoencoder",
        fingerprint=request.param,
        config=config,
        training={
            "images": 480,
            "batch": 16,
            "learning_rate": 3e-3,
            "log_images": 80,
            "checkpoint_images": 112,  # no multiple of the former: a window is open
            "ema_halflife_images": 20,
            "threads": 1,
        },
        dataset=line.data.dataset,
        version=1,
        encodings=encodings([pixels_spec(SIDE)]),
        inputs={"clip": line.stages["clip"]},
        output=str(root / "undisturbed"),
        seed=4,
    )
    run(job)
    again = replace(job, output=str(root / "resumed"))
    asked = iter([*[False] * 14, True])
    with pytest.raises(Stopped, match="240 images"):
        run(again, World(stop=lambda: next(asked)))
    run(again)
    spec = encoders.spec_of(root / "undisturbed", "autoencoder", SIDE)
    encode(line.data, [spec], encoders.build, Executor(kind="local"))
    return Made(config, root / "undisturbed", root / "resumed", spec)


def test_stopped_and_resumed_it_is_the_undisturbed_one_bit_for_bit(made):
    for name in (results.WEIGHTS, results.PREVIEW, results.CONFIG):
        assert (made.resumed / name).read_bytes() == (made.undisturbed / name).read_bytes(), name
    lines = [
        [{k: v for k, v in r.items() if k not in CLOCKS} for r in results.history(d)]
        for d in (made.resumed, made.undisturbed)
    ]
    assert lines[0] == lines[1]
    states = [checkpoint.newest(d / results.CHECKPOINTS) for d in (made.resumed, made.undisturbed)]
    assert states[0] and states[1]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, tensor in states[0].tensors.items():
        assert torch.equal(tensor, states[1].tensors[name]), name


def test_it_learned_and_says_what_it_is_made_for(made):
    history = results.history(made.undisturbed)
    assert history[-1]["psnr"] > history[0]["psnr"] + 3
    if "codebook" in made.config["network"]:
        assert 1 < history[-1]["perplexity"] <= 24
        assert 1 < made.measured["perplexity"] <= made.measured["codes_used"] <= 24
    else:
        assert history[0]["discriminator"] == 0 == history[0]["adversarial"]
        assert 0 < history[-1]["discriminator"] < 1.2
        assert history[-1]["perceptual"] < history[0]["perceptual"]


def test_what_only_training_needs_stays_in_the_checkpoint(made):
    stored = checkpoint.load_file(made.undisturbed / results.WEIGHTS)
    parts = {name.partition(".")[0] for name in stored}
    assert parts == {"network"}
    done = results.committed(made.undisturbed)
    assert done is not None
    assert done["parameters"] == sum(t.numel() for t in stored.values())
    state = checkpoint.newest(made.undisturbed / results.CHECKPOINTS)
    assert state is not None
    judged = any("discriminator" in name for name in state.tensors)
    assert judged == ("adversarial" in made.config)


def test_a_finished_one_is_loaded_and_begun_from(made):
    stage: Any = stages.load(made.undisturbed)
    fresh: Any = stages.create("autoencoder", made.config)
    warm_start(fresh, str(made.undisturbed))
    assert torch.equal(fresh.network.last_weight, stage.network.last_weight)


def test_its_codec_gives_back_what_it_encoded(made, scenes):
    codec = open_codec(open_source(made.undisturbed, "autoencoder"))
    pixels = torch.from_numpy(scenes[0])
    found = encoders.build(made.spec)(scenes[0])["moments"]
    with torch.no_grad():
        encoded = codec.encode(pixels)
        again = codec.decode(codec.network.mean(encoded))
    assert found.shape == (32, 3 if "codebook" in made.config["network"] else 6, 4, 4)
    np.testing.assert_allclose(found, encoded, atol=2e-3, rtol=2e-3)
    assert again.dtype == torch.uint8
    alike = np.corrcoef(again.flatten(), pixels.flatten())[0, 1]
    assert alike > 0.5  # a short training, but the pictures are there


def test_what_was_measured_is_true_of_what_was_stored(made, line):
    """Shifted and scaled, the stored latents have mean 0 and deviation 1."""
    at = Encoding.at(line.data.dataset, "autoencoder", "image", made.spec.fingerprint)
    loader = Loader(line.data, [at], splits=("train",), global_batch=16, seed=0)
    moments = torch.from_numpy(loader.rows(np.arange(64))["moments"]).float()
    shift, scale = (torch.tensor(made.measured[n]).view(3, 1, 1) for n in ("shift", "scale"))
    if "codebook" not in made.config["network"]:
        mean, logvar = moments.chunk(2, dim=1)
        generator = torch.Generator().manual_seed(0)
        moments = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
    z = (moments - shift) * scale
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.12, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.12, rtol=0)
    if "codebook" in made.config["network"]:
        codebook = stages.load(made.undisturbed).network.codebook
        counts = codebook.counts(codebook.nearest(moments))
        assert made.measured["perplexity"] == pytest.approx(perplexity(counts).item(), rel=0.02)


def test_a_base_learns_its_latents_and_the_generator_decodes_them(made, line, tmp_path):
    """The measured shift and scale survive the package; a codebook quantises what was sampled."""
    texts = [spec for spec in line.specs if spec.name == "clip"]
    inputs = {"autoencoder": str(made.undisturbed), "clip": line.stages["clip"]}
    run(
        Job(
            kind="base",
            fingerprint="base",
            config={
                "network": {
                    "kind": "unet",
                    "channels": 16,
                    "channel_mult": [1],
                    "attention": [0],
                    "head_width": 16,
                    "blocks": 1,
                    "recompute": True,
                },
                "preview": {"steps": 2},
            },
            training={"images": 32, "batch": 16, "learning_rate": 1e-3, "threads": 1},
            dataset=line.data.dataset,
            version=1,
            encodings=encodings([made.spec, *texts]),
            inputs=inputs,
            output=str(tmp_path / "base"),
        )
    )
    assemble(tmp_path / "model", {**inputs, "base": str(tmp_path / "base")}, {"steps": 3})
    generator = Generator.load(tmp_path / "model", "cpu", "fp32")
    for name in ("shift", "scale"):
        wanted = torch.tensor(made.measured[name])
        torch.testing.assert_close(getattr(generator.base, name), wanted)
    assert generator.resolution == SIDE
    pictures = generator(["a red circle", "a blue ring"], seed=1)
    assert pictures.shape == (2, SIDE, SIDE, 3)
    with torch.no_grad():
        z = generator.base.unscaled(generator.latents(["a red circle", "a blue ring"], seed=1))
        if generator.codec.network.codebook is not None:
            z = generator.codec.network.codebook(z).z
        drawn = generator.codec.network.draw(z)
    wanted = ((drawn + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pictures, wanted.numpy())
