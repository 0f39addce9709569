"""One training of a small model: its data, its stream of mixed batches, its updates and its validation.

All rows of a seed start from the same weights and see the same crops in the same order, and the same boxes if they
use the same mixing.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from nvidia.dali import Pipeline, fn, pipeline_def, types
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

import lumix_dali.fn as mixfn
from lumix_dali import LUMixLoss, MixTarget, check_target, create_loader
from lumix_dali.data.files import Files
from lumix_dali.data.order import Order
from lumix_dali.data.sources import load_files

from . import mixing, puzzlemix
from .labels import LabelWeights
from .tables import Row


def _shuffled(images, labels, **where):
    images, target = mixfn.cutmix(images, labels)
    return mixing.shuffle_patches(images, **where), target


# The mixing done in the graph. SaliencyMix and Puzzle Mix follow in `Training.batch`, TransMix in `Training.step`.
METHODS: dict[str, Callable[..., tuple[Any, MixTarget]]] = {
    "none": lambda images, labels, **_: (images, mixfn.unmixed(labels, images.device)),
    "cutmix": lambda images, labels, **_: mixfn.cutmix(images, labels),
    "mixup": lambda images, labels, **_: mixfn.mixup(images, labels),
    "resizemix": lambda images, labels, **_: mixing.resizemix(images, labels),
    "shuffled": _shuffled,
    "patch mixup": mixing.patch_mixup,
}
METHODS |= {"transmix": METHODS["cutmix"], "saliencymix": METHODS["none"], "puzzlemix": METHODS["none"]}


class Images(NamedTuple):
    """Images in host memory, decoded and resized once, uint8 [N, H, W, 3], and labels, int64 [N]."""

    images: np.ndarray
    labels: np.ndarray


@lru_cache(2)
def decoded(folder: str, size: int, device: str) -> Images:
    """All images of a class folder, decoded by `create_loader`."""
    with create_loader(
        folder,
        batch_size=500,
        input_size=size,
        is_training=False,
        crop_pct=1.0,
        dtype="uint8",
        channels_last=True,
        device=device,
    ) as loader:
        parts = [(images.permute(0, 2, 3, 1).cpu(), labels.cpu()) for images, labels in loader]
    return Images(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def splits(root: str) -> list[str]:
    """The training and validation folders.

    Raises:
        ValueError: a folder is missing.
    """
    found = [
        next((str(Path(root, name)) for name in names if Path(root, name).is_dir()), None)
        for names in (("train",), ("val", "validation", "test"))
    ]
    if None in found:
        raise ValueError(
            f"--data {root}: it needs the folders train and val (or validation, test), each with one folder per class"
        )
    return [folder for folder in found if folder]


def subset(labels: np.ndarray, images_per_class: int, seed: int) -> np.ndarray:
    """Indices of a given number of images per class, drawn by seed; 0: all images."""
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
    # The operators before the method must be the same for all rows: each gets its seed from its position.
    images, labels = fn.external_source(
        source,
        num_outputs=2,
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64],
        ndim=[3, 0],
        layout=["HWC", ""],
    )
    if Pipeline.current().device_id is not None:
        images = images.gpu()
    images = fn.random_resized_crop(images, size=[size, size], random_area=list(scale), interp_type=types.INTERP_CUBIC)
    images = fn.flip(images, horizontal=fn.random.coin_flip(probability=hflip))
    images, target = METHODS[method](images, labels, size=(size, size), patch=patch)
    return images, *target


Batch = tuple[Tensor, MixTarget]


def from_memory(args: argparse.Namespace, row: Row, seed: int) -> tuple[int, Iterator[Batch]]:
    """Batches per epoch, and an endless stream of them, cropped and mixed by `batches` from decoded images."""
    data = decoded(splits(args.data)[0], args.img_size, args.device)
    chosen = subset(data.labels, args.images_per_class, seed)
    images, labels = data.images[chosen], data.labels[chosen]
    order = Order(len(chosen), args.batch_size, shuffle=True, drop_last=True, seed=seed)
    epoch = lru_cache(1)(order.epoch)  # `Order` is a pure function

    def source(info) -> tuple[np.ndarray, np.ndarray]:
        number, step = divmod(info.iteration, len(order))
        batch = epoch(number)[step * args.batch_size :][: args.batch_size]
        return images[batch], labels[batch]

    device = torch.device(args.device)
    pipe = batches(
        source,
        size=args.img_size,
        scale=args.scale,
        hflip=args.hflip,
        method=row.method,
        patch=args.patch,
        batch_size=args.batch_size,
        num_threads=args.threads,
        device_id=device.index if device.type == "cuda" else None,
        seed=seed,
    )

    def stream() -> Iterator[Batch]:
        while True:
            cuda = torch.cuda.current_stream(device) if device.type == "cuda" else None
            images, *fields = (torch.from_dlpack(output.as_tensor()) for output in pipe.run(cuda))
            yield images, MixTarget(*fields)

    return len(order), stream()


def from_files(args: argparse.Namespace, row: Row, seed: int) -> tuple[int, Iterator[Batch]]:
    """The same from the files themselves, decoded by `create_loader` in each epoch.

    Raises:
        ValueError: the loader does not have this mixing method.
    """
    alphas: dict[str, Any] = {"none": {}, "cutmix": dict(cutmix_alpha=1.0), "mixup": dict(mixup_alpha=0.8)}
    if row.method not in alphas:
        raise ValueError(f"--stream files: the loader has no {row.method}; give --stream memory")
    samples = load_files(splits(args.data)[0])
    chosen = subset(samples.labels, args.images_per_class, seed)
    samples = Files(samples.root, [samples.names[i] for i in chosen], samples.labels[chosen], samples.classes)
    loader = create_loader(
        samples,
        batch_size=args.batch_size,
        input_size=args.img_size,
        device=args.device,
        scale=args.scale,
        hflip=args.hflip,
        dtype="uint8",
        channels_last=True,
        seed=seed,
        num_threads=args.threads,
        **alphas[row.method],
    )

    def stream() -> Iterator[Batch]:
        with closing(loader):
            while True:
                for images, target in loader:
                    yield images.permute(0, 2, 3, 1), target

    return len(loader), stream()


STREAMS = {"memory": from_memory, "files": from_files}


class Training:
    """One row and one seed: the model, and the endless stream of its batches."""

    def __init__(self, args: argparse.Namespace, row: Row, seed: int, epochs: int):
        self.args, self.row, self.device = args, row, torch.device(args.device)
        torch.set_num_threads(args.threads)  # the order of sums, and so every value, depends on it
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.val = decoded(splits(args.data)[1], args.img_size, args.device)
        self.rng = np.random.default_rng(seed)
        self.steps, self.stream = STREAMS[args.stream](args, row, seed)
        torch.manual_seed(seed)  # weights first, then λ_r
        self.model = build_model(args, self.val.labels.max() + 1).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.attention = mixing.class_attention(self.model) if row.method == "transmix" else None
        self.criterion = LUMixLoss(smoothing=args.smoothing, **row.loss)
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=epochs * self.steps,
            warmup_t=args.warmup * self.steps,
            warmup_lr_init=1e-6,
            t_in_epochs=False,
        )
        self.updates, self.weights = 0, LabelWeights()

    def batch(self) -> Batch:
        """The next images, uint8 [B, H, W, 3], and their target."""
        images, target = next(self.stream)
        if self.row.method == "saliencymix":
            mixed, found = mixing.saliency_mix(images.cpu().numpy(), target.labels.cpu().numpy(), self.rng)
            images, *fields = (torch.from_numpy(array).to(self.device) for array in (mixed, *found))
            target = MixTarget(*fields)
        elif self.row.method == "puzzlemix":
            return self.puzzle_mixed(images, target)
        return images, target

    def puzzle_mixed(self, images: Tensor, target: MixTarget) -> Batch:
        """The batch mixed by Puzzle Mix with the model's saliency, rounded to uint8."""
        inputs = normalised(images)
        self.model.eval()
        salient = puzzlemix.saliency(lambda x: self.criterion(self.forward(x), target.labels), inputs)
        self.model.train()
        mixed, target = puzzlemix.puzzle_mix(inputs, target.labels, salient, self.rng, mean=0.5, std=0.5)
        return mixed.mul_(127.5).add_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 1), target

    def logits(self, images: Tensor) -> Tensor:
        """Logits of uint8 images [B, H, W, 3]."""
        return self.forward(normalised(images))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of normalised images [B, 3, H, W]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            return self.model(inputs)

    def step(self) -> Tensor:
        """Trains on one batch with one update; returns the loss."""
        images, target = self.batch()
        logits = self.logits(images)
        if self.attention is not None:
            target = mixing.transmix(target, self.attention(), images.shape[1:3])
        if self.updates == 0:
            check_target(target, logits.size(1))
        lam_r = self.criterion.draw(logits) if self.criterion.r_r else None
        loss = self.criterion(logits, target, lam_r)
        if self.args.lam:
            self.weights.add(self.criterion, logits, target, lam_r)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.scheduler.step_update(self.updates)
        return loss.detach()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Evaluates the validation images.

        Returns:
            top1 in %; nll, the mean negative log likelihood in nats; ece, the expected calibration error in %:
            the mean |confidence - accuracy| over 15 bins of equal width (arXiv 1706.04599).
        """
        self.model.eval()
        size, logits, labels = 1000, [], torch.from_numpy(self.val.labels).to(self.device)
        for start in range(0, len(labels), size):
            images = torch.from_numpy(self.val.images[start : start + size]).to(self.device)
            logits.append(self.logits(images).float())
        self.model.train()
        every = torch.cat(logits)
        ece = multiclass_calibration_error(every.softmax(1), labels, every.size(1), n_bins=15, norm="l1")
        return dict(
            top1=100 * (every.argmax(1) == labels).double().mean().item(),
            nll=F.cross_entropy(every, labels).item(),
            ece=100 * ece.item(),
        )


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] as float [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """A timm model; `--small-stem` gives a ResNet the usual CIFAR stem: 3x3, stride 1, no pooling."""
    model: Any = timm.create_model(args.model, num_classes=int(num_classes), **args.model_kwargs)
    if args.small_stem:
        if not (isinstance(getattr(model, "conv1", None), nn.Conv2d) and hasattr(model, "maxpool")):
            raise ValueError(
                f"--small-stem: {args.model} has no stem of one convolution and a pooling; give a "
                "ResNet such as resnet18, or leave it out"
            )
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def train(args: argparse.Namespace, row: Row, seed: int, epochs: int) -> dict[str, Any]:
    """Trains one row with one seed.

    Returns:
        seed; validated, the epochs with a validation; top1, nll and ece, lists of `Training.validate`'s values for
        them; with ``--lam``, lam: `LabelWeights.summary` of each epoch, {name: list}; seconds of wall time, and
        cpu_seconds of this process.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start, cpu = time.perf_counter(), time.process_time()
    training, found, weights = Training(args, row, seed, epochs), [], []
    validated = [
        epoch for epoch in range(1, epochs + 1) if epoch == epochs or (args.val_every and epoch % args.val_every == 0)
    ]
    for epoch in range(1, epochs + 1):
        loss = sum(training.step() for _ in range(training.steps))
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"{row.name}, seed {seed}, epoch {epoch}: the loss is {loss}; lower --lr")
        if epoch in validated:
            found.append(training.validate())
        if args.lam:
            weights.append(training.weights.summary())
    return dict(
        seed=seed,
        validated=validated,
        **columns(found),
        lam=columns(weights),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
    )


def columns(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """[{name: value}] as {name: [value]}."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
