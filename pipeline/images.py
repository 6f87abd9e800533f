"""Every file is hostile until decoded: signature, format allow-list and pixel count come before any
decoder runs.

What comes out is one upright 8-bit sRGB picture without alpha, or `Rejected` with a reason code:

    not_image          no signature we know (empty, HTML, text)
    format             known, but not allowed (EPS, PDF, SVG, HEIC, ...): no decoder is started
    too_large          more pixels than allowed, by its header
    too_many_bytes     the file itself is larger than allowed
    bomb               compressed metadata that expands beyond reason
    truncated          ends before its end marker
    corrupt            anything else a decoder objects to
    mode               pixels without a defined 8-bit meaning (float, 32-bit integers, Lab)
    animated           several frames, where the policy refuses them
"""

from __future__ import annotations

import functools
import io
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cykooz_resizer as fast  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from PIL import Image, ImageCms, ImageFile

from .outcomes import Rejected

Image.preinit()  # JPEG, PNG, GIF, BMP; the rest by name: Image.init() would load every plugin
for _plugin in ("WebPImagePlugin", "TiffImagePlugin", "AvifImagePlugin"):
    __import__(f"PIL.{_plugin}")
assert not ImageFile.LOAD_TRUNCATED_IMAGES, "half a picture must be an error"

_SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBP", "WEBP"),
        (rb"GIF8[79]a", "GIF"),
        (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
        (rb"....ftyp(avif|avis)", "AVIF"),
        (rb"....ftyp", "HEIC or a video"),
        (rb"%PDF", "PDF"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
        (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "SVG"),
        (rb"8BPS", "PSD"),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
        (rb"\0\0[\1\2]\0", "ICO"),
        (rb"DDS ", "DDS"),
        (rb"qoif", "QOI"),
        (rb"SIMPLE  =", "FITS"),
        (rb"P[1-7f][\s]", "PNM"),
    )
)
_EIGHT_BIT_MODES = frozenset(
    ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_PLACES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_OBJECT = re.compile(" <[^<>]* object at 0x[0-9a-f]+>")  # another one in every run
_RESIZER: Any = fast.Resizer()
_OPTIONS: dict[str, Any] = {
    name: fast.ResizeOptions(
        resize_alg=fast.ResizeAlg.convolution(getattr(fast.FilterType, name)), use_alpha=False
    )
    for name in ("lanczos3", "box")
}
_MAX_ICC_BYTES = 4 << 20
_MAX_JPEG_SIDE = 65_500  # libjpeg reads 65,535 and writes less


@dataclass(frozen=True, kw_only=True)
class DecodePolicy:
    """What may be decoded, and how."""

    kind: Literal["decode"] = "decode"
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    max_bytes: int = 100_000_000
    max_pixels: int = 50_000_000
    """By the header, before decoding; RGBA at this size stays under 1 GB with all its copies."""
    background: tuple[int, int, int] = (255, 255, 255)
    """sRGB colour behind transparent pixels."""
    animated: Literal["first", "reject"] = "first"
    draft_side: int = 0
    """JPEGs may be decoded at a reduced scale whose shorter side is at least this; 0 means always
    in full.
    """


STORED = DecodePolicy(max_bytes=sys.maxsize, max_pixels=sys.maxsize)
"""For pictures of our own shards: what let them in was a rule of another time, which may have
allowed more."""


def sniff(data: bytes) -> str | None:
    """The format by its first bytes, None when they are none we know."""
    head = data[:512]
    return next((name for pattern, name in _SIGNATURES if pattern.match(head)), None)


def decode(data: bytes, policy: DecodePolicy | None = None) -> tuple[Image.Image, dict[str, Any]]:
    """An upright 8-bit sRGB picture and what is known about its file.

    The info holds width and height (of the file's picture, upright, even where `draft_side` made
    the decoded one smaller), extent (the box of the decoded picture that these fill: at a reduced
    scale they may end within a pixel), format, flags (sorted names of what was done or ignored) and
    `plain`: how many of the file's bytes show just this picture and nothing else, or 0 when it had
    to be converted. Raises `Rejected`.
    """
    policy = policy or DecodePolicy()
    if len(data) > policy.max_bytes:
        raise Rejected("too_many_bytes", f"{len(data)} bytes, allowed {policy.max_bytes}")
    name = sniff(data)
    if name is None:
        raise Rejected("not_image", f"starts with {data[:16]!r}" if data else "empty file")
    if name not in policy.formats:
        raise Rejected("format", f"{name}; allowed: {', '.join(policy.formats)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; flags say what matters
        try:
            return _decode(data, name, policy)
        except Rejected:
            raise
        except Image.DecompressionBombError as error:
            raise Rejected("too_large", str(error)) from None
        except MemoryError:
            raise Rejected("too_large", "out of memory while decoding") from None
        except Exception as error:  # OSError, ValueError, SyntaxError, struct.error and others
            said = _OBJECT.sub("", f"{type(error).__name__}: {error}")
            raise Rejected(_why(data, name, error), said) from None


def buckets(side: int, *, multiple: int, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """(width, height) pairs of about side^2 pixels, from tall to wide: the square, and for each
    longer side the shorter one that comes nearest to that area, both multiples of `multiple` and
    their ratio at most `max_aspect`.

    `multiple` is at least what the networks divide a side by (an autoencoder's reduction times a
    transformer's patch); with a larger one there are fewer buckets, and more is cropped away.
    """
    if multiple < 1 or side < 1 or side % multiple or max_aspect < 1:
        raise ValueError(
            f"buckets: side must be a multiple of multiple, and max_aspect at least 1, "
            f"got {side}, {multiple} and {max_aspect:g}"
        )
    wide: list[tuple[int, int]] = []
    for width in range(side + multiple, int(side * max_aspect) + 1, multiple):
        height = round(side * side / width / multiple) * multiple
        if height and width / height <= max_aspect:
            wide.append((width, height))
    tall = [(height, width) for width, height in reversed(wide)]
    return (*tall, (side, side), *wide)


def nearest(sizes: Sequence[tuple[int, int]], width: int, height: int) -> int:
    """Which of `sizes` is nearest to a picture's aspect ratio, by its logarithm; the first of two
    that are as near.
    """

    def apart(number: int) -> float:
        wide, high = sizes[number]
        across, down = wide * height, high * width  # whole numbers: the same on every machine
        return max(across / down, down / across)

    return min(range(len(sizes)), key=apart)


def fit(image: Image.Image, side: int | tuple[int, int]) -> np.ndarray:
    """uint8 [3, height, width]: resized (Lanczos, antialiased) to just cover a square of `side`, or
    a given (width, height), and cropped to the centre.
    """
    wide, high = (side, side) if isinstance(side, int) else side
    width, height = image.size
    if (width, height) != (wide, high):
        across, down = min(width, height * wide / high), min(height, width * high / wide)
        left, top = (width - across) / 2, (height - down) / 2
        image = image.resize(
            (wide, high), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down)
        )
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def store(
    image: Image.Image, data: bytes, info: dict[str, Any], max_side: int
) -> tuple[Image.Image, bytes, str]:
    """What goes into a shard: the picture, its file and the file's extension.

    A picture whose shorter side exceeds `max_side` (0: no limit) is reduced to that. The original
    bytes are kept where nothing had to change, without what trails them; else lossy files become
    JPEG (quality 95, 4:4:4) and lossless ones (and those too long for a JPEG) PNG.
    """
    short = min(info["width"], info["height"])
    if info["plain"] and not 0 < max_side < short:
        return (
            image,
            data[: info["plain"]],
            {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[info["format"]],
        )
    if 0 < max_side < short:
        scale = max_side / short
        size = (max(1, round(info["width"] * scale)), max(1, round(info["height"] * scale)))
        image = resized(image, size, "lanczos3", info["extent"])
    lossy = info["format"] in ("JPEG", "AVIF") or (
        info["format"] == "WEBP" and data[12:16] != b"VP8L"
    )
    lossy = lossy and max(image.size) <= _MAX_JPEG_SIDE
    return image, encode(image, "jpg" if lossy else "png"), "jpg" if lossy else "png"


def resized(
    image: Image.Image,
    size: tuple[int, int],
    kind: Literal["lanczos3", "box"],
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The box (left, top, right, bottom) of an RGB picture at another size. The filters are
    Pillow's, 57 dB from its own; vector instructions make them five times as fast.
    """
    options = _OPTIONS[kind]
    if box and box != (0, 0, *image.size):
        left, top, right, bottom = box
        options = options.copy()
        options.crop_box = fast.CropBox(left, top, right - left, bottom - top)
    out = Image.new("RGB", size)
    _RESIZER.resize_pil(image, out, options)
    return out


def encode(image: Image.Image, ext: Literal["jpg", "png"]) -> bytes:
    """A file of an RGB picture, without metadata."""
    out = io.BytesIO()
    if ext == "jpg":
        image.save(out, "JPEG", quality=95, subsampling=0, exif=b"", icc_profile=None)
    else:
        image.save(out, "PNG", compress_level=1, exif=b"", icc_profile=None)
    return out.getvalue()


def _decode(data: bytes, name: str, policy: DecodePolicy) -> tuple[Image.Image, dict[str, Any]]:
    flags: set[str] = set()
    image = Image.open(io.BytesIO(data), formats=[name])
    width, height = image.size
    if width * height > policy.max_pixels:
        raise Rejected("too_large", f"{width} x {height} pixels, allowed {policy.max_pixels}")
    if image.mode not in _EIGHT_BIT_MODES and not _is_sixteen_bit(image, name):
        raise Rejected("mode", f"{name} of mode {image.mode}")
    if name in ("GIF", "PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False):
        if policy.animated == "reject":
            raise Rejected("animated", f"{name} of several frames")
        flags.add("animated")
    short, over = min(width, height), (0.0, 0.0)
    if name == "JPEG" and 0 < policy.draft_side < short:
        # The 1/2, 1/4, 1/8 scales of the inverse DCT: five times faster on photographs, low-passed,
        # not decimated.
        side = policy.draft_side
        if draft := image.draft(None, (-(-width * side // short), -(-height * side // short))):
            over = (image.width - draft[1][2], image.height - draft[1][3])
    image.load()
    if name != "JPEG":
        width, height = image.size  # TIFFs turn themselves upright while loading
    plain = _end(data, name) or 0
    if 0 < plain < len(data):
        flags.add("trailing_bytes")
    if (
        image.mode not in ("RGB", "L", "P")
        or "animated" in flags
        or (name == "PNG" and data[24] > 8)
    ):
        plain = 0
    orientation = _orientation(image, flags)
    if orientation in _TRANSPOSE:
        flags.add("transposed")
        image = image.transpose(_TRANSPOSE[orientation])
        if orientation >= 5:
            (width, height), over = (height, width), over[::-1]
    left, top = over[0] * (orientation in (2, 3, 6, 7)), over[1] * (orientation in (3, 4, 7, 8))
    colour, alpha = _colour(image, flags)
    if alpha is not None or flags & {"transposed", "icc_converted", "icc_ignored"}:
        plain = 0
    if alpha is not None and alpha.getextrema() != (255, 255):
        flags.add("alpha")
        ground = Image.new("RGB", colour.size, policy.background)
        ground.paste(colour, mask=alpha)
        colour = ground
    return colour, {
        "width": width,
        "height": height,
        "extent": (left, top, left + image.width - over[0], top + image.height - over[1]),
        "format": name,
        "flags": sorted(flags),
        "plain": plain,
    }


def _is_sixteen_bit(image: Image.Image, name: str) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and name == "PNG")


def _orientation(image: Image.Image, flags: set[str]) -> int:
    if not any(name in image.info for name in _EXIF_PLACES):
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF is no reason to lose a picture that decodes
        flags.add("exif_ignored")
        return 1


def _colour(image: Image.Image, flags: set[str]) -> tuple[Image.Image, Image.Image | None]:
    """sRGB colours, and the alpha channel where there is one."""
    profile, mode = image.info.get("icc_profile"), image.mode
    if mode not in _EIGHT_BIT_MODES:
        flags.add("sixteen_bit")
        if profile:
            flags.add("icc_ignored")
        wide = np.asarray(image).astype(np.uint32).clip(0, 65535)
        grey = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8), "L")
        return grey.convert("RGB"), None
    alpha = None
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif mode in ("P", "1", "YCbCr", "RGBX"):
        image = image.convert("RGB")
    if profile:
        try:
            transform = _to_srgb(profile, image.mode)
            if transform is None:
                return image.convert("RGB"), alpha
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None
            flags.add("icc_converted")
            return converted, alpha
        except Exception:  # lcms refuses broken profiles and those of another colour space
            flags.add("icc_ignored")
    return image if image.mode == "RGB" else image.convert("RGB"), alpha


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None where the profile is sRGB already."""
    if len(profile) > _MAX_ICC_BYTES:
        raise ValueError("profile of more than 4 MiB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and ImageCms.getProfileDescription(source).strip().lower().startswith("srgb"):
        return None
    cms: Any = ImageCms
    return cms.buildTransform(source, cms.createProfile("sRGB"), mode, "RGB")


def _why(data: bytes, name: str, error: Exception) -> str:
    text = str(error).lower()
    if "too large" in text or "too much" in text:
        return "bomb"
    ends = name in _ENDS
    if (ends and _end(data, name) is None) or (not ends and ("truncat" in text or "eof" in text)):
        return "truncated"
    return "corrupt"


# ---- where a file ends ---------------------------------------------------------------------------

_JPEG_MARKER = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # in scan data: neither stuffing, restart nor fill


def _end(data: bytes, name: str) -> int | None:
    """How many bytes belong to the file by its own structure; None when it ends before that."""
    try:
        return _ENDS[name](data) if name in _ENDS else None
    except IndexError:
        return None


def _jpeg_end(data: bytes) -> int | None:
    position = 2
    while True:
        while data[position] == 0xFF and data[position + 1] == 0xFF:
            position += 1
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xD9:
            return position + 2
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == 0xDA:  # a scan: its entropy-coded data runs to the next true marker
                found = _JPEG_MARKER.search(data, position)
                if found is None:
                    return None
                position = found.start()
        else:
            position += 2


def _png_end(data: bytes) -> int | None:
    position = 8
    while position + 12 <= len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4], "big"),
            data[position + 4 : position + 8],
        )
        position += 12 + length
        if kind == b"IEND":
            return position if position <= len(data) else None
    return None


def _webp_end(data: bytes) -> int | None:
    size = 8 + int.from_bytes(data[4:8], "little")
    return size if size <= len(data) else None


_ENDS = {"JPEG": _jpeg_end, "PNG": _png_end, "WEBP": _webp_end}
