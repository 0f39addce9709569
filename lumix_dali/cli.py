"""The ``lumix-dali`` command.

It can ``show`` what the pipeline does to your images, ``check`` them before a run, ``convert`` them to shards, and
measure the ``speed`` of loading and training.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import __version__, checks
from .data import check, convert, sources
from .data.files import is_manifest, write_manifest
from .data.formats import MAX_PIXELS
from .data.storage import replacing
from .progress import bar
from .target import Kind

KINDS = {Kind.NONE: "unmixed", Kind.MIXUP: "Mixup", Kind.CUTMIX: "CutMix", Kind.OTHER: "mixed"}
# Asked before a scan, which may take hours.
_FROM_ONE = "count input_size workers ranks batch_size shard_size max_pixels max_size quality rounds num_threads"
_LOWEST = dict.fromkeys(_FROM_ONE.split(), 1) | dict(seed=0)
BOX_COLOUR = (255, 64, 64)
COLUMNS = 4  # of the picture
# What the partner is to the canvas; CutMix' line has the colour of its box.
PARTNERS: dict[Kind, tuple[str, Any]] = {Kind.MIXUP: ("blended", "black"), Kind.CUTMIX: ("pasted", BOX_COLOUR)}
LEGEND = (
    "below each image: the kind of mixing; the canvas's label, with its weight 1 - lam0; the partner's label, "
    "with lam0: pasted into the red box (CutMix), or blended over the whole image (Mixup)"
)


def show(root: str, out: str, *, count: int = 16, **options: Any) -> None:
    """Writes a picture of mixed samples as the model gets them: pixels, box, classes and λ0 (arXiv 2211.15846).

    Below each image stand the label of the canvas and that of the partner that is pasted or blended in.

    Args:
        root: class folder, list file, manifest or shards.
        out: name of the picture, by whose ending Pillow chooses the format.
        count: number of samples.
        options: further arguments of `create_loader`; without an alpha, Mixup .8 and CutMix 1 are drawn.

    Raises:
        ValueError: as `create_loader`.
    """
    from .loading.loader import create_loader

    if os.path.splitext(out)[1].lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: Pillow knows no format of this ending; give a name such as mixed.png")
    if not {"mixup_alpha", "cutmix_alpha", "cutmix_minmax"} & options.keys():
        options |= dict(mixup_alpha=0.8, cutmix_alpha=1.0)
    fixed: dict[str, Any] = dict(batch_size=count, dtype="uint8", device="cpu", drop_last=False)
    with create_loader(root, **options, **fixed) as loader:
        images, target = next(iter(loader))
        rows = zip(images.permute(0, 2, 3, 1).numpy(), *(field.tolist() for field in target[:5]), strict=True)
        classes = loader.classes or range(1 << 31)  # without names, numbers
        tiles = [_tile(Image.fromarray(image), classes, *row) for image, *row in rows]
    width, height = tiles[0].size
    grid = Image.new("RGB", (COLUMNS * width, -(-len(tiles) // COLUMNS) * height), "white")
    for number, tile in enumerate(tiles):
        grid.paste(tile, (number % COLUMNS * width, number // COLUMNS * height))
    with replacing(out) as file:
        grid.save(file, Image.registered_extensions()[os.path.splitext(out)[1].lower()])


def _tile(
    image: Image.Image,
    classes: Sequence[Any],
    label: int,
    partner_label: int,
    lam0: float,
    box: Sequence[int],
    kind: int,
) -> Image.Image:
    zoom = max(1, round(224 / image.width))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    if kind == Kind.CUTMIX:
        y0, x0, y1, x1 = (zoom * edge for edge in box)
        if y0 < y1 and x0 < x1:
            ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline=BOX_COLOUR, width=2)
    lines: list[tuple[str, Any]] = [
        (f"{KINDS[Kind(kind)]}  lam0 = {lam0:.3f}", "black"),
        (f"canvas {1 - lam0:.3f} {classes[label]}", "black"),
    ]
    if kind:
        role, colour = PARTNERS.get(Kind(kind), ("partner", "black"))
        lines.append((f"{role} {lam0:.3f} {classes[partner_label]}", colour))
    tile = Image.new("RGB", (image.width + 8, image.height + 58), "white")
    tile.paste(image, (4, 4))
    font = ImageFont.load_default(13)
    for row, (line, colour) in enumerate(lines):
        ImageDraw.Draw(tile).text((4, image.height + 6 + 16 * row), line[:34], colour, font=font)
    return tile


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 where `check` found faults, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="lumix-dali", description="CutMix, Mixup and LUMix with NVIDIA DALI")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True)
    for add in (_add_show, _add_check, _add_convert, _add_speed):
        add(commands)
    args = parser.parse_args(argv)
    try:
        for name, low in _LOWEST.items():
            if (value := getattr(args, name, None)) is not None:
                checks.whole(f"--{name.replace('_', '-')}", value, low)
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"lumix-dali: {error}", file=sys.stderr)
        return 2


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "show", help="a picture of mixed samples, each with its box, its labels and their weights", epilog=LEGEND
    )
    add = command.add_argument
    add("root", help="class folder (ROOT/CLASS/IMAGE), list file (PATH LABEL a line), manifest, or shards")
    add("-o", "--out", default="mixed.png", help="name of the picture (%(default)s)")
    add("--count", type=int, default=16, help="number of samples (%(default)s)")
    add("--input-size", type=int, default=224, help="side in pixels (%(default)s)")
    add("--mixup", type=float, default=0.8, help="Mixup's alpha, 0: off (%(default)s)")
    add("--cutmix", type=float, default=1.0, help="CutMix' alpha, 0: off (%(default)s)")
    add("--mixup-mode", default="elem", help="elem or batch (%(default)s)")
    add("--hflip", type=float, default=0.5, help="probability of a flip (%(default)s)")
    add("--aa", help="RandAugment before mixing, such as rand-m9-mstd0.5-inc1")
    add("--reprob", type=float, default=0.0, help="probability of random erasing before mixing (%(default)s)")
    add("--seed", type=int, default=0)
    command.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    show(
        args.root,
        args.out,
        count=args.count,
        input_size=args.input_size,
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        mode=args.mixup_mode,
        hflip=args.hflip,
        auto_augment=args.aa,
        re_prob=args.reprob,
        seed=args.seed,
    )
    print(f"wrote {args.out}; {LEGEND}")
    return 0


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("check", help="which files cannot be used, and why; writes a manifest")
    add = command.add_argument
    add("root", help="class folder, list file, manifest; or shards: a folder of them, one, or a glob")
    add("--full", action="store_true", help="decode every file, instead of only inspecting headers and ends")
    add("--manifest", metavar="FILE", help="write the usable files here, for create_loader")
    add("--report", metavar="FILE", help="write what was found here, as JSON")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="a larger image is bad (%(default)s)")
    add("--workers", type=int, help="processes; default: the CPUs this one may use")
    add("--ranks", type=int, default=1, help="say how many batches each of so many ranks gets (%(default)s)")
    add("--batch-size", type=int, default=256, help="of these batches (%(default)s)")
    command.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    report = check.scan(
        args.root, full=args.full, max_pixels=args.max_pixels, workers=args.workers, progress=bar("chunk")
    )
    print(check.show(report))
    epoch = report.epoch(args.ranks, args.batch_size)
    print("{ranks} rank(s), batches of {batch_size}: {batches} per rank, {left_out} samples left out".format(**epoch))
    if not epoch["batches"]:
        print("too few for a batch on each rank: give a smaller --batch-size, here and in training")
    if args.manifest:
        if report.samples is None:
            raise ValueError(f"--manifest {args.manifest}: a manifest lists files, not shards; leave it out")
        write_manifest(report.samples, args.manifest)
    if args.report:
        content = report.as_dict() | dict(epoch=epoch)
        with replacing(args.report) as file:
            file.write(json.dumps(content, indent=1).encode("ascii"))
    return 0 if report.ok else 1


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("convert", help="images as WebDataset shards in random order")
    add = command.add_argument
    add("root", help="class folder or list file, scanned first; or a manifest, taken as it is")
    add("--out", required=True, metavar="DIR", help="folder of the shards; repeating the command resumes a conversion")
    add("--shard-size", type=int, default=10_000, help="samples a shard (%(default)s)")
    add("--seed", type=int, default=0, help="of the order (%(default)s)")
    add(
        "--max-size",
        type=int,
        metavar="PIXELS",
        help="reduce images with a longer side; default: no change",
    )
    add("--quality", type=int, default=90, help="of the JPEGs that are reduced (%(default)s)")
    add("--full", action="store_true", help="decode every file in the scan")
    add(
        "--workers",
        type=int,
        help="processes of the scan, threads of the conversion; default: the CPUs this one may use",
    )
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    samples = sources.load_files(args.root)
    inside = os.path.realpath(args.out).startswith(os.path.realpath(args.root) + os.sep)
    if inside and os.path.isdir(args.root):
        raise ValueError(f"--out {args.out}: it lies in the source, which it would spoil; give another folder")
    if not is_manifest(args.root):
        report = check.scan(samples, full=args.full, workers=args.workers, progress=bar("chunk"))
        assert report.samples is not None  # files in, files out
        samples = report.samples
        for name, reason in report.bad.items():
            print(f"left out {name!r}: {reason}", file=sys.stderr)
    paths = convert.convert(
        samples,
        args.out,
        shard_size=args.shard_size,
        seed=args.seed,
        max_size=args.max_size,
        quality=args.quality,
        workers=args.workers,
        progress=bar("shard"),
    )
    print(f"{len(samples)} samples in {len(paths)} shards in {args.out}")
    return 0


def _add_speed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("speed", help="is the loader the bottleneck? beside timm's, and with your model")
    add = command.add_argument
    add("root", help="class folder, list file, manifest, or shards")
    add("--model", help="name of a timm model, to train on cached batches and on the loader's")
    add(
        "--against",
        metavar="MODULE:FUNCTION",
        help="a function of yours that makes a loader, whose batches are (images, ...), to compare with this one",
    )
    add("--batch-size", type=int, default=64, help="(%(default)s)")
    add("--input-size", type=int, default=224, help="side in pixels (%(default)s)")
    add("--num-threads", type=int, help="of this loader, and workers of timm's; default: the CPUs this process may use")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--minutes", type=float, default=2.0, help="about how long it takes (%(default)s)")
    add("--rounds", type=int, default=5, help="how often loaders and training take turns (%(default)s)")
    command.set_defaults(run=_speed)


def _function(text: str) -> Callable[[], Any]:
    """MODULE:FUNCTION of an importable module, which may lie in the working directory."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--against {text}: {error}; give MODULE:FUNCTION") from error
    return found


def _speed(args: argparse.Namespace) -> int:
    print("loading PyTorch, DALI and the list of images", flush=True)
    from .speed import speed  # it imports PyTorch and DALI

    options = vars(args)
    del options["run"]
    root, against = options.pop("root"), options.pop("against")
    options["against"] = None if against is None else _function(against)
    print(speed(sources.load(root), **options, report=partial(print, flush=True)))
    return 0
