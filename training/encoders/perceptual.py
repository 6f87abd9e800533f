"""Feature maps of a frozen image network, for the perceptual loss.

Up to five, spread evenly over its depth. A network that reads one size only is given that size;
others see pictures as they are, enlarged if nothing would be left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..perceptual import Features, Image, Map
from .clip import normalisation, open_towers
from .sources import Source, open_source

LAYERS = 5


def load(where: str | Source, device: torch.device | str = "cpu") -> Features:
    """The features of a CLIP stage, of a folder or hub id with a CLIP of open_clip, or of a vision
    model of transformers (timm's too, where timm is installed). ValueError for anything else.
    """
    source = open_source(where, "perceptual")
    if not source.pretrained and source.family != "clip":
        raise ValueError(
            f"perceptual: {source.where} is a stage of kind {source.family!r}, wanted clip"
        )
    of_open_clip = not source.pretrained or (source.directory() / "open_clip_config.json").is_file()
    make = _open_clip if of_open_clip else _transformers
    maps, fitted, mean, std = make(source, torch.device(device))
    mean, std = (torch.tensor(it, device=device).view(3, 1, 1) for it in (mean, std))

    def features(x: Image) -> list[Map]:
        x = ((x + 1) / 2 - mean) / std
        if (size := fitted(x.shape[-2], x.shape[-1])) != x.shape[-2:]:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        found = maps(x)
        chosen = np.linspace(0, len(found) - 1, min(LAYERS, len(found))).round().astype(int)
        return [_map(found[number]) for number in chosen.tolist()]

    return features


Size = tuple[int, int]
Made = tuple[
    Callable[[Tensor], Sequence[Tensor]],
    Callable[[int, int], Size],
    Sequence[float],
    Sequence[float],
]
"""(normalised pictures -> states, (height, width) -> the size it wants, mean and deviation of the
preparation)."""


def _open_clip(source: Source, device: torch.device) -> Made:
    model, _ = open_towers(source)
    visual = model.visual.to(device).eval().requires_grad_(False)

    def maps(x: Tensor) -> Sequence[Tensor]:
        return visual.forward_intermediates(x, intermediates_only=True)["image_intermediates"]

    # A ResNet's trunk, which shrinks 32 times, reads any size: its pooling has places, and is left
    # out.
    fitted = _at_least(32) if hasattr(visual, "attnpool") else _always(visual.image_size)
    return maps, fitted, *normalisation(source, model)


def _transformers(source: Source, device: torch.device) -> Made:
    from transformers import AutoImageProcessor, AutoModel

    directory = str(source.directory())
    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            directory, trust_remote_code=False, backend="pil"
        )
        loaded: Any = AutoModel.from_pretrained(
            directory,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"perceptual: {directory} holds no vision model of transformers and no CLIP of "
            f"open_clip ({reason})"
        ) from None
    model, info = loaded
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise ValueError(f"perceptual: the weights in {directory} lack {', '.join(missing[:4])}")
    model = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)

    def maps(x: Tensor) -> Sequence[Tensor]:
        return model(pixel_values=x, output_hidden_states=True).hidden_states

    of_timm = getattr(model.config, "pretrained_cfg", None) or {}
    side = getattr(model.config, "image_size", None)  # a transformer's
    if of_timm.get("fixed_input_size"):
        side = of_timm["input_size"][-2:]
    fitted = _at_least(1) if side is None else _always(side)
    if of_timm:
        return maps, fitted, of_timm["mean"], of_timm["std"]
    return maps, fitted, processor.image_mean, processor.image_std


def _always(side: int | Sequence[int]) -> Callable[[int, int], Size]:
    size = (side, side) if isinstance(side, int) else (side[0], side[1])
    return lambda height, width: size


def _at_least(side: int) -> Callable[[int, int], Size]:
    def fitted(height: int, width: int) -> Size:
        larger = max(1.0, side / min(height, width))
        return round(height * larger), round(width * larger)

    return fitted


def _map(states: Tensor) -> Map:
    """Tokens [B, L, C] stand in a column; maps are as they are."""
    return states if states.ndim == 4 else states.transpose(1, 2)[..., None]
