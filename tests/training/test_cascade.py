"""A model is a fold over stages: prior -> base -> enlarging stages, each told what came before."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training import encoders, stages
from training.assembling import assemble
from training.autoencoding import to_unit
from training.contrastive import model_config
from training.denoising import BaseStage, BaseStageConfig
from training.enlarging import shrunk
from training.generator import Generator, _cond
from training.request import Request
from training.stage import to_tensors

SIDE = 16
PROMPTS = ["a red circle on the left", "a small blue square", "one green ring, black canvas"]
NETWORK = {
    "kind": "unet", "channels": 16, "channel_mult": [1], "attention": [1], "head_width": 16,
    "context_width": 32, "blocks": 1,
}  # fmt: skip
DIFFUSION = {"path": "cosine", "prediction": "v"}
CONFIGS = {
    "prior": {
        "data": "embedding",
        "listens": ["clip"],
        "network": {"kind": "prior", "width": 32, "depth": 1, "head_width": 16},
        "diffusion": {"path": "cosine", "prediction": "x0", "weight": "x0"},
    },
    "base": {
        "data": "pixels",
        "side": 8,
        "listens": ["clip", "clip_image"],
        "network": NETWORK,
        "diffusion": DIFFUSION,
        "preview": {"steps": 2},
    },
    "sr1": {
        "data": "pixels",
        "low": {"side": 8, "strongest": 0.4},
        "listens": [],
        "network": {**NETWORK, "patch": 2},
        "diffusion": DIFFUSION,
        "preview": {"steps": 2},
    },
}


@pytest.fixture(scope="module")
def cascade(line, tmp_path_factory) -> dict[str, str]:
    """The directories of clip, prior, base and sr1, trained for a few updates."""
    from pipeline.encode import encode, pixels_spec
    from pipeline.execute import Executor
    from training.job import Job, run

    clip = line.stages["clip"]
    text, image = encoders.spec_of(clip, "clip"), encoders.spec_of(clip, "clip_image")
    assert (image.kind, image.side) == ("image", SIDE)
    assert image.fingerprint != text.fingerprint
    encode(line.data, [text, image], encoders.build, Executor(kind="local"))
    root, made = tmp_path_factory.mktemp("cascade"), {"clip": clip}
    needs = {
        "prior": [text, image],
        "base": [pixels_spec(SIDE), text, image],
        "sr1": [pixels_spec(SIDE)],
    }
    for name, specs in needs.items():
        run(
            Job(
                kind="base", fingerprint=name, config=CONFIGS[name],
                training={
                    "images": 640, "batch": 16, "learning_rate": 3e-3, "log_images": 80,
                    "checkpoint_images": 10_000, "ema_halflife_images": 20,
                },
                dataset=line.data.dataset, version=1,
                encodings=tuple(
                    {"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint}
                    | ({"side": s.side} if s.side else {})
                    for s in specs
                ),
                inputs={} if name == "sr1" else {"clip": clip}, output=str(root / name),
            )
        )  # fmt: skip
        made[name] = str(root / name)
    return made


SAMPLERS = {
    "prior": {"steps": 4, "candidates": 2},
    "sr1": {"steps": 3, "level": 0.1, "kind": "ddim", "eta": 1.0},
}


@pytest.fixture(scope="module")
def generator(cascade, tmp_path_factory) -> Generator:
    where = tmp_path_factory.mktemp("assembled") / "generator"
    assemble(where, cascade, {"steps": 4, "guidance": 2.0}, SAMPLERS)
    return Generator.load(where, "cpu", precision="fp32")


def test_each_stage_draws_at_its_own_side(generator):
    assert generator.resolution == SIDE
    assert list(generator.enlarging) == ["sr1"]
    assert generator.samplers["sr1"].level == 0.1
    shown = generator.stages(PROMPTS, seed=3)
    assert [(name, it.shape) for name, it in shown.items()] == [
        ("base", (3, 8, 8, 3)),
        ("sr1", (3, SIDE, SIDE, 3)),
    ]
    np.testing.assert_array_equal(generator(PROMPTS, seed=3), shown["sr1"])


def test_a_picture_is_a_function_of_its_own_prompt_and_seed(generator):
    together = generator(PROMPTS, seed=[5, 6, 7])
    alone = generator(PROMPTS[1:2], seed=6)
    assert np.abs(together[1:2].astype(int) - alone).max() <= 1
    assert (generator(PROMPTS[1:2], seed=8) != alone).any()


def test_a_call_may_choose_how_each_stage_draws(generator):
    plain = generator.stages(PROMPTS, seed=1)
    noisier = generator.stages(PROMPTS, seed=1, **{"sr1.level": 0.4})
    np.testing.assert_array_equal(plain["base"], noisier["base"])
    assert (plain["sr1"] != noisier["sr1"]).any()
    once = generator.stages(PROMPTS, seed=1, **{"prior.candidates": 1})
    assert (once["base"] != plain["base"]).any()
    for wrong, said in {
        "sr2.level": "no stage 'sr2' that draws; this generator has prior, sr1",
        "sr1.levle": "sr1: a sampler has no levle",
        "stepps": "a sampler has no stepps",
        "sr1.level": "sr1.level: got 1, and it learnt noise from 0 to 0.4",
        "prior.guidance_interval": "prior.guidance_interval: got 1, wanted a list",
    }.items():
        with pytest.raises(ValueError, match=said):
            generator(PROMPTS, **{wrong: 1})
    with pytest.raises(ValueError, match=r"prior.threshold: got 'static', .* embeddings are"):
        generator(PROMPTS, **{"prior.threshold": "static"})


def test_the_base_follows_the_embedding_that_it_is_given(generator, scenes):
    pictures = np.ascontiguousarray(scenes[0][:3].transpose(0, 2, 3, 1))
    z = generator.embed(pictures)
    assert torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5)
    blank = [""] * 3
    varied = generator(blank, seed=4, embeddings=z, guidance=1.0)
    assert (varied != generator(blank, seed=4, embeddings=z.flip(0), guidance=1.0))[[0, 2]].any()
    # Without a caption and without an embedding nothing is told: the null of guidance.
    silent = generator.latents(blank, seed=4, guidance=1.0, embeddings="none")
    unguided = generator.latents(PROMPTS, seed=4, guidance=0.0, embeddings=z)
    torch.testing.assert_close(silent, unguided, atol=2e-3, rtol=2e-3)
    text = generator(PROMPTS, seed=4, embeddings="text")
    given = generator(PROMPTS, seed=4, embeddings=generator.embed_texts(PROMPTS))
    np.testing.assert_array_equal(text, given)
    with pytest.raises(ValueError, match="embeddings: got 2 for 3 prompts"):
        generator(PROMPTS, embeddings=z[:2])


@pytest.fixture(scope="module")
def pretrained(line, tmp_path_factory) -> Generator:
    """A base of pixels that is told the embeddings of a CLIP as open_clip publishes them."""
    from open_clip.model import CLIP

    from pipeline.encode import encode, pixels_spec
    from pipeline.execute import Executor
    from training.job import Job, run

    root = tmp_path_factory.mktemp("pretrained")
    where = root / "clip"
    where.mkdir()
    text = {"vocabulary": 49408, "context": 77, "width": 16, "heads": 2, "layers": 1}
    image = {"kind": "vit", "side": SIDE, "width": 32, "layers": 1}
    config = model_config(stages.config_of("clip", {"embed": 12, "image": image, "text": text}))
    torch.manual_seed(0)
    save_file(CLIP(**config).state_dict(), where / "open_clip_model.safetensors")
    prepared = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    described = {"model_cfg": config, "preprocess_cfg": prepared}
    (where / "open_clip_config.json").write_text(json.dumps(described))
    specs = [encoders.spec_of(str(where), name) for name in ("clip", "clip_image")]
    encode(line.data, specs, encoders.build, Executor(kind="local"))
    shown = [pixels_spec(SIDE), *specs]
    run(
        Job(
            kind="base", fingerprint="base", config={**CONFIGS["base"], "side": 0},
            training={"images": 32, "batch": 16, "learning_rate": 3e-3},
            dataset=line.data.dataset, version=1,
            encodings=tuple(
                {"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint}
                | ({"side": s.side} if s.side else {})
                for s in shown
            ),
            inputs={"clip": str(where)}, output=str(root / "base"),
        )
    )  # fmt: skip
    assemble(root / "generator", {"clip": where, "base": root / "base"}, {"steps": 4})
    shutil.rmtree(where)
    return Generator.load(root / "generator", "cpu", precision="fp32")


def test_a_pretrained_clip_s_embeddings_are_those_that_the_base_was_taught(pretrained, scenes):
    from pipeline import shapes
    from pipeline.images import fit
    from training.encoders import clip
    from training.encoders.sources import open_source

    taught = clip.load_image(open_source(pretrained.clip, "clip_image"))
    told = taught(scenes[0])["clip_image_pooled"].astype(np.float32)
    pictures = np.ascontiguousarray(scenes[0].transpose(0, 2, 3, 1))
    found = pretrained.embed(pictures)
    np.testing.assert_allclose(found, told, atol=2e-3)  # which were stored as float16
    # Larger ones were fitted to its side by Lanczos when they were encoded.
    large = np.stack([shapes.draw(shapes.scene(5, k), 3 * SIDE) for k in range(32)])
    fitted = np.stack([fit(Image.fromarray(it), SIDE) for it in large])
    told = taught(fitted)["clip_image_pooled"].astype(np.float32)
    miss = np.linalg.norm(pretrained.embed(large).numpy() - told, axis=1)
    assert miss.mean() < 0.05 * np.linalg.norm(told - told.mean(0), axis=1).mean()


def test_what_needs_both_towers_of_a_pretrained_clip_is_had(pretrained, scenes):
    pictures = np.ascontiguousarray(scenes[0][:4].transpose(0, 2, 3, 1))
    z, blank = pretrained.embed(pictures), [""] * 4
    varied = pretrained.latents(blank, seed=1, embeddings=z, guidance=1.0)
    other = pretrained.latents(blank, seed=1, embeddings=z.flip(0), guidance=1.0)
    assert (varied - other).abs().max() > 1e-4

    def liking(scale: float) -> torch.Tensor:
        drawn = pretrained(PROMPTS, seed=1, guidance=0.0, clip_guidance=scale)
        return (pretrained.embed(drawn) * pretrained.embed_texts(PROMPTS)).sum(1)

    assert (liking(40.0) > liking(0.0)).all()
    judge = pretrained._judge
    heard = pretrained.embed_texts(PROMPTS)  # by way of float16
    torch.testing.assert_close(judge.texts(PROMPTS), heard, atol=2e-3, rtol=0)
    assert judge.temperature == pytest.approx(1 / 0.07, rel=1e-4)  # as open_clip begins


def test_the_nearest_of_a_prior_s_candidates_is_taken(generator):
    texts = generator.embed_texts(PROMPTS)

    def nearness(candidates: int) -> torch.Tensor:
        asked = Request.of(PROMPTS, None, 2)
        _, samplers = generator._samplers({"prior.candidates": candidates})
        with torch.no_grad():
            z = generator._embeddings(asked, generator._read(asked), samplers)
        assert torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5)
        return (z * texts).sum(1)

    one, many = nearness(1), nearness(6)
    assert (many >= one - 1e-6).all()
    assert (many > one + 1e-6).any()


def test_a_negative_prompt_leads_away_with_the_embedding_silent(generator):
    plain = generator(PROMPTS, seed=1)
    away = generator(PROMPTS, seed=1, negative="a red circle")
    assert away.shape == plain.shape
    assert (away != plain).any()


def test_an_enlarging_stage_needs_the_picture_it_enlarges(cascade, line):
    stage = stages.load(cascade["sr1"])
    rows = line.loader("pixels").rows(np.arange(8))
    batch = to_tensors(rows)
    x0 = stage.latents(batch, 0)
    assert torch.equal(x0, to_unit(batch["pixels"]))
    cond = stage.cond(batch, 0)
    small = shrunk(x0, 8)
    a, s = stage.model.path.at(stage.config.low.draw(0, batch["position"]), small)
    noise = (cond["low"] - a * small) / s.clamp(min=1e-3)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    told = stage.heldout_loss(batch)
    blind = dict(batch, pixels=batch["pixels"])
    other = stage._loss(blind, {**cond, "low": torch.zeros_like(cond["low"])}, 0, "heldout/")
    assert told.mean() < other.mean()
    with pytest.raises(ValueError, match="the batch has no pixels"):
        stage.cond({k: v for k, v in batch.items() if k != "pixels"})


def test_what_does_not_fit_together_is_refused(cascade, tmp_path):
    with pytest.raises(ValueError, match="needs clip too"):
        assemble(tmp_path / "g", {k: v for k, v in cascade.items() if k != "clip"})
    for config, said in [
        ({"data": "embedding"}, "network.kind 'unet' does not denoise embedding"),
        (
            {**CONFIGS["prior"], "listens": ["clip", "clip_image"]},
            "a prior draws clip_image and cannot be told it",
        ),
        ({"side": 8}, "side is of data 'pixels' alone"),
        ({"data": "pixels", "side": 8, "low": {"side": 3}}, "wanted a proper divisor of side 8"),
    ]:
        with pytest.raises(ValueError, match=said):
            stages.config_of("base", config)


def test_labels_are_told_as_one_class():
    config = stages.config_of(
        "base",
        {
            "data": "pixels",
            "network": NETWORK,
            "attributes": [
                {"name": "colour", "answers": ["red", "blue"]},
                {"name": "size", "answers": ["small", "big", "huge"]},
            ],
        },
    )
    assert isinstance(config, BaseStageConfig)
    stage = BaseStage(config)
    assert stage.config.network.classes == 6
    labels = [
        {"colour": "red", "size": "small"}, {"colour": "blue", "size": "huge"}, None,
        {"colour": "red"},
    ]  # fmt: skip
    assert stage.classes(labels, "cpu").tolist() == [0, 5, 6, 6]


def test_a_class_is_told_where_there_is_no_caption_and_left_out_of_what_is_led_away_from():
    config = stages.config_of(
        "base",
        {
            "data": "pixels",
            "network": {**NETWORK, "contexts": [{"name": "clip", "width": 4, "pooled_width": 4}]},
            "attributes": [{"name": "colour", "answers": ["red", "blue"]}],
        },
    )
    stage = BaseStage(config)
    fields = {
        "said": torch.tensor([False, True]),
        "clip_tokens": torch.ones(2, 3, 4),
        "clip_mask": torch.ones(2, 3, dtype=torch.bool),
        "clip_pooled": torch.ones(2, 4),
    }
    y = {"y": stage.classes([{"colour": "blue"}, {"colour": "red"}], "cpu")}
    cond, against = _cond(stage, fields, y), _cond(stage, fields, y, embedded=False)
    assert cond["keep"].tolist() == [True, True]
    assert cond["clip_keep"].tolist() == against["clip_keep"].tolist() == [False, True]
    assert cond["y"].tolist() == [1, 0]
    assert against["y"].tolist() == [2, 2]  # the null class
    assert cond.keys() == against.keys()
