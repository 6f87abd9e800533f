"""The real pictures and weights, where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data():
    """A function from a folder's name to its path under ../shared/data; skips where it is not."""

    def folder(name: str) -> Path:
        if not (DATA / name).is_dir():
            pytest.skip(f"no real data: {DATA / name} is missing")
        return DATA / name

    return folder
