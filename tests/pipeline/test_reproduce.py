"""Every version can be made again from its manifest, whatever its sources have got since."""

import json
import os

import numpy as np
import pytest

from pipeline import images, manifest, versions
from pipeline.filters import SELECTING
from pipeline.ingest import IngestRules, ingest
from pipeline.reproduce import reproduce, rules_of


def add(folder, numbers, side=20):
    folder.mkdir(exist_ok=True)
    with open(folder / "captions.jsonl", "a") as table:
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
            data = images.encode(images.Image.fromarray(pixels), "png")
            (folder / f"{number}.png").write_bytes(data)
            os.utime(folder / f"{number}.png", (1, 1))
            table.write(json.dumps({"file": f"{number}.png", "caption": f"number {number}"}) + "\n")
    return str(folder)


@pytest.fixture
def grown(tmp_path):
    """Six versions: two sources, growth, other rules of selection, a merge, other storage."""
    dataset, rules = str(tmp_path / "data"), {"shard_samples": 16, "min_heldout": 4}
    # named in an order that is not that of their names
    two, one = add(tmp_path / "two", range(30, 50)), add(tmp_path / "one", range(12))
    ingest([two, one], dataset, IngestRules(**rules))
    add(tmp_path / "one", range(12, 20), side=30)
    ingest([two, one], dataset, IngestRules(**rules))
    ingest([two, one], dataset, IngestRules(**rules, min_side=25))
    ingest([two, one], dataset, IngestRules(**rules))
    versions.compact(dataset)
    ingest([two, one], dataset, IngestRules(**rules, max_side=16))
    assert manifest.versions(dataset) == [1, 2, 3, 4, 5, 6]
    add(tmp_path / "one", range(20, 29))  # of which none of them knows
    return dataset


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
def test_a_version_comes_out_the_same(grown, tmp_path, number):
    version = manifest.read(grown, number)
    made = reproduce(version, str(tmp_path / "again"))
    assert made.digest == version.digest
    assert dict(made.counts) == dict(version.counts)
    assert made.inputs == version.inputs
    assert [(it.sha256, it.selection) for it in made.shards] == [
        (it.sha256, it.selection) for it in version.shards
    ]


def test_rules_are_read_from_a_manifest(tmp_path):
    rules = IngestRules(
        languages=("en",), scores={"beauty": (0.5, None)}, background=(1, 2, 3), max_side=9
    )
    from pipeline.ingest import described

    stated = json.loads(json.dumps(described(rules)))
    version = manifest.Manifest("x", 1, None, (), rules={**stated, "heldout_limit": 0.1})
    assert rules_of(version) == rules
    assert set(SELECTING) <= stated.keys()


def test_what_cannot_be_made_again_says_why(grown, tmp_path):
    second = manifest.read(grown, 2)
    with pytest.raises(ValueError, match="there is a data set"):
        reproduce(second, grown)
    os.remove(tmp_path / "one" / "3.png")
    with pytest.raises(ValueError, match=r"rows are gone or have changed: .*one#3.png"):
        reproduce(second, str(tmp_path / "again"))
    key = manifest.read(grown, 2)
    from pipeline.outcomes import read_outcomes

    versions.remove(grown, [read_outcomes(key)[0]["key"]])
    with pytest.raises(ValueError, match="pictures were taken out of it"):
        reproduce(manifest.read(grown, 2), str(tmp_path / "third"))


def test_what_came_from_a_version_that_expired_says_so(grown, tmp_path):
    versions.gc(grown, keep=1)
    with pytest.raises(ValueError, match=r"version 1: .*let it expire.* what version 2 came from"):
        reproduce(manifest.read(grown, 2), str(tmp_path / "again"))
