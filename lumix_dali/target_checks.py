"""Checks of a batch for the loss: shapes and dtypes always, values on request."""

from __future__ import annotations

import torch
from torch import Tensor

from .target import Kind, MixTarget, check_labels, check_rows

_CUTMIX = int(Kind.CUTMIX)


def check_batch(logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None) -> None:
    """Checks shapes, dtypes and devices. Values are not read: that would force a GPU synchronisation.

    Args:
        logits: [B, K], any floating dtype.
        target: MixTarget or int64 labels [B].
        lam_r: floating [B], or None.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits are a {type(logits).__name__}: pass the model's floating [B, K], then the target")
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {_describe(logits)}: pass the model's floating [B, K]")
    _check_fields(target)
    size = len(logits)
    # torch 2.6 cannot compile the properties of a tuple.
    labels = target.labels if isinstance(target, MixTarget) else target
    if labels.shape[0] != size:
        raise ValueError(f"target has {labels.shape[0]} rows and logits {size}: pass one batch")
    if labels.device != logits.device:
        raise ValueError(f"target is on {labels.device}, logits on {logits.device}: move it by target.to()")
    if lam_r is not None:
        _check_field("lam_r", lam_r, (size,), None)
        if lam_r.device != logits.device:
            raise ValueError(f"lam_r is on {lam_r.device}, logits on {logits.device}: draw it there")


def check_target(target: MixTarget | Tensor, num_classes: int) -> None:
    """Checks the values of a target, once before training: `LUMixLoss` checks only shapes and dtypes.

    Args:
        target: MixTarget or int64 labels [B], on any device (the check synchronises with a GPU).
        num_classes: K, the columns of the model's logits.

    Raises:
        ValueError: a shape or dtype is wrong, a label is outside [0, K) (as -100 is: there is no `ignore_index`), lam0
            is outside [0, 1], a box is impossible, or a kind is unknown.
    """
    _check_fields(target)
    if not isinstance(target, MixTarget):
        return check_labels("target", target, num_classes)
    check_labels("labels", target.labels, num_classes)
    check_labels("partner_labels", target.partner_labels, num_classes)
    check_rows("lam0", target.lam0, (target.lam0 >= 0) & (target.lam0 <= 1), "must lie in [0, 1]")
    check_rows("kind", target.kind, (target.kind >= 0) & (target.kind <= 3), "must be 0, 1, 2 or 3")
    y0, x0, y1, x1 = target.box.unbind(1)
    ordered = (y0 >= 0) & (x0 >= 0) & (y0 <= y1) & (x0 <= x1)
    check_rows("box", target.box, ordered, "must be (y0, x0, y1, x1) with 0 <= y0 <= y1 and 0 <= x0 <= x1")
    placed = (target.kind == _CUTMIX) | (target.box == 0).all(1)
    check_rows("box", target.box, placed, "must be zeros where kind is not 2 (CutMix)")


def _check_fields(target: MixTarget | Tensor) -> None:
    if isinstance(target, Tensor):
        if target.ndim == 2 and target.is_floating_point():
            raise ValueError(
                f"target is {_describe(target)}, soft labels, such as those of timm's Mixup: pass the MixTarget of a "
                "lumix_dali loader, or one of your own (docs/loop.md)"
            )
        _check_field("target", target, (target.shape[:1] or ("B",)), torch.int64)
        return
    if not isinstance(target, MixTarget):
        raise ValueError(f"target is a {type(target).__name__}: pass a MixTarget or int64 labels [B]")
    size = target.labels.shape[:1] or ("B",)
    _check_field("labels", target.labels, size, torch.int64)
    _check_field("partner_labels", target.partner_labels, size, torch.int64)
    _check_field("lam0", target.lam0, size, None)
    _check_field("box", target.box, (*size, 4), torch.int32)
    _check_field("kind", target.kind, size, torch.int32)


def _check_field(name: str, field: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype | None) -> None:
    """`dtype` None: any floating dtype."""
    if not isinstance(field, Tensor):
        raise ValueError(f"{name} is a {type(field).__name__}: pass a tensor")
    right = field.is_floating_point() if dtype is None else field.dtype == dtype
    if field.shape != shape or not right:
        wanted = "a floating dtype" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {_describe(field)}: pass {wanted} [{', '.join(map(str, shape))}]")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
