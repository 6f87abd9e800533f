"""The gate: a candidate goes into service if it is good enough, and no worse than who serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from pipeline import storage
from pipeline.manifest import Manifest
from training import results

from .ending import leaving_without_goodbyes
from .line import Line
from .recipe import FROZEN
from .score_model import (
    CANDIDATE,
    GENERATOR,
    SCORES,
    Question,
    ask,
    heldout_loader,
    heldout_pictures,
    lineage,
    pictured,
    score_candidate,
)

if TYPE_CHECKING:
    from evaluation.gate import Verdict
    from evaluation.ledger import Entry
    from evaluation.scorecard import Scored

REPORT = "report.html"
UNREADY = "`darkroom encode` with the recipe of the model makes what scoring reads: run it first"
SHOWN = 6
"""Prompts and pictures with which the report shows what else a model does."""


@dataclass(frozen=True)
class Decision:
    """A verdict, and the scores it rests on."""

    verdict: Verdict
    candidate: Scored
    champion: Scored | None


def register_candidate(line: Line, data: Manifest, run_id: str | None = None) -> str:
    """The candidate as the ledger calls it (`shapes/3`), registered if it was not."""
    from evaluation import registry

    scored, _ = score_candidate(line, data)
    made_of = registry.stages(scored["package"])
    version = registry.register(
        scored["package"],
        line.recipe.name,
        tracking_uri=line.settings.mlflow_uri,
        run_id=run_id,
        artifact_location=line.settings.artifacts,
        tags={"darkroom.data": data.digest, "darkroom.recipe": line.recipe.identity}
        | {f"darkroom.stage.{stage}": named for stage, named in made_of.items()},
    )
    name = registry.candidate(line.recipe.name, version)
    line.note_version(name, {stage: line.source(stage, data) for stage in line.recipe.stages})
    return name


def decide(line: Line, data: Manifest, name: str, champion: str | None) -> Decision:
    """The gate's verdict on a registered version. Against a champion both are scored anew, in this
    run. ValueError where what that reads is not there.
    """
    from evaluation import gate, registry

    uri = line.settings.mlflow_uri
    facts = registry.facts(name, tracking_uri=uri)
    before = None
    if champion is None or champion == name:
        scored = _as_scored(line, data, name) or _anew(line, _question(line, data), name)
    else:
        question = _question(line, data)
        scored = _anew(line, question, name)
        if not _reads_alike(*(registry.stages(it, tracking_uri=uri) for it in (name, champion))):
            # What the candidate's encoders made is nothing that the champion has learnt to read.
            question = replace(question, heldout=None)
        before = _anew(line, question, champion)
    mine = registry.stages(name, tracking_uri=uri)
    evidence = None
    if before and champion:
        theirs = registry.stages(champion, tracking_uri=uri)
        evidence = before.evidence(champion, stages=theirs)
    verdict = gate.decide(scored.evidence(name, facts, mine), evidence, line.recipe.gate)
    return Decision(verdict, scored, before)


def settle(line: Line, data: Manifest, name: str) -> tuple[Entry, Decision]:
    """Decide, write the ledger, then the aliases; another promotion in between means deciding
    again.
    """
    from evaluation import registry
    from evaluation.ledger import Entry

    decisions: list[Decision] = []

    def decided(champion: str | None) -> Entry:
        decisions.append(decide(line, data, name, champion))
        verdict = decisions[-1].verdict
        kind = "promote" if verdict.promote else "reject"
        return Entry(kind=kind, candidate=name, verdict=verdict.model_dump(mode="json"))

    uri = line.settings.mlflow_uri
    entry = registry.settle(line.ledger, decided, tracking_uri=uri)
    verdict = decisions[-1].verdict
    if verdict.champion:
        told = {
            "darkroom.compared_with": verdict.champion,
            "darkroom.new_stages": ", ".join(verdict.replaced),
            "darkroom.shared_stages": ", ".join(verdict.shared),
        }
        registry.tag(name, told, tracking_uri=uri)
    return entry, decisions[-1]


def decided_before(line: Line, name: str) -> Entry | None:
    """The newest entry about a version, which makes asking again a no-op; None without one, or
    where another policy than the recipe's now kept it out.
    """
    entry = next((e for e in reversed(line.ledger.entries()) if e.candidate == name), None)
    if entry is None or entry.kind != "reject":
        return entry
    policy = (entry.verdict or {}).get("policy")  # the first entries did not say
    return entry if not policy or policy == line.recipe.gate.identity else None


def write_report(
    line: Line, data: Manifest, name: str, decision: Decision, seconds: Mapping[str, float]
) -> Path:
    """The page that shows the model, in its directory."""
    from evaluation import report
    from evaluation.given import Given
    from evaluation.techniques import techniques
    from training.generator import Generator

    path = line.model_dir(data) / REPORT
    stages = [
        report.StageStory.of(stage, line.stage_dir(stage, data))
        for stage in line.recipe.stages
        if not line.recipe.stage(stage).pretrained
    ]
    scored = _as_scored(line, data, name) or decision.candidate
    asked = scored.prompts[:SHOWN]
    shown = [prompt.text for prompt in asked]
    pictures = heldout_pictures(line, data, SHOWN)
    generator = Generator.load(line.model_dir(data) / GENERATOR)
    given = Given.of(generator, asked, pictured(line, data))
    inputs = report.ReportInputs(
        name=line.recipe.name,
        version=name.rpartition("/")[2],
        scored=scored,
        techniques=techniques(
            generator,
            shown,
            pictures,
            line.recipe.evaluation.seed,
            given,
            heldout_loader(line, data),
        ),
        verdict=decision.verdict,
        champion=decision.champion,
        stages=stages,
        data=report.DataStory.of(data),
        seconds=seconds,
        lineage=lineage(line, data, scored.scorecard),
        recipe=line.recipe.model_dump(mode="json"),
        created=datetime.now(UTC),
    )
    report.write(path, inputs)
    return path


@flow(name="promote-model", flow_run_name="promote {name}")
def promote_model(
    line: dict[str, Any],
    name: str,
    seconds: dict[str, float] | None = None,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Register the line's newest model and put it through the gate; leaves the verdict as an
    artifact.
    """
    it = Line.from_json(line)
    data = it.manifest()
    with leaving_without_goodbyes():
        candidate = register_candidate(it, data, run_id)
        known = decided_before(it, candidate)
        if known is None:
            entry, decision = settle(it, data, candidate)
            write_report(it, data, candidate, decision, seconds or {})
        else:
            entry = known
    create_markdown_artifact(_story(entry), key=f"{it.slug}-verdict")
    return {
        "model": f"models:/{candidate}",
        "alias": "champion" if it.ledger.champion() == candidate else None,
        "verdict": {"promote": entry.kind == "promote", **_brief(entry)},
        "report": str(it.model_dir(data) / REPORT),
        "reused": known is not None,
    }


def _reads_alike(mine: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Whether two models' bases are shown the same encodings."""
    encoders = all(mine.get(name) == theirs.get(name) for name in FROZEN)
    return encoders and ("base" in mine) == ("base" in theirs)


def _question(line: Line, data: Manifest) -> Question:
    for stage in line.recipe.stages:
        if stage in FROZEN and not line.recipe.stage(stage).pretrained:
            where = line.stage_dir(stage, data)
            if results.committed(where) is None:
                raise ValueError(f"{line.recipe.name}: no {stage} is trained in {where}; {UNREADY}")
    try:
        return ask(line, data)
    except FileNotFoundError as error:
        raise ValueError(f"{data.dataset}, version {data.version}: {error}; {UNREADY}") from error


def _anew(line: Line, question: Question, name: str) -> Scored:
    from evaluation import registry

    generator = registry.load(name, tracking_uri=line.settings.mlflow_uri)
    try:
        return question.score(line, generator, f"score {name}", generator.defaults["guidance"])
    except FileNotFoundError as error:
        raise ValueError(f"{name}: {error}; {UNREADY}") from error


def _as_scored(line: Line, data: Manifest, name: str) -> Scored | None:
    """The scores that a registered version got on this data when it was made; None where it was
    made of other data, or of stages that were trained anew since.
    """
    from evaluation import registry
    from evaluation.packaging import MANIFEST
    from evaluation.scorecard import Scored

    record = line.model_dir(data) / CANDIDATE
    if not record.exists():
        return None
    folder, _ = registry.locate(name, tracking_uri=line.settings.mlflow_uri)
    identity = storage.read_json(str(folder / MANIFEST))["package"]
    # A package's folder is named after its identity.
    if not identity.startswith(Path(storage.read_json(str(record))["package"]).name):
        return None
    return Scored.load(str(line.model_dir(data) / SCORES))


def _verdict(entry: Entry) -> Verdict | None:
    from evaluation.gate import Verdict

    return Verdict.model_validate(entry.verdict) if entry.verdict else None


def _brief(entry: Entry) -> dict[str, Any]:
    verdict = _verdict(entry)
    if verdict is None:
        return {"reason": "", "first": False}
    brief = {"reason": verdict.reason, "first": verdict.first}
    if verdict.stages:
        brief |= {"change": verdict.change, "new": verdict.replaced, "shared": verdict.shared}
    return brief


def _story(entry: Entry) -> str:
    lines, verdict = [f"## {entry.kind}: {entry.candidate}", ""], _verdict(entry)
    if verdict is None:
        return "\n".join(lines)
    lines += [verdict.reason, "", "| check | passed | why |", "|-|-|-|"]
    lines += [f"| {c.name} | {'yes' if c.passed else 'NO'} | {c.why} |" for c in verdict.checks]
    if verdict.stages:
        lines += ["", f"Stages: {verdict.change}.", ""]
        lines += [f"| metric | this | {verdict.champion} | difference | 95 % |", "|-|-|-|-|-|"]
        lines += [
            f"| {d.metric} | {d.candidate:.4g} | {d.champion:.4g} | {d.mean:+.4g} | "
            + ("" if d.low is None else f"{d.low:+.4g} to {d.high:+.4g}")
            + " |"
            for d in verdict.differences
        ]
    return "\n".join(lines)
