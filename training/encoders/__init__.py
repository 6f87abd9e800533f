"""The frozen encoders that `pipeline.encode` is handed: pictures -> latents or embeddings, captions
-> tokens.

One comes from a stage that was trained here or from a pretrained model (a local folder or a hub id,
safetensors only). Either way it is one class per family, and its fingerprint covers all that can
change a number it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.manifest import fingerprint
from pipeline.schema import PICTURE_EMBEDDING, Bucket, EncoderSpec, framing

from . import autoencoder, clip, t5
from .shapes import clip_shape
from .sources import Source, open_source

__all__ = ["build", "spec_of"]

LOADERS: Mapping[str, Callable[..., Any]] = {
    "autoencoder": autoencoder.load,
    "clip": clip.load,
    PICTURE_EMBEDDING: clip.load_image,
    "t5": t5.load,
}
PICTURES = ("autoencoder", PICTURE_EMBEDDING)
"""The families that encode pictures."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""In what an encoder computes; its weights are float32, what is stored is float16."""
VERSIONS = {"autoencoder": 1, "clip": 2, PICTURE_EMBEDDING: 1, "t5": 1}
"""Raised by hand when the code of a family gives other numbers."""


def spec_of(
    source: str | Source,
    name: str,
    side: int | None = None,
    buckets: Sequence[Bucket] = (),
    flip: bool = False,
    precision: str = "fp32",
) -> EncoderSpec:
    """The encoder of a stage directory or of a pretrained model (folder or hub id, "#subfolder").

    `name` begins the names of its batch fields. A stage knows its family; that of a pretrained
    model is the name up to an underscore: "autoencoder", "clip" or "t5". `side` is what pictures
    are fitted to, in pixels; `buckets` and `flip` are as in `EncoderSpec`. A CLIP by the
    name "clip_image" is its image tower, which sees squares of its own side.

    With `precision` "bf16" the weights stay float32 and most of the products are taken in bfloat16:
    faster on a GPU, and another encoder.
    """
    found = open_source(source, name)
    family = _family(found, name)
    if family not in LOADERS:
        raise ValueError(
            f"encoder {name}: a stage of kind {found.family!r} encodes nothing; "
            f"wanted {', '.join(LOADERS)}"
        )
    if precision not in DTYPES:
        raise ValueError(
            f"encoder {name}: precision is {precision!r}, wanted {' or '.join(DTYPES)}"
        )
    image = family in PICTURES
    if family == PICTURE_EMBEDDING:
        if buckets or flip:
            raise ValueError(f"encoder {name}: CLIP sees squares, as they are: no buckets, no flip")
        side = clip_shape(found)[0]
    if image and not side:
        raise ValueError(f"encoder {name}: say the side in pixels that pictures are fitted to")
    identity = {
        "family": family,
        "version": VERSIONS[family],
        "weights": found.weights_sha256(),
        "config": found.config(),
        "dtype": DTYPES[precision],
        "stored": "float16",
        "side": side if image else None,
        **framing(side, buckets, flip),
    }
    return EncoderSpec(
        name,
        "image" if image else "text",
        fingerprint(identity),
        {**found.options(), "batch": 64 if image else 256, "precision": precision},
        side if image else None,
        tuple(buckets),
        flip,
    )


def build(spec: EncoderSpec) -> Callable[..., Any]:
    """The encoder that a spec names, on a GPU where there is one: what `pipeline.encode` is handed.

    Pictures: uint8 [n, 3, height, width] -> {"moments": float16 [n, 2C, h, w]}, mean and
    log-variance (C channels, the latent itself, where there is no posterior), or by CLIP's image
    tower {"clip_image_pooled": float16 [n, width]}, of length 1. Text: n captions ->
    (n arrays float16 [length, width], float16 [n, width]). ValueError when the weights are others.
    """
    source = Source.of(spec.options, spec.name)
    precision = spec.options.get("precision", "fp32")
    now = spec_of(source, spec.name, spec.side, spec.buckets, spec.flip, precision)
    if now.fingerprint != spec.fingerprint:
        raise ValueError(
            f"encoder {spec.name} at {source.where}: its weights or config are {now.fingerprint}, "
            f"the spec names {spec.fingerprint}; make a new spec, or put the old weights back"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LOADERS[_family(source, spec.name)](source, device, precision)


def _family(source: Source, name: str) -> str:
    return name if source.family == "clip" and name == PICTURE_EMBEDDING else source.family
