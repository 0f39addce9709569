"""Generates figures and README tables from the results' JSON only.

Every ``benchmarks/results/NAME.json`` becomes ``benchmarks/figures/NAME.svg``, and a table wherever a text has the
markers ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. A figure contains the hash of its result, which reveals a
stale one; text between markers is compared literally. NAME "targets" is `TARGETS` beside the measured values, and
"headline" the few ratios of the README.

    python -m benchmarks.plot                           # generates them
    python -m benchmarks.plot --check                   # changes nothing; exit status 1 if one is out of date
    python -m benchmarks.plot FILE.json -o FILE.png     # draws any result and prints its table and interpretation
"""

import argparse
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from . import paired, readings
from .harness import RESULTS, ROOT
from .tables import (
    BOTH,
    CEILING,
    CUTMIX,
    METRICS,
    TIMM,
    metrics_of,
    over_epochs,
    signed,
    source_of,
    stages,
    table,
    whole_steps,
)

GROUPS = {"dali/": "#9aa5b1", "lumix": "#2a7f3f", "dali+": "#4c78a8", "timm": "#e07b39", "torchvision": "#b04a6f"}
OTHERS = "#8064a2"
RUN, EAGER = "loaders-targets", "LUMix eager"
# Description, min or (if negative) max, result, row, reference, condition.
TARGETS: list[tuple[str, float, str, str, str, dict[str, Any]]] = [
    ("this loader with CutMix ÷ without mixing", 0.96, RUN, CUTMIX, "lumix/none", {}),
    ("with CutMix + Mixup ÷ without mixing", 0.9, RUN, BOTH, "lumix/none", {}),
    ("with CutMix ÷ plain DALI without mixing, the ceiling", 0.95, RUN, CUTMIX, CEILING, {}),
    ("tar shards ÷ a folder, without mixing", 1.0, RUN, "lumix tar", "lumix/none", {}),
    ("TFRecord shards ÷ a folder, without mixing", 1.0, RUN, "lumix tfrecord", "lumix/none", {}),
    ("with CutMix + Mixup ÷ timm's loader with FastCollateMixup, elem", 1.3, RUN, BOTH, TIMM, {}),
    ("with CutMix ÷ DALI with torchvision's `CutMix` behind", 1.0, RUN, CUTMIX, "dali+torchvision cutmix", {}),
    *(
        (
            f"loss {mode}, forward + backward ÷ timm's target and loss, {b} × {k:,}",
            -most,
            "loss",
            f"LUMix {mode}",
            "timm soft target",
            dict(B=b, K=k, dtype="float32"),
        )
        for b, k, most in ((256, 1000, 0.8), (1024, 1000, 0.8), (256, 21841, 0.5), (1024, 21841, 0.5))
        for mode in ("eager", "compiled")
    ),
    *(
        (
            f"training step of a DeiT-S, batch {batch}, LUMix ÷ CutMix",
            -1.01,
            name,
            "lumix replayed",
            "cutmix replayed",
            {},
        )
        for batch, name in ((128, "cost-deit_small"), (8, "cost-deit_small-8"))
    ),
]
# The README's five ratios: description, result, row, reference, condition.
LOSS = dict(B=256, K=1000, dtype="float32")
HEADLINE: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("images/s: CutMix + Mixup ÷ timm's loader with FastCollateMixup", RUN, BOTH, TIMM, {}),
    ("images/s: CutMix ÷ the same loader without mixing", RUN, CUTMIX, "lumix/none", {}),
    ("images/s: CutMix + Mixup ÷ FFCV, the fastest of seven other loaders", "loaders-peers", BOTH, "ffcv", {}),
    ("time of the loss: LUMix ÷ timm's dense target and loss, 256 × 1,000", "loss", EAGER, "timm soft target", LOSS),
    ("time of the loss: LUMix ÷ PyTorch's `cross_entropy`, same size", "loss", EAGER, "torch probabilities", LOSS),
]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

matplotlib.rcParams |= {
    "svg.hashsalt": "lumix",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


def colour(name: str) -> str:
    """The colour of a loader's group."""
    return next((shade for start, shade in GROUPS.items() if name.startswith(start)), OTHERS)


def whiskers(rows: Sequence[dict], key: str = "median") -> list[list[float]]:
    """Quartiles in matplotlib's form: distances below and above the median."""
    return [[row[key] - row["quartiles"][0] for row in rows], [row["quartiles"][1] - row[key] for row in rows]]


def draw_loaders(result: dict[str, Any]) -> Figure:
    """One bar per loader, with quartiles; failed loaders keep their place and show the reason."""
    # The reader by itself is many times faster than anything that decodes: it would flatten the other bars.
    rows = [row for row in reversed(result["rows"]) if row["name"] != "dali/read"]
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        if row["median"] is None:
            axes.text(0, place, f" {row['error']}", va="center", color="gray", fontsize=7)
        else:
            axes.barh(place, row["median"], color=colour(row["name"]), xerr=whiskers([row]), capsize=2)
        if row["name"] == CEILING and row["median"] is not None:
            axes.axvline(row["median"], color="black", linewidth=0.8, linestyle="--", label="ceiling: plain DALI")
            axes.legend(fontsize=7)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlabel(f"images/s, median and quartiles of {result['rounds']} round(s)")
    return _captioned(figure, result)


def draw_threads(result: dict[str, Any]) -> Figure:
    """Throughput against threads (or workers), one line per loader."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if row["median"] is not None and row["name"] != "dali/read":
            lines.setdefault(row["name"], []).append(row)
    for number, (name, rows) in enumerate(lines.items()):
        style: dict[str, Any] = dict(color=colour(name))
        if name == CEILING:
            style = dict(color="black", linestyle="--")
        axes.errorbar(
            [row["count"] for row in rows],
            [row["median"] for row in rows],
            whiskers(rows),
            capsize=2,
            marker="osv^Dx*"[number % 7],
            label=name + " (ceiling)" * (name == CEILING),
            **style,
        )
    axes.set_xticks(sorted({row["count"] for row in result["rows"]}))
    axes.set_xlabel("threads or workers")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=7)
    return _captioned(figure, result)


def draw_cost(result: dict[str, Any]) -> Figure:
    """The cost of a batch: its stages, stacked, and below them whole steps."""
    found, steps = stages(result), whole_steps(result)
    names = ["stages"] * bool(found) + [row["name"] for row in steps]
    figure = Figure(figsize=(8, 1.9 + 0.3 * len(names)), layout="constrained")
    axes, left = figure.subplots(), 0.0
    for number, stage in enumerate(found):
        width = max(0.0, stage["ms"])  # a difference, which may be negative through noise
        axes.barh("stages", width, left=left, color=f"C{number % 10}", label=f"{stage['name']} {stage['ms']:.1f}")
        left += width
    for row in steps:
        axes.barh(row["name"], row["median"], color=GROUPS["dali/"], xerr=whiskers([row]), capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel("ms per batch")
    if found:
        figure.legend(loc="outside upper center", ncols=5, fontsize=7)
    return _captioned(figure, result)


def draw_loss(result: dict[str, Any]) -> Figure:
    """LUMix' time relative to the fastest loss it can replace, with quartiles; one line per size."""
    found = readings.to_best_peer(result)
    sizes = sorted({(row["dtype"], row["B"] * row["K"], row["K"], row["B"]) for row in found})
    names = list(dict.fromkeys(row["name"] for row in found))
    figure = Figure(figsize=(8, 1.6 + 0.2 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        rows = {(row["dtype"], row["B"] * row["K"], row["K"], row["B"]): row for row in found if row["name"] == name}
        places = [place + 0.3 * (number + 0.5) / len(names) - 0.15 for place, size in enumerate(sizes) if size in rows]
        ours = [rows[size] for size in sizes if size in rows]
        ratios = [row["median"] for row in ours]
        axes.errorbar(ratios, places, xerr=whiskers(ours), fmt="o", markersize=4, color=f"C{number}", label=name)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--", label="the best peer")
    axes.set_yticks(range(len(sizes)), [f"{b:,} × {k:,}, {dtype}" for dtype, _, k, b in sizes])
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        ylabel="batch × classes",
        xlabel="time, forward + backward, ÷ that of the fastest loss it can replace",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.legend(fontsize=7)
    return _captioned(figure, result)


def draw_mix(result: dict[str, Any]) -> Figure:
    """One bar per stage, with quartiles; failed stages keep their place and show the reason."""
    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 0.8 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        if row["median"] is None:
            axes.text(0, place, f" {row['error']}", va="center", color="gray", fontsize=7)
        else:
            shade = GROUPS["lumix" if row["name"].startswith("loader") else "dali/"]
            axes.barh(place, row["median"], color=shade, xerr=whiskers([row]), capsize=2)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("ms per batch; green: as the loader mixes")
    return _captioned(figure, result)


def draw_accuracy(result: dict[str, Any]) -> Figure:
    """Accuracy against epoch, one colour per row: seeds faint, their mean bold; without curves, the differences."""
    rows = [row for row in result["rows"] if row["runs"]]
    if all(len(run["top1"]) == 1 for row in rows for run in row["runs"]):
        return draw_differences(result)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes, last = figure.subplots(), []
    for number, row in enumerate(rows):
        curves = [run["top1"] for run in row["runs"]]
        epochs = row["runs"][0].get("validated", range(1, len(curves[0]) + 1))
        for curve in curves:
            axes.plot(epochs, curve, color=f"C{number}", alpha=0.25, linewidth=0.6)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        found = paired.moments([curve[-1] for curve in curves])
        label = f"{row['name']}: {found.mean:.2f}{signed('±', found.sd)} (n = {found.n})"
        axes.plot(epochs, mean, color=f"C{number}", linewidth=2, label=label)
        last += [curve[-1] for curve in curves]
    if last:  # the rise from chance level would squeeze the final values, which matter, into one line
        room = max(2.0, max(last) - min(last))
        axes.set_ylim(min(last) - 2 * room, min(100.5, max(last) + room / 2))
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation top-1, %")
    axes.legend(fontsize=7, loc="lower right", title="last epoch, mean ± standard deviation", title_fontsize=7)
    return _captioned(figure, result)


def draw_differences(result: dict[str, Any]) -> Figure:
    """Each row minus CutMix in every metric, and below it the label weights, if the runs kept them."""
    metrics = metrics_of(result)
    labels = [row for row in result["rows"] if row["runs"] and row["runs"][0].get("lam")]
    figure = Figure(figsize=(8, 5.6 if labels else 3), layout="constrained")
    panels = figure.subplots(2 if labels else 1, 3, squeeze=False)
    for axes, metric in zip(panels[0], metrics, strict=False):
        _dots(axes, result, metric)
    for axes in panels[0][1:]:
        axes.set_yticklabels([])
    if labels:
        lumix = next((row for row in labels if row["name"] == "LUMix"), labels[-1])
        for number, name in enumerate(("lam0", "lam_s", "lam")):
            _fan(panels[1][0], [lumix], name, color=f"C{number}")
        panels[1][0].set_title(f"{lumix['name']}: median and quartiles", fontsize=8)
        others = {"lam_s_q50": "median λ_s", "moved": "mean |λ - λ0|"}
        for axes, (name, title) in zip(panels[1][1:], others.items(), strict=True):
            for number, row in enumerate(labels):
                axes.plot(*over_epochs(row, name), color=f"C{number}", label=row["name"])
            axes.set_title(title, fontsize=8)
        panels[1][0].legend(fontsize=7)
        panels[1][1].legend(fontsize=6)
        for axes in panels[1]:
            axes.set_xlabel("epoch", fontsize=8)
    return _captioned(figure, result)


def _dots(axes: Any, result: dict[str, Any], metric: str) -> None:
    """A faint dot per seed, the mean, and its 95 % t interval."""
    found = paired.compare(result["rows"], "CutMix", metric)
    values = {row["name"]: paired.last(row["runs"], metric) for row in result["rows"] if row["runs"]}
    for place, (name, (one, _)) in enumerate(found.items()):
        both = values[name].keys() & values["CutMix"].keys()
        gaps = [values[name][seed] - values["CutMix"][seed] for seed in both]
        axes.plot(gaps, [place] * len(gaps), "o", color="C0", alpha=0.25, markersize=3)
        axes.plot(one.mean, place, "o", color="C0", markersize=6)
        if one.interval:
            axes.plot(one.interval, [place, place], color="C0", linewidth=2)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(f"{METRICS[metric]}, minus CutMix", fontsize=8)


SYMBOLS = {"lam0": "λ0", "lam_s": "λ_s", "lam": "λ"}


def _fan(axes: Any, rows: list[dict], name: str, color: str) -> None:
    for row in rows:
        epochs, middle = over_epochs(row, f"{name}_q50")
        axes.plot(epochs, middle, color=color, label=SYMBOLS[name])
        axes.fill_between(
            epochs,
            over_epochs(row, f"{name}_q25")[1],
            over_epochs(row, f"{name}_q75")[1],
            color=color,
            alpha=0.2,
            linewidth=0,
        )


def draw_scaling(result: dict[str, Any]) -> Figure:
    """Images/s per GPU against the number of GPUs, one line per location of the images."""
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        line = [(row["ranks"], row["median"]) for row in result["rows"] if row["name"] == name]
        axes.semilogx(*zip(*line, strict=True), marker="o", label=name)
    axes.axhline(result["assumed"]["gpu_rate"], color="gray", linestyle=":", label="what a GPU takes")
    axes.set(xlabel="GPUs", ylabel="images/s a GPU", ylim=(0, None))
    ranks = sorted({row["ranks"] for row in result["rows"]})
    axes.set_xticks(ranks, map(str, ranks))
    axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=3, fontsize=7)
    return _captioned(figure, result)


def _captioned(figure: Figure, result: dict[str, Any]) -> Figure:
    lines = textwrap.wrap(source_of(result), int(17 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize=7, color="gray")
    return figure


def _label(row: dict[str, Any]) -> str:
    unsaid = row.get("mixing", "none") == "none" and not row["name"].startswith(("dali/", "lumix"))
    return row["name"] + " (no mixing)" * unsaid


def draw_start(result: dict[str, Any]) -> Figure:
    """Seconds until the source is open and until the first batch."""
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['name']}, {row['samples']:,.0f}" for row in result["rows"]]
    for key, label, alpha in (("first", "first batch", 0.4), ("open", "opened", 1)):
        axes.barh(names, [row[key] for row in result["rows"]], color="tab:blue", alpha=alpha, label=label)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", xscale="log")
    axes.legend(fontsize=7)
    return _captioned(figure, result)


def draw_augment(result: dict[str, Any]) -> Figure:
    """One bar per operation: the mean difference from timm's."""
    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 0.8 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["name"] for row in rows], [row["mean"] for row in rows], color=GROUPS["lumix"])
    axes.set_xlabel("grey levels from timm's, mean")
    return _captioned(figure, result)


def draw_tune(result: dict[str, Any]) -> Figure:
    """One bar per value of each knob, with quartiles; chosen values in colour."""
    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shades = [GROUPS["lumix"] if row["chosen"] else GROUPS["dali/"] for row in rows]
    axes.barh(
        [row["name"] for row in rows], [row["median"] for row in rows], color=shades, xerr=whiskers(rows), capsize=2
    )
    axes.set_xlabel(f"images/s, median and quartiles of {result['rounds']} rounds; green: chosen")
    return _captioned(figure, result)


KINDS = {
    "loaders": draw_loaders,
    "loaders-threads": draw_threads,
    "cost": draw_cost,
    "loss": draw_loss,
    "mix": draw_mix,
    "accuracy": draw_accuracy,
    "scaling": draw_scaling,
    "start": draw_start,
    "augment": draw_augment,
    "tune": draw_tune,
}


def table_targets(results: Path) -> str:
    """Markdown of `TARGETS`; a negative bound is a max."""
    lines = ["| ratio within a run | target | median | quartiles | met |", "| --- | --- | --- | --- | --- |"]
    for what, bound, name, row, reference, where in TARGETS:
        ratio, measured = _measured(results, name, row, reference, where), "not measured |  | no"
        if (median := ratio["median"]) is not None:
            met = median >= bound if bound > 0 else median <= -bound
            measured = "{:.3f} | {:.3f} – {:.3f} | ".format(median, *ratio["quartiles"]) + ("yes" if met else "no")
        lines.append(f"| {what} | {'≥' if bound > 0 else '≤'} {abs(bound):g} | {measured} |")
    return "\n".join(lines)


def table_headline(results: Path) -> str:
    """Markdown of `HEADLINE`."""
    lines = ["| ratio within one run | median | quartiles |", "| --- | --- | --- |"]
    for what, name, row, reference, where in HEADLINE:
        ratio = _measured(results, name, row, reference, where)
        lines.append(f"| {what} | {ratio['median']:.2f} | " + "{:.2f} – {:.2f} |".format(*ratio["quartiles"]))
    return "\n".join(lines)


def _measured(results: Path, name: str, row: str, reference: str, where: dict[str, Any]) -> dict[str, Any]:
    """A row's ratio to a reference in a result."""
    rows = json.loads((results / f"{name}.json").read_text())["rows"]
    (found,) = (each for each in rows if each["name"] == row and where.items() <= each.items())
    return found["ratios"][reference]


OF_SEVERAL = {"targets": table_targets, "headline": table_headline}


def load(path: Path) -> tuple[dict[str, Any], str]:
    """A result and its hash.

    Raises:
        ValueError: the result cannot be drawn.
    """
    content = path.read_bytes()
    try:
        result = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give what a benchmark wrote with --out") from error
    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path}: its kind is {kind!r}; give a result of a benchmark, one of {', '.join(KINDS)}")
    return result, f"sha256:{hashlib.sha256(content).hexdigest()}"


def make_figure(result: dict[str, Any], digest: str, path: Path) -> None:
    """Draws `result` into a file; an SVG names its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Description": digest, "Date": None} if path.suffix == ".svg" else None
    KINDS[result["kind"]](result).savefig(path, metadata=metadata, dpi=150)


def draw_file(source: Path, out: Path) -> str:
    """Draws a result from any machine; returns its table and its interpretation.

    Raises:
        ValueError: it is not a result of a known kind, or nothing in it was measured.
    """
    result, digest = load(source)
    try:
        text = readings.report(result)
        make_figure(result, digest, out)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{source}: a {result['kind']} result without what its figure shows ({type(error).__name__}: {error}); "
            "check that it was not edited and that something in it succeeded"
        ) from error
    return text


def with_tables(text: str, results: Path) -> str:
    """`text` with the tables between its markers regenerated.

    Raises:
        ValueError: a marker has no end or no result.
    """

    def fill(match: re.Match) -> str:
        path = results / f"{match[1]}.json"
        if match[1] in OF_SEVERAL:
            return f"<!-- begin: {match[1]} -->\n{OF_SEVERAL[match[1]](results)}\n<!-- end: {match[1]} -->"
        if not path.is_file():
            raise ValueError(f"<!-- begin: {match[1]} -->: no {path}; measure it, or remove the marker")
        return f"<!-- begin: {match[1]} -->\n{table(load(path)[0])}\n<!-- end: {match[1]} -->"

    filled, count = re.subn(r"<!-- begin: ([\w.-]+) -->\n(?:.*?\n)??<!-- end: \1 -->", fill, text, flags=re.DOTALL)
    if count != len(re.findall(r"<!-- (?:begin|end): [\w.-]+ -->", text)) / 2:
        raise ValueError("markers: one has no counterpart; write <!-- begin: NAME --> and <!-- end: NAME -->")
    return filled


def stale(results: Path, figures: Path, texts: Sequence[Path], check: bool) -> list[Path]:
    """The figures and texts that are out of date; they are regenerated unless `check`."""
    found = []
    for path in sorted(results.glob("*.json")):
        result, digest = load(path)
        figure = figures / f"{path.stem}.svg"
        if not figure.is_file() or digest not in figure.read_text():
            found.append(figure)
            if not check:
                make_figure(result, digest, figure)
    for path in texts:
        text = path.read_text()
        if (filled := with_tables(text, results)) != text:
            found.append(path)
            if not check:
                path.write_text(filled)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, help="texts with tables (default: README.md, docs/*.md); with -o one result")
    add("-o", "--out", type=Path, metavar="FILE.png", help="draw the given result here: .png, .svg, .pdf")
    add("--check", action="store_true", help="change nothing; exit with 1 if something is not current")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results' JSON")
    add("--figures", type=Path, default=ROOT / "benchmarks" / "figures", metavar="DIR", help="folder of the figures")
    args = parser.parse_args(argv)
    results = [path for path in args.files if path.suffix == ".json"]
    if (args.out or results) and (not args.out or args.check or len(args.files) != 1):
        parser.error("-o draws a single result: give FILE.json -o FILE.png")
    try:
        if args.out:
            print(draw_file(args.files[0], args.out))
            return 0
        found = stale(args.results, args.figures, args.files or TEXTS, args.check)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path in found:
        print(f"{path}: " + ("not current; run python -m benchmarks.plot" if args.check else "regenerated"))
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
