"""A generator is one directory, and a picture is a function of its own prompt and seed."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from training import stages
from training.assembling import assemble
from training.autoencoding import to_unit
from training.diffusion import normal
from training.generator import Generator
from training.request import Known
from training.stage import to_tensors

PROMPTS = [
    "a red circle on the left",
    "a small blue square at the top",
    "one green ring, black canvas",
]
TINY = {"channels": 8, "channel_mult": [1], "attention": [1], "head_width": 8}
DEFAULTS = {"kind": "dpmpp2m", "steps": 4, "guidance": 2.0}


@pytest.fixture(scope="module")
def package(line, tmp_path_factory) -> Path:
    """Assembled, then moved, with the stages out of reach."""
    first = tmp_path_factory.mktemp("made") / "generator"
    assemble(first, line.stages, DEFAULTS)
    return shutil.copytree(first, tmp_path_factory.mktemp("moved") / "elsewhere")


@pytest.fixture(scope="module")
def generator(package) -> Generator:
    return Generator.load(package, "cpu", precision="fp32")


def test_the_package_is_json_and_safetensors_and_says_what_it_is(package, line):
    names = sorted(str(p.relative_to(package)) for p in package.rglob("*") if p.is_file())
    assert names == sorted(
        [
            "generator.json",
            *(f"{s}/{f}" for s in line.stages for f in ("config.json", "weights.safetensors")),
        ]
    )
    described = json.loads((package / "generator.json").read_text())
    assert described["resolution"] == 16
    assert described["defaults"]["guidance"] == 2.0
    assert described["stages"]["base"]["fingerprint"] == "base"
    assert str(line.root) not in json.dumps(described["defaults"])


def test_assembling_again_gives_the_same_bytes(line, package, tmp_path):
    for _ in range(2):
        assemble(tmp_path / "again", line.stages, DEFAULTS)
    for path in package.rglob("*.*"):
        again = tmp_path / "again" / path.relative_to(package)
        assert again.read_bytes() == path.read_bytes(), path
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_pictures_are_repeatable_and_follow_prompt_and_seed(generator):
    pictures = generator(PROMPTS, seed=3)
    assert pictures.shape == (3, 16, 16, 3)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(generator(PROMPTS, seed=3), pictures)
    assert (generator(PROMPTS, seed=4) != pictures).any((1, 2, 3)).all()
    other = generator([PROMPTS[1], *PROMPTS[1:]], seed=3)
    assert (other[0] != pictures[0]).any()
    assert np.abs(other[1:].astype(int) - pictures[1:]).max() <= 1


def test_a_picture_does_not_depend_on_its_neighbours(generator):
    """Beyond the last bit: kernels may add in another order for another batch."""
    seeds = [11, 5, 23]
    together = generator.latents(PROMPTS, seed=seeds)
    longer = generator.latents(["x" * 90, *PROMPTS, ""], seed=[1, *seeds, 2])
    torch.testing.assert_close(longer[1:4], together, atol=1e-3, rtol=1e-3)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = generator.latents([prompt], seed=seed)
        torch.testing.assert_close(alone[0], together[row], atol=1e-3, rtol=1e-3)


def test_an_integer_seed_counts_up(generator):
    torch.testing.assert_close(
        generator.latents(PROMPTS, seed=7), generator.latents(PROMPTS, seed=[7, 8, 9])
    )


def test_stochastic_samplers_draw_from_the_pictures_own_seed(generator):
    options = {"kind": "ddim", "eta": 1.0, "steps": 5}
    together = generator.latents(PROMPTS, seed=7, **options)
    alone = generator.latents(PROMPTS[1:2], seed=8, **options)
    torch.testing.assert_close(alone[0], together[1], atol=1e-3, rtol=1e-3)
    assert (
        generator.latents(PROMPTS, seed=7, **{**options, "eta": 0.0}) - together
    ).abs().max() > 0.1


def test_sampling_is_the_samplers_with_classifier_free_guidance(generator):
    """Against the plain formula: D_u + s (D_c - D_u), two network calls a step, Euler's."""
    cond, scale, steps = generator.cond(PROMPTS), 2.5, 6
    model = generator.base.model
    null = {**cond, "keep": torch.zeros(3, dtype=torch.bool)}
    shape = generator.base.latent_shape.tolist()
    x = torch.cat([normal(seed, "sample", torch.tensor([0]), shape) for seed in (4, 5, 6)])
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        for t, u in itertools.pairwise(times):
            x0 = model(x, t, null) + scale * (model(x, t, cond) - model(x, t, null))
            x = x + (u - t).item() * (x - x0) / t.item()
    ours = generator.latents(PROMPTS, seed=4, kind="ddim", steps=steps, guidance=scale)
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=2e-4)


def test_guidance_calls_the_network_once_a_step(generator):
    rows = []
    hook = generator.base.network.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    generator.latents(PROMPTS, kind="ddim", steps=5)
    generator.latents(PROMPTS, kind="ddim", steps=5, guidance=1.0)
    generator.latents(PROMPTS, kind="ddim", steps=4, guidance_interval=(0.4, 0.8))
    hook.remove()
    assert rows[:10] == [6] * 5 + [3] * 5
    assert rows[10:] == [3, 6, 6, 3]  # t = 1, .75, .5, .25


def test_an_empty_prompt_is_the_null_condition(generator):
    blank = generator.latents(["", "  "], seed=[1, 2], guidance=1.0)
    unguided = generator.latents(PROMPTS[:2], seed=[1, 2], guidance=0.0)
    torch.testing.assert_close(blank, unguided, atol=1e-4, rtol=1e-4)


def test_negatives_take_the_place_of_the_null(generator):
    plain = generator.latents(PROMPTS, guidance=3.0)
    blank = generator.latents(PROMPTS, guidance=3.0, negative="")
    torch.testing.assert_close(blank, plain, atol=1e-4, rtol=1e-4)
    itself = generator.latents(PROMPTS, guidance=3.0, negative=PROMPTS)
    torch.testing.assert_close(
        itself, generator.latents(PROMPTS, guidance=1.0), atol=2e-3, rtol=2e-3
    )
    assert (
        generator.latents(PROMPTS, guidance=3.0, negative="a red circle") - plain
    ).abs().max() > 1e-3


def test_defaults_can_be_overruled_call_by_call(generator):
    plain = generator(PROMPTS)
    assert generator.defaults["steps"] == 4
    np.testing.assert_array_equal(
        generator(PROMPTS, steps=4, guidance=2.0, sampler="dpmpp2m"), plain
    )
    for change in ({"steps": 2}, {"guidance": 5.0}, {"sampler": "ddim"}, {"guidance_rescale": 0.7}):
        assert (generator(PROMPTS, **change) != plain).any(), change


def test_the_larger_the_pictures_the_fewer_are_drawn_at_once(generator, monkeypatch):
    from training import request as module

    assert [module.at_once(side) for side in (0, 16, 64, 256)] == [32] * 4
    assert [module.at_once(side) for side in (257, 512, 1024, 4096)] == [31, 8, 2, 1]

    def drawn() -> list[np.ndarray]:
        pictures = generator(PROMPTS * 2, guidance=1.0)
        latents = generator.encode(pictures)
        shares = [0.0, 0.3, 0.7, 1.0]
        way = generator.between(PROMPTS[0], (0, 1), shares, guidance=1.0)
        return [pictures, generator.decode(latents), way]

    rows = {"network": [], "encode": [], "decode": []}
    hook = generator.base.network.register_forward_pre_hook(
        lambda _, inputs: rows["network"].append(len(inputs[0]))
    )
    for name in ("encode", "decode"):
        asked = getattr(generator.codec, name)

        def counted(x, name=name, asked=asked):
            rows[name].append(len(x))
            return asked(x)

        monkeypatch.setattr(generator.codec, name, counted)
    whole = drawn()
    assert {name: {*it} for name, it in rows.items()} == {
        "network": {6, 4}, "encode": {6}, "decode": {6, 4},
    }  # fmt: skip
    for it in rows.values():
        it.clear()
    # As if 16 px were twice the side of which twelve are drawn at once.
    monkeypatch.setattr(module, "BATCH", 12)
    monkeypatch.setattr(module, "BATCH_SIDE", 8)
    parts = drawn()
    hook.remove()
    assert {name: {*it} for name, it in rows.items()} == {
        "network": {3, 1}, "encode": {3}, "decode": {3, 1},
    }  # fmt: skip
    for before, after in zip(whole, parts, strict=True):
        assert np.abs(before.astype(int) - after).max() <= 1
    assert generator([]).shape == (0, 16, 16, 3)


def test_bf16_is_close(package, generator):
    half = Generator.load(package, "cpu", precision="bf16").latents(PROMPTS)
    full = generator.latents(PROMPTS)
    assert (half - full).norm() / full.norm() < 0.03
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)


def test_the_heldout_loss_is_the_base_stages_on_fixed_triples(line, generator):
    batch = line.loader("autoencoder", "clip", "t5", splits=("heldout",)).rows(np.arange(16))
    losses = generator.denoising_loss(batch, seed=1)
    with torch.no_grad():
        wanted = stages.load(line.stages["base"]).heldout_loss(to_tensors(batch), 1)
    np.testing.assert_allclose(losses, wanted.numpy(), rtol=1e-5)
    assert losses.shape == (16,)
    assert (generator.denoising_loss(batch, seed=2) != losses).all()


def test_encoders_that_the_base_did_not_learn_from_are_refused(line, tmp_path):
    other = tmp_path / "clip"
    shutil.copytree(line.stages["clip"], other)
    done = json.loads((other / "stage.json").read_text())
    (other / "stage.json").write_text(json.dumps(done | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"clip at .* the base was trained with"):
        assemble(tmp_path / "g", {**line.stages, "clip": str(other)})
    assert not (tmp_path / "g").exists()


def test_what_is_missing_is_named(line, tmp_path):
    some = {n: line.stages[n] for n in ("base", "clip")}
    with pytest.raises(ValueError, match="needs autoencoder, t5 too"):
        assemble(tmp_path / "g", some)
    with pytest.raises(ValueError, match="needs a base stage"):
        assemble(tmp_path / "g", {"clip": line.stages["clip"]})
    with pytest.raises(ValueError, match="defaults: no key 'guidence'; did you mean 'guidance'"):
        assemble(tmp_path / "g", line.stages, {"guidence": 3.0})
    with pytest.raises(ValueError, match="threshold: got 'dynamic', .* set it to 'none'"):
        assemble(tmp_path / "g", line.stages, {"threshold": "dynamic"})
    with pytest.raises(ValueError, match="no generator"):
        Generator.load(tmp_path)


def test_wrong_calls_are_refused(generator):
    with pytest.raises(ValueError, match="wanted a list of texts, got one text"):
        generator("a red circle")
    with pytest.raises(ValueError, match="seed: got 1 for 3 prompts"):
        generator(PROMPTS, seed=[1])
    with pytest.raises(ValueError, match="negative: got 2 for 3 prompts"):
        generator(PROMPTS, negative=["a", "b"])
    with pytest.raises(ValueError, match="a sampler has no stps; it has .*steps"):
        generator(PROMPTS, stps=3)
    with pytest.raises(ValueError, match="kind: got 'eulr'"):
        generator(PROMPTS, sampler="eulr")
    with pytest.raises(ValueError, match=r"threshold: got 'static', which .* latents are drawn"):
        generator(PROMPTS, threshold="static")


def test_pretrained_encoders_travel_in_the_package(line, tmp_path):
    """The autoencoder of diffusers: copied, and found again when the original is gone."""
    import diffusers

    from pipeline.encode import encode
    from pipeline.execute import Executor
    from training import encoders
    from training.job import Job, run

    torch.manual_seed(0)
    where = tmp_path / "vae"
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(where)  # fmt: skip
    spec = encoders.spec_of(str(where), "autoencoder", side=16)
    encode(line.data, [spec], encoders.build, Executor(kind="local"))
    run(
        Job(
            kind="base", fingerprint="pretrained", output=str(tmp_path / "base"),
            config={"network": TINY, "preview": {"steps": 2}},
            training={"images": 32, "batch": 16, "learning_rate": 1e-3},
            dataset=line.data.dataset, version=1, inputs={"autoencoder": str(where)},
            encodings=({"name": spec.name, "kind": spec.kind, "fingerprint": spec.fingerprint},),
        )
    )  # fmt: skip
    assert (tmp_path / "base" / "preview.png").exists()
    assemble(tmp_path / "g", {"base": tmp_path / "base", "autoencoder": where}, {"steps": 2})
    shutil.rmtree(where)
    generator = Generator.load(tmp_path / "g", "cpu")
    assert generator(["anything"]).shape == (1, 16, 16, 3)
    assert generator.base.scale.tolist() != [1, 1, 1, 1]


@pytest.fixture(scope="module")
def drawer(line, tmp_path_factory) -> Generator:
    """A generator of pixels with a classifier beside it."""
    from pipeline.encode import pixels_spec
    from training.job import Job, run

    specs = [pixels_spec(16), *(s for s in line.specs if s.kind == "text")]
    output = tmp_path_factory.mktemp("pixels") / "base"
    inputs = {name: line.stages[name] for name in ("clip", "t5")}
    config = {"data": "pixels", "network": {**TINY, "patch": 2}, "preview": {"steps": 2}}
    run(
        Job(
            kind="base",
            fingerprint="pixels",
            config=config,
            training={"images": 640, "batch": 16, "learning_rate": 3e-3},
            dataset=line.data.dataset,
            version=1,
            encodings=tuple(
                {"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint} for s in specs
            ),
            inputs=inputs,
            output=str(output),
        )
    )
    where = output.parent / "generator"
    assemble(where, {**inputs, "base": output, "classifier": line.stages["classifier"]}, DEFAULTS)
    return Generator.load(where, "cpu", precision="fp32")


def test_the_classifier_leads_to_what_its_labels_say(drawer):
    wanted = [{"background": "black"}, {"background": "white"}, {"background": "pink"}]

    def belief(scale: float) -> torch.Tensor:
        pictures = drawer(PROMPTS[:3], seed=1, labels=wanted, classifier_guidance=scale)
        x = to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        return drawer.classifier.log_prob(wanted)(x, torch.tensor(0.02), {})

    assert (belief(30.0) > belief(0.0)).all()
    with pytest.raises(ValueError, match="mauve"):
        drawer(["a"], labels=[{"colour": "mauve"}], classifier_guidance=1.0)
    with pytest.raises(ValueError, match="labels, one for each of 1 prompts, got none"):
        drawer(["a"], classifier_guidance=1.0)


def test_clip_leads_to_pictures_that_it_likes(drawer):
    judge = stages.load(drawer.clip)
    texts = judge.texts(PROMPTS)

    def liking(scale: float) -> torch.Tensor:
        pictures = torch.from_numpy(drawer(PROMPTS, seed=1, clip_guidance=scale))
        return (judge.images(pictures.permute(0, 3, 1, 2)) * texts).sum(1)

    assert liking(5.0).mean() > liking(0.0).mean() + 0.02


def test_the_noisy_clip_takes_the_other_ones_place(drawer, line, tmp_path):
    kept = {name: line.stages[name] for name in ("clip", "t5", "noisy_clip")}
    base = drawer.clip.parent / "base"
    assemble(tmp_path / "generator", {**kept, "base": base}, DEFAULTS)
    made = Generator.load(tmp_path / "generator", "cpu", precision="fp32")

    def liking(scale: float) -> torch.Tensor:
        pictures = torch.from_numpy(made(PROMPTS, seed=1, clip_guidance=scale))
        x = to_unit(pictures.permute(0, 3, 1, 2))
        return made.noisy_clip.log_prob(PROMPTS)(x, torch.tensor(0.02), {})

    assert liking(20.0).mean() > liking(0.0).mean() + 0.5


def test_judges_of_pixels_are_refused_where_latents_are_drawn(generator):
    with pytest.raises(ValueError, match="draws latents"):
        generator(["a"], labels=[{}], classifier_guidance=1.0)
    with pytest.raises(ValueError, match="draws latents"):
        generator(["a"], clip_guidance=1.0)
    with pytest.raises(ValueError, match="draws latents"):
        generator(["a"], known=Known(np.zeros((1, 16, 16, 3), np.uint8)))


def test_a_model_of_pixels_has_a_likelihood_and_one_of_latents_none(drawer, generator, line):
    batch = line.loader("pixels", "clip", "t5").rows(np.arange(4))
    found = drawer.bits_per_dim(batch)
    assert found.shape == (4,)
    assert np.isfinite(found).all()
    assert generator.bits_per_dim(batch) is None


def test_what_is_known_is_kept_and_the_rest_is_drawn(drawer, scenes):
    real = np.ascontiguousarray(scenes[0][:3].transpose(0, 2, 3, 1))
    mask = np.ones(real.shape[:3], bool)
    mask[:, :, 8:] = False
    small = real.reshape(3, 4, 4, 4, 4, 3).mean((2, 4)).round().astype(np.uint8)
    options = {"guidance": 1.0, "steps": 24, "sampler": "ddim"}

    def miss(pictures: np.ndarray) -> tuple[float, float]:
        means = pictures.reshape(small.shape[0], 4, 4, 4, 4, 3).mean((2, 4))
        return np.abs(pictures[mask] - real[mask].astype(float)).mean(), np.abs(
            means - small
        ).mean()

    free = drawer([""] * 3, seed=1, **options)
    filled = drawer([""] * 3, seed=1, known=Known(real, mask), **options)
    enlarged = drawer([""] * 3, seed=1, known=Known(small, factor=4), **options)
    assert miss(filled)[0] < miss(free)[0] / 4
    # Means of squares come by the network's own gradient, and this one has learned for seconds.
    assert miss(enlarged)[1] < miss(free)[1] * 0.8
    other = drawer([""] * 3, seed=9, known=Known(real, mask), **options)
    assert (filled[~mask] != other[~mask]).any()
    with pytest.raises(ValueError, match="wanted \\(3, 4, 4, 3\\)"):
        drawer([""] * 3, known=Known(real, factor=4))


def test_guides_that_look_at_the_estimate_nest(drawer, scenes):
    real = np.ascontiguousarray(scenes[0][:1].transpose(0, 2, 3, 1))
    known = Known(real, np.ones(real.shape[:3], bool))
    both = drawer(["a red circle"], known=known, clip_guidance=1.0, steps=24)
    assert np.abs(both.astype(float) - real).mean() < 8


def test_pictures_between_two_seeds_begin_and_end_with_theirs(drawer, generator):
    for it in (drawer, generator):
        options = {"steps": 6}
        row = it.between(PROMPTS[0], (3, 8), [0.0, 0.5, 1.0], **options)
        ends = it([PROMPTS[0]] * 2, seed=[3, 8], sampler="ddim", **options)
        assert np.abs(row[[0, 2]].astype(int) - ends).max() <= 1
        assert (row[1] != row[0]).any()
        assert (row[1] != row[2]).any()


@pytest.fixture(scope="module")
def alone(line, tmp_path_factory) -> Path:
    """A VAE: the autoencoder and nothing else."""
    made = tmp_path_factory.mktemp("vae") / "generator"
    assemble(made, {"autoencoder": line.stages["autoencoder"]}, DEFAULTS)
    return made


def test_an_autoencoder_alone_decodes_draws_of_its_prior(alone):
    generator = Generator.load(alone, "cpu", precision="fp32")
    drawn = generator(PROMPTS, seed=3)
    shape = generator.latent_shape
    z = torch.cat([normal(seed, "sample", torch.tensor([0]), shape) for seed in (3, 4, 5)])
    with torch.no_grad():
        wanted = generator.codec.decode(z).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(drawn, wanted)
    np.testing.assert_array_equal(generator([""] * 3, seed=3), drawn)  # captions say nothing
    ends = generator.between("", (3, 5), [0.0, 1.0])
    np.testing.assert_array_equal(ends, drawn[[0, 2]])
    assert generator.networks == []
    assert generator.denoising_loss({}) is None


def test_what_the_autoencoder_encodes_it_decodes(alone, line):
    generator = Generator.load(alone, "cpu", precision="fp32")
    pictures = generator(PROMPTS, seed=3)
    codec = generator.codec
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    with torch.no_grad():
        again = codec.decode(codec.network.mean(codec.encode(x))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(generator.decode(generator.encode(pictures)), again)


def test_an_autoencoder_alone_needs_a_prior(line, tmp_path):
    with pytest.raises(ValueError, match="or an autoencoder stage"):
        assemble(tmp_path / "g", {"clip": line.stages["clip"]})
    coded = shutil.copytree(line.stages["autoencoder"], tmp_path / "vq")
    done = json.loads((coded / "stage.json").read_text())
    done["config"]["network"] = {"codebook": {"codes": 8}}
    (coded / "stage.json").write_text(json.dumps(done))
    with pytest.raises(ValueError, match="codebook"):
        assemble(tmp_path / "g", {"autoencoder": coded})
