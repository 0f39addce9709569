"""What a batch costs, stage by stage, and whether the loader or the model is the bottleneck.

Stages overlap, so a stage's cost is measured by ablation: the time of a batch with it minus the time without it. The
loader's stages are DALI pipelines that end after each stage; the model's stages are the parts of a step on one cached
batch. The whole step is fed once by the loader and once by a replayed batch: the difference is what the loader costs a
training run. "epoch" is the cost of a new epoch and of a checkpoint. "handover" compares steps on batches in DALI's
own memory (DLPack; DALI synchronises the device to free them) with steps on batches copied into PyTorch's memory; its
rows also give the process's CPU time (`cpu_ms`) and the GPU memory in use (`memory_mib`). "mixing" is the cost of
mixing itself: the CPU time per batch of a loader of 256 images of 8x8 pixels, on the CPU in one thread.

    python -m benchmarks.cost --model resnet50 --data imagenet/train --batch-size 256 --out FILE.json
    python -m benchmarks.cost --model resnet50 --data imagenet/train --trace trace.json --out FILE.json

The trace opens in Perfetto (ui.perfetto.dev); on a GPU every stage is an NVTX range as well.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from nvidia.dali import Pipeline, backend, pipeline_def
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from PIL import Image

from lumix_dali import LUMixLoss, Mixing, create_loader
from lumix_dali.data.files import Files
from lumix_dali.data.sources import load_files
from lumix_dali.loading import pipelines
from lumix_dali.loading.plan import Plan, unpack

from . import data, harness, readings
from .contenders import PREFETCH, Epoch, Setting, cropped, guarded_crop, normalised_in_dali

LOADER_STAGES = ("read", "decode", "resize", "mix", "normalise", "copy")
PARTS = ("loader", "model", "epoch", "step", "handover", "mixing")
MODEL_STAGES = ("forward", "loss", "backward", "optimiser")
CUTMIX: dict[str, Any] = dict(cutmix_alpha=1.0)
OWN = {"tiny none": {}, "tiny cutmix": CUTMIX, "tiny cutmix+mixup": CUTMIX | dict(mixup_alpha=0.8)}
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

    def arrays(self, info: Any) -> tuple[Any, ...]:
        """That they are paths, and the plan."""
        drawn = self.drawn(info)
        is_path = [np.bool_(True)] * len(drawn)
        return is_path, self.plan.batch(info.iteration, self.s.samples.labels[drawn], drawn)


@pipeline_def
def staged_pipeline(feed: Any, size: int, stages: int, decoder: dict[str, Any]):
    """`lumix_dali`'s training pipeline, truncated after some of `LOADER_STAGES`."""
    encoded, planned = pipelines.read(feed)
    images = cropped(encoded, size, stages, decoder, guarded_crop)
    if stages <= 3:
        return images, planned
    images, *target = pipelines.mixed(images, planned, feed.plan)
    return normalised_in_dali(images) if stages > 4 else images, *target


def build(s: Setting, threads: int, stages: int, **options: Any) -> Pipeline:
    """A pipeline of the first `stages` stages that repeats `s.samples`."""
    feed = Feed(s, Mixing(**CUTMIX) if stages > 3 else None)
    return staged_pipeline(
        feed,
        s.size,
        stages,
        s.decoder,
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


@contextmanager
def stage(name: str, cuda: bool) -> Iterator[None]:
    """A named stretch of time: in the trace, and as an NVTX range on a GPU."""
    with torch.profiler.record_function(name):
        if not cuda:
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


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
        cuda = self.s.cuda
        with torch.autocast(torch.device(self.s.device).type, torch.bfloat16, enabled=self.amp):
            with stage("forward", cuda):
                logits = self.model(images)
            if parts > 1:
                with stage("loss", cuda):
                    loss = self.criterion(logits, target)
        if parts > 2:
            with stage("backward", cuda):
                loss.backward()
        if parts > 3:
            with stage("optimiser", cuda):
                self.optimizer.step()
        self.optimizer.zero_grad()


def loader_turn(s: Setting, start: Callable[[int], Iterable], timed: int) -> float:
    """Milliseconds per batch of a loader in its steady state."""
    loader = start(harness.epoch_length(timed, PREFETCH))
    speed = harness.throughput(loader, batch_size=s.batch_size, timed=timed, ahead=PREFETCH, device=s.device)
    return 1000 * s.batch_size / speed


def fed(loader: Iterable, step: Step) -> Iterator:
    """Trains on every batch of a loader."""
    batches = iter(loader)
    while True:
        with stage("load", step.s.cuda):
            batch = next(batches, None)
        if batch is None:
            return
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
    pipe = build(s, threads, len(LOADER_STAGES))
    pipe.build()
    return 1000 * (time.perf_counter() - start)


def checkpointed(s: Setting, threads: int, batches: int) -> float:
    """Milliseconds per call of DALI's ``checkpoint()``, which the loader calls after every batch."""
    seconds, stream = 0.0, s.stream
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DALI cannot restore this source, but nothing is restored here
        pipe = build(s, threads, len(LOADER_STAGES), enable_checkpointing=True)
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
        pipe = build(s, self.threads, len(LOADER_STAGES))
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
        root = self.s.scratch / "tiny"
        if not root.exists():
            for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (512, OWN_SIDE, OWN_SIDE, 3))):
                path = root / str(number % 4) / f"{number:03}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
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


def free_memory(s: Setting, release: bool = False) -> int:
    """Bytes free on the GPU; 0 without one. `release`: first return the caches of DALI and PyTorch to it."""
    if not s.cuda:
        return 0
    if release:
        torch.cuda.synchronize(s.device)
        torch.cuda.empty_cache()
        backend.ReleaseUnusedMemory()
    return torch.cuda.mem_get_info(s.device)[0]


def candidates(s: Setting, args: argparse.Namespace) -> Iterator[harness.Candidate]:
    """Measures the stages of the loader and of the model and whole steps, as `args.parts` selects."""
    if "loader" in args.parts:
        for number, name in enumerate(LOADER_STAGES, 1):
            start = partial(stage_start, s, args.threads, min(number, 5), name == "copy")
            yield harness.Candidate(name, partial(loader_turn, s, start, args.batches), where=dict(part="loader"))
    if "mixing" in args.parts:
        for name, mixing in OWN.items():
            yield harness.Candidate(name, Own(s, mixing, args.batches).measure, where=dict(part="mixing"))
    if set(args.parts) - {"loader", "mixing"}:
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


def write_trace(s: Setting, args: argparse.Namespace) -> None:
    """Profiles LUMix steps fed by the loader and writes a Chrome trace."""
    step = Step(s, args.model, "lumix", args.amp)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if s.cuda else []
    with torch.profiler.profile(activities=activities) as profile:
        for _ in fed(step.loader(args.threads, args.steps + 1), step):
            pass
    profile.export_chrome_trace(args.trace)
    print(f"wrote {args.trace}: open it in ui.perfetto.dev")


def executor_statistics(s: Setting, threads: int) -> dict[str, Any]:
    """DALI's own statistics, the memory of each operator's outputs; only the older executor keeps them.

    That executor rejects graphs in which a CPU operator reads from the GPU; the result then says so instead.
    """
    if readers := operators(build(s, threads, len(LOADER_STAGES)))["read_from_gpu"]:
        return dict(skipped=f"this executor allows no CPU operator to read from the GPU: {', '.join(readers)}")
    pipe = build(s, threads, len(LOADER_STAGES), exec_dynamic=False, enable_memory_stats=True)
    try:
        for _ in repeat(None, PREFETCH + 1):
            pipe.run()
    except RuntimeError as error:  # the measurements that follow do not depend on it
        return dict(skipped=harness.last_line(error))
    return {
        name: {key: value for key, value in stats.items() if value and any(value)}
        for name, stats in pipe.executor_statistics().items()
    }


def operators(pipe: Pipeline) -> dict[str, Any]:
    """A pipeline's operators by device, its copies to the GPU, and its CPU operators that read from the GPU."""
    pipe._build_graph()
    made_on = {node.name: operator._op.device for operator in pipe._ops for node in operator.outputs}
    taken = [(operator, node) for operator in pipe._ops for node in operator.inputs]
    nodes = {(node.name, node.device) for node in (*(node for _, node in taken), *pipe._graph_outputs)}
    counts = Counter(operator._op.device for operator in pipe._ops)
    return dict(
        **{device: counts[device] for device in ("cpu", "mixed", "gpu")},
        copies_to_gpu=sum(device == "gpu" and made_on[name] == "cpu" for name, device in nodes),
        read_from_gpu=[
            type(operator._op).__name__
            for operator, node in taken
            if operator._op.device == "cpu" and node.device == "gpu"
        ],
    )


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_arguments(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="class folder; default: generated images")
    parser.add_argument("--model", default="resnet50", help="any model name that timm.create_model accepts")
    parser.add_argument("--batch-size", type=harness.positive, default=256)
    parser.add_argument("--input-size", type=harness.positive, default=224)
    parser.add_argument("--threads", type=harness.positive, default=harness.cpus(), help="DALI's")
    parser.add_argument(
        "--decoder",
        type=harness.options,
        default={},
        metavar="NAME=NUMBER,...",
        help="of DALI's decoder, as benchmarks.tune finds them",
    )
    parser.add_argument("--batches", type=harness.positive, default=4, help="timed batches in a turn of the loader")
    parser.add_argument("--steps", type=harness.positive, default=4, help="timed batches in a turn of the model")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=list(PARTS),
        metavar="LIST",
        help=f"of {','.join(PARTS)} (default: all); a CPU's model wants smaller batches",
    )
    parser.add_argument("--only", metavar="NAMES", help=f"of these parts' {harness.ONLY}")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--trace", metavar="FILE.json", help="also write a trace for Perfetto")
    return parser


def settings_of(s: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """What the result says about its run."""
    stages = enumerate(LOADER_STAGES[:-1], 1)
    return dict(
        model=args.model,
        batch_size=s.batch_size,
        input_size=s.size,
        device=s.device,
        threads=args.threads,
        decoder=args.decoder,
        amp=args.amp,
        images=len(s.samples),
        operators={name: operators(build(s, args.threads, number)) for number, name in stages},
        executor_statistics=executor_statistics(s, args.threads),
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = command_line()
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts {','.join(args.parts)}: {min(unknown)} is none of {', '.join(PARTS)}")
    if args.quick:
        args.rounds, args.batches, args.steps = 1, 1, 1
    command = "python -m benchmarks.cost " + shlex.join(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.data or data.generate()
        device = harness.resolve_device(args.device)
        s = Setting(load_files(root), args.batch_size, args.input_size, device, Path(scratch), args.decoder)
        try:
            chosen = chained(harness.named(candidates(s, args), args.only))
        except ValueError as error:
            parser.error(str(error))
        result = harness.compare(
            chosen,
            kind="cost",
            unit="ms",
            command=command,
            out=args.out,
            rounds=args.rounds,
            references=("none replayed", "cutmix replayed", "lumix replayed", "cutmix loaded", "copied", "tiny none"),
            settings=settings_of(s, args),
            allow_dirty=args.allow_dirty,
        )
        print(readings.report(result))
        if args.trace:
            write_trace(s, args)


if __name__ == "__main__":
    main()
