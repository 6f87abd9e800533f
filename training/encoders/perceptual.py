"""Feature maps of a frozen image network: for the perceptual loss those of several layers, for
alignment the last one's.

Of the former up to five, spread evenly over its depth. A network that reads one size only is given
that size; others see pictures as they are, enlarged if nothing would be left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..perceptual import Image, Map
from .clip import normalisation, open_towers
from .sources import Source, open_source, read_vision

LAYERS = 5
Found = TypeVar("Found")


def load(where: str | Source, device: torch.device | str = "cpu") -> Looking[list[Map]]:
    """The features of a CLIP stage, of a folder or hub id with a CLIP of open_clip, or of a vision
    model of transformers (timm's too, where timm is installed). ValueError for anything else.
    """
    made = _opened(where, torch.device(device), "perceptual")
    prepare = _preparation(made, device)

    def features(x: Image) -> list[Map]:
        found = made.maps(prepare(x))
        chosen = np.linspace(0, len(found) - 1, min(LAYERS, len(found))).round().astype(int)
        return [_map(found[number]) for number in chosen.tolist()]

    return Looking(made.network, features)


@dataclass(frozen=True)
class Looking(Generic[Found]):
    """What a frozen network makes of pictures in [-1, 1]."""

    network: nn.Module
    look: Callable[[Image], Found]

    def __call__(self, x: Image) -> Found:
        return self.look(x)


def patches(where: str | Source, device: torch.device | str = "cpu", side: int = 0) -> Looking[Map]:
    """The last layer's features at their places, [B, C, h, w], of what `load` opens too; without
    what a transformer has beside its patches. `side`: to which pictures are resized instead of the
    size that it was made for. ValueError for a network without places."""
    made = _opened(where, torch.device(device), "alignment")
    prepare = _preparation(made, device, side)

    def look(x: Image) -> Map:
        x = prepare(x)
        try:
            found = made.last(x)
        except (ValueError, AssertionError, RuntimeError) as error:
            if not side:
                raise
            raise ValueError(
                f"alignment.side: {side} px are not read by {where}: {error}"
            ) from error
        return found if found.ndim == 4 else _grid(found, (x.shape[-2], x.shape[-1]), made.patch)

    return Looking(made.network, look)


def _grid(states: Tensor, size: Size, patch: int) -> Map:
    """Tokens [B, L, C] of squares of pixels, row by row; what stands before them is left out."""
    rows, columns = (it // patch if patch else 0 for it in size)
    if not 0 < rows * columns <= states.shape[1]:
        raise ValueError(
            f"alignment: {states.shape[1]} states of {size[0]}x{size[1]} pixels have no places; "
            "wanted a network of feature maps, or of patches whose side its config says"
        )
    kept = states[:, states.shape[1] - rows * columns :]
    return kept.transpose(1, 2).unflatten(2, (rows, columns))


Size = tuple[int, int]


class Made(NamedTuple):
    """A network, frozen."""

    network: nn.Module
    maps: Callable[[Tensor], Sequence[Tensor]]
    """Normalised pictures -> states of its layers."""
    last: Callable[[Tensor], Tensor]
    """The states of its last, normalised as the network does."""
    fitted: Callable[[int, int], Size]
    """(height, width) -> the size it wants."""
    mean: Sequence[float]
    deviation: Sequence[float]
    """Of the preparation."""
    patch: int = 0
    """Side of the squares of pixels that its tokens are; 0: not known, or it has none."""


def _opened(where: str | Source, device: torch.device, key: str) -> Made:
    source = open_source(where, key)
    if not source.pretrained and source.family != "clip":
        raise ValueError(f"{key}: {source.where} is a stage of kind {source.family!r}, wanted clip")
    of_open_clip = not source.pretrained or (source.directory() / "open_clip_config.json").is_file()
    return _open_clip(source, device) if of_open_clip else _transformers(source, device, key)


def _preparation(made: Made, device: torch.device | str, side: int = 0) -> Callable[[Image], Image]:
    mean, std = (
        torch.tensor(it, device=device).view(3, 1, 1) for it in (made.mean, made.deviation)
    )

    def prepare(x: Image) -> Image:
        x = ((x + 1) / 2 - mean) / std
        size = (side, side) if side else made.fitted(x.shape[-2], x.shape[-1])
        if size != x.shape[-2:]:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return x

    return prepare


def _open_clip(source: Source, device: torch.device) -> Made:
    model, _ = open_towers(source)
    visual = model.visual.to(device).eval().requires_grad_(False)

    def maps(x: Tensor, **asked: Any) -> Sequence[Tensor]:
        found = visual.forward_intermediates(x, intermediates_only=True, **asked)
        return found["image_intermediates"]

    def last(x: Tensor) -> Tensor:
        return maps(x, indices=1, normalize_intermediates=True)[-1]

    # A ResNet's trunk, which shrinks 32 times, reads any size: its pooling has places, and is left
    # out.
    fitted = _at_least(32) if hasattr(visual, "attnpool") else _always(visual.image_size)
    return Made(visual, maps, last, fitted, *normalisation(source, model))


def _transformers(source: Source, device: torch.device, key: str) -> Made:
    from transformers import AutoModel

    directory = str(source.directory())
    refused = f"{key}: {directory} holds no vision model of transformers and no CLIP of open_clip"
    model, processor, missing = read_vision(AutoModel, directory, refused)
    if missing := [name for name in missing if "pooler" not in name]:
        raise ValueError(f"{key}: the weights in {directory} lack {', '.join(missing[:4])}")
    model = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)

    def maps(x: Tensor) -> Sequence[Tensor]:
        return model(pixel_values=x, output_hidden_states=True).hidden_states

    def last(x: Tensor) -> Tensor:
        return model(pixel_values=x).last_hidden_state

    of_timm = getattr(model.config, "pretrained_cfg", None) or {}
    side = getattr(model.config, "image_size", None)  # a transformer's
    if of_timm.get("fixed_input_size"):
        side = of_timm["input_size"][-2:]
    fitted = _at_least(1) if side is None else _always(side)
    if of_timm:
        return Made(model, maps, last, fitted, of_timm["mean"], of_timm["std"])
    patch = getattr(model.config, "patch_size", 0)
    patch = patch if isinstance(patch, int) else 0
    return Made(model, maps, last, fitted, processor.image_mean, processor.image_std, patch)


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
