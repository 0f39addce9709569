"""CutMix and Mixup as DALI graph functions.

``mix`` is ``apply(draw())``: it samples from the law of `lumix_dali.mixing` with DALI's own operators, on either
backend, for a pipeline whose batches the host does not see. A callback that does see its batch draws with
`mixing.draw`, at a tenth of the cost, and the graph pastes with ``lay``. The loader works that way.

On a GPU pipeline the draws stay on the CPU, where DALI's random operators and argument inputs live; pixels, λ0 and
box are computed on the GPU. A small CPU operator costs about 1 µs per sample whatever it computes, so a draw uses few
operators: both pasted regions (the whole canvas and the box) are one 2x2 tensor.

`multi_paste` never gets an empty region: on a GPU it would overwrite the rest of the image.

Terms: the *canvas* is a sample's own image, the *partner* is the sample mixed into it, and ``lam0`` is the partner's
weight. timm and torchvision weigh the canvas: ``lam_timm = 1 - lam0``.
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

# Columns that select a region: row 0 is the canvas, row 1 the box.
_CANVAS, _BOX = np.array([[1], [0]], np.int32), np.array([[0], [1]], np.int32)
# A box of λ0 = 16 has four times the image's sides: clipped, it is the whole image wherever its centre lies.
_WHOLE = np.array([[16], [0]], np.float32)
# Two roundings must not add up to 256 when both parts of a white pixel end in .5.
BELOW_HALF = -1e-3 / 255


Share = Callable[[DataNode], DataNode]  # gives every sample its own draw, or the first sample's


class Draw(NamedTuple):
    """What is drawn for each sample: CPU DataNodes, since they feed argument inputs.

    Attributes:
        partner: int32 scalar, the partner's index in the batch.
        is_cutmix, is_mixup: bool scalars; None: not part of the graph.
        start, stop: int32 [2, 2], (y, x) corners of the canvas (row 0) and of the box (row 1).
        weight: float32 scalar, Mixup's λ0; zero for other kinds.
        lam0: float32 scalar, returned unchanged; None: the share of pasted pixels plus `weight`.
        pixels: number of pixels of an image; None: unknown when the graph is defined.
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
        images: uint8 HWC, of one size. Flip them first: flipping afterwards makes the boxes wrong.
        labels: one integer per sample, of any shape with one element.
        mixup_alpha: Mixup's λ0 ~ Beta(α, α); 0 leaves Mixup out of the graph.
        cutmix_alpha: CutMix' drawn λ0 ~ Beta(α, α); 0 leaves CutMix out of the graph.
        cutmix_minmax: (low, high) in [0, 1]: the box lies inside the image, its sides are uniform between these
            fractions of the image's sides, and `cutmix_alpha` is not used.
        prob: probability in [0, 1] that a sample is mixed; a float DataNode may change it at run time.
        switch_prob: probability in [0, 1] of CutMix, given that a sample is mixed and both are on.
        mode: "elem", one draw per sample, or "batch", one per batch. Each sample has its own partner
            in both.
        correct_lam: compute λ0 from the pixels of the clipped box; False: return λ0 as drawn.
        size: (H, W) of the images: two integers, or int32 [2] on the CPU. It is not checked: with CutMix, a size
            that is too large raises an error of DALI's, and one that is too small leaves pixels undefined. None reads
            the shape of `images`, which costs some time and on a GPU needs DALI's default executor (not
            ``exec_dynamic=False``).

    Returns:
        Mixed images, as `images`, and their `MixTarget` of DataNodes, all on the images' device.

    Raises:
        ValueError: an argument is outside its range.
        RuntimeError: raised by DALI when the batch runs, for labels of more than one element, or for images of unequal
            size (with only Mixup, the message is about shapes that do not broadcast): resize them to one size.

    Note:
        The arguments have the same meaning as in timm's `Mixup`. The partners are a random permutation in which no
        sample is its own partner; timm flips the batch instead. A batch of one stays unmixed. Mixup is rounded to
        uint8, within one grey level. With `cutmix_minmax`, λ0 is always computed from the pixels, as in timm.
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


def cutmix(images: DataNode, labels: DataNode, *, alpha: float = 1.0, **options: Any) -> tuple[DataNode, MixTarget]:
    """Only CutMix (arXiv 1905.04899): `mix` with ``cutmix_alpha=alpha``; `options` are those of `mix`."""
    return mix(images, labels, mixup_alpha=0.0, cutmix_alpha=alpha, **options)


def mixup(images: DataNode, labels: DataNode, *, alpha: float = 0.8, **options: Any) -> tuple[DataNode, MixTarget]:
    """Only Mixup (arXiv 1710.09412): `mix` with ``mixup_alpha=alpha``; `options` are those of `mix`."""
    return mix(images, labels, mixup_alpha=alpha, cutmix_alpha=0.0, **options)


def unmixed(labels: DataNode, device: str = "cpu") -> MixTarget:
    """The `MixTarget` of unmixed samples: λ0, kind and partner are 0.

    Args:
        labels: one integer per sample, of any shape with one element.
        device: "cpu" or "gpu", the device of the target's DataNodes.
    """
    labels = _scalar(labels, device)
    partner = labels * 0
    kind = fn.cast(partner, dtype=types.INT32)
    return MixTarget(labels, labels, fn.cast(kind, dtype=types.FLOAT), kind * np.zeros(4, np.int32), kind, partner)


def draw(size: Sequence[int] | DataNode, mixing: Mixing, prob: DataNode | None = None) -> Draw:
    """Draws partners, kinds, boxes and weights in the graph, from the same law as `mixing.draw`.

    Args:
        size: (H, W) of the images: two integers, or int32 [2] on the CPU, such as
            ``images.shape(dtype=types.INT32)[:2]``.
        mixing: the options.
        prob: float scalar on the CPU that replaces ``mixing.prob``.

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
        lam0: float32 scalar, returned unchanged; None: the share of pasted pixels (CutMix) or `weight` (Mixup).

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
    """Mixes images as drawn and returns what was mixed: LUMix Eq. 1, with λ0 = r_w·r_h / HW of the clipped box.

    Args:
        images: uint8 HWC, of one size.
        labels: one integer per sample, of any shape with one element.
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
    """Mixes images with the patches of `mixing.regions`: LUMix Eq. 1, as drawn on the host.

    Args:
        images: uint8 HWC, all of the size that the patches are made for.
        patches: DataNodes on the CPU. For Mixup without CutMix `anchors` and `shapes` may be None; `ids` is then the
            partner, an int32 scalar. Without `is_mixup` every sample is blended, other kinds with a weight of 0 or 1,
            which is exact: on a GPU the number of operators costs, on a CPU the number of pixels.
        with_mixup: whether any sample can be of Mixup; False: only paste.

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
    # Divide first: for the whole image the quotient is exactly 1, which leaves Mixup's weight unchanged.
    return patches.weight * (patches.height * patches.width / float(size[0] * size[1]))


def _share(partner: DataNode, mode: str) -> Share:
    if mode == "elem":
        return lambda node: node
    first = partner * 0  # every sample takes the first sample's draw
    return lambda node: fn.permute_batch(node, indices=first)


def _kinds(
    partner: DataNode, share: Share, mixing: Mixing, prob: float | DataNode
) -> tuple[DataNode | None, DataNode | None]:
    """Booleans (is_cutmix, is_mixup); None for a kind that is switched off."""
    both = mixing.with_mixup and mixing.with_cutmix
    # Without fixed points a partner's partner is another sample than the partner, except in a batch of one.
    other = fn.permute_batch(partner, indices=partner)
    if not isinstance(prob, DataNode) and prob == 1 and not both:
        is_mixed = is_cutmix = partner != other
    else:
        chance = share(fn.random.uniform(range=[0.0, 1.0])) + (partner == other)  # 1 or more in a batch of one
        is_mixed = chance < prob
        is_cutmix = chance < prob * mixing.switch_prob if both else is_mixed
    if both:
        return is_cutmix, is_mixed ^ is_cutmix
    return (None, is_mixed) if mixing.with_mixup else (is_cutmix, None)


def _box(size: DataNode, lam: DataNode, share: Share) -> tuple[DataNode, DataNode]:
    """Corners of canvas and box: side = int(size·√λ0), centre uniform over the pixels, then clipped."""
    # Floor first: fn.cast rounds, which would halve the probability of both ends of the centre's range.
    side = fn.cast(math.floor(math.sqrt(lam + _WHOLE) * size), dtype=types.INT32)
    centre = fn.cast(math.floor(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size), dtype=types.INT32)
    low = centre - side // 2
    return math.clamp(low, 0, size), math.clamp(low + side, 0, size)


def _inner_box(
    size: DataNode, minmax: tuple[float, float], share: Share, is_cutmix: DataNode
) -> tuple[DataNode, DataNode]:
    """timm's `cutmix_minmax`: sides uniform in [int(size·low), int(size·high)), the box anywhere inside."""
    uniform = share(fn.random.uniform(range=[0.0, 1.0], shape=[2, 2]))
    shortest, longest = (fn.cast(math.floor(size * limit), dtype=types.INT32) for limit in minmax)
    side = shortest + fn.cast(math.floor(uniform[0] * (longest - shortest)), dtype=types.INT32)
    start = fn.cast(math.floor(uniform[1] * (size - side + 1)), dtype=types.INT32)
    return _regions(size, start * is_cutmix, (start + side) * is_cutmix)


def _regions(size: DataNode, start: DataNode, stop: DataNode) -> tuple[DataNode, DataNode]:
    return start * _BOX, size * _CANVAS + stop * _BOX


def _size(size: Sequence[int] | DataNode) -> tuple[DataNode, int | None]:
    """The size as a DataNode, and the number of pixels if the size is known."""
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
    """Pastes the partner's box over each image. Samples with an empty box bypass `multi_paste`.

    On a GPU an empty region of `multi_paste` overwrites the rest of the image.
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

    On a CPU, float arithmetic and its cast cost six times as much as two uint8 scalings of only the samples that
    need them. The split is what DALI makes of an ``if``, without asking every caller to enable conditionals.
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
    # Readers give [1], lists give scalars. For any other shape, DALI's error quotes this line with its comment.
    return fn.reshape(labels, shape=[])  # labels: give one integer per sample, not fn.one_hot


def _put(node: DataNode, device: str) -> DataNode:
    return node.gpu() if device == "gpu" and node.device == "cpu" else node
