"""Whatever is tracked is on the local disk first; MLflow gets it as soon as it can be reached.

A run appends to a spool file and returns. A thread delivers the spool in order, in batches, and
notes how far it got. A server that is away costs nothing but delay: what is left is delivered by
the next run on the same spool, or by `deliver`. Metrics carry the time they were logged at, so to
deliver one twice changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage

FINGERPRINT = "darkroom.stage_fingerprint"
"""The tag by which a resumed training finds its run again."""
CHANGED = "darkroom.changed."
"""Begins the tags that say what a parameter is now, where a resumed training has another one than
it began with: MLflow's parameters stay what they were first."""
NOTHING = "nothing"
SPOOL, DELIVERED, FILES, LOCK = "spool.jsonl", "delivered.json", "files", ".lock"
LAST_SECONDS = 60.0
"""How long the end of a run waits for MLflow."""
_BATCH_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 30.0
_BATCH_VALUES = 500  # MLflow takes at most 1,000 entities or 1 MB in one request
_REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
Operation = dict[str, Any]
log = logging.getLogger(__name__)


class Run:
    """One MLflow run, written from one process. Its methods only write to the local disk."""

    def __init__(self, spool: str | os.PathLike[str], uri: str):
        self.spool, self.uri = Path(spool), uri
        (self.spool / FILES).mkdir(parents=True, exist_ok=True)
        self._count, self._latest = 0, dict[str, int]()
        whole = 0
        for whole, operation in _operations(self.spool, 0):  # noqa: B007
            self._count += 1
            said = operation.get("values", ())
            for key in [_series(operation["name"])] if operation["do"] == "image" else said:
                self._latest[key] = max(self._latest.get(key, -1), operation["step"])
        self._file = open(self.spool / SPOOL, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(whole)  # a line that a killed process left torn
        self._courier = _Courier(self.spool, uri)
        self._wake, self._last, self._given_up = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        experiment: str,
        name: str,
        *,
        uri: str,
        spool: str | os.PathLike[str],
        parent_run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        artifact_location: str | None = None,
    ) -> Run:
        """Begin a run, or go on with the one that has the same FINGERPRINT tag.

        It does not wait for the server at `uri`. `spool` is a local directory of the run's own.
        Nested `params` get dotted names; of a run that goes on they stay as they were, and what is
        another value now is the tag CHANGED + name. `artifact_location` is where an experiment that
        does not exist yet keeps its files; None leaves that to MLflow.
        """
        run = cls(spool, uri)
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        run._write(
            "start",
            experiment=experiment,
            name=name,
            tags=_texts({**(tags or {}), **parent}),
            params=_texts(flatten(params or {})),
            artifact_location=artifact_location,
        )
        return run

    def id(self, timeout_seconds: float = 60) -> str | None:
        """The MLflow run's id, once the server has given it; None when that takes too long."""
        self._courier.started.wait(timeout_seconds)
        return self._courier.run_id

    def log(self, metrics: Mapping[str, Any], images_seen: int) -> None:
        """Log finite numbers; leaves out the rest, and what a resumed training says again."""
        values = {
            _name(key): float(value)
            for key, value in flatten(metrics).items()
            if isinstance(value, int | float | np.number) and math.isfinite(value)
        }
        values = {k: v for k, v in values.items() if self._latest.get(k, -1) < images_seen}
        if values:
            self._latest |= dict.fromkeys(values, images_seen)
            self._write("metrics", values=values, step=images_seen)

    def image(self, name: str, picture: np.ndarray | Path, images_seen: int) -> None:
        """Log a picture, uint8 [height, width, 3] or a PNG file; MLflow strings those of one name
        together. What a resumed training says again is left out."""
        name = _name(name)
        if self._latest.get(_series(name), -1) >= images_seen:
            return
        file = self._new_file(".png")
        with storage.room(str(file)):
            if isinstance(picture, Path):
                shutil.copyfile(picture, file)
            else:
                from PIL import Image

                Image.fromarray(picture).save(file)
        self._latest[_series(name)] = images_seen
        self._write("image", file=file.name, name=name, step=images_seen)

    def figure(self, path: str, figure: Any) -> None:
        """Log a matplotlib figure as an artifact; the suffix of `path` gives the format."""
        file = self._new_file(Path(path).suffix)
        with storage.room(str(file)):
            figure.savefig(file)
        self._write("artifact", file=file.name, path=path)

    def text(self, path: str, text: str) -> None:
        """Log a text as an artifact."""
        file = self._new_file(Path(path).suffix)
        with storage.room(str(file), len(text)):
            file.write_text(text, encoding="utf-8")
        self._write("artifact", file=file.name, path=path)

    def dict(self, path: str, values: Any) -> None:
        """Log JSON as an artifact."""
        self.text(path, json.dumps(values, indent=1, sort_keys=True))

    def file(self, path: str, source: str | os.PathLike[str]) -> None:
        """Log a file, as it is now, as an artifact."""
        file = self._new_file(Path(path).suffix)
        with storage.room(str(file), os.path.getsize(source)):
            shutil.copyfile(source, file)
        self._write("artifact", file=file.name, path=path)

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self._write("tags", tags=_texts(tags))

    def finish(self, status: str = "FINISHED", timeout_seconds: float | None = None) -> bool:
        """End the run as FINISHED, FAILED or KILLED, and wait a minute, or as long as is said, for
        MLflow to have it. False: a part still waits in the spool."""
        if not self._file.closed:
            try:
                self._write("finish", status=status)
            finally:
                self._file.close()
                self._last.set()
                self._wake.set()
                self._thread.join(LAST_SECONDS if timeout_seconds is None else timeout_seconds)
                self._given_up.set()
            if not self._courier.done():
                log.warning("MLflow at %s: not all was delivered; see %s", self.uri, self.spool)
        return self._courier.done()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ended = (
            "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        )
        # Of a disk that is full the first error is the one to tell.
        with contextlib.suppress(*([storage.NoRoom] if kind else [])):
            self.finish(ended)

    def _new_file(self, suffix: str) -> Path:
        return self.spool / FILES / f"{self._count:08d}{suffix}"

    def _write(self, do: str, **content: Any) -> None:
        operation = {"do": do, "time": time.time_ns() // 1_000_000, **content}
        storage.append_line(self._file, json.dumps(operation, allow_nan=False).encode() + b"\n")
        self._count += 1
        if do != "metrics":  # these gather for a while
            self._wake.set()

    def _work(self) -> None:
        pause = _BATCH_SECONDS
        while not self._given_up.is_set():
            last = self._last.is_set()
            try:
                self._courier.deliver()
                if last:
                    return
                pause = _BATCH_SECONDS
            except Exception as error:
                if pause == _BATCH_SECONDS:
                    log.warning("MLflow at %s is away, will try again: %s", self.uri, error)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                self._wake.clear()  # what is logged meanwhile is no reason to hurry
            self._wake.wait(min(pause, 1.0) if self._last.is_set() else pause)
            self._wake.clear()


def client(uri: str | None = None) -> Any:
    """MLflow's client at `uri`, by default where MLflow's own settings point.

    MLflow makes the tables of a new SQLite database one by one: two processes that do so at once
    fail, and what a killed one leaves is refused for good. So here one process makes them, beside,
    and the database appears whole.
    """
    import mlflow

    uri = uri or mlflow.get_tracking_uri()
    if uri.startswith("sqlite:") and (name := _database(uri)):
        path = os.path.abspath(name)
        if not _made(path):  # else nothing is written beside it: it may be there to be read alone
            _make_database(path)
    return mlflow.MlflowClient(uri)


def deliver(spool: str | os.PathLike[str], uri: str) -> None:
    """Deliver what an earlier run left behind; raises what MLflow raises when it is away."""
    _Courier(Path(spool), uri).deliver()


def waiting(spool: str | os.PathLike[str]) -> int:
    """How many entries of a spool MLflow does not have yet; asked without MLflow."""
    courier = _Courier(Path(spool), "")
    return sum(1 for _ in _operations(courier.spool, courier.offset))


def catch_up(
    spools: Iterable[str | os.PathLike[str]], uri: str, timeout_seconds: float = 30
) -> bool:
    """`deliver` what waits in any of them. A server that is away costs so many seconds at most, and
    a warning; False then."""
    late = [Path(spool) for spool in spools if waiting(spool)]
    failed: list[Exception] = []

    def work() -> None:
        try:
            for spool in late:
                deliver(spool, uri)
        except Exception as error:  # what was reached is noted: the rest waits for the next time
            failed.append(error)

    if late:
        # MLflow's own tries last minutes; whoever asks has nothing else to wait for.
        thread = threading.Thread(target=work, name="late tracking", daemon=True)
        thread.start()
        thread.join(timeout_seconds)
    if left := [str(spool) for spool in late if waiting(spool)]:
        why = failed[0] if failed else f"no answer within {timeout_seconds:g} s"
        log.warning(
            "MLflow at %s has not all yet (%s): run the same command again when it can be reached, "
            "and it gets the rest of %s",
            uri,
            why,
            ", ".join(left),
        )
        return False
    return True


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, the spelling of keys on the command line."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _Courier:
    """Carries operations from a spool to MLflow, in order; a crash repeats the last one at most."""

    def __init__(self, spool: Path, uri: str):
        self.spool, self.uri, self.run_id = spool, uri, None
        self.started = threading.Event()
        self._client: Any = None
        self.offset = 0
        self._noted: str | None = None
        self._read()

    def _read(self) -> None:
        """How far whoever was last here has come."""
        if (self.spool / DELIVERED).exists():
            noted = storage.read_json(str(self.spool / DELIVERED))
            self.offset, self._noted = noted["offset"], noted["run_id"]

    def done(self) -> bool:
        """Whether nothing waits."""
        return self.offset >= (self.spool / SPOOL).stat().st_size

    def deliver(self) -> None:
        """Deliver all that waits. What MLflow refuses is logged and dropped; failures are
        raised."""
        # The same command may run twice at once, and pictures that come twice are shown twice.
        with storage.lock(str(self.spool / LOCK)):
            self._read()
            self._deliver()

    def _deliver(self) -> None:
        from mlflow.exceptions import MlflowException

        for end, operations in _batches(_operations(self.spool, self.offset)):
            do = operations[0]["do"]
            try:
                self._run(do, operations)
            except (MlflowException, TypeError, ValueError, FileNotFoundError) as error:
                if isinstance(error, MlflowException) and error.error_code not in _REFUSALS:
                    raise
                log.warning("MLflow at %s refused %s: %s", self.uri, do, error)
            if do == "start":
                self.started.set()
            self.offset = end
            self._noted = self.run_id or self._noted
            noted = {"offset": end, "run_id": self._noted}
            storage.publish_json(str(self.spool / DELIVERED), noted)
            for operation in operations:
                if "file" in operation:
                    (self.spool / FILES / operation["file"]).unlink(missing_ok=True)

    def _run(self, do: str, operations: list[Operation]) -> None:
        if do == NOTHING:
            return
        if self._client is None:
            self._client = client(self.uri)
        if do == "start":
            self._start(operations[0])
            return
        self.run_id = self.run_id or self._noted
        if self.run_id is None:
            raise ValueError("the run could not be started")
        getattr(self, f"_{do}")(*operations)

    def _start(self, operation: Operation) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        client, tags, given = self._client, operation["tags"], operation["params"]
        run = self._find(operation)
        if run is None:
            run = client.create_run(
                self._experiment(operation),
                start_time=operation["time"],
                tags=tags,
                run_name=operation["name"],
            )
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        # Before anything that may be refused: what follows goes there all the same.
        self.run_id = run.info.run_id
        before = run.data.params
        changed = {
            f"{CHANGED}{key}": value
            for key, value in given.items()
            if key in before
            and (before[key] != value[:MAX_PARAM_VAL_LENGTH] or f"{CHANGED}{key}" in run.data.tags)
        }
        told = [RunTag(key, value) for key, value in (tags | changed).items()]
        for first in range(0, len(told), 100):
            client.log_batch(self.run_id, tags=told[first : first + 100])
        params = [Param(key, value) for key, value in given.items() if key not in before]
        for first in range(0, len(params), 100):
            client.log_batch(self.run_id, params=params[first : first + 100])

    def _find(self, operation: Operation) -> Any:
        """The run to go on with, or None: it has the same fingerprint."""
        experiment = self._client.get_experiment_by_name(operation["experiment"])
        wanted = operation["tags"].get(FINGERPRINT)
        if experiment is None or wanted is None:
            return None
        found = self._client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`{FINGERPRINT}` = '{wanted}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return found[0] if found else None

    def _experiment(self, operation: Operation) -> str:
        from mlflow.exceptions import MlflowException

        name = operation["experiment"]
        if found := self._client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            # Its page then opens on trainings, not on the traces of language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return self._client.create_experiment(name, operation["artifact_location"], kind)
        except MlflowException:  # another process may have been faster
            if found := self._client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _metrics(self, *operations: Operation) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, operation["time"], operation["step"])
            for operation in operations
            for key, value in operation["values"].items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

    def _image(self, operation: Operation) -> None:
        from PIL import Image

        with Image.open(self.spool / FILES / operation["file"]) as picture:
            self._client.log_image(
                self.run_id,
                picture,
                key=operation["name"],
                step=operation["step"],
                timestamp=operation["time"],
            )

    def _artifact(self, operation: Operation) -> None:
        """MLflow names an artifact after its file, so the file takes its name in a folder first."""
        path = Path(operation["path"])
        folder = self.spool / FILES / "as"
        folder.mkdir(exist_ok=True)
        named = folder / path.name
        shutil.copyfile(self.spool / FILES / operation["file"], named)
        where = None if path.parent == Path() else path.parent.as_posix()
        self._client.log_artifact(self.run_id, str(named), where)
        named.unlink()

    def _tags(self, operation: Operation) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(k, v) for k, v in operation["tags"].items()]
        self._client.log_batch(self.run_id, tags=tags)

    def _finish(self, operation: Operation) -> None:
        self._client.set_terminated(self.run_id, operation["status"], operation["time"])


def _database(uri: str) -> str | None:
    """The file of an SQLite database; None for one in memory."""
    from sqlalchemy import make_url

    name = make_url(uri).database
    return None if name in (None, "", ":memory:") or name.startswith("file:") else name


def _made(path: str) -> bool:
    return os.path.exists(path) and os.path.getsize(path) > 0


def _make_database(path: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    place = os.path.dirname(path)
    with storage.lock(f"{path}.lock"):
        if _made(path):  # by who was faster
            return
        storage.sweep(place)
        with storage.draft(place) as (file, publish):
            # The folder of its artifacts is that of MLflow's own client.
            SqlAlchemyStore(f"sqlite:///{file.name}", "./mlruns").engine.dispose()
            publish(path)


def _operations(spool: Path, offset: int) -> Iterator[tuple[int, Operation]]:
    """(offset after it, operation) of each whole line from `offset` on; one that is not JSON is
    nothing to do, with a warning."""
    path = spool / SPOOL
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            before, offset = offset, offset + len(line)
            try:
                operation = json.loads(line)
            except ValueError as error:
                log.warning("%s, byte %d: left out, no JSON (%s): %.60r", path, before, error, line)
                operation = {"do": NOTHING}
            yield offset, operation


def _batches(operations: Iterator[tuple[int, Operation]]) -> Iterator[tuple[int, list[Operation]]]:
    """Metrics that follow each other together, up to a batch; everything else by itself."""
    end, waiting, values = 0, list[Operation](), 0
    for after, operation in operations:
        is_metrics = operation["do"] == "metrics"
        if waiting and (not is_metrics or values >= _BATCH_VALUES):
            yield end, waiting
            waiting, values = [], 0
        if is_metrics:
            waiting.append(operation)
            values += len(operation["values"])
        else:
            yield after, [operation]
        end = after
    if waiting:
        yield end, waiting


def _series(name: str) -> str:
    """How a series of pictures is known among those of numbers, whose names have no question
    mark."""
    return f"picture? {name}"


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {_name(key): str(value) for key, value in values.items()}


def _name(key: str) -> str:
    """The key in the letters that MLflow allows."""
    return re.sub(r"[^\w\-./: ]", "_", key, flags=re.ASCII)
