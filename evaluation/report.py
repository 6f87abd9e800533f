"""One page that shows a model: pictures first, then the numbers and what they mean, then how it
came to be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.manifest import Manifest
from training import results

from . import shapes_oracle
from .config import in_words
from .gate import Difference, Verdict
from .given import truths_of
from .page import (
    PIXELATED,
    Chart,
    chart,
    compact,
    data_uri,
    duration,
    image,
    leaves,
    number,
    page,
    percent,
)
from .scorecard import Option, Scored, Tried, Value
from .techniques import Technique, described

TEMPLATE = "report.html.jinja"


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
    techniques: Sequence[Technique] = ()
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


_NAMES = {
    "correct": "Shows what was asked",
    "retrieval": "Found again among 100 captions",
    "legible": "Shows a scene at all",
    "guidance_gain": "Gained by guidance",
    "clip_score": "CLIP score",
    "kid": "Kernel distance (KID)",
    "fid": "Fréchet distance (FID)",
    "precision": "Precision",
    "recall": "Recall",
    "memorisation": "Memorisation",
    "heldout_loss": "Held-out loss",
    "bits_per_dim": "Bits per dimension",
    "reconstruction_psnr": "Reconstruction, dB",
    "psnr": "PSNR, in dB",
    "psnr_bicubic": "PSNR of bicubic enlargement",
    "psnr_gain": "PSNR gained over bicubic",
    "consistency": "Consistency, in dB",
    "map_agreement": "Keeps to the label map",
    "map_agreement_real": "Real pictures keep to it",
    "map_agreement_shuffled": "Keeps to another's map",
    "correct_bicubic": "Right when enlarged bicubically",
    "retrieval_bicubic": "Found again when enlarged bicubically",
    "edit_changed": "Edits that were made",
    "edit_kept": "Edits that kept all else",
}
_MEANING = {
    "legible": "whatever was asked: ground, shape, colour, size and place can be told",
    "guidance_gain": "guided minus unguided, prompt by prompt",
    "clip_score": "100 × cosine of picture and caption",
    "kid": "to held-out pictures; unbiased, 0 = alike",
    "fid": "information only: it is biased by the count",
    "precision": "share of pictures that look real",
    "recall": "share of real pictures that could be drawn",
    "memorisation": "nearer to training pictures than held-out ones are; about 0 = no copies",
    "heldout_loss": "denoising loss on fixed noise",
    "bits_per_dim": "-log2 p of held-out pictures given their captions; an upper bound",
    "reconstruction_psnr": "of held-out pictures through the autoencoder",
    "psnr": "to the real picture, of which a small copy was given",
    "psnr_bicubic": "the same copies, enlarged without a model",
    "psnr_gain": "prompt by prompt",
    "consistency": "PSNR of what was drawn, shrunk again, to what was given",
    "map_agreement": "share of pixels that have the class asked for",
    "map_agreement_real": "those that maps are of, through the autoencoder: what can be reached",
    "map_agreement_shuffled": "the same pictures, each held against another's map: chance",
    "edit_changed": "held-out scenes that show the attribute they were to get",
    "edit_kept": "of the same scenes, those of which no other attribute changed",
}
_SHARES = (
    "correct", "retrieval", "legible", "guidance_gain", "precision", "recall", "edit_changed",
    "edit_kept", "correct_bicubic", "retrieval_bicubic", "map_agreement", "map_agreement_real",
    "map_agreement_shuffled",
)  # fmt: skip
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
            "chosen": [f"{name} {in_words(it)}" for name, it in card.chosen.items()],
            "main": self.main,
            "main_name": _NAMES[self.main],
            "figures": self._figures(),
            "gallery": self._gallery(),
            "pixelated": side <= PIXELATED,
            "side": side,
            "prompts": len(inputs.scored.prompts),
            "sweep": self._sweep(),
            "options": [self._option(it) for it in card.options],
            "tried_on": min(card.config.sweep_prompts, len(inputs.scored.prompts)),
            "charts": self._charts(),
            "attributes": self._attributes(),
            "groups": self._groups(),
            "values": self._values(),
            "basis": self._basis(),
            "stages": [self._stage(stage) for stage in inputs.stages],
            "techniques": [described(it) for it in inputs.techniques],
            "reconstructions": self._reconstructions(),
            "data": self._data(),
            "cost": self._cost(),
            "checks": self._checks(),
            "replaced": self._replaced(),
            "lineage": [(key, str(value)) for key, value in leaves(inputs.lineage)],
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
                "value": percent(value.value),
                "label": "show all that was asked"
                if self.main == "correct"
                else "found again by their caption",
                "note": _between(value, percent=True) + self._against_champion(self.main, percent),
            }
        )
        for group, row in card.groups.items():
            name, meaning = _GROUPS.get(group, (group, ""))
            figures.append({"value": percent(row[self.main]), "label": name, "note": meaning})
        for name in ("unguided", "shuffled"):
            if (key := f"{self.main}_{name}") in card.values:
                label, meaning = _GROUPS[name]
                figures.append(
                    {"value": percent(card.values[key].value), "label": label, "note": meaning}
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
        if near := card.values.get("psnr"):
            plain = card.values["psnr_bicubic"].value
            figures.append(
                {
                    "value": f"{near.value:.1f} dB",
                    "label": "PSNR to the real picture",
                    "note": f"{plain:.1f} dB when enlarged bicubically"
                    + self._against_champion("psnr", lambda x: f"{x:.1f} dB"),
                }
            )
        if kept := card.values.get("map_agreement"):
            most = card.values.get("map_agreement_real")
            real = f"; real pictures {percent(most.value)}" if most else ""
            figures.append(
                {
                    "value": percent(kept.value),
                    "label": "of pixels as the label map says",
                    "note": _between(kept, percent=True)
                    + real
                    + self._against_champion("map_agreement", percent),
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
            truths = truths_of(scored.prompts[:count], self.card.asked or shapes_oracle.ATTRIBUTES)
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

    def _option(self, option: Option) -> dict[str, Any]:
        """A row for each value that was tried, and a chart where they are numbers."""
        names = [
            name
            for name in (self.main, "psnr", "kid", "precision", "recall")
            if name in option.tried[0].values
        ]
        rows = [
            {
                "value": in_words(it.value),
                "chosen": it.value == option.chosen,
                "cells": [_tried(it, name) for name in names],
            }
            for it in option.tried
        ]
        return {
            "name": option.name,
            "metric": _NAMES[option.metric],
            "columns": [_NAMES[name] for name in names],
            "rows": rows,
            "chart": _by_setting(option),
        }

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
            show = percent if name in _SHARES else number
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
            ("parameters", compact(stage.parameters) if stage.parameters else ""),
            ("pictures seen", compact(stage.images_seen) if stage.images_seen else ""),
            ("time", duration(stage.seconds) if stage.seconds else ""),
            *(
                (key.replace("_", " "), number(value))
                for key, value in leaves(stage.measured)
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
        # A stage knows what all of its sittings took, wherever it was trained.
        spent = dict(self.inputs.seconds) | {
            stage.name: stage.seconds for stage in self.inputs.stages if stage.seconds
        }
        spent = {name: seconds for name, seconds in spent.items() if seconds > 0}
        if not spent:
            return None
        longest = max(spent.values())
        return {
            "total": duration(sum(spent.values())),
            "rows": [
                {"name": name, "time": duration(seconds), "share": seconds / longest}
                for name, seconds in spent.items()
            ],
            "memory": compact(self.card.speed.get("peak_memory_bytes", 0)) + "B",
        }

    def _checks(self) -> list[dict[str, Any]]:
        verdict = self.inputs.verdict
        return [
            {
                "name": check.name,
                "passed": check.passed,
                "got": "" if check.got is None else number(check.got),
                "wanted": "" if check.wanted is None else number(check.wanted),
                "why": check.why,
            }
            for check in (verdict.checks if verdict else ())
        ]

    def _replaced(self) -> dict[str, Any] | None:
        """Which stages are the champion's, and what the others changed."""
        verdict = self.inputs.verdict
        if verdict is None or not verdict.stages:
            return None
        return {
            "change": verdict.change,
            "champion": verdict.champion,
            "stages": [
                {
                    "name": it.name,
                    "word": "shared" if it.shared else "new" if it.candidate else "gone",
                    "candidate": it.candidate or "none",
                    "champion": it.champion or "none",
                }
                for it in verdict.stages
            ],
            "metrics": [self._difference(it) for it in verdict.differences],
        }

    def _difference(self, it: Difference) -> dict[str, Any]:
        share = it.metric in _SHARES or it.metric.startswith(f"{self.main}_")
        scale, show = (100, percent) if share else (1, number)
        signed = [f"{x:+.1f}" if share else f"{x:+.3g}" for x in _scaled(it, scale)]
        return {
            "label": _label(it.metric, self.main),
            "candidate": show(it.candidate),
            "champion": show(it.champion),
            "difference": signed[0] + (" points" if share else ""),
            "between": " to ".join(signed[1:]),
            "pairs": f"{it.pairs:,}" if it.pairs else "",
        }


def _tried(it: Tried, name: str) -> dict[str, str]:
    """A metric of one value of an option: its value, and its interval where it has one."""
    ends, share = it.between.get(name), name in _SHARES
    value = it.values[name]
    return {
        "value": percent(value) if share else number(value),
        "between": _ends(*ends, percent=share) if ends else "",
    }


def _by_setting(option: Option) -> Chart | None:
    """What it is chosen by, as a function of the option; beside shares, precision and recall."""
    numbers = [
        (float(it.value), it.values)
        for it in option.tried
        if isinstance(it.value, int | float) and not isinstance(it.value, bool)
    ]
    if len(numbers) < 2:
        return None
    share = option.metric in _SHARES
    if not share:
        lines = {"": [(x, values[option.metric]) for x, values in numbers]}
        return chart(f"{_NAMES[option.metric]}, by {option.name}", option.name, lines)
    named = {option.metric: "asked for and shown", "precision": "precision", "recall": "recall"}
    lines = {label: [(x, values[key]) for x, values in numbers] for key, label in named.items()}
    return chart(f"Fidelity and diversity by {option.name}", option.name, lines, percent=True)


def _scaled(it: Difference, scale: float) -> list[float]:
    return [scale * x for x in (it.mean, it.low, it.high) if x is not None]


def _label(metric: str, main: str) -> str:
    if metric in _NAMES:
        return _NAMES[metric]
    group = metric.removeprefix(f"{main}_")
    if group in _GROUPS:
        return f"{_NAMES[main]}: {_GROUPS[group][0]}"
    return metric.replace("_", " ")


def _between(value: Value, percent: bool = False) -> str:
    if value.low is None or value.high is None:
        return ""
    return _ends(value.low, value.high, percent)


def _ends(low: float, high: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * low:.1f} to {100 * high:.1f} %"
    return f"{number(low)} to {number(high)}"


def _short(value: Any) -> bool:
    return (
        isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and len(str(value)) < 40
    )
