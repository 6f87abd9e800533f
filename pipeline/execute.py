"""The same step in this process or on Ray Data.

A step is a list of units (JSON objects, each hundreds of rows or a shard) and a factory whose
product turns a unit into a result (a JSON object). Units commit their own work to storage, so Ray
only schedules: a unit that runs twice after a worker's death writes the same bytes twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Work = Callable[[dict[str, Any]], dict[str, Any]]
Factory = Callable[[], Work]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Where units run."""

    kind: Literal["local", "ray"] = "local"
    """"local": one after the other in this process. "ray": actors of the cluster the caller has
    initialised.
    """
    workers: int = 0
    """Actors on Ray; 0 means one per CPU of the cluster."""

    def __post_init__(self):
        if self.kind not in ("local", "ray"):
            raise ValueError(f"kind must be 'local' or 'ray', got {self.kind!r}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (choose) or more, got {self.workers}")


def run(
    factory: Factory,
    units: list[dict[str, Any]],
    *,
    executor: Executor,
    progress: Progress | None = None,
    keep: bool = True,
) -> list[dict[str, Any]]:
    """The results of all units, in the order of the units.

    `factory` must be picklable for Ray: a top-level function or a partial of one. It is called once
    per worker where `keep` is set (actors: models loaded once), else once per unit (tasks in Ray's
    warm processes: starts sooner). `progress(done, total)` is called in this process as results
    arrive. An exception in a unit ends the run; what other units have committed stays.
    """
    if not units:
        return []
    if progress:
        progress(0, len(units))
    results: list[dict[str, Any] | None] = [None] * len(units)
    if executor.kind == "ray":
        stream = _ray(factory, units, executor.workers, keep)
    else:
        stream = _local(factory, units)
    for done, (index, result) in enumerate(stream, start=1):
        results[index] = result
        if progress:
            progress(done, len(units))
    finished = [result for result in results if result is not None]
    assert len(finished) == len(units), f"{len(units) - len(finished)} units without a result"
    return finished


def _local(factory: Factory, units: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    work = factory()
    for index, unit in enumerate(units):
        yield index, work(unit)


class _Actor:
    """A worker that keeps what its factory made."""

    def __init__(self, factory: Factory):
        self.work = factory()

    def __call__(self, table: Any) -> Any:
        return _work_table(table, self.work)


def _task(table: Any, factory: Factory) -> Any:
    return _work_table(table, factory())


def _work_table(table: Any, work: Work) -> Any:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pyarrow
    results = [json.dumps(work(json.loads(unit.as_py()))) for unit in table["unit"]]
    return pa.table({"index": table["index"], "result": pa.array(results, pa.large_string())})


def _ray(
    factory: Factory, units: list[dict[str, Any]], workers: int, keep: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    import ray
    import ray.data as _data

    ray_data: Any = _data
    if not ray.is_initialized():
        raise ValueError(
            "executor 'ray' needs a session: call ray.init() first or use Executor(kind='local')"
        )
    cluster: Any = ray
    cpus = int(cluster.cluster_resources().get("CPU", 1))
    size = min(workers or cpus, len(units))
    # A fixed pool that holds every CPU starves Ray Data's own tasks and stalls until a time-out of
    # half an hour: the pool claims at most half of them, though its processes may well use more.
    share = min(0.5, 0.5 * cpus / size)
    with _quiet():
        data = ray_data.from_items(
            [{"index": index, "unit": json.dumps(unit)} for index, unit in enumerate(units)],
            override_num_blocks=len(units),  # a block is what Ray hands to a worker
        )
        if keep:
            data = data.map_batches(
                _Actor,
                fn_constructor_kwargs={"factory": factory},
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=share,
                compute=ray_data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            )
        else:
            data = data.map_batches(
                _task,
                fn_kwargs={"factory": factory},
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=share,
                compute=ray_data.TaskPoolStrategy(size=size),
            )
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield row["index"], json.loads(row["result"])


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Ray Data without bars and plan dumps of its own: progress is the caller's."""
    import ray

    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    loggers = {
        logging.getLogger("ray.data"): logging.WARNING,
        logging.getLogger("ray.data._internal.progress"): logging.ERROR,  # "Progress bars disabled"
    }
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for logger, level in levels.items():
            logger.setLevel(level)
