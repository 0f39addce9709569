"""The rows of the LUMix paper's ablations (arXiv 2211.15846), and of this project's own, `components`."""

from typing import Any, NamedTuple

CUTMIX = "CutMix"  # the reference row of all comparisons
PLAIN = dict(r_r=0.0, r_s=0.0, eta=0.0)
LUMIX = dict(r_r=0.4, r_s=0.1, eta=1.0)


class Row(NamedTuple):
    """A row of a table.

    Args:
        paper: the paper's DeiT-S top-1 in %.
        loss: arguments of `LUMixLoss`.
        method: a key of `training.METHODS`.
        max_seeds: no more seeds than these for this row; None: all.
    """

    name: str
    paper: float | None
    loss: dict[str, Any] = PLAIN
    method: str = "cutmix"
    max_seeds: int | None = None


def _ratios(r_r: float, r_s: float, eta: float = 0.0) -> dict[str, Any]:
    return dict(r_r=r_r, r_s=r_s, eta=eta)


TABLES = {
    "2": [
        Row(CUTMIX, 79.8),
        Row("λ_s", 80.3, _ratios(0, 0.5)),
        Row("λ_r", 80.3, _ratios(0.5, 0)),
        Row("λ_r + λ_s", 80.4, _ratios(0.4, 0.1)),
        Row("λ_r + λ_s + R", 80.5, LUMIX),
    ],
    "3": [
        Row(CUTMIX, 79.8),
        Row("r_r 1, r_s 0", 79.7, _ratios(1, 0)),
        Row("r_r .5, r_s 0", 80.3, _ratios(0.5, 0)),
        Row("r_r .4, r_s .1", 80.4, _ratios(0.4, 0.1)),
        Row("r_r .3, r_s .2", 80.3, _ratios(0.3, 0.2)),
        Row("r_r 0, r_s .5", 80.3, _ratios(0, 0.5)),
    ],
    # The paper's "baseline" is the whole recipe except CutMix (§4.5), so it uses Mixup; "no mixing" is our own row.
    "6": [
        Row("no mixing", None, PLAIN, "none"),
        Row("Mixup", 78.6, PLAIN, "mixup"),
        Row(CUTMIX, 79.8),
        Row("ResizeMix", None, PLAIN, "resizemix"),
        Row("SaliencyMix", 79.2, PLAIN, "saliencymix"),
        Row("Puzzle-Mix", 79.8, PLAIN, "puzzlemix"),
        Row("TransMix", 80.7, PLAIN, "transmix"),
        Row("LUMix", 80.6, LUMIX),
    ],
    "10": [
        Row(CUTMIX, 79.8),
        Row("N(0, 1)", 80.4, LUMIX | dict(noise=("normal", 0.0, 1.0))),
        Row("N(0, 5)", 80.4, LUMIX | dict(noise=("normal", 0.0, 5**0.5))),
        Row("Beta(.8, .8)", 80.3, LUMIX | dict(noise=("beta", 0.8))),
        Row("Beta(2, 2)", 80.6, LUMIX | dict(noise=("beta", 2.0))),
        Row("Beta(3, 3)", 80.4, LUMIX | dict(noise=("beta", 3.0))),
    ],
    "11": [
        Row(CUTMIX, 79.8),
        Row("LUMix", 80.6, LUMIX),
        Row("CutMix, BCE", 79.9, PLAIN | dict(base="bce")),
        Row("LUMix, BCE", 79.6, LUMIX | dict(base="bce")),
    ],
    "12": [
        Row(CUTMIX, 79.8),
        Row("LUMix", 80.6, LUMIX),
        Row("LUMix, shuffled patches", 80.4, LUMIX, "shuffled"),
        Row("random λ a patch", 79.1, PLAIN, "patch mixup"),
    ],
    "components": [
        Row("no mixing", None, PLAIN, "none"),
        Row(CUTMIX, None),
        Row("LUMix", None, LUMIX),
        Row("LUMix without λ_r", None, LUMIX | dict(r_r=0.0), max_seeds=15),
        Row("LUMix without λ_s", None, LUMIX | dict(r_s=0.0), max_seeds=15),
        Row("LUMix without R", None, LUMIX | dict(eta=0.0), max_seeds=15),
    ],
}
