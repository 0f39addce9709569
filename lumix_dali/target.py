"""MixTarget: what the graph drew for a batch, as the training loop and the loss see it.

Neither torch nor DALI is imported here: in a pipeline definition the fields are DataNodes, from the loader
they are tensors, and the methods below are for tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class MixTarget(NamedTuple):
    """Labels of a mixed batch: which two classes, how much of each, and where.

    `lam0` is the weight of the *partner*, λ0 of LUMix (arXiv 2211.15846, Eq. 1 and 3). timm and torchvision
    weigh the canvas instead: `lam_timm = 1 - lam0`.

    Args:
        labels: int64 [B], classes of the canvas, each sample's own image.
        partner_labels: int64 [B], classes of the image mixed into it.
        lam0: float32 [B] in [0, 1], the partner's weight: pasted pixels over all pixels for CutMix, blend
            weight for Mixup, 0 where nothing is mixed.
        box: int32 [B, 4], the pasted pixels as half-open (y0, x0, y1, x1); zeros unless `kind` is 2.
        kind: int32 [B], what was drawn: 0 none, 1 Mixup, 2 CutMix, 3 other means (`lam0` without a box).

    Note:
        This is a tuple of five fields: `target[2]` is `lam0` and `len(target)` is 5. `select` takes rows.
    """

    labels: Any
    partner_labels: Any
    lam0: Any
    box: Any
    kind: Any

    @property
    def device(self) -> Any:
        """The device of the labels."""
        return self.labels.device

    @property
    def shape(self) -> Any:
        """The shape of the labels, (B,)."""
        return self.labels.shape

    def size(self, dim: int | None = None) -> Any:
        """Shape of the labels, as a LongTensor target has it: `size(0)` is B."""
        return self.labels.shape if dim is None else self.labels.shape[dim]

    def select(self, index: Any) -> MixTarget:
        """The rows that a slice, a boolean mask or a list or tensor of row numbers picks out."""
        return MixTarget(*(field[index] for field in self))

    def to(self, *args: Any, **kwargs: Any) -> MixTarget:
        """Moves every field, in each form that `torch.Tensor.to` takes.

        Args:
            args, kwargs: (device), (dtype), (device, dtype) or (tensor), with `non_blocking` and `copy`. A
                dtype touches `lam0` alone: labels, box and kind stay integers.
        """
        lam0 = self.lam0.to(*args, **kwargs)
        # In each of Tensor.to's forms the first positional bool is non_blocking.
        kwargs.setdefault("non_blocking", next((arg for arg in args if isinstance(arg, bool)), False))
        kwargs.pop("dtype", None)
        kwargs["device"] = lam0.device
        labels, partner_labels, box, kind = (
            field.to(**kwargs) for field in (self.labels, self.partner_labels, self.box, self.kind)
        )
        return MixTarget(labels, partner_labels, lam0, box, kind)

    def cpu(self) -> MixTarget:
        """Every field in host memory."""
        return MixTarget(*(field.cpu() for field in self))

    def cuda(self, device: Any = None, non_blocking: bool = False) -> MixTarget:
        """Every field on a CUDA device, the current one by default."""
        return MixTarget(*(field.cuda(device, non_blocking) for field in self))

    def pin_memory(self) -> MixTarget:
        """Every field in page-locked host memory."""
        return MixTarget(*(field.pin_memory() for field in self))

    def dense(self, num_classes: int, smoothing: float = 0.0) -> Any:
        """The plain soft target `lam0·v_a + (1 - lam0)·v_b` of CutMix and Mixup, for any other loss.

        Args:
            num_classes: K, more than the largest label.
            smoothing: ε in [0, 1); off = ε/K, on = 1 - ε + off, as timm smooths.

        Returns:
            [B, K] in the dtype and on the device of `lam0`; every row sums to 1. It equals timm's
            `mixup_target` at `lam = 1 - lam0`.

        Raises:
            ValueError: `num_classes` below 1 or `smoothing` outside [0, 1).
        """
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be at least 1: pass the model's classes")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must lie in [0, 1): 0 switches it off")
        dense = self.lam0.new_full((self.labels.shape[0], num_classes), smoothing / num_classes)
        partner = (1 - smoothing) * self.lam0
        dense.scatter_add_(1, self.partner_labels[:, None], partner[:, None])
        return dense.scatter_add_(1, self.labels[:, None], (1 - smoothing - partner)[:, None])
