"""The paper's protocols, Tables 5, 7, 8 and 9: each takes the subject and returns its values."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, resolve_data_config
from timm.utils import AttentionExtract
from torchvision.datasets import VOCSegmentation
from torchvision.ops import box_iou

from lumix_dali.data.files import Files

from . import metrics
from .evaluate_flags import BOXES, EXPECTED, IMAGENET
from .evaluation import (
    Normalised,
    Subject,
    Values,
    Variant,
    accuracies,
    build_model,
    check_patches,
    missing,
    read,
    set_size,
    top1,
)


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
    attend, scores = head_attention(subject, subject.model), []
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
    attend, best = head_attention(subject, subject.model), []
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


def head_attention(subject: Subject, model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
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
    model = build_model(args.dino_model, args.dino_checkpoint, "--dino-checkpoint", num_classes=0)
    set_size(model, subject.size, "--dino-model")
    attend = head_attention(subject, model)
    return lambda images: one_head(attend(images), args.head)


def one_head(attention: torch.Tensor, head: str) -> torch.Tensor:
    """[B, heads, rows, columns] to [B, rows, columns]: one head by its index, or "mean" or "max" over the heads."""
    if head in ("mean", "max"):
        return attention.mean(1) if head == "mean" else attention.amax(1)
    if int(head) >= attention.shape[1]:
        raise ValueError(f"--head {head}: the model has {attention.shape[1]} heads, counted from 0")
    return attention[:, int(head)]


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
