"""Tar and TFRecord shards for tests, made without the package."""

import io
import struct
import tarfile

import google_crc32c
import numpy as np

KEYS = {"image": "image/encoded", "label": "image/class/label", "name": "image/filename"}


def pack(path, *members, **options):
    """A tar of (name, content) or `TarInfo`."""
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(number, content):
    """A field of protocol buffers, with a length."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def bytes_feature(*values):
    return message(1, b"".join(message(1, value) for value in values))


def int_feature(*values, packed=True):
    if packed:
        return message(3, message(1, b"".join(map(varint, values))))
    return message(3, b"".join(b"\x08" + varint(value) for value in values))


def example(features):
    """A tf.train.Example of {key: content of a Feature}."""
    return message(
        1, b"".join(message(1, message(1, key.encode()) + message(2, feature)) for key, feature in features.items())
    )


def masked(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(content):
    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def image_record(image, label, name=""):
    """A record as TensorFlow's scripts for ImageNet write it."""
    features = {KEYS["image"]: bytes_feature(image), KEYS["label"]: int_feature(label)}
    return record(example(features | ({KEYS["name"]: bytes_feature(name.encode())} if name else {})))


def write_records(path, samples):
    """A TFRecord file of (image, label, name)."""
    path.write_bytes(b"".join(image_record(*sample) for sample in samples))
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
