"""The two pipelines of image classification: training with mixing, and evaluation.

Both run wholly on the CPU (``device_id=None``), or decode and augment on the GPU. They read what `source` gives: a
callable of DALI's ``BatchInfo`` that returns the paths or the encoded images of that batch, and their labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode

from . import augment
from . import fn as mixfn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}
TRAIN_INTERPOLATIONS = (*INTERPOLATIONS, "random")
DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}


@pipeline_def(enable_checkpointing=True)
def train_pipeline(
    source: Callable,
    *,
    size: Sequence[int] = (224, 224),
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: str = "float32",
    layout: str = "CHW",
    auto_augment: str | None = None,
    color_jitter: float | Sequence[float] | None = None,
    color_jitter_prob: float = 1.0,
    grayscale_prob: float = 0.0,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    mixing: dict[str, Any] | None = None,
    paths: bool = True,
    decoder: dict[str, Any] | None = None,
    reader: dict[str, Any] | None = None,
):
    """Random resized crop, flip, augment, erase, mix, normalise: timm's training transform, then LUMix Eq. 1.

    Args:
        source: callable of ``BatchInfo``, gives three lists of uint8 [n] paths or encoded images, int64 labels and
            int32 places in the batch. Every image must be one that `formats` lets DALI decode.
        paths: whether `source` gives paths; False: encoded images.
        size: (H, W) of the output.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's aspect ratio, width over height, drawn log-uniformly.
        hflip: probability of a horizontal flip, before mixing.
        interpolation: "bicubic" or "bilinear", both with antialiasing, or "random", one of them for each sample.
        mean, std: of the normalisation, in units of the full range [0, 1]; not used for uint8.
        dtype: "float32", "float16", or "uint8" for models that normalise themselves.
        layout: "CHW" or "HWC".
        auto_augment: timm's RandAugment string, see `augment.parse`; None: off.
        color_jitter, color_jitter_prob, grayscale_prob: of `augment.color_jitter`; the jitter is left out with
            `auto_augment`, as timm leaves it out.
        re_prob, re_mode, re_count: of `augment.erase`, before mixing; a probability of 0: off.
        mixing: arguments of `lumix_dali.fn.mix`; None: nothing is mixed.
        decoder: further arguments of DALI's decoder, such as `hw_decoder_load`.
        reader: further arguments of ``fn.io.file.read``, such as `dont_use_mmap`.

    Returns:
        images [B, C, H, W] or [B, H, W, C], then the five fields of `MixTarget`.

    Note:
        Arguments of DALI's pipelines (`batch_size`, `num_threads`, `device_id`, ...) are given by keyword too.
        The decoder turns nothing by EXIF, as PIL does not.
    """
    with_cutmix = mixing is not None and (mixing.get("cutmix_alpha", 1.0) or mixing.get("cutmix_minmax"))
    encoded, labels, index = _read(source, paths, reader, with_index=bool(with_cutmix))

    def crop(shape: DataNode) -> tuple[DataNode, DataNode]:
        return fn.random_crop_generator(shape, random_area=list(scale), random_aspect_ratio=list(ratio))

    images = decode(encoded, crop, **(decoder or {}))
    images = fn.resize_crop_mirror(
        images,
        size=list(size),
        crop=list(size),
        interp_type=_interpolation(interpolation),
        mirror=fn.random.coin_flip(probability=hflip) if hflip else 0,
    )
    if auto_augment:
        fill = [min(255, round(255 * m)) for m in mean]
        warped = INTERPOLATIONS.get(interpolation, types.INTERP_LINEAR)
        images = augment.rand_augment(images, auto_augment, fill=fill, interpolation=warped, size=size)
        color_jitter = None
    if color_jitter or grayscale_prob:
        images = augment.color_jitter(
            images, color_jitter or 0.0, prob=color_jitter_prob, grayscale_prob=grayscale_prob
        )
    if re_prob:
        images = augment.erase(images, prob=re_prob, mode=re_mode, count=re_count, mean=mean, std=std, size=size)
    if mixing is None:
        target = mixfn.unmixed(labels, _device())
    else:
        images, target = mixfn.mix(images, labels, index=index, size=size, **mixing)
    return _normalise(images, mean, std, dtype, layout), *target


@pipeline_def(enable_checkpointing=True)
def val_pipeline(
    source: Callable,
    *,
    size: Sequence[int] = (224, 224),
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: str = "float32",
    layout: str = "CHW",
    paths: bool = True,
    decoder: dict[str, Any] | None = None,
    reader: dict[str, Any] | None = None,
):
    """Resize, centre crop, normalise: timm's evaluation transform, within .3 grey level in the mean.

    Args:
        crop_pct: the crop's share of the resized image's shorter side.
        crop_mode: "center" keeps the aspect ratio, "squash" does not (timm's words).

        The others are those of `train_pipeline`.

    Returns:
        images [B, C, H, W] or [B, H, W, C], labels [B].

    Note:
        Only the region that the crop needs is decoded and resized, so that the memory of an image of extreme shape
        stays that of its crop.
    """
    encoded, labels, _ = _read(source, paths, reader)
    target = [floor(side / crop_pct) for side in size]
    crop: dict[str, DataNode] = {}

    def needed(shape: DataNode) -> tuple[DataNode, DataNode]:
        full = fn.cast(shape[:2], dtype=types.INT32)
        resized = _resized(full, target, crop_mode)
        step = full / fn.cast(resized, dtype=types.FLOAT)
        start = _centre(resized, size) * step
        stop = start + step * np.array(size, np.float32)
        # Filters reach `radius` pixels of the coarser grid to either side; one more covers what rounding moves.
        reach = math.max(step, 1.0) * _FILTER_RADIUS[interpolation] + 1.0
        low = fn.cast(math.clamp(math.floor(start - reach), 0.0, full), dtype=types.INT32)
        high = fn.cast(math.clamp(math.ceil(stop + reach), 0.0, full), dtype=types.INT32)
        crop.update(roi_start=start - low, roi_end=stop - low)
        return low, high - low

    images = decode(encoded, needed, **(decoder or {}))
    images = fn.resize(images, size=list(map(float, size)), interp_type=INTERPOLATIONS[interpolation], **crop)
    return _normalise(images, mean, std, dtype, layout), labels.gpu() if _device() == "gpu" else labels


def decode(encoded: DataNode, region: Callable[[DataNode], tuple[DataNode, DataNode]], **options: Any) -> DataNode:
    """Decodes a region of each image; every decoder of this package is made here.

    The region depends on what ``fn.peek_image_shape`` reads in the header, so that a header which DALI cannot
    parse fails before a decoder starts: an error within the decoder, while its threads decode the rest of the
    batch, can end the process (DALI 2.4).

    Args:
        encoded: uint8 [n] each on the CPU, images for which `formats.look` names `Decoder.DALI`, or bitmaps.
        region: function of the (height, width, channels) of each image, int64 [3], that gives (y, x) of the
            region's upper left corner and its (height, width), both integers [2] of one type.
        options: further arguments of ``fn.decoders.image_slice``.

    Returns:
        uint8 HWC RGB images on the pipeline's device, not turned by EXIF, as Pillow does not.
    """
    start, shape = region(fn.peek_image_shape(encoded, adjust_orientation=False))
    return fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        device="mixed" if _device() == "gpu" else "cpu",
        adjust_orientation=False,
        **options,
    )


@pipeline_def
def decode_pipeline(images: Sequence[np.ndarray]):
    """Decodes these encoded images, whole, once a run: an error says that DALI refuses one of them."""
    encoded = fn.external_source(lambda: list(images), batch=True, dtype=types.UINT8, ndim=1)
    return decode(encoded, lambda shape: (shape[:2] * 0, shape[:2]))


def refused(
    images: dict[int, np.ndarray], device_id: int | None = None, num_threads: int = 1
) -> dict[int, str]:
    """Which of these images DALI refuses, with its reasons: bisects the batch to isolate them.

    Args:
        images: encoded images by number, each one that `formats.look` gives to DALI.
        device_id: GPU to decode on; None: the CPU.
        num_threads: DALI's threads.

    Returns:
        {number: reason} of those refused.
    """
    if not images:
        return {}
    pipe = decode_pipeline(
        list(images.values()), batch_size=len(images), num_threads=num_threads, device_id=device_id
    )
    try:
        pipe.run()
    except RuntimeError as error:
        if len(images) == 1:
            reason = str(error).partition("encountered:")[2].partition("\nCurrent pipeline")[0]
            return dict.fromkeys(images, " ".join(reason.partition("\nC++ context")[0].split()))
        numbers = list(images)
        halves = (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :])
        return {
            number: reason
            for half in halves
            for number, reason in refused({i: images[i] for i in half}, device_id, num_threads).items()
        }
    return {}


def _device() -> str:
    return "cpu" if Pipeline.current().device_id is None else "gpu"


def _read(
    source: Callable, paths: bool, reader: dict[str, Any] | None, with_index: bool = False
) -> tuple[DataNode, DataNode, DataNode | None]:
    """Encoded images, labels and, on demand, each sample's place in the batch."""

    def batch(info):
        return source(info)[:count]

    count = 3 if with_index else 2
    given, labels, *index = fn.external_source(
        batch,
        num_outputs=count,
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64, types.INT32][:count],
        ndim=[1, 0, 0][:count],
    )
    encoded = fn.io.file.read(given, **(reader or {})) if paths else given
    return encoded, labels, index[0] if index else None


def _interpolation(name: str) -> Any:
    return fn.random.choice(list(INTERPOLATIONS.values())) if name == "random" else INTERPOLATIONS[name]


def _resized(full: DataNode, target: Sequence[int], crop_mode: str) -> DataNode:
    """Size of the whole image after the resize, as torchvision (square) and timm (else) round it."""
    if crop_mode == "squash":
        return full * 0 + np.array(target, np.int32)
    if target[0] == target[1]:
        return full * target[0] // math.min(full[0], full[1])
    exact = fn.cast(full, dtype=types.FLOAT64)
    times = exact / np.array(target, np.float64)
    scaled = exact / math.min(times[0], times[1])
    # timm rounds halves to even, and in doubles; a cast would round them up.
    whole = math.floor(scaled)
    low, rest = fn.cast(whole, dtype=types.INT32), scaled - whole
    return low + ((rest > 0.5) | ((rest == 0.5) & (low % 2 == 1)))


def _centre(resized: DataNode, size: Sequence[int]) -> DataNode:
    # torchvision rounds the centre half to even; fn.crop's positions would round half up.
    margin = resized - np.array(size, np.int32)
    half = margin // 2
    return half + (half & margin & 1)


def _normalise(images: DataNode, mean, std, dtype: str, layout: str) -> DataNode:
    scaled = dtype != "uint8"
    return fn.crop_mirror_normalize(
        images,
        dtype=DTYPES[dtype],
        output_layout=layout,
        mean=[255 * m for m in mean] if scaled else 0.0,
        std=[255 * s for s in std] if scaled else 1.0,
    )
