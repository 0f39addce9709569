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
- Colours are within one grey level of Pillow's. Equalize is within two at 224 x 224, more for small images: Pillow
  counts in steps of a whole number of pixels. Sharpness also sharpens the outermost pixels, which Pillow leaves.
- Posterize to 0 bits, which timm asks for at magnitude 10, is black, as it was in Pillow; 13.0 refuses it.
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
    "Invert": (0, 0, False),  # solarizing from 0 on
    "Solarize": (256, -25.6, False),  # threshold
    "SolarizeAdd": (0, 11, False),
    "AutoContrast": (0, 0, False),
    "Equalize": (0, 0, False),
}
# Without inc1: weaker with the magnitude, or without a sign.
_NOT_INCREASING = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.1, 0.18, False)) | {
    "Posterize": (0, 0.4, False),
    "Solarize": (0, 25.6, False),
}
_WARPS = 5


_PARTS: dict[str, tuple[str, Callable, float, float]] = {
    "m": ("magnitude", int, 0, pymath.inf),
    "n": ("layers", int, 1, pymath.inf),
    "p": ("prob", float, 0, 1),
    "mstd": ("std", float, 0, pymath.inf),
    "mmax": ("most", int, 0, pymath.inf),
    "inc": ("increasing", int, 0, 1),
}


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
        raise ValueError(f"auto_augment={spec!r}: {name!r} is not supported; give one like rand-m9-mstd0.5-inc1")
    fields: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+\.?\d*)", part)
        try:
            field, convert, least, most = _PARTS[match[1]]  # type: ignore[index]
            fields[field] = convert(match[2])  # type: ignore[index]
            if not least <= fields[field] <= most:
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"auto_augment={spec!r}: {part!r} is not supported; give m9 (magnitude), n2 (layers), p0.5, "
                "mstd0.5, mmax10 or inc1, as in timm; timm's other sets of operations (t...) are not there"
            ) from None
    policy = Policy(**fields)
    # timm's words for a uniform law, and for an upper bound that is not set
    std = pymath.inf if policy.std > 100 else policy.std
    return policy._replace(std=std, most=policy.most or Policy().most, increasing=bool(policy.increasing))


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
        images: uint8, HWC, RGB.
        spec: timm's string, see `parse`.
        fill: three grey levels, of what warps leave free; timm's training takes the mean of the normalisation.
        interpolation: DALI's, linear or cubic, of the warps.
        size: (H, W), where all images have the same size. None reads each image's shape, on a GPU only with DALI's
            default executor: ``exec_dynamic=False`` refuses it.

    Returns:
        As `images`.

    Raises:
        ValueError: a spec that `parse` refuses.
    """
    policy = parse(spec)
    leaves = _leaves(policy, partial(_warp, fill=fill, interpolation=interpolation, size=size))
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

    def enhance(operation: Callable) -> Callable:
        return lambda images, factor: operation(images, math.max(factor, 0.1))

    single: dict[str, Callable] = {
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
    leaves: list[tuple[int, Callable]] = [(0, _keep), (2 * _WARPS, warp)]
    for place, name in enumerate(OPERATIONS):
        if name in single:
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


def _warp(images, outcome, argument, **options) -> DataNode:
    """Rotate, ShearX, ShearY, TranslateX or TranslateY: all but one of the arguments are zero."""
    given = fn.one_hot((outcome - 1) // 2, num_classes=_WARPS) * argument
    return warp(images, given[0], given[1:3], given[3:5], **options)


def warp(images, degrees, shear, share, *, fill, interpolation=types.INTERP_LINEAR, size=None) -> DataNode:
    """timm's rotate, shear and translate, as one affine map.

    Args:
        degrees: float32 scalar, counter-clockwise about the centre.
        shear: float32 [2], along x and y, from the upper left corner.
        share: float32 [2], of width and height, by which the content moves left and up.
        fill: three grey levels.
        size: of `rand_augment`.
    """
    # A constant node has the size of the whole batch, and cannot be used where that is split: plain numbers can.
    if size is None:
        shape = images.shape(dtype=types.FLOAT)
        center = fn.stack(shape[1], shape[0]) * 0.5
        offset = share * 2 * center
    else:
        height, width = map(float, size)
        center = [width / 2, height / 2]
        offset = fn.stack(share[0] * width, share[1] * height)
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
    low, high = (reduce(images, axes=[0, 1], keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max))
    flat = low == high
    stretched = (images - low * (low < high)) * _level(255, types.UINT16) // (high - low + flat * _level(255))
    return fn.cast(stretched, dtype=types.UINT8)


def equalize(images: DataNode) -> DataNode:
    """Pillow's ImageOps.equalize, nearly: OpenCV's of the negative, whose sum starts at white."""
    return invert(fn.equalize(invert(images)))


def color_jitter(
    images: DataNode, jitter: float | Sequence[float], *, prob: float = 1.0, grayscale_prob: float = 0.0
) -> DataNode:
    """torchvision's ColorJitter on Pillow images, then its RandomGrayscale.

    Args:
        images: uint8, HWC, RGB.
        jitter: brightness, contrast, saturation and, as a fourth, hue (in turns, up to .5); one number stands for
            the first three. A factor is uniform in [max(0, 1 - jitter), 1 + jitter].
        prob: probability that a sample is jittered.
        grayscale_prob: probability that its colour is taken away.

    Returns:
        As `images`.

    Note:
        The hue is turned in YIQ, linearly, where Pillow turns it in HSV.
    """
    bright, contrasted, saturated, hue = jitter_of(jitter)

    def factor(amount: float) -> DataNode:
        return fn.random.uniform(range=[max(0.0, 1 - amount), 1 + amount])

    steps: list[tuple[Callable, DataNode]] = [
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
        ValueError: not a number, three or four, or one that is negative (hue: above .5).
    """
    amounts: list[Any] = list(jitter) if isinstance(jitter, Sequence) else [jitter] * 3
    amounts += [0.0] * (len(amounts) == 3)
    known = all(isinstance(amount, Real) and 0 <= float(amount) < pymath.inf for amount in amounts)
    if len(amounts) != 4 or not known or amounts[3] > 0.5:
        raise ValueError(
            f"color_jitter={jitter!r}: give a number >= 0, or three or four of them: brightness, contrast, "
            "saturation, hue (at most .5)"
        )
    return tuple(map(float, amounts))  # type: ignore[return-value]


def erase(
    images: DataNode,
    *,
    prob: float = 0.25,
    mode: str = "pixel",
    count: int = 1,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    size: Sequence[int] | None = None,
) -> DataNode:
    """Random erasing (arXiv 1708.04896) with timm's law: area 2 to 33 %, aspect .3 to 3.3, log-uniform.

    Args:
        images: uint8, HWC, of any size.
        prob: probability that a sample is erased.
        mode: what a region is filled with: "const", the mean colour; "rand", one colour of N(mean, std); or
            "pixel", such a colour for each pixel.
        count: a sample has 1 to `count` regions, uniformly, which share the area.
        mean, std: of the normalisation that follows, in units of [0, 1].
        size: of `rand_augment`.

    Returns:
        As `images`.

    Raises:
        ValueError: a mode that there is not.
    """
    if mode not in ERASE_MODES:
        raise ValueError(f"re_mode={mode!r}: give one of {', '.join(map(repr, ERASE_MODES))}")
    fill = partial(_fill, mode=mode, mean=[255 * m for m in mean], std=[255 * s for s in std])
    number = fn.random.choice(count + 1, p=[1 - prob] + [prob / count] * count)
    known = () if size is None else (fn.constant(idata=[int(side) for side in size], dtype=types.INT32),)
    for region in range(count):
        drawn = fn.random.uniform(range=[0.0, 1.0], shape=[_ATTEMPTS + 1, 3])
        images = _if(number > region, fill, _keep, images, drawn, number, *known)
    return images


def region_of(size: DataNode, drawn: DataNode, number: DataNode) -> tuple[DataNode, DataNode]:
    """timm's rule of a region: of ten draws one that is smaller than the image, or none.

    Args:
        size: float32 [2], height and width.
        drawn: float32 [11, 3] in [0, 1): area, aspect and weight of each draw, and last the region's place. The
            draw of most weight is taken where timm takes the first: the same law, but needs no constant.
        number: regions that share the area.

    Returns:
        int32 [2] start, int32 [2] sides, (y, x); sides of 0 where no draw fits.
    """
    tries, place = drawn[:_ATTEMPTS], drawn[_ATTEMPTS, :2]
    area = (tries[:, 0] * (1 / 3 - 0.02) + 0.02) * (size[0] * size[1]) / number
    aspect = math.exp((tries[:, 1] * 2 - 1) * pymath.log(1 / 0.3))
    sides = fn.cast(math.sqrt(fn.stack(area * aspect, area / aspect, axis=1)), dtype=types.INT32)
    fits = fn.reductions.min(fn.cast(sides < size, dtype=types.INT32), axes=[1], keep_dims=True)
    weight = fits * tries[:, 2:]
    taken = fits * (weight == fn.reductions.max(weight, axes=[0], keep_dims=True))
    side = fn.reductions.max(sides * taken, axes=[0])
    return fn.cast(math.floor(place * (size - side + 1)), dtype=types.INT32), side


def _fill(images, drawn, number, size=None, *, mode, mean, std) -> DataNode:
    if size is None:
        size = images.shape(dtype=types.INT32)[:2]
    start, sides = region_of(fn.cast(size, dtype=types.FLOAT), drawn, number)
    if mode == "pixel":
        paste = partial(_paste_noise, mean=mean, std=std)
        # On a GPU an empty region of multi_paste spills over the image.
        return _if(fn.reductions.min(sides) > 0, paste, _keep, images, start, sides, size)
    colour = _noise(math.min(sides, 0) + 1, "cpu", mean, std)  # of one pixel
    start, sides, colour = (fn.cast(node, dtype=types.FLOAT) for node in (start, sides, colour))
    level = [round(m) for m in mean] if mode == "const" else fn.reshape(colour, shape=[-1])
    return fn.erase(images, anchor=start, shape=sides, axis_names="HW", fill_value=level)


def _paste_noise(images, start, sides, size, *, mean, std) -> DataNode:
    # On a GPU multi_paste reads every input as if it had the first one's size.
    noise = fn.pad(_noise(sides, images.device, mean, std), axes=[0, 1], shape=size)
    return fn.multi_paste(
        images,
        noise,
        in_anchors=fn.stack(start * 0, start * 0),
        out_anchors=fn.stack(start * 0, start),
        shapes=fn.stack(size, sides),
        output_size=size,
    )


def _noise(sides, device, mean, std) -> DataNode:
    noise = fn.random.normal(shape=fn.pad(sides, shape=[3], fill_value=len(mean)), device=device)
    return fn.crop_mirror_normalize(
        fn.reshape(noise, layout="HWC"),
        mean=[-m / s for m, s in zip(mean, std, strict=True)],
        std=[1 / s for s in std],
        dtype=types.UINT8,
        output_layout="HWC",
    )


def _keep(images: DataNode, *_) -> DataNode:
    return images


def _sometimes(prob: float, operation: Callable, *nodes: DataNode) -> DataNode:
    if prob == 0:
        return nodes[0]
    if prob == 1:
        return operation(*nodes)
    chosen = fn.cast(fn.random.coin_flip(probability=prob), dtype=types.BOOL)
    return _if(chosen, operation, _keep, *nodes)


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
