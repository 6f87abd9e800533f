"""A gate lets a model that sits at the margin through at most 5 % of the time."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from evaluation.gate import Bound, Evidence, GatePolicy, Margin, Verdict, decide
from evaluation.metrics import paired_difference

FACTS = {"integrity": True, "lineage": True, "infra": True}
POLICY = GatePolicy(absolute={"correct": 0.9}, non_inferior={"correct": 0.02})


def evidence(correct, name="candidate", **changes):
    values = {"correct": float(np.mean(correct))}
    return Evidence(
        **{
            "name": name,
            "values": values,
            "samples": {"correct": correct},
            "facts": FACTS,
            "pairs": "512 prompts",
            "tuples": {"correct": "oracle"},
        }
        | changes
    )


def right(share, count=512, seed=0):
    return np.random.default_rng(seed).random(count) < share


def test_the_first_model_needs_the_absolute_bounds_alone():
    verdict = decide(evidence(right(0.95)), None, POLICY)
    assert verdict.promote
    assert verdict.first
    assert [check.name for check in verdict.checks] == [
        "facts.integrity",
        "facts.lineage",
        "facts.infra",
        "absolute.correct",
    ]
    assert verdict.reason == "candidate is the first model and passed all 4 checks"
    low = decide(evidence(right(0.85)), None, POLICY)
    assert not low.promote
    assert low.checks[-1].wanted == 0.9
    assert low.reason.startswith("candidate is kept out: absolute.correct: 0.8")
    assert Verdict.model_validate_json(low.model_dump_json()) == low


def test_the_same_model_again_and_a_better_one_pass_and_a_worse_one_does_not():
    champion = evidence(right(0.95), "champion")
    assert decide(evidence(right(0.95)), champion, POLICY).promote
    assert decide(evidence(np.ones(512)), champion, POLICY).promote
    worse = right(0.95) & right(0.975, seed=1)
    verdict = decide(evidence(worse), champion, POLICY)
    assert not verdict.promote
    assert verdict.champion == "champion"
    assert verdict.reason.startswith("candidate is kept out: non_inferior.correct: better by -0.0")


def test_plain_mappings_do():
    plain = {
        "values": {"correct": 1.0},
        "samples": {"correct": [1.0] * 200},
        "facts": dict(FACTS),
    }
    assert decide(plain, None, POLICY).promote
    assert decide(plain, plain, POLICY).promote


BROKEN = {
    "no value": ({"values": {}}, "absolute.correct: was not measured"),
    "NaN": ({"values": {"correct": np.nan}}, "absolute.correct: is nan"),
    "infinite": ({"values": {"correct": np.inf}}, "absolute.correct: is inf"),
    "no samples": ({"samples": {}}, "non_inferior.correct: candidate has no value per prompt"),
    "too few": ({"samples": {"correct": [1.0] * 99}}, "has 99 samples, wanted 100 or more"),
    "empty": ({"samples": {"correct": []}}, "has 0 samples"),
    "a NaN sample": (
        {"samples": {"correct": [1.0] * 511 + [np.nan]}},
        "has 1 samples that are NaN or infinite",
    ),
    "other prompts": (
        {"samples": {"correct": [1.0] * 300}},
        "300 prompts of candidate do not pair",
    ),
    "other seeds": ({"samples": {"correct": np.ones((512, 2))}}, "do not pair"),
    "other pairs": ({"pairs": "others"}, "not measured alike: candidate by others, oracle"),
    "another measure": ({"tuples": {"correct": "clip"}}, "not measured alike"),
    "a fact missing": ({"facts": {"integrity": True}}, "facts.lineage: was not checked"),
    "a fact false": ({"facts": FACTS | {"infra": False}}, "facts.infra: does not hold"),
    "a fact refuted": ({"facts": FACTS | {"infra": "other picture"}}, "facts.infra: other picture"),
    "one more fact": ({"facts": FACTS | {"speed": "late"}}, "facts.speed: late"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_missing_or_odd_does_not_pass(changes, message):
    champion = evidence(np.ones(512), "champion")
    assert decide(evidence(np.ones(512)), champion, POLICY).promote
    verdict = decide(evidence(np.ones(512), **changes), champion, POLICY)
    assert not verdict.promote
    assert message in verdict.reason
    assert "NaN" not in json.dumps(verdict.model_dump(), allow_nan=False).split('"why"')[0]


def test_a_champion_without_samples_is_not_beaten_by_default():
    champion = evidence(np.ones(512), "champion", samples={})
    verdict = decide(evidence(np.ones(512)), champion, POLICY)
    assert "champion has no value per prompt" in verdict.reason


def test_a_bound_may_want_other_samples_than_the_policy():
    kid = {"values": {"kid": 0.01}, "samples": {"kid": [0.01] * 16}}
    for samples, passes in ((None, False), (16, True), (17, False)):
        policy = GatePolicy(absolute={"kid": Bound(at_most=0.05, samples=samples)}, facts=())
        assert decide(kid, None, policy).promote == passes


def test_ceilings_and_metrics_where_less_is_better():
    policy = GatePolicy(
        absolute={"seconds": Bound(at_most=2), "guidance": Bound(at_least=1, at_most=9)},
        non_inferior={"loss": Margin(margin=0.01, better="lower")},
        facts=(),
    )

    def loss(shift, seconds=1.0, guidance=3.0):
        noise = np.random.default_rng(0).normal(0, 0.02, 400)
        return {
            "values": {"seconds": seconds, "guidance": guidance},
            "samples": {"loss": 0.5 + shift + noise * (shift != 0)},
        }

    assert decide(loss(-0.05), loss(0), policy).promote
    assert decide(loss(0), loss(0), policy).promote
    assert not decide(loss(0.02), loss(0), policy).promote
    late = decide(loss(0, seconds=3), loss(0), policy)
    assert late.reason == "candidate is kept out: absolute.seconds: 3, wanted at most 2"
    assert not decide(loss(0, guidance=10), None, policy).promote
    assert not decide(loss(0, guidance=0), None, policy).promote


def test_superior_asks_for_more_than_equal():
    policy = GatePolicy(absolute={"score": 0}, superior={"score": 0}, facts=())

    def score(shift, seed=0):
        x = np.random.default_rng(seed).normal(shift, 1, 400)
        return {"values": {"score": 1.0}, "samples": {"score": x}}

    assert not decide(score(0), score(0), policy).promote
    by_more = GatePolicy(absolute={"score": 0}, superior={"score": 0.02}, facts=())
    assert not decide(score(0.01), score(0), by_more).promote
    assert decide(score(1), score(0, seed=1), policy).promote


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"absolute": {"x": {}}}, "a bound needs at_least or at_most"),
        ({"non_inferior": {"x": 0}}, "a margin of 0 asks for superior.x=0"),
        ({"non_inferior": {"x": -1}}, "greater than or equal to 0"),
        ({"facts": ()}, "would promote any first model"),
        ({"floors": {}}, "Extra inputs are not permitted"),
        ({"confidence": 95}, "less than 1"),
    ],
)
def test_policies_that_mean_nothing_are_refused(policy, message):
    with pytest.raises(ValidationError, match=message):
        GatePolicy(**policy)


def test_a_policy_is_json():
    policy = GatePolicy(absolute={"a": 1, "b": Bound(at_most=2)}, non_inferior={"c": 0.5})
    assert GatePolicy.model_validate_json(policy.model_dump_json()) == policy


def at_margin_normal(rng, margin):
    """Scores that vary much from prompt to prompt and little from model to model."""
    prompt = rng.normal(0, 5, 200)
    return prompt + rng.normal(-margin, 1, 200), prompt + rng.normal(0, 1, 200)


def at_margin_skewed(count, share):
    """Most pictures stay as they are, some get much worse."""

    def pair(rng, margin):
        loss = rng.exponential(margin / share, count) * (rng.random(count) < share)
        return -loss, np.zeros(count)

    return pair


def at_margin_rare(count):
    """Right or wrong: the candidate only ever loses, one prompt in 1 / margin."""

    def pair(rng, margin):
        return (rng.random(count) >= margin).astype(float), np.ones(count)

    return pair


def at_margin_both_ways(rng, margin):
    old = rng.random(400) < 0.92
    gained, lost = rng.random(400) < 0.3, rng.random(400) < (0.08 * 0.3 + margin) / 0.92
    return np.where(old, ~lost, gained).astype(float), old.astype(float)


def at_margin_seeds(rng, margin):
    """Four seeds of a prompt fail together."""
    lost = np.repeat((rng.random(200) < margin)[:, None], 4, 1)
    return 1.0 - lost, np.ones((200, 4))


def scored(samples):
    return Evidence(samples={"score": samples}, facts=FACTS)


@pytest.mark.parametrize(
    ("pair", "margin"),
    [
        (at_margin_normal, 0.1),
        *((at_margin_skewed(*shape), 0.1) for shape in ((100, 0.2), (300, 0.2), (300, 0.05))),
        *((at_margin_rare(count), 0.02) for count in (100, 130, 200, 400, 1000)),
        (at_margin_rare(100), 0.1),
        (at_margin_both_ways, 0.02),
        (at_margin_seeds, 0.02),
    ],
)
def test_a_model_at_the_margin_passes_at_most_one_time_in_twenty(pair, margin):
    """Promise 7, simulated; the tolerance is three standard errors of the simulation."""
    rng, runs = np.random.default_rng(0), 1500
    policy = GatePolicy(non_inferior={"score": margin})
    passed = 0
    for _ in range(runs):
        new, old = pair(rng, margin)
        passed += decide(scored(new), scored(old), policy).promote
    assert passed / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_a_model_that_is_as_good_passes_nearly_always():
    """The gate has power: 512 prompts suffice for 3 % where one picture in 50 changes."""
    rng, policy = np.random.default_rng(0), GatePolicy(non_inferior={"score": 0.03})
    passed = 0
    for _ in range(300):
        draw = rng.random(512)
        old, new = draw >= 0.01, (draw < 0.01) | (draw >= 0.02)
        passed += decide(scored(new), scored(old), policy).promote
    assert passed >= 290


def test_a_verdict_says_which_stages_are_new_and_what_that_changed():
    made = {"t5": "t5-1", "base": "base-1", "sr1": "sr1-1", "sr2": "sr2-1"}
    old, new = right(0.9), right(0.95, seed=1)
    more = {"fid": 3.0, "speed": 9.0}
    tuples = {"correct": "oracle", "fid": "clip", "speed": "here"}
    values = {"correct": float(old.mean())} | more
    champion = evidence(old, "shapes/1", stages=made, values=values, tuples=tuples)
    mine = {"t5": "t5-1", "base": "base-1", "sr1": "sr1-2", "prior": "prior-1"}
    values = {"correct": float(new.mean()), "fid": 2.5, "speed": 8.0, "unknown": 1.0}
    elsewhere = tuples | {"speed": "elsewhere"}
    candidate = evidence(new, "shapes/2", stages=mine, values=values, tuples=elsewhere)
    verdict = decide(candidate, champion, POLICY)
    assert verdict.shared == ["t5", "base"]
    assert verdict.replaced == ["sr1", "prior", "sr2"]
    assert verdict.change == "new: sr1, prior; gone: sr2; as in shapes/1: t5, base"
    correct, fid = verdict.differences  # what was measured otherwise is no difference
    found = paired_difference(new, old, POLICY.blocks)
    assert correct.pairs == 512
    assert (correct.candidate, correct.champion) == (new.mean(), old.mean())
    assert correct.mean == pytest.approx(new.mean() - old.mean())
    assert correct.high - correct.low == pytest.approx(found.high - found.low)
    assert (fid.metric, fid.mean, fid.low, fid.pairs) == ("fid", -0.5, None, 0)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict

    again = decide(candidate, evidence(new, "shapes/2b", stages=mine), POLICY)
    assert again.change == "no stage is new: all are those of shapes/2b"
    assert decide(candidate, None, POLICY).change == ""
    assert decide(candidate, None, POLICY).differences == ()
    others = evidence(new, "shapes/3", stages=mine, pairs="other prompts")
    assert decide(candidate, others, POLICY).differences == ()
