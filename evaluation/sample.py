"""Pictures for prompts, in batches: picture i is a function of its own prompt and seed, so work
done once is never done again.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

Pictures = UInt8[ndarray, "n height width 3"]
Progress = Callable[[int, int], None]
"""(pictures done, pictures in all)"""


class Painter(Protocol):
    """What is sampled: `training.generator.Generator`, or a packaged one."""

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any: ...


class Sampler:
    """Draws prompts in batches, tells the progress and adds up the time.

    Picture i of `prompts[first:]` is drawn from seed + first + i, whatever the batch size. `given`
    says what the generator is told besides, as options of a call, for a slice of all prompts.
    """

    def __init__(
        self,
        generator: Painter,
        *,
        steps: int | None = None,
        seed: int = 0,
        batch: int = 64,
        total: int = 0,
        progress: Progress | None = None,
        given: Callable[[slice], Mapping[str, Any]] | None = None,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.generator, self.steps, self.seed, self.batch = generator, steps, seed, batch
        self.total, self.progress, self.done = total, progress, 0
        self.given = given

    def __call__(
        self,
        prompts: Sequence[str],
        guidance: float | None,
        first: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Pictures, float]:
        """(pictures of prompts[first:], seconds); `options` are further ones of a call. ValueError
        when the generator gives anything but one uint8 picture each.
        """
        how = {"guidance": guidance, "steps": self.steps, **(options or {})}
        parts, seconds = [], 0.0
        for start in range(first, len(prompts), self.batch):
            texts = list(prompts[start : start + self.batch])
            begun = time.perf_counter()
            seeds = [self.seed + start + k for k in range(len(texts))]
            told = self.given(slice(start, start + len(texts))) if self.given else {}
            pictures = np.asarray(self.generator(texts, seed=seeds, **how, **told))
            seconds += time.perf_counter() - begun
            if (
                pictures.dtype != np.uint8
                or pictures.ndim != 4
                or len(pictures) != len(texts)
                or pictures.shape[3] != 3
            ):
                raise ValueError(
                    f"the generator gave {pictures.dtype} {list(pictures.shape)} "
                    f"for {len(texts)} prompts, "
                    f"wanted uint8 [{len(texts)}, height, width, 3]"
                )
            parts.append(pictures)
            self.done += len(texts)
            if self.progress:
                self.progress(self.done, max(self.total, self.done))
        return np.concatenate(parts) if parts else np.zeros((0, 1, 1, 3), np.uint8), seconds


def sheet(
    pictures: Pictures, columns: int, gap: int = 2, ground: int = 255
) -> UInt8[ndarray, "height width 3"]:
    """One picture of all, row by row, with a gap around each; the last row is filled up with
    ground.
    """
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    out = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), ground, np.uint8)
    for k, picture in enumerate(pictures):
        y, x = k // columns * (height + gap) + gap, k % columns * (width + gap) + gap
        out[y : y + height, x : x + width] = picture
    return out


def png(picture: UInt8[ndarray, "height width 3"], scale: int = 1) -> bytes:
    """A PNG file, each pixel `scale` times as large."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(picture, scale, 0), scale, 1)).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()
