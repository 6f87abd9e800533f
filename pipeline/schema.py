"""The contract between the folders: what an encoder leaves on disk and what a batch holds.

An encoding is known by its fingerprint alone; a field is a dtype and the shape of one row. Whoever
writes, maps or receives arrays checks them here, so that what disagrees is refused where it enters
and not deep in a network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from . import storage

Kind = Literal["image", "text"]
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
    handed over at once); they are no part of its identity. `side` is the side in pixels that
    pictures are fitted to; None for text.
    """

    name: str
    kind: Kind
    fingerprint: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    side: int | None = None

    def __post_init__(self):
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


@dataclass(frozen=True)
class Encoding:
    """What one encoder made of a dataset: a directory, one safetensors file per shard."""

    name: str
    kind: Kind
    fingerprint: str
    url: str

    @classmethod
    def at(cls, dataset: str, name: str, kind: Kind, fingerprint: str) -> Encoding:
        return cls(name, kind, fingerprint, storage.join(dataset, "encodings", fingerprint))


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
