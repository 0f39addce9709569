"""``lumix-dali check``: finds the files that a run would have to replace, and writes a manifest of the others.

The fast scan takes the loader's own look at each file's header, and at its end; ``--full`` decodes everything, as
the loader does. Both work in child processes: a file on which one dies is found and named. Shards are read from
end to end, and never extracted.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..progress import Progress
from . import formats, index, sources, storage
from .files import Files, class_files, natural_key
from .formats import MAX_PIXELS, BadImage, Decoder
from .protocol import MAX_CLASSES
from .shards import DESCRIPTION, description, find_shards

_Task = Callable[[list[Any]], dict[Any, Any]]
_CHUNK = 256
_DECODED = 32  # images that are decoded at once, and in memory
# Why `formats.look` gives images of these formats to Pillow.
_ODD = {
    "JPEG": "neither grey nor of three components, or not Huffman-coded with 8 bits",
    "MPO": "neither grey nor of three components, or not Huffman-coded with 8 bits",
    "PNG": "animated, or without an end",
    "WEBP": "with EXIF, or damaged",
}
_FOREIGN = "DALI is given only JPEG, PNG and WebP"
_REFUSED = "DALI refuses them"
_MANIFEST = "--manifest FILE writes a list of the others, for create_loader and pipelines.train"
_REWRITE = (
    "copy a shard again that was cut short or changed; for single samples, write the shards again from good files "
    "(lumix-dali convert)"
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
        samples: the usable samples.
        bad: {name: reason} of files that cannot be used.
        ignored: names passed over: hidden, or without an image's extension.
        empty: classes without a usable image.
        counts: usable images of each class.
        files: of shards: usable samples of each.
        warnings: of shards: what hinders training, though every sample can be used.
        notes: number of usable images of each kind that Pillow decodes, or whose pixels are not timm's.
    """

    samples: Files
    bad: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: dict[Note, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True where every file can be used and every class has one."""
        return not self.bad and not self.empty

    def shards(self, ranks: int, batch_size: int) -> dict[str, int]:
        """Batches per rank, and samples left out, of a training epoch over `ranks` at `batch_size`."""
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
            files=self.files,
            warnings=self.warnings,
            notes=[dict(images=number, **_plain(note)) for note, number in self.notes.items()],
        )


def _plain(note: Note) -> dict[str, str]:
    return note._asdict() | dict(decoder=note.decoder.name)


def scan(
    source: storage.StrPath,
    *,
    full: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Progress = lambda chunks, total: chunks,
) -> Report:
    """Looks at every file of a class folder, a list file or a manifest, or at every sample of shards.

    Args:
        source: as `create_loader` takes it.
        full: decode every file, instead of looking only at headers and ends.
        max_pixels: files whose header claims more are bad: they could take the machine's memory.
        workers: processes; None: this process's CPUs.
        progress: wraps the iterable of scanned chunks, given the number of chunks.

    Returns:
        A `Report`.

    Raises:
        ValueError: nothing is there, it is remote, or a list's line is wrong.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if paths := find_shards(os.fspath(source)):
        return _shard_report(paths, _look_at_shards(paths, full, max_pixels, workers, progress))
    found, ignored, empty = _found(source)
    paths = [found.path(i) for i in range(len(found))]
    chunks = _chunks(paths, _CHUNK)
    task = partial(_decode_files if full else _look_at_files, max_pixels=max_pixels)
    found_of: dict[str, str | Note] = {}
    for part in progress(_in_children(task, chunks, workers), len(chunks)):
        found_of |= part
    reasons = {path: said for path, said in found_of.items() if isinstance(said, str)}
    good = [i for i, path in enumerate(paths) if path not in reasons]
    samples = Files(found.root, [found.names[i] for i in good], found.labels[good], found.classes)
    numbers = np.bincount(samples.labels, minlength=len(found.classes))
    counts = {name: int(number) for name, number in zip(found.classes, numbers, strict=True)}
    return Report(
        samples,
        bad={name: reasons[path] for name, path in zip(found.names, paths, strict=True) if path in reasons},
        ignored=ignored,
        empty=sorted({*empty, *(name for name, number in counts.items() if not number)}, key=natural_key),
        counts=counts,
        notes=_counted(found_of[path] for path in paths if path in found_of),
    )


def _counted(found: Iterable[str | Note]) -> dict[Note, int]:
    """Numbers of the notes, the most frequent first."""
    return dict(Counter(note for note in found if isinstance(note, Note)).most_common())


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _in_children(task: _Task, chunks: Sequence[list[Any]], workers: int) -> Iterator[dict[Any, Any]]:
    """What `task` gives for each chunk, in order; an item on which its process dies gets that as its reason."""
    done = 0
    while done < len(chunks):
        with _children(workers) as pool:
            for future in [pool.submit(task, chunk) for chunk in chunks[done:]]:
                chunk, done = chunks[done], done + 1
                try:
                    yield future.result()
                except BrokenProcessPool:  # this chunk's process or another's: a new pool continues after it
                    yield _bisected(task, chunk)
                    break


def _bisected(task: _Task, chunk: list[Any]) -> dict[Any, Any]:
    """What `task` gives for a chunk, from processes of their own for the halves of one that dies."""
    try:
        with _children(1) as pool:
            return pool.submit(task, chunk).result()
    except BrokenProcessPool:
        if len(chunk) == 1:
            return {chunk[0]: "the process that decoded it died"}
        half = len(chunk) // 2
        return _bisected(task, chunk[:half]) | _bisected(task, chunk[half:])


def _children(workers: int) -> ProcessPoolExecutor:
    spawn = get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_initialize, initargs=(os.getpid(),))


def _initialize(parent: int) -> None:
    # A parent that is killed cannot tell its children, which would hold its terminal and wait for ever.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before
        os._exit(1)
    # nvImageCodec prints lines without a file's name to stderr; what is wrong comes back as a result.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _found(source: storage.StrPath) -> tuple[Files, list[str], list[str]]:
    """Samples, ignored names, and classes without any image."""
    if storage.is_remote(source):
        raise ValueError(f"source={os.fspath(source)!r}: remote files are not scanned; scan them before the upload")
    if not os.path.isdir(source):
        return sources.load_files(source), [], []
    root = os.fspath(source)
    everything = class_files(root)
    classes = list(everything)
    images = {name: sorted(filter(formats.is_image, files)) for name, files in everything.items()}
    names = [file for name in classes for file in images[name]]
    labels = np.repeat(np.arange(len(classes)), [len(images[name]) for name in classes]).astype(np.int64)
    ignored = sorted(file for files in everything.values() for file in files if not formats.is_image(file))
    return Files(root, names, labels, classes), ignored, [name for name in classes if not images[name]]


def _look_at_files(paths: list[str], max_pixels: int) -> dict[str, str | Note]:
    """{path: reason} of those whose header or end says that they cannot be used, {path: note} of notable ones."""
    found: dict[str, str | Note] = {}
    for path in paths:
        try:
            with formats.open_regular(path) as file:
                note = _look(file, max_pixels)
        except BadImage as error:
            found[path] = str(error)
        else:
            if note:
                found[path] = note
    return found


def _decode_files(paths: list[str], max_pixels: int) -> dict[str, str | Note]:
    """{path: reason} of those that cannot be decoded, {path: note} of notable ones."""
    found: dict[str, str | Note] = {}
    for some in _chunks(paths, _DECODED):
        images: dict[str, bytes] = {}
        for path in some:
            try:
                with formats.open_regular(path) as file:
                    images[path] = file.read()
            except BadImage as error:
                found[path] = str(error)
        found |= _decode(images, max_pixels)
    return found


def _decode(images: dict[str, bytes], max_pixels: int) -> dict[str, str | Note]:
    """{name: reason} of encoded images that neither DALI nor Pillow can decode, {name: note} of notable ones."""
    from ..decoding import refused  # the processes of the fast scan need no DALI

    found: dict[str, str | Note] = {}
    looks, names = {}, list(images)
    for name, image in images.items():
        try:
            looks[name] = formats.look(io.BytesIO(image), max_pixels)
        except BadImage as error:
            found[name] = str(error)
    encoded = {
        number: np.frombuffer(images[name], np.uint8)
        for number, name in enumerate(names)
        if name in looks and looks[name].decoder == Decoder.DALI
    }
    again = {names[number] for number in refused(encoded)}
    for name, look in looks.items():
        file = io.BytesIO(images[name])
        note = Note(look.format, Decoder.PILLOW, _REFUSED) if name in again else _note(file, look)
        if note:
            found[name] = note
        if note and note.decoder == Decoder.PILLOW:
            try:
                formats.pillow_pixels(file, max_pixels)
            except BadImage as error:
                found[name] = str(error)
    return found


def _look(file: BinaryIO, max_pixels: int) -> Note | None:
    """What is notable about an image; raises `BadImage` where its header, or a JPEG's end, says that it is bad."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        found = formats.look(file, max_pixels)
        # Pillow judges odd files of the formats that DALI decodes. A JPEG may lack its end marker because a film
        # follows it, as in motion photos, or because it is cut short.
        is_odd = found.decoder == Decoder.PILLOW or not _has_end(file, found)
        if found.format in ("JPEG", "PNG", "WEBP") and is_odd:
            formats.pillow_pixels(file, max_pixels)
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


def _has_end(file: BinaryIO, found: formats.Look) -> bool:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return found.format != "JPEG" or b"\xff\xd9" in file.read()


class _Look(NamedTuple):
    """What one shard holds."""

    names: list[str]
    labels: list[int]
    bad: dict[str, str]
    ignored: list[str]
    warnings: list[str]
    notes: dict[str, Note]


def _look_at_shards(paths: Sequence[str], full: bool, max_pixels: int, workers: int, progress: Progress) -> list[_Look]:
    chunks: list[list[Any]] = [[path] for path in paths]
    found: dict[str, _Look] = {}
    contents = _in_children(partial(_look_at_shard, max_pixels=max_pixels), chunks, workers)
    for content in progress(contents, len(chunks)):
        found |= content
    looks = [_looked(found[path]) for path in paths]
    if full:
        chunks = [[(path, name) for name in look.names] for path, look in zip(paths, looks, strict=True)]
        chunks = [chunk for chunk in chunks if chunk]
        found_there = dict(zip(paths, looks, strict=True))
        reasons = _in_children(partial(_decode_samples, max_pixels=max_pixels), chunks, workers)
        for faults in progress(reasons, len(chunks)):
            for (path, name), said in faults.items():
                if isinstance(said, Note):
                    found_there[path].notes[name] = said
                else:
                    found_there[path].bad.setdefault(name, said)
    return looks


def _looked(look: _Look | str) -> _Look:
    return look if isinstance(look, _Look) else _Look([], [], {"": look}, [], [], {})


def _look_at_shard(chunk: list[str], max_pixels: int) -> dict[str, _Look]:
    """{path: what it holds} of the one shard in `chunk`."""
    (path,) = chunk
    look, seen = _Look([], [], {}, [], [], {}), set()
    if storage.is_remote(path):
        raise ValueError(f"source={path!r}: remote shards are not scanned; scan them before the upload")
    try:
        with open(path, "rb", buffering=0) as file:
            for row in index.rows(path, file.fileno(), look.ignored):
                key = row.name if index.kind_of(path) == "tfrecord" else index.split_name(row.name)[0]
                said = "its key occurs twice" if key in seen else _look_at_row(path, file.fileno(), row, max_pixels)
                seen.add(key)
                if isinstance(said, str):
                    look.bad[row.name] = said
                    continue
                if said:
                    look.notes[row.name] = said
                look.names.append(row.name)
                look.labels.append(row.label)
            if index.kind_of(path) == "tfrecord":
                look.bad.update(_checksum_faults(file.fileno()))
            elif os.pread(file.fileno(), 512, max(0, os.fstat(file.fileno()).st_size - 512)).strip(b"\0"):
                look.warnings.append(
                    f"{os.path.basename(path)}: no end mark; if its original is longer it was cut short: copy it again"
                )
        if not seen:
            look.bad[""] = "no sample in it"
    except (ValueError, OSError) as error:
        look.bad[""] = str(error)
    return {path: look}


def _look_at_row(path: str, handle: int, row: index.Row, max_pixels: int) -> str | Note | None:
    """Why a sample cannot be used, or what is notable about it."""
    if row.label < 0:
        return index.reason_at(path, handle, row.offset, row.label)
    try:
        return _look(io.BytesIO(os.pread(handle, row.size, row.offset)), max_pixels)
    except BadImage as error:
        return str(error)


def _checksum_faults(handle: int) -> dict[str, str]:
    """{record: reason} of those whose checksums do not match; nothing without google-crc32c."""
    try:
        import google_crc32c
    except ImportError:
        return {}

    def masked(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    found = {}
    for number, (place, content) in enumerate(index.records(handle)):
        if content[8:12] + content[-4:] != masked(content[:8]) + masked(content[12:-4]):
            name = index.parse_record(content)[0]
            found[f"record {number}{name and f' ({name})'}"] = f"its checksum at byte {place} does not match"
    return found


def _decode_samples(chunk: list[tuple[str, str]], max_pixels: int) -> dict[tuple[str, str], str | Note]:
    """{(shard, sample): reason} of samples that cannot be decoded, and notes, from one shard."""
    path, wanted = chunk[0][0], {name for _, name in chunk}
    found: dict[str, str | Note] = {}
    with open(path, "rb", buffering=0) as file:
        rows = [row for row in index.rows(path, file.fileno()) if row.name in wanted]
        for some in _chunks(rows, _DECODED):
            found |= _decode({row.name: os.pread(file.fileno(), row.size, row.offset) for row in some}, max_pixels)
    return {(path, name): said for name, said in found.items()}


def _shard_report(paths: Sequence[str], looks: Sequence[_Look]) -> Report:
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    shown = [os.path.relpath(os.path.abspath(path), root) for path in paths]
    folder, classes = os.path.dirname(paths[0]), None
    if os.path.exists(os.path.join(folder, DESCRIPTION)):
        classes = description(folder)["classes"]
    names: list[str] = []
    labels: list[int] = []
    ignored: list[str] = []
    bad: dict[str, str] = {}
    files: dict[str, int] = {}
    for shard, look in zip(shown, looks, strict=True):
        bad |= {f"{shard}/{name}".rstrip("/"): reason for name, reason in look.bad.items()}
        ignored += [f"{shard}/{name}" for name in look.ignored]
        good = [row for row in zip(look.names, look.labels, strict=True) if row[0] not in look.bad]
        for name, label in good:
            if classes is not None and label >= len(classes):
                bad[f"{shard}/{name}"] = f"label {label}, of {len(classes)} classes"
            elif label >= MAX_CLASSES:
                bad[f"{shard}/{name}"] = f"label {label}, not below {MAX_CLASSES}"
            else:
                names.append(f"{shard}/{name}")
                labels.append(label)
        files[shard] = sum(f"{shard}/{name}" not in bad for name, _ in good)
    classes = classes or [str(k) for k in range(max(labels, default=-1) + 1)]
    numbers = np.bincount(labels, minlength=len(classes)) if labels else np.zeros(len(classes), int)
    counts = {name: int(number) for name, number in zip(classes, numbers, strict=True)}
    empty = [name for name, number in counts.items() if not number]
    samples = Files(root, names, np.array(labels, np.int64), classes)
    usable = zip(shown, looks, strict=True)
    notes = _counted(
        note for shard, look in usable for name, note in look.notes.items() if f"{shard}/{name}" not in bad
    )
    return Report(samples, bad, ignored, empty, counts, files, _warnings(samples, looks), notes)


def _warnings(samples: Files, looks: Sequence[_Look]) -> list[str]:
    found, labels = [warning for look in looks for warning in look.warnings], samples.labels
    shares = np.bincount(labels) / max(1, len(labels)) if len(labels) else np.zeros(1)
    expected = 1 - (shares**2).sum()  # neighbours of different classes, in a random order
    if len(labels) > 1 and (np.diff(labels) != 0).mean() < expected / 2:
        found.append(
            "sorted by class: no matter on local storage, but remote shards are shuffled only within a window; "
            "give shuffle='global', or write them in random order, as lumix-dali convert does"
        )
    keys = [key for look in looks for key in {os.path.splitext(name)[0] for name in look.names}]
    if (twice := len(keys) - len(set(keys))) and not keys[0].startswith("record "):
        found.append(
            f"{twice} keys occur in more than one shard: if they are the same samples twice, leave one of them out"
        )
    return found


def show(report: Report, most: int = 20) -> str:
    """The report for people: totals, then at most `most` names of each kind."""
    lines = [f"{len(report.samples)} usable images in {len(report.samples.classes)} classes"]
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
