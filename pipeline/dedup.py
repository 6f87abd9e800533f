"""The first in source order stays.

Exact duplicates share a key, the hash of their file. Near duplicates share a look: a difference
hash (64 signs of horizontal brightness steps) within a few bits and a mean colour within a few
levels, so that a red and a blue disc are two pictures.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
from PIL import Image

MAX_BITS = 3
MAX_LEVELS = 10
_MIN_SIGNS = 4  # a flat picture has no look to compare


def key(data: bytes) -> str:
    """32 hex characters that name a picture: 128-bit blake2b of its file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def look(image: Image.Image) -> str:
    """22 hex characters: the 64-bit difference hash, then the mean colour (3 bytes)."""
    small = np.asarray(image.resize((9, 8), Image.Resampling.BOX), dtype=np.float32)  # [8, 9, 3]
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    signs = np.packbits(grey[:, 1:] > grey[:, :-1] + 0.5)  # half a level of slack: flat stays flat
    mean = (small.mean((0, 1)) + 0.5).astype(np.uint8)
    return signs.tobytes().hex() + mean.tobytes().hex()


class NearDuplicates:
    """Looks seen so far, each with what was said of it. Any two hashes within 3 bits agree on at
    least one of four 16-bit bands (pigeonhole).
    """

    def __init__(self) -> None:
        self._bands: defaultdict[tuple[int, int], dict[tuple[int, bytes, str], None]]
        self._bands = defaultdict(dict)

    def like(self, look: str) -> set[str]:
        """What was said of those that look the same."""
        signs, colour = _parsed(look)
        return {
            said
            for band in _bands(signs)
            for other, other_colour, said in self._bands[band]
            if (signs ^ other).bit_count() <= MAX_BITS and _close(colour, other_colour)
        }

    def add(self, look: str, said: str = "") -> None:
        signs, colour = _parsed(look)
        for band in _bands(signs):
            self._bands[band][signs, colour, said] = None


def _parsed(look: str) -> tuple[int, bytes]:
    return int(look[:16], 16), bytes.fromhex(look[16:])


def _bands(signs: int) -> list[tuple[int, int]]:
    if not _MIN_SIGNS <= signs.bit_count() <= 64 - _MIN_SIGNS:
        return []
    return [(band, signs >> 16 * band & 0xFFFF) for band in range(MAX_BITS + 1)]


def _close(one: bytes, other: bytes) -> bool:
    return all(abs(a - b) <= MAX_LEVELS for a, b in zip(one, other, strict=True))
