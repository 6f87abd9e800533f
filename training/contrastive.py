"""CLIP's stage: of all captions in the batch a picture's own must be the likeliest, and back.

The model, its tokenizer and its gathering of features over workers are open_clip's (Radford et al.
2021). Two things are ours. The tokenizer may keep a part of the 48,894 merges: byte-pair merges are
ordered, so that their first n are a vocabulary in their own right, which spells rarer words in more
pieces, and a small model is not mostly a table of words. And pictures with the same caption do not
count as each other's counterexamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .autoencoding import to_unit
from .diffusion import uniform
from .measuring import fixed_batches, fixed_rows, heldout
from .stage import Batch, Stage, evaluating, to_tensors

FULL_VOCABULARY = 49408
SETTLED, SETTLED_BETWEEN = 1024, 512
"""Pictures that batch norms are given their statistics by: at the end, and before a held-out loss
is taken on the way."""
SPECIAL = 2 * 256 + 2  # each byte, inside a word and at its end; begin and end of text


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """A transformer over patches."""

    kind: Literal["vit"] = "vit"
    side: int = 32
    patch: int = 4
    width: int = 96
    layers: int = 4
    head_width: int = 32

    def __post_init__(self):
        if self.side % self.patch or self.width % self.head_width:
            raise ValueError(
                f"patch must divide side and head_width must divide width, "
                f"got {self.patch} and {self.side}, {self.head_width} and {self.width}"
            )


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """CLIP's ResNet, whose side shrinks 32 times. From few pictures it learns more than the other.

    On drawn scenes, batch 128, it finds 78 % of captions among 100 after 12,000 looks and 23 s of a
    core (the transformer: 57 %, 66 s); after 28,000, in 47 s, 79 % of held-out combinations.
    """

    kind: Literal["resnet"] = "resnet"
    side: int = 32
    width: int = 16
    """Width of the first blocks; the last are 32 times as wide."""
    layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    head_width: int = 64

    def __post_init__(self):
        if self.side % 32 or (self.width * 32) % self.head_width:
            raise ValueError(
                f"side must be a multiple of 32 and head_width divide 32 times the width, "
                f"got {self.side}, {self.head_width} and {self.width}"
            )


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """A causal transformer over byte-pair tokens."""

    kind: Literal["text"] = "text"
    context: int = 32
    """Tokens of a caption that are read, with begin and end; the rest is cut off."""
    vocabulary: int = 8192
    """Tokens known, from the most frequent on; 49408 is open_clip's own vocabulary."""
    width: int = 96
    layers: int = 3
    heads: int = 3

    def __post_init__(self):
        check_vocabulary(self.vocabulary)
        if self.width % self.heads or self.context < 3:
            raise ValueError(
                f"heads must divide width and context be at least 3, "
                f"got {self.heads}, {self.width} and {self.context}"
            )


@dataclass(frozen=True, kw_only=True)
class ClipStageConfig:
    """Two towers that meet in `embed` dimensions."""

    kind: Literal["clip"] = "clip"
    embed: int = 96
    image: ResNetConfig | VisionTransformerConfig = field(default_factory=ResNetConfig)
    text: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    temperature: float = 0.07
    """Where the learned temperature starts; it never falls below 0.01."""
    shift: int = 0
    """In training pictures are moved by up to so many pixels: few pictures teach more."""

    def __post_init__(self):
        if self.embed < 1 or not self.temperature >= 0.01:
            raise ValueError(
                f"embed must be at least 1 and temperature at least 0.01, "
                f"got {self.embed} and {self.temperature}"
            )
        if not 0 <= self.shift < self.image.side:
            raise ValueError(
                f"shift must lie in 0 to {self.image.side - 1} pixels, got {self.shift}"
            )


class ClipStage(Stage):
    """Trains on `pixels` (uint8 [B, 3, side, side]) and `caption`; `model` is open_clip's CLIP."""

    kind = "clip"
    compares_rows = True

    def __init__(self, config: ClipStageConfig, inputs: dict[str, str] | None = None):
        super().__init__(config)
        self.config: ClipStageConfig
        from open_clip.model import CLIP

        self.model = CLIP(**model_config(config), init_logit_scale=-np.log(config.temperature))
        self._tokenize = tokenizer(config.text.vocabulary, config.text.context)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        ids = self.tokens(batch["caption"]).to(batch["pixels"].device)
        images = self.seen(batch)
        texts = self.model.encode_text(ids, normalize=True).float()
        scale = self._scale()
        # Finished stages are measured by one worker alone: only in training do all of them meet.
        per_image, per_text, own = compare(images, texts, scale, names(ids), self.training)
        losses = [F.cross_entropy(x, own, reduction="none") for x in (per_image, per_text)]
        same = per_image.isneginf().any(1)
        return {
            "loss": (losses[0] + losses[1]) / 2,
            "accuracy": (per_image.detach().argmax(1) == own).float().mean(),
            "same_caption": same.float().mean(),
            "temperature": 1 / scale.detach(),
        }

    def seen(self, batch: Batch) -> Float[Tensor, "batch embed"]:
        """Normalised features of the batch's pictures, as they are trained on."""
        pixels = self.pixels(batch)
        if self.training and self.config.shift:
            pixels = shifted(pixels, self.config.shift, self.seed, batch["position"])
        return self.model.encode_image(pixels, normalize=True).float()

    def tokens(self, captions: Sequence[str]) -> Int64[Tensor, "text token"]:
        """Ids padded with 0 to the context; the end token is the largest id."""
        return torch.from_numpy(self._tokenize(captions))

    def pixels(self, batch: Batch) -> Float[Tensor, "batch 3 side side"]:
        """What the image tower reads: square pictures, resized to its side."""
        return self._fitted(to_unit(batch["pixels"]))

    def _fitted(self, x: Tensor) -> Tensor:
        side = self.config.image.side
        if x.shape[-2] != x.shape[-1]:
            raise ValueError(f"clip: pictures must be square, got {list(x.shape)}")
        if x.shape[-1] != side:
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
        return x

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Float[Tensor, "batch embed"]:
        """Normalised features of square pictures, uint8 [B, 3, H, W]."""
        return self.features(to_unit(pixels))

    def features(self, x: Tensor) -> Float[Tensor, "batch embed"]:
        """Normalised features of square pictures in [-1, 1], with gradients."""
        return self.model.encode_image(self._fitted(x), normalize=True).float()

    @property
    def temperature(self) -> float:
        """What cosines are multiplied by."""
        return self._scale().item()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "batch embed"]:
        """Normalised features of captions."""
        ids = self.tokens(captions).to(self.model.logit_scale.device)
        return self.model.encode_text(ids, normalize=True).float()

    def finish(self, loader: Any) -> dict[str, Any]:
        """Share of pictures whose own caption is the likeliest among 100, or all of a small set."""
        self._settle(loader, SETTLED)
        measured = {
            "accuracy": self._accuracy(loader),
            "among": min(100, loader.samples),
            "temperature": 1 / self._scale().item(),
        }
        unseen = heldout(loader)
        if unseen is not None:
            measured["heldout_accuracy"] = self._accuracy(unseen)
        return measured

    @contextmanager
    def settled(self, loader: Any) -> Iterator[None]:
        kept = [(b, b.clone()) for norm in self._norms() for b in norm.buffers()]
        try:
            with evaluating(self):
                self._settle(loader, SETTLED_BETWEEN)
            yield
        finally:
            for statistic, was in kept:
                statistic.copy_(was)

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    @torch.no_grad()
    def _settle(self, loader: Any, count: int) -> None:
        """Give batch norms the statistics of the averaged weights: theirs are of the raw ones."""
        norms = self._norms()
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        for rows in fixed_batches(loader, count, 128):
            batch = to_tensors(rows, self.model.logit_scale.device)
            self.model.encode_image(self.pixels(batch))
        for norm in norms:
            norm.momentum = 0.1
            norm.eval()

    def _accuracy(self, loader: Any) -> float:
        batch = loader.rows(fixed_rows(loader.samples, 100))
        with evaluating(self):
            return self(to_tensors(batch, self.model.logit_scale.device))["accuracy"].item()

    def _scale(self) -> Tensor:
        return self.model.logit_scale.exp().clamp(max=100)


def shifted(
    pixels: Float[Tensor, "batch 3 side side"], most: int, seed: int, position: Tensor
) -> Float[Tensor, "batch 3 side side"]:
    """Each picture moved by up to `most` pixels along each axis; its edges are drawn out."""
    offset = (uniform(seed, "shift", position, (2,)) * (2 * most + 1)).long() - most
    place = torch.arange(pixels.shape[-1], device=pixels.device)
    place = (place + offset[..., None]).clamp(0, pixels.shape[-1] - 1)  # [batch, 2, side]
    row = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels[row, :, place[:, 0, :, None], place[:, 1, None, :]].permute(0, 3, 1, 2)


def model_config(config: ClipStageConfig) -> dict[str, Any]:
    """The arguments of open_clip.model.CLIP: what open_clip_config.json calls model_cfg."""
    image, text = config.image, config.text
    vision: dict[str, Any] = {
        "image_size": image.side,
        "width": image.width,
        "layers": image.layers,
        "head_width": image.head_width,
    }
    if isinstance(image, VisionTransformerConfig):
        vision["patch_size"] = image.patch
    return {
        "embed_dim": config.embed,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    }


def check_vocabulary(size: int) -> None:
    """ValueError unless `tokenizer` can have so many tokens."""
    if not SPECIAL <= size <= FULL_VOCABULARY:
        raise ValueError(f"vocabulary must lie in {SPECIAL} to {FULL_VOCABULARY}, got {size}")


@lru_cache(4)
def tokenizer(
    vocabulary: int, context: int
) -> Callable[[Sequence[str]], Int64[np.ndarray, "text token"]]:
    """open_clip's SimpleTokenizer with the first merges only: texts -> ids [n, context]."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenize = SimpleTokenizer(context_length=context)
    merges = list(tokenize.bpe_ranks)[: vocabulary - SPECIAL]
    tokenize.bpe_ranks = dict(zip(merges, range(len(merges)), strict=True))
    kept = list(tokenize.encoder)[: vocabulary - 2] + list(tokenize.encoder)[-2:]
    tokenize.encoder = dict(zip(kept, range(vocabulary), strict=True))
    tokenize.decoder = {i: token for token, i in tokenize.encoder.items()}
    tokenize.all_special_ids = [vocabulary - 2, vocabulary - 1]
    tokenize.sot_token_id, tokenize.eot_token_id = tokenize.all_special_ids
    tokenize.vocab_size = vocabulary
    thorough = tokenize.clean_fn

    def clean(text: str) -> str:
        # Mending broken encodings takes most of the time; plain ASCII without entities is whole.
        if text.isascii() and text.isprintable() and "&" not in text:
            return " ".join(text.split()).lower()
        return thorough(text)

    setattr(tokenize, "clean_fn", clean)  # noqa: B010 - typed as one particular function

    @lru_cache(1 << 18)
    def row(text: str) -> Int64[np.ndarray, " token"]:
        return tokenize([text])[0].numpy()

    return lambda texts: np.stack([row(text) for text in texts])


def names(ids: Int64[Tensor, "text token"]) -> Int64[Tensor, " text"]:
    """A number for each caption, the same for the same tokens: a polynomial hash modulo 2^64."""
    powers = torch.tensor([pow(0x5851F42D4C957F2D, k, 1 << 63) for k in range(ids.shape[1])])
    return (ids * powers.to(ids.device)).sum(1)


def compare(
    images: Float[Tensor, "batch embed"],
    texts: Float[Tensor, "batch embed"],
    scale: Tensor,
    captions: Int64[Tensor, " batch"],
    gathered: bool = True,
) -> tuple[Float[Tensor, "batch all"], Float[Tensor, "batch all"], Int64[Tensor, " batch"]]:
    """(logits per image, logits per text, each sample's own column).

    Rows are this worker's samples, columns those of all workers: open_clip's ClipLoss gathers them
    with gradients, so that the sum of the workers' gradients is that of one process with the whole
    batch. Another sample with the very same caption is no counterexample: its logit is -inf.
    """
    from open_clip.loss import ClipLoss

    world = torch.distributed
    together = gathered and world.is_available() and world.is_initialized()
    rank, size = (world.get_rank(), world.get_world_size()) if together else (0, 1)
    everyone = captions
    if size > 1:
        rows = torch.tensor([len(captions), -len(captions)], device=captions.device)
        world.all_reduce(rows, world.ReduceOp.MAX)
        if rows[0] != -rows[1]:
            raise ValueError(
                f"clip: the workers have from {-rows[1]} to {rows[0]} rows: "
                f"choose a batch that the {size} workers divide"
            )
        parts = [torch.empty_like(captions) for _ in range(size)]
        world.all_gather(parts, captions)
        everyone = torch.cat(parts)
    gather = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    own = gather.get_ground_truth(images.device, len(images))
    same = captions[:, None] == everyone
    same[torch.arange(len(own), device=own.device), own] = False
    with warnings.catch_warnings():  # open_clip gathers by a name that torch is about to drop
        warnings.filterwarnings("ignore", ".*all_gather is deprecated", FutureWarning)
        logits = gather.get_logits(images, texts, scale)
    per_image, per_text = (x.masked_fill(same, -torch.inf) for x in logits)
    return per_image, per_text, own
