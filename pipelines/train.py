"""Train any timm model from an image folder through DALI, with CutMix/Mixup in the graph and the LUMix loss.

DIR holds `train` and `val` (or `validation`), each with one folder a class. Flags are timm's where timm has
them; the mixing draws one λ a batch unless `--mixup-mode elem`, as timm does. One difference: CutMix is on
by default (`--cutmix 1.0`), because LUMix needs it.

    python -m pipelines.train --data-dir DIR --model resnet50 --epochs 100 --lr .1 -b 256 --amp
    python -m pipelines.train --data-dir DIR --model deit_small_patch16_224 --opt adamw --lr 1e-3 \\
        --weight-decay .05 --mixup .8 --cutmix 1.0 --drop-path .1 --model-ema
    python -m pipelines.train --data-dir DIR --model resnet50 --no-lumix     # plain CutMix, to compare

OUTPUT/EXPERIMENT gets `last.pth.tar` and `model_best.pth.tar` (`timm.create_model(checkpoint_path=...)` loads
them), `summary.csv` and `log.jsonl` (a row an epoch), `args.yaml` and, at the end, `summary.json`.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from nvidia import dali
from timm.data import resolve_data_config
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, ParseKwargs, dispatch_clip_grad
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lumix_dali import LUMixLoss, __version__, check_target, create_loader
from lumix_dali.sources import Samples, load


@dataclass
class Run:
    """What training changes: all that a checkpoint could have to restore."""

    model: nn.Module
    network: Callable[..., torch.Tensor]  # the model as it is called: compiled, where asked for
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    ema: ModelEmaV3 | None
    updates: int = 0

    @property
    def evaluated(self) -> nn.Module:
        """The model that `timm.create_model(checkpoint_path=...)` takes from our checkpoints."""
        return self.ema.module if self.ema else self.model


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it stands, and every default."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; what is wrong on its face ends the program here, before any work."""
    parser = argparse.ArgumentParser("python -m pipelines.train", description=__doc__, formatter_class=Help)
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", required=True, metavar="DIR", help="folder with train/ and val/ or validation/")
    add("--train-split", default="train", help="folder of the training images under DIR")
    add("--val-split", help="folder of the validation images; None: val or validation")
    add("-b", "--batch-size", type=int, default=128, help="images a batch")
    add("-vb", "--validation-batch-size", type=int, help="None: the training batch size")
    add("-j", "--workers", type=int, help="DALI's CPU threads; None: the CPUs it may use")
    add("--img-size", type=int, help="side of a square input; None: the model's")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="input of any shape")
    add("--scale", type=float, nargs=2, default=(.08, 1.), help="area of the random resized crop")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of that crop")
    add("--hflip", type=float, default=.5, help="probability of a horizontal flip")
    add("--interpolation", default="", help="bilinear or bicubic; None: the model's")
    add("--mean", type=float, nargs=3, help="of each channel, in [0, 1]; None: the model's")
    add("--std", type=float, nargs=3, help="of each channel, in [0, 1]; None: the model's")
    add("--crop-pct", type=float, help="centre crop in validation; None: the model's")

    add = parser.add_argument_group("mixing and loss").add_argument
    add("--mixup", type=float, default=0., help="alpha of Mixup; 0 is off")
    add("--cutmix", type=float, default=1., help="alpha of CutMix; 0, timm's default, is off")
    add("--cutmix-minmax", type=float, nargs=2, help="share of the box's sides instead of alpha")
    add("--mixup-prob", type=float, default=1., help="share of the samples or batches that are mixed")
    add("--mixup-switch-prob", type=float, default=.5, help="share of CutMix where both are on")
    add("--mixup-mode", default="batch", help="one draw a batch, or one a sample: batch or elem")
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixing from epoch N on; 0 is never")
    add("--smoothing", type=float, default=.1, help="label smoothing")
    add("--bce-loss", action="store_true", help="sigmoid BCE instead of softmax cross entropy")
    add("--bce-sum", action="store_true", help="sum the BCE over classes instead of the mean")
    add("--no-lumix", action="store_true", help="plain CutMix/Mixup: soft cross entropy at λ0")
    add("--r-r", type=float, default=.4, help="ratio of the noise λ_r in λ")
    add("--r-s", type=float, default=.1, help="ratio of the saliency λ_s in λ")
    add("--eta", type=float, default=1., help="weight of the regulariser R")
    add("--noise", nargs="+", default=["beta", "2.0"], metavar="LAW",
        help="law of λ_r: beta ALPHA, normal MEAN STD, or uniform")
    add("--attach-lam-s", action="store_true", help="let the gradient through λ_s")
    add("--apply-to", choices=("cutmix", "all"), default="cutmix", help="kinds of samples LUMix changes")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnet50", help="any name timm.create_model knows")
    add("--num-classes", type=int, help="None: as many as the training folder has")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add("--initial-checkpoint", default="", metavar="PATH", help="start from these weights")
    add("--drop", type=float, default=0., help="dropout")
    add("--drop-path", type=float, help="stochastic depth; None: the model's")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="of the model")
    add("--model-ema", action="store_true", help="keep an average of the weights; it is what is validated")
    add("--model-ema-decay", type=float, default=.9998, help="of that average")
    add("--channels-last", action="store_true", help="memory format of images and model")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")

    add = parser.add_argument_group("optimiser and schedule").add_argument
    add("--opt", default="sgd", help="any name of timm.optim")
    add("--opt-eps", type=float, help="None: the optimiser's")
    add("--opt-betas", type=float, nargs="+", help="None: the optimiser's")
    add("--momentum", type=float, default=.9, help="where the optimiser has one")
    add("--weight-decay", type=float, default=2e-5, help="not applied to biases and norms")
    add("--clip-grad", type=float, metavar="NORM", help="None: no clipping")
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="what is clipped")
    add("--lr", type=float, help="None: --lr-base, scaled by the batch size")
    add("--lr-base", type=float, default=.1, help="learning rate at --lr-base-size")
    add("--lr-base-size", type=int, default=256, help="batch size of --lr-base")
    add("--lr-base-scale", choices=("linear", "sqrt"), help="None: sqrt for adaptive optimisers")
    add("--epochs", type=int, default=300, help="length of the run")
    add("--sched", default="cosine", help="any name of timm.scheduler")
    add("--sched-on-updates", action="store_true", help="a step of the schedule an update, not an epoch")
    add("--warmup-epochs", type=int, default=5, help="from --warmup-lr on")
    add("--warmup-lr", type=float, default=1e-5, help="where the warm-up starts")
    add("--warmup-prefix", action="store_true", help="start the schedule after the warm-up")
    add("--min-lr", type=float, default=0., help="where the schedule ends")
    add("--decay-epochs", type=float, default=90, help="between two decays")
    add("--decay-milestones", type=int, nargs="+", default=(90, 180, 270), help="for multistep")
    add("--decay-rate", type=float, default=.1, help="factor of a decay")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="of mixed precision")
    add("--seed", type=int, default=42, help="of everything drawn")
    add("--output", default="runs", metavar="PATH", help="where runs go")
    add("--experiment", default="", help="folder under OUTPUT; empty: time, model and size")
    add("--eval-metric", choices=("top1", "top5", "loss"), default="top1", help="what model_best is best in")
    add("--checkpoint-hist", type=int, default=0, metavar="N", help="best epochs kept besides model_best")
    add("--log-interval", type=int, default=50, metavar="N", help="batches between updates of the loss shown")
    args = parser.parse_args(argv)

    for name, least in {"epochs": 1, "log_interval": 1, "checkpoint_hist": 0, "seed": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")
    cutmix = args.cutmix > 0 or args.cutmix_minmax
    if not args.no_lumix and not cutmix and (args.apply_to == "cutmix" or not args.mixup):
        parser.error(f"--cutmix {args.cutmix:g} leaves LUMix no sample to apply to: give --cutmix 1.0, "
                     "--mixup .8 with --apply-to all, or --no-lumix")
    try:
        args.noise = (args.noise[0], *map(float, args.noise[1:]))
    except ValueError:
        parser.error(f"--noise {' '.join(args.noise)}: give beta ALPHA, normal MEAN STD, or uniform")
    args.lr = learning_rate(args) if args.lr is None else args.lr
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.world_size > 1:
        parser.error(f"WORLD_SIZE {args.world_size}: several ranks are not supported yet; "
                     "start it without torchrun")
    return args


def load_data(args: argparse.Namespace) -> tuple[Samples, Samples]:
    """The training and the validation samples.

    Raises:
        ValueError: if a folder or a class is missing or empty, or the two differ in their classes.
    """
    def split(*names: str) -> Samples:
        for name in names:
            if Path(args.data_dir, name).is_dir():
                return load(Path(args.data_dir, name))
        raise ValueError(f"--data-dir {args.data_dir}: no folder {' or '.join(names)} in it; "
                         "images belong in train/CLASS/ and val/CLASS/")

    train = split(args.train_split)
    val = split(args.val_split) if args.val_split else split("val", "validation")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"--data-dir {args.data_dir}: training and validation differ in the classes "
                         f"{odd[:5]}; give both the same class folders")
    return train, val


def build_criterion(args: argparse.Namespace) -> LUMixLoss:
    """The LUMix loss; `--no-lumix` is its plain special case, soft cross entropy at λ0."""
    r_r, r_s, eta = (0., 0., 0.) if args.no_lumix else (args.r_r, args.r_s, args.eta)
    return LUMixLoss(r_r, r_s, eta, noise=args.noise, smoothing=args.smoothing,
                     base="bce" if args.bce_loss else "softmax",
                     bce_reduction="sum" if args.bce_sum else "mean",
                     detach_lam_s=not args.attach_lam_s, apply_to=args.apply_to)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """A timm model with an output a class, made for the input size asked for.

    Raises:
        ValueError: if `--num-classes` is smaller than the number of classes in the data.
    """
    if args.num_classes is not None and args.num_classes < num_classes:
        raise ValueError(f"--num-classes {args.num_classes}: the training folder has {num_classes} classes, "
                         f"more classes than the model has; give at least {num_classes}, or leave it out")
    model: Any = timm.create_model(
        args.model, pretrained=args.pretrained, checkpoint_path=args.initial_checkpoint,
        num_classes=args.num_classes or num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path,
        **args.model_kwargs)
    size = args.input_size[1:] if args.input_size else args.img_size
    if size and hasattr(model, "set_input_size"):  # position embeddings and windows have a size of their own
        model.set_input_size(img_size=size)
    return model


def build_loaders(args: argparse.Namespace, train_data: Samples, val_data: Samples, data_config: dict):
    """The training and the validation loader, with the input that timm's `data_config` describes."""
    common = dict(data_config, device=args.device, channels_last=args.channels_last, num_threads=args.workers,
                  seed=args.seed, rank=args.rank, world_size=args.world_size)
    train = create_loader(
        train_data, batch_size=args.batch_size, is_training=True, scale=args.scale, ratio=args.ratio,
        hflip=args.hflip, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, **common)
    val_batch = args.validation_batch_size or args.batch_size
    return train, create_loader(val_data, batch_size=val_batch, is_training=False, **common)


def learning_rate(args: argparse.Namespace) -> float:
    """`--lr-base` scaled by the batch size, by timm's rule."""
    ratio = args.batch_size / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return args.lr_base * (ratio ** .5 if scale == "sqrt" else ratio)


def build_run(args: argparse.Namespace, model: nn.Module, device: torch.device, steps: int) -> Run:
    """Moves the model to the device and gives it its optimiser, schedule, scaler and average."""
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=steps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16")
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
    network = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    return Run(model, network, optimizer, scheduler, scaler, autocast, ema)


def train_one_epoch(run: Run, loader, criterion: LUMixLoss, args: argparse.Namespace,
                    epoch: int) -> dict[str, float]:
    """Trains one epoch; sums stay on the device until its end, so that no step waits for it.

    Returns:
        train_loss, lam0_mean (over all samples, unmixed ones as 0), lr and images_per_second.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    run.model.train()
    loader.set_epoch(epoch)
    loader.mixup_enabled = not 0 < args.mixup_off_epoch <= epoch
    sums, count = torch.zeros(2, dtype=torch.float64, device=loader.device), len(loader) * args.batch_size
    lr = run.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    with progress(count, f"epoch {epoch}") as bar:
        for step, (images, target) in enumerate(loader):
            with run.autocast:
                logits = run.network(images)
                if run.updates == 0:
                    check_target(target, logits.size(1))
                loss = criterion(logits, target)
            update(run, loss, args)
            run.scheduler.step_update(run.updates)
            sums += torch.stack([loss.detach() * len(images), target.lam0.sum()])
            bar.update(len(images))
            if step % args.log_interval == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{lr:.2e}", refresh=False)
    loss_sum, lam0_sum = sums.tolist()
    if not math.isfinite(loss_sum):
        raise FloatingPointError(f"the training loss of epoch {epoch} is {loss_sum}: lower --lr, "
                                 "give --clip-grad, or with --amp try --amp-dtype bfloat16")
    return {"train_loss": loss_sum / count, "lam0_mean": lam0_sum / count, "lr": lr,
            "images_per_second": count / (time.perf_counter() - start)}


def update(run: Run, loss: torch.Tensor, args: argparse.Namespace) -> None:
    """One step of the optimiser, and of the average."""
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    if args.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        parameters = model_parameters(run.model, exclude_head=args.clip_mode == "agc")
        dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.updates += 1
    if run.ema:
        run.ema.update(run.model, step=run.updates)


@torch.inference_mode()
def validate(run: Run, loader) -> dict[str, float]:
    """Top-1 and top-5 in percent, and the plain cross entropy, over every validation sample once."""
    run.evaluated.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=loader.device), 0
    with progress(len(loader.dataset), "validation") as bar:
        for images, labels in loader:
            with run.autocast:
                logits = run.evaluated(images)
            hits = logits.topk(min(5, logits.size(1))).indices == labels[:, None]
            loss = cross_entropy(logits.float(), labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            count += len(labels)
            bar.update(len(labels))
    loss_sum, top1, top5 = sums.tolist()
    return {"loss": loss_sum / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def progress(total: int, what: str) -> tqdm:
    """A bar with images/s; in a log file it speaks once a minute."""
    interval = .1 if sys.stderr.isatty() else 60
    return tqdm(total=total, desc=what, unit="img", unit_scale=True, leave=False, dynamic_ncols=True,
                mininterval=interval, delay=interval)


def checkpoint(run: Run, args: argparse.Namespace, epoch: int, metric: float,
               classes: list[str]) -> dict[str, Any]:
    """The model in timm's checkpoint format; plain types only, so that `weights_only=True` loads it."""
    state = {"version": 2, "arch": args.model, "epoch": epoch, "metric": metric, "args": vars(args),
             "classes": classes, "state_dict": run.model.state_dict()}
    if run.ema:
        state["state_dict_ema"] = run.ema.module.state_dict()
    return state


def save_checkpoint(folder: Path, state: dict[str, Any], history: list[tuple[float, int]],
                    args: argparse.Namespace) -> None:
    """Writes last.pth.tar, and model_best and checkpoint-E where the epoch earns it.

    A file is replaced in one step, so that a run killed meanwhile leaves the old one whole. `history` holds
    (score, epoch) of all epochs, best first, and takes this one in.
    """
    scratch, last = folder / "tmp.pth.tar", folder / "last.pth.tar"
    torch.save(state, scratch)
    os.replace(scratch, last)

    epoch, keep = state["epoch"], args.checkpoint_hist
    history.append((-state["metric"] if args.eval_metric == "loss" else state["metric"], epoch))
    history.sort(key=lambda entry: -entry[0])  # stable: of two equals the earlier stays first
    for name, best in {"model_best": history[:1], f"checkpoint-{epoch}": history[:keep]}.items():
        if epoch in (number for _, number in best):
            shutil.copyfile(last, scratch)
            os.replace(scratch, folder / f"{name}.pth.tar")
    for _, old in history[keep:]:
        (folder / f"checkpoint-{old}.pth.tar").unlink(missing_ok=True)


def log_epoch(folder: Path, row: dict[str, float]) -> None:
    """Adds a row to summary.csv and log.jsonl (the first row starts both anew), and prints it."""
    mode = "a" if row["epoch"] else "w"
    with open(folder / "summary.csv", mode, newline="") as file:
        writer = csv.DictWriter(file, row)
        if not row["epoch"]:
            writer.writeheader()
        writer.writerow(row)
    with open(folder / "log.jsonl", mode) as file:
        file.write(json.dumps(row) + "\n")
    print("epoch {epoch:3}  train loss {train_loss:.4f}  val loss {val_loss:.4f}  top-1 {top1:.2f}  top-5 "
          "{top5:.2f}  mean λ0 {lam0_mean:.3f}  {images_per_second:,.0f} img/s".format(**row), flush=True)


def fit(run: Run, train, val, criterion: LUMixLoss, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains, validates, logs and saves every epoch.

    Returns:
        The summary: the last epoch's scores, which are those of last.pth.tar, and the best epoch's.
    """
    rows: list[dict[str, float]] = []
    history: list[tuple[float, int]] = []
    for epoch in range(args.epochs):
        row = {"epoch": epoch, **train_one_epoch(run, train, criterion, args, epoch)}
        scores = validate(run, val)
        row |= {"val_loss": scores["loss"], "top1": scores["top1"], "top5": scores["top5"]}
        metric = scores[args.eval_metric]
        run.scheduler.step(epoch + 1, metric)
        save_checkpoint(folder, checkpoint(run, args, epoch, metric, train.classes), history, args)
        log_epoch(folder, row)
        rows.append(row)
    versions = {"lumix_dali": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
                "timm": timm.__version__, "dali": dali.__version__}
    return {"top1": row["top1"], "top5": row["top5"], "val_loss": row["val_loss"],
            "best": abs(history[0][0]), "best_epoch": history[0][1], "eval_metric": args.eval_metric,
            "images_per_second": statistics.median(row["images_per_second"] for row in rows),
            "lam0_mean": statistics.fmean(row["lam0_mean"] for row in rows),
            "device": torch.cuda.get_device_name(train.device) if train.device.type == "cuda" else "cpu",
            "model": args.model, "epochs": args.epochs, "seed": args.seed, "versions": versions}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains as the command line says and leaves everything under OUTPUT/EXPERIMENT.

    Args:
        argv: the command line without the program's name; None takes the process's own.

    Returns:
        The summary, as written to summary.json.

    Raises:
        ValueError: for a wrong argument or folder, before the first batch.
    """
    args = parse_args(argv)
    criterion = build_criterion(args)
    train_data, val_data = load_data(args)
    torch.manual_seed(args.seed + args.rank)  # the ranks draw different λ_r
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")

    model = build_model(args, len(train_data.classes))
    data_config = resolve_data_config(vars(args), model=model)
    train, val = build_loaders(args, train_data, val_data, data_config)
    with train, val:
        run = build_run(args, model, train.device, len(train))
        size = "x".join(map(str, data_config["input_size"][1:]))
        folder = Path(args.output, args.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{size}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # an earlier run's, should this one not get there
        (folder / "args.yaml").write_text(yaml.safe_dump(vars(args)))
        print(f"{args.model}: {len(train.dataset)} images of {len(train.classes)} classes at {size} on "
              f"{train.device}, into {folder}")
        summary = fit(run, train, val, criterion, args, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
