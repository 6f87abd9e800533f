"""A second opinion on reconstructions: a discriminator that learns along, in the same update.

Where other trainings take turns, here one backward serves both: the autoencoder's gradient is taken
at the pictures it drew and handed on from there, the discriminator's stays with it. So nothing is
drawn twice, and optimizer, checkpoints, resuming and workers are the usual ones. Two consequences:
`max_grad_norm` clips the norm of both together (see QUIET), and both have one learning rate, which
has to be one that a discriminator bears: 3e-4 rather than 2e-3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .measuring import per_sample
from .networks import DiscriminatorConfig
from .stage import over_workers

Image = Float[Tensor, "batch channel height width"]
QUIET = 0.01
"""Factor of the discriminator's loss. The size of an Adam step does not know it, the norm that is
clipped does: a discriminator's gradient is twenty times an autoencoder's, and would silence it."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Who judges the reconstructions, from when on, and what the verdict weighs."""

    kind: Literal["adversarial"] = "adversarial"
    weight: float = 0.5
    """Of the adversarial gradient at the last layer, over that of all that compares pictures."""
    start_images: int = 20_000
    """Images before which nobody judges and the discriminator does not learn."""
    limit: float = 1e4
    """Of the adaptive weight."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self):
        if not self.weight > 0 or not self.limit > 0 or self.start_images < 0:
            raise ValueError(
                "weight and limit must be positive and start_images not negative, got "
                f"{self.weight}, {self.limit} and {self.start_images}"
            )
        if self.discriminator.in_channels != 3:
            raise ValueError(
                f"discriminator.in_channels: got {self.discriminator.in_channels}, wanted 3"
            )


def hinge(real: Image, fake: Image) -> Float[Tensor, " batch"]:
    """The discriminator's loss on its logits (Lim & Ye 2017): 0 beyond 1 on the right side, 1 where
    it can't tell."""
    return (per_sample(F.relu(1 - real)) + per_sample(F.relu(1 + fake))) / 2


def adaptive_weight(
    y: Image, last: Tensor, comparing: Image, fooling: Image, limit: float = 1e4
) -> Tensor:
    """|dL_rec / dw| / (|dL_adv / dw| + 1e-6), w the last layer's weight (Esser et al. 2021, eq. 7).

    `comparing` and `fooling` are the gradients of each row's losses in y, which depends on `last`.
    The losses are means over the global batch: workers add up their rows' gradients.
    """
    slopes = [
        torch.autograd.grad(y, last, at, retain_graph=True)[0].float().flatten()
        for at in (comparing, fooling)
    ]
    rows = slopes[0].new_full((1,), len(y))
    *slopes, rows = over_workers(torch.cat([*slopes, rows])).split([last.numel()] * 2 + [1])
    of_comparing, of_fooling = ((slope / rows).norm() for slope in slopes)
    return (of_comparing / (of_fooling + 1e-6)).clamp(max=limit)
