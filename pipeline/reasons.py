"""Why a row of a version fared as it did, in numbers and names: looked up when somebody asks.

The table of a version has a reason for every row. The value and the bound, the picture that another
one resembles, the encoder that could make nothing of one: these lie in the shards' tables and
beside the encodings. Looked up for some rows, they cost the other millions nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from . import filters, shards, storage
from .filters import SELECTING, SelectionRules
from .manifest import Manifest, Shard
from .outcomes import STORED, Outcome, read_batches
from .schema import Encoding

LOOK_ALIKES = ("near_duplicate", "other_split")
_AT_MOST = 200  # look-alikes that are looked for, each among all pictures of a version


class Place(NamedTuple):
    """Where a picture is stored."""

    shard: Shard
    row: int


class _Met(NamedTuple):
    """The row by which a data set has a picture."""

    order: int
    id: str


def places(version: Manifest, keys: Collection[str]) -> dict[str, Place]:
    """Key -> where it is stored, of those that are."""
    wanted, found = set(keys), dict[str, Place]()
    for shard in version.shards:
        if found.keys() >= wanted:
            break
        column = shards.read_table(version.dataset, shard.name, ["key"])["key"].to_pylist()
        if some := wanted.intersection(column):
            found |= {key: Place(shard, row) for row, key in enumerate(column) if key in some}
    return found


def details(
    version: Manifest, rows: Sequence[Outcome], where: Mapping[str, Place] | None = None
) -> list[str]:
    """What there is to say of each row beyond its reason: its own `detail` where it has one, the
    value and the bound of the rule that left it out, or the picture that it is like. `where` gives
    the places of the filtered ones, where they are known.
    """
    filtered = [it for it in rows if it["outcome"] == "filtered"]
    if where is None:
        where = places(version, {it["key"] for it in filtered})
    by_rule = _by_rule(version, filtered, where)
    like = [it for it in filtered if it["reason"] in LOOK_ALIKES and it["key"] in where]
    some = {it["key"]: it["reason"] for it in like[:_AT_MOST]}
    alike = _alike(version, {key: (where[key], reason) for key, reason in some.items()})
    same = {it["key"] for it in rows if it["outcome"] == "duplicate"}
    met = _met(version, same.union(*alike.values()))

    def told(it: Outcome) -> str:
        key: str = it["key"]
        if it["detail"] or it["outcome"] not in ("filtered", "duplicate"):
            return it["detail"]
        if it["outcome"] == "duplicate":
            return f"same file as {met[key].id}" if key in met else ""
        if it["reason"] not in LOOK_ALIKES:
            return by_rule.get(key, "")
        if key not in alike:
            return "looks like an earlier picture: ask for this one alone to be told which"
        if not (others := [other for other in alike[key] if other in met]):
            return "the picture that it looked like is there no more"
        first = min(others, key=lambda other: met[other].order)
        return f"looks like {first} ({met[first].id})"

    return [told(it) for it in rows]


def _by_rule(
    version: Manifest, filtered: Iterable[Outcome], where: Mapping[str, Place]
) -> dict[str, str]:
    """Key -> what a rule that looks at one sample alone has against it."""
    from .score import read_scores
    from .select import scored

    def scores(shard: str) -> Mapping[str, Any]:
        return read_scores(version.dataset, shard, [*version.rules["scorers"].values()])

    rules = SelectionRules(**{name: it for name, it in version.rules.items() if name in SELECTING})
    by_shard: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    for it in filtered:
        if it["reason"] not in LOOK_ALIKES and it["key"] in where:
            shard, row = where[it["key"]]
            by_shard[shard.name].append((it["key"], it["reason"], row))
    found: dict[str, str] = {}
    for shard, some in by_shard.items():
        # The scores of models are files of their own: read where a reason is one of them.
        asked = {reason for _, reason, _ in some} & rules.scores.keys()
        here = replace(rules, scores={name: rules.scores[name] for name in asked})
        samples = scored(version.dataset, shard, here, scores)
        found |= {key: filters.told(reason, samples[row], rules) for key, reason, row in some}
    return found


def _alike(version: Manifest, wanted: Mapping[str, tuple[Place, str]]) -> dict[str, list[str]]:
    """Key -> the keys of the version's pictures that it may have been left out for."""
    from . import dedup

    found: dict[str, list[str]] = {key: [] for key in wanted}
    looks: dict[str, Any] = {}
    for key, (place, _) in wanted.items():
        table = shards.read_table(version.dataset, place.shard.name, ["look"])
        looks[key] = dedup.parsed(bytes.fromhex(table["look"][place.row].as_py()))
    for shard in version.split() if wanted else ():
        table = shards.read_table(version.dataset, shard.name, ["key", "look"])
        keys = table["key"].to_pylist()
        every = dedup.parsed(bytes.fromhex("".join(table["look"].to_pylist())))
        kept = np.ones(len(keys), bool)
        kept[[*version.dropped(shard)]] = False
        for key, (place, reason) in wanted.items():
            # Of its own split a picture may have look-alikes, where they are but kept apart.
            if reason == "near_duplicate" or shard.split != place.shard.split:
                hits = np.flatnonzero(dedup.alike(looks[key], every) & kept).tolist()
                found[key] += [keys[row] for row in hits]
    return found


def _met(version: Manifest, keys: Collection[str]) -> dict[str, _Met]:
    """Key -> the first row that brought its picture."""
    found: dict[str, _Met] = {}
    order = 0
    for batch in read_batches(version, ["id", "outcome", "key"]) if keys else ():
        for at, key in enumerate(batch["key"].to_pylist()):
            if key in keys and key not in found and batch["outcome"][at].as_py() in STORED:
                found[key] = _Met(order + at, batch["id"][at].as_py())
        order += len(batch)
    return found


@dataclass(frozen=True)
class Refusal:
    """Pictures of a version that an encoder gave no finite numbers for: its loader leaves them out.

    They are kept all the same, and count as kept: another encoder may read them.
    """

    encoder: str
    fingerprint: str
    reason: str
    keys: tuple[str, ...]


def refusals(version: Manifest, only: Collection[str] | None = None) -> list[Refusal]:
    """What encoders made nothing of, in all shards of a version or in those named `only`."""
    wanted = [shard for shard in version.split() if only is None or shard.name in only]
    folder, found = storage.join(version.dataset, "encodings"), list[Refusal]()
    for fingerprint in storage.list_names(folder) if wanted else ():
        here = Encoding.at(version.dataset, "", "image", fingerprint)
        names, keys = set(storage.list_names(here.url)), dict[str, list[str]]()
        for shard in wanted:
            if (name := f"{shard.name}.rejected.json") in names:
                listed = storage.read_json(storage.join(here.url, name))
                rows = zip(listed["rows"], listed["keys"], strict=True)
                dropped = version.dropped(shard)
                some = [key for row, key in rows if row not in dropped]
                keys.setdefault(listed["reason"], []).extend(some)
        name = storage.read_json(here.stated_url())["name"] if keys else ""
        found += [
            Refusal(name, fingerprint, reason, tuple(some)) for reason, some in keys.items() if some
        ]
    return found
