"""A version made again, elsewhere, from what its manifest says: that is how much it says.

A version came about in steps, each by its own rules and from the rows that were there. The steps
are done again in their order, each with the rows that its table of inputs lists, whatever the
sources have got since; what comes out must have the same digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import storage
from .decide import Holding
from .download import DownloadRules
from .execute import Executor
from .ingest import CODE, NO_SCORERS, IngestRules, Progress, Scorers
from .manifest import Manifest, latest, read
from .outcomes import read_batches
from .passes import Run
from .rows import Positions, names_of, row_name
from .sources import Row, Source, SourceOptions, open_source
from .versions import compact


def reproduce(
    version: Manifest,
    dataset: str,
    executor: Executor | None = None,
    progress: Progress | None = None,
    scorers: Scorers | None = None,
) -> Manifest:
    """Make `version` again as the newest version of a data set that does not exist yet.

    ValueError: there is a data set, the code or the scorers are others, pictures were taken down, a
    source no longer has what it had (names some rows), or what came out differs.
    """
    executor, scorers = executor or Executor(), scorers or NO_SCORERS
    dataset = storage.absolute(dataset)
    if latest(dataset):
        raise ValueError(f"{dataset}: there is a data set; name one that does not exist yet")
    steps = [version]
    while steps[0].parent is not None:
        steps.insert(0, read(version.dataset, steps[0].parent))
    for step in steps:
        where = f"{version.dataset} version {step.version}"
        if step.redacted.get("expired"):
            raise ValueError(
                f"{where}: `darkroom gc --keep` let it expire, and with it what version "
                f"{version.version} came from; it cannot be made again"
            )
        if step.redacted:
            raise ValueError(f"{where}: pictures were taken out of it; it cannot be made again")
        if step.rules["code"] != CODE:
            raise ValueError(
                f"{where}: made by data code {step.rules['code']}, this is {CODE}; "
                "use the darkroom that made it"
            )
        if step.rules["scorers"] != scorers.fingerprints:
            raise ValueError(
                f"{where}: its scorers were {step.rules['scorers']}, these are "
                f"{scorers.fingerprints}; name its own (`darkroom reproduce --scorers`)"
            )
    before: Manifest | None = None
    made: Manifest | None = None
    for step in steps:
        made = _step(step, before, made, dataset, executor, progress, scorers)
        before = step
    assert made is not None
    return made


def _step(
    step: Manifest,
    before: Manifest | None,
    base: Manifest | None,
    dataset: str,
    executor: Executor,
    progress: Progress | None,
    scorers: Scorers,
) -> Manifest:
    if before and step.inputs == before.inputs and step.rules == before.rules:
        made = compact(dataset)
    else:
        rules = step.rules
        holding = Holding(
            rules["heldout_limit"], tuple(rules["heldout_exceptions"]), rules["unseen_share"]
        )
        run = Run(dataset, rules_of(step), executor, progress, scorers, base, base, holding=holding)
        with storage.lock(storage.join(dataset, ".lock")):
            made = run.run(list(_recorded(step)), step.sources).manifest
    if made.digest != step.digest:
        raise ValueError(
            f"{step.dataset} version {step.version}: came out with digest {made.digest}, not "
            f"{step.digest}; {_difference(step, made)}"
        )
    return made


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
class _Recorded:
    """A source with the rows that a version saw of it."""

    source: Source
    seen: Positions

    @property
    def url(self) -> str:
        return self.source.url

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def rows(self) -> Iterator[Row]:
        for row in self.source.rows():
            if self.seen(names_of(row_name(row.id, row.stamp)))[0] >= 0:
                yield row


def _recorded(version: Manifest) -> Iterator[_Recorded]:
    """Its sources in the order in which it met them."""
    names, order = bytearray(), dict[str, None]()
    for batch in read_batches(version, ["id", "stamp", "source"]):
        columns = (batch[name].to_pylist() for name in ("id", "stamp", "source"))
        for row, stamp, source in zip(*columns, strict=True):
            names += row_name(row, stamp)
            order[source] = None
    seen, options = Positions(names_of(names)), rules_of(version).options
    for url in [*order, *sorted(version.sources.keys() - order.keys())]:
        yield _Recorded(open_source(url, options=options), seen)


def _difference(wanted: Manifest, made: Manifest) -> str:
    """What the rows say of why two versions differ."""
    rows: list[dict[str, tuple[str, str]]] = []
    for version in (wanted, made):
        rows.append({})
        for batch in read_batches(version, ["id", "outcome", "reason"]):
            columns = (batch[name].to_pylist() for name in ("id", "outcome", "reason"))
            rows[-1] |= {row: (it, why) for row, it, why in zip(*columns, strict=True)}
    if gone := sorted(rows[0].keys() - rows[1].keys()):
        return f"{len(gone)} rows are gone or have changed: {', '.join(gone[:3])}"
    other = sorted(row for row, it in rows[0].items() if rows[1][row] != it)
    if other:
        was, now = rows[0][other[0]], rows[1][other[0]]
        return f"{len(other)} rows end otherwise: {other[0]} was {was} and is {now}"
    return "its rows end as they did: the pictures or captions are others"
