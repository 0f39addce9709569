"""Shards: tar (WebDataset) and TFRecord files, local or remote."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any, NoReturn, cast

import numpy as np
from braceexpand import braceexpand

from ..progress import Progress
from . import index, storage
from .formats import BadImage
from .protocol import SPLITS, Image, Source, class_number, wrong_label

DESCRIPTION, FORMAT = "shards.json", "lumix_dali.shards/1"
_HUB = "_info.json"  # in WebDatasets on the Hugging Face Hub, such as timm's ImageNet
CACHE_BYTES = 50 * 2**30
_OPEN = 256  # shards that are open at once
_AHEAD = 4  # remote shards that are copied at once


class _Shard:
    """An open shard: its descriptor stays open as long as something refers to this object."""

    def __init__(self, handle: int, rows: np.ndarray) -> None:
        self.handle, self.rows = handle, rows

    def __del__(self) -> None:
        os.close(self.handle)


class Shards(Source):
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

    counts: np.ndarray

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
        self.remote = storage.is_remote(paths[0])  # then they are copied before they are read
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
            # A local shard's time may change without its content, which its rows tell below.
            version = entry.version if self.remote else ""
            said = f"{os.path.basename(path)}\0{entry.size}\0{version}\0{count}\0"
            sha.update(said.encode("utf-8", "surrogateescape"))
        if self._rows is not None:
            sha.update(cast(Any, self._rows))
        self.digest = sha.hexdigest()
        self._refuse_text()

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __repr__(self) -> str:
        return f"Shards({self.root!r}: {len(self)} samples in {len(self.paths)} {self.kind} shards)"

    @property
    def kind(self) -> str:
        """The kind of the shards: "webdataset" or "tfrecord"."""
        return index.kind_of(self.paths[0])

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
        for k, index_ in enumerate(indices):
            number, shard, row = self._at(index_)
            offset, size, label = row
            if label < 0:
                images.append(BadImage(index.reason(self.paths[number], shard.handle, row)))
            elif class_number(label, self.classes) is None:
                images.append(BadImage(wrong_label(label, self.classes)))
            else:
                image = os.pread(shard.handle, size, offset)
                if len(image) < size:
                    raise ValueError(
                        f"source={self.paths[number]!r}: it ends before byte {offset + size}; it was longer when the "
                        "run began"
                    )
                images.append(image)
                labels[k] = label
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
        with suppress(Exception):  # missing, or damaged in any way
            return index.kept(kept).reshape(-1, 3)
        if handle is None:
            shard = _Shard(self._cache.open(path, entry), np.zeros((0, 3), np.int64))
            return self._index_of(number, shard.handle)
        rows = index.scan(path, handle)
        index.keep(kept, rows.ravel())
        return rows

    def _refuse_text(self) -> None:
        """Raises if most labels of local shards are no numbers."""
        if self._rows is None:
            return
        wrong = np.flatnonzero(self._rows[:, 2] == index.Fault.LABEL)
        if 2 * len(wrong) > len(self):
            (reason,), _ = self.read([int(wrong[0])])
            raise ValueError(
                f"source={self.paths[0]!r}: {len(wrong)} of {len(self)} labels are no numbers; of the first, "
                f"{reason!s}; write them as whole numbers, as lumix-dali convert does"
            )

    def _refuse(self, number: int, found: int, expected: int) -> NoReturn:
        raise ValueError(
            f"source={self.paths[number]!r}: it contains {found} samples, its description says {expected}; "
            "convert it again"
        )


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
    shards = sorted(filter(is_shard, names))
    if DESCRIPTION in names:
        description(folder)  # raises if not all shards are written
    elif shards:
        _refuse_mixture(folder, shards)
    return [os.path.join(folder, name) for name in shards]


_NUMBERED = re.compile(r"(.*?)(\d+)(?:-of-(\d+))?(?:\.[a-z]+)?$")


def _refuse_mixture(folder: str, names: Sequence[str]) -> None:
    """Raises if shards in a folder belong to several sets, such as train and val, or lack one of theirs."""
    parts = {name: match for name in names if (match := _NUMBERED.match(name)) and match[1].strip("-_.")}
    sets = sorted({match[1].rstrip("-_.") for match in parts.values()})
    splits = [each for each in sets if re.split(r"[-_.]", each.lower())[-1] in SPLITS]
    if len(sets) > 1 and splits:
        raise ValueError(
            f"source={folder!r}: its shards are of {len(sets)} sets: {', '.join(sets[:5])}; give one of them, such as "
            f"'{folder}/{splits[0]}*'"
        )
    for prefix, total in sorted({(match[1], match[3]) for match in parts.values() if match[3]}):
        there = {int(match[2]) for match in parts.values() if (match[1], match[3]) == (prefix, total)}
        if missing := [f"{k:0{len(total)}}" for k in range(int(total)) if k not in there]:
            raise ValueError(
                f"source={folder!r}: {len(missing)} of {prefix}*-of-{total} are missing: {', '.join(missing[:5])}; add "
                f"them, or give those that are there by a pattern, such as '{folder}/{prefix}*'"
            )


def braces(pattern: str) -> list[str]:
    """Expands ``{0000..0127}`` and ``{a,b}`` as a shell and WebDataset do."""
    is_file = not storage.is_remote(pattern) and os.path.exists(pattern)
    try:
        return [pattern] if is_file else list(braceexpand(pattern, escape=False))
    except ValueError:  # unbalanced
        return [pattern]


_SHARD = re.compile(r"(\.(tar|tfrecords?)|-\d{5}-of-\d{5})(\.(gz|zst|xz|bz2))?$|\.tgz$")


def is_shard(path: str) -> bool:
    """Whether a file has the name of a shard, perhaps of a compressed one, which is then refused with the reason."""
    name = os.path.basename(path)
    return bool(_SHARD.search(name))


def load_shards(
    paths: Sequence[str],
    cache_dir: storage.StrPath | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress = lambda items, total: items,
) -> Shards:
    """Shards of one kind, with what the files beside them say.

    Raises:
        ValueError: they are not shards of one kind and one set of classes, or cannot be read.
    """
    if not all(map(is_shard, paths)):
        wrong = next(path for path in paths if not is_shard(path))
        raise ValueError(f"source: {wrong!r} is not a shard; for images, give (path, label) pairs or a list file")
    if len(set(map(index.kind_of, paths))) != 1 or len(set(paths)) != len(paths):
        raise ValueError(f"source={list(paths)[:4]!r}: give shards of one kind, each only once")
    folders = sorted({storage.split(path)[0] for path in paths})
    listed = {folder: _files_in(folder) for folder in folders}
    entries = [listed[folder].get(name) for folder, name in map(storage.split, paths)]
    unknown = [
        k for k, entry in enumerate(entries) if entry is None or not entry.version
    ]  # HTTP servers list only names
    for k, entry in zip(unknown, storage.entries([paths[k] for k in unknown]), strict=True):
        entries[k] = entry
    known = {folder: _description(folder, listed[folder]) for folder in folders}
    lists = [each[0] for each in known.values() if each[0] is not None]
    if any(classes != lists[0] for classes in lists):
        raise ValueError(f"source={list(paths)[:4]!r}: their {DESCRIPTION} differ in classes; give one set")
    classes = lists[0] if len(lists) == len(folders) else None
    found = [known[storage.split(path)[0]][1].get(os.path.basename(path)) for path in paths]
    counts = None if None in found else [int(count) for count in found if count is not None]
    cache = storage.Cache(os.path.join(cache_dir or storage.cache_folder(), "shards"), cache_bytes)
    return Shards(paths, cast(Any, entries), counts, classes, cache, progress)


def _files_in(folder: str) -> dict[str, storage.Entry]:
    """Files beside the shards; empty if a web server lists none."""
    try:
        return storage.listing(folder)
    except ValueError:
        if storage.is_remote(folder):
            return {}
        raise


def _description(folder: str, files: Mapping[str, Any]) -> tuple[list[str] | None, dict[str, int]]:
    """Class names and the number of samples of each shard, as far as files beside the shards tell."""
    for name in (DESCRIPTION, _HUB) if not files else ():  # the server lists nothing, but they may exist
        with suppress(storage.Missing):
            files = {name: storage.entry(os.path.join(folder, name))}
            break
    if DESCRIPTION in files:
        found = description(folder)
        return found["classes"], found["shards"]
    if _HUB in files:
        return None, _hub_counts(os.path.join(folder, _HUB))
    return None, {}


def description(folder: str) -> dict[str, Any]:
    """Class names and the number of samples of each shard, as written by ``lumix-dali convert``.

    Raises:
        ValueError: the description is damaged, or not all shards are written.
    """
    path = os.path.join(folder, DESCRIPTION)
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
