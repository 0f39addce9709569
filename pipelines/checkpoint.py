"""A run's whole state: what it is, how it is written, and how a run goes on from it, bit for bit on the CPU."""

import argparse
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from .ranks import gathered

FORMAT = "pipelines.train/1"
# Flags that may differ between a run and its continuation: they do not touch what is computed. The loaders
# compare the data themselves, wherever they lie.
FREE = {"config", "resume", "data_dir", "train_split", "val_split", "workers", "max_bad", "device", "output",
        "experiment", "pretrained", "initial_checkpoint", "checkpoint_hist", "checkpoint_interval",
        "log_interval", "rank"}
# What is summed over an epoch: over all samples, and over those of every --log-interval batches that LUMix
# applies to.
SUMS = ("loss", "lam0", "applied", "lumix_lam0", "lumix_lam_s", "lumix_lam", "lumix_clamped")


@dataclass
class Run:
    """What training changes: all that a checkpoint has to restore."""

    train: Any  # the two loaders
    val: Any
    folder: Path
    input_size: tuple[int, ...]
    model: nn.Module
    network: Callable[..., torch.Tensor]  # the model as it is called: compiled, distributed, where asked for
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    ema: ModelEmaV3 | None
    sums: torch.Tensor  # SUMS of this epoch and rank, on the device
    updates: int = 0
    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The model that `timm.create_model(checkpoint_path=...)` takes from our checkpoints."""
        return self.ema.module if self.ema else self.model


def read_checkpoint(args: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that --resume names, and where it lies; nothing in it is executed. Rank 0 reads it for all.

    Raises:
        ValueError: it is not there, damaged, or no checkpoint of this program.
    """
    path = Path(args.output, args.experiment) if args.resume is True else Path(args.resume)
    path = path / "last.pth.tar" if path.suffixes[-2:] != [".pth", ".tar"] else path
    found: list[Any] = [None]
    if args.rank == 0 and (path.exists() or args.resume is not True):
        try:
            if part := zipfile.ZipFile(path).testzip():  # torch.load compares no checksums
                raise ValueError(f"{part} is damaged")
            found = [torch.load(path, map_location="cpu", weights_only=True)]
        except Exception as error:  # what a damaged file raises is anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"--resume: {path} cannot be read ({reason}); give the path of a whole checkpoint, "
                             "or leave --resume out to start anew") from error
        if not isinstance(found[0], dict) or found[0].get("run_format") != FORMAT:
            raise ValueError(f"--resume: {path} is no checkpoint of this program's ({FORMAT}) to go on from; "
                             f"give --initial-checkpoint {path} to start from its weights")
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return (path, found[0]) if found[0] is not None else None


def resume(run: Run, args: argparse.Namespace, path: Path, state: dict[str, Any]) -> None:
    """Puts everything back to where `state` was taken.

    Raises:
        ValueError: the state is of another run: other flags that matter, ranks or data.
    """
    part = ""
    try:
        if odd := changed_flags(state["args"], args):
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
        if position["plateau"]:
            run.scheduler.lr_scheduler.load_state_dict(position["plateau"])  # type: ignore[attr-defined]
        run.updates, run.epoch, run.step = (int(position[key]) for key in ("updates", "epoch", "step"))
        run.rows = position["rows"]
        run.sums.copy_(mine["sums"])
        torch.set_rng_state(mine["rng"])
        if mine["cuda_rng"] is not None:
            torch.cuda.set_rng_state(mine["cuda_rng"], run.train.device)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--resume: {path} does not fit this run: {part}{error}") from error


def changed_flags(then: dict[str, Any], args: argparse.Namespace) -> str:
    """The flags that differ from a checkpoint's and would change the run, and how; empty if none does."""
    then, now = (json.loads(json.dumps(flags)) for flags in (then, vars(args)))  # of a YAML, tuples come as lists
    odd = [key for key in now if key not in FREE and key in then and then[key] != now[key]]
    return "; ".join(f"--{key.replace('_', '-')} was {then[key]} and is {now[key]}" for key in odd)


def settle(run: Run, args: argparse.Namespace) -> None:
    """Lets DDP lay out its buckets for good, which it does after a first step.

    With three ranks or more the layout decides the order in which gradients are added, hence their last bit.
    """
    run.model.train()
    images = torch.zeros(args.batch_size, *run.input_size, device=run.train.device)
    with run.autocast:
        loss = run.network(images).sum()
    loss.backward()
    run.optimizer.zero_grad()


def save(run: Run, args: argparse.Namespace, *names: str) -> None:
    """Writes a checkpoint under these names and, behind them, as last.pth.tar; all ranks have a part in it.

    A file is replaced in one step, so that a run killed meanwhile leaves the old one whole; and one that has lost
    this last.pth.tar does the epoch again, to the same end.
    """
    states = gathered(rank_state(run))
    if args.rank:
        return
    state, scratch = checkpoint(run, args, states), run.folder / "tmp.pth.tar"
    for name in (*names, "last"):
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, run.folder / f"{name}.pth.tar")


def checkpoint(run: Run, args: argparse.Namespace, states: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in timm's checkpoint format; plain types only, so that `weights_only=True` loads it."""
    row = run.rows[-1] if run.rows else {"epoch": -1}
    state = {"version": 2, "arch": args.model, "epoch": row["epoch"], "metric": row.get(metric_name(args)),
             "run_format": FORMAT, "args": vars(args), "classes": list(run.train.classes),
             "state_dict": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
             "amp_scaler": run.scaler.state_dict()}
    if run.ema:
        state["state_dict_ema"] = run.ema.module.state_dict()
    # timm's schedules are functions of epoch or update, but for plateau, which wraps PyTorch's.
    plateau = getattr(run.scheduler, "lr_scheduler", None)
    state["run"] = {"updates": run.updates, "epoch": run.epoch, "step": run.step, "rows": run.rows,
                    "ranks": states, "plateau": plateau and plateau.state_dict()}
    return state


def rank_state(run: Run) -> dict[str, Any]:
    """What each rank has of its own: places of its loaders, generators (of λ_r and dropout) and sums."""
    cuda = run.train.device if run.train.device.type == "cuda" else None
    return {"train": run.train.state_dict(), "val": run.val.state_dict(), "sums": run.sums.cpu(),
            "rng": torch.get_rng_state(), "cuda_rng": cuda and torch.cuda.get_rng_state(cuda)}


def metric_name(args: argparse.Namespace) -> str:
    """The column of the log that --eval-metric means."""
    return "val_loss" if args.eval_metric == "loss" else args.eval_metric
