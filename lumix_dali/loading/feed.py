"""What reaches DALI: the encoded images of a batch, all of which it can decode.

`Faults` records for the whole run which decoder each sample gets and which samples cannot be decoded. `Feed` is the
callback of one epoch's pipeline. In threads and one batch ahead, it inspects samples that are new, decodes with Pillow
what DALI must not see, and replaces bad samples by good ones.
"""

from __future__ import annotations

import io
import os
import resource
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from ..data import formats
from ..data.formats import BadImage, Decoder
from ..data.sources import Files, Source
from .plan import Plan

_SEARCH = 1000  # samples that are tried as a substitute for a bad one
_READERS = 16  # threads that read remote samples: waiting for storage takes no CPU
_AHEAD = 16384  # samples whose remote shards are copied ahead of need
_Read = tuple[int, Any, int]


class Replaced(NamedTuple):
    """A sample that could not be used, and its substitute."""

    substitute: int
    name: str
    reason: str


class Faults:
    """The decoder of each sample, and the substitutes of samples that cannot be decoded.

    Args:
        source: of the samples.
        max_bad: how many samples may be replaced.
        max_pixels: limit of an image's height times width.

    Attributes:
        bad: {index: Replaced}.
        decoder: uint8 [n], the `Decoder` of each sample.
        refused: indices of samples that DALI refused, so that Pillow decodes them.
    """

    def __init__(self, source: Source, max_bad: int, max_pixels: int) -> None:
        self.source, self.max_bad, self.max_pixels = source, max_bad, max_pixels
        self._news: list[str] = []
        self.restore({}, ())

    def restore(self, bad: dict[int, Sequence[Any]], refused: Sequence[int]) -> None:
        """Starts from what an earlier run has found."""
        self.bad = {index: Replaced(*found) for index, found in bad.items()}
        self.refused = set(refused)
        self.decoder = np.zeros(len(self.source), np.uint8)
        self.decoder[list(self.refused)] = Decoder.PILLOW

    def refuse(self, indices: Sequence[int]) -> None:
        """Assigns samples that DALI cannot decode to Pillow."""
        self.refused.update(indices)
        self.decoder[list(indices)] = Decoder.PILLOW

    def usable(self, indices: Sequence[int]) -> list[int]:
        """These samples, with known bad ones replaced."""
        return [self._usable(index) for index in indices]

    def _usable(self, index: int) -> int:
        while index in self.bad:  # a substitute may turn bad too
            index = self.bad[index].substitute
        return index

    def bitmap(self, index: int, file: BinaryIO) -> bytes | None:
        """The image as a bitmap if Pillow decodes this sample; None if DALI does.

        Raises:
            BadImage: neither can decode it.
        """
        if self.decoder[index] == Decoder.UNKNOWN:
            self.decoder[index] = formats.look(file, self.max_pixels).decoder
        if self.decoder[index] == Decoder.DALI:
            return None
        return formats.bitmap(formats.pillow_pixels(file, self.max_pixels))

    def dali_reads(self, indices: Sequence[int]) -> tuple[dict[int, np.ndarray], list[int]]:
        """Encoded images of the samples that DALI decodes, and those of them that it no longer can.

        A file may have been removed or overwritten since it was inspected.
        """
        wanted = [index for index in indices if self.decoder[index] == Decoder.DALI]
        encoded: dict[int, np.ndarray] = {}
        lost: list[int] = []
        for index, image in zip(wanted, self.source.read(wanted)[0], strict=True):
            if isinstance(image, BadImage) or not self._is_for_dali(image):
                self.decoder[index] = Decoder.UNKNOWN
                lost.append(index)
            else:
                encoded[index] = np.frombuffer(image, np.uint8)
        return encoded, lost

    def replace(self, index: int, reason: str) -> int:
        """Finds the next good sample for one that cannot be used, and returns its number.

        Raises:
            ValueError: no more samples may be replaced, or none of the next samples is good.
        """
        if index in self.bad:  # it occurs twice in a batch
            return self._usable(index)
        name, n = self.source.name(index), len(self.source)
        if len(self.bad) >= self.max_bad:
            raise ValueError(
                f"{name} cannot be used ({reason}), {len(self.bad)} replaced so far; repair or remove it, or give "
                f"on_bad_sample='replace' and max_bad > {self.max_bad}"
            )
        others = [(index + step) % n for step in range(1, min(n, _SEARCH + 1))]
        substitute = next((i for i in others if i not in self.bad and self._is_good(i)), None)
        if substitute is None:
            raise ValueError(
                f"{name} cannot be used ({reason}), nor can any of the {len(others)} samples after it; find "
                "out why with `lumix-dali check`"
            )
        self.bad[index] = Replaced(substitute, name, reason)
        instead = self.source.name(substitute)
        self._news.append(f"{name} cannot be used ({reason}); {instead} takes its place")
        return substitute

    def news(self) -> list[str]:
        """Messages about replacements since the last call: the callback must not warn, since a warning may raise."""
        news, self._news = self._news, []
        return news

    def _is_for_dali(self, image: Any) -> bool:
        try:
            return formats.look(io.BytesIO(image), self.max_pixels).decoder == Decoder.DALI
        except BadImage:
            return False

    def _is_good(self, index: int) -> bool:
        (image,), _ = self.source.read([index])
        try:
            if isinstance(image, BadImage):
                raise image
            formats.pillow_pixels(io.BytesIO(cast(Any, image)), self.max_pixels)
        except BadImage:
            return False
        return True


class Feed:
    """The callback of a pipeline: encoded images or paths, and the plan of each batch of an epoch.

    Args:
        faults: of the run; it records what is found here.
        indices: int64, the epoch's samples in their order.
        batch_size: samples per batch; the last one may have fewer.
        plan: of the epoch.
        threads: for inspecting, reading and decoding with Pillow.
        ahead: batches that DALI may hold before it reads their files.

    Attributes:
        gives_paths: whether DALI reads the files itself; otherwise it gets their contents.
    """

    def __init__(
        self, faults: Faults, indices: np.ndarray, batch_size: int, plan: Plan, threads: int, ahead: int
    ) -> None:
        self._faults, self._source, self.plan = faults, faults.source, plan
        self._indices, self._batch_size = indices, batch_size
        self._files = self._source if isinstance(self._source, Files) and not self._source.remote else None
        workers = max(threads, _READERS) if getattr(self._source, "remote", True) else threads
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lumix_dali")
        self._chunk = -(-batch_size // (2 * workers))
        self._pending: dict[int, list[Future[list[_Read]]]] = {}
        # Bitmaps that DALI opens by path live until all batches in its queue are certainly decoded.
        self._memory: deque[list[_Memory]] = deque(maxlen=ahead + 2)

    @property
    def gives_paths(self) -> bool:
        """Whether DALI reads the files itself."""
        return self._files is not None

    def __call__(self, info: Any) -> tuple[Any, ...]:
        """Returns what the pipeline reads in iteration ``info.iteration``."""
        number = info.iteration
        if number * self._batch_size >= len(self._indices):
            raise StopIteration
        self._prepare(number)
        self._prepare(number + 1)
        images: list[np.ndarray] = []
        labels: list[int] = []
        used: list[int] = []
        memory: list[_Memory] = []
        for chunk in self._pending[number]:
            for index, image, label in chunk.result():
                while isinstance(image, BadImage):  # a substitute may turn bad too
                    ((index, image, label),) = self._read([self._faults.replace(index, str(image))])
                if isinstance(image, _Bitmap) and self._files:
                    memory.append(_Memory(image))
                    image = os.fsencode(memory[-1].path)
                images.append(np.frombuffer(image, np.uint8))
                labels.append(label)
                used.append(index)
        del self._pending[number]
        self._memory.append(memory)
        planned = self.plan.batch(number, np.array(labels, np.int64), np.array(used, np.int64))
        return images, planned

    def close(self, wait: bool = True) -> None:
        """Ends the threads and frees the memory; the pipeline must not run afterwards.

        Without `wait`, threads that are reading end after their current read.
        """
        self._pool.shutdown(wait=False, cancel_futures=True)
        if wait or all(read.done() for reads in self._pending.values() for read in reads):
            self._pool.shutdown(wait=True)
        self._pending.clear()
        self._memory.clear()

    def _prepare(self, number: int) -> None:
        """Starts to read a batch, once."""
        start = number * self._batch_size
        batch = self._indices[start : start + self._batch_size].tolist()
        if number in self._pending or not batch:
            return
        if (prefetch := getattr(self._source, "prefetch", None)) is not None:
            prefetch(self._indices[max(0, start - self._batch_size) : start + _AHEAD])
        chunks = [batch[i : i + self._chunk] for i in range(0, len(batch), self._chunk)]
        self._pending[number] = [self._pool.submit(self._read, chunk) for chunk in chunks]

    def _read(self, indices: list[int]) -> list[_Read]:
        """Index of the sample used, its path, encoded image or `BadImage`, and its label."""
        used = self._faults.usable(indices)
        if self._files:
            labels = self._files.labels[used].tolist()
            return [(index, self._path(self._files, index), label) for index, label in zip(used, labels, strict=True)]
        images, found = self._source.read(used)
        labels = found.tolist()
        return [(i, self._content(i, image), label) for i, image, label in zip(used, images, labels, strict=True)]

    def _path(self, files: Files, index: int) -> Any:
        """What DALI reads: a file, or a bitmap in memory."""
        path = files.path(index)
        if self._faults.decoder[index] == Decoder.DALI:
            return os.fsencode(path)
        try:
            with formats.open_regular(path) as file:
                bitmap = self._faults.bitmap(index, file)
        except BadImage as error:
            return error
        return os.fsencode(path) if bitmap is None else _Bitmap(bitmap)

    def _content(self, index: int, image: Any) -> Any:
        """An image that DALI can decode."""
        if isinstance(image, BadImage) or self._faults.decoder[index] == Decoder.DALI:
            return image
        try:
            bitmap = self._faults.bitmap(index, io.BytesIO(image))
        except BadImage as error:
            return error
        return image if bitmap is None else bitmap


class _Bitmap(bytes):
    """Pixels that take the place of a path."""


class _Memory:
    """A file in memory that DALI can open by path as long as this object lives."""

    def __init__(self, content: bytes) -> None:
        _allow_files()
        self._handle = os.memfd_create("lumix_dali", os.MFD_CLOEXEC)
        with open(self._handle, "wb", closefd=False) as file:
            file.write(content)

    @property
    def path(self) -> str:
        """The path by which this process can open the file."""
        return f"/proc/self/fd/{self._handle}"

    def __del__(self) -> None:
        os.close(self._handle)


def _allow_files() -> None:
    """Raises this process's limit of open files to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
