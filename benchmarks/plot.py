"""Generates the figures and the pages' tables from the results' JSON only.

A text gets a table wherever it has the markers ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` (NAME is a file of
``benchmarks/results``, or a table of `benchmarks.pages`), and ``benchmarks/figures/NAME.svg`` is drawn if a text links
it. A figure contains the hash of its result, which reveals a stale one.

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
from typing import TYPE_CHECKING, Any

from . import report
from .harness import RESULTS, ROOT
from .report import markdown as table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["load", "make_figure", "table"]

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# One colour per method. They and the grey of the text have enough contrast on white and on black.
COLOURS = {
    "lumix": "#1f9d61",
    "LUMix": "#1f9d61",
    "loader:": "#1f9d61",
    "today": "#1f9d61",
    "timm": "#e07b39",
    "dali": "#5b8fd9",
    "torch": "#b565a7",
    "ffcv": "#d6564b",
    "spdl": "#2a9db0",
    "webdataset": "#a08428",
    "litdata": "#8a7bd1",
    "mosaic": "#7f8c3f",
}
GREY = "#7a828c"
STYLE: Any = {
    "svg.hashsalt": "lumix",
    "svg.fonttype": "none",
    "font.size": 11,  # points: a page shows 8 inches in about 700 pixels
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "savefig.transparent": True,
    "legend.frameon": False,  # its white box would show on black
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}
WIDTH, PER_DOT = 8.0, 0.27  # inches


def colour(label: str) -> str:
    """The colour of a method."""
    label = label.partition(": ")[2] or label if label.startswith(("step", "cpu", "mixing", "tiny")) else label
    return next((shade for start, shade in COLOURS.items() if label.startswith(start)), GREY)


def draw(result: dict[str, Any]) -> "Figure":
    """The chart of a result.

    Raises:
        ValueError: a panel has no data.
    """
    import matplotlib
    from matplotlib.figure import Figure

    chart = report.kind_of(result).chart(result)
    empty = [panel.xlabel for panel in chart.panels if not panel.dots]
    if empty or not chart.panels:
        raise ValueError(f"figure of a {result['kind']} result: no data for {empty or 'any panel'}")
    heights = [PER_DOT * len(panel.dots) + 0.7 for panel in chart.panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights) + 1.2), layout="constrained")
        axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        for one, panel in zip(axes, chart.panels, strict=True):
            draw_panel(one, panel)
        figure.suptitle(textwrap.fill(chart.title, 76), fontsize=13, fontweight="bold", x=0.01, ha="left")
        source = textwrap.fill(report.source_of(result), 100)
        figure.text(0.01, -0.01, source, fontsize=9, va="top")
    return figure


def draw_panel(axes: Any, panel: report.Panel) -> None:
    """A line per dot: single values faint, the range as a bar, the middle on top."""
    from matplotlib.ticker import LogLocator, NullLocator

    for place, dot in enumerate(panel.dots):
        shade = colour(dot.label)
        axes.plot(dot.values, [place] * len(dot.values), "o", color=shade, alpha=0.35, markersize=4, linewidth=0)
        axes.plot([dot.low, dot.high], [place, place], color=shade, linewidth=3, solid_capstyle="round")
        axes.plot(dot.middle, place, "o", color=shade, markersize=8)
    if panel.line is not None:
        axes.axvline(panel.line, color=GREY, linewidth=1, linestyle="--", zorder=0)
    if panel.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(panel.dots)), [dot.label for dot in panel.dots])
    axes.set_ylim(len(panel.dots) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GREY, alpha=0.25)
    axes.set_xlabel(panel.xlabel)


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
    if kind not in report.KINDS:
        raise ValueError(
            f"{path}: its kind is {kind!r}; give a result of a benchmark, one of {', '.join(report.KINDS)}"
        )
    return result, f"sha256:{hashlib.sha256(content).hexdigest()}"


def make_figure(result: dict[str, Any], digest: str, path: Path) -> None:
    """Draws `result` into a file; an SVG names its hash."""
    import matplotlib

    figure = draw(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = path.suffix == ".svg"
    with matplotlib.rc_context(STYLE | {"savefig.transparent": svg}):
        figure.savefig(
            path,
            metadata={"Description": digest, "Date": None} if svg else None,
            dpi=150,
            bbox_inches="tight",
            pad_inches=0.1,
        )


def draw_file(source: Path, out: Path) -> str:
    """Draws a result from any machine; returns its table and its interpretation.

    Raises:
        ValueError: it is not a result of a known kind, or nothing in it was measured.
    """
    result, digest = load(source)
    try:
        text = report.report(result)
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
    from .pages import OF_SEVERAL

    def fill(match: re.Match) -> str:
        name, path = match[1], results / f"{match[1]}.json"
        if name not in OF_SEVERAL and not path.is_file():
            raise ValueError(f"<!-- begin: {name} -->: no {path}; measure it, or remove the marker")
        filled = OF_SEVERAL[name](results) if name in OF_SEVERAL else table(load(path)[0])
        return f"<!-- begin: {name} -->\n{filled}\n<!-- end: {name} -->"

    filled, count = re.subn(r"<!-- begin: ([\w.-]+) -->\n(?:.*?\n)??<!-- end: \1 -->", fill, text, flags=re.DOTALL)
    if count != len(re.findall(r"<!-- (?:begin|end): [\w.-]+ -->", text)) / 2:
        raise ValueError("markers: one has no counterpart; write <!-- begin: NAME --> and <!-- end: NAME -->")
    return filled


def linked(texts: Sequence[Path]) -> set[str]:
    """The names of the figures that the texts show."""
    return {name for path in texts for name in re.findall(r"\]\([^)]*figures/([\w.-]+)\.svg\)", path.read_text())}


def stale(results: Path, figures: Path, texts: Sequence[Path], check: bool) -> list[Path]:
    """The figures and texts that are out of date; they are regenerated, or deleted, unless `check`."""
    old, shown = [], linked(texts)
    for path in sorted(figures.glob("*.svg")):
        if path.stem not in shown:
            old.append(path)
            if not check:
                path.unlink()
    for name in sorted(shown):
        result, digest = load(results / f"{name}.json")
        figure = figures / f"{name}.svg"
        draw(result)  # raises if it would be empty, whatever the file says
        if not figure.is_file() or digest not in figure.read_text():
            old.append(figure)
            if not check:
                make_figure(result, digest, figure)
    for path in texts:
        text = path.read_text()
        if (filled := with_tables(text, results)) != text:
            old.append(path)
            if not check:
                path.write_text(filled)
    return old


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
    given = [path for path in args.files if path.suffix == ".json"]
    if (args.out or given) and (not args.out or args.check or len(args.files) != 1):
        parser.error("-o draws a single result: give FILE.json -o FILE.png")
    try:
        if args.out:
            print(draw_file(args.files[0], args.out))
            return 0
        old = stale(args.results, args.figures, args.files or TEXTS, args.check)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path in old:
        print(f"{path}: " + ("not current; run python -m benchmarks.plot" if args.check else "regenerated"))
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
