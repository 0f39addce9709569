"""CutMix and Mixup for DALI's dynamic mode (``nvidia.dali.experimental.dynamic``), where batches are values.

The host draws (`lumix_dali.mixing`), DALI pastes and blends, and PyTorch gets the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch

from .fn import BELOW_HALF, lam0
from .mixing import Mixing, draw, graph_inputs
from .target import MixTarget


def mix(images: ndd.Batch, labels: Any, mixing: Mixing, rng: np.random.Generator) -> tuple[ndd.Batch, MixTarget]:
    """Mixes a batch with a permutation of itself, LUMix Eq. 1 (arXiv 2211.15846).

    Args:
        images: uint8 HWC, of one size, on either device. Flip them first: flipping afterwards makes the boxes wrong.
        labels: integers [B]: an array, a list or a tensor.
        mixing: the options.
        rng: source of the randomness; seed it with (seed, epoch, rank) to make an epoch repeatable.

    Returns:
        Mixed images, as `images`, and their `MixTarget` of torch tensors on the images' device.

    Raises:
        ValueError: images of unequal size, or not one label per image.

    Note:
        CutMix is bit-exact. Mixup is rounded to uint8, within one grey level.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> images = ndd.batch([np.full((8, 8, 3), i, np.uint8) for i in range(4)], layout="HWC")
        >>> mixed, target = mix(images, [0, 1, 2, 3], Mixing(cutmix_alpha=1.0), rng)
        >>> bool((mixed.torch()[0, ..., 0] == target.partner[0]).float().mean() == target.lam0[0])
        True
    """
    sizes = {tuple(shape[:2]) for shape in images.shape}
    if len(sizes) != 1:
        raise ValueError(f"images: sizes {sorted(sizes)[:4]}; resize them to one size before mixing")
    (size,) = sizes
    classes = np.asarray(labels, np.int64)
    if classes.shape != (images.batch_size,):
        raise ValueError(f"labels: shape {classes.shape}; give one integer per image, [{images.batch_size}]")
    drawn = draw(rng, images.batch_size, size, mixing)
    inputs = graph_inputs(drawn, size, mixing)
    mixed = _lay(images, inputs)
    partner = drawn.partner.astype(np.int64)
    fields = MixTarget(classes, classes[partner], drawn.weight, drawn.box, drawn.kind, partner)
    device = torch.device("cpu" if images.device.device_type == "cpu" else "cuda")

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return mixed, MixTarget(*map(put, fields))._replace(lam0=lam0(inputs, size, put))


def _lay(images: ndd.Batch, inputs: Mapping[str, np.ndarray]) -> ndd.Batch:
    """`fn.lay` in dynamic mode."""
    if "anchors" in inputs:
        ids, anchors, shapes = (ndd.as_batch(inputs[name]) for name in ("ids", "anchors", "shapes"))
        mixed = ndd.multi_paste(images, in_ids=ids, in_anchors=anchors, out_anchors=anchors, shapes=shapes)
    else:
        mixed = ndd.permute_batch(images, indices=ndd.as_batch(inputs["ids"][:, 1].copy()))
    if "opacity" not in inputs:
        return mixed
    opacity = np.where(inputs["is_mixup"], inputs["opacity"], np.float32(1))  # 1 is exact
    return _scaled(images, 1 - opacity) + _scaled(mixed, opacity)


def _scaled(images: ndd.Batch, factor: np.ndarray) -> ndd.Batch:
    return ndd.brightness_contrast(images, brightness=ndd.as_batch(factor), brightness_shift=BELOW_HALF)
