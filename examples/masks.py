"""Images and segmentation masks cropped, flipped and pasted together, and λ0 counted in visible pixels of objects.

    python examples/masks.py IMAGES MASKS

IMAGES is a class folder, and MASKS has a mask of the same name with the ending .png for each image: 0 is background. λ0
of CutMix is the pasted area, even where that holds only background. Here it is the partner's share of the object pixels
that can still be seen, in the sense of arXiv 2606.04820. The example runs on a GPU if there is one.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

import lumix_dali.fn as mixfn
from lumix_dali import Kind, LUMixLoss, Mixing, MixTarget
from lumix_dali.data.files import Files, class_folder

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]


class Pairs:
    """The callback of the pipeline: encoded images and masks, and labels, in a new order for each epoch."""

    def __init__(self, images: Files, masks: Path, batch_size: int):
        self.images, self.masks, self.batch_size = images, masks, batch_size

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __call__(self, info) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        order = np.random.default_rng(info.iteration // len(self)).permutation(len(self.images))
        place = info.iteration % len(self) * self.batch_size
        taken = order[place : place + self.batch_size].tolist()
        masks = [self.masks / Path(self.images.names[i]).with_suffix(".png") for i in taken]
        return (
            [np.fromfile(self.images.path(i), np.uint8) for i in taken],
            [np.fromfile(mask, np.uint8) for mask in masks],
            [self.images.labels[i] for i in taken],
        )


@pipeline_def
def train_pipeline(pairs: Pairs, size: int, device: str):
    """Mixed images [C, H, W], mixed masks [H, W, 1], and the target."""
    encoded, encoded_masks, labels = fn.external_source(
        pairs, num_outputs=3, batch=True, batch_info=True, dtype=[types.UINT8, types.UINT8, types.INT64], ndim=[1, 1, 0]
    )
    start, extent = fn.random_crop_generator(fn.peek_image_shape(encoded), random_area=[0.3, 1.0])
    flip = fn.random.coin_flip()

    def same(encoded, mode, filtering):
        decoded = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", output_type=mode)
        cropped = fn.slice(decoded, start, extent, axes=[0, 1])
        return fn.flip(fn.resize(cropped, size=[size, size], interp_type=filtering), horizontal=flip)

    images, masks = same(encoded, types.RGB, types.INTERP_CUBIC), same(encoded_masks, types.GRAY, types.INTERP_NN)
    mixing = Mixing(cutmix_alpha=1.0)
    drawn = mixfn.draw((size, size), mixing)
    images, target = mixfn.apply(images, labels, drawn, mixing, (size, size))
    masks = mixfn.paste(masks, drawn, (size, size))
    return fn.crop_mirror_normalize(images, mean=MEAN, std=STD), masks, *target


def counted_in_objects(masks: torch.Tensor, target: MixTarget) -> MixTarget:
    """λ0 as the partner's share of the visible object pixels, bool [B, H, W]; that of the area if there are none."""
    height, width = masks.shape[1:]
    y, x = (torch.arange(side, device=masks.device) for side in (height, width))
    y0, x0, y1, x1 = (edge[:, None] for edge in target.box.T)
    inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None]
    partner, both = (masks & inside).sum((1, 2)), masks.sum((1, 2))
    counted = (target.kind == Kind.CUTMIX) & (both > 0)
    return target._replace(lam0=torch.where(counted, partner / both.clamp(min=1), target.lam0))


def batches(pipe, count: int) -> Iterator[tuple[torch.Tensor, MixTarget]]:
    """Images and targets, with λ0 by objects."""
    for _ in range(count):
        images, masks, *target = (torch.from_dlpack(output.as_tensor()) for output in pipe.run())
        yield images, counted_in_objects(masks[..., 0] > 0, MixTarget(*target))


def main(images: str, masks: str, size: int = 64, batch_size: int = 8) -> None:
    """One epoch."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    pairs = Pairs(class_folder(images), Path(masks), batch_size)
    pipe = train_pipeline(
        pairs, size, device, batch_size=batch_size, num_threads=2, device_id=0 if device == "gpu" else None, seed=0
    )
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.LazyLinear(10))
    model.to("cuda" if device == "gpu" else "cpu")
    criterion = LUMixLoss()
    for step, (pixels, target) in enumerate(batches(pipe, len(pairs))):
        loss = criterion(model(pixels), target)
        print(f"step {step}: loss {float(loss.detach()):.3f}, λ0 by objects {target.lam0.mean():.3f} on average")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
