"""The decoder that every DALI graph of this package uses, and a way to find out what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode


def decode(encoded: DataNode, region: Callable[[DataNode], tuple[DataNode, DataNode]], **options: Any) -> DataNode:
    """Decodes a region of each image; every decoder of this package is created here.

    The region depends on what ``fn.peek_image_shape`` reads from the header, so a header that DALI cannot parse
    fails before a decoder starts. An error inside the decoder, while its threads decode the rest of the batch,
    can end the process (DALI 2.4).

    Args:
        encoded: uint8 [n] per sample, on the CPU: images that `data.formats.look` gives to `Decoder.DALI`, or bitmaps.
        region: takes an image's (height, width, channels), int64 [3], and returns (y, x) of the region's upper left
            corner and its (height, width), both integers [2] of one type.
        options: further arguments of ``fn.decoders.image_slice``.

    Returns:
        uint8 HWC RGB images on the pipeline's device. As in Pillow, the EXIF orientation is not applied.
    """
    start, shape = region(fn.peek_image_shape(encoded, adjust_orientation=False))
    return fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        device="cpu" if Pipeline.current().device_id is None else "mixed",
        adjust_orientation=False,
        **options,
    )


@pipeline_def
def decode_pipeline(images: Sequence[np.ndarray]) -> DataNode:
    """Decodes these encoded images whole, once per run: an error means that DALI refuses one of them."""
    encoded = fn.external_source(lambda: list(images), batch=True, dtype=types.UINT8, ndim=1)
    return decode(encoded, lambda shape: (shape[:2] * 0, shape[:2]))


def refused(images: Mapping[int, np.ndarray], device_id: int | None = None, num_threads: int = 1) -> dict[int, str]:
    """Finds the images that DALI refuses, and its reasons, by bisecting the batch.

    Args:
        images: encoded images by number, all of which `data.formats.look` gives to DALI.
        device_id: GPU to decode on; None: the CPU.
        num_threads: DALI's threads.

    Returns:
        {number: reason} of the refused images.
    """
    if not images:
        return {}
    pipe = decode_pipeline(list(images.values()), batch_size=len(images), num_threads=num_threads, device_id=device_id)
    try:
        pipe.run()
    except RuntimeError as error:
        if len(images) == 1:
            reason = str(error).partition("encountered:")[2].partition("\nCurrent pipeline")[0]
            return dict.fromkeys(images, " ".join(reason.partition("\nC++ context")[0].split()))
        numbers = list(images)
        halves = (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :])
        return {
            number: reason
            for half in halves
            for number, reason in refused({i: images[i] for i in half}, device_id, num_threads).items()
        }
    return {}
