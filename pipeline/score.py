"""What models say of each stored sample, for a selection to go by: scorers are handed in.

A scorer's scores of a shard lie in `scores/{fingerprint}/{shard}.parquet`, row by row those of the
shard, NaN where the model could not tell. The file's bytes depend on the shard and the scorer
alone; what is there is never made again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import storage
from .load import read_table
from .manifest import Shard
from .pictures import decoded
from .schema import Field, check

if TYPE_CHECKING:
    from PIL.Image import Image

    from .execute import Executor

BATCH = 64
"""Pictures that are handed over at once. The last bits of a score depend on it, so it is fixed."""
_MANY = 20
"""Of so many samples a scorer that can tell nothing is broken; of fewer, these may be odd ones."""

Scorer = Callable[[np.ndarray, Sequence[str]], Mapping[str, np.ndarray]]
"""(uint8 [n, 3, side, side], the first caption of each) -> float32 [n] by column. Scorers of one
side are handed the very same array, one after the other."""

_SCORE = Field("float32", ())


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer to be built.

    `name` is what it is called in messages, `columns` what its scores are called in a selection;
    `fingerprint` covers those and all that can change a number it gives. `options` (JSON) tell
    `build` where to find it. `side` is the side in pixels that pictures are fitted to.
    """

    name: str
    fingerprint: str
    columns: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    side: int = 224

    def __post_init__(self):
        for name in (self.name, *self.columns):
            check_name(name)
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"scorer {self.name}: wanted columns that differ, got {self.columns}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.fingerprint):
            raise ValueError(
                f"scorer {self.name}: fingerprint {self.fingerprint!r} cannot name a directory"
            )
        if self.side < 1:
            raise ValueError(f"scorer {self.name}: side must be at least 1, got {self.side}")


def check_name(name: str) -> None:
    """ValueError when a score cannot be called so."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "key":
        raise ValueError(f"score {name!r}: wanted a name of a-z, 0-9, _ other than 'key'")


Build = Callable[[ScorerSpec], Scorer]


@dataclass(frozen=True)
class Scored:
    """What was done now; what had been done before is not counted."""

    shards: int
    samples: int
    unknown: Mapping[str, int]
    """Column -> samples whose score was not finite."""


def score(
    dataset: str,
    shards: Sequence[Shard],
    specs: Sequence[ScorerSpec],
    build: Build,
    executor: Executor,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Every shard scored by every spec, each picture decoded once for all of them.

    ValueError: two scorers with the same column, a scorer that does not keep its contract, a shard
    of 20 samples or more of which a scorer could not score a single one.
    """
    columns = [column for spec in specs for column in spec.columns]
    if len(set(columns)) < len(columns):
        raise ValueError(f"each score needs a name of its own, got {', '.join(columns)}")
    dataset = storage.absolute(dataset)  # workers may stand in another directory
    done = {it.fingerprint: set(storage.list_names(_folder(dataset, it))) for it in specs}
    units: list[dict[str, Any]] = []
    for shard in shards:
        lacking = [name for name, found in done.items() if f"{shard.name}.parquet" not in found]
        if lacking:
            units.append({"shard": shard.name, "samples": shard.samples, "scorers": lacking})
    if not units:
        return Scored(0, 0, dict.fromkeys(columns, 0))
    from . import execute

    for spec in specs:
        storage.sweep(_folder(dataset, spec))  # what killed runs left half written
    work = partial(_Score, dataset, tuple(specs), build)
    results = execute.run(work, units, executor=executor, progress=progress)
    return Scored(
        shards=len(units),
        samples=sum(unit["samples"] for unit in units),
        unknown={name: sum(it["unknown"].get(name, 0) for it in results) for name in columns},
    )


def read_scores(dataset: str, shard: str, fingerprints: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of a shard by some scorers: column -> float32 [samples], NaN for unknown.

    ValueError when a scorer has not scored it, or has scored other samples.
    """
    from . import shards

    found: dict[str, np.ndarray] = {}
    keys: list[str] | None = None
    for fingerprint in fingerprints:
        url = _url(dataset, fingerprint, shard)
        try:
            table = shards.read_parquet(url)
        except FileNotFoundError:
            raise ValueError(
                f"{url}: shard {shard} has no scores by {fingerprint}; score the data set first"
            ) from None
        except ValueError as error:  # pyarrow's
            raise ValueError(f"{url}: no table ({error}); delete it and score again") from None
        if keys is None:
            keys = shards.read_table(dataset, shard, ["key"])["key"].to_pylist()
        if "key" not in table.column_names or table["key"].to_pylist() != keys:
            raise ValueError(f"{url}: not the samples of the shard; delete it and score again")
        for column in table.column_names:
            if column in found:
                raise ValueError(f"{url}: another scorer gives {column} too; name one of them")
            if column != "key":
                found[column] = table[column].to_numpy()
    return found


class _Score:
    """Does one unit per call; scorers are built when first needed, and stay."""

    def __init__(self, dataset: str, specs: tuple[ScorerSpec, ...], build: Build):
        self.dataset, self.build = dataset, build
        self.specs = {spec.fingerprint: spec for spec in specs}
        self.scorers: dict[str, Scorer] = {}

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        from . import images
        from .shards import Column, parquet_bytes

        shard: str = unit["shard"]
        specs = [self.specs[fingerprint] for fingerprint in unit["scorers"]]
        table = read_table(self.dataset, shard)
        count = len(table.keys)
        assert count == unit["samples"], (shard, count, unit["samples"])
        starts: list[int] = table.offsets[:-1].tolist()
        captions = [table.captions[start] for start in starts]
        scores = {column: np.empty(count, np.float32) for spec in specs for column in spec.columns}
        sides = sorted({spec.side for spec in specs})

        def fitted(picture: Image) -> list[np.ndarray]:
            return [images.fit(picture, side) for side in sides]

        first = 0
        for now in decoded(self.dataset, shard, table.keys, BATCH, fitted):
            last = first + len(now)
            pictures = dict(zip(sides, map(np.stack, zip(*now, strict=True)), strict=True))
            for spec in specs:
                given = self._scorer(spec)(pictures[spec.side], captions[first:last])
                where = f"scorer {spec.name}, shard {shard}, rows from {first}"
                check(where, given, dict.fromkeys(spec.columns, _SCORE), last - first)
                for column in spec.columns:
                    scores[column][first:last] = given[column]
            first = last
        unknown = {name: int(np.sum(~np.isfinite(values))) for name, values in scores.items()}
        for spec in specs:
            columns = {"key": Column("text", table.keys)}
            for name in spec.columns:
                if unknown[name] == count >= _MANY:
                    raise ValueError(
                        f"scorer {spec.name}, shard {shard}: none of {count} samples has a finite "
                        f"{name}; check the scorer's weights"
                    )
                values = np.where(np.isfinite(scores[name]), scores[name], np.nan)
                columns[name] = Column("real", values.tolist())
            storage.publish_bytes(
                _url(self.dataset, spec.fingerprint, shard), parquet_bytes(columns)
            )
        return {"unknown": unknown}

    def _scorer(self, spec: ScorerSpec) -> Scorer:
        if spec.fingerprint not in self.scorers:
            self.scorers[spec.fingerprint] = self.build(spec)
        return self.scorers[spec.fingerprint]


def _folder(dataset: str, spec: ScorerSpec) -> str:
    return storage.join(dataset, "scores", spec.fingerprint)


def _url(dataset: str, fingerprint: str, shard: str) -> str:
    return storage.join(dataset, "scores", fingerprint, f"{shard}.parquet")
