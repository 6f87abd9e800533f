"""The edit's stage: it follows the direction it is given, and keeps what it is not to change."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training import stages
from training.assembling import assemble
from training.autoencoding import to_bytes
from training.diffusionclip import EditStage, EditStageConfig, structure_loss
from training.generator import Generator
from training.results import committed
from training.stage import to_tensors

BLUER = torch.tensor([-1.0, 0.0, 1.0])


class MeanColour:
    """A CLIP that sees the mean colour, and reads its direction off one word."""

    def features(self, x):
        return x.mean((2, 3))

    def texts(self, captions):
        return torch.stack([BLUER * ("blue" in it) for it in captions])


@pytest.fixture(scope="module")
def batch(line):
    found = to_tensors(line.loader("pixels").rows(np.arange(64)))
    red = [row for row, it in enumerate(found["caption"]) if "red" in it.split()][:4]
    return {
        "pixels": found["pixels"][red],
        "caption": [found["caption"][row] for row in red],
        "position": torch.arange(len(red)),
    }


def fresh(line, monkeypatch, **config):
    inputs = {"base": line.pixel_base, "clip": line.stages["clip"]}
    described = {"inversion_steps": 4, "steps": 3, **config}
    stage: EditStage = stages.create("edit", described, inputs)  # type: ignore[assignment]
    trained = stage.frozen
    monkeypatch.setattr(stage, "frozen", lambda n: MeanColour() if n == "clip" else trained(n))
    stage.prepare(None)
    return stage


def edited(stage, batch):
    with torch.no_grad():
        x = batch["pixels"] / 127.5 - 1
        return x, stage.drawn(stage.noised(stage.frozen("base").model, x))


def trained(stage, batch, updates, rate=2e-3):
    optimizer = torch.optim.Adam(stage.network.parameters(), rate)
    for _ in range(updates):
        optimizer.zero_grad()
        stage(batch)["loss"].mean().backward()
        optimizer.step()


def test_without_a_direction_pictures_stay_what_they_are(line, batch, monkeypatch):
    stage = fresh(line, monkeypatch, noise=0.4, direction=0.0, reconstruction=1.0)
    x, before = edited(stage, batch)
    trained(stage, batch, 10, rate=1e-4)
    _, after = edited(stage, batch)
    assert (after - x).abs().mean() < 1.02 * (before - x).abs().mean() < 0.08


def test_a_direction_is_followed_and_pixels_are_kept_the_more_they_weigh(line, batch, monkeypatch):
    def moved(reconstruction):
        stage = fresh(line, monkeypatch, noise=0.4, reconstruction=reconstruction)
        trained(stage, batch, 25)
        x, y = edited(stage, batch)
        change = (y - x).mean((2, 3))
        return torch.cosine_similarity(change, BLUER[None]), (y - x).abs().mean()

    (free, far), (_, near) = moved(0.0), moved(3.0)
    assert free.mean() > 0.85 and free.min() > 0.7
    assert near < 0.8 * far


def test_structure_is_the_outline_and_not_the_colour():
    """By hand: a soft disc in colours of its own on grounds of their own, and another shape."""
    across = torch.linspace(-1, 1, 16)
    disc = (1.6 - 3 * (across[:, None] ** 2 + across**2).sqrt()).clamp(0, 1)
    square = (across.abs()[:, None].maximum(across.abs()) < 0.4).float()

    def scene(mask, colour, ground):
        colour, ground = (torch.tensor(it)[:, None, None] for it in (colour, ground))
        return (mask * colour + (1 - mask) * ground)[None]

    red = scene(disc, (0.7, -0.7, -0.7), (0.8, 0.7, 0.4))
    blue = scene(disc, (-0.7, -0.5, 0.7), (0.8, 0.7, 0.4))
    moved = scene(disc.roll(2, 1), (0.7, -0.7, -0.7), (0.8, 0.7, 0.4))
    other = scene(square, (0.7, -0.7, -0.7), (0.8, 0.7, 0.4))
    rim = torch.where((disc > 0) & (disc < 1), red, blue)
    assert structure_loss(red, red) == 0
    recoloured = float(structure_loss(red, blue))
    assert recoloured < 0.02
    for spoilt in (moved, other, rim):
        assert float(structure_loss(red, spoilt)) > 5 * recoloured
    with torch.autocast("cpu", torch.bfloat16):
        assert float(structure_loss(red, blue)) == recoloured
    wide = torch.nn.functional.interpolate(torch.cat([red, other]), scale_factor=4)
    found = structure_loss(wide[:1], wide[1:])  # of 64 pixels: their reductions'
    torch.testing.assert_close(found, structure_loss(red, other), rtol=0.02, atol=0)
    red.requires_grad_()
    (gradient,) = torch.autograd.grad(structure_loss(red, red.detach()).sum(), red)
    assert gradient.isfinite().all()


def test_structure_that_weighs_is_kept(line, batch, monkeypatch):
    def lost(structure):
        stage = fresh(line, monkeypatch, noise=0.4, reconstruction=0.0, structure=structure)
        trained(stage, batch, 25)
        x, y = edited(stage, batch)
        return structure_loss(x, y).mean()

    assert lost(3.0) < 0.8 * lost(0.0)


def test_only_pictures_with_the_source_teach(line, batch, monkeypatch):
    stage = fresh(line, monkeypatch)
    others = ["a cyan coloured ring on white", "predicted redness, a reddish circle"]
    mixed = {**batch, "caption": others + batch["caption"][2:]}
    assert stage.taught(mixed["caption"]).tolist() == [False, False, True, True]
    assert stage.worded("a Red ring, red-hot, coloured") == "a blue ring, blue-hot, coloured"
    alone, together = stage(batch)["loss"], stage(mixed)["loss"]
    assert together[:2].tolist() == [0, 0] and (together[2:] > 0).all()
    torch.testing.assert_close(together[2:], alone[2:], rtol=1e-4, atol=1e-5)

    nothing = stage({**batch, "caption": others * 2})["loss"]
    assert nothing.tolist() == [0] * 4
    nothing.sum().backward()  # workers share their gradients, be they nothing
    gradients = [p.grad for p in stage.network.parameters() if p.grad is not None]
    assert gradients and not any(g.abs().max() for g in gradients)


def test_to_noise_and_back_is_the_base_itself(line, batch, monkeypatch):
    stage = fresh(line, monkeypatch, inversion_steps=48, steps=48, noise=0.5)
    x, y = edited(stage, batch)
    assert (y - x).abs().mean() < 0.02
    noised = stage.noised(stage.frozen("base").model, x)
    a, s = stage.config.diffusion.build_path()(torch.tensor(0.5))
    assert (noised - a * x).std() > s / 2
    torch.testing.assert_close(stage.drawn(noised, stage.frozen("base").model), y)


def test_steps_that_are_computed_again_have_the_same_gradients(line, batch, monkeypatch):
    def gradients(recompute):
        stage = fresh(line, monkeypatch, recompute=recompute)
        loss = stage(batch)["loss"].sum()
        return loss, torch.autograd.grad(loss, [*stage.network.parameters()], allow_unused=True)

    (kept, of_kept), (again, of_again) = gradients(False), gradients(True)
    torch.testing.assert_close(kept, again)
    for one, other in zip(of_kept, of_again, strict=True):
        torch.testing.assert_close(one, other)


def test_the_noise_aware_clip_sees_picture_and_edit_under_one_noise(line, batch):
    inputs = {"base": line.pixel_base, "noisy_clip": line.stages["noisy_clip"]}
    stage: EditStage = stages.create("edit", {}, inputs)  # type: ignore[assignment]
    x, clip = batch["pixels"] / 127.5 - 1, stage.frozen("noisy_clip")
    features, texts = stage.judge(x, batch["position"], 3)
    torch.testing.assert_close(features(x), features(x), rtol=0, atol=0)
    others, _ = stage.judge(x, batch["position"] + 4, 3)
    assert not torch.equal(features(x), others(x))
    assert not torch.equal(features(x), clip.features(x))
    assert torch.equal(texts(batch["caption"]), clip.texts(batch["caption"]))
    clean: EditStage = stages.create("edit", {"judged_noise": 0}, inputs)  # type: ignore[assignment]
    seen, _ = clean.judge(x, batch["position"], 3)
    torch.testing.assert_close(seen(x), clip.features(x))
    moved, changed = stage.losses(x, x + 0.1, features, texts, batch["caption"])
    assert moved.shape == changed.shape == (4,)
    torch.testing.assert_close(changed, torch.full((4,), 0.1))


@pytest.fixture(scope="module")
def generator(line, tmp_path_factory):
    place = tmp_path_factory.mktemp("edits") / "generator"
    chosen = {name: line.stages[name] for name in ("clip", "t5", "edit")}
    assemble(place, {**chosen, "base": line.pixel_base})
    return Generator.load(place, "cpu", precision="fp32")


def test_a_call_chooses_the_way_of_its_edit(generator, batch):
    pictures = batch["pixels"].permute(0, 2, 3, 1).numpy()
    given = {"side": 16, "source": "red", "target": "blue"}
    assert generator.given == {"edit": given, "text": True}
    usual = generator.edit(pictures)
    same = generator.edit(pictures, noise=0.7, inversion_steps=4, steps=None)
    np.testing.assert_array_equal(same, usual)

    def off(**options):
        back = generator.edit(pictures, edited=False, **options)
        return np.abs(back.astype(float) - pictures).mean()

    assert off(inversion_steps=32, steps=32) < 0.5 * off()  # DDIM's order of convergence
    assert off(noise=0.05) < 0.5 * off()
    stage = generator.editor
    x = batch["pixels"] / 127.5 - 1
    way = stage.way({"noise": 0.4, "steps": 3})
    y = stage.drawn(stage.noised(generator.base.model, x, way), way=way)
    chosen = generator.edit(pictures, noise=0.4, steps=3)
    np.testing.assert_array_equal(chosen, to_bytes(y).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"noise": 1.5}, "noise: got 1.5, wanted a time above 0 and up to 1"),
        ({"inversion_steps": 0}, "inversion_steps: got 0, wanted at least 1"),
        ({"steps": 2.5}, "edit.steps: got 2.5, wanted int"),
        ({"target": "green"}, "edit: it has no target; it has noise, inversion_steps, steps"),
        ({"edited": "false"}, "edited: got 'false', wanted True or False"),
    ],
)
def test_another_way_is_refused(generator, wrong, told):
    with pytest.raises(ValueError, match=told):
        generator.edit(np.zeros((1, 16, 16, 3), np.uint8), **wrong)


def test_the_trained_stage_is_the_copy_alone(line):
    where = line.stages["edit"]
    names = set(load_file(f"{where}/weights.safetensors"))
    base = stages.load(line.pixel_base)
    assert names == {f"network.{name}" for name in base.network.state_dict()}
    stage = stages.load(where)
    assert stage.config.network == base.config.network
    moved = [
        (new - old).abs().max().item()
        for new, old in zip(stage.network.parameters(), base.network.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.2
    assert committed(where)["measured"].keys() == {"direction", "l1", "structure"}
    with pytest.raises(ValueError, match="edit: it learns from a base; give that stage"):
        stage.prepare(None)


def test_a_base_of_latents_is_refused(line):
    inputs = {"base": line.stages["base"], "clip": line.stages["clip"]}
    with pytest.raises(ValueError, match="is no base of pixels"):
        stages.create("edit", {}, inputs)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"noise": 0.0}, "noise: got 0.0, wanted a time"),
        ({"judged_noise": 1.5}, "judged_noise: got 1.5, wanted a time"),
        ({"steps": 0}, "steps: got 0, wanted at least 1"),
        ({"direction": -1.0}, "direction: got -1.0"),
        ({"target": "red"}, "wanted two words"),
    ],
)
def test_wrong_configs_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        EditStageConfig(**wrong)
    config = EditStageConfig(source="ring", target="cross")
    assert stages.config_of("edit", json.loads(json.dumps(asdict(config)))) == config
