"""What LUMix does to the labels: quantiles of λ0, λ_s and λ over an epoch (arXiv 2211.15846, Eq. 3)."""

import torch
from torch import Tensor

from lumix_dali import Kind, LUMixLoss, MixTarget

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NAMES = ("lam0", "lam_s", "lam")


class LabelWeights:
    """Collects the partner's weights of an epoch's CutMix samples.

    `lam_s` is the model's own estimate p_a / (p_a + p_b), whether or not the loss uses it. Samples that are not
    CutMix, or whose λ0 is 0 or 1, have no weight that LUMix could change and are left out.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, criterion: LUMixLoss, logits: Tensor, target: MixTarget, lam_r: Tensor | None) -> None:
        """Adds a batch.

        Args:
            criterion: the loss of this batch.
            logits: [B, K].
            target: the target of this batch.
            lam_r: [B], the noise passed to the loss; None without noise.
        """
        with torch.no_grad():
            lam = criterion.lam(logits, target, lam_r)
            lam_s, lam0 = criterion.lam_s(logits, target), target.lam0.to(lam.dtype)
            raw = (1 - criterion.r_r - criterion.r_s) * lam0 + criterion.r_s * lam_s
            if lam_r is not None:
                raw = raw + criterion.r_r * lam_r.to(lam.dtype)
            clamped = ((raw < 0) | (raw > 1)).to(lam.dtype)
            mixed = (target.kind == int(Kind.CUTMIX)) & (lam0 > 0) & (lam0 < 1)
            self._batches.append(torch.stack((lam0, lam_s, lam, clamped), 1)[mixed].cpu())

    def summary(self) -> dict[str, float]:
        """Returns statistics of the collected weights and clears them.

        Returns:
            For each of `NAMES` its mean and `QUANTILES`, as ``lam_mean``, ``lam_q10``; ``moved``, the mean of
            |λ - λ0|; ``clamped``, the share of samples for which Eq. 3 gives a λ outside [0, 1]. Empty without samples.
        """
        values, self._batches = torch.cat(self._batches).double(), []
        if not len(values):
            return {}
        found = dict(moved=(values[:, 2] - values[:, 0]).abs().mean().item(), clamped=values[:, 3].mean().item())
        for column, name in enumerate(NAMES):
            found[f"{name}_mean"] = values[:, column].mean().item()
            levels = torch.quantile(values[:, column], torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
            found |= {f"{name}_q{100 * q:.0f}": level for q, level in zip(QUANTILES, levels, strict=True)}
        return {name: round(value, 5) for name, value in found.items()}
