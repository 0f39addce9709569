"""The LUMix loss (arXiv 2211.15846) on what the mixing emitted, without a dense [B, K] target.

A soft target of two classes needs of log softmax only two columns and, for smoothing, the mean; the gradient of
whatever is made of them is the softmax times a number a row, plus a number in each of the two columns. So loss and
gradient are computed in closed form, and `_WithGradient` ties them to the logits. The plain reading, with a dense
target, is `reference.lumix_loss`.

    criterion = LUMixLoss()
    loss = criterion(model(images), target)        # target: MixTarget, or labels [B] without mixing
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .target import MixTarget


class LUMixLoss(nn.Module):
    """Cross entropy on a randomised label weight plus a hinge on the two classes (arXiv 2211.15846, Eq. 3-7).

    With a the partner's class and b the sample's own: λ = (1 - r_r - r_s)·λ0 + r_r·λ_r + r_s·λ_s, clamped to
    [0, 1], where λ_s = p_a / (p_a + p_b); y = λ·v_a + (1 - λ)·v_b on smoothed one-hots;
    L = -Σ_k y_k log p_k + η·Σ_{k∈{a,b}} y_k (1 - p_k).

    Args:
        r_r: in [0, 1], share of the noise λ_r in λ.
        r_s: in [0, 1], share of the model's own λ_s in λ; r_r + r_s is at most 1.
        eta: η ≥ 0, weight of the regulariser R, the second sum.
        noise: law of λ_r: ("beta", α), ("normal", mean, std) or ("uniform",).
        smoothing: ε in [0, 1); off = ε/K, on = 1 - ε + off.
        base: "softmax", or "bce" for sigmoid cross entropy on y; λ_s and R keep the softmax.
        bce_reduction: "mean" (timm's) or "sum" over the classes; used with base="bce" alone.
        detach_lam_s: False lets the gradient flow through λ_s.
        apply_to: samples that get λ and R: "cutmix" (kind 2) or "all" mixed ones (kind above 0).
        reduction: "mean" over the batch, or "none".

    Raises:
        ValueError: an argument out of its range; the message says which, and what to do.

    Note:
        The paper leaves open, and this project chose: η = 1, λ_s detached (`detach_lam_s=False` switches),
        OR for Eq. 8's AND, Mixup samples with plain cross entropy at λ0 (`apply_to="all"` switches). An
        unmixed sample, an empty or whole-image box and any λ0 of 0 or 1 always get plain cross entropy.
        The second number of the paper's N(0, 5) is a variance; here it is `std`.
    """

    def __init__(
        self,
        r_r: float = 0.4,
        r_s: float = 0.1,
        eta: float = 1.0,
        noise: tuple = ("beta", 2.0),
        smoothing: float = 0.1,
        base: str = "softmax",
        bce_reduction: str = "mean",
        detach_lam_s: bool = True,
        apply_to: str = "cutmix",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_ratio("r_r", r_r)
        _check_ratio("r_s", r_s)
        if r_r + r_s > 1 + 1e-9:  # .9 + .1 may round upwards
            raise ValueError(f"r_r={r_r!r} and r_s={r_s!r} add up to {r_r + r_s:g}: lower one, to 1 at most")
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta={eta!r} must be a finite number from 0 on: 0 switches the regulariser off")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must lie in [0, 1): 0 switches it off")
        _check_choice("base", base, ("softmax", "bce"))
        _check_choice("bce_reduction", bce_reduction, ("mean", "sum"))
        _check_choice("apply_to", apply_to, ("cutmix", "all"))
        _check_choice("reduction", reduction, ("mean", "none"))
        self.r_r, self.r_s, self.eta, self.smoothing = float(r_r), float(r_s), float(eta), float(smoothing)
        self.noise = _checked_noise(noise)
        self.base, self.bce_reduction = base, bce_reduction
        self.detach_lam_s = bool(detach_lam_s)
        self.apply_to, self.reduction = apply_to, reduction

    def forward(self, logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None = None) -> Tensor:
        """The loss of a batch (Eq. 6).

        Args:
            logits: [B, K], any floating dtype.
            target: MixTarget on the logits' device, or int64 labels [B] for (smoothed) cross entropy.
            lam_r: floating [B], used instead of a draw; with labels alone it has no part.

        Returns:
            Scalar, or [B] with reduction="none"; float32, or float64 for float64 logits.

        Raises:
            ValueError: a wrong shape, dtype or device. Values are not looked at, for that would wait for the
                GPU: `check_target` does.
        """
        _check_shapes(logits, target, lam_r)
        softmax, mean, columns = self.base == "softmax", self.reduction == "mean", _columns(target)
        off = self.smoothing if softmax else 0.0
        with torch.no_grad():
            all_logp = logits.log_softmax(1, dtype=_compute_dtype(logits))
            logp = all_logp.gather(1, columns)
            if isinstance(target, MixTarget):
                weights, terms, pull = self._mixed(logp, target, lam_r, logits.shape[1])
            else:
                weights = torch.full_like(logp, 1 - self.smoothing)
                terms, pull = self._base(logp, weights)
            loss = terms.sum(1)
            loss = -(loss.add(all_logp.mean(1), alpha=off) if off else loss)
        loss = _WithGradient.apply(logits, loss.mean() if mean else loss, all_logp, columns, pull, off)
        if softmax:
            return loss
        bce = self._bce(logits.to(loss.dtype), columns, weights)
        return loss + (bce.mean() if mean else bce)

    @torch.no_grad()
    def lam(self, logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None = None) -> Tensor:
        """The partner's final weight λ of each sample (Eq. 3), for logs and tests.

        Args:
            logits, target, lam_r: as in `forward`. Without `lam_r` the noise is drawn anew: to see the λ of a
                loss, give both the same `lam_r`, for instance from `draw`.

        Returns:
            [B] in [0, 1], float32 or float64, without gradient; λ0 itself where LUMix does not apply.
        """
        _check_shapes(logits, target, lam_r)
        dtype = _compute_dtype(logits)
        if not isinstance(target, MixTarget):
            return torch.zeros(len(target), dtype=dtype, device=logits.device)
        return self._mix(logits.gather(1, _columns(target)).to(dtype), target, lam_r)[0]

    def draw(self, logits: Tensor) -> Tensor:
        """One λ_r for each row of `logits` from torch's default generator: [B], on the logits' device."""
        size, dtype, device = logits.shape[0], _compute_dtype(logits), logits.device
        law, *numbers = self.noise
        if law == "normal":
            return torch.randn(size, dtype=dtype, device=device) * numbers[1] + numbers[0]
        if law == "uniform" or numbers[0] == 1:
            return torch.rand(size, dtype=dtype, device=device)
        if numbers[0] == 2:  # Beta(2, 2) is the median of three uniforms
            a, b, c = torch.rand(3, size, dtype=dtype, device=device)
            return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
        # Beta = G1 / (G1 + G2), with log Gamma(α) = log Gamma(α + 1) + log(U) / α: a small α would underflow.
        gamma = torch._standard_gamma(torch.full((2, size), numbers[0] + 1, dtype=dtype, device=device))
        power = torch.log1p(-torch.rand(2, size, dtype=dtype, device=device)) / numbers[0]
        first, second = gamma.log() + power
        return torch.sigmoid(first - second)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in ("r_r", "r_s", "eta", "noise", "smoothing", "base", "apply_to", "reduction")
        )

    def _mix(self, columns: Tensor, target: MixTarget, lam_r: Tensor | None) -> tuple[Tensor, Tensor]:
        """λ [B] (Eq. 3), and which samples it applies to; `columns` [B, 2]: z_a and z_b, up to a constant."""
        lam0 = target.lam0.to(columns.dtype)
        cutmix = target.kind == 2
        y0, x0, y1, x1 = target.box.unbind(1)
        # With correct_lam=False a box without pixels has λ0 above 0 all the same; other kinds have no box.
        active = (y0 < y1) & (x0 < x1)
        active = active & cutmix if self.apply_to == "cutmix" else (active | ~cutmix) & (target.kind > 0)
        active = active & (lam0 > 0) & (lam0 < 1)
        lam = (1 - self.r_r - self.r_s) * lam0
        if self.r_r:
            lam = lam.add(self.draw(columns) if lam_r is None else lam_r.to(lam.dtype), alpha=self.r_r)
        if self.r_s:
            lam = lam.add(_lam_s(columns), alpha=self.r_s)
        return torch.where(active, lam.clamp(0, 1), lam0), active

    def _base(self, logp: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The columns' terms of -cross entropy, and their derivative by `logp`: zeros where `_bce` has them."""
        return (weights * logp, weights) if self.base == "softmax" else (0 * weights, 0 * weights)

    def _mixed(
        self, logp: Tensor, target: MixTarget, lam_r: Tensor | None, num_classes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The columns' weights, their terms of -loss, and the derivative of -loss by `logp`: each [B, 2]."""
        lam, active = self._mix(logp, target, lam_r)
        weights = (1 - self.smoothing) * torch.stack((lam, 1 - lam), 1)
        terms, pull = self._base(logp, weights)
        if self.eta:  # R = Σ_{k∈P} y_k (1 - p_k) (Eq. 7)
            y = weights
            if self.smoothing:  # the same class twice is one element of P, with one `off`
                a, b = target.partner_labels, target.labels
                y = y.add(torch.stack((a != b, b == b), 1), alpha=self.smoothing / num_classes)
            less, on = y * torch.expm1(logp), active.to(y.dtype)[:, None]
            terms = torch.addcmul(terms, on, less, value=self.eta)
            pull = torch.addcmul(pull, on, y + less, value=self.eta)
        if self.r_s and not self.detach_lam_s:
            pull = pull + self._through_lam_s(logp, lam, active, num_classes)
        return weights, terms, pull

    def _through_lam_s(self, logp: Tensor, lam: Tensor, active: Tensor, num_classes: int) -> Tensor:
        """What the derivative of -loss by `logp` gets by way of λ_s: [B, 2]."""
        p, per_class = logp.exp(), self.base == "bce" and self.bce_reduction == "mean"
        a, b = (logp / (num_classes if per_class else 1) + self.eta * p).unbind(1)
        lam_s = _lam_s(logp)
        free = active & (lam > 0) & (lam < 1)  # else λ is clamped, or λ0 itself
        slope = (1 - self.smoothing) * (a - b) * free * self.r_s * lam_s * (1 - lam_s)
        return torch.stack((slope, -slope), 1)

    def _bce(self, z: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        """Sigmoid cross entropy on y: Σ_k softplus(z_k) - y_k z_k, or its mean."""
        # Above its threshold softplus drops the exponential; the default of 20 costs float64 half its digits.
        loss = F.softplus(z, threshold=50).sum(1) - (weights * z.gather(1, columns)).sum(1)
        if self.smoothing:
            loss = loss.sub(z.mean(1), alpha=self.smoothing)
        return loss / z.shape[1] if self.bce_reduction == "mean" else loss


def check_target(target: MixTarget | Tensor, num_classes: int) -> None:
    """Checks a target's values, once, before training on it: `LUMixLoss` looks at shapes and dtypes alone.

    Args:
        target: MixTarget or int64 labels [B], on any device (this waits for a GPU).
        num_classes: K, the columns of the model's logits.

    Raises:
        ValueError: a wrong shape or dtype, a label outside [0, K), lam0 outside [0, 1], an impossible box or
            an unknown kind.
    """
    _check_fields(target)
    if not isinstance(target, MixTarget):
        return _check_range("target", target, num_classes)
    _check_range("labels", target.labels, num_classes)
    _check_range("partner_labels", target.partner_labels, num_classes)
    _check_rows("lam0", target.lam0, (target.lam0 >= 0) & (target.lam0 <= 1), "must lie in [0, 1]")
    _check_rows("kind", target.kind, (target.kind >= 0) & (target.kind <= 3), "must be 0, 1, 2 or 3")
    y0, x0, y1, x1 = target.box.unbind(1)
    ordered = (y0 >= 0) & (x0 >= 0) & (y0 <= y1) & (x0 <= x1)
    _check_rows("box", target.box, ordered, "must be (y0, x0, y1, x1) with 0 <= y0 <= y1 and 0 <= x0 <= x1")
    placed = (target.kind == 2) | (target.box == 0).all(1)
    _check_rows("box", target.box, placed, "must be zeros where kind is not 2 (CutMix)")


class _WithGradient(torch.autograd.Function):
    """Hands `loss` on, [B] or its mean; its derivative by log p in the columns is -`pull`, by log p's mean -`off`.

    d log p_k / dz_j = [j = k] - p_j, so dloss/dz is p times a number a row, less one constant for the mean, less
    `pull` in the columns.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss: Tensor, all_logp: Tensor, columns: Tensor, pull: Tensor, off: float
    ) -> Tensor:
        ctx.save_for_backward(logits, columns, pull)
        # An attribute, not a saved tensor, so that the first backward pass may overwrite it and let it go; a
        # second one (retain_graph) makes it anew. A compiled backward does so anyway: a saved one is one more
        # [B, K] to write and read.
        ctx.all_logp, ctx.off = None if torch.compiler.is_compiling() else all_logp, off
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, columns, pull = ctx.saved_tensors
        batch_size, num_classes = logits.shape
        all_logp, ctx.all_logp = ctx.all_logp, None
        p = (logits.log_softmax(1, dtype=pull.dtype) if all_logp is None else all_logp).exp_()
        if grad.ndim == 0:  # of the mean
            grad = grad / batch_size
        grad = grad[..., None]
        result = p.mul_((pull.sum(1, keepdim=True) + ctx.off) * grad)
        if ctx.off:
            result.sub_(grad * (ctx.off / num_classes))
        result.scatter_add_(1, columns, pull * -grad)
        return result.to(logits.dtype), None, None, None, None, None


def _lam_s(columns: Tensor) -> Tensor:
    """λ_s = p_a / (p_a + p_b) [B] (Eq. 5) of z_a and z_b [B, 2], each up to the same constant."""
    a, b = columns.unbind(1)
    return torch.sigmoid(a - b)


def _columns(target: MixTarget | Tensor) -> Tensor:
    """The classes [B, n] that a target gives weight: (a, b), or the label alone."""
    if isinstance(target, MixTarget):
        return torch.stack((target.partner_labels, target.labels), 1)
    return target[:, None]


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_shapes(logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {_describe(logits)}: pass the model's floating [B, K]")
    _check_fields(target)
    size = len(logits)
    if target.size(0) != size:
        raise ValueError(f"target has {target.size(0)} rows and logits {size}: pass one batch")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits on {logits.device}: move it by target.to()")
    if lam_r is not None:
        _check_field("lam_r", lam_r, (size,), None)
        if lam_r.device != logits.device:
            raise ValueError(f"lam_r is on {lam_r.device}, logits on {logits.device}: draw it there")


def _check_fields(target: MixTarget | Tensor) -> None:
    if isinstance(target, Tensor):
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


def _check_field(name: str, field: Tensor, shape: tuple, dtype: torch.dtype | None) -> None:
    """`dtype` None: any floating one."""
    right = field.is_floating_point() if dtype is None else field.dtype == dtype
    if field.shape != shape or not right:
        wanted = "a floating dtype" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {_describe(field)}: pass {wanted} [{', '.join(map(str, shape))}]")


def _check_range(name: str, labels: Tensor, num_classes: int) -> None:
    remedy = f"must lie in [0, {num_classes}): the model has {num_classes} classes"
    _check_rows(name, labels, (labels >= 0) & (labels < num_classes), remedy)


def _check_rows(name: str, field: Tensor, good: Tensor, remedy: str) -> None:
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"{name}[{row}]={field[row].tolist()!r} {remedy}")


def _check_ratio(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1]: it is a share of λ, 0 switches it off")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose {' or '.join(map(repr, choices))}")


def _checked_noise(noise: tuple) -> tuple:
    law, *numbers = (noise,) if isinstance(noise, str) else noise
    if (law, len(numbers)) not in (("beta", 1), ("normal", 2), ("uniform", 0)):
        raise ValueError(f'noise={noise!r}: choose ("beta", α), ("normal", mean, std) or ("uniform",)')
    if law == "beta" and not 0 < numbers[0] < float("inf"):
        raise ValueError(f"noise={noise!r}: alpha must be finite and above 0; r_r=0 switches the noise off")
    if law == "normal" and not (abs(numbers[0]) < float("inf") and 0 <= numbers[1] < float("inf")):
        raise ValueError(f"noise={noise!r}: mean and std must be finite, and std not below 0")
    return (law, *map(float, numbers))


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
