"""Sources in, a new version of a data set out: every input row ends in exactly one outcome.

    pass 1   fetch, decode, hash and stage candidate pictures, in parallel units of many rows
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
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from . import filters, storage
from .download import Downloader, DownloadRules, is_remote
from .execute import Executor, run
from .filters import SELECTING, SelectionRules
from .manifest import Manifest, Shard, blocked, fingerprint, latest, publish, read, versions
from .outcomes import STORED, Rejected, count, read_outcomes, write_outcomes
from .select import dropped_keys, select
from .sources import (
    Damaged,
    OverLong,
    Row,
    Source,
    SourceOptions,
    fetch_image,
    open_source,
    release,
)

if TYPE_CHECKING:
    from .score import Build, ScorerSpec

_CODE = 2
"""Raised by hand when the same rows and rules give other bytes: everything is read again."""

_MAY_CHANGE = ("unreachable", "private_address")
"""Reasons that speak of the network between us and a picture, not of the picture."""

_FOLDERS = ("versions", "shards", "tables", "inputs", "selections", "staging")

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class IngestRules(SelectionRules):
    """What is stored of the sources, and how; which of it a version is made of."""

    kind: Literal["ingest"] = "ingest"
    max_side: int = 0
    """Pictures with a longer shorter side are reduced to this many pixels there; 0: never."""
    shard_samples: int = 2048
    """At most; a split's samples are dealt to shards of nearly equal number."""
    shard_bytes: int = 256 << 20
    """About, on average: many large pictures make more shards."""
    heldout_share: float = 0.1
    """Share of all pairs (captions, or caption and style) that training never sees."""
    unseen_share: float = 0.0
    """Share of all names (captions of rows with a style) that training never sees in any style."""
    min_heldout: int = 16
    """The first version raises the held-out share to reach this many, up to a quarter of all."""
    max_rejected_share: float = 0.5
    """More new rows than this rejected: nothing is published."""
    background: tuple[int, int, int] = (255, 255, 255)
    """sRGB colour behind transparent pixels."""
    max_pixels: int = 50_000_000
    max_bytes: int = 100_000_000
    animated: Literal["first", "reject"] = "first"
    options: SourceOptions = field(default_factory=SourceOptions)
    download: DownloadRules = field(default_factory=DownloadRules)
    """How pictures are fetched from the web; what was fetched before is not fetched again."""

    def __post_init__(self):
        super().__post_init__()
        lowest = {"max_side": 0, "shard_samples": 1, "shard_bytes": 1}
        for name, low in (lowest | {"min_heldout": 0, "max_pixels": 1, "max_bytes": 1}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("heldout_share", "unseen_share", "max_rejected_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ValueError(
                f"background must be three levels from 0 to 255, got {self.background}"
            )

    def reading(self) -> dict[str, Any]:
        """What pass 1 depends on; other rules may change in a run that goes on."""
        names = ("max_side", "background", "max_pixels", "max_bytes", "animated")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Scorers:
    """Models that score stored samples, and how to make them (training.encoders.scorers)."""

    specs: tuple[ScorerSpec, ...]
    build: Build

    @property
    def fingerprints(self) -> dict[str, str]:
        return {spec.name: spec.fingerprint for spec in self.specs}


def _nobody(spec: ScorerSpec) -> Any:
    raise ValueError(f"scorer {spec.name}: nobody knows how to build it")


NO_SCORERS = Scorers((), _nobody)


@dataclass(frozen=True)
class IngestResult:
    """A version, and what it took."""

    manifest: Manifest
    counts: Mapping[str, int]
    """All rows so far, as in the manifest."""
    new: int
    """Samples this run added."""
    reused: bool
    """Whether the sources and rules were unchanged, so that nothing was done."""


def ingest(
    sources: Sequence[str],
    dataset: str,
    rules: IngestRules | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    scorers: Scorers | None = None,
) -> IngestResult:
    """Bring a data set up to date with its sources: a new version if anything about them changed.

    Sources that an earlier version had and this call does not name stay as they are. Other rules of
    selection are a new version of the same shards; other rules of storage build the next version
    anew from the named sources. `scorers` give the scores of which the rules speak.
    `progress(stage, done, total)` speaks of the stages "read", "write" and "score". ValueError:
    nothing to read, nothing kept, or more rows rejected than the rules allow; nothing is published
    then.
    """
    if not sources:
        raise ValueError("no sources given; name at least one folder, table, tar or shapes:// URL")
    rules, executor, scorers = rules or IngestRules(), executor or Executor(), scorers or NO_SCORERS
    dataset = storage.absolute(dataset)
    opened = [open_source(url, options=rules.options) for url in sources]
    prints = {source.url: source.fingerprint() for source in opened}
    with storage.lock(storage.join(dataset, ".lock")):
        parent = latest(dataset)
        base = parent if parent and _same_rules(parent, rules) else None
        same = base is not None and _selects_alike(base, rules, scorers)
        if base and same and all(base.sources.get(url) == it for url, it in prints.items()):
            _clean(dataset)
            return IngestResult(base, base.counts, new=0, reused=True)
        it = _Ingest(dataset, rules, executor, progress, scorers, parent, base)
        return it.run(opened, prints)


def unchanged(
    sources: Sequence[str], dataset: str, rules: IngestRules, scorers: Scorers | None = None
) -> Manifest | None:
    """The latest version, if `ingest` would return it at once."""
    dataset = storage.absolute(dataset)
    parent = latest(dataset)
    if parent is None or not _same_rules(parent, rules):
        return None
    if not _selects_alike(parent, rules, scorers or NO_SCORERS):
        return None
    if storage.exists(storage.join(dataset, "staging")):
        return None  # a killed run has left something to clear away
    opened = [open_source(url, options=rules.options) for url in sources]
    same = all(parent.sources.get(source.url) == source.fingerprint() for source in opened)
    return parent if same else None


@dataclass(frozen=True)
class _Ingest:
    """One run that has something to do. `base` is the version it adds to, if any."""

    dataset: str
    rules: IngestRules
    executor: Executor
    progress: Progress | None
    scorers: Scorers
    parent: Manifest | None
    base: Manifest | None

    def run(self, sources: Sequence[Source], prints: Mapping[str, str]) -> IngestResult:
        for folder in _FOLDERS:
            storage.sweep(storage.join(self.dataset, folder))
        past = read_outcomes(self.base) if self.base else []
        # What the web did not give last time it may give now: such rows are new again.
        known = {(it["id"], it["stamp"]) for it in past if it["reason"] not in _MAY_CHANGE}
        rows = self._new_rows(sources, known)
        again = {(row.id, row.stamp) for _, row in rows}
        retried = {(it["id"], it["stamp"]) for it in past if (it["id"], it["stamp"]) in again}
        past = [it for it in past if (it["id"], it["stamp"]) not in retried]
        if not rows and not past:
            raise ValueError(
                f"{', '.join(prints)}: no rows; wanted at least one picture with a caption"
            )
        results = self._read(rows, prints)
        outcomes, samples, limit, known = self._decide(rows, results, past)
        self._check_rejected([it for it in outcomes if not _still_out_of_reach(it, retried)])
        old = self._add_captions(known, limit)
        written = self._write(samples)
        outcomes = past + outcomes
        shards, outcomes = self._select(old, written, outcomes)
        counts = count(outcomes)
        if not counts["kept"]:
            raise ValueError(
                f"none of {len(outcomes)} rows was kept "
                f"({_listed(Counter(_explained(it) for it in outcomes))}); "
                "look at the sources and the rules"
            )
        version = self.parent.version + 1 if self.parent else 1
        manifest = Manifest(
            dataset=self.dataset,
            version=version,
            parent=self.base.version if self.base else None,
            shards=shards,
            counts=counts,
            sources={**(self.base.sources if self.base else {}), **prints},
            rules={
                **_described(self.rules),
                "scorers": self.scorers.fingerprints,
                "heldout_limit": limit,
            },
        )
        write_outcomes(manifest, outcomes)
        publish(manifest)
        _clean(self.dataset)
        new = sum(sample["outcome"]["outcome"] == "kept" for sample in samples)
        return IngestResult(manifest, counts, new, reused=False)

    def _new_rows(
        self, sources: Sequence[Source], known: set[tuple[str, str]]
    ) -> list[tuple[str, Row]]:
        """(source, row) of each row not met before, in source order."""
        rows: list[tuple[str, Row]] = []
        ids: set[str] = set()
        for source in sources:
            for row in source.rows():
                if row.id in ids:
                    raise ValueError(
                        f"{source.url}: row {row.id} is listed twice; name each source once"
                    )
                ids.add(row.id)
                if (row.id, row.stamp) not in known:
                    rows.append((source.url, row))
        return rows

    # ---- pass 1 ----------------------------------------------------------------------------------

    def _read(self, rows: Sequence[tuple[str, Row]], sources: Iterable[str]) -> list[Record]:
        """What each row's picture turned out to be, in order."""
        # A host that was named as a source may be on a private network; one in a table may not.
        named = [urlsplit(url).hostname or "" for url in sources if is_remote(url)]
        download = self.rules.download
        download = replace(download, private_hosts=(*download.private_hosts, *named))
        # few enough rows that the units balance over workers, enough that a unit outweighs its
        # scheduling
        size = min(512, max(32, -(-len(rows) // 64)))
        units: list[Record] = []
        gone = sorted(blocked(self.dataset))
        for start in range(0, len(rows), size):
            some = [
                {
                    "image": row.image,
                    "stamp": row.stamp,
                    "problem": row.problem,
                    "sha256": row.sha256,
                }
                for _, row in rows[start : start + size]
            ]
            web = any(is_remote(row.image) for _, row in rows[start : start + size])
            deciding = [*([download.deciding()] if web else []), *([gone] if gone else [])]
            name = fingerprint([_CODE, self.rules.reading(), some, *deciding])
            units.append({"unit": name, "rows": some})
            if web:
                self._forget_if_out_of_reach(name)
        work = functools.partial(_reader, self.dataset, self.rules.reading(), download)
        return [
            {**row, "staged": result["unit"]}
            for result in self._resume("read", work, units)
            for row in result["rows"]
        ]

    def _forget_if_out_of_reach(self, unit: str) -> None:
        """What a run that published nothing could not reach is tried again."""
        url = _result_url(self.dataset, unit)
        if storage.exists(url):
            rows = storage.read_json(url)["rows"]
            if any(row.get("reason") in _MAY_CHANGE for row in rows):
                storage.delete(url)

    # ---- the decision ----------------------------------------------------------------------------

    def _decide(
        self, rows: Sequence[tuple[str, Row]], results: Sequence[Record], past: Sequence[Record]
    ) -> tuple[list[Record], list[Record], float, list[tuple[Record, Row]]]:
        """Outcomes of the new rows, the new samples sorted by key, the held-out limit, and the rows
        whose picture is stored already, with their outcomes.
        """
        wanted = self.rules.rules_of_files()
        known = {it["key"] for it in past if it["outcome"] in STORED}
        samples: dict[str, Record] = {}
        outcomes: list[Record] = []
        again: list[tuple[Record, Row]] = []
        old: list[tuple[Record, Row]] = []
        for (source, row), result in zip(rows, results, strict=True):
            outcome, reason, key = "kept", "", result.get("key", "")
            if result.get("reason"):
                outcome, reason = "rejected", result["reason"]
            elif key in known:
                outcome, reason = "duplicate", "known"
            elif key in samples:
                outcome, reason = "duplicate", "same_picture"
            it = {
                "id": row.id,
                "stamp": row.stamp,
                "source": source,
                "outcome": outcome,
                "reason": reason,
                "detail": result.get("detail", ""),
                "key": key,
                "split": "",
                "flags": sorted({*row.flags, *result.get("flags", ())}),
            }
            outcomes.append(it)
            if outcome == "kept":
                scores = {**result["scores"], "caption": row.captions[0]}
                samples[key] = {
                    **result,
                    "row": row,
                    "captions": list(row.captions),
                    "outcome": it,
                    "wanted": not filters.first_reason(wanted, scores),
                }
            elif reason == "same_picture":
                again.append((it, row))
            elif reason == "known":
                old.append((it, row))
        limit = self._heldout_limit([it["row"] for it in samples.values() if it["wanted"]])
        for sample in samples.values():
            sample["split"] = sample["outcome"]["split"] = self._split(sample["row"], limit)
        for it, row in again:
            # One picture, two captions. The second joins the first unless it would carry a held-out
            # pair into training.
            sample = samples[it["key"]]
            it["split"] = sample["split"]
            new = [caption for caption in row.captions if caption not in sample["captions"]]
            if new and self._split(row, limit) == sample["split"]:
                sample["captions"] += new
                it["reason"] = "caption_added"
            elif new:
                it["reason"] = "caption_of_other_split"
        return outcomes, [samples[key] for key in sorted(samples)], limit, old

    def _split(self, row: Row, limit: float) -> str:
        if row.name is not None and _uniform("unseen", row.name) < self.rules.unseen_share:
            return "unseen"
        return "heldout" if _uniform("heldout", row.pair) < limit else "train"

    def _heldout_limit(self, rows: Sequence[Row]) -> float:
        """Pairs that hash below it are held out: `heldout_share`, or more where that is too few.

        The first version decides for all later ones: growth moves no pair to another split.
        """
        if self.base is not None:
            return self.base.rules["heldout_limit"]
        share = limit = self.rules.heldout_share
        places = Counter(
            _uniform("heldout", row.pair) for row in rows if self._split(row, 0) == "train"
        )
        if share == 1 or not places:
            return share
        if max(places) < share:
            return 0.0  # so few pairs that all would be held out: train on all
        total, held = places.total(), 0
        wanted = min(self.rules.min_heldout, total // 4) if share else 0
        for place in sorted(places):
            if place >= share:
                if held >= wanted or held + places[place] > total // 2:
                    break
                limit = place + 2.0**-53  # just above: places are multiples of this
            held += places[place]
        return limit

    def _check_rejected(self, outcomes: Sequence[Record]) -> None:
        """ValueError when too much was rejected."""
        reasons = (it["reason"] for it in outcomes if it["outcome"] == "rejected")
        rejected = Counter(reason for reason in reasons if reason != "removed")
        if rejected.total() > self.rules.max_rejected_share * len(outcomes):
            first = next(it for it in outcomes if it["reason"] in rejected)
            raise ValueError(
                f"{rejected.total()} of {len(outcomes)} new rows were rejected "
                f"({_listed(rejected)}), allowed is a share of {self.rules.max_rejected_share}; "
                f"the first is {first['id']} ({first['reason']}: {first['detail'] or '-'}); "
                "mend the source or raise max_rejected_share"
            )

    # ---- pass 2 ----------------------------------------------------------------------------------

    def _write(self, samples: Sequence[Record]) -> list[Shard]:
        """The new shards, split by split; what is not wanted now stands in shards of its own, which
        nobody encodes or loads until it is.
        """
        units: list[Record] = []
        for split, wanted in itertools.product(("train", "heldout", "unseen"), (True, False)):
            mine = [
                _sample(sample)
                for sample in samples
                if (sample["split"], sample["wanted"]) == (split, wanted)
            ]
            size = sum(sample["length"] for sample in mine)
            shards = -(-len(mine) // self.rules.shard_samples)
            shards = min(len(mine), max(shards, -(-size // self.rules.shard_bytes)))
            for index in range(shards):
                some = mine[index * len(mine) // shards : (index + 1) * len(mine) // shards]
                unit = {"split": split, "samples": some}
                units.append({"unit": fingerprint([_CODE, unit]) + "-shard", **unit})
        results = self._resume("write", functools.partial(_writer, self.dataset), units)
        return [Shard(**result["shard"]) for result in results]

    def _add_captions(self, rows: Sequence[tuple[Record, Row]], limit: float) -> list[Shard]:
        """The shards of the base version, those written anew that have a picture for which these
        rows have another caption; what encoders made of the pictures goes along.
        """
        stored = list(self.base.shards) if self.base else []
        if not rows:
            return stored
        from . import shards

        by_key: dict[str, list[tuple[Record, Row]]] = {}
        for it, row in rows:
            by_key.setdefault(it["key"], []).append((it, row))
        units: dict[str, Record] = {}
        for shard in stored:
            table = shards.read_table(self.dataset, shard.name, ["key", "captions"])
            more: dict[str, list[str]] = {}
            for key, captions in zip(*(table[name].to_pylist() for name in ("key", "captions")),
                                     strict=True):  # fmt: skip
                for it, row in by_key.get(key, ()):
                    it["split"] = shard.split
                    new = [one for one in row.captions if one not in captions]
                    if new and self._split(row, limit) == shard.split:
                        it["reason"] = "caption_added"
                        more.setdefault(key, []).extend(new)
                        captions = captions + new
                    elif new:
                        it["reason"] = "caption_of_other_split"
            if more:
                unit = {"shard": shard.name, "split": shard.split, "captions": more}
                name = fingerprint([_CODE, unit]) + "-shard"
                units[shard.name] = {"unit": name, **unit}
        work = functools.partial(_captioner, self.dataset)
        results = self._resume("write", work, list(units.values()))
        made = {name: Shard(**it["shard"]) for name, it in zip(units, results, strict=True)}
        return [made.get(shard.name, shard) for shard in stored]

    # ---- the selection ---------------------------------------------------------------------------

    def _select(
        self, old: Sequence[Shard], written: Sequence[Shard], outcomes: list[Record]
    ) -> tuple[tuple[Shard, ...], list[Record]]:
        """All shards with what is left out of them, and the outcomes with that said."""
        decided = {shard.name for shard in self.base.shards} if self.base else set[str]()
        stands = self.base is not None and _selects_alike(self.base, self.rules, self.scorers)
        if self.scorers.specs:
            from .score import score

            progress = self.progress
            score(
                self.dataset, (*old, *written), self.scorers.specs, self.scorers.build,
                self.executor, progress and functools.partial(progress, "score"),
            )  # fmt: skip
        stored = [it for it in outcomes if it["outcome"] in STORED]
        met: dict[str, int] = {}
        for it in stored:
            met.setdefault(it["key"], len(met))
        shards = select(
            self.dataset, (*old, *written), met, self.rules, self._scores,
            decided=decided if stands else (),
        )  # fmt: skip
        reasons = dropped_keys(Manifest(self.dataset, 0, None, shards))
        for it in stored:
            it["reason"] = reasons.get(it["key"], "")
            it["outcome"] = "filtered" if it["reason"] else "kept"
        return shards, outcomes

    def _scores(self, shard: str) -> Mapping[str, Any]:
        from .score import read_scores

        return read_scores(self.dataset, shard, [*self.scorers.fingerprints.values()])

    def _resume(self, stage: str, factory: Any, units: list[Record]) -> list[Record]:
        """Results of the units in order; what an earlier, killed run has committed is only read."""
        staging = storage.join(self.dataset, "staging")
        present = set(storage.list_names(staging))
        todo = [unit for unit in units if f"{unit['unit']}.json" not in present]
        past, progress = len(units) - len(todo), self.progress
        fresh = run(
            factory,
            todo,
            executor=self.executor,
            keep=False,
            progress=progress and (lambda done, _: progress(stage, past + done, len(units))),
        )
        done = {unit["unit"]: result for unit, result in zip(todo, fresh, strict=True)}
        return [
            done[name]
            if (name := unit["unit"]) in done
            else storage.read_json(_result_url(self.dataset, name))
            for unit in units
        ]


# ---- what runs in workers ------------------------------------------------------------------------


def _reader(
    dataset: str, reading: dict[str, Any], download: DownloadRules
) -> Callable[[Record], Record]:
    """Pass 1 over one unit: pictures into staging/{unit}.bin, what they are into {unit}.json."""
    from . import dedup, images

    gone = blocked(dataset)
    max_side = reading["max_side"]
    policy = images.DecodePolicy(
        background=tuple(reading["background"]),
        max_pixels=reading["max_pixels"],
        max_bytes=reading["max_bytes"],
        animated=reading["animated"],
        # from 1 to 2 times the side, 39.5 to 42.9 dB (JPEG's own loss in it) from Lanczos alone
        draft_side=max_side,
    )

    def fetched(image: str) -> bytes:
        try:
            return fetch_image(image, policy.max_bytes)
        except OverLong as error:
            raise Rejected("too_many_bytes", str(error)) from None
        except PermissionError as error:
            # Of a store it speaks of our credentials, which may have expired, not of a picture.
            if not storage.is_local(image):
                raise
            raise Rejected("unreadable", str(error)) from None
        except (FileNotFoundError, IsADirectoryError, Damaged) as error:
            raise Rejected("unreadable", str(error)) from None

    def read(
        row: dict[str, Any],
        answers: Iterator[bytes | Rejected],
        stage: Callable[[bytes], int],
        found: dict[str, Any],
    ) -> None:
        if row["problem"]:
            raise Rejected(row["problem"], row["image"])
        data = next(answers) if is_remote(row["image"]) else fetched(row["image"])
        if isinstance(data, Rejected):
            raise data
        found["key"] = dedup.key(data)
        if found["key"] in gone:
            raise Rejected("removed", "taken down, and may not come back")
        if row["sha256"] and hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise Rejected("hash_mismatch", f"wanted sha256 {row['sha256']}")
        image, info = images.decode(data, policy)
        width, height = info["width"], info["height"]
        image, stored, ext = images.store(image, data, info, max_side)
        found |= {
            "offset": stage(stored),
            "length": len(stored),
            "ext": ext,
            "width": image.width,
            "height": image.height,
            "format": info["format"],
            "flags": info["flags"],
            "scores": {
                "original_width": width,
                "original_height": height,
                "aspect": round(max(width, height) / min(width, height), 4),
                "look": dedup.look(image),
            },
        }

    def work(unit: dict[str, Any]) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        remote = [
            row["image"] for row in unit["rows"] if not row["problem"] and is_remote(row["image"])
        ]
        with (
            contextlib.ExitStack() as after,
            Downloader(download, policy.max_bytes) as downloader,
            contextlib.closing(downloader.all(remote)) as answers,
            storage.publishing(storage.join(dataset, "staging", f"{unit['unit']}.bin")) as file,
        ):
            after.callback(release)

            def stage(data: bytes) -> int:
                offset = file.tell()
                file.write(data)
                return offset

            for row in unit["rows"]:
                results.append(found := {})
                try:
                    read(row, answers, stage, found)
                except Rejected as rejected:
                    found |= {"reason": rejected.reason, "detail": rejected.detail}
        return _commit(dataset, unit["unit"], {"unit": unit["unit"], "rows": results})

    return work


def _writer(dataset: str) -> Callable[[Record], Record]:
    """Pass 2 over one unit: a shard from staged pictures."""
    from . import shards

    def pictures(samples: list[Record]) -> dict[str, bytes]:
        wanted: dict[str, list[Record]] = {}
        for it in samples:
            wanted.setdefault(it["staged"], []).append(it)
        found: dict[str, bytes] = {}
        for staged, some in wanted.items():
            url = storage.join(dataset, "staging", f"{staged}.bin")
            ranges = [(it["offset"], it["length"]) for it in some]
            found |= zip((it["key"] for it in some), storage.read_ranges(url, ranges), strict=True)
        return found

    def stored(samples: list[Record]) -> Iterator[shards.ShardSample]:
        for start in range(0, len(samples), 128):  # a shard of photographs need not fit in memory
            some = samples[start : start + 128]
            data = pictures(some)
            for it in some:
                captions = tuple(it["captions"])
                yield shards.ShardSample(
                    it["key"], data[it["key"]], it["ext"], captions, it["meta"]
                )

    def work(unit: Record) -> Record:
        shard = shards.write_shard(stored(unit["samples"]), dataset, unit["split"])
        return _commit(dataset, unit["unit"], {"shard": asdict(shard)})

    return work


def _captioner(dataset: str) -> Callable[[Record], Record]:
    """One unit: a shard written anew with more captions."""
    from . import shards
    from .carry import carry

    def work(unit: Record) -> Record:
        more, old = unit["captions"], unit["shard"]
        keys = shards.read_table(dataset, old, ["key"])["key"].to_pylist()
        samples = (
            replace(it, captions=(*it.captions, *more.get(it.key, ())))
            for it in shards.read_shard(storage.join(dataset, "shards", f"{old}.tar"))
        )
        shard = shards.write_shard(samples, dataset, unit["split"])
        carry(dataset, shard, {key: (old, row) for row, key in enumerate(keys)})
        return _commit(dataset, unit["unit"], {"shard": asdict(shard)})

    return work


def _commit(dataset: str, unit: str, result: Record) -> Record:
    storage.publish_bytes(_result_url(dataset, unit), json.dumps(result).encode())
    return result


def _result_url(dataset: str, unit: str) -> str:
    return storage.join(dataset, "staging", f"{unit}.json")


# ---- small parts ---------------------------------------------------------------------------------


def _explained(outcome: Record) -> str:
    return f"{outcome['outcome']}:{outcome['reason']}"


def _still_out_of_reach(outcome: Record, retried: set[tuple[str, str]]) -> bool:
    return outcome["reason"] in _MAY_CHANGE and (outcome["id"], outcome["stamp"]) in retried


def _sample(sample: Record) -> Record:
    """What pass 2 needs of a sample."""
    row: Row = sample["row"]
    captions = sample["captions"]
    meta = {
        "source": row.id,
        "width": sample["width"],
        "height": sample["height"],
        "format": sample["format"],
        "flags": sample["outcome"]["flags"],
        "scores": {**sample["scores"], "caption_characters": len(captions[0])},
    }
    if row.label is not None:
        meta["label"] = row.label
    return {name: sample[name] for name in ("key", "staged", "offset", "length", "ext")} | {
        "captions": captions,
        "meta": meta,
    }


def _uniform(purpose: str, text: str) -> float:
    """A number in [0, 1) that the text always gets."""
    digest = hashlib.blake2b(f"{purpose}\0{text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _described(rules: IngestRules) -> dict[str, Any]:
    described = json.loads(json.dumps(asdict(rules)))
    return {name: it for name, it in described.items() if name != "download"} | {"code": _CODE}


def _same_rules(version: Manifest, rules: IngestRules) -> bool:
    """Whether the stored samples would be the same, in the same shards."""
    other = dict.fromkeys(("heldout_limit", "scorers", *SELECTING))
    return {**version.rules, **other} == {**_described(rules), **other}


def _selects_alike(version: Manifest, rules: IngestRules, scorers: Scorers) -> bool:
    described = _described(rules) | {"scorers": scorers.fingerprints}
    return all(version.rules.get(name) == described[name] for name in ("scorers", *SELECTING))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _clean(dataset: str) -> None:
    """Remove staging, and the shards of killed runs over other rows, which no version lists."""
    staging = storage.join(dataset, "staging")
    names = storage.list_names(staging)
    if not names and not storage.exists(staging):
        return
    for folder in _FOLDERS:
        storage.sweep(storage.join(dataset, folder))
    results = [name for name in names if name.endswith("-shard.json")]
    written = {storage.read_json(storage.join(staging, name))["shard"]["name"] for name in results}
    for version in versions(dataset) if written else ():
        written -= {shard.name for shard in read(dataset, version).shards}
    for name in written:
        storage.delete(storage.join(dataset, "shards", f"{name}.tar"))
        storage.delete(storage.join(dataset, "tables", f"{name}.parquet"))
    storage.delete(staging)
