"""Drawn, captioned scenes with a known truth: the data set that is always at hand.

A scene is a pure function of (seed, index): flat shapes on a flat ground, drawn from signed
distances with one pixel of anti-aliasing. Its caption is worded in many ways; some wordings are
kept for evaluation alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 40, 38),
    "green": (38, 154, 60),
    "blue": (40, 70, 215),
    "yellow": (247, 216, 40),
    "purple": (140, 50, 175),
    "orange": (247, 134, 30),
    "cyan": (40, 195, 210),
    "brown": (118, 68, 28),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (16, 16, 16),
    "grey": (132, 132, 132),
    "pink": (250, 186, 206),
    "beige": (232, 214, 172),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: Mapping[str, float] = {"small": 0.15, "large": 0.25}
"""Radius as a share of the side, before a jitter of 5 %."""
PLACES: Mapping[str, tuple[float, float]] = {
    "top left": (0.3, 0.3),
    "top right": (0.7, 0.3),
    "centre": (0.5, 0.5),
    "bottom left": (0.3, 0.7),
    "bottom right": (0.7, 0.7),
}
"""Centre (x, y) as shares of the side, before a jitter of 2 %."""
RELATIONS: Mapping[str, tuple[float, float]] = {
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}
"""Direction (x, y) from the second object to the first."""

Wording = Literal["training", "heldout"]
_Floats = NDArray[np.float32]

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_GROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {"grey": ("grey", "gray")}
_THINGS = (
    "a {size} {colour} {shape}",
    "one {size} {colour} {shape}",
    "a {colour} {shape}, {size}",
    "a {size} {shape} in {colour}",
    "a {colour} {shape} of {size} size",
    "a {shape} that is {size} and {colour}",
    "a {size} {shape}, coloured {colour}",
)
_GROUNDS = (
    "on a {ground} background",
    "on {ground}",
    "against {ground}",
    "with a {ground} backdrop",
    "the background is {ground}",
    "on a {ground} canvas",
    "{ground} all around",
)
_ORDERS: Mapping[Wording, tuple[str, ...]] = {
    "training": (
        "{thing} {place} {on}",
        "{thing} {place}, {on}",
        "{thing}, {place}, {on}",
        "{thing}, {on}, {place}",
        "{on}, {thing} {place}",
        "{on}: {place}, {thing}",
        "{place} there is {thing}, {on}",
        "{place}, {thing}, {on}",
        "we see {thing} {place}, {on}",
        "a {ground} picture with {thing} {place}",
        "a picture of {thing} {place}, {on}",
        "{ground} background, {thing} {place}",
    ),
    "heldout": (
        "there is {thing} {place}, {on}",
        "{on}, there is {thing} {place}",
        "{place} we see {thing}, {on}",
        "a picture with {thing}, {on}, {place}",
    ),
}
"""A wording is an order of the parts; those kept for evaluation use the same parts and words."""
_PAIR_TEMPLATES: Mapping[Wording, tuple[str, ...]] = {
    "training": (
        "a {first} {relation} a {second} on a {ground} background",
        "on {ground}, a {first} {relation} a {second}",
        "a {ground} picture with a {first} {relation} a {second}",
        "there is a {first} {relation} a {second}, {ground} background",
        "one {first} {relation} one {second} against {ground}",
        "the {first} is {relation} the {second}, the background is {ground}",
    ),
    "heldout": (
        "there is a {first} {relation} a {second} against {ground}",
        "on a {ground} background, the {first} is {relation} the {second}",
        "a {ground} background with a {first} {relation} a {second}",
        "a picture with one {first} {relation} one {second}, the background is {ground}",
    ),
}


@dataclass(frozen=True)
class Object:
    """One drawn shape; x, y and radius are shares of the picture's side."""

    colour: str
    shape: str
    size: str
    place: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One object at a named place, or two in a named relation (the first to the second)."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None

    def truth(self) -> dict[str, Any]:
        """What the caption says, as JSON: the attributes an oracle must find in the pixels."""
        if self.relation is None:
            (it,) = self.objects
            return {
                "colour": it.colour,
                "shape": it.shape,
                "size": it.size,
                "place": it.place,
                "background": self.background,
            }
        return {
            "objects": [{"colour": it.colour, "shape": it.shape} for it in self.objects],
            "relation": self.relation,
            "background": self.background,
        }


def combination(truth: Mapping[str, Any]) -> str:
    """The combination of a truth, the unit that is held out as a whole: all attributes of one
    object; of two, which two they are, in whatever relation and on whatever ground. "Left of" told
    from the other side is the same picture, and 24,000 scenes show each of the 1,008 pairs.
    """
    if "objects" in truth:
        return "|".join(sorted(f"{it['colour']} {it['shape']}" for it in truth["objects"]))
    return "|".join(truth[name] for name in ("colour", "shape", "size", "place", "background"))


def scene(seed: int, index: int, objects: int = 1) -> Scene:
    """The scene at an index of the endless sequence that a seed names."""
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, got {objects}")
    draws = np.random.Generator(np.random.Philox(key=[seed, index]))
    background = _pick(draws, tuple(BACKGROUNDS))
    if objects == 1:
        size, place = _pick(draws, tuple(SIZES)), _pick(draws, tuple(PLACES))
        return Scene((_object(draws, size, place, PLACES[place]),), background)
    relation = _pick(draws, tuple(RELATIONS))
    return Scene(_pair(draws, relation), background, relation)


def scene_of(truth: Mapping[str, Any], seed: int, index: int) -> Scene:
    """A scene with these attributes and fresh jitter: what a prompt of this truth asks for."""
    draws = np.random.Generator(np.random.Philox(key=[seed, index]))
    if "objects" in truth:
        things = [
            replace(it, colour=asked["colour"], shape=asked["shape"])
            for it, asked in zip(_pair(draws, truth["relation"]), truth["objects"], strict=True)
        ]
        return Scene(tuple(things), truth["background"], truth["relation"])
    it = _object(draws, truth["size"], truth["place"], PLACES[truth["place"]])
    it = replace(it, colour=truth["colour"], shape=truth["shape"])
    return Scene((it,), truth["background"])


def caption(it: Scene, seed: int, index: int, wording: Wording = "training") -> str:
    """One of the wordings of a scene, drawn by (seed, index)."""
    draws = np.random.Generator(np.random.Philox(key=[seed + 0x5CE7E, index]))
    ground = _pick(draws, _GROUND_WORDS[it.background])
    if it.relation is not None:
        first, second = (f"{o.colour} {o.shape}" for o in it.objects)
        relation = it.relation.replace("left of", "to the left of").replace(
            "right of", "to the right of"
        )
        return _pick(draws, _PAIR_TEMPLATES[wording]).format(
            first=first, second=second, relation=relation, ground=ground
        )
    (one,) = it.objects
    assert one.place is not None
    thing = _pick(draws, _THINGS).format(
        size=_pick(draws, _SIZE_WORDS[one.size]),
        colour=one.colour,
        shape=one.shape,
    )
    return _pick(draws, _ORDERS[wording]).format(
        thing=thing,
        place=_place_words(draws, one.place),
        on=_pick(draws, _GROUNDS).format(ground=ground),
        ground=ground,
    )


def draw(it: Scene, side: int) -> NDArray[np.uint8]:
    """Pixels [side, side, 3] of a scene, sRGB."""
    x, y = _grid(side)
    picture = np.broadcast_to(_rgb(BACKGROUNDS[it.background]), (side, side, 3)).copy()
    for o in it.objects:
        distance = _distance(o.shape, (x - o.x) / o.radius, (y - o.y) / o.radius) * o.radius * side
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        picture += cover * (_rgb(COLOURS[o.colour]) - picture)
    return (picture + 0.5).astype(np.uint8)


def _rgb(colour: tuple[int, int, int]) -> _Floats:
    return np.array(colour, np.float32)


_GRIDS: dict[int, tuple[_Floats, _Floats]] = {}


def _grid(side: int) -> tuple[_Floats, _Floats]:
    if side not in _GRIDS:
        centres: _Floats = ((np.arange(side) + 0.5) / side).astype(np.float32)
        _GRIDS[side] = (centres[None, :], centres[:, None])
    return _GRIDS[side]


def _distance(shape: str, x: _Floats, y: _Floats) -> NDArray[np.floating[Any]]:
    """Signed distance (up to corners) to a shape of radius 1 whose bounding box is centred at 0."""
    match shape:
        case "circle":
            return np.hypot(x, y) - 1
        case "ring":
            return np.abs(np.hypot(x, y) - 0.76) - 0.24
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.88
        case "diamond":
            return (np.abs(x) + np.abs(y) - 1.15) * np.float32(0.7071)
        case "cross":
            wide = np.maximum(np.abs(x) - 1.0, np.abs(y) - 0.33)
            return np.minimum(wide, np.maximum(np.abs(x) - 0.33, np.abs(y) - 1.0))
        case "triangle":
            slope = np.float32(0.55)  # half the base over the height, apex up
            flank = (np.abs(x) - slope * (y + 0.95)) / np.hypot(1, slope)
            return np.maximum(flank, y - 0.95)
        case _:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _object(
    draws: np.random.Generator,
    size: str,
    place: str | None,
    centre: tuple[float, float],
    other: str | None = None,
) -> Object:
    colour = _pick(draws, tuple(c for c in COLOURS if c != other))
    shape = _pick(draws, SHAPES)
    jitter = draws.uniform(-1, 1, 3)
    x, y = centre[0] + 0.02 * jitter[0], centre[1] + 0.02 * jitter[1]
    radius = SIZES[size] * (1 + 0.05 * jitter[2])
    return Object(colour, shape, size, place, float(x), float(y), float(radius))


def _pair(draws: np.random.Generator, relation: str) -> tuple[Object, Object]:
    dx, dy = RELATIONS[relation]
    first = _object(draws, "small", None, (0.5 + 0.22 * dx, 0.5 + 0.22 * dy))
    second = _object(draws, "small", None, (0.5 - 0.22 * dx, 0.5 - 0.22 * dy), other=first.colour)
    return first, second


def _place_words(draws: np.random.Generator, place: str) -> str:
    if place == "centre":
        return _pick(draws, ("in the centre", "in the middle", "at the centre"))
    return _pick(draws, (f"in the {place} corner", f"at the {place}", f"in the {place}"))


def _pick(draws: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(draws.integers(len(choices)))]
