"""Image shards -> encoded shards, by encoders handed in. What is committed is never made again.

The unit of work is a shard with the encoders it still lacks: its pictures are decoded once for all
of them, each unique caption is encoded once, and each encoder's arrays become one safetensors file,
row by row those of the shard, published whole. That file's bytes depend on the shard and the
encoder alone, so doing a unit twice changes nothing.

Pictures in buckets of aspect ratio become a file per bucket, `{shard}.{w}x{h}.safetensors`, its
rows in the order of the shard. `{shard}.safetensors` then says the bucket of each row; it comes
last, and without it nothing is there. Where an encoder flips, row i lies at 2i and its mirror image
at 2i + 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import storage
from .load import STORABLE, Table, pack_keys, read_table
from .manifest import Manifest, fingerprint
from .pictures import decoded
from .schema import BUCKET, CUT, Bucket, EncoderSpec, Encoding, Field, check, framing
from .tokens import TOKENS, laid_out

if TYPE_CHECKING:
    from PIL.Image import Image

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
"""uint8 [n, 3, height, width] -> fields of n rows each."""
TextEncoder = Callable[[list[str]], tuple[Sequence[np.ndarray], np.ndarray]]
"""n captions -> (tokens: n arrays [length, width], pooled [n, width]). One that has `repeats` gives
so many of a token's first columns by its word alone; these are stored once for each word."""
Build = Callable[[EncoderSpec], Any]

PIXELS = "pixels"
_PIXELS_VERSION = 1  # raised by hand when `images.decode` or `images.fit` give other numbers
_FEW = 20
"""Of a shard of fewer samples than this, as many may be rejected as of so many: nightly growth
leaves small shards, and a twentieth of theirs is none."""


def pixels_spec(side: int, buckets: Sequence[Bucket] = (), flip: bool = False) -> EncoderSpec:
    """The identity encoding: pictures as uint8 [3, height, width], squares of `side` if there are
    no buckets. Needs no build.
    """
    identity = {"encoder": PIXELS, "side": side, "version": _PIXELS_VERSION}
    identity |= framing(side, buckets, flip)
    return EncoderSpec(
        PIXELS, "image", fingerprint(identity), side=side, buckets=tuple(buckets), flip=flip
    )


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
    `{shard}.rejected.json`, by which the loader leaves them out. An encoder that runs out of memory
    gets half as many rows at once from then on.

    Raises ValueError when a directory holds another encoder's work, when an encoder gives too few
    rows or another shape than before, when there is no memory for a single row, and when more than
    `max_rejected_share` of a shard is rejected (of 20 samples, where a shard has fewer).
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"each encoder needs a name of its own, got {', '.join(names)}")
    shards = manifest.split(*splits or ())
    encodings: dict[str, Encoding] = {}
    lacking: dict[str, list[str]] = {shard.name: [] for shard in shards}
    for spec in specs:
        encoding = Encoding.at(manifest.dataset, spec.name, spec.kind, spec.fingerprint)
        _refuse_other(encoding, spec)
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
        self.encoders: dict[str, _Batches] = {}

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        shard: str = unit["shard"]
        specs = [self.specs[fingerprint] for fingerprint in unit["encoders"]]
        table = read_table(self.dataset, shard)
        assert len(table.keys) == unit["samples"], (shard, len(table.keys), unit["samples"])
        rejected: dict[str, int] = {}
        images = [spec for spec in specs if spec.kind == "image"]
        for pictures in self._images(shard, table.keys, images):
            files, bad = pictures.done()
            rejected[pictures.spec.name] = self._commit(shard, table, pictures.spec, files, bad)
        for spec in specs:
            if spec.kind == "text":
                where = f"encoder {spec.name}, shard {shard}"
                fields, joins = _texts(where, self._encoder(spec), table)
                bad = _reduce(_not_finite(fields[TOKENS]), joins["offsets"])
                bad = (bad | _not_finite(fields["pooled"]))[joins["caption_rows"]]
                bad = _reduce(bad, joins["sample_offsets"])
                repeats = getattr(self._encoder(spec).encoder, "repeats", 0)
                files = [EncodedFile(None, np.arange(len(table.keys)), fields, joins, repeats)]
                rejected[spec.name] = self._commit(shard, table, spec, files, bad)
        return {"shard": shard, "samples": unit["samples"], "rejected": rejected}

    def _encoder(self, spec: EncoderSpec) -> _Batches:
        if spec.name == PIXELS:
            return _Batches(_identity, _batch(spec))
        if self.build is None:
            raise ValueError(f"encoder {spec.name}: only {PIXELS} can do without a build function")
        if spec.fingerprint not in self.encoders:
            self.encoders[spec.fingerprint] = _Batches(self.build(spec), _batch(spec))
        return self.encoders[spec.fingerprint]

    def _images(self, shard: str, keys: list[str], specs: list[EncoderSpec]) -> list[_Pictures]:
        """What each spec makes of the shard, from one pass over its pictures."""
        from . import images

        made = [_Pictures(shard, spec, self._encoder(spec), len(keys)) for spec in specs]
        tables = {spec.sizes for spec in specs}

        def fitted(picture: Image) -> dict[tuple[Bucket, ...], tuple[int, np.ndarray]]:
            """Table of sizes -> (number of the size, pixels)."""
            numbers = {sizes: images.nearest(sizes, *picture.size) for sizes in tables}
            return {
                sizes: (number, images.fit(picture, sizes[number]))
                for sizes, number in numbers.items()
            }

        batch = max(map(_batch, specs), default=0)
        for now in decoded(self.dataset, shard, keys, batch, fitted) if specs else ():
            for picture in now:
                for pictures in made:
                    pictures.add(*picture[pictures.spec.sizes])
        return made

    def _commit(
        self, shard: str, table: Table, spec: EncoderSpec, files: list[EncodedFile], bad: np.ndarray
    ) -> int:
        """Publish one encoded shard, the last of its files last; how many samples are rejected."""
        encoding = Encoding.at(self.dataset, spec.name, spec.kind, spec.fingerprint)
        for bucket, _, fields, _, _ in files:
            stored = {name: Field.of(rows) for name, rows in fields.items()}
            if odd := [name for name, it in stored.items() if it.dtype not in STORABLE]:
                raise ValueError(
                    f"encoder {spec.name}: field {odd[0]} is {stored[odd[0]]}, "
                    f"wanted one of {', '.join(STORABLE)}"
                )
            text = storage.json_bytes(_stated(spec, stored))
            if not storage.create_exclusive(encoding.stated_url(bucket), text):
                _refuse_other(encoding, spec, stored, bucket)
        rejected = np.flatnonzero(bad).tolist()
        of = max(len(table.keys), _FEW)
        if len(rejected) > self.max_rejected_share * of:
            raise ValueError(
                f"encoder {spec.name}, shard {shard}: {len(rejected)} of {len(table.keys)} "
                f"samples gave NaN or Inf (the first: {table.keys[rejected[0]]}), at most "
                f"{self.max_rejected_share:.0%} of {of} may; check the encoder's weights and "
                "precision"
            )
        publish_encoded(encoding, shard, table.keys, files, rejected)
        return len(rejected)


def publish_encoded(
    encoding: Encoding,
    shard: str,
    keys: Sequence[str],
    files: Sequence[EncodedFile],
    rejected: Sequence[int],
) -> None:
    """Publish what an encoder made of a shard, the last file last; `rejected` rows become zero."""
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

    if rejected:
        listed = {
            "reason": "not_finite",
            "rows": list(rejected),
            "keys": [keys[row] for row in rejected],
        }
        storage.publish_json(storage.join(encoding.url, f"{shard}.rejected.json"), listed)
    # One metadata entry: safetensors writes several in random order.
    made_by = json.dumps(
        {"encoder": encoding.name, "fingerprint": encoding.fingerprint, "shard": shard}
    )
    packed = pack_keys(keys)
    for bucket, rows, fields, joins, repeats in files:
        if rejected:
            fields = {name: _zeroed(values) for name, values in fields.items()}
        if TOKENS in fields:
            others = {name: values for name, values in fields.items() if name != TOKENS}
            fields = laid_out(fields[TOKENS], repeats) | others
        arrays = {"keys": packed[rows], **fields, **joins}
        with storage.publishing(encoding.arrays_url(shard, bucket)) as file:
            save_file(
                {name: np.ascontiguousarray(values) for name, values in arrays.items()},
                file.name,
                {"darkroom": made_by},
            )


def _identity(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {PIXELS: pixels}


class EncodedFile(NamedTuple):
    """One file of an encoded shard."""

    bucket: Bucket | None
    rows: np.ndarray
    """int64: whose keys it holds, as rows of the shard."""
    fields: dict[str, np.ndarray]
    joins: dict[str, np.ndarray]
    repeats: int = 0
    """The columns of tokens that depend on the word alone."""


class _Batches:
    """An encoder, handed `size` rows at once; fewer, for good, once these are too many for the
    memory there is.
    """

    def __init__(self, encoder: Callable[[Any], Any], size: int):
        self.encoder, self.size = encoder, size

    def __call__(self, where: str, rows: Any) -> Iterator[tuple[range, Any]]:
        """(the places of some rows, what the encoder gave for them), until all rows are done."""
        first = 0
        while first < len(rows):
            part = rows[first : first + self.size]
            try:
                given = self.encoder(part)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise ValueError(
                        f"{where}: not enough memory for a single row ({error}); free some, take "
                        "a smaller side, or encode on a larger device"
                    ) from error
                self.size = len(part) // 2
                continue  # the error is let go of first, and with it what the encoder held
            yield range(first, first + len(part)), given
            first += len(part)


def _out_of_memory(error: Exception) -> bool:
    """Known by its name and words: torch, whose errors most are, is not imported here."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("out of memory", "can't allocate", "ALLOC_FAILED"))
    )


class _Pictures:
    """What one encoder makes of a shard's pictures, which come in their order, fitted."""

    def __init__(self, shard: str, spec: EncoderSpec, encoder: _Batches, samples: int):
        self.where = f"encoder {spec.name}, shard {shard}"
        self.spec, self.encoder, self.views = spec, encoder, 2 if spec.flip else 1
        self.numbers: list[int] = []
        """The bucket of each picture so far."""
        room = 0 if spec.buckets else samples * self.views
        self.rows = [_Rows(room) for _ in spec.sizes]
        self.waiting: list[list[np.ndarray]] = [[] for _ in spec.sizes]
        self.encoded = [0 for _ in spec.sizes]

    def add(self, number: int, pixels: np.ndarray) -> None:
        """The next picture, for bucket `number`: uint8 [3, height, width]."""
        self.numbers.append(number)
        self.waiting[number].append(pixels)
        if len(self.waiting[number]) == _batch(self.spec):
            self._encode(number)

    def done(self) -> tuple[list[EncodedFile], np.ndarray]:
        """(the files to publish, bool [samples]: those with a number that is not finite)."""
        for number in range(len(self.rows)):
            self._encode(number)
        numbers = np.array(self.numbers)
        bad, files = np.zeros(len(numbers), np.bool_), list[EncodedFile]()
        for number in range(len(self.spec.sizes)):
            if (members := np.flatnonzero(numbers == number)).size:
                fields = self.rows[number].fields(self.views * len(members))
                for rows in fields.values():
                    bad[members] |= _not_finite(rows).reshape(-1, self.views).any(1)
                bucket = self.spec.buckets[number] if self.spec.buckets else None
                files.append(EncodedFile(bucket, members, fields, {}))
        if self.spec.buckets:
            index = {BUCKET: numbers.astype(np.uint8)}
            files.append(EncodedFile(None, np.arange(len(numbers)), index, {}))
        return files, bad

    def _encode(self, number: int) -> None:
        if not (waiting := self.waiting[number]):
            return
        first, self.waiting[number] = self.encoded[number], []
        self.encoded[number] += len(waiting)
        bucket = ", bucket {}x{}".format(*self.spec.sizes[number]) if self.spec.buckets else ""
        pixels = np.stack(waiting)
        for view in range(self.views):
            seen = np.ascontiguousarray(pixels[..., ::-1]) if view else pixels
            where = f"{self.where}{bucket}, rows from {first}"
            for places, fields in self.encoder(where, seen):
                at = (first + np.array(places)) * self.views + view
                self.rows[number].put(where, at, fields)


class _Rows:
    """Fields filled in any order as an encoder gives them, with `room` for rows to come."""

    def __init__(self, room: int):
        self.room = room
        self.arrays: dict[str, np.ndarray] = {}

    def fields(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` rows, which is all of them."""
        return {name: rows[:count] for name, rows in self.arrays.items()}

    def put(self, where: str, at: np.ndarray, part: Mapping[str, np.ndarray]) -> None:
        part = {name: np.asarray(rows) for name, rows in part.items()}
        if not self.arrays:
            check(where, part, {name: Field.of(rows) for name, rows in part.items()}, len(at))
            self.arrays = {n: np.empty((self.room, *r.shape[1:]), r.dtype) for n, r in part.items()}
        check(where, part, {name: Field.of(rows) for name, rows in self.arrays.items()}, len(at))
        wanted = int(at.max()) + 1
        for name, rows in self.arrays.items():
            if wanted > len(rows):
                more = np.empty((max(wanted - len(rows), len(rows)), *rows.shape[1:]), rows.dtype)
                self.arrays[name] = rows = np.concatenate([rows, more])
            rows[at] = part[name]


def _texts(
    where: str, encoder: _Batches, table: Table
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(tokens and pooled of each unique caption, what joins them to the samples)."""
    numbers: dict[str, int] = {}
    caption_rows = np.array([numbers.setdefault(text, len(numbers)) for text in table.captions])
    texts = list(numbers)
    tokens: list[np.ndarray] = [np.empty(0)] * len(texts)
    pooled = _Rows(len(texts))
    # Captions of like length go together: an encoder pads to the longest of a batch.
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for places, (flat, summary) in encoder(where, [texts[number] for number in order]):
        chosen = [order[place] for place in places]
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
    fields = {TOKENS: np.concatenate(tokens), **pooled.fields(len(texts))}
    offsets = np.cumsum([0, *map(len, tokens)])
    joins = {"offsets": offsets, "caption_rows": caption_rows, "sample_offsets": table.offsets}
    return fields, joins | _cut(encoder.encoder, texts, tokens)


def _cut(encoder: Any, texts: list[str], tokens: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Whether each caption was longer than the encoder reads; nothing if it can't tell."""
    if not hasattr(encoder, "truncated"):
        return {}
    cut = np.zeros(len(texts), np.uint8)
    full = [number for number, rows in enumerate(tokens) if len(rows) >= encoder.limit]
    cut[full] = encoder.truncated([texts[number] for number in full])
    return {CUT: cut}


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
        **framing(spec.side, spec.buckets, spec.flip),
    }


def _refuse_other(
    encoding: Encoding,
    spec: EncoderSpec,
    stored: Mapping[str, Field] | None = None,
    bucket: Bucket | None = None,
) -> None:
    """ValueError when the directory was filled by another encoder, or with other fields."""
    url = encoding.stated_url(bucket)
    try:
        found = storage.read_json(url)
    except FileNotFoundError:
        return
    wanted = _stated(spec, stored or {})
    framed = ("side", "buckets", "flip")
    for what in ("fingerprint", "kind", *framed, *(["fields"] if stored else [])):
        if found.get(what) != wanted.get(what):
            raise ValueError(
                f"{url}: filled by an encoder with {what} {found.get(what)}, "
                f"but {spec.name} ({spec.fingerprint}) has {what} {wanted.get(what)}; "
                "encoders that differ need fingerprints that differ"
            )
