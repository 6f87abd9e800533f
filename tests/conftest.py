"""For all tests: one thread for each library, and shapes checked at run time where beartype is
there."""

from __future__ import annotations

import importlib.util
import os

import pytest

# Before torch is imported by any test: on a busy machine two OpenMP threads are slower than one.
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

if importlib.util.find_spec("beartype") is not None:
    from jaxtyping import install_import_hook

    install_import_hook(
        [
            f"training.diffusion.{name}"  # not config: its refusals are ValueErrors of its own
            for name in [
                "draws",
                "guidance",
                "likelihood",
                "objective",
                "path",
                "prediction",
                "samplers",
            ]
        ],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )


@pytest.fixture(scope="session")
def rounds():
    """`rounds(few, all)`: how often to repeat; all of it in `make soak`."""
    soak = os.environ.get("DARKROOM_SOAK", "0") not in ("", "0")
    return lambda few, all: all if soak else few
