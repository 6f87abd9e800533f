"""Commands about data sets, on pictures of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flows import data_commands
from pipeline import manifest


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    return tmp_path


def pictures(folder: Path, first: int, count: int) -> str:
    folder.mkdir()
    for n in range(first, first + count):
        Image.new("RGB", (40 + n, 48), (20 * n, 255 - 20 * n, 7 * n)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"shade number {n}")
    return str(folder)


def ingest(*sources: str, side: int | None = None, rules: tuple[str, ...] = ()) -> dict:
    return data_commands.ingest([*sources], "shades", side, [*rules])


def test_what_is_not_said_of_a_data_set_is_as_it_has_it(home):
    one, two = pictures(home / "one", 0, 4), pictures(home / "two", 4, 3)
    assert ingest(one, side=32, rules=("shard_samples=2",))["version"] == 1
    grown = ingest(two, rules=("min_side=1",))
    assert (grown["version"], grown["counts"]["seen"], grown["new"]) == (2, 7, 3)
    first, second = (manifest.read(grown["dataset"], version) for version in (1, 2))
    assert second.rules["max_side"] == 32
    assert second.rules["shard_samples"] == 2
    assert {it.name for it in first.shards} <= {it.name for it in second.shards}


def test_rules_that_store_all_anew_leave_no_source_behind(home):
    one, two = pictures(home / "one", 0, 4), pictures(home / "two", 4, 3)
    made = ingest(one, side=32)
    with pytest.raises(ValueError, match=r"max_side 32 -> 16.*some from .*/one; name these"):
        ingest(two, side=16)
    assert manifest.versions(made["dataset"]) == [1]
    anew = ingest(one, two, side=16)
    assert (anew["version"], anew["counts"]["kept"]) == (2, 7)
