"""The autoencoder's stage: minimise |x - decode(z)| + a little KL(q(z|x), N(0, 1)), z ~ q(z|x).

The loss of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G) without the networks
that judge it from outside: a difference of gradients over several scales takes the place of a
perceptual loss, so that edges stay sharp and nothing has to be fetched. Training over, the stage
measures by what its latents must be shifted and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .diffusion import normal
from .measuring import (
    ChannelStatistics,
    alike,
    fixed_batches,
    fixed_rows,
    heldout,
    per_sample,
    psnr,
)
from .networks import Autoencoder, AutoencoderConfig
from .stage import Batch, Stage, evaluating, to_tensors

Image = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderStageConfig:
    """What is trained, and what the parts of its loss weigh: means over a picture's values."""

    kind: Literal["autoencoder"] = "autoencoder"
    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    l1: float = 1.0
    l2: float = 1.0
    edges: float = 1.0
    """Weight of the L1 difference of gradients, at full size and `scales` - 1 halvings."""
    scales: int = 2
    kl: float = 1e-4
    """Weight of the KL divergence per latent value (latent diffusion: 1e-6 of the sum of all)."""
    measured_pictures: int = 4096
    """Pictures over which the latents' mean and deviation are taken once the training is over."""

    def __post_init__(self):
        weights = (self.l1, self.l2, self.edges, self.kl)
        if min(weights) < 0 or not self.l1 + self.l2 > 0:
            raise ValueError(
                f"l1, l2, edges, kl must not be negative, and l1 or l2 must be positive, "
                f"got {weights}"
            )
        if self.scales < 1 or self.measured_pictures < 2:
            raise ValueError(
                f"scales must be at least 1 and measured_pictures at least 2, "
                f"got {self.scales} and {self.measured_pictures}"
            )


class AutoencoderStage(Stage):
    """Trains on the field `pixels`, uint8 [B, 3, H, W]."""

    kind = "autoencoder"

    def __init__(self, config: AutoencoderStageConfig, inputs: dict[str, str] | None = None):
        super().__init__(config)
        self.config: AutoencoderStageConfig
        self.network = Autoencoder(config.network)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        x = to_unit(batch["pixels"])
        moments = self.network.encode(x).float()
        z = sample_latent(moments, self.seed, batch["position"])
        y = self.network.decode(z).float()

        l1, l2 = per_sample((y - x).abs()), per_sample((y - x).square())
        kl = per_sample(gaussian_kl(moments))
        loss = config.l1 * l1 + config.l2 * l2 + config.kl * kl
        logged = {"l1": l1, "psnr": psnr(l2), "kl": kl}
        if config.edges:
            logged["edges"] = edge_difference(x, y, config.scales)
            loss = loss + config.edges * logged["edges"]
        return {"loss": loss, **{name: value.detach().mean() for name, value in logged.items()}}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, pixels: Tensor) -> Image:
        """Pictures uint8 [B, 3, H, W] -> moments [B, 2C, h, w]."""
        return self.network.encode(to_unit(pixels))

    def decode(self, z: Image) -> Tensor:
        """Latents [B, C, h, w], neither shifted nor scaled -> pictures uint8 [B, 3, H, W]."""
        return to_bytes(self.network.decode(z))

    def finish(self, loader: Any) -> dict[str, Any]:
        """`shift` and `scale`: (z - shift) * scale has mean 0 and deviation 1 per channel; PSNR.

        Taken over the first pictures of the plan, of the largest bucket where there are several,
        each latent sampled once; the PSNR is that of decoded means, over up to 512 training
        pictures and as many held-out ones.
        """
        statistics, most = ChannelStatistics(), alike(loader)[0]
        with evaluating(self):
            for step in count():
                batch = to_tensors(most.batch(step), self.device)
                moments = self.encode(batch["pixels"])
                statistics.add(sample_latent(moments, self.seed, batch["position"]))
                if statistics.rows >= min(self.config.measured_pictures, most.samples):
                    break
            unseen = heldout(loader)
            judged = {"psnr": self._psnr(loader)}
            if unseen is not None:
                judged["heldout_psnr"] = self._psnr(unseen)
        shift, scale = statistics.shift_and_scale()
        return {
            "shift": shift.tolist(),
            "scale": scale.tolist(),
            "latent_shape": list(statistics.shape),
            "pictures": statistics.rows,
            **judged,
        }

    def preview(self, loader: Any, seed: int) -> np.ndarray | None:
        """Pairs of a picture and its reconstruction: uint8 [n, H, 2W, 3], n up to 16."""
        shown = alike(heldout(loader) or loader)[0]
        batch = to_tensors(shown.rows(fixed_rows(shown.samples, 16)), self.device)
        pixels = batch["pixels"]
        with evaluating(self):
            again = self.decode(self.encode(pixels).chunk(2, dim=1)[0])
        return torch.cat([pixels, again], dim=3).permute(0, 2, 3, 1).cpu().numpy()

    def _psnr(self, loader: Any) -> float:
        """Mean over up to 512 pictures, in dB."""
        found = []
        for batch in fixed_batches(loader, 512, 64):
            pixels = to_tensors(batch, self.device)["pixels"]
            again = self.decode(self.encode(pixels).chunk(2, dim=1)[0])
            found.append(psnr(per_sample((to_unit(again) - to_unit(pixels)).square())))
        return torch.cat(found).mean().item()


def to_unit(pixels: Tensor) -> Image:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_bytes(x: Image) -> Tensor:
    """[-1, 1] -> uint8, rounded, values outside clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def sample_latent(moments: Image, seed: int, position: Tensor, purpose: str = "posterior") -> Image:
    """z ~ N(mean, exp(logvar)), drawn from (seed, purpose, position)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = normal(seed, purpose, position, tuple(mean.shape[1:])).to(mean)
    return mean + (0.5 * logvar).exp() * noise


def gaussian_kl(moments: Image) -> Image:
    """KL(N(mean, exp(logvar)), N(0, 1)) per value, in nats (Kingma & Welling 2014, app. B)."""
    mean, logvar = moments.chunk(2, dim=1)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def edge_difference(x: Image, y: Image, scales: int) -> Float[Tensor, " batch"]:
    """Mean L1 difference of the gradients of x and y, summed over sizes, each half the last."""
    d = y - x  # differences are linear: those of x and y differ by those of y - x
    total = d.new_zeros(len(d))
    for scale in range(scales):
        if scale:
            d = F.avg_pool2d(d, 2)
        total = total + per_sample(d.diff(dim=-1).abs()) + per_sample(d.diff(dim=-2).abs())
    return total
