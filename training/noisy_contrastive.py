"""The noise-aware CLIP's stage: which caption a picture still shows under noise.

GLIDE (Nichol et al. 2022, section 2.3) guides by such a CLIP: its image tower is told the noise
level, so that log p(caption | x_t) has its gradient where the samples are. The text tower is
trained along. It judges no finished pictures: that is the other CLIP's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .autoencoding import to_unit
from .contrastive import ClipStage, ClipStageConfig, TextTransformerConfig, VisionTransformerConfig
from .diffusion import DiffusionConfig, normal
from .diffusion.guidance import LogProb, clip_log_prob
from .enlarging import shrunk
from .networks.classifier import Classifier, ClassifierConfig, HeadConfig
from .stage import Batch

_HEAD = "embedding"


@dataclass(frozen=True, kw_only=True)
class NoisyClipStageConfig:
    """Two towers that meet in `embed` dimensions; the one for pictures is told their noise."""

    kind: Literal["noisy_clip"] = "noisy_clip"
    embed: int = 96
    network: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(in_channels=3))
    """The image tower; its one head is the embedding."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """That of the base which is guided; its times may be others."""
    side: int = 0
    """To which pictures are shrunk, as the base's are; 0: the data's."""
    text: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    temperature: float = 0.07
    """Where the learned temperature starts; it never falls below 0.01."""

    def __post_init__(self):
        if self.network.in_channels != 3:
            raise ValueError(f"network.in_channels: got {self.network.in_channels}, wanted 3")
        assert self.towers  # refuses what CLIP would

    @property
    def towers(self) -> ClipStageConfig:
        """The CLIP whose image tower is exchanged."""
        least = VisionTransformerConfig(side=1, patch=1, width=1, layers=1, head_width=1)
        return ClipStageConfig(
            embed=self.embed, image=least, text=self.text, temperature=self.temperature
        )


class NoisyClipStage(ClipStage):
    """Trains on `pixels` (uint8 [B, 3, side, side]) and `caption`, with fresh noise each time."""

    kind = "noisy_clip"

    def __init__(self, config: NoisyClipStageConfig, inputs: dict[str, str] | None = None):
        super().__init__(config.towers, inputs)
        self.config: Any = config
        network = replace(config.network, heads=(HeadConfig(_HEAD, config.embed),))
        tower: Any = Classifier(network)
        # A classifier's heads begin at 0, and features of no length have no direction.
        nn.init.normal_(tower.heads[0].weight, std=network.trunk.widths[-1] ** -0.5)
        self.model.visual = tower

    def seen(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        diffusion, position = self.config.diffusion, batch["position"]
        t = diffusion.draw_times(self.seed, position)
        x0 = self._sized(to_unit(batch["pixels"]))
        a, s = diffusion.build_path().at(t, x0)
        x = a * x0 + s * normal(self.seed, "noise", position, x0.shape[1:])
        return self.noisy_features(x, t)

    def heldout_bands(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        return self.config.diffusion.bands(self.seed, batch["position"])

    def noisy_features(self, x: Tensor, t: Tensor) -> Float[Tensor, "batch embed"]:
        """Normalised features of noisy pictures at time t, with gradients."""
        model = self.config.diffusion.build_model(self.model.visual)
        found = self.model.visual(model.shown(x, t), model.labels(t, x))[_HEAD]
        return functional.normalize(found.float(), dim=-1)

    def features(self, x: Tensor) -> Float[Tensor, "batch embed"]:
        """The same of pictures without noise."""
        return self.noisy_features(self._sized(x), torch.zeros(len(x), device=x.device))

    def _sized(self, x: Tensor) -> Tensor:
        return shrunk(x, self.config.side) if self.config.side else x

    def log_prob(self, captions: Sequence[str]) -> LogProb:
        """(x, t, cond) -> log p(caption | x_t = x) [batch] up to a constant, as guidance takes
        it."""
        return clip_log_prob(self.noisy_features, self.texts(captions), self.temperature)
