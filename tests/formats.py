"""One file per format, bit depth, colour space, orientation and notable option, and how its pixels are decoded.

`rows` makes the files; `STATEMENTS` says which decoder reads them and how far the pixels are from timm's. ``python -m
tests.formats`` prints them as the table of docs/reliability.md; test_formats.py checks them all.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

SIZE = (64, 96)  # height and width, whole MCUs of every JPEG subsampling
SHAPES = [(1, 1), (1, 97), (97, 1), (2, 3), (17, 33), (63, 95)]
APP0, APP14 = 0xE0, 0xEE  # the JFIF and Adobe markers


class Row(NamedTuple):
    """A file: `format` and `contents` name its statement, and `what` tells the statement's files apart."""

    format: str
    contents: str
    what: str
    content: bytes


class Statement(NamedTuple):
    """Which decoder reads a file, and how far its pixels are from timm's, in grey levels."""

    decoder: str = "Pillow"
    mean: float = 0.0
    largest: int = 0
    remark: str = ""


DALI = Statement("DALI")
NOT_TURNED = "not turned, as in timm"
CLIPPED = "values above 255 are clipped, as in timm"
FIRST = "the first image"
NO_ALPHA = "alpha is dropped"

# Measured with DALI 2.4.0 and Pillow 13.0.0 on a CPU.
STATEMENTS = {
    ("JPEG", "grey"): DALI,
    ("JPEG", "YCbCr"): DALI._replace(remark="4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1; baseline, progressive"),
    ("JPEG", "YCbCr by other markers"): DALI._replace(
        remark="without JFIF's marker, with Adobe's, unusual component numbers"
    ),
    ("JPEG", "RGB"): DALI,
    ("JPEG", "CMYK, YCCK with Adobe's marker"): Statement(remark="inverted, as Adobe writes it"),
    ("JPEG", "CMYK without a marker"): Statement(),
    ("JPEG", "EXIF orientation 1 to 8"): DALI._replace(remark=NOT_TURNED),
    ("JPEG", "ICC profile"): DALI._replace(remark="not applied, as in timm"),
    ("JPEG", "comments, restarts, bytes after the end, MPO"): DALI._replace(remark="of an MPO the first image"),
    ("JPEG", "sides from 1 pixel"): DALI,
    ("PNG", "grey of 1, 2, 4 or 8 bits"): DALI._replace(remark="interlaced, with tRNS"),
    ("PNG", "RGB of 8 bits"): DALI._replace(remark="interlaced, with tRNS"),
    ("PNG", "palette of 1, 2, 4 or 8 bits"): DALI._replace(remark="interlaced, with tRNS"),
    ("PNG", "grey or RGB with alpha, of 8 bits"): DALI._replace(remark=NO_ALPHA),
    ("PNG", "grey of 16 bits"): DALI._replace(
        mean=128.1, largest=213, remark="scaled to 8 bits; for timm Pillow clips at 255, so nearly all is white"
    ),
    ("PNG", "RGB, with alpha or without, of 16 bits"): DALI._replace(
        mean=0.2, largest=1, remark="rounded to 8 bits; Pillow takes the upper byte"
    ),
    ("PNG", "grey with alpha, of 16 bits"): DALI._replace(
        mean=0.4, largest=1, remark="rounded to 8 bits; Pillow takes the upper byte"
    ),
    ("PNG", "gAMA, cHRM, sRGB, iCCP, cICP, sBIT, bKGD"): DALI._replace(remark="not applied, as in timm"),
    ("PNG", "eXIf orientation 1 to 8"): DALI._replace(remark=NOT_TURNED),
    ("PNG", "text, pHYs, many IDATs, bytes after the end"): DALI,
    ("PNG", "animated"): Statement(remark="the default image; DALI would take the animation's first"),
    ("PNG", "sides from 1 pixel"): DALI,
    ("WebP", "lossy"): DALI,
    ("WebP", "lossless"): DALI,
    ("WebP", "alpha"): DALI._replace(remark=NO_ALPHA),
    ("WebP", "EXIF orientation 1 to 8"): Statement(remark=f"{NOT_TURNED}; DALI refuses some of them"),
    ("WebP", "ICC profile, XMP, bytes after the end"): DALI._replace(remark="not applied, as in timm"),
    ("WebP", "animated"): DALI._replace(remark=FIRST),
    ("WebP", "sides from 1 pixel"): DALI,
    ("GIF", "still, transparent"): Statement(),
    ("GIF", "animated"): Statement(remark=FIRST),
    ("TIFF", "grey of 1 or 8 bits, palette"): Statement(remark="raw, LZW, deflate, PackBits, JPEG, group 4"),
    ("TIFF", "RGB"): Statement(remark="the same compressions; BigTIFF"),
    ("TIFF", "grey or RGB with alpha"): Statement(remark=NO_ALPHA),
    ("TIFF", "CMYK"): Statement(),
    ("TIFF", "Lab"): Statement(),
    ("TIFF", "YCbCr"): Statement(),
    ("TIFF", "grey of 16 bits"): Statement(remark=CLIPPED),
    ("TIFF", "grey of 32 bits"): Statement(remark=f"whole numbers or floats; {CLIPPED}"),
    ("TIFF", "RGB of 16 bits"): Statement(remark="the upper byte, as in timm"),
    ("TIFF", "orientation 1 to 8"): Statement(remark="turned, as in timm"),
    ("TIFF", "several pages"): Statement(remark=FIRST),
    ("BMP", "1, 8 and 24 bits"): Statement(remark="palette too; DIB"),
    ("BMP", "16 bits"): Statement(),
    ("BMP", "32 bits"): Statement(remark=f"{NO_ALPHA}; masks of other orders too"),
    ("BMP", "run lengths"): Statement(),
    ("PBM, PGM, PPM", "1 and 8 bits"): Statement(),
    ("PBM, PGM, PPM", "PPM of other ranges, to 16 bits"): Statement(remark="scaled to 8 bits"),
    ("PBM, PGM, PPM", "PGM of 16 bits, PFM"): Statement(remark=CLIPPED),
    ("JPEG2000", "8 bits"): Statement(remark="lossless or not, tiles, bare codestreams; " + NO_ALPHA),
    ("JPEG2000", "16 bits"): Statement(remark=CLIPPED),
    ("AVIF", "8 bits"): Statement(remark=NO_ALPHA),
    ("AVIF", "EXIF orientation 1 to 8"): Statement(remark=NOT_TURNED),
    ("ICO, ICNS", "RGB, alpha"): Statement(remark="the largest image; " + NO_ALPHA),
    ("TGA", "grey, palette, RGB, alpha"): Statement(remark="run lengths, either orientation; " + NO_ALPHA),
    ("others", "DDS, SGI, PCX, IM, QOI, BLP, MSP, XBM"): Statement(),
    ("others", "CUR, DCX, FITS, GBR, PIXAR, PSD, SUN, XPM, XV thumbnails"): Statement(),
    ("others", "SGI, IM, SPIDER of 16 bits or float"): Statement(remark="SGI: the upper byte; others: " + CLIPPED),
}


def picture(height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """uint8 [H, W, 3]: a gradient of saturated colours with stripes and a little noise."""
    y, x = np.mgrid[:height, :width] / [[[max(height - 1, 1)]], [[max(width - 1, 1)]]]
    smooth = np.stack([x, y, 1 - (x + y) / 2], axis=-1) * 215 + 20
    stripes = 15 * np.sin(np.arange(width) / 2)[None, :, None] * [1, -1, 1]
    noise = np.random.default_rng(0).normal(0, 3, (height, width, 3))
    return np.clip(smooth + stripes + noise, 0, 255).astype(np.uint8)


def image(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """`picture` in a Pillow mode."""
    colours = Image.fromarray(picture(*size))
    if mode == "LAB":
        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(colours, ImageCms.buildTransform(*spaces, "RGB", "LAB"))
    if mode in ("RGBA", "LA"):
        faded = colours.convert(mode)
        faded.putalpha(Image.fromarray(alpha(size)))
        return faded
    if mode == "I;16":  # Pillow clips such values at 255: some are below, some above
        return Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 2)
    if mode in ("I", "F"):
        return Image.fromarray(np.asarray(colours.convert("L")).astype({"I": np.int32, "F": np.float32}[mode]))
    return colours.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else colours.convert(mode)


def turned() -> Image.Image:
    """Another picture of the same size, to follow the first."""
    return image().transpose(Image.Transpose.ROTATE_180)


def alpha(size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [H, W]: from transparent (left) to opaque."""
    return np.broadcast_to(np.linspace(0, 255, size[1]).astype(np.uint8), size).copy()


def deep(pixels: np.ndarray) -> np.ndarray:
    """uint16: `pixels` with a low byte that is not a copy of the high byte."""
    return (pixels.astype(np.uint16) << 8) | (pixels[::-1] ^ 0x5A)


def saved(what: Image.Image, kind: str, **options) -> bytes:
    """The file as Pillow writes it."""
    file = io.BytesIO()
    what.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


# JPEG


def segments(content: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """(marker, payload) of a JPEG's segments before its scan, and the remainder from SOS on."""
    found, place = [], 2
    while (marker := content[place + 1]) != 0xDA:
        length = struct.unpack(">H", content[place + 2 : place + 4])[0]
        found.append((marker, content[place + 4 : place + 2 + length]))
        place += 2 + length
    return found, content[place:]


def joined(parts: list[tuple[int, bytes]], rest: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(struct.pack(">BBH", 0xFF, m, len(p) + 2) + p for m, p in parts) + rest


def with_segments(content: bytes, *added: tuple[int, bytes], without: tuple[int, ...] = ()) -> bytes:
    """A JPEG with segments inserted before the others, and those in `without` removed."""
    parts, rest = segments(content)
    return joined([*added, *(part for part in parts if part[0] not in without)], rest)


def adobe(transform: int) -> tuple[int, bytes]:
    """Adobe's APP14: 0 means RGB or CMYK, 1 YCbCr, 2 YCCK."""
    return 0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)


def with_components(content: bytes, ids: bytes | None = None, sampling: int | None = None) -> bytes:
    """A JPEG whose components have other numbers, or whose first has another sampling (as many blocks per MCU)."""
    parts, rest = segments(content)
    frame = next(i for i, (marker, _) in enumerate(parts) if marker in (0xC0, 0xC1, 0xC2))
    payload, scan = bytearray(parts[frame][1]), bytearray(rest)
    if sampling is not None:
        payload[7] = sampling
    for i, number in enumerate(ids or b""):
        payload[6 + 3 * i] = scan[5 + 2 * i] = number
    parts[frame] = parts[frame][0], bytes(payload)
    return joined(parts, bytes(scan))


# PNG


DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNG_CONTENTS = {  # by colour type and whether it has 16 bits
    (0, False): "grey of 1, 2, 4 or 8 bits",
    (0, True): "grey of 16 bits",
    (2, False): "RGB of 8 bits",
    (2, True): "RGB, with alpha or without, of 16 bits",
    (3, False): "palette of 1, 2, 4 or 8 bits",
    (4, False): "grey or RGB with alpha, of 8 bits",
    (4, True): "grey with alpha, of 16 bits",
    (6, False): "grey or RGB with alpha, of 8 bits",
    (6, True): "RGB, with alpha or without, of 16 bits",
}
COLOUR_CHUNKS = {  # what each contains, by colour type
    "gAMA 1": lambda colour: struct.pack(">I", 100000),
    "gAMA 2.2": lambda colour: struct.pack(">I", 45455),
    "cHRM": lambda colour: struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600),
    "sRGB": lambda colour: b"\0",
    "iCCP": lambda colour: b"p\0\0" + zlib.compress(profile("sRGB")),
    "cICP": lambda colour: bytes([9, 16, 0, 1]),
    "sBIT": lambda colour: b"\5" * {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}[colour],
    "bKGD": lambda colour: {3: b"\x10"}.get(colour, b"\0\xc8" * (3 if colour in (2, 6) else 1)),
}
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def chunk(name: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def samples(colour: int, depth: int, size: tuple[int, int]) -> np.ndarray:
    """uint16 [H, W, channels]: `picture` in this colour type."""
    colours = picture(*size)
    grey = np.asarray(Image.fromarray(colours).convert("L"))[..., None]
    if colour == 3:
        return (grey >> (8 - depth)).astype(np.uint16)
    channels = [colours if colour in (2, 6) else grey] + [alpha(size)[..., None]] * (colour in (4, 6))
    values = np.concatenate(channels, axis=-1)
    return deep(values) if depth == 16 else (values >> (8 - depth)).astype(np.uint16)


def rows_of(values: np.ndarray, depth: int) -> bytes:
    """Unfiltered scan lines."""
    flat = values.reshape(len(values), -1)
    if depth == 16:
        lines = flat.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        lines = np.packbits(bits.reshape(len(flat), -1), axis=1)
    return b"".join(b"\0" + line.tobytes() for line in lines)


def png(colour: int, depth: int, *chunks: bytes, interlaced: bool = False, size: tuple[int, int] = SIZE) -> bytes:
    """A PNG with `chunks` before its pixels. Made by hand: Pillow writes neither interlaced PNGs nor 16-bit colour."""
    values = samples(colour, depth, size)
    parts = [values[y::dy, x::dx] for y, x, dy, dx in PASSES] if interlaced else [values]
    pixels = b"".join(rows_of(part, depth) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, interlaced)
    levels = np.linspace(0, 255, 2 ** min(depth, 8)).astype(np.uint8)
    palette = [chunk(b"PLTE", np.stack([levels, 255 - levels, levels // 2], axis=1).tobytes())] * (colour == 3)
    after = [each for each in chunks if each[4:8] in (b"tRNS", b"bKGD")]  # these refer to the palette
    before = [each for each in chunks if each not in after]
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *before,
            *palette,
            *after,
            chunk(b"IDAT", zlib.compress(pixels)),
            chunk(b"IEND"),
        ]
    )


def transparent(colour: int, depth: int) -> bytes:
    """tRNS: the colour at the picture's centre, or the alphas of a palette's entries."""
    if colour == 3:
        return chunk(b"tRNS", bytes(np.linspace(0, 255, 2**depth).astype(np.uint8)))
    middle = samples(colour, depth, SIZE)[SIZE[0] // 2, SIZE[1] // 2]
    return chunk(b"tRNS", middle.astype(">u2").tobytes())


def jpegs() -> Iterator[Row]:
    """JPEG, as Pillow writes it and with markers edited by hand."""
    rgb, grey = image(), image("L")
    for name, sampling in {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}.items():
        for options in ({"quality": 50}, {"quality": 95}, {"progressive": True}, {"optimize": True}):
            yield Row("JPEG", "YCbCr", f"{name} {options}", saved(rgb, "JPEG", subsampling=sampling, **options))
    plain = saved(rgb, "JPEG", subsampling=2)
    yield Row("JPEG", "YCbCr", "4:4:0", with_components(saved(rgb, "JPEG", subsampling=1), sampling=0x12))
    yield Row("JPEG", "YCbCr", "4:1:1", with_components(plain, sampling=0x41))
    yield Row("JPEG", "grey", "", saved(grey, "JPEG"))
    yield Row("JPEG", "grey", "progressive", saved(grey, "JPEG", progressive=True))
    yield Row("JPEG", "grey", "Adobe marker", with_segments(saved(grey, "JPEG"), adobe(1)))
    for turn in range(1, 9):
        yield Row("JPEG", "EXIF orientation 1 to 8", f"{turn}", saved(rgb, "JPEG", exif=exif(turn)))
        yield Row("JPEG", "EXIF orientation 1 to 8", f"grey {turn}", saved(grey, "JPEG", exif=exif(turn)))
    for space in ("sRGB", "LAB", "XYZ"):
        yield Row("JPEG", "ICC profile", space, saved(rgb, "JPEG", icc_profile=profile(space)))
    yield from _jpeg_markers(plain)
    cmyk = saved(image("CMYK"), "JPEG")
    yield Row("JPEG", "CMYK, YCCK with Adobe's marker", "CMYK", cmyk)
    yield Row("JPEG", "CMYK, YCCK with Adobe's marker", "YCCK", with_segments(cmyk, adobe(2), without=(APP14,)))
    yield Row("JPEG", "CMYK without a marker", "", with_segments(cmyk, without=(APP14,)))
    for size in SHAPES:
        for sampling in (0, 1, 2):
            yield Row(
                "JPEG",
                "sides from 1 pixel",
                f"{size} {sampling}",
                saved(image(size=size), "JPEG", subsampling=sampling),
            )
        yield Row("JPEG", "sides from 1 pixel", f"{size} grey", saved(image("L", size), "JPEG"))


def _jpeg_markers(plain: bytes) -> Iterator[Row]:
    """libjpeg guesses the colour space from the JFIF and Adobe markers and the components' numbers."""
    bare = with_segments(plain, without=(APP0,))
    yield Row("JPEG", "YCbCr by other markers", "Adobe 1 and JFIF", with_segments(plain, adobe(1)))
    yield Row("JPEG", "YCbCr by other markers", "Adobe 0 and JFIF", with_segments(plain, adobe(0)))
    yield Row("JPEG", "YCbCr by other markers", "Adobe 1", with_segments(bare, adobe(1)))
    yield Row("JPEG", "YCbCr by other markers", "Adobe 2", with_segments(bare, adobe(2)))
    for numbers in ((1, 2, 3), (0, 1, 2), (7, 8, 9)):
        yield Row("JPEG", "YCbCr by other markers", f"none, {numbers}", with_components(bare, bytes(numbers)))
    yield Row("JPEG", "YCbCr by other markers", "JFIF, R, G, B", with_components(plain, b"RGB"))
    direct = saved(image(), "JPEG", keep_rgb=True)
    yield Row("JPEG", "RGB", "Adobe 0; R, G, B", direct)
    yield Row("JPEG", "RGB", "R, G, B", with_segments(direct, without=(APP14,)))
    yield Row("JPEG", "RGB", "Adobe 0", with_components(direct, b"\1\2\3"))
    other = "comments, restarts, bytes after the end, MPO"
    yield Row("JPEG", other, "comment", saved(image(), "JPEG", comment="words " * 1000))
    yield Row("JPEG", other, "2 MB before the frame", with_segments(plain, *[(0xE5, bytes(65000))] * 32))
    yield Row("JPEG", other, "restarts", saved(image(), "JPEG", restart_marker_blocks=2))
    yield Row("JPEG", other, "trailing", plain + b"\xa5" * 5000)
    yield Row("JPEG", other, "fill bytes", plain[:2] + b"\xff\xff" + plain[2:])
    yield Row("JPEG", other, "MPO", saved(image(), "MPO", save_all=True, append_images=[turned()]))


def pngs() -> Iterator[Row]:
    """PNG: all colour types and depths by hand, Pillow's own, and chunks about colour or orientation."""
    for colour, depths in DEPTHS.items():
        for depth in depths:
            contents = PNG_CONTENTS[colour, depth == 16]
            name = f"{colour} {depth}"
            yield Row("PNG", contents, name, png(colour, depth))
            yield Row("PNG", contents, f"{name} interlaced", png(colour, depth, interlaced=True))
            if colour in (0, 2, 3):
                yield Row("PNG", contents, f"{name} tRNS", png(colour, depth, transparent(colour, depth)))
    for mode, colour in {"1": 0, "L": 0, "LA": 4, "P": 3, "RGB": 2, "RGBA": 6}.items():
        yield Row("PNG", PNG_CONTENTS[colour, False], f"Pillow's {mode}", saved(image(mode), "PNG"))
    for colour in DEPTHS:
        for name, payload in COLOUR_CHUNKS.items():
            yield Row(
                "PNG",
                "gAMA, cHRM, sRGB, iCCP, cICP, sBIT, bKGD",
                f"{name} {colour}",
                png(colour, 8, chunk(name[:4].encode(), payload(colour))),
            )
    for turn in range(1, 9):
        yield Row("PNG", "eXIf orientation 1 to 8", f"{turn}", png(2, 8, chunk(b"eXIf", exif(turn)[6:])))
        yield Row("PNG", "eXIf orientation 1 to 8", f"Pillow's {turn}", saved(image(), "PNG", exif=exif(turn)))
    other = "text, pHYs, many IDATs, bytes after the end"
    yield Row("PNG", other, "pHYs", png(2, 8, chunk(b"pHYs", struct.pack(">IIB", 1000, 3000, 1))))
    yield Row("PNG", other, "text", png(2, 8, chunk(b"tEXt", b"Comment\0" + b"words" * 2000)))
    yield Row("PNG", other, "trailing", png(2, 8) + b"\xa5" * 5000)
    start = png(2, 8).index(b"IDAT") - 4
    yield Row("PNG", other, "empty IDAT", png(2, 8)[:start] + chunk(b"IDAT") + png(2, 8)[start:])
    for apart in (False, True):
        for mode in ("RGB", "RGBA", "P"):
            frames = [turned().convert(mode), image("L").convert(mode)]
            yield Row(
                "PNG",
                "animated",
                f"{mode}, {'default image apart' if apart else 'default image first'}",
                saved(image(mode), "PNG", save_all=True, append_images=frames, default_image=apart),
            )
    for size in SHAPES:
        for colour in DEPTHS:
            yield Row("PNG", "sides from 1 pixel", f"{size} {colour}", png(colour, 8, size=size))
        yield Row("PNG", "sides from 1 pixel", f"{size} interlaced", png(2, 8, size=size, interlaced=True))


def webps() -> Iterator[Row]:
    """WebP: lossy and lossless, with alpha, and with the features of the extended header."""
    for quality in (30, 80, 100):
        yield Row("WebP", "lossy", f"{quality}", saved(image(), "WEBP", quality=quality))
        yield Row("WebP", "alpha", f"lossy {quality}", saved(image("RGBA"), "WEBP", quality=quality))
    yield Row("WebP", "alpha", "lossy alpha", saved(image("RGBA"), "WEBP", alpha_quality=50))
    for mode in ("L", "P", "RGB"):
        yield Row("WebP", "lossless", mode, saved(image(mode), "WEBP", lossless=True))
    for exact in (False, True):
        yield Row("WebP", "alpha", f"lossless {exact}", saved(image("RGBA"), "WEBP", lossless=True, exact=exact))
    for lossless in (False, True):
        name = "lossless" if lossless else "lossy"
        for turn in range(1, 9):
            for mode in ("RGB", "RGBA"):
                yield Row(
                    "WebP",
                    "EXIF orientation 1 to 8",
                    f"{name} {mode} {turn}",
                    saved(image(mode), "WEBP", exif=exif(turn), lossless=lossless),
                )
        plain = saved(image(), "WEBP", lossless=lossless)
        other = "ICC profile, XMP, bytes after the end"
        icc = {"icc_profile": profile("sRGB"), "lossless": lossless}
        yield Row("WebP", other, f"{name} ICC", saved(image(), "WEBP", **icc))
        yield Row("WebP", other, f"{name} ICC alpha", saved(image("RGBA"), "WEBP", **icc))
        yield Row("WebP", other, f"{name} XMP", saved(image(), "WEBP", xmp=b"<x/>", lossless=lossless))
        yield Row("WebP", other, f"{name} trailing", plain + b"\xa5" * 5000)
        for mode in ("RGB", "RGBA"):
            frames = [turned().convert(mode)]
            yield Row(
                "WebP",
                "animated",
                f"{name} {mode}",
                saved(image(mode), "WEBP", save_all=True, append_images=frames, lossless=lossless),
            )
        for size in SHAPES:
            yield Row(
                "WebP", "sides from 1 pixel", f"{size} {name}", saved(image(size=size), "WEBP", lossless=lossless)
            )
    yield Row("WebP", "animated", "first frame smaller than the canvas", _small_first_frame())


def _small_first_frame() -> bytes:
    """An animated WebP, made by hand: a frame of 48×32 at (8, 16), then one over the whole canvas."""

    def part(name: bytes, payload: bytes) -> bytes:
        return name + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)

    def frame(height: int, width: int, y: int, x: int) -> bytes:
        still = saved(image(size=(height, width)), "WEBP")[12:]
        place = b"".join(struct.pack("<I", v)[:3] for v in (x // 2, y // 2, width - 1, height - 1, 100))
        return part(b"ANMF", place + b"\0" + still)

    canvas = b"".join(struct.pack("<I", v)[:3] for v in (SIZE[1] - 1, SIZE[0] - 1))
    body = b"".join(
        [
            b"WEBP",
            part(b"VP8X", b"\2\0\0\0" + canvas),
            part(b"ANIM", b"\x10\x80\xf0\xff\0\0"),
            frame(32, 48, 16, 8),
            frame(*SIZE, 0, 0),
        ]
    )
    return part(b"RIFF", body)


def tiffs() -> Iterator[Row]:
    """TIFF: Pillow's modes and compressions; 16 bits per colour by hand."""
    contents = dict.fromkeys(["1", "L", "P"], "grey of 1 or 8 bits, palette")
    contents |= dict.fromkeys(["LA", "RGBA"], "grey or RGB with alpha")
    contents |= {"I;16": "grey of 16 bits", "I": "grey of 32 bits", "F": "grey of 32 bits"}
    contents |= {"RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab", "YCbCr": "YCbCr"}
    for mode, named in contents.items():
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
            yield Row("TIFF", named, f"{mode} {compression}", saved(image(mode), "TIFF", compression=compression))
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        yield Row("TIFF", contents[mode], f"{mode} jpeg", saved(image(mode), "TIFF", compression="jpeg"))
    yield Row("TIFF", contents["1"], "group4", saved(image("1"), "TIFF", compression="group4"))
    yield Row("TIFF", contents["RGB"], "BigTIFF", saved(image(), "TIFF", big_tiff=True))
    yield Row("TIFF", "RGB of 16 bits", "", _deep_tiff())
    for turn in range(1, 9):
        yield Row("TIFF", "orientation 1 to 8", f"{turn}", saved(image(), "TIFF", tiffinfo={274: turn}))
    yield Row("TIFF", "several pages", "", saved(image(), "TIFF", save_all=True, append_images=[turned()]))


def _deep_tiff() -> bytes:
    """A TIFF of 3 × 16 bits in one strip, which Pillow reads but does not write."""
    pixels = deep(picture()).astype("<u2").tobytes()
    bits = struct.pack("<3H", 16, 16, 16)
    tags = {256: SIZE[1], 257: SIZE[0], 258: 8, 259: 1, 262: 2, 273: 14, 277: 3, 278: SIZE[0], 279: len(pixels)}
    entries = b"".join(
        struct.pack("<HHII", tag, *((3, 3) if tag == 258 else (4, 1)), value) for tag, value in tags.items()
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 14 + len(pixels)) + bits + pixels + directory


def bmps() -> Iterator[Row]:
    """BMP, and by hand its 16-bit, bit-mask and run-length variants."""
    for mode in ("1", "L", "P", "RGB"):
        yield Row("BMP", "1, 8 and 24 bits", mode, saved(image(mode), "BMP"))
    yield Row("BMP", "32 bits", "RGBA", saved(image("RGBA"), "BMP"))
    masks = struct.pack("<4I", 0xFF000000, 0xFF0000, 0xFF00, 0xFF)
    channels = [np.full((*SIZE, 1), 255, np.uint8), picture()[::-1, :, ::-1]]
    yield Row("BMP", "32 bits", "other masks", _bmp(32, 3, masks, np.concatenate(channels, axis=-1).tobytes()))
    red, green, blue = np.moveaxis(picture()[::-1].astype(np.uint16) >> 3, -1, 0)
    yield Row("BMP", "16 bits", "", _bmp(16, 0, b"", (red << 10 | green << 5 | blue).astype("<u2").tobytes()))
    grey = np.asarray(image("L"))[::-1]
    runs = b"".join(b"".join(bytes([1, value]) for value in line) + b"\0\0" for line in grey.tolist()) + b"\0\1"
    yield Row("BMP", "run lengths", "", _bmp(8, 1, bytes(v for k in range(256) for v in (k, k, k, 0)), runs))
    yield Row("BMP", "1, 8 and 24 bits", "DIB", saved(image(), "DIB"))


def _bmp(bits: int, compression: int, between: bytes, pixels: bytes) -> bytes:
    """A BMP, bottom row first, with masks or a palette between header and pixels."""
    start = 54 + len(between)
    info = struct.pack("<IiiHHIIiiII", 40, SIZE[1], SIZE[0], 1, bits, compression, len(pixels), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + between + pixels


def others() -> Iterator[Row]:
    """Every other format that Pillow can both write and read."""
    yield from _gif_and_pnm()
    for options in ({}, {"irreversible": True}, {"no_jp2": True}, {"tile_size": (32, 32)}):
        for mode in ("L", "LA", "RGB", "RGBA"):
            yield Row("JPEG2000", "8 bits", f"{mode} {options}", saved(image(mode), "JPEG2000", **options))
    yield Row("JPEG2000", "16 bits", "", saved(image("I;16"), "JPEG2000"))
    for mode in ("L", "RGB", "RGBA"):
        yield Row("AVIF", "8 bits", mode, saved(image(mode), "AVIF", speed=10, max_threads=1))
    for turn in range(1, 9):
        yield Row(
            "AVIF",
            "EXIF orientation 1 to 8",
            f"{turn}",
            saved(image(), "AVIF", exif=exif(turn), speed=10, max_threads=1),
        )
    for kind in ("png", "bmp"):
        for mode in ("RGB", "RGBA"):
            yield Row(
                "ICO, ICNS",
                "RGB, alpha",
                f"ICO {mode} {kind}",
                saved(image(mode), "ICO", sizes=[SIZE[::-1]], bitmap_format=kind),
            )
    icon = png(6, 8, size=(128, 128))
    length = len(icon) + 8
    icns = struct.pack(">4sI4sI", b"icns", length + 8, b"ic07", length) + icon
    yield Row("ICO, ICNS", "RGB, alpha", "ICNS", icns)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        for options in ({}, {"compression": "tga_rle"}, {"orientation": 1}):
            if mode != "1" or "compression" not in options:
                content = saved(image(mode), "TGA", **options)
                yield Row("TGA", "grey, palette, RGB, alpha", f"{mode} {options}", content)
    yield from _old()
    for name, content in _read_only().items():
        yield Row("others", "CUR, DCX, FITS, GBR, PIXAR, PSD, SUN, XPM, XV thumbnails", name, content)


def _gif_and_pnm() -> Iterator[Row]:
    for mode in ("1", "L", "P"):
        yield Row("GIF", "still, transparent", mode, saved(image(mode), "GIF"))
    yield Row("GIF", "still, transparent", "transparent", saved(image("P"), "GIF", transparency=7))
    yield Row("GIF", "still, transparent", "RGBA", saved(image("RGBA"), "GIF"))
    yield Row("GIF", "still, transparent", "in order", saved(image("P"), "GIF", interlace=0))
    yield Row("GIF", "animated", "", saved(image("P"), "GIF", save_all=True, append_images=[turned()]))
    for mode in ("1", "L", "RGB"):
        yield Row("PBM, PGM, PPM", "1 and 8 bits", mode, saved(image(mode), "PPM"))
    size = f"{SIZE[1]} {SIZE[0]}"
    text = " ".join(map(str, picture().ravel().tolist()))
    yield Row("PBM, PGM, PPM", "1 and 8 bits", "P3", f"P3\n{size}\n255\n{text}\n".encode())
    low = (picture() * (100 / 255)).astype(np.uint8).tobytes()
    yield Row("PBM, PGM, PPM", "PPM of other ranges, to 16 bits", "100", f"P6\n{size}\n100\n".encode() + low)
    high = deep(picture()).astype(">u2").tobytes()
    yield Row("PBM, PGM, PPM", "PPM of other ranges, to 16 bits", "65535", f"P6\n{size}\n65535\n".encode() + high)
    yield Row("PBM, PGM, PPM", "PGM of 16 bits, PFM", "16 bits", saved(image("I;16"), "PPM"))
    yield Row("PBM, PGM, PPM", "PGM of 16 bits, PFM", "PFM", saved(image("F"), "PPM"))


def _old() -> Iterator[Row]:
    formats = {
        "DDS": ("L", "LA", "RGB", "RGBA"),
        "SGI": ("L", "RGB", "RGBA"),
        "PCX": ("1", "L", "P", "RGB"),
        "IM": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
        "QOI": ("RGB", "RGBA"),
        "BLP": ("P",),
        "MSP": ("1",),
        "XBM": ("1",),
    }
    common = ", ".join(formats)
    for kind, modes in formats.items():
        for mode in modes:
            yield Row("others", common, f"{kind} {mode}", saved(image(mode), kind))
    for packed in ("DXT1", "DXT3", "DXT5"):
        yield Row("others", common, f"DDS {packed}", saved(image("RGBA"), "DDS", pixel_format=packed))
    yield Row("others", "SGI, IM, SPIDER of 16 bits or float", "SGI", saved(image(), "SGI", bpc=2))
    yield Row("others", "SGI, IM, SPIDER of 16 bits or float", "IM I;16", saved(image("I;16"), "IM"))
    yield Row("others", "SGI, IM, SPIDER of 16 bits or float", "IM F", saved(image("F"), "IM"))
    yield Row("others", "SGI, IM, SPIDER of 16 bits or float", "SPIDER", saved(image("F"), "SPIDER"))


def _read_only() -> dict[str, bytes]:
    """Formats that Pillow reads but does not write."""
    height, width = SIZE
    colours, grey = picture(), np.asarray(image("L"))
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", f"NAXIS1  = {width}", f"NAXIS2  = {height}", "END"]
    head = f'"{width} {height} 2 1",\n"a c #ff2010",\n"b c #0010ff"'
    lines = "".join(f',\n"{"".join("ab"[x // 8 % 2] for x in range(y, y + width))}"' for y in range(height))
    pixar = b"\200\350\0\0".ljust(416, b"\0") + struct.pack("<HHHHHH", height, width, 0, 0, 14, 2)
    icon = saved(image("RGB"), "ICO", sizes=[SIZE[::-1]], bitmap_format="bmp")
    return {
        "CUR": icon[:2] + b"\2" + icon[3:],
        "DCX": struct.pack("<III", 0x3ADE68B1, 12, 0) + saved(image("L"), "PCX"),
        "FITS": "".join(card.ljust(80) for card in cards).ljust(2880).encode() + grey.tobytes(),
        "GBR": struct.pack(">5I", 21, 1, width, height, 1) + b"x" + grey.tobytes(),
        "PIXAR": pixar.ljust(1024, b"\0") + colours.tobytes(),
        "PSD": struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, height, width, 8, 3)
        + bytes(14)
        + colours.transpose(2, 0, 1).tobytes(),
        "SUN": struct.pack(">8I", 0x59A66A95, width, height, 24, colours.size, 1, 0, 0) + colours[..., ::-1].tobytes(),
        "XPM": f"/* XPM */\nstatic char *x[] = {{\n{head}{lines}}};\n".encode(),
        "XV": f"P7 332\n#IMGINFO:x\n#END_OF_COMMENTS\n{width} {height} 255\n".encode() + grey.tobytes(),
    }


@functools.cache
def rows() -> list[Row]:
    """All files."""
    return [*jpegs(), *pngs(), *webps(), *tiffs(), *bmps(), *others()]


def table() -> str:
    """The statements as a Markdown table, one per line."""
    lines = ["| format | contents | decoder | mean | max | remark |", "|---|---|---|---|---|---|"]
    for (kind, contents), (decoder, mean, largest, remark) in STATEMENTS.items():
        lines.append(f"| {kind} | {contents} | {decoder} | {mean:g} | {largest} | {remark} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
