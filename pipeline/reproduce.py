"""A version made again, elsewhere, from what it says of itself: its manifest, the tables beside its
shards, its selections and its table of inputs. No tar of it is read, and no other version.

Those tell which samples stand in which shard, what they are called, what is left out and why, so
nothing is decided again. The sources give the pictures. A row is found by its id, and a picture is
the right one if its file has the key, whenever it was written; each shard must have its sha256.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import shards, storage
from .download import DownloadRules
from .execute import Executor
from .ingest import CODE, FOLDERS, NO_SCORERS, IngestResult, IngestRules, Progress
from .manifest import Manifest, Shard, blocked, latest, publish
from .outcomes import STORED, read_batches, table_name
from .passes import MAY_CHANGE, Record, Rows, Run
from .rows import Lines, Positions, names_of, names_of_keys, row_name
from .select import publish_selection
from .sources import Row, Source, SourceOptions, open_source
from .units import told, writer

_UNSAID = ("incomplete", "no_caption")
"""What a source may say of a row now: the version has its captions, and wants the picture alone."""


def reproduce(
    version: Manifest,
    dataset: str,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make `version` again as the first version of a data set that does not exist yet; run again
    when killed. Of a version that was redacted, what is left; its blocklist goes along.

    ValueError: there is a data set, the version expired, the code is another, pictures are gone or
    have changed (names some), or a shard came out otherwise; nothing is published then.
    """
    dataset = storage.absolute(dataset)
    where = _where(version)
    if latest(dataset):
        raise ValueError(f"{dataset}: there is a data set; name one that does not exist yet")
    if version.redacted.get("expired"):
        raise ValueError(
            f"{where}: `darkroom gc --keep` let it expire, and with it what its shards were; "
            "it cannot be made again"
        )
    if version.rules["code"] != CODE:
        raise ValueError(
            f"{where}: made by data code {version.rules['code']}, this is {CODE}; "
            "use the darkroom that made it"
        )
    rules = replace(rules_of(version), removed_lookalikes="keep")  # those it has, it has
    needed = _Needed.of(version)
    run = _Again(
        dataset, rules, executor or Executor(), progress, NO_SCORERS, None, None,
        version=version, needed=needed,
    )  # fmt: skip
    sources = [open_source(url, options=rules.options) for url in needed.sources]
    with storage.lock(storage.join(dataset, ".lock")):
        return run.run(sources, version.sources).manifest


def rules_of(version: Manifest) -> IngestRules:
    """The rules by which a version was made."""
    names = IngestRules.__dataclass_fields__.keys() - {"kind"}
    rules: dict[str, Any] = {name: it for name, it in version.rules.items() if name in names}
    rules["options"] = SourceOptions(**rules["options"])
    download: dict[str, Any] = {**rules["download"]}
    download["private_hosts"] = tuple(download["private_hosts"])
    rules["download"] = DownloadRules(**download)
    rules["background"] = tuple(rules["background"])
    return IngestRules(**rules)


@dataclass(frozen=True)
class _Needed:
    """What of its sources a version is made of."""

    keys: np.ndarray
    """Names of the keys of its samples, shard by shard."""
    rows: Positions
    """By id alone: stamps tell when a file was written, and copies are written later."""
    sources: tuple[str, ...]
    flags: np.ndarray
    """Of each sample the number of its `kinds`."""
    kinds: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, version: Manifest) -> _Needed:
        keys = names_of_keys(key for shard in version.shards for key in _column(version, shard))
        place, flags = Positions(keys), np.zeros(len(keys), np.int64)
        rows, sources, kinds = bytearray(), dict[str, None](), {(): 0}
        columns = ["id", "source", "outcome", "key", "flags"]
        for batch in read_batches(version, columns):
            texts = (batch[name].to_pylist() for name in columns)
            for row, source, outcome, key, raised in zip(*texts, strict=True):
                if outcome in STORED:
                    (at,) = place(names_of_keys([key])).tolist()
                    flags[at] = kinds.setdefault(tuple(raised), len(kinds))
                    rows += row_name(row, "")
                    sources[source] = None
        return cls(keys, Positions(names_of(rows)), tuple(sources), flags, tuple(kinds))


@dataclass(frozen=True)
class _Again(Run):
    """A run whose decisions are on record."""

    version: Manifest = field(kw_only=True)
    needed: _Needed = field(kw_only=True)

    def _run(self, sources: Sequence[Source], prints: Mapping[str, str]) -> IngestResult:
        for folder in FOLDERS:
            storage.sweep(storage.join(self.dataset, folder))
        gone = self._block()
        with contextlib.closing(Rows(self.dataset)) as rows:
            self._list_needed(sources, rows)
            staged = self._read(rows, prints)
            made = self._write_again(rows, staged, self._found(rows))
        manifest = replace(
            self.version, dataset=self.dataset, version=1, parent=None, shards=made, redacted={}
        )
        table, copy = (it.url("inputs", table_name(it)) for it in (self.version, manifest))
        with open(storage.local_copy(table), "rb") as file, storage.publishing(copy) as to:
            shutil.copyfileobj(file, to)
        self._check_undisturbed(manifest, gone)
        publish(manifest)
        self._clean()
        return IngestResult(manifest, manifest.counts, manifest.samples(), reused=False)

    def _block(self) -> Mapping[str, Any]:
        """What may not come back there may not come back here."""
        gone = blocked(self.version.dataset)
        if not gone:
            return blocked(self.dataset)
        hit = Positions(self.needed.keys)(names_of_keys(gone)) >= 0
        if hit.any():
            key = [*gone][int(hit.argmax())]
            raise ValueError(
                f"{_where(self.version)}: still has {key}, which is blocked: its take-down did not "
                f"come to an end; run `darkroom remove {self.version.dataset} {key}` again"
            )
        gone = {**gone, **blocked(self.dataset)}
        storage.publish_json(storage.join(self.dataset, "blocked.json"), gone)
        return gone

    def _list_needed(self, sources: Sequence[Source], rows: Rows) -> None:
        for number, source in enumerate(sources):
            for some in _some(source.rows()):
                names = names_of(b"".join(row_name(row.id, "") for row in some))
                for row, at in zip(some, self.needed.rows(names).tolist(), strict=True):
                    if at >= 0:
                        problem = None if row.problem in _UNSAID else row.problem
                        captions = row.captions or ("",)
                        row = replace(row, captions=captions, problem=problem)
                        rows.list(number, row, again=False)

    def _found(self, rows: Rows) -> np.ndarray:
        """The number of the row that has each sample's picture."""
        usable = np.flatnonzero(~np.array(rows.rejected, bool))
        at = Positions(rows.names[usable])(self.needed.keys)
        if (at < 0).any():
            said = self._missing(rows, np.flatnonzero(at < 0))
            lost = np.flatnonzero(np.array(rows.rejected, bool)).tolist()
            # The next call asks again for what was out of reach, and has the rest; what is wrong
            # with a picture may be mended, and is read again.
            if not any(rows.found[number]["reason"] in MAY_CHANGE for number in lost):
                self._clean()
            raise ValueError(said)
        return usable[at]

    def _missing(self, rows: Rows, samples: np.ndarray) -> str:
        ids = [it for shard in self.version.shards for it in _column(self.version, shard, "source")]
        lost = sorted(ids[int(at)] for at in samples)[:3]
        fate: dict[str, str] = dict.fromkeys(lost, "no longer listed")
        for number in range(len(rows)):
            row: str = rows.said[number][0]
            if row in fate:
                reason, detail = (rows.found[number].get(it, "") for it in ("reason", "detail"))
                fate[row] = f"{reason}: {detail}" if reason else "another picture now"
        listed = ", ".join(f"{row} ({why})" for row, why in fate.items())
        return (
            f"{_where(self.version)}: {len(samples)} of {len(ids)} pictures are gone or have "
            f"changed: {listed}; put them back where they were"
        )

    def _write_again(
        self, rows: Rows, staged: Sequence[str], found: np.ndarray
    ) -> tuple[Shard, ...]:
        """Its shards, with what is left out of them."""
        units: list[Record] = []
        with contextlib.closing(Lines(self.dataset)) as lines:
            for shard in self.version.shards:
                start = len(lines)
                columns = ["key", "captions", "label", "source"]
                table = shards.read_table(self.version.dataset, shard.name, columns).to_pylist()
                for at, it in enumerate(table, start):
                    number = int(found[at])
                    label = None if it["label"] is None else json.loads(it["label"])
                    flags = self.needed.kinds[int(self.needed.flags[at])]
                    said = json.dumps([it["source"], "", 0, it["captions"], label, flags, None])
                    read = json.dumps(rows.found[number] | {"flags": ()})  # among those
                    both = said.encode(), read.encode()
                    lines.append(told(staged[rows.unit[number]], None, *both))
                units.append(self._shard_unit(lines, start, shard.split))
            work = functools.partial(writer, self.dataset, self._share(lines, "samples"))
            made = self._resume_shards(work, units) if units else []
        for shard, new in zip(self.version.shards, made, strict=True):
            if new.sha256 != shard.sha256:
                said = self._difference(shard, new)
                self._clean()
                raise ValueError(
                    f"{_where(self.version)}, shard {shard.name}: came out as {new.name}; {said}"
                )
        return tuple(
            publish_selection(self.dataset, new, self.version.dropped(shard))
            for shard, new in zip(self.version.shards, made, strict=True)
        )

    def _difference(self, wanted: Shard, made: Shard) -> str:
        """The first thing in which two shards differ; of the wanted one the tar may be gone."""
        both = ((self.version, wanted), (replace(self.version, dataset=self.dataset), made))
        was, now = (shards.read_table(it.dataset, shard.name).to_pylist() for it, shard in both)
        for one, other in zip(was, now, strict=True):
            for name, value in one.items():
                if other.get(name) != value:
                    return f"sample {one['key']}: {name} is {other.get(name)!r}, was {value!r}"
        urls = [it.url("shards", f"{shard.name}.tar") for it, shard in both]
        if storage.exists(urls[0]):
            for one, other in zip(*map(shards.read_shard, urls), strict=True):
                if one.image != other.image:
                    return f"sample {one.key}: stored in other bytes, by another Pillow perhaps"
                if one.meta != other.meta:
                    return f"sample {one.key}: noted of it is {other.meta}, was {one.meta}"
        return "its samples are stored in other bytes, by another Pillow perhaps"


def _column(version: Manifest, shard: Shard, name: str = "key") -> Iterator[str]:
    table = shards.read_table(version.dataset, shard.name, [name])
    yield from table[name].to_pylist()


def _some(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while some := list(itertools.islice(rows, 4096)):
        yield some


def _where(version: Manifest) -> str:
    return f"{version.dataset} version {version.version}"
