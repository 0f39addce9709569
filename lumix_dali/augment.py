"""timm's augmentation as DALI graph functions: RandAugment, colour jitter, random erasing.

Images are uint8 HWC RGB, on either backend; the draws stay on the CPU. Each operation takes the same arguments as
timm's function of the same name (``timm.data.auto_augment``), with which the tests compare it. Each sample gets one
operation per layer, so the batch is split by operation (what DALI makes of an ``if``): no sample pays for an operation
that it does not get. Apply all of this before mixing: moving an image afterwards makes its box wrong.

Departures from timm 1.0.31:

- Rotate, Shear and Translate use the interpolation of the training crop, and bilinear for "random", where timm chooses
  bilinear or bicubic for each operation. OpenCV's bicubic kernel has a = -.75, Pillow's -.5, and OpenCV blends the
  fill colour into the outermost pixel.
- Colours are within one grey level of Pillow's. Equalize is within two levels at 224 x 224, and less exact for small
  images, because Pillow rounds its step to a whole number of pixels. Sharpness also sharpens the outermost pixels,
  which Pillow leaves unchanged.
- Posterize to 0 bits, which timm requests at magnitude 10, gives black, as it did in Pillow; Pillow 13.0 rejects it.
- `color_jitter` applies its steps in a fixed order, torchvision in a random one. The result differs only where a step
  clips.
- `erase` comes before mixing, as in the training code of DeiT, Swin and ConvNeXt. timm's own prefetcher erases
  afterwards, when λ0 no longer matches the pixels. The noise is rounded and clipped to uint8.
"""

from __future__ import annotations

import math as pymath
import re
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from . import checks
from .graph import as_written, branch, first, put

Operation = Callable[..., DataNode]
Number: TypeAlias = float | DataNode
EraseMode = Literal["const", "rand", "pixel"]
# How often timm redraws a region that does not fit.
_ATTEMPTS = 10
# Pillow truncates where DALI rounds; not quite a half, so that whole numbers do not change.
_CUT = -0.499


class Policy(NamedTuple):
    """A parsed RandAugment string of timm's.

    Attributes:
        layers: operations per sample, drawn with replacement.
        prob: probability that a layer does anything.
        magnitude, std: mean and standard deviation of the magnitude; an infinite std: uniform in [0, magnitude].
        max_magnitude: the magnitude is clipped to [0, max_magnitude].
        increasing: every operation gets stronger as the magnitude grows.
    """

    layers: int = 2
    prob: float = 0.5
    magnitude: int = 10
    std: float = 0.0
    max_magnitude: int = 10
    increasing: bool = False


# In timm an operation's argument is base + slope · magnitude, where `signed` with a random sign of the slope. Warps
# come first because they share one operator.
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
    "Invert": (0, 0, False),  # solarizing from 0 on
    "Solarize": (256, -25.6, False),  # threshold
    "SolarizeAdd": (0, 11, False),
    "AutoContrast": (0, 0, False),
    "Equalize": (0, 0, False),
}
# Without inc1: weaker as the magnitude grows, or without a sign.
_NOT_INCREASING = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.1, 0.18, False)) | {
    "Posterize": (0, 0.4, False),
    "Solarize": (0, 25.6, False),
}
_WARPS = 5


_PARTS: dict[str, tuple[str, Callable[[str], float], float, float]] = {
    "m": ("magnitude", int, 0, pymath.inf),
    "n": ("layers", int, 1, pymath.inf),
    "p": ("prob", float, 0, 1),
    "mstd": ("std", float, 0, pymath.inf),
    "mmax": ("max_magnitude", int, 0, pymath.inf),
    "inc": ("increasing", int, 0, 1),
}


def parse(spec: str) -> Policy:
    """Parses one of timm's strings, such as "rand-m9-mstd0.5-inc1", with its parts in any order.

    Args:
        spec: ``rand``, then ``m`` magnitude, ``n`` layers, ``p`` probability of each, ``mstd`` standard
            deviation (above 100: uniform), ``mmax`` upper bound of the magnitude, ``inc`` 0 or 1. Parts that are left
            out have timm's defaults.

    Raises:
        ValueError: the policy is another one, a part is unknown, or a number is outside its range.
    """
    name, *parts = spec.split("-") if isinstance(spec, str) else [repr(spec)]
    if name != "rand":
        raise ValueError(f"auto_augment={spec!r}: {name!r} is not supported; give one like rand-m9-mstd0.5-inc1")
    fields: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+\.?\d*)", part)
        try:
            field, convert, low, high = _PARTS[match[1]]  # type: ignore[index]
            fields[field] = convert(match[2])  # type: ignore[index]
            if not low <= fields[field] <= high:
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"auto_augment={spec!r}: {part!r} is not supported; give m9 (magnitude), n2 (layers), p0.5, "
                "mstd0.5, mmax10 or inc1, as in timm; timm's other sets of operations (t...) are not supported"
            ) from None
    policy = Policy(**fields)
    # How timm spells a uniform distribution, and an upper bound that is not set
    std = pymath.inf if policy.std > 100 else policy.std
    return policy._replace(
        std=std, max_magnitude=policy.max_magnitude or Policy().max_magnitude, increasing=bool(policy.increasing)
    )


@as_written
def rand_augment(
    images: DataNode,
    spec: str = "rand-m9-mstd0.5-inc1",
    *,
    fill: Sequence[float] = (128, 128, 128),
    interpolation: int = types.INTERP_LINEAR,
    size: Sequence[int] | None = None,
) -> DataNode:
    """RandAugment (arXiv 1909.13719) with timm's 15 operations and levels.

    Args:
        images: uint8 HWC RGB.
        spec: timm's string, see `parse`.
        fill: three grey levels for the area that warps uncover; timm's training uses the mean of the normalisation.
        interpolation: DALI's linear or cubic, for the warps.
        size: (H, W) if all images have the same size. None reads each image's shape, which on a GPU needs DALI's
            default executor (not ``exec_dynamic=False``).

    Returns:
        Images like `images`.

    Raises:
        ValueError: `parse` rejects the spec.
    """
    policy = parse(spec)
    leaves = _leaves(policy, partial(_warp, fill=fill, interpolation=interpolation, size=size))
    outcome, argument = draw(policy)
    for layer in range(policy.layers):
        images = _select(leaves, images, outcome[layer], argument[layer])
    return images


def draw(policy: Policy) -> tuple[DataNode, DataNode]:
    """Draws what each layer does to each sample.

    Returns:
        int32 [layers], the outcomes: 0 for nothing, 2k + 1 and 2k + 2 for the k-th of `OPERATIONS` with positive and
        negative sign. float32 [layers], the operations' arguments before timm converts them to integers.
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


def _magnitude(policy: Policy) -> Number:
    if policy.std == 0:
        return float(min(policy.magnitude, policy.max_magnitude))
    if policy.std == pymath.inf:
        drawn = fn.random.uniform(range=[0.0, float(policy.magnitude)], shape=[policy.layers])
    else:
        drawn = fn.random.normal(mean=float(policy.magnitude), stddev=policy.std, shape=[policy.layers])
    return math.clamp(drawn, 0.0, float(policy.max_magnitude))


def _leaves(policy: Policy, warp: Operation) -> list[tuple[int, Operation]]:
    """Pairs (last outcome, function of images, outcome and argument), in the order of the outcomes."""
    whole = math.ceil if policy.increasing else math.floor  # 4 - int(.4 m), or int(.4 m)

    def enhance(operation: Operation) -> Operation:
        return lambda images, factor: operation(images, math.max(factor, 0.1))

    single: dict[str, Operation] = {
        "Brightness": enhance(brightness),
        "Color": enhance(color),
        "Contrast": enhance(contrast),
        "Sharpness": enhance(sharpness),
        "Posterize": lambda images, bits: posterize(images, whole(bits)),
        "Solarize": lambda images, threshold: solarize(images, whole(threshold)),
        "SolarizeAdd": lambda images, add: solarize_add(images, math.min(math.floor(add), 128)),
        "AutoContrast": lambda images, _: auto_contrast(images),
        "Equalize": lambda images, _: equalize(images),
    }
    leaves: list[tuple[int, Operation]] = [(0, first), (2 * _WARPS, warp)]
    for number, name in enumerate(OPERATIONS):
        if name in single:
            leaves.append((2 * number + 2, lambda images, _, argument, name=name: single[name](images, argument)))
    return leaves


def _select(
    leaves: Sequence[tuple[int, Operation]], images: DataNode, outcome: DataNode, argument: DataNode
) -> DataNode:
    (last, operation), *others = leaves
    if not others:
        return operation(images, outcome, argument)
    return branch(outcome <= last, operation, partial(_select, others), images, outcome, argument)


def _warp(images: DataNode, outcome: DataNode, argument: DataNode, **options: Any) -> DataNode:
    """Rotate, ShearX, ShearY, TranslateX or TranslateY: all arguments but one are zero."""
    given = fn.one_hot((outcome - 1) // 2, num_classes=_WARPS) * argument
    return warp(images, given[0], given[1:3], given[3:5], **options)


@as_written
def warp(
    images: DataNode,
    degrees: Number,
    shear: DataNode,
    shift: DataNode,
    *,
    fill: Sequence[float],
    interpolation: int = types.INTERP_LINEAR,
    size: Sequence[int] | None = None,
) -> DataNode:
    """timm's rotate, shear and translate, as one affine map.

    Args:
        images: uint8 HWC.
        degrees: float32 scalar, counter-clockwise about the centre.
        shear: float32 [2], along x and y, from the upper left corner.
        shift: float32 [2], fractions of width and height by which the content moves left and up.
        fill, interpolation, size: as in `rand_augment`.
    """
    # Plain numbers, because a constant node has the size of the whole batch and cannot be used after a split.
    if size is None:
        shape = images.shape(dtype=types.FLOAT)
        center = fn.stack(shape[1], shape[0]) * 0.5
        offset = shift * 2 * center
    else:
        height, width = map(float, size)
        center = [width / 2, height / 2]
        offset = fn.stack(shift[0] * width, shift[1] * height)
    matrix = fn.transforms.rotation(angle=degrees, center=center)
    matrix = fn.transforms.shear(matrix, shear=shear)
    matrix = fn.transforms.translation(matrix, offset=offset)
    # Third row (0, 0, 1)
    matrix = fn.pad(fn.pad(fn.reshape(matrix, shape=[6]), shape=[8]), shape=[9], fill_value=1)
    return fn.experimental.warp_perspective(
        images,
        matrix=fn.reshape(matrix, shape=[3, 3]),
        fill_value=[float(level) for level in fill],
        interp_type=interpolation,
    )


@as_written
def brightness(images: DataNode, factor: Number) -> DataNode:
    """Pillow's ImageEnhance.Brightness: 0 is black, 1 the image."""
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=_CUT / 255)


@as_written
def color(images: DataNode, factor: Number) -> DataNode:
    """Pillow's ImageEnhance.Color: 0 is grey, 1 the image."""
    return _blend(_grey(images), images, factor)


@as_written
def contrast(images: DataNode, factor: Number) -> DataNode:
    """Pillow's ImageEnhance.Contrast: 0 is the mean of the grey image, 1 the image."""
    return _blend(fn.reductions.mean(_grey(images), axes=[0, 1], keep_dims=True), images, factor)


@as_written
def sharpness(images: DataNode, factor: DataNode) -> DataNode:
    """Pillow's ImageEnhance.Sharpness: 0 is smooth, 1 the image."""
    around = (1 - factor) * (1 / 13)
    centre = fn.reshape(factor + around * 4, shape=[1, 1])
    kernel = fn.slice(centre, start=[-1, -1], shape=[3, 3], axes=[0, 1], out_of_bounds_policy="pad") + around
    return fn.filter(images, put(kernel, images.device))


@as_written
def posterize(images: DataNode, bits: DataNode) -> DataNode:
    """Keeps the highest `bits` of each grey level (a whole number; below 1 gives black)."""
    kept = fn.cast(256 - math.fpow(2.0, 8 - bits), dtype=types.UINT8)  # clipped to [0, 255]
    return images & put(kept, images.device)


@as_written
def solarize(images: DataNode, threshold: DataNode) -> DataNode:
    """Inverts the grey levels >= `threshold` (a whole number)."""
    return images ^ _where(images >= put(threshold, images.device)) * _level(255)


@as_written
def solarize_add(images: DataNode, add: DataNode) -> DataNode:
    """Adds `add` (a whole number up to 128) to the grey levels below 128."""
    return images + _where(images < _level(128)) * put(fn.cast(add, dtype=types.UINT8), images.device)


@as_written
def invert(images: DataNode) -> DataNode:
    """255 minus each grey level."""
    return images ^ _level(255)


@as_written
def auto_contrast(images: DataNode) -> DataNode:
    """Stretches each channel to [0, 255]; a channel without contrast stays unchanged."""
    low, high = (reduce(images, axes=[0, 1], keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max))
    flat = low == high
    stretched = (images - low * (low < high)) * _level(255, types.UINT16) // (high - low + flat * _level(255))
    return fn.cast(stretched, dtype=types.UINT8)


@as_written
def equalize(images: DataNode) -> DataNode:
    """Approximates Pillow's ImageOps.equalize by OpenCV's of the negative, whose sum starts at white."""
    return invert(fn.equalize(invert(images)))


@as_written
def color_jitter(
    images: DataNode, jitter: float | Sequence[float], *, prob: float = 1.0, grayscale_prob: float = 0.0
) -> DataNode:
    """torchvision's ColorJitter on Pillow images, then its RandomGrayscale.

    Args:
        images: uint8 HWC RGB.
        jitter: amounts for brightness, contrast, saturation and optionally hue (in turns, up to .5); one number stands
            for the first three. Factors are uniform in [max(0, 1 - jitter), 1 + jitter].
        prob: probability that a sample is jittered.
        grayscale_prob: probability that a sample becomes grey.

    Returns:
        Images like `images`.

    Note:
        The hue is rotated linearly in YIQ; Pillow rotates it in HSV.
    """
    bright, contrasted, saturated, hue = jitter_of(jitter)

    def factor(amount: float) -> DataNode:
        return fn.random.uniform(range=[max(0.0, 1 - amount), 1 + amount])

    steps: list[tuple[Operation, DataNode]] = [
        (operation, factor(amount))
        for operation, amount in ((brightness, bright), (contrast, contrasted), (color, saturated))
        if amount
    ]
    if hue:
        turned = fn.random.uniform(range=[-360 * hue, 360 * hue])
        steps.append((lambda images, degrees: fn.hue(images, hue=degrees), turned))

    def jittered(images: DataNode, *factors: DataNode) -> DataNode:
        for (operation, _), drawn in zip(steps, factors, strict=True):
            images = operation(images, drawn)
        return images

    if steps:
        images = _sometimes(prob, jittered, images, *(drawn for _, drawn in steps))
    return _sometimes(grayscale_prob, lambda images: color(images, 0.0), images)


def jitter_of(jitter: float | Sequence[float]) -> tuple[float, float, float, float]:
    """Amounts of brightness, contrast, saturation and hue.

    Raises:
        ValueError: there are not one, three or four numbers, one is negative, or the hue is above .5.
    """
    amounts: list[Any] = list(jitter) if isinstance(jitter, Sequence) else [jitter] * 3
    amounts += [0.0] * (len(amounts) == 3)
    numbers = all(isinstance(amount, Real) and not isinstance(amount, bool) for amount in amounts)
    known = numbers and all(0 <= float(amount) < pymath.inf for amount in amounts)
    if len(amounts) != 4 or not known or amounts[3] > 0.5:
        raise ValueError(
            f"color_jitter={jitter!r}: give a number >= 0, or three or four of them: brightness, contrast, "
            "saturation, hue (at most .5)"
        )
    return tuple(map(float, amounts))  # type: ignore[return-value]


@as_written
def erase(
    images: DataNode,
    *,
    prob: float = 0.25,
    mode: EraseMode = "pixel",
    count: int = 1,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    size: Sequence[int] | None = None,
) -> DataNode:
    """Random erasing (arXiv 1708.04896) as in timm: area 2 to 33 %, aspect ratio .3 to 3.3, log-uniform.

    Args:
        images: uint8 HWC, of any size.
        prob: probability that a sample is erased.
        mode: the content of a region: "const", the mean colour; "rand", one colour from N(mean, std); "pixel", such a
            colour for each pixel.
        count: a sample has 1 to `count` regions (uniform), which share the area.
        mean, std: of the normalisation that follows, in units of [0, 1].
        size: as in `rand_augment`.

    Returns:
        Images like `images`.

    Raises:
        ValueError: the mode is unknown.
    """
    checks.one_of("re_mode", mode, get_args(EraseMode))
    fill = partial(_fill, mode=mode, mean=[255 * m for m in mean], std=[255 * s for s in std])
    number = fn.random.choice(count + 1, p=[1 - prob] + [prob / count] * count)
    known = () if size is None else (fn.constant(idata=[int(side) for side in size], dtype=types.INT32),)
    for region in range(count):
        drawn = fn.random.uniform(range=[0.0, 1.0], shape=[_ATTEMPTS + 1, 3])
        images = branch(number > region, fill, first, images, drawn, number, *known)
    return images


@as_written
def region_of(size: DataNode, drawn: DataNode, number: DataNode) -> tuple[DataNode, DataNode]:
    """timm's rule for a region: one of ten draws that is smaller than the image, or none.

    Args:
        size: float32 [2], height and width.
        drawn: float32 [11, 3] in [0, 1): area, aspect ratio and weight of each draw, and in the last row the position.
            timm takes the first draw that fits. This takes the one of the largest weight, which has the same
            distribution and needs no constant.
        number: how many regions share the area.

    Returns:
        int32 [2] start and int32 [2] sides, both (y, x); the sides are 0 if no draw fits.
    """
    tries, corner = drawn[:_ATTEMPTS], drawn[_ATTEMPTS, :2]
    area = (tries[:, 0] * (1 / 3 - 0.02) + 0.02) * (size[0] * size[1]) / number
    aspect = math.exp((tries[:, 1] * 2 - 1) * pymath.log(1 / 0.3))
    sides = fn.cast(math.sqrt(fn.stack(area * aspect, area / aspect, axis=1)), dtype=types.INT32)
    fits = fn.reductions.min(fn.cast(sides < size, dtype=types.INT32), axes=[1], keep_dims=True)
    weight = fits * tries[:, 2:]
    taken = fits * (weight == fn.reductions.max(weight, axes=[0], keep_dims=True))
    side = fn.reductions.max(sides * taken, axes=[0])
    return fn.cast(math.floor(corner * (size - side + 1)), dtype=types.INT32), side


def _fill(
    images: DataNode,
    drawn: DataNode,
    number: DataNode,
    size: DataNode | None = None,
    *,
    mode: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> DataNode:
    if size is None:
        size = images.shape(dtype=types.INT32)[:2]
    start, sides = region_of(fn.cast(size, dtype=types.FLOAT), drawn, number)
    paste = partial(_paste, mode=mode, mean=mean, std=std)
    # On a GPU an empty region of multi_paste overwrites the rest of the image.
    return branch(fn.reductions.min(sides) > 0, paste, first, images, start, sides, size)


def _paste(images: DataNode, start: DataNode, sides: DataNode, size: DataNode, **content: Any) -> DataNode:
    """Pastes a region; `fn.erase` would allocate memory for every batch on a GPU, and has no colour for each pixel."""
    # On a GPU multi_paste reads every input as if it had the size of the first.
    region = fn.pad(_content(sides, images.device, **content), axes=[0, 1], shape=size)
    return fn.multi_paste(
        images,
        region,
        in_anchors=fn.stack(start * 0, start * 0),
        out_anchors=fn.stack(start * 0, start),
        shapes=fn.stack(size, sides),
        output_size=size,
    )


def _content(sides: DataNode, device: str, mode: str, mean: Sequence[float], std: Sequence[float]) -> DataNode:
    """uint8 HWC of these sides: normally distributed pixels, or pixels of one such colour, or of the mean."""
    shape = fn.pad(sides, shape=[3], fill_value=len(mean))
    normal = fn.random.normal(shape=shape, stddev=float(mode == "pixel"), device=device)
    if mode == "rand":
        colour = fn.random.normal(shape=fn.pad(sides * 0 + 1, shape=[3], fill_value=len(mean)))
        normal = normal + put(colour, device)
    return fn.crop_mirror_normalize(
        fn.reshape(normal, layout="HWC"),
        mean=[-m / s for m, s in zip(mean, std, strict=True)],
        std=[1 / s for s in std],
        dtype=types.UINT8,
        output_layout="HWC",
    )


def _sometimes(prob: float, operation: Operation, *nodes: DataNode) -> DataNode:
    if prob == 0:
        return nodes[0]
    if prob == 1:
        return operation(*nodes)
    chosen = fn.cast(fn.random.coin_flip(probability=prob), dtype=types.BOOL)
    return branch(chosen, operation, first, *nodes)


def _blend(degenerate: DataNode, images: DataNode, factor: Number) -> DataNode:
    """Pillow's Image.blend within one grey level; int16 costs a third of what float arithmetic costs."""
    scale = partial(fn.brightness_contrast, dtype=types.INT16)
    own = scale(images, brightness=factor, brightness_shift=_CUT / 32767)
    return fn.cast(own + scale(degenerate, brightness=1 - factor), dtype=types.UINT8)


def _grey(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _where(condition: DataNode) -> DataNode:
    return fn.reinterpret(condition, dtype=types.UINT8)  # multiplying bool by uint8 is slow


def _level(value: int, dtype: Any = types.UINT8) -> Any:
    return types.Constant(value, dtype=dtype)
