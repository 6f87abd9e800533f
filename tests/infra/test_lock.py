"""requirements.lock satisfies pyproject.toml, wholly hashed, and names no index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==([\w.!+-]+)", LOCK, re.MULTILINE)
}
WANTED = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["pretrained"],
    *PROJECT["dependency-groups"]["dev"],
]


@pytest.mark.parametrize("wanted", WANTED)
def test_every_requirement_is_locked_at_a_version_it_allows(wanted):
    requirement = Requirement(wanted)
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name} is not in requirements.lock; run `make lock`"
    assert PINS[name] in requirement.specifier, f"{name}=={PINS[name]}; run `make lock`"


def test_every_pin_has_a_hash():
    for block in re.split(r"\n(?=\S)", LOCK.strip()):
        assert re.match(r"[\w.-]+==\S+", block), f"not a pin: {block.splitlines()[0]}"
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_lock_names_no_index():
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
