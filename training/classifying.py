"""The classifier's stage: what a picture still shows under noise, for classifier guidance.

One cross-entropy for each attribute, at every noise level of the process that it is to guide
(Dhariwal & Nichol 2021, section 4). The answers stand in the samples' labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline import shapes

from .autoencoding import to_unit
from .diffusion import Cond, DiffusionConfig, Model, normal
from .enlarging import shrunk
from .measuring import fixed_batches, heldout
from .networks import Classifier, ClassifierConfig, HeadConfig
from .stage import Batch, Stage, evaluating, to_tensors

UNASKED = -100
"""In the place of an answer: the attribute is not asked for. PyTorch's ignore_index."""


@dataclass(frozen=True, kw_only=True)
class AttributeConfig:
    """What is asked of a picture, and the answers there are."""

    name: str
    answers: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "answers", tuple(self.answers))
        if len(set(self.answers)) < max(2, len(self.answers)):
            raise ValueError(
                f"{self.name}: wanted 2 answers or more, all different: {self.answers}"
            )


def of_scenes() -> tuple[AttributeConfig, ...]:
    """The attributes of drawn scenes of one object."""
    known = {
        "colour": shapes.COLOURS,
        "shape": shapes.SHAPES,
        "size": shapes.SIZES,
        "place": shapes.PLACES,
        "background": shapes.BACKGROUNDS,
    }
    return tuple(AttributeConfig(name=name, answers=tuple(all)) for name, all in known.items())


@dataclass(frozen=True, kw_only=True)
class ClassifierStageConfig:
    """A noise-aware classifier of pictures."""

    kind: Literal["classifier"] = "classifier"
    attributes: tuple[AttributeConfig, ...] = field(default_factory=lambda: of_scenes())
    """What labels say; by default what those of drawn scenes do."""
    network: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(in_channels=3))
    """Its heads are those of the attributes."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """That of the base which is guided; its times may be others."""
    side: int = 0
    """To which pictures are shrunk, as the base's are; 0: the data's."""

    def __post_init__(self):
        object.__setattr__(self, "attributes", tuple(self.attributes))
        if self.network.in_channels != 3:
            raise ValueError(f"network.in_channels: got {self.network.in_channels}, wanted 3")


class ClassifierStage(Stage):
    """Trains on `pixels` and the mappings in `label`; rows without a label teach nothing."""

    kind = "classifier"

    def __init__(self, config: ClassifierStageConfig, inputs: dict[str, str] | None = None):
        super().__init__(config)
        self.config: ClassifierStageConfig
        heads = tuple(HeadConfig(it.name, len(it.answers)) for it in config.attributes)
        self.network = Classifier(replace(config.network, heads=heads))

    @property
    def model(self) -> Model:
        """How the network is shown a noisy picture."""
        return self.config.diffusion.build_model(self.network)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        t = self.config.diffusion.draw_times(self.seed, batch["position"])
        logits = self.logits(self._noisy(batch, t, self.seed, ""), t)
        answers = self.answers(batch["label"]).to(t.device)
        loss = torch.zeros(len(answers), device=t.device)
        right = torch.ones(len(answers), dtype=torch.bool, device=t.device)
        for column, it in enumerate(self.config.attributes):
            asked = answers[:, column]
            loss = loss + F.cross_entropy(logits[it.name].float(), asked, reduction="none")
            right &= (logits[it.name].argmax(1) == asked) | (asked == UNASKED)
        return {"loss": loss, "accuracy": right.float().mean()}

    def heldout_bands(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        return self.config.diffusion.bands(self.seed, batch["position"])

    def logits(self, x: Tensor, t: Tensor) -> dict[str, Float[Tensor, "batch answer"]]:
        """Of noisy pictures at time t, by attribute."""
        model = self.model
        return self.network(model.shown(x, t), model.labels(t, x))

    def log_prob(self, wanted: Sequence[Mapping[str, str]]) -> Any:
        """(x, t, cond) -> log p(wanted | x_t = x) [batch], as guidance takes it.

        ValueError for an answer that no attribute has.
        """
        answers = self.answers(wanted, strict=True)

        def log_prob(x: Tensor, t: Tensor, cond: Cond) -> Float[Tensor, " batch"]:
            logits, asked = self.logits(x, t), answers.to(x.device)
            total = torch.zeros(len(x), device=x.device)
            for column, it in enumerate(self.config.attributes):
                total = total - F.cross_entropy(
                    logits[it.name].float(), asked[:, column], reduction="none"
                )
            return total

        return log_prob

    def answers(
        self, labels: Sequence[Mapping[str, Any] | None], strict: bool = False
    ) -> Int64[Tensor, "row attribute"]:
        """Each label's answers as numbers, UNASKED where it has none."""
        rows = []
        for label in labels:
            said = label or {}
            if strict and (odd := [k for k, v in said.items() if not self._knows(k, v)]):
                known = {it.name: it.answers for it in self.config.attributes}
                raise ValueError(f"{odd[0]}={said[odd[0]]!r} cannot be asked for; known: {known}")
            rows.append(
                [
                    it.answers.index(said[it.name]) if said.get(it.name) in it.answers else UNASKED
                    for it in self.config.attributes
                ]
            )
        return torch.tensor(rows, dtype=torch.int64)

    def finish(self, loader: Any) -> dict[str, Any]:
        """The share of labelled pictures of which all that the label says is told, nearly clean and
        half way to noise.
        """
        measured = self._accuracies(loader, "")
        unseen = heldout(loader)
        return measured | (self._accuracies(unseen, "heldout_") if unseen is not None else {})

    def _knows(self, name: str, answer: Any) -> bool:
        return any(it.name == name and answer in it.answers for it in self.config.attributes)

    def _noisy(self, batch: Batch, t: Tensor, seed: int, purpose: str) -> Tensor:
        x0 = to_unit(batch["pixels"])
        x0 = shrunk(x0, self.config.side) if self.config.side else x0
        a, s = self.config.diffusion.build_path().at(t, x0)
        return a * x0 + s * normal(seed, f"{purpose}noise", batch["position"], x0.shape[1:])

    def _accuracies(self, loader: Any, prefix: str) -> dict[str, float]:
        found = {}
        with evaluating(self):
            for name, time in (("clean", 0.02), ("halfway", 0.5)):
                right: list[float] = []
                for rows in fixed_batches(loader, 512, 128):
                    batch = to_tensors(rows, next(self.parameters()).device)
                    t = torch.full((len(batch["position"]),), time, device=batch["pixels"].device)
                    logits = self.logits(self._noisy(batch, t, 0, "judged/"), t)
                    answers = self.answers(batch["label"])
                    told = [logits[it.name].argmax(1).cpu() for it in self.config.attributes]
                    asked = answers != UNASKED
                    correct = ((torch.stack(told, 1) == answers) | ~asked).all(1)
                    right += correct[asked.any(1)].float().tolist()
                if right:
                    found[f"{prefix}accuracy_{name}"] = float(np.mean(right))
        return found
