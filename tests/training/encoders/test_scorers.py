"""Scorers: the number that a direct computation gives, and a fingerprint for each."""

import gc
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.execute import Executor
from pipeline.score import read_scores, score
from training import contrastive, stages
from training.encoders import clip as clips
from training.encoders import scorers
from training.encoders.scorers import (
    ClipHeadConfig,
    ClipSimilarityConfig,
    ImageClassifierConfig,
    build,
    config_of,
    spec_of,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
EMBED = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A pretrained CLIP as open_clip publishes it, that sees pictures of 16 pixels."""
    from open_clip.model import CLIP

    folder = tmp_path_factory.mktemp("clip")
    config = contrastive.model_config(
        stages.config_of(
            "clip",
            {
                "embed": EMBED,
                "image": {"kind": "vit", "side": 16, "width": 32, "layers": 1},
                "text": {"vocabulary": 49408, "context": 20, "width": 16, "heads": 2, "layers": 1},
            },
        )
    )
    torch.manual_seed(0)
    save_file(CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    described = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": described})
    )
    return str(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> str:
    """A transformers classifier with what prepares its pictures, as the hub keeps them."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = str(tmp_path_factory.mktemp("detector"))
    torch.manual_seed(0)
    ViTForImageClassification(vit(ViTConfig)).save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    ).save_pretrained(folder)
    return folder


def vit(config, labels=("clean", "watermark", "logo"), **more):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 4}
    names = dict(enumerate(labels))
    return config(**sizes, **more, id2label=names, label2id={n: i for i, n in names.items()})


def head(path: Path, **tensors) -> str:
    save_file({name: torch.as_tensor(it) for name, it in tensors.items()}, path)
    return str(path)


def mlp(widths, numbers, seed=0):
    """Weights of Linear layers between `widths`, numbered as in a Sequential."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"layers.{number}.{what}": torch.randn(shape, generator=draw)
        for number, before, after in zip(numbers, widths, widths[1:], strict=False)
        for what, shape in (("weight", (after, before)), ("bias", (after,)))
    }


def embedding(clip, pixels) -> torch.Tensor:
    """By open_clip and its own preparation of pictures."""
    import open_clip

    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    pictures = [Image.fromarray(it.transpose(1, 2, 0)) for it in pixels]
    with torch.no_grad():
        x = model.eval().encode_image(torch.stack([prepare(it) for it in pictures]))
    return x / x.norm(dim=-1, keepdim=True)


def test_the_stages_similarity_is_the_cosine_of_its_towers(line, scenes):
    pixels, captions = scenes
    spec = spec_of(ClipSimilarityConfig(clip=line.stages["clip"]))
    assert (spec.name, spec.columns, spec.side) == ("clip_similarity", ("clip_similarity",), 16)
    found = build(spec)(pixels, captions)["clip_similarity"]
    assert (found.dtype, found.shape) == (np.float32, (32,))
    stage = stages.load(line.stages["clip"])
    wanted = (stage.images(torch.from_numpy(pixels)) * stage.texts(captions)).sum(1)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert np.ptp(found) > 0.05
    shifted = build(spec)(pixels, captions[1:] + captions[:1])["clip_similarity"]
    assert found.mean() > shifted.mean()  # it has learnt a little


def test_a_pretrained_clips_similarity_is_open_clips(clip, scenes):
    import open_clip

    pixels, captions = scenes
    captions = [*captions[:30], "", "a very long caption " * 40]
    spec = spec_of(ClipSimilarityConfig(clip=clip, name="likeness"))
    found = build(spec)(pixels, captions)["likeness"]
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    with torch.no_grad():
        ids = open_clip.get_tokenizer(f"local-dir:{clip}")(captions)
        wanted = (embedding(clip, pixels) * model.encode_text(ids, normalize=True)).sum(1)
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_a_linear_head_is_a_product_with_the_normalised_embedding(clip, scenes, tmp_path):
    weight, bias = np.linspace(-2, 3, EMBED, dtype=np.float32)[None], np.float32([5])
    config = ClipHeadConfig(
        name="aesthetic", clip=clip, head=head(tmp_path / "a.safetensors", weight=weight, bias=bias)
    )
    found = build(spec_of(config))(scenes[0], scenes[1])["aesthetic"]
    wanted = embedding(clip, scenes[0]).numpy() @ weight[0] + 5
    np.testing.assert_allclose(found, wanted, **CLOSE)
    inside = replace(config, head=str(tmp_path))  # the folder with just one
    assert spec_of(inside).fingerprint == spec_of(config).fingerprint


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_layers_go_by_number_with_activations_only_where_there_is_room(
    clip, scenes, tmp_path, activation
):
    weights = mlp((EMBED, 9, 7, 5, 1), (0, 3, 10, 11))  # "layers.10" is after "layers.3"
    config = ClipHeadConfig(
        name="a", clip=clip, head=head(tmp_path / "a.safetensors", **weights), activation=activation
    )
    x = embedding(clip, scenes[0])
    for number in (0, 3, 10, 11):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
        x = x.relu() if activation == "relu" and number in (0, 3) else x
    found = build(spec_of(config))(scenes[0], scenes[1])["a"]
    np.testing.assert_allclose(found, x[:, 0], atol=1e-4, rtol=1e-4)


def test_a_head_with_a_normalisation_named_layers_and_a_sigmoid(clip, scenes, tmp_path):
    x, parts = embedding(clip, scenes[0]), mlp((EMBED, 8, 1), (1, 2))
    tensors = {name.replace("layers.", "linear_"): it for name, it in parts.items()}
    tensors |= {"norm.mean": x.mean(0), "norm.variance": x.var(0)}
    config = ClipHeadConfig(
        name="nsfw",
        clip=clip,
        head=head(tmp_path / "nsfw.safetensors", **tensors),
        activation="relu",
        output="sigmoid",
    )
    y = (x - x.mean(0)) / x.std(0)
    y = (y @ parts["layers.1.weight"].T + parts["layers.1.bias"]).relu()
    y = (y @ parts["layers.2.weight"].T + parts["layers.2.bias"]).sigmoid()
    found = build(spec_of(config))(scenes[0], scenes[1])["nsfw"]
    np.testing.assert_allclose(found, y[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_classifiers_score_is_the_probability_of_its_label(detector, scenes, tmp_path, problem):
    from transformers import ViTForImageClassification

    folder = Path(shutil.copytree(detector, tmp_path / "detector"))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"problem_type": problem}))
    spec = spec_of(ImageClassifierConfig(name="watermark", model=str(folder), label="watermark"))
    assert spec.side == 16
    found = build(spec)(scenes[0], scenes[1])["watermark"]
    model = ViTForImageClassification.from_pretrained(folder).eval()
    mean, std = (torch.tensor(it)[:, None, None] for it in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    with torch.no_grad():
        logits = model(pixel_values=(torch.from_numpy(scenes[0]) / 255 - mean) / std).logits
    wanted = logits.sigmoid() if problem else logits.softmax(1)
    np.testing.assert_allclose(found, wanted[:, 1], **CLOSE)
    assert np.ptp(found) > 1e-3


@pytest.mark.parametrize(
    ("processor", "options", "side"),
    [
        ("ViT", {"size": {"height": 24, "width": 16}}, 24),
        ("CLIP", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}, 20),
        ("ConvNext", {"size": {"shortest_edge": 16}, "crop_pct": 0.8}, 20),
        ("ViT", {"do_resize": False, "crop_size": {"height": 16, "width": 16}}, 16),
    ],
)
def test_pictures_come_in_the_size_that_the_models_own_preparation_makes(
    detector, tmp_path, processor, options, side
):
    import transformers

    folder = shutil.copytree(detector, tmp_path / "detector")
    getattr(transformers, f"{processor}ImageProcessorPil")(**options).save_pretrained(folder)
    spec = spec_of(ImageClassifierConfig(name="logo", model=str(folder), label="logo"))
    assert spec.side == side


def test_what_was_cropped_by_the_models_own_preparation_is_what_it_sees(detector, tmp_path):
    import transformers

    folder = shutil.copytree(detector, tmp_path / "detector")
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    spec = spec_of(ImageClassifierConfig(name="logo", model=str(folder), label="logo"))
    scorer = build(spec)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 20), np.uint8)
    framed = pixels.copy()
    framed[:, :, :2] = framed[:, :, -2:] = 0  # the frame of two pixels that is cut off
    framed[..., :2] = framed[..., -2:] = 0
    found = scorer(pixels, ["", ""])["logo"]
    np.testing.assert_array_equal(scorer(framed, ["", ""])["logo"], found)
    framed[:, :, 2] = 0
    assert (scorer(framed, ["", ""])["logo"] != found).all()


def test_scores_of_a_data_set_are_those_of_its_pictures(line, clip, detector, tmp_path):
    from pipeline import images
    from pipeline.shards import read_shard

    aesthetic = head(tmp_path / "a.safetensors", **mlp((24, 4, 1), (0, 2)))
    configs = [
        ClipSimilarityConfig(clip=line.stages["clip"]),
        ClipHeadConfig(name="aesthetic", clip=line.stages["clip"], head=aesthetic),
        ImageClassifierConfig(name="watermark", model=detector, label="watermark"),
    ]
    specs = [spec_of(config) for config in configs]
    data = str(tmp_path / "data")
    for name in ("shards", "tables"):
        shutil.copytree(Path(line.data.dataset, name), Path(data, name))
    done = score(data, line.data.shards, specs, build, Executor(kind="local"))
    assert (done.shards, done.samples, set(done.unknown.values())) == (2, 80, {0})
    for shard in line.data.shards:
        found = read_scores(data, shard.name, [spec.fingerprint for spec in specs])
        samples = list(read_shard(f"{data}/shards/{shard.name}.tar"))
        pixels = np.stack([images.fit(images.decode(it.image)[0], 16) for it in samples])
        captions = [it.captions[0] for it in samples]
        for spec in specs:
            wanted = build(spec)(pixels, captions)[spec.name]
            np.testing.assert_allclose(found[spec.name], wanted, **CLOSE)


def test_a_clip_is_loaded_once_and_looks_at_a_picture_once_for_all_its_scorers(
    clip, scenes, tmp_path, monkeypatch
):
    opened, looks = [], []
    open_towers = clips.open_towers

    def towers(source):
        opened.append(1)
        model, tokenize = open_towers(source)
        model.visual.register_forward_hook(lambda *_: looks.append(1))
        return model, tokenize

    monkeypatch.setattr(clips, "open_towers", towers)
    path = head(tmp_path / "a.safetensors", **mlp((EMBED, 1), (0,)))
    specs = [
        spec_of(ClipSimilarityConfig(clip=clip)),
        spec_of(ClipHeadConfig(name="a", clip=clip, head=path)),
    ]
    made = [build(spec) for spec in specs]
    pixels, captions = scenes
    other = 255 - pixels
    first = [scorer(pixels, captions) for scorer in made]
    second = [scorer(other, captions) for scorer in made]
    assert (len(opened), len(looks)) == (1, 2)
    for before, after in zip(first, second, strict=True):
        assert all((before[name] != after[name]).all() for name in before)
    del made
    gc.collect()
    assert not scorers._CLIPS  # nothing of it stays behind on the GPU


def test_the_fingerprint_names_the_numbers_and_not_the_place(clip, detector, tmp_path, monkeypatch):
    path = head(tmp_path / "a.safetensors", **mlp((EMBED, 4, 1), (0, 2)))
    configs = [
        ClipSimilarityConfig(clip=clip),
        ClipHeadConfig(name="a", clip=clip, head=path),
        ImageClassifierConfig(name="logo", model=detector, label="logo"),
    ]
    prints = [spec_of(config).fingerprint for config in configs]
    moved = Path(shutil.copytree(clip, tmp_path / "clip"))
    there = Path(shutil.copytree(detector, tmp_path / "detector"))
    monkeypatch.chdir(tmp_path)
    elsewhere = [
        replace(configs[0], clip="clip"),
        replace(configs[1], clip="clip", head="a.safetensors"),
        replace(configs[2], model="detector"),
    ]
    specs = [spec_of(config) for config in elsewhere]
    assert [spec.fingerprint for spec in specs] == prints
    monkeypatch.chdir("/")  # where a worker may stand
    again = pickle.loads(pickle.dumps((specs, build)))
    assert again == (specs, build)
    for spec in specs:
        assert json.loads(json.dumps(spec.options)) == spec.options
        assert build(spec)
    others = [
        replace(configs[0], name="likeness"),
        replace(configs[1], name="b"),
        replace(configs[1], activation="relu"),
        replace(configs[1], output="sigmoid"),
        replace(configs[2], label="clean"),
    ]
    prints += [spec_of(config).fingerprint for config in others]
    for file, wanted in (("open_clip_model", 2), ("../a", 1), ("../detector/model", 1)):
        where = moved / f"{file}.safetensors"
        weights = load_file(where)
        next(iter(weights.values())).add_(1e-3)
        save_file(weights, where, {"format": "pt"})
        changed = []
        for spec in specs:
            now = spec_of(config_of(spec.options))
            if now.fingerprint != spec.fingerprint:
                changed.append(now)
                with pytest.raises(ValueError, match=f"are {now.fingerprint}, the spec names"):
                    build(spec)
        assert len(changed) == wanted
        prints += [spec.fingerprint for spec in changed]
        specs = [spec_of(config_of(spec.options)) for spec in specs]
    described = (there / "preprocessor_config.json").read_text()
    (there / "preprocessor_config.json").write_text(described.replace("0.25", "0.35"))
    prints.append(spec_of(config_of(specs[2].options)).fingerprint)
    assert len(set(prints)) == len(prints) == 3 + 5 + 4 + 1


def test_configs_come_from_json():
    assert config_of({"kind": "clip_similarity", "clip": "x"}) == ClipSimilarityConfig(clip="x")
    given = {"kind": "clip_head", "name": "aesthetic", "clip": "x", "head": "y"}
    assert config_of(given) == ClipHeadConfig(name="aesthetic", clip="x", head="y")
    given = {"kind": "image_classifier", "name": "nsfw", "model": "x", "label": "nsfw"}
    assert config_of(given) == ImageClassifierConfig(name="nsfw", model="x", label="nsfw")
    with pytest.raises(ValueError, match=r"scorer.kind: got 'clip_haed'; did you mean 'clip_head'"):
        config_of({"kind": "clip_haed"})
    with pytest.raises(ValueError, match="recipe.scorers: score 'NSFW': wanted a name of"):
        config_of({**given, "name": "NSFW"}, "recipe.scorers")
    with pytest.raises(ValueError, match="label is missing"):
        config_of({"kind": "image_classifier", "name": "nsfw", "model": "x"})
    with pytest.raises(ValueError, match=r"activation: got 'gelu', wanted 'none' or 'relu'"):
        config_of({"kind": "clip_head", "name": "a", "clip": "", "head": "", "activation": "gelu"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (mlp((EMBED + 1, 1), (0,)), r"weight \[1, 13\] .* a Linear from 12 \(the embedding of"),
        (mlp((EMBED, 4), (0,)) | mlp((5, 1), (1,)), r"'layers.1' has weight \[1, 5\].* from 4$"),
        (mlp((EMBED, 4, 2), (0, 1)), "layers layers.0, layers.1 that end in 2"),
        ({"weight": np.ones((1, EMBED), np.float32)} | {"scale": np.ones(3)}, "and scale"),
        ({"layers.0.bias": np.ones(3, np.float32)}, r"'layers.0' has weight \[0\]"),
        ({"layers.0.weight": np.ones((EMBED, 1, 1), np.float32)}, r"weight \[12, 1, 1\]"),
        (mlp((EMBED, 1), (0,)) | {"norm.mean": np.ones(3)}, "norm is of 3 and 12 numbers"),
        ({}, "got layers none"),
    ],
)
def test_heads_of_another_make_are_refused(clip, tmp_path, tensors, message):
    config = ClipHeadConfig(name="a", clip=clip, head=head(tmp_path / "a.safetensors", **tensors))
    with pytest.raises(ValueError, match=message):
        spec_of(config)


def test_what_is_no_model_of_the_kind_is_refused(line, clip, detector, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"garbage")

    def refused(config, message):
        with pytest.raises(ValueError, match=message):
            spec_of(config)

    nowhere = str(tmp_path / "nowhere")
    refused(ClipSimilarityConfig(clip=nowhere), "nowhere: no such folder")
    refused(ClipSimilarityConfig(clip=line.stages["t5"]), "is a stage of kind 't5', wanted clip")
    refused(ClipSimilarityConfig(clip=detector), "no open_clip_config.json")
    refused(ClipHeadConfig(name="a", clip=clip, head=nowhere), "nowhere: no such folder")
    refused(ClipHeadConfig(name="a", clip=clip, head=f"{nowhere}.safetensors"), "no such file")
    refused(ClipHeadConfig(name="a", clip=clip, head=str(path)), "not a safetensors file")
    shutil.copy(path, tmp_path / "b.safetensors")
    refused(
        ClipHeadConfig(name="a", clip=clip, head=str(tmp_path)),
        "found a.safetensors, b.safetensors; name one",
    )
    refused(ImageClassifierConfig(name="a", model=nowhere, label="x"), "no such folder")
    refused(
        ImageClassifierConfig(name="a", model=line.stages["clip"], label="x"),
        "is a stage of kind 'clip', wanted a transformers image classifier",
    )
    refused(
        ImageClassifierConfig(name="a", model=clip, label="x"), "transformers reads no config there"
    )
    refused(
        ImageClassifierConfig(name="a", model=detector, label="Logo"),
        r"knows no label 'Logo' \(known: clean, watermark, logo\)",
    )


def test_classifiers_without_their_files_or_their_last_layer_are_refused(detector, tmp_path):
    from transformers import T5Config, T5EncoderModel, ViTConfig, ViTModel

    def copied(name):
        return Path(shutil.copytree(detector, tmp_path / name))

    def config(folder, label="logo"):
        return ImageClassifierConfig(name="logo", model=str(folder), label=label)

    unprepared = copied("unprepared")
    (unprepared / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="transformers reads no image processor there"):
        spec_of(config(unprepared))
    pickled = copied("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors file"):
        spec_of(config(pickled))
    headless = copied("headless")  # transformers would make up a last layer
    ViTModel(vit(ViTConfig), add_pooling_layer=False).save_pretrained(headless)
    with pytest.raises(ValueError, match=r"lack classifier.bias, classifier.weight"):
        build(spec_of(config(headless)))
    reader = copied("reader")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=30, **sizes)).save_pretrained(reader)
    with pytest.raises(ValueError, match="transformers reads no image classifier there"):
        build(spec_of(config(reader, "LABEL_0")))
    remote = copied("remote")
    described = json.loads((remote / "config.json").read_text())
    del described["model_type"]
    described["auto_map"] = {"AutoConfig": "evil.Config"}
    (remote / "config.json").write_text(json.dumps(described))
    (remote / "evil.py").write_text("raise SystemExit('code of a model was run')")
    with pytest.raises(ValueError, match="transformers reads no config there"):
        spec_of(config(remote))
