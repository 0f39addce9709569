"""The mix stage only, on images that are already on the device, against the copy that any mixing must make.

A turn runs batches of a pipeline that contains only the stage; "nothing" is the cost of an empty pipeline.
"loader" rows mix by plans drawn on the host, as the loader does; the others mix in the graph (`fn.mix`).
On a GPU a row also has the run time of its kernels and copies (`kernel_us` per batch, from the profiler; it excludes
the CPU's draws) and their names; `copies` counts the copies per batch by direction. `cpu_ms` is the CPU time of all
threads per batch.

    python -m benchmarks.mix --quick
    python -m benchmarks.mix --batch-size 256
"""

from collections.abc import Sequence
from typing import Any

from lumix_dali.cpus import available

from . import harness, report
from .names import FLOOR, NOTHING, ONE_PIXEL
from .report import compared, ratio_cell, ratio_of, spread, timed


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per stage."""
    kernels = any("kernel_us" in row for row in result["rows"])
    lines = [["stage", "ms per batch", "quartiles", "of a copy", "CPU, ms", *["kernels, µs"] * kernels]]
    for row in result["rows"]:
        cpu = f"{row['cpu_ms']:.3g}" if "cpu_ms" in row else ""
        kernel = [f"{row['kernel_us']:.0f}" if "kernel_us" in row else ""] * kernels
        lines.append([row["name"], *timed(row), ratio_cell(row, FLOOR), cpu, *kernel])
    return lines


def reading(result: dict[str, Any]) -> report.Reading:
    """The loader's mixing, relative to copying a batch and to normalising it."""
    said = []
    for name in ("loader: cutmix elem", "loader: cutmix+mixup elem"):
        if copies := ratio_of(result, name, FLOOR):
            said.append(f"{name} takes the time of {spread(copies)} copies.")
        what = f"{name} ÷ normalising the batch"
        said += compared(what, ratio_of(result, name, "normalise"), "less time", "more time")
    pixel = next((row for row in result["rows"] if row["name"] == ONE_PIXEL and row["values"]), None)
    if pixel:  # little but the fixed cost of its operators, which run one after another
        images = 1000 * result["settings"]["batch_size"] / pixel["median"]
        said.append(f"RandAugment's operators alone would bound a loader at {images:,.0f} images/s.")
    return report.Reading(said, "python -m benchmarks.cost --parts loader weighs it against a whole batch")


def chart(result: dict[str, Any]) -> report.Chart:
    """Each stage's time in copies of the batch."""
    found = ratio_of(result, "loader: cutmix+mixup elem", FLOOR)
    title = f"CutMix + Mixup takes the time of {found['median']:.1f} copies of the batch" if found else "Mixing"
    return report.ratios_chart(result, FLOOR, title, "time of a batch ÷ that of copying it", log=True)


KIND = report.Kind(table, reading, chart)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = harness.parser("mix", __doc__)
    add = parser.add_argument
    add("--batch-size", type=harness.positive, default=256)
    add("--input-size", type=harness.positive, default=224)
    add("--threads", type=harness.positive, default=available(), help="of DALI")
    add("--batches", type=harness.positive, default=50, help="timed batches per turn")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batches, args.batch_size = 1, 2, min(args.batch_size, 32)
    seconds = 15 + 15 * (args.rounds + 2) * args.batches * args.batch_size * 0.0003
    harness.begin("mix", args, seconds, "the time of mixing a batch, without anything else")
    with harness.one_line(parser):
        device = harness.resolve_device(args.device)
        import torch

        from .mixing import candidates

        shape = (args.batch_size, args.input_size, args.input_size, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
        result = harness.compare(
            harness.named(candidates(images, args.threads, args.batches), args.only),
            kind="mix",
            unit="ms",
            out=args.out,
            rounds=args.rounds,
            command=harness.command("mix", argv),
            references=[FLOOR, NOTHING, "normalise"],
            allow_dirty=args.allow_dirty,
            settings=dict(batch_size=args.batch_size, input_size=args.input_size, device=device, threads=args.threads),
        )
    report.finish(result)


if __name__ == "__main__":
    main()
