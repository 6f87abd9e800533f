"""Every command answers with one JSON object, and with the exit code that its outcome has."""

import contextlib
import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from flows.recipe import ingest_rules
from pipeline import manifest, storage
from pipeline.ingest import ingest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def first(darkroom):
    return darkroom(*darkroom.run_words())


def test_ingest_counts_every_row_and_does_nothing_twice(darkroom, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(4):
        Image.new("RGB", (40, 40), (60 * n, 0, 0)).save(photos / f"{n}.png")
        (photos / f"{n}.txt").write_text(f"a red square, shade {n}")
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    (photos / "broken.txt").write_text("a picture that is none")
    words = ("ingest", str(photos), "--dataset", str(tmp_path / "set"))
    made = darkroom(*words)
    assert made["counts"]["seen"] == 5
    assert made["counts"]["rejected"] == 1
    assert made["counts"]["kept"] + made["counts"].get("duplicate", 0) == 4
    again = darkroom(*words)
    assert (again["version"], again["digest"]) == (1, made["digest"])
    assert (again["reused"], again["new"]) == (["data"], 0)
    (told,) = darkroom("explain", str(tmp_path / "set"), "broken.png")["rows"]
    assert (told["outcome"], told["reason"], told["version"]) == ("rejected", "truncated", 1)


def test_two_ingests_at_once_make_one_version(darkroom, tmp_path):
    """Both have come to the lock before either may go on; the second finds what the first made."""
    source, dataset = "shapes://?scenes=150&side=32", tmp_path / "set"
    words = darkroom.command("ingest", source, "--dataset", str(dataset), "--json")
    lock, logs = dataset / ".lock", [tmp_path / "one.log", tmp_path / "two.log"]

    def holds_the_lock_or_waits(it: subprocess.Popen[str], log: Path) -> bool:
        assert it.poll() is None, log.read_text()[-3000:]
        names = Path(f"/proc/{it.pid}/fd").iterdir()
        return any(os.readlink(name) == str(lock) for name in names)

    with contextlib.ExitStack() as after:
        both = []
        with storage.lock(str(lock)):
            for log in logs:  # one after the other: two starts of Ray at once take too long
                out = after.enter_context(log.open("w"))
                it = subprocess.Popen(
                    words, stdout=subprocess.PIPE, stderr=out, text=True, env=darkroom.environment
                )
                both.append(after.enter_context(it))
                after.callback(it.kill)
                darkroom.until(functools.partial(holds_the_lock_or_waits, it, log), 120, log)
        said = [it.communicate(timeout=180)[0] for it in both]
    assert [it.returncode for it in both] == [0, 0], [log.read_text()[-2000:] for log in logs]
    made, found = sorted(map(json.loads, said), key=lambda it: it["reused"])
    assert (made["reused"], made["new"]) == ([], made["counts"]["kept"])
    assert (found["reused"], found["new"]) == (["data"], 0)
    assert made["digest"] == found["digest"]
    assert manifest.versions(str(dataset)) == [1]
    ingest([source], str(tmp_path / "alone"), ingest_rules(["max_side=512"]))
    assert tree(dataset) == tree(tmp_path / "alone")


def test_encode_and_train_find_what_is_done(darkroom, first):
    overrides = darkroom.run_words()[2:]
    encoded = darkroom("encode", "shapes", *overrides)
    assert set(encoded["encodings"]) == {"autoencoder", "clip", "t5"}
    trained = darkroom("train", "shapes", "t5", *overrides)
    assert trained["reused"] == ["data", "t5"]
    assert Path(trained["directory"], "stage.json").exists()


def test_evaluate_measures_the_same_again(darkroom, first):
    card = darkroom("evaluate", first["model"])["scorecard"]
    assert card["correct"] == first["scorecard"]["correct"]
    assert card["heldout_loss"] == first["scorecard"]["heldout_loss"]


def test_a_gate_that_says_no_is_exit_code_3_and_changes_nothing(darkroom, first):
    champion = darkroom("status")["models"]["shapes"]["champion"]
    changes = {"sampler.steps": 3, "gate.absolute": {"correct": 1.0}}
    refused = darkroom(*darkroom.run_words(**changes), code=3)
    assert not refused["verdict"]["promote"]
    assert "correct" in refused["verdict"]["reason"]
    assert refused["alias"] is None
    assert darkroom("promote", refused["model"], "--dry-run", code=3)["refused"]
    assert darkroom("status")["models"]["shapes"]["champion"] == champion


def test_bad_usage_is_exit_code_2_and_names_the_nearest_right_key(darkroom):
    wrong = darkroom("run", "shapes", "base.training.imagse=3", code=2)
    assert "base.training" in wrong["error"]
    assert "images" in wrong["error"]
    assert "pictures" in darkroom("run", "picturs", code=2)["error"]
    assert "no stage" in darkroom("train", "shapes", "bse", code=2)["error"]
    nothing = subprocess.run(
        darkroom.command("paint"), env=darkroom.environment, capture_output=True, check=False
    )
    assert nothing.returncode == 2


def test_what_fails_is_exit_code_1_and_says_why(darkroom, first, tmp_path):
    assert "nobody" in darkroom("sample", "nobody", "a", "--out", str(tmp_path), code=1)["error"]
    missing = darkroom(
        "run", "pictures", f"data.sources={json.dumps([str(tmp_path / 'no')])}", code=1
    )
    assert "no" in missing["error"]


def test_recipes_and_doctor(darkroom):
    assert {"shapes", "pictures", "shapes-ddpm"} <= set(darkroom("recipes")["recipes"])
    assert darkroom("doctor")["failed"] == []


def test_a_take_down_names_the_models_that_saw_the_picture(darkroom, first):
    from pipeline import manifest, outcomes

    # The home is that of other tests too: the data may have grown since its first version.
    before = manifest.read(first["data"]["dataset"], 1)
    rows = outcomes.read_outcomes(before)
    key = next(it["key"] for it in rows if it["split"] == "train" and it["outcome"] == "kept")
    removed = darkroom("remove", before.dataset, key, "--reason", "asked for")
    assert removed["removed"][before.digest] == [key]
    name = first["model"].removeprefix("models:/")
    assert set(removed["models"][name]) == {"autoencoder", "clip", "t5", "base"}
    assert darkroom("explain", before.dataset, key)["rows"][0]["reason"] == "removed"
    assert darkroom("gc", before.dataset)["files"] == []
    assert darkroom("compact", before.dataset)["version"] >= removed["version"]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
