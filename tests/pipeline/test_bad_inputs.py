"""What comes in and what becomes of it, through the whole of ingest: one table of hostile rows.

Single functions meet their own bad inputs in their own tests; here is what only shows at the end.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import images, shards
from pipeline.ingest import IngestRules, ingest
from pipeline.outcomes import read_outcomes

RULES = IngestRules(heldout_share=0, min_heldout=0, max_rejected_share=1.0)


def picture(seed: int, width: int = 24, height: int = 24, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
        out, format, **options
    )
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("evil.sh", "rm -rf /")
    return out.getvalue()


def flipped(data: bytes) -> bytes:
    """Another picture, though no decoder notices."""
    at = data.rindex(b"\xff\xda") + 60
    changed = data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :]
    before, after = (np.asarray(Image.open(io.BytesIO(it))) for it in (data, changed))
    assert before.shape == after.shape
    assert (before != after).any()
    return changed


def ended(data: bytes) -> bytes:
    """Two fifths of a picture are missing, and the end is said to be there: no decoder notices."""
    changed = data[: len(data) * 6 // 10] + b"\xff\xd9"
    before, after = (np.asarray(Image.open(io.BytesIO(it))) for it in (data, changed))
    assert before.shape == after.shape
    assert (before != after).any(-1).mean() > 0.2
    return changed


def animated(format: str) -> bytes:
    """A red frame, then a blue one."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, format, save_all=True, append_images=frames[1:], lossless=True)
    return out.getvalue()


def endless() -> bytes:
    """An animated WebP that says it is taller than a JPEG can be."""
    data = animated("WEBP")
    assert data[12:16] == b"VP8X"
    return data[:27] + (70_000 - 1).to_bytes(3, "little") + data[30:]


def adobe(transform: int, components: Sequence[int], blocks: int = 9) -> bytes:
    """A CMYK JPEG of one colour, marker by marker: each block of a component is its constant term
    alone. The APP14 marker says that inks are inverted, and by `transform` 2 that CMY is YCbCr.
    """

    def segment(marker: int, body: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(body)) + body

    bits = ""
    for block in range(blocks):
        for value in components:
            term = 0 if block else 8 * (value - 128)  # the difference to the block before
            length = abs(term).bit_length()
            low = term if term > 0 else term + (1 << length) - 1
            bits += f"{length:04b}" + (f"{low:0{length}b}" if length else "") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    side = 8 * int(blocks**0.5)
    frame = struct.pack(">BHHB", 8, side, side, 4)
    return (
        b"\xff\xd8"
        + segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))
        + segment(0xDB, b"\0" + bytes([1] * 64))
        + segment(0xC0, frame + b"".join(bytes((it, 0x11, 0)) for it in range(1, 5)))
        + segment(0xC4, b"\x00" + bytes((0, 0, 0, 12, *[0] * 12)) + bytes(range(12)))
        + segment(0xC4, b"\x10" + bytes((1, *[0] * 15)) + b"\0")
        + segment(0xDA, b"\4" + b"".join(bytes((it, 0)) for it in range(1, 5)) + b"\0\x3f\0")
        + scan.replace(b"\xff", b"\xff\0")
        + b"\xff\xd9"
    )


def inverted(cyan: int, magenta: int, yellow: int, black: int) -> list[int]:
    """As Adobe stores inks: 255 is none."""
    return [255 - it for it in (cyan, magenta, yellow, black)]


def ycck(cyan: int, magenta: int, yellow: int, black: int) -> list[int]:
    """The same as luma and chroma (JFIF), of the inks as they are, and inverted black."""
    luma = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    blue, red = (yellow - luma) / 1.772, (cyan - luma) / 1.402
    return [min(255, round(it)) for it in (luma, 128 + blue, 128 + red, 255 - black)]


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><rect width="9"/></svg>'
PDF = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x08mdat"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
JPEG = picture(1, 64, 64, "JPEG")
SHA256 = hashlib.sha256(JPEG).hexdigest()
MD5 = hashlib.md5(picture(8, 64, 64, "JPEG")).hexdigest()


@dataclass(frozen=True)
class Case:
    """A row of a table and what is to become of it."""

    number: int
    """Of the row in the list of bad inputs."""
    data: bytes
    outcome: str
    flags: tuple[str, ...] = ()
    caption: str = "a picture"
    more: tuple[tuple[str, str], ...] = ()


CASES = {
    "empty.jpg": Case(1, b"", "rejected:not_image"),
    "page.jpg": Case(1, b"<html><title>404</title></html>", "rejected:not_image"),
    "header.jpg": Case(2, JPEG[:20], "rejected:truncated"),
    "cut.jpg": Case(2, JPEG[: len(JPEG) * 6 // 10], "rejected:truncated"),
    "ended.jpg": Case(2, ended(JPEG), "kept:"),  # as in 5: what upstream said of it alone can tell
    "ended-expected.jpg": Case(
        2, ended(JPEG), "rejected:hash_mismatch", more=(("sha256", SHA256),)
    ),
    "flipped.jpg": Case(5, flipped(JPEG), "kept:"),
    "expected.jpg": Case(
        5, flipped(JPEG) + b"!", "rejected:hash_mismatch", more=(("sha256", SHA256),)
    ),
    "as-expected.jpg": Case(5, picture(8, 64, 64, "JPEG"), "kept:", more=(("md5", MD5),)),
    "other-md5.jpg": Case(5, flipped(JPEG) + b"?", "rejected:hash_mismatch", more=(("md5", MD5),)),
    "dot.png": Case(9, picture(2, 1, 1), "filtered:too_small"),
    "line.png": Case(9, picture(2, 1, 20_000), "filtered:aspect"),
    "endless.webp": Case(9, endless(), "filtered:aspect", ("animated",)),
    "zip.jpg": Case(16, JPEG + zipped(), "kept:", ("trailing_bytes",)),
    "inks.jpg": Case(11, adobe(0, inverted(0, 255, 255, 0)), "kept:"),
    "luma.jpg": Case(11, adobe(2, ycck(0, 255, 255, 0)), "kept:"),
    "drawing.jpg": Case(17, EPS, "rejected:format"),
    "vectors.svg": Case(17, SVG, "rejected:format"),
    "page.pdf": Case(17, PDF, "rejected:format"),
    "phone.heic": Case(17, HEIC, "rejected:format"),
    "blank.png": Case(21, picture(4), "rejected:no_caption", caption=" \x00\n\x1b"),
    "right.png": Case(21, picture(5), "kept:", caption="قطة سوداء"),
    "joined.png": Case(21, picture(6), "kept:", caption="cafe\u0301"),
    "escape.png": Case(23, picture(7), "kept:", caption="\x1b[31m{{7*7}}<script>"),
}
CAPTIONS = {"right.png": "قطة سوداء", "joined.png": "café", "escape.png": "[31m{{7*7}}<script>"}


def outcomes(version) -> dict[str, dict]:
    return {it["id"].split("#", 1)[1]: it for it in read_outcomes(version)}


def stored(version) -> dict[str, shards.ShardSample]:
    return {
        sample.meta["source"].split("#", 1)[1]: sample
        for shard in version.shards
        for sample in shards.read_shard(version.url("shards", f"{shard.name}.tar"))
    }


def test_each_row_of_the_table(tmp_path, monkeypatch):
    folder, ran = tmp_path / "in", tmp_path / "ghostscript ran"
    folder.mkdir()
    with (folder / "captions.jsonl").open("w") as table:
        for name, case in CASES.items():
            (folder / name).write_bytes(case.data)
            table.write(
                json.dumps({"file": name, "caption": case.caption, **dict(case.more)}) + "\n"
            )
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch '{ran}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    version = ingest([str(folder)], str(tmp_path / "set"), RULES).manifest
    found = {
        name: (f"{it['outcome']}:{it['reason']}", *it["flags"])
        for name, it in outcomes(version).items()
    }
    assert found == {name: (case.outcome, *case.flags) for name, case in CASES.items()}
    assert not ran.exists()
    kept = stored(version)
    assert {name: kept[name].captions for name in CAPTIONS} == {
        name: (caption,) for name, caption in CAPTIONS.items()
    }
    assert kept["as-expected.jpg"].meta["md5"] == MD5, "what upstream knew is kept"
    assert {"sha256", "md5"}.isdisjoint(kept["flipped.jpg"].meta)
    assert kept["zip.jpg"].image == JPEG
    assert not zipfile.is_zipfile(io.BytesIO(kept["zip.jpg"].image))


@pytest.mark.parametrize(("transform", "stored_as"), [(0, inverted), (2, ycck)])
@pytest.mark.parametrize(
    ("inks", "rgb"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((51, 102, 204, 51), (163, 122, 41)),  # (255 - ink) (255 - black) / 255
    ],
)
def test_adobes_inks_have_the_colour_that_is_meant(tmp_path, transform, stored_as, inks, rgb):
    """Bad input 11, by the bytes of the file alone: no library wrote it."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(adobe(transform, stored_as(*inks)))
    (folder / "a.txt").write_text("a colour")
    version = ingest([str(folder)], str(tmp_path / "set"), RULES).manifest
    sample = stored(version)["a.jpg"]
    with Image.open(io.BytesIO(sample.image)) as shown:
        assert (shown.mode, shown.size) == ("RGB", (24, 24))
        assert np.abs(np.asarray(shown, int) - rgb).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_animations_the_first_frame_or_nothing_as_the_rule_says(tmp_path, format):
    folder, dataset = tmp_path / "in", str(tmp_path / "set")
    folder.mkdir()
    (folder / "moving.png").write_bytes(animated(format))
    (folder / "still.png").write_bytes(picture(1))
    for name in ("moving", "still"):
        (folder / f"{name}.txt").write_text("a picture")
    version = ingest([str(folder)], dataset, RULES).manifest
    assert outcomes(version)["moving.png"]["flags"] == ["animated"]
    shown = Image.open(io.BytesIO(stored(version)["moving.png"].image))
    assert getattr(shown, "n_frames", 1) == 1
    assert np.abs(np.asarray(shown.convert("RGB"), int) - (255, 0, 0)).max() <= 3
    version = ingest([str(folder)], dataset, replace(RULES, animated="reject")).manifest
    found = {name: (it["outcome"], it["reason"]) for name, it in outcomes(version).items()}
    assert found == {"moving.png": ("rejected", "animated"), "still.png": ("kept", "")}
    assert version.counts["rejected:animated"] == 1
    assert stored(version).keys() == {"still.png"}


# ---- captions, wherever they come from -----------------------------------------------------------

LATIN, LONG = b"caf\xe9", "é".encode() * 5_000_000


def jsonl(folder: Path, caption: bytes) -> None:
    (folder / "captions.jsonl").write_bytes(b'{"file": "a.png", "caption": "%s"}\n' % caption)


def table(folder: Path, caption: bytes) -> None:
    with (folder / "metadata.csv").open("w", errors="surrogateescape", newline="") as file:
        rows = [("file_name", "text"), ("a.png", caption.decode(errors="surrogateescape"))]
        csv.writer(file).writerows(rows)


def parquet(folder: Path, caption: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([caption], pa.binary()).view(pa.string())  # says that it is UTF-8
    pq.write_table(pa.table({"file": ["a.png"], "caption": text}), folder / "table.parquet")


def parquet_of_lists(folder: Path, caption: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.ListArray.from_arrays([0, 1], pa.array([caption], pa.binary()).view(pa.string()))
    pq.write_table(pa.table({"file": ["a.png"], "captions": text}), folder / "table.parquet")


def sidecar(folder: Path, caption: bytes) -> None:
    (folder / "a.txt").write_bytes(caption)


def tar_of(folder: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tar_text(folder: Path, caption: bytes) -> None:
    tar_of(folder, {"a.png": picture(1), "a.txt": caption})


def tar_json(folder: Path, caption: bytes) -> None:
    tar_of(folder, {"a.png": picture(1), "a.json": b'{"caption": "%s"}' % caption})


WAYS = [jsonl, table, parquet, parquet_of_lists, sidecar, tar_text, tar_json]


@pytest.mark.parametrize("way", WAYS, ids=lambda it: it.__name__)
@pytest.mark.parametrize(
    ("caption", "said", "flag"),
    [(LATIN, "caf\ufffd", "caption_replaced"), (LONG, "é" * 2000, "caption_cut")],
    ids=["not UTF-8", "10 MB"],
)
def test_captions_that_are_no_text_or_too_much(tmp_path, way, caption, said, flag):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    way(folder, caption)
    url = next(iter(folder.glob("*.parquet")), folder)
    version = ingest([str(url)], str(tmp_path / "set"), RULES).manifest
    (sample,), (row,) = stored(version).values(), read_outcomes(version)
    assert (sample.captions, row["flags"]) == ((said,), [flag])


# ---- members that are code -----------------------------------------------------------------------


def test_nothing_in_a_tar_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    code = pickle.dumps(Hostile())
    members = {"a.png": picture(1), "a.txt": b"good company"}
    for extension in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "tb", "mp", "cbor"):
        members |= {f"a.{extension}": code, f"b{extension}.{extension}": code}
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in", members)
    version = ingest([str(tmp_path / "in")], str(tmp_path / "set"), RULES).manifest
    assert not (tmp_path / "owned").exists()
    found = outcomes(version)
    assert found.pop("x.tar/a")["flags"] == ["member_refused"]
    assert {(it["outcome"], it["reason"]) for it in found.values()} == {("rejected", "incomplete")}
    assert len(found) == 11


# ---- colours of ink ------------------------------------------------------------------------------

PAPER, INK = (96.0, 0.0, 0.0), (40.0, 30.0, -50.0)
"""L*a*b* of nothing and of full cyan on the press of the profile below."""


def press() -> bytes:
    """A CMYK profile on which cyan prints violet: a table (lut8) of its 16 corners."""

    def lab(value: tuple[float, float, float]) -> bytes:
        return bytes((round(value[0] * 255 / 100), round(value[1] + 128), round(value[2] + 128)))

    inks = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    corners = [
        INK if it == (1, 0, 0, 0) else PAPER if not any(it) else (10.0, 0.0, 0.0) for it in inks
    ]
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4
    lut += b"".join(map(lab, corners)) + ramp * 3
    text = b"Press\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0"
        + struct.pack(">3i", *(round(it * 65536) for it in (0.9642, 1, 0.8249))),
        b"A2B0": lut,
    }
    offset = 128 + 4 + 12 * len(tags)
    listed, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        listed += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = bytearray(128)
    header[8:12] = b"\x02\x10\0\0"
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", *(round(it * 65536) for it in (0.9642, 1, 0.8249)))
    header[:4] = struct.pack(">I", 128 + len(listed) + len(body))
    return bytes(header) + listed + body


def srgb(lab: tuple[float, float, float]) -> np.ndarray:
    """Of a colour under D50 (CIE 1976; the matrix is Bradford's, D50 to sRGB)."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(np.array(matrix) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("ink", "wanted"), [((255, 0, 0, 0), INK), ((0, 0, 0, 0), PAPER)])
def test_inks_show_as_their_profile_says(ink, wanted):
    out = io.BytesIO()
    Image.new("CMYK", (16, 16), ink).save(out, "JPEG", quality=100, icc_profile=press())
    image, info = images.decode(out.getvalue())
    assert info["flags"] == ["icc_converted"]
    seen = np.asarray(image)[8, 8].astype(float)
    white = 255 if wanted is PAPER else None  # the paper may be shown as the screen's white
    assert np.abs(seen - srgb(wanted)).max() <= 6 or (white and (seen == white).all()), seen
