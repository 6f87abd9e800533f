"""Features come from a trained stage's directory, are unit vectors, and carry the name they may be
compared under.
"""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluation.features import ClipFeatures, pictures_of
from pipeline import shapes, storage
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.load import Loader
from training import stages
from training.contrastive import (
    ClipStageConfig,
    TextTransformerConfig,
    VisionTransformerConfig,
    model_config,
)
from training.stage import distinct_tensors


@pytest.fixture(scope="module")
def stage_dir(tmp_path_factory):
    config = ClipStageConfig(
        embed=16,
        image=VisionTransformerConfig(side=16, patch=8, width=32, layers=1),
        text=TextTransformerConfig(context=16, vocabulary=514, width=32, layers=1, heads=1),
    )
    torch.manual_seed(0)
    stage = stages.create("clip", config)
    folder = tmp_path_factory.mktemp("clip")
    save_file(
        {name: t.detach().clone() for name, t in distinct_tensors(stage).items()},
        folder / "weights.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"kind": "clip", "config": asdict(config)}))
    return folder


def drawn(count, side):
    return np.stack([shapes.draw(shapes.scene(0, i), side) for i in range(count)])


def test_features_are_those_of_the_stage(stage_dir):
    clip, pictures = ClipFeatures(stage_dir, batch=3), drawn(7, 16)
    found = clip.images(pictures)
    stage: Any = stages.load(stage_dir)
    assert found == pytest.approx(
        stage.images(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy(), abs=1e-5
    )
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(7), abs=1e-5)
    captions = ["a red circle", "a blue square", "a", "b"]
    assert clip.texts(captions) == pytest.approx(stage.texts(captions).numpy(), abs=1e-5)


def test_pictures_of_another_side_are_resized_smoothly(stage_dir):
    clip = ClipFeatures(stage_dir)
    small, large = clip.images(drawn(5, 16)), clip.images(drawn(5, 64))
    assert (small * large).sum(1).min() > 0.98
    with pytest.raises(ValueError, match="square"):
        clip.images(np.zeros((1, 16, 8, 3), np.uint8))


def test_a_pretrained_clip_sees_and_reads_as_the_stage_with_its_weights(tmp_path):
    config = ClipStageConfig(
        embed=16,
        image=VisionTransformerConfig(side=16, patch=8, width=32, layers=1),
        text=TextTransformerConfig(context=16, vocabulary=49408, width=16, layers=1, heads=1),
    )
    torch.manual_seed(0)
    stage: Any = stages.create("clip", config).eval()
    save_file(stage.model.state_dict(), tmp_path / "open_clip_model.safetensors")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    described = {"model_cfg": model_config(config), "preprocess_cfg": half}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    clip, pictures = ClipFeatures(str(tmp_path), batch=3), drawn(5, 24)
    seen = stage.images(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
    assert clip.images(pictures) == pytest.approx(seen, abs=1e-5)
    captions = ["a red circle", "a big blue square in the corner"]
    assert clip.texts(captions) == pytest.approx(stage.texts(captions).numpy(), abs=1e-5)
    assert clip.tuple_id["extractor"] == f"CLIP {tmp_path}"
    with pytest.raises(ValueError, match="square"):
        clip.images(np.zeros((1, 16, 8, 3), np.uint8))


def test_the_tuple_names_weights_and_resize(stage_dir, tmp_path):
    clip = ClipFeatures(stage_dir)
    assert clip.tuple_id["weights"] == storage.sha256(stage_dir / "weights.safetensors")
    assert clip.tuple_id["resize"].endswith("to 16")


def test_reference_pictures_come_from_the_pixel_encoding(tmp_path):
    source, executor = "shapes://?scenes=60&seed=0&side=16&objects=1", Executor(kind="local")
    manifest = ingest([source], str(tmp_path), IngestRules(), executor).manifest
    encodings = encode(manifest, [pixels_spec(16)], None, executor)
    loader = Loader(manifest, list(encodings.values()), splits=("heldout",), global_batch=8, seed=0)
    found = pictures_of(loader, 10, batch=4)
    assert found.shape == (10, 16, 16, 3)
    known = {shapes.draw(shapes.scene(0, i), 16).tobytes() for i in range(60)}
    assert {it.tobytes() for it in found} <= known
    assert len(pictures_of(loader, 10_000)) == loader.samples
