"""Unparsable, damaged and odd files, made from scratch, each with its expected verdict.

Every delivered file is 96 wide and 64 high (with few exceptions), so that a loader whose output has that
size returns the decoded pixels themselves. Nothing here uses the package: Pillow writes the formats, or they are
written by hand where Pillow has no writer or the file must be wrong.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96
PNG_START, ZEROS = b"\x89PNG\r\n\x1a\n", bytes(2000)


@dataclass(frozen=True)
class Odd:
    """A file and its expected verdict.

    Args:
        content: bytes of the file.
        verdict: "pillow" (delivered, with Pillow's pixels), "dali" (delivered, DALI decodes it), "bad" (named with
            a reason and replaced), or "either" (delivered or bad).
        pixels: uint8 [64, 96, 3], the pixels that must be delivered; None: those of Pillow's ``convert("RGB")``.
        tolerance: max mean absolute difference from `pixels`, in grey levels.
        memory: max bytes that the process may need beyond those for a good file.
    """

    content: bytes
    verdict: str
    pixels: np.ndarray | None = None
    tolerance: float = 0.0
    memory: int = 10**9


@cache
def odd() -> dict[str, Odd]:
    """Every kind of file, by name."""
    found: dict[str, Odd] = {}
    for family in (_foreign, _starts, _jpeg, _png, _webp, _gif, _bmp, _tiff, _jpeg2000, _pnm, _rare):
        kinds = family()
        assert not kinds.keys() & found.keys()
        found |= kinds
    return found


def base() -> np.ndarray:
    """uint8 [64, 96, 3], a gradient in each channel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack(
        [x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), (x + y) * 255 // (WIDTH + HEIGHT - 2)], -1
    ).astype(np.uint8)


def pillow(content: bytes) -> np.ndarray:
    """The pixels that timm's loader decodes from a file."""
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def grey(levels) -> np.ndarray:
    """Three equal channels of `levels` [H, W] in [0, 255]."""
    return np.repeat(np.uint8(np.rint(levels))[..., None], 3, -1)


PATHS = ("folder", "missing", "broken link", "loop", "fifo", "socket", "device", "unreadable")


def odd_path(name: str, path: Path) -> None:
    """Creates something at `path` that is not a readable regular file; all of these are bad."""
    if name == "folder":
        path.mkdir()
    elif name == "broken link":
        path.symlink_to(path.parent / "nowhere")
    elif name == "loop":
        path.symlink_to(path)
    elif name == "fifo":
        os.mkfifo(path)
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif name == "device":
        path.symlink_to("/dev/zero")  # reading it would never end
    elif name == "unreadable":
        path.write_bytes(encoded("JPEG"))
        path.chmod(0)


# Examples of each cause by which a file ends the process or exhausts its memory, and the files with their own pixels.
CAUSES = (
    *("html", "svg", "text", "nothing", "one byte", "zeros", "gif", "avif", "ico", "pnm, PAM", "start of PNG"),
    *("jpeg, cut after 50 bytes", "jpeg, cut at half of its scan", "jpeg, without its end marker"),
    "jpeg, leading junk",
    *("jpeg, claims 30000x30000", "jpeg, CMYK without Adobe's marker", "jpeg, 12 bits", "jpeg, height 0"),
    *("png, cut before IEND", "png, cut at half of IDAT", "png, false checksum of IHDR", "png, width 0"),
    *("png, EXIF of 2 GB", "png, data of 2 GB", "png, white, 1x60000", "png, APNG with a default image"),
    *("webp, lossless of odd length, orientation 6", "webp, cut at half", "webp, extended, claims 16383x16383"),
    *("bmp, 16 bits", "bmp, RLE4", "bmp, RLE8 that runs past its rows", "bmp, 32 bits with masks"),
    *("tiff, float16", "tiff, grey of 17 bits", "tiff, RGB of 32 bits", "tiff, grey of 64 bits", "tiff, Lab"),
    *("tiff, orientation 6", "tiff, grey and alpha", "tiff, next directory is itself", "tiff, claims 60000x60000"),
    *("jpeg2000, cut before its first tile", "jpeg2000, tiles of height 0", "jpeg2000, 12 bits"),
    *("pnm, maxval 100", "eps"),
)


# Helpers


def encoded(kind: str, mode: str = "RGB", image: Image.Image | None = None, **options) -> bytes:
    """`base()`, or `image`, in a Pillow format."""
    buffer = io.BytesIO()
    image = Image.fromarray(base()) if image is None else image
    (image if image.mode == mode else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def _patched(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def _bad(**contents: bytes) -> dict[str, Odd]:
    return {name.replace("_", " "): Odd(content, "bad") for name, content in contents.items()}


def _exact(verdict: str, contents: dict[str, bytes], tolerance: float = 0.0) -> dict[str, Odd]:
    return {name: Odd(content, verdict, tolerance=tolerance) for name, content in contents.items()}


# Files that are not images


def _foreign() -> dict[str, Odd]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"><rect width="96" height="64"/></svg>'
    noise = np.random.default_rng(0).bytes(4096)
    return _bad(
        nothing=b"",
        one_byte=b"\xff",
        html=b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n",
        svg=svg,
        text=b"This is not an image.\n" * 20,
        pointer_of_Git_LFS=b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        zeros=ZEROS,
        noise=noise,
        heic=struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + noise[:200],
        wave=b"RIFF\x24\0\0\0WAVEfmt " + ZEROS[:28],
        byte_order_mark_then_jpeg=b"\xef\xbb\xbf" + encoded("JPEG"),
        html_with_a_jpeg_behind=b"<html></html>" + encoded("JPEG"),
    )


def _starts() -> dict[str, Odd]:
    """The first bytes of each format, and nothing else."""
    starts = {
        "JPEG": b"\xff\xd8\xff",
        "JPEG, two bytes": b"\xff\xd8",
        "JPEG, JFIF": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
        "PNG": PNG_START,
        "PNG, seven bytes": PNG_START[:7],
        "WebP": b"RIFF\x1a\0\0\0WEBP",
        "WebP, lossy": b"RIFF\x1a\0\0\0WEBPVP8 ",
        "WebP, lossless": b"RIFF\x1a\0\0\0WEBPVP8L",
        "WebP, extended": b"RIFF\x1a\0\0\0WEBPVP8X",
        "TIFF, little-endian": b"II*\0",
        "JPEG2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        "PNM": b"P6",
        "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
        "ICO": b"\0\0\1\0",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }
    return {f"start of {name}": Odd(content, "bad") for name, content in starts.items()}


# JPEG


def segments(jpeg: bytes) -> list[tuple[int, int]]:
    """(marker, offset) of a JPEG's segments, up to the scan."""
    found, place = [], 2
    while True:
        marker, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4], "big")
        found.append((marker, place))
        if marker == 0xDA:
            return found
        place += 2 + length


def _segment(jpeg: bytes, *markers: int) -> int:
    return next(place for marker, place in segments(jpeg) if marker in markers)


def _frame(jpeg: bytes) -> int:
    return _segment(jpeg, 0xC0, 0xC1, 0xC2)


def _without(jpeg: bytes, *markers: int) -> bytes:
    for marker, place in reversed(segments(jpeg)):
        if marker in markers:
            length = int.from_bytes(jpeg[place + 2 : place + 4], "big")
            jpeg = jpeg[:place] + jpeg[place + 2 + length :]
    return jpeg


def _sized(jpeg: bytes, height: int, width: int) -> bytes:
    return _patched(jpeg, _frame(jpeg) + 5, struct.pack(">HH", height, width))


def _jpeg() -> dict[str, Odd]:
    return _jpeg_good() | _jpeg_rare() | _jpeg_bad()


def _jpeg_good() -> dict[str, Odd]:
    jpeg = encoded("JPEG", quality=90)
    frame, scan = _frame(jpeg), _segment(jpeg, 0xDA)
    comment = b"\xff\xfe\xff\xff" + b"c" * 65533
    kinds = {
        "jpeg": jpeg,
        "jpeg, progressive": encoded("JPEG", progressive=True),
        "jpeg, broken EXIF": jpeg[:2] + b"\xff\xe1\0\x20Exif\0\0" + b"\xff" * 24 + jpeg[2:],
        "jpeg, two images (MPO)": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
        "jpeg, 10 kB behind its end": jpeg + np.random.default_rng(0).bytes(10_000),
        "jpeg, another behind its end": jpeg + encoded("JPEG", "L"),
        "jpeg, fill bytes before a marker": jpeg[:frame] + b"\xff" * 5 + jpeg[frame:],
        "jpeg, without Huffman tables": _without(jpeg, 0xC4),  # as in Motion JPEG: the standard tables are used
        "jpeg, bits flipped in the scan": _flipped(jpeg),
        "jpeg, header of arithmetic coding": _patched(jpeg, frame + 1, b"\xc9"),
        "jpeg, frame header behind 640 kB": jpeg[:2] + comment * 10 + jpeg[2:],
        "jpeg, scan behind 640 kB": jpeg[:scan] + comment * 10 + jpeg[scan:],
    }
    return _exact("dali", kinds, 1.0)


def _jpeg_rare() -> dict[str, Odd]:
    jpeg, cmyk = encoded("JPEG", quality=90), encoded("JPEG", "CMYK")
    comment = b"\xff\xfe\xff\xff" + b"c" * 65533
    adobe = _segment(cmyk, 0xEE)
    claim = Odd(_sized(jpeg, 9000, 9000), "either")  # below the pixel limit; whether it is truncated is debatable
    return {"jpeg, claims 9000x9000": claim} | _exact(
        "pillow",
        {
            "jpeg, CMYK": cmyk,
            "jpeg, CMYK without Adobe's marker": _without(cmyk, 0xEE),
            "jpeg, YCCK": _patched(cmyk, adobe + 15, b"\2"),
            "jpeg, CMYK, frame header behind 640 kB": cmyk[:2] + comment * 10 + cmyk[2:],
            "jpeg, segment of length 0": _patched(jpeg, 4, b"\0\0"),
            "jpeg, segment of length 1": _patched(jpeg, 4, b"\0\1"),
            "jpeg, CMYK, fill bytes": cmyk[: _frame(cmyk)] + b"\xff" * 5 + cmyk[_frame(cmyk) :],
        },
    )


def _flipped(jpeg: bytes) -> bytes:
    middle = (_segment(jpeg, 0xDA) + len(jpeg)) // 2
    return _patched(jpeg, middle, bytes(255 - byte for byte in jpeg[middle : middle + 4]))


def _jpeg_bad() -> dict[str, Odd]:
    jpeg, cmyk = encoded("JPEG", quality=90), encoded("JPEG", "CMYK")
    frame, scan = _frame(jpeg), _segment(jpeg, 0xDA)
    tables = _segment(jpeg, 0xDB)
    return {
        f"jpeg, {name}": Odd(content, "bad")
        for name, content in {
            "cut after 20 bytes": jpeg[:20],
            "cut after 50 bytes": jpeg[:50],
            "cut within its tables": jpeg[: tables + 30],
            "cut before its frame header": jpeg[:frame],
            "cut within its frame header": jpeg[: frame + 6],
            "cut behind its frame header": jpeg[: frame + 19],
            "cut within its scan header": jpeg[: scan + 5],
            "cut behind its scan header": jpeg[: scan + 14],
            "cut at a quarter of its scan": jpeg[: scan + (len(jpeg) - scan) // 4],
            "cut at half of its scan": jpeg[: scan + (len(jpeg) - scan) // 2],
            "zeros from the middle on": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) - len(jpeg) // 2),
            "without its end marker": jpeg[:-2],
            "CMYK cut at half": cmyk[: len(cmyk) // 2],
            "leading byte": b"\0" + jpeg,
            "leading newline": b"\n" + jpeg,
            "leading junk": b"junk" * 10 + jpeg,
            "segment longer than the file": _patched(jpeg, 4, b"\xff\xff"),
            "frame header of wrong length": _patched(jpeg, frame + 2, b"\0\x0b"),
            "claims 30000x30000": _sized(jpeg, 30000, 30000),
            "claims 65535x65535": _sized(jpeg, 65535, 65535),
            "height 0": _sized(jpeg, 0, WIDTH),
            "width 0": _sized(jpeg, HEIGHT, 0),
            "12 bits": _patched(jpeg, frame + 1, b"\xc1\0\x11\x0c"),
            "16 bits": _patched(jpeg, frame + 1, b"\xc1\0\x11\x10"),
            "marker without length": jpeg[:frame] + b"\xff\x01" + jpeg[frame:],
            "header of progressive": _patched(jpeg, frame + 1, b"\xc2"),
            "header of progressive arithmetic coding": _patched(jpeg, frame + 1, b"\xca"),
            "header of lossless coding": _patched(jpeg, frame + 1, b"\xc3"),
            "header of lossless arithmetic coding": _patched(jpeg, frame + 1, b"\xcb"),
            "header of hierarchical coding": _patched(jpeg, frame + 1, b"\xc5"),
            "no component": _patched(jpeg, frame + 9, b"\0"),
            "two components": _patched(jpeg, frame + 9, b"\2"),
            "five components": _patched(jpeg, frame + 9, b"\5"),
            "sampling factor 0": _patched(jpeg, frame + 11, b"\0"),
            "sampling factor 15": _patched(jpeg, frame + 11, b"\xff"),
            "without quantisation tables": _without(jpeg, 0xDB),
            "without frame header": _without(jpeg, 0xC0),
            "end marker at once": b"\xff\xd8\xff\xd9",
            "tables without image": jpeg[:frame] + b"\xff\xd9",
        }.items()
    }


# PNG


def chunk(name: bytes, data: bytes, length: int | None = None, crc: int | None = None) -> bytes:
    """A chunk of a PNG file, with a wrong length or checksum if given."""
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data) if length is None else length) + name + data + struct.pack(">I", crc)


def header(width: int = WIDTH, height: int = HEIGHT, depth: int = 8, colour: int = 2, *rest: int) -> bytes:
    """A PNG's IHDR chunk; `rest` is compression, filter and interlace."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, *(*rest, 0, 0, 0)[:3]))


def _rows(pixels: np.ndarray) -> bytes:
    """Rows of bytes, each preceded by the filter number 0."""
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(len(pixels), -1)
    return np.pad(rows, ((0, 0), (1, 0))).tobytes()


def png(first: bytes, data: bytes, *before: bytes) -> bytes:
    """A PNG file of IHDR, further chunks, and rows, which are compressed here."""
    return PNG_START + first + b"".join(before) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _png() -> dict[str, Odd]:
    return _png_good() | _png_damaged() | _png_bad()


def _png_good() -> dict[str, Odd]:
    rows, levels = _rows(base()), np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    colour = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)), Image.new("RGB", (WIDTH, HEIGHT), (0, 255, 0))
    red = np.array(colour[0])
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * 2**20)))
    exact = {
        "png": encoded("PNG"),
        "png, broken profile": png(header(), rows, chunk(b"iCCP", b"profile\0\0" + b"\xff" * 20)),
        "png, unknown chunk": png(header(), rows, chunk(b"abCd", b"\0" * 10)),
        "png, junk behind its end": encoded("PNG") + b"junk" * 1000,
        "png, false checksum of IEND": encoded("PNG")[:-1] + b"\0",
        "png, too many rows": png(header(), rows + rows),
        "png, index beyond its palette": png(header(colour=3), _rows(base()[..., 0]), chunk(b"PLTE", b"\1\2\3")),
        "png, APNG": encoded("PNG", image=colour[0], save_all=True, append_images=[colour[1]]),
    }
    sparse = png(header(1, 60000, 8, 0), _rows(np.full((60000, 1), 255, np.uint8)))
    return _exact("dali", exact) | {
        "png, APNG with a default image": Odd(
            encoded("PNG", image=colour[0], save_all=True, append_images=[colour[1]], default_image=True),
            "dali",
            red,
        ),
        "png, grey of 16 bits": Odd(encoded("PNG", "I;16", Image.fromarray(levels)), "dali", grey(levels / 257), 0.6),
        "png, white, 1x60000": Odd(sparse, "dali", np.full((HEIGHT, WIDTH, 3), 255, np.uint8)),
        "png, false checksum of a text": Odd(png(header(), rows, chunk(b"tEXt", b"Comment\0a", crc=1)), "dali", base()),
        "png, text that inflates to 64 MB": Odd(png(header(), rows, bomb), "dali", base()),
    }


def _png_damaged() -> dict[str, Odd]:
    """Files that DALI refuses and Pillow, which is more lenient, reads."""
    content, rows = encoded("PNG"), _rows(base())
    data = content.index(b"IDAT") - 4
    return _exact(
        "pillow",
        {
            "png, cut before IEND": content[:-12],
            "png, cut within IEND": content[:-6],
            "png, Apple's CgBI": PNG_START + chunk(b"CgBI", b"\0\0\0\0") + content[8:],
            "png, two IHDR": content[:33] + content[8:],
            "png, false checksum of IDAT": content[:-16] + b"\0\0\0\0" + content[-12:],
            "png, too few rows": png(header(), rows[: len(rows) // 2]),
            "png, compression 1": png(header(WIDTH, HEIGHT, 8, 2, 1), rows),
            "png, data of 2 GB": content[:data] + struct.pack(">I", 0x7FFFFFF0) + content[data + 4 :],
        },
    )


def _png_bad() -> dict[str, Odd]:
    content, rows = encoded("PNG"), _rows(base())
    data = content.index(b"IDAT") - 4
    huge = {
        "png, EXIF of 2 GB": content[:33] + struct.pack(">I4s", 0x7FFFFFF0, b"eXIf") + b"\0" * 12,
        "png, EXIF of 2 GB, then the image": content[:33] + struct.pack(">I4s", 0x7FFFFFF0, b"eXIf") + content[33:],
        "png, chunk of 4 GB": content[:33] + struct.pack(">I4s", 0xFFFFFFFF, b"tEXt") + content[33:],
    }
    damaged = {
        "cut within its signature": content[:6],
        "cut within IHDR": content[:20],
        "cut behind IHDR": content[:33],
        "cut before IDAT": content[:data],
        "cut at the start of IDAT": content[: data + 10],
        "cut at half of IDAT": content[: (data + len(content)) // 2],
        "false checksum of IHDR": content[:29] + b"\0\0\0\0" + content[33:],
        "bit flipped in IDAT": _patched(content, (data + len(content)) // 2, b"\0\0\0"),
        "no data": PNG_START + header() + chunk(b"IEND", b""),
        "empty data": PNG_START + header() + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        "data not compressed": PNG_START + header() + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
        "unknown filter": png(header(), b"\x09" + rows[1:]),
        "width 0": png(header(0, HEIGHT), b""),
        "height 0": png(header(WIDTH, 0), b""),
        "claims 60000x60000": png(header(60000, 60000), b""),
        "claims 9000x9000": png(header(9000, 9000), b""),
        "claims 2147483647x1": png(header(2**31 - 1, 1), b""),
        "depth 3": png(header(depth=3), rows),
        "RGB of 4 bits": png(header(depth=4), rows),
        "colour type 5": png(header(colour=5), rows),
        "interlace 2": png(header(WIDTH, HEIGHT, 8, 2, 0, 0, 2), rows),
        "IHDR of 12 bytes": PNG_START + chunk(b"IHDR", header()[8:20]) + content[33:],
        "no IHDR": PNG_START + content[33:],
        "line ends converted": content.replace(b"\r\n", b"\n"),
    }
    return _exact("bad", huge) | {f"png, {name}": Odd(each, "bad") for name, each in damaged.items()}


# WebP


def _webp() -> dict[str, Odd]:
    lossy, lossless = encoded("WEBP", quality=90), encoded("WEBP", lossless=True)
    extended = encoded("WEBP", exif=_exif(1))
    good = {
        "webp": lossy,
        "webp, lossless": lossless,
        "webp, junk behind its end": lossy + b"junk" * 100,
    }
    bad = {
        "cut after 16 bytes": lossy[:16],
        "cut after 25 bytes": lossy[:25],
        "cut at half": lossy[: len(lossy) // 2],
        "lossless, cut after 22 bytes": lossless[:22],
        "lossless, cut at half": lossless[: len(lossless) // 2],
        "extended, cut behind its header": extended[:30],
        "extended, claims 16383x16383": _patched(extended, 24, b"\xfe\x3f\0\xfe\x3f\0"),
        "claims 16383x16383": _patched(lossy, 26, b"\xff\x3f\xff\x3f"),
        "size 0": _patched(lossy, 26, b"\0\0\0\0"),
        "unknown chunk only": b"RIFF\x0e\0\0\0WEBPABCD\2\0\0\0ab",
        "leading byte": b"\0" + lossy,
        "RIFF length too small": _patched(lossy, 4, struct.pack("<I", len(lossy) // 2)),
        "RIFF length too large": _patched(lossy, 4, struct.pack("<I", len(lossy) * 2)),
        "without its last 10 bytes": lossy[:-10],
    }
    return (
        _exact("dali", good, 1.0)
        | {f"webp, {name}": Odd(content, "bad") for name, content in bad.items()}
        | {"webp, lossless of odd length, orientation 6": Odd(_odd_webp(), "pillow")}
    )


def _odd_webp() -> bytes:
    """Lossless, rotated by its EXIF, and with a VP8L chunk of odd length, whose padding byte confuses a parser."""
    for seed in range(100):
        noise = np.random.default_rng(seed).integers(0, 3, (HEIGHT, WIDTH, 3), np.uint8)
        content = encoded("WEBP", image=Image.fromarray(base() // 2 + noise), lossless=True, exif=_exif(6))
        place = content.index(b"VP8L") + 4
        if int.from_bytes(content[place : place + 4], "little") % 2:
            return content
    raise AssertionError("no lossless WebP of odd length")


# GIF


def _gif() -> dict[str, Odd]:
    still = encoded("GIF")
    frames = dict(save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), "green")])
    frame = still.index(b"\x2c", 781)  # after the palette of 256 colours
    good = {
        "gif": still,
        "gif, animated": encoded("GIF", **frames),
        "gif, size 0": _patched(still, 6, bytes(4)),  # the frame says so
    }
    bad = {
        "gif, cut within its header": still[:10],
        "gif, cut at half of its image": still[: (frame + len(still)) // 2],
        "gif, claims 65535x65535": _patched(still, 6, b"\xff" * 4),
        "gif, frame of 65535x65535": _patched(still, frame + 5, b"\xff" * 4),
    }
    return _exact("pillow", good) | _exact("bad", bad)


# BMP


def bmp(
    bits: int, compression: int, data: bytes, *, extra: bytes = b"", width: int = WIDTH, height: int = HEIGHT
) -> bytes:
    """A BMP file; `extra` holds masks or a palette after the 40-byte header."""
    start = 54 + len(extra)
    colours = len(extra) // 4 if bits <= 8 else 0
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 2835, 2835, colours, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + extra + data


def _palette(count: int) -> bytes:
    return b"".join(bytes((3 * k % 256, k, 255 - k, 0)) for k in range(count))


def _bmp() -> dict[str, Odd]:
    fives, content = (base()[::-1] >> 3).astype(np.uint16), encoded("BMP")
    blue, green, red = (base()[::-1, :, k].astype(np.uint32) for k in (2, 1, 0))
    word = (red << 24 | green << 16 | blue << 8).astype("<u4").tobytes()
    sixteen = (fives[..., 0] << 10 | fives[..., 1] << 5 | fives[..., 2]).astype("<u2").tobytes()
    run8 = b"".join(bytes((WIDTH, y, 0, 0)) for y in range(HEIGHT)) + b"\0\1"
    over = b"".join(bytes((WIDTH + 20, y, 0, 0)) for y in range(HEIGHT)) + b"\0\1"
    run4 = b"".join(bytes((WIDTH, 17 * (y % 16), 0, 0)) for y in range(HEIGHT)) + b"\0\1"
    masks = struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00)
    pillow_reads = {
        "bmp": content,
        "bmp, 16 bits": bmp(16, 0, sixteen),
        "bmp, RLE4": bmp(4, 2, run4, extra=_palette(16)),
        "bmp, RLE8 that runs past its rows": bmp(8, 1, over, extra=_palette(256)),
    }
    bad = {
        "cut at half": content[: len(content) // 2],
        "RLE8 cut at half": bmp(8, 1, run8[:100], extra=_palette(256)),
        "claims 60000x60000": bmp(24, 0, b"", width=60000, height=60000),
        "size 0": bmp(24, 0, b"", width=0, height=0),
        "64 bits": bmp(64, 0, bytes(WIDTH * HEIGHT * 8)),
        "JPEG within": bmp(0, 4, encoded("JPEG")),
    }
    return (
        _exact("pillow", pillow_reads)
        | {"bmp, 32 bits with masks": Odd(bmp(32, 3, word, extra=masks), "pillow", base())}
        | {f"bmp, {name}": Odd(each, "bad") for name, each in bad.items()}
    )


# TIFF

SHORT, LONG = 3, 4


def tiff(pixels: np.ndarray, tags: dict[int, int | tuple[int, ...]], following: int = 0) -> bytes:
    """A little-endian TIFF file of one strip; `following` is the offset of the next directory.

    `tags` are set after those that `pixels` [H, W, ...] require; all are SHORT or LONG.
    """
    height, width, *channels = pixels.shape
    samples, data = (channels or [1])[0], pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    known = {256: width, 257: height, 258: (8 * pixels.itemsize,) * samples, 259: 1, 262: 2 if samples > 2 else 1}
    known |= {273: 8, 277: samples, 278: height, 279: len(data), 339: (_sample_format(pixels),) * samples} | tags
    place = 8 + len(data)
    extra_place, entries, extra = place + 2 + 12 * len(known) + 4, b"", b""
    for tag, value in sorted(known.items()):
        values = value if isinstance(value, tuple) else (value,)
        kind = LONG if max(values) > 0xFFFF or tag in (273, 279) else SHORT
        content = struct.pack("<" + ("I" if kind == LONG else "H") * len(values), *values)
        if len(content) > 4:
            extra, content = extra + content, struct.pack("<I", extra_place + len(extra))
        entries += struct.pack("<HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    directory = struct.pack("<H", len(known)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", place) + data + directory + extra


def _sample_format(pixels: np.ndarray) -> int:
    return {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]


def _tiff() -> dict[str, Odd]:
    levels = base()[..., 0]
    turned = encoded("TIFF", image=Image.fromarray(np.ascontiguousarray(np.rot90(base()))), tiffinfo={274: 6})
    own = len(base().tobytes()) + 8  # the offset of the directory
    pillow_reads = {
        "tiff": encoded("TIFF"),
        "tiff, Lab": tiff(base(), {262: 8}),
        "tiff, next directory is itself": tiff(base(), {}, following=own),
        "tiff, next directory behind its end": tiff(base(), {}, following=10**6),
    }
    bad = {
        "cut before its directory": tiff(base(), {})[:own],
        "directory behind its end": _patched(tiff(base(), {}), 4, b"\xff\xff\xff\x7f"),
        "no tags": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        "claims 60000x60000": tiff(base(), {256: 60000, 257: 60000, 278: 60000}),
        "size 0": tiff(base(), {256: 0, 257: 0}),
        "float16": tiff((base() / 255).astype(np.float16), {}),
        "float64": tiff((levels / 255).astype(np.float64), {}),
        "RGB of float32": tiff((base() / 255).astype(np.float32), {}),
        "RGB of 32 bits": tiff(base().astype(np.uint32) << 24, {}),
        "grey of 64 bits": tiff(levels.astype(np.uint64) << 56, {}),
        "grey of 17 bits": tiff(levels.astype(np.uint32), {258: 17}),
        "data behind its end": tiff(base(), {273: 10**6}),
        "LZW cut at half": encoded("TIFF", compression="tiff_lzw")[:-3000],
    }
    return (
        _exact("pillow", pillow_reads)
        | {
            "tiff, orientation 6": Odd(turned, "pillow", base()),
            "tiff, grey and alpha": Odd(encoded("TIFF", "LA"), "pillow", pillow(encoded("PNG", "L"))),
        }
        | {f"tiff, {name}": Odd(content, "bad") for name, content in bad.items()}
    )


# JPEG2000


def _jpeg2000() -> dict[str, Odd]:
    boxed, stream = encoded("JPEG2000"), encoded("JPEG2000", no_jp2=True)
    size = boxed.index(b"\xff\x51") + 2
    values, deep = _twelve_bits()
    bad = {
        "cut at half": boxed[: len(boxed) // 2],
        "cut before its first tile": boxed[: boxed.index(b"\xff\x90")],
        "codestream cut before its first tile": stream[: stream.index(b"\xff\x90")],
        "tiles of height 0": _patched(boxed, size + 24, bytes(4)),
        "tiles of width 0": _patched(boxed, size + 20, bytes(4)),
        "claims 60000x60000": _patched(boxed, size + 4, struct.pack(">II", 60000, 60000)),
        "size 0": _patched(boxed, size + 4, bytes(8)),
        "codestream of subsampling 0": _patched(stream, stream.index(b"\xff\x51") + 41, b"\0"),
        "16384 components": _patched(boxed, size + 36, b"\x40\0"),
    }
    return {
        "jpeg2000": Odd(boxed, "pillow"),
        "jpeg2000, 12 bits": Odd(deep, "pillow", np.rint(values * 255.0 / 4095).astype(np.uint8), 1.0),
    } | {f"jpeg2000, {name}": Odd(content, "bad") for name, content in bad.items()}


def _twelve_bits() -> tuple[np.ndarray, bytes]:
    """Levels in [0, 4095] and their codestream.

    Pillow writes 8 bits. The header's depth only sets the offset added to the decoded, signed values: half of the
    range. So values shifted by the difference of the two halves are correct once the header says 12.
    """
    values = base().astype(np.uint16) + 2**11 - 2**7
    content = encoded("JPEG2000", no_jp2=True, mct=0)
    depths = content.index(b"\xff\x51") + 2 + 38
    for place in range(depths, depths + 9, 3):
        content = _patched(content, place, b"\x0b")
    return values, content


# PNM


def _pnm() -> dict[str, Odd]:
    pixels, size = base().tobytes(), b"96 64"
    percent = (base().astype(int) * 100 // 255).astype(np.uint8)
    ascii_ = b" ".join(b"%d" % value for value in pixels)
    pam = b"P7\nWIDTH 96\nHEIGHT 64\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + pixels
    bad = {
        "header only": b"P6 %b 255\n" % size,
        "cut at half": b"P6 %b 255\n%b" % (size, pixels[: len(pixels) // 2]),
        "text cut at half": b"P3 %b 255\n%b" % (size, ascii_[: len(ascii_) // 2]),
        "claims 60000x60000": b"P6 60000 60000 255\n" + pixels,
        "size 0": b"P6 0 0 255\n",
        "maxval 0": b"P6 %b 0\n%b" % (size, pixels),
        "size of 100 digits": b"P6 %b 64 255\n%b" % (b"9" * 100, pixels),
    }
    return {
        "pnm": Odd(b"P6 %b 255\n%b" % (size, pixels), "pillow"),
        "pnm, maxval 100": Odd(
            b"P6 %b 100\n%b" % (size, percent.tobytes()),
            "pillow",
            np.rint(percent * 2.55).astype(np.uint8),
            0.5,
        ),
        "pnm, PAM": Odd(pam, "bad"),
    } | {f"pnm, {name}": Odd(content, "bad") for name, content in bad.items()}


# Formats that only Pillow reads


def _rare() -> dict[str, Odd]:
    avif, tga, ico = encoded("AVIF", quality=100), encoded("TGA"), _ico(encoded("PNG", "RGBA"))
    good = {"avif": avif, "ico": ico}
    bad = {
        "avif, cut after 40 bytes": avif[:40],
        "avif, cut at half": avif[: len(avif) // 2],
        "tga, cut at half": tga[: len(tga) // 2],
        "tga, claims 60000x60000": _patched(tga, 12, struct.pack("<HH", 60000, 60000)),
        "ico, cut at half": ico[: len(ico) // 2],
        "ico, PNG of 60000x60000 within": _ico(png(header(60000, 60000), b"")),
        "dds, cut at half": encoded("DDS")[:5000],
        "qoi, cut at half": encoded("QOI")[:1000],
        "eps": encoded("EPS"),  # rendering it would run Ghostscript on the file's contents
        "eps, postscript only": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n0 0 moveto showpage\n%%EOF\n",
    }
    return _exact("pillow", good) | _exact("bad", bad)


def _ico(image: bytes) -> bytes:
    """An icon whose directory says 96x64, whatever the size of `image`."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", WIDTH, HEIGHT, 0, 0, 1, 32, len(image), 22) + image
