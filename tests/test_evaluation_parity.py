"""`create_loader(is_training=False)` against timm's evaluation transform on images of awkward sizes.

Only resizing differs, by rounding. A crop that is off by a pixel, a wrong size, or a region decoded without the
margin that the filter needs differs by far more.
"""

import numpy as np
import pytest
from images import write
from PIL import Image

from lumix_dali import create_loader

timm_data = pytest.importorskip("timm.data")

# Height and width: exact, one off, odd, long, narrow, and smaller and larger than what is asked for.
SIDES = [
    *[(224, 224), (225, 224), (224, 226), (256, 256), (301, 299), (97, 131), (183, 219)],
    *[(37, 501), (501, 37), (60, 1000), (1000, 60), (2, 300), (300, 2), (1, 1), (1, 5), (3, 2)],
    *[(640, 481), (479, 640), (700, 901)],
]
# Resized to cover 182×219, one of their sides ends in .5, after an even or an odd number.
HALVES = [
    *[(160, 192), (163, 146), (351, 234), (143, 146), (208, 364), (156, 369)],
    *[(352, 192), (325, 146), (337, 146), (292, 365)],
]


def photograph(height, width, seed):
    """uint8 [H, W, 3]: noise with the 1/f spectrum of photographs, and edges of rectangles of any colour."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / max(height, width)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    noise = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    image = 128 + 50 * noise / max(noise.std(), 1e-6)
    for _ in range(6):
        (y0, y1), (x0, x1) = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
        image[y0:y1, x0:x1] = (image[y0:y1, x0:x1] + rng.integers(0, 256, 3)) / 2
    return np.clip(image, 0, 255)


def written(root, sizes):
    """{file: image}: one photograph of each size."""
    images = {}
    for number, sides in enumerate(sizes):
        file = root / "class" / f"{number:02}.png"
        write(photograph(*sides, number), file, compress_level=1)
        images[file] = Image.open(file)
        images[file].load()
    return images


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return written(tmp_path_factory.mktemp("odd"), SIDES)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return written(tmp_path_factory.mktemp("halves"), HALVES)


def differences(files, size, **options):
    """{(height, width): difference [C, H, W] from timm's image in grey levels}."""
    transform = timm_data.create_transform((3, *size), **options, use_prefetcher=True)  # which keeps uint8
    root = next(iter(files)).parents[1]
    with create_loader(
        root, batch_size=8, input_size=size, is_training=False, dtype="uint8", device="cpu", **options
    ) as loader:
        ours = [image for images, _ in loader for image in images.numpy().astype(int)]
    return {
        image.size[::-1]: np.abs(each - np.asarray(transform(image)))
        for each, image in zip(ours, files.values(), strict=True)
    }


def rim(levels):
    """Mean over the outermost two pixels on each side."""
    inside = levels[:, 2:-2, 2:-2]
    return (levels.sum() - inside.sum()) / (levels.size - inside.size)


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct"), [("center", 0.875), ("center", 0.95), ("center", 1.0), ("squash", 0.95)]
)
@pytest.mark.parametrize("size", [(224, 224), (160, 192)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_odd_sizes(odd, interpolation, size, crop_mode, crop_pct):
    """Within three tenths of a grey level. Outside the image DALI repeats the border and Pillow drops taps.

    With the cubic filter this shows in tiny images; in others, only if the crop reaches the border.
    """
    found = differences(odd, size, interpolation=interpolation, crop_mode=crop_mode, crop_pct=crop_pct)
    for sides, levels in found.items():
        few = interpolation == "bicubic" and min(sides) < 8
        assert levels.mean() < (1.25 if few else 0.3), sides
        if crop_mode == "center" and crop_pct < 1 and min(sides) >= 60:
            assert rim(levels) < 0.3, f"{sides}: the filter lacks what is around the crop"


def test_halves_are_rounded_to_even(halves):
    """timm's `ResizeKeepRatio` rounds as Python does; the other side of these images would end in .5."""
    found = differences(halves, (160, 192), interpolation="bilinear", crop_pct=0.875)
    assert {sides: round(levels.mean(), 2) for sides, levels in found.items() if levels.mean() >= 0.3} == {}
