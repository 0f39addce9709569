"""Finds the `create_loader` arguments that make this loader fastest on this machine, on your own images.

Knobs are tuned one after the other. The values of a knob take turns for several rounds; a value replaces the default
only if it is more than 2 % faster in the median and faster in three rounds out of four, over at least five rounds. The
decoder's knob applies only to GPUs.

    python -m benchmarks.tune --quick
    python -m benchmarks.tune --data imagenet/train --batch-size 256
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumix_dali.cpus import available

from . import harness, report
from .report import ratio_cell, spread, timed

if TYPE_CHECKING:
    from .contenders import Setting

GAIN = 1.02
DECODER = "hw_decoder_load"


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per value."""
    lines = [["argument", "images/s", "quartiles", "of the default, round by round", "chosen"]]
    for row in result["rows"]:
        cells = [*timed(row, ".0f"), ratio_cell(row, "default", 3), "yes" * row.get("chosen", False)]
        lines.append([f"`{row['name']}`", *cells])
    return lines


def reading(result: dict[str, Any]) -> report.Reading:
    """The chosen values."""
    said = [
        f"{row['name']}: {spread(row['ratios']['default'], 3)} of the default, faster."
        for row in result["rows"]
        if row.get("chosen") and better(row)
    ]
    given = ", ".join(f"{name}={value!r}" for name, value in result.get("chosen", {}).items())
    return report.Reading(
        said or ["No value is faster than the default by more than noise."], f"create_loader(..., {given})"
    )


def chart(result: dict[str, Any]) -> report.Chart:
    """Each value's ratio to its default."""
    return report.ratios_chart(result, "default", reading(result).said[0], "images/s ÷ the default's, round by round")


KIND = report.Kind(table, reading, chart)


def knobs(device: str, cpus: int) -> dict[str, list[Any]]:
    """Values of each knob, the default first."""
    threads = [cpus, *sorted({max(1, cpus // 2), cpus + 1, 2 * cpus} - {cpus})]
    values: dict[str, list[Any]] = {"num_threads": threads, "prefetch_queue_depth": [2, 1, 3, 5]}
    return values | ({} if device == "cpu" else {DECODER: [0.65, 0.0, 0.3, 0.99]})


def arguments(chosen: dict[str, Any]) -> dict[str, Any]:
    """`create_loader`'s arguments for the chosen values; one is an option of the decoder."""
    plain = {name: value for name, value in chosen.items() if name != DECODER}
    return plain | (dict(decoder={DECODER: chosen[DECODER]}) if DECODER in chosen else {})


def better(row: dict[str, Any]) -> bool:
    """Whether a value beats the default by more than noise."""
    ratio = row["ratios"]["default"]
    return report.is_shown(ratio) and ratio["median"] > GAIN


def tune(
    measure: Callable[[dict[str, Any]], float],
    values: dict[str, list[Any]],
    rounds: int,
    save: Callable[[list[dict[str, Any]], dict[str, Any]], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Chooses a value for each knob in turn, with the previous knobs already set.

    Args:
        measure: images/s with these values of all knobs.
        values: the values of each knob, the default first.
        rounds: turns of each value, after an untimed turn with all defaults.
        save: called after every turn with the rows and the choices so far.

    Returns:
        The chosen values, and one row per value: name, knob, value, values (one per round), median, quartiles, its
        ratio to the default round by round, and whether it was chosen.
    """
    chosen = {name: options[0] for name, options in values.items()}
    rows: list[dict[str, Any]] = []
    said = harness.Progress(sum(map(len, values.values())), rounds, untimed=0)
    measure(dict(chosen))
    for knob, options in values.items():
        ours = [dict(name=f"{knob}={value!r}", knob=knob, value=value, values=[], chosen=False) for value in options]
        rows += ours
        for number in range(1, rounds + 1):
            for row in ours:
                row["values"].append(measure(chosen | {knob: row["value"]}))
                said.turn(number, row["name"])
                for each in ours:
                    ratio = harness.ratio(each["values"], ours[0]["values"])
                    each.update(harness.summary(each["values"]), ratios=dict(default=ratio))
                save(rows, chosen)
        best = max(filter(better, ours), default=ours[0], key=lambda row: row["ratios"]["default"]["median"])
        best["chosen"], chosen[knob] = True, best["value"]
    save(rows, chosen)
    return chosen, rows


def speed(s: "Setting", args: argparse.Namespace, chosen: dict[str, Any]) -> float:
    """Images/s of the loader with these values, in its steady state."""
    from lumix_dali import create_loader

    from .contenders import AHEAD

    ahead = max(chosen["prefetch_queue_depth"], AHEAD)
    batches = harness.epoch_length(args.batches, ahead)
    with create_loader(
        s.repeated(batches),
        batch_size=s.batch_size,
        input_size=s.size,
        device=s.device,
        dtype=args.dtype,
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        **arguments(chosen),
    ) as loader:
        return harness.throughput(loader, batch_size=s.batch_size, timed=args.batches, ahead=ahead, device=s.device)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = harness.parser("tune", __doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="class folder (default: generated images)")
    add("--batch-size", type=harness.positive, default=256)
    add("--input-size", type=harness.positive, default=224)
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--dtype", default="float32", choices=("float32", "float16", "uint8"))
    add("--batches", type=harness.positive, default=4, help="timed batches per turn")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batches, args.batch_size = 1, 1, min(args.batch_size, 8)
    seconds = 15 + args.rounds * 9 * (args.batches + 6) * args.batch_size * 2e-3
    harness.begin("tune", args, seconds, "images/s of this loader with different arguments")
    with harness.one_line(parser):
        result = run(args, harness.command("tune", argv))
    report.finish(result)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Tunes every knob; Ctrl-C keeps what was measured."""
    device, meta = harness.resolve_device(args.device), harness.metadata(command)
    harness.refuse_dirty(args.out, meta, args.allow_dirty)
    from lumix_dali.data.sources import load_files

    from . import data
    from .contenders import Setting

    samples = load_files(args.data or data.generate())
    s = Setting(samples, args.batch_size, args.input_size, device, Path())
    names = ("batch_size", "input_size", "dtype", "mixup", "cutmix")
    settings = dict(device=device, images=len(samples)) | {name: getattr(args, name) for name in names}
    result: dict[str, Any] = dict(
        kind="tune", unit="images/s", complete=False, rounds=args.rounds, meta=meta, settings=settings, rows=[]
    )

    def save(rows: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
        result.update(rows=rows, chosen=arguments(chosen))
        harness.write(args.out, result)

    values = {knob: options for knob, options in knobs(device, available()).items() if wanted(knob, args.only)}
    try:
        tune(lambda chosen: speed(s, args, chosen), values, args.rounds, save)
    except KeyboardInterrupt:
        return result
    result["complete"] = True
    harness.write(args.out, result)
    return result


def wanted(knob: str, only: str | None) -> bool:
    """Whether `--only` selects a knob; the queue's depth is always measured, since turns depend on it."""
    return only is None or knob == "prefetch_queue_depth" or knob.startswith(tuple(only.split(",")))


if __name__ == "__main__":
    main()
