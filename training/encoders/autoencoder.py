"""Autoencoders: a stage of ours, or diffusers' AutoencoderKL, AutoencoderTiny, AutoencoderDC.

All are driven alike: encode(uint8 pictures) -> moments, decode(latents) -> uint8 pictures, and the
latents are neither shifted nor scaled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..autoencoding import to_bytes, to_unit
from .sources import Source

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


class Pretrained(nn.Module):
    """An autoencoder of diffusers, driven like our stage."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 2C, h, w], or latents [B, C, h, w] that have no posterior."""
        encoded = self.model.encode(to_unit(pixels))
        if hasattr(encoded, "latent_dist"):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], dim=1)
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> uint8 [B, 3, H, W]."""
        return to_bytes(self.model.decode(z).sample)


def open_codec(source: Source, device: torch.device | str = "cpu") -> Any:
    """The autoencoder itself: a module with encode and decode, frozen."""
    if not source.pretrained:
        from ..stages import load as load_stage

        return load_stage(source.where).to(device)
    import diffusers

    directory = source.directory()
    kind = json.loads((directory / "config.json").read_text()).get("_class_name")
    if kind not in CLASSES:
        raise ValueError(
            f"{directory}: config.json describes a {kind}, wanted {', '.join(CLASSES)}"
        )
    model = getattr(diffusers, kind).from_pretrained(
        str(directory), use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
    )
    return Pretrained(model).to(device).eval().requires_grad_(False)


def load(
    source: Source, device: torch.device | str = "cpu"
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """uint8 [n, 3, side, side] -> {"moments": float16 [n, 2C, h, w]}."""
    codec = open_codec(source, device)

    @torch.no_grad()
    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        moments = codec.encode(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
        return {"moments": moments.to(torch.float16).cpu().numpy()}

    return encode
