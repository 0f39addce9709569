"""Further mixing methods, for Tables 6 and 12 of LUMix (arXiv 2211.15846).

ResizeMix and the two ablations of the input space run in DALI's graph, on either backend. Two methods run outside it:
SaliencyMix, whose map OpenCV computes on the host, and TransMix, which only changes the label and needs the model's
attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from torch import Tensor, nn

import lumix_dali.fn as mixfn
from lumix_dali import Kind, Mixing, MixTarget
from lumix_dali.mixing import Draw
from lumix_dali.reference import count_lam0, cut_box, mix_images

OTHER = 3  # MixTarget's kind: mixed by something other than a box or one weight


def resizemix(images: DataNode, labels: DataNode, scope: Sequence[float] = (0.1, 0.8)) -> tuple[DataNode, MixTarget]:
    """ResizeMix (arXiv 2012.11101): the whole partner, scaled by τ, is pasted anywhere inside the image.

    Args:
        images: uint8, HWC, one size for the whole batch.
        labels: one integer per sample.
        scope: range of τ, drawn uniformly, as a fraction of each side.

    Returns:
        Mixed images, and their target as for CutMix: kind 2, the box, and λ0, the box's share of the area.

    Note:
        One draw per sample; the paper draws once per batch.
    """
    size = images.shape(dtype=types.INT32)[:2]
    partner = fn.batch_permutation(no_fixed_points=True)
    side = fn.cast(math.floor(fn.random.uniform(range=list(scope)) * size), dtype=types.INT32)
    side = math.max(side, 1)
    free = fn.random.uniform(range=[0.0, 1.0], shape=[2]) * (size - side + 1)
    start = fn.cast(math.floor(free), dtype=types.INT32)
    small = fn.resize(fn.permute_batch(images, indices=partner), size=fn.cast(side, dtype=types.FLOAT))
    small = fn.pad(small, axes=[0, 1], shape=size)  # on a GPU multi_paste assumes one size for all inputs
    drawn = Draw(partner, partner * 0 + int(Kind.CUTMIX), fn.cat(start, start + side), partner * 0.0)
    # The pixels of this are never computed: DALI prunes unused outputs.
    _, target = mixfn.apply(images, labels, drawn, Mixing())
    mixed = fn.multi_paste(
        images,
        small,
        in_anchors=fn.stack(start * 0, start * 0),
        out_anchors=fn.stack(start * 0, start),
        shapes=fn.stack(size, side),
        output_size=size,
    )
    return mixed, target


def shuffle_patches(images: DataNode, size: Sequence[int], patch: int = 16) -> DataNode:
    """Random shuffling of the mixed image's patches (LUMix, Table 12), with one permutation per sample.

    Args:
        images: uint8, HWC.
        size: (H, W) of the images, multiples of `patch`.
        patch: side of a patch in pixels; 16 in the paper.
    """
    rows, columns = _grid(size, patch)
    count = rows * columns
    # The rank of each draw; ties go to the first, so that the result is always a permutation.
    draws = fn.random.uniform(range=[0.0, 1.0], shape=[count, 1])
    others = fn.reshape(draws, shape=[1, count])
    smaller = (others < draws) | ((others == draws) & types.Constant(np.tri(count, k=-1, dtype=np.bool_)))
    rank = fn.cast(fn.reductions.sum(fn.cast(smaller, dtype=types.INT32), axes=[1]), dtype=types.INT32)
    swap = [0, 2, 1, 3, 4]  # to and from patches of whole rows
    cut = fn.transpose(fn.reshape(images, shape=[rows, patch, columns, patch, -1]), perm=swap)
    moved = fn.sequence_rearrange(fn.reshape(cut, shape=[count, patch, patch, -1], layout="FHWC"), new_order=rank)
    joined = fn.transpose(fn.reshape(moved, shape=[rows, columns, patch, patch, -1]), perm=swap)
    return fn.reshape(joined, shape=[*size, -1], layout="HWC")


def patch_mixup(
    images: DataNode, labels: DataNode, size: Sequence[int], patch: int = 16, alpha: float = 1.0
) -> tuple[DataNode, MixTarget]:
    """Random λ (LUMix, Table 12): one blend weight λ ~ Beta(α, α) per patch; λ0 is their mean.

    Args:
        images: uint8, HWC.
        labels: one integer per sample.
        size: (H, W) of the images, multiples of `patch`.
        patch: side of a patch in pixels; 16 in the paper.
        alpha: α of "the original Beta distribution"; 1 as in CutMix.

    Returns:
        Mixed images, rounded to uint8, and their target: kind 3, no box.
    """
    (rows, columns), device = _grid(size, patch), images.device
    partner = fn.batch_permutation(no_fixed_points=True)
    weight = fn.random.beta(alpha=alpha, beta=alpha, shape=[rows, columns])
    lam0 = fn.reductions.mean(weight)
    spread = fn.reshape(weight, shape=[rows, 1, columns, 1, 1])
    own, other = (
        fn.cast(fn.reshape(node, shape=[rows, patch, columns, patch, -1]), dtype=types.FLOAT)
        for node in (images, fn.permute_batch(images, indices=partner))
    )
    if device == "gpu":
        lam0, spread = lam0.gpu(), spread.gpu()
    mixed = fn.reshape(fn.cast(own + (other - own) * spread, dtype=types.UINT8), shape=[*size, -1], layout="HWC")
    plain = mixfn.unmixed(labels, device)
    return mixed, plain._replace(
        partner_labels=fn.permute_batch(plain.labels, indices=partner), lam0=lam0, kind=plain.kind + OTHER
    )


def _grid(size: Sequence[int], patch: int) -> tuple[int, int]:
    if any(side % patch for side in size):
        raise ValueError(
            f"patch={patch!r}: images of {size[0]} x {size[1]} cannot be cut into such squares; "
            "give a divisor of both sides"
        )
    return size[0] // patch, size[1] // patch


def saliency_mix(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator, alpha: float = 1.0
) -> tuple[np.ndarray, MixTarget]:
    """SaliencyMix (arXiv 2006.01791): CutMix with a box around the partner's most salient point.

    Args:
        images: uint8 [B, H, W, 3], RGB.
        labels: int64 [B].
        rng: random generator for partners and λ0 ~ Beta(α, α).

    Returns:
        Mixed images, and their target with NumPy fields: kind 2, λ0 computed from the clipped box.

    Note:
        The authors' code computes one saliency map per batch, of the first partner, and uses its box for all
        samples; here, as the paper describes the method, each sample uses the box of its own partner.
    """
    order = rng.permutation(len(images))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)  # one cycle: no sample is its own partner
    size, weights = images.shape[1:3], rng.beta(alpha, alpha, len(images))
    box = np.array(
        [cut_box(size, lam, most_salient(images[other])) for lam, other in zip(weights, partner, strict=True)]
    )
    kind, lam0 = np.full(len(images), int(Kind.CUTMIX), np.int32), count_lam0(box, size)
    mixed = mix_images(images, partner, box, kind, lam0)
    return mixed, MixTarget(labels, labels[partner], lam0.astype(np.float32), box.astype(np.int32), kind, partner)


def most_salient(image: np.ndarray) -> tuple[int, int]:
    """(y, x) of the max of OpenCV's fine-grained static saliency, the detector of SaliencyMix.

    Args:
        image: uint8 [H, W, 3].

    Note:
        As in the authors' code, the map has 256 levels and ties go to the first value. Its maximum is often at an
        edge, especially in small images.
    """
    import cv2

    detector: Any = cv2.saliency  # its stubs lack what it creates at run time
    found, values = detector.StaticSaliencyFineGrained_create().computeSaliency(image)
    if not found:
        raise RuntimeError(f"OpenCV cannot compute a saliency map for an image of shape {image.shape}")
    y, x = np.unravel_index((255 * values).astype(np.uint8).argmax(), values.shape)
    return int(y), int(x)


def require_opencv() -> None:
    """Raises ValueError where OpenCV with its contributed modules is missing."""
    try:
        import cv2

        assert cv2.saliency
    except (ImportError, AttributeError) as error:
        raise ValueError("SaliencyMix: it needs OpenCV; pip install opencv-contrib-python-headless") from error


def class_attention(model: nn.Module) -> Callable[[], Tensor]:
    """Makes a timm ViT keep its last block's attention, which TransMix reads after each forward pass.

    Args:
        model: a ViT whose first token is the class token, with `blocks` of timm's `Attention`.

    Returns:
        A function that returns [B, patches]: the class token's softmax attention, averaged over heads, detached.

    Raises:
        ValueError: the model has no class token.
    """
    if getattr(model, "cls_token", None) is None or getattr(model, "num_prefix_tokens", 0) != 1:
        raise ValueError(
            f"TransMix: {type(model).__name__} has no class token as its only prefix token; give a ViT such as "
            "deit_small_patch16_224"
        )
    attention: Any = model.blocks[-1].attn  # type: ignore[union-attr,index]
    attention.fused_attn = False  # the fused kernel does not expose its weights
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[:] = [inputs[0].detach()[:, :, 0, 1:].mean(1)]

    attention.attn_drop.register_forward_pre_hook(keep)
    return lambda: kept[0]


def transmix(target: MixTarget, attention: Tensor, size: Sequence[int]) -> MixTarget:
    """TransMix (arXiv 2111.09833): λ is the mean of the box's area and of the class token's attention to it.

    Args:
        target: target of CutMix samples, on the attention's device.
        attention: [B, patches] of a square grid, from `class_attention`.
        size: (H, W) of the images that `target.box` refers to.

    Returns:
        `target` with λ0 replaced by (λ0 + Σ attention inside / Σ attention) / 2; samples without a box are unchanged.

    Note:
        As in the authors' code, the box is resampled to the grid by nearest neighbour, and attention has half the
        weight. (Eq. 3 of the paper uses only attention.)
    """
    side = round(attention.size(1) ** 0.5)
    y, x = (torch.arange(length, device=attention.device) for length in size)
    y0, x0, y1, x1 = target.box[:, :, None].unbind(1)
    mask = (((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None, :]).to(attention.dtype)
    inside = F.interpolate(mask[:, None], size=(side, side)).flatten(1)
    share = (attention * inside).sum(1) / attention.sum(1)
    lam0 = torch.where(target.kind == int(Kind.CUTMIX), (target.lam0 + share.to(target.lam0.dtype)) / 2, target.lam0)
    return target._replace(lam0=lam0)
