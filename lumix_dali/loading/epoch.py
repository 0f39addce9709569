"""An epoch under way: a pipeline, and the position after the last delivered batch.

An epoch knows its `Spec`, which never changes, the run's `Faults`, and one callback, which tells the loader that a
batch was delivered. Whatever interrupts it, a fault in a file, a signal, an error of the user's, it goes on from its
position with a new pipeline: nothing in DALI's queue counts as delivered.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from .. import decoding
from ..data.order import Order
from ..mixing import Mixing
from . import pipelines
from .execution import Execution
from .faults import Faults
from .feed import Feed
from .pipelines import EvalTransform, TrainTransform
from .plan import Plan, unpack

# A decoder that refuses more than this fraction of a batch, and more images than a few, may be broken.
_MANY, _FEW = 0.1, 3
_INHERITED: list[Any] = []  # pipelines that a forked child must not free


class Position(NamedTuple):
    """A position in the stream, and what restores a pipeline there."""

    epoch: int
    iteration: int
    checkpoint: bytes | None = None
    mixed: bool | None = None  # None, and for the size too: from the loader's settings when the epoch starts
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Spec:
    """What the epochs of a loader have in common.

    Args:
        order: in which samples are read; it shuffles in training only.
        transform: applied to the images; their size is the position's.
        mixing: how they are mixed where the position says so.
        execution: how the work is done.
        device: where the pipeline runs.
        return_index: also yield the samples' numbers.
    """

    order: Order
    transform: TrainTransform | EvalTransform
    mixing: Mixing | None
    execution: Execution
    device: torch.device
    return_index: bool

    @property
    def is_training(self) -> bool:
        """Whether the epochs are for training."""
        return self.order.shuffle

    @property
    def device_id(self) -> int | None:
        """DALI's number of the GPU; None: the CPU."""
        return self.device.index if self.device.type == "cuda" else None

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `decoding.refused` and `decoding.works`."""
        execution = self.execution
        return dict(device_id=self.device_id, num_threads=execution.threads, **execution.decode_options)


class Epoch(Iterator[tuple[Any, ...]]):
    """The batches of one epoch from a position on.

    Args:
        spec: of the loader.
        position: where it starts.
        faults: of the run.

    Attributes:
        position: after the last delivered batch.
        has_delivered: whether it has delivered a batch.
        version: of `faults` when the pipeline was built.
    """

    _pipe: Any = None  # None: to be built again from the position

    def __init__(self, spec: Spec, position: Position, faults: Faults) -> None:
        self.spec, self.position, self._faults = spec, position, faults
        self._pid, self._closed, self._scheduled = os.getpid(), False, False
        self._refusals = 0  # images of this batch
        self._unexplained = 0  # batches of this epoch in which any image may be at fault
        self.has_delivered = False
        self._delivered: Callable[[Position], None] = lambda position: None
        self._build()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("loader: an epoch under way cannot be copied or pickled")

    def start(self) -> None:
        """Lets the pipeline decode ahead of need."""
        self._pipe.schedule_run()
        self._scheduled = True

    def report_to(self, delivered: Callable[[Position], None]) -> None:
        """Makes this the epoch under way: `delivered` gets the position after each batch, before the user does."""
        self._delivered = delivered

    def move(self, position: Position) -> None:
        """Starts elsewhere, as long as nothing was delivered."""
        if not self.has_delivered and position != self.position:
            self._release(wait=True)
            self.position = position

    def __next__(self) -> tuple[Any, ...]:
        check_process(self._pid)
        if self.position.iteration == len(self.spec.order):
            self.close()
            raise StopIteration
        if self._closed:
            raise RuntimeError(
                "loader: this iteration was abandoned, because the loader was iterated again, loaded a state, or was "
                "closed; create one loader for each loop that runs at the same time"
            )
        try:
            with _range(self.spec.device):
                batch, position = self._batch()
            self._delivered(position)
            self.position = position  # last: whatever interrupts a step before, this batch is delivered again
            self.has_delivered, self._refusals = True, 0
            return batch
        except BaseException:
            self._release(wait=False)
            raise

    def close(self, wait: bool = True) -> None:
        """Frees the pipeline and its threads for good; `wait` as in `Feed.close`."""
        self._closed = True
        self._release(wait)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Leaving a loop drops its iterator. Garbage may be collected in any thread, even one that holds a lock for
        # which the reads wait; at the end of the process, modules that closing needs may be gone.
        if not is_finalizing():
            self.close(wait=False)

    def _release(self, wait: bool) -> None:
        pipe, self._pipe = self._pipe, None
        self._scheduled = False
        if pipe is None:
            return
        if os.getpid() != self._pid:
            _INHERITED.append((pipe, self._feed))  # their threads exist only in the parent: ending them would hang
        else:
            self._feed.unblock(self.position.iteration)  # freeing the pipeline waits for what it reads
            del pipe
            self._feed.close(wait)

    def _batch(self) -> tuple[tuple[Any, ...], Position]:
        try:
            images, *outputs = (from_dlpack(output.as_tensor()) for output in self._run())
        finally:
            while message := self._faults.take_warning():
                warnings.warn(message, stacklevel=3)
        # Every time (.2 ms): a checkpoint taken after an error would already be past the batch that failed.
        position = self.position._replace(iteration=self.position.iteration + 1, checkpoint=self._pipe.checkpoint())
        if self.spec.transform.channels_last:
            images = images.permute(0, 3, 1, 2)  # NCHW to torch, channels-last in memory
        target, index = unpack(outputs, self.spec.is_training)
        return ((images, target, index) if self.spec.return_index else (images, target)), position

    def _run(self) -> Sequence[Any]:
        device = self.spec.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        while True:
            if self._pipe is None:
                self._build()
            try:
                if not self._scheduled:
                    self._pipe.schedule_run()
                self._scheduled = False
                outputs: Sequence[Any] = self._pipe.outputs(stream)
                return outputs
            except RuntimeError as error:
                if not self._resolve(error):
                    raise
                self._release(wait=True)

    def _resolve(self, error: RuntimeError) -> bool:
        """Finds the samples that DALI refuses, and gives them to Pillow; False: there are none.

        Raises:
            RuntimeError: so many that the decoder was tried with an image that is certainly good, and is broken.
        """
        given = self._feed.samples(self.position.iteration)
        limit = max(_FEW, int(_MANY * len(given)))
        number, lost = decoding.sample_of(error), list[int]()
        if number is not None and number < len(given):
            reasons = {given[number]: decoding.reason_of(error)}
            self._refusals += 1
        else:
            encoded, lost = self._faults.encoded(given)
            reasons = decoding.refused(encoded, limit=limit, **self.spec.decoding)
            if not reasons and not lost and decoding.is_decoders(error):
                # The fault shows only in the regions of this batch, so any of its images may have it.
                reasons = dict.fromkeys(encoded, decoding.reason_of(error))
                self._unexplained += 1
            else:
                self._refusals += len(reasons)
        suspicious = self._refusals > limit or self._unexplained > _FEW
        if suspicious and not decoding.works(**self.spec.decoding):
            raise self._broken(len(given), next(iter(reasons.items()))) from error
        for index, reason in reasons.items():
            self._faults.refuse(index, reason)
        return bool(reasons or lost)

    def _broken(self, count: int, example: tuple[int, str]) -> RuntimeError:
        regions = decoding.decodes_regions(self.spec.device_id is not None, self.spec.execution.decode_regions)
        operator = "image_slice" if regions else "image"
        remedy = "decode_regions=False" if regions else "other decoder= options"
        if self.spec.device.type == "cuda":
            remedy += ", device='cpu', or DALI 2.2 with nvImageCodec 0.8"
        index, reason = example
        return RuntimeError(
            f"decoder: fn.decoders.{operator} on {self.spec.device} fails for {self._refusals or count} or more of "
            f"{count} images ({decoding.versions()}), so not the files are bad; try {remedy}, or `lumix-dali check`. "
            f"First: {self._faults.source.name(index)[-80:]}: {reason[:80]}"
        )

    def _build(self) -> None:
        """Builds the pipeline, restored to the position."""
        spec, position = self.spec, self.position
        order, transform = spec.order, spec.transform
        if position.size is not None:
            transform = replace(transform, size=position.size)
        mixing = spec.mixing if position.mixed else None
        plan = Plan(order.seed, position.epoch, order.rank, transform.size, mixing, spec.is_training)
        # Not the seed of the order: the draws must differ by rank, the order must not.
        (seed,) = np.random.SeedSequence([order.seed, position.epoch, order.rank]).generate_state(1)
        self.version = self._faults.version
        threads, depth = spec.execution.threads, spec.execution.prefetch_queue_depth
        # The pipeline calls the feed for each batch (`pipelines.read`), up to `depth` batches ahead of `_run`.
        feed = Feed(self._faults, order.epoch(position.epoch), order.batch_size, plan, threads, depth)
        define = pipelines.train_pipeline if spec.is_training else pipelines.val_pipeline
        self._feed, self._pipe = (
            feed,
            define(
                feed,
                transform,
                decoder=spec.execution.decode_options,
                reader=spec.execution.reader,
                batch_size=order.batch_size,
                num_threads=threads,
                prefetch_queue_depth=depth,
                device_id=spec.device_id,
                seed=int(seed) & 0x7FFFFFFF,
                checkpoint=position.checkpoint,
            ),
        )


class Ahead:
    """The next epoch, which a thread of its own builds and starts: on a GPU that takes up to a second.

    Args:
        spec, position, faults: see `Epoch`.
    """

    def __init__(self, spec: Spec, position: Position, faults: Faults) -> None:
        self.position = position
        self._epoch: Epoch | None = None
        self._thread = Thread(target=self._run, args=(spec, faults), name="lumix_dali-next")
        self._thread.start()

    def take(self) -> Epoch | None:
        """The epoch, once; None where an error kept it from starting, which is raised again when it begins."""
        self._thread.join()
        epoch, self._epoch = self._epoch, None
        return epoch

    def close(self) -> None:
        """Frees the epoch."""
        if (epoch := self.take()) is not None:
            epoch.close()

    def _run(self, spec: Spec, faults: Faults) -> None:
        try:
            with _current(spec.device):
                epoch = Epoch(spec, self.position, faults)
                epoch.start()
        except (ValueError, RuntimeError):
            return
        self._epoch = epoch


def check_process(pid: int) -> None:
    """Raises an error in a forked child: DALI's threads exist only in the parent, so waiting for them never ends."""
    if os.getpid() != pid:
        raise RuntimeError("loader: it was inherited by fork; create a separate loader in each process")


def _range(device: torch.device) -> AbstractContextManager[Any]:
    """A range for PyTorch's profiler and Nsight Systems, with `device` as the current device.

    Whatever stream DALI is given, it orders its work after the stream of the calling thread's current device.
    """
    stack = ExitStack()
    stack.enter_context(torch.profiler.record_function("lumix_dali.Loader"))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.nvtx.range("lumix_dali.Loader"))
        stack.enter_context(torch.cuda.device(device))
    return stack


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else ExitStack()
