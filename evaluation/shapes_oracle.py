"""What a drawn picture shows is read from its pixels alone: no model, no caption, none of the code
that draws.

A picture is a ground and what differs from it. The soft mask's area and centroid fix radius and
centre of each known shape in closed form; the shape is the one whose own rendering overlaps the
mask best (analysis by synthesis). What fits nothing is read as None, and None is never right.
Shared with the drawing code: the vocabulary (names, palettes, nominal sizes, places).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from numpy import ndarray

from pipeline.shapes import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES

Pictures = UInt8[ndarray, "n height width 3"]
Mask = Float[ndarray, "n side side"]

ATTRIBUTES = ("colour", "shape", "size", "place", "background")
PAIR_ATTRIBUTES = (
    "first_colour",
    "first_shape",
    "second_colour",
    "second_shape",
    "relation",
    "background",
)

MIN_CONTRAST = 45.0
"""RGB distance below which nothing stands out of the ground; the palettes' nearest pair is 93
apart.
"""
MAX_COLOUR_ERROR = 70.0
"""RGB distance from a palette entry beyond which a colour has no name."""
MIN_GROUND_SHARE = 0.6
"""Share of the border that must agree on one ground."""
MIN_OVERLAP = 0.75
"""Soft intersection over union below which an object is no known shape; clean drawings reach 0.8 at
side 16, 0.88 at 32.
"""
CLUTTER_WEIGHT = 2.0
"""A second thing in the picture weighs more against a shape than a ragged edge of the same area."""
SAMPLES = 4
"""Sub-pixel samples per axis of the renderings."""
CHUNK = 64


@dataclass(frozen=True)
class _Form:
    """A shape with half-extent 1 (vertical for the triangle): its area, the height of its centroid,
    and what lies inside.
    """

    area: float
    centroid: float
    inside: Callable[[ndarray, ndarray], Bool[ndarray, ...]]


_ARM, _HOLE, _BASE = (
    0.33,
    0.52,
    1.1,
)  # the cross's half arm, the ring's inner radius, the triangle's half base
_FORMS: Mapping[str, _Form] = {
    "circle": _Form(np.pi, 0, lambda x, y: x * x + y * y <= 1),
    "square": _Form(4.0, 0, lambda x, y: (abs(x) <= 1) & (abs(y) <= 1)),
    "triangle": _Form(2 * _BASE, 1 / 3, lambda x, y: (y <= 1) & (abs(x) <= _BASE * (y + 1) / 2)),
    "diamond": _Form(2.0, 0, lambda x, y: abs(x) + abs(y) <= 1),
    "cross": _Form(
        8 * _ARM - 4 * _ARM**2,
        0,
        lambda x, y: (np.minimum(abs(x), abs(y)) <= _ARM) & (np.maximum(abs(x), abs(y)) <= 1),
    ),
    "ring": _Form(
        np.pi * (1 - _HOLE**2), 0, lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= _HOLE**2)
    ),
}
assert set(_FORMS) == set(SHAPES)


def read(picture: UInt8[ndarray, "height width 3"], objects: int = 1) -> dict[str, Any]:
    """The scene that one picture shows, in the form of a truth (`Scene.truth`); what cannot be told
    is None.
    """
    return read_all(np.asarray(picture)[None], objects)[0]


def read_all(pictures: Pictures, objects: int = 1) -> list[dict[str, Any]]:
    """`read` for many pictures of one size, some five hundred a second on one core."""
    pictures = np.asarray(pictures)
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise ValueError(
            f"pictures must be uint8 [n, height, width, 3], "
            f"got {pictures.dtype} {list(pictures.shape)}"
        )
    if pictures.shape[1] != pictures.shape[2] or pictures.shape[1] < 16:
        raise ValueError(
            f"pictures must be squares of side 16 or more, got {list(pictures.shape[1:3])}"
        )
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, got {objects}")
    reader = _read_one if objects == 1 else _read_two
    chunks = (_shrink(pictures[i : i + CHUNK]) for i in range(0, len(pictures), CHUNK))
    return [scene for chunk in chunks for scene in reader(chunk)]


def judge(picture: UInt8[ndarray, "height width 3"], truth: Mapping[str, Any]) -> dict[str, bool]:
    """For each attribute of the truth: does the picture show it?"""
    return compare(read(picture, len(truth.get("objects", (0,)))), truth)


def judge_all(
    pictures: Pictures, truths: Sequence[Mapping[str, Any]]
) -> dict[str, Bool[ndarray, " n"]]:
    """`judge` for picture i against truth i, all truths of one kind; the entry "all" is their
    conjunction.
    """
    if len(pictures) != len(truths) or not len(truths):
        raise ValueError(
            f"each picture needs a truth: got {len(pictures)} pictures and {len(truths)} truths"
        )
    return tally(read_all(pictures, len(truths[0].get("objects", (0,)))), truths)


def legible(pictures: Pictures, objects: int = 1) -> Bool[ndarray, " n"]:
    """Whether a scene can be read at all: no attribute of any picture's scene is None."""

    def whole(found: Any) -> bool:
        if isinstance(found, Mapping):
            return all(map(whole, found.values()))
        if isinstance(found, list | tuple):
            return all(map(whole, found))
        return found is not None

    return np.array([whole(scene) for scene in read_all(pictures, objects)], bool)


def tally(
    scenes: Sequence[Mapping[str, Any]], truths: Sequence[Mapping[str, Any]]
) -> dict[str, Bool[ndarray, " n"]]:
    """`compare` row by row, as one array per attribute and their conjunction "all"."""
    rows = [compare(scene, truth) for scene, truth in zip(scenes, truths, strict=True)]
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return table | {"all": np.logical_and.reduce(list(table.values()))}


def compare(scene: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, bool]:
    """Attribute by attribute, what was read against what was asked; of one object, a truth may ask
    for some attributes alone.

    Two objects are matched in the order that suits colours and shapes best; the relation has to
    hold in that order.
    """
    if "objects" not in truth:
        asked = [name for name in ATTRIBUTES if name in truth]
        if not asked:
            raise ValueError(f"a truth asks for one of {', '.join(ATTRIBUTES)}, got {dict(truth)}")
        return {name: scene[name] is not None and scene[name] == truth[name] for name in asked}

    def verdict(first: int, relation: str | None) -> dict[str, bool]:
        found = {
            f"{rank}_{name}": scene["objects"][i][name] == wanted[name]
            for rank, i, wanted in zip(
                ("first", "second"), (first, 1 - first), truth["objects"], strict=True
            )
            for name in ("colour", "shape")
        }
        return found | {
            "relation": relation is not None and relation == truth["relation"],
            "background": scene["background"] is not None
            and scene["background"] == truth["background"],
        }

    both = verdict(0, scene["relation"]), verdict(1, _INVERSE.get(scene["relation"]))
    return max(both, key=lambda v: (sum(v[name] for name in PAIR_ATTRIBUTES[:4]), v["relation"]))


_INVERSE = {
    name: other
    for name, (x, y) in RELATIONS.items()
    for other, (u, v) in RELATIONS.items()
    if (x, y) == (-u, -v)
}


def _shrink(pictures: Pictures) -> Float[ndarray, "n side side 3"]:
    """Float pictures, averaged over whole blocks of pixels while the side stays at 32 or more:
    detail beyond is not needed.
    """
    x = pictures.astype(np.float32)
    while x.shape[1] >= 64 and x.shape[1] % 2 == 0:
        x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, 3).mean((2, 4))
    return x


def _nearest(
    colours: Float[ndarray, "... 3"], palette: Mapping[str, tuple[int, int, int]]
) -> tuple[ndarray, ndarray]:
    """Index of and distance to the nearest palette entry."""
    distance = np.linalg.norm(
        colours[..., None, :] - np.array(list(palette.values()), np.float32), axis=-1
    )
    return distance.argmin(-1), distance.min(-1)


def _ground(x: ndarray) -> tuple[list[str | None], Float[ndarray, "n 3"]]:
    """Name and colour of the ground: the palette entry most of the border agrees on, and the median
    of those who do.
    """
    names = tuple(BACKGROUNDS)
    side, rim = x.shape[1], max(1, x.shape[1] // 16)
    inner = np.zeros((side, side), bool)
    inner[rim:-rim, rim:-rim] = True
    border = x[:, ~inner]
    index, distance = _nearest(border, BACKGROUNDS)
    index = np.where(distance <= MAX_COLOUR_ERROR, index, len(names))
    votes = np.stack([(index == k).mean(1) for k in range(len(names))], 1)
    best = votes.argmax(1)
    agree = index == best[:, None]
    agree[~agree.any(1)] = True
    colour = np.nanmedian(np.where(agree[..., None], border, np.nan), axis=1)
    return [
        names[k] if v[k] >= MIN_GROUND_SHARE else None for k, v in zip(best, votes, strict=True)
    ], colour


def _ramp(alpha: ndarray) -> ndarray:
    """Steeper edges, so that faint noise is nothing; symmetric about one half, so that straight
    edges keep their area.
    """
    return np.clip((alpha - 0.2) / 0.6, 0, 1)


@dataclass
class _Objects:
    """One object per picture; half-extents and centres are shares of the side."""

    colours: list[str | None]
    shapes: list[str | None]
    extents: ndarray
    centres: Float[ndarray, "n 2"]


def _objects(x: ndarray, ground: Float[ndarray, "n 3"], within: Mask | None = None) -> _Objects:
    """Read the one object inside `within` (default: the whole picture); all that differs from the
    ground counts against it.
    """
    n, side = x.shape[:2]
    distance = np.linalg.norm(x - ground[:, None, None], axis=-1)
    flat = (distance if within is None else distance * within).reshape(n, -1)
    top = max(4, side * side // 200)
    reach = np.partition(flat, -top, axis=1)[:, -top:].mean(1)
    core = (flat >= 0.75 * reach[:, None])[..., None]
    colour = np.nanmedian(np.where(core, x.reshape(n, -1, 3), np.nan), axis=1)
    stretch = reach / np.maximum(np.linalg.norm(colour - ground, axis=1), 1e-3)
    colour = ground + (colour - ground) * stretch[:, None]
    # The thin parts of a small or blurred object never reach its full colour: the rendering that
    # fits says what it must be. So fit, correct the colour, and fit again.
    fit = _fit_forms(x, ground, colour, within)
    fit = _fit_forms(x, ground, fit.colour, within)
    index, error = _nearest(fit.colour, COLOURS)
    seen = reach >= MIN_CONTRAST
    forms = tuple(_FORMS.items())
    extents = np.sqrt(fit.area / np.array([forms[k][1].area for k in fit.form])) / side
    centres = fit.centres / side
    centres[:, 1] -= np.array([forms[k][1].centroid for k in fit.form]) * extents
    named = seen & (error <= MAX_COLOUR_ERROR)
    known = seen & (fit.overlap >= MIN_OVERLAP)
    return _Objects(
        [tuple(COLOURS)[k] if ok else None for k, ok in zip(index, named, strict=True)],
        [forms[k][0] if ok else None for k, ok in zip(fit.form, known, strict=True)],
        extents,
        centres,
    )


@dataclass
class _Fit:
    """The form that fits each object best, how well, where (in pixels), and in which colour."""

    form: Int64[ndarray, " n"]
    overlap: Float[ndarray, " n"]
    centres: Float[ndarray, "n 2"]
    area: Float[ndarray, " n"]
    colour: Float[ndarray, "n 3"]


def _fit_forms(x: ndarray, ground: ndarray, colour: ndarray, within: Mask | None) -> _Fit:
    """Fit every form to what has about this colour; the fitted colour is the least-squares one."""
    offset = x - ground[:, None, None]
    alpha, clutter = _masks(offset, colour - ground, within)
    centres, area = _moments(alpha)
    fits = [_fit(alpha, clutter, form, centres, area) for form in _FORMS.values()]
    overlaps = np.stack([overlap for overlap, _ in fits], 1)
    form, overlap = overlaps.argmax(1), overlaps.max(1)
    cover = np.stack([cover for _, cover in fits], 1)[np.arange(len(x)), form] * (alpha > 0)
    weight = np.maximum((cover**2).sum((1, 2)), 1)[:, None]
    fitted = np.clip(ground + np.einsum("nyx,nyxc->nc", cover, offset) / weight, 0, 255)
    return _Fit(form, overlap, centres, area, np.where(overlap[:, None] >= 0.6, fitted, colour))


def _masks(
    offset: ndarray, toward: Float[ndarray, "n 3"], within: Mask | None
) -> tuple[Mask, Mask]:
    """Soft masks of the object and of clutter: what differs from the ground but is no object."""
    contrast = np.maximum(np.linalg.norm(toward, axis=1), 1e-3)[:, None, None]
    distance = np.linalg.norm(offset, axis=-1) / contrast
    along = (offset * toward[:, None, None]).sum(-1) / contrast**2
    astray = np.sqrt(np.maximum(distance**2 - along**2, 0))  # a third colour is not the object's
    alpha = _ramp(np.clip(along, 0, 1)) * np.clip(1.5 - 2 * astray, 0, 1)
    clutter = np.where((alpha < 0.5) & (astray > 0.5), _ramp(distance) - alpha, 0)
    return (alpha, clutter) if within is None else (alpha * within, clutter * within)


def _moments(alpha: Mask) -> tuple[Float[ndarray, "n 2"], Float[ndarray, " n"]]:
    """Centroid (x, y) in pixels and area of each mask, without what lies far from its weighted
    median.
    """
    side = alpha.shape[1]
    points = np.arange(side, dtype=np.float32) + 0.5
    total = np.maximum(alpha.sum((1, 2)), 1e-6)

    def median(profile: ndarray) -> ndarray:
        return (np.cumsum(profile, 1) < total[:, None] / 2).sum(1) + 0.5

    far_x = points[None, None, :] - median(alpha.sum(1))[:, None, None]
    far_y = points[None, :, None] - median(alpha.sum(2))[:, None, None]
    # The thinnest form reaches 1.5 times its equal-area disc's radius; the median of a triangle
    # lies a little off.
    near = np.maximum(abs(far_x), abs(far_y)) <= 2 * np.sqrt(total / 2)[:, None, None] + 1
    alpha = alpha * near
    total = np.maximum(alpha.sum((1, 2)), 1e-6)
    return np.stack([(alpha.sum(1) * points).sum(1), (alpha.sum(2) * points).sum(1)], 1) / total[
        :, None
    ], total


def _fit(
    alpha: Mask, clutter: Mask, form: _Form, centres: ndarray, area: ndarray
) -> tuple[Float[ndarray, " n"], Mask]:
    """Best soft intersection over union of each mask with the form of its area at its centroid,
    sharp or blurred; and that cover.
    """
    n, side = alpha.shape[:2]
    radius = np.sqrt(area / form.area)[:, None, None]
    points = ((np.arange(side * SAMPLES) + 0.5) / SAMPLES).astype(np.float32)
    u = (points[None, None, :] - centres[:, 0, None, None]) / radius
    v = (points[None, :, None] - centres[:, 1, None, None]) / radius + form.centroid
    sharp = (
        form.inside(u, v).reshape(n, side, SAMPLES, side, SAMPLES).mean((2, 4), dtype=np.float32)
    )
    overlap, best = np.full(n, -1.0), sharp
    for cover in (sharp, _blur(sharp), _blur(_blur(sharp))):
        edges = _ramp(cover)
        union = np.maximum(alpha, edges).sum((1, 2)) + CLUTTER_WEIGHT * clutter.sum((1, 2))
        share = np.minimum(alpha, edges).sum((1, 2)) / np.maximum(union, 1e-6)
        best = np.where((share > overlap)[:, None, None], cover, best)
        overlap = np.maximum(share, overlap)
    return overlap, best


def _blur(cover: Mask) -> Mask:
    """Binomial blur, 0.7 pixels wide: what a small autoencoder makes of an edge."""
    x = np.pad(cover, ((0, 0), (1, 1), (1, 1)), mode="edge")
    x = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / np.float32(16)


def _read_one(x: ndarray) -> Iterator[dict[str, Any]]:
    backgrounds, ground = _ground(x)
    it = _objects(x, ground)
    for k, background in enumerate(backgrounds):
        yield {
            "colour": it.colours[k],
            "shape": it.shapes[k],
            "size": _size(it.extents[k]) if it.shapes[k] else None,
            "place": _place(*it.centres[k]) if it.shapes[k] else None,
            "background": background,
        }


def _size(extent: float) -> str | None:
    """The size whose nominal radius is nearest in ratio; None when it is off by more than half."""
    ratio = {name: abs(np.log(max(extent, 1e-3) / radius)) for name, radius in SIZES.items()}
    name = min(ratio, key=lambda n: ratio[n])
    return name if ratio[name] < np.log(1.5) else None


def _place(x: float, y: float) -> str:
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


def _read_two(x: ndarray) -> Iterator[dict[str, Any]]:
    backgrounds, ground = _ground(x)
    sides = _halves(x, ground)
    one, two = _objects(x, ground, sides), _objects(x, ground, 1 - sides)
    for k, background in enumerate(backgrounds):
        yield {
            "objects": [{"colour": it.colours[k], "shape": it.shapes[k]} for it in (one, two)],
            "relation": _relation(one.centres[k] - two.centres[k])
            if one.shapes[k] and two.shapes[k]
            else None,
            "background": background,
        }


def _halves(x: ndarray, ground: ndarray) -> Mask:
    """1 where a pixel is nearer to the first of two clusters of what differs from the ground, else
    0 (2-means in the plane).
    """
    n, side = x.shape[:2]
    distance = np.linalg.norm(x - ground[:, None, None], axis=-1)
    weight = np.clip(distance / MIN_CONTRAST - 0.5, 0, 1).reshape(n, -1)
    points = np.stack(np.meshgrid(*[np.arange(side) + 0.5] * 2, indexing="xy"), -1).reshape(-1, 2)
    total = np.maximum(weight.sum(1), 1e-6)[:, None]
    mean = weight @ points / total
    offset = points[None] - mean[:, None]
    spread = np.einsum("np,npi,npj->nij", weight, offset, offset) / total[..., None]
    axis = np.linalg.eigh(spread)[1][:, :, 1]
    first = np.einsum("npi,ni->np", offset, axis) > 0
    for _ in range(4):
        a, b = (
            (weight * part) @ points / np.maximum((weight * part).sum(1), 1e-6)[:, None]
            for part in (first, ~first)
        )
        first = ((points[None] - a[:, None]) ** 2).sum(-1) < ((points[None] - b[:, None]) ** 2).sum(
            -1
        )
    return first.reshape(n, side, side).astype(np.float32)


def _relation(offset: Float[ndarray, 2]) -> str | None:
    """The relation of the first object to the second; None where neither direction clearly
    prevails.
    """
    across, along = sorted(abs(offset))
    if along < 0.1 or across > 0.6 * along:
        return None
    return max(RELATIONS, key=lambda name: float(np.dot(RELATIONS[name], offset)))
