"""Image files and their labels: class folders, lists, pairs and manifests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast, overload

import numpy as np

from .. import checks
from . import storage
from .formats import EXTENSIONS, BadImage, is_image, open_regular
from .protocol import MAX_CLASSES, SPLITS, UNKNOWN, Image, Source, class_numbers, label_limit

MANIFEST = "lumix_dali.manifest/2"
# Folders that file systems and other programs leave beside classes.
_FOREIGN = {"lost+found", "__MACOSX", "@eaDir"}
_LINE = re.compile(r"(.*\S)[ \t]+(\d{1,9})[ \t]*", re.ASCII)


class Names(Sequence[str]):
    """Strings in one block of memory: each name takes its bytes and 8 more, and no Python object."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self.content[self._ends[index] : self._ends[index + 1]])

    def __repr__(self) -> str:
        return f"<{len(self)} names>"

    def update(self, sha: Any) -> None:
        """Adds all names to a `hashlib` hash."""
        sha.update(self.content)
        sha.update(cast(Any, self._ends))


@dataclass(frozen=True)
class Files(Source):
    """Image files and their labels: what timm calls a data set, without the pixels.

    Args:
        root: folder that `names` are relative to, local or remote.
        names: path of each image below `root`.
        labels: int64 [n], class of each image, in [0, K); or all of them -1, for images without labels.
        classes: K class names.

    Raises:
        ValueError: `labels` are not one integer per name, in [0, K), or `root` does not exist.
    """

    root: str
    names: Sequence[str]
    labels: np.ndarray = field()  # not the protocol's default
    classes: Sequence[str]
    digest: str = field(init=False, repr=False)
    remote: bool = field(init=False, repr=False)  # whether fsspec reads any of the files
    gives_paths: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        labels = whole_labels(self.names, self.labels, self.classes)
        names = self.names if isinstance(self.names, Names) else Names(self.names)
        root = os.fspath(self.root)
        if not storage.is_remote(root):
            root = os.path.abspath(root)  # the working folder may change
            if not os.path.isdir(root) and any(not os.path.isabs(name) for name in names):
                raise ValueError(f"root={root!r}: no such folder; give the one that the names are relative to")
        sha = hashlib.sha256()
        names.update(sha)
        sha.update("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        sha.update(labels.tobytes())
        remote = storage.is_remote(root) or b"://" in names.content
        checks.assign(self, root=root, names=names, labels=labels)
        checks.assign(self, digest=sha.hexdigest(), remote=remote, gives_paths=not remote)

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
        """Contents and labels; a `BadImage` for what cannot be opened or is not a regular file.

        The loader reads remote files so, and local ones after a fault: DALI opens those itself, by `path`.
        """
        return [content(self.path(index)) for index in indices], self.labels[np.asarray(indices, np.int64)]


def whole_labels(names: Sequence[object], labels: Any, classes: Sized | None) -> np.ndarray:
    """Labels as int64 [n], or an error that quotes the first that is none of the classes (None: of any number)."""
    try:
        array = np.asarray(labels)
    except ValueError:  # not one number each
        array = np.array([*labels, None], object)[:-1]
    count = len(array) if array.ndim else 0
    if count != len(names):
        raise ValueError(f"labels={str(labels)[:40]}: {count} for {len(names)} names; give one whole number per name")
    if array.ndim == 1 and array.dtype.kind in "iu":
        unknown = classes is not None and bool((array == UNKNOWN).all())
        if unknown or ((array >= 0) & (array < label_limit(classes))).all():
            return array.astype(np.int64)
    numbers, wrong = class_numbers(labels, classes)
    if not wrong:  # Python's numbers, tensors' scalars, or none at all
        return numbers
    # Among floats, .5 tells more than .0.
    i = next((i for i in wrong if isinstance(labels[i], float) and labels[i] % 1), min(wrong))
    raise ValueError(f"labels: {names[i]!r:.150}: {wrong[i]}; give one for each name")


def content(path: str) -> bytes | BadImage:
    """What a local or remote file holds; a `BadImage` if it cannot be opened or is not a regular file."""
    try:
        if storage.is_remote(path):
            return storage.read_bytes(path)
        with open_regular(path) as file:
            return file.read()
    except storage.Missing as error:
        return BadImage(str(error))
    except BadImage as error:
        return error


def pairs(samples: Sequence[tuple[storage.StrPath, int]], classes: Sequence[str] | None = None) -> Files:
    """Files of (path, label) pairs, such as torchvision's ``ImageFolder.samples``.

    Raises:
        ValueError: an element is not such a pair.
    """
    try:
        names = [os.fspath(path) for path, _ in samples]
    except (TypeError, ValueError) as error:
        raise ValueError(f"source={str(samples[:2])[:80]}…: give pairs of a path and a label") from error
    names = [name if storage.is_remote(name) else os.path.abspath(name) for name in names]
    labels = whole_labels(names, [label for _, label in samples], None)
    if classes is None:
        classes = [str(k) for k in range(int(labels.max()) + 1)]
    return Files("/", names, labels, classes)


class Survey(NamedTuple):
    """What a class folder holds: its images, files that are no images, and classes without an image."""

    samples: Files
    ignored: list[str]
    empty: list[str]

    @property
    def doubt(self) -> str:
        """Why these may not be the classes that are meant; empty where nothing speaks for it."""
        names = self.samples.classes
        if len(names) < 2 or not {name.lower() for name in names} <= SPLITS:
            return ""
        return f"its classes are {', '.join(names)}; is the data set one of these folders?"


def survey(root: str) -> Survey:
    """Looks at all names in a class folder, ``root/class/**/image``, or in a folder of images without classes.

    Raises:
        ValueError: there is no image.
    """
    below = class_files(root)
    images = {name: sorted(filter(is_image, files)) if name not in _FOREIGN else [] for name, files in below.items()}
    ignored = sorted(file for name in below.keys() - _FOREIGN for file in below[name] if not is_image(file))
    classes = [name for name in below if images[name]]
    if classes:
        names = [file for name in classes for file in images[name]]
        labels = np.repeat(np.arange(len(classes)), [len(images[name]) for name in classes])
        return Survey(Files(root, names, labels, classes), ignored, [name for name in below if not images[name]])
    names = sorted(filter(is_image, storage.listing(root)))
    if not names:
        raise ValueError(
            f"source={root!r}: no image in it ({', '.join(sorted(EXTENSIONS))}); lay images out as "
            f"{root}/CLASS/IMAGE.jpg"
        )
    return Survey(Files(root, names, np.full(len(names), UNKNOWN), ()), ignored, list(below))


def class_folder(root: storage.StrPath) -> Files:
    """Files of a class folder: ``root/class/**/image``.

    Args:
        root: folder with one folder per class. Labels number the classes in timm's natural order ("2" before
            "10"), which for names of equal length is also torchvision's. Folders without an image, or which a file
            system or an archiver left there, have no number; they and files without an image's extension are named in
            one warning. Hidden files and folders are ignored. A folder that holds images and no class is for
            prediction: its labels are -1, and it has no classes.

    Returns:
        `Files`, sorted by label, then by name.

    Raises:
        ValueError: there is no image.
    """
    root = os.fspath(root)
    found = survey(root)
    if found.doubt:
        warnings.warn(f"source={root!r}: {found.doubt}", stacklevel=4)
    seen = [name for name in found.ignored if name[0] != "." and "/." not in name]
    passed = [
        f"{len(names)} {what} ({', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''})"
        for what, names in (("folders that are no classes", found.empty), ("files without an image's ending", seen))
        if names
    ]
    if passed:
        warnings.warn(f"source={root!r}: passed over {' and '.join(passed)}; see lumix-dali check", stacklevel=4)
    return found.samples


def file_list(
    path: storage.StrPath, root: storage.StrPath | None = None, classes: Sequence[str] | None = None
) -> Files:
    """Files of a text file with one ``PATH LABEL`` per line, DALI's `file_list`.

    Args:
        path: UTF-8 text. The label is the integer after the last blank, so paths may contain blanks. Empty lines and
            a byte-order mark are ignored.
        root: folder that paths are relative to; None: the folder of the list.
        classes: K class names that the labels number; None: the numbers themselves.

    Returns:
        `Files` in the order of the list.

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
    return Files(os.fspath(root), names, np.array(labels), classes or [str(k) for k in range(max(labels) + 1)])


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
