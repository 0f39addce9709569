"""The programs in examples/ run unchanged."""

import ast
import json
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


@pytest.mark.parametrize("way", ["generic", "dlpack", "proxy"])
def test_batches_of_a_custom_pipeline_arrive(folder, way):
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


NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_stored_notebook_is_complete():
    """Its cells parse and were run in order; their output has no error, warning or path of the author's machine."""
    found = cells("code")
    for number, cell in enumerate(found, 1):
        ast.parse(re.sub("^%.*", "", "".join(cell["source"]), flags=re.MULTILINE))
        assert cell["execution_count"] == number
    outputs = [output for cell in found for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(^|\s)/\w+/", text)
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 3
    assert NOTEBOOK.stat().st_size < 500_000


def test_the_notebooks_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", "".join(line for cell in cells("markdown") for line in cell["source"]))
    assert targets
    assert not [target for target in targets if not (NOTEBOOK.parent / target).exists()]


def test_the_notebook_runs(monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    weights = re.findall(r"CUTMIX +partner \d  lam0 (\d\.\d+)  box (\d\.\d+)", text)
    assert weights
    assert all(lam0 == box for lam0, box in weights)
    assert float(re.search(r"top-1 after \d+ epochs: (\d+\.\d) %", text)[1]) > 60
    assert "True" in [output.data["text/plain"] for output in outputs if "data" in output]  # resumed at the same batch
