"""What workers do for an ingest, a unit at a time: read pictures, write shards, add captions.

A unit is a name and a place in a file of lines. What it makes is staged or published under names
that its content decides, and its result comes last: units may be done twice, and a killed run goes
on with those that have no result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from . import storage
from .download import Downloader, DownloadRules, is_remote
from .manifest import blocked
from .outcomes import Rejected
from .rows import read_lines
from .sources import Damaged, OverLong, fetch_image, release, release_changed

Record = dict[str, Any]
_PORTION = 4 << 20  # bytes of pictures that a writer holds: what was read is near when it is hashed
_PORTION_FAR = 32 << 20  # where asking for a file takes longer than reading it
HASHES = ("sha256", "md5", "sha256_upstream")
"""What a row may know of its picture's file; the last is of what that was made of. It stays in the
sample's JSON: a file that is changed where it lies decodes all the same."""


def reader(
    dataset: str, reading: dict[str, Any], download: DownloadRules, lines: str
) -> Callable[[Record], Record]:
    """Pass 1 over one unit: pictures into staging/{unit}.bin, what each is into a line of
    {unit}.jsonl. The unit's lines are [image, stamp, problem, hashes] of its rows.
    """
    from . import dedup, images

    gone = blocked(dataset)
    known = {key: it["look"] for key, it in gone.items() if it.get("look")}
    if reading["removed_lookalikes"] == "keep":
        known = {}
    gone_keys, gone_looks = [*known], dedup.parsed(bytes.fromhex("".join(known.values())))
    max_side = reading["max_side"]
    policy = images.DecodePolicy(
        background=tuple(reading["background"]),
        max_pixels=reading["max_pixels"],
        max_bytes=reading["max_bytes"],
        animated=reading["animated"],
        # from 1 to 2 times the side, 39.5 to 42.9 dB (JPEG's own loss in it) from Lanczos alone
        draft_side=max_side,
    )

    def fetched(image: str) -> bytes:
        try:
            return fetch_image(image, policy.max_bytes)
        except OverLong as error:
            raise Rejected("too_many_bytes", str(error)) from None
        except PermissionError as error:
            # Of a store it speaks of our credentials, which may have expired, not of a picture.
            if not storage.is_local(image):
                raise
            raise Rejected("unreadable", str(error)) from None
        except (FileNotFoundError, IsADirectoryError, Damaged) as error:
            raise Rejected("unreadable", str(error)) from None

    def read(
        row: tuple[str, str, str | None, dict[str, str]],
        answers: Iterator[bytes | Rejected],
        stage: Callable[[bytes], int],
        found: dict[str, Any],
    ) -> bytes:
        """Its thumbnail, by which the whole unit's looks are told at once."""
        url, _, problem, known = row
        if problem:
            raise Rejected(problem, url)
        data = next(answers) if is_remote(url) else fetched(url)
        if isinstance(data, Rejected):
            raise data
        found["key"] = dedup.key(data)
        if found["key"] in gone:
            raise Rejected("removed", "taken down, and may not come back")
        for name in ("sha256", "md5"):
            digest = hashlib.new(name, data, usedforsecurity=False) if name in known else None
            if digest and digest.hexdigest() != known[name]:
                raise Rejected("hash_mismatch", f"wanted {name} {known[name]}")
        if known:
            found["hashes"] = known
        image, info = images.decode(data, policy)
        width, height = info["width"], info["height"]
        image, stored, ext = images.store(image, data, info, max_side)
        found |= {
            "offset": stage(stored),
            "length": len(stored),
            "crc": zlib.crc32(stored),
            "ext": ext,
            "width": image.width,
            "height": image.height,
            "format": info["format"],
            "flags": info["flags"],
            "scores": {
                "original_width": width,
                "original_height": height,
                "aspect": round(max(width, height) / min(width, height), 4),
            },
        }
        return dedup.thumbnail(image)

    def work(unit: dict[str, Any]) -> dict[str, Any]:
        rows = list(read_lines(lines, unit["offset"], unit["length"]))
        results: list[dict[str, Any]] = []
        remote = [image for image, _, problem, _ in rows if not problem and is_remote(image)]
        release_changed()  # what the unit before has read
        with (
            Downloader(download, policy.max_bytes) as downloader,
            contextlib.closing(downloader.all(remote)) as answers,
            # Not durable, as it lives no longer than the run: `writer` sees what power cuts took.
            storage.publishing(
                storage.join(dataset, "staging", f"{unit['unit']}.bin"), durable=False
            ) as file,
        ):
            end = 0

            def stage(data: bytes) -> int:
                nonlocal end
                offset, end = end, end + file.write(data)
                return offset

            seen: list[tuple[dict[str, Any], bytes]] = []
            for row in rows:
                results.append(found := {})
                try:
                    seen.append((found, read(row, answers, stage, found)))
                except Rejected as rejected:
                    found |= {"reason": rejected.reason, "detail": rejected.detail}
            looks = dedup.looks([thumbnail for _, thumbnail in seen])
            like = dedup.find(dedup.parsed(bytes.fromhex("".join(looks))), gone_looks).tolist()
            for (found, _), look, at in zip(seen, looks, like, strict=True):
                found["scores"]["look"] = look
                if at >= 0:
                    key = found["key"]
                    found.clear()
                    detail = f"looks the same as {gone_keys[at]}, which was taken down"
                    found |= {"key": key, "reason": "removed_lookalike", "detail": detail}
        text = "".join(json.dumps(found) + "\n" for found in results)
        url = result_url(dataset, unit["unit"], "jsonl")
        storage.publish_bytes(url, text.encode(), durable=False)
        return {}

    return work


def writer(dataset: str, lines: str) -> Callable[[Record], Record]:
    """Pass 2 over one unit: a shard from staged pictures. The unit's lines tell of its samples."""
    from . import shards

    release()  # all is read; Ray's warm processes do pass 2 after pass 1

    def pictures(samples: list[Record]) -> dict[str, bytes]:
        wanted: dict[str, list[Record]] = {}
        for it in samples:
            wanted.setdefault(it["staged"], []).append(it)
        found: dict[str, bytes] = {}
        for staged, some in wanted.items():
            url = storage.join(dataset, "staging", f"{staged}.bin")
            ranges = [(it["offset"], it["length"]) for it in some]
            for it, data in zip(some, storage.read_ranges(url, ranges), strict=True):
                if zlib.crc32(data) != it["crc"]:
                    raise ValueError(
                        f"{url}, byte {it['offset']}: not the picture that was staged; delete the "
                        f"folder {storage.join(dataset, 'staging')} and run again"
                    )
                found[it["key"]] = data
        return found

    def stored(samples: Iterator[Record]) -> Iterator[shards.ShardSample]:
        for some in _portions(samples, _PORTION if storage.is_local(dataset) else _PORTION_FAR):
            data = pictures(some)
            for it in some:
                captions = tuple(it["captions"])
                yield shards.ShardSample(
                    it["key"], data[it["key"]], it["ext"], captions, it["meta"]
                )

    def work(unit: Record) -> Record:
        samples = map(_sample, read_lines(lines, unit["offset"], unit["length"]))
        shard = shards.write_shard(stored(samples), dataset, unit["split"])
        return _commit(dataset, unit["unit"], {"shard": asdict(shard)})

    return work


def told(staged: str, captions: Sequence[str] | None, said: bytes, found: bytes) -> bytes:
    """A line for `writer`: the unit that staged the picture, its captions if not all that are said,
    what is said of its row and what a reader made of it. These two as they were written: workers
    wait for the lines of all samples, and parse them side by side.
    """
    own = json.dumps([staged, captions]).encode()
    return b"[%b, %b, %b]" % (own[1:-1], said, found)


def _sample(line: list[Any]) -> Record:
    """Where a sample is staged, and all that a shard holds of it."""
    staged, captions, (row, _, _, texts, label, flags, _), found = line
    captions = captions or texts
    meta = {
        "source": row,
        "width": found["width"],
        "height": found["height"],
        "format": found["format"],
        "flags": sorted({*flags, *found["flags"]}),
        "scores": {**found["scores"], "caption_characters": len(captions[0])},
        **found.get("hashes", {}),
    }
    if label is not None:
        meta["label"] = label
    return {**found, "staged": staged, "captions": captions, "meta": meta}


def _portions(samples: Iterator[Record], most: int) -> Iterator[list[Record]]:
    """As many at once as there is room for: a shard of photographs need not fit in memory, and each
    portion opens nearly all staged files, for names are in no order of theirs."""
    some, size = list[Record](), 0
    for it in samples:
        some.append(it)
        size += it["length"]
        if size >= most:
            yield some
            some, size = [], 0
    if some:
        yield some


def captioner(dataset: str) -> Callable[[Record], Record]:
    """One unit: a shard written anew with more captions."""
    from . import shards
    from .carry import carry

    def work(unit: Record) -> Record:
        more, old = unit["captions"], unit["shard"]
        keys = shards.read_table(dataset, old, ["key"])["key"].to_pylist()
        samples = (
            replace(it, captions=(*it.captions, *more.get(it.key, ())))
            for it in shards.read_shard(storage.join(dataset, "shards", f"{old}.tar"))
        )
        shard = shards.write_shard(samples, dataset, unit["split"])
        carry(dataset, shard, {key: (old, row) for row, key in enumerate(keys)})
        return _commit(dataset, unit["unit"], {"shard": asdict(shard)})

    return work


def _commit(dataset: str, unit: str, result: Record) -> Record:
    storage.publish_bytes(result_url(dataset, unit, "json"), json.dumps(result).encode())
    return result


def result_url(dataset: str, unit: str, kind: str) -> str:
    """Where the result of a unit is: "jsonl" of those that read, "json" of those that write."""
    return storage.join(dataset, "staging", f"{unit}.{kind}")
