"""Systems that are told more than a caption go through the line: SR3, and LDM by class, by a small
picture and by a label map."""

import base64
import io
import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import commands
from flows.commands import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = (
    "data.scenes=300", "data.ingest.shard_samples=100", "data.dataset=told",
    "autoencoder.training.images=320", "clip.training.images=512", "t5.training.images=160",
    "base.training.images=320", "sampler.steps=2", "evaluation.prompts=24",
    "evaluation.sweep_prompts=8", "evaluation.reference_count=24", "evaluation.train_count=64",
    "evaluation.kid_block=8", "evaluation.heldout_loss_samples=16",
    "evaluation.likelihood_samples=4", "evaluation.blocks=4", "gate.absolute={}",
    "gate.min_samples=8", "executor.kind=local",
)  # fmt: skip


@pytest.fixture
def home(darkroom, monkeypatch):
    """Commands that are called here, not in a process of their own, are at home there."""
    monkeypatch.setenv("DARKROOM_HOME", str(darkroom.home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return darkroom.home


def small(path: Path, side: int) -> str:
    Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(path)
    return str(path)


def picture(path: str) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def answers(url: str) -> bool:
    with urllib.request.urlopen(url) as response:
        return response.status == 200


def sample(model: str, out: Path, *prompts: str, **more):
    common = {"negative": None, "guidance": None, "steps": None, "seed": 0, "count": 1}
    return commands.sample(model, list(prompts), str(out), **{**common, **more})


def test_sr3_enlarges_what_it_is_given(darkroom, home, tmp_path):
    made = darkroom("run", "shapes-sr3", *TINY)
    assert made["verdict"]["promote"], made["verdict"]
    card = made["scorecard"]
    assert {"psnr", "psnr_bicubic", "psnr_gain", "consistency", "correct_bicubic"} <= card.keys()
    assert card["psnr_gain"] == pytest.approx(card["psnr"] - card["psnr_bicubic"])
    page = Path(made["report"]).read_text()
    assert "<h3>Enlarged</h3>" in page
    assert "PSNR gained over bicubic" in page
    assert "PSNR, in dB, by steps" in page
    assert made["options"]["steps"] in (2, 4, 8, 16)

    out, low = tmp_path / "out", small(tmp_path / "grey.png", 16)
    words = ("--low", low, "--out", str(out), "--count", "2")
    drawn = darkroom("sample", "shapes-sr3", *words)
    assert [Path(it).name for it in drawn["files"]] == ["000-grey-0.png", "001-grey-1.png"]
    assert picture(drawn["files"][0]).shape == (32, 32, 3)
    wrong = small(tmp_path / "large.png", 32)
    for prompts, more, said in (
        ((), {"low": wrong}, "got 32 x 32 pixels, wanted 16 x 16"),
        (("a ring",), {}, "this model enlarges pictures of 16 px: give --low FILE"),
        ((), {"low": low, "labels": ["shape=ring"]}, "this model is told no classes"),
        ((), {}, "nothing to draw"),
    ):
        with pytest.raises(UsageError, match=said):
            sample("shapes-sr3", out, *prompts, **more)

    page = tmp_path / "compared.html"
    rows = commands.compare(["shapes-sr3", "shapes-sr3?steps=1"], str(page), 12, None)["rows"]
    near = [it["measures"]["psnr"] for it in rows]
    assert near[0]["mean"] != near[1]["mean"]
    assert near[1]["against_first"]["mean"] == pytest.approx(near[1]["mean"] - near[0]["mean"])
    assert '<th scope="col">Given</th>' in page.read_text()

    port, log = darkroom.free_port(), tmp_path / "serve.log"
    words = darkroom.command("serve", "shapes-sr3", "--port", str(port))
    with darkroom.beside(words, darkroom.environment, log):
        url = f"http://127.0.0.1:{port}"
        darkroom.until(lambda: answers(f"{url}/health"), 240, log)
        file = base64.b64encode(Path(low).read_bytes()).decode()
        body = {"dataframe_records": [{"low": file}], "params": {"seed": 0}}
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            (answer,) = json.load(response)["predictions"]
        served = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer))))
        np.testing.assert_array_equal(served, picture(drawn["files"][0]))
        assert "dataframe_records" in log.read_text()


def test_ldm_is_told_a_class_or_a_small_picture(darkroom, home, tmp_path):
    """They share what is frozen."""
    few = (*TINY, "base.config.network.channels=32", "evaluation.guidance_scales=[2.0]")
    low = darkroom("run", "shapes-ldm-low", *few)
    assert low["verdict"]["promote"], low["verdict"]
    assert {"psnr", "consistency", "correct_unguided"} <= low["scorecard"].keys()
    told = darkroom("run", "shapes-ldm-class", *few)
    assert told["verdict"]["promote"], told["verdict"]
    assert {"data", "clip", "autoencoder"} <= set(told["reused"])
    assert "correct" in told["scorecard"]
    assert "psnr" not in told["scorecard"]

    out = tmp_path / "out"
    words = ("--label", "shape=ring", "--label", "colour=blue")
    drawn = darkroom("sample", "shapes-ldm-class", *words, "--out", str(out))
    assert picture(drawn["files"][0]).shape == (32, 32, 3)
    for label, said in (
        ("shape=rnig", "shape is one of circle, square"),
        ("size=small", "this model is told colour, shape"),
        ("ring", "expected NAME=ANSWER, e.g. colour=red"),
        ("shape=ring", "a class is colour and shape together: give --label colour=... too"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            sample("shapes-ldm-class", out, labels=[label])
    file = small(tmp_path / "grey.png", 8)
    assert len(sample("shapes-ldm-low", out, "a blue ring", low=file)["files"]) == 1


def test_ldm_is_told_a_label_map(darkroom, home, tmp_path):
    few = (*TINY, "base.config.network.channels=32", "evaluation.guidance_scales=[2.0]")
    made = darkroom("run", "shapes-ldm-map", *few)
    assert made["verdict"]["promote"], made["verdict"]
    card = made["scorecard"]
    assert {"map_agreement", "map_agreement_real", "map_agreement_shuffled"} <= card.keys()
    assert "psnr" not in card
    page = Path(made["report"]).read_text()
    assert "<h3>By a label map</h3>" in page

    out, file = tmp_path / "out", tmp_path / "half.png"
    indices = np.full((32, 32), 8, np.uint8)
    indices[:, 16:] = 2
    Image.fromarray(indices).save(file)
    words = ("--map", str(file), "--out", str(out), "--count", "2")
    drawn = darkroom("sample", "shapes-ldm-map", "a blue square", *words)
    names = [Path(it).name for it in drawn["files"]]
    assert names == ["000-a-blue-square-half-0.png", "001-a-blue-square-half-1.png"]
    assert picture(drawn["files"][0]).shape == (32, 32, 3)
    Image.fromarray(np.full((32, 32), 13, np.uint8)).save(tmp_path / "wrong.png")
    for more, said in (
        ({}, "this model draws by label maps of 32 px: give --map FILE"),
        ({"map": str(tmp_path / "wrong.png")}, "got index 13, wanted 0 to 12: red, green"),
        ({"map": str(file), "low": str(file)}, "this model enlarges no picture"),
    ):
        with pytest.raises(UsageError, match=said):
            sample("shapes-ldm-map", out, "a ring", **more)
    rows = commands.compare(
        ["shapes-ldm-map", "shapes-ldm-map?steps=1"], str(tmp_path / "compared.html"), 12, None
    )["rows"]
    assert all(0 < it["measures"]["map_agreement"]["mean"] <= 1 for it in rows)
    assert rows[1]["measures"]["reconstruction_psnr"]["against_first"]["mean"] == 0
    assert "psnr" not in rows[0]["measures"]
