"""Finds the `create_loader` arguments that make this loader fastest on this machine, on your own images.

Knobs are tuned one after the other. The values of a knob take turns for several rounds; a value replaces the default
only if it is more than 2 % faster in the median and faster in three rounds out of four. The decoder's knobs apply
only to GPUs.

    python -m benchmarks.tune --data imagenet/train --batch-size 256
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lumix_dali import create_loader
from lumix_dali.data.sources import load_files

from . import data, harness, readings
from .contenders import Setting

GAIN = 1.02
DECODER_KNOBS: dict[str, list[Any]] = {
    "hw_decoder_load": [0.65, 0.0, 0.12, 0.3, 0.5, 0.8, 0.99],
    "preallocate_width_hint": [0, 500, 1000, 2000],
    "preallocate_height_hint": [0, 500, 1000, 2000],
}


def knobs(device: str, cpus: int) -> dict[str, list[Any]]:
    """Values of each knob, the default first."""
    threads = [cpus, *sorted({max(1, cpus // 2), cpus + 1, 2 * cpus} - {cpus})]
    found: dict[str, list[Any]] = {"num_threads": threads, "prefetch_queue_depth": [2, 1, 3, 5]}
    return found | (DECODER_KNOBS if device != "cpu" else {})


def arguments(chosen: dict[str, Any]) -> dict[str, Any]:
    """`create_loader`'s arguments for the chosen values; some are options of the decoder."""
    decoder = {name: value for name, value in chosen.items() if value != DECODER_KNOBS.get(name, [value])[0]}
    plain = {name: value for name, value in chosen.items() if name not in DECODER_KNOBS}
    return plain | (dict(decoder=decoder) if decoder else {})


def tune(
    measure: Callable[[dict[str, Any]], float],
    values: dict[str, list[Any]],
    rounds: int,
    save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Chooses a value for each knob in turn, with the previous knobs already set.

    Args:
        measure: images/s with these values of all knobs.
        values: the values of each knob, the default first.
        rounds: turns of each value, after an untimed turn with all defaults.
        save: called with the rows after every round.

    Returns:
        The chosen values, and one row per value: name, knob, value, values (one per round), median, quartiles, its
        ratio to the default round by round, and whether it was chosen.
    """
    chosen = {name: options[0] for name, options in values.items()}
    rows: list[dict[str, Any]] = []
    measure(dict(chosen))
    with tqdm(total=rounds * sum(map(len, values.values())), unit="turn", disable=None) as bar:
        for knob, options in values.items():
            found = [dict(name=f"{knob}={value!r}", knob=knob, value=value, values=[]) for value in options]
            rows += found
            for _ in range(rounds):
                for row in found:
                    bar.set_postfix_str(row["name"])
                    row["values"].append(measure(chosen | {knob: row["value"]}))
                    bar.update()
                for row in found:
                    ratio = harness.ratio(row["values"], found[0]["values"])
                    row.update(harness.summary(row["values"]), ratios=dict(default=ratio), chosen=False)
                save(rows)
            best = max(
                (row for row in found if rounds > 1 and better(row)),  # one round cannot tell a gain from noise
                default=found[0],
                key=lambda row: row["ratios"]["default"]["median"],
            )
            best["chosen"], chosen[knob] = True, best["value"]
    save(rows)
    return chosen, rows


def better(row: dict[str, Any]) -> bool:
    """Whether a value beats the default by more than noise."""
    ratio = row["ratios"]["default"]
    return ratio["median"] > GAIN and ratio["quartiles"][0] > 1


def speed(s: Setting, args: argparse.Namespace, chosen: dict[str, Any]) -> float:
    """Images/s of the loader with these values, in its steady state."""
    ahead = chosen["prefetch_queue_depth"]
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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="class folder; default: generated images")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--batch-size", type=harness.positive, default=256)
    add("--input-size", type=harness.positive, default=224)
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--dtype", default="float32", choices=("float32", "float16", "uint8"))
    add("--batches", type=harness.positive, default=4, help="timed batches per turn")
    add("--out", metavar="FILE.json", help="also write the result here")
    add("--rounds", type=harness.positive, default=5, help="turns of each value")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.tune", *(sys.argv[1:] if argv is None else argv)])
    meta = harness.metadata(command)
    try:
        device = harness.resolve_device(args.device)
        harness.refuse_dirty(args.out or "", meta)
    except ValueError as error:
        parser.error(str(error))
    samples = load_files(args.data or data.generate())
    s = Setting(samples, args.batch_size, args.input_size, device, Path())
    result: dict[str, Any] = dict(
        kind="tune",
        unit="images/s",
        rounds=args.rounds,
        meta=meta,
        settings=dict(
            batch_size=s.batch_size,
            input_size=s.size,
            device=device,
            dtype=args.dtype,
            mixup=args.mixup,
            cutmix=args.cutmix,
            images=len(samples),
        ),
    )

    def save(rows: list[dict[str, Any]], **more: Any) -> None:
        if args.out:
            harness.write(args.out, result | dict(complete=bool(more), rows=rows) | more)

    chosen, rows = tune(lambda values: speed(s, args, values), knobs(device, harness.cpus()), args.rounds, save)
    save(rows, chosen=arguments(chosen))
    print(readings.report(result | dict(complete=True, rows=rows, chosen=arguments(chosen))))


if __name__ == "__main__":
    main()
