"""Builds data, loaders, model, loss, optimiser and schedule from the flags; errors name the flag."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lumix_dali import LUMixLoss, create_loader
from lumix_dali.data.protocol import Source
from lumix_dali.data.sources import load

from .flags import ratios
from .state import SUMS, Run

# The flag for each argument of `create_loader`, to name it in errors.
LOADER_FLAGS = {
    "mixup_alpha": "--mixup",
    "cutmix_alpha": "--cutmix",
    "prob": "--mixup-prob",
    "switch_prob": "--mixup-switch-prob",
    "mode": "--mixup-mode",
    "num_threads": "--workers",
    "re_prob": "--reprob",
    "re_mode": "--remode",
    "re_count": "--recount",
    "auto_augment": "--aa",
    "num_aug_repeats": "--aug-repeats",
}


def load_data(args: argparse.Namespace) -> tuple[Source, Source]:
    """The training and the validation samples, whose labels number the training classes.

    Raises:
        ValueError: a folder is missing or empty, or the validation samples have a class of their own.
    """

    def split(*names: str, classes: Sequence[str] | None = None) -> Source:
        for name in names:
            if Path(args.data_dir, name).is_dir():
                data = load(Path(args.data_dir, name), classes=classes)
                if data.classes is None:
                    raise ValueError(
                        f"--data-dir {args.data_dir}: nothing says which classes the shards in "
                        f"{name} have; write them with `lumix-dali convert`"
                    )
                return data
        raise ValueError(
            f"--data-dir {args.data_dir}: no folder {' or '.join(names)} in it; "
            "images belong in train/CLASS/ and val/CLASS/"
        )

    if not Path(args.data_dir).is_dir():
        raise ValueError(f"--data-dir {args.data_dir}: no such folder; give one that holds train/ and val/")
    train = split(args.train_split)
    return train, split(*([args.val_split] if args.val_split else ("val", "validation")), classes=train.classes)


class TimmBCE(LUMixLoss):
    """timm's BinaryCrossEntropy on the dense target at λ0, for options that exclude LUMix, such as a threshold."""

    def __init__(self, bce: BinaryCrossEntropy, smoothing: float):
        super().__init__(0.0, 0.0, 0.0, smoothing=smoothing)
        self.bce = bce

    def forward(self, logits: torch.Tensor, target: Any, lam_r: torch.Tensor | None = None) -> torch.Tensor:
        return self.bce(logits, target.dense(logits.size(1), self.smoothing))


def build_criterion(args: argparse.Namespace) -> LUMixLoss:
    """The LUMix loss; `--no-lumix` is its plain special case, soft cross entropy at λ0."""
    if args.bce_target_thresh is not None or args.bce_pos_weight is not None:
        return TimmBCE(
            BinaryCrossEntropy(
                target_threshold=args.bce_target_thresh, pos_weight=args.bce_pos_weight, sum_classes=args.bce_sum
            ),
            args.smoothing,
        )
    eta = 0.0 if args.no_lumix else args.eta
    return LUMixLoss(
        *ratios(args),
        eta,
        noise=args.noise,
        smoothing=args.smoothing,
        base="bce" if args.bce_loss else "softmax",
        bce_reduction="sum" if args.bce_sum else "mean",
        detach_lam_s=not args.attach_lam_s,
        apply_to=args.apply_to,
    )


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """A timm model with one output per class, built for the requested input size.

    Raises:
        ValueError: `--num-classes` is smaller than the number of classes in the data, or timm cannot build it.
    """
    if args.num_classes is not None and args.num_classes < num_classes:
        raise ValueError(
            f"--num-classes {args.num_classes}: the training folder has {num_classes} classes, "
            f"more classes than the model has; give at least {num_classes}, or leave it out"
        )
    for flag in ("initial_checkpoint", "pretrained_path"):
        if (path := getattr(args, flag)) and not Path(path).is_file():
            raise ValueError(f"--{flag.replace('_', '-')} {path}: no such file")
    if args.fast_norm:
        set_fast_norm()
    overlay: dict[str, Any] = (
        dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1)) if args.pretrained_path else {}
    )
    try:
        model: Any = timm.create_model(
            args.model,
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            num_classes=args.num_classes or num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            **overlay,
            **args.model_kwargs,
        )
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        size = args.input_size[1:] if args.input_size else args.img_size
        if size and hasattr(model, "set_input_size"):  # position embeddings and windows depend on it
            model.set_input_size(img_size=size)
    except (RuntimeError, TypeError, AssertionError, OSError) as error:
        raise ValueError(f"--model {args.model}: {error}{similar(args.model, timm.list_models())}") from error
    start_head(model, args)
    return model


def start_head(model: Any, args: argparse.Namespace) -> None:
    """Initialises the classifier as the flags request."""
    with torch.no_grad():
        if args.head_init_scale is not None:
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(model.get_classifier().bias, args.head_init_bias)


def similar(name: str, known: Sequence[str]) -> str:
    """Suggests known names that resemble an unknown one."""
    found = [] if name in known else difflib.get_close_matches(name, known, 3)
    return f"; is it {', '.join(found)}?" if found else ""


def build_loaders(args: argparse.Namespace, train_data: Any, val_data: Any, data_config: dict):
    """The training and validation loaders for the input that timm's `data_config` describes."""
    common = dict(
        data_config,
        device=args.device,
        channels_last=args.channels_last,
        num_threads=args.workers,
        seed=args.seed,
        rank=args.rank,
        world_size=args.world_size,
        max_bad=args.max_bad,
    )
    mixing = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
    )
    val_batch = args.validation_batch_size or args.batch_size
    try:
        train = create_loader(
            train_data,
            batch_size=args.batch_size,
            is_training=True,
            num_aug_repeats=int(args.aug_repeats),
            **mixing,
            **common | augmentation(args),
        )
        return train, create_loader(val_data, batch_size=val_batch, is_training=False, **common)
    except ValueError as error:
        argument = re.match(r"\w+", str(error))
        if argument and argument[0] in LOADER_FLAGS:
            raise ValueError(f"{LOADER_FLAGS[argument[0]]}: {error}") from error
        raise


def augmentation(args: argparse.Namespace) -> dict[str, Any]:
    """The training loader's arguments for augmentation before mixing."""
    if args.no_aug:
        return dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    jitter = args.color_jitter
    found = dict(
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        auto_augment=args.aa,
        color_jitter=jitter[0] if jitter and len(jitter) == 1 else jitter,
        color_jitter_prob=1.0 if args.color_jitter_prob is None else args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    if args.train_interpolation:
        found["interpolation"] = args.train_interpolation
    return found


def updates_per_epoch(loader: Any, args: argparse.Namespace) -> int:
    """Each update takes --grad-accum-steps batches; the last one of an epoch may take fewer."""
    return -(-len(loader) // args.grad_accum_steps)


def build_run(
    args: argparse.Namespace, model: nn.Module, train: Any, val: Any, size: tuple[int, ...], folder: Path
) -> Run:
    """Moves the model to the device and sets up optimiser, schedule, scaler, averaged weights and DDP."""
    device = train.device
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and dist.is_initialized():
        model = convert_sync_batchnorm(model)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        known = [*map(str, list_optimizers())]
        raise ValueError(f"--opt {args.opt}: {error}{similar(args.opt, known)}") from error
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch(train, args)
        )
    except (ValueError, AssertionError) as error:
        raise ValueError(f"--sched {args.sched}: {error}") from error
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16")
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    network: Any = model
    if args.torchcompile:
        try:
            network = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
        except RuntimeError as error:
            raise ValueError(f"--torchcompile {args.torchcompile}: {error}") from error
    if dist.is_initialized():
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    return Run(train, val, folder, size, model, network, optimizer, scheduler, scaler, autocast, ema, sums, epochs)
