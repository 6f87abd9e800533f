"""A codebook: each place of a feature map takes the nearest of its vectors (VQ-VAE).

Van den Oord et al. 2017, section 3. The vectors are plain parameters that learn by gradients, as in
the paper's eq. 3, and not moving averages of what chose them: optimizer, averages, checkpoints and
workers then treat them like any weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from .layers import Image


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How many vectors, and how places and vectors meet."""

    kind: Literal["codebook"] = "codebook"
    codes: int = 1024
    commitment: float = 0.25
    """How strongly places are drawn to their vectors, over how strongly these to them."""
    revive_images: int = 10_000
    """A vector that no place chose for so many images begins anew at a place of the batch (random
    restarts: Dhariwal et al. 2020, Jukebox, section 3.1): it would never learn again. 0: never."""

    def __post_init__(self):
        if self.codes < 2 or self.commitment < 0 or self.revive_images < 0:
            raise ValueError(
                f"codes must be at least 2, commitment and revive_images not negative, "
                f"got {self.codes}, {self.commitment} and {self.revive_images}"
            )


class Quantised(NamedTuple):
    """What a codebook makes of a feature map."""

    z: Image
    """The nearest vectors, exactly; their gradient goes to what was quantised, unchanged."""
    codes: Int64[Tensor, "batch height width"]
    """Their numbers."""
    distance: Image
    """(sg[z] - e)^2 + commitment (z - sg[e])^2, whose mean teaches vectors and places."""


class Codebook(nn.Module):
    """[B, C, h, w] -> Quantised, in float32."""

    idle: Tensor
    """Images since each vector was chosen; with `revive_images` alone."""

    def __init__(self, config: CodebookConfig, width: int):
        super().__init__()
        self.config = config
        self.vectors = nn.Parameter(torch.empty(config.codes, width))
        nn.init.uniform_(self.vectors, -1 / config.codes, 1 / config.codes)
        if config.revive_images:
            self.register_buffer("idle", torch.zeros(config.codes, dtype=torch.int64))

    def forward(self, z: Image) -> Quantised:
        z = z.float()
        codes = self.nearest(z)
        e = F.embedding(codes, self.vectors).movedim(-1, 1)
        distance = (z.detach() - e).square() + self.config.commitment * (z - e.detach()).square()
        # z - z is 0: the value is the vector to the bit, as a decoder will be given it.
        return Quantised(e.detach() + (z - z.detach()), codes, distance)

    @torch.no_grad()
    def nearest(self, z: Image) -> Int64[Tensor, "batch height width"]:
        """The number of the vector at the least Euclidean distance; the first of equals."""
        with torch.autocast(z.device.type, enabled=False):
            places = z.float().movedim(1, -1)
            half = self.vectors.square().sum(1) / 2
            # |z - e|^2 / 2 without |z|^2 / 2, which is the same for all of a place's vectors.
            score = torch.addmm(half, places.flatten(0, -2), self.vectors.T, alpha=-1)
        return score.argmin(1).view(places.shape[:-1])

    @torch.no_grad()
    def start_at(self, places: Float[Tensor, "place width"], seed: int) -> None:
        """Begin with some of these places, which are what the vectors are to stand for."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(places), generator=generator)
        count, width = self.vectors.shape
        chosen = places.cpu()[order[torch.arange(count) % len(order)]]
        # Of two equal vectors the second would never be chosen.
        apart = 0.01 * places.std(0).cpu() * torch.randn(count, width, generator=generator)
        self.vectors.copy_(chosen + apart)

    @torch.no_grad()
    def revived(
        self, used: Bool[Tensor, " code"], places: Float[Tensor, "place width"], seed: int
    ) -> tuple[Bool[Tensor, " code"], Float[Tensor, "code width"]]:
        """Which vectors have been idle for too long, a batch of `places` that chose those `used`
        counted in; and where they begin anew: at some of the places, drawn by the seed."""
        self.idle.copy_(torch.where(used, 0, self.idle + len(places)))
        dead = self.idle >= self.config.revive_images
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(places), generator=generator).to(places.device)
        chosen = places[order[(dead.cumsum(0) - 1).clamp(min=0) % len(places)]]
        # Of two equal vectors the second would never be chosen.
        apart = torch.randn(chosen.shape, generator=generator).to(chosen)
        return dead, chosen + 0.01 * places.std(0) * apart

    def counts(self, codes: Int64[Tensor, "*any"]) -> Float[Tensor, " code"]:
        """How often each vector was chosen."""
        flat = codes.flatten()
        ones = torch.ones_like(flat, dtype=torch.float32)
        return ones.new_zeros(len(self.vectors)).scatter_add_(0, flat, ones)


def perplexity(counts: Float[Tensor, " code"]) -> Float[Tensor, ""]:
    """exp of the entropy of the vectors' shares: as many as would do if all were used alike."""
    share = counts / counts.sum()
    return (-torch.special.xlogy(share, share).sum()).exp()
