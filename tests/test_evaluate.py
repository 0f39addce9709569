"""The evaluation protocols, end to end on small data sets of each layout, against independent loops."""

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, jaccard_score
from timm.data import ImageNetInfo

from lumix_dali import create_loader
from pipelines import evaluate, evaluation, metrics, protocols, train

pytestmark = pytest.mark.usefixtures("one_thread")
WNIDS = ImageNetInfo().label_names()
MEAN = STD = (0.5, 0.5, 0.5)  # those of timm's test models
SIZE = 64
ROOT = Path(__file__).parents[1]


def picture(rng, path, size=(70, 90)):
    """Coloured blocks, so that both colour and position matter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    blocks.resize(size[::-1], Image.Resampling.NEAREST).save(path)


def vit(seed=0, size=SIZE, **options):
    """A small ViT whose predictions depend on the image; a fresh one predicts the same for all images."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", img_size=size, **options)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data *= 30 if name == "head.weight" else 4
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(vit().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, checkpoint):
    """DIR/val/WNID/IMAGE.png; an image's class is the model's prediction."""
    root, model, rng = tmp_path_factory.mktemp("imagenet"), loaded(checkpoint), np.random.default_rng(0)
    for number in range(24):
        picture(rng, root / "new" / "x" / f"ILSVRC2012_val_{number:08}.png", (70 + number % 3, 90))
    images = pixels(root / "new")
    for number, guess in enumerate(logits(model, images).argmax(1).tolist()):
        name = f"ILSVRC2012_val_{number:08}.png"
        (root / "val" / WNIDS[guess]).mkdir(parents=True, exist_ok=True)
        shutil.move(root / "new" / "x" / name, root / "val" / WNIDS[guess] / name)
    shutil.rmtree(root / "new")
    assert len(list((root / "val").iterdir())) > 3 and not (root / "val" / WNIDS[0]).exists()
    return root


def loaded(checkpoint):
    return timm.create_model("test_vit", img_size=SIZE, checkpoint_path=str(checkpoint)).eval()


def pixels(folder, labels=False, **options):
    """uint8 images of a folder, in order, as the protocols resize and crop them."""
    options = dict(crop_pct=0.875, interpolation="bilinear", input_size=SIZE) | options
    options |= dict(batch_size=1000, is_training=False, device="cpu", dtype="uint8")
    with create_loader(folder, **options) as loader:
        images, numbers = next(iter(loader))
    names = [WNIDS.index(name) for name in loader.classes] if labels else []
    return (images, torch.tensor(names)[numbers]) if labels else images


def normalised(images):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images / 255 - mean) / std


@torch.inference_mode()
def logits(model, images):
    return model(normalised(images))


def attention_of(model, images):
    """The last block's attention from the class token to the patches, by its formula: [B, 2 heads, 4, 4]."""
    kept = []
    handle = model.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits(model, images)
    handle.remove()
    query, key, _ = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in kept[0].chunk(3, 2))
    weight = (query[:, :, :1] @ key.transpose(2, 3) / key.shape[3] ** 0.5).softmax(3)[:, :, 0, 1:]
    return weight.unflatten(2, (4, 4))


def argv(protocol, data, checkpoint, *more):
    return [
        protocol,
        "--data-dir",
        str(data),
        "--checkpoint",
        str(checkpoint),
        "--model",
        "test_vit",
        "--model-kwargs",
        f"img_size={SIZE}",
        "--img-size",
        str(SIZE),
        "--device",
        "cpu",
        "-j",
        "2",
        "-b",
        "10",
        *map(str, more),
    ]


def values(result):
    return {(row["curve"], row["name"]): row["values"] for row in result["rows"]}


def top1(model, images, labels):
    return 100 * (logits(model, images).argmax(1) == labels).double().mean().item()


def test_top1_by_the_names_of_the_folders(imagenet, checkpoint):
    """The folders are a subset of the model's classes, so their indices differ from the outputs'."""
    _, labels = pixels(imagenet / "val", labels=True)
    bilinear = evaluate.main(argv("top1", imagenet, checkpoint, "--interpolation", "bilinear"))
    assert values(bilinear) == {("", "top-1"): [100.0]}  # the labels are the predictions
    bicubic = pixels(imagenet / "val", interpolation="bicubic")
    assert values(evaluate.main(argv("top1", imagenet / "val", checkpoint))) == {
        ("", "top-1"): [pytest.approx(top1(loaded(checkpoint), bicubic, labels))]
    }


@pytest.mark.parametrize("perm", ["batch", "sample"])
def test_shuffle(imagenet, checkpoint, perm):
    command = argv("shuffle", imagenet, checkpoint, "--perm", perm, "--seeds", 2, "--seed", 5)
    result = values(evaluate.main(command))
    images, labels = pixels(imagenet / "val", labels=True)
    model, expected = loaded(checkpoint), {1: [100.0]}
    for seed in (5, 6):
        generator = torch.Generator().manual_seed(seed)
        right = dict.fromkeys((1, 4, 8, 16, 32, 64), 0)
        for batch, guess in zip(images.split(10), labels.split(10), strict=True):
            for rows, columns in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)):
                n = rows * columns
                if n == 1 and seed != 5:  # nothing is drawn if nothing can change
                    continue
                draw = torch.rand(len(batch) if perm == "sample" else 1, n, generator=generator).argsort(1)
                changed = batch.clone()
                for b in range(len(batch)):
                    lines = batch[b].split(SIZE // rows, 1)
                    cells = [cell for line in lines for cell in line.split(SIZE // columns, 2)]
                    chosen = [cells[i] for i in draw[b if perm == "sample" else 0]]
                    lines = [torch.cat(chosen[r * columns : (r + 1) * columns], 2) for r in range(rows)]
                    changed[b] = torch.cat(lines, 1)
                right[n] += (logits(model, changed).argmax(1) == guess).sum().item()
        for n in (4, 8, 16, 32, 64):
            expected.setdefault(n, []).append(100 * right[n] / len(images))
    expected["average"] = [(100 + sum(expected[n][seed] for n in (4, 8, 16, 32, 64))) / 6 for seed in (0, 1)]
    assert result == {("shuffled", name): pytest.approx(numbers) for name, numbers in expected.items()}
    assert min(map(min, expected.values())) < 100


def test_occlusion(imagenet, checkpoint, tmp_path):
    dino = vit(seed=1, size=160, num_classes=0)  # DINO's own size; the images are smaller
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    resampled = vit(num_classes=0)
    resampled.load_state_dict(dino.state_dict() | {"pos_embed": resample(dino.pos_embed.data, 10, 4)})
    losses = (0, 30, 90)
    result = values(
        evaluate.main(
            argv(
                "occlusion",
                imagenet,
                checkpoint,
                "--dino-model",
                "test_vit",
                "--dino-checkpoint",
                tmp_path / "dino.pth",
                "--drop-grid",
                "8x8",
                "--losses",
                *losses,
                "--seeds",
                2,
            )
        )
    )
    images, labels = pixels(imagenet / "val", labels=True)
    model, share = loaded(checkpoint), attention_of(resampled, images)[:, 1].double()
    share = share / share.sum((1, 2), keepdim=True)

    def accuracy(dropped):
        return top1(model, images * ~dropped.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None], labels)

    weaker = torch.stack(
        [(share * (share <= share[:, y, x, None, None])).sum((1, 2)) for y in range(4) for x in range(4)], 1
    ).view(-1, 4, 4)
    for loss in losses:
        # as in the public code: the cells above 1 - mass of the cumulative attention
        assert result["salient", loss] == [pytest.approx(accuracy(weaker > 1 + 1e-9 - loss / 100))]
        assert result["non-salient", loss] == [pytest.approx(accuracy(weaker <= loss / 100))]
    assert result["random", 0] == [100.0]
    assert len(result["random", 30]) == 2
    for mode in ("random", "salient", "non-salient"):
        assert result[mode, "average"][0] == pytest.approx(np.mean([result[mode, loss][0] for loss in losses]))
    assert result["random", 90][0] < 100


def resample(embedding, before, after):
    """Resamples a position embedding to another grid, as the public code does."""
    plane = embedding[:, 1:].transpose(1, 2).unflatten(2, (before, before))
    plane = torch.nn.functional.interpolate(plane, scale_factor=after / before, mode="bicubic")
    return torch.cat([embedding[:, :1], plane.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("perm", ["batch", "sample"])
def test_randomly_dropped_patches(imagenet, checkpoint, perm, monkeypatch):
    """196 * i // 10 of the 14 x 14 cells are black, the others unchanged; one draw per batch or per image."""
    seen, drop = [], metrics.drop_cells

    def spy(images, dropped):
        seen.append((images, drop(images, dropped)))
        return seen[-1][1]

    monkeypatch.setattr(metrics, "drop_cells", spy)
    evaluate.main(
        argv(
            "occlusion",
            imagenet,
            checkpoint,
            "--img-size",
            112,
            "--drop",
            "random",
            "--perm",
            perm,
            "--seeds",
            1,
            "--losses",
            0,
            10,
            50,
            90,
        )
    )
    for number, (before, after) in enumerate(seen):
        black = (after == 0).unflatten(2, (14, 8)).unflatten(4, (14, 8)).all(1).all(4).all(2)
        assert black.flatten(1).sum(1).tolist() == [196 * (0, 1, 5, 9)[number % 4] // 10] * len(before)
        kept = ~black.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(before)
        assert torch.equal(before[kept], after[kept])
        if number % 4:
            assert (black == black[0]).all() == (perm == "batch")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """ImageNet-A's 200 folders, also used for -O, and validation images of these and of other classes."""
    root, rng = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(1)
    names = [WNIDS[number] for number in rng.choice(1000, 200, replace=False)]
    for name in names:
        picture(rng, root / "set" / name / "a.png")
        picture(rng, root / "val" / name / "b.png")
    for name in sorted(set(WNIDS) - set(names))[:3]:
        picture(rng, root / "val" / name / "c.png")
    return root


def test_imagenet_a(benchmarks, checkpoint):
    result = values(evaluate.main(argv("imagenet-a", benchmarks / "set", checkpoint, "--bin-size", 30)))
    images, labels = pixels(benchmarks / "set", labels=True)
    classes = sorted(set(labels.tolist()))
    scores = logits(loaded(checkpoint), images).double().numpy()[:, classes]
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    right = share.argmax(1) == [classes.index(label) for label in labels.tolist()]
    order = np.argsort(share.max(1))
    bins = [order[i * 30 : (i + 1) * 30 if i < 5 else None] for i in range(6)]
    terms = [len(b) / 200 * (share.max(1)[b].mean() - right[b].mean()) ** 2 for b in bins]
    rate = [right[order[::-1][:k]].mean() for k in range(1, 201)]
    assert result == {
        ("", "top-1"): [pytest.approx(100 * right.mean())],
        ("", "calibration error"): [pytest.approx(100 * sum(terms[:-1]) ** 0.5, rel=1e-4)],
        ("", "calibration error, last bin too"): [pytest.approx(100 * sum(terms) ** 0.5, rel=1e-4)],
        ("", "AURRA"): [pytest.approx(100 * np.mean(rate), rel=1e-4)],
    }


def test_imagenet_o(benchmarks, checkpoint):
    command = argv("imagenet-o", benchmarks / "set", checkpoint, "--val-dir", benchmarks / "val")
    result = values(evaluate.main(command))
    outside, classes = pixels(benchmarks / "set", labels=True)
    inside, others = pixels(benchmarks / "val", labels=True)
    inside = inside[torch.isin(others, classes)]
    assert len(inside) == 200
    score = [
        -logits(loaded(checkpoint), images)[:, sorted(classes.tolist())].softmax(1).amax(1)
        for images in (outside, inside)
    ]
    expected = average_precision_score([1] * 200 + [0] * 200, torch.cat(score).numpy())
    assert result == {("", "AUPR"): [pytest.approx(100 * expected, rel=1e-4)]}


def test_the_imagenet_a_classes_are_timms(benchmarks, checkpoint, tmp_path):
    """With ImageNet-A's real folders the outputs are those in timm's list."""
    import pkgutil

    synsets, indices = (
        pkgutil.get_data("timm.data", f"_info/imagenet_a_{what}.txt").decode().split()
        for what in ("synsets", "indices")
    )
    for name in synsets:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").symlink_to(next((benchmarks / "set").glob("*/a.png")))
    subject = evaluation.build_subject(evaluate.parse_args(argv("imagenet-a", tmp_path, checkpoint)))
    samples, outputs = protocols.subset(subject)
    assert outputs == list(map(int, indices))
    assert list(samples.classes) == synsets and samples.labels.tolist() == list(range(200))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """PASCAL VOC's layout; masks are palette images with background 0, classes, and void 255."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(2)
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for name in ("2007_000033", "2007_000042", "2007_000061"):
        picture(rng, base / "JPEGImages" / f"{name}.jpg")
        blocks = Image.fromarray(rng.choice(np.uint8([0, 5, 15, 255]), (5, 6)), mode="P")
        blocks.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        blocks.resize((90, 70), Image.Resampling.NEAREST).save(base / "SegmentationClass" / f"{name}.png")
    (base / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n2007_000061\n2007_000042\n")
    return root


def test_wsas(voc, checkpoint):
    result = values(evaluate.main(argv("wsas", voc, checkpoint, "--mass", ".6")))
    base = voc / "VOCdevkit" / "VOC2012"
    scores = {False: [], True: []}
    (voc / "list.txt").write_text("".join(f"{path} 0\n" for path in sorted((base / "JPEGImages").iterdir())))
    images = pixels(voc / "list.txt", crop_mode="squash", crop_pct=1.0)
    for weight, path in zip(
        attention_of(loaded(checkpoint), images), sorted((base / "JPEGImages").iterdir()), strict=True
    ):
        truth = Image.open(base / "SegmentationClass" / f"{path.stem}.png")
        assert truth.mode == "P"
        truth = np.array(truth)[nearest(70)][:, nearest(90)]
        masks = [np.kron(fewest(head, 0.6), np.ones((16, 16))).astype(bool) for head in weight.double().numpy()]
        for ignore in scores:
            seen = truth != 255 if ignore else np.ones_like(truth, bool)
            best = [
                max(jaccard_score((truth == c)[seen], mask[seen]) for mask in masks)
                for c in set(truth.flatten()) - {0, 255}
            ]
            scores[ignore].append(np.mean(best))
    assert result == {
        ("", "Jaccard index"): [pytest.approx(100 * np.mean(scores[False]))],
        ("", "Jaccard index, void left out"): [pytest.approx(100 * np.mean(scores[True]))],
    }


def nearest(side):
    """Index of the one of `side` pixels under the centre of each of SIZE pixels."""
    return np.floor((np.arange(SIZE) + 0.5) * side / SIZE).astype(int)


def fewest(attention, mass):
    """The strongest cells that together hold `mass`."""
    taken, held = np.zeros(attention.shape), 0.0
    for cell in np.argsort(-attention, axis=None):
        if held < mass * attention.sum():
            taken.flat[cell] = 1
        held += attention.flat[cell]
    return taken


def test_wsas_at_512(voc, checkpoint):
    """The default: 512 x 512, 32 x 32 patches, whose position embedding is resampled without antialiasing."""
    command = argv("wsas", voc, checkpoint)
    place = command.index("--img-size")
    subject = evaluation.build_subject(evaluate.parse_args(command[:place] + command[place + 2 :]))
    assert subject.size == (512, 512) and subject.model.patch_embed.grid_size == (32, 32)
    expected = resample(vit().pos_embed.data, 4, 32)
    assert torch.allclose(subject.model.pos_embed.data, expected, atol=1e-6)


OBJECT = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.mark.parametrize(
    ("flags", "reduce", "join"),
    [
        ([], lambda weight: weight.mean(0), max),
        (["--head", "max", "--component", "all", "--boxes-per-image", "mean"], lambda weight: weight.max(0), np.mean),
        (["--head", "1", "--component", "all"], lambda weight: weight[1], max),
    ],
)
def test_wsol(imagenet, checkpoint, tmp_path, flags, reduce, join):
    rng, folder = np.random.default_rng(3), tmp_path / "annotations" / "val"
    folder.mkdir(parents=True)
    boxes = {}
    for path in (imagenet / "val").rglob("*.png"):
        corners = np.sort(rng.integers(0, 64, (rng.integers(1, 4), 2, 2)), 1)
        corners[:, 1] += 2
        boxes[path.stem] = corners.reshape(-1, 4).tolist()
        objects = "".join(OBJECT.format(*box) for box in boxes[path.stem])
        # some annotations have a wrong size
        (folder / f"{path.stem}.xml").write_text(f"<a><size><width>1</width></size>{objects}</a>")
    result = values(evaluate.main(argv("wsol", imagenet, checkpoint, "--boxes", tmp_path, "--mass", ".5", *flags)))
    scores = []
    paths = sorted((imagenet / "val").rglob("*.png"))
    images = pixels(imagenet / "val", crop_mode="squash", crop_pct=1.0)
    for weight, path in zip(attention_of(loaded(checkpoint), images), paths, strict=True):
        mask = fewest(reduce(weight.double().numpy()), 0.5)
        cells = set(zip(*np.nonzero(mask), strict=True)) if "all" in flags else largest(mask)
        top, left = map(min, zip(*cells, strict=True))
        bottom, right = map(max, zip(*cells, strict=True))
        width, height = Image.open(path).size
        box = (left * width / 4, top * height / 4, (right + 1) * width / 4, (bottom + 1) * height / 4)
        scores.append(join([iou(box, truth) for truth in boxes[path.stem]]))
    assert result == {("", "box IoU"): [pytest.approx(100 * np.mean(scores))]}


def largest(mask):
    """The cells of the largest component, by a flood fill from every cell."""
    best = set()
    for start in zip(*np.nonzero(mask), strict=True):
        reached, edge = {start}, [start]
        while edge:
            y, x = edge.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near not in reached and min(near) >= 0 and max(near) < 4 and mask[near]:
                    reached.add(near)
                    edge.append(near)
        best = reached if len(reached) > len(best) else best
    return best


def iou(a, b):
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def run(request, tmp_path_factory):
    """A run of pipelines.train with custom input size, crop and classes: its checkpoint, data, summary, model."""
    root, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(4)
    for split, count in {"train": 8, "val": 9}.items():
        for name in ("2", "10", "cat"):  # in the order of the outputs; alphabetically 10 comes first
            for number in range(count):
                picture(rng, root / "data" / split / name / f"{number}.png")
    summary = train.main(
        [
            "--data-dir",
            str(root / "data"),
            "--output",
            str(root),
            "--experiment",
            "run",
            "--model",
            request.param,
            "--img-size",
            "48",
            "--crop-pct",
            ".7",
            "--mean",
            ".4",
            ".5",
            ".6",
            "-b",
            "8",
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--opt",
            "adamw",
            "--lr",
            "1e-3",
            "--device",
            "cpu",
            "--workers",
            "2",
            "--model-ema",
            "--model-ema-decay",
            ".5",
        ]
    )
    return root / "run" / "last.pth.tar", root / "data", summary, request.param


def test_a_checkpoint_is_evaluated_as_it_was_validated(run, tmp_path):
    """The model, classes, average of the weights and input size all come from the file."""
    checkpoint, data, summary, model = run
    result = evaluate.main(
        [
            "top1",
            "--data-dir",
            str(data),
            "--checkpoint",
            str(checkpoint),
            "--device",
            "cpu",
            "-j",
            "2",
            "--out",
            str(tmp_path / "new" / "result.json"),
        ]
    )
    assert values(result) == {("", "top-1"): [pytest.approx(summary["top1"])]}
    assert result["model"] == model and result["input"]["crop_pct"] == 0.7
    assert result["input"]["input_size"] == (3, 48, 48) and result["input"]["mean"] == (0.4, 0.5, 0.6)
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"]))
    assert written["meta"]["command"].startswith("python -m pipelines.evaluate top1 --data-dir")
    assert written["meta"]["versions"]["timm"] == timm.__version__ and "commit" in written["meta"]


@pytest.mark.parametrize(("protocol", "size", "crop_pct"), [("shuffle", 48, 0.875), ("wsas", 512, 0.875)])
def test_protocols_keep_their_own_input(run, protocol, size, crop_pct):
    """A run's checkpoint sets size, mean and std, but not the crop nor, for wsas, the size."""
    command = [protocol, "--data-dir", "x", "--checkpoint", str(run[0]), "--device", "cpu"]
    data = evaluation.build_subject(evaluate.parse_args(command)).data
    assert data["input_size"] == (3, size, size) and data["crop_pct"] == crop_pct and data["mean"] == (0.4, 0.5, 0.6)
    assert data["interpolation"] == "bilinear"


def test_folders_are_identified_by_name(run, tmp_path):
    """If only one class is left, its label is still that class's output."""
    checkpoint, data, summary, _ = run
    accuracy = {}
    for name in ("2", "10", "cat"):
        shutil.copytree(data / "val" / name, tmp_path / name / name)
        result = evaluate.main(
            ["top1", "--data-dir", str(tmp_path / name), "--checkpoint", str(checkpoint), "--device", "cpu", "-j", "2"]
        )
        accuracy[name] = values(result)["", "top-1"][0]
    assert sum(accuracy.values()) / 3 == pytest.approx(summary["top1"])


@pytest.mark.parametrize("protocol", ["shuffle", "imagenet-a"])
def test_figure_and_table(protocol, imagenet, benchmarks, checkpoint, tmp_path, capsys):
    data = {"shuffle": imagenet, "imagenet-a": benchmarks / "set"}[protocol]
    evaluate.main(argv(protocol, data, checkpoint, "--figure", tmp_path / "figure.png"))
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("images of 64x64 pixels, bilinear, crop_pct 0.875")
    assert ("shuffled 1 differs from top1 where that has another crop" in lines[1]) == (protocol == "shuffle")
    row = {"shuffle": "shuffled 8 ", "imagenet-a": "AURRA"}[protocol]
    paper = {"shuffle": ["73.3", "73.6"], "imagenet-a": ["23.8", "27.4"]}[protocol]
    assert next(line for line in lines if line.startswith(row)).split()[-2:] == paper
    drawn = np.array(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10


def test_an_average_over_other_points_is_not_the_papers(imagenet, checkpoint):
    result = evaluate.main(argv("shuffle", imagenet, checkpoint, "--grids", "1x1", "2x2"))
    assert [row["paper"] for row in result["rows"]] == [(79.9, 80.5), (75.6, 76.3), None]


def test_missing_parts(imagenet, benchmarks, checkpoint, tmp_path):
    for command, message in (
        (argv("imagenet-a", imagenet, checkpoint), "--data-dir .* class folders, 'n.*' first.*200 folders"),
        (argv("imagenet-o", benchmarks / "set", checkpoint), "--val-dir None"),
        (argv("imagenet-o", benchmarks / "set", checkpoint, "--val-dir", imagenet), "--val-dir .*lacks .* class"),
        (argv("wsol", imagenet, checkpoint), "--boxes None: no ILSVRC2012_val_.*xml.*bbox_val_v3.tgz"),
        (
            argv("shuffle", imagenet, checkpoint, "--grids", "3x3"),
            "--grids 3x3: .* not divide images of 64x64.*such as --grids 2x2",
        ),
        (argv("occlusion", imagenet, checkpoint, "--drop", "random"), "--drop-grid 14x14.*such as --drop-grid 8x8"),
        (argv("shuffle", imagenet, tmp_path / "no.pth"), "--checkpoint .*no.pth: no such file"),
        (argv("shuffle", imagenet, checkpoint, "--num-classes", 5), "--checkpoint .*does not fit test_vit"),
        (argv("shuffle", imagenet, checkpoint, "--model", "vitt"), "--model vitt: timm knows no such model"),
        (argv("shuffle", imagenet, checkpoint, "--device", "cuda:99"), "--device cuda:99"),
        (argv("wsas", imagenet, checkpoint), "--data-dir .*VOCdevkit"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(command)


def test_a_model_without_class_token(voc, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    command = argv("wsas", voc, tmp_path / "resnet.pth", "--model", "test_resnet")
    place = command.index("--model-kwargs")
    with pytest.raises(ValueError, match=r"resnet: it has no attention from a class token.*deit"):
        evaluate.main(command[:place] + command[place + 2 :])


def test_unavailable_weights(imagenet, checkpoint, monkeypatch):
    """As if there were no network, for the model and for DINO."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"vit_small_patch16_224.dino: timm could not.*--dino-checkpoint FILE"):
        evaluate.main(argv("occlusion", imagenet, checkpoint, "--drop", "salient"))
    with pytest.raises(ValueError, match=r"deit_small.*timm could not.*--checkpoint FILE"):
        evaluate.main(["top1", "--data-dir", str(imagenet), "--model", "deit_small_patch16_224", "--pretrained"])


class Answers:
    """A hub on the loopback interface that drops every request and counts them."""

    def __enter__(self):
        self.asked, self.socket = 0, socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def serve(self):
        with contextlib.suppress(OSError):  # the server was closed
            while True:
                connection, _ = self.socket.accept()
                self.asked += 1
                connection.close()

    def __exit__(self, *_):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(60)


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that does not answer, and an empty cache."""
    import huggingface_hub.constants as hub

    with Answers() as server:
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "ENDPOINT", url)
        monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
    assert hub.HF_HUB_OFFLINE is False


def test_a_silent_hub_is_asked_once(silent_hub, imagenet, checkpoint):
    """The hub's own client asks six times for each of two files, which takes almost a minute."""
    with pytest.raises(ValueError, match=r"vit_small_patch16_224.dino: timm could not.*--dino-checkpoint FILE"):
        evaluate.main(argv("occlusion", imagenet, checkpoint, "--drop", "salient"))
    assert silent_hub.asked == 1


def test_weights_in_the_cache_need_no_hub(silent_hub, tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    folder = tmp_path / "cache" / "models--timm--test_vit.r160_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    for directory in (snapshot, folder / "refs"):
        directory.mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(weights, snapshot / "model.safetensors")
    model = evaluation.build_model("test_vit.r160_in1k", None, "--checkpoint")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert silent_hub.asked == 1


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("sklearn", ["imagenet-o"]),
        ("scipy", ["wsol"]),
        ("matplotlib", ["top1", "--figure", "x.png"]),
    ],
)
def test_a_missing_package_is_named_before_the_work(package, arguments, monkeypatch):
    """The other commands do not need it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    rest = ["--data-dir", "no", "--checkpoint", "no.pth", "--model", "test_vit"]
    with pytest.raises(ValueError, match=rf"needs the package {package}; install it by pip install '\.\[demo\]'"):
        evaluate.main([*arguments, *rest])
    with pytest.raises(ValueError, match=r"--checkpoint no.pth: no such file"):
        evaluate.main(["top1", *rest])


@pytest.mark.parametrize("program", ["train", "evaluate", "segment", "demo"])
def test_help_imports_nothing_heavy(program):
    """So that help and wrong flags answer at once; what only some commands need is imported there."""
    code = (
        f"import sys\nfrom pipelines.{program} import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'timm', 'nvidia.dali', 'numpy', 'sklearn', 'matplotlib'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "" and "usage: python -m pipelines." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["top1", "--perm", "sample"], "--perm is for shuffle, occlusion: leave it out with top1"),
        (["shuffle", "--grids", "4"], "'4': give ROWSxCOLUMNS"),
        (["wsol", "--head", "first"], "--head first: give a number, mean or max"),
        (["occlusion", "--losses", "100"], "--losses 100: give percents"),
        (["top1", "--pretrained"], "give either --checkpoint FILE or --pretrained"),
    ],
)
def test_invalid_flags(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args([*arguments, "--data-dir", "x", "--checkpoint", "y"])
    assert message in capsys.readouterr().err


def test_a_damaged_image_ends_the_evaluation(imagenet, checkpoint, tmp_path):
    shutil.copytree(imagenet / "val", tmp_path / "val")
    bad = next((tmp_path / "val").rglob("*.png"))
    bad.write_bytes(bad.read_bytes()[:99])
    with pytest.raises(ValueError, match=bad.name):
        evaluate.main(argv("top1", tmp_path, checkpoint))
