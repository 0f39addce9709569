"""What reaches DALI: the encoded images of a batch, each of which it can decode.

`Faults` knows, for the whole run, who decodes each sample and which samples cannot be decoded. `Feed` is the
callback of one epoch's pipeline: in threads and one batch ahead, it looks at samples that are not known yet,
decodes with Pillow what DALI must not see, and puts a good sample in the place of a bad one.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Protocol

import numpy as np

from . import formats
from .formats import BadImage, Decoder

_SEARCH = 1000  # neighbours that are tried in the place of a bad sample
_REMOTE_THREADS = 16  # waiting for storage takes no CPU


class Source(Protocol):
    """Samples by number: `sources.Samples` and `shards.Shards`."""

    @property
    def are_files(self) -> bool:
        """Whether each sample is a file that DALI can read by itself; its `label` then needs no look into it."""

    @property
    def remote(self) -> bool: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the sample is, for messages: a quoted path, with the member or record of a shard."""

    def path(self, index: int) -> str: ...

    def label(self, index: int) -> int: ...

    def open(self, index: int) -> tuple[BinaryIO, int]:
        """Encoded image and label; raises `BadImage` where one of them cannot be read."""


class Faults:
    """Who decodes each sample, and what stands in for those that nobody can decode.

    Args:
        source: where the samples are.
        max_bad: how many may be replaced.
        max_pixels: limit of an image's height times width.

    Attributes:
        bad: {index: substitute's index}.
        decoder: uint8 [n], a `Decoder` each.
        refused: indices that DALI refused and Pillow decodes instead.
    """

    def __init__(self, source: Source, max_bad: int, max_pixels: int):
        self.source, self.max_bad, self.max_pixels = source, max_bad, max_pixels
        self._news: list[str] = []
        self.restore({}, ())

    def restore(self, bad: dict[int, int], refused: Sequence[int]) -> None:
        """Starts again from what an earlier run found out."""
        self.bad, self.refused = dict(bad), set(refused)
        self.decoder = np.zeros(len(self.source), np.uint8)
        self.decoder[list(self.refused)] = Decoder.PILLOW

    def refuse(self, indices: Sequence[int]) -> None:
        """Gives samples that DALI cannot decode to Pillow."""
        self.refused.update(indices)
        self.decoder[list(indices)] = Decoder.PILLOW

    def bitmap(self, index: int, file: BinaryIO) -> bytes | None:
        """The image where Pillow decodes this sample, None where DALI does.

        Raises:
            BadImage: neither can.
        """
        if self.decoder[index] == Decoder.UNKNOWN:
            self.decoder[index] = formats.look(file, self.max_pixels).decoder
        if self.decoder[index] == Decoder.DALI:
            return None
        return formats.bitmap(formats.pillow_pixels(file, self.max_pixels))

    def dali_reads(self, indices: Sequence[int]) -> tuple[dict[int, np.ndarray], list[int]]:
        """Encoded images of those samples that DALI decodes, and the ones among them that it no longer can.

        A file may have been removed or overwritten since it was looked at.
        """
        encoded: dict[int, np.ndarray] = {}
        lost: list[int] = []
        for index in indices:
            if self.decoder[index] != Decoder.DALI:
                continue
            try:
                with self.source.open(index)[0] as file:
                    if formats.look(file, self.max_pixels).decoder != Decoder.DALI:
                        raise BadImage("changed")
                    file.seek(0)
                    encoded[index] = np.frombuffer(file.read(), np.uint8)
            except BadImage:
                self.decoder[index] = Decoder.UNKNOWN
                lost.append(index)
        return encoded, lost

    def replace(self, index: int, reason: str) -> int:
        """Names the next good sample for one that cannot be used.

        Raises:
            ValueError: none may be replaced any more, or no neighbour is good.
        """
        name, n = self.source.name(index), len(self.source)
        if index not in self.bad and len(self.bad) >= self.max_bad:
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
        self.bad[index] = substitute
        instead = self.source.name(substitute)
        self._news.append(f"{name} cannot be used ({reason}); {instead} takes its place")
        return substitute

    def news(self) -> list[str]:
        """What was replaced since the last call: the callback must not warn, for a warning may be an error."""
        news, self._news = self._news, []
        return news

    def _is_good(self, index: int) -> bool:
        try:
            with self.source.open(index)[0] as file:
                formats.pillow_pixels(file, self.max_pixels)
        except BadImage:
            return False
        return True


class Feed:
    """The callback of a pipeline: encoded images or paths, labels, and places of each batch of an epoch.

    Args:
        faults: of the run; what is found out here is kept there.
        indices: int64, the epoch's samples in their order.
        batch_size: samples per batch; the last one may have fewer.
        threads: for looking, reading and Pillow.
        ahead: batches that DALI may hold before they are read.
    """

    def __init__(self, faults: Faults, indices: np.ndarray, batch_size: int, threads: int, ahead: int):
        self._faults, self._source = faults, faults.source
        self._indices, self._batch_size = indices, batch_size
        workers = max(threads, _REMOTE_THREADS) if self._source.remote else threads
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lumix_dali")
        self._chunk = -(-batch_size // (2 * workers))
        self._pending: dict[int, list[Future]] = {}
        # Bitmaps that DALI opens by path live until the batches in its queue are surely decoded.
        self._memory: deque[list[_Memory]] = deque(maxlen=ahead + 2)

    def __call__(self, info: Any) -> tuple[list[np.ndarray], list[np.int64], list[np.int32]]:
        """What `classification.train_pipeline` reads in iteration ``info.iteration``."""
        number = info.iteration
        if number * self._batch_size >= len(self._indices):
            raise StopIteration
        self._prepare(number)
        self._prepare(number + 1)
        memory: list[_Memory] = []
        images, labels = [], []
        for chunk in self._pending[number]:
            for index, image, label in chunk.result():
                if isinstance(image, BadImage):
                    image, label = self._sample(self._faults.replace(index, str(image)))
                if isinstance(image, bytes) and self._source.are_files:
                    memory.append(_Memory(image))
                    image = memory[-1].path
                images.append(np.frombuffer(os.fsencode(image), np.uint8))
                labels.append(np.int64(label))
        del self._pending[number]
        self._memory.append(memory)
        return images, labels, list(np.arange(len(labels), dtype=np.int32))

    def close(self) -> None:
        """Ends the threads and frees the memory; the pipeline must not run any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._memory.clear()

    def _prepare(self, number: int) -> None:
        """Starts what a batch needs, once."""
        batch = self._indices[number * self._batch_size :][: self._batch_size].tolist()
        if number in self._pending or not batch:
            return
        chunks = [batch[i : i + self._chunk] for i in range(0, len(batch), self._chunk)]
        self._pending[number] = [self._pool.submit(self._chunk_of, chunk) for chunk in chunks]

    def _chunk_of(self, indices: list[int]) -> list[tuple[int, str | bytes | BadImage, int]]:
        """Index, path or encoded image, and label of each; a `BadImage` where there is none."""
        found: list[tuple[int, str | bytes | BadImage, int]] = []
        for index in indices:
            try:
                found.append((index, *self._sample(self._faults.bad.get(index, index))))
            except BadImage as error:
                found.append((index, error, 0))
        return found

    def _sample(self, index: int) -> tuple[str | bytes, int]:
        """Path or encoded image, and label."""
        source, faults = self._source, self._faults
        if source.are_files and faults.decoder[index] == Decoder.DALI:
            return source.path(index), source.label(index)
        file, label = source.open(index)
        with file:
            bitmap = faults.bitmap(index, file)
            if bitmap is not None:
                return bitmap, label
            if source.are_files:
                return source.path(index), label
            file.seek(0)
            return file.read(), label


class _Memory:
    """A file in memory that DALI can open by its path, as long as this object lives."""

    def __init__(self, content: bytes):
        _allow_files()
        self._handle = os.memfd_create("lumix_dali", os.MFD_CLOEXEC)
        with open(self._handle, "wb", closefd=False) as file:
            file.write(content)

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self._handle}"

    def __del__(self):
        os.close(self._handle)


def _allow_files() -> None:
    """Raises this process's limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
