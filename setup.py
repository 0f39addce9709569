import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
readme = here / "README.md"
version = re.search(r'__version__ = "(.+)"', (here / "lumix_dali/__init__.py").read_text())[1]
demo = ["matplotlib", "pillow", "scikit-learn", "scipy", "tqdm"]
# OpenCV: SaliencyMix. Not mosaicml-streaming: it pins NumPy below 2.2 and transformers below 5.
bench = [*demo, "litdata", "opencv-contrib-python-headless", "spdl", "torchmetrics", "webdataset"]
examples = ["accelerate", "lightning"]
segmentation = [*demo, "torchmetrics>=1.0"]
test = [*segmentation, *examples, "aiohttp", "google-crc32c", "hypothesis", "moto[server]", "pytest>=8"]
test += ["pytest-xdist", "s3fs"]

setup(
    name="lumix-dali",
    version=version,
    description="CutMix and Mixup in NVIDIA DALI's graph, and the LUMix loss (arXiv 2211.15846) for PyTorch",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["cutmix", "mixup", "lumix", "dali", "data augmentation", "label smoothing", "pytorch", "timm"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.15",
    # pipelines/ and benchmarks/ are programs, run from the checkout.
    packages=["lumix_dali", "lumix_dali.data", "lumix_dali.loading"],
    package_data={"lumix_dali": ["py.typed"]},
    install_requires=["fsspec>=2024.2", "numpy>=1.26", "pillow>=10.1", "torch>=2.4", "timm>=1.0.11"],
    extras_require={
        # One of the two, never both: the wheels overwrite each other's files.
        "cuda12": ["nvidia-dali-cuda120>=2.2"],
        "cuda13": ["nvidia-dali-cuda130>=2.2"],
        "s3": ["s3fs"],
        "demo": demo,
        "examples": examples,
        "segmentation": segmentation,
        "bench": bench,
        "test": test,
        "dev": [*test, "mypy", "ruff", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["lumix-dali = lumix_dali.__main__:main"]},
)
