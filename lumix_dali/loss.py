"""The LUMix loss (arXiv 2211.15846) for a `MixTarget`, without a dense [B, K] target.

    criterion = LUMixLoss()
    loss = criterion(model(images), target)        # target: MixTarget, or labels [B] without mixing

`reference.lumix_loss` is the same loss with a dense target.
"""

from __future__ import annotations

from inspect import signature
from math import inf
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .log_softmax import log_softmax_at
from .target import Kind, MixTarget
from .target_checks import check_batch, check_target

# Code under torch.compile treats a tensor as unequal to every enum member (torch 2.14.1).
_NONE, _CUTMIX = int(Kind.NONE), int(Kind.CUTMIX)
_NO_CLASS = -(2**31)  # PyTorch's default ignore_index, -100, would pass unnoticed
_LARGEST = 1e6  # of the numbers of a noise: far beyond use, and safe in float32

Noise = tuple[Literal["beta"], float] | tuple[Literal["normal"], float, float] | tuple[Literal["uniform"]]
Base = Literal["softmax", "bce"]
BCEReduction = Literal["mean", "sum"]
ApplyTo = Literal["cutmix", "all"]
Reduction = Literal["mean", "none"]

torch.serialization.add_safe_globals([MixTarget])  # torch.load's default, weights_only=True, reads a saved target


class LUMixLoss(nn.Module):
    """Cross entropy with a randomised label weight, plus a hinge on the two classes (arXiv 2211.15846, Eq. 3-7).

    With a the partner's class and b the sample's own: λ = (1 - r_r - r_s)·λ0 + r_r·λ_r + r_s·λ_s, clamped to
    [0, 1], where λ_s = p_a / (p_a + p_b); y = λ·v_a + (1 - λ)·v_b on smoothed one-hots;
    L = -Σ_k y_k log p_k + η·Σ_{k∈{a,b}} y_k (1 - p_k).

    Args:
        r_r: share of the noise λ_r in λ, in [0, 1]; float, or 0-dim tensor on the GPU, as `r_s` and `eta`.
        r_s: share of the model's own λ_s in λ, in [0, 1]; r_r + r_s is at most 1.
        eta: η ≥ 0, weight of the regulariser R (the second sum).
        noise: distribution of λ_r: ("beta", α), ("normal", mean, std) or ("uniform",).
        smoothing: ε in [0, 1); off = ε/K, on = 1 - ε + off.
        base: "softmax", or "bce" for sigmoid cross entropy on y; λ_s and R use the softmax in both cases.
        bce_reduction: "mean" (timm's) or "sum" over the classes, of the BCE and of R; only used with base="bce".
        detach_lam_s: False lets the gradient flow through λ_s.
        apply_to: which samples get λ and R: "cutmix" (kind 2) or "all" that are mixed (kind above 0).
        reduction: "mean" over the batch, or "none".

    Example:
        >>> target = MixTarget(torch.tensor([1]), torch.tensor([0]), torch.tensor([.25]),
        ...                    torch.tensor([[0, 0, 4, 4]]).int(), torch.tensor([2]).int(), torch.tensor([0]))
        >>> logits = torch.tensor([[.5, .3, .1, .1]]).log()
        >>> LUMixLoss(smoothing=0.0)(logits, target, lam_r=torch.tensor([.6]))
        tensor(1.6001)

    Raises:
        ValueError: an argument is out of range; the message names it and the remedy.

    Note:
        `r_r`, `r_s`, `eta` and `noise` may be assigned at any time, with the same checks. A compiled loss compiles
        again once when a number first changes, or becomes or stops being 0. A captured CUDA graph, which is what
        torch.compile's "reduce-overhead" makes, keeps the floats that it was captured with: there, make `r_r`, `r_s`
        and `eta` 0-dim tensors on the GPU and fill them in place. Their values are not checked.

        Every label counts. There is no `ignore_index`: -100 is an error, which `check_target` reports. A class that
        is masked with a logit of -inf costs nothing where the target gives it no weight. Smoothing gives every class
        some weight, so the loss is then infinite, as PyTorch's cross entropy is.

        Second derivatives (`create_graph=True`) are supported in eager mode, and need more memory than a backward
        pass. PyTorch refuses the transforms of `torch.func`, forward-mode derivatives and batches of gradients for a
        `MixTarget`: `log_softmax.py` writes the gradient over p.

        The paper leaves some choices open. This project chose η = 1, a detached λ_s (see `detach_lam_s`), OR for the
        AND of Eq. 8, and plain cross entropy at λ0 for Mixup samples (see `apply_to`). An unmixed sample and a
        λ0 of 0 or 1, as of an empty or whole-image box, always get plain cross entropy. With base="bce" and
        bce_reduction="mean" R is divided by K too: left as a sum, its gradient would be far above the BCE's. The second
        number of the paper's N(0, 5) is a variance; here it is `std`.
    """

    r_r: float | Tensor
    r_s: float | Tensor
    eta: float | Tensor
    noise: Noise

    def __init__(
        self,
        r_r: float | Tensor = 0.4,
        r_s: float | Tensor = 0.1,
        eta: float | Tensor = 1.0,
        noise: Noise = ("beta", 2.0),
        smoothing: float = 0.1,
        base: Base = "softmax",
        bce_reduction: BCEReduction = "mean",
        detach_lam_s: bool = True,
        apply_to: ApplyTo = "cutmix",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.r_r, self.r_s, self.eta, self.noise = r_r, r_s, eta, noise
        self._check_shares()
        self.smoothing = checks.fraction("smoothing", smoothing, below_one=True)
        self.base = checks.one_of("base", base, get_args(Base))
        self.bce_reduction = checks.one_of("bce_reduction", bce_reduction, get_args(BCEReduction))
        self.detach_lam_s = checks.flag("detach_lam_s", detach_lam_s)
        self.apply_to = checks.one_of("apply_to", apply_to, get_args(ApplyTo))
        self.reduction = checks.one_of("reduction", reduction, get_args(Reduction))

    def forward(self, logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None = None) -> Tensor:
        """The loss of a batch (Algorithm 1).

        Args:
            logits: [B, K], any floating dtype.
            target: MixTarget on the logits' device, or int64 labels [B] for (smoothed) cross entropy.
            lam_r: floating [B], the noise to use instead of drawing it; ignored for labels [B].

        Returns:
            Scalar, or [B] with reduction="none"; float32, or float64 for float64 logits.

        Raises:
            ValueError: a shape, dtype or device is wrong, r_r and r_s add up to more than 1, or, on the CPU, a label is
                not a class of the model. Other values are not checked: on a GPU that would force a synchronisation.
                `check_target` checks them.
        """
        self._check_shares()
        check_batch(logits, target, lam_r)
        try:
            loss = self._mixed(logits, target, lam_r) if isinstance(target, MixTarget) else self._plain(logits, target)
        except (RuntimeError, IndexError):
            if logits.device.type == "cpu":
                check_target(target, logits.shape[1])  # names a label that is out of range
            raise
        return loss.mean() if self.reduction == "mean" else loss

    def _mixed(self, logits: Tensor, target: MixTarget, lam_r: Tensor | None) -> Tensor:
        a, b = target.partner_labels, target.labels
        classes, off = torch.stack((a, b), 1), self.smoothing / logits.shape[1]
        log_p, sum_log_p = log_softmax_at(logits, classes, _compute_dtype(logits))
        detach = self.detach_lam_s or _is_zero(self.r_s)  # 0 times the gradient of an infinite loss would be NaN
        lam, active = self._lam(log_p.detach() if detach else log_p, target, lam_r)
        y = (1 - self.smoothing) * torch.stack((lam, 1 - lam), 1)  # less the `off` that every class has
        if self.base == "bce":
            loss = self._bce(logits.to(y.dtype), classes, y)
        else:
            loss = -(y * _without_masked(log_p, y)).sum(1)
            loss = loss.sub(sum_log_p, alpha=off) if off else loss
        if not _is_zero(self.eta):
            if off:  # the same class twice is one class of y, with one `off`
                y = y.add(torch.stack((a != b, b == b), 1), alpha=off)  # b == b: ones
            loss = loss - (self.eta * (active[:, None] * y) * log_p.expm1()).sum(1)  # η·R: Eq. 7
        return loss / logits.shape[1] if self.base == "bce" and self.bce_reduction == "mean" else loss

    def _plain(self, logits: Tensor, labels: Tensor) -> Tensor:
        z = logits.to(_compute_dtype(logits))
        if self.base == "softmax":
            return F.cross_entropy(z, labels, ignore_index=_NO_CLASS, reduction="none", label_smoothing=self.smoothing)
        classes = labels[:, None]
        loss = self._bce(z, classes, torch.full_like(classes, 1 - self.smoothing, dtype=z.dtype))
        return loss / z.shape[1] if self.bce_reduction == "mean" else loss

    def label_weight(self, lam0: Tensor, lam_s: Tensor, lam_r: Tensor) -> Tensor:
        """λ of Eq. 3 before it is clamped to [0, 1]; override it for another label weight.

        Args:
            lam0, lam_s, lam_r: [B], float32 or float64; `lam_r` is `lam0` where r_r is 0. `lam_s` carries a gradient
                only with `detach_lam_s` off and r_s above 0.

        Returns:
            [B].
        """
        return (1 - self.r_r - self.r_s) * lam0 + self.r_r * lam_r + self.r_s * lam_s

    @torch.no_grad()
    def lam(self, logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None = None) -> Tensor:
        """The final weight λ of each sample's partner (Eq. 3), for logs and tests.

        Args:
            logits, target, lam_r: as in `forward`. Without `lam_r` the noise is drawn again: to get the λ of a loss,
                pass the same `lam_r` to both, for instance from `draw`.

        Returns:
            [B] in [0, 1], float32 or float64, without gradient; λ0 itself where LUMix does not apply.

        Raises:
            ValueError: as in `forward`.
        """
        self._check_shares()
        check_batch(logits, target, lam_r)
        if not isinstance(target, MixTarget):
            return torch.zeros(len(target), dtype=_compute_dtype(logits), device=logits.device)
        return self._lam(_logits_at(logits, target), target, lam_r)[0]

    @torch.no_grad()
    def lam_s(self, logits: Tensor, target: MixTarget) -> Tensor:
        """The model's own weight of each partner, λ_s = p_a / (p_a + p_b) (Eq. 5), for logs; whatever r_s is.

        Args:
            logits: [B, K], any floating dtype.
            target: MixTarget on the logits' device.

        Returns:
            [B] in [0, 1], float32 or float64, without gradient; 1/2 where both classes are the same.

        Raises:
            ValueError: as in `forward`, and for labels [B], which have no partner.
        """
        if not isinstance(target, MixTarget):
            raise ValueError(f"target is a {type(target).__name__}: pass a MixTarget, which has partners")
        check_batch(logits, target, None)
        return _lam_s(_logits_at(logits, target))

    def draw(self, logits: Tensor) -> Tensor:
        """Draws one λ_r per row of `logits` from PyTorch's default generator: [B], on the logits' device."""
        size = logits.shape[0]
        like: dict[str, Any] = dict(dtype=_compute_dtype(logits), device=logits.device)
        if self._law == "normal":
            return torch.randn(size, **like) * self._second + self._first
        if self._law == "uniform":
            return torch.rand(size, **like)
        alpha = self._first
        if alpha == 2:  # Beta(2, 2) is the median of three uniforms
            first, second, third = torch.rand(3, size, **like).unbind()
            return third.clamp(torch.minimum(first, second), torch.maximum(first, second))
        # Beta = G1 / (G1 + G2), with log Gamma(α) = log Gamma(α + 1) + log(U) / α: a small α would underflow.
        shape = torch.full((2, size), alpha + 1, **like)
        gamma = torch.distributions.Gamma(shape, torch.ones_like(shape), validate_args=False).sample()
        first, second = gamma.log() + torch.log1p(-torch.rand(2, size, **like)) / alpha
        return torch.sigmoid(first - second)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in signature(LUMixLoss).parameters)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("r_r", "r_s", "eta"):
            value = _checked_number(name, value, inf if name == "eta" else 1)
        elif name == "noise":
            value = law, *numbers = _checked_noise(value)
            # torch.compile makes a graph for each value of a number in a tuple, but not of an attribute.
            self._law, self._first, self._second = law, *numbers, *[0.0] * (2 - len(numbers))
        super().__setattr__(name, value)

    def _lam(self, z: Tensor, target: MixTarget, lam_r: Tensor | None) -> tuple[Tensor, Tensor]:
        """λ [B] (Eq. 3), and the samples that it applies to; `z` [B, 2]: z_a and z_b, up to a constant."""
        lam0 = target.lam0.to(z.dtype)
        active = target.kind == _CUTMIX if self.apply_to == "cutmix" else target.kind > _NONE
        active = torch.logical_and(active, lam0.frac())  # not at a λ0 of 0 or 1
        if _is_zero(self.r_r):
            lam_r = lam0
        elif lam_r is None:
            lam_r = self.draw(z)
        lam = self.label_weight(lam0, _lam_s(z), lam_r.to(z.dtype))
        return torch.where(active, lam.clamp(0, 1), lam0), active

    def _bce(self, z: Tensor, classes: Tensor, y: Tensor) -> Tensor:
        """Sigmoid cross entropy, Σ_k softplus(z_k) - y_k z_k; `y` is less the ε/K of every class."""
        # Above its threshold softplus drops the exponential; the default of 20 costs float64 half its digits.
        loss = F.softplus(z, threshold=50).sum(1) - (y * _without_masked(z.gather(1, classes), y)).sum(1)
        return loss.sub(z.mean(1), alpha=self.smoothing) if self.smoothing else loss

    def _check_shares(self) -> None:
        if isinstance(self.r_r, Tensor) or isinstance(self.r_s, Tensor):
            return
        total = self.r_r + self.r_s  # not when they are set: between (.1, .9) and (.9, .1) it exceeds 1
        if total > 1 + 1e-6:  # .9 + .1 may round upwards, and float32 numbers further
            raise ValueError(f"r_r={self.r_r!r} and r_s={self.r_s!r} add up to {total:g}: lower one, to 1 at most")


def _logits_at(logits: Tensor, target: MixTarget) -> Tensor:
    return logits.gather(1, torch.stack((target.partner_labels, target.labels), 1)).to(_compute_dtype(logits))


def _lam_s(z: Tensor) -> Tensor:
    """λ_s = p_a / (p_a + p_b) [B] (Eq. 5) of z_a and z_b [B, 2], each up to the same constant."""
    a, b = z.clamp(min=torch.finfo(z.dtype).min).unbind(1)  # -inf - -inf would be NaN
    return torch.sigmoid(a - b)


def _without_masked(values: Tensor, weights: Tensor) -> Tensor:
    """0 where the weight is 0: a class masked with a logit of -inf would give 0·-inf."""
    return values.masked_fill(weights == 0, 0)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _is_zero(number: float | Tensor) -> bool:
    return not isinstance(number, Tensor) and number == 0


def _checked_number(name: str, value: float | Tensor, maximum: float) -> float | Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        if value.device.type != "cpu":
            return value
        value = value.item()
    return checks.number(name, value, 0, maximum)  # type: ignore[arg-type]  # a tensor of another shape is an error


def _checked_noise(noise: Noise) -> Noise:
    match noise:
        case ("beta", alpha):
            return "beta", checks.number("noise's α", alpha, 1 / _LARGEST, _LARGEST)
        case ("normal", mean, std):
            mean = checks.number("noise's mean", mean, -_LARGEST, _LARGEST)
            return "normal", mean, checks.number("noise's std", std, 0, _LARGEST)
        case ("uniform",):
            return ("uniform",)
    raise checks.error("noise", noise, 'give ("beta", α), ("normal", mean, std) or ("uniform",)')
