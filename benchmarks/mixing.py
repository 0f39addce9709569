"""The graphs that `benchmarks.mix` compares, and the time of their kernels."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def

import lumix_dali.fn as mixfn
from lumix_dali import augment
from lumix_dali.loading import pipelines
from lumix_dali.loading.plan import Plan
from lumix_dali.mixing import Mixing

from . import harness
from .contenders import normalised_in_dali
from .names import FLOOR, NOTHING, ONE_PIXEL

MIXES: dict[str, dict[str, Any]] = {
    "cutmix elem": dict(cutmix_alpha=1.0),
    "cutmix batch": dict(cutmix_alpha=1.0, mode="batch"),
    "mixup elem": dict(cutmix_alpha=0.0, mixup_alpha=0.8),
    "cutmix+mixup elem": dict(cutmix_alpha=1.0, mixup_alpha=0.8),
    "cutmix+mixup batch": dict(cutmix_alpha=1.0, mixup_alpha=0.8, mode="batch"),
}
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


def mixed(options: dict[str, Any], images, labels):
    """`lumix_dali.fn.mix`."""
    images, target = mixfn.mix(images, labels, **options)
    return images, *target


class Plans:
    """A feed of plans for the same images, repeated."""

    gives_paths = False

    def __init__(self, plan: Plan, count: int):
        self.plan, self.places = plan, np.arange(count)
        self.nothing = np.zeros((count, 1), np.uint8)

    def images(self, info: Any) -> np.ndarray:
        """No images."""
        return self.nothing

    def arrays(self, info: Any, names: Iterable[str]) -> list[np.ndarray]:
        """Only the plan of an iteration."""
        planned = self.plan.batch(info.iteration, self.places, self.places)
        return [planned[name] for name in names]


def planned(options: dict[str, Any], side: int, images, labels):
    """Mixes as the loader's graph does: the host draws the plan, including the callback."""
    pipe = Pipeline.current()
    plan = Plan(0, 0, 0, (side, side), Mixing(**options), training=True)
    nothing, inputs = pipelines.read(Plans(plan, pipe.max_batch_size))  # type: ignore[arg-type]
    return *pipelines.mixed(images, inputs, plan), nothing


def augmented(side: int, images, labels):
    """RandAugment on the upper left corner of the images."""
    return augment.rand_augment(fn.crop(images, crop=(side, side)), size=(side, side)), labels


def stages(side: int = 224) -> dict[str, Callable]:
    """The stages, as graph functions of (images, labels); `side` is the side of the images in pixels."""
    return {
        NOTHING: lambda images, labels: (images, labels),
        "normalise": lambda images, labels: (normalised_in_dali(images), labels),
        **{name: partial(mixed, options) for name, options in MIXES.items()},
        "RandAugment": partial(augmented, side),
        ONE_PIXEL: partial(augmented, 1),
        **{f"loader: {name}": partial(planned, options, side) for name, options in MIXES.items()},
    }


def build(stage: Callable, images: torch.Tensor, threads: int):
    """A pipeline that repeats one stage on `images`, uint8 [B, H, W, 3] on the device."""
    device = images.device
    labels = [np.int64(i) for i in range(len(images))]
    batch: Any = images if device.type == "cuda" else images.numpy()  # for tensors, DALI asks CUDA for their stream

    @pipeline_def(batch_size=len(images), num_threads=threads, device_id=device.index, seed=0)
    def define():
        where = "gpu" if device.type == "cuda" else "cpu"
        resident = fn.external_source(lambda: batch, batch=True, device=where, no_copy=True, layout="HWC")
        return stage(resident, fn.external_source(lambda: labels, batch=True))

    return define()


class Turn:
    """A running stage."""

    def __init__(self, stage: Callable, images: torch.Tensor, threads: int, count: int):
        self.stage, self.images, self.threads, self.count = stage, images, threads, count

    def prepare(self) -> dict[str, Any]:
        """Builds the pipeline and profiles its kernels."""
        device = self.images.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.run = partial(build(self.stage, self.images, self.threads).run, stream)
        return self.profiled()

    def profiled(self) -> dict[str, Any]:
        """The stage's CPU time and, on a GPU, its kernels and copies."""
        for _ in range(5):
            self.run()
        device = self.images.device
        cpu = dict(cpu_ms=harness.cpu_milliseconds(self.run, self.count, str(device)))
        return cpu | (kernels(self.run, self.count) if device.type == "cuda" else {})

    def measure(self) -> float:
        """Milliseconds per batch."""
        return harness.milliseconds(self.run, self.count, str(self.images.device))


class Copy(Turn):
    """Reads every image once and writes it once."""

    def prepare(self) -> dict[str, Any]:
        self.run = partial(torch.empty_like(self.images).copy_, self.images)
        return dict(bytes=2 * self.images.nbytes, **self.profiled())


def kernels(step: Callable[[], Any], count: int) -> dict[str, Any]:
    """Microseconds per call that a GPU works for `step`, launched by any thread, and the longest kernels."""
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "trace.json")
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
            for _ in range(count):
                step()
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(path))
        return summed(json.loads(path.read_text())["traceEvents"], count)


def summed(events: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    """From a Chrome trace's GPU events: microseconds, launches and copies per call, and the longest by name."""
    times: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    launches = 0
    for event in events:
        if event.get("cat") in GPU_EVENTS:
            times[event["name"]] += event["dur"]
            launches += 1
        if event.get("cat") == "gpu_memcpy":  # "Memcpy HtoD (Pinned -> Device)"
            copies[event["name"].removeprefix("Memcpy ").partition(" ")[0]] += 1
    return dict(
        kernel_us=sum(times.values()) / count,
        launches=launches / count,
        copies={direction: number / count for direction, number in copies.items()},
        longest={name[:100]: time / count for name, time in times.most_common(8)},
    )


def candidates(images: torch.Tensor, threads: int, count: int) -> Iterator[harness.Candidate]:
    """Measures the floor and then the stages."""
    turn: Turn = Copy(lambda *nodes: nodes, images, threads, count)
    yield harness.Candidate(FLOOR, turn.measure, turn.prepare)
    for name, stage in stages(images.shape[1]).items():
        turn = Turn(stage, images, threads, count)
        yield harness.Candidate(name, turn.measure, turn.prepare)
