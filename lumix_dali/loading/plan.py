"""The plan of a batch: what the host decides, as arrays that the graph takes and returns.

Labels, boxes and the rest pass through the graph unchanged, as the columns of one array, which PyTorch unpacks without
a copy. λ0 is not among them: the graph computes it from the box that it pasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..mixing import Mixing, draw, regions
from ..target import MixTarget

# dtype and number of dimensions per sample of each input of the graph besides the images.
INPUTS: dict[str, tuple[type, int]] = {
    "target": (np.int64, 1),  # see `Plan.target`
    "lam0": (np.float32, 0),  # if it is not computed from the box
    "ids": (np.int32, 1),  # with CutMix
    "partner": (np.int32, 0),  # with only Mixup, instead of ids
    "anchors": (np.int32, 2),
    "shapes": (np.int32, 2),
    "height": (np.int32, 0),  # if λ0 is computed from the box
    "width": (np.int32, 0),
    "weight": (np.float32, 0),
    "is_mixup": (np.bool_, 0),
}
_LABEL, _PARTNER_LABEL, _PARTNER, _INDEX, _BOX, _KIND = 0, 1, 2, 3, 4, 6
_COLUMNS = 7  # int64; box and kind are int32, two to a column


@dataclass(frozen=True)
class Plan:
    """The plans of one epoch: a pure function of (seed, epoch, rank, iteration).

    Args:
        seed, epoch, rank: of the loader.
        size: (H, W) of the images.
        mixing: the options; None: nothing is mixed.
        training: False: the target is labels and indices only.
        on_gpu: whether the graph mixes on a GPU, which blends every sample; a CPU blends only those of Mixup.
    """

    seed: int
    epoch: int
    rank: int
    size: tuple[int, int]
    mixing: Mixing | None
    training: bool
    on_gpu: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays, keys of `INPUTS`."""
        if not self.training:
            return ("target",)
        if self.mixing is None:
            return ("target", "lam0")
        mixing = self.mixing
        found = ["target", *(["ids", "anchors", "shapes"] if mixing.with_cutmix else ["partner"])]
        if mixing.with_cutmix and mixing.counts_lam0:
            found += ["height", "width"]
        if mixing.with_mixup or mixing.counts_lam0:
            found += ["weight"]
        if mixing.with_mixup and not self.on_gpu:
            found += ["is_mixup"]
        if mixing.with_cutmix and not mixing.counts_lam0:
            found += ["lam0"]
        return tuple(found)

    def batch(self, iteration: int, labels: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
        """The arrays that `inputs` names, for samples with these labels and indices (int64 [n])."""
        if not self.training:
            return [np.stack([labels, index], axis=1)]
        # Five words, unlike the two of the order, so that the two streams differ.
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, iteration, 1])
        drawn = draw(rng, len(labels), self.size, self.mixing)
        target = np.zeros((len(labels), _COLUMNS), np.int64)
        target[:, _LABEL], target[:, _PARTNER_LABEL] = labels, labels[drawn.partner]
        target[:, _PARTNER], target[:, _INDEX] = drawn.partner, index
        halves = target.view(np.int32)
        halves[:, 2 * _BOX : 2 * _BOX + 4], halves[:, 2 * _KIND] = drawn.box, drawn.kind
        arrays: dict[str, np.ndarray] = dict(target=target, lam0=drawn.weight)
        if self.mixing is not None:
            arrays |= regions(drawn, self.size)._asdict()
            arrays["partner"] = np.ascontiguousarray(arrays["ids"][:, 1])
        return [arrays[name] for name in self.inputs]


def unpack(outputs: Sequence[Any], training: bool) -> tuple[Any, Any]:
    """Target and index of a batch, from the outputs of the pipeline that follow the images (tensors).

    Returns:
        `MixTarget` or labels int64 [B], and index int64 [B]; all except λ0 are views of one tensor.
    """
    import torch

    target = outputs[0]
    if not training:
        return target[:, 0], target[:, 1]
    halves = target.view(torch.int32)
    mixed = MixTarget(
        labels=target[:, _LABEL],
        partner_labels=target[:, _PARTNER_LABEL],
        lam0=outputs[1],
        box=halves[:, 2 * _BOX : 2 * _BOX + 4],
        kind=halves[:, 2 * _KIND],
        partner=target[:, _PARTNER],
    )
    return mixed, target[:, _INDEX]
