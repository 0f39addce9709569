"""The stages of a batch that `benchmarks.cost` measures: pipelines that end after a stage, steps, and tiny images."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from nvidia.dali import Pipeline, backend, fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from PIL import Image

from lumix_dali import LUMixLoss, Mixing, create_loader
from lumix_dali.data.convert import convert
from lumix_dali.data.files import Files
from lumix_dali.data.sources import load, load_files
from lumix_dali.loading import pipelines
from lumix_dali.loading.plan import Plan, unpack
from lumix_dali.loading.resize import resize_mirror

from . import harness
from .contenders import AHEAD, PREFETCH, Epoch, Setting, guarded_crop, normalised_in_dali
from .names import BEFORE, LARGE, LOADER_STAGES, MODEL_STAGES, NEAREST, TODAY

CUTMIX: dict[str, Any] = dict(cutmix_alpha=1.0)
BOTH: dict[str, Any] = CUTMIX | dict(mixup_alpha=0.8)
OWN = {"tiny none": {}, "tiny cutmix": CUTMIX, "tiny cutmix+mixup": BOTH}
OWN_BATCH, OWN_SIDE = 256, 8
# The mixing, and the loss that belongs to it.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "none": ({}, dict(r_r=0.0, r_s=0.0, eta=0.0)),
    "cutmix": (CUTMIX, dict(r_r=0.0, r_s=0.0, eta=0.0)),
    "lumix": (CUTMIX, dict(r_r=0.4, r_s=0.1, eta=1.0)),
}


class Feed:
    """The input of the loader's pipeline: the drawn samples, repeated, and the plan of each batch."""

    gives_paths = True

    def __init__(self, s: Setting, mixing: Mixing | None):
        self.s = s
        self.plan = Plan(0, 0, 0, (s.size, s.size), mixing, True)

    def drawn(self, info: Any) -> np.ndarray:
        """The samples of an iteration."""
        return np.random.default_rng(info.iteration).integers(0, len(self.s.samples), self.s.batch_size)

    def images(self, info: Any) -> list[np.ndarray]:
        """Their paths."""
        return [np.frombuffer(self.s.samples.path(i).encode(), np.uint8) for i in self.drawn(info)]

    def arrays(self, info: Any, names: Iterable[str]) -> list[np.ndarray]:
        """That they are paths, and the plan."""
        drawn = self.drawn(info)
        planned = self.plan.batch(info.iteration, self.s.samples.labels[drawn], drawn, np.ones(len(drawn), bool))
        return [planned[name] for name in names]


@pipeline_def
def staged_pipeline(feed: Any, size: int, stages: int, decoder: dict[str, Any], nearest: bool):
    """`lumix_dali`'s training pipeline, truncated after some of `LOADER_STAGES`; `nearest` resizes by repetition."""
    images, inputs = pipelines.read(feed)
    if stages > 1:
        images = guarded_crop(images, **decoder)
    if stages > 2 and nearest:
        images = fn.resize_crop_mirror(
            images,
            size=[size, size],
            crop=[size, size],
            interp_type=types.INTERP_NN,
            antialias=False,
            mirror=fn.random.coin_flip(),
        )
    elif stages > 2:
        images = resize_mirror(images, (size, size), "bicubic", 0.5)
    if stages <= 3:
        return images, inputs["target"]
    images, *target = pipelines.mixed(images, inputs, feed.plan)
    return normalised_in_dali(images) if stages > 4 else images, *target


def build(
    s: Setting,
    threads: int,
    stages: int = len(LOADER_STAGES),
    mixing: dict[str, Any] = CUTMIX,
    nearest: bool = False,
    **options: Any,
) -> Pipeline:
    """A pipeline of the first `stages` stages that repeats `s.samples`."""
    feed = Feed(s, Mixing(**mixing) if stages > 3 else None)
    return staged_pipeline(
        feed,
        s.size,
        stages,
        s.decoder,
        nearest,
        batch_size=s.batch_size,
        num_threads=threads,
        prefetch_queue_depth=PREFETCH,
        device_id=torch.device(s.device).index,
        **options,
    )


def stage_epoch(s: Setting, threads: int, stages: int, copied: bool, batches: int) -> Iterator:
    """Batches of a truncated pipeline; `copied` hands them over to torch."""
    pipe = build(s, threads, stages)
    for _ in range(batches):
        outputs = pipe.run(s.stream)
        yield tuple(torch.from_dlpack(output.as_tensor()) for output in outputs) if copied else outputs


class Step:
    """A training step of a timm model with one of `RECIPES`, in parts."""

    def __init__(self, s: Setting, model: str, recipe: str, amp: bool):
        torch.manual_seed(0)
        self.s, self.amp = s, amp
        self.mixing, ratios = RECIPES[recipe]
        self.model = timm.create_model(model, num_classes=s.num_classes).to(s.device)
        self.criterion = LUMixLoss(**ratios)  # type: ignore[arg-type]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def loader(self, threads: int, batches: int) -> Iterable:
        """The loader of this recipe."""
        return create_loader(
            self.s.repeated(batches),
            batch_size=self.s.batch_size,
            input_size=self.s.size,
            device=self.s.device,
            num_threads=threads,
            prefetch_queue_depth=PREFETCH,
            decoder=self.s.decoder,
            **self.mixing,
        )

    def run(self, batch: Any, parts: int = len(MODEL_STAGES)) -> None:
        """The first `parts` parts of a step."""
        images, target = batch
        with torch.autocast(torch.device(self.s.device).type, torch.bfloat16, enabled=self.amp):
            logits = self.model(images)
            if parts > 1:
                loss = self.criterion(logits, target)
        if parts > 2:
            loss.backward()
        if parts > 3:
            self.optimizer.step()
        self.optimizer.zero_grad()


def loader_turn(s: Setting, start: Callable[[int], Iterable], timed: int) -> float:
    """Milliseconds per batch of a loader in its steady state."""
    loader = start(harness.epoch_length(timed, PREFETCH))
    speed = harness.throughput(loader, batch_size=s.batch_size, timed=timed, ahead=PREFETCH, device=s.device)
    return 1000 * s.batch_size / speed


def fed(loader: Iterable, step: Step) -> Iterator:
    """Trains on every batch of a loader."""
    for batch in loader:
        step.run(batch)
        yield batch


def model_turn(step: Step, batch: Any, parts: int, timed: int) -> float:
    """Milliseconds of the first `parts` parts of a step on a cached batch, after one untimed step."""
    step.run(batch, parts)
    return harness.milliseconds(partial(step.run, batch, parts), timed, step.s.device)


def first_batch(step: Step, threads: int, batches: int) -> float:
    """Milliseconds from ``iter()`` to the first batch: what every epoch pays for its own pipeline."""
    epochs: list[Any] = []  # kept, so that the teardown of a pipeline is not timed

    def start() -> None:
        epochs.append(iter(step.loader(threads, batches)))
        next(epochs[-1])

    return harness.milliseconds(start, 1, step.s.device)


def built(s: Setting, threads: int) -> float:
    """Milliseconds to define and build a pipeline of all stages, without its first batch."""
    start = time.perf_counter()
    pipe = build(s, threads)
    pipe.build()
    return 1000 * (time.perf_counter() - start)


def checkpointed(s: Setting, threads: int, batches: int) -> float:
    """Milliseconds per call of DALI's ``checkpoint()``, which the loader calls after every batch."""
    seconds, stream = 0.0, s.stream
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DALI cannot restore this source, but nothing is restored here
        pipe = build(s, threads, enable_checkpointing=True)
        pipe.run(stream)
    for _ in range(batches):
        pipe.run(stream)
        start = time.perf_counter()
        pipe.checkpoint()
        seconds += time.perf_counter() - start
    return 1000 * seconds / batches


def copied(output: Any) -> torch.Tensor:
    """A copy of a DALI tensor in PyTorch's memory."""
    on_gpu = isinstance(output, backend.TensorGPU)
    where = torch.device("cuda", output.device_id()) if on_gpu else torch.device("cpu")
    tensor = torch.empty(output.shape(), dtype=to_torch_type[output.dtype], device=where)
    return feed_ndarray(output, tensor, torch.cuda.current_stream(where) if on_gpu else None)


HANDOVERS: dict[str, Callable[[Any], torch.Tensor]] = {"dlpack": torch.from_dlpack, "copied": copied}


class Handover:
    """Training steps whose batches leave DALI in one of the ways of `HANDOVERS`."""

    def __init__(self, step: Step, threads: int, take: Callable[[Any], torch.Tensor], count: int):
        self.step, self.threads, self.take, self.count = step, threads, take, count

    def epoch(self, batches: int) -> Iterator:
        """Trains on `batches` batches."""
        s = self.step.s
        pipe = build(s, self.threads)
        for _ in range(batches):
            images, *outputs = (self.take(output.as_tensor()) for output in pipe.run(s.stream))
            self.step.run((images, unpack(outputs, True)[0]))
            yield images

    def prepare(self) -> dict[str, Any]:
        """CPU time per step and, on a GPU, the peak memory in use minus what was in use before."""
        s = self.step.s
        free = free_memory(s, release=True)
        steps = self.epoch(harness.epoch_length(2 * self.count, PREFETCH))
        for _ in range(PREFETCH + 1):
            next(steps)
        cpu = harness.cpu_milliseconds(partial(next, steps), self.count, s.device)
        least = min(free_memory(s) for _ in islice(steps, self.count))
        return dict(cpu_ms=cpu, memory_mib=(free - least) / 2**20 if s.cuda else None)

    def measure(self) -> float:
        """Milliseconds per step."""
        return loader_turn(self.step.s, lambda batches: Epoch(partial(self.epoch, batches)), self.count)


class Own:
    """The cost of mixing itself: a loader of images so small that little else costs time."""

    def __init__(self, s: Setting, mixing: dict[str, Any], batches: int):
        self.s, self.mixing, self.batches = s, mixing, batches

    def files(self) -> Files:
        """As many images as an epoch needs, from few files."""
        root = tiny_images(self.s.scratch, OWN_SIDE, 512)
        samples = dataclasses.replace(self.s, samples=load_files(root), batch_size=OWN_BATCH)
        return samples.repeated(self.batches + 4 * PREFETCH + 1)  # the start of the next epoch must not be counted

    def measure(self) -> float:
        """CPU milliseconds per batch, over all threads, in the loader's steady state."""
        loader = create_loader(
            self.files(),
            batch_size=OWN_BATCH,
            input_size=OWN_SIDE,
            interpolation="bilinear",
            device="cpu",
            num_threads=1,
            **self.mixing,
        )
        with loader:
            batches = iter(loader)
            for _ in range(2 * PREFETCH):
                next(batches)
            return harness.cpu_milliseconds(partial(next, batches), self.batches, "cpu")


class Host:
    """What a loader takes from the training thread, of files or of their contents."""

    def __init__(self, s: Setting, contents: bool, batches: int):
        self.s, self.contents, self.batches = s, contents, batches

    def measure(self) -> float:
        """CPU milliseconds of the thread that iterates, per batch of 256, in the loader's steady state."""
        samples = dataclasses.replace(self.s, batch_size=OWN_BATCH).repeated(self.batches + 4 * PREFETCH + 1)
        source: Any = samples
        if self.contents:
            read = {path: Path(path).read_bytes() for path in {samples.path(i) for i in range(len(samples))}}
            source = [(read[samples.path(i)], int(label)) for i, label in enumerate(samples.labels)]
        with create_loader(
            source, batch_size=OWN_BATCH, input_size=self.s.size, device=self.s.device, num_threads=1, **BOTH
        ) as loader:
            batches = iter(loader)
            for _ in range(2 * PREFETCH):
                next(batches)
            start = time.thread_time()
            for _ in range(self.batches):
                next(batches)
            return 1000 * (time.thread_time() - start) / self.batches


def free_memory(s: Setting, release: bool = False) -> int:
    """Bytes free on the GPU; 0 without one. `release`: first return the caches of DALI and PyTorch to it."""
    if not s.cuda:
        return 0
    if release:
        torch.cuda.synchronize(s.device)
        torch.cuda.empty_cache()
        backend.ReleaseUnusedMemory()
    return torch.cuda.mem_get_info(s.device)[0]


def cpu_turn(s: Setting, threads: int, nearest: bool, count: int) -> float:
    """CPU milliseconds per image of the whole pipeline with CutMix and Mixup."""
    pipe = build(s, threads, mixing=BOTH, nearest=nearest)
    for _ in range(PREFETCH + 1):
        pipe.run(s.stream)
    return harness.cpu_milliseconds(partial(pipe.run, s.stream), count, s.device) / s.batch_size


class Elsewhere:
    """A loader of small images in a process of its own, so that another commit's package can take turns with ours."""

    CODE = """
import json, sys, time
from lumix_dali import create_loader
root, side, count = json.loads(sys.argv[1])
loader = create_loader(root, batch_size=256, input_size=side, interpolation="bilinear", device="cpu", num_threads=1,
                       cutmix_alpha=1.0, mixup_alpha=0.8)
def batches():
    while True:
        yield from loader
stream = batches()
for line in sys.stdin:
    for _ in range(4):
        next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    print(1000 * (time.perf_counter() - start) / count, flush=True)
"""

    def __init__(self, s: Setting, commit: str | None, side: int, count: int):
        self.s, self.commit, self.side, self.count = s, commit, side, count

    def prepare(self) -> dict[str, Any]:
        """Starts the process, with the package of `commit`, or with ours."""
        where = harness.ROOT if self.commit is None else checked_out(self.commit, self.s.scratch)
        root = tiny_images(self.s.scratch, self.side, 4096)
        self.child = subprocess.Popen(
            [sys.executable, "-c", self.CODE, json.dumps([str(root), self.side, self.count])],
            env=os.environ | dict(PYTHONPATH=str(where)),
            cwd=self.s.scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return dict(side=self.side)

    def measure(self) -> float:
        """Milliseconds per batch of 256."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write("turn\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with status {self.child.wait()}")
        return float(line)


def checked_out(commit: str, scratch: Path) -> Path:
    """A folder with the package as it was at `commit`."""
    where = scratch / commit
    if not where.exists():
        archive = subprocess.run(
            ["git", "archive", commit, "lumix_dali"], cwd=harness.ROOT, capture_output=True, check=True
        ).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(where, filter="data")
    return where


def tiny_images(scratch: Path, side: int, count: int) -> Path:
    """A class folder of square noise JPEGs."""
    root = scratch / f"tiny-{side}-{count}"
    if not root.exists():
        for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (count, side, side, 3))):
            path = root / str(number % 4) / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


class Large:
    """A loader of photographs of 12 megapixels, or of the shards that ``convert`` makes of them."""

    COUNT, TILES = 16, 8

    def __init__(self, s: Setting, converted: bool, batches: int):
        self.s, self.converted, self.batches = s, converted, batches

    def prepare(self) -> dict[str, Any]:
        """Writes the images; for shards, their difference from the originals in evaluation, in grey levels."""
        self.files = load_files(self._mosaics())
        self.source: Any = self.files
        if not self.converted:
            return {}
        self.source = str(self.s.scratch / "converted")
        convert(self.files, self.source, max_size=512, quality=90)
        difference = self._pixels(self.files) - self._pixels(self.source)
        return dict(grey_levels=float(difference.abs().mean()))

    def measure(self) -> float:
        """CPU milliseconds per image of a training loader without mixing, in its steady state."""
        count = self.batches + 2 * AHEAD
        if not self.converted:
            source: Any = dataclasses.replace(self.s, samples=self.files, batch_size=8).repeated(count)
        else:
            shards = load(self.source)
            source = [(bytes(cast(Any, shards.read([i])[0][0])), 0) for i in range(len(shards))] * -(
                -8 * count // len(shards)
            )
        with create_loader(source, batch_size=8, input_size=self.s.size, device="cpu", num_threads=2) as loader:
            batches = iter(loader)
            for _ in range(AHEAD):
                next(batches)
            return harness.cpu_milliseconds(partial(next, batches), self.batches, "cpu") / 8

    def _mosaics(self) -> Path:
        """Class folders of 4000x3000 pixels, each of 64 photographs of the data: as much detail as theirs."""
        root = self.s.scratch / "large" / "mosaic"
        if root.exists():
            return root.parent
        root.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(self.COUNT):
            mosaic = Image.new("RGB", (4000, 3000))
            for place, sample in enumerate(rng.integers(0, len(self.s.samples), self.TILES**2).tolist()):
                tile = Image.open(self.s.samples.path(sample)).convert("RGB").resize((500, 375))
                mosaic.paste(tile, (place % self.TILES * 500, place // self.TILES * 375))
            mosaic.save(root / f"{number}.jpg", quality=90)
        return root.parent

    def _pixels(self, source: Any) -> torch.Tensor:
        loader = create_loader(
            source,
            batch_size=self.COUNT,
            is_training=False,
            input_size=self.s.size,
            dtype="uint8",
            device="cpu",
            return_index=True,
        )
        with loader:
            (images, _, index) = next(iter(loader))
        names = [Path(loader.samples.name(int(i))).stem.lstrip("0") or "0" for i in index]
        return images[np.argsort(names)].float()


def candidates(s: Setting, args: argparse.Namespace) -> Iterator[harness.Candidate]:
    """What `args.parts` selects."""
    if "loader" in args.parts:
        for number, name in enumerate(LOADER_STAGES, 1):
            start = partial(stage_start, s, args.threads, min(number, 5), name == "copy")
            yield harness.Candidate(name, partial(loader_turn, s, start, args.batches), where=dict(part="loader"))
    if "cpu" in args.parts:
        for name, nearest in ((TODAY, False), (NEAREST, True)):
            turn = partial(cpu_turn, s, args.threads, nearest, args.batches)
            yield harness.Candidate(name, turn, where=dict(part="cpu"))
    if "mixing" in args.parts:
        for name, mixing in OWN.items():
            yield harness.Candidate(name, Own(s, mixing, args.batches).measure, where=dict(part="mixing"))
    if "host" in args.parts:
        for name, contents in (("files", False), ("bytes", True)):
            yield harness.Candidate(name, Host(s, contents, args.batches).measure, where=dict(part="host"))
    if "tiny" in args.parts:
        for side in (8, 32, 64):
            for commit, name in ((None, TODAY), (BEFORE, BEFORE)):
                away = Elsewhere(s, commit, side, 4 * args.batches)
                yield harness.Candidate(name, away.measure, away.prepare, where=dict(part="tiny", side=side))
    if "large" in args.parts:
        for name, converted in ((LARGE, False), ("converted to 512", True)):
            large = Large(s, converted, args.batches)
            yield harness.Candidate(name, large.measure, large.prepare, where=dict(part="large"))
    if set(args.parts) & {"model", "epoch", "handover", "step"}:
        yield from (c for c in model_candidates(s, args) if c.where["part"] in args.parts)


def chained(chosen: list[harness.Candidate]) -> list[harness.Candidate]:
    """The candidates; each stage of the loader and of the model comes after the previous one."""
    for part in ("loader", "model"):
        for before, stage in pairwise(candidate for candidate in chosen if candidate.where["part"] == part):
            stage.after = before.name
    return chosen


def model_candidates(s: Setting, args: argparse.Namespace) -> Iterator[harness.Candidate]:
    """The candidates that need a model."""
    steps = {recipe: Step(s, args.model, recipe, args.amp) for recipe in RECIPES}
    cached = {recipe: next(iter(step.loader(args.threads, 1))) for recipe, step in steps.items()}
    for parts, name in enumerate(MODEL_STAGES, 1):
        turn = partial(model_turn, steps["lumix"], cached["lumix"], parts, args.steps)
        yield harness.Candidate(name, turn, where=dict(part="model"))
    for recipe, step in steps.items():
        turn = partial(first_batch, step, args.threads, args.batches)
        yield harness.Candidate(f"{recipe} first batch", turn, where=dict(part="epoch"))
    yield harness.Candidate("build", partial(built, s, args.threads), where=dict(part="epoch"))
    yield harness.Candidate(
        "checkpoint", partial(checkpointed, s, args.threads, args.batches), where=dict(part="epoch")
    )
    for name, take in HANDOVERS.items():
        handover = Handover(steps["lumix"], args.threads, take, args.batches)
        yield harness.Candidate(name, handover.measure, handover.prepare, where=dict(part="handover"))
    for recipe, step in steps.items():
        turn = partial(model_turn, step, cached[recipe], len(MODEL_STAGES), args.steps)
        yield harness.Candidate(f"{recipe} replayed", turn, where=dict(part="step"))
        turn = partial(loader_turn, s, partial(fed_start, step, args.threads), args.steps)
        yield harness.Candidate(f"{recipe} loaded", turn, where=dict(part="step"))


def stage_start(s: Setting, threads: int, stages: int, copied: bool, batches: int) -> Epoch:
    """An epoch of a truncated pipeline, as `loader_turn` starts it."""
    return Epoch(partial(stage_epoch, s, threads, stages, copied, batches))


def fed_start(step: Step, threads: int, batches: int) -> Epoch:
    """An epoch of training steps, as `loader_turn` starts it."""
    return Epoch(partial(fed, step.loader(threads, batches), step))
