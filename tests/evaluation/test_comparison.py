"""Side by side: the same prompts and seeds, and what is said of a difference is paired."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.comparison import Contender, compare, render
from evaluation.prompts import Prompt
from pipeline import shapes

SCENES = [shapes.scene(3, index) for index in range(24)]
PROMPTS = [
    Prompt(f"{index} <b>{shapes.caption(it, 3, index)}</b>", "seen", it.truth())
    for index, it in enumerate(SCENES)
]


class Painter:
    """Draws what it is asked for, but every `slip`-th picture's neighbour's; looks at its network
    `steps` times."""

    def __init__(self, slip: int = 0):
        self.slip, self.seeds = slip, []
        self.base = SimpleNamespace(network=torch.nn.Identity())

    def __call__(self, prompts, *, seed, steps=1, labels=None, classifier_guidance=0.0):
        self.seeds += seed
        self.labels = labels
        for _ in range(steps):
            self.base.network(torch.zeros(len(prompts), 1))
        numbers = [int(text.split()[0]) for text in prompts]
        moved = [n + 1 if self.slip and n % self.slip == 0 else n for n in numbers]
        return np.stack([shapes.draw(SCENES[n % len(SCENES)], 32) for n in moved])


def test_the_same_prompts_and_seeds_for_all_and_differences_are_paired():
    right, wrong = Painter(), Painter(slip=4)
    first, second, again = compare(
        [Contender("a", right), Contender("b", wrong, {"steps": 3}), Contender("a2", right)],
        PROMPTS,
        seed=100,
        batch=7,
        blocks=8,
    )
    assert wrong.seeds == [100 + k for k in range(24)]
    assert (first.right.mean(), second.right.mean()) == (1.0, 0.75)
    assert (first.evaluations, second.evaluations) == (1.0, 3.0)
    assert first.against_first is None
    assert second.against_first is not None
    assert second.against_first.mean == pytest.approx(-0.25)
    assert second.against_first.low < -0.25 < second.against_first.high < 0
    assert again.against_first is not None
    assert (again.against_first.low, again.against_first.high) == (0.0, 0.0)


def test_a_classifier_is_told_what_the_prompts_ask_for():
    plain, guided = Painter(), Painter()
    compare(
        [Contender("a", plain), Contender("b", guided, {"classifier_guidance": 2.0})],
        PROMPTS[:3],
        seed=0,
        blocks=2,
    )
    assert plain.labels is None
    assert guided.labels == [prompt.truth for prompt in PROMPTS[:3]]


def test_the_page_is_self_contained_and_escapes_captions():
    drawn = compare([Contender("a", Painter()), Contender("<i>", Painter(3))], PROMPTS, seed=0)
    html = render("two of them", drawn, PROMPTS, rows=4)
    assert html.count("data:image/png;base64,") == 8
    assert "&lt;b&gt;" in html
    assert "<b>0" not in html
    assert "&lt;i&gt;" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count('class="wrong"') == 2  # pictures 0 and 3 of the second


def test_refusals():
    with pytest.raises(ValueError, match="two contenders"):
        compare([Contender("a", Painter())], PROMPTS, seed=0)
    strange = [Prompt("x", "seen", {"name": "cat"})] * 3
    painters = [Contender("a", lambda texts, seed: np.zeros((len(texts), 32, 32, 3), np.uint8))] * 2
    with pytest.raises(ValueError, match="judged by CLIP"):
        compare(painters, strange, seed=0)
