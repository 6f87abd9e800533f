"""The first in source order stays.

Exact duplicates share a key, the hash of their file. Near duplicates share a look: a difference
hash (64 signs of horizontal brightness steps) within a few bits and a mean colour within a few
levels, so that a red and a blue disc are two pictures.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import images

MAX_BITS = 3
MAX_LEVELS = 10
_MIN_SIGNS = 4  # a flat picture has no look to compare
_LUMA = np.array([299, 587, 114], np.int32)  # thousandths
_SMALL = 64  # rows of a group that are compared with each other


def key(data: bytes) -> str:
    """32 hex characters that name a picture: 128-bit blake2b of its file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def thumbnail(image: Image.Image) -> bytes:
    """What `looks` sees of an RGB picture: 8 rows of 9 pixels."""
    return images.resized(image, (9, 8), "box").tobytes()  # a tenth of the time of np.asarray


def looks(thumbnails: Sequence[bytes]) -> list[str]:
    """Of each 22 hex characters: the 64-bit difference hash, then the mean colour (3 bytes).

    Many at once, and in whole numbers: between two pictures' decoders a dozen numpy calls cost
    three times what they cost in a row, and BLAS rounds as it likes.
    """
    small = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, 8, 9, 3).astype(np.int32)
    grey = small @ _LUMA
    # half a level of slack: flat stays flat
    signs = np.packbits((grey[..., 1:] > grey[..., :-1] + 500).reshape(-1, 64), axis=1)
    mean = (2 * small.sum((1, 2)) + 72) // 144
    text = np.concatenate([signs, mean.astype(np.uint8)], axis=1).tobytes().hex()
    return [text[at : at + 22] for at in range(0, len(text), 22)]


class Looks(NamedTuple):
    """Pictures as they are compared."""

    signs: np.ndarray
    """uint64 [n]"""
    colours: np.ndarray
    """uint8 [n, 3]"""

    def __getitem__(self, rows: np.ndarray) -> Looks:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Looks(self.signs[rows], self.colours[rows])

    @property
    def telling(self) -> np.ndarray:
        """bool [n]: whether there is enough of a picture to compare."""
        ones = np.bitwise_count(self.signs)
        return (ones >= _MIN_SIGNS) & (ones <= 64 - _MIN_SIGNS)


def parsed(looks: bytes | bytearray) -> Looks:
    """What `look` gave of some pictures, 11 bytes each, as columns."""
    table = np.frombuffer(bytes(looks), np.uint8).reshape(-1, 11)
    signs = np.ascontiguousarray(table[:, :8]).view(">u8").astype(np.uint64)[:, 0]
    return Looks(signs, table[:, 8:])


def alike(one: Looks, other: Looks) -> np.ndarray:
    """Whether pictures look the same, pair by pair; of one picture and of many."""
    bits = np.bitwise_count(one.signs ^ other.signs)
    levels = np.abs(one.colours.astype(np.int16) - other.colours).max(1)
    return (bits <= MAX_BITS) & (levels <= MAX_LEVELS) & one.telling & other.telling


def find(looks: Looks, among: Looks) -> np.ndarray:
    """For each picture the first of others that looks the same, -1 where none does.

    Of four quarters of two such hashes one is equal (pigeonhole): those are compared.
    """
    nobody = len(among.signs)
    found = np.full(len(looks.signs), nobody)
    for quarter in range(MAX_BITS + 1):
        shift = np.uint64(64 // (MAX_BITS + 1) * quarter)
        own, other = (it.signs >> shift & np.uint64(0xFFFF) for it in (looks, among))
        order = np.argsort(other, kind="stable")
        start, stop = (np.searchsorted(other[order], own, side) for side in ("left", "right"))
        count = stop - start
        one = np.repeat(np.arange(len(own)), count)
        within = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count)
        beside = order[np.repeat(start, count) + within]
        near = alike(looks[one], among[beside])
        np.minimum.at(found, one[near], beside[near])
    return np.where(found == nobody, -1, found)


class Neighbours:
    """Which pictures look the same. `of[row]` is the number of a row's look, -1 where it tells
    nothing; `neighbours[number]` are the numbers of the looks that are like it, itself included.
    """

    def __init__(self, looks: Looks):
        rows = np.flatnonzero(looks.telling)
        some = looks[rows]
        colour = some.colours.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        order = np.lexsort((colour, some.signs))
        new = _changes(some.signs[order], colour[order])
        self.of = np.full(len(looks.signs), -1)
        self.of[rows[order]] = np.cumsum(new) - 1
        one, other = _pairs(some[order[new]])
        alone = np.arange(np.count_nonzero(new))
        both, beside = np.concatenate([one, other, alone]), np.concatenate([other, one, alone])
        order = np.argsort(both, kind="stable")
        self._others = beside[order]
        self._ends = np.searchsorted(both[order], np.arange(len(alone) + 1))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> list[int]:
        return self._others[self._ends[number] : self._ends[number + 1]].tolist()


def _pairs(looks: Looks) -> tuple[np.ndarray, np.ndarray]:
    """All pairs that look the same, the lesser row first, of distinct looks sorted by their signs.

    Hashes are compared first, each once, then the looks that have two such hashes, by colour.
    """
    starts = np.flatnonzero(_changes(looks.signs))
    signs = looks.signs[starts]
    count = np.diff(starts, append=len(looks.signs))
    codes = _search(signs, np.arange(len(signs)), np.zeros(len(signs), np.int64), np.arange(64))
    one, other = codes // max(len(signs), 1), codes % max(len(signs), 1)
    several = np.flatnonzero(count > 1)
    sets = np.concatenate([one, several, other])  # the rows of a hash, once for each of its pairs
    group = np.concatenate([np.arange(len(one) + len(several)), np.arange(len(one))])
    ends = np.cumsum(count[sets])
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count[sets], count[sets])
    rows, group = np.repeat(starts[sets], count[sets]) + within, np.repeat(group, count[sets])
    red = looks.colours[rows, 0].astype(np.int16)
    order = np.lexsort((red, group))
    rows, group, red = rows[order], group[order], red[order]
    found = [np.empty(0, np.int64)]
    for at, beside in _following(group):
        near = red[beside] - red[at] <= MAX_LEVELS
        least, most = np.sort([rows[at[near]], rows[beside[near]]], axis=0)
        found.append((least * len(looks.signs) + most)[alike(looks[least], looks[most])])
        if not near.any():
            break
    codes = np.unique(np.concatenate(found))
    return codes // max(len(looks.signs), 1), codes % max(len(looks.signs), 1)


def _search(signs: np.ndarray, rows: np.ndarray, group: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Pairs of hashes within `MAX_BITS` of each other in groups of rows that agree on all but some
    bits, as `row * len(signs) + other row` with the lesser row first.

    Of four parts of those bits one is equal (pigeonhole). So each part splits the groups, and those
    that are still large are searched again by the bits that are left.
    """
    found = [np.empty(0, np.int64)]
    for part in np.array_split(bits, MAX_BITS + 1):
        value = np.zeros(len(rows), np.uint64)
        for bit in part:
            value = value << np.uint64(1) | signs[rows] >> np.uint64(bit) & np.uint64(1)
        order = np.lexsort((value, group))
        ordered, label = rows[order], np.cumsum(_changes(group[order], value[order])) - 1
        large = np.bincount(label, minlength=1)[label] > _SMALL
        if len(bits) < 4 * (MAX_BITS + 1):
            large[:] = False
        some = ordered[~large]
        for at, beside in _following(label[~large]):
            one, other = some[at], some[beside]
            near = np.bitwise_count(signs[one] ^ signs[other]) <= MAX_BITS
            least, most = np.sort([one[near], other[near]], axis=0)
            found.append(least * len(signs) + most)
        if large.any():
            rest = np.setdiff1d(bits, part)
            found.append(_search(signs, ordered[large], label[large], rest))
    return np.unique(np.concatenate(found))


def _following(group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions, and those 1, 2, ... behind them in the same group, where equal ones stand
    together."""
    at = np.arange(len(group))
    for apart in itertools.count(1):
        at = at[: np.searchsorted(at, len(group) - apart)]
        at = at[group[at] == group[at + apart]]
        if not len(at):
            return
        yield at, at + apart


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Where a row differs from the one before it; true for the first."""
    changed = np.ones(len(columns[0]), bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed
