"""Antialiased resize of training images: DALI's, or on a CPU from 64x64 pixels on PyTorch's uint8 kernel.

On a CPU with AVX2 PyTorch resizes a photograph in about a tenth of DALI's time, and nearer to Pillow. It runs in the
graph, through ``fn.python_function``, so that DALI still draws, checkpoints and schedules everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from torch.nn.functional import interpolate

from .. import cpus

Interpolation = Literal["bilinear", "bicubic"]
TrainInterpolation = Literal["bilinear", "bicubic", "random"]
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
# Handing an image to PyTorch takes about 20 µs, in which DALI makes smaller ones.
_FEWEST_PIXELS = 64 * 64


def kernel(size: Sequence[int], device: str) -> str:
    """Who resizes to (H, W) `size` on a `device` type: "torch" or "dali", up to two grey levels apart."""
    return "torch" if has_fast_kernel(device) and size[0] * size[1] >= _FEWEST_PIXELS else "dali"


def has_fast_kernel(device: str) -> bool:
    """Whether PyTorch has a kernel for uint8: without AVX2 it converts to float, with OpenMP threads of its own."""
    # "NO AVX" (PyTorch 2.6) or "DEFAULT" without it.
    return device == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def resize_mirror(images: DataNode, size: tuple[int, int], interpolation: TrainInterpolation, hflip: float) -> DataNode:
    """Resizes with antialiasing, then flips horizontally.

    Args:
        images: uint8 HWC RGB, of any sizes, on the pipeline's device.
        size: (H, W) of the result in pixels.
        interpolation: "bilinear", "bicubic", or "random", one of the two for each sample.
        hflip: probability in [0, 1] of the flip.

    Returns:
        uint8 HWC RGB. Where PyTorch resizes, within two grey levels of Pillow's result, and mostly equal to it.
    """
    pipeline, is_random = Pipeline.current(), interpolation == "random"
    kind = fn.random.choice(list(INTERPOLATIONS.values())) if is_random else INTERPOLATIONS[interpolation]
    mirror = fn.random.coin_flip(probability=hflip) if hflip else 0
    if kernel(size, "cpu" if pipeline.device_id is None else "gpu") == "dali":
        return fn.resize_crop_mirror(images, size=list(size), crop=list(size), interp_type=kind, mirror=mirror)
    resize = _Resize(size, interpolation == "bicubic", pipeline.num_threads)
    is_cubic = [fn.cast(kind, dtype=types.INT32) == int(types.INTERP_CUBIC)] if is_random else []
    images = fn.python_function(images, *is_cubic, function=resize, batch_processing=True, output_layouts="HWC")
    # Not torch.flip, which wakes OpenMP's threads: their active waiting costs more than the resize.
    return fn.flip(images, horizontal=mirror) if hflip else images


class _Resize:
    """Resizes a batch on up to `threads` threads, the caller's among them.

    PyTorch's kernel releases Python's lock and uses one thread. `torch.set_num_threads` is never called: every later
    thread of the user's process would inherit its value.
    """

    def __init__(self, size: tuple[int, int], is_cubic: bool, threads: int) -> None:
        self._size, self._is_cubic, self._threads = size, is_cubic, threads

    def __call__(self, images: list[np.ndarray], *is_cubic: list[np.ndarray]) -> list[np.ndarray]:
        resized = images.copy()
        numbers = iter(range(len(images)))  # shared: large crops take longer than small ones

        def work() -> None:
            for number in numbers:
                resized[number] = self._one(images[number], *(drawn[number] for drawn in is_cubic))

        helpers: list[Future[None]] = []
        try:
            for _ in range(min(self._threads, len(images)) - 1):
                helpers.append(_pool(os.getpid()).submit(work))
            work()
        finally:  # DALI frees the images afterwards
            wait([helper for helper in helpers if not helper.cancel()])
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return resized

    def _one(self, image: np.ndarray, is_cubic: np.ndarray | None = None) -> np.ndarray:
        mode = "bicubic" if (self._is_cubic if is_cubic is None else is_cubic) else "bilinear"
        # Channels last by all strides, the batch's too: PyTorch copies any other layout.
        pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        resized: np.ndarray = interpolate(pixels, self._size, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
        return resized


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process, shared by its pipelines; a forked child has none of its parent's."""
    return ThreadPoolExecutor(cpus.available(), thread_name_prefix="lumix_dali.resize")
