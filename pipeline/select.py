"""Which of the stored samples a version is made of: rules over the scores in the shards' tables.

No picture is read for it. A shard of which samples are left out has a small file that says which
and why, named by what it says, so that versions share these files as they share shards. What was
decided of a shard stands while the rules stand: growth drops nothing that was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import filters, shards, storage
from .filters import SelectionRules
from .manifest import Manifest, Shard, fingerprint

_COLUMNS = ["key", "captions", "original_width", "original_height", "aspect", "look"]

ModelScores = Callable[[str], Mapping[str, Any]]
"""A shard's name -> an array for each score, row by row those of the shard."""


def select(
    dataset: str,
    stored: Sequence[Shard],
    met: Mapping[str, int],
    rules: SelectionRules,
    scores: ModelScores,
    decided: Collection[str] = (),
) -> tuple[Shard, ...]:
    """The shards with what is to be left out of each, published.

    `met` says of each key when its picture was first met: of two that look the same, the earlier
    one stays. `decided` names the shards whose selection stands.
    """
    from . import dedup

    here = Manifest(dataset, 0, None, tuple(stored))
    alike = dedup.NearDuplicates() if rules.near_duplicates != "keep" else None
    candidates: list[tuple[int, Shard, int, dict[str, Any]]] = []
    for shard in stored:
        rows = _scored(dataset, shard, rules, scores)
        if shard.name not in decided:
            candidates += [(met[it["key"]], shard, row, it) for row, it in enumerate(rows)]
        elif alike:
            dropped = here.dropped(shard)
            for row, it in enumerate(rows):
                if row not in dropped:
                    alike.add(it["look"], shard.split)
    each, reasons = rules.rules(), dict[str, dict[int, str]]()
    for _, shard, row, it in sorted(candidates, key=lambda it: it[0]):
        reason = filters.first_reason(each, it)
        if alike and not reason:
            reason = _look_alike(alike.like(it["look"]), shard.split, rules.near_duplicates)
            if not reason:
                alike.add(it["look"], shard.split)
        if reason:
            reasons.setdefault(shard.name, {})[row] = reason
    return tuple(
        it if it.name in decided else publish_selection(dataset, it, reasons.get(it.name, {}))
        for it in stored
    )


def dropped_keys(version: Manifest) -> dict[str, str]:
    """Key -> reason of all stored samples that a version leaves out."""
    found: dict[str, str] = {}
    for shard in version.shards:
        if dropped := version.dropped(shard):
            keys = shards.read_table(version.dataset, shard.name, ["key"])["key"].to_pylist()
            found |= {keys[row]: reason for row, reason in dropped.items()}
    return found


def _look_alike(splits: set[str], own: str, rule: str) -> str | None:
    if not splits:
        return None
    if rule == "drop":
        return "near_duplicate"
    # One of two that look the same would be learnt, and the other would ask for it.
    return "other_split" if splits != {own} else None


def _scored(
    dataset: str, shard: Shard, rules: SelectionRules, scores: ModelScores
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shards.read_table(dataset, shard.name, _COLUMNS).to_pylist()
    of_models: dict[str, Any] = {**scores(shard.name)} if rules.scores else {}
    if missing := rules.scores.keys() - of_models.keys():
        raise ValueError(
            f"{dataset}: rules speak of the score {min(missing)!r}, which no scorer gives "
            f"({', '.join(of_models) or 'there is none'}); name a scorer of that name"
        )
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
