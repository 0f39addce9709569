"""Mixing in DALI's dynamic mode: pixels and target against the NumPy oracle."""

import numpy as np
import pytest
import torch

ndd = pytest.importorskip("nvidia.dali.experimental.dynamic")

from lumix_dali import Mixing, dynamic, reference  # noqa: E402
from lumix_dali.mixing import draw  # noqa: E402

SIZE = (13, 18)


def photographs(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup_alpha": 0.8},
        {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
        {"prob": 0.5},
        {"mode": "batch"},
        {"cutmix_minmax": (0.2, 0.8)},
        {"correct_lam": False},
        {"cutmix_alpha": 0.05},
    ],
    ids=str,
)
def test_pixels_and_target(options, n):
    images, labels, mixing = photographs(n), np.arange(n) * 3, Mixing(**options)
    mixed, target = dynamic.mix(ndd.batch(list(images), layout="HWC"), labels, mixing, np.random.default_rng(5))
    drawn = draw(np.random.default_rng(5), n, SIZE, mixing)
    expected = reference.mix_images(images, drawn.partner, drawn.box, drawn.kind, drawn.weight)
    difference = np.abs(mixed.torch().numpy().astype(int) - expected)
    assert (difference.reshape(n, -1).max(1) <= (drawn.kind == 1)).all()
    counted = reference.count_lam0(drawn.box, SIZE).astype(np.float32) if mixing.counts_lam0 else drawn.weight
    np.testing.assert_array_equal(target.lam0, np.where(drawn.kind == 2, counted, drawn.weight))
    for field, value in dict(
        box=drawn.box, kind=drawn.kind, partner=drawn.partner, labels=labels, partner_labels=labels[drawn.partner]
    ).items():
        found = getattr(target, field)
        assert isinstance(found, torch.Tensor)
        np.testing.assert_array_equal(found, value)


def test_invalid_inputs_are_named():
    odd = [np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"images: sizes .*resize them to one size"):
        dynamic.mix(ndd.batch(odd, layout="HWC"), [0, 1], Mixing(), np.random.default_rng(0))
    same = ndd.batch(odd[:1] * 2, layout="HWC")
    with pytest.raises(ValueError, match=r"labels: shape \(3,\); give one integer per image, \[2\]"):
        dynamic.mix(same, [0, 1, 2], Mixing(), np.random.default_rng(0))
