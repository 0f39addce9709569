"""NumPy oracle of the mixing and of the LUMix loss (arXiv 2211.15846), for tests and for reading.

It is written from the paper, not from `fn.py` or `loss.py`, so that an error has to be made twice to stay unnoticed.
It is slow, computes in float64 and draws nothing: every random number is an argument.

A sample's own image is the canvas (class b, `labels`); its partner (class a, `partner_labels`) is mixed into it with
weight `lam0`. timm and torchvision weigh the canvas: lam_timm = 1 - lam0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks

NONE, MIXUP, CUTMIX, OTHER = range(4)


def cut_box(size: Sequence[int], lam: float, centre: Sequence[int]) -> tuple[int, ...]:
    """Box of area lam·H·W around a centre, clipped to the image (CutMix, arXiv 1905.04899).

    Args:
        size: (H, W) of the image in pixels.
        lam: drawn weight of the partner, float in [0, 1].
        centre: (cy, cx) in pixels, int, in [0, H) and [0, W).

    Returns:
        (y0, x0, y1, x1), int, half-open: side int(size·√lam), from c - side//2 to c - side//2 + side.

    Raises:
        ValueError: lam is outside [0, 1].

    Note:
        This is timm's rule since 1.0.29; before, odd sides lost a pixel. A side of 0 gives an empty box at the centre.
    """
    checks.fraction("lam", lam)
    sides = [int(length * np.sqrt(lam)) for length in size]
    starts = [int(c) - side // 2 for c, side in zip(centre, sides, strict=True)]
    stops = [start + side for start, side in zip(starts, sides, strict=True)]
    corners = np.clip([starts, stops], 0, size)
    return tuple(int(corner) for corner in corners.ravel())


def count_lam0(box: ArrayLike, size: Sequence[int]) -> np.ndarray:
    """λ0 = r_w·r_h / HW (Algorithm 1), counted pixel by pixel.

    Args:
        box: (y0, x0, y1, x1), int [B, 4], half-open; what lies outside the image does not count.
        size: (H, W) in pixels.

    Returns:
        float64 [B] in [0, 1].
    """
    return np.array([_inside(one, size).mean() for one in np.reshape(box, (-1, 4))])


def mix_images(
    images: np.ndarray | Sequence[np.ndarray], partner: ArrayLike, box: ArrayLike, kind: ArrayLike, lam0: ArrayLike
) -> np.ndarray:
    """Applies Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) to a batch, as drawn.

    Args:
        images: uint8 [B, H, W, C], or a list of B arrays [H, W, C] of one size.
        partner: int [B], index of each sample's partner in this batch.
        box: int [B, 4], (y0, x0, y1, x1), half-open; read for CutMix only.
        kind: int [B]: 0 none, 1 Mixup, 2 CutMix.
        lam0: float [B] in [0, 1], weight of the partner; read for Mixup only.

    Returns:
        uint8 [B, H, W, C]. CutMix is a bit-exact paste; Mixup is own·(1 - lam0) + partner·lam0 in
        float64, rounded to the nearest level, halves upwards.

    Raises:
        ValueError: unequal sizes, a dtype other than uint8, a wrong shape, a value out of range, or
            kind 3 (mixing by other means cannot be reproduced).
    """
    shapes = {np.shape(image) for image in images}
    _check(len(shapes) == 1, "images", shapes, "of one size; resize them first")
    images = np.asarray(images)
    _check(images.dtype == np.uint8, "images", images.dtype, "uint8")
    size = len(images)
    partner, kind = _column("partner", partner, size, 0, size - 1), _column("kind", kind, size, NONE, CUTMIX)
    lam0, box = _weight(lam0, size), _array("box", box, (size, 4))
    mixed = images.copy()
    for i, own in enumerate(images):
        other = images[partner[i]]
        if kind[i] == MIXUP:
            mixed[i] = np.floor(own * (1 - lam0[i]) + other * lam0[i] + 0.5)
        elif kind[i] == CUTMIX:
            pasted = _inside(box[i], own.shape[:2])
            mixed[i][pasted] = other[pasted]
    return mixed


def dense(
    labels: ArrayLike, partner_labels: ArrayLike, lam0: ArrayLike, num_classes: int, smoothing: float = 0.0
) -> np.ndarray:
    """y = λ·v_a + (1 - λ)·v_b with smoothed one-hots v (Eq. 2 and Algorithm 1 of arXiv 2211.15846).

    Args:
        labels: int [B] in [0, K), class b of the canvas.
        partner_labels: int [B] in [0, K), class a of the partner.
        lam0: float [B] in [0, 1], weight of the partner.
        num_classes: K.
        smoothing: ε in [0, 1): off = ε/K, on = 1 - ε + off.

    Returns:
        float64 [B, K]; every row sums to 1.

    Raises:
        ValueError: a label, lam0 or smoothing is out of range, or an argument is not [B].
    """
    checks.whole("num_classes", num_classes, 1)
    checks.fraction("smoothing", smoothing, below_one=True)
    size = len(np.asarray(labels))
    labels = _column("labels", labels, size, 0, num_classes - 1)
    partner_labels = _column("partner_labels", partner_labels, size, 0, num_classes - 1)
    one_hot = (1 - smoothing) * np.eye(num_classes) + smoothing / num_classes
    lam = _weight(lam0, size)[:, None]
    mixed: NDArray[np.float64] = lam * one_hot[partner_labels] + (1 - lam) * one_hot[labels]
    return mixed


def lumix_lam(
    logits: ArrayLike,
    labels: ArrayLike,
    partner_labels: ArrayLike,
    lam0: ArrayLike,
    kind: ArrayLike,
    lam_r: ArrayLike,
    *,
    r_r: float = 0.4,
    r_s: float = 0.1,
    apply_to: str = "cutmix",
) -> np.ndarray:
    """λ = (1 - r_r - r_s)·λ0 + r_r·λ_r + r_s·λ_s, clamped to [0, 1] (Eqs. 3 and 5 of arXiv 2211.15846).

    Args, Raises:
        As for `lumix_loss`.

    Returns:
        float64 [B] in [0, 1]; lam0 itself for the samples that `lumix_loss` gives plain cross entropy.
    """
    checks.fraction("r_r", r_r)
    checks.fraction("r_s", r_s)
    _check(r_r + r_s <= 1 + 1e-6, "r_r + r_s", r_r + r_s, "1 at most")
    logits, labels, partner_labels = _scores(logits, labels, partner_labels)
    lam0, lam_r = _weight(lam0, len(logits)), _column("lam_r", lam_r, len(logits))
    lam_s = _sigmoid(_gap(logits, labels, partner_labels))
    lam = np.clip((1 - r_r - r_s) * lam0 + r_r * lam_r + r_s * lam_s, 0, 1)
    return np.where(_applies(lam0, kind, apply_to), lam, lam0)


def lumix_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    partner_labels: ArrayLike,
    lam0: ArrayLike,
    kind: ArrayLike,
    lam_r: ArrayLike,
    *,
    r_r: float = 0.4,
    r_s: float = 0.1,
    eta: float = 1.0,
    smoothing: float = 0.0,
    base: str = "softmax",
    bce_reduction: str = "mean",
    detach_lam_s: bool = True,
    apply_to: str = "cutmix",
) -> tuple[np.ndarray, np.ndarray]:
    """L = L0 + η·Σ_{k∈{a,b}} y_k·(1 - p_k) and its gradient, per sample (Eqs. 6 and 7 of arXiv 2211.15846).

    Args:
        logits: float [B, K], finite.
        labels: int [B] in [0, K), class b of the canvas.
        partner_labels: int [B] in [0, K), class a of the partner.
        lam0: float [B] in [0, 1], weight of the partner.
        kind: int [B]: 0 none, 1 Mixup, 2 CutMix, 3 mixed by other means.
        lam_r: float [B], the noise λ_r as drawn, any range.
        r_r, r_s: ratios of λ_r and λ_s, ≥ 0 with a sum ≤ 1.
        eta: η, weight of the regulariser R.
        smoothing: ε in [0, 1).
        base: "softmax" or "bce" (sigmoid BCE on y; λ_s and R keep the softmax).
        bce_reduction: "mean" or "sum" over the K classes, of the BCE and of R.
        detach_lam_s: treat λ_s as a constant in the gradient.
        apply_to: "cutmix": λ and R for CutMix samples; "all": for every mixed sample.

    Returns:
        (loss, grad): float64 [B], and float64 [B, K], the gradient of each sample's own loss (not
        divided by B) with respect to its logits.

    Raises:
        ValueError: an argument has a wrong shape, an unknown value, or is out of range.

    Note:
        Readings of the paper: b is an OR of the labels (Eq. 8 has AND); R is summed over the classes;
        λ_s is detached; an unmixed sample, lam0 = 0 and lam0 = 1 get plain (smoothed) cross entropy at
        lam0, and so do samples that `apply_to` leaves out; R is divided by K where the BCE is.
    """
    checks.number("eta", eta, 0)
    checks.one_of("base", base, ("softmax", "bce"))
    checks.one_of("bce_reduction", bce_reduction, ("mean", "sum"))
    checks.flag("detach_lam_s", detach_lam_s)
    lam = lumix_lam(logits, labels, partner_labels, lam0, kind, lam_r, r_r=r_r, r_s=r_s, apply_to=apply_to)
    z, b, a = _scores(logits, labels, partner_labels)
    y = dense(b, a, lam, z.shape[1], smoothing)
    applies = _applies(_weight(lam0, len(z)), kind, apply_to)
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    p = np.exp(log_p)

    if base == "softmax":
        scale = 1.0
        loss, grad = -(y * log_p).sum(1), p - y
    else:
        scale = 1 / z.shape[1] if bce_reduction == "mean" else 1.0
        loss = scale * (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)).sum(1)
        grad = scale * (_sigmoid(z) - y)

    classes = np.arange(z.shape[1])
    y_pos = y * ((classes == a[:, None]) | (classes == b[:, None]))
    etas = scale * eta * applies
    loss = loss + etas * (y_pos * (1 - p)).sum(1)
    grad = grad + etas[:, None] * p * ((y_pos * p).sum(1, keepdims=True) - y_pos)

    if not detach_lam_s:
        rows, gap = np.arange(len(z)), _gap(z, b, a)
        # a clamped λ is constant; two sigmoids for λ_s(1 - λ_s) keep its digits when λ_s is close to 1
        dlam = r_s * _sigmoid(gap) * _sigmoid(-gap) * (applies & (0 < lam) & (lam < 1))
        dloss = (1 - smoothing) * (-scale * gap + etas * (p[rows, b] - p[rows, a]))
        grad[rows, a] += dlam * dloss
        grad[rows, b] -= dlam * dloss
    return loss, grad


def _applies(lam0: np.ndarray, kind: ArrayLike, apply_to: str) -> np.ndarray:
    """Which samples get λ and R: bool [B]."""
    checks.one_of("apply_to", apply_to, ("cutmix", "all"))
    kind = _column("kind", kind, len(lam0), NONE, OTHER)
    chosen: NDArray[np.bool_] = kind == CUTMIX if apply_to == "cutmix" else kind != NONE
    return chosen & (0 < lam0) & (lam0 < 1)


def _inside(box: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Pixels of the box: bool [H, W]. Compared, not sliced: a negative index would wrap around."""
    y, x = np.ogrid[: size[0], : size[1]]
    y0, x0, y1, x1 = box
    inside: NDArray[np.bool_] = (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1)
    return inside


def _gap(z: NDArray[np.float64], labels: np.ndarray, partner_labels: np.ndarray) -> NDArray[np.float64]:
    rows = np.arange(len(z))
    gap: NDArray[np.float64] = z[rows, partner_labels] - z[rows, labels]
    return gap


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))


def _scores(
    logits: ArrayLike, labels: ArrayLike, partner_labels: ArrayLike
) -> tuple[NDArray[np.float64], np.ndarray, np.ndarray]:
    logits = np.asarray(logits, np.float64)
    _check(logits.ndim == 2, "logits", logits.shape, "[B, K]")
    size, num_classes = logits.shape
    return (
        logits,
        _column("labels", labels, size, 0, num_classes - 1),
        _column("partner_labels", partner_labels, size, 0, num_classes - 1),
    )


def _weight(lam0: ArrayLike, size: int) -> NDArray[np.float64]:
    return _column("lam0", lam0, size, 0, 1).astype(np.float64)


def _column(name: str, values: ArrayLike, size: int, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    values = _array(name, values, (size,))
    _check(((low <= values) & (values <= high)).all(), name, values, f"in [{low}, {high}]")
    return values


def _array(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    _check(np.shape(values) == shape, name, np.shape(values), f"of shape {shape}")
    return np.asarray(values)


def _check(ok: bool | np.bool_, name: str, value: object, expected: str) -> None:
    if not ok:
        raise checks.error(name, value, f"it must be {expected}")
