"""The programs in examples/ run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from images import write

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 images of two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(16):
        write(rng.integers(0, 256, (40, 48, 3)), root / f"c{i % 2}" / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "way", ["generic", *(pytest.param(way, marks=pytest.mark.slow) for way in ("dlpack", "proxy"))]
)
def test_batches_of_ones_own_pipeline_arrive(folder, way):
    command = [sys.executable, "examples/own_pipeline.py", str(folder), way]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"\[8, 3, 224, 224\]  loss (\d\.\d+)  lam0 (0\.\d+)", done.stdout)
    assert len(rows) == 2
    assert all(1.5 < float(loss) < 5 and float(lam0) > 0.05 for loss, lam0 in rows)  # ten classes, scores near 0


def test_a_loop_in_dynamic_mode(folder):
    pytest.importorskip("nvidia.dali.experimental.dynamic")
    command = [sys.executable, "examples/dynamic_mode.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\d\.\d+)", done.stdout)]
    assert len(losses) == 2
    assert all(1.5 < loss < 5 for loss in losses)  # ten classes, an untrained model
