"""Map-style data sets of encoded images, such as Hugging Face's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import files
from .formats import BadImage
from .protocol import Image, Source, class_number, class_numbers, wrong_label

_ENCODED = (bytes, bytearray, memoryview, np.ndarray, Mapping, str, os.PathLike, type(None))


class Rows(Source):
    """Any map-style data set of encoded images: Hugging Face's ``datasets``, or a class with `__getitem__`.

    Args:
        rows: ``rows[i]`` is (image, label) or a mapping of both. An image is given as encoded bytes, as a path, or as
            Hugging Face's ``Image(decode=False)``; a column that decodes is cast to that.
        image, label: keys of the mapping.
        classes: K class names; None: those of `rows`, of the data sets within PyTorch's ``Subset`` or
            ``ConcatDataset``, or of a Hugging Face ``ClassLabel``.

    Note:
        Rows are read from several threads.
    """

    remote = True  # as far as anybody knows: a row may come from anywhere

    def __init__(
        self, rows: Any, *, image: str = "image", label: str = "label", classes: Sequence[str] | None = None
    ) -> None:
        features = getattr(rows, "features", None) or {}
        if getattr(features.get(image), "decode", False):
            rows = rows.cast_column(image, type(features[image])(decode=False))
        self.rows, self._image, self._label = rows, image, label
        self.classes = _class_names(rows, label) if classes is None else list(classes)
        # Identifies the data set, as far as its digest or fingerprint, length and classes do.
        self.digest = hashlib.sha256(repr((_identity(rows), len(rows), self.classes)).encode()).hexdigest()
        if len(rows):
            (image, label), kind = self._pair(0, rows[0]), type(rows).__name__
            if not isinstance(image, _ENCODED) or (isinstance(image, np.ndarray) and image.ndim > 1):
                raise ValueError(
                    f"source: {kind} decodes its images: {kind}.__getitem__ returns {type(image).__name__}; return the "
                    "encoded bytes or a path there, or give (path, label) pairs, such as .samples of ImageFolder"
                )
            if class_number(label, self.classes) is None:
                raise ValueError(
                    f"source: {kind}[0]: {wrong_label(label, self.classes)}; several labels per image, or other "
                    "targets, come by number: return_index=True and target.mix(labels[index]), as in "
                    "examples/multilabel.py"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Number of the row, and its path if it has one."""
        path = _path(self._pair(index, self.rows[index])[0])
        return f"row {index}" + (f" ({path!r})" if path else "")

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images and labels."""
        many = getattr(self.rows, "__getitems__", None)
        rows = many(list(indices)) if many else [self._row(index) for index in indices]
        pairs = [self._pair(index, row) for index, row in zip(indices, rows, strict=True)]
        labels, wrong = class_numbers([label for _, label in pairs], self.classes)
        return [wrong[i] if i in wrong else _encoded(image) for i, (image, _) in enumerate(pairs)], labels

    def _row(self, index: int) -> Any:
        try:
            return self.rows[index]
        except Exception as error:
            error.add_note(f"from row {index} of the source, a {type(self.rows).__name__}")
            raise

    def _pair(self, index: int, row: Any) -> tuple[Any, Any]:
        try:
            image, label = (row[self._image], row[self._label]) if isinstance(row, Mapping) else row
        except (KeyError, TypeError, ValueError) as error:
            keys = f"a mapping of {', '.join(map(repr, row))}" if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"source: row {index} is {keys}; give (image, label), a mapping of {self._image!r} and "
                f"{self._label!r}, or name its keys: data.rows.Rows(rows, image=..., label=...)"
            ) from error
        return image, label


def _wrapped(rows: Any) -> list[Any]:
    """The data sets within PyTorch's Subset or ConcatDataset; a class of one's own may change their labels."""
    if not is_of(rows, "torch"):
        return []
    inner = getattr(rows, "datasets", None)  # a tuple or dict holds columns
    return [rows.dataset] if hasattr(rows, "dataset") else inner if isinstance(inner, list) else []


def is_of(rows: Any, *libraries: str) -> bool:
    """Whether these libraries wrote all that a data set gives out."""
    methods = (getattr(type(rows), name, None) for name in ("__getitem__", "__getitems__", "__len__"))
    modules = (getattr(method, "__module__", "") or "" for method in methods if method is not None)
    return all(module.split(".")[0] in libraries for module in modules)


def _class_names(rows: Any, label: str) -> list[str] | None:
    feature = (getattr(rows, "features", None) or {}).get(label)
    own = getattr(rows, "classes", getattr(feature, "names", None))
    if own is not None:
        return list(own)
    inner = [_class_names(each, label) for each in _wrapped(rows)]
    if None in inner:
        return None
    if any(names != inner[0] for names in inner):
        raise ValueError(
            f"source: the data sets of a {type(rows).__name__} have different classes; renumber them first"
        )
    return inner[0] if inner else None


def _identity(rows: Any) -> Any:
    known = getattr(rows, "digest", getattr(rows, "_fingerprint", None))
    if known is not None:
        return known
    inner = [(_identity(each), len(each)) for each in _wrapped(rows)]
    if not inner:  # a class of one's own may call anything indices
        return type(rows).__qualname__
    chosen = hashlib.sha256(np.asarray(getattr(rows, "indices", ()), np.int64).tobytes()).hexdigest()
    return type(rows).__qualname__, inner, chosen


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
    return BadImage(f"neither encoded bytes nor a path, but of type {kind}") if path is None else files.content(path)
