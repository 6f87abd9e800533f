"""Side by side: the same prompts and seeds, and what is said of a difference is paired."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.comparison import Contender, compare, gallery, render
from evaluation.prompts import Prompt
from evaluation.techniques import techniques
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
        self.networks = [torch.nn.Identity()]

    def __call__(self, prompts, *, seed, steps=1, labels=None, classifier_guidance=0.0):
        self.seeds += seed
        self.labels = labels
        for _ in range(steps):
            self.networks[0](torch.zeros(len(prompts), 1))
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
    assert wrong.seeds == [100, *(100 + k for k in range(24))]  # the first to get ready
    assert (first.right.mean(), second.right.mean()) == (1.0, 0.75)
    assert (first.evaluations, second.evaluations) == (1.0, 3.0)
    assert first.against_first is None
    assert second.against_first is not None
    assert second.against_first.mean == pytest.approx(-0.25)
    assert second.against_first.low < -0.25 < second.against_first.high < 0
    assert again.against_first is not None
    assert (again.against_first.low, again.against_first.high) == (0.0, 0.0)


class Eye:
    """Sees the mean colour of each quarter."""

    def images(self, pictures):
        quarters = pictures.reshape(len(pictures), 2, 16, 2, 16, 3)
        return quarters.mean((2, 4)).reshape(len(pictures), -1) / 255

    def texts(self, texts):
        raise AssertionError(f"pictures of scenes are judged by the oracle, not by {texts}")


def test_all_pictures_together_are_held_against_real_ones():
    """One that draws the same scene for each prompt misses most of what is real."""
    real = np.stack([shapes.draw(it, 32) for it in SCENES])

    class Same(Painter):
        def __call__(self, prompts, **options):
            return super().__call__(["0"] * len(prompts), **options)

    contenders = [Contender("a", Painter()), Contender("b", Same())]
    good, same = compare(contenders, PROMPTS, seed=0, clip=Eye(), reference=real, blocks=4)
    assert good.measures["recall"].mean == good.measures["precision"].mean == 1.0
    assert same.measures["recall"].mean < 0.2
    lost = same.measures["recall"].against_first
    assert lost is not None
    assert lost.high < -0.5
    assert good.measures["kid"].mean < same.measures["kid"].mean
    assert good.measures["legible"].mean == 1.0
    ends = ((real == 0) | (real == 255)).mean()
    assert good.measures["saturation"].mean == pytest.approx(ends)
    html = render("two", [good, same], PROMPTS, rows=2)
    assert "100.00 %" in html
    assert "KID" in html


class Coder(Painter):
    """Its autoencoder darkens pictures by some levels; what it draws is told no other way."""

    def __init__(self, levels):
        super().__init__()
        self.codec, self.levels = object(), levels

    def encode(self, pictures):
        return pictures

    def decode(self, z):
        return (z.astype(np.int16) - self.levels).clip(0, 255).astype(np.uint8)


def test_what_autoencoders_leave_of_pictures_is_paired_and_shown(parsed):
    real = np.random.default_rng(0).integers(64, 256, (300, 32, 32, 3), np.uint8)
    made = [{"autoencoder": name} for name in ("kl", "vq", "vq")]
    drawn = compare(
        [
            Contender("fine", Coder(2), {}, made[0]),
            Contender("coarse", Coder(20), {}, made[1]),
            Contender("again", Coder(20), {"steps": 2}, made[2]),
            Contender("none", Painter()),
        ],
        PROMPTS[:5],
        seed=0,
        blocks=4,
        reference=real,
    )
    fine, coarse, again, none = (it.measures.get("reconstruction_psnr") for it in drawn)
    assert none is None
    assert fine is not None
    assert coarse is not None
    assert again is not None
    assert len(fine.values) == 256
    assert fine.mean == pytest.approx(20 * np.log10(255 / 2))
    own, lost = coarse.interval(), coarse.against_first
    assert own is not None
    assert own.low == pytest.approx(20 * np.log10(255 / 20)) == own.high
    assert lost is not None
    assert lost.mean == pytest.approx(-20) == lost.low
    html = render("three", drawn, PROMPTS[:5], rows=1, reference=real)
    assert "No claim is made of fewer than 512" in html
    rows = [row for section in parsed(html).rows.values() for row in section]
    heads = "".join(f'<th scope="col">{it}</th>' for it in ("The picture", "fine", "coarse"))
    assert html.count(heads) == 1
    assert html.count("data:image/png;base64,") == 4 + 6 * 3
    assert any("-20.00 (-20.00 to -20.00)" in cell for row in rows for cell in row)
    one = parsed(render("one", drawn[1:3], PROMPTS[:5], rows=1, reference=real))
    assert "Through the autoencoders" not in " ".join(one.text)


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


def test_the_page_says_whose_evaluations_are_counted(parsed):
    drawn = compare([Contender("a", Painter()), Contender("b", Painter())], PROMPTS[:3], seed=0)
    page = parsed(render("t", drawn, PROMPTS[:3], rows=1))
    said = " ".join(page.text)
    assert "Counted are evaluations of the networks that draw." in said
    assert "guidance by a classifier or by CLIP" in said


def test_the_page_is_self_contained_and_escapes_captions():
    drawn = compare([Contender("a", Painter()), Contender("<i>", Painter(3))], PROMPTS, seed=0)
    html = render("two of them", drawn, PROMPTS, rows=4)
    assert html.count("data:image/png;base64,") == 8
    assert "&lt;b&gt;" in html
    assert "<b>0" not in html
    assert "&lt;i&gt;" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count('class="wrong"') == 2  # pictures 0 and 3 of the second


def test_a_gallery_has_a_row_for_each_at_one_size():
    drawn = compare([Contender("a", Cascade()), Contender("b", Painter())], PROMPTS, seed=0)
    small = replace(drawn[0], pictures=drawn[0].apart["base"])
    picture = np.asarray(Image.open(io.BytesIO(gallery([drawn[1], small], columns=3))))
    assert picture.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    wanted = drawn[1].pictures[1].repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(picture[4:68, 72:136], wanted)
    wanted = small.pictures[2].repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(picture[72:136, 140:204], wanted)
    odd = replace(small, pictures=np.zeros((3, 24, 24, 3), np.uint8))
    with pytest.raises(ValueError, match="a 24"):
        gallery([drawn[1], odd])


class Cascade(Painter):
    """Draws 16 px and enlarges them; what the seeds and options are shows in the pictures."""

    codec = None

    def __init__(self):
        super().__init__()
        self.enlarging = {"sr1": None}

    def __call__(self, prompts, *, seed, labels=None, clip_guidance=0.0, **options):
        return self.stages(prompts, seed=seed, kind=options.pop("sampler", None), **options)["sr1"]

    def stages(self, prompts, *, seed, labels=None, kind=None, steps=1):
        small = np.stack([np.full((16, 16, 3), s + 10 * steps, np.uint8) for s in seed])
        small[:, 0] = 255 if kind == "ddim" else 0
        return {"base": small, "sr1": 255 - small.repeat(2, 1).repeat(2, 2)}


def test_what_each_stage_drew_stands_side_by_side_and_which_stages_are_shared(parsed):
    made = {"t5": "t5-0, weights aa", "base": "base-1"}
    drawn = compare(
        [
            Contender("a", Cascade(), {}, made),
            Contender("b", Cascade(), {"sampler": "ddim", "steps": 3}, made | {"base": "base-2"}),
            Contender("led", Cascade(), {"clip_guidance": 1.0}, made | {"sr1": "sr1-<i>"}),
            Contender("one", Painter(), {}, {}),
        ],
        PROMPTS,
        seed=7,
        batch=5,
    )
    for it in drawn[:2]:
        assert list(it.apart) == ["base", "sr1"]
        np.testing.assert_array_equal(it.apart["sr1"], it.pictures[:4])
    assert drawn[2].apart == drawn[3].apart == {}  # led by what shows no stages; of one stage
    page = parsed(render("four", drawn, PROMPTS, rows=1))
    rows = [row for section in page.rows.values() for row in section]
    assert ["t5", "differs", *["t5-0, weights aa"] * 3, "none"] in rows
    assert ["sr1", "differs", "none", "none", "sr1-<i>", "none"] in rows
    assert rows.count(["Prompt", "base, 16 px", "sr1, 32 px"]) == 2
    assert page.values("src") and len(page.values("src")) == 4 + 2 * 4 * 2
    alike = parsed(render("two", [drawn[0], drawn[0]], PROMPTS, rows=1))
    assert ["t5", "shared", *["t5-0, weights aa"] * 2] in alike.rows[""]


BASE = SimpleNamespace(config=SimpleNamespace(hears_embedding=False))


class Filler:
    """A model of pixels that knows how to keep what is known, and draws grey elsewhere."""

    codec, base, clip, enlarging, resolution = None, BASE, None, {}, 16

    def __call__(self, prompts, *, seed, guidance, known):
        assert set(prompts) == {""}
        if known.mask is None:
            return known.pictures.repeat(known.factor, 1).repeat(known.factor, 2)
        return np.where(known.mask[..., None], known.pictures, 128).astype(np.uint8)

    def between(self, prompt, seeds, shares):
        assert seeds[0] != seeds[1]
        return np.stack([np.full((16, 16, 3), 255 * share, np.uint8) for share in shares])


def test_what_else_a_model_of_pixels_does():
    real = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    found = techniques(Filler(), ["a", "<b>"], real, seed=4)
    assert [it.error for it in found] == [None, 0.0, 0.0]
    assert [len(it.rows) for it in found] == [2, 3, 3]
    between, filled, enlarged = found
    assert between.rows[0][:, 0, 0, 0].tolist() == [0, 42, 85, 127, 170, 212, 255]
    np.testing.assert_array_equal(filled.rows[1][-1], real[1])
    assert (filled.rows[1][0][:, 8:] == 255).all()
    assert (filled.rows[1][1][:, 8:] == 128).all()
    assert all(len(row) == len(enlarged.columns) for row in enlarged.rows)
    drawn = compare([Contender("a", Painter()), Contender("b", Painter())], PROMPTS, seed=0)
    html = render("t", drawn, PROMPTS, found, rows=1)
    assert html.count("data:image/png;base64,") == 2 + 2 * 7 + 6 * 6
    assert "<b>" not in html.replace("<b>Darkroom", "")
    assert techniques(Painter(), ["a"], real, seed=0) == []


def test_refusals():
    with pytest.raises(ValueError, match="two contenders"):
        compare([Contender("a", Painter())], PROMPTS, seed=0)
    strange = [Prompt("x", "seen", {"name": "cat"})] * 3
    painters = [Contender("a", lambda texts, seed: np.zeros((len(texts), 32, 32, 3), np.uint8))] * 2
    with pytest.raises(ValueError, match="judged by CLIP"):
        compare(painters, strange, seed=0)
