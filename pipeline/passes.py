"""The passes of an ingest that has something to do.

    list     the rows that were not met before
    pass 1   fetch, decode, hash and stage their pictures, in parallel units of many rows
    decide   once, in source order: duplicates, splits, which sample goes into which shard
    pass 2   write the shards, in parallel, one unit each
    select   which of all stored samples the version is made of (see `select`)

Units commit their results under staging/ by what is in them, the decision depends on the rows
alone, and the version manifest comes last: a killed run that is run again ends with the bytes of an
undisturbed one. A row is known by its id and stamp; growth reads what is new and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import filters, storage
from .decide import (
    HELDOUT,
    KEPT,
    KNOWN,
    OUTCOMES,
    SAME_PICTURE,
    SPLITS,
    TRAIN,
    UNSEEN,
    Decision,
    Holding,
    decide,
    duplicates,
    first_holding,
    join,
    of_split,
    uniform,
)
from .download import DownloadRules, OpenedRules, is_remote
from .execute import Executor, run, workers_of
from .ingest import (
    CODE,
    FOLDERS,
    IngestResult,
    IngestRules,
    Progress,
    Scorers,
    alike,
    clean,
    described,
    selects_alike,
)
from .manifest import Manifest, Shard, blocked, fingerprint, publish, read
from .outcomes import STORED, batch_of, read_batches, restated, writing
from .rows import Lines, Positions, names_of, names_of_keys, parsed, row_name
from .select import left_out, select
from .sources import Row, Source, release
from .units import HASHES, captioner, reader, result_url, told, writer

MAY_CHANGE = ("unreachable", "private_address")
"""Reasons that speak of the network between us and a picture, not of the picture."""

_HOLDING = ("heldout_share", "unseen_share", "min_heldout")
"""Rules that decide what is held out. While they stand, no pair moves to another split."""

_FEW = 16
"""Of fewer new rows than this, as many may be rejected as of so many: one broken file that was
added alone stops nobody."""

_FEWEST = 32  # rows of a unit of pass 1

Record = dict[str, Any]


@dataclass(frozen=True)
class _Past:
    """What the version that a run adds to knows of its rows."""

    known: Positions
    """By id and stamp; those that were out of reach are not known."""
    unreached: frozenset[bytes]
    missing: frozenset[str]
    """Ids of rows whose file was not there."""
    stored: np.ndarray
    """Names of the keys of which the shards hold the picture, in the order they were met."""
    rows: int = 0

    @classmethod
    def of(cls, base: Manifest | None) -> _Past:
        known, stored, unreached, missing = bytearray(), bytearray(), set[bytes](), set[str]()
        count = 0
        columns = ["id", "stamp", "outcome", "reason", "key"]
        for batch in read_batches(base, columns) if base else ():
            count += len(batch)
            for row, stamp, outcome, reason, key in zip(
                *(batch[name].to_pylist() for name in columns), strict=True
            ):
                # What the web did not give last time it may give now: such rows are new again.
                if reason in MAY_CHANGE:
                    unreached.add(row_name(row, stamp))
                else:
                    known += row_name(row, stamp)
                if reason == "missing_file":
                    missing.add(row)
                if outcome in STORED:
                    stored += bytes.fromhex(key)
        return cls(
            Positions(names_of(known)),
            frozenset(unreached),
            frozenset(missing),
            names_of(stored),
            count,
        )


class Rows:
    """The new rows of a run, in source order."""

    def __init__(self, dataset: str):
        self.said = Lines(dataset)
        """[id, stamp, number of the source, captions, label, flags, hashes of other captions]"""
        self.asked = Lines(dataset)
        """What a reader is told of it: [image, stamp, problem, its hashes as they are known]."""
        self.found = Lines(dataset)
        """What a reader made of it."""
        self.place, self.unseen = array("d"), array("d")
        """Hashes of its pair, and of its name."""
        self.several = array("b")
        """Whether it has more than one caption."""
        self.web, self.again = array("b"), array("b")
        """Whether it is fetched from the web; whether it was out of reach in the last version."""
        self.come = set[str]()
        """Ids of those whose file was not there in the last version."""
        self.unit = array("q")
        """Number of the unit that staged its picture."""
        self.keys = bytearray()
        self.rejected, self.wanted = array("b"), array("b")
        """Whether it cannot be used; whether the rules about files choose it."""
        self.length = array("q")

    def __len__(self) -> int:
        return len(self.said)

    def list(self, source: int, row: Row, again: bool) -> None:
        others = [_hashes(pair, name) for pair, name in row.others]
        place, unseen = _hashes(row.pair, row.name)
        said = [row.id, row.stamp, source, row.captions, row.label, row.flags, others]
        self.said.append(json.dumps(said).encode())
        known = {name: it for name in HASHES if (it := getattr(row, name))}
        asked = [row.image, row.stamp, row.problem, known]
        self.asked.append(json.dumps(asked).encode())
        self.place.append(place)
        self.unseen.append(unseen)
        self.several.append(bool(others))
        self.web.append(not row.problem and is_remote(row.image))
        self.again.append(again)

    def captions(self, number: int, said: Sequence[Any] = ()) -> list[tuple[str, float, float]]:
        """Each with the hashes of its pair and of its name; `said` is read if it is not given."""
        _, _, _, texts, _, _, others = said or self.said[number]
        return [
            (text, place, unseen)
            for text, (place, unseen) in zip(
                texts, [(self.place[number], self.unseen[number]), *others], strict=True
            )
        ]

    @property
    def names(self) -> np.ndarray:
        return names_of(self.keys)

    def again_names(self) -> frozenset[bytes]:
        """Of those that were out of reach in the last version."""
        numbers = np.flatnonzero(np.array(self.again, bool)).tolist()
        return frozenset(row_name(*self.said[number][:2]) for number in numbers)

    def close(self) -> None:
        with contextlib.ExitStack() as after:  # on a full disk each may raise
            for lines in (self.said, self.asked, self.found):
                after.callback(lines.close)


@dataclass(frozen=True)
class Run:
    """One run that has something to do. `base` is the version it adds to, if any."""

    dataset: str
    rules: IngestRules
    executor: Executor
    progress: Progress | None
    scorers: Scorers
    parent: Manifest | None
    base: Manifest | None
    used: set[str] = field(default_factory=set[str])
    """Files in staging that are this run's."""

    def run(self, sources: Sequence[Source], prints: Mapping[str, str]) -> IngestResult:
        # Lines lie beside a local data set, and else where temporary files go.
        local = storage.is_local(self.dataset)
        place = storage.local_path(self.dataset) if local else tempfile.gettempdir()
        with storage.room(place), contextlib.ExitStack() as after:
            after.callback(release)  # the parquet that its units read last, where they ran here
            return self._run(sources, prints)

    def _run(self, sources: Sequence[Source], prints: Mapping[str, str]) -> IngestResult:
        for folder in FOLDERS:
            storage.sweep(storage.join(self.dataset, folder))
        gone = blocked(self.dataset)
        past, rows = _Past.of(self.base), Rows(self.dataset)
        with contextlib.closing(rows):
            self._list(sources, past, rows)
            if not rows and not past.rows:
                raise ValueError(
                    f"{', '.join(prints)}: no rows; wanted at least one picture with a caption"
                )
            if not rows and self.base and alike(self.base, prints, self.rules, self.scorers):
                self._clean()
                return IngestResult(self.base, self.base.counts, new=0, reused=True)
            units = self._read(rows, prints)
            self._check_rejected(rows)
            known = Positions(past.stored)(rows.names) >= 0
            rejected, wanted = np.array(rows.rejected, bool), np.array(rows.wanted, bool)
            places, unseen = np.array(rows.place), np.array(rows.unseen)
            outcome, first = duplicates(rows.names, rejected, known)
            counted = wanted & (outcome == KEPT)
            holding = self._holding(places[counted], unseen[counted])
            splits = holding.splits(places, unseen)
            decision = decide(outcome, first, splits, rows.captions, holding)
            old = self._add_captions(rows, decision, holding)
            written = self._write(rows, units, decision, holding)
            met = Positions(np.concatenate([past.stored, rows.names[decision.outcome == KEPT]]))
            shards = self._select(old, written, met)
            return self._publish(sources, prints, rows, decision, holding, shards, gone)

    def _list(self, sources: Sequence[Source], past: _Past, rows: Rows) -> None:
        """The rows that were not met before."""
        listed = ((number, row) for number, source in enumerate(sources) for row in source.rows())
        while some := list(itertools.islice(listed, 4096)):
            names = [row_name(row.id, row.stamp) for _, row in some]
            known = past.known(names_of(b"".join(names)))
            for (number, row), name, at in zip(some, names, known.tolist(), strict=True):
                if at < 0:
                    rows.list(number, row, name in past.unreached)
                    if row.id in past.missing:
                        rows.come.add(row.id)

    # ---- pass 1 ----------------------------------------------------------------------------------

    def _read(self, rows: Rows, sources: Iterable[str]) -> list[str]:
        """Read the pictures of all rows; the units that staged them."""
        # A host that was named as a source may be on a private network; one in a table may not.
        download = OpenedRules.of(self.rules.download, sources)
        parts = parts_of(len(rows))
        web = [any(rows.web[start:stop]) for start, stop in parts]
        units = self._reading(rows.asked, parts, web, download)
        there = set(storage.list_names(storage.join(self.dataset, "staging")))
        tried = {at for at, unit in enumerate(units) if f"{unit['unit']}.jsonl" in there}
        again = any(web[at] for at in tried)
        wanted, taken = self.rules.rules_of_files(), 0

        def take(done: set[int]) -> None:
            """In their order, those that are read, while others are."""
            nonlocal taken
            while taken < len(units) and taken in done and not again:
                lines = self._lines_of(units[taken], parts[taken])
                self._take(rows, parts[taken], itertools.repeat(taken), lines, wanted)
                taken += 1

        self._pass_one(rows.asked, units, download, take)
        take(tried)  # nothing was left to read
        assert again or taken == len(units)
        more = self._read_again(rows, units, parts, tried, download) if again else []
        return [unit["unit"] for unit in [*units, *more]]

    def _read_again(
        self,
        rows: Rows,
        units: list[Record],
        parts: Sequence[tuple[int, int]],
        tried: set[int],
        download: DownloadRules,
    ) -> list[Record]:
        """What the web did not give a run that ended before this one; the units that staged it."""
        # A run that ended before this one may have found the web out of reach: that is tried again,
        # what it did get is not.
        missed: dict[int, int] = {}
        again = Lines(self.dataset)
        for at, (unit, (start, stop)) in enumerate(zip(units, parts, strict=True)):
            if at in tried and any(rows.web[start:stop]):
                for number, found in enumerate(self._results(unit), start):
                    if json.loads(found).get("reason") in MAY_CHANGE:
                        missed[number] = len(again)
                        again.append(json.dumps(rows.asked[number]).encode())
        with contextlib.closing(again):
            spans = [(at, min(at + 64, len(again))) for at in range(0, len(again), 64)]
            more = self._reading(again, spans, [True] * len(spans), download, "again")
            for unit in more:
                url = result_url(self.dataset, unit["unit"], "jsonl")
                if storage.exists(url) and any(
                    json.loads(found).get("reason") in MAY_CHANGE for found in self._results(unit)
                ):
                    storage.delete(url)
            self._pass_one(again, more, download)
        retried = [
            (at, found) for at, unit in enumerate(more, len(units)) for found in self._results(unit)
        ]
        wanted = self.rules.rules_of_files()
        for at, (unit, part) in enumerate(zip(units, parts, strict=True)):
            found = [(at, line) for line in self._lines_of(unit, part)]
            for number in range(*part):
                if number in missed:
                    found[number - part[0]] = retried[missed[number]]
            staged, lines = zip(*found, strict=True)
            self._take(rows, part, staged, lines, wanted)
        return more

    def _lines_of(self, unit: Record, part: tuple[int, int]) -> list[bytes]:
        """What a unit has found, a line for each of its rows."""
        lines = self._results(unit)
        if len(lines) != part[1] - part[0]:
            url = result_url(self.dataset, unit["unit"], "jsonl")
            raise ValueError(
                f"{url}: {len(lines)} lines, wanted {part[1] - part[0]}; delete the folder "
                f"{storage.parent(url)} and run again"
            )
        return lines

    def _reading(
        self,
        asked: Lines,
        parts: Sequence[tuple[int, int]],
        web: Sequence[bool],
        download: DownloadRules,
        *kind: str,
    ) -> list[Record]:
        gone = sorted((key, it.get("look", "")) for key, it in blocked(self.dataset).items())
        reading = self.rules.reading()
        units: list[Record] = []
        for (start, stop), fetched in zip(parts, web, strict=True):
            deciding = [*([download.deciding()] if fetched else []), *([gone] if gone else [])]
            name = fingerprint([CODE, reading, asked.digest(start, stop), *deciding, *kind])
            units.append({"unit": name, **asked.place(start, stop)})
        return units

    def _pass_one(
        self,
        asked: Lines,
        units: list[Record],
        download: DownloadRules,
        ready: Callable[[set[int]], None] | None = None,
    ) -> None:
        if units:
            lines = self._share(asked, "rows")
            workers = workers_of(self.executor, len(units))
            download = replace(download, concurrency=max(1, download.concurrency // workers))
            work = functools.partial(reader, self.dataset, self.rules.reading(), download, lines)
            self.used.update(f"{unit['unit']}{end}" for unit in units for end in (".bin", ".jsonl"))
            self._resume("read", work, units, "jsonl", ready)

    def _share(self, lines: Lines, kind: str) -> str:
        """The URL under which workers read these lines."""
        name = f"{kind}-{lines.digest(0, len(lines))}.lines"
        self.used.add(name)
        url = storage.join(self.dataset, "staging", name)
        lines.publish(url)
        return url

    def _results(self, unit: Record) -> list[bytes]:
        return storage.read_bytes(result_url(self.dataset, unit["unit"], "jsonl")).splitlines()

    def _take(
        self,
        rows: Rows,
        part: tuple[int, int],
        staged: Iterable[int],
        lines: Sequence[bytes],
        wanted: Sequence[filters.Rule],
    ) -> None:
        """What was found of some rows, each in the unit that staged it."""
        for said, unit, line in zip(rows.said.some(*part), staged, lines, strict=False):
            found, ok = parsed(line), False
            rejected = bool(found.get("reason"))
            if not rejected:
                ok = not filters.first_reason(wanted, {**found["scores"], "caption": said[3][0]})
            rows.found.append(line)
            rows.unit.append(unit)
            rows.keys += bytes.fromhex(found.get("key", "0" * 32))
            rows.rejected.append(rejected)
            rows.wanted.append(ok)
            rows.length.append(found.get("length", 0))

    # ---- the decision ----------------------------------------------------------------------------

    def _holding(self, places: np.ndarray, unseen: np.ndarray) -> Holding:
        """What is held out: as in the version before, unless the rules about it are others."""
        rules = self.rules
        before: Mapping[str, Any] = self.parent.rules if self.parent else {}
        asked = {name: getattr(rules, name) for name in _HOLDING}
        if "heldout_limit" in before and asked == {name: before.get(name) for name in _HOLDING}:
            exceptions = tuple(before.get("heldout_exceptions", ()))
            return Holding(before["heldout_limit"], exceptions, rules.unseen_share)
        return first_holding(
            places, unseen, rules.heldout_share, rules.unseen_share, rules.min_heldout
        )

    def _check_rejected(self, rows: Rows) -> None:
        """ValueError when too much was rejected."""
        reasons: Counter[str] = Counter()
        first, count = -1, len(rows)
        for number in np.flatnonzero(np.array(rows.rejected, bool)).tolist():
            reason = rows.found[number]["reason"]
            if reason in MAY_CHANGE and rows.again[number]:
                count -= 1  # it was out of reach before, and is still
            elif reason not in ("removed", "removed_lookalike"):
                reasons[reason] += 1
                first = number if first < 0 else first
        if reasons.total() > self.rules.max_rejected_share * max(count, _FEW if self.base else 0):
            found, row = rows.found[first], rows.said[first][0]
            raise ValueError(
                f"{reasons.total()} of {count} new rows were rejected "
                f"({_listed(reasons)}), allowed is a share of {self.rules.max_rejected_share}; "
                f"the first is {row} ({found['reason']}: {found['detail'] or '-'}); "
                "mend the source or raise max_rejected_share"
            )

    # ---- pass 2 ----------------------------------------------------------------------------------

    def _write(
        self, rows: Rows, staged: Sequence[str], decision: Decision, holding: Holding
    ) -> list[Shard]:
        """The new shards, split by split; what is not wanted now stands in shards of its own, which
        nobody encodes or loads until it is.
        """
        kept = np.flatnonzero(decision.outcome == KEPT)
        kept = kept[np.argsort(rows.names[kept], kind="stable")]
        wanted, length = np.array(rows.wanted, bool), np.array(rows.length)
        units: list[Record] = []
        lines = Lines(self.dataset)
        with contextlib.closing(lines):
            for split, chosen in itertools.product((TRAIN, HELDOUT, UNSEEN), (True, False)):
                mine = kept[(decision.split[kept] == split) & (wanted[kept] == chosen)]
                shards = -(-len(mine) // self.rules.shard_samples)
                size = int(length[mine].sum())
                shards = min(len(mine), max(shards, -(-size // self.rules.shard_bytes)))
                for index in range(shards):
                    start = len(lines)
                    some = slice(index * len(mine) // shards, (index + 1) * len(mine) // shards)
                    for number in mine[some].tolist():
                        lines.append(self._told(rows, number, staged, decision, holding))
                    units.append(self._shard_unit(lines, start, SPLITS[split]))
            if not units:
                return []
            work = functools.partial(writer, self.dataset, self._share(lines, "samples"))
            return self._resume_shards(work, units)

    @staticmethod
    def _told(
        rows: Rows, number: int, staged: Sequence[str], decision: Decision, holding: Holding
    ) -> bytes:
        """What pass 2 is told of a new sample."""
        captions = decision.captions.get(number)
        if not captions and rows.several[number]:
            captions = of_split(rows.captions(number), int(decision.split[number]), holding)
        said, found = rows.said.line(number), rows.found.line(number)
        return told(staged[rows.unit[number]], captions, said, found)

    @staticmethod
    def _shard_unit(lines: Lines, start: int, split: str) -> Record:
        """The unit of the samples in the lines from `start` on."""
        content = [CODE, split, lines.digest(start, len(lines))]
        place = {"split": split, **lines.place(start, len(lines))}
        return {"unit": fingerprint(content) + "-shard", **place}

    def _add_captions(self, rows: Rows, decision: Decision, holding: Holding) -> list[Shard]:
        """The shards of the base version, those written anew that have a picture for which these
        rows have another caption; what encoders made of the pictures goes along.
        """
        stored = list(self.base.shards) if self.base else []
        again = np.flatnonzero(decision.outcome == KNOWN)
        if not len(again):
            return stored
        from . import shards

        again = again[np.argsort(rows.names[again], kind="stable")]
        names = rows.names[again]
        units: dict[str, Record] = {}
        for shard in stored:
            keys = shards.read_table(self.dataset, shard.name, ["key"])["key"].to_pylist()
            start, stop = (
                np.searchsorted(names, names_of_keys(keys), side) for side in ("left", "right")
            )
            hit = np.flatnonzero(start < stop).tolist()
            if not hit:
                continue
            table = shards.read_table(self.dataset, shard.name, ["captions"])["captions"]
            split, more = SPLITS.index(shard.split), dict[str, list[str]]()
            for at in hit:
                before = table[at].as_py()
                captions = list(before)
                for number in again[start[at] : stop[at]].tolist():
                    decision.split[number] = split
                    outcome = join(captions, rows.captions(number), split, holding)
                    decision.outcome[number] = KNOWN if outcome == SAME_PICTURE else outcome
                if len(captions) > len(before):
                    more[keys[at]] = captions[len(before) :]
            if more:
                unit = {"shard": shard.name, "split": shard.split, "captions": more}
                name = fingerprint([CODE, unit]) + "-shard"
                units[shard.name] = {"unit": name, **unit}
        work = functools.partial(captioner, self.dataset)
        made = dict(zip(units, self._resume_shards(work, list(units.values())), strict=True))
        return [made.get(shard.name, shard) for shard in stored]

    # ---- the selection ---------------------------------------------------------------------------

    def _select(
        self, old: Sequence[Shard], written: Sequence[Shard], met: Positions
    ) -> tuple[Shard, ...]:
        """All shards with what is left out of them."""
        decided = {shard.name for shard in self.base.shards} if self.base else set[str]()
        stands = self.base is not None and selects_alike(self.base, self.rules, self.scorers)
        again = not stands or any(shard.name not in decided for shard in old)
        if self.scorers.specs:
            from .score import score

            progress = self.progress
            score(
                self.dataset, (*old, *written), self.scorers.specs, self.scorers.build,
                self.executor, progress and functools.partial(progress, "score"),
            )  # fmt: skip
        return select(
            self.dataset, (*old, *written), met, self.rules, self._scores,
            decided=decided if stands else (), runs=self._runs() if again else (),
        )  # fmt: skip

    def _runs(self) -> list[int]:
        """How many pictures had been stored when each earlier run ended: rows keep their order."""
        ends, version = list[int](), self.base
        while version:
            ends.append(sum(version.counts[outcome] for outcome in STORED))
            version = read(self.dataset, version.parent) if version.parent else None
        return ends

    def _scores(self, shard: str) -> Mapping[str, Any]:
        from .score import read_scores

        return read_scores(self.dataset, shard, [*self.scorers.fingerprints.values()])

    # ---- the version -----------------------------------------------------------------------------

    def _publish(
        self,
        sources: Sequence[Source],
        prints: Mapping[str, str],
        rows: Rows,
        decision: Decision,
        holding: Holding,
        shards: tuple[Shard, ...],
        gone: Mapping[str, Any],
    ) -> IngestResult:
        names, reasons = left_out(Manifest(self.dataset, 0, None, shards))
        dropped = Positions(names), np.array([*reasons, ""], object)
        new, again = 0, rows.again_names()
        with writing(self.dataset) as (table, publish_table):
            for batch in read_batches(self.base) if self.base else ():
                table.add(restated(_still_past(batch, again, rows.come), *dropped))
            for start in range(0, len(rows), 8192):
                some = range(start, min(start + 8192, len(rows)))
                batch = batch_of(self._outcomes(rows, some, sources, decision))
                batch = restated(batch, *dropped)
                new += sum(it == "kept" for it in batch["outcome"].to_pylist())
                table.add(batch)
            counts = table.counts
            if not counts["kept"]:
                details = {name: it for name, it in counts.items() if ":" in name}
                said = Counter(n for n in details if not n.startswith("flag:"))
                said = Counter({name: details[name] for name in said})
                raise ValueError(
                    f"none of {counts['seen']} rows was kept ({_listed(said)}); "
                    "look at the sources and the rules"
                )
            inputs = publish_table()
        manifest = Manifest(
            dataset=self.dataset,
            version=self.parent.version + 1 if self.parent else 1,
            parent=self.base.version if self.base else None,
            shards=shards,
            counts=counts,
            sources={**(self.base.sources if self.base else {}), **prints},
            rules={
                **described(self.rules),
                "scorers": self.scorers.fingerprints,
                **holding.stated(),
            },
            inputs=inputs,
        )
        try:
            self._check_undisturbed(manifest, gone)
            publish(manifest)
        except ValueError:  # another run was faster: who comes next begins with its version
            self._clean_own()
            raise
        self._clean()
        return IngestResult(manifest, counts, new, reused=False)

    def _outcomes(
        self, rows: Rows, some: range, sources: Sequence[Source], decision: Decision
    ) -> Iterator[Record]:
        part = some.start, some.stop
        for number, said, found in zip(
            some, rows.said.some(*part), rows.found.some(*part), strict=True
        ):
            row, stamp, source, _, _, flags, _ = said
            outcome, reason = OUTCOMES[int(decision.outcome[number])]
            yield {
                "id": row,
                "stamp": stamp,
                "source": sources[int(source)].url,
                "outcome": outcome,
                "reason": found.get("reason", "") or reason,
                "detail": found.get("detail", ""),
                "key": found.get("key", ""),
                "split": SPLITS[decision.split[number]],
                "flags": sorted({*flags, *found.get("flags", ())}),
            }

    def _check_undisturbed(self, manifest: Manifest, gone: Mapping[str, Any]) -> None:
        """No take-down and no deletion meanwhile, where no lock can keep them out."""
        if storage.is_local(self.dataset):
            return
        there = set(storage.list_names(storage.join(self.dataset, "shards")))
        lost = [shard.name for shard in manifest.shards if f"{shard.name}.tar" not in there]
        if lost or blocked(self.dataset).keys() != gone.keys():
            raise ValueError(
                f"{self.dataset}: pictures or shards ({len(lost)}) were taken away while this run "
                "went on; nothing was published, run it again"
            )

    def _clean(self) -> None:
        clean(self.dataset)
        self._clean_own()

    def _clean_own(self) -> None:
        """Where no lock says that nobody else is at work: what this run has staged."""
        if not storage.is_local(self.dataset):
            for name in self.used:
                storage.delete(storage.join(self.dataset, "staging", name))

    # ---- units -----------------------------------------------------------------------------------

    def _resume(
        self,
        stage: str,
        factory: Any,
        units: list[Record],
        kind: str,
        ready: Callable[[set[int]], None] | None = None,
    ) -> dict[str, Record]:
        """Have all units done that an earlier, killed run has not; what they gave. `ready` is told
        which are done, whenever there are more of them.
        """
        present = set(storage.list_names(storage.join(self.dataset, "staging")))
        todo = [at for at, unit in enumerate(units) if f"{unit['unit']}.{kind}" not in present]
        done = set(range(len(units))).difference(todo)
        past, progress = len(done), self.progress

        def finished(index: int) -> None:
            done.add(todo[index])
            if ready:
                ready(done)

        fresh = run(
            factory,
            [units[at] for at in todo],
            executor=self.executor,
            keep=False,
            progress=progress and (lambda done, _: progress(stage, past + done, len(units))),
            finished=finished,
        )
        return {units[at]["unit"]: result for at, result in zip(todo, fresh, strict=True)}

    def _resume_shards(self, factory: Any, units: list[Record]) -> list[Shard]:
        self.used.update(f"{unit['unit']}.json" for unit in units)
        done = self._resume("write", factory, units, "json")
        return [
            Shard(
                **(
                    done.get(unit["unit"])
                    or storage.read_json(result_url(self.dataset, unit["unit"], "json"))
                )["shard"]
            )
            for unit in units
        ]


def parts_of(rows: int) -> list[tuple[int, int]]:
    """The rows of each unit of pass 1: few enough that the units balance over workers, enough that
    a unit outweighs its scheduling. The last ones become smaller: who has none left waits for them.
    """
    size, parts, stop = min(512, max(_FEWEST, -(-rows // 64))), list[tuple[int, int]](), 0
    while stop < rows:
        left = rows - stop
        start, stop = stop, stop + min(left, size, max(_FEWEST, left // 4))
        parts.append((start, stop))
    return parts


def _still_past(batch: Any, again: Collection[bytes], come: Collection[str]) -> Any:
    """Without the rows that were out of reach or not there, and are new again: by name, by id."""
    if not again and not come:
        return batch

    def stands(row: str, stamp: str, reason: str) -> bool:
        if reason in MAY_CHANGE:
            return row_name(row, stamp) not in again
        return reason != "missing_file" or row not in come

    columns = (batch[name].to_pylist() for name in ("id", "stamp", "reason"))
    return batch.filter([stands(*it) for it in zip(*columns, strict=True)])


def _hashes(pair: str, name: str | None) -> tuple[float, float]:
    """Of a pair and of a name; 1 for no name."""
    return uniform("heldout", pair), 1.0 if name is None else uniform("unseen", name)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
