"""The batch plan: (data, seed, step) -> which samples. A pure function; its state is the step.

Of pictures of one size it is the endless concatenation of one permutation per epoch, cut into
global batches: batch k holds positions k * global_batch and on. An epoch's permutation deals the
shards in random order into blocks and mixes the samples inside each block, so that reading touches
few files at a time; up to `block_shards` shards that is a shuffle of everything. How many workers
share a batch never changes which samples it holds.

Of pictures in several buckets it is such a sequence per bucket, and each global batch is the next
one of some bucket (`BucketedPlan`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np

_ORDER, _BLOCK = 0, 1
"""What is shuffled: all shards (as block 0) or steps (as block 1); samples of bucket b (1 + b)."""


@dataclass(frozen=True)
class BatchPlan:
    """Samples are numbered 0.. through the shards in the order of `samples_per_shard`.

    `digest` is that of the data and the selection from it: other data, other shuffles. Plans that
    differ in `bucket` alone take the shards in one order, and the samples inside each in others.
    """

    samples_per_shard: tuple[int, ...]
    digest: str
    seed: int
    global_batch: int
    block_shards: int = 64
    bucket: int = 0

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

    def epoch(self, step: int, row: int = 0) -> int:
        """How often all samples came before that row of global batch `step`."""
        return (step * self.global_batch + row) // self.samples

    def slice(self, step: int, worker: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the global batch, their samples), both int64: the share of one of `workers`, or
        one of so many micro-batches.

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
    def _shuffle(self):
        return _shuffler(self.digest, self.seed)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum((0, *self.samples_per_shard))

    @cached_property
    def _shards(self):
        """epoch -> int64 [shards]: their order."""

        def shards(epoch: int) -> np.ndarray:
            return self._shuffle(len(self.samples_per_shard), _ORDER, 0, epoch)

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
            return ordered[self._shuffle(len(ordered), _BLOCK + self.bucket, number, epoch)]

        return lru_cache(4)(block)


@dataclass(frozen=True)
class BucketedPlan:
    """Global batches of one bucket each: `samples_per_shard` of every bucket, none without samples.

    The samples are numbered bucket after bucket, through the shards in each. Every bucket has a
    sequence of its own, as in `BatchPlan`, and epoch e of the whole brings each to the end of its
    pass e + 1 at least: of a bucket of n samples it has batches ceil(e n / global_batch) up to
    ceil((e + 1) n / global_batch) exclusively. What fills up the batch in which a pass ends is the
    beginning of the bucket's next pass, which goes on behind it: no sample is shown more often than
    others, though those of a bucket smaller than a batch come several times in one and then not for
    some epochs.

    The steps of an epoch are dealt to the buckets at random; the batches of each keep their order.
    """

    samples_per_shard: tuple[tuple[int, ...], ...]
    digest: str
    seed: int
    global_batch: int
    block_shards: int = 64

    def __post_init__(self):
        assert self.buckets, "each plan checks itself"

    @cached_property
    def buckets(self) -> tuple[BatchPlan, ...]:
        """The plan of each bucket."""
        return tuple(
            BatchPlan(counts, self.digest, self.seed, self.global_batch, self.block_shards, bucket)
            for bucket, counts in enumerate(self.samples_per_shard)
        )

    @cached_property
    def samples(self) -> int:
        return sum(plan.samples for plan in self.buckets)

    def turn(self, step: int) -> tuple[int, int]:
        """(the bucket of global batch `step`, which of that bucket's batches it is)."""
        epoch = self.epoch(step)
        buckets, numbers = self._turns(epoch)
        at = step - self._steps(epoch)
        return int(buckets[at]), int(numbers[at])

    def epoch(self, step: int, row: int = 0) -> int:
        """The epoch that global batch `step` belongs to, with all its rows."""
        # Epoch e begins at step e * samples / global_batch or up to a step per bucket later.
        last = step * self.global_batch // self.samples
        first = max(0, (step - len(self.buckets)) * self.global_batch // self.samples)
        return bisect_right(range(last + 1), step, lo=first, key=self._steps) - 1

    def batch(self, step: int) -> np.ndarray:
        """int64 [global_batch]: the samples of global batch `step`."""
        return self.slice(step, 0, 1)[1]

    def slice(self, step: int, worker: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the global batch, their samples), as in `BatchPlan`."""
        bucket, number = self.turn(step)
        rows, samples = self.buckets[bucket].slice(number, worker, workers)
        return rows, samples + self._starts[bucket]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum((0, *(plan.samples for plan in self.buckets)))

    def _taken(self, epoch: int) -> list[int]:
        """How many batches of each bucket come before an epoch."""
        return [-(-epoch * plan.samples // self.global_batch) for plan in self.buckets]

    def _steps(self, epoch: int) -> int:
        return sum(self._taken(epoch))

    @cached_property
    def _turns(self):
        """epoch -> (bucket, number among that bucket's batches) of its steps, int64 each."""

        def turns(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            spans = list(zip(self._taken(epoch), self._taken(epoch + 1), strict=True))
            ordered = np.repeat(np.arange(len(spans)), [last - first for first, last in spans])
            shuffle = _shuffler(self.digest, self.seed)
            buckets = ordered[shuffle(len(ordered), _ORDER, 1, epoch)]
            numbers = np.empty_like(buckets)
            numbers[np.argsort(buckets, kind="stable")] = np.concatenate(
                [np.arange(*span) for span in spans]
            )
            return buckets, numbers

        return lru_cache(4)(turns)


Plan = BatchPlan | BucketedPlan


def dealt(micro_batches: int, worker: int, workers: int) -> range:
    """Which of the micro-batches of a global batch one of `workers` computes.

    They follow each other, and every worker has one at least and at most one more than another.
    Micro-batch m of M holds the rows `slice(step, m, M)`, whoever computes it.
    """
    if not 0 <= worker < workers <= micro_batches:
        raise ValueError(
            f"worker {worker} of {workers} at {micro_batches} micro-batches in a global batch: "
            "wanted 0 <= worker < workers <= micro-batches; choose smaller ones or fewer workers"
        )
    first, stop = (micro_batches * n // workers for n in (worker, worker + 1))
    return range(first, stop)


def _shuffler(digest: str, seed: int):
    """(count, purpose, block, epoch) -> int64 [count]: a permutation."""
    key = np.frombuffer(blake2b(f"{digest} {seed}".encode(), digest_size=16).digest(), np.uint64)

    def shuffle(count: int, purpose: int, block: int, epoch: int) -> np.ndarray:
        # Sorting raw words, not Generator.permutation: numpy keeps the bits of Philox from release
        # to release, but not what its generators make of them.
        bits = np.random.Philox(key=key, counter=[0, purpose, block, epoch])
        return np.argsort(bits.random_raw(count), kind="stable")

    return shuffle


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
