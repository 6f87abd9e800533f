"""The whole line as one flow: new data, its stages, the model they make, the gate. To resume, run
it again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from prefect import flow
from prefect.server.api.server import SubprocessASGIServer

from pipeline import storage
from training import results

from . import recipe as recipes
from .ending import end_with_us, leaving_without_goodbyes
from .line import Line
from .parallel import ENDING_SECONDS, train_stages
from .progress import say, seconds
from .promote_model import promote_model
from .recipe import FROZEN
from .score_model import GALLERY, SWEEP, check_held_out, drawn_by, score_model
from .settings import prepare_environment
from .steps import build_dataset, encode_task, train_stage

RUN_RECORD = 1
"""Format of the records of finished runs."""
NOTHING_TO_DO = "nothing changed since this model was made: all of it is already done"


def finished(line: Line) -> dict[str, Any] | None:
    """The result of this very run, if it was made and all of it is still there. Imports nothing
    heavy.
    """
    from pipeline.ingest import unchanged

    record = _record(line)
    if not storage.exists(record):
        return None
    result = storage.read_json(record)
    data = unchanged(
        line.recipe.data.source_urls(line.recipe.seed),
        line.dataset,
        line.rules,
        recipes.scorers(line.recipe),
    )
    if data is None or data.digest != result["data"]["digest"]:
        return None
    trained = [name for name in line.recipe.stages if not line.recipe.stage(name).pretrained]
    if any(results.committed(line.stage_dir(name, data)) is None for name in trained):
        return None
    if not storage.exists(result["report"]) or not storage.exists(result["package"]):
        return None
    serving = line.ledger.champion() == result["model"].removeprefix("models:/")
    return result | {
        "alias": "champion" if serving else None,
        "reused": ["data", *line.recipe.stages, "scores", "verdict"],
    }


def deliver_late(line: Line) -> None:
    """What was tracked of a finished run when MLflow was away, where it can be reached now."""
    from training.tracking import catch_up

    data = line.manifest()
    trained = [name for name in line.recipe.stages if not line.recipe.stage(name).pretrained]
    spools = [line.stage_dir(name, data) / results.TRACKING for name in trained]
    catch_up([*spools, _spool(line)], line.settings.mlflow_uri)


@flow(name="retrain", flow_run_name="retrain {recipe}", log_prints=False)
def retrain(recipe: str = "shapes", overrides: list[str] | None = None) -> dict[str, Any]:
    """Bring a recipe's model up to date with its sources, and promote it if the gate lets it
    through.
    """
    settings = prepare_environment()
    line = Line(recipes.load(recipe, overrides or ()), settings)
    if server := SubprocessASGIServer().server_process:  # of Prefect, as none was named
        # Stages beside each other are still telling it how they ended.
        end_with_us(server, ENDING_SECONDS if line.recipe.parallel > 1 else 0.0)
    if done := finished(line):
        say(NOTHING_TO_DO)
        deliver_late(line)
        return done
    with leaving_without_goodbyes():
        return run_line(line)


def run_line(line: Line) -> dict[str, Any]:
    """The steps in order, each its own flow or task; what is done is found done."""
    started = time.monotonic()
    name, values = line.recipe.name, line.to_json()
    took: dict[str, float] = {}
    reused: list[str] = []

    def step(title: str, result: dict[str, Any], since: float) -> dict[str, Any]:
        took[title] = time.monotonic() - since
        if result.get("reused"):
            reused.append(title)
        say(f"{title:12} {'already done' if result.get('reused') else seconds(took[title])}")
        return result

    with _tracked(line) as run:
        now = time.monotonic()
        step("data", build_dataset(values, name), now)
        data = line.manifest()
        check_held_out(data)

        def train(stages: Sequence[str]) -> None:
            for stage in stages:
                now = time.monotonic()
                step(stage, train_stage(values, stage, run.id()), now)

        def encode(*stages: str) -> None:
            now = time.monotonic()
            encode_task(line, data, stages or None)
            took["encode"] = took.get("encode", 0.0) + time.monotonic() - now

        if line.recipe.parallel > 1:
            with closing(train_stages(line, data, run.id(), encode)) as trained:
                for stage, result, now in trained:
                    step(stage, result, now)
            encode()
        else:
            train([it for it in line.recipe.stages if it in FROZEN])
            encode()
            train([it for it in line.recipe.stages if it not in FROZEN])
        now = time.monotonic()
        scored = step("scores", score_model(values, name), now)
        now = time.monotonic()
        verdict = step("verdict", promote_model(values, name, took, run.id()), now)
        run.log(scored["scorecard"] | {f"seconds.{k}": v for k, v in took.items()}, data.version)
        for picture in (GALLERY, SWEEP):
            run.file(picture, line.model_dir(data) / picture)
        run.file("report.html", verdict["report"])
        promoted = verdict["verdict"]["promote"]
        run.tag({"darkroom.model": verdict["model"], "darkroom.promoted": promoted})
    result = {
        "model": verdict["model"],
        "alias": verdict["alias"],
        "verdict": verdict["verdict"],
        "scorecard": scored["scorecard"],
        "guidance": scored["scale"],
        "options": scored.get("options", {}),
        "report": verdict["report"],
        "package": scored["package"],
        "data": {"dataset": line.dataset, "version": data.version, "digest": data.digest},
        "seconds": time.monotonic() - started,
        "took": took,
        "reused": reused,
    }
    storage.publish_json(_record(line), result)
    return result


def _tracked(line: Line) -> Any:
    """The run in MLflow that the stages' runs are nested in."""
    from training.tracking import FINGERPRINT, Run, flatten

    identity = line.recipe.identity
    return Run.start(
        line.recipe.name,
        f"{line.recipe.name} line",
        uri=line.settings.mlflow_uri,
        spool=_spool(line),
        tags={FINGERPRINT: f"line-{identity}"},
        params=flatten(line.recipe.model_dump(mode="json")),
        artifact_location=line.settings.artifacts,
    )


def _spool(line: Line) -> str:
    return str(line.settings.run_record(line.recipe.identity).with_suffix(".tracking"))


def _record(line: Line) -> str:
    return str(line.settings.run_record(line.recipe.identity))


def _given(package: str) -> dict[str, Any]:
    """What a call of this package needs beside a prompt, as `Generator.given` says it."""
    described = storage.join(package, "generator", "generator.json")
    return storage.read_json(described).get("given", {}) if storage.exists(described) else {}


def _calls(name: str, prompt: str, given: dict[str, Any]) -> list[str]:
    """The commands that draw and edit with a model."""
    labels = [f" --label {it}={them[0]}" for it, them in given.get("labels", {}).items()]
    asked = "".join(labels) + (" --low small.png" if given.get("low") else "")
    edit = [f"darkroom edit {name} --pictures FOLDER --out edited"] if given.get("edit") else []
    return [f'darkroom sample {name} "{prompt}"{asked} --out pictures', *edit]


def summary(line: Line, result: dict[str, Any]) -> str:
    """What was made, where it is, and how to draw with it."""
    card, name = result["scorecard"], line.recipe.name
    verdict = result["verdict"]
    promoted = "in service (alias champion)" if result["alias"] else "not promoted"
    main = "correct" if "correct" in card else "retrieval"
    shown = {k: v for k, v in card.items() if k.startswith(main) and "shuffled" not in k}
    prompt = "a small red circle in the top left corner on a white background"
    if main != "correct":
        prompt = "a smiling face"
    lines = [
        "",
        f"  {result['model']}  {promoted}",
        f"  {verdict['reason']}",
        *([f"  stages  {verdict['change']}"] if verdict.get("change") else []),
        "",
        f"  at {drawn_by(result['guidance'], result.get('options', {}))}: "
        + ", ".join(f"{k} {v:.3f}" for k, v in shown.items()),
        f"  data      {result['data']['dataset']}  version {result['data']['version']}",
        f"  package   {result['package']}",
        f"  report    {result['report']}",
        f"  registry  {line.settings.mlflow_uri}",
    ]
    if result["reused"]:
        lines.append(f"  already done: {', '.join(result['reused'])}")
    calls = _calls(name, prompt, _given(result["package"]))
    lines += ["", *(f"  {it}" for it in calls), ""]
    return "\n".join(lines)
