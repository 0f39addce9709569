"""TFRecord files of images, as TensorFlow's scripts for ImageNet write them; for benchmarks and tests."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import google_crc32c

KEYS = {"image": "image/encoded", "label": "image/class/label", "name": "image/filename"}


def varint(value: int) -> bytes:
    """A number as a protocol buffers varint."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(number: int, content: bytes) -> bytes:
    """A length-delimited field of protocol buffers."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def bytes_feature(*values: bytes) -> bytes:
    """A tf.train.Feature of byte strings."""
    return message(1, b"".join(message(1, value) for value in values))


def int_feature(*values: int, packed: bool = True) -> bytes:
    """A tf.train.Feature of integers."""
    if packed:
        return message(3, message(1, b"".join(map(varint, values))))
    return message(3, b"".join(b"\x08" + varint(value) for value in values))


def example(features: Mapping[str, bytes]) -> bytes:
    """A tf.train.Example of {key: content of a Feature}."""
    return message(
        1, b"".join(message(1, message(1, key.encode()) + message(2, feature)) for key, feature in features.items())
    )


def masked(content: bytes) -> bytes:
    """The checksum of a TFRecord."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(content: bytes) -> bytes:
    """Content with its length and both checksums."""
    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def image_record(image: bytes, label: int, name: str = "") -> bytes:
    """A record as TensorFlow's scripts for ImageNet write it."""
    features = {KEYS["image"]: bytes_feature(image), KEYS["label"]: int_feature(label)}
    return record(example(features | ({KEYS["name"]: bytes_feature(name.encode())} if name else {})))


def write_records(path: Path, samples: Iterable[tuple[bytes, int, str]]) -> Path:
    """A TFRecord file of (image, label, name)."""
    path.write_bytes(b"".join(image_record(*sample) for sample in samples))
    return path
