"""What is taken out of the versions of a data set: pictures that must go, files nobody needs.

Versions never change, with two exceptions, which say so in `redacted` and keep the digest by which
models know them: a taken-down picture leaves all of them, and an old one may expire. Each step can
be killed and done again: the blocklist comes first, files that a manifest lists are deleted last.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from . import storage
from .carry import carry
from .ingest import FOLDERS
from .manifest import Manifest, Shard, blocked, latest, publish, read, versions
from .outcomes import batch_of, has_table, read_batches, table_name, writing

_KEY = re.compile("[0-9a-f]{32}")
_TOGETHER = 128
"""Shards that are merged at once; each keeps files open."""
_OF_SHARD = re.compile(r"([a-z]+-[0-9a-f]{16})(?:[-.].*)?")


@dataclass(frozen=True)
class Removal:
    """What a take-down found."""

    manifest: Manifest
    """The newest version, without the pictures."""
    held: Mapping[str, tuple[str, ...]]
    """Digest by which a version was known -> the keys it held; models that learnt from it saw
    them."""
    absent: tuple[str, ...]
    """Keys that no version held; they are blocked all the same."""
    alike: tuple[str, ...] = ()
    """Keys that the newest version still stores, of pictures that look the same as one of them."""


@dataclass(frozen=True)
class Garbage:
    """What `gc` removed, or would."""

    files: tuple[str, ...]
    """Below the data set."""
    bytes: int
    expired: tuple[int, ...]
    """Versions of which nothing but the digest is left."""


def remove(dataset: str, keys: Iterable[str], reason: str = "") -> Removal:
    """Purge pictures from all versions, and let them never come back.

    Their shards are written anew without them, and so is what was computed from those; the
    versions that held them are redacted, and a new one follows. The blocklist keeps the look of
    those that were held, so that their files saved anew do not come in either (but flat pictures,
    whose looks tell nothing); what is stored and looks the same stays, and is named. ValueError: no
    data set there, no keys, or something that is no key; nothing is done then.
    """
    wanted = sorted({key.strip().lower() for key in keys})
    if odd := [key for key in wanted if not _KEY.fullmatch(key)]:
        raise ValueError(f"{odd[0]!r} is no key: wanted 32 hex characters (`darkroom explain`)")
    if not wanted:
        raise ValueError("no keys given; nothing to remove")
    dataset = storage.absolute(dataset)
    if latest(dataset) is None:
        raise ValueError(f"{dataset}: no data set there")
    with storage.lock(storage.join(dataset, ".lock")):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        looks = _looks(dataset, frozenset(wanted))
        listed = {key: {"reason": reason, "time": now} for key in wanted} | blocked(dataset)
        listed |= {key: {**listed[key], "look": look} for key, look in looks.items()}
        storage.publish_json(storage.join(dataset, "blocked.json"), listed)
        # A killed run's staged pictures may be among them; what it had read is read again.
        storage.delete(storage.join(dataset, "staging"))
        without, gone = _Without(dataset, frozenset(wanted)), set[str]()
        held: dict[str, tuple[str, ...]] = {}
        for number in versions(dataset):
            version = read(dataset, number)
            found = without.redact(version)
            gone |= found
            found |= set(version.redacted.get("keys", ())) & set(wanted)
            if found:
                held[version.digest] = tuple(sorted(found))
        newest = read(dataset, versions(dataset)[-1])
        if newest.redacted:
            newest = _follow(newest)
        _collect(dataset)
        # An ingest that would write them waits for the lock. An encoder elsewhere does not, but it
        # may be at work on what has to go: its run fails, and can be done again.
        _sweep(dataset, all_foreign=True)
        alike = _alike(newest, [it["look"] for key in wanted if "look" in (it := listed[key])])
    everywhere = set[str]().union(*held.values())
    return Removal(newest, held, tuple(key for key in wanted if key not in everywhere), alike)


def gc(dataset: str, keep: int = 0, dry_run: bool = False) -> Garbage:
    """Delete what no version lists; with `keep`, let all but the newest so many versions expire.

    ValueError: no data set there. On object stores, where nothing can lock, no ingest may run
    meanwhile.
    """
    dataset = storage.absolute(dataset)
    if latest(dataset) is None:
        raise ValueError(f"{dataset}: no data set there")
    if keep < 0:
        raise ValueError(f"keep must be at least 0 (all versions), got {keep}")
    with storage.lock(storage.join(dataset, ".lock")):
        old = versions(dataset)[:-keep] if keep else []
        old = [number for number in old if not read(dataset, number).redacted.get("expired")]
        if not dry_run:
            for number in old:
                version = read(dataset, number)
                said = {**version.redacted, "digest": version.digest, "expired": True}
                _rewrite(replace(version, shards=(), redacted=said))
        return _collect(dataset, old, dry_run)


def compact(dataset: str) -> Manifest:
    """Merge the small shards that growth leaves into full ones: a new version with the same
    samples, and what was made of them. The latest one as it is where there is nothing to merge.

    ValueError: no data set there.
    """
    dataset = storage.absolute(dataset)
    with storage.lock(storage.join(dataset, ".lock")):
        before = latest(dataset)
        if before is None:
            raise ValueError(f"{dataset}: no data set there")
        _sweep(dataset)
        after = before
        while groups := _groups(after):  # every round leaves fewer shards
            merged: dict[str, list[Shard]] = {}  # the first of a group stands for all of them
            for group in groups:
                merged[group[0].name] = _merge(after, group)
                merged |= {shard.name: [] for shard in group[1:]}
            shards = [new for shard in after.shards for new in merged.get(shard.name, [shard])]
            after = replace(after, shards=tuple(shards))
        if after is before:
            return before
        after = replace(after, version=before.version + 1, parent=before.version)
        publish(after)
        return after


def _groups(version: Manifest) -> list[list[Shard]]:
    """Shards that are at most half full, in samples and in bytes, by what may stand together: two
    at least, and no more than may be open at a time."""
    found: dict[tuple[str, bool], list[Shard]] = {}
    for shard in version.shards:
        if (
            2 * shard.samples <= version.rules["shard_samples"]
            and 2 * shard.bytes <= version.rules["shard_bytes"]
        ):
            found.setdefault((shard.split, shard.selected > 0), []).append(shard)
    return [
        group
        for shards in found.values()
        for first in range(0, len(shards), _TOGETHER)
        if len(group := shards[first : first + _TOGETHER]) > 1
    ]


def _merge(version: Manifest, group: list[Shard]) -> list[Shard]:
    """Full shards with the samples of these, in the order of their keys."""
    from . import shards
    from .select import publish_selection

    dataset = version.dataset
    places: dict[str, tuple[str, int]] = {}
    reasons: dict[str, str] = {}
    for shard in group:
        dropped = version.dropped(shard)
        keys = shards.read_table(dataset, shard.name, ["key"])["key"].to_pylist()
        places |= {key: (shard.name, row) for row, key in enumerate(keys)}
        reasons |= {keys[row]: reason for row, reason in dropped.items()}
    count = max(
        -(-len(places) // version.rules["shard_samples"]),
        -(-sum(shard.bytes for shard in group) // version.rules["shard_bytes"]),
    )
    urls = (version.url("shards", f"{shard.name}.tar") for shard in group)
    samples = heapq.merge(*map(shards.read_shard, urls), key=lambda sample: sample.key)
    order, made = sorted(places), list[Shard]()
    for index in range(count):
        some = order[index * len(order) // count : (index + 1) * len(order) // count]
        new = shards.write_shard(itertools.islice(samples, len(some)), dataset, group[0].split)
        carry(dataset, new, places)
        left_out = {row: reasons[key] for row, key in enumerate(some) if key in reasons}
        made.append(publish_selection(dataset, new, left_out))
    return made


# ---- a take-down ---------------------------------------------------------------------------------


def _looks(dataset: str, keys: frozenset[str]) -> dict[str, str]:
    """The looks of those of the keys that any version holds."""
    from . import shards

    names = {shard.name for number in versions(dataset) for shard in read(dataset, number).shards}
    found: dict[str, str] = {}
    for name in sorted(names):
        if found.keys() >= keys:
            break
        held = shards.read_table(dataset, name, ["key"])["key"].to_pylist()
        if not keys.isdisjoint(held):
            table = shards.read_table(dataset, name)
            if "look" in table.column_names:  # the first ones had none
                looks = zip(held, table["look"].to_pylist(), strict=True)
                found |= {key: look for key, look in looks if key in keys and look}
    return found


def _alike(version: Manifest, looks: list[str]) -> tuple[str, ...]:
    """The keys of the pictures of a version that look the same as one of these."""
    from . import dedup, shards

    if not looks:
        return ()
    gone, found = dedup.parsed(bytes.fromhex("".join(looks))), list[str]()
    for shard in version.shards:
        table = shards.read_table(version.dataset, shard.name, ["key", "look"])
        some = dedup.parsed(bytes.fromhex("".join(table["look"].to_pylist())))
        keys = table["key"].to_pylist()
        found += [keys[row] for row in (dedup.find(some, gone) >= 0).nonzero()[0]]
    return tuple(sorted(found))


class _Without:
    """Versions without these keys; a shard that several of them list is written once."""

    def __init__(self, dataset: str, keys: frozenset[str]):
        self.dataset, self.keys = dataset, keys
        self._known: dict[str, tuple[Shard | None, list[str]]] = {}

    def redact(self, version: Manifest) -> set[str]:
        """Take the keys out of one version; those that it held."""
        held: set[str] = set()
        shards: list[Shard] = []
        for shard in version.shards:
            other, order = self._shard(shard)
            gone = self.keys.intersection(order)
            held |= gone
            if not gone:
                shards.append(shard)
            elif other:
                shards.append(_selected(version, shard, other, order, gone))
        stated = {"inputs": version.inputs, "counts": version.counts}
        if has_table(version):
            with writing(self.dataset) as (table, publish_table):
                for batch in read_batches(version):
                    table.add(self._struck(batch, held))
                if held:
                    stated = {"inputs": publish_table(), "counts": table.counts}
        if held:
            keys = sorted(held.union(version.redacted.get("keys", ())))
            said = {**version.redacted, "digest": version.digest, "keys": keys}
            _rewrite(replace(version, shards=tuple(shards), redacted=said, **stated))
        return held

    def _struck(self, batch: Any, held: set[str]) -> Any:
        """Rows of the table, those of the keys as removed; `held` learns of them."""
        if self.keys.isdisjoint(batch["key"].to_pylist()):
            return batch
        outcomes = batch.to_pylist()
        for it in outcomes:
            if it["key"] in self.keys and it["outcome"] != "rejected":
                held.add(it["key"])
                it |= {"outcome": "rejected", "reason": "removed", "detail": "", "split": ""}
        return batch_of(outcomes)

    def _shard(self, shard: Shard) -> tuple[Shard | None, list[str]]:
        """(the shard without the keys, None where nothing is left; the keys it holds)."""
        from . import shards

        if shard.name not in self._known:
            order: list[str] = shards.read_table(self.dataset, shard.name, ["key"])[
                "key"
            ].to_pylist()
            other: Shard | None = shard
            if not self.keys.isdisjoint(order):
                url = storage.join(self.dataset, "shards", f"{shard.name}.tar")
                rest = [it for it in order if it not in self.keys]
                left = (it for it in shards.read_shard(url) if it.key not in self.keys)
                other = shards.write_shard(left, self.dataset, shard.split) if rest else None
                if other:
                    places = {key: (shard.name, row) for row, key in enumerate(order)}
                    carry(self.dataset, other, places)
            self._known[shard.name] = other, order
        return self._known[shard.name]


def _selected(
    version: Manifest, before: Shard, after: Shard, order: list[str], gone: Collection[str]
) -> Shard:
    """The new shard with what the version leaves out of it."""
    from .select import publish_selection

    dropped = version.dropped(before)
    rows = [row for row, key in enumerate(order) if key not in gone]
    reasons = {new: dropped[row] for new, row in enumerate(rows) if row in dropped}
    return publish_selection(version.dataset, after, reasons)


def _rewrite(version: Manifest) -> None:
    storage.publish_json(version.url("versions", f"{version.version:06d}.json"), version.stated())


def _follow(newest: Manifest) -> Manifest:
    """A version like the redacted one, with a digest of its own."""
    following = replace(newest, version=newest.version + 1, parent=newest.version, redacted={})
    publish(following)
    return following


# ---- what no version lists -----------------------------------------------------------------------


def _collect(dataset: str, expiring: Collection[int] = (), dry_run: bool = False) -> Garbage:
    needed = _needed([read(dataset, number) for number in versions(dataset)], expiring)
    found = {
        path: int(stamp.partition("-")[0])
        for path, stamp in storage.list_stamps(dataset).items()
        if not needed(path)
    }
    if not dry_run:
        for path in found:
            url = storage.join(dataset, path)
            storage.delete(url)
            storage.forget(url)
        _sweep(dataset)
    return Garbage(tuple(found), sum(found.values()), tuple(expiring))


def _sweep(dataset: str, all_foreign: bool = False) -> None:
    """Remove what killed runs left half written: it may hold what has to go."""
    for folder in ("", *FOLDERS):
        storage.sweep(storage.join(dataset, folder), all_foreign)
    for folder in ("encodings", "scores"):
        for name in storage.list_names(storage.join(dataset, folder)):
            storage.sweep(storage.join(dataset, folder, name), all_foreign)


def _needed(all: Collection[Manifest], expiring: Collection[int]) -> Callable[[str], bool]:
    """Whether a file below the data set is one that a version reads, or not ours to judge. What
    became of its rows is known of an expired version too: models learnt from it.
    """
    kept = [version for version in all if version.version not in expiring]
    shards = {shard.name for version in kept for shard in version.shards}
    selections = {f"{shard.name}-{shard.selection}" for version in kept for shard in version.shards}
    inputs = {table_name(version) for version in all}

    def needed(path: str) -> bool:
        folder, _, rest = path.partition("/")
        name = rest.rpartition("/")[2]
        if folder == "inputs":
            return name in inputs
        if folder == "staging":
            return storage.is_local(kept[0].dataset)  # what runs there left, and nobody cleared
        if folder == "selections":
            return name.partition(".")[0] in selections
        if folder not in ("shards", "tables", "encodings", "scores"):
            return True
        of = _OF_SHARD.fullmatch(name)
        return not of or of[1] in shards

    return needed
