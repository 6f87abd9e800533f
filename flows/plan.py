"""What a recipe takes, before anything is spent: FLOPs, memory, time, storage, money."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import recipe as recipes
from .line import Line
from .recipe import DENOISING, FROZEN, Recipe, RecipeError, kind_of
from .settings import settings

PICTURE_BYTES = 0.6
"""Of a stored picture per pixel of the square of its side: .39 to .77 at 256 and 512 px, JPEGs of
quality 95 of 40 photographs and 40 illustrations."""
UNPLANNED = "edit"
"""Its update carries out what its inputs, trained networks, do: there is nothing to count yet."""


@dataclass(frozen=True)
class Samples:
    """How many pictures there are, and what one takes as it is stored."""

    count: int | None
    picture_bytes: float
    source: str


def plan(
    recipe: str,
    overrides: list[str],
    device: str | None = None,
    workers: int | None = None,
    samples: int | None = None,
    words: int = 20,
    price: float | None = None,
) -> dict[str, Any]:
    from training import accelerators, planning

    for name, given in {"--workers": workers, "--samples": samples, "--words": words}.items():
        if given is not None and given < 1:
            raise RecipeError(f"{name} must be at least 1, got {given}")
    if price is not None and price < 0:
        raise RecipeError(f"--price must not be negative, got {price:g}")
    line = Line(recipes.load(recipe, overrides), settings())
    recipes.check_stages(line.recipe)
    try:
        where = accelerators.accelerator(device)
    except ValueError as error:
        raise RecipeError(f"--device: {error}") from None
    captions, shapes = planning.Captions(words), encoder_shapes(line.recipe)
    stages = {
        name: _stage(line.recipe, name, shapes, captions, where, workers)
        for name in line.recipe.stages
        if name != UNPLANNED and not line.recipe.stage(name).pretrained
    }
    stored = _storage(line, shapes, captions, stages, samples)
    hours = sum(it["device_hours"] for it in stages.values())
    result = {
        "recipe": line.recipe.name,
        "device": asdict(where),
        "stages": stages,
        "storage": stored,
        "device_hours": hours,
        "cost": None if price is None else price * hours,
        "assumptions": _assumptions(line.recipe, shapes, captions, where, stored),
        "warnings": [
            *(f"{name}: {it['advice']}" for name, it in stages.items() if it["advice"]),
            *_unknown(line.recipe, shapes),
            *([f"{UNPLANNED}: not in this plan"] if UNPLANNED in line.recipe.stages else []),
        ],
    }
    return result | {"text": _told(result, price)}


def encoder_shapes(recipe: Recipe) -> dict[str, Any]:
    """What the encoders of pictures and texts will give, by their names."""
    from training.encoders.shapes import foreseen
    from training.stages import config_of

    found = {}
    for name in (it for it in recipe.stages if it in FROZEN):
        stage = recipe.stage(name)
        try:
            found[name] = foreseen(name, config_of(kind_of(name), stage.config), stage.pretrained)
        except ValueError as error:
            raise RecipeError(f"{name}.pretrained: {error}") from None
    return found


def _stage(
    recipe: Recipe,
    name: str,
    shapes: dict[str, Any],
    captions: Any,
    device: Any,
    workers: int | None,
) -> dict[str, Any]:
    from training import planning
    from training.stages import compares_rows, config_of, training_of

    stage = recipe.stage(name)
    config, training = config_of(kind_of(name), stage.config), training_of(stage.training)
    if workers:
        try:
            training = replace(training, workers=workers, min_workers=0)
            if compares_rows(kind_of(name)):
                training.check_comparing(name)
        except ValueError as error:
            raise RecipeError(f"{name}.training: {error}") from None
    width, height = _bucket(recipe) if name in DENOISING else (recipe.data.side, recipe.data.side)
    try:
        config = planning.informed(config, shapes)
        it = planning.estimate(
            name,
            config,
            training,
            lambda c, rows: planning.batch_of(c, rows, (height, width), captions, shapes),
            device,
            training.workers,
            _own_clip(recipe),
        )
    except ValueError as error:
        raise RecipeError(f"{name}.config: {error}") from None
    update = it.update
    return {
        "parameters": update.parameters,
        "flops_per_image": update.flops_per_image,
        "forward_flops_per_image": update.forward_flops / update.rows,
        "batch": training.batch,
        "workers": it.workers,
        "rows_at_once": update.rows,
        "memory": asdict(update.replicated) | {"total": update.replicated.total},
        "memory_sharded": asdict(update.sharded) | {"total": update.sharded.total},
        "fits": it.fits(device),
        "images": it.images,
        "images_per_second": it.images_per_second,
        "hours": it.hours,
        "device_hours": it.device_hours,
        "checkpoint_bytes": update.checkpoint,
        "checkpoints": training.keep_last + training.keep_best,
        "advice": it.advice(device),
    }


def _own_clip(recipe: Recipe) -> Any:
    """The CLIP that other stages may look through: its config, or where a pretrained one is."""
    from training.stages import config_of

    return recipe.clip.pretrained or config_of("clip", recipe.clip.config)


def _bucket(recipe: Recipe) -> tuple[int, int]:
    """(width, height) of the bucket with the most pixels."""
    side = recipe.data.side
    return max(recipe.data.encode.buckets(side) or ((side, side),), key=lambda it: it[0] * it[1])


def _samples(line: Line, given: int | None) -> Samples:
    from pipeline import manifest

    recipe, usual = line.recipe, PICTURE_BYTES * line.recipe.data.side**2
    found = manifest.latest(line.dataset)
    if found is not None and (count := found.samples()):
        size = sum(shard.bytes for shard in found.split()) / sum(s.samples for s in found.split())
        return Samples(given or count, size, f"{line.dataset} version {found.version}")
    if given is None and recipe.data.scenes and not recipe.data.sources:
        return Samples(recipe.data.scenes, usual, "data.scenes")
    return Samples(given, usual, "--samples" if given else "")


def _storage(
    line: Line, shapes: dict[str, Any], captions: Any, stages: dict[str, Any], given: int | None
) -> dict[str, Any]:
    """Bytes: of each sample by what is stored of it, and of all of them."""
    samples, data = _samples(line, given), line.recipe.data
    width, height = _bucket(line.recipe)
    looks = 1 + data.encode.flip
    each = {"pictures": samples.picture_bytes, "pixels": 3.0 * data.side**2}
    seen = any(line.recipe.sees_pixels(name) for name in line.recipe.drawing)
    if seen and (data.encode.flip or data.encode.max_aspect > 1):
        each["pixels in buckets"] = 3.0 * width * height * looks
    if any(line.recipe.is_told_embedding(name) for name in line.recipe.drawing):
        each["embeddings"] = 2.0 * shapes["clip"].pooled
    # What nobody who draws learns from is not kept: without a base, nothing is.
    kept = {needed for name in line.recipe.drawing for needed in line.recipe.inputs(name)}
    for name, shape in ((it, shapes[it]) for it in shapes if it in kept):
        if name == "autoencoder":
            area = width * height / shape.factor**2
            each["latents"] = 2.0 * (1 + shape.posterior) * shape.width * area * looks
        else:
            each[name] = float(captions.stored_bytes(shape))
    total = sum(each.values())
    return {
        "samples": samples.count,
        "samples_from": samples.source,
        "bytes_per_sample": each | {"total": total},
        "total_bytes": None if samples.count is None else total * samples.count,
        "checkpoint_bytes": sum(
            stage["checkpoint_bytes"] * stage["checkpoints"] for stage in stages.values()
        ),
    }


def _assumptions(
    recipe: Recipe, shapes: dict[str, Any], captions: Any, device: Any, stored: dict[str, Any]
) -> list[str]:
    from training.accelerators import RESERVE

    told = [
        f"{device.utilisation:.0%} of the {'probed' if device.measured else 'published'} rate of "
        "matrix products, or the memory's bandwidth where that is less; pictures' encoding, "
        "evaluation, waiting for data and what workers tell each other are not in it",
        f"{RESERVE:.0%} of the device's memory is left to its context and to fragments",
    ]
    lengths = {n: captions.tokens(s) for n, s in shapes.items() if s.tokens}
    if lengths:
        shown = ", ".join(f"{count} tokens of {name}" for name, count in lengths.items())
        told.append(f"captions of {captions.words} words ({shown}), batches padded to twice that")
    if recipe.data.encode.max_aspect > 1:
        told.append("every picture costs as much as one of the bucket with the most pixels")
    if "version" not in stored["samples_from"]:
        told.append(
            f"a stored picture takes {PICTURE_BYTES:g} bytes for each of side x side pixels"
        )
    return told


def _unknown(recipe: Recipe, shapes: dict[str, Any]) -> list[str]:
    return [
        f"{name}.pretrained: {recipe.stage(name).pretrained} is not here and not known; widths of "
        f"the usual kind are assumed ({shape.width})"
        for name, shape in shapes.items()
        if shape.known == "assumed"
    ]


def _told(result: dict[str, Any], price: float | None) -> str:
    """All of it as text. ASCII boxes: it may be piped into a file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=120, highlight=False, markup=False)

    def table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
        it = Table(box=box.ASCII2, title=title, title_justify="left", title_style="")
        for name in words:
            it.add_column(name, no_wrap=True)
        for name in numbers:
            it.add_column(name, justify="right", no_wrap=True)
        return it

    device, stored = result["device"], result["storage"]
    rates = ", ".join(f"{v / 1e12:.3g} TFLOP/s in {k}" for k, v in device["matmul"].items())
    console.print(
        f"{result['recipe']} on {device['name']}: {rates}, {device['bandwidth'] / 1e9:.0f} GB/s, "
        f"{_size(device['memory'])}"
    )
    work = ("parameters", "GFLOP/image", "workers x rows", "images", "images/s", "hours")
    stages = table("training", ("stage",), (*work, "device-hours"))
    parts = ("weights", "gradients", "optimizer", "averages", "gathered", "activations")
    parts += ("unsharded", "total")
    memory = table("memory of a worker", ("stage", ""), parts)
    for name, it in result["stages"].items():
        stages.add_row(
            name,
            f"{it['parameters'] / 1e6:.1f} M",
            _number(it["flops_per_image"] / 1e9),
            f"{it['workers']} x {it['rows_at_once']}",
            f"{_number(it['images'] / 1e6)} M",
            *(_number(it[key]) for key in ("images_per_second", "hours", "device_hours")),
        )
        memory.add_row(name, "whole", *(_size(it["memory"][part]) for part in parts))
        if it["workers"] > 1:
            memory.add_row("", "FSDP", *(_size(it["memory_sharded"][part]) for part in parts))
    count = stored["samples"]
    storage = table("storage", ("",), ("a sample", "all"))
    for name, size in stored["bytes_per_sample"].items():
        storage.add_row(name, _size(size), "?" if count is None else _size(size * count))
    for it in (stages, memory, storage):
        console.print(it)
    of = "how many samples is not known: say --samples" if count is None else f"{count:,} samples"
    console.print(f"{of}; checkpoints beside them: {_size(stored['checkpoint_bytes'])}")
    cost = "" if price is None else f", {result['cost']:,.2f} at {price:g} an hour"
    console.print(f"{result['device_hours']:,.2f} device-hours{cost}")
    for title in ("assumptions", "warnings"):
        if result[title]:
            console.print("\n".join(("", title, *(f"- {text}" for text in result[title]))))
    return "\n".join(row.rstrip() for row in out.getvalue().splitlines())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: float) -> str:
    for unit, bytes in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= bytes:
            return f"{size / bytes:.3g} {unit}"
    return f"{size:.0f} B"
