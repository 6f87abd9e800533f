"""A version is immutable, and the data version names the shards and nothing else."""

import hashlib
from dataclasses import replace

import pytest

from pipeline import manifest
from pipeline.manifest import Manifest, Shard, fingerprint

TRAIN = Shard("train-01", "train", 5, 100, "aa")
HELDOUT = Shard("heldout-02", "heldout", 2, 50, "bb")


def version(dataset, number=1, **changes):
    one = Manifest(
        dataset=str(dataset),
        version=number,
        parent=number - 1 or None,
        shards=(TRAIN, HELDOUT),
        counts={"seen": 7, "kept": 7},
        sources={"/pictures": "0123"},
        rules={"max_side": 64},
    )
    return replace(one, **changes)


def test_a_version_comes_back_as_it_was(tmp_path):
    assert manifest.latest(str(tmp_path)) is None
    first, second = version(tmp_path), version(tmp_path, 2, shards=(TRAIN,))
    manifest.publish(first)
    manifest.publish(second)
    assert manifest.read(str(tmp_path), 1) == first
    assert manifest.latest(str(tmp_path)) == second
    assert manifest.versions(str(tmp_path)) == [1, 2]


def test_a_version_is_never_replaced(tmp_path):
    manifest.publish(version(tmp_path))
    with pytest.raises(ValueError, match="version 1 was published meanwhile"):
        manifest.publish(version(tmp_path, shards=()))
    assert manifest.latest(str(tmp_path)) == version(tmp_path)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"no version 3 \(published: none\)"):
        manifest.read(str(tmp_path), 3)
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "000001.json").write_text('{"shards": [{"nam": 1}]}')
    with pytest.raises(ValueError, match=r"000001\.json: not a version manifest"):
        manifest.latest(str(tmp_path))


def test_splits_and_sums(tmp_path):
    one = version(tmp_path)
    assert one.split("heldout") == (HELDOUT,)
    assert one.split() == (TRAIN, HELDOUT)
    assert (one.samples(), one.samples("train"), one.samples("unseen")) == (7, 5, 0)
    assert one.url("shards", "x.tar") == f"{tmp_path}/shards/x.tar"


def test_the_digest_is_that_of_the_shards(tmp_path):
    one = version(tmp_path)
    assert replace(one, version=9, counts={}, sources={}, dataset="s3://x").digest == one.digest
    assert replace(one, shards=(HELDOUT, TRAIN)).digest != one.digest
    assert replace(one, shards=(replace(TRAIN, sha256="ac"), HELDOUT)).digest != one.digest


def test_fingerprint_is_that_of_the_value():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint({"b": [1], "a": "é"}) == (
        hashlib.blake2b(b'{"a":"\\u00e9","b":[1]}', digest_size=8).hexdigest()
    )
    assert len(fingerprint("x")) == 16
