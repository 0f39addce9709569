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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from .. import checks, cpus
from ..progress import Progress
from . import formats, storage
from .files import Files
from .formats import EXTENSIONS, BadImage
from .shards import DESCRIPTION, FORMAT

_AHEAD = 64  # images that are in memory at once


class _Encoding(NamedTuple):
    """How images with a side longer than `max_size` pixels are written."""

    max_size: int
    quality: int


def convert(
    samples: Files,
    out: storage.StrPath,
    *,
    shard_size: int = 10_000,
    seed: int = 0,
    max_size: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    progress: Progress = lambda items, total: items,
) -> list[str]:
    """Writes shards of `samples` in an order drawn from `seed`; without `max_size` the images' bytes are unchanged.

    Members are KEY.jpg (or another extension) and KEY.cls, where KEY is the sample's number in `samples`. Repeating an
    interrupted call resumes it: a file that has the name of a shard is complete, and stays as it is even if an image
    has changed since.

    Args:
        samples: what to write.
        out: folder, created if it does not exist.
        shard_size: samples per shard; the last one may have fewer.
        seed: of the order.
        max_size: pixels; images with a longer side are reduced to it (Pillow, bicubic) and written as JPEG. The others
            keep their bytes.
        quality: of these JPEGs, 1 to 100.
        workers: threads that read and encode; None: this process's CPUs.
        progress: wraps the iterable of shards to write, given their number.

    Returns:
        Paths of all shards.

    Raises:
        ValueError: `out` is remote or contains something else, or an argument is invalid.
    """
    out = os.fspath(out)
    if storage.is_remote(out):
        raise ValueError(f"out={out!r}: shards are written to a local folder; upload that")
    checks.whole("shard_size", shard_size, 1)
    if not len(samples):
        raise ValueError(f"source={samples.root!r}: none of the samples can be used; see lumix-dali check")
    encoding = None
    if max_size is not None:
        encoding = _Encoding(checks.whole("max_size", max_size, 1), checks.whole("quality", quality, 1, 101))
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
    plan |= {} if encoding is None else encoding._asdict()
    os.makedirs(out, exist_ok=True)
    _begin(out, plan)
    paths = [os.path.join(out, name) for name in names]
    left = [(path, part) for path, part in zip(paths, parts, strict=True) if not os.path.exists(path)]
    with ThreadPoolExecutor(workers or cpus.available()) as pool:
        for path, part in progress(left, len(left)):
            _write_shard(path, samples, part.tolist(), encoding, pool)
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
        if different := [key for key in plan | before if key != "complete" and before.get(key) != plan.get(key)]:
            raise ValueError(f"out={out!r}: it contains shards of another {different[0]}; give a new folder")
    elif others := sorted(os.listdir(out)):
        raise ValueError(f"out={out!r}: it contains {others[0]!r}; give an empty or a new folder")
    else:
        _write_plan(path, plan)


def _write_shard(
    path: str, samples: Files, indices: Sequence[int], encoding: _Encoding | None, pool: ThreadPoolExecutor
) -> None:
    with (
        storage.replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for start in range(0, len(indices), _AHEAD):
            some = indices[start : start + _AHEAD]
            for i, (extension, image) in zip(some, pool.map(partial(_content, samples, encoding), some), strict=True):
                label = str(samples.labels[i]).encode()
                for name, content in ((f"{i:09}{extension}", image), (f"{i:09}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def _content(samples: Files, encoding: _Encoding | None, i: int) -> tuple[str, bytes]:
    """Extension and bytes of a sample's image."""
    content = storage.read_bytes(samples.path(i))
    suffix = os.path.splitext(samples.names[i])[1].lower()
    extension = suffix if suffix in EXTENSIONS else ".jpg"  # a list may contain any name
    if encoding is None:
        return extension, content
    try:
        found = formats.look(io.BytesIO(content))
        if max(found.height, found.width) <= encoding.max_size:
            return extension, content
        image = formats.pillow_pixels(io.BytesIO(content))
    except BadImage as error:
        raise ValueError(f"source={samples.path(i)!r}: {error}; give a manifest of lumix-dali check --full") from error
    scale = encoding.max_size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    reduced = io.BytesIO()
    image.resize((width, height), PIL.Image.Resampling.BICUBIC).save(reduced, "JPEG", quality=encoding.quality)
    return ".jpg", reduced.getvalue()


def _write_plan(path: str, plan: dict[str, Any]) -> None:
    with storage.replacing(path) as file:
        file.write(json.dumps(plan, indent=1).encode())
