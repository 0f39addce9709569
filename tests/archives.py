"""Tar and TFRecord shards for tests, made without the package."""

import io
import tarfile

import numpy as np

from benchmarks.records import write_records


def pack(path, *members, **options):
    """A tar archive of (name, content) pairs or `TarInfo` objects."""
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def as_records(files, out, shard_size, seed=0):
    """`files` as TFRecord shards, in the order in which `convert` writes them."""
    out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(files)).tolist()
    for k in range(0, len(order), shard_size):
        samples = []
        for i in order[k : k + shard_size]:
            with open(files.path(i), "rb") as file:
                samples.append((file.read(), int(files.labels[i]), files.names[i]))
        write_records(out / f"shard-{k // shard_size:06}.tfrecord", samples)
    return out
