"""Images per second of DALI's stages, this loader and its alternatives, taking turns in one run.

`benchmarks.contenders` lists the loaders and how each is used. DALI and this loader use `--threads`; the others use
the best of several worker counts, and the result keeps that sweep. `harness.throughput` times a turn.

    python -m benchmarks.loaders --data imagenet/train --batch-size 256 --input-size 224 --out FILE.json
    python -m benchmarks.loaders --out FILE.json --only lumix,timm      # on generated images; only these
    python -m benchmarks.loaders --threads 1,2,4,8 --out FILE.json      # one row per thread (or worker) count

Requires ``pip install '.[bench]'``. SPDL also needs FFmpeg's libraries (``apt install ffmpeg``), FFCV the headers of
OpenCV and libjpeg-turbo. Mosaic's package is not in the extra because it pins NumPy below 2.2 and transformers below
5: install it with ``pip install --no-deps`` together with what it imports. Only FFCV and Mosaic may be missing.
"""

import argparse
import importlib.metadata
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lumix_dali.data.files import Files
from lumix_dali.data.sources import load_files

from . import data, harness, readings
from .contenders import ENTRIES, INTERPOLATIONS, PREFETCH, RATIO, SCALE, Entry, Setting

MOST_FILES = 10_000  # read from disk beforehand, and written again for the loaders with a format of their own
TURN_SECONDS = 3.0
REFERENCES = (
    "dali/+normalise",
    "lumix/none",
    "timm FastCollateMixup elem",
    "timm recipe",
    "dali+torchvision cutmix",
    "torchvision v2 collate cutmix+mixup",
    "spdl",
    "webdataset worker batches",
    "litdata",
    "mosaic streaming",
    "ffcv",
)


class Turn:
    """A running entry: chooses its workers and the length of a turn, then measures."""

    def __init__(self, entry: Entry, setting: Setting, choices: Sequence[int], images: int | None):
        self.entry, self.setting, self.choices, self.images = entry, setting, choices, images

    def prepare(self) -> dict[str, Any]:
        count, rate, sweep = self.choices[0], 0.0, []
        if len(self.choices) > 1 or not self.images:
            sweep = [(count, self._open(count, timed=max(2, count)).measure()) for count in self.choices]
            count, rate = max(sweep, key=lambda pair: pair[1])
        images = self.images or max(TURN_SECONDS * rate, 2 * self.setting.batch_size)
        # Workers finish their batches together, so a turn must be a multiple of their number.
        step = count if self.entry.swept else 1
        self._open(count, timed=math.ceil(images / self.setting.batch_size / step) * step)
        if not self.entry.swept:
            return dict(threads=count, timed_batches=self.timed)
        return dict(workers=count, timed_batches=self.timed, sweep=sweep)

    def measure(self) -> float:
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


def candidates(entries: Sequence[Entry], setting: Setting, args: argparse.Namespace) -> list[harness.Candidate]:
    """One candidate per entry; with several thread counts, one for each count, used for workers too."""
    swept = len(args.threads) > 1
    found = []
    for threads in args.threads:
        for entry in entries:
            choices = args.workers if entry.swept and not swept else [threads]
            turn = Turn(entry, setting, choices, args.images)
            found.append(
                harness.Candidate(
                    entry.name,
                    turn.measure,
                    turn.prepare,
                    where=dict(count=threads) if swept else {},
                    fields=dict(mixing=entry.mixing, note=entry.note, version=version(entry.packages)),
                    excused=entry.excused,
                )
            )
    return found


def version(packages: Sequence[str]) -> str | None:
    """The version of the first of `packages` that is installed."""
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def some(samples: Files, most: int = MOST_FILES) -> Files:
    """At most `most` samples, drawn from all classes."""
    if len(samples) <= most:
        return samples
    index = np.sort(np.random.default_rng(0).permutation(len(samples))[:most])
    return Files(samples.root, [samples.names[i] for i in index], samples.labels[index], samples.classes)


def warm_page_cache(paths: Sequence[str]) -> float:
    """Reads every file once; returns their mean size in kB."""
    total = sum(len(Path(path).read_bytes()) for path in tqdm(paths, "reading files", unit="file", disable=None))
    return round(total / len(paths) / 1e3, 1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; invalid flags end the program here."""
    cpus = harness.cpus()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.loaders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_arguments(parser)
    add = parser.add_argument
    add("--data", metavar="DIR", help=f"class folder; default: images are generated in {data.DEFAULT}")
    add("--batch-size", type=harness.positive, default=256)
    add("--input-size", type=harness.positive, default=224, help="side of the delivered images, in pixels")
    add(
        "--threads",
        type=harness.positives,
        default=[cpus],
        metavar="LIST",
        help=f"DALI's threads (default: {cpus}); several give one row each",
    )
    add(
        "--workers",
        type=harness.positives,
        default=sorted({max(1, cpus // 2), cpus, 2 * cpus}),
        metavar="LIST",
        help="the others use the best of these (default: half, all and twice the CPUs)",
    )
    add(
        "--interpolation",
        choices=sorted(INTERPOLATIONS),
        default="bicubic",
        help="interpolation of the resizing (default: bicubic)",
    )
    add("--images", type=harness.positive, help="timed images per turn (default: as many as take 3 s)")
    add(
        "--decoder",
        type=harness.options,
        default={},
        metavar="NAME=NUMBER,...",
        help="of DALI's decoder, as benchmarks.tune finds them",
    )
    add("--only", metavar="NAMES", help=harness.ONLY)
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.images, args.workers = 1, args.images or 2 * args.batch_size, args.workers[:1]
    try:
        args.device, args.entries = harness.resolve_device(args.device), harness.named(ENTRIES, args.only)
        harness.refuse_dirty(args.out, harness.metadata(""), args.allow_dirty)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.loaders", *(sys.argv[1:] if argv is None else argv)])
    samples = some(load_files(args.data or data.generate()))
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            samples, args.batch_size, args.input_size, args.device, Path(scratch), args.decoder, args.interpolation
        )
        settings = dict(
            files=len(samples),
            classes=len(samples.classes),
            generated=args.data is None,
            mean_kb=warm_page_cache(setting.paths()),
            page_cache="warm: every file read once before",
            batch_size=args.batch_size,
            input_size=args.input_size,
            dtype="float32",
            device=args.device,
            decoder=args.decoder,
            threads=args.threads,
            workers=args.workers,
            prefetch=PREFETCH,
            torch_threads=torch.get_num_threads(),
            crop=dict(scale=SCALE, ratio=RATIO),
            interpolation=f"{args.interpolation}, antialiased",
        )
        result = harness.compare(
            candidates(args.entries, setting, args),
            kind="loaders" if len(args.threads) == 1 else "loaders-threads",
            unit="images/s",
            command=command,
            out=args.out,
            rounds=args.rounds,
            references=REFERENCES,
            settings=settings,
            allow_dirty=args.allow_dirty,
        )
    print(readings.report(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
