"""A gate is data, and what is missing does not pass it: no value, NaN, too few samples, no fact.

A candidate is compared with the champion prompt by prompt, both measured anew in one run; it must
be shown not to be worse by the margin, not merely fail to be shown worse. One sided, at the
policy's confidence for every metric: since all must pass, several metrics make no error more likely
(intersection-union test, Berger 1982).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.manifest import fingerprint

from .metrics import paired_difference, student_t


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bound(_Frozen):
    """What a value must be by itself."""

    at_least: float | None = None
    at_most: float | None = None
    samples: int | None = Field(default=None, ge=2)
    """Fewest prompts (or blocks, for metrics that come in blocks); the policy's when None."""

    @model_validator(mode="after")
    def _one_is_given(self) -> Bound:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a bound needs at_least or at_most")
        return self


class Margin(_Frozen):
    """How far from the champion, in the metric's own unit."""

    margin: float = Field(ge=0)
    better: Literal["higher", "lower"] = "higher"
    samples: int | None = Field(default=None, ge=2)
    """Fewest prompts (or blocks, for metrics that come in blocks); the policy's when None."""


class GatePolicy(_Frozen):
    """What a candidate must show to go into service."""

    kind: Literal["gate"] = "gate"
    absolute: dict[str, float | Bound] = {}
    """Metric -> a floor (a bare number) or a bound. The first model must pass these too."""
    non_inferior: dict[str, float | Margin] = {}
    """Metric -> how much worse than the champion it may at most be; above 0."""
    superior: dict[str, float | Margin] = {}
    """Metric -> how much better than the champion it must at least be; 0 for any better."""
    facts: tuple[str, ...] = ("integrity", "lineage", "infra")
    """What must have been checked, and hold. Other facts need not be there, but must hold too."""
    min_samples: int = Field(default=100, ge=2)
    """Fewest prompts behind a value that has one per prompt."""
    blocks: int = Field(default=20, ge=2)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @property
    def identity(self) -> str:
        """Its fingerprint."""
        return fingerprint(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _it_can_refuse(self) -> GatePolicy:
        for metric, rule in self.non_inferior.items():
            if not _margin(rule).margin:
                raise ValueError(
                    f"non_inferior.{metric}: a margin of 0 asks for superior.{metric}=0"
                )
        for rule in self.superior.values():
            _margin(rule)
        if not (self.absolute or self.facts):
            raise ValueError(
                "a policy without absolute bounds and facts would promote any first model"
            )
        return self


def _margin(rule: float | Margin) -> Margin:
    return rule if isinstance(rule, Margin) else Margin(margin=rule)


def _bound(rule: float | Bound) -> Bound:
    return rule if isinstance(rule, Bound) else Bound(at_least=rule)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured of one model. Candidate and champion share the order of their samples."""

    name: str = "candidate"
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    samples: Mapping[str, ArrayLike] = field(default_factory=dict[str, ArrayLike])
    """Metric -> a number per prompt, [prompts] or [prompts, seeds]. Prompts are independent, the
    seeds of one are not. KID has one per block of pictures."""
    tuples: Mapping[str, str] = field(default_factory=dict[str, str])
    """Metric -> how it was measured (extractor, weights, resize); others never compare."""
    pairs: str = ""
    """Names the prompts and seeds; others never compare."""
    facts: Mapping[str, bool | str] = field(default_factory=dict[str, bool | str])
    """What was checked: True where it holds; False, or a text that says why it does not."""
    stages: Mapping[str, str] = field(default_factory=dict[str, str])
    """Stage -> what names its weights: two models with the same one share it."""


class Check(_Frozen):
    """One line of a verdict. `name` is the policy's key, such as `non_inferior.correct`."""

    name: str
    passed: bool
    got: float | None
    wanted: float | None
    why: str


class StageChange(_Frozen):
    """A stage of candidate and champion; None where a model has no such stage."""

    name: str
    candidate: str | None
    champion: str | None

    @property
    def shared(self) -> bool:
        return self.candidate == self.champion


class Difference(_Frozen):
    """A value of candidate and champion, measured alike. `mean` is candidate minus champion, in the
    metric's own unit, with the paired 95 % interval over `pairs` prompts (or blocks) where the
    metric has a value for each."""

    metric: str
    candidate: float
    champion: float
    mean: float
    low: float | None = None
    high: float | None = None
    pairs: int = 0


class Verdict(_Frozen):
    """Whether the candidate may serve, and why."""

    promote: bool
    first: bool
    """There was no champion to compare with."""
    checks: tuple[Check, ...]
    reason: str
    candidate: str = ""
    champion: str | None = None
    policy: str = ""
    """Names the policy that decided."""
    stages: tuple[StageChange, ...] = ()
    """Beside the champion's; none without a champion."""
    differences: tuple[Difference, ...] = ()
    """What the change of stages comes to. They inform: the checks decide."""

    @property
    def replaced(self) -> list[str]:
        """The stages that are not the champion's."""
        return [it.name for it in self.stages if not it.shared]

    @property
    def shared(self) -> list[str]:
        return [it.name for it in self.stages if it.shared]

    @property
    def change(self) -> str:
        """In words, which stages are new; empty without a champion."""
        if not self.stages:
            return ""
        if not self.replaced:
            return f"no stage is new: all are those of {self.champion}"
        groups = {
            "new": [it.name for it in self.stages if not it.shared and it.candidate],
            "gone": [it.name for it in self.stages if not it.candidate],
            f"as in {self.champion}": self.shared,
        }
        return "; ".join(f"{word}: {', '.join(them)}" for word, them in groups.items() if them)


def decide(
    candidate: Evidence | Mapping[str, Any],
    champion: Evidence | Mapping[str, Any] | None,
    policy: GatePolicy,
) -> Verdict:
    """The verdict on a candidate. A pure function; mappings hold the fields of `Evidence`."""
    new = candidate if isinstance(candidate, Evidence) else Evidence(**candidate)
    old = champion if isinstance(champion, Evidence | None) else Evidence(**champion)
    checks = tuple(_checks(new, old, policy))
    failed = [check for check in checks if not check.passed]
    if failed:
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        reason = f"{new.name} is kept out: {failed[0].name}: {failed[0].why}{others}"
    elif old is None:
        reason = f"{new.name} is the first model and passed all {len(checks)} checks"
    else:
        reason = f"{new.name} passed all {len(checks)} checks against {old.name}"
    return Verdict(
        promote=not failed,
        first=old is None,
        checks=checks,
        reason=reason,
        candidate=new.name,
        champion=old.name if old else None,
        policy=policy.identity,
        stages=() if old is None else tuple(_changes(new, old)),
        differences=() if old is None else tuple(_differences(new, old, policy.blocks)),
    )


def _changes(new: Evidence, old: Evidence) -> Iterator[StageChange]:
    for name in dict.fromkeys((*new.stages, *old.stages)):
        mine, theirs = new.stages.get(name), old.stages.get(name)
        yield StageChange(name=name, candidate=mine, champion=theirs)


def _differences(new: Evidence, old: Evidence, blocks: int) -> Iterator[Difference]:
    """Of the values that were measured alike."""
    for metric, value in new.values.items():
        other = old.values.get(metric)
        alike = (new.pairs, new.tuples.get(metric)) == (old.pairs, old.tuples.get(metric))
        if other is None or not alike or not np.isfinite([value, other]).all():
            continue
        mean = value - other
        found = Difference(metric=metric, candidate=value, champion=other, mean=mean)
        a, b = (_per_prompt(it.samples.get(metric, ())) for it in (new, old))
        if len(a) > 1 and a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all():
            gain = paired_difference(a, b, blocks)
            half = (gain.high - gain.low) / 2
            found = found.model_copy(
                update={"low": mean - half, "high": mean + half, "pairs": len(a)}
            )
        yield found


def _checks(new: Evidence, old: Evidence | None, policy: GatePolicy) -> Iterator[Check]:
    for name in dict.fromkeys((*policy.facts, *new.facts)):
        fact = new.facts.get(name, "was not checked")
        why = "holds" if fact is True else fact or "does not hold"
        yield Check(name=f"facts.{name}", passed=fact is True, got=None, wanted=None, why=why)
    for metric, bound in policy.absolute.items():
        yield _absolute(metric, _bound(bound), new, policy)
    if old is not None:
        for gate, rules, sign in (
            ("non_inferior", policy.non_inferior, -1),
            ("superior", policy.superior, 1),
        ):
            for metric, rule in rules.items():
                margin = _margin(rule)
                yield _relative(gate, metric, margin, sign * margin.margin, new, old, policy)


def _absolute(metric: str, bound: Bound, new: Evidence, policy: GatePolicy) -> Check:
    got = new.values.get(metric)
    wanted = bound.at_most if bound.at_least is None else bound.at_least
    why = None
    if got is None:
        why = "was not measured"
    elif not np.isfinite(got):
        why = f"is {got}"
    elif metric in new.samples:
        why = _unusable(_per_prompt(new.samples[metric]), bound.samples or policy.min_samples)
    if why is not None or got is None:
        got = None if got is None or not np.isfinite(got) else got
        return Check(name=f"absolute.{metric}", passed=False, got=got, wanted=wanted, why=str(why))
    low = bound.at_least is None or got >= bound.at_least
    high = bound.at_most is None or got <= bound.at_most
    limits = (
        *([f"at least {bound.at_least:g}"] if bound.at_least is not None else []),
        *([f"at most {bound.at_most:g}"] if bound.at_most is not None else []),
    )
    return Check(
        name=f"absolute.{metric}",
        passed=low and high,
        got=got,
        wanted=bound.at_most if low and not high else wanted,
        why=f"{got:.4g}, wanted {' and '.join(limits)}",
    )


def _relative(
    gate: str,
    metric: str,
    rule: Margin,
    limit: float,
    new: Evidence,
    old: Evidence,
    policy: GatePolicy,
) -> Check:
    def failed(why: str) -> Check:
        return Check(name=f"{gate}.{metric}", passed=False, got=None, wanted=limit, why=why)

    for model in (new, old):
        if metric not in model.samples:
            return failed(f"{model.name} has no value per prompt")
    if (new.pairs, new.tuples.get(metric)) != (old.pairs, old.tuples.get(metric)):
        return failed(
            f"not measured alike: {new.name} by {new.pairs or '?'}, {new.tuples.get(metric)}; "
            f"{old.name} by {old.pairs or '?'}, {old.tuples.get(metric)}"
        )
    a, b = _per_prompt(new.samples[metric]), _per_prompt(old.samples[metric])
    if np.shape(new.samples[metric]) != np.shape(old.samples[metric]):
        return failed(f"{len(a)} prompts of {new.name} do not pair with {len(b)} of {old.name}")
    for model, numbers in ((new, a), (old, b)):
        if why := _unusable(numbers, rule.samples or policy.min_samples):
            return failed(f"{model.name} {why}")
    gains = a - b if rule.better == "higher" else b - a
    blocks = min(policy.blocks, len(gains))
    t = _one_sided(blocks - 1, policy.confidence)
    spread = _widened(t, gains) * _standard_error(gains, blocks)
    if _shares(a) and _shares(b):
        # Prompts that all come out alike show no spread, and prove nothing. But a difference of
        # shares whose mean is the limit m has a variance of m (1 - m) or more: one loss in 1/m.
        spread = max(spread, t * (abs(limit) * (1 - abs(limit)) / len(gains)) ** 0.5)
    mean = float(gains.mean())
    low = mean - spread
    return Check(
        name=f"{gate}.{metric}",
        passed=low > limit,
        got=low,
        wanted=limit,
        why=f"better by {mean:.4g}, at {policy.confidence:.0%} confidence by at least {low:.4g} "
        f"({len(gains)} pairs in {blocks} blocks), wanted more than {limit:g}",
    )


def _per_prompt(samples: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(samples, np.float64)
    return numbers.reshape(len(numbers), -1).mean(1) if numbers.size else np.empty(0)


def _unusable(numbers: NDArray[np.float64], fewest: int) -> str | None:
    if len(numbers) < fewest:
        return f"has {len(numbers)} samples, wanted {fewest} or more"
    if not np.isfinite(numbers).all():
        return f"has {np.count_nonzero(~np.isfinite(numbers))} samples that are NaN or infinite"
    return None


def _standard_error(gains: NDArray[np.float64], blocks: int) -> float:
    # Dealt in turn, so that each block holds every group of prompts, in whatever order they come.
    means = [gains[start::blocks].mean() for start in range(blocks)]
    return float(np.std(means, ddof=1)) / blocks**0.5


def _widened(t: float, gains: NDArray[np.float64]) -> float:
    """The t whose one-sided bound holds where rare large losses skew the gains (Hall 1992).

    "On the removal of skewness by transformation": T + kT^2/3 + k^2T^3/27 + k/6 is near normal,
    with k = skewness / sqrt(n); this inverts it. Rare large gains make nothing narrower.
    """
    centred = gains - gains.mean()
    spread = float(centred.std())
    k = float((centred**3).mean()) / spread**3 / len(gains) ** 0.5 if spread else 0.0
    return t if k > -1e-6 else max(t, 3 / k * (float(np.cbrt(1 + k * (t - k / 6))) - 1))


def _shares(numbers: NDArray[np.float64]) -> bool:
    """Whether these look like right or wrong, or means of a few such."""
    return bool(numbers.min() >= 0 and numbers.max() <= 1 and len(np.unique(numbers)) <= 17)


@lru_cache
def _one_sided(degrees: int, confidence: float) -> float:
    return student_t(degrees, 2 * confidence - 1)
