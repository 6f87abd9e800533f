"""What each command of the command line does: a plain function from its arguments to JSON."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath
from typing import Any

from . import hanging
from . import recipe as recipes
from .line import Line
from .progress import meter, say
from .recipe import DENOISING, FROZEN
from .settings import settings

PADDED = {"clip": 77, "t5": 512}
"""Tokens to which captions are usually padded."""


class UsageError(ValueError):
    """The command cannot be carried out as it was given."""


def run(recipe: str, overrides: list[str], fresh: bool = False) -> dict[str, Any]:
    from .retrain import NOTHING_TO_DO, deliver_late, finished, retrain, summary

    line = _line(recipe, overrides)
    if fresh:
        _forget(line, line.recipe.stages)
    result = finished(line)
    if result is None:
        _check(line)
        result = retrain(recipe, overrides)
    else:
        say(NOTHING_TO_DO)
        deliver_late(line)
    return result | {
        "text": summary(line, result),
        "refused": not result["verdict"]["promote"],
    }


def encode(recipe: str, overrides: list[str]) -> dict[str, Any]:
    from pipeline.load import text_storage
    from pipeline.reasons import refusals
    from pipeline.schema import Encoding

    from .build_dataset import encode_stages, encoder_specs

    line = _line(recipe, overrides)
    data, reused = _prepare(line, tuple(it for it in line.recipe.stages if it in FROZEN))
    encode_stages(line, data)
    every = (it for name in line.recipe.drawing for it in encoder_specs(line, data, name))
    specs = list({spec.fingerprint: spec for spec in every}.values())
    texts = {
        spec.name: text_storage(
            data, Encoding.at(data.dataset, spec.name, spec.kind, spec.fingerprint), PADDED[family]
        )
        for spec in specs
        if spec.kind == "text"
        and (family := spec.options.get("family", spec.name).partition("_")[0]) in PADDED
    }
    made = {spec.name: spec.fingerprint for spec in specs}
    shown = ", ".join(f"{name} {value}" for name, value in made.items())
    lines = [f"{line.dataset} version {data.version} encoded: {shown}"]
    lines += [
        f"  {name:4} {it.captions} captions, {it.cut} cut, in {it.stored_bytes / 1e6:.1f} MB: "
        f"{it.padded_bytes / it.stored_bytes:.1f} times less than padded"
        for name, it in texts.items()
    ]
    refused = [it for it in refusals(data) if it.fingerprint in made.values()]
    lines += [f"  {it.encoder:4} rejected {len(it.keys)}: {it.reason}" for it in refused]
    return {
        "dataset": line.dataset,
        "version": data.version,
        "encodings": made,
        "rejected": {it.encoder: len(it.keys) for it in refused},
        "texts": {name: asdict(it) for name, it in texts.items()},
        "reused": reused,
        "text": "\n".join(lines),
    }


def convert(encoder: str, decoder: str, out: str) -> dict[str, Any]:
    from training.encoders.taef2 import convert_taef2

    convert_taef2(encoder, decoder, out)
    return {"directory": out, "text": f"{out}: use it as autoencoder.pretrained={out}"}


def train(recipe: str, stage: str, overrides: list[str], fresh: bool = False) -> dict[str, Any]:
    from training.starting import Start

    from .build_dataset import encode_stages
    from .train_stage import train as fit

    again = hanging.before.began
    start = Start.of_process() if again is None else Start(began=again)
    line = _line(recipe, overrides)
    line.recipe.stage(stage)
    start.done("interpreter and recipe")
    _check(line)
    start.done("torch and checks")
    data, reused = _prepare(line, line.recipe.inputs(stage))
    if fresh:
        _forget(line, (stage,))
    if stage in DENOISING:
        encode_stages(line, data, (stage,))
    start.done("data")
    done, found = fit(line, stage, data, start=start)
    where = str(line.stage_dir(stage, data))
    return {
        "stage": stage,
        "directory": where,
        "measured": done.get("measured", {}),
        "seconds": done.get("seconds"),
        "reused": [*reused, *([stage] if found else [])],
        "text": f"{stage}: {'already trained' if found else 'trained'}, in {where}",
    }


def posthoc(
    recipe: str,
    stage: str,
    overrides: list[str],
    sigma_rel: float,
    images: int | None,
    out: str,
) -> dict[str, Any]:
    from training.posthoc import export

    line = _line(recipe, overrides)
    line.recipe.stage(stage)
    try:
        told = export(line.stage_dir(stage, line.manifest()), out, sigma_rel, images)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return told | {
        "directory": out,
        "text": f"{stage}: the average of length {sigma_rel:g} at {told['images_seen']} images, "
        f"from snapshots at {told['snapshots']} times, its profile {told['profile_error']:.2%} "
        f"off, is in {out}",
    }


def sample(
    model: str,
    prompts: list[str],
    out: str,
    negative: str | None,
    guidance: float | None,
    steps: int | None,
    seed: int,
    count: int,
    low: str | None = None,
    level: float | None = None,
    labels: Sequence[str] = (),
    map: str | None = None,
) -> dict[str, Any]:
    import numpy as np

    from evaluation.registry import load
    from evaluation.sample import png
    from pipeline import storage

    if count < 1:
        raise UsageError(f"--count must be at least 1, got {count}")
    if not (prompts or low or labels or map):
        raise UsageError(
            "nothing to draw: give a prompt, or --low, --map or --label to a model of such"
        )
    own = ("prompts", "labels", "low", "map", "known")
    named, chosen = _contender(model, own, "prompts, --label, --low and --map tell it")
    generator = load(named, tracking_uri=settings().mlflow_uri)
    label, small, maps = _label(generator, labels), _low(generator, low), _maps(generator, map)
    asked = [
        (prompt, name, shown)
        for prompt in prompts or [""]
        for name in small or [""]
        for shown in maps or [""]
        for _ in range(count)
    ]
    texts = [prompt for prompt, _, _ in asked]
    options: dict[str, Any] = chosen | ({"labels": [label] * len(texts)} if label else {})
    if small:
        options["low"] = np.stack([small[name] for _, name, _ in asked])
    if maps:
        options["map"] = np.stack([maps[shown] for _, _, shown in asked])
    if level is not None:
        options["level"] = level
    said = {"negative": negative, "guidance": guidance, "steps": steps, "seed": seed}
    if twice := [it for it in chosen if said.get(it) not in (None, 0)]:
        raise UsageError(f"{model}: {twice[0]} is given twice; leave out --{twice[0]}")
    try:
        pictures = generator(texts, **(said | options))
    except ValueError as error:
        raise UsageError(f"{model}: {error}") from None
    spoken = {
        "prompt": any(it.strip() for it in prompts),
        "negative": chosen.get("negative", negative),
    }
    unheard = _unheard(generator, named, spoken, bool(label))
    seed = chosen.get("seed", seed)
    files = []
    for number, (picture, words) in enumerate(zip(pictures, asked, strict=True)):
        name = f"{number:03d}-{_slug(' '.join(words))}-{seed + number}.png"
        storage.publish_bytes(storage.join(out, name), png(picture))
        files.append(storage.join(out, name))
    return {"files": files, **unheard, "text": "\n".join(files)}


def edit(
    model: str,
    pictures: str,
    out: str,
    noise: float | None = None,
    inversion_steps: int | None = None,
    steps: int | None = None,
    unedited: bool = False,
) -> dict[str, Any]:
    import numpy as np

    from evaluation.registry import load
    from evaluation.sample import png
    from pipeline import storage
    from training.request import at_once

    ways = ("noise", "inversion_steps", "steps")
    named, chosen = _contender(model, ("pictures",), "--pictures tells it", ways)
    every = {"noise": noise, "inversion_steps": inversion_steps, "steps": steps}
    said = {name: value for name, value in every.items() if value is not None}
    if twice := [it for it in chosen if it in said]:
        option = twice[0].replace("_", "-")
        raise UsageError(f"{model}: {twice[0]} is given twice; leave out --{option}")
    _check_apart(pictures, out)
    generator = load(named, tracking_uri=settings().mlflow_uri)
    given = _to_edit(generator, named, pictures)
    names, options = [*given], {**said, "edited": not unedited, **chosen}
    files = []
    with meter("edit") as progress:
        rows = at_once(generator.latent_shape[-1])
        for start in range(0, len(names), rows):
            part = names[start : start + rows]
            try:
                edited = generator.edit(np.stack([given[name] for name in part]), **options)
            except ValueError as error:
                raise UsageError(f"{model}: {error}") from None
            for name, picture in zip(part, edited, strict=True):
                files.append(storage.join(out, f"{name}.png"))
                storage.publish_bytes(files[-1], png(picture))
            progress(len(files), len(names))
    config = generator.editor.config
    return {
        "files": files,
        "source": config.source,
        "target": config.target,
        "text": "\n".join(files),
    }


def _check_apart(pictures: str, out: str) -> None:
    """UsageError where a picture would be written over one that is read: the names are the same."""
    from evaluation.given import SUFFIXES
    from pipeline import storage

    alone = pictures.lower().endswith(SUFFIXES)
    written = storage.join(out, f"{PurePosixPath(pictures).stem}.png") if alone else out
    places = {
        os.path.realpath(storage.absolute(it)) if storage.is_local(it) else storage.absolute(it)
        for it in (pictures, written)
    }
    if len(places) == 1:
        raise UsageError(
            f"--out {out}: {'the picture lies' if alone else 'the pictures lie'} there and would "
            "be overwritten; name another folder"
        )


def _to_edit(generator: Any, model: str, place: str) -> dict[str, Any]:
    """The pictures that are to be edited, by name."""
    from evaluation.given import read_pictures

    if getattr(generator, "editor", None) is None:
        raise UsageError(
            f"{model}: it edits no picture, as it has no edit stage; add `edit` to its recipe, as "
            "shapes-diffusionclip has it"
        )
    try:
        return read_pictures(place, generator.latent_shape[-1], "edits")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--pictures: {error}") from None


def _unheard(
    generator: Any, model: str, spoken: Mapping[str, Any], label: bool
) -> dict[str, list[str]]:
    """Which of the texts that were `spoken` a model does not hear, and which attributes it draws by
    chance, as it was told no class; both are said too."""
    hears = getattr(generator, "reads_text", True)
    ignored = [] if hears else [name for name, it in spoken.items() if it]
    if ignored:
        say(f"{model} hears no text: what was said ({', '.join(ignored)}) changes no picture")
    known = getattr(generator, "given", {}).get("labels", {})
    by_chance = [] if label or (hears and spoken["prompt"]) else [*known]
    if by_chance:
        say(
            f"{model} is told {' and '.join(by_chance)}, and here it was not: they are drawn by "
            f"chance; name them by {' '.join(f'--label {it}=...' for it in by_chance)}"
        )
    return {"ignored": ignored, "by_chance": by_chance}


def _label(generator: Any, words: Sequence[str]) -> dict[str, str]:
    """NAME=ANSWER words as a generator takes them."""
    known: dict[str, list[str]] = getattr(generator, "given", {}).get("labels", {})
    label: dict[str, str] = {}
    for word in words:
        name, equals, answer = word.partition("=")
        if not known:
            raise UsageError(f"--label {word}: this model is told no classes")
        if not equals:
            raise UsageError(f"--label {word}: expected NAME=ANSWER, e.g. {_example(known)}")
        if name not in known:
            raise UsageError(f"--label {word}: this model is told {', '.join(known)}")
        if answer not in known[name]:
            raise UsageError(f"--label {word}: {name} is one of {', '.join(known[name])}")
        label[name] = answer
    if label and (left := [name for name in known if name not in label]):
        raise UsageError(
            f"--label {words[0]}: a class is {' and '.join(known)} together: give "
            f"{' '.join(f'--label {name}=...' for name in left)} too"
        )
    return label


def _example(known: Mapping[str, Sequence[str]]) -> str:
    name, answers = next(iter(known.items()))
    return f"{name}={answers[0]}"


def _low(generator: Any, place: str | None) -> dict[str, Any]:
    """The pictures that are to be enlarged, by name."""
    from evaluation.given import read_pictures

    side = getattr(generator, "given", {}).get("low")
    if place is None:
        if side:
            raise UsageError(f"this model enlarges pictures of {side} px: give --low FILE")
        return {}
    if not side:
        raise UsageError(f"--low {place}: this model enlarges no picture that it is given")
    try:
        return read_pictures(place, side)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--low: {error}") from None


def _maps(generator: Any, place: str | None) -> dict[str, Any]:
    """The label maps that are drawn by, by name."""
    from evaluation.given import read_maps

    told = getattr(generator, "given", {}).get("map")
    if place is None:
        if told:
            raise UsageError(
                f"this model draws by label maps of {told['side']} px: give --map FILE"
            )
        return {}
    if not told:
        raise UsageError(f"--map {place}: this model is told no label maps")
    try:
        return read_maps(place, told["side"], told["classes"])
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--map: {error}") from None


def serve(model: str, host: str, port: int) -> dict[str, Any]:
    """Answers over HTTP until it is stopped."""
    import uvicorn

    from evaluation.registry import application

    name, app, examples = application(model, tracking_uri=settings().mlflow_uri)
    posts = " or ".join(f"POST /invocations {it}" for it in examples)
    say(f"{name} answers on http://{host}:{port}: {posts}; GET /health")
    uvicorn.run(app, host=host, port=port, log_level="warning")
    return {"model": name, "text": f"{name}: stopped"}


def compare(
    models: list[str], out: str, prompts: int, title: str | None, gallery: str | None = None
) -> dict[str, Any]:
    """The first model's prompts, drawn by each; `MODEL?steps=8` sets a field of its sampler."""
    from evaluation import comparison, registry
    from evaluation.given import Given
    from evaluation.techniques import techniques
    from pipeline import storage

    from .score_model import ask

    uri = settings().mlflow_uri
    if len(models) < 2:
        raise UsageError('name two models or more, e.g. shapes "shapes?steps=8"')
    own = ("prompts", "seed", "labels", "low", "map", "known")
    named = [_contender(model, own, "all models are told the same") for model in models]
    loaded = {
        name: registry.load(name, tracking_uri=uri)
        for name in dict.fromkeys(name for name, _ in named)
    }
    made_of = {name: registry.stages(name, tracking_uri=uri) for name in loaded}
    contenders = [
        comparison.Contender(model, loaded[name], options, made_of[name])
        for model, (name, options) in zip(models, named, strict=True)
    ]
    line, _ = _line_of(named[0][0])
    question = ask(line, line.manifest())
    asked = question.prompts[:prompts]
    if len(asked) < prompts:
        say(f"{len(asked)} prompts, not {prompts}: that is how many {models[0]} is asked")
    with meter("compare") as progress:
        drawn = comparison.compare(
            contenders,
            asked,
            seed=line.recipe.evaluation.seed,
            clip=question.clip,
            reference=question.reference,
            pictured=question.pictured,
            progress=progress,
        )
    shown = techniques(
        contenders[0].generator,
        [prompt.text for prompt in asked[:4]],
        question.reference[:6],
        line.recipe.evaluation.seed,
        Given.of(contenders[0].generator, asked[:4], question.pictured),
        question.heldout,
    )
    comparison.write(out, title or " · ".join(loaded), drawn, asked, shown, question.reference)
    if gallery:
        storage.publish_bytes(gallery, comparison.gallery(drawn))
    rows = [
        {
            "model": it.name,
            "stages": dict(it.stages),
            "right": float(it.right.mean()),
            "against_first": it.against_first
            and [it.against_first.mean, it.against_first.low, it.against_first.high],
            "evaluations": None if math.isnan(it.evaluations) else it.evaluations,
            "seconds": it.seconds,
            "measures": {
                name: {
                    "mean": measure.mean,
                    "interval": (own := measure.interval()) and asdict(own),
                    "against_first": measure.against_first and asdict(measure.against_first),
                }
                for name, measure in it.measures.items()
            },
        }
        for it in drawn
    ]
    lines = [
        f"  {r['model']:44} {r['right']:6.1%}"
        + ("" if r["evaluations"] is None else f"  {r['evaluations']:6.0f} calls")
        for r in rows
    ]
    pages = [f"  {page}" for page in (out, gallery) if page]
    return {"rows": rows, "page": out, "text": "\n".join([*lines, *pages])}


def evaluate(model: str) -> dict[str, Any]:
    from evaluation import registry

    from .score_model import ask

    uri = settings().mlflow_uri
    line, name = _line_of(model)
    data = line.manifest()
    generator = registry.load(name, tracking_uri=uri)
    scored = ask(line, data).score(line, generator, f"score {name}", generator.defaults["guidance"])
    card = scored.scorecard.headline
    rows = [f"  {metric:28} {value:.4f}" for metric, value in sorted(card.items())]
    return {"model": f"models:/{name}", "scorecard": card, "text": "\n".join([name, *rows])}


def promote(model: str, dry_run: bool) -> dict[str, Any]:
    from .promote_model import decide, settle

    if Path(model, "manifest.json").is_file():
        raise UsageError(f"{model} is a folder; promote a registered model, e.g. models:/NAME/1")
    line, name = _line_of(model)
    data = line.manifest()
    if dry_run:
        verdict = decide(line, data, name, line.ledger.champion()).verdict
    else:
        verdict = settle(line, data, name)[1].verdict
    champion = line.ledger.champion()
    return {
        "model": f"models:/{name}",
        "verdict": verdict.model_dump(mode="json"),
        "champion": champion,
        "refused": not verdict.promote,
        "text": "\n".join(
            [
                verdict.reason,
                *(f"  {c.name}: {c.why}" for c in verdict.checks),
                *([f"stages: {verdict.change}"] if verdict.change else []),
                f"champion: {champion}",
            ]
        ),
    }


def rollback(name: str) -> dict[str, Any]:
    from evaluation import registry
    from evaluation.ledger import Ledger

    here = settings()
    ledger = Ledger(here.ledger, name)
    if ledger.champion() is None:
        raise UsageError(f"no model named {name} was ever promoted; see `darkroom status`")
    entry = registry.rollback(ledger, tracking_uri=here.mlflow_uri)
    return {
        "champion": entry.candidate,
        "before": entry.champion_before,
        "text": f"{entry.candidate} is the champion again (it was {entry.champion_before})",
    }


def recipes_() -> dict[str, Any]:
    from .presets import PRESETS

    known = {name: " ".join((make.__doc__ or "").split()) for name, make in PRESETS.items()}
    return {"recipes": known, "text": "\n".join(f"{name:18} {doc}" for name, doc in known.items())}


def status() -> dict[str, Any]:
    from evaluation.ledger import Ledger
    from pipeline import manifest, storage
    from training import results
    from training.tracking import waiting

    here = settings()
    data = {}
    for name in storage.list_names(str(here.home / "datasets")):
        found = manifest.latest(here.dataset(name))
        if found:
            data[name] = {"version": found.version, "train": found.samples("train")}
    stages = {}
    for name in storage.list_names(str(here.home / "stages")):
        done = results.committed(here.stage(name))
        history = results.history(here.stage(name))
        seen = history[-1]["images_seen"] if history else 0
        stages[name] = {"done": done is not None, "images_seen": seen}
        stages[name]["undelivered"] = waiting(here.stage(name) / results.TRACKING)
    models = {}
    for name in storage.list_names(here.ledger):
        ledger = Ledger(here.ledger, name)
        models[name] = {"champion": ledger.champion(), "previous": ledger.previous()}
    text = [f"home {here.home}", "", "data sets"]
    text += [
        f"  {n}: version {d['version']}, {d['train']} training pictures" for n, d in data.items()
    ]
    text += ["", "stages"]
    for name, stage in stages.items():
        state = "done" if stage["done"] else f"at {stage['images_seen']} images"
        late = stage["undelivered"]
        state += f"; {late} entries wait for MLflow until the same command runs again" * bool(late)
        text.append(f"  {name}: {state}")
    text += ["", "models"]
    text += [
        f"  {n}: champion {m['champion']}, previous {m['previous']}" for n, m in models.items()
    ]
    return {
        "home": str(here.home),
        "data": data,
        "stages": stages,
        "models": models,
        "text": "\n".join(text),
    }


def deploy(recipe: str, overrides: list[str]) -> dict[str, Any]:
    from .deployments import deployment_name, serve

    line = _line(recipe, overrides)
    _check(line)
    name = deployment_name(line.recipe)
    say(f"serving deployment {name}, cron {line.recipe.schedule!r}; Ctrl-C ends it")
    serve(line.recipe, recipe, overrides)
    return {"deployment": name, "text": f"{name}: no longer served"}


def _line(recipe: str, overrides: list[str]) -> Line:
    return Line(recipes.load(recipe, overrides), settings())


def _check(line: Line) -> None:
    """What hours of work would find out."""
    recipes.check_stages(line.recipe)
    try:
        _ = line.sources
        line.check_warm_starts()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _line_of(model: str) -> tuple[Line, str]:
    """(the line that made a model, the model as the ledger calls it, or its package's folder)."""
    from evaluation import registry
    from pipeline import storage

    here = settings()
    packaged = Path(model, "manifest.json").is_file()
    name = model if packaged else registry.canonical(model, tracking_uri=here.mlflow_uri)
    folder, _ = registry.locate(name, tracking_uri=here.mlflow_uri)
    manifest = storage.read_json(str(folder / "manifest.json"))
    return Line(recipes.parse(manifest["recipe"]), here), name


def _prepare(line: Line, stages: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Data and stages that a command needs first; (manifest, what was done already)."""
    from .build_dataset import encode_pixels, encode_stages, ingest_sources
    from .train_stage import train as fit

    _check(line)
    result = ingest_sources(line)
    encode_pixels(line, result.manifest)
    found = ["data"] if result.reused else []
    needed = [name for stage in stages for name in (*line.recipe.inputs(stage), stage)]
    for name in dict.fromkeys(needed):
        if name == "base":
            encode_stages(line, result.manifest, ("base",))
        found += [name] if fit(line, name, result.manifest)[1] else []
    return result.manifest, found


def _forget(line: Line, stages: tuple[str, ...]) -> None:
    """Set aside what was trained: it is made anew, and nothing is lost. Once in a command, however
    often that is begun again."""
    from pipeline import manifest

    stages = tuple(it for it in stages if it not in hanging.before.aside)
    hanging.before.aside += stages
    data = manifest.latest(line.dataset)
    if data is None:
        return
    for name in stages:
        if aside := _aside(line.stage_dir(name, data)):
            say(f"{name}: what was trained before is now in {aside}")
    if aside := _aside(line.model_dir(data)):
        say(f"{line.recipe.name}: the scores and the report from before are now in {aside}")


def _aside(folder: Path) -> Path | None:
    """Where a folder is now that was renamed; None: there was none."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return folder.rename(aside)


def _contender(
    model: str, own: Sequence[str], why: str, settable: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """MODEL?key=value&key=value: the model and options of a call, such as fields of its sampler;
    commas make a list. UsageError for what is the command's `own` to say, with the reason and what
    is `settable` (by default what a generator's call takes)."""
    name, _, query = model.partition("?")
    options: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        if not value:
            raise UsageError(f"{model}: expected MODEL?key=value&key=value, got {part!r}")
        if key in own:
            may = ", ".join(settable or _settable())
            raise UsageError(f"{model}: {key} cannot be set so: {why}. What can be: {may}")
        values = [_number(text) for text in value.split(",")]
        options[{"kind": "sampler"}.get(key, key)] = values if len(values) > 1 else values[0]
    return name, options


def _settable() -> list[str]:
    """What a text can say of a call to a generator."""
    from training.generator import BaseSampler

    names = [it.name for it in fields(BaseSampler)]
    more = ["classifier_guidance", "clip_guidance", "embeddings", "negative"]
    return [*sorted([*names, *more]), "and of another stage's sampler its fields, as sr1.steps"]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _slug(text: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:60].strip("-") or "picture"
