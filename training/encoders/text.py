"""A text encoder: tokenize, then run captions of like length together, with hardly any padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

Tokenize = Callable[[Sequence[str], int], Sequence[np.ndarray]]
"""(captions, limit) -> ids of each, at most `limit`, the last the end token, none of padding."""
Run = Callable[
    [Int64[Tensor, "text token"], Bool[Tensor, "text token"] | None],
    tuple[Float[Tensor, "text token width"], Float[Tensor, "text pooled"]],
]
"""(ids, which of them are real; None: all) -> (states, pooled)."""

BATCH_TOKENS = 16384
FEW_ROWS = 8


@dataclass(frozen=True)
class TextEncoder:
    """captions -> (tokens: float16 [length, width] each, pooled: float16 [n, width])."""

    tokenize: Tokenize
    run: Run
    limit: int
    """Tokens that are read at most."""
    device: torch.device
    precision: str = "fp32"
    """bf16: most products are taken in bfloat16."""
    repeats: int = 0
    """The first columns of a token that depend on its id alone: stored once for each id."""

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[list[Float16[np.ndarray, "token width"]], Float16[np.ndarray, "text pooled"]]:
        if not texts:
            raise ValueError("no captions to encode")
        ids = self.tokenize(texts, self.limit)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens: list[np.ndarray] = [np.empty(0)] * len(ids)
        summaries: list[np.ndarray] = []
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            stop, shortest = start + 1, lengths[order[start]]
            while stop < len(order) and lengths[order[stop]] * (stop + 1 - start) <= BATCH_TOKENS:
                # Without padding there is no mask, which is worth a call of its own for a few rows.
                if lengths[order[stop]] > shortest and stop - start >= FEW_ROWS:
                    break
                stop += 1
            rows = order[start:stop]
            states, pooled = self.states([ids[row] for row in rows], int(lengths[rows[-1]]))
            flat = states.to(torch.float16).cpu().numpy()
            for row, state in zip(rows, flat, strict=True):
                tokens[row] = state[: lengths[row]]
            summaries.append(pooled.to(torch.float16).cpu().numpy())
            start = stop
        return tokens, np.concatenate(summaries)[np.argsort(order)]

    def truncated(self, texts: Sequence[str]) -> Bool[np.ndarray, " text"]:
        """Which captions have more tokens than are read: they are cut after `limit` - 1, and end.

        Only those of which `limit` tokens came back need asking.
        """
        ids = self.tokenize(texts, self.limit + 1) if texts else ()
        return np.fromiter((len(row) > self.limit for row in ids), np.bool_, len(ids))

    @torch.no_grad()
    def states(
        self, ids: Sequence[np.ndarray], width: int
    ) -> tuple[Float[Tensor, "text token width"], Float[Tensor, "text pooled"]]:
        """States and pooled of ids padded to `width`."""
        padded = np.zeros((len(ids), width), np.int64)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        real = np.arange(width) < lengths[:, None]
        padded[real] = np.concatenate(ids)
        mask = None if real.all() else torch.from_numpy(real).to(self.device)
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            states, pooled = self.run(torch.from_numpy(padded).to(self.device), mask)
        return states.float(), pooled.float()
