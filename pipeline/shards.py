"""A shard is a plain WebDataset tar whose bytes depend on its samples alone.

Members of a sample stand together, sorted: `{key}.jpg|png|webp`, `{key}.json`, `{key}.txt`; owner,
mode and time are fixed. The tar is written under a hidden name, hashed, and published under that
hash, beside a parquet table with one row per sample in the same order. Tars are written and read
here by their 512-byte ustar headers: the tarfile module costs more per member than decoding a small
picture. Foreign tars go through `sources`, which trusts nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from . import storage
from .manifest import Shard

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
_BLOCK = 512
_OWNER = b"0000644\x000000000\x000000000\0"  # and mode
_TIME = b"\x0000000000000\0"
_REST = (b"0" + bytes(100) + b"ustar\x0000").ljust(_BLOCK - 156, b"\0")  # behind the checksum
_SAME_SUM = sum(_OWNER + _TIME + _REST) + 8 * 32  # the checksum itself counts as eight spaces
_text_of = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


@dataclass(frozen=True)
class ShardSample:
    """One stored picture with all its captions."""

    key: str
    image: bytes
    ext: str
    captions: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """width, height (as stored), source (row id), original (width, height, format), flags, scores,
    label; JSON.
    """


def write_shard(samples: Iterable[ShardSample], dataset: str, split: str) -> Shard:
    """Publish `shards/{split}-{hash}.tar` and `tables/{split}-{hash}.parquet` of a data set.

    Samples are taken in the order given. The same samples give the same bytes, so writing again
    changes nothing. ValueError: no samples, an extension or key no WebDataset reader would
    understand, a key twice.
    """
    digest, size = hashlib.sha256(), 0
    rows: list[tuple[str, list[str], Mapping[str, Any]]] = []
    keys: set[str] = set()
    with storage.draft(storage.join(dataset, "shards")) as (file, publish):
        for sample in samples:
            if sample.key in keys or not sample.key or not set(sample.key).isdisjoint("./\\\0\n"):
                raise ValueError(
                    f"sample key {sample.key!r}: wanted a unique one without dots and slashes"
                )
            if sample.ext not in IMAGE_EXTENSIONS or not sample.captions:
                raise ValueError(
                    f"sample {sample.key}: got extension {sample.ext!r} and "
                    f"{len(sample.captions)} captions; wanted one of "
                    f"{', '.join(IMAGE_EXTENSIONS)} and at least one caption"
                )
            keys.add(sample.key)
            data = b"".join(_members(sample))
            digest.update(data)
            size += file.write(data)
            rows.append((sample.key, list(sample.captions), sample.meta))
        if not rows:
            raise ValueError(f"{dataset}: a shard of split {split!r} needs at least one sample")
        data = bytes(2 * _BLOCK)  # two empty blocks end a tar
        digest.update(data)
        size += file.write(data)
        name = f"{split}-{digest.hexdigest()[:16]}"
        storage.publish_bytes(storage.join(dataset, "tables", f"{name}.parquet"), _table(rows))
        publish(storage.join(dataset, "shards", f"{name}.tar"))
    return Shard(name=name, split=split, samples=len(rows), bytes=size, sha256=digest.hexdigest())


def read_shard(url: str) -> Iterator[ShardSample]:
    """The samples of one of our shards, in order. ValueError where the tar is not as `write_shard`
    leaves it.

    A remote shard is not kept on this machine: whoever reads pictures reads all of them, once.
    """
    with (
        storage.reading(url) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar,
    ):
        members = _read_members(tar, url)
        for name, image in members:
            key, _, ext = name.partition(".")
            try:
                (json_name, meta_bytes), (text_name, _) = next(members), next(members)
                meta = json.loads(meta_bytes)
                captions = tuple(caption["text"] for caption in meta.pop("captions"))
            except (StopIteration, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{url}, sample {key}: not a shard of ours ({error!r})") from None
            if ext not in IMAGE_EXTENSIONS or (json_name, text_name) != (
                f"{key}.json",
                f"{key}.txt",
            ):
                raise ValueError(
                    f"{url}, sample {key}: found {name}, {json_name}, {text_name}; "
                    "wanted a picture, .json, .txt"
                )
            yield ShardSample(key, image, ext, captions, meta)


def read_table(dataset: str, shard: str, columns: list[str] | None = None) -> Any:
    """The pyarrow table beside a shard (key, captions, label, width, height, source, scores)."""
    return read_parquet(storage.join(dataset, "tables", f"{shard}.parquet"), columns)


class Column(NamedTuple):
    """A column of a parquet file, with a type that does not depend on its values."""

    kind: Literal["text", "texts", "whole", "real", "inferred"]
    values: list[Any]


def read_parquet(url: str, columns: list[str] | None = None) -> Any:
    """The pyarrow table in a file whose name never changes its content."""
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    parquet: Any = pq
    return parquet.read_table(storage.local_copy(url), columns=columns, partitioning=None)


def parquet_bytes(columns: Mapping[str, Column]) -> bytes:
    """A parquet file; the same columns give the same bytes."""
    import pyarrow as pa_  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pa_
    parquet: Any = pq
    kinds: dict[str, Any] = {
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "whole": pa.int32(),
        "real": pa.float32(),
        "inferred": None,
    }
    out = io.BytesIO()
    arrays = {name: pa.array(it.values, kinds[it.kind]) for name, it in columns.items()}
    parquet.write_table(pa.table(arrays), out)
    return out.getvalue()


def open_webdataset(url: str) -> Any:
    """A plain `webdataset.WebDataset` over a shard, decoding nothing (its decoders run pickles)."""
    import webdataset

    library: Any = webdataset
    return library.WebDataset(str(storage.local_copy(url)), shardshuffle=False)


def caption_hash(caption: str) -> str:
    """16 hex characters that name a caption's text."""
    return hashlib.blake2b(caption.encode(), digest_size=8).hexdigest()


def _members(sample: ShardSample) -> Iterator[bytes]:
    captions = [{"text": caption, "hash": caption_hash(caption)} for caption in sample.captions]
    text = _text_of({**sample.meta, "captions": captions})
    for ext, data in (
        (sample.ext, sample.image),
        ("json", text.encode()),
        ("txt", sample.captions[0].encode()),
    ):
        yield _header(f"{sample.key}.{ext}", len(data))
        yield data
        yield bytes(-len(data) % _BLOCK)


def _header(name: str, size: int) -> bytes:
    """A ustar header: regular file, mode 0644, owner 0, time 0."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 1 << 33:
        raise ValueError(
            f"tar member {name!r} of {size} bytes: names go up to 100 bytes, sizes below 8 GiB"
        )
    length = b"%011o" % size
    checksum = b"%06o\0 " % (_SAME_SUM + sum(encoded) + sum(length))
    return b"".join((encoded.ljust(100, b"\0"), _OWNER, length, _TIME, checksum, _REST))


def _read_members(tar: mmap.mmap, url: str) -> Iterator[tuple[str, bytes]]:
    position, end = 0, len(tar)
    while position + _BLOCK <= end:
        header = tar[position : position + _BLOCK]
        if not any(header):
            return
        try:
            if header[257:262] != b"ustar" or header[156:157] != b"0":
                raise ValueError("no ustar header of a plain file")
            name = header[:100].rstrip(b"\0").decode()
            size = int(header[124:135], 8)
        except ValueError as error:
            raise ValueError(f"{url}, byte {position}: {error}") from None
        data = tar[position + _BLOCK : position + _BLOCK + size]
        if len(data) < size:
            break
        yield name, data
        position += _BLOCK + size + -size % _BLOCK
    raise ValueError(
        f"{url}: cut off at byte {position} of {end}; delete it and build the version again"
    )


def _table(rows: list[tuple[str, list[str], Mapping[str, Any]]]) -> bytes:
    metas = [meta for _, _, meta in rows]
    columns = {
        "key": Column("text", [key for key, _, _ in rows]),
        "captions": Column("texts", [captions for _, captions, _ in rows]),
        "label": Column("text", [_label(meta.get("label")) for meta in metas]),
        "width": Column("whole", [meta.get("width") for meta in metas]),
        "height": Column("whole", [meta.get("height") for meta in metas]),
        "source": Column("text", [meta.get("source") for meta in metas]),
    }
    for name in sorted({name for meta in metas for name in meta.get("scores", ())}):
        values = [meta.get("scores", {}).get(name) for meta in metas]
        columns[name] = Column("inferred", values)
    return parquet_bytes(columns)


def _label(label: Any) -> str | None:
    return None if label is None else json.dumps(label, sort_keys=True, ensure_ascii=False)
