"""Sources -> shards -> encoded shards: all that the stages learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.encode import encode, pixels_spec
from pipeline.ingest import IngestResult, ingest
from pipeline.manifest import Manifest
from pipeline.schema import PICTURE_EMBEDDING, EncoderSpec

from .cluster import ray_session
from .line import Line
from .progress import meter
from .recipe import scorers


def ingest_sources(line: Line) -> IngestResult:
    """Read what is new in the recipe's sources; nothing is read twice."""
    with ray_of(line), meter("ingest") as progress:
        return ingest(
            line.sources,
            line.dataset,
            line.rules,
            line.recipe.executor,
            lambda stage, done, total: progress(done, total, stage),
            scorers(line.recipe),
        )


def encode_pixels(line: Line, data: Manifest) -> None:
    """Decode every picture once, to the side that is learnt."""
    with ray_of(line), meter("pixels") as progress:
        encode(data, [pixels_spec(line.recipe.data.side)], None, line.recipe.executor, progress)


def encode_stages(line: Line, data: Manifest, stages: Sequence[str] | None = None) -> None:
    """Latents and embeddings of pictures and texts by the frozen stages, for all stages that draw
    or for these."""
    from training import encoders

    drawing = line.recipe.drawing if stages is None else stages
    specs = {it.fingerprint: it for name in drawing for it in encoder_specs(line, data, name)}
    with ray_of(line), meter("encode") as progress:
        encode(data, list(specs.values()), encoders.build, line.recipe.executor, progress)


def encoder_specs(line: Line, data: Manifest, stage: str = "base") -> list[EncoderSpec]:
    """The encoders that a drawing stage learns from, as they are now on disk."""
    from training import encoders

    recipe, side, rules = line.recipe, line.recipe.data.side, line.recipe.data.encode
    buckets = rules.buckets(side)
    specs: list[EncoderSpec] = []
    if recipe.sees_pixels(stage):
        specs.append(pixels_spec(side, buckets, rules.flip))
    for name in recipe.inputs(stage):
        source = line.source(name, data)
        if name == "autoencoder":
            framed = (buckets, rules.flip, rules.precision)
            specs.append(encoders.spec_of(source, name, side, *framed))
        else:
            specs.append(encoders.spec_of(source, name, precision=rules.precision))
    if recipe.is_told_embedding(stage):
        clip = line.source("clip", data)
        specs.append(encoders.spec_of(clip, PICTURE_EMBEDDING, precision=rules.precision))
    return specs


def ray_of(line: Line) -> Any:
    return ray_session(line.recipe.executor.chosen == "ray")
