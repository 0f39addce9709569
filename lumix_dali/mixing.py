"""The law of mixing: which sample of a batch is mixed into which, how, and where. NumPy only.

`Mixing` holds the options, and a `Draw` what is mixed. `draw` samples from the law, as a pure function of a random
generator; `graph_inputs` turns that into the arrays by which a graph mixes (`fn.lay`) and computes λ0 (`fn.lam0`). This
is the loader's way. `fn.draw` samples from the same law inside a graph, for pipelines whose batches the host does not
see, and `fn.apply` mixes by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from . import checks
from .target import Kind

Mode = Literal["elem", "batch"]


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed; the arguments have the same meaning as in timm's `Mixup`.

    Args:
        mixup_alpha: Mixup's λ0 ~ Beta(α, α) (arXiv 1710.09412); 0: no Mixup.
        cutmix_alpha: CutMix' drawn λ0 ~ Beta(α, α) (arXiv 1905.04899); 0: no CutMix.
        cutmix_minmax: (low, high) in [0, 1]: the box lies inside the image, its sides are uniform between these
            fractions of the image's sides, and `cutmix_alpha` is not used.
        prob: probability in [0, 1] that a sample is mixed.
        switch_prob: probability in [0, 1] of CutMix, given that a sample is mixed and both are on.
        mode: "elem", one draw per sample, or "batch", one per batch. Each sample has its own partner
            in both.
        correct_lam: compute λ0 from the pixels of the clipped box; False: keep λ0 as drawn. With `cutmix_minmax` λ0 is
            always computed from the pixels, as in timm.

    Raises:
        ValueError: an argument is outside its range, or there is nothing to mix.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 1.0
    cutmix_minmax: Sequence[float] | None = None
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Mode = "elem"
    correct_lam: bool = True

    def __post_init__(self) -> None:
        values: dict[str, Any] = {
            name: checks.number(name, getattr(self, name), 0) for name in ("mixup_alpha", "cutmix_alpha")
        }
        values |= {name: checks.fraction(name, getattr(self, name)) for name in ("prob", "switch_prob")}
        if (minmax := self.cutmix_minmax) is not None:
            low, high = checks.pair("cutmix_minmax", minmax, 0, 1)
            if low >= high:
                raise checks.error("cutmix_minmax", minmax, "give (low, high) with 0 <= low < high <= 1")
            values["cutmix_minmax"] = (low, high)
        values["correct_lam"] = checks.flag("correct_lam", self.correct_lam)
        checks.assign(self, **values)
        if not (self.with_mixup or self.with_cutmix):
            raise ValueError("mixup_alpha=0, cutmix_alpha=0: nothing to mix; give one of them an alpha > 0")
        if self.mode not in get_args(Mode):
            pair = "pair is not supported; " if str(self.mode) == "pair" else ""  # timm's third mode
            raise ValueError(f"mode={self.mode!r}: {pair}give 'elem' (one draw per sample) or 'batch' (one per batch)")

    @property
    def with_mixup(self) -> bool:
        """Whether samples can be drawn for Mixup."""
        return self.mixup_alpha > 0

    @property
    def with_cutmix(self) -> bool:
        """Whether samples can be drawn for CutMix."""
        return self.cutmix_alpha > 0 or self.cutmix_minmax is not None

    @property
    def counts_lam0(self) -> bool:
        """Whether the λ0 of CutMix is computed from the pasted pixels."""
        return self.correct_lam or self.cutmix_minmax is not None


class Draw(NamedTuple):
    """What is mixed into each of n samples: arrays, or DataNodes on the CPU, which have no dimension n.

    Attributes:
        partner: int32 [n], index in the batch of the sample that is mixed in.
        kind: int32 [n], a `Kind`: none, Mixup or CutMix.
        box: int32 [n, 4], half-open (y0, x0, y1, x1) of the pasted pixels; zeros unless the kind is CutMix.
        weight: float32 [n], λ0 as drawn: Mixup's blend weight; for CutMix before the box is rounded and clipped; zero
            where nothing is mixed, and for CutMix with `cutmix_minmax`, which draws sides.
    """

    partner: Any
    kind: Any
    box: Any
    weight: Any


def draw(rng: np.random.Generator, n: int, size: Sequence[int], mixing: Mixing | None) -> Draw:
    """Draws partners, kinds, boxes and weights of LUMix Eq. 1 for a batch.

    Args:
        rng: source of the randomness.
        n: number of samples; a single sample stays unmixed.
        size: (H, W) of the images in pixels.
        mixing: the options; None: nothing is mixed, and each sample is its own partner.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> drawn = draw(rng, 4, (8, 8), Mixing(cutmix_alpha=1.0))
        >>> drawn.partner, drawn.kind
        (array([3, 2, 1, 0], dtype=int32), array([2, 2, 2, 2], dtype=int32))
    """
    kind, box, weight = np.zeros(n, np.int32), np.zeros((n, 4), np.int32), np.zeros(n, np.float32)
    if mixing is None or n < 2:
        return Draw(np.arange(n, dtype=np.int32), kind, box, weight)
    partner = derangement(rng, n).astype(np.int32)
    drawn = n if mixing.mode == "elem" else 1  # one draw is broadcast over the batch
    chance = rng.random(drawn)
    cutmix_prob = mixing.prob
    if mixing.with_mixup:
        cutmix_prob *= mixing.switch_prob if mixing.with_cutmix else 0
    kind[:] = np.select([chance < cutmix_prob, chance < mixing.prob], [Kind.CUTMIX, Kind.MIXUP], Kind.NONE)
    if mixing.with_mixup:
        mixup = rng.beta(mixing.mixup_alpha, mixing.mixup_alpha, drawn)
        weight[:] = np.where(kind == Kind.MIXUP, mixup, 0)
    if mixing.with_cutmix:
        if mixing.cutmix_minmax is not None:
            cutmix, boxes = np.zeros(drawn), _inner_boxes(rng, drawn, size, mixing.cutmix_minmax)
        else:
            cutmix = rng.beta(mixing.cutmix_alpha, mixing.cutmix_alpha, drawn)
            boxes = _clipped_boxes(rng, cutmix, size)
        is_cutmix = kind == Kind.CUTMIX
        weight[:] = np.where(is_cutmix, cutmix, weight)
        box[:] = boxes * is_cutmix[:, None]
    return Draw(partner, kind, box, weight)


def derangement(rng: np.random.Generator, n: int) -> np.ndarray:
    """A uniform random permutation without fixed points (int64 [n])."""
    places = np.arange(n)
    while True:  # e permutations on average
        partner = rng.permutation(n)
        if (partner != places).all():
            return partner


def _clipped_boxes(rng: np.random.Generator, lam: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """CutMix' boxes: side int(size·√λ0), centre uniform over the pixels, clipped to the image."""
    sides = np.floor(np.sqrt(lam)[:, None] * size)
    centres = np.floor(rng.random((len(lam), 2)) * size)
    low = centres - sides // 2
    return np.concatenate([np.clip(low, 0, size), np.clip(low + sides, 0, size)], axis=1).astype(np.int32)


def _inner_boxes(rng: np.random.Generator, n: int, size: Sequence[int], minmax: Sequence[float]) -> np.ndarray:
    """timm's `cutmix_minmax`: sides uniform in [int(size·low), int(size·high)), the box anywhere inside."""
    shortest, longest = (np.floor(np.asarray(size) * limit) for limit in minmax)
    sides = shortest + np.floor(rng.random((n, 2)) * (longest - shortest))
    start = np.floor(rng.random((n, 2)) * (size - sides + 1))
    return np.concatenate([start, start + sides], axis=1).astype(np.int32)


def patches(drawn: Draw, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A draw as two patches for each sample: the whole canvas, and the partner's box, or for Mixup the whole partner.

    No patch is empty, because DALI's GPU kernel mishandles those: where nothing is pasted, it is the sample's own first
    pixel.

    Returns:
        Indices int32 [n, 2] of the patches' samples, and their (y, x) and (height, width), int32 [n, 2, 2].
    """
    n, own = len(drawn.kind), np.arange(len(drawn.kind), dtype=np.int32)
    is_mixup, sides = (drawn.kind == Kind.MIXUP)[:, None], drawn.box[:, 2:] - drawn.box[:, :2]
    has_box = (sides > 0).all(axis=1, keepdims=True)
    ids = np.stack([own, np.where((is_mixup | has_box)[:, 0], drawn.partner, own)], axis=1)
    anchors, shapes = np.zeros((n, 2, 2), np.int32), np.empty((n, 2, 2), np.int32)
    anchors[:, 1] = drawn.box[:, :2] * has_box
    shapes[:, 0], shapes[:, 1] = size, np.where(is_mixup, size, np.where(has_box, sides, 1))
    return ids, anchors, shapes


def graph_inputs(drawn: Draw, size: Sequence[int], mixing: Mixing | None) -> dict[str, np.ndarray]:
    """A draw as the arrays from which a graph mixes (`fn.lay`) and computes λ0 (`fn.lam0`).

    Only those that these options need, always the same ones: each costs the training thread 15 µs a batch.

    Returns:
        "ids", "anchors" and "shapes" of `patches`; "is_mixup", bool [n]; "opacity", float32 [n], of the second patch:
        Mixup's λ0, 1 for CutMix, 0 where nothing is mixed; and "height" and "width", int32 [n], of the box, or for
        Mixup of the whole image: their share of the image times the opacity is λ0. Where λ0 is as drawn, "lam0",
        float32 [n], instead.
    """
    if mixing is None:
        return dict(lam0=drawn.weight)
    ids, anchors, shapes = patches(drawn, size)
    is_mixup = drawn.kind == Kind.MIXUP
    inputs = dict(ids=ids)
    if mixing.with_cutmix:
        inputs |= dict(anchors=anchors, shapes=shapes)
    if mixing.with_mixup:
        opacity = np.where(is_mixup, drawn.weight, (ids[:, 0] != ids[:, 1]).astype(np.float32))
        inputs |= dict(is_mixup=is_mixup, opacity=opacity)
    if not (mixing.with_cutmix and mixing.counts_lam0):
        return inputs | dict(lam0=drawn.weight)
    y0, x0, y1, x1 = drawn.box.T.copy()  # contiguous, as DALI needs them
    full_height, full_width = np.array(size, np.int32)
    return inputs | dict(height=np.where(is_mixup, full_height, y1 - y0), width=np.where(is_mixup, full_width, x1 - x0))
