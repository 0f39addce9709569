"""CutMix and Mixup as DALI graph functions.

``mix`` is ``apply(draw())``: it samples from the law of `lumix_dali.mixing` with DALI's own operators, on either
backend, for a pipeline whose batches the host does not see. The loader's callback does see its batch: it draws with
`mixing.draw`, at a tenth of the cost, and the graph needs only ``lay`` and ``lam0``, which read `mixing.graph_inputs`.

On a GPU pipeline the draw stays on the CPU, where DALI's random operators and argument inputs live; pixels, λ0 and
box are computed on the GPU. A small CPU operator costs about 1 µs per sample whatever it computes.

`multi_paste` never gets an empty region: on a GPU it would overwrite the rest of the image.

Terms: the *canvas* is a sample's own image, the *partner* is the sample mixed into it, and ``lam0`` is the partner's
weight. timm and torchvision weigh the canvas: ``lam_timm = 1 - lam0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from .graph import as_written, branch, first, put
from .mixing import Draw, Mixing, Mode
from .target import Kind, MixTarget

MIXUP = int(Kind.MIXUP)
# Two roundings must not add up to 256 when both parts of a white pixel end in .5.
BELOW_HALF = -1e-3 / 255

Share = Callable[[DataNode], DataNode]  # gives every sample its own draw, or the first sample's
Size: TypeAlias = Sequence[int] | DataNode  # (H, W) of the images: two integers, or int32 [2] on the CPU


@as_written
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

    Returns:
        Mixed images, as `images`, and their `MixTarget` of DataNodes, all on the images' device.

    Raises:
        ValueError: an argument is outside its range.
        RuntimeError: raised by DALI when the batch runs, for labels of more than one element, or for images of unequal
            size (with only Mixup, the message is about shapes that do not broadcast): resize them to one size.

    Note:
        The arguments have the same meaning as in timm's `Mixup`. The partners are a random permutation in which no
        sample is its own partner; timm flips the batch instead. A batch of one stays unmixed. Mixup is rounded to
        uint8, within one grey level. With `cutmix_minmax`, λ0 is always computed from the pixels, as in timm. The
        size is read from the images, which on a GPU needs DALI's default executor (not ``exec_dynamic=False``). Calling
        this twice mixes twice, and the second target says nothing of the first. Pipelines of one seed draw the same
        boxes, so give each rank another seed. An iterator that cuts the last batch may cut off partners: train with
        DALI's ``LastBatchPolicy.DROP``.

    Example:
        >>> from nvidia.dali import pipeline_def
        >>> @pipeline_def(batch_size=4, num_threads=1, device_id=None)
        ... def train():
        ...     source = [np.full((8, 8, 3), i, np.uint8) for i in range(4)]
        ...     images = fn.external_source(lambda: source, layout="HWC", batch=True)
        ...     labels = fn.external_source(lambda: np.arange(4), batch=True)
        ...     images, target = mix(images, labels, cutmix_alpha=1.0)
        ...     return images, target.lam0, target.partner
        >>> images, lam0, partner = (np.array(output.as_tensor()) for output in train(seed=1).run())
        >>> bool((images[0, ..., 0] == partner[0]).mean() == lam0[0])
        True
    """
    at_run_time = prob if isinstance(prob, DataNode) else None
    mixing = Mixing(
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        cutmix_minmax=cutmix_minmax,
        prob=1.0 if isinstance(prob, DataNode) else prob,
        switch_prob=switch_prob,
        mode=mode,
        correct_lam=correct_lam,
    )
    size = _shape(images)
    return apply(images, labels, draw(size, mixing, at_run_time), mixing, size)


@as_written
def cutmix(images: DataNode, labels: DataNode, *, alpha: float = 1.0, **options: Any) -> tuple[DataNode, MixTarget]:
    """Only CutMix (arXiv 1905.04899): `mix` with ``cutmix_alpha=alpha``; `options` are those of `mix`."""
    return mix(images, labels, mixup_alpha=0.0, cutmix_alpha=alpha, **options)


@as_written
def mixup(images: DataNode, labels: DataNode, *, alpha: float = 0.8, **options: Any) -> tuple[DataNode, MixTarget]:
    """Only Mixup (arXiv 1710.09412): `mix` with ``mixup_alpha=alpha``; `options` are those of `mix`."""
    return mix(images, labels, mixup_alpha=alpha, cutmix_alpha=0.0, **options)


@as_written
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


@as_written
def draw(size: Size, mixing: Mixing, prob: DataNode | None = None) -> Draw:
    """Draws partners, kinds, boxes and weights in the graph, from the same law as `mixing.draw`.

    Args:
        size: (H, W) of the images: two integers, or int32 [2] on the CPU, such as
            ``images.shape(dtype=types.INT32)[:2]``.
        mixing: the options.
        prob: float scalar on the CPU that replaces ``mixing.prob``.
    """
    size = _node(size)
    partner = fn.batch_permutation(no_fixed_points=True)
    share = _share(partner, mixing.mode)
    kind, is_mixed, is_cutmix = _kinds(partner, share, mixing, mixing.prob if prob is None else prob)
    alpha: Any = mixing.mixup_alpha or mixing.cutmix_alpha or 1.0
    if mixing.cutmix_minmax is None and mixing.mixup_alpha and mixing.cutmix_alpha:
        alpha = is_cutmix * (mixing.cutmix_alpha - mixing.mixup_alpha) + mixing.mixup_alpha
    is_weighed = is_mixed if mixing.cutmix_minmax is None else kind == MIXUP
    weight = share(fn.random.beta(alpha=alpha, beta=alpha)) * is_weighed
    if not mixing.with_cutmix:
        box = kind * np.zeros(4, np.int32)
    elif mixing.cutmix_minmax is not None:
        box = _inner_box(size, mixing.cutmix_minmax, share) * is_cutmix
    else:
        box = _box(size, weight, share) * is_cutmix
    return Draw(partner, kind, box, weight)


@as_written
def apply(
    images: DataNode, labels: DataNode, drawn: Draw, mixing: Mixing, size: Size | None = None
) -> tuple[DataNode, MixTarget]:
    """Mixes images as drawn and returns what was mixed: LUMix Eq. 1, with λ0 = r_w·r_h / HW of the clipped box.

    With ``mixing.correct_lam`` off, λ0 is as drawn.

    Args:
        images: uint8 HWC, of one size.
        labels: one integer per sample, of any shape with one element.
        drawn: DataNodes on the CPU, from `draw` or from `mixing.draw` on the host.
        mixing: the options of the draw: what they switch off is left out of the graph.
        size: (H, W) of the images; None reads it from them. Where `drawn` was made for another size, DALI raises an
            error or the images leave with `size`.

    Returns:
        Mixed images, as `images`, and their `MixTarget` of DataNodes, all on the images' device.
    """
    device = images.device
    partners = fn.permute_batch(images, indices=drawn.partner)
    mixed, weight = images, drawn.weight
    if mixing.with_mixup and mixing.with_cutmix:
        weight = weight * (drawn.kind == MIXUP)
    box, lam0 = put(drawn.box, device), put(weight if mixing.counts_lam0 else drawn.weight, device)
    size = _shape(images) if size is None else size
    if mixing.with_cutmix:
        mixed = _paste(images, partners, drawn.box, size)
        if mixing.counts_lam0:
            area = box_lam0(box[2:] - box[:2], put(size, device))
            lam0 = area + lam0 if mixing.with_mixup else area
    if mixing.with_mixup:
        mixed = _blend(mixed, partners, weight, drawn.kind == MIXUP, size, first)
    labels = _scalar(labels, device)
    partner = fn.cast(put(drawn.partner, device), dtype=types.INT64)
    others = fn.permute_batch(labels, indices=drawn.partner)
    return mixed, MixTarget(labels, others, lam0, box, put(drawn.kind, device), partner)


@as_written
def paste(values: DataNode, drawn: Draw, size: Size | None = None) -> DataNode:
    """Pastes the partners' boxes into whatever else has the images' size: masks, depth, heat maps.

    Args:
        values: HWC, of one size and any type that ``fn.multi_paste`` takes; cropped and flipped as the images were.
        drawn: as for `apply`.
        size: as for `apply`.

    Returns:
        Values like `values`. Samples of Mixup keep their own, because two masks have no mean: weigh both losses by λ0
        instead, or draw only CutMix.

    Example:
        >>> from nvidia.dali import fn, pipeline_def
        >>> @pipeline_def(batch_size=4, num_threads=1, device_id=None)
        ... def masks():
        ...     source = [np.full((8, 8, 1), i, np.uint8) for i in range(4)]
        ...     values = fn.external_source(lambda: source, layout="HWC", batch=True)
        ...     drawn = draw((8, 8), Mixing(cutmix_alpha=1.0))
        ...     return paste(values, drawn), drawn.box
        >>> values, boxes = (np.array(output.as_tensor()) for output in masks(seed=1).run())
        >>> y0, x0, y1, x1 = boxes[0].tolist()
        >>> bool((values[0, y0:y1, x0:x1] != 0).all() and (values[0] != 0).sum() == (y1 - y0) * (x1 - x0))
        True
    """
    partners = fn.permute_batch(values, indices=drawn.partner)
    return _paste(values, partners, drawn.box, _shape(values) if size is None else size)


@as_written
def lay(images: DataNode, inputs: Mapping[str, DataNode], size: Size) -> DataNode:
    """Mixes images by a draw on the host, where a sample knows its own place in the batch.

    Args:
        images: uint8 HWC, of one size.
        inputs: `mixing.graph_inputs` on the CPU, "ids" among them; "is_mixup" only for images on the CPU.
        size: (H, W) of the images.
    """
    ids, opacity = inputs["ids"], inputs.get("opacity")
    if "anchors" in inputs:
        anchors = inputs["anchors"]
        pasted = fn.multi_paste(images, in_ids=ids, in_anchors=anchors, out_anchors=anchors, shapes=inputs["shapes"])
    else:
        pasted = fn.permute_batch(images, indices=ids[1])
    if opacity is None:
        return pasted
    return _blend(images, pasted, opacity, inputs.get("is_mixup"), size, lambda own, pasted, opacity: pasted)


def lam0(inputs: Mapping[str, Any], size: Sequence[int], put: Callable[[Any], Any]) -> Any:
    """λ0 of a draw on the host, float32, computed where `put` brings the arrays.

    Args:
        inputs: `mixing.graph_inputs`, as arrays or DataNodes.
        size: (H, W) of the images.
        put: moves one of them to the images' device.
    """
    if "lam0" in inputs:
        return put(inputs["lam0"])
    # The area of a whole image over its own is exactly 1, which leaves Mixup's weight as it is.
    area = box_lam0((put(inputs["height"]), put(inputs["width"])), size)
    return area * put(inputs["opacity"]) if "opacity" in inputs else area


def _share(partner: DataNode, mode: str) -> Share:
    if mode == "elem":
        return lambda node: node
    same = partner * 0  # every sample takes the first sample's draw
    return lambda node: fn.permute_batch(node, indices=same)


def _kinds(
    partner: DataNode, share: Share, mixing: Mixing, prob: float | DataNode
) -> tuple[DataNode, DataNode, DataNode]:
    """The kind, and booleans: whether the sample is mixed, and whether by CutMix."""
    both = mixing.with_mixup and mixing.with_cutmix
    # Without fixed points a partner's partner is another sample than the partner, except in a batch of one.
    other = fn.permute_batch(partner, indices=partner)
    if not isinstance(prob, DataNode) and prob == 1 and not both:
        is_mixed = partner != other
    else:
        chance = share(fn.random.uniform(range=[0.0, 1.0])) + (partner == other)  # 1 or more in a batch of one
        is_mixed = chance < prob
    if both:
        is_cutmix = chance < prob * mixing.switch_prob
        return is_cutmix * 1 + is_mixed, is_mixed, is_cutmix  # CutMix is 2, Mixup 1
    return is_mixed * int(Kind.CUTMIX if mixing.with_cutmix else Kind.MIXUP), is_mixed, is_mixed


def _box(size: DataNode, lam: DataNode, share: Share) -> DataNode:
    """(y0, x0, y1, x1): side = int(size·√λ0), centre uniform over the pixels, then clipped."""
    # Floor first: fn.cast rounds, which would halve the probability of both ends of the centre's range.
    side = fn.cast(math.floor(math.sqrt(lam) * size), dtype=types.INT32)
    centre = fn.cast(math.floor(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size), dtype=types.INT32)
    low = centre - side // 2
    return math.clamp(fn.cat(low, low + side), 0, fn.cat(size, size))


def _inner_box(size: DataNode, minmax: Sequence[float], share: Share) -> DataNode:
    """timm's `cutmix_minmax`: sides uniform in [int(size·low), int(size·high)), the box anywhere inside."""
    uniform = share(fn.random.uniform(range=[0.0, 1.0], shape=[2, 2]))
    shortest, longest = (fn.cast(math.floor(size * limit), dtype=types.INT32) for limit in minmax)
    side = shortest + fn.cast(math.floor(uniform[0] * (longest - shortest)), dtype=types.INT32)
    start = fn.cast(math.floor(uniform[1] * (size - side + 1)), dtype=types.INT32)
    return fn.cat(start, start + side)


def _node(size: Size) -> DataNode:
    if isinstance(size, DataNode):
        return size
    sides: np.ndarray = np.asarray(size)
    if sides.shape != (2,) or sides.dtype.kind not in "iu" or (sides < 1).any():
        raise ValueError(f"size={size!r}: give (height, width) of the images, two integers > 0, or a DataNode")
    return fn.constant(idata=sides.tolist(), dtype=types.INT32)


def _shape(images: DataNode) -> DataNode:
    return images.shape(dtype=types.INT32)[:2]


def box_lam0(sides: Any, size: Any) -> Any:
    """λ0 of CutMix, r_w·r_h / HW (LUMix Eq. 1, arXiv 2211.15846): the box's pixels over the image's, float32.

    Args:
        sides: int32, height and width of the box along the first dimension: a DataNode, a pair of them, or a tensor.
        size: (H, W) of the image, likewise, or two integers.
    """
    return (sides[0] * sides[1]) / (size[0] * size[1])


def _paste(values: DataNode, partners: DataNode, box: DataNode, size: Size) -> DataNode:
    """Pastes the partner's box over each sample. Samples with an empty box bypass `multi_paste`.

    On a GPU an empty region of `multi_paste` overwrites the rest of the image.
    """
    start, extent = box[:2], box[2:] - box[:2]
    anchors, shapes = fn.stack(np.zeros(2, np.int32), start), fn.stack(_node(size), extent)  # the canvas, and the box
    # Were the given size smaller than the images', they would leave with that size.
    given: dict[str, Any] = {} if isinstance(size, DataNode) else {"output_size": list(size)}

    def paste(own: DataNode, partner: DataNode, anchors: DataNode, shapes: DataNode) -> DataNode:
        return fn.multi_paste(own, partner, in_anchors=anchors, out_anchors=anchors, shapes=shapes, **given)

    def keep(own: DataNode, *_: DataNode) -> DataNode:
        return fn.reshape(own, layout="HWC")  # what `multi_paste` returns, also for images without a layout

    return branch(fn.reductions.min(extent) > 0, paste, keep, values, partners, anchors, shapes)


def _blend(
    images: DataNode,
    partners: DataNode,
    weight: DataNode,
    is_mixup: DataNode | None,
    size: Size,
    otherwise: Callable[..., DataNode],
) -> DataNode:
    """images·(1 - w) + partners·w within one grey level; `weight` is 0 or 1, which is exact, unless `is_mixup`.

    On a GPU the number of operators costs, and all samples are blended. On a CPU the number of pixels does: only those
    of Mixup are, the others are what `otherwise` makes of the same nodes, and float arithmetic with its cast would cost
    six times as much as two uint8 scalings.
    """
    blend = _blending(images.device, size)
    if images.device == "gpu":
        return blend(images, partners, weight)
    assert is_mixup is not None
    return branch(is_mixup, blend, otherwise, images, partners, weight)


def _blending(device: str, size: Size) -> Callable[..., DataNode]:
    """A graph function of images, partners and the partners' weight."""
    # DALI adds element by element. Eight bytes at once take a CPU a third of the time, which pays for the operators
    # that this takes from 64x64 pixels on. No byte carries into the next: `BELOW_HALF` keeps every sum below 256.
    static = device == "cpu" and not isinstance(size, DataNode)
    wide = static and size[0] * size[1] >= 64 * 64 and size[0] * size[1] % 8 == 0

    def as_words(images: DataNode) -> DataNode:
        return fn.reinterpret(images, dtype=types.INT64, shape=[-1]) if wide else images

    def blend(images: DataNode, partners: DataNode, weight: DataNode) -> DataNode:
        mixed = as_words(_scale(images, 1.0 - weight)) + as_words(_scale(partners, weight))
        return fn.reinterpret(mixed, dtype=types.UINT8, shape=[*size, -1], layout="HWC") if wide else mixed

    return blend


def _scale(images: DataNode, factor: DataNode) -> DataNode:
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=BELOW_HALF)


def _scalar(labels: DataNode, device: str) -> DataNode:
    labels = fn.cast(put(labels, device), dtype=types.INT64)
    # Readers give [1], lists give scalars. For any other shape, DALI's error quotes this line with its comment.
    return fn.reshape(labels, shape=[])  # labels: give one integer per sample, not fn.one_hot
