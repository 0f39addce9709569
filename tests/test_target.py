"""MixTarget: what training loops call on a target."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from lumix_dali import reference
from lumix_dali.target import MixTarget


def make_target(batch=6, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    return MixTarget(
        torch.tensor(rng.integers(classes, size=batch)),
        torch.tensor(rng.integers(classes, size=batch)),
        torch.tensor(rng.random(batch), dtype=torch.float32),
        torch.tensor(rng.integers(32, size=(batch, 4)), dtype=torch.int32),
        torch.full((batch,), 2, dtype=torch.int32),
        torch.tensor(rng.permutation(batch)),
    )


def dtypes(target):
    return [field.dtype for field in target]


def test_neither_torch_nor_dali_is_imported():
    program = "import sys, lumix_dali.target; sys.exit('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("index", [slice(1, 4), slice(None, None, 2), [3, 0], torch.tensor([5, 5])])
def test_select_takes_the_same_rows_of_every_field(index):
    target = make_target()
    rows = np.arange(6)[index]
    for field, selected in zip(target, target.select(index), strict=True):
        np.testing.assert_array_equal(selected.numpy(), field.numpy()[rows])


def test_select_by_mask():
    target = make_target()
    selected = target.select(target.lam0 > 0.5)
    assert selected.size(0) == int((target.lam0 > 0.5).sum())
    assert (selected.lam0 > 0.5).all()


def test_size_shape_and_device_are_the_labels():
    target = make_target(batch=7)
    assert target.size(0) == 7
    assert target.size() == target.shape == (7,)
    assert target.device == torch.device("cpu")


FULL = [torch.int64, torch.int64, torch.float32, torch.int32, torch.int32, torch.int64]
HALF = [torch.int64, torch.int64, torch.float16, torch.int32, torch.int32, torch.int64]


@pytest.mark.parametrize(
    ("args", "kwargs", "device", "expected"),
    [
        (("meta",), {}, "meta", FULL),
        ((torch.device("meta"),), {"non_blocking": True}, "meta", FULL),
        (("meta", torch.float16), {}, "meta", HALF),
        (("meta", torch.float16, True), {}, "meta", HALF),
        ((torch.float16,), {}, "cpu", HALF),
        ((torch.float16, True), {}, "cpu", HALF),
        ((), {"device": "meta"}, "meta", FULL),
        ((), {"device": "meta", "dtype": torch.float16, "non_blocking": True}, "meta", HALF),
        ((), {"dtype": torch.float16}, "cpu", HALF),
        ((torch.zeros(1, dtype=torch.float16),), {}, "cpu", HALF),
    ],
)
def test_to_takes_torchs_forms_and_a_dtype_touches_lam0_alone(args, kwargs, device, expected):
    moved = make_target().to(*args, **kwargs)
    assert dtypes(moved) == expected
    assert {field.device.type for field in moved} == {device}


class Recorder:
    """A stand-in for a tensor on some device that remembers how it was moved."""

    device = "cpu"

    def to(self, *args, **kwargs):
        self.seen = kwargs
        return self


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("cuda",), {}, False),
        (("cuda",), {"non_blocking": True}, True),
        (("cuda", torch.float16, True), {}, True),
        (("cuda", torch.float16, False, True), {}, False),
    ],
)
def test_to_hands_non_blocking_to_every_field(args, kwargs, expected):
    target = MixTarget(*(Recorder() for _ in range(6)))
    target.to(*args, **kwargs)
    others = [field.seen["non_blocking"] for field in target if field is not target.lam0]
    assert others == [expected] * 5


def test_to_copies_when_asked():
    target = make_target()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(target, target.to("cpu"), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(target, target.to("cpu", copy=True), strict=True))


def test_pin_memory_and_cpu_reach_every_field():
    class Field:
        def pin_memory(self):
            return "pinned"

        def cpu(self):
            return "host"

    target = MixTarget(*(Field() for _ in range(6)))
    assert target.pin_memory() == ("pinned",) * 6
    assert target.cpu() == ("host",) * 6
    assert type(target.pin_memory()) is MixTarget


def test_torchs_own_collate_and_pin_keep_the_type():
    collated = torch.utils.data.default_collate([make_target(seed=0), make_target(seed=1)])
    assert type(collated) is MixTarget
    assert collated.box.shape == (2, 6, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dense_equals_the_oracle(smoothing):
    target = make_target(batch=64)
    dense = target.dense(5, smoothing)
    labels, partner_labels, lam0, *_ = (field.numpy() for field in target)
    expected = reference.dense(labels, partner_labels, lam0, 5, smoothing)
    np.testing.assert_allclose(dense.numpy(), expected, atol=1e-6)
    assert dense.dtype == torch.float32


def test_dense_keeps_the_sum_when_both_classes_are_one():
    target = make_target()
    target = target._replace(partner_labels=target.labels)
    np.testing.assert_allclose(target.dense(5, 0.1).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(target.dense(5).amax(1), 1, atol=1e-6)


@pytest.mark.parametrize("lam0", [0.0, 0.3, 1.0])
def test_dense_equals_timms_mixup_target_at_one_minus_lam0(lam0):
    target = make_target()
    target = target._replace(partner_labels=target.labels.flip(0), lam0=torch.full((6,), lam0))
    torch.testing.assert_close(target.dense(5, 0.1), mixup_target(target.labels, 5, 1 - lam0, 0.1))


@pytest.mark.parametrize(
    ("args", "message"), [((0,), "num_classes=0"), ((5, 1.0), "smoothing=1.0"), ((5, -0.1), "smoothing=-0.1")]
)
def test_dense_names_a_wrong_argument(args, message):
    with pytest.raises(ValueError, match=message):
        make_target().dense(*args)
