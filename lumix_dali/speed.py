"""``lumix-dali speed``: how fast this loader is on your data, and whether it limits your training.

Loaders and training steps take turns, a few seconds each, so that other load on the machine affects all of them. What
is reported are ratios within a round.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from . import cpus
from .data.protocol import Source
from .loading.loader import Loader, create_loader
from .loss import LUMixLoss
from .target import MixTarget

MIXING: dict[str, Any] = dict(mixup_alpha=0.8, cutmix_alpha=1.0)
UNMIXED, MIXED, TIMM = "lumix_dali, unmixed", "lumix_dali, CutMix + Mixup", "timm, CutMix + Mixup"
YOURS = "your loader"
CACHED, TRAINED = "training, cached batches", "training, from the loader"
_VERDICT = 5  # rounds that a verdict needs
_NOTICEABLE = 0.97
_LONG = 0.1  # share of the time that training may wait for batches
_OVERHEAD = 1.5  # seconds that a turn takes besides, with its share of the start
_AHEAD = 2  # batches that a loader prepares, and each of timm's workers


@dataclass
class Candidate:
    """Something that handles batches without end.

    Args:
        batches: endless.
        ahead: batches that it prepares while it waits for its turn.
        step: what is done with each batch.
    """

    batches: Iterator[Any]
    ahead: int = 0
    step: Callable[[Any, Any], None] = lambda images, target: None
    rates: list[float] = field(default_factory=list)  # images/s, one per round
    waits: list[float] = field(default_factory=list)  # share of the time, one per round, spent on waiting for batches

    def turn(self, seconds: float) -> None:
        """Adds the rate of one turn; batches that were prepared before it are not counted."""
        for _ in islice(self.batches, self.ahead):
            pass
        _synchronise()
        count, waited, start = 0, 0.0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            asked = time.perf_counter()
            images, target = next(self.batches)
            waited += time.perf_counter() - asked
            self.step(images, target)
            count += len(images)
        _synchronise()
        taken = time.perf_counter() - start
        rate = count / taken
        self.rates.append(rate)
        self.waits.append(waited / taken)
        time.sleep(min(1.0, self.ahead * len(images) / rate))  # it prepares batches again, for which it takes CPUs


@dataclass(frozen=True)
class Speed:
    """The result: rates in images/s by candidate, one per round, and how long training waited."""

    rates: dict[str, list[float]]
    waits: list[float]  # of training from the loader
    device: str  # kind of it: "cpu" or "cuda"

    def ratio(self, above: str, below: str) -> tuple[float, float, float]:
        """Quartiles of the ratio of two candidates, round by round."""
        pairs = zip(self.rates[above], self.rates[below], strict=False)
        low, middle, high = _quartiles([one / other for one, other in pairs])
        return low, middle, high

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._sentences()])

    def _table(self) -> Iterator[str]:
        yield f"{'images/s':30}{'median':>9}  quartiles"
        for name, rates in self.rates.items():
            low, middle, high = _quartiles(rates)
            yield f"{name:30}{middle:9,.0f}  {low:,.0f} to {high:,.0f}"

    def _sentences(self) -> Iterator[str]:
        rounds = min(map(len, self.rates.values()))
        if rounds < _VERDICT:
            yield f"{rounds} round(s): too few for a verdict, which takes {_VERDICT}."
            return
        for name, whose in ((TIMM, "timm's images/s with as many workers"), (YOURS, "your loader's images/s")):
            if name in self.rates:
                yield f"This loader, mixing, gives {_times(self.ratio(MIXED, name))} {whose}."
        yield f"Mixing leaves {_times(self.ratio(MIXED, UNMIXED))} the rate of unmixed batches."
        if CACHED not in self.rates:
            yield "A model that trains faster than this waits for its data: measure yours with --model NAME."
            return
        _, middle, high = ratio = self.ratio(TRAINED, CACHED)
        slower = high < 1 and middle < _NOTICEABLE
        # On a CPU the loader takes cores from the model, which is slower then even if it never waits.
        limits = slower and (self.device != "cpu" or statistics.median(self.waits) > _LONG)
        verdict = f"The loader is {'' if limits else 'not '}the bottleneck"
        yield f"{verdict}: training on it runs at {_times(ratio)} the rate of cached batches."
        if slower and self.device == "cpu":
            yield (
                f"Training waits for batches in {statistics.median(self.waits):.0%} of its time. Loader and model "
                "share the CPUs: on a GPU the model leaves them to the loader."
            )
        if limits:
            yield "More CPUs help, and smaller images: `lumix-dali convert --max-size 512` stores them."


def speed(
    source: Source,
    *,
    model: str | None = None,
    batch_size: int = 64,
    input_size: int = 224,
    num_threads: int | None = None,
    device: str = "auto",
    against: Callable[[], Iterable[Any]] | None = None,
    minutes: float = 2.0,
    rounds: int = _VERDICT,
    report: Callable[[str], None] = lambda line: None,
) -> Speed:
    """Measures this loader, timm's if it is installed, and a model's training step on cached and on loaded batches.

    Args:
        source: of samples, from `data.sources.load`.
        model: name of a timm model; None: only loaders are measured.
        batch_size: samples per batch.
        input_size: side of the delivered images in pixels.
        num_threads: of this loader, and workers of timm's; None: this process's CPUs.
        device: as for `create_loader`.
        against: makes a loader of yours that takes turns with this one; its batches are (images, ...).
        minutes: about how long it takes.
        rounds: how often the candidates take turns.
        report: gets a line at the start and after each round.

    Raises:
        ValueError: as `create_loader`, or `model` is unknown.
    """
    threads = cpus.available() if num_threads is None else num_threads
    options: dict[str, Any] = dict(batch_size=batch_size, input_size=input_size, num_threads=threads, device=device)
    with ExitStack() as stack:

        def loader(**mixing: Any) -> Loader:
            return stack.enter_context(create_loader(source, **options, prefetch_queue_depth=_AHEAD, **mixing))

        plain, mixed = loader(), loader(**MIXING)
        candidates = {UNMIXED: _loader(plain), MIXED: _loader(mixed)}
        try:
            candidates[TIMM] = _timm(mixed, threads, input_size)
        except (ImportError, ValueError) as error:
            report(f"timm's loader is left out: {error}")
        if against is not None:
            candidates[YOURS] = Candidate(((batch[0], None) for batch in _endless(against())), _AHEAD * threads)
        if model is not None:
            candidates |= _training(loader(**MIXING), model)
        seconds = max(0.1, 60 * minutes / (rounds * len(candidates)) - _OVERHEAD)
        report(f"{len(source)} images, {rounds} rounds, about {minutes:g} minutes: {' | '.join(candidates)}")
        _take_turns(candidates, rounds, seconds, report)
    rates = {name: candidate.rates for name, candidate in candidates.items() if candidate.rates}
    waits = candidates[TRAINED].waits if TRAINED in candidates else []
    return Speed(rates, waits, mixed.device.type)


def _take_turns(candidates: dict[str, Candidate], rounds: int, seconds: float, report: Callable[[str], None]) -> None:
    """Runs the rounds; an interrupt ends them and keeps what was measured."""
    try:
        for each in candidates.values():  # starts threads and workers, allocates and compiles
            each.turn(0.5)
            each.rates.clear()
            each.waits.clear()
        for number in range(1, rounds + 1):
            for each in candidates.values():
                each.turn(seconds)
            rates = " | ".join(f"{each.rates[-1]:,.0f}" for each in candidates.values())
            report(f"round {number} of {rounds}, images/s: {rates}")
    except KeyboardInterrupt:
        report("interrupted: what was measured so far follows")


def _loader(loader: Loader, step: Callable[[Any, Any], None] = lambda images, target: None) -> Candidate:
    return Candidate(_endless(loader), _AHEAD, step)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def _timm(loader: Loader, workers: int, input_size: int) -> Candidate:
    """timm's loader as its train.py makes it, with its prefetcher and FastCollateMixup."""
    import timm.data

    source = loader.samples
    if not source.gives_paths:
        raise ValueError("it reads image files, and this source has none")
    make_mixup: Any = timm.data.FastCollateMixup
    mixup = make_mixup(**MIXING, num_classes=len(source.classes or ()) or 1000)
    make: Any = timm.data.create_loader
    batches = make(
        _Pictures(source),
        input_size=(3, input_size, input_size),
        batch_size=loader.batch_size,
        is_training=True,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=workers,
        pin_memory=loader.device.type == "cuda",
        collate_fn=mixup,
        device=loader.device,
    )
    return Candidate(_endless(batches), _AHEAD * workers)


class _Pictures(Dataset[Any]):
    """Images and labels of a source, decoded with Pillow as in timm's ImageDataset."""

    transform: Any = None  # timm sets it

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        (content,), (label,) = self._source.read([index])
        with Image.open(io.BytesIO(bytes(content))) as image:  # type: ignore[arg-type]  # a bad one raises here
            return self.transform(image.convert("RGB")), int(label)


def _training(loader: Loader, name: str) -> dict[str, Candidate]:
    """The model's step on batches that are kept, and on those of the loader."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model={name!r}: it is a name of timm's; pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"model={name!r}: timm has no such model; timm.list_models() lists them")
    model = timm.create_model(name, num_classes=len(loader.classes or ()) or 1000).to(loader.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    criterion = LUMixLoss()

    def step(images: torch.Tensor, target: MixTarget) -> None:
        loss = criterion(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    kept = [(images.clone(), MixTarget(*(each.clone() for each in target))) for images, target in islice(loader, 4)]
    return {CACHED: Candidate(_endless(kept), step=step), TRAINED: _loader(loader, step)}


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def _times(ratio: tuple[float, float, float]) -> str:
    low, middle, high = ratio
    return f"{middle:.2f} times ({low:.2f} to {high:.2f})"


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
