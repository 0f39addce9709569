"""``lumix-dali check``: find the files that would stop a run before it starts, and write a manifest of the others.

The fast scan reads the first and the last bytes of each file; ``--full`` decodes everything with DALI itself, the
only judge of what DALI can decode.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np

from . import sources

MAX_PIXELS = 100_000_000
_CHUNK = 256


@dataclass
class Report:
    """What a scan found.

    Args:
        samples: the usable samples.
        bad: {name: reason} of files that cannot be used.
        ignored: names passed over: hidden, or without an image's extension.
        empty: classes without a usable image.
        counts: usable images of each class.
    """

    samples: sources.Samples
    bad: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True where every file can be used and every class has one."""
        return not self.bad and not self.empty

    def shards(self, ranks: int, batch_size: int) -> dict[str, int]:
        """Batches a rank, and samples left out, of a training epoch over `ranks` at `batch_size`."""
        batches = len(self.samples) // (ranks * batch_size)
        return dict(
            ranks=ranks,
            batch_size=batch_size,
            batches=batches,
            left_out=len(self.samples) - batches * ranks * batch_size,
        )

    def as_dict(self) -> dict[str, Any]:
        """The report for machines, as ``--report`` writes it."""
        return dict(
            root=self.samples.root,
            images=len(self.samples),
            digest=self.samples.digest,
            ok=self.ok,
            counts=self.counts,
            bad=self.bad,
            empty=self.empty,
            ignored=self.ignored,
        )


def scan(
    source: str | os.PathLike,
    *,
    full: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda chunks, total: chunks,
) -> Report:
    """Looks at every file of a class folder, a list file or a manifest.

    Args:
        source: as `create_loader` takes it.
        full: decode every file with DALI, instead of looking at headers and ends alone.
        max_pixels: files whose header claims more are bad: they could take the machine's memory.
        workers: processes of the fast scan, threads of the full one; None: this process's CPUs.
        progress: wraps the iterable of scanned chunks, given the number of chunks.

    Returns:
        A `Report`.

    Raises:
        ValueError: nothing is there, or a list's line is wrong.
    """
    workers = workers or len(os.sched_getaffinity(0))
    found, ignored, empty = _found(source)
    paths = [found.path(i) for i in range(len(found))]
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    reasons: dict[str, str] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        quick = pool.map(_look, chunks, [max_pixels] * len(chunks))
        for chunk, faults in progress(zip(chunks, quick, strict=True), len(chunks)):
            reasons |= faults
            if full:
                reasons |= _undecodable([path for path in chunk if path not in faults], num_threads=workers)
    good = [i for i, path in enumerate(paths) if path not in reasons]
    samples = sources.Samples(found.root, [found.names[i] for i in good], found.labels[good], found.classes)
    numbers = np.bincount(samples.labels, minlength=len(found.classes))
    counts = {name: int(number) for name, number in zip(found.classes, numbers, strict=True)}
    return Report(
        samples,
        bad={name: reasons[path] for name, path in zip(found.names, paths, strict=True) if path in reasons},
        ignored=ignored,
        empty=sorted({*empty, *(name for name, number in counts.items() if not number)}, key=sources.natural_key),
        counts=counts,
    )


def _found(source: str | os.PathLike) -> tuple[sources.Samples, list[str], list[str]]:
    """Samples, ignored names, and classes without any image."""
    if not os.path.isdir(source):
        return sources.load(source), [], []
    root = os.fspath(source)
    classes = sources.class_names(root)
    everything = {name: list(sources.files_below(root, name)) for name in classes}
    images = {name: sorted(filter(sources.is_image, files)) for name, files in everything.items()}
    names = [file for name in classes for file in images[name]]
    labels = np.repeat(np.arange(len(classes)), [len(images[name]) for name in classes]).astype(np.int64)
    ignored = sorted(file for files in everything.values() for file in files if not sources.is_image(file))
    return sources.Samples(root, names, labels, classes), ignored, [name for name in classes if not images[name]]


def _undecodable(paths: list[str], num_threads: int) -> dict[str, str]:
    from .classification import undecodable  # the processes of the fast scan need no DALI

    return undecodable(paths, num_threads=num_threads)


def _look(paths: list[str], max_pixels: int) -> dict[str, str]:
    return {path: reason for path in paths if (reason := _fault(path, max_pixels))}


def _fault(path: str, max_pixels: int) -> str | None:
    """Why this file cannot be used, judged by its header and its end."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit is ours
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            with Image.open(file) as image:
                if image.width * image.height > max_pixels:
                    return f"{image.width}x{image.height} pixels, more than {max_pixels}"
                kind = image.format
            if kind not in ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM"):
                return f"{kind} is not decoded by DALI"
            file.seek(max(0, os.path.getsize(path) - 4096))
            tail = file.read()
    except OSError as error:
        return error.strerror or "not an image"
    except (ValueError, SyntaxError, MemoryError) as error:  # Pillow's, for hostile headers
        return f"not an image: {error}"
    # Some writers leave text behind the end marker: it may stand anywhere in the tail.
    end = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"")
    return None if end in tail else "cut short: its end marker is missing"


def show(report: Report, most: int = 20) -> str:
    """The report for people: totals, then at most `most` names of each kind."""
    lines = [f"{len(report.samples)} usable images in {len(report.samples.classes)} classes"]
    if report.counts:
        by_count = sorted(report.counts, key=lambda name: report.counts[name])
        low, high = by_count[0], by_count[-1]
        lines.append(f"smallest class: {low!r}, {report.counts[low]}; largest: {high!r}, {report.counts[high]}")
    for title, items in (
        ("cannot be used", [f"{name!r}: {reason}" for name, reason in report.bad.items()]),
        ("classes without a usable image", [repr(name) for name in report.empty]),
        ("passed over (hidden, or no image's extension)", [repr(name) for name in report.ignored]),
    ):
        if items:
            lines.append(f"{len(items)} {title}:")
            lines += [f"  {item}" for item in islice(items, most)]
            lines += [f"  … and {len(items) - most} more"] * (len(items) > most)
    return "\n".join(lines)


def write_manifest(samples: sources.Samples, path: str | os.PathLike) -> None:
    """Writes files, labels, classes and hash, for `create_loader`; replaces `path` in one step."""
    content = dict(
        format=sources.MANIFEST,
        root=os.path.abspath(samples.root),
        classes=list(samples.classes),
        names=list(samples.names),
        labels=samples.labels.tolist(),
        digest=samples.digest,
    )
    scratch = f"{os.fspath(path)}.tmp"
    with open(scratch, "w", encoding="ascii") as file:
        json.dump(content, file)
    os.replace(scratch, path)
