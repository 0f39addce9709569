"""Top-1 of any timm model on images read through DALI, and what the paper's protocols share with it."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import timm
import torch
from huggingface_hub.utils import get_session
from timm.data import ImageNetInfo, resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer, load_checkpoint
from torch import nn

from lumix_dali import create_loader
from lumix_dali.data.files import Files
from lumix_dali.data.sources import load_files, renumbered

from .checkpoint import FORMAT
from .evaluate_flags import EXPECTED
from .progress import progress
from .ranks import find_device, first_line

Values = dict[tuple[str, str | int], list[float]]  # (curve, abscissa or metric): one value per seed, in percent
Variant = tuple[tuple[str, str | int], int, torch.Tensor]  # key, index of the seed, images

# Settings taken from a checkpoint of pipelines.train: always; except for wsas, which has its own size; and only for
# top1, which then reproduces the run's own number.
FROM_THE_RUN = ("model", "num_classes", "model_kwargs", "mean", "std")
SIZE_OF_THE_RUN = ("img_size", "input_size")
FROM_ITS_VALIDATION = ("crop_pct", "interpolation")
HUB_SECONDS = 5  # timeout for a first answer from the hub


class Normalised(nn.Module):
    """A model that takes uint8 images: protocols drop and permute pixels before normalisation."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> Any:
        return self.model((images.float() / 255 - self.mean) / self.std)


@dataclass
class Subject:
    """The model under evaluation and its input."""

    args: argparse.Namespace
    model: Any  # of timm
    network: Normalised  # wraps the model
    data: dict[str, Any]  # size, interpolation, crop, mean, std, under timm's names
    names: Sequence[str] | None  # of the outputs
    autocast: torch.autocast

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.data["input_size"][1:]

    @property
    def is_imagenet(self) -> bool:
        """Whether the outputs are ImageNet's 1000 classes, whose results the paper reports."""
        return self.names == ImageNetInfo().label_names()

    @property
    def device(self) -> torch.device:
        """The device of the model and the images."""
        return self.network.mean.device

    def batches(self, samples: Files, **changes: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All samples once, as uint8 [B, 3, H, W] and labels [B]; `changes` override resize and crop."""
        # A damaged image is an error: a substitute would distort the result.
        options = self.data | changes | dict(dtype="uint8", max_bad=0, is_training=False)
        loader = create_loader(
            samples, batch_size=self.args.batch_size, device=self.device, num_threads=self.args.workers, **options
        )
        with loader, progress(len(samples), self.args.protocol) as bar:
            for images, labels in loader:
                yield images, labels
                bar.update(len(labels))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, K]."""
        with self.autocast:
            return self.network(images).float()


def top1(subject: Subject) -> Values:
    """Table 1."""
    return accuracies(subject, lambda images: [(("", "top-1"), 0, images)])


def accuracies(subject: Subject, variants: Callable[[torch.Tensor], Iterable[Variant]]) -> Values:
    """Top-1 on every variant of every image; the data are read once."""
    samples = labelled(subject, read(subject.args, "--data-dir", subject.args.data_dir))
    hits: dict[tuple, dict[int, torch.Tensor]] = {}
    for images, labels in subject.batches(samples):
        for key, seed, changed in variants(images):
            right = (subject.logits(changed).argmax(1) == labels).sum()  # stays on the device
            seeds = hits.setdefault(key, {})
            seeds[seed] = seeds.get(seed, 0) + right
    return {key: [100 * int(right) / len(samples) for right in seeds.values()] for key, seeds in hits.items()}


def missing(args: argparse.Namespace, flag: str, path: str | None, expected: str, reason: object) -> ValueError:
    """An error that says where to get the data and which layout is expected."""
    return ValueError(f"{flag} {path}: {reason}. {args.protocol} needs {expected}")


def read(args: argparse.Namespace, flag: str, path: str | None, expected: str = "") -> Files:
    """Samples of a class folder, or of `val` or `validation` in it."""
    inner = [Path(path or "", name) for name in ("val", "validation")]
    try:
        return load_files(next((folder for folder in inner if folder.is_dir()), path or ""))
    except ValueError as error:
        raise missing(args, flag, path, expected or EXPECTED[args.protocol], error) from error


def labelled(subject: Subject, samples: Files) -> Files:
    """`samples` with the index of the model's output as label."""
    names = subject.names
    if names is None and len(samples.classes) == subject.model.num_classes:
        names = samples.classes
    if names is None or (unknown := set(samples.classes) - set(names)):
        what = "their names are unknown" if names is None else f"{min(unknown)!r} is not one of them"
        raise ValueError(
            f"--data-dir {subject.args.data_dir}: {len(samples.classes)} class folders, a model of "
            f"{subject.model.num_classes} classes, and {what}; name the folders as its classes"
        )
    return renumbered(samples, names)  # type: ignore[return-value]  # files stay files


# The model.


def build_model(name: str, checkpoint: str | None, flag: str, size: Sequence[int] | None = None, **options: Any) -> Any:
    """A timm model with a checkpoint's weights, built for images of `size`; without a checkpoint, with timm's weights.

    Raises:
        ValueError: the model is unknown, or its weights cannot be read or downloaded.
    """
    model_flag = flag.replace("checkpoint", "model")
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"{model_flag} {name}: timm knows no such model; see timm.list_models()")
    if not checkpoint:
        try:
            with offline_unless_answered():
                return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub and the network may raise anything
            raise ValueError(
                f"{model_flag} {name}: timm could not get its weights ({first_line(error)}); "
                f"without a network, fetch them elsewhere and give {flag} FILE"
            ) from error
    model: Any = timm.create_model(name, **options)
    if size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    try:
        load_checkpoint(model, checkpoint)
    except FileNotFoundError as error:
        raise ValueError(f"{flag} {checkpoint}: no such file; give a checkpoint of {name}") from error
    except Exception as error:  # a foreign or damaged file may raise anything
        raise ValueError(
            f"{flag} {checkpoint}: it does not fit {name} ({first_line(error)}); give its model, "
            "--num-classes and --model-kwargs"
        ) from error
    return model


@contextmanager
def offline_unless_answered() -> Iterator[None]:
    """Switches the Hugging Face hub to its offline mode, with its cache only, if a first request fails.

    Its own client would retry each request for half a minute.
    """
    before = hub.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(hub.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # the type depends on the library that the hub's client uses
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def set_size(model: Any, size: tuple[int, int], flag: str) -> None:
    """Adapts a model to images of this size; position embeddings are resampled as in the public protocols."""
    patches = getattr(model, "patch_embed", None)
    if patches is None or not hasattr(model, "set_input_size") or tuple(patches.img_size) == tuple(size):
        return
    check_patches(model, size, flag)
    before, grid = getattr(model, "pos_embed", None), patches.grid_size
    model.set_input_size(img_size=size)
    if isinstance(model, VisionTransformer) and before is not None:
        # timm antialiases by default, which changes the kernel.
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        model.pos_embed = nn.Parameter(
            resample_abs_pos_embed(before.data, list(patches.grid_size), list(grid), prefix, antialias=False)
        )


def check_patches(model: Any, size: tuple[int, int], flag: str) -> None:
    """Raises ValueError if a model's patches do not divide images of this size."""
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if any(side % patch for side, patch in zip(size, patch_size, strict=True)):
        raise ValueError(
            f"{flag}: its patches of {patch_size} do not divide images of {tuple(size)}; give another --img-size"
        )


def build_subject(args: argparse.Namespace) -> Subject:
    """The model on its device, with the input settings of the protocol."""
    saved = saved_run(args)
    options = dict(args.model_kwargs, **({"num_classes": args.num_classes} if args.num_classes else {}))
    model = build_model(args.model, args.checkpoint, "--checkpoint", size=saved.get("size"), **options)
    wanted: dict[str, Any] = {"img_size": 512 if args.protocol == "wsas" else None}
    if not (args.protocol == "top1" and saved):  # otherwise validated as in training
        wanted |= {
            "crop_pct": 1.0 if args.model.startswith("xcit") else 0.875,  # as in the paper
            "interpolation": "bicubic" if args.protocol == "top1" else "bilinear",
        }
    given = {key: value for key, value in vars(args).items() if value is not None}
    data = resolve_data_config({**wanted, **given}, model=model)
    set_size(model, data["input_size"][1:], f"--model {args.model}")
    device = find_device(args.device)
    network = Normalised(model, data["mean"], data["std"]).eval().to(device)
    names = saved.get("classes") or (ImageNetInfo().label_names() if model.num_classes == 1000 else None)
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    return Subject(args, model, network, data, names, autocast)


def saved_run(args: argparse.Namespace) -> dict[str, Any]:
    """Fills in flags that were not given from a checkpoint of pipelines.train.

    Returns:
        `classes`, and the `size` (H, W) of training, or None for the model's own size; {} for other files.
    """
    try:
        content = torch.load(args.checkpoint, map_location="cpu", weights_only=True) if args.checkpoint else {}
    except Exception:  # timm reads other formats, or rejects them
        content = {}
    saved = content if isinstance(content, dict) and content.get("run_format") == FORMAT else {}
    flags = saved.get("args", {})
    taken = FROM_THE_RUN + SIZE_OF_THE_RUN * (args.protocol != "wsas")
    for key in taken + FROM_ITS_VALIDATION * (args.protocol == "top1"):
        if not getattr(args, key):
            setattr(args, key, flags.get(key) or getattr(args, key))
    if args.model is None:
        raise ValueError("--model: give the name of a timm model; only checkpoints of pipelines.train contain it")
    if not saved:
        return {}
    args.num_classes = args.num_classes or len(saved["classes"])
    shape = flags["input_size"] or [3, flags["img_size"], flags["img_size"]]
    return {"classes": saved["classes"], "size": shape[1:] if shape[1] else None}
