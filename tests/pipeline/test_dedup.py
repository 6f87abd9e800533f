"""A re-encoded or slightly brighter picture looks the same; another one does not."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from pipeline import dedup


def smooth(seed, side=64):
    """A random picture with structure at the scale that the difference hash sees."""
    coarse = np.random.default_rng(seed).integers(30, 220, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def test_key_is_the_hash_of_the_file():
    assert dedup.key(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert len(dedup.key(b"")) == 32


def look(*pictures):
    return dedup.looks([dedup.thumbnail(picture) for picture in pictures])


def test_a_flat_picture_has_its_colour_and_no_signs():
    assert look(Image.new("RGB", (40, 30), (1, 2, 255))) == ["0" * 16 + "0102ff"]
    assert look() == []


def test_signs_follow_the_brightness():
    rising = np.tile(np.linspace(0, 255, 90, dtype=np.uint8)[None, :, None], (80, 1, 3))
    up, down = look(Image.fromarray(rising), Image.fromarray(rising[:, ::-1].copy()))
    assert (up[:16], down[:16]) == ("f" * 16, "0" * 16)


def looks(*texts):
    return dedup.parsed(bytes.fromhex("".join(texts)))


def like(neighbours, row):
    """The rows that look like a row."""
    number = int(neighbours.of[row])
    return set(np.flatnonzero(np.isin(neighbours.of, neighbours[number])).tolist()) - {row}


def test_versions_of_a_picture_are_found_and_others_are_not():
    pictures = [smooth(seed) for seed in range(60)]
    again = []
    for picture in pictures:
        out = io.BytesIO()
        picture.resize((50, 50)).save(out, "JPEG", quality=80)
        again.append(Image.open(out))
    neighbours = dedup.Neighbours(looks(*look(*pictures, *again)))
    assert all(like(neighbours, row) <= {row + 60} for row in range(60))
    assert sum(like(neighbours, row) == {row + 60} for row in range(60)) >= 55


def test_pictures_within_three_bits_and_ten_levels_look_alike():
    signs = 0x00FF00FF00FF00FF
    of = lambda bits, red=100: f"{signs ^ bits:016x}{red:02x}6464"
    spread = 1 | 1 << 20 | 1 << 40
    some = [of(0), of(0b111), of(0b1111), of(0, 120), of(0, 110), of(spread)]
    found = like(dedup.Neighbours(looks(*some)), 0)
    assert found == {1, 4, 5}
    assert dedup.alike(looks(some[0]), looks(*some)).tolist() == [1, 1, 0, 0, 1, 1]


def test_flat_pictures_are_never_near_duplicates():
    (flat,) = look(Image.new("RGB", (32, 32), "white"))
    assert dedup.Neighbours(looks(flat, flat)).of.tolist() == [-1, -1]
    assert not dedup.alike(looks(flat), looks(flat)).any()
    assert len(dedup.Neighbours(looks())) == 0


@pytest.mark.parametrize("kind", ["spread", "crowded", "one hash", "sparse"])
def test_all_that_look_alike_are_found(kind, monkeypatch):
    """Against comparing all with all, where groups are split to the last bit and where not."""
    rng, count = np.random.default_rng(0), 700
    signs = {
        "spread": rng.integers(0, 1 << 63, count, dtype=np.uint64),
        "crowded": rng.integers(0, 1 << 9, count, dtype=np.uint64) * np.uint64(0x0201000840100021),
        "one hash": np.full(count, 0x00FF00FF00FF00FF, np.uint64),
        "sparse": np.packbits(rng.random((count, 64)) < 0.1, axis=1)
        .view(">u8")
        .astype(np.uint64)[:, 0],
    }[kind]
    signs[count // 2 :: 2] = signs[: count // 4] ^ np.uint64(1 << 17)
    table = dedup.Looks(signs, rng.integers(90, 120, (count, 3)).astype(np.uint8))
    for small in (1, 64):
        monkeypatch.setattr(dedup, "_SMALL", small)
        neighbours = dedup.Neighbours(table)
        for row in range(count):
            wanted = set(np.flatnonzero(dedup.alike(table[np.array([row])], table)).tolist())
            found = like(neighbours, row) | {row} if neighbours.of[row] >= 0 else set()
            assert found == wanted, row


def test_the_first_of_others_that_looks_the_same_is_found():
    """As by comparing all with all; flat ones have none."""
    rng = np.random.default_rng(3)
    others = [bytes(rng.integers(0, 256, 11, np.uint8)) for _ in range(400)]
    others += [bytes(8) + bytes([200, 30, 30])] * 2
    some = []
    for _ in range(300):
        it = bytearray(others[rng.integers(len(others))])
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            it[bit // 8] ^= 1 << (bit % 8)
        it[8:] = bytes(np.clip(np.array(list(it[8:])) + rng.integers(-12, 13, 3), 0, 255).tolist())
        some.append(bytes(it))
    these, those = dedup.parsed(b"".join(some)), dedup.parsed(b"".join(others))
    wanted = []
    for at in range(len(some)):
        near = np.flatnonzero(dedup.alike(these[np.array([at])], those))
        wanted.append(int(near[0]) if len(near) else -1)
    assert dedup.find(these, those).tolist() == wanted
    assert 50 < wanted.count(-1) < 250
    assert dedup.find(these, dedup.parsed(b"")).tolist() == [-1] * len(some)
    assert dedup.find(dedup.parsed(b""), those).tolist() == []
