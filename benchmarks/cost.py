"""What a batch costs, stage by stage, and whether the loader or the model is the bottleneck.

Stages overlap, so a stage's cost is measured by ablation: the time of a batch with it minus the time without it.
Parts, for `--parts`:

    loader    DALI pipelines that end after each stage of the loader, read to copy
    model     the parts of a step on one cached batch
    step      whole steps, fed by the loader and by a replayed batch: the difference is what the loader costs
    epoch     what a new epoch and a checkpoint cost
    handover  steps on batches in DALI's own memory (DLPack; DALI synchronises the device to free them) and on copies
    cpu       CPU time of an image, with this resize and with nearest-neighbour resize: the others are left
    mixing    CPU time of mixing: a loader of 256 images of 8x8 pixels, on the CPU in one thread
    host      CPU time of the training thread alone, for a batch of 256
    tiny      images of 8, 32 and 64 pixels, with this package and with an earlier commit's
    large     CPU time of a photograph of 4000x3000 pixels, and of what lumix-dali convert --max-size 512 makes of it

    python -m benchmarks.cost --quick
    python -m benchmarks.cost --model resnet50 --data imagenet/train --parts model,step
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumix_dali.cpus import available

from . import harness, report
from .harness import summary
from .names import BEFORE, LARGE, NEAREST, TODAY
from .report import compared, is_shown, ratio_cell, ratio_of

PARTS = ("loader", "model", "step", "epoch", "handover", "cpu", "mixing", "host", "tiny", "large")
QUICK = ("loader", "model", "step", "cpu")
# Part: the row to which its rows are compared.
COMPARED = {
    "step": "cutmix replayed",
    "handover": "copied",
    "mixing": "tiny none",
    "cpu": NEAREST,
    "tiny": BEFORE,
    "large": LARGE,
}
RATIOS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LUMix ÷ CutMix, whole step": ("lumix replayed", "cutmix replayed", {}),
    "CutMix ÷ no mixing, whole step": ("cutmix replayed", "none replayed", {}),
    "fed by the loader ÷ replayed": ("lumix loaded", "lumix replayed", {}),
    "DLPack ÷ copied": ("dlpack", "copied", {}),
    "CutMix ÷ no mixing, 8x8 pixels": ("tiny cutmix", "tiny none", {}),
    "CutMix + Mixup ÷ no mixing, 8x8 pixels": ("tiny cutmix+mixup", "tiny none", {}),
    "CPU time of an image ÷ with nearest-neighbour resize": (TODAY, NEAREST, dict(part="cpu")),
    "4000x3000 pixels, converted to 512 ÷ as it is": ("converted to 512", LARGE, {}),
    **{
        f"{side}x{side} pixels, today ÷ {BEFORE}": (TODAY, BEFORE, dict(part="tiny", side=side)) for side in (8, 32, 64)
    },
}
BOTTLENECK = 1.05


def stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a batch, each without the previous ones, in each of two parts."""
    costs = []
    for part in ("loader", "model"):
        rows = [row for row in result["rows"] if row.get("part") == part and row["values"]]
        own, before = any("until" in row for row in rows), [0.0] * len(rows[0]["values"] if rows else ())
        for row in rows:
            cost = row if own else summary([ms - less for ms, less in zip(row["values"], before, strict=False)])
            costs.append(dict(name=row["name"], part=part, ms=cost["median"], quartiles=cost["quartiles"]))
            before = row["values"]
    return costs


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per stage with its share of its part; other rows show the ratio to their reference."""
    lines = [["part", "row", "ms", "quartiles", "share", "ratio"]]
    costs = stages(result)
    total = {part: sum(cost["ms"] for cost in costs if cost["part"] == part) for part in ("loader", "model")}
    for cost in costs:
        spread = " – ".join(f"{q:.2f}" for q in cost["quartiles"] or ())
        share = cost["ms"] / total[cost["part"]] if total[cost["part"]] else 0
        lines.append([cost["part"], cost["name"], f"{cost['ms']:.2f}", spread, f"{share:.0%}", ""])
    for row in result["rows"]:
        if row.get("part") not in total and row["values"]:
            spread = " – ".join(f"{q:.2f}" for q in row["quartiles"])
            ratio = ratio_cell(row, COMPARED.get(row["part"], ""), 3)
            lines.append([row["part"], _with_side(row), f"{row['median']:.2f}", spread, "", ratio])
    return lines


def _with_side(row: dict[str, Any]) -> str:
    return row["name"] + (f", {row['side']} px" if "side" in row else "")


def reading(result: dict[str, Any]) -> report.Reading:
    """The longest stage of each part, the ratios, and the bottleneck."""
    said, costs = [], stages(result)
    for part in ("loader", "model"):
        ours = [cost for cost in costs if cost["part"] == part]
        if len(ours) > 1:
            longest, total = max(ours, key=lambda cost: cost["ms"]), sum(cost["ms"] for cost in ours)
            said.append(f"The {part}'s longest stage is {longest['name']}: {longest['ms']:.1f} of {total:.1f} ms.")
    for what, (name, reference, where) in RATIOS.items():
        said += compared(what, ratio_of(result, name, reference, **where), "less time", "more time")
    if changed := [row["grey_levels"] for row in result["rows"] if row.get("grey_levels") is not None]:
        said.append(
            f"Converted, images differ by {changed[0]:.2f} grey levels in the mean, after the resize to the model's."
        )
    fed = ratio_of(result, "lumix loaded", "lumix replayed")
    if not fed:
        return report.Reading(said, "--parts step, without --only, says whether the loader or the model limits")
    if is_shown(fed) and fed["median"] >= BOTTLENECK:
        said.append("The loader is the bottleneck.")
        return report.Reading(said, "python -m benchmarks.tune finds the loader's fastest arguments on this machine")
    if fed["quartiles"][1] < BOTTLENECK:
        said.append("The loader is not the bottleneck.")
        return report.Reading(said, "a faster model, or --amp: the loader can feed it")
    return report.Reading(said, "more --rounds: whether the loader or the model is the bottleneck is open")


def chart(result: dict[str, Any]) -> report.Chart:
    """Milliseconds of each stage, and the ratios of the other rows to their references."""
    rows = [row for row in result["rows"] if row["values"]]
    ours = [row for row in rows if row.get("part") in ("loader", "model")]
    panels = []
    if ours and any("until" in row for row in ours):
        panels.append(report.Panel("ms that a stage adds to a batch", [report.dot(row["name"], row) for row in ours]))
    ratios = [
        report.dot(f"{row['part']}: {_with_side(row)}", found)
        for row in rows
        if (found := row.get("ratios", {}).get(COMPARED.get(row["part"], ""))) and found["values"]
    ]
    if ratios:
        panels.append(report.Panel("time ÷ that of the reference, round by round", ratios, line=1.0))
    said = reading(result).said
    return report.Chart(said[0] if said else "The cost of a batch", panels)


KIND = report.Kind(table, reading, chart)


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = harness.parser("cost", __doc__)
    add = parser.add_argument
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), metavar="LIST", help="see above")
    add("--data", type=Path, metavar="DIR", help="class folder (default: generated images)")
    add("--model", default="resnet50", help="any model name that timm.create_model accepts")
    add("--batch-size", type=harness.positive, default=256, help="a CPU's model wants smaller ones")
    add("--input-size", type=harness.positive, default=224)
    add("--threads", type=harness.positive, default=available(), help="of DALI")
    add("--decoder", type=harness.options, default={}, metavar="NAME=NUMBER,...", help="options of DALI's decoder")
    add("--batches", type=harness.positive, default=4, help="timed batches in a turn of the loader")
    add("--steps", type=harness.positive, default=4, help="timed batches in a turn of the model")
    add("--amp", action="store_true", help="bfloat16 autocast")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line()
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts {','.join(args.parts)}: {min(unknown)} is none of {', '.join(PARTS)}")
    if args.quick:
        args.rounds, args.batches, args.steps, args.batch_size = 1, 1, 1, min(args.batch_size, 4)
        args.parts = [part for part in args.parts if part in QUICK] or args.parts
    harness.begin("cost", args, estimate(args), f"the parts {', '.join(args.parts)}")
    with harness.one_line(parser), tempfile.TemporaryDirectory() as scratch:
        device = harness.resolve_device(args.device)
        from lumix_dali.data.sources import load_files

        from . import data
        from .contenders import Setting
        from .stages import candidates, chained

        check_model(args.model)
        root = args.data or (data.generate("data/few-images", 64, 8) if args.quick else data.generate())
        s = Setting(load_files(root), args.batch_size, args.input_size, device, Path(scratch), args.decoder)
        result = harness.compare(
            chained(harness.named(candidates(s, args), args.only)),
            kind="cost",
            unit="ms",
            command=harness.command("cost", argv),
            out=args.out,
            rounds=args.rounds,
            references=("none replayed", "lumix replayed", "cutmix loaded", *COMPARED.values()),
            settings=dict(
                model=args.model,
                batch_size=s.batch_size,
                input_size=s.size,
                device=s.device,
                threads=args.threads,
                decoder=args.decoder,
                amp=args.amp,
                images=len(s.samples),
            ),
            allow_dirty=args.allow_dirty,
        )
    report.finish(result)


def check_model(name: str) -> None:
    """ValueError unless timm has a model of this name."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f"--model {name}: timm has no such model; timm.list_models('*{name[:6]}*') may help")


def estimate(args: argparse.Namespace) -> float:
    """Seconds on two cores: 2 ms per image in the loader, 150 in a step, and the start."""
    rounds, images = args.rounds + 1, args.batch_size
    seconds = 20.0
    seconds += rounds * 6 * (2 * args.batches + 6) * images * 2e-3 * ("loader" in args.parts)
    seconds += rounds * 10 * (args.steps + 2) * images * 0.15 * bool({"model", "step"} & set(args.parts))
    return seconds + rounds * 5 * len({"tiny", "mixing", "host", "cpu", "large"} & set(args.parts))


if __name__ == "__main__":
    main()
