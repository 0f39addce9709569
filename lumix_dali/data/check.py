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
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL.Image

from ..cpus import available
from ..progress import Progress
from . import children, formats, index, sources, storage
from .files import Files, natural_key
from .files import survey as folder_survey
from .formats import MAX_PIXELS, BadImage, Decoder
from .protocol import Source
from .shards import Shards, find_shards, load_shards

_CHUNK = 256
_DECODED = 32  # images that are in memory at once, for each process
# Why `formats.look` gives images of these formats to Pillow.
_ODD = {
    "JPEG": "neither grey nor of three components, or not Huffman-coded with 8 bits",
    "MPO": "neither grey nor of three components, or not Huffman-coded with 8 bits",
    "PNG": "animated, or without an end",
    "WEBP": "with EXIF, or damaged",
}
_FOREIGN = "DALI is given only JPEG, PNG and WebP"
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
# The rows of docs/reliability.md whose pixels are not timm's.
_DEEP_GREY = "grey of 16 bits is scaled to 8 bits, where Pillow clips it at 255"
_DEEP = "16 bits are rounded to 8, where Pillow takes the upper byte"


class Note(NamedTuple):
    """What sets a usable image apart: Pillow decodes it, or DALI does so to other pixels than timm's loader."""

    format: str
    decoder: Decoder
    why: str


@dataclass
class Report:
    """What a scan found.

    Args:
        samples: the usable image files; None if the source does not consist of files.
        labels: int64 [n], of the usable samples.
        classes: K class names; numbers if they are unknown.
        root: where the source is.
        digest: identifies the usable samples.
        bad: {name: reason} of samples that cannot be used.
        ignored: names passed over: hidden, or without an image's extension.
        empty: classes without a usable image.
        files: of shards: usable samples of each.
        warnings: what hinders training, though every sample can be used.
        notes: number of usable images of each kind that Pillow decodes, or whose pixels are not timm's.
    """

    samples: Files | None
    labels: np.ndarray
    classes: Sequence[str]
    root: str
    digest: str
    bad: dict[str, str]
    ignored: list[str]
    empty: list[str]
    files: dict[str, int]
    warnings: list[str]
    notes: dict[Note, int]

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
        batches = len(self.labels) // (ranks * batch_size)
        return dict(
            ranks=ranks,
            batch_size=batch_size,
            batches=batches,
            left_out=len(self.labels) - batches * ranks * batch_size,
        )

    def as_dict(self) -> dict[str, Any]:
        """The report for machines, as ``--report`` writes it."""
        return dict(
            root=self.root,
            images=len(self.labels),
            digest=self.digest,
            ok=self.ok,
            counts=self.counts,
            bad=self.bad,
            empty=self.empty,
            ignored=self.ignored,
            files=self.files,
            warnings=self.warnings,
            notes=[dict(images=number, **_plain(note)) for note, number in self.notes.items()],
        )


def _plain(note: Note) -> dict[str, str]:
    return note._asdict() | dict(decoder=note.decoder.name)


@dataclass
class _Survey:
    """A source, and what its names and the structure of its shards tell before any image is looked at."""

    source: Source
    name: Callable[[int], str]
    root: str
    bad: dict[str, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)  # of samples
    ignored: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)


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
        ValueError: nothing is there, or a list's line is wrong.
    """
    workers = workers or available()
    survey = _survey(source, workers, progress)
    samples = survey.source
    labels = np.zeros(len(samples), np.int64)

    def prepare(chunk: list[int]) -> list[str | bytes | BadImage]:
        if samples.gives_paths and samples.labels is not None:
            labels[chunk] = samples.labels[chunk]
            return [samples.path(i) for i in chunk]
        images, labels[chunk] = samples.read(chunk)
        return [image if isinstance(image, BadImage) else bytes(image) for image in images]

    size = _DECODED if full or not samples.gives_paths else _CHUNK
    chunks = [list(range(i, min(i + size, len(labels)))) for i in range(0, len(labels), size)]
    task = partial(_decode if full else _look_at, max_pixels=max_pixels)
    reasons, notes = survey.reasons, Counter[Note]()
    results = progress(children.run(task, chunks, workers, prepare), len(chunks))
    for chunk, said in zip(chunks, results, strict=True):
        reasons |= {i: each for i, each in zip(chunk, said, strict=True) if isinstance(each, str) and i not in reasons}
        notes.update(each for i, each in zip(chunk, said, strict=True) if isinstance(each, Note) and i not in reasons)
    return _report(survey, labels, reasons, dict(notes.most_common()))


def _report(survey: _Survey, labels: np.ndarray, reasons: dict[int, str], notes: dict[Note, int]) -> Report:
    samples = survey.source
    is_good = np.ones(len(labels), bool)
    is_good[list(reasons)] = False
    good = np.flatnonzero(is_good)
    files = None
    if isinstance(samples, Files):
        files = Files(samples.root, [samples.names[i] for i in good.tolist()], labels[good], samples.classes)
    classes = samples.classes
    if classes is None:
        classes = [str(k) for k in range(int(labels[good].max(initial=-1)) + 1)]
    parts = [] if samples.counts is None else np.split(is_good, np.cumsum(samples.counts)[:-1])
    usable = [int(part.sum()) for part in parts]
    report = Report(
        samples=files,
        labels=labels[good],
        classes=classes,
        root=survey.root,
        digest=samples.digest if files is None else files.digest,
        bad=survey.bad | {survey.name(i): reasons[i] for i in sorted(reasons)},
        ignored=survey.ignored,
        empty=survey.empty,
        files=dict.fromkeys(survey.shards, 0) | dict(zip(_readable(survey), usable, strict=True)),
        warnings=survey.warnings,
        notes=notes,
    )
    report.empty += [name for name, number in report.counts.items() if not number]
    report.empty.sort(key=natural_key)
    if usable and _is_sorted(report.labels):
        report.warnings.append(_SORTED)
    return report


def _readable(survey: _Survey) -> list[str]:
    return [shard for shard in survey.shards if shard not in survey.bad]


def _survey(source: Any, workers: int, progress: Progress) -> _Survey:
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        shards = find_shards(path)
        if shards and not storage.is_remote(path):
            return _survey_of_shards(shards, workers, progress)
        if storage.is_folder(path) and not shards:
            found = folder_survey(path)
            doubts = [found.doubt] if found.doubt else []
            name = found.samples.names.__getitem__
            return _Survey(found.samples, name, path, ignored=found.ignored, empty=found.empty, warnings=doubts)
    samples_of_any = sources.load(source, progress=progress)
    if isinstance(samples_of_any, Files):
        return _Survey(samples_of_any, samples_of_any.names.__getitem__, samples_of_any.root)
    counts = () if samples_of_any.counts is None else samples_of_any.counts
    # Only our own shards have paths; a source of a user's own need not.
    shards = samples_of_any.paths if isinstance(samples_of_any, Shards) else [f"shard {k}" for k in range(len(counts))]
    return _Survey(samples_of_any, samples_of_any.name, str(source)[:200], shards=shards)


# The structure of shards


class _Audit(NamedTuple):
    """What one shard holds: its samples' names, the faults of some, members passed over, and what hinders reading."""

    names: list[str]
    reasons: dict[int, str]
    ignored: list[str]
    warnings: list[str]
    damage: str


def _survey_of_shards(paths: list[str], workers: int, progress: Progress) -> _Survey:
    results = children.run(_audits, [[path] for path in paths], workers)
    audits = [audit for (audit,) in progress(results, len(paths))]
    audits = [_Audit([], {}, [], [], each) if isinstance(each, str) else each for each in audits]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    shown = [os.path.relpath(os.path.abspath(path), root) for path in paths]
    whole = [path for path, audit in zip(paths, audits, strict=True) if not audit.damage]
    names: list[str] = []
    reasons: dict[int, str] = {}
    for shard, audit in zip(shown, audits, strict=True):
        reasons |= {len(names) + i: reason for i, reason in audit.reasons.items()}
        names += [f"{shard}/{name}" for name in audit.names]
    survey = _Survey(
        load_shards(whole) if whole else Files(root, [], np.zeros(0, np.int64), ()),
        names.__getitem__,
        root,
        bad={shard: audit.damage for shard, audit in zip(shown, audits, strict=True) if audit.damage},
        reasons=reasons,
        ignored=[f"{shard}/{name}" for shard, audit in zip(shown, audits, strict=True) for name in audit.ignored],
        warnings=[warning for audit in audits for warning in audit.warnings],
        shards=shown,
    )
    keys = [key for audit in audits for key in {os.path.splitext(name)[0] for name in audit.names}]
    if (twice := len(keys) - len(set(keys))) and not keys[0].startswith("record "):
        survey.warnings.append(
            f"{twice} keys occur in more than one shard: if they are the same samples twice, leave one of them out"
        )
    return survey


def _audits(paths: list[str]) -> list[_Audit]:
    return [_audit(path) for path in paths]


def _audit(path: str) -> _Audit:
    audit, is_tar = _Audit([], {}, [], [], ""), index.kind_of(path) == "webdataset"
    seen = set()
    try:
        with open(path, "rb", buffering=0) as file:
            handle = file.fileno()
            for number, row in enumerate(index.rows(path, handle, audit.ignored)):
                key = index.split_name(row.name)[0] if is_tar else row.name
                if key in seen:
                    audit.reasons[number] = "its key occurs twice"
                seen.add(key)
                audit.names.append(row.name)
            if not is_tar:
                audit.reasons.update(_checksum_faults(handle))
            elif os.pread(handle, 512, max(0, os.fstat(handle).st_size - 512)).strip(b"\0"):
                audit.warnings.append(
                    f"{os.path.basename(path)}: no end mark; if its original is longer it was cut short: copy it again"
                )
    except (ValueError, OSError) as error:
        return audit._replace(names=[], reasons={}, damage=str(error))
    return audit if seen else audit._replace(damage="no sample in it")


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


def _is_sorted(labels: np.ndarray) -> bool:
    """Whether neighbours are of one class far more often than in a random order."""
    shares = np.bincount(labels) / max(1, len(labels))
    return len(labels) > 1 and bool((np.diff(labels) != 0).mean() < (1 - (shares**2).sum()) / 2)


# One image, in a child process


def _look_at(items: list[str | bytes | BadImage], max_pixels: int) -> list[str | Note | None]:
    """Why an image cannot be used, or what is notable about it, as far as headers, markers and ends tell."""
    return [_said(item, partial(_look, max_pixels=max_pixels)) for item in items]


def _said(item: str | bytes | BadImage, question: Callable[[BinaryIO], Note | None]) -> str | Note | None:
    """The answer about a path or encoded image, or the reason why it is bad."""
    PIL.Image.MAX_IMAGE_PIXELS = None  # `max_pixels` alone counts
    try:
        if isinstance(item, BadImage):
            raise item
        with formats.open_regular(item) if isinstance(item, str) else io.BytesIO(item) as file:
            return question(file)
    except BadImage as error:
        return str(error)


def _look(file: BinaryIO, max_pixels: int) -> Note | None:
    """What is notable about an image; raises `BadImage` where its structure says that it is bad."""
    found = formats.look(file, max_pixels)
    # Pillow judges odd files of the formats that DALI decodes. A JPEG may lack its end marker because a film
    # follows it, as in motion photos, or because it is cut short.
    is_odd = found.decoder == Decoder.PILLOW or (found.format == "JPEG" and formats.has_stray_marker(file))
    if found.format in ("JPEG", "PNG", "WEBP") and is_odd:
        formats.pillow_pixels(file, max_pixels)
    return _note(file, found)


def _decode(items: list[str | bytes | BadImage], max_pixels: int) -> list[str | Note | None]:
    """As `_look_at`, by decoding: JPEGs that DALI decodes are decoded once more with Pillow.

    libjpeg's fatal errors inside a scan count as success in nvImageCodec, which then delivers a partly grey image.
    """
    from ..decoding import refused  # the processes of the fast scan need no DALI

    contents: dict[int, bytes] = {}
    said: list[str | Note | None] = []
    for number, item in enumerate(items):
        look = partial(_decode_with_pillow, number=number, contents=contents, max_pixels=max_pixels)
        said.append(_said(item, look))
    encoded = {number: np.frombuffer(content, np.uint8) for number, content in contents.items()}
    for number in refused(encoded):
        said[number] = _said(contents[number], partial(_decode_refused, max_pixels=max_pixels))
    return said


def _decode_refused(file: BinaryIO, max_pixels: int) -> Note:
    """Of an image that DALI refuses: Pillow decodes it, or it is bad."""
    formats.pillow_pixels(file, max_pixels)
    return Note(formats.look(file, max_pixels).format, Decoder.PILLOW, _REFUSED)


def _decode_with_pillow(file: BinaryIO, number: int, contents: dict[int, bytes], max_pixels: int) -> Note | None:
    """What is notable; keeps the content of what DALI decodes."""
    found = formats.look(file, max_pixels)
    file.seek(0)
    content = file.read()
    # Not PNG: Pillow refuses some for a text chunk, whose pixels DALI decodes as they should be.
    if found.decoder == Decoder.PILLOW or found.format == "JPEG":
        formats.pillow_pixels(file, max_pixels)
    if found.decoder == Decoder.DALI:
        contents[number] = content
    return _note(file, found)


def _note(file: BinaryIO, found: formats.Look) -> Note | None:
    """Whether Pillow decodes an image, or DALI does so to other pixels than timm's loader."""
    if found.decoder == Decoder.PILLOW:
        return Note(found.format, found.decoder, _ODD.get(found.format, _FOREIGN))
    if found.format != "PNG":
        return None
    file.seek(24)
    depth, colour = file.read(2)
    if depth != 16:
        return None
    return Note(found.format, found.decoder, _DEEP if colour else _DEEP_GREY)


def show(report: Report, most: int = 20) -> str:
    """The report for people: totals, then at most `most` names of each kind."""
    lines = [f"{len(report.labels)} usable images in {len(report.classes)} classes"]
    if report.counts:
        by_count = sorted(report.counts, key=lambda name: report.counts[name])
        low, high = by_count[0], by_count[-1]
        lines.append(f"smallest class: {low!r}, {report.counts[low]}; largest: {high!r}, {report.counts[high]}")
    if report.files:
        sizes = report.files.values()
        lines.append(f"{len(sizes)} shards of {min(sizes)} to {max(sizes)} samples")
    lines += [f"warning: {warning}" for warning in report.warnings]
    for note, number in report.notes.items():
        slow = note.decoder == Decoder.PILLOW
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
        remedy = _REWRITE if report.files else _MANIFEST
        lines.append(f"what to do: {remedy}. A run replaces them by others, and counts them (loader.bad)")
    return "\n".join(lines)
