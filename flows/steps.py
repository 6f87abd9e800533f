"""A line's steps as Prefect runs and shows them. What they do are functions of other modules, which
a command calls that trains one stage: to import Prefect for that takes a second or more.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from prefect import flow, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from pipeline.ingest import IngestResult
from pipeline.manifest import Manifest
from training import results

from .build_dataset import encode_pixels, encode_stages, ingest_sources, ray_of
from .ending import leaving_without_goodbyes
from .line import Line
from .train_stage import train


def _may_pass(task: Any, run: Any, state: Any) -> bool:
    """Whether trying again may help: not where a file, a rule or a recipe was refused."""
    return not isinstance(state.data, ValueError)


_RETRIED: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": 5,
    "retry_condition_fn": _may_pass,
    "cache_policy": NO_CACHE,
}


@task(name="ingest", **_RETRIED)
def ingest_task(line: Line) -> IngestResult:
    return ingest_sources(line)


@task(name="decode", **_RETRIED)
def decode_task(line: Line, data: Manifest) -> None:
    encode_pixels(line, data)


@task(name="encode", **_RETRIED)
def encode_task(line: Line, data: Manifest, stages: Sequence[str] | None = None) -> None:
    encode_stages(line, data, stages)


@flow(name="build-dataset", flow_run_name="data of {name}")
def build_dataset(line: dict[str, Any], name: str) -> dict[str, Any]:
    """Bring the data set up to date with its sources; leaves a table of what became of each row."""
    it = Line.from_json(line)
    with leaving_without_goodbyes(), ray_of(it):
        result = ingest_task(it)
        decode_task(it, result.manifest)
    rows = [{"outcome": what, "rows": count} for what, count in sorted(result.counts.items())]
    text = f"{name}, version {result.manifest.version}, data {result.manifest.digest}"
    create_table_artifact(rows, key=f"{it.slug}-rows", description=text)
    return {"version": result.manifest.version, "new": result.new, "reused": result.reused}


@flow(name="train-stage", flow_run_name="train {name}")
def train_stage(line: dict[str, Any], name: str, parent_run: str | None = None) -> dict[str, Any]:
    """Train one stage of a recipe, or find it trained; leaves what was measured and a preview as
    artifacts.
    """
    it = Line.from_json(line)
    data = it.manifest()
    with leaving_without_goodbyes():
        stage, reused = train(it, name, data, parent_run)
    told, slug = f"{name} of {it.recipe.name}", name.replace("_", "-")
    create_markdown_artifact(
        _summary(name, stage, reused), key=f"{it.slug}-{slug}", description=told
    )
    preview = it.stage_dir(name, data) / results.PREVIEW
    if preview.exists():
        picture = base64.b64encode(preview.read_bytes()).decode()
        create_image_artifact(
            f"data:image/png;base64,{picture}",
            key=f"{it.slug}-{slug}-preview",
            description=f"what {told} makes",
        )
    return {"stage": name, "reused": reused, "seconds": stage.get("seconds", 0.0)}


def _summary(name: str, stage: dict[str, Any], reused: bool) -> str:
    lines = [f"## {name}" + (" (found trained)" if reused else ""), "", "| | |", "|-|-|"]
    shown = {k: stage.get(k) for k in ("images_seen", "seconds", "parameters", "fingerprint")}
    for key, value in (shown | stage.get("measured", {})).items():
        if not isinstance(value, list):  # the latents' scale and shift, channel by channel
            lines.append(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    return "\n".join(lines)
