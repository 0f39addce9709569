"""The metrics against hand-worked numbers and slow implementations of the definitions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score
from torchvision.ops import box_iou

from pipelines import metrics

CONFIDENCE, CORRECT = [0.2, 0.4, 0.6, 0.8], [0, 1, 0, 1]


def test_calibration_error_by_hand():
    # bins (.2, .4) and (.6, .8): confidence .3 and .7, accuracy .5 in both
    assert metrics.rms_calibration_error(CONFIDENCE, CORRECT, 2) == pytest.approx(0.02**0.5)
    assert metrics.rms_calibration_error(CONFIDENCE, CORRECT, 2, skip_last=False) == pytest.approx(0.2)
    # bins of one sample each, sorted: gaps .9 and .4, and .3 in the last
    assert metrics.rms_calibration_error([0.7, 0.1, 0.4], [1, 1, 0], 1) == pytest.approx((0.81 / 3 + 0.16 / 3) ** 0.5)


@pytest.mark.parametrize("n", [20, 25, 29, 30])
def test_calibration_error_of_a_loop(n):
    rng = np.random.default_rng(n)
    confidence, correct = rng.random(n), rng.integers(0, 2, n)
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True))
    terms = []
    while pairs:
        size = 10 if len(pairs) >= 20 else len(pairs)
        taken, pairs = pairs[:size], pairs[size:]
        gap = sum(c for c, _ in taken) / size - sum(r for _, r in taken) / size
        terms.append(size / n * gap**2)
    assert metrics.rms_calibration_error(confidence, correct, 10) == pytest.approx(sum(terms[:-1]) ** 0.5)
    assert metrics.rms_calibration_error(confidence, correct, 10, False) == pytest.approx(sum(terms) ** 0.5)


def test_a_single_bin_is_refused():
    with pytest.raises(ValueError, match=r"bin_size=3: 4 samples make one bin.* at most 2"):
        metrics.rms_calibration_error(CONFIDENCE, CORRECT, 3)
    assert metrics.rms_calibration_error(CONFIDENCE, CORRECT, 3, skip_last=False) == pytest.approx(0, abs=1e-12)


def test_aurra():
    curve = metrics.response_rate_accuracy(CONFIDENCE, CORRECT)
    assert curve.tolist() == pytest.approx([1, 0.5, 2 / 3, 0.5])
    assert curve.mean() == pytest.approx(0.666667, abs=1e-6)
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(40), rng.integers(0, 2, 40)
    slow = [correct[confidence >= threshold].mean() for threshold in sorted(confidence, reverse=True)]
    assert metrics.response_rate_accuracy(confidence, correct) == pytest.approx(slow)


def test_aupr_of_the_specification():
    """The specification means the library's average precision: in (.9, .6), out (.7, .3), score -confidence."""
    assert average_precision_score([0, 0, 1, 1], [-0.9, -0.6, -0.7, -0.3]) == pytest.approx(0.833333, abs=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 4), (4, 3)])
@pytest.mark.parametrize("each", [False, True])
def test_shuffled_cells(grid, each):
    rows, columns = grid
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 2, 8, 12), dtype=torch.uint8, generator=generator)
    order = torch.stack([torch.randperm(rows * columns, generator=generator) for _ in range(3 if each else 1)])
    height, width = 8 // rows, 12 // columns
    expected = torch.empty_like(images)
    for b in range(3):
        for to in range(rows * columns):
            fro = int(order[b if each else 0, to])
            y, x, v, u = to // columns, to % columns, fro // columns, fro % columns
            expected[b, :, y * height : (y + 1) * height, x * width : (x + 1) * width] = images[
                b, :, v * height : (v + 1) * height, u * width : (u + 1) * width
            ]
    assert torch.equal(metrics.shuffle_cells(images, order, grid), expected)


def test_dropped_cells():
    images = torch.arange(1, 2 * 3 * 4 * 6 + 1, dtype=torch.int32).view(2, 3, 4, 6)
    dropped = torch.tensor([[[0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0]]], dtype=torch.bool)
    changed = metrics.drop_cells(images, dropped)
    for b in range(2):
        for y in range(4):
            for x in range(6):
                kept = 0 if dropped[b, y // 2, x // 2] else 1
                assert torch.equal(changed[b, :, y, x], kept * images[b, :, y, x])


def test_top_mass_by_hand():
    attention = torch.tensor([[0.1, 0.5], [0.1, 0.3]])

    def taken(mass):
        return metrics.top_mass(attention, mass).int().flatten().tolist()

    assert taken(0.0) == [0, 0, 0, 0]
    assert taken(0.3) == taken(0.49) == [0, 1, 0, 0]
    assert taken(0.51) == taken(0.79) == [0, 1, 0, 1]
    assert taken(1.0) == [1, 1, 1, 1]
    assert metrics.top_mass(torch.tensor([[0.0, 2.0]]), 1.0).tolist() == [[False, True]]


@pytest.mark.parametrize("mass", [0.1, 0.37, 0.9, 1.0])
def test_top_mass_is_the_fewest_cells(mass):
    """As in the public code: cells whose cumulative share, starting from the weakest, is above 1 - mass."""
    attention = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taken = metrics.top_mass(attention, mass)
    assert taken.shape == attention.shape
    for index in np.ndindex(2, 3):
        share = (attention[index] / attention[index].sum()).flatten().numpy()
        weaker = np.array([share[share <= value].sum() for value in share])
        assert taken[index].flatten().tolist() == (weaker > 1 - mass).tolist()


@pytest.mark.parametrize("ignore_void", [False, True])
def test_best_jaccard(ignore_void):
    rng = np.random.default_rng(0)
    target = rng.choice([0, 3, 7, 255], (6, 8), p=[0.4, 0.25, 0.25, 0.1])
    masks = rng.random((4, 6, 8)) < 0.5
    seen = target != 255 if ignore_void else np.ones_like(target, bool)
    best = [max(jaccard_score((target == c)[seen], mask[seen]) for mask in masks) for c in (3, 7)]
    found = metrics.best_jaccard(torch.from_numpy(masks), torch.from_numpy(target), ignore_void)
    assert found == pytest.approx(np.mean(best))


def test_best_jaccard_by_hand():
    target = torch.tensor([[1, 1, 255], [0, 2, 2]], dtype=torch.uint8)
    masks = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 1]]], dtype=torch.bool)
    assert metrics.best_jaccard(masks, target) == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert metrics.best_jaccard(masks, target, ignore_void=True) == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="only background and void"):
        metrics.best_jaccard(masks, torch.zeros(2, 3))


def test_mask_box():
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert metrics.mask_box(mask).tolist() == pytest.approx([0.25, 0.2, 0.75, 0.4])  # the first of two equals
    assert metrics.mask_box(mask, corners=True).tolist() == pytest.approx([0, 0, 0.75, 0.4])
    assert metrics.mask_box(mask, largest=False).tolist() == pytest.approx([0, 0, 0.75, 0.8])


def test_a_box_holds_its_pixels():
    """The box around a filled rectangle is the rectangle itself, so their IoU is 1."""
    mask = torch.zeros(14, 14, dtype=torch.bool)
    mask[3:9, 5:6] = True
    truth = torch.tensor([[5 / 14, 3 / 14, 6 / 14, 9 / 14]], dtype=torch.float64)
    assert box_iou(metrics.mask_box(mask)[None], truth).item() == pytest.approx(1)
