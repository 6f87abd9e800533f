"""Ten thousand damaged and lying pictures and tars through the whole of ingest: no crash, no more
than 1 GB of memory, and every row in exactly one sum.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GIGABYTE_IN_KIB = 1 << 20

# ---- files as they should be --------------------------------------------------------------------


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(width * height).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def whole_pictures() -> list[bytes]:
    """Small files of every format that is accepted, in most of its ways to be written."""
    rgb, frames = drawn(40, 30), [drawn(20, 20, "P"), drawn(20, 21, "P").resize((20, 20))]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    animated = {"save_all": True, "append_images": frames[1:]}
    made = [
        saved(rgb, "JPEG", exif=exif),
        saved(rgb, "JPEG", progressive=True, quality=50),
        saved(rgb, "JPEG", restart_marker_blocks=2, comment=b"\xff\xd9"),
        saved(drawn(33, 17, "L"), "JPEG"),
        saved(drawn(24, 24, "CMYK"), "JPEG"),
        saved(rgb, "PNG", exif=exif),
        saved(drawn(9, 9), "PNG"),
        saved(drawn(8, 200), "PNG"),
        saved(drawn(30, 20, "I;16"), "PNG"),
        saved(drawn(30, 20, "1"), "PNG"),
        saved(drawn(30, 20, "LA"), "PNG"),
        saved(drawn(30, 20, "RGBA"), "PNG", icc_profile=b"no profile" * 20),
        saved(drawn(30, 20, "P"), "PNG", transparency=3),
        saved(frames[0], "PNG", **animated),
        saved(rgb, "WEBP"),
        saved(drawn(30, 20, "RGBA"), "WEBP", lossless=True),
        saved(frames[0].convert("RGB"), "WEBP", **animated),
        saved(frames[0], "GIF", **animated),
        saved(frames[0], "GIF", interlace=1, transparency=2),
        saved(rgb, "BMP"),
        saved(drawn(31, 20, "P"), "BMP"),
        saved(drawn(31, 20, "1"), "BMP"),
        saved(drawn(30, 20, "I;16"), "TIFF"),
        saved(drawn(30, 20, "CMYK"), "TIFF"),
        saved(rgb, "TIFF", exif=exif),
    ]
    packings = ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg")
    made += [saved(rgb, "TIFF", compression=packing) for packing in packings]
    made += [saved(drawn(30, 20, "1"), "TIFF", compression=it) for it in ("group3", "group4")]
    return made


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + crc


# ---- what happens to them -----------------------------------------------------------------------

Damage = Callable[[random.Random, bytearray, list[bytes]], bytes | bytearray]


def flipped(rng: random.Random, data: bytearray, _) -> bytearray:
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return data


def flipped_early(rng: random.Random, data: bytearray, others) -> bytearray:
    """Where the headers are."""
    head = bytearray(data[:64])
    return flipped(rng, head, others) + data[64:]


def cut(rng: random.Random, data: bytearray, _) -> bytearray:
    return data[: rng.randrange(len(data))]


def spliced(rng: random.Random, data: bytearray, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other)) :]


def doubled(rng: random.Random, data: bytearray, _) -> bytearray:
    start, end = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    at = rng.randrange(len(data))
    return data[:at] + data[start:end] + data[at:]


def thinned(rng: random.Random, data: bytearray, _) -> bytearray:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 40)]
    return data


def blown_up(rng: random.Random, data: bytearray, _) -> bytearray:
    """A length, offset or count somewhere says the most it can."""
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 8))
    data[at : at + size] = rng.choice((b"\xff", b"\x7f", b"\x80", b"\0"))[:1] * size
    return data


def tailed(rng: random.Random, data: bytearray, others: list[bytes]) -> bytearray:
    return data + rng.choice((b"PK\x03\x04", b"\xff\xd9", rng.choice(others), rng.randbytes(99)))


def a_size(rng: random.Random) -> int:
    """Any number of digits alike."""
    return int(2 ** rng.uniform(0, 20))


def lying(rng: random.Random, data: bytearray, _) -> bytes | bytearray:
    """Other dimensions, depths and packings in a header that is otherwise in order."""
    width, height = a_size(rng), a_size(rng)
    if data[:4] == b"\x89PNG":
        header = bytearray(data[16:29])
        header[:8] = struct.pack(">II", width, height)
        if rng.random() < 0.5:
            header[8:10] = bytes((rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6))))
        if rng.random() < 0.1:
            header[12] = 1  # interlaced
        return bytes(data[:8]) + png_chunk(b"IHDR", bytes(header)) + bytes(data[33:])
    if data[:2] == b"\xff\xd8":
        if frame := re.search(rb"\xff[\xc0\xc2]", data):
            at = frame.start()
            data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
            if rng.random() < 0.3:
                data[at + 11 : at + 12] = rng.randbytes(1)  # sampling factors
    elif data[:3] == b"GIF":
        data[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<II", width, height)
        if rng.random() < 0.5:
            data[28], data[30] = rng.choice((1, 4, 8, 16, 24, 32)), rng.randrange(5)
    elif data[:4] == b"RIFF":
        at = 20 + rng.randrange(12)
        data[at : at + 3] = rng.randbytes(3)
    else:  # TIFF: one entry of its directory, of 12 bytes each
        order = "little" if data[:2] == b"II" else "big"
        start = int.from_bytes(data[4:8], order)
        entries = int.from_bytes(data[start : start + 2], order)
        if 0 < entries < 100:
            at = start + 2 + 12 * rng.randrange(entries)
            what, size = rng.choice(((2, 2), (4, 4), (8, 4)))  # type, count, value
            data[at + what : at + what + size] = (width & (1 << 8 * size) - 1).to_bytes(size, order)
    return data


def bomb(rng: random.Random, _data, _others) -> bytes:
    """A PNG whose pixels, texts or profile are far larger than its file."""
    size = int(2 ** rng.uniform(16, 25))
    packed = zlib.compress(bytes(size), 9)
    kind = rng.choice((b"zTXt", b"iTXt", b"iCCP", b"IDAT"))
    before = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0", b"IDAT": b""}[kind]
    side = int((size / 3) ** 0.5) if kind == b"IDAT" else 16
    pixels = [] if kind == b"IDAT" else [png_chunk(b"IDAT", zlib.compress(bytes(16 * 49)))]
    header = side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = (png_chunk(b"IHDR", header), png_chunk(kind, before + packed), *pixels)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def unharmed(_rng: random.Random, data: bytearray, _) -> bytearray:
    return data


PICTURE_DAMAGES: dict[Damage, int] = {
    flipped: 6,
    flipped_early: 6,
    lying: 8,
    cut: 3,
    spliced: 3,
    doubled: 2,
    thinned: 2,
    blown_up: 4,
    tailed: 1,
    bomb: 1,
    unharmed: 5,
}


def fuzzed(
    seed: int, count: int, wholes: list[bytes], damages: dict[Damage, int]
) -> Iterator[bytes]:
    rng = random.Random(seed)
    for number in range(count):
        data: bytes | bytearray = wholes[number % len(wholes)]
        for damage in rng.choices([*damages], [*damages.values()], k=rng.choice((1, 1, 2))):
            if len(data) > 64:
                data = damage(rng, bytearray(data), wholes)
        yield bytes(data)


# ---- tars ---------------------------------------------------------------------------------------


def whole_tars(pictures: list[bytes]) -> list[bytes]:
    """A few samples each: plain, with long names and PAX headers, with members of every kind."""
    made = []
    for number, format in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        for long in (False, True):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=format) as tar:
                for sample in range(4):
                    key = f"{'folder/' * 12 if long else ''}{sample:05}{'é' if long else ''}"
                    members = {
                        "png": pictures[(5 * number + sample) % len(pictures)],
                        "json": json.dumps({"caption": f"in json {sample}", "n": 1}).encode(),
                        "txt": f"sample {sample}".encode(),
                    }
                    for extension, data in members.items():
                        info = tarfile.TarInfo(f"{key}.{extension}")
                        info.size, info.mtime = len(data), 1.5 if long else 1
                        tar.addfile(info, io.BytesIO(data))
                    if sample == 2:
                        for kind in "1235":  # a hard link, a link, a device, a folder
                            info = tarfile.TarInfo(f"{key}x{kind}.jpg")
                            info.type, info.linkname = kind.encode(), "/etc/passwd"
                            tar.addfile(info)
            made.append(out.getvalue())
    return made


def lying_member(rng: random.Random, data: bytearray, _) -> bytearray:
    """One header with another name, size, kind or encoding of numbers, and the right checksum."""
    at = 512 * rng.randrange(max(1, len(data) // 512))
    if data[at + 257 : at + 262] != b"ustar":
        return blown_up(rng, data, [])
    header = data[at : at + 512]
    for lie in rng.sample(range(5), rng.choice((1, 1, 2))):
        match lie:
            case 0:
                header[124:136] = b"%011o\0" % rng.choice((0, 1, 511, 1 << 20, (1 << 33) - 1))
            case 1:  # base 256, which may be negative
                header[124:136] = rng.choice((b"\x80", b"\xff")) + rng.randbytes(11)
            case 2:
                header[156] = rng.choice(b"0123456LKSxgXAD\0\xff")
            case 3:
                names = (b"../../evil.png", b"/etc/abs.png", b"00001.png", b"\xff.txt", b"a\0b")
                header[:100] = rng.choice(names).ljust(100, b"\0")
            case _:
                header[345:500] = rng.randbytes(155)
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    data[at : at + 512] = header
    return data


def lying_pax(rng: random.Random, data: bytearray, _) -> bytes:
    """Extended headers before a member: sizes, names and sparse maps that are not so."""
    names = (b"size", b"path", b"mtime", b"GNU.sparse.map", b"GNU.sparse.size", b"hdrcharset")
    values = (b"-1", b"99999999999999", b"0,512,1024,1", b"../x.png", b"\xff\xfe", b"")
    lines = b""
    for _ in range(rng.randint(1, 3)):
        line = b" %s=%s\n" % (rng.choice(names), rng.choice(values))
        lines += b"%d%s" % (rng.choice((len(line) + 2, 9, 99, 10**9)), line)
    info = tarfile.TarInfo("pax")
    info.type, info.size = rng.choice((b"x", b"g")), len(lines)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    at = 512 * rng.randrange(max(1, len(data) // 512))
    return bytes(data[:at]) + header + lines + bytes(-len(lines) % 512) + bytes(data[at:])


TAR_DAMAGES: dict[Damage, int] = {
    lying_member: 8,
    lying_pax: 3,
    flipped: 4,
    cut: 4,
    spliced: 2,
    doubled: 1,
    thinned: 1,
    blown_up: 2,
    unharmed: 1,
}


# ---- all of it through ingest -------------------------------------------------------------------

INGEST = """
import collections, json, sys
from pathlib import Path
from pipeline import images, shards
from pipeline.ingest import IngestRules, ingest
from pipeline.sources import open_source

sources, refused, rows = [], 0, 0
for url in sys.argv[3:]:
    try:
        rows += len(list(open_source(url).rows()))
        sources.append(url)
    except ValueError as error:
        assert url in str(error), error
        refused += 1
rules = IngestRules(max_side=int(sys.argv[2]), min_side=8, max_rejected_share=1.0, min_heldout=0)
result = ingest(sources, sys.argv[1], rules)
stored = 0
for shard in result.manifest.shards:
    for it in shards.read_shard(result.manifest.url("shards", shard.name + ".tar")):
        image, info = images.decode(it.image)
        assert (info["width"], info["height"]) == (it.meta["width"], it.meta["height"]), it.meta
        stored += 1
peak = next(it for it in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in it)
print(json.dumps({
    "counts": result.counts, "rows": rows, "refused": refused, "stored": stored,
    "samples": result.manifest.samples(), "peak": int(peak.split()[1]),
}))
"""


def through_ingest(dataset: Path, max_side: int, sources: list[str]) -> dict[str, int]:
    """The counts of an ingest in a process of its own, after what must hold of them."""
    command = [sys.executable, "-c", INGEST, str(dataset), str(max_side), *sources]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    counts = said["counts"]
    outcomes = [counts[name] for name in ("kept", "filtered", "rejected", "duplicate")]
    assert counts["seen"] == said["rows"] == sum(outcomes)
    assert counts["kept"] == said["samples"] <= said["stored"]
    assert said["peak"] <= GIGABYTE_IN_KIB, f"{said['peak']} KiB"
    assert min(outcomes) > 0, "each outcome has to be met"
    print(
        f"\n{len(sources)} sources ({said['refused']} refused), {said['peak'] >> 10} MiB: {counts}"
    )
    return said


def pictures_folder(path: Path, pictures: Iterator[bytes]) -> str:
    path.mkdir()
    with (path / "captions.jsonl").open("w") as table:
        for number, data in enumerate(pictures):
            (path / f"{number}.bin").write_bytes(data)
            table.write(
                json.dumps({"file": f"{number}.bin", "caption": f"number {number % 97}"}) + "\n"
            )
    return str(path)


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("max_side", [0, 24])
def test_fuzzed_pictures(tmp_path, count, max_side):
    pictures = fuzzed(11 + max_side, count, whole_pictures(), PICTURE_DAMAGES)
    said = through_ingest(tmp_path / "set", max_side, [pictures_folder(tmp_path / "in", pictures)])
    assert said["rows"] == count


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzzed_files_that_were_malformed_before(tmp_path, real_data, count):
    files = sorted((real_data("malformed") / "files").iterdir())
    wholes = [file.read_bytes() for file in files if 64 < file.stat().st_size < 100_000]
    assert len(wholes) > 150
    pictures = fuzzed(12, count, wholes, PICTURE_DAMAGES)
    said = through_ingest(tmp_path / "set", 24, [pictures_folder(tmp_path / "in", pictures)])
    assert said["rows"] == count


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzzed_tars(tmp_path, count):
    (tmp_path / "in").mkdir()
    sources = []
    for number, data in enumerate(fuzzed(13, count, whole_tars(whole_pictures()), TAR_DAMAGES)):
        (tmp_path / "in" / f"{number}.tar").write_bytes(data)
        sources.append(str(tmp_path / "in" / f"{number}.tar"))
    said = through_ingest(tmp_path / "set", 24, sources)
    assert count // 20 < said["refused"] < count // 2


def whole_tables(pictures: list[bytes]) -> list[tuple[str, bytes]]:
    """(extension, bytes): pictures by path, and in the table itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"{number}.bin" for number in range(len(pictures))]
    captions = [f"a picture, {number}" for number in range(len(pictures))]
    rows = [{"file": name, "caption": it} for name, it in zip(names, captions, strict=True)]
    out = io.StringIO()
    table = csv.DictWriter(out, ["file", "caption"], quoting=csv.QUOTE_ALL)
    table.writeheader()
    table.writerows(rows)
    made = [("csv", out.getvalue().encode()), ("jsonl", "\n".join(map(json.dumps, rows)).encode())]
    columns = {"image": pictures, "text": captions}
    for options in ({}, {"compression": "zstd", "data_page_version": "2.0"}):
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, row_group_size=7, **options)
        made.append(("parquet", file.getvalue()))
    return made


def damaged_footer(rng: random.Random, data: bytearray, _) -> bytearray:
    """Of a parquet; it says where everything lies, and as what."""
    start = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little") % len(data))
    return data[:start] + flipped(rng, data[start:-8] or bytearray(1), []) + data[-8:]


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_fuzzed_tables(tmp_path, count):
    pictures = whole_pictures()
    folder = Path(pictures_folder(tmp_path / "in", iter(pictures)))
    damages = {flipped: 3, damaged_footer: 4, cut: 1, doubled: 1, thinned: 1, blown_up: 2}
    sources = []
    for seed, (extension, whole) in enumerate(whole_tables(pictures)):
        for number, data in enumerate(fuzzed(seed, count // 4, [whole], damages)):
            file = folder / f"{seed}-{number}.{extension}"
            file.write_bytes(data)
            sources.append(str(file))
    said = through_ingest(tmp_path / "set", 24, sources)
    assert count // 20 < said["refused"] < count * 3 // 4


LARGEST = (8000, 6250)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "PNG16", "WEBP", "TIFF"])
def test_the_largest_pictures_fit_as_well(tmp_path, format):
    """Of 50 million pixels, with alpha, to be turned, animated: all that costs copies."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("CMYK" if format == "JPEG" else "RGBA", LARGEST, (90, 30, 200, 40))
    options = {"save_all": True, "append_images": [image]} if format == "WEBP" else {}
    if format == "TIFF":
        options = {"compression": "tiff_lzw"}
    if format == "PNG16":
        image, format = Image.fromarray(np.full(LARGEST[::-1], 1000, np.uint16)), "PNG"
    pictures = [saved(image, format, exif=exif, **options), *(saved(drawn(9, 9), "PNG"),) * 2]
    pictures += [saved(drawn(8, 200), "PNG"), b"nothing"]
    said = through_ingest(tmp_path / "set", 0, [pictures_folder(tmp_path / "in", iter(pictures))])
    assert said["peak"] > 8 * np.prod(LARGEST) / 1024, "it was too large to be decoded at all"
