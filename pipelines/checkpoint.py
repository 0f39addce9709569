"""Checkpoints of every program that trains: written atomically, read without running code, compared by their flags."""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

FORMAT = "pipelines.train/1"


class Found(NamedTuple):
    """A checkpoint to resume from."""

    path: Path
    state: dict[str, Any]
    written: int  # modification time in ns

    def check(self) -> None:
        """Raises ValueError if the file has been replaced since it was read."""
        if self.path.stat().st_mtime_ns != self.written:
            raise ValueError(
                f"--resume: {self.path} was replaced by another run in the meantime; run the command again"
            )


def read(path: Path, program_format: str, where: str, other: str) -> Found:
    """A checkpoint; no code in it is executed.

    Args:
        program_format: its `run_format`.
        where: start of an error, such as the flag.
        other: what to do with a checkpoint of another program.

    Raises:
        ValueError: the file is missing, damaged, or from another program.
    """
    try:
        written = path.stat().st_mtime_ns
        if part := zipfile.ZipFile(path).testzip():  # torch.load compares no checksums
            raise ValueError(f"{part} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{where}{path} cannot be read ({reason}); give the path of a whole checkpoint, or omit it to start from "
            "scratch"
        ) from error
    if not isinstance(state, dict) or state.get("run_format") != program_format:
        raise ValueError(f"{where}{path} is not a checkpoint of this program ({program_format}); {other}")
    return Found(path, state, written)


def write(folder: Path, state: dict[str, Any], *names: str) -> None:
    """Writes FOLDER/NAME.pth.tar for each name and then last.pth.tar.

    Files are replaced atomically, so that a killed run leaves the old file intact. The names are hard links and take
    no space.

    Raises:
        OSError: the checkpoint cannot be written; the previous files are intact.
    """
    scratch, link = folder / "tmp.pth.tar", folder / "tmp.link"
    try:
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        for name in names:
            link.unlink(missing_ok=True)
            try:
                os.link(scratch, link)
            except OSError:  # some file systems have no hard links
                shutil.copyfile(scratch, link)
            os.replace(link, folder / f"{name}.pth.tar")
        os.replace(scratch, folder / "last.pth.tar")
    except (OSError, RuntimeError) as error:
        for path in (scratch, link):
            path.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save wraps the OSError
        if not isinstance(reason, OSError):
            raise
        last = folder / "last.pth.tar"
        how = f"{last} is intact: free some space and resume from it" if last.exists() else "there is no earlier one"
        raise OSError(f"{folder}: a checkpoint cannot be written ({reason.strerror}); {how}") from error


def changed_flags(then: dict[str, Any], args: argparse.Namespace, free: Collection[str]) -> str:
    """Lists the flags, apart from `free`, that differ from the checkpoint's; empty if none does."""
    then, now = (json.loads(json.dumps(flags)) for flags in (then, vars(args)))  # tuples become lists, as from YAML
    odd = [key for key in now if key not in free and key in then and then[key] != now[key]]
    return "; ".join(f"--{key.replace('_', '-')} was {then[key]} and is {now[key]}" for key in odd)


def generators(device: torch.device) -> dict[str, Any]:
    """The states of the random generators, `rng` of the CPU and `cuda_rng` of the device, or None."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def set_generators(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `generators` returned."""
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def leave(number: int, where: str, how: str, speak: bool = True) -> NoReturn:
    """Ends the program after a signal and prints how to resume."""
    if speak:
        print(f"stopped by {signal.Signals(number).name} {where}: continue with {how}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def check_finite(loss: float, where: str) -> None:
    """Stops a run that has diverged before its weights replace good ones.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the training loss {where} is {loss}: lower --lr, give --clip-grad if the program has it, or with --amp "
            "try --amp-dtype bfloat16"
        )
