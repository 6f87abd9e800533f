"""The samples of the benchmark of loading, and its peers: what runs in a peer's environment.

    python -m tests.benchmarks.peers.loading write PEER FOLDER SAMPLES
    python -m tests.benchmarks.peers.loading read PEER FOLDER WORKERS PASS BORN

Nothing of ours is imported here. A batch is a `Batch`, whoever made it; peers do not pad its text.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.processes import disk_bytes, processor_seconds

BATCH = 256
MOMENTS, WIDTH, TOKENS = (8, 32, 32), 768, (20, 77)
"""Mean and log-variance of 4 channels at 256 px; tokens of a caption, each of WIDTH; float16."""
SHARD_SAMPLES = 1024
SECONDS = 3.0
SKIPPED = 8  # batches; a shuffle buffer is full and every worker is at work by then


class Sample(NamedTuple):
    number: int
    moments: np.ndarray
    tokens: np.ndarray
    """float16 [as many as the caption has, WIDTH]."""
    pooled: np.ndarray


class Batch(NamedTuple):
    """Arrays, or tensors where a worker sends them: it does so through shared memory."""

    numbers: Any
    """int64 [rows]."""
    moments: Any
    """float16 [rows, *MOMENTS]."""
    tokens: Any
    """float16 [rows, longest, WIDTH], or those of all rows [sum of lengths, WIDTH]."""
    lengths: Any
    """int64 [rows]."""
    pooled: Any
    """float16 [rows, WIDTH]."""


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(np.float16)


def sample(number: int) -> Sample:
    """The same values for all contenders: pieces of one noise, each from a place of its own."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(TOKENS[0], TOKENS[1] + 1))
    sizes = [int(np.prod(MOMENTS)), count * WIDTH, WIDTH]
    start = int(rng.integers(len(_noise()) - sum(sizes)))
    moments, tokens, pooled = np.split(_noise()[start : start + sum(sizes)], np.cumsum(sizes)[:-1])
    return Sample(number, moments.reshape(MOMENTS), tokens.reshape(count, WIDTH), pooled)


def stored(one: Sample) -> dict[str, bytes]:
    """A sample as the members or columns of a peer: raw bytes, for parsing .npy costs more."""
    return {name: getattr(one, name).tobytes() for name in ("moments", "tokens", "pooled")}


def collate(rows: Iterable[tuple[int, bytes, bytes, bytes]]) -> Batch:
    """A batch of (number, moments, tokens, pooled) as they are stored."""
    import torch

    numbers, moments, tokens, pooled = zip(*rows, strict=True)
    views = [np.frombuffer(data, np.float16).reshape(-1, WIDTH) for data in tokens]
    arrays = Batch(
        np.array(numbers, np.int64),
        np.stack([np.frombuffer(data, np.float16) for data in moments]).reshape(-1, *MOMENTS),
        np.concatenate(views),
        np.array([len(view) for view in views], np.int64),
        np.stack([np.frombuffer(data, np.float16) for data in pooled]),
    )
    return Batch(*map(torch.from_numpy, arrays))


def unbatched(batch: Batch) -> Iterator[Sample]:
    numbers, moments, tokens, lengths, pooled = map(np.asarray, batch)
    ends = np.cumsum(lengths)
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        own = tokens[row, :length] if tokens.ndim == 3 else tokens[end - length : end]
        yield Sample(int(numbers[row]), moments[row], own, pooled[row])


def refuse_others(batch: Batch) -> None:
    """ValueError where a batch does not hold what its samples are."""
    for got in unbatched(batch):
        wanted = sample(got.number)
        for name, value, right in zip(Sample._fields, got, wanted, strict=True):
            if not np.array_equal(value, right):
                raise ValueError(f"sample {got.number}: {name} is not what was written")


def measure(batches: Iterator[Batch], steps: int, born: float) -> dict[str, Any]:
    """What a first pass of `steps` batches takes, and what passes behind it: as many as `SECONDS`
    need. `born` is when the process was started, by time.monotonic().

    Of each pass the first `SKIPPED` batches are left out, but for `cold`: seconds from asking for
    the first batch to the end of the first pass, and what was read from disks meanwhile.
    """
    asked, before = time.monotonic(), disk_bytes()
    batch = next(batches)
    first = time.monotonic()
    seen: list[Any] = [batch.numbers]
    seen += (one.numbers for one in itertools.islice(batches, SKIPPED - 1))
    rate, cpu, numbers = _timed(batches, steps - SKIPPED)
    result: dict[str, Any] = {"started": first - born, "first": rate, "first_cpu": cpu}
    result |= {"cold": time.monotonic() - asked, "disk": disk_bytes() - before}
    rates: list[float] = []
    spent: list[float] = []
    while sum(1 / rate for rate in rates) * (steps - SKIPPED) * BATCH < SECONDS:
        for _ in itertools.islice(batches, SKIPPED):
            pass
        rate, cpu, _ = _timed(batches, steps - SKIPPED)
        rates.append(rate)
        spent.append(cpu)
    refuse_others(next(batches))
    numbers = np.concatenate([np.asarray(some) for some in seen + numbers])
    result |= {"later": statistics.harmonic_mean(rates), "later_cpu": statistics.mean(spent)}
    return {**result, "samples": len(numbers), "distinct": len(np.unique(numbers))}


def _timed(batches: Iterator[Batch], count: int) -> tuple[float, float, list[Any]]:
    """(samples per second, processor seconds per sample, the numbers of the samples)."""
    start, spent = time.monotonic(), processor_seconds()
    numbers = [batch.numbers for batch in itertools.islice(batches, count)]
    samples = count * BATCH
    seconds, cpu = time.monotonic() - start, processor_seconds() - spent
    return samples / seconds, cpu / samples, numbers


# ---- webdataset ----------------------------------------------------------------------------------


def write_webdataset(folder: Path, samples: int) -> None:
    """Tars of SHARD_SAMPLES samples."""
    import webdataset

    for start in range(0, samples, SHARD_SAMPLES):
        with webdataset.TarWriter(str(folder / f"{start // SHARD_SAMPLES:06d}.tar")) as tar:
            for number in range(start, min(start + SHARD_SAMPLES, samples)):
                members = stored(sample(number)).items()
                tar.write({"__key__": f"{number:09d}", **{f"{n}.bin": data for n, data in members}})


def read_webdataset(folder: Path, workers: int) -> Iterator[Batch]:
    """Its usual pipeline, without end: shards in random order, then a shuffle buffer of 1000
    samples in each worker; no global order.
    """
    import webdataset

    def row(members: dict[str, Any]) -> tuple[int, bytes, bytes, bytes]:
        return (
            int(members["__key__"]),
            members["moments.bin"],
            members["tokens.bin"],
            members["pooled.bin"],
        )

    urls = sorted(map(str, folder.glob("*.tar")))
    data = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .repeat()
        .shuffle(1000)
        .map(row)
        .batched(BATCH, collation_fn=collate)
    )
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=workers))


# ---- mosaicml-streaming --------------------------------------------------------------------------


def write_streaming(folder: Path, samples: int) -> None:
    """MDS shards of the size they have by default, uncompressed."""
    from streaming import MDSWriter

    columns = {"number": "int64", "moments": "bytes", "tokens": "bytes", "pooled": "bytes"}
    with MDSWriter(out=str(folder), columns=columns) as out:
        for number in range(samples):
            out.write({"number": np.int64(number), **stored(sample(number))})


def read_streaming(folder: Path, workers: int) -> Iterator[Batch]:
    """Its shuffle, which for so few samples is a global one; pass after pass."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    def rows(samples: list[dict[str, Any]]) -> Batch:
        return collate((s["number"], s["moments"], s["tokens"], s["pooled"]) for s in samples)

    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = DataLoader(
        data,
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=rows,
        persistent_workers=workers > 0,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


WRITERS = {"webdataset": write_webdataset, "streaming": write_streaming}
READERS = {"webdataset": read_webdataset, "streaming": read_streaming}


def main(verb: str, peer: str, folder: str, *numbers: str) -> None:
    if verb == "write":
        return WRITERS[peer](Path(folder), int(numbers[0]))
    batches = READERS[peer](Path(folder), int(numbers[0]))
    print(json.dumps(measure(batches, int(numbers[1]), float(numbers[2]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
