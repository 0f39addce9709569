"""``lumix-dali convert``: writes images as WebDataset shards, in random order.

Remote shards are shuffled only within a window, so most of the randomness comes from the order in which they are
written.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..progress import Progress
from . import storage
from .files import Files
from .formats import EXTENSIONS
from .shards import DESCRIPTION, FORMAT


def convert(
    samples: Files,
    out: storage.StrPath,
    *,
    shard_size: int = 10_000,
    seed: int = 0,
    progress: Progress = lambda items, total: items,
) -> list[str]:
    """Writes shards of `samples` in an order drawn from `seed`; the bytes of the images stay unchanged.

    Members are KEY.jpg (or another extension) and KEY.cls, where KEY is the sample's number in `samples`. Repeating an
    interrupted call resumes it: a file that has the name of a shard is complete.

    Args:
        samples: what to write.
        out: folder, created if it does not exist.
        shard_size: samples per shard; the last one may have fewer.
        seed: of the order.
        progress: wraps the iterable of shards to write, given their number.

    Returns:
        Paths of all shards.

    Raises:
        ValueError: `out` is remote or contains something else, or an argument is invalid.
    """
    out = os.fspath(out)
    if storage.is_remote(out):
        raise ValueError(f"out={out!r}: shards are written to a local folder; upload that")
    if shard_size < 1 or not len(samples):
        raise ValueError(f"shard_size={shard_size}: give a number >= 1, and samples ({len(samples)} here)")
    order = np.random.default_rng(seed).permutation(len(samples))
    parts = [order[i : i + shard_size] for i in range(0, len(order), shard_size)]
    names = [f"shard-{number:06}.tar" for number in range(len(parts))]
    plan = dict(
        format=FORMAT,
        complete=False,
        seed=seed,
        shard_size=shard_size,
        digest=samples.digest,
        classes=list(samples.classes),
        counts=np.bincount(samples.labels, minlength=len(samples.classes)).tolist(),
        shards={name: len(part) for name, part in zip(names, parts, strict=True)},
    )
    os.makedirs(out, exist_ok=True)
    _begin(out, plan)
    paths = [os.path.join(out, name) for name in names]
    left = [(path, part) for path, part in zip(paths, parts, strict=True) if not os.path.exists(path)]
    for path, part in progress(left, len(left)):
        _write_shard(path, samples, part.tolist())
    _write_plan(os.path.join(out, DESCRIPTION), plan | dict(complete=True))
    return paths


def _begin(out: str, plan: dict[str, Any]) -> None:
    """Writes `plan` to `out`, or checks that it is already there."""
    path = os.path.join(out, DESCRIPTION)
    if os.path.exists(path):
        try:
            with open(path, encoding="ascii") as file:
                before = dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"out={out!r}: {DESCRIPTION} is damaged; give a new folder") from error
        if different := [key for key in plan if key != "complete" and before.get(key) != plan[key]]:
            raise ValueError(f"out={out!r}: it contains shards of another {different[0]}; give a new folder")
    elif others := sorted(os.listdir(out)):
        raise ValueError(f"out={out!r}: it contains {others[0]!r}; give an empty or a new folder")
    else:
        _write_plan(path, plan)


def _write_shard(path: str, samples: Files, indices: Sequence[int]) -> None:
    with (
        storage.replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for i in indices:
            suffix = os.path.splitext(samples.names[i])[1].lower()
            extension = suffix if suffix in EXTENSIONS else ".jpg"  # a list may contain any name
            content = storage.read_bytes(samples.path(i))
            for name, text in ((f"{i:09}{extension}", content), (f"{i:09}.cls", str(samples.labels[i]).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))


def _write_plan(path: str, plan: dict[str, Any]) -> None:
    with storage.replacing(path) as file:
        file.write(json.dumps(plan, indent=1).encode())
