"""One Ray session for all tests here that need it, and the real pictures where they are."""

from __future__ import annotations

import os
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
