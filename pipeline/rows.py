"""What a run of ingest knows of its rows: their texts on disk, a few dozen bytes of each in memory.

A decision over all rows wants all of them at once. What it compares lies in columns of numbers and
of 16-byte names (keys; hashes of rows); what it only passes on waits in files without a name, which
go with the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from . import storage

_AT_ONCE = 4096  # lines


class Lines:
    """JSON values, one a line, in a file without a name on the disk of a data set."""

    def __init__(self, dataset: str):
        self._file = storage.unnamed(storage.join(dataset, "staging"))
        self._ends = array("q", [0])
        self._written = 0

    def append(self, line: bytes) -> None:
        """Add a line that does not have its end yet."""
        self._file.write(line + b"\n")
        self._ends.append(self._ends[-1] + len(line) + 1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return parsed(self.line(index))

    def line(self, index: int) -> bytes:
        """A line as it was added."""
        return self._read(index, index + 1)[:-1]

    def some(self, start: int, stop: int) -> Iterator[Any]:
        """The values of some lines, read at once."""
        return map(parsed, self._read(start, stop).splitlines())

    def place(self, start: int, stop: int) -> dict[str, int]:
        """The offset and length of some lines, for `read_lines`."""
        return {"offset": self._ends[start], "length": self._ends[stop] - self._ends[start]}

    def digest(self, start: int, stop: int) -> str:
        """32 hex characters that name the content of some lines."""
        digest = hashlib.blake2b(digest_size=16)
        for first in range(start, stop, _AT_ONCE):
            digest.update(self._read(first, min(first + _AT_ONCE, stop)))
        return digest.hexdigest()

    def publish(self, url: str) -> None:
        """Let workers read them, wherever they are."""
        self._file.flush()
        self._file.seek(0)
        with storage.publishing(url, durable=False) as file:
            shutil.copyfileobj(self._file, file, 1 << 20)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()

    def _read(self, start: int, stop: int) -> bytes:
        if stop > self._written:
            self._file.flush()
            self._written = len(self)
        offset = self._ends[start]
        return os.pread(self._file.fileno(), self._ends[stop] - offset, offset)


def read_lines(url: str, offset: int, length: int) -> Iterator[Any]:
    """The values of some published lines."""
    (data,) = storage.read_ranges(url, [(offset, length)])
    return map(parsed, data.splitlines())


_SCAN = json.JSONDecoder().raw_decode


def parsed(line: bytes) -> Any:
    """`json.loads` of a line as we write them: it looks for no encoding and no spaces."""
    return _SCAN(line.decode())[0]


class Positions:
    """Where in a column each name stands first."""

    def __init__(self, names: np.ndarray):
        self._order = np.argsort(names, kind="stable")
        self._sorted = names[self._order]

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        """int64; -1 for names that are not in the column."""
        if not len(self._sorted):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)


def names_of(data: bytes | bytearray) -> np.ndarray:
    """A column of names (dtype S16) from their bytes, one after the other."""
    return np.frombuffer(bytes(data), "S16")


def names_of_keys(keys: Iterable[str]) -> np.ndarray:
    """A column of names from keys, 32 hex characters each."""
    return names_of(bytes.fromhex("".join(keys)))


def row_name(row: str, stamp: str) -> bytes:
    """16 bytes for a row as it stands: its id and stamp."""
    text = f"{row}\0{stamp}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
