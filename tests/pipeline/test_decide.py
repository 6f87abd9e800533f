"""The first row of a picture stays, captions keep to their split, and growth moves no pair."""

import numpy as np
import pytest

from pipeline.decide import (
    CAPTION_ADDED,
    CAPTION_OF_OTHER_SPLIT,
    HELDOUT,
    KEPT,
    KNOWN,
    REJECTED,
    SAME_PICTURE,
    TRAIN,
    UNSEEN,
    Holding,
    decide,
    duplicates,
    first_holding,
    of_split,
    uniform,
)
from pipeline.rows import Lines, Positions, names_of_keys, read_lines

ALL = np.ones(1000)


def names(*numbers):
    return names_of_keys(f"{number:032x}" for number in numbers)


def test_positions_are_those_of_the_first():
    found = Positions(names(7, 3, 7, 0, 256))
    assert found(names(7, 256, 1, 0, 3)).tolist() == [0, 4, -1, 3, 1]
    assert Positions(names())(names(1)).tolist() == [-1]


def test_names_that_end_in_zeros_are_names_too():
    ends = names_of_keys(["01" + "00" * 15, "0100" + "01" * 14, "00" * 16])
    assert Positions(ends)(ends).tolist() == [0, 1, 2]


def test_lines_are_read_in_any_order_and_in_pieces(tmp_path):
    lines = Lines(str(tmp_path))
    for number in range(5):
        lines.append(f'[{number}, "\u00e9"]'.encode())
    assert lines[3] == [3, "\u00e9"]
    lines.append(b"7")
    assert (lines[5], lines[0][0], len(lines)) == (7, 0, 6)
    url = str(tmp_path / "shared")
    lines.publish(url)
    lines.append(b"8")
    assert list(read_lines(url, **lines.place(4, 6))) == [[4, "\u00e9"], 7]
    assert lines.digest(0, 2) != lines.digest(1, 3)
    assert lines[6] == 8
    lines.close()


def test_the_first_of_a_picture_stays():
    outcome, first = duplicates(
        names(1, 2, 1, 3, 1, 2, 9, 9),
        np.array([0, 0, 0, 0, 0, 0, 1, 0], bool),  # the first 9 is broken
        np.array([0, 0, 0, 1, 0, 0, 0, 0], bool),
    )
    same = SAME_PICTURE
    assert outcome.tolist() == [KEPT, KEPT, same, KNOWN, same, same, REJECTED, KEPT]
    assert first.tolist() == [0, 1, 0, 3, 0, 1, 6, 7]


def test_captions_join_a_picture_of_their_split_only():
    holding = Holding(0.5)
    said = {
        0: [("a", 0.7, 1), ("held out", 0.2, 1), ("b", 0.9, 1)],
        1: [("a", 0.7, 1)],
        2: [("held out too", 0.1, 1), ("c", 0.6, 1)],
        3: [("held out", 0.2, 1)],
        4: [("d", 0.1, 1), ("a", 0.7, 1)],
    }
    outcome = np.array([KEPT, *[SAME_PICTURE] * 3, KEPT], np.uint8)
    first = np.array([0, 0, 0, 0, 4])
    splits = holding.splits(np.array([0.7, 0.7, 0.1, 0.2, 0.1]), ALL[:5])
    found = decide(outcome, first, splits, said.__getitem__, holding)
    assert found.captions == {0: ["a", "b", "c"]}
    added, other = CAPTION_ADDED, CAPTION_OF_OTHER_SPLIT
    assert found.outcome.tolist() == [KEPT, SAME_PICTURE, added, other, KEPT]
    assert found.split.tolist() == [TRAIN, TRAIN, TRAIN, TRAIN, HELDOUT]
    assert of_split(said[4], HELDOUT, holding) == ["d"]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_about_the_share_is_held_out(share):
    places = np.array([uniform("heldout", f"{n}") for n in range(4000)])
    holding = first_holding(places, np.ones(4000), share, 0.0, 16)
    assert holding == Holding(share)
    held = np.mean(holding.splits(places, np.ones(4000)) == HELDOUT)
    assert abs(held - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_a_small_start_holds_more_out_and_growth_does_not():
    places = np.array([uniform("heldout", f"{n}") for n in range(5000)])
    holding = first_holding(places[:64], ALL[:64], 0.1, 0.0, 16)
    start = holding.splits(places[:64], ALL[:64])
    assert np.sum(start == HELDOUT) == 16
    grown = holding.splits(places, np.ones(5000))
    assert np.array_equal(grown[:64], start)
    assert 0.08 < np.mean(grown[64:] == HELDOUT) < 0.12


def test_a_start_that_would_all_be_held_out_is_learnt_from():
    holding = first_holding(np.array([0.05, 0.02]), ALL[:2], 0.1, 0.0, 16)
    assert holding.splits(np.array([0.05, 0.02, 0.03, 0.5]), ALL[:4]).tolist() == [
        TRAIN, TRAIN, HELDOUT, TRAIN,
    ]  # fmt: skip


def test_shares_of_none_and_of_all():
    places = np.linspace(0, 0.99, 50)
    for share, split in ((0.0, TRAIN), (1.0, HELDOUT)):
        holding = first_holding(places, ALL[:50], share, 0.0, 16)
        assert set(holding.splits(places, ALL[:50]).tolist()) == {split}


def test_unseen_names_come_first():
    holding = Holding(0.5, (), 0.1)
    assert (holding.split(0.2, 0.05), holding.split(0.2, 0.1)) == (UNSEEN, HELDOUT)
    assert holding.splits(np.array([0.2, 0.2]), np.array([0.05, 0.1])).tolist() == [UNSEEN, HELDOUT]
