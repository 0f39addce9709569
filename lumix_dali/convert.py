"""``lumix-dali convert``: images as TFRecord or WebDataset shards, in random order, with index files.

DALI shuffles shards with a buffer alone, so the order in which they are written is the better part of the shuffle.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from . import shards, sources


def convert(
    samples: sources.Samples,
    out: str | os.PathLike,
    *,
    to: str,
    shard_size: int = 10_000,
    seed: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> list[str]:
    """Writes shards of `samples`, in an order drawn from `seed`; the images' bytes stay as they are.

    A call that was interrupted goes on when it is made again: what has a shard's name is whole.

    Args:
        samples: what to write.
        out: folder, made where there is none.
        to: "webdataset" (members KEY.jpg and KEY.cls; KEY is the sample's number in `samples`) or "tfrecord"
            (features of TensorFlow's ImageNet: image/encoded, image/class/label, image/filename).
        shard_size: samples a shard; the last one may have fewer.
        seed: of the order.
        progress: wraps the iterable of shards to write, given their number.

    Returns:
        Paths of all shards.

    Raises:
        ValueError: `out` holds something else, or an argument is wrong.
    """
    if to not in shards.SUFFIX:
        raise ValueError(f"to={to!r}: give one of {', '.join(map(repr, shards.SUFFIX))}")
    if shard_size < 1 or not len(samples):
        raise ValueError(f"shard_size={shard_size}: give a number >= 1, and samples ({len(samples)} here)")
    order = np.random.default_rng(seed).permutation(len(samples))
    parts = [order[i : i + shard_size] for i in range(0, len(order), shard_size)]
    names = [f"shard-{number:06}{shards.SUFFIX[to]}" for number in range(len(parts))]
    plan = dict(
        format=shards.FORMAT,
        complete=False,
        kind=to,
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
    _write(os.path.join(out, shards.DESCRIPTION), json.dumps(plan | dict(complete=True), indent=1).encode())
    return paths


def _begin(out: str | os.PathLike, plan: dict[str, Any]) -> None:
    """Leaves `plan` in `out`, or finds it there."""
    path = os.path.join(out, shards.DESCRIPTION)
    if os.path.exists(path):
        with open(path, encoding="ascii") as file:
            before = json.load(file)
        if different := [key for key in plan if key != "complete" and before.get(key) != plan[key]]:
            raise ValueError(f"out={os.fspath(out)!r}: it holds shards of another {different[0]}; give a new one")
    elif others := sorted(os.listdir(out)):
        raise ValueError(f"out={os.fspath(out)!r}: {others[0]!r} is in it; give an empty or a new folder")
    else:
        _write(path, json.dumps(plan, indent=1).encode())


def _write_shard(path: str, samples: sources.Samples, indices: Sequence[int]) -> None:
    with open(f"{path}.tmp", "wb") as file:
        index = (_write_tar if path.endswith(".tar") else _write_records)(file, samples, indices)
        _sync(file)
    # The shard last: where it is, its index is.
    _write(os.path.join(os.path.dirname(path), shards.index_names(os.path.basename(path))[0]), index.encode())
    os.replace(f"{path}.tmp", path)


def _write_tar(file: io.BufferedWriter, samples: sources.Samples, indices: Sequence[int]) -> str:
    lines = [f"v1.2 {len(indices)}"]
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i in indices:
            suffix = os.path.splitext(samples.names[i])[1].lower()
            extension = suffix[1:] if suffix in shards.EXTENSIONS else "jpg"  # a list may name anything
            words = []
            for kind, content in (
                (extension, shards.read_bytes(samples.path(i))),
                ("cls", str(samples.labels[i]).encode()),
            ):
                member = tarfile.TarInfo(f"{i:09}.{kind}")
                member.size = len(content)
                words += [kind, archive.offset + tarfile.BLOCKSIZE, len(content), member.name]
                archive.addfile(member, io.BytesIO(content))
            lines.append(" ".join(map(str, words)))
    return "\n".join(lines) + "\n"


def _write_records(file: io.BufferedWriter, samples: sources.Samples, indices: Sequence[int]) -> str:
    lines = ""
    for i in indices:
        features: dict[str, bytes | int] = {
            shards.IMAGE: shards.read_bytes(samples.path(i)),
            shards.LABEL: int(samples.labels[i]),
            shards.NAME: os.fsencode(samples.names[i]),
        }
        content = shards.record(shards.example(features))
        lines += f"{file.tell()} {len(content)}\n"
        file.write(content)
    return lines


def _write(path: str, content: bytes) -> None:
    """Replaces a file in one step."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
        _sync(file)
    os.replace(f"{path}.tmp", path)


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
