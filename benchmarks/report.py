"""The declaration of a kind of result, and what all of them share.

A benchmark declares beside its measurement how its result is shown: `KIND = Kind(table, reading, chart)`. A program
prints `report(result)`; `benchmarks.plot` writes `markdown(result)` and draws the chart.
"""

import importlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ROUNDS = 5  # with fewer, quartiles are little more than single rounds
KINDS = {
    "loaders": "loaders",
    "loaders-threads": "loaders",
    "cost": "cost",
    "loss": "loss",
    "mix": "mix",
    "tune": "tune",
    "scaling": "scaling",
    "accuracy": "accuracy",
}


class Reading(NamedTuple):
    """Sentences about a result, and a suggestion what to do next."""

    said: list[str]
    then: str


class Dot(NamedTuple):
    """A line of a chart: single values, their middle, and a range around it."""

    label: str
    values: Sequence[float]
    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """Dots above one axis.

    Attributes:
        xlabel: what is measured, with its unit.
        dots: from top to bottom.
        line: a value to compare with.
        log: a logarithmic axis.
    """

    xlabel: str
    dots: Sequence[Dot]
    line: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Chart:
    """What a figure shows: its title is the finding."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Kind:
    """How results of a kind are shown."""

    table: Callable[[dict[str, Any]], list[list[str]]]
    reading: Callable[[dict[str, Any]], Reading]
    chart: Callable[[dict[str, Any]], Chart]


def kind_of(result: dict[str, Any]) -> Kind:
    """The declaration of a result's kind."""
    kind: Kind = importlib.import_module(f"benchmarks.{KINDS[result['kind']]}").KIND
    return kind


def rounds_of(result: dict[str, Any]) -> int:
    """Counted rounds that every row without an error has finished."""
    return min((len(row["values"]) for row in result["rows"] if row.get("values")), default=0)


def is_shown(ratio: dict[str, Any]) -> bool:
    """Whether a ratio's quartiles lie on one side of 1, over enough rounds."""
    low, high = ratio["quartiles"]
    return len(ratio["values"]) >= ROUNDS and (high < 1 or low > 1)


def row_of(result: dict[str, Any], name: str, **where: Any) -> dict[str, Any] | None:
    """The measured row of this name and these fields; the last of several."""
    rows = [row for row in result["rows"] if row["name"] == name and where.items() <= row.items() and row.get("values")]
    return rows[-1] if rows else None


def ratio_of(result: dict[str, Any], name: str, reference: str, **where: Any) -> dict[str, Any] | None:
    """The ratio of a row to a reference; None if one of them was not measured."""
    ratio = (row_of(result, name, **where) or {}).get("ratios", {}).get(reference)
    return ratio if ratio and ratio["median"] is not None else None


def compared(what: str, ratio: dict[str, Any] | None, below: str, above: str) -> list[str]:
    """A sentence about a ratio and its quartiles, worded `below` or `above` 1; none without a ratio."""
    if not ratio:
        return []
    words = (below if ratio["median"] < 1 else above) if is_shown(ratio) else "no difference shown"
    return [f"{what}: {spread(ratio, 3)}, {words}."]


def spread(found: dict[str, Any], digits: int = 2) -> str:
    """Median and quartiles."""
    low, high = found["quartiles"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def timed(row: dict[str, Any], form: str = ".3g") -> list[str]:
    """Cells with median and quartiles, or the reason why there are none."""
    if row.get("median") is None:
        return [row.get("error") or "not measured", ""]
    low, high = row["quartiles"]
    return [format(row["median"], form), f"{low:{form}} – {high:{form}}"]


def ratio_cell(row: dict[str, Any], reference: str, digits: int = 2) -> str:
    """A cell with a ratio's median."""
    median = row.get("ratios", {}).get(reference, {}).get("median")
    return "" if median is None else f"{median:.{digits}f}"


def dot(label: str, found: dict[str, Any]) -> Dot:
    """A dot from values, median and quartiles, as `harness.summary` makes them."""
    return Dot(label, found["values"], found["median"], *found["quartiles"])


def ratios_chart(result: dict[str, Any], reference: str, title: str, xlabel: str, **panel: Any) -> Chart:
    """Ratios to a reference round by round, the largest on top."""
    rows = [row for row in result["rows"] if row["values"] and row["ratios"].get(reference, {}).get("values")]
    dots = [dot(labelled(row), row["ratios"][reference]) for row in rows]
    return Chart(title, [Panel(xlabel, sorted(dots, key=lambda one: -one.middle), line=1.0, **panel)])


def labelled(row: dict[str, Any]) -> str:
    """A row's name, and its count of threads if several were tried."""
    return row["name"] + (f", {row['count']}" if "count" in row else "")


def source_of(result: dict[str, Any]) -> str:
    """Machine, date, commit and note of a result."""
    machine, dirty = result["meta"]["machine"], "" if result["meta"]["clean"] else ", with uncommitted changes"
    parts = [
        f"{machine['affinity']} × {machine['cpu']}",
        machine.get("gpu"),
        result["meta"]["date"][:10],
        f"commit {(result['meta']['commit'] or 'unknown')[:10]}{dirty}",
    ]
    return "; ".join(filter(None, [", ".join(part for part in parts if part), result.get("note")]))


def markdown(result: dict[str, Any]) -> str:
    """A result's table, followed by its origin."""
    head, *lines = kind_of(result).table(result)
    text = grid([head, *lines])
    said = kind_of(result).reading(result).said if result["kind"] == "accuracy" else []
    return "\n\n".join([text, *said, f"{source_of(result)}: `{result['meta']['command']}`"])


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *rest = lines
    cells = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


def read(result: dict[str, Any]) -> Reading:
    """Interprets a result of any kind; without enough rounds there is no verdict."""
    stopped = [] if result.get("complete", True) else ["The run was stopped: this is what it had measured until then."]
    if "rounds" in result and (rounds := rounds_of(result)) < ROUNDS:
        few = f"{rounds} round(s): it runs, but a verdict needs {ROUNDS}."
        return Reading([*stopped, few], f"the same with --rounds {ROUNDS} or more, and without --quick")
    said, then = kind_of(result).reading(result)
    return Reading([*stopped, *said], then)


def report(result: dict[str, Any]) -> str:
    """What every benchmark prints at its end: its table, the failures, the interpretation, and what to do next."""
    cells = [[textwrap.shorten(cell, 40) for cell in line] for line in kind_of(result).table(result)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    failed = [f"{row['name']} failed: {row['error']}" for row in result["rows"] if row.get("error")]
    said, then = read(result)
    return "\n".join([*(line.rstrip() for line in lines), "", *failed, *said, f"Next: {then}"])


def finish(result: dict[str, Any]) -> None:
    """Prints the report; the exit status is that of Ctrl-C if the run was stopped."""
    print(report(result), flush=True)
    if not result["complete"]:
        sys.exit(130)
