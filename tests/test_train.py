"""The training program: what it writes, that its numbers are correct, and how it reports an invalid argument."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from timm.data import create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from lumix_dali import LUMixLoss, MixTarget
from pipelines import train, training

pytestmark = pytest.mark.usefixtures("one_thread")
# No mixing, and crops that are whole images.
NOISELESS = ["--cutmix", "0", "--no-lumix", "--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0"]
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_folder(root, counts, classes=COLOURS, size=None):
    """Noisy images around one colour per class, of several sizes unless one is given: root/SPLIT/CLASS/NUMBER.png."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = rng.normal(COLOURS[name], 70)
                shape = size or (36 + number % 5, 48 - number % 7)
                pixels = rng.normal(colour, 30, (*shape, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{number}.png")
    return root


def argv(data, output, *more):
    return [
        "--data-dir",
        str(data),
        "--output",
        str(output),
        "--experiment",
        "run",
        "--model",
        "test_resnet",
        "--img-size",
        "32",
        "-b",
        "8",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0",
        "--opt",
        "adamw",
        "--lr",
        "3e-3",
        "--device",
        "cpu",
        "--workers",
        "2",
        "--seed",
        "1",
        *more,
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), {"train": 33, "validation": 17})


@pytest.fixture(scope="module", params=["resnet", "vit"])
def run(request, data, tmp_path_factory):
    """A finished run: its folder, its summary, and the model's name."""
    output = tmp_path_factory.mktemp(request.param)
    more = {
        "resnet": ["--channels-last", "--clip-grad", "1", "--checkpoint-hist", "1"],
        "vit": [
            "--model",
            "test_vit",
            "--mixup",
            ".8",
            "--mixup-mode",
            "elem",
            "--mixup-off-epoch",
            "1",
            "--model-ema",
            "--model-ema-decay",
            ".9",
            "--bce-loss",
            "--drop-path",
            ".1",
        ],
    }[request.param]
    return output / "run", train.main(argv(data, output, *more)), f"test_{request.param}"


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_second_start_leaves_the_first_run_untouched(run, data):
    folder, *_ = run
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"it already holds a run \(.*last.pth.tar.*--resume.*--exp.*--overwrite"):
        train.main(argv(data, folder.parent))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_average_and_model_are_validated(run, data):
    """A checkpoint has both; the run reports the average's scores."""
    folder, _, name = run
    last = rows(folder)[-1]
    assert ("model_val_loss" in last) == (name == "test_vit")
    if name == "test_vit":
        state = torch.load(folder / "last.pth.tar", weights_only=True)
        for key, prefix in (("state_dict_ema", ""), ("state_dict", "model_")):
            torch.save({"state_dict": state[key]}, folder.parent / "one.pth.tar")
            loss, _ = recomputed(folder.parent, data, name, file="one.pth.tar", img_size=32)
            assert last[f"{prefix}val_loss"] == pytest.approx(loss, rel=0.02)


def test_files(run):
    folder, summary, name = run
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert yaml.safe_load((folder / "args.yaml").read_text())["model"] == name
    with open(folder / "summary.csv") as file:
        table = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
    assert table == rows(folder)
    assert [row["epoch"] for row in table] == [0, 1]
    assert not list(folder.glob("tmp*"))
    assert len(list(folder.glob("checkpoint-*.pth.tar"))) == (name == "test_resnet")


def test_lam_is_logged(run):
    folder, _, name = run
    first, second = rows(folder)
    names = ("lumix_lam0", "lumix_lam_s", "lumix_lam")
    assert all(0.05 < first[key] < 0.95 for key in ("lam0_mean", *names))
    assert (second["lam0_mean"] == 0) == (name == "test_vit")  # --mixup-off-epoch 1
    assert all((second[key] is None) == (name == "test_vit") for key in names)  # no sample was counted


@pytest.mark.parametrize("apply_to", ["cutmix", "all"])
def test_lam_sums(apply_to):
    """Five samples: CutMix, a clamped one, Mixup, a box of the whole image, unmixed."""
    criterion = LUMixLoss(0.4, 0.1, noise=("normal", 0.0, 5.0), apply_to=apply_to)
    lam0 = torch.tensor([0.3, 0.6, 0.5, 1.0, 0.0])
    box = torch.tensor([[0, 0, 3, 3], [0, 0, 6, 6], [0, 0, 0, 0], [0, 0, 9, 9], [0, 0, 0, 0]], dtype=torch.int32)
    target = MixTarget(
        torch.zeros(5, dtype=torch.int64),
        torch.ones(5, dtype=torch.int64),
        lam0,
        box,
        torch.tensor([2, 2, 1, 2, 0], dtype=torch.int32),
        torch.zeros(5, dtype=torch.int64),
    )
    logits = torch.tensor([[0.0, np.log(3.0), 0.0]]).repeat(5, 1)  # λ_s = 3/4
    sums = training.lam_sums(criterion, logits, target, torch.tensor([0.5, 20.0, 0.5, 0.5, 0.5]))
    expected = [2.0, 0.9, 1.5, 0.5 * 0.3 + 0.4 * 0.5 + 0.1 * 0.75 + 1, 1.0]
    if apply_to == "all":
        expected = [
            a + b for a, b in zip(expected, [1.0, 0.5, 0.75, 0.5 * 0.5 + 0.4 * 0.5 + 0.1 * 0.75, 0.0], strict=True)
        ]
    assert sums.tolist() == pytest.approx(expected)


def test_the_log_shows_the_lam_of_the_loss(data, tmp_path, monkeypatch):
    """Every step is logged; the λ captured in the loss have the logged mean."""
    seen, weigh, lam_of = [], LUMixLoss._lam, LUMixLoss.lam

    def spy(self, *inputs):
        lam, active = weigh(self, *inputs)
        seen.append(lam[active])
        return lam, active

    def unseen(self, *inputs):  # calls for the log are not the loss's own
        with monkeypatch.context() as patch:
            patch.setattr(LUMixLoss, "_lam", weigh)
            return lam_of(self, *inputs)

    monkeypatch.setattr(LUMixLoss, "_lam", spy)
    monkeypatch.setattr(LUMixLoss, "lam", unseen)
    train.main(argv(data, tmp_path, "--epochs", "1", "--log-interval", "1", "--noise", "normal", "0", "1"))
    (row,), lam = rows(tmp_path / "run"), torch.cat(seen).double()
    assert row["lumix_lam"] == pytest.approx(lam.mean().item(), rel=1e-5)
    clamped = ((lam == 0) | (lam == 1)).double().mean().item()
    assert row["lumix_clamped"] == pytest.approx(clamped)
    assert 0.05 < clamped < 0.9


def test_ratios_warm_up(data, tmp_path, monkeypatch):
    seen, forward = [], LUMixLoss.forward

    def spy(self, *inputs):
        seen.append((self.r_r, self.r_s))
        return forward(self, *inputs)

    monkeypatch.setattr(LUMixLoss, "forward", spy)
    more = ["-b", "24", "--grad-accum-steps", "2", "--lumix-warmup-epochs", "1.5", "--r-r", ".6", "--r-s", ".3"]
    train.main(argv(data, tmp_path, *more))  # 4 batches, 2 updates an epoch
    shares = [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1]
    assert seen == [pytest.approx((0.6 * share, 0.3 * share)) for share in shares]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Without noise, four batches of 6 per update train like batches of 24; 72 of 75 images, and 3 updates."""
    data = write_folder(tmp_path / "data", {"train": 25, "val": 2}, size=(32, 32))
    plain = [
        "--model",
        "test_vit",
        *NOISELESS,
        "--opt",
        "sgd",
        "--lr",
        ".1",
        "--epochs",
        "1",
    ]
    for name, more in {"whole": ["-b", "24"], "parts": ["-b", "6", "--grad-accum-steps", "4"]}.items():
        train.main(argv(data, tmp_path / name, *plain, *more))
    whole, parts = (
        torch.load(tmp_path / name / "run" / "last.pth.tar", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["run"]["updates"] == parts["run"]["updates"] == 3
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=1e-4, atol=1e-5)


def test_an_incomplete_last_update(data, tmp_path):
    """12 batches in updates of 5 are three updates, the last of two batches."""
    train.main(argv(data, tmp_path, "--epochs", "1", "--grad-accum-steps", "5"))
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    assert state["run"]["updates"] == 3


@pytest.mark.parametrize("limit", ["2", "1"])
def test_damaged_files_are_counted(limit, tmp_path, capsys):
    data = write_folder(tmp_path / "data", {"train": 8, "val": 2})
    broken = [data / "train" / "red" / "3.png", data / "val" / "blue" / "1.png"]
    for file in broken:
        file.write_bytes(b"no image")
    more = ["--epochs", "1", "-b", "4", "--max-bad", limit]
    if limit == "1":
        (data / "train" / "red" / "4.png").write_bytes(b"no image")
        with pytest.warns(UserWarning, match="cannot be used"), pytest.raises(ValueError, match="max_bad > 1"):
            train.main(argv(data, tmp_path, *more))
        return
    with pytest.warns(UserWarning, match="cannot be used"):
        summary = train.main(argv(data, tmp_path, *more))
    out = capsys.readouterr().out
    assert summary["replaced"] == 2
    assert all(f"unreadable image, replaced: {str(file)!r}\n" in out for file in broken)


def recomputed(folder, data, name="test_resnet", split="validation", file="last.pth.tar", **size):
    """Loss and top-1 of a run's checkpoint, with timm's model, PIL and timm's transform."""
    checkpoint = str(folder / file)
    files = sorted((data / split).glob("*/*.png"))
    classes = sorted({file.parent.name for file in files})
    model = timm.create_model(name, num_classes=len(classes), checkpoint_path=checkpoint, **size).eval()
    transform = create_transform(**timm.data.resolve_data_config({"img_size": 32}, model=model))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    with torch.inference_mode():
        logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    one = 100 / len(files) + 1e-3  # one may lie on the decision boundary
    return loss, pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=one)


def test_summary_holds_for_the_saved_model(run, data):
    folder, summary, name = run
    loss, top1 = recomputed(folder, data, name, **({"img_size": 32} if name == "test_vit" else {}))
    assert summary["val_loss"] == pytest.approx(loss, rel=0.02)
    assert summary["top1"] == top1
    assert summary["top5"] == 100  # of three classes


def test_same_seed_same_run(data, tmp_path):
    for name in "ab":
        train.main(argv(data, tmp_path / name, "--epochs", "1"))
    first, second = (rows(tmp_path / name / "run")[0] for name in "ab")
    timings = {"images_per_second": 0, "data_wait": 0}
    assert first | timings == second | timings


@pytest.mark.slow
def test_amp_and_compile(data, tmp_path):
    more = ["--amp", "--amp-dtype", "bfloat16", "--torchcompile", "eager", "--epochs", "1"]
    train.main(argv(data, tmp_path, *more))
    timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(tmp_path / "run" / "last.pth.tar"))


def cutmix_batch():
    torch.manual_seed(0)
    logits, labels, partner = torch.randn(16, 7), torch.randint(7, (16,)), torch.randint(7, (16,))
    box, kind = torch.zeros(16, 4, dtype=torch.int32), torch.full((16,), 2, dtype=torch.int32)
    return logits, MixTarget(labels, partner, torch.rand(16), box, kind, torch.zeros(16, dtype=torch.int64))


def test_no_lumix_equals_timms_soft_cross_entropy():
    args = train.parse_args(["--data-dir", ".", "--no-lumix", "--smoothing", ".2"])
    criterion = training.build_criterion(args)
    logits, target = cutmix_batch()
    expected = SoftTargetCrossEntropy()(logits, target.dense(7, 0.2))
    torch.testing.assert_close(criterion(logits, target), expected)


@pytest.mark.parametrize(
    ("flags", "by_hand"),
    [
        (["--bce-target-thresh", ".2"], lambda z, y: F.softplus(z) - z * (y > 0.2)),
        (["--bce-pos-weight", "3"], lambda z, y: F.softplus(z) * (1 + 2 * y) - z * 3 * y),
    ],
)
def test_timms_own_bce(flags, by_hand):
    """Mean over batch and classes of -w·y·log σ(z) - (1 - y)·log(1 - σ(z))."""
    args = train.parse_args(["--data-dir", ".", "--bce-loss", "--no-lumix", "--smoothing", ".1", *flags])
    logits, target = cutmix_batch()
    loss = training.build_criterion(args)(logits, target)
    torch.testing.assert_close(loss, by_hand(logits, target.dense(7, 0.1)).mean())


def test_flags_reach_the_run(data, tmp_path, monkeypatch):
    """Their effect on timm's optimiser, schedule, average and model, as seen in the run."""
    decays, update, pieces = [], ModelEmaV3.update, []

    def spy(self, model, step):
        decays.append(self.get_decay(step))
        update(self, model, step)

    monkeypatch.setattr(ModelEmaV3, "update", spy)
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda run, *rest: (pieces.append(run), fit(run, *rest)))
    summary = train.main(
        argv(
            data,
            tmp_path,
            "--model",
            "test_vit",
            "--layer-decay",
            ".5",
            "--opt-kwargs",
            "amsgrad=True",
            "--cooldown-epochs",
            "1",
            "--val-interval",
            "2",
            "--save-epochs",
            "2",
            "--grad-checkpointing",
            "--model-ema",
            "--model-ema-warmup",
            "--no-aug",
            "--head-init-bias",
            "-3",
            "-b",
            "24",
        )
    )
    (run,), (first, second, third) = pieces, rows(tmp_path / "run")
    assert run.model.grad_checkpointing
    assert run.ema.module.head.bias.detach() == pytest.approx(np.full(3, -3.0), abs=0.1)
    groups = run.optimizer.param_groups
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.5**k for k in range(len(scales))} != {1.0}
    assert all(group["amsgrad"] for group in groups)
    assert decays == pytest.approx([0.0, *(1 - (1 + t) ** (-2 / 3) for t in range(1, 12))])
    assert (first["top1"], first["val_loss"]) == (None, None)
    assert None not in (second["top1"], third["top1"])
    assert (first["lr"] > second["lr"] > 0, third["lr"]) == (True, 0.0)  # cosine over two epochs, then its end
    assert summary["epochs"] == 3
    assert torch.load(tmp_path / "run" / "milestone-2.pth.tar", weights_only=True)["run"]["epoch"] == 2
    assert not list((tmp_path / "run").glob("milestone-1*"))


def test_no_aug_matches_timms(tmp_path):
    """For square images, within a mean difference of one grey level: DALI's resize against Pillow's."""
    data = write_folder(tmp_path / "data", {"train": 3, "val": 1}, size=(40, 40))
    args = train.parse_args(
        [
            "--data-dir",
            str(data),
            "-b",
            "3",
            "--no-aug",
            "--aa",
            "rand-m9",
            "--reprob",
            "1",
            "--cutmix",
            "0",
            "--no-lumix",
            "--device",
            "cpu",
        ]
    )
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic"}
    loader, _ = training.build_loaders(args, *training.load_data(args), plain | {"input_size": (3, 32, 32)})
    transform = create_transform(32, is_training=True, no_aug=True, **plain)
    files = sorted((data / "train").glob("*/*.png"))
    expected = torch.stack([transform(Image.open(file)) for file in files])
    found = torch.cat([images.clone() for images, _ in loader])
    distance = (found[:, None] - expected[None]).abs().mean((2, 3, 4)) * 255
    assert sorted(distance.argmin(1).tolist()) == list(range(9))
    assert distance.min(1).values.max() < 1


def test_each_epoch_has_its_image_size(data, tmp_path, monkeypatch):
    """timm's progressive schedule at its endpoints; a run resumed between epochs has the same rows."""
    sizes, flags = [], ["--train-img-sizes", "16", "32", "--train-size-schedule", "progressive"]
    flags += ["--train-size-schedule-spread", "0", "--train-size-random-mix", "0"]
    step = training.train_step

    def recorded(run, images, *more):
        sizes.append(tuple(images.shape[2:]))
        return step(run, images, *more)

    monkeypatch.setattr(training, "train_step", recorded)
    train.main(argv(data, tmp_path / "whole", *flags))
    assert sizes == [(16, 16)] * 12 + [(32, 32)] * 12
    train.main(argv(data, tmp_path / "parts", *flags, "--stop-epoch", "1"))
    train.main(argv(data, tmp_path / "parts", *flags, "--resume"))
    assert sizes == 2 * ([(16, 16)] * 12 + [(32, 32)] * 12)
    whole, parts = (rows(tmp_path / name / "run") for name in ("whole", "parts"))
    assert [row["val_loss"] for row in whole] == [row["val_loss"] for row in parts]


def test_sched_none(data, tmp_path):
    """The learning rate stays."""
    train.main(argv(data, tmp_path, "--sched", "none", "-b", "32"))
    assert [row["lr"] for row in rows(tmp_path / "run")] == [3e-3, 3e-3]


def test_warmup_prefix_adds_its_epochs(data, tmp_path):
    """As in timm: two epochs of schedule after one of warm-up."""
    train.main(argv(data, tmp_path, "--warmup-epochs", "1", "--warmup-prefix", "-b", "32"))
    assert [row["lr"] for row in rows(tmp_path / "run")] == pytest.approx([1e-5, 3e-3, 1.5e-3])


def test_the_data_folder_may_be_positional(data):
    assert train.parse_args([str(data), "--lr", "1"]).data_dir == str(data)
    assert train.parse_args([str(data), "--data-dir", "x", "--lr", "1"]).data_dir == "x"  # as in timm


@pytest.mark.slow
def test_an_error_is_one_line(data, tmp_path):
    """The program prints an error where its functions raise an exception."""
    command = [sys.executable, "-m", "pipelines.train", *argv(data, tmp_path, "--opt", "adamm")]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("python -m pipelines.train: --opt adamm: ")


def test_flags_reach_the_loss():
    criterion = training.build_criterion(
        train.parse_args(
            [
                "--data-dir",
                ".",
                "--r-r",
                ".3",
                "--r-s",
                ".2",
                "--eta",
                ".5",
                "--noise",
                "normal",
                "0",
                "1",
                "--attach-lam-s",
                "--apply-to",
                "all",
                "--bce-loss",
                "--bce-sum",
            ]
        )
    )
    assert (criterion.r_r, criterion.r_s, criterion.eta) == (0.3, 0.2, 0.5)
    assert criterion.noise == ("normal", 0.0, 1.0)
    assert (criterion.detach_lam_s, criterion.apply_to) == (False, "all")
    assert (criterion.base, criterion.bce_reduction) == ("bce", "sum")


def test_augmentation_flags_reach_the_training_loader(data, tmp_path):
    flags = [
        "--aa",
        "rand-m9-mstd0.5-inc1",
        "--color-jitter",
        ".4",
        "--reprob",
        ".25",
        "--remode",
        "rand",
        "--recount",
        "2",
        "--aug-repeats",
        "3",
        "--train-interpolation",
        "random",
        "--color-jitter-prob",
        ".7",
        "--grayscale-prob",
        ".2",
    ]
    config = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 0.9}
    (tmp_path / "config.yaml").write_text("color_jitter: 0.4\n")
    loaders = []
    for given in (flags, [], ["--color-jitter", ".1", ".2", ".3", ".05"], ["-c", str(tmp_path / "config.yaml")]):
        args = train.parse_args(["--data-dir", str(data), "-b", "4", *given])
        loaders.append(training.build_loaders(args, *training.load_data(args), config))
    (ours, validation), (plain, _), (jittered, _), (configured, _) = loaders
    wanted = {
        "auto_augment": flags[1],
        "color_jitter": (0.4, 0.4, 0.4, 0.0),
        "color_jitter_prob": 0.7,
        "re_prob": 0.25,
        "grayscale_prob": 0.2,
        "re_mode": "rand",
        "re_count": 2,
        "interpolation": "random",
    }
    assert {key: getattr(ours._transform, key) for key in wanted} == wanted
    assert (ours._order.repeats, plain._order.repeats) == (3, 0)
    assert validation._transform.interpolation == plain._transform.interpolation == "bilinear"
    assert (plain._transform.auto_augment, plain._transform.color_jitter, plain._transform.re_prob) == (None, None, 0)
    assert jittered._transform.color_jitter == (0.1, 0.2, 0.3, 0.05)
    assert jittered._transform.color_jitter_prob == 1
    assert configured._transform.color_jitter == (0.4, 0.4, 0.4, 0.0)


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ([], 1, 0.05),
        (["--lr", ".3"], 8, 0.3),
        (["--opt", "adamw"], 1, 0.1 * 0.5**0.5),
        (["--lr-base-scale", "sqrt"], 1, 0.1 * 0.5**0.5),
        ([], 8, 0.4),
        (["--grad-accum-steps", "4"], 2, 0.4),
    ],
)
def test_learning_rate_scales_as_in_timm(flags, world_size, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert train.parse_args(["--data-dir", ".", "-b", "128", *flags]).lr == pytest.approx(expected)


def test_checkpoint_history(tmp_path, monkeypatch):
    args = train.parse_args(["--data-dir", ".", "--checkpoint-hist", "2", "--eval-metric", "loss"])
    run = SimpleNamespace(folder=tmp_path, rows=[])

    def save(run, args, *names):
        for name in (*names, "last"):
            (tmp_path / f"{name}.pth.tar").write_text(str(run.rows[-1]["epoch"]))

    monkeypatch.setattr(training, "save", save)
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 1.0]):
        run.rows.append({"epoch": epoch, "val_loss": loss})
        training.save_epoch(run, args)
    found = {file.name.removesuffix(".pth.tar"): file.read_text() for file in tmp_path.glob("*.pth.tar")}
    assert found == {
        "checkpoint-1": "1",
        "checkpoint-3": "3",
        "last": "3",
        "model_best": "1",
    }  # the earlier of two equal scores


def test_config_gives_defaults(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        "data_dir: there\nlr: 1e-3\nscale: [.5, 1.]\nnoise: [normal, 0, 2]\nmodel_ema: true\n"
        "new_flag: 0.25\nbn_eps: null\noutput: ''\ncolor_jitter: 0.4\nreprob: 0.25\n"
        "pin_mem: true\nvflip: 0\nrecovery_interval: 7\n"
    )
    args = train.parse_args(["--config", str(config), "--r-r", ".2"])
    assert (args.data_dir, args.lr, args.scale, args.r_r) == ("there", 0.001, [0.5, 1.0], 0.2)
    assert (args.noise, args.model_ema) == (("normal", 0.0, 2.0), True)
    assert args.output == "runs"  # timm's "" is its default
    assert (args.color_jitter, args.reprob) == ([0.4], 0.25)
    assert args.checkpoint_interval == 7
    err = capsys.readouterr().err
    assert "ignored unknown flags: new_flag=0.25\n" in err
    assert "--pin-mem has no effect here" in err
    assert "vflip" not in err
    assert train.parse_args(["-c", str(config), "--lr", "2", "--data-dir", "here"]).lr == 2


def test_args_of_a_run_are_a_config(run):
    folder, *_ = run
    config = folder / "args.yaml"
    args = vars(train.parse_args(["--config", str(config)]))
    once = {
        "config": str(config),
        "rank": 0,
        "world_size": 1,
        "resume": None,
        "overwrite": False,
        "stop_epoch": None,
    }
    expected = json.loads(json.dumps(yaml.safe_load(config.read_text()) | once))
    assert json.loads(json.dumps(args)) == expected


@pytest.mark.parametrize(
    "line",
    [
        "no_lumix: 'false'",
        "eval_metric: foo",
        "epochs: 1.5",
        "lr: fast",
        "scale: [.5]",
    ],
)
def test_a_config_value_that_its_flag_would_refuse(line, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(line + "\n")
    with pytest.raises(SystemExit):
        train.parse_args(["--data-dir", ".", "--config", str(config)])
    assert f"--config {config}: {line.partition(':')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("- a", "holds a list"),
        ("a: [", "while parsing"),
        ("vflip: 0.5", "--vflip: the loader flips horizontally only"),
    ],
)
def test_bad_config(text, message, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit):
        train.parse_args(["--data-dir", ".", "--config", str(config)])
    assert f"--config {config}" in (err := capsys.readouterr().err)
    assert message in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise", "beta", "two"], "--noise beta two: give beta ALPHA"),
        (["--cutmix", "0"], "--cutmix 0 leaves LUMix no sample"),
        (["--resume"], "--resume: name the run"),
        (["--seed", "-1"], "--seed -1: give at least 0"),
        (["--batch-size", "0"], "--batch-size 0: give at least 1"),
        (["--resume", "x", "--overwrite"], "--overwrite replaces a run"),
        (["--bce-loss", "--bce-target-thresh", ".2"], "without LUMix: give --bce-loss --no-lumix too"),
        (["--sched", "plateau", "--val-interval", "2"], "--val-interval 2: --sched plateau needs"),
        (["--vflip", ".5", "--kd-model-name", "resnet50"], "--vflip: the loader flips horizontally only; --kd-model"),
        (["--wandb-resume-id", "x"], "--wandb-resume-id continues a W&B run"),
    ],
)
def test_bad_command_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--data-dir", ".", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-classes", "2"], "more classes than the model has"),
        (["--batch-size", "100"], "batch_size=100: 99 samples"),
        (["--val-split", "nowhere"], "no folder .*nowhere"),
        (["--sched", "zigzag"], "--sched zigzag"),
        (["--model", "test_resnett"], "--model test_resnett: Unknown model .*; is it test_resnet"),
        (["--initial-checkpoint", "nowhere"], "--initial-checkpoint nowhere: no such file"),
        (["--opt", "adamm"], "--opt adamm: .*; is it adam"),
        (["--torchcompile", "nonsense"], "--torchcompile nonsense: "),
        (["--mixup-prob", "2"], "--mixup-prob: prob="),
        (["--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
    ],
)
def test_bad_value(flags, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(argv(data, tmp_path, *flags))
    assert not list(tmp_path.iterdir())


def test_validation_labels_are_those_of_the_training_classes(tmp_path):
    """A class that validation lacks shifts no label; one that training lacks is named."""
    data = write_folder(tmp_path / "data", {"train": 8})
    write_folder(data, {"val": 2}, classes=["green", "red"])
    train_data, val_data = training.load_data(training_args(data))
    assert list(val_data.classes) == list(train_data.classes) == ["blue", "green", "red"]
    assert sorted(set(val_data.labels.tolist())) == [1, 2]
    (data / "val" / "red").rename(data / "val" / "grey")
    with pytest.raises(ValueError, match="grey"):
        training.load_data(training_args(data))


def training_args(data):
    return train.parse_args(["--data-dir", str(data)])
