"""Results come in the order of the units, wherever the units ran."""

import functools
import os
import subprocess
import sys

import pytest

from pipeline.execute import Executor, run


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


def test_nothing_to_do_imports_nothing():
    code = (
        "import sys; from pipeline.execute import Executor, run\n"
        "assert run(None, [], executor=Executor(kind='ray')) == []\n"
        "assert not {'ray', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_executor_is_checked():
    with pytest.raises(ValueError, match="'local' or 'ray', got 'spark'"):
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
    made = (tmp_path / "log").read_text().split()
    assert len(made) == (len(set(made)) if keep else 9)
    assert str(os.getpid()) not in made
    if keep:
        with pytest.raises(Exception, match="unit three is odd"):
            run(failing, units, executor=Executor(kind="ray", workers=1))
