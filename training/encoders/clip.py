"""CLIP's towers: pictures and captions as vectors of one space, and a caption's words.

The text tower gives each word and its last state up to the end token, and the end's projection.

A state says what a word means where it stands, as far as pictures were told apart by it; the word's
own embedding beside it says which word it is, which a small tower forgets on the way up.

Ours and a pretrained one are both open_clip's; a folder of a pretrained one holds
open_clip_config.json and open_clip_model.safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline.schema import PICTURE_EMBEDDING

from .shapes import clip_shape
from .sources import Source
from .text import TextEncoder

Padded = Callable[..., np.ndarray]
"""(captions, limit; by default the tower's context) -> ids [n, limit], padded behind the end."""


def load(
    source: Source, device: torch.device | str = "cpu", precision: str = "fp32"
) -> TextEncoder:
    """The text tower of a CLIP stage or of a pretrained folder."""
    return text_encoder(*open_towers(source), device, precision)


def load_image(
    source: Source, device: torch.device | str = "cpu", precision: str = "fp32"
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The image tower: uint8 [n, 3, side, side] -> {"clip_image_pooled": float16 [n, width]}, each
    of length 1 as the text tower's are."""
    towers = Towers(source).to(device)
    kind, half = torch.device(device).type, precision == "bf16"

    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            pooled = towers.images(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
        return {f"{PICTURE_EMBEDDING}_pooled": pooled.to(torch.float16).cpu().numpy()}

    return encode


class Towers(nn.Module):
    """Both towers of a CLIP, frozen and asked as our own stage is (`contrastive.ClipStage`): it
    may be a stage or a pretrained one, and of each the pictures are prepared as it wants them."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, source: Source):
        super().__init__()
        self.model, self.tokenize = open_towers(source)
        self.side = clip_shape(source)[0]
        prepared = normalisation(source, self.model)
        for name, values in zip(("mean", "deviation"), prepared, strict=True):
            one = torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, one, persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, pixels: UInt8[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch embed"]:
        """Features of length 1 of square pictures of any side."""
        return self._seen(pixels.float() / 255)

    def features(self, x: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch embed"]:
        """The same of pictures in [-1, 1], with gradients."""
        return self._seen((x + 1) / 2)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "batch embed"]:
        """Features of length 1 of captions."""
        ids = torch.from_numpy(self.tokenize(captions)).to(self.mean.device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    @property
    def temperature(self) -> float:
        """What cosines are multiplied by."""
        return self.model.logit_scale.exp().clamp(max=100).item()

    def _seen(self, x: Tensor) -> Tensor:
        """Of pictures in [0, 1]. ValueError unless they are square."""
        if x.shape[-2] != x.shape[-1]:
            raise ValueError(f"clip: pictures must be square, got {list(x.shape)}")
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True)
        found = self.model.encode_image((x - self.mean) / self.deviation)
        return F.normalize(found.float(), dim=-1)


def open_judge(source: Source, device: torch.device | str = "cpu") -> Any:
    """A CLIP to hold pictures against captions, frozen: our stage itself, or a pretrained one that
    is asked as it is (images, features, texts, temperature)."""
    if source.pretrained:
        return Towers(source).to(device)
    from ..stages import load as load_stage

    return load_stage(source.where).to(device)


def open_towers(source: Source) -> tuple[Any, Padded]:
    """(open_clip's model, its tokenizer) of a CLIP stage or of a pretrained folder."""
    if source.pretrained:
        import open_clip

        name = f"local-dir:{source.directory()}"
        model = open_clip.create_model(name, precision="fp32", load_weights=True)
        tokenizer = open_clip.get_tokenizer(name)
        return model, lambda texts, limit=None: np.asarray(tokenizer(list(texts), limit))
    from ..contrastive import tokenizer as of_merges
    from ..stages import load as load_stage

    stage: Any = source.planned or load_stage(source.where)
    text = stage.config.text
    return stage.model, lambda texts, limit=text.context: of_merges(text.vocabulary, limit)(texts)


def normalisation(source: Source, model: Any) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, deviation) by which the image tower wants pictures in [0, 1] prepared."""
    described = getattr(model.visual, "preprocess_cfg", {}) if source.pretrained else {}
    return described.get("mean", (0.5,) * 3), described.get("std", (0.5,) * 3)


def text_encoder(
    model: Any, tokenize: Padded, device: torch.device | str, precision: str = "fp32"
) -> TextEncoder:
    """The text tower of an open_clip model. ValueError for towers that read text in another way."""
    tower = getattr(model, "text", model)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if (
        pool not in ("argmax", "eos")
        or not hasattr(tower, "token_embedding")
        or getattr(tower, "cls_emb", None) is not None
    ):
        raise ValueError(
            f"{type(tower).__name__} pools by {pool!r}: wanted a CLIP whose text ends in an end "
            "token (pool type argmax or eos)"
        )
    eos = (
        None if pool == "argmax" else getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    )
    tower = tower.to(device).eval().requires_grad_(False)

    def cut(texts: Sequence[str], limit: int) -> list[np.ndarray]:
        ids = tokenize(texts, limit)
        last = ids.argmax(1) if eos is None else (ids == eos).argmax(1)
        return [
            row[: end + 1].astype(np.int64) for row, end in zip(ids, last.tolist(), strict=True)
        ]

    def run(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        words = tower.token_embedding(ids)
        x = words + tower.positional_embedding[:length]
        causal = tower.attn_mask
        # Padding comes last, and a causal tower does not look ahead: any other must be told.
        if causal is None:
            seen = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
            heads = tower.transformer.resblocks[0].attn.num_heads
            causal = seen[:, None, None].expand(-1, heads, length, -1).flatten(0, 1)
        else:
            causal = causal[:length, :length]
        x = tower.ln_final(tower.transformer(x, attn_mask=causal))
        pooled = x[torch.arange(len(x), device=x.device), mask.sum(1) - 1]
        projection = tower.text_projection
        if projection is not None:
            pooled = (
                projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
            )
        words = F.layer_norm(words, words.shape[-1:])
        return torch.cat([words, x], dim=-1), F.normalize(pooled, dim=-1)

    width = tower.token_embedding.embedding_dim
    return TextEncoder(cut, run, tower.context_length, torch.device(device), precision, width)
