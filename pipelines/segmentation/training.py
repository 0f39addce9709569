"""Iteration-based training of Segmenter: a run's state, its checkpoint, and how it is resumed."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import PolyLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .. import checkpoint
from ..checkpoint import Found
from ..folder import write_log
from ..progress import progress
from ..ranks import Stop
from .data import VOID, Augmentation, Split, TrainSource, train_batches

FORMAT = "pipelines.segment/1"
# Flags that may differ between a run and its continuation, because they do not affect what is computed.
FREE = {
    "config",
    "resume",
    "overwrite",
    "data_dir",
    "workers",
    "device",
    "output",
    "experiment",
    "backbone",
    "pretrained",
    "checkpoint_interval",
    "multi_scale",
    "window_batch_size",
}


@dataclass
class Run:
    """The state that training changes and a checkpoint restores."""

    folder: Path
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: PolyLRScheduler
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    update: int = 0  # finished updates
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # sum since the last row of the log
    rows: list[dict[str, Any]] = field(default_factory=list)


def build_run(args: argparse.Namespace, model: nn.Module, device: torch.device, folder: Path) -> Run:
    """Moves the model to the device and sets up its optimiser, polynomial schedule and scaler."""
    model.to(device)
    optimizer = create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, args.momentum)
    scheduler = PolyLRScheduler(optimizer, args.iterations, args.poly_power, args.min_lr, t_in_epochs=False)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16")
    return Run(
        folder, device, model, optimizer, scheduler, scaler, autocast(args, device), loss=torch.zeros((), device=device)
    )


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """The context in which the model runs."""
    return torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)


def read_checkpoint(path: Path) -> Found:
    """A checkpoint of this program.

    Raises:
        ValueError: the file is missing, damaged, or from another program.
    """
    return checkpoint.read(path, FORMAT, "", "a classifier's weights are given by --backbone")


def resume(run: Run, args: argparse.Namespace, found: Found) -> None:
    """Restores the state saved in the checkpoint.

    Raises:
        ValueError: a flag that matters differs.
    """
    state = found.state
    if changed := checkpoint.changed_flags(state["args"], args, FREE):
        raise ValueError(
            f"--resume: {found.path}: {changed}. Give the flags as they were, or another --experiment to start a "
            "fresh run"
        )
    run.model.load_state_dict(state["state_dict"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.update, run.rows = state["update"], state["rows"]
    run.loss.fill_(state["loss"])
    checkpoint.set_generators(state, run.device)


def save(run: Run, args: argparse.Namespace) -> None:
    """Writes the log and, atomically, FOLDER/last.pth.tar, so that a killed run leaves it intact."""
    check_finite(run)
    state = {
        "run_format": FORMAT,
        "args": vars(args),
        "update": run.update,
        "rows": run.rows,
        "loss": run.loss.item(),
        "state_dict": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        **checkpoint.generators(run.device),
    }
    checkpoint.write(run.folder, state)
    write_log(run.folder, run.rows)


def fit(run: Run, args: argparse.Namespace, split: Split, validate: Callable[[], dict[str, float]], stop: Stop) -> None:
    """Trains until --iterations updates are done, validating every --eval-interval updates.

    Raises:
        FloatingPointError: the loss is no longer finite.
        SystemExit: a signal arrived; the checkpoint has been written.
    """
    transform = Augmentation(args.img_size, args.short_side, mean=tuple(args.mean), std=tuple(args.std))
    source = TrainSource(split, transform, args.batch_size, args.seed, run.update, args.workers)
    batches = train_batches(source, run.device, args.workers)
    since = time.perf_counter(), run.update
    run.model.train()
    with progress(args.iterations, "training", run.update, unit="it") as bar:
        while run.update < args.iterations:
            step(run, *next(batches))
            bar.update()
            last = run.update == args.iterations
            due = not last and every(args.eval_interval, run)
            if last or due or every(args.log_interval, run):
                log(run, args, *since)
                since = time.perf_counter(), run.update
            if due:
                run.rows[-1] |= validate()
                run.model.train()
                since = time.perf_counter(), run.update
            if stop.signal or last or every(args.checkpoint_interval, run):
                save(run, args)
            if stop.signal:
                how = f"the same flags and --resume --output {run.folder.parent} --experiment {run.folder.name}"
                checkpoint.leave(stop.signal, f"after update {run.update}", how)


def every(interval: int, run: Run) -> bool:
    """Whether the run is at a multiple of the interval; never for 0."""
    return bool(interval) and run.update % interval == 0


def step(run: Run, images: torch.Tensor, masks: torch.Tensor) -> None:
    """One update: cross entropy over the pixels that have a class."""
    with run.autocast:
        logits = run.model(images)
    labelled = (masks != VOID).sum().clamp(min=1)  # avoids 0 / 0 in a batch without labelled pixels
    loss = cross_entropy(logits.float(), masks, ignore_index=VOID, reduction="sum") / labelled
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.update += 1
    run.scheduler.step_update(run.update)
    run.loss += loss.detach()


def log(run: Run, args: argparse.Namespace, start: float, first: int) -> None:
    """Adds a row to the log: update, mean loss since the last row, learning rate, images per second."""
    check_finite(run)
    batches = run.update - (run.rows[-1]["update"] if run.rows else 0)
    speed = (run.update - first) * args.batch_size / (time.perf_counter() - start)
    run.rows.append(
        {
            "update": run.update,
            "loss": run.loss.item() / batches,
            "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
        }
    )
    run.loss.zero_()
    text = "update {update}  loss {loss:.4f}  lr {lr:.2e}  {images_per_second:.1f} img/s"
    tqdm.write(text.format(**run.rows[-1]))


def check_finite(run: Run) -> None:
    """Stops a run that has diverged before its weights replace good ones."""
    checkpoint.check_finite(run.loss.item(), f"before update {run.update}")
