"""One page that shows a model: pictures first, then the numbers and what they mean, then how it
came to be.

The page is one self-contained file: pictures and curves lie inside it, nothing is fetched and no
script runs (its own policy forbids both). Captions are foreign text: each is escaped, control
characters are made visible, and none can turn the direction of what follows it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy import ndarray

from pipeline import storage
from pipeline.filters import visible
from pipeline.manifest import Manifest
from training import results

from . import shapes_oracle
from .gate import Verdict
from .sample import png
from .scorecard import Scored, Value

TEMPLATE = "report.html.jinja"
PIXELATED = 128
"""Pictures up to this side are shown pixel by pixel and stored as PNG; larger ones are smoothed and
stored as JPEG.
"""


@dataclass(frozen=True, kw_only=True)
class StageStory:
    """How one stage was trained."""

    name: str
    history: Sequence[Mapping[str, Any]] = ()
    """Log points with images_seen and loss."""
    seconds: float = 0.0
    parameters: int = 0
    images_seen: int = 0
    measured: Mapping[str, Any] = field(default_factory=dict)
    preview: bytes | None = None
    """A PNG of what it makes: for an autoencoder, pictures beside their reconstructions."""
    note: str = ""
    """For instance that it was taken over from an earlier run."""

    @classmethod
    def of(cls, name: str, stage_dir: str | os.PathLike[str], note: str = "") -> StageStory:
        """The story that a finished stage directory tells. ValueError when the stage is not
        finished.
        """
        done = results.committed(stage_dir)
        if done is None:
            raise ValueError(
                f"{stage_dir}: no {results.STAGE}, so stage {name} is not finished; train it first"
            )
        preview = Path(stage_dir, results.PREVIEW)
        return cls(
            name=name,
            history=results.history(stage_dir),
            seconds=float(done.get("seconds") or 0),
            parameters=int(done.get("parameters") or 0),
            images_seen=int(done.get("images_seen") or 0),
            measured=done.get("measured") or {},
            preview=preview.read_bytes() if preview.exists() else None,
            note=note,
        )


@dataclass(frozen=True, kw_only=True)
class DataStory:
    """What it was trained on."""

    version: int
    digest: str
    counts: Mapping[str, int]
    """Outcome or outcome:reason -> input rows."""
    splits: Mapping[str, int]
    """Split -> samples."""
    sources: Sequence[str] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> DataStory:
        names = sorted(
            {shard.split for shard in manifest.shards}, key=("train", "heldout", "unseen").index
        )
        return cls(
            version=manifest.version,
            digest=manifest.digest,
            counts=manifest.counts,
            splits={name: manifest.samples(name) for name in names},
            sources=tuple(manifest.sources),
        )


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """All that a report shows; what is left out is not on the page."""

    name: str
    scored: Scored
    version: str | None = None
    verdict: Verdict | None = None
    champion: Scored | None = None
    """The model in service, scored in the same run."""
    stages: Sequence[StageStory] = ()
    data: DataStory | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Other things that took time, such as ingest and scoring."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    created: datetime | None = None


def write(path: str | os.PathLike[str], inputs: ReportInputs) -> None:
    """Publish the page at a path or URL, whole or not at all."""
    storage.publish_bytes(str(path), render(inputs).encode())


def render(inputs: ReportInputs) -> str:
    """The page as HTML."""
    return page(TEMPLATE, **_Page(inputs).context())


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
        "percent": _percent,
        "number": _number,
        "count": lambda n: f"{int(n):,}",
        "compact": _compact,
        "duration": _duration,
    }
    return environment


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def _number(x: Any) -> str:
    if not isinstance(x, int | float) or isinstance(x, bool):
        return str(x)
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e7:
        return f"{int(x):,}"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def _compact(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"


def _duration(seconds: float) -> str:
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


@dataclass(frozen=True)
class Chart:
    """A small line chart: numbers only, drawn by the template as inline SVG."""

    title: str
    across: str
    series: Sequence[Series]
    ticks_x: Sequence[tuple[float, str]]
    ticks_y: Sequence[tuple[float, str]]
    width: int = 360
    height: int = 200
    left: int = 46
    bottom: int = 26
    top: int = 10
    right: int = 14


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
    blank = Chart(title, across, (), (), ())
    spread_x, spread_y = (
        blank.width - blank.left - blank.right,
        blank.height - blank.top - blank.bottom,
    )

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            blank.left + (x - low_x) / (high_x - low_x) * spread_x,
            blank.top + (1 - (y - low_y) / (high_y - low_y)) * spread_y,
        )

    rows = _ticks(low_y, high_y, 4)
    if log:
        rows = _log_ticks(low_y, high_y)
    show = (lambda y: f"{100 * y:.0f} %") if percent else _compact
    return Chart(
        title,
        across,
        [
            Series(name, [place(x, up(y)) for x, y in points], labels, filled)
            for name, points in kept.items()
        ],
        [(place(x, low_y)[0], _compact(x)) for x in _ticks(low_x, high_x, 4)],
        [(place(low_x, y)[1], show(10**y if log else y)) for y in rows],
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


_NAMES = {
    "correct": "Shows what was asked",
    "retrieval": "Found again among 100 captions",
    "guidance_gain": "Gained by guidance",
    "clip_score": "CLIP score",
    "kid": "Kernel distance (KID)",
    "fid": "Fréchet distance (FID)",
    "precision": "Precision",
    "recall": "Recall",
    "memorisation": "Memorisation",
    "heldout_loss": "Held-out loss",
    "bits_per_dim": "Bits per dimension",
}
_MEANING = {
    "guidance_gain": "guided minus unguided, prompt by prompt",
    "clip_score": "100 × cosine of picture and caption",
    "kid": "to held-out pictures; unbiased, 0 = alike",
    "fid": "information only: it is biased by the count",
    "precision": "share of pictures that look real",
    "recall": "share of real pictures that could be drawn",
    "memorisation": "nearer to training pictures than held-out ones are; about 0 = no copies",
    "heldout_loss": "denoising loss on fixed noise",
    "bits_per_dim": "-log2 p of held-out pictures given their captions; an upper bound",
}
_SHARES = ("correct", "retrieval", "guidance_gain", "precision", "recall")
_GROUPS = {
    "seen": ("seen in training", "combinations that training showed, in new words"),
    "unseen": ("never seen", "combinations that training never showed"),
    "heldout": ("held out", "captions that training never showed"),
    "unseen_name": ("new names", "names that training never showed"),
    "unguided": ("unguided", "the same prompts without guidance"),
    "shuffled": ("by chance", "the same pictures, each held against another's prompt"),
    "all": ("all", "all prompts"),
}


class _Page:
    """What the template shows, worded and measured out; every text stays plain until the template
    escapes it.
    """

    def __init__(self, inputs: ReportInputs):
        self.inputs, self.card = inputs, inputs.scored.scorecard
        self.main = "correct" if self.card.config.kind == "shapes" else "retrieval"

    def context(self) -> dict[str, Any]:
        inputs, card = self.inputs, self.card
        created = inputs.created or datetime.now(UTC)
        side = inputs.scored.pictures.shape[1]
        return {
            "name": inputs.name,
            "version": inputs.version,
            "created": created.strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
            "verdict": inputs.verdict,
            "kind": card.config.kind,
            "scale": card.scale,
            "main": self.main,
            "main_name": _NAMES[self.main],
            "figures": self._figures(),
            "gallery": self._gallery(),
            "pixelated": side <= PIXELATED,
            "side": side,
            "prompts": len(inputs.scored.prompts),
            "sweep": self._sweep(),
            "charts": self._charts(),
            "attributes": self._attributes(),
            "groups": self._groups(),
            "values": self._values(),
            "basis": self._basis(),
            "stages": [self._stage(stage) for stage in inputs.stages],
            "reconstructions": self._reconstructions(),
            "data": self._data(),
            "cost": self._cost(),
            "checks": self._checks(),
            "lineage": [(key, str(value)) for key, value in _leaves(inputs.lineage)],
            "recipe": json.dumps(inputs.recipe, indent=2, sort_keys=True, default=str)
            if inputs.recipe
            else "",
        }

    def _figures(self) -> list[dict[str, str]]:
        """The numbers at the head of the page."""
        card, figures = self.card, []
        value = card.values[self.main]
        figures.append(
            {
                "value": _percent(value.value),
                "label": "show all that was asked"
                if self.main == "correct"
                else "found again by their caption",
                "note": _between(value, percent=True) + self._against_champion(self.main, _percent),
            }
        )
        for group, row in card.groups.items():
            name, meaning = _GROUPS.get(group, (group, ""))
            figures.append({"value": _percent(row[self.main]), "label": name, "note": meaning})
        for name in ("unguided", "shuffled"):
            if (key := f"{self.main}_{name}") in card.values:
                label, meaning = _GROUPS[name]
                figures.append(
                    {"value": _percent(card.values[key].value), "label": label, "note": meaning}
                )
        kid = card.values["kid"]
        figures.append(
            {
                "value": f"{1000 * kid.value:.2f}",
                "label": "KID × 1000",
                "note": "distance to held-out pictures"
                + self._against_champion("kid", lambda x: f"{1000 * x:.2f}"),
            }
        )
        if rate := card.speed.get("pictures_per_second"):
            figures.append(
                {
                    "value": f"{rate:.3g}",
                    "label": "pictures a second",
                    "note": "where it was scored",
                }
            )
        return figures

    def _against_champion(self, name: str, show: Callable[[float], str]) -> str:
        """How the champion did, where the two may be compared."""
        other = self.inputs.champion and self.inputs.champion.scorecard.values.get(name)
        if not other or not other.comparable(self.card.values[name]):
            return ""
        return f"; champion {show(other.value)}"

    def _gallery(self) -> list[dict[str, Any]]:
        """The first pictures; for drawn scenes with what is wrong in each."""
        scored = self.inputs.scored
        count = min(self.card.config.gallery, len(scored.pictures))
        figures = [
            {"image": image(picture), "text": prompt.text, "group": prompt.group, "wrong": []}
            for picture, prompt in zip(scored.pictures[:count], scored.prompts[:count], strict=True)
        ]
        if self.card.config.kind == "shapes":
            truths = [it.truth or {} for it in scored.prompts[:count]]
            verdict = shapes_oracle.judge_all(scored.pictures[:count], truths)
            verdict.pop("all")
            for k, figure in enumerate(figures):
                figure["wrong"] = [
                    name.replace("_", " ") for name, right in verdict.items() if not right[k]
                ]
        return figures

    def _sweep(self) -> dict[str, Any] | None:
        """Prompts (down) by scales (across)."""
        sweep = sorted(self.inputs.scored.sweep.items())
        if len(sweep) < 2:
            return None
        rows = min(6, min(len(pictures) for _, pictures in sweep))
        return {
            "scales": [{"scale": scale, "chosen": scale == self.card.scale} for scale, _ in sweep],
            "rows": [
                {
                    "text": self.inputs.scored.prompts[row].text,
                    "images": [
                        {"uri": image(pictures[row]), "scale": scale} for scale, pictures in sweep
                    ],
                }
                for row in range(rows)
            ],
        }

    def _charts(self) -> list[Chart]:
        rows = self.card.sweep
        if len(rows) < 2:
            return []
        named = {self.main: "asked for and shown", "precision": "precision", "recall": "recall"}
        lines = {
            label: [(row.scale, row.values[key]) for row in rows] for key, label in named.items()
        }
        front = sorted(rows, key=lambda row: row.values["kid"])
        found = [
            chart("Fidelity and diversity by guidance", "guidance scale", lines, percent=True),
            chart(
                "Fidelity against distance",
                "KID to held-out pictures (less is better)",
                {"": [(row.values["kid"], 100 * row.values[self.main]) for row in front]},
                labels=[f"{row.scale:g}" for row in front],
                filled=[row.pareto for row in front],
            ),
        ]
        return [it for it in found if it is not None]

    def _attributes(self) -> dict[str, Any] | None:
        table = self.card.attributes
        if not table:
            return None
        columns = list(next(iter(table.values())))
        return {
            "columns": [_GROUPS.get(name, (name, "")) for name in columns],
            "rows": [
                {"name": name.replace("_", " "), "cells": [row[column] for column in columns]}
                for name, row in table.items()
            ],
        }

    def _groups(self) -> list[dict[str, Any]]:
        return [
            {
                "name": _GROUPS.get(group, (group, ""))[0],
                "meaning": _GROUPS.get(group, ("", ""))[1],
                "prompts": int(row["prompts"]),
                "share": row[self.main],
                "clip_score": row["clip_score"],
            }
            for group, row in self.card.groups.items()
        ]

    def _values(self) -> list[dict[str, str]]:
        """Every value with its interval, the same unguided, and how many pictures it is of."""
        rows = []
        champion = self.inputs.champion.scorecard.values if self.inputs.champion else {}
        for name, label in _NAMES.items():
            if name not in self.card.values:
                continue
            value, plain = self.card.values[name], self.card.values.get(f"{name}_unguided")
            show = _percent if name in _SHARES else _number
            other = champion.get(name)
            rows.append(
                {
                    "label": label,
                    "meaning": _MEANING.get(name, ""),
                    "value": show(value.value),
                    "between": _between(value, percent=name in _SHARES),
                    "unguided": show(plain.value) if plain else "",
                    "champion": show(other.value) if other and other.comparable(value) else "",
                    "count": f"{value.basis.count:,}"
                    + (
                        f" against {value.basis.reference_count:,}"
                        if value.basis.prompts and value.basis.reference
                        else ""
                    ),
                }
            )
        return rows

    def _basis(self) -> list[str]:
        """In words, what the values were measured with."""
        basis, config = self.card.values["kid"].basis, self.card.config
        own = (
            " It grew up on the same data: fit to compare models of this line, not lines."
            if "own" in basis.judge
            else ""
        )
        how = (
            "the drawing's own pixels, by an oracle that knows no model"
            if config.kind == "shapes"
            else "CLIP retrieval"
        )
        return [
            f"Fidelity is judged by {how}. Distances use {basis.judge} "
            f"(weights {(basis.weights or '?')[:12]}, "
            f"pictures resized {basis.resize}).{own}",
            f"Prompts {basis.prompts}, seeds from {config.seed}, reference {basis.reference}. "
            f"Values are compared only where "
            f"all of these agree; intervals are 95 %, over disjoint blocks.",
        ]

    def _stage(self, stage: StageStory) -> dict[str, Any]:
        points = [
            (float(record["images_seen"]), float(record["loss"]))
            for record in stage.history
            if record.get("loss") is not None and record.get("images_seen") is not None
        ]
        facts = [
            ("parameters", _compact(stage.parameters) if stage.parameters else ""),
            ("pictures seen", _compact(stage.images_seen) if stage.images_seen else ""),
            ("time", _duration(stage.seconds) if stage.seconds else ""),
            *(
                (key.replace("_", " "), _number(value))
                for key, value in _leaves(stage.measured)
                if _short(value)
            ),
        ]
        return {
            "name": stage.name,
            "note": stage.note,
            "chart": chart(stage.name, "pictures seen", {"loss": points}),
            "facts": [(key, value) for key, value in facts if value][:9],
        }

    def _reconstructions(self) -> str:
        found = (it.preview for it in self.inputs.stages if it.name == "autoencoder" and it.preview)
        return next((data_uri(preview) for preview in found), "")

    def _data(self) -> dict[str, Any] | None:
        data = self.inputs.data
        if data is None:
            return None
        outcomes = {
            name: data.counts.get(name, 0) for name in ("kept", "filtered", "rejected", "duplicate")
        }
        seen = data.counts.get("seen", sum(outcomes.values()))
        reasons = {name: n for name, n in data.counts.items() if ":" in name and n}
        return {
            "version": data.version,
            "digest": data.digest,
            "seen": seen,
            "outcomes": [
                {
                    "name": name,
                    "count": n,
                    "share": n / seen if seen else 0,
                    "reasons": [
                        (key.split(":", 1)[1].replace("_", " "), m)
                        for key, m in reasons.items()
                        if key.startswith(f"{name}:")
                    ],
                }
                for name, n in outcomes.items()
            ],
            "splits": list(data.splits.items()),
            "sources": list(data.sources),
        }

    def _cost(self) -> dict[str, Any] | None:
        spent = {stage.name: stage.seconds for stage in self.inputs.stages} | dict(
            self.inputs.seconds
        )
        spent = {name: seconds for name, seconds in spent.items() if seconds > 0}
        if not spent:
            return None
        longest = max(spent.values())
        return {
            "total": _duration(sum(spent.values())),
            "rows": [
                {"name": name, "time": _duration(seconds), "share": seconds / longest}
                for name, seconds in spent.items()
            ],
            "memory": _compact(self.card.speed.get("peak_memory_bytes", 0)) + "B",
        }

    def _checks(self) -> list[dict[str, Any]]:
        verdict = self.inputs.verdict
        return [
            {
                "name": check.name,
                "passed": check.passed,
                "got": "" if check.got is None else _number(check.got),
                "wanted": "" if check.wanted is None else _number(check.wanted),
                "why": check.why,
            }
            for check in (verdict.checks if verdict else ())
        ]


def _between(value: Value, percent: bool = False) -> str:
    if value.low is None or value.high is None:
        return ""
    if percent:
        return f"{100 * value.low:.1f} to {100 * value.high:.1f} %"
    return f"{_number(value.low)} to {_number(value.high)}"


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [
            leaf
            for key in value
            for leaf in _leaves(value[key], f"{path}.{key}" if path else str(key))
        ]
    return [] if value is None else [(path, value)]


def _short(value: Any) -> bool:
    return (
        isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and len(str(value)) < 40
    )
