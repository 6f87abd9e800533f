"""What became of every input row: a parquet beside each version, and its sums.

A row is kept, filtered (a rule), rejected (broken, hostile, out of reach) or a duplicate; never two
of them, and never none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from . import storage
from .manifest import Manifest, latest, read, versions

OUTCOMES = ("kept", "filtered", "rejected", "duplicate")
STORED = ("kept", "filtered")
"""Of which the shards hold the picture: a version with other rules may choose otherwise."""
_TEXTS = ("id", "stamp", "source", "outcome", "reason", "detail", "key", "split")

Outcome = Mapping[str, Any]
"""The columns of the table: texts, and a list of `flags`."""


class Rejected(Exception):
    """A picture or row that cannot be used: a reason code, and what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail[:200].encode("utf-8", "backslashreplace").decode()


def count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Rows by outcome and by outcome:reason, and how often each flag was raised."""
    totals = Counter(it["outcome"] for it in outcomes)
    counts = {name: totals[name] for name in OUTCOMES}
    assert sum(counts.values()) == len(outcomes), f"rows without an outcome: {totals}"
    details = Counter(f"{it['outcome']}:{it['reason']}" for it in outcomes if it["reason"])
    details.update(f"flag:{flag}" for it in outcomes for flag in it["flags"])
    return {"seen": len(outcomes), **counts, **dict(sorted(details.items()))}


def read_outcomes(version: Manifest) -> list[dict[str, Any]]:
    """Of all rows that a version has seen, in the order they were met."""
    from . import shards

    return shards.read_parquet(_url(version)).to_pylist()


def write_outcomes(version: Manifest, outcomes: Sequence[Outcome]) -> None:
    from . import shards

    columns = {name: shards.Column("text", [it[name] for it in outcomes]) for name in _TEXTS}
    columns["flags"] = shards.Column("texts", [it["flags"] for it in outcomes])
    storage.publish_bytes(_url(version), shards.parquet_bytes(columns))
    storage.forget(_url(version))  # a take-down writes it anew


def explain(dataset: str, wanted: str) -> list[dict[str, Any]]:
    """What became of the rows whose key begins with `wanted` or whose id has it in it: their
    outcomes, each with the first `version` that has it and, where stored, its `shard`.

    ValueError: there is no data set, or it has seen no such row.
    """
    last = latest(dataset)
    if last is None:
        raise ValueError(f"{dataset}: no data set there")
    found = [
        it
        for it in read_outcomes(last)
        if it["key"].startswith(wanted.lower()) or wanted in it["id"]
    ]
    if not found:
        raise ValueError(
            f"{dataset} version {last.version} has seen no row whose key begins with {wanted!r} or "
            f"whose id has it in it; it has seen {last.counts['seen']} rows"
        )
    shards = _shards_of(dataset, last, {it["key"] for it in found if it["outcome"] in STORED})
    first: dict[tuple[str, ...], int] = {}
    for version in versions(dataset):
        known = read(dataset, version)
        for it in () if known.redacted.get("expired") else read_outcomes(known):
            first.setdefault(_identity(it), version)
    return [
        {**it, "version": first[_identity(it)], "shard": shards.get(it["key"], "")} for it in found
    ]


def _identity(it: Outcome) -> tuple[str, ...]:
    """A row may have been out of reach in one version and kept in the next."""
    return it["id"], it["stamp"], it["outcome"], it["reason"]


def _shards_of(dataset: str, version: Manifest, keys: set[str]) -> dict[str, str]:
    """Key -> name of the shard that holds it."""
    from . import shards

    found: dict[str, str] = {}
    for shard in version.shards:
        if found.keys() >= keys:
            break
        column = shards.read_table(dataset, shard.name, ["key"])["key"].to_pylist()
        found |= dict.fromkeys(keys.intersection(column), shard.name)
    return found


def _url(version: Manifest) -> str:
    return version.url("inputs", f"{version.version:06d}.parquet")
