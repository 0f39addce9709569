"""Which samples there are, and which of them a rank reads when.

DALI's own readers hide their order; here the place of a sample is a pure function of (seed, epoch, rank,
iteration), so shards, resume and the replacement of a bad file are arithmetic on one array.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from . import formats, shards
from .shards import EXTENSIONS, Shards

# A list's labels are bounded, since there is a class name for every number up to the largest.
MAX_CLASSES = 10**6
MANIFEST = "lumix_dali.manifest/1"


@dataclass(frozen=True)
class Samples:
    """Image files with their labels: what timm calls a data set, without the pixels.

    Args:
        root: folder that `names` are relative to, local or in S3 (``s3://bucket/prefix``).
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

    are_files = True  # DALI may read each sample by itself

    @property
    def remote(self) -> bool:
        """Whether the files are in S3."""
        return shards.is_remote(self.root)

    def path(self, index: int) -> str:
        """Path of sample `index`."""
        name = self.names[index]
        return name if shards.is_remote(name) else os.path.join(self.root, name)

    def name(self, index: int) -> str:
        """Path of sample `index`, for messages."""
        return repr(self.path(index))

    def label(self, index: int) -> int:
        """Class of sample `index`."""
        return int(self.labels[index])

    def open(self, index: int) -> tuple[BinaryIO, int]:
        """Encoded image and class of sample `index`.

        Raises:
            formats.BadImage: the file cannot be opened, or is no regular file.
        """
        path = self.path(index)
        if not shards.is_remote(path):
            return formats.open_regular(path), self.label(index)
        try:
            return io.BytesIO(shards.read_bytes(path)), self.label(index)
        except shards.Missing as error:
            raise formats.BadImage(str(error)) from error


def load(source: str | os.PathLike | Sequence[str | os.PathLike] | Samples | Shards) -> Samples | Shards:
    """Samples of a folder (`folder`), a list (`file_list`), a manifest of ``lumix-dali check``, or shards.

    Args:
        source: one of these, here or in S3. Shards are a folder of ``*.tar`` or ``*.tfrecord``, a glob, or a list
            of paths, with their index files beside them.

    Raises:
        ValueError: nothing is there, or what is there cannot be used.
    """
    if isinstance(source, Samples | Shards):
        return source
    if found := shards.find(source):
        return shards.load(found)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source={source!r}: no shard in this list; give one at least")
    path = os.fspath(source)
    if os.path.isdir(path):
        return folder(path)
    parent, name = os.path.split(path.rstrip("/"))
    if shards.is_remote(path) and name not in shards.listing(parent):
        return folder(path.rstrip("/"))
    if shards.is_remote(path) or os.path.isfile(path):
        return manifest(path) if is_manifest(path) else file_list(path)
    raise ValueError(f"source={path!r}: no such folder or list file; give one that exists")


def load_files(source: str | os.PathLike | Samples) -> Samples:
    """What `load` gives, where it must not be shards.

    Raises:
        ValueError: it is shards.
    """
    samples = load(source)
    if isinstance(samples, Shards):
        raise ValueError(f"source={str(source)!r}: these are shards; give a class folder, a list or a manifest")
    return samples


def is_manifest(path: str | os.PathLike) -> bool:
    """Whether this is a file that ``lumix-dali check`` wrote."""
    return not os.path.isdir(path) and MANIFEST.encode() in shards.read_bytes(os.fspath(path))[:64]


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
    files = class_files(root)
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
    return Samples(root, names, np.array(labels, np.int64), list(files))


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
    text = shards.read_bytes(path).decode("utf-8-sig", "surrogateescape")
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
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
    if root is None:
        root = os.path.dirname(path if shards.is_remote(path) else os.path.abspath(path))
    else:
        root = os.fspath(root)
    return Samples(root, names, np.array(labels, np.int64), [str(k) for k in range(max(labels) + 1)])


def manifest(path: str | os.PathLike) -> Samples:
    """Samples of a manifest that ``lumix-dali check`` wrote.

    Raises:
        ValueError: it is damaged, or was changed by hand.
    """
    try:
        content = json.loads(shards.read_bytes(os.fspath(path)).decode("ascii"))
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


@dataclass(frozen=True)
class Blocks(Order):
    """The order of shards: a rank reads a block of neighbours, which training shuffles within a window.

    In training the shards come in an order drawn from (seed, epoch), alike on all ranks, which take the blocks in
    turn; a sample moves by less than `initial_fill` places, and the tail that does not fill a batch on every rank
    is left out. In evaluation the blocks differ by one sample at most.

    Args:
        counts: samples of each shard.
        initial_fill: places in the window.

    Raises:
        ValueError: training is to keep the incomplete last batch, or to repeat samples.
    """

    counts: Sequence[int] = ()
    initial_fill: int = 1024

    def __post_init__(self):
        if self.shuffle and not self.drop_last:
            raise ValueError("drop_last=False: training from shards drops the incomplete batch; leave it True")
        if self.repeats:
            raise ValueError(f"num_aug_repeats={self.repeats}: shards are read in sequence; leave it at 0")
        super().__post_init__()

    @property
    def _share(self) -> int:
        return len(self._block(self.rank))

    def _block(self, number: int) -> range:
        return range(self.n * number // self.world_size, self.n * (number + 1) // self.world_size)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of this rank's samples in `epoch`, int64, in the order they are read."""
        if not self.shuffle:
            return np.array(self._block(self.rank), np.int64)
        counts = np.array(self.counts)
        shards_ = np.random.default_rng([self.seed, epoch]).permutation(len(counts))
        starts = np.cumsum(counts) - counts
        order = np.concatenate([np.arange(starts[k], starts[k] + counts[k]) for k in shards_])
        number = (self.rank + epoch) % self.world_size
        order = order[self._block(number)]
        moved = np.random.default_rng([self.seed, epoch, number + 1]).uniform(0, self.initial_fill, len(order))
        return order[np.argsort(np.arange(len(order)) + moved, kind="stable")][: len(self) * self.batch_size]


def natural_key(text: str) -> list:
    """Sorts numbers in names by value, as timm orders classes."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def class_files(root: str) -> dict[str, list[str]]:
    """{class folder: all files below it, relative to `root`}, in the order of the labels."""
    files: dict[str, list[str]] = {}
    if shards.is_remote(root):
        for file in shards.listing(root, deep=True):
            name, slash, _ = file.partition("/")
            if slash and name[0] != ".":
                files.setdefault(name, []).append(file)
    else:
        names = (entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        files = {name: list(files_below(root, name)) for name in names}
    if not files:
        raise ValueError(f"source={root!r}: no class folder in it; lay images out as {root}/CLASS/IMAGE.jpg")
    # "1" and "01" have one key: never scandir's order
    return {name: files[name] for name in sorted(sorted(files), key=natural_key)}


def files_below(root: str, name: str) -> Iterator[str]:
    """All files of class `name`, however deep, relative to `root`."""
    for folder_, _, files in os.walk(os.path.join(root, name), followlinks=True):
        yield from (os.path.relpath(os.path.join(folder_, file), root) for file in files)


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image, and no part of it is hidden."""
    hidden = any(part[0] == "." for part in name.split(os.sep))
    return not hidden and os.path.splitext(name)[1].lower() in EXTENSIONS
