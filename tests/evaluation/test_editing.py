"""Edits are counted by the oracle, over held-out scenes that had what was to change."""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.editing import edits, named
from evaluation.techniques import editing, techniques
from pipeline import shapes
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.load import Loader

SIDE, SCENES = 16, 500


@cache
def scenes():
    drawn = (shapes.scene(0, index) for index in range(SCENES))
    return {shapes.draw(it, SIDE).tobytes(): it for it in drawn}


@dataclass
class Painter:
    """Draws each known scene with another colour; of every fourth another shape too, and every
    third it leaves as it is."""

    source: str = "red"
    target: str = "blue"

    def __post_init__(self):
        self.editor = SimpleNamespace(
            config=SimpleNamespace(source=self.source, target=self.target)
        )
        self.known = scenes()

    def edit(self, pictures, *, edited=True):
        return np.stack([self.one(k, p) if edited else p for k, p in enumerate(pictures)])

    def one(self, k, picture):
        scene = self.known[picture.tobytes()]
        (it,) = scene.objects
        if k % 3 == 0:
            return picture
        shape = "ring" if it.shape == "cross" else "cross"
        changed = replace(it, colour=self.target, shape=shape if k % 4 == 0 else it.shape)
        return shapes.draw(replace(scene, objects=(changed,)), SIDE)


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    source, executor = f"shapes://?scenes={SCENES}&seed=0&side={SIDE}", Executor(kind="local")
    rules = IngestRules(near_duplicates="keep", heldout_share=0.4)
    manifest = ingest([source], str(tmp_path_factory.mktemp("set")), rules, executor).manifest
    made = [*encode(manifest, [pixels_spec(SIDE)], None, executor).values()]
    return Loader(manifest, made, splits=("heldout",), global_batch=64, seed=0)


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ("red", "blue", ("colour", "red", "blue")),
        ("a red thing", "a thing, coloured blue", ("colour", "red", "blue")),
        ("ring", "cross", ("shape", "ring", "cross")),
        ("white background", "black background", ("background", "white", "black")),
        ("bottom left", "top left", ("place", "bottom left", "top left")),
        ("coloured", "blue", None),
        ("red", "redder", None),
        ("cat", "dog", None),
    ],
)
def test_the_words_of_an_edit_name_an_attribute(source, target, found):
    assert named(source, target) == found


def test_what_changed_and_what_was_kept_are_told_apart(loader):
    found = edits(Painter(), loader, 12)
    assert found is not None
    assert found.changed.tolist() == [k % 3 != 0 for k in range(12)]
    assert found.kept.tolist() == [k % 3 == 0 or k % 4 != 0 for k in range(12)]
    assert len(set(found.keys)) == 12
    assert {scenes()[it.tobytes()].objects[0].colour for it in found.before} == {"red"}
    assert (found.inverted == found.before).all()
    again = edits(Painter(), loader, 8)
    assert again is not None and again.keys == found.keys[:8]

    shown = editing(found, 5)
    assert "12 pictures 8 show" in shown.lead and len(shown.rows) == len(shown.labels) == 5
    np.testing.assert_array_equal(
        shown.rows[1], [it[1] for it in (found.before, found.inverted, found.after)]
    )


class Editor(Painter):
    """One of latents, whose autoencoder changes a bit of each number."""

    base = SimpleNamespace(config=SimpleNamespace(hears_embedding=False))
    codec, clip, enlarging = "there is one", None, {}

    def encode(self, pictures):
        return pictures

    def decode(self, z):
        return z ^ 1


def test_an_edit_is_among_what_a_model_does_where_scenes_are_held_out_for_it(loader):
    real = np.stack([shapes.draw(shapes.scene(0, k), SIDE) for k in range(2)])
    shown = [it.title for it in techniques(Editor(), ["a ring"], real, 0, heldout=loader)]
    assert shown == ["Through the autoencoder", "From red to blue"]
    assert [it.title for it in techniques(Editor(), ["a ring"], real, 0)] == shown[:1]
    other = techniques(Editor("cat", "dog"), ["a ring"], real, 0, heldout=loader)
    assert [it.title for it in other] == shown[:1]


def test_where_nothing_can_be_judged_nothing_is_said(loader):
    assert edits(SimpleNamespace(), loader) is None
    assert edits(SimpleNamespace(editor=None), loader) is None
    assert edits(Painter("cat", "dog"), loader) is None
