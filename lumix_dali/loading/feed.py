"""What the host hands to DALI, and remembers: the encoded images of a batch, all of which it can decode, and its plan.

`Feed` is the callback of one epoch's pipeline. In threads and one batch ahead, it inspects samples that are new,
decodes with Pillow what DALI must not see, and replaces bad samples by good ones.
"""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import numpy as np

from ..data import formats
from ..data.formats import BadImage, Decoder
from ..data.protocol import UNUSABLE
from .faults import Faults
from .plan import Plan

_READERS = 16  # threads that read remote samples: waiting for storage takes no CPU
_AHEAD = 16384  # samples whose remote shards are copied ahead of need
_PATIENCE = 2.0  # seconds that DALI may wait for a file without end


class _Read(NamedTuple):
    """A sample as it is handed to DALI: a path, or an encoded image; `BadImage` if it cannot be used."""

    sample: int
    image: Any
    label: int
    is_path: bool
    wanted: int  # the sample for which this one stands


class Batch(NamedTuple):
    """What one iteration was given.

    Attributes:
        iteration: its number.
        samples: indices of the samples, after replacement.
        images: uint8 [n] arrays: an encoded image, or a path.
        inputs: of `Plan.batch`.
    """

    iteration: int
    samples: list[int]
    images: list[np.ndarray]
    inputs: dict[str, np.ndarray]


class Feed:
    """Encoded images or paths, and the plan of each batch of an epoch.

    Args:
        faults: of the run; it records what is found here.
        indices: int64, the epoch's samples in their order.
        batch_size: samples per batch; the last one may have fewer.
        plan: of the epoch.
        threads: for inspecting, reading and decoding with Pillow.
        ahead: batches that DALI may hold before it reads their images.
    """

    def __init__(
        self, faults: Faults, indices: np.ndarray, batch_size: int, plan: Plan, threads: int, ahead: int
    ) -> None:
        self._faults, self._source, self.plan = faults, faults.source, plan
        self._indices, self._batch_size = indices, batch_size
        workers = max(threads, _READERS) if self._source.remote else threads
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lumix_dali")
        self._chunk = -(-batch_size // (2 * workers))
        self._pending: dict[int, list[Future[list[_Read]]]] = {}
        # DALI reads the images where they are, so they live until all batches in its queue are certainly decoded.
        self._batches: deque[Batch] = deque(maxlen=ahead + 2)
        self._lock = Lock()
        self._closed = Event()

    @property
    def gives_paths(self) -> bool:
        """Whether DALI reads files itself; otherwise it gets all contents."""
        return self._source.gives_paths

    def images(self, info: Any) -> list[np.ndarray]:
        """Paths or encoded images of iteration ``info.iteration``, a callback of the pipeline."""
        return self._batch(info.iteration).images

    def arrays(self, info: Any, names: Iterable[str]) -> list[np.ndarray]:
        """`Batch.inputs` of iteration ``info.iteration`` by name, another callback of the pipeline."""
        inputs = self._batch(info.iteration).inputs
        return [inputs[name] for name in names]

    def samples(self, iteration: int) -> list[int]:
        """The samples that an iteration in DALI's queue was given; none if it is not there."""
        return next((batch.samples for batch in self._batches if batch.iteration == iteration), [])

    def close(self, wait: bool = True) -> None:
        """Ends the threads and frees the memory; the pipeline must not run afterwards.

        Without `wait`, threads that are reading end after their current read.
        """
        reads = [read for reads in self._pending.values() for read in reads]
        self._closed.set()
        # Not `cancel_futures`, which needs a module that may be gone at the end of the process.
        done = [read.cancel() or read.done() for read in reads]
        self._pool.shutdown(wait=wait or all(done))
        self._pending.clear()
        self._batches.clear()

    def unblock(self, delivered: int = 0) -> None:
        """Ends DALI's wait for the writer of a FIFO in a batch from `delivered` on, so that it reports an error.

        A file can become a FIFO at any time after it was looked at. To look again at every file before each opening
        would cost tiny images a tenth of their throughput.
        """
        if not self.gives_paths:
            return
        for batch in [batch for batch in list(self._batches) if batch.iteration >= delivered]:
            for image, is_path in zip(batch.images, batch.inputs["is_path"], strict=True):
                if is_path and _is_fifo(path := image.tobytes()):
                    with suppress(OSError):  # DALI does not wait for this one
                        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    def _watch(self) -> None:
        newest = None
        while not self._closed.wait(_PATIENCE):
            before, newest = newest, next(reversed(list(self._batches)), None)
            if newest is before:  # no file is looked at while DALI gets on
                self.unblock()

    def _batch(self, iteration: int) -> Batch:
        """A batch, which is made once, for whichever callback asks first."""
        with self._lock:
            for batch in self._batches:
                if batch.iteration == iteration:
                    return batch
            if iteration * self._batch_size >= len(self._indices):
                raise StopIteration
            if self.gives_paths and not self._batches:
                Thread(target=self._watch, name="lumix_dali-watch", daemon=True).start()
            self._batches.append(self._make(iteration))
            return self._batches[-1]

    def _make(self, iteration: int) -> Batch:
        self._prepare(iteration)
        self._prepare(iteration + 1)
        reads = [read for chunk in self._pending.pop(iteration) for read in chunk.result()]
        reads = [self._good(read) for read in reads]
        used = [read.sample for read in reads]
        if self.plan.training:
            labels, index = [read.label for read in reads], used
        else:  # each sample once: a substitute must not count twice
            labels = [read.label if read.sample == read.wanted else UNUSABLE for read in reads]
            index = [read.wanted for read in reads]
        is_path = np.array([read.is_path for read in reads]) if self.gives_paths else None
        inputs = self.plan.batch(iteration, np.array(labels, np.int64), np.array(index, np.int64), is_path)
        return Batch(iteration, used, [np.frombuffer(read.image, np.uint8) for read in reads], inputs)

    def _good(self, read: _Read) -> _Read:
        while isinstance(read.image, BadImage):  # a substitute may turn bad too
            (substitute,) = self._read([self._faults.replace(read.sample, str(read.image))])
            read = substitute._replace(wanted=read.wanted)
        return read

    def _prepare(self, iteration: int) -> None:
        """Starts to read a batch, once."""
        start = iteration * self._batch_size
        samples = self._indices[start : start + self._batch_size].tolist()
        if iteration in self._pending or not samples:
            return
        self._source.prefetch(self._indices[max(0, start - self._batch_size) : start + _AHEAD])
        chunks = [samples[i : i + self._chunk] for i in range(0, len(samples), self._chunk)]
        self._pending[iteration] = [self._pool.submit(self._read, chunk) for chunk in chunks]

    def _read(self, indices: list[int]) -> list[_Read]:
        used = self._faults.usable(indices)
        # At once: to compare one element of an array takes as long as all the rest here.
        known = (self._faults.decoders[used] == Decoder.DALI).tolist()
        if self.gives_paths:
            assert self._source.labels is not None
            images: Sequence[Any] = [os.fsencode(self._source.path(index)) for index in used]
            labels = self._source.labels[used]
        else:
            images, labels = self._source.read(used)
        rows = zip(used, images, labels.tolist(), indices, known, strict=True)
        reads = [
            (_Read(index, image, label, self.gives_paths, wanted), known) for index, image, label, wanted, known in rows
        ]
        return [read if is_known else self._looked_at(read) for read, is_known in reads]

    def _looked_at(self, read: _Read) -> _Read:
        """A path or encoded image that DALI can decode, or a bitmap by Pillow."""
        try:
            if isinstance(read.image, BadImage):
                raise read.image
            with formats.open_regular(read.image) if read.is_path else io.BytesIO(read.image) as file:
                bitmap = self._faults.bitmap(read.sample, file)
        except BadImage as error:
            return read._replace(image=error, is_path=False)
        return read if bitmap is None else read._replace(image=bitmap, is_path=False)


def _is_fifo(path: bytes) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
