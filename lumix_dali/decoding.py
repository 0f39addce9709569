"""The decoder that every DALI graph of this package uses, and a way to find out what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import nvidia.dali as dali
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from . import checks


def decode(
    encoded: DataNode,
    region: Callable[[DataNode], tuple[DataNode, DataNode]],
    regions: bool | None = None,
    **options: Any,
) -> DataNode:
    """Decodes a region of each image; every decoder of this package is created here.

    The decoder depends on what ``fn.peek_image_shape`` reads from the header, so a header that DALI cannot parse
    fails before a decoder starts. An error inside the decoder, while its threads decode the rest of the batch,
    can end the process (DALI 2.4).

    Args:
        encoded: uint8 [n] per sample, on the CPU: images that `data.formats.look` gives to `Decoder.DALI`, or bitmaps.
        region: takes an image's (height, width, channels), int64 [3], and returns (y, x) of the region's upper left
            corner and its (height, width), both integers [2] of one type.
        regions: True: the decoder decodes only the region. False: it decodes the whole image, of which the region is
            then a slice; the pixels differ by at most one grey level. None: True on the CPU, False on a GPU, where
            nvImageCodec 0.9 is reported to fail on regions of JPEGs (NVIDIA/nvImageCodec#55).
        options: further arguments of ``fn.decoders.image_slice`` or, for whole images, ``fn.decoders.image``.

    Returns:
        uint8 HWC RGB images on the pipeline's device. As in Pillow, the EXIF orientation is not applied.
    """
    on_gpu = Pipeline.current().device_id is not None
    options = dict(device="mixed" if on_gpu else "cpu", adjust_orientation=False) | options
    peeked = fn.peek_image_shape(encoded, adjust_orientation=False)
    part = dict(axis_names="HW", normalized_anchor=False, normalized_shape=False)
    start, shape = region(peeked)
    if decodes_regions(on_gpu, regions):
        return fn.decoders.image_slice(encoded, start, shape, **part, **options)
    # A shape of [-1] changes nothing, but makes the decoder wait for the peek.
    encoded = fn.reshape(encoded, shape=fn.cast(peeked[:1] * 0 - 1, dtype=types.INT32))
    return fn.slice(fn.decoders.image(encoded, **options), start, shape, **part)


def decodes_regions(on_gpu: bool, regions: bool | None) -> bool:
    """Whether `decode` decodes only regions."""
    return not on_gpu if regions is None else regions


def check_options(options: Mapping[str, Any], name: str, *operators: str) -> dict[str, Any]:
    """Options that all of these DALI operators know, such as "decoders__Image"; else a ValueError names `name`."""
    if not isinstance(options, Mapping):
        raise checks.error(name, options, "give a dict of arguments of DALI's operator")
    known = set.intersection(*(set(dali.backend.GetSchema(operator).GetArgumentNames()) for operator in operators))
    if unknown := [option for option in options if option not in known - _OURS]:
        raise checks.error(name, options, f"{unknown[0]!r} is unknown; give {', '.join(sorted(known - _OURS))}")
    return dict(options)


# Arguments that `decode` gives itself, or that would change what the graph computes.
_OURS = {"adjust_orientation", "dtype", "output_type", "preserve", "axes", "axis_names", "device"}
_OURS |= {"normalized_anchor", "normalized_shape", "start", "end", "shape", "rel_start", "rel_end", "rel_shape"}


@pipeline_def
def decode_pipeline(images: Sequence[np.ndarray], options: Mapping[str, Any]) -> DataNode:
    """Decodes these encoded images whole, once per run: an error means that DALI refuses one of them."""
    encoded = fn.external_source(lambda: list(images), batch=True, dtype=types.UINT8, ndim=1)
    return decode(encoded, lambda shape: (shape[:2] * 0, shape[:2]), **options)


def refused(
    images: Mapping[int, np.ndarray],
    device_id: int | None = None,
    num_threads: int = 1,
    limit: int | None = None,
    **options: Any,
) -> dict[int, str]:
    """Finds the images that DALI refuses, and its reasons, by bisecting the batch.

    Args:
        images: encoded images by number, all of which `data.formats.look` gives to DALI.
        device_id: GPU to decode on; None: the CPU.
        num_threads: DALI's threads.
        limit: the search ends with more than so many refused images; None: all are looked for.
        options: further arguments of `decode`.

    Returns:
        {number: reason} of the refused images.
    """
    if not images:
        return {}
    error = _decoding_error(list(images.values()), options, num_threads, device_id)
    if error is None:
        return {}
    if len(images) == 1:
        return dict.fromkeys(images, reason_of(error))
    numbers, reasons = list(images), dict[int, str]()
    for half in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
        left = None if limit is None else limit - len(reasons)
        if left is None or left >= 0:
            reasons |= refused({i: images[i] for i in half}, device_id, num_threads, left, **options)
    return reasons


def works(device_id: int | None = None, num_threads: int = 1, **options: Any) -> bool:
    """Whether DALI decodes a JPEG that Pillow has just written; the arguments are those of `refused`."""
    content = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(content, "JPEG")
    image = np.frombuffer(content.getvalue(), np.uint8)
    return _decoding_error([image], options, num_threads, device_id) is None


def _decoding_error(
    images: list[np.ndarray], options: dict[str, Any], num_threads: int, device_id: int | None
) -> RuntimeError | None:
    # One batch in a pipeline that is gone afterwards: an image may take hundreds of megabytes.
    pipe = decode_pipeline(
        images,
        options,
        batch_size=len(images),
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,
    )
    try:
        pipe.run()
    except RuntimeError as error:
        return error.with_traceback(None)
    return None


# What DALI's messages say; `tests/test_engine.py` notices when a release changes them.
_SAMPLE = "Failed to decode sample #"
_OPERATOR = "fn.decoders"


def sample_of(error: RuntimeError) -> int | None:
    """The place in its batch of the sample at which a decoder failed; None if the error does not tell."""
    digits = str(error).partition(_SAMPLE)[2]
    number = digits[: len(digits) - len(digits.lstrip("0123456789"))]
    return int(number) if number else None


def is_decoders(error: RuntimeError) -> bool:
    """Whether a decoder failed, and not another operator."""
    return _OPERATOR in str(error)


def reason_of(error: RuntimeError) -> str:
    """DALI's reason, without the pipeline, the stack and the sample's place in the batch."""
    reason = str(error).partition("encountered:")[2].partition("\nCurrent pipeline")[0].partition("\nC++ context")[0]
    words = [word for word in reason.split() if not word.startswith("#")]
    return " ".join(words).removesuffix(" :") or str(error)[:200]


def versions() -> str:
    """The versions of DALI and of its decoders."""
    codecs = [d for d in metadata.distributions() if (d.name or "").startswith("nvidia-nvimgcodec")]
    return f"DALI {dali.__version__}, nvImageCodec {codecs[0].version if codecs else 'unknown'}"
