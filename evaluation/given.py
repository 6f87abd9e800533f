"""What a model is told beside the prompt: a class, a small copy of a picture, or its label map.

A prompt of drawn scenes brings a scene of its truth, drawn anew; a caption its held-out picture. A
model is given of them what its stages are told, and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch.nn.functional import interpolate

from pipeline import shapes, storage
from pipeline.images import decode
from pipeline.outcomes import Rejected

from .prompts import Prompt
from .sample import Pictures
from .shapes_oracle import ATTRIBUTES

if TYPE_CHECKING:
    from pipeline.load import Loader

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Maps = UInt8[ndarray, "n height width"]
"""The index of each pixel's class."""
Pictured = Callable[[Sequence[Prompt]], Pictures]
"""The real pictures of prompts, one each."""


@dataclass(frozen=True)
class Given:
    """What is told beside prompts: one of each for a prompt, None where nothing is."""

    labels: Sequence[Mapping[str, Any]] | None = None
    low: Pictures | None = None
    """Small copies of `real`."""
    real: Pictures | None = None
    map: Maps | None = None
    """Label maps of `real`."""
    colours: UInt8[ndarray, "class 3"] | None = None
    """In which maps are shown."""

    @classmethod
    def of(
        cls,
        generator: Any,
        prompts: Sequence[Prompt],
        pictured: Pictured | None = None,
        classifier: bool = False,
    ) -> Given:
        """What a generator is told: labels where stages, or with `classifier` its classifier, read
        them; pictures where its base enlarges some, or is told their label maps. ValueError
        where that has none.
        """
        labels = low = real = map = colours = None
        maps = bool(getattr(generator, "map_classes", ()))
        if classifier or getattr(generator, "reads_labels", False):
            labels = labels_of(generator, prompts, classifier)
        if (side := getattr(generator, "low_side", 0)) or maps:
            if pictured is None:
                does = "enlarges pictures" if side else "draws by the label maps of pictures"
                raise ValueError(f"this model {does}, and its prompts bring none")
            real = pictured(prompts)
            drawn = getattr(generator, "resolution", 0)
            if drawn and real.shape[1] != drawn:
                raise ValueError(
                    f"this model draws pictures of {drawn} px, and the prompts bring some of "
                    f"{real.shape[1]} px: ask it for prompts of data of {drawn} px"
                )
            low = shrunk(real, side).round().astype(np.uint8) if side else None
        if maps:
            map, colours = generator.mapped(real), generator.map_colours
        return cls(labels, low, real, map, colours)

    def options(self, rows: slice = slice(None)) -> dict[str, Any]:
        """As a call of the generator takes them."""
        told = {"labels": self.labels, "low": self.low, "map": self.map}
        return {name: it[rows] for name, it in told.items() if it is not None}

    @property
    def shown(self) -> Pictures | None:
        """What was given, to look at: maps in the colours of their classes, or small copies."""
        if self.map is None or self.colours is None:
            return self.low
        return self.colours[self.map]


def labels_of(
    generator: Any, prompts: Sequence[Prompt], classifier: bool = False
) -> list[Mapping[str, Any]]:
    """What the prompts' truths say to the attributes that the generator's stages, and its
    `classifier`, know. A class is told whole: where a truth leaves a part open, there is none.
    """
    known: Mapping[str, Sequence[str]] | None = getattr(
        generator, "answers" if classifier else "classes", None
    )
    truths = [it.truth or {} for it in prompts]
    if known is None:  # a painter of another make
        return truths
    joint: set[str] = {*generator.classes}
    found: list[Mapping[str, Any]] = []
    for truth in truths:
        said = {it: truth[it] for it, answers in known.items() if truth.get(it) in answers}
        left = set() if joint <= said.keys() else joint
        found.append({name: answer for name, answer in said.items() if name not in left})
    return found


def asked_of(generator: Any) -> tuple[str, ...]:
    """The attributes of drawn scenes that a generator can be asked for: all, but of one that is
    told classes and nothing else those of its classes."""
    shown = getattr(generator, "low_side", 0) or getattr(generator, "map_classes", ())
    silent = not getattr(generator, "reads_text", True) and not shown
    if not silent or not getattr(generator, "reads_labels", False):
        return ATTRIBUTES
    return tuple(name for name in ATTRIBUTES if name in generator.classes)


def truths_of(prompts: Sequence[Prompt], attributes: Sequence[str]) -> list[Mapping[str, Any]]:
    """What the prompts ask for of these attributes; a scene of two objects is asked for whole."""
    truths = (it.truth or {} for it in prompts)
    return [
        it if "objects" in it else {name: it[name] for name in attributes if name in it}
        for it in truths
    ]


def drawn_for(prompts: Sequence[Prompt], side: int, seed: int) -> Pictures:
    """A scene of each prompt's truth, `side` pixels a side: a function of truth, seed and place."""
    scenes = [shapes.scene_of(it.truth or {}, seed, place) for place, it in enumerate(prompts)]
    return np.stack([shapes.draw(it, side) for it in scenes])


def held_out(prompts: Sequence[Prompt], loader: Loader) -> Pictures:
    """The pictures whose captions the prompts are, from a loader of `pixels`.

    ValueError for prompts whose picture it has not.
    """
    wanted: set[str | None] = {it.key for it in prompts}
    found: dict[str, ndarray] = {}
    for start in range(0, loader.samples, 256):
        if len(found) == len(wanted):
            break
        batch = loader.rows(np.arange(start, min(start + 256, loader.samples)))
        for key, pixels in zip(batch["key"], batch["pixels"], strict=True):
            if key in wanted:
                found[str(key)] = pixels.transpose(1, 2, 0)
    if missing := [it.text for it in prompts if it.key not in found]:
        raise ValueError(
            f"{len(missing)} prompts without a picture, {missing[0]!r:.80} first: take prompts and "
            "pictures of one version of the data"
        )
    return np.stack([found[str(it.key)] for it in prompts])


def read_pictures(
    place: str, side: int, does: str = "enlarges"
) -> dict[str, UInt8[ndarray, "side side 3"]]:
    """A picture file, or all of a folder, by their names without the suffix; `does` is what the
    model does with them. ValueError for one that is broken or not of this side, for two of one
    name, and where there is none.
    """
    found: dict[str, ndarray] = {}
    for name, file in _files(place, SUFFIXES).items():
        try:
            picture, _ = decode(storage.read_bytes(file))
        except Rejected as error:
            raise ValueError(f"{file}: {error}") from None
        if picture.size != (side, side):
            raise ValueError(
                f"{file}: got {picture.width} x {picture.height} pixels, wanted {side} x {side}, "
                f"which this model {does}"
            )
        found[name] = np.asarray(picture)
    return found


def read_maps(
    place: str, side: int, classes: Sequence[str]
) -> dict[str, UInt8[ndarray, "side side"]]:
    """A label map, or all of a folder, by their names: PNG files whose values, 8 bits of grey or
    places in a palette, are the indices of `classes`. ValueError for one that is broken, not of
    this side or of other classes, and where there is none.
    """
    from PIL import Image

    found: dict[str, ndarray] = {}
    for name, file in _files(place, (".png",)).items():
        data = storage.read_bytes(file)
        try:
            picture = Image.open(io.BytesIO(data), formats=["PNG"])
            read = np.array(picture) if picture.size == (side, side) else np.zeros(1)
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
            raise ValueError(f"{file}: no PNG file, or a broken one") from None
        # Grey of fewer bits was stretched to 8.
        if picture.mode != "P" and (picture.mode != "L" or data[24] != 8):
            raise ValueError(
                f"{file}: got colours of mode {picture.mode}, wanted indices of classes, as 8 bits "
                "of grey or places in a palette"
            )
        if picture.size != (side, side):
            raise ValueError(
                f"{file}: got {picture.width} x {picture.height} pixels, wanted {side} x {side}, "
                "the size of the pictures"
            )
        if read.max() >= len(classes):
            raise ValueError(
                f"{file}: got index {read.max()}, wanted 0 to {len(classes) - 1}: "
                f"{', '.join(classes)}"
            )
        found[name] = read
    return found


def _files(place: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """A file, or those of a folder that end so, by their names without the suffix. ValueError
    where there is none, and for two of one name.
    """
    if place.lower().endswith(suffixes):
        return {PurePosixPath(place).stem: place}
    found: dict[str, str] = {}
    for file in storage.list_names(place):
        if not file.lower().endswith(suffixes):
            continue
        if (name := PurePosixPath(file).stem) in found:
            raise ValueError(
                f"{storage.join(place, file)}: it has the name of {found[name]}, which names what "
                "is drawn; rename one"
            )
        found[name] = storage.join(place, file)
    if not found:
        raise ValueError(f"{place}: no picture there ({', '.join(suffixes)})")
    return found


def shrunk(pictures: Pictures, side: int) -> Float[ndarray, "n side side 3"]:
    """Means over squares of pixels. ValueError unless pictures are squares of a multiple."""
    n, height, width, _ = pictures.shape
    if height != width or height % side:
        raise ValueError(f"pictures of {width} x {height} pixels cannot be shrunk to {side}")
    factor = height // side
    return pictures.reshape(n, side, factor, side, factor, 3).mean((2, 4), dtype=np.float64)


def bicubic(pictures: Pictures, side: int) -> Pictures:
    """Enlarged by the cubic kernel of Keys (1981, a = -1/2), as Pillow and MATLAB do it."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    x = interpolate(x, (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
    return x.byte().permute(0, 2, 3, 1).numpy()
