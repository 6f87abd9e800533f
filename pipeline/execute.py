"""The same step in this process, in processes of this machine, or on Ray Data.

A step is a list of units (JSON objects, each hundreds of rows or a shard) and a factory whose
product turns a unit into a result (a JSON object). Units commit their own work to storage, so that
others only schedule: a unit that runs twice after a worker's death writes the same bytes twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Work = Callable[[dict[str, Any]], dict[str, Any]]
Factory = Callable[[], Work]
Stream = Generator[tuple[int, dict[str, Any]]]
Progress = Callable[[int, int], None]

_AHEAD = 2  # units that a process has been given: it does not wait for the caller in between
_DEATHS = 3  # of workers, by the same unit
_PRELOADED = [
    *("__main__", "pyarrow.parquet", "pandas"),  # which pyarrow imports for its first array
    *(f"{__package__}.{it}" for it in ("passes", "units", "images", "dedup", "shards")),
]


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Where units run."""

    kind: Literal["local", "processes", "ray", "auto"] = "local"
    """"local": one after the other in this process. "processes": in processes of this machine; a
    script that asks for them does so below `if __name__ == "__main__"`. "ray": actors of the
    cluster that the caller has initialised. "auto": Ray where RAY_ADDRESS names a cluster, else
    processes.
    """
    workers: int = 0
    """Processes, or actors on Ray; 0 means one per CPU of the machine, or of the cluster."""

    def __post_init__(self):
        if self.kind not in ("local", "processes", "ray", "auto"):
            raise ValueError(
                f"kind must be 'local', 'processes', 'ray' or 'auto', got {self.kind!r}"
            )
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (choose) or more, got {self.workers}")

    @property
    def chosen(self) -> Literal["local", "processes", "ray"]:
        """The kind, with "auto" decided."""
        if self.kind == "auto":
            return "ray" if os.environ.get("RAY_ADDRESS") else "processes"
        return self.kind


def run(
    factory: Factory,
    units: list[dict[str, Any]],
    *,
    executor: Executor,
    progress: Progress | None = None,
    keep: bool = True,
    finished: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The results of all units, in the order of the units.

    `factory` must be picklable for others: a top-level function or a partial of one. It is called
    once per worker where `keep` is set (models loaded once), else on Ray once per unit (tasks in
    its warm processes: starts sooner). `progress(done, total)` is called in this process as results
    arrive, and `finished` with the index of each unit. An exception in a unit ends the run; what
    other units have committed stays. A worker that dies is replaced, and its unit is done again.
    """
    if not units:
        return []
    if progress:
        progress(0, len(units))
    results: list[dict[str, Any] | None] = [None] * len(units)
    kind = executor.chosen
    if kind == "ray":
        stream = _ray(factory, units, executor.workers, keep)
    elif kind == "processes":
        stream = _processes(factory, units, executor.workers, keep)
    else:
        stream = _local(factory, units)
    with contextlib.closing(stream):  # nobody works on when a caller's function raises
        for done, (index, result) in enumerate(stream, start=1):
            results[index] = result
            if finished:
                finished(index)
            if progress:
                progress(done, len(units))
    given = [result for result in results if result is not None]
    assert len(given) == len(units), f"{len(units) - len(given)} units without a result"
    return given


def workers_of(executor: Executor, units: int) -> int:
    """How many workers `run` has for so many units, unless each is to keep what its factory made
    (`keep`). ValueError where they are Ray's and there is no session.
    """
    if executor.chosen == "local":
        return min(1, units)
    return min(executor.workers or (_ray_cpus() if executor.chosen == "ray" else cpus()), units)


def _local(factory: Factory, units: list[dict[str, Any]]) -> Stream:
    work = factory()
    for index, unit in enumerate(units):
        yield index, work(unit)


# ---- processes of this machine -------------------------------------------------------------------


class _Process:
    """A worker, and the units that it was given and has not answered."""

    def __init__(self, factory: Factory, environment: dict[str, str]):
        from multiprocessing import get_context

        # A fork of this process could inherit a lock that one of its threads holds; the server that
        # forks in its place is started once, and has imported what ingest needs.
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.pipe, theirs = context.Pipe()
        self.given: deque[int] = deque()
        self._process = context.Process(
            target=_serve, args=(theirs, factory, environment), daemon=True
        )
        self._process.start()
        theirs.close()

    def give(self, index: int, unit: dict[str, Any]) -> None:
        self.given.append(index)
        with contextlib.suppress(OSError):  # it is dead: `take` will say so
            self.pipe.send((index, unit))

    def take(self) -> tuple[int, dict[str, Any] | None, Exception | None] | None:
        """(index, result, error) of the unit it has done; None: it is dead."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.given.remove(answer[0])
        return answer

    def end(self) -> int | None:
        self._process.kill()
        self._process.join()
        self.pipe.close()
        return self._process.exitcode


def _processes(factory: Factory, units: list[dict[str, Any]], workers: int, keep: bool) -> Stream:
    from multiprocessing.connection import wait

    cores, gpus = cpus(), devices() if keep else []
    size = min(workers or len(gpus) or cores, len(units))
    waiting, deaths = deque(range(len(units))), Counter[int]()

    def made(number: int) -> _Process:
        environment = {"OMP_NUM_THREADS": str(max(1, cores // size)), **os.environ}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        return _Process(factory, environment)

    crew: list[_Process] = []
    try:
        crew += [made(number) for number in range(size)]
        while True:
            for _ in range(_AHEAD):  # one each before anyone has two
                for worker in crew:
                    if waiting and len(worker.given) < _AHEAD:
                        index = waiting.popleft()
                        worker.give(index, units[index])
            busy = {worker.pipe: number for number, worker in enumerate(crew) if worker.given}
            if not busy:
                return
            for pipe in wait(list(busy)):
                number = busy[pipe]  # pyright: ignore[reportArgumentType]
                answer = crew[number].take()
                if answer is None:
                    lost, code = list(crew[number].given), crew[number].end()
                    deaths[lost[0]] += 1
                    if deaths[lost[0]] == _DEATHS:
                        raise RuntimeError(
                            f"{_DEATHS} workers died over the same unit, the last with exit code "
                            f"{code} (-9: killed, as a rule for memory: give it more, or "
                            f"executor.workers fewer than {size}): {str(units[lost[0]])[:200]}"
                        )
                    waiting.extendleft(reversed(lost))
                    crew[number] = made(number)
                    continue
                index, result, error = answer
                if error:
                    raise error
                assert result is not None
                yield index, result
    finally:
        for worker in crew:
            worker.end()


def cpus() -> int:
    """The cores of this machine that we may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def devices() -> list[str]:
    """The GPUs of this machine that we may use: as many workers keep a model as there are."""
    import glob

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(it) for it in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    return [it.strip() for it in visible.split(",") if it.strip() not in ("", "-1")]


def _serve(pipe: Connection, factory: Factory, environment: dict[str, str]) -> None:
    """What a worker does until its pipe is closed."""
    import gc
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's, who ends us
    threading.Thread(target=_die_with_the_caller, daemon=True).start()
    gc.freeze()  # what was imported stays: it need not be looked at again
    _keep_freed_memory()
    os.environ.clear()  # of the server, as it was when that was started
    os.environ.update(environment)
    work: Work | None = None
    while True:
        try:
            index, unit = pipe.recv()
        except EOFError:
            return
        try:
            work = work or factory()
            answer = index, work(unit), None
        except Exception as error:
            answer = index, None, _portable(error)
        pipe.send(answer)


def _keep_freed_memory() -> None:
    """Up to 64 MiB of it: else glibc returns a picture's memory to the system and asks for it
    again, zeroed page by page, with the next one (a twentieth of the work on photographs).
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: larger ones go back at once


def _die_with_the_caller() -> None:
    """At once, even in the midst of a unit: the next run may be under way."""
    from multiprocessing import parent_process

    caller = parent_process()
    assert caller
    caller.join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """What can be raised in another process; where it came from goes along as a note."""
    import copy
    import traceback
    from multiprocessing.reduction import ForkingPickler

    said = "".join(traceback.format_exception(error))
    try:
        error = copy.deepcopy(error)  # made anew as at the pipe's other end: nothing is unpickled
        ForkingPickler.dumps(error)
    except Exception:  # made from other arguments than it keeps
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker:\n{said}")
    return error


# ---- Ray Data ------------------------------------------------------------------------------------


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


def _ray(factory: Factory, units: list[dict[str, Any]], workers: int, keep: bool) -> Stream:
    cpus = _ray_cpus()
    import ray.data as _data

    ray_data: Any = _data
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


def _ray_cpus() -> int:
    """Those of the cluster. ValueError where there is no session."""
    import ray

    cluster: Any = ray
    if not cluster.is_initialized():
        raise ValueError(
            "executor 'ray' needs a session: call ray.init() first "
            "or use Executor(kind='processes')"
        )
    return int(cluster.cluster_resources().get("CPU", 1))


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
