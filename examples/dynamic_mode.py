"""A training loop in DALI's dynamic mode, without a pipeline: each operator is called on a batch.

    python examples/dynamic_mode.py IMAGES

IMAGES is a class folder. The example runs on a GPU if there is one.
"""

import sys
from collections.abc import Iterator

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch

from lumix_dali import LUMixLoss, Mixing, dynamic

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


def batches(reader, mixing: Mixing, seed, batch_size: int, size: int, device: str) -> Iterator[tuple]:
    """One epoch of normalised images [B, 3, H, W] and their `MixTarget`; `seed`: (seed, epoch, rank)."""
    host, flips = np.random.default_rng(seed), ndd.random.RNG(seed[0])
    for encoded, labels in reader.next_epoch(batch_size=batch_size):
        images = ndd.decoders.image_random_crop(encoded, device=device)
        images = ndd.resize(images, size=(size, size))
        images = ndd.flip(images, horizontal=ndd.random.coin_flip(batch_size=images.batch_size, rng=flips))
        images, target = dynamic.mix(images, labels.torch().flatten(), mixing, host)
        images = ndd.crop_mirror_normalize(images, mean=MEAN, std=STD)
        yield images.torch(), target


def main(root: str, batch_size: int = 8, size: int = 64) -> None:
    device = "gpu" if torch.cuda.is_available() else "cpu"
    mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0)
    reader = ndd.readers.File(file_root=root, random_shuffle=True)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.LazyLinear(10))
    model.to("cuda" if device == "gpu" else "cpu")
    criterion = LUMixLoss()
    for epoch in range(2):
        for images, target in batches(reader, mixing, (0, epoch, 0), batch_size, size, device):
            loss = criterion(model(images), target)
            loss.backward()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
