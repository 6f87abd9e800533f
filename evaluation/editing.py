"""What an edit does to drawn scenes, by the oracle: the named attribute, and all that was not
named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from pipeline.shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

from . import shapes_oracle
from .sample import Pictures

if TYPE_CHECKING:
    from pipeline.load import Loader

EDITS = 64
"""Held-out scenes that are edited."""
_ANSWERS: Mapping[str, Sequence[str]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class Edits:
    """Scenes before and after an edit; a row each."""

    source: str
    target: str
    keys: Sequence[str]
    before: Pictures
    inverted: Pictures
    """Taken to noise and back by the base itself."""
    after: Pictures
    changed: Bool[ndarray, " n"]
    """Whether the named attribute is what the edit should make it."""
    kept: Bool[ndarray, " n"]
    """Whether all others are what they were."""


def named(source: str, target: str) -> tuple[str, str, str] | None:
    """(attribute, what it was, what it becomes) of an edit's words; None where they name no
    attribute of drawn scenes.
    """
    for attribute, answers in _ANSWERS.items():
        was, becomes = (
            [it for it in answers if f" {it} " in f" {text} "] for text in (source, target)
        )
        if len(was) == len(becomes) == 1 and was != becomes:
            return attribute, was[0], becomes[0]
    return None


def edits(generator: Any, loader: Loader, count: int = EDITS) -> Edits | None:
    """Up to `count` of a loader's scenes that have what the edit is to change, the same each time.

    None for a generator without an edit stage, or one whose edit names no attribute, and where the
    loader has no such scene.
    """
    stage = getattr(generator, "editor", None)
    found = stage and named(stage.config.source, stage.config.target)
    if not found:
        return None
    from training.measuring import fixed_batches

    attribute, was, becomes = found
    keys: list[str] = []
    chosen: list[ndarray] = []
    truths: list[dict[str, Any]] = []
    for batch in fixed_batches(loader, loader.samples, 256):
        for key, pixels, truth in zip(batch["key"], batch["pixels"], batch["label"], strict=True):
            if (truth or {}).get(attribute) == was and len(keys) < count:
                keys.append(key)
                chosen.append(pixels.transpose(1, 2, 0))
                truths.append({**truth, attribute: becomes})
    if not keys:
        return None
    before = np.stack(chosen)
    after = generator.edit(before)
    verdict = shapes_oracle.judge_all(after, truths)
    others = [verdict[name] for name in shapes_oracle.ATTRIBUTES if name != attribute]
    return Edits(
        was,
        becomes,
        keys,
        before,
        generator.edit(before, edited=False),
        after,
        verdict[attribute],
        np.logical_and.reduce(others),
    )
