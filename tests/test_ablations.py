"""The ablations: paired rows, hand-worked statistics, and a run that resumes where it was stopped."""

import json
from functools import partial

import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("scipy")
torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from benchmarks import accuracy, paired  # noqa: E402
from experiments import ablations, training  # noqa: E402
from experiments.labels import LabelWeights  # noqa: E402
from experiments.tables import PLAIN, TABLES, Row  # noqa: E402
from experiments.training import Training, subset  # noqa: E402
from lumix_dali import LUMixLoss, MixTarget  # noqa: E402
from tests.images import write  # noqa: E402

LIGHT = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    "img_size=16",
    "patch_size=4",
    "embed_dim=8",
    "depth=1",
    "num_heads=1",
    "--batch-size",
    "4",
    "--epochs",
    "2",
]


@pytest.fixture(autouse=True, scope="module")
def _short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "measure_speed", partial(ablations.measure_speed, rounds=1, steps=1))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of noise, red and blue, eight training and four validation images each."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, colour in enumerate(([200, 0, 0], [0, 0, 200])):
            for number in range(count):
                write(rng.integers(0, 50, (16, 16, 3)) + colour, root / split / str(label) / f"{number}.png")
    return root


def arguments(folder, out, *more, table=2):
    return ablations.parse_args(
        [
            "--table",
            str(table),
            "--data",
            str(folder),
            "--out",
            str(out),
            "--device",
            "cpu",
            "--images-per-class",
            "4",
            "--seeds",
            "2",
            *LIGHT,
            *more,
        ]
    )


# --- comparisons


@pytest.mark.parametrize(
    "method", ["cutmix", "mixup", "resizemix", "patch mixup", "saliencymix", "puzzlemix", "shuffled"]
)
def test_rows_of_a_seed_share_weights_order_and_crops(folder, tmp_path, method):
    if method == "saliencymix":
        pytest.importorskip("cv2")
    args = arguments(folder, tmp_path / "x.json", "--scale", ".3", ".6", "--hflip", ".5", "--patch", "8")
    plain, mixed = (Training(args, Row("", None, PLAIN, name), seed=3, epochs=2) for name in ("none", method))
    for one, other in zip(plain.model.parameters(), mixed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for _ in range(3):
        (images, target), (changed, mixed_target) = plain.batch(), mixed.batch()
        assert torch.equal(target.labels, mixed_target.labels)
        if method in ("cutmix", "resizemix", "saliencymix"):  # outside the box nothing changes
            for image, after, (y0, x0, y1, x1) in zip(images, changed, mixed_target.box, strict=True):
                after[y0:y1, x0:x1] = image[y0:y1, x0:x1]
            assert torch.equal(images, changed)


def test_rows_from_files_share_weights_order_and_crops(folder, tmp_path):
    args = arguments(folder, tmp_path / "x.json", "--scale", ".3", ".6", "--hflip", ".5", "--stream", "files")
    plain, mixed = (Training(args, Row("", None, PLAIN, name), seed=3, epochs=2) for name in ("none", "cutmix"))
    for one, other in zip(plain.model.parameters(), mixed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert plain.steps == mixed.steps == 2
    for _ in range(5):  # more than two epochs
        (images, target), (changed, mixed_target) = plain.batch(), mixed.batch()
        assert images.shape == (4, 16, 16, 3) and torch.equal(target.labels, mixed_target.labels)
        assert not torch.equal(images, changed)
        for image, after, (y0, x0, y1, x1) in zip(images, changed, mixed_target.box, strict=True):
            after[y0:y1, x0:x1] = image[y0:y1, x0:x1]
        assert torch.equal(images, changed)
    with pytest.raises(ValueError, match="--stream files: the loader has no resizemix"):
        Training(args, Row("", None, PLAIN, "resizemix"), seed=3, epochs=2)


def test_rows_that_differ_only_in_the_loss_see_the_same_batches(folder, tmp_path):
    args, rows = arguments(folder, tmp_path / "x.json"), TABLES["2"]
    one, other = Training(args, rows[0], 1, 2), Training(args, rows[-1], 1, 2)
    for _ in range(3):
        (images, target), (images2, target2) = one.batch(), other.batch()
        assert torch.equal(images, images2) and all(map(torch.equal, target, target2))
    assert not torch.equal(Training(args, rows[0], 2, 2).batch()[0], images)


def test_each_seed_has_its_own_images_of_each_class():
    labels = np.repeat([0, 1, 2], 50)
    chosen = subset(labels, 4, 0)
    np.testing.assert_array_equal(labels[chosen], np.repeat([0, 1, 2], 4))
    assert len(set(chosen)) == 12 and set(chosen) != set(subset(labels, 4, 1))
    np.testing.assert_array_equal(chosen, subset(labels, 4, 0))
    np.testing.assert_array_equal(subset(labels, 0, 0), np.arange(150))
    with pytest.raises(ValueError, match="--images-per-class 51: a class has 50"):
        subset(labels, 51, 0)


# --- statistics


def runs(*values):
    """The last epoch counts; the one before was better."""
    return [dict(seed=seed, top1=[99.0 + seed % 2, value]) for seed, value in enumerate(values)]


def test_statistics_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1; t(.975, 2) = 4.302653, so the half width is 4.302653 / √3 = 2.484138.

    t = 2√3 = 3.464102, and with two degrees of freedom p = 1 - t / √(t² + 2) = .074180.
    """
    assert paired.moments([91.0, 94.0, 97.0]) == (3, 94.0, 3.0, pytest.approx(3 / 3**0.5))
    found = paired.difference(runs(91.0, 94.0, 97.0), runs(90.0, 92.0, 94.0))
    assert found[:2] == (3, 2.0)
    assert found.interval == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-6)
    assert found.p == pytest.approx(1 - 2 * 3**0.5 / 14**0.5, abs=1e-9)


def test_holm_by_hand():
    """Sorted .01, .02, .04 times 3, 2, 1 are .03, .04, .04; .7 stays above .6, and both are 1 at most."""
    corrected = paired.holm([0.04, 0.01, None, 0.02])
    assert corrected.pop(2) is None
    assert corrected == pytest.approx([0.04, 0.03, 0.04])
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0]
    assert paired.holm([0.02, 0.0201]) == pytest.approx([0.04, 0.04])


# --- measurements


def test_label_weights_by_hand():
    """λ_s = σ(z_a - z_b); λ = .5·λ0 + .4·λ_r + .1·λ_s; the second, -.24, is clamped; the third is not mixed."""
    target = MixTarget(
        torch.tensor([0, 1, 0]),
        torch.tensor([1, 0, 1]),
        torch.tensor([0.2, 0.5, 0.0]),
        torch.tensor([[0, 0, 2, 4], [0, 0, 4, 5], [0, 0, 0, 0]], dtype=torch.int32),
        torch.tensor([2, 2, 0], dtype=torch.int32),
        torch.tensor([1, 0, 1]),
    )
    logits = torch.tensor([[0.0, np.log(3)], [0.0, 0.0], [0.0, 9.0]])
    weights = LabelWeights()
    weights.add(LUMixLoss(0.4, 0.1), logits, target, torch.tensor([0.5, -1.35, 0.0]))
    found = weights.summary()
    lam = [0.5 * 0.2 + 0.4 * 0.5 + 0.1 * 0.75, 0]
    assert found["lam_s_mean"] == pytest.approx((0.75 + 0.5) / 2, abs=1e-5)
    assert found["lam0_mean"] == pytest.approx(0.35) and found["lam_mean"] == pytest.approx(sum(lam) / 2)
    assert found["lam_q50"] == pytest.approx(sum(lam) / 2)
    assert found["lam_q25"] == pytest.approx(lam[0] / 4, abs=1e-5)
    assert found["moved"] == pytest.approx((lam[0] - 0.2 + 0.5) / 2, abs=1e-5) and found["clamped"] == 0.5
    weights.add(LUMixLoss(0.4, 0.1), logits, target._replace(kind=target.kind * 0), None)
    assert weights.summary() == {}


def test_validation_by_hand(folder, tmp_path):
    """Logits of ±l on eight images, six of them correct: p = σ(2l), all in one bin."""
    training = Training(arguments(folder, tmp_path / "x.json"), TABLES["2"][0], 0, 1)
    logits = torch.where(torch.from_numpy(training.val.labels)[:, None] == torch.arange(2), 1.0, -1.0)
    logits[[0, 7]] *= -1
    training.logits = lambda images: logits
    p = 1 / (1 + np.exp(-2))
    assert training.validate() == pytest.approx(
        dict(top1=75.0, nll=-(6 * np.log(p) + 2 * np.log(1 - p)) / 8, ece=100 * (p - 0.75))
    )


# --- a run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run."""
    return ablations.run(arguments(folder, tmp_path_factory.mktemp("whole") / "x.json"), "none")


def accuracies(result):
    return {row["name"]: [(run["seed"], run["top1"]) for run in row["runs"]] for row in result["rows"]}


def test_a_stopped_run_resumes(folder, tmp_path, monkeypatch, whole):
    args, real, calls = arguments(folder, tmp_path / "x.json"), training.train, []

    def stops(*task):
        calls.append((task[1].name, task[2]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*task)

    monkeypatch.setattr(ablations, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        ablations.run(args, "none")
    partial = json.loads((tmp_path / "x.json").read_text())
    assert not partial["complete"] and sum(len(row["runs"]) for row in partial["rows"]) == 3
    assert len(accuracy.table(partial)) == 6  # a partial result can be inspected

    result = ablations.run(args, "none")
    assert result["complete"] and calls[3:] == [calls[3], *calls[4:]] and len(calls) == 11
    assert len(set(calls)) == 10  # finished work is not repeated
    assert result == json.loads((tmp_path / "x.json").read_text())
    assert accuracies(result) == accuracies(whole)
    assert ablations.run(args, "none") == result and len(calls) == 11


@pytest.mark.parametrize(
    ("more", "named"), [(["--lr", "1e-4"], "lr was 0.002 and is 0.0001"), (["--seeds", "3"], "seeds was 2 and is 3")]
)
def test_a_different_run_is_refused(folder, tmp_path, whole, more, named):
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=named):
        ablations.run(arguments(folder, tmp_path / "x.json", *more), "none")


@pytest.mark.slow
def test_seeds_side_by_side_and_a_time_limit(folder, tmp_path, whole):
    args = arguments(folder, tmp_path / "x.json", "--jobs", "2")
    assert accuracies(ablations.run(args, "none")) == accuracies(whole)
    args = arguments(folder, tmp_path / "y.json", "--jobs", "2")
    args.epochs, args.minutes = None, 1e-6
    assert ablations.run(args, "none")["epochs"] == 1
