"""Results as tables, generated from their JSON only; `benchmarks.plot` draws the figures.

Rows of all kinds: name, median, quartiles (or null, and error); loaders-threads: count too; loss: B, K, dtype too;
scaling: ranks too, no quartiles.
A cost result has rows of part "loader" and "model", each for the stage after that of the previous row; its rows of
part "step" are whole steps. If no row has `until`, the values of a stage include those of all previous stages.
Accuracy results are written by experiments/ablations.py.
"""

from collections.abc import Callable
from typing import Any

from . import paired
from .harness import summary

CUTMIX, BOTH = "lumix/cutmix elem", "lumix/cutmix+mixup elem"
CEILING, TIMM, TIMM_RECIPE = "dali/+normalise", "timm FastCollateMixup elem", "timm recipe"


def stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a batch, each without the previous ones, in each of two parts."""
    found = []
    for part in ("loader", "model"):
        rows = [row for row in result["rows"] if row.get("part") == part and row["values"]]
        own, before = any("until" in row for row in rows), [0.0] * len(rows[0]["values"] if rows else ())
        for row in rows:
            cost = row if own else summary([ms - less for ms, less in zip(row["values"], before, strict=False)])
            found.append(dict(name=row["name"], part=part, ms=cost["median"], quartiles=cost["quartiles"]))
            before = row["values"]
    return found


def whole_steps(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows for whole steps, fed by the loader or by a replayed batch."""
    return [row for row in result["rows"] if row.get("part") == "step" and row["values"]]


def over_epochs(row: dict[str, Any], name: str) -> tuple[range, list[float]]:
    """Epochs, and the mean over the seeds of a statistic of the label weights."""
    curves = [run["lam"][name] for run in row["runs"]]
    means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    return range(1, len(means) + 1), means


def source_of(result: dict[str, Any]) -> str:
    machine, dirty = result["meta"]["machine"], "" if result["meta"]["clean"] else ", with uncommitted changes"
    parts = [
        f"{machine['affinity']} × {machine['cpu']}",
        machine.get("gpu"),
        result["meta"]["date"][:10],
        f"commit {(result['meta']['commit'] or 'unknown')[:10]}{dirty}",
    ]
    return "; ".join(filter(None, [", ".join(part for part in parts if part), result.get("note")]))


def table_loaders(result: dict[str, Any]) -> list[list[str]]:
    """One line per loader: images/s, and its ratio to the ceiling and to timm with the same recipe."""
    versioned = any(row.get("version") for row in result["rows"])  # not in results from before 0.2
    counted = versioned or result["kind"] == "loaders-threads"
    lines = [
        [
            "loader",
            *(["version"] if versioned else []),
            *(["threads or workers"] if counted else []),
            "mixing",
            "images/s",
            "quartiles",
            "of the ceiling",
            "of timm's loader",
        ]
    ]
    for row in result["rows"]:
        start = [row["name"]]
        if versioned:
            start.append(row.get("version") or "")
        if counted:  # a row that failed early has only `count`
            start.append(str(row.get("count", row.get("workers", row.get("threads", "")))))
        start.append(row.get("mixing", "none"))
        if row["median"] is None:
            lines.append([*start, row["error"] or "not measured", "", "", ""])
            continue
        low, high = row["quartiles"]
        ratios = [_ratio(row, CEILING), _ratio(row, TIMM_RECIPE if "recipe" in row["name"] else TIMM)]
        lines.append([*start, f"{row['median']:.0f}", f"{low:.0f} – {high:.0f}", *ratios])
    return lines


def table_cost(result: dict[str, Any]) -> list[list[str]]:
    """One line per stage with its share of the total; other rows show the ratio to their reference."""
    found, steps = stages(result), whole_steps(result)
    total = sum(stage["ms"] for stage in found)
    lines = [(stage["name"], stage["ms"], stage["quartiles"], f"{stage['ms'] / total:.0%}") for stage in found]
    lines += [
        (f"whole step, {row['name']}", row["median"], row["quartiles"], _ratio(row, "cutmix replayed", 3))
        for row in steps
    ]
    others = {"handover": "copied", "mixing": "tiny none", "epoch": ""}
    for row in result["rows"]:
        if row.get("part") in others and row["values"]:
            said = _ratio(row, others[row["part"]], 3)
            lines.append((f"{row['part']}, {row['name']}", row["median"], row["quartiles"], said))
    return [
        ["stage", "ms per batch", "quartiles", "share" + ", or ratio to CutMix'" * bool(steps)],
        *(
            [name, f"{ms:.2f}", " – ".join(f"{q:.2f}" for q in quartiles or ()), said]
            for name, ms, quartiles, said in lines
        ),
    ]


def table_loss(result: dict[str, Any]) -> list[list[str]]:
    """One line per loss and size."""
    return [
        ["loss", "B", "K", "dtype", "ms", "quartiles", "of timm's"],
        *(
            [row["name"], str(row["B"]), str(row["K"]), row["dtype"], *_timed(row), _ratio(row, "timm soft target")]
            for row in result["rows"]
        ),
    ]


def table_mix(result: dict[str, Any]) -> list[list[str]]:
    """One line per stage."""
    kernels = any("kernel_us" in row for row in result["rows"])
    return [
        ["stage", "ms per batch", "quartiles", "of a copy", "CPU, ms", *["kernels, µs"] * kernels],
        *(
            [
                row["name"],
                *_timed(row),
                _ratio(row, "floor: copy"),
                f"{row['cpu_ms']:.3g}" if "cpu_ms" in row else "",
                *[f"{row['kernel_us']:.0f}" if "kernel_us" in row else ""] * kernels,
            ]
            for row in result["rows"]
        ),
    ]


def _timed(row: dict[str, Any]) -> list[str]:
    """Median and quartiles in three digits, or the reason why there are none."""
    if row["median"] is None:
        return [row["error"] or "not measured", ""]
    return [f"{row['median']:.3g}", "{:.3g} – {:.3g}".format(*row["quartiles"])]


METRICS = {"top1": "top-1, %", "nll": "NLL, nats", "ece": "ECE, %"}


DIGITS = {"top1": 2, "nll": 3, "ece": 2}


def metrics_of(result: dict[str, Any]) -> list[str]:
    found = [row["runs"][0] for row in result["rows"] if row["runs"]]
    return [name for name in METRICS if not found or name in found[0]]


def table_accuracy(result: dict[str, Any]) -> list[list[str]]:
    """One line per row: each metric, its difference from CutMix seed by seed, and the cost of the row."""
    gpu, metrics = result["settings"]["device"] != "cpu", metrics_of(result)
    compared = {metric: paired.compare(result["rows"], "CutMix", metric) for metric in metrics}
    paper = any(row["paper"] for row in result["rows"])
    speed = any("speed" in row for row in result["rows"])
    columns = [cell for metric in metrics for cell in (METRICS[metric], "− CutMix (95 %; p, Holm)")]
    lines = [
        [
            "row",
            *["the paper's DeiT-S"] * paper,
            "n",
            *columns,
            "GPU hours" if gpu else "CPU hours",
            *["images/s, of CutMix'"] * speed,
        ]
    ]
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
    found = paired.moments(list(paired.last(row["runs"], metric).values()))
    own = f"{found.mean:.{digits}f}" + ("" if found.sd is None else f" ± {found.sd:.{digits}f}")
    if compared is None or compared[0].mean is None:
        return [own, ""]
    one, p = compared
    said = f"{one.mean:+.{digits}f}"
    if one.interval:
        said += f" ({one.interval[0]:+.{digits}f} to {one.interval[1]:+.{digits}f}; {p:.2g})"
    return [own, said]


def read_accuracy(result: dict[str, Any]) -> str:
    """One sentence each on the differences that hold after Holm's correction and on the label weights."""
    said = []
    for metric in metrics_of(result):
        found = paired.compare(result["rows"], "CutMix", metric)
        holding = [
            f"{name} ({one.mean:+.{DIGITS[metric]}f})" for name, (one, p) in found.items() if p is not None and p < 0.05
        ]
        said.append(f"{METRICS[metric].split(',')[0]}: {', '.join(holding) or 'none'}")
    text = f"Differences with p < .05 after Holm's correction within the table. {'; '.join(said)}."
    for row in result["rows"]:
        if row["name"] == "LUMix" and row["runs"] and row["runs"][0].get("lam"):
            moved, clamped = (over_epochs(row, name)[1][-1] for name in ("moved", "clamped"))
            text += f" In its last epoch LUMix moves λ by {moved:.3f} on average; {clamped:.1%} are clamped."
    return text


def _relative_speed(row: dict[str, Any]) -> str:
    if row["name"] == "CutMix":
        return "1"
    return "{:.2f} ({:.2f} – {:.2f})".format(row["speed"]["ratio"]["median"], *row["speed"]["ratio"]["quartiles"])


def signed(sign: str, value: float | None) -> str:
    return "" if value is None else f" {sign} {value:.2f}"


def table_scaling(result: dict[str, Any]) -> list[list[str]]:
    """One line per location of the images and number of GPUs."""
    takes = result["assumed"]["gpu_rate"]
    return [
        [
            "images",
            "GPUs",
            "a loader gives, images/s",
            "a GPU gets, images/s",
            "of what it takes",
            "bound by",
            "loaders needed, × the GPU's rate",
            "cores needed",
            "network needed, Gbit/s",
        ],
        *(
            [
                row["name"],
                str(row["ranks"]),
                f"{row['loader']:.0f}",
                f"{row['median']:.0f}",
                f"{row['median'] / takes:.0%}",
                row["bound"],
                f"{row['headroom']:.2f}",
                f"{row['cores_needed']:,.0f}",
                f"{row['gbit_needed']:,.1f}",
            ]
            for row in result["rows"]
        ),
    ]


def table_start(result: dict[str, Any]) -> list[list[str]]:
    """One line per source."""
    return [
        ["source", "samples", "opened, s", "first batch, s", "memory per rank, MB", "bytes per sample"],
        *(
            [
                row["name"],
                f"{row['samples']:,.0f}",
                *(_seconds(row, key) for key in ("open", "first")),
                f"{row['held'] / 1e6:.0f}",
                f"{row['held'] / row['samples']:.0f}",
            ]
            for row in result["rows"]
        ),
    ]


def _seconds(row: dict[str, Any], key: str) -> str:
    found = row.get("quartiles", {}).get(key)
    return f"{row[key]:.2f}" + (" ({:.2f} – {:.2f})".format(*found) if found else "")


def table_augment(result: dict[str, Any]) -> list[list[str]]:
    """One line per operation."""
    return [
        ["operation", "mean difference, grey levels", "largest", "values more than one off"],
        *(
            [row["name"], f"{row['mean']:.3f}", str(row["largest"]), f"{row['beyond_one']:.2%}"]
            for row in result["rows"]
        ),
    ]


def table_tune(result: dict[str, Any]) -> list[list[str]]:
    """One line per value."""
    return [
        ["argument", "images/s", "quartiles", "of the default, round by round", "chosen"],
        *(
            [
                f"`{row['name']}`",
                f"{row['median']:.0f}",
                "{:.0f} – {:.0f}".format(*row["quartiles"]),
                _ratio(row, "default", 3),
                "yes" * row["chosen"],
            ]
            for row in result["rows"]
        ),
    ]


def _ratio(row: dict[str, Any], reference: str, digits: int = 2) -> str:
    median = row.get("ratios", {}).get(reference, {}).get("median")
    return "" if median is None else f"{median:.{digits}f}"


TABLES: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "loaders": table_loaders,
    "loaders-threads": table_loaders,
    "cost": table_cost,
    "loss": table_loss,
    "mix": table_mix,
    "accuracy": table_accuracy,
    "scaling": table_scaling,
    "start": table_start,
    "augment": table_augment,
    "tune": table_tune,
}


def table(result: dict[str, Any]) -> str:
    """Markdown of a result, followed by its origin."""
    head, *lines = TABLES[result["kind"]](result)
    cells = [head, ["---"] * len(head), *lines]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
    read = [read_accuracy(result)] if result["kind"] == "accuracy" else []
    return "\n\n".join([text, *read, f"{source_of(result)}: `{result['meta']['command']}`"])
