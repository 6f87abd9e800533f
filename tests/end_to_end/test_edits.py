"""An edit from scenes to a packaged generator that edits, from the command line and over HTTP too,
and scenes of two objects likewise.
"""

import base64
import io
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import shapes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = (
    "data.ingest.shard_samples=200", "clip.training.images=512", "t5.training.images=320",
    "base.config.network.channels=32", "base.training.images=640", "executor.kind=local",
    "sampler.steps=4", "evaluation.prompts=32", "evaluation.sweep_prompts=8",
    "evaluation.reference_count=48", "evaluation.kid_block=16",
    "evaluation.guidance_scales=[2.0]", "evaluation.likelihood_samples=4", "gate.min_samples=4",
)  # fmt: skip


def png(picture: np.ndarray) -> str:
    """The file's base64."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def posted(url: str, body: dict) -> np.ndarray:
    """The pictures that a service answers."""
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        files = [base64.b64decode(it) for it in json.load(response)["predictions"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(it))) for it in files])


def test_a_packaged_generator_edits_pictures(darkroom, tmp_path):
    from evaluation import registry

    made = darkroom(
        "run", "shapes-diffusionclip", *TINY, "data.scenes=500", "edit.training.images=128",
        "edit.config.inversion_steps=4", "edit.config.steps=2", "gate.absolute={}",
        "noisy_clip.config.network.channels=16", "noisy_clip.training.images=512",
    )  # fmt: skip
    assert made["verdict"]["promote"], made["verdict"]
    assert "edit" in made["took"]
    assert "From red to blue" in Path(made["report"]).read_text()
    card = made["scorecard"]
    assert 0 <= card["edit_changed"] <= 1 and 0 <= card["edit_kept"] <= 1
    uri = f"sqlite:///{darkroom.home}/mlflow.db"
    generator = registry.load("shapes-diffusionclip", tracking_uri=uri)
    grey = np.full((3, 16, 16, 3), 132, np.uint8)
    edited = generator.edit(grey)
    assert edited.shape == grey.shape and edited.dtype == np.uint8
    assert (edited != generator.edit(grey, edited=False)).any()
    with pytest.raises(ValueError, match="got pictures"):
        generator.edit(grey[:, :8])

    asked, out = tmp_path / "asked", tmp_path / "edited"
    asked.mkdir()
    scenes = np.stack([shapes.draw(shapes.scene(0, k), 16) for k in range(3)])
    for k, scene in enumerate(scenes):
        Image.fromarray(scene).save(asked / f"scene {k}.bmp")
    words = ("edit", "shapes-diffusionclip?steps=3", "--pictures", str(asked), "--out", str(out))
    told = darkroom(*words, "--noise", "0.5", "--inversion-steps", "6")
    assert told["files"] == [f"{out}/scene {k}.png" for k in range(3)]
    assert (told["source"], told["target"]) == ("red", "blue")
    drawn = np.stack([np.asarray(Image.open(it)) for it in told["files"]])
    options = {"noise": 0.5, "inversion_steps": 6, "steps": 3}
    there = generator.edit(scenes, **options).astype(int)
    assert np.abs(there - drawn).max() <= 1
    assert (drawn != scenes).any((1, 2, 3)).all()
    darkroom(*words, "--unedited")
    assert (np.asarray(Image.open(told["files"][0])) != drawn[0]).any()
    Image.fromarray(scenes[0, :8]).save(asked / "half.png")
    refused = darkroom(*words, code=2)["error"]
    assert "half.png: got 16 x 8 pixels, wanted 16 x 16, which this model edits" in refused

    port, log = darkroom.free_port(), tmp_path / "serve.log"
    serve = darkroom.command("serve", "shapes-diffusionclip", "--port", str(port))
    with darkroom.beside(serve, darkroom.environment, log):
        url = f"http://127.0.0.1:{port}"
        darkroom.until(lambda: urllib.request.urlopen(f"{url}/health").status == 200, 240, log)
        rows = [{"picture": png(it)} for it in scenes]
        params = {"options": json.dumps(options)}
        edited = posted(url, {"dataframe_records": rows, "params": params})
        np.testing.assert_array_equal(edited, drawn)
        (alone,) = posted(url, {"dataframe_records": rows[:1], "params": params})
        assert np.abs(alone.astype(int) - drawn[0]).max() <= 1
        assert posted(url, {"dataframe_records": [{"prompt": "a ring"}]}).shape == (1, 16, 16, 3)
        assert '[{"picture": "BASE64 OF A PNG FILE"}]' in log.read_text()

    page = tmp_path / "page.html"
    name = "shapes-diffusionclip"
    darkroom("compare", name, f"{name}?steps=2", "--prompts", "8", "--out", str(page))
    assert "From red to blue" in page.read_text()


def test_scenes_of_two_objects_are_scored_by_pairs_seen_and_unseen(darkroom):
    words = [it for it in TINY if "likelihood" not in it]
    made = darkroom(
        "run", "shapes-two", *words, "data.scenes=700", "autoencoder.config.network.channels=16",
        "autoencoder.training.images=1600",
        'gate.absolute={"correct_unseen": 0.9}', code=3,
    )  # fmt: skip
    assert "absolute.correct_unseen" in made["verdict"]["reason"]
    assert {"correct_seen", "correct_unseen"} <= set(made["scorecard"])
