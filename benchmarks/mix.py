"""The mix stage only, on images that are already on the device, against the copy that any mixing must make.

A turn runs batches of a pipeline that contains only the stage; "nothing" is the cost of an empty pipeline.
"loader" rows mix by plans drawn on the host, as the loader does; the others mix in the graph (`fn.mix`).
On a GPU a row also has the run time of its kernels and copies (`kernel_us` per batch, from the profiler; it excludes
the CPU's draws) and their names; `copies` counts the copies per batch by direction. `cpu_ms` is the CPU time of all
threads per batch: "paste" minus "nothing" is what setting up DALI's paste costs the host. Four ways to blend Mixup
end with normalisation, as a batch does.

    python -m benchmarks.mix --batch-size 256 --out FILE.json
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

import lumix_dali.fn as mixfn
from lumix_dali.loading import pipelines
from lumix_dali.loading.plan import Plan
from lumix_dali.mixing import Mixing

from . import harness, readings
from .contenders import MEAN, STD, normalised_in_dali

FLOOR, NOTHING = "floor: copy", "nothing"
MIXES: dict[str, dict[str, Any]] = {
    "cutmix elem": dict(cutmix_alpha=1.0),
    "cutmix batch": dict(cutmix_alpha=1.0, mode="batch"),
    "mixup elem": dict(cutmix_alpha=0.0, mixup_alpha=0.8),
    "cutmix+mixup elem": dict(cutmix_alpha=1.0, mixup_alpha=0.8),
    "cutmix+mixup batch": dict(cutmix_alpha=1.0, mixup_alpha=0.8, mode="batch"),
}
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


def scaled(images, partners, drawn: Any):
    """What `lumix_dali.fn` does."""
    return normalised_in_dali(mixfn._blend(images, partners, drawn.weight, drawn.kind == mixfn.MIXUP))


def arithmetic(images, partners, drawn: Any):
    """Blends with three float operators and a cast."""
    return normalised_in_dali(fn.cast(images * (1.0 - drawn.weight) + partners * drawn.weight, dtype=types.UINT8))


def transformed(images, partners, drawn: Any):
    """Multiplies the channels of both images by one 3x6 matrix."""
    own, other = np.eye(3, 6, dtype=np.float32), np.eye(3, 6, k=3, dtype=np.float32)
    both = fn.cat(images, partners, axis=2)
    blended = fn.coord_transform(both, M=(1.0 - drawn.weight) * own + drawn.weight * other, dtype=types.UINT8)
    return normalised_in_dali(fn.reshape(blended, layout="HWC"))


def normalised_twice(images, partners, drawn: Any):
    """Folds the weight into the standard deviation; a weight of 0 divides by infinity."""
    mean, std = ([255 * v for v in values] for values in (MEAN, STD))
    parts = (
        fn.crop_mirror_normalize(
            part, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=(1.0 / weight) * np.array(std, np.float32)
        )
        for part, weight in ((images, 1.0 - drawn.weight), (partners, drawn.weight))
    )
    return next(parts) + next(parts)


BLENDS = (scaled, arithmetic, transformed, normalised_twice)


def blended(blend: Callable, images, labels):
    """All samples mixed by Mixup, in one of the ways of `BLENDS`."""
    drawn = mixfn.draw(images.shape(dtype=types.INT32)[:2], Mixing(mixup_alpha=0.8, cutmix_alpha=0.0))
    partners = fn.permute_batch(images, indices=drawn.partner)
    return blend(images, partners, drawn), drawn.weight, fn.permute_batch(labels, indices=drawn.partner)


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

    def arrays(self, info: Any) -> tuple[np.ndarray]:
        """Only the plan of an iteration."""
        return (self.plan.batch(info.iteration, self.places, self.places),)


def planned(options: dict[str, Any], side: int, images, labels):
    """Mixes as the loader's graph does: the host draws the plan, including the callback."""
    pipe = Pipeline.current()
    plan = Plan(0, 0, 0, (side, side), Mixing(**options), training=True)
    nothing, rows = pipelines.read(Plans(plan, pipe.max_batch_size))  # type: ignore[arg-type]
    return *pipelines.mixed(images, rows, plan), nothing


def draws(options: dict[str, Any], images, labels):
    """Only the draw of `lumix_dali.fn.mix`, from a shape: operators on the CPU."""
    drawn = mixfn.draw(images.shape(dtype=types.INT32)[:2], Mixing(**options))
    return tuple(drawn)


def unmixed(images, labels):
    """The metadata of an unmixed batch: small operators and copies, no pixels."""
    return images, *mixfn.unmixed(labels, images.device)


def pasted(side: int, images, labels):
    """Only DALI's paste of one fixed box, from partners as in `lumix_dali.fn`."""
    start, extent = (
        types.Constant(np.array([[canvas] * 2, [side // 4 * box] * 2], np.int32), device="cpu")
        for canvas, box in ((0, 1), (side, 2))
    )
    index = fn.cast(labels, dtype=types.INT32)  # labels count the batch
    partners = fn.stack(index, fn.batch_permutation(no_fixed_points=True))
    return fn.multi_paste(images, in_ids=partners, in_anchors=start, out_anchors=start, shapes=extent), labels


def stages(side: int = 224) -> dict[str, Callable]:
    """The stages, as graph functions of (images, labels); `side` is the side of the images in pixels."""
    return {
        NOTHING: lambda images, labels: (images, labels),
        "normalise": lambda images, labels: (normalised_in_dali(images), labels),
        **{name: partial(mixed, options) for name, options in MIXES.items()},
        **{f"loader: {name}": partial(planned, options, side) for name, options in MIXES.items()},
        "unmixed": unmixed,
        "paste": partial(pasted, side),
        "draw: cutmix": partial(draws, MIXES["cutmix elem"]),
        "draw: cutmix+mixup": partial(draws, MIXES["cutmix+mixup elem"]),
        **{f"blend: {blend.__name__}": partial(blended, blend) for blend in BLENDS},
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_arguments(parser)
    add = parser.add_argument
    add("--batch-size", type=harness.positive, default=256)
    add("--input-size", type=harness.positive, default=224)
    add("--threads", type=harness.positive, default=harness.cpus(), help="DALI's")
    add("--batches", type=harness.positive, default=50, help="that count in a turn")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batches = 1, 2
    device = harness.resolve_device(args.device)
    shape = (args.batch_size, args.input_size, args.input_size, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    result = harness.compare(
        list(candidates(images, args.threads, args.batches)),
        kind="mix",
        unit="ms",
        out=args.out,
        rounds=args.rounds,
        command=shlex.join(["python", "-m", "benchmarks.mix", *(sys.argv[1:] if argv is None else argv)]),
        references=[FLOOR, NOTHING, "normalise"],
        allow_dirty=args.allow_dirty,
        settings=dict(batch_size=args.batch_size, input_size=args.input_size, device=device, threads=args.threads),
    )
    print(readings.report(result))


if __name__ == "__main__":
    main()
