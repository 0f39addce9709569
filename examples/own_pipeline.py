"""A DALI pipeline of your own with `lumix_dali.fn.mix`, and three ways to get its batches into PyTorch.

    python examples/own_pipeline.py IMAGES [generic | dlpack | proxy]

IMAGES is a class folder. The example runs on a GPU if there is one.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from nvidia.dali.plugin.pytorch.experimental import proxy as dali_proxy
from torchvision.datasets import ImageFolder

import lumix_dali.fn as mixfn
from lumix_dali import LUMixLoss, MixTarget

MEAN, STD = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]
Batches = Iterator[tuple[torch.Tensor, MixTarget]]


def augment_and_mix(encoded, labels, size, device):
    images = fn.decoders.image_random_crop(encoded, device="mixed" if device == "gpu" else "cpu")
    images = fn.resize_crop_mirror(images, size=(size, size), crop=(size, size), mirror=fn.random.coin_flip())
    images, target = mixfn.mix(images, labels, mixup_alpha=0.8, cutmix_alpha=1.0)
    return fn.crop_mirror_normalize(images, mean=MEAN, std=STD), *target


@pipeline_def
def train_pipeline(root, size, device):
    encoded, labels = fn.readers.file(file_root=root, random_shuffle=True, name="Reader")
    return augment_and_mix(encoded, labels, size, device)


@pipeline_def
def proxy_pipeline(size, device):
    encoded = fn.external_source(name="encoded", ndim=1)
    labels = fn.external_source(name="labels", ndim=0)
    return augment_and_mix(encoded, labels, size, device)


def generic(pipe) -> Batches:
    """`DALIGenericIterator`: one name per output. (`DALIClassificationIterator` takes two outputs only.)"""
    names = ["images", *MixTarget._fields]
    for (batch,) in DALIGenericIterator(pipe, names, reader_name="Reader", last_batch_policy=LastBatchPolicy.DROP):
        images, *target = (batch[name] for name in names)
        yield images, MixTarget(*target)


def dlpack(pipe) -> Batches:
    """`Pipeline.run` and DLPack, without a copy."""
    for _ in range(pipe.reader_meta("Reader")["epoch_size"] // pipe.max_batch_size):
        images, *target = (torch.from_dlpack(output.as_tensor()) for output in pipe.run())
        yield images, MixTarget(*target)


class Proxied(ImageFolder):
    """A torchvision data set whose images are decoded and mixed by DALI in the main process."""

    def __init__(self, root, proxy):
        super().__init__(root)
        self.proxy = proxy

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.proxy(encoded=np.fromfile(path, np.uint8), labels=np.int64(label))


def proxied(pipe, root, batch_size) -> Batches:
    """DALI's proxy: PyTorch's DataLoader with its workers, followed by one DALI pipeline."""
    with dali_proxy.DALIServer(pipe) as server:
        data = Proxied(root, server.proxy)
        for images, *target in dali_proxy.DataLoader(
            server, data, batch_size=batch_size, shuffle=True, num_workers=2, drop_last=True
        ):
            yield images, MixTarget(*target)


def main(root, how="generic", batch_size=8, size=224):
    gpu = torch.cuda.is_available()
    where = dict(batch_size=batch_size, num_threads=2, seed=0, device_id=0 if gpu else None)
    device = "gpu" if gpu else "cpu"
    if how == "proxy":
        batches = proxied(proxy_pipeline(size, device, **where, prefetch_queue_depth=1), root, batch_size)
    else:
        batches = dict(generic=generic, dlpack=dlpack)[how](train_pipeline(root, size, device, **where))
    criterion = LUMixLoss()
    for images, target in batches:
        logits = images.mean((2, 3)) @ torch.ones(3, 10, device=images.device)  # your model
        print(f"{list(images.shape)}  loss {criterion(logits, target):.3f}  lam0 {target.lam0.mean():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
