"""Pictures from outside: every mode to the right pixels, every broken or hostile source to a 4xx."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, WebPImagePlugin

from sightline.errors import ImageError
from sightline.prompt import decoder, media
from sightline.prompt.media import MediaLimits, MediaLoader, is_public

LIMITS = MediaLimits()
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decoder.decode(data, LIMITS)
    assert image.mode == "RGB"
    return image.getpixel(at)


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    """A picture stored rotated comes out upright, and the header alone says its upright size."""
    upright = Image.new("RGB", (40, 20), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "PNG", exif=exif.tobytes())
    assert decoder.probe(data, LIMITS)[:2] == (40, 20)
    np.testing.assert_array_equal(np.asarray(decoder.decode(data, LIMITS)), np.asarray(upright))


def turned(orientation: int) -> bytes:
    """EXIF that says so, among other tags."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0132] = "maker", orientation, "2026:01:01 00:00:00"
    return exif.tobytes()


def with_late_exif(exif: bytes) -> bytes:
    """A PNG whose EXIF follows its pixels."""
    data, body = encode(Image.new("RGB", (20, 40))), b"eXIf" + exif.removeprefix(b"Exif\0\0")
    return data[:-12] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[-12:]


def with_raw_profile(exif: bytes) -> bytes:
    """A PNG as ImageMagick writes it."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    return encode(Image.new("RGB", (20, 40)), pnginfo=text)


def with_xmp(orientation: int) -> bytes:
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    return encode(Image.new("RGB", (20, 40)), "JPEG", xmp=xmp)


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.new("RGB", (20, 40)), "JPEG", exif=turned(6)),
        encode(Image.new("RGB", (20, 40)), "WEBP", exif=turned(6)),
        encode(Image.new("RGB", (20, 40)), "PNG", exif=turned(6)),
        with_late_exif(turned(6)),
        with_raw_profile(turned(6)),
        with_xmp(6),
    ],
    ids=["JPEG", "WebP", "PNG", "PNG, after the pixels", "PNG, in hexadecimal", "XMP"],
)
def test_orientation_is_found_wherever_it_is_written(data: bytes) -> None:
    assert decoder.probe(data, LIMITS)[:2] == decoder.decode(data, LIMITS).size == (40, 20)


def test_orientation_is_what_pillow_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        exif = Image.Exif()
        exif.endian = "<>"[rng.integers(2)]
        for tag in rng.choice([0x010F, 0x0110, 0x0112, 0x0131, 0x0132, 0x013B], rng.integers(1, 7), replace=False):
            exif[int(tag)] = int(rng.integers(10)) if tag == 0x0112 else "x" * int(rng.integers(1, 20))
        data = exif.tobytes()
        image = Image.new("RGB", (1, 1))
        image.info["exif"] = data
        assert decoder.exif_orientation(data) == image.getexif().get(0x0112)
        # Cut anywhere, it is an orientation or none, and no exception.
        assert decoder.exif_orientation(data[: rng.integers(len(data))]) in (None, image.getexif().get(0x0112))


@pytest.mark.parametrize("kind", decoder.FORMATS)
def test_no_pixel_is_decoded_for_the_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        pytest.fail("it was decoded")

    data = photo(kind)
    for plugin in (ImageFile.ImageFile, GifImagePlugin.GifImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(plugin, "load", load)
    assert decoder.probe(data, LIMITS)[:2] == (64, 64)


def large(mode: str) -> Image.Image:
    """Larger than a strip, of every value that the mode has."""
    width, height = 1300, 1000
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    values = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode) if mode != "CMYK" else Image.fromarray(values, "CMYK")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_large_pictures_are_converted_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pixels as all at once, and no other thread waits for a whole picture."""
    image = large(mode)
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    opened = Image.open(io.BytesIO(data))
    if mode == "I;16":
        grey = np.rint(np.asarray(image) * (255 / 65535)).astype(np.uint8)
        expected = Image.fromarray(grey).convert("RGB")
    elif mode in ("LA", "P", "RGBA"):
        white = Image.new("RGBA", image.size, WHITE)
        expected = Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
    else:
        expected = opened.convert("RGB")
    sizes: list[int] = []
    for owner, name in ((Image.Image, "convert"), (Image, "alpha_composite")):
        original = getattr(owner, name)

        def watched(image: Image.Image, *rest: Any, original: Any = original) -> Any:
            sizes.append(image.width * image.height)
            return original(image, *rest)

        monkeypatch.setattr(owner, name, watched)
    found = decoder.from_pil(opened, LIMITS) if mode == "CMYK" else decoder.decode(data, LIMITS)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert max(sizes) <= 1 << 20
    assert sum(sizes) >= image.width * image.height


def test_a_jpeg_with_more_pictures_behind_it_is_the_first() -> None:
    """Pillow has another name and class for those; the bound on scans holds for them too."""
    red, white = (Image.new("RGB", (64, 64), colour) for colour in (RED, WHITE))
    data = encode(red, "MPO", save_all=True, append_images=[white], progressive=True)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    found = pixel(data, (5, 5))
    assert found[0] > 250
    assert max(found[1:]) < 5
    first = data.index(b"\xff\xd9")
    scan = data[data.rfind(b"\xff\xda", 0, first) : first]
    with pytest.raises(ImageError, match="damaged"):
        decoder.decode(data[:first] + scan * 500 + data[first:], LIMITS)


def test_transparency_is_white_and_hides_what_is_under_it() -> None:
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == WHITE
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == RED
    assert pixel(encode(Image.new("LA", (4, 4), (0, 0)))) == WHITE
    half = pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))))
    assert half[0] == 255
    assert 126 <= half[1] <= 128
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pixel(encode(palette, transparency=0)) == WHITE
    assert pixel(encode(palette)) == RED
    rgb = Image.new("RGB", (4, 4), RED)
    assert pixel(encode(rgb, transparency=RED)) == WHITE


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), WHITE),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.fromarray(np.full((4, 4), 40000, np.uint16)), (156, 156, 156)),
        (Image.fromarray(np.full((4, 4), 65535, np.uint16)), WHITE),
    ],
    ids=["1-bit", "grey", "16-bit", "16-bit white"],
)
def test_grey_modes(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert pixel(encode(image)) == expected


def test_cmyk_and_inverted_cmyk() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = pixel(encode(red, "JPEG", quality=100))
    assert found[0] > 250
    assert max(found[1:]) < 5


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in (RED, (0, 255, 0), (0, 0, 255))]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert pixel(data, (5, 5)) == RED


def test_polyglot_is_its_first_bytes() -> None:
    assert pixel(encode(Image.new("RGB", (4, 4), WHITE), "JPEG") + b"PK\x03\x04archive") == WHITE


# -- broken files ------------------------------------------------------------------------------------------------------


def photo(kind: str = "PNG") -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)


def png_of_size(width: int, height: int) -> bytes:
    """A header that claims a size, and hardly any data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


BROKEN: list[tuple[str, bytes, str]] = [
    ("empty", b"", "empty_image_file"),
    ("text", b"hello world", "invalid_image_format"),
    ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image_format"),
    ("pdf", b"%PDF-1.7\n", "invalid_image_format"),
    ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "invalid_image_format"),
    ("tiff", encode(Image.new("RGB", (4, 4)), "TIFF"), "invalid_image_format"),
    ("ico", encode(Image.new("RGB", (16, 16)), "ICO"), "invalid_image_format"),
    ("psd", b"8BPS\x00\x01" + bytes(40), "invalid_image_format"),
    ("heic", b"\x00\x00\x00\x18ftypheic" + bytes(40), "invalid_image_format"),
    ("jpeg 2000", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(40), "invalid_image_format"),
    ("truncated jpeg", photo("JPEG")[:-500], "image_parse_error"),
    ("truncated png", photo()[:3000], "image_parse_error"),
    ("truncated webp", photo("WEBP")[:500], "image_parse_error"),
    ("truncated gif", encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)), "GIF")[:900],
     "image_parse_error"),
    ("png header only", photo()[:20], "image_parse_error"),
    ("jpeg magic only", b"\xff\xd8\xff", "image_parse_error"),
    ("png magic only", b"\x89PNG\r\n\x1a\n", "image_parse_error"),
    ("riff magic only", b"RIFF\x00\x00\x00\x00WEBP", "image_parse_error"),
    ("bmp magic only", b"BM", "image_parse_error"),
    ("png wrong crc", flipped(photo(), 30), "image_parse_error"),
    ("png wrong data", flipped(photo(), 2000), "image_parse_error"),
    ("png 0x0", png_of_size(0, 0), "image_parse_error"),
    ("png 0x5", png_of_size(0, 5), "image_parse_error"),
    ("lying png", png_of_size(200, 200), "image_parse_error"),
    ("bomb by header", png_of_size(20_000, 20_000), "image_too_large"),
    ("bomb beyond Pillow's own limit", png_of_size(2**31 - 1, 2**31 - 1), "image_too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "code"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_files(data: bytes, code: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ImageError) as caught:
        decoder.decode(data, LIMITS, "messages[0].content[1].image_url")
    assert time.perf_counter() - began < 1.0
    assert caught.value.code == code
    assert caught.value.status == 400
    assert caught.value.param == "messages[0].content[1].image_url"
    assert "0x" not in caught.value.message
    assert "BytesIO" not in caught.value.message


def test_bomb_is_refused_by_the_header_alone() -> None:
    with pytest.raises(ImageError, match="million pixels"):
        decoder.probe(png_of_size(7000, 7000), LIMITS)


def jpeg_segments(body: bytes, count: int) -> bytes:
    data = encode(Image.new("RGB", (8, 8)), "JPEG")
    return data[:20] + body * count + data[20:]  # after the JFIF header


def png_chunks(body: bytes, count: int) -> bytes:
    data = encode(Image.new("RGB", (8, 8)))
    return (
        data[:33] + (struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))) * count + data[33:]
    )


def gif_comments(count: int) -> bytes:
    data = encode(Image.new("L", (8, 8)), "GIF")
    palette = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:palette] + b"!\xfe\x01a\x00" * count + data[palette:]


PIECES: list[tuple[str, Callable[[int], bytes]]] = [
    ("png chunks", lambda n: png_chunks(b"abCd", n)),
    ("png text", lambda n: png_chunks(b"tEXta\x00b", n)),
    ("jpeg segments", lambda n: jpeg_segments(b"\xff\xe5\x00\x02", n)),
    ("jpeg comments", lambda n: jpeg_segments(b"\xff\xfe\x00\x02", n)),
    ("jpeg exif", lambda n: jpeg_segments(b"\xff\xe1\x00\x16Exif\x00\x00II*\x00\x08" + bytes(9), n)),
    ("jpeg fill", lambda n: jpeg_segments(b"\xff", n)),
    ("jpeg junk", lambda n: jpeg_segments(b"x", n)),
    ("gif comments", gif_comments),
]


@pytest.mark.parametrize("make", [p[1] for p in PIECES], ids=[p[0] for p in PIECES])
def test_a_million_pieces_of_metadata_take_no_time(make: Callable[[int], bytes]) -> None:
    """Unbounded, the parsers take seconds to hours for these."""
    assert decoder.decode(make(3), LIMITS).size == (8, 8)
    data = make(1_000_000)
    for look in (decoder.probe, decoder.decode):
        began = time.perf_counter()
        with pytest.raises(ImageError, match="damaged"):
            look(data, LIMITS)
        assert time.perf_counter() - began < 0.5


def test_ordinary_metadata_is_no_problem() -> None:
    """A hundred segments of 64 KB, as phones write depth maps; pixels in thousands of PNG chunks."""
    large = jpeg_segments(b"\xff\xe1\xff\xff" + b"http://ns.adobe.com/xmp/extension/\x00".ljust(65533, b"x"), 100)
    assert decoder.decode(large, LIMITS).size == (8, 8)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), dtype=np.uint8))
    assert decoder.decode(encode(noise, "PNG", compress_level=0), LIMITS).size == (2000, 1000)


def test_scans_of_a_progressive_jpeg_are_bounded() -> None:
    data = encode(Image.new("RGB", (64, 64), RED), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    assert decoder.decode(data[:-2] + last * 50 + data[-2:], LIMITS).size == (64, 64)
    with pytest.raises(ImageError, match="damaged"):
        decoder.decode(data[:-2] + last * 500 + data[-2:], LIMITS)
    # What follows the picture (a film, in phones' motion photos) does not count.
    assert decoder.decode(data + last * 500, LIMITS).size == (64, 64)


def test_pil_images_of_every_mode() -> None:
    for mode in "1 L LA La P PA RGB RGBA RGBX RGBa CMYK YCbCr HSV LAB I F I;16".split():
        found = decoder.from_pil(Image.new(mode, (6, 4)), LIMITS)
        assert (found.mode, found.size) == ("RGB", (6, 4))
    with pytest.raises(ImageError, match="million pixels"):
        decoder.from_pil(Image.new("1", (7000, 7000)), LIMITS)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_a_picture_or_our_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = bytearray(photo(kind))
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(0, 256)
        cut = bytes(data[: rng.integers(1, len(data))])
        for sample in (bytes(data), cut):
            try:
                image = decoder.decode(sample, LIMITS)
            except ImageError:
                continue
            assert image.mode == "RGB"
            assert image.width * image.height <= LIMITS.max_pixels


# -- URLs --------------------------------------------------------------------------------------------------------------


def load(url: str, limits: MediaLimits = LIMITS) -> bytes:
    async def run() -> bytes:
        loader = MediaLoader(limits)
        try:
            return await loader.load(url, bytes, "here")
        finally:
            await loader.close()

    return asyncio.run(run())


def refusal(url: str, limits: MediaLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load(url, limits)
    assert caught.value.param == "here"
    assert "127.0.0.1" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,{}",
        "DATA:IMAGE/PNG;BASE64,{}",
        "data:;base64,{}",
        "data:image/png;charset=utf-8;name=a.png;base64,{}",
        "data:application/octet-stream;base64,{}",
    ],
)
def test_data_urls(url: str) -> None:
    for data in (photo(), photo() * 200):
        assert load(url.format(base64.b64encode(data).decode())) == data


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64,ab", "invalid_base64_image"),
        ("data:image/png;base64,a b=", "invalid_base64_image"),
        ("data:image/png;base64,ä", "invalid_base64_image"),
        ("data:image/png;base64,====", "invalid_base64_image"),
        ("data:image/png;base64," + "A" * (2**20 - 2) + "==AAAA", "invalid_base64_image"),
        ("data:image/png;base64," + "A" * 2**20 + "A", "invalid_base64_image"),
        ("data:text/html;base64,aGk=", "unsupported_image_media_type"),
        ("data:video/jpeg;base64,aGk=", "unsupported_image_media_type"),
        ("", "invalid_image_url"),
        ("cat.png", "invalid_image_url"),
        ("ftp://example.com/x.png", "invalid_image_url"),
        ("javascript:alert(1)", "invalid_image_url"),
    ],
)
def test_wrong_urls(url: str, code: str) -> None:
    assert refusal(url).code == code


def test_data_url_over_the_limit_is_413() -> None:
    error = refusal("data:image/png;base64," + "A" * 27_000_000)
    assert (error.status, error.code) == (413, "image_too_large")


def test_files_need_an_allowed_folder(tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    allowed.mkdir()
    other.mkdir()
    (allowed / "a b.png").write_bytes(photo())
    (other / "secret.png").write_bytes(photo())
    (allowed / "link.png").symlink_to(other / "secret.png")
    limits = MediaLimits(allowed_local_path=allowed)
    assert load(f"file://{allowed}/a%20b.png", limits) == photo()
    messages = set()
    for path in (f"{other}/secret.png", f"{allowed}/link.png", f"{allowed}/../other/secret.png", f"{allowed}/none.png",
                 str(allowed), "/etc/passwd", "/dev/zero", "\x00"):  # fmt: skip
        messages.add(refusal(f"file://{path}", limits).message)
    messages.add(refusal(f"file://{allowed}/a%20b.png").message)
    # What is there cannot be told from what is not.
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700:4700::1111", True),
        ("127.0.0.1", False), ("127.8.9.1", False), ("0.0.0.0", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("198.18.0.1", False),
        ("224.0.0.1", False), ("255.255.255.255", False), ("192.0.2.1", False), ("240.0.0.1", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fc00::1", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("2002:7f00:1::", False), ("2002:a00:1::", False),
        ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("fe80::1%eth0", False), ("2001:db8::1", False),
        ("fec0::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.fixture
def sink() -> Iterator[tuple[int, list[Any]]]:
    """(port, connections accepted) on all loopback addresses."""
    accepted: list[Any] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop = threading.Event()

    def accept() -> None:
        while not stop.is_set():
            try:
                accepted.append(listener.accept()[0])
            except OSError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    yield listener.getsockname()[1], accepted
    stop.set()
    thread.join()
    listener.close()


HOSTILE = """http://127.0.0.1:{p}/ http://localhost:{p}/ http://LOCALHOST:{p}/ http://127.1:{p}/ http://2130706433:{p}/
http://0x7f000001:{p}/ http://0x7f.0.0.1:{p}/ http://0177.0.0.1:{p}/ http://127.0.1:{p}/ http://0:{p}/ http://0.0.0.0:{p}/
http://[::1]:{p}/ http://[::ffff:127.0.0.1]:{p}/ http://[0:0:0:0:0:ffff:7f00:1]:{p}/ http://[::]:{p}/ http://[::1%25lo]:{p}/
http://user@127.0.0.1:{p}/ http://example.com@127.0.0.1:{p}/ http://127.0.0.1:{p}@example.com/ http://127.0.0.1:{p}\\@example.com/
http://example.com\\@127.0.0.1:{p}/ http://127.0.0.%31:{p}/ http://%6c%6f%63alhost:{p}/ http://①②⑦.0.0.1:{p}/ http://127。0。0。1:{p}/
http://localhost.:{p}/ http://127.0.0.1.:{p}/ https://127.0.0.1:{p}/ HTTP://127.0.0.1:{p}/ http:/127.0.0.1:{p}/ http:127.0.0.1:{p}/
http:///127.0.0.1:{p}/ http://127.0.0.1:{p}?x http://127.0.0.1:{p}#x http://10.0.0.1/ http://192.168.0.1/ http://169.254.169.254/latest/
http://168.63.129.16/ http://[2002:808:808::]/ http://[64:ff9b::808:808]/ http://[::ffff:8.8.8.8]/ http://[fe80::1]/ http://[fc00::1]/ http://[2002:7f00:1::]/ http://[64:ff9b::7f00:1]/ http://100.64.0.1/ http://ip6-localhost:{p}/
gopher://127.0.0.1:{p}/ unix:/var/run/docker.sock file:///etc/passwd //127.0.0.1:{p}/ /etc/passwd ~/x \\\\127.0.0.1\\x
http+unix://x/ http://127.0.0.1:{p}/a\tb http://a\nb:{p}/ blob:http://127.0.0.1:{p}/ view-source:http://127.0.0.1:{p}/""".split()


@pytest.mark.parametrize("host", ["[2002:808:808::]", "[64:ff9b::808:808]", "[::ffff:8.8.8.8]"])
def test_addresses_inside_addresses_are_no_urls(host: str) -> None:
    assert refusal(f"http://{host}/").code == "invalid_image_url"


def test_hostile_urls_reach_nobody(sink: tuple[int, list[Any]]) -> None:
    port, accepted = sink
    assert len(HOSTILE) >= 50
    for url in HOSTILE:
        error = refusal(url.format(p=port))
        assert error.status in (400, 403), url
    # Names with no address are refused too, without a hang.
    time.sleep(0.2)
    assert accepted == []


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["10.0.0.1"]])
def test_names_that_resolve_to_private_addresses(
    answers: list[str], sink: tuple[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, accepted = sink
    calls = 0

    def resolve(host: str, *args: Any, **options: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in answers]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert refusal(f"http://pictures.example:{port}/x.png").status == 403
    assert calls == 1
    assert accepted == []


def test_the_checked_address_is_the_dialled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that answers differently the second time is not asked twice."""
    asked: list[str] = []
    dialled: list[str] = []

    def resolve(host: str, *args: Any, **options: Any) -> list[Any]:
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]

    async def connect(self: Any, host: str, *args: Any, **options: Any) -> Any:
        dialled.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(media.httpcore2.AnyIOBackend, "connect_tcp", connect)
    assert refusal("http://pictures.example/x.png").code == "failed_to_download_image"
    assert (asked, dialled) == (["pictures.example"], ["93.184.216.34"])


def test_allowed_domains(host: Callable[[bytes], str]) -> None:
    url = host(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
    assert load(url, MediaLimits(allow_private=True, allowed_domains=frozenset({"127.0.0.1"}))) == b"abc"
    assert refusal(url, MediaLimits(allow_private=True, allowed_domains=frozenset({"example.com"}))).status == 403


# -- hosts that misbehave ----------------------------------------------------------------------------------------------

Script = Callable[[socket.socket], None]


@pytest.fixture
def host() -> Iterator[Callable[[bytes | Script], str]]:
    """Start a host that answers every connection with given bytes, or runs a script on it."""
    listeners: list[socket.socket] = []

    def start(answer: bytes | Script) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def talk(connection: socket.socket) -> None:
            try:
                with connection:
                    connection.recv(65536)
                    if callable(answer):
                        answer(connection)
                    else:
                        connection.sendall(answer)
            except OSError:
                return

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"

    yield start
    for listener in listeners:
        listener.close()


OPEN = MediaLimits(allow_private=True, timeout=1.0, max_image_bytes=100_000)


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.1)


def drip_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for i in range(100):
        connection.sendall(b"X-%d: y\r\n" % i)
        time.sleep(0.1)


def silence(connection: socket.socket) -> None:
    time.sleep(5)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


BOMB = gzip.compress(bytes(5_000_000))

HOSTS: list[tuple[str, bytes | Script, str]] = [
    ("drip", drip, "failed_to_download_image"),
    ("drip of headers", drip_headers, "failed_to_download_image"),
    ("silence", silence, "failed_to_download_image"),
    ("endless body", endless, "image_too_large"),
    ("reset", reset, "failed_to_download_image"),
    ("declared too large", b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\nx", "image_too_large"),
    ("shorter than declared", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx", "failed_to_download_image"),
    ("compressed", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB,
     "failed_to_download_image"),
    ("500", b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "failed_to_download_image"),
    ("404", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "failed_to_download_image"),
    ("no HTTP", b"SSH-2.0-OpenSSH_9.0\r\n", "failed_to_download_image"),
    ("empty body", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "empty_image_file"),
    ("to a file", b"HTTP/1.1 302 Go\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", "invalid_image_url"),
    ("to nowhere", b"HTTP/1.1 302 Go\r\nLocation: http://a b/\r\nContent-Length: 0\r\n\r\n", "invalid_image_url"),
    ("in circles", b"HTTP/1.1 302 Go\r\nLocation: /x.png\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
     "failed_to_download_image"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "code"), [h[1:] for h in HOSTS], ids=[h[0] for h in HOSTS])
def test_hosts_that_misbehave(answer: bytes | Script, code: str, host: Callable[[bytes | Script], str]) -> None:
    began = time.perf_counter()
    error = refusal(host(answer), OPEN)
    assert time.perf_counter() - began < OPEN.timeout + 0.7
    assert error.code in (code, "invalid_image_url") if code == "invalid_image_url" else error.code == code


def test_redirects_are_checked_like_the_first_url(
    host: Callable[[bytes | Script], str], sink: tuple[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, accepted = sink
    first = host(f"HTTP/1.1 302 Go\r\nLocation: http://inner.example:{port}/\r\nContent-Length: 0\r\n\r\n".encode())
    real = socket.getaddrinfo

    def resolve(name: str, *args: Any, **options: Any) -> list[Any]:
        return real("127.0.0.1" if name == "inner.example" else name, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    # The first host counts as public, the one behind the redirect does not.
    seen = iter([True, False])
    monkeypatch.setattr(media, "is_public", lambda address: next(seen))
    assert refusal(first).status == 403
    assert accepted == []


@pytest.mark.parametrize("order", [("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "127.0.0.2")])
def test_any_address_that_answers_will_do(
    order: tuple[str, ...], host: Callable[[bytes | Script], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = host(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
    port = int(url.split(":")[2].split("/")[0])
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in order]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: answers)
    assert load(url.replace("127.0.0.1", "two.example"), OPEN) == b"abc"


def test_nothing_of_one_answer_goes_into_the_next_request(host: Callable[[bytes | Script], str]) -> None:
    heard: list[bytes] = []

    def listen(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 3\r\n\r\nabc")
        heard.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")

    url = host(listen)

    async def twice() -> None:
        loader = MediaLoader(OPEN)
        assert [await loader.load(url, bytes), await loader.load(url, bytes)] == [b"abc", b"abc"]
        await loader.close()

    asyncio.run(twice())
    (second,) = heard
    assert second.startswith(b"GET /x.png HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"accept-encoding: identity" in second.lower()
    assert b"cookie" not in second.lower()


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_kept_connection_that_its_host_closes_is_no_failure(how: str, host: Callable[[bytes | Script], str]) -> None:
    dials: list[int] = []

    def once(connection: socket.socket) -> None:
        dials.append(1)
        if len(dials) < 4:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
            connection.recv(65536)
        if how == "reset":
            reset(connection)

    url = host(once)

    async def fetch() -> None:
        loader = MediaLoader(OPEN)
        # Two connections are kept; the first of them to be used again is dropped, and so is the second.
        both = await asyncio.gather(loader.load(url, bytes), loader.load(url, bytes))
        assert both == [b"abc", b"abc"]
        assert await loader.load(url, bytes) == b"abc"
        assert len(dials) == 3
        # From here on the host answers nobody: one fresh connection is tried, not more.
        with pytest.raises(ImageError, match="could not be reached or gave no valid answer"):
            await loader.load(url, bytes)
        assert len(dials) == 4
        await loader.close()

    asyncio.run(fetch())


def test_a_good_host(host: Callable[[bytes | Script], str]) -> None:
    body = photo()
    good = host(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert load(good, OPEN) == body
    hop = host(f"HTTP/1.1 301 Go\r\nLocation: {good}\r\nContent-Length: 0\r\n\r\n".encode())
    assert load(hop, OPEN) == body
