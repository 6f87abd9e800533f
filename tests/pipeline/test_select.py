"""Other rules are another version of the same shards, and no picture is read for it."""

import io
import itertools
import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline import dedup, images, manifest, outcomes, shards
from pipeline.decide import uniform
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, Scorers, ingest, unchanged
from pipeline.load import Loader
from pipeline.score import ScorerSpec, read_scores

LOCAL = Executor()


def picture(seed, width=24, height=24, format="PNG", **options):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.save(out, format, **options)
    return out.getvalue()


@pytest.fixture
def source(tmp_path):
    """A function that adds (file, bytes, caption) rows to a folder and returns the folder."""
    folder = tmp_path / "in"
    folder.mkdir()

    def add(rows):
        with open(folder / "captions.jsonl", "a") as file:
            for name, data, caption in rows:
                (folder / name).write_bytes(data)
                os.utime(folder / name, (1, 1))
                file.write(json.dumps({"file": name, "caption": caption}) + "\n")
        return str(folder)

    return add


def sizes(count=40):
    """Pictures of 20 to 59 pixels, each with a caption of its own."""
    return [(f"{i}.png", picture(i, 20 + i, 20 + i), f"number {i}") for i in range(count)]


def chosen(version):
    """Keys that a loader of all splits gives in one epoch."""
    splits = tuple({shard.split for shard in version.split()})
    encodings = encode(version, [pixels_spec(8)], None, LOCAL)
    loader = Loader(version, [*encodings.values()], splits=splits, global_batch=1, seed=0)
    keys = [loader.batch(step)["key"][0] for step in range(loader.samples)]
    assert len(set(keys)) == len(keys)
    return set(keys)


def kept(version):
    return {it["key"] for it in outcomes.read_outcomes(version) if it["outcome"] == "kept"}


def no_reading(*_):
    raise AssertionError("a picture was read")


def test_other_thresholds_read_no_picture_and_share_the_shards(source, tmp_path, monkeypatch):
    url, dataset = source(sizes()), str(tmp_path / "out")
    first = ingest([url], dataset, IngestRules(min_side=30, shard_samples=8))
    assert (first.counts["kept"], first.counts["filtered:too_small"]) == (30, 10)
    monkeypatch.setattr(images, "decode", no_reading)
    second = ingest([url], dataset, IngestRules(min_side=40, shard_samples=8))
    third = ingest([url], dataset, IngestRules(min_side=25, shard_samples=8))
    back = ingest([url], dataset, IngestRules(min_side=30, shard_samples=8))
    assert (second.counts["kept"], third.counts["kept"]) == (20, 35)
    assert [it.counts["seen"] for it in (first, second, third, back)] == [40] * 4
    assert [it.manifest.version for it in (first, second, third, back)] == [1, 2, 3, 4]
    names = [shard.name for shard in first.manifest.shards]
    for it in (second, third, back):
        assert [shard.name for shard in it.manifest.shards] == names
    assert back.manifest.digest == first.manifest.digest
    assert len({it.manifest.digest for it in (first, second, third)}) == 3
    monkeypatch.undo()
    for it in (first, second, third):
        assert chosen(it.manifest) == kept(it.manifest)
        assert it.manifest.samples() == it.counts["kept"]


def test_what_is_filtered_from_the_start_is_never_encoded(source, tmp_path):
    url, dataset = source(sizes()), str(tmp_path / "out")
    version = ingest([url], dataset, IngestRules(min_side=30, shard_samples=8)).manifest
    encoding = encode(version, [pixels_spec(8)], None, LOCAL)["pixels"]
    done = {file.name for file in (tmp_path / "out" / "encodings").rglob("*.safetensors")}
    assert len(version.split()) < len(version.shards)
    assert len(done) == len(version.split()) and encoding.name == "pixels"


def test_what_was_kept_stays_when_more_comes(source, tmp_path):
    url, dataset = source(sizes(20)), str(tmp_path / "out")
    rules = IngestRules(min_side=25, shard_samples=8)
    first = ingest([url], dataset, rules)
    second = ingest([source(sizes()[20:])], dataset, rules)
    assert kept(first.manifest) < kept(second.manifest)
    assert second.manifest.shards[: len(first.manifest.shards)] == first.manifest.shards
    assert (second.new, second.counts["filtered:too_small"]) == (20, 5)


def look_alikes():
    """20 pictures, and a re-encoded copy of each under another caption."""
    for i in range(20):
        data, out = picture(i, 120, 120), io.BytesIO()
        Image.open(io.BytesIO(data)).save(out, "JPEG", quality=90)
        yield f"{i}.png", data, f"number {i}"
        yield f"{i}.jpg", out.getvalue(), f"a copy of {i}"


@pytest.mark.parametrize("rule", ["keep", "apart", "drop"])
def test_pictures_that_look_the_same(rule, source, tmp_path):
    url, dataset = source(look_alikes()), str(tmp_path / "out")
    rules = IngestRules(near_duplicates=rule, heldout_share=0.5)
    version = ingest([url], dataset, rules).manifest
    found = {it["id"].rsplit("#")[-1]: it for it in outcomes.read_outcomes(version)}
    reasons = Counter(it["reason"] for it in found.values() if it["outcome"] == "filtered")
    pairs = [(found[f"{i}.png"], found[f"{i}.jpg"]) for i in range(20)]
    straddling = sum(first["split"] != copy["split"] for first, copy in pairs)
    assert 3 < straddling < 17
    if rule != "apart":
        assert all(first["outcome"] == "kept" for first, _ in pairs)
    assert (
        reasons
        == {
            "keep": {},
            "apart": {"other_split": straddling},
            "drop": {"near_duplicate": 20},
        }[rule]
    )
    if rule == "apart":
        for one, other in pairs:
            kept = {it["split"] for it in (one, other) if it["outcome"] == "kept"}
            assert len(kept) == 1, "one of the two stays, or both in one split"


@pytest.mark.parametrize(("rule", "reason"), [("apart", "other_split"), ("drop", "near_duplicate")])
def test_look_alikes_are_known_across_growth_and_by_other_rules(rule, reason, source, tmp_path):
    every = list(look_alikes())
    rules = IngestRules(near_duplicates=rule, heldout_share=0.5, min_heldout=0)
    at_once = ingest([source(every)], str(tmp_path / "once"), rules)
    other = IngestRules(near_duplicates="keep", heldout_share=0.5, min_heldout=0)
    ingest([source([])], str(tmp_path / "other"), other)
    refiltered = ingest([source([])], str(tmp_path / "other"), rules)
    (tmp_path / "in" / "captions.jsonl").unlink()
    ingest([source(every[:21])], str(tmp_path / "grown"), rules)
    grown = ingest([source(every[21:])], str(tmp_path / "grown"), rules)
    assert kept(at_once.manifest) == kept(refiltered.manifest)
    if rule == "drop":
        assert kept(at_once.manifest) == kept(grown.manifest)
    assert grown.counts[f"filtered:{reason}"] == at_once.counts[f"filtered:{reason}"] > 3


def chained():
    """Three pictures of which the second looks the same as the first and as the third, which do
    not: six of the 64 signs of their looks differ."""
    signs = np.random.default_rng(5).choice([-6, 6], (8, 8))
    for rows in ((), (0, 1, 2), range(6)):
        levels = np.full((8, 9), 128)
        signs_now = signs.copy()
        signs_now[list(rows), -1] *= -1
        levels[:, 1:] += signs_now.cumsum(1)
        pixels = np.repeat(levels.astype(np.uint8).repeat(8, 0).repeat(8, 1)[..., None], 3, 2)
        yield images.encode(Image.fromarray(pixels), "png")


def captions_of(splits):
    """Captions that stand in these splits, "t" or "h", where half are held out."""
    places = ((f"said {n}", uniform("heldout", f"said {n}")) for n in range(1000))
    said = {True: [], False: []}
    for text, place in places:
        said[place < 0.5].append(text)
    return [said[split == "h"].pop() for split in splits]


def cross(version):
    """The pairs of kept pictures that look the same and stand in two splits."""
    rows = []
    for shard in version.shards:
        out = version.dropped(shard)
        table = shards.read_table(version.dataset, shard.name, ["look"])["look"].to_pylist()
        rows += [(look, shard.split) for row, look in enumerate(table) if row not in out]
    looks = dedup.parsed(bytes.fromhex("".join(look for look, _ in rows)))
    alike = [np.flatnonzero(dedup.alike(looks[np.array([at])], looks)) for at in range(len(rows))]
    return [(a, b) for a, near in enumerate(alike) for b in near if rows[a][1] != rows[b][1]]


@pytest.mark.parametrize("splits", ["tht", "thh", "hth"])
def test_a_chain_of_look_alikes_is_cut_between_the_splits(splits, source, tmp_path):
    """Whatever the order of its pictures; and whatever it was, growth and other rules later take
    nothing back."""
    pictures, said = list(chained()), captions_of(splits + "tthh")
    looks = dedup.parsed(bytes.fromhex("".join(map(look_of, pictures))))
    pairs = [(0, 1), (1, 2), (0, 2)]
    assert [bool(dedup.alike(looks[np.array([a])], looks[np.array([b])])[0]) for a, b in pairs] == [
        True, True, False,
    ]  # fmt: skip
    rules = IngestRules(heldout_share=0.5, min_heldout=0)
    filler = [(f"f{n}.png", picture(n), text) for n, text in enumerate(said[3:])]
    chain = [(f"{n}.png", data, said[n]) for n, data in enumerate(pictures)]
    decided = set()
    for number, order in enumerate(itertools.permutations(chain)):
        table = tmp_path / "in" / "captions.jsonl"
        once = ingest([source([*filler, *order])], str(tmp_path / f"once{number}"), rules).manifest
        assert cross(once) == [] and once.counts["filtered:other_split"] in (1, 2)
        decided.add(frozenset(kept(once)))
        table.unlink()
        dataset, stood, grown = str(tmp_path / f"grown{number}"), set(), None
        for some in ([*filler, order[0]], [order[1]], [order[2]]):
            grown = ingest([source(some)], dataset, rules).manifest
            assert cross(grown) == [] and kept(grown) >= stood
            stood = kept(grown)
        assert dedup.key(order[0][1]) in stood
        refiltered = ingest([source([])], dataset, replace(rules, min_side=17)).manifest
        assert kept(refiltered) == stood and refiltered.digest == grown.digest
        table.unlink()
    assert len(decided) == 1


def look_of(data):
    image, _ = images.decode(data, images.DecodePolicy())
    return dedup.looks([dedup.thumbnail(image)])[0]


def test_captions_are_chosen_by_length_and_language(source, tmp_path):
    rows = [
        ("a.png", picture(1), "a dog runs along the beach while the sun goes down"),
        ("b.png", picture(2), "ein Hund rennt am Strand entlang, während die Sonne versinkt"),
        ("c.png", picture(3), "dog"),
    ]
    url, dataset = source(rows), str(tmp_path / "out")
    rules = IngestRules(languages=("en",), min_caption=5, heldout_share=0)
    counts = ingest([url], dataset, rules).counts
    assert counts["kept"] == 1
    assert counts["filtered:language"] == counts["filtered:caption_short"] == 1


def test_a_score_without_a_scorer_is_refused(source, tmp_path):
    url, dataset = source(sizes(4)), str(tmp_path / "out")
    with pytest.raises(ValueError, match="the score 'nsfw', which no scorer gives"):
        ingest([url], dataset, IngestRules(scores={"nsfw": (None, 0.5)}))
    assert manifest.versions(dataset) == []
    assert ingest([url], dataset).counts["kept"] == 4


class Brightness:
    """Scores pictures by their mean level, and counts how many it saw."""

    def __init__(self):
        self.seen = 0

    def build(self, spec):
        def scorer(pixels, captions):
            self.seen += len(pixels)
            assert len(captions) == len(pixels) and pixels.shape[1:] == (3, 4, 4)
            return {"brightness": pixels.mean((1, 2, 3)).astype(np.float32)}

        return scorer

    def scorers(self, version="1"):
        return Scorers(
            (ScorerSpec("brightness", f"b{version}", ("brightness",), side=4),), self.build
        )


def test_the_scores_of_a_model_choose(source, tmp_path):
    url, dataset = source(sizes()), str(tmp_path / "out")
    model = Brightness()
    first = ingest([url], dataset, scorers=model.scorers())
    assert (first.counts["kept"], model.seen) == (40, 40)
    levels = {}
    for shard in first.manifest.shards:
        found = read_scores(dataset, shard.name, ["b1"])["brightness"]
        keys = shards.read_table(dataset, shard.name, ["key"])["key"].to_pylist()
        levels |= dict(zip(keys, found.tolist(), strict=True))
    middle = sorted(levels.values())[20]
    rules = IngestRules(scores={"brightness": (middle, None)})
    second = ingest([url], dataset, rules, scorers=model.scorers())
    assert (second.counts["kept"], second.counts["filtered:brightness"]) == (20, 20)
    assert kept(second.manifest) == {key for key, level in levels.items() if level >= middle}
    assert model.seen == 40, "no picture is scored again"
    assert ingest([url], dataset, rules, scorers=model.scorers()).reused
    assert unchanged([url], dataset, rules, model.scorers()) == second.manifest
    assert unchanged([url], dataset, rules) is None
    third = ingest([url], dataset, rules, scorers=model.scorers("2"))
    assert (third.manifest.version, third.manifest.digest) == (3, second.manifest.digest)
    assert model.seen == 80, "another scorer scores all"


def test_what_comes_later_is_scored_then(source, tmp_path):
    url, dataset = source(sizes(20)), str(tmp_path / "out")
    model, rules = Brightness(), IngestRules(scores={"brightness": (None, 127.0)})
    first = ingest([url], dataset, rules, scorers=model.scorers())
    second = ingest([source(sizes()[20:])], dataset, rules, scorers=model.scorers())
    assert model.seen == 40
    assert kept(first.manifest) < kept(second.manifest)
    assert 0 < second.counts["filtered:brightness"] < 40
