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
from typing import Any, NamedTuple

from benchmarks import harness, paired

from . import ablations
from .tables import CUTMIX

RESULTS, FIGURES = (harness.ROOT / "benchmarks" / name for name in ("results", "figures"))
PAGE, FOREST = harness.ROOT / "docs/experiments.md", FIGURES / "evidence-forest.svg"
LUMIX, NONE = "LUMix", "no mixing"
METRICS = {"top1": ("top-1, %", 2), "nll": ("NLL, nats", 3), "ece": ("ECE, %", 2)}
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
    secondary += [one("secondary", part, LUMIX, metric) for part in parts for metric in METRICS]
    corrected = paired.holm([found.p for found in secondary])
    return [
        one("primary", LUMIX, CUTMIX, "top1"),
        one("regime", CUTMIX, NONE, "top1"),
        *(found._replace(p=p) for found, p in zip(secondary, corrected, strict=True)),
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown: each row's values, then each comparison of the plan."""
    lines = ["| row | n | " + " | ".join(title for title, _ in METRICS.values()) + " | CPU s per model |"]
    lines.append("|" + " --- |" * (len(METRICS) + 3))
    for row in result["rows"]:
        if not row["runs"]:
            lines.append(f"| {row['name']} | 0 |" + " |" * (len(METRICS) + 1))
            continue
        cells = []
        for metric, (_, digits) in METRICS.items():
            own = paired.moments(list(paired.last(row["runs"], metric).values()))
            cells.append(f"{own.mean:.{digits}f}" + ("" if own.sd is None else f" ± {own.sd:.{digits}f}"))
        seconds = paired.moments([run["cpu_seconds"] for run in row["runs"]]).mean
        lines.append(f"| {row['name']} | {len(row['runs'])} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", "| comparison | | n | difference | 95 % interval | p |", "|" + " --- |" * 6]
    for family, row, reference, metric, found, p in compare(result):
        (title, digits), cells = METRICS[metric], ["", "", ""]
        if found.mean is not None:
            cells[0] = f"{found.mean:+.{digits}f}"
        if found.interval and p is not None:
            low, high = found.interval
            cells[1:] = f"{low:+.{digits}f} to {high:+.{digits}f}", f"{p:.2g}" + " (Holm)" * (family == "secondary")
        lines.append(f"| {family}: {row} − {reference} | {title} | {found.n} | {' | '.join(cells)} |")
    planned = "complete" if result["complete"] else "**not complete: runs are under way**"
    meta = result["meta"]
    return "\n".join(lines) + f"\n\n{planned}; {meta['date'][:10]}, commit {meta['commit'][:10]}: `{meta['command']}`"


def load() -> dict[str, dict[str, Any]]:
    """{model: result} of those that were run."""
    paths = {model: RESULTS / f"evidence-{model}.json" for model in MODELS}
    return {model: json.loads(path.read_text()) for model, path in paths.items() if path.exists()}


def block(name: str, results: dict[str, dict[str, Any]]) -> str:
    """What stands in the page's block of this name: a model's table and curves, or the forest plot of all."""
    if name == "forest" and results:
        return f"![Differences to CutMix with 95 % intervals](../benchmarks/figures/{FOREST.name})"
    if name not in results:
        return "Not run yet."
    return f"{table(results[name])}\n\n![{name}: top-1 over epochs](../benchmarks/figures/evidence-{name}.svg)"


def with_evidence(text: str, results: dict[str, dict[str, Any]]) -> str:
    """`text` with its blocks <!-- evidence: NAME --> … <!-- end --> generated again."""
    return re.sub(
        r"(<!-- evidence: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + block(found[2], results) + found[3],
        text,
        flags=re.DOTALL,
    )


def draw_forest(results: dict[str, dict[str, Any]]) -> Any:
    """Differences to CutMix in each metric, with uncorrected 95 % t intervals, one colour per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = list(dict.fromkeys(row["name"] for result in results.values() for row in result["rows"]))
    names.remove(CUTMIX)
    for axes, (metric, (title, _)) in zip(panels, METRICS.items(), strict=True):
        for number, (model, result) in enumerate(results.items()):
            for name, (found, _) in paired.compare(result["rows"], CUTMIX, metric).items():
                height = names.index(name) + 0.2 * (number - (len(results) - 1) / 2)
                low, high = found.interval or (found.mean, found.mean)
                label = f"{model}, n = {found.n}" if name == LUMIX else None
                axes.plot([low, high], [height, height], color=f"C{number}", linewidth=2)
                axes.plot(found.mean, height, "o", color=f"C{number}", markersize=6, label=label)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_title(f"{title}: row − CutMix")
        axes.set_xlabel("right is better" if metric == "top1" else "left is better")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend()
    return figure


def report(check: bool) -> list[Path]:
    """Writes the page's tables and the figure; returns what was out of date. With `check` nothing is written."""
    results, page, stale = load(), PAGE.read_text(), []
    digest = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
    if (text := with_evidence(page, results)) != page:
        stale.append(PAGE)
    if results and not (FOREST.exists() and digest in FOREST.read_text()):
        stale.append(FOREST)
    if PAGE in stale and not check:
        PAGE.write_text(text)
    if FOREST in stale and not check:
        draw_forest(results).savefig(FOREST, metadata=dict(Description=digest, Date=None))
    return stale


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
    runs.add_argument("--jobs", type=harness.positive, default=harness.cpus(), metavar="N", help="models at once")
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
