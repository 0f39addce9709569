"""Does LUMix help where CutMix does? The runs of PLAN.md, their table, and their figures.

    python -m experiments.evidence run --data data/CIFAR-10-images      # hours; the same command resumes
    python -m experiments.evidence run --model resnet --jobs 2          # one of the two tables
    python -m experiments.evidence report                               # docs/experiments.md and the figures

`report` computes everything from benchmarks/results/evidence-*.json. Without them it says that nothing was run.
"""

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import accuracy, harness, paired
from lumix_dali.cpus import available

from . import ablations
from .tables import CUTMIX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, PAGE = harness.ROOT / "benchmarks/results", harness.ROOT / "docs/experiments.md"
PAGES = PAGE, harness.ROOT / "README.md"
LUMIX, NONE = "LUMix", "no mixing"
COMMON = (
    "--table components --images-per-class 100 --img-size 32 --scale .8 1 --hflip .5 --first-seed 100 --lam --no-speed "
    "--device cpu"
)
MODELS = {
    "resnet": f"{COMMON} --epochs 60 --lr 4e-3 --val-every 5 --seeds 30",
    "vit": f"{COMMON} --only '{NONE},{CUTMIX},{LUMIX}' --epochs 150 --lr 2e-3 --val-every 10 --seeds 20 "
    "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 embed_dim=64 depth=3 num_heads=2",
}


class Comparison(NamedTuple):
    """A row of the plan: its family, what is compared, the paired difference and its p, corrected if secondary."""

    family: str
    row: str
    reference: str
    metric: str
    difference: paired.Difference
    p: float | None


def compare(result: dict[str, Any]) -> list[Comparison]:
    """The plan's comparisons, of the rows with runs: the primary, the check of the regime, then the secondary ones."""
    runs = {row["name"]: row["runs"] for row in result["rows"]}

    def one(family: str, row: str, reference: str, metric: str) -> Comparison:
        found = paired.difference(runs[row], runs[reference], metric)
        return Comparison(family, row, reference, metric, found, found.p)

    parts = [name for name in runs if name.startswith(f"{LUMIX} without")]
    secondary = [one("secondary", LUMIX, CUTMIX, metric) for metric in ("nll", "ece")]
    secondary += [one("secondary", part, LUMIX, metric) for part in parts for metric in accuracy.METRICS]
    corrected = paired.holm([found.p for found in secondary])
    return [
        one("primary", LUMIX, CUTMIX, "top1"),
        one("regime", CUTMIX, NONE, "top1"),
        *(found._replace(p=p) for found, p in zip(secondary, corrected, strict=True)),
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown: each row's values, then each comparison of the plan."""
    lines = ["| row | n | " + " | ".join(accuracy.METRICS.values()) + " | CPU s per model |"]
    lines.append("|" + " --- |" * (len(accuracy.METRICS) + 3))
    for row in result["rows"]:
        if not row["runs"]:
            lines.append(f"| {row['name']} | 0 |" + " |" * (len(accuracy.METRICS) + 1))
            continue
        cells = []
        for metric, digits in accuracy.DIGITS.items():
            own = paired.moments(list(paired.last(row["runs"], metric).values()))
            cells.append(f"{own.mean:.{digits}f}" + ("" if own.sd is None else f" ± {own.sd:.{digits}f}"))
        seconds = paired.moments([run["cpu_seconds"] for run in row["runs"]]).mean
        lines.append(f"| {row['name']} | {len(row['runs'])} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", "| comparison | | n | difference | 95 % interval | p |", "|" + " --- |" * 6]
    for family, row, reference, metric, found, p in compare(result):
        digits, cells = accuracy.DIGITS[metric], ["", "", ""]
        if found.mean is not None:
            cells[0] = f"{found.mean:+.{digits}f}"
        if found.interval and p is not None:
            low, high = found.interval
            cells[1:] = f"{low:+.{digits}f} to {high:+.{digits}f}", f"{p:.2g}" + " (Holm)" * (family == "secondary")
        lines.append(
            f"| {family}: {row} − {reference} | {accuracy.METRICS[metric]} | {found.n} | {' | '.join(cells)} |"
        )
    planned = "complete" if result["complete"] else "**not complete: runs are under way**"
    meta = result["meta"]
    return "\n".join(lines) + f"\n\n{planned}; {meta['date'][:10]}, commit {meta['commit'][:10]}: `{meta['command']}`"


def load() -> dict[str, dict[str, Any]]:
    """{model: result} of those that were run."""
    paths = {model: RESULTS / f"evidence-{model}.json" for model in MODELS}
    return {model: json.loads(path.read_text()) for model, path in paths.items() if path.exists()}


def answer(results: dict[str, dict[str, Any]]) -> str:
    """A line per model: what CutMix gains over no mixing, and what LUMix changes then."""
    lines = []
    for model, result in results.items():
        found = {(c.row, c.metric): c.difference for c in compare(result) if c.reference in (CUTMIX, NONE)}
        changes = (
            _change(found[LUMIX, metric], words, accuracy.DIGITS[metric])
            for metric, words in (("top1", "top-1 {} points"), ("ece", "ECE {} points"), ("nll", "NLL {} nats"))
        )
        lines.append(
            f"- **{NAMES[model]}**: CutMix − no mixing, {_change(found[CUTMIX, 'top1'], 'top-1 {} points', 2)}; "
            f"LUMix − CutMix, {', '.join(changes)}; {found[LUMIX, 'top1'].n} paired seeds."
        )
    return "\n".join(lines)


def _change(found: paired.Difference, words: str, digits: int) -> str:
    interval = "" if found.interval is None else " ({:+.{d}f} to {:+.{d}f})".format(*found.interval, d=digits)
    return words.format(f"{found.mean:+.{digits}f}") + interval


def block(name: str, results: dict[str, dict[str, Any]]) -> str:
    """What stands in the page's block of this name: the answer, a model's table, or a figure of all models."""
    if results and name == "answer":
        return answer(results)
    if name in FIGURES and results:
        return f"![{CAPTIONS[name]}](evidence-{name}.svg)"
    return table(results[name]) if name in results else "Not run yet."


def with_evidence(text: str, results: dict[str, dict[str, Any]]) -> str:
    """`text` with its blocks <!-- evidence: NAME --> … <!-- end --> generated again."""
    return re.sub(
        r"(<!-- evidence: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + block(found[2], results) + found[3],
        text,
        flags=re.DOTALL,
    )


def draw_forest(figure: "Figure", results: dict[str, dict[str, Any]]) -> None:
    """Differences to CutMix in each metric, with uncorrected 95 % t intervals, one colour per model."""
    panels = figure.subplots(1, len(accuracy.METRICS), sharey=True)
    names = list(dict.fromkeys(row["name"] for result in results.values() for row in result["rows"]))
    names.remove(CUTMIX)
    for axes, (metric, title) in zip(panels, accuracy.METRICS.items(), strict=True):
        for number, (model, result) in enumerate(results.items()):
            for name, (one, _) in paired.compare(result["rows"], CUTMIX, metric).items():
                height = names.index(name) + 0.2 * (number - (len(results) - 1) / 2)
                label = NAMES[model] if name == LUMIX else None
                axes.plot(one.interval or [one.mean] * 2, [height, height], color=f"C{number}", linewidth=2)
                axes.plot(one.mean, height, "o", color=f"C{number}", label=label)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_title(f"{title}, minus CutMix's")
        axes.set_xlabel("right is better" if metric == "top1" else "left is better")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(results))


def draw_curves(figure: "Figure", results: dict[str, dict[str, Any]]) -> None:
    """Means of every row over the epochs, with the seeds' standard deviation as a band: a row per model."""
    panels = figure.subplots(len(results), len(accuracy.METRICS), squeeze=False)
    for (model, result), line in zip(results.items(), panels, strict=True):
        for axes, (metric, title) in zip(line, accuracy.METRICS.items(), strict=True):
            for number, row in enumerate(row for row in result["rows"] if row["runs"]):
                curves = np.array([run[metric] for run in row["runs"]])
                draw_band(axes, row["runs"][0]["validated"], curves.mean(0), curves.std(0), f"C{number}", row["name"])
            axes.set(title=f"{NAMES[model]}: {title}", xlabel="epoch")
        line[0].legend(fontsize=9)


def draw_band(axes: Any, x: Any, middle: np.ndarray, spread: np.ndarray, colour: str, label: str) -> None:
    """A line with a band around it."""
    axes.plot(x, middle, color=colour, label=label)
    axes.fill_between(x, middle - spread, middle + spread, color=colour, alpha=0.12, linewidth=0)


def draw_lam(figure: "Figure", results: dict[str, dict[str, Any]]) -> None:
    """λ0, λ_s and λ of LUMix over the epochs, means over the seeds: median, quartiles and deciles."""
    panels = figure.subplots(len(results), 3, squeeze=False, sharey=True)
    for (model, result), line in zip(results.items(), panels, strict=True):
        (runs,) = (row["runs"] for row in result["rows"] if row["name"] == LUMIX)
        for number, (axes, (key, title)) in enumerate(zip(line, LAMS.items(), strict=True)):
            q10, q25, q50, q75, q90 = (
                np.mean([run["lam"][f"{key}_q{q}"] for run in runs], 0) for q in (10, 25, 50, 75, 90)
            )
            epochs = np.arange(1, len(q50) + 1)
            for low, high in ((q10, q90), (q25, q75)):
                axes.fill_between(epochs, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
            axes.plot(epochs, q50, color=f"C{number}")
            axes.set(title=f"{NAMES[model]}: {title}", xlabel="epoch")


NAMES = {"resnet": "ResNet", "vit": "ViT"}
LAMS = {"lam0": "λ0, of the pasted pixels", "lam_s": "λ_s, by the scores", "lam": "λ, of the label"}
FIGURES = {"forest": draw_forest, "curves": draw_curves, "lam": draw_lam}
CAPTIONS = {
    "forest": "Differences to CutMix with 95 % intervals",
    "curves": "Top-1, log loss and calibration error over the epochs",
    "lam": "λ0, λ_s and λ over the epochs: median, quartiles and deciles",
}


def report(check: bool) -> list[Path]:
    """Writes the page's tables and the figures; returns what was out of date. With `check` nothing is written."""
    results, stale = load(), []
    digest = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
    for page in PAGES:
        if (text := with_evidence(page.read_text(), results)) != page.read_text():
            stale.append(page)
            if not check:
                page.write_text(text)
    for name in FIGURES if results else ():
        path = PAGE.with_name(f"evidence-{name}.svg")
        if not (path.exists() and digest in path.read_text()):
            stale.append(path)
            if not check:
                write_figure(name, results, digest, path)
    return stale


def write_figure(name: str, results: dict[str, dict[str, Any]], digest: str, path: Path) -> None:
    """Draws one of `FIGURES` into an SVG that names the results' hash."""
    import matplotlib
    from matplotlib.figure import Figure

    from benchmarks.plot import STYLE

    with matplotlib.rc_context(STYLE):
        height = 4.5 if name == "forest" else 3.6 * len(results) + 0.4
        figure = Figure(figsize=(12, height), layout="constrained")
        FIGURES[name](figure, results)
        figure.savefig(path, metadata=dict(Description=digest, Date=None))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m experiments.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train the models of PLAN.md that are missing")
    runs.add_argument("--model", choices=MODELS, action="append", help="one of the two (default: both)")
    runs.add_argument("--data", default="data/CIFAR-10-images", metavar="DIR", help="folders train and test")
    runs.add_argument("--out", default=RESULTS, type=Path, metavar="DIR", help="(default: benchmarks/results)")
    runs.add_argument("--jobs", type=harness.positive, default=available(), metavar="N", help="models at once")
    reports = commands.add_parser("report", help="tables of docs/experiments.md, and figures, from the results")
    reports.add_argument("--check", action="store_true", help="only say what is out of date")
    args = parser.parse_args(argv)
    if args.command == "report":
        stale = report(args.check)
        for path in stale:
            print(f"{path}: {'out of date' if args.check else 'written'}")
        return int(args.check and bool(stale))
    for model in args.model or MODELS:
        where = ["--data", args.data, "--jobs", str(args.jobs), "--out", str(args.out / f"evidence-{model}.json")]
        command = shlex.join(["python", "-m", "experiments.evidence", "run", "--model", model, "--data", args.data])
        try:
            ablations.run(ablations.parse_args([*shlex.split(MODELS[model]), *where]), command)
        except KeyboardInterrupt:
            sys.exit(f"stopped; finished models are in {args.out}, and the same command resumes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
