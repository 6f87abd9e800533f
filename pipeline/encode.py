"""Image shards -> encoded shards, by encoders handed in. What is committed is never made again.

The unit of work is a shard with the encoders it still lacks: its pictures are decoded once for all
of them, each unique caption is encoded once, and each encoder's arrays become one safetensors file,
row by row those of the shard, published whole. That file's bytes depend on the shard and the
encoder alone, so doing a unit twice changes nothing.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import storage
from .load import Table, pack_keys, read_table
from .manifest import Manifest, fingerprint
from .schema import EncoderSpec, Encoding, Field, check

if TYPE_CHECKING:
    from .execute import Executor

__all__ = [
    "Build",
    "EncoderSpec",
    "Encoding",
    "ImageEncoder",
    "TextEncoder",
    "encode",
    "pixels_spec",
]

ImageEncoder = Callable[[np.ndarray], dict[str, np.ndarray]]
"""uint8 [n, 3, side, side] -> fields of n rows each."""
TextEncoder = Callable[[list[str]], tuple[Sequence[np.ndarray], np.ndarray]]
"""n captions -> (tokens: n arrays [length, width], pooled [n, width])."""
Build = Callable[[EncoderSpec], Any]

PIXELS = "pixels"
_PIXELS_VERSION = 1  # raised by hand when `images.decode` or `images.fit` give other numbers


def pixels_spec(side: int) -> EncoderSpec:
    """The identity encoding: pictures as uint8 [3, side, side]. Needs no build."""
    identity = fingerprint({"encoder": PIXELS, "side": side, "version": _PIXELS_VERSION})
    return EncoderSpec(PIXELS, "image", identity, side=side)


def encode(
    manifest: Manifest,
    specs: Sequence[EncoderSpec],
    build: Build | None,
    executor: Executor,
    progress: Callable[[int, int], None] | None = None,
    splits: Sequence[str] | None = None,
    *,
    max_rejected_share: float = 0.05,
) -> dict[str, Encoding]:
    """Every shard (of `splits`, or all) encoded by every spec; name -> what came of it.

    Rows whose numbers are not finite are rejected: zero in the file, and listed beside it in
    `{shard}.rejected.json`, by which the loader leaves them out.

    Raises ValueError when a directory holds another encoder's work, when an encoder gives too few
    rows or another shape than before, and when more than `max_rejected_share` of a shard is
    rejected.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"each encoder needs a name of its own, got {', '.join(names)}")
    shards = manifest.split(*splits or ())
    encodings: dict[str, Encoding] = {}
    lacking: dict[str, list[str]] = {shard.name: [] for shard in shards}
    for spec in specs:
        encoding = Encoding.at(manifest.dataset, spec.name, spec.kind, spec.fingerprint)
        _refuse_other(encoding.url, spec)
        done = set(storage.list_names(encoding.url))
        for shard in shards:
            if f"{shard.name}.safetensors" not in done:
                lacking[shard.name].append(spec.fingerprint)
        encodings[spec.name] = encoding
    units = [
        {"shard": shard.name, "samples": shard.samples, "encoders": lacking[shard.name]}
        for shard in shards
        if lacking[shard.name]
    ]
    if units:
        from . import execute

        for encoding in encodings.values():
            storage.sweep(encoding.url)  # what killed runs left half written
        dataset = storage.absolute(manifest.dataset)  # workers may stand in another directory
        work = partial(_Encode, dataset, tuple(specs), build, max_rejected_share)
        execute.run(work, units, executor=executor, progress=progress)
    return encodings


class _Encode:
    """Does one unit per call; encoders are built when first needed, and stay."""

    def __init__(
        self,
        dataset: str,
        specs: tuple[EncoderSpec, ...],
        build: Build | None,
        max_rejected_share: float,
    ):
        self.dataset, self.build, self.max_rejected_share = dataset, build, max_rejected_share
        self.specs = {spec.fingerprint: spec for spec in specs}
        self.encoders: dict[str, Any] = {}

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        shard: str = unit["shard"]
        specs = [self.specs[fingerprint] for fingerprint in unit["encoders"]]
        table = read_table(self.dataset, shard)
        assert len(table.keys) == unit["samples"], (shard, len(table.keys), unit["samples"])
        rejected: dict[str, int] = {}
        images = [spec for spec in specs if spec.kind == "image"]
        for spec, fields in self._images(shard, table.keys, images):
            bad = np.logical_or.reduce([_not_finite(rows) for rows in fields.values()])
            rejected[spec.name] = self._commit(shard, table, spec, fields, {}, bad)
        for spec in specs:
            if spec.kind == "text":
                where = f"encoder {spec.name}, shard {shard}"
                fields, joins = _texts(where, self._encoder(spec), table, _batch(spec))
                bad = _reduce(_not_finite(fields["tokens"]), joins["offsets"])
                bad = (bad | _not_finite(fields["pooled"]))[joins["caption_rows"]]
                bad = _reduce(bad, joins["sample_offsets"])
                rejected[spec.name] = self._commit(shard, table, spec, fields, joins, bad)
        return {"shard": shard, "samples": unit["samples"], "rejected": rejected}

    def _encoder(self, spec: EncoderSpec) -> Any:
        if spec.name == PIXELS:
            return _identity
        if self.build is None:
            raise ValueError(f"encoder {spec.name}: only {PIXELS} can do without a build function")
        if spec.fingerprint not in self.encoders:
            self.encoders[spec.fingerprint] = self.build(spec)
        return self.encoders[spec.fingerprint]

    def _images(
        self, shard: str, keys: list[str], specs: list[EncoderSpec]
    ) -> list[tuple[EncoderSpec, dict[str, np.ndarray]]]:
        """The row-aligned fields of each spec, from one pass over the shard's pictures."""
        made = [(spec, self._encoder(spec), _Rows(len(keys))) for spec in specs]
        sides = sorted({spec.side for spec in specs if spec.side})
        batch = max(map(_batch, specs), default=0)
        first = 0
        for pictures in self._pictures(shard, keys, sides, batch) if specs else ():
            for spec, encoder, rows in made:
                pixels = pictures[spec.side]
                for start in range(0, len(pixels), _batch(spec)):
                    part = pixels[start : start + _batch(spec)]
                    at = np.arange(len(part)) + first + start
                    where = f"encoder {spec.name}, shard {shard}, rows from {at[0]}"
                    rows.put(where, at, encoder(part))
            first += len(next(iter(pictures.values())))
        return [(spec, rows.fields) for spec, _, rows in made]

    def _pictures(
        self, shard: str, keys: list[str], sides: list[int], batch: int
    ) -> Iterator[dict[int | None, np.ndarray]]:
        """Batches by side, uint8 [b, 3, side, side]; two are decoded while one is encoded."""
        from . import images, shards

        url = storage.join(self.dataset, "shards", f"{shard}.tar")
        policy = images.DecodePolicy()

        def decode(sample: shards.ShardSample) -> list[np.ndarray]:
            try:
                picture, _ = images.decode(sample.image, policy)
            except images.Rejected as error:
                raise ValueError(
                    f"{url}, sample {sample.key}: the stored picture cannot be decoded "
                    f"({error.reason}: {error.detail}); delete the dataset's shard and ingest again"
                ) from None
            return [images.fit(picture, side) for side in sides]

        samples = list(shards.read_shard(url))
        if [sample.key for sample in samples] != keys:
            raise ValueError(f"{url}: its samples are not those of its table; ingest again")
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode") as pool:
            ahead: deque[list[Future[list[np.ndarray]]]] = deque()
            for first in range(0, len(samples) + 2 * batch, batch):
                ahead.append([pool.submit(decode, s) for s in samples[first : first + batch]])
                if len(ahead) > 2 and (now := ahead.popleft()):
                    by_side = zip(*(future.result() for future in now), strict=True)
                    yield dict(zip(sides, map(np.stack, by_side), strict=True))

    def _commit(
        self,
        shard: str,
        table: Table,
        spec: EncoderSpec,
        fields: dict[str, np.ndarray],
        joins: dict[str, np.ndarray],
        bad: np.ndarray,
    ) -> int:
        """Publish one encoded shard; how many of its samples are rejected."""
        from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

        url = Encoding.at(self.dataset, spec.name, spec.kind, spec.fingerprint).url
        stored = {name: Field.of(rows) for name, rows in fields.items()}
        text = storage.json_bytes(_stated(spec, stored))
        if not storage.create_exclusive(storage.join(url, "encoder.json"), text):
            _refuse_other(url, spec, stored)
        rejected = np.flatnonzero(bad).tolist()
        if rejected:
            keys = [table.keys[row] for row in rejected]
            if len(rejected) > self.max_rejected_share * len(table.keys):
                raise ValueError(
                    f"encoder {spec.name}, shard {shard}: {len(rejected)} of {len(table.keys)} "
                    f"samples gave NaN or Inf (the first: {keys[0]}), at most "
                    f"{self.max_rejected_share:.0%} may; check the encoder's weights and precision"
                )
            fields = {name: _zeroed(rows) for name, rows in fields.items()}
            listed = {"reason": "not_finite", "rows": rejected, "keys": keys}
            storage.publish_json(storage.join(url, f"{shard}.rejected.json"), listed)
        # One metadata entry: safetensors writes several in random order.
        made_by = json.dumps(
            {"encoder": spec.name, "fingerprint": spec.fingerprint, "shard": shard}
        )
        arrays = {"keys": pack_keys(table.keys), **fields, **joins}
        with storage.publishing(storage.join(url, f"{shard}.safetensors")) as file:
            save_file(
                {name: np.ascontiguousarray(rows) for name, rows in arrays.items()},
                file.name,
                {"darkroom": made_by},
            )
        return len(rejected)


def _identity(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {PIXELS: pixels}


class _Rows:
    """Fields of `count` rows, filled as an encoder gives them."""

    def __init__(self, count: int):
        self.count = count
        self.fields: dict[str, np.ndarray] = {}

    def put(self, where: str, at: np.ndarray, part: Mapping[str, np.ndarray]) -> None:
        part = {name: np.asarray(rows) for name, rows in part.items()}
        if not self.fields:
            check(where, part, {name: Field.of(rows) for name, rows in part.items()}, len(at))
            self.fields = {
                n: np.empty((self.count, *r.shape[1:]), r.dtype) for n, r in part.items()
            }
        check(where, part, {name: Field.of(rows) for name, rows in self.fields.items()}, len(at))
        for name, rows in self.fields.items():
            rows[at] = part[name]


def _texts(
    where: str, encoder: TextEncoder, table: Table, batch: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(tokens and pooled of each unique caption, what joins them to the samples)."""
    numbers: dict[str, int] = {}
    caption_rows = np.array([numbers.setdefault(text, len(numbers)) for text in table.captions])
    texts = list(numbers)
    tokens: list[np.ndarray] = [np.empty(0)] * len(texts)
    pooled = _Rows(len(texts))
    # Captions of like length go together: an encoder pads to the longest of a batch.
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        flat, summary = encoder([texts[number] for number in chosen])
        if len(flat) != len(chosen):
            raise ValueError(f"{where}: {len(flat)} token arrays for {len(chosen)} captions")
        for number, rows in zip(chosen, flat, strict=True):
            tokens[number] = np.asarray(rows)
        pooled.put(where, np.array(chosen), {"pooled": summary})
    wanted = Field.of(tokens[0])
    for text, rows in zip(texts, tokens, strict=True):
        if rows.ndim != 2 or not len(rows) or not wanted.fits(rows):
            raise ValueError(
                f"{where}, caption {text[:60]!r}: tokens are {rows.dtype.name}{list(rows.shape)}, "
                f"wanted {wanted}, at least one row"
            )
    fields = {"tokens": np.concatenate(tokens), **pooled.fields}
    offsets = np.cumsum([0, *map(len, tokens)])
    joins = {"offsets": offsets, "caption_rows": caption_rows, "sample_offsets": table.offsets}
    return fields, joins


def _batch(spec: EncoderSpec) -> int:
    return spec.options.get("batch", 64)


def _not_finite(rows: np.ndarray) -> np.ndarray:
    """bool [n]: the rows that hold NaN or Inf."""
    if rows.dtype.kind != "f":
        return np.zeros(len(rows), np.bool_)
    return np.logical_not(np.isfinite(rows).reshape(len(rows), -1).all(1))


def _zeroed(rows: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(rows), rows, 0) if rows.dtype.kind == "f" else rows


def _reduce(bad: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """bool: the groups, as divided by `offsets`, that hold a bad one. No group is empty."""
    return np.logical_or.reduceat(bad, offsets[:-1])


def _stated(spec: EncoderSpec, stored: Mapping[str, Field]) -> dict[str, Any]:
    """What encoder.json says of its directory."""
    fields = {
        name: {"dtype": field.dtype, "shape": list(field.shape)} for name, field in stored.items()
    }
    return {
        "name": spec.name,
        "kind": spec.kind,
        "fingerprint": spec.fingerprint,
        "side": spec.side,
        "fields": fields,
    }


def _refuse_other(url: str, spec: EncoderSpec, stored: Mapping[str, Field] | None = None) -> None:
    """ValueError when the directory was filled by another encoder, or with other fields."""
    try:
        found = storage.read_json(storage.join(url, "encoder.json"))
    except FileNotFoundError:
        return
    wanted = _stated(spec, stored or {})
    for what in ("fingerprint", "kind", "side", *(["fields"] if stored else [])):
        if found.get(what) != wanted[what]:
            raise ValueError(
                f"{url}/encoder.json: filled by an encoder with {what} {found.get(what)}, "
                f"but {spec.name} ({spec.fingerprint}) has {what} {wanted[what]}; "
                "encoders that differ need fingerprints that differ"
            )
