"""How long training steps wait for data, and how fast they would be without the loader."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from lumix_dali import MixTarget

from .ranks import Stop
from .state import Run

ROUNDS = 7
AHEAD = 4  # batches that the loader may have prepared during a replay
ADVICE = (
    "the model waits for its data: give more --workers if there are CPUs left, try "
    "`python -m benchmarks.tune`, store smaller images, or augment less; --cached-batches 50 measures how "
    "fast the model could go"
)


class DataWait:
    """Adds up the time between the end of a step and the arrival of the next batch, on the device's own clock.

    On a GPU the host runs ahead. Waiting for a batch while the device still computes costs nothing and is not
    counted; waiting after the device has run out of work is.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._gaps: list[tuple[Any, Any]] = []

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yields the same batches and times each of them."""
        iterator = iter(source)
        while True:
            asked = self._now()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._gaps.append((asked, self._now()))
            yield batch

    def seconds(self) -> float:
        """The wait for all batches so far; synchronises the device."""
        if self._device.type == "cpu":
            return sum(there - asked for asked, there in self._gaps)
        torch.cuda.synchronize(self._device)
        return sum(asked.elapsed_time(there) for asked, there in self._gaps) / 1000

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))


def headspace(run: Run, step: Callable[..., torch.Tensor], args: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Compares training speed on batches from the loader and on replayed ones; the trained weights are discarded.

    Rounds of `--cached-batches` steps alternate, so that other load on the machine affects both.

    Returns:
        loaded, replayed: images/s of each round, over all ranks; ratio: quartiles of replayed ÷ loaded.

    Raises:
        SystemExit: a signal arrived.
    """
    count, source = args.cached_batches, endless(run)

    def speed(batches: Iterable[Any]) -> float:
        synchronise(run.train.device)
        start = time.perf_counter()
        for images, target in batches:
            run.step %= len(run.train)  # more steps than an epoch has
            step(run, images, target)
        synchronise(run.train.device)
        return count * args.batch_size * args.world_size / (time.perf_counter() - start)

    run.model.train()
    kept = [
        (images.clone(), MixTarget(*(field.clone() for field in target))) for images, target in islice(source, count)
    ]
    speed(kept)  # compiles, tunes and allocates
    loaded, replayed = [], []
    for _ in tqdm(range(ROUNDS), "rounds", leave=False, disable=args.rank > 0):
        speed(islice(source, AHEAD))
        loaded.append(speed(islice(source, count)))
        replayed.append(speed(kept))
        if stop.signal:
            raise SystemExit(128 + stop.signal)
    ratios = [fast / slow for fast, slow in zip(replayed, loaded, strict=True)]
    found = {"loaded": loaded, "replayed": replayed, "ratio": statistics.quantiles(ratios, n=4)}
    if args.rank == 0:
        print(reading(found, count), flush=True)
    return found


def endless(run: Run) -> Iterator[Any]:
    """Yields the loader's batches, epoch after epoch."""
    while True:
        yield from run.train


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reading(found: dict[str, Any], count: int) -> str:
    """The measurements as a table, their interpretation, and advice."""
    low, middle, high = found["ratio"]
    lines = [f"{ROUNDS} rounds of {count} batches, alternating, in images/s: median (quartiles)"]
    for name, what in (("loaded", "from the loader"), ("replayed", "kept and replayed")):
        first, second, third = statistics.quantiles(found[name], n=4)
        lines.append(f"  {what:18}{second:10,.0f} ({first:,.0f} to {third:,.0f})")
    lines.append(f"  {'replayed ÷ loaded':18}{middle:10.3f} ({low:.3f} to {high:.3f})")
    if low <= 1 <= high:
        lines.append("The loader costs nothing measurable: the quartiles include 1. A faster loader would not help.")
    elif middle < 1:
        lines.append("Replayed batches are not faster: something else slows the run; measure on a quiet machine.")
    else:
        lines.append(
            f"Without its loader the model would train {middle:.2f} times as fast: the loader costs "
            f"{1 - 1 / middle:.0%} of the time." + (f"\n{ADVICE}" if middle > 1.1 else "")
        )
    return "\n".join(lines)
