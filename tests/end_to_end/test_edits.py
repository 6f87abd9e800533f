"""An edit from scenes to a packaged generator that edits, and scenes of two objects likewise."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = (
    "data.ingest.shard_samples=200", "clip.training.images=512", "t5.training.images=320",
    "base.config.network.channels=32", "base.training.images=640", "executor.kind=local",
    "sampler.steps=4", "evaluation.prompts=32", "evaluation.sweep_prompts=8",
    "evaluation.reference_count=48", "evaluation.kid_block=16",
    "evaluation.guidance_scales=[2.0]", "evaluation.likelihood_samples=4", "gate.min_samples=4",
)  # fmt: skip


def test_a_packaged_generator_edits_pictures(darkroom, tmp_path):
    from evaluation import registry

    made = darkroom(
        "run", "shapes-diffusionclip", *TINY, "data.scenes=500", "edit.training.images=128",
        "edit.config.inversion_steps=4", "edit.config.steps=2", "gate.absolute={}",
        "noisy_clip.config.network.channels=16", "noisy_clip.training.images=512",
    )  # fmt: skip
    assert made["verdict"]["promote"], made["verdict"]
    assert "edit" in made["took"]
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
