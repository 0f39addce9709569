"""Train any timm model from an image folder through DALI, with CutMix/Mixup in the graph and the LUMix loss.

DIR holds `train` and `val` (or `validation`), each with one folder a class. Flags are timm's where timm has
them; the mixing draws one λ a batch unless `--mixup-mode elem`, as timm does. One difference: CutMix is on
by default (`--cutmix 1.0`), because LUMix needs it.

    python -m pipelines.train --data-dir DIR --model resnet50 --epochs 100 --lr .1 -b 256 --amp
    python -m pipelines.train --data-dir DIR --model deit_small_patch16_224 --opt adamw --lr 1e-3 \\
        --weight-decay .05 --mixup .8 --cutmix 1.0 --drop-path .1 --model-ema
    python -m pipelines.train --data-dir DIR --model resnet50 --no-lumix     # plain CutMix, to compare
    torchrun --nproc_per_node 8 -m pipelines.train --data-dir DIR --model resnet50 -b 256 --amp     # 8 GPUs
    python -m pipelines.train --config runs/NAME/args.yaml --resume runs/NAME     # go on where it stopped
    python -m pipelines.train --config pipelines/recipes/deit_small.yaml --smoke     # a paper's row: does it run?

OUTPUT/EXPERIMENT gets `last.pth.tar` and `model_best.pth.tar` (`timm.create_model(checkpoint_path=...)` loads
them), `summary.csv` and `log.jsonl` (a row an epoch), `args.yaml` and, at the end, `summary.json`.

A run that is killed, at whatever moment, goes on from its last.pth.tar with `--resume` and the same flags on as
many ranks, on the CPU bit for bit; `--checkpoint-interval` has that file written within the epochs, too. On
SIGINT and SIGTERM it is written at once, and the run ends.
"""

import argparse
import csv
import io
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from nvidia import dali
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lumix_dali import LUMixLoss, MixTarget, __version__, check_target, create_loader
from lumix_dali.data.sources import Source, load

from .checkpoint import SUMS, Run, metric_name, read_checkpoint, resume, save
from .flags import parse_args, ratios
from .ranks import Stop, gathered, joined, summed
from .smoke import shrink


def load_data(args: argparse.Namespace) -> tuple[Source, Source]:
    """The training and the validation samples.

    Raises:
        ValueError: if a folder or a class is missing or empty, or the two differ in their classes.
    """
    def split(*names: str) -> Source:
        for name in names:
            if Path(args.data_dir, name).is_dir():
                data = load(Path(args.data_dir, name))
                if data.classes is None:
                    raise ValueError(f"--data-dir {args.data_dir}: nothing says which classes the shards in "
                                     f"{name} have; write them with `lumix-dali convert`")
                return data
        raise ValueError(f"--data-dir {args.data_dir}: no folder {' or '.join(names)} in it; "
                         "images belong in train/CLASS/ and val/CLASS/")

    train = split(args.train_split)
    val = split(args.val_split) if args.val_split else split("val", "validation")
    if train.classes != val.classes:
        odd = sorted(train.class_to_idx.keys() ^ val.class_to_idx)
        raise ValueError(f"--data-dir {args.data_dir}: training and validation differ in the classes "
                         f"{odd[:5]}; give both the same class folders")
    return train, val


def build_criterion(args: argparse.Namespace) -> LUMixLoss:
    """The LUMix loss; `--no-lumix` is its plain special case, soft cross entropy at λ0."""
    eta = 0. if args.no_lumix else args.eta
    return LUMixLoss(*ratios(args), eta, noise=args.noise, smoothing=args.smoothing,
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


def build_loaders(args: argparse.Namespace, train_data: Any, val_data: Any, data_config: dict):
    """The training and the validation loader, with the input that timm's `data_config` describes."""
    common = dict(data_config, device=args.device, channels_last=args.channels_last, num_threads=args.workers,
                  seed=args.seed, rank=args.rank, world_size=args.world_size, max_bad=args.max_bad)
    jitter = args.color_jitter  # a list, but a number in timm's YAML
    augmentation = dict(
        auto_augment=args.aa,
        color_jitter=jitter[0] if isinstance(jitter, list) and len(jitter) == 1 else jitter,
        re_prob=args.reprob, re_mode=args.remode, re_count=args.recount, num_aug_repeats=args.aug_repeats)
    if args.train_interpolation:
        augmentation["interpolation"] = args.train_interpolation
    train = create_loader(
        train_data, batch_size=args.batch_size, is_training=True, scale=args.scale, ratio=args.ratio,
        hflip=args.hflip, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, **common | augmentation)
    val_batch = args.validation_batch_size or args.batch_size
    return train, create_loader(val_data, batch_size=val_batch, is_training=False, **common)


def leave(run: Run, args: argparse.Namespace, number: int) -> None:
    """Ends the program as a signal asks, saying how to go on."""
    last = run.folder / "last.pth.tar"
    if args.rank == 0:
        how = f"go on with --resume {last}" if last.exists() else "there is no checkpoint yet"
        print(f"stopped by {signal.Signals(number).name} in epoch {run.epoch}: {how}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def updates_per_epoch(loader: Any, args: argparse.Namespace) -> int:
    """An update takes --grad-accum-steps batches, the last one of an epoch what is left."""
    return -(-len(loader) // args.grad_accum_steps)


def build_run(args: argparse.Namespace, model: nn.Module, train: Any, val: Any, size: tuple[int, ...],
              folder: Path) -> Run:
    """Moves the model to the device and gives it its optimiser, schedule, scaler, average and ranks."""
    device = train.device
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and dist.is_initialized():
        model = convert_sync_batchnorm(model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    scheduler, _ = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch(train, args))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16")
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
    network: Any = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    if dist.is_initialized():
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    return Run(train, val, folder, size, model, network, optimizer, scheduler, scaler, autocast, ema, sums)


def train_one_epoch(run: Run, criterion: LUMixLoss, args: argparse.Namespace, stop: Stop) -> dict[str, float]:
    """Trains an epoch, or what is left of it; sums stay on the device until its end, so that no step waits for it.

    Returns:
        train_loss, lam0_mean (over all samples, unmixed ones as 0), lr, images_per_second, and every
        --log-interval batches' means over the samples that LUMix applies to, 0 where there are none: lumix_lam0,
        lumix_lam_s, lumix_lam (what the labels become) and lumix_clamped (share of λ at 0 or 1).

    Raises:
        FloatingPointError: if the loss is no longer finite.
        SystemExit: a signal came; the checkpoint is written.
    """
    run.model.train()
    loader, first, start = run.train, run.step, time.perf_counter()
    everywhere = args.batch_size * args.world_size
    with progress(len(loader) * everywhere, f"epoch {run.epoch}", args, first * everywhere) as bar:
        for images, target in remaining(run, args):
            loss = train_step(run, images, target, criterion, args)
            bar.update(everywhere)
            if (run.step - 1) % args.log_interval == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{learning_rate_now(run):.2e}", refresh=False)
            if run.step % args.grad_accum_steps and run.step < len(loader):
                continue
            asked = stop.agreed()
            if asked or (args.checkpoint_interval and run.updates % args.checkpoint_interval == 0):
                check_finite(run)
                save(run, args)
            if asked:
                leave(run, args, asked)
    check_finite(run)
    sums, count = dict(zip(SUMS, summed(run.sums), strict=True)), len(loader) * everywhere
    applied = max(sums["applied"], 1.)
    return {"train_loss": sums["loss"] / count, "lam0_mean": sums["lam0"] / count,
            **{name: sums[name] / applied for name in SUMS[3:]}, "lr": learning_rate_now(run),
            "images_per_second": (len(loader) - first) * everywhere / (time.perf_counter() - start)}


def remaining(run: Run, args: argparse.Namespace) -> Iterator[tuple[torch.Tensor, MixTarget]]:
    """The batches of this epoch that are not done yet."""
    if run.step < len(run.train):  # else the loader stands in the next epoch already
        run.train.set_epoch(run.epoch)
        run.train.mixup_enabled = not 0 < args.mixup_off_epoch <= run.epoch
        yield from run.train


def train_step(run: Run, images: torch.Tensor, target: MixTarget, criterion: LUMixLoss,
               args: argparse.Namespace) -> torch.Tensor:
    """One batch, and an update where it is the last of --grad-accum-steps; returns its loss."""
    steps, accum = updates_per_epoch(run.train, args), args.grad_accum_steps
    group = min(accum, len(run.train) - run.step // accum * accum)  # an epoch's last update may have fewer
    is_last = run.step % accum == group - 1
    criterion.r_r, criterion.r_s = ratios(args, run.updates / steps)
    with nullcontext() if is_last else getattr(run.network, "no_sync", nullcontext)():
        with run.autocast:
            logits = run.network(images)
            if run.updates == 0:
                check_target(target, logits.size(1))
            # Drawn here, so that the statistics can be of the λ that the loss has.
            lam_r = criterion.draw(logits) if ratios(args)[0] else None
            loss = criterion(logits, target, lam_r)
        run.scaler.scale(loss / group).backward()
    run.sums[:2] += torch.stack([loss.detach() * len(images), target.lam0.sum()])
    if run.step % args.log_interval == 0:
        run.sums[2:] += lam_sums(criterion, logits.detach(), target, lam_r)
    if is_last:
        update(run, args)
    run.step += 1
    return loss.detach()


def lam_sums(criterion: LUMixLoss, logits: torch.Tensor, target: MixTarget,
             lam_r: torch.Tensor | None) -> torch.Tensor:
    """SUMS[2:] of a batch: number of samples that LUMix applies to, their λ0, λ_s and λ, and the clamped ones."""
    lam = criterion.lam(logits, target, lam_r)
    pair = logits.to(lam.dtype).gather(1, torch.stack([target.partner_labels, target.labels], 1))
    applied = (target.lam0 > 0) & (target.lam0 < 1)
    if criterion.apply_to == "cutmix":
        applied &= target.kind == 2
    clamped = (lam <= 0) | (lam >= 1)
    columns = (torch.ones_like(lam), target.lam0, pair.softmax(1)[:, 0], lam, clamped)
    return (torch.stack([column.to(lam.dtype) for column in columns]) * applied).sum(1)


def update(run: Run, args: argparse.Namespace) -> None:
    """One step of the optimiser, of the average, and of a schedule by updates."""
    if args.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        parameters = model_parameters(run.model, exclude_head=args.clip_mode == "agc")
        dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.updates += 1
    if run.ema:
        run.ema.update(run.model, step=run.updates)
    run.scheduler.step_update(run.updates)


def learning_rate_now(run: Run) -> float:
    """Of the first group of parameters."""
    return run.optimizer.param_groups[0]["lr"]


def check_finite(run: Run) -> None:
    """Stops a run that has gone astray, before its weights take the place of good ones."""
    if not math.isfinite(run.sums[0].item()):
        raise FloatingPointError(f"the training loss of epoch {run.epoch} is {run.sums[0].item()}: lower --lr, "
                                 "give --clip-grad, or with --amp try --amp-dtype bfloat16")


def share_statistics(run: Run, args: argparse.Namespace) -> None:
    """Gives all ranks the running means of rank 0, on which DDP goes on too, so that they validate one model."""
    if dist.is_initialized():
        for model in (run.model, run.evaluated):
            distribute_bn(model, args.world_size, reduce=False)


@torch.inference_mode()
def validate(run: Run, args: argparse.Namespace, stop: Stop) -> dict[str, float]:
    """Top-1 and top-5 in percent, and the plain cross entropy, over every validation sample once."""
    share_statistics(run, args)
    run.evaluated.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=run.val.device)
    with progress(len(run.val.dataset), "validation", args) as bar:
        for images, labels in run.val:
            with run.autocast:
                logits = run.evaluated(images)
            hits = logits.topk(min(5, logits.size(1))).indices == labels[:, None]
            loss = cross_entropy(logits.float(), labels, reduction="sum")
            sums[:3] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            sums[3] += len(labels)
            bar.update(len(labels) * args.world_size)
            if stop.signal:  # ranks need not agree: nothing is written
                leave(run, args, stop.signal)
    loss_sum, top1, top5, count = summed(sums)
    return {"loss": loss_sum / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def progress(total: int, what: str, args: argparse.Namespace, initial: int = 0) -> tqdm:
    """Rank 0's bar, with the images/s of all; in a log file it speaks once a minute."""
    interval = .1 if sys.stderr.isatty() else 60
    return tqdm(total=total, desc=what, unit="img", unit_scale=True, leave=False, dynamic_ncols=True,
                mininterval=interval, delay=interval, initial=initial, disable=args.rank > 0)


def best_epochs(rows: list[dict[str, float]], args: argparse.Namespace) -> list[int]:
    """All epochs, the best first; of two equals the earlier."""
    sign = 1 if args.eval_metric == "loss" else -1
    return [int(row["epoch"]) for row in sorted(rows, key=lambda row: sign * row[metric_name(args)])]


def save_epoch(run: Run, args: argparse.Namespace) -> None:
    """Writes last.pth.tar, and model_best and checkpoint-E where the epoch earns it, and the log."""
    epoch, best = int(run.rows[-1]["epoch"]), best_epochs(run.rows, args)
    keep, drop = best[:args.checkpoint_hist], best[args.checkpoint_hist:]
    earned = {"model_best": epoch == best[0], f"checkpoint-{epoch}": epoch in keep}
    save(run, args, *(name for name in earned if earned[name]))
    if args.rank == 0:
        for old in drop:
            (run.folder / f"checkpoint-{old}.pth.tar").unlink(missing_ok=True)
        write_log(run)


def write_log(run: Run) -> None:
    """Writes summary.csv and log.jsonl from the rows, so that neither ever differs from the checkpoint."""
    table = io.StringIO()
    if run.rows:
        writer = csv.DictWriter(table, run.rows[0])
        writer.writeheader()
        writer.writerows(run.rows)
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    for name, text in {"summary.csv": table.getvalue(), "log.jsonl": lines}.items():
        (run.folder / "tmp.log").write_text(text, newline="")
        os.replace(run.folder / "tmp.log", run.folder / name)


def fit(run: Run, criterion: LUMixLoss, args: argparse.Namespace, stop: Stop) -> None:
    """Trains, validates, logs and saves every epoch that is left."""
    while run.epoch < args.epochs:
        row = {"epoch": run.epoch, **train_one_epoch(run, criterion, args, stop)}
        scores = validate(run, args, stop)
        row |= {"val_loss": scores["loss"], "top1": scores["top1"], "top5": scores["top5"]}
        run.scheduler.step(run.epoch + 1, scores[args.eval_metric])
        run.rows.append(row)
        run.epoch, run.step = run.epoch + 1, 0
        run.sums.zero_()
        save_epoch(run, args)
        if args.rank == 0:
            print("epoch {epoch:3}  train loss {train_loss:.4f}  val loss {val_loss:.4f}  top-1 {top1:.2f}  top-5 "
                  "{top5:.2f}  mean λ0 {lam0_mean:.3f}; of LUMix λ0 {lumix_lam0:.3f} λ_s {lumix_lam_s:.3f} λ "
                  "{lumix_lam:.3f}  {images_per_second:,.0f} img/s".format(**row), flush=True)


def replaced_files(run: Run) -> list[str]:
    """The damaged files that the loaders of all ranks replaced; on rank 0."""
    mine = {name for loader in (run.train, run.val) for name in loader.bad}
    return sorted(set().union(*gathered(mine)))


def summarise(run: Run, args: argparse.Namespace, replaced: list[str]) -> dict[str, Any]:
    """The last epoch's scores, which are those of last.pth.tar, the best epoch's, and what ran."""
    last, best = run.rows[-1], best_epochs(run.rows, args)[0]
    versions = {"lumix_dali": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
                "timm": timm.__version__, "dali": dali.__version__}
    return {"top1": last["top1"], "top5": last["top5"], "val_loss": last["val_loss"],
            "best": run.rows[best][metric_name(args)], "best_epoch": best, "eval_metric": args.eval_metric,
            "images_per_second": statistics.median(row["images_per_second"] for row in run.rows),
            "lam0_mean": statistics.fmean(row["lam0_mean"] for row in run.rows), "replaced": len(replaced),
            "device": torch.cuda.get_device_name(run.train.device) if run.train.device.type == "cuda" else "cpu",
            "ranks": args.world_size, "model": args.model, "epochs": args.epochs, "seed": args.seed,
            "versions": versions}


def start(run: Run, args: argparse.Namespace, found: tuple[Path, dict[str, Any]] | None) -> None:
    """Resumes, where there is something to resume, and lays out the run's folder."""
    if found:
        resume(run, args, *found)
    if args.rank:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "summary.json").unlink(missing_ok=True)  # an earlier run's, should this one not get there
    once = {"config", "resume", "rank", "world_size"}  # of this call, not of the run
    settings = {key: value for key, value in vars(args).items() if key not in once}
    (run.folder / "args.yaml").write_text(yaml.safe_dump(settings))
    write_log(run)
    size = "x".join(map(str, run.input_size[1:]))
    print(f"{args.model}: {len(run.train.dataset)} images of {len(run.train.classes)} classes at {size}, "
          f"{args.world_size} rank(s) on {run.train.device}, into {run.folder}")
    if found:
        print(f"goes on from {found[0]}, epoch {run.epoch}, batch {run.step}", flush=True)
    elif args.resume:
        print(f"--resume: there is no {run.folder / 'last.pth.tar'} yet, it starts anew", flush=True)


def run_folder(args: argparse.Namespace, found: tuple[Path, dict[str, Any]] | None, size: str) -> Path:
    """OUTPUT/EXPERIMENT; a run that goes on, and is given no other name, stays where it is."""
    if found and not args.experiment:
        return found[0].parent
    return Path(args.output, args.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{size}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains as the command line says and leaves everything under OUTPUT/EXPERIMENT.

    Args:
        argv: the command line without the program's name; None takes the process's own.

    Returns:
        The summary, as rank 0 writes it to summary.json.

    Raises:
        ValueError: for a wrong argument, folder or checkpoint, before the first batch.
    """
    args = parse_args(argv, __doc__)
    if args.smoke:
        shrink(args)
    criterion = build_criterion(args)
    train_data, val_data = load_data(args)
    with joined(args):
        found = read_checkpoint(args) if args.resume else None
        torch.manual_seed(args.seed + args.rank)  # the ranks draw different λ_r
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

        model = build_model(args, len(train_data.class_to_idx))
        data_config = resolve_data_config(vars(args), model=model)
        train, val = build_loaders(args, train_data, val_data, data_config)
        folder = run_folder(args, found, "x".join(map(str, data_config["input_size"][1:])))
        with train, val, Stop() as stop:
            run = build_run(args, model, train, val, data_config["input_size"], folder)
            start(run, args, found)
            fit(run, criterion, args, stop)
            replaced = replaced_files(run)
            summary = summarise(run, args, replaced)
        if args.rank == 0:
            for path in replaced:
                print(f"replaced, it cannot be used: {path}")
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))  # all is closed; Python's own way out takes torch two seconds
