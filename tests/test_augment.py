"""Augmentation matches timm's: each operation at each level, the distribution of the draws, and the erased regions.

The operations are compared on pieces of photographs with timm's own `AugmentOp` of the same magnitude and sign,
through the whole graph: only the outcome of `random.choice` is given. Tested with timm 1.0.31.
"""

import random
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timms
from timm.data import random_erasing
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional as torchvisions

from lumix_dali import augment

SPEC = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
NAMES = list(augment.OPERATIONS)
EXACT = ("Invert", "Posterize", "Solarize", "SolarizeAdd")
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def run(define, batch_size, device="cpu", seed=0, steps=1, **inputs):
    """The outputs of `define(**nodes)` for `steps` batches in NumPy; inputs are [steps·B, …] arrays or lists."""
    device_id = 0 if device == "gpu" else None

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=device_id, seed=seed, prefetch_queue_depth=1)
    def graph():
        nodes = {name: fn.external_source(name=name, layout="HWC" * (name == "images")) for name in inputs}
        if device == "gpu" and "images" in nodes:
            nodes["images"] = nodes["images"].gpu()
        found = define(**nodes)
        return found if isinstance(found, tuple) else (found,)

    pipe, batches = graph(), []
    for step in range(steps):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        outputs = pipe.run(**{name: list(values[rows]) for name, values in inputs.items()})
        batches.append([np.array(output.as_cpu().as_array()) for output in outputs])
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


@pytest.fixture(scope="module")
def photographs():
    """uint8 [4, 90, 130, 3]: pieces of two photographs, one with little contrast."""
    first, second = load_sample_images().images
    dull = second[300:390, 40:170] // 4 + 90
    return np.stack([first[:90, :130], first[200:290, 300:430], second[150:240, 250:380], dull])


def drawing(monkeypatch, outcomes):
    """Makes `augment.draw` return these outcomes [layers] for every sample."""
    monkeypatch.setattr(augment.fn.random, "choice", lambda *_, **__: outcomes)


def ours(monkeypatch, images, outcomes, spec, device="cpu", **options):
    """Applies every row of `outcomes` [N, layers] to every image: uint8 [N, images, H, W, 3]."""

    def define(images, outcomes):
        with monkeypatch.context() as patch:
            drawing(patch, outcomes)
            return augment.rand_augment(images, spec, fill=FILL, **options)

    rows = np.repeat(np.int32(outcomes), len(images), axis=0)
    (found,) = run(define, len(rows), device, images=np.tile(images, (len(outcomes), 1, 1, 1)), outcomes=rows)
    return found.reshape(len(outcomes), *images.shape)


def outcome(name, sign=1):
    return 2 * NAMES.index(name) + (1 if sign > 0 else 2)


def timm_operation(monkeypatch, name, magnitude, sign=1, increasing=True, interpolation=Image.BILINEAR):
    known = timms._RAND_INCREASING_TRANSFORMS if increasing else timms._RAND_TRANSFORMS
    (full,) = {name, name + "Increasing"} & set(known)
    monkeypatch.setattr(timms, "_randomly_negate", lambda value: sign * value)
    return timms.AugmentOp(full, 1.0, magnitude, {"img_mean": FILL, "interpolation": interpolation})


def assert_close(name, found, wanted):
    if name in WARPS:
        wrong = np.abs(found.astype(int) - wanted)
        assert wrong.mean((1, 2, 3)).max() < 1.5
        return
    edge = slice(1, -1) if name == "Sharpness" else slice(None)  # Pillow leaves the outermost pixels unchanged
    wrong = np.abs(found.astype(int) - wanted)[:, edge, edge]
    # Pillow's Equalize counts in steps of a whole number of pixels, which shows in small images.
    most = {"Color": 2, "Equalize": 1 + 255 // (found[0, ..., 0].size // 255)}
    assert wrong.max() <= (0 if name in EXACT else most.get(name, 1))
    if name == "Color":  # where the grey levels of Pillow and OpenCV differ
        assert (wrong > 1).mean() < 1e-4


def test_the_operations_are_timms():
    for known in (timms._RAND_INCREASING_TRANSFORMS, timms._RAND_TRANSFORMS):
        assert {name.removesuffix("Increasing") for name in known} == set(NAMES)


@pytest.mark.parametrize(
    ("increasing", "magnitude", "interpolation"),
    [
        (True, 9, "LINEAR"),
        (True, 9, "CUBIC"),
        (True, 3, "LINEAR"),
        (False, 9, "LINEAR"),
        (False, 3, "LINEAR"),
    ],
)
def test_operations_match_timms(monkeypatch, device, photographs, increasing, magnitude, interpolation):
    pillows = {"LINEAR": Image.BILINEAR, "CUBIC": Image.BICUBIC}[interpolation]
    found = ours(
        monkeypatch,
        photographs,
        [[k] for k in range(31)],
        f"rand-m{magnitude}-n1-inc{int(increasing)}",
        device,
        interpolation=getattr(types, f"INTERP_{interpolation}"),
    )
    np.testing.assert_array_equal(found[0], photographs)
    for name in NAMES:
        for sign in (1, -1):
            operation = timm_operation(monkeypatch, name, magnitude, sign, increasing, pillows)
            wanted = np.stack([np.asarray(operation(Image.fromarray(image))) for image in photographs])
            assert_close(name, found[outcome(name, sign)], wanted)


@pytest.mark.parametrize(
    "operation",
    [
        partial(augment.rand_augment, spec="rand-m9-p1-n2-mstd0.5"),
        partial(augment.erase, prob=0.7, count=2),
        partial(augment.erase, prob=0.7, mode="rand"),
    ],
    ids=["rand_augment", "pixel", "rand"],
)
def test_a_known_size_changes_nothing(device, photographs, operation):
    images = np.tile(photographs, (16, 1, 1, 1))
    (read,), (known,) = (
        run(partial(operation, **size), 64, device, images=images) for size in ({}, {"size": images.shape[1:3]})
    )
    np.testing.assert_allclose(known.astype(int), read, atol=1)
    assert (known != read).mean() < 1e-3


def test_equalize_is_within_two_grey_levels_at_224(monkeypatch, device):
    images = np.stack([image[100:324, 150:374] for image in load_sample_images().images])
    (found,) = ours(monkeypatch, images, [[outcome("Equalize")]], "rand-n1", device)
    wanted = np.stack([np.asarray(timms.equalize(Image.fromarray(image))) for image in images])
    wrong = np.abs(found.astype(int) - wanted)
    assert wrong.max() <= 2
    assert wrong.mean() < 0.7


def test_layers_are_applied_in_order(monkeypatch, photographs):
    pairs = [(a, b) for a in EXACT for b in EXACT]
    found = ours(monkeypatch, photographs, [[outcome(name) for name in pair] for pair in pairs], "rand-m4-inc1")
    for pair, images in zip(pairs, found, strict=True):
        wanted = [Image.fromarray(image) for image in photographs]
        for name in pair:
            wanted = [timm_operation(monkeypatch, name, 4)(image) for image in wanted]
        np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in wanted]))


def test_no_bits_are_black(monkeypatch, photographs):
    """At the clipped magnitude of 10 timm asks Pillow for 0 bits: black in older versions, an error in Pillow 13."""
    assert not ours(monkeypatch, photographs, [[outcome("Posterize")]], "rand-m10-n1-inc1").any()


@pytest.mark.parametrize("increasing", [True, False])
def test_magnitudes_above_ten(monkeypatch, photographs, increasing):
    spec = f"rand-m14-n1-mmax15-inc{int(increasing)}"
    names = ["Brightness", "Solarize", "SolarizeAdd", "Rotate"]
    found = ours(monkeypatch, photographs, [[outcome(name, -1)] for name in names], spec)
    for name, images in zip(names, found, strict=True):
        operation = timm_operation(monkeypatch, name, 14, -1, increasing)
        operation.magnitude_max = 15
        wanted = np.stack([np.asarray(operation(Image.fromarray(image))) for image in photographs])
        assert_close(name, images, wanted)


def test_channels_without_contrast_are_unchanged(monkeypatch):
    images = np.full((1, 8, 8, 3), [7, 0, 255], np.uint8)
    names = ["AutoContrast", "Equalize"]
    for found in ours(monkeypatch, images, [[outcome(name)] for name in names], SPEC.replace("m9", "m9-n1")):
        np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_small_batches(photographs, count):
    """Branches that no sample takes are harmless."""
    images = np.tile(photographs, (2 * count, 1, 1, 1))[: 4 * count]
    (found,) = run(lambda images: augment.rand_augment(images, SPEC), count, steps=4, images=images)
    assert found.shape == images.shape
    assert found.dtype == np.uint8


# The distribution


def timms_draws(spec, count):
    """[(operation, magnitude)] of each of `count` images, as timm draws them."""
    drawn = []

    def note(name, magnitude, _):
        drawn[-1].append((name, magnitude))
        return ()

    policy = timms.rand_augment_transform(spec, {})
    for operation in policy.ops:
        operation.level_fn = partial(note, operation.name.removesuffix("Increasing"))
        operation.aug_fn = lambda image, **_: image
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  timm draws from NumPy's global generator
    for _ in range(count):
        drawn.append([])
        policy(None)
    return drawn


def our_draws(spec, count):
    """The same for our draws, and the share of negative signs."""
    policy = augment.parse(spec)
    outcomes, arguments = run(lambda: augment.draw(policy), count)
    table = augment.OPERATIONS if policy.increasing else augment.OPERATIONS | augment._NOT_INCREASING
    drawn, negative = [], []
    for row, values in zip(outcomes, arguments, strict=True):
        drawn.append([])
        for k, argument in zip(row, values, strict=True):
            if k:
                base, slope, signed = table[NAMES[(k - 1) // 2]]
                drawn[-1].append((NAMES[(k - 1) // 2], abs(argument - base) / abs(slope) if slope else None))
                negative += [argument < base] * signed
    return drawn, np.array(negative)


@pytest.mark.parametrize("spec", [SPEC, "rand-m7-n3-p0.3-mstd2", "rand-m5-mstd101-mmax4-inc1", "rand-m9-inc1"])
def test_draws_follow_timms_distribution(spec):
    count = 20000
    theirs, (mine, negative) = timms_draws(spec, count), our_draws(spec, count)
    lengths = [np.bincount([len(row) for row in drawn], minlength=4) for drawn in (theirs, mine)]
    names = [
        np.bincount([NAMES.index(name) for row in drawn for name, _ in row], minlength=15) for drawn in (theirs, mine)
    ]
    for table in (np.array(lengths), np.array(names)):
        assert stats.chi2_contingency(table[:, table.any(0)]).pvalue > 1e-3
    theirs, mine = (np.array([m for row in drawn for _, m in row if m is not None]) for drawn in (theirs, mine))
    assert stats.ks_2samp(theirs.round(4), mine.round(4)).pvalue > 1e-3
    assert stats.binomtest(int(negative.sum()), len(negative), 0.5).pvalue > 1e-3
    if spec == SPEC:
        assert (mine.round(4) == 10).mean() == pytest.approx(stats.norm.sf(2), abs=0.004)


def test_layers_are_drawn_independently():
    (outcomes, _) = run(lambda: augment.draw(augment.parse("rand-p1")), 20000)
    both = np.histogram2d(*((outcomes.T - 1) // 2), bins=15)[0]
    assert stats.chi2_contingency(both).pvalue > 1e-3


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (SPEC, (2, 0.5, 9, 0.5, 10, True)),
        ("rand", (2, 0.5, 10, 0.0, 10, False)),
        ("rand-inc0-p1-n4-mmax12-m3", (4, 1.0, 3, 0.0, 12, False)),
        ("rand-mstd101-mmax0", (2, 0.5, 10, np.inf, 10, False)),
    ],
)
def test_parse(spec, wanted):
    assert augment.parse(spec) == wanted


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("augmix-m3", "augmix"),
        ("3a", "3a"),
        ("", ""),
        ("rand-m9-tweights", "tweights"),
        ("rand-m9.5", "m9.5"),
        ("rand-n0", "n0"),
        ("rand-mstdinf", "mstdinf"),
        ("rand-m9 -inc1", "m9 "),
    ],
)
def test_unsupported_options_are_named(spec, part):
    with pytest.raises(ValueError) as error:
        augment.parse(spec)
    assert str(error.value).startswith(f"auto_augment={spec!r}: {part!r} is not supported; give ")


# Colour jitter


def test_jitter_matches_torchvisions_in_one_order(monkeypatch, device, photographs):
    factors = [1.3, 0.7, 1.2]
    given = iter(factors)

    def define(images):
        with monkeypatch.context() as patch:
            patch.setattr(augment.fn.random, "uniform", lambda **_: fn.constant(fdata=next(given), shape=[]))
            return augment.color_jitter(images, 0.4)

    (found,) = run(define, 4, device, images=photographs)
    steps = [torchvisions.adjust_brightness, torchvisions.adjust_contrast, torchvisions.adjust_saturation]
    for image, wanted in zip(found, map(Image.fromarray, photographs), strict=True):
        for step, factor in zip(steps, factors, strict=True):
            wanted = step(wanted, factor)
        wrong = np.abs(image.astype(int) - np.asarray(wanted))
        assert wrong.max() <= 3  # each step is within one, and the next may double it
        assert wrong.mean() < 1


@pytest.mark.parametrize(("jitter", "low", "high"), [((0.4, 0, 0), 0.6, 1.4), ((1.5, 0, 0, 0), 0.0, 2.5)])
def test_jitter_factors(jitter, low, high):
    images = np.full((2000, 2, 2, 3), 100, np.uint8)
    (found,) = run(partial(augment.color_jitter, jitter=jitter, prob=0.7), 2000, images=images)
    levels = found[:, 0, 0, 0]
    assert (found == levels[:, None, None, None]).all()
    assert stats.binomtest(int((levels != 100).sum()), 2000, 0.7).pvalue > 1e-3
    uniform = levels[levels != 100] + np.random.default_rng(0).uniform(0, 1, (levels != 100).sum())  # truncated
    assert stats.kstest(uniform / 100, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_grey_and_hue(photographs):
    images = np.tile(photographs, (100, 1, 1, 1))[:, :8, :8].copy()
    (found,) = run(partial(augment.color_jitter, jitter=0.0, grayscale_prob=0.3), 400, images=images)
    is_grey = (found == found[..., :1]).all((1, 2, 3))
    np.testing.assert_array_equal(found[~is_grey], images[~is_grey])
    assert stats.binomtest(int(is_grey.sum()), 400, 0.3).pvalue > 1e-3
    greys = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images[is_grey]])
    assert np.abs(found[is_grey][..., 0].astype(int) - greys).max() <= 1
    red = np.full((500, 2, 2, 3), [200, 100, 100], np.uint8)
    (turned,) = run(partial(augment.color_jitter, jitter=(0, 0, 0, 0.5)), 500, images=red)
    strongest = np.bincount(turned[:, 0, 0].argmax(-1), minlength=3) / 500
    assert (strongest > 0.2).all()


@pytest.mark.parametrize("jitter", [-0.1, (0.4, 0.4), (0.4,) * 5, (0.1, 0.1, 0.1, 0.6), "0.4", None, np.nan])
def test_an_invalid_jitter_is_named(jitter):
    with pytest.raises(ValueError) as error:
        augment.jitter_of(jitter)
    assert str(error.value).startswith(f"color_jitter={jitter!r}: give a number >= 0, or three or four of them")


# Random erasing


class Replayed:
    """Replaces `random` in timm: area and aspect of the attempts, and the position, come from given uniforms."""

    def __init__(self, attempts, place):
        self.attempts, self.place = iter(attempts.ravel().tolist()), iter(place.tolist())

    def random(self):
        return 0.0

    def uniform(self, low, high):
        return low + next(self.attempts) * (high - low)

    def randint(self, low, high):
        return low + int(next(self.place) * (high - low + 1))


def timms_region(monkeypatch, size, row, number):
    """bool [H, W]: the first of `number` regions; and the number of attempts it took."""
    eraser = RandomErasing(1.0, mode="const", min_count=number, device="cpu")
    image, replay = torch.ones(1, *size), Replayed(row[:10, :2], row[10, :2])
    with monkeypatch.context() as patch:
        patch.setattr(random_erasing, "random", replay)
        patch.setattr(random_erasing, "range", lambda n: range(1 if n == number else n), raising=False)
        eraser(image)
    return image[0].numpy() == 0, 10 - len(list(replay.attempts)) // 2


@pytest.mark.parametrize("size", [(32, 32), (20, 50), (9, 9), (224, 112)])
def test_regions_match_timms(monkeypatch, size):
    rng = np.random.default_rng(0)
    drawn = rng.uniform(0.001, 0.999, (300, 11, 3)).astype(np.float32)
    too_long = [0.99, 0.01 if size[0] > size[1] else 0.99]  # for the short side
    drawn[:150, :3, :2] = too_long
    drawn[:10, :10, :2] = too_long
    drawn[:, :10, 2] = np.linspace(0.9, 0.1, 10)  # the first has the largest weight
    numbers = np.int32(1 + np.arange(300) % 3)
    sizes = np.float32([size] * 300)
    starts, sides = run(augment.region_of, 300, size=sizes, drawn=drawn, number=numbers)
    attempts = []
    for row, number, (y, x), (height, width) in zip(drawn, numbers, starts, sides, strict=True):
        wanted, tried = timms_region(monkeypatch, size, row, int(number))
        found = np.zeros(size, bool)
        found[y : y + height, x : x + width] = True
        np.testing.assert_array_equal(found, wanted)
        attempts.append(tried)
    assert {1, 10} < set(attempts)
    assert not sides[0].any()


MEAN, STD = (0.5, 0.4, 0.6), (0.1, 0.05, 0.08)
LEVELS = 255 * np.array(MEAN)


def erased(images, device="cpu", seed=0, **options):
    (found,) = run(partial(augment.erase, mean=MEAN, std=STD, **options), len(images), device, seed, images=images)
    return found, (found != images).any(-1)


@pytest.mark.parametrize("mode", get_args(augment.EraseMode))
def test_what_is_erased(device, mode):
    """One complete region in the right share of images, filled with the right colours."""
    images = np.full((600, 24, 30, 3), [3, 250, 4], np.uint8)
    found, is_erased = erased(images, device, prob=0.3, mode=mode)
    hit = is_erased.any((1, 2))
    assert stats.binomtest(int(hit.sum()), 600, 0.3).pvalue > 1e-3
    assert (is_erased.sum((1, 2)) == is_erased.any(2).sum(1) * is_erased.any(1).sum(1)).all()  # a rectangle
    if mode == "const":
        np.testing.assert_array_equal(found[is_erased], np.broadcast_to(LEVELS.round(), found[is_erased].shape))
        return
    if mode == "rand":
        regions = [image[where] for image, where in zip(found[hit], is_erased[hit], strict=True)]
        assert all((region == region[0]).all() for region in regions)
        samples = np.stack([region[0] for region in regions])
    else:
        samples = found[is_erased]
        neighbours = np.corrcoef(samples[:-1].T, samples[1:].T)[:3]
        assert np.abs(neighbours[~np.eye(3, 6, dtype=bool)]).max() < 0.02
        first, second = (found[row][is_erased[row]][:20] for row in np.flatnonzero(hit)[:2])
        assert (first != second).any()
    samples = samples + np.random.default_rng(0).uniform(-0.5, 0.5, samples.shape)  # what rounding removed
    samples = (samples - LEVELS) / (255 * np.array(STD))
    for channel in samples.T[:, :20000]:
        assert stats.kstest(channel, stats.norm(0, 1).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("size", "count"), [((24, 30), 1), ((24, 30), 3), ((14, 60), 1)])
def test_erased_areas_follow_timms_distribution(size, count):
    _, ours = erased(np.zeros((3000, *size, 3), np.uint8), prob=1.0, mode="const", count=count)
    random.seed(0)
    theirs = torch.ones(3000, 1, *size)
    RandomErasing(1.0, mode="const", max_count=count, device="cpu")(theirs)
    theirs = theirs[:, 0].numpy() == 0
    areas, widths, tops = (lambda m: m.mean((1, 2)), lambda m: m.any(1).sum(1), lambda m: m[:, 2].sum(1))
    for feature in (areas, widths, tops):
        assert stats.ks_2samp(feature(ours), feature(theirs)).pvalue > 1e-3
