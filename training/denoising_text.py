"""T5's stage: spans of a caption are replaced by sentinels, and the decoder writes what was there.

Span corruption (Raffel et al. 2020, section 3.1.4) over bytes (ByT5, Xue et al. 2022), for which
there is no vocabulary and no file, or over pieces of words, as T5 has them; the pieces are those of
CLIP's tokenizer. The decoder serves the training alone; later stages read the encoder. Which spans
go is drawn from (seed, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .contrastive import check_vocabulary, tokenizer
from .diffusion import uniform
from .measuring import fixed_rows, heldout
from .stage import Batch, Stage, evaluating, to_tensors

PAD, EOS, OFFSET, SENTINEL = 0, 1, 3, 259
"""Ids of ByT5: padding, end, byte 0, and the first of the sentinels, which follow the bytes. Where
there are pieces they stand in the place of the bytes."""
SENTINELS = 125
IGNORED = -100  # what cross_entropy skips


@dataclass(frozen=True, kw_only=True)
class T5StageConfig:
    """A T5 over bytes, or over pieces of words. The defaults: 0.4 M parameters."""

    kind: Literal["t5"] = "t5"
    width: int = 64
    layers: int = 3
    decoder_layers: int = 1
    heads: int = 2
    head_width: int = 32
    feedforward: int = 256
    max_bytes: int = 128
    """Bytes of a caption that are read, end token included; the rest is cut off."""
    vocabulary: int = 0
    """Pieces known, the first of CLIP's as `TextTransformerConfig.vocabulary` counts them; 0: bytes
    are read. A word that is one piece has a place of its own, which nobody needs to spell."""
    max_pieces: int = 64
    """Pieces of a caption that are read, end token included, where there is a vocabulary."""
    corrupted: float = 0.15
    """Share of the tokens that are replaced."""
    mean_span: float = 3.0
    """Tokens in a span, on average. Longer ones than a word ask for more than spelling."""
    dropout: float = 0.0

    def __post_init__(self):
        sizes = {
            name: getattr(self, name)
            for name in ("width", "layers", "decoder_layers", "heads", "head_width")
        }
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ValueError(f"sizes must be at least 1, got {wrong}")
        if not 0 < self.corrupted < 1 or self.mean_span < 1:
            raise ValueError(
                f"corrupted must lie in (0, 1) and mean_span be at least 1, "
                f"got {self.corrupted} and {self.mean_span}"
            )
        for name in ("max_bytes", "max_pieces"):
            if not 4 <= getattr(self, name) <= 4096:
                raise ValueError(f"{name} must lie in 4 to 4096, got {getattr(self, name)}")
        if self.vocabulary:
            check_vocabulary(self.vocabulary)
        if self.corrupted * self.limit / self.mean_span > SENTINELS:
            raise ValueError(
                f"{self.limit} tokens would need more than {SENTINELS} sentinels: "
                f"raise mean_span above {self.mean_span}"
            )

    @property
    def limit(self) -> int:
        """Tokens of a caption that are read, end token included."""
        return self.max_pieces if self.vocabulary else self.max_bytes

    @property
    def sentinel(self) -> int:
        """The first of the sentinels, which follow what is read."""
        return OFFSET + self.vocabulary if self.vocabulary else SENTINEL


class T5Stage(Stage):
    """Trains on the captions of a batch; `model` is transformers' T5ForConditionalGeneration."""

    kind = "t5"

    def __init__(self, config: T5StageConfig, inputs: dict[str, str] | None = None):
        super().__init__(config)
        self.config: T5StageConfig
        from transformers import T5ForConditionalGeneration

        self.model = T5ForConditionalGeneration(hub_config(config))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        device = self.model.device
        config = self.config
        ids, lengths = tokens_of(batch["caption"], config, config.limit)
        # As many draws for a short text as for a long one: neighbours must not change them.
        position = torch.as_tensor(batch["position"]).cpu()
        draws = uniform(self.seed, "spans", position, (2, config.limit))
        inputs, labels = corrupt_spans(
            ids, lengths, draws, config.corrupted, config.mean_span, config.sentinel
        )
        inputs, labels = inputs.to(device), labels.to(device)
        logits = self.model(
            input_ids=inputs,
            attention_mask=(inputs != PAD).long(),
            decoder_input_ids=self.model._shift_right(labels),
            use_cache=False,
        ).logits.float()
        nats = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
        counted = labels != IGNORED
        right = (logits.detach().argmax(-1) == labels) & counted
        total = counted.sum().clamp(min=1)
        return {
            "loss": nats.sum(1) / counted.sum(1).clamp(min=1),
            "accuracy": right.sum() / total,
        }

    def finish(self, loader: Any) -> dict[str, Any]:
        """Nats and accuracy per restored token, over up to 512 captions."""
        measured = self._measured(loader)
        unseen = heldout(loader)
        if unseen is not None:
            measured |= {f"heldout_{name}": v for name, v in self._measured(unseen).items()}
        return measured

    def _measured(self, loader: Any) -> dict[str, float]:
        with evaluating(self):
            found = self(to_tensors(loader.rows(fixed_rows(loader.samples, 512))))
        return {"nats": found["loss"].mean().item(), "accuracy": found["accuracy"].item()}


def hub_config(config: T5StageConfig) -> Any:
    """The same as transformers' T5Config."""
    from transformers import T5Config

    known: Any = T5Config  # its signature leaves out what it hands on to PretrainedConfig
    return known(
        vocab_size=config.sentinel + SENTINELS,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.feedforward,
        num_layers=config.layers,
        num_decoder_layers=config.decoder_layers,
        num_heads=config.heads,
        relative_attention_max_distance=config.limit,
        dropout_rate=config.dropout,
        feed_forward_proj="relu",  # as first published; gating by tanh takes a quarter of the time
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def tokens_of(
    texts: Sequence[str], config: T5StageConfig, limit: int
) -> tuple[Int64[Tensor, "text token"], Int64[Tensor, " text"]]:
    """(ids padded with 0, lengths) as this T5 reads them, at most `limit`."""
    if config.vocabulary:
        return piece_tokens(texts, config.vocabulary, limit)
    return byte_tokens(texts, limit)


def piece_tokens(
    texts: Sequence[str], vocabulary: int, limit: int
) -> tuple[Int64[Tensor, "text token"], Int64[Tensor, " text"]]:
    """(ids padded with 0, lengths): CLIP's piece + 3 and an end token, at most `limit`.

    As CLIP's tokenizer has it, capitals and how much space there is are not told apart.
    """
    rows = tokenizer(vocabulary, limit + 1)(texts)[:, 1:]  # without the token that begins a text
    ends = rows == vocabulary - 1
    lengths = ends.argmax(1)
    ids = rows[:, : int(lengths.max(initial=0)) + 1] + OFFSET
    place = np.arange(ids.shape[1])
    ids[place == lengths[:, None]] = EOS
    ids[place > lengths[:, None]] = PAD
    return torch.from_numpy(ids), torch.from_numpy(lengths + 1)


def byte_tokens(
    texts: Sequence[str], limit: int
) -> tuple[Int64[Tensor, "text token"], Int64[Tensor, " text"]]:
    """(ids padded with 0, lengths): ByT5Tokenizer's byte + 3 and an end token, at most `limit`.

    A text is bytes and nothing else: "</s>" in a caption is four characters, not the end token.
    """
    data = [text.encode("utf-8", "replace")[: limit - 1] for text in texts]
    lengths = np.fromiter(map(len, data), np.int64, len(data))
    ids = np.zeros((len(data), int(lengths.max(initial=0)) + 1), np.int64)
    place = np.arange(ids.shape[1])
    ids[place < lengths[:, None]] = (
        np.frombuffer(b"".join(data), np.uint8).astype(np.int64) + OFFSET
    )
    ids[place == lengths[:, None]] = EOS
    return torch.from_numpy(ids), torch.from_numpy(lengths + 1)


def corrupt_spans(
    ids: Int64[Tensor, "text token"],
    lengths: Int64[Tensor, " text"],
    draws: Float[Tensor, "text 2 limit"],
    share: float,
    mean_span: float,
    first_sentinel: int = SENTINEL,
) -> tuple[Int64[Tensor, "text input"], Int64[Tensor, "text label"]]:
    """(inputs padded with 0, labels padded with -100), from numbers drawn uniformly in [0, 1).

    Of n tokens round(n share) are in round(n share / mean_span) spans, at least one, with a token
    between two spans; every such choice of the spans' places is equally likely, and so is every
    choice of their lengths. Input: the text with its k-th span replaced by sentinel k. Labels: each
    sentinel and what it stands for, then the end. A text of one token or none stays as it is and
    has no labels.
    """
    n = lengths - 1
    noise = torch.minimum((n * share).round().long().clamp(min=1), n - 1).clamp(min=0)
    spans = (noise / mean_span).round().long().clamp(min=1)
    # A gap between two spans takes one kept token, and a text has only so many.
    spans = torch.minimum(torch.minimum(spans, noise), n - noise + 1)
    kept, most = n - noise, int(spans.max())
    if most == 0:
        return ids, torch.full((len(ids), 1), IGNORED)

    length = ids.shape[1]
    slot = smallest(draws[:, 0], kept + 1, spans, most)  # kept tokens before each span
    cuts = smallest(draws[:, 1], noise - 1, spans - 1, most)  # after which token a span ends
    real = torch.arange(most) < spans[:, None]
    ends = torch.where(torch.arange(most) < spans[:, None] - 1, cuts + 1, noise[:, None])
    begins = F.pad(ends[:, :-1], (1, 0))
    first, last = slot + begins, slot + ends  # the span is [first, last) of the text

    place = torch.arange(length)
    inside = (first[:, :, None] <= place) & (place < last[:, :, None]) & real[:, :, None]
    begin = (first[:, :, None] == place) & real[:, :, None]
    masked, starts = inside.any(1), begin.any(1)
    sentinel = first_sentinel + starts.cumsum(1) - 1

    there = place < lengths[:, None]
    inputs, _ = compact(torch.where(starts, sentinel, ids), there & (starts | ~masked), PAD)
    end = (place == n[:, None]) & (spans > 0)[:, None]
    pairs = torch.stack([sentinel, ids], dim=2).flatten(1)
    labels, _ = compact(pairs, torch.stack([starts, masked | end], dim=2).flatten(1), IGNORED)
    return inputs, labels


def smallest(draws: Tensor, among: Tensor, count: Tensor, width: int) -> Int64[Tensor, "text span"]:
    """Ascending indices of the `count` smallest of each row's first `among` draws.

    Filled up to `width` with the number of draws.
    """
    place = torch.arange(draws.shape[1])
    rank = draws.masked_fill(place >= among[:, None], 2.0).argsort(1).argsort(1)
    chosen = rank < count[:, None]
    found = torch.where(chosen, place, draws.shape[1]).sort(1).values
    return F.pad(found, (0, width), value=draws.shape[1])[:, :width]


def compact(
    values: Tensor, keep: Bool[Tensor, "text token"], padding: int
) -> tuple[Int64[Tensor, "text token"], Int64[Tensor, " text"]]:
    """(the kept values of each row, moved to its front and padded; how many they are)."""
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    counts = keep.sum(1)
    longest = max(1, int(counts.max()))
    values = values.gather(1, order)[:, :longest]
    return values.masked_fill(torch.arange(longest) >= counts[:, None], padding), counts
