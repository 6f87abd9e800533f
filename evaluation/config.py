"""How a model is scored. Two models are compared only when both were scored by the same of these,
in one run.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


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
    """Prompts that each scale is tried on; the best scale then draws them all."""
    steps: int | None = Field(default=None, ge=1)
    """Sampling steps; the generator's own by default."""
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
