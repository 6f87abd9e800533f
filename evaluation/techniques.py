"""What a model of pixels does without having been trained for it: pictures between two noises,
holes filled, small copies enlarged. Nothing but the sampling is conditioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .sample import Pictures

if TYPE_CHECKING:
    from training.generator import Generator, Known

    from .editing import Edits

SHARES = 7
DRAWS = 4
FACTOR = 4


@dataclass(frozen=True)
class Technique:
    """A table of pictures, one row each."""

    title: str
    lead: str
    columns: Sequence[str]
    rows: Sequence[Pictures]
    labels: Sequence[str]
    error: float | None = None
    """Root mean square grey levels by which the drawn pictures miss what was known of them."""


def techniques(
    generator: Generator, prompts: Sequence[str], pictures: Pictures, seed: int
) -> list[Technique]:
    """All of them: `prompts` for what lies between two noises, real `pictures` for the rest. None
    for a generator of latents, which cannot be held to pixels.
    """
    if getattr(generator, "codec", generator) is not None:
        return []
    return [
        interpolation(generator, prompts, seed),
        inpainting(generator, pictures, seed),
        super_resolution(generator, pictures, seed),
    ]


def interpolation(generator: Generator, prompts: Sequence[str], seed: int) -> Technique:
    """One prompt a row, its noise from that of one seed to that of another on the sphere."""
    shares = [k / (SHARES - 1) for k in range(SHARES)]
    rows = [
        generator.between(text, (seed + 2 * k, seed + 2 * k + 1), shares)
        for k, text in enumerate(prompts)
    ]
    return Technique(
        "Between two noises",
        "One prompt a row. The noise goes from one seed's to another's on the sphere; DDIM draws "
        "without fresh noise.",
        [f"{share:.2f}" for share in shares],
        rows,
        prompts,
    )


def inpainting(generator: Generator, pictures: Pictures, seed: int) -> Technique:
    """The right half is drawn anew; no caption says what is there."""
    from training.generator import Known

    side = generator.resolution
    mask = np.ones((len(pictures), side, side), bool)
    mask[:, :, side // 2 :] = False
    held = _held(generator, Known(pictures, mask), len(pictures), seed)
    shown = np.where(mask[..., None], pictures, 255)
    miss = held.astype(np.float64) - pictures
    return Technique(
        "Holes filled",
        "The left half of a real held-out picture is known; the right half is drawn, without a "
        "caption.",
        _columns("Known"),
        _rows(shown, held, pictures),
        [""] * len(pictures),
        float(np.sqrt((miss[:, mask] ** 2).mean())),
    )


def super_resolution(generator: Generator, pictures: Pictures, seed: int) -> Technique:
    """A copy of 1/FACTOR the side is known; no caption says what it shows."""
    from training.generator import Known

    small = _shrunk(pictures)
    held = _held(generator, Known(small.astype(np.uint8), factor=FACTOR), len(pictures), seed)
    miss = _shrunk(held.reshape(-1, *pictures.shape[1:])) - np.tile(small, (DRAWS, 1, 1, 1))
    shown = small.astype(np.uint8).repeat(FACTOR, 1).repeat(FACTOR, 2)
    return Technique(
        "Small copies enlarged",
        f"Of a real held-out picture the means of {FACTOR} x {FACTOR} pixels are known; the rest "
        "is drawn, without a caption.",
        _columns("Known"),
        _rows(shown, held, pictures),
        [""] * len(pictures),
        float(np.sqrt((miss**2).mean())),
    )


def editing(found: Edits, count: int = 12) -> Technique:
    """Held-out scenes, the first ones; nobody picks."""
    shown = (found.before, found.inverted, found.after)
    return Technique(
        f"From {found.source} to {found.target}",
        "A real held-out picture; the same after the way to noise and back, which changes nothing "
        "else; and drawn from there by the copy that was trained for the edit. Of "
        f"{len(found.keys)} pictures {found.changed.sum()} show what was asked for, "
        f"{found.kept.sum()} all else that they did.",
        ("The picture", "There and back", "Edited"),
        list(np.stack([it[:count] for it in shown], 1)),
        [""] * min(count, len(found.keys)),
    )


def _held(generator: Generator, known: Known, count: int, seed: int) -> Pictures:
    """[DRAWS, count, H, W, 3]: each held to what is known, from different noise."""
    return np.stack(
        [
            generator([""] * count, seed=seed + draw * count, guidance=1.0, known=known)
            for draw in range(DRAWS)
        ]
    )


def _shrunk(pictures: Pictures) -> np.ndarray:
    count, height, width, channels = pictures.shape
    squares = pictures.reshape(
        count, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels
    ).astype(np.float64)
    return squares.mean((2, 4)).round()


def _columns(known: str) -> list[str]:
    return [known, *(f"Drawn {k + 1}" for k in range(DRAWS)), "The picture"]


def _rows(known: Pictures, held: Pictures, pictures: Pictures) -> list[Pictures]:
    return [
        np.stack([known[k], *held[:, k], pictures[k]]).astype(np.uint8)
        for k in range(len(pictures))
    ]
