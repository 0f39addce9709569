"""The complete state of a training run: its contents, how it is saved, and how a run resumes from it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from . import checkpoint
from .checkpoint import FORMAT, Found
from .ranks import gathered

# Flags that may differ between a run and its continuation, because they do not affect what is computed. The
# loaders compare the data themselves, wherever they are stored.
FREE = {
    "config",
    "resume",
    "data_dir",
    "train_split",
    "val_split",
    "workers",
    "max_bad",
    "device",
    "output",
    "experiment",
    "pretrained",
    "pretrained_path",
    "initial_checkpoint",
    "checkpoint_hist",
    "checkpoint_interval",
    "save_epochs",
    "stop_epoch",
    "overwrite",
    "log_interval",
    "log_tensorboard",
    "log_wandb",
    "wandb_project",
    "wandb_tags",
    "wandb_resume_id",
    "rank",
}
# Sums over an epoch. The first two are over all samples; the others are over the samples that LUMix applies to,
# taken every --log-interval batches.
SUMS = ("loss", "lam0", "applied", "lumix_lam0", "lumix_lam_s", "lumix_lam", "lumix_clamped")


@dataclass
class Run:
    """The state that training changes and a checkpoint restores."""

    train: Any  # the two loaders
    val: Any
    folder: Path
    input_size: tuple[int, ...]
    model: nn.Module
    network: Callable[..., torch.Tensor]  # the model as it is called: compiled and distributed if requested
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    ema: ModelEmaV3 | None
    sums: torch.Tensor  # SUMS of this epoch and rank, on the device
    epochs: int  # of the whole run, according to the schedule
    updates: int = 0
    epoch: int = 0
    step: int = 0  # finished batches of this epoch
    rows: list[dict[str, Any]] = field(default_factory=list)
    saved: tuple[int, int] | None = None  # (epoch, step) of last.pth.tar

    @property
    def evaluated(self) -> nn.Module:
        """The model that `timm.create_model(checkpoint_path=...)` loads from these checkpoints."""
        return self.ema.module if self.ema else self.model


def read_checkpoint(args: argparse.Namespace) -> Found | None:
    """The checkpoint that --resume names, read by rank 0 for all ranks.

    Raises:
        ValueError: the file is missing, damaged, or not a checkpoint of this program.
    """
    path = Path(args.output, args.experiment) if args.resume is True else Path(args.resume)
    path = path / "last.pth.tar" if path.suffixes[-2:] != [".pth", ".tar"] else path
    found: list[Any] = [None, 0]
    if args.rank == 0 and (path.exists() or args.resume is not True):
        other = f"give --initial-checkpoint {path} to start from its weights"
        found = list(checkpoint.read(path, FORMAT, "--resume: ", other)[1:])
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return Found(path, *found) if found[0] is not None else None


def resume(run: Run, args: argparse.Namespace, found: Found) -> None:
    """Restores the saved state; a different `--epochs` continues on the new schedule.

    Raises:
        ValueError: the state belongs to a run with other relevant flags, ranks or data.
    """
    path, state, part = found.path, found.state, ""
    try:
        if odd := checkpoint.changed_flags(state["args"], args, FREE | {"epochs"}):
            raise ValueError(f"{odd}. Give the flags as they were, as by --config {path.parent / 'args.yaml'}")
        position = state["run"]
        mine = position["ranks"][args.rank]
        part = "training data, "
        run.train.load_state_dict(mine["train"])
        part = "validation data, "
        run.val.load_state_dict(mine["val"])
        part = "content, "
        if dist.is_initialized():
            settle(run, args)
        run.model.load_state_dict(state["state_dict"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["amp_scaler"])
        if run.ema:
            run.ema.module.load_state_dict(state["state_dict_ema"])
        if position["plateau"] and run.scheduler:
            run.scheduler.lr_scheduler.load_state_dict(position["plateau"])  # type: ignore[attr-defined]
        run.updates, run.epoch, run.step = (int(position[key]) for key in ("updates", "epoch", "step"))
        run.rows = position["rows"]
        run.sums.copy_(mine["sums"])
        checkpoint.set_generators(mine, run.train.device)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--resume: {path} does not fit this run: {part}{error}") from error
    run.saved = run.epoch, run.step
    if run.epoch > run.epochs:
        raise ValueError(f"--epochs {args.epochs}: {run.epoch} are done in {path}; give more")
    if state["args"]["epochs"] != args.epochs:
        reschedule(run, args, state["args"]["epochs"])


def reschedule(run: Run, args: argparse.Namespace, before: int) -> None:
    """Sets the learning rates that the new schedule has at this point."""
    if run.scheduler and not hasattr(run.scheduler, "lr_scheduler"):  # plateau depends on the scores, not on the epoch
        run.scheduler.step(run.epoch)  # one of these two calls does nothing
        run.scheduler.step_update(run.updates)
    if args.rank == 0:
        print(f"--epochs was {before} and is {args.epochs}: from here on the learning rate follows the new schedule")


def settle(run: Run, args: argparse.Namespace) -> None:
    """Takes a first step, after which DDP fixes the layout of its buckets.

    With three or more ranks, the layout decides the order in which gradients are added, hence their last bit.
    """
    run.model.train()
    images = torch.zeros(args.batch_size, *run.input_size, device=run.train.device)
    with run.autocast:
        loss = run.network(images).sum()
    loss.backward()
    run.optimizer.zero_grad()


def save(run: Run, args: argparse.Namespace, *names: str) -> None:
    """Writes a checkpoint under these names and then as last.pth.tar; all ranks must call it.

    A run that was killed before the new last.pth.tar was in place repeats the epoch with the same result.

    Raises:
        OSError: the checkpoint cannot be written; the previous files are intact.
    """
    states = gathered(rank_state(run))
    run.saved = run.epoch, run.step
    if args.rank == 0:
        checkpoint.write(run.folder, contents(run, args, states), *names)


def contents(run: Run, args: argparse.Namespace, states: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in timm's checkpoint format, of plain types only, so that `weights_only=True` loads it."""
    row = run.rows[-1] if run.rows else {"epoch": -1}
    state = {
        "version": 2,
        "arch": args.model,
        "epoch": row["epoch"],
        "metric": row.get(metric_name(args)),
        "run_format": FORMAT,
        "args": vars(args),
        "classes": list(run.train.classes),
        "state_dict": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "amp_scaler": run.scaler.state_dict(),
    }
    if run.ema:
        state["state_dict_ema"] = run.ema.module.state_dict()
    # timm's schedules are functions of epoch or update, except plateau, which wraps PyTorch's.
    plateau = getattr(run.scheduler, "lr_scheduler", None)
    state["run"] = {
        "updates": run.updates,
        "epoch": run.epoch,
        "step": run.step,
        "rows": run.rows,
        "ranks": states,
        "plateau": plateau and plateau.state_dict(),
    }
    return state


def rank_state(run: Run) -> dict[str, Any]:
    """The state of one rank: positions of its loaders, random generators (for λ_r and dropout) and sums."""
    return {
        "train": run.train.state_dict(),
        "val": run.val.state_dict(),
        "sums": run.sums.cpu(),
        **checkpoint.generators(run.train.device),
    }


def metric_name(args: argparse.Namespace) -> str:
    """The column of the log that --eval-metric selects."""
    return "val_loss" if args.eval_metric == "loss" else args.eval_metric
