"""Images per second of DALI's stages, this loader and its alternatives, taking turns in one run.

`benchmarks.contenders` lists the loaders and how each is used. All have as many threads or workers as `--threads`
says. With several `--workers`, the loaders with workers try them in three alternating turns; another number than the
first is taken only if it was 5 % faster in each of them. `harness.throughput` times a turn.

    python -m benchmarks.loaders --quick                                # does everything run here?
    python -m benchmarks.loaders --data imagenet/train --only lumix,timm
    python -m benchmarks.loaders --threads 1,2,4,8                      # one row per thread (or worker) count

Requires ``pip install '.[bench]'``. SPDL also needs FFmpeg's libraries (``apt install ffmpeg``), FFCV the headers of
OpenCV and libjpeg-turbo. Mosaic's package is not in the extra because it pins NumPy below 2.2 and transformers below
5: install it with ``pip install --no-deps`` together with what it imports. Only FFCV and Mosaic may be missing.
"""

import argparse
import importlib.metadata
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumix_dali.cpus import available

from . import harness, report
from .report import compared, labelled, ratio_cell, ratio_of, timed

if TYPE_CHECKING:
    from lumix_dali.data.files import Files

    from .contenders import Entry, Setting

CUTMIX, BOTH = "lumix/cutmix elem", "lumix/cutmix+mixup elem"
CEILING, TIMM, TIMM_RECIPE = "dali/+normalise", "timm FastCollateMixup elem", "timm recipe"
MAX_FILES = 10_000  # read from disk beforehand, and written again for the loaders with a format of their own
TURN_SECONDS = 3.0
TRIALS, GAIN = 3, 1.05
REFERENCES = (CEILING, "lumix/none", TIMM, TIMM_RECIPE, "dali+torchvision cutmix", "ffcv")


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per loader: images/s, and its ratio to the ceiling and to timm with the same recipe."""
    references = {"of plain DALI": CEILING, "of timm's loader": TIMM}
    shown = [name for name, to in references.items() if any(ratio_cell(row, to) for row in result["rows"])]
    lines = [["loader", "version", "threads or workers", "mixing", "images/s", "quartiles", *shown]]
    for row in result["rows"]:
        count = str(row.get("count", row.get("workers", row.get("threads", ""))))
        start = [row["name"], row.get("version") or "", count, row.get("mixing", "none")]
        to = references | {"of timm's loader": TIMM_RECIPE if "recipe" in row["name"] else TIMM}
        lines.append([*start, *timed(row, ".0f"), *(ratio_cell(row, to[name]) for name in shown)])
    return lines


def reading(result: dict[str, Any]) -> report.Reading:
    """Compares this loader with timm's, FFCV and plain DALI."""
    said: list[str] = []
    pairs = ((BOTH, TIMM), (BOTH, "ffcv"), (BOTH, CEILING), (BOTH, "lumix/none"), ("lumix/recipe", TIMM_RECIPE))
    for name, reference in pairs:
        said += compared(f"{name} ÷ {reference}", ratio_of(result, name, reference), "slower", "faster")
    if any("count" in row for row in result["rows"]) and said:
        said.append(f"These are of {max(row['count'] for row in result['rows'])} threads.")
    return report.Reading(
        said or ["There is no pair of loaders here that is worth a ratio: --only left the others out."],
        "lumix-dali speed DIR --model NAME says whether your training waits for the loader",
    )


def chart(result: dict[str, Any]) -> report.Chart:
    """Each loader's ratio to timm's (to plain DALI where timm was not measured), round by round."""
    timm = any(ratio_cell(row, TIMM) for row in result["rows"])
    reference, whose = (TIMM, "timm's") if timm else (CEILING, "plain DALI's")
    measured = [row for row in result["rows"] if row["name"] != "dali/read" and ratio_cell(row, reference)]
    found = ratio_of(result, BOTH, reference) or ratio_of(result, CUTMIX, reference)
    title = f"This loader, mixing, gives {found['median']:.2f} times {whose} images/s" if found else "Loaders"
    dots = [report.dot(labelled(row), row["ratios"][reference]) for row in measured]
    xlabel = f"images/s ÷ {whose}, round by round: single rounds, median, quartiles"
    return report.Chart(title, [report.Panel(xlabel, sorted(dots, key=lambda dot: -dot.middle), line=1.0)])


KIND = report.Kind(table, reading, chart)


class Turn:
    """A running entry: chooses its workers and the length of a turn, then measures."""

    def __init__(self, entry: "Entry", setting: "Setting", choices: Sequence[int], images: int | None):
        self.entry, self.setting, self.choices, self.images = entry, setting, choices, images

    def prepare(self) -> dict[str, Any]:
        """Opens the loader with its number of threads or workers."""
        count, sweep = self.choices[0], {}
        if len(self.choices) > 1:
            sweep = self._sweep(TRIALS)
            count = best_count(sweep)
        rate = max(sweep[count]) if sweep else 0.0
        if not (rate or self.images):
            rate = self._open(count, timed=max(2, count)).measure()
        images = self.images or max(TURN_SECONDS * rate, 2 * self.setting.batch_size)
        # Workers finish their batches together, so a turn must be a multiple of their number.
        step = count if self.entry.swept else 1
        self._open(count, timed=math.ceil(images / self.setting.batch_size / step) * step)
        name = "workers" if self.entry.swept else "threads"
        return {name: count, "timed_batches": self.timed, "sweep": {str(key): rates for key, rates in sweep.items()}}

    def _sweep(self, turns: int) -> dict[int, list[float]]:
        """Images/s of each number of workers, in alternating turns."""
        rates: dict[int, list[float]] = {count: [] for count in self.choices}
        for _ in range(turns):
            for count in self.choices:
                rates[count].append(self._open(count, timed=max(2, count)).measure())
        return rates

    def measure(self) -> float:
        """Images/s of a turn."""
        return harness.throughput(
            self.loader,
            batch_size=self.setting.batch_size,
            timed=self.timed,
            ahead=self.ahead,
            device=self.setting.device,
            check=self.setting.check if self.entry.whole else None,
        )

    def _open(self, count: int, timed: int) -> "Turn":
        self.loader: Iterable = ()  # shut down the previous workers first
        self.timed, self.ahead = timed, self.entry.ahead(count)
        self.loader = self.entry.open(self.setting, count, harness.epoch_length(timed, self.ahead))
        return self


def best_count(sweep: dict[int, list[float]]) -> int:
    """The number of workers to use: the first, unless another was faster by `GAIN` in every turn."""
    first, *others = sweep
    ahead = {n: min(one / base for one, base in zip(sweep[n], sweep[first], strict=True)) for n in others}
    best = max(ahead, key=ahead.__getitem__, default=first)
    return best if ahead.get(best, 0) > GAIN else first


def candidates(entries: "Sequence[Entry]", setting: "Setting", args: argparse.Namespace) -> list[harness.Candidate]:
    """One candidate per entry; with several thread counts, one for each count, used for workers too."""
    several, made = len(args.threads) > 1, []
    for threads in args.threads:
        for entry in entries:
            choices = [threads] if several or not entry.swept else args.workers or [threads]
            turn = Turn(entry, setting, choices, args.images)
            made.append(
                harness.Candidate(
                    entry.name,
                    turn.measure,
                    turn.prepare,
                    where=dict(count=threads) if several else {},
                    fields=dict(mixing=entry.mixing, note=entry.note, version=version(entry.packages)),
                    excused=entry.excused,
                )
            )
    return made


def version(packages: Sequence[str]) -> str | None:
    """The version of the first of `packages` that is installed."""
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def some(samples: "Files", count: int = MAX_FILES) -> "Files":
    """At most `count` samples, drawn from all classes."""
    import numpy as np

    from lumix_dali.data.files import Files

    if len(samples) <= count:
        return samples
    index = np.sort(np.random.default_rng(0).permutation(len(samples))[:count])
    return Files(samples.root, [samples.names[i] for i in index], samples.labels[index], samples.classes)


def warm_page_cache(paths: Sequence[str]) -> float:
    """Reads every file once; returns their mean size in kB."""
    return round(sum(len(Path(path).read_bytes()) for path in paths) / len(paths) / 1e3, 1)


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    cpus, parser = available(), harness.parser("loaders", __doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="class folder (default: 1000 images, generated in data/synthetic-imagenet)")
    add("--batch-size", type=harness.positive, default=256)
    add("--input-size", type=harness.positive, default=224, help="side of the delivered images, in pixels")
    add("--threads", type=harness.positives, default=[cpus], metavar="LIST", help="threads or workers of every loader")
    add("--workers", type=harness.positives, metavar="LIST", help="that loaders with workers try (default: --threads)")
    add("--interpolation", choices=("bicubic", "bilinear"), default="bicubic", help="of the resizing")
    add("--images", type=harness.positive, help="timed images per turn (default: as many as take 3 s)")
    add("--decoder", type=harness.options, default={}, metavar="NAME=NUMBER,...", help="options of DALI's decoder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = command_line()
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batch_size = 1, min(args.batch_size, 16)
        args.images, args.workers = args.images or 2 * args.batch_size, None
    rows = 26 if args.only is None else 3 + args.only.count(",")
    harness.begin("loaders", args, rows * len(args.threads) * (args.rounds + 3) * (2 if args.quick else 8), "images/s")
    with harness.one_line(parser), tempfile.TemporaryDirectory() as scratch:
        setting, entries = prepare(args, Path(scratch))
        result = harness.compare(
            candidates(entries, setting, args),
            kind="loaders" if len(args.threads) == 1 else "loaders-threads",
            unit="images/s",
            command=harness.command("loaders", argv),
            out=args.out,
            rounds=args.rounds,
            references=REFERENCES,
            settings=settings_of(setting, args),
            allow_dirty=args.allow_dirty,
        )
    report.finish(result)


def prepare(args: argparse.Namespace, scratch: Path) -> "tuple[Setting, list[Entry]]":
    """The images, and the loaders to compare; the ceiling is always among them."""
    device = harness.resolve_device(args.device)
    harness.refuse_dirty(args.out, harness.metadata(""), args.allow_dirty)
    from lumix_dali.data.sources import load_files

    from . import data
    from .contenders import ENTRIES, Setting

    chosen = harness.named(ENTRIES, args.only)
    entries = [entry for entry in ENTRIES if entry in chosen or entry.name == CEILING]
    samples = some(load_files(args.data or data.generate()))
    return Setting(
        samples, args.batch_size, args.input_size, device, scratch, args.decoder, args.interpolation
    ), entries


def settings_of(setting: "Setting", args: argparse.Namespace) -> dict[str, Any]:
    """What the result says about its run."""
    import torch

    from .contenders import PREFETCH, RATIO, SCALE

    return dict(
        files=len(setting.samples),
        classes=len(setting.samples.classes),
        generated=args.data is None,
        mean_kb=warm_page_cache(setting.paths()),
        page_cache="warm: every file read once before",
        batch_size=args.batch_size,
        input_size=args.input_size,
        dtype="float32",
        device=setting.device,
        decoder=args.decoder,
        threads=args.threads,
        workers=args.workers,
        prefetch=PREFETCH,
        torch_threads=torch.get_num_threads(),
        crop=dict(scale=SCALE, ratio=RATIO),
        interpolation=f"{args.interpolation}, antialiased",
    )


if __name__ == "__main__":
    main()
