"""One visit to a machine with a GPU: its report, the GPU tests, the benchmarks and a small training, in minutes.

Steps run in order of importance, each in its own process that is stopped at its time limit; unused time goes to the
later steps. Results are written as they arrive, so that an interrupted visit keeps what it has, in at most eight
files:

    OUT/results.jsonl    one line per step: status, seconds, reason, result
    OUT/log.txt          what the steps print; there is no need to pipe the output into another file
    OUT/NAME.json        tune, loaders, mix, cost-deit, cost-resnet50, loss: for benchmarks/results

    python -m benchmarks.gpu --out runs/gpu                       # images are generated
    python -m benchmarks.gpu --out runs/gpu --images imagenet/train --cifar cifar10
    python -m benchmarks.gpu --out runs/again --only tests,training --cifar cifar10 --seeds 3 --epochs 15

A host without a package registry needs its own torch, torchvision and timm, and DALI and pytest on PYTHONPATH; steps
whose packages are missing are reported and skipped. Without a GPU, the steps that can run on the CPU do, in a short
form.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from . import harness, probe

# Per cent of a visit's time, in order of importance.
SHARES = {
    "environment": 9,
    "tests": 34,
    "images": 6,
    "tune": 5,
    "loaders": 12,
    "mix": 5,
    "cost-deit": 6,
    "cost-resnet50": 9,
    "loss": 6,
    "training": 8,
}
WITH_IMAGES = ("tune", "loaders", "cost-deit", "cost-resnet50", "training")
# Two processes: if a GPU's decoder crashes, the operators are still tested.
TESTS = {
    "operators": ("fn", "augment", "contracts", "mixing", "timm_parity", "loss", "segment"),
    "decoding": ("gpu", "classification", "loader", "ranks"),
}
TRAINING = [
    "--model",
    "resnet18",
    "--img-size",
    "64",
    "--crop-pct",
    "1",
    "--scale",
    ".4",
    "1",
    "--mixup-mode",
    "elem",
    "--opt",
    "adamw",
    "--lr",
    "2e-3",
    "--weight-decay",
    ".05",
    "--warmup-epochs",
    "1",
]
FAST = ["--amp", "--amp-dtype", "bfloat16", "--channels-last"]
RECIPES = {"cutmix": ["--no-lumix"], "lumix": []}
# Name, model, batch size, and the parts of `benchmarks.cost` to measure.
COSTS = (
    ("deit", "deit_small_patch16_224", 128, "model,step"),
    ("resnet50", "resnet50", 256, "loader,epoch,handover,step"),
)
GRACE = 5  # seconds between asking a step to end and killing it
DALI = ("nvidia.dali", "the wheel nvidia-dali-cuda130 or its files on PYTHONPATH")
PYTEST = ("pytest", "pure wheels, which can be carried: pytest pluggy iniconfig packaging pygments")


@dataclass
class Step:
    """A program of the visit.

    Attributes:
        name: name of its line; the part before a blank is its name in `SHARES`.
        argv: arguments after ``python -m``.
        result: JSON file that it writes; None: the last line of its output, as JSON or as text.
        needs: (module, what to install) for each required module.
        skip: the reason not to run it.
    """

    name: str
    argv: Sequence[str]
    result: Path | None = None
    needs: Sequence[tuple[str, str]] = ()
    skip: str = ""

    def reason(self) -> str:
        """The reason why it cannot run; empty if it can."""
        missing = [f"no module {module}: {remedy}" for module, remedy in self.needs if not probe.available(module)]
        return self.skip or "; ".join(missing)


def steps(args: argparse.Namespace, scratch: Path) -> Iterator[Step]:
    """The steps; their arguments may depend on the results of earlier steps."""
    gpu, out = args.device != "cpu", args.out
    device = ["--device", args.device]
    quick = [] if gpu else ["--quick"]
    images = args.images or scratch / "images"

    yield Step("environment", ["benchmarks.probe", *device])
    for name in TESTS:
        yield tests(name, skip="" if gpu else "no CUDA device")

    def measured(name: str, program: str, *argv: str, skip: str = "", dali: bool = True) -> Step:
        path = out / f"{name}.json"
        command = [f"benchmarks.{program}", *device, "--out", str(path), *argv]
        return Step(name, command, path, (DALI,) if dali else (), skip)

    small = [] if gpu else ["--batch-size", "8"]
    count, classes = (1000, 100) if gpu else (16, 4)
    generated = ["--root", str(images), "--images", str(count), "--classes", str(classes)]
    yield Step("images", ["benchmarks.data", *generated], skip=f"--images {images}" if args.images else "")
    no_images = "" if images.is_dir() else "there are no images"
    tuning = ["--rounds", "2", "--batches", "8"] if gpu else ["--rounds", "1", "--batches", "1"]
    yield measured("tune", "tune", "--data", str(images), *tuning, *small, skip=no_images)
    tuned = arguments(out / "tune.json")
    data_args = ["--data", str(images), *tuned, *quick, *small]
    only = "dali/,dali+torchvision,lumix,timm FastCollateMixup elem"
    most = ["--images", "10240"] if gpu else []
    yield measured("loaders", "loaders", "--rounds", "3", *most, "--only", only, *data_args, skip=no_images)
    yield measured("mix", "mix", "--rounds", "3", *quick, *small)
    for name, model, batch_size, parts in COSTS:
        options = ["--steps", "20", "--batches", "8", "--batch-size", str(batch_size), *(["--amp"] if gpu else [])]
        yield measured(
            f"cost-{name}",
            "cost",
            "--rounds",
            "3",
            "--model",
            model,
            "--parts",
            parts,
            *options,
            *data_args,
            *([] if gpu else ["--batch-size", "2"]),
            skip=no_images,
        )
    problems = ["--batch-sizes", "256", "--classes", "1000,21841", *([] if gpu else ["--dtypes", "float32"])]
    yield measured("loss", "loss", "--rounds", "3", *problems, *quick, dali=False)
    for seed in range(args.seeds):
        for recipe in RECIPES:
            yield training(args, recipe, seed, images, scratch)


def tests(name: str, skip: str) -> Step:
    """Some of the GPU tests, without the slow ones."""
    # The project's options include -q; with -vv that becomes -v, one line per test.
    options = [
        "-m",
        "gpu and not slow",
        "-vv",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--durations=10",
        "--continue-on-collection-errors",
    ]
    files = [f"tests/test_{file}.py" for file in TESTS[name]]
    return Step(f"tests {name}", ["pytest", *options, *files], needs=(PYTEST, DALI), skip=skip)


def arguments(tuned: Path) -> list[str]:
    """The choices of `benchmarks.tune`, as arguments of the later benchmarks."""
    if not tuned.is_file():
        return []
    chosen = json.loads(tuned.read_text())["chosen"]
    decoder = ",".join(f"{name}={value}" for name, value in chosen.get("decoder", {}).items())
    return ["--threads", str(chosen["num_threads"]), *(["--decoder", decoder] if decoder else [])]


def training(args: argparse.Namespace, recipe: str, seed: int, images: Path, scratch: Path) -> Step:
    """A small training of one recipe; the recipes of a seed share everything else.

    Without CIFAR it trains and validates on `images`, which shows that it runs but says nothing about accuracy.
    """
    name, experiment, gpu = f"training {recipe} {seed}", f"{recipe}-{seed}", args.device != "cpu"
    if args.cifar is None:
        splits = ["--data-dir", str(images.parent), "--train-split", images.name, "--val-split", images.name]
        splits += ["-b", "64" if gpu else "8"]
    else:
        val = next((split for split in ("val", "validation", "test") if (args.cifar / split).is_dir()), "val")
        splits = ["--data-dir", str(args.cifar), "--val-split", val, "-b", "512"]
    where = ["--output", str(scratch), "--experiment", experiment, "--overwrite"]
    numbers = ["--device", args.device, "--seed", str(seed), "--epochs", str(args.epochs if gpu else 1)]
    missing = "" if args.cifar or images.is_dir() else "there are no images"
    return Step(
        name,
        ["pipelines.train", *splits, *where, *numbers, *TRAINING, *RECIPES[recipe], *(FAST if gpu else [])],
        scratch / experiment / "summary.json",
        needs=(DALI,),
        skip=missing,
    )


def share(name: str, only: Iterable[str], seeds: int) -> float:
    """A step's share of the visit; steps of the same kind divide it equally."""
    kind = name.partition(" ")[0]
    number = {"tests": len(TESTS), "training": seeds * len(RECIPES)}.get(kind, 1)
    return SHARES[kind] / number if kind in only else 0


def run(step: Step, seconds: float, log: Path) -> dict[str, Any]:
    """Runs a step for at most `seconds` and returns its status and result."""
    line: dict[str, Any] = dict(step=step.name)
    if reason := step.reason():
        return line | dict(status="skipped", reason=reason)
    began = time.monotonic()
    with log.open("ab") as stream:
        start = stream.tell()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *step.argv],
            cwd=harness.ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    output = log.read_bytes()[start:].decode(errors="replace")
    status = {0: "ok", None: "stopped at its limit"}.get(code, "failed")
    line |= dict(status=status, seconds=round(time.monotonic() - began, 1))
    result = None
    try:
        result = found(step, output)
    except (KeyError, TypeError, ValueError) as error:  # in what a step wrote: the visit continues
        line |= dict(status="failed", reason=f"its result cannot be read: {harness.last_line(error)}")
    if status == "failed":
        line["reason"] = f"{ending(code)}: {(output.strip().splitlines() or [''])[-1]}"
    elif isinstance(result, dict) and result.get("warnings"):
        line["reason"] = "WARNING: " + "; ".join(result["warnings"])
    return line | dict(argv=list(step.argv), result=result)


def ending(code: int | None) -> str:
    """Describes how a process failed."""
    return f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"


def end(process: subprocess.Popen) -> None:
    """Ends a step and its processes, first as Ctrl-C does, so that benchmarks write what they have."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None or number == signal.SIGKILL:  # its workers may still be running
            try:
                os.killpg(process.pid, number)
                process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def found(step: Step, output: str) -> Any:
    """A step's result, from its file or from its output."""
    if step.result is not None:
        if not step.result.is_file():
            return None
        result = json.loads(step.result.read_text())
        if "rows" not in result:
            return result
        errors = {row["name"]: row["error"] for row in result["rows"] if row.get("error")}  # tune's rows have no errors
        return dict(file=step.result.name, complete=result["complete"], errors=errors)  # the rest is in the file
    if step.argv[0] == "pytest":
        outcomes = re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", output, flags=re.MULTILINE)
        names = {
            word.lower(): [name for name, outcome in outcomes if outcome == word]
            for word in ("FAILED", "ERROR", "SKIPPED")
        }
        # Files that cannot be imported have no line.
        names["error"] += re.findall(r"^ERROR (tests/[^:\s]+\.py)(?!:)", output, flags=re.MULTILINE)
        selected = re.search(r"^collecting .*? (\d+) (?:items?$|selected)", output, flags=re.MULTILINE)
        return dict(
            selected=int(selected[1]) if selected else None,  # more tests than results: the run was cut short
            passed=sum(outcome == "PASSED" for _, outcome in outcomes),
            **names,
        )
    for text in reversed(output.splitlines()):
        if text.startswith("{"):
            return json.loads(text)
    return None


def paired(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Top-1 of each recipe over the seeds that both finished, and LUMix minus CutMix seed by seed."""
    top1 = {
        line["step"]: line["result"]["top1"]
        for line in lines
        if line["step"].startswith("training") and line["status"] == "ok"
    }
    seeds = [name.split()[2] for name in top1 if name.startswith("training lumix")]
    seeds = [seed for seed in seeds if f"training cutmix {seed}" in top1]
    scores = {recipe: [top1[f"training {recipe} {seed}"] for seed in seeds] for recipe in RECIPES}
    difference = [lumix - cutmix for lumix, cutmix in zip(scores["lumix"], scores["cutmix"], strict=True)]

    def described(values: list[float]) -> dict[str, Any]:
        return dict(
            values=values,
            mean=statistics.fmean(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
        )

    if not seeds:
        return {}
    scores["difference"] = difference
    return dict(n=len(seeds), **{name: described(values) for name, values in scores.items()})


def visit(args: argparse.Namespace, results: TextIO, scratch: Path) -> list[dict[str, Any]]:
    """Runs the steps within the available time and writes one line of `results` for each."""
    deadline, lines = time.monotonic() + 60 * args.minutes, []
    left = float(sum(SHARES[name] for name in args.only))

    def say(line: dict[str, Any]) -> None:
        lines.append(line)
        results.write(json.dumps(line) + "\n")
        results.flush()
        seconds, reason = line.get("seconds", ""), line.get("reason", "")
        print(f"{line['step']:18} {line['status']:20} {seconds:>6} {reason}", flush=True)

    for step in steps(args, scratch):
        part = share(step.name, args.only, args.seeds)
        if not part:
            continue
        remaining = deadline - time.monotonic()
        say(
            run(step, remaining * part / left, args.out / "log.txt")
            if remaining > GRACE
            else dict(step=step.name, status="skipped", reason="no time left")
        )
        left -= part
    # Without CIFAR, models are validated on their training images: the scores are meaningless.
    if args.cifar and (comparison := paired(lines)):
        say(dict(step="training, paired", status="ok", result=comparison))
    return lines


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; invalid flags end the program here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where results go; a new or empty folder")
    add("--minutes", type=float, default=8.0, help="duration of the visit in minutes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--images", type=Path, metavar="DIR", help="class folder of JPEGs; default: they are generated")
    add(
        "--cifar",
        type=Path,
        metavar="DIR",
        help="folder with train/CLASS/ and val/CLASS/ or test/CLASS/; default: the training uses the images",
    )
    add("--seeds", type=harness.positive, default=1, help="of the training")
    add("--epochs", type=harness.positive, default=4, help="of the training")
    add("--only", type=lambda text: text.split(","), default=list(SHARES), metavar="NAMES", help=", ".join(SHARES))
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: give a number above 0")
    for name in args.only:
        if name not in SHARES:
            parser.error(f"--only {name}: no such step; give some of {', '.join(SHARES)}")
    if set(args.only) & set(WITH_IMAGES):
        args.only = [*{"images": 0, **dict.fromkeys(args.only)}]
    for flag, folder in (("--images", args.images), ("--cifar", args.cifar and args.cifar / "train")):
        if folder and not folder.is_dir():
            parser.error(f"{flag}: no such folder: {folder}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out}: not an empty folder; give another one")
    args.images, args.cifar = (path and path.resolve() for path in (args.images, args.cifar))
    args.out = args.out.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a step failed, 0 even if steps were skipped or stopped at their limit."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended too
    try:
        with tempfile.TemporaryDirectory() as scratch, (args.out / "results.jsonl").open("w") as results:
            lines = visit(args, results, Path(scratch))
    finally:
        for partial in args.out.glob(".*.partial"):  # from a benchmark that was stopped while writing
            partial.unlink()
    return int(any(line["status"] == "failed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
