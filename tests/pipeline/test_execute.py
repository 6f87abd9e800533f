"""Results come in the order of the units, wherever the units ran."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import execute, storage
from pipeline.execute import Executor, run

PROCESSES = Executor(kind="processes", workers=2)


def doubling(log=None):
    if log:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
    return lambda unit: {"twice": 2 * unit["n"], "text": unit.get("text", "")}


def failing():
    def work(unit):
        if unit["n"] == 3:
            raise ValueError("unit three is odd")
        return {}

    return work


def test_local_results_and_progress():
    seen = []
    results = run(
        doubling,
        [{"n": n} for n in range(5)],
        executor=Executor(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [it["twice"] for it in results] == [0, 2, 4, 6, 8]
    assert seen == [(n, 5) for n in range(6)]


def test_local_errors_are_the_units_own():
    with pytest.raises(ValueError, match="unit three"):
        run(failing, [{"n": n} for n in range(5)], executor=Executor())


def dying(marks, times):
    """A factory: the worker of unit three dies over it a few times."""

    def work(unit):
        mark = Path(marks, str(unit["n"]))
        mark.write_text(said := (mark.read_text() if mark.exists() else "") + "x")
        if unit["n"] == 3 and len(said) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return {"twice": 2 * unit["n"]}

    return work


def full():
    def work(unit):
        raise storage.NoRoom(28, "No space left on device", unit["place"])

    return work


class Picky(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def picky():
    def work(unit):
        raise Picky("this", "that")

    return work


def surroundings():
    seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}

    def work(unit):
        time.sleep(0.1)
        return {**seen, "pid": os.getpid(), "threads": threading.active_count()}

    return work


@pytest.mark.parametrize("keep", [True, False])
def test_processes_give_the_same_results(tmp_path, keep):
    units, seen = [{"n": n, "text": "é" * n} for n in range(9)], []
    log = tmp_path / "log"
    results = run(
        functools.partial(doubling, str(log)),
        units,
        executor=PROCESSES,
        progress=lambda done, total: seen.append((done, total)),
        keep=keep,
    )
    assert results == run(doubling, units, executor=Executor())
    assert seen == [(n, 9) for n in range(10)]
    made = log.read_text().split()
    assert 1 <= len(made) == len(set(made)) <= 2, "once in each worker"
    assert str(os.getpid()) not in made


def test_an_error_in_a_process_is_raised_as_it_is_and_says_where_it_was():
    with pytest.raises(ValueError, match="unit three is odd") as raised:
        run(failing, [{"n": n} for n in range(5)], executor=PROCESSES)
    assert "in failing" in raised.value.__notes__[0] or "in work" in raised.value.__notes__[0]
    with pytest.raises(storage.NoRoom, match="No space left") as refused:
        run(full, [{"place": "/there"}], executor=PROCESSES)
    assert refused.value.filename == "/there"
    with pytest.raises(RuntimeError, match="Picky: this and that"):
        run(picky, [{}], executor=PROCESSES)


def test_a_process_that_dies_is_replaced_and_its_unit_done_again(tmp_path):
    units = [{"n": n} for n in range(12)]
    results = run(functools.partial(dying, tmp_path, 2), units, executor=PROCESSES)
    assert [it["twice"] for it in results] == [2 * n for n in range(12)]
    assert (tmp_path / "3").read_text() == "xxx"


def test_a_unit_that_kills_every_process_ends_the_run(tmp_path):
    wanted = r"3 workers died over the same unit, the last with exit code -9 .*\{'n': 3\}"
    with pytest.raises(RuntimeError, match=wanted):
        run(functools.partial(dying, tmp_path, 9), [{"n": n} for n in range(9)], executor=PROCESSES)


def test_nobody_works_on_when_a_caller_stops(tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        run(
            functools.partial(dying, tmp_path, 0),
            [{"n": n} for n in range(500)],
            executor=PROCESSES,
            progress=stop,
        )
    left = len(list(tmp_path.iterdir()))
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == left < 500


def test_each_process_that_keeps_a_model_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    units = [{}] * 8
    seen = run(surroundings, units, executor=Executor(kind="processes"))
    assert {it["CUDA_VISIBLE_DEVICES"] for it in seen} == {"4", "6"}
    assert len({it["pid"] for it in seen}) == 2
    assert all(int(it["OMP_NUM_THREADS"]) >= 1 for it in seen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert execute.devices() == []


PROCESSES_OF = """
import os, pathlib, sys, time
from pipeline.execute import Executor, run

def slow():
    def work(unit):
        print(os.getpid(), flush=True)
        time.sleep(60)
    return work

if __name__ == "__main__":
    run(slow, [{}] * 4, executor=Executor(kind="processes", workers=2))
"""


def test_processes_die_with_their_caller(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES_OF)
    caller = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    pids = [int(caller.stdout.readline()) for _ in range(2)]
    caller.kill()
    caller.communicate()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "orphans at work"
        time.sleep(0.01)


def test_auto_is_ray_where_a_cluster_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert Executor(kind="auto").chosen == "processes"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert Executor(kind="auto").chosen == "ray"
    assert [Executor(kind=it).chosen for it in ("local", "processes")] == ["local", "processes"]


def test_nothing_to_do_imports_nothing():
    code = (
        "import sys; from pipeline.execute import Executor, run\n"
        "assert run(None, [], executor=Executor(kind='ray')) == []\n"
        "assert not {'ray', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_how_many_workers_there_are():
    assert execute.workers_of(Executor(), 9) == 1
    assert execute.workers_of(PROCESSES, 9) == 2
    assert execute.workers_of(PROCESSES, 1) == 1
    assert execute.workers_of(Executor(kind="processes"), 10**6) == execute.cpus()


def test_the_executor_is_checked():
    with pytest.raises(ValueError, match="'ray' or 'auto', got 'spark'"):
        Executor(kind="spark")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="workers must be 0"):
        Executor(workers=-1)


def test_ray_without_a_session_says_so():
    code = (
        "from pipeline.execute import Executor, run\n"
        "try: run(dict, [{}], executor=Executor(kind='ray'))\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"call ray.init() first" in out.stdout


@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("keep", [True, False])
def test_ray_gives_the_same_results(ray_session, tmp_path, keep):
    units = [{"n": n, "text": "é" * n} for n in range(9)]
    factory, seen = functools.partial(doubling, str(tmp_path / "log")), []
    results = run(
        factory,
        units,
        executor=Executor(kind="ray"),
        progress=lambda done, total: seen.append(done),
        keep=keep,
    )
    assert results == run(doubling, units, executor=Executor())
    assert seen == list(range(10))
    assert execute.workers_of(Executor(kind="ray"), 9) == 2
    made = (tmp_path / "log").read_text().split()
    assert len(made) == (len(set(made)) if keep else 9)
    assert str(os.getpid()) not in made
    if keep:
        with pytest.raises(Exception, match="unit three is odd"):
            run(failing, units, executor=Executor(kind="ray", workers=1))
