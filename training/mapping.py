"""Label maps: which class each pixel of a picture has, and how a base is told it (LDM, Rombach et
al. 2022, section 4.3.2, semantic synthesis).

In training the pictures themselves make them, by the nearest of given colours or by a frozen
segmenter; afterwards a caller gives them. The network has a channel for each class beside what is
noisy: of each square that becomes one of its places, the share that has the class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from .encoders.segmenter import Segmenter

Pixels = UInt8[Tensor, "batch 3 height width"]
Map = Int64[Tensor, "batch height width"]
Colour = tuple[int, int, int]
"""sRGB, 0 to 255."""
MOST = 256
"""Classes: a byte has as many."""


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """What classes there are, and what makes maps of pictures: a palette or a segmenter."""

    kind: Literal["map"] = "map"
    palette: tuple[tuple[str, Colour], ...] = ()
    """Class and its colour: a pixel has the class whose colour is nearest in sRGB."""
    segmenter: str = ""
    """A folder or hub id with a semantic segmenter of transformers. Only what makes maps of
    pictures opens it: a trained base draws without it."""
    classes: tuple[str, ...] = ()
    """A segmenter's, in the order of its outputs; by default as its config says."""
    dropout: float = 0.0
    """Share of rows that are trained without their map, which is then 0 in all channels; guidance
    leads towards the map as well where there are such rows. The caption is dropped independently.
    """

    def __post_init__(self):
        palette = tuple((name, tuple(colour)) for name, colour in self.palette)
        object.__setattr__(self, "palette", palette)
        object.__setattr__(self, "classes", tuple(self.classes))
        if bool(self.palette) == bool(self.segmenter):
            raise ValueError(
                "map: got "
                + ("a palette and a segmenter" if self.palette else "no palette and no segmenter")
                + ", wanted one of the two, which makes the maps of the training's pictures"
            )
        if self.palette and self.classes:
            raise ValueError("map.classes: the palette names them; leave them out")
        odd = [name for name, colour in palette if not all(0 <= it <= 255 for it in colour)]
        if odd:
            raise ValueError(f"map.palette: {odd[0]} is no sRGB colour of 0 to 255 each")
        # Two of a segmenter's may well be named alike.
        if self.palette and len({*self.names}) < len(self.names):
            raise ValueError(f"map.palette: wanted different names, got {', '.join(self.names)}")
        if self.names and not 2 <= len(self.names) <= MOST:
            raise ValueError(f"map: got {len(self.names)} classes, wanted 2 to {MOST}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"map.dropout must lie in [0, 1), got {self.dropout}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, by index; none where the segmenter's are not known yet."""
        return tuple(name for name, _ in self.palette) if self.palette else self.classes

    @property
    def colours(self) -> UInt8[np.ndarray, "class 3"]:
        """In which maps are shown: the palette's, else those of PASCAL VOC's maps."""
        if self.palette:
            return np.array([colour for _, colour in self.palette], np.uint8)
        index, shown = np.arange(len(self.names)), np.zeros((len(self.names), 3), np.uint8)
        for bit in range(3):
            for channel in range(3):
                taken = index >> (3 * bit + channel) & 1
                shown[:, channel] |= (taken << (7 - bit)).astype(np.uint8)
        return shown


class Mapper:
    """Pictures -> their maps. A segmenter is opened where the first pictures are; it is part of
    nothing that is trained or saved."""

    def __init__(self, config: MapConfig):
        if not config.names:
            raise ValueError(
                f"map.classes: it is not known what classes {config.segmenter} has; name them, or "
                "give a segmenter that is here"
            )
        self.config = config
        self.opened: dict[torch.device, Segmenter] = {}

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> Map:
        if self.config.palette:
            return nearest(pixels, [colour for _, colour in self.config.palette])
        return self._segmenter(pixels.device)(pixels)

    @property
    def digest(self) -> str:
        """Of what makes the maps: the palette, or the segmenter's weights."""
        if self.config.palette:
            said = repr(self.config.palette).encode()
            return hashlib.blake2b(said, digest_size=8).hexdigest()
        from .encoders.sources import open_source

        return open_source(self.config.segmenter, "segmenter").weights_sha256()

    def _segmenter(self, device: torch.device) -> Segmenter:
        if device not in self.opened:
            from .encoders import segmenter

            found = segmenter.load(self.config.segmenter, device)
            if len(found.names) != len(self.config.names):
                raise ValueError(
                    f"map.classes: {len(self.config.names)} classes are named, the segmenter in "
                    f"{self.config.segmenter} has {len(found.names)}; leave them out"
                )
            self.opened[device] = found
        return self.opened[device]


def nearest(pixels: Pixels, colours: Sequence[Colour]) -> Map:
    """The index of the colour that is nearest to each pixel in sRGB, the first of equals."""
    # Whole numbers, whatever the autocast: of a product in bfloat16 ties would be made and broken.
    x = pixels.int()
    away = [
        (x - x.new_tensor(colour)[:, None, None]).square().sum(1, dtype=torch.int32)
        for colour in colours
    ]
    least, found = away[0], torch.zeros_like(away[0], dtype=torch.int64)
    for index, distance in enumerate(away[1:], 1):
        nearer = distance < least
        least = torch.where(nearer, distance, least)
        found = torch.where(nearer, index, found)
    return found


def shares(maps: Map, classes: int, side: int) -> Float[Tensor, "batch class side side"]:
    """Of each square of pixels, the share of each class: the mean of one-hot channels, which for
    many classes and pixels would not fit. ValueError unless maps are squares of a multiple of
    `side`."""
    rows, height, width = maps.shape
    factor = height // side
    if height != width or height % side:
        raise ValueError(
            f"maps of {width} x {height} pixels cannot be shrunk to {side} x {side}: wanted "
            "squares whose side is a multiple of it"
        )
    squares = maps.reshape(rows, side, factor, side, factor).transpose(2, 3).flatten(3)
    counted = torch.zeros(rows, side, side, classes, device=maps.device)
    counted.scatter_add_(3, squares, torch.ones_like(squares, dtype=counted.dtype))
    return counted.permute(0, 3, 1, 2) / factor**2
