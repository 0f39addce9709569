"""The processes that torchrun starts: how they join, reduce values, and stop together."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one."""
    try:
        device = torch.device(resolve(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {first_line(error)}; give auto, cpu, cuda or cuda:N") from error
    return device


def first_line(error: Exception) -> str:
    """Type and start of an error, short enough for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def resolve(name: str) -> str:
    """The name of a device for "auto": a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing for a single process.

    A rank that fails raises its error without waiting for the others: torchrun ends those.
    """
    if args.world_size == 1:
        yield
        return
    cuda = resolve(args.device).startswith("cuda")
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc_per_node: local rank {local} has no GPU, only {torch.cuda.device_count()} found; "
                "start one rank per GPU, or give --device cpu"
            )
        torch.cuda.set_device(local)
        args.device = f"cuda:{local}"
    elif args.sync_bn:
        raise ValueError("--sync-bn: PyTorch synchronises batch norm only on GPUs; leave it out on the CPU")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    except SystemExit:  # all ranks end together
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """The values of all ranks on rank 0; an empty list on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def summed(sums: torch.Tensor) -> list[float]:
    """Sums over all ranks; `sums` is not changed."""
    sums = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm sends the last one before a job ends


class Stop:
    """Ends a run on SIGNALS, unless they are ignored (nohup), with all ranks stopping after the same update.

    A second SIGINT ends the process immediately. A second SIGTERM does not: a cluster and torchrun may both send
    one. All ranks must call `agreed` equally often.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._vote: dist.Work | None = None
        self._votes = torch.zeros((), dtype=torch.int32)

    def __enter__(self) -> "Stop":
        self._terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        self._before = {
            number: signal.signal(number, self._note)
            for number in SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGHUP:  # the terminal is gone; writing to it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)

    def agreed(self) -> int:
        """The signal, or 0. With several ranks it is the vote of the previous update, so that no rank waits for it."""
        if not dist.is_initialized():
            return self.signal
        if self._vote:
            self._vote.wait()
        answer = int(self._votes)
        self._votes = torch.tensor(self.signal, dtype=torch.int32)
        self._vote = dist.all_reduce(self._votes, dist.ReduceOp.MAX, async_op=True)
        return answer

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
