"""CutMix and Mixup as DALI graph functions.

``mix`` is ``apply(draw())``: the law of `lumix_dali.mixing`, drawn by DALI's own operators, on either backend, for a
pipeline whose batches the host does not know. A callback that does know its batch draws with `mixing.draw`, which costs
a tenth, and the graph pastes with ``lay``: that is what the loader does.

On a GPU pipeline the draws stay on the CPU, where DALI's random operators and argument inputs live; pixels, λ0 and
box are made on the GPU. A small CPU operator costs about 1 µs per sample whatever it computes, so the draw is written
for few operators: both pasted regions (the whole canvas, and the box) travel as one 2x2 tensor.

`multi_paste` is never given an empty region: on a GPU it would spill over the image.

Words: the *canvas* is the sample at its own place, the *partner* the sample mixed into it, ``lam0`` the
partner's weight. timm and torchvision weigh the canvas: ``lam_timm = 1 - lam0``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple, cast

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from .mixing import Mixing, Mode, Regions
from .target import Kind, MixTarget

# A column picks the region: row 0 the canvas, row 1 the box.
_CANVAS, _BOX = np.array([[1], [0]], np.int32), np.array([[0], [1]], np.int32)
# A box of λ0 = 16 has four times the image's sides: clipped, it is the whole image wherever its centre lies.
_WHOLE = np.array([[16], [0]], np.float32)
# Two roundings must not add up to 256 where both halves of a white pixel end in .5.
BELOW_HALF = -1e-3 / 255


class Draw(NamedTuple):
    """What is drawn for each sample: CPU DataNodes, since they feed argument inputs.

    Attributes:
        partner: int32 scalar, the partner's index in the batch.
        is_cutmix, is_mixup: bool scalars; None: left out of the graph.
        start, stop: int32 [2, 2], (y, x) corners of the canvas (row 0) and of the box (row 1).
        weight: float32 scalar, Mixup's λ0, zero for other kinds.
        lam0: float32 scalar, to be emitted as it is; None: pasted pixels are counted, and `weight` added.
        pixels: pixels of an image; None: not known when the graph is defined.
    """

    partner: DataNode
    is_cutmix: DataNode | None = None
    is_mixup: DataNode | None = None
    start: Any = None
    stop: Any = None
    weight: DataNode | None = None
    lam0: DataNode | None = None
    pixels: int | None = None


def mix(
    images: DataNode,
    labels: DataNode,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 1.0,
    cutmix_minmax: Sequence[float] | None = None,
    prob: float | DataNode = 1.0,
    switch_prob: float = 0.5,
    mode: Mode = "elem",
    correct_lam: bool = True,
    size: Sequence[int] | DataNode | None = None,
) -> tuple[DataNode, MixTarget]:
    """CutMix (arXiv 1905.04899) or Mixup (arXiv 1710.09412) with a permutation of the batch, LUMix Eq. 1.

    Args:
        images: uint8, HWC, one size for the whole batch, flipped already (a later flip falsifies the box).
        labels: one integer a sample, of any shape with one element.
        mixup_alpha: Mixup's λ0 ~ Beta(α, α); 0 leaves Mixup out of the graph.
        cutmix_alpha: CutMix' drawn λ0 ~ Beta(α, α); 0 leaves CutMix out of the graph.
        cutmix_minmax: (low, high) in [0, 1]; sides are then uniform between these fractions of the image's,
            the box lies inside it, and `cutmix_alpha` is not used.
        prob: probability in [0, 1] that a sample is mixed; a float DataNode may change it at run time.
        switch_prob: probability in [0, 1] of CutMix, given that a sample is mixed and both are on.
        mode: "elem", one draw per sample, or "batch", one per batch. Partners always differ by sample.
        correct_lam: count λ0 in pixels of the clipped box; False emits λ0 as drawn.
        size: (H, W) of the images: two integers, or int32 [2] on the CPU. It is not checked: CutMix with a larger
            size raises DALI's error, a smaller one leaves pixels undefined. None reads the shape of `images`,
            at some cost, and on a GPU only with DALI's default executor: ``exec_dynamic=False`` refuses it.

    Returns:
        Mixed images, as `images`, and their `MixTarget` of DataNodes, all on the images' device.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: (DALI's, when the batch runs) images of unequal size; with Mixup alone the message is
            about shapes that do not broadcast. Resize them to one size before. Labels of more than one element.

    Note:
        The arguments mean what timm's `Mixup` means, but partners are a random permutation in which nobody
        is his own partner, where timm flips the batch. A batch of one stays unmixed. Mixup is
        rounded to uint8 within one grey level. With `cutmix_minmax`, λ0 is always counted, as in timm.
    """
    if size is None:
        size = images.shape(dtype=types.INT32)[:2]
    at_run_time = prob if isinstance(prob, DataNode) else None
    mixing = Mixing(
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        cutmix_minmax=cast(Any, cutmix_minmax),
        prob=1.0 if isinstance(prob, DataNode) else prob,
        switch_prob=switch_prob,
        mode=mode,
        correct_lam=correct_lam,
    )
    return apply(images, labels, draw(size, mixing, at_run_time))


def cutmix(images: DataNode, labels: DataNode, *, alpha: float = 1.0, **options) -> tuple[DataNode, MixTarget]:
    """CutMix alone (arXiv 1905.04899): `mix` with ``cutmix_alpha=alpha``; `options` are those of `mix`."""
    return mix(images, labels, mixup_alpha=0.0, cutmix_alpha=alpha, **options)


def mixup(images: DataNode, labels: DataNode, *, alpha: float = 0.8, **options) -> tuple[DataNode, MixTarget]:
    """Mixup alone (arXiv 1710.09412): `mix` with ``mixup_alpha=alpha``; `options` are those of `mix`."""
    return mix(images, labels, mixup_alpha=alpha, cutmix_alpha=0.0, **options)


def unmixed(labels: DataNode, device: str = "cpu") -> MixTarget:
    """The `MixTarget` of samples that nothing is mixed into: λ0, kind and partner 0.

    Args:
        labels: one integer a sample, of any shape with one element.
        device: "cpu" or "gpu", where the target's DataNodes are to be.
    """
    labels = _scalar(labels, device)
    partner = labels * 0
    kind = fn.cast(partner, dtype=types.INT32)
    return MixTarget(labels, labels, fn.cast(kind, dtype=types.FLOAT), kind * np.zeros(4, np.int32), kind, partner)


def draw(size: Sequence[int] | DataNode, mixing: Mixing, prob: DataNode | None = None) -> Draw:
    """Draws partners, kinds, boxes and weights: the law of `mixing.draw`, in the graph.

    Args:
        size: (H, W) of the images: two integers, or int32 [2] on the CPU, such as
            ``images.shape(dtype=types.INT32)[:2]``.
        mixing: the options.
        prob: float scalar on the CPU, instead of ``mixing.prob``.

    Returns:
        A `Draw` for `apply`.
    """
    size, pixels = _size(size)
    partner = fn.batch_permutation(no_fixed_points=True)
    share = _share(partner, mixing.mode)
    is_cutmix, is_mixup = _kinds(partner, share, mixing, mixing.prob if prob is None else prob)
    start = stop = weight = drawn_lam = None
    if is_cutmix is not None:
        if mixing.cutmix_minmax is not None:
            start, stop = _inner_box(size, mixing.cutmix_minmax, share, is_cutmix)
        else:
            drawn_lam = share(fn.random.beta(alpha=mixing.cutmix_alpha, beta=mixing.cutmix_alpha)) * is_cutmix
            start, stop = _box(size, drawn_lam, share)
    if is_mixup is not None:
        weight = share(fn.random.beta(alpha=mixing.mixup_alpha, beta=mixing.mixup_alpha)) * is_mixup
    lam0 = None
    if drawn_lam is not None and not mixing.counts_lam0:
        lam0 = drawn_lam if weight is None else drawn_lam + weight
    return Draw(partner, is_cutmix, is_mixup, start, stop, weight, lam0, pixels)


def given(
    size: Sequence[int] | DataNode,
    partner: DataNode,
    kind: DataNode,
    box: DataNode | None = None,
    weight: DataNode | None = None,
    lam0: DataNode | None = None,
) -> Draw:
    """A `Draw` of the caller's own partners, boxes and weights, for `apply`.

    Args:
        size: (H, W) of the images: two integers, or int32 [2] on the CPU.
        partner: int32 scalar on the CPU, index of the partner in the batch.
        kind: int32 scalar on the CPU, 0 none, 1 Mixup, 2 CutMix.
        box: int32 [4] on the CPU, (y0, x0, y1, x1), half-open, inside the image; read where kind is 2.
        weight: float32 scalar on the CPU, the partner's blend weight in [0, 1]; read where kind is 1.
        lam0: float32 scalar, emitted as it is; None: counted in pixels (CutMix), `weight` (Mixup).

    Raises:
        ValueError: neither `box` nor `weight` is given.
    """
    if box is None and weight is None:
        raise ValueError("box=None, weight=None: nothing to mix; give boxes for CutMix, weights for Mixup, or both")
    size, pixels = _size(size)
    drawn = Draw(partner, lam0=lam0, pixels=pixels)
    if box is not None:
        is_cutmix = kind == int(Kind.CUTMIX)
        start, stop = _regions(size, box[:2] * is_cutmix, box[2:] * is_cutmix)
        drawn = drawn._replace(is_cutmix=is_cutmix, start=start, stop=stop)
    if weight is not None:
        is_mixup = kind == int(Kind.MIXUP)
        drawn = drawn._replace(is_mixup=is_mixup, weight=weight * is_mixup)
    return drawn


def apply(images: DataNode, labels: DataNode, drawn: Draw) -> tuple[DataNode, MixTarget]:
    """Mixes images as drawn and says what was mixed: LUMix Eq. 1, with λ0 = r_w·r_h / HW of the clipped box.

    Args:
        images: uint8, HWC, one size for the whole batch.
        labels: one integer a sample, of any shape with one element.
        drawn: from `draw` or `given`.

    Returns:
        Mixed images, as `images`, and their `MixTarget` of DataNodes, all on the images' device.
    """
    device = images.device
    mixed = images
    partners = fn.permute_batch(images, indices=drawn.partner)
    kinds, weights = [], []
    if drawn.is_cutmix is not None:
        is_cutmix, extent = _put(drawn.is_cutmix, device), drawn.stop - drawn.start
        mixed = _paste(images, partners, drawn.start, extent)
        box = fn.cat(_put(drawn.start, device), _put(drawn.stop, device), axis=1)[1] * is_cutmix
        kinds.append(is_cutmix * int(Kind.CUTMIX))
        weights.append(_area_ratio(_put(extent, device), drawn.pixels))
    if drawn.is_mixup is not None:
        mixed = _blend(images, partners, mixed, drawn.weight, drawn.is_mixup)
        kinds.append(_put(drawn.is_mixup, device) * int(Kind.MIXUP))
        weights.append(_put(drawn.weight, device))
    kind = reduce(add, kinds)  # a sample is of one kind: every other addend is zero
    lam0 = reduce(add, weights) if drawn.lam0 is None else _put(drawn.lam0, device)
    if drawn.is_cutmix is None:
        box = kind * np.zeros(4, np.int32)
    labels = _scalar(labels, device)
    partner = fn.cast(_put(drawn.partner, device), dtype=types.INT64)
    return mixed, MixTarget(labels, fn.permute_batch(labels, indices=drawn.partner), lam0, box, kind, partner)


def lay(images: DataNode, patches: Regions, with_mixup: bool = True) -> DataNode:
    """Mixes images by the patches of `mixing.regions`: LUMix Eq. 1 for a batch that the host has drawn.

    Args:
        images: uint8, HWC, all of the size that the patches are made for.
        patches: DataNodes on the CPU. For Mixup without CutMix `anchors` and `shapes` may be None, and `ids` is then
            the second patch's, an int32 scalar. Without `is_mixup` every sample is blended, those of other kinds
            with a weight of 0 or 1, which is exact: a GPU pays by operator, where a CPU pays by pixel.
        with_mixup: whether there is any Mixup; False: only pastes.

    Returns:
        Mixed images, as `images`.
    """
    if patches.anchors is None:
        pasted = fn.permute_batch(images, indices=patches.ids)
    else:
        pasted = fn.multi_paste(
            images,
            in_ids=patches.ids,
            in_anchors=patches.anchors,
            out_anchors=patches.anchors,
            shapes=patches.shapes,
        )
    if not with_mixup:
        return pasted
    if patches.is_mixup is None:
        return _weighted(images, pasted, patches.weight)
    return _blend(images, pasted, pasted, patches.weight, patches.is_mixup)


def count_lam0(patches: Regions, size: Sequence[int]) -> DataNode:
    """λ0 = r_w·r_h / HW of the box that `lay` pastes, or Mixup's weight (LUMix Eq. 1); float32 scalar on the CPU.

    Args:
        patches: as `lay` takes them.
        size: (H, W) of the images.
    """
    if patches.height is None:
        return patches.weight
    # The quotient first: of the whole image it is exactly 1, and Mixup's weight stays what it is.
    return patches.weight * (patches.height * patches.width / float(size[0] * size[1]))


def _share(partner: DataNode, mode: str) -> Callable[[DataNode], DataNode]:
    if mode == "elem":
        return lambda node: node
    first = partner * 0  # everybody takes the first sample's draw
    return lambda node: fn.permute_batch(node, indices=first)


def _kinds(partner: DataNode, share, mixing: Mixing, prob: float | DataNode):
    """Booleans (is_cutmix, is_mixup); None for what is left out."""
    both = mixing.with_mixup and mixing.with_cutmix
    # Without fixed points, neither a sample nor a partner is its own partner, except in a batch of one.
    other = fn.permute_batch(partner, indices=partner)
    if not isinstance(prob, DataNode) and prob == 1 and not both:
        is_mixed = is_cutmix = partner != other
    else:
        chance = share(fn.random.uniform(range=[0.0, 1.0])) + (partner == other)  # alone: 1 or more
        is_mixed = chance < prob
        is_cutmix = chance < prob * mixing.switch_prob if both else is_mixed
    if both:
        return is_cutmix, is_mixed ^ is_cutmix
    return (None, is_mixed) if mixing.with_mixup else (is_cutmix, None)


def _box(size: DataNode, lam: DataNode, share) -> tuple[DataNode, DataNode]:
    """Corners of canvas and box: side = int(size·√λ0), centre uniform over the pixels, then clipped."""
    # fn.cast rounds, and would give both ends of the centre's range half their weight: floor first.
    side = fn.cast(math.floor(math.sqrt(lam + _WHOLE) * size), dtype=types.INT32)
    centre = fn.cast(math.floor(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size), dtype=types.INT32)
    low = centre - side // 2
    return math.clamp(low, 0, size), math.clamp(low + side, 0, size)


def _inner_box(size, minmax, share, is_cutmix) -> tuple[DataNode, DataNode]:
    """timm's `cutmix_minmax`: sides uniform in [int(size·low), int(size·high)), the box anywhere inside."""
    uniform = share(fn.random.uniform(range=[0.0, 1.0], shape=[2, 2]))
    least, most = (fn.cast(math.floor(size * limit), dtype=types.INT32) for limit in minmax)
    side = least + fn.cast(math.floor(uniform[0] * (most - least)), dtype=types.INT32)
    start = fn.cast(math.floor(uniform[1] * (size - side + 1)), dtype=types.INT32)
    return _regions(size, start * is_cutmix, (start + side) * is_cutmix)


def _regions(size: DataNode, start: DataNode, stop: DataNode) -> tuple[DataNode, DataNode]:
    return start * _BOX, size * _CANVAS + stop * _BOX


def _size(size: Sequence[int] | DataNode) -> tuple[DataNode, int | None]:
    """The size as a DataNode, and its pixels if it is given in numbers."""
    if isinstance(size, DataNode):
        return size, None
    sides = np.asarray(size)
    if sides.shape != (2,) or sides.dtype.kind not in "iu" or (sides < 1).any():
        raise ValueError(f"size={size!r}: give (height, width) of the images, two integers > 0, or a DataNode")
    height, width = sides.tolist()
    return fn.constant(idata=[height, width], dtype=types.INT32), height * width


def _area_ratio(extent: DataNode, pixels: int | None) -> DataNode:
    if pixels is not None:
        return extent[1, 0] * extent[1, 1] / float(pixels)
    area = extent[:, 0] * extent[:, 1]
    return area[1] / area[0]


def _paste(images: DataNode, partners: DataNode, start: DataNode, extent: DataNode) -> DataNode:
    """The partner's box over each image. Samples with an empty box bypass the paste.

    On a GPU an empty region of `multi_paste` spills over the image.
    """
    has_box = fn.reductions.min(extent) > 0
    split = fn._conditional.split
    (own, kept), (partner, _), (start, _), (extent, _) = (
        split(node, predicate=has_box, _if_stmt=True) for node in (images, partners, start, extent)
    )
    pasted = fn.multi_paste(own, partner, in_anchors=start, out_anchors=start, shapes=extent)
    return fn._conditional.merge(pasted, kept, predicate=has_box)


def _blend(images: DataNode, partners: DataNode, others: DataNode, weight: DataNode, is_mixup: DataNode) -> DataNode:
    """images·(1 - w) + partners·w where `is_mixup`, within one grey level; elsewhere `others`.

    Float arithmetic and its cast cost the CPU six times as much as two scalings in uint8 of the samples that
    need it. The split is what DALI makes of an ``if``, which would ask every caller to enable conditionals.
    """
    split = fn._conditional.split
    (own, _), (partner, _), (_, kept), (weight, _) = (
        split(node, predicate=is_mixup, _if_stmt=True) for node in (images, partners, others, weight)
    )
    return fn._conditional.merge(_weighted(own, partner, weight), kept, predicate=is_mixup)


def _weighted(images: DataNode, partners: DataNode, weight: DataNode) -> DataNode:
    return _scale(images, 1.0 - weight) + _scale(partners, weight)


def _scale(images: DataNode, factor: DataNode) -> DataNode:
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=BELOW_HALF)


def _scalar(labels: DataNode, device: str) -> DataNode:
    labels = fn.cast(_put(labels, device), dtype=types.INT64)
    # Readers give [1], lists give scalars. DALI's error about any other shape quotes this line with its comment.
    return fn.reshape(labels, shape=[])  # labels: give one integer per sample, not fn.one_hot


def _put(node: DataNode, device: str) -> DataNode:
    return node.gpu() if device == "gpu" and node.device == "cpu" else node
