"""Scores are a pure function of (shard, scorer), made once, and joined to the samples by key."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import images, storage
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.manifest import Manifest
from pipeline.score import BATCH, ScorerSpec, read_scores, score
from pipeline.shards import ShardSample, read_shard, write_shard

LOCAL = Executor(kind="local")
LIGHT = ScorerSpec("light", "light01", ("light",), side=4)
TEXT = ScorerSpec("text", "text01", ("characters", "contrast"), side=5)


def light(pixels, captions):
    assert pixels.dtype == np.uint8
    assert pixels.shape == (len(captions), 3, 4, 4)
    return {"light": (pixels / 255).mean((1, 2, 3)).astype(np.float32)}


def text(pixels, captions):
    contrast = pixels.std((1, 2, 3)).astype(np.float32)
    return {"characters": np.array([len(c) for c in captions], np.float32), "contrast": contrast}


def build(spec):
    """Also called by other processes of the tests, which import this file by its path."""
    if log := os.environ.get("BUILD_LOG"):
        with open(log, "a") as file:
            file.write(f"{spec.name}\n")
    return {"light": light, "text": text}[spec.name]


def shards(folder, numbers=(0, 1), samples=BATCH + 6):  # a whole batch and a part of one
    made = []
    for shard in numbers:
        rng = np.random.default_rng(shard)
        rows = [
            ShardSample(
                f"{shard:02x}{row:030x}",
                images.encode(
                    Image.fromarray(rng.integers(0, 256, (6, 5 + row % 3, 3), np.uint8)), "png"
                ),
                "png",
                (f"{'x' * row} first", "second, not looked at"),
            )
            for row in range(samples)
        ]
        made.append(write_shard(rows, str(folder), "train"))
    return made


def files(folder):
    root = Path(folder, "scores")
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def test_every_score_is_the_scorers_answer_to_its_sample(tmp_path):
    made, progress = shards(tmp_path), []
    done = score(str(tmp_path), made, [LIGHT, TEXT], build, LOCAL, lambda *it: progress.append(it))
    assert (done.shards, done.samples) == (2, 140)
    assert done.unknown == {"light": 0, "characters": 0, "contrast": 0}
    assert progress[-1] == (2, 2)
    for shard in made:
        samples = list(read_shard(f"{tmp_path}/shards/{shard.name}.tar"))
        found = read_scores(str(tmp_path), shard.name, ["light01", "text01"])
        assert [*found] == ["light", "characters", "contrast"]
        assert all((it.dtype, it.shape) == (np.float32, (70,)) for it in found.values())
        for row, sample in enumerate(samples):
            picture, _ = images.decode(sample.image)
            small, wide = images.fit(picture, 4)[None], images.fit(picture, 5)[None]
            assert found["light"][row] == light(small, [""])["light"][0]
            assert found["characters"][row] == row + len(" first")
            assert found["contrast"][row] == text(wide, [""])["contrast"][0]
        table = pq.read_table(tmp_path / "scores" / "text01" / f"{shard.name}.parquet")
        assert table.column_names == ["key", "characters", "contrast"]
        assert table["key"].to_pylist() == [sample.key for sample in samples]


def test_only_what_is_missing_is_made_and_the_bytes_do_not_depend_on_company(tmp_path, monkeypatch):
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "log"))
    made, data = shards(tmp_path / "data"), str(tmp_path / "data")
    score(data, made[:1], [LIGHT], build, LOCAL)
    assert score(data, made, [LIGHT, TEXT], build, LOCAL).shards == 2
    whole = files(data)
    assert len(whole) == 4
    Path(data, "scores", "text01", f"{made[1].name}.parquet").unlink()
    again = score(data, made, [TEXT, LIGHT], build, LOCAL)
    assert (again.shards, again.samples) == (1, 70)
    assert files(data) == whole
    assert score(data, made, [TEXT, LIGHT], build, LOCAL).shards == 0
    assert (tmp_path / "log").read_text().split() == ["light", "text", "light", "text"]
    assert shards(tmp_path / "alone") == made
    score(str(tmp_path / "alone"), made, [TEXT], build, LOCAL)
    assert files(tmp_path / "alone").items() < whole.items()


def test_scorers_of_one_side_see_the_same_array_and_each_picture_is_decoded_once(
    tmp_path, monkeypatch
):
    made, seen, decodes = shards(tmp_path, [0]), [], []

    def watching(spec):
        def scorer(pixels, captions):
            seen.append(pixels)
            return {column: np.zeros(len(captions), np.float32) for column in spec.columns}

        return scorer

    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *it: decodes.append(1) or decode(*it))
    score(str(tmp_path), made, [LIGHT, replace(TEXT, side=4)], watching, LOCAL)
    assert len(decodes) == 70
    assert [len(pixels) for pixels in seen] == [64, 64, 6, 6]
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]


def test_what_is_not_finite_is_unknown_and_counted(tmp_path):
    def broken(spec):
        def scorer(pixels, captions):
            found = text(pixels, captions)
            odd = found["characters"] % 10 == 6
            found["contrast"][odd] = np.resize([np.nan, np.inf, -np.inf], odd.sum())
            return found

        return scorer

    made = shards(tmp_path)
    done = score(str(tmp_path), made, [TEXT], broken, LOCAL)
    assert done.unknown == {"characters": 0, "contrast": 14}
    found = read_scores(str(tmp_path), made[0].name, ["text01"])["contrast"]
    assert np.flatnonzero(np.isnan(found)).tolist() == list(range(0, 70, 10))
    assert np.isfinite(np.delete(found, slice(0, 70, 10))).all()


def broken(_):
    return lambda pixels, captions: {"light": np.full(len(captions), np.nan, np.float32)}


def test_a_scorer_that_can_tell_nothing_is_refused(tmp_path):
    made = shards(tmp_path)
    with pytest.raises(ValueError, match=r"scorer light, shard train-\w+: none of 70 samples has"):
        score(str(tmp_path), made, [LIGHT], broken, LOCAL)
    assert not files(tmp_path)


def test_a_few_samples_of_which_nothing_can_be_told_are_unknown(tmp_path):
    """One that was added alone kept its data set from ever being scored."""
    for samples in (1, 19):
        made = shards(tmp_path, [samples], samples)
        assert score(str(tmp_path), made, [LIGHT], broken, LOCAL).unknown == {"light": samples}
        assert np.isnan(read_scores(str(tmp_path), made[0].name, ["light01"])["light"]).all()
    with pytest.raises(ValueError, match="none of 20 samples has"):
        score(str(tmp_path), shards(tmp_path, [0], 20), [LIGHT], broken, LOCAL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"scorer light, shard train-\w+, rows from 0: field light is missing"),
        ({"light": np.zeros(63, np.float32)}, "has 63 rows, wanted 64"),
        ({"light": np.zeros(64)}, r"is float64\[64\], wanted float32"),
        ({"light": np.zeros((64, 1), np.float32)}, r"is float32\[64, 1\], wanted float32"),
    ],
)
def test_scorers_that_do_not_keep_the_contract(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        score(str(tmp_path), shards(tmp_path), [LIGHT], lambda _: lambda *_: given, LOCAL)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Aesthetic"}, "score 'Aesthetic': wanted a name"),
        ({"columns": ("key",)}, "score 'key'"),
        ({"columns": ()}, "wanted columns that differ"),
        ({"columns": ("a", "a")}, "wanted columns that differ"),
        ({"fingerprint": "../up"}, "cannot name a directory"),
        ({"side": 0}, "side must be at least 1"),
    ],
)
def test_specs_say_why_they_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LIGHT, **changes)


def test_no_two_scorers_give_the_same_score(tmp_path):
    made, other = shards(tmp_path, [0]), replace(LIGHT, fingerprint="light02")
    with pytest.raises(ValueError, match="a name of its own, got light, light"):
        score(str(tmp_path), made, [LIGHT, other], build, LOCAL)
    for spec in (LIGHT, other):
        score(str(tmp_path), made, [spec], build, LOCAL)
    with pytest.raises(ValueError, match="another scorer gives light too"):
        read_scores(str(tmp_path), made[0].name, ["light01", "light02"])


def test_reading_says_what_is_missing_or_does_not_fit(tmp_path):
    made, data = shards(tmp_path), str(tmp_path)
    score(data, made[:1], [LIGHT], build, LOCAL)
    assert read_scores(data, made[1].name, []) == {}
    with pytest.raises(ValueError, match=f"{made[1].name} has no scores by light01; score"):
        read_scores(data, made[1].name, ["light01"])
    there = tmp_path / "scores" / "light01" / f"{made[0].name}.parquet"
    there.rename(there.with_name(f"{made[1].name}.parquet"))
    with pytest.raises(ValueError, match="not the samples of the shard"):
        read_scores(data, made[1].name, ["light01"])
    there.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no table .*; delete it and score again"):
        read_scores(data, made[0].name, ["light01"])


def test_any_storage_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    local, remote = tmp_path / "data", f"memory://{tmp_path.name}"
    made = shards(local, [0])
    for name in ("shards", "tables"):
        for file in (local / name).iterdir():
            storage.publish_bytes(storage.join(remote, name, file.name), file.read_bytes())
    for dataset in (str(local), remote):
        score(dataset, made, [LIGHT], build, LOCAL)
    assert score(remote, made, [LIGHT], build, LOCAL).shards == 0
    ((name, there),) = files(local).items()
    assert storage.read_bytes(storage.join(remote, "scores", name)) == there
    found = (read_scores(it, made[0].name, ["light01"])["light"] for it in (str(local), remote))
    np.testing.assert_array_equal(*found)


def test_a_damaged_picture_names_its_shard_and_key(tmp_path):
    (shard,) = shards(tmp_path, [0])
    path = tmp_path / "shards" / f"{shard.name}.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT")
    content[at + 8 : at + 20] = bytes(12)
    path.write_bytes(content)
    message = r"shards/train-\w+\.tar, sample \w{32}: .*decoded"
    with pytest.raises(ValueError, match=message):
        score(str(tmp_path), [shard], [LIGHT], build, LOCAL)
    with pytest.raises(ValueError, match=message):
        encode(Manifest(str(tmp_path), 1, None, (shard,)), [pixels_spec(4)], None, LOCAL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.usefixtures("ray_session")
def test_on_ray_the_bytes_are_the_same(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    made = shards(here, range(3))
    assert shards(there, range(3)) == made
    score(str(here), made, [LIGHT, TEXT], build, LOCAL)
    done = score(str(there), made, [LIGHT, TEXT], build, Executor(kind="ray", workers=2))
    assert (done.shards, done.samples) == (3, 210)
    assert files(there) == files(here)
