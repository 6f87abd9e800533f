"""Autoencoders: a stage of ours, TAEF2, or diffusers' AutoencoderKL, AutoencoderTiny and DC.

All are driven alike: encode(uint8 pictures) -> moments, decode(latents) -> uint8 pictures, and the
latents are neither shifted nor scaled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..autoencoding import to_bytes, to_unit
from . import taef2
from .sources import Source

DIFFUSERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


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
    directory = source.directory()
    kind = json.loads((directory / "config.json").read_text()).get("_class_name")
    if kind == taef2.CLASS:
        codec = taef2.load(directory)
    elif kind in DIFFUSERS:
        import diffusers

        codec = Pretrained(
            getattr(diffusers, kind).from_pretrained(
                str(directory),
                use_safetensors=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                variant=_variant(directory),
            )
        )
    else:
        raise ValueError(
            f"{directory}: config.json describes a {kind}, "
            f"wanted {', '.join((*DIFFUSERS, taef2.CLASS))}"
        )
    return codec.to(device).eval().requires_grad_(False)


def _variant(directory: Path) -> str | None:
    """The infix of the weights' name where no file goes without: "fp16" as a rule."""
    names = [file.name for file in directory.glob("diffusion_pytorch_model*.safetensors")]
    infixes = {name.split(".")[1].partition("-")[0] for name in names if name.count(".") == 2}
    return None if any(name.count(".") == 1 for name in names) else min(infixes, default=None)


def load(
    source: Source, device: torch.device | str = "cpu", precision: str = "fp32"
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """uint8 [n, 3, height, width] -> {"moments": float16 [n, 2C, h, w]}."""
    codec = open_codec(source, device)
    kind, half = torch.device(device).type, precision == "bf16"

    @torch.no_grad()
    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            moments = codec.encode(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
        return {"moments": moments.to(torch.float16).cpu().numpy()}

    return encode
