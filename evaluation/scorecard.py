"""A model's scores: each value names what it was measured with, and only values that name the same
are compared.

A scale is chosen on a sweep of few prompts, and then one value of each option that the config
names; with these all prompts are drawn, and once more unguided. Picture i depends on its own prompt
and seed alone, so the sweep's pictures are the first of the full set, and two models scored with
one config are paired prompt by prompt. Nothing here loads a network: the generator and the
extractor are handed in.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from pydantic import BaseModel, ConfigDict

from pipeline import storage

from . import metrics, shapes_oracle
from .config import EvaluationConfig, Setting
from .editing import edits
from .gate import Evidence
from .given import Given, Pictured, asked_of, bicubic, shrunk, truths_of
from .prompts import Prompt, digest
from .sample import Painter, Pictures, Progress, Sampler, sheet

if TYPE_CHECKING:
    from pipeline.load import Loader

    from .features import Extractor

__all__ = [
    "Basis",
    "EvaluationConfig",
    "Option",
    "Scale",
    "Scorecard",
    "Scored",
    "Tried",
    "Value",
    "score",
]

UNGUIDED = 1.0
NEIGHBOURS = 3
FEWEST = NEIGHBOURS + 1
AMONG = 100


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Basis(_Record):
    """What a value was measured with. Values of different bases are never compared."""

    judge: str
    """The metric's extractor: "oracle", "the line's own CLIP", "the model itself", "pixels", or
    what makes the label maps.
    """
    weights: str | None = None
    resize: str | None = None
    count: int
    """Pictures, prompts or samples that went in."""
    prompts: str | None = None
    reference: str | None = None
    """Digest of the reference pictures or samples."""
    reference_count: int = 0


class Value(_Record):
    """A number, its 95 % interval where it has one, and its basis."""

    value: float
    low: float | None = None
    high: float | None = None
    basis: Basis

    def comparable(self, other: Value) -> bool:
        """May the two be subtracted?"""
        return self.basis == other.basis


class Scale(_Record):
    """The sweep's row of one guidance scale."""

    scale: float
    values: dict[str, float]
    pareto: bool
    """No other scale is at least as good in fidelity and in distribution, and better in one."""


class Tried(_Record):
    """The sweep's row of one value of an option."""

    value: Setting
    values: dict[str, float]
    between: dict[str, tuple[float, float]]
    """95 % intervals, of means over prompts."""


class Option(_Record):
    """The sweep of one option, with the guidance and the options that were chosen before it."""

    name: str
    metric: str
    """What chose."""
    chosen: Setting
    tried: tuple[Tried, ...]


class Scorecard(_Record):
    """All that is known of how good a model is, as JSON."""

    config: EvaluationConfig
    scale: float
    """The guidance scale that everything but the sweep and the unguided values was measured at."""
    headline: dict[str, float]
    values: dict[str, Value]
    sweep: tuple[Scale, ...]
    groups: dict[str, dict[str, float]]
    """Group of prompts -> metric -> mean."""
    attributes: dict[str, dict[str, float]]
    """Attribute -> "all", each group, "unguided" and "shuffled" (the same pictures, each held
    against another's prompt).
    """
    speed: dict[str, float]
    asked: tuple[str, ...] = ()
    """Of drawn scenes, the attributes that the model can be asked for; none: all of them."""
    options: tuple[Option, ...] = ()
    """In the order in which they were swept; what was measured beside `sweep`, was measured with
    those chosen.
    """

    @property
    def chosen(self) -> dict[str, Setting]:
        """The options that the sweep chose, as a call of the generator takes them."""
        return {it.name: it.chosen for it in self.options}


@dataclass(frozen=True)
class Scored:
    """A scorecard and what it was made from."""

    scorecard: Scorecard
    prompts: Sequence[Prompt]
    pictures: Pictures
    """One per prompt at the chosen scale."""
    unguided: Pictures
    sweep: Mapping[float, Pictures]
    """Scale -> the pictures of the first prompts."""
    per_prompt: Mapping[str, ndarray] = field(repr=False)
    """Metric -> float64, one per prompt (or per block or sample); what paired gates subtract."""

    def gallery(self, columns: int = 12) -> ndarray:
        """The first pictures on one sheet, uint8 [H, W, 3]."""
        return sheet(self.pictures[: self.scorecard.config.gallery], columns)

    def grid(self, rows: int = 8) -> ndarray:
        """Prompts (down) by guidance scales (across) on one sheet, uint8 [H, W, 3]."""
        stacked = np.stack([pictures[:rows] for _, pictures in sorted(self.sweep.items())], 1)
        return sheet(stacked.reshape(-1, *stacked.shape[2:]), len(self.sweep))

    def evidence(
        self,
        name: str = "candidate",
        facts: Mapping[str, bool | str] | None = None,
        stages: Mapping[str, str] | None = None,
    ) -> Evidence:
        """What the gate looks at."""
        values = self.scorecard.values
        bases = {metric: value.basis.model_dump_json() for metric, value in values.items()}
        whole = "correct" if self.scorecard.config.kind == "shapes" else "retrieval"
        tuples = {
            metric: bases.get(metric, bases[whole])
            for metric in {*self.scorecard.headline, *self.per_prompt}
        }
        return Evidence(
            name=name,
            values=dict(self.scorecard.headline),
            samples=dict(self.per_prompt),
            tuples=tuples,
            pairs=f"{digest(self.prompts)}, seed {self.scorecard.config.seed}",
            facts=dict(facts or {}),
            stages=dict(stages or {}),
        )

    def save(self, directory: str) -> None:
        """scorecard.json (last: where it is, the rest is), prompts.json, and scored.safetensors
        with values and pictures.
        """
        from safetensors.numpy import save

        arrays = {f"value/{name}": values for name, values in self.per_prompt.items()}
        arrays |= {"pictures": self.pictures, "unguided": self.unguided}
        arrays |= {f"sweep/{scale!r}": drawn for scale, drawn in self.sweep.items()}
        # Of what lies otherwise safetensors writes the bytes as they lie.
        arrays = {name: np.ascontiguousarray(it) for name, it in arrays.items()}
        prompts = [asdict(it) for it in self.prompts]
        storage.publish_bytes(storage.join(directory, "scored.safetensors"), save(arrays))
        storage.publish_json(storage.join(directory, "prompts.json"), prompts)
        storage.publish_json(
            storage.join(directory, "scorecard.json"), self.scorecard.model_dump(mode="json")
        )

    @classmethod
    def load(cls, directory: str) -> Scored:
        """What `save` wrote. FileNotFoundError where nothing was scored."""
        from safetensors.numpy import load

        card = Scorecard.model_validate(
            storage.read_json(storage.join(directory, "scorecard.json"))
        )
        arrays = load(storage.read_bytes(storage.join(directory, "scored.safetensors")))
        named = {name: value for name, value in arrays.items() if "/" in name}
        return cls(
            card,
            [Prompt(**it) for it in storage.read_json(storage.join(directory, "prompts.json"))],
            arrays["pictures"],
            arrays["unguided"],
            {float(name[6:]): drawn for name, drawn in named.items() if name.startswith("sweep/")},
            {name[6:]: values for name, values in named.items() if name.startswith("value/")},
        )


def score(
    generator: Painter,
    config: EvaluationConfig,
    *,
    prompts: Sequence[Prompt],
    clip: Extractor,
    reference: Pictures,
    train: Pictures | None = None,
    heldout: Loader | None = None,
    scale: float | None = None,
    pictured: Pictured | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Score a generator on prompts; `reference` are held-out pictures, `train` training ones (for
    memorisation), `pictured` the prompts' own ones, for a model that enlarges them.

    `heldout` is a loader of held-out encodings for the denoising loss of a generator that has
    `denoising_loss`. `scale` skips the sweep: a champion scored anew keeps the scale and the
    options it serves with. ValueError when prompts, pictures and config do not fit.
    """
    return _Scoring(
        generator, config, prompts, clip, reference, train, heldout, scale, pictured, progress
    ).run()


class _Scoring:
    def __init__(
        self,
        generator: Painter,
        config: EvaluationConfig,
        prompts: Sequence[Prompt],
        clip: Extractor,
        reference: Pictures,
        train: Pictures | None,
        heldout: Loader | None,
        scale: float | None,
        pictured: Pictured | None,
        progress: Progress | None,
    ):
        if config.kind == "shapes" and any(it.truth is None for it in prompts):
            raise ValueError("prompts without a truth: score them with kind 'captions'")
        if min(len(prompts), len(reference)) < FEWEST:
            raise ValueError(
                f"scores need at least {FEWEST} prompts and as many held-out pictures, got "
                f"{len(prompts)} and {len(reference)}: ingest more, or hold out a larger share"
            )
        self.generator, self.config, self.prompts, self.clip = (
            generator,
            config,
            list(prompts),
            clip,
        )
        self.reference, self.train, self.heldout, self.fixed = reference, train, heldout, scale
        self.texts = [it.text for it in self.prompts]
        self.given = Given.of(generator, self.prompts, pictured)
        self.asked = asked_of(generator)
        self.first = min(config.sweep_prompts, len(self.prompts)) if scale is None else 0
        self.scales = sorted({UNGUIDED, *config.guidance_scales}) if scale is None else []
        self.options = config.options if scale is None else {}
        self.begun: dict[_Way, Pictures] = {}
        """Pictures of the first prompts, by the way in which they were drawn."""
        self.spent: dict[_Way, float] = {}
        """The seconds that each of them took."""
        self.sampler = Sampler(
            generator,
            steps=config.steps,
            seed=config.seed,
            batch=config.batch,
            total=(len(self.scales) + self._trials) * self.first
            + 2 * (len(self.prompts) - self.first),
            progress=progress,
            given=self.given.options,
        )
        self.features = clip.images(reference).astype(np.float64)
        self.text_features = clip.texts(self.texts).astype(np.float64)

    @property
    def main(self) -> str:
        """The metric that chooses the scale and heads the page."""
        return "correct" if self.config.kind == "shapes" else "retrieval"

    def run(self) -> Scored:
        sweep = {scale: self._first(scale) for scale in self.scales}
        rows, shown = self._sweep(sweep)
        best = self.fixed if self.fixed is not None else rows[_least(shown)].scale
        options = self._sweep_options(best)
        chosen = {it.name: it.chosen for it in options}
        self.sampler.total = self.sampler.done + sum(
            len(self.prompts) - len(self.begun.get(self._way(scale, chosen), ()))
            for scale in {best, UNGUIDED}
        )
        pictures, seconds, drawn = self._complete(best, chosen)
        unguided = self._complete(UNGUIDED, chosen)[0] if best != UNGUIDED else pictures
        found, plain = self._measure(pictures), self._measure(unguided)
        per_prompt = dict(found.per_prompt) | {f"{self.main}_unguided": plain.per_prompt[self.main]}
        values = dict(found.values) | {
            f"{name}_unguided": value for name, value in plain.values.items()
        }
        if best != UNGUIDED:
            gain = metrics.paired_difference(
                found.per_prompt[self.main], plain.per_prompt[self.main], self.config.blocks
            )
            values["guidance_gain"] = _value(gain, found.values[self.main].basis)
        for name, method, count in (
            ("heldout_loss", "denoising_loss", self.config.heldout_loss_samples),
            ("bits_per_dim", "bits_per_dim", self.config.likelihood_samples),
        ):
            if measured := self._of_heldout(method, count):
                per_prompt[name], values[name] = measured
        if measured := self._reconstructed():
            per_prompt["reconstruction_psnr"], values["reconstruction_psnr"] = measured
        values |= self._enlarged(found, pictures.shape[1]) | self._map_limits(pictures)
        for name, (shares, value) in self._edits().items():
            per_prompt[name], values[name] = shares, value
        groups = self._groups(found)
        of = np.array([it.group for it in self.prompts])
        per_prompt |= {
            f"{self.main}_{group}": found.per_prompt[self.main][of == group] for group in groups
        }
        headline = {
            name: value.value for name, value in values.items() if not name.endswith("_unguided")
        }
        headline[f"{self.main}_unguided"] = values[f"{self.main}_unguided"].value
        headline |= {f"{self.main}_{group}": row[self.main] for group, row in groups.items()}
        speed = {
            "pictures_per_second": drawn / seconds if seconds else 0.0,
            "peak_memory_bytes": float(_peak_memory()),
        }
        card = Scorecard(
            config=self.config,
            scale=best,
            headline=headline | {"pictures_per_second": speed["pictures_per_second"]},
            values=values,
            sweep=tuple(rows),
            groups=groups,
            attributes=self._attributes(found, plain),
            speed=speed,
            asked=self.asked if self.asked != shapes_oracle.ATTRIBUTES else (),
            options=options,
        )
        return Scored(card, self.prompts, pictures, unguided, sweep or {best: pictures}, per_prompt)

    def _way(self, scale: float, options: Mapping[str, Setting]) -> _Way:
        """Names how pictures are drawn: an option that is the generator's own changes nothing."""
        changed = (it for it in options.items() if _default(self.generator, it[0]) != it[1])
        return scale, tuple(sorted(changed))

    @property
    def _trials(self) -> int:
        """How often the first prompts are drawn to choose the options."""
        return sum(
            len({self._way(UNGUIDED, {name: it}) for it in values} - {(UNGUIDED, ())})
            for name, values in self.options.items()
        )

    def _first(self, scale: float, options: Mapping[str, Setting] | None = None) -> Pictures:
        """The first prompts, drawn unless they were."""
        way = self._way(scale, options or {})
        if way not in self.begun:
            drawn = self.sampler(self.texts[: self.first], scale, options=options)
            self.begun[way], self.spent[way] = drawn
        return self.begun[way]

    def _complete(
        self, scale: float, options: Mapping[str, Setting]
    ) -> tuple[Pictures, float, int]:
        """(all pictures, the seconds and the number of those that the sweep had not drawn yet; of
        the sweep's where there are no others)."""
        begun = self.begun.get(way := self._way(scale, options))
        first = 0 if begun is None else len(begun)
        rest, seconds = self.sampler(self.texts, scale, first=first, options=options)
        if begun is None:
            return rest, seconds, len(rest)
        if not len(rest):
            return begun, self.spent[way], first
        return np.concatenate([begun, rest]), seconds, len(rest)

    def _sweep(self, sweep: Mapping[float, Pictures]) -> tuple[list[Scale], list[ndarray]]:
        """(cheap values at each scale, its main metric by prompt). The distribution's values are
        compared only with each other: they are of few pictures.
        """
        found = [self._row(pictures) for pictures in sweep.values()]
        rows, shown = [row for row, _ in found], [it[self.main] for _, it in found]
        points = [(row[self.main], -row["kid"]) for row in rows]
        pareto = [not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points) for p in points]
        scales = [
            Scale(scale=s, values=v, pareto=p) for s, v, p in zip(sweep, rows, pareto, strict=True)
        ]
        return scales, shown

    def _row(self, pictures: Pictures) -> tuple[dict[str, float], dict[str, ndarray]]:
        """(cheap values of pictures of the first prompts, by prompt those that may choose)."""
        features = self.clip.images(pictures)
        count = min(len(features), len(self.features))
        precision, recall = metrics.precision_recall(
            features[:count], self.features[:count], neighbours=NEIGHBOURS
        )
        shown = {self.main: self._fidelity(pictures, features)[self.main]}
        shown |= {name: it for name, it in self._held_to(pictures).items() if name == "psnr"}
        row = {name: float(it.mean()) for name, it in shown.items()} | {
            "clip_score": float(
                metrics.clip_score(features, self.text_features[: len(features)]).mean()
            ),
            "kid": float(metrics.kid(features, self.features, block=count)[0]),
            "precision": precision,
            "recall": recall,
        }
        return row, shown

    def _sweep_options(self, scale: float) -> tuple[Option, ...]:
        """Coordinate by coordinate: what is chosen stays while the next one is tried."""
        found: list[Option] = []
        chosen: dict[str, Setting] = {}
        for name, values in self.options.items():
            rows = [self._row(self._first(scale, {**chosen, name: value})) for value in values]
            tried = tuple(
                Tried(value=value, values=row, between=self._between(shown))
                for value, (row, shown) in zip(values, rows, strict=True)
            )
            chosen[name] = values[_least([shown[self._chooser] for _, shown in rows])]
            found.append(Option(name=name, metric=self._chooser, chosen=chosen[name], tried=tried))
            kept = {self._way(scale, chosen), *((it, ()) for it in self.scales)}
            self.begun = {way: it for way, it in self.begun.items() if way in kept}
        return tuple(found)

    @property
    def _chooser(self) -> str:
        """The metric that chooses options: where nothing but a small picture is told, even an
        enlargement without a model shows all.
        """
        told = getattr(self.generator, "reads_text", True) or self.given.labels is not None
        return self.main if told or self.given.low is None else "psnr"

    def _between(self, shown: Mapping[str, ndarray]) -> dict[str, tuple[float, float]]:
        found = {
            name: metrics.proportion(it)
            if name == self.main
            else metrics.mean_interval(it, self.config.blocks)
            for name, it in shown.items()
        }
        return {name: (it.low, it.high) for name, it in found.items()}

    def _fidelity(
        self, pictures: Pictures, features: ndarray, shift: int = 0
    ) -> dict[str, ndarray]:
        """Per picture: does it show its prompt (or, shifted, that of another picture)?"""
        count = len(pictures)
        if self.config.kind == "shapes":
            truths = truths_of(self.prompts[:count], self.asked)
            verdict = shapes_oracle.judge_all(pictures, truths[shift:] + truths[:shift])
            return {"correct": verdict.pop("all").astype(np.float64)} | {
                f"correct_{name}": right.astype(np.float64) for name, right in verdict.items()
            }
        among = min(AMONG, count)
        texts = np.roll(self.text_features[:count], -shift, 0)
        groups = np.roll([it.group for it in self.prompts[:count]], -shift)
        return {"retrieval": metrics.retrieval_at_1(features, texts, among, groups.tolist())}

    def _measure(self, pictures: Pictures) -> _Measured:
        config, count = self.config, len(pictures)
        features = self.clip.images(pictures).astype(np.float64)
        per_prompt = self._fidelity(pictures, features)
        # Held against another's prompt is, prompts being exchangeable, the same as drawn from
        # another's embedding.
        shuffled = self._fidelity(pictures, features, shift=1 + count // 3)
        per_prompt["clip_score"] = metrics.clip_score(features, self.text_features)
        extractor = self._basis(count)
        against = self._basis(count, self.reference, len(self.reference))
        fidelity = extractor if self.config.kind == "captions" else self._oracle(count)
        values = {
            self.main: _value(metrics.proportion(per_prompt[self.main]), fidelity),
            f"{self.main}_shuffled": _value(metrics.proportion(shuffled[self.main]), fidelity),
            "clip_score": _value(
                metrics.mean_interval(per_prompt["clip_score"], config.blocks), extractor
            ),
        }
        block = min(config.kid_block, count, len(self.features))
        kid = metrics.kid(features, self.features, block=block)
        per_prompt["kid"] = kid
        values["kid"] = (
            _value(metrics.interval(kid), against)
            if len(kid) > 1
            else Value(value=float(kid[0]), basis=against)
        )
        values["fid"] = Value(value=metrics.fid(features, self.features), basis=against)
        for name, number in zip(
            ("precision", "recall"),
            metrics.precision_recall(features, self.features, neighbours=NEIGHBOURS),
            strict=True,
        ):
            values[name] = Value(value=number, basis=against)
        if config.kind == "shapes":
            told = self.prompts[0].truth or {}
            legible = shapes_oracle.legible(pictures, len(told.get("objects", (0,))))
            per_prompt["legible"] = legible.astype(np.float64)
            values["legible"] = _value(metrics.proportion(legible), self._oracle(count))
        if self.train is not None and len(self.train):
            excess = metrics.memorisation(features, self._train_features(), self.features)
            per_prompt["memorisation"] = excess
            basis = self._basis(count, self.train, len(self.train))
            values["memorisation"] = _value(metrics.mean_interval(excess, config.blocks), basis)
        for name, decibels in self._held_to(pictures).items():
            per_prompt[name] = decibels
            basis = self._pixels(count)
            values[name] = _value(metrics.mean_interval(decibels, config.blocks), basis)
        if self.given.map is not None:
            agreeing = self._agreeing(pictures)
            per_prompt["map_agreement"], values["map_agreement"] = agreeing, self._of_maps(agreeing)
        return _Measured(per_prompt, values, shuffled)

    def _held_to(self, pictures: Pictures) -> dict[str, ndarray]:
        """How near pictures come to the real ones, and shrunk to what was given of them; nothing
        for a model that enlarges none.
        """
        low, real = self.given.low, self.given.real
        if low is None or real is None:
            return {}
        return {
            "psnr": metrics.psnr(pictures, real[: len(pictures)]),
            "consistency": metrics.psnr(shrunk(pictures, low.shape[1]), low[: len(pictures)]),
        }

    def _enlarged(self, found: _Measured, side: int) -> dict[str, Value]:
        """What bicubic enlargement makes of the same pictures, and what is gained over it."""
        if self.given.low is None:
            return {}
        plain = bicubic(self.given.low, side)
        count, blocks = len(plain), self.config.blocks
        near = self._held_to(plain)["psnr"]
        shown = self._fidelity(plain, self.clip.images(plain).astype(np.float64))[self.main]
        gain = metrics.paired_difference(found.per_prompt["psnr"], near, blocks)
        fidelity = found.values[self.main].basis
        return {
            f"{self.main}_bicubic": _value(metrics.proportion(shown), fidelity),
            "psnr_bicubic": _value(metrics.mean_interval(near, blocks), self._pixels(count)),
            "psnr_gain": _value(gain, self._pixels(count)),
        }

    def _agreeing(self, pictures: Pictures, shift: int = 0) -> ndarray:
        """Share of each picture's pixels whose class is the one that was asked for (or, shifted,
        for another picture).
        """
        assert self.given.map is not None
        generator: Any = self.generator
        asked = np.roll(self.given.map, -shift, 0)
        return (generator.mapped(pictures) == asked).mean((1, 2), dtype=np.float64)

    def _map_limits(self, pictures: Pictures) -> dict[str, Value]:
        """What agreement chance reaches, the same pictures held against others' maps; and what the
        real pictures reach that the maps are of, through the autoencoder: without one it is 1.
        """
        real = self.given.real
        if self.given.map is None or real is None:
            return {}
        chance = self._agreeing(pictures, shift=1 + len(pictures) // 3)
        found = {"map_agreement_shuffled": self._of_maps(chance)}
        if getattr(self.generator, "codec", None) is not None:
            generator: Any = self.generator
            again = generator.decode(generator.encode(real))
            found["map_agreement_real"] = self._of_maps(self._agreeing(again))
        return found

    def _of_maps(self, agreeing: ndarray) -> Value:
        assert self.given.map is not None
        generator: Any = self.generator
        name, weights = generator.map_judge
        basis = Basis(
            judge=name, weights=weights, count=len(agreeing), prompts=digest(self.prompts),
            reference=self._digest(self.given.map), reference_count=len(self.given.map),
        )  # fmt: skip
        return _value(metrics.mean_interval(agreeing, self.config.blocks), basis)

    def _train_features(self) -> ndarray:
        if not hasattr(self, "_train"):
            assert self.train is not None
            self._train = self.clip.images(self.train)
        return self._train

    def _of_heldout(self, method: str, samples: int) -> tuple[ndarray, Value] | None:
        """What a method of the generator says of fixed held-out samples and draws; None where it
        has no such method, or nothing to say.
        """
        ask: Callable[..., Any] | None = getattr(self.generator, method, None)
        if ask is None or self.heldout is None:
            return None
        from training.measuring import fixed_batches

        losses, keys = [], []
        for batch in fixed_batches(self.heldout, samples, self.config.batch):
            said = ask(batch, self.config.seed)
            if said is None:
                return None
            keys += batch["key"] if "key" in batch else batch["position"].tolist()
            losses.append(np.asarray(said, np.float64).reshape(-1))
        found = np.concatenate(losses)
        basis = Basis(
            judge="the model itself",
            count=len(found),
            reference=_named(keys),
            reference_count=len(found),
        )
        return found, _value(metrics.mean_interval(found, self.config.blocks), basis)

    def _reconstructed(self) -> tuple[ndarray, Value] | None:
        """PSNR of each reference picture through the autoencoder, in dB; None without one."""
        if getattr(self.generator, "codec", None) is None:
            return None
        generator: Any = self.generator
        again = generator.decode(generator.encode(self.reference))
        found = metrics.psnr(again, self.reference)
        basis = Basis(
            judge="the model itself", count=len(found), reference=self._digest(self.reference),
            reference_count=len(found),
        )  # fmt: skip
        return found, _value(metrics.mean_interval(found, self.config.blocks), basis)

    def _edits(self) -> dict[str, tuple[ndarray, Value]]:
        """Whether held-out scenes show what the edit stage should make of them, and all else that
        they did; nothing for a generator without one.
        """
        if self.config.kind != "shapes" or self.heldout is None:
            return {}
        found = edits(self.generator, self.heldout)
        if found is None:
            return {}
        basis = Basis(
            judge="oracle", count=len(found.keys), reference=_named(found.keys),
            reference_count=len(found.keys),
        )  # fmt: skip
        shares = {"edit_changed": found.changed, "edit_kept": found.kept}
        return {
            name: (right.astype(np.float64), _value(metrics.proportion(right), basis))
            for name, right in shares.items()
        }

    def _groups(self, found: _Measured) -> dict[str, dict[str, float]]:
        groups = np.array([it.group for it in self.prompts])
        named = (self.main, "clip_score")
        return {
            str(group): {
                name: float(found.per_prompt[name][groups == group].mean()) for name in named
            }
            | {"prompts": float((groups == group).sum())}
            for group in sorted(set(groups.tolist()))
        }

    def _attributes(self, found: _Measured, plain: _Measured) -> dict[str, dict[str, float]]:
        groups = np.array([it.group for it in self.prompts])
        table = {}
        for name, right in found.per_prompt.items():
            if not name.startswith("correct_"):
                continue
            row = {"all": float(right.mean())}
            row |= {str(g): float(right[groups == g].mean()) for g in sorted(set(groups.tolist()))}
            row |= {
                "unguided": float(plain.per_prompt[name].mean()),
                "shuffled": float(found.shuffled[name].mean()),
            }
            table[name.removeprefix("correct_")] = row
        return table

    def _oracle(self, count: int) -> Basis:
        part = "" if self.asked == shapes_oracle.ATTRIBUTES else f", of {', '.join(self.asked)}"
        return Basis(judge=f"oracle{part}", count=count, prompts=digest(self.prompts))

    def _pixels(self, count: int) -> Basis:
        assert self.given.real is not None
        real = self.given.real
        return Basis(
            judge="pixels", count=count, prompts=digest(self.prompts),
            reference=self._digest(real), reference_count=len(real),
        )  # fmt: skip

    def _basis(self, count: int, against: Pictures | None = None, among: int = 0) -> Basis:
        names = dict(self.clip.tuple_id)
        return Basis(
            judge=names["extractor"],
            weights=names.get("weights"),
            resize=names.get("resize"),
            count=count,
            prompts=digest(self.prompts),
            reference=None if against is None else self._digest(against),
            reference_count=among,
        )

    def _digest(self, pictures: Pictures) -> str:
        cache = self.__dict__.setdefault("_digests", {})
        if id(pictures) not in cache:
            data = np.ascontiguousarray(pictures)
            cache[id(pictures)] = hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()
        return cache[id(pictures)]


_Way = tuple[float, tuple[tuple[str, Setting], ...]]
"""A guidance scale, and the options that are not the generator's own."""


@dataclass(frozen=True)
class _Measured:
    per_prompt: dict[str, ndarray]
    values: dict[str, Value]
    shuffled: dict[str, ndarray]


def _least(shown: Sequence[ndarray]) -> int:
    """The first of those whose pictures are as good, prompt by prompt, as the best ones are, but
    for one standard error of the paired difference (the rule of Breiman et al. 1984, sec. 3.4.3):
    what is won by less on the sweep's few prompts is luck, and what stands later has its price, as
    more guidance has: it varies less.
    """
    best = shown[int(np.argmax([it.mean() for it in shown]))]
    behind = [best - mine for mine in shown]
    return next(
        number
        for number, miss in enumerate(behind)
        if miss.mean() <= miss.std(ddof=1) / np.sqrt(len(miss))
    )


def _default(generator: Any, option: str) -> Any:
    """What a call uses that does not name the option; None for a painter that does not say."""
    stage, _, field = option.rpartition(".")
    if stage:
        return getattr(getattr(generator, "samplers", {}).get(stage), field, None)
    return getattr(generator, "defaults", {}).get(field)


def _named(keys: Sequence[Any]) -> str:
    """A digest that names a list of samples."""
    return hashlib.blake2b(" ".join(map(str, keys)).encode(), digest_size=8).hexdigest()


def _value(found: metrics.Interval, basis: Basis) -> Value:
    return Value(value=found.mean, low=found.low, high=found.high, basis=basis)


def _peak_memory() -> int:
    """Bytes this process held at most, on the accelerator if there is one in use."""
    if (
        (torch := sys.modules.get("torch"))
        and torch.cuda.is_available()
        and torch.cuda.max_memory_allocated()
    ):
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
