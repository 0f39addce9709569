"""TFRecord and WebDataset shards: what their index files say, and the bytes that they are made of.

An index file says where each sample stands, so that any sample can be read by itself. Nothing is ever extracted to
disk.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import json
import os
import re
import struct
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .formats import BadImage

# Names that count as images: timm's, and some more.
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
    ".jp2",
    ".ppm",
    ".pgm",
    ".pnm",
)
IMAGE, LABEL, NAME = "image/encoded", "image/class/label", "image/filename"  # TensorFlow's for ImageNet
DESCRIPTION, FORMAT = "shards.json", "lumix_dali.shards/1"
DIGITS = 9  # of the longest label
SUFFIX = {"webdataset": ".tar", "tfrecord": ".tfrecord"}


class Missing(ValueError):
    """An object that does not exist."""


@dataclass(frozen=True)
class Shards:
    """TFRecord or WebDataset files with their index files.

    Args:
        paths, indices: of each shard and of its index.
        counts: int64 [number of shards], samples of each.
        places: int64 [n, 4], of the samples of all shards in turn: byte offset and size of the image, then of its
            .cls. A TFRecord has one record (with its frame), and zeros.
        classes: K class names, or None where nothing beside the shards tells them.
        digest: of the shards' names and sizes, the indices' content, and the classes.
    """

    paths: Sequence[str]
    indices: Sequence[str]
    counts: np.ndarray
    places: np.ndarray = field(repr=False)
    classes: Sequence[str] | None
    digest: str = field(repr=False)

    are_files = False  # no sample is a file of its own

    @cached_property
    def _starts(self) -> list[int]:
        return (np.cumsum(self.counts) - self.counts).tolist()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def kind(self) -> str:
        """Which of the two they are: "webdataset" or "tfrecord"."""
        return kind_of(self.paths[0])

    @property
    def remote(self) -> bool:
        """Whether the shards are in S3."""
        return is_remote(self.paths[0])

    @property
    def root(self) -> str:
        """The first shard's folder."""
        return os.path.dirname(self.paths[0])

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class name; empty where none is known."""
        return {name: label for label, name in enumerate(self.classes or ())}

    def _shard(self, index: int) -> tuple[str, int]:
        """Path of the shard of sample `index`, and its number there."""
        shard = bisect_right(self._starts, index) - 1
        return self.paths[shard], index - self._starts[shard]

    def name(self, index: int) -> str:
        """Shard and sample `index` in words."""
        path, number = self._shard(index)
        offset = int(self.places[index, 0])
        if self.kind == "tfrecord":
            return f"{path!r}, record {number} (byte {offset})"
        block = read_range(path, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            member = repr(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name)
        except tarfile.TarError:
            member = str(number)
        return f"{path!r}, sample {member} (byte {offset})"

    def open(self, index: int) -> tuple[BinaryIO, int]:
        """Encoded image and label of sample `index`.

        Raises:
            formats.BadImage: the sample has no usable label, or its record is damaged.
            ValueError: the shard is gone, or shorter than it was.
        """
        path, _ = self._shard(index)
        image_at, image_size, label_at, label_size = self.places[index].tolist()
        if self.kind == "tfrecord":
            image, label = _parse_record(read_range(path, image_at, image_size))
        else:
            # Image and label are neighbours: one read for both.
            start, stop = min(image_at, label_at), max(image_at + image_size, label_at + label_size)
            content = read_range(path, start, stop - start)
            image = content[image_at - start :][:image_size]
            text = content[label_at - start :][:label_size]
            if fault := label_fault(text):
                raise BadImage(fault)
            label = int(text)
        if self.classes is not None and label >= len(self.classes):
            raise BadImage(f"its label is {label}, of {len(self.classes)} classes")
        return io.BytesIO(image), label

    def label(self, index: int) -> int:
        """Class of sample `index`; raises as `open`."""
        return self.open(index)[1]

    def path(self, index: int) -> str:
        """Path of the shard that holds sample `index`."""
        return self._shard(index)[0]


def kind_of(path: str) -> str:
    """Which kind a name says: "webdataset" for ``*.tar``, else "tfrecord"."""
    return "webdataset" if path.endswith(".tar") else "tfrecord"


def find(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Paths of the shards that `source` names: a list, a glob, one file, a folder of them. Else nothing."""
    if not isinstance(source, str | os.PathLike):
        return [os.fspath(path) for path in source]
    source = os.fspath(source)
    if _is_shard(source) and not os.path.isdir(source):
        return [source] if is_remote(source) or os.path.isfile(source) else []
    if glob.has_magic(source) and not os.path.exists(source):
        root, pattern = os.path.split(source)
        if is_remote(source):
            found = [f"{root}/{name}" for name in fnmatch.filter(listing(root), pattern)]
        else:
            found = glob.glob(source)
        return sorted(path for path in found if _is_shard(path))
    if not is_remote(source) and not os.path.isdir(source):
        return []
    if _has_folders(source):
        return []  # beside class folders, archives are none of ours
    names = listing(source)
    if DESCRIPTION in names:
        description(source)  # an error where none is written yet
    return [os.path.join(source, name) for name in sorted(names) if _is_shard(name)]


def load(paths: Sequence[str]) -> Shards:
    """Shards with what their index files say.

    Args:
        paths: files of one kind, each with ``STEM.idx`` or ``NAME.idx`` beside it.

    Raises:
        ValueError: an index is missing, does not fit its shard, or shows a sample without image or label.
    """
    if len(set(map(kind_of, paths))) != 1 or len(set(paths)) != len(paths):
        raise ValueError(f"source={list(paths)[:4]!r}: give shards of one kind, each of them once")
    folders = {folder: listing(folder) for folder in {os.path.dirname(path) for path in paths}}
    known = {folder: description(folder) for folder, names in folders.items() if DESCRIPTION in names}
    sha, indices, places = hashlib.sha256(), [], []
    for path in paths:
        folder, name = os.path.split(path)
        if name not in folders[folder]:
            raise ValueError(f"source={path!r}: no such shard; give one that exists")
        index = next((i for i in index_names(name) if i in folders[folder]), None)
        if index is None:
            tool = "wds2idx" if kind_of(path) == "webdataset" else "tfrecord2idx"
            raise ValueError(f"source={path!r}: no {index_names(name)[0]} beside it; write it with DALI's {tool}")
        indices.append(os.path.join(folder, index))
        content = read_bytes(indices[-1])
        places.append(_places(path, content, folders[folder][name]))
        count = len(places[-1])
        expected = known.get(folder, {}).get("shards", {}).get(name, count)
        if expected != count:
            raise ValueError(
                f"source={path!r}: {count} samples in its index, {expected} in {DESCRIPTION}; convert again"
            )
        sha.update(f"{name}\0{folders[folder][name]}\0".encode("utf-8", "surrogateescape"))
        sha.update(hashlib.sha256(content).digest())
    lists = [each["classes"] for each in known.values()]
    if any(classes != lists[0] for classes in lists):
        raise ValueError(f"source={list(paths)[:4]!r}: their {DESCRIPTION} differ in classes; give one set")
    classes = lists[0] if lists and len(lists) == len(folders) else None
    sha.update(repr(classes).encode("utf-8", "surrogateescape"))
    counts = np.array([len(each) for each in places], np.int64)
    return Shards(list(paths), indices, counts, np.concatenate(places), classes, sha.hexdigest())


def index_names(name: str) -> list[str]:
    """Under which names the index of shard `name` is looked for."""
    return [f"{os.path.splitext(name)[0]}.idx", f"{name}.idx"]


def _is_shard(path: str) -> bool:
    name = os.path.basename(path)
    return name.endswith((".tar", ".tfrecord", ".tfrecords")) or bool(re.search(r"-\d{5}-of-\d{5}$", name))


def description(folder: str) -> dict[str, Any]:
    """Class names, and number of samples of each shard, as ``lumix-dali convert`` left them in `folder`.

    Raises:
        ValueError: they are damaged, or not all shards are written.
    """
    path = os.path.join(folder, DESCRIPTION)
    try:
        content = json.loads(read_bytes(path))
        if content["format"] == FORMAT and content["complete"]:
            return {"classes": list(content["classes"]), "shards": dict(content["shards"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source={path!r}: damaged ({error}); convert anew, or remove it") from error
    raise ValueError(f"source={path!r}: not all shards are written; run the same `lumix-dali convert` again")


def _places(path: str, content: bytes, size: int) -> np.ndarray:
    """`Shards.places` of a shard of `size` bytes, from its index."""
    try:
        rows = parse_index(path, content)
    except (ValueError, IndexError) as error:
        raise ValueError(f"source={path!r}: its index is damaged ({error}); write it again") from error
    last = max((row.offset + row.size for row in rows), default=0)
    # A TFRecord index covers its file; after a tar's last member stands padding.
    if not rows or last > size or (kind_of(path) == "tfrecord" and last != size):
        raise ValueError(f"source={path!r}: its index ends at byte {last} of {size}; write it again for this file")
    if kind_of(path) == "tfrecord":
        return np.array([(row.offset, row.size, 0, 0) for row in rows], np.int64)
    by_key: dict[int, list[Row]] = {}
    for row in rows:
        by_key.setdefault(row.sample, []).append(row)
    places = []
    for members in by_key.values():
        images = [row for row in members if is_image(row.kind)]
        labels = [row for row in members if row.kind == "cls"]
        if not images and not labels:
            continue
        if (len(images), len(labels)) != (1, 1):
            raise ValueError(
                f"source={path!r}: sample {members[0].name or members[0].sample!r} has {len(images)} image(s) and "
                f"{len(labels)} .cls; see `lumix-dali check`"
            )
        places.append((images[0].offset, images[0].size, labels[0].offset, labels[0].size))
    return np.array(places, np.int64).reshape(-1, 4)


class Row(NamedTuple):
    """A line of a TFRecord's index, or a member in a tar's: its sample's number, extension, place and name."""

    sample: int
    kind: str
    offset: int
    size: int
    name: str


def parse_index(path: str, content: bytes) -> list[Row]:
    """What the index of shard `path` says.

    Raises:
        ValueError, IndexError: it is damaged.
    """
    lines = content.decode("utf-8", "surrogateescape").splitlines()
    if kind_of(path) == "tfrecord":
        return [Row(i, "", int(a), int(b), "") for i, (a, b) in enumerate(map(str.split, lines))]
    version, count = lines[0].split()
    width = {"v1.1": 3, "v1.2": 4}[version] if version in ("v1.1", "v1.2") else 0
    if not width or int(count) != len(lines) - 1:
        raise ValueError(f"its first line is {lines[0]!r}, behind which stand {len(lines) - 1} samples")
    rows = []
    for i, line in enumerate(lines[1:]):
        words = line.split()
        if not words or len(words) % width:
            raise ValueError(f"line {i + 2}: {line[:80]!r}, names must not hold blanks")
        for k in range(0, len(words), width):
            name = words[k + 3] if width == 4 else ""
            rows.append(Row(i, words[k].lower(), int(words[k + 1]), int(words[k + 2]), name))
    return rows


def is_image(extension: str) -> bool:
    """Whether a WebDataset extension, without its dot, says that the member is an image."""
    return f".{extension}" in EXTENSIONS


# Storage: folders, and S3 through the same environment variables that DALI reads


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is in S3."""
    return os.fspath(path).startswith("s3://")


def listing(root: str, deep: bool = False) -> dict[str, int]:
    """Size of each file in `root`, or with `deep` (S3 alone) below it, by relative name."""
    if not is_remote(root):
        return {entry.name: entry.stat().st_size for entry in os.scandir(root or ".") if entry.is_file()}
    found = _s3(root, lambda client, bucket, key: _objects(client, bucket, key, "" if deep else "/"))
    return {name: size for name, size in found.items() if name and not name.endswith("/")}


def read_bytes(path: str) -> bytes:
    """Content of a file or an S3 object."""
    if is_remote(path):
        return _s3(path, lambda client, bucket, key: _body(client, Bucket=bucket, Key=key))
    with open(path, "rb") as file:
        return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file or an S3 object from `offset` on.

    Raises:
        ValueError: it is gone, or ends before.
    """
    if is_remote(path):
        place = f"bytes={offset}-{offset + size - 1}"
        content = _s3(path, lambda client, bucket, key: _body(client, Bucket=bucket, Key=key, Range=place))
    else:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"source={path!r}: {error.strerror}; it was there when the run began") from error
        try:
            content = os.pread(handle, size, offset)
        finally:
            os.close(handle)
    if len(content) != size:
        raise ValueError(f"source={path!r}: it ends before byte {offset + size}; it was longer when the run began")
    return content


def _has_folders(root: str) -> bool:
    if not is_remote(root):
        return any(entry.is_dir() and entry.name[0] != "." for entry in os.scandir(root))
    found = _s3(root, lambda client, bucket, key: _objects(client, bucket, key, "/"))
    return any(name.endswith("/") for name in found)


def _objects(client, bucket: str, key: str, delimiter: str) -> dict[str, int]:
    """{name below `key`: size}; what `delimiter` cuts short ends with it."""
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    found: dict[str, int] = {}
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
    for page in pages:
        found |= {entry["Key"][len(prefix) :]: entry["Size"] for entry in page.get("Contents", ())}
        found |= {entry["Prefix"][len(prefix) :]: 0 for entry in page.get("CommonPrefixes", ())}
    return found


def _body(client, **wanted: str) -> bytes:
    return client.get_object(**wanted)["Body"].read()


def _s3(path: str, ask: Callable) -> Any:
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ValueError(f"source={path!r}: listing S3 takes boto3; pip install boto3") from error
    bucket, _, key = path.removeprefix("s3://").partition("/")
    try:
        return ask(_client(os.getpid(), os.environ.get("AWS_ENDPOINT_URL")), bucket, key)
    except (BotoCoreError, ClientError) as error:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        raise (Missing if code == "NoSuchKey" else ValueError)(
            f"source={path!r}: {error}; check bucket, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and credentials"
        ) from error


@cache
def _client(process: int, endpoint: str | None) -> Any:
    """A client, which takes long to make and may serve many threads, of one process and server."""
    import boto3

    return boto3.client("s3")


# The formats


class Sample(NamedTuple):
    """A sample as it stands in a shard; `fault` says why it cannot be used, and the other fields may then lack."""

    name: str
    image: bytes
    label: int
    fault: str | None


def samples(path: str, ignored: list[str] | None = None) -> Iterator[Sample]:
    """Reads a local shard from its beginning to its end, without its index.

    Args:
        path: of the shard.
        ignored: takes the names of members that are no regular file, or hidden.

    Raises:
        ValueError: it is damaged, so that nothing behind the damage can be read, or a member's path leads out.
    """
    with open(path, "rb") as file:
        yield from (_tar_samples if kind_of(path) == "webdataset" else _records)(path, file, ignored)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the extension starts at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension


def members(path: str, ignored: list[str] | None = None) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular, unhidden members of a local tar file, none of which is extracted.

    Raises:
        ValueError: it is damaged, or a member's path is absolute or leads out.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"member {member.name!r} leads out of the archive; refused")
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not _hidden(member.name):
                    yield archive, member
                elif not member.isdir() and ignored is not None:
                    ignored.append(member.name)
    except tarfile.TarError as error:
        raise ValueError(f"no whole tar archive: {error}") from error


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _tar_samples(path: str, file: BinaryIO, ignored: list[str] | None) -> Iterator[Sample]:
    group: dict[str, bytes] = {}
    last: str | None = None
    faults: list[str] = []
    for archive, member in members(path, ignored):
        key, extension = split_name(member.name)
        if key != last:
            if last is not None:
                yield from _grouped(last, group, faults)
            last, group, faults = key, {}, []
        if re.search(r"\s", member.name):
            faults.append("its name holds a blank, which DALI's index cannot")
        if extension.lower() in group:
            faults.append(f"two members .{extension}")
        content = archive.extractfile(member)  # a view; nothing is written
        group[extension.lower()] = content.read() if content else b""
        if len(group[extension.lower()]) < member.size:
            raise ValueError(f"no whole tar archive: {member.name!r} is cut short")
    if last is not None:
        yield from _grouped(last, group, faults)


def _grouped(key: str, group: dict[str, bytes], faults: list[str]) -> Iterator[Sample]:
    images = [extension for extension in group if is_image(extension)]
    if not images and "cls" not in group:
        return  # not a sample: a note, an index of somebody's
    if len(images) != 1:
        faults.append(f"{len(images)} images")
    if "cls" not in group:
        faults.append("no .cls")
    elif fault := label_fault(group["cls"]):
        faults.append(fault)
    if faults:
        yield Sample(key, b"", -1, "; ".join(faults))
    else:
        yield Sample(f"{key}.{images[0]}", group[images[0]], int(group["cls"]), None)


def label_fault(text: bytes) -> str | None:
    """Why this .cls cannot be used."""
    return None if parse_label(text) is not None else f"its .cls is {text[:20]!r}, not 1 to {DIGITS} digits"


def parse_label(text: bytes) -> int | None:
    """The number that a .cls holds, as the graph reads it; None: it holds none."""
    match = re.fullmatch(rb"(\d{1,%d})\s*" % DIGITS, text)
    return int(match[1]) if match else None


def records(file: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset, frame (length and both checksums) and content of each record of a TFRecord file.

    Raises:
        ValueError: a record is cut short.
    """
    while header := file.read(12):
        offset = file.tell() - len(header)
        length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 1 << 63
        left = os.fstat(file.fileno()).st_size - file.tell()
        if length + 4 > left:  # before anything is read: the length may claim the machine's memory
            raise ValueError(f"the record at byte {offset} is cut short")
        content = file.read(length)
        yield offset, header + file.read(4), content


def _records(path: str, file: BinaryIO, ignored: list[str] | None) -> Iterator[Sample]:
    for number, (offset, frame, content) in enumerate(records(file)):
        name = f"record {number}"
        if frame != frame[:8] + masked_crc(frame[:8]) + masked_crc(content):
            yield Sample(name, b"", -1, f"its checksum at byte {offset} does not match")
            continue
        try:
            features = parse_example(content)
            if features.get(NAME):
                name += f" ({features[NAME][0].decode('utf-8', 'replace')})"
            yield Sample(name, *_image_and_label(features), None)
        except (IndexError, ValueError, UnicodeDecodeError) as error:
            yield Sample(name, b"", -1, str(error))


def _parse_record(content: bytes) -> tuple[bytes, int]:
    """Image and label of a record with its frame."""
    try:
        if struct.unpack("<Q", content[:8])[0] != len(content) - 16:
            raise ValueError("its length does not match the index")
        return _image_and_label(parse_example(content[12:-4]))
    except (IndexError, ValueError, UnicodeDecodeError, struct.error) as error:
        raise BadImage(f"damaged record: {error}") from error


def _image_and_label(features: dict[str, list]) -> tuple[bytes, int]:
    image, labels = features.get(IMAGE, []), features.get(LABEL, [])
    if len(image) != 1 or not isinstance(image[0], bytes):
        raise ValueError(f"{len(image)} {IMAGE}")
    if len(labels) != 1 or not isinstance(labels[0], int) or labels[0] < 0:
        raise ValueError(f"its {LABEL} is {labels!r}, not one whole number >= 0")
    return image[0], labels[0]


def record(content: bytes) -> bytes:
    """TFRecord's frame around `content`: length, its checksum, content, its checksum."""
    length = struct.pack("<Q", len(content))
    return length + masked_crc(length) + content + masked_crc(content)


def example(features: dict[str, bytes | int]) -> bytes:
    """A serialised ``tf.train.Example`` (protocol buffers) with one value a feature."""

    def field_(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(content)) + content

    entries = b""
    for name, value in features.items():
        values = field_(1, field_(1, value)) if isinstance(value, bytes) else field_(3, field_(1, _varint(value)))
        entries += field_(1, field_(1, name.encode()) + field_(2, values))
    return field_(1, entries)


def parse_example(content: bytes) -> dict[str, list]:
    """Features of a serialised ``tf.train.Example``, those of bytes and of integers.

    Raises:
        ValueError, IndexError: it is none.
    """
    found: dict[str, list] = {}
    for features in _fields(content, 1):
        for entry in _fields(features, 1):
            (name,) = _fields(entry, 1)
            values: list = []
            for value in _fields(entry, 2):
                values += [item for items in _fields(value, 1) for item in _fields(items, 1)]
                for items in _fields(value, 3):
                    for packed in _fields(items, 1):
                        values += [packed] if isinstance(packed, int) else _varints(packed)
            found[name.decode()] = values
    return found


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _varints(content: bytes) -> list[int]:
    values, value, shift = [], 0, 0
    for byte in content:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value - (value >> 63 << 64))  # int64 in two's complement
            value = shift = 0
    return values


def _fields(content: bytes, wanted: int) -> Iterator[Any]:
    """Bytes or integers of field `wanted` of a message."""
    place = 0

    def varint() -> int:
        nonlocal place
        start = place
        while content[place] > 127:
            place += 1
        place += 1
        return _varints(content[start:place])[0]

    while place < len(content):
        tag = varint()
        value: Any
        if tag & 7 == 0:
            value = varint()
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
            value, place = content[place : place + size], place + size
        elif tag & 7 == 2:
            size = varint()
            if not 0 <= size <= len(content) - place:
                raise ValueError("a field is cut short")
            value, place = content[place : place + size], place + size
        else:
            raise ValueError(f"wire type {tag & 7}")
        if tag >> 3 == wanted:
            yield value


def masked_crc(content: bytes) -> bytes:
    """TFRecord's checksum: CRC-32C, rotated and shifted, in four bytes."""
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720) in NumPy: remainders of halves are joined, level by level."""
    data = np.frombuffer(content, np.uint8)
    padded = np.zeros(1 << max(2, (len(data) - 1).bit_length()), np.uint8)
    # Zeros in front do not change a remainder; the register's initial ones are xored onto the first four bytes.
    start = len(padded) - len(data)
    padded[start:] = data
    padded[start : start + 4] ^= 0xFF
    unmet = 0xFFFFFFFF >> 8 * len(data) if len(data) < 4 else 0  # ones that no byte was there for
    remainders = _remainders()[padded.view("<u2")]
    level = 1
    while len(remainders) > 1:
        words = remainders.view("<u2").reshape(-1, 4)  # both words of the first, both words of the second
        low, high = _shift(level)
        remainders = low[words[:, 0]] ^ high[words[:, 1]] ^ remainders[1::2]
        level += 1
    return int(remainders[0]) ^ unmet ^ 0xFFFFFFFF


@cache
def _remainders() -> np.ndarray:
    """uint32 [65536]: remainder of each pair of bytes."""
    table: np.ndarray = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        table = table >> 1 ^ (table & 1) * np.uint32(0x82F63B78)
    return table


@cache
def _shift(level: int) -> np.ndarray:
    """uint32 [2, 65536]: what becomes of each word of a remainder when 2**level zero bytes follow."""
    words = np.arange(1 << 16, dtype=np.uint32) << np.array([[0], [16]], np.uint32)
    if level == 1:
        return _remainders()[words & 0xFFFF] ^ words >> 16
    low, high = _shift(level - 1)
    for _ in range(2):
        words = low[words & 0xFFFF] ^ high[words >> 16]
    return words
