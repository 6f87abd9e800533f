"""Which class each pixel has, by a frozen semantic segmenter of transformers (SegFormer, UPerNet,
BEiT, ...): what its own preparation and post-processing make of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mapping import Map, Pixels
from .shapes import class_names
from .sources import Source, open_source, read_vision


@dataclass(frozen=True)
class Segmenter:
    """(uint8 pictures) -> their label maps."""

    names: tuple[str, ...]
    network: Any
    prepare: Callable[[Pixels], Tensor]

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> Map:
        # Classes that are about as likely would be others in bfloat16.
        with torch.autocast(pixels.device.type, enabled=False):
            logits = self.network(pixel_values=self.prepare(pixels)).logits
            size = (pixels.shape[-2], pixels.shape[-1])
            return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)


def load(where: str | Source, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter in a folder or of a hub id. ValueError for anything else.

    Pictures are resized to the size that its preparation names, and normalised as it does.
    """
    from transformers import AutoModelForSemanticSegmentation

    source = open_source(where, "segmenter")
    directory = str(source.directory())
    refused = f"map.segmenter: {directory} holds no semantic segmenter of transformers"
    model, processor, missing = read_vision(AutoModelForSemanticSegmentation, directory, refused)
    if missing:
        raise ValueError(
            f"map.segmenter: the weights in {directory} lack {', '.join(missing[:4])}; wanted a "
            "model that was trained to segment"
        )
    network = model.to(device).eval().requires_grad_(False)
    return Segmenter(class_names(source), network, _preparation(processor, device))


def _preparation(processor: Any, device: torch.device | str) -> Callable[[Pixels], Tensor]:
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, deviation = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, deviation = processor.image_mean, processor.image_std
    shift, spread = (torch.tensor(it, device=device).view(3, 1, 1) for it in (mean, deviation))
    size = dict(processor.size or {}) if processor.do_resize else {}
    size = {name: pixels for name, pixels in size.items() if pixels}

    def fitted(height: int, width: int) -> tuple[int, int]:
        if "height" in size:
            return size["height"], size["width"]
        larger = size["shortest_edge"] / min(height, width) if "shortest_edge" in size else 1.0
        return round(height * larger), round(width * larger)

    def prepare(pixels: Pixels) -> Tensor:
        x, wanted = pixels.float(), fitted(pixels.shape[-2], pixels.shape[-1])
        if wanted != x.shape[-2:]:
            # Rounded to bytes, as its preparation does.
            x = F.interpolate(x, wanted, mode="bilinear", antialias=True).round().clamp(0, 255)
        return (x * scale - shift) / spread

    return prepare
