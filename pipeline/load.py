"""Manifest + encodings + plan -> numpy batches, the same ones for any number of workers.

A loader's state is the step. Encoded shards are mapped, not read: a batch costs the copying of its
own rows, and all processes of a machine share one page cache. No torch here, and pyarrow only where
captions are asked for.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import mmap
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import shards, storage, tokens
from .manifest import Manifest, Shard, fingerprint
from .plan import BatchPlan, BucketedPlan, Plan, dealt, draw
from .schema import BUCKET, CUT, Batch, Bucket, Encoding, Field, batch_fields, check

KEY = Field("uint8", (None,))
"""Every encoded shard carries its samples' keys: rows are joined by key, not by trust."""
_INDEX = Field("int64", ())
_Ints = NDArray[np.int64]
_Rows = NDArray[np.int32]
"""Of a shard, which has fewer than 2^31."""
_DTYPES = {"F16": "<f2", "F32": "<f4", "U8": "u1", "I32": "<i4", "I64": "<i8"}
STORABLE = ("float16", "float32", "uint8", "int64")
"""numpy's names of the dtypes that the fields of encoded files have."""
_LARGE = 1 << 20  # bytes
_IN_CACHE = 1 << 17  # numbers
_BITS = {"float16": (np.int16, np.uint16), "float32": (np.int32, np.uint32)}
_finite: set[int] = set()
"""Files that were looked through: a process does so once, whatever it opens again."""
_KEPT = 24  # a few batches of a few encodings
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
    return _decoded(_as_bytes(packed))


def _as_bytes(packed: np.ndarray) -> np.ndarray:
    """bytes [n]: a view of packed keys, where they lie together."""
    return np.ascontiguousarray(packed).view(f"S{packed.shape[1]}").ravel()


def _decoded(keys: np.ndarray) -> list[str]:
    return [key.decode() for key in keys.tolist()]


@dataclass(frozen=True)
class _Open:
    """One shard, mapped. What was not asked for, or nobody knows, is empty."""

    keys: np.ndarray
    """bytes [n], as they lie in a file: as texts they take three times the room."""
    captions: list[str]
    labels: list[str | None]
    offsets: np.ndarray
    """int64 [n + 1]: where each sample's captions begin in the list of all."""
    arrays: tuple[dict[str, np.ndarray], ...]
    """Those of each encoding; of one with buckets its index."""


@dataclass(frozen=True)
class _Stored:
    """What encoder.json promises of one encoding."""

    fields: dict[str, Field]
    """The arrays of a shard's file; where there are buckets these are in files of their own."""
    buckets: tuple[Bucket, ...]
    views: int


class _Part(NamedTuple):
    """The samples of a batch that lie in one shard."""

    number: int
    """Which of the loader's shards."""
    span: slice
    """Their rows in the batch by shards."""
    local: _Ints
    """Their rows in the shard."""
    captions: _Ints
    """Which of the shard's captions they show; `local` where nobody asks."""
    shard: _Open


class Loader:
    """Batches of the samples that every encoding holds, in the order of the plan.

    A batch is this worker's share of a global batch, or, where that is cut into `micro_batches`,
    one of those dealt to this worker: then what a batch holds, down to how far its captions are
    padded, does not depend on the number of workers. A picture shows one of its captions, drawn
    from (seed, position): the same for all text encoders, another one from epoch to epoch; and so
    it is mirrored or not, where its encoders flip. With `captions` a batch also holds the lists
    `caption` and `label`, read from the dataset's tables. Where pictures are in buckets, all of a
    global batch are of one size.

    ValueError when an encoding is missing for a shard, was made by another encoder than it claims,
    or has other fields than its encoder.json says; when two put a picture into different buckets,
    or one flips and another does not; and when there is nothing to load.
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
        micro_batches: int = 0,
        captions: bool = True,
    ):
        self.dataset, self.seed, self.captions = manifest.dataset, seed, captions
        self.worker, self.workers, self.micro_batches = worker, workers, micro_batches or workers
        self.encodings: tuple[Encoding, ...] = tuple(encodings)
        self.shards: tuple[Shard, ...] = manifest.split(*splits)
        if not self.shards:
            known = ", ".join(sorted({shard.split for shard in manifest.shards})) or "nothing"
            raise ValueError(
                f"{manifest.dataset}, version {manifest.version}: no samples in "
                f"{' + '.join(splits)} (it has {known}); ingest more pictures"
            )
        self._stored = tuple(_stored(encoding) for encoding in self.encodings)
        self._flips = self._all_or_none_flip()
        self._reads_captions = captions or any(e.kind != "image" for e in self.encodings)
        left_out = self._left_out(manifest)
        kept = [
            np.delete(np.arange(shard.samples, dtype=np.int32), left_out.get(shard.name, []))
            for shard in self.shards
        ]
        selection: list[Any] = [[shard.name for shard in self.shards], left_out]
        by_bucket = self._by_bucket(kept) or {0: kept}
        if len(by_bucket) > 1:
            counts = tuple(tuple(map(len, rows)) for rows in by_bucket.values())
            selection.append(counts)
            self.plan: Plan = BucketedPlan(counts, fingerprint(selection), seed, global_batch)
        else:
            (kept,) = by_bucket.values()
            counts = tuple(map(len, kept))
            self.plan = BatchPlan(counts, fingerprint(selection), seed, global_batch)
        self.plan.slice(0, worker, workers)  # refuses more workers than rows
        self.plan.slice(0, 0, self.micro_batches)
        self._dealt = dealt(self.micro_batches, worker, workers)
        self._number(by_bucket)
        self._memory = _Memory()
        most = max(8, _OPEN_FILES // max(1, len(self.encodings)))
        # A batch is of one block of shards, or of the end of one and the beginning of the next.
        self._open = lru_cache(min(most, 2 * self.plan.block_shards))(self._open_shard)
        bucketed = sum(bool(stored.buckets) for stored in self._stored)
        self._open_bucket = lru_cache(most * max(1, bucketed))(self._open_shards_bucket)

    @property
    def samples(self) -> int:
        """How many an epoch has: those of the splits, less what an encoder rejected."""
        return self.plan.samples

    def batch(self, step: int, number: int = 0) -> Batch:
        """This worker's share of global batch `step`: the `number`-th of its micro-batches."""
        rows, indices = self.plan.slice(step, self._dealt[number], self.micro_batches)
        positions = step * self.plan.global_batch + rows
        turned = draw(self.seed, "flip", positions) < 0.5 if self._flips else None
        return self._gather(indices, positions, self.plan.epoch(step, int(rows[0])), turned)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Chosen samples (0 <= index < samples), the same batch each time: position = index, and
        nothing is mirrored.

        ValueError when they are of several buckets: those of each are chosen from `alike`.
        """
        indices = np.asarray(indices, np.int64)
        if not indices.size or indices.min() < 0 or indices.max() >= self.samples:
            raise ValueError(
                f"rows: wanted indices from 0 to {self.samples - 1}, got {indices.tolist()[:8]}"
            )
        return self._gather(indices, indices, epoch=0)

    def alike(self) -> tuple[Loader, ...]:
        """A loader for the pictures of each bucket, that with most of them first; this one alone
        where all are of one size.
        """
        if isinstance(self.plan, BatchPlan):
            return (self,)
        each: list[Loader] = []
        for at, (bucket, kept) in enumerate(self._kept.items()):
            one = copy.copy(self)
            one.plan = self.plan.buckets[at]
            one._number({bucket: kept})
            each.append(one)
        return tuple(sorted(each, key=lambda one: -one.samples))

    def batches(self, start_step: int = 0, prefetch: int = 2) -> Generator[Batch]:
        """The batches from `start_step` on, without end; a thread makes `prefetch` ahead.

        Of each global batch come all of this worker's micro-batches.
        """
        steps = itertools.count(start_step)
        turns = ((step, number) for step in steps for number in range(len(self._dealt)))
        if not prefetch:
            yield from itertools.starmap(self.batch, turns)
        pool = ThreadPoolExecutor(1, "loader")
        try:
            ahead = deque(pool.submit(self.batch, *it) for it in itertools.islice(turns, prefetch))
            for turn in turns:
                ahead.append(pool.submit(self.batch, *turn))
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _gather(
        self,
        indices: np.ndarray,
        positions: np.ndarray,
        epoch: int,
        turned: np.ndarray | None = None,
    ) -> Batch:
        bucket, order, parts = self._parts(indices, draw(self.seed, "caption", positions))
        batch: Batch = {"position": positions, "epoch": epoch}
        # What is read shard by shard is put into the order of the batch at once, unless it is so
        # much that it has left the processor's cache by then.
        back = np.argsort(order)
        places = back.tolist()

        def in_order(chosen: Iterable[tuple[list[Any], _Ints]]) -> list[Any]:
            parts = (map(values.__getitem__, _list(rows)) for values, rows in chosen)
            by_shard = list(itertools.chain.from_iterable(parts))
            return list(map(by_shard.__getitem__, places))

        if self.captions or self.encodings:
            keys = np.concatenate([part.shard.keys.take(part.local) for part in parts])
            batch["key"] = _decoded(keys[back])
        if self.captions:
            batch["caption"] = in_order((part.shard.captions, part.captions) for part in parts)
            labels = in_order((part.shard.labels, part.local) for part in parts)
            batch["label"] = [None if label is None else json.loads(label) for label in labels]
        turned = np.zeros(len(order), np.bool_) if turned is None else turned[order]
        for number, encoding in enumerate(self.encodings):
            if encoding.kind == "image":
                found = self._pictures(number, bucket, parts, turned)
                for name, field in self._fields[bucket][number].items():
                    batch[name] = rows = self._memory.empty(field, len(order))
                    if rows.nbytes >= _LARGE:
                        for part, (arrays, local) in zip(parts, found, strict=True):
                            rows[order[part.span]] = arrays[name][local]
                        continue
                    by_shard = np.empty_like(rows)
                    for part, (arrays, local) in zip(parts, found, strict=True):
                        _take(arrays[name], local, by_shard[part.span])
                    _take(by_shard, back, rows)
            else:
                batch |= self._texts(number, parts, order, back)
        return batch

    def _pictures(
        self, number: int, bucket: int, parts: list[_Part], turned: np.ndarray
    ) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Of each part: the arrays of a picture encoding that hold it, its rows there."""
        stored = self._stored[number]
        found = [(part.shard.arrays[number], part.local) for part in parts]
        if stored.buckets:
            opened = (self._open_bucket(number, part.number, bucket) for part in parts)
            found = [
                (arrays, np.searchsorted(members, part.local))
                for part, (members, arrays) in zip(parts, opened, strict=True)
            ]
        if stored.views == 2:
            found = [
                (arrays, 2 * local + turned[part.span])
                for part, (arrays, local) in zip(parts, found, strict=True)
            ]
        return found

    def _texts(self, number: int, parts: list[_Part], order: _Ints, back: _Ints) -> Batch:
        """The fields of one text encoding, its captions padded to the longest of them."""
        name, stored = self.encodings[number].name, self._stored[number].fields
        size = len(order)
        pooled = stored["pooled"].empty(size)
        begin, end = np.empty(size, np.int64), np.empty(size, np.int64)
        for part in parts:
            arrays = part.shard.arrays[number]
            text = arrays["caption_rows"][part.captions]
            _take(arrays["pooled"], text, pooled[part.span])
            _take(arrays["offsets"], text, begin[part.span])
            _take(arrays["offsets"], text + 1, end[part.span])
        lengths: _Ints = end - begin
        longest = int(lengths.max())
        padded = self._memory.empty(stored["tokens"], size, longest)
        for part in parts:
            arrays = part.shard.arrays[number]
            # A caption's tokens lie together: a copy for each beats a fancy index of all tokens.
            spans = (_list(each[part.span]) for each in (order, begin, end))
            for row, first, last in zip(*spans, strict=True):
                tokens.copy(arrays, first, last, padded[row, : last - first])
                padded[row, last - first :] = 0
        mask = np.arange(longest) < lengths[back][:, None]
        return {f"{name}_tokens": padded, f"{name}_mask": mask, f"{name}_pooled": pooled[back]}

    def _parts(self, indices: np.ndarray, turns: np.ndarray) -> tuple[int, _Ints, list[_Part]]:
        """(the bucket, the rows of the batch by shards, the shards); `turns` in [0, 1) say which
        caption a sample shows.
        """
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(groups, kind="stable")
        groups = groups[order]
        local = self._local[indices[order]].astype(np.int64)  # once, not in each lookup
        turns = turns[order]
        begins = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist()]
        buckets, shards = tuple(self._kept), len(self.shards)
        at = int(groups[0]) // shards
        if at != int(groups[-1]) // shards:
            raise ValueError(
                f"rows: {indices[order[0]]} and {indices[order[-1]]} are of buckets of different "
                "sizes, and a batch has pictures of one; choose from each of the loaders that "
                "alike() gives"
            )
        parts: list[_Part] = []
        spans = map(slice, begins, [*begins[1:], len(order)])
        for span, group in zip(spans, groups[begins].tolist(), strict=True):
            shard, rows = self._open(group - at * shards), local[span]
            captions = rows
            if self._reads_captions:
                begin = shard.offsets[rows]
                count = shard.offsets[rows + 1] - begin
                captions = begin + (turns[span] * count).astype(np.int64)
            parts.append(_Part(group - at * shards, span, rows, captions, shard))
        return buckets[at], order, parts

    def _number(self, kept: dict[int, list[_Rows]]) -> None:
        """Number the samples, bucket after bucket, by the rows kept of each shard."""
        self._kept = kept
        self._starts = np.cumsum((0, *(len(rows) for each in kept.values() for rows in each)))
        self._local = np.concatenate([rows for each in kept.values() for rows in each])
        self._fields = {bucket: self._fields_of(bucket) for bucket in kept}
        self.fields: dict[str, Field] = {}
        """The arrays of a batch; known before any file of an encoding is opened. An axis in which
        buckets differ is of any length.
        """
        for number, encoding in enumerate(self.encodings):
            each = [fields[number] for fields in self._fields.values()]
            stored = {name: Field.spanning([fields[name] for fields in each]) for name in each[0]}
            fields = batch_fields(encoding.name, encoding.kind, stored)
            if twice := fields.keys() & self.fields.keys():
                raise ValueError(f"encoding {encoding.name}: another one has {min(twice)} too")
            self.fields |= fields

    def _fields_of(self, bucket: int) -> list[dict[str, Field]]:
        """The fields of each encoding in one bucket."""
        return [
            (_stored(encoding, stored.buckets[bucket]) if stored.buckets else stored).fields
            for encoding, stored in zip(self.encodings, self._stored, strict=True)
        ]

    def _by_bucket(self, kept: list[_Rows]) -> dict[int, list[_Rows]] | None:
        """Bucket -> the kept rows of each shard that are in it, ascending; None without buckets.

        ValueError when encodings disagree about them.
        """
        each = zip(self.encodings, self._stored, strict=True)
        bucketed = [(encoding, stored) for encoding, stored in each if stored.buckets]
        if not bucketed:
            return None
        of_rows: list[np.ndarray] = []
        for shard, rows in zip(self.shards, kept, strict=True):
            first, *others = (_open_index(*it, shard)[BUCKET] for it in bucketed)
            if not all(np.array_equal(first, other) for other in others):
                raise ValueError(
                    f"{self.dataset}, shard {shard.name}: encodings "
                    f"{', '.join(e.name for e, _ in bucketed)} have other buckets for the same "
                    "pictures; encode with tables of the same aspect ratios"
                )
            of_rows.append(first[rows])
        return {
            bucket: [rows[of == bucket] for rows, of in zip(kept, of_rows, strict=True)]
            for bucket in np.unique(np.concatenate(of_rows)).tolist()
        }

    def _all_or_none_flip(self) -> bool:
        """Whether the picture encodings flip. ValueError when some do."""
        flips = {
            encoding.name: stored.views == 2
            for encoding, stored in zip(self.encodings, self._stored, strict=True)
            if encoding.kind == "image"
        }
        if len(set(flips.values())) > 1:
            told = ", ".join(f"{name} {'on' if flip else 'off'}" for name, flip in flips.items())
            raise ValueError(
                f"{self.dataset}: encodings differ in flip ({told}), so a picture would be seen "
                "both ways at once; encode all with it, or none"
            )
        return any(flips.values())

    def _left_out(self, manifest: Manifest) -> dict[str, list[int]]:
        """Shard -> rows that the version does not select, or an encoder could not use. ValueError
        when a shard is not encoded."""
        dropped = {shard.name: set(manifest.dropped(shard)) for shard in self.shards}
        rows = {name: found for name, found in dropped.items() if found}
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
            if stored.buckets:
                opened.append(_open_index(encoding, stored, shard))
            else:
                path = storage.local_copy(encoding.arrays_url(shard.name))
                opened.append(
                    _open_encoded(path, encoding, stored.fields, shard.samples, stored.views)
                )
        keys = [_as_bytes(pack_keys(table.keys))] if table else []
        keys += [_as_bytes(arrays["keys"]) for arrays in opened]
        offsets = [table.offsets] if table else []
        offsets += [arrays["sample_offsets"] for arrays in opened if "sample_offsets" in arrays]
        if any(not np.array_equal(one, each[0]) for each in (keys, offsets) for one in each[1:]):
            raise ValueError(
                f"{self.dataset}, shard {shard.name}: its table and its encodings "
                f"({', '.join(e.name for e in self.encodings)}) do not hold the same samples and "
                "captions; delete its encoded files and encode again"
            )
        return _Open(
            keys=keys[0] if keys else np.empty(0, "S1"),
            captions=table.captions if table else [],
            labels=table.labels if table else [],
            offsets=offsets[0] if offsets else np.arange(shard.samples + 1),
            arrays=tuple(opened),
        )

    def _open_shards_bucket(
        self, encoding_number: int, number: int, bucket: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(the rows of a shard that are in a bucket, ascending; their arrays)."""
        encoding, stored = self.encodings[encoding_number], self._stored[encoding_number]
        index = self._open(number).arrays[encoding_number]
        members = np.flatnonzero(index[BUCKET] == bucket)
        url = encoding.arrays_url(self.shards[number].name, stored.buckets[bucket])
        fields = self._fields[bucket][encoding_number]
        path = storage.local_copy(url)
        arrays = _open_encoded(path, encoding, fields, len(members), stored.views)
        if not np.array_equal(arrays["keys"], index["keys"][members]):
            raise ValueError(
                f"{path}: does not hold the samples that {self.shards[number].name}.safetensors "
                "beside it says; delete both and encode again"
            )
        return members, arrays


class _Memory:
    """Where large arrays of batches lie: it is used again once nobody holds an array or a view in
    it.

    Fresh pages are cleared by the kernel, and outside of the main thread malloc gives such pieces
    back at once: together a fifth of what a batch of 30 MB of tokens takes.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._kept = [np.empty(0, np.uint8)]
        self._unheld = sys.getrefcount(self._kept[0])

    def empty(self, field: Field, *leading: int) -> np.ndarray:
        """`field.empty(*leading)`."""
        row = field.empty(0)
        shape = (*leading, *row.shape[1:])
        size = math.prod(shape) * row.itemsize
        if size < _LARGE:
            return field.empty(*leading)
        with self._lock:
            free = [number for number in range(len(self._kept)) if self._is_free(number)]
            sizes = {number: self._kept[number].nbytes for number in free}
            for number in free:
                if size <= sizes[number] <= 2 * size:
                    return np.ndarray(shape, row.dtype, self._kept[number])
            for number in reversed(free):  # what is a little too small makes room for what is not
                if size < 2 * sizes[number]:
                    del self._kept[number]
            del self._kept[: -_KEPT + 1]
            self._kept.append(np.empty(size, np.uint8))
            return np.ndarray(shape, row.dtype, self._kept[-1])

    def _is_free(self, number: int) -> bool:
        return sys.getrefcount(self._kept[number]) == self._unheld


def _list(numbers: _Ints) -> list[int]:
    return numbers.tolist()


def _take(rows: np.ndarray, which: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Rows, all of which are there, into room of their dtype (with "raise" numpy copies twice)."""
    return rows.take(which, 0, into, "clip")


def _open_index(encoding: Encoding, stored: _Stored, shard: Shard) -> dict[str, np.ndarray]:
    """The keys and the buckets of a shard's pictures; no file stays open for them."""
    path = storage.local_copy(encoding.arrays_url(shard.name))
    arrays = _open_encoded(path, encoding, stored.fields, shard.samples)
    if arrays[BUCKET].max() >= len(stored.buckets):
        raise ValueError(
            f"{path}: has a picture in bucket {arrays[BUCKET].max()} of {len(stored.buckets)}; "
            "delete it and encode again"
        )
    return {name: rows.copy() for name, rows in arrays.items()}


def _open_encoded(
    path: Path,
    encoding: Encoding,
    stored: Mapping[str, Field],
    samples: int,
    views: int = 1,
    *,
    numbers: bool = True,
) -> dict[str, np.ndarray]:
    """The arrays of one encoded shard, checked; without `numbers` only their shapes.

    ValueError when another encoder made them, they do not fit together or are not finite.
    """
    arrays, metadata = mapped(path)
    made_by = json.loads(metadata.get("darkroom", "{}")).get("fingerprint")
    if made_by != encoding.fingerprint:
        raise ValueError(
            f"{path}: made by encoder {made_by}, wanted {encoding.name} ({encoding.fingerprint}); "
            "delete it and encode again"
        )
    if numbers:
        _check_finite(path, encoding, arrays)
    check(str(path), arrays, {"keys": KEY}, samples)
    if encoding.kind == "image":
        check(str(path), arrays, stored, samples * views)
        return arrays
    joins = dict.fromkeys(("offsets", "caption_rows", "sample_offsets"), _INDEX)
    tokens.check_tokens(str(path), arrays, stored[tokens.TOKENS])
    others = {name: field for name, field in stored.items() if name != tokens.TOKENS}
    check(str(path), arrays, {**others, **joins})
    rows, texts = arrays["caption_rows"], len(arrays["pooled"])
    whole = len(arrays["offsets"]) == texts + 1 and len(arrays["sample_offsets"]) == samples + 1
    for name, last in (("offsets", tokens.count(arrays)), ("sample_offsets", len(rows))):
        ends = arrays[name]
        whole = whole and ends[0] == 0 and ends[-1] == last and (np.diff(ends) > 0).all()
    if not whole or rows.min() < 0 or rows.max() >= texts:
        raise ValueError(
            f"{path}: its offsets do not join tokens, captions and {samples} samples; "
            "delete it and encode again"
        )
    return arrays


def _check_finite(path: Path, encoding: Encoding, arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError where a number is NaN or Inf: what an encoder could not tell lies there as zeros.

    Once a process: a learner would take the first of them for the end of its training.
    """
    status = path.stat()
    file = hash((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
    if file in _finite:
        return
    for name, rows in arrays.items():
        if rows.dtype.name in _BITS and not _all_finite(rows.reshape(-1)):
            bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
            raise ValueError(
                f"{path}: field {name} of encoder {encoding.name} ({encoding.fingerprint}) has NaN "
                f"or Inf in {len(bad)} of {len(rows)} rows (the first: {bad[0]}), wanted finite "
                "numbers; delete the file and encode again"
            )
    _finite.add(file)


def _all_finite(numbers: np.ndarray) -> bool:
    """Of a flat array. As whole numbers NaN and Inf are the largest, of either sign: two maxima are
    ten times as fast as np.isfinite on float16, and need no room.
    """
    signed, unsigned = _BITS[numbers.dtype.name]
    infinite = np.array([np.inf, -np.inf], numbers.dtype)
    most, least = infinite.view(signed)[0], infinite.view(unsigned)[1]
    for start in range(0, len(numbers), _IN_CACHE):
        some = numbers[start : start + _IN_CACHE]
        if some.view(signed).max() >= most or some.view(unsigned).max() >= least:
            return False
    return True


def _stored(encoding: Encoding, bucket: Bucket | None = None) -> _Stored:
    """What encoder.json promises. ValueError when it is missing or tells of another encoder."""
    url = encoding.stated_url(bucket)
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
    return _Stored(
        {name: Field.from_json(field) for name, field in stated["fields"].items()},
        tuple((width, height) for width, height in stated.get("buckets", ())),
        2 if stated.get("flip") else 1,
    )


@dataclass(frozen=True)
class TextStorage:
    """What a text encoding takes, and what it would take with every caption padded."""

    captions: int
    """Of all samples; each is stored once in a shard."""
    stored: int
    tokens: int
    """Of those stored."""
    cut: int
    """Captions of samples that were longer than the encoder reads."""
    stored_bytes: int
    """Of whole files: pooled vectors, keys and what joins them included."""
    padded_bytes: int
    """Of the tokens alone."""


def text_storage(manifest: Manifest, encoding: Encoding, padded_to: int) -> TextStorage:
    """Measured on the encoding's files, against the same tokens padded to `padded_to` a caption.

    FileNotFoundError when a shard is not encoded, ValueError when it is no text.
    """
    if encoding.kind != "text":
        raise ValueError(f"encoding {encoding.name}: {encoding.kind}s have no captions to pad")
    fields = _stored(encoding).fields
    captions = stored = read = size = cut = 0
    for shard in manifest.split():
        path = storage.local_copy(encoding.arrays_url(shard.name))
        arrays = _open_encoded(path, encoding, fields, shard.samples, numbers=False)
        captions += len(arrays["caption_rows"])
        stored += len(arrays["pooled"])
        read += tokens.count(arrays)
        size += path.stat().st_size
        cut += int(arrays[CUT][arrays["caption_rows"]].sum()) if CUT in arrays else 0
    row = fields["tokens"].empty(1).nbytes
    return TextStorage(captions, stored, read, cut, size, captions * padded_to * row)
