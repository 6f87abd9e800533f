"""What became of every input row: a parquet for each version, and its sums.

A row is kept, filtered (a rule), rejected (broken, hostile, out of reach) or a duplicate; never two
of them, and never none. The tables are named by their content, and are read and written some rows
at a time: there may be more rows than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import storage
from .manifest import Manifest, latest, read, versions

if TYPE_CHECKING:
    import numpy as np

    from .rows import Positions

OUTCOMES = ("kept", "filtered", "rejected", "duplicate")
STORED = ("kept", "filtered")
"""Of which the shards hold the picture: a version with other rules may choose otherwise."""
_TEXTS = ("id", "stamp", "source", "outcome", "reason", "detail", "key", "split")
_GROUP = 1 << 16  # rows that are read and written at a time

Outcome = Mapping[str, Any]
"""The columns of the table: texts, and a list of `flags`."""
Batch = Any
"""Some rows of the table: a pyarrow.RecordBatch."""


class Rejected(Exception):
    """A picture or row that cannot be used: a reason code, and what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail[:200].encode("utf-8", "backslashreplace").decode()


def read_outcomes(version: Manifest) -> list[dict[str, Any]]:
    """Of all rows that a version has seen, in the order they were met."""
    return [it for batch in read_batches(version) for it in batch.to_pylist()]


def read_batches(version: Manifest, columns: list[str] | None = None) -> Iterator[Batch]:
    """The same, or some columns of it, some rows at a time."""
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    parquet: Any = pq
    with parquet.ParquetFile(storage.local_copy(_url(version))) as file:
        yield from file.iter_batches(_GROUP, columns=columns)


def batch_of(outcomes: Iterable[Outcome]) -> Batch:
    """Outcomes as the table holds them."""
    import pyarrow as pa_  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pa_
    rows = list(outcomes)
    columns = {name: pa.array([it[name] for it in rows], pa.string()) for name in _TEXTS}
    columns["flags"] = pa.array([it["flags"] for it in rows], pa.list_(pa.string()))
    return pa.RecordBatch.from_pydict(columns)


def restated(batch: Batch, dropped: Positions, reasons: np.ndarray) -> Batch:
    """Rows whose picture is stored, as kept or as filtered for a reason; others as they are.

    `dropped` has the names of the keys that are left out, `reasons` says why, and ends with "".
    """
    import numpy as np
    import pyarrow as pa_  # pyright: ignore[reportMissingTypeStubs]

    from .rows import names_of_keys

    pa: Any = pa_
    outcome = np.array(batch["outcome"].to_pylist(), object)
    reason = np.array(batch["reason"].to_pylist(), object)
    stored = np.flatnonzero(np.isin(outcome.astype(str), STORED))
    keys = batch["key"].take(pa.array(stored)).to_pylist()
    at = dropped(names_of_keys(keys))  # -1, where it is not left out, is the last of the reasons
    reason[stored] = reasons[at]
    outcome[stored] = np.where(at >= 0, "filtered", "kept")
    columns = {name: batch[name] for name in batch.schema.names}
    columns["outcome"] = pa.array(outcome.tolist(), pa.string())
    columns["reason"] = pa.array(reason.tolist(), pa.string())
    return pa.RecordBatch.from_pydict(columns)


def count(batches: Iterable[Batch]) -> dict[str, int]:
    """Rows by outcome and by outcome:reason, and how often each flag was raised."""
    totals: Counter[str] = Counter()
    for batch in batches:
        totals.update(_tally(batch))
    return _stated(totals)


def _tally(batch: Batch) -> Counter[str]:
    outcomes, reasons = batch["outcome"].to_pylist(), batch["reason"].to_pylist()
    totals = Counter[str](outcomes)
    totals.update(f"{it}:{reason}" for it, reason in zip(outcomes, reasons, strict=True) if reason)
    totals.update(f"flag:{flag}" for flag in batch["flags"].flatten().to_pylist())
    return totals


def _stated(totals: Counter[str]) -> dict[str, int]:
    counts = {name: totals[name] for name in OUTCOMES}
    details = {name: it for name, it in totals.items() if ":" in name}
    lost = totals.keys() - counts.keys() - details.keys()
    assert not lost, f"rows without an outcome: {lost}"
    return {"seen": sum(counts.values()), **counts, **dict(sorted(details.items()))}


class Table:
    """A table that is being written."""

    def __init__(self, writer: Any):
        self._writer = writer
        self._waiting: list[Batch] = []
        self._totals: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        self._totals.update(_tally(batch))
        self._waiting.append(batch)
        if sum(map(len, self._waiting)) >= _GROUP:
            self._write()

    @property
    def counts(self) -> dict[str, int]:
        """Rows by outcome and by outcome:reason, and how often each flag was raised."""
        return _stated(self._totals)

    def end(self) -> None:
        """Write what was added since."""
        self._write(everything=True)

    def _write(self, everything: bool = False) -> None:
        """Groups of equal size, however the rows came: the same rows, the same bytes."""
        import pyarrow as pa_  # pyright: ignore[reportMissingTypeStubs]

        pa: Any = pa_
        if self._waiting:
            rows = pa.Table.from_batches(self._waiting)
            whole = len(rows) if everything else len(rows) - len(rows) % _GROUP
            for start in range(0, whole, _GROUP):
                self._writer.write_table(rows.slice(start, min(_GROUP, whole - start)))
            self._waiting = rows.slice(whole).combine_chunks().to_batches()


@contextmanager
def writing(dataset: str) -> Generator[tuple[Table, Callable[[], str]]]:
    """A table to add to, and a function that publishes it and returns its name."""
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    parquet: Any = pq
    with (
        storage.draft(storage.join(dataset, "inputs")) as (file, publish),
        parquet.ParquetWriter(file, batch_of([]).schema) as writer,
    ):
        table = Table(writer)

        def done() -> str:
            table.end()
            writer.close()
            file.flush()
            digest = storage.sha256(file.name)[:16]
            publish(storage.join(dataset, "inputs", f"{digest}.parquet"))
            return digest

        yield table, done


def explain(dataset: str, wanted: str) -> list[dict[str, Any]]:
    """What became of the rows whose key begins with `wanted` or whose id has it in it: their
    outcomes, with a `detail` for every reason that has one (see `reasons`), each with the first
    `version` that has it and, where stored, its `shard` and the `encoders` that made nothing of it.

    ValueError: there is no data set, or it has seen no such row.
    """
    from . import reasons

    last = latest(dataset)
    if last is None:
        raise ValueError(f"{dataset}: no data set there")
    found = list(_matching(last, wanted))
    if not found:
        raise ValueError(
            f"{dataset} version {last.version} has seen no row whose key begins with {wanted!r} or "
            f"whose id has it in it; it has seen {last.counts['seen']} rows"
        )
    places = reasons.places(last, {it["key"] for it in found if it["outcome"] in STORED})
    details = reasons.details(last, found, places)
    refusals = reasons.refusals(last, {place.shard.name for place in places.values()})
    refused = [(by, frozenset(by.keys)) for by in refusals]
    first: dict[tuple[str, ...], int] = {}
    for version in versions(dataset):
        for it in _matching(read(dataset, version), wanted):
            first.setdefault(_identity(it), version)
    return [
        {
            **it,
            "detail": detail,
            "version": first[_identity(it)],
            "shard": places[it["key"]].shard.name if it["key"] in places else "",
            "encoders": [
                {"encoder": by.encoder, "fingerprint": by.fingerprint, "reason": by.reason}
                for by, keys in refused
                if it["outcome"] == "kept" and it["key"] in keys
            ],
        }
        for it, detail in zip(found, details, strict=True)
    ]


def _matching(version: Manifest, wanted: str) -> Iterator[dict[str, Any]]:
    import pyarrow.compute as pc  # pyright: ignore[reportMissingTypeStubs]

    compute: Any = pc
    if not has_table(version):
        return
    for batch in read_batches(version):
        of_key = compute.starts_with(batch["key"], wanted.lower())
        of_row = compute.match_substring(batch["id"], wanted)
        yield from batch.filter(compute.or_(of_key, of_row)).to_pylist()


def has_table(version: Manifest) -> bool:
    """Whether it is known what became of its rows; of versions that expired long ago it is not."""
    return not version.redacted.get("expired") or storage.exists(_url(version))


def _identity(it: Outcome) -> tuple[str, ...]:
    """A row may have been out of reach in one version and kept in the next."""
    return it["id"], it["stamp"], it["outcome"], it["reason"]


def table_name(version: Manifest) -> str:
    """Of its file in inputs/; once they went by their versions' numbers."""
    return f"{version.inputs or f'{version.version:06d}'}.parquet"


def _url(version: Manifest) -> str:
    return version.url("inputs", table_name(version))
