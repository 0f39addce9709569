"""`--smoke`: a run in miniature, to check that a command works before a machine is booked for it."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

STEPS, BATCH = 2, 2


def shrink(args: argparse.Namespace) -> None:
    """Reduces a run to two steps on generated images; the model and the other settings stay."""
    folder = Path(args.output, f"{args.experiment}-smoke".removeprefix("-"))  # never that of a real run
    images = folder / f"images-{args.rank}"  # ranks write at the same time, each to its own folder
    write_images(images / "train", STEPS * BATCH * args.world_size)
    write_images(images / "val", BATCH)
    vars(args).update(
        data_dir=str(images),
        train_split="train",
        val_split="val",
        num_classes=args.num_classes or 1000,
        batch_size=BATCH,
        validation_batch_size=BATCH,
        grad_accum_steps=1,
        epochs=1,
        experiment=folder.name,
        resume=None,
        overwrite=True,
    )
    args.warmup_prefix = False  # with it, the warm-up would add epochs


def write_images(root: Path, count: int) -> None:
    """Writes noise images to root/{0,1}/NUMBER.jpg, always the same ones."""
    for number in range(count):
        path = root / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (256, 320, 3), np.uint8)
        Image.fromarray(pixels).save(path)
