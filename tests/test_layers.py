"""The architecture holds, and the check that says so can fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flows", "pipeline", "training", "evaluation")

# One line that breaks each contract of pyproject.toml, and the file it would stand in.
OFFENCES = {
    "imports run against the data": ("pipeline/storage.py", "import training"),
    "the diffusion maths and the networks know nothing of each other": (
        "training/diffusion/path.py",
        "from training import networks",
    ),
    "pipeline never imports torch": ("pipeline/plan.py", "import torch"),
    "torch stays in training and evaluation": ("flows/settings.py", "def f():\n    import torch"),
    "prefect stays in flows": ("evaluation/metrics.py", "import prefect"),
    "ray stays in four modules": ("training/loop.py", "import ray.train"),
    "mlflow stays in tracking, registry and serving": (
        "training/ema.py",
        "from mlflow import pyfunc",
    ),
    "open_clip, transformers and diffusers stay with the encoders and their training": (
        "training/networks/unet.py",
        "import diffusers",
    ),
    "webdataset stays in pipeline.shards": ("pipeline/manifest.py", "import webdataset"),
    "the web is reached through pipeline.download alone": (
        "pipeline/filters.py",
        "import httpcore",
    ),
    "pydantic stays in configs, scorecard, gate and flows": (
        "training/stage.py",
        "import pydantic",
    ),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert tool, "lint-imports is not beside this Python; run the tests with `make test`"
    return subprocess.run([tool, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_the_layers_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def offended(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("offended")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, line in OFFENCES.values():
        with (folder / name).open("a") as file:
            file.write(f"\n{line}\n")
    return lint(folder).stdout


@pytest.mark.parametrize("contract", OFFENCES)
def test_every_contract_can_be_broken(offended, contract):
    assert f"{contract} BROKEN" in re.sub(r"\s+", " ", offended)


def test_every_contract_has_its_offence(offended):
    names = re.findall(r"^(\S.*?) BROKEN", offended, re.MULTILINE)
    assert (
        len(names)
        == len(OFFENCES)
        == (ROOT / "pyproject.toml").read_text().count("[[tool.importlinter.contracts]]")
    )
