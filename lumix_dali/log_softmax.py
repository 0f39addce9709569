"""The log softmax of a few classes; its backward pass turns the memory of all p into the gradient.

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
        of gradients, because the gradient is written over p.
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
        z = logits - logits.amax(1, keepdim=True).to(dtype)
        log_p, total = z.gather(1, columns), z.sum(1)
        p = torch.softmax(z, 1, out=z)  # each kernel reads a row before it writes it; a test holds it
        shift = p.amax(1).log()  # of the largest p, which cannot underflow; log p_k = z_k + shift
        ctx.save_for_backward(logits, columns)
        ctx.dtype, ctx.p = dtype, p  # an attribute, so that the first backward pass may overwrite it
        return log_p + shift[:, None], total.add(shift, alpha=logits.shape[1])

    @staticmethod
    def backward(ctx: Any, by_log_p: Tensor, by_sum: Tensor) -> tuple[Tensor | None, ...]:
        logits, columns = ctx.saved_tensors
        p, ctx.p = ctx.p, None
        row = by_log_p.sum(1).add(by_sum, alpha=logits.shape[1]).neg()[:, None]
        again = p is None or torch.is_grad_enabled()  # a second pass, or for second derivatives: the same bits
        by_logits = logits.softmax(1, dtype=ctx.dtype) * row if again else p.mul_(row)
        by_logits = by_logits.add_(by_sum[:, None]).scatter_add_(1, columns, by_log_p)
        return by_logits.to(logits.dtype), None, None
