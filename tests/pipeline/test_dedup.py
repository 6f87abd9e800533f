"""A re-encoded or slightly brighter picture looks the same; another one does not."""

import hashlib
import io

import numpy as np
from PIL import Image

from pipeline import dedup


def smooth(seed, side=64):
    """A random picture with structure at the scale that the difference hash sees."""
    coarse = np.random.default_rng(seed).integers(30, 220, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def test_key_is_the_hash_of_the_file():
    assert dedup.key(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert len(dedup.key(b"")) == 32


def test_a_flat_picture_has_its_colour_and_no_signs():
    assert dedup.look(Image.new("RGB", (40, 30), (1, 2, 255))) == "0" * 16 + "0102ff"


def test_signs_follow_the_brightness():
    rising = np.tile(np.linspace(0, 255, 90, dtype=np.uint8)[None, :, None], (80, 1, 3))
    assert dedup.look(Image.fromarray(rising))[:16] == "f" * 16
    assert dedup.look(Image.fromarray(rising[:, ::-1].copy()))[:16] == "0" * 16


def test_versions_of_a_picture_are_found_and_others_are_not():
    seen = dedup.NearDuplicates()
    pictures = [smooth(seed) for seed in range(60)]
    for index, picture in enumerate(pictures):
        assert seen.like(dedup.look(picture)) == set()
        seen.add(dedup.look(picture), f"p{index}")
    found = 0
    for index, picture in enumerate(pictures):
        out = io.BytesIO()
        picture.resize((50, 50)).save(out, "JPEG", quality=80)
        again = seen.like(dedup.look(Image.open(out)))
        assert again <= {f"p{index}"}
        found += len(again)
    assert found >= 55


def test_pictures_within_three_bits_and_ten_levels_look_alike():
    seen = dedup.NearDuplicates()
    signs = 0x00FF00FF00FF00FF
    look = lambda bits, red=100: f"{signs ^ bits:016x}{red:02x}6464"
    seen.add(look(0), "first")
    assert seen.like(look(0b111)) == {"first"}
    assert seen.like(look(0b1111)) == set()
    assert seen.like(look(0, red=120)) == set()
    assert seen.like(look(0, red=110)) == {"first"}
    assert seen.like(look(1 | 1 << 20 | 1 << 40)) == {"first"}  # spread over three bands
    seen.add(look(0b1111), "second")
    assert seen.like(look(0b11)) == {"first", "second"}


def test_flat_pictures_are_never_near_duplicates():
    seen = dedup.NearDuplicates()
    flat = dedup.look(Image.new("RGB", (32, 32), "white"))
    seen.add(flat, "a")
    assert seen.like(flat) == set()
