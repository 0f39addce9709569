"""The two pipelines match timm's transforms, and images stay on the GPU once they are there.

Evaluation is compared with timm's transform on 100 photographs: pieces of odd sizes and aspects from
scikit-learn's two. The training crop is read off the delivered pixels of an image whose red is the column and
whose green is the row, and compared with thousands of draws of timm's `get_params`.
"""

import random
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import SmallFeed
from images import ramps, write
from nvidia.dali import types
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from lumix_dali.loading import pipelines
from lumix_dali.loading.plan import unpack
from lumix_dali.mixing import Mixing

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TRANSFORMS = {pipelines.train_pipeline: pipelines.TrainTransform, pipelines.val_pipeline: pipelines.EvalTransform}


def run(define, files, device="cpu", batch_size=None, steps=1, seed=0, **options):
    """The outputs of `steps` batches in NumPy; the files are read repeatedly and labelled by their position."""
    batch_size, transform = batch_size or len(files), TRANSFORMS[define](**options)
    feed = SmallFeed(files, transform.size, training=define is pipelines.train_pipeline, batch_sizes=(batch_size,))
    pipe = define(
        feed,
        transform,
        batch_size=batch_size,
        num_threads=2,
        device_id=0 if device == "gpu" else None,
        seed=seed,
        prefetch_queue_depth=1,
    )
    batches = []
    for _ in range(steps):
        images, *outputs = (torch.tensor(np.array(output.as_cpu().as_array())) for output in pipe.run())
        target, index = unpack(outputs, feed.plan.training)
        assert torch.equal(index, target[0] if feed.plan.training else target)
        batches.append([images, *(target if feed.plan.training else [target])])
    return [torch.cat(parts).numpy() for parts in zip(*batches, strict=True)]


# Evaluation


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """{file: image}: 100 pieces of two photographs, JPEG and PNG, mostly of odd sizes, down to 50 pixels."""
    load_sample_images = pytest.importorskip("sklearn.datasets").load_sample_images
    root, rng, images = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0), {}
    originals = load_sample_images().images
    for number in range(100):
        photograph = originals[number % 2]
        full = np.array(photograph.shape[:2])
        height, width = full if number < 2 else rng.integers([50, 50], [250, 280])
        y, x = rng.integers(0, full - [height, width] + 1)
        file = root / (f"{number:03}.jpg" if number % 4 < 2 else f"{number:03}.png")
        options = {"quality": 90} if number % 4 < 2 else {"compress_level": 1}
        write(photograph[y : y + height, x : x + width], file, **options)
        images[file] = Image.open(file)
        images[file].load()
    assert len({image.size for image in images.values()}) > 90
    return images


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((96, 96), {}),
        ((63, 63), {"crop_pct": 1.0}),
        ((72, 105), {"crop_pct": 0.95}),
        ((72, 105), {"crop_mode": "squash"}),
    ],
    ids=["square", "small", "non-square", "squash"],
)
@pytest.mark.parametrize("interpolation", get_args(pipelines.Interpolation))
def test_evaluation_matches_timms_within_three_tenths_of_a_grey_level(photographs, interpolation, size, options):
    ours, labels = run(
        pipelines.val_pipeline, [*photographs], size=size, interpolation=interpolation, mean=MEAN, std=STD, **options
    )
    transform = create_transform((3, *size), interpolation=interpolation, mean=MEAN, std=STD, **options)
    theirs = torch.stack([*map(transform, photographs.values())]).numpy()
    assert ours.shape == theirs.shape
    levels = np.abs(ours - theirs) * 255 * np.reshape(STD, (3, 1, 1))
    assert levels.mean((1, 2, 3)).max() < 0.3
    np.testing.assert_array_equal(labels, np.arange(100))


@pytest.mark.gpu
def test_evaluation_on_the_gpu_is_close_to_the_cpus(photographs):
    lossless = [file for file in photographs if file.suffix == ".png"]
    ours, theirs = (
        run(pipelines.val_pipeline, lossless, device, dtype="uint8")[0].astype(int) for device in ("gpu", "cpu")
    )
    assert np.abs(ours - theirs).mean((1, 2, 3)).max() < 0.3


# Output of both pipelines


PIPELINES = {"train": pipelines.train_pipeline, "val": pipelines.val_pipeline}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", get_args(pipelines.DType))
@pytest.mark.parametrize("name", PIPELINES)
def test_output(tmp_path, device, name, dtype, channels_last):
    """The grey levels are the same in each dtype and layout; labels and the outputs after them keep their types."""
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        write(ramps(40 + number, 50 - number) * 5, file)
    options = {"size": (24, 30), "mean": MEAN, "std": STD}
    levels = run(PIPELINES[name], files, device, dtype="uint8", **options)[0]
    images, *target = run(PIPELINES[name], files, device, dtype=dtype, channels_last=channels_last, **options)
    assert images.dtype == dtype
    assert images.shape == ((3, 24, 30, 3) if channels_last else (3, 3, 24, 30))
    images = images.transpose(0, 3, 1, 2) if channels_last else images
    expected = levels
    if dtype != "uint8":
        expected = (levels / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(images, expected, atol={"uint8": 0, "float32": 1e-5, "float16": 4e-3}[dtype])
    assert levels.std() > 30
    dtypes = [np.int64, np.int64, np.float32, np.int32, np.int32, np.int64] if name == "train" else [np.int64]
    assert [field.dtype for field in target] == dtypes
    np.testing.assert_array_equal(target[0], range(3))
    if name == "train":
        assert not any(field.any() for field in target[2:5])


# The training crop


def crops(tmp_path, size, count, seed, **options):
    """int [count, 4]: (y, x, height, width) of each crop, to a pixel, and whether it was mirrored."""
    file = tmp_path / "ramps.ppm"
    write(ramps(*size) * 2, file)
    images, *_ = run(
        pipelines.train_pipeline,
        [file],
        batch_size=200,
        steps=count // 200,
        seed=seed,
        size=(64, 64),
        interpolation="bilinear",
        dtype="uint8",
        **options,
    )
    middle = np.arange(6, 58)  # edges are blurred differently by each
    rows, columns = images[:, 1].mean(2)[:, middle] / 2, images[:, 0].mean(1)[:, middle] / 2
    slope = (middle - middle.mean()) / ((middle - middle.mean()) ** 2).sum()
    lengths = np.stack([rows @ slope, columns @ slope], 1) * 64
    flipped, lengths = lengths[:, 1] < 0, abs(lengths)
    # a crop's mean is that of its first and last pixel: (start + start + length - 1) / 2
    starts = np.stack([rows.mean(1), columns.mean(1)], 1) - (lengths - 1) / 2
    assert (starts > -1).all()
    assert (starts + lengths < np.add(size, 1)).all()
    return np.concatenate([starts, lengths], 1).round().astype(int), flipped


def timms_crops(size, count, seed, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    random.seed(seed)
    image = Image.new("RGB", size[::-1])
    return np.array([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)])


def assert_same_law(ours, theirs, size):
    """Areas, aspect ratios, and where in the available space each crop lies."""
    from scipy import stats  # not at the top: this file's GPU tests do not need it

    def features(crop):
        starts, lengths = crop[:, :2], crop[:, 2:]
        return [lengths.prod(1), lengths[:, 1] / lengths[:, 0], *((starts + 0.5) / (size - lengths + 1)).T]

    for our, their in zip(features(ours), features(theirs), strict=True):
        assert stats.ks_2samp(our, their).pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "options", "seed"),
    [
        ((100, 125), {}, 1),
        ((100, 125), {}, 2),
        ((100, 125), {}, 3),
        ((126, 63), {}, 1),  # large draws do not fit and are drawn again
        ((100, 125), {"scale": (0.4, 0.6), "ratio": (1 / 2, 1.0)}, 1),
    ],
)
def test_the_training_crop_follows_timms_distribution(tmp_path, size, options, seed):
    from scipy import stats

    ours, flipped = crops(tmp_path, size, 2000, seed, hflip=0.3, **options)
    assert_same_law(ours, timms_crops(size, 10000, seed, **options), size)
    assert stats.binomtest(int(flipped.sum()), len(flipped), 0.3).pvalue > 1e-3


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_always_and_never_flipped(tmp_path, hflip):
    _, flipped = crops(tmp_path, (60, 60), 200, 0, hflip=hflip)
    assert (flipped == hflip).all()


def test_random_interpolation_picks_one_of_two_per_sample(tmp_path):
    from scipy import stats

    write(np.random.default_rng(0).integers(0, 256, (60, 60, 3)), tmp_path / "noise.png")
    options = {"size": (48, 48), "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "dtype": "uint8"}
    images = {
        name: run(pipelines.train_pipeline, [tmp_path / "noise.png"], batch_size=400, interpolation=name, **options)[0]
        for name in get_args(pipelines.TrainInterpolation)
    }
    cubic, linear = ((images["random"] == images[name]).all((1, 2, 3)) for name in ("bicubic", "bilinear"))
    assert (cubic ^ linear).all()
    assert stats.binomtest(int(cubic.sum()), 400, 0.5).pvalue > 1e-3


def test_what_auto_augment_turns_off_and_what_it_fills(tmp_path, monkeypatch):
    """timm's rule: no colour jitter with it; warps are filled with the mean and interpolate like the crop."""
    write(np.zeros((40, 40, 3)), tmp_path / "black.png")
    calls = []
    for name in ("rand_augment", "color_jitter"):
        monkeypatch.setattr(
            pipelines.augment, name, lambda images, *a, name=name, **k: calls.append((name, a, k)) or images
        )
    options = {"color_jitter": 0.4, "mean": (0.485, 0.456, 0.406)}
    for spec in (None, "rand-m9"):
        run(pipelines.train_pipeline, [tmp_path / "black.png"], auto_augment=spec, **options)
    (first, _, _), (second, arguments, keywords) = calls
    assert (first, second, arguments) == ("color_jitter", "rand_augment", ("rand-m9",))
    assert keywords == {"fill": [124, 116, 104], "interpolation": types.INTERP_CUBIC, "size": (224, 224)}


@pytest.mark.parametrize("size", [(20, 126), (126, 20), (8, 126)], ids=["wide", "tall", "wider than any crop"])
def test_the_training_crop_of_a_long_image(tmp_path, size):
    """If ten draws do not fit, both take the short side and 4/3 of it: timm at the centre, DALI anywhere."""
    from scipy import stats

    ours, theirs = crops(tmp_path, size, 2000, 1)[0], timms_crops(size, 10000, 1)
    short, long = sorted(size)
    axis, ratio = size.index(long), 4 / 3
    side, timms_side = int(short * ratio), round(short * ratio)  # DALI truncates, timm rounds
    given_up = ours[ours[:, 2 + axis] == side, axis]
    timms_given_up = (theirs[:, 2 + axis] == timms_side) & (theirs[:, axis] == (long - timms_side) // 2)
    assert stats.chisquare(np.bincount(given_up, minlength=long - side + 1)).pvalue > 1e-3
    if short == 8:
        assert len(given_up) == len(ours)
        assert timms_given_up.mean() > 0.9  # a draw may just fit by rounding
    else:
        assert len(given_up) / len(ours) == pytest.approx(timms_given_up.mean(), abs=0.03)
        fit, timms_fit = (crop[crop[:, 3 - axis] < short] for crop in (ours, theirs))
        assert_same_law(fit, timms_fit, size)


# The GPU graph, defined without a GPU


def gpu_graph(define, mixing=None, **options):
    transform = TRANSFORMS[define](**options)
    mixing = mixing and Mixing(**mixing)
    feed = SmallFeed(None, transform.size, mixing, training=define is pipelines.train_pipeline)
    pipe = define(feed, transform, batch_size=4, num_threads=2, device_id=0, seed=0)
    pipe._build_graph()
    return pipe


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", {}),
        ("train", {"mixing": {"cutmix_alpha": 1.0}}),
        ("train", {"mixing": {"cutmix_alpha": 1.0, "mixup_alpha": 0.8, "prob": 0.5}, "dtype": "float16"}),
        ("train", {"mixing": {"cutmix_minmax": (0.2, 0.8), "mode": "batch"}, "channels_last": True}),
        ("train", {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "mixing": {"cutmix_alpha": 1.0}}),
        ("train", {"color_jitter": (0.4, 0.4, 0.4, 0.1), "grayscale_prob": 0.1, "re_prob": 0.25, "re_mode": "rand"}),
        ("train", {"interpolation": "random", "re_prob": 0.25, "re_mode": "const", "re_count": 2}),
        ("val", {}),
        ("val", {"size": (96, 128), "dtype": "uint8"}),
        ("val", {"crop_mode": "squash"}),
    ],
)
def test_decoded_images_stay_on_the_gpu(name, options):
    pipe = gpu_graph(PIPELINES[name], **options)
    assert {node.device for node in pipe._graph_outputs} == {"gpu"}
    kinds = {operator: type(operator._op).__name__ for operator in pipe._ops}
    (decoder,) = (operator for operator, kind in kinds.items() if kind in ("Image", "ImageSlice"))
    assert decoder._op.device == "mixed"
    images = {node.name for node in decoder.outputs}
    for operator in pipe._ops:  # an operator comes after those whose outputs it uses
        takes = {node.name: node.device for node in operator.inputs if node.name in images}
        if not takes or kinds[operator] == "_Shape":  # an image's shape is metadata and on the host anyway
            continue
        assert operator._op.device == "gpu", kinds[operator]
        assert set(takes.values()) == {"gpu"}, kinds[operator]
        images |= {node.name for node in operator.outputs}
    assert pipe._graph_outputs[0].name in images
    assert not images & {node.name for node in pipe._graph_outputs[1:]}
