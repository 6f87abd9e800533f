"""Sources in, a new version of a data set out: every input row ends in exactly one outcome.

What there is to say before a run: the rules, and whether there is anything to do. A scheduled run
with nothing new imports no more than this. The run itself is in `passes`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from . import storage
from .download import DownloadRules
from .execute import Executor
from .filters import SELECTING, SelectionRules
from .manifest import Manifest, latest, read, versions
from .outcomes import table_name
from .sources import SourceOptions, open_source

if TYPE_CHECKING:
    from .score import Build, ScorerSpec

FOLDERS = ("versions", "shards", "tables", "inputs", "selections", "staging")
CODE = 4
"""Raised by hand when the same rows and rules give other bytes: everything is read again."""

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
    """Share of all pairs (captions, or caption and style) that training never sees. The first
    caption of a sample decides; of look-alikes in different splits see `near_duplicates`."""
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
    removed_lookalikes: Literal["reject", "keep"] = "reject"
    """Pictures that look the same as one that was taken down (see `dedup`), such as its file saved
    anew: `removed_lookalike`."""
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
        if self.removed_lookalikes not in ("reject", "keep"):
            raise ValueError(
                f"removed_lookalikes must be reject or keep, got {self.removed_lookalikes!r}"
            )
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ValueError(
                f"background must be three levels from 0 to 255, got {self.background}"
            )

    def reading(self) -> dict[str, Any]:
        """What pass 1 depends on; other rules may change in a run that goes on."""
        names = ("max_side", "background", "max_pixels", "max_bytes", "animated")
        names += ("removed_lookalikes",)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Scorers:
    """Models that score stored samples, and how to make them (training.encoders.scorers)."""

    specs: tuple[ScorerSpec, ...]
    build: Build

    @property
    def fingerprints(self) -> dict[str, str]:
        return {spec.name: spec.fingerprint for spec in self.specs}

    def check(self, dataset: str, rules: SelectionRules) -> None:
        """ValueError when rules speak of a score that none of these gives."""
        given = [column for spec in self.specs for column in spec.columns]
        if missing := rules.scores.keys() - {*given}:
            raise ValueError(
                f"{dataset}: rules speak of the score {min(missing)!r}, which no scorer gives "
                f"({', '.join(given) or 'there is none'}); name a scorer of that name "
                "(`darkroom ingest --scorers`, or data.scorers of a recipe)"
            )


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
    scorers.check(dataset, rules)  # before hours of reading
    opened = [open_source(url, options=rules.options) for url in sources]
    prints = {source.url: source.fingerprint() for source in opened}
    if len(prints) < len(opened):
        twice = Counter(source.url for source in opened).most_common(1)[0][0]
        raise ValueError(f"{twice}: named twice; name each source once")
    with storage.lock(storage.join(dataset, ".lock")):
        parent = latest(dataset)
        base = parent if parent and _same_rules(parent, rules) else None
        if base and _is_done(base, prints, rules, scorers):
            clean(dataset)
            return IngestResult(base, base.counts, new=0, reused=True)

        from .passes import Run

        run = Run(dataset, rules, executor, progress, scorers, parent, base)
        return run.run(opened, prints)


def unchanged(
    sources: Sequence[str], dataset: str, rules: IngestRules, scorers: Scorers | None = None
) -> Manifest | None:
    """The latest version, if `ingest` would return it at once."""
    dataset = storage.absolute(dataset)
    parent = latest(dataset)
    if parent is None or not _same_rules(parent, rules):
        return None
    if storage.is_local(dataset) and storage.exists(storage.join(dataset, "staging")):
        return None  # a killed run has left something to clear away
    opened = [open_source(url, options=rules.options) for url in sources]
    prints = {source.url: source.fingerprint() for source in opened}
    return parent if _is_done(parent, prints, rules, scorers or NO_SCORERS) else None


def left_behind(version: Manifest, sources: Sequence[str], rules: IngestRules) -> tuple[str, ...]:
    """The sources of a version that the next one would be without: built anew from `sources`, as
    its rules of storage are others.
    """
    if _same_rules(version, rules):
        return ()
    named = {open_source(url, options=rules.options).url for url in sources}
    return tuple(sorted(version.sources.keys() - named))


def described(rules: IngestRules) -> dict[str, Any]:
    """The rules as a version states them."""
    stated = json.loads(json.dumps(asdict(rules)))
    return stated | {"code": CODE}


_CAME_LATER = {"removed_lookalikes": "reject"}


def _same_rules(version: Manifest, rules: IngestRules) -> bool:
    """Whether the stored samples would be the same, in the same shards."""
    other = dict.fromkeys(
        ("heldout_limit", "heldout_exceptions", "scorers", "download", *SELECTING)
    )
    # a rule that came later than the version was not missed: nobody had looks to compare
    return {**_CAME_LATER, **version.rules, **other} == {**described(rules), **other}


def selects_alike(version: Manifest, rules: IngestRules, scorers: Scorers) -> bool:
    """Whether the version would be made of the same samples."""
    stated = described(rules) | {"scorers": scorers.fingerprints}
    return all(version.rules.get(name) == stated[name] for name in ("scorers", *SELECTING))


def _is_done(
    version: Manifest, prints: Mapping[str, str], rules: IngestRules, scorers: Scorers
) -> bool:
    """Whether there is nothing new. Of a picture that was not there a table does not tell when it
    comes: such rows are looked at again.
    """
    return not version.counts.get("rejected:missing_file") and alike(
        version, prints, rules, scorers
    )


def alike(
    version: Manifest, prints: Mapping[str, str], rules: IngestRules, scorers: Scorers
) -> bool:
    """Whether a version is of these sources as they are, by these rules."""
    same = all(version.sources.get(url) == it for url, it in prints.items())
    return same and selects_alike(version, rules, scorers)


def clean(dataset: str) -> None:
    """Remove what killed runs left: staging, and what they published and no version lists.

    Only where a lock keeps others out: elsewhere they may be at work.
    """
    staging = storage.join(dataset, "staging")
    if not storage.is_local(dataset) or not storage.exists(staging):
        return
    for folder in FOLDERS:
        storage.sweep(storage.join(dataset, folder))
    listed = [read(dataset, version) for version in versions(dataset)]
    shards = {shard.name for version in listed for shard in version.shards}
    kept = {
        "shards": {f"{name}.tar" for name in shards},
        "tables": {f"{name}.parquet" for name in shards},
        "inputs": {table_name(version) for version in listed},
    }
    for folder, names in kept.items():
        for name in set(storage.list_names(storage.join(dataset, folder))) - names:
            storage.delete(storage.join(dataset, folder, name))
    storage.delete(staging)
