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
from .given import Given, Pictured, asked_of, shrunk, truths_of
from .page import PIXELATED, image, page
from .prompts import Prompt
from .sample import Pictures, Progress, png, sheet
from .techniques import Technique, described, enlarged

TEMPLATE = "comparison.html.jinja"
AMONG = 100
NEIGHBOURS = 3
KID_BLOCK = 32
_WHOLE = {
    "precision": ("Precision", 100.0, "%"),
    "recall": ("Recall", 100.0, "%"),
    "kid": ("KID x 1000", 1000.0, ""),
    "saturation": ("Saturated", 100.0, "%"),
    "legible": ("Shows a scene at all", 100.0, "%"),
    "psnr": ("PSNR to the picture", 1.0, "dB"),
    "consistency": ("Consistency with what was given", 1.0, "dB"),
    "map_agreement": ("Keeps to the map", 100.0, "%"),
    "reconstruction_psnr": ("Through the autoencoder", 1.0, "dB"),
}
"""Measure -> its heading, by what it is multiplied, its unit."""
CLAIM = 512
"""Prompts that a claim wants."""
RECONSTRUCTED = 256
"""Real pictures that go through each autoencoder."""
SIDE_BY_SIDE = 6
"""Of which so many are shown."""
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
    """Of the networks that draw, a picture; a guided step has two. Those of a classifier or a CLIP
    that guides are not among them."""
    seconds: float
    """A picture."""
    against_first: metrics.Interval | None
    """`right` minus that of the first contender, paired; None for the first itself."""
    measures: Mapping[str, Measure] = field(default_factory=dict[str, "Measure"])
    """What is said of all its pictures together, by name."""
    given: Given = field(default_factory=Given)
    """What it was told beside the prompts."""
    stages: Mapping[str, str] = field(default_factory=dict[str, str])
    """As the contender's."""
    apart: Mapping[str, Pictures] = field(default_factory=dict[str, Pictures])
    """Stage -> what it drew of the first prompts; empty where one stage draws all."""
    again: Pictures | None = None
    """Real pictures through its autoencoder; None for a model without."""


@dataclass(frozen=True)
class Measure:
    """A value for each picture, real picture or block of pictures; paired with the first one's."""

    values: ndarray
    against_first: metrics.Interval | None = None

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def interval(self, blocks: int = 16) -> metrics.Interval | None:
        """Of the mean; None of fewer than two values, or where one has no bound (as of equal
        pictures)."""
        if len(self.values) < 2 or not np.isfinite(self.values).all():
            return None
        if np.isin(self.values, (0, 1)).all():
            return metrics.proportion(self.values)
        return metrics.mean_interval(self.values, min(blocks, len(self.values)))


def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    clip: Extractor | None = None,
    reference: Pictures | None = None,
    pictured: Pictured | None = None,
    batch: int = 64,
    blocks: int = 16,
    progress: Progress | None = None,
) -> list[Drawn]:
    """Each contender's pictures of all prompts, picture i from seed + i.

    Prompts with a truth are judged by the oracle, of what all contenders can be asked for, others
    by `clip`; `pictured` are the prompts' real pictures, for those that enlarge some. Real pictures
    as `reference` say how near and how varied the drawn ones are, as `clip` sees them. ValueError
    when there is nothing to compare, or prompts without a truth and no `clip`.
    """
    if len(contenders) < 2 or len(prompts) < 2:
        raise ValueError(
            f"a comparison needs two contenders and two prompts, got {len(contenders)} and "
            f"{len(prompts)}"
        )

    told = [
        Given.of(it.generator, prompts, pictured, bool(it.options.get("classifier_guidance")))
        for it in contenders
    ]
    for it, given in zip(contenders, told, strict=True):
        # A wrong option is found at once, and nobody's time has the first call's.
        it.generator([prompts[0].text], seed=[seed], **it.options, **given.options(slice(1)))
    attributes = _asked_of_all(contenders)
    found: list[Drawn] = []
    real = None if clip is None or reference is None else clip.images(reference)
    total = len(contenders) * len(prompts)
    for number, (it, given) in enumerate(zip(contenders, told, strict=True)):
        parts: list[Pictures] = []
        started = time.perf_counter()
        with evaluations(it.generator) as counted:
            for start in range(0, len(prompts), batch):
                asked = prompts[start : start + batch]
                texts = [prompt.text for prompt in asked]
                seeds = [seed + start + k for k in range(len(texts))]
                here = given.options(slice(start, start + batch))
                drawn = it.generator(texts, seed=seeds, **it.options, **here)
                parts.append(np.asarray(drawn))
                if progress:
                    progress(number * len(prompts) + start + len(texts), total)
        seconds = time.perf_counter() - started
        pictures = np.concatenate(parts)
        right = judged(pictures, prompts, clip, attributes)
        gained = metrics.paired_difference(right, found[0].right, blocks) if found else None
        spent, each = counted() / len(prompts), seconds / len(prompts)
        again = _again(it.generator, reference, pictures.shape[1])
        whole = _whole(pictures, prompts, clip, real) | _of_given(it.generator, pictures, given)
        if again is not None and reference is not None:
            whole["reconstruction_psnr"] = metrics.psnr(again, reference[: len(again)])
        measures = _paired(whole, found[0].measures if found else {}, blocks)
        shown = prompts[:APART]
        apart = stages_apart(it, shown, seed, {**it.options, **given.options(slice(APART))})
        made = Drawn(
            it.name, pictures, right, spent, each, gained, measures, given, it.stages, apart, again
        )
        found.append(made)
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


def _whole(
    pictures: Pictures,
    prompts: Sequence[Prompt],
    clip: Extractor | None,
    real: ndarray | None,
) -> dict[str, ndarray]:
    """What is said of all pictures together: values whose mean it is."""
    found = {"saturation": metrics.saturation(pictures)}
    if truths := _scenes(prompts):
        objects = len(truths[0].get("objects", (0,)))
        found["legible"] = shapes_oracle.legible(pictures, objects).astype(np.float64)
    if clip is None or real is None or min(len(pictures), len(real)) <= NEIGHBOURS:
        return found
    features = clip.images(pictures)
    near, covered = metrics.manifolds(features, real, neighbours=NEIGHBOURS)
    block = min(KID_BLOCK, len(features), len(real))
    return {
        "precision": near.astype(np.float64),
        "recall": covered.astype(np.float64),
        "kid": metrics.kid(features, real, block=block),
        **found,
    }


def _of_given(generator: Any, pictures: Pictures, given: Given) -> dict[str, ndarray]:
    """How near each picture is to what it was told beside its prompt."""
    found: dict[str, ndarray] = {}
    if given.low is not None:
        found["consistency"] = metrics.psnr(shrunk(pictures, given.low.shape[1]), given.low)
        if given.real is not None:
            found["psnr"] = metrics.psnr(pictures, given.real)
    if given.map is not None:
        found["map_agreement"] = (generator.mapped(pictures) == given.map).mean((1, 2))
    return found


def _again(generator: Any, reference: Pictures | None, side: int) -> Pictures | None:
    """The first real pictures through the generator's autoencoder, where it has one."""
    if reference is None or getattr(generator, "codec", None) is None:
        return None
    some = reference[:RECONSTRUCTED]
    if some.shape[1] != side:
        return None
    again = generator.decode(generator.encode(some))
    return again if again.shape == some.shape else None


def _paired(
    values: Mapping[str, ndarray], first: Mapping[str, Measure], blocks: int
) -> dict[str, Measure]:
    """Each beside the first contender's, where that has it too, of as many pictures."""
    found: dict[str, Measure] = {}
    for name, these in values.items():
        against = None
        those = first[name].values if name in first else these[:0]
        if len(those) == len(these) > 1 and np.isfinite(these).all() and np.isfinite(those).all():
            by = None if name == "kid" else min(blocks, len(these))
            against = metrics.paired_difference(these, those, by)
        found[name] = Measure(these, against)
    return found


def _asked_of_all(contenders: Sequence[Contender]) -> tuple[str, ...]:
    """The attributes of drawn scenes that each contender can be asked for."""
    asked = [asked_of(it.generator) for it in contenders]
    return tuple(name for name in shapes_oracle.ATTRIBUTES if all(name in it for it in asked))


def judged(
    pictures: Pictures,
    prompts: Sequence[Prompt],
    clip: Extractor | None,
    attributes: Sequence[str] = shapes_oracle.ATTRIBUTES,
) -> ndarray:
    """For each picture 1.0 where it shows its prompt, else 0.0; of scenes of one object these
    attributes count."""
    if _scenes(prompts):
        truths = truths_of(prompts, attributes)
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
    networks = getattr(generator, "networks", None)
    rows = 0

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(arguments[0])

    if networks is None:
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
    reference: Pictures | None = None,
) -> None:
    """Publish the comparison as one self-contained page at a path or URL."""
    page = render(title, drawn, prompts, shown, reference=reference)
    storage.publish_bytes(str(path), page.encode())


def render(
    title: str,
    drawn: Sequence[Drawn],
    prompts: Sequence[Prompt],
    shown: Sequence[Technique] = (),
    rows: int = 16,
    reference: Pictures | None = None,
) -> str:
    """The page as HTML: a table of all contenders, the first `rows` prompts drawn by each, what
    their autoencoders leave of the `reference` of `compare`, and what else the first one does.
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
    named = [name for name in _WHOLE if any(name in it.measures for it in drawn)]
    whole = [
        {"name": it.name, "cells": [_cell(name, it.measures.get(name)) for name in named]}
        for it in drawn
    ]
    given = next((it.given for it in drawn if it.given.real is not None), Given())
    told, real = given.shown, given.real
    pictures = [
        {
            "text": prompt.text,
            "given": None if told is None else image(told[row]),
            "real": None if real is None else image(real[row]),
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
        table=table, rows=pictures, count=len(prompts), given=told is not None,
        whole=whole, measures=[_WHOLE[name][0] for name in named],
        names=[it.name for it in drawn],
        techniques=[described(it) for it in shown], enough=len(prompts) >= CLAIM, claim=CLAIM,
        again=[described(it) for it in _autoencoders(drawn, reference)],
        stages=_stages(drawn),
        apart=[described(_apart(it, prompts)) for it in apart],
        judge="every attribute that all are asked for is read from the pixels" if _scenes(prompts)
        else "the line's CLIP finds the caption again among others",
    )  # fmt: skip


def gallery(drawn: Sequence[Drawn], columns: int = 12, side: int = 64) -> bytes:
    """A PNG of the first prompts' pictures, a row a contender, small ones enlarged towards
    `side`."""
    rows = [enlarged(it.pictures[:columns], max(1, side // it.pictures.shape[1])) for it in drawn]
    widest = max(row.shape[1] for row in rows)
    rows = [enlarged(row, widest // row.shape[1]) for row in rows]
    if len({row.shape for row in rows}) > 1:
        sides = ", ".join(f"{it.name} {it.pictures.shape[1]}" for it in drawn)
        raise ValueError(f"pictures of these sides share no gallery: {sides}")
    return png(sheet(np.concatenate(rows), len(rows[0]), gap=4))


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


def _autoencoders(drawn: Sequence[Drawn], reference: Pictures | None) -> list[Technique]:
    """Real pictures through each of several autoencoders."""
    having = [it for it in reversed(drawn) if it.again is not None]
    several = {it.stages.get("autoencoder", it.name): it for it in having}  # the first of each
    if reference is None or len(several) < 2:
        return []
    shown = [it for it in drawn if any(it is one for one in several.values())]
    columns = [reference, *(it.again for it in shown if it.again is not None)]
    return [
        Technique(
            "Through the autoencoders",
            "Real held-out pictures, and what is left of them.",
            ["The picture", *(it.name for it in shown)],
            list(np.stack([them[:SIDE_BY_SIDE] for them in columns], axis=1)),
            [""] * min(SIDE_BY_SIDE, len(reference)),
        )
    ]


def _cell(name: str, measure: Measure | None) -> dict[str, str]:
    _, factor, unit = _WHOLE[name]
    if measure is None:
        return {"value": "", "between": "", "against": ""}
    own = measure.interval()
    return {
        "value": f"{factor * measure.mean:.2f}{unit and f' {unit}'}",
        "between": "" if own is None else f"{factor * own.low:.2f} to {factor * own.high:.2f}",
        "against": _signed(measure.against_first, factor, 2 if unit == "dB" else 1),
    }


def _signed(difference: metrics.Interval | None, factor: float = 100.0, digits: int = 1) -> str:
    if difference is None:
        return ""
    of = (factor * x for x in (difference.mean, difference.low, difference.high))
    mean, low, high = (f"{x:+.{digits}f}" for x in of)
    return f"{mean} ({low} to {high})"
