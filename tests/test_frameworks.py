"""The examples for Lightning and Accelerate: a run interrupted within an epoch ends like an uninterrupted one."""

import json
import os
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
from images import ramp_samples
from test_ranks import torchrun
from test_train import write_folder

from lumix_dali import LUMixLoss, create_loader

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
RANK = """
import json, os, sys
from importlib import import_module
from pathlib import Path
from test_frameworks import losses

found = losses(sys.argv[1], sys.argv[2:])
Path(os.environ["TOLD"], os.environ["RANK"] + ".json").write_text(json.dumps(found))
"""


def losses(name, flags):
    """The loss of each step that the example takes; without λ_r, whose generator Lightning does not save."""
    example, seen = import_module(f"examples.with_{name}"), []

    class Recorded(LUMixLoss):
        def __init__(self):
            super().__init__(0.0, 0.5)

        def forward(self, *inputs):
            loss = super().forward(*inputs)
            seen.append(loss.item())
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "LUMixLoss", Recorded)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        example.main(flags)
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("data"), {"train": 150, "val": 17}, size=(36, 40)))


def flags(name, root, output, devices=1):
    lightning = ["--accelerator", "cpu", "--devices", str(devices)] if name == "lightning" else []
    return [
        root,
        "--model",
        "test_resnet",
        "--epochs",
        "2",
        "--save-every",
        str(10 // devices),
        "--output",
        str(output),
        *lightning,
    ]


def saved(name, output, step):
    return next(output.glob(f"*step={step}.ckpt")) if name == "lightning" else output


@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_one_process(name, root, tmp_path):
    """Seven batches per epoch of 450 images; saved after the tenth batch."""
    pytest.importorskip(name)
    whole = losses(name, flags(name, root, tmp_path))
    assert len(set(whole)) == 14
    again = [*flags(name, root, tmp_path / "again"), "--resume", str(saved(name, tmp_path, 10))]
    assert losses(name, again) == whole[10:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_two_processes(name, root, tmp_path):
    """Three batches per epoch, saved after the fifth; each rank resumes at its own images."""
    pytest.importorskip(name)

    def run(*more):
        (tmp_path / "rank.py").write_text(RANK)
        environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "TOLD": str(tmp_path),
        }
        command = [*torchrun(2), str(tmp_path / "rank.py"), name, *more]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            text=True,
            timeout=300,
            capture_output=True,
            check=False,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    plain = flags(name, root, tmp_path / "run", devices=2)
    first, second = whole = run(*plain)
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)
    assert run(*plain, "--resume", str(saved(name, tmp_path / "run", 5))) == [each[5:] for each in whole]


# Every epoch's batches are those of a plain loop


OPTIONS = dict(batch_size=4, input_size=16, device="cpu", num_threads=1, mixup_alpha=0.8, cutmix_alpha=1.0)
EPOCHS = 4


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    return ramp_samples(tmp_path_factory.mktemp("ramps"), 21)


def plain(samples):
    """(epoch, signature) of every batch of a plain loop."""
    from lightning_streams import signature

    with create_loader(samples, **OPTIONS) as loader:
        return [(epoch, *signature(*batch)) for epoch in range(EPOCHS) for batch in loader]


def fitted(samples, folder, resume=None, epochs=EPOCHS, **trainer):
    """What Lightning trains on; it saves after every step."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_streams import Recorder

    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    module = Recorder(samples, **OPTIONS)
    fit = lightning.Trainer(max_epochs=epochs, callbacks=saver, **quiet | trainer).fit
    fit(module, ckpt_path=resume and folder / f"step={resume}.ckpt")
    return module.seen


def test_lightning_gets_the_epochs_of_a_plain_loop(ramps, tmp_path):
    pytest.importorskip("lightning")
    want = plain(ramps)
    assert len({str(batch[1:]) for batch in want}) == 20
    assert fitted(ramps, tmp_path) == want
    for step in (2, 5, 8, 10):  # within an epoch, and at the end of one
        assert fitted(ramps, tmp_path, resume=step) == want[step:], step


def test_lightning_that_makes_its_loaders_anew(ramps, tmp_path):
    pytest.importorskip("lightning")
    want = plain(ramps)
    anew = dict(reload_dataloaders_every_n_epochs=1)
    assert fitted(ramps, tmp_path, **anew) == want
    for step in (2, 5, 8):
        assert fitted(ramps, tmp_path, resume=step, **anew) == want[step:], step


def test_accelerate_gets_the_epochs_of_a_plain_loop(ramps, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    from lightning_streams import signature

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = torch.nn.Linear(1, 1)
    with create_loader(ramps, **OPTIONS) as loader:
        accelerator = accelerate.Accelerator()
        prepared, _ = accelerator.prepare(loader, model)
        found = []
        for epoch in range(EPOCHS):
            if hasattr(prepared, "set_epoch"):
                prepared.set_epoch(epoch)
            found += [(epoch, *signature(*batch)) for batch in prepared]
    assert found == plain(ramps)
