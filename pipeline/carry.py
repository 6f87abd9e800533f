"""What encoders and scorers made of samples goes with them into other shards; nothing is made
again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import shards, storage, tokens
from .encode import EncodedFile, publish_encoded
from .load import Table, mapped, read_table
from .manifest import Shard
from .schema import BUCKET, CUT, Encoding

Places = Mapping[str, tuple[str, int]]
"""Key -> the shard in which a sample stood, and its row there."""

Arrays = dict[str, np.ndarray]


def carry(dataset: str, shard: Shard, places: Places) -> None:
    """Give a new shard the rows of its samples in all encodings and scores that have them all.

    What is missing (a shard that was not encoded, a caption that is new) is left to `encode`.
    """
    table = read_table(dataset, shard.name)
    before = sorted({places[key][0] for key in table.keys})
    _carry_scores(dataset, shard, table.keys, places)
    for name in storage.list_names(storage.join(dataset, "encodings")):
        directory = storage.join(dataset, "encodings", name)
        done = set(storage.list_names(directory))
        if f"{shard.name}.safetensors" in done or "encoder.json" not in done:
            continue
        if not done.issuperset(f"{it}.safetensors" for it in before):
            continue
        stated = storage.read_json(storage.join(directory, "encoder.json"))
        encoding = Encoding(stated["name"], stated["kind"], stated["fingerprint"], directory)
        carried = _Carried(dataset, encoding, table, places)
        files = carried.texts() if encoding.kind == "text" else carried.pictures(stated)
        if files:
            publish_encoded(encoding, shard.name, table.keys, files, carried.rejected(done))


def _carry_scores(dataset: str, shard: Shard, keys: list[str], places: Places) -> None:
    before = {places[key][0] for key in keys}
    for name in storage.list_names(storage.join(dataset, "scores")):
        folder = storage.join(dataset, "scores", name)
        if not {f"{it}.parquet" for it in before}.issubset(storage.list_names(folder)):
            continue
        tables = {
            it: shards.read_parquet(storage.join(folder, f"{it}.parquet")).to_pydict()
            for it in before
        }
        at = [places[key] for key in keys]
        columns = {
            column: shards.Column(
                "text" if column == "key" else "real", [tables[it][column][row] for it, row in at]
            )
            for column in next(iter(tables.values()))
        }
        url = storage.join(folder, f"{shard.name}.parquet")
        storage.publish_bytes(url, shards.parquet_bytes(columns))


class _Carried:
    """One encoding of a new shard."""

    def __init__(self, dataset: str, encoding: Encoding, table: Table, places: Places):
        self.dataset, self.encoding, self.table = dataset, encoding, table
        self.of = [places[key][0] for key in table.keys]
        self.row = np.array([places[key][1] for key in table.keys])

    def pictures(self, stated: Mapping[str, Any]) -> list[EncodedFile]:
        everything = np.arange(len(self.row))
        index = self._gathered(self._arrays(None), everything, self.row)
        if not stated.get("buckets"):
            return [EncodedFile(None, everything, index, {})]
        files: list[EncodedFile] = []
        numbers = index[BUCKET]
        for number, (width, height) in enumerate(stated["buckets"]):
            bucket = (int(width), int(height))
            if not (members := np.flatnonzero(numbers == number)).size:
                continue
            # In a bucket's file stand the rows of that bucket alone, in the order of the shard.
            ranks = {
                shard: np.cumsum(arrays[BUCKET] == number) - 1
                for shard, arrays in self._arrays(None).items()
            }
            local = np.array([ranks[self.of[it]][self.row[it]] for it in members])
            present = {self.of[it] for it in members}
            arrays = self._arrays(bucket, present)
            files.append(EncodedFile(bucket, members, self._gathered(arrays, members, local), {}))
        return [*files, EncodedFile(None, everything, {BUCKET: numbers}, {})]

    def texts(self) -> list[EncodedFile]:
        """[] where a caption was never encoded."""
        known: dict[str, tuple[Arrays, int]] = {}
        for shard, arrays in self._arrays(None).items():
            captions = read_table(self.dataset, shard).captions
            for text, number in zip(captions, arrays["caption_rows"].tolist(), strict=True):
                known.setdefault(text, (arrays, number))
        numbers: dict[str, int] = {}
        rows = [numbers.setdefault(text, len(numbers)) for text in self.table.captions]
        if not known.keys() >= numbers.keys():
            return []
        found = [known[text] for text in numbers]
        spans = [arrays["offsets"][number : number + 2].tolist() for arrays, number in found]
        offsets = np.cumsum([0, *(last - first for first, last in spans)])
        whole = tokens.empty(found[0][0], int(offsets[-1]))
        places = itertools.pairwise(offsets.tolist())
        for (arrays, _), (first, last), place in zip(found, spans, places, strict=True):
            tokens.copy(arrays, first, last, whole[slice(*place)])
        pooled = np.stack([arrays["pooled"][number] for arrays, number in found])
        joins = {
            "offsets": offsets,
            "caption_rows": np.array(rows),
            "sample_offsets": self.table.offsets,
        }
        if all(CUT in arrays for arrays, _ in found):
            joins[CUT] = np.array([arrays[CUT][number] for arrays, number in found])
        fields = {tokens.TOKENS: whole, "pooled": pooled}
        repeats = max(tokens.repeated(arrays) for arrays, _ in found)
        return [EncodedFile(None, np.arange(len(self.row)), fields, joins, repeats)]

    def rejected(self, done: set[str]) -> list[int]:
        """The rows that the encoder could not use."""
        bad = {
            (shard, row)
            for shard in set(self.of)
            if f"{shard}.rejected.json" in done
            for row in storage.read_json(storage.join(self.encoding.url, f"{shard}.rejected.json"))[
                "rows"
            ]
        }
        at = zip(self.of, self.row.tolist(), strict=True)
        return [row for row, place in enumerate(at) if place in bad]

    def _arrays(
        self, bucket: tuple[int, int] | None, of: set[str] | None = None
    ) -> dict[str, Arrays]:
        """Shard -> its arrays, mapped."""
        return {
            shard: mapped(storage.local_copy(self.encoding.arrays_url(shard, bucket)))[0]
            for shard in sorted(of or set(self.of))
        }

    def _gathered(
        self, arrays: Mapping[str, Arrays], members: np.ndarray, local: np.ndarray
    ) -> Arrays:
        """Each field's rows for these rows of the new shard, from the rows `local` of their old
        ones; a mirrored view follows its picture.
        """
        first = arrays[self.of[members[0]]]
        views = {name: len(rows) // len(first["keys"]) for name, rows in first.items()}
        return {
            name: np.concatenate(
                [
                    arrays[self.of[it]][name][views[name] * row : views[name] * (row + 1)]
                    for it, row in zip(members, local.tolist(), strict=True)
                ]
            )
            for name in first
            if name != "keys"
        }
