"""The core runs on a bare GPU box: torch, numpy, einops, jaxtyping, safetensors, and this
repository.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SERVICES = [
    "prefect",
    "ray",
    "mlflow",
    "pydantic",
    "open_clip",
    "transformers",
    "webdataset",
    "pyarrow",
    "diffusers",
    "torchvision",
    "pandas",
    "fsspec",
    "PIL",
]

CORE = {
    "training.diffusion": [*SERVICES, "einops", "safetensors"],
    "training.networks": SERVICES,
    "training.stage": SERVICES,
    "training.config": SERVICES,
    "training.loop": SERVICES,
    "training.ema": SERVICES,
    "training.posthoc": SERVICES,
    "training.optimizer": SERVICES,
    "training.checkpoint": SERVICES,
    "training.generator": SERVICES,
    "training.results": [*SERVICES, "torch"],
    "pipeline.schema": [*SERVICES, "torch"],
    "pipeline.storage": [*SERVICES, "torch"],
    "pipeline.manifest": [*SERVICES, "torch"],
    "pipeline.plan": [*SERVICES, "torch"],
    "pipeline.load": [*SERVICES, "torch"],
}

SCRIPT = """
import importlib.abc, sys

blocked = set(sys.argv[2].split(","))

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked here", name=name)

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1].split(","):
    __import__(name)
"""


def bare_import(modules: list[str], blocked: list[str]) -> subprocess.CompletedProcess[str]:
    arguments = [",".join(modules), ",".join(blocked)]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "blocked",
    sorted({tuple(names) for names in CORE.values()}),
    ids=lambda names: f"without-{names[-1]}",
)
def test_the_core_imports_alone(blocked):
    modules = [name for name, without in CORE.items() if tuple(without) == blocked]
    done = bare_import(modules, list(blocked))
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    done = bare_import(["training.diffusion"], ["torch"])
    assert "ModuleNotFoundError: torch is blocked here" in done.stderr
