"""Bad pictures by the dozen: every row of the list of what decoders have died of, made of a few lines each."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def claims(width: int, height: int, kind: int = 2, depth: int = 8) -> bytes:
    """A PNG that claims a size and has hardly any data."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb(side: int, kind: int = 0, depth: int = 1) -> bytes:
    """A true PNG of side x side equal pixels: kind 0 is grey, 2 RGB, 6 RGBA."""
    channels = {0: 1, 2: 3, 6: 4}[kind]
    row = bytes(1 + (side * channels * depth + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunk(name: bytes, body: bytes) -> bytes:
    data = encode(noise())
    return data[:33] + chunk(name, body) + data[33:]


def bad(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of pictures that must be a 4xx. More than two hundred."""
    rng = random.Random(seed)
    jpeg, png, webp = encode(noise(), "JPEG"), encode(noise()), encode(noise(), "WEBP")
    gif, bmp = encode(noise().convert("P"), "GIF"), encode(noise(), "BMP")
    yield "empty", b""
    yield "random", rng.randbytes(100)
    yield "HTML", b"<!doctype html><p>404"
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>"
    yield "PDF", b"%PDF-1.7\n" + jpeg
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "TIFF", encode(noise(), "TIFF")
    yield "ICO", encode(noise(16, 16), "ICO")
    yield "PSD", b"8BPS\x00\x01" + bytes(40)
    yield "HEIC", b"\x00\x00\x00\x18ftypheic" + bytes(40)
    yield "AVIF", b"\x00\x00\x00\x18ftypavif" + bytes(40)
    yield "JPEG 2000", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(40)
    yield "FITS", b"SIMPLE  =                    T" + bytes(200)
    yield "DDS", b"DDS |\x00\x00\x00" + bytes(120)
    for width, height in ((0, 0), (0, 5), (5, 0), (65500, 65500), (13377, 13377), (2**31 - 1, 2**31 - 1), (2**31, 1)):
        yield f"PNG claims {width}x{height}", claims(width, height)
    yield "claims less than the limit", claims(5000, 5000)
    yield "1-bit bomb", bomb(13377)
    yield "RGBA bomb", bomb(9000, 6, 8)
    yield "1x100000", encode(Image.new("L", (1, 100_000)))
    yield "100000x1", encode(Image.new("L", (100_000, 1)))
    yield "zTXt bomb", with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    yield "iCCP bomb", with_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    yield "XMP bomb", with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))
    yield "a million empty JPEG segments", jpeg[:20] + b"\xff\xe5\x00\x02" * 1_000_000 + jpeg[20:]
    yield "restart markers", jpeg[:20] + b"\xff\xd0" * 100_000
    yield "WebP of nothing", b"RIFF\x00\x00\x00\x00WEBP"
    yield "WebP that lies about its length", webp[:4] + b"\xff\xff\xff\xff" + webp[8:200]
    for name, data in (("JPEG", jpeg), ("PNG", png), ("WebP", webp), ("GIF", gif), ("BMP", bmp)):
        for part in (3, 8, 16, 24, 32, 60, len(data) // 4, len(data) // 2):
            yield f"{name} cut at {part}", data[:part]
    yield from damaged()
    for number in range(110):
        at = rng.randrange(40, len(png) - 40)
        yield f"PNG with a flipped byte at {at} ({number})", png[:at] + bytes([png[at] ^ 0x55]) + png[at + 1 :]


def damaged() -> Iterator[tuple[str, bytes]]:
    """Files whose headers say what cannot be, format by format."""
    jpeg, progressive = encode(noise(), "JPEG"), encode(noise(), "JPEG", progressive=True)
    frame = jpeg.index(b"\xff\xc0")
    for name, at, value in (
        ("no height", 5, b"\0\0"),
        ("no width", 7, b"\0\0"),
        ("65535 lines", 5, b"\xff\xff"),
        ("12 bits", 4, b"\x0c"),
        ("no components", 9, b"\0"),
        ("nine components", 9, b"\x09"),
        ("factors of nothing", 11, b"\0"),
    ):
        yield f"JPEG with {name}", jpeg[: frame + at] + value + jpeg[frame + at + len(value) :]
    for name, code in (("lossless", 0xC3), ("arithmetic lossless", 0xCB), ("hierarchical", 0xC5), ("reserved", 0xC8)):
        yield f"JPEG, {name}", jpeg[: frame + 1] + bytes([code]) + jpeg[frame + 2 :]
    for name, marker in (("quantization", b"\xff\xdb"), ("frame", b"\xff\xc0"), ("scan", b"\xff\xda")):
        start = jpeg.index(marker)
        yield (
            f"JPEG without {name}",
            jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :],
        )
    yield "JPEG without its end", jpeg[:-2]
    scan = progressive[progressive.rfind(b"\xff\xda") : -2]
    yield "10,000 scans", progressive[:-2] + scan * 10_000 + progressive[-2:]
    pair = encode(noise(), "MPO", save_all=True, append_images=[noise(seed=1)], progressive=True)
    end = pair.index(b"\xff\xd9")
    yield (
        "10,000 scans, and a second picture",
        pair[:end] + pair[pair.rfind(b"\xff\xda", 0, end) : end] * 10_000 + pair[end:],
    )
    head = struct.Struct(">IIBBBBB")
    for name, fields in (
        ("of 3 bits", (64, 64, 3, 2, 0, 0, 0)),
        ("of colour type 5", (64, 64, 8, 5, 0, 0, 0)),
        ("of an unknown filter", (64, 64, 8, 2, 0, 9, 0)),
        ("without a palette", (64, 64, 8, 3, 0, 0, 0)),
    ):
        pixels = chunk(b"IDAT", zlib.compress(bytes(64 * 193)))
        yield f"PNG {name}", PNG + chunk(b"IHDR", head.pack(*fields)) + pixels + chunk(b"IEND", b"")
    ihdr = chunk(b"IHDR", head.pack(64, 64, 8, 2, 0, 0, 0))
    yield "PNG without pixels", PNG + ihdr + chunk(b"IEND", b"")
    yield "PNG of noise", PNG + ihdr + chunk(b"IDAT", random.Random(0).randbytes(500)) + chunk(b"IEND", b"")
    yield "PNG with a short header", PNG + chunk(b"IHDR", b"\0\0\0\x40\0\0\0\x40") + chunk(b"IEND", b"")
    yield "PNG without a header", PNG + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    yield "PNG that begins with its end", PNG + chunk(b"IEND", b"") + ihdr
    yield (
        "PNG of a filter that is none",
        PNG + ihdr + chunk(b"IDAT", zlib.compress((b"\x07" + bytes(192)) * 64)) + chunk(b"IEND", b""),
    )
    bmp = encode(noise(), "BMP")
    for name, at, value in (
        ("of 2,147,483,647 lines", 22, b"\xff\xff\xff\x7f"),
        ("of -2,147,483,648 lines", 22, b"\0\0\0\x80"),
        ("of no lines", 22, bytes(4)),
        ("of 3 bits", 28, b"\x03\0"),
        ("of no bits", 28, b"\0\0"),
        ("of an unknown compression", 30, b"\x63\0\0\0"),
        ("of a header of 3 bytes", 14, b"\x03\0\0\0"),
        ("whose pixels lie behind it", 10, b"\xff\xff\xff\x7f"),
        ("that holds a PNG", 30, b"\x05\0\0\0"),
    ):
        yield f"BMP {name}", bmp[:at] + value + bmp[at + len(value) :]
    gif = encode(noise().convert("P"), "GIF")
    start = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    yield "GIF without a frame", gif[:start] + b";"
    yield "GIF of no size", gif[:6] + bytes(4) + gif[10:start] + gif[start : start + 5] + bytes(4) + gif[start + 9 :]
    yield "GIF of 65535 x 65535", gif[:6] + b"\xff\xff\xff\xff" + gif[10:]
    yield "GIF with a frame of 65535 x 65535", gif[: start + 5] + b"\xff\xff\xff\xff" + gif[start + 9 :]
    yield "GIF of codes of 13 bits", gif[: start + 10] + b"\x0d" + gif[start + 11 :]
    yield "GIF of extensions alone", gif[:start] + b"!\xfe\x01a\0" * 1000 + b";"
    extended = b"VP8X" + struct.pack("<I", 10)
    for name, body in (
        ("16384 x 16384", extended + b"\x02\0\0\0" + b"\xff\x3f\0" * 2),
        ("16777216 x 256", extended + b"\x02\0\0\0" + b"\xff\xff\xff\xff\0\0"),
        ("no frames", extended + b"\x02\0\0\0" + b"\x3f\0\0" * 2 + b"ANIM" + struct.pack("<I", 6) + bytes(6)),
        ("an empty frame", b"VP8 " + bytes(4)),
        ("no key frame", b"VP8 " + struct.pack("<I", 10) + b"\x11\0\0\x9d\x01\x2a\x40\0\x40\0"),
        ("an empty lossless frame", b"VP8L" + struct.pack("<I", 5) + b"\x2f\x3f\xc0\x0f\0"),
    ):
        yield f"WebP of {name}", b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def odd_but_fine(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of pictures that must be answered."""
    image = noise(60, 60, seed)
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        yield f"orientation {orientation}", encode(image, "JPEG", exif=exif.tobytes())
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        yield f"PNG {mode}", encode(image.convert(mode))
    yield "16-bit grey", encode(Image.fromarray(np.arange(3600, dtype=np.uint16).reshape(60, 60) * 18))
    yield "CMYK", encode(image.convert("CMYK"), "JPEG")
    yield "palette with transparency", encode(image.convert("P"), transparency=0)
    yield "transparent", encode(Image.new("RGBA", (60, 60), (255, 0, 0, 0)))
    yield "progressive", encode(image, "JPEG", progressive=True)
    for kind in ("GIF", "PNG", "WEBP"):
        frames = [noise(60, 60, i) for i in range(50)]
        yield f"{kind} of 50 frames", encode(frames[0], kind, save_all=True, append_images=frames[1:])
    yield "JPEG and ZIP", encode(image, "JPEG") + b"PK\x03\x04archive"
    yield "GIF and script", encode(image.convert("P"), "GIF") + b"/*<script>alert(1)</script>"
    tiny = [Image.new("L", (60, 60), i % 256) for i in range(2000)]
    yield (
        "GIF of 2000 frames without a pause",
        encode(tiny[0], "GIF", save_all=True, append_images=tiny[1:], duration=0),
    )
    yield "JPEG with pictures behind it", encode(image, "MPO", save_all=True, append_images=[noise(seed=1)])
    yield "a profile of 1 MB", encode(image, "JPEG", icc_profile=bytes(1_000_000))
    jpeg = encode(image, "JPEG")
    # After the JFIF header; each says that EXIF follows.
    yield "100 EXIF segments", jpeg[:20] + (b"\xff\xe1\xff\xffExif\x00\x00" + bytes(65527)) * 100 + jpeg[20:]
    yield "broken EXIF", encode(image, "JPEG", exif=b"Exif\x00\x00XX*\x00\xff\xff\xff\xff" + bytes(20))
    for width, height in ((1, 1), (2, 2), (3, 28), (27, 29), (28, 28), (29, 1)):
        yield f"{width}x{height}", encode(noise(width, height))
