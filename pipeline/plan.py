"""The batch plan: (data, seed, step) -> which samples. A pure function; its state is the step.

The plan is the endless concatenation of one permutation per epoch, cut into global batches: batch k
holds positions k * global_batch and on. An epoch's permutation deals the shards in random order
into blocks and mixes the samples inside each block, so that reading touches few files at a time; up
to `block_shards` shards that is a shuffle of everything. How many workers share a batch never
changes which samples it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True)
class BatchPlan:
    """Samples are numbered 0.. through the shards in the order of `samples_per_shard`.

    `digest` is that of the data and the selection from it: other data, other shuffles.
    """

    samples_per_shard: tuple[int, ...]
    digest: str
    seed: int
    global_batch: int
    block_shards: int = 64

    def __post_init__(self):
        if self.global_batch < 1 or self.block_shards < 1:
            raise ValueError(
                "global_batch and block_shards must be at least 1, "
                f"got {self.global_batch} and {self.block_shards}"
            )
        if self.samples < 1:
            raise ValueError(
                f"no samples to plan batches from ({len(self.samples_per_shard)} shards, all empty)"
                "; ingest pictures, or choose a split that has some"
            )

    @cached_property
    def samples(self) -> int:
        return sum(self.samples_per_shard)

    def batch(self, step: int) -> np.ndarray:
        """int64 [global_batch]: the samples of global batch `step`."""
        return self.at(step * self.global_batch + np.arange(self.global_batch))

    def slice(self, step: int, worker: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the global batch, their samples), both int64: the share of one of `workers`.

        The shares follow each other and differ by at most one row, and every worker has one at
        every step.
        """
        if not 0 <= worker < workers <= self.global_batch:
            raise ValueError(
                f"worker {worker} of {workers} at a global batch of {self.global_batch}: "
                "wanted 0 <= worker < workers <= global batch"
            )
        start, stop = (self.global_batch * n // workers for n in (worker, worker + 1))
        rows = np.arange(start, stop)
        return rows, self.at(step * self.global_batch + rows)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the samples at these positions of the endless sequence."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.samples)
        found = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            ends = self._ends(int(epoch))
            blocks = np.searchsorted(ends, offsets[inside], side="right")
            picked = np.empty(len(blocks), np.int64)
            for block in np.unique(blocks):
                chosen = blocks == block
                first = ends[block - 1] if block else 0
                picked[chosen] = self._block(int(epoch), int(block))[
                    offsets[inside][chosen] - first
                ]
            found[inside] = picked
        return found

    @cached_property
    def _key(self) -> np.ndarray:
        return np.frombuffer(
            blake2b(f"{self.digest} {self.seed}".encode(), digest_size=16).digest(), np.uint64
        )

    def _shuffle(self, count: int, purpose: int, block: int, epoch: int) -> np.ndarray:
        # Sorting raw words, not Generator.permutation: numpy keeps the bits of Philox from release
        # to release, but not what its generators make of them.
        bits = np.random.Philox(key=self._key, counter=[0, purpose, block, epoch])
        return np.argsort(bits.random_raw(count), kind="stable")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum((0, *self.samples_per_shard))

    @cached_property
    def _shards(self):
        """epoch -> int64 [shards]: their order."""

        def shards(epoch: int) -> np.ndarray:
            return self._shuffle(len(self.samples_per_shard), 0, 0, epoch)

        return lru_cache(4)(shards)

    @cached_property
    def _ends(self):
        """epoch -> int64 [blocks]: where in the epoch each block ends."""

        def ends(epoch: int) -> np.ndarray:
            filled = np.cumsum(np.asarray(self.samples_per_shard)[self._shards(epoch)])
            return np.append(filled[self.block_shards - 1 : -1 : self.block_shards], filled[-1])

        return lru_cache(4)(ends)

    @cached_property
    def _block(self):
        """(epoch, block) -> int64: the block's samples in their order."""

        def block(epoch: int, number: int) -> np.ndarray:
            first = number * self.block_shards
            shards = self._shards(epoch)[first : first + self.block_shards]
            spans = zip(self._starts[shards], self._starts[shards + 1], strict=True)
            ordered = np.concatenate([np.arange(*span, dtype=np.int64) for span in spans])
            return ordered[self._shuffle(len(ordered), 1, number, epoch)]

        return lru_cache(4)(block)


def draw(seed: int, purpose: str, positions: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1): one number per position, whatever else is drawn.

    SplitMix64 (Steele et al. 2014) as a counter-based hash.
    """
    key = int.from_bytes(blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "little")
    x = np.asarray(positions, np.int64).astype(np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    ) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53
