"""Images whose pixels reveal what was done to them, and folders of such images."""

import io

import numpy as np
from PIL import Image

from lumix_dali.data.files import Files


def colours(count, seed=0):
    """uint8 [count, 3], any two at least 60 apart."""
    rng, chosen = np.random.default_rng(seed), []
    while len(chosen) < count:
        colour = rng.integers(0, 256, 3)
        if all(np.linalg.norm(colour - other) >= 60 for other in chosen):
            chosen.append(colour)
    return np.uint8(chosen)


def colour_folder(root, count, per_class=3, size=(20, 26)):
    """One colour per file: ROOT/CLASS/NUMBER.png. Returns the colours in the order of `class_folder`."""
    chosen = colours(count)
    for number, colour in enumerate(chosen):
        # sizes differ by file and are unrelated to the class
        pixels = np.broadcast_to(colour, (size[0] + number % 3, size[1] - number % 5, 3))
        write(pixels, root / f"class {number // per_class}" / f"{number:03}.png")
    return chosen


def ramps(height, width, blue=0):
    """uint8 [H, W, 3]: red is the column, green the row, both from 0; blue identifies the image."""
    image = np.full((height, width, 3), blue, np.uint8)
    image[..., 0] += np.arange(width, dtype=np.uint8)
    image[..., 1] += np.arange(height, dtype=np.uint8)[:, None]
    return image


def ramp_samples(root, count, size=(40, 48)):
    """`Files` of `ramps` whose label and blue identify the file; crop, flip and mixing show in the pixels."""
    for number in range(count):
        write(
            ramps(size[0] + number % 4, size[1] - number % 3) * [4, 5, 0] + [0, 0, 9 * number],
            root / f"{number:02}.png",
        )
    return Files(str(root), sorted(f.name for f in root.iterdir()), np.arange(count), [str(k) for k in range(count)])


def write(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels)).save(path, **options)


def encoded(pixels, kind, **options):
    """Bytes of an image file of `kind`, Pillow's name for a format."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(pixels)).save(file, kind, **options)
    return file.getvalue()


def damaged():
    """{name: content} of files that cannot be decoded; None if the file does not exist."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 3))
    jpeg, png, gif = encoded(noise, "JPEG", quality=90), encoded(noise, "PNG"), encoded(noise, "GIF")
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 4],
        "zero bytes.jpg": b"",
        "text.jpg": b"<html>404 not found</html>\n" * 20,
        "cut gif.jpg": gif[: len(gif) // 2],
        "50 bytes.jpg": jpeg[:50],
        "truncated.png": png[: len(png) // 2],
        "missing.jpg": None,
    }
