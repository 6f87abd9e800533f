"""Label maps: what makes them, how a base is told them, and what a caller gives."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import shapes
from training import checkpoint, encoders, results, stages
from training.assembling import assemble
from training.autoencoding import to_unit
from training.diffusion import uniform
from training.enlarging import enlarged, shrunk
from training.generator import Generator
from training.mapping import MapConfig, Mapper, nearest, shares
from training.stage import to_tensors

SIDE = 16
PROMPTS = ["a red circle", "a small blue square", "one green ring"]
COLOURS = {**shapes.COLOURS, **shapes.BACKGROUNDS}
PALETTE = [[name, list(colour)] for name, colour in COLOURS.items()]
NETWORK = {
    "kind": "unet", "channels": 16, "channel_mult": [1], "attention": [1], "head_width": 16,
    "context_width": 32, "blocks": 1,
}  # fmt: skip
COMMON = {"network": NETWORK, "preview": {"steps": 2}, "map": {"palette": PALETTE}}
CONFIGS: dict[str, Any] = {
    "pixels": {
        **COMMON, "data": "pixels", "listens": [], "network": {**NETWORK, "patch": 2},
    },
    "latents": {
        **COMMON, "listens": ["clip"], "low": {"side": 4, "augment": "none"},
        "map": {"palette": PALETTE, "dropout": 0.5},
    },
}  # fmt: skip
DEFAULTS = {"steps": 6, "guidance": 1.0}


def job_of(line, name: str, output: Path, **more: Any) -> Any:
    from pipeline.encode import pixels_spec
    from training.job import Job

    specs = {it.name: it for it in line.specs}
    needed = {"pixels": (), "latents": ("autoencoder", "clip")}[name]
    images = {"pixels": 1280, "latents": 320}[name]
    return Job(
        kind="base", fingerprint=f"{name}-map", config=CONFIGS[name],
        training={
            "images": images, "batch": 16, "learning_rate": 3e-3, "log_images": 80,
            "checkpoint_images": 10_000, "ema_halflife_images": 20, **more,
        },
        dataset=line.data.dataset, version=1,
        encodings=tuple(
            {"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint}
            for s in (pixels_spec(SIDE), *(specs[it] for it in needed))
        ),
        inputs={it: line.stages[it] for it in needed}, output=str(output),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(line, tmp_path_factory) -> dict[str, Generator]:
    """A base of pixels that is told maps alone; one of latents that is told words and small
    pictures too, and at times no map."""
    from training.job import run

    root, found = tmp_path_factory.mktemp("maps"), {}
    for name in CONFIGS:
        job = job_of(line, name, root / name)
        run(job)
        assemble(root / f"{name}-made", {**job.inputs, "base": root / name}, DEFAULTS)
        found[name] = Generator.load(root / f"{name}-made", "cpu", precision="fp32")
    return found


@pytest.fixture(scope="module")
def pictures(scenes) -> np.ndarray:
    return np.ascontiguousarray(scenes[0][:3].transpose(0, 2, 3, 1))


def segmenter_at(folder: Path, classes: int = 5, **prepared: Any) -> Any:
    """A tiny SegFormer as the hub keeps one, and the network itself."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    names = {k: f"class {k}" for k in range(classes)}
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, id2label=names, label2id={it: k for k, it in names.items()},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval()
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    model.save_pretrained(folder)
    kind = {"image_processor_type": "SegformerImageProcessor", "image_mean": [0.4, 0.5, 0.6]}
    kind |= {"image_std": [0.2, 0.3, 0.25], "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(kind | prepared))
    return model


def test_the_nearest_colour_is_the_class():
    colours = [(0, 0, 0), (255, 0, 0), (255, 255, 255), (10, 0, 0)]
    pixels = [(0, 0, 0), (254, 3, 1), (130, 130, 130), (5, 0, 0), (6, 0, 0), (132, 0, 0)]
    x = torch.tensor(pixels, dtype=torch.uint8).T.reshape(1, 3, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):  # equally near: the first
        assert nearest(x, colours).flatten().tolist() == [0, 1, 2, 0, 3, 3]


def test_of_a_drawn_scene_ground_and_object_are_found_exactly():
    scene = shapes.scene_of(
        {"colour": "cyan", "shape": "square", "size": "large", "place": "centre",
         "background": "pink"}, 0, 0,
    )  # fmt: skip
    picture = shapes.draw(scene, 64)
    found = Mapper(MapConfig(palette=tuple((n, c) for n, c in COLOURS.items())))(
        torch.from_numpy(picture).permute(2, 0, 1)[None]
    )[0].numpy()
    names, one = tuple(COLOURS), scene.objects[0]
    x, y = (np.arange(64) + 0.5)[None] / 64, (np.arange(64) + 0.5)[:, None] / 64
    reach = np.maximum(abs(x - one.x), abs(y - one.y)) - 0.88 * one.radius
    assert (found[reach < -1 / 64] == names.index("cyan")).all()
    assert (found[reach > 1 / 64] == names.index("pink")).all()


def test_shares_are_means_of_one_hot_channels():
    maps = torch.randint(0, 5, (3, 12, 12), generator=torch.Generator().manual_seed(0))
    wanted = shrunk(F.one_hot(maps, 6).permute(0, 3, 1, 2).double(), 4)
    found = shares(maps, 6, 4)
    torch.testing.assert_close(found.double(), wanted, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="maps of 12 x 12 pixels cannot be shrunk to 5 x 5"):
        shares(maps, 6, 5)


def test_a_segmenter_makes_the_maps_that_transformers_makes(tmp_path):
    """By its own preparation, network and post-processing."""
    from PIL import Image
    from transformers import AutoImageProcessor

    model = segmenter_at(tmp_path)
    for side in (SIDE, 24):  # of the side that it wants, and of one that is resized
        x = np.random.default_rng(side).integers(0, 256, (2, side, side, 3), np.uint8)
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        given = processor(images=[Image.fromarray(it) for it in x], return_tensors="pt")
        with torch.no_grad():
            said = model(**given)
        wanted = processor.post_process_semantic_segmentation(said, [(side, side)] * 2)
        mapper = Mapper(MapConfig(segmenter=str(tmp_path), classes=tuple("abcde")))
        found = mapper(torch.from_numpy(x).permute(0, 3, 1, 2))
        agreeing = (found == torch.stack(wanted)).float().mean()
        assert len(found.unique()) > 1
        assert agreeing == 1 if side == SIDE else agreeing > 0.98
    assert encoders.shapes.class_names(str(tmp_path)) == tuple(f"class {k}" for k in range(5))


def test_a_base_takes_its_classes_from_the_segmenter_and_draws_without_it(tmp_path, scenes):
    folder = tmp_path / "segmenter"
    segmenter_at(folder, classes=4)
    config = CONFIGS["pixels"] | {"map": {"segmenter": str(folder)}}
    stage: Any = stages.create("base", config)
    assert stage.config.map.names == tuple(f"class {k}" for k in range(4))
    assert stage.config.network.low_channels == 4
    x = torch.from_numpy(scenes[0][:2])
    batch = {"pixels": x, "position": torch.arange(2)}
    told = stage.cond(batch)["low"]
    torch.testing.assert_close(told, F.one_hot(stage.mapper(x), 4).permute(0, 3, 1, 2).float())
    assert stage(batch)["loss"].shape == (2,)
    assert not any("segmenter" in name or "mapper" in name for name in stage.state_dict())
    for file in folder.iterdir():
        file.unlink()
    anew: Any = stages.create("base", json.loads(json.dumps(asdict(stage.config))))
    assert anew.config == stage.config
    with pytest.raises(ValueError, match=r"holds no semantic|no safetensors"):
        anew.cond(batch)


def test_the_network_is_told_the_shares_beside_what_is_enlarged(made, line):
    base = made["latents"].base
    batch = next(line.loader("pixels", "autoencoder", "clip").batches())
    tensors = to_tensors(batch)
    told = base.cond(tensors)["low"]
    side = int(base.latent_shape[-1])
    small = shrunk(to_unit(tensors["pixels"]), 4)
    maps = nearest(tensors["pixels"], [tuple(it) for it in COLOURS.values()])
    torch.testing.assert_close(told[:, :3], enlarged(small, side))
    torch.testing.assert_close(told[:, 3:], shares(maps, len(COLOURS), side))
    # Training drops half of the maps, each for itself, and nothing else of what is told.
    seen = []
    hook = base.network.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    base(tensors)
    hook.remove()
    kept = uniform(base.seed, "keep/map", tensors["position"]) >= 0.5
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(seen[0]["low"][:, :3], told[:, :3])
    torch.testing.assert_close(seen[0]["low"][:, 3:], told[:, 3:] * kept[:, None, None, None])


def test_a_drawn_picture_keeps_to_its_map(made, pictures):
    it = made["pixels"]
    maps = it.mapped(pictures)
    assert maps.dtype == np.uint8
    drawn = it([""] * 3, seed=1, map=maps)
    assert drawn.shape == (3, SIDE, SIDE, 3)
    np.testing.assert_array_equal(drawn, it([""] * 3, seed=1, map=maps))

    def agreement(wanted: np.ndarray) -> np.ndarray:
        return (it.mapped(drawn) == wanted).mean((1, 2))

    other = maps[[1, 2, 0]]
    assert (agreement(maps) > agreement(other)).all()
    moved = it([""] * 3, seed=1, map=other)
    assert (moved != drawn).any((1, 2, 3)).all()
    row = it.between("", (3, 8), [0.0, 1.0], map=maps[0])
    ends = it([""] * 2, seed=[3, 8], sampler="ddim", map=maps[[0, 0]])
    assert np.abs(row.astype(int) - ends).max() <= 1


def test_each_condition_of_latents_is_heard(made, pictures, monkeypatch):
    from training import request as module

    it = made["latents"]
    maps = it.mapped(pictures)
    low = pictures.reshape(3, 4, 4, 4, 4, 3).mean((2, 4)).round().astype(np.uint8)
    plain = it.latents(PROMPTS, seed=1, low=low, map=maps)
    for told in (
        {"low": low[::-1], "map": maps}, {"low": low, "map": maps[::-1]},
    ):  # fmt: skip
        assert (it.latents(PROMPTS, seed=1, **told) - plain).abs().amax((1, 2, 3))[0] > 1e-4
    spoken = it.latents(PROMPTS[::-1], seed=1, low=low, map=maps)
    assert (spoken - plain).abs().amax((1, 2, 3))[0] > 1e-4
    monkeypatch.setattr(module, "BATCH", 2)
    parts = it.latents(PROMPTS, seed=1, low=low, map=maps)
    torch.testing.assert_close(parts, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("negative", [None, "a ring"])
def test_guidance_leads_away_from_no_map_where_that_was_learnt(made, pictures, negative):
    for name, drops in (("pixels", False), ("latents", True)):
        it, seen = made[name], []
        low = {"low": np.full((1, 4, 4, 3), 200, np.uint8)} if it.low_side else {}
        told = {"map": it.mapped(pictures[:1]), **low}
        hook = it.base.network.register_forward_pre_hook(lambda _, given: seen.append(given[2]))  # noqa: B023
        it(["x"], seed=4, steps=1, guidance=2.0, negative=negative, **told)
        hook.remove()
        away, towards = seen[0]["low"]
        count = len(COLOURS)
        assert towards[-count:].sum(0).eq(1).all()
        assert away[-count:].eq(0).all() if drops else away.equal(towards)
        torch.testing.assert_close(away[:-count], towards[:-count])
        assert seen[0]["keep"].tolist() == [negative is not None, True]


def test_a_generator_says_which_maps_it_is_given(made, tmp_path):
    names = list(COLOURS)
    assert made["pixels"].given == {"map": {"classes": names, "side": SIDE}, "text": False}
    assert made["latents"].given == {
        "low": 4, "map": {"classes": names, "side": SIDE}, "text": True,
    }  # fmt: skip
    assert made["pixels"].map_colours.tolist() == [list(it) for it in COLOURS.values()]
    voc = MapConfig(segmenter="x", classes=("ground", "plane", "bicycle", "bird")).colours
    assert voc.tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]


def test_maps_that_do_not_fit_are_refused(made, line, pictures, tmp_path):
    it = made["pixels"]
    maps = it.mapped(pictures)
    count = len(COLOURS)
    many = np.full_like(maps, count)
    for given, said in [
        ({}, r"map: this generator draws by label maps, and none was given; give uint8 \[3, 16,"),
        ({"map": maps[:2]}, "map: got 2 for 3 prompts"),
        ({"map": maps[:, :8]}, r"map: got uint8 \[3, 8, 16\], wanted uint8 \[3, 16, 16\]"),
        ({"map": maps.astype(int)}, "map: got int64"),
        ({"map": many}, rf"map\[0\]: got index {count}, wanted 0 to {count - 1}: red, green"),
        ({"map": maps, "low": pictures}, "low: this generator enlarges no picture"),
        ({"map": maps, "level": 0.2}, "level: got 0.2, and the base enlarges no picture"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            it(PROMPTS, **given)
    plain = {name: line.stages[name] for name in ("autoencoder", "clip", "t5", "base")}
    assemble(tmp_path / "g", plain)
    with pytest.raises(ValueError, match="map: this generator is told no label maps"):
        Generator.load(tmp_path / "g", "cpu")(PROMPTS, map=maps)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no palette and no segmenter, wanted one of the two"),
        ({"palette": PALETTE, "segmenter": "x"}, "a palette and a segmenter"),
        ({"palette": PALETTE, "classes": ["a"]}, "the palette names them"),
        ({"palette": PALETTE[:1]}, "got 1 classes, wanted 2 to 256"),
        ({"palette": [PALETTE[0], PALETTE[0]]}, "wanted different names, got red, red"),
        ({"palette": [["a", [0, 0, 256]], ["b", [0, 0, 0]]]}, "a is no sRGB colour"),
        ({"palette": [["a", [0, 0]], ["b", [0, 0, 0]]]}, "got 2 values, wanted 3"),
        ({"palette": PALETTE, "dropout": 1.0}, r"map.dropout must lie in \[0, 1\)"),
    ],
)  # fmt: skip
def test_what_makes_no_map_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        stages.config_of("base", CONFIGS["pixels"] | {"map": config})


def test_only_a_base_of_pictures_is_told_maps():
    prior = {"data": "embedding", "network": {"kind": "prior"}, "map": {"palette": PALETTE}}
    with pytest.raises(ValueError, match="map: embeddings have no pixels"):
        stages.config_of("base", prior)
    without = CONFIGS["pixels"] | {"map": None, "network": {**NETWORK, "low_channels": 3}}
    with pytest.raises(ValueError, match="nothing is enlarged here"):
        stages.config_of("base", without)


def test_a_run_that_was_broken_off_ends_like_an_unbroken_one(line, tmp_path):
    from training.job import run

    whole = job_of(line, "latents", tmp_path / "whole", images=96, checkpoint_images=48)
    halves = job_of(line, "latents", tmp_path / "halves", images=96, checkpoint_images=48)
    run(whole)

    class Over(Exception):
        pass

    def end(record: dict[str, Any]) -> None:
        if record["images_seen"] >= 80:
            raise Over

    with pytest.raises(Over):
        run(halves, on_progress=end)
    assert checkpoint.visible(tmp_path / "halves" / results.CHECKPOINTS)
    run(halves)
    there, here = (tmp_path / it / results.WEIGHTS for it in ("whole", "halves"))
    assert there.read_bytes() == here.read_bytes()
