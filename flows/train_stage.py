"""One stage of a model: a job description made from the recipe, handed to training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import manifest, storage
from pipeline.encode import pixels_spec
from pipeline.manifest import Manifest
from pipeline.schema import EncoderSpec, framing
from training import results
from training.resuming import learning
from training.starting import Start

from . import ending
from .build_dataset import encoder_specs
from .cluster import ray_session
from .line import Line
from .progress import meter, say
from .recipe import DENOISING, kind_of

MLFLOW_SECONDS = 5.0
"""How long who ends because a training hangs waits for MLflow to know it."""


def encodings(line: Line, name: str, data: Manifest) -> list[EncoderSpec]:
    """What a stage's batches are made of, beside captions."""
    if name in DENOISING:
        return encoder_specs(line, data, name)
    return [] if name == "t5" else [pixels_spec(line.recipe.data.side)]


def make_job(line: Line, name: str, data: Manifest) -> Any:
    """The job of a stage. One that was started before keeps its description, and with it its
    parent, but for what changes no result: that is as asked now.
    """
    from training.job import Job

    output = str(line.stage_dir(name, data))
    begun = storage.join(output, results.JOB)
    if storage.exists(begun):
        job = Job.from_json(results.moved(output, storage.read_json(begun)))
        asked = line.recipe.stage(name).training
        changed = {key: value for key, value in asked.items() if key not in learning(asked)}
        return replace(job, output=output, training=learning(job.training) | changed)
    stage, specs = line.recipe.stage(name), encodings(line, name, data)
    parent = line.parent(name, data, {it.name: it.fingerprint for it in specs})
    warm = {"images": stage.warm_images} if parent and stage.warm_images else {}
    return Job(
        kind=kind_of(name),
        fingerprint=line.stage_identity(name, data),
        config=stage.config,
        training=stage.training | warm,
        dataset=line.dataset,
        version=data.version,
        encodings=tuple(
            {"name": spec.name, "kind": spec.kind, "fingerprint": spec.fingerprint}
            | framing(spec.side, spec.buckets, spec.flip)
            | ({"side": spec.side} if spec.buckets else {})
            | ({} if (p := spec.options.get("precision", "fp32")) == "fp32" else {"precision": p})
            for spec in specs
        ),
        inputs={needed: line.source(needed, data) for needed in line.recipe.inputs(name)},
        output=output,
        parent=parent or line.warm_start(name),
        seed=line.recipe.seed,
        meta={"recipe": line.recipe.name, "lineage": line.stage_lineage(name, data)},
    )


def begun_otherwise(line: Line, name: str, job: Any) -> str | None:
    """What to say before a stage is trained from nothing, of one that was begun for the same
    recipe and the same network and is not finished: another key decides another result.
    """
    from training.job import changes

    if storage.exists(storage.join(job.output, results.JOB)):
        return None  # this one goes on
    found: list[tuple[list[str], str]] = []
    for path in sorted(Path(job.output).parent.glob(f"{name}-*/{results.JOB}")):
        begun = results.moved(path.parent, storage.read_json(str(path)))
        same = all(begun["meta"].get(key) == job.meta[key] for key in ("recipe", "lineage"))
        aside = begun["fingerprint"] != path.parent.name  # by --fresh
        if same and not aside and results.committed(path.parent) is None:
            found.append((changes(_of_version(line, begun, job), job), str(path.parent)))
    if not found:
        return None
    changed, folder = min(found, key=lambda it: len(it[0]))
    return (
        f"{name}: {'; '.join(changed)}: trained anew; the begun training lies in {folder}, and "
        "goes on where it is asked for as it was begun"
    )


def warmed_otherwise(line: Line, name: str, begun: Mapping[str, Any]) -> str | None:
    """What to say of a stage, by its job.json or stage.json, that began with a champion's weights
    for other images than asked now. No identity holds `warm_images`: whether they count is decided
    by who is champion when it begins.
    """
    stage = line.recipe.stage(name)
    had, full = begun["training"].get("images"), stage.training.get("images")
    asked = stage.warm_images or full
    # The model that a recipe names for the first weights is gone on from for all images.
    if not begun.get("parent") or had == asked or (stage.warm_start and had == full):
        return None
    return (
        f"{name}.warm_images: begun with {had}, asked {asked}: it stays as it was begun; `--fresh` "
        "trains it anew"
    )


def _of_version(line: Line, begun: dict[str, Any], job: Any) -> dict[str, Any]:
    """A begun job as one of this job's version, where both versions hold the same shards."""
    if begun["dataset"] != job.dataset or begun["version"] not in manifest.versions(job.dataset):
        return begun
    one, other = (manifest.read(job.dataset, it).digest for it in (begun["version"], job.version))
    return begun | {"version": job.version} if one == other else begun


def train(
    line: Line,
    name: str,
    data: Manifest,
    parent_run: str | None = None,
    start: Start | None = None,
) -> tuple[dict[str, Any], bool]:
    """(the stage's stage.json, whether it was there already). A pretrained stage has nothing to
    train. What the first update took to come, since `start`, is said at the first log point.
    """
    start = start or Start()
    if line.recipe.stage(name).pretrained:
        return {"kind": name, "pretrained": line.recipe.stage(name).pretrained}, True
    if done := line.result(name, data):
        from training.tracking import catch_up

        # Of what was tracked when MLflow was away until the end, and longer.
        catch_up([line.stage_dir(name, data) / results.TRACKING], line.settings.mlflow_uri)
        if told := warmed_otherwise(line, name, done):
            say(told)
        return done, True
    from training.distributed import fit
    from training.tracking import FINGERPRINT, Run

    job = make_job(line, name, data)
    if told := begun_otherwise(line, name, job) or warmed_otherwise(line, name, job.to_json()):
        say(told)
    training = job.training_config()
    run = Run.start(
        line.recipe.name,
        name,
        uri=line.settings.mlflow_uri,
        spool=storage.join(job.output, results.TRACKING),
        parent_run_id=parent_run,
        tags={
            FINGERPRINT: job.fingerprint,
            "darkroom.stage": name,
            "darkroom.data": data.digest,
            # A tag, for it may change: versions of one digest hold the same shards.
            "darkroom.data_version": data.version,
        },
        params={"config": job.config, "training": job.training},
        artifact_location=line.settings.artifacts,
    )
    between = "Ray and its workers" if training.workers > 1 else "directory"
    start.done("job")
    hung = ending.at_the_end(partial(run.finish, "FAILED", MLFLOW_SECONDS))
    with ray_session(training.workers > 1), meter(f"train {name}") as progress, run, hung:
        newest: dict[str, float | None] = {}

        def show(record: dict[str, Any]) -> None:
            if not newest and (took := start.told(job.output, between)):
                say(f"{name}: {took}")
            newest.update(record)
            progress(record["images_seen"], int(training.images), note(newest))
            run.log(record, record["images_seen"])
            _log_previews(run, job.output)

        stage = fit(job, show, on_hang=ending.response(job.output))
        _log_previews(run, job.output)
        # By a name of their own: the last updates had a loss and an accuracy, too.
        run.log({"measured": stage["measured"]}, stage["images_seen"])
        run.dict("stage.json", stage)
        preview = line.stage_dir(name, data) / results.PREVIEW
        if preview.exists():
            run.file(results.PREVIEW, preview)
    return stage, False


def note(record: dict[str, Any]) -> str:
    """What the progress line says of the newest records together."""
    loss, unseen = record["loss"], record.get("heldout_loss")
    # None where every update since the record before was skipped
    said = ["updates skipped" if loss is None else f"loss {loss:.4f}"]
    said += [] if unseen is None else [f"held out {unseen:.4f}"]
    return ", ".join([*said, f"{record['images_per_second']:.0f} images/s"])


def _log_previews(run: Any, stage_dir: str) -> None:
    """Those that are new."""
    for path in sorted(Path(stage_dir, results.PREVIEWS).glob("[0-9]*.png")):
        run.image("preview", path, int(path.stem))
