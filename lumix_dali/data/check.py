"""``lumix-dali check``: finds the files that a run would have to replace, and writes a manifest of the others.

The fast scan takes the loader's own look at each header, and at a JPEG's markers; ``--full`` decodes everything, as
the loader does, and JPEGs once more with Pillow. Both work in child processes: a file on which one dies is named.
Shards are read from end to end, and never extracted.
"""

from __future__ import annotations

import io
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .. import checks
from ..cpus import available
from ..progress import Progress
from . import children, formats, index, sources, storage
from .files import Files, natural_key
from .files import survey as folder_survey
from .formats import FOREIGN, MAX_PIXELS, BadImage, Decoder, Look
from .order import Order
from .protocol import Source
from .shards import Shards, find_shards, load_shards

_CHUNK = 32  # images that are in memory at once, for each process
_REFUSED = "DALI refuses them"
_MANIFEST = "--manifest FILE writes a list of the others, for create_loader"
_REWRITE = (
    "copy a shard again that was cut short or changed; for single samples, write the shards again from good files "
    "(lumix-dali convert)"
)
_SORTED = (
    "sorted by class: no matter on local storage, but remote shards are shuffled only within a window; "
    "give shuffle='global', or write them in random order, as lumix-dali convert does"
)


class Note(NamedTuple):
    """What sets a usable image apart: Pillow decodes it, or DALI does so to other pixels than timm's loader."""

    format: str
    decoder: str
    why: str


@dataclass
class Report:
    """What a scan found.

    Args:
        root: where the source is.
        samples: the usable image files; None if the source does not consist of files.
        labels: int64 [n], of the usable samples.
        classes: K class names; numbers if they are unknown.
        digest: identifies the usable samples.
        bad: {name: reason} of samples and shards that cannot be used.
        ignored: names passed over: hidden, or without an image's extension.
        empty: classes without a usable image.
        shards: usable samples of each shard.
        warnings: what hinders training, though every sample can be used.
        notes: number of usable images of each kind that Pillow decodes, or whose pixels are not timm's.
    """

    root: str
    samples: Files | None = None
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    classes: Sequence[str] = ()
    digest: str = ""
    bad: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    shards: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: dict[Note, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True where every sample can be used and every class has one."""
        return not self.bad and not self.empty

    @property
    def counts(self) -> dict[str, int]:
        """Usable images of each class."""
        numbers = np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, numbers.tolist(), strict=True))

    def epoch(self, ranks: int, batch_size: int) -> dict[str, int]:
        """Batches per rank, and samples left out, of a training epoch over `ranks` at `batch_size`."""
        batches = 0
        with suppress(ValueError):  # too few samples for a batch on each rank
            batches = len(Order(len(self.labels), batch_size, world_size=ranks))
        left_out = len(self.labels) - batches * ranks * batch_size
        return dict(ranks=ranks, batch_size=batch_size, batches=batches, left_out=left_out)

    def as_dict(self) -> dict[str, Any]:
        """The report for machines, as ``--report`` writes it."""
        plain = ("root", "digest", "ok", "counts", "bad", "empty", "ignored", "shards", "warnings")
        return {name: getattr(self, name) for name in plain} | dict(
            images=len(self.labels),
            notes=[dict(images=number, **note._asdict()) for note, number in self.notes.items()],
        )


def scan(
    source: Any,
    *,
    full: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Progress = lambda chunks, total: chunks,
) -> Report:
    """Looks at every sample of a source.

    Args:
        source: as `create_loader` takes it; what is remote is read from its storage.
        full: decode every image, JPEGs with Pillow too, instead of looking only at headers, markers and ends.
        max_pixels: images whose header claims more are bad: they could take the machine's memory.
        workers: processes; None: this process's CPUs.
        progress: wraps the iterable of scanned chunks, given the number of chunks.

    Returns:
        A `Report`.

    Raises:
        ValueError: nothing is there, a list's line is wrong, or an argument is invalid.
    """
    workers = available() if workers is None else checks.whole("workers", workers, 1)
    samples, name, reasons, report = _survey(source, workers, progress)
    labels = np.zeros(len(samples), np.int64)

    def prepare(chunk: list[int]) -> list[str | bytes | BadImage]:
        if samples.gives_paths and samples.labels is not None:
            labels[chunk] = samples.labels[chunk]
            return [samples.path(i) for i in chunk]
        images, labels[chunk] = samples.read(chunk)
        return [image if isinstance(image, BadImage) else bytes(image) for image in images]

    chunks = [list(range(i, min(i + _CHUNK, len(labels)))) for i in range(0, len(labels), _CHUNK)]
    results = children.run(partial(_judge, full=full, max_pixels=max_pixels), chunks, workers, prepare)
    notes = Counter[Note]()
    for chunk, said in zip(chunks, progress(results, len(chunks)), strict=True):
        for i, each in zip(chunk, said, strict=True):
            if isinstance(each, str):
                reasons.setdefault(i, each)
            elif each.why and i not in reasons:
                notes[Note(each.format, each.decoder.name, each.why)] += 1
    report.notes = dict(notes.most_common())
    _count(report, samples, labels, {i: (name(i), reasons[i]) for i in sorted(reasons)})
    return report


def _count(report: Report, samples: Source, labels: np.ndarray, bad: dict[int, tuple[str, str]]) -> None:
    """Completes a report, given the labels of all samples, and {number: (name, reason)} of those that are bad."""
    is_good = np.ones(len(labels), bool)
    is_good[list(bad)] = False
    report.labels, report.digest = labels[is_good], samples.digest
    report.classes = [] if samples.classes is None else list(samples.classes)
    report.classes = report.classes or [str(k) for k in range(int(report.labels.max(initial=-1)) + 1)]
    if isinstance(samples, Files) and not report.shards:
        names = [samples.names[i] for i in np.flatnonzero(is_good).tolist()]
        report.samples = Files(samples.root, names, report.labels, samples.classes)
        report.digest = report.samples.digest
    if samples.counts is not None:
        parts = np.split(is_good, np.cumsum(samples.counts)[:-1])
        whole = [shard for shard in report.shards if shard not in report.bad]
        report.shards |= {shard: int(part.sum()) for shard, part in zip(whole, parts, strict=True)}
        if _is_sorted(report.labels):
            report.warnings.append(_SORTED)
    report.bad |= bad.values()
    report.empty = sorted({*report.empty, *(k for k, number in report.counts.items() if not number)}, key=natural_key)


def _is_sorted(labels: np.ndarray) -> bool:
    """Whether neighbours are of one class far more often than in a random order."""
    shares = np.unique(labels, return_counts=True)[1] / max(1, len(labels))
    return len(labels) > 1 and bool((np.diff(labels) != 0).mean() < (1 - (shares**2).sum()) / 2)


# What names and the structure of shards tell before any image is looked at


class _Survey(NamedTuple):
    """A source, the names of its samples, {number: reason} of those that are bad, and the report so far."""

    samples: Source
    name: Callable[[int], str]
    reasons: dict[int, str]
    report: Report


def _survey(source: Any, workers: int, progress: Progress) -> _Survey:
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    shards = find_shards(path) if path else []
    if shards and not storage.is_remote(path):
        return _survey_of_shards(shards, workers, progress)
    if path and not shards and storage.is_folder(path):
        found = folder_survey(path)
        doubts = [found.doubt] if found.doubt else []
        report = Report(path, ignored=found.ignored, empty=found.empty, warnings=doubts)
        return _Survey(found.samples, found.samples.names.__getitem__, {}, report)
    samples = load_shards(shards, progress=progress) if shards else sources.load(source, progress=progress)
    if isinstance(samples, Files):
        return _Survey(samples, samples.names.__getitem__, {}, Report(samples.root))
    counts = () if samples.counts is None else samples.counts
    # Only our own shards have paths; a source of a user's own need not.
    names = samples.paths if isinstance(samples, Shards) else [f"shard {k}" for k in range(len(counts))]
    return _Survey(samples, samples.name, {}, Report(str(source)[:200], shards=dict.fromkeys(names, 0)))


class _Audit(NamedTuple):
    """What one shard holds: its samples' names and keys, the faults of some, members passed over, and doubts."""

    names: list[str]
    keys: set[str]
    reasons: dict[int, str]
    ignored: list[str]
    warnings: list[str]


def _survey_of_shards(paths: list[str], workers: int, progress: Progress) -> _Survey:
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    report, whole = Report(root), []
    names: list[str] = []
    reasons: dict[int, str] = {}
    keys: Counter[str] = Counter()
    audits = children.run(_audits, [[path] for path in paths], workers)
    for path, (audit,) in zip(paths, progress(audits, len(paths)), strict=True):
        shard = os.path.relpath(os.path.abspath(path), root)
        report.shards[shard] = 0
        if isinstance(audit, str):
            report.bad[shard] = audit
            continue
        whole.append(path)
        reasons |= {len(names) + i: reason for i, reason in audit.reasons.items()}
        names += [f"{shard}/{name}" for name in audit.names]
        report.ignored += [f"{shard}/{name}" for name in audit.ignored]
        report.warnings += audit.warnings
        keys.update(audit.keys)
    if (twice := keys.total() - len(keys)) and index.kind_of(paths[0]) == "webdataset":
        report.warnings.append(
            f"{twice} keys occur in more than one shard: if they are the same samples twice, leave one of them out"
        )
    samples = load_shards(whole) if whole else Files(root, [], np.zeros(0, np.int64), ())
    return _Survey(samples, names.__getitem__, reasons, report)


def _audits(paths: list[str]) -> list[_Audit | str]:
    return [_audit(path) for path in paths]


def _audit(path: str) -> _Audit | str:
    """What a shard holds, or why it cannot be read to its end."""
    audit, is_tar = _Audit([], set(), {}, [], []), index.kind_of(path) == "webdataset"
    try:
        with open(path, "rb", buffering=0) as file:
            handle = file.fileno()
            for number, row in enumerate(index.rows(path, handle, audit.ignored)):
                key = index.split_name(row.name)[0] if is_tar else row.name
                if key in audit.keys:
                    audit.reasons[number] = "its key occurs twice"
                audit.keys.add(key)
                audit.names.append(row.name)
            if not is_tar:
                audit.reasons.update(_checksum_faults(handle))
            elif os.pread(handle, 512, max(0, os.fstat(handle).st_size - 512)).strip(b"\0"):
                audit.warnings.append(
                    f"{os.path.basename(path)}: no end mark; if its original is longer it was cut short: copy it again"
                )
    except (ValueError, OSError) as error:
        return str(error)
    return audit if audit.keys else "no sample in it"


def _checksum_faults(handle: int) -> dict[int, str]:
    """{number: reason} of records whose checksums do not match; nothing without google-crc32c."""
    try:
        import google_crc32c
    except ImportError:
        return {}

    def masked(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    return {
        number: f"its checksum at byte {offset} does not match"
        for number, (offset, content) in enumerate(index.records(handle))
        if content[8:12] + content[-4:] != masked(content[:8]) + masked(content[12:-4])
    }


# Images, in a child process


def _judge(items: list[str | bytes | BadImage], full: bool, max_pixels: int) -> list[Look | str]:
    """What the header of each image says, given as a path or encoded; or why the image cannot be used."""
    said: list[Look | str] = []
    given: dict[int, bytes] = {}  # to DALI
    for number, item in enumerate(items):
        try:
            if isinstance(item, BadImage):
                raise item
            with formats.open_regular(item) if isinstance(item, str) else io.BytesIO(item) as file:
                look = _look(file, full, max_pixels)
                if full and look.decoder == Decoder.DALI:
                    file.seek(0)
                    given[number] = file.read()
            said.append(look)
        except BadImage as error:
            said.append(str(error))
    if given:
        from ..decoding import refused  # the processes of the fast scan need no DALI

        for number in refused({i: np.frombuffer(content, np.uint8) for i, content in given.items()}):
            said[number] = _look_at_refused(io.BytesIO(given[number]), max_pixels)
    return said


def _look(file: BinaryIO, full: bool, max_pixels: int) -> Look:
    """What a header says; raises `BadImage` where Pillow, asked about doubtful images or all, says that it is bad."""
    look = formats.look(file, max_pixels)
    if look.decoder == Decoder.PILLOW:
        ask = full or look.why != FOREIGN  # odd files of the formats that DALI decodes are often damaged
    else:
        # libjpeg's fatal errors inside a scan count as success in nvImageCodec, which then delivers a partly grey
        # image. Not PNG: Pillow refuses some for a text chunk, whose pixels DALI decodes as they should be.
        ask = look.format == "JPEG" and (full or formats.has_stray_marker(file))
    if ask:
        formats.pillow_pixels(file, max_pixels)
    return look


def _look_at_refused(file: BinaryIO, max_pixels: int) -> Look | str:
    """Of an image that DALI refuses: Pillow decodes it, or it is bad."""
    try:
        formats.pillow_pixels(file, max_pixels)
    except BadImage as error:
        return str(error)
    return formats.look(file, max_pixels)._replace(decoder=Decoder.PILLOW, why=_REFUSED)


def show(report: Report, most: int = 20) -> str:
    """The report for people: totals, then at most `most` names of each kind."""
    lines = [f"{len(report.labels)} usable images in {len(report.classes)} classes"]
    if counts := report.counts:
        by_count = sorted(counts, key=lambda name: counts[name])
        low, high = by_count[0], by_count[-1]
        lines.append(f"smallest class: {low!r}, {counts[low]}; largest: {high!r}, {counts[high]}")
    if report.shards:
        sizes = report.shards.values()
        lines.append(f"{len(sizes)} shards of {min(sizes)} to {max(sizes)} samples")
    lines += [f"warning: {warning}" for warning in report.warnings]
    for note, number in report.notes.items():
        slow = note.decoder == Decoder.PILLOW.name
        how = "by Pillow, slower than by DALI" if slow else "to other pixels than timm's"
        lines.append(f"note: {number} {note.format} decoded {how}: {note.why}")
    for title, items in (
        ("cannot be used", [f"{name!r}: {reason}" for name, reason in report.bad.items()]),
        ("classes without a usable image", [repr(name) for name in report.empty]),
        ("passed over (hidden, or no image's extension)", [repr(name) for name in report.ignored]),
    ):
        if items:
            lines.append(f"{len(items)} {title}:")
            lines += [f"  {item}" for item in islice(items, most)]
            lines += [f"  … and {len(items) - most} more"] * (len(items) > most)
    if report.bad:
        remedy = _REWRITE if report.shards else _MANIFEST
        lines.append(f"what to do: {remedy}. A run replaces them by others, and counts them (loader.bad)")
    return "\n".join(lines)
