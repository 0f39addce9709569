"""Several labels per image, or any other target: mixed by `target.mix` as the images were.

    python examples/multilabel.py IMAGES LABELS.csv

LABELS.csv has a line per image below the folder IMAGES: its path, and K numbers, such as 1 where a label holds and 0
where it does not. For a regression give the values, and another loss. The example runs on a GPU if there is one.
"""

import csv
import sys
from pathlib import Path

import torch

from lumix_dali import MixTarget, create_loader


def read(path: str, root: str) -> tuple[list[tuple[Path, int]], torch.Tensor]:
    """Pairs for `create_loader`, with the class 0 for all, and float32 [N, K] in the same order."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return [(Path(root, name), 0) for name, *_ in rows], torch.tensor([[*map(float, row[1:])] for row in rows])


def mixed_labels(labels: torch.Tensor, target: MixTarget, index: torch.Tensor) -> torch.Tensor:
    """(1 - λ0) of a sample's own labels plus λ0 of its partner's: float32 [B, K]."""
    return target.mix(labels[index])


def main(images: str, table: str, size: int = 64, batch_size: int = 8) -> None:
    """One epoch."""
    samples, labels = read(table, images)
    with create_loader(
        samples, batch_size=batch_size, input_size=size, mixup_alpha=0.8, cutmix_alpha=1.0, return_index=True
    ) as train:
        labels = labels.to(train.device)
        model = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.LazyLinear(labels.shape[1])
        )
        model.to(train.device)
        criterion = torch.nn.BCEWithLogitsLoss()
        for step, (pixels, target, index) in enumerate(train):
            loss = criterion(model(pixels), mixed_labels(labels, target, index))
            print(f"step {step}: loss {float(loss.detach()):.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
