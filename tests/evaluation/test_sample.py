"""Sampling in batches gives what sampling at once gives, and says how far it is."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.sample import Sampler, png, sheet


def echo(prompts, *, guidance: Any = None, steps: Any = None, seed: Any = 0):
    """A picture whose pixels are (prompt, guidance, seed)."""
    rows = [(int(p), int(guidance * 10), s % 256) for p, s in zip(prompts, seed, strict=True)]
    return np.broadcast_to(np.array(rows, np.uint8)[:, None, None], (len(rows), 4, 4, 3)).copy()


def test_a_picture_keeps_its_prompt_and_seed_in_any_batch():
    prompts, told = [str(i) for i in range(23)], []
    whole, _ = Sampler(echo, seed=7, batch=100)(prompts, 2.5)
    sampler = Sampler(
        echo, seed=7, batch=5, total=40, progress=lambda done, total: told.append((done, total))
    )
    begun, _ = sampler(prompts[:9], 2.5)
    rest, seconds = sampler(prompts, 2.5, first=9)
    assert np.array_equal(np.concatenate([begun, rest]), whole)
    assert whole[3, 0, 0].tolist() == [3, 25, 10]
    assert told == [(5, 40), (9, 40), (14, 40), (19, 40), (23, 40)]
    assert seconds > 0


def test_what_is_no_picture_for_each_prompt_is_refused():
    with pytest.raises(ValueError, match="wanted uint8 \\[2, height, width, 3\\]"):
        Sampler(lambda prompts, **options: np.zeros((1, 4, 4, 3), np.uint8))(["a", "b"], 1.0)
    with pytest.raises(ValueError, match="batch"):
        Sampler(echo, batch=0)


def test_a_sheet_and_its_png():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 3, 4, 3), np.uint8)
    whole = sheet(pictures, 2, gap=1)
    assert whole.shape == (3 * 4 + 1, 2 * 5 + 1, 3)
    assert whole[9:12, 1:5].tolist() == pictures[4].tolist()
    assert (whole[9:12, 6:10] == 255).all()
    image = Image.open(io.BytesIO(png(whole, scale=2)))
    assert np.array_equal(np.asarray(image)[::2, ::2], whole)
