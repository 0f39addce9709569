"""The loaders that `benchmarks.loaders` compares, each used as its own documentation recommends.

All crop at random (area .08 to 1, ratio 3/4 to 4/3), flip, resize (antialiased), mix if the row says so, and deliver
normalised float32 NCHW batches on the device. They read the same unchanged files, in place or from the format that
the library recommends, written beforehand. `note` says how each is used and what differs.
"""

import math
import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from lumix_dali import create_loader, decoding
from lumix_dali.data.files import Files
from lumix_dali.data.protocol import Source
from lumix_dali.data.sources import load
from lumix_dali.loading.loader import EARLY
from lumix_dali.loading.resize import TrainInterpolation

MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PREFETCH = 2  # batches: DALI's default queue, and a DataLoader's per worker
AHEAD = EARLY + 1  # this loader begins its next epoch that many batches before the end: no part of the steady state
CHUNK = 1 << 26  # bytes: LitData's and Mosaic's default
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
NONE, CUTMIX, BOTH = "none", "CutMix", "CutMix + Mixup"


@dataclass
class Setting:
    """The settings that all loaders share."""

    samples: Files
    batch_size: int
    size: int
    device: str
    scratch: Path
    decoder: dict[str, Any] = field(default_factory=dict)  # of DALI's decoder
    interpolation: TrainInterpolation = "bicubic"

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream on which batches are taken from DALI."""
        return torch.cuda.current_stream(self.device) if self.cuda else None

    @property
    def num_classes(self) -> int:
        return len(self.samples.classes)

    def paths(self) -> list[str]:
        return [self.samples.path(i) for i in range(len(self.samples))]

    def repeated(self, batches: int) -> Files:
        """The samples, repeated to fill `batches`."""
        index = (np.arange(batches * self.batch_size) % len(self.samples)).tolist()
        names = [self.samples.names[i] for i in index]
        return Files(self.samples.root, names, self.samples.labels[index], self.samples.classes)

    def check(self, batch: Any) -> None:
        """Raises ValueError if a batch does not have the requested form."""
        images, shape = batch[0], (self.batch_size, 3, self.size, self.size)
        found = (tuple(images.shape), images.dtype, images.device.type, images.is_contiguous())
        wanted = (shape, torch.float32, torch.device(self.device).type, True)
        if found != wanted or images.abs().max() > 10:  # noise in erased regions exceeds 4
            raise ValueError(f"batch: {found}, up to {images.abs().max():.1f}; give {wanted}, normalised")

    @cached_property
    def shards(self) -> list[str]:
        """The samples as WebDataset's tar files, 100 images each."""
        import webdataset

        with webdataset.ShardWriter(str(self.scratch / "shard-%06d.tar"), maxcount=100, verbose=0) as shards:
            for i, path in enumerate(self.paths()):
                label = str(self.samples.labels[i])
                shards.write({"__key__": f"{i:07}", "jpg": Path(path).read_bytes(), "cls": label})
        return sorted(map(str, self.scratch.glob("shard-*.tar")))

    @cached_property
    def records(self) -> list[str]:
        """The samples as TFRecord files, 100 images each."""
        from . import records

        samples = list(zip(self.paths(), self.samples.labels.tolist(), strict=True))
        made = []
        for k in range(0, len(samples), 100):
            images = [(Path(path).read_bytes(), label, "") for path, label in samples[k : k + 100]]
            made.append(records.write_records(self.scratch / f"shard-{k // 100:06}.tfrecord", images))
        return sorted(map(str, made))

    @cached_property
    def chunks(self) -> str:
        """The samples as LitData's chunks, with unchanged JPEGs."""
        import litdata

        folder = str(self.scratch / "litdata")
        samples = list(zip(self.paths(), self.samples.labels.tolist(), strict=True))
        method = multiprocessing.get_start_method()
        litdata.optimize(
            litdata_sample, samples, folder, chunk_bytes=CHUNK, num_workers=1, start_method="fork", verbose=False
        )
        multiprocessing.set_start_method(method, force=True)  # LitData sets it for the whole process
        return folder

    @cached_property
    def mds(self) -> str:
        """The samples as Mosaic's shards, with unchanged JPEGs."""
        from streaming import MDSWriter

        folder = str(self.scratch / "mds")
        with MDSWriter(out=folder, columns={"x": "bytes", "y": "int"}, size_limit=CHUNK) as shards:
            for path, label in zip(self.paths(), self.samples.labels.tolist(), strict=True):
                shards.write({"x": Path(path).read_bytes(), "y": label})
        return folder

    @cached_property
    def beton(self) -> str:
        """The samples as an FFCV file, JPEGs at their original size."""
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        path = str(self.scratch / "samples.beton")
        writer = DatasetWriter(path, {"image": RGBImageField(write_mode="jpg"), "label": IntField()})
        writer.from_indexed_dataset(Pictures(self.samples))
        return path


def litdata_sample(sample: tuple[str, int]) -> tuple[Any, int]:
    """A sample in the form that `litdata.optimize` takes; its processes import this function."""
    import litdata

    path, label = sample
    return litdata.Image(path=path), label


class Epoch:
    """An iterable whose every ``iter()`` is a new epoch."""

    def __init__(self, start: Callable[[], Iterator]):
        self.start = start

    def __iter__(self) -> Iterator:
        return self.start()


@dataclass
class Entry:
    """A loader in the run.

    Attributes:
        name: name of its row.
        open: (setting, threads or workers, batches per epoch) -> loader.
        ahead: number of threads or workers -> batches that may be ready or in progress.
        mixing: what it mixes.
        swept: uses the best of the worker counts; otherwise `--threads`.
        whole: its batches are complete input for a model, and are checked.
        note: how it is used, and what differs.
        packages: the first installed one gives the row its version.
        excused: may be missing.
    """

    name: str
    open: Callable[[Setting, int, int], Iterable]
    ahead: Callable[[int], int]
    mixing: str = "none"
    swept: bool = False
    whole: bool = True
    note: str = ""
    packages: tuple[str, ...] = ()
    excused: bool = False


# --- DALI's own


def plain_crop(images, **decoder: Any):
    """Decodes and crops as a plain DALI pipeline does."""
    device = "cpu" if Pipeline.current().device_id is None else "mixed"
    return fn.decoders.image_random_crop(
        images, device=device, random_area=SCALE, random_aspect_ratio=RATIO, adjust_orientation=False, **decoder
    )


def guarded_crop(images, **decoder: Any):
    """Decodes and crops as this project's loader does, after peeking at the image size."""

    def region(shape):
        return fn.random_crop_generator(shape, random_area=SCALE, random_aspect_ratio=RATIO)

    return decoding.decode(images, region, **decoder)


def cropped(images, size: int, stages: int, decoder: dict[str, Any], interpolation: types.DALIInterpType):
    """Files decoded and cropped (from 2 stages on), resized and flipped (from 3 on)."""
    if stages > 1:
        images = plain_crop(images, **decoder)
    if stages > 2:
        images = fn.resize_crop_mirror(
            images, size=[size, size], crop=[size, size], interp_type=interpolation, mirror=fn.random.coin_flip()
        )
    return images


def normalised_in_dali(images):
    """Float32, CHW."""
    return fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="CHW", mean=[255 * m for m in MEAN], std=[255 * s for s in STD]
    )


@pipeline_def
def dali_pipeline(
    files: list[str],
    classes: list[int],
    size: int,
    stages: int,
    decoder: dict[str, Any],
    interpolation: types.DALIInterpType,
):
    """Plain DALI for what `lumix_dali` does without mixing and metadata; the first `stages` of four."""
    images, labels = fn.readers.file(files=files, labels=classes, random_shuffle=True, name="Reader")
    gpu = Pipeline.current().device_id is not None
    images = cropped(images, size, stages, decoder, interpolation)
    if stages > 3:
        images = normalised_in_dali(images)
    return images, labels.gpu() if gpu else labels


def build_dali(s: Setting, threads: int, stages: int):
    return dali_pipeline(
        s.paths(),
        s.samples.labels.tolist(),
        s.size,
        stages,
        s.decoder,
        INTERPOLATIONS[s.interpolation],
        batch_size=s.batch_size,
        num_threads=threads,
        prefetch_queue_depth=PREFETCH,
        device_id=torch.device(s.device).index if s.cuda else None,
    )


def open_dali(stages: int, s: Setting, threads: int, batches: int) -> Epoch:
    def epoch():
        pipe = build_dali(s, threads, stages)
        stream = torch.cuda.current_stream(s.device) if s.cuda else None
        for _ in range(batches):
            images, labels = pipe.run(stream)
            if stages == 4:
                images, labels = (torch.from_dlpack(output.as_tensor()) for output in (images, labels))
            yield images, labels

    return Epoch(epoch)


def open_dali_torchvision(s: Setting, threads: int, batches: int) -> Epoch:
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    cutmix = v2.CutMix(num_classes=s.num_classes)

    def epoch():
        iterator = DALIClassificationIterator(build_dali(s, threads, 4), size=batches * s.batch_size)
        for (batch,) in iterator:
            yield cutmix(batch["data"], batch["label"].squeeze(-1).long())

    return Epoch(epoch)


# --- ours


def open_lumix(mixing: dict[str, Any], s: Setting, threads: int, batches: int, source: Any = None) -> Iterable:
    return create_loader(
        source or s.repeated(batches),
        batch_size=s.batch_size,
        input_size=s.size,
        device=s.device,
        num_threads=threads,
        prefetch_queue_depth=PREFETCH,
        decoder=s.decoder,
        interpolation=s.interpolation,
        **mixing,
    )


class Again:
    """A source that repeats its samples as often as an epoch needs."""

    def __init__(self, source: Source, length: int):
        self.source, self.length = source, length
        self.classes, self.digest = source.classes, source.digest

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return self.source.name(index % len(self.source))

    def read(self, indices: Sequence[int]) -> tuple[list, np.ndarray]:
        return self.source.read([index % len(self.source) for index in indices])


def open_lumix_shards(kind: str, s: Setting, threads: int, batches: int) -> Iterable:
    source = load(s.shards if kind == "tar" else s.records, cache_dir=s.scratch)
    return open_lumix({}, s, threads, batches, Again(source, batches * s.batch_size))


def open_lumix_dynamic(s: Setting, threads: int, batches: int) -> Epoch:
    import nvidia.dali.experimental.dynamic as ndd

    from lumix_dali import Mixing, dynamic

    ndd.set_num_threads(threads)
    mixing, device = Mixing(cutmix_alpha=1.0), "gpu" if s.cuda else "cpu"
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))

    def epoch() -> Iterator:
        samples = s.repeated(batches)
        files, rng = [samples.path(i) for i in range(len(samples))], np.random.default_rng(0)
        reader = ndd.readers.File(files=files, labels=samples.labels.tolist(), random_shuffle=True)
        for encoded, labels in reader.next_epoch(batch_size=s.batch_size):
            images = ndd.decoders.image_random_crop(
                encoded, device=device, random_area=SCALE, random_aspect_ratio=RATIO, adjust_orientation=False
            )
            images = ndd.resize(images, size=(s.size, s.size), interp_type=INTERPOLATIONS[s.interpolation])
            images = ndd.flip(images, horizontal=ndd.random.coin_flip(batch_size=s.batch_size))
            images, target = dynamic.mix(images, labels.torch().flatten(), mixing, rng)
            images = ndd.crop_mirror_normalize(images, dtype=ndd.float32, output_layout="CHW", mean=mean, std=std)
            yield images.torch(), target

    return Epoch(epoch)


# --- timm


class GivenFiles(Reader):
    """timm's folder reader for given files."""

    def __init__(self, samples: Files):
        super().__init__()
        self.samples = samples

    def __getitem__(self, index: int):
        return open(self.samples.path(index), "rb"), int(self.samples.labels[index])

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples.path(index)


def open_timm(mode: str, in_collate: bool, s: Setting, workers: int, batches: int, **augmentation) -> Iterable:
    make = timm.data.FastCollateMixup if in_collate else timm.data.Mixup
    mixup = make(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, num_classes=s.num_classes)
    loader = timm.data.create_loader(
        timm.data.ImageDataset("", reader=GivenFiles(s.repeated(batches))),
        input_size=(3, s.size, s.size),
        batch_size=s.batch_size,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        color_jitter=0.0,
        interpolation=s.interpolation,
        mean=MEAN,
        std=STD,
        num_workers=workers,
        pin_memory=s.cuda,
        collate_fn=mixup if in_collate else None,
        device=torch.device(s.device),
        **augmentation,
    )
    return loader if in_collate else Epoch(lambda: (mixup(*batch) for batch in loader))


# --- torchvision


class Pictures(Dataset):
    """torchvision's ImageFolder for given files, loading with `decode_image`, or with PIL without a transform."""

    def __init__(self, samples: Files, transform: Callable | None = None):
        self.samples, self.transform = samples, transform

    def __getitem__(self, index: int):
        path, label = self.samples.path(index), int(self.samples.labels[index])
        if self.transform is None:
            return Image.open(path).convert("RGB"), label
        return self.transform(decode_image(path, mode=ImageReadMode.RGB)), label

    def __len__(self) -> int:
        return len(self.samples)


class MixingCollate:
    """torchvision's recipe for CutMix, or CutMix or Mixup per batch, as a DataLoader's collate function."""

    def __init__(self, mixing: str, num_classes: int):
        mixup = v2.MixUp(alpha=0.8, num_classes=num_classes)
        cutmix = v2.CutMix(num_classes=num_classes)
        self.mix = {NONE: None, CUTMIX: cutmix, BOTH: v2.RandomChoice([cutmix, mixup])}[mixing]

    def __call__(self, batch: list) -> Any:
        return self.whole(*default_collate(batch))

    def whole(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Collates and mixes a batch."""
        return (images, labels) if self.mix is None else self.mix(images, labels)


def torchvision_transform(size: int, interpolation: str) -> v2.Compose:
    resize = dict(interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, **resize),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def workers_of(s: Setting, workers: int) -> dict[str, Any]:
    """The worker arguments of a DataLoader, the same for all loaders that use one."""
    return dict(num_workers=workers, pin_memory=s.cuda, persistent_workers=True, prefetch_factor=PREFETCH)


def open_torchvision(mixing: str, s: Setting, workers: int, batches: int) -> Epoch:
    loader = DataLoader(
        Pictures(s.repeated(batches), torchvision_transform(s.size, s.interpolation)),
        s.batch_size,
        shuffle=True,
        collate_fn=MixingCollate(mixing, s.num_classes),
        **workers_of(s, workers),
    )
    return Epoch(lambda: moved(loader, s.device))


def moved(loader: Iterable, device: str) -> Iterator:
    for images, labels in loader:
        yield images.to(device, non_blocking=True), torch.as_tensor(labels).to(device, non_blocking=True)


# --- SPDL


def open_spdl(mixing: str, s: Setting, workers: int, batches: int) -> Epoch:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    spdl.io.demux_config()  # loads FFmpeg, or reports that it is missing
    samples, mix = s.repeated(batches), MixingCollate(mixing, s.num_classes).whole

    def decode(index: int):
        packets = spdl.io.demux_image(samples.path(index))
        x, y, width, height = random_crop(packets.width, packets.height)
        flip = "hflip," * (random.random() < 0.5)
        filters = f"crop={width}:{height}:{x}:{y},scale={s.size}:{s.size}:flags={s.interpolation},{flip}format=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=filters), samples.labels[index]

    def collate(items: list):
        frames, labels = zip(*items, strict=True)
        return spdl.io.to_torch(spdl.io.convert_frames(list(frames))), torch.tensor(labels)

    def epoch():
        order = torch.randperm(len(samples)).tolist()
        builder: Any = PipelineBuilder().add_source(order).pipe(decode, concurrency=workers)
        builder = builder.aggregate(s.batch_size, drop_last=True).pipe(collate)
        if s.cuda:
            builder = builder.pipe(spdl.io.transfer_tensor_h2d, executor=ThreadPoolExecutor(1))
        pipeline = builder.add_sink(PREFETCH).build(num_threads=workers)
        with pipeline.auto_stop():
            for images, labels in pipeline:
                yield mix(normalised(images.permute(0, 3, 1, 2)), labels)

    return Epoch(epoch)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 NCHW."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def random_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """(x, y, width, height) of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


# --- WebDataset


class FromBytes:
    """`torchvision_transform` of an encoded image."""

    def __init__(self, s: Setting):
        self.transform = torchvision_transform(s.size, s.interpolation)

    def __call__(self, encoded: bytes) -> torch.Tensor:
        file = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return self.transform(decode_image(file, ImageReadMode.RGB))


def open_webdataset(mixing: str, rebatched: bool, s: Setting, workers: int, batches: int) -> Epoch:
    import webdataset

    dataset = (
        webdataset.WebDataset(s.shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(FromBytes(s), int)
        .batched(s.batch_size, collation_fn=MixingCollate(mixing, s.num_classes), partial=False)
        .with_epoch(-(-batches // workers))
    )  # each worker has its own epoch
    loader = webdataset.WebLoader(dataset, batch_size=None, shuffle=False, **workers_of(s, workers))
    if rebatched:
        loader = loader.unbatched().shuffle(10).batched(s.batch_size, partial=False)
    return Epoch(lambda: moved(loader, s.device))


# --- LitData


class Transformed:
    """A `litdata_sample` with its image transformed."""

    def __init__(self, s: Setting):
        self.transform = torchvision_transform(s.size, s.interpolation)

    def __call__(self, sample: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, int]:
        return self.transform(sample[0]), sample[1]


def open_litdata(mixing: str, s: Setting, workers: int, batches: int) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset

    # Every worker gets the same number of full batches; the remainder is dropped.
    samples = -(-batches // workers) * workers * s.batch_size
    times = (samples + 0.5) / len(s.samples)  # LitData rounds down
    loader = StreamingDataLoader(
        StreamingDataset(s.chunks, shuffle=True, transform=Transformed(s), subsample=times),
        batch_size=s.batch_size,
        drop_last=True,
        collate_fn=MixingCollate(mixing, s.num_classes),
        **workers_of(s, workers),
    )
    return Epoch(lambda: moved(loader, s.device))


# --- MosaicML Streaming


def open_mosaic(mixing: str, s: Setting, workers: int, batches: int) -> Epoch:
    from streaming import StreamingDataLoader
    from streaming.vision import StreamingImageNet

    dataset = StreamingImageNet(
        local=s.mds,
        shuffle=True,
        shuffle_algo="py1e",  # StreamingDataset's default, as the documentation recommends; this class differs
        batch_size=s.batch_size,
        epoch_size=batches * s.batch_size,
        transform=FromBytes(s),
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=s.batch_size,
        drop_last=True,
        collate_fn=MixingCollate(mixing, s.num_classes),
        **workers_of(s, workers),
    )
    return Epoch(lambda: moved(loader, s.device))


# --- FFCV


def open_ffcv(mixing: str, s: Setting, workers: int, batches: int) -> Epoch:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    to_device = [ToDevice(torch.device(s.device), non_blocking=True)]
    decoder = RandomResizedCropRGBImageDecoder((s.size, s.size), scale=SCALE, ratio=RATIO)
    image = [decoder, RandomHorizontalFlip(), ToTensor(), *to_device, ToTorchImage(channels_last=False)]
    label = [IntDecoder(), ToTensor(), *to_device, Squeeze()]
    loader = Loader(
        s.beton,
        batch_size=s.batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        os_cache=True,
        indices=np.arange(batches * s.batch_size) % len(s.samples),
        pipelines={"image": image, "label": label},
    )
    mix = MixingCollate(mixing, s.num_classes).whole
    return Epoch(lambda: (mix(normalised(images), labels) for images, labels in loader))


# --- all of them

DALI: dict[str, Any] = dict(ahead=lambda threads: PREFETCH + 1, packages=("nvidia-dali-cuda120", "nvidia-dali-cuda130"))
LUMIX: dict[str, Any] = dict(ahead=lambda threads: AHEAD, packages=("lumix-dali",))
WORKERS: dict[str, Any] = dict(ahead=lambda workers: PREFETCH * workers + 1, swept=True)
TORCH: dict[str, Any] = dict(packages=("torchvision",), **WORKERS)
TIMM: dict[str, Any] = dict(mixing=BOTH, packages=("timm",), **WORKERS)
DECODED = "decode_image and transforms v2"
MIXED = "mixed per batch by torchvision"
COLLATED = "create_loader with its prefetcher and FastCollateMixup as collate_fn, as timm's train.py; targets are dense"


def mixed(mode: str, mixup_alpha: float = 0.0) -> dict[str, Any]:
    return dict(mode=mode, cutmix_alpha=1.0, mixup_alpha=mixup_alpha)


# The paper's and DeiT's; repeated augmentation, too, but that only changes the order. mmax9: at magnitude 10 timm
# requests Posterize to 0 bits, which Pillow 13 rejects.
RECIPE: dict[str, Any] = dict(auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25, re_mode="pixel")

ENTRIES = [
    Entry("dali/read", partial(open_dali, 1), whole=False, note="fn.readers.file, random_shuffle", **DALI),
    Entry("dali/+decode", partial(open_dali, 2), whole=False, note="+ image_random_crop", **DALI),
    Entry("dali/+resize", partial(open_dali, 3), whole=False, note="+ resize_crop_mirror", **DALI),
    Entry("dali/+normalise", partial(open_dali, 4), note="+ crop_mirror_normalize, DLPack: the ceiling", **DALI),
    Entry("lumix/none", partial(open_lumix, {}), **LUMIX),
    Entry("lumix/cutmix elem", partial(open_lumix, mixed("elem")), mixing=CUTMIX, **LUMIX),
    Entry("lumix/cutmix batch", partial(open_lumix, mixed("batch")), mixing=CUTMIX, **LUMIX),
    Entry("lumix/cutmix+mixup elem", partial(open_lumix, mixed("elem", 0.8)), mixing=BOTH, **LUMIX),
    Entry("lumix/cutmix+mixup batch", partial(open_lumix, mixed("batch", 0.8)), mixing=BOTH, **LUMIX),
    Entry(
        "lumix/recipe",
        partial(open_lumix, mixed("batch", 0.8) | RECIPE),
        mixing=BOTH,
        **LUMIX,
        note="batch mode, RandAugment, random erasing: before mixing, on uint8",
    ),
    Entry("lumix tar", partial(open_lumix_shards, "tar"), **LUMIX, note="WebDataset's shards of 100 images"),
    Entry("lumix tfrecord", partial(open_lumix_shards, "tfrecord"), **LUMIX, note="TFRecord shards of 100 images"),
    Entry(
        "lumix dynamic cutmix",
        open_lumix_dynamic,
        mixing=CUTMIX,
        **LUMIX,
        note="a custom loop in DALI's dynamic mode with lumix_dali.dynamic.mix; nothing is decoded ahead",
    ),
    Entry(
        "dali+torchvision cutmix",
        open_dali_torchvision,
        mixing=CUTMIX,
        **DALI,
        note="the ceiling's pipeline, DALIClassificationIterator, v2.CutMix on the device; targets are dense",
    ),
    Entry("timm FastCollateMixup batch", partial(open_timm, "batch", True), note=COLLATED, **TIMM),
    Entry("timm FastCollateMixup elem", partial(open_timm, "elem", True), note=COLLATED, **TIMM),
    Entry(
        "timm Mixup afterwards",
        partial(open_timm, "batch", False),
        **TIMM,
        note="create_loader with its prefetcher, then Mixup(mode='batch') on the device; targets are dense",
    ),
    Entry(
        "timm recipe",
        partial(open_timm, "batch", True, **RECIPE),
        **TIMM,
        note="FastCollateMixup in batch mode, RandAugment in the workers, random erasing by the prefetcher",
    ),
    Entry(
        "torchvision v2 collate cutmix",
        partial(open_torchvision, CUTMIX),
        mixing=CUTMIX,
        **TORCH,
        note="decode_image to uint8 tensors, transforms v2, CutMix in collate_fn, persistent workers",
    ),
    Entry(
        "torchvision v2 collate cutmix+mixup",
        partial(open_torchvision, BOTH),
        mixing=BOTH,
        **TORCH,
        note="as above, with RandomChoice of CutMix and MixUp",
    ),
    Entry(
        "spdl",
        partial(open_spdl, BOTH),
        ahead=lambda workers: PREFETCH + 4,
        mixing=BOTH,
        swept=True,
        packages=("spdl", "spdl_io"),
        note="threads; demux_image and decode_packets with FFmpeg's crop, scale (swscale's, not antialiased alike) and "
        f"hflip, convert_frames; normalised on the device, and {MIXED}, in the main thread",
    ),
    Entry(
        "webdataset",
        partial(open_webdataset, BOTH, True),
        ahead=lambda workers: PREFETCH * workers + 3,
        mixing=BOTH,
        swept=True,
        packages=("webdataset",),
        note=f"tar shards, resampled, shuffle(1000), {DECODED}, batched and {MIXED} in the workers; WebLoader, "
        "unbatched, shuffled between workers and batched again, as its ImageNet notebook does",
    ),
    Entry(
        "webdataset worker batches",
        partial(open_webdataset, BOTH, False),
        mixing=BOTH,
        **WORKERS,
        packages=("webdataset",),
        note="as above, without the batching after the workers: faster, and shuffled less",
    ),
    Entry(
        "litdata",
        partial(open_litdata, BOTH),
        mixing=BOTH,
        **WORKERS,
        packages=("litdata",),
        note="optimize with Image(path), 64 MB chunks; StreamingDataset, which decodes with decode_jpeg, or "
        f"with Pillow where there is EXIF; StreamingDataLoader; transforms v2, {MIXED} in the workers",
    ),
    Entry(
        "mosaic streaming",
        partial(open_mosaic, BOTH),
        mixing=BOTH,
        **WORKERS,
        packages=("mosaicml-streaming",),
        excused=True,
        note="MDS shards of 64 MB; StreamingImageNet and StreamingDataLoader; the column is bytes, since jpeg would "
        f"give PIL images; {DECODED}, {MIXED} in the workers",
    ),
    Entry(
        "ffcv",
        partial(open_ffcv, BOTH),
        ahead=lambda workers: 3 + PREFETCH,
        mixing=BOTH,
        swept=True,
        packages=("ffcv",),
        excused=True,
        note="threads; JPEGs re-encoded at quality 90, since it stores no others; resized with OpenCV's area "
        f"interpolation, its only one; normalised on the device, and {MIXED}, in the main thread",
    ),
]
