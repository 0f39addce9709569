"""Trains a small model for each row of a table of the LUMix paper (arXiv 2211.15846), over several seeds.

All rows of a seed start from the same weights and see the same crops in the same order, and the same boxes if they
use the same mixing. Besides mean, standard deviation and standard error, the result has the difference from the
CutMix row seed by seed, with its 95 % t interval and its p after Holm's correction within the table. The last epoch
counts, not the best one.

    python -m experiments.ablations --table 2 --out runs/table2.json --figure runs/table2.svg
    python -m experiments.ablations --table 6 --model vit_tiny_patch16_224 --model-kwargs img_size=16 \\
        patch_size=4 embed_dim=64 depth=3 num_heads=4 --epochs 160 --out runs/table6-vit.json  # TransMix: a ViT
    python -m experiments.ablations --table components --data CIFAR-10-images --stream files --img-size 32 \\
        --images-per-class 250 --model resnet10t --hflip .5 --epochs 20 --seeds 10 --val-every 0 --lam --jobs 2 \\
        --out runs/cifar10.json

Every finished (row, seed) is written to the JSON immediately: the same command resumes a stopped run. The default
data are the scanned digits of `make demo`, with 20 training images per class (drawn separately for each seed): with
all images, every row would be almost always right.
"""

import argparse
import json
import multiprocessing
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs
from tqdm import tqdm

from benchmarks import harness
from lumix_dali.data.sources import load
from lumix_dali.data.storage import replacing

from . import mixing
from .tables import CUTMIX, TABLES, Row
from .training import STREAMS, Training, build_model, splits, train


def write_digits(root: str) -> None:
    """Runs the demo to write its digits, because programs do not import each other."""
    subprocess.run(
        [sys.executable, "-m", "pipelines.demo", "--data-only", "--data", root], cwd=harness.ROOT, check=True
    )


def measure_speed(
    args: argparse.Namespace, rows: Sequence[Row], rounds: int = 9, steps: int = 10
) -> dict[str, dict[str, Any]]:
    """Images/s of batch and training step, with rows taking turns: {row: images_per_second, ratio to CutMix}."""
    trainings = {row.name: Training(args, row, seed=0, epochs=1) for row in rows}
    values: dict[str, list[float]] = {name: [] for name in trainings}
    for number in tqdm(range(rounds + 1), "speed", unit="round", leave=False, disable=None):
        for name, training in trainings.items():
            for _ in range(3):  # batches that the pipeline prepared while idle
                training.step()
            harness.synchronise(args.device)
            start = time.perf_counter()
            for _ in range(steps):
                training.step()
            harness.synchronise(args.device)
            if number:  # the first round warms up
                values[name].append(steps * args.batch_size / (time.perf_counter() - start))
    ratios = {
        name: [one / other for one, other in zip(speeds, values[CUTMIX], strict=True)]
        for name, speeds in values.items()
    }
    return {
        name: dict(images_per_second=harness.summary(values[name]), ratio=harness.summary(ratios[name]))
        for name in values
    }


def wanted(args: argparse.Namespace) -> list[Row]:
    """The rows of the table, or those selected by ``--only``."""
    return harness.named(TABLES[args.table], args.only)


def begin(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The result to fill: a new one, or the existing one at `--out`.

    Raises:
        ValueError: `--out` belongs to another run, or is in `benchmarks/results` and the code is uncommitted.
    """
    meta = harness.metadata(command)
    harness.refuse_dirty(args.out, meta, args.allow_dirty)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "figure", "allow_dirty")}
    rows = [dict(row._asdict(), runs=[], error=None) for row in wanted(args)]
    fresh = dict(
        kind="accuracy",
        unit="top-1 %",
        complete=False,
        meta=meta,
        epochs=args.epochs,
        rows=rows,
        settings=settings | dict(digests=[load(split).digest for split in splits(args.data)]),
    )
    fresh = json.loads(json.dumps(fresh))  # tuples become lists, as in a file
    if not Path(args.out).exists():
        return fresh
    old = json.loads(Path(args.out).read_text())
    there, here = identity(old), identity(fresh)
    if different := [key for key in there | here if there.get(key) != here.get(key)]:
        listed = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
        raise ValueError(
            f"--out {args.out}: it belongs to another run: {listed}. Repeat that run's command, or give another file"
        )
    return old


def identity(result: dict[str, Any]) -> dict[str, Any]:
    """The settings that must be equal to resume a run; `--jobs`, which changes no value, is none of them."""
    meta, settings = result.get("meta", {}), result.get("settings", {})
    same = {name: value for name, value in settings.items() if name != "jobs"}
    return dict(kind=result.get("kind"), commit=meta.get("commit"), clean=meta.get("clean"), **same)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Trains the remaining models and writes the result after each."""
    result = begin(args, command)
    if result["complete"]:
        return result
    rows = []
    for row, entry in zip(wanted(args), result["rows"], strict=True):
        try:  # a row that this model cannot have stays in the table with the reason
            if row.method == "transmix":
                mixing.class_attention(build_model(args, 2))
            if row.method == "saliencymix":
                mixing.require_opencv()
            rows.append((row, entry))
        except ValueError as error:
            entry["error"] = str(error)
    if args.speed and "speed" not in rows[0][1]:
        for name, speed in measure_speed(args, [row for row, _ in rows]).items():
            next(entry for row, entry in rows if row.name == name)["speed"] = speed
    with closing(Workers(args.jobs)) as workers:
        if result["epochs"] is None:
            seconds = max(workers.each(seconds_per_epoch, [(args, seed) for seed in range(args.jobs)]))
            result["epochs"] = max(1, int(60 * args.minutes / seconds))
        write(args.out, result)
        fill(args, result, rows, workers)
    result["complete"] = True
    write(args.out, result)
    return result


def fill(
    args: argparse.Namespace, result: dict[str, Any], rows: Sequence[tuple[Row, dict]], workers: "Workers"
) -> None:
    """Trains every row and seed that the result lacks, seed by seed, so that a partial result has all rows."""
    entries = {row.name: entry for row, entry in rows}
    tasks = [
        (args, row, args.first_seed + number, result["epochs"])
        for number in range(args.seeds)
        for row, _ in rows
        if row.max_seeds is None or number < row.max_seeds
    ]
    left = [task for task in tasks if task[2] not in [run["seed"] for run in entries[task[1].name]["runs"]]]
    harness.say(f"{len(left)} of {len(tasks)} models to train, {result['epochs']} epochs each, {args.jobs} at a time")
    start = time.perf_counter()
    for number, (name, run) in enumerate(workers.unordered(left), 1):
        entry = entries[name]
        entry["runs"] = sorted([*entry["runs"], run], key=lambda run: run["seed"])
        write(args.out, result)
        hours = (time.perf_counter() - start) / number * (len(left) - number) / 3600
        harness.say(
            f"{len(tasks) - len(left) + number}/{len(tasks)} {name}, seed {run['seed']}: {run['top1'][-1]:.2f} %, "
            f"{run['cpu_seconds']:.0f} CPU s; about {hours:.1f} h left"
        )


def write(path: str, result: dict[str, Any]) -> None:
    """Like `harness.write`, with each list of numbers on one line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: " ".join(found[0].split()), text)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


class Workers:
    """Parallel trainings, each in its own process; a single one runs in this process."""

    def __init__(self, jobs: int):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(jobs, spawn, _begin_worker) if jobs > 1 else None

    def each(self, task: Callable, items: Sequence[tuple]) -> list:
        """The results of `task(*item)` for all items, run in parallel."""
        apply = self.pool.map if self.pool else map
        return list(apply(task, *zip(*items, strict=True)))

    def unordered(self, tasks: Sequence[tuple]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(row's name, what `train` returned) of each task as it ends."""
        if self.pool:
            for future in as_completed([self.pool.submit(_named_train, task) for task in tasks]):
                yield future.result()
        else:
            yield from map(_named_train, tasks)

    def close(self) -> None:
        """Ends the processes immediately."""
        if self.pool:
            for process in multiprocessing.active_children():
                process.terminate()
            self.pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers


def _named_train(task: tuple) -> tuple[str, dict[str, Any]]:
    return task[1].name, train(*task)


def seconds_per_epoch(args: argparse.Namespace, seed: int) -> float:
    """Seconds of an epoch of CutMix with validation, after a warm-up."""
    row = next(row for row in TABLES[args.table] if row.name == CUTMIX)
    training = Training(args, row, seed, epochs=1)
    for _ in range(2):
        harness.synchronise(args.device)
        start = time.perf_counter()
        for _ in range(training.steps):
            training.step()
        training.validate()
    return time.perf_counter() - start


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--table", required=True, choices=TABLES, help="table of the paper; components: LUMix without each of its parts"
    )
    add("--only", metavar="NAMES", help="rows' " + harness.ONLY)
    add(
        "--data",
        default="data/digits",
        metavar="DIR",
        help="class folders under train and val (validation, test); the default is created if it is missing",
    )
    add("--images-per-class", type=int, default=20, metavar="N", help="number of training images; 0: all")
    add("--seeds", type=harness.positive, default=5, metavar="N", help="how many")
    add("--first-seed", type=int, default=0, metavar="N", help="seeds; for a trial, use one that the run will not use")
    add("--out", required=True, metavar="FILE.json", help="where the result goes")
    add("--figure", metavar="FILE.svg", help="accuracy against epoch")
    add("--model", help="any timm model (default: a resnet10t of a quarter of its width)")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="NAME=VALUE of timm.create_model")
    add(
        "--stream",
        choices=STREAMS,
        default="memory",
        help="memory: images are decoded once; files: by create_loader, in each epoch, if it has the method",
    )
    _add_training(parser)
    args = parser.parse_args(argv)
    args.device = harness.resolve_device(args.device)
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: give a number above 0")
    if args.epochs is None and args.minutes is None:
        args.epochs = 40
    if args.model is None:
        args.model, args.model_kwargs = "resnet10t", dict(channels=(16, 32, 64, 128)) | args.model_kwargs
    if args.data == parser.get_default("data") and not Path(args.data).exists():
        write_digits(args.data)
    return args


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--small-stem", action="store_true", help="use a small ResNet stem: 3x3, stride 1, no pooling")
    add("--img-size", type=harness.positive, default=16)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=harness.positive, help="epochs of each model (default: 40)")
    length.add_argument("--minutes", type=float, help="for a model; as many epochs as CutMix does in them")
    add("--batch-size", type=harness.positive, default=50)
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW at the peak of a cosine schedule")
    add("--weight-decay", type=float, default=0.05)
    add("--warmup", type=int, default=2, help="epochs")
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--scale", type=float, nargs=2, default=[0.6, 1.0], help="range of a crop's share of the area")
    add("--hflip", type=float, default=0.0, help="probability of a flip; 0 for digits, which must not be mirrored")
    add("--val-every", type=int, default=1, metavar="N", help="epochs between validations; 0: only after the last")
    add("--lam", action="store_true", help="keep the quantiles of λ0, λ_s and λ over each epoch")
    add("--speed", action=argparse.BooleanOptionalAction, default=True, help="measure images/s of every row first")
    add(
        "--patch",
        type=harness.positive,
        default=8,
        help="Table 12: side of a patch in pixels; the paper's is 16, of 224",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="bfloat16")
    add("--jobs", type=harness.positive, default=1, help="number of models trained in parallel")
    add("--threads", type=harness.positive, default=1, help="threads of each model, of PyTorch and of DALI")
    add(
        "--allow-dirty", action="store_true", help="measure uncommitted code for benchmarks/results; the result says so"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "experiments.ablations", *(sys.argv[1:] if argv is None else argv)])
    try:
        run(args, command)
    except KeyboardInterrupt:
        sys.exit(f"stopped; finished models are in {args.out}, and the same command resumes")
    from benchmarks import plot

    result, digest = plot.load(Path(args.out))
    if args.figure:
        plot.make_figure(result, digest, Path(args.figure))
    print(plot.table(result))


if __name__ == "__main__":
    main()
