"""The frozen encoders that `pipeline.encode` is handed: pictures -> latents, captions -> tokens.

One comes from a stage that was trained here or from a pretrained model (a local folder or a hub id,
safetensors only). Either way it is one class per family, and its fingerprint covers all that can
change a number it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.manifest import fingerprint
from pipeline.schema import EncoderSpec

from . import autoencoder, clip, t5
from .sources import Source, open_source

__all__ = ["build", "spec_of"]

LOADERS: Mapping[str, Callable[..., Any]] = {
    "autoencoder": autoencoder.load,
    "clip": clip.load,
    "t5": t5.load,
}
VERSIONS = {"autoencoder": 1, "clip": 2, "t5": 1}
"""Raised by hand when the code of a family gives other numbers."""


def spec_of(source: str | Source, name: str, side: int | None = None) -> EncoderSpec:
    """The encoder of a stage directory or of a pretrained model (folder or hub id, "#subfolder").

    `name` begins the names of its batch fields. A stage knows its family; that of a pretrained
    model is the name up to an underscore: "autoencoder", "clip" or "t5". `side` is what pictures
    are fitted to, in pixels.
    """
    found = open_source(source, name)
    if found.family not in LOADERS:
        raise ValueError(
            f"encoder {name}: a stage of kind {found.family!r} encodes nothing; "
            f"wanted {', '.join(LOADERS)}"
        )
    image = found.family == "autoencoder"
    if image and not side:
        raise ValueError(f"encoder {name}: say the side in pixels that pictures are fitted to")
    identity = {
        "family": found.family,
        "version": VERSIONS[found.family],
        "weights": found.weights_sha256(),
        "config": found.config(),
        "dtype": "float32",
        "stored": "float16",
        "side": side if image else None,
    }
    return EncoderSpec(
        name,
        "image" if image else "text",
        fingerprint(identity),
        {**found.options(), "batch": 64 if image else 256},
        side if image else None,
    )


def build(spec: EncoderSpec) -> Callable[..., Any]:
    """The encoder that a spec names, on a GPU where there is one: what `pipeline.encode` is handed.

    Pictures: uint8 [n, 3, side, side] -> {"moments": float16 [n, 2C, h, w]}, mean and log-variance
    (C channels, the latent itself, where there is no posterior). Text: n captions -> (n arrays
    float16 [length, width], float16 [n, width]). ValueError when the weights are others.
    """
    source = Source.of(spec.options, spec.name)
    now = spec_of(source, spec.name, spec.side)
    if now.fingerprint != spec.fingerprint:
        raise ValueError(
            f"encoder {spec.name} at {source.where}: its weights or config are {now.fingerprint}, "
            f"the spec names {spec.fingerprint}; make a new spec, or put the old weights back"
        )
    return LOADERS[source.family](source, "cuda" if torch.cuda.is_available() else "cpu")
