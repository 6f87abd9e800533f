"""The autoencoder's stage: minimise |x - decode(z)| + a little KL(q(z|x), N(0, 1)), z ~ q(z|x).

The loss of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G). The networks that
judge it from outside, a perceptual loss and a discriminator, are options: without them a difference
of gradients over several scales keeps edges sharp, and nothing has to be there before. With a
codebook (VQ-reg) the latents are vectors of it as far as the decoder sees, and the loss of the
codebook takes the place of the divergence. Training over, the stage measures by what its latents
must be shifted and scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .adversarial import QUIET, AdversarialConfig, adaptive_weight, hinge
from .diffusion import normal, uniform
from .measuring import (
    ChannelStatistics,
    alike,
    fixed_batches,
    fixed_rows,
    heldout,
    per_sample,
    psnr,
)
from .networks import Autoencoder, AutoencoderConfig, Discriminator, perplexity
from .perceptual import Perceptual, PerceptualConfig
from .sharding import local, rows
from .stage import Batch, Stage, evaluating, over_workers, seed_of, to_tensors

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
    """Weight of the KL divergence per latent value (latent diffusion: 1e-6 of the sum of all);
    nothing with a codebook, which has no posterior."""
    kl_warm_images: int = 0
    """Images over which that weight grows from 0: held to N(0, 1) from the start, a decoder learns
    to do without what is hard to tell (warm-up, Sønderby et al. 2016, section 2.2)."""
    measured_pictures: int = 4096
    """Pictures over which the latents' mean and deviation are taken once the training is over."""
    perceptual: PerceptualConfig | None = None
    """The distance of a frozen network's features as one more part of the loss."""
    adversarial: AdversarialConfig | None = None
    """A discriminator of patches that the reconstructions are to fool."""

    def __post_init__(self):
        weights = (self.l1, self.l2, self.edges, self.kl)
        if min(weights) < 0 or not self.l1 + self.l2 > 0:
            raise ValueError(
                f"l1, l2, edges, kl must not be negative, and l1 or l2 must be positive, "
                f"got {weights}"
            )
        if self.kl_warm_images < 0:
            raise ValueError(f"kl_warm_images must not be negative, got {self.kl_warm_images}")
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
        self.discriminator: Discriminator | None = None
        if config.adversarial:
            self.discriminator = Discriminator(config.adversarial.discriminator)
        self._chosen: list[tuple[Tensor, Tensor, Tensor]] = []  # since the last update
        self.perceptual: Perceptual | None = None
        if config.perceptual:
            clip = (inputs or {}).get("clip", "")
            self.perceptual = Perceptual(config.perceptual.tower or clip)

    def prepare(self, loader: Any) -> None:
        """Let the codebook begin with latents of the untrained encoder: one that lies elsewhere
        would be a few vectors used and the rest never."""
        codebook = self.network.codebook
        if codebook is None:
            return
        places, wanted = list[Tensor](), 4 * codebook.config.codes
        with evaluating(self):
            for batch in fixed_batches(loader, max(256, wanted // 64), 64):
                z = self.encode(to_tensors(batch, self.device)["pixels"])
                places.append(z.movedim(1, -1).flatten(0, -2))
        codebook.start_at(torch.cat(places), seed_of(self.seed, "codebook"))

    def exported(self) -> dict[str, Tensor]:
        """Without the discriminator, whose work is done, and what revives a codebook."""
        left = ("discriminator.", "network.codebook.idle")
        return {n: t for n, t in super().exported().items() if not n.startswith(left)}

    @torch.no_grad()
    def renew(
        self, images_seen: int, images: int, total: Callable[[Tensor], Tensor], skip: Tensor
    ) -> None:
        """Revive the codebook's dead vectors by places of the global batch, one of each picture, so
        that they are the same for any number of workers."""
        codebook, chosen, self._chosen = self.network.codebook, self._chosen, []
        if codebook is None or not codebook.config.revive_images:
            return
        vectors = local(codebook.vectors)
        codes, width = codebook.vectors.shape
        used, places = vectors.new_zeros(codes), vectors.new_zeros(images, width)
        for position, place, code in chosen:  # a micro-batch may have been repeated
            places[position - images_seen] = place
            used[code] = 1
        both = total(torch.cat([used, places.flatten()]))
        used, places = both[:codes] > 0, both[codes:].view(images, width)
        before = codebook.idle.clone()
        seed = seed_of(self.seed, "codebook", images_seen)
        dead, anew = codebook.revived(used, places, seed)
        dead = dead & ~skip
        codebook.idle.copy_(torch.where(skip, before, torch.where(dead, 0, codebook.idle)))
        own = rows(codebook.vectors)
        vectors.copy_(torch.where(dead[own, None], anew[own], vectors))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss is what compares pictures and what holds the latents together; a discriminator
        adds gradients to it and entries to log."""
        config, network = self.config, self.network
        x = to_unit(batch["pixels"])
        encoded = network.encode(x).float()
        if network.codebook is None:
            kl = per_sample(gaussian_kl(encoded))
            weight = config.kl
            if config.kl_warm_images and self.training:
                weight = weight * (batch["position"] / config.kl_warm_images).clamp(max=1).to(kl)
            held, logged = weight * kl, {"kl": kl}
            y = network.decode(sample_latent(encoded, self.seed, batch["position"])).float()
        else:
            found = network.codebook(encoded)
            if self.training and network.codebook.config.revive_images:
                self._note(encoded, found.codes, batch["position"])
            held = per_sample(found.distance)
            logged = {"codebook": held, "perplexity": self._perplexity(found.codes)}
            y = network.draw(found.z).float()

        if self.training and self.discriminator is not None:
            loss, more = self._judged(x, y, held, batch["position"])
        else:
            loss, more = self._compared(x, y, held)
        logged |= more
        return {"loss": loss, **{name: value.detach().mean() for name, value in logged.items()}}

    def _note(self, z: Image, codes: Tensor, position: Tensor) -> None:
        """For `renew`: a place of each picture, drawn by its position, and what all chose."""
        flat = z.detach().flatten(2)
        drawn = uniform(self.seed, "codebook", position).to(z.device)
        place = (drawn * flat.shape[2]).long().clamp(max=flat.shape[2] - 1)
        row = torch.arange(len(flat), device=z.device)
        self._chosen.append((position, flat[row, :, place], codes.flatten()))

    def _compared(self, x: Image, y: Image, held: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [B] of pictures drawn as y from latents held together at that cost, its parts to
        log)."""
        config = self.config
        l1, l2 = per_sample((y - x).abs()), per_sample((y - x).square())
        loss = config.l1 * l1 + config.l2 * l2 + held
        logged = {"l1": l1, "psnr": psnr(l2)}
        if config.edges:
            logged["edges"] = edge_difference(x, y, config.scales)
            loss = loss + config.edges * logged["edges"]
        if self.perceptual is not None and config.perceptual:
            logged["perceptual"] = self.perceptual(x, y)
            loss = loss + config.perceptual.weight * logged["perceptual"]
        return loss, logged

    def _judged(
        self, x: Image, y: Image, held: Tensor, position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`_compared`, with the adversarial gradient in y and the discriminator's own added to a
        loss that is worth as much as before."""
        config, judge = self.config.adversarial, cast(Discriminator, self.discriminator)
        assert config is not None
        drawn = y.detach().requires_grad_()
        compared, logged = self._compared(x, drawn, held.detach())
        (comparing,) = torch.autograd.grad(compared.sum(), drawn)

        begun = (position >= config.start_images).float()
        real, fake = judge(x).float(), judge(drawn).float()
        fooled = -per_sample(fake) * begun
        (fooling,) = torch.autograd.grad(fooled.sum(), drawn, retain_graph=True)
        weight = adaptive_weight(y, self.network.last_weight, comparing, fooling, config.limit)
        telling = hinge(real, fake) * begun

        slope = comparing + config.weight * weight * fooling
        onwards = (y * slope).flatten(1).sum(1)  # whose gradient in y is the slope
        gradients = held + onwards + QUIET * telling
        loss = compared.detach() + (gradients - gradients.detach())
        logged |= {
            "adversarial": fooled,
            "discriminator": telling,
            "adaptive_weight": weight * begun,
            "logits_real": per_sample(real),
            "logits_fake": per_sample(fake),
        }
        return loss, logged

    def _perplexity(self, codes: Tensor) -> Tensor:
        """Of the vectors that the batch of all workers uses."""
        assert self.network.codebook is not None
        counts = self.network.codebook.counts(codes)
        return perplexity(over_workers(counts) if self.training else counts)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As usual, but where others judge: they take gradients in the middle of a step, up to the
        last layer, and only the network before it is compiled. So it is with a codebook, where
        what was chosen is noted on the way."""
        if not (self.discriminator or self.perceptual or self.network.codebook):
            super().compile(*args, **kwargs)
            return
        for layer in [*self.network.encoder, *self.network.decoder[:-1]]:
            layer.compile(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, pixels: Tensor) -> Image:
        """Pictures uint8 [B, 3, H, W] -> moments [B, 2C, h, w]; latents [B, C, h, w] with a
        codebook."""
        return self.network.encode(to_unit(pixels))

    def decode(self, z: Image) -> Tensor:
        """Latents [B, C, h, w], neither shifted nor scaled -> pictures uint8 [B, 3, H, W]; a
        codebook quantises them first."""
        return to_bytes(self.network.decode(z))

    def finish(self, loader: Any) -> dict[str, Any]:
        """`shift` and `scale`: (z - shift) * scale has mean 0 and deviation 1 per channel; PSNR.

        Taken over the first pictures of the plan, of the largest bucket where there are several,
        each latent sampled once; the PSNR is that of decoded means, over up to 512 training
        pictures and as many held-out ones. With a codebook also how much of it these latents use.
        """
        statistics, most = ChannelStatistics(), alike(loader)[0]
        codebook, used = self.network.codebook, torch.zeros(())
        with evaluating(self):
            for step in count():
                batch = to_tensors(most.batch(step), self.device)
                z = self.encode(batch["pixels"])
                if codebook is None:
                    z = sample_latent(z, self.seed, batch["position"])
                else:
                    used = used + codebook.counts(codebook.nearest(z)).cpu()
                statistics.add(z)
                if statistics.rows >= min(self.config.measured_pictures, most.samples):
                    break
            unseen = heldout(loader)
            judged = {"psnr": self._psnr(loader)}
            if unseen is not None:
                judged["heldout_psnr"] = self._psnr(unseen)
        if codebook is not None:
            judged |= {"perplexity": perplexity(used).item(), "codes_used": int((used > 0).sum())}
        shift, scale = statistics.shift_and_scale()
        return {
            "shift": shift.tolist(),
            "scale": scale.tolist(),
            "latent_shape": list(statistics.shape),
            "pictures": statistics.rows,
            **judged,
        }

    def preview(
        self, loader: Any, seed: int, beat: Callable[[], None] = lambda: None
    ) -> np.ndarray | None:
        """Pairs of a picture and its reconstruction: uint8 [n, H, 2W, 3], n up to 16."""
        shown = alike(heldout(loader) or loader)[0]
        batch = to_tensors(shown.rows(fixed_rows(shown.samples, 16)), self.device)
        pixels = batch["pixels"]
        with evaluating(self):
            again = self.decode(self.network.mean(self.encode(pixels)))
        return torch.cat([pixels, again], dim=3).permute(0, 2, 3, 1).cpu().numpy()

    def _psnr(self, loader: Any) -> float:
        """Mean over up to 512 pictures, in dB."""
        found = []
        for batch in fixed_batches(loader, 512, 64):
            pixels = to_tensors(batch, self.device)["pixels"]
            again = self.decode(self.network.mean(self.encode(pixels)))
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
