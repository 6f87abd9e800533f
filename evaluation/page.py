"""The parts of which our pages are made: templates, numbers in words, charts, pictures.

A page is one self-contained file: pictures and curves lie inside it, nothing is fetched and no
script runs (its own policy forbids both). Captions are foreign text: each is escaped, control
characters are made visible, and none can turn the direction of what follows it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy import ndarray

from pipeline.filters import visible

from .sample import png

PIXELATED = 128
"""Pictures up to this side are shown pixel by pixel and stored as PNG; larger ones are smoothed and
stored as JPEG.
"""


def page(template: str, **values: Any) -> str:
    """One self-contained page from a template of this folder."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "count": lambda n: f"{int(n):,}",
        "compact": compact,
        "duration": duration,
    }
    return environment


def percent(share: float) -> str:
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def number(x: Any) -> str:
    if not isinstance(x, int | float) or isinstance(x, bool):
        return str(x)
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e7:
        return f"{int(x):,}"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def compact(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {rest:02} s"
        if minutes
        else f"{rest} s"
    )


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted path, value) of all that is not None in nested mappings."""
    if isinstance(value, Mapping):
        return [
            leaf
            for key in value
            for leaf in leaves(value[key], f"{path}.{key}" if path else str(key))
        ]
    return [] if value is None else [(path, value)]


# ---- charts --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where a chart lies, and its axes: (place, label) of each tick."""

    title: str
    across: str
    ticks_x: Sequence[tuple[float, str]] = ()
    ticks_y: Sequence[tuple[float, str]] = ()
    width: int = 360
    height: int = 200
    left: int = 46
    bottom: int = 26
    top: int = 10
    right: int = 14

    def x(self, share: float) -> float:
        """The place at a share of the way across."""
        return self.left + share * (self.width - self.left - self.right)

    def y(self, share: float) -> float:
        """The place at a share of the way up."""
        return self.top + (1 - share) * (self.height - self.top - self.bottom)


@dataclass(frozen=True)
class Series:
    """A line or the points of a chart, in the chart's own coordinates."""

    label: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    filled: Sequence[bool] = ()

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True, kw_only=True)
class Chart(_Frame):
    """A small line chart: numbers only, drawn by the template as inline SVG."""

    series: Sequence[Series] = ()


def chart(
    title: str,
    across: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    percent: bool = False,
    labels: Sequence[str] = (),
    filled: Sequence[bool] = (),
) -> Chart | None:
    """A chart of named (x, y) points; values that are not finite are left out, None when nothing is
    left.

    The vertical axis is logarithmic where values are positive and span more than a factor of 20.
    """
    kept = {
        name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return None
    xs, ys = (np.array([p[k] for points in kept.values() for p in points]) for k in (0, 1))
    log = bool(not percent and ys.min() > 0 and ys.max() > 20 * ys.min())
    up = (lambda y: math.log10(y)) if log else (lambda y: y)
    low_x, high_x = _widened(xs.min(), xs.max())
    low_y, high_y = (0.0, 1.0) if percent else _widened(up(ys.min()), up(ys.max()), 0.06)
    frame = _Frame(title=title, across=across)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            frame.x((x - low_x) / (high_x - low_x)),
            frame.y((y - low_y) / (high_y - low_y)),
        )

    rows = _ticks(low_y, high_y, 4)
    if log:
        rows = _log_ticks(low_y, high_y)
    show = (lambda y: f"{100 * y:.0f} %") if percent else compact
    return Chart(
        title=title,
        across=across,
        series=[
            Series(name, [place(x, up(y)) for x, y in points], labels, filled)
            for name, points in kept.items()
        ],
        ticks_x=[(place(x, low_y)[0], compact(x)) for x in _ticks(low_x, high_x, 4)],
        ticks_y=[(place(low_x, y)[1], show(10**y if log else y)) for y in rows],
    )


@dataclass(frozen=True)
class Bar:
    """Of a histogram, in its own coordinates; `group` is the number of its group."""

    group: int
    x: float
    y: float
    width: float
    height: float
    told: str


@dataclass(frozen=True, kw_only=True)
class Histogram(_Frame):
    """Counts of values by group, one group's bars upon another's."""

    groups: Sequence[str] = ()
    bars: Sequence[Bar] = ()
    marks: Sequence[tuple[float, str]] = ()
    """Place and label of upright lines, such as a rule's threshold."""
    beyond: int = 0
    """How many values lie past the ends of the axis; the outermost bars count them."""


@dataclass(frozen=True)
class Scale:
    """How values lie along an axis: `up` takes values to places, `ticks` gives the round ones
    between two places, each with its label.
    """

    up: Callable[[ndarray], ndarray]
    ticks: Callable[[float, float], list[tuple[float, str]]]


LINEAR = Scale(
    lambda x: x, lambda low, high: [(x, compact(round(x, 10))) for x in _ticks(low, high, 4)]
)
LOGARITHMIC = Scale(
    np.log10, lambda low, high: [(x, compact(10**x)) for x in _log_ticks(low, high)]
)
_RATIOS = (1 / 8, 1 / 4, 1 / 2, 2 / 3, 1, 3 / 2, 2, 4, 8)
RATIO = Scale(
    np.log2,
    lambda low, high: [
        (math.log2(r), _ratio(r))
        for r in _RATIOS
        if low <= math.log2(r) <= high and (high - low < 3 or r not in (2 / 3, 3 / 2))
    ],
)
"""Of widths to heights."""


def _ratio(r: float) -> str:
    wide, high = r.as_integer_ratio() if r in (0.125, 0.25, 0.5, 1, 1.5, 2, 4, 8) else (2, 3)
    return f"{wide}:{high}"


def histogram(
    title: str,
    across: str,
    groups: Mapping[str, ndarray],
    *,
    scale: Scale | None = None,
    marks: Sequence[tuple[float, str]] = (),
    bins: int = 40,
) -> Histogram | None:
    """How many values of each group lie where; None when there are none that are finite.

    As many whole numbers go into each bar; one each, where they are few. The axis leaves out the
    outermost thousandth at either end, and is logarithmic where values are positive and span more
    than a factor of 20. A mark further from the values than they are from each other is left out.
    """
    values = {name: it[np.isfinite(it)].astype(np.float64) for name, it in groups.items()}
    every = np.concatenate([*values.values(), np.empty(0)])
    if not every.size:
        return None
    ends = np.quantile(every, [0.001, 0.999], method="nearest")
    if scale is None:
        scale = LOGARITHMIC if every.min() > 0 and ends[1] > 20 * ends[0] else LINEAR
    low, high = scale.up(ends).tolist()
    shown = [(float(scale.up(np.array(x))), label) for x, label in marks]
    shown = [it for it in shown if 2 * low - high <= it[0] <= 2 * high - low]
    low, high = min([low, *(x for x, _ in shown)]), max([high, *(x for x, _ in shown)])
    whole = scale is LINEAR and bool((every == np.round(every)).all())
    if whole:
        step = math.ceil((math.ceil(high) - math.floor(low) + 1) / bins)
        edges = np.arange(math.floor(low), math.ceil(high) + step + 1, step) - 0.5
    else:
        edges = np.linspace(*_widened(low, high), bins + 1)
    edges = edges.tolist()
    low, high = edges[0], edges[-1]
    places = {name: scale.up(it) for name, it in values.items()}
    counts = np.array([np.histogram(it.clip(low, high), edges)[0] for it in places.values()])
    frame = _Frame(title=title, across=across)
    top = float(counts.sum(0).max()) * 1.04

    def x(place: float) -> float:
        return frame.x((place - low) / (high - low))

    bars, room = list[Bar](), x(edges[1]) - x(edges[0])
    wide = min(room - 0.8, 24.0)
    for column in range(len(edges) - 1):
        below = 0
        told = ", ".join(
            f"{n:,} {name}" for name, n in zip(values, counts[:, column].tolist(), strict=True) if n
        )
        for group, n in enumerate(counts[:, column].tolist()):
            if n:
                foot = frame.y(below / top)
                head = min(frame.y((below + n) / top), foot - 0.6)
                left = x(edges[column]) + (room - wide) / 2
                bars.append(Bar(group, left, head, wide, foot - head, told))
                below += n
    return Histogram(
        title=title,
        across=across,
        groups=list(values),
        bars=bars,
        marks=[(x(place), label) for place, label in shown],
        beyond=sum(int(((it < low) | (it > high)).sum()) for it in places.values()),
        ticks_x=[
            (x(place), label)
            for place, label in scale.ticks(low, high)
            if not whole or place == round(place)
        ],
        ticks_y=[(frame.y(n / top), compact(n)) for n in _ticks(0, top, 4) if n == int(n)],
    )


def _widened(low: float, high: float, by: float = 0.0) -> tuple[float, float]:
    room = (high - low) * by or (abs(high) * 0.1 or 1.0) * (high == low)
    return float(low - room), float(high + room)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = min((m * unit for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    candidates = [d + math.log10(m) for d in decades for m in ((1,) if high - low > 2 else (1, 3))]
    return [c for c in candidates if low <= c <= high]


# ---- pictures ------------------------------------------------------------------------------------


def image(picture: ndarray) -> str:
    """A data URI of one picture, uint8 [H, W, 3]."""
    if max(picture.shape[:2]) <= PIXELATED:
        return data_uri(png(picture))
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    return data_uri(file.getvalue(), "jpeg")


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
