"""Every row ends in one outcome, and a run that was killed ends like one that was not."""

import functools
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import dedup, manifest, outcomes, passes, shards, storage, units
from pipeline import ingest as ingesting
from pipeline import versions as removing
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.sources import SourceOptions

SPLITS = ("train", "heldout", "unseen")


def picture(seed, width=24, height=24, format="PNG", **options):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.save(out, format, **options)
    return out.getvalue()


def source(path, rows):
    """A folder with captions.jsonl of (file, bytes or None, fields)."""
    path.mkdir(exist_ok=True)
    lines = []
    for file, data, fields in rows:
        if data is not None:
            (path / file).write_bytes(data)
            os.utime(path / file, (1, 1))  # stamps that do not depend on when the test ran
        lines.append(json.dumps({"file": file, **fields}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    return str(path)


def plain(count, start=0):
    return [
        (f"{i}.png", picture(i), {"caption": f"picture {i // 2}"})
        for i in range(start, start + count)
    ]


def tree(path):
    """Relative path -> bytes of everything below, hidden files and all."""
    path = Path(path)
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def samples(dataset, version):
    """key -> (split, captions) of a version, from its tars."""
    found = {}
    for shard in version.shards:
        read = list(shards.read_shard(version.url("shards", f"{shard.name}.tar")))
        assert len(read) == shard.samples
        table = shards.read_table(str(dataset), shard.name)
        assert table["key"].to_pylist() == [it.key for it in read]
        assert [it.key for it in read] == sorted(it.key for it in read)
        found |= {it.key: (shard.split, it.captions) for it in read}
    assert len(found) == version.samples()
    return found


def inputs(version):
    import pyarrow.parquet as pq

    return pq.read_table(version.url("inputs", f"{version.inputs}.parquet")).to_pylist()


def check_sums(result):
    counts = result.counts
    outcomes = {name: counts[name] for name in ("kept", "filtered", "rejected", "duplicate")}
    assert counts["seen"] == sum(outcomes.values())
    rows = inputs(result.manifest)
    assert len({(row["id"], row["stamp"]) for row in rows}) == len(rows) == counts["seen"]
    assert Counter(row["outcome"] for row in rows) == Counter(outcomes)
    assert counts["kept"] == result.manifest.samples()
    for name, count in Counter(
        f"{r['outcome']}:{r['reason']}" for r in rows if r["reason"]
    ).items():
        assert counts[name] == count


def test_a_data_set_from_pictures(tmp_path):
    url, dataset = source(tmp_path / "in", plain(30)), tmp_path / "out"
    seen = []
    result = ingest(
        [url],
        str(dataset),
        IngestRules(shard_samples=10, min_heldout=4),
        progress=lambda *step: seen.append(step),
    )
    version = result.manifest
    assert manifest.latest(str(dataset)) == version
    assert (result.new, result.reused, version.version, version.parent) == (30, False, 1, None)
    assert result.counts == {"seen": 30, "kept": 30, "filtered": 0, "rejected": 0, "duplicate": 0}
    check_sums(result)
    found = samples(dataset, version)
    for i in range(30):
        key = hashlib.blake2b(picture(i), digest_size=16).hexdigest()
        assert found[key][1] == (f"picture {i // 2}",)
    by_pair = {}
    for split, (caption,) in found.values():
        by_pair.setdefault(caption, set()).add(split)
    assert all(len(splits) == 1 for splits in by_pair.values()), "a pair is held out as a whole"
    assert 4 <= version.samples("heldout") <= 7
    assert [s.samples for s in version.split("train")] in ([8, 8, 8], [8, 8, 9], [8, 9, 9], [9] * 3)
    assert sorted(os.listdir(dataset)) == [".lock", "inputs", "shards", "tables", "versions"]
    assert [stage for stage, done, total in seen if done == total] == ["read", "write"]


@pytest.mark.parametrize("rows", [0, 1, 33, 746, 12_000, 100_000])
def test_every_row_is_in_one_unit_and_the_last_are_small(rows):
    parts = passes.parts_of(rows)
    assert [row for part in parts for row in range(*part)] == [*range(rows)]
    sizes = [stop - start for start, stop in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert not rows or (sizes[0] == min(rows, 512, max(32, -(-rows // 64))) and sizes[-1] <= 32)


def test_many_bytes_make_more_shards(tmp_path):
    url = source(tmp_path / "in", plain(24))
    size = sum(len(picture(i)) for i in range(24))
    rules = IngestRules(heldout_share=0, shard_bytes=size // 3)
    version = ingest([url], str(tmp_path / "out"), rules).manifest
    assert [shard.samples for shard in version.shards] in ([8] * 3, [6] * 4)
    assert len(samples(tmp_path / "out", version)) == 24


def test_plain_webdataset_opens_what_was_made(tmp_path):
    version = ingest([source(tmp_path / "in", plain(6))], str(tmp_path / "out")).manifest
    code = (
        "import io, sys, webdataset; from PIL import Image\n"
        "n = 0\n"
        "for url in sys.argv[1:]:\n"
        "    for row in webdataset.WebDataset(url, shardshuffle=False).decode('rgb8'):\n"
        "        assert row['png'].shape == (24, 24, 3) and row['txt'].startswith('picture')\n"
        "        assert row['json']['source'].endswith('.png'); n += 1\n"
        "print(n)"
    )
    urls = [version.url("shards", f"{shard.name}.tar") for shard in version.shards]
    out = subprocess.run([sys.executable, "-c", code, *urls], capture_output=True, check=True)
    assert out.stdout.split() == [b"6"]


def test_every_outcome(tmp_path):
    good = picture(1)
    rows = [
        *plain(12, start=100),
        ("good.png", good, {"caption": "good"}),
        ("html.jpg", b"<html>404</html>", {"caption": "x"}),
        ("empty.png", b"", {"caption": "x"}),
        ("cut.jpg", picture(2, format="JPEG")[:300], {"caption": "x"}),
        ("missing.png", None, {"caption": "x"}),
        ("wordless.png", picture(3), {}),
        ("blank.png", picture(4), {"caption": " "}),
        ("hash.png", picture(5), {"caption": "x", "sha256": "0" * 64}),
        (
            "hash2.png",
            picture(6),
            {"caption": "x", "sha256": hashlib.sha256(picture(6)).hexdigest()},
        ),
        ("tiny.png", picture(7, 1, 1), {"caption": "x"}),
        ("long.png", picture(8, 20, 200), {"caption": "x"}),
        ("same.png", good, {"caption": "good"}),
        ("tail.png", good + b"PK tail", {"caption": "another file of the same look"}),
        ("turned.jpg", picture(9, 24, 40, "JPEG", exif=turned()), {"caption": "lies"}),
        ("big.png", picture(10, 400, 300), {"caption": "big"}),
    ]
    result = ingest(
        [source(tmp_path / "in", rows)],
        str(tmp_path / "out"),
        IngestRules(max_side=64, heldout_share=0),
    )
    check_sums(result)
    outcome = {
        row["id"].split("#")[1]: (row["outcome"], row["reason"]) for row in inputs(result.manifest)
    }
    for i in range(100, 112):
        assert outcome.pop(f"{i}.png") == ("kept", "")
    assert outcome == {
        "good.png": ("kept", ""),
        "html.jpg": ("rejected", "not_image"),
        "empty.png": ("rejected", "not_image"),
        "cut.jpg": ("rejected", "truncated"),
        "missing.png": ("rejected", "missing_file"),
        "wordless.png": ("rejected", "incomplete"),
        "blank.png": ("rejected", "no_caption"),
        "hash.png": ("rejected", "hash_mismatch"),
        "hash2.png": ("kept", ""),
        "tiny.png": ("filtered", "too_small"),
        "long.png": ("filtered", "aspect"),
        "same.png": ("duplicate", "same_picture"),
        "tail.png": ("kept", ""),
        "turned.jpg": ("kept", ""),
        "big.png": ("kept", ""),
    }
    assert result.counts["flag:transposed"] == 1
    assert result.counts["flag:trailing_bytes"] == 1
    stored = {}
    for shard in result.manifest.shards:
        for it in shards.read_shard(result.manifest.url("shards", f"{shard.name}.tar")):
            stored[it.meta["source"].split("#")[1]] = it
    assert stored["good.png"].image == good
    assert stored["tail.png"].image == good
    assert Image.open(io.BytesIO(stored["turned.jpg"].image)).size == (40, 24)
    big = stored["big.png"].meta
    assert (big["width"], big["height"]) == (85, 64)
    assert (big["scores"]["original_width"], big["scores"]["original_height"]) == (400, 300)
    assert big["scores"]["aspect"] == 1.3333
    reject = next(r for r in inputs(result.manifest) if r["id"].endswith("#html.jpg"))
    assert reject["key"] == hashlib.blake2b(b"<html>404</html>", digest_size=16).hexdigest()
    assert reject["source"] == str(tmp_path / "in")
    assert "<html>" in reject["detail"]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_one_picture_with_several_captions(tmp_path):
    """Captions of one file join its first sample, unless they would leak a held-out pair."""
    one = picture(1)
    rows = [("a.png", one, {"caption": "first"})]
    rows += [(f"b{i}.png", one, {"caption": f"again {i}"}) for i in range(40)]
    rows += plain(40, start=100)
    result = ingest(
        [source(tmp_path / "in", rows)], str(tmp_path / "out"), IngestRules(heldout_share=0.3)
    )
    check_sums(result)
    found = samples(tmp_path / "out", result.manifest)
    key = hashlib.blake2b(one, digest_size=16).hexdigest()
    split, captions = found[key]
    outcomes = {row["id"].split("#")[1]: row for row in inputs(result.manifest)}
    added = [row["reason"] == "caption_added" for name, row in outcomes.items() if name[0] == "b"]
    assert captions == ("first", *(f"again {i}" for i in range(40) if added[i]))
    assert 5 < sum(added) < 35
    other = [r["reason"] for r in outcomes.values() if r["outcome"] == "duplicate"]
    assert Counter(other) == {
        "caption_added": sum(added),
        "caption_of_other_split": 40 - sum(added),
    }
    kept = [r for r in outcomes.values() if r["outcome"] == "kept"]
    assert all(found[row["key"]][0] == row["split"] for row in kept)
    assert split == outcomes["a.png"]["split"]


def test_names_unseen_in_any_style(tmp_path):
    rows = [
        (f"{style}{i}.png", picture(100 * s + i), {"caption": f"thing {i}", "style": style})
        for i in range(60)
        for s, style in enumerate(("ink", "oil"))
    ]
    rules = IngestRules(heldout_share=0.2, unseen_share=0.2)
    result = ingest([source(tmp_path / "in", rows)], str(tmp_path / "out"), rules)
    where = {}
    for split, (caption,) in samples(tmp_path / "out", result.manifest).values():
        name, style = caption.removesuffix(" style").split(", ")
        where[name, style] = split
    names = {split: {name for (name, _), s in where.items() if s == split} for split in SPLITS}
    assert not names["unseen"] & (names["train"] | names["heldout"])
    assert 4 <= len(names["unseen"]) <= 22
    assert names["heldout"] & names["train"], "known names in styles they were not seen in"
    assert result.manifest.samples("unseen") == 2 * len(names["unseen"])


# ---- again, and more --------------------------------------------------------------------------


def test_unchanged_sources_return_at_once_and_import_nothing(tmp_path):
    url, dataset = source(tmp_path / "in", plain(8)), str(tmp_path / "out")
    first = ingest([url], dataset)
    before = tree(dataset)
    code = (
        "import sys; from pipeline.ingest import ingest; from pipeline.execute import Executor\n"
        "result = ingest(sys.argv[1:-1], sys.argv[-1], executor=Executor(kind='ray'))\n"
        "heavy = {'pyarrow', 'PIL', 'ray', 'torch', 'numpy', 'fsspec'} & set(sys.modules)\n"
        "print(result.reused, result.new, result.counts['kept'], result.manifest.digest, heavy)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, url, dataset], capture_output=True, check=True
    )
    assert out.stdout.decode().split() == ["True", "0", "8", first.manifest.digest, "set()"]
    assert tree(dataset) == before
    shape = "shapes://?scenes=5&side=16"
    ingest([shape], str(tmp_path / "shapes"))
    out = subprocess.run(
        [sys.executable, "-c", code, shape, str(tmp_path / "shapes")],
        capture_output=True,
        check=True,
    )
    assert out.stdout.decode().startswith("True 0 5")


def test_growth_reads_only_what_is_new(tmp_path, monkeypatch):
    url, dataset = source(tmp_path / "in", plain(20)), str(tmp_path / "out")
    first = ingest([url], dataset, IngestRules(min_heldout=5))
    fetched = []
    fetch = units.fetch_image
    monkeypatch.setattr(
        units, "fetch_image", lambda image, most: fetched.append(image) or fetch(image, most)
    )
    source(tmp_path / "in", plain(31))
    second = ingest([url], dataset, IngestRules(min_heldout=5))
    assert sorted(fetched) == sorted(str(tmp_path / "in" / f"{i}.png") for i in range(20, 31))
    assert (second.new, second.reused) == (11, False)
    assert second.manifest.version == 2
    assert second.manifest.parent == 1
    assert second.manifest.shards[: len(first.manifest.shards)] == first.manifest.shards
    assert second.counts["kept"] == second.counts["seen"] == 31
    check_sums(second)
    assert manifest.read(dataset, 1) == first.manifest
    splits = {}
    for split, (caption,) in samples(dataset, second.manifest).values():
        splits.setdefault(caption, set()).add(split)
    assert all(len(split) == 1 for split in splits.values()), "pairs stay in their split"

    other = source(
        tmp_path / "other", [("x.png", picture(3), {"caption": "known"}), *plain(1, 900)]
    )
    third = ingest([other], dataset, IngestRules(min_heldout=5))
    known = [third.counts.get(f"duplicate:caption_{it}", 0) for it in ("added", "of_other_split")]
    assert (third.new, sum(known)) == (1, 1)
    assert set(third.manifest.sources) == {url, other}
    assert ingest([url, other], dataset, IngestRules(min_heldout=5)).reused
    check_sums(third)


def test_a_source_that_lost_rows_keeps_the_data_version(tmp_path):
    url, dataset = source(tmp_path / "in", plain(10)), str(tmp_path / "out")
    first = ingest([url], dataset)
    source(tmp_path / "in", plain(4))
    second = ingest([url], dataset)
    assert (second.new, second.manifest.version) == (0, 2)
    assert second.manifest.digest == first.manifest.digest
    assert ingest([url], dataset).reused


def test_another_caption_joins_a_known_picture(tmp_path):
    from pipeline.encode import encode, pixels_spec
    from pipeline.load import Loader

    rules = IngestRules(shard_samples=10)
    url, dataset = source(tmp_path / "in", plain(60)), str(tmp_path / "out")
    first = ingest([url], dataset, rules).manifest
    encode(first, [pixels_spec(8)], None, Executor())
    rows = [(f"{i}.png", picture(i), {"caption": f"also {i}"}) for i in range(5)]
    rows += [("5.png", picture(5), {"caption": "picture 2"})]  # nothing new
    result = ingest([source(tmp_path / "more", rows)], dataset, rules)
    check_sums(result)
    second = result.manifest
    before, after = samples(dataset, first), samples(dataset, second)
    told = {row["id"].rsplit("#")[-1]: row for row in inputs(second) if "more" in row["source"]}
    added = {row["key"] for row in told.values() if row["reason"] == "caption_added"}
    assert 2 <= len(added) <= 5 and told["5.png"]["reason"] == "known"
    assert {row["split"] for row in told.values()} == {before[r["key"]][0] for r in told.values()}
    for key, (split, captions) in after.items():
        assert (split, captions[:1]) == (before[key][0], before[key][1][:1])
        assert len(captions) - len(before[key][1]) == (key in added)
    kept = {shard.name for shard in first.shards} & {shard.name for shard in second.shards}
    assert 0 < len(kept) < len(first.shards)
    made = {file.stem for file in (tmp_path / "out" / "encodings").rglob("*.safetensors")}
    assert made >= {shard.name for shard in second.shards}, "no picture is encoded again"
    encodings = encode(second, [pixels_spec(8)], None, Executor())
    loader = Loader(second, [*encodings.values()], global_batch=8, seed=0)
    steps = range(40 * loader.samples // 8)
    shown = {it for step in steps for it in loader.batch(step)["caption"]}
    assert shown == {c for split, captions in after.values() if split == "train" for c in captions}
    assert ingest([str(tmp_path / "more")], dataset, rules).reused


def test_other_rules_build_anew(tmp_path):
    url, dataset = source(tmp_path / "in", plain(10)), str(tmp_path / "out")
    ingest([url], dataset)
    second = ingest([url], dataset, IngestRules(max_side=16))
    assert (second.new, second.manifest.version, second.manifest.parent) == (10, 2, None)
    assert second.counts["seen"] == 10
    tables = [shards.read_table(dataset, s.name) for s in second.manifest.shards]
    assert {side for table in tables for side in table["width"].to_pylist()} == {16}


def test_drawn_scenes_become_a_data_set_and_grow(tmp_path):
    dataset = str(tmp_path / "out")
    rules = IngestRules(near_duplicates="keep")
    small = ingest(["shapes://?scenes=200&side=16"], dataset, rules)
    assert small.counts["kept"] == 200
    large = ingest(["shapes://?scenes=260&side=16"], dataset, rules)
    assert (large.new, large.counts["seen"]) == (60, 260)
    table = shards.read_table(dataset, large.manifest.shards[0].name)
    label = json.loads(table["label"][0].as_py())
    assert set(label) == {"colour", "shape", "size", "place", "background"}
    assert label["colour"] in table["captions"][0].as_py()[0]


# ---- what must fail ---------------------------------------------------------------------------


def test_too_many_rejects_fail_with_counts_and_publish_nothing(tmp_path):
    rows = plain(4) + [(f"bad{i}.png", b"no picture", {"caption": "x"}) for i in range(6)]
    url, dataset = source(tmp_path / "in", rows), str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"6 of 10 new rows were rejected \(6 not_image\).*0\.5"):
        ingest([url], dataset)
    assert manifest.latest(dataset) is None
    assert ingest([url], dataset, IngestRules(max_rejected_share=0.6)).new == 4
    assert "staging" not in os.listdir(dataset)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([("a.png", b"", {"caption": "x"})], r"1 of 1 new rows were rejected \(1 not_image\)"),
        (
            [(f"{i}.png", picture(i, 2, 2), {"caption": "x"}) for i in range(3)],
            r"none of 3 rows was kept \(3 filtered:too_small\)",
        ),
    ],
)
def test_nothing_to_keep_is_an_error(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        ingest([source(tmp_path / "in", rows)], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no sources"):
        ingest([], str(tmp_path / "out"))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_pictures_leave_something_to_train_on(tmp_path, count):
    for seed in range(6):
        rows = plain(count, start=100 * seed)
        url = source(tmp_path / f"in{seed}", rows)
        result = ingest([url], str(tmp_path / f"out{seed}"), IngestRules(heldout_share=0.5))
        assert result.new == count
        assert result.manifest.samples("train") >= 1


def test_one_pair_for_all_is_not_all_held_out(tmp_path):
    rows = [(f"{i}.png", picture(i), {"caption": "a thing"}) for i in range(80)]
    result = ingest([source(tmp_path / "in", rows)], str(tmp_path / "out"))
    assert result.manifest.samples("train") == 80


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_side": -1}, "max_side must be at least 0"),
        ({"heldout_share": 1.5}, r"heldout_share must lie in \[0, 1\]"),
        ({"max_aspect": 0.5}, "max_aspect must be at least 1"),
        ({"background": (0, 0, 256)}, "background must be three levels"),
        ({"shard_samples": 0}, "shard_samples must be at least 1"),
    ],
)
def test_rules_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        IngestRules(**wrong)


def test_credentials_that_expire_end_the_run_and_reject_nothing(tmp_path):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Expiring(MemoryFileSystem):
        """A store that gives captions, and has had enough when it comes to pictures."""

        protocol = "expiring"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("expiring://", "memory://"))

        def _open(self, path, *args, **options):
            if path.endswith(".png"):
                raise PermissionError("the provided token has expired")
            return super()._open(path, *args, **options)

        def cat_file(self, path, *args, **options):
            with self._open(path) as file:
                return file.read()

    fsspec.register_implementation("expiring", Expiring, clobber=True)
    MemoryFileSystem().pipe_file("/expiring/a.png", picture(1))
    MemoryFileSystem().pipe_file("/expiring/a.txt", b"a caption")
    with pytest.raises(OSError, match="token has expired"):
        ingest(["expiring://expiring"], str(tmp_path / "out"))
    assert manifest.versions(str(tmp_path / "out")) == []


def test_one_broken_file_that_is_added_alone_stops_nobody(tmp_path):
    rows, dataset = plain(20), str(tmp_path / "out")
    ingest([source(tmp_path / "in", rows)], dataset, IngestRules())
    more = ingest(
        [source(tmp_path / "in", [*rows, ("broken.png", b"", {"caption": "none"})])], dataset
    )
    assert (more.new, more.counts["rejected:not_image"]) == (0, 1)
    many = [(f"broken{i}.png", b"%d" % i, {"caption": "none"}) for i in range(20)]
    with pytest.raises(ValueError, match="20 of 21 new rows were rejected"):
        ingest(
            [source(tmp_path / "in", [*rows, *many, ("21.png", picture(21), {"caption": "21"})])],
            dataset,
        )


def test_what_is_held_out_stays_so_when_pictures_are_stored_otherwise(tmp_path):
    rows, dataset = plain(40), str(tmp_path / "out")

    def heldout(count, **rules):
        url = source(tmp_path / "in", rows[:count])
        version = ingest([url], dataset, IngestRules(near_duplicates="keep", **rules)).manifest
        rows_of = outcomes.read_outcomes(version)
        return {it["id"] for it in rows_of if it["split"] == "heldout"}, version

    first, _ = heldout(40)
    assert len(first) == 10  # a small start holds out a quarter
    rows += plain(400)[40:]
    grown, _ = heldout(400)
    assert first <= grown
    assert len(grown - first) < 0.2 * 360
    otherwise, anew = heldout(400, max_side=12)
    assert anew.parent is None
    assert otherwise == grown
    assert heldout(400, max_side=12, heldout_share=0.5)[0] != grown


def test_a_caption_that_is_held_out_is_not_learnt_beside_another(tmp_path):
    """Of several captions those of another split than the first one's go."""
    rng, folder = random.Random(0), tmp_path / "in"
    folder.mkdir()
    names = [f"caption {i}" for i in range(60)]
    with open(folder / "captions.jsonl", "w") as file:
        for number in range(60):
            (folder / f"{number}.png").write_bytes(picture(number))
            said = {"file": f"{number}.png", "caption": rng.sample(names, 4)}
            file.write(json.dumps(said) + "\n")
    rules = IngestRules(heldout_share=0.3, near_duplicates="keep")
    version = ingest([str(folder)], str(tmp_path / "out"), rules).manifest
    found = {"train": set(), "heldout": set()}
    for shard in version.shards:
        for it in shards.read_table(version.dataset, shard.name, ["captions"]).to_pylist():
            found[shard.split] |= set(it["captions"])
    assert not found["train"] & found["heldout"]
    assert len(found["train"] | found["heldout"]) > 50


@pytest.mark.parametrize("moment", ["_check_undisturbed", "_clean"])
def test_two_runs_where_nothing_locks_harm_nobody(tmp_path, monkeypatch, moment):
    """One wins the version, the other says so and builds on it; no shard that is listed goes."""
    dataset = f"memory://two-{moment}/data"
    one, other = source(tmp_path / "one", plain(12)), source(tmp_path / "two", plain(12, 12))
    once, meet = [], getattr(passes.Run, moment)

    def meeting(self, *given):
        if not once:
            once.append(True)
            ingest([other], dataset, KILL_RULES)
        return meet(self, *given)

    monkeypatch.setattr(passes.Run, moment, meeting)
    if moment == "_clean":  # the other began when this one had published
        ingest([one], dataset, KILL_RULES)
    else:
        with pytest.raises(ValueError, match="published meanwhile by another run"):
            ingest([one], dataset, KILL_RULES)
        ingest([one], dataset, KILL_RULES)
    last = manifest.latest(dataset)
    assert (last.version, last.counts["kept"]) == (2, 24)
    for number in (1, 2):
        version = manifest.read(dataset, number)
        assert outcomes.count(outcomes.read_batches(version)) == dict(version.counts)
        for shard in version.shards:
            assert storage.exists(version.url("shards", f"{shard.name}.tar"))
    removing.gc(dataset)  # clears away what the one that was refused had staged
    assert not storage.list_names(f"{dataset}/staging")
    assert manifest.latest(dataset) == last


def test_a_take_down_meanwhile_keeps_a_version_from_being_published(tmp_path, monkeypatch):
    dataset = "memory://taken/data"
    url = source(tmp_path / "in", plain(6))
    check = passes.Run._check_undisturbed
    gone = {dedup.key(picture(3)): {"reason": "asked", "time": ""}}

    def meanwhile(self, *given):
        if not storage.exists(f"{dataset}/blocked.json"):
            storage.publish_json(f"{dataset}/blocked.json", gone)
        return check(self, *given)

    monkeypatch.setattr(passes.Run, "_check_undisturbed", meanwhile)
    with pytest.raises(ValueError, match="taken away while this run went on"):
        ingest([url], dataset, KILL_RULES)
    assert ingest([url], dataset, KILL_RULES).counts["rejected:removed"] == 1


def test_staged_pictures_that_are_not_what_they_were_are_not_stored(tmp_path, monkeypatch):
    """A power cut between the passes: the file is there, what was in it is not."""
    url, dataset = source(tmp_path / "in", plain(6)), str(tmp_path / "out")
    write = passes.Run._write

    def cut(self, *given):
        (staged,) = Path(dataset, "staging").glob("*.bin")
        staged.write_bytes(bytes(staged.stat().st_size))
        return write(self, *given)

    monkeypatch.setattr(passes.Run, "_write", cut)
    with pytest.raises(ValueError, match="not the picture that was staged; delete the folder"):
        ingest([url], dataset, KILL_RULES)
    monkeypatch.setattr(passes.Run, "_write", write)
    shutil.rmtree(tmp_path / "out" / "staging")
    assert ingest([url], dataset, KILL_RULES).counts["kept"] == 6


def test_a_missing_file_is_looked_for_again(tmp_path):
    (tmp_path / "files").mkdir()
    table = tmp_path / "table.jsonl"
    for number in range(4):
        (tmp_path / "files" / f"{number}.png").write_bytes(picture(number))
    rows = [{"file": f"files/{number}.png", "caption": f"{number}"} for number in range(5)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = str(tmp_path / "out")
    first = ingest([str(table)], dataset, IngestRules())
    assert first.counts["rejected:missing_file"] == 1
    assert ingest([str(table)], dataset, IngestRules()).reused
    assert "staging" not in os.listdir(dataset)
    (tmp_path / "files" / "4.png").write_bytes(picture(4))
    found = ingest([str(table)], dataset, IngestRules())
    assert (found.new, found.counts["seen"], found.counts["rejected"]) == (1, 5, 0)


def test_a_source_named_twice_is_refused(tmp_path):
    url = source(tmp_path / "in", plain(3))
    with pytest.raises(ValueError, match="named twice; name each source once"):
        ingest([url, url + "/"], str(tmp_path / "out"))


# ---- killed, and run again --------------------------------------------------------------------

KILL_RULES = IngestRules(shard_samples=16, min_heldout=6, max_side=16)


def forked(work):
    """The id of a child that does the work."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # the parent only sees the status
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def undisturbed(tmp_path):
    """Two sources, and what a start and then a growth leave when nothing goes wrong."""
    rows = [
        *plain(60),
        ("bad.png", b"no", {"caption": "x"}),
        ("same.png", picture(3), {"caption": "more"}),
    ]
    first = source(tmp_path / "in", rows)
    again = [(f"again{i}.png", picture(i), {"caption": f"once more {i}"}) for i in range(0, 60, 9)]
    second = source(tmp_path / "more", [*plain(20, start=500), *again])
    ingest([first], str(tmp_path / "calm"), KILL_RULES)
    start = tree(tmp_path / "calm")
    ingest([first, second], str(tmp_path / "calm"), KILL_RULES)
    return first, second, start, tree(tmp_path / "calm")


@pytest.fixture
def disturbed(tmp_path, undisturbed, killed_at):
    """A function (phase, step, seconds) -> whether the kill struck, once a second run has ended
    like an undisturbed one. Phase 0 makes a data set, 1 lets it grow."""
    first, second, *trees = undisturbed
    numbers = itertools.count()
    base = tmp_path / "base"
    ingest([first], str(base), KILL_RULES)

    def run(phase, step, seconds=0.0):
        dataset = str(tmp_path / f"killed{next(numbers)}")
        if phase:
            shutil.copytree(base, dataset)
        sources = [first, second] if phase else [first]
        work = functools.partial(ingest, sources, dataset, KILL_RULES)
        status = killed_at(step, work, seconds)
        assert status in (0, -signal.SIGKILL)
        for version in manifest.versions(dataset):  # whatever is visible is whole
            samples(dataset, manifest.read(dataset, version))
        work()
        assert tree(dataset) == trees[phase]
        shutil.rmtree(dataset)
        return status != 0

    return run


@pytest.fixture
def phases(tmp_path, undisturbed, measured):
    """(steps, seconds of one) of making a data set and of its growth."""
    first, second, *_ = undisturbed
    dataset = str(tmp_path / "measured")
    return [
        measured(functools.partial(ingest, sources, dataset, KILL_RULES))
        for sources in ([first], [first, second])
    ]


def test_killed_runs_end_like_undisturbed_ones(disturbed, phases):
    rng = random.Random(1)
    for phase, (steps, each) in enumerate(phases):
        for step in (0, steps // 4, steps // 2, steps - 2, steps - 1):
            assert disturbed(phase, step), "the kills have to hit"
        assert disturbed(phase, rng.randrange(steps - 1), rng.uniform(0, each / 2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_at_any_step_and_at_random_end_like_undisturbed_ones(
    disturbed, phases, kills, rounds
):
    """Half of the kills strike while a data set is made, half while it grows."""
    rng = random.Random(2)
    for phase, (steps, each) in enumerate(phases):
        kill = functools.partial(disturbed, phase)
        kills(rounds(5, 48), rng, steps, each, kill)


def test_shards_of_a_killed_run_over_other_rows_go(tmp_path, killed_at):
    first = source(tmp_path / "in", plain(60))
    dataset = tmp_path / "out"
    for steps in range(20, 200):
        status = killed_at(steps, lambda: ingest([first], str(dataset), KILL_RULES))
        if storage.list_names(str(dataset / "shards")) and storage.list_names(
            str(dataset / "staging")
        ):
            break
        assert status != 0, "never died between a shard and the manifest"
        shutil.rmtree(dataset)
    result = ingest([source(tmp_path / "in", plain(40))], str(dataset), KILL_RULES)
    listed = {f"{shard.name}.tar" for shard in result.manifest.shards}
    assert set(os.listdir(dataset / "shards")) == listed
    assert len(os.listdir(dataset / "tables")) == len(listed)


def test_shards_of_other_versions_stay_when_a_killed_run_named_them(tmp_path):
    url, dataset = source(tmp_path / "in", plain(10)), str(tmp_path / "out")
    first = ingest([url], dataset).manifest
    before = samples(dataset, first)
    shard = {"shard": {"name": first.shards[0].name}}
    storage.publish_json(f"{dataset}/staging/0123-shard.json", shard)
    assert ingesting.unchanged([url], dataset, IngestRules()) is None
    second = ingest([url], dataset, IngestRules(max_side=16)).manifest
    assert not set(second.shards) & set(first.shards)
    assert samples(dataset, first) == before
    assert ingesting.unchanged([url], dataset, IngestRules(max_side=16)) == second
    assert ingesting.unchanged([url], dataset, IngestRules()) is None


def test_two_runs_at_once_give_one_version(tmp_path):
    url, dataset = source(tmp_path / "in", plain(60)), str(tmp_path / "out")
    both = [forked(lambda: ingest([url], dataset, KILL_RULES)) for _ in range(2)]
    assert [ended(pid) for pid in both] == [0, 0]
    assert manifest.versions(dataset) == [1]
    ingest([url], str(tmp_path / "alone"), KILL_RULES)
    assert tree(dataset) == tree(tmp_path / "alone")


def test_an_error_while_writing_goes_on_once_mended(tmp_path, monkeypatch):
    """A full disk: a clear error, nothing partial, and the next run goes on."""
    url, dataset = source(tmp_path / "in", plain(40)), str(tmp_path / "out")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_table", full)
        with pytest.raises(OSError, match="No space left"):
            ingest([url], dataset, KILL_RULES)
    assert manifest.latest(dataset) is None
    assert os.listdir(f"{dataset}/shards") == []
    ingest([url], dataset, KILL_RULES)
    ingest([url], str(tmp_path / "calm"), KILL_RULES)
    assert tree(dataset) == tree(tmp_path / "calm")


# ---- elsewhere --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_and_local_give_the_same_bytes(ray_session, tmp_path):
    sources = [source(tmp_path / "in", plain(70)), "shapes://?scenes=150&side=16"]
    rules = IngestRules(shard_samples=50, max_side=20, near_duplicates="keep")
    steps = []
    ingest(sources, str(tmp_path / "local"), rules)
    result = ingest(
        sources,
        str(tmp_path / "ray"),
        rules,
        Executor(kind="ray"),
        lambda *step: steps.append(step),
    )
    assert result.counts["kept"] == 220
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    assert {stage for stage, _, _ in steps} == {"read", "write"}


def test_processes_and_local_give_the_same_bytes(tmp_path):
    sources = [source(tmp_path / "in", plain(70)), "shapes://?scenes=150&side=16"]
    rules, steps = IngestRules(shard_samples=50, max_side=20, near_duplicates="keep"), []
    ingest(sources, str(tmp_path / "local"), rules)
    there = Executor(kind="processes", workers=2)
    ingest(sources, str(tmp_path / "set"), rules, there, lambda *step: steps.append(step))
    assert tree(tmp_path / "set") == tree(tmp_path / "local")
    assert {stage for stage, _, _ in steps} == {"read", "write"}


def test_a_data_set_in_an_object_store(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    url, remote = source(tmp_path / "in", plain(20)), "memory://ingested/set"
    result = ingest([url], remote, KILL_RULES)
    local = ingest([url], str(tmp_path / "out"), KILL_RULES)
    assert result.manifest.digest == local.manifest.digest
    assert samples(remote, result.manifest) == samples(tmp_path / "out", local.manifest)
    assert ingest([url], remote, KILL_RULES).reused
    assert storage.list_names(f"{remote}/staging") == []


# ---- real pictures ----------------------------------------------------------------------------


def slice_of(folder, tmp_path, rows):
    """A table of some rows of a real set, and the rules to read it."""
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    return str(table), SourceOptions(root=str(folder))


def listed(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def test_real_emoji(tmp_path, real_data):
    folder = real_data("emoji4")
    rows = listed(folder)[:160]
    url, options = slice_of(folder, tmp_path, rows)
    rules = IngestRules(max_side=32, unseen_share=0.1, options=options)
    result = ingest([url], str(tmp_path / "out"), rules)
    check_sums(result)
    assert result.counts["seen"] == 160
    assert result.counts["rejected"] == 0
    assert result.counts["filtered"] == result.counts["filtered:other_split"] <= 8
    assert result.counts["flag:alpha"] > 140
    for shard in result.manifest.shards:
        for it in shards.read_shard(result.manifest.url("shards", f"{shard.name}.tar")):
            image = Image.open(io.BytesIO(it.image))
            assert (image.size, image.mode) == ((32, 32), "RGB")
            corner = np.asarray(image)[0, 0]
            assert corner.min() > 200, "emoji have transparent corners: white"
            assert it.captions[0].endswith(f", {it.meta['label']['style']} style")


def test_real_storybooks_have_pictures_with_several_captions(tmp_path, real_data):
    folder = real_data("storybooks")
    by_key = {}
    for row in listed(folder):
        data = (folder / row["file"]).read_bytes()
        by_key.setdefault(hashlib.blake2b(data, digest_size=16).hexdigest(), []).append(row)
    twice = [rows for rows in by_key.values() if len(rows) > 1][:8]
    once = [rows for rows in by_key.values() if len(rows) == 1][:12]
    assert len(twice) == 8
    url, options = slice_of(folder, tmp_path, [row for rows in twice + once for row in rows])
    rules = IngestRules(max_side=48, heldout_share=0, options=options)
    result = ingest([url], str(tmp_path / "out"), rules)
    check_sums(result)
    assert result.counts["kept"] == 20
    assert result.counts["duplicate"] == sum(len(rows) for rows in twice) - 8
    found = samples(tmp_path / "out", result.manifest)
    for rows in twice:
        key = hashlib.blake2b((folder / rows[0]["file"]).read_bytes(), digest_size=16).hexdigest()
        captions = list(dict.fromkeys(" ".join(row["caption"].split()) for row in rows))
        assert list(found[key][1]) == captions


def test_real_photographs(tmp_path, real_data):
    folder = real_data("exercises_pd")
    rows = sorted(listed(folder), key=lambda row: -(folder / row["file"]).stat().st_size)
    rows = rows[:3] + rows[-9:]
    url, options = slice_of(folder, tmp_path, rows)
    rules = IngestRules(max_side=96, options=options)
    result = ingest([url], str(tmp_path / "out"), rules)
    check_sums(result)
    assert result.counts["kept"] == 12
    for shard in result.manifest.shards:
        for it in shards.read_shard(result.manifest.url("shards", f"{shard.name}.tar")):
            assert it.ext == "jpg"
            assert min(it.meta["width"], it.meta["height"]) == 96
            assert Image.open(io.BytesIO(it.image)).size == (it.meta["width"], it.meta["height"])
            assert it.meta["label"]["category"]


def test_real_malformed_files_all_end_somewhere(tmp_path, real_data):
    """226 broken and hostile files through the whole of ingest, in a process of at most 2 GiB."""
    folder = real_data("malformed")
    names = sorted(os.listdir(folder / "files"))
    rows = [{"file": f"files/{name}", "caption": name} for name in names]
    url, _ = slice_of(folder, tmp_path, rows)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from pipeline.ingest import *\n"
        "options = SourceOptions(root=sys.argv[3])\n"
        "rules = IngestRules(max_side=64, max_rejected_share=0.9, min_side=1, options=options)\n"
        "ingest([sys.argv[1]], sys.argv[2], rules)"
    )
    command = [sys.executable, "-c", code, url, str(tmp_path / "out"), str(folder)]
    ran = subprocess.run(command, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    version = manifest.read(str(tmp_path / "out"), 1)
    outcomes = inputs(version)
    assert [row["id"].split("#files/")[1] for row in outcomes] == names
    assert version.counts["seen"] == 226
    for row in outcomes:
        assert row["outcome"] == "kept" or row["reason"]
    assert version.counts["rejected"] > 90
    assert version.counts["kept"] > 80
