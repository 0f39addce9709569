"""Describes a GPU host and what decodes JPEGs there; the last line of standard output is JSON.

The report has versions, devices and what is missing; how much the GPU's pixels differ from the CPU's; and images/s of
the CPU's decoder and of the GPU's, the latter for several `hw_decoder_load`, with its kernels and the JPEG engine's
load. Without libnvjpeg, DALI's "mixed" decoder silently falls back to the CPU: `decoder` says which one ran, and
`warnings` what is wrong with it.

    python -m benchmarks.probe
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import harness

MODULES = (
    "nvidia.dali",
    "timm",
    "torchvision",
    "PIL",
    "tqdm",
    "yaml",
    "pytest",
    "triton",
    "scipy",
    "sklearn",
    "hypothesis",
    "matplotlib",
    "spdl",
    "webdataset",
    "ffcv",
    "liger_kernel",
)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "4:4:4": dict(subsampling=0),
    "4:2:0": dict(subsampling=2),
    "progressive": dict(subsampling=2, progressive=True),
}
REGIONS = ("training", "evaluation")
LOADS = (0.0, 0.65, 0.99)
SECONDS = 1.0
CODECS = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")
FASTER = 1.5  # times the CPU's rate; any GPU that really decodes is faster


def available(module: str) -> bool:
    """Whether a module can be found, without importing it or what it needs."""
    with suppress(ModuleNotFoundError):  # of its package
        return importlib.util.find_spec(module) is not None
    return False


def digest() -> str:
    """SHA-256 of the Python files, to identify the source on a host without git."""
    files = sorted(
        path
        for name in ("lumix_dali", "pipelines", "benchmarks", "tests")
        for path in (harness.ROOT / name).rglob("*.py")
    )
    return hashlib.sha256(
        b"".join(str(path.relative_to(harness.ROOT)).encode() + b"\0" + path.read_bytes() for path in files)
    ).hexdigest()


def environment() -> dict[str, Any]:
    """Machine, versions, source, and what is missing."""
    found = harness.metadata("python -m benchmarks.probe") | dict(
        sources=digest(),
        missing=[name for name in MODULES if not available(name)],
        compiler=shutil.which("cc"),
        torch_cuda=torch.version.cuda,
    )
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = dict(
            name=gpu.name,
            memory_gib=round(gpu.total_memory / 2**30, 1),
            multiprocessors=gpu.multi_processor_count,
            capability=[gpu.major, gpu.minor],
        )
    if available("nvidia.dali"):
        from nvidia import dali
        from nvidia.dali import backend_impl

        found["dali"] = dict(
            version=dali.__version__, cuda=backend_impl.GetCudaVersion(), nvimgcodec=backend_impl.GetNvimgcodecVersion()
        )
    return found


def photographs(count: int) -> list[np.ndarray]:
    """RGB textures of ImageNet's sizes, smooth enough for chroma to survive its subsampling."""
    from PIL import ImageFilter

    from .data import texture

    textures = (texture(np.random.default_rng(i)) for i in range(count))
    return [np.asarray(image.filter(ImageFilter.GaussianBlur(2))) for image in textures]


def jpegs(images: Sequence[np.ndarray], **options: Any) -> list[np.ndarray]:
    """Each image's file, uint8."""
    import io

    from PIL import Image

    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90, **options)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    return files


def decoded(encoded, region: str, **options: Any):
    """The region of each file that the package's pipelines decode, from the package's own function."""
    from nvidia.dali import fn, math, types

    from lumix_dali import decoding

    def training(shape):
        return fn.random_crop_generator(shape, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])

    def evaluation(shape):
        size = fn.cast(shape[:2], dtype=types.INT32)
        side = math.min(size[0], size[1]) * 7 // 8  # timm's crop_pct of .875
        window = fn.stack(side, side)
        return (size - window) // 2, window

    return decoding.decode(encoded, {"training": training, "evaluation": evaluation}[region], **options)


def decoder(files: list[np.ndarray], device: int | None, batch_size: int, region: str = "training", **options: Any):
    """A pipeline that repeatedly decodes the same regions of the same files on every device."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=harness.cpus(), device_id=device, seed=0)
    def define():
        encoded = fn.external_source(lambda: (files * batch_size)[:batch_size], batch=True)
        return decoded(encoded, region, **options)

    return define()


def differences(device: int | None) -> dict[str, dict[str, float]]:
    """|GPU - CPU| of decoded pixels in grey levels, by region and chroma subsampling.

    "fancy" is the GPU with `jpeg_fancy_upsampling` against the CPU without it.
    """
    images, found = photographs(8), {}
    for region in REGIONS:
        for sampling, save in SAMPLINGS.items():
            files = jpegs(images, **save)
            (reference,) = decoder(files, None, len(files), region).run()
            for fancy in (False, True):
                name = f"{region} {sampling}" + " fancy" * fancy
                print("decoding", name, flush=True)  # if the decoder crashes, the log shows on which input
                (pixels,) = decoder(files, device, len(files), region, jpeg_fancy_upsampling=fancy).run()
                pixels = pixels if device is None else pixels.as_cpu()
                off = np.concatenate(
                    [np.abs(pixels.at(i).astype(int) - reference.at(i)).ravel() for i in range(len(files))]
                )
                found[name] = dict(mean=float(off.mean()), p99=float(np.percentile(off, 99)), most=int(off.max()))
    return found


def decoder_found(differences: dict[str, dict[str, float]], device: str) -> dict[str, Any]:
    """nvImageCodec's version, the libnvjpeg that it loaded, and which device decoded each kind of file.

    JPEG decoders differ in their rounding, so pixels that all equal the CPU decoder's were decoded on the CPU.
    """

    def ran(difference: dict[str, float]) -> str:
        return "gpu" if device != "cpu" and difference["most"] else "cpu"

    return dict(
        nvimgcodec=list(installed(CODECS)),
        libnvjpeg=loaded("libnvjpeg.so"),
        ran={name: ran(found) for name, found in differences.items() if not name.endswith("fancy")},
    )


def installed(names: Sequence[str]) -> Iterator[str]:
    """Name and version of each of these distributions that is installed."""
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"


def loaded(library: str) -> list[str]:
    """The paths from which this process has loaded a library."""
    paths = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return sorted({path for path in paths if Path(path).name.startswith(library)})


def warnings(found: dict[str, Any]) -> list[str]:
    """Problems of a GPU's decoder, judged by the report so far."""
    said, decoder = [], found["decoder"]
    if on_cpu := [name for name, ran in decoder["ran"].items() if ran == "cpu"]:
        said.append(f"THE CPU DECODED, NOT THE GPU: {', '.join(on_cpu)} (pixels equal to the CPU decoder's)")
    if not decoder["libnvjpeg"]:
        said.append("libnvjpeg is not loaded: install nvidia-nvjpeg-cu12 (CUDA 12) or nvidia-nvjpeg (CUDA 13)")
    rates = {name: row["images_per_second"] for name, row in found.get("decoding", {}).items()}
    cpu = rates.pop("cpu", 0.0)
    if rates and max(rates.values()) < FASTER * cpu:
        said.append(f"the mixed decoder reaches {max(rates.values()):.0f} images/s, the CPU's {cpu:.0f}")
    return said


@contextmanager
def engine() -> Iterator[list[int]]:
    """Utilisation of the GPU's JPEG engine in per cent, sampled every tenth of a second."""
    command = ("nvidia-smi", "--query-gpu=utilization.jpeg", "--format=csv,noheader,nounits", "-lms", "100")
    readings: list[int] = []
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield readings
    finally:
        watcher.terminate()
        text = watcher.communicate()[0]
        readings += [int(line) for line in text.split() if line.isdecimal()]
        if not readings:
            print("nvidia-smi reports nothing about the JPEG engine:", text.strip()[:200])


def decoding(device: int | None, batch_size: int = 256) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images/s of training's regions: the CPU's, then the GPU's for each `hw_decoder_load`.

    The GPU's rows also hold the JPEG engine's utilisation and the kernels.
    """
    from .mix import kernels

    files = jpegs(photographs(32), subsampling=2)
    few = batch_size // 8  # a CPU is slow and needs no large batches
    yield "cpu", dict(images_per_second=rate(decoder(files, None, few).run, few))
    if device is None:
        return
    for load in LOADS:
        run = partial(decoder(files, device, batch_size, hw_decoder_load=load).run, torch.cuda.current_stream(device))
        with engine() as readings:
            speed = rate(run, batch_size, f"cuda:{device}")
        yield (
            f"hw_decoder_load={load}",
            dict(
                images_per_second=speed,
                jpeg_engine=dict(most=max(readings, default=None), readings=len(readings)),
                **kernels(run, 3),
            ),
        )


def rate(run: Callable[[], Any], batch_size: int, device: str = "cpu") -> float:
    """Images/s of a pipeline over `SECONDS`, after three untimed batches."""
    for _ in range(3):
        run()
    harness.synchronise(device)
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        run()
        batches += 1
    harness.synchronise(device)
    return batches * batch_size / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    for found in findings(harness.resolve_device(parser.parse_args(argv).device)):
        print(json.dumps(found), flush=True)  # in case a later step crashes
    for warning in found.get("warnings", []):
        print("WARNING:", warning, file=sys.stderr)


def findings(device: str) -> Iterator[dict[str, Any]]:
    """Prints the report so far, each time it grows."""
    found = environment()
    yield found
    if "nvidia.dali" in found["missing"]:
        return
    index = torch.device(device).index
    found["differences"] = differences(index)
    found["decoder"] = decoder_found(found["differences"], device)
    found["warnings"] = [] if device == "cpu" else warnings(found)
    yield found
    found["decoding"] = {}
    for name, row in decoding(index):
        found["decoding"][name] = row
        found["warnings"] = [] if device == "cpu" else warnings(found)
        yield found


if __name__ == "__main__":
    main()
