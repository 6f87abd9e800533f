"""What became of an input can be asked of every data set."""

import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline import outcomes
from pipeline.ingest import IngestRules, ingest
from pipeline.manifest import Manifest, latest
from pipeline.outcomes import batch_of, count, explain, read_batches, read_outcomes

_TEXTS = ("id", "stamp", "source", "outcome", "reason", "detail", "key", "split")


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
        count([batch_of([dict.fromkeys(_TEXTS, "") | {"outcome": "lost", "flags": []}])])


def test_the_table_holds_every_row(dataset):
    last = latest(dataset)
    assert last is not None
    assert count(read_batches(last)) == dict(last.counts)


def test_a_table_is_the_same_however_its_rows_came(tmp_path, monkeypatch):
    monkeypatch.setattr(outcomes, "_GROUP", 7)
    row = dict.fromkeys(_TEXTS, "") | {"outcome": "kept", "flags": ["alpha"]}
    rows = [{**row, "id": f"{number}"} for number in range(45)]
    names = []
    for size in (1, 6, 7, 20, 45):
        with outcomes.writing(str(tmp_path)) as (table, publish):
            for start in range(0, 45, size):
                table.add(batch_of(rows[start : start + size]))
            names.append(publish())
            assert table.counts == {
                "seen": 45, "kept": 45, "filtered": 0, "rejected": 0, "duplicate": 0,
                "flag:alpha": 45,
            }  # fmt: skip
    assert set(os.listdir(tmp_path / "inputs")) == {f"{names[0]}.parquet"}
    assert len(set(names)) == 1
    assert outcomes.read_outcomes(Manifest(str(tmp_path), 1, None, (), inputs=names[0])) == rows


def test_tables_named_by_their_version_are_still_read(dataset):
    last = latest(dataset)
    assert last is not None
    rows, old = read_outcomes(last), replace(last, inputs="")
    os.rename(last.url("inputs", f"{last.inputs}.parquet"), last.url("inputs", "000002.parquet"))
    assert read_outcomes(old) == rows
