"""What a stage directory holds, asked without torch: what is done is known before anything heavy
starts.

stage.json            written last: where it is, the stage is done
weights.safetensors   the EMA weights            config.json   how to build the module for them
history.jsonl         a line per log point       preview.png   what it looks like
previews/             what it looked like at 000000100000.png images, and so on
repro/                where it diverged: the update that did (see `training.repro`)
job.json              what was asked             checkpoints/  what resuming needs
started.json          what its newest start took, phase by phase
averages/             snapshots of power-function averages, where they were asked for
tracking/             what is tracked, until MLflow has it (see `training.tracking`)
events.jsonl          warnings of workers that somebody else has started
stacks/               what each worker was doing when nothing went on, by its rank
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import storage

STAGE, JOB, CONFIG, HISTORY = "stage.json", "job.json", "config.json", "history.jsonl"
WEIGHTS, PREVIEW, CHECKPOINTS = "weights.safetensors", "preview.png", "checkpoints"
AVERAGES, PREVIEWS, REPRO = "averages", "previews", "repro"
STARTED = "started.json"
EVENTS, STACKS, TRACKING = "events.jsonl", "stacks", "tracking"

log = logging.getLogger(__name__)


def committed(stage_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The content of stage.json where the stage is done, else None."""
    path = os.path.join(stage_dir, STAGE)
    return storage.read_json(path) if os.path.exists(path) else None


def ancestry(stage_dir: str | os.PathLike[str] | None) -> Iterator[dict[str, Any]]:
    """The stage.json of a finished stage, and of those with whose weights it and they began, as
    `moved` has them."""
    seen = set[str]()  # a directory may hold another training now than the one that was a parent
    while stage_dir and str(stage_dir) not in seen and (done := committed(stage_dir)):
        done = moved(stage_dir, done)
        yield done
        seen.add(str(stage_dir))
        stage_dir = done.get("parent")


def moved(stage_dir: str | os.PathLike[str], said: dict[str, Any]) -> dict[str, Any]:
    """What a stage's job.json or stage.json says, in places of today: a home that was moved as a
    whole since the training began has data set, inputs and parent where its stages are."""
    begun = os.path.join(stage_dir, JOB)
    output = storage.read_json(begun).get("output") if os.path.exists(begun) else None
    if output is None:  # who reads all of a damaged one says so
        return said
    before = Path(output).parent.parent
    now = Path(stage_dir).absolute().parent.parent

    def place(was: str) -> str:
        inside = Path(was).is_relative_to(before)
        here = now / Path(was).relative_to(before) if inside else now
        return str(here) if inside and here.exists() else was

    parent = said.get("parent")
    return said | {
        "dataset": place(said["dataset"]),
        "inputs": {stage: place(where) for stage, where in said["inputs"].items()},
        "parent": parent and place(parent),
    }


def history(stage_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The log points so far, oldest first; a line that a killed process left torn is left out, and
    so, with a warning, is one that is not JSON."""
    return _records(Path(stage_dir, HISTORY), 0)[0]


def events(stage_dir: str | os.PathLike[str], after: int = 0) -> tuple[list[dict[str, Any]], int]:
    """({time, rank, level, message} of each event from byte `after` on, the byte after them)."""
    return _records(Path(stage_dir, EVENTS), after)


def _records(path: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """(whole lines of a file of JSON from a byte on, the byte after them)."""
    found, at = list[dict[str, Any]](), after
    if not path.exists():
        return found, at
    with open(path, "rb") as file:
        file.seek(after)
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                found.append(json.loads(line))
            except ValueError as error:
                log.warning("%s, byte %d: left out, no JSON (%s): %.60r", path, at, error, line)
            at += len(line)
    return found, at


class History:
    """Appends to history.jsonl. Opening it drops what lies after `images_seen`, where training
    resumes."""

    def __init__(self, stage_dir: str | os.PathLike[str], images_seen: int):
        self.stage_dir = stage_dir
        kept = [record for record in history(stage_dir) if record["images_seen"] <= images_seen]
        self._begin(kept)

    def _begin(self, records: list[dict[str, Any]]) -> None:
        path = Path(self.stage_dir, HISTORY)
        storage.publish_bytes(str(path), b"".join(map(_line, records)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, record: dict[str, Any]) -> None:
        """Add a log point, whole or not at all. `storage.NoRoom` where the disk is full."""
        storage.append_line(self._file, _line(record))

    def amend(self, more: dict[str, Any]) -> dict[str, Any]:
        """Add to the newest log point; all of it."""
        records = history(self.stage_dir)
        records[-1] |= more
        self.close()
        self._begin(records)
        return records[-1]

    def close(self) -> None:
        self._file.close()


@contextmanager
def owning(stage_dir: str | os.PathLike[str]) -> Iterator[None]:
    """One process at a time trains in a stage directory; a second waits, and then finds the
    result."""
    with storage.lock(os.path.join(stage_dir, ".lock")):
        yield


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
