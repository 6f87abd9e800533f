"""A generator's directory: made of trained stages, and opened.

It holds generator.json and a folder for each stage, JSON and safetensors only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.schema import PICTURE_EMBEDDING

from .generator import (
    BASE,
    DENOISING,
    ENLARGING,
    FORMAT,
    GENERATOR,
    PRIOR,
    BaseSampler,
    Generator,
    StageSampler,
    check_samplers,
    stage_samplers,
)

MODEL = "model"


def assemble(
    directory: str | Path,
    stages: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    samplers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Make a self-contained generator of trained stages.

    `stages` maps "base", "prior", "sr1", "sr2", "autoencoder" and the names of the text encoders to
    stage directories, or to pretrained models (folder or hub id), whose files are copied. Without
    a base the autoencoder, a stage of the line's, is the generator.
    `defaults` are fields of BaseSampler (guidance, steps, ...), `samplers` those of StageSampler
    for the other stages that draw. What was in the directory is replaced. ValueError when a stage
    is missing or not the one that another was trained with.
    """
    from .encoders.sources import files, open_source
    from .results import CONFIG, WEIGHTS, committed
    from .stages import reconstruct

    target = Path(directory)
    sources = {name: open_source(where, name) for name, where in stages.items()}
    if BASE in sources and sources[BASE].family != BASE:
        raise ValueError(f"{target}: the base is no base stage but a {sources[BASE].family}")
    shape = () if BASE in sources else _prior_shape(sources.get("autoencoder"), target)
    sampler = reconstruct(BaseSampler, dict(defaults or {}), "defaults")

    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        origins = {}
        for name, source in sources.items():
            origin, place = source.directory(), draft / name
            place.mkdir()
            origins[name] = {"pretrained": source.where, "weights_sha256": source.weights_sha256()}
            if source.pretrained:
                for file in files(origin):
                    copied = place / MODEL / file.relative_to(origin)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
                described = {"kind": "pretrained", "config": {"family": source.family}}
                _write(place / CONFIG, described)
            else:
                for file in (CONFIG, WEIGHTS):
                    shutil.copyfile(origin / file, place / file)
                done = committed(origin) or {}
                origins[name] |= {"pretrained": None, "fingerprint": done.get("fingerprint")}
        places = {name: draft / name for name in sources}
        beside = stage_samplers(samplers or {})
        generator = open_stages(places, sampler, beside, "cpu", "fp32", shape)
        for name in DENOISING:
            if name in sources:
                done = committed(sources[name].directory())
                _same_encoders(name, done, sources, generator.resolution)
        described = {
            "format": FORMAT,
            "stages": origins,
            "resolution": generator.resolution,
            "defaults": generator.defaults,
        }
        if shape:
            described["latent_shape"] = shape
        if generator.samplers:
            described["samplers"] = {name: asdict(it) for name, it in generator.samplers.items()}
        if given := generator.given:
            described["given"] = given
        _write(draft / GENERATOR, described)
        draft.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _prior_shape(autoencoder: Any, target: Path) -> tuple[int, ...]:
    """Of the latents of an autoencoder that draws alone. ValueError where its latents are held to
    no N(0, I)."""
    from .results import committed

    done = (
        None
        if autoencoder is None or autoencoder.pretrained
        else committed(autoencoder.directory())
    )
    if not done:
        raise ValueError(
            f"{target}: a generator needs a base stage, or an autoencoder stage of the line's that "
            "draws alone"
        )
    if done["config"].get("network", {}).get("codebook"):
        raise ValueError(
            f"{target}: the autoencoder's latents are vectors of a codebook, which no Gaussian "
            "draws: give a base stage too"
        )
    return tuple(done["measured"]["latent_shape"])


def open_stages(
    directories: Mapping[str, Path],
    sampler: BaseSampler,
    samplers: Mapping[str, StageSampler],
    device: torch.device | str,
    precision: str,
    latent_shape: tuple[int, ...] = (),
) -> Generator:
    """The generator of these stage folders; `latent_shape` is that of one without a base.
    ValueError when a stage needs another one."""
    from .encoders import LOADERS
    from .encoders.autoencoder import open_codec
    from .encoders.sources import open_source
    from .stages import load

    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: got {precision!r}, wanted 'bf16' or 'fp32'")
    drawing: dict[str, Any] = {
        n: load(directories[n]).to(device) for n in DENOISING if n in directories
    }
    base: Any = drawing.get(BASE)
    texts: list[str] = []
    wanted = ["autoencoder"] if base is None or base.config.data == "moments" else []
    for name, stage in drawing.items():
        needed = [*stage.config.texts, *(["clip"] if stage.config.hears_embedding else [])]
        texts += (it for it in needed if it not in texts)
        first = wanted if name == BASE else []
        if missing := [it for it in (*first, *needed) if it not in directories]:
            raise ValueError(
                f"the {name} stage needs {', '.join(missing)} too (given: {', '.join(directories)})"
            )
    wanted += texts
    sources = {name: open_source(directories[name], name) for name in wanted}
    codec = open_codec(sources["autoencoder"], device) if "autoencoder" in sources else None
    encoders = {name: LOADERS[sources[name].family](sources[name], device) for name in texts}
    judge, noisy, editor = (
        load(directories[name]).to(device) if name in directories else None
        for name in ("classifier", "noisy_clip", "edit")
    )
    shape = tuple(latent_shape if base is None else base.latent_shape.tolist())
    side = shape[-1]
    if codec is not None:
        with torch.no_grad():
            side = codec.decode(torch.zeros(1, *shape, device=device)).shape[-1]
    enlarging = {name: drawing[name] for name in ENLARGING if name in drawing}
    for name, stage in enlarging.items():
        if stage.config.map:
            raise ValueError(
                f"{name}.config.map: the base alone is told label maps; set it to null"
            )
        low = stage.config.low
        if low is None or low.side != side:
            raise ValueError(
                f"{name} enlarges pictures of {low.side if low else 0} px, and those before it are "
                f"of {side} px: set {name}.config.low.side={side}"
            )
        side = stage.latent_shape.tolist()[-1]
    beside = {name: samplers.get(name, StageSampler()) for name in drawing if name != BASE}
    check_samplers(base, sampler, enlarging, beside)
    return Generator(
        base=base,
        codec=codec,
        encoders=encoders,
        sampler=sampler,
        resolution=side,
        precision=precision,
        classifier=judge,
        clip=directories["clip"] if "clip" in sources else None,
        noisy_clip=noisy,
        editor=editor,
        prior=drawing.get(PRIOR),
        enlarging=enlarging,
        samplers=beside,
        latent_shape=shape,
    )


def _same_encoders(
    stage: str, done: Mapping[str, Any] | None, sources: Mapping[str, Any], resolution: int
) -> None:
    """ValueError when an encoder is not the one whose numbers a stage learned from."""
    from .encoders import spec_of

    for encoding in (done or {}).get("encodings", ()):
        name = encoding["name"]
        if (source := "clip" if name == PICTURE_EMBEDDING else name) in sources:
            side = encoding.get("side", resolution) if encoding["kind"] == "image" else None
            shown = {key: encoding[key] for key in ("buckets", "flip") if key in encoding}
            precision = encoding.get("precision", "fp32")
            given = spec_of(sources[source], name, side, **shown, precision=precision).fingerprint
            if given != encoding["fingerprint"]:
                raise ValueError(
                    f"{source} at {sources[source].where} is encoder {given}, the {stage} was "
                    f"trained with {encoding['fingerprint']}: give that one, or train the {stage} "
                    "anew"
                )


def _write(path: Path, described: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
