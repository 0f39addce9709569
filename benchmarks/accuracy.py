"""How results of `experiments.ablations` are shown: accuracy and calibration, seed by seed against CutMix."""

from typing import Any

from . import paired, report

METRICS = {"top1": "top-1, %", "nll": "NLL, nats", "ece": "ECE, %"}
DIGITS = {"top1": 2, "nll": 3, "ece": 2}
REFERENCE = "CutMix"


def metrics_of(result: dict[str, Any]) -> list[str]:
    """The metrics that its runs have."""
    runs = [row["runs"][0] for row in result["rows"] if row["runs"]]
    return [name for name in METRICS if not runs or name in runs[0]]


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per row: each metric, its difference from CutMix seed by seed, and the cost of the row."""
    gpu, metrics = result["settings"]["device"] != "cpu", metrics_of(result)
    compared = {metric: paired.compare(result["rows"], REFERENCE, metric) for metric in metrics}
    paper = any(row["paper"] for row in result["rows"])
    speed = any("speed" in row for row in result["rows"])
    head = ["row", *["the paper's DeiT-S"] * paper, "n"]
    head += [cell for metric in metrics for cell in (METRICS[metric], "− CutMix (95 %; p, Holm)")]
    lines = [[*head, "GPU hours" if gpu else "CPU hours", *["images/s, of CutMix'"] * speed]]
    for row in result["rows"]:
        start = [row["name"], *["" if row["paper"] is None else f"{row['paper']:.1f}"] * paper]
        if row["error"] or not row["runs"]:
            lines.append([*start, "0", row["error"] or "not yet", *[""] * (len(lines[0]) - len(start) - 2)])
            continue
        cells = [cell for metric in metrics for cell in _metric(row, metric, compared[metric].get(row["name"]))]
        jobs = result["settings"]["jobs"]  # models that shared the GPU
        hours = sum(run["seconds"] / jobs if gpu else run["cpu_seconds"] for run in row["runs"]) / 3600
        cells += [f"{hours:.3f}", *([_relative_speed(row)] if speed else [])]
        lines.append([*start, str(len(row["runs"])), *cells])
    return lines


def _metric(row: dict[str, Any], metric: str, compared: tuple | None) -> list[str]:
    """Mean ± standard deviation, and the difference from CutMix with its interval and corrected p."""
    digits = DIGITS[metric]
    own = paired.moments(list(paired.last(row["runs"], metric).values()))
    mean = f"{own.mean:.{digits}f}" + ("" if own.sd is None else f" ± {own.sd:.{digits}f}")
    if compared is None or compared[0].mean is None:
        return [mean, ""]
    one, p = compared
    said = f"{one.mean:+.{digits}f}"
    if one.interval:
        said += f" ({one.interval[0]:+.{digits}f} to {one.interval[1]:+.{digits}f}; {p:.2g})"
    return [mean, said]


def _relative_speed(row: dict[str, Any]) -> str:
    return "1" if row["name"] == REFERENCE else report.spread(row["speed"]["ratio"])


def significant(result: dict[str, Any], metric: str) -> list[str]:
    """The rows that differ from CutMix after Holm's correction within the table, with their differences."""
    differences = paired.compare(result["rows"], REFERENCE, metric)
    return [
        f"{name} ({one.mean:+.{DIGITS[metric]}f})"
        for name, (one, p) in differences.items()
        if p is not None and p < 0.05
    ]


def reading(result: dict[str, Any]) -> report.Reading:
    """One sentence each on the differences that hold after Holm's correction and on the label weights."""
    said = [
        f"{METRICS[metric].split(',')[0]}: {', '.join(significant(result, metric)) or 'none'}"
        for metric in metrics_of(result)
    ]
    text = f"Differences with p < .05 after Holm's correction within the table. {'; '.join(said)}."
    for row in result["rows"]:
        if row["name"] == "LUMix" and row["runs"] and row["runs"][0].get("lam"):
            moved, clamped = (_last_mean(row, name) for name in ("moved", "clamped"))
            text += f" In its last epoch LUMix moves λ by {moved:.3f} on average; {clamped:.1%} are clamped."
    return report.Reading([text], "more seeds, where an interval is too wide")


def _last_mean(row: dict[str, Any], name: str) -> float:
    values = [run["lam"][name][-1] for run in row["runs"]]
    mean: float = sum(values) / len(values)
    return mean


def chart(result: dict[str, Any]) -> report.Chart:
    """Each row minus CutMix in every metric: seeds, mean and 95 % t interval."""
    panels, counts = [], []
    for metric in metrics_of(result):
        values = {row["name"]: paired.last(row["runs"], metric) for row in result["rows"] if row["runs"]}
        dots = []
        for name, (one, _) in paired.compare(result["rows"], REFERENCE, metric).items():
            both = values[name].keys() & values[REFERENCE].keys()
            gaps = [values[name][seed] - values[REFERENCE][seed] for seed in sorted(both)]
            if one.mean is not None:
                dots.append(report.Dot(name, gaps, one.mean, *(one.interval or (one.mean, one.mean))))
        panels.append(
            report.Panel(f"{METRICS[metric]}, minus CutMix's", sorted(dots, key=lambda dot: -dot.middle), 0.0)
        )
        counts.append(f"{len(significant(result, metric))} in {METRICS[metric].split(',')[0]}")
    return report.Chart(f"Rows that differ from CutMix (p < .05, Holm): {', '.join(counts)}", panels)


KIND = report.Kind(table, reading, chart)
