"""Every version can be made again from its manifest, whatever its sources have got since."""

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from pipeline import dedup, images, manifest, storage, versions
from pipeline.download import Downloader, DownloadRules
from pipeline.filters import SELECTING
from pipeline.ingest import NO_SCORERS, IngestRules, Scorers, ingest
from pipeline.outcomes import Rejected, read_outcomes
from pipeline.reproduce import reproduce, rules_of
from pipeline.score import ScorerSpec


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
    assert same(reproduce(version, str(tmp_path / "again")), version)


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
    three, five = tmp_path / "one" / "3.png", tmp_path / "one" / "5.png"
    os.remove(three)
    five.write_bytes((tmp_path / "two" / "33.png").read_bytes())
    gone = r"2 of 40 pictures .*one#3.png \(missing_file: .*one#5.png \(another picture now\)"
    with pytest.raises(ValueError, match=gone):
        reproduce(second, str(tmp_path / "again"))
    assert manifest.latest(str(tmp_path / "again")) is None
    (tmp_path / "one" / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"20 of 40 .*one#0.png \(no longer listed\)"):
        reproduce(second, str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("look", "look is '0000.*, was '"),
        ("bytes", "stored in other bytes, by another Pillow perhaps"),
        ("bytes, no tar", "its samples are stored in other bytes"),
        ("note", "noted of it is {.*'format': 'WEBP'.*, was {.*'format': 'PNG'"),
    ],
)
def test_a_shard_that_comes_out_otherwise_says_where(what, said, grown, tmp_path, monkeypatch):
    first, store, decode = manifest.read(grown, 1), images.store, images.decode

    def other_bytes(*given):
        image, data, ext = store(*given)
        return image, data + b"\0", ext

    def other_note(*given):
        image, info = decode(*given)
        return image, {**info, "format": "WEBP"}

    with monkeypatch.context() as patch:
        if what == "look":
            patch.setattr(dedup, "looks", lambda thumbnails: ["0" * 22 for _ in thumbnails])
        elif what == "note":
            patch.setattr(images, "decode", other_note)
        else:
            patch.setattr(images, "store", other_bytes)
        if "no tar" in what:  # nothing else needs one
            shutil.rmtree(f"{grown}/shards")
        with pytest.raises(ValueError, match=rf"shard train-.* came out as .*{said}"):
            reproduce(first, str(tmp_path / "again"))
    assert manifest.latest(str(tmp_path / "again")) is None
    again = reproduce(first, str(tmp_path / "again"))
    assert again.shards == first.shards


def same(made, version, redacted=False):
    """Whether a version is another one to the byte: its shards, their tables, its rows."""
    assert made.shards == version.shards and made.inputs == version.inputs
    assert dict(made.counts) == dict(version.counts) and not made.redacted
    assert redacted or made.digest == version.digest
    for shard in version.shards:
        for folder, end in (("shards", "tar"), ("tables", "parquet")):
            one, other = (it.url(folder, f"{shard.name}.{end}") for it in (made, version))
            assert storage.read_bytes(one) == storage.read_bytes(other)
        assert made.dropped(shard) == version.dropped(shard)
    return True


def test_after_a_take_down_what_is_left_is_made_again_and_later_versions_are(grown, tmp_path):
    first = read_outcomes(manifest.read(grown, 1))
    keys = [it["key"] for it in first[3:6]]
    versions.remove(grown, keys)
    rules = IngestRules(shard_samples=16, min_heldout=4, max_side=16)
    more = add(tmp_path / "three", range(60, 70))
    newest = ingest([more], grown, rules).manifest
    assert (newest.version, newest.counts["kept"]) == (8, 40 - 3 + 10)
    copy = reproduce(newest, str(tmp_path / "again"))
    assert same(copy, newest)
    for number in (1, 2, 5, 6):  # what is left of those that held them
        redacted = manifest.read(grown, number)
        made = reproduce(redacted, str(tmp_path / f"again{number}"))
        assert same(made, redacted, redacted=True) and made.digest != redacted.digest
    # and they do not come back there
    again = add(tmp_path / "four", [33, 34, 35, 71])
    counts = [ingest([again], it, rules).counts for it in (newest.dataset, copy.dataset)]
    assert counts[0] == counts[1] and counts[0]["rejected:removed"] == 3 + 3


def test_what_was_left_though_it_looks_the_same_is_made_again(tmp_path):
    dataset, rules = str(tmp_path / "data"), IngestRules(heldout_share=0)
    url = add(tmp_path / "in", range(6))
    one = tmp_path / "in" / "3.png"
    (tmp_path / "in" / "again.png").write_bytes(one.read_bytes() + b"\0")
    with open(tmp_path / "in" / "captions.jsonl", "a") as table:
        table.write(json.dumps({"file": "again.png", "caption": "the same look"}) + "\n")
    ingest([url], dataset, rules)
    removal = versions.remove(dataset, [dedup.key(one.read_bytes())])
    assert len(removal.alike) == 1
    assert same(reproduce(removal.manifest, str(tmp_path / "again")), removal.manifest)


def test_a_take_down_that_was_killed_is_finished_first(grown, tmp_path):
    version = manifest.read(grown, 2)
    key = read_outcomes(version)[0]["key"]
    gone = {key: {"reason": "", "time": ""}}
    storage.publish_json(f"{grown}/blocked.json", gone)
    with pytest.raises(ValueError, match=rf"still has {key}, which is blocked.*darkroom remove"):
        reproduce(version, str(tmp_path / "again"))


def test_what_gc_keeps_is_made_again_and_what_expired_says_so(grown, tmp_path):
    newest = manifest.latest(grown)
    versions.gc(grown, keep=1)
    assert same(reproduce(newest, str(tmp_path / "again")), newest)
    with pytest.raises(ValueError, match=r"version 2: .*let it expire"):
        reproduce(manifest.read(grown, 2), str(tmp_path / "two-again"))


def test_a_set_that_only_grew_is_made_again_when_gc_has_kept_its_newest_version(tmp_path):
    dataset, rules = str(tmp_path / "data"), IngestRules(shard_samples=8, min_heldout=4)
    for start in (0, 12, 24):
        url = add(tmp_path / "in", range(start, start + 12))
        newest = ingest([url], dataset, rules).manifest
    versions.gc(dataset, keep=1)
    assert same(reproduce(newest, str(tmp_path / "again")), newest)


def test_copies_written_at_another_time_will_do(grown, tmp_path):
    version = manifest.read(grown, 6)
    for path in (tmp_path / "one", tmp_path / "two"):
        for file in path.iterdir():
            os.utime(file, (7, 7))
    assert same(reproduce(version, str(tmp_path / "again")), version)


def test_captions_of_a_version_stay_its_own(tmp_path):
    """Added later, or changed in the source since; held-out ones did not join."""
    folder, dataset = tmp_path / "in", str(tmp_path / "data")
    url, rules = add(folder, range(30)), IngestRules(heldout_share=0.4, shard_samples=8)
    ingest([url], dataset, rules)
    with open(folder / "captions.jsonl", "a") as table:
        for number in range(30):
            for said in ("again", "once more"):
                row = {"file": f"{number}.png", "caption": f"{said} {number}"}
                table.write(json.dumps(row) + "\n")
    version = ingest([url], dataset, rules).manifest
    for reason in ("caption_added", "caption_of_other_split"):
        assert version.counts[f"duplicate:{reason}"] > 10
    names = [json.dumps({"file": f"{n}.png", "caption": "otherwise"}) for n in range(30)]
    (folder / "captions.jsonl").write_text("\n".join(names))
    assert same(reproduce(version, str(tmp_path / "again")), version)


def a_tar(folder):
    with tarfile.open(folder / "in.tar", "w") as tar:
        for number in range(24):
            add(folder / "raw", [number])
            for end, data in (
                ("png", (folder / "raw" / f"{number}.png").read_bytes()),
                ("txt", f"number {number}".encode()),
            ):
                member = tarfile.TarInfo(f"{number:03}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(folder / "in.tar")


def hashed(folder):
    """A table whose rows say what their files hash to."""
    add(folder, range(24))
    rows = map(json.loads, (folder / "captions.jsonl").read_text().splitlines())
    said = [
        row | {"sha256": hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest()}
        for row in rows
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, said)))
    return str(folder)


@pytest.mark.parametrize("kind", ["a scorer's rule", "tar", "urls", "hashes"])
def test_a_version_of_any_source_and_rule_comes_out_the_same(kind, tmp_path, gallery):
    rules = IngestRules(shard_samples=8, min_heldout=4, min_side=18)
    scorers = NO_SCORERS
    if kind == "tar":
        url = a_tar(tmp_path)
    elif kind == "hashes":
        url = hashed(tmp_path / "in")
    elif kind == "urls":
        url = gallery.table(tmp_path / "table.jsonl", 24)
        rules = replace(rules, download=DownloadRules(private_hosts=(gallery.host,)))
    else:
        url = add(tmp_path / "in", range(24))
        scorers = Scorers((ScorerSpec("level", "level1", ("level",), side=4),), levels)
        rules = replace(rules, scores={"level": (127.0, None)})
    version = ingest([url], str(tmp_path / "data"), rules, scorers=scorers).manifest
    version = ingest([url], version.dataset, replace(rules, max_aspect=3), scorers=scorers).manifest
    versions.compact(version.dataset)
    version = manifest.latest(version.dataset)
    if kind == "tar":
        os.utime(tmp_path / "in.tar", (7, 7))
    if scorers.specs:
        assert 4 < version.counts["filtered:level"] < 20
    made = reproduce(version, str(tmp_path / "again"))
    assert same(made, version)
    # what grows on it grows as on the first
    if kind == "urls":
        gallery.table(tmp_path / "table.jsonl", 30)
        more = replace(rules, max_aspect=3)
        one, other = (ingest([url], it.dataset, more).manifest for it in (version, made))
        assert one.digest == other.digest and one.counts == other.counts


def test_what_was_out_of_reach_is_asked_for_again_and_nothing_else(tmp_path, gallery, monkeypatch):
    url = gallery.table(tmp_path / "table.jsonl", 40)
    rules = IngestRules(download=DownloadRules(private_hosts=(gallery.host,), retries=0))
    version = ingest([url], str(tmp_path / "data"), rules).manifest
    gallery.taken()
    fetch = Downloader._fetch

    def one_away(self, url, share):
        if url.endswith("/7.png"):
            raise Rejected("unreachable", "no answer")
        return fetch(self, url, share)

    with monkeypatch.context() as patch:
        patch.setattr(Downloader, "_fetch", one_away)
        with pytest.raises(ValueError, match=r"1 of 40 .*/7.png \(unreachable: "):
            reproduce(version, str(tmp_path / "again"))
    assert gallery.taken() == [n for n in range(40) if n != 7]
    assert same(reproduce(version, str(tmp_path / "again")), version)
    assert gallery.taken() == [7]


def test_a_version_of_which_nothing_is_left_is_made_again(tmp_path):
    dataset = str(tmp_path / "data")
    version = ingest([add(tmp_path / "in", range(3))], dataset).manifest
    versions.remove(dataset, [it["key"] for it in read_outcomes(version)])
    empty = manifest.latest(dataset)
    assert same(reproduce(empty, str(tmp_path / "again")), empty)


def levels(spec):
    return lambda pixels, _: {"level": pixels.mean((1, 2, 3)).astype(np.float32)}


def test_one_that_was_killed_is_made_by_the_next_call(grown, tmp_path, killed_at):
    version, step = manifest.read(grown, 5), 0
    calm = reproduce(version, str(tmp_path / "calm"))
    while True:
        again = str(tmp_path / f"again{step}")
        status = killed_at(step, lambda again=again: reproduce(version, again))
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        if manifest.latest(again) is None:
            reproduce(version, again)
        assert same(manifest.latest(again), calm)
        step += 4
    assert step > 12
