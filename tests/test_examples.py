"""The programs in examples/ run unchanged."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """16 images whose objects are white discs on black, and the masks of the discs; the last one is empty."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(16):
        y, x = np.mgrid[:80, :96]
        disc = (y - rng.integers(20, 60)) ** 2 + (x - rng.integers(20, 76)) ** 2 < rng.integers(10, 30) ** 2
        disc &= i < 15
        write(np.repeat(255 * disc[..., None], 3, -1).astype(np.uint8), root / "images" / f"c{i % 2}" / f"{i}.png")
        write((7 * disc).astype(np.uint8), root / "masks" / f"c{i % 2}" / f"{i}.png")
    return root


def test_images_and_masks_get_the_same_crop_flip_and_box(pairs, monkeypatch):
    """Where an image is white there is an object; only pixels at an edge, which a filter blurs, may differ."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import masks as example

    source = example.Pairs(example.class_folder(pairs / "images"), pairs / "masks", 8)
    pipe = example.train_pipeline(source, 64, "cpu", batch_size=8, num_threads=1, device_id=None, seed=3)
    mixed = 0
    for _ in range(2):
        images, masks, *target = (np.array(output.as_array()) for output in pipe.run())
        target = example.MixTarget(*target)
        white = images * np.reshape(example.STD, (3, 1, 1)) + np.reshape(example.MEAN, (3, 1, 1)) > 127
        seen = masks[..., 0] > 0
        assert set(np.unique(masks)) == {0, 7}
        assert (white[:, 0] != seen).mean() < 0.03
        tensors = example.MixTarget(*map(torch.from_numpy, target))
        found = example.counted_in_objects(torch.from_numpy(seen), tensors)
        for i, (y0, x0, y1, x1) in enumerate(target.box.tolist()):
            partner = sum(seen[i, y, x] for y in range(y0, y1) for x in range(x0, x1))
            wanted = partner / seen[i].sum() if seen[i].any() and target.kind[i] == 2 else target.lam0[i]
            assert found.lam0[i] == pytest.approx(wanted)
            mixed += target.kind[i] == 2
    assert mixed > 8


def test_the_example_of_masks_runs(pairs):
    command = [sys.executable, "examples/masks.py", str(pairs / "images"), str(pairs / "masks")]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"step \d: loss \d\.\d+, λ0 by objects 0\.\d+ on average", done.stdout)) == 2


def test_several_labels_per_image(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import multilabel as example

    rng = np.random.default_rng(0)
    names = [f"c{i % 2}/{i}.png" for i in range(16)]
    labels = rng.integers(0, 2, (16, 5))
    rows = [",".join([name, *map(str, row)]) for name, row in zip(names, labels, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    samples, found = example.read(str(tmp_path / "labels.csv"), str(folder))
    options = dict(batch_size=8, input_size=32, device="cpu", num_threads=1, cutmix_alpha=1.0, return_index=True)
    with example.create_loader(samples, **options) as train:
        _, target, index = next(iter(train))
    lam0, own = target.lam0.numpy()[:, None], labels[index.numpy()]
    wanted = (1 - lam0) * own + lam0 * own[target.partner.numpy()]
    np.testing.assert_allclose(example.mixed_labels(found, target, index), wanted, rtol=1e-6)
    assert 0 < lam0.mean() < 1
    command = [sys.executable, "examples/multilabel.py", str(folder), str(tmp_path / "labels.csv")]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"step \d: loss 0\.\d+", done.stdout)) == 2


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
    for cell in notebook.cells:  # 5 take half a minute
        cell.source = cell.source.replace("EPOCHS = 5", "EPOCHS = 2")
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    weights = re.findall(r"CUTMIX +partner \d  lam0 (\d\.\d+)  box (\d\.\d+)", text)
    assert weights
    assert all(lam0 == box for lam0, box in weights)
    assert float(re.search(r"top-1 after \d+ epochs: (\d+\.\d) %", text)[1]) > 60
    assert "True" in [output.data["text/plain"] for output in outputs if "data" in output]  # resumed at the same batch
