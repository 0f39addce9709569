"""``lumix-dali show ROOT -o mixed.png``: see what the pipeline does to your images."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from PIL import Image, ImageDraw, ImageFont

KINDS = ("unmixed", "Mixup", "CutMix", "mixed")
BOX_COLOUR = (255, 64, 64)


def show(root: str, out: str, *, count: int = 16, columns: int = 4, **options: Any) -> None:
    """Writes a picture of mixed samples as the model gets them: pixels, box, classes and λ0 (arXiv 2211.15846).

    Args:
        root: class folder or list file.
        out: name of the picture, by whose ending Pillow chooses the format.
        count: number of samples.
        columns: samples a row.
        options: further arguments of `create_loader`; without an alpha, Mixup .8 and CutMix 1 are drawn.

    Raises:
        ValueError: as `create_loader`.
    """
    from .loader import create_loader

    if not {"mixup_alpha", "cutmix_alpha", "cutmix_minmax"} & options.keys():
        options |= dict(mixup_alpha=0.8, cutmix_alpha=1.0)
    options = dict(batch_size=count, drop_last=False, device="cpu") | options | dict(dtype="uint8")
    with create_loader(root, **options) as loader:
        images, target = next(iter(loader))
        rows = zip(images.permute(0, 2, 3, 1).numpy(), *(field.tolist() for field in target), strict=True)
        tiles = [_tile(Image.fromarray(image), loader.classes, *row) for image, *row in rows]
    width, height = tiles[0].size
    grid = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for place, tile in enumerate(tiles):
        grid.paste(tile, (place % columns * width, place // columns * height))
    grid.save(out)


def _tile(image: Image.Image, classes, label: int, partner_label: int, lam0: float, box, kind: int) -> Image.Image:
    zoom = max(1, round(224 / image.width))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    if kind == 2:
        y0, x0, y1, x1 = (zoom * edge for edge in box)
        if y0 < y1 and x0 < x1:
            ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline=BOX_COLOUR, width=2)
    lines = [f"{KINDS[kind]}  lam0 = {lam0:.3f}", f"{1 - lam0:.3f}  {classes[label]}"]
    if kind:
        lines.append(f"{lam0:.3f}  {classes[partner_label]}")
    tile = Image.new("RGB", (image.width + 8, image.height + 58), "white")
    tile.paste(image, (4, 4))
    font = ImageFont.load_default(13)
    for row, line in enumerate(lines):
        ImageDraw.Draw(tile).text((4, image.height + 6 + 16 * row), line[:34], "black", font=font)
    return tile


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lumix-dali", description="CutMix, Mixup and LUMix with NVIDIA DALI")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("show", help="a picture of mixed samples, each with its classes, λ0 and box")
    one.add_argument("root", help="class folder (ROOT/CLASS/IMAGE) or list file (PATH LABEL a line)")
    one.add_argument("-o", "--out", default="mixed.png", help="name of the picture (%(default)s)")
    one.add_argument("--count", type=int, default=16, help="number of samples (%(default)s)")
    one.add_argument("--input-size", type=int, default=224, help="side in pixels (%(default)s)")
    one.add_argument("--mixup", type=float, default=0.8, help="Mixup's alpha, 0: off (%(default)s)")
    one.add_argument("--cutmix", type=float, default=1.0, help="CutMix' alpha, 0: off (%(default)s)")
    one.add_argument("--mixup-mode", default="elem", help="elem or batch (%(default)s)")
    one.add_argument("--hflip", type=float, default=0.5, help="probability of a flip (%(default)s)")
    one.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        show(
            args.root,
            args.out,
            count=args.count,
            input_size=args.input_size,
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            mode=args.mixup_mode,
            hflip=args.hflip,
            seed=args.seed,
        )
    except (ValueError, OSError) as error:
        print(f"lumix-dali: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
