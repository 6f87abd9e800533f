"""One Ray session for all tests here that need it, and the real pictures where they are."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_session():
    # Unset, a local session turns token authentication on and every later client fails.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    import ray

    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data():
    """A function from a folder's name to its path under ../shared/data; skips where it is not."""

    def folder(name: str) -> Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"no real data: {path} is missing")
        return path

    return folder


_STEPS = ("replace", "link", "unlink", "fsync", "rmdir")
"""Of os: what changes the disk."""


def _forked(work):
    """The exit status of a child that does the work; its signal, negative, where it was killed."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
    except BaseException as error:  # the parent only sees the status
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


def _watched(at_step):
    """In a child: have each step told of before it is done."""

    def wrapped(call):
        def watched(*args, **options):
            at_step()
            return call(*args, **options)

        return watched

    for name in _STEPS:
        setattr(os, name, wrapped(getattr(os, name)))


class _Event(ctypes.Structure):
    """struct sigevent"""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


class _Time(ctypes.Structure):
    """struct itimerspec"""

    _fields_ = tuple((name, ctypes.c_long) for name in ("again", "again_ns", "seconds", "ns"))


def _killed_in(seconds):
    """Have the kernel kill this process: whoever waits in another may be late on a busy machine."""
    library, timer = ctypes.CDLL(None), ctypes.c_void_p()
    event = _Event(signal=signal.SIGKILL)
    when = _Time(seconds=int(seconds), ns=max(1, int(seconds % 1 * 1e9)))
    assert not library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    assert not library.timer_settime(timer, 0, ctypes.byref(when), None)


@pytest.fixture(scope="session")
def killed_at():
    """A function (step, work, seconds) -> exit status of a fork that does the work and dies
    (SIGKILL) so many seconds after it came to that step of those that change what is on the disk.
    """

    def run(step, work, seconds=0.0):
        steps = itertools.count()

        def dying():
            if next(steps) == step:
                if seconds:
                    _killed_in(seconds)
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        return _forked(lambda: (_watched(dying), work()))

    return run


@pytest.fixture(scope="session")
def measured():
    """A function of work -> (its steps, the seconds that one takes) in a fork that nobody kills."""

    def run(work):
        shared = mmap.mmap(-1, 16)

        def counting():
            steps = itertools.count(1)
            _watched(lambda: struct.pack_into("q", shared, 0, next(steps)))
            began = time.monotonic()
            work()
            struct.pack_into("d", shared, 8, time.monotonic() - began)

        assert _forked(counting) == 0
        (steps, seconds) = struct.unpack("qd", shared)
        return steps, seconds / steps

    return run


@pytest.fixture(scope="session")
def kills():
    """A function that calls `kill(step, seconds)` with draws of what was `measured` until so many
    have struck; `kill` says whether it has. Half strike at a step: all of those must. Half strike
    some time after one: the work may have ended before."""

    def run(wanted, rng, steps, each, kill):
        struck = drawn = 0
        while struck < wanted:
            seconds = rng.uniform(0, each) if drawn % 2 else 0.0
            hit = kill(step := rng.randrange(steps), seconds)
            assert hit or seconds, f"the kill at step {step} of {steps} has to strike"
            struck += hit
            drawn += 1
        print(f"{struck} of {drawn} kills struck, drawn from {steps} steps of {each * 1e3:.2f} ms")

    return run
