"""What N GPUs get from their loaders: a model of many ranks, based on measured rates of one.

A rank's loader makes a batch in the time of its slowest stage: decoding (its share of the node's cores), reading (its
share of the files per second that the store opens) or the network (its share of the node's link and of the store's).
It works ahead by the prefetch depth. A training step begins when the last rank has its batch and the previous step
has finished. The cost of batches varies, by a coefficient of variation, and the slowest of many ranks sets the pace.
Decoding rates and the mean file size come from a result of `benchmarks.loaders`; everything about the cluster is an
assumption that a flag can change.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json
    python -m benchmarks.scaling --out FILE.json --gpus-per-node 4 --link 25 --cores-per-gpu 32 --gpu-rate 2500
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import harness, report

RANKS = (1, 8, 64, 256, 1000)
LOADER, READER = "lumix/cutmix+mixup elem", "dali/read"
REMEDIES = {
    "decode": "more cores per GPU (--cores-per-gpu), or smaller images",
    "read": "shards instead of files (lumix-dali convert), or a copy on each node",
    "network": "a copy of the images on each node, or a faster link or store (--link, --store)",
    "GPU": "nothing: the loaders keep up",
}


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per location of the images and number of GPUs."""
    takes = result["assumed"]["gpu_rate"]
    head = ["images", "GPUs", "a loader gives, images/s", "a GPU gets, images/s", "of what it takes", "bound by"]
    lines = [[*head, "loaders needed, × the GPU's rate", "cores needed", "network needed, Gbit/s"]]
    for row in result["rows"]:
        rates = [f"{row['loader']:.0f}", f"{row['median']:.0f}", f"{row['median'] / takes:.0%}", row["bound"]]
        needs = [f"{row['headroom']:.2f}", f"{row['cores_needed']:,.0f}", f"{row['gbit_needed']:,.1f}"]
        lines.append([row["name"], str(row["ranks"]), *rates, *needs])
    return lines


def reading(result: dict[str, Any]) -> report.Reading:
    """The number of GPUs up to which the loaders keep up, for each location of the images."""
    said, rate = ["A model of a cluster, not a measurement of one."], result["assumed"]["gpu_rate"]
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name]
        enough = [row["ranks"] for row in rows if row["median"] >= 0.95 * rate]
        last = rows[-1]
        share = f"at {last['ranks']} they get {last['median'] / rate:.0%}, bound by {last['bound']}"
        up_to = f"up to {max(enough)} GPU(s) get 95 % of what they take" if enough else "no number of GPUs gets 95 %"
        said.append(f"With {name}, {up_to}; {share}.")
    return report.Reading(said, REMEDIES[result["rows"][-1]["bound"]])


def chart(result: dict[str, Any]) -> report.Chart:
    """What a GPU gets of its rate."""
    takes = result["assumed"]["gpu_rate"]
    dots = []
    for row in result["rows"]:
        share = row["median"] / takes
        dots.append(report.Dot(f"{row['name']}, {row['ranks']} GPUs", [], share, share, share))
    title = reading(result).said[-1].rstrip(".")
    return report.Chart(title, [report.Panel("images/s of a GPU ÷ what it takes", dots, line=1.0)])


KIND = report.Kind(table, reading, chart)


@dataclass(frozen=True)
class Rates:
    """Images/s that one rank's share of each stage allows."""

    decode: float
    read: float
    network: float

    @property
    def bound(self) -> str:
        """The slowest stage."""
        rates = asdict(self)
        return min(rates, key=rates.__getitem__)

    @property
    def loader(self) -> float:
        """Images/s of all stages together, which overlap."""
        return min(asdict(self).values())


def simulate(
    loader: float,
    gpu: float,
    ranks: int,
    *,
    batch: int = 128,
    spread: float = 0.0,
    ahead: int = 2,
    steps: int = 1000,
    seed: int = 0,
) -> float:
    """Images/s per GPU of training steps that wait for the slowest of all ranks.

    Args:
        loader: images/s of a rank's loader by itself.
        gpu: images/s of a training step that never waits.
        ranks: number of ranks.
        batch: images per batch and rank.
        spread: coefficient of variation of a batch's time in the loader, gamma distributed; 0: constant.
        ahead: batches that a loader prepares before they are requested, at least 1.
        steps: number of simulated training steps; the first quarter is not counted.
        seed: seed of the times.
    """
    rng, mean = np.random.default_rng(seed), batch / loader
    ready, begin = np.zeros(ranks), np.zeros(steps)
    for step in range(steps):
        cost = rng.gamma(spread**-2, mean * spread**2, ranks) if spread else mean
        free = begin[step - ahead] if step >= ahead else 0.0  # a place in the queue
        ready = np.maximum(ready, free) + cost
        begin[step] = max(ready.max(), begin[step - 1] + batch / gpu if step else 0.0)
    first = steps // 4
    rate = batch * (steps - 1 - first) / (begin[-1] - begin[first])
    return float(min(rate, loader))  # within a window, a GPU also takes what was prepared before it


def headroom(ranks: int, share: float = 0.99, **options: Any) -> float:
    """The loader rate, as a multiple of a GPU's images/s, at which the GPUs reach `share` of their rate.

    Args:
        ranks: number of ranks.
        share: in (0, 1).
        options: of `simulate`.
    """
    low, high = share, 16.0  # constant times; more than any real spread needs
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if simulate(middle, 1.0, ranks, **options) >= share else (middle, high)
    return high


def measured(path: Path) -> dict[str, Any]:
    """Rates of one core, and the mean size of a file, from a result of `benchmarks.loaders`.

    Raises:
        ValueError: the file is not such a result, or not one of a CPU pipeline.
    """
    result = json.loads(path.read_text())
    rows = {row["name"]: row for row in result["rows"] if row.get("median")}
    there = result.get("kind") == "loaders" and {LOADER, READER} <= rows.keys()
    if not there or result["settings"]["device"] != "cpu":
        raise ValueError(
            f"--results {path}: give a result of python -m benchmarks.loaders --device cpu that has "
            f"{LOADER!r} and {READER!r}"
        )
    machine = result["meta"]["machine"]
    threads = rows[LOADER]["threads"]
    return dict(
        decode=rows[LOADER]["median"] / threads,
        read=rows[READER]["median"] / threads,
        kilobytes=result["settings"]["mean_kb"],
        threads=threads,
        cpu=machine["cpu"],
        commit=result["meta"]["commit"],
        date=result["meta"]["date"],
    )


def rates(core: dict[str, Any], ranks: int, args: argparse.Namespace, local: bool) -> Rates:
    """The rates of one rank in a job of this size; `local`: every node has a copy of the images."""
    here = min(ranks, args.gpus_per_node)
    images = 1e9 / 8 / (1e3 * core["kilobytes"])  # of one Gbit
    network = math.inf if local else min(args.link / here, args.store / ranks) * images
    files = math.inf if local else args.files / ranks
    return Rates(args.cores_per_gpu * core["decode"], min(args.cores_per_gpu * core["read"], files), network)


def rows(core: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per location of the images and number of GPUs."""
    made, waiting = [], dict(batch=args.batch_size, spread=args.spread, ahead=args.ahead)
    needed = {ranks: headroom(ranks, **waiting) for ranks in RANKS}
    for name, local in (("a copy on each node", True), ("one store", False)):
        for ranks in RANKS:
            stage = rates(core, ranks, args, local)
            rate = simulate(stage.loader, args.gpu_rate, ranks, **waiting)
            bound = stage.bound if stage.loader < args.gpu_rate else "GPU"
            made.append(
                dict(
                    name=name,
                    ranks=ranks,
                    loader=stage.loader,
                    median=rate,
                    bound=bound,
                    headroom=needed[ranks],
                    cores_needed=args.gpu_rate / core["decode"] * ranks,
                    gbit_needed=0.0 if local else args.gpu_rate * ranks * core["kilobytes"] * 8e-6,
                )
            )
    return made


def note(core: dict[str, Any], assumed: dict[str, Any]) -> str:
    """The origin of the numbers."""
    return (
        "measured: {decode:.0f} images/s and {read:.0f} files/s a core of {cpu} ({threads} threads), "
        "{kilobytes} kB a file, commit {commit:.10}; "
        "assumed: a GPU takes {gpu_rate:g} images/s and has {cores_per_gpu} cores, {gpus_per_node} GPUs share a "
        "link of {link:g} Gbit/s, the store has {store:g} Gbit/s and opens {files:,.0f} files/s, batches of "
        "{batch_size} vary by {spread:g}, {ahead} are prepared ahead"
    ).format(**core, **assumed)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/scaling.json", metavar="FILE.json", help="where the result goes (default: %(default)s)")
    add(
        "--results",
        type=Path,
        default=harness.RESULTS / "loaders.json",
        metavar="FILE.json",
        help="measured rates (default: benchmarks/results/loaders.json)",
    )
    add(
        "--gpu-rate",
        type=float,
        default=7000,
        help="images/s of a GPU's training step (default: 7000, about MLPerf's ResNet-50 on one of eight H100)",
    )
    add("--cores-per-gpu", type=harness.positive, default=16, help="for its loader (default: 16)")
    add("--gpus-per-node", type=harness.positive, default=8, help="that share a link (default: 8)")
    add("--link", type=float, default=100, help="of a node, Gbit/s (default: 100)")
    add("--store", type=float, default=400, help="of the shared store, Gbit/s (default: 400)")
    add("--files", type=float, default=1e6, help="files that the store opens per second (default: 1e6)")
    add("--batch-size", type=harness.positive, default=128, help="of a rank (default: 128)")
    add("--spread", type=float, default=0.1, help="coefficient of variation of a batch's time (default: .1)")
    add("--ahead", type=harness.positive, default=2, help="batches prepared ahead, DALI's queue (default: 2)")
    add("--allow-dirty", action="store_true", help="write benchmarks/results with uncommitted code")
    args = parser.parse_args(argv)
    for name in ("gpu_rate", "link", "store", "files"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    if not 0 <= args.spread <= 2:
        parser.error(f"--spread {args.spread}: give a number in [0, 2]")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    args = parse_args(argv)
    harness.say("benchmarks.scaling simulates ranks that wait for each other: about half a minute.")
    with harness.one_line(argparse.ArgumentParser("python -m benchmarks.scaling")):
        meta = harness.metadata(harness.command("scaling", argv))
        harness.refuse_dirty(args.out, meta, args.allow_dirty)
        core = measured(args.results)
    assumed = {key: value for key, value in vars(args).items() if key not in ("out", "results", "allow_dirty")}
    result = dict(
        kind="scaling",
        unit="images/s a GPU",
        complete=True,
        meta=meta,
        note=note(core, assumed),
        measured=core,
        assumed=assumed,
        rows=rows(core, args),
    )
    harness.write(args.out, result)
    report.finish(result)


if __name__ == "__main__":
    main()
