"""The paper's evaluation protocols (Tables 1, 5, 7, 8, 9) for any timm model, on images read through DALI.

    python -m pipelines.evaluate top1 --data-dir imagenet --checkpoint runs/NAME/model_best.pth.tar
    python -m pipelines.evaluate shuffle --data-dir imagenet --model deit_small_patch16_224 --pretrained --amp
    python -m pipelines.evaluate occlusion --data-dir imagenet --checkpoint FILE --model M --figure drop.png
    python -m pipelines.evaluate imagenet-a --data-dir imagenet-a --checkpoint FILE --model M --out a.json
    python -m pipelines.evaluate imagenet-o --data-dir imagenet-o --val-dir imagenet --checkpoint FILE --model M
    python -m pipelines.evaluate wsas --data-dir voc --checkpoint FILE --model M
    python -m pipelines.evaluate wsol --data-dir imagenet --boxes annotations --checkpoint FILE --model M

Every result is printed beside the paper's numbers for its baseline and for LUMix. timm's own DeiT-S (--pretrained)
must reach the baseline's numbers: that shows that a protocol is the paper's. A checkpoint of pipelines.train
supplies its model, classes, input size, mean and std, and for top1 also the crop it was validated with. The other
protocols keep the paper's crop, so "shuffled 1", the whole image, may differ from top1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import huggingface_hub.constants as hub
import numpy as np
import timm
import torch
from huggingface_hub.utils import get_session
from PIL import Image
from timm.data import ImageNetInfo, resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer, load_checkpoint
from timm.utils import AttentionExtract, ParseKwargs
from torch import nn
from torchvision.datasets import VOCSegmentation
from torchvision.ops import box_iou

from lumix_dali import create_loader
from lumix_dali.data.files import Files
from lumix_dali.data.sources import load_files

from . import extras, metrics, report
from .checkpoint import FORMAT
from .progress import progress

Values = dict[tuple[str, str | int], list[float]]  # (curve, abscissa or metric): one value per seed, in percent
Variant = tuple[tuple[str, str | int], int, torch.Tensor]  # key, index of the seed, images

IMAGENET = "the validation set of ImageNet-1k (https://image-net.org) as DIR/WNID/IMAGE.JPEG or DIR/val/WNID/..."
BENCHMARK = "from https://github.com/hendrycks/natural-adv-examples, unpacked: 200 folders DIR/WNID/IMAGE.jpg"
EXPECTED = {
    "top1": IMAGENET,
    "shuffle": IMAGENET,
    "occlusion": IMAGENET,
    "wsol": IMAGENET,
    "imagenet-a": f"ImageNet-A {BENCHMARK}",
    "imagenet-o": f"ImageNet-O {BENCHMARK}",
    "wsas": "PASCAL VOC 2012 (http://host.robots.ox.ac.uk/pascal/VOC/voc2012), unpacked, with "
    "DIR/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/val.txt}",
}
# Settings taken from a checkpoint of pipelines.train: always; except for wsas, which has its own size; and only for
# top1, which then reproduces the run's own number.
FROM_THE_RUN = ("model", "num_classes", "model_kwargs", "mean", "std")
SIZE_OF_THE_RUN = ("img_size", "input_size")
FROM_ITS_VALIDATION = ("crop_pct", "interpolation")
HUB_SECONDS = 5  # timeout for a first answer from the hub
BOXES = "ILSVRC2012_bbox_val_v3.tgz of ImageNet (https://image-net.org), unpacked: ILSVRC2012_val_*.xml anywhere"


class Normalised(nn.Module):
    """A model that takes uint8 images: protocols drop and permute pixels before normalisation."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> Any:
        return self.model((images.float() / 255 - self.mean) / self.std)


@dataclass
class Subject:
    """The model under evaluation and its input."""

    args: argparse.Namespace
    model: Any  # of timm
    network: Normalised  # wraps the model
    data: dict[str, Any]  # size, interpolation, crop, mean, std, under timm's names
    names: Sequence[str] | None  # of the outputs
    autocast: torch.autocast

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.data["input_size"][1:]

    @property
    def device(self) -> torch.device:
        """The device of the model and the images."""
        return self.network.mean.device

    def batches(self, samples: Files, **changes: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All samples once, as uint8 [B, 3, H, W] and labels [B]; `changes` override resize and crop."""
        # A damaged image is an error: a substitute would distort the result.
        options = self.data | changes | dict(dtype="uint8", on_bad_sample="raise", is_training=False)
        loader = create_loader(
            samples, batch_size=self.args.batch_size, device=self.device, num_threads=self.args.workers, **options
        )
        with loader, progress(len(samples), self.args.protocol) as bar:
            for images, labels in loader:
                yield images, labels
                bar.update(len(labels))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, K]."""
        with self.autocast:
            return self.network(images).float()


# Protocols: each takes the subject and returns its values.


def top1(subject: Subject) -> Values:
    """Table 1."""
    return accuracies(subject, lambda images: [(("", "top-1"), 0, images)])


def shuffle(subject: Subject) -> Values:
    """Table 7: accuracy with the cells of each grid permuted."""
    args, generators = subject.args, seeded(subject.args)
    check_grids("--grids", args.grids, subject.size)

    def variants(images: torch.Tensor) -> Iterator[Variant]:
        for rows, columns in args.grids:
            cells = rows * columns
            for seed, generator in enumerate(generators if cells > 1 else generators[:1]):
                order = permutations(len(images), cells, args.perm, generator).to(images.device)
                yield ("shuffled", cells), seed, metrics.shuffle_cells(images, order, (rows, columns))

    return with_average(accuracies(subject, variants))


def occlusion(subject: Subject) -> Values:
    """Table 9 (non-salient), and the two other ways of dropping patches in its source."""
    args, generators = subject.args, seeded(subject.args)
    rows, columns = args.drop_grid
    if "random" in args.drop:
        check_grids("--drop-grid", [args.drop_grid], subject.size)
    saliency = saliency_model(subject) if set(args.drop) - {"random"} else None

    def masks(mode: str, loss: int, batch: int, attention: Any) -> list[torch.Tensor]:
        if mode == "salient":
            return [metrics.top_mass(attention, loss / 100)]
        if mode == "non-salient":
            return [~metrics.top_mass(attention, (100 - loss) / 100)]
        ranks = [permutations(batch, rows * columns, args.perm, generator) for generator in generators]
        return [(rank < rows * columns * loss // 100).view(-1, rows, columns) for rank in ranks]

    def variants(images: torch.Tensor) -> Iterator[Variant]:
        attention = saliency(images) if saliency else None
        for mode, loss in product(args.drop, args.losses):
            for seed, mask in enumerate(masks(mode, loss, len(images), attention)[: None if loss else 1]):
                yield (mode, loss), seed, metrics.drop_cells(images, mask.to(images.device))

    return with_average(accuracies(subject, variants))


def imagenet_a(subject: Subject) -> Values:
    """Table 8, upper part."""
    samples, outputs = subset(subject)
    confidence, correct = confidences(subject, samples, outputs)
    calibration = [
        100 * metrics.rms_calibration_error(confidence, correct, subject.args.bin_size, skip_last)
        for skip_last in (True, False)
    ]
    return {
        ("", "top-1"): [100 * float(correct.mean())],
        ("", "calibration error"): [calibration[0]],
        ("", "calibration error, last bin too"): [calibration[1]],
        ("", "AURRA"): [100 * float(metrics.response_rate_accuracy(confidence, correct).mean())],
    }


def imagenet_o(subject: Subject) -> Values:
    """Table 8, lower part: ImageNet-O's images against ImageNet's images of the same class folders."""
    from sklearn.metrics import average_precision_score

    args = subject.args
    outside, outputs = subset(subject)
    validation = read(args, "--val-dir", args.val_dir, IMAGENET)
    if absent := sorted(set(outside.classes) - set(validation.classes)):
        raise missing(args, "--val-dir", args.val_dir, IMAGENET, f"it lacks {len(absent)} classes, such as {absent[0]}")
    inside = relabelled(validation, outside.classes)
    scores = [-confidences(subject, samples, outputs)[0] for samples in (outside, inside)]
    is_outside = np.repeat([1, 0], [len(outside), len(inside)])
    return {("", "AUPR"): [100 * float(average_precision_score(is_outside, np.concatenate(scores)))]}


def wsas(subject: Subject) -> Values:
    """Table 5, segmentation: the best head's top-mass mask against VOC's objects."""
    args = subject.args
    try:
        voc = VOCSegmentation(args.data_dir, image_set="val")
    except (RuntimeError, OSError) as error:
        raise missing(args, "--data-dir", args.data_dir, EXPECTED["wsas"], error) from error
    attend, scores = class_attention(subject, subject.model), []
    for images, numbers in subject.batches(
        numbered(Files("", voc.images, np.zeros(len(voc), int), [""])), crop_mode="squash", crop_pct=1.0
    ):
        masks = metrics.enlarge(metrics.top_mass(attend(images), args.mass), subject.size)
        for mask, number in zip(masks, numbers.tolist(), strict=True):
            # The public protocol also resizes the ground truth; class numbers cannot be interpolated.
            truth = Image.open(voc.masks[number]).resize(subject.size[::-1], Image.Resampling.NEAREST)
            target = torch.from_numpy(np.array(truth)).to(mask.device)
            scores.append([metrics.best_jaccard(mask, target, ignore_void) for ignore_void in (False, True)])
    plain, ignored = 100 * np.mean(scores, 0)
    return {("", "Jaccard index"): [float(plain)], ("", "Jaccard index, void left out"): [float(ignored)]}


def wsol(subject: Subject) -> Values:
    """Table 5, localisation; the paper gives no protocol, so each choice is a flag."""
    args = subject.args
    samples = numbered(read(args, "--data-dir", args.data_dir))
    annotations = find_boxes(args, samples)
    attend, best = class_attention(subject, subject.model), []
    # The whole image is squashed into the input so that no object is cut off.
    for images, numbers in subject.batches(samples, crop_mode="squash", crop_pct=1.0):
        masks = metrics.top_mass(one_head(attend(images), args.head), args.mass)
        for mask, number in zip(masks, numbers.tolist(), strict=True):
            box = metrics.mask_box(mask, args.component == "largest", args.connectivity == 8)
            iou = box_iou(box[None], true_boxes(annotations[number], samples.path(number)))
            best.append(float(iou.max() if args.boxes_per_image == "best" else iou.mean()))
    return {("", "box IoU"): [100 * statistics.fmean(best)]}


PROTOCOLS: dict[str, Callable[[Subject], Values]] = {
    "top1": top1,
    "shuffle": shuffle,
    "occlusion": occlusion,
    "imagenet-a": imagenet_a,
    "imagenet-o": imagenet_o,
    "wsas": wsas,
    "wsol": wsol,
}


# What protocols share.


def accuracies(subject: Subject, variants: Callable[[torch.Tensor], Iterable[Variant]]) -> Values:
    """Top-1 on every variant of every image; the data are read once."""
    samples = labelled(subject, read(subject.args, "--data-dir", subject.args.data_dir))
    hits: dict[tuple, dict[int, torch.Tensor]] = {}
    for images, labels in subject.batches(samples):
        for key, seed, changed in variants(images):
            right = (subject.logits(changed).argmax(1) == labels).sum()  # stays on the device
            seeds = hits.setdefault(key, {})
            seeds[seed] = seeds.get(seed, 0) + right
    return {key: [100 * int(right) / len(samples) for right in seeds.values()] for key, seeds in hits.items()}


def with_average(values: Values) -> Values:
    """Adds the average of each curve, seed by seed; a deterministic point has the same value for all seeds."""
    result = dict(values)
    for curve in dict.fromkeys(curve for curve, _ in values):
        points = [seeds for (other, _), seeds in values.items() if other == curve]
        most = max(map(len, points))
        aligned = [seeds * most if len(seeds) == 1 else seeds for seeds in points]
        result[curve, "average"] = [statistics.fmean(point) for point in zip(*aligned, strict=True)]
    return result


def seeded(args: argparse.Namespace) -> list[torch.Generator]:
    """One generator per seed."""
    return [torch.Generator().manual_seed(args.seed + number) for number in range(args.seeds)]


def check_grids(flag: str, grids: Iterable[tuple[int, int]], size: tuple[int, int]) -> None:
    """Raises ValueError if a grid does not divide the images into equal cells."""
    for rows, columns in grids:
        if size[0] % rows or size[1] % columns:
            fitting = [
                max(cells for cells in range(1, wanted + 1) if side % cells == 0)
                for side, wanted in zip(size, (rows, columns), strict=True)
            ]
            raise ValueError(
                f"{flag} {rows}x{columns}: it does not divide images of {size[0]}x{size[1]}; give a "
                f"grid that does, such as {flag} {fitting[0]}x{fitting[1]}, or another --img-size"
            )


def permutations(batch: int, cells: int, perm: str, generator: torch.Generator) -> torch.Tensor:
    """int64 [1, cells] with perm="batch", [batch, cells] with "sample"."""
    return torch.rand(batch if perm == "sample" else 1, cells, generator=generator).argsort(1)


def confidences(subject: Subject, samples: Files, outputs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The max probability among these outputs, and whether it belongs to the label; [n] each."""
    found = []
    for images, labels in subject.batches(samples):
        confidence, guess = subject.logits(images)[:, outputs].softmax(1).max(1)
        found.append(torch.stack([confidence.double(), (guess == labels).double()]))
    confidence, correct = torch.cat(found, 1).cpu().numpy()
    return confidence, correct


def class_attention(subject: Subject, model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives a function from uint8 images to the last block's attention from the class token to the patches.

    Returns:
        A function that returns float [B, heads, rows, columns], parts of a softmax over all tokens.

    Raises:
        ValueError: the model has no such attention.
    """
    name, blocks = model.pretrained_cfg["architecture"], getattr(model, "blocks", None)
    if blocks is None or getattr(model, "cls_token", None) is None or not hasattr(blocks[-1], "attn"):
        raise ValueError(f"{name}: it has no attention from a class token to patches; give a ViT, such as deit_*")
    blocks[-1].attn.fused_attn = False  # the fused kernel does not expose its attention
    layer = f"blocks.{len(blocks) - 1}.attn.attn_drop"
    data = subject.data if model is subject.model else resolve_data_config(model=model)
    extract = Normalised(AttentionExtract(model, [layer], method="hook"), data["mean"], data["std"])
    extract.to(subject.device)

    def attend(images: torch.Tensor) -> torch.Tensor:
        with subject.autocast:
            attention = extract(images)[layer]
        return attention[:, :, 0, model.num_prefix_tokens :].float().unflatten(-1, model.patch_embed.grid_size)

    return attend


def saliency_model(subject: Subject) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives a function from uint8 images to DINO's attention [B, rows, columns] of the requested head."""
    args = subject.args
    if timm.is_model(args.dino_model.split(".")[0]):
        with torch.device("meta"):  # download nothing for a model that cannot be used
            check_patches(timm.create_model(args.dino_model), subject.size, "--dino-model")
    model = build(args.dino_model, args.dino_checkpoint, "--dino-checkpoint", num_classes=0)
    set_size(model, subject.size, "--dino-model")
    attend = class_attention(subject, model)
    return lambda images: one_head(attend(images), args.head)


def one_head(attention: torch.Tensor, head: str) -> torch.Tensor:
    """[B, heads, rows, columns] to [B, rows, columns]: one head by its index, or "mean" or "max" over the heads."""
    if head in ("mean", "max"):
        return attention.mean(1) if head == "mean" else attention.amax(1)
    if int(head) >= attention.shape[1]:
        raise ValueError(f"--head {head}: the model has {attention.shape[1]} heads, counted from 0")
    return attention[:, int(head)]


# Data.


def missing(args: argparse.Namespace, flag: str, path: str | None, expected: str, reason: object) -> ValueError:
    """An error that says where to get the data and which layout is expected."""
    return ValueError(f"{flag} {path}: {reason}. {args.protocol} needs {expected}")


def read(args: argparse.Namespace, flag: str, path: str | None, expected: str = "") -> Files:
    """Samples of a class folder, or of `val` or `validation` in it."""
    inner = [Path(path or "", name) for name in ("val", "validation")]
    try:
        return load_files(next((folder for folder in inner if folder.is_dir()), path or ""))
    except ValueError as error:
        raise missing(args, flag, path, expected or EXPECTED[args.protocol], error) from error


def labelled(subject: Subject, samples: Files) -> Files:
    """`samples` with the index of the model's output as label."""
    names = subject.names
    if names is None and len(samples.classes) == subject.model.num_classes:
        names = samples.classes
    if names is None or (unknown := set(samples.classes) - set(names)):
        what = "their names are unknown" if names is None else f"{min(unknown)!r} is not one of them"
        raise ValueError(
            f"--data-dir {subject.args.data_dir}: {len(samples.classes)} class folders, a model of "
            f"{subject.model.num_classes} classes, and {what}; name the folders as its classes"
        )
    return relabelled(samples, names)


def relabelled(samples: Files, names: Sequence[str]) -> Files:
    """The samples of the classes `names`, with the index in `names` as label."""
    place = {name: number for number, name in enumerate(names)}
    labels = np.array([place.get(name, -1) for name in samples.classes])[samples.labels]
    kept = np.flatnonzero(labels >= 0)
    return Files(samples.root, [samples.names[number] for number in kept.tolist()], labels[kept], names)


def subset(subject: Subject) -> tuple[Files, list[int]]:
    """The samples of ImageNet-A or -O, and the indices of their classes among the model's 1000 outputs."""
    args = subject.args
    samples = read(args, "--data-dir", args.data_dir)
    known = ImageNetInfo().label_names()
    if len(samples.classes) != 200 or not set(samples.classes) <= set(known):
        raise missing(
            args,
            "--data-dir",
            args.data_dir,
            EXPECTED[args.protocol],
            f"it has {len(samples.classes)} class folders, {samples.classes[0]!r} first",
        )
    if subject.names != known:
        raise ValueError(
            f"--model {args.model}: {args.protocol} needs a model of ImageNet's 1000 classes, ordered by "
            f"WordNet id; this one has {subject.model.num_classes} outputs"
        )
    outputs = sorted(known.index(name) for name in samples.classes)
    return relabelled(samples, [known[number] for number in outputs]), outputs


def numbered(samples: Files) -> Files:
    """`samples` with their own index as label."""
    return Files(samples.root, samples.names, np.arange(len(samples)), samples.names)


def find_boxes(args: argparse.Namespace, samples: Files) -> list[Path]:
    """The annotation file of each sample."""
    found = {path.stem: path for path in Path(args.boxes or "").rglob("*.xml")} if args.boxes else {}
    stems = [Path(name).stem for name in samples.names]
    if absent := [stem for stem in stems if stem not in found]:
        raise missing(args, "--boxes", args.boxes, BOXES, f"no {absent[0]}.xml, nor {len(absent) - 1} others")
    return [found[stem] for stem in stems]


def true_boxes(annotation: Path, image: str) -> torch.Tensor:
    """float64 [n, 4] (x0, y0, x1, y1) in units of the image's width and height."""
    boxes = [
        [float(box.findtext(name, "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
        for box in ElementTree.parse(annotation).iter("bndbox")
    ]
    if not boxes:
        raise ValueError(f"{annotation}: no bndbox in it; leave the image out, or give its boxes")
    with Image.open(image) as opened:  # reads only the header; some annotations state another size
        width, height = opened.size
    return torch.tensor(boxes, dtype=torch.float64) / torch.tensor([width, height, width, height])


# The model.


def build(name: str, checkpoint: str | None, flag: str, size: Sequence[int] | None = None, **options: Any) -> Any:
    """A timm model with a checkpoint's weights, built for images of `size`; without a checkpoint, with timm's weights.

    Raises:
        ValueError: the model is unknown, or its weights cannot be read or downloaded.
    """
    model_flag = flag.replace("checkpoint", "model")
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"{model_flag} {name}: timm knows no such model; see timm.list_models()")
    if not checkpoint:
        try:
            with offline_unless_answered():
                return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub and the network may raise anything
            raise ValueError(
                f"{model_flag} {name}: timm could not get its weights ({first_line(error)}); "
                f"without a network, fetch them elsewhere and give {flag} FILE"
            ) from error
    model: Any = timm.create_model(name, **options)
    if size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    try:
        load_checkpoint(model, checkpoint)
    except FileNotFoundError as error:
        raise ValueError(f"{flag} {checkpoint}: no such file; give a checkpoint of {name}") from error
    except Exception as error:  # a foreign or damaged file may raise anything
        raise ValueError(
            f"{flag} {checkpoint}: it does not fit {name} ({first_line(error)}); give its model, "
            "--num-classes and --model-kwargs"
        ) from error
    return model


@contextmanager
def offline_unless_answered() -> Iterator[None]:
    """Switches the Hugging Face hub to its offline mode, with its cache only, if a first request fails.

    Its own client would retry each request for half a minute.
    """
    before = hub.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(hub.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # the type depends on the library that the hub's client uses
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def first_line(error: Exception) -> str:
    """Type and start of an error, short enough for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def set_size(model: Any, size: tuple[int, int], flag: str) -> None:
    """Adapts a model to images of this size; position embeddings are resampled as in the public protocols."""
    patches = getattr(model, "patch_embed", None)
    if patches is None or not hasattr(model, "set_input_size") or tuple(patches.img_size) == tuple(size):
        return
    check_patches(model, size, flag)
    before, grid = getattr(model, "pos_embed", None), patches.grid_size
    model.set_input_size(img_size=size)
    if isinstance(model, VisionTransformer) and before is not None:
        # timm antialiases by default, which changes the kernel.
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        model.pos_embed = nn.Parameter(
            resample_abs_pos_embed(before.data, list(patches.grid_size), list(grid), prefix, antialias=False)
        )


def check_patches(model: Any, size: tuple[int, int], flag: str) -> None:
    """Raises ValueError if a model's patches do not divide images of this size."""
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if any(side % patch for side, patch in zip(size, patch_size, strict=True)):
        raise ValueError(
            f"{flag}: its patches of {patch_size} do not divide images of {tuple(size)}; give another --img-size"
        )


def build_subject(args: argparse.Namespace) -> Subject:
    """The model on its device, with the input settings of the protocol."""
    saved = saved_run(args)
    options = dict(args.model_kwargs, **({"num_classes": args.num_classes} if args.num_classes else {}))
    model = build(args.model, args.checkpoint, "--checkpoint", size=saved.get("size"), **options)
    wanted: dict[str, Any] = {"img_size": 512 if args.protocol == "wsas" else None}
    if not (args.protocol == "top1" and saved):  # otherwise validated as in training
        wanted |= {
            "crop_pct": 1.0 if args.model.startswith("xcit") else 0.875,  # as in the paper
            "interpolation": "bicubic" if args.protocol == "top1" else "bilinear",
        }
    given = {key: value for key, value in vars(args).items() if value is not None}
    data = resolve_data_config({**wanted, **given}, model=model)
    set_size(model, data["input_size"][1:], f"--model {args.model}")
    device = find_device(args.device)
    network = Normalised(model, data["mean"], data["std"]).eval().to(device)
    names = saved.get("classes") or (ImageNetInfo().label_names() if model.num_classes == 1000 else None)
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    return Subject(args, model, network, data, names, autocast)


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {first_line(error)}; give auto, cpu, cuda or cuda:N") from error
    return device


def saved_run(args: argparse.Namespace) -> dict[str, Any]:
    """Fills in flags that were not given from a checkpoint of pipelines.train.

    Returns:
        `classes`, and the `size` (H, W) of training, or None for the model's own size; {} for other files.
    """
    try:
        content = torch.load(args.checkpoint, map_location="cpu", weights_only=True) if args.checkpoint else {}
    except Exception:  # timm reads other formats, or rejects them
        content = {}
    saved = content if isinstance(content, dict) and content.get("run_format") == FORMAT else {}
    flags = saved.get("args", {})
    taken = FROM_THE_RUN + SIZE_OF_THE_RUN * (args.protocol != "wsas")
    for key in taken + FROM_ITS_VALIDATION * (args.protocol == "top1"):
        if not getattr(args, key):
            setattr(args, key, flags.get(key) or getattr(args, key))
    if args.model is None:
        raise ValueError("--model: give the name of a timm model; only checkpoints of pipelines.train contain it")
    if not saved:
        return {}
    args.num_classes = args.num_classes or len(saved["classes"])
    shape = flags["input_size"] or [3, flags["img_size"], flags["img_size"]]
    return {"classes": saved["classes"], "size": shape[1:] if shape[1] else None}


# The command line.


def grid(text: str) -> tuple[int, int]:
    """An argparse type: 4x8 for 4 rows and 8 columns."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: give ROWSxCOLUMNS, such as 4x8")
    return int(sides[0]), int(sides[1])


def build_parser() -> argparse.ArgumentParser:
    """Every flag; a group whose title names protocols applies only to them."""
    parser = argparse.ArgumentParser(
        "python -m pipelines.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", choices=PROTOCOLS)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="name of a timm model; None: the checkpoint's")
    add("--checkpoint", metavar="FILE", help="checkpoint of pipelines.train, or any file that timm.create_model loads")
    add("--pretrained", action="store_true", help="use timm's weights instead")
    add("--num-classes", type=int, help="outputs of the model; None: the checkpoint's, else timm's")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="further model arguments")

    add = parser.add_argument_group("images").add_argument
    add("--data-dir", required=True, metavar="DIR", help="data of the protocol; an error lists what is missing")
    add("--img-size", type=int, help="side of a square input; None: the model's, for wsas 512")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="input of any shape")
    add("--crop-pct", type=float, help="centre crop; None: .875, XCiT 1, or for top1 that of a run's checkpoint")
    add("--interpolation", choices=("bilinear", "bicubic"), help="None: bilinear, for top1 bicubic")
    add("--mean", type=float, nargs=3, help="mean of each channel, in [0, 1]; None: the model's")
    add("--std", type=float, nargs=3, help="standard deviation of each channel, in [0, 1]; None: the model's")

    add = parser.add_argument_group("shuffle").add_argument
    add(
        "--grids",
        type=grid,
        nargs="+",
        default=[(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)],
        metavar="RxC",
        help="rows and columns of cells (1x1 2x2 2x4 4x4 4x8 8x8)",
    )
    add = parser.add_argument_group("shuffle, occlusion").add_argument
    add(
        "--perm",
        choices=("batch", "sample"),
        default="batch",
        help="one draw per batch, as in the public code (default), or one per image",
    )
    add("--seeds", type=int, default=3, metavar="N", help="number of draws; their spread is reported (3)")
    add("--seed", type=int, default=0, help="seed of the first draw (0)")
    add = parser.add_argument_group("occlusion").add_argument
    add(
        "--drop",
        nargs="+",
        choices=("random", "salient", "non-salient"),
        metavar="MODE",
        default=["random", "salient", "non-salient"],
        help="what is dropped (random salient non-salient)",
    )
    add(
        "--losses",
        type=int,
        nargs="+",
        default=list(range(0, 100, 10)),
        metavar="PERCENT",
        help="share that is dropped, of the cells, or of the attention in the salient modes (0 10 ... 90)",
    )
    add("--drop-grid", type=grid, default=(14, 14), metavar="RxC", help="cells of random drops (14x14)")
    add("--dino-model", default="vit_small_patch16_224.dino", help="model whose attention is saliency (%(default)s)")
    add("--dino-checkpoint", metavar="FILE", help="its weights; None: timm's")
    add = parser.add_argument_group("occlusion, wsol").add_argument
    add("--head", help="index, mean or max; None: 1 for occlusion, as in the public code, mean for wsol")
    add = parser.add_argument_group("wsas, wsol").add_argument
    add("--mass", type=float, default=0.9, help="share of the attention that counts as foreground (.9)")
    add = parser.add_argument_group("wsol").add_argument
    add("--boxes", metavar="DIR", help="bounding boxes of ImageNet's validation set")
    add("--component", choices=("largest", "all"), default="largest", help="components that the box encloses (largest)")
    add("--connectivity", type=int, choices=(4, 8), default=4, help="connectivity of components (4)")
    add("--boxes-per-image", choices=("best", "mean"), default="best", help="IoU if there are several boxes (best)")
    add = parser.add_argument_group("imagenet-a").add_argument
    add("--bin-size", type=int, default=100, metavar="N", help="samples per bin of the calibration error (100)")
    add = parser.add_argument_group("imagenet-o").add_argument
    add("--val-dir", metavar="DIR", help="ImageNet's validation set")

    add = parser.add_argument_group("run").add_argument
    add("-b", "--batch-size", type=int, default=256, help="images per batch (256)")
    add("-j", "--workers", type=int, help="DALI's CPU threads; None: the CPUs it may use")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="type of mixed precision (float16)")
    add("--out", metavar="FILE.json", help="write the result and its origin")
    add("--figure", metavar="FILE.png", help="plot the result beside the paper's")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; flags that are invalid or would be ignored end the program here."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for group in parser._action_groups:
        theirs = (group.title or "").split(", ")
        given = [action for action in group._group_actions if getattr(args, action.dest, None) != action.default]
        if given and set(theirs) <= PROTOCOLS.keys() and args.protocol not in theirs:
            parser.error(f"{given[0].option_strings[-1]} is for {group.title}: leave it out with {args.protocol}")
    if bool(args.checkpoint) == args.pretrained:
        parser.error("give either --checkpoint FILE or --pretrained")
    for name, least in {"seeds": 1, "seed": 0, "batch_size": 1, "bin_size": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")
    if not 0 < args.mass <= 1:
        parser.error(f"--mass {args.mass}: give a share in (0, 1]")
    if odd := [loss for loss in args.losses if not 0 <= loss < 100]:
        parser.error(f"--losses {odd[0]}: give percents in [0, 100)")
    args.head = args.head or {"occlusion": "1"}.get(args.protocol, "mean")
    if args.head not in ("mean", "max") and not args.head.isdecimal():
        parser.error(f"--head {args.head}: give a number, mean or max")
    return args


def require_packages(args: argparse.Namespace) -> None:
    """Raises ValueError if the command needs a package that is missing, before it does any work."""
    if args.protocol == "imagenet-o":
        extras.require("sklearn", args.protocol)
    if args.protocol == "wsol" and args.component == "largest":
        extras.require("scipy", "--component largest")
    if args.figure:
        extras.require("matplotlib", f"--figure {args.figure}")


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluates as the command line says and prints the result; also writes and plots it if requested.

    Args:
        argv: the command line without the program's name; None: the process's own.

    Returns:
        The result, as written to `--out`.

    Raises:
        ValueError: an argument is invalid, or data, weights or a package are missing.
    """
    args = parse_args(argv)
    require_packages(args)
    torch.set_float32_matmul_precision("high")
    subject = build_subject(args)
    values = PROTOCOLS[args.protocol](subject)
    meta = report.metadata("pipelines.evaluate", sys.argv[1:] if argv is None else argv, subject.device)
    result = report.build(args, values, subject.data, meta)
    print(report.table(result))
    if args.out:
        report.write(args.out, result)
    if args.figure:
        report.draw(result, args.figure)
    return result


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m pipelines.evaluate: {error}")
