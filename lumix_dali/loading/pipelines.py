"""The two pipelines of image classification: training with mixing, and evaluation.

Both run entirely on the CPU (``device_id=None``), or decode and augment on the GPU. They read from a `Feed`: images
that DALI can decode, and the plan of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, Literal, get_args

import numpy as np
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode

from .. import augment, checks
from .. import fn as mixfn
from ..augment import EraseMode
from ..decoding import decode
from ..graph import branch, first, put
from .feed import Feed
from .plan import Plan
from .resize import INTERPOLATIONS, Interpolation, TrainInterpolation, resize_mirror

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CropMode = Literal["center", "squash"]
DType = Literal["float32", "float16", "uint8"]
# A memory-mapped file that is truncated while it is decoded ends the process (SIGBUS).
_READER = {"dont_use_mmap": True}
_GREY_LEVELS = 2  # no channel of natural images has a larger mean or deviation in units of [0, 1]
_MIN_CROP = 0.05  # below, a resized image has more pixels than memory
_FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}
_DALI_TYPES = {np.bool_: types.BOOL, np.int32: types.INT32, np.float32: types.FLOAT}
_DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}


@dataclass(frozen=True)
class Output:
    """The format of the delivered images.

    Args:
        size: (H, W) in pixels; one side length or timm's (3, H, W) is also accepted.
        mean, std: of the normalisation, in units of [0, 1]; not used for uint8.
        dtype: "float32", "float16", or "uint8" for models that normalise themselves.
        channels_last: NCHW tensors in channels-last memory format.

    Raises:
        ValueError: an argument is outside its range.
    """

    size: tuple[int, int] = (224, 224)
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    dtype: DType = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        checks.assign(
            self,
            size=checks.image_size("input_size", self.size),
            mean=checks.channels("mean", self.mean),
            std=checks.channels("std", self.std, positive=True),
            dtype=checks.one_of("dtype", self.dtype, get_args(DType)),
            channels_last=checks.flag("channels_last", self.channels_last),
        )
        for name in ("mean", "std"):
            if max(map(abs, values := getattr(self, name))) > _GREY_LEVELS:
                raise checks.error(name, values, "these are grey levels; give them in units of [0, 1], divided by 255")


@dataclass(frozen=True)
class TrainTransform(Output):
    """Random resized crop, flip, augmentation and erasing before mixing: timm's training transform.

    Args:
        scale: range of the crop's area, as a fraction of the image's.
        ratio: range of the crop's aspect ratio, width over height, drawn log-uniformly.
        hflip: probability of a horizontal flip, before mixing.
        interpolation: "bicubic" or "bilinear", both with antialiasing, or "random", one of the two for each sample.
        auto_augment: timm's RandAugment string, see `augment.parse`; None: off.
        color_jitter, color_jitter_prob, grayscale_prob: see `augment.color_jitter`; as in timm, `auto_augment` replaces
            the jitter.
        re_prob, re_mode, re_count: see `augment.erase`, applied before mixing; a probability of 0: off.
        size, mean, std, dtype, channels_last: see `Output`.
    """

    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: TrainInterpolation = "bicubic"
    auto_augment: str | None = None
    color_jitter: float | Sequence[float] | None = None
    color_jitter_prob: float = 1.0
    grayscale_prob: float = 0.0
    re_prob: float = 0.0
    re_mode: EraseMode = "pixel"
    re_count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        jitter = augment.jitter_of(self.color_jitter) if self.color_jitter is not None else None
        if self.auto_augment:
            augment.parse(self.auto_augment)
        checks.assign(
            self,
            scale=checks.interval("scale", self.scale, 1.0),
            ratio=checks.interval("ratio", self.ratio),
            hflip=checks.fraction("hflip", self.hflip),
            interpolation=checks.one_of("interpolation", self.interpolation, get_args(TrainInterpolation)),
            auto_augment=self.auto_augment or None,
            color_jitter=jitter if jitter is not None and any(jitter) else None,
            color_jitter_prob=checks.fraction("color_jitter_prob", self.color_jitter_prob),
            grayscale_prob=checks.fraction("grayscale_prob", self.grayscale_prob),
            re_prob=checks.fraction("re_prob", self.re_prob),
            re_mode=checks.one_of("re_mode", self.re_mode, get_args(EraseMode)),
            re_count=checks.whole("re_count", self.re_count, 1),
        )


@dataclass(frozen=True)
class EvalTransform(Output):
    """Resize and centre crop: timm's evaluation transform.

    Args:
        crop_pct: the crop's side, as a fraction of the resized image's shorter side.
        crop_mode: "center" keeps the aspect ratio, "squash" does not (timm's terms).
        interpolation: "bicubic" or "bilinear", both with antialiasing.
        size, mean, std, dtype, channels_last: see `Output`.
    """

    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.assign(
            self,
            crop_pct=checks.number("crop_pct", self.crop_pct, _MIN_CROP, 1.0),
            crop_mode=checks.one_of("crop_mode", self.crop_mode, get_args(CropMode)),
            interpolation=checks.one_of("interpolation", self.interpolation, get_args(Interpolation)),
        )


@pipeline_def(enable_checkpointing=True)
def train_pipeline(
    feed: Feed,
    transform: TrainTransform,
    *,
    decoder: Mapping[str, Any] | None = None,
    reader: Mapping[str, Any] | None = None,
) -> tuple[DataNode, DataNode, DataNode]:
    """Random resized crop, flip, augment, erase, mix, normalise: timm's training transform, then LUMix Eq. 1.

    Args:
        feed: of the epoch; its plan says what is mixed.
        transform: applied to the images.
        decoder: further arguments of `decoding.decode`.
        reader: further arguments of ``fn.io.file.read``.

    Returns:
        images [B, C, H, W] or [B, H, W, C], the target as `plan.unpack` reads it, and λ0 float32 [B].

    Note:
        The arguments of DALI's pipelines (`batch_size`, `num_threads`, `device_id`, ...) are also given by keyword.
        As in Pillow, the EXIF orientation is not applied.
    """
    encoded, inputs = read(feed, reader)
    images = decode(encoded, lambda shape: _random_crop(shape, transform), **(decoder or {}))
    images = resize_mirror(images, transform.size, transform.interpolation, transform.hflip)
    images = _augmented(images, transform)
    images, target, lam0 = mixed(images, inputs, feed.plan)
    return _normalised(images, transform), target, lam0


def _random_crop(shape: DataNode, transform: TrainTransform) -> tuple[DataNode, DataNode]:
    start, extent = fn.random_crop_generator(
        shape, random_area=list(transform.scale), random_aspect_ratio=list(transform.ratio)
    )
    return start, extent


def _augmented(images: DataNode, transform: TrainTransform) -> DataNode:
    jitter = transform.color_jitter
    if transform.auto_augment:
        fill = [min(255, round(255 * m)) for m in transform.mean]
        warped = INTERPOLATIONS.get(transform.interpolation, types.INTERP_LINEAR)
        images = augment.rand_augment(
            images, transform.auto_augment, fill=fill, interpolation=warped, size=transform.size
        )
        jitter = None
    if jitter or transform.grayscale_prob:
        images = augment.color_jitter(
            images, jitter or 0.0, prob=transform.color_jitter_prob, grayscale_prob=transform.grayscale_prob
        )
    if transform.re_prob:
        images = augment.erase(
            images,
            prob=transform.re_prob,
            mode=transform.re_mode,
            count=transform.re_count,
            mean=transform.mean,
            std=transform.std,
            size=transform.size,
        )
    return images


@pipeline_def(enable_checkpointing=True)
def val_pipeline(
    feed: Feed,
    transform: EvalTransform,
    *,
    decoder: Mapping[str, Any] | None = None,
    reader: Mapping[str, Any] | None = None,
) -> tuple[DataNode, DataNode]:
    """Resize, centre crop, normalise: timm's evaluation transform, within .3 grey level in the mean.

    Args:
        transform: applied to the images.
        feed, decoder, reader: as in `train_pipeline`.

    Returns:
        images [B, C, H, W] or [B, H, W, C], and the target as `plan.unpack` reads it.

    Note:
        Only the region that the crop needs is decoded and resized, so an image of extreme aspect ratio takes no more
        memory than its crop.
    """
    encoded, inputs = read(feed, reader)
    size = transform.size
    target = [floor(side / transform.crop_pct) for side in size]
    crop: dict[str, DataNode] = {}

    def needed(shape: DataNode) -> tuple[DataNode, DataNode]:
        full = fn.cast(shape[:2], dtype=types.INT32)
        resized = _resized(full, target, transform.crop_mode)
        step = full / fn.cast(resized, dtype=types.FLOAT)
        start = _centre(resized, size) * step
        stop = start + step * np.array(size, np.float32)
        # A filter reaches `radius` pixels of the coarser grid to either side; one more pixel covers the rounding.
        reach = math.max(step, 1.0) * _FILTER_RADIUS[transform.interpolation] + 1.0
        low = fn.cast(math.clamp(math.floor(start - reach), 0.0, full), dtype=types.INT32)
        high = fn.cast(math.clamp(math.ceil(stop + reach), 0.0, full), dtype=types.INT32)
        crop.update(roi_start=start - low, roi_end=stop - low)
        return low, high - low

    images = decode(encoded, needed, **(decoder or {}))
    interpolation = INTERPOLATIONS[transform.interpolation]
    images = fn.resize(images, size=list(map(float, size)), interp_type=interpolation, **crop)
    return _normalised(images, transform), _put(inputs["target"])


def _put(node: DataNode) -> DataNode:
    return put(node, "cpu" if Pipeline.current().device_id is None else "gpu")


def read(feed: Feed, reader: Mapping[str, Any] | None = None) -> tuple[DataNode, dict[str, DataNode]]:
    """Encoded images, and the arrays of the plan by name."""
    given = fn.external_source(
        feed.images, batch=True, batch_info=True, dtype=types.UINT8, ndim=1, no_copy=not feed.gives_paths
    )
    one = np.zeros(1, np.int64)  # a batch of one, for the names and types of the inputs
    like = feed.plan.batch(0, one, one, np.ones(1, bool) if feed.gives_paths else None)
    if Pipeline.current().device_id is not None:
        like.pop("is_mixup", None)  # a GPU blends all images (`mixfn.lay`), and each input costs 15 µs
    # Not with the images: the target reaches the user, so DALI must have a copy of its own.
    nodes = fn.external_source(
        lambda info: feed.arrays(info, like),
        num_outputs=len(like),
        batch=True,
        batch_info=True,
        dtype=[_DALI_TYPES[array.dtype.type] for array in like.values()],
        ndim=[array.ndim - 1 for array in like.values()],
    )
    inputs = dict(zip(like, nodes, strict=True))
    if not feed.gives_paths:
        return given, inputs
    options = {**_READER, **(reader or {})}
    # Pillow decoded the others.
    return branch(inputs["is_path"], lambda paths: fn.io.file.read(paths, **options), first, given), inputs


def mixed(images: DataNode, inputs: Mapping[str, DataNode], plan: Plan) -> tuple[DataNode, DataNode, DataNode]:
    """Images mixed by the plan, its target, and λ0, on the pipeline's device."""
    lam0 = mixfn.lam0(inputs, plan.size, _put)
    if "ids" in inputs:
        images = mixfn.lay(images, inputs, plan.size)
    return images, _put(inputs["target"]), lam0


def _resized(full: DataNode, target: Sequence[int], crop_mode: str) -> DataNode:
    """Size of the whole image after the resize, rounded as in torchvision (square targets) or timm (others)."""
    if crop_mode == "squash":
        return full * 0 + np.array(target, np.int32)
    if target[0] == target[1]:
        return full * target[0] // math.min(full[0], full[1])
    exact = fn.cast(full, dtype=types.FLOAT64)
    times = exact / np.array(target, np.float64)
    scaled = exact / math.min(times[0], times[1])
    # timm rounds halves to even, in double precision; a cast would round them up.
    whole = math.floor(scaled)
    low, rest = fn.cast(whole, dtype=types.INT32), scaled - whole
    return low + ((rest > 0.5) | ((rest == 0.5) & (low % 2 == 1)))


def _centre(resized: DataNode, size: Sequence[int]) -> DataNode:
    # torchvision rounds half to even; the positions of fn.crop would round half up.
    margin = resized - np.array(size, np.int32)
    half = margin // 2
    return half + (half & margin & 1)


def _normalised(images: DataNode, output: Output) -> DataNode:
    scaled = output.dtype != "uint8"
    return fn.crop_mirror_normalize(
        images,
        dtype=_DTYPES[output.dtype],
        output_layout="HWC" if output.channels_last else "CHW",
        mean=[255 * m for m in output.mean] if scaled else 0.0,
        std=[255 * s for s in output.std] if scaled else 1.0,
    )
