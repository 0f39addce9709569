"""The LUMix loss (arXiv 2211.15846) for a `MixTarget`, without a dense [B, K] target.

A soft target of two classes needs only two columns of the log softmax and, for smoothing, its mean. The gradient of
the loss is the softmax times one number per row, plus one number in each of the two columns. `_CrossEntropy` computes
both in closed form; `_plain_cross_entropy` is the same loss in plain operations, for second derivatives and
torch.func. `reference.lumix_loss` is the same loss with a dense target.

    criterion = LUMixLoss()
    loss = criterion(model(images), target)        # target: MixTarget, or labels [B] without mixing
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .target import Kind, MixTarget

# Code under torch.compile treats a tensor as unequal to every enum member (torch 2.14.1).
_CUTMIX = int(Kind.CUTMIX)


Noise = tuple[Any, ...]  # a name and its numbers


class LUMixLoss(nn.Module):
    """Cross entropy with a randomised label weight, plus a hinge on the two classes (arXiv 2211.15846, Eq. 3-7).

    With a the partner's class and b the sample's own: λ = (1 - r_r - r_s)·λ0 + r_r·λ_r + r_s·λ_s, clamped to
    [0, 1], where λ_s = p_a / (p_a + p_b); y = λ·v_a + (1 - λ)·v_b on smoothed one-hots;
    L = -Σ_k y_k log p_k + η·Σ_{k∈{a,b}} y_k (1 - p_k).

    Args:
        r_r: share of the noise λ_r in λ, in [0, 1].
        r_s: share of the model's own λ_s in λ, in [0, 1]; r_r + r_s is at most 1.
        eta: η ≥ 0, weight of the regulariser R (the second sum).
        noise: distribution of λ_r: ("beta", α), ("normal", mean, std) or ("uniform",).
        smoothing: ε in [0, 1); off = ε/K, on = 1 - ε + off.
        base: "softmax", or "bce" for sigmoid cross entropy on y; λ_s and R use the softmax in both cases.
        bce_reduction: "mean" (timm's) or "sum" over the classes; only used with base="bce".
        detach_lam_s: False lets the gradient flow through λ_s.
        apply_to: which samples get λ and R: "cutmix" (kind 2) or "all" that are mixed (kind above 0).
        reduction: "mean" over the batch, or "none".

    Raises:
        ValueError: an argument is out of range; the message names it and the remedy.

    Note:
        `r_r`, `r_s`, `eta` and `noise` may be assigned at any time, with the same checks. A compiled loss uses the
        new values and compiles again only when a number becomes 0 or stops being 0.

        Every label counts. There is no `ignore_index`: -100 is an error, which `check_target` reports. A class that
        is masked with a logit of -inf costs nothing where the target gives it no weight. Smoothing gives every class
        some weight, so the loss is then infinite, as PyTorch's cross entropy is.

        Second derivatives (`create_graph=True`) and the transforms of `torch.func` are supported in eager mode.
        They need more memory than a backward pass.

        The paper leaves some choices open. This project chose η = 1, a detached λ_s (see `detach_lam_s`), OR for the
        AND of Eq. 8, and plain cross entropy at λ0 for Mixup samples (see `apply_to`). An unmixed sample, an empty
        or whole-image box and a λ0 of 0 or 1 always get plain cross entropy. The second number of the paper's
        N(0, 5) is a variance; here it is `std`.
    """

    def __init__(
        self,
        r_r: float = 0.4,
        r_s: float = 0.1,
        eta: float = 1.0,
        noise: Noise = ("beta", 2.0),
        smoothing: float = 0.1,
        base: str = "softmax",
        bce_reduction: str = "mean",
        detach_lam_s: bool = True,
        apply_to: str = "cutmix",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self._r_s: Tensor | None = None  # the setter of r_r reads it
        self.r_r, self.r_s, self.eta, self.noise = r_r, r_s, eta, noise
        self._check_shares()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must lie in [0, 1): 0 switches it off")
        _check_choice("base", base, ("softmax", "bce"))
        _check_choice("bce_reduction", bce_reduction, ("mean", "sum"))
        _check_choice("apply_to", apply_to, ("cutmix", "all"))
        _check_choice("reduction", reduction, ("mean", "none"))
        self.smoothing = float(smoothing)
        self.base, self.bce_reduction = base, bce_reduction
        self.detach_lam_s = bool(detach_lam_s)
        self.apply_to, self.reduction = apply_to, reduction

    # A schedule may set these at every step. They are 0-dim tensors because torch.compile compiles again for each
    # value of a float attribute, and None where 0 switches their term off.

    @property
    def r_r(self) -> float:
        """Share of the noise λ_r in λ; may be set at any time."""
        return _value(self._r_r)

    @r_r.setter
    def r_r(self, value: float) -> None:
        self._r_r = _number_or_none(_checked_ratio("r_r", value))
        self._set_lam0_share()

    @property
    def r_s(self) -> float:
        """Share of the model's λ_s in λ; may be set at any time."""
        return _value(self._r_s)

    @r_s.setter
    def r_s(self, value: float) -> None:
        self._r_s = _number_or_none(_checked_ratio("r_s", value))
        self._set_lam0_share()

    @property
    def eta(self) -> float:
        """Weight of the regulariser R; may be set at any time."""
        return _value(self._eta)

    @eta.setter
    def eta(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"eta={value!r} must be a finite number >= 0: 0 switches the regulariser off")
        self._eta = _number_or_none(value)

    @property
    def noise(self) -> Noise:
        """Distribution of λ_r; may be set at any time."""
        return self._noise

    @noise.setter
    def noise(self, value: Noise) -> None:
        self._noise = law, *numbers = _checked_noise(value)
        # Beta(1, 1) is uniform, and Beta(2, 2) the median of three uniforms.
        self._law = {("beta", 1.0): "uniform", ("beta", 2.0): "median"}.get(self._noise, law)
        self._noise_numbers = [_number(number) for number in numbers]

    def forward(self, logits: Tensor, target: MixTarget | Tensor, lam_r: Tensor | None = None) -> Tensor:
        """The loss of a batch (Eq. 6).

        Args:
            logits: [B, K], any floating dtype.
            target: MixTarget on the logits' device, or int64 labels [B] for (smoothed) cross entropy.
            lam_r: floating [B], the noise to use instead of drawing it; ignored for labels [B].

        Returns:
            Scalar, or [B] with reduction="none"; float32, or float64 for float64 logits.

        Raises:
            ValueError: a shape, dtype or device is wrong, or r_r and r_s add up to more than 1. Values are not checked:
                that would force a GPU synchronisation. `check_target` checks them.
        """
        self._check_shares()
        _check_shapes(logits, target, lam_r)
        columns, dtype, mean = _columns(target), _compute_dtype(logits), self.reduction == "mean"
        if isinstance(target, MixTarget):
            z = logits.gather(1, columns).to(dtype)
            z = z.detach() if self.detach_lam_s else z
            weights, hinge = self._weights(z, target, lam_r, logits.shape[1])
        else:
            weights, hinge = torch.full_like(columns, 1 - self.smoothing, dtype=dtype), None
        if self.base == "softmax":
            return _cross_entropy(logits, columns, weights, hinge, self.smoothing, mean)
        loss = self._bce(logits.to(dtype), columns, weights)
        if hinge is None:
            return loss
        return loss + _cross_entropy(logits, columns, torch.zeros_like(weights), hinge, 0.0, mean)

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
        _check_shapes(logits, target, lam_r)
        dtype = _compute_dtype(logits)
        if not isinstance(target, MixTarget):
            return torch.zeros(len(target), dtype=dtype, device=logits.device)
        return self._mix(logits.gather(1, _columns(target)).to(dtype), target, lam_r)[0]

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
        _check_shapes(logits, target, None)
        return _lam_s(logits.gather(1, _columns(target)).to(_compute_dtype(logits)))

    def draw(self, logits: Tensor) -> Tensor:
        """Draws one λ_r per row of `logits` from PyTorch's default generator: [B], on the logits' device."""
        size, dtype, device = logits.shape[0], _compute_dtype(logits), logits.device
        rand = partial(torch.rand, dtype=dtype, device=device)
        if self._law == "normal":
            mean, std = self._noise_numbers
            return torch.randn(size, dtype=dtype, device=device) * std + mean
        if self._law == "uniform":
            return rand(size)
        if self._law == "median":
            a, b, c = rand(3, size).unbind()
            return c.clamp(torch.minimum(a, b), torch.maximum(a, b))
        # Beta = G1 / (G1 + G2), with log Gamma(α) = log Gamma(α + 1) + log(U) / α: a small α would underflow.
        (alpha,) = self._noise_numbers
        gamma = torch._standard_gamma(torch.ones(2, size, dtype=dtype, device=device) + alpha)
        first, second = gamma.log() + torch.log1p(-rand(2, size)) / alpha
        return torch.sigmoid(first - second)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in ("r_r", "r_s", "eta", "noise", "smoothing", "base", "apply_to", "reduction")
        )

    def _mix(self, columns: Tensor, target: MixTarget, lam_r: Tensor | None) -> tuple[Tensor, Tensor]:
        """λ [B] (Eq. 3), and the samples that it applies to; `columns` [B, 2]: z_a and z_b, up to a constant."""
        lam0 = target.lam0.to(columns.dtype)
        cutmix = target.kind == _CUTMIX
        y0, x0, y1, x1 = target.box.unbind(1)
        # With correct_lam=False an empty box may have a λ0 above 0; other kinds have no box.
        active = (y0 < y1) & (x0 < x1)
        active = active & cutmix if self.apply_to == "cutmix" else (active | ~cutmix) & (target.kind > 0)
        active = torch.logical_and(active, lam0.frac())  # not at a λ0 of 0 or 1
        lam = lam0 * self._lam0_share
        if self._r_r is not None:
            lam_r = self.draw(columns) if lam_r is None else lam_r.to(lam.dtype)
            lam = torch.addcmul(lam, lam_r, self._r_r)
        if self._r_s is not None:
            lam = torch.addcmul(lam, _lam_s(columns), self._r_s)
        return torch.where(active, lam.clamp(0, 1), lam0), active

    def _weights(
        self, columns: Tensor, target: MixTarget, lam_r: Tensor | None, num_classes: int
    ) -> tuple[Tensor, Tensor | None]:
        """The columns' weights in y less `off`, and in η·R, whose terms are weight·(1 - p): [B, 2] each."""
        lam, active = self._mix(columns, target, lam_r)
        weights = (1 - self.smoothing) * torch.stack((lam, 1 - lam), 1)
        if self._eta is None:
            return weights, None
        y = weights
        if self.smoothing:  # the same class twice is one element of P, with one `off`
            a, b = target.partner_labels, target.labels
            y = y.add(torch.stack((a != b, b == b), 1), alpha=self.smoothing / num_classes)
        return weights, y * active[:, None] * self._eta

    def _bce(self, z: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        """Sigmoid cross entropy on y: Σ_k softplus(z_k) - y_k z_k, or its mean."""
        # Above its threshold softplus drops the exponential; the default of 20 costs float64 half its digits.
        linear = weights * _without_masked(z.gather(1, columns), weights)
        loss = F.softplus(z, threshold=50).sum(1) - linear.sum(1)
        if self.smoothing:
            loss = loss.sub(z.mean(1), alpha=self.smoothing)
        if self.bce_reduction == "mean":
            loss = loss / z.shape[1]
        return loss.mean() if self.reduction == "mean" else loss

    def _set_lam0_share(self) -> None:
        rest = 1 - self.r_r - self.r_s
        # None is an error that the next loss raises: the sum may exceed 1 on the way from (.1, .9) to (.9, .1).
        self._lam0_share = _number(rest) if rest > -1e-9 else None  # .9 + .1 may round upwards

    def _check_shares(self) -> None:
        if self._lam0_share is None:
            total = self.r_r + self.r_s
            raise ValueError(f"r_r={self.r_r!r} and r_s={self.r_s!r} add up to {total:g}: lower one, to 1 at most")


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
        return _check_range("target", target, num_classes)
    _check_range("labels", target.labels, num_classes)
    _check_range("partner_labels", target.partner_labels, num_classes)
    _check_rows("lam0", target.lam0, (target.lam0 >= 0) & (target.lam0 <= 1), "must lie in [0, 1]")
    _check_rows("kind", target.kind, (target.kind >= 0) & (target.kind <= 3), "must be 0, 1, 2 or 3")
    y0, x0, y1, x1 = target.box.unbind(1)
    ordered = (y0 >= 0) & (x0 >= 0) & (y0 <= y1) & (x0 <= x1)
    _check_rows("box", target.box, ordered, "must be (y0, x0, y1, x1) with 0 <= y0 <= y1 and 0 <= x0 <= x1")
    placed = (target.kind == _CUTMIX) | (target.box == 0).all(1)
    _check_rows("box", target.box, placed, "must be zeros where kind is not 2 (CutMix)")


def _cross_entropy(
    logits: Tensor, columns: Tensor, weights: Tensor, hinge: Tensor | None, smoothing: float, mean: bool
) -> Tensor:
    """-Σ_k w_k·log p_k - Σ_k h_k·(p_k - 1) over the columns, less `smoothing` times the mean of all log p.

    Returns [B] or its mean. The transforms of torch.func get plain operations, which they can transform.
    """
    transformed = torch._C._are_functorch_transforms_active()
    evaluate = _plain_cross_entropy if transformed else _CrossEntropy.apply
    return evaluate(logits, columns, weights, hinge, smoothing, mean)


def _plain_cross_entropy(
    logits: Tensor, columns: Tensor, weights: Tensor, hinge: Tensor | None, smoothing: float, mean: bool
) -> Tensor:
    all_logp = logits.log_softmax(1, dtype=weights.dtype)
    return _reduced(all_logp, all_logp.gather(1, columns), weights, hinge, smoothing, mean)


def _reduced(
    all_logp: Tensor, logp: Tensor, weights: Tensor, hinge: Tensor | None, smoothing: float, mean: bool
) -> Tensor:
    """`_cross_entropy`, given all log p and those of the columns."""
    gain = weights * _without_masked(logp, weights)
    if hinge is not None:
        gain = torch.addcmul(gain, hinge, torch.expm1(logp))
    total = gain.sum() if mean else gain.sum(1)
    if smoothing:
        rows = all_logp.sum(1)  # per row even for the mean: torch.compile fuses it with the log softmax
        total = total.add(rows.sum() if mean else rows, alpha=smoothing / all_logp.shape[1])
    return total / -len(all_logp) if mean else -total


def _without_masked(values: Tensor, weights: Tensor) -> Tensor:
    """0 where the weight is 0: a class masked with a logit of -inf would give 0·-inf."""
    return values.masked_fill(weights == 0, 0)


class _CrossEntropy(torch.autograd.Function):
    """`_plain_cross_entropy` with one dense tensor besides the logits, which becomes their gradient.

    d log p_k / dz_j = [j = k] - p_j, and the derivative of -loss by log p_k is `pull`, w_k + h_k·p_k. So the
    gradient is p times the row's sum of `pull`, less `pull` in the columns. Smoothing is a pull of ε/K on every
    class.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        columns: Tensor,
        weights: Tensor,
        hinge: Tensor | None,
        smoothing: float,
        mean: bool,
    ) -> Tensor:
        all_logp = logits.log_softmax(1, dtype=weights.dtype)
        logp = all_logp.gather(1, columns)
        pull = weights if hinge is None else torch.addcmul(weights, hinge, logp.exp())
        ctx.save_for_backward(logits, columns, weights, hinge, pull)
        ctx.smoothing, ctx.mean = smoothing, mean
        # An attribute, not a saved tensor, so that the first backward pass can overwrite and free it; a second pass
        # (retain_graph) computes it again. A compiled backward pass always does: saving it would write and read
        # one more [B, K].
        ctx.all_logp = None if torch.compiler.is_compiling() else all_logp
        return _reduced(all_logp, logp, weights, hinge, smoothing, mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A compiled backward pass has one gradient per output and refuses second derivatives itself.
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _is_batched(grad)):
            return _plain_gradients(ctx, grad)
        logits, columns, weights, hinge, pull = ctx.saved_tensors
        all_logp, ctx.all_logp = ctx.all_logp, None
        if all_logp is None:
            all_logp = logits.log_softmax(1, dtype=weights.dtype)
        grad = (grad / len(logits) if ctx.mean else grad)[..., None]
        by_weights, by_hinge = None, None
        if any(ctx.needs_input_grad[2:4]):  # λ_s is attached
            logp = all_logp.gather(1, columns)
            by_weights = -grad * _without_masked(logp, weights)
            by_hinge = None if hinge is None else -grad * torch.expm1(logp)
        p = all_logp.exp_()
        pull = grad * pull
        row = pull.sum(1, keepdim=True)
        if ctx.smoothing:
            by_logits = p.mul_(row.add(grad, alpha=ctx.smoothing)).sub_(grad * (ctx.smoothing / p.shape[1]))
        else:
            by_logits = p.mul_(row)
        by_logits.scatter_add_(1, columns, -pull)
        return by_logits.to(logits.dtype), None, by_weights, by_hinge, None, None


def _is_batched(grad: Tensor) -> bool:
    """Whether this is a batch of gradients: `torch.func.vmap`, or autograd's `is_grads_batched` and `vectorize`."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad))


def _plain_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `_CrossEntropy` in plain operations, which can be differentiated again or batched."""
    with torch.enable_grad():
        # Views make each one a separate variable: weights and hinge may depend on the logits.
        saved = ctx.saved_tensors[:4]
        inputs: list[Any] = [tensor if tensor is None else tensor.view_as(tensor) for tensor in saved]
        logits, columns, weights, hinge = inputs
        loss = _plain_cross_entropy(logits, columns, weights, hinge, ctx.smoothing, ctx.mean)
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=torch.is_grad_enabled()))
    return *(next(found) if needs else None for needs in needed), None, None


def _lam_s(columns: Tensor) -> Tensor:
    """λ_s = p_a / (p_a + p_b) [B] (Eq. 5) of z_a and z_b [B, 2], each up to the same constant."""
    a, b = columns.clamp(min=torch.finfo(columns.dtype).min).unbind(1)  # -inf - -inf would be NaN
    return torch.sigmoid(a - b)


def _columns(target: MixTarget | Tensor) -> Tensor:
    """The classes [B, n] to which a target gives weight: (a, b), or only the label."""
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


def _check_field(name: str, field: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype | None) -> None:
    """`dtype` None: any floating dtype."""
    right = field.is_floating_point() if dtype is None else field.dtype == dtype
    if field.shape != shape or not right:
        wanted = "a floating dtype" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {_describe(field)}: pass {wanted} [{', '.join(map(str, shape))}]")


def _check_range(name: str, labels: Tensor, num_classes: int) -> None:
    remedy = f"must lie in [0, {num_classes}): the model has {num_classes} classes, and there is no ignore_index"
    _check_rows(name, labels, (labels >= 0) & (labels < num_classes), remedy)


def _check_rows(name: str, field: Tensor, good: Tensor, remedy: str) -> None:
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"{name}[{row}]={field[row].tolist()!r} {remedy}")


def _number(value: float) -> Tensor:
    """A 0-dim tensor on the CPU, which takes part in the arithmetic of any device without a synchronisation."""
    with torch.inference_mode(False):  # set during evaluation, it is still used in training
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _number_or_none(value: float) -> Tensor | None:
    return _number(value) if value else None


def _value(number: Tensor | None) -> float:
    return 0.0 if number is None else number.item()


def _checked_ratio(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1]: it is a share of λ, 0 switches it off")
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose {' or '.join(map(repr, choices))}")


def _checked_noise(noise: Noise | str) -> Noise:
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
