"""`create_loader`: DALI's pipelines as a PyTorch loader.

Every epoch has its own pipeline, whose order, plans and draws are a pure function of (seed, epoch, rank). The next
pipeline is built, and starts to decode, while the last batches of the current one are consumed. An abandoned epoch, a
switch of mixing, a bad sample and a resume all do the same: they build a pipeline at a given place. Batches leave DALI
through DLPack, without a copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, cast, get_args

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

try:
    import nvidia.dali as dali
except ImportError as error:
    raise ImportError(
        "NVIDIA DALI is not installed: pip install 'lumix-dali[cuda12]' or 'lumix-dali[cuda13]', never both"
    ) from error

from .. import checks
from ..data import formats, sources
from ..data.order import Order, Window
from ..data.storage import StrPath
from ..decoding import refused
from ..mixing import Mixing, Mode
from ..progress import bar
from . import pipelines
from .feed import Faults, Feed
from .pipelines import EraseMode, EvalTransform, TrainTransform
from .plan import Plan, unpack

_FORMAT = "lumix_dali.loader/3"
_NAMED = re.compile(r"Failed to decode sample #(\d+)")
_INHERITED: list[Any] = []  # pipelines that a forked child must not free
Shuffle = Literal["auto", "global", "window"]
OnBadSample = Literal["replace", "raise"]


@dataclass(frozen=True)
class Execution:
    """How the work is done; this does not change the batches.

    Args:
        num_threads: DALI's CPU threads; None: this process's CPUs, divided by LOCAL_WORLD_SIZE.
        prefetch_queue_depth: batches that DALI prepares ahead.
        decoder: further arguments of DALI's decoder (`hw_decoder_load`, `preallocate_width_hint`, ...).
        reader: local files only: further arguments of ``fn.io.file.read``.
    """

    num_threads: int | None = None
    prefetch_queue_depth: int = 2
    decoder: Mapping[str, Any] | None = None
    reader: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        threads = _default_threads() if self.num_threads is None else self.num_threads
        object.__setattr__(self, "num_threads", checks.whole("num_threads", threads, 1))
        depth = checks.whole("prefetch_queue_depth", self.prefetch_queue_depth, 1)
        object.__setattr__(self, "prefetch_queue_depth", depth)


def create_loader(
    source: Any,
    *,
    batch_size: int,
    is_training: bool = True,
    device: str | torch.device = "auto",
    # mixing (training)
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    cutmix_minmax: Sequence[float] | None = None,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: Mode = "elem",
    correct_lam: bool = True,
    # the images
    input_size: int | Sequence[int] = 224,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    auto_augment: str | None = None,
    color_jitter: float | Sequence[float] | None = None,
    color_jitter_prob: float = 1.0,
    grayscale_prob: float = 0.0,
    re_prob: float = 0.0,
    re_mode: EraseMode = "pixel",
    re_count: int = 1,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    mean: Sequence[float] = pipelines.IMAGENET_MEAN,
    std: Sequence[float] = pipelines.IMAGENET_STD,
    dtype: pipelines.DType = "float32",
    channels_last: bool = False,
    return_index: bool = False,
    # the order
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    shuffle: Shuffle = "auto",
    window: int = 4096,
    num_aug_repeats: int = 0,
    # execution
    num_threads: int | None = None,
    prefetch_queue_depth: int = 2,
    decoder: Mapping[str, Any] | None = None,
    reader: Mapping[str, Any] | None = None,
    # bad samples, and remote shards
    on_bad_sample: OnBadSample = "replace",
    max_bad: int = 100,
    max_pixels: int = formats.MAX_PIXELS,
    cache_dir: StrPath | None = None,
    cache_bytes: int = 50 * 2**30,
) -> Loader:
    """Creates a PyTorch loader whose decoding, augmentation and mixing (LUMix Eq. 1) run in DALI.

    It accepts the result of ``timm.data.resolve_data_config`` as keyword arguments.

    Args:
        source: what `data.sources.load` takes: a class folder, a list file, a manifest, shards, pairs, any
            map-style data set of encoded images, or a `data.sources.Source`.
        batch_size: samples per batch, on each rank.
        is_training: True: shuffle, random crop, flip and mix, with equally many batches on all ranks. False: resize and
            centre crop in order, with every sample on exactly one rank.
        device: where the pipeline runs and delivers: "cpu", "cuda", "cuda:N", or "auto", a GPU if there is one.
        mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, mode, correct_lam: see `Mixing`; with both
            alphas 0 nothing is mixed, and targets have kind 0.
        input_size: size of the delivered images in pixels: one side length, (H, W) or (3, H, W).
        scale, ratio, hflip, auto_augment, color_jitter, color_jitter_prob, grayscale_prob, re_prob, re_mode,
            re_count: training only, see `TrainTransform`.
        interpolation: "bicubic" or "bilinear"; for training also "random", one of the two for each sample.
        crop_pct, crop_mode: evaluation only, see `EvalTransform`.
        mean, std, dtype, channels_last: see `pipelines.Output`.
        return_index: yield (images, target, index), where index holds the samples' numbers in the source, int64 [B].
        seed: of the order and the draws, < 2**32; with the same seed, ranks still draw differently.
        rank, world_size: this process's part of each epoch.
        drop_last: training only: leave out the incomplete last batch. False: keep it, and even out the ranks by
            repeating fewer samples than there are ranks.
        shuffle: training only: "global": one permutation of all samples per epoch; "window", for shards: shards in a
            new order, with their samples shuffled within `window` places; "auto": "window" for remote shards, else
            "global".
        window: places within which samples of shards are shuffled.
        num_aug_repeats: repeated augmentation, see `Order`; 0: off.
        num_threads, prefetch_queue_depth, decoder, reader: see `Execution`.
        on_bad_sample: what to do with a sample that neither DALI nor Pillow can decode: "replace" it by the next good
            one and warn with its name, or "raise".
        max_bad: maximum number of replaced samples; the next bad one raises an error.
        max_pixels: an image whose header claims more pixels is bad; no memory is allocated for it.
        cache_dir, cache_bytes: folder and size limit of the copies of remote shards.

    Returns:
        A `Loader`.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and a remedy.
        ImportError: DALI is not installed.
    """
    with_mixing = bool(mixup_alpha or cutmix_alpha or cutmix_minmax is not None)
    if with_mixing and not is_training:
        raise ValueError("is_training=False: evaluation mixes nothing; leave mixup_alpha and cutmix_alpha at 0")
    mixing = Mixing(
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha if with_mixing else 1.0,
        cutmix_minmax=cast(Any, cutmix_minmax),
        prob=prob,
        switch_prob=switch_prob,
        mode=mode,
        correct_lam=correct_lam,
    )
    train = TrainTransform(
        size=cast(Any, input_size),
        mean=cast(Any, mean),
        std=cast(Any, std),
        dtype=dtype,
        channels_last=channels_last,
        scale=cast(Any, scale),
        ratio=cast(Any, ratio),
        hflip=hflip,
        interpolation=cast(Any, interpolation),
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        color_jitter_prob=color_jitter_prob,
        grayscale_prob=grayscale_prob,
        re_prob=re_prob,
        re_mode=re_mode,
        re_count=re_count,
    )
    transform: TrainTransform | EvalTransform = train
    if not is_training:
        _refuse_augmentation(train, num_aug_repeats)
        transform = EvalTransform(
            size=train.size,
            mean=train.mean,
            std=train.std,
            dtype=dtype,
            channels_last=channels_last,
            crop_pct=crop_pct,
            crop_mode=cast(Any, crop_mode),
            interpolation=cast(Any, interpolation),
        )
    samples = sources.load(source, cache_dir=cache_dir, cache_bytes=cache_bytes, progress=bar("shard", "indexing"))
    order = _order(
        samples,
        checks.one_of("shuffle", shuffle, get_args(Shuffle)),
        checks.whole("window", window, 1),
        n=len(samples),
        batch_size=checks.whole("batch_size", batch_size, 1),
        shuffle=is_training,
        drop_last=is_training and drop_last,
        seed=checks.whole("seed", seed, 0, 2**32),
        rank=checks.whole("rank", rank, 0),
        world_size=checks.whole("world_size", world_size, 1),
        repeats=checks.whole("num_aug_repeats", num_aug_repeats, 0),
    )
    max_bad = checks.whole("max_bad", max_bad, 0)
    replaces = checks.one_of("on_bad_sample", on_bad_sample, get_args(OnBadSample)) == "replace"
    return Loader(
        samples,
        order,
        transform,
        mixing if with_mixing else None,
        Execution(num_threads, prefetch_queue_depth, decoder, reader),
        device=device,
        max_bad=max_bad if replaces else 0,
        max_pixels=max_pixels,
        return_index=return_index,
    )


def _refuse_augmentation(transform: TrainTransform, repeats: int) -> None:
    given = [name for name in ("auto_augment", "color_jitter", "grayscale_prob", "re_prob") if getattr(transform, name)]
    given += ["num_aug_repeats"] * bool(repeats)
    if given:
        raise ValueError(f"is_training=False: evaluation augments nothing; leave out {', '.join(given)}")


def _order(samples: sources.Source, how: Shuffle, window: int, **options: Any) -> Order:
    """One permutation, or a window for storage with slow random access."""
    counts = getattr(samples, "counts", None)
    if how == "window" and counts is None:
        raise ValueError("shuffle='window': only shards have neighbours; give 'global'")
    if counts is not None and (how == "window" or (how == "auto" and getattr(samples, "remote", False))):
        return Window(**options, counts=tuple(counts.tolist()), window=window)
    return Order(**options)


class Loader:
    """Batches of a source, on `device`; iterate over it once per epoch.

    Training yields ``(images, MixTarget)``, evaluation ``(images, labels)``; with `return_index` the samples' numbers
    follow. Each ``iter()`` starts the next whole epoch, even after a ``break``; only the first one after
    `load_state_dict` resumes where the state was taken.

    Args:
        samples: source of images and labels.
        order: the order in which they are read; ``order.shuffle`` tells whether this is training.
        transform: applied to the images: a `TrainTransform` in training, otherwise an `EvalTransform`.
        mixing: how they are mixed in training; None: not at all.
        execution: how the work is done.
        device: "cpu", "cuda", "cuda:N", or "auto", a GPU if there is one.
        max_bad: maximum number of unusable samples that are replaced.
        max_pixels: an image whose header claims more pixels is bad.
        return_index: also yield the samples' numbers.

    Attributes:
        samples, dataset: the `Source`.
        classes, num_classes: the class names and their number; None if the source does not tell.
        batch_size: samples per batch on this rank.
        device: torch.device of the batches.
        sampler: the loader itself, because timm's train.py and Lightning call `set_epoch` on it.
        mixup_enabled: timm's switch; takes effect at the next ``iter()`` and does not change the order.
        input_size: (H, W) of the images; assigning it takes effect at the next ``iter()``.
        bad: {name: reason} of unusable samples that were replaced.
    """

    batch_sampler = None  # as in a DataLoader without batching of its own: timm then uses `sampler`

    def __init__(
        self,
        samples: sources.Source,
        order: Order,
        transform: TrainTransform | EvalTransform,
        mixing: Mixing | None = None,
        execution: Execution | None = None,
        *,
        device: str | torch.device = "auto",
        max_bad: int = 100,
        max_pixels: int = formats.MAX_PIXELS,
        return_index: bool = False,
    ) -> None:
        self.samples = self.dataset = samples
        self.classes = samples.classes
        self.num_classes = None if samples.classes is None else len(samples.classes)
        self.batch_size, self.device = order.batch_size, _device(device)
        self.mixup_enabled, self.return_index = True, return_index
        self._order, self._transform, self._mixing = order, transform, mixing
        self._options = dataclasses.asdict(order) | dataclasses.asdict(transform)
        self._options |= dataclasses.asdict(mixing) if mixing else {}
        self._execution = execution or Execution()
        self._faults = Faults(samples, max_bad, checks.whole("max_pixels", max_pixels, 1))
        self._next = _Place(0, 0)
        self._place: _Place | None = None  # after the last batch handed out
        # Weak reference: leaving the loop frees the iterator and its pipeline.
        self._current: Callable[[], _Epoch | None] = lambda: None
        self._ahead: _Epoch | None = None
        self._closed = False
        self._pid = os.getpid()

    @property
    def sampler(self) -> Loader:
        """The loader itself, for `set_epoch`."""
        return self  # an attribute would be a reference cycle, so that only gc could free the loader

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of the images in pixels; assigning it takes effect at the next ``iter()``."""
        return self._transform.size

    @input_size.setter
    def input_size(self, size: int | Sequence[int]) -> None:
        self._transform = dataclasses.replace(self._transform, size=cast(Any, size))

    @property
    def bad(self) -> dict[str, str]:
        """{name: reason} of unusable samples that were replaced."""
        return {found.name: found.reason for found in self._faults.bad.values()}

    def __len__(self) -> int:
        """Number of batches per epoch on this rank."""
        return len(self._order)

    def __repr__(self) -> str:
        kind = "training" if self._order.shuffle else "evaluation"
        return f"Loader({self.samples!r}, {kind}, {len(self)} batches of {self.batch_size} on {self.device})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("loader: it has threads and a pipeline, so it cannot be copied or pickled; create another")

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one."""
        return self._now.epoch

    @property
    def iteration(self) -> int:
        """Number of batches that this epoch has delivered."""
        return self._now.iteration

    @property
    def _now(self) -> _Place:
        return self._next if self._place is None or self._place.iteration == len(self) else self._place

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Starts the next epoch; one still under way is abandoned."""
        if self._closed:
            raise ValueError("loader: it is closed; create a new one with create_loader")
        self._check_process()
        self._drop(self._current())
        place = self._resolved(self._next)
        epoch, self._ahead = self._ahead, None
        if epoch is None or epoch.place != place:
            self._drop(epoch)
            epoch = _Epoch(self, place)
        self._next = _Place(place.epoch + 1, 0)
        self._place = place
        epoch.begin(self)
        self._current = weakref.ref(epoch)
        return epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the next epoch, as in DistributedSampler; without it, epochs count up from 0."""
        if checks.whole("epoch", epoch, 0, 2**31) != self._next.epoch:
            self._next = _Place(epoch, 0)
        self._place = None

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader: after the last delivered batch.

        Returns:
            A dict of plain values for ``torch.save``; after `load_state_dict` the stream continues bit for bit.
        """
        state = dict(
            format=_FORMAT,
            place=tuple(self._now),
            mixup_enabled=self.mixup_enabled,
            input_size=self.input_size,
            bad={index: tuple(found) for index, found in self._faults.bad.items()},
            refused=sorted(self._faults.refused),
            fingerprint=self._fingerprint(),
        )
        return state | dict(checksum=_checksum(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next ``iter()`` resume where `state` was taken.

        Args:
            state: from `state_dict` of a loader with the same data, batch size, ranks, seed and graph.

        Raises:
            ValueError: the state is damaged, has another format, or belongs to another loader; the message says how
                that one differs.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            found = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: its format is {found!r}, but this version reads {_FORMAT!r}; start a fresh run")
        if _checksum({key: value for key, value in state.items() if key != "checksum"}) != state.get("checksum"):
            raise ValueError("state: it is damaged (its checksum does not match); use an earlier checkpoint")
        here, there = self._fingerprint(), state["fingerprint"]
        if different := [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]:
            listed = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
            raise ValueError(
                f"state: it belongs to another loader: {listed}. Create the loader as it was, or start a fresh run"
            )
        self._stop()
        self._place = None
        self._next, self.mixup_enabled = _Place(*state["place"]), state["mixup_enabled"]
        self.input_size = state["input_size"]
        self._faults.restore(state["bad"], state["refused"])

    def close(self) -> None:
        """Frees the pipeline; the loader cannot be iterated afterwards."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:  # DALI's threads exist only in the parent: waiting for them would never end
            raise RuntimeError("loader: it was inherited by fork; create a separate loader in each process")

    def _stop(self) -> None:
        self._drop(self._current())
        self._drop(self._ahead)
        self._ahead = None

    @staticmethod
    def _drop(epoch: _Epoch | None) -> None:
        if epoch is not None:
            epoch.close()

    def _resolved(self, place: _Place) -> _Place:
        """A place with the settings of an epoch that starts there now; a place from a state has its own."""
        if place.mixed is not None:
            return place
        return place._replace(mixed=self.mixup_enabled, size=self.input_size)

    def _prepare_next(self) -> None:
        """Builds the pipeline of the next epoch and lets it decode its first batches."""
        if self._order.shuffle:
            ahead = _Epoch(self, self._resolved(self._next))
            try:
                ahead.start()
            except (ValueError, RuntimeError):  # raised again when that epoch begins
                ahead.close()
            else:
                self._ahead = ahead

    def _fingerprint(self) -> dict[str, Any]:
        return self._options | dict(
            decoder=repr(self._execution.decoder),
            max_pixels=self._faults.max_pixels,
            data=self.samples.digest,
            device=self.device.type,
            dali=dali.__version__,
        )

    def _give_to_pillow(self, indices: np.ndarray, error: RuntimeError) -> bool:
        """Finds the samples that DALI refuses and assigns them to Pillow; False: there are none."""
        faults, read = self._faults, self._faults.usable(indices.tolist())
        if named := _NAMED.search(str(error)):
            faults.refuse([read[int(named[1])]])
            return True
        encoded, lost = faults.dali_reads(read)
        found: Collection[int] = refused(encoded, _device_id(self.device), self._threads)
        if not found and not lost and "fn.decoders" in str(error):
            found = encoded  # the fault shows only in the regions of this batch, so any of them may have it
        faults.refuse(list(found))
        return bool(found or lost)

    @property
    def _threads(self) -> int:
        return cast(int, self._execution.num_threads)


class _Place(NamedTuple):
    """A place in the stream, and what restores a pipeline there."""

    epoch: int
    iteration: int
    checkpoint: bytes | None = None
    mixed: bool | None = None  # None: from `mixup_enabled` and `input_size` when the epoch starts
    size: tuple[int, int] | None = None


class _Epoch(Iterator[tuple[Any, ...]]):
    """An epoch under way: a pipeline, and the place after the last delivered batch."""

    _pipe: Any = None  # None when closed

    def __init__(self, loader: Loader, place: _Place) -> None:
        self.place = place
        self._loader: Loader | None = (
            None  # set by `begin`: before, the loader refers to the epoch, not the epoch to the loader
        )
        self._pid, self._scheduled = loader._pid, False
        self._indices = loader._order.epoch(place.epoch)
        self._build(loader)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("loader: an epoch under way cannot be copied or pickled")

    def start(self) -> None:
        """Lets the pipeline decode ahead of need."""
        self._pipe.schedule_run()
        self._scheduled = True

    def begin(self, loader: Loader) -> None:
        """Makes this the epoch under way."""
        self._loader = loader

    def __next__(self) -> tuple[Any, ...]:
        loader = cast(Loader, self._loader)
        loader._check_process()
        if self.place.iteration == len(loader):
            self.close()
            raise StopIteration
        if self._pipe is None:
            raise RuntimeError(
                "loader: this iteration was abandoned, because the loader was iterated again, loaded a state, or was "
                "closed; create one loader for each loop that runs at the same time"
            )
        with _range(loader.device):
            batch = self._batch(loader)
        # As late as possible without emptying the queue, so that DALI holds little of two epochs at once.
        if len(loader) - self.place.iteration == min(loader._execution.prefetch_queue_depth, len(loader) - 1):
            loader._prepare_next()
        return batch

    def _batch(self, loader: Loader) -> tuple[Any, ...]:
        training = loader._order.shuffle
        try:
            images, *outputs = (from_dlpack(output.as_tensor()) for output in self._run(loader))
        finally:
            for message in loader._faults.news():
                warnings.warn(message, stacklevel=3)
        # Every time (.2 ms): a checkpoint taken after an error would already be past the batch that failed.
        self.place = self.place._replace(iteration=self.place.iteration + 1, checkpoint=self._pipe.checkpoint())
        loader._place = self.place
        if loader._transform.channels_last:
            images = images.permute(0, 3, 1, 2)  # NCHW to torch, channels-last in memory
        target, index = unpack(outputs, training)
        return (images, target, index) if loader.return_index else (images, target)

    def close(self, wait: bool = True) -> None:
        """Frees the pipeline and its threads; `wait` as in `Feed.close`."""
        if self._pipe is None:
            return
        if os.getpid() != self._pid:
            _INHERITED.append(
                (self._pipe, self._feed)
            )  # their threads exist only in the parent: ending them would hang
            self._pipe = None
        else:
            self._pipe = None
            self._feed.close(wait)

    def __del__(self) -> None:  # leaving a loop drops its iterator
        # Garbage may be collected in any thread, even one that holds a lock for which the reads wait.
        self.close(wait=False)

    def _run(self, loader: Loader) -> Sequence[Any]:
        stream = torch.cuda.current_stream(loader.device) if loader.device.type == "cuda" else None
        while True:
            try:
                if not self._scheduled:
                    self._pipe.schedule_run()
                self._scheduled = False
                outputs: Sequence[Any] = self._pipe.outputs(stream)
                return outputs
            except RuntimeError as error:
                size = loader.batch_size
                if not loader._give_to_pillow(self._indices[self.place.iteration * size :][:size], error):
                    raise
                self._build(loader)

    def _build(self, loader: Loader) -> None:
        """Builds the pipeline of this epoch, restored to `place`."""
        order, place, execution = loader._order, self.place, loader._execution
        self.close()
        self._scheduled = False
        mixing = loader._mixing if place.mixed else None
        transform = dataclasses.replace(loader._transform, size=cast(Any, place.size))
        plan = Plan(order.seed, place.epoch, order.rank, transform.size, mixing, order.shuffle)
        # Not the seed of the order: the draws must differ by rank, the order must not.
        (seed,) = np.random.SeedSequence([order.seed, place.epoch, order.rank]).generate_state(1)
        self._feed = Feed(
            loader._faults, self._indices, order.batch_size, plan, loader._threads, execution.prefetch_queue_depth
        )
        define = pipelines.train_pipeline if order.shuffle else pipelines.val_pipeline
        self._pipe = define(
            self._feed,
            transform,
            decoder=execution.decoder,
            reader=execution.reader,
            batch_size=order.batch_size,
            num_threads=loader._threads,
            prefetch_queue_depth=execution.prefetch_queue_depth,
            device_id=_device_id(loader.device),
            seed=int(seed) & 0x7FFFFFFF,
            checkpoint=place.checkpoint,
        )


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


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(state.items(), key=repr)).encode()).hexdigest()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: give 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if wanted.type == "cpu":
        return wanted
    if wanted.type != "cuda" or (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: PyTorch sees {torch.cuda.device_count()} GPU(s) here; give 'cpu' or 'auto'"
        )
    return wanted if wanted.index is not None else torch.device("cuda", torch.cuda.current_device())


def _device_id(device: torch.device) -> int | None:
    return device.index if device.type == "cuda" else None


def _default_threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
