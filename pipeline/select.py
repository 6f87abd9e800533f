"""Which of the stored samples a version is made of: rules over the scores in the shards' tables.

No picture is read for it. A shard of which samples are left out has a small file that says which
and why, named by what it says, so that versions share these files as they share shards. What was
decided of a shard stands while the rules stand: growth drops nothing that was kept.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import filters, shards, storage
from .filters import SelectionRules
from .manifest import Manifest, Shard, fingerprint
from .rows import Positions, names_of, names_of_keys

_COLUMNS = ["captions", "original_width", "original_height", "aspect"]

ModelScores = Callable[[str], Mapping[str, Any]]
"""A shard's name -> an array for each score, row by row those of the shard."""


def select(
    dataset: str,
    stored: Sequence[Shard],
    met: Positions,
    rules: SelectionRules,
    scores: ModelScores,
    decided: Collection[str] = (),
    runs: Sequence[int] = (),
) -> tuple[Shard, ...]:
    """The shards with what is to be left out of each, published.

    `met` says of each key when its picture was first met, `runs` where in that order a new run
    began: see `SelectionRules.near_duplicates`. `decided` names the shards whose selection stands.
    """
    here = Manifest(dataset, 0, None, tuple(stored))
    each, reasons = rules.rules(), dict[int, dict[int, str]]()
    looks = _Looks(dataset, runs) if rules.near_duplicates != "keep" else None
    for number, shard in enumerate(stored):
        if shard.name in decided:
            if looks:
                out = here.dropped(shard)
                looks.add(number, shard, [row for row in range(shard.samples) if row not in out])
            continue
        left = reasons.setdefault(number, {})
        rows = scored(dataset, shard.name, rules, scores)
        for row, it in enumerate(rows):
            if reason := filters.first_reason(each, it):
                left[row] = reason
        if looks:
            looks.add(number, shard, [row for row in range(len(rows)) if row not in left], met)
    if looks:
        for number, row, reason in looks.left_out(rules.near_duplicates):
            reasons[number][row] = reason
    return tuple(
        publish_selection(dataset, it, reasons[number]) if number in reasons else it
        for number, it in enumerate(stored)
    )


def left_out(version: Manifest) -> tuple[np.ndarray, list[str]]:
    """(names of the keys, reasons) of all stored samples that a version leaves out."""
    names, reasons = bytearray(), list[str]()
    for shard in version.shards:
        if dropped := version.dropped(shard):
            keys = shards.read_table(version.dataset, shard.name, ["key"])["key"].to_pylist()
            names += bytes.fromhex("".join(keys[row] for row in dropped))
            reasons += map(sys.intern, dropped.values())
    return names_of(names), reasons


class _Looks:
    """Samples that may look the same as one another, a few dozen bytes of each."""

    def __init__(self, dataset: str, runs: Sequence[int] = ()):
        self.dataset, self.runs = dataset, runs
        self.keys = bytearray()
        self.look = bytearray()
        self.shard: array[int] = array("q")
        self.row: array[int] = array("q")
        self.met: array[int] = array("q")
        self.splits: list[str] = []

    def add(
        self, number: int, shard: Shard, rows: Sequence[int], met: Positions | None = None
    ) -> None:
        """Some rows of a shard; without `met`, such as stay whatever is like them."""
        if not rows:
            return
        table = shards.read_table(self.dataset, shard.name, ["key", "look"]).take(rows)
        self.look += bytes.fromhex("".join(table["look"].to_pylist()))
        self.shard.extend([number] * len(rows))
        self.row.extend(rows)
        names = names_of_keys(table["key"].to_pylist())
        self.keys += names.tobytes()
        self.met.extend(met(names).tolist() if met else [-1] * len(rows))
        self.splits += [shard.split] * (number + 1 - len(self.splits))

    def left_out(self, rule: str) -> Iterator[tuple[int, int, str]]:
        """(number of the shard, row, reason) of those that go: in order, each one that looks the
        same as one that stays."""
        from . import dedup

        met = np.array(self.met)
        neighbours = dedup.Neighbours(dedup.parsed(self.look))
        staying = [0] * len(neighbours)  # a bit for each split in which such a look stays
        bits = {split: 1 << at for at, split in enumerate(dict.fromkeys(self.splits))}
        order: list[int] = self._order(rule, met).tolist()
        for at in order:
            look = int(neighbours.of[at])
            if look < 0:
                continue
            shard = self.shard[at]
            own = bits[self.splits[shard]]
            seen = 0
            for other in neighbours[look] if met[at] >= 0 else ():
                seen |= staying[other]
            # One of two that look the same would be learnt, and the other would ask for it.
            if rule == "drop" and seen:
                yield shard, self.row[at], "near_duplicate"
            elif rule == "apart" and seen & ~own:
                yield shard, self.row[at], "other_split"
            else:
                staying[look] |= own

    def _order(self, rule: str, met: np.ndarray) -> np.ndarray:
        """What stands comes first, then what came in earlier runs."""
        if rule == "drop":
            return np.argsort(met, kind="stable")
        # Which split a picture is lost to must not follow from the order of files: keys are
        # hashes, and favour none.
        order = np.argsort(names_of(self.keys), kind="stable")
        run = np.where(met < 0, -1, np.searchsorted(sorted(self.runs), met, "right"))
        return order[np.argsort(run[order], kind="stable")]


def scored(
    dataset: str, shard: str, rules: SelectionRules, scores: ModelScores
) -> list[dict[str, Any]]:
    """What rules go by of each sample of a shard."""
    rows: list[dict[str, Any]] = shards.read_table(dataset, shard, _COLUMNS).to_pylist()
    of_models: dict[str, Any] = {**scores(shard)} if rules.scores else {}
    assert rules.scores.keys() <= of_models.keys(), (shard, rules.scores, of_models.keys())
    for row, it in enumerate(rows):
        it["caption"] = it["captions"][0]
        it |= {name: values[row] for name, values in of_models.items()}
    return rows


def publish_selection(dataset: str, shard: Shard, reasons: Mapping[int, str]) -> Shard:
    """The shard of which these rows are left out."""
    if not reasons:
        return replace(shard, dropped=0, selection="")
    rows = sorted(reasons)
    listed = {"rows": rows, "reasons": [reasons[row] for row in rows]}
    selection = fingerprint(listed)
    url = storage.join(dataset, "selections", f"{shard.name}-{selection}.json")
    if not storage.exists(url):
        storage.publish_json(url, listed)
    return replace(shard, dropped=len(rows), selection=selection)
