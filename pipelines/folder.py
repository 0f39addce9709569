"""A run's folder: whose it is, what is in it, and how its text files are replaced."""

import argparse
import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import Found

OF_A_RUN = (
    "last.pth.tar",
    "model_best.pth.tar",
    "checkpoint-*.pth.tar",
    "milestone-*.pth.tar",
    "summary.json",
    "summary.csv",
    "log.jsonl",
    "args.yaml",
    "tmp.*",
)


@contextmanager
def claimed(folder: Path, args: argparse.Namespace, found: Found | None) -> Iterator[None]:
    """Holds a run's folder against other processes; the system lets go of it however this one ends.

    Args:
        folder: made where it is missing.
        args: with `overwrite`, a finished run's files are removed.
        found: the checkpoint that this run resumes, which may be the one in there.

    Raises:
        ValueError: it cannot be written, another run is writing there, or it has a run already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"{folder}: it cannot be written ({error.strerror}); give --output a folder that can"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another run is writing there; wait for its end, or give another --experiment"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder}: no lock ({error.strerror}); start no other run there meanwhile", flush=True)
        if found:
            found.check()
        if not found or found.path.parent.resolve() != folder.resolve():
            _make_room(folder, args)
        yield


def _make_room(folder: Path, args: argparse.Namespace) -> None:
    old = sorted(path for pattern in OF_A_RUN for path in folder.glob(pattern))
    # A run that ended before its first checkpoint left settings and empty logs.
    worth = [
        path.name
        for path in old
        if not path.match("tmp.*") and (path.match("*.pth.tar") or (path.name == "log.jsonl" and path.stat().st_size))
    ]
    if worth and not args.overwrite:
        raise ValueError(
            f"{folder}: a run is there already ({', '.join(worth[:3])}); continue it with --resume, "
            "give another --experiment, or replace it with --overwrite"
        )
    for path in old:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a full disk or a kill leaves the old one whole."""
    scratch = path.with_name("tmp.log")
    try:
        scratch.write_text(text, newline="")
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def write_log(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes summary.csv and log.jsonl from the rows, so that neither ever differs from the checkpoint."""
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder / "summary.csv", table.getvalue())
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
