"""Which samples there are, and which of them a rank reads when.

DALI's own readers hide their order; here the place of a sample is a pure function of (seed, epoch, rank,
iteration), so shards, resume and the replacement of a bad file are arithmetic on one array.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# What DALI's decoders read; the same names as timm's, and some more.
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
# A list's labels are bounded, since there is a class name for every number up to the largest.
MAX_CLASSES = 10**6
MANIFEST = "lumix_dali.manifest/1"


@dataclass(frozen=True)
class Samples:
    """Image files with their labels: what timm calls a data set, without the pixels.

    Args:
        root: folder that `names` are relative to.
        names: path of each image below `root`.
        labels: int64 [n], class of each image, in [0, K).
        classes: K class names.

    Raises:
        ValueError: `labels` are not one integer a name, in [0, K).
    """

    root: str
    names: Sequence[str]
    labels: np.ndarray
    classes: Sequence[str]
    digest: str = field(init=False, repr=False)

    def __post_init__(self):
        n, k, labels = len(self.names), len(self.classes), np.asarray(self.labels)
        whole = labels.shape == (n,) and labels.dtype.kind in "iu"
        if not whole or not ((labels >= 0) & (labels < k)).all():
            raise ValueError(f"labels={labels!r}: give {n} integers, one a name, in [0, {k}), the classes")
        object.__setattr__(self, "labels", labels.astype(np.int64))
        sha = hashlib.sha256("\0".join([*self.names, "", *self.classes]).encode("utf-8", "surrogateescape"))
        sha.update(self.labels.tobytes())
        object.__setattr__(self, "digest", sha.hexdigest())

    def __len__(self) -> int:
        return len(self.names)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class name, as timm and torchvision call it."""
        return {name: label for label, name in enumerate(self.classes)}

    def path(self, index: int) -> str:
        """Path of sample `index`."""
        return os.path.join(self.root, self.names[index])


def load(source: str | os.PathLike | Samples) -> Samples:
    """Samples of a folder (`folder`), a list (`file_list`), a manifest of ``lumix-dali check``, or at hand.

    Raises:
        ValueError: nothing is there, or what is there cannot be used.
    """
    if isinstance(source, Samples):
        return source
    if os.path.isdir(source):
        return folder(source)
    if os.path.isfile(source):
        with open(source, "rb") as file:
            is_manifest = MANIFEST.encode() in file.read(64)
        return manifest(source) if is_manifest else file_list(source)
    raise ValueError(f"source={os.fspath(source)!r}: no such folder or list file; give one that exists")


def folder(root: str | os.PathLike) -> Samples:
    """Samples of a class folder: ``root/class/**/image``.

    Args:
        root: folder with one folder a class. Labels are the classes' places in timm's natural order ("2"
            before "10"), which for names of equal length is torchvision's. Hidden files and folders, and names
            without an image's extension, are passed over.

    Returns:
        `Samples`, sorted by label, then by name.

    Raises:
        ValueError: no class folder, or a class without an image.
    """
    root = os.fspath(root)
    classes = class_names(root)
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(filter(is_image, files_below(root, name)))
        if not found:
            raise ValueError(
                f"source={root!r}: class {name!r} has no image ({', '.join(sorted(EXTENSIONS))}); "
                "remove its folder, or put images into it"
            )
        names += found
        labels += [label] * len(found)
    return Samples(root, names, np.array(labels, np.int64), classes)


def file_list(path: str | os.PathLike, root: str | os.PathLike | None = None) -> Samples:
    """Samples of a text file with one ``PATH LABEL`` a line, DALI's `file_list`.

    Args:
        path: UTF-8 text; the label is the integer behind the last blank, so paths may hold blanks. Empty
            lines and a byte-order mark are passed over.
        root: folder that relative paths start from; None: the list's own folder.

    Returns:
        `Samples` in the order of the file, with the labels' numbers as class names.

    Raises:
        ValueError: a line that is not ``PATH LABEL``, a label outside [0, 10**6), an empty list.
    """
    path = os.fspath(path)
    names, labels = [], []
    for number, line in enumerate(Path(path).read_text("utf-8-sig", "surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.*\S)[ \t]+(\d{1,9})[ \t]*", line, re.ASCII)
        if not match or int(match[2]) >= MAX_CLASSES:
            raise ValueError(
                f"source={path!r}, line {number}: {line[:80]!r}; write PATH LABEL, LABEL in [0, {MAX_CLASSES})"
            )
        names.append(match[1])
        labels.append(int(match[2]))
    if not names:
        raise ValueError(f"source={path!r}: no sample in it; write one PATH LABEL a line")
    root = os.path.dirname(os.path.abspath(path)) if root is None else os.fspath(root)
    return Samples(root, names, np.array(labels, np.int64), [str(k) for k in range(max(labels) + 1)])


def manifest(path: str | os.PathLike) -> Samples:
    """Samples of a manifest that ``lumix-dali check`` wrote.

    Raises:
        ValueError: it is damaged, or was changed by hand.
    """
    try:
        content = json.loads(Path(path).read_text("ascii"))
        labels = np.array(content["labels"], np.int64)
        samples = Samples(content["root"], content["names"], labels, content["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source={os.fspath(path)!r}: damaged manifest ({error}); write it anew") from error
    if samples.digest != content.get("digest"):
        raise ValueError(f"source={os.fspath(path)!r}: its hash does not match its content; write it anew")
    return samples


@dataclass(frozen=True)
class Order:
    """The order in which one rank reads `n` samples.

    Training shuffles with (seed, epoch), alike on all ranks, and deals the samples out in turn; every rank
    gets the same number of batches. With `drop_last` the tail that does not fill a batch on every rank is left
    out (timm's rule); without it the order is continued from its start by fewer samples than there are
    ranks. Evaluation deals all samples out once, in order; ranks may then differ by one sample.

    With `repeats`, training follows timm's `RepeatAugSampler`: each sample stands `repeats` times in a row before
    the dealing, and an epoch keeps its length (from 256 samples on, cut to a multiple of 256), so that it shows
    about n / repeats of the samples.

    Args:
        n: number of samples.
        batch_size: samples a batch and rank.
        shuffle: draw a new order in every epoch.
        drop_last: leave out the incomplete last batch.
        seed: of the order; alike on all ranks.
        rank, world_size: which part of each epoch this is.
        repeats: repeated augmentation; 0: off.

    Raises:
        ValueError: with `drop_last`, fewer samples than one batch on every rank.
    """

    n: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeats: int = 0

    def __post_init__(self):
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: give a rank in [0, world_size), world_size={self.world_size}")
        if self.drop_last and len(self) == 0:
            raise ValueError(
                f"batch_size={self.batch_size}: {self.n} samples do not fill a batch on each of "
                f"{self.world_size} rank(s); give a smaller batch, or drop_last=False"
            )

    def __len__(self) -> int:
        """Number of batches."""
        if self.drop_last:
            return (self._share if self.repeats else self.n // self.world_size) // self.batch_size
        return -(-self._share // self.batch_size)

    @property
    def _share(self) -> int:
        even = -(-self.n // self.world_size)
        if self.repeats and self.n >= 256:
            return self.n // 256 * 256 // self.world_size
        return even if self.shuffle else len(range(self.rank, self.n, self.world_size))

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of this rank's samples in `epoch`, int64, in the order they are read."""
        if not self.shuffle:
            order = np.arange(self.n)
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            order = np.repeat(order, self.repeats or 1)
            order = np.resize(order, -(-len(order) // self.world_size) * self.world_size)
        order = order[self.rank :: self.world_size]
        return order[: min(self._share, len(self) * self.batch_size)]


def natural_key(text: str) -> list:
    """Sorts numbers in names by value, as timm orders classes."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def class_names(root: str) -> list[str]:
    """The class folders of `root`, in the order of their labels."""
    found = (entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    classes = sorted(sorted(found), key=natural_key)  # "1" and "01" have one key: never scandir's order
    if not classes:
        raise ValueError(f"source={root!r}: no class folder in it; lay images out as {root}/CLASS/IMAGE.jpg")
    return classes


def files_below(root: str, name: str) -> Iterator[str]:
    """All files of class `name`, however deep, relative to `root`."""
    for folder_, _, files in os.walk(os.path.join(root, name), followlinks=True):
        yield from (os.path.relpath(os.path.join(folder_, file), root) for file in files)


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image, and no part of it is hidden."""
    hidden = any(part[0] == "." for part in name.split(os.sep))
    return not hidden and os.path.splitext(name)[1].lower() in EXTENSIONS
