"""The contract between the folders: what an encoder leaves on disk and what a batch holds.

An encoding is known by its fingerprint alone; a field is a dtype and the shape of one row. Whoever
writes, maps or receives arrays checks them here, so that what disagrees is refused where it enters
and not deep in a network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from . import storage

Kind = Literal["image", "text"]
Bucket = tuple[int, int]
"""Width and height, in pixels, that pictures of like aspect ratio are fitted to."""
BUCKET = "bucket"
"""The field that says in which bucket of its encoder's table each picture of a shard is."""
CUT = "cut"
"""The field that says which captions of a shard were longer than their encoder reads."""
PICTURE_EMBEDDING = "clip_image"
"""The encoder that is CLIP's image tower: its field `clip_image_pooled` is the embedding of the
picture itself, which a prior draws and a stage may listen to beside captions."""
Batch = dict[str, Any]
"""Arrays and lists (`caption`, `key`, `label`) of one row per sample, int64 `position`, `epoch`."""


@dataclass(frozen=True)
class Field:
    """The dtype (numpy's name) and the shape of one row; None stands for an axis of any length."""

    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, rows: np.ndarray) -> Field:
        return cls(rows.dtype.name, rows.shape[1:])

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Field:
        return cls(stored["dtype"], tuple(stored["shape"]))

    @classmethod
    def spanning(cls, fields: Sequence[Field]) -> Field:
        """The one that all these fit: an axis in which they differ is of any length."""
        if len({(field.dtype, len(field.shape)) for field in fields}) > 1:
            raise ValueError(f"no field spans {', '.join(map(str, fields))}")
        axes = (set(lengths) for lengths in zip(*(field.shape for field in fields), strict=True))
        return cls(fields[0].dtype, tuple(axis.pop() if len(axis) == 1 else None for axis in axes))

    def __str__(self) -> str:
        axes = ("any" if length is None else str(length) for length in self.shape)
        return f"{self.dtype}[{', '.join(('rows', *axes))}]"

    def empty(self, *leading: int) -> np.ndarray:
        """Room for rows of one shape: [*leading, *shape], uninitialised."""
        return np.empty((*leading, *(n for n in self.shape if n is not None)), self.dtype)

    def fits(self, rows: np.ndarray) -> bool:
        shape = rows.shape[1:]
        return (
            rows.dtype.name == self.dtype
            and len(shape) == len(self.shape)
            and all(
                want is None or got == want for got, want in zip(shape, self.shape, strict=True)
            )
        )


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder to be built.

    `fingerprint` covers all that can change a number it gives: weights, dtype, preprocessing.
    `options` tell `build` where to find it and how to run it (JSON; "batch" is the number of rows
    handed over at once); they are no part of its identity. `side` is the side in pixels of the
    square that pictures are fitted to; None for text. With `buckets` each is fitted to the one
    nearest in aspect ratio instead, and `side` is but their measure. `flip` adds the mirrored
    pictures as a second view: for data whose captions name no left and right.
    """

    name: str
    kind: Kind
    fingerprint: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    side: int | None = None
    buckets: tuple[Bucket, ...] = ()
    flip: bool = False

    def __post_init__(self):
        object.__setattr__(self, "buckets", _distinct(self.buckets, self.side))
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(
                f"encoder name {self.name!r}: wanted a-z, 0-9, _ (it begins names of batch fields)"
            )
        if self.kind not in ("image", "text"):
            raise ValueError(
                f"encoder {self.name}: kind must be 'image' or 'text', got {self.kind!r}"
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.fingerprint):
            raise ValueError(
                f"encoder {self.name}: fingerprint {self.fingerprint!r} cannot name a directory"
            )
        if (self.kind == "image") != bool(self.side):
            raise ValueError(
                f"encoder {self.name}: an image encoder needs a side, a text encoder has none"
            )
        if self.kind == "text" and (self.buckets or self.flip):
            raise ValueError(
                f"encoder {self.name}: buckets and flip are for pictures, not for text"
            )
        if len(self.buckets) > 256 or not all(min(bucket) > 0 for bucket in self.buckets):
            raise ValueError(
                f"encoder {self.name}: wanted up to 256 buckets (width, height) in pixels, "
                f"got {len(self.buckets)}: {self.buckets[:4]}"
            )

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """What pictures are fitted to: the buckets, or the square."""
        return self.buckets or ((self.side, self.side),) if self.side else ()


def framing(side: int | None, buckets: Sequence[Bucket] = (), flip: bool = False) -> dict[str, Any]:
    """What buckets and flip add to an encoder's identity: nothing to that of one square view."""
    table = [list(bucket) for bucket in _distinct(buckets, side)]
    return ({"buckets": table} if table else {}) | ({"flip": True} if flip else {})


def _distinct(buckets: Sequence[Sequence[int]], side: int | None) -> tuple[Bucket, ...]:
    """The buckets, each once, as tuples; () for the square alone, which is what no buckets mean."""
    table = tuple(dict.fromkeys((int(width), int(height)) for width, height in buckets))
    return () if table == ((side, side),) else table


@dataclass(frozen=True)
class Encoding:
    """What an encoder made of a dataset: a directory, for each shard one safetensors file, or one
    per bucket and an index.
    """

    name: str
    kind: Kind
    fingerprint: str
    url: str

    @classmethod
    def at(cls, dataset: str, name: str, kind: Kind, fingerprint: str) -> Encoding:
        return cls(name, kind, fingerprint, storage.join(dataset, "encodings", fingerprint))

    def arrays_url(self, shard: str, bucket: Bucket | None = None) -> str:
        """The safetensors file of a shard, or of a bucket of it."""
        return storage.join(self.url, f"{shard}{_suffix(bucket)}.safetensors")

    def stated_url(self, bucket: Bucket | None = None) -> str:
        """The JSON file that says what made the directory and what fields its files have."""
        return storage.join(self.url, f"encoder{_suffix(bucket)}.json")


def _suffix(bucket: Bucket | None) -> str:
    return f".{bucket[0]}x{bucket[1]}" if bucket else ""


def batch_fields(name: str, kind: Kind, stored: Mapping[str, Field]) -> dict[str, Field]:
    """The batch fields of an encoder called `name`, from those it stores: captions are padded."""
    if kind == "image":
        return dict(stored)
    tokens, pooled = stored["tokens"], stored["pooled"]
    return {
        f"{name}_tokens": Field(tokens.dtype, (None, *tokens.shape)),
        f"{name}_mask": Field("bool", (None,)),
        f"{name}_pooled": pooled,
    }


def check(
    where: str,
    arrays: Mapping[str, np.ndarray],
    fields: Mapping[str, Field],
    rows: int | None = None,
) -> None:
    """Refuse arrays that are not `fields` (others may be there too), or have not `rows` rows."""
    for name, wanted in fields.items():
        if name not in arrays:
            raise ValueError(
                f"{where}: field {name} is missing (found {', '.join(sorted(arrays)) or 'none'})"
            )
        got = arrays[name]
        if got.ndim == 0 or not wanted.fits(got):
            raise ValueError(
                f"{where}: field {name} is {got.dtype.name}{list(got.shape)}, wanted {wanted}"
            )
        if rows is not None and len(got) != rows:
            raise ValueError(f"{where}: field {name} has {len(got)} rows, wanted {rows}")
