"""A recipe of pixels with its guides, its base trained by two workers of Ray Train."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = (
    "data.scenes=500", "data.ingest.shard_samples=200", "clip.training.images=512",
    "t5.training.images=320", "base.config.network.channels=32", "base.training.images=640",
    "base.training.workers=2", "classifier.config.network.channels=16",
    "classifier.training.images=640", "noisy_clip.config.network.channels=16",
    "noisy_clip.training.images=640", "sampler.steps=4", "evaluation.prompts=32",
    "base.config.caption_dropout=0.25",
    "evaluation.sweep_prompts=8", "evaluation.reference_count=48", "evaluation.kid_block=16",
    "evaluation.guidance_scales=[2.0]", "evaluation.likelihood_samples=4", "gate.absolute={}",
    "gate.min_samples=16",
)  # fmt: skip


def test_a_model_of_pixels_is_made_scored_and_compared(darkroom, tmp_path):
    made = darkroom("run", "shapes-classifier", *TINY)
    assert made["verdict"]["promote"], made["verdict"]
    assert "autoencoder" not in made["took"]
    assert {"clip", "t5", "base", "classifier", "noisy_clip"} <= set(made["took"])
    assert made["scorecard"]["bits_per_dim"] > 0
    page = tmp_path / "page.html"
    name = "shapes-classifier"
    rows = darkroom(
        "compare", f"{name}?guidance=2", f"{name}?guidance=0&classifier_guidance=2",
        f"{name}?guidance=2&clip_guidance=1",
        f"{name}?guidance=2&kind=heun&steps=3&guidance_interval=.0,1e0",
        "--prompts", "8", "--out", str(page),
    )["rows"]  # fmt: skip
    assert [row["evaluations"] for row in rows] == [8, 4, 8, 10]
    techniques = 4 * 7 + 2 * 6 * 6
    assert page.read_text().count("data:image/png") == 8 * 4 + techniques

    # The same stages under another name: nothing is trained again, another model is registered.
    plain = (words for words in TINY if not words.startswith(("classifier.", "noisy_clip.")))
    again = darkroom("run", "shapes-ddpm", *plain)
    assert {"data", "clip", "t5", "base"} <= set(again["reused"])
    assert again["model"] == "models:/shapes-ddpm/1"
    assert Path(darkroom.home, "datasets/shapes-16").is_dir()
    assert not Path(darkroom.home, "datasets/shapes-ddpm").exists()
