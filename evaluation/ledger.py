"""Which model serves is what the ledger's entries add up to: numbered, and never changed.

Entry n + 1 is decided with entries 1..n in view and created exclusively, so two decisions against
the same champion cannot both count: the second is a `Conflict` and has to be made again. Everything
else (aliases in a registry, what a service has loaded) is a projection of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from pipeline import storage

Kind = Literal["promote", "reject", "rollback"]


class Conflict(RuntimeError):
    """Another entry was written since the ledger was read: decide again."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One decision. The ledger fills in `number`, `champion_before` and `time`."""

    kind: Kind
    candidate: str
    """Names a model version for good: whatever the registry calls it."""
    verdict: Mapping[str, Any] | None = None
    number: int = 0
    champion_before: str | None = None
    time: str = ""

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not self.candidate:
            raise ValueError(f"a {self.kind} entry needs a candidate")


def served(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The models that served and were not rolled back, in order; the last one is the champion."""
    line: list[str] = []
    for entry in entries:
        if entry.kind == "promote":
            line.append(entry.candidate)
        elif entry.kind == "rollback":
            while line and line[-1] != entry.candidate:
                line.pop()
    return tuple(line)


class Ledger:
    """The ledger of one line of models: `{url}/{name}/000001.json`, ..."""

    def __init__(self, url: str, name: str):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"ledger name {name!r}: wanted letters, digits, '.', '_', '-'")
        self.name, self.url = name, storage.join(url, name)
        self._read: list[Entry] = []  # entries never change, so each is read once

    def entries(self) -> tuple[Entry, ...]:
        """All entries, from the first. ValueError when one is missing or is not an entry."""
        for number, name in enumerate(storage.list_names(self.url), 1):
            if name != _file(number):
                if storage.exists(storage.join(self.url, _file(number))):
                    break  # written while the folder was listed: seen next time
                raise ValueError(
                    f"{self.url}: found {name} where {_file(number)} should be; "
                    "entries are never removed, so restore it from a backup"
                )
            if number <= len(self._read):
                continue
            url = storage.join(self.url, name)
            try:
                entry = Entry(**storage.read_json(url))
            except TypeError as error:
                raise ValueError(f"{url}: not an entry of a ledger ({error})") from None
            self._read.append(entry)
        return tuple(self._read)

    def champion(self) -> str | None:
        """The model in service; None before the first promotion."""
        line = served(self.entries())
        return line[-1] if line else None

    def previous(self) -> str | None:
        """The model that served before the champion: where a rollback leads."""
        line = served(self.entries())
        return line[-2] if len(line) > 1 else None

    def append(self, entry: Entry, expected: int) -> Entry:
        """Write the entry, decided in view of `expected` entries, as the next one.

        Promoting (or rolling back to) the model that serves already changes nothing: the entry that
        put it there is returned. Conflict when there are more than `expected` entries by now.
        """
        entries = self.entries()
        line = served(entries)
        champion = line[-1] if line else None
        if entry.kind != "reject" and entry.candidate == champion:
            return next(e for e in reversed(entries) if e.kind != "reject")
        if len(entries) != expected:
            raise self._conflict(expected)
        if entry.kind == "rollback" and entry.candidate not in line:
            raise ValueError(
                f"{self.url}: {entry.candidate} cannot be rolled back to, it did not serve "
                f"(those that did: {', '.join(line) or 'none'})"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = replace(entry, number=expected + 1, champion_before=champion, time=now)
        data = storage.json_bytes(asdict(entry))
        if not storage.create_exclusive(storage.join(self.url, _file(entry.number)), data):
            raise self._conflict(expected)
        return entry

    def settle(self, decide: Callable[[str | None], Entry]) -> Entry:
        """Append what `decide(champion)` says, asking it again as often as another one comes first.

        Some entry is written in every round, so rounds end with the other writers.
        """
        while True:
            entries = self.entries()
            line = served(entries)
            try:
                return self.append(decide(line[-1] if line else None), expected=len(entries))
            except Conflict:
                continue

    def rollback(self, to: str | None = None) -> Entry:
        """Return to the model that served before (or `to`, an earlier one); ValueError without."""
        expected, target = len(self.entries()), to or self.previous()
        if target is None:
            raise ValueError(
                f"{self.url}: no model served before {self.champion()}; nothing changed"
            )
        return self.append(Entry(kind="rollback", candidate=target), expected)

    def _conflict(self, expected: int) -> Conflict:
        return Conflict(
            f"{self.url}: entry {expected + 1} was written by another run; decide again against "
            f"the champion of now"
        )


def _file(number: int) -> str:
    return f"{number:06d}.json"
