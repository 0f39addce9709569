"""A tar or TFRecord shard as arrays: where each sample's image lies, and its label.

A shard is scanned once, header by header. The result is kept as one memory-mapped file per set of shards, which the
ranks share. ``.idx`` files are neither needed nor read, and nothing is extracted to disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple, Self, cast

import numpy as np

from ..cpus import available
from ..progress import Progress
from . import children, storage
from .formats import EXTENSIONS, is_image

IMAGE, LABEL, NAME = "image/encoded", "image/class/label", "image/filename"  # TensorFlow's names for ImageNet
DIGITS = 9  # of the longest label
# What files begin with that are none of the formats.
_NO_SHARD = {
    magic: f"compressed ({name}), and samples in it cannot be found by their place; decompress it first"
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zxz", "xz"), (b"bzh", "bzip2"))
} | dict.fromkeys(
    (b"<!doctype", b"<html"), "a web page, not a shard: the server wants a login, or the address is wrong"
)
_FORMAT = 6  # of the kept file
_ALONE = 8  # shards for which a process of their own does not pay


class Fault(IntEnum):
    """Why a sample cannot be used: a negative number that takes the place of its label."""

    NO_IMAGE = -1
    IMAGES = -2
    NO_LABEL = -3
    LABEL = -4
    TWICE = -5
    RECORD = -6

    @property
    def reason(self) -> str:
        """The fault in words."""
        return {
            Fault.NO_IMAGE: "no image",
            Fault.IMAGES: "more than one image",
            Fault.NO_LABEL: "no label (.cls)",
            Fault.LABEL: f"its label is not a whole number of 1 to {DIGITS} digits",
            Fault.TWICE: "two members of one name",
            Fault.RECORD: f"its record holds no tf.train.Example with one {IMAGE} and one {LABEL}",
        }[self]


class Row(NamedTuple):
    """A sample in a shard: its name, the offset and size of its encoded image in bytes, and its label or a `Fault`.

    With `Fault.LABEL`, a tar's sample has the offset of its label in place of the image's size.
    """

    name: str
    offset: int
    size: int
    label: int


def kind_of(path: str) -> str:
    """The kind of a shard, by its name: "webdataset" for ``*.tar``, else "tfrecord"."""
    return "webdataset" if path.endswith(".tar") else "tfrecord"


def rows(path: str, handle: int, ignored: list[str] | None = None) -> Iterator[Row]:
    """Reads the samples of a shard from beginning to end.

    Args:
        path: name of the shard, which tells its kind.
        handle: descriptor of the local file.
        ignored: receives the names of members that are hidden or not regular files.

    Raises:
        ValueError: it is damaged, so nothing after the damage can be read, or a member's path leads out of the archive.
    """
    yield from _tar_rows(handle, ignored) if kind_of(path) == "webdataset" else _record_rows(handle)


def scan(path: str, handle: int) -> np.ndarray:
    """int64 [n, 3]: offset, size and label (or `Fault`) of each sample of a shard.

    Raises:
        ValueError: as `rows`, with the name of the shard, or it contains no sample.
    """
    first = os.pread(handle, 16, 0)
    for magic, what in _NO_SHARD.items():
        if first.lstrip().lower().startswith(magic):
            raise ValueError(f"source={path!r}: it is {what}")
    try:
        found = np.array([row[1:] for row in rows(path, handle)], np.int64).reshape(-1, 3)
    except (ValueError, OSError) as error:
        raise ValueError(f"source={path!r}: {error}; repair or remove it") from error
    if not len(found):
        raise ValueError(f"source={path!r}: no sample in it; remove it, or see `lumix-dali check`")
    return found


def name_at(path: str, handle: int, offset: int) -> str:
    """The name of the sample whose image starts at `offset`; only for messages, since it scans the shard."""
    name = next((row.name for row in rows(path, handle) if row.offset == offset), "")
    return f"{name if name.startswith('record') else repr(name)} (byte {offset})"


def reason(path: str, handle: int, row: Sequence[int]) -> str:
    """Why a sample cannot be used, given its row: offset, size and `Fault`; quotes an invalid label."""
    _, offset, fault = row
    if fault == Fault.LABEL and kind_of(path) == "webdataset":
        return f"its .cls is {os.pread(handle, 20, offset).rstrip(bytes(1))!r}, not 1 to {DIGITS} digits"
    return Fault(fault).reason


# The index of a set of shards


def load(
    paths: Sequence[str],
    entries: Sequence[storage.Entry],
    progress: Progress = lambda items, total: items,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all shards in turn, memory-mapped, and the number of rows of each shard.

    The first process scans the shards and keeps the result beside them, or in the cache folder if it may not write
    there. Other processes wait for it.

    Args:
        paths: local shards.
        entries: size and version of each, so that a changed shard is scanned again.
        progress: wraps the iterable of scanned shards, given their number.

    Returns:
        int64 [n, 3], as `scan` gives, and int64 [number of shards].

    Raises:
        ValueError: a shard is damaged.
    """
    sha = hashlib.sha256(repr([_FORMAT, *zip(map(os.path.abspath, paths), entries, strict=True)]).encode())
    name = f"{sha.hexdigest()[:32]}.npy"
    homes = [os.path.join(os.path.dirname(os.path.abspath(paths[0])), ".lumix_dali"), storage.cache_folder()]
    for home in homes:
        with suppress(Exception):  # missing, or damaged in any way
            return _opened(os.path.join(home, name), len(paths))
    found: list[np.ndarray] = []
    failed: list[str] = []
    for home in homes:
        target = os.path.join(home, name)
        try:
            os.makedirs(home, exist_ok=True)
            with storage.locked(os.path.join(home, "lock")):
                with suppress(Exception):  # another process was faster
                    return _opened(target, len(paths))
                found = found or list(progress(_scanned(paths), len(paths)))
                counts = np.array(list(map(len, found)), np.int64)
                keep(target, np.concatenate([counts, *(each.ravel() for each in found)]))
            return _opened(target, len(paths))
        except OSError as error:  # read-only or full
            failed.append(f"{home} ({error.strerror})")
    raise ValueError(
        f"source={paths[0]!r}: its index cannot be written to {' or '.join(failed)}; set LUMIX_DALI_CACHE to a folder "
        "with space"
    )


def _opened(path: str, shards: int) -> tuple[np.ndarray, np.ndarray]:
    content = kept(path)
    return content[shards:].reshape(-1, 3), np.array(content[:shards])


def keep(path: str, content: np.ndarray) -> None:
    """Writes int64 [n] and a checksum to a file that gets its name once it is complete."""
    with storage.replacing(path) as file:
        # NumPy writes to a real file by itself, and does not say that a disk is full.
        np.save(cast(Any, SimpleNamespace(write=file.write)), np.append(content, zlib.crc32(content.tobytes())))


def kept(path: str) -> np.ndarray:
    """What `keep` wrote, int64 [n], memory-mapped.

    Raises:
        Exception: it is missing or damaged; NumPy raises almost anything.
    """
    content = np.asarray(np.load(path, mmap_mode="r"))  # a plain array: slices of np.memmap are slow
    if content.dtype != np.int64 or content.ndim != 1 or zlib.crc32(cast(Any, content[:-1])) != content[-1]:
        raise ValueError(f"{path}: damaged")
    return content[:-1]


def _scanned(paths: Sequence[str]) -> Iterator[np.ndarray]:
    """`scan` of each shard, in order, in several processes if that pays."""
    workers = min(available(), len(paths) // _ALONE)
    if workers < 2:
        yield from map(_scan_path, paths)
        return
    for (rows_of_one,) in children.run(_scan_paths, [[path] for path in paths], workers):
        if isinstance(rows_of_one, children.Died):
            raise ValueError("source: the process that scans its shards died; try again")
        yield rows_of_one


def _scan_paths(paths: Sequence[str]) -> list[np.ndarray]:
    return [_scan_path(path) for path in paths]


def _scan_path(path: str) -> np.ndarray:
    try:
        with open(path, "rb", buffering=0) as file:
            return scan(path, file.fileno())
    except OSError as error:
        raise ValueError(f"source={path!r}: {error.strerror}; give a file that can be read") from error


def _read(handle: int, offset: int, size: int) -> bytes:
    content = os.pread(handle, size, offset)
    if len(content) < size:
        raise ValueError(f"it is cut short at byte {offset + len(content)}")
    return content


# WebDataset: tar archives


def members(handle: int, ignored: list[str] | None = None) -> Iterator[tarfile.TarInfo]:
    """The regular members of a tar archive that are not hidden.

    Raises:
        ValueError: it is damaged, or a member's path is absolute or leads out of the archive.
    """
    for info, stop in _headers(handle):
        is_regular = info.isreg() and not info.issparse()
        size = info.size if is_regular else 0
        is_number = info.pax_headers.get("size", "0").isdecimal()  # else tarfile takes it for 0
        if not is_number or not info.offset_data <= info.offset_data + size <= stop:
            raise ValueError(f"not a complete tar archive: the size of {info.name!r} is damaged")
        if info.name.startswith("/") or ".." in info.name.split("/"):
            raise ValueError(f"member {info.name!r} leads out of the archive; refused")
        if is_regular and not os.path.basename(info.name).startswith("."):
            yield info
        elif not info.isdir() and ignored is not None:
            ignored.append(info.name)


class _Header(tarfile.TarInfo):
    """A header whose name is its own: tarfile adds a prefix where ``tar --listed-incremental`` keeps times."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if buf[257:263] != b"ustar\0":
            info.name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
        return info


def _headers(handle: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member of a tar archive, and where the next one begins."""
    last = "its beginning"
    try:
        # Opened again, as other threads move the descriptor's position; UTF-8 whatever the locale.
        with (
            open(f"/proc/self/fd/{handle}", "rb") as file,
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", tarinfo=_Header) as archive,
        ):
            while info := archive.next():
                cast(Any, archive).members.clear()  # it would keep millions
                last = repr(info.name)
                yield info, archive.offset
            if os.pread(handle, tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):
                raise tarfile.ReadError(f"byte {archive.offset}")  # tarfile takes it for the end
    except Exception as error:  # tarfile raises almost anything
        raise ValueError(f"not a complete tar archive: damaged or cut short after {last} ({error})") from error


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the extension starts at the first dot of the file name."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()


def _tar_rows(handle: int, ignored: list[str] | None) -> Iterator[Row]:
    """Samples: consecutive members with the same key, one of them an image and one its .cls."""
    named = ((*split_name(member.name), member) for member in members(handle, ignored))
    for _, group in groupby(named, itemgetter(0)):
        yield from _grouped(handle, [(extension, member) for _, extension, member in group])


def _grouped(handle: int, group: list[tuple[str, tarfile.TarInfo]]) -> Iterator[Row]:
    images = [member for extension, member in group if f".{extension}" in EXTENSIONS]
    # x.mask.png is an extra beside x.jpg; without x.jpg it is an image with one dot too many in its name
    images = images or [member for extension, member in group if is_image(f"x.{extension}")]
    labels = [member for extension, member in group if extension == "cls"]
    if not images and not labels:
        return  # not a sample, but for instance a note or an index
    image = (images or labels)[0]
    if len({extension for extension, _ in group}) < len(group):
        label: int = Fault.TWICE
    elif not images:
        label = Fault.NO_IMAGE
    elif len(images) > 1:
        label = Fault.IMAGES
    elif not labels:
        label = Fault.NO_LABEL
    else:
        size = labels[0].size
        label = parse_label(_read(handle, labels[0].offset_data, size)) if size <= DIGITS + 64 else Fault.LABEL
    yield Row(image.name, image.offset_data, labels[0].offset_data if label == Fault.LABEL else image.size, label)


def parse_label(text: bytes) -> int:
    """The number in a .cls file, perhaps between white space, or with C's end of a string; else `Fault.LABEL`."""
    match = re.fullmatch(rb"\s*(\d{1,%d})[\s\0]*" % DIGITS, text)
    return int(match[1]) if match else Fault.LABEL


# TFRecord: length, checksum, a tf.train.Example (protocol buffers), checksum


def records(handle: int) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each record, with length and both checksums.

    Raises:
        ValueError: a record is cut short.
    """
    offset, end = 0, os.fstat(handle).st_size
    while offset < end:
        header = os.pread(handle, 12, offset)
        (length,) = struct.unpack("<Q", header[:8]) if len(header) == 12 else (1 << 63,)
        if length + 16 > end - offset:  # checked before reading: a false length could take all memory
            raise ValueError(f"the record at byte {offset} is cut short")
        yield offset, _read(handle, offset, length + 16)
        offset += length + 16


def _record_rows(handle: int) -> Iterator[Row]:
    for number, (offset, content) in enumerate(records(handle)):
        name, start, stop, label = parse_record(content)
        yield Row(f"record {number}{name and f' ({name})'}", offset + start, stop - start, label)


def parse_record(content: bytes) -> tuple[str, int, int, int]:
    """A record's name, where its image starts and stops, and its label or `Fault.RECORD`."""
    try:
        found = _features(content, 12, len(content) - 4)
        ((start, stop),) = found[IMAGE]
        (label,) = found[LABEL]
        name = content[slice(*found[NAME][0])].decode("utf-8", "replace") if found.get(NAME) else ""
        if isinstance(label, int) and 0 <= label < 10**DIGITS:
            return name, start, stop, label
    except (IndexError, KeyError, ValueError, TypeError):
        pass
    return "", 12, len(content) - 4, Fault.RECORD


def _features(content: bytes, start: int, stop: int) -> dict[str, list[Any]]:
    """Features of a tf.train.Example: integers, and (start, stop) of bytes."""
    found: dict[str, list[Any]] = {}
    for features in _fields(content, (start, stop), 1):
        for entry in _fields(content, features, 1):
            ((a, b),) = _fields(content, entry, 1)
            values: list[Any] = []
            for value in _fields(content, entry, 2):
                values += [item for items in _fields(content, value, 1) for item in _fields(content, items, 1)]
                for items in _fields(content, value, 3):
                    for packed in _fields(content, items, 1):
                        values += [packed] if isinstance(packed, int) else _varints(content[slice(*packed)])
            found[content[a:b].decode()] = values
    return found


def _fields(content: bytes, message: tuple[int, int], wanted: int) -> Iterator[Any]:
    """The values of field `wanted` of a message: integers, or (start, stop) of bytes."""
    offset, stop = message
    value: Any
    while offset < stop:
        tag, offset = _varint(content, offset)
        kind = tag & 7
        if kind == 0:
            value, offset = _varint(content, offset)
        elif kind in (1, 2, 5):
            size, offset = _varint(content, offset) if kind == 2 else (8 if kind == 1 else 4, offset)
            value, offset = (offset, offset + size), offset + size
        else:
            raise ValueError(f"wire type {kind}")
        if offset > stop:
            raise ValueError("a field is cut short")
        if tag >> 3 == wanted:
            yield value


def _varint(content: bytes, offset: int) -> tuple[int, int]:
    """A number, as int64 in two's complement, and the position after it."""
    value = shift = 0
    while (byte := content[offset]) > 127:
        value |= (byte & 127) << shift
        offset, shift = offset + 1, shift + 7
        if shift > 63:
            raise ValueError("a number is too long")
    value |= byte << shift
    return (value & (1 << 64) - 1) - (value >> 63 << 64), offset + 1


def _varints(content: bytes) -> list[int]:
    values, offset = [], 0
    while offset < len(content):
        value, offset = _varint(content, offset)
        values.append(value)
    return values
