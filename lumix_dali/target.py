"""MixTarget: what was drawn for a batch, as the training loop and the loss see it.

This module imports neither PyTorch nor DALI. The fields are DataNodes in a pipeline definition and tensors in a batch
from the loader; the methods are for tensors.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from . import checks


class Kind(IntEnum):
    """What was drawn for a sample.

    Note:
        In code for ``torch.compile`` write ``target.kind == int(Kind.CUTMIX)``: compiled code treats a tensor as
        unequal to every enum member (torch 2.14.1).
    """

    NONE = 0
    MIXUP = 1
    CUTMIX = 2
    OTHER = 3  # mixed by other means, `lam0` without a box; `LUMixLoss` treats it as Mixup, see its `apply_to`


_NO_TENSOR = (
    "A MixTarget is no tensor: give it to LUMixLoss, target.dense(num_classes) to losses of soft labels, and "
    "target.labels to metrics"
)


class MixTarget(NamedTuple):
    """Labels of a mixed batch: the two classes of each sample, their weights, and where each lies.

    `lam0` is the weight of the *partner*, λ0 of LUMix (arXiv 2211.15846, Eq. 1 and 3). timm and torchvision
    weigh the canvas instead: `lam_timm = 1 - lam0`.

    Args:
        labels: int64 [B], classes of the canvas, each sample's own image.
        partner_labels: int64 [B], classes of the image mixed into it.
        lam0: float32 [B] in [0, 1], the partner's weight: pasted pixels over all pixels for CutMix (as drawn with
            ``correct_lam=False``), blend weight for Mixup, 0 where nothing is mixed.
        box: int32 [B, 4], the pasted pixels as half-open (y0, x0, y1, x1); zeros unless `kind` is 2.
        kind: int32 [B], what was drawn: a `Kind`.
        partner: int64 [B], index in the batch of the image mixed in, with which `mix` mixes anything else that belongs
            to the samples. It has no meaning where `lam0` is 0.

    Note:
        This is a tuple of six fields: `target[2]` is `lam0`, `len(target)` is 6, and ``prediction == target`` compares
        no labels. Use `size(0)` for B, `labels` to compare, and `select` to take rows; `partner` then still refers to
        indices of the whole batch.
    """

    labels: Any
    partner_labels: Any
    lam0: Any
    box: Any
    kind: Any
    partner: Any

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An error for whatever takes this for a tensor, such as ``cross_entropy`` or ``prediction == target``."""
        raise ValueError(f"{getattr(function, '__name__', function)}: {_NO_TENSOR}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"MixTarget has no {name!r}. {_NO_TENSOR}")

    @property
    def device(self) -> Any:
        """The device of the labels."""
        return self.labels.device

    @property
    def shape(self) -> Any:
        """The shape of the labels, (B,)."""
        return self.labels.shape

    def size(self, dim: int | None = None) -> Any:
        """Shape of the labels, as for a LongTensor target: `size(0)` is B."""
        return self.labels.shape if dim is None else self.labels.shape[dim]

    def select(self, index: Any) -> MixTarget:
        """The rows selected by a slice, a boolean mask, or a list or tensor of row numbers."""
        return MixTarget(*(field[index] for field in self))

    def to(self, *args: Any, **kwargs: Any) -> MixTarget:
        """Moves every field; takes every form of arguments that `torch.Tensor.to` takes.

        Args:
            args, kwargs: (device), (dtype), (device, dtype) or (tensor), with `non_blocking` and `copy`. A
                dtype applies only to `lam0`: the other fields stay integers.
        """
        lam0 = self.lam0.to(*args, **kwargs)
        # In each of Tensor.to's forms the first positional bool is non_blocking.
        kwargs.setdefault("non_blocking", next((arg for arg in args if isinstance(arg, bool)), False))
        kwargs.pop("dtype", None)
        kwargs["device"] = lam0.device
        moved = {name: getattr(self, name).to(**kwargs) for name in self._fields if name != "lam0"}
        return MixTarget(lam0=lam0, **moved)

    def cpu(self) -> MixTarget:
        """Every field in host memory."""
        return MixTarget(*(field.cpu() for field in self))

    def cuda(self, device: Any = None, non_blocking: bool = False) -> MixTarget:
        """Every field on a CUDA device, the current one by default."""
        return MixTarget(*(field.cuda(device, non_blocking) for field in self))

    def pin_memory(self) -> MixTarget:
        """Every field in page-locked host memory."""
        return MixTarget(*(field.pin_memory() for field in self))

    def mix(self, values: Any) -> Any:
        """Mixes other values that belong to the samples: ``(1 - lam0)·values + lam0·values[partner]`` (LUMix Eq. 2).

        Args:
            values: floating point [B, ...] on the device of `lam0`, such as soft or multi-hot labels, or a teacher's
                outputs for the unmixed images.

        Returns:
            A tensor of the shape and dtype of `values`.

        Raises:
            ValueError: `values` is not floating point, or does not have B rows; on a CPU also if a partner is not among
                them, because the batch was cut after mixing.

        Example:
            >>> import torch
            >>> target = MixTarget(*torch.tensor([[0, 1], [1, 0]]), torch.tensor([.25, 0.]), None, None,
            ...                    torch.tensor([1, 0]))
            >>> target.mix(torch.tensor([[1., 0.], [0., 1.]]))
            tensor([[0.7500, 0.2500],
                    [0.0000, 1.0000]])
        """
        tensor = isinstance(values, type(self.lam0))
        if not tensor or not values.is_floating_point() or values.shape[:1] != self.lam0.shape:
            described = f"{values.dtype} {list(values.shape)}" if tensor else f"a {type(values).__name__}"
            raise ValueError(
                f"values={described}: give a tensor of floating point numbers, one row per sample "
                f"({self.lam0.shape[0]})"
            )
        weight = self.lam0.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
        # On a GPU the check would wait for it.
        if not self.partner.is_cuda and (self.partner >= len(values)).any():
            raise ValueError(
                f"partner: index {int(self.partner.max())} in a batch of {len(values)}, cut after it was mixed. "
                "Give DALI's iterators last_batch_policy=LastBatchPolicy.DROP, and call mix before select"
            )
        # Not lerp: 0 · inf is NaN, and a weight of 0 must leave a sample unchanged.
        partners = values[self.partner]
        return ((1 - weight) * values).where(weight < 1, 0) + (weight * partners).where(weight > 0, 0)

    def dense(self, num_classes: int, smoothing: float = 0.0) -> Any:
        """The soft target `lam0·v_a + (1 - lam0)·v_b` of plain CutMix and Mixup, for any other loss.

        Args:
            num_classes: K, greater than the largest label.
            smoothing: ε in [0, 1); off = ε/K, on = 1 - ε + off, as timm smooths.

        Returns:
            [B, K] in the dtype and on the device of `lam0`; every row sums to 1. It equals timm's
            `mixup_target` at `lam = 1 - lam0`.

        Raises:
            ValueError: `num_classes` is below 1, `smoothing` outside [0, 1), or, on the CPU, a label not below
                `num_classes`.
        """
        num_classes = checks.whole("num_classes", num_classes, 1)
        smoothing = checks.fraction("smoothing", smoothing, below_one=True)
        dense = self.lam0.new_full((self.labels.shape[0], num_classes), smoothing / num_classes)
        partner = (1 - smoothing) * self.lam0
        try:
            dense.scatter_add_(1, self.partner_labels[:, None], partner[:, None])
            return dense.scatter_add_(1, self.labels[:, None], (1 - smoothing - partner)[:, None])
        except RuntimeError:
            if self.labels.device.type == "cpu":
                check_labels("partner_labels", self.partner_labels, num_classes)
                check_labels("labels", self.labels, num_classes)
            raise


def check_labels(name: str, labels: Any, num_classes: int) -> None:
    """Raises a ValueError for the first label outside [0, `num_classes`)."""
    remedy = f"must lie in [0, {num_classes}): the model has {num_classes} classes, and there is no ignore_index"
    check_rows(name, labels, (labels >= 0) & (labels < num_classes), remedy)


def check_rows(name: str, field: Any, good: Any, remedy: str) -> None:
    """Raises a ValueError for the first row of a tensor that is not `good`, bool [B]."""
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"{name}[{row}]={field[row].tolist()!r} {remedy}")
