"""timm's augmentation as DALI graph functions: RandAugment, colour jitter, random erasing.

Images are uint8 HWC RGB, on either backend; the draws stay on the CPU. An operation takes what timm's function
of the same name takes (``timm.data.auto_augment``) and is compared with it in the tests. A sample gets one
operation a layer, so the batch is split until the samples of one operation are alone (what DALI makes of an
``if``): nobody pays for an operation that it does not get. All of it belongs before mixing: an image that is
moved afterwards falsifies the box.

Departures from timm 1.0.31:

- Rotate, Shear and Translate interpolate as the training crop does, "random" bilinearly. timm then chooses
  bilinear or bicubic for every operation. OpenCV's bicubic kernel has a = -.75, Pillow's -.5, and it blends
  the fill colour into the outermost pixel.
- Colours are within one grey level of Pillow's, Equalize within two; Sharpness also sharpens the outermost
  pixels, which Pillow leaves.
- `color_jitter` has one order of its steps where torchvision draws one. That only shows where a step clips.
- `erase` comes before mixing, as in the training code of DeiT, Swin and ConvNeXt; timm's own prefetcher erases
  afterwards, when λ0 no longer counts the pixels that are there. Its noise is rounded and clipped to uint8.
"""

from __future__ import annotations

import math as pymath
import re
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

ERASE_MODES = ("const", "rand", "pixel")
# timm redraws a region that does not fit so many times.
_ATTEMPTS = 10
# Pillow cuts off where DALI rounds; not quite a half, so that a whole number stays what it is.
_CUT = -0.499


class Policy(NamedTuple):
    """timm's RandAugment string, read.

    Attributes:
        layers: operations a sample, each drawn with replacement.
        prob: probability that a layer does anything.
        magnitude, std: of the normal law of the magnitude; an infinite std: uniform in [0, magnitude].
        most: the magnitude is clipped to [0, most].
        increasing: every operation gets stronger with the magnitude.
    """

    layers: int = 2
    prob: float = 0.5
    magnitude: int = 10
    std: float = 0.0
    most: int = 10
    increasing: bool = False


# timm's argument of each operation is base + slope · magnitude, the slope's sign drawn where `signed`. Warps
# come first, since they share an operator.
OPERATIONS: dict[str, tuple[float, float, bool]] = {
    "Rotate": (0, 3, True),  # degrees
    "ShearX": (0, 0.03, True),
    "ShearY": (0, 0.03, True),
    "TranslateXRel": (0, 0.045, True),  # of the width
    "TranslateYRel": (0, 0.045, True),
    "Brightness": (1, 0.09, True),
    "Color": (1, 0.09, True),
    "Contrast": (1, 0.09, True),
    "Sharpness": (1, 0.09, True),
    "Posterize": (4, -0.4, False),  # bits
    "Solarize": (256, -25.6, False),  # threshold
    "SolarizeAdd": (0, 11, False),
    "Invert": (0, 0, False),
    "AutoContrast": (0, 0, False),
    "Equalize": (0, 0, False),
}
# Without inc1: weaker with the magnitude, or without a sign.
_NOT_INCREASING = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.1, 0.18, False)) | {
    "Posterize": (0, 0.4, False),
    "Solarize": (0, 25.6, False),
}
_WARPS = 5


def parse(spec: str) -> Policy:
    """Reads timm's string, such as "rand-m9-mstd0.5-inc1", in any order of its parts.

    Args:
        spec: ``rand``, then ``m`` magnitude, ``n`` layers, ``p`` probability of each, ``mstd`` (above 100:
            uniform), ``mmax`` upper bound of the magnitude, ``inc`` 0 or 1; timm's defaults where left out.

    Raises:
        ValueError: another policy, an unknown part, or a number outside its range.
    """
    name, *parts = spec.split("-") if isinstance(spec, str) else [repr(spec)]
    if name != "rand":
        raise ValueError(f"auto_augment={spec!r}: {name!r} is not supported; give rand-m9-mstd0.5-inc1 or the like")
    whole, number = r"\d+", r"\d*\.?\d+|\d+\.|inf"
    known = {
        "m": ("magnitude", whole, int),
        "n": ("layers", "[1-9]|1[0-9]", int),
        "p": ("prob", r"0|1|0?\.\d+|[01]\.0*|0\.\d+", float),
        "mstd": ("std", number, float),
        "mmax": ("most", whole, int),
        "inc": ("increasing", "0|1", int),
    }
    fields: dict[str, Any] = {}
    for part in parts:
        key, value = (re.fullmatch(r"([a-z]*)(.*)", part) or re.fullmatch(r"()(.*)", part)).groups()  # type: ignore
        if key == "mstdinf":
            key, value = "mstd", "inf"
        if key not in known or not re.fullmatch(known[key][1], value):
            raise ValueError(
                f"auto_augment={spec!r}: {part!r} is not supported; give m9 (magnitude), n2 (layers), p0.5, "
                "mstd0.5, mmax10 or inc1, timm's words; its sets of operations (t...) are not there"
            )
        field, _, convert = known[key]
        fields[field] = convert(value)
    if fields.get("std", 0) > 100:
        fields["std"] = pymath.inf
    if not fields.get("most", 1):
        del fields["most"]  # timm reads 0 as unset
    return Policy(**fields | {"increasing": bool(fields.get("increasing", 0))})


def rand_augment(
    images: DataNode,
    spec: str | Policy = "rand-m9-mstd0.5-inc1",
    *,
    fill: Sequence[float] = (128, 128, 128),
    interpolation: int = types.INTERP_LINEAR,
) -> DataNode:
    """RandAugment (arXiv 1909.13719) with timm's 15 operations and levels.

    Args:
        images: uint8, HWC, RGB.
        spec: timm's string, see `parse`.
        fill: three grey levels, of what warps leave free; timm's training takes the mean of the normalisation.
        interpolation: DALI's, linear or cubic, of the warps.

    Returns:
        As `images`.

    Raises:
        ValueError: a spec that `parse` refuses.
    """
    policy = spec if isinstance(spec, Policy) else parse(spec)
    leaves = _leaves(policy, partial(_warp, fill=fill, interpolation=interpolation))
    outcome, argument = draw(policy)
    for layer in range(policy.layers):
        images = _select(leaves, images, outcome[layer], argument[layer])
    return images


def draw(policy: Policy) -> tuple[DataNode, DataNode]:
    """What each layer does to each sample.

    Returns:
        int32 [layers] outcomes, 0 for nothing, 2k + 1 and 2k + 2 for the k-th of `OPERATIONS` with positive and
        negative sign; float32 [layers], the operation's argument before timm makes an integer of it.
    """
    table = OPERATIONS if policy.increasing else OPERATIONS | _NOT_INCREASING
    bases, slopes = [0.0], [0.0]
    for base, slope, signed in table.values():
        bases += [base, base]
        slopes += [slope, -slope if signed else slope]
    chances = [1 - policy.prob] + [policy.prob / (len(bases) - 1)] * (len(bases) - 1)
    outcome = fn.random.choice(len(bases), p=chances, shape=[policy.layers])
    keys = list(range(len(bases)))
    base, slope = (fn.lookup_table(outcome, keys=keys, values=values) for values in (bases, slopes))
    return outcome, base + slope * _magnitude(policy)


def _magnitude(policy: Policy):
    if policy.std == 0:
        return float(min(policy.magnitude, policy.most))
    if policy.std == pymath.inf:
        drawn = fn.random.uniform(range=[0.0, float(policy.magnitude)], shape=[policy.layers])
    else:
        drawn = fn.random.normal(mean=float(policy.magnitude), stddev=policy.std, shape=[policy.layers])
    return math.clamp(drawn, 0.0, float(policy.most))


def _leaves(policy: Policy, warp: Callable) -> list[tuple[int, Callable]]:
    """(last outcome, function of images, outcome and argument), in the order of the outcomes."""
    whole = math.ceil if policy.increasing else math.floor  # 4 - int(.4 m), or int(.4 m)
    single: dict[str, Callable] = {
        "Brightness": lambda images, factor: brightness(images, math.max(factor, 0.1)),
        "Color": lambda images, factor: color(images, math.max(factor, 0.1)),
        "Contrast": lambda images, factor: contrast(images, math.max(factor, 0.1)),
        "Sharpness": lambda images, factor: sharpness(images, math.max(factor, 0.1)),
        "Posterize": lambda images, bits: posterize(images, whole(bits)),
        "Solarize": lambda images, threshold: solarize(images, whole(threshold)),
        "SolarizeAdd": lambda images, add: solarize_add(images, math.min(math.floor(add), 128)),
        "Invert": lambda images, _: invert(images),
        "AutoContrast": lambda images, _: auto_contrast(images),
        "Equalize": lambda images, _: equalize(images),
    }
    leaves: list[tuple[int, Callable]] = [(0, lambda images, *_: images), (2 * _WARPS, warp)]
    for place, name in enumerate(list(OPERATIONS)[_WARPS:], _WARPS):
        leaves.append((2 * place + 2, lambda images, _, argument, name=name: single[name](images, argument)))
    return leaves


def _select(leaves, images: DataNode, outcome: DataNode, argument: DataNode) -> DataNode:
    (last, operation), *others = leaves
    if not others:
        return operation(images, outcome, argument)
    return _if(outcome <= last, operation, partial(_select, others), images, outcome, argument)


def _if(predicate: DataNode, then: Callable, otherwise: Callable, *nodes: DataNode) -> DataNode:
    """What DALI makes of an ``if``, which would ask every caller to enable conditionals."""
    parts = [fn._conditional.split(node, predicate=predicate, _if_stmt=True) for node in nodes]
    return fn._conditional.merge(
        then(*(true for true, _ in parts)), otherwise(*(false for _, false in parts)), predicate=predicate
    )


def _warp(images, outcome, argument, *, fill, interpolation) -> DataNode:
    """Rotate, ShearX, ShearY, TranslateX or TranslateY: all but one of the arguments are zero."""
    given = fn.one_hot((outcome - 1) // 2, num_classes=_WARPS) * argument
    return warp(images, given[0], given[1:3], given[3:5], fill=fill, interpolation=interpolation)


def warp(images, degrees, shear, share, *, fill, interpolation=types.INTERP_LINEAR) -> DataNode:
    """timm's rotate, shear and translate, as one affine map.

    Args:
        degrees: float32 scalar, counter-clockwise about the centre.
        shear: float32 [2], along x and y, from the upper left corner.
        share: float32 [2], of width and height, by which the content moves left and up.
        fill: three grey levels.
    """
    size = fn.cast(images.shape()[:2], dtype=types.FLOAT)[::-1]
    matrix = fn.transforms.rotation(angle=degrees, center=size * 0.5)
    matrix = fn.transforms.shear(matrix, shear=shear)
    matrix = fn.transforms.translation(matrix, offset=share * size)
    # Third row (0, 0, 1). A constant has the size of the whole batch, and cannot be used where that is split.
    matrix = fn.pad(fn.pad(fn.reshape(matrix, shape=[6]), shape=[8]), shape=[9], fill_value=1)
    return fn.experimental.warp_perspective(
        images, matrix=fn.reshape(matrix, shape=[3, 3]), fill_value=[float(level) for level in fill], interp_type=interpolation
    )


def brightness(images: DataNode, factor) -> DataNode:
    """Pillow's ImageEnhance.Brightness: 0 is black, 1 the image."""
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=_CUT / 255)


def color(images: DataNode, factor) -> DataNode:
    """Pillow's ImageEnhance.Color: 0 is grey, 1 the image."""
    return _blend(_grey(images), images, factor)


def contrast(images: DataNode, factor) -> DataNode:
    """Pillow's ImageEnhance.Contrast: 0 is the mean of the grey image, 1 the image."""
    return _blend(fn.reductions.mean(_grey(images), axes=[0, 1], keep_dims=True), images, factor)


def sharpness(images: DataNode, factor) -> DataNode:
    """Pillow's ImageEnhance.Sharpness: 0 is smooth, 1 the image."""
    around = (1 - factor) * (1 / 13)
    centre = fn.reshape(factor + around * 4, shape=[1, 1])
    kernel = fn.slice(centre, start=[-1, -1], shape=[3, 3], axes=[0, 1], out_of_bounds_policy="pad") + around
    return fn.filter(images, _put(kernel, images.device))


def posterize(images: DataNode, bits) -> DataNode:
    """Keeps the uppermost `bits` (a whole number, below 1: black) of each grey level."""
    kept = fn.cast(256 - math.fpow(2.0, 8 - bits), dtype=types.UINT8)  # clipped to [0, 255]
    return images & _put(kept, images.device)


def solarize(images: DataNode, threshold) -> DataNode:
    """Inverts the grey levels from `threshold` (a whole number) on."""
    return images ^ _where(images >= _put(threshold, images.device)) * _level(255)


def solarize_add(images: DataNode, add) -> DataNode:
    """Adds `add` (a whole number up to 128) to the grey levels below 128."""
    return images + _where(images < _level(128)) * _put(fn.cast(add, dtype=types.UINT8), images.device)


def invert(images: DataNode) -> DataNode:
    """255 minus each grey level."""
    return images ^ _level(255)


def auto_contrast(images: DataNode) -> DataNode:
    """Stretches each channel to [0, 255]; one without contrast stays."""
    low, high = (
        reduce(images, axes=[0, 1], keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max)
    )
    flat = low == high
    stretched = (images - low * (low < high)) * _level(255, types.UINT16) // (high - low + flat * _level(255))
    return fn.cast(stretched, dtype=types.UINT8)


def equalize(images: DataNode) -> DataNode:
    """Pillow's ImageOps.equalize, within two grey levels: OpenCV's of the negative, whose sum starts at white."""
    return invert(fn.equalize(invert(images)))


def _blend(degenerate: DataNode, images: DataNode, factor) -> DataNode:
    """Pillow's Image.blend within one grey level; int16 and back costs a third of the float arithmetic."""
    scale = partial(fn.brightness_contrast, dtype=types.INT16)
    own = scale(images, brightness=factor, brightness_shift=_CUT / 32767)
    return fn.cast(own + scale(degenerate, brightness=1 - factor), dtype=types.UINT8)


def _grey(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _where(condition: DataNode) -> DataNode:
    return fn.reinterpret(condition, dtype=types.UINT8)  # a product of bool and uint8 is slow


def _level(value: int, dtype=types.UINT8) -> Any:
    return types.Constant(value, dtype=dtype)


def _put(node, device: str):
    return node.gpu() if device == "gpu" and node.device == "cpu" else node
