"""A source lists rows cheaply and lets a picture be fetched later by its reference alone.

Listing opens no picture. A row that cannot be used is listed too, with its `problem`, so that sums
add up; a source whose shape is wrong (columns, broken tar order) is a ValueError that names the
place. Foreign tars are read with plain tarfile headers: no member name becomes a path, no link is
followed, nothing is unpickled, no shell is started.

    folder/captions.jsonl               a picture's path and caption per line (`file`, `caption`)
    folder/metadata.csv|.jsonl          imagefolder (`file_name`, `text`); folder/train/... too
    folder/a.jpg + folder/a.txt         sidecar captions
    folder/*.tar, x.tar                 WebDataset and img2dataset shards
    x.csv|.tsv|.jsonl|.parquet          tables of paths or http(s) URLs with captions
    x.parquet                           with a column of pictures' bytes (Hugging Face's too)
    folder/**/*.parquet                 or another kind of table, one kind alone
    shapes://?scenes=24000&seed=0&side=32&objects=1     drawn scenes

Where a parquet has pictures' bytes in a column of a known name (`image`, `jpg`, `png`, ...), they
are taken rather than the path or URL beside them, unless `file_field` names that: img2dataset's
`jpg` is what it found at `url`. Names of folders (classes, splits) are neither captions nor splits.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeGuard
from urllib.parse import parse_qsl, quote, unquote

from . import storage
from .download import is_remote
from .filters import clean_caption
from .manifest import fingerprint
from .storage import Damaged

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
TABLES = ("csv", "tsv", "jsonl", "parquet")
FILE_FIELDS = ("file", "file_name", "path", "image", "url")
CAPTION_FIELDS = ("caption", "text", "captions")
_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))$", re.I)
_PACKED = re.compile(rf"{_TAR.pattern}|\.zip$|\.({'|'.join(TABLES)})\.(gz|bz2|xz|zst)$", re.I)
_FOLDER_TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
_HASHES = ("sha256", "md5")
"""Columns and JSON fields with what a picture's file is expected to hash to, in hex."""
_HASH_LIKE = re.compile(
    r"(image_|file_)?((sha|md|blake|ripemd)[-_]?\d\w*|crc\w*|xxh\w*|hash|checksum|digest)(_?sum)?",
    re.I,
)
_MAX_FIELD_BYTES = 64 << 20
_MAX_JSON_BYTES = 16 << 20
_BUFFER = 1 << 20
_BUFFER_FAR = 8 << 20  # where asking takes longer than reading
_DRAWING = 1
"""Raised by hand when `shapes` draws or words the same scene differently."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How rows become captions."""

    kind: Literal["source"] = "source"
    file_field: str = ""
    """Column of the picture's path or bytes; empty: a parquet's column of bytes, else the first of
    file, file_name, path, image, url."""
    caption_field: str = ""
    """Column of the caption or captions; empty: the first of caption, text, captions."""
    root: str = ""
    """Folder that a table's paths start from and must stay in; empty: the folder of the table."""
    style_field: str = "style"
    """Where a row has this field, its caption names the style, and (caption, style) is the pair
    that is held out.
    """
    caption_template: str = "{caption}, {style} style"
    max_caption_characters: int = 2000

    def __post_init__(self):
        try:
            self.caption_template.format(caption="", style="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                "caption_template may use {caption} and {style}, "
                f"got {self.caption_template!r} ({error!r})"
            ) from None
        if self.max_caption_characters < 1:
            raise ValueError(
                f"max_caption_characters must be at least 1, got {self.max_caption_characters}"
            )


@dataclass(frozen=True)
class Row:
    """One input row: a picture that can be fetched, with its captions."""

    id: str
    """Unique, and the same when the source is listed again."""
    stamp: str
    """Changes with the content: of the picture (size and time) or of what is said about it."""
    captions: tuple[str, ...]
    image: str
    """What `fetch` takes: a URL, `tar:offset:size:URL`, `parquet:group:row:column:URL`, or
    `shapes:seed:objects:side:index`.
    """
    pair: str
    """The combination whose hash decides the held-out split."""
    name: str | None = None
    """The name whose hash decides the unseen split."""
    label: dict[str, Any] | None = None
    problem: str | None = None
    """Why this row is rejected without a look at its picture."""
    flags: tuple[str, ...] = ()
    sha256: str | None = None
    md5: str | None = None
    """What the picture's file is expected to hash to."""
    sha256_upstream: str | None = None
    """That of a file that this one was made of: noted, not checked."""
    others: tuple[tuple[str, str | None], ...] = ()
    """(pair, name) of each caption after the first, which has those above."""


class Source(Protocol):
    """Something that can be listed."""

    @property
    def url(self) -> str: ...

    def fingerprint(self) -> str:
        """Changes when the rows may have; from a listing of names, sizes and times alone."""
        ...

    def rows(self) -> Iterator[Row]:
        """All rows, in an order that depends on their names alone."""
        ...


def open_source(url: str, *, options: SourceOptions | None = None) -> Source:
    """The source at a URL, by what lies there. ValueError: nothing we can read, and what it is."""
    options = options or SourceOptions()
    if url.startswith("shapes:"):
        return _Shapes(url)
    if url.startswith("pipe:") or "::" in url:
        raise ValueError(
            f"{url}: commands and chained URLs are refused; give a folder, a table or a .tar"
        )
    given, url = url, storage.absolute(url)
    extension = _extension(url)
    if is_remote(url) and not _PACKED.search(url):
        _check_web(given, url, extension)
    stamp = storage.stamp(url)
    if stamp is not None:
        if _PACKED.search(url):
            raise ValueError(f"{url}: compressed; decompress it first: pictures are read in place")
        if extension in TABLES:
            root = storage.absolute(options.root or storage.parent(url))
            return _Tables(url, options, {"": stamp}, (_Table("", root),))
        if extension == "tar":
            return _Tars(url, options, {"": stamp})
        raise ValueError(f"{url}: wanted a folder, a .tar or a table ({', '.join(TABLES)})")
    if not storage.exists(url):
        raise ValueError(f"{url}: no such file or folder")
    return _open_folder(url, options, storage.list_stamps(url, linked=True))


def _check_web(given: str, url: str, extension: str) -> None:
    """ValueError where a URL is none of a table or a tar: the web lists no folders."""
    if given.endswith("/") or extension not in (*TABLES, "tar"):
        raise ValueError(
            f"{given}: neither a table ({', '.join(TABLES)}) nor a .tar, and a folder on the web "
            f"cannot be listed; name {url}/captions.jsonl instead"
        )
    if storage.is_html(url):
        raise ValueError(
            f"{given}: the answer is a page of HTML, no .{extension}; see where the address leads "
            "(a login?). A folder on the web cannot be listed: name FOLDER/captions.jsonl instead"
        )


def _open_folder(url: str, options: SourceOptions, listing: Mapping[str, str]) -> Source:
    for name in _FOLDER_TABLES:
        if name in listing:
            return _Tables(url, options, listing, (_Table(name, url),))
    stems: dict[str, list[str]] = {}
    for name in listing:
        stems.setdefault(_extension(name), []).append(name.rpartition(".")[0])
    packed = [name for name in listing if _PACKED.search(name)]
    if "tar" in stems:
        _refuse_packed(url, packed, ".tar")
        tars = {name: stamp for name, stamp in listing.items() if _extension(name) == "tar"}
        return _Tars(url, options, tars)
    pictures = [stem for extension in PICTURES for stem in stems.get(extension, ())]
    captioned = not set(stems.get("txt", ())).isdisjoint(pictures)
    own: dict[str, str] = {}
    for known in _FOLDER_TABLES:
        for name in listing:
            folder, base = posixpath.split(name)
            if base == known:
                own.setdefault(folder, name)
    if own and captioned:
        raise ValueError(
            f"{url}: found {next(iter(own.values()))}, and pictures each with a .txt beside it; "
            "name the folders one by one"
        )
    if own:
        tables = (_Table(own[it], storage.join(url, it), f"{own[it]}/") for it in sorted(own))
        return _Tables(url, options, listing, tuple(tables))
    kinds = [extension for extension in TABLES if extension in stems]
    if captioned or ("txt" in stems and not kinds):
        return _Sidecar(url, options, listing)
    if len(kinds) > 1:
        counts = ", ".join(f"{len(stems[kind])} .{kind}" for kind in kinds)
        raise ValueError(f"{url}: found {counts}; wanted tables of one kind: name those you mean")
    if kinds:
        _refuse_packed(url, packed, f".{kinds[0]}")
        names = [name for name in listing if _extension(name) == kinds[0]]
        roots = [options.root or storage.parent(storage.join(url, name)) for name in names]
        tables = (
            _Table(name, storage.absolute(root), f"{name}/")
            for name, root in zip(names, roots, strict=True)
        )
        return _Tables(url, options, listing, tuple(tables))
    _refuse_packed(url, packed)
    found = ", ".join(list(listing)[:5]) or "nothing"
    if pictures:
        raise ValueError(
            f"{url}: found pictures without captions ({found}), and names of folders are none; put "
            "a .txt with the caption beside each, or a metadata.csv with the columns file_name "
            "and text into the folder"
        )
    raise ValueError(
        f"{url}: found {found}; wanted {', '.join(_FOLDER_TABLES)}, tars, tables "
        f"({', '.join(TABLES)}), or pictures each with a .txt beside it"
    )


def _refuse_packed(url: str, packed: Sequence[str], among: str = "") -> None:
    """ValueError for what would be left out of a folder that is read as files of that kind."""
    meant = [it for it in packed if not among or among in it.lower() or _TAR.search(it)]
    if meant:
        more = f" and {len(meant) - 1} more" if len(meant) > 1 else ""
        raise ValueError(f"{url}: {meant[0]}{more}: compressed; decompress it first")


def _extension(name: str) -> str:
    _, dot, extension = posixpath.basename(name).rpartition(".")
    return extension.lower() if dot else ""


def fetch(row: Row, max_bytes: int = 1 << 30) -> bytes:
    """The bytes of a row's picture. OSError when there are none, `OverLong` when too many."""
    return fetch_image(row.image, max_bytes)


def fetch_image(image: str, max_bytes: int = 1 << 30) -> bytes:
    """`fetch` by a row's `image` alone: read, cut from a tar, or drawn."""
    scheme, _, rest = image.partition(":")
    if scheme == "shapes":
        from PIL import Image

        from . import images, shapes

        seed, objects, side, index = map(int, rest.split(":"))
        pixels = shapes.draw(shapes.scene(seed, index, objects), side)
        return images.encode(Image.fromarray(pixels), "png")
    if scheme == "tar":
        offset, size, url = rest.split(":", 2)
        if int(size) > max_bytes:
            raise OverLong(f"{size} bytes, allowed {max_bytes}")
        (data,) = storage.read_ranges(url, [(int(offset), int(size))])
        return data
    if scheme == "parquet":
        group, number, column, url = rest.split(":", 3)
        data = _column_of(url, int(group), unquote(column)).picture(int(number), max_bytes)
        if data is None:
            raise FileNotFoundError(f"{url}: row {number} of row group {group} has no bytes")
        return data
    if is_remote(image):
        raise ValueError(f"{image}: pictures from the web come through pipeline.download")
    data = storage.read_at_most(image, max_bytes)
    if len(data) > max_bytes:
        raise OverLong(f"more than the allowed {max_bytes} bytes")
    return data


class _Column:
    """The pictures in one row group of a parquet, a few at a time, for those who ask in order."""

    def __init__(self, url: str, group: int, column: str):
        self.url, self.group, self.column = url, group, column
        self.failed = False
        """Whether a picture could not be read: those behind it cannot either."""
        self._start = self._stop = 0
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._file: IO[bytes] | None = None
        self._stamp: str | None = None

    def picture(self, number: int, max_bytes: int) -> bytes | None:
        """None where there is none. `OverLong`, or `Damaged` where the file is."""
        import pyarrow as pa_  # pyright: ignore[reportMissingTypeStubs]

        pa: Any = pa_
        try:
            if number < self._start or self._batch is None:
                self._open()
            while number >= self._stop:
                self._batch = next(self._batches).column(0)
                self._start, self._stop = self._stop, self._stop + len(self._batch)
            value = self._at(number)
            if pa.types.is_struct(value.type):
                value = value["bytes"] if value.is_valid else pa.scalar(None, pa.binary())
        except (pa.ArrowException, StopIteration) as error:
            self.failed = True
            raise Damaged(f"{self.url}, row group {self.group}: {error}") from None
        except OSError as error:
            self.failed = True
            _raise_if_out_of_reach(error)
            raise Damaged(f"{self.url}, row group {self.group}: {error}") from None
        if not value.is_valid:
            return None
        data = value.as_buffer()
        if data.size > max_bytes:
            raise OverLong(f"{data.size} bytes, allowed {max_bytes}")
        return data.to_pybytes()

    def changed(self) -> bool:
        """Whether the file is another than the one that was opened."""
        return storage.stamp(self.url) != self._stamp

    def _at(self, number: int) -> Any:
        return self._batch[number - self._start]

    def _open(self) -> None:
        import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

        parquet: Any = pq
        self.close()
        self._stamp = storage.stamp(self.url)
        self._file = storage.open_read(self.url)
        self._start = self._stop = 0
        # Of itself Arrow reads the whole row group before it gives the first picture.
        size = _BUFFER if storage.is_local(self.url) else _BUFFER_FAR
        table = parquet.ParquetFile(self._file, buffer_size=size, pre_buffer=False)
        self._batches = table.iter_batches(8, row_groups=[self.group], columns=[self.column])

    def close(self) -> None:
        self._batches, self._batch = iter(()), None
        if self._file is not None:
            self._file.close()
            self._file = None


_last: list[_Column] = []


def _column_of(url: str, group: int, column: str) -> _Column:
    """The one that was asked for last, if it is the same."""
    if not _last or (_last[0].url, _last[0].group, _last[0].column) != (url, group, column):
        release()
        _last.append(_Column(url, group, column))
    return _last[0]


def release() -> None:
    """Let go of the parquet that was read last: it may change before it is read again."""
    while _last:
        _last.pop().close()


def release_changed() -> None:
    """The same, unless it is still what was opened: then the next rows are read on from where it
    is, not from the start of their row group.
    """
    if _last and (_last[0].failed or _last[0].changed()):
        release()


class OverLong(OSError):
    """A file of more bytes than allowed."""


@dataclass(frozen=True)
class _Listed:
    """A source listed once, so that its fingerprint and its rows speak of the same moment."""

    url: str
    options: SourceOptions
    listing: Mapping[str, str]

    def fingerprint(self) -> str:
        return fingerprint(list(self.listing.items()))

    def _row(
        self,
        member: str,
        stamp: str,
        image: str,
        captions: list[str],
        attributes: Mapping[str, str],
        problem: str | None = None,
        flags: tuple[str, ...] = (),
        styled: bool = False,
        upstream: str = "",
    ) -> Row:
        """A row from raw texts. A style among the attributes joins captions not `styled` yet."""
        limit = self.options.max_caption_characters
        clean: list[str] = []
        noted = list(flags)
        for caption in captions:
            text, changes = clean_caption(caption, limit)
            noted += changes
            if text:
                clean.append(text)
        if captions and not clean:
            problem = problem or "no_caption"
        label = {
            clean_caption(name, limit)[0]: clean_caption(text, limit)[0]
            for name, text in attributes.items()
            if name not in _HASHES
        }
        clean = list(dict.fromkeys(clean))
        style = None if styled else label.get(self.options.style_field)
        pairs = [(f"{text}|{style}", text) if style else (text, None) for text in clean]
        (pair, name), *others = pairs or [("", None)]
        if style:
            template = self.options.caption_template
            clean = [template.format(caption=text, style=style) for text in clean]
        sha256, md5 = (attributes.get(it, "").strip().lower() for it in _HASHES)
        more = [[md5, upstream]] if md5 or upstream else []
        said = fingerprint([clean, pair, name, label, problem, sha256, *more])
        return Row(
            # file names may hold bytes that are no text
            id=f"{self.url}#{member}".encode("utf-8", "backslashreplace").decode(),
            stamp=f"{stamp}-{said}",
            captions=tuple(clean),
            image=image,
            pair=pair,
            name=name,
            others=tuple(others),
            label=label or None,
            problem=problem,
            flags=tuple(sorted(set(noted))),
            sha256=sha256 or None,
            md5=md5 or None,
            sha256_upstream=upstream or None,
        )


class _Table(NamedTuple):
    """One table of a source."""

    name: str
    """In the listing."""
    root: str
    """Where its paths start from."""
    prefix: str = ""
    """Of the names of its rows."""


@dataclass(frozen=True)
class _Tables(_Listed):
    """Paths with captions: of any table, a folder's own, or all those below a folder, in the order
    of their names. The pictures of a folder are listed with it."""

    tables: tuple[_Table, ...]

    def rows(self) -> Iterator[Row]:
        for table in self.tables:
            yield from self._rows(table)

    def _rows(self, table: _Table) -> Iterator[Row]:
        url = storage.join(self.url, table.name) if table.name else self.url
        met: set[bytes] = set()  # hashes: a hundred million paths are many bytes
        again: Counter[str] = Counter()
        for place, fields in _read_table(url, self.options):
            file = _file_field(fields, self.options, place)
            caption = _field(
                fields, self.options.caption_field, CAPTION_FIELDS, place, wanted=False
            )
            said = fields.get(caption) if caption else None
            captions = _texts(said, f"{place}, column {caption!r}")
            path = fields[file]
            attributes = {
                name: text
                for name, text in fields.items()
                if name not in (file, caption) and isinstance(text, str) and text
            }
            upstream = ""
            if isinstance(path, _Embedded) and not attributes.keys().isdisjoint(FILE_FIELDS):
                # of the file there: img2dataset resizes it
                upstream = attributes.get("sha256", "").lower()
                attributes = {n: text for n, text in attributes.items() if not _names_hash(n)}
            else:
                for name, value in fields.items():
                    if name not in (file, caption):
                        _check_hash(name, value, place)
            if isinstance(path, _Embedded):
                image, stamp, problem = path.reference(url), self.listing[table.name], None
                member = path.name
            elif isinstance(path, str) and path:
                image, stamp, problem = self._resolve(path, table.root)
                member = path
                # where two paths have one hash, the second is named as if it were met again
                digest = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8)
                if digest.digest() in met:
                    again[path] += 1
                    member = f"{path}#{again[path]}"
                met.add(digest.digest())
            else:
                raise ValueError(
                    f"{place}, column {file!r}: got {path!r}, wanted the path of a picture"
                )
            problem = problem or (None if captions else "incomplete")
            yield self._row(
                table.prefix + member,
                stamp,
                image,
                captions,
                attributes,
                problem,
                upstream=upstream,
            )

    def _resolve(self, path: str, root: str) -> tuple[str, str, str | None]:
        """(URL, stamp, problem) of a path in a table: it stays below the root, or on the web."""
        if is_remote(path) and not path.startswith(f"{root}/"):
            return path, "", None
        if "://" in path or path.startswith("pipe:"):
            if storage.is_local(root) or not path.startswith(f"{root}/"):
                return path, "", "reference"
            path = path[len(root) + 1 :]
        if posixpath.isabs(path):
            url = posixpath.normpath(path)
            inside = storage.is_local(root) and url.startswith(root.rstrip("/") + "/")
        else:
            relative = posixpath.normpath(path)
            url = storage.join(root, relative)
            inside = relative != ".." and not relative.startswith("../")
        if not inside or "\0" in path:
            return url, "", "unsafe_path"
        if "" not in self.listing and url.startswith(f"{self.url}/"):
            below = url[len(self.url) + 1 :]
            known = self.listing.get(below)
            if not known and "/." in f"/{below}":  # hidden files are not listed, but may be named
                known = storage.stamp(url)
        elif is_remote(url):  # asked for by `download` alone
            return url, "", None
        else:  # a table that stands alone was not listed with its pictures
            known = storage.stamp(url)
        return url, known or "", None if known else "missing_file"


@dataclass(frozen=True)
class _Embedded:
    """A picture whose bytes stand in the table itself."""

    group: int
    row: int
    column: str
    name: str

    def reference(self, table: str) -> str:
        return f"parquet:{self.group}:{self.row}:{quote(self.column, safe='')}:{table}"


@dataclass(frozen=True)
class _Sidecar(_Listed):
    """Pictures, each with its caption in a .txt of the same name."""

    def rows(self) -> Iterator[Row]:
        groups: dict[str, tuple[list[str], list[str]]] = {}
        for name in self.listing:
            stem, _, extension = name.rpartition(".")
            extension = extension.lower()
            if stem and extension in (*PICTURES, "txt"):
                groups.setdefault(stem, ([], []))[extension == "txt"].append(name)
        for pictures, texts in groups.values():
            captions: list[str] = []
            for text in texts:  # a.txt and a.TXT are two captions
                with storage.open_read(storage.join(self.url, text)) as file:
                    captions.append(_text(file.read(_caption_bytes(self.options))))
            stamp = "-".join(self.listing[text] for text in texts)
            for name in pictures:
                problem = None if texts else "incomplete"
                image = storage.join(self.url, name)
                yield self._row(name, f"{self.listing[name]}-{stamp}", image, captions, {}, problem)
            if not pictures:
                yield self._row(texts[0], stamp, "", captions, {}, "incomplete")


@dataclass
class _Sample:
    """The members of one key, as they stand together in a tar."""

    key: str
    problem: str | None = None
    flags: set[str] = field(default_factory=set[str])
    extensions: set[str] = field(default_factory=set[str])
    image: str = ""
    captions: list[str] = field(default_factory=list[str])
    attributes: dict[str, str] = field(default_factory=dict[str, str])
    styled: bool = False
    upstream: str = ""
    parts: dict[str, _Sample] = field(default_factory=dict[str, "_Sample"])
    """What goes on after the key and a dot, by that longer name: `a.seg` of `a`."""

    @property
    def complete(self) -> bool:
        return not self.problem and bool(self.image and self.captions)

    @property
    def stands_alone(self) -> bool:
        """Whether it has, by name at least, a picture and words, as a mask has not."""
        return not self.extensions.isdisjoint(PICTURES) and (
            "txt" in self.extensions or bool(self.captions)
        )


class _NotATar(ValueError):
    """Not even the beginning of one."""


@dataclass(frozen=True)
class _Tars(_Listed):
    """WebDataset and img2dataset tars, uncompressed: pictures by offset, texts when listed."""

    def rows(self) -> Iterator[Row]:
        for name, stamp in self.listing.items():
            url = storage.join(self.url, name) if name else self.url
            try:
                for sample in self._samples(url):
                    yield self._row(
                        f"{name}/{sample.key}" if name else sample.key,
                        stamp,
                        sample.image,
                        sample.captions,
                        sample.attributes,
                        sample.problem or (None if sample.complete else "incomplete"),
                        tuple(sample.flags),
                        sample.styled,
                        sample.upstream,
                    )
            except _NotATar:
                if not name:
                    raise
                # one of thousands: a download that failed leaves nothing, or a page that says so
                yield self._row(f"{name}/@tar", stamp, url, [], {}, "not_a_tar")

    def _samples(self, url: str) -> Iterator[_Sample]:
        closed: set[str] = set()
        sample: _Sample | None = None
        with storage.open_read(url) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            for member in _members(file, size, url):
                if member is None:
                    whole = self._closed(sample, closed, url) if sample else []
                    if all(it.complete for it in whole):  # they stay, the break is a row
                        whole.append(_Sample("@end"))
                    for it in whole:
                        it.problem = it.problem or (None if it.complete else "truncated")
                    yield from whole
                    return
                key, stem, extension = _split_name(member.name, sample.key if sample else None)
                if member.isdir() or posixpath.basename(key).startswith((".", "__")):
                    continue
                if sample is None or key != sample.key:
                    if sample:
                        yield from self._closed(sample, closed, url)
                    if key in closed:
                        raise _apart(url, member.name, key)
                    sample = _Sample(key)
                    closed.add(key)
                part = sample if stem == key else sample.parts.setdefault(stem, _Sample(stem))
                if extension in part.extensions:
                    raise ValueError(
                        f"{url}, member {member.name}: it is there twice; write the tar again"
                    )
                part.extensions.add(extension)
                self._take(part, member, extension, file, size, url)
        if sample:
            yield from self._closed(sample, closed, url)

    def _closed(self, sample: _Sample, closed: set[str], url: str) -> list[_Sample]:
        """The sample, then those of its parts that are samples of their own."""
        whole = [sample]
        for part in sample.parts.values():
            if not part.stands_alone:
                sample.flags.add("member_refused")
                sample.problem = sample.problem or part.problem
            elif part.key in closed:
                raise _apart(url, f"{part.key}.*", part.key)
            else:
                closed.add(part.key)
                whole.append(part)
        return whole

    def _take(
        self,
        sample: _Sample,
        member: tarfile.TarInfo,
        extension: str,
        file: IO[bytes],
        size: int,
        url: str,
    ) -> None:
        if member.name.startswith("/") or not {"..", "\\", "\0"}.isdisjoint(
            {*member.name.split("/"), *member.name}
        ):
            sample.problem = "unsafe_path"
        elif not member.isreg() or member.issparse():
            sample.problem = "not_a_file"
        elif member.offset_data + member.size > size:
            sample.problem = "truncated"
        elif extension in PICTURES:
            if sample.image:
                sample.flags.add("second_picture_ignored")
            else:
                sample.image = f"tar:{member.offset_data}:{member.size}:{url}"
        elif extension == "txt":
            file.seek(member.offset_data)
            text = _text(file.read(min(member.size, _caption_bytes(self.options))))
            sample.captions.insert(0, text)
        elif extension == "json" and member.size <= _MAX_JSON_BYTES:
            file.seek(member.offset_data)
            try:
                self._take_fields(sample, json.loads(_text(file.read(member.size))))
            except (ValueError, RecursionError):
                sample.flags.add("json_ignored")
        else:
            sample.flags.add("member_refused")  # pickles, arrays, code: never opened

    def _take_fields(self, sample: _Sample, fields: Any) -> None:
        if not _is_object(fields):
            raise ValueError("not a JSON object")
        for name in CAPTION_FIELDS:
            for it in _listed(fields.get(name)):
                # our own shards keep a hash beside each text, and the label apart
                text = it.get("text") if _is_object(it) else it
                if isinstance(text, str):
                    sample.captions.append(text)
        sample.styled = _is_object(fields.get("label"))
        attributes: dict[str, Any] = fields["label"] if sample.styled else fields
        sample.attributes = {
            name: text
            for name, text in attributes.items()
            if isinstance(text, str)
            and text
            and name not in CAPTION_FIELDS
            # what img2dataset notes is of the file before its resize
            and not _names_hash(name)
        }
        if isinstance(before := fields.get("sha256"), str):
            sample.upstream = before.lower()


@dataclass(frozen=True)
class _Shapes:
    """Drawn scenes: row i is the scene (seed, i), whatever the number of scenes."""

    url: str

    @cached_property
    def _parameters(self) -> dict[str, int]:
        values = {"scenes": 24000, "seed": 0, "side": 32, "objects": 1}
        _, _, query = self.url.partition("?")
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name not in values or not text.isdigit():
                raise ValueError(
                    f"{self.url}: got {name}={text}; wanted whole numbers for {', '.join(values)}"
                )
            values[name] = int(text)
        if (
            values["objects"] not in (1, 2)
            or not 8 <= values["side"] <= 2048
            or not values["scenes"]
        ):
            raise ValueError(
                f"{self.url}: wanted scenes >= 1, objects 1 or 2, side from 8 to 2048; got {values}"
            )
        return values

    def fingerprint(self) -> str:
        return fingerprint([_DRAWING, self._parameters])

    def rows(self) -> Iterator[Row]:
        from . import shapes

        scenes, seed, side, objects = (
            self._parameters[name] for name in ("scenes", "seed", "side", "objects")
        )
        for index in range(scenes):
            scene = shapes.scene(seed, index, objects)
            caption, truth = shapes.caption(scene, seed, index), scene.truth()
            reference = f"shapes:{seed}:{objects}:{side}:{index}"
            pair = shapes.combination(truth)
            yield Row(reference, f"{_DRAWING}", (caption,), reference, pair, None, truth)


def _check_hash(name: str, value: Any, place: str) -> None:
    """ValueError for a column that is named like a hash which is not checked: as a label it would
    be learnt, and whoever gave it would think that it was looked at.
    """
    if name in _HASHES:
        if not isinstance(value, str | None):
            raise ValueError(f"{place}, column {name!r}: got {value!r}, wanted text, in hex")
    elif _names_hash(name):
        near = name.lower().replace("-", "").replace("_", "").removesuffix("sum")
        told = f"rename it to {near}" if near in _HASHES else "drop or rename it"
        raise ValueError(
            f"{place}: column {name!r} is named like a hash of the picture's file; wanted "
            f"{' or '.join(_HASHES)}, in hex: {told}"
        )


@lru_cache(256)
def _names_hash(name: str) -> bool:
    return bool(_HASH_LIKE.fullmatch(name))


def _read_table(url: str, options: SourceOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, fields) of each row of a table."""
    extension = _extension(url)
    if extension == "jsonl":
        with storage.open_read(url) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{url}, line {number}"
                    try:
                        fields = json.loads(_text(line))
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{place}: not JSON ({error})") from None
                    if not isinstance(fields, dict):
                        raise ValueError(
                            f"{place}: got {type(fields).__name__}, wanted a JSON object"
                        )
                    yield place, fields
    elif extension in ("csv", "tsv"):
        csv.field_size_limit(_MAX_FIELD_BYTES)
        with storage.open_read(url) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
            tabs = "\t" if extension == "tsv" else ","
            reader = csv.reader(text, delimiter=tabs, strict=True)
            try:
                names = next(reader, None) or []
                _check_names(filter(None, names), f"{url}, line {reader.line_num}")
                for values in filter(None, reader):
                    place = f"{url}, line {reader.line_num}"
                    if len(values) != len(names):
                        raise ValueError(
                            f"{place}: got {len(values)} fields, "
                            f"wanted {len(names)} as in the first line"
                        )
                    yield place, dict(zip(names, values, strict=True))
            except csv.Error as error:
                raise ValueError(f"{url}, after line {reader.line_num}: {error}") from None
    else:
        yield from _read_parquet(url, options)


def _read_parquet(url: str, options: SourceOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pyarrow
    try:
        yield from _parquet_rows(url, options)
    except (pa.ArrowException, OSError) as error:  # Arrow raises both for what it cannot read
        _raise_if_out_of_reach(error)
        raise ValueError(f"{url}: not a parquet file, or a damaged one ({error})") from None


def _parquet_rows(url: str, options: SourceOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa_  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pa_
    parquet: Any = pq
    with storage.open_read(url) as file:
        table = parquet.ParquetFile(file)
        place = f"{url}, schema"
        _check_names(table.schema_arrow.names, place)
        columns: dict[str, Any] = {column.name: column.type for column in table.schema_arrow}
        file_name = options.file_field or _bytes_field(columns)
        file_name = _field(columns, file_name, FILE_FIELDS, place)
        caption = _field(columns, options.caption_field, CAPTION_FIELDS, place)
        texts = (pa.string(), pa.large_string())
        wanted = {name for name, kind in columns.items() if kind in texts} | {file_name, caption}
        for name in _HASHES:
            if name in columns and columns[name] not in (*texts, pa.null()):
                raise ValueError(
                    f"{place}, column {name!r}: got {columns[name]}, wanted text, in hex"
                )
        held = _holds_bytes(columns[file_name])
        wanted -= {file_name} if held else set()  # listing reads no picture
        number = 0
        for group in range(table.num_row_groups):
            row = 0
            for batch in table.iter_batches(4096, row_groups=[group], columns=sorted(wanted)):
                for fields in _fields_of(batch):
                    place = f"{url}, row {number}"
                    said = fields[caption]
                    if not isinstance(said, (str, list)):
                        raise ValueError(
                            f"{place}, column {caption!r}: got {said!r}, wanted text; "
                            "fill or drop such rows"
                        )
                    if held:
                        fields[file_name] = _Embedded(group, row, file_name, f"row {number}")
                    yield place, fields
                    number, row = number + 1, row + 1


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds pictures: bytes, or Hugging Face's struct with bytes."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pyarrow
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return kind in (pa.binary(), pa.large_binary())


def _bytes_field(columns: Mapping[str, Any]) -> str:
    """The column of pictures that is known by its name, or ""."""
    known = (name for name in (*FILE_FIELDS, *PICTURES) if name in columns)
    return next((name for name in known if _holds_bytes(columns[name])), "")


def _fields_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch; a text need not be the UTF-8 that its column promises."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    pa: Any = pyarrow
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        raw |= {
            column.type: pa.list_(raw[column.type.value_type])
            for column in batch.columns
            if pa.types.is_list(column.type) and column.type.value_type in raw
        }
        columns = [column.cast(raw.get(column.type, column.type)) for column in batch.columns]
        rows = pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
        return [{name: _decoded(value) for name, value in row.items()} for row in rows]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(it) for it in _listed(value)]
    return _text(value) if isinstance(value, bytes) else value


def _check_names(names: Iterable[str], place: str) -> None:
    """ValueError for a column that is there twice: one of the two would be lost."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"{place}: column {twice[0]!r} is there twice; rename or drop one")


def _file_field(fields: Mapping[str, Any], options: SourceOptions, place: str) -> str:
    """The column of the picture's path, or that of its bytes."""
    held = next((name for name, it in fields.items() if isinstance(it, _Embedded)), "")
    return held or _field(fields, options.file_field, FILE_FIELDS, place)


def _field(
    fields: Mapping[str, Any], chosen: str, known: tuple[str, ...], place: str, wanted: bool = True
) -> str:
    """The column to use. ValueError when the chosen one, or (if wanted) any, is missing."""
    names = (chosen,) if chosen else known
    found = next((name for name in names if name in fields), "")
    if not found and (wanted or chosen):
        raise ValueError(
            f"{place}: found columns {', '.join(map(str, fields)) or 'none'}; "
            f"wanted {' or '.join(names)} (or name yours with file_field and caption_field)"
        )
    return found


def _texts(value: Any, place: str) -> list[str]:
    """The captions in a field: text or a list of texts; none for an empty field."""
    if value is None or value == "":
        return []
    values = _listed(value)
    for it in values:
        if not isinstance(it, str):
            raise ValueError(f"{place}: got {it!r}, wanted text or a list of texts")
    return values


def _listed(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list) else [value]  # pyright: ignore[reportUnknownVariableType]


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="replace")


def _caption_bytes(options: SourceOptions) -> int:
    return 16 * options.max_caption_characters  # beyond that, cleaning keeps nothing


def _split_name(name: str, current: str | None) -> tuple[str, str, str]:
    """(key, stem, extension) of a tar member: the stem ends at the last dot, and so does the key,
    unless the first dot ends a known one.

    So `a.seg.png` after `a.jpg` belongs to `a`, while `v1.5.cat.jpg` and `v1.6.dog.jpg` are two
    samples, which webdataset, cutting at the first dot, makes one.
    """
    folder, base = posixpath.split(name)
    first, _, rest = base.partition(".")
    stem, _, extension = base.rpartition(".")
    stem = posixpath.join(folder, stem or base)
    within = current is not None and "." in rest and posixpath.join(folder, first) == current
    return current if within and current else stem, stem, extension.lower()


def _apart(url: str, member: str, key: str) -> ValueError:
    return ValueError(
        f"{url}, member {member}: the members of sample {key} do not stand together; "
        "write the tar again, sorted by name"
    )


def _members(file: IO[bytes], size: int, url: str) -> Iterator[tarfile.TarInfo | None]:
    """The headers of a tar, then None where it breaks off."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closed below
    except Exception as error:
        _raise_if_out_of_reach(error)
        raise _NotATar(
            f"{url}: not an uncompressed tar ({error!r}); fetch or write it again"
        ) from None
    with tar:
        last = -1
        while True:
            try:
                member = tar.next()
            except Exception as error:  # lying headers make tarfile raise whatever comes
                _raise_if_out_of_reach(error)
                yield None
                return
            if member is None:  # also on a broken header, about which tarfile is silent
                file.seek(min(tar.offset, size))
                if any(file.read(tarfile.BLOCKSIZE)):
                    yield None
                return
            if member.offset <= last or member.size < 0:  # negative sizes lead backwards, for ever
                yield None
                return
            last = member.offset
            vars(tar)["members"].clear()  # tarfile keeps every header it has seen
            yield member


def _raise_if_out_of_reach(error: Exception) -> None:
    """The disk's or the store's own trouble says nothing of the file."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of seeking to -1
        raise error
