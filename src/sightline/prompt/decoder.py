"""Encoded pictures to upright RGB. The only module that opens an image.

A picture is judged by its first bytes and its header before a pixel of it is decoded. Whole-picture work is done in strips:
Pillow converts and composites without letting other threads run, a third of a second for a picture of 36 megapixels.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from sightline.errors import ImageError
from sightline.prompt.media import MediaLimits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)
# Reads that Pillow may make of one file. Its parsers read metadata piece by piece: a file of a million empty pieces would
# keep it busy for minutes. An ordinary picture takes some tens for the header, and one for each 8 KB of a PNG's pixels.
_HEADER_READS, _PIXEL_READS = 4096, 100_000
# Bytes that decoding takes for each pixel at its peak. Pillow holds most modes in 4 bytes, and so it does the RGB copy.
_PLAIN_COST = 8
# A third copy while it is turned, 16 bits at once as numbers, or the coefficients of a progressive JPEG's three channels.
_COSTLY = 16
# libwebp's canvas and the one before, the bytes that it hands over, and Pillow's picture made of them; libwebp stays for the
# next frame.
_WEBP_COST = 20
# Each scan of a progressive JPEG goes over the whole picture; encoders write about ten.
_MAX_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_STRIP_PIXELS = 1 << 20

_EXIF_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """What the first bytes of a picture say. width, height: upright. cost: bytes that `decode` takes for each pixel at its peak."""

    width: int
    height: int
    cost: int


def probe(data: bytes, limits: MediaLimits, param: str | None = None) -> Header:
    """The header; no pixel is decoded. Raises `ImageError`."""
    with _open(data, limits, param) as image:
        turn = _orientation(image, data)
        width, height = image.size[::-1] if turn >= 5 else image.size
        return Header(width, height, _cost(image, turn))


def _cost(image: Image.Image, turn: int) -> int:
    if image.format == "WEBP":
        return _WEBP_COST
    is_plain = (
        image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK") and turn == 1 and "progressive" not in image.info
    )
    return _PLAIN_COST if is_plain else _COSTLY


def decode(data: bytes, limits: MediaLimits, param: str | None = None) -> Image.Image:
    """An upright RGB picture: orientation applied, transparency on white, 16 bits scaled to 8, first frame only."""
    with _open(data, limits, param) as image:
        # Pillow calls a JPEG with more pictures behind the first an MPO.
        if image.format in ("JPEG", "MPO") and _count_scans(data) > _MAX_SCANS:
            raise _unreadable(param)
        return _upright_rgb(image, _orientation(image, data), param)


def from_pil(image: Image.Image, limits: MediaLimits, param: str | None = None) -> Image.Image:
    """`decode` for a picture that a caller in this process holds as a PIL image, of any mode."""
    if image.width < 1 or image.height < 1:
        raise ImageError("The image has no pixels.", code="image_parse_error", param=param)
    if image.width * image.height > limits.max_pixels:
        raise _too_many_pixels(limits, param)
    try:
        turn = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        # Broken metadata does not spoil a picture.
        turn = 1
    return _upright_rgb(image, turn, param)


def _upright_rgb(image: Image.Image, turn: int, param: str | None) -> Image.Image:
    try:
        image.load()
        rgb = _to_rgb(image)
        return rgb.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else rgb
    except Exception as error:
        # As in `_open`.
        raise _unreadable(param) from error


class _Reader(io.BytesIO):
    """A file that ends reading with an error after so many reads."""

    reads_left = _HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("too many pieces")
        return super().read(size)


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG's first picture; more than a file may have when it has too many other segments."""
    scans = 0
    position = 2
    for _ in range(_HEADER_READS):
        match = _JPEG_MARKER.search(data, position)
        if match is None or match.group() == b"\xff\xd9":
            return scans
        scans += match.group() == b"\xff\xda"
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return _MAX_SCANS + 1


def _open(data: bytes, limits: MediaLimits, param: str | None) -> Image.Image:
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "WEBP"
    if not data:
        raise ImageError("The image is empty.", code="empty_image_file", param=param)
    if kind is None:
        raise ImageError(
            "The data is not an image of a supported format; send JPEG, PNG, WebP, GIF or BMP.",
            code="invalid_image_format",
            param=param,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = _Reader(data)
            image = Image.open(reader, formats=[kind])
            reader.reads_left = _PIXEL_READS
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(limits, param) from error
    except Exception as error:
        # A client's bytes are all that is read here: whatever a parser makes of them, they are what is wrong.
        raise _unreadable(param) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise _unreadable(param)
    if width * height > limits.max_pixels:
        raise _too_many_pixels(limits, param)
    return image


# -- which way is up ---------------------------------------------------------------------------------------------------


def _orientation(image: Image.Image, data: bytes) -> int:
    """1 to 8 as EXIF counts them; broken metadata does not spoil a picture.

    Not `Image.getexif`: it decodes a whole PNG to find it, and reads (and warns about) every other tag.
    """
    exif = image.info.get("exif") or b""
    if not exif and image.format == "PNG":
        exif = _raw_profile(image.info.get("Raw profile type exif")) or _late_exif(data)
    turn = exif_orientation(exif)
    if turn is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
        turn = int(match[1]) if match else 1
    return turn if turn in _UPRIGHT else 1


def exif_orientation(exif: bytes) -> int | None:
    """The value of the tag (EXIF 2.32, 4.6.4 A), None when there is none; what is no TIFF has none."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", exif, entry)
        if tag == _EXIF_ORIENTATION and number == 1 and (form := {3: "H", 4: "I"}.get(kind)):
            return int(struct.unpack_from(order + form, exif, entry + 8)[0])
    return None


def _raw_profile(text: object) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text: a name and a length on lines of their own, then hexadecimal."""
    try:
        return bytes.fromhex("".join(str(text).split("\n")[3:])) if text else b""
    except ValueError:
        return b""


def _late_exif(png: bytes) -> bytes:
    """EXIF that follows the pixels, which PNG allows."""
    at = 8
    for _ in range(_PIXEL_READS):
        length, name = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        if name == b"eXIf":
            return png[at + 8 : at + 8 + length]
        if len(name) < 4 or name == b"IEND":
            break
        at += 12 + length
    return b""


# -- pixels ------------------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _scale_down(image)
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else _in_strips(image, lambda strip: strip.convert("RGB"))


def _in_strips(image: Image.Image, function: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`function`, which makes RGB of each pixel by itself, without keeping other threads from running for long."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        return function(image)
    result = Image.new("RGB", image.size, None)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        result.paste(function(image.crop((0, top, image.width, bottom))), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white, so that colours hidden by transparency stay hidden."""
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scale_down(image: Image.Image) -> Image.Image:
    """16-bit (or wider) grey to 8 bits: 65535 becomes 255. A float picture is taken as 0..1 if it stays in there."""
    values = np.asarray(image)
    top = float(values.max(initial=0))
    scale = 255.0 if image.mode == "F" and top <= 1.0 else 255.0 / 65535.0
    if image.mode in ("I", "F") and 1.0 < top <= 255.0:
        scale = 1.0
    grey = np.empty(values.shape, dtype=np.uint8)
    # By strips: a whole picture of float64 would take more memory than all else.
    for at in range(0, len(values), 64):
        strip = values[at : at + 64].astype(np.float64) * scale
        grey[at : at + 64] = np.rint(np.clip(strip, 0, 255))
    return Image.fromarray(grey, "L")


def _too_many_pixels(limits: MediaLimits, param: str | None) -> ImageError:
    return ImageError(
        f"The image has more than {limits.max_pixels / 1e6:g} million pixels; send a smaller one.",
        code="image_too_large",
        param=param,
    )


def _unreadable(param: str | None) -> ImageError:
    return ImageError("The image is truncated or damaged and cannot be decoded.", code="image_parse_error", param=param)
