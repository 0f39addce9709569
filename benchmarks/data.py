"""A class folder of JPEGs with ImageNet's statistics, for benchmarks on a machine that has no ImageNet.

A loader's speed depends on bytes, pixels and chroma subsampling, not on what a picture shows. ImageNet's files have
110 kB and .2 Mpixel on average; three quarters of them are 4:4:4, the others 4:2:0. Here, textures with detail at
every scale are compressed at the quality that meets a file size drawn for each image.

    python -m benchmarks.data                                   # 1000 images in data/synthetic-imagenet
    python -m benchmarks.data --root DIR --images 10000 --classes 1000
"""

import argparse
import io
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .harness import positive

DEFAULT = Path("data/synthetic-imagenet")
MEAN_BYTES, SPREAD = 110e3, 0.5  # sizes are lognormal
_DONE = ".complete.json"


def generate(root: str | os.PathLike = DEFAULT, images: int = 1000, classes: int = 100, seed: int = 0) -> Path:
    """Writes ``root/CLASS/NUMBER.jpg`` unless it exists; the same arguments give the same files.

    Args:
        root: folder; an incomplete set from an interrupted run is written again.
        images: number of files.
        classes: number of class folders; files are assigned to them in turn.
        seed: seed of all random numbers.

    Returns:
        `root`.

    Raises:
        ValueError: there are fewer images than classes, or `root` holds something else.
    """
    root = Path(root)
    if images < classes:
        raise ValueError(f"--images {images}: fewer than --classes {classes}; every class needs an image")
    wanted = dict(images=images, classes=classes, seed=seed)
    if (root / _DONE).exists():
        if (found := json.loads((root / _DONE).read_text())) != wanted:
            raise ValueError(f"--root {root}: holds a set made with {found}, not {wanted}; give another folder")
        return root
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--root {root}: not empty, and not complete; remove it, or give another folder")
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for label in range(classes):
        (partial / f"c{label:04}").mkdir(parents=True)

    def make(index: int) -> None:
        path = partial / f"c{index % classes:04}" / f"{index:06}.jpg"
        path.write_bytes(jpeg(np.random.default_rng([seed, index]), subsampled=index % 4 == 3))

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(make, range(images)), f"writing {root}", images, unit="image", disable=None))
    (partial / _DONE).write_text(json.dumps(wanted))
    shutil.rmtree(root, ignore_errors=True)
    os.replace(partial, root)
    return root


def jpeg(rng: np.random.Generator, subsampled: bool) -> bytes:
    """A JPEG of about the given size, 4:2:0 if `subsampled`, else 4:4:4."""
    wanted = rng.lognormal(np.log(MEAN_BYTES) - SPREAD**2 / 2, SPREAD)  # their mean is MEAN_BYTES
    image = texture(rng)
    low, high = 10, 100  # qualities whose files are too small and too large
    while high - low > 1:
        quality = (low + high) // 2
        low, high = (quality, high) if len(_encode(image, quality, subsampled)) < wanted else (low, quality)
    return min((_encode(image, q, subsampled) for q in (low, high)), key=lambda data: abs(len(data) - wanted))


def texture(rng: np.random.Generator) -> Image.Image:
    """An RGB texture of ImageNet's usual sizes: 500 pixels wide or high, .2 Mpixel on average."""
    size = (500, int(rng.integers(300, 501)))
    width, height = size if rng.random() < 0.75 else size[::-1]
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256, 512):  # one octave each
        noise = rng.normal(0, 90 / cells**0.4, (cells, cells, 3)).clip(-128, 127) + 128
        octave = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(octave, np.float32) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _encode(image: Image.Image, quality: int, subsampled: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0" if subsampled else "4:4:4")
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=DEFAULT, metavar="DIR", help=f"folder to write (default: {DEFAULT})")
    parser.add_argument("--images", type=positive, default=1000, help="number of images (default: 1000)")
    parser.add_argument("--classes", type=positive, default=100, help="number of class folders (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    args = parser.parse_args(argv)
    try:
        root = generate(args.root, args.images, args.classes, args.seed)
    except ValueError as error:
        parser.error(str(error))
    sizes = [path.stat().st_size for path in root.rglob("*.jpg")]
    print(f"{root}: {len(sizes)} images, {np.mean(sizes) / 1e3:.0f} kB on average")


if __name__ == "__main__":
    main()
