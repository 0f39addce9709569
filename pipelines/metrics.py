"""The metrics and image transforms of `pipelines.evaluate`, as pure functions of arrays.

Where a protocol's public code differs from its description, the code's behaviour is the default, because the paper's
numbers come from it; an argument selects the corrected version.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torchvision.ops import masks_to_boxes


def rms_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bin_size: int = 100, skip_last: bool = True
) -> float:
    """Root mean square of confidence - accuracy over bins of equal mass (Hendrycks et al., arXiv 1907.07174).

    Args:
        confidence: [n] in [0, 1].
        correct: [n] of 0 and 1.
        bin_size: samples per bin, in ascending confidence; the last bin also holds the remainder.
        skip_last: leave out the bin of the most confident samples but still divide by n, as the public
            evaluation of ImageNet-A does; False: the definition.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: `skip_last` with a single bin, which would always give 0.
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    gap = (confidence - correct)[np.argsort(confidence, kind="stable")]
    bins = max(1, len(gap) // bin_size)
    if skip_last and bins == 1:
        raise ValueError(
            f"bin_size={bin_size}: {len(gap)} samples make one bin, and the last one is left out; "
            f"give a bin_size of at most {len(gap) // 2}"
        )
    starts = np.arange(bins) * bin_size
    sizes = np.diff(starts, append=len(gap))
    squares = np.add.reduceat(gap, starts) ** 2 / sizes / len(gap)
    return float(np.sqrt(squares[:-1].sum() if skip_last else squares.sum()))


def response_rate_accuracy(confidence: ArrayLike, correct: ArrayLike) -> np.ndarray:
    """Accuracy over the k most confident samples, for k = 1..n; its mean is AURRA (arXiv 1907.07174).

    Args:
        confidence: [n].
        correct: [n] of 0 and 1.

    Returns:
        float64 [n] in [0, 1].
    """
    descending = np.argsort(-np.asarray(confidence, float), kind="stable")
    return np.asarray(correct, float)[descending].cumsum() / np.arange(1, len(descending) + 1)


def shuffle_cells(images: torch.Tensor, order: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Permutes the cells of a grid over each image (Naseer et al., arXiv 2105.10497).

    Args:
        images: [B, C, H, W], any dtype.
        order: int64 [1, n] or [B, n]; output cell i is input cell order[i], numbered row by row.
        grid: (rows, columns), which must divide (H, W); n = rows * columns.

    Returns:
        As `images`.
    """
    batch, channels, height, width = images.shape
    rows, columns = grid
    cells = images.reshape(batch, channels, rows, height // rows, columns, width // columns)
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    cells = cells[torch.arange(batch, device=images.device)[:, None], order]
    return cells.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def drop_cells(images: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Sets the pixels of cells to 0 (PatchDrop of arXiv 2105.10497).

    Args:
        images: [B, C, H, W], not yet normalised: 0 is black.
        dropped: bool [1 or B, rows, columns], on a grid that divides (H, W).

    Returns:
        As `images`.
    """
    return images.masked_fill(enlarge(dropped, images.shape[-2:])[:, None], 0)


def enlarge(cells: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Cells [..., rows, columns] as pixels [..., H, W]; the grid divides `size`, (H, W)."""
    rows, columns = cells.shape[-2:]
    return cells.repeat_interleave(size[0] // rows, -2).repeat_interleave(size[1] // columns, -1)


def top_mass(attention: torch.Tensor, mass: float) -> torch.Tensor:
    """The smallest set of cells with at least this share of the attention (DINO, arXiv 2104.14294).

    Args:
        attention: [..., rows, columns], not negative.
        mass: in [0, 1]; 0 selects no cell, 1 all cells that are not 0.

    Returns:
        bool, shape of `attention`.
    """
    flat = attention.double().flatten(-2)  # in float32, 1024 shares may not sum to 1
    value, order = flat.sort(descending=True, stable=True)
    stronger = value.cumsum(-1) - value
    taken = (stronger < mass * flat.sum(-1, keepdim=True)) & (value > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken).view(attention.shape)


def best_jaccard(masks: torch.Tensor, target: torch.Tensor, ignore_void: bool = False) -> float:
    """Jaccard index of the best mask for each class, averaged over the classes of an image (arXiv 2105.10497).

    Args:
        masks: bool [M, H, W], of M heads.
        target: [H, W] of class numbers; 0 is background and 255 void, neither of them a class.
        ignore_void: leave void pixels out, as VOC's rules do; False counts them as background, as the public
            code does despite its comments.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: the image has no class.
    """
    if ignore_void:
        masks = masks & (target != 255)
    classes = [c for c in target.unique().tolist() if c not in (0, 255)]
    if not classes:
        raise ValueError("target: it has only background and void; leave out images without an object")
    truth = torch.stack([target == c for c in classes])[:, None]
    union = (truth | masks).flatten(2).sum(2)
    return float(((truth & masks).flatten(2).sum(2) / union).amax(1).mean())


def mask_box(mask: torch.Tensor, largest: bool = True, corners: bool = False) -> torch.Tensor:
    """The bounding box of a mask, or of its largest connected component.

    Args:
        mask: bool [rows, columns], not empty.
        largest: use only the largest component; the first one in case of a tie.
        corners: also connect cells that touch at a corner.

    Returns:
        float64 [4] on the CPU: (x0, y0, x1, y1), half-open, in units of the mask's width and height.
    """
    if largest:
        from scipy import ndimage

        parts, _ = ndimage.label(mask.cpu(), np.ones((3, 3)) if corners else None)
        mask = torch.from_numpy(parts == 1 + np.bincount(parts[parts > 0] - 1).argmax())
    x0, y0, x1, y1 = masks_to_boxes(mask[None].cpu())[0].double()  # inclusive: ends at the last cell
    rows, columns = mask.shape
    return torch.stack([x0 / columns, y0 / rows, (x1 + 1) / columns, (y1 + 1) / rows])
