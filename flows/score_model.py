"""The stages become one generator, which is scored, gets the guidance scale and the options that
suit it, and is packaged.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_image_artifact, create_table_artifact

from evaluation.config import in_words
from pipeline import storage
from pipeline.encode import pixels_spec
from pipeline.manifest import Manifest
from pipeline.schema import EncoderSpec, Encoding

from .ending import leaving_without_goodbyes
from .line import Line
from .progress import meter
from .train_stage import encodings

if TYPE_CHECKING:
    from evaluation.features import Extractor
    from evaluation.given import Pictured
    from evaluation.prompts import Prompt
    from evaluation.sample import Pictures
    from evaluation.scorecard import Scorecard, Scored
    from pipeline.load import Loader

GENERATOR, PACKAGE, SCORES, CANDIDATE = "generator", "package", "scores", "candidate.json"
GALLERY, SWEEP = "gallery.png", "sweep.png"


@dataclass(frozen=True)
class Question:
    """What every model of a line is asked: prompts, and pictures to hold its own against."""

    prompts: Sequence[Prompt]
    clip: Extractor
    reference: Pictures
    train: Pictures
    heldout: Loader | None
    """Held-out encodings, and the pictures themselves; None: the model is not asked about any."""
    pictured: Pictured

    def score(self, line: Line, generator: Any, title: str, scale: float | None = None) -> Scored:
        from evaluation.scorecard import score

        with meter(title) as progress:
            return score(
                generator,
                line.recipe.evaluation,
                prompts=self.prompts,
                clip=self.clip,
                reference=self.reference,
                train=self.train,
                heldout=self.heldout,
                scale=scale,
                pictured=self.pictured,
                progress=progress,
            )


def ask(line: Line, data: Manifest) -> Question:
    """The same for every model that is scored on this version of the data."""
    from evaluation.features import ClipFeatures, pictures_of
    from evaluation.prompts import caption_prompts, shape_prompts

    config = line.recipe.evaluation
    choose = shape_prompts if config.kind == "shapes" else caption_prompts

    pixels = [pixels_spec(line.recipe.data.side)]
    return Question(
        prompts=choose(data, config.prompts, seed=config.seed),
        clip=ClipFeatures(line.source("clip", data)),
        reference=heldout_pictures(line, data, config.reference_count),
        train=pictures_of(_loader(line, data, pixels, "train"), config.train_count),
        heldout=_loader(line, data, _shown(line, data), "heldout"),
        pictured=pictured(line, data),
    )


def check_held_out(data: Manifest) -> None:
    """ValueError where too few pictures are held out to score a model: better told before its
    training than after.
    """
    from evaluation.scorecard import FEWEST

    held = data.samples("heldout")
    if held < FEWEST:
        raise ValueError(
            f"{data.dataset}, version {data.version}: {held} held out of {data.samples()} "
            f"pictures, {FEWEST} needed to score a model; ingest more (of {4 * FEWEST} pictures "
            f"with captions of their own {FEWEST} are), or raise data.ingest.heldout_share"
        )


def _shown(line: Line, data: Manifest) -> list[EncoderSpec]:
    """What a base is shown, and the pictures as they are: a champion may be told smaller ones."""
    pixels = pixels_spec(line.recipe.data.side)
    if line.recipe.base is None:
        return [pixels]
    specs = encodings(line, "base", data)
    # Where pictures are cut to buckets or mirrored nothing enlarges, and these are squares.
    framed = line.recipe.data.encode.max_aspect > 1 or line.recipe.data.encode.flip
    return specs if framed or any(it.name == pixels.name for it in specs) else [*specs, pixels]


def pictured(line: Line, data: Manifest) -> Pictured:
    """The real pictures of prompts: scenes drawn for them, or those whose captions they are."""
    from evaluation.given import drawn_for, held_out

    config, side = line.recipe.evaluation, line.recipe.data.side
    if config.kind == "shapes":
        return lambda prompts: drawn_for(prompts, side, config.seed)
    splits = [it for it in ("heldout", "unseen") if data.split(it)]
    return lambda prompts: held_out(prompts, _loader(line, data, [pixels_spec(side)], *splits))


def heldout_pictures(line: Line, data: Manifest, count: int) -> Pictures:
    """Real pictures, spread evenly over those that nothing learns from."""
    from evaluation.features import pictures_of

    return pictures_of(heldout_loader(line, data), count)


def heldout_loader(line: Line, data: Manifest) -> Loader:
    """The pictures that nothing learns from, as they are, and their labels."""
    return _loader(line, data, [pixels_spec(line.recipe.data.side)], "heldout")


def _loader(line: Line, data: Manifest, specs: Sequence[EncoderSpec], *splits: str) -> Loader:
    from pipeline.load import Loader

    opened = [Encoding.at(line.dataset, s.name, s.kind, s.fingerprint) for s in specs]
    seed = line.recipe.evaluation.seed
    return Loader(data, opened, splits=splits, global_batch=64, seed=seed)


def score_candidate(line: Line, data: Manifest) -> tuple[dict[str, Any], bool]:
    """(candidate.json, whether it was there): the package, which draws as the sweep chose, and its
    numbers.
    """
    folder = line.model_dir(data)
    record = folder / CANDIDATE
    if record.exists():
        return storage.read_json(str(record)), True
    from evaluation.packaging import package
    from evaluation.sample import png
    from training.assembling import assemble
    from training.generator import Generator

    started = time.monotonic()
    sources = {name: line.source(name, data) for name in line.recipe.stages}
    assemble(folder / GENERATOR, sources, line.recipe.sampler, line.recipe.samplers)
    generator = Generator.load(folder / GENERATOR)
    scored = ask(line, data).score(line, generator, "score")
    card = scored.scorecard
    chosen = line.recipe.with_options({"guidance": card.scale, **card.chosen})
    assemble(folder / GENERATOR, sources, chosen.sampler, chosen.samplers)
    scored.save(str(folder / SCORES))
    storage.publish_bytes(str(folder / GALLERY), png(scored.gallery(), 2))
    storage.publish_bytes(str(folder / SWEEP), png(scored.grid(), 2))
    packaged = package(
        folder / GENERATOR,
        folder / PACKAGE,
        recipe=line.recipe.model_dump(mode="json"),
        lineage=lineage(line, data, card),
        scorecard=card.model_dump(mode="json"),
    )
    result = {
        "package": packaged,
        "scale": card.scale,
        "options": card.chosen,
        "scorecard": card.headline,
        "seconds": time.monotonic() - started,
    }
    storage.publish_json(str(record), result)
    return result, False


def lineage(line: Line, data: Manifest, card: Scorecard) -> dict[str, Any]:
    """What the model was made of, and where options were swept, what it draws by."""
    chosen = {"chosen": {"guidance": card.scale, **card.chosen}} if card.options else {}
    return chosen | {
        "dataset": line.dataset,
        "version": data.version,
        "data_digest": data.digest,
        "samples": data.samples("train"),
        "stages": {name: line.source(name, data) for name in line.recipe.stages},
    }


def drawn_by(guidance: float, options: Mapping[str, Any]) -> str:
    """In words, what the sweep chose."""
    chosen = {"guidance": guidance, **options}
    return ", ".join(f"{name} {in_words(value)}" for name, value in chosen.items())


@flow(name="score-model", flow_run_name="score {name}")
def score_model(line: dict[str, Any], name: str) -> dict[str, Any]:
    """Score and package the line's newest model; leaves numbers and pictures as artifacts."""
    it = Line.from_json(line)
    data = it.manifest()
    with leaving_without_goodbyes():
        result, reused = score_candidate(it, data)
    rows = [{"metric": k, "value": round(v, 4)} for k, v in result["scorecard"].items()]
    # What was scored before options were swept says nothing of them.
    chosen = drawn_by(result["scale"], result.get("options", {}))
    create_table_artifact(rows, key=f"{it.slug}-scorecard", description=chosen)
    for picture in (GALLERY, SWEEP):
        content = base64.b64encode(Path(it.model_dir(data), picture).read_bytes()).decode()
        key = f"{it.slug}-{picture.removesuffix('.png')}"
        told = f"{name}: the first prompts" + (" by guidance scale" if picture == SWEEP else "")
        create_image_artifact(f"data:image/png;base64,{content}", key=key, description=told)
    return {**result, "reused": reused}
