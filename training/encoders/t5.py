"""T5's encoder: its last hidden states up to the end token, and their mean.

Ours and a pretrained one are both transformers' T5EncoderModel; only the tokenizers differ. One of
ours that reads pieces of words is small, and its states say little of what they are states of: each
stands beside its word, as CLIP's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoising_text import T5StageConfig, tokens_of
from .sources import Source
from .text import TextEncoder, Tokenize

LIMIT = 256
"""Tokens that are read of a caption by a pretrained T5."""


def load(
    source: Source, device: torch.device | str = "cpu", precision: str = "fp32"
) -> TextEncoder:
    """The encoder of a T5 stage or of a pretrained folder."""
    if source.pretrained:
        from transformers import T5EncoderModel

        directory = str(source.directory())
        model = T5EncoderModel.from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
        return _encoder(model, _hub_tokenizer(directory), LIMIT, device, precision)
    from ..stages import load as load_stage

    stage = load_stage(source.where)
    model = encoder_of(stage.model)
    config = stage.config
    words = config.vocabulary > 0
    return _encoder(model, _tokenizer(config), config.limit, device, precision, words=words)


def encoder_of(model: Any) -> Any:
    """The T5EncoderModel with the encoder of a T5ForConditionalGeneration: the same tensors."""
    from transformers import T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(model.config)
    encoder.encoder, encoder.shared = model.encoder, model.shared
    return encoder


def _encoder(
    model: Any,
    tokenize: Tokenize,
    limit: int,
    device: torch.device | str,
    precision: str,
    *,
    words: bool = False,
) -> TextEncoder:
    model = model.to(device).eval().requires_grad_(False)

    def run(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        given = None if mask is None else mask.long()
        states = model(input_ids=ids, attention_mask=given).last_hidden_state
        if mask is None:
            pooled = states.mean(1)
        else:
            weight = mask[:, :, None].to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1)
        if words:
            own = model.shared(ids)
            states = torch.cat([F.layer_norm(own, own.shape[-1:]), states], dim=-1)
        return states, pooled

    repeats = model.config.d_model if words else 0
    return TextEncoder(tokenize, run, limit, torch.device(device), precision, repeats)


def _tokenizer(config: T5StageConfig) -> Tokenize:
    def tokenize(texts: Sequence[str], limit: int) -> list[np.ndarray]:
        ids, lengths = tokens_of(texts, config, limit)
        return [row[:length] for row, length in zip(ids.numpy(), lengths.tolist(), strict=True)]

    return tokenize


def _hub_tokenizer(directory: str) -> Tokenize:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def tokenize(texts: Sequence[str], limit: int) -> list[np.ndarray]:
        rows = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        return [np.array(row, np.int64) for row in rows]

    return tokenize
