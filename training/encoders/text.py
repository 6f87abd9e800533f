"""A text encoder: tokenize, then run captions of like length together, with hardly any padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

Tokenize = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Captions -> ids of each, end token included, none of padding."""
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

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[list[Float16[np.ndarray, "token width"]], Float16[np.ndarray, "text pooled"]]:
        if not texts:
            raise ValueError("no captions to encode")
        ids = self.tokenize(texts)
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
        states, pooled = self.run(torch.from_numpy(padded).to(self.device), mask)
        return states.float(), pooled.float()
