"""A run of too few pictures ends with its data, not after all training (bad input 42)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.scorecard import FEWEST
from flows import build_dataset, retrain
from flows.line import Line
from flows.recipe import load
from flows.score_model import check_held_out
from flows.settings import Settings
from pipeline.ingest import ingest


def pictures(folder: Path, count: int) -> str:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise number {number}")
    return str(folder)


class Begun(Exception):
    """Training has."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The steps of a run of so many pictures, without Prefect and MLflow, up to the first stage."""

    def data(values, name):
        build_dataset.ingest_sources(Line.from_json(values))
        return {}

    def train(*_):
        raise Begun

    monkeypatch.setattr(retrain, "build_dataset", data)
    monkeypatch.setattr(retrain, "train_stage", train)
    monkeypatch.setattr(retrain, "_tracked", lambda line: contextlib.nullcontext(Tracked()))

    def of(count: int) -> None:
        source = pictures(tmp_path / f"{count}", count)
        recipe = load("pictures", [f'data.sources=["{source}"]', f"name=few{count}"])
        retrain.run_line(Line(recipe, Settings(tmp_path / "home", "sqlite://")))

    return of


class Tracked:
    def id(self) -> str:
        return ""


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (8, 2)])
def test_too_few_pictures_are_refused_before_training(run, count, held):
    said = f"{held} held out of {count} pictures, {FEWEST} needed to score a model; ingest more"
    with pytest.raises(ValueError, match=said):
        run(count)


def test_as_many_as_are_said_to_be_enough_are(run, tmp_path):
    with pytest.raises(Begun):
        run(4 * FEWEST)


def test_what_is_asked_for_is_what_a_scorecard_needs(tmp_path):
    """The held-out share may be raised instead."""
    source = pictures(tmp_path / "in", 9)
    rules = load("pictures", ["data.ingest.heldout_share=0.6"]).data.ingest
    version = ingest([source], str(tmp_path / "set"), rules).manifest
    assert version.samples("heldout") >= FEWEST
    check_held_out(version)
