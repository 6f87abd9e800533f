"""What pictures are asked of a generator: prompts, and what else it can be told of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .diffusion.guidance import Guide, linear_inverse
from .diffusion.path import Path as NoisePath

BATCH = 32
"""Pictures of up to BATCH_SIDE pixels that are drawn at once: a bound on memory."""
BATCH_SIDE = 256

Pictures = UInt8[np.ndarray, "picture height width 3"]
Labels = Sequence[Mapping[str, str] | None]
"""Of each picture, attribute -> answer; None or {}: of any class."""
Maps = UInt8[np.ndarray, "picture height width"]
"""The index of each pixel's class."""
Embeddings = Float[Tensor, "picture width"]
"""Of pictures by CLIP, of length 1."""


def at_once(side: int) -> int:
    """Pictures of `side` pixels that are drawn at once: of larger ones as many as have no more
    pixels together than BATCH of BATCH_SIDE have, and at least one."""
    return max(1, min(BATCH, BATCH * BATCH_SIDE**2 // max(1, side) ** 2))


@dataclass(frozen=True)
class Known:
    """What is known of pictures before they are drawn: some of their pixels, or smaller copies."""

    pictures: Pictures
    """With a `factor`, of 1/factor the generator's side: each pixel is the mean of a square."""
    mask: Bool[np.ndarray, "picture height width"] | None = None
    """True where a pixel is known; None: everywhere."""
    factor: int = 1
    noise_std: float = 0.02
    """How exactly it is known, in units of half the pixels' range."""
    data_std: float = 0.5
    """Of all pixels, in the same units."""

    def guide(self, rows: slice, path: NoisePath, device: torch.device) -> Guide:
        measured = torch.from_numpy(self.pictures[rows]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        known = torch.ones((), device=device)
        if self.mask is not None:
            known = torch.from_numpy(self.mask[rows]).to(measured)[:, None]

        def operator(x: Tensor) -> Tensor:
            return known * avg_pool2d(x, self.factor)

        return linear_inverse(
            path, operator, known * measured, self.noise_std,
            gram=self.factor**-2, data_std=self.data_std,
        )  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What pictures are asked for: lists of one length."""

    prompts: Sequence[str]
    negatives: Sequence[str] | None
    seeds: Sequence[int]
    labels: Labels | None = None
    low: Pictures | None = None
    embeddings: Embeddings | Literal["prior", "text", "none"] = "prior"
    map: Maps | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None,
        seed: int | Sequence[int],
        labels: Labels | None = None,
        low: Pictures | None = None,
        embeddings: Embeddings | Literal["prior", "text", "none"] = "prior",
        map: Maps | None = None,
    ) -> Request:
        """ValueError where they are not of one length; a seed stands for those that follow it, a
        negative text for as many as there are prompts."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts: wanted a list of texts, got one text: {prompts!r:.80}")
        low, map = (None if it is None else np.asarray(it) for it in (low, map))
        count = len(prompts)
        seeds = (
            [seed + i for i in range(count)] if isinstance(seed, int) else [int(it) for it in seed]
        )
        negatives = [negative] * count if isinstance(negative, str) else negative
        given = {"seed": seeds, "negative": negatives, "labels": labels, "low": low, "map": map}
        given["embeddings"] = embeddings if isinstance(embeddings, Tensor) else None
        for name, values in given.items():
            if values is not None and len(values) != count:
                raise ValueError(f"{name}: got {len(values)} for {count} prompts")
        if isinstance(embeddings, str) and embeddings not in ("prior", "text", "none"):
            raise ValueError(
                f"embeddings: got {embeddings!r}, wanted 'prior', 'text', 'none' or a tensor"
            )
        return cls(prompts, negatives, seeds, labels, low, embeddings, map)

    def batches(self, side: int) -> list[slice]:
        """The rows that are drawn at once, where the largest picture has `side` pixels a side."""
        rows = at_once(side)
        return [slice(start, start + rows) for start in range(0, len(self.prompts), rows)]

    def rows(self, rows: slice) -> Request:
        return Request(
            self.prompts[rows],
            None if self.negatives is None else self.negatives[rows],
            self.seeds[rows],
            None if self.labels is None else self.labels[rows],
            None if self.low is None else self.low[rows],
            self.embeddings[rows] if isinstance(self.embeddings, Tensor) else self.embeddings,
            None if self.map is None else self.map[rows],
        )


def check_labels(
    labels: Labels | None, known: Mapping[str, Sequence[str]], together: Sequence[Sequence[str]]
) -> None:
    """ValueError unless labels say only what is known, and of attributes that make a class
    `together` all or none."""
    if labels is None:
        return
    if not known:
        raise ValueError("labels: no stage of this generator is told classes")
    for row, label in enumerate(labels):
        for name, answer in (label or {}).items():
            if name not in known:
                raise ValueError(
                    f"labels[{row}]: no attribute {name!r}; there are {', '.join(known)}"
                )
            if answer not in known[name]:
                raise ValueError(
                    f"labels[{row}]: {name} {answer!r} is none of {', '.join(known[name])}"
                )
        for names in together:
            said = [name for name in names if name in (label or {})]
            if said and said != list(names):
                raise ValueError(
                    f"labels[{row}]: a class is {' and '.join(names)} together, got "
                    f"{' and '.join(said)} alone"
                )


def check_low(low: Pictures | None, count: int, side: int) -> None:
    """ValueError unless `count` pictures of that side are given where there is a side, and none
    else."""
    if low is None:
        if side and count:
            raise ValueError(
                f"low: this generator enlarges pictures, and none was given; give uint8 "
                f"[{count}, {side}, {side}, 3], one for each prompt"
            )
    elif not side:
        raise ValueError("low: this generator enlarges no picture that a call gives")
    elif low.dtype != np.uint8 or low.shape[1:] != (side, side, 3):
        raise ValueError(
            f"low: got {low.dtype} {list(low.shape)}, wanted uint8 [{count}, {side}, {side}, 3]"
        )


def check_map(map: Maps | None, count: int, names: Sequence[str], side: int) -> None:
    """ValueError unless `count` maps of these classes are given where there are classes, and none
    else."""
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    wanted = f"uint8 [{count}, {side}, {side}], indices of {len(names)} classes ({listed})"
    if map is None:
        if names and count:
            raise ValueError(
                "map: this generator draws by label maps, and none was given; give "
                f"{wanted}, one for each prompt"
            )
    elif not names:
        raise ValueError("map: this generator is told no label maps")
    elif map.dtype != np.uint8 or map.shape[1:] != (side, side):
        raise ValueError(f"map: got {map.dtype} {list(map.shape)}, wanted {wanted}")
    elif len(rows := np.flatnonzero((map >= len(names)).any((1, 2)))):
        raise ValueError(
            f"map[{rows[0]}]: got index {map[rows[0]].max()}, wanted 0 to {len(names) - 1}: "
            f"{listed}"
        )
