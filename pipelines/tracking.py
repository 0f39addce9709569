"""Logs each epoch to Weights & Biases and TensorBoard, if requested by a flag."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def tracking(args: argparse.Namespace, folder: Path, epoch: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that sends an epoch's row to every requested tracker, on rank 0 only.

    Args:
        folder: the run's folder; TensorBoard's files go there, and its name becomes the name of the W&B run.
        epoch: the next epoch; TensorBoard discards what it has from there on, since those epochs are trained again.
    """
    sinks: list[Callable[[dict[str, float], int], None]] = []
    with ExitStack() as stack:
        if args.log_tensorboard and args.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(folder), purge_step=epoch))

            def to_tensorboard(row: dict[str, float], number: int) -> None:
                for name, value in row.items():
                    writer.add_scalar(name, value, number)
                writer.flush()  # so that a killed run keeps it

            sinks.append(to_tensorboard)
        if args.log_wandb and args.rank == 0:
            import wandb

            run = stack.enter_context(
                wandb.init(
                    project=args.wandb_project,
                    name=folder.name,
                    tags=args.wandb_tags,
                    config=vars(args),
                    id=args.wandb_resume_id or None,
                    resume="must" if args.wandb_resume_id else None,
                )
            )
            sinks.append(lambda row, number: run.log({"epoch": number, **row}))

        def track(row: dict[str, Any]) -> None:
            numbers = {name: value for name, value in row.items() if value is not None and name != "epoch"}
            for sink in sinks:
                sink(numbers, int(row["epoch"]))

        yield track
