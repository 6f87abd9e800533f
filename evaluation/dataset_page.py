"""One page that shows a version of a data set: its pictures, what became of every input row, what
was left out and why, and how it came to be.

Counts are of all rows. What takes longer is done for some: distributions for up to MEASURED stored
pictures, of whole shards spread evenly; thumbnails for a few that lie at the front of their shards,
which are in the order of their keys and so of nothing.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
from numpy import ndarray

from pipeline import dedup, filters, images, manifest, outcomes, reasons, score, shards, storage
from pipeline.manifest import Manifest
from pipeline.schema import Encoding

from .page import LINEAR, RATIO, Histogram, Scale, data_uri, histogram, leaves, number, page

TEMPLATE = "dataset_page.html.jinja"
MEASURED = 200_000
KEPT, LEFT_OUT, PAIRS = 35, 7, 6
"""Pictures shown: of the version, of each reason to leave pictures out, of look-alikes."""
SHARDS = 12
"""From which the version's pictures are taken, at most."""
REASONS, EXAMPLES, VERSIONS, SOURCES = 8, 3, 12, 30
"""How much is shown of each list."""
READ_BY_LANGID = 2000
SIDE, BYTES = 160, 8000
"""Of a thumbnail, in pixels and at most."""
PIXELATED = 48
"""Pictures up to this side are shown pixel by pixel."""

_MEANING = {
    "too_small": "the shorter side is below min_side",
    "aspect": "more than max_aspect times as long as wide",
    "caption_short": "fewer characters than min_caption",
    "caption_long": "more characters than max_caption",
    "language": "the caption is in none of the languages asked for",
    "near_duplicate": "looks the same as an earlier picture",
    "other_split": "looks the same as a picture of another split that stays",
    "known": "the file of a picture that an earlier version had",
    "same_picture": "the file of an earlier row, with the same caption",
    "caption_added": "the file of an earlier row; the picture has this caption too",
    "caption_of_other_split": "the file of an earlier row; the caption belongs to another split",
    "removed": "taken down; it may not come back",
    "removed_lookalike": "looks the same as a picture that was taken down",
}
_SIZES = ("width", "height", "original_width", "original_height")
_SPLITS = ("train", "heldout", "unseen")


def write(path: str | os.PathLike[str], version: Manifest) -> None:
    """Publish the page at a path or URL, whole or not at all."""
    storage.publish_bytes(str(path), render(version).encode())


def render(version: Manifest) -> str:
    """The page as HTML. ValueError when nothing is left of the version but its digest."""
    if version.redacted.get("expired"):
        raise ValueError(
            f"{version.dataset}: version {version.version} has expired, its pictures and rows are "
            f"gone; show a later one (the newest is {manifest.versions(version.dataset)[-1]})"
        )
    return page(TEMPLATE, **_Page(version).context())


@dataclass(frozen=True)
class _Rows:
    """Stored pictures, one a row, in the order of their shards."""

    shards: Sequence[manifest.Shard]
    shard: ndarray
    """Which of the shards, int [n]."""
    place: ndarray
    """Which row of it, int [n]."""
    texts: Mapping[str, list[Any]]
    """key, captions (a list each), look."""
    numbers: Mapping[str, ndarray]
    """width, height, original_width, original_height and the scores of models, [n] each."""
    reasons: ndarray
    """Why the version leaves it out, "" where it does not, str [n]."""

    @classmethod
    def of(cls, version: Manifest, most: int) -> _Rows:
        """All that are stored; of more than `most`, those of some shards."""
        chosen = list(version.shards)
        while len(chosen) > 1 and (stored := sum(it.samples for it in chosen)) > most:
            chosen = _spread(chosen, min(len(chosen) - 1, -(-len(chosen) * most // stored)))
        texts: dict[str, list[Any]] = {"key": [], "captions": [], "look": []}
        numbers: dict[str, list[ndarray]] = {name: [np.empty(0, np.int64)] for name in _SIZES}
        reasons: list[str] = []
        for shard in chosen:
            table = shards.read_table(version.dataset, shard.name, [*texts, *_SIZES])
            for name, column in texts.items():
                column += table[name].to_pylist()
            for name, parts in numbers.items():
                parts.append(table[name].to_numpy())
            dropped = version.dropped(shard)
            reasons += [dropped.get(row, "") for row in range(shard.samples)]
        counts = [shard.samples for shard in chosen]
        return cls(
            chosen,
            np.repeat(np.arange(len(chosen)), counts),
            np.concatenate([*map(np.arange, counts), np.empty(0, np.int64)]),
            texts,
            {name: np.concatenate(parts) for name, parts in numbers.items()}
            | _scores(version, chosen),
            np.array(reasons, dtype=np.str_),
        )

    def __len__(self) -> int:
        return len(self.reasons)

    @cached_property
    def kept(self) -> ndarray:
        return self.reasons == ""

    def split(self, row: int) -> str:
        return self.shards[self.shard[row]].split

    def front(self, wanted: ndarray, count: int, *, apart: bool = True) -> list[int]:
        """Up to `count` of the wanted rows, those at the front of their shards, of some shards in
        turn: of up to SHARDS that lie `apart`, or of as few as hold so many.
        """
        found, each = np.unique(self.shard[wanted], return_counts=True)
        if not apart:
            order = np.argsort(-each, kind="stable")
            enough = int(np.searchsorted(np.cumsum(each[order]), count)) + 1
            found = np.sort(found[order][:enough])
        rows = np.flatnonzero(wanted & np.isin(self.shard, _spread(found.tolist(), SHARDS)))
        _, first, inverse = np.unique(self.shard[rows], return_index=True, return_inverse=True)
        turn = np.arange(len(rows)) - first[inverse]
        return rows[np.lexsort((rows, turn))][:count].tolist()


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of the items, at even distances."""
    if len(items) <= count:
        return list(items)
    return [items[k * len(items) // count] for k in range(count)]


def _scores(version: Manifest, chosen: Sequence[manifest.Shard]) -> dict[str, ndarray]:
    """What scorers say of the rows of these shards, NaN where nothing: first those of the version,
    then others whose work is there.
    """
    found: dict[str, ndarray] = {}
    folder = storage.join(version.dataset, "scores")
    own = version.rules.get("scorers", {}).values()
    for fingerprint in dict.fromkeys([*own, *storage.list_names(folder)]):
        done = set(storage.list_names(storage.join(folder, fingerprint)))
        parts = [
            score.read_scores(version.dataset, it.name, [fingerprint])
            if f"{it.name}.parquet" in done
            else {}
            for it in chosen
        ]
        for name in dict.fromkeys(name for part in parts for name in part):
            known = f"{name} ({fingerprint[:8]})" if name in found else name
            found[known] = np.concatenate(
                [
                    part.get(name, np.full(it.samples, np.nan))
                    for part, it in zip(parts, chosen, strict=True)
                ]
            )
    return found


class _Seen:
    """What became of all rows, in numbers, and a few rows of each kind: there may be more rows than
    memory. Kinds, sources and flags stand in the order they were met.
    """

    def __init__(self, version: Manifest):
        self.kinds: Counter[tuple[str, str]] = Counter()
        """Rows by (outcome, reason)."""
        self.sources = {url: Counter[str]() for url in version.sources}
        """Of each, rows by outcome."""
        self.flags: Counter[str] = Counter()
        self.examples: dict[tuple[str, str], list[outcomes.Outcome]] = defaultdict(list)
        """The first EXAMPLES of each kind that is not kept."""
        for batch in outcomes.read_batches(version):
            for (outcome, reason), at in _groups(batch, "outcome", "reason"):
                self.kinds[outcome, reason] += len(at)
                if outcome != "kept":
                    some = self.examples[outcome, reason]
                    some += batch.take(at[: EXAMPLES - len(some)]).to_pylist()
            for (source, outcome), at in _groups(batch, "source", "outcome"):
                self.sources.setdefault(source, Counter())[outcome] += len(at)
            self.flags.update(batch["flags"].flatten().to_pylist())

    def __len__(self) -> int:
        return self.kinds.total()

    def count(self, wanted: str) -> int:
        """Rows with an outcome."""
        return sum(n for (outcome, _), n in self.kinds.items() if outcome == wanted)


def _groups(batch: outcomes.Batch, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(values, their rows) of columns, in the order they were met."""
    import pyarrow as pa

    table = pa.table({**{name: batch[name] for name in names}, "at": np.arange(len(batch))})
    # Threads would lose the order.
    groups = table.group_by([*names], use_threads=False).aggregate([("at", "list")])
    values = zip(*(groups[name].to_pylist() for name in names), strict=True)
    return zip(values, (it.values for it in groups["at_list"]), strict=True)


def _met(version: Manifest, keys: Collection[str]) -> dict[str, int]:
    """Key -> which of these keys it was, as the rows were met."""
    import pyarrow as pa
    import pyarrow.compute as pc_

    pc: Any = pc_  # its functions are made as it is imported
    found: dict[str, int] = {}
    wanted = pa.array(list(keys), pa.string())
    for batch in outcomes.read_batches(version, ["key"]):
        for key in batch["key"].filter(pc.is_in(batch["key"], wanted)).to_pylist():
            found.setdefault(key, len(found))
    return found


class _Page:
    """What the template shows, worded and measured out; every text stays plain until the template
    escapes it.
    """

    def __init__(self, version: Manifest):
        self.version = version
        self.seen = _Seen(version)
        self.rows = _Rows.of(version, MEASURED)

    def context(self) -> dict[str, Any]:
        version, rows = self.version, self.rows
        samples = rows.front(rows.kept, KEPT)
        commonest = Counter(rows.reasons[~rows.kept].tolist()).most_common(REASONS)
        left_out = {
            it: rows.front(rows.reasons == it, LEFT_OUT, apart=False) for it, _ in commonest
        }
        pairs = self._pairs()
        for reason, *_ in pairs:
            left_out[reason] = []  # shown beside what they look like
        wanted = [*samples, *(row for some in left_out.values() for row in some)]
        figures = self._figures(wanted + [row for _, *two in pairs for row in two])
        numbers = manifest.versions(version.dataset)
        return {
            "name": version.dataset.rstrip("/").rsplit("/", 1)[-1],
            "url": version.dataset,
            "version": version.version,
            "parent": version.parent,
            "newest": numbers[-1],
            "digest": version.digest,
            "bytes": sum(shard.bytes for shard in version.shards),
            "shards": len(version.shards),
            "published": _published(version),
            "created": datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
            "taken_down": len(version.redacted.get("keys", ())),
            "figures": self._headline(),
            "samples": [figures[row] for row in samples],
            "outcomes": self._outcomes(),
            "seen": len(self.seen),
            "splits": self._splits(),
            "refused": [
                {
                    "encoder": f"{it.encoder} {it.fingerprint[:8]}",
                    "reason": it.reason.replace("_", " "),
                    "count": len(it.keys),
                    "keys": it.keys[:EXAMPLES],
                }
                for it in reasons.refusals(self.version)
            ],
            "flags": self.seen.flags.most_common(),
            "measured": len(rows),
            "stored": sum(shard.samples for shard in version.shards),
            "histograms": self._histograms(),
            "left_out": [
                {
                    "reason": reason.replace("_", " "),
                    "meaning": self._meaning("filtered", reason),
                    "count": count,
                    "figures": [figures[row] for row in left_out[reason]],
                }
                for reason, count in commonest
                if left_out[reason]
            ],
            "pairs": [
                {"reason": reason.replace("_", " "), "one": figures[one], "other": figures[other]}
                for reason, one, other in pairs
            ],
            "buckets": self._buckets(),
            "languages": self._languages(),
            "versions": self._versions(numbers),
            "versions_count": len(numbers),
            "sources": self._sources(),
            "sources_count": len(version.sources),
            "rules": [
                (name, json.dumps(version.rules[name], ensure_ascii=False))
                for name in filters.SELECTING
                if name in version.rules
            ],
            "all_rules": json.dumps(version.rules, indent=2, sort_keys=True, ensure_ascii=False),
        }

    # ---- all rows --------------------------------------------------------------------------------

    def _headline(self) -> list[dict[str, str]]:
        """The numbers at the head of the page."""
        seen, rows, version = self.seen, self.rows, self.version
        each = np.array([len(it) for it in rows.texts["captions"]])[rows.kept]
        told = [
            (f"{version.samples():,}", "pictures", f"of {len(seen):,} rows read"),
            (f"{version.samples('heldout', 'unseen'):,}", "held out", "training never sees them"),
            (f"{each.mean() if each.size else 0:.2f}", "captions a picture", "on average"),
            (f"{seen.count('filtered'):,}", "left out", "by its rules; still stored"),
            (f"{seen.count('rejected'):,}", "rejected", "broken, hostile or out of reach"),
            (f"{seen.count('duplicate'):,}", "duplicates", "of another row's file"),
        ]
        return [{"value": value, "label": label, "note": note} for value, label, note in told]

    def _outcomes(self) -> list[dict[str, Any]]:
        """Each outcome with its reasons; the counts add up to all rows."""
        order = {name: place for place, name in enumerate(outcomes.OUTCOMES)}
        every = [it for some in self.seen.examples.values() for it in some]
        details = iter(reasons.details(self.version, every))
        examples = {
            what: [
                {"id": _cut(it["id"], 300), "short": _short(it), "detail": next(details)}
                for it in some
            ]
            for what, some in self.seen.examples.items()
        }
        return [
            {
                "outcome": outcome,
                "reason": reason.replace("_", " "),
                "meaning": self._meaning(outcome, reason),
                "count": count,
                "share": count / len(self.seen),
                "examples": examples.get((outcome, reason), ()),
            }
            for (outcome, reason), count in sorted(
                self.seen.kinds.items(), key=lambda it: (order[it[0][0]], -it[1], it[0][1])
            )
        ]

    def _meaning(self, outcome: str, reason: str) -> str:
        if outcome == "filtered" and reason in self.version.rules.get("scores", {}):
            return f"the score is not in {_bounds(self.version.rules['scores'][reason])}"
        return _MEANING.get(reason, "")

    def _splits(self) -> list[dict[str, Any]]:
        version = self.version
        every = version.samples() or 1
        return [
            {
                "name": name,
                "samples": version.samples(name),
                "share": version.samples(name) / every,
                "shards": len(mine),
                "bytes": sum(shard.bytes for shard in mine),
            }
            for name in _SPLITS
            if (mine := version.split(name))
        ]

    def _sources(self) -> list[dict[str, Any]]:
        largest = sorted(self.seen.sources.items(), key=lambda it: -it[1].total())[:SOURCES]
        return [
            {
                "url": url,
                "fingerprint": self.version.sources.get(url, ""),
                "seen": some.total(),
                "outcomes": [some[name] for name in outcomes.OUTCOMES],
            }
            for url, some in largest
        ]

    # ---- what is stored --------------------------------------------------------------------------

    def _histograms(self) -> list[dict[str, Any]]:
        rules, numbers = self.version.rules, self.rows.numbers
        width, height = numbers["original_width"], numbers["original_height"]
        shorter = np.minimum(width, height)
        stored = np.minimum(numbers["width"], numbers["height"])
        captions = self.rows.texts["captions"]
        across = float(rules.get("max_aspect") or 0)
        ratios = [(1 / across, f"1:{across:g}"), (across, f"{across:g}:1")] if across else []
        told: list[tuple[str, str, ndarray, Scale | None, list[tuple[float, str]]]] = [
            ("Size in the source", "pixels of the shorter side", shorter, None,
             _threshold("min", rules.get("min_side"))),
            ("Size as stored", "pixels of the shorter side", stored, None,
             _threshold("max", rules.get("max_side"))),
            ("Aspect ratio", "width to height", width / height, RATIO, ratios),
            ("Caption length", "characters of the first caption",
             np.array([len(it[0]) for it in captions]), None,
             _threshold("min", rules.get("min_caption"), 1)
             + _threshold("max", rules.get("max_caption"))),
            ("Captions of a picture", "captions", np.array([len(it) for it in captions]), None, []),
        ]  # fmt: skip
        bounds = rules.get("scores", {})
        for name in [name for name in numbers if name not in _SIZES]:
            least, most = bounds.get(name, (None, None))
            marks = _threshold("least", least, None) + _threshold("most", most, None)
            told.append((name.replace("_", " "), "score", numbers[name], LINEAR, marks))
        if np.array_equal(shorter, stored):
            del told[1]
        return [
            {"chart": it, "told": _quantiles(values, self.rows.kept)}
            for title, axis, values, scale, marks in told
            if (it := self._histogram(title, axis, values, scale, marks))
        ]

    def _histogram(
        self,
        title: str,
        across: str,
        values: ndarray,
        scale: Scale | None,
        marks: Sequence[tuple[float, str]],
    ) -> Histogram | None:
        kept = self.rows.kept
        groups = {"in this version": values[kept], "left out": values[~kept]}
        return histogram(title, across, groups, scale=scale, marks=marks)

    def _buckets(self) -> list[dict[str, Any]]:
        """How the version's pictures fall into the buckets of each encoding that has some; if none
        has, into those that would suit them.
        """
        widths = self.rows.numbers["width"][self.rows.kept]
        heights = self.rows.numbers["height"][self.rows.kept]
        if not widths.size:
            return []
        tables: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
        for fingerprint in storage.list_names(storage.join(self.version.dataset, "encodings")):
            url = Encoding.at(self.version.dataset, "", "image", fingerprint).stated_url()
            if storage.exists(url) and (stated := storage.read_json(url)).get("buckets"):
                told = f"{stated['name']} {fingerprint[:8]}"
                tables[tuple((w, h) for w, h in stated["buckets"])].append(told)
        if not tables:
            short = float(np.median(np.minimum(widths, heights)))
            side = int(np.clip(2 ** np.floor(np.log2(short)), 16, 1024))
            tables[images.buckets(side, multiple=side // 8)] = []
        sizes, members = np.unique(np.stack([widths, heights], 1), axis=0, return_counts=True)
        return [_fitted(table, names, sizes, members) for table, names in tables.items()]

    def _languages(self) -> list[dict[str, Any]]:
        """Of some captions, where the rules speak of languages."""
        if not self.version.rules.get("languages") or not len(self.rows):
            return []
        asked = self.version.rules["languages"]
        some = _spread(range(len(self.rows)), READ_BY_LANGID)
        found = Counter(_language_of(self.rows.texts["captions"][row][0]) for row in some)
        return [
            {"code": code, "asked": code in asked, "count": n, "share": n / len(some)}
            for code, n in found.most_common(12)
        ]

    # ---- pictures --------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[str, int, int]]:
        """(reason, row, the first row that it looks like) of some left out for their looks."""
        rows, look, keys = self.rows, self.rows.texts["look"], self.rows.texts["key"]
        wanted = rows.front(np.isin(rows.reasons, reasons.LOOK_ALIKES), PAIRS, apart=False)
        if not wanted:
            return []
        looks = dedup.parsed(bytes.fromhex("".join(look)))
        alike: dict[int, list[int]] = {}
        kept = np.flatnonzero(rows.kept)
        for one in wanted:
            like = kept[dedup.alike(looks[np.array([one])], looks[kept])].tolist()
            if rows.reasons[one] == "other_split":
                like = [row for row in like if rows.split(row) != rows.split(one)]
            alike[one] = like
        met = _met(self.version, {keys[row] for like in alike.values() for row in like})
        found = {
            one: min(like, key=lambda row: met[keys[row]]) for one, like in alike.items() if like
        }
        return [(rows.reasons[one].item(), one, found[one]) for one in wanted if one in found]

    def _figures(self, wanted: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Row -> what is shown of it, with a thumbnail."""
        rows, found = self.rows, dict[int, dict[str, Any]]()
        by_shard: dict[int, dict[int, int]] = defaultdict(dict)
        for row in wanted:
            by_shard[int(rows.shard[row])][int(rows.place[row])] = row
        for shard, places in by_shard.items():
            url = self.version.url("shards", f"{rows.shards[shard].name}.tar")
            for place, sample in zip(range(max(places) + 1), shards.read_shard(url), strict=False):
                if place in places:
                    row = places[place]
                    found[row] = self._told(row) | _thumbnail(url, sample)
        return found

    def _told(self, row: int) -> dict[str, Any]:
        rows, reason = self.rows, self.rows.reasons[row].item()
        first, *others = rows.texts["captions"][row]
        width, height = (int(rows.numbers[f"original_{it}"][row]) for it in ("width", "height"))
        why = f"{width} × {height}"
        if reason.startswith("caption_"):
            why = f"{len(first):,} characters"
        elif reason in self.version.rules.get("scores", {}) and reason in rows.numbers:
            why = f"{reason.replace('_', ' ')} {number(float(rows.numbers[reason][row]))}"
        return {
            "text": _cut(first, 240),
            "others": len(others),
            "why": why,
            "split": rows.split(row),
            "key": rows.texts["key"][row],
        }

    # ---- versions --------------------------------------------------------------------------------

    def _versions(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The newest ones, and what is different in each from the one before it."""
        shown = numbers[-VERSIONS - 1 :]
        read = {number: manifest.read(self.version.dataset, number) for number in shown}
        return [
            {
                "version": it.version,
                "here": it.version == self.version.version,
                "published": _published(it),
                "digest": it.digest,
                "counts": [it.counts.get(name, 0) for name in ("seen", *outcomes.OUTCOMES)],
                "changes": _changes(before, it),
            }
            for before, it in zip([None, *read.values()], read.values(), strict=False)
        ][::-1][:VERSIONS]


def _changes(before: Manifest | None, now: Manifest) -> list[str]:
    """In words, what a version has that the one before had not."""
    old = before or Manifest(now.dataset, 0, None, (), rules=now.rules)
    said: list[str] = []
    if before and now.parent is None:
        said.append("built anew from its sources")
    if seen := now.counts.get("seen", 0) - old.counts.get("seen", 0):
        said.append(f"{seen:+,} rows read")
    if new := {it.name for it in now.shards} - {it.name for it in old.shards}:
        said.append(f"{_many(len(new), 'new shard')}")
    said += [
        f"{url} was {'read again' if url in old.sources else 'added'}"
        for url, it in now.sources.items()
        if old.sources.get(url) != it
    ]
    rules, others = dict(leaves(now.rules)), dict(leaves(old.rules))
    said += [
        f"{name}: {_json(others.get(name))} → {_json(rules.get(name))}"
        for name in {**others, **rules}
        if others.get(name) != rules.get(name)
    ]
    if now.redacted.get("expired"):
        said.append("has expired: nothing but its digest is left")
    elif now.redacted:
        said.append(f"{_many(len(now.redacted['keys']), 'picture')} taken down later")
    return said


# ---- small parts ---------------------------------------------------------------------------------


def _thumbnail(url: str, sample: shards.ShardSample) -> dict[str, Any]:
    """A data URI of a few kilobytes, and whether it is to be shown pixel by pixel."""
    try:
        picture, _ = images.decode(sample.image, replace(images.STORED, draft_side=SIDE))
    except images.Rejected as error:
        raise ValueError(
            f"{url}, sample {sample.key}: the stored picture cannot be decoded ({error}); delete "
            "the dataset's shard and ingest again"
        ) from None
    picture.thumbnail((SIDE, SIDE), reducing_gap=3.0)
    pixelated = max(picture.size) <= PIXELATED
    data = b""
    for quality in (100,) if pixelated else (80, 60, 40, 20, 5):
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=quality, lossless=pixelated)
        data = out.getvalue()
        if len(data) <= BYTES:
            break
    return {"uri": data_uri(data, "webp"), "pixelated": pixelated}


def _fitted(
    table: tuple[tuple[int, int], ...], names: list[str], sizes: ndarray, members: ndarray
) -> dict[str, Any]:
    """How `members` pictures of each size fall into buckets, and what is cropped away of them."""

    def cropped(width: int, height: int, bucket: tuple[int, int]) -> float:
        ratio = width * bucket[1] / (height * bucket[0])
        return 1 - min(ratio, 1 / ratio)

    counts, lost, square = np.zeros(len(table), np.int64), np.zeros(len(table)), 0.0
    for (width, height), n in zip(sizes.tolist(), members.tolist(), strict=True):
        number = images.nearest(table, width, height)
        counts[number] += n
        lost[number] += n * cropped(width, height, table[number])
        square += n * cropped(width, height, (1, 1))
    every = int(members.sum())
    return {
        "names": names,
        "pictures": every,
        "cropped": float(lost.sum()) / every,
        "square": square / every,
        "rows": [
            {
                "width": width,
                "height": height,
                "ratio": width / height,
                "icon": (14 * (width / height) ** 0.5, 14 * (height / width) ** 0.5),
                "count": int(n),
                "share": n / every,
                "cropped": away / n if n else None,
            }
            for (width, height), n, away in zip(table, counts, lost, strict=True)
        ],
    }


def _language_of(caption: str) -> str:
    """ISO 639-1 code, by what `filters.language` goes by."""
    return filters.language_of(caption)


def _threshold(name: str, value: float | None, none: float | None = 0) -> list[tuple[float, str]]:
    """A mark for a rule's bound, unless it says nothing."""
    return [] if value is None or value == none else [(value, f"{name} {number(value)}")]


def _quantiles(values: ndarray, kept: ndarray) -> str:
    """In words, where the values of the version lie."""
    some = values[kept & np.isfinite(values)]
    unknown = int(np.sum(~np.isfinite(values[kept])))
    said = []
    if some.size:
        least, middle, most = (number(float(x)) for x in np.quantile(some, [0, 0.5, 1]))
        said.append(f"{least} to {most}, median {middle}" if least != most else f"all {least}")
    return "; ".join([*said, *([f"{unknown:,} unknown"] if unknown else [])])


def _bounds(given: Sequence[float | None]) -> str:
    low, high = ("any" if it is None else number(it) for it in given)
    return f"[{low}, {high}]"


def _published(version: Manifest) -> str:
    """When its file was written; "" where the store does not tell."""
    url = version.url("versions", f"{version.version:06d}.json")
    try:
        files, path = storage.filesystem(url)
        return files.modified(path).astimezone(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    except (OSError, NotImplementedError):
        return ""


def _many(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def _short(it: Mapping[str, Any]) -> str:
    """A row's id as people know it: without the source that it stands in."""
    return _cut(it["id"].removeprefix(it["source"]).lstrip("#/") or it["id"], 80)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _json(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
