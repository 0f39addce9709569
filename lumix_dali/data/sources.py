"""What users pass as a source, and what tells one kind from another."""

from __future__ import annotations

import glob
import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np

from .. import checks
from ..progress import Progress
from . import storage
from .files import Files, class_folder, file_list, is_manifest, manifest, pairs, whole_labels
from .formats import BadImage
from .protocol import Image, Source, class_numbers
from .rows import Rows, is_of
from .shards import CACHE_BYTES, Shards, braces, find_shards, load_shards

_REQUIRED = ("classes", "digest", "__len__", "name", "read")
_KINDS = "a folder, a list file, shards, pairs, or a map-style data set of encoded images"


def load(
    source: Any,
    *,
    classes: Sequence[str] | None = None,
    cache_dir: storage.StrPath | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress = lambda items, total: items,
) -> Source:
    """The samples of any source that `create_loader` takes.

    Args:
        source: a class folder, a list file (one ``PATH LABEL`` per line), a manifest of ``lumix-dali check``, or shards
            (a folder of ``*.tar`` or ``*.tfrecord``, a glob, one shard, or a list), each of them local or remote; a
            list of (path, label) pairs, or a data set with such a list as `samples`; rows, see `Rows`; or a `Source`.
        classes: K class names in the order of the labels, normally those of the training loader; None: the source's
            own. A source with class names is renumbered by name, and may lack some of these. In one without, such as a
            list file, labels are numbers of these classes already.
        cache_dir: folder for copies of remote shards; None: `storage.cache_folder`.
        cache_bytes: limit of these copies in bytes.
        progress: wraps the iterable of shards to index, given their number.

    Raises:
        ValueError: the source does not exist, cannot be used, or has a class that is not among `classes`.

    Example:
        >>> from lumix_dali.data import sources
        >>> sources.load([("/data/bee.jpg", 0)], classes=["bee", "cow"]).classes
        ['bee', 'cow']
    """
    known = None if classes is None else _class_names(classes)
    checks.whole("cache_bytes", cache_bytes, 0)
    found = _load(source, known, cache_dir, cache_bytes, progress)
    return found if known is None or found.classes == known else renumbered(found, known)


def load_files(source: Any, classes: Sequence[str] | None = None) -> Files:
    """As `load`, for a source that must consist of image files.

    Raises:
        ValueError: it does not.
    """
    found = load(source, classes=classes)
    if not isinstance(found, Files):
        raise ValueError(
            f"source={str(source)[:80]!r}: it does not consist of image files; give a class folder, a list or a "
            "manifest"
        )
    return found


def renumbered(source: Source, classes: Sequence[str]) -> Source:
    """The same samples, with labels that number `classes`.

    Raises:
        ValueError: a class of the source is not among `classes`.
    """
    classes = _class_names(classes)
    own = source.classes
    number = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in own or () if name not in number]:
        raise ValueError(
            f"classes: the source's {unknown[0]!r} is not among these {len(classes)} ({', '.join(classes)[:80]}); "
            "give the classes that the model was trained with, or take this one out of the source"
        )
    if own is not None and not len(own):
        raise ValueError(
            f"classes: the images of {source!r} have no labels; leave classes out to predict, or lay them out as "
            "ROOT/CLASS/IMAGE.jpg"
        )
    table = np.arange(len(classes)) if own is None else np.array([number[name] for name in own], np.int64)
    if isinstance(source, Files):
        return Files(source.root, source.names, table[source.labels], classes)
    return _Renumbered(source, table, classes)


def _class_names(classes: Sequence[str]) -> list[str]:
    names = list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else []
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if not names or wrong is not None or len(set(names)) < len(names):
        said = classes if wrong is None else wrong
        raise ValueError(
            f"classes={str(said)[:80]!r}: give different class names in their order, such as loader.classes"
        )
    return names


class _Checked(Source):
    """A user's source: what it lacks of the optional members has its default, and labels must be of its classes."""

    def __init__(self, source: Any, known: Sized | None = None) -> None:
        self._source, self.digest = source, source.digest
        self.classes = source.classes.tolist() if isinstance(source.classes, np.ndarray) else source.classes
        self._known: Sized | None = self.classes if known is None else known  # what labels number
        for member in ("remote", "gives_paths", "labels", "counts", "path", "prefetch"):
            if hasattr(source, member):
                setattr(self, member, getattr(source, member))
        if not isinstance(self.digest, str):
            raise ValueError(f"source: its digest is {self.digest!r:.40}; give a text that differs if the data do")
        if self.gives_paths and self.labels is None:
            raise ValueError("source: it gives paths, but no labels; give labels, int64 [n]")
        if self.labels is not None:  # the loader may not ask for them again
            self.labels = whole_labels(range(len(source)), self.labels, self._known)
        if self.counts is not None:
            self.counts = np.asarray(self.counts)
            if self.counts.dtype.kind not in "iu" or self.counts.ndim != 1 or (self.counts < 0).any():
                raise ValueError(f"source: counts={self.counts!r:.60}: give the samples of each shard, int64 [shards]")
            if self.counts.sum() != len(source):
                raise ValueError(f"source: its counts add up to {self.counts.sum()}, but it has {len(source)} samples")

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return repr(self._source)

    def name(self, index: int) -> str:
        """As the other source."""
        return str(self._source.name(index))

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """As the other source, but with a `BadImage` where a label is none of its classes."""
        images, labels = self._source.read(indices)
        if not len(images) == len(labels) == len(indices):
            raise ValueError(
                f"source: read() of {len(indices)} samples returned {len(images)} images and {len(labels)} labels"
            )
        labels, wrong = class_numbers(labels, self._known)
        return [image if isinstance(image, BadImage) else wrong.get(i, image) for i, image in enumerate(images)], labels


class _Renumbered(_Checked):
    """A source whose labels are looked up in a table, int64 [classes of the source]."""

    def __init__(self, source: Source, table: np.ndarray, classes: Sequence[str]) -> None:
        super().__init__(source, known=classes if source.classes is None else None)
        self.classes, self._table = classes, table
        self.digest = hashlib.sha256(
            f"{source.digest}\0{table.tolist()}\0{classes}".encode("utf-8", "surrogateescape")
        ).hexdigest()
        self.labels = None if self.labels is None else table[self.labels]

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Images, and the labels in the table."""
        images, labels = super().read(indices)
        return images, self._table[labels]


def _load(
    source: Any,
    classes: list[str] | None,
    cache_dir: storage.StrPath | None,
    cache_bytes: int,
    progress: Progress,
) -> Source:
    if isinstance(source, str | os.PathLike):
        return _load_path(os.fspath(source), classes, cache_dir, cache_bytes, progress)
    if isinstance(source, Files | Shards | Rows | _Checked):
        return source
    if all(hasattr(source, member) for member in _REQUIRED):
        return _Checked(source)
    if isinstance(source, Sequence):
        if not len(source):
            raise ValueError(f"source={source!r}: it is empty; give at least one sample")
        if isinstance(source[0], str | os.PathLike):
            paths = [each for path in source for each in braces(os.fspath(path))]
            return load_shards(paths, cache_dir, cache_bytes, progress)
        if _is_pair(source[0]):
            return pairs(source, classes)
    if (samples := _samples(source)) is not None:
        return pairs(*samples)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return Rows(source)
    if hasattr(source, "read"):
        missing = ", ".join(member for member in _REQUIRED if not hasattr(source, member))
        raise ValueError(f"source={str(source)[:80]}: as a Source it lacks {missing}; see data.protocol.Source")
    raise ValueError(f"source={str(source)[:80]}: give {_KINDS}")


def _is_pair(row: Any) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, str) and len(row) > 0 and _is_path(row[0])


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _samples(source: Any) -> tuple[Sequence[Any], Sequence[str] | None] | None:
    """(path, label) pairs and classes of a library's data set that decodes them itself, or of a subset of one.

    A class with a `__getitem__` or `__len__` of its own may mean other samples by them than `samples` lists.
    """
    if hasattr(source, "dataset") and hasattr(source, "indices") and is_of(source, "torch"):  # torch.utils.data.Subset
        if (whole := _samples(source.dataset)) is None:
            return None
        return [whole[0][i] for i in source.indices], whole[1]
    if not is_of(source, "timm", "torchvision"):
        return None
    holder = getattr(source, "reader", source)  # timm's ImageDataset
    samples = getattr(holder, "samples", None)
    if not isinstance(samples, Sequence) or not (len(samples) and _is_pair(samples[0])):
        return None
    names = getattr(holder, "classes", None)
    if names is None and isinstance(numbers := getattr(holder, "class_to_idx", None), dict):
        names = sorted(numbers, key=lambda name: numbers[name])
    if getattr(source, "target_transform", None) is not None:
        raise ValueError("source: its target_transform is not applied to .samples; give (path, label) pairs instead")
    if getattr(source, "transform", None) is not None:
        warnings.warn("source: its transform is not applied; create_loader has timm's, by its arguments", stacklevel=5)
    return samples, names


def _load_path(
    path: str,
    classes: list[str] | None,
    cache_dir: storage.StrPath | None,
    cache_bytes: int,
    progress: Progress,
) -> Source:
    if found := find_shards(path):
        return load_shards(found, cache_dir, cache_bytes, progress)
    if os.path.isdir(path):
        return class_folder(path)
    if glob.has_magic(path) or "{" in path:
        raise ValueError(f"source={path!r}: it matches no shard; give a pattern that matches existing files")
    if storage.is_remote(path) and storage.is_folder(path):
        return class_folder(path.rstrip("/"))
    if storage.is_remote(path) or os.path.isfile(path):
        return manifest(path) if is_manifest(path) else file_list(path, classes=classes)
    raise ValueError(f"source={path!r}: no such folder or list file; give one that exists")
