"""REPA: what a denoiser thinks of a noisy picture is drawn to what a frozen encoder sees in the
clean one.

Yu et al. 2025, "Representation Alignment for Generation", section 3.2 and eq. 8: the states after
one of the first blocks, projected place by place, against the encoder's patch features, by cosine
similarity. Blocks after it learn nothing by it. The projector is trained, averaged and saved with
the network; nothing draws with it, and a finished stage leaves it behind. The encoder stays outside
of whoever learns from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from .encoders.perceptual import Looking
    from .encoders.sources import Source

Image = Float[Tensor, "batch channel height width"]
Map = Float[Tensor, "batch _ _ _"]


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Whose features, which states, and what it weighs."""

    kind: Literal["alignment"] = "alignment"
    weight: float = 0.5
    """0: the likeness is measured, and nothing learns by it."""
    block: int = 8
    """The network's block after which states are aligned: a DiT's, counted from 1; of a U-Net those
    on the way down and the middle's two; of an Efficient U-Net a level on the way down."""
    hidden: int = 2048
    """Width of the projector's hidden layers."""
    tower: str = ""
    """A CLIP stage's directory, or a folder or hub id with a CLIP of open_clip or a vision model of
    transformers (DINOv2 in the paper); by default the CLIP among the stage's inputs, which is the
    line's own."""
    side: int = 0
    """Side in pixels to which pictures are resized for the tower; 0: that which it was made for."""
    width: int = 0
    """Channels of the tower's features; 0: as its config says."""

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.hidden < 1 or self.block < 1 or self.side < 0 or self.width < 0:
            raise ValueError(
                "block and hidden must be at least 1, side and width not negative, got "
                f"{self.block}, {self.hidden}, {self.side} and {self.width}"
            )


class Alignment(nn.Module):
    """(states, clean pictures in [-1, 1]) -> their likeness. The tower is opened where the first
    pictures are."""

    def __init__(self, config: AlignmentConfig, states: int, tower: str | Source):
        super().__init__()
        self.config, self.tower = config, tower
        if not config.width:
            raise ValueError(
                "alignment.width: it is not known how many channels the tower's features have; "
                "name the tower, or the width"
            )
        self.projector = nn.Sequential(
            nn.Linear(states, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.width),
        )
        self.opened: dict[torch.device, Looking[Map]] = {}

    def forward(self, states: Map, x: Image) -> Float[Tensor, " batch"]:
        """The mean cosine similarity over the states' places, in [-1, 1], gradients in the states
        and the projector alone."""
        with torch.no_grad():
            wanted = self.patches(x.device)(x).float()
            if wanted.shape[1] != self.config.width:
                raise ValueError(
                    f"alignment.width is {self.config.width}, the tower's features have "
                    f"{wanted.shape[1]} channels"
                )
            if wanted.shape[-2:] != states.shape[-2:]:
                size = states.shape[-2:]
                wanted = F.interpolate(wanted, size, mode="bilinear", antialias=True)
        found = self.projector(states.movedim(1, -1)).float()
        return F.cosine_similarity(found, wanted.movedim(1, -1), dim=-1).flatten(1).mean(1)

    def patches(self, device: torch.device) -> Looking[Map]:
        """The tower, on a device."""
        if not self.tower:
            raise ValueError(
                "alignment.tower names no network and the stage has no input 'clip': name a CLIP "
                "stage's directory, or a folder with a pretrained network"
            )
        if device not in self.opened:
            from .encoders.perceptual import patches

            self.opened[device] = patches(self.tower, device, self.config.side)
        return self.opened[device]
