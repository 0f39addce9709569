"""Sliding-window and multi-scale inference of Segmenter, mIoU and mAcc, and a figure of predicted masks."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.utils import draw_segmentation_masks

from ..progress import progress
from .data import Split, eval_images
from .flags import PASCAL_CONTEXT, VOID

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale evaluation, each with its mirror image
TABLE_4 = {"mAcc": (60.4, 60.9), "mIoU": (49.7, 50.3), "mIoU (MS)": (50.5, 50.7)}  # DeiT-S, LUMix-DeiT-S


class Protocol(NamedTuple):
    """How a photograph is evaluated.

    Attributes:
        short_side: shorter side of the photograph at scale 1.
        window: side of the square windows, the model's input.
        stride: stride of the windows.
        batch_size: windows per batch.
        mean, std: mean and standard deviation of the normalisation, in units of the full range [0, 1].
    """

    short_side: int
    window: int
    stride: int
    batch_size: int
    mean: Sequence[float]
    std: Sequence[float]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of the windows along a side; the last window ends at the image border."""
    return [*range(0, length - window, stride), length - window]


def slide(model: nn.Module, image: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Logits of an image of any size, averaged where windows overlap (official code of arXiv 2105.05633).

    Args:
        image: [1, 3, H, W], normalised; enlarged to the window if it is smaller.

    Returns:
        [1, K, H, W], or the enlarged size.
    """
    window, height, width = protocol.window, *image.shape[-2:]
    if min(height, width) < window:
        size = [window * side // min(height, width) for side in (height, width)]
        image = interpolate(image, size, mode="bilinear")
    height, width = image.shape[-2:]
    rows, columns = (starts(side, window, protocol.stride) for side in (height, width))
    corners = list(itertools.product(rows, columns))
    crops = torch.cat([image[..., y : y + window, x : x + window] for y, x in corners])
    logits = torch.cat([model(part).float() for part in crops.split(protocol.batch_size)])
    total = logits.new_zeros(1, logits.shape[1], height, width)
    count = logits.new_zeros(1, 1, height, width)
    for (y, x), part in zip(corners, logits, strict=True):
        total[..., y : y + window, x : x + window] += part
        count[..., y : y + window, x : x + window] += 1
    return total / count


def probabilities(
    model: nn.Module, images: Sequence[torch.Tensor], size: Sequence[int], flip: bool, protocol: Protocol
) -> torch.Tensor:
    """Class probabilities of a photograph, averaged over its scales and mirror images.

    Args:
        images: the photograph at every scale, [1, 3, H, W] each.
        size: original (H, W) of the photograph.
        flip: also use the mirror image of each.

    Returns:
        float [K, H, W].
    """
    total: Any = 0
    for image, mirrored in itertools.product(images, (False, True) if flip else (False,)):
        logits = slide(model, image.flip(-1) if mirrored else image, protocol)
        logits = interpolate(logits, list(size), mode="bilinear")
        total = total + (logits.flip(-1) if mirrored else logits)[0].softmax(0)
    return total / (len(images) * (2 if flip else 1))


class Prediction(NamedTuple):
    """A photograph's index in the split, its mask, uint8 [H, W], and the predicted mask, int64 [H, W]."""

    number: int
    truth: torch.Tensor
    found: torch.Tensor


def predictions(
    model: nn.Module, split: Split, protocol: Protocol, multi_scale: bool, device: torch.device, threads: int
) -> Iterator[Prediction]:
    """The predicted mask of every photograph, at its own size."""
    scales = SCALES if multi_scale else (1.0,)
    images = eval_images(split, scales, protocol.short_side, protocol.mean, protocol.std, device, threads)
    for index, variants in enumerate(images):
        truth = torch.from_numpy(split.mask(index)).to(device)
        yield Prediction(index, truth, probabilities(model, variants, truth.shape, multi_scale, protocol).argmax(0))


def scores(confusion: torch.Tensor) -> dict[str, Any]:
    """mIoU and mAcc as MMSegmentation defines them: means over the classes that have a value.

    Args:
        confusion: [K, K] of pixel counts, rows truth, columns prediction.

    Returns:
        {"mIoU": percent, "mAcc": percent, "IoU": [percent, or None for a class in neither]}.
    """
    matrix = confusion.double()
    right, truth, found = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = 100 * right / (truth + found - right)  # 0 / 0 is NaN: no value
    return {
        "mIoU": iou.nanmean().item(),
        "mAcc": (100 * right / truth).nanmean().item(),
        "IoU": [None if value != value else value for value in iou.tolist()],
    }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    protocol: Protocol,
    *,
    multi_scale: bool,
    device: torch.device,
    threads: int,
    autocast: AbstractContextManager,
    keep: int = 0,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Evaluates a model on a whole split.

    Args:
        multi_scale: all of `SCALES` with flips instead of scale 1.
        autocast: the context in which the model runs.
        keep: number of predictions to return, spread evenly over the split.

    Returns:
        `scores`, and the kept predictions.
    """
    model.eval()
    confusion = MulticlassConfusionMatrix(split.num_classes, ignore_index=VOID, validate_args=False).to(device)
    wanted = set(np.linspace(0, len(split) - 1, min(keep, len(split)), dtype=int).tolist()) if keep else set()
    kept = []
    with autocast, progress(len(split), "multi-scale" if multi_scale else "evaluation") as bar:
        for prediction in predictions(model, split, protocol, multi_scale, device, threads):
            confusion.update(prediction.found[None], prediction.truth[None].long())
            if prediction.number in wanted:
                kept.append(prediction)
            bar.update()
    return scores(confusion.compute().cpu()), kept


def table(found: dict[str, float], num_classes: int) -> str:
    """Results as text; for Pascal Context's classes, beside the paper's Table 4."""
    paper = TABLE_4 if num_classes == len(PASCAL_CONTEXT) else {}
    lines = [f"{'in %':12}{'here':>8}" + (f"{'paper: DeiT-S':>17}{'+ LUMix':>9}" if paper else "")]
    for name, value in found.items():
        baseline, lumix = paper.get(name, ("", ""))
        lines.append(f"{name:12}{value:8.2f}{baseline:>17}{lumix:>9}".rstrip())
    return "\n".join(lines)


def draw(split: Split, kept: Sequence[Prediction], path: str) -> None:
    """Draws one row per prediction: the photograph, its mask, and the predicted mask."""
    figure = Figure(figsize=(9.5, 2.4 * len(kept)), layout="constrained")
    grid = figure.subplots(len(kept), 3, squeeze=False)
    colors = palette(split.num_classes)
    shown: set[int] = set()
    for row, prediction in zip(grid, kept, strict=True):
        with Image.open(split.photographs[prediction.number]) as image:
            photograph = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        row[0].imshow(photograph.permute(1, 2, 0))
        for axes, mask in zip(row[1:], (prediction.truth, prediction.found), strict=True):
            layers = mask.cpu()[None] == torch.arange(split.num_classes)[:, None, None]
            axes.imshow(draw_segmentation_masks(photograph, layers, 0.6, colors).permute(1, 2, 0))
            shown |= {number for number in mask.unique().tolist() if number != VOID}
        row[0].set_ylabel(split.photographs[prediction.number].stem, fontsize="small")
    for axes, title in zip(grid[0], ("photograph", "mask", "predicted"), strict=True):
        axes.set_title(title, fontsize="medium")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    patches = [Patch(color="#{:02x}{:02x}{:02x}".format(*colors[k]), label=class_name(split, k)) for k in sorted(shown)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def class_name(split: Split, number: int) -> str:
    """The name of a Pascal Context class, or the class number for other data."""
    return PASCAL_CONTEXT[number] if split.num_classes == len(PASCAL_CONTEXT) else f"class {number}"


def palette(count: int) -> list[tuple[int, int, int]]:
    """Pascal VOC's colours: bits of the class number, spread over the channels."""
    numbers = np.arange(count)[:, None]
    colors = sum(((numbers >> (3 * bit + np.arange(3))) & 1) << (7 - bit) for bit in range(3))
    return [tuple(color) for color in np.asarray(colors).tolist()]
