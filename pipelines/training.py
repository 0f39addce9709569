"""Training: an epoch, validation, what is logged and saved, and the run from its first epoch to its last."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from nvidia import dali
from timm.data import resolve_data_config
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad, distribute_bn
from torch.nn.functional import cross_entropy

from lumix_dali import Kind, LUMixLoss, MixTarget, __version__, check_target

from . import checkpoint
from .build import build_criterion, build_loaders, build_model, build_run, load_data, updates_per_epoch
from .checkpoint import Found
from .flags import ONCE, ratios
from .folder import claimed, write_log, write_text
from .progress import progress
from .ranks import Stop, gathered, joined, summed
from .sizes import check_sizes, size_of_epoch
from .smoke import shrink
from .state import SUMS, Run, metric_name, read_checkpoint, resume, save
from .tracking import tracking
from .wait import ADVICE, DataWait

SCORES = ("val_loss", "top1", "top5")
MUCH_WAITING = 0.1  # share of an epoch


def leave(run: Run, args: argparse.Namespace, number: int) -> None:
    """Ends the program after a signal and prints how to resume."""
    how = f"--resume {run.folder / 'last.pth.tar'}"
    checkpoint.leave(number, f"in epoch {run.epoch}", how, speak=args.rank == 0)


def train_one_epoch(run: Run, criterion: LUMixLoss, args: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Trains an epoch, or the rest of it; sums stay on the device until the end, so that no step synchronises.

    Returns:
        train_loss, lam0_mean (over all samples; unmixed samples count as 0) and lr. Means over the samples that
        LUMix applies to, taken every --log-interval batches, or None without such samples: lumix_lam0,
        lumix_lam_s, lumix_lam (the resulting label weights) and lumix_clamped (share of λ at 0 or 1). For the
        batches trained in this call, or None without any: images_per_second and data_wait (share of the time
        spent without a batch, max over the ranks).

    Raises:
        FloatingPointError: if the loss is no longer finite.
        SystemExit: a signal arrived; the checkpoint has been written.
    """
    run.model.train()
    loader, first, start, wait = run.train, run.step, time.perf_counter(), DataWait(run.train.device)
    everywhere = args.batch_size * args.world_size
    with progress(len(loader) * everywhere, f"epoch {run.epoch}", first * everywhere, disable=args.rank > 0) as bar:
        for images, target in wait.batches(remaining(run, args)):
            loss = train_step(run, images, target, criterion, args)
            bar.update(everywhere)
            if (run.step - 1) % args.log_interval == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{learning_rate_now(run):.2e}", refresh=False)
            if run.step % args.grad_accum_steps and run.step < len(loader):
                continue
            asked = stop.agreed()
            if asked or (args.checkpoint_interval and run.updates % args.checkpoint_interval == 0):
                checkpoint.check_finite(run.sums[0].item(), f"of epoch {run.epoch}")
                save(run, args)
            if asked:
                leave(run, args, asked)
    checkpoint.check_finite(
        run.sums[0].item(), f"of epoch {run.epoch}"
    )  # also synchronises the device before the clock is read
    seconds, done = time.perf_counter() - start, (len(loader) - first) * everywhere
    sums, count = dict(zip(SUMS, summed(run.sums), strict=True)), len(loader) * everywhere
    waited = max(gathered(wait.seconds() / seconds), default=0.0)
    return {
        "train_loss": sums["loss"] / count,
        "lam0_mean": sums["lam0"] / count,
        **{name: sums[name] / sums["applied"] if sums["applied"] else None for name in SUMS[3:]},
        "lr": learning_rate_now(run),
        "images_per_second": done / seconds if done else None,
        "data_wait": waited if done else None,
    }


def remaining(run: Run, args: argparse.Namespace) -> Iterator[tuple[torch.Tensor, MixTarget]]:
    """The remaining batches of this epoch."""
    if run.step < len(run.train):  # otherwise the loader is already in the next epoch
        run.train.set_epoch(run.epoch)
        run.train.mixup_enabled = not 0 < args.mixup_off_epoch <= run.epoch
        run.train.input_size = size_of_epoch(args, run.epoch) or run.input_size
        yield from run.train


def train_step(
    run: Run, images: torch.Tensor, target: MixTarget, criterion: LUMixLoss, args: argparse.Namespace
) -> torch.Tensor:
    """Trains on one batch, updates after every --grad-accum-steps batches, and returns the loss."""
    steps, accum = updates_per_epoch(run.train, args), args.grad_accum_steps
    group = min(accum, len(run.train) - run.step // accum * accum)  # an epoch's last update may have fewer
    is_last = run.step % accum == group - 1
    criterion.r_r, criterion.r_s = ratios(args, run.updates / steps)
    with nullcontext() if is_last else getattr(run.network, "no_sync", nullcontext)():
        with run.autocast:
            logits = run.network(images)
            if run.updates == 0:
                check_target(target, logits.size(1))
            # Drawn here so that the statistics use the same λ_r as the loss.
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


def lam_sums(criterion: LUMixLoss, logits: torch.Tensor, target: MixTarget, lam_r: torch.Tensor | None) -> torch.Tensor:
    """SUMS[2:] of a batch: the number of samples that LUMix applies to, sums of their λ0, λ_s and λ, and how many
    are clamped."""
    lam = criterion.lam(logits, target, lam_r)
    applied = (target.lam0 > 0) & (target.lam0 < 1)
    if criterion.apply_to == "cutmix":
        applied &= target.kind == int(Kind.CUTMIX)
    clamped = (lam <= 0) | (lam >= 1)
    columns = (torch.ones_like(lam), target.lam0, criterion.lam_s(logits, target), lam, clamped)
    return (torch.stack([column.to(lam.dtype) for column in columns]) * applied).sum(1)


def update(run: Run, args: argparse.Namespace) -> None:
    """Steps the optimiser, the averaged weights and, if it works per update, the schedule."""
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
    if run.scheduler:
        run.scheduler.step_update(run.updates)


def learning_rate_now(run: Run) -> float:
    """Mean over the parameter groups, as timm logs it; they differ with --layer-decay."""
    return statistics.fmean(group["lr"] for group in run.optimizer.param_groups)


def share_statistics(run: Run, args: argparse.Namespace) -> None:
    """Broadcasts rank 0's batch norm statistics, as DDP does, so that all ranks validate the same model."""
    if dist.is_initialized():
        for model in (run.model, run.evaluated):
            distribute_bn(model, args.world_size, reduce=False)


@torch.inference_mode()
def validate(run: Run, args: argparse.Namespace, stop: Stop) -> dict[str, float]:
    """Top-1 and top-5 in percent and the plain cross entropy, over all validation samples.

    With --model-ema, these scores are those of the averaged weights; the model's own have the prefix model_.
    """
    models = {"": run.evaluated} | ({"model_": run.model} if run.ema else {})
    for model in models.values():
        model.eval()
    sums = torch.zeros(len(models), 3, dtype=torch.float64, device=run.val.device)
    count = torch.zeros((), dtype=torch.float64, device=run.val.device)
    with progress(len(run.val.dataset), "validation", disable=args.rank > 0) as bar:
        for images, labels in run.val:
            for scores, model in zip(sums, models.values(), strict=True):
                with run.autocast:
                    logits = model(images)
                hits = logits.topk(min(5, logits.size(1))).indices == labels[:, None]
                loss = cross_entropy(logits.float(), labels, reduction="sum")
                scores += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            count += len(labels)
            bar.update(len(labels) * args.world_size)
            if stop.signal:  # ranks need not agree: the checkpoint is already written
                leave(run, args, stop.signal)
    *values, total = summed(torch.cat([sums.flatten(), count[None]]))
    names = [(prefix, name) for prefix in models for name in SCORES]
    return {
        prefix + name: value / total * (1 if name == "val_loss" else 100)
        for (prefix, name), value in zip(names, values, strict=True)
    }


def best_epochs(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[int]:
    """All validated epochs, best first; ties go to the earlier epoch."""
    sign, name = 1 if args.eval_metric == "loss" else -1, metric_name(args)
    return [
        int(row["epoch"])
        for row in sorted((row for row in rows if row.get(name) is not None), key=lambda row: sign * row[name])
    ]


def save_epoch(run: Run, args: argparse.Namespace) -> None:
    """Writes last.pth.tar and the log, and model_best, checkpoint-E and milestone-N where this epoch qualifies."""
    epoch, best = int(run.rows[-1]["epoch"]), best_epochs(run.rows, args)
    keep, drop = best[: args.checkpoint_hist], best[args.checkpoint_hist :]
    earned = {
        "model_best": epoch in best[:1],
        f"checkpoint-{epoch}": epoch in keep,
        f"milestone-{epoch + 1}": epoch + 1 in args.save_epochs,
    }
    save(run, args, *(name for name in earned if earned[name]))
    if args.rank == 0:
        for old in drop:
            (run.folder / f"checkpoint-{old}.pth.tar").unlink(missing_ok=True)
        write_log(run.folder, run.rows)


def fit(
    run: Run, criterion: LUMixLoss, args: argparse.Namespace, stop: Stop, track: Callable[[dict[str, Any]], None]
) -> None:
    """Trains, validates, logs and saves all remaining epochs."""
    last = min(run.epochs, args.stop_epoch or run.epochs)
    while run.epoch < last:
        row: dict[str, Any] = {"epoch": run.epoch, **train_one_epoch(run, criterion, args, stop)}
        share_statistics(run, args)
        if run.saved != (run.epoch, run.step):
            save(run, args)  # a failure in validation must not lose the epoch
        done = run.epoch + 1
        is_due = done % args.val_interval == 0 or done == last or done in args.save_epochs
        row |= validate(run, args, stop) if is_due else dict.fromkeys(SCORES)
        if run.scheduler:
            run.scheduler.step(done, row[metric_name(args)])
        run.rows.append(row)
        run.epoch, run.step = done, 0
        run.sums.zero_()
        save_epoch(run, args)
        if args.rank == 0:
            report(row)
            if (row["data_wait"] or 0) > MUCH_WAITING and row["epoch"] == 0 and not args.smoke:
                print(ADVICE, flush=True)
            track(row)


def report(row: dict[str, Any]) -> None:
    """Prints an epoch's numbers."""

    def shown(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    scores = "  ".join(f"{word} {shown(name, '.2f')}" for word, name in (("top-1", "top1"), ("top-5", "top5")))
    if "model_top1" in row:
        scores += f" (without averaging {row['model_top1']:.2f})"
    lumix = f"λ0 {shown('lumix_lam0', '.3f')} λ_s {shown('lumix_lam_s', '.3f')} λ {shown('lumix_lam', '.3f')}"
    print(
        f"epoch {row['epoch']:3}  train loss {row['train_loss']:.4f}  val loss {shown('val_loss', '.4f')}  "
        f"{scores}  mean λ0 {row['lam0_mean']:.3f}; of LUMix {lumix}  "
        f"{shown('images_per_second', ',.0f')} img/s, {shown('data_wait', '.0%')} of the time waiting for data",
        flush=True,
    )


def replaced_files(run: Run) -> list[str]:
    """On rank 0, the damaged samples that the loaders of all ranks replaced."""
    mine = {name for loader in (run.train, run.val) for name in loader.bad}
    return sorted(set().union(*gathered(mine)))


def summarise(run: Run, args: argparse.Namespace, replaced: list[str]) -> dict[str, Any]:
    """The scores of the last epoch (those of last.pth.tar) and of the best one, with settings and versions."""
    last, best = run.rows[-1], best_epochs(run.rows, args)[0]
    versions = {
        "lumix_dali": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "timm": timm.__version__,
        "dali": dali.__version__,
    }
    return {
        "top1": last["top1"],
        "top5": last["top5"],
        "val_loss": last["val_loss"],
        "best": run.rows[best][metric_name(args)],
        "best_epoch": best,
        "eval_metric": args.eval_metric,
        "images_per_second": median(run.rows, "images_per_second"),
        "data_wait": median(run.rows, "data_wait"),
        "lam0_mean": statistics.fmean(row["lam0_mean"] for row in run.rows),
        "replaced": len(replaced),
        "device": torch.cuda.get_device_name(run.train.device) if run.train.device.type == "cuda" else "cpu",
        "ranks": args.world_size,
        "model": args.model,
        "epochs": len(run.rows),
        "seed": args.seed,
        "versions": versions,
    }


def median(rows: list[dict[str, Any]], name: str) -> float | None:
    """Median of a column; None if no row has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None


def start(run: Run, args: argparse.Namespace, found: Found | None) -> None:
    """Resumes if there is a checkpoint, and sets up the run's folder."""
    if found:
        resume(run, args, found)
    if args.rank:
        return
    (run.folder / "summary.json").unlink(missing_ok=True)  # an earlier run's must not outlive this start
    settings = {key: value for key, value in vars(args).items() if key not in ONCE}
    write_text(run.folder / "args.yaml", yaml.safe_dump(settings))
    write_log(run.folder, run.rows)
    size = "x".join(map(str, run.input_size[1:]))
    print(
        f"{args.model}: {len(run.train.dataset)} images of {len(run.train.classes)} classes at {size}, "
        f"{args.world_size} rank(s) on {run.train.device}, {run.epochs} epochs, into {run.folder}"
    )
    if found:
        print(f"resumes from {found.path}, epoch {run.epoch}, batch {run.step}", flush=True)
    elif args.resume:
        print(f"--resume: {run.folder / 'last.pth.tar'} does not exist yet; starting from scratch", flush=True)


def run_folder(args: argparse.Namespace, found: Found | None, size: str) -> Path:
    """OUTPUT/EXPERIMENT; a resumed run without --experiment stays in its folder."""
    if found and not args.experiment:
        return found.path.parent
    return Path(args.output, args.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{size}")


def train_to_the_end(
    run: Run, criterion: LUMixLoss, args: argparse.Namespace, stop: Stop, found: Found | None
) -> dict[str, Any]:
    """Trains in the run's folder, which the caller has claimed, and returns the summary."""
    start(run, args, found)
    with tracking(args, run.folder, run.epoch) as track:
        fit(run, criterion, args, stop, track)
    replaced = replaced_files(run)
    summary = summarise(run, args, replaced)
    if args.rank == 0:
        for name in replaced:
            print(f"unreadable image, replaced: {name}")
        write_text(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def run_training(args: argparse.Namespace) -> dict[str, Any]:
    """Trains as the flags say and returns the summary.

    Raises:
        ValueError: an argument, folder or checkpoint is invalid; raised before the first batch.
    """
    if args.smoke:
        shrink(args)
    check_sizes(args)
    criterion = build_criterion(args)
    train_data, val_data = load_data(args)
    with joined(args):
        found = read_checkpoint(args) if args.resume else None
        torch.manual_seed(args.seed + args.rank)  # the ranks draw different λ_r
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

        model = build_model(args, len(train_data.classes or ()))
        data_config = resolve_data_config(vars(args), model=model)
        train, val = build_loaders(args, train_data, val_data, data_config)
        criterion.to(train.device)
        folder = run_folder(args, found, "x".join(map(str, data_config["input_size"][1:])))
        with train, val, Stop() as stop:
            run = build_run(args, model, train, val, data_config["input_size"], folder)
            with claimed(folder, args, found) if args.rank == 0 else nullcontext():
                return train_to_the_end(run, criterion, args, stop, found)
