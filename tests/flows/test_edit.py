"""`darkroom edit` with a model that inverts colours: what it reads, writes and refuses."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flows import commands
from flows.commands import UsageError

SIDE = 16


class Inverter:
    """Edits as a generator does, and remembers what it was told."""

    latent_shape = (3, SIDE, SIDE)

    def __init__(self):
        self.editor = SimpleNamespace(config=SimpleNamespace(source="red", target="blue"))
        self.told, self.counts = [], []

    def edit(self, pictures, *, edited=True, **options):
        if options.get("noise") == 9:
            raise ValueError("edit: noise: got 9.0, wanted a time above 0 and up to 1")
        self.told.append({"edited": edited, **options})
        self.counts.append(len(pictures))
        return 255 - pictures


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    found = Inverter()
    monkeypatch.setattr("evaluation.registry.load", lambda name, tracking_uri: found)
    return found


def picture(path, shade=9, side=SIDE):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(path)
    return str(path)


def read(path):
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file)


def test_pictures_are_edited_under_their_names(model, tmp_path):
    for k in range(40):
        picture(tmp_path / "in" / f"Photo {k:02d}.{'bmp' if k % 2 else 'png'}", k)
    out = str(tmp_path / "out")
    done = commands.edit("m", str(tmp_path / "in"), out)
    assert model.told == [{"edited": True}] * 2
    assert done["files"] == [f"{out}/Photo {k:02d}.png" for k in range(40)]
    assert done["text"].splitlines() == done["files"]
    assert (done["source"], done["target"]) == ("red", "blue")
    assert sum(model.counts) == 40 and max(model.counts) == 32
    for k, file in enumerate(done["files"]):
        assert (read(file) == 255 - k).all()

    one = picture(tmp_path / "one.webp")
    commands.edit("m?noise=0.4&steps=3", one, str(tmp_path), inversion_steps=9, unedited=True)
    told = {"edited": False, "noise": 0.4, "inversion_steps": 9, "steps": 3}
    assert model.told[-1] == told


def test_of_large_pictures_fewer_are_edited_at_once(model, tmp_path):
    model.latent_shape = (3, 1024, 1024)
    for k in range(3):
        picture(tmp_path / "in" / f"{k}.png", k, side=1024)
    commands.edit("m", str(tmp_path / "in"), str(tmp_path / "out"))
    assert model.counts == [2, 1]


def test_what_cannot_be_edited_is_refused_and_nothing_is_written(model, tmp_path):
    good, small = picture(tmp_path / "in" / "a.png"), picture(tmp_path / "small.png", side=8)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "a.bmp"):
        picture(tmp_path / "two" / name)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    out = tmp_path / "out"
    for name, place, where, more, said in (
        ("m", small, out, {}, "small.png: got 8 x 8 pixels, wanted 16 x 16, which this model ed"),
        ("m", "broken.png", out, {}, "--pictures: "),
        ("m", str(tmp_path / "broken.png"), out, {}, "broken.png: not_image"),
        ("m", str(tmp_path / "empty"), out, {}, "empty: no picture there"),
        ("m", str(tmp_path / "two"), out, {}, "a.png: it has the name of"),
        ("m", good, tmp_path / "link", {}, "link: the picture lies there"),
        ("m", str(tmp_path / "in"), tmp_path / "link", {}, "link: the pictures lie there"),
        ("m?noise=9", good, out, {}, "m?noise=9: edit: noise: got 9.0"),
        ("m?steps=3", good, out, {"steps": 3}, "steps is given twice; leave out --steps"),
        ("m?inversion_steps=3", good, out, {"inversion_steps": 3}, "out --inversion-steps"),
        ("m?steps", good, out, {}, "expected MODEL?key=value"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            commands.edit(name, place, str(where), **more)
    assert not out.exists() and not model.told


def test_a_model_without_an_edit_is_refused_in_one_line(model, tmp_path):
    model.editor = None
    with pytest.raises(UsageError) as refused:
        commands.edit("shapes", picture(tmp_path / "in" / "a.png"), str(tmp_path / "out"))
    assert str(refused.value) == (
        "shapes: it edits no picture, as it has no edit stage; add `edit` to its recipe, as "
        "shapes-diffusionclip has it"
    )
