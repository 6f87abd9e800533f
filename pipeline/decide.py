"""One deterministic decision over all new rows: which are duplicates, and which split each is in.

Columns in, columns out; it depends on the rows and their order alone. A pair (caption, or caption
and style) is held out if it hashes below the limit, but for a few exceptions that the first version
made: a data set that starts small holds some more out, or fewer, so that there is something to
judge and something to learn from. Limit and exceptions stand in every version, so growth moves no
pair to another split.

Looks have no say in it, and no clusters of look-alikes are formed: those could not stay in their
split when a later picture joins two of them. What looks the same as a picture in another split is
left out afterwards instead (`select`, `other_split`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rows import Positions

SPLITS = ("", "train", "heldout", "unseen")
NONE, TRAIN, HELDOUT, UNSEEN = range(4)
OUTCOMES = (
    ("rejected", ""),
    ("kept", ""),
    ("duplicate", "known"),
    ("duplicate", "same_picture"),
    ("duplicate", "caption_added"),
    ("duplicate", "caption_of_other_split"),
)
REJECTED, KEPT, KNOWN, SAME_PICTURE, CAPTION_ADDED, CAPTION_OF_OTHER_SPLIT = range(6)


@dataclass(frozen=True)
class Holding:
    """Which pairs are held out, which names are unseen."""

    limit: float
    """Pairs that hash below it are held out."""
    exceptions: tuple[float, ...] = ()
    """Hashes of the pairs for which it is the other way round."""
    unseen_share: float = 0.0
    """Names that hash below it are unseen in any pair."""

    def split(self, place: float, unseen: float) -> int:
        """Of a caption: the hashes of its pair and of its name (1 where it has none)."""
        if unseen < self.unseen_share:
            return UNSEEN
        return HELDOUT if (place < self.limit) != (place in self.exceptions) else TRAIN

    def splits(self, places: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        """`split` of many captions."""
        held = (places < self.limit) != np.isin(places, self.exceptions)
        return np.where(unseen < self.unseen_share, UNSEEN, np.where(held, HELDOUT, TRAIN))

    def stated(self) -> dict[str, Any]:
        return {"heldout_limit": self.limit, "heldout_exceptions": list(self.exceptions)}


def first_holding(
    places: np.ndarray, unseen: np.ndarray, share: float, unseen_share: float, least: int
) -> Holding:
    """What the first version of a data set holds out, by the hashes of its rows that are wanted.

    About `share` of all pairs; more of them where that leaves fewer than `least` rows, up to a
    quarter of all; none of those that are there where all of them would be.
    """
    open_places, counts = np.unique(places[unseen >= unseen_share], return_counts=True)
    if share == 1 or not len(open_places):
        return Holding(share, (), unseen_share)
    held = int(counts[open_places < share].sum())
    if open_places[-1] < share:  # so few pairs that nothing would be left to learn from
        return Holding(share, tuple(open_places.tolist()), unseen_share)
    total, exceptions = int(counts.sum()), list[float]()
    wanted = min(least, total // 4) if share else 0
    start = int(np.searchsorted(open_places, share))
    for place, count in zip(open_places[start:].tolist(), counts[start:].tolist(), strict=True):
        if held >= wanted or held + count > total // 2:
            break
        exceptions.append(place)
        held += count
    return Holding(share, tuple(exceptions), unseen_share)


@dataclass
class Decision:
    """What was decided of each row."""

    outcome: np.ndarray
    """Number of its `OUTCOMES`, uint8 [rows]."""
    split: np.ndarray
    """Number of its `SPLITS`, uint8 [rows]."""
    captions: Mapping[int, list[str]] = field(default_factory=dict[int, list[str]])
    """Of the kept rows whose picture other rows have too: all that it is called."""


Captions = Callable[[int], Sequence[tuple[str, float, float]]]
"""The captions of a row, each with the hashes of its pair and of its name."""


def of_split(
    captions: Sequence[tuple[str, float, float]], split: int, holding: Holding
) -> list[str]:
    """Those of a row's captions that may stand beside a picture of that split: a caption that is
    held out must not be learnt.
    """
    return [text for text, place, unseen in captions if holding.split(place, unseen) == split]


def duplicates(
    keys: np.ndarray, rejected: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(outcome, the first row that has the same picture) of new rows: that one stays.

    By row: `keys` names its picture, `known` says that the data set has it already.
    """
    outcome = np.where(rejected, REJECTED, np.where(known, KNOWN, KEPT)).astype(np.uint8)
    fresh = np.flatnonzero(outcome == KEPT)
    first = np.arange(len(keys))
    first[fresh] = fresh[Positions(keys[fresh])(keys[fresh])]
    outcome[first != np.arange(len(keys))] = SAME_PICTURE
    return outcome, first


def decide(
    outcome: np.ndarray,
    first: np.ndarray,
    splits: np.ndarray,
    captions: Captions,
    holding: Holding,
) -> Decision:
    """The split of new rows, by that of each one's first caption. Further captions of a picture
    join it where they are of its split.
    """
    split = np.where(outcome == KEPT, splits, NONE).astype(np.uint8)
    joined: dict[int, list[str]] = {}
    for row in np.flatnonzero(outcome == SAME_PICTURE).tolist():
        sample = int(first[row])
        own = int(split[sample])
        split[row] = own
        if sample not in joined:
            joined[sample] = of_split(captions(sample), own, holding)
        outcome[row] = join(joined[sample], captions(row), own, holding)
    return Decision(outcome, split, joined)


def join(
    known: list[str], captions: Sequence[tuple[str, float, float]], split: int, holding: Holding
) -> int:
    """Add to a picture's captions what another row calls it; the outcome of that row."""
    new = [it for it in captions if it[0] not in known]
    fitting = of_split(new, split, holding)
    known += fitting
    if fitting:
        return CAPTION_ADDED
    return CAPTION_OF_OTHER_SPLIT if new else SAME_PICTURE


def uniform(purpose: str, text: str) -> float:
    """A number in [0, 1) that the text always gets."""
    digest = hashlib.blake2b(f"{purpose}\0{text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
