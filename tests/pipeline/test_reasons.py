"""Every outcome can be asked for: the value and the bound, the picture that one is like, the
encoder that made nothing of it."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline import filters, reasons
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.filters import SelectionRules, told
from pipeline.ingest import IngestRules, Scorers, ingest
from pipeline.manifest import latest
from pipeline.outcomes import count, explain, read_batches
from pipeline.schema import EncoderSpec
from pipeline.score import ScorerSpec
from pipeline.versions import remove

RULES = IngestRules(
    min_side=20, min_caption=4, max_caption=40, near_duplicates="drop", heldout_share=0,
    scores={"brightness": (None, 200.0)}, max_rejected_share=0.9,
)  # fmt: skip


def picture(seed, width=40, height=40):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def data_of(image, format="PNG"):
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def brightness(spec):
    return lambda pixels, captions: {"brightness": pixels.mean((1, 2, 3)).astype(np.float32)}


SCORERS = Scorers((ScorerSpec("brightness", "b1", ("brightness",), side=4),), brightness)

ROWS = [
    ("plain.png", data_of(picture(1)), "a plain picture"),
    ("nan.png", data_of(picture(2)), "one that is too much for an encoder"),
    ("small.png", data_of(picture(3, 10, 30)), "a small one"),
    ("long.png", data_of(picture(4, 250, 50)), "a long one"),
    ("terse.png", data_of(picture(5)), "one"),
    ("wordy.png", data_of(picture(6)), 9 * "word " + "and more"),
    ("bright.png", data_of(Image.new("RGB", (30, 30), (250, 250, 250))), "a bright one"),
    ("copy.jpg", data_of(picture(1, 120, 120), "JPEG"), "another size and format"),
    ("same.png", data_of(picture(1)), "the same file"),
    ("broken.png", b"<html>404</html>", "no picture"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    home = tmp_path_factory.mktemp("reasons")
    folder = home / "in"
    folder.mkdir()
    with open(folder / "captions.jsonl", "w") as file:
        for name, data, caption in ROWS:
            (folder / name).write_bytes(data)
            file.write(json.dumps({"file": name, "caption": caption}) + "\n")
    url = str(home / "set")
    version = ingest([str(folder)], url, RULES, scorers=SCORERS).manifest
    wanted = picture(2).resize((8, 8))

    def build(spec):
        def encoder(pixels):
            means = pixels.astype(np.float32).mean((2, 3))
            far = np.abs(means - np.asarray(wanted, np.float32).mean((0, 1))).max(1)
            means[far.argmin()] = np.nan
            return {"means": means}

        return encoder

    spec = EncoderSpec("means", "image", "m1", side=8)
    encode(version, [spec, pixels_spec(8)], build, Executor(), max_rejected_share=0.5)
    return url


def asked(dataset, name):
    (it,) = explain(dataset, f"#{name}")
    return it


@pytest.mark.parametrize(
    ("name", "outcome", "reason", "detail"),
    [
        ("plain.png", "kept", "", ""),
        ("small.png", "filtered", "too_small", "shorter side 10 < 20"),
        ("long.png", "filtered", "aspect", "aspect ratio 5 > 4"),
        ("terse.png", "filtered", "caption_short", "caption of 3 characters < 4"),
        ("wordy.png", "filtered", "caption_long", "caption of 53 characters > 40"),
        ("bright.png", "filtered", "brightness", "brightness 250 > 200.0"),
    ],
)
def test_a_rule_tells_the_value_and_its_bound(dataset, name, outcome, reason, detail):
    it = asked(dataset, name)
    assert (it["outcome"], it["reason"], it["detail"]) == (outcome, reason, detail)
    assert it["shard"].startswith("train-")


def test_a_duplicate_names_the_picture_it_is_like(dataset):
    first = asked(dataset, "plain.png")
    copy, same = asked(dataset, "copy.jpg"), asked(dataset, "same.png")
    assert (copy["outcome"], copy["reason"]) == ("filtered", "near_duplicate")
    assert copy["detail"] == f"looks like {first['key']} ({first['id']})"
    assert (same["outcome"], same["reason"]) == ("duplicate", "caption_added")
    assert same["detail"] == f"same file as {first['id']}"


def test_one_of_another_split_names_the_picture_of_that_split(tmp_path):
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "captions.jsonl", "w") as file:
        for number in range(24):
            for end, format in (("png", "PNG"), ("jpg", "JPEG")):
                name = f"{number}.{end}"
                (tmp_path / "in" / name).write_bytes(data_of(picture(number, 80, 80), format))
                file.write(json.dumps({"file": name, "caption": f"{number} {end}"}) + "\n")
    rules = IngestRules(heldout_share=0.5)
    url = str(tmp_path / "set")
    assert ingest([str(tmp_path / "in")], url, rules).counts["filtered:other_split"] > 3
    apart = [it for it in explain(url, ".jpg") if it["reason"] == "other_split"]
    for it in apart:
        (first,) = explain(url, f"#{it['id'].rsplit('#')[1].replace('.jpg', '.png')}")
        assert it["detail"] == f"looks like {first['key']} ({first['id']})"
        assert first["split"] != it["split"]
    # what is shown of the picture that it is like goes with that picture
    (gone,) = explain(url, f"#{apart[0]['id'].rsplit('#')[1].replace('.jpg', '.png')}")
    remove(url, [gone["key"]], "asked for")
    (it,) = explain(url, apart[0]["id"])
    assert it["detail"] == "the picture that it looked like is there no more"


def test_a_rejected_row_says_what_was_seen(dataset):
    it = asked(dataset, "broken.png")
    assert (it["outcome"], it["reason"], it["shard"]) == ("rejected", "not_image", "")


def test_the_encoder_that_made_nothing_of_a_picture_is_named(dataset):
    it = asked(dataset, "nan.png")
    assert (it["outcome"], it["encoders"]) == (
        "kept",
        [{"encoder": "means", "fingerprint": "m1", "reason": "not_finite"}],
    )
    assert asked(dataset, "plain.png")["encoders"] == []
    version = latest(dataset)
    assert version is not None
    (refusal,) = reasons.refusals(version)
    assert refusal == reasons.Refusal("means", "m1", "not_finite", (it["key"],))
    assert count(read_batches(version)) == dict(version.counts), "it counts as kept"


def test_a_picture_that_rules_leave_out_is_no_encoders_matter(dataset):
    version = latest(dataset)
    assert version is not None and reasons.refusals(version)
    other = ingest(
        [*version.sources], dataset, replace(RULES, max_caption=20), scorers=SCORERS
    ).manifest
    try:
        assert asked(dataset, "nan.png")["reason"] == "caption_long"
        assert asked(dataset, "nan.png")["encoders"] == reasons.refusals(other) == []
    finally:
        ingest([*version.sources], dataset, RULES, scorers=SCORERS)


def test_words_for_a_language_and_for_a_score_below_its_bound():
    rules = SelectionRules(languages=("en", "fr"), scores={"clip": (0.25, None)})
    scores = {
        "caption": "ein Hund rennt am Strand entlang, während die Sonne versinkt",
        "clip": np.float32(0.12),
    }
    assert told("language", scores, rules) == "caption in de, wanted en or fr"
    assert told("clip", scores, rules) == "clip 0.12 < 0.25"
    assert told("near_duplicate", scores, rules) == ""


def test_every_rule_that_looks_at_one_sample_has_words():
    """A rule that is added without them would leave its rows unexplained."""
    rules = SelectionRules(
        min_side=50, max_aspect=1.5, min_caption=4, languages=("de",), scores={"nsfw": (None, 0.5)}
    )
    sample = {
        "caption": "a dog runs along the beach", "nsfw": 0.9, "aspect": 2.0,
        "original_width": 20, "original_height": 10,
    }  # fmt: skip
    found = {rule(sample) or rule({**sample, "caption": "a"}) for rule in rules.rules()}
    assert found == {"aspect", "too_small", "caption_short", "language", "nsfw"}
    assert all(told(reason, sample, rules) for reason in found)
    assert filters.first_reason(rules.rules(), sample) == "aspect"


def test_many_look_alikes_are_not_all_looked_for(dataset, monkeypatch):
    monkeypatch.setattr(reasons, "_AT_MOST", 0)
    assert asked(dataset, "copy.jpg")["detail"].startswith("looks like an earlier picture: ask")
