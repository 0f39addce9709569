"""Describes a machine and its decoder, for `benchmarks.gpu`; each line of standard output is a JSON report, growing.

    python -m benchmarks.device environment           # versions, clocks, power, PCIe; what decodes JPEGs
    python -m benchmarks.device decode --regions      # images/s and pixels of this loader, decoding only the regions

Without libnvjpeg, DALI's "mixed" decoder silently falls back to the CPU. JPEG decoders differ in their rounding, so
pixels that all equal the CPU decoder's were decoded on the CPU.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import harness

MODULES = ("nvidia.dali", "timm", "torchvision", "PIL", "yaml", "pytest", "triton", "scipy", "liger_kernel")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "4:4:4": dict(subsampling=0),
    "4:2:0": dict(subsampling=2),
    "progressive": dict(subsampling=2, progressive=True),
}
CROPS = dict(mixup_alpha=0.0, cutmix_alpha=0.0)


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
    content = (str(path.relative_to(harness.ROOT)).encode() + b"\0" + path.read_bytes() for path in files)
    return hashlib.sha256(b"".join(content)).hexdigest()


def environment(device: str) -> Iterator[dict[str, Any]]:
    """Machine, versions, source, what is missing, and which decoder runs."""
    import torch

    found = harness.metadata("python -m benchmarks.device environment") | dict(
        sources=digest(),
        missing=[name for name in MODULES if not available(name)],
        compiler=shutil.which("cc"),
        torch_cuda=torch.version.cuda,
    )
    yield found
    if "nvidia.dali" in found["missing"]:
        return
    from nvidia import dali
    from nvidia.dali import backend_impl

    found["dali"] = dict(
        version=dali.__version__, cuda=backend_impl.GetCudaVersion(), nvimgcodec=backend_impl.GetNvimgcodecVersion()
    )
    yield found
    found["differences"] = differences(torch.device(device).index)
    found["decoder"] = decoder(found["differences"], device)
    found["warnings"] = [] if device == "cpu" else warnings(found["decoder"])
    yield found


def jpegs(count: int, **options: Any) -> Any:
    """Textures as files, uint8, smooth enough for chroma to survive its subsampling."""
    import numpy as np
    from PIL import ImageFilter

    from .data import texture

    files = []
    for number in range(count):
        file = io.BytesIO()
        image = texture(np.random.default_rng(number)).filter(ImageFilter.GaussianBlur(2))
        image.save(file, "JPEG", quality=90, **options)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    return files


def differences(index: int | None) -> dict[str, dict[str, float]]:
    """|GPU - CPU| of decoded pixels in grey levels, by chroma subsampling."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=8, num_threads=2)
    def whole(files: Any, device: str):
        encoded = fn.external_source(lambda: files, batch=True)
        return fn.decoders.image(encoded, device=device, adjust_orientation=False)

    found = {}
    for sampling, save in SAMPLINGS.items():
        files = jpegs(8, **save)
        harness.say(f"decoding {sampling}")  # if the decoder crashes, the log shows on which input
        (reference,) = whole(files, "cpu", device_id=None).run()
        (pixels,) = whole(files, "cpu" if index is None else "mixed", device_id=index).run()
        pixels = pixels if index is None else pixels.as_cpu()
        off = np.concatenate([np.abs(pixels.at(i).astype(int) - reference.at(i)).ravel() for i in range(8)])
        found[sampling] = dict(mean=float(off.mean()), largest=int(off.max()))
    return found


def decoder(differences: dict[str, dict[str, float]], device: str) -> dict[str, Any]:
    """The libnvjpeg that this process loaded, and which device decoded each kind of file."""
    ran = {name: "gpu" if device != "cpu" and off["largest"] else "cpu" for name, off in differences.items()}
    return dict(libnvjpeg=loaded("libnvjpeg.so"), ran=ran)


def loaded(library: str) -> list[str]:
    """The paths from which this process has loaded a library."""
    paths = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return sorted({path for path in paths if Path(path).name.startswith(library)})


def warnings(decoder: dict[str, Any]) -> list[str]:
    """Problems of a GPU's decoder."""
    said = []
    if on_cpu := [name for name, ran in decoder["ran"].items() if ran == "cpu"]:
        said.append(f"THE CPU DECODED, NOT THE GPU: {', '.join(on_cpu)} (pixels equal to the CPU decoder's)")
    if not decoder["libnvjpeg"]:
        said.append("libnvjpeg is not loaded: install nvidia-nvjpeg-cu12 (CUDA 12) or nvidia-nvjpeg (CUDA 13)")
    return said


def decode(device: str, data: Path | None, regions: bool, batch_size: int, batches: int) -> Iterator[dict[str, Any]]:
    """This loader with whole images or with regions: its pixels against the CPU's, then images/s."""
    import torch
    from nvidia import dali
    from nvidia.dali import backend_impl

    from lumix_dali import create_loader
    from lumix_dali.data.sources import load_files

    from . import data as generated
    from .contenders import AHEAD, Setting

    found: dict[str, Any] = dict(
        regions=regions, dali=dali.__version__, nvimgcodec=backend_impl.GetNvimgcodecVersion(), gpu=harness.gpu_state()
    )
    yield found
    with tempfile.TemporaryDirectory() as scratch:
        s = Setting(load_files(data or generated.generate()), batch_size, 224, device, Path(scratch))
        length = harness.epoch_length(batches, AHEAD)
        options: Any = dict(batch_size=batch_size, input_size=224, seed=0, **CROPS)
        with create_loader(s.repeated(length), device=device, **options | dict(decode_regions=regions)) as loader:
            images = next(iter(loader))[0].float().cpu()
            with create_loader(s.repeated(length), device="cpu", **options) as reference:
                off = (images - next(iter(reference))[0]).abs() * 255 * 0.225
            found["differences"] = dict(mean=float(off.mean()), largest=float(off.max()))
            yield found
            speed = harness.throughput(loader, batch_size=batch_size, timed=batches, ahead=AHEAD, device=device)
        found |= dict(images_per_second=speed, gpu_after=harness.gpu_state())
        if device != "cpu":
            free, total = torch.cuda.mem_get_info(device)
            found["memory_mib"] = (total - free) / 2**20
        yield found


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("environment", "decode"))
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--data", type=Path, metavar="DIR", help="decode: class folder (default: generated images)")
    add("--regions", action="store_true", help="decode: only the region of each image that is needed")
    add("--batch-size", type=harness.positive, default=256, help="decode (default: 256)")
    add("--batches", type=harness.positive, default=40, help="decode: timed (default: 40)")
    args = parser.parse_args(argv)
    harness.say(f"benchmarks.device {args.what}: less than a minute")
    with harness.one_line(parser):
        device = harness.resolve_device(args.device)
    if args.what == "environment":
        reports = environment(device)
    else:
        reports = decode(device, args.data, args.regions, args.batch_size, args.batches)
    for found in reports:
        harness.say(json.dumps(found))  # in case a later part crashes


if __name__ == "__main__":
    main()
