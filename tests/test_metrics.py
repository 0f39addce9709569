"""The metrics against hand-worked numbers and slow implementations of the definitions."""

import numpy as np
import pytest
import torch

from pipelines import metrics

CONFIDENCE, CORRECT = [0.2, 0.4, 0.6, 0.8], [0, 1, 0, 1]


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


def test_best_jaccard_by_hand():
    target = torch.tensor([[1, 1, 255], [0, 2, 2]], dtype=torch.uint8)
    masks = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 1]]], dtype=torch.bool)
    assert metrics.best_jaccard(masks, target) == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert metrics.best_jaccard(masks, target, ignore_void=True) == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="only background and void"):
        metrics.best_jaccard(masks, torch.zeros(2, 3))


def test_cells_that_touch_at_a_corner_belong_together_only_with_connectivity_8():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True  # a diagonal of three
    mask[3, 4] = mask[3, 5] = True  # two side by side
    assert metrics.mask_box(mask, corners=True).tolist() == [0, 0, 3 / 6, 3 / 4]
    assert metrics.mask_box(mask, corners=False).tolist() == [4 / 6, 3 / 4, 1, 1]
