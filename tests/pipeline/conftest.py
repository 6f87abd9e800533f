"""One Ray session for all tests here that need it, and the real pictures where they are."""

from __future__ import annotations

import os
import signal
import sys
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


@pytest.fixture(scope="session")
def killed_at():
    """A function (step, work) -> exit status of a fork that does the work and dies (SIGKILL) at
    that step of those that change what is on the disk."""

    def run(step, work):
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        steps = iter(range(step))

        def dying(call):
            def wrapped(*args, **options):
                if next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return wrapped

        for name in ("replace", "link", "unlink", "fsync", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except BaseException as error:  # the parent only sees the status
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)

    return run
