"""A data set is what its newest version manifest lists; what no manifest lists does not exist.

Versions are immutable and numbered from 1. The data version is the digest of the listed shards, so
a version that only records that the sources were looked at again changes nothing downstream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from . import storage

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def fingerprint(obj: Any) -> str:
    """16 hex characters that name a JSON value: blake2b of its canonical text."""
    return hashlib.blake2b(_canonical(obj).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One tar of samples, all of one split."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    dropped: int = 0
    """How many of its samples this version leaves out."""
    selection: str = ""
    """Names those: selections/{name}-{selection}.json; empty where all are in."""

    @property
    def selected(self) -> int:
        return self.samples - self.dropped


@dataclass(frozen=True)
class Manifest:
    """One version of a data set. `dataset` is where it was read from; it is not part of the stored
    text.
    """

    dataset: str
    version: int
    parent: int | None
    shards: tuple[Shard, ...]
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Outcomes of all input rows so far: seen = kept + filtered + rejected + duplicate, then
    "outcome:reason".
    """
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    """Source URL -> the fingerprint its listing had."""
    rules: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: str = ""
    """Names the table of what became of each row, by what it says: inputs/{inputs}.parquet."""
    redacted: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What was taken out of it later: the `digest` it had, the `keys`, whether it has `expired`."""

    @property
    def digest(self) -> str:
        """The data version: what was trained on, whatever happened around it and after it."""
        if self.redacted:
            return self.redacted["digest"]
        return fingerprint(
            [
                [shard.name, shard.sha256, *([shard.selection] if shard.selection else [])]
                for shard in self.split()
            ]
        )

    def split(self, *names: str) -> tuple[Shard, ...]:
        """The shards of the named splits (of all without names) of which any sample is selected, in
        manifest order.
        """
        return tuple(
            shard for shard in self.shards if shard.selected and (not names or shard.split in names)
        )

    def samples(self, *names: str) -> int:
        """How many samples of the named splits (all without names) are selected."""
        return sum(shard.selected for shard in self.split(*names))

    def stated(self) -> dict[str, Any]:
        """What its file says."""
        return {name: it for name, it in asdict(self).items() if name != "dataset"}

    def dropped(self, shard: Shard) -> dict[int, str]:
        """Row -> reason of the samples of a shard that this version leaves out, ascending."""
        if not shard.selection:
            return {}
        listed = storage.read_json(self.url("selections", f"{shard.name}-{shard.selection}.json"))
        return dict(zip(listed["rows"], listed["reasons"], strict=True))

    def url(self, folder: str, name: str) -> str:
        """A file of the data set, for instance `url("shards", "train-0123456789abcdef.tar")`."""
        return storage.join(self.dataset, folder, name)


def versions(dataset: str) -> list[int]:
    """The published versions, ascending."""
    names = storage.list_names(storage.join(dataset, "versions"))
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def latest(dataset: str) -> Manifest | None:
    """The newest version, or None where nothing was published."""
    numbers = versions(dataset)
    return read(dataset, numbers[-1]) if numbers else None


def read(dataset: str, version: int) -> Manifest:
    """One version. ValueError when it does not exist or is no manifest."""
    url = _url(dataset, version)
    try:
        content = storage.read_json(url)
    except FileNotFoundError:
        known = ", ".join(map(str, versions(dataset))) or "none"
        raise ValueError(f"{dataset}: no version {version} (published: {known})") from None
    try:
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        return Manifest(dataset=dataset, shards=shards, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url}: not a version manifest ({error})") from None


def blocked(dataset: str) -> dict[str, Any]:
    """Key -> why and when, of the pictures that may not come back, and what they looked like where
    that is known."""
    url = storage.join(dataset, "blocked.json")
    return storage.read_json(url) if storage.exists(url) else {}


def publish(manifest: Manifest) -> None:
    """Make the version visible. ValueError when that number was taken meanwhile."""
    url = _url(manifest.dataset, manifest.version)
    if not storage.create_exclusive(url, storage.json_bytes(manifest.stated())):
        raise ValueError(
            f"{url}: version {manifest.version} was published meanwhile by another run; "
            "run again to build on it"
        )


def _url(dataset: str, version: int) -> str:
    return storage.join(dataset, "versions", f"{version:06d}.json")
