"""Photographs and masks of Pascal Context: the files, the random transforms, and the two DALI pipelines.

NumPy draws crops, flips and colour changes on the host, as a function of the seed and of the sample's number in the
run; DALI computes the pixels. One window per sample crops, scales and flips both the photograph and its mask:
`fn.resize` takes a region, and mirrors it if its ends are exchanged.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from lumix_dali.data import formats
from lumix_dali.decoding import decode, refused
from lumix_dali.loading.pipelines import IMAGENET_MEAN, IMAGENET_STD

from .flags import PASCAL_CONTEXT, VOID

LAYOUT = (
    "it needs JPEGImages/NAME.jpg, SegmentationClassContext/NAME.png and "
    "ImageSets/SegmentationContext/{train,val}.txt, as MMSegmentation's converter of Pascal Context writes them"
)
MAX_ASPECT = 8  # beyond it the longer side determines the scale, as in the official code


@dataclass(frozen=True)
class Split:
    """Photographs and masks of one part of the data."""

    photographs: Sequence[Path]
    masks: Sequence[Path]
    num_classes: int

    def __len__(self) -> int:
        return len(self.photographs)

    def mask(self, index: int) -> np.ndarray:
        """uint8 [H, W]: class numbers, and 255 for pixels without a class.

        Raises:
            ValueError: the file is not a mask of these classes.
        """
        path = self.masks[index]
        try:
            with Image.open(path) as image:
                if image.mode not in ("L", "P"):
                    raise ValueError(f"pixels of mode {image.mode}; give class numbers of 8 bits")
                mask = np.array(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if ((mask >= self.num_classes) & (mask != VOID)).any():
            odd = np.setdiff1d(mask, [*range(self.num_classes), VOID])[0]
            raise ValueError(
                f"{path}: it has class {odd}, and --num-classes {self.num_classes} ends at "
                f"{self.num_classes - 1}; {VOID} is for pixels without a class"
            )
        return mask

    def encoded(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """A photograph in a format that DALI decodes, uint8 [n], and its (height, width).

        Raises:
            ValueError: the file cannot be read.
        """
        path = self.photographs[index]
        try:
            with open(path, "rb") as file:
                seen = formats.look(file)
                if seen.decoder == formats.Decoder.PILLOW:
                    content = formats.bitmap(formats.pillow_pixels(file))
                else:
                    file.seek(0)
                    content = file.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return np.frombuffer(content, np.uint8), (seen.height, seen.width)


def load(root: str | Path, split: str, num_classes: int = len(PASCAL_CONTEXT)) -> Split:
    """The part of Pascal Context that ImageSets/SegmentationContext/SPLIT.txt lists.

    Args:
        root: the VOC2010 folder, or the folder that contains VOCdevkit/VOC2010.

    Raises:
        ValueError: a file is missing.
    """
    root = Path(root)
    root = root / "VOCdevkit/VOC2010" if (root / "VOCdevkit/VOC2010").is_dir() else root
    listed = root / "ImageSets/SegmentationContext" / f"{split}.txt"
    if not listed.is_file():
        raise ValueError(f"--data-dir {root}: {listed.relative_to(root)} is missing; {LAYOUT}")
    names = listed.read_text().split()
    if not names:
        raise ValueError(f"{listed}: it lists no photograph; give one name per line, without the file extension")
    photographs = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [root / "SegmentationClassContext" / f"{name}.png" for name in names]
    if absent := [path for path in (*photographs, *masks) if not path.is_file()]:
        raise ValueError(f"--data-dir {root}: {len(absent)} files are missing, such as {absent[0]}; {LAYOUT}")
    return Split(photographs, masks, num_classes)


@dataclass(frozen=True)
class Augmentation:
    """The official training transform: random scale, crop, flip and colours (MMSegmentation's, section 4.1).

    Args:
        size: side of the square crop.
        short_side: shorter side of the photograph at scale 1.
        scale: range of the scale.
        max_share: a crop in which one class covers this share is drawn again, up to ten times; 1: never.
        hflip: probability of a horizontal flip.
        brightness: max shift, in grey levels.
        contrast, saturation: ranges of the factors.
        hue: max rotation, in degrees.
        color_prob: probability of each of these four.
        mean, std: mean and standard deviation of the normalisation, in units of the full range [0, 1].

    Raises:
        ValueError: an argument is out of its range.
    """

    size: int = 480
    short_side: int = 520
    scale: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    hflip: float = 0.5
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36.0
    color_prob: float = 0.5
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("size", "short_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number of pixels > 0")
        for name in ("scale", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={low, high}: give (low, high) with 0 < low <= high")
        for name in ("max_share", "hflip", "color_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number in [0, 1]")


class Crop(NamedTuple):
    """The random transform of a photograph and its mask.

    Attributes:
        window: float32 [2, 2], (y, x) of the start and of the end, in source pixels; start > end mirrors.
        size: float32 [2], height and width of the resized window.
        colors: float32 [4]: contrast, shift in units of the full range, saturation, hue in degrees.
    """

    window: np.ndarray
    size: np.ndarray
    colors: np.ndarray


def resized(size: Sequence[int], short_side: float) -> np.ndarray:
    """int64 [2]: (height, width) of a photograph whose shorter side becomes `short_side`, as mmcv rounds."""
    height, width = size
    short = floor(short_side)
    factor = min(short / min(height, width), floor(MAX_ASPECT * short_side) / max(height, width))
    return np.array([floor(height * factor + 0.5), floor(width * factor + 0.5)])


def sample_crop(rng: np.random.Generator, mask: np.ndarray, transform: Augmentation) -> Crop:
    """Draws scale, crop, flip and colours of one sample from MMSegmentation's distributions.

    Args:
        mask: uint8 [H, W], used to reject crops with one dominant class.

    Note:
        The share of a class is counted in source pixels; MMSegmentation counts pixels of the scaled mask.
    """
    full = resized(mask.shape, transform.short_side * rng.uniform(*transform.scale))
    size = np.minimum(full, transform.size)
    for _ in range(11):
        start = rng.integers(0, full - size + 1)
        window = np.stack([start, start + size]) * (np.array(mask.shape) / full)
        if transform.max_share == 1 or not dominated(mask, window, transform.max_share):
            break
    if rng.random() < transform.hflip:
        window[:, 1] = window[::-1, 1].copy()
    return Crop(window.astype(np.float32), size.astype(np.float32), _colors(rng, transform))


def dominated(mask: np.ndarray, window: np.ndarray, max_share: float) -> bool:
    """Whether one class covers at least `max_share` of a window's labelled pixels, or is the only one."""
    low, high = np.floor(window[0]).astype(int), np.ceil(window[1]).astype(int)
    counts = np.bincount(mask[low[0] : high[0], low[1] : high[1]].ravel(), minlength=256)
    counts[VOID] = 0
    return bool((counts > 0).sum() < 2 or counts.max() >= max_share * counts.sum())


def _colors(rng: np.random.Generator, transform: Augmentation) -> np.ndarray:
    shift = rng.uniform(-transform.brightness, transform.brightness) / 255
    contrast, saturation = rng.uniform(*transform.contrast), rng.uniform(*transform.saturation)
    hue = rng.uniform(-transform.hue, transform.hue)
    given = rng.random(4) < transform.color_prob
    contrast, shift, saturation, hue = np.where(given, [contrast, shift, saturation, hue], [1, 0, 1, 0])
    return np.array([contrast, contrast * shift, saturation, hue], np.float32)  # mmcv shifts first


class TrainSource:
    """An endless source of batches for `external_source`, each a function of (seed, batch number).

    Args:
        split: the training photographs.
        transform: the random transform.
        batch_size: samples per batch; a batch may span two epochs.
        seed: seed of all random numbers.
        first: number of the first batch, above 0 if a run is resumed.
        threads: number of threads that read files.
    """

    def __init__(
        self, split: Split, transform: Augmentation, batch_size: int, seed: int, first: int = 0, threads: int = 2
    ):
        self.split, self.transform, self.seed = split, transform, seed
        self.batch_size, self.first = batch_size, first
        self._pool = ThreadPoolExecutor(threads)
        self._order = lru_cache(2)(self._shuffled)

    def __call__(self, info: Any) -> tuple[list[np.ndarray], ...]:
        return self.batch(self.first + info.iteration)

    def batch(self, number: int) -> tuple[list[np.ndarray], ...]:
        """Lists of encoded photographs, of masks [H, W, 1], and of the three fields of `Crop`."""
        samples = self._pool.map(self.sample, range(number * self.batch_size, (number + 1) * self.batch_size))
        encoded, masks, *crops = zip(*samples, strict=True)
        return list(encoded), list(masks), *map(list, crops)

    def sample(self, number: int) -> tuple[np.ndarray, ...]:
        """The sample with this number in the run.

        Raises:
            ValueError: its photograph or mask is invalid, or they differ in size.
        """
        index = self.index(number)
        (encoded, size), mask = self.split.encoded(index), self.split.mask(index)
        if mask.shape != size:
            raise ValueError(
                f"{self.split.masks[index]}: its size is {mask.shape}, that of "
                f"{self.split.photographs[index].name} {size} (height, width)"
            )
        crop = sample_crop(np.random.default_rng([self.seed, 1, number]), mask, self.transform)
        return encoded, mask[..., None], *crop

    def index(self, number: int) -> int:
        """The index in the split of the sample with this number in the run."""
        epoch, position = divmod(number, len(self.split))
        return int(self._order(epoch)[position])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.split))


@pipeline_def
def train_pipeline(source: Callable, *, size: int, mean: Sequence[float], std: Sequence[float]):
    """Crops, scales and flips photograph and mask together, changes colours, normalises and pads.

    Args:
        source: a `TrainSource`.
        size: side of the output.
        mean, std: mean and standard deviation of the normalisation, in units of the full range [0, 1].

    Returns:
        float32 [B, 3, size, size], 0 where padded, and uint8 [B, size, size, 1], 255 where padded.

    Note:
        Saturation and hue are linear in YIQ, as in DALI, and colours are clipped once after brightness and contrast
        and once at the end; mmcv works in HSV. Masks are scaled to the nearest pixel centre, which keeps them
        aligned with the photograph; OpenCV's nearest neighbour is off by up to half a pixel.
    """
    encoded, mask, window, shape, colors = fn.external_source(
        source,
        num_outputs=5,
        batch=True,
        batch_info=True,
        ndim=[1, 3, 2, 1, 1],
        dtype=[types.UINT8, types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT],
        layout=["", "HWC", "", "", ""],
    )
    region = dict(size=shape, roi_start=window[0], roi_end=window[1], antialias=False)
    image = fn.resize(decode(encoded, _whole), interp_type=types.INTERP_LINEAR, **region)
    mask = mask if Pipeline.current().device_id is None else mask.gpu()
    mask = fn.resize(mask, interp_type=types.INTERP_NN, **region)
    image = fn.brightness_contrast(image, contrast_center=0.0, contrast=colors[0], brightness_shift=colors[1])
    image = fn.hsv(image, saturation=colors[2], hue=colors[3])
    padded = dict(crop=(size, size), crop_pos_x=0.0, crop_pos_y=0.0, out_of_bounds_policy="pad")
    image = _normalised(image, mean, std, fill_values=0.0, **padded)
    return image, fn.crop(mask, fill_values=float(VOID), **padded)


@pipeline_def
def eval_pipeline(source: Callable, *, scales: int, mean: Sequence[float], std: Sequence[float]):
    """A photograph at every scale.

    Args:
        source: yields lists of encoded photographs and of float32 [scales, 2], their heights and widths.

    Returns:
        `scales` batches of float32 [3, H, W].
    """
    encoded, sizes = fn.external_source(
        source, num_outputs=2, batch=True, ndim=[1, 2], dtype=[types.UINT8, types.FLOAT]
    )
    image = decode(encoded, _whole)
    options = dict(interp_type=types.INTERP_LINEAR, antialias=False)
    return tuple(_normalised(fn.resize(image, size=sizes[k], **options), mean, std) for k in range(scales))


def _whole(shape: DataNode) -> tuple[DataNode, DataNode]:
    return shape[:2] * 0, shape[:2]


def _normalised(image: DataNode, mean: Sequence[float], std: Sequence[float], **options: Any) -> DataNode:
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in mean],
        std=[255 * s for s in std],
        **options,
    )


def train_batches(
    source: TrainSource, device: torch.device, threads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches for training.

    Returns:
        Iterator of images float32 [B, 3, H, W] and class numbers int64 [B, H, W], 255 for pixels without a class.

    Raises:
        ValueError: a file is invalid.
    """
    transform = source.transform
    pipe = train_pipeline(
        source,
        size=transform.size,
        mean=transform.mean,
        std=transform.std,
        batch_size=source.batch_size,
        num_threads=threads,
        device_id=_device_id(device),
    )
    for batch in count(source.first):
        numbers = range(batch * source.batch_size, (batch + 1) * source.batch_size)
        images, masks = _run(pipe, device, source.split, map(source.index, numbers))
        yield images, masks[..., 0].long()


def eval_images(
    split: Split,
    scales: Sequence[float],
    short_side: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    threads: int,
) -> Iterator[list[torch.Tensor]]:
    """Each photograph of the split at every scale.

    Args:
        short_side: shorter side of a photograph at scale 1.

    Returns:
        Iterator of lists of float32 [1, 3, H, W].

    Raises:
        ValueError: a file is invalid.
    """

    def samples() -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
        for index in range(len(split)):
            encoded, size = split.encoded(index)
            yield [encoded], [np.array([resized(size, short_side * scale) for scale in scales], np.float32)]

    pipe = eval_pipeline(
        samples(),
        scales=len(scales),
        mean=mean,
        std=std,
        batch_size=1,
        num_threads=threads,
        device_id=_device_id(device),
    )
    for index in range(len(split)):
        yield _run(pipe, device, split, [index])


def _run(pipe: Pipeline, device: torch.device, split: Split, indices: Iterable[int]) -> list[torch.Tensor]:
    """The next batch, which holds these samples; decoding errors name the file."""
    try:
        if device.type == "cpu":
            return [torch.from_dlpack(output.as_tensor()) for output in pipe.run()]
        with torch.cuda.device(device):  # DALI orders its work after the stream of the thread's current device
            outputs = pipe.run(torch.cuda.current_stream())
            return [torch.from_dlpack(output.as_tensor()) for output in outputs]
    except RuntimeError as error:
        for index, reason in refused({index: split.encoded(index)[0] for index in indices}).items():
            raise ValueError(
                f"{split.photographs[index]}: {reason}; replace it, or take it out of the list "
                "in ImageSets/SegmentationContext"
            ) from error
        raise


def _device_id(device: torch.device) -> int | None:
    return None if device.type == "cpu" else device.index or 0
