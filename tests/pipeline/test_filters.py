"""Rules give reasons; captions come out as one clean line."""

import pytest

from pipeline.filters import (
    SelectionRules,
    aspect,
    caption_length,
    clean_caption,
    first_reason,
    language,
    score,
    too_small,
)


def scores(width, height):
    longest, shortest = max(width, height), min(width, height)
    return {
        "original_width": width,
        "original_height": height,
        "aspect": longest / shortest,
    }


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "too_small"),
        ((1, 20000), "aspect"),
        ((20000, 1), "aspect"),
        ((16, 48), None),
        ((16, 49), "aspect"),
        ((15, 16), "too_small"),
        ((16, 16), None),
    ],
)
def test_reasons(size, reason):
    assert first_reason((aspect(3.0), too_small(16)), scores(*size)) == reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("cat", "caption_short"),
        ("a cat", None),
        ("a cat on a mat", None),
        ("a cat on a mat!", "caption_long"),
    ],
)
def test_length_of_captions(caption, reason):
    assert caption_length(5, 14)({"caption": caption}) == reason
    assert caption_length(0)({"caption": caption}) is None


def test_language_of_captions():
    english = {"caption": "a dog runs along the beach while the sun goes down behind the hills"}
    german = {
        "caption": "ein Hund rennt am Strand entlang, während die Sonne hinter den Hügeln versinkt"
    }
    assert language(["en"])(english) is None
    assert language(["en"])(german) == "language"
    assert language(["en", "de"])(german) is None


@pytest.mark.parametrize(
    ("value", "bounds", "reason"),
    [
        (0.3, (0.2, None), None),
        (0.1, (0.2, None), "likeness"),
        (0.1, (None, 0.2), None),
        (0.3, (None, 0.2), "likeness"),
        (float("nan"), (0.2, 0.3), None),
    ],
)
def test_bounds_of_a_score(value, bounds, reason):
    assert score("likeness", *bounds)({"likeness": value}) == reason


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_aspect": 0.5}, "max_aspect must be at least 1"),
        ({"min_side": -1}, "min_side must be at least 0"),
        ({"near_duplicates": True}, "one of keep, apart, drop, got True"),
        ({"languages": ["english"]}, "got 'english', wanted ISO 639-1 codes"),
        ({"scores": {"nsfw": 0.3}}, "scores.nsfw: got 0.3, wanted .least, most."),
        ({"scores": {"nsfw": (0.3, 0.1)}}, "scores.nsfw"),
    ],
)
def test_rules_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        SelectionRules(**wrong)


@pytest.mark.parametrize(
    ("raw", "clean", "flags"),
    [
        ("a cat", "a cat", ()),
        ("  a \n\t cat ", "a cat", ()),
        ("cafe\u0301", "café", ()),
        ("a\x00b\x1b[31mred\x1b[0m", "a b [31mred [0m", ()),
        ("\u202egnp.exe\u202c", "gnp.exe", ()),
        ("قطة سوداء", "قطة سوداء", ()),
        ("👩\u200d🚀 takes off", "👩\u200d🚀 takes off", ()),
        ("half \ud83d", "half \ufffd", ("caption_replaced",)),
        ("caf\ufffd", "caf\ufffd", ("caption_replaced",)),
        (" \x00\n", "", ()),
        ("\u200e\u200b", "", ()),
        ("", "", ()),
        ("0123456789", "01234567", ("caption_cut",)),
        ("012345 78", "012345 7", ("caption_cut",)),
        ("0123456 8", "0123456", ("caption_cut",)),
        ("x" * 10_000_000, "x" * 8, ("caption_cut",)),
    ],
)
def test_clean_captions(raw, clean, flags):
    limit = 8 if "012345" in raw or "xx" in raw else 2000
    assert clean_caption(raw, limit) == (clean, flags)
    clean.encode("utf-8")


def test_cleaning_twice_changes_nothing():
    for raw in ("a  b\u0301 c", "\u1e9b\u0323", "x" * 30):
        once = clean_caption(raw, 20)[0]
        assert clean_caption(once, 20) == (once, ())
