"""What a GPU host is, and what decodes JPEGs there; the last line of the output is JSON.

Versions, devices and what is missing; whether the GPU's JPEG engine is used, by asking the driver while DALI
decodes with several `hw_decoder_load`; which kernels run; and how far the GPU's pixels are from the CPU's.

    python -m benchmarks.probe
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from . import harness

MODULES = ("nvidia.dali", "timm", "torchvision", "PIL", "tqdm", "yaml", "pytest", "triton", "scipy", "sklearn",
           "hypothesis", "matplotlib", "spdl", "webdataset", "ffcv", "liger_kernel")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "4:4:4": dict(subsampling=0), "4:2:0": dict(subsampling=2),
    "progressive": dict(subsampling=2, progressive=True)}
LOADS = (0.0, 0.65, 0.99)
SECONDS = 2.0


def available(module: str) -> bool:
    """Whether a module can be found, without importing it or what it needs."""
    with suppress(ModuleNotFoundError):  # of its package
        return importlib.util.find_spec(module) is not None
    return False


def digest() -> str:
    """SHA-256 of the Python files: says which state of the project ran where there is no git."""
    files = sorted(path for name in ("lumix_dali", "pipelines", "benchmarks", "tests")
                   for path in (harness.ROOT / name).rglob("*.py"))
    return hashlib.sha256(b"".join(str(path.relative_to(harness.ROOT)).encode() + b"\0" + path.read_bytes()
                                   for path in files)).hexdigest()


def environment() -> dict[str, Any]:
    """Machine, versions, source, and what is missing."""
    found = harness.metadata("python -m benchmarks.probe") | dict(
        sources=digest(), missing=[name for name in MODULES if not available(name)], compiler=shutil.which("cc"),
        torch_cuda=torch.version.cuda)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = dict(name=gpu.name, memory_gib=round(gpu.total_memory / 2**30, 1),
                            multiprocessors=gpu.multi_processor_count, capability=[gpu.major, gpu.minor])
    if available("nvidia.dali"):
        from nvidia import dali
        from nvidia.dali import backend_impl

        found["dali"] = dict(version=dali.__version__, cuda=backend_impl.GetCudaVersion(),
                             nvimgcodec=backend_impl.GetNvimgcodecVersion())
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


def decoder(files: list[np.ndarray], device: int | None, batch_size: int, **options: Any):
    """A pipeline that decodes the same files over and over."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=harness.cpus(), device_id=device)
    def define():
        encoded = fn.external_source(lambda: (files * batch_size)[:batch_size], batch=True)
        return fn.decoders.image(encoded, device="cpu" if device is None else "mixed", **options)

    return define()


def differences(device: int | None) -> dict[str, dict[str, float]]:
    """|GPU - CPU| of decoded pixels in grey levels, by chroma subsampling; fancy: with `jpeg_fancy_upsampling`."""
    images, found = photographs(8), {}
    for name, save in SAMPLINGS.items():
        files = jpegs(images, **save)
        (reference,) = decoder(files, None, len(files)).run()
        for fancy in (False, True):
            (decoded,) = decoder(files, device, len(files), jpeg_fancy_upsampling=fancy).run()
            decoded = decoded if device is None else decoded.as_cpu()
            off = np.concatenate(
                [np.abs(decoded.at(i).astype(int) - reference.at(i)).ravel() for i in range(len(files))])
            found[f"{name} fancy" if fancy else name] = dict(
                mean=float(off.mean()), p99=float(np.percentile(off, 99)), most=int(off.max()))
    return found


@contextmanager
def engine() -> Iterator[list[int]]:
    """Readings of the GPU's JPEG engine in per cent, every tenth of a second."""
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
            print("nvidia-smi tells nothing of the JPEG engine:", text.strip()[:200])


def decoding(device: int, batch_size: int = 256) -> dict[str, dict[str, Any]]:
    """For each `hw_decoder_load`: images/s, the JPEG engine's utilisation, and kernels."""
    from .mix import kernels

    files, found = jpegs(photographs(64), subsampling=2), {}
    for load in LOADS:
        pipe = decoder(files, device, batch_size, hw_decoder_load=load)
        run = partial(pipe.run, torch.cuda.current_stream(device))
        for _ in range(3):
            run()
        with engine() as readings:
            batches, start = 0, time.perf_counter()
            while time.perf_counter() - start < SECONDS:
                run()
                batches += 1
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        found[f"hw_decoder_load={load}"] = dict(
            images_per_second=batches * batch_size / seconds, jpeg_engine=dict(most=max(readings, default=None),
                                                                            readings=len(readings)),
            **kernels(run, 3))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    device = harness.resolve_device(parser.parse_args(argv).device)
    found = environment()
    print(json.dumps(found), flush=True)  # whatever happens to what follows
    if "nvidia.dali" not in found["missing"]:
        found["differences"] = differences(torch.device(device).index)
        print(json.dumps(found), flush=True)
        if device != "cpu":
            found["decoding"] = decoding(int(device.partition(":")[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
