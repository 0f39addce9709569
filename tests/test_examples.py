"""What users copy runs as it stands: the examples, and the Python blocks of the docs that need no data of their own."""

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


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_pages_pipeline_and_dynamic_mode(folder):
    import torch

    (own,), (dynamic, _) = blocks("pipeline.md"), blocks("dynamic.md")
    names = {}
    exec(own, names)
    pipe = names["train"](str(folder), batch_size=8)
    images, *target = (torch.from_dlpack(each.as_tensor()) for each in pipe.run())
    assert images.shape == (8, 3, 224, 224)
    assert abs(images.mean()) < 1
    assert [tuple(each.shape) for each in target] == [(8,), (8,), (8,), (8, 4), (8,), (8,)]
    exec(dynamic, names)
    assert names["pixels"].shape == (8, 224, 224, 3)
    assert (names["target"].partner != torch.arange(8)).all()


def test_the_pages_own_source_and_multi_hot_labels(folder):
    import torch

    table, multi_hot = blocks("data.md")[2:]
    images = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    names = {"ROWS": [(image, i % 2) for i, image in enumerate([*images, None])]}
    exec(
        table.replace(
            'Table([(b"...", 0), (b"...", 1)]), batch_size=2',
            "SOURCE, batch_size=4, input_size=32, device='cpu', return_index=True",
        ).replace("\n\nloader", "\n\nSOURCE = Table(ROWS)\nloader"),
        names,
    )
    exec(multi_hot, names)
    with pytest.warns(UserWarning, match="row 16 cannot be used .the row is empty.; row 0 takes its place"):
        batches = [batch for _ in range(4) for batch in names["loader"]]
    labels = torch.eye(17)
    for _, target, index in batches:
        assert (target.labels == index % 2).all()
        soft = target.mix(labels[index])
        for row, (own, other, weight) in enumerate(zip(index, index[target.partner], target.lam0, strict=True)):
            assert soft[row, other] == pytest.approx(float(weight) + (own == other) * (1 - float(weight)))
            assert soft[row, own] == pytest.approx(1 - float(weight) + (own == other) * float(weight))
        loss = names["multi_hot_loss"](torch.zeros(4, 17), target, index, labels)
        assert loss == pytest.approx(np.log(2))
