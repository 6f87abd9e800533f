"""What a model is asked to draw: captions it was not trained on, balanced over what it has and has
not seen.

Every list is a pure function of (data version, seed), and its groups take turns: any run of
prompts, and every k-th prompt, is as balanced as the whole, so a sweep may use the first few and a
confidence interval may deal them to blocks either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from pipeline import shapes, shards
from pipeline.manifest import Manifest, fingerprint

Group = Literal["seen", "unseen", "heldout", "unseen_name"]
GROUPS: Mapping[str, Group] = {"heldout": "heldout", "unseen": "unseen_name"}
"""Split -> the group of the prompts that its captions make."""


@dataclass(frozen=True)
class Prompt:
    """A caption to draw; `truth` is what a drawn scene of it must show (`Scene.truth`), where that
    is known.
    """

    text: str
    group: Group
    truth: Mapping[str, Any] | None = None
    key: str | None = None
    """Of the held-out picture whose caption it is; None for a scene that nobody has drawn yet."""


def digest(prompts: Sequence[Prompt]) -> str:
    """16 hex characters that name a list of prompts."""
    return fingerprint([[it.text, it.group, it.truth and dict(it.truth)] for it in prompts])


def shape_prompts(manifest: Manifest, count: int, *, seed: int = 0) -> list[Prompt]:
    """Drawn scenes in wordings kept for evaluation: half of combinations in the training split
    ("seen"), half of combinations that were held out as a whole ("unseen"). Without held-out ones
    all are seen.

    ValueError when the data set holds no drawn scenes.
    """
    seen = _truths(manifest, "train")
    trained = {shapes.combination(truth) for truth in seen}
    unseen = [it for it in _truths(manifest, "heldout") if shapes.combination(it) not in trained]
    if not seen:
        raise ValueError(
            f"{manifest.dataset}, version {manifest.version}: no drawn scenes to train on; "
            f'score it with kind "captions"'
        )
    draws = np.random.default_rng([seed, 0])
    groups: list[tuple[Group, list[Mapping[str, Any]]]] = [
        ("seen", _choose(seen, count - count // 2 if unseen else count, draws)),
        ("unseen", _choose(unseen, count // 2, draws)),
    ]
    chosen = _interleave([(group, truth) for truth in truths] for group, truths in groups)
    return [
        Prompt(shapes.caption(_worded(truth), seed, index, "heldout"), group, truth)
        for index, (group, truth) in enumerate(chosen)
    ]


def dataset_prompts(manifest: Manifest, split: str, count: int, seed: int = 0) -> list[Prompt]:
    """Captions of one split, one per picture, different ones as long as there are any; fewer than
    `count` when the split has fewer.

    "heldout": combinations (for instance caption and style) that training never showed; "unseen":
    names it never showed.
    """
    if split not in GROUPS:
        raise ValueError(f"split must be {' or '.join(GROUPS)}, got {split!r}")
    rows = list(_rows(manifest, split, ["key", "captions", "label"]))
    order = np.random.default_rng([seed, 1 + list(GROUPS).index(split)]).permutation(len(rows))
    first: dict[str, Prompt] = {}
    again: list[Prompt] = []
    for number, index in enumerate(order):
        row = rows[index]
        text = row["captions"][number % len(row["captions"])]
        prompt = Prompt(text, GROUPS[split], _truth(row), row["key"])
        if prompt.text in first:
            again.append(prompt)
        else:
            first[prompt.text] = prompt
    return [*first.values(), *again][:count]


def caption_prompts(manifest: Manifest, count: int, *, seed: int = 0) -> list[Prompt]:
    """Captions of the held-out splits, in turns; where one split is short the other makes up for
    it.

    ValueError when nothing was held out.
    """
    lists = [dataset_prompts(manifest, split, count, seed) for split in ("heldout", "unseen")]
    prompts = list(_interleave(lists))[:count]
    if not prompts:
        raise ValueError(
            f"{manifest.dataset}, version {manifest.version}: no held-out captions to score with; "
            f"ingest with heldout_share > 0"
        )
    return prompts


def _rows(manifest: Manifest, split: str, columns: list[str]) -> Iterable[dict[str, Any]]:
    for shard in manifest.split(split):
        dropped = manifest.dropped(shard)
        rows = shards.read_table(manifest.dataset, shard.name, columns).to_pylist()
        yield from (it for row, it in enumerate(rows) if row not in dropped)


def _truth(row: Mapping[str, Any]) -> dict[str, Any] | None:
    return json.loads(row["label"]) if row["label"] else None


def _truths(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    """The different truths of the drawn scenes of a split, sorted by combination: shards come and
    go, the choice must not follow their order.
    """
    labels = {row["label"] for row in _rows(manifest, split, ["label"]) if row["label"]}
    truths = (json.loads(label) for label in labels)
    found = {
        (shapes.combination(truth), json.dumps(truth, sort_keys=True)): truth
        for truth in truths
        if "background" in truth
    }
    return [truth for _, truth in sorted(found.items(), key=lambda it: it[0])]


def _choose(items: list[Any], count: int, draws: np.random.Generator) -> list[Any]:
    """`count` items in random order; each comes once before any comes again."""
    if not items:
        return []
    rounds = -(-count // len(items))
    return [items[i] for _ in range(rounds) for i in draws.permutation(len(items))][:count]


def _interleave(lists: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """The lists in turns. Who goes first in a round follows Thue and Morse, so that every k-th
    prompt is balanced as well.
    """
    missing = object()
    for number, turn in enumerate(zip_longest(*lists, fillvalue=missing)):
        fair = turn[::-1] if number.bit_count() % 2 else turn
        yield from (it for it in fair if it is not missing)


def _worded(truth: Mapping[str, Any]) -> shapes.Scene:
    """A scene with the words of a truth; where its objects lie is left to the generator."""

    def thing(it: Mapping[str, Any]) -> shapes.Object:
        return shapes.Object(
            it["colour"], it["shape"], it.get("size", "small"), it.get("place"), 0.5, 0.5, 0.2
        )

    objects = tuple(thing(it) for it in truth.get("objects", (truth,)))
    return shapes.Scene(objects, truth["background"], truth.get("relation"))
