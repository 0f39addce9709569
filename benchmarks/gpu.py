"""One visit to a machine with a GPU: its report, some GPU tests, the benchmarks and a small training, in minutes.

Steps run in order of importance, each in its own process that may die or be stopped at its time limit; unused time
goes to the later steps, and no step needs the result of another. Results are written as they arrive, in at most eight
files:

    OUT/results.jsonl    one line per step: status, seconds, reason, result
    OUT/log.txt          what the steps print; there is no need to pipe the output into another file
    OUT/NAME.json        loaders, mix, loss, cost-deit, cost-resnet50, tune: for benchmarks/results

    python -m benchmarks.gpu --out runs/gpu                       # images are generated
    python -m benchmarks.gpu --out runs/gpu --images imagenet/train --old-dali dali22
    python -m benchmarks.gpu --out runs/again --only tests,training --cifar cifar10

A host without a package registry needs its own torch, torchvision and timm, and DALI and pytest on PYTHONPATH; steps
whose packages are missing are reported and skipped. Without a GPU, the steps that can run on the CPU do, in a short
form.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from . import device as probe
from . import harness

# Per cent of a visit's time, in order of importance.
SHARES = {
    "environment": 5,
    "images": 4,
    "decode-whole": 5,
    "decode-regions": 5,
    "decode-old": 5,
    "tests": 24,
    "loaders": 15,
    "mix": 5,
    "loss": 6,
    "cost-deit": 7,
    "cost-resnet50": 9,
    "tune": 5,
    "training": 5,
}
# By name, so that they fit: about 30 with their parameters.
TESTS = {
    "fn": (
        "test_given_draws",
        "test_every_pair_of_levels_blends_within_one_level",
        "test_unmixed",
        "test_masks_are_pasted_with_the_boxes_of_their_images",
        "test_partial_batches",
    ),
    "gpu": (
        "test_a_batch_matches_the_cpus",
        "test_decoded_pixels_match_pillows",
        "test_a_training_step_never_synchronises_and_its_loss_matches_the_oracle",
        "test_nothing_is_copied_on_the_training_stream",
        "test_another_stream_gets_the_same_batches",
        "test_batches_share_dalis_memory",
        "test_a_cuda_graph_of_the_loss_follows_its_inputs",
        "test_a_step_is_captured_while_a_loader_works",
        "test_jpegs_repeat_bit_for_bit_and_resume",
        "test_the_compiled_loss_matches_the_oracle",
    ),
    "loader": ("test_every_state_leads_to_the_same_stream", "test_two_loaders_at_once", "test_close"),
    "classification": ("test_evaluation_on_the_gpu_is_close_to_the_cpus",),
}
LOADERS = (
    "dali/read,dali/+normalise,dali+torchvision,lumix/none,lumix/cutmix elem,lumix/cutmix+mixup elem,"
    "timm FastCollateMixup elem"
)
TRAINING = "--img-size 64 --crop-pct 1 --mixup-mode elem --opt adamw --lr 2e-3 --warmup-epochs 1 --epochs 4 -b 64"
GRACE = 5  # seconds between asking a step to end and killing it
DALI = ("nvidia.dali", "the wheel nvidia-dali-cuda130 or its files on PYTHONPATH")
PYTEST = ("pytest", "pure wheels, which can be carried: pytest pluggy iniconfig packaging pygments")


@dataclass
class Step:
    """A program of the visit.

    Attributes:
        name: of its line; the part before a blank is its name in `SHARES`.
        argv: arguments after ``python -m``.
        result: JSON file that it writes; None: the last JSON line of its output.
        needs: (module, what to install) for each required module.
        skip: the reason not to run it.
        variables: of its environment.
    """

    name: str
    argv: Sequence[str]
    result: Path | None = None
    needs: Sequence[tuple[str, str]] = ()
    skip: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    def reason(self) -> str:
        """The reason why it cannot run; empty if it can."""
        missing = [f"no module {module}: {remedy}" for module, remedy in self.needs if not probe.available(module)]
        return self.skip or "; ".join(missing)


def steps(args: argparse.Namespace, scratch: Path) -> Iterator[Step]:
    """The steps, in order."""
    gpu, device = args.device != "cpu", ["--device", args.device]
    images = args.images or scratch / "images"
    count, classes = (1000, 100) if gpu else (16, 4)

    yield Step("environment", ["benchmarks.device", "environment", *device])
    generated = ["--root", str(images), "--images", str(count), "--classes", str(classes)]
    yield Step("images", ["benchmarks.data", *generated], skip=f"--images {images}" if args.images else "")
    # Without this folder the programs generate their own images.
    data = ["--data", str(images)] if images.is_dir() else []
    decode = ["benchmarks.device", "decode", *device, *data, *([] if gpu else ["--batch-size", "8", "--batches", "2"])]
    yield Step("decode-whole", decode, needs=(DALI,))
    yield Step("decode-regions", [*decode, "--regions"], needs=(DALI,))
    old = dict(PYTHONPATH=os.pathsep.join([str(args.old_dali), os.environ.get("PYTHONPATH", "")]))
    yield Step("decode-old", [*decode, "--regions"], variables=old, skip="" if args.old_dali else "no --old-dali")
    yield tests(skip="" if gpu else "no CUDA device")
    for name, program, options in benchmarks(gpu):
        path = args.out / f"{name}.json"
        needs_data = [] if program in ("mix", "loss") else data
        quick = [] if gpu else ["--quick"]
        argv = [f"benchmarks.{program}", *device, "--out", str(path), *options, *needs_data, *quick]
        yield Step(name, argv, path, () if program == "loss" else (DALI,))
    for recipe in ("cutmix", "lumix"):
        yield training(args, recipe, images, scratch)


def benchmarks(gpu: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Name, program and options of each benchmark; three rounds, and one for the knobs."""
    three, amp = ["--rounds", "3"], ["--amp"] * gpu
    yield "loaders", "loaders", [*three, "--only", LOADERS, *(["--images", "10240"] if gpu else [])]
    yield "mix", "mix", three
    yield "loss", "loss", [*three, "--batch-sizes", "256", "--classes", "1000,21841", "--dtypes", "float32"]
    few = ["--steps", "20", "--batches", "8", *amp]
    deit = ["--model", "deit_small_patch16_224", "--parts", "step", "--batch-size", "128"]
    yield "cost-deit", "cost", [*three, *deit, *few]
    yield "cost-resnet50", "cost", [*three, "--parts", "loader,step,epoch,handover", *few]
    yield "tune", "tune", ["--rounds", "1", "--batches", "8"]


def tests(skip: str) -> Step:
    """The GPU tests of `TESTS`."""
    names = [f"tests/test_{file}.py::{test}" for file, tests in TESTS.items() for test in tests]
    # The project's options include -q; with -vv that becomes -v, one line per test.
    options = ["-m", "gpu", "-vv", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return Step("tests", ["pytest", *options, *names], needs=(PYTEST, DALI), skip=skip)


def training(args: argparse.Namespace, recipe: str, images: Path, scratch: Path) -> Step:
    """A small training; without CIFAR it shows that it runs, but says nothing about accuracy."""
    root = args.cifar or images.parent
    train = "train" if args.cifar else images.name
    val = next((split for split in ("val", "validation", "test") if (root / split).is_dir()), train)
    argv = ["pipelines.train", "--data-dir", str(root), "--train-split", train, "--val-split", val]
    argv += ["--device", args.device, "--model", "resnet18", *TRAINING.split(), *["--no-lumix"] * (recipe == "cutmix")]
    if args.device == "cpu":
        argv += ["-b", "8", "--epochs", "1"]
    else:
        argv += ["--amp", "--amp-dtype", "bfloat16", "--channels-last"]
    argv += ["--output", str(scratch), "--experiment", recipe, "--overwrite"]
    skip = "" if (root / train).is_dir() else "there are no images"
    return Step(f"training {recipe}", argv, scratch / recipe / "summary.json", needs=(DALI,), skip=skip)


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
            env=os.environ | step.variables,
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
        result = result_of(step, output)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # a step wrote half a file
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


def result_of(step: Step, output: str) -> Any:
    """A step's result, from its file or from its output."""
    if step.result is not None:
        if not step.result.is_file():
            return None
        result = json.loads(step.result.read_text())
        if "rows" not in result:
            return result
        errors = {row["name"]: row["error"] for row in result["rows"] if row.get("error")}
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


def visit(args: argparse.Namespace, results: TextIO, scratch: Path) -> list[dict[str, Any]]:
    """Runs the steps within the available time and writes one line of `results` for each."""
    deadline, lines = time.monotonic() + 60 * args.minutes, []
    left = float(sum(SHARES[name] for name in args.only))
    for step in steps(args, scratch):
        kind = step.name.partition(" ")[0]
        if kind not in args.only:
            continue
        part = SHARES[kind] / (2 if kind == "training" else 1)
        remaining = deadline - time.monotonic()
        if remaining > GRACE:
            line = run(step, remaining * part / left, args.out / "log.txt")
        else:
            line = dict(step=step.name, status="skipped", reason="no time left")
        left -= part
        lines.append(line)
        results.write(json.dumps(line) + "\n")
        results.flush()
        harness.say(
            f"{line['step']:18} {line['status']:20} {line.get('seconds', ''):>6} {line.get('reason', '')}".rstrip()
        )
    return lines


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; invalid flags end the program here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where results go; a new or empty folder")
    add("--minutes", type=float, default=8.0, help="duration of the visit in minutes (default: 8)")
    add("--only", type=lambda text: text.split(","), default=list(SHARES), metavar="NAMES", help=", ".join(SHARES))
    add("--images", type=Path, metavar="DIR", help="class folder of JPEGs (default: they are generated)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--cifar", type=Path, metavar="DIR", help="class folders for the training (default: the images)")
    add("--old-dali", type=Path, metavar="DIR", help="unpacked DALI 2.2 with nvImageCodec 0.8, to decode with as well")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: give a number above 0")
    for name in args.only:
        if name not in SHARES:
            parser.error(f"--only {name}: no such step; give some of {', '.join(SHARES)}")
    cifar = args.cifar and args.cifar / "train"
    for flag, folder in (("--images", args.images), ("--cifar", cifar), ("--old-dali", args.old_dali)):
        if folder and not folder.is_dir():
            parser.error(f"{flag}: no such folder: {folder}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out}: not an empty folder; give another one")
    args.images, args.cifar, args.old_dali = (
        path and path.resolve() for path in (args.images, args.cifar, args.old_dali)
    )
    args.out = args.out.resolve()
    harness.say(
        f"benchmarks.gpu runs {len(args.only)} steps in at most {args.minutes:g} min; results are in {args.out}"
    )
    with harness.one_line(parser):
        args.device = harness.resolve_device(args.device)
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
        for partial in args.out.glob(".part-*"):  # from a benchmark that was stopped while writing
            partial.unlink()
    return int(any(line["status"] == "failed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
