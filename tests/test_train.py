"""The training program: what it writes, that its numbers are true, and what it says to a wrong argument."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform
from timm.loss import SoftTargetCrossEntropy

from lumix_dali import MixTarget
from pipelines import train

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_folder(root, counts, classes=COLOURS):
    """Noisy images about a colour a class, of several sizes: root/SPLIT/CLASS/NUMBER.png."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = rng.normal(COLOURS[name], 70)
                pixels = rng.normal(colour, 30, (36 + number % 5, 48 - number % 7, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{number}.png")
    return root


def argv(data, output, *more):
    return ["--data-dir", str(data), "--output", str(output), "--experiment", "run", "--model", "test_resnet",
            "--img-size", "32", "-b", "8", "--epochs", "2", "--warmup-epochs", "0", "--opt", "adamw",
            "--lr", "3e-3", "--device", "cpu", "--workers", "2", "--seed", "1", *more]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which cost much where the CPUs are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), {"train": 33, "validation": 17})


@pytest.fixture(scope="module", params=["resnet", "vit"])
def run(request, data, tmp_path_factory):
    """A finished run: its folder, its summary, and the model's name."""
    output = tmp_path_factory.mktemp(request.param)
    more = {
        "resnet": ["--channels-last", "--clip-grad", "1", "--checkpoint-hist", "1"],
        "vit": ["--model", "test_vit", "--mixup", ".8", "--mixup-mode", "elem", "--mixup-off-epoch", "1",
                "--model-ema", "--model-ema-decay", ".9", "--bce-loss", "--drop-path", ".1"],
    }[request.param]
    return output / "run", train.main(argv(data, output, *more)), f"test_{request.param}"


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_files(run):
    folder, summary, name = run
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert yaml.safe_load((folder / "args.yaml").read_text())["model"] == name
    with open(folder / "summary.csv") as file:
        table = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert table == rows(folder)
    assert [row["epoch"] for row in table] == [0, 1]
    assert not list(folder.glob("tmp*"))
    assert len(list(folder.glob("checkpoint-*.pth.tar"))) == (name == "test_resnet")


def test_summary_repeats_the_last_epoch(run):
    folder, summary, _ = run
    last = rows(folder)[-1]
    assert all(summary[key] == last[key] for key in ("top1", "top5", "val_loss"))
    assert summary["best"] == max(row["top1"] for row in rows(folder))
    assert summary["images_per_second"] > 0
    assert summary["device"] == "cpu"


def test_lam0_is_logged(run):
    folder, _, name = run
    first, second = (row["lam0_mean"] for row in rows(folder))
    assert .1 < first < .6
    assert (second == 0) == (name == "test_vit")  # --mixup-off-epoch 1


def test_summary_holds_for_the_saved_model(run, data):
    """top-1 and loss of the checkpoint, recomputed with timm's model, PIL and timm's transform."""
    folder, summary, name = run
    size = {"img_size": 32} if name == "test_vit" else {}
    checkpoint = str(folder / "last.pth.tar")
    model = timm.create_model(name, num_classes=3, checkpoint_path=checkpoint, **size).eval()
    transform = create_transform(**timm.data.resolve_data_config({"img_size": 32}, model=model))
    files = sorted((data / "validation").glob("*/*.png"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([list(COLOURS).index(file.parent.name) for file in files])
    with torch.inference_mode():
        logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert summary["val_loss"] == pytest.approx(loss, rel=.02)
    assert summary["top1"] == pytest.approx(top1, abs=100 / len(files) + 1e-3)  # one may lie on the edge
    assert summary["top5"] == 100  # of three classes


def test_checkpoint_of_the_average(run):
    folder, _, name = run
    state = torch.load(folder / "last.pth.tar", weights_only=True)
    assert state["arch"] == name
    assert state["epoch"] == 1
    assert state["classes"] == list(COLOURS)
    assert ("state_dict_ema" in state) == (name == "test_vit")


def test_same_seed_same_run(data, tmp_path):
    for name in "ab":
        train.main(argv(data, tmp_path / name, "--epochs", "1"))
    first, second = (rows(tmp_path / name / "run")[0] for name in "ab")
    assert {**first, "images_per_second": 0} == {**second, "images_per_second": 0}


def test_amp_and_compile(data, tmp_path):
    more = ["--amp", "--amp-dtype", "bfloat16", "--torchcompile", "eager", "--epochs", "1"]
    train.main(argv(data, tmp_path, *more))
    timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(tmp_path / "run" / "last.pth.tar"))


def test_no_lumix_is_timms_soft_cross_entropy():
    args = train.parse_args(["--data-dir", ".", "--no-lumix", "--smoothing", ".2"])
    criterion = train.build_criterion(args)
    torch.manual_seed(0)
    logits, labels, partner = torch.randn(16, 7), torch.randint(7, (16,)), torch.randint(7, (16,))
    target = MixTarget(labels, partner, torch.rand(16), torch.zeros(16, 4, dtype=torch.int32),
                       torch.full((16,), 2, dtype=torch.int32))
    expected = SoftTargetCrossEntropy()(logits, target.dense(7, .2))
    torch.testing.assert_close(criterion(logits, target), expected)


def test_flags_reach_the_loss():
    criterion = train.build_criterion(train.parse_args([
        "--data-dir", ".", "--r-r", ".3", "--r-s", ".2", "--eta", ".5", "--noise", "normal", "0", "1",
        "--attach-lam-s", "--apply-to", "all", "--bce-loss", "--bce-sum"]))
    assert (criterion.r_r, criterion.r_s, criterion.eta) == (.3, .2, .5)
    assert criterion.noise == ("normal", 0., 1.)
    assert (criterion.detach_lam_s, criterion.apply_to) == (False, "all")
    assert (criterion.base, criterion.bce_reduction) == ("bce", "sum")


@pytest.mark.parametrize(("flags", "expected"), [
    ([], .05), (["--lr", ".3"], .3), (["--opt", "adamw"], .1 * .5 ** .5),
    (["--lr-base-scale", "sqrt"], .1 * .5 ** .5),
])
def test_learning_rate_scales_as_timms(flags, expected):
    assert train.parse_args(["--data-dir", ".", "-b", "128", *flags]).lr == pytest.approx(expected)


def test_checkpoint_history(tmp_path):
    args = train.parse_args(["--data-dir", ".", "--checkpoint-hist", "2", "--eval-metric", "loss"])
    history = []
    for epoch, loss in enumerate([3., 1., 2., 1.]):
        train.save_checkpoint(tmp_path, {"epoch": epoch, "metric": loss}, history, args)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint-1.pth.tar", "checkpoint-3.pth.tar", "last.pth.tar", "model_best.pth.tar"]
    assert torch.load(tmp_path / "last.pth.tar")["epoch"] == 3
    assert torch.load(tmp_path / "model_best.pth.tar")["epoch"] == 1  # the earlier of two equals


@pytest.mark.parametrize(("flags", "message"), [
    (["--noise", "beta", "two"], "--noise beta two: give beta ALPHA"),
    (["--cutmix", "0"], "--cutmix 0 leaves LUMix no sample"),
    (["--epochs", "0"], "--epochs 0: give at least 1"),
])
def test_bad_command_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--data-dir", ".", *flags])
    assert message in capsys.readouterr().err


def test_several_ranks_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.parse_args(["--data-dir", "."])
    assert "several ranks are not supported yet" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (["--num-classes", "2"], "more classes than the model has"),
    (["--batch-size", "100"], "batch_size=100: 99 samples"),
    (["--val-split", "nowhere"], "no folder .*nowhere"),
    (["--r-r", ".9", "--r-s", ".2"], "r_r=0.9 and r_s=0.2"),
    (["--noise", "cauchy"], "noise="),
    (["--mixup-mode", "pair"], "mode="),
    (["--mixup-prob", "1.5"], "prob="),
    (["--sched", "zigzag"], "zigzag"),
])
def test_bad_value(flags, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(argv(data, tmp_path, *flags))
    assert not list(tmp_path.iterdir())


def test_folders_that_differ(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 8})
    write_folder(data, {"val": 2}, classes=["blue", "red"])
    with pytest.raises(ValueError, match=r"differ in the classes .*green"):
        train.main(argv(data, tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(data, tmp_path):
    with pytest.raises(ValueError, match="cuda:0"):
        train.main(argv(data, tmp_path, "--device", "cuda:0"))
