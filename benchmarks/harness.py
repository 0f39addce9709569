"""The common part of all benchmarks: candidates take turns, and results are JSON that records its origin.

On a shared machine speed drifts by tens of per cent within minutes. So candidates take turns within one run
(A B C A B C ...), and the first round is not counted. Besides medians, results report the ratio to a reference round
by round, in which the drift cancels.

    candidates = [Candidate("eager", turn=time_eager), Candidate("compiled", turn=time_compiled)]
    compare(candidates, kind="loss", unit="ms", command="...", out=out, references=["eager"])

A row of the result: name, the fields of `where` and `fields`, what `prepare` returned, `values` (one per counted
round), `median`, `quartiles`, `ratios` {reference: {values, median, quartiles}}, `error` (None, or its last line).
The values of a stage are what it adds to the previous stage; `until` has the measured total up to this stage.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lumix_dali.cpus import available
from lumix_dali.data.storage import replacing

from .report import ROUNDS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "numpy",
    "pillow",
    "triton",
    "spdl_core",
    "spdl_io",
    "webdataset",
    "ffcv",
    "liger-kernel",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvjpeg-cu12",
    "nvidia-nvjpeg",
    "pytest",
    "opencv-contrib-python-headless",
    "opencv-python-headless",
    "litdata",
    "mosaicml-streaming",
    "spdl",
    "torchmetrics",
    "scipy",
)
# Variables that change the threads or the arithmetic of a run: recorded in front of its command.
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
GPU_STATE = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "pcie.link.gen.current",
    "pcie.link.width.current",
    "clocks_throttle_reasons.active",
)


@dataclass
class Candidate:
    """One competitor.

    Attributes:
        name: name of its row; stable, because figures and tables refer to it.
        turn: one measurement, in the unit of the run.
        prepare: called once before the untimed round; its return value becomes part of the row.
        where: fields that distinguish candidates of the same name; ratios are computed within equal ones.
        fields: further fields of the row.
        excused: a failure does not fail the run; the row records it, with the error.
        after: name of the candidate, of the same `where`, whose work is included in this one's turn; the row's
            values are only the difference.
    """

    name: str
    turn: Callable[[], float]
    prepare: Callable[[], dict[str, Any]] = dict
    where: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    excused: bool = False
    after: str | None = None


def compare(
    candidates: Sequence[Candidate],
    *,
    kind: str,
    unit: str,
    command: str,
    out: str | os.PathLike,
    rounds: int = 5,
    references: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    allow_dirty: bool = False,
) -> dict[str, Any]:
    """Lets the candidates take turns: an untimed round, then `rounds` counted ones.

    The result is written after every turn. Ctrl-C ends the run, which returns what it has; `complete` says whether it
    finished.

    Args:
        kind: what was measured; names the module of `benchmarks` that declares its table, reading and figure.
        unit: unit of the values.
        command: the command line that repeats the run.
        out: JSON file.
        references: names of candidates to which every row gets ratios.
        settings: settings common to all candidates.
        allow_dirty: measure uncommitted code even for `benchmarks/results`; the result records it.

    Returns:
        The result as written.

    Raises:
        ValueError: the result would go to `benchmarks/results` but the code is uncommitted.
    """
    meta = metadata(command)
    refuse_dirty(out, meta, allow_dirty)
    rows: list[dict[str, Any]] = [dict(name=c.name, **c.where, **c.fields, values=[], error=None) for c in candidates]
    for row, candidate in zip(rows, candidates, strict=True):
        row |= dict(until=dict(values=[])) if candidate.after else {}
    result = dict(kind=kind, unit=unit, complete=False, rounds=rounds, meta=meta, settings=settings or {}, rows=rows)
    said = Progress(len(candidates), rounds)
    try:
        for number in range(rounds + 1):
            for candidate, row in zip(candidates, rows, strict=True):
                if row["error"] is None:
                    _turn(candidate, row, counted=number > 0)
                said.turn(number, candidate.name)
                _summarise(rows, candidates, references)
                result["complete"] = number == rounds and row is rows[-1]
                write(out, result)
    except KeyboardInterrupt:
        say(f"stopped in round {number} of {rounds}; what was measured is in {os.fspath(out)}")
        _summarise(rows, candidates, references)
        write(out, result)
    return result


class Progress:
    """Says where a run is: after its first turn, then every 10 seconds, as lines that a log can keep."""

    EVERY = 10.0

    def __init__(self, turns: int, rounds: int, untimed: int = 1):
        self.total, self.rounds, self.done = turns * (rounds + untimed), rounds, 0
        self.start, self.last = time.perf_counter(), -math.inf
        first = "one untimed round, in which they start, then " * untimed
        say(f"{turns} candidates take turns: {first}{rounds} counted round(s)")

    def turn(self, number: int, name: str) -> None:
        """After a turn of candidate `name` in round `number`."""
        self.done += 1
        now = time.perf_counter()
        if now - self.last >= self.EVERY or self.done == self.total:
            left = (now - self.start) * (self.total / self.done - 1)
            say(f"round {number} of {self.rounds}, {name}: {self.done} of {self.total} turns, about {left:.0f} s to go")
            self.last = now


def say(text: str) -> None:
    """Prints at once, into a log too."""
    print(text, flush=True)


def _turn(candidate: Candidate, row: dict[str, Any], counted: bool) -> None:
    try:
        if not counted:
            row.update(candidate.prepare())
        value = candidate.turn()
        if counted:
            row.get("until", row)["values"].append(value)
    except Exception as error:
        # A failing candidate must neither vanish nor end the run of the others.
        row["error"] = last_line(error)
        row["excused"] = candidate.excused
        say(f"{candidate.name}: {row['error']}" if candidate.excused else traceback.format_exc())


def _summarise(rows: list[dict], candidates: Sequence[Candidate], references: Sequence[str]) -> None:
    for row, candidate in zip(rows, candidates, strict=True):
        if candidate.after:
            (before,) = (
                other
                for other, rival in zip(rows, candidates, strict=True)
                if (rival.name, rival.where) == (candidate.after, candidate.where)
            )
            found, less = row["until"]["values"], before.get("until", before)["values"]
            row["until"].update(summary(found))
            row["values"] = [value - other for value, other in zip(found, less, strict=False)]
        row.update(summary(row["values"]))
        row["ratios"] = {
            other["name"]: ratio(row["values"], other["values"])
            for other, rival in zip(rows, candidates, strict=True)
            if other["name"] in references and rival.where == candidate.where
        }


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Ratios round by round and their summary."""
    ratios = [value / other for value, other in zip(values, reference, strict=False)]
    return dict(values=ratios, **summary(ratios))


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and [lower, upper] quartiles; None without values."""
    if not values:
        return dict(median=None, quartiles=None)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return dict(median=quartiles[1], quartiles=[quartiles[0], quartiles[2]])


def throughput(
    loader: Iterable,
    *,
    batch_size: int,
    timed: int,
    ahead: int,
    device: str = "cpu",
    check: Callable[[Any], None] | None = None,
) -> float:
    """Images/s of one epoch of `loader` in its steady state.

    A loader that was idle between its turns starts with a full queue, and would be credited with earlier work; at
    the end of an epoch it no longer prepares batches, and would be credited with work that it skips. So the batches
    it may hold ahead are consumed untimed first, and the same number must remain afterwards. Then the epoch is
    drained, so that none of its work runs in another loader's turn.

    Args:
        loader: every ``iter()`` is an epoch of at least `epoch_length` batches.
        batch_size: images per batch.
        timed: number of timed batches.
        ahead: max batches that are ready or in progress before they are requested.
        device: "cuda" and "cuda:N" are synchronised before both readings of the clock.
        check: called with the first batch; raises if it does not have the requested form.

    Raises:
        ValueError: an epoch is shorter than `epoch_length`.
    """
    batches = iter(loader)
    if check is not None:
        check(next(batches))
    found = sum(1 for _ in islice(batches, ahead + (check is None)))
    synchronise(device)
    start = time.perf_counter()
    found += sum(1 for _ in islice(batches, timed)) + (check is not None)
    synchronise(device)
    seconds = time.perf_counter() - start
    found += sum(1 for _ in batches)
    if found < (needed := epoch_length(timed, ahead)):
        raise ValueError(f"loader: its epoch has {found} batches; timed={timed}, ahead={ahead} need {needed}")
    return timed * batch_size / seconds


def epoch_length(timed: int, ahead: int) -> int:
    """Number of batches that `throughput` needs in an epoch to time `timed` of them."""
    return ahead + 1 + timed + ahead


def synchronise(device: str) -> None:
    """Synchronises a GPU; does nothing on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], Any], count: int, device: str) -> float:
    """Milliseconds per call of `step`, averaged over `count` calls; between CUDA events on a GPU."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(count):
            step()
        return 1000 * (time.perf_counter() - start) / count
    import torch

    stream = torch.cuda.current_stream(device)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record(stream)
    for _ in range(count):
        step()
    last.record(stream)
    last.synchronize()
    return first.elapsed_time(last) / count


def cpu_milliseconds(step: Callable[[], Any], count: int, device: str) -> float:
    """Milliseconds of CPU time per call of `step`, summed over all threads of this process."""
    synchronise(device)
    start = time.process_time()
    for _ in range(count):
        step()
    synchronise(device)
    return 1000 * (time.process_time() - start) / count


def last_line(error: BaseException) -> str:
    """Type and last line of an error, as a traceback ends."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"


def write(path: str | os.PathLike, result: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")


def refuse_dirty(out: str | os.PathLike, meta: dict[str, Any], allow_dirty: bool = False) -> None:
    """Raises ValueError if a result for `benchmarks/results` would not come from the stated commit."""
    if allow_dirty or not Path(out).resolve().is_relative_to(RESULTS):
        return
    if not meta["clean"]:
        raise ValueError(
            f"--out {os.fspath(out)}: the work tree differs from commit {meta['commit']}; commit first, "
            "write elsewhere, or give --allow-dirty, which marks the result"
        )


def metadata(command: str) -> dict[str, Any]:
    """The origin of a result: command, commit, date, machine, versions."""
    settings = [f"{name}={shlex.quote(os.environ[name])}" for name in ENVIRONMENT if name in os.environ]
    return dict(
        command=" ".join([*settings, command]),
        commit=_run("git", "rev-parse", "HEAD"),
        clean=_clean(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        versions=dict(python=platform.python_version(), **dict(_versions())),
    )


def _clean() -> bool:
    # Results and what is generated from them may be new: a series of runs leaves them behind.
    changes = _run("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/figures")
    package = importlib.util.find_spec("lumix_dali")
    ours = package is not None and package.origin is not None and Path(package.origin).is_relative_to(ROOT)
    return changes == "" and ours


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    return dict(
        cpu=_cpu_model(),
        cpus=os.cpu_count(),
        affinity=available(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        load_average=[round(load, 2) for load in os.getloadavg()],
        gpu=torch.cuda.get_device_name() if gpu else None,
        **(gpu_state() if gpu else {}),
        system=platform.platform(terse=True),
    )


def gpu_state() -> dict[str, Any]:
    """Driver, clocks, power, temperature and PCIe link of the first GPU now, as nvidia-smi names and prints them."""
    text = _run("nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader")
    values = text.splitlines()[0].split(", ") if text else []
    return dict(zip(GPU_STATE, values, strict=False))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


ONLY = "names of candidates, or prefixes of them, separated by commas"  # help of --only


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A command line with the arguments that every benchmark has."""
    made = argparse.ArgumentParser(f"python -m benchmarks.{program}", description=description, formatter_class=_Help)
    add = made.add_argument
    add("--out", type=Path, metavar="FILE.json", help=f"where the result goes (default: runs/{program}.json)")
    add("--quick", action="store_true", help="one small round, to check that everything runs")
    add("--rounds", type=positive, default=5, help="counted rounds; verdicts need 5")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--only", metavar="NAMES", help=ONLY)
    add(
        "--allow-dirty", action="store_true", help="measure uncommitted code for benchmarks/results; the result says so"
    )
    made.set_defaults(out=Path("runs", f"{program}.json"))
    return made


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows each default that the help does not state itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS, [], {}) or "(default" in told
        return told if silent else f"{told} (default: {_shown(action.default)})"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with one line where arguments, files or packages are wrong, and silently after Ctrl-C."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


def command(program: str, argv: Sequence[str] | None) -> str:
    """The command line that repeats a run."""
    return shlex.join(["python", "-m", f"benchmarks.{program}", *(sys.argv[1:] if argv is None else argv)])


def begin(program: str, args: argparse.Namespace, seconds: float, what: str) -> None:
    """The first line of a program: what it measures, for how long, and where the result will be.

    Args:
        program: module of `benchmarks`.
        args: of `parser`.
        seconds: a guess of its duration on two cores.
        what: a sentence's object.
    """
    minutes = "less than a minute" if seconds < 60 else f"about {seconds / 60:.0f} min"
    say(f"benchmarks.{program} measures {what}: {minutes} on two idle cores. Ctrl-C keeps what is in {args.out}.")
    if args.rounds < ROUNDS:
        say(f"{args.rounds} round(s) give no verdict, which takes {ROUNDS}.")


class Named(Protocol):
    """Anything that can be selected by name."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def named(candidates: Iterable[N], only: str | None) -> list[N]:
    """The candidates that `only` names, or whose names start with what names none; None: all.

    Raises:
        ValueError: a part of `only` selects nothing.
    """
    candidates = list(candidates)
    if only is None:
        return candidates
    names, chosen = [candidate.name for candidate in candidates], set[str]()
    for part in (part.strip() for part in only.split(",")):
        found = [part] if part in names else [name for name in names if name.startswith(part)]
        if not found:
            raise ValueError(f"--only {part}: no such candidate; give the beginning of one of {', '.join(names)}")
        chosen.update(found)
    return [candidate for candidate in candidates if candidate.name in chosen]


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number >= 1")
    return int(text)


def positives(text: str) -> list[int]:
    """An argparse type: whole numbers above 0, separated by commas."""
    return [positive(part) for part in text.split(",")]


def options(text: str) -> dict[str, Any]:
    """An argparse type: NAME=NUMBER, separated by commas."""
    try:
        return {name: json.loads(value) for name, value in (part.split("=") for part in text.split(",") if part)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=NUMBER, separated by commas") from error


def resolve_device(device: str) -> str:
    """The device that `--device` means: "cpu" or "cuda:N"."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return "cpu"
    if kind != "cuda" or not (number or "0").isdecimal() or int(number or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"--device {device}: torch sees {gpus} GPU(s) here; give cpu or auto")
    return f"cuda:{number or torch.cuda.current_device()}"
