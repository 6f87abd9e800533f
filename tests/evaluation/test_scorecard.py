"""A painter of known skill gets the scores it deserves; only like is compared with like."""

import dataclasses
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from evaluation.gate import GatePolicy, Margin, decide
from evaluation.prompts import Prompt
from evaluation.report import ReportInputs, render
from evaluation.scorecard import EvaluationConfig, Scorecard, Scored, score
from evaluation.shapes_oracle import ATTRIBUTES
from pipeline import shapes, storage
from pipeline.manifest import fingerprint

CONFIG = EvaluationConfig(
    kind="shapes",
    prompts=96,
    guidance_scales=(2.0, 6.0),
    sweep_prompts=32,
    reference_count=96,
    batch=20,
    kid_block=16,
    blocks=8,
    gallery=10,
)


def prompts_of(count, seed=0):
    scenes = [shapes.scene(seed, i) for i in range(count)]
    return [
        Prompt(
            f"{i}: {shapes.caption(it, seed, i, 'heldout')}", ("seen", "unseen")[i % 2], it.truth()
        )
        for i, it in enumerate(scenes)
    ]


PROMPTS = prompts_of(96)
TRUTHS = {it.text: dict(it.truth or {}) for it in PROMPTS}


def drawn(count, seed):
    return np.stack([shapes.draw(shapes.scene(seed, i), 32) for i in range(count)])


class Painter:
    """Draws the truth; where `slips(index, guidance)` says so, in another colour."""

    def __init__(self, slips):
        self.slips, self.drawn = slips, []

    def __call__(self, prompts, *, guidance=None, steps=None, seed: Any = 0):
        self.drawn += [(text, guidance, s) for text, s in zip(prompts, seed, strict=True)]
        return np.stack([self.paint(t, guidance, s) for t, s in zip(prompts, seed, strict=True)])

    def paint(self, text, guidance, seed):
        truth = dict(TRUTHS[text])
        if self.slips(int(text.split(":")[0]), guidance):
            colours = tuple(shapes.COLOURS)
            truth["colour"] = colours[(colours.index(truth["colour"]) + 1) % len(colours)]
        return shapes.draw(shapes.scene_of(truth, 1, seed), 32)


class Thumbnails:
    """Features that know what a picture shows: coarse pixels; a caption's are those of a drawing of
    it.
    """

    def __init__(self):
        self.tuple_id = {"extractor": "thumbnails", "weights": "none", "resize": "to 8"}

    def images(self, pictures):
        n, side = pictures.shape[:2]
        small = (
            pictures.reshape(n, 8, side // 8, 8, side // 8, 3).mean((2, 4)).reshape(n, -1) - 128.0
        )
        return (small / np.linalg.norm(small, axis=1, keepdims=True)).astype(np.float32)

    def texts(self, captions):
        return self.images(
            np.stack([shapes.draw(shapes.scene_of(TRUTHS[c], 2, 0), 32) for c in captions])
        )


def scored(painter, config=CONFIG, **more):
    return score(
        painter,
        config,
        prompts=PROMPTS,
        clip=Thumbnails(),
        reference=drawn(96, 5),
        train=drawn(96, 6),
        **more,
    )


@pytest.fixture(scope="module")
def known():
    """Right at scale 6, wrong for every fourth prompt at 2, and for every prompt of the unseen
    group at 1.
    """
    painter = Painter(
        lambda i, guidance: (guidance == 2.0 and i % 4 == 0) or (guidance == 1.0 and i % 2 == 1)
    )
    return painter, scored(painter)


def test_the_best_scale_is_chosen_and_its_values_are_those_of_the_painter(known):
    card = known[1].scorecard
    assert card.scale == 6.0
    assert [row.scale for row in card.sweep] == [1.0, 2.0, 6.0]
    assert [row.values["correct"] for row in card.sweep] == [0.5, 0.75, 1.0]
    assert (
        card.headline["correct"]
        == card.headline["correct_seen"]
        == card.headline["correct_unseen"]
        == 1.0
    )
    assert card.headline["correct_unguided"] == 0.5
    assert card.headline["correct_shuffled"] < 0.05
    assert card.values["correct"].low == pytest.approx(0.96, abs=0.01)
    assert card.groups["unseen"]["prompts"] == 48
    assert any(row.pareto for row in card.sweep)


def test_of_scales_that_a_few_prompts_cannot_tell_apart_the_least_is_chosen():
    """At 2 one prompt of the sweep is wrong, at 6 none, and unguided every second one."""
    card = scored(
        Painter(
            lambda i, guidance: (guidance == 2.0 and i == 5) or (guidance == 1.0 and i % 2 == 1)
        )
    ).scorecard
    assert card.sweep[1].values["correct"] < card.sweep[2].values["correct"] == 1.0
    assert card.scale == 2.0


class Tuned(Painter):
    """Like a generator of two stages: its own level is 0, its own steps are 8."""

    defaults: ClassVar = {"guidance": 1.0, "steps": 8}
    samplers: ClassVar = {"sr1": SimpleNamespace(level=0.0)}

    def __call__(self, prompts, *, guidance=None, steps=None, seed: Any = 0, **options):
        level, steps = options.get("sr1.level", 0.0), steps or 8
        self.drawn += [(t, guidance, level, steps, s) for t, s in zip(prompts, seed, strict=True)]
        slips = lambda i, guidance: self.slips(i, guidance, level, steps)
        one = Painter(slips)
        return np.stack([one.paint(t, guidance, s) for t, s in zip(prompts, seed, strict=True)])


def slips(i, guidance, level, steps):
    """At level 0 a quarter is wrong, and all of few steps; at .1 one prompt; at .2 none."""
    unguided = guidance == 1.0 and i % 2 == 1
    wrong = {0.0: i % 4 == 0 or steps < 8, 0.1: i == 5, 0.2: False}
    return unguided or wrong[level]


LEVEL, STEPS = ("sr1.level", (0.0, 0.1, 0.2)), ("steps", (2, 8))


@pytest.mark.parametrize(
    ("order", "chosen"),
    [
        ((LEVEL, STEPS), [("sr1.level", 0.1), ("steps", 2)]),
        ((STEPS, LEVEL), [("steps", 8), ("sr1.level", 0.1)]),
    ],
)
def test_options_are_chosen_one_after_the_other_with_what_was_chosen_before(order, chosen):
    """Few steps are good enough at the level that is chosen, and not at the generator's own."""
    painter, told = Tuned(slips), []
    config = CONFIG.model_copy(update={"options": dict(order)})
    found = scored(painter, config, progress=lambda done, total: told.append((done, total)))
    card = found.scorecard
    assert card.scale == 2.0
    assert list(card.chosen.items()) == chosen
    tried = {it.name: it for it in card.options}["sr1.level"]
    assert [row.value for row in tried.tried] == [0.0, 0.1, 0.2]
    assert [row.values["correct"] for row in tried.tried] == [0.75, 31 / 32, 1.0]
    low, high = tried.tried[0].between["correct"]
    assert 0.5 < low < 0.75 < high < 0.9
    # With the chosen ones all prompts are drawn, and unguided; nothing is drawn twice.
    assert card.headline["correct"] == 95 / 96
    assert card.headline["correct_unguided"] == 0.5
    assert len(painter.drawn) == len(set(painter.drawn)) == (3 + 2 + 1) * 32 + 64 + 96
    assert told[-1] == (len(painter.drawn), len(painter.drawn))
    assert Scorecard.model_validate_json(card.model_dump_json()) == card


def test_what_is_the_generators_own_already_is_not_drawn_again():
    painter = Tuned(slips)
    config = CONFIG.model_copy(update={"options": {"sr1.level": (0.0,), "steps": (8,)}})
    card = scored(painter, config).scorecard
    assert card.chosen == {"sr1.level": 0.0, "steps": 8}
    assert len(painter.drawn) == 3 * 32 + 2 * 64


class Slow(Painter):
    """Takes 10 ms, of a clock of its own, for each picture of a call."""

    now = 0.0

    def __call__(self, prompts, **told):
        self.now += 0.01 * len(prompts)
        return super().__call__(prompts, **told)


@pytest.mark.parametrize(("prompts", "scale"), [(32, None), (96, None), (200, None), (32, 2.0)])
def test_the_speed_is_measured_however_few_the_sweep_left_to_draw(prompts, scale, monkeypatch):
    painter = Slow(lambda i, guidance: guidance == 1.0 and i % 2)
    monkeypatch.setattr("evaluation.sample.time.perf_counter", lambda: painter.now)
    config = CONFIG.model_copy(update={"sweep_prompts": prompts, "guidance_scales": (2.0,)})
    card = scored(painter, config, scale=scale).scorecard
    assert card.scale == 2.0
    assert card.headline["pictures_per_second"] == pytest.approx(100)
    assert len(painter.drawn) == 2 * 96


def test_a_model_that_serves_draws_as_it_does_whatever_is_swept():
    painter = Tuned(slips)
    config = CONFIG.model_copy(update={"options": dict((LEVEL, STEPS))})
    card = scored(painter, config, scale=2.0).scorecard
    assert (card.options, card.chosen) == ((), {})
    assert {(level, steps) for _, _, level, steps, _ in painter.drawn} == {(0.0, 8)}


def test_without_options_a_config_is_the_same_text_as_before_there_were_any():
    plain = EvaluationConfig()
    assert "options" not in plain.model_dump(mode="json")
    assert fingerprint(plain.model_dump(mode="json")) == "6a5990f11b2365fb"


def test_the_order_of_options_survives_json_that_is_sorted():
    made = EvaluationConfig(options={"steps": (8, 16), "guidance_interval": ((0.0, 1.0), (0.2, 1))})
    again = EvaluationConfig.model_validate_json(storage.json_bytes(made.model_dump(mode="json")))
    assert again == made
    assert [*again.options] == ["steps", "guidance_interval"]
    turned = EvaluationConfig(options=dict(reversed(made.options.items())))
    texts = {fingerprint(it.model_dump(mode="json")) for it in (made, turned)}
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"steps": 8}}, "steps: got 8, wanted a list of values"),
        ({"options": {"steps": []}}, "wanted a list of values"),
        ({"options": {"steps": [None]}}, "wanted a list of values"),
        ({"options": {"guidance": [1, 2]}}, "guidance: its values are evaluation.guidance_scales"),
        ({"options": {"steps": [8]}, "steps": 4}, "evaluation.steps=4 holds them"),
        ({"options": 3}, "valid dictionary"),
    ],
)
def test_what_is_no_choice_of_options_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        EvaluationConfig(**changes)


def test_only_the_attribute_that_was_wrong_is_blamed(known):
    table = known[1].scorecard.attributes
    assert set(table) == set(ATTRIBUTES)
    assert {name: row["unguided"] for name, row in table.items()} == dict.fromkeys(
        ATTRIBUTES, 1.0
    ) | {"colour": 0.5}
    assert table["size"]["shuffled"] == pytest.approx(0.5, abs=0.2)
    assert table["place"]["shuffled"] == pytest.approx(1 / 9, abs=0.12)


def test_nothing_is_drawn_twice_and_the_seed_goes_with_the_prompt(known):
    drawn_by = known[0].drawn
    assert len(drawn_by) == len(set(drawn_by)) == 3 * 32 + 2 * 64
    assert {seed - int(text.split(":")[0]) for text, _, seed in drawn_by} == {CONFIG.seed}


def test_progress_ends_at_its_total():
    told = []
    scored(Painter(lambda *_: False), progress=lambda done, total: told.append((done, total)))
    assert told[0] == (20, 3 * 32 + 2 * 64)
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_distribution_of_good_drawings_is_that_of_the_reference(known):
    card = known[1].scorecard
    assert card.values["kid"].low < 0.01
    assert card.headline["precision"] > 0.6
    assert card.headline["recall"] > 0.6
    assert abs(card.headline["memorisation"]) < 0.05
    copies = drawn(96, 6)
    painter = Painter(lambda *_: False)
    painter.paint = lambda text, guidance, seed: copies[int(text.split(":")[0])]
    low = scored(painter).scorecard.values["memorisation"].low
    assert low is not None
    assert low > 0.01


def test_a_champion_scored_anew_is_paired_prompt_by_prompt(known):
    again = scored(Painter(lambda i, guidance: i == 0), scale=6.0)
    assert again.scorecard.scale == 6.0
    assert again.scorecard.sweep == ()
    difference = known[1].per_prompt["correct"] - again.per_prompt["correct"]
    assert difference.tolist() == [1.0] + [0.0] * 95
    for name, value in again.scorecard.values.items():
        assert value.comparable(known[1].scorecard.values[name])


def test_values_on_other_prompts_or_references_are_not_comparable(known):
    other = score(
        Painter(lambda *_: False),
        CONFIG,
        prompts=PROMPTS[::-1],
        clip=Thumbnails(),
        reference=drawn(96, 8),
    )
    mine, theirs = known[1].scorecard.values, other.scorecard.values
    assert not mine["correct"].comparable(theirs["correct"])
    assert not mine["kid"].comparable(theirs["kid"])
    assert "memorisation" not in theirs


def test_what_was_scored_is_found_again(known, tmp_path):
    card = known[1].scorecard
    assert Scorecard.model_validate_json(card.model_dump_json()) == card
    known[1].save(str(tmp_path))
    again = Scored.load(str(tmp_path))
    assert again.scorecard == card
    assert again.prompts == PROMPTS
    assert np.array_equal(again.pictures, known[1].pictures)
    assert {scale: len(drawn) for scale, drawn in again.sweep.items()} == {
        1.0: 32,
        2.0: 32,
        6.0: 32,
    }
    assert (
        set(again.per_prompt)
        == set(known[1].per_prompt)
        >= {"correct", "correct_colour", "clip_score", "kid"}
    )
    assert all(
        np.array_equal(again.per_prompt[name], known[1].per_prompt[name])
        for name in again.per_prompt
    )


def test_the_gate_can_decide_on_what_was_scored(known):
    policy = GatePolicy(
        absolute={"correct": 0.9, "correct_unseen": 0.9},
        non_inferior={"correct": 0.1, "kid": Margin(margin=0.1, better="lower", samples=6)},
        facts=(),
        min_samples=48,
        blocks=8,
    )
    poor = scored(Painter(lambda i, guidance: i % 3 == 0), scale=6.0)
    good = known[1].evidence("good")
    assert decide(good, poor.evidence("poor"), policy).promote
    verdict = decide(poor.evidence("poor"), good, policy)
    failed = {check.name for check in verdict.checks if not check.passed}
    assert failed == {"absolute.correct", "absolute.correct_unseen", "non_inferior.correct"}


def test_the_sheets_show_the_first_pictures(known):
    assert known[1].gallery(5).shape == (2 * 34 + 2, 5 * 34 + 2, 3)
    grid = known[1].grid(rows=4)
    assert grid.shape == (4 * 34 + 2, 3 * 34 + 2, 3)
    assert np.array_equal(grid[2:34, 70:102], known[1].pictures[0])


def test_captions_are_judged_by_retrieval():
    config = CONFIG.model_copy(update={"kind": "captions"})
    right = scored(Painter(lambda *_: False), config).scorecard
    assert right.headline["retrieval"] > 0.9
    assert right.headline["retrieval_shuffled"] < 0.1
    assert right.attributes == {}
    assert {"retrieval_seen", "retrieval_unseen", "retrieval_unguided"} <= set(right.headline)


class Losing(Painter):
    def denoising_loss(self, batch, seed):
        return np.asarray(batch["position"]) / 10.0


class Held:
    samples = 50

    def rows(self, indices):
        return {"position": indices, "key": [f"k{i}" for i in indices]}


def test_the_held_out_loss_is_that_of_fixed_samples():
    config = CONFIG.model_copy(update={"heldout_loss_samples": 50, "batch": 7})
    found = scored(Losing(lambda *_: False), config, heldout=Held(), scale=1.0)
    assert found.per_prompt["heldout_loss"].tolist() == [i / 10 for i in range(50)]
    assert found.scorecard.headline["heldout_loss"] == pytest.approx(2.45)


class Baseless(Painter):
    """As a generator whose autoencoder draws alone: nothing of it is a denoiser."""

    def denoising_loss(self, batch, seed):
        return None


@pytest.mark.parametrize("held", [Held(), None])  # promote_model asks a champion about none
def test_with_a_base_and_without_they_are_compared_by_what_both_have(held):
    config = CONFIG.model_copy(update={"heldout_loss_samples": 50, "batch": 7})
    based = scored(Losing(lambda i, _: i % 3 == 0), config, heldout=Held(), scale=1.0)
    baseless = scored(Baseless(lambda *_: False), config, heldout=held, scale=1.0)
    assert "heldout_loss" not in baseless.scorecard.values
    fair = GatePolicy(
        absolute={"legible": 0.9},
        non_inferior={"legible": 0.1, "correct": 0.1},
        facts=(),
        min_samples=48,
        blocks=8,
    )
    good, poor = baseless.evidence("baseless"), based.evidence("based")
    verdict = decide(good, poor, fair)
    assert verdict.promote, verdict.reason
    assert "heldout_loss" not in {it.metric for it in verdict.differences}
    assert {c.name for c in decide(poor, good, fair).checks if not c.passed} == {
        "non_inferior.correct"
    }
    # What only one of them has decides nothing for it: the gate refuses and says whose is missing.
    loss = {"heldout_loss": Margin(margin=9.0, better="lower", samples=48)}
    strict = fair.model_copy(update={"non_inferior": loss})
    for new, old in ((good, poor), (poor, good)):
        verdict = decide(new, old, strict)
        assert not verdict.promote
        assert verdict.reason == (
            f"{new.name} is kept out: non_inferior.heldout_loss: baseless has no value per prompt"
        )


@pytest.mark.parametrize("kind", ["shapes", "captions"])
def test_a_handful_of_prompts_and_pictures_is_scored_too(kind):
    found = score(
        Painter(lambda *_: False),
        CONFIG.model_copy(update={"kind": kind}),
        prompts=PROMPTS[:5],
        clip=Thumbnails(),
        reference=drawn(4, 1),
        train=drawn(3, 2),
    )
    assert found.scorecard.values["kid"].low is None  # one block has no interval
    assert len(found.per_prompt["kid"]) == 1
    assert all(np.isfinite(value) for value in found.scorecard.headline.values())
    assert "Scores" in render(ReportInputs(name="few", scored=found))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="without a truth"):
        score(
            Painter(lambda *_: False),
            CONFIG,
            prompts=[Prompt("x", "seen")] * 20,
            clip=Thumbnails(),
            reference=drawn(96, 1),
        )
    for count, held in ((3, 96), (96, 3)):
        with pytest.raises(ValueError, match="hold out a larger share"):
            score(
                Painter(lambda *_: False),
                CONFIG,
                prompts=PROMPTS[:count],
                clip=Thumbnails(),
                reference=drawn(held, 1),
            )
    with pytest.raises(ValueError, match="guidance_scales"):
        EvaluationConfig(guidance_scales=(-1.0,))


def test_pictures_are_saved_as_they_are_however_they_lie_in_memory(known, tmp_path):
    """A network's pictures are channels first: seen as [n, height, width, 3] they are strided."""
    first = np.ascontiguousarray(known[1].pictures.transpose(0, 3, 1, 2))
    strided = first.transpose(0, 2, 3, 1)
    assert not strided.flags.c_contiguous
    dataclasses.replace(known[1], pictures=strided, unguided=strided, sweep={1.0: strided}).save(
        str(tmp_path)
    )
    again = Scored.load(str(tmp_path))
    for found in (again.pictures, again.unguided, again.sweep[1.0]):
        np.testing.assert_array_equal(found, known[1].pictures)
