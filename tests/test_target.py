"""MixTarget: the operations that training loops use on a target."""

import numpy as np
import pytest
import timm.utils
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


@pytest.mark.parametrize("index", [slice(1, 4), slice(None, None, 2), [3, 0], torch.tensor([5, 5])])
def test_select_takes_the_same_rows_of_every_field(index):
    target = make_target()
    rows = np.arange(6)[index]
    for field, selected in zip(target, target.select(index), strict=True):
        np.testing.assert_array_equal(selected.numpy(), field.numpy()[rows])


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
def test_to_takes_torchs_forms_and_a_dtype_changes_only_lam0(args, kwargs, device, expected):
    moved = make_target().to(*args, **kwargs)
    assert dtypes(moved) == expected
    assert {field.device.type for field in moved} == {device}


class Recorder:
    """A stand-in for a tensor on some device that records how it was moved."""

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


def test_a_saved_target_is_read_by_torchs_default(tmp_path):
    """weights_only=True."""
    from lumix_dali import LUMixLoss  # noqa: F401 - it makes the type known to PyTorch

    torch.save({"target": make_target()}, tmp_path / "target.pt")
    loaded = torch.load(tmp_path / "target.pt", weights_only=True)["target"]
    assert type(loaded) is MixTarget
    assert all(torch.equal(a, b) for a, b in zip(loaded, make_target(), strict=True))


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
    ("args", "message"),
    [
        ((0,), "num_classes=0"),
        (("x",), "num_classes='x'"),
        ((3,), r"labels\[\d\]=4 .*the model has 3 classes"),
        ((5, 1.0), "smoothing=1.0"),
        ((5, -0.1), "smoothing=-0.1"),
    ],
)
def test_dense_names_an_invalid_argument(args, message):
    with pytest.raises(ValueError, match=message):
        make_target().dense(*args)


# Mixing other per-sample data


def mixed_by_hand(target, values):
    """Row by row, in float64."""
    rows = []
    for own, (lam0, partner) in enumerate(zip(target.lam0.tolist(), target.partner.tolist(), strict=True)):
        ours, theirs = values[own].double(), values[partner].double()
        rows.append(ours if lam0 == 0 else theirs if lam0 == 1 else (1 - lam0) * ours + lam0 * theirs)
    return torch.stack(rows).to(values.dtype)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_mix_is_the_weighted_sum_of_rows(dtype, shape):
    target, values = make_target(), torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    target.lam0[:3] = torch.tensor([0.0, 1.0, 0.5])
    found = target.mix(values)
    assert (found.dtype, found.shape) == (dtype, values.shape)
    tolerance = {torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-7}[dtype]
    torch.testing.assert_close(found, mixed_by_hand(target, values), atol=tolerance, rtol=tolerance)
    assert torch.equal(found[0], values[0])
    assert torch.equal(found[1], values[target.partner[1]])


def test_mix_of_one_hot_labels_is_dense():
    target = make_target()
    target = target._replace(partner_labels=target.labels[target.partner])
    one_hot = torch.nn.functional.one_hot(target.labels, 5).float()
    torch.testing.assert_close(target.mix(one_hot), target.dense(5))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_mix_leaves_unmixed_rows_unchanged(odd):
    """A NaN row reaches only the rows that are mixed with it."""
    target = make_target(batch=4)._replace(lam0=torch.tensor([0.0, 0.0, 0.5, 1.0]), partner=torch.tensor([1, 0, 1, 0]))
    values = torch.arange(12.0).reshape(4, 3)
    values[1] = odd
    found = target.mix(values)
    assert torch.equal(found[0], values[0])
    torch.testing.assert_close(found[1], values[1], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(found[2], values[1] * 0.5 + values[2] * 0.5, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(found[3], values[0])


def test_mix_passes_gradients_to_both():
    """As to a trained teacher's outputs: (1 - lam0) to the sample's own row, lam0 to the partner's."""
    target = make_target(batch=3)._replace(lam0=torch.tensor([0.25, 0.0, 1.0]), partner=torch.tensor([1, 2, 0]))
    values = torch.ones(3, 2, requires_grad=True)
    target.mix(values).sum().backward()
    expected = torch.tensor([0.75 + 1.0, 0.25 + 1.0, 0.0])
    torch.testing.assert_close(values.grad, expected[:, None].expand(3, 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "values", [torch.zeros(6, 2, dtype=torch.int64), torch.zeros(5, 2), torch.tensor(0.0), np.zeros((6, 2))]
)
def test_mix_names_invalid_values(values):
    with pytest.raises(ValueError, match=r"values=.*give a tensor of floating point numbers, one row per sample \(6\)"):
        make_target().mix(values)


# Views: the loader's fields are columns of one tensor


def packed(batch=6, seed=0):
    """A target as `plan.unpack` makes it, and the same target in contiguous tensors."""
    from lumix_dali.loading.plan import Plan, unpack
    from lumix_dali.mixing import Mixing

    plan = Plan(seed, 0, 0, (32, 32), Mixing(mixup_alpha=0.8, prob=0.8, correct_lam=False), True)
    planned = plan.batch(0, np.arange(batch) % 5, np.arange(batch))
    target, _ = unpack([torch.from_numpy(planned[name]) for name in ("target", "lam0")], True)
    assert not any(field.is_contiguous() for field in target if field is not target.lam0)
    return target, MixTarget(*(field.clone(memory_format=torch.contiguous_format) for field in target))


def assert_equal(ours, theirs):
    assert dtypes(ours) == dtypes(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_views_are_targets_like_any_other():
    target, plain = packed()
    for make in (
        lambda t: t.select(slice(1, 4)),
        lambda t: t.select([3, 0]),
        lambda t: t.select(t.lam0 > 0.3),
        lambda t: t.to("cpu", copy=True),
        lambda t: t.to(torch.float64),
        MixTarget.cpu,
    ):
        assert_equal(make(target), make(plain))
    assert torch.equal(target.dense(5, 0.1), plain.dense(5, 0.1))
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target.mix(values), plain.mix(values))
    collated = torch.utils.data.default_collate([target, target])
    assert_equal(MixTarget(*(field[1] for field in collated)), plain)


@pytest.mark.parametrize("options", [{}, {"base": "bce", "detach_lam_s": False}])
def test_a_compiled_loss_takes_views(options):
    from lumix_dali import LUMixLoss, check_target

    torch._dynamo.reset()
    target, plain = packed(16)
    check_target(target, 5)
    logits = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    lam_r, criterion = torch.linspace(0, 1, 16), LUMixLoss(**options)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    expected = criterion(logits, plain, lam_r)
    torch.testing.assert_close(criterion(logits, target, lam_r), expected)
    torch.testing.assert_close(compiled(logits, target, lam_r), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits, target: torch.nn.functional.cross_entropy(logits, target),
        lambda logits, target: logits.argmax(1) == target,
        lambda logits, target: timm.utils.accuracy(logits, target),
    ],
    ids=["loss", "comparison", "metric"],
)
def test_whatever_takes_a_target_for_a_tensor_is_told_what_to_give(use):
    target = MixTarget(*torch.tensor([[0, 1], [1, 0]]), torch.zeros(2), None, None, torch.tensor([1, 0]))
    with pytest.raises((ValueError, AttributeError), match=r"LUMixLoss, target\.dense.*target\.labels"):
        use(torch.randn(2, 3), target)
