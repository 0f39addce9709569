"""`create_loader`: DALI's pipelines as a PyTorch loader.

Every epoch runs a pipeline of its own, whose order and draws are a pure function of (seed, epoch, rank). Building
it takes some 30 ms; in return an abandoned epoch, a switch of mixing, a bad file and a resume are one thing:
build at a place. Batches leave DALI by DLPack, without a copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

try:
    import nvidia.dali as dali
except ImportError as error:
    raise ImportError(
        "NVIDIA DALI is not installed: pip install 'lumix-dali[cuda12]' or 'lumix-dali[cuda13]', never both"
    ) from error

from . import augment, classification, formats, shards, sources
from . import fn as mixfn
from .feed import Faults, Feed
from .target import MixTarget

_FORMAT = "lumix_dali.loader/2"
_NAMED = re.compile(r"Failed to decode sample #(\d+)")
_INHERITED: list[Any] = []  # what a forked child must not free


def create_loader(
    source: str | os.PathLike | Sequence[str | os.PathLike] | sources.Samples | shards.Shards,
    *,
    batch_size: int,
    input_size: int | Sequence[int] = 224,
    is_training: bool = True,
    device: str | torch.device = "auto",
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    cutmix_minmax: Sequence[float] | None = None,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "elem",
    correct_lam: bool = True,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    auto_augment: str | None = None,
    color_jitter: float | Sequence[float] | None = None,
    color_jitter_prob: float = 1.0,
    grayscale_prob: float = 0.0,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    num_aug_repeats: int = 0,
    interpolation: str = "bicubic",
    mean: Sequence[float] = classification.IMAGENET_MEAN,
    std: Sequence[float] = classification.IMAGENET_STD,
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    dtype: str = "float32",
    channels_last: bool = False,
    drop_last: bool = True,
    shuffle: str = "auto",
    initial_fill: int = 1024,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
    prefetch_queue_depth: int = 2,
    on_bad_sample: str = "replace",
    max_bad: int = 100,
    max_pixels: int = formats.MAX_PIXELS,
    decoder: dict[str, Any] | None = None,
    reader: dict[str, Any] | None = None,
) -> Loader:
    """A PyTorch loader over images whose decoding, augmentation and mixing (LUMix Eq. 1) run in DALI.

    Takes what ``timm.data.resolve_data_config`` returns as it is.

    Args:
        source: class folder (``root/class/image``), list file (``PATH LABEL`` a line), or `sources.Samples`; or
            TFRecord or WebDataset (image and .cls) shards with their index files: a folder, a glob or a list of
            paths. Each of them here or in S3 (``s3://bucket/prefix``).
        batch_size: samples a batch, on each rank.
        input_size: side, (H, W) or (3, H, W) of the images handed out, in pixels.
        is_training: True: shuffled, cropped at random, flipped, mixed, batches of equal number on all ranks.
            False: in order, resized, centre-cropped, every sample once over the ranks.
        device: where the pipeline runs and its batches are: "cpu", "cuda", "cuda:N", or "auto", a GPU if any.
        mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, mode, correct_lam: of `lumix_dali.fn.mix`;
            with both alphas 0 nothing is mixed, and targets have kind 0.
        scale, ratio: ranges of the training crop's share of the area, and of its width over height.
        hflip: probability of a horizontal flip.
        auto_augment, color_jitter, color_jitter_prob, grayscale_prob, re_prob, re_mode, re_count: training's
            augmentation before mixing, of `classification.train_pipeline`.
        num_aug_repeats: repeated augmentation, see `sources.Order`; 0: off.
        interpolation: "bicubic" or "bilinear"; for training also "random", one of them for each sample.
        mean, std: of the normalisation, in units of [0, 1].
        crop_pct, crop_mode: evaluation's crop, timm's meaning ("center" or "squash").
        dtype: "float32", "float16", or "uint8" (not normalised).
        channels_last: hand out NCHW tensors in channels-last memory format.
        drop_last: training only: leave out the incomplete last batch. False: keep it, and even out the ranks by
            repeating fewer samples than there are ranks. Shards are always without it.
        shuffle: training only: "global", one permutation of all samples an epoch, for folders and lists;
            "buffer", for shards: these in a new order in each epoch, and their samples shuffled within a window of
            `initial_fill`, so that they must be written in random order (``lumix-dali convert`` does); "auto":
            what the source can do.
        initial_fill: samples in the window, on each rank.
        seed: of order and draws; ranks draw differently from the same seed.
        rank, world_size: this process's part of each epoch.
        num_threads: DALI's CPU threads; None: this process's CPUs, divided by LOCAL_WORLD_SIZE.
        prefetch_queue_depth: batches that DALI prepares ahead.
        on_bad_sample: "replace" a sample that neither DALI nor Pillow can decode by the next good one, and warn
            with its name, or "raise".
        max_bad: how many samples are replaced before that is an error after all.
        max_pixels: an image whose header claims more is bad, before memory is taken for it.
        decoder: further arguments of DALI's decoder (`hw_decoder_load`, `preallocate_width_hint`, ...).
        reader: files only: further arguments of ``fn.io.file.read`` (`dont_use_mmap` on network storage).

    Returns:
        A `Loader`.

    Raises:
        ValueError: an argument that cannot work, named with its value and a remedy.
        ImportError: DALI is not installed.
    """
    with_mixing = bool(mixup_alpha or cutmix_alpha or cutmix_minmax is not None)
    if with_mixing and not is_training:
        raise ValueError("is_training=False: evaluation mixes nothing; leave mixup_alpha and cutmix_alpha at 0")
    mixfn.check(mixup_alpha, cutmix_alpha if with_mixing else 1.0, cutmix_minmax, prob, switch_prob, mode)
    mixing = dict(
        mixup_alpha=float(mixup_alpha),
        cutmix_alpha=float(cutmix_alpha),
        cutmix_minmax=None if cutmix_minmax is None else tuple(map(float, cutmix_minmax)),
        prob=float(prob),
        switch_prob=float(switch_prob),
        mode=mode,
        correct_lam=bool(correct_lam),
    )
    _check_int("batch_size", batch_size, 1)
    _check_int("prefetch_queue_depth", prefetch_queue_depth, 1)
    _check_int("seed", seed, 0)
    _check_int("rank", rank, 0)
    _check_int("world_size", world_size, 1)
    graph = dict(
        size=_size(input_size),
        interpolation=_one_of(
            "interpolation",
            interpolation,
            classification.TRAIN_INTERPOLATIONS if is_training else classification.INTERPOLATIONS,
        ),
        mean=_triple("mean", mean),
        std=_triple("std", std, positive=True),
        dtype=_one_of("dtype", dtype, classification.DTYPES),
        layout="HWC" if channels_last else "CHW",
    )
    augmentation = _augmentation(
        auto_augment, color_jitter, color_jitter_prob, grayscale_prob, re_prob, re_mode, re_count
    )
    if (augmentation or num_aug_repeats) and not is_training:
        given = ", ".join([*augmentation, *["num_aug_repeats"] * bool(num_aug_repeats)])
        raise ValueError(f"is_training=False: evaluation augments nothing; leave out {given}")
    if is_training:
        graph |= augmentation | dict(
            scale=_range("scale", scale, 1.0), ratio=_range("ratio", ratio), hflip=_fraction("hflip", hflip)
        )
    else:
        graph |= dict(
            crop_pct=_fraction("crop_pct", crop_pct, positive=True),
            crop_mode=_one_of("crop_mode", crop_mode, ("center", "squash")),
        )
    samples = sources.load(source)
    _one_of("shuffle", shuffle, ("auto", "global", "buffer"))
    if is_training and shuffle == ("global" if isinstance(samples, shards.Shards) else "buffer"):
        raise ValueError(
            f"shuffle={shuffle!r}: "
            + (
                "shards are read in sequence; give 'buffer', and write them in random order (lumix-dali convert)"
                if isinstance(samples, shards.Shards)
                else "a folder or a list is shuffled as a whole; give 'global'"
            )
        )
    buffer: dict[str, Any] = {}
    if isinstance(samples, shards.Shards):
        fill = _check_int("initial_fill", initial_fill, 1)
        buffer = dict(initial_fill=fill, counts=tuple(samples.counts.tolist()))
        if reader:
            raise ValueError(f"reader={reader!r}: shards are read by the loader itself; leave it out")
    order = (sources.Blocks if buffer else sources.Order)(
        len(samples),
        batch_size,
        shuffle=is_training,
        drop_last=is_training and drop_last,
        seed=seed,
        rank=rank,
        world_size=world_size,
        repeats=_check_int("num_aug_repeats", num_aug_repeats, 0),
        **buffer,
    )
    run = dict(
        num_threads=_default_threads() if num_threads is None else _check_int("num_threads", num_threads, 1),
        prefetch_queue_depth=prefetch_queue_depth,
    )
    return Loader(
        samples,
        order,
        _device(device),
        graph,
        mixing if with_mixing else None,
        run | dict(decoder=decoder, reader=reader),
        Faults(
            samples,
            _check_int("max_bad", max_bad, 0)
            if _one_of("on_bad_sample", on_bad_sample, ("replace", "raise")) == "replace"
            else 0,
            _check_int("max_pixels", max_pixels, 1),
        ),
    )


class Loader:
    """What `create_loader` returns: iterate it once an epoch.

    Training yields ``(images, MixTarget)``, evaluation ``(images, labels)``, all on `device`. Each ``iter()``
    starts the next whole epoch, also after a ``break``; only the first one after `load_state_dict` continues
    where the state was taken.

    Attributes:
        samples, dataset: the `sources.Samples`, or the `shards.Shards`.
        classes, num_classes: class names, and their number; None for shards that do not tell them.
        batch_size: samples a batch on this rank.
        device: torch.device of the batches.
        sampler: the loader itself, where timm's train.py and Lightning look for `set_epoch`.
        mixup_enabled: timm's switch; takes effect with the next ``iter()`` and leaves the order as it is.
        bad: {index: substitute's index} of samples that could not be used and were replaced.
    """

    batch_sampler = None  # as in a DataLoader that gets its batches made: timm then asks `sampler`

    def __init__(self, samples, order, device, graph, mixing, run, faults):
        self.samples = self.dataset = samples
        self.classes = samples.classes
        self.num_classes = None if samples.classes is None else len(samples.classes)
        self.batch_size, self.device = order.batch_size, device
        self.mixup_enabled = True
        self._order, self._graph, self._mixing, self._run, self._faults = order, graph, mixing, run, faults
        self._next = _Place(0, 0)
        self._place: _Place | None = None  # behind the last batch handed out
        # Weak: who leaves a loop early drops its iterator, and with it the pipeline.
        self._current: Callable[[], _Epoch | None] = lambda: None
        self._closed = False
        self._pid = os.getpid()

    @property
    def sampler(self) -> Loader:  # an attribute would make a cycle, and only gc would free the loader
        return self

    @property
    def bad(self) -> dict[int, int]:
        return self._faults.bad

    def __len__(self) -> int:
        """Number of batches an epoch on this rank."""
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        """Starts the next epoch; one still under way is abandoned."""
        if self._closed:
            raise ValueError("loader: it is closed; make a new one with create_loader")
        self._check_process()
        self._stop()
        place = self._next if self._next.mixed is not None else self._next._replace(mixed=self.mixup_enabled)
        self._next = _Place(place.epoch + 1, 0)
        self._place = place
        epoch = _Epoch(self, place)
        self._current = weakref.ref(epoch)
        return epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the next one, as DistributedSampler's does; without it, epochs count up from 0."""
        if _check_int("epoch", epoch, 0) != self._next.epoch:
            self._next = _Place(epoch, 0)
        self._place = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: behind the last batch handed out.

        Returns:
            A dict of plain values for ``torch.save``; after `load_state_dict` the stream goes on bit for bit.
        """
        place = self._next if self._place is None or self._place.iteration == len(self) else self._place
        state = dict(
            format=_FORMAT,
            place=tuple(place),
            mixup_enabled=self.mixup_enabled,
            bad=dict(self.bad),
            refused=sorted(self._faults.refused),
            fingerprint=self._fingerprint(),
        )
        return state | dict(checksum=_checksum(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next ``iter()`` go on where `state` was taken.

        Args:
            state: from `state_dict` of a loader of the same data, batch size, ranks, seed and graph.

        Raises:
            ValueError: the state is damaged, of another format, or of another loader, and in what.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            found = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: its format is {found!r}, this version reads {_FORMAT!r}; start the run anew")
        if _checksum({key: value for key, value in state.items() if key != "checksum"}) != state.get("checksum"):
            raise ValueError("state: its checksum does not match, it is damaged; take an earlier checkpoint")
        here, there = self._fingerprint(), state["fingerprint"]
        if different := [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]:
            listed = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
            raise ValueError(f"state: it is another loader's: {listed}. Make the loader as it was, or start anew")
        self._stop()
        self._place = None
        self._next, self.mixup_enabled = _Place(*state["place"]), state["mixup_enabled"]
        self._faults.restore(state["bad"], state["refused"])

    def close(self) -> None:
        """Frees the pipeline; the loader cannot be iterated afterwards."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _is_inherited(self) -> bool:
        return os.getpid() != self._pid

    def _check_process(self) -> None:
        if self._is_inherited():  # DALI's threads stay in the parent: waiting for them would never end
            raise RuntimeError("loader: it was inherited by fork; make a loader of its own in each process")

    def _stop(self) -> None:
        if (epoch := self._current()) is not None:
            epoch.close()

    def _fingerprint(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self._order) | self._graph | (self._mixing or {})
        return fields | dict(
            decoder=repr(self._run["decoder"]),
            max_pixels=self._faults.max_pixels,
            data=self.samples.digest,
            device=self.device.type,
            dali=dali.__version__,
        )

    def _give_to_pillow(self, indices: np.ndarray, error: RuntimeError) -> bool:
        """Finds out which of `indices` DALI refuses, so that it does not see them again; False: none."""
        faults, read = self._faults, [self.bad.get(i, i) for i in indices.tolist()]
        if named := _NAMED.search(str(error)):
            faults.refuse([read[int(named[1])]])
            return True
        encoded, lost = faults.dali_reads(read)
        refused: Collection[int] = classification.refused(
            encoded, _device_id(self.device), self._run["num_threads"]
        )
        if not refused and not lost and "fn.decoders" in str(error):
            refused = encoded  # whichever it was, it shows in its region of this batch only
        faults.refuse(list(refused))
        return bool(refused or lost)


class _Place(NamedTuple):
    """A place in the stream, and what restores it there."""

    epoch: int
    iteration: int
    checkpoint: bytes | None = None
    mixed: bool | None = None  # None: as `mixup_enabled` says when the epoch starts


class _Epoch(Iterator):
    """An epoch under way: a pipeline, and the place after the last batch it handed out."""

    _pipe: Any = None  # None when closed

    def __init__(self, loader: Loader, place: _Place):
        self.place = place
        self._loader = loader
        self._indices = loader._order.epoch(place.epoch)
        self._build()

    def __next__(self) -> tuple[torch.Tensor, Any]:
        loader = self._loader
        loader._check_process()
        if self._pipe is None or self.place.iteration == len(loader):
            self.close()
            raise StopIteration
        try:
            with _current(loader.device):
                images, *target = (torch.from_dlpack(output.as_tensor()) for output in self._run())
        finally:
            for message in loader._faults.news():
                warnings.warn(message, stacklevel=2)
        # A checkpoint taken after an error is already past the batch that failed: take one every time (.2 ms).
        self.place = self.place._replace(iteration=self.place.iteration + 1, checkpoint=self._pipe.checkpoint())
        loader._place = self.place
        if loader._graph["layout"] == "HWC":
            images = images.permute(0, 3, 1, 2)  # NCHW to torch, channels-last in memory
        return images, MixTarget(*target) if loader._order.shuffle else target[0]

    def close(self) -> None:
        """Frees the pipeline and its threads."""
        if self._pipe is None:
            return
        if self._loader._is_inherited():
            _INHERITED.append((self._pipe, self._feed))  # their threads are the parent's: ending them would hang
            self._pipe = None
        else:
            self._pipe = None
            self._feed.close()

    __del__ = close  # a loop that is left drops its iterator

    def _run(self) -> tuple:
        loader = self._loader
        stream = torch.cuda.current_stream(loader.device) if loader.device.type == "cuda" else None
        while True:
            try:
                return self._pipe.run(stream)
            except RuntimeError as error:
                size = loader.batch_size
                if not loader._give_to_pillow(self._indices[self.place.iteration * size :][:size], error):
                    raise
                self._build()

    def _build(self) -> None:
        """Makes the pipeline of this epoch, restored to `place`."""
        loader, order, place = self._loader, self._loader._order, self.place
        self.close()
        training = dict(mixing=loader._mixing if place.mixed else None) if order.shuffle else {}
        define = classification.train_pipeline if order.shuffle else classification.val_pipeline
        # The order has a seed of its own: the draws must differ by rank, the order must not.
        (seed,) = np.random.SeedSequence([order.seed, place.epoch, order.rank]).generate_state(1)
        threads, depth = loader._run["num_threads"], loader._run["prefetch_queue_depth"]
        self._feed = Feed(loader._faults, self._indices, loader.batch_size, threads, depth)
        self._pipe = define(
            self._feed,
            **loader._graph,
            **training,
            **loader._run,
            paths=loader.samples.are_files,
            batch_size=loader.batch_size,
            device_id=_device_id(loader.device),
            seed=int(seed) & 0x7FFFFFFF,
            checkpoint=place.checkpoint,
        )


def _current(device: torch.device) -> AbstractContextManager:
    # DALI orders its work after the stream of the calling thread's current device, whatever stream it is given.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
            f"device={device!r}: torch sees {torch.cuda.device_count()} GPU(s) here; give 'cpu' or 'auto'"
        )
    return wanted if wanted.index is not None else torch.device("cuda", torch.cuda.current_device())


def _device_id(device: torch.device) -> int | None:
    return device.index if device.type == "cuda" else None


def _augmentation(auto_augment, color_jitter, color_jitter_prob, grayscale_prob, re_prob, re_mode, re_count):
    """Arguments of `train_pipeline`, of what is on."""
    found: dict[str, Any] = {}
    if auto_augment:
        augment.parse(auto_augment)
        found |= dict(auto_augment=auto_augment)
    if color_jitter is not None and any(amounts := augment.jitter_of(color_jitter)):
        found |= dict(color_jitter=amounts, color_jitter_prob=_fraction("color_jitter_prob", color_jitter_prob))
    if _fraction("grayscale_prob", grayscale_prob):
        found |= dict(grayscale_prob=float(grayscale_prob))
    if _fraction("re_prob", re_prob):
        found |= dict(
            re_prob=float(re_prob),
            re_mode=_one_of("re_mode", re_mode, augment.ERASE_MODES),
            re_count=_check_int("re_count", re_count, 1),
        )
    return found


def _default_threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _size(input_size: int | Sequence[int]) -> tuple[int, int]:
    size = tuple(input_size) if isinstance(input_size, Sequence) else (input_size, input_size)
    if len(size) == 3 and size[0] == 3:
        size = size[1:]
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"input_size={input_size!r}: give a side, (H, W) or (3, H, W), in pixels > 0")
    return size[0], size[1]


def _check_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number >= {least}")
    return value


def _one_of(name: str, value: Any, known) -> Any:
    if value not in known:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, known))}")
    return value


def _fraction(name: str, value: float, positive: bool = False) -> float:
    if not isinstance(value, Real) or not 0 <= value <= 1 or (positive and value == 0):
        raise ValueError(f"{name}={value!r}: give a number in {'(' if positive else '['}0, 1]")
    return float(value)


def _range(name: str, value: Sequence[float], most: float = float("inf")) -> tuple[float, float]:
    if np.shape(value) != (2,) or not 0 < value[0] <= value[1] <= most:
        raise ValueError(f"{name}={value!r}: give (low, high) with 0 < low <= high" + f" <= {most}" * (most < 2))
    return float(value[0]), float(value[1])


def _triple(name: str, value: Sequence[float], positive: bool = False) -> tuple[float, ...]:
    if np.shape(value) != (3,) or (positive and min(value) <= 0):
        above = " and above 0" * positive
        raise ValueError(f"{name}={value!r}: give three numbers, one a channel, in units of [0, 1]{above}")
    return tuple(float(v) for v in value)
