"""The tables of the pages that come from several results: targets, headline, and sentences."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import report
from .loaders import BOTH, CEILING, CUTMIX, TIMM


class Bound(NamedTuple):
    """The ratio of a row that has only what cannot be saved, to the target's reference or to another row."""

    row: str
    where: Mapping[str, Any] = MappingProxyType({})
    reference: str | None = None
    result: str | None = None


class Target(NamedTuple):
    """A ratio within one run, with what it should be.

    Attributes:
        what: description.
        bound: a minimum, or if negative a maximum.
        result: name of the JSON.
        row, reference: the two rows.
        where: fields of the rows.
        limit: what bounds it, for when it is missed; {} stands for the ratio of `bounded_by`.
        bounded_by: the measured bound.
    """

    what: str
    bound: float
    result: str
    row: str
    reference: str
    where: Mapping[str, Any] = MappingProxyType({})
    limit: str = "noise of the machine, or not yet understood"
    bounded_by: Bound | None = None


DECODING: dict[str, Any] = dict(
    limit="this decoder alone, without resize, mixing and normalising, gives {}", bounded_by=Bound("dali/+decode")
)
SMALL = dict(B=256, K=1000, dtype="float32")
LARGE = dict(B=256, K=21841, dtype="float32")
TIMMS, PROBABILITIES = "timm soft target", "torch probabilities"
OPERATORS: dict[str, Any] = dict(
    limit="its small operators alone, at 10 classes, take {}", bounded_by=Bound("LUMix eager", SMALL | dict(K=10))
)
COMPILED: dict[str, Any] = dict(
    limit="at 10 classes it takes {}", bounded_by=Bound("LUMix compiled", SMALL | dict(K=10))
)
BYTES: dict[str, Any] = dict(
    limit="Python's threads read them: the training thread takes {} times as long as with files",
    bounded_by=Bound("bytes", dict(part="host"), "files", "cost-cpu"),
)
PASS: dict[str, Any] = dict(
    limit="one more pass over the pixels: a copy of the batch by itself takes {} of its normalising",
    bounded_by=Bound("floor: copy", {}, "normalise", "mix"),
)
FIXED = "operators, whose fixed cost does not shrink with the images"
TARGETS = [
    Target("CutMix + Mixup ÷ timm's loader with FastCollateMixup", 2.1, "loaders", BOTH, TIMM, **DECODING),
    Target(
        "CutMix + Mixup ÷ FFCV, which reads images re-encoded at quality 90", 1.8, "loaders", BOTH, "ffcv", **DECODING
    ),
    Target("CutMix + Mixup ÷ DALI's own pipeline without mixing", 1.5, "loaders", BOTH, CEILING, **DECODING),
    Target("CutMix ÷ without mixing", 0.95, "loaders", CUTMIX, "lumix/none", **PASS),
    Target("CutMix + Mixup ÷ without mixing", 0.9, "loaders", BOTH, "lumix/none", **PASS),
    Target("tar shards ÷ folder", 1.0, "loaders", "lumix tar", "lumix/none", **BYTES),
    Target("TFRecord shards ÷ folder", 1.0, "loaders", "lumix tfrecord", "lumix/none", **BYTES),
    Target(
        "CPU time of an image ÷ with nearest-neighbour resize",
        -1.35,
        "cost-cpu",
        "today",
        "nearest neighbour",
        dict(part="cpu"),
        "the handing over of images to PyTorch, and its antialiased filter",
    ),
    *(
        Target(
            f"time of a batch of {side}x{side} pixels ÷ at commit 9ac746d", -1.0, "cost-cpu", "today", "9ac746d"
        )._replace(where=dict(side=side))
        for side in (8, 32, 64)
    ),
    Target("mixing's CPU, 8x8 pixels: CutMix ÷ unmixed", -1.15, "cost-cpu", "tiny cutmix", "tiny none", {}, FIXED),
    Target("the same: CutMix + Mixup", -1.25, "cost-cpu", "tiny cutmix+mixup", "tiny none", {}, FIXED),
    Target("loss ÷ timm's target and loss, 256 × 1,000", -0.9, "loss", "LUMix eager", TIMMS, SMALL, **OPERATORS),
    Target("the same, compiled", -0.9, "loss", "LUMix compiled", TIMMS, SMALL, **COMPILED),
    Target("loss ÷ timm's target and loss, 256 × 21,841", -0.35, "loss", "LUMix eager", TIMMS, LARGE, **OPERATORS),
    Target(
        "loss ÷ `cross_entropy` with its dense target, 256 × 1,000",
        -1.0,
        "loss",
        "LUMix eager",
        PROBABILITIES,
        SMALL,
        **OPERATORS,
    ),
    Target("step of a DeiT-S, LUMix ÷ CutMix", -1.01, "cost-deit_small", "lumix replayed", "cutmix replayed"),
]
HEADLINE = [TARGETS[number] for number in (0, 1, 2, 3, 13)]


def measured(results: Path, target: Target) -> dict[str, Any] | None:
    """A target's ratio; None if its result or one of its rows is missing."""
    path = results / f"{target.result}.json"
    if not path.is_file():
        return None
    return report.ratio_of(json.loads(path.read_text()), target.row, target.reference, **target.where)


def allowed(results: Path, target: Target) -> str:
    """The ratio of a target's bound."""
    if target.bounded_by is None:
        return ""
    name, where, reference, result = target.bounded_by
    found = json.loads((results / f"{result or target.result}.json").read_text())
    row = report.row_of(found, name, **where)
    other = (
        report.row_of(found, reference, **where)
        if reference
        else report.row_of(found, target.reference, **target.where)
    )
    return f"{row['median'] / other['median']:.2f}" if row and other else "(not measured)"


def targets(results: Path) -> str:
    """All targets: the missed ones first, each with what bounds it, then those not measured."""
    lines: list[tuple[int, list[str]]] = []
    for target in TARGETS:
        bound = f"{'≥' if target.bound > 0 else '≤'} {abs(target.bound):g}"
        ratio = measured(results, target)
        if ratio is None:
            lines.append((1, [target.what, bound, "not measured yet", ""]))
            continue
        limit = target.limit.format(allowed(results, target))
        if ratio["quartiles"][0] <= abs(target.bound) <= ratio["quartiles"][1]:
            limit = "by less than the rounds vary"
        met = ratio["median"] >= target.bound if target.bound > 0 else ratio["median"] <= -target.bound
        low, high = ratio["quartiles"]
        cells = [f"{ratio['median']:.3f} ({low:.3f} – {high:.3f})", "met" if met else f"missed: {limit}"]
        lines.append((2 if met else 0, [target.what, bound, *cells]))
    ordered = [cells for _, cells in sorted(lines, key=lambda line: line[0])]
    table = report.grid([["ratio within one run", "target", "median and quartiles", ""], *ordered])
    return f"{table}\n\n{sources(results, TARGETS)}"


def sources(results: Path, shown: Sequence[Target]) -> str:
    """The runs from which the ratios come: not necessarily of today's code."""
    names = [target.result for target in shown if measured(results, target)]
    origins = {name: report.source_of(json.loads((results / f"{name}.json").read_text())) for name in names}
    return "Measured: " + "; ".join(f"`{name}`, {origin}" for name, origin in origins.items()) + "."


def headline(results: Path) -> str:
    """The few ratios of the README."""
    lines = [["ratio within one run", "median", "quartiles"]]
    for target in HEADLINE:
        if ratio := measured(results, target):
            low, high = ratio["quartiles"]
            lines.append([target.what, f"{ratio['median']:.2f}", f"{low:.2f} – {high:.2f}"])
    return f"{report.grid(lines)}\n\n{sources(results, HEADLINE)}"


def said(name: str) -> Callable[[Path], str]:
    """The sentences of a result's reading."""

    def sentences(results: Path) -> str:
        path = results / f"{name}.json"
        return " ".join(report.read(json.loads(path.read_text())).said) if path.is_file() else "Not measured yet."

    return sentences


SAID = ("loaders", "loaders-threads", "loaders-no-avx2", "cost-loader", "cost-cpu", "cost-resnet50", "loss", "mix")
OF_SEVERAL: dict[str, Callable[[Path], str]] = {
    "targets": targets,
    "headline": headline,
    **{f"said-{name}": said(name) for name in SAID},
}
