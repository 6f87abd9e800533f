"""Manifest + encodings + plan -> numpy batches, the same ones for any number of workers.

A loader's state is the step. Encoded shards are mapped, not read: a batch costs the copying of its
own rows, and all processes of a machine share one page cache. No torch here, and pyarrow only where
captions are asked for.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import shards, storage
from .manifest import Manifest, Shard, fingerprint
from .plan import BatchPlan, draw
from .schema import Batch, Encoding, Field, batch_fields, check

KEY = Field("uint8", (None,))
"""Every encoded shard carries its samples' keys: rows are joined by key, not by trust."""
_INDEX = Field("int64", ())
_Ints = NDArray[np.int64]
_DTYPES = {"F16": "<f2", "F32": "<f4", "U8": "u1", "I64": "<i8"}
_OPEN_FILES = 600  # a map keeps its file's descriptor, and 1,024 is the usual limit


def mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a safetensors file: read-only views of the map, where safe_open copies.

    ValueError when the header does not describe the file.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__", {})
        arrays: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
            count = math.prod(shape)
            if (
                not 0 <= first <= last <= len(data) - start
                or last - first != count * dtype.itemsize
            ):
                raise ValueError(
                    f"{name}{list(shape)} claims bytes {first} to {last} of {len(data) - start}"
                )
            arrays[name] = np.frombuffer(data, dtype, count, start + first).reshape(shape)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); delete it and encode again"
        ) from None
    return arrays, metadata


@dataclass(frozen=True)
class Table:
    """A shard's parquet file, a row per sample; captions are flat, row i's begin at offsets[i]."""

    keys: list[str]
    captions: list[str]
    offsets: np.ndarray
    labels: list[str | None]


def read_table(dataset: str, shard: str) -> Table:
    """The table of one shard. ValueError when a sample has no caption."""
    table = shards.read_table(dataset, shard, ["key", "captions", "label"])
    keys, captions, labels = (table[name].to_pylist() for name in ("key", "captions", "label"))
    offsets = np.cumsum([0, *map(len, captions)])
    if (empty := np.flatnonzero(np.diff(offsets) == 0)).size:
        raise ValueError(
            f"{dataset}, shard {shard}, sample {keys[empty[0]]}: no caption; ingest again"
        )
    return Table(keys, [caption for row in captions for caption in row], offsets, labels)


def pack_keys(keys: Sequence[str]) -> np.ndarray:
    """uint8 [n, longest]: keys as text, padded with zeros."""
    return np.array([key.encode() for key in keys]).view(np.uint8).reshape(len(keys), -1)


def unpack_keys(packed: np.ndarray) -> list[str]:
    """What `pack_keys` was given."""
    texts = np.ascontiguousarray(packed).view(f"S{packed.shape[1]}").ravel()
    return [key.decode() for key in texts.tolist()]


@dataclass(frozen=True)
class _Open:
    """One shard, mapped. What was not asked for, or nobody knows, is empty."""

    keys: list[str]
    captions: list[str]
    labels: list[str | None]
    offsets: np.ndarray
    """int64 [n + 1]: where each sample's captions begin in the list of all."""
    arrays: tuple[dict[str, np.ndarray], ...]
    """Those of each encoding."""


@dataclass(frozen=True)
class _Part:
    """The samples of a batch that lie in one shard."""

    rows: _Ints
    """Their rows in the batch."""
    local: _Ints
    """Their rows in the shard."""
    captions: _Ints
    """Which of the shard's captions they show."""
    shard: _Open


class Loader:
    """Batches of the samples that every encoding holds, in the order of the plan.

    A batch is this worker's share of a global batch. A picture shows one of its captions, drawn
    from (seed, position): the same for all text encoders, another one from epoch to epoch. With
    `captions` a batch also holds the lists `caption` and `label`, read from the dataset's tables.

    ValueError when an encoding is missing for a shard, was made by another encoder than it claims,
    or has other fields than its encoder.json says; and when there is nothing to load.
    """

    def __init__(
        self,
        manifest: Manifest,
        encodings: Sequence[Encoding] = (),
        *,
        splits: Sequence[str] = ("train",),
        global_batch: int,
        seed: int,
        worker: int = 0,
        workers: int = 1,
        captions: bool = True,
    ):
        self.dataset, self.seed, self.captions = manifest.dataset, seed, captions
        self.worker, self.workers = worker, workers
        self.encodings: tuple[Encoding, ...] = tuple(encodings)
        self.shards: tuple[Shard, ...] = manifest.split(*splits)
        if not any(shard.samples for shard in self.shards):
            known = ", ".join(sorted({shard.split for shard in manifest.shards})) or "nothing"
            raise ValueError(
                f"{manifest.dataset}, version {manifest.version}: no samples in "
                f"{' + '.join(splits)} (it has {known}); ingest more pictures"
            )
        self._stored = tuple(_stored_fields(encoding) for encoding in self.encodings)
        self.fields: dict[str, Field] = {}
        """The arrays of a batch; known before any file of an encoding is opened."""
        for encoding, stored in zip(self.encodings, self._stored, strict=True):
            fields = batch_fields(encoding.name, encoding.kind, stored)
            if twice := fields.keys() & self.fields.keys():
                raise ValueError(f"encoding {encoding.name}: another one has {min(twice)} too")
            self.fields |= fields
        rejected = self._rejected()
        self._kept = tuple(
            np.delete(np.arange(shard.samples), rejected.get(shard.name, []))
            for shard in self.shards
        )
        counts = tuple(map(len, self._kept))
        selection = fingerprint([[shard.name for shard in self.shards], rejected])
        self.plan = BatchPlan(counts, selection, seed, global_batch)
        self.plan.slice(0, worker, workers)  # refuses more workers than rows
        self._starts = np.cumsum((0, *counts))
        most = max(8, _OPEN_FILES // max(1, len(self.encodings)))
        self._open = lru_cache(most)(self._open_shard)

    @property
    def samples(self) -> int:
        """How many an epoch has: those of the splits, less what an encoder rejected."""
        return self.plan.samples

    def batch(self, step: int) -> Batch:
        """This worker's share of global batch `step`."""
        rows, indices = self.plan.slice(step, self.worker, self.workers)
        positions = step * self.plan.global_batch + rows
        return self._gather(indices, positions, epoch=int(positions[0]) // self.samples)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Chosen samples (0 <= index < samples), the same batch each time: position = index."""
        indices = np.asarray(indices, np.int64)
        if not indices.size or indices.min() < 0 or indices.max() >= self.samples:
            raise ValueError(
                f"rows: wanted indices from 0 to {self.samples - 1}, got {indices.tolist()[:8]}"
            )
        return self._gather(indices, indices, epoch=0)

    def batches(self, start_step: int = 0, prefetch: int = 2) -> Generator[Batch]:
        """The batches from `start_step` on, without end; a thread makes `prefetch` ahead."""
        steps = itertools.count(start_step)
        if not prefetch:
            yield from map(self.batch, steps)
        pool = ThreadPoolExecutor(1, "loader")
        try:
            ahead = deque(pool.submit(self.batch, n) for n in itertools.islice(steps, prefetch))
            for step in steps:
                ahead.append(pool.submit(self.batch, step))
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _gather(self, indices: np.ndarray, positions: np.ndarray, epoch: int) -> Batch:
        parts = self._parts(indices, draw(self.seed, "caption", positions))
        batch: Batch = {"position": positions, "epoch": epoch}
        back = np.argsort(np.concatenate([part.rows for part in parts])).tolist()

        def in_order(values: Iterable[Any]) -> list[Any]:
            by_shard = list(values)
            return [by_shard[row] for row in back]

        if self.captions or self.encodings:
            batch["key"] = in_order(p.shard.keys[row] for p in parts for row in _list(p.local))
        if self.captions:
            batch["caption"] = in_order(
                p.shard.captions[row] for p in parts for row in _list(p.captions)
            )
            labels = in_order(p.shard.labels[row] for p in parts for row in _list(p.local))
            batch["label"] = [None if label is None else json.loads(label) for label in labels]
        for number, encoding in enumerate(self.encodings):
            if encoding.kind == "image":
                for name, field in self._stored[number].items():
                    batch[name] = rows = field.empty(len(indices))
                    for part in parts:
                        rows[part.rows] = part.shard.arrays[number][name][part.local]
            else:
                batch |= self._texts(number, parts, len(indices))
        return batch

    def _texts(self, number: int, parts: list[_Part], size: int) -> Batch:
        """The fields of one text encoding, its captions padded to the longest of them."""
        name, stored = self.encodings[number].name, self._stored[number]
        pooled = stored["pooled"].empty(size)
        begin, end = np.empty(size, np.int64), np.empty(size, np.int64)
        for part in parts:
            arrays = part.shard.arrays[number]
            text = arrays["caption_rows"][part.captions]
            pooled[part.rows] = arrays["pooled"][text]
            begin[part.rows], end[part.rows] = arrays["offsets"][text], arrays["offsets"][text + 1]
        lengths: _Ints = end - begin
        longest = int(lengths.max())
        tokens = stored["tokens"].empty(size, longest)
        tokens.fill(0)
        for part in parts:
            flat = part.shard.arrays[number]["tokens"]
            # A caption's tokens lie together: a copy for each beats a fancy index of all tokens.
            spans = map(_list, (part.rows, begin[part.rows], end[part.rows]))
            for row, first, last in zip(*spans, strict=True):
                tokens[row, : last - first] = flat[first:last]
        mask = np.arange(longest) < lengths[:, None]
        return {f"{name}_tokens": tokens, f"{name}_mask": mask, f"{name}_pooled": pooled}

    def _parts(self, indices: np.ndarray, turns: np.ndarray) -> list[_Part]:
        """The batch by shards; `turns` in [0, 1) say which caption each sample shows."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        parts: list[_Part] = []
        for rows in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            number = int(numbers[rows[0]])
            local = self._kept[number][indices[rows] - self._starts[number]]
            shard = self._open(number)
            first, last = shard.offsets[local], shard.offsets[local + 1]
            captions = first + (turns[rows] * (last - first)).astype(np.int64)
            parts.append(_Part(rows, local, captions, shard))
        return parts

    def _rejected(self) -> dict[str, list[int]]:
        """Shard -> rows that an encoder could not use. ValueError when a shard is not encoded."""
        rows: dict[str, set[int]] = {}
        for encoding in self.encodings:
            names = set(storage.list_names(encoding.url))
            missing = [s.name for s in self.shards if f"{s.name}.safetensors" not in names]
            if missing:
                raise ValueError(
                    f"{encoding.url}: encoding {encoding.name} lacks {len(missing)} of "
                    f"{len(self.shards)} shards (the first: {missing[0]}); encode again"
                )
            for shard in self.shards:
                if (name := f"{shard.name}.rejected.json") in names:
                    listed = storage.read_json(storage.join(encoding.url, name))
                    rows.setdefault(shard.name, set()).update(listed["rows"])
        return {name: sorted(rows[name]) for name in sorted(rows)}

    def _open_shard(self, number: int) -> _Open:
        shard = self.shards[number]
        table = read_table(self.dataset, shard.name) if self.captions else None
        opened: list[dict[str, np.ndarray]] = []
        for encoding, stored in zip(self.encodings, self._stored, strict=True):
            url = storage.join(encoding.url, f"{shard.name}.safetensors")
            path = storage.local_copy(url)
            opened.append(_open_encoded(path, encoding, stored, shard.samples))
        keys = [table.keys] if table else []
        keys += [unpack_keys(arrays["keys"]) for arrays in opened]
        offsets = [table.offsets] if table else []
        offsets += [arrays["sample_offsets"] for arrays in opened if "sample_offsets" in arrays]
        if any(k != keys[0] for k in keys) or any(
            not np.array_equal(o, offsets[0]) for o in offsets
        ):
            raise ValueError(
                f"{self.dataset}, shard {shard.name}: its table and its encodings "
                f"({', '.join(e.name for e in self.encodings)}) do not hold the same samples and "
                "captions; delete its encoded files and encode again"
            )
        return _Open(
            keys=keys[0] if keys else [],
            captions=table.captions if table else [],
            labels=table.labels if table else [],
            offsets=offsets[0] if offsets else np.arange(shard.samples + 1),
            arrays=tuple(opened),
        )


def _list(numbers: _Ints) -> list[int]:
    return numbers.tolist()


def _open_encoded(
    path: Path, encoding: Encoding, stored: Mapping[str, Field], samples: int
) -> dict[str, np.ndarray]:
    """The arrays of one encoded shard, checked.

    ValueError when another encoder made them or they do not fit together.
    """
    arrays, metadata = mapped(path)
    made_by = json.loads(metadata.get("darkroom", "{}")).get("fingerprint")
    if made_by != encoding.fingerprint:
        raise ValueError(
            f"{path}: made by encoder {made_by}, wanted {encoding.name} ({encoding.fingerprint}); "
            "delete it and encode again"
        )
    check(str(path), arrays, {"keys": KEY}, samples)
    if encoding.kind == "image":
        check(str(path), arrays, stored, samples)
        return arrays
    joins = dict.fromkeys(("offsets", "caption_rows", "sample_offsets"), _INDEX)
    check(str(path), arrays, {**stored, **joins})
    rows, texts = arrays["caption_rows"], len(arrays["pooled"])
    whole = len(arrays["offsets"]) == texts + 1 and len(arrays["sample_offsets"]) == samples + 1
    for name, into in (("offsets", "tokens"), ("sample_offsets", "caption_rows")):
        ends = arrays[name]
        whole = (
            whole and ends[0] == 0 and ends[-1] == len(arrays[into]) and (np.diff(ends) > 0).all()
        )
    if not whole or rows.min() < 0 or rows.max() >= texts:
        raise ValueError(
            f"{path}: its offsets do not join tokens, captions and {samples} samples; "
            "delete it and encode again"
        )
    return arrays


def _stored_fields(encoding: Encoding) -> dict[str, Field]:
    """What encoder.json promises. ValueError when it is missing or tells of another encoder."""
    url = storage.join(encoding.url, "encoder.json")
    try:
        stated = storage.read_json(url)
    except FileNotFoundError:
        raise ValueError(
            f"{url}: missing, so encoding {encoding.name} was never made; encode first"
        ) from None
    if (stated["fingerprint"], stated["kind"]) != (encoding.fingerprint, encoding.kind):
        raise ValueError(
            f"{url}: made by {stated['kind']} encoder {stated['fingerprint']}, "
            f"wanted {encoding.kind} encoder {encoding.name} ({encoding.fingerprint})"
        )
    return {name: Field.from_json(field) for name, field in stated["fields"].items()}
