"""The two pipelines of image classification: training with mixing, and evaluation.

Both run wholly on the CPU (``device_id=None``) or decode and go on on the GPU. They read what `source` names:
a callable of DALI's ``BatchInfo`` that returns (paths, labels) of that batch, or a part of TFRecord or WebDataset
shards, through DALI's own readers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import floor
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, math, pipeline_def, tfrecord, types
from nvidia.dali.data_node import DataNode

from . import augment, shards
from . import fn as mixfn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
TRAIN_INTERPOLATIONS = (*INTERPOLATIONS, "random")
DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}


@pipeline_def(enable_checkpointing=True)
def train_pipeline(
    source: Callable | shards.Part,
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
    decoder: dict[str, Any] | None = None,
    reader: dict[str, Any] | None = None,
):
    """Random resized crop, flip, augment, erase, mix, normalise: timm's training transform, then LUMix Eq. 1.

    Args:
        source: callable of ``BatchInfo``, gives (list of uint8 paths, list of int64 labels); or a part of shards.
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
        reader: further arguments of ``fn.io.file.read``, or of the shards' reader, such as `dont_use_mmap`.

    Returns:
        images [B, C, H, W] or [B, H, W, C], then the five fields of `MixTarget`.

    Note:
        Arguments of DALI's pipelines (`batch_size`, `num_threads`, `device_id`, ...) are given by keyword too.
        The decoder turns nothing by EXIF, as PIL does not.
    """
    with_cutmix = mixing is not None and (mixing.get("cutmix_alpha", 1.0) or mixing.get("cutmix_minmax"))
    device, encoded, labels, index = _read(source, reader, with_index=bool(with_cutmix))
    images = fn.decoders.image_random_crop(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        random_area=list(scale),
        random_aspect_ratio=list(ratio),
        adjust_orientation=False,
        **(decoder or {}),
    )
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
        target = mixfn.unmixed(labels, device)
    else:
        images, target = mixfn.mix(images, labels, index=index, size=size, **mixing)
    return _normalise(images, mean, std, dtype, layout), *target


@pipeline_def(enable_checkpointing=True)
def val_pipeline(
    source: Callable | shards.Part,
    *,
    size: Sequence[int] = (224, 224),
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: str = "float32",
    layout: str = "CHW",
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
    """
    device, encoded, labels, _ = _read(source, reader)
    full = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT32)[:2]
    images = fn.decoders.image(
        encoded, device="mixed" if device == "gpu" else "cpu", adjust_orientation=False, **(decoder or {})
    )
    resized = _resized(full, [floor(side / crop_pct) for side in size], crop_mode)
    images = fn.resize(images, size=fn.cast(resized, dtype=types.FLOAT), interp_type=INTERPOLATIONS[interpolation])
    images = fn.slice(images, _centre(resized, size), list(size), axes=[0, 1])
    return _normalise(images, mean, std, dtype, layout), labels.gpu() if device == "gpu" else labels


@pipeline_def
def decode_pipeline(images: Sequence[str] | Sequence[bytes]):
    """Decodes these files, or their contents, once a run: an error says that one of them is bad."""
    paths = isinstance(images[0], str)
    given = [np.frombuffer(os.fsencode(image), np.uint8) for image in images]
    encoded = fn.external_source(lambda: given, batch=True, dtype=types.UINT8, ndim=1)
    if paths:
        encoded = fn.io.file.read(encoded)
    return fn.decoders.image(encoded, device="cpu" if Pipeline.current().device_id is None else "mixed")


def undecodable(images: Sequence, device_id: int | None = None, num_threads: int = 1) -> dict[Any, str]:
    """Which of these files DALI cannot decode, with its reasons: halves a batch until the bad ones are alone.

    Args:
        images: paths (str) of image files, or their contents (bytes).
        device_id: GPU to decode on; None: the CPU.
        num_threads: DALI's threads.

    Returns:
        {image: reason} of the bad ones.
    """
    if not images:
        return {}
    try:
        decode_pipeline(images, batch_size=len(images), num_threads=num_threads, device_id=device_id).run()
    except RuntimeError as error:
        if len(images) == 1:
            reason = str(error).partition("encountered:")[2].partition("\nCurrent pipeline")[0]
            return {images[0]: " ".join(reason.partition("\nC++ context")[0].split())}
        half = len(images) // 2
        return undecodable(images[:half], device_id, num_threads) | undecodable(
            images[half:], device_id, num_threads
        )
    return {}


@pipeline_def
def shard_pipeline(source: shards.Part, reader: dict[str, Any] | None = None):
    """Encoded image and label of each sample as the shards hold them, in the order of the other pipelines."""
    return _read_shards(source, reader)


def shard_batch(
    source: shards.Part, iteration: int, batch_size: int, num_threads: int, reader: dict[str, Any] | None
) -> list[tuple[str, bytes, bytes]]:
    """Batch number `iteration`, read again: (DALI's words for its place, image, label) of each sample."""
    pipe = shard_pipeline(source, reader, batch_size=batch_size, num_threads=num_threads, device_id=None)
    for _ in range(iteration + 1):
        images, labels = pipe.run()
    return [
        (image.source_info(), np.array(image).tobytes(), np.array(label).tobytes())
        for image, label in zip(images, labels, strict=True)
    ]


def _read(
    source: Callable | shards.Part, reader: dict[str, Any] | None, with_index: bool = False
) -> tuple[str, DataNode, DataNode, DataNode | None]:
    """Device, encoded images, labels and, from an order of our own, each sample's place in the batch."""
    device = "cpu" if Pipeline.current().device_id is None else "gpu"
    if isinstance(source, shards.Part):
        encoded, label = _read_shards(source, reader)
        label = _number(label) if source.kind == "webdataset" else fn.reshape(label, shape=[])
        return device, encoded, label, None

    def batch(info):
        paths, labels = source(info)
        return (paths, labels, np.arange(len(labels), dtype=np.int32))[:count]

    count = 3 if with_index else 2
    paths, labels, *index = fn.external_source(
        batch,
        num_outputs=count,
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64, types.INT32][:count],
        ndim=[1, 0, 0][:count],
    )
    return device, fn.io.file.read(paths, **(reader or {})), labels, index[0] if index else None


def _interpolation(name: str) -> Any:
    return fn.random.choice(list(INTERPOLATIONS.values())) if name == "random" else INTERPOLATIONS[name]


def _read_shards(source: shards.Part, reader: dict[str, Any] | None) -> tuple[DataNode, DataNode]:
    common = dict(
        shard_id=source.shard_id,
        num_shards=source.num_shards,
        random_shuffle=bool(source.initial_fill),
        initial_fill=source.initial_fill or 1,
        seed=source.seed,
        pad_last_batch=True,  # never a sample of the next rank's
        **(reader or {}),
    )
    if source.kind == "webdataset":
        extensions = ";".join(extension[1:] for extension in shards.EXTENSIONS)
        encoded, label = fn.readers.webdataset(
            paths=source.paths,
            index_paths=source.indices,
            ext=[extensions, "cls"],
            case_sensitive_extensions=False,
            missing_component_behavior="skip",
            **common,
        )
        return encoded, label
    features = {
        shards.IMAGE: tfrecord.FixedLenFeature((), tfrecord.string, ""),
        shards.LABEL: tfrecord.VarLenFeature(tfrecord.int64, 0),
    }
    found = fn.readers.tfrecord(path=source.paths, index_path=source.indices, features=features, **common)
    return found[shards.IMAGE], found[shards.LABEL]


_POWERS = np.array([*(10**i for i in reversed(range(shards.DIGITS))), *[10**shards.DIGITS // 10] * 32], np.int32)


def _number(text: DataNode) -> DataNode:
    """The int64 that ASCII digits, maybe before a newline, stand for. Another text is an error of `fn.slice`."""
    digit = (text >= ord("0")) & (text <= ord("9"))
    found = fn.reductions.sum(digit + 1000 * ((digit == 0) & (text > ord(" "))))
    # No digit, too many of them, or another sign: the slice would start in front of the powers.
    start = shards.DIGITS - fn.cast(found, dtype=types.INT32) - 1000 * (found == 0)
    powers = fn.slice(types.Constant(_POWERS, device="cpu"), start, text.shape(dtype=types.INT32)[0], axes=[0])
    return fn.reductions.sum(fn.cast(text - ord("0"), dtype=types.INT64) * digit * powers)


def _resized(full: DataNode, target: Sequence[int], crop_mode: str) -> DataNode:
    """Size of the whole image after the resize, as torchvision (square) and timm (else) round it."""
    if crop_mode == "squash":
        return full * 0 + np.array(target, np.int32)
    height, width = full[0], full[1]
    if target[0] == target[1]:
        return full * target[0] // math.min(height, width)
    times = math.min(height / float(target[0]), width / float(target[1]))
    return fn.cast(full / times, dtype=types.INT32)


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
