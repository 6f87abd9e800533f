"""What an encoder gives, read from its config alone: nothing is loaded.

`foreseen` fetches nothing either: it is for planning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .sources import Source, here, open_source


@dataclass(frozen=True)
class Shape:
    """What an encoder gives."""

    width: int
    """Of tokens; channels of latents."""
    pooled: int = 0
    tokens: Literal["", "pairs", "pieces", "bytes"] = ""
    """What a caption is cut into: CLIP's byte pairs, T5's sentence pieces, the bytes of a T5 of
    ours that has no vocabulary."""
    limit: int = 0
    """Tokens that are read at most."""
    factor: int = 1
    """Pixels per latent position, along a side."""
    posterior: bool = True
    """Whether mean and log-variance are stored, or the latent alone."""
    repeats: int = 0
    """How much of a token's width depends on the word alone; it is stored once for each word."""
    patches: int = 0
    """Of a CLIP: channels of its image tower's features."""
    known: Literal["by config", "as published", "assumed"] = "by config"


def _clip(width: int, patches: int) -> Shape:
    return Shape(2 * width, width, "pairs", limit=77, repeats=width, patches=patches)


def _t5(width: int) -> Shape:
    return Shape(width, width, "pieces", 256)


PUBLISHED: Mapping[str, Shape] = {
    "stabilityai/sd-vae-ft-ema": Shape(4, factor=8),
    "stabilityai/sd-vae-ft-mse": Shape(4, factor=8),
    "stabilityai/sdxl-vae": Shape(4, factor=8),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": _clip(512, 768),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": _clip(768, 1024),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(1024, 1280),
    "google/flan-t5-base": _t5(768),
    "google/flan-t5-large": _t5(1024),
    "google/flan-t5-xl": _t5(2048),
    "google/flan-t5-xxl": _t5(4096),
}
"""By hub id, as their model cards and configs state them."""
USUAL: Mapping[str, Shape] = {
    "autoencoder": PUBLISHED["stabilityai/sd-vae-ft-mse"],
    "clip": PUBLISHED["laion/CLIP-ViT-L-14-laion2B-s32B-b82K"],
    "t5": PUBLISHED["google/flan-t5-xl"],
}


def foreseen(name: str, config: Any, pretrained: str | None) -> Shape:
    """What an encoder will give: by its stage's config, or by a pretrained model's where that is
    here, as PUBLISHED where it is listed, and else what is usual, "assumed". Nothing is fetched.
    """
    if pretrained is None:
        if name == "autoencoder":
            return Shape(config.network.latent_channels, factor=config.network.factor)
        if name == "clip":
            patches = _tower_width(asdict(config.image))
            text = config.text
            return Shape(
                2 * text.width,
                config.embed,
                "pairs",
                repeats=text.width,
                limit=text.context,
                patches=patches,
            )
        width, limit = config.width, config.limit
        if config.vocabulary:
            return Shape(2 * width, width, "pairs", limit, repeats=width)
        return Shape(width, width, "bytes", limit)
    found = here(pretrained)
    if found is None:
        if pretrained in PUBLISHED:
            return replace(PUBLISHED[pretrained], known="as published")
        return replace(USUAL[name], known="assumed")
    source = open_source(found, name)
    if not source.pretrained:
        from ..stages import config_of

        return foreseen(name, config_of(source.family, source.config()), None)
    if name != "autoencoder":
        width, pooled = text_widths(str(found), name)
        patches, repeats = 0, width // 2 if name == "clip" else 0
        if name == "clip":
            with suppress(ValueError):  # which only alignment needs to know
                patches = patch_width(source)
        return replace(USUAL[name], width=width, pooled=pooled, repeats=repeats, patches=patches)
    described = _json(found, "config.json")
    blocks = described.get("block_out_channels") or described.get("encoder_block_out_channels")
    return Shape(
        described["latent_channels"],
        factor=2 ** (len(blocks) - 1) if blocks else 8,  # TAEF2's says nothing
        posterior=described.get("_class_name") == "AutoencoderKL",
    )


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
        if source.pretrained:
            width = _json(source.directory(), "config.json")["d_model"]
            return width, width
        config = source.config()
        width = config["width"]
        return 2 * width if config.get("vocabulary") else width, width
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


def patch_width(where: str | Source) -> int:
    """Channels of the features that `perceptual.patches` gives. ValueError where the config does
    not say."""
    source = open_source(where, "alignment")
    if not source.pretrained:
        return _tower_width(source.config()["image"])
    if (source.directory() / "open_clip_config.json").is_file():
        return _tower_width(_model_cfg(source)["vision_cfg"])
    described = _json(source.directory(), "config.json")
    described = described.get("vision_config", described)
    found = described.get("hidden_size") or described.get("num_features")
    found = found or (described.get("hidden_sizes") or [0])[-1]
    if not found:
        raise ValueError(f"{source.where}: its config says no width: set alignment.width")
    return found


def class_names(where: str | Source) -> tuple[str, ...]:
    """The classes of a semantic segmenter of transformers, in the order of its outputs."""
    source = open_source(where, "segmenter")
    if not source.pretrained:
        raise ValueError(
            f"{source.where}: a stage of kind {source.family!r}, wanted a semantic segmenter of "
            "transformers"
        )
    named = _json(source.directory(), "config.json").get("id2label")
    if not named:
        raise ValueError(f"{source.where}: its config names no classes (id2label): set map.classes")
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _tower_width(vision: Mapping[str, Any]) -> int:
    """Of the last features of an image tower of open_clip's."""
    layers = vision.get("layers", 12)
    if vision.get("timm_model_name") or "width" not in vision:
        raise ValueError("the CLIP's config says no width of its image tower: set alignment.width")
    return vision["width"] * (32 if isinstance(layers, list | tuple) else 1)


def _model_cfg(source: Source) -> Any:
    described = _json(source.directory(), "open_clip_config.json")
    return described.get("model_cfg", described)


def _json(directory: Any, name: str) -> Any:
    try:
        return json.loads((directory / name).read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory}: no {name}, so not a model of the kind wanted") from None
