"""The oracle against the spec's numbers, central differences and counted pixels."""

import numpy as np
import pytest

from lumix_dali import reference as ref

P = (0.5, 0.3, 0.1, 0.1)
LAM_OPTIONS = ("r_r", "r_s", "apply_to")


def one(logits, classes, lam0, lam_r, kind=2):
    b, a = classes
    return [np.asarray(logits)[None], [b], [a], [lam0], [kind], [lam_r]]


def random_batch(rng, size=24, num_classes=5):
    """Every kind, same classes, λ0 of 0 and 1, noise that clamps λ."""
    lam0 = rng.uniform(size=size)
    lam0[:3] = 0, 1, 0
    return [
        rng.normal(size=(size, num_classes), scale=2),
        rng.integers(num_classes, size=size),
        rng.integers(num_classes, size=size),
        lam0,
        np.arange(size) % 4,
        rng.normal(0.5, 1.5, size),
    ]


def lam_of(batch, options):
    return ref.lumix_lam(*batch, **{key: options[key] for key in LAM_OPTIONS if key in options})


def central_differences(logits, loss, step=1e-5):
    columns = [(loss(logits + d) - loss(logits - d)) / (2 * step) for d in step * np.eye(logits.shape[1])]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(("base", "bce_reduction"), [("softmax", "mean"), ("bce", "mean"), ("bce", "sum")])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("apply_to", ["cutmix", "all"])
@pytest.mark.parametrize(("smoothing", "eta"), [(0, 1), (0, 0), (0.1, 1), (0.1, 0.3)])
@pytest.mark.parametrize(("r_r", "r_s"), [(0.4, 0.1), (0, 0.9), (0, 0)])
def test_gradient_equals_central_differences(base, bce_reduction, detach, apply_to, smoothing, eta, r_r, r_s):
    logits, *rest = batch = random_batch(np.random.default_rng(0))
    options = {"base": base, "bce_reduction": bce_reduction, "smoothing": smoothing, "eta": eta, "apply_to": apply_to}
    ratios = {"r_r": r_r, "r_s": r_s}
    grad = ref.lumix_loss(*batch, **options, **ratios, detach_lam_s=detach)[1]
    if detach:  # hold λ fixed: as noise with ratio 1 it is independent of the logits
        rest[-1] = lam_of(batch, options | ratios)
        ratios = {"r_r": 1, "r_s": 0}
    numeric = central_differences(logits, lambda z: ref.lumix_loss(z, *rest, **options, **ratios)[0])
    np.testing.assert_allclose(grad, numeric, atol=1e-8)
    if base == "softmax":
        np.testing.assert_allclose(grad.sum(1), 0, atol=1e-13)


@pytest.mark.parametrize("base", ["softmax", "bce"])
@pytest.mark.parametrize(
    ("kind", "lam0", "apply_to"),
    [(0, 0.0, "all"), (1, 0.3, "cutmix"), (3, 0.3, "cutmix"), (2, 0.0, "cutmix"), (2, 1.0, "cutmix"), (1, 1.0, "all")],
)
def test_plain_cross_entropy_where_lumix_does_not_apply(base, kind, lam0, apply_to):
    batch = one(np.log(P), (1, 0), lam0, 0.9, kind)
    options = {"apply_to": apply_to}
    y = ref.dense([1], [0], [lam0], 4, 0.1)
    z = np.log(P)
    if base == "softmax":
        expected = (-(y * z).sum(), P - y)
    else:
        q = 1 / (1 + np.exp(-z))
        expected = (-(y * np.log(q) + (1 - y) * np.log(1 - q)).mean(), (q - y) / 4)
    loss, grad = ref.lumix_loss(*batch, **options, base=base, smoothing=0.1, detach_lam_s=False)
    assert loss == pytest.approx([expected[0]], abs=1e-12)
    np.testing.assert_allclose(grad, expected[1], atol=1e-12)
    assert lam_of(batch, options) == pytest.approx([lam0], abs=0)


@pytest.mark.parametrize(("kind", "apply_to"), [(1, "all"), (3, "all"), (2, "all"), (2, "cutmix")])
def test_lumix_applies_to_every_chosen_kind(kind, apply_to):
    loss, _ = ref.lumix_loss(*one(np.log(P), (1, 0), 0.25, 0.6, kind), apply_to=apply_to)
    assert loss == pytest.approx([1.600095], abs=1e-6)


@pytest.mark.parametrize("base", ["softmax", "bce"])
@pytest.mark.parametrize("detach", [True, False])
def test_large_logits_stay_finite(base, detach):
    logits = [[1e4, -1e4, 0, 3], [-1e4, 1e4, 1e4, 1e4]]
    half = [0.5, 0.5]
    loss, grad = ref.lumix_loss(
        logits, [0, 1], [1, 0], half, [2, 2], half, base=base, r_r=0, r_s=1, bce_reduction="sum", detach_lam_s=detach
    )
    assert np.isfinite(loss).all() and np.isfinite(grad).all()
    # λ_s, r_s = 1: λ is 0 and the true class is certain
    assert loss[0] == pytest.approx(0 if base == "softmax" else 3.048587 + np.log(2), abs=1e-6)


def test_lam_s_is_a_ratio_of_probabilities_and_lam_is_per_sample():
    logits = np.log([P, P[::-1]])
    lam = ref.lumix_lam(logits, [1, 1], [0, 0], [0.25, 0.25], [2, 2], [0, 0], r_r=0, r_s=1)
    np.testing.assert_allclose(lam, (0.5 / 0.8, 0.1 / 0.2))


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_dense_weighs_the_partner(smoothing):
    y = ref.dense([0, 3, 2], [1, 3, 2], [0.25, 0.6, 0], 4, smoothing)
    np.testing.assert_allclose(y.sum(1), 1)
    off, span = smoothing / 4, 1 - smoothing
    expected = [[0.75, 0.25, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    np.testing.assert_allclose(y, np.array(expected) * span + off)


@pytest.mark.parametrize(
    ("size", "lam", "centre", "expected"),
    [
        ((224, 224), 0.25, (20, 112), (0, 56, 76, 168)),  # the spec's example
        ((100, 100), 0.49, (50, 50), (15, 15, 85, 85)),
        ((30, 30), 0.25, (10, 20), (3, 13, 18, 28)),  # odd side 15: no pixel is lost
        ((40, 60), 0.25, (39, 0), (29, 0, 40, 15)),  # not square, clipped below and left
        ((8, 8), 1.0, (4, 4), (0, 0, 8, 8)),
        ((8, 8), 1.0, (0, 7), (0, 3, 4, 8)),
    ],
)
def test_cut_box(size, lam, centre, expected):
    assert ref.cut_box(size, lam, centre) == expected


def test_a_small_weight_gives_an_empty_box():
    box = ref.cut_box((32, 32), 1e-6, (5, 9))
    assert ref.count_lam0([box], (32, 32)) == [0]


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (9, 30)])
def test_changed_pixels_equal_lam0(size):
    rng = np.random.default_rng(1)
    images = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None, None], (32, *size, 3))
    partner = rng.permutation(32)
    box = [ref.cut_box(size, rng.uniform(), (rng.integers(size[0]), rng.integers(size[1]))) for _ in images]
    lam0 = ref.count_lam0(box, size)
    mixed = ref.mix_images(images, partner, box, np.full(32, 2), lam0)
    own, other = np.arange(32)[:, None, None], partner[:, None, None]
    assert ((mixed[..., 0] == other) | (mixed[..., 0] == own)).all()
    changed = (mixed[..., 0] == other).mean(axis=(1, 2))
    moved = partner != np.arange(32)
    np.testing.assert_allclose(changed[moved], lam0[moved], atol=1e-15)
    for image, (y0, x0, y1, x1), index in zip(mixed, box, partner, strict=True):
        assert (image[y0:y1, x0:x1] == index).all()


def test_mixing_by_hand_and_the_input_is_kept():
    images = [np.full((2, 3, 3), level, np.uint8) for level in (10, 21, 255)]
    mixed = ref.mix_images(images, [1, 0, 1], [[0] * 4, [0] * 4, [0, 1, 1, 3]], [1, 0, 2], [0.5, 0, 1 / 3])
    assert mixed.dtype == np.uint8
    np.testing.assert_array_equal(mixed[0], 16)  # 15.5 rounds away from zero
    np.testing.assert_array_equal(mixed[1], 21)
    np.testing.assert_array_equal(mixed[2, ..., 0], [[255, 21, 21], [255, 255, 255]])
    assert images[2].min() == 255
    quarter = ref.mix_images(images, [1, 2, 2], [[0] * 4] * 3, [1, 1, 1], [0.25, 0.25, 1])
    assert quarter[:, 0, 0, 0].tolist() == [13, 80, 255]  # 12.75 and 79.5: lam0 weighs the partner


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("lam=", lambda: ref.cut_box((8, 8), 1.5, (0, 0))),
        (
            "images",
            lambda: ref.mix_images(
                [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)], [1, 0], [[0] * 4] * 2, [0, 0], [0, 0]
            ),
        ),
        ("kind", lambda: ref.mix_images(np.zeros((1, 2, 2, 3), np.uint8), [0], [[0] * 4], [3], [0.5])),
        ("partner", lambda: ref.mix_images(np.zeros((1, 2, 2, 3), np.uint8), [1], [[0] * 4], [0], [0])),
        ("box", lambda: ref.mix_images(np.zeros((1, 2, 2, 3), np.uint8), [0], [0] * 4, [0], [0])),
        ("labels", lambda: ref.dense([4], [0], [0.5], 4)),
        ("smoothing", lambda: ref.dense([0], [0], [0.5], 4, 1.0)),
        ("lam0", lambda: ref.dense([0], [0], [np.nan], 4)),
        ("r_r", lambda: ref.lumix_lam(*one(P, (0, 1), 0.5, 0.5), r_r=0.8, r_s=0.3)),
        ("kind", lambda: ref.lumix_lam(*one(P, (0, 1), 0.5, 0.5, kind=4))),
        ("logits", lambda: ref.lumix_loss(P, [0], [1], [0.5], [2], [0.5])),
    ],
)
def test_bad_arguments_are_named(word, call):
    with pytest.raises(ValueError, match=word):
        call()
