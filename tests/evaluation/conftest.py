"""A package of a tiny stand-in for the generator: what packaging, serving and the registry need;
and a reader of our pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evaluation.packaging import package
from pipeline import storage


def untrained(
    root: Path,
    networks: Mapping[str, Mapping[str, Any]],
    latent_shape: tuple[int, int, int],
    made: Callable[[Any], Any] = lambda stage: None,
) -> dict[str, str]:
    """Stages with random weights, as training leaves them: kind -> folder. The base is told those
    before it; `made` may change it, and an edit."""
    import torch
    from safetensors.torch import save_file

    from training import stages
    from training.stage import distinct_tensors

    done: dict[str, str] = {}
    for kind, config in networks.items():
        torch.manual_seed(0)
        stage: Any = stages.create(kind, dict(config), dict(done) if kind == "base" else {})
        if kind == "base":
            stage.latent_shape.copy_(torch.tensor(latent_shape))
        if kind in ("base", "edit"):
            made(stage)
        folder = root / kind
        folder.mkdir()
        tensors = {name: t.detach().contiguous() for name, t in distinct_tensors(stage).items()}
        save_file(tensors, folder / "weights.safetensors")
        described = {"kind": kind, "config": asdict(stage.config)}
        (folder / "config.json").write_text(json.dumps(described))
        sha256 = storage.sha256(folder / "weights.safetensors")
        described |= {"fingerprint": kind, "weights_sha256": sha256}
        (folder / "stage.json").write_text(json.dumps(described))
        done[kind] = str(folder)
    return done


GENERATOR = """
import json
import random
from pathlib import Path

import numpy as np

from training.networks import paint


class Generator:
    def __init__(self, shade, defaults):
        self.shade, self.defaults = shade, defaults

    @classmethod
    def load(cls, directory, device=None):
        read = json.loads(Path(directory, "generator.json").read_text())
        weights = Path(directory, "base", "weights.safetensors").read_bytes()
        return cls(int(weights[0]), read["defaults"])

    def __call__(self, prompts, *, negative=None, guidance=None, steps=None, seed=0, sampler=None):
        from .late import noise

        guidance = self.defaults["guidance"] if guidance is None else guidance
        steps = self.defaults["steps"] if steps is None else steps
        return np.stack([
            paint(noise(f"{prompt}|{negative}|{guidance}|{steps}|{seed + i}"), self.shade)
            for i, prompt in enumerate(prompts)
        ])
"""
FILES = {
    "training/__init__.py": "",
    "training/generator.py": GENERATOR,
    "training/late.py": (
        "import random\n\nimport numpy as np\n\n\ndef noise(key):\n"
        "    return np.frombuffer(random.Random(key).randbytes(192), np.uint8).reshape(8, 8, 3)\n"
    ),
    "training/networks/__init__.py": (
        "from typing import TYPE_CHECKING\n\nfrom pipeline.shades import SHIFT\n\n"
        "if TYPE_CHECKING:\n    from training.unused import Thing\n\n\n"
        "def paint(noise, shade):\n    return noise // 2 + shade + SHIFT\n"
    ),
    "training/unused.py": "raise RuntimeError('not part of the generator')\n",
    "pipeline/__init__.py": "",
    "pipeline/shades.py": "SHIFT = 1\n",
}


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _make(folder: Path, *, shift: int = 1, shade: int = 9, more: str = "", **options) -> Path:
    """A package of a tiny stand-in for the generator, with code and weights to choose."""
    shades = {"pipeline/shades.py": f"SHIFT = {shift}\n{more}"}
    root = write_files(folder / f"code-{shift}", FILES | shades)
    weights = folder / f"generator-{shade}"
    write_files(weights, {"generator.json": '{"defaults": {"guidance": 3.0, "steps": 16}}'})
    (weights / "base").mkdir(exist_ok=True)
    (weights / "base" / "weights.safetensors").write_bytes(bytes([shade]))
    options = {"recipe": {"name": "tiny"}, "lineage": {"dataset": "d", "version": 1}} | options
    return Path(package(weights, folder / "packages", code_root=root, **options))


@pytest.fixture
def make(tmp_path):
    """make(shift=1, shade=9) -> a package's folder: shift is in its code, shade in its weights."""
    return lambda **options: _make(tmp_path, **options)


VOID = {"meta", "img", "br", "line", "path", "circle", "link", "input"}


class Page(HTMLParser):
    """Balanced tags, all attributes, all text, and the rows of its tables by section."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.attributes, self.text = [], [], [], []
        self.section, self.rows = "", {}
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] if attrs else ""
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"}.intersection(self.open):
            self.rows[self.section][-1][-1] += data

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture
def parsed():
    """parsed(html) -> what is on a page. Fails where its tags are not balanced."""
    return Page
