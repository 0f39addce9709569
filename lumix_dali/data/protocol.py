"""What a source of samples can do: the one protocol of files, shards, rows and a user's own class."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .. import checks
from .formats import BadImage

# Bounds the labels of a source without class names, because every number up to the largest gets one.
MAX_CLASSES = 10**6
UNKNOWN = -1  # the label of images of which nothing is known
# The label of a sample that could not be used, in evaluation: PyTorch's losses ignore it, and no prediction equals it.
UNUSABLE = -100
# Names of the parts of a data set.
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

Image = bytes | memoryview | np.ndarray | BadImage


def class_number(label: Any, classes: Sized | None) -> int | None:
    """A label as an int, from any kind of integer, a tensor's scalar too; None if it is none of the classes.

    Without a class, as in a folder of images for prediction, labels are `UNKNOWN`.
    """
    try:
        number = None if checks.is_bool(label) or getattr(label, "ndim", False) else operator.index(label)
    except TypeError:
        return None
    if number == UNKNOWN and classes is not None and not len(classes):
        return number
    return number if number is not None and 0 <= number < label_limit(classes) else None


def class_numbers(labels: Iterable[Any], classes: Sized | None) -> tuple[np.ndarray, dict[int, BadImage]]:
    """Labels as int64 [n], 0 for those that are none of the classes, and what says so of these by their place."""
    labels = list(labels)
    numbers = [class_number(label, classes) for label in labels]
    wrong = {i: BadImage(wrong_label(labels[i], classes)) for i, number in enumerate(numbers) if number is None}
    return np.array([number or 0 for number in numbers], np.int64), wrong


def label_limit(classes: Sized | None) -> int:
    """What labels are below."""
    return MAX_CLASSES if classes is None else len(classes)


def wrong_label(label: Any, classes: Sized | None) -> str:
    """Why a label is none of the classes."""
    label = label.item() if isinstance(label, np.generic) else label
    return f"its label is {label!r:.40}, not a whole number in [0, {label_limit(classes)})"


@runtime_checkable
class Source(Protocol):
    """Encoded images and labels by number. `create_loader` takes any object with the members without a default.

    Attributes:
        classes: K class names, or None if they are unknown.
        digest: a text that differs if names, labels or classes do; part of a loader's state.
        remote: whether reading waits for storage.
        gives_paths: whether `path` names local files that a decoder may open itself.
        labels: int64 [n], as `read` returns them, where they are known before, as with `gives_paths`; else None.
        counts: samples of each shard, int64 [shards], or None if there are no shards.
    """

    classes: Sequence[str] | None
    digest: str
    remote: bool = False
    gives_paths: bool = False
    labels: np.ndarray | None = None
    counts: np.ndarray | None = None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of sample `index` in messages."""

    def read(self, indices: Sequence[int]) -> tuple[list[Image], np.ndarray]:
        """Encoded images, and labels int64 [n]; called from several threads.

        A `BadImage` takes the place of an image that cannot be read; that sample is then replaced, and so is one whose
        label is none of the classes. An exception means that the source as a whole fails, and ends the run.
        """

    def path(self, index: int) -> str:
        """The local file of sample `index`, where `gives_paths`."""
        raise ValueError(f"{self.name(index)}: it is not a local file; read it")

    def prefetch(self, indices: np.ndarray) -> None:
        """Announces the samples that are read next, in order, int64 [n]."""
        return
