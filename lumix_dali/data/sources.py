"""Where samples come from: image files, shards, or any map-style data set, behind one protocol."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from . import index, storage
from .formats import EXTENSIONS, BadImage, is_image, open_regular

# A list's labels are bounded, since there is a class name for every number up to the largest.
MAX_CLASSES = 10**6
MANIFEST = "lumix_dali.manifest/2"
DESCRIPTION, FORMAT = "shards.json", "lumix_dali.shards/1"
_HUB = "_info.json"  # of a Hugging Face WebDataset, such as timm's of ImageNet
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_LINE = re.compile(r"(.*\S)[ \t]+(\d{1,9})[ \t]*", re.ASCII)
_OPEN = 256  # shards that stay open
_AHEAD = 4  # remote shards that are copied at once

Image = bytes | memoryview | np.ndarray | BadImage
Progress = Callable[[Iterable, int], Iterable]


@runtime_checkable
class Source(Protocol):
    """Encoded images and labels by number. Anything with these members can be given to `create_loader`.

    Attributes:
        classes: K class names, or None where they are not known.
        digest: a text that differs where names, labels or classes do, for the states of a loader.
    """

    @property
    def classes(self) -> Sequence[str] | None: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call sample `index` in a message."""

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images, and labels int64 [n]; called from several threads.

        An image that cannot be read is a `BadImage` in its place: that sample is then replaced. An exception is
        the whole source's fault, and ends the run.
        """


class Names(Sequence[str]):
    """Strings in one block of memory: a million names take their bytes and 8 more each, and no Python object."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return os.fsdecode(self.content[self._ends[place] : self._ends[place + 1]])

    def __repr__(self) -> str:
        return f"<{len(self)} names>"

    def update(self, sha: Any) -> None:
        """Adds all of them to a hash."""
        sha.update(self.content)
        sha.update(cast(Any, self._ends))


@dataclass(frozen=True)
class Files:
    """Image files with their labels: what timm calls a data set, without the pixels.

    Args:
        root: folder that `names` are relative to, local or remote.
        names: path of each image below `root`.
        labels: int64 [n], class of each image, in [0, K).
        classes: K class names.

    Raises:
        ValueError: `labels` are not one integer per name, in [0, K), or `root` does not exist.
    """

    root: str
    names: Sequence[str]
    labels: np.ndarray
    classes: Sequence[str]
    digest: str = field(init=False, repr=False)
    remote: bool = field(init=False, repr=False)  # whether fsspec reads any of the files

    def __post_init__(self):
        n, k, labels = len(self.names), len(self.classes), np.asarray(self.labels)
        whole = labels.shape == (n,) and labels.dtype.kind in "iu"
        if not whole or not ((labels >= 0) & (labels < k)).all():
            raise ValueError(f"labels={labels!r}: give {n} integers, one per name, in [0, {k}), the classes")
        names = self.names if isinstance(self.names, Names) else Names(self.names)
        root = os.fspath(self.root)
        if not storage.is_remote(root):
            root = os.path.abspath(root)  # whatever the working folder will be
            if not os.path.isdir(root) and any(not os.path.isabs(name) for name in names):
                raise ValueError(f"root={root!r}: no such folder; give the one that the names are relative to")
        sha = hashlib.sha256()
        names.update(sha)
        sha.update("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        sha.update(labels.astype(np.int64).tobytes())
        remote = storage.is_remote(root) or b"://" in names.content
        found = dict(root=root, names=names, labels=labels.astype(np.int64), digest=sha.hexdigest(), remote=remote)
        for key, value in found.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Files({self.root!r}: {len(self)} images, {len(self.classes)} classes)"

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class name, as timm and torchvision call it."""
        return {name: label for label, name in enumerate(self.classes)}

    def path(self, index: int) -> str:
        """Path of sample `index`."""
        return storage.join(self.root, self.names[index])

    def name(self, index: int) -> str:
        """Path of sample `index`, quoted."""
        return repr(self.path(index))

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Contents and labels; a `BadImage` for what cannot be opened or is no regular file."""
        return [_content(self.path(index)) for index in indices], self.labels[np.asarray(indices, np.int64)]


def _content(path: str) -> bytes | BadImage:
    try:
        if storage.is_remote(path):
            return storage.read_bytes(path)
        with open_regular(path) as file:
            return file.read()
    except storage.Missing as error:
        return BadImage(str(error))
    except BadImage as error:
        return error


class _Shard:
    """A shard that is open: its descriptor lives as long as anybody reads from it."""

    def __init__(self, handle: int, rows: np.ndarray):
        self.handle, self.rows = handle, rows

    def __del__(self):
        os.close(self.handle)


class Shards:
    """TFRecord or WebDataset files. Samples are read where the index says they are.

    Local shards are indexed as a whole, memory-mapped. Remote ones are copied into a cache folder ahead of need, and
    indexed there; only the number of samples of each must be known before.

    Args:
        paths: of the shards, of one kind.
        entries: size and version of each.
        counts: samples of each, where a description tells; None: an index tells.
        classes: K class names, or None.
        cache: of the copies of remote shards.
        progress: wraps the iterable of shards to index, given their number.

    Raises:
        ValueError: a shard is damaged, or has another number of samples than its description says.
    """

    def __init__(
        self,
        paths: Sequence[str],
        entries: Sequence[storage.Entry],
        counts: Sequence[int] | None,
        classes: Sequence[str] | None,
        cache: storage.Cache,
        progress: Progress = lambda items, total: items,
    ):
        self.paths, self.classes, self._entries, self._cache = list(paths), classes, list(entries), cache
        self._rows: np.ndarray | None = None
        self._lock = Lock()
        self._open: OrderedDict[int, Future[_Shard]] = OrderedDict()
        self._copies: ThreadPoolExecutor | None = None
        if not self.remote:
            self._rows, found = index.load(paths, entries, progress)
        elif counts is None:
            with ThreadPoolExecutor(_AHEAD) as pool:
                rows = progress(pool.map(self._index_of, range(len(paths))), len(paths))
                found = np.array(list(map(len, rows)), np.int64)
        else:
            found = np.array(counts, np.int64)
        if counts is not None and (wrong := np.flatnonzero(found != np.array(counts))).size:
            self._refuse(int(wrong[0]), int(found[wrong[0]]), counts[int(wrong[0])])
        self.counts = found
        self._starts = (np.cumsum(found) - found).tolist()
        sha = hashlib.sha256(repr(classes).encode("utf-8", "surrogateescape"))
        for path, entry, count in zip(paths, entries, found.tolist(), strict=True):
            sha.update(f"{os.path.basename(path)}\0{entry.size}\0{count}\0".encode("utf-8", "surrogateescape"))
        if self._rows is not None:
            sha.update(cast(Any, self._rows))
        self.digest = sha.hexdigest()

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __repr__(self) -> str:
        return f"Shards({self.root!r}: {len(self)} samples in {len(self.paths)} {self.kind} shards)"

    @property
    def kind(self) -> str:
        """Which of the two they are: "webdataset" or "tfrecord"."""
        return index.kind_of(self.paths[0])

    @property
    def remote(self) -> bool:
        """Whether the shards are copied before they are read."""
        return storage.is_remote(self.paths[0])

    @property
    def root(self) -> str:
        """The first shard's folder."""
        return storage.split(self.paths[0])[0]

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class name; empty where none is known."""
        return {name: label for label, name in enumerate(self.classes or ())}

    def name(self, index_: int) -> str:
        """Shard and sample `index_` in words."""
        number, shard, row = self._at(index_)
        return f"{self.paths[number]!r}, {index.name_at(self.paths[number], shard.handle, int(row[0]))}"

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images and labels; a `BadImage` for samples without one image and one usable label.

        Raises:
            ValueError: a shard is gone, was changed, or is shorter than it was.
        """
        images: list[Image] = []
        labels = np.zeros(len(indices), np.int64)
        for place, index_ in enumerate(indices):
            number, shard, (offset, size, label) = self._at(index_)
            if label < 0:
                images.append(BadImage(index.reason_at(self.paths[number], shard.handle, offset, label)))
            elif label >= (MAX_CLASSES if self.classes is None else len(self.classes)):
                most = f"of {len(self.classes)} classes" if self.classes else f"not below {MAX_CLASSES}"
                images.append(BadImage(f"its label is {label}, {most}"))
            else:
                image = os.pread(shard.handle, size, offset)
                if len(image) < size:
                    raise ValueError(
                        f"source={self.paths[number]!r}: it ends before byte {offset + size}; it was longer when the "
                        "run began"
                    )
                images.append(image)
                labels[place] = label
        return images, labels

    def prefetch(self, indices: np.ndarray) -> None:
        """Says which samples are read next, in this order: their shards are copied; others are let go."""
        if not self.remote:
            return
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        ahead = list(dict.fromkeys(numbers.tolist()))
        for number in ahead:
            self._opening(number)
        with self._lock:
            for number in self._open.keys() - set(ahead):
                if self._open[number].done():
                    del self._open[number]

    def _at(self, index_: int) -> tuple[int, _Shard, list[int]]:
        """Shard number, shard, and row of a sample."""
        number = bisect_right(self._starts, index_) - 1
        shard = self._opening(number).result()
        return number, shard, shard.rows[index_ - self._starts[number]].tolist()

    def _opening(self, number: int) -> Future[_Shard]:
        with self._lock:
            if (found := self._open.get(number)) is not None:
                return found
            if self.remote:
                self._open[number] = self._pool.submit(self._fetch, number, self.counts[number])
                return self._open[number]
            opened = self._open[number] = Future()
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
        try:
            opened.set_result(self._local(number))
        except Exception as error:  # others wait for it
            opened.set_exception(error)
        return opened

    @property
    def _pool(self) -> ThreadPoolExecutor:
        if self._copies is None:
            self._copies = ThreadPoolExecutor(_AHEAD, thread_name_prefix="lumix_dali-copy")
        return self._copies

    def _local(self, number: int) -> _Shard:
        path, start = self.paths[number], self._starts[number]
        assert self._rows is not None
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"source={path!r}: {error.strerror}; it was there when the run began") from error
        shard = _Shard(handle, self._rows[start : start + self.counts[number]])
        if os.fstat(handle).st_size != self._entries[number].size:
            raise ValueError(f"source={path!r}: its size is not what it was when the run began; make the loader again")
        return shard

    def _fetch(self, number: int, count: int) -> _Shard:
        """A local copy of a remote shard, with its index."""
        handle = self._cache.open(self.paths[number], self._entries[number])
        shard = _Shard(handle, np.zeros((0, 3), np.int64))
        shard.rows = self._index_of(number, handle)
        if len(shard.rows) != count:
            self._refuse(number, len(shard.rows), count)
        return shard

    def _index_of(self, number: int, handle: int | None = None) -> np.ndarray:
        """Rows of a remote shard, kept beside its copy and for longer; without `handle` it is copied if need be."""
        path, entry = self.paths[number], self._entries[number]
        kept = f"{self._cache.path(path, entry)}.npy"
        with suppress(*index.UNUSABLE):
            return np.load(kept)
        if handle is None:
            shard = _Shard(self._cache.open(path, entry), np.zeros((0, 3), np.int64))
            return self._index_of(number, shard.handle)
        rows = index.scan(path, handle)
        index.keep(kept, rows)
        return rows

    def _refuse(self, number: int, found: int, expected: int) -> None:
        raise ValueError(
            f"source={self.paths[number]!r}: {found} samples in it, {expected} in its description; convert it again"
        )


class Rows:
    """Any map-style data set of encoded images: Hugging Face's ``datasets``, or a class with `__getitem__`.

    Args:
        rows: ``rows[i]`` is (image, label) or a mapping of both. An image is its encoded bytes, a path, or what
            Hugging Face makes of one (``Image(decode=False)``; a decoding column is switched over).
        image, label: keys of a mapping.
        classes: K class names; None: those of a Hugging Face ``ClassLabel``.

    Note:
        Rows are read from several threads.
    """

    def __init__(self, rows: Any, *, image: str = "image", label: str = "label", classes: Sequence[str] | None = None):
        features = getattr(rows, "features", None) or {}
        if getattr(features.get(image), "decode", False):
            rows = rows.cast_column(image, type(features[image])(decode=False))
        self.rows, self._image, self._label = rows, image, label
        self.classes = getattr(features.get(label), "names", None) if classes is None else list(classes)
        if len(rows):
            self._pair(0, rows[0])

    @cached_property
    def digest(self) -> str:
        known = getattr(self.rows, "_fingerprint", type(self.rows).__qualname__)
        return hashlib.sha256(repr((known, len(self), self.classes)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Number of the row, and its path where it has one."""
        path = _path(self._pair(index, self.rows[index])[0])
        return f"row {index}" + (f" ({path!r})" if path else "")

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images and labels."""
        many = getattr(self.rows, "__getitems__", None)
        rows = many(list(indices)) if many else [self.rows[index] for index in indices]
        pairs = [self._pair(index, row) for index, row in zip(indices, rows, strict=True)]
        k = MAX_CLASSES if self.classes is None else len(self.classes)
        fits = [isinstance(label, int | np.integer) and 0 <= label < k for _, label in pairs]
        images = [
            _encoded(image) if fit else BadImage(f"its label is {label!r}, not a whole number in [0, {k})")
            for (image, label), fit in zip(pairs, fits, strict=True)
        ]
        return images, np.array([label if fit else 0 for (_, label), fit in zip(pairs, fits, strict=True)], np.int64)

    def _pair(self, index: int, row: Any) -> tuple[Any, Any]:
        try:
            image, label = (row[self._image], row[self._label]) if isinstance(row, Mapping) else row
        except (KeyError, TypeError, ValueError) as error:
            keys = f"a mapping of {', '.join(map(repr, row))}" if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"source: row {index} is {keys}; give (image, label), a mapping of {self._image!r} and "
                f"{self._label!r}, or name its keys: data.sources.Rows(rows, image=..., label=...)"
            ) from error
        return image, label


def _path(image: Any) -> str | None:
    found = image.get("path") if isinstance(image, Mapping) else image
    return os.fspath(found) if isinstance(found, str | os.PathLike) else None


def _encoded(image: Any) -> Image:
    content = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content) if isinstance(content, bytearray) else content
    if isinstance(content, np.ndarray) and content.dtype == np.uint8 and content.ndim == 1:
        return np.ascontiguousarray(content)
    path = _path(image)
    kind = type(image).__name__
    return BadImage(f"neither encoded bytes nor a path, but of type {kind}") if path is None else _content(path)


# What a user may give


def load(
    source: Any,
    *,
    cache_dir: str | os.PathLike | None = None,
    cache_bytes: int = 50 * 2**30,
    progress: Progress = lambda items, total: items,
) -> Source:
    """The samples of whatever `create_loader` takes.

    Args:
        source: a class folder, a list file (``PATH LABEL`` per line), a manifest of ``lumix-dali check``; shards (a
            folder of ``*.tar`` or ``*.tfrecord``, a glob, one of them, or a list); all of these local or remote; a
            list of (path, label) pairs, or a data set that has one as `samples`; rows, see `Rows`; or a `Source`.
        cache_dir: folder for copies of remote shards; None: `storage.cache_folder`.
        cache_bytes: bytes that these copies may take.
        progress: wraps the iterable of shards to index, given their number.

    Raises:
        ValueError: nothing is there, or what is there cannot be used.
    """
    if isinstance(source, str | os.PathLike):
        return _load_path(os.fspath(source), cache_dir, cache_bytes, progress)
    if isinstance(source, Source):
        return source
    if isinstance(samples := getattr(source, "samples", None), Sequence):
        return pairs(samples, getattr(source, "classes", None))
    if isinstance(source, Sequence):
        if not len(source):
            raise ValueError(f"source={source!r}: nothing in it; give one sample at least")
        if isinstance(source[0], str | os.PathLike):
            paths = [each for path in source for each in braces(os.fspath(path))]
            return _load_shards(paths, cache_dir, cache_bytes, progress)
        if _is_pair(source[0]):
            return pairs(source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return Rows(source)
    raise ValueError(f"source={source!r}: give a folder, a list file, shards, pairs, or a map-style data set")


def _is_pair(row: Any) -> bool:
    return isinstance(row, Sequence) and len(row) > 0 and isinstance(row[0], str | os.PathLike)


def _load_path(path: str, cache_dir, cache_bytes: int, progress: Progress) -> Source:
    if found := find_shards(path):
        return _load_shards(found, cache_dir, cache_bytes, progress)
    if os.path.isdir(path):
        return folder(path)
    if glob.has_magic(path) or "{" in path:
        raise ValueError(f"source={path!r}: no shard's name matches; give a pattern of files that exist")
    if storage.is_remote(path) and storage.is_folder(path):
        return folder(path.rstrip("/"))
    if storage.is_remote(path) or os.path.isfile(path):
        return manifest(path) if is_manifest(path) else file_list(path)
    raise ValueError(f"source={path!r}: no such folder or list file; give one that exists")


def load_files(source: Any) -> Files:
    """What `load` gives, where it must be files.

    Raises:
        ValueError: it is something else.
    """
    found = load(source)
    if not isinstance(found, Files):
        raise ValueError(f"source={str(source)!r}: these are no files; give a class folder, a list or a manifest")
    return found


def pairs(samples: Sequence[tuple[str | os.PathLike, int]], classes: Sequence[str] | None = None) -> Files:
    """Files of (path, label) pairs, such as torchvision's ``ImageFolder.samples``.

    Raises:
        ValueError: an element is no such pair.
    """
    try:
        names = [os.fspath(path) for path, _ in samples]
        labels = np.array([label for _, label in samples])
    except (TypeError, ValueError) as error:
        raise ValueError(f"source={str(samples[:2])[:80]}…: give pairs of a path and a label") from error
    names = [name if storage.is_remote(name) else os.path.abspath(name) for name in names]
    if classes is None and labels.dtype.kind in "iu" and len(labels) and 0 <= labels.max() < MAX_CLASSES:
        classes = [str(k) for k in range(int(labels.max()) + 1)]
    return Files("/", names, labels, classes or ())


def folder(root: str | os.PathLike) -> Files:
    """Files of a class folder: ``root/class/**/image``.

    Args:
        root: folder with one folder per class. Labels are the classes' places in timm's natural order ("2"
            before "10"), which for names of equal length is torchvision's. Hidden files and folders, and names
            without an image's extension, are passed over.

    Returns:
        `Files`, sorted by label, then by name.

    Raises:
        ValueError: no class folder, or a class without an image.
    """
    root = os.fspath(root)
    files = class_files(root)
    if len(files) > 1 and {name.lower() for name in files} <= _SPLITS:
        warnings.warn(
            f"source={root!r}: its classes are {', '.join(files)}; is one of these folders the data set?", stacklevel=3
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(files):
        found = sorted(filter(is_image, files[name]))
        if not found:
            raise ValueError(
                f"source={root!r}: class {name!r} has no image ({', '.join(sorted(EXTENSIONS))}); "
                "remove its folder, or put images into it"
            )
        names += found
        labels += [label] * len(found)
    return Files(root, names, np.array(labels, np.int64), list(files))


def file_list(path: str | os.PathLike, root: str | os.PathLike | None = None) -> Files:
    """Files of a text file with one ``PATH LABEL`` per line, DALI's `file_list`.

    Args:
        path: UTF-8 text; the label is the integer after the last blank, so paths may hold blanks. Empty
            lines and a byte-order mark are passed over.
        root: folder that relative paths start from; None: the list's own folder.

    Returns:
        `Files` in the order of the file, with the labels' numbers as class names.

    Raises:
        ValueError: a line that is not ``PATH LABEL``, a label outside [0, 10**6), an empty list.
    """
    path = os.fspath(path)
    names, labels = [], []
    text = storage.read_bytes(path).decode("utf-8-sig", "surrogateescape")
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if not match or int(match[2]) >= MAX_CLASSES:
            raise ValueError(
                f"source={path!r}, line {number}: {line[:80]!r}; write PATH LABEL, LABEL in [0, {MAX_CLASSES})"
            )
        names.append(match[1])
        labels.append(int(match[2]))
    if not names:
        raise ValueError(f"source={path!r}: no sample in it; write one PATH LABEL per line")
    if root is None:
        root = storage.split(path if storage.is_remote(path) else os.path.abspath(path))[0]
    return Files(os.fspath(root), names, np.array(labels, np.int64), [str(k) for k in range(max(labels) + 1)])


def is_manifest(path: str | os.PathLike) -> bool:
    """Whether this is a file that ``lumix-dali check`` wrote."""
    if storage.is_remote(path):
        head = storage.read_bytes(path)
    elif os.path.isdir(path):
        return False
    else:
        with open(path, "rb") as file:
            head = file.read(64)
    return MANIFEST.partition("/")[0].encode() in head[:64]


def manifest(path: str | os.PathLike) -> Files:
    """Files of a manifest that ``lumix-dali check`` wrote.

    Raises:
        ValueError: it is damaged, was changed by hand, or is another version's.
    """
    try:
        content = json.loads(storage.read_bytes(path).decode("ascii"))
        if content["format"] != MANIFEST:
            raise ValueError(f"its format is {content['format']!r}, this version reads {MANIFEST!r}")
        labels = np.array(content["labels"], np.int64)
        files = Files(content["root"], content["names"], labels, content["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source={os.fspath(path)!r}: unusable manifest ({error}); write it again") from error
    if files.digest != content.get("digest"):
        raise ValueError(f"source={os.fspath(path)!r}: its hash does not match its content; write it again")
    return files


def write_manifest(files: Files, path: str | os.PathLike) -> None:
    """Writes names, labels, classes and hash, for `create_loader`; replaces `path` in one step."""
    content = dict(
        format=MANIFEST,
        root=files.root,
        classes=list(files.classes),
        names=list(files.names),
        labels=files.labels.tolist(),
        digest=files.digest,
    )
    with storage.replacing(path) as file:
        file.write(json.dumps(content).encode("ascii"))


def natural_key(text: str) -> list:
    """Sorts numbers in names by value, as timm orders classes."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def class_files(root: str) -> dict[str, list[str]]:
    """{class folder: all files below it, relative to `root`}, in the order of the labels."""
    files: dict[str, list[str]] = {}
    if storage.is_remote(root):
        for file in storage.listing(root, deep=True):
            name, slash, _ = file.partition("/")
            if slash and name[0] != ".":
                files.setdefault(name, []).append(file)
    else:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if storage.is_dir(entry) and entry.name[0] != "."]
        seen = {os.path.realpath(root), *(os.path.realpath(os.path.join(root, name)) for name in names)}
        with ThreadPoolExecutor(16) as pool:  # network storage answers many questions at once
            below = pool.map(lambda name: list(files_below(root, name, set(seen))), names)
            files = dict(zip(names, below, strict=True))
    if not files:
        raise ValueError(f"source={root!r}: no class folder in it; lay images out as {root}/CLASS/IMAGE.jpg")
    # "1" and "01" have one key: never scandir's order
    return {name: files[name] for name in sorted(sorted(files), key=natural_key)}


def files_below(root: str, name: str, seen: set[str]) -> Iterator[str]:
    """All files of class `name`, however deep, relative to `root`.

    Links are followed, but each real folder only once: none of those in `seen`, which grows.
    """
    with os.scandir(os.path.join(root, name)) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        below = f"{name}/{entry.name}"
        if not storage.is_dir(entry):
            yield below
        elif (real := os.path.realpath(entry.path)) not in seen:
            seen.add(real)
            yield from files_below(root, below, seen)


# Shards


def find_shards(source: str) -> list[str]:
    """Paths of the shards that `source` names: one file, a glob, braces, or a folder of them. Else nothing."""
    remote = storage.is_remote(source)
    if not remote and os.path.isdir(source):
        return _shards_in(source)
    if is_shard(source) and (os.path.isfile(source) or not (remote or glob.has_magic(source) or "{" in source)):
        return [source] if os.path.isfile(source) else []
    paths = braces(source)
    if glob.has_magic(source):
        found = {name for path in paths for name in (storage.matching(path) if remote else glob.glob(path))}
        return sorted(filter(is_shard, found))
    if len(paths) > 1 or is_shard(source):
        return paths
    return _shards_in(source) if remote else []


def _shards_in(folder: str) -> list[str]:
    if storage.has_folders(folder):
        return []  # beside class folders, archives are not data
    names = storage.listing(folder)
    if DESCRIPTION in names:
        description(folder)  # an error where shards are still being written
    return [os.path.join(folder, name) for name in sorted(names) if is_shard(name)]


def braces(pattern: str) -> list[str]:
    """What ``{0000..0127}`` and ``{a,b}`` stand for, in a shell and for WebDataset."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match or (not storage.is_remote(pattern) and os.path.exists(pattern)):
        return [pattern]
    if match[3] is None:
        width = max(map(len, match.group(1, 2))) if match[1].startswith("0") or match[2].startswith("0") else 1
        words = [f"{number:0{width}}" for number in range(int(match[1]), int(match[2]) + 1)]
    else:
        words = match[3].split(",")
    return [each for word in words for each in braces(pattern[: match.start()] + word + pattern[match.end() :])]


def is_shard(path: str) -> bool:
    """Whether a file's name says that it is a shard."""
    name = os.path.basename(path)
    return name.endswith((".tar", ".tfrecord", ".tfrecords")) or bool(re.search(r"-\d{5}-of-\d{5}$", name))


def _load_shards(paths: Sequence[str], cache_dir, cache_bytes: int, progress: Progress) -> Shards:
    if not all(map(is_shard, paths)):
        wrong = next(path for path in paths if not is_shard(path))
        raise ValueError(f"source: {wrong!r} is no shard; give (path, label) pairs for images, or a list file")
    if len(set(map(index.kind_of, paths))) != 1 or len(set(paths)) != len(paths):
        raise ValueError(f"source={list(paths)[:4]!r}: give shards of one kind, each of them once")
    folders = sorted({storage.split(path)[0] for path in paths})
    listed = {place: _files_in(place) for place in folders}
    entries = [listed[place].get(name) for place, name in map(storage.split, paths)]
    unknown = [k for k, entry in enumerate(entries) if entry is None or not entry.version]  # HTTP lists only names
    for k, entry in zip(unknown, storage.entries([paths[k] for k in unknown]), strict=True):
        entries[k] = entry
    known = {place: _description(place, listed[place]) for place in folders}
    lists = [each[0] for each in known.values() if each[0] is not None]
    if any(classes != lists[0] for classes in lists):
        raise ValueError(f"source={list(paths)[:4]!r}: their {DESCRIPTION} differ in classes; give one set")
    classes = lists[0] if len(lists) == len(folders) else None
    found = [known[storage.split(path)[0]][1].get(os.path.basename(path)) for path in paths]
    counts = None if None in found else [int(count) for count in found if count is not None]
    cache = storage.Cache(os.path.join(cache_dir or storage.cache_folder(), "shards"), cache_bytes)
    return Shards(paths, cast(Any, entries), counts, classes, cache, progress)


def _files_in(place: str) -> dict[str, storage.Entry]:
    """Files beside the shards; nothing where a web server lists none."""
    try:
        return storage.listing(place)
    except ValueError:
        if storage.is_remote(place):
            return {}
        raise


def _description(place: str, files: Mapping[str, Any]) -> tuple[list[str] | None, dict[str, int]]:
    """Class names, and number of samples of each shard, as far as files beside them tell."""
    for name in (DESCRIPTION, _HUB) if not files else ():  # not listed, and maybe there
        with suppress(storage.Missing):
            files = {name: storage.entry(os.path.join(place, name))}
            break
    if DESCRIPTION in files:
        found = description(place)
        return found["classes"], found["shards"]
    if _HUB in files:
        return None, _hub_counts(os.path.join(place, _HUB))
    return None, {}


def description(place: str) -> dict[str, Any]:
    """Class names, and number of samples of each shard, as ``lumix-dali convert`` left them in a folder.

    Raises:
        ValueError: they are damaged, or not all shards are written.
    """
    path = os.path.join(place, DESCRIPTION)
    try:
        content = json.loads(storage.read_bytes(path))
        if content["format"] == FORMAT and content["complete"]:
            shards = {name: int(count) for name, count in content["shards"].items()}
            return {"classes": list(content["classes"]), "shards": shards}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"source={path!r}: damaged ({error}); convert again, or remove it") from error
    raise ValueError(f"source={path!r}: not all shards are written; run the same `lumix-dali convert` again")


def _hub_counts(path: str) -> dict[str, int]:
    try:
        splits = json.loads(storage.read_bytes(path))["splits"]
        splits = splits.values() if isinstance(splits, dict) else splits
        return {
            os.path.basename(name): int(count)
            for split in splits
            for name, count in zip(split["filenames"], split["shard_lengths"], strict=True)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"source={path!r}: damaged ({error!r}); repair or remove it") from error
