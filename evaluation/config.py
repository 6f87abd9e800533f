"""How a model is scored. Two models are compared only when both were scored by the same of these,
in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

Setting = bool | int | float | str | tuple[float, ...]
"""What a field of a sampler is set to."""


class EvaluationConfig(BaseModel):
    """What is asked of a model, how often, and against what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["shapes", "captions"] = "captions"
    """shapes: drawn scenes, judged exactly by their pixels; captions: held-out captions, found
    again by CLIP.
    """
    prompts: int = Field(default=512, ge=16)
    guidance_scales: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0)
    """Scales to choose from; 1 (unguided) is always scored beside them."""
    sweep_prompts: int = Field(default=96, ge=8)
    """Prompts that each scale, and each value of an option, is tried on; what is chosen then draws
    them all.
    """
    steps: int | None = Field(default=None, ge=1)
    """Sampling steps; the generator's own by default."""
    options: dict[str, tuple[Setting, ...]] = {}
    """What else is swept, one after the other in this order, once the guidance is chosen: an option
    of a call of the generator (a field of BaseSampler, or with a stage's name before it of its
    StageSampler: "sr1.level") -> values to choose from, the cheapest or least first.
    """
    seed: int = 20_000
    batch: int = Field(default=64, ge=1)
    reference_count: int = Field(default=1024, ge=16)
    """Held-out pictures that the generated ones are compared with."""
    train_count: int = Field(default=4096, ge=16)
    """Training pictures among which memorisation looks for copies."""
    heldout_loss_samples: int = Field(default=512, ge=2)
    likelihood_samples: int = Field(default=64, ge=2)
    """Held-out pictures whose likelihood is computed, where the model has one."""
    kid_block: int = Field(default=32, ge=8)
    """Pictures in each disjoint block of the kernel distance."""
    blocks: int = Field(default=16, ge=2)
    """Blocks of prompts that confidence intervals are made of."""
    gallery: int = Field(default=48, ge=1)
    """Pictures in the report, the first ones; nobody picks."""

    @field_validator("guidance_scales")
    @classmethod
    def _scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or any(not 0 <= scale < 100 for scale in scales):
            raise ValueError(
                f"guidance_scales needs at least one scale between 0 and 100, got {scales}"
            )
        return tuple(sorted(set(scales)))

    @field_validator("options", mode="before")
    @classmethod
    def _named(cls, options: Any, info: ValidationInfo) -> Any:
        """By their full names: they come as pairs (JSON) or as a mapping, whose groups are stages;
        null takes one out that another recipe sweeps.
        """
        if isinstance(options, list | tuple) and all(_is_pair(it) for it in options):
            options = dict(options)
        if not isinstance(options, Mapping):
            return options
        named = {name: it for name, it in _flat(options).items() if it is not None}
        for name, values in named.items():
            if not isinstance(values, list | tuple) or not values or not all(map(_is_set, values)):
                raise ValueError(f"{name}: got {values!r}, wanted a list of values to choose from")
        if "guidance" in named:
            raise ValueError("guidance: its values are evaluation.guidance_scales; list them there")
        if "steps" in named and (steps := info.data.get("steps")):
            raise ValueError(f"steps: evaluation.steps={steps} holds them; unset it to sweep them")
        return named

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without options the text is as before there were any, and so are identities: nothing is
        scored anew. Else as pairs: the order decides, and JSON's objects are stored sorted.
        """
        told = handler(self)
        options = told.pop("options", None)
        return told | ({"options": [list(it) for it in options.items()]} if options else {})


def in_words(value: Any) -> str:
    """A setting as a page or a line of text shows it; of an interval its ends."""
    if isinstance(value, list | tuple):
        return " to ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"sr1": {"level": x}} -> {"sr1.level": x}; what comes later counts."""
    flat: dict[str, Any] = {}
    for name, it in options.items():
        key = f"{before}{name}"
        flat |= _flat(it, f"{key}.") if isinstance(it, Mapping) else {key: it}
    return flat


def _is_pair(it: Any) -> bool:
    return isinstance(it, list | tuple) and len(it) == 2 and isinstance(it[0], str)


def _is_set(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(it, int | float) for it in value)
    return isinstance(value, bool | int | float | str)
