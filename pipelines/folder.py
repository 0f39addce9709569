"""A run's folder: its lock, its contents, and how its text files are replaced."""

import argparse
import csv
import fcntl
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lumix_dali.data.storage import replacing

from .checkpoint import Found

OF_A_RUN = (
    "last.pth.tar",
    "model_best.pth.tar",
    "checkpoint-*.pth.tar",
    "milestone-*.pth.tar",
    "summary.json",
    "result.json",
    "summary.csv",
    "log.jsonl",
    "args.yaml",
    "tmp.*",
    ".part-*",
)


@contextmanager
def claimed(folder: Path, args: argparse.Namespace, found: Found | None) -> Iterator[None]:
    """Locks a run's folder against other processes; the system releases the lock however this process ends.

    Args:
        folder: created if it is missing.
        args: with `overwrite`, the files of an earlier run are removed.
        found: the checkpoint that this run resumes, possibly from this folder.

    Raises:
        ValueError: the folder is not writable, another run is using it, or it already holds a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"{folder}: it cannot be written ({error.strerror}); give a writable folder as --output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another run is writing there; wait until it ends, or give another --experiment"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder}: cannot be locked ({error.strerror}); do not start another run there", flush=True)
        if found:
            found.check()
        if not found or found.path.parent.resolve() != folder.resolve():
            _make_room(folder, args)
        yield


def _make_room(folder: Path, args: argparse.Namespace) -> None:
    old = sorted(path for pattern in OF_A_RUN for path in folder.glob(pattern))
    # A run that ended before its first checkpoint left only settings and empty logs.
    worth = [
        path.name
        for path in old
        if not path.name.startswith(("tmp.", ".part-"))
        and (path.match("*.pth.tar") or (path.name == "log.jsonl" and path.stat().st_size))
    ]
    if worth and not args.overwrite:
        raise ValueError(
            f"{folder}: it already holds a run ({', '.join(worth[:3])}); continue it with --resume, "
            "give another --experiment, or replace it with --overwrite"
        )
    for path in old:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically, so that a full disk or a kill leaves the old one intact."""
    with replacing(path) as file:
        file.write(text.encode())


def write_log(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes summary.csv and log.jsonl from the rows, so that they always agree with the checkpoint."""
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder / "summary.csv", table.getvalue())
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
