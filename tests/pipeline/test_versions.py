"""A taken-down picture is nowhere, and stays nowhere; what no version lists goes."""

import io
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import manifest, outcomes, shards, storage, versions
from pipeline.dedup import key
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.load import Loader
from pipeline.schema import EncoderSpec
from pipeline.score import ScorerSpec, read_scores, score

RULES = IngestRules(shard_samples=8, min_side=22, heldout_share=0.3)


def picture(seed):
    side = 20 + seed % 10
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def folder(path, seeds):
    path.mkdir(exist_ok=True)
    rows = []
    for seed in seeds:
        (path / f"{seed}.png").write_bytes(picture(seed))
        os.utime(path / f"{seed}.png", (1, 1))
        rows.append({"file": f"{seed}.png", "caption": f"the caption of {seed}."})
    (path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(spec):
    def encoder(captions):
        width = np.array([len(caption) for caption in captions], np.float32)
        return [np.full((3, 4), n, np.float16) for n in width], width[:, None]

    if spec.name == "once":
        encoder.repeats = 2  # columns that are stored once for each word
    return encoder


SPECS = [
    pixels_spec(8),
    EncoderSpec("words", "text", "words1"),
    EncoderSpec("once", "text", "once1"),
]
BUCKETED = [pixels_spec(16, buckets=[(16, 16), (24, 16), (16, 24)], flip=True)]


def encoded(version, specs=SPECS):
    return encode(version, specs, texts, Executor())


def nothing_to_encode(version, specs=SPECS):
    """The encodings, which must be there."""
    wanted = {f"{shard.name}.safetensors" for shard in version.split()}
    for spec in specs:
        assert wanted <= set(os.listdir(f"{version.dataset}/encodings/{spec.fingerprint}"))
    return encoded(version, specs)


def contents(version, encodings):
    """Key -> all that a loader says of a sample, both views of a picture included."""
    found = {}
    splits = tuple({shard.split for shard in version.split()})
    whole = Loader(version, [*encodings.values()], splits=splits, global_batch=1, seed=0)
    for loader in whole.alike():
        for row in range(loader.samples):
            batch = loader.rows([row])
            arrays = {n: v.tobytes() for n, v in batch.items() if isinstance(v, np.ndarray)}
            del arrays["position"]
            found[batch["key"][0]] = arrays | {"caption": batch["caption"], "label": batch["label"]}
    return found


@pytest.fixture
def dataset(tmp_path):
    """Two versions of 40 and 60 pictures, a few of them filtered, all encoded."""
    dataset = str(tmp_path / "set")
    for seeds in (range(40), range(60)):
        encoded(ingest([folder(tmp_path / "in", seeds)], dataset, RULES).manifest)
    return dataset


def everything(dataset):
    """All bytes of all files but the blocklist, and what parquet files say."""
    found = b""
    for path in sorted(Path(dataset).rglob("*")):
        if path.is_file() and path.name != "blocked.json":
            found += path.read_bytes()
        if path.suffix == ".parquet":
            found += str(shards.read_parquet(str(path)).to_pylist()).encode()
    return found


def tree(dataset):
    """Path -> bytes; the blocklist has the time of day in it."""
    files = (path for path in Path(dataset).rglob("*") if path.is_file())
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in files
        if path.name != "blocked.json"
    }


def by_key(version):
    return {it["key"]: it for it in outcomes.read_outcomes(version) if it["outcome"] != "rejected"}


def kept(version):
    return {key for key, it in by_key(version).items() if it["outcome"] == "kept"}


def loaded(version):
    encodings = encoded(version)
    splits = tuple({shard.split for shard in version.split()})
    loader = Loader(version, [*encodings.values()], splits=splits, global_batch=1, seed=0)
    return {loader.batch(step)["key"][0] for step in range(loader.samples)}


def test_a_removed_picture_is_nowhere(dataset):
    before = [manifest.read(dataset, number) for number in (1, 2)]
    gone = [3, 11, 45, 20]  # 20 was filtered; 45 came with the second version
    keys = [key(picture(seed)) for seed in gone]
    found = everything(dataset)
    assert all(f"the caption of {seed}.".encode() in found for seed in gone)
    assert all(picture(seed) in found for seed in gone)
    removal = versions.remove(dataset, keys, "asked for")
    found = everything(dataset)
    for seed in gone:
        assert f"the caption of {seed}.".encode() not in found
        assert picture(seed) not in found
    assert b"the caption of 4." in found and picture(4) in found
    assert removal.held == {
        before[0].digest: tuple(sorted(keys[i] for i in (0, 1, 3))),
        before[1].digest: tuple(sorted(keys)),
    }
    assert (removal.absent, removal.manifest.version) == ((), 3)


def test_versions_stay_what_they_were_but_for_it(dataset):
    before = [by_key(manifest.read(dataset, number)) for number in (1, 2)]
    digests = [manifest.read(dataset, number).digest for number in (1, 2)]
    keys = [key(picture(seed)) for seed in (3, 11, 45)]
    newest = versions.remove(dataset, keys).manifest
    for number, was, digest in zip((1, 2, 3), [*before, before[1]], [*digests, None], strict=True):
        version = manifest.read(dataset, number)
        assert by_key(version) == {k: it for k, it in was.items() if k not in keys}
        nothing_to_encode(version)
        assert loaded(version) == kept(version)
        assert version.counts["kept"] == version.samples()
        assert outcomes.count(outcomes.read_batches(version)) == dict(version.counts)
        if digest:
            assert version.digest == digest
            assert set(version.redacted["keys"]) <= set(keys)
    assert newest.digest not in digests and not newest.redacted
    assert newest.counts["rejected:removed"] == 3


def test_it_does_not_come_back(dataset, tmp_path):
    keys = [key(picture(seed)) for seed in (3, 45, 77)]
    removal = versions.remove(dataset, keys)
    assert removal.absent == (keys[2],)
    assert ingest([str(tmp_path / "in")], dataset, RULES).reused
    other = folder(tmp_path / "other", [*range(70, 80), 3, 45])
    result = ingest([other], dataset, RULES)
    assert result.counts["rejected:removed"] == 2 + 3
    assert not loaded(result.manifest).intersection(keys)
    assert picture(77) not in everything(dataset)
    from_nothing = ingest([other], dataset, IngestRules(max_side=16, heldout_share=0))
    assert from_nothing.counts["rejected:removed"] == 3
    told = outcomes.explain(dataset, keys[2])
    assert {(it["outcome"], it["reason"]) for it in told} == {("rejected", "removed")}


def test_removing_again_changes_nothing_and_names_the_same_versions(dataset):
    keys = [key(picture(seed)) for seed in (3, 45)]
    first = versions.remove(dataset, keys)
    left = tree(dataset)
    again = versions.remove(dataset, [*keys, *keys])
    assert (again.held, again.manifest) == (first.held, first.manifest)
    assert tree(dataset) == left
    assert manifest.versions(dataset) == [1, 2, 3]


def test_a_whole_shard_and_a_whole_data_set_can_go(dataset):
    last = manifest.latest(dataset)
    assert last is not None
    shard = last.shards[0]
    keys = shards.read_table(dataset, shard.name, ["key"])["key"].to_pylist()
    left = versions.remove(dataset, keys).manifest
    assert len(left.shards) == len(last.shards) - 1
    assert shard.name not in {it.name for it in left.shards}
    empty = versions.remove(dataset, by_key(left)).manifest
    assert (empty.shards, empty.counts["kept"], empty.counts["seen"]) == ((), 0, 60)
    assert not [*(Path(dataset) / "shards").iterdir()]


def test_drafts_of_other_machines_go_with_what_they_may_hold(dataset):
    """A pod that is gone left them. An encoder that is at work elsewhere keeps its own, but for a
    take-down."""
    folders = ["shards", "tables", "inputs", "staging", f"encodings/{SPECS[0].fingerprint}"]

    def left(hours):
        for folder in folders:
            place = Path(dataset, folder, f".draft.pod-1.7.{hours}.tmp")
            place.mkdir(parents=True)
            for path in (place / "draft", place):
                path.touch()
                os.utime(path, (time.time() - 3600 * hours,) * 2)

    def there():
        return sorted(str(it.parent.relative_to(dataset)) for it in Path(dataset).rglob(".draft.*"))

    left(1)
    left(30)
    assert len(there()) == 2 * len(folders)
    versions.gc(dataset)
    assert there() == sorted(folders)
    left(30)
    versions.compact(dataset)
    assert there() == sorted(folders)
    versions.remove(dataset, [key(picture(3))])
    assert there() == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "no keys given"),
        (["ab" * 16, "3.png"], "'3.png' is no key"),
        (["AB"], "'ab' is no key"),
    ],
)
def test_what_is_no_key_is_refused(dataset, keys, message):
    before = everything(dataset)
    with pytest.raises(ValueError, match=message):
        versions.remove(dataset, keys)
    assert everything(dataset) == before and manifest.blocked(dataset) == {}


# ---- a picture that was taken down, saved anew ------------------------------------------------


def photograph(seed, format="JPEG", side=120):
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


def saved_as(format, data, **options):
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, format, **options)
    return out.getvalue()


def files(path, named):
    path.mkdir(exist_ok=True)
    for name, data in named.items():
        (path / name).write_bytes(data)
        (path / name).with_suffix(".txt").write_text(f"the caption of {name}")
    return str(path)


ANEW = {
    "appended.jpg": lambda data: data + b"\0",
    "saved.png": lambda data: saved_as("PNG", data),
    "smaller.jpg": lambda data: saved_as("JPEG", data, quality=70),
    "half.webp": lambda data: half(data),
}


def half(data):
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((60, 60), Image.Resampling.BICUBIC).save(out, "WEBP")
    return out.getvalue()


@pytest.fixture
def taken(tmp_path):
    """A data set from which one photograph and one flat picture were taken down."""
    dataset, gone = str(tmp_path / "taken"), photograph(1)
    flat = io.BytesIO()
    Image.new("RGB", (30, 30), (200, 30, 30)).save(flat, "PNG")
    named = {f"{n}.jpg": photograph(n) for n in range(12)} | {"flat.png": flat.getvalue()}
    ingest([files(tmp_path / "in", named)], dataset, IngestRules(heldout_share=0))
    versions.remove(dataset, [key(gone), key(flat.getvalue())])
    return dataset, gone, flat.getvalue()


@pytest.mark.parametrize("rules", [{}, {"max_side": 48}], ids=["growth", "built anew"])
def test_a_removed_picture_does_not_come_back_saved_anew(taken, tmp_path, rules):
    dataset, gone, flat = taken
    again = {name: change(gone) for name, change in ANEW.items()}
    assert key(gone) not in {key(data) for data in again.values()}
    more = again | {"flat.png": flat + b"\0", "other.jpg": photograph(50)}
    url = files(tmp_path / "more", more)
    version = ingest([url], dataset, IngestRules(heldout_share=0, **rules)).manifest
    found = {it["id"].split("#")[1]: it for it in outcomes.read_outcomes(version)}
    for name in again:
        it = found[name]
        assert (it["outcome"], it["reason"]) == ("rejected", "removed_lookalike")
        assert key(gone) in it["detail"] and it["key"] == key(again[name])
    # a flat picture has no look, and would take all others of its colour with it
    assert found["flat.png"]["outcome"] == found["other.jpg"]["outcome"] == "kept"
    assert version.counts["rejected:removed_lookalike"] == len(again)
    assert outcomes.count(outcomes.read_batches(version)) == dict(version.counts)


def test_look_alikes_of_what_was_removed_come_in_where_the_rules_say_so(taken, tmp_path):
    dataset, gone, _ = taken
    url = files(tmp_path / "more", {"saved.png": saved_as("PNG", gone)})
    rules = IngestRules(heldout_share=0)
    assert ingest([url], dataset, rules).counts["rejected:removed_lookalike"] == 1
    both = [str(tmp_path / "in"), url]
    other = ingest(both, dataset, replace(rules, removed_lookalikes="keep"))
    assert key(saved_as("PNG", gone)) in kept(other.manifest)
    assert other.counts["rejected"] == other.counts["rejected:removed"] == 2
    with pytest.raises(ValueError, match="removed_lookalikes must be reject or keep, got 'some'"):
        IngestRules(removed_lookalikes="some")


def test_a_blocklist_and_versions_without_looks_are_read(taken, tmp_path):
    dataset, gone, _ = taken
    listed = manifest.blocked(dataset)
    assert {len(it["look"]) for it in listed.values()} == {22}
    old = {name: {"reason": it["reason"], "time": it["time"]} for name, it in listed.items()}
    storage.publish_json(f"{dataset}/blocked.json", old)
    last = manifest.latest(dataset)
    stated = last.stated()
    del stated["rules"]["removed_lookalikes"]
    storage.publish_json(f"{dataset}/versions/{last.version:06d}.json", stated)
    named = {"same.jpg": gone, "saved.png": saved_as("PNG", gone)}
    grown = ingest([files(tmp_path / "more", named)], dataset, IngestRules(heldout_share=0))
    assert grown.manifest.parent == last.version
    found = {it["id"].split("#")[1]: it for it in outcomes.read_outcomes(grown.manifest)}
    assert found["same.jpg"]["reason"] == "removed"
    assert found["saved.png"]["outcome"] == "kept"


def test_what_is_stored_and_looks_the_same_is_named_and_stays(tmp_path):
    dataset, gone = str(tmp_path / "set"), photograph(1)
    named = {f"{n}.jpg": photograph(n) for n in range(6)} | {"b.png": saved_as("PNG", gone)}
    ingest([files(tmp_path / "in", named)], dataset, IngestRules(heldout_share=0))
    for _ in range(2):  # also when it is asked again, with the picture gone
        removal = versions.remove(dataset, [key(gone)])
        assert removal.alike == (key(named["b.png"]),)
    assert removal.alike[0] in kept(removal.manifest)
    assert versions.remove(dataset, removal.alike).alike == ()


# ---- killed, and run again --------------------------------------------------------------------


GONE = (3, 104, 507)
STOPPED = {
    "remove": lambda dataset: versions.remove(dataset, [key(picture(seed)) for seed in GONE]),
    "compact": versions.compact,
    "gc": lambda dataset: versions.gc(dataset, keep=1),
    "score": lambda dataset: score(
        dataset, manifest.latest(dataset).shards, BRIGHT, bright, Executor()
    ),
}
BRIGHT = [ScorerSpec(name, f"{name}1", (name,), side=4) for name in ("bright", "again")]


def bright(spec):
    return lambda pixels, _: {spec.name: pixels.mean((1, 2, 3)).astype(np.float32)}


@pytest.mark.parametrize("work", STOPPED)
def test_what_was_killed_is_finished_by_the_next(work, grown, tmp_path, killed_at):
    """At random steps of those that change the disk, until one comes too late."""
    encoded(grown)
    dataset, do = grown.dataset, STOPPED[work]
    if work == "gc":
        versions.compact(dataset)
    before = manifest.versions(dataset)
    calm = str(tmp_path / "calm")
    shutil.copytree(dataset, calm)
    do(calm)
    assert tree(calm) != tree(dataset)
    rng, step, kills = random.Random(work), 0, 0
    while True:
        copy = str(tmp_path / "copy")
        shutil.copytree(dataset, copy)
        status = killed_at(step, lambda copy=copy: do(copy))
        assert status in (0, -signal.SIGKILL)
        for number in manifest.versions(copy):  # whatever is visible can be read
            version = manifest.read(copy, number)
            assert number in before or number == before[-1] + 1
            assert version.counts["kept"] <= version.counts["seen"]
            for shard in version.shards:
                assert len(stored(version, shard)) == shard.samples
        told = do(copy)
        assert tree(copy) == tree(calm)
        if work == "remove":
            digests = {manifest.read(dataset, number).digest for number in before}
            assert set(told.held) <= digests and len(told.held) == len(before)
        shutil.rmtree(copy)
        if status == 0:
            break
        kills += 1
        step += rng.randrange(3, 12)
    assert kills > 3


def stored(version, shard):
    return list(shards.read_shard(version.url("shards", f"{shard.name}.tar")))


def test_what_no_version_lists_goes(dataset):
    listed = tree(dataset)
    stray = {
        "shards/train-0123456789abcdef.tar",
        "tables/train-0123456789abcdef.parquet",
        "encodings/words1/train-0123456789abcdef.safetensors",
        "encodings/words1/train-0123456789abcdef.rejected.json",
        "encodings/words1/train-0123456789abcdef.32x64.safetensors",
        "selections/train-0123456789abcdef-0123456789abcdef.json",
        "inputs/000007.parquet",
    }
    for path in stray:
        storage.publish_bytes(storage.join(dataset, path), b"12345")
    would = versions.gc(dataset, dry_run=True)
    assert (set(would.files), would.bytes) == (stray, 5 * len(stray))
    assert tree(dataset).keys() == listed.keys() | stray
    assert versions.gc(dataset) == would
    assert tree(dataset) == listed
    assert versions.gc(dataset).files == ()


def test_old_versions_expire(dataset, tmp_path):
    first = manifest.read(dataset, 1)
    rules = IngestRules(shard_samples=8, min_side=22, heldout_share=0.3, max_side=16)
    newest = ingest([str(tmp_path / "in")], dataset, rules).manifest
    would = versions.gc(dataset, keep=1, dry_run=True)
    assert (would.expired, manifest.read(dataset, 1)) == ((1, 2), first)
    assert versions.gc(dataset, keep=1) == would
    assert set(os.listdir(Path(dataset) / "shards")) == {f"{s.name}.tar" for s in newest.shards}
    tables = [manifest.read(dataset, number).inputs for number in (1, 2, 3)]
    assert set(os.listdir(Path(dataset) / "inputs")) == {f"{name}.parquet" for name in tables}
    old = manifest.read(dataset, 1)
    assert (old.digest, old.shards, old.redacted["expired"]) == (first.digest, (), True)
    assert loaded(newest) == kept(newest)
    assert outcomes.explain(dataset, "5.png")[0]["version"] == 1
    assert versions.gc(dataset, keep=1).files == ()
    # What it held is gone, and what it was is not: models learnt from it.
    removal = versions.remove(dataset, [key(picture(5))])
    assert removal.held.keys() >= {first.digest, newest.digest}


# ---- compaction -------------------------------------------------------------------------------


GROWING = replace(RULES, shard_samples=32)


@pytest.fixture
def grown(tmp_path):
    """A data set that grew six times by a few pictures, wide and high ones too, some filtered."""
    dataset = str(tmp_path / "grown")
    for night in range(6):
        place = tmp_path / f"night{night}"
        url = folder(place, range(100 * night, 100 * night + 11))
        for name, size in (("wide.png", (40, 24)), ("high.png", (24, 44))):
            Image.open(place / f"{100 * night}.png").resize(size).save(place / name)
            with open(place / "captions.jsonl", "a") as file:
                # the same words every night: a caption that several shards have
                file.write(json.dumps({"file": name, "caption": name[:4]}) + "\n")
        ingest([url], dataset, GROWING)
    last = manifest.latest(dataset)
    assert last is not None
    return last


@pytest.mark.parametrize("specs", [SPECS, BUCKETED], ids=["squares and words", "buckets and views"])
def test_small_shards_become_few_with_the_same_samples(grown, specs):
    before = contents(grown, encoded(grown, specs))
    after = versions.compact(grown.dataset)
    assert contents(after, nothing_to_encode(after, specs)) == before
    assert len(after.shards) < len(grown.shards) / 2
    small = [shard for shard in after.shards if 2 * shard.samples <= GROWING.shard_samples]
    assert len(small) <= 2 * 2, "at most one of each split, chosen or not"
    assert after.counts == grown.counts and after.samples() == grown.samples()
    assert (after.version, after.parent) == (grown.version + 1, grown.version)
    assert by_key(after) == by_key(grown)
    assert kept(after) == set(before)
    assert versions.compact(grown.dataset) == after
    versions.gc(grown.dataset, keep=1)
    assert contents(after, nothing_to_encode(after, specs)) == before
    wanted = {f"{shard.name}.tar" for shard in after.shards}
    assert set(os.listdir(Path(grown.dataset) / "shards")) == wanted


def test_so_many_are_merged_at_once_as_may_be_open(grown, monkeypatch):
    before = contents(grown, encoded(grown, SPECS))
    monkeypatch.setattr(versions, "_TOGETHER", 2)
    opened, most, read = [], [], shards.read_shard

    def counted(url):
        opened.append(url)
        most.append(len(opened))
        try:
            yield from read(url)
        finally:
            opened.remove(url)

    monkeypatch.setattr(shards, "read_shard", counted)
    after = versions.compact(grown.dataset)
    assert max(most) == 2
    assert contents(after, nothing_to_encode(after, SPECS)) == before
    small = [shard for shard in after.shards if 2 * shard.samples <= GROWING.shard_samples]
    assert len(small) <= 2 * 2
    assert (after.version, after.parent) == (grown.version + 1, grown.version)
    assert versions.compact(grown.dataset) == after


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_full_by_its_bytes_is_not_small(grown, size):
    """Of few large pictures, a shard of which is full with few samples."""
    rules = {**grown.rules, "shard_bytes": size * max(shard.bytes for shard in grown.shards)}
    manifest.publish(replace(grown, version=grown.version + 1, rules=rules))
    after = versions.compact(grown.dataset)
    assert len({it.split for it in after.shards}) == len({it.split for it in grown.shards})
    assert all(it.bytes <= rules["shard_bytes"] for it in after.shards)
    assert versions.compact(grown.dataset) == after


def test_rows_that_an_encoder_refused_stay_refused(grown):
    def some_not(spec):
        def encoder(pixels):
            rows = pixels.astype(np.float32).mean((2, 3))
            rows[rows[:, 0] < 100] = np.nan
            return {"moments": rows}

        return encoder

    spec = EncoderSpec("some", "image", "some1", side=8)
    whole = {"some": encode(grown, [spec], some_not, Executor(), max_rejected_share=1)["some"]}
    before = contents(grown, whole)
    assert 5 < len(before) < grown.samples()
    after = versions.compact(grown.dataset)
    assert contents(after, nothing_to_encode(after, [spec])) == before


def test_scores_go_along(grown):
    def brightness(spec):
        return lambda pixels, _: {"bright": pixels.mean((1, 2, 3)).astype(np.float32)}

    def scored(version):
        found = {}
        for shard in version.shards:
            keys = shards.read_table(version.dataset, shard.name, ["key"])["key"].to_pylist()
            level = read_scores(version.dataset, shard.name, ["b1"])["bright"]
            found |= dict(zip(keys, level.tolist(), strict=True))
        return found

    score(grown.dataset, grown.shards, [ScorerSpec("bright", "b1", ("bright",), side=4)],
          brightness, Executor())  # fmt: skip
    before = scored(grown)
    after = versions.compact(grown.dataset)
    assert scored(after) == before
    gone = sorted(before)[3]
    left = versions.remove(grown.dataset, [gone]).manifest
    assert scored(left) == {key: level for key, level in before.items() if key != gone}


def test_growth_goes_on_from_a_compacted_version(grown, tmp_path):
    compacted = versions.compact(grown.dataset)
    more = ingest([folder(tmp_path / "more", range(900, 910))], grown.dataset, GROWING)
    assert more.manifest.parent == compacted.version
    assert kept(more.manifest) > kept(compacted)
    rules = replace(GROWING, min_side=25)
    chosen = ingest([str(tmp_path / "more")], grown.dataset, rules).manifest
    assert kept(chosen) == {
        it["key"] for it in by_key(more.manifest).values() if it["key"] in kept(chosen)
    }
    assert 0 < chosen.samples() < more.manifest.samples()


def test_no_data_set_is_said(tmp_path):
    for work in (versions.gc, versions.compact, lambda url: versions.remove(url, ["ab" * 16])):
        with pytest.raises(ValueError, match="no data set there"):
            work(str(tmp_path / "nothing"))
