"""TAEF2: a tiny autoencoder of FLUX.2's latents, 32 channels at an eighth of the side.

It is published (github madebyollin/taesd, MIT) as two pickled state dicts whose keys and shapes
spell its layers out; diffusers' AutoencoderTiny has no counterpart of the pooled blocks. What
`convert_taef2` makes of them is read like any other pretrained model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline import storage

from ..networks.layers import GroupNorm, conv3
from ..stage import copy_exactly, distinct_tensors

CLASS = "AutoencoderTinyF2"
"""What config.json calls it."""
WEIGHTS = "model.safetensors"
GROUPS = 4

Image = Float[Tensor, "batch channel height width"]
Pixels = UInt8[Tensor, "batch 3 height width"]


class TinyF2(nn.Module):
    """The parts are numbered as in the published files."""

    def __init__(self, latent_channels: int = 32, width: int = 64):
        super().__init__()

        def blocks(pooled: bool = False) -> list[nn.Module]:
            return [Block(width, pooled) for _ in range(3)]

        self.encoder = nn.Sequential(
            *(conv3(3, width), Block(width)),
            *(_plain(width, 2), *blocks()),
            *(_plain(width, 2), *blocks()),
            *(_plain(width, 2), *blocks(pooled=True)),
            conv3(width, latent_channels),
        )
        self.decoder = nn.Sequential(
            *(SoftClamp(), conv3(latent_channels, width), nn.ReLU()),
            *(*blocks(pooled=True), nn.Upsample(scale_factor=2), _plain(width)),
            *(*blocks(), nn.Upsample(scale_factor=2), _plain(width)),
            *(*blocks(), nn.Upsample(scale_factor=2), _plain(width)),
            *(Block(width), conv3(width, 3)),
        )

    def encode(self, pixels: Pixels) -> Image:
        """Pictures -> latents [B, C, H / 8, W / 8]: there is no posterior."""
        return self.encoder(pixels.float() / 255)

    def decode(self, z: Image) -> Pixels:
        """Latents -> pictures of eight times their side."""
        return (self.decoder(z).float() * 255).round().clamp(0, 255).to(torch.uint8)


class Block(nn.Module):
    """relu(x + conv(x)); before that a pooled one adds what it sees over the whole picture."""

    def __init__(self, width: int, pooled: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            *(conv3(width, width), nn.ReLU(), conv3(width, width), nn.ReLU(), conv3(width, width))
        )
        self.pool = None
        if pooled:
            inside = GROUPS * width
            self.pool = nn.Sequential(
                nn.Conv2d(width, inside, 1, bias=False),
                GroupNorm(GROUPS, inside),
                nn.ReLU(),
                nn.Conv2d(inside, width, 1, bias=False),
            )

    def forward(self, x: Image) -> Image:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class SoftClamp(nn.Module):
    """Latents into (-3, 3), smoothly."""

    def forward(self, z: Image) -> Image:
        return 3 * torch.tanh(z / 3)


def load(directory: Path) -> TinyF2:
    """The autoencoder that `convert_taef2` left. ValueError when weights and config disagree."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text())
    return _model(config, load_file(directory / WEIGHTS), str(directory / WEIGHTS))


def convert_taef2(encoder: str | Path, decoder: str | Path, directory: str | Path) -> None:
    """The published taef2_encoder.pth and taef2_decoder.pth -> a folder of a pretrained model.

    The one place that opens a pickle, and no object but tensors comes out of it. Doing it again
    gives the same bytes. ValueError when a file holds anything else, or another network.
    """
    from safetensors.torch import save

    files = {"encoder": encoder, "decoder": decoder}
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, path in files.items()
        for name, tensor in _state_dict(str(path)).items()
    }
    what = f"{encoder} with {decoder}"
    last = tensors.get("encoder.14.weight", torch.empty(0))
    if last.ndim != 4:
        raise ValueError(
            f"{what}: no TAEF2 (tensor 14.weight of the encoder is "
            f"{list(last.shape) if last.numel() else 'missing'}); wanted taef2_encoder.pth and "
            "taef2_decoder.pth, in this order"
        )
    config = {"_class_name": CLASS, "latent_channels": last.shape[0], "width": last.shape[1]}
    _model(config, tensors, what)
    storage.publish_bytes(storage.join(str(directory), WEIGHTS), save(tensors, {"format": "pt"}))
    storage.publish_json(storage.join(str(directory), "config.json"), config)


def _model(config: dict[str, Any], tensors: dict[str, Tensor], what: str) -> TinyF2:
    with torch.device("meta"):
        model = TinyF2(config["latent_channels"], config["width"])
    model = model.to_empty(device="cpu")
    copy_exactly(tensors, distinct_tensors(model), what)
    return model


def _state_dict(path: str) -> dict[str, Tensor]:
    with storage.open_read(path) as file:
        try:
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what is not as expected breaks the reader in many ways
            raise ValueError(
                f"{path}: not a state dict of tensors and nothing else "
                f"({str(error).partition(chr(10))[0]}); "
                "wanted a file that torch.load(path, weights_only=True) reads"
            ) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path}: holds a {type(found).__name__}, wanted a dict of tensors")
    return found


def _plain(width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
