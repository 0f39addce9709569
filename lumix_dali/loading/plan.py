"""The plan of a batch: what the host decides, as one array that the graph reads and returns.

Labels, boxes and the rest pass through the graph unchanged, and PyTorch unpacks them without a copy. λ0 is not among
them: the graph computes it from the box that it pasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..mixing import Mixing, draw, patches
from ..target import Kind, MixTarget

# Rows of the array, int32 [n, 13, 2]: four of one int64, the box, the patches, kind and the float32 λ0 as drawn, and
# the float32 weight of the second patch.
LABEL, PARTNER_LABEL, PARTNER, INDEX, BOX, IDS, ANCHORS, SHAPES, KIND, WEIGHT = 0, 1, 2, 3, 4, 6, 7, 9, 11, 12


@dataclass(frozen=True)
class Plan:
    """The plans of one epoch: a pure function of (seed, epoch, rank, iteration).

    Args:
        seed, epoch, rank: of the loader.
        size: (H, W) of the images.
        mixing: the options; None: nothing is mixed.
        training: False: the target is labels and indices only.
    """

    seed: int
    epoch: int
    rank: int
    size: tuple[int, int]
    mixing: Mixing | None
    training: bool

    def batch(self, iteration: int, labels: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The array for samples with these labels and indices (int64 [n]); in evaluation [n, 2, 2], only those two."""
        if not self.training:
            return np.stack([labels, index], axis=1).view(np.int32).reshape(-1, 2, 2)
        # Five words, unlike the two of the order, so that the two streams differ.
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, iteration, 1])
        drawn = draw(rng, len(labels), self.size, self.mixing)
        rows = np.zeros((len(labels), 13, 2), np.int32)
        words, floats = rows.view(np.int64)[..., 0], rows.view(np.float32)
        words[:, LABEL], words[:, PARTNER_LABEL] = labels, labels[drawn.partner]
        words[:, PARTNER], words[:, INDEX] = drawn.partner, index
        rows[:, BOX : BOX + 2] = drawn.box.reshape(-1, 2, 2)
        ids, rows[:, ANCHORS : ANCHORS + 2], rows[:, SHAPES : SHAPES + 2] = patches(drawn, self.size)
        rows[:, IDS], rows[:, KIND, 0], floats[:, KIND, 1] = ids, drawn.kind, drawn.weight
        floats[:, WEIGHT, 0] = np.where(drawn.kind == Kind.MIXUP, drawn.weight, ids[:, 0] != ids[:, 1])
        return rows


def unpack(outputs: Sequence[Any], training: bool) -> tuple[Any, Any]:
    """Target and index of a batch, from the outputs of the pipeline that follow the images (tensors).

    Returns:
        `MixTarget` or labels int64 [B], and index int64 [B]; all except λ0 are views of one tensor.
    """
    import torch

    rows = outputs[0]
    words = rows.view(torch.int64)[..., 0]
    if not training:
        return words[:, 0], words[:, 1]
    mixed = MixTarget(
        labels=words[:, LABEL],
        partner_labels=words[:, PARTNER_LABEL],
        lam0=outputs[1],
        box=rows.flatten(1)[:, 2 * BOX : 2 * BOX + 4],
        kind=rows[:, KIND, 0],
        partner=words[:, PARTNER],
    )
    return mixed, words[:, INDEX]
