"""Whatever the file: a correct upright sRGB picture, or a reason."""

import io
import json
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline import images
from pipeline.images import DecodePolicy, Rejected, buckets, decode, fit, nearest, sniff, store


def picture(width=48, height=32, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def reason(data, **policy):
    with pytest.raises(Rejected) as caught:
        decode(data, DecodePolicy(**policy))
    return caught.value.reason


JPEG = saved(picture(), "JPEG", quality=95)
PNG = saved(picture(), "PNG")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not_image"),
        (b"<html><body>404 Not Found</body></html>", "not_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "format"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "format"),
        (b"%PDF-1.7\n", "format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "format"),
        (JPEG[:20], "truncated"),
        (JPEG[: len(JPEG) * 6 // 10], "truncated"),
        (PNG[: len(PNG) * 6 // 10], "truncated"),
        (saved(picture(), "WEBP")[:-30], "truncated"),
        (saved(picture(), "BMP")[:200], "truncated"),
        (png(60_000, 60_000), "too_large"),
        (png(10_000, 10_000, chunk(b"IDAT", zlib.compress(bytes(100)))), "too_large"),
        (png(20_000, 20_000), "too_large"),
        (png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))), "bomb"),
        (saved(Image.new("F", (8, 8)), "TIFF"), "mode"),
        (saved(Image.new("I", (8, 8)), "TIFF"), "mode"),
        (saved(Image.new("LAB", (8, 8)), "TIFF"), "mode"),
    ],
    ids=lambda it: it if isinstance(it, str) else None,
)
def test_reasons(data, expected):
    assert reason(data) == expected


def test_one_corrupt_byte_in_png_data_is_corrupt():
    data = bytearray(PNG)
    data[PNG.index(b"IDAT") + 40] ^= 0xFF
    assert reason(bytes(data)) == "corrupt"


def test_limits_of_the_policy():
    assert reason(JPEG, max_bytes=len(JPEG) - 1) == "too_many_bytes"
    assert reason(JPEG, max_pixels=48 * 32 - 1) == "too_large"
    assert reason(JPEG, formats=("PNG",)) == "format"
    decode(JPEG, DecodePolicy(max_bytes=len(JPEG), max_pixels=48 * 32))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(orientation, format):
    """The pixels of a file, turned as its tag says, are the upright picture."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste((200, 0, 0), (0, 0, 16, 16))  # one red corner, top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposes, inverted
    lying = upright
    if orientation > 1:
        lying = upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, info = decode(saved(lying, format, exif=exif, quality=95))
    assert image.size == (info["width"], info["height"]) == (48, 32)
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[4:12, 4:12] - (200, 0, 0)).max() < 40
    assert np.abs(pixels[20:, 20:] - 255).max() < 40
    kept = format in ("JPEG", "PNG", "WEBP") and orientation == 1
    assert bool(info["plain"]) == kept


def test_transparency_shows_the_background_and_nothing_hidden():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., :3] = (10, 200, 30)
    pixels[:2, :, 3], pixels[2, :, 3] = 0, 128
    pixels[3, :, 3] = 255
    grey = Image.fromarray(pixels).convert("LA")
    palette = Image.fromarray(pixels[..., 0], "L").convert("P")
    palette.putdata([1, 2, 3, 4] * 4)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for background in ((255, 255, 255), (0, 0, 200)):
        policy = DecodePolicy(background=background)
        image, info = decode(saved(Image.fromarray(pixels), "PNG"), policy)
        got = np.asarray(image)
        assert (got[:2] == background).all()
        assert (got[3] == (10, 200, 30)).all()
        half = (np.array((10, 200, 30)) + background) / 2
        assert np.abs(got[2] - half).max() <= 1.5
        assert (info["plain"], info["flags"]) == (0, ["alpha"])
        assert (np.asarray(decode(saved(grey, "PNG"), policy)[0])[:2] == background).all()
        got = np.asarray(decode(saved(palette, "PNG", transparency=2), policy)[0])
        assert (got[:, 1] == background).all()
        assert (got[:, 0] == (255, 0, 0)).all()
        rgb_key = saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
        assert (np.asarray(decode(rgb_key, policy)[0]) == background).all()


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(8, 0)
    for format in ("PNG", "TIFF"):
        image, info = decode(saved(Image.fromarray(ramp), format))
        got = np.asarray(image).astype(int)
        assert np.abs(got[0, :, 0] - np.arange(256)).max() <= 1
        assert (got[..., 0] == got[..., 2]).all()
        assert info["flags"] == ["sixteen_bit"]
        assert info["plain"] == 0


def test_sixteen_bit_colour_is_not_kept_as_it_is():
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32768, 0) * 4 for _ in range(4))
    data = png(4, 4, chunk(b"IDAT", zlib.compress(rows)), depth=16)
    image, info = decode(data)
    assert np.abs(np.asarray(image).astype(int) - (255, 128, 0)).max() <= 1
    assert info["plain"] == 0


def test_cmyk_goes_through_to_srgb():
    """Pure inks, and the inversion that Adobe's JPEGs have."""
    inks = {
        (0, 0, 0, 0): (255, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 255, 255, 0): (255, 0, 0),
        (255, 0, 255, 0): (0, 255, 0),
    }
    for ink, rgb in inks.items():
        image, info = decode(saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
        assert np.abs(np.asarray(image).astype(int) - rgb).max() <= 4
        assert info["plain"] == 0


def display_p3():
    """A wide-gamut profile, made by hand: Display P3 primaries (D50-adapted) and a gamma of 2.2."""
    columns = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
        b"wtpt": (0.96420, 1.0, 0.82491),
    }
    fixed = lambda it: struct.pack(">i", round(it * 65536))
    tags = {
        name: b"XYZ \0\0\0\0" + b"".join(map(fixed, values)) for name, values in columns.items()
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    text = b"Wide\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79)
    tags[b"cprt"] = b"text\0\0\0\0none\0"
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = bytearray(128)
    header[8:12] = b"\x02\x10\0\0"
    header[12:24] = b"mntrRGB XYZ "
    header[36:40] = b"acsp"
    header[68:80] = b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    header[:4] = struct.pack(">I", 128 + len(table) + len(body))
    return bytes(header) + table + body


def test_wide_gamut_is_converted():
    """P3 green (0.3, 0.7, 0.3) is outside of sRGB: the same light needs less red, more green."""
    data = saved(Image.new("RGB", (16, 16), (77, 179, 77)), "PNG", icc_profile=display_p3())
    image, info = decode(data)
    red, green, blue = np.asarray(image)[8, 8].astype(int)
    assert red < 77 - 20
    assert green > 179
    assert blue < 77
    assert info["flags"] == ["icc_converted"]
    assert info["plain"] == 0
    grey = saved(Image.new("RGB", (16, 16), (128, 128, 128)), "PNG", icc_profile=display_p3())
    assert np.ptp(np.asarray(decode(grey)[0])[8, 8]) <= 2


def test_profiles_that_say_srgb_change_nothing_and_broken_ones_are_counted():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(picture(), "PNG", icc_profile=srgb)
    image, info = decode(data)
    assert info["plain"] == len(data)
    assert (np.asarray(image) == np.asarray(picture())).all()
    image, info = decode(saved(picture(), "PNG", icc_profile=b"no profile at all" * 20))
    assert info["flags"] == ["icc_ignored"]
    assert (np.asarray(image) == np.asarray(picture())).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame_or_are_refused(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    image, info = decode(data)
    assert (np.asarray(image) == (255, 0, 0)).all()
    assert info["flags"] == ["animated"]
    assert info["plain"] == 0
    assert reason(data, animated="reject") == "animated"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_original_is_kept_without_its_tail(format):
    data = saved(picture(), format, quality=90)
    for tail in (b"", b"PK\x03\x04 a ZIP archive", b"\xff\xd9 once more \xff\xd9"):
        image, info = decode(data + tail)
        assert info["flags"] == (["trailing_bytes"] if tail else [])
        _, stored, ext = store(image, data + tail, info, 0)
        assert stored == data
        assert ext == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[format]
        assert store(image, data + tail, info, 32)[1] == data
        assert store(image, data + tail, info, 31)[1] != data


def test_progressive_and_odd_jpegs_end_where_they_end():
    for options in ({"progressive": True}, {"restart_marker_blocks": 2}, {"comment": b"\xff\xd9"}):
        data = saved(picture(200, 120), "JPEG", **options)
        assert decode(data + b"\xff\xd9tail")[1]["plain"] == len(data)
    grey = saved(picture().convert("L"), "JPEG")
    assert decode(grey)[1]["plain"] == len(grey)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (65, 900)])
def test_resized_pictures_have_the_wanted_shorter_side(size):
    for format, ext in (("JPEG", "jpg"), ("PNG", "png"), ("BMP", "png"), ("WEBP", "jpg")):
        data = saved(picture(*size), format)
        image, info = decode(data, DecodePolicy(draft_side=40))
        assert (info["width"], info["height"]) == size
        image, stored, got = store(image, data, info, 40)
        again = Image.open(io.BytesIO(stored))
        assert min(again.size) == min(image.size) == 40
        assert abs(max(again.size) - max(size) * 40 / min(size)) <= 0.5
        assert got == ext


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(900, 600), (851, 567), (567, 851), (521, 833)])
def test_a_draft_is_where_a_full_decode_is(size, orientation):
    """Reduced inside the JPEG decoder, odd sides end within a pixel: half of one off is 32 dB."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 9, size[0] // 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(coarse.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=92, exif=exif)
    full, info = decode(data)
    draft, about = decode(data, DecodePolicy(draft_side=256))
    assert min(draft.size) == -(-min(size) // 2)
    assert full.size == (info["width"], info["height"]) == (about["width"], about["height"])
    wanted, found = (
        np.asarray(store(image, data, it, 256)[0]).astype(float)
        for image, it in ((full, info), (draft, about))
    )
    assert 10 * np.log10(255**2 / np.square(found - wanted).mean()) > 38


def test_fit_crops_the_centre():
    image = Image.new("RGB", (90, 30), "red")
    image.paste((0, 0, 255), (30, 0, 60, 30))
    pixels = fit(image, 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    whole = np.asarray(image.resize((30, 10), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - whole[:, :, 10:20]).max() <= 2
    square = picture(10, 10)
    assert (fit(square, 10) == np.asarray(square).transpose(2, 0, 1)).all()
    assert fit(square, 23).shape == (3, 23, 23)
    np.testing.assert_array_equal(fit(image, (10, 10)), pixels)


@pytest.mark.parametrize(
    ("size", "to", "whole", "inside"),
    [
        ((90, 30), (20, 10), (30, 10), (slice(None), slice(5, 25))),  # the sides cut off
        ((60, 60), (20, 10), (20, 20), (slice(5, 15), slice(None))),  # top and bottom cut off
        ((60, 30), (20, 10), (20, 10), (slice(None), slice(None))),
        ((30, 60), (40, 80), (40, 80), (slice(None), slice(None))),
    ],
)
def test_fit_covers_a_bucket_without_distortion(size, to, whole, inside):
    image = picture(*size)
    pixels = fit(image, to)
    assert pixels.shape == (3, to[1], to[0])
    wanted = np.asarray(image.resize(whole, Image.Resampling.LANCZOS))[inside].transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - wanted).max() <= 2


@given(st.integers(1, 40), st.integers(1, 32), st.floats(1, 5))
def test_buckets_are_about_as_large_as_the_square(times, multiple, most):
    side = times * multiple
    table = buckets(side, multiple=multiple, max_aspect=most)
    assert (side, side) in table
    assert len(set(table)) == len(table)
    assert {(height, width) for width, height in table} == set(table)
    aspects = [width / height for width, height in table]
    assert aspects == sorted(aspects)
    assert max(aspects) <= most
    for width, height in table:
        assert width % multiple == height % multiple == 0
        assert abs(width * height - side**2) <= max(width, height) * multiple / 2


def test_known_buckets():
    wide = [(1088, 960), (1152, 896), (1216, 832), (1280, 832), (1344, 768), (1408, 768)]
    tall = [(height, width) for width, height in reversed(wide)]
    assert buckets(1024, multiple=64) == (*tall, (1024, 1024), *wide)
    assert buckets(64, multiple=16, max_aspect=1) == ((64, 64),)
    for wrong in ({"multiple": 48}, {"multiple": 0}, {"multiple": 16, "max_aspect": 0.5}):
        with pytest.raises(ValueError, match="side must be a multiple"):
            buckets(64, **wrong)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_nearest_bucket_is_that_by_log_aspect(width, height):
    table = buckets(512, multiple=64, max_aspect=3)
    chosen = table[nearest(table, width, height)]
    apart = [abs(np.log(w / h) - np.log(width / height)) for w, h in table]
    assert abs(np.log(chosen[0] / chosen[1]) - np.log(width / height)) <= min(apart) + 1e-12
    mirrored = table[nearest([(h, w) for w, h in table], height, width)]
    assert mirrored == chosen


def test_of_two_buckets_as_near_the_first_is_taken():
    assert nearest([(2, 1), (1, 2)], 7, 7) == 0
    assert nearest([(1, 2), (2, 1)], 7, 7) == 0
    assert nearest([(1, 1), (4, 1)], 2, 1) == nearest([(4, 1), (1, 1)], 2, 1) == 0


def test_sniff_knows_what_it_allows():
    for format in DecodePolicy().formats:
        assert sniff(saved(picture(), format)) == format


def test_real_malformed_files(real_data):
    """All 226 end as a picture or with a reason, in one process of at most 1 GiB."""
    folder = real_data("malformed")
    code = (
        "import json, resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from pipeline import dedup, images; out = {}\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    data = path.read_bytes()\n"
        "    try:\n"
        "        image, info = images.decode(data, images.DecodePolicy(draft_side=64))\n"
        "        image, stored, ext = images.store(image, data, info, 64)\n"
        "        again, _ = images.decode(stored); dedup.looks([dedup.thumbnail(image)])\n"
        "        assert again.mode == image.mode == 'RGB' and again.size == image.size\n"
        "        out[path.name] = 'kept'\n"
        "    except images.Rejected as rejected:\n"
        "        out[path.name] = rejected.reason\n"
        "print(json.dumps(out))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder / "files")], capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    outcomes = json.loads(ran.stdout)
    assert len(outcomes) == 226
    listed = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    for it in listed:
        outcome = outcomes[it["file"].removeprefix("files/")]
        if not it["ok"]:
            assert outcome != "kept", it
        elif it["format"] in ("JPEG", "PNG", "WEBP", "GIF", "BMP") and it["size"] != [8289, 8192]:
            assert outcome == "kept" or "not_image" in outcome, (it, outcome)
    assert outcomes["045_png_decompression_dos.png"] == "bomb"
    assert outcomes["120_id_000678_src_000131_op_havoc_rep_16.gif"] == "too_large"
    assert outcomes["139_10ct_32bit_128.tiff"] == "mode"
    assert sum(outcome == "kept" for outcome in outcomes.values()) >= 118


def test_real_orientation_files_show_one_picture(real_data):
    folder = real_data("malformed") / "files"
    for kind in ("Landscape", "Portrait"):
        pictures = [decode(path.read_bytes()) for path in sorted(folder.glob(f"*_{kind}_*.jpg"))]
        assert len(pictures) >= 8
        sizes = {image.size for image, _ in pictures}
        assert len(sizes) == 1
        first = fit(pictures[0][0], 32).astype(float)
        for image, _ in pictures:  # not byte-equal: each file is an encoding of its own
            assert np.abs(fit(image, 32) - first).mean() < 20


def fuzzed(rng, data):
    """The data with a few bytes flipped, cut, doubled or blown up."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, len(data)))
        match rng.integers(0, 5):
            case 0:
                data[at] = rng.integers(0, 256)
            case 1:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.bytes(int(rng.integers(1, 20)))
            case 4:
                data[at : at + 4] = b"\xff\xff\xff\xff"
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_files_never_do_more_than_be_rejected(count):
    rng = np.random.default_rng(7)
    small = picture(24, 16)
    files = [saved(small, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    files += [
        saved(small.convert("P"), "PNG"),
        saved(small.convert("RGBA"), "PNG"),
        saved(small, "TIFF", compression="tiff_lzw"),
        saved(small, "JPEG", progressive=True, icc_profile=display_p3()),
    ]
    outcomes = {"kept": 0, "rejected": 0}
    for index in range(count):
        data = fuzzed(rng, files[index % len(files)])
        try:
            image, info = decode(data, DecodePolicy(max_pixels=1_000_000))
            image, stored, _ = store(image, data, info, 12)
            assert decode(stored)[0].size == image.size
            outcomes["kept"] += 1
        except Rejected:
            outcomes["rejected"] += 1
    assert sum(outcomes.values()) == count
    assert min(outcomes.values()) > count // 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB


def test_rejected_details_are_text():
    assert Rejected("x", "\udcff" * 300).detail == "\\udcff" * 200
    assert images.Rejected("x").reason == "x"


@pytest.mark.parametrize("size", [(384, 256), (97, 61), (9, 8), (700, 500)])
def test_resizing_is_that_of_pillow(size):
    """The fast library against the one whose filters are the measure: a level or so, also where the
    box ends within a pixel.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = Image.fromarray(coarse).resize((425, 284), Image.Resampling.BICUBIC)
    box = (0.5, 0.0, 425.0, 283.5)
    for kind, filter in (("lanczos3", "LANCZOS"), ("box", "BOX")):
        found = np.asarray(images.resized(image, size, kind, box), int)
        wanted = np.asarray(image.resize(size, Image.Resampling[filter], box=box), int)
        assert np.mean(np.abs(found - wanted)) < 0.3
        assert np.mean(np.abs(found - wanted) > 2) < 0.002
