"""A take-down says where pictures still are that it cannot reach, as far as the home knows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flows import data_commands
from pipeline import dedup, manifest
from pipeline.ingest import IngestRules, ingest


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (30, 30, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{n}.png")
        (photos / f"{n}.txt").write_text(f"noise {n}")
    where = str(tmp_path / "home" / "datasets" / "noise")
    ingest([str(photos)], where, IngestRules(heldout_share=0))
    return where


def test_pages_and_versions_made_again_are_named(dataset, tmp_path):
    key = dedup.key((tmp_path / "photos" / "3.png").read_bytes())
    page, gone, copy = (str(tmp_path / name) for name in ("page.html", "gone.html", "copy"))
    for out in (page, gone):
        data_commands.show("noise", None, out)
    (tmp_path / "gone.html").unlink()
    data_commands.reproduce("noise", None, copy)
    told = data_commands.remove("noise", [key], [], "")
    assert told["elsewhere"] == [copy, page]
    assert f"data set {copy}" in told["text"] and f"page {page}" in told["text"]
    # until they are without it: a page written anew, the copy's own take-down
    data_commands.show("noise", None, page)
    assert data_commands.remove("noise", [key], [], "")["elsewhere"] == [copy]
    data_commands.remove(copy, [key], [], "")
    told = data_commands.remove("noise", [key], [], "")
    assert told["elsewhere"] == [] and "out of reach" not in told["text"]


def test_what_is_left_of_a_version_is_said_to_be_made_again(dataset, tmp_path):
    key = dedup.key((tmp_path / "photos" / "3.png").read_bytes())
    data_commands.remove("noise", [key], [], "")
    told = data_commands.reproduce("noise", 1, str(tmp_path / "copy"))
    assert told["digest"] != manifest.read(dataset, 1).digest
    assert told["digest"] == manifest.read(dataset, 2).digest
    assert f"as what is left of {dataset} version 1" in told["text"]
    # it has not got what was taken down
    assert data_commands.remove("noise", [key], [], "")["elsewhere"] == []
