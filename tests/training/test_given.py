"""What a caller gives beside the prompt: a small picture that is enlarged, a class."""

import numpy as np
import pytest
import torch

from training.assembling import assemble
from training.autoencoding import to_unit
from training.diffusion import normal
from training.generator import Generator

SIDE, LOW = 16, 8
PROMPTS = ["a red circle", "a small blue square", "one green ring"]
NETWORK = {
    "kind": "unet", "channels": 16, "channel_mult": [1], "attention": [1], "head_width": 16,
    "context_width": 32, "blocks": 1,
}  # fmt: skip
COMMON = {"network": NETWORK, "preview": {"steps": 2}}
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "brown")
RED, BLUE = {"colour": "red", "size": "small"}, {"colour": "blue", "size": "large"}
CONFIGS = {
    "enlarged": {
        **COMMON, "data": "pixels", "listens": [], "low": {"side": LOW, "strongest": 0.4},
        "network": {**NETWORK, "patch": 2},
    },
    "lacking": {
        **COMMON, "data": "pixels", "listens": ["clip"],
        "low": {"side": LOW, "strongest": 0.4, "residual": True},
        "network": {**NETWORK, "patch": 2},
        "diffusion": {
            "path": "cosine", "prediction": "edm", "sigma_data": 0.15, "times": "lognormal",
        },
    },
    "latents": {
        **COMMON, "listens": ["clip"], "low": {"side": 4, "augment": "none"},
        "attributes": [
            {"name": "colour", "answers": COLOURS},
            {"name": "size", "answers": ["small", "large"]},
        ],
    },
}  # fmt: skip
DEFAULTS = {"steps": 6, "guidance": 2.0}


@pytest.fixture(scope="module")
def made(line, tmp_path_factory) -> dict[str, Generator]:
    """A base that enlarges pixels and hears nothing; one that hears a text and learns what the
    small picture lacks; one of latents that is told a class too."""
    from pipeline.encode import pixels_spec
    from training.job import Job, run

    root, found = tmp_path_factory.mktemp("given"), {}
    pixels, specs = pixels_spec(SIDE), {it.name: it for it in line.specs}
    needs = {"enlarged": [], "lacking": ["clip"], "latents": ["autoencoder", "clip"]}
    for name, wanted in needs.items():
        inputs = {it: line.stages[it] for it in wanted}
        run(
            Job(
                kind="base", fingerprint=name, config=CONFIGS[name],
                training={
                    "images": 1280 if name == "enlarged" else 320, "batch": 16,
                    "learning_rate": 3e-3, "log_images": 80, "checkpoint_images": 10_000,
                    "ema_halflife_images": 20,
                },
                dataset=line.data.dataset, version=1,
                encodings=tuple(
                    {"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint}
                    for s in (pixels, *(specs[it] for it in wanted))
                ),
                inputs=inputs, output=str(root / name),
            )
        )  # fmt: skip
        assemble(root / f"{name}-made", {**inputs, "base": root / name}, DEFAULTS)
        found[name] = Generator.load(root / f"{name}-made", "cpu", precision="fp32")
    return found


@pytest.fixture(scope="module")
def low(scenes) -> np.ndarray:
    return small(np.ascontiguousarray(scenes[0][:3].transpose(0, 2, 3, 1)), LOW)


def small(pictures: np.ndarray, side: int) -> np.ndarray:
    n, whole = pictures.shape[:2]
    squares = pictures.reshape(n, side, whole // side, side, whole // side, 3)
    return squares.mean((2, 4)).round().astype(np.uint8)


def miss(pictures: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    shrunk = small(pictures, wanted.shape[1]).astype(float)
    return ((shrunk - wanted) ** 2).mean((1, 2, 3)) ** 0.5


def test_a_generator_says_what_it_is_given(made, line, tmp_path):
    import json

    enlarged, latents = made["enlarged"], made["latents"]
    assert (enlarged.low_side, enlarged.reads_labels, enlarged.reads_text) == (LOW, False, False)
    assert enlarged.given == {"low": LOW, "text": False}
    labels = {"colour": list(COLOURS), "size": ["small", "large"]}
    assert latents.given == {"low": 4, "labels": labels, "text": True}
    stages = {name: line.stages[name] for name in ("autoencoder", "clip", "t5", "base")}
    assemble(tmp_path / "g", stages)
    assert "given" not in json.loads((tmp_path / "g" / "generator.json").read_text())


def test_the_small_picture_is_enlarged(made, low):
    """What is drawn shrinks to the picture that was given, rather than to another one."""
    drawn = made["enlarged"]([""] * 3, seed=1, low=low)
    assert drawn.shape == (3, SIDE, SIDE, 3)
    np.testing.assert_array_equal(drawn, made["enlarged"]([""] * 3, seed=1, low=low))
    assert (miss(drawn, low) < miss(drawn, low[[1, 2, 0]])).all()
    assert miss(drawn, low).mean() * 1.5 < miss(drawn, low[[1, 2, 0]]).mean()
    other = made["enlarged"]([""] * 3, seed=1, low=low[[1, 2, 0]])
    assert (other != drawn).any((1, 2, 3)).all()


def test_a_picture_is_a_function_of_its_own_low_and_seed(made, low, monkeypatch):
    from training import request as module

    options = {"level": 0.3, "kind": "ddim", "eta": 1.0}
    it, seeds = made["enlarged"], [5, 9, 2]
    together = it.latents([""] * 3, seed=seeds, low=low, **options)
    monkeypatch.setattr(module, "BATCH", 2)
    parts = it.latents([""] * 3, seed=seeds, low=low, **options)
    torch.testing.assert_close(parts, together, atol=1e-3, rtol=1e-3)


def test_the_network_is_told_the_picture_damaged_to_the_level(made, low):
    it, told = made["enlarged"], []
    hook = it.base.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    it(["x"], seed=4, low=low[:1], level=0.25, steps=1, guidance=1.0)
    it(["x"], seed=4, low=low[:1], steps=1, guidance=1.0)
    hook.remove()
    whole = to_unit(torch.from_numpy(low[:1]).permute(0, 3, 1, 2))
    a, s = it.base.model.path.at(torch.tensor([0.25]), whole)
    eps = normal(4, "base/level", torch.tensor([0]), tuple(whole.shape[1:]))
    torch.testing.assert_close(told[0]["low"], a * whole + s * eps)
    torch.testing.assert_close(told[1]["low"], whole)
    assert told[0]["level"] > told[1]["level"]


def test_a_negative_prompt_is_about_the_same_small_picture(made, low):
    """Both estimates that guidance leads between are of what the small picture lacks."""
    it, told = made["lacking"], []
    options = {"seed": 1, "low": low, "steps": 3}
    hook = it.base.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    led = it.latents(PROMPTS, negative="a blue ring", guidance=4.0, **options)
    hook.remove()
    assert len(told) == 3
    for cond in told:
        for name in ("low", "level", "mean"):
            assert torch.equal(*cond[name].chunk(2)), name
    plain = it.latents(PROMPTS, guidance=1.0, **options)
    assert not torch.equal(led, plain)
    # Away from what is asked for, by any scale, leads nowhere: there is but one estimate.
    own = it.latents(PROMPTS, negative=PROMPTS, guidance=4.0, **options)
    torch.testing.assert_close(own, plain, atol=1e-3, rtol=1e-3)
    blank, none = (
        it.latents(PROMPTS, negative=words, guidance=4.0, **options) for words in ("", None)
    )
    torch.testing.assert_close(blank, none, atol=1e-3, rtol=1e-3)


def test_a_base_that_learns_what_is_lacking_has_a_likelihood(made, line):
    batch = line.loader("pixels", "clip").rows(np.arange(4))
    found = made["lacking"].bits_per_dim(batch)
    assert found.shape == (4,)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(made["lacking"].bits_per_dim(batch), found)


def test_the_stages_of_latents_are_told_it_too(made, scenes):
    it = made["latents"]
    given = small(np.ascontiguousarray(scenes[0][:3].transpose(0, 2, 3, 1)), 4)
    drawn = it.stages(PROMPTS, seed=1, low=given)
    np.testing.assert_array_equal(drawn["base"], it(PROMPTS, seed=1, low=given))
    moved = it.latents(PROMPTS, seed=1, low=given[::-1])
    assert (moved - it.latents(PROMPTS, seed=1, low=given)).abs().max() > 1e-3
    row = it.between(PROMPTS[0], (3, 8), [0.0, 1.0], low=given[0], label=RED)
    ends = it(
        [PROMPTS[0]] * 2, seed=[3, 8], sampler="ddim", low=given[[0, 0]],
        labels=[RED] * 2,
    )  # fmt: skip
    assert np.abs(row.astype(int) - ends).max() <= 1


def test_without_a_label_a_class_is_not_told(made):
    it, told = made["latents"], []
    given = np.full((3, 4, 4, 3), 128, np.uint8)
    hook = it.base.network.register_forward_pre_hook(lambda _, given: told.append(given[2]["y"]))
    options = {"seed": 1, "low": given, "steps": 1, "guidance": 1.0}
    plain = it.latents(PROMPTS, **options)
    none = it.latents(PROMPTS, labels=[None, {}, None], **options)
    some = it.latents(PROMPTS, labels=[BLUE, None, RED], **options)
    hook.remove()
    assert [it.tolist() for it in told] == [[16, 16, 16], [16, 16, 16], [5, 16, 0]]
    torch.testing.assert_close(plain, none)
    assert (some - plain).abs().amax((1, 2, 3))[1] < 1e-4
    assert (some - plain).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-4


def test_what_does_not_fit_is_refused(made, low, line, tmp_path):
    it, latents = made["enlarged"], made["latents"]
    for given, said in [
        ({}, r"low: this generator enlarges pictures, and none was given; give uint8 \[3, 8, 8, 3"),
        ({"low": low[:2]}, "low: got 2 for 3 prompts"),
        ({"low": low[:, :4]}, r"low: got uint8 \[3, 4, 8, 3\], wanted uint8 \[3, 8, 8, 3\]"),
        ({"low": low / 255}, "low: got float64"),
        ({"low": low, "level": 0.9}, "level: got 0.9, and it learnt noise from 0 to 0.4"),
        ({"low": low, "level": -1.0}, "level: got -1.0, wanted at least 0"),
        ({"low": low, "labels": [{}] * 3}, "labels: no stage of this generator is told classes"),
    ]:
        with pytest.raises(ValueError, match=said):
            it(PROMPTS, **given)
    few = np.zeros((1, 4, 4, 3), np.uint8)
    for label, said in [
        ({"colour": "mauve"}, r"labels\[0\]: colour 'mauve' is none of red, green"),
        ({"shape": "ring"}, r"labels\[0\]: no attribute 'shape'; there are colour, size"),
        ({"size": "small"}, r"labels\[0\]: a class is colour and size together, got size alone"),
    ]:
        with pytest.raises(ValueError, match=said):
            latents(["a"], low=few, labels=[label])
    plain = {name: line.stages[name] for name in ("autoencoder", "clip", "t5", "base")}
    assemble(tmp_path / "g", plain)
    with pytest.raises(ValueError, match="low: this generator enlarges no picture"):
        Generator.load(tmp_path / "g", "cpu")(["a"], low=few)
    with pytest.raises(ValueError, match="level: got 0.5, and the base enlarges no picture"):
        assemble(tmp_path / "h", plain, {"level": 0.5})
