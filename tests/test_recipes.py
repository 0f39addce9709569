"""The recipes match the paper's tables and the original repositories, and run to completion."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from pipelines import train, training

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(train.__file__).parent / "recipes"
ROOT = FOLDER.parents[1]
FIELDS = (
    "model",
    "params",
    "gflop",
    "epochs",
    "warmup_epochs",
    "drop_path",
    "aug_repeats",
    "clip_grad",
    "crop_pct",
    "without",
    "top1",
)
PAPER = {  # Tables 1 and 6; millions of parameters; Table 6's "22M" for ResNet-50 is an error
    "convnext_tiny": ("convnext_tiny", 29, 4.5, 300, 20, 0.1, 0, None, 0.875, 82.1, 82.5),
    "convnext_small": ("convnext_small", 50, 8.7, 300, 20, 0.4, 0, None, 0.875, 83.1, 83.3),
    "convnext_base": ("convnext_base", 89, 15.4, 300, 20, 0.5, 0, None, 0.875, 83.8, 84.1),
    "swin_tiny": ("swin_tiny_patch4_window7_224", 28, 4.5, 300, 20, 0.2, 0, 5.0, 0.875, 81.3, 81.7),
    "swin_small": ("swin_small_patch4_window7_224", 50, 8.7, 300, 20, 0.3, 0, 5.0, 0.875, 83.0, 83.1),
    "swin_base": ("swin_base_patch4_window7_224", 88, 15.4, 300, 20, 0.5, 0, 5.0, 0.875, 83.5, 83.6),
    "deit_small": ("deit_small_patch16_224", 22, 4.7, 300, 5, 0.1, 3, None, 0.875, 79.8, 80.6),
    "deit_base": ("deit_base_patch16_224", 87, 17.6, 300, 5, 0.1, 3, None, 0.875, 81.8, 82.2),
    "xcit_small": ("xcit_small_12_p16_224", 26, 4.8, 400, 20, 0.05, 3, None, 1.0, 82.0, 82.3),
    "xcit_medium": ("xcit_medium_24_p16_224", 84, 16.2, 400, 20, 0.15, 3, None, 1.0, 82.7, 83.2),
    "xcit_large": ("xcit_large_24_p16_224", 189, 36.1, 400, 20, 0.25, 3, None, 1.0, 82.9, 83.6),
    "resnet50": ("resnet50", 26, None, 300, 5, None, 0, None, 0.875, 78.6, 79.1),
}
OWN = {*FIELDS, "model_ema", "model_ema_decay", "min_lr", "sched_on_updates", "warmup_prefix"}  # may differ


def paper(name):
    return dict(zip(FIELDS, PAPER[name], strict=True))


def test_every_row_has_a_recipe():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_recipes_match_the_paper(name, capsys):
    expected, text = paper(name), (FOLDER / f"{name}.yaml").read_text()
    args = vars(train.parse_args(["--config", str(FOLDER / f"{name}.yaml"), "--data-dir", "imagenet"]))
    assert capsys.readouterr().err == ""  # every key is a flag
    args["epochs"] += args["warmup_epochs"] if args["warmup_prefix"] else 0
    given = [key for key in FIELDS if key in args]
    assert {key: args[key] for key in given} == {key: expected[key] for key in given}
    assert args["lr"] == 1e-3
    assert args["warmup_lr"] == 1e-6
    assert args["batch_size"] * int(re.search(r"--nproc_per_node (\d+)", text)[1]) == 1024
    assert (args["r_r"], args["r_s"], args["eta"], args["noise"]) == (0.4, 0.1, 1.0, ("beta", 2.0))
    assert f"{expected['top1']} % top-1 in the paper" in text
    assert f"{expected['without']} % without LUMix. Not run here.\n" in text
    assert f"--config {(FOLDER / f'{name}.yaml').relative_to(ROOT)} --data-dir" in text
    speed = 322 * 4.7 / expected["gflop"] if expected["gflop"] else 464  # Table 6: DeiT-S, ResNet-50
    assert f"are {expected['epochs'] * 1_281_167 / speed / 3600:.0f} V100 hours." in text


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_small", "convnext_base"])
def test_convnexts_schedule_matches_its_repository(name):
    """Its `cosine_scheduler` joins a linear warm-up and a cosine over the rest of the 300 epochs."""
    args = train.parse_args(["--config", str(FOLDER / f"{name}.yaml"), "--data-dir", "imagenet"])
    updates, warm, total = 1251, 20 * 1251, 300 * 1251
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler, epochs = create_scheduler_v2(
        torch.optim.SGD([weight], lr=args.lr), **scheduler_kwargs(args), updates_per_epoch=updates
    )
    assert epochs == 300
    for step in (0, 1, 10_000, warm - 1, warm, 113 * updates, 207 * updates, total - 1):
        cosine = 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        expected = 1e-6 + (1e-3 - 1e-6) * step / warm if step < warm else cosine
        assert scheduler._get_lr(step) == [pytest.approx(expected, rel=1e-9)]


def test_all_other_settings_agree():
    recipes = [yaml.safe_load(file.read_text()) for file in FOLDER.glob("*.yaml")]
    common = [{key: value for key, value in recipe.items() if key not in OWN} for recipe in recipes]
    assert all(each == common[0] for each in common)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_smoke(name, tmp_path):
    """The real model, to completion: two updates, a validation, a checkpoint."""
    folder = tmp_path / "smoke"
    train.main(["--config", str(FOLDER / f"{name}.yaml"), "--smoke", "--device", "cpu", "--output", str(tmp_path)])
    state = torch.load(folder / "last.pth.tar", weights_only=True)
    (row,) = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    shutil.rmtree(folder)  # up to 5 GB
    assert state["run"]["updates"] == 2
    assert round(sum(value.numel() for value in state["state_dict"].values()) / 1e6) == paper(name)["params"]
    assert ("state_dict_ema" in state) == name.startswith("convnext")
    assert 1e-6 <= row["lr"] < 1e-4  # warm-up
    assert 6 < row["train_loss"] < 9  # ln 1000 = 6.9
    assert 0 < row["val_loss"] < 8


@pytest.mark.parametrize("ranks", [1, 3])
def test_smoke_of_any_command(ranks, tmp_path, monkeypatch):
    """Settings that make a run long are replaced, in flags and in the config; everything else stays."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", str(ranks - 1))
    plain = [
        "--model",
        "test_vit",
        "--img-size",
        "32",
        "--epochs",
        "300",
        "-b",
        "512",
        "--lr",
        ".1",
        "--mixup",
        ".8",
        "--grad-accum-steps",
        "8",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
        "--experiment",
        "mine",
    ]
    before, args = vars(train.parse_args([*plain, "--smoke"])), train.parse_args([*plain, "--smoke"])
    training.shrink(args)
    short = {
        "data_dir",
        "val_split",
        "num_classes",
        "batch_size",
        "validation_batch_size",
        "grad_accum_steps",
        "epochs",
        "experiment",
        "overwrite",
    }
    assert {key for key, value in vars(args).items() if before[key] != value} == short
    assert len(training.load_data(args)[0]) == 4 * ranks
    if ranks == 1:
        train.main([*plain, "--smoke"])
        assert not (tmp_path / "mine").exists()  # a real run's folder stays untouched
        state = torch.load(tmp_path / "mine-smoke" / "last.pth.tar", weights_only=True)
        assert state["run"]["updates"] == 2
        assert state["state_dict"]["head.weight"].shape[0] == 1000
