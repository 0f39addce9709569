"""The log softmax of a few classes; its backward pass turns the memory of all log p into the gradient.

Plain operations would hold three dense [B, K] tensors besides the logits, and this holds one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_softmax_at(logits: Tensor, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p of the chosen classes, and the sum of the log p of all classes.

    Args:
        logits: [B, K], any floating dtype.
        columns: int64 [B, n], the chosen classes; the same class may come twice.
        dtype: to compute in.

    Returns:
        (log_p, total): [B, n] and [B].

    Note:
        Second derivatives are supported in eager mode. PyTorch refuses torch.func, forward-mode derivatives and batches
        of gradients, because the gradient is written over log p.
    """
    if torch.compiler.is_compiling():  # the compiler fuses plain operations itself
        all_log_p = logits.log_softmax(1, dtype=dtype)
        return all_log_p.gather(1, columns), all_log_p.sum(1)  # a mean's gradient would be dense
    log_p, total = _LogSoftmaxAt.apply(logits, columns, dtype)
    return log_p, total


class _LogSoftmaxAt(torch.autograd.Function):
    """d log p_k / dz_j = [j = k] - p_j, and the sum's derivative is 1 - K·p_j."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        all_log_p = logits.log_softmax(1, dtype=dtype)
        ctx.save_for_backward(logits, columns)
        ctx.dtype, ctx.all_log_p = dtype, all_log_p  # an attribute, so that the first backward pass may overwrite it
        return all_log_p.gather(1, columns), all_log_p.sum(1)

    @staticmethod
    def backward(ctx: Any, by_log_p: Tensor, by_sum: Tensor) -> tuple[Tensor | None, ...]:
        logits, columns = ctx.saved_tensors
        all_log_p, ctx.all_log_p = ctx.all_log_p, None
        if all_log_p is None or torch.is_grad_enabled():  # a second pass, or for second derivatives
            p, out = logits.log_softmax(1, dtype=ctx.dtype).exp(), None  # bit for bit as below
        else:
            p = out = all_log_p.exp_()
        row = by_log_p.sum(1).add(by_sum, alpha=p.shape[1])[:, None]
        by_logits = torch.addcmul(by_sum[:, None], p, row, value=-1, out=out)
        return by_logits.scatter_add_(1, columns, by_log_p).to(logits.dtype), None, None
