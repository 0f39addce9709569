"""`create_loader`: DALI's pipelines as a PyTorch loader.

    create_loader     options, a `Source`, an `Order` -> `Loader`
    Loader.__iter__   an `Epoch`: its pipeline, and a `Feed` that the pipeline calls for each batch
    Feed              samples that can be decoded (`Faults`), and what is mixed: `Plan.batch` -> `mixing.draw`
    the graph         `pipelines.train_pipeline`: decode, resize, augment, mix (`fn.lay`, `fn.lam0`), normalise
    Epoch.__next__    the pipeline's outputs as tensors, `plan.unpack` -> (images, `MixTarget`)

Every epoch has its own pipeline, whose order, plans and draws are a pure function of (seed, epoch, rank). The next
pipeline is built, and starts to decode, while the last batches of the current one are consumed. An abandoned epoch, a
switch of mixing, a bad sample and a resume all do the same: they build a pipeline at a given position. Batches leave
DALI through DLPack, without a copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, get_args

import torch

try:
    import nvidia.dali as dali
except ImportError as error:
    raise ImportError(
        "NVIDIA DALI is not installed: pip install 'lumix-dali[cuda12]' or 'lumix-dali[cuda13]', never both"
    ) from error

from .. import checks
from ..augment import EraseMode
from ..data import formats, sources
from ..data.order import Order, Window
from ..data.protocol import Source
from ..data.shards import CACHE_BYTES
from ..data.storage import StrPath
from ..decoding import decodes_regions
from ..mixing import Mixing, Mode
from ..progress import bar
from . import pipelines, resize
from .epoch import Ahead, Epoch, Position, Spec, check_process
from .execution import Execution
from .faults import Faults
from .pipelines import CropMode, EvalTransform, TrainTransform
from .resize import TrainInterpolation

_FORMAT = "lumix_dali.loader/5"
EARLY = 8  # batches before the end of an epoch at which the next one is prepared
Shuffle = Literal["auto", "global", "window"]


# What timm's create_loader and its train.py call these arguments, and some others.
_HINTS = {
    "aa": "auto_augment",
    "batch_size_per_gpu": "batch_size",
    "cutmix": "cutmix_alpha",
    "distributed": "rank and world_size",
    "epoch_repeats": "num_aug_repeats",
    "fp16": "dtype='float16'",
    "img_dtype": "dtype",
    "img_size": "input_size",
    "mixup": "mixup_alpha",
    "mixup_mode": "mode",
    "mixup_prob": "prob",
    "mixup_switch_prob": "switch_prob",
    "num_classes": "classes, the class names; their number is loader.num_classes",
    "num_workers": "num_threads",
    "recount": "re_count",
    "remode": "re_mode",
    "reprob": "re_prob",
    "shuffle_buffer": "window",
    "smoothing": "LUMixLoss(smoothing=...)",
    "label_smoothing": "LUMixLoss(smoothing=...)",
    "split": "the split's folder as source",
    "train_interpolation": "interpolation",
    "workers": "num_threads",
}
_NOT_NEEDED = ("collate_fn", "pin_mem", "pin_memory", "persistent_workers", "prefetcher", "use_prefetcher")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _with_hints(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Names this function's word for an unknown keyword."""
    known = signature(function).parameters

    @wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) > 1:
            raise TypeError("create_loader: give all but the source by name, as in batch_size=64, input_size=224")
        for name in kwargs:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "see help(create_loader)"
                hint = f"give {_HINTS[name]}" if name in _HINTS else hint
                hint = "leave it out: DALI needs nothing like it" if name in _NOT_NEEDED else hint
                raise TypeError(f"create_loader: unknown argument {name}=; {hint}")
        return function(*args, **kwargs)

    return checked


@_with_hints
def create_loader(
    source: Any,
    *,
    batch_size: int,
    classes: Sequence[str] | None = None,
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
    interpolation: TrainInterpolation = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: CropMode = "center",
    mean: Sequence[float] = pipelines.IMAGENET_MEAN,
    std: Sequence[float] = pipelines.IMAGENET_STD,
    dtype: pipelines.DType = "float32",
    channels_last: bool = False,
    return_index: bool = False,
    # the order
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    drop_last: bool = True,
    shuffle: Shuffle = "auto",
    window: int = 4096,
    num_aug_repeats: int = 0,
    # execution
    num_threads: int | None = None,
    prefetch_queue_depth: int = 2,
    decoder: Mapping[str, Any] | None = None,
    reader: Mapping[str, Any] | None = None,
    decode_regions: bool | None = None,
    # bad samples, and remote shards
    max_bad: int = 100,
    max_pixels: int = formats.MAX_PIXELS,
    cache_dir: StrPath | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Loader:
    """Creates a PyTorch loader whose decoding, augmentation and mixing (LUMix Eq. 1) run in DALI.

    It accepts the result of ``timm.data.resolve_data_config`` as keyword arguments.

    Args:
        source: what `data.sources.load` takes: a class folder, a list file, a manifest, shards, pairs, any
            map-style data set of encoded images, or a `data.sources.Source`.
        batch_size: samples per batch, on each rank.
        classes: K class names, in the order of their labels, normally the training loader's `classes`; a class of the
            source that is not among them is an error. None: those of the source.
        is_training: True: shuffle, random crop, flip and mix, with equally many batches on all ranks. False: resize and
            centre crop in order, with every sample on exactly one rank; the label of one that cannot be used is -100.
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
        rank, world_size: this process's part of each epoch; None: 0 of 1, with a warning where WORLD_SIZE says that
            there are more.
        drop_last: training only: leave out the incomplete last batch. False: keep it, and even out the ranks by
            repeating fewer samples than there are ranks.
        shuffle: training only: "global": one permutation of all samples per epoch; "window", for shards: shards in a
            new order, with their samples shuffled within `window` places; "auto": "window" for remote shards, else
            "global".
        window: places within which samples of shards are shuffled.
        num_aug_repeats: repeated augmentation, see `Order`; 0: off.
        num_threads, prefetch_queue_depth, decoder, reader, decode_regions: see `Execution`.
        max_bad: how many samples that neither DALI nor Pillow can decode are replaced by the next good one, with a
            warning that names them; one more is an error. 0: the first is.
        max_pixels: an image whose header claims more pixels is bad; no memory is allocated for it.
        cache_dir, cache_bytes: folder and size limit of the copies of remote shards.

    Returns:
        A `Loader`.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and a remedy.
        TypeError: an argument is unknown; the message names the one that does what timm's of that name does.
        ImportError: DALI is not installed.
    """
    checks.flag("is_training", is_training)
    with_mixing = bool(mixup_alpha or cutmix_alpha or cutmix_minmax is not None)
    if with_mixing and not is_training:
        raise ValueError("is_training=False: evaluation mixes nothing; leave mixup_alpha and cutmix_alpha at 0")
    mixing = Mixing(  # also checks the options of a loader that does not mix
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha if with_mixing else 1.0,
        cutmix_minmax=cutmix_minmax,
        prob=prob,
        switch_prob=switch_prob,
        mode=mode,
        correct_lam=correct_lam,
    )
    train = TrainTransform(
        size=checks.image_size("input_size", input_size),
        mean=mean,
        std=std,
        dtype=dtype,
        channels_last=channels_last,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        interpolation=interpolation,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        color_jitter_prob=color_jitter_prob,
        grayscale_prob=grayscale_prob,
        re_prob=re_prob,
        re_mode=re_mode,
        re_count=re_count,
    )
    rank, world_size = _ranks(rank, world_size)
    samples = sources.load(
        source, classes=classes, cache_dir=cache_dir, cache_bytes=cache_bytes, progress=bar("shard", "indexing")
    )
    if is_training and samples.classes is not None and not len(samples.classes):
        raise ValueError(f"source={str(source)[:80]!r}: training needs labels; lay images out as ROOT/CLASS/IMAGE.jpg")
    order = _order(
        samples,
        checks.one_of("shuffle", shuffle, get_args(Shuffle)),
        window,
        batch_size=batch_size,
        shuffle=is_training,
        drop_last=is_training and checks.flag("drop_last", drop_last),
        seed=seed,
        rank=rank,
        world_size=world_size,
        repeats=num_aug_repeats,
    )
    return Loader(
        samples,
        order,
        train if is_training else _evaluation(train, num_aug_repeats, crop_pct, crop_mode),
        mixing if with_mixing else None,
        Execution(num_threads, prefetch_queue_depth, decoder, reader, decode_regions),
        device=device,
        max_bad=max_bad,
        max_pixels=max_pixels,
        return_index=return_index,
    )


_FIXED = signature(create_loader).parameters.keys() - {"input_size"} | {"dataset", "samples"}


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    told = os.environ.get("WORLD_SIZE", "1")
    if world_size is None and told.isdecimal() and int(told) > 1:
        warnings.warn(
            f"WORLD_SIZE={told}, but world_size was not given: every rank gets all samples; give rank and world_size, "
            "or world_size=1 if that is meant",
            stacklevel=4,
        )
    return 0 if rank is None else rank, 1 if world_size is None else world_size


def _evaluation(train: TrainTransform, repeats: int, crop_pct: float, crop_mode: CropMode) -> EvalTransform:
    given = [name for name in ("auto_augment", "color_jitter", "grayscale_prob", "re_prob") if getattr(train, name)]
    given += ["num_aug_repeats"] * bool(repeats)
    if given:
        raise ValueError(f"is_training=False: evaluation augments nothing; leave out {', '.join(given)}")
    if train.interpolation == "random":
        raise checks.error("interpolation", "random", "evaluation draws nothing; give 'bilinear' or 'bicubic'")
    return EvalTransform(
        size=train.size,
        mean=train.mean,
        std=train.std,
        dtype=train.dtype,
        channels_last=train.channels_last,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=train.interpolation,
    )


def _order(samples: Source, how: Shuffle, window: int, **options: Any) -> Order:
    """One permutation, or a window for storage with slow random access."""
    counts = samples.counts
    if how == "window" and counts is None:
        raise ValueError("shuffle='window': only shards have neighbours; give 'global'")
    if counts is not None and (how == "window" or (how == "auto" and samples.remote)):
        return Window(len(samples), **options, counts=tuple(counts.tolist()), window=window)
    return Order(len(samples), **options)


class Loader:
    """Batches of a source, on `device`; iterate over it once per epoch.

    Training yields ``(images, MixTarget)``, evaluation ``(images, labels)``; with `return_index` the samples' numbers
    follow. Each ``iter()`` starts the next whole epoch, even after a ``break``; only the first one after
    `load_state_dict` resumes where the state was taken.

    Args:
        samples: source of images and labels.
        order: the order in which they are read; it shuffles in training only.
        transform: applied to the images: a `TrainTransform` in training, otherwise an `EvalTransform`.
        mixing: how they are mixed in training; None: not at all.
        execution: how the work is done.
        device: "cpu", "cuda", "cuda:N", or "auto", a GPU if there is one.
        max_bad: maximum number of unusable samples that are replaced.
        max_pixels: an image whose header claims more pixels is bad.
        return_index: also yield the samples' numbers.

    Attributes:
        samples, dataset: the `Source`.
        classes: K class names; None if the source does not tell.
        num_classes: K; an AttributeError if the source does not tell.
        batch_size: samples per batch on this rank.
        device: torch.device of the batches.
        sampler: the loader itself, because timm's train.py and Lightning call `set_epoch` on it.
        mixup_enabled: timm's switch; takes effect at the next ``iter()`` and does not change the order.
        input_size: (H, W) of the images; assigning it takes effect at the next ``iter()``. An epoch that a state
            resumes ends as it began.
        bad: {name: reason} of unusable samples that were replaced.
    """

    batch_sampler = None  # as in a DataLoader without batching of its own: timm then uses `sampler`

    def __init__(
        self,
        samples: Source,
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
        self.batch_size, self.device = order.batch_size, _device(device)
        self.mixup_enabled, self.return_index = True, checks.flag("return_index", return_index)
        self._order, self._transform, self._mixing = order, transform, mixing
        own = dict(size="input_size", repeats="num_aug_repeats")  # names of our arguments
        options = dataclasses.asdict(order) | dataclasses.asdict(transform)
        self._options = {own.get(name, name): value for name, value in options.items()}
        self._options |= dataclasses.asdict(mixing) if mixing else {}
        self._execution = execution or Execution()
        self._execution.check_source(samples)
        max_bad, max_pixels = checks.whole("max_bad", max_bad, 0), checks.whole("max_pixels", max_pixels, 1)
        self._faults = Faults(samples, max_bad, max_pixels)
        self._next = Position(0, 0)  # where the next iter() starts
        self._position: Position | None = None  # after the last delivered batch; None: `_next`
        # Weak reference: leaving the loop frees the iterator and its pipeline.
        self._current: Callable[[], Epoch | None] = lambda: None
        self._ahead: Ahead | None = None
        self._closed = False
        self._pid = os.getpid()  # last, see __setattr__

    @property
    def num_classes(self) -> int:
        """K."""
        if self.classes is None:  # None would be a thousand classes to timm.create_model
            raise AttributeError(
                f"num_classes: {self.samples!r} has no class names; give classes=[...] to create_loader"
            )
        return len(self.classes)

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
        self._transform = dataclasses.replace(self._transform, size=checks.image_size("input_size", size))

    @property
    def mixup_enabled(self) -> bool:
        """timm's switch; assigning it takes effect at the next ``iter()``."""
        return self._mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, on: bool) -> None:
        self._mixup_enabled = checks.flag("mixup_enabled", on)

    @property
    def bad(self) -> dict[str, str]:
        """{name: reason} of unusable samples that were replaced."""
        return {replaced.name: replaced.reason for replaced in self._faults.bad.values()}

    def __len__(self) -> int:
        """Number of batches per epoch on this rank."""
        return len(self._order)

    def __repr__(self) -> str:
        kind = "training" if self._spec.is_training else "evaluation"
        return f"Loader({self.samples!r}, {kind}, {len(self)} batches of {self.batch_size} on {self.device})"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and hasattr(self, "_pid"):
            raise AttributeError(
                f"loader.{name}: it is fixed when a loader is created, so this would change nothing; create another "
                "loader, or assign mixup_enabled or input_size"
            )
        super().__setattr__(name, value)

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
    def _now(self) -> Position:
        position = self._position
        return self._next if position is None or position.iteration == len(self) else position

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Starts the next epoch; one still under way is abandoned. It counts from its first batch on."""
        if self._closed:
            raise ValueError("loader: it is closed; create a new one with create_loader")
        check_process(self._pid)
        if (current := self._current()) is not None:
            current.close()
        epoch = self._take_ahead() or Epoch(self._spec, self._start, self._faults)
        epoch.report_to(self._delivered)
        self._current = weakref.ref(epoch)
        return epoch

    def _delivered(self, position: Position) -> None:
        """The only place where the position moves by itself: a batch was delivered."""
        if self._position is None or self._position.epoch != position.epoch or position.iteration == 1:
            self._next = Position(position.epoch + 1, 0)
        self._position = position
        # Early enough that a thread builds it before it is needed, late enough that DALI holds little of two epochs.
        early = min(max(self._execution.prefetch_queue_depth, EARLY), len(self) - 1)
        if self._ahead is None and len(self) - position.iteration <= early and self._spec.is_training:
            self._ahead = Ahead(self._spec, self._start, self._faults)

    def _take_ahead(self) -> Epoch | None:
        """The epoch that was prepared, if it is the next one and no fault was found since."""
        ahead, self._ahead = self._ahead, None
        epoch = ahead and ahead.take()
        if not epoch:
            return None
        if (epoch.position, epoch.spec, epoch.version) == (self._start, self._spec, self._faults.version):
            return epoch
        epoch.close()
        return None

    @property
    def _start(self) -> Position:
        """Where the next epoch starts, with the settings of now; a position from a state has its own."""
        if self._next.mixed is not None:
            return self._next
        return self._next._replace(mixed=self.mixup_enabled, size=self.input_size)

    @property
    def _spec(self) -> Spec:
        return Spec(self._order, self._transform, self._mixing, self._execution, self.device, self.return_index)

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the next epoch, as in DistributedSampler; without it, epochs count up from 0.

        An iterator from which nothing was taken follows: Lightning makes it before it sets the epoch.
        """
        if checks.whole("epoch", epoch, 0, 2**31) != self._next.epoch:
            self._next = Position(epoch, 0)
        self._position = None
        if (current := self._current()) is not None:
            current.move(self._start)

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader: after the last delivered batch.

        Returns:
            A dict of plain values for ``torch.save``; after `load_state_dict` the stream continues bit for bit.
        """
        state = dict(
            format=_FORMAT,
            position=tuple(self._now),
            mixup_enabled=self.mixup_enabled,
            input_size=self.input_size,
            bad={index: tuple(replaced) for index, replaced in self._faults.bad.items()},
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
        self._position = None
        self._next, self.mixup_enabled = Position(*state["position"]), state["mixup_enabled"]
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

    def _stop(self) -> None:
        if (current := self._current()) is not None:
            current.close()
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _fingerprint(self) -> dict[str, Any]:
        return self._options | dict(
            decoder=repr(self._execution.decoder),
            decode_regions=decodes_regions(self.device.type == "cuda", self._execution.decode_regions),
            max_pixels=self._faults.max_pixels,
            data=self.samples.digest,
            device=self.device.type,
            fast_resize=resize.has_fast_kernel(self.device.type),  # for any size, since a state restores its own
            dali=dali.__version__,
        )


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(state.items(), key=repr)).encode()).hexdigest()


def _device(device: str | torch.device) -> torch.device:
    if not isinstance(device, str | torch.device):
        raise checks.error("device", device, "give 'auto', 'cpu', 'cuda' or 'cuda:N'")
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
