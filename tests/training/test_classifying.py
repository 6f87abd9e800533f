"""The classifier's stage: it learns what labels say, and says what it knows of noisy pictures."""

import numpy as np
import pytest
import torch

from training import stages
from training.classifying import UNASKED, AttributeConfig, of_scenes
from training.results import committed
from training.stage import to_tensors


@pytest.fixture(scope="module")
def stage(line):
    return stages.load(line.stages["classifier"])


def test_it_learns(line):
    losses = [record["loss"] for record in line.history("classifier")]
    assert np.mean(losses[-2:]) < losses[0] - 0.3
    measured = committed(line.stages["classifier"])["measured"]
    assert set(measured) == {
        f"{which}accuracy_{when}" for which in ("", "heldout_") for when in ("clean", "halfway")
    }


def test_its_log_probability_is_that_of_the_answers_asked_for(stage, line):
    batch = to_tensors(line.loader("pixels").rows(np.arange(4)))
    x, t = batch["pixels"] / 127.5 - 1, torch.tensor(0.3)
    logits = stage.logits(x, t)
    known = of_scenes()[0].answers
    wanted = [{"colour": known[k]} for k in range(4)]
    expected = logits["colour"].log_softmax(1)[torch.arange(4), torch.arange(4)]
    torch.testing.assert_close(stage.log_prob(wanted)(x, t, {}), expected)
    everything = [
        {"colour": "red", "place": "centre", "size": "small", "shape": "ring"} for _ in range(4)
    ]
    assert (stage.log_prob(everything)(x, t, {}) < 0).all()


def test_what_is_not_asked_teaches_nothing(stage, line):
    batch = to_tensors(line.loader("pixels").rows(np.arange(4))) | {"label": [None, {}, {}, None]}
    assert (stage.answers(batch["label"]) == UNASKED).all()
    assert stage(batch)["loss"].tolist() == [0.0] * 4


def test_what_a_label_leaves_open_is_no_mistake(stage, line, monkeypatch):
    loader = line.loader("pixels", splits=("heldout",))
    whole = stage.finish(loader)
    everything = type(stage).answers

    def half(self, labels, strict=False):
        answers = everything(self, labels, strict)
        answers[:, 1:] = UNASKED
        answers[::2] = UNASKED
        return answers

    monkeypatch.setattr(type(stage), "answers", half)
    first = stage.finish(loader)
    assert first["accuracy_clean"] >= whole["accuracy_clean"]
    assert 0 < first["accuracy_clean"] <= 1
    monkeypatch.setattr(
        type(stage),
        "answers",
        lambda self, labels: torch.full_like(everything(self, labels), UNASKED),
    )
    assert stage.finish(loader) == {}


def test_refusals(stage):
    with pytest.raises(ValueError, match="colour='mauve' cannot be asked for"):
        stage.log_prob([{"colour": "mauve"}])
    with pytest.raises(ValueError, match="2 answers or more"):
        AttributeConfig(name="a", answers=("b",))
