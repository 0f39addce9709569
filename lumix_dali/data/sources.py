"""Sources of samples: image files, shards, or any map-style data set, with one protocol."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, NoReturn, Protocol, cast, overload, runtime_checkable

import numpy as np

from ..progress import Progress
from . import index, storage
from .formats import EXTENSIONS, BadImage, is_image, open_regular

# Bounds the labels of a list, because every number up to the largest gets a class name.
MAX_CLASSES = 10**6
MANIFEST = "lumix_dali.manifest/2"
DESCRIPTION, FORMAT = "shards.json", "lumix_dali.shards/1"
_HUB = "_info.json"  # in WebDatasets on the Hugging Face Hub, such as timm's ImageNet
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_LINE = re.compile(r"(.*\S)[ \t]+(\d{1,9})[ \t]*", re.ASCII)
_OPEN = 256  # shards that are open at once
_AHEAD = 4  # remote shards that are copied at once

Image = bytes | memoryview | np.ndarray | BadImage


@runtime_checkable
class Source(Protocol):
    """Encoded images and labels by number. `create_loader` takes any object with these members.

    Attributes:
        classes: K class names, or None if they are unknown.
        digest: a text that differs if names, labels or classes do; part of a loader's state.
    """

    @property
    def classes(self) -> Sequence[str] | None:
        """K class names, or None."""

    @property
    def digest(self) -> str:
        """A text that identifies the content."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of sample `index` in messages."""

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images, and labels int64 [n]; called from several threads.

        A `BadImage` takes the place of an image that cannot be read; that sample is then replaced. An exception means
        that the source as a whole fails, and ends the run.
        """


class Names(Sequence[str]):
    """Strings in one block of memory: each name takes its bytes and 8 more, and no Python object."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return os.fsdecode(self.content[self._ends[place] : self._ends[place + 1]])

    def __repr__(self) -> str:
        return f"<{len(self)} names>"

    def update(self, sha: Any) -> None:
        """Adds all names to a `hashlib` hash."""
        sha.update(self.content)
        sha.update(cast(Any, self._ends))


@dataclass(frozen=True)
class Files:
    """Image files and their labels: what timm calls a data set, without the pixels.

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

    def __post_init__(self) -> None:
        n, k, labels = len(self.names), len(self.classes), np.asarray(self.labels)
        whole = labels.shape == (n,) and labels.dtype.kind in "iu"
        if not whole or not ((labels >= 0) & (labels < k)).all():
            raise ValueError(f"labels={labels!r}: give {n} integers, one per name, in [0, {k}), the classes")
        names = self.names if isinstance(self.names, Names) else Names(self.names)
        root = os.fspath(self.root)
        if not storage.is_remote(root):
            root = os.path.abspath(root)  # the working folder may change
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
        """Contents and labels; a `BadImage` for what cannot be opened or is not a regular file."""
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
    """An open shard: its descriptor stays open as long as something refers to this object."""

    def __init__(self, handle: int, rows: np.ndarray) -> None:
        self.handle, self.rows = handle, rows

    def __del__(self) -> None:
        os.close(self.handle)


class Shards:
    """TFRecord or WebDataset files. An index tells where each sample is.

    The index of local shards is one memory-mapped file. Remote shards are copied ahead of need into a cache folder and
    indexed there; only the number of samples of each must be known from the start.

    Args:
        paths: of the shards, all of one kind.
        entries: size and version of each.
        counts: samples of each, from a description; None: from the index.
        classes: K class names, or None.
        cache: for the copies of remote shards.
        progress: wraps the iterable of shards to index, given their number.

    Raises:
        ValueError: a shard is damaged, or its number of samples differs from its description.
    """

    def __init__(
        self,
        paths: Sequence[str],
        entries: Sequence[storage.Entry],
        counts: Sequence[int] | None,
        classes: Sequence[str] | None,
        cache: storage.Cache,
        progress: Progress = lambda items, total: items,
    ) -> None:
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
        """The kind of the shards: "webdataset" or "tfrecord"."""
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
        """Label of each class name; empty if they are unknown."""
        return {name: label for label, name in enumerate(self.classes or ())}

    def name(self, index_: int) -> str:
        """Shard and name of sample `index_`."""
        number, shard, row = self._at(index_)
        return f"{self.paths[number]!r}, {index.name_at(self.paths[number], shard.handle, int(row[0]))}"

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images and labels; a `BadImage` for samples that lack one image and one valid label.

        Raises:
            ValueError: a shard was removed, changed or truncated.
        """
        images: list[Image] = []
        labels = np.zeros(len(indices), np.int64)
        for place, index_ in enumerate(indices):
            number, shard, (offset, size, label) = self._at(index_)
            if label < 0:
                images.append(BadImage(index.reason_at(self.paths[number], shard.handle, offset, label)))
            elif label >= (MAX_CLASSES if self.classes is None else len(self.classes)):
                limit = f"of {len(self.classes)} classes" if self.classes else f"not below {MAX_CLASSES}"
                images.append(BadImage(f"its label is {label}, {limit}"))
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
        """Announces the samples that are read next, in order: copies their shards and releases the others."""
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
        except Exception as error:  # other threads wait for the result
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
            raise ValueError(f"source={path!r}: {error.strerror}; it existed when the run began; restore it") from error
        shard = _Shard(handle, self._rows[start : start + self.counts[number]])
        if os.fstat(handle).st_size != self._entries[number].size:
            raise ValueError(f"source={path!r}: its size has changed since the run began; create the loader again")
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
        """Rows of a remote shard, which outlive its copy; without `handle` the shard is copied if necessary."""
        path, entry = self.paths[number], self._entries[number]
        kept = f"{self._cache.path(path, entry)}.npy"
        with suppress(*index.UNUSABLE):
            kept_rows: np.ndarray = np.load(kept)
            return kept_rows
        if handle is None:
            shard = _Shard(self._cache.open(path, entry), np.zeros((0, 3), np.int64))
            return self._index_of(number, shard.handle)
        rows = index.scan(path, handle)
        index.keep(kept, rows)
        return rows

    def _refuse(self, number: int, found: int, expected: int) -> NoReturn:
        raise ValueError(
            f"source={self.paths[number]!r}: it contains {found} samples, its description says {expected}; "
            "convert it again"
        )


class Rows:
    """Any map-style data set of encoded images: Hugging Face's ``datasets``, or a class with `__getitem__`.

    Args:
        rows: ``rows[i]`` is (image, label) or a mapping of both. An image is given as encoded bytes, as a path, or as
            Hugging Face's ``Image(decode=False)``; a column that decodes is cast to that.
        image, label: keys of the mapping.
        classes: K class names; None: those of a Hugging Face ``ClassLabel``.

    Note:
        Rows are read from several threads.
    """

    def __init__(
        self, rows: Any, *, image: str = "image", label: str = "label", classes: Sequence[str] | None = None
    ) -> None:
        features = getattr(rows, "features", None) or {}
        if getattr(features.get(image), "decode", False):
            rows = rows.cast_column(image, type(features[image])(decode=False))
        self.rows, self._image, self._label = rows, image, label
        self.classes = getattr(features.get(label), "names", None) if classes is None else list(classes)
        if len(rows):
            self._pair(0, rows[0])

    @cached_property
    def digest(self) -> str:
        """Identifies the data set, as far as its fingerprint, length and classes do."""
        known = getattr(self.rows, "_fingerprint", type(self.rows).__qualname__)
        return hashlib.sha256(repr((known, len(self), self.classes)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Number of the row, and its path if it has one."""
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


# What users pass as a source


def load(
    source: Any,
    *,
    cache_dir: storage.StrPath | None = None,
    cache_bytes: int = 50 * 2**30,
    progress: Progress = lambda items, total: items,
) -> Source:
    """The samples of any source that `create_loader` takes.

    Args:
        source: a class folder, a list file (one ``PATH LABEL`` per line), a manifest of ``lumix-dali check``, or shards
            (a folder of ``*.tar`` or ``*.tfrecord``, a glob, one shard, or a list), each of them local or remote; a
            list of (path, label) pairs, or a data set with such a list as `samples`; rows, see `Rows`; or a `Source`.
        cache_dir: folder for copies of remote shards; None: `storage.cache_folder`.
        cache_bytes: limit of these copies in bytes.
        progress: wraps the iterable of shards to index, given their number.

    Raises:
        ValueError: the source does not exist or cannot be used.
    """
    if isinstance(source, str | os.PathLike):
        return _load_path(os.fspath(source), cache_dir, cache_bytes, progress)
    if isinstance(source, Source):
        return source
    if isinstance(samples := getattr(source, "samples", None), Sequence):
        return pairs(samples, getattr(source, "classes", None))
    if isinstance(source, Sequence):
        if not len(source):
            raise ValueError(f"source={source!r}: it is empty; give at least one sample")
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


def _load_path(path: str, cache_dir: storage.StrPath | None, cache_bytes: int, progress: Progress) -> Source:
    if found := find_shards(path):
        return _load_shards(found, cache_dir, cache_bytes, progress)
    if os.path.isdir(path):
        return folder(path)
    if glob.has_magic(path) or "{" in path:
        raise ValueError(f"source={path!r}: it matches no shard; give a pattern that matches existing files")
    if storage.is_remote(path) and storage.is_folder(path):
        return folder(path.rstrip("/"))
    if storage.is_remote(path) or os.path.isfile(path):
        return manifest(path) if is_manifest(path) else file_list(path)
    raise ValueError(f"source={path!r}: no such folder or list file; give one that exists")


def load_files(source: Any) -> Files:
    """As `load`, for a source that must consist of image files.

    Raises:
        ValueError: it does not.
    """
    found = load(source)
    if not isinstance(found, Files):
        raise ValueError(
            f"source={str(source)!r}: it does not consist of image files; give a class folder, a list or a manifest"
        )
    return found


def pairs(samples: Sequence[tuple[storage.StrPath, int]], classes: Sequence[str] | None = None) -> Files:
    """Files of (path, label) pairs, such as torchvision's ``ImageFolder.samples``.

    Raises:
        ValueError: an element is not such a pair.
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


def folder(root: storage.StrPath) -> Files:
    """Files of a class folder: ``root/class/**/image``.

    Args:
        root: folder with one folder per class. Labels number the classes in timm's natural order ("2" before
            "10"), which for names of equal length is also torchvision's. Hidden files and folders, and files without
            an image's extension, are ignored.

    Returns:
        `Files`, sorted by label, then by name.

    Raises:
        ValueError: there is no class folder, or a class has no image.
    """
    root = os.fspath(root)
    files = class_files(root)
    if len(files) > 1 and {name.lower() for name in files} <= _SPLITS:
        warnings.warn(
            f"source={root!r}: its classes are {', '.join(files)}; is the data set one of these folders?", stacklevel=3
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


def file_list(path: storage.StrPath, root: storage.StrPath | None = None) -> Files:
    """Files of a text file with one ``PATH LABEL`` per line, DALI's `file_list`.

    Args:
        path: UTF-8 text. The label is the integer after the last blank, so paths may contain blanks. Empty lines and
            a byte-order mark are ignored.
        root: folder that paths are relative to; None: the folder of the list.

    Returns:
        `Files` in the order of the list, with the numbers as class names.

    Raises:
        ValueError: a line is not ``PATH LABEL``, a label is outside [0, 10**6), or the list is empty.
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


def is_manifest(path: storage.StrPath) -> bool:
    """Whether this is a manifest of ``lumix-dali check``."""
    if storage.is_remote(path):
        head = storage.read_bytes(path)
    elif os.path.isdir(path):
        return False
    else:
        with open(path, "rb") as file:
            head = file.read(64)
    return MANIFEST.partition("/")[0].encode() in head[:64]


def manifest(path: storage.StrPath) -> Files:
    """Files of a manifest that ``lumix-dali check`` wrote.

    Raises:
        ValueError: it is damaged, was changed by hand, or has the format of another version.
    """
    try:
        content = json.loads(storage.read_bytes(path).decode("ascii"))
        if content["format"] != MANIFEST:
            raise ValueError(f"its format is {content['format']!r}, but this version reads {MANIFEST!r}")
        labels = np.array(content["labels"], np.int64)
        files = Files(content["root"], content["names"], labels, content["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source={os.fspath(path)!r}: unusable manifest ({error}); write it again") from error
    if files.digest != content.get("digest"):
        raise ValueError(f"source={os.fspath(path)!r}: its hash does not match its content; write it again")
    return files


def write_manifest(files: Files, path: storage.StrPath) -> None:
    """Writes names, labels, classes and a hash for `create_loader`; replaces `path` atomically."""
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


def natural_key(text: str) -> list[int | str]:
    """Sort key that orders numbers in names by value, as timm orders classes."""
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
        with ThreadPoolExecutor(16) as pool:  # network storage answers many requests at once
            below = pool.map(lambda name: list(files_below(root, name, set(seen))), names)
            files = dict(zip(names, below, strict=True))
    if not files:
        raise ValueError(f"source={root!r}: no class folder in it; lay images out as {root}/CLASS/IMAGE.jpg")
    # "1" and "01" have the same key: sort by name first, so that scandir's order does not matter
    return {name: files[name] for name in sorted(sorted(files), key=natural_key)}


def files_below(root: str, name: str, seen: set[str]) -> Iterator[str]:
    """All files of class `name`, however deep, relative to `root`.

    Links are followed, but each real folder is visited only once: those in `seen`, which grows, are skipped.
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
    """Paths of the shards that `source` names: one file, a glob, braces, or a folder of shards; else []."""
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
        return []  # archives beside class folders are not data
    names = storage.listing(folder)
    if DESCRIPTION in names:
        description(folder)  # raises if not all shards are written
    return [os.path.join(folder, name) for name in sorted(names) if is_shard(name)]


def braces(pattern: str) -> list[str]:
    """Expands ``{0000..0127}`` and ``{a,b}`` as a shell and WebDataset do."""
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
    """Whether a file has the name of a shard."""
    name = os.path.basename(path)
    return name.endswith((".tar", ".tfrecord", ".tfrecords")) or bool(re.search(r"-\d{5}-of-\d{5}$", name))


def _load_shards(
    paths: Sequence[str], cache_dir: storage.StrPath | None, cache_bytes: int, progress: Progress
) -> Shards:
    if not all(map(is_shard, paths)):
        wrong = next(path for path in paths if not is_shard(path))
        raise ValueError(f"source: {wrong!r} is not a shard; for images, give (path, label) pairs or a list file")
    if len(set(map(index.kind_of, paths))) != 1 or len(set(paths)) != len(paths):
        raise ValueError(f"source={list(paths)[:4]!r}: give shards of one kind, each only once")
    folders = sorted({storage.split(path)[0] for path in paths})
    listed = {place: _files_in(place) for place in folders}
    entries = [listed[place].get(name) for place, name in map(storage.split, paths)]
    unknown = [
        k for k, entry in enumerate(entries) if entry is None or not entry.version
    ]  # HTTP servers list only names
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
    """Files beside the shards; empty if a web server lists none."""
    try:
        return storage.listing(place)
    except ValueError:
        if storage.is_remote(place):
            return {}
        raise


def _description(place: str, files: Mapping[str, Any]) -> tuple[list[str] | None, dict[str, int]]:
    """Class names and the number of samples of each shard, as far as files beside the shards tell."""
    for name in (DESCRIPTION, _HUB) if not files else ():  # the server lists nothing, but they may exist
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
    """Class names and the number of samples of each shard, as written by ``lumix-dali convert``.

    Raises:
        ValueError: the description is damaged, or not all shards are written.
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
