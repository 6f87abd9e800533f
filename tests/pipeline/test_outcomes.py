"""What became of an input can be asked of every data set."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.ingest import IngestRules, ingest
from pipeline.outcomes import count, explain, read_outcomes


@pytest.fixture
def dataset(tmp_path):
    """Two versions: three rows, then a fourth."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(out, "png")
        (folder / f"{name}.png").write_bytes(out.getvalue())
    (folder / "broken.png").write_bytes(b"<html>404</html>")
    rows = [{"file": f"{name}.png", "caption": name} for name in ("a", "broken", "b")]
    rows.append({"file": "a.png", "caption": "again"})
    target = str(tmp_path / "dataset")
    for size in (3, 4):
        text = "".join(json.dumps(row) + "\n" for row in rows[:size])
        (folder / "captions.jsonl").write_text(text)
        ingest([str(folder)], target, IngestRules(heldout_share=0))
    return target


def test_a_kept_picture_is_found_by_its_key_and_by_its_row(dataset):
    (kept, again) = explain(dataset, "#a.png")
    assert (kept["outcome"], kept["version"], kept["split"]) == ("kept", 1, "train")
    assert kept["shard"].startswith("train-")
    assert (again["outcome"], again["reason"], again["version"]) == (
        "duplicate",
        "caption_added",
        2,
    )
    assert explain(dataset, kept["key"][:9].upper()) == [kept, again]


def test_a_rejected_one_says_why(dataset):
    (it,) = explain(dataset, "broken.png")
    assert (it["outcome"], it["reason"]) == ("rejected", "not_image")
    assert it["shard"] == ""


def test_what_was_never_seen_is_said(dataset, tmp_path):
    with pytest.raises(ValueError, match="version 2 has seen no row .*'zebra'.* has seen 4 rows"):
        explain(dataset, "zebra")
    with pytest.raises(ValueError, match="no data set there"):
        explain(str(tmp_path / "nothing"), "a")


def test_sums_of_a_row_without_an_outcome_are_refused():
    with pytest.raises(AssertionError, match="without an outcome"):
        count([{"outcome": "lost", "reason": "", "flags": []}])


def test_the_table_holds_every_row(dataset):
    from pipeline.manifest import latest

    last = latest(dataset)
    assert last is not None
    assert count(read_outcomes(last)) == dict(last.counts)
