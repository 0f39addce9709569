"""Trains a small model in each row of a table of the LUMix paper (arXiv 2211.15846), over several seeds.

All rows of a seed start from the same weights and see the same crops in the same order, and the same boxes where
they mix alike. So what is reported besides mean, standard deviation and standard error is the difference to the
CutMix row seed by seed, with its 95 % t interval. The last epoch counts, not the best.

    python -m benchmarks.accuracy --table 2 --out runs/table2.json --figure runs/table2.svg
    python -m benchmarks.accuracy --table 6 --model vit_tiny_patch16_224 --model-kwargs img_size=16 patch_size=4 \\
        embed_dim=64 depth=3 num_heads=4 --epochs 160 --out runs/table6-vit.json        # TransMix needs a ViT
    python -m benchmarks.accuracy --table 2 --data CIFAR-10-images --img-size 32 --images-per-class 0 \\
        --model resnet18 --small-stem --batch-size 512 --hflip .5 --amp --minutes 9 --jobs 5 --threads 3 \\
        --out runs/cifar.json

Every finished (row, seed) is in the JSON at once: a run that was stopped goes on where it was when it is called
again with the same arguments. The default data are the scanned digits of `make demo`, 20 training images a class
(another draw for each seed), since with all of them every row gets them all right.
"""

import argparse
import json
import multiprocessing
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from scipy.stats import t as student
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ParseKwargs
from torch import Tensor, nn
from tqdm import tqdm

import lumix_dali.fn as mixfn
from lumix_dali import LUMixLoss, MixTarget, check_target, create_loader
from lumix_dali.data.order import Order
from lumix_dali.data.sources import load

from . import harness, mixing

CUTMIX = "CutMix"  # the row that all others are compared with
PLAIN = dict(r_r=0.0, r_s=0.0, eta=0.0)
LUMIX = dict(r_r=0.4, r_s=0.1, eta=1.0)


class Row(NamedTuple):
    """A row of a table: top-1 of the paper's DeiT-S in %, arguments of `LUMixLoss`, a key of `METHODS`."""

    name: str
    paper: float | None
    loss: dict[str, Any] = PLAIN
    method: str = "cutmix"


def _ratios(r_r: float, r_s: float, eta: float = 0.0) -> dict[str, Any]:
    return dict(r_r=r_r, r_s=r_s, eta=eta)


TABLES = {
    2: [Row(CUTMIX, 79.8), Row("λ_s", 80.3, _ratios(0, 0.5)), Row("λ_r", 80.3, _ratios(0.5, 0)),
        Row("λ_r + λ_s", 80.4, _ratios(0.4, 0.1)), Row("λ_r + λ_s + R", 80.5, LUMIX)],
    3: [Row(CUTMIX, 79.8), Row("r_r 1, r_s 0", 79.7, _ratios(1, 0)), Row("r_r .5, r_s 0", 80.3, _ratios(0.5, 0)),
        Row("r_r .4, r_s .1", 80.4, _ratios(0.4, 0.1)), Row("r_r .3, r_s .2", 80.3, _ratios(0.3, 0.2)),
        Row("r_r 0, r_s .5", 80.3, _ratios(0, 0.5))],
    6: [Row("no mixing", 78.6, PLAIN, "none"), Row(CUTMIX, 79.8), Row("Mixup", None, PLAIN, "mixup"),
        Row("ResizeMix", None, PLAIN, "resizemix"), Row("SaliencyMix", 79.2, PLAIN, "saliencymix"),
        Row("TransMix", 80.7, PLAIN, "transmix"), Row("LUMix", 80.6, LUMIX)],
    10: [Row(CUTMIX, 79.8), Row("N(0, 1)", 80.4, LUMIX | dict(noise=("normal", 0.0, 1.0))),
         Row("N(0, 5)", 80.4, LUMIX | dict(noise=("normal", 0.0, 5**0.5))),
         Row("Beta(.8, .8)", 80.3, LUMIX | dict(noise=("beta", 0.8))),
         Row("Beta(2, 2)", 80.6, LUMIX | dict(noise=("beta", 2.0))),
         Row("Beta(3, 3)", 80.4, LUMIX | dict(noise=("beta", 3.0)))],
    11: [Row(CUTMIX, 79.8), Row("LUMix", 80.6, LUMIX), Row("CutMix, BCE", 79.9, PLAIN | dict(base="bce")),
         Row("LUMix, BCE", 79.6, LUMIX | dict(base="bce"))],
    12: [Row(CUTMIX, 79.8), Row("LUMix", 80.6, LUMIX), Row("LUMix, shuffled patches", 80.4, LUMIX, "shuffled"),
         Row("random λ a patch", 79.1, PLAIN, "patch mixup")],
}


def _shuffled(images, labels, **where):
    images, target = mixfn.cutmix(images, labels)
    return mixing.shuffle_patches(images, **where), target


# What the graph does to images and labels. SaliencyMix goes on in `Training.batch`, TransMix in `Training.step`.
METHODS: dict[str, Callable[..., tuple[Any, MixTarget]]] = {
    "none": lambda images, labels, **_: (images, mixfn.unmixed(labels, images.device)),
    "cutmix": lambda images, labels, **_: mixfn.cutmix(images, labels),
    "mixup": lambda images, labels, **_: mixfn.mixup(images, labels),
    "resizemix": lambda images, labels, **_: mixing.resizemix(images, labels),
    "shuffled": _shuffled,
    "patch mixup": mixing.patch_mixup,
}
METHODS |= {"transmix": METHODS["cutmix"], "saliencymix": METHODS["none"]}


class Data(NamedTuple):
    """A data set in host memory: uint8 [N, H, W, 3], decoded and resized once, with int64 [N] labels."""

    images: np.ndarray
    labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray


@lru_cache(1)
def load_data(root: str, size: int, device: str) -> Data:
    """Decodes `root`/train and `root`/val (validation, test) by DALI."""
    arrays: list[np.ndarray] = []
    for split in splits(root):
        with create_loader(split, batch_size=500, input_size=size, is_training=False, crop_pct=1.0, dtype="uint8",
                           channels_last=True, device=device) as loader:
            batches = [(images.permute(0, 2, 3, 1).cpu(), labels.cpu()) for images, labels in loader]
        arrays.extend(torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    return Data(*arrays)


def splits(root: str) -> list[str]:
    """The training and the validation folder.

    Raises:
        ValueError: one is missing.
    """
    found = [next((str(Path(root, name)) for name in names if Path(root, name).is_dir()), None)
             for names in (("train",), ("val", "validation", "test"))]
    if None in found:
        raise ValueError(f"--data {root}: it needs the folders train and val (or validation, test), each with a "
                         "folder a class")
    return [folder for folder in found if folder]


def write_digits(root: str) -> None:
    """Has the demo write its digits: programs do not import each other."""
    subprocess.run([sys.executable, "-m", "pipelines.demo", "--data-only", "--data", root],
                   cwd=harness.ROOT, check=True)


def subset(labels: np.ndarray, images_per_class: int, seed: int) -> np.ndarray:
    """Indices of so many images of each class, another draw for each seed; 0: of all."""
    if not images_per_class:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in range(labels.max() + 1)]
    if (fewest := min(map(len, classes))) < images_per_class:
        raise ValueError(f"--images-per-class {images_per_class}: a class has {fewest}; give fewer, or 0 for all")
    return np.concatenate([members[:images_per_class] for members in classes])


@pipeline_def
def batches(source: Callable, *, size: int, scale: Sequence[float], hflip: float, method: str, patch: int):
    """Random resized crop, flip, and the method of mixing; uint8 HWC, then the fields of `MixTarget`."""
    # The operators before the method are the same for all rows, in number too: each gets its seed by its place.
    images, labels = fn.external_source(source, num_outputs=2, batch=True, batch_info=True,
                                        dtype=[types.UINT8, types.INT64], ndim=[3, 0], layout=["HWC", ""])
    if Pipeline.current().device_id is not None:
        images = images.gpu()
    images = fn.random_resized_crop(
        images, size=[size, size], random_area=list(scale), interp_type=types.INTERP_CUBIC)
    images = fn.flip(images, horizontal=fn.random.coin_flip(probability=hflip))
    images, target = METHODS[method](images, labels, size=(size, size), patch=patch)
    return images, *target


class Training:
    """One row, one seed: the model, and the endless stream of its batches."""

    def __init__(self, args: argparse.Namespace, row: Row, seed: int, epochs: int):
        self.args, self.row, self.device = args, row, torch.device(args.device)
        self.data = load_data(args.data, args.img_size, args.device)
        chosen = subset(self.data.labels, args.images_per_class, seed)
        images, labels = self.data.images[chosen], self.data.labels[chosen]
        order = Order(len(chosen), args.batch_size, shuffle=True, drop_last=True, seed=seed)
        self.steps, self.rng = len(order), np.random.default_rng(seed)
        epoch = lru_cache(1)(order.epoch)  # of `Order`, which is a pure function

        def source(info) -> tuple[np.ndarray, np.ndarray]:
            number, step = divmod(info.iteration, len(order))
            batch = epoch(number)[step * args.batch_size:][:args.batch_size]
            return images[batch], labels[batch]

        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = cuda = self.device.type == "cuda"
        self.pipe = batches(
            source, size=args.img_size, scale=args.scale, hflip=args.hflip, method=row.method, patch=args.patch,
            batch_size=args.batch_size, num_threads=args.threads, device_id=self.device.index if cuda else None,
            seed=seed)
        torch.manual_seed(seed)  # weights first, then λ_r
        self.model = build_model(args, self.data.labels.max() + 1).to(self.device)
        if cuda:
            self.model.to(memory_format=torch.channels_last)
        self.attention = mixing.class_attention(self.model) if row.method == "transmix" else None
        self.criterion = LUMixLoss(smoothing=args.smoothing, **row.loss)
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=epochs * self.steps, warmup_t=args.warmup * self.steps,
            warmup_lr_init=1e-6, t_in_epochs=False)
        self.updates = 0

    def batch(self) -> tuple[Tensor, MixTarget]:
        """The next images, uint8 [B, H, W, 3], and their target."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        images, *fields = (torch.from_dlpack(output.as_tensor()) for output in self.pipe.run(stream))
        if self.row.method == "saliencymix":
            mixed, target = mixing.saliency_mix(images.cpu().numpy(), fields[0].cpu().numpy(), self.rng)
            images, *fields = (torch.from_numpy(array).to(self.device) for array in (mixed, *target))
        return images, MixTarget(*fields)

    def logits(self, images: Tensor) -> Tensor:
        """Of uint8 images [B, H, W, 3]."""
        inputs = images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            return self.model(inputs)

    def step(self) -> Tensor:
        """One batch and one update; gives the loss."""
        images, target = self.batch()
        logits = self.logits(images)
        if self.attention is not None:
            target = mixing.transmix(target, self.attention(), images.shape[1:3])
        if self.updates == 0:
            check_target(target, logits.size(1))
        loss = self.criterion(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.scheduler.step_update(self.updates)
        return loss.detach()

    @torch.inference_mode()
    def top1(self) -> float:
        """Validation accuracy in %."""
        self.model.eval()
        hits, size = 0, 1000
        for start in range(0, len(self.data.val_labels), size):
            images, labels = (torch.from_numpy(array[start:start + size]).to(self.device)
                              for array in (self.data.val_images, self.data.val_labels))
            hits += int((self.logits(images).argmax(1) == labels).sum())
        self.model.train()
        return 100 * hits / len(self.data.val_labels)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """A timm model; `--small-stem` gives a ResNet the stem that is used for CIFAR: 3x3, stride 1, no pooling."""
    model: Any = timm.create_model(args.model, num_classes=int(num_classes), **args.model_kwargs)
    if args.small_stem:
        if not (isinstance(getattr(model, "conv1", None), nn.Conv2d) and hasattr(model, "maxpool")):
            raise ValueError(f"--small-stem: {args.model} has no stem of one convolution and a pooling; give a "
                             "ResNet such as resnet18, or leave it out")
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def train(args: argparse.Namespace, row: Row, seed: int, epochs: int, tick: Callable[[float], object] | None = None
          ) -> dict[str, Any]:
    """Trains a row with a seed.

    Args:
        tick: told of the accuracy after each epoch.

    Returns:
        seed, top1 (% after each epoch), seconds on the clock, cpu_seconds of this process.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start, cpu = time.perf_counter(), time.process_time()
    training, top1 = Training(args, row, seed, epochs), []
    for epoch in range(epochs):
        loss = sum(training.step() for _ in range(training.steps))
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"{row.name}, seed {seed}, epoch {epoch}: the loss is {loss}; lower --lr")
        top1.append(training.top1())
        if tick:
            tick(top1[-1])
    return dict(seed=seed, top1=top1, seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)


def measure_speed(args: argparse.Namespace, rows: Sequence[Row], rounds: int = 9, steps: int = 10
                  ) -> dict[str, dict[str, Any]]:
    """Images/s of batch and training step, rows taking turns: {row: images_per_second, ratio to CutMix}."""
    trainings = {row.name: Training(args, row, seed=0, epochs=1) for row in rows}
    values: dict[str, list[float]] = {name: [] for name in trainings}
    for number in tqdm(range(rounds + 1), "speed", unit="round", leave=False, disable=None):
        for name, training in trainings.items():
            for _ in range(3):  # what the pipeline made ahead while it idled
                training.step()
            harness.synchronise(args.device)
            start = time.perf_counter()
            for _ in range(steps):
                training.step()
            harness.synchronise(args.device)
            if number:  # the first round warms up
                values[name].append(steps * args.batch_size / (time.perf_counter() - start))
    ratios = {name: [one / other for one, other in zip(speeds, values[CUTMIX], strict=True)]
              for name, speeds in values.items()}
    return {name: dict(images_per_second=harness.summary(values[name]), ratio=harness.summary(ratios[name]))
            for name in values}


def describe(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the last epochs of a row's runs say.

    Args:
        runs, reference: of this row and of CutMix: seed, top1.

    Returns:
        n, mean, sd (of a sample), standard_error; `difference` to CutMix over the seeds that both have: n, mean,
        and its 95 % t interval. None where there are too few runs.
    """
    last, other = ({run["seed"]: run["top1"][-1] for run in rows} for rows in (runs, reference))
    found = moments(list(last.values()))
    difference = moments([last[seed] - other[seed] for seed in last if seed in other])
    half = None
    if difference["n"] > 1:
        half = float(student.ppf(0.975, difference["n"] - 1)) * difference["standard_error"]
    interval = None if half is None else [difference["mean"] - half, difference["mean"] + half]
    return found | dict(difference=dict(n=difference["n"], mean=difference["mean"], interval=interval))


def moments(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, standard deviation of a sample, standard error of the mean."""
    n = len(values)
    sd = float(np.std(values, ddof=1)) if n > 1 else None
    return dict(n=n, mean=float(np.mean(values)) if n else None, sd=sd,
                standard_error=None if sd is None else sd / n**0.5)


def begin(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The result to fill: a new one, or the one under `--out`.

    Raises:
        ValueError: `--out` is another run's, or would be uncommitted code's in `benchmarks/results`.
    """
    meta = harness.metadata(command)
    harness.refuse_dirty(args.out, meta, args.allow_dirty)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "figure", "allow_dirty")}
    rows = [dict(row._asdict(), runs=[], error=None) for row in TABLES[args.table]]
    fresh = dict(kind="accuracy", unit="top-1 %", complete=False, meta=meta, epochs=args.epochs, rows=rows,
                 settings=settings | dict(digests=[load(split).digest for split in splits(args.data)]))
    fresh = json.loads(json.dumps(fresh))  # tuples become lists, as in a file
    if not Path(args.out).exists():
        return fresh
    old = json.loads(Path(args.out).read_text())
    there, here = identity(old), identity(fresh)
    if different := [key for key in there | here if there.get(key) != here.get(key)]:
        listed = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
        raise ValueError(f"--out {args.out}: it is another run's: {listed}. Call it as it was called, or give "
                         "another file")
    return old


def identity(result: dict[str, Any]) -> dict[str, Any]:
    """What must be alike for a run to go on."""
    meta = result.get("meta", {})
    return dict(kind=result.get("kind"), commit=meta.get("commit"), clean=meta.get("clean"),
                **result.get("settings", {}))


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Does what is left to do, and writes the result after each model."""
    result = begin(args, command)
    if result["complete"]:
        return result
    rows = []
    for row, entry in zip(TABLES[args.table], result["rows"], strict=True):
        try:  # a row that this model cannot have stays in the table, and says why
            if row.method == "transmix":
                mixing.class_attention(build_model(args, 2))
            rows.append((row, entry))
        except ValueError as error:
            entry["error"] = str(error)
    if "speed" not in rows[0][1]:
        for name, speed in measure_speed(args, [row for row, _ in rows]).items():
            next(entry for row, entry in rows if row.name == name)["speed"] = speed
    with closing(Workers(args.jobs)) as workers:
        if result["epochs"] is None:
            seconds = max(workers.each(seconds_per_epoch, [(args, seed) for seed in range(args.jobs)]))
            result["epochs"] = max(1, int(60 * args.minutes / seconds))
        harness.write(args.out, result)
        fill(args, result, rows, workers)
    result["complete"] = True
    harness.write(args.out, result)
    return result


def fill(args: argparse.Namespace, result: dict[str, Any], rows: Sequence[tuple[Row, dict]], workers: "Workers"
         ) -> None:
    """Trains every row and seed that the result lacks; seeds outside, so that a partial result has all rows."""
    entries = {row.name: entry for row, entry in rows}
    left = [(args, row, seed, result["epochs"]) for seed in range(args.seeds) for row, entry in rows
            if seed not in [done["seed"] for done in entry["runs"]]]
    total = args.seeds * len(rows)
    with tqdm(total=total * result["epochs"], initial=(total - len(left)) * result["epochs"], unit="epoch",
              disable=None) as bar:
        for name, done in workers.unordered(left, bar):
            entry = entries[name]
            entry["runs"] = sorted([*entry["runs"], done], key=lambda run: run["seed"])
            for other in entries.values():
                other |= describe(other["runs"], entries[CUTMIX]["runs"])
            bar.set_postfix_str(f"{name}, seed {done['seed']}: {done['top1'][-1]:.2f} %")
            harness.write(args.out, result)


class Workers:
    """Trainings side by side, each in a process of its own; a single one in this process."""

    def __init__(self, jobs: int):
        spawn = multiprocessing.get_context("spawn")
        # Ctrl-C is for the parent, which then ends them.
        ignored = (signal.SIGINT, signal.SIG_IGN)
        self.pool = ProcessPoolExecutor(jobs, spawn, signal.signal, ignored) if jobs > 1 else None

    def each(self, task: Callable, items: Sequence[tuple]) -> list:
        """Results of `task(*item)`, all at the same time."""
        apply = self.pool.map if self.pool else map
        return list(apply(task, *zip(*items, strict=True)))

    def unordered(self, tasks: Sequence[tuple], bar: tqdm) -> Iterator[tuple[str, dict[str, Any]]]:
        """(row's name, what `train` returned) of each task as it ends."""
        if self.pool:
            for future in as_completed([self.pool.submit(_named_train, task) for task in tasks]):
                name, done = future.result()
                bar.update(len(done["top1"]))
                yield name, done
            return
        for args, row, seed, epochs in tasks:
            bar.set_postfix_str(f"{row.name}, seed {seed}")
            yield row.name, train(args, row, seed, epochs, lambda _: bar.update())

    def close(self) -> None:
        """Ends the processes at once."""
        if self.pool:
            for process in multiprocessing.active_children():
                process.terminate()
            self.pool.shutdown(cancel_futures=True)


def _named_train(task: tuple) -> tuple[str, dict[str, Any]]:
    return task[1].name, train(*task)


def seconds_per_epoch(args: argparse.Namespace, seed: int) -> float:
    """Of CutMix with its validation, when it is warm."""
    row = next(row for row in TABLES[args.table] if row.name == CUTMIX)
    training = Training(args, row, seed, epochs=1)
    for _ in range(2):
        harness.synchronise(args.device)
        start = time.perf_counter()
        for _ in range(training.steps):
            training.step()
        training.top1()
    return time.perf_counter() - start


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", type=int, required=True, choices=sorted(TABLES), help="of the paper")
    add("--data", default="data/digits", metavar="DIR",
        help="class folders under train and val (validation, test); the default is made when it is missing")
    add("--images-per-class", type=int, default=20, metavar="N", help="training images; 0: all")
    add("--seeds", type=harness.positive, default=5, metavar="N", help="seeds 0 to N - 1")
    add("--out", required=True, metavar="FILE.json", help="where the result goes")
    add("--figure", metavar="FILE.svg", help="accuracy against epoch")
    add("--model", help="any timm model (default: a resnet10t of a quarter of its width)")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="NAME=VALUE of timm.create_model")
    add("--small-stem", action="store_true", help="a ResNet's stem: 3x3, stride 1, no pooling")
    add("--img-size", type=harness.positive, default=16)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=harness.positive, help="of each model (default: 40)")
    length.add_argument("--minutes", type=float, help="for a model; as many epochs as CutMix does in them")
    add("--batch-size", type=harness.positive, default=50)
    add("--lr", type=float, default=2e-3, help="of AdamW, at the top of a cosine schedule")
    add("--weight-decay", type=float, default=.05)
    add("--warmup", type=int, default=2, help="epochs")
    add("--smoothing", type=float, default=.1, help="of labels")
    add("--scale", type=float, nargs=2, default=[.6, 1.], help="share of the area that a crop has")
    add("--hflip", type=float, default=0., help="a mirrored 2 is no digit")
    add("--patch", type=harness.positive, default=8,
        help="Table 12: side of a patch in pixels; the paper's is 16, of 224")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="bfloat16")
    add("--jobs", type=harness.positive, default=1, help="models trained side by side")
    add("--threads", type=harness.positive, default=1, help="DALI's, of each model")
    add("--allow-dirty", action="store_true",
        help="measure uncommitted code for benchmarks/results; the result says so")
    args = parser.parse_args(argv)
    args.device = harness.resolve_device(args.device)
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: give a number above 0")
    if args.epochs is None and args.minutes is None:
        args.epochs = 40
    if args.model is None:
        args.model, args.model_kwargs = "resnet10t", dict(channels=(16, 32, 64, 128)) | args.model_kwargs
    if args.data == parser.get_default("data") and not Path(args.data).exists():
        write_digits(args.data)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if argv is None else argv)])
    try:
        run(args, command)
    except KeyboardInterrupt:
        sys.exit(f"stopped; what is done is in {args.out}, and the same command goes on")
    from . import plot

    result, digest = plot.load(Path(args.out))
    if args.figure:
        plot.make_figure(result, digest, Path(args.figure))
    print(plot.table(result))


if __name__ == "__main__":
    main()
