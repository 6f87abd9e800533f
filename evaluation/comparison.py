"""Several models, or one model drawn in several ways, side by side: the same prompts and the same
seeds, what each picture shows, and what it cost.

Each is held against the first, prompt by prompt: what is said of a difference is a paired interval.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

from pipeline import storage

from . import metrics, shapes_oracle
from .features import Extractor
from .page import PIXELATED, image, page
from .prompts import Prompt
from .sample import Pictures, Progress
from .techniques import Technique, described, enlarged

TEMPLATE = "comparison.html.jinja"
AMONG = 100
APART = 4
"""Prompts of which what each stage drew is shown."""
_GUIDES = ("classifier_guidance", "clip_guidance")
"""Options of a call that what shows the stages does not know."""


@dataclass(frozen=True)
class Contender:
    """A generator and how it is to draw: fields of SamplerConfig."""

    name: str
    generator: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, str] = field(default_factory=dict)
    """Stage -> what names its weights (evaluation.registry.stages)."""


@dataclass(frozen=True)
class Drawn:
    """What a contender drew, one picture for each prompt."""

    name: str
    pictures: Pictures
    right: ndarray
    """1 where the picture shows what its prompt says (or is found again by CLIP), else 0."""
    evaluations: float
    """Network evaluations a picture; a guided step has two."""
    seconds: float
    """A picture."""
    against_first: metrics.Interval | None
    """`right` minus that of the first contender, paired; None for the first itself."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """As the contender's."""
    apart: Mapping[str, Pictures] = field(default_factory=dict)
    """Stage -> what it drew of the first prompts; empty where one stage draws all."""


def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    clip: Extractor | None = None,
    batch: int = 64,
    blocks: int = 16,
    progress: Progress | None = None,
) -> list[Drawn]:
    """Each contender's pictures of all prompts, picture i from seed + i.

    Prompts with a truth are judged by the oracle, others by `clip`. ValueError when there is
    nothing to compare, or prompts without a truth and no `clip`.
    """
    if len(contenders) < 2 or len(prompts) < 2:
        raise ValueError(
            f"a comparison needs two contenders and two prompts, got {len(contenders)} and "
            f"{len(prompts)}"
        )

    def options(it: Contender, asked: Sequence[Prompt]) -> dict[str, Any]:
        told = {"labels": [prompt.truth or {} for prompt in asked]}
        wanted = it.options.get("classifier_guidance") or getattr(it.generator, "reads_labels", 0)
        return {**it.options, **(told if wanted else {})}

    for it in contenders:  # a wrong option is found at once, and nobody's time has the first call's
        it.generator([prompts[0].text], seed=[seed], **options(it, prompts[:1]))
    found: list[Drawn] = []
    total = len(contenders) * len(prompts)
    for number, it in enumerate(contenders):
        parts: list[Pictures] = []
        started = time.perf_counter()
        with evaluations(it.generator) as counted:
            for start in range(0, len(prompts), batch):
                asked = prompts[start : start + batch]
                texts = [prompt.text for prompt in asked]
                seeds = [seed + start + k for k in range(len(texts))]
                drawn = it.generator(texts, seed=seeds, **options(it, asked))
                parts.append(np.asarray(drawn))
                if progress:
                    progress(number * len(prompts) + start + len(texts), total)
        seconds = time.perf_counter() - started
        pictures = np.concatenate(parts)
        right = judged(pictures, prompts, clip)
        against = metrics.paired_difference(right, found[0].right, blocks) if found else None
        spent = counted() / len(prompts)
        apart = stages_apart(it, prompts[:APART], seed, options(it, prompts[:APART]))
        taken = seconds / len(prompts)
        found.append(Drawn(it.name, pictures, right, spent, taken, against, it.stages, apart))
    return found


def stages_apart(
    contender: Contender, prompts: Sequence[Prompt], seed: int, options: Mapping[str, Any]
) -> dict[str, Pictures]:
    """What each of its stages drew on the way to the very pictures of `compare`; empty where a
    single stage draws, or where it is led by what shows no stages."""
    generator = contender.generator
    if not getattr(generator, "enlarging", None) or any(options.get(it) for it in _GUIDES):
        return {}
    told = {{"sampler": "kind"}.get(key, key): value for key, value in options.items()}
    for name in _GUIDES:
        told.pop(name, None)
    seeds = [seed + k for k in range(len(prompts))]
    return generator.stages([prompt.text for prompt in prompts], seed=seeds, **told)


def judged(pictures: Pictures, prompts: Sequence[Prompt], clip: Extractor | None) -> ndarray:
    """For each picture 1.0 where it shows its prompt, else 0.0."""
    if truths := _scenes(prompts):
        return shapes_oracle.judge_all(pictures, truths)["all"].astype(np.float64)
    if clip is None:
        raise ValueError("prompts without a truth are judged by CLIP, and none was given")
    texts = clip.texts([prompt.text for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    among = min(AMONG, len(prompts))
    return metrics.retrieval_at_1(clip.images(pictures), texts, among, groups)


@contextmanager
def evaluations(generator: Any) -> Iterator[Any]:
    """A function that says how many rows went through the generator's networks that draw so far;
    NaN for a generator that shows none.
    """
    networks = getattr(generator, "networks", ())
    rows = 0

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(arguments[0])

    if not networks:
        yield lambda: float("nan")
        return
    hooks = [network.register_forward_pre_hook(count) for network in networks]
    try:
        yield lambda: float(rows)
    finally:
        for hook in hooks:
            hook.remove()


def write(
    path: str | os.PathLike[str],
    title: str,
    drawn: Sequence[Drawn],
    prompts: Sequence[Prompt],
    shown: Sequence[Technique] = (),
) -> None:
    """Publish the comparison as one self-contained page at a path or URL."""
    storage.publish_bytes(str(path), render(title, drawn, prompts, shown).encode())


def render(
    title: str,
    drawn: Sequence[Drawn],
    prompts: Sequence[Prompt],
    shown: Sequence[Technique] = (),
    rows: int = 16,
) -> str:
    """The page as HTML: a table of all contenders, the first `rows` prompts drawn by each, and what
    else the first one does.
    """
    table = []
    for it in drawn:
        share = metrics.proportion(it.right)
        table.append(
            {
                "name": it.name,
                "share": share.mean,
                "between": f"{100 * share.low:.1f} to {100 * share.high:.1f} %",
                "evaluations": "" if np.isnan(it.evaluations) else f"{it.evaluations:.0f}",
                "milliseconds": f"{1000 * it.seconds:.0f} ms",
                "against": _signed(it.against_first),
            }
        )
    pictures = [
        {
            "text": prompt.text,
            "images": [
                {"uri": image(it.pictures[row]), "right": bool(it.right[row])} for it in drawn
            ],
        }
        for row, prompt in enumerate(prompts[:rows])
    ]
    side = drawn[0].pictures.shape[1]
    apart = [it for it in drawn if it.apart]
    return page(
        TEMPLATE, title=title, side=side, pixelated=side <= PIXELATED,
        table=table, rows=pictures, count=len(prompts),
        names=[it.name for it in drawn],
        techniques=[described(it) for it in shown],
        stages=_stages(drawn),
        apart=[described(_apart(it, prompts)) for it in apart],
        judge="every attribute is read from the pixels" if _scenes(prompts)
        else "the line's CLIP finds the caption again among others",
    )  # fmt: skip


def _stages(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """A row a stage: what each model has there, and whether all have the same."""
    names = dict.fromkeys(name for it in drawn for name in it.stages)
    rows = []
    for name in names:
        cells = [it.stages.get(name) for it in drawn]
        shared = len({*cells}) == 1
        rows.append({"name": name, "shared": shared, "cells": [cell or "none" for cell in cells]})
    return rows


def _apart(it: Drawn, prompts: Sequence[Prompt]) -> Technique:
    side = max(pictures.shape[1] for pictures in it.apart.values())
    shown = [enlarged(pictures, side // pictures.shape[1]) for pictures in it.apart.values()]
    return Technique(
        it.name,
        "",
        [f"{name}, {pictures.shape[1]} px" for name, pictures in it.apart.items()],
        list(np.stack(shown, axis=1)),
        [prompt.text for prompt in prompts[: len(shown[0])]],
    )


def _scenes(prompts: Sequence[Prompt]) -> list[Mapping[str, Any]]:
    """The truths of the prompts if all are of drawn scenes, else none."""
    truths = [prompt.truth for prompt in prompts if prompt.truth and "background" in prompt.truth]
    return truths if len(truths) == len(prompts) else []


def _signed(difference: metrics.Interval | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * x for x in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
