"""Against whom a candidate is held, and on what."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation import registry
from evaluation.gate import Evidence, decide
from evaluation.ledger import Entry, Kind
from evaluation.scorecard import Scored
from flows import promote_model
from flows.line import Line
from flows.promote_model import _reads_alike
from flows.recipe import load
from flows.score_model import Question
from flows.settings import Settings
from pipeline import manifest
from pipeline.manifest import Manifest, Shard

MADE_OF = {"autoencoder": "autoencoder-1", "clip": "clip-1", "t5": "t5-1", "base": "base-1"}
ALONE = {"autoencoder": "autoencoder-1", "clip": "clip-1"}
"""Of what a model without a base is made."""


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"base": "base-2"}, True),
        ({"sr1": "sr1-1"}, True),
        ({"clip": "clip-2"}, False),
        ({"autoencoder": "autoencoder-2"}, False),
        ({"t5": None}, False),  # nobody listens to it any more
        ({"base": None}, False),  # the autoencoder draws alone
    ],
)
def test_a_champion_is_asked_about_held_out_encodings_that_it_can_read(change, alike):
    changed = {name: it for name, it in (MADE_OF | change).items() if it}
    assert _reads_alike(MADE_OF, changed) == alike
    assert _reads_alike(changed, MADE_OF) == alike


def test_who_was_kept_out_is_judged_again_by_another_policy(tmp_path):
    strict, mild = (
        Line(load("shapes", [f"gate.absolute.correct={least}"]), Settings(tmp_path, "sqlite://"))
        for least in (0.9, 0.5)
    )
    evidence = Evidence(
        values={"correct": 0.7}, facts=dict.fromkeys(("integrity", "lineage", "infra"), True)
    )
    kinds: tuple[tuple[Line, Kind], ...] = ((strict, "reject"), (mild, "promote"))
    for line, kind in kinds:
        assert promote_model.decided_before(line, "shapes/1") is None
        verdict = decide(evidence, None, line.recipe.gate)
        assert ("promote" if verdict.promote else "reject") == kind
        told = verdict.model_dump(mode="json")
        entry = Entry(kind=kind, candidate="shapes/1", verdict=told)
        entry = line.ledger.settle(lambda _, it=entry: it)
        assert promote_model.decided_before(line, "shapes/1") == entry
    kept = promote_model.decided_before(strict, "shapes/1")
    assert kept is not None and kept.kind == "promote", "who serves, serves"


class Scores:
    """Of a model that is legible in all pictures, and has a held-out loss where it was asked."""

    def __init__(self, asked: bool):
        self.asked = asked

    def evidence(self, name, facts=None, stages=None):
        rows = np.ones(120)
        samples = {"legible": rows, **({"heldout_loss": rows} if self.asked else {})}
        return Evidence(
            name=name,
            values=dict.fromkeys(samples, 1.0),
            samples=samples,
            tuples=dict.fromkeys(samples, "alike"),
            pairs="the same",
            facts=facts or {},
            stages=stages or {},
        )


@pytest.mark.parametrize(("mine", "theirs"), [(ALONE, MADE_OF), (MADE_OF, ALONE)])
@pytest.mark.parametrize("metric", ["legible", "heldout_loss"])
def test_with_a_base_and_without_are_compared_by_pictures_alone(
    tmp_path, monkeypatch, mine, theirs, metric
):
    """No base is asked about what another kind of model's encoders made; a policy that wants to
    compare the answers keeps the candidate out, and says why."""
    words = [f'gate={{"absolute": {{"legible": 0.5}}, "non_inferior": {{"{metric}": 0.1}}}}']
    if "base" not in mine:
        words += ["base=null"]
    line = Line(load("shapes", words), Settings(tmp_path, "sqlite://"))
    made_of, asked = {"shapes/2": mine, "shapes/1": theirs}, {}

    def score(question, line, generator, title, scale):
        asked[generator.name] = question.heldout is not None
        return Scores(question.heldout is not None and "base" in made_of[generator.name])

    question = Question([], None, None, None, "encodings", None)  # pyright: ignore
    monkeypatch.setattr(promote_model, "_question", lambda *_: question)
    monkeypatch.setattr(Question, "score", score)
    monkeypatch.setattr(registry, "stages", lambda name, tracking_uri: made_of[name])
    monkeypatch.setattr(
        registry,
        "load",
        lambda name, tracking_uri: SimpleNamespace(name=name, defaults={"guidance": 1.0}),
    )
    holds = dict.fromkeys(("integrity", "lineage", "infra"), True)
    monkeypatch.setattr(registry, "facts", lambda name, tracking_uri: holds)
    verdict = promote_model.decide(line, None, "shapes/2", "shapes/1").verdict  # pyright: ignore
    assert asked == {"shapes/2": True, "shapes/1": False}
    assert verdict.promote == (metric == "legible")
    if metric == "heldout_loss":
        lacking = "shapes/1" if "base" in mine else "shapes/2"
        assert f"{lacking} has no value per prompt" in verdict.reason
    assert not {it.name for it in verdict.stages if it.name == "base" and it.shared}


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> tuple[Line, Manifest]:
    """A line with data, of which two packages are registered: shapes/1 and shapes/2."""
    line = Line(load("shapes", ['gate={"absolute": {"legible": 0.5}}']), Settings(tmp_path, ""))
    shard = Shard("train-000000", "train", 4, 100, "0" * 64)
    manifest.publish(Manifest(line.dataset, 1, None, (shard,)))
    for number in "12":
        folder = tmp_path / f"shapes/{number}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"package": number * 64}))
    monkeypatch.setattr(registry, "locate", lambda name, tracking_uri: (tmp_path / name, None))
    monkeypatch.setattr(registry, "stages", lambda name, tracking_uri: MADE_OF)
    holds = dict.fromkeys(("integrity", "lineage", "infra"), True)
    monkeypatch.setattr(registry, "facts", lambda name, tracking_uri: holds)
    return line, line.manifest()


@pytest.mark.parametrize("champion", [None, "self"])
def test_a_version_is_judged_by_scores_of_its_own(shapes, monkeypatch, champion):
    """Those that lie where the newest data's model does may be of another, or not be there."""
    line, data = shapes
    stored, anew = Scores(asked=False), Scores(asked=False)
    monkeypatch.setattr(Scored, "load", lambda url: stored)
    monkeypatch.setattr(promote_model, "_question", lambda *_: None)
    monkeypatch.setattr(promote_model, "_anew", lambda *_: anew)

    def scored(name: str):
        return promote_model.decide(line, data, name, champion and name).candidate

    assert scored("shapes/1") is anew, "nothing was scored here"
    folder = line.model_dir(data)
    folder.mkdir(parents=True)
    said = {"package": f"/where/the/home/was/package/{'1' * 16}"}
    (folder / "candidate.json").write_text(json.dumps(said))
    assert scored("shapes/1") is stored
    assert scored("shapes/2") is anew


def test_what_cannot_be_scored_anew_says_what_to_do(shapes, monkeypatch):
    line, data = shapes
    with pytest.raises(ValueError, match="no autoencoder is trained in .*`darkroom encode` with"):
        promote_model.decide(line, data, "shapes/1", None)

    def ask(*_):
        raise FileNotFoundError("train-000001.safetensors")

    monkeypatch.setattr(promote_model, "ask", ask)
    monkeypatch.setattr(promote_model.results, "committed", lambda _: {})
    told = "version 1: train-000001.safetensors; `darkroom encode` with"
    with pytest.raises(ValueError, match=told):
        promote_model.decide(line, data, "shapes/1", "shapes/2")
