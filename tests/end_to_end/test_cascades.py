"""Published systems of several stages on the line: trained for a few steps, scored, packaged,
served."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = (
    "data.scenes=300", "data.ingest.shard_samples=100", "clip.training.images=512",
    "t5.training.images=160", "base.config.network.channels=32", "base.training.images=320",
    "sampler.steps=3", "evaluation.prompts=24", "evaluation.sweep_prompts=8",
    "evaluation.reference_count=24", "evaluation.train_count=64", "evaluation.kid_block=8",
    "evaluation.guidance_scales=[2.0]", "evaluation.heldout_loss_samples=16",
    "evaluation.blocks=4", "gate.absolute={}", "gate.min_samples=8", "executor.kind=local",
)  # fmt: skip
SR = ("sr1.training.images=160", "sr1.sampler.steps=2")
SYSTEMS = {
    "shapes-glide": (
        *SR, "noisy_clip.config.network.channels=16", "noisy_clip.training.images=256",
    ),
    "shapes-cdm": (*SR, "sr2.training.images=128", "sr2.sampler.steps=2"),
    "shapes-imagen": (*SR, "sr1.config.network.channels=16", "sr1.config.network.head_width=16"),
    "shapes-unclip": (*SR, "prior.training.images=256", "prior.sampler.steps=2"),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_published_system_goes_through_the_line(darkroom, name, tmp_path):
    from training.generator import Generator

    dataset = f"data.dataset=few-{'64' if name in ('shapes-cdm', 'shapes-imagen') else '32'}"
    made = darkroom("run", name, *TINY, *SYSTEMS[name], dataset)
    assert made["verdict"]["promote"], made["verdict"]
    again = darkroom("run", name, *TINY, *SYSTEMS[name], dataset)
    assert "scores" in again["reused"]
    drawn = darkroom("sample", name, "a red circle", "--out", str(tmp_path), "--count", "2")
    assert len(drawn["files"]) == 2

    from pathlib import Path

    generator = Generator.load(Path(made["package"]).parents[1] / "generator")
    shown = generator.stages(["a red circle", "a blue ring"])
    sides = [it.shape[1] for it in shown.values()]
    assert sides == sorted(set(sides))
    assert sides[0] == 16
    page = Path(made["report"]).read_text()
    assert "From stage to stage" in page
    assert ("Along the difference of two captions" in page) == (name == "shapes-unclip")


def test_an_autoencoder_alone_goes_through_the_line(darkroom):
    """shapes-vae: no base, no captions; promoted by what it draws."""
    few = [it for it in TINY if not it.startswith(("base.", "t5."))]
    train = ("autoencoder.training.images=640", "autoencoder.config.network.channels=16")
    made = darkroom("run", "shapes-vae", *few, *train, "data.dataset=few-32")
    assert made["verdict"]["promote"], made["verdict"]
    card = made["scorecard"]
    assert 0 <= card["legible"] <= 1
    assert 5 < card["reconstruction_psnr"] < 40
    assert "heldout_loss" not in card
    from pathlib import Path

    page = Path(made["report"]).read_text()
    assert "Between two draws of the prior" in page
    assert "Through the autoencoder" in page
