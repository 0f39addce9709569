"""The result of an evaluation beside the paper's numbers, as a table, a figure and JSON."""

import argparse
import datetime
import json
import platform
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from nvidia import dali

from lumix_dali import __version__
from lumix_dali.data.storage import replacing

# (baseline, LUMix) in percent, for DeiT-S; Table 1 has other models, too.
TABLE_1 = {
    "convnext_tiny": (82.1, 82.5),
    "convnext_small": (83.1, 83.3),
    "convnext_base": (83.8, 84.1),
    "swin_tiny_patch4_window7_224": (81.3, 81.7),
    "swin_small_patch4_window7_224": (83.0, 83.1),
    "swin_base_patch4_window7_224": (83.5, 83.6),
    "deit_small_patch16_224": (79.8, 80.6),
    "deit_base_patch16_224": (81.8, 82.2),
    "xcit_small_12_p16_224": (82.0, 82.3),
    "xcit_medium_24_p16_224": (82.7, 83.2),
    "xcit_large_24_p16_224": (82.9, 83.6),
    "resnet50": (78.6, 79.1),
}
TABLE_7 = {
    1: (79.9, 80.5),
    4: (75.6, 76.3),
    8: (73.3, 73.6),
    16: (69.2, 69.9),
    32: (59.8, 60.3),
    64: (46.1, 46.3),
    "average": (67.3, 67.8),
}
TABLE_9 = {
    0: (79.8, 80.6),
    10: (76.7, 77.5),
    20: (71.9, 73.2),
    30: (65.9, 68.2),
    40: (59.1, 62.0),
    50: (50.5, 53.9),
    60: (40.9, 44.8),
    70: (29.5, 34.4),
    80: (17.4, 23.0),
    90: (5.7, 11.7),
    "average": (49.75, 52.92),
}
PAPER = {
    **{("shuffle", "shuffled", name): pair for name, pair in TABLE_7.items()},
    **{("occlusion", "non-salient", name): pair for name, pair in TABLE_9.items()},
    ("imagenet-a", "", "top-1"): (19.1, 19.9),
    ("imagenet-a", "", "calibration error"): (32.0, 31.5),
    ("imagenet-a", "", "AURRA"): (23.8, 27.4),
    ("imagenet-o", "", "AUPR"): (20.9, 21.3),
    ("wsas", "", "Jaccard index"): (29.2, 29.5),
    ("wsol", "", "box IoU"): (34.9, 41.8),
}
# The row with unchanged images.
WHOLE = {"shuffle": "shuffled 1", "occlusion": "a loss of 0"}
ABSCISSA = {"shuffle": "cells", "occlusion": "information loss, %"}


def build(
    args: argparse.Namespace,
    values: Mapping[tuple[str, str | int], list[float]],
    data: dict[str, Any],
    meta: dict[str, Any],
    is_imagenet: bool,
) -> dict[str, Any]:
    """The result for JSON: one row per number, with the values of all seeds and, for ImageNet, the paper's pair."""
    arch = args.model.split(".")[0]
    paper = PAPER | ({("top1", "", "top-1"): TABLE_1[arch]} if arch in TABLE_1 else {})
    paper = paper if is_imagenet else {}

    def pair(curve: str, name: str | int) -> tuple[float, float] | None:
        points = {key[1:] for key in paper if key[:2] == (args.protocol, curve)}
        same = points == {key for key in values if key[0] == curve}
        # An average over other points is not comparable.
        return paper.get((args.protocol, curve, name)) if same or name != "average" else None

    rows = [
        {
            "curve": curve,
            "name": name,
            "mean": statistics.fmean(seeds),
            "values": seeds,
            "std": statistics.stdev(seeds) if len(seeds) > 1 else None,
            "paper": pair(curve, name),
        }
        for (curve, name), seeds in values.items()
    ]
    source = "none" if not is_imagenet else "DeiT-S" if args.protocol != "top1" else arch if arch in TABLE_1 else "none"
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "figure")}
    return {
        "protocol": args.protocol,
        "model": args.model,
        "unit": "%",
        "rows": rows,
        "settings": settings,
        "paper_model": source,
        "input": data,
        "meta": meta,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    whose = f"paper: {result['paper_model']}"
    size, crop = "x".join(map(str, result["input"]["input_size"][1:])), result["input"]["crop_pct"]
    images = f"images of {size} pixels, {result['input']['interpolation']}"
    if result["protocol"] not in ("wsas", "wsol"):  # these two squash the whole image into the input
        images += f", crop_pct {crop:g}"
    if result["protocol"] in WHOLE:
        images += f"; {WHOLE[result['protocol']]} differs from top1 where that has another crop or interpolation"
    lines = [
        f"{result['protocol']}, {result['model']}, in %",
        images,
        f"{'':36}{'here':>8}{'':9}  {whose:>22}   + LUMix",
    ]
    for row in result["rows"]:
        spread = f"± {row['std']:5.2f}" if row["std"] is not None else ""
        baseline, lumix = (f"{value:g}" for value in row["paper"]) if row["paper"] else ("-", "-")
        name = f"{row['curve']} {row['name']}".strip()
        lines.append(f"{name:36}{row['mean']:8.2f}{spread:>9}  {baseline:>22}{lumix:>10}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: str) -> None:
    """Plots accuracy against cells or loss if the protocol has such curves, else one bar per number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")  # without pyplot, which would look for a display
    axes, found = figure.subplots(), result["rows"]
    labels = (f"paper, {result['paper_model']}", f"paper, {result['paper_model']} + LUMix")
    if xlabel := ABSCISSA.get(result["protocol"]):
        for number, curve in enumerate(dict.fromkeys(row["curve"] for row in found)):
            points = [row for row in found if row["curve"] == curve and row["name"] != "average"]
            x = [row["name"] for row in points]
            axes.errorbar(
                x,
                [row["mean"] for row in points],
                [row["std"] or 0 for row in points],
                color=f"C{number}",
                marker="o",
                capsize=3,
                label=f"{curve}, here",
            )
            known = [row for row in points if row["paper"]]
            for which, style in enumerate(("--", ":")):
                if known:
                    axes.plot(
                        [row["name"] for row in known],
                        [row["paper"][which] for row in known],
                        style,
                        color=f"C{number}",
                        alpha=0.7,
                        label=labels[which],
                    )
        if result["protocol"] == "shuffle":
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, list(map(str, x)))
        axes.set(xlabel=xlabel, ylabel="top-1, %", ylim=(0, None))
    else:
        place = np.arange(len(found))
        axes.bar(place - 0.25, [row["mean"] for row in found], 0.25, label="here")
        for which in (0, 1):
            axes.bar(
                place + 0.25 * which,
                [row["paper"][which] if row["paper"] else 0 for row in found],
                0.25,
                color=f"C{which + 1}",
                alpha=0.6,
                label=labels[which],
            )
        axes.set_xticks(place, [row["name"].replace(", ", ",\n") for row in found])
        axes.set(ylabel="%")
    axes.set_title(f"{result['protocol']}: {result['model']}", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def metadata(module: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The origin of a result: command, commit, date, device, versions."""

    def git(*command: str) -> str | None:
        ran = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        return None if ran.returncode else ran.stdout.strip()

    return {
        "command": f"python -m {module} {shlex.join(argv)}",
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain") == "",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "lumix_dali": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "dali": dali.__version__,
        },
    }


def write(path: str, result: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
