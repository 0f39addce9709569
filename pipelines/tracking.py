"""Each epoch's numbers to Weights & Biases and TensorBoard, where a flag asks for them and they are installed."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def tracking(args: argparse.Namespace, folder: Path, epoch: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function of an epoch's row that sends its numbers to every tracker asked for; on rank 0.

    Args:
        folder: the run's; TensorBoard's files go there, and its name is the run's at Weights & Biases.
        epoch: the first to come: what TensorBoard has from there on is of epochs that are trained again.
    """
    sinks: list[Callable[[dict[str, float], int], None]] = []
    with ExitStack() as stack:
        if args.log_tensorboard and args.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(folder), purge_step=epoch))

            def to_tensorboard(row: dict[str, float], number: int) -> None:
                for name, value in row.items():
                    writer.add_scalar(name, value, number)
                writer.flush()  # of a run that is killed, too

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
