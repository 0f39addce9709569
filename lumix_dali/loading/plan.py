"""The plan of a batch: what the host decides, as the arrays that the graph reads.

One of them is the target. It passes through the graph unchanged, and PyTorch unpacks it without a copy. λ0 is not in
it: the graph computes it (`fn.lam0`) from the sides of the box that it pastes, on the images' device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..mixing import Draw, Mixing, draw, graph_inputs
from ..target import MixTarget

# Rows of the target, int32 [n, 7, 2]: four of one int64, two of the box, and the kind.
LABEL, PARTNER_LABEL, PARTNER, INDEX, BOX, KIND = 0, 1, 2, 3, 4, 6


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

    def batch(
        self, iteration: int, labels: np.ndarray, index: np.ndarray, is_path: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """What the graph reads beside the images; always the same names.

        Args:
            iteration: number of the batch in its epoch.
            labels, index: of its samples, int64 [n].
            is_path: bool [n], which images are given as paths; None: DALI opens no files.

        Returns:
            "target", as above, or [n, 2, 2] of labels and indices in evaluation; "is_path" unless it is None; in
            training also `mixing.graph_inputs`.
        """
        inputs = {} if is_path is None else dict(is_path=is_path)
        if not self.training:
            return inputs | dict(target=np.stack([labels, index], axis=1).view(np.int32).reshape(-1, 2, 2))
        # Five words, unlike the two of the order, so that the two streams differ.
        rng = np.random.default_rng([self.seed, self.epoch, self.rank, iteration, 1])
        drawn = draw(rng, len(labels), self.size, self.mixing)
        return inputs | dict(target=_target(drawn, labels, index)) | graph_inputs(drawn, self.size, self.mixing)


def _target(drawn: Draw, labels: np.ndarray, index: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(labels), 7, 2), np.int32)
    words = rows.view(np.int64)[..., 0]
    words[:, LABEL], words[:, PARTNER_LABEL] = labels, labels[drawn.partner]
    words[:, PARTNER], words[:, INDEX] = drawn.partner, index
    rows[:, BOX : BOX + 2], rows[:, KIND, 0] = drawn.box.reshape(-1, 2, 2), drawn.kind
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
