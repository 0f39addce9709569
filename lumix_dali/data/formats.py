"""Chooses the decoder of each image from its header, before DALI sees a byte of it.

DALI 2.4 can end the process on a file that it cannot parse, and silently returns wrong pixels for some that it can. So
DALI gets only what it decodes safely and exactly: JPEG, PNG and WebP files of intact structure. Pillow decodes
everything else, to the same pixels as timm's loader, and its result reaches the pipeline as an uncompressed BMP. An
image that neither can read is a `BadImage`.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import cache
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000
# Extensions of images: timm's, and some more.
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".avif",
    ".jp2",
    ".ppm",
    ".pgm",
    ".pnm",
)
# Pillow decodes Encapsulated PostScript with Ghostscript, a program that untrusted files must not reach.
_REFUSED = {"EPS"}
_HEAD = 4096
FOREIGN = "DALI is given only JPEG, PNG and WebP"  # why Pillow decodes other formats
# No camera writes more segments before a JPEG's frame header; Pillow judges files with more.
_MAX_SEGMENTS = 1000

Read = Callable[[int, int], bytes]  # (offset, size) -> at most `size` bytes


class Decoder(IntEnum):
    """The decoder of a sample."""

    UNKNOWN = 0
    DALI = 1
    PILLOW = 2


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, without the name of the image."""


class Look(NamedTuple):
    """What a header says.

    Args:
        decoder: of the image.
        format: Pillow's name of it.
        height, width: in pixels.
        why: why Pillow decodes it, or how DALI's pixels differ from those of timm's loader.
    """

    decoder: Decoder
    format: str
    height: int
    width: int
    why: str = ""


def look(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Look:
    """Reads an image's header and chooses its decoder.

    Args:
        file: the encoded image, open for reading in binary mode.
        max_pixels: limit of height times width.

    Raises:
        BadImage: neither DALI nor Pillow can read the file, or its header claims more pixels than the limit.
    """
    found = _dali(file)
    if isinstance(found, str):
        with _by_pillow(lambda: _opened(file), max_pixels) as image:
            found = Look(Decoder.PILLOW, image.format or "", image.height, image.width, found)
    check_pixels(found.height, found.width, max_pixels)
    return found


def is_image(name: str) -> bool:
    """Whether a file's name has an image's extension and no part of its path is hidden."""
    return name.lower().endswith(EXTENSIONS) and name[0] != "." and "/." not in name


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raises `BadImage` if an image has more than `max_pixels`, or none."""
    if not 0 < height * width <= max_pixels:
        raise BadImage(f"{width}x{height} pixels, the limit is {max_pixels}")


def pillow_pixels(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image as timm's loader does: Pillow's ``convert("RGB")``, without applying the EXIF orientation.

    Raises:
        BadImage: Pillow cannot decode it, or it has more pixels than the limit.
    """

    def decode() -> Image.Image:
        with _opened(file) as image:
            check_pixels(image.height, image.width, max_pixels)
            return image.convert("RGB")

    return _by_pillow(decode, max_pixels)


def _opened(file: BinaryIO) -> Image.Image:
    return Image.open(file, formats=_pillow_formats())


def _by_pillow(work: Callable[[], Image.Image], max_pixels: int) -> Image.Image:
    """What `work` returns, with our pixel limit instead of Pillow's and without the user's warning filters.

    Neither may decide which images exist. Both are global: they are touched only where they would matter.

    Raises:
        BadImage: Pillow cannot do it, or an image has more pixels than the limit, perhaps one within another, as in
            an ICO.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if limit is not None and limit <= MAX_PIXELS and all(action != "error" for action, *_ in warnings.filters):
            with suppress(Image.DecompressionBombError):
                return work()
        with _limits_replaced(max_pixels):
            return work()
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image that DALI or Pillow can read") from error
    except Exception as error:  # a hostile file can make Pillow raise anything: struct.error, zlib.error, ...
        raise BadImage(_words(error)) from error


def bitmap(image: Image.Image) -> bytes:
    """Encodes an RGB image as an uncompressed BMP, which DALI decodes bit for bit."""
    file = io.BytesIO()
    image.save(file, "BMP")
    return file.getvalue()


def open_regular(path: str | bytes) -> BinaryIO:
    """Opens a regular file; rejects a FIFO or device, which could block forever.

    Raises:
        BadImage: it cannot be opened, or is not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadImage(_words(error)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadImage("not a regular file")
    return open(handle, "rb", buffering=0)


_lifted: list[Any] = []  # (the filter that was added, the limit of before), for each thread without limits
_lifted_lock = Lock()


@contextmanager
def _limits_replaced(max_pixels: int) -> Iterator[None]:
    """For all threads, while any thread is in here; ``warnings.catch_warnings`` would put back a whole list."""
    ours = -(-max_pixels // 2)  # Pillow raises an error above twice its limit, and only warns below
    with _lifted_lock:
        if not _lifted:
            warnings.filterwarnings("ignore", module=r"(PIL|lumix_dali)\.")
            _lifted.append((warnings.filters[0], Image.MAX_IMAGE_PIXELS))
            Image.MAX_IMAGE_PIXELS = ours
        else:
            _lifted.append(_lifted[0])
            Image.MAX_IMAGE_PIXELS = max(ours, Image.MAX_IMAGE_PIXELS or 0)
    try:
        yield
    finally:
        with _lifted_lock:
            added, before = _lifted.pop()
            if not _lifted:
                Image.MAX_IMAGE_PIXELS = before
                with suppress(ValueError):  # someone else put back the filters of before
                    warnings.filters.remove(added)  # type: ignore[attr-defined]


@cache
def _pillow_formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED]


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _dali(file: BinaryIO) -> Look | str:
    """What the header of a file for DALI says, or why the file is left to Pillow."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD)

    def read(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        file.seek(offset)
        return file.read(count)

    for magic, parse, otherwise in (
        (b"\xff\xd8\xff", _jpeg, "neither grey nor of three components, or not Huffman-coded with 8 bits"),
        (b"\x89PNG\r\n\x1a\n", _png, "animated, or without an end"),
        (b"RIFF", _webp, "with EXIF, or damaged"),
    ):
        if head.startswith(magic):
            with suppress(struct.error, IndexError):  # the file ends within the header
                found = parse(read, size)
                if found and found.height and found.width:
                    return found
            return otherwise
    return FOREIGN


def _jpeg(read: Read, size: int) -> Look | None:
    """A Huffman-coded 8-bit JPEG with one or three components."""
    offset = 2
    for _ in range(_MAX_SEGMENTS):
        prefix, marker, length = struct.unpack(">BBH", read(offset, 4))
        if prefix != 0xFF:
            return None
        if marker == 0xFF:  # fill bytes may stand before a marker
            offset += 1
        elif marker in (0xC0, 0xC1, 0xC2):  # baseline, extended sequential, progressive
            bits, height, width, components = struct.unpack(">BHHB", read(offset + 4, 6))
            return Look(Decoder.DALI, "JPEG", height, width) if bits == 8 and components in (1, 3) else None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless, hierarchical or arithmetic-coded
        elif marker in (0xD9, 0xDA) or length < 2:  # the image data begins or ends before a frame header
            return None
        else:
            offset += 2 + length
    return None


def has_stray_marker(file: BinaryIO) -> bool:
    """Whether a JPEG's scans hold a marker that does not belong there, or do not end; nothing is decoded.

    At some of them libjpeg gives up, which nvImageCodec takes for success: the rest of the image is grey. Whether the
    pixels are complete is for `pillow_pixels` to say.
    """
    file.seek(0)
    content = file.read()
    offset, components, allowed = 2, 0, _SEGMENTS | _FRAMES
    while True:
        try:
            prefix, marker, length = struct.unpack_from(">BBH", content, offset)
        except struct.error:  # the file ends, perhaps with its end marker
            return content[offset:] != b"\xff\xd9"
        if prefix == marker == 0xFF:  # fill bytes may stand before a marker
            offset += 1
            continue
        if prefix != 0xFF or marker not in allowed:
            return (prefix, marker) != (0xFF, 0xD9)
        segment = content[offset + 4 : offset + 2 + length]
        offset += 2 + length
        if marker in _FRAMES and len(segment) > 5:
            components, allowed = segment[5], _SEGMENTS
        if marker == 0xDA:
            if (end := _IN_SCAN.search(content, offset)) is None:
                return True
            offset = end.end() - 2
            if segment[:1] == bytes([components]) and segment[-3:] == b"\0\x3f\0":
                allowed = frozenset()  # this scan has all components and coefficients: only the end may follow


# Tables, restart intervals, scans, heights, application data and comments.
_SEGMENTS = frozenset((0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_IN_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed zero, fill, nor a restart


# The rows of docs/reliability.md where DALI's pixels are not timm's.
_DEEP_GREY = "grey of 16 bits is scaled to 8 bits, where Pillow clips it at 255"
_DEEP = "16 bits are rounded to 8, where Pillow takes the upper byte"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _png(read: Read, size: int) -> Look | None:
    """A PNG without animation whose chunks are complete and end with IEND."""
    length, kind, width, height, depth, colour, compression, filtering, interlace = struct.unpack(
        ">I4sIIBBBBB", read(8, 21)
    )
    if (length, kind) != (13, b"IHDR") or depth not in _PNG_DEPTHS.get(colour, ()):
        return None
    if (compression, filtering) != (0, 0) or interlace > 1:
        return None
    offset = 33
    while offset + 12 <= size:
        length, kind = struct.unpack(">I4s", read(offset, 8))
        if kind == b"IEND":
            return Look(Decoder.DALI, "PNG", height, width, (_DEEP if colour else _DEEP_GREY) if depth == 16 else "")
        if kind == b"acTL":
            return None
        offset += 12 + length
    return None


_WEBP_EXIF = 0x08


def _webp(read: Read, size: int) -> Look | None:
    """A WebP without EXIF: DALI's parser may fail to find that chunk."""
    length, form, kind = struct.unpack("<I4s4s", read(4, 12))
    if form != b"WEBP" or length + 8 > size:
        return None
    if kind == b"VP8 ":
        start, width, height = struct.unpack("<3sHH", read(23, 7))
        return Look(Decoder.DALI, "WEBP", height & 0x3FFF, width & 0x3FFF) if start == b"\x9d\x01\x2a" else None
    if kind == b"VP8L":
        signature, packed = struct.unpack("<BI", read(20, 5))
        height, width = (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
        return Look(Decoder.DALI, "WEBP", height, width) if signature == 0x2F else None
    if kind == b"VP8X" and not read(20, 1)[0] & _WEBP_EXIF:
        width, height = (int.from_bytes(read(offset, 3), "little") + 1 for offset in (24, 27))
        return Look(Decoder.DALI, "WEBP", height, width)
    return None
