"""What an encoder gives, read from its config alone: nothing is loaded."""

from __future__ import annotations

import json
from typing import Any

from .sources import Source, open_source


def latent_channels(where: str) -> int:
    """Channels of an autoencoder's latents."""
    source = open_source(where, "autoencoder")
    if not source.pretrained:
        return source.config()["network"]["latent_channels"]
    return _json(source.directory(), "config.json")["latent_channels"]


def text_widths(where: str, name: str) -> tuple[int, int]:
    """(width of the tokens, width of the pooled vector) of a text encoder."""
    source = open_source(where, name)
    if source.family == "clip":
        if not source.pretrained:
            config = source.config()
            return 2 * config["text"]["width"], config["embed"]
        described = _model_cfg(source)
        return 2 * described["text_cfg"]["width"], described["embed_dim"]
    if source.family == "t5":
        width = (
            source.config()["width"]
            if not source.pretrained
            else _json(source.directory(), "config.json")["d_model"]
        )
        return width, width
    raise ValueError(f"{where}: a {source.family} is no text encoder; wanted clip or t5")


def clip_shape(source: Source) -> tuple[int, int]:
    """(side in pixels of the pictures, width of the embedding) of a CLIP."""
    if source.family != "clip":
        raise ValueError(f"{source.where}: a {source.family} is no CLIP")
    if not source.pretrained:
        config = source.config()
        return config["image"]["side"], config["embed"]
    described = _model_cfg(source)
    side = described["vision_cfg"].get("image_size", 224)
    if isinstance(side, list):
        if len(set(side)) != 1:
            raise ValueError(f"{source.where}: its CLIP sees {side} pixels, wanted a square")
        side = side[0]
    return side, described["embed_dim"]


def _model_cfg(source: Source) -> Any:
    described = _json(source.directory(), "open_clip_config.json")
    return described.get("model_cfg", described)


def _json(directory: Any, name: str) -> Any:
    try:
        return json.loads((directory / name).read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory}: no {name}, so not a model of the kind wanted") from None
