"""`darkroom sample` and `compare`: what a model does not hear is said, and what is not to stand
behind its name is refused.
"""

from __future__ import annotations

import numpy as np
import pytest

from flows import commands
from flows.commands import UsageError

CLASSES = {"colour": ["red", "blue"], "shape": ["ring", "cross"]}


class Grey:
    """Draws grey, and hears what it is made to hear."""

    def __init__(self, text=True, labels=None):
        self.reads_text = text
        self.given = {"labels": labels, "text": text} if labels else {}
        self.asked = []

    def __call__(self, prompts, **told):
        self.asked.append((list(prompts), told))
        return np.full((len(prompts), 8, 8, 3), 128, np.uint8)


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))

    def sample(generator, *prompts, model="m", negative=None, **more):
        """(what came of it, what was said)."""
        monkeypatch.setattr("evaluation.registry.load", lambda name, tracking_uri: generator)
        capsys.readouterr()
        out = str(tmp_path / "out")
        done = commands.sample(model, list(prompts), out, negative, None, None, 0, 1, **more)
        assert len(done["files"]) == len(prompts or [""])
        return done, capsys.readouterr().err.splitlines()

    return sample


def test_texts_that_a_model_does_not_hear_are_named(sample):
    done, said = sample(Grey(text=False), "a ring", negative="red")
    assert done["ignored"] == ["prompt", "negative"]
    assert said == ["m hears no text: what was said (prompt, negative) changes no picture"]
    done, said = sample(Grey(text=False), "a ring", model="m?negative=red")
    assert done["ignored"] == ["prompt", "negative"]
    done, said = sample(Grey(), "a ring", negative="red")
    assert (done["ignored"], done["by_chance"], said) == ([], [], [])


def test_a_class_that_nobody_names_is_drawn_by_chance(sample):
    done, said = sample(Grey(text=False, labels=CLASSES), "a ring")
    assert (done["ignored"], done["by_chance"]) == (["prompt"], ["colour", "shape"])
    assert "colour and shape" in said[1] and "--label colour=... --label shape=..." in said[1]
    named = ["colour=red", "shape=ring"]
    done, said = sample(Grey(text=False, labels=CLASSES), labels=named)
    assert (done["ignored"], done["by_chance"], said) == ([], [], [])
    # Where captions are heard beside classes, the caption says what is to be seen.
    done, said = sample(Grey(labels=CLASSES), "a red ring")
    assert (done["by_chance"], said) == ([], [])


def test_what_a_comparison_says_itself_cannot_be_set_behind_a_name(tmp_path):
    for key in ("seed", "labels", "low", "map", "prompts", "known"):
        with pytest.raises(UsageError, match=rf"m\?steps=2&{key}=3: {key} .*guidance, .*sr1.steps"):
            commands.compare(["m", f"m?steps=2&{key}=3"], str(tmp_path / "page.html"), 8, None)
    assert not (tmp_path / "page.html").exists()


def test_pictures_and_classes_are_given_by_options_of_their_own(sample, tmp_path):
    painter = Grey()
    for key in ("labels", "low", "map", "prompts"):
        with pytest.raises(UsageError, match=f"{key} cannot be set so: .*--label, --low and --map"):
            sample(painter, "a", model=f"m?{key}=3")
    with pytest.raises(UsageError, match="pictures cannot .*: noise, inversion_steps, steps$"):
        commands.edit("m?pictures=3", str(tmp_path / "in"), str(tmp_path / "out"))
    assert painter.asked == []
    sample(painter, "a", model="m?seed=3")
    assert painter.asked[0][1]["seed"] == 3
