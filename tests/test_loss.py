"""LUMixLoss against hand-worked numbers, the float64 oracle, timm, PyTorch and finite differences."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumix_dali import LUMixLoss, check_target, reference
from lumix_dali.target import MixTarget

BOX = {True: (8, 8, 24, 24), False: (0, 0, 0, 0)}


def make_target(labels, partner_labels, lam0, kind=2):
    """Boxes depend on the kind: only CutMix has one."""
    labels = torch.as_tensor(labels)
    kind = torch.as_tensor(kind, dtype=torch.int32).expand(labels.shape).contiguous()
    box = torch.tensor([BOX[bool(k == 2)] for k in kind], dtype=torch.int32).reshape(-1, 4)
    lam0 = torch.as_tensor(lam0, dtype=torch.float32).expand(labels.shape).contiguous()
    return MixTarget(labels, torch.as_tensor(partner_labels), lam0, box, kind, torch.arange(len(labels)).flip(0))


def random_case(batch=64, classes=7, seed=0, dtype=torch.float64, spread=3.0):
    """Every kind, λ0 of 0 and 1, equal classes, and noise that is clamped."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(batch, classes)) * spread, dtype=dtype)
    lam0 = rng.random(batch).round(1)
    kind = rng.integers(4, size=batch)
    kind[: batch // 2] = 2
    target = make_target(rng.integers(classes, size=batch), rng.integers(classes, size=batch), lam0, kind)
    return logits, target, torch.tensor(rng.normal(0.5, 1, size=batch))


def oracle(logits, target, lam_r, **options):
    labels, partner_labels, lam0, _, kind, _ = (field.numpy() for field in target)
    return reference.lumix_loss(logits.double().numpy(), labels, partner_labels, lam0, kind, lam_r.numpy(), **options)


def loss_and_grad(criterion, logits, target, lam_r=None):
    """Per-sample losses, and the gradient of each sample's own loss."""
    logits = logits.detach().clone().requires_grad_()
    loss = criterion(logits, target) if lam_r is None else criterion(logits, target, lam_r)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


# Worked by hand from the paper's equations. Case: logits, (b, a), λ0, λ_r, options, λ, L0, R, L, gradient.
LOGP = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
ZERO = torch.zeros(1, 4, dtype=torch.float64)
NOISE_ONLY = {"r_r": 0.5, "r_s": 0.0}
WORKED = {
    "1": (LOGP, (1, 0), 0.25, 0.6, {}, 0.4275, 0.985595, 0.6145, 1.600095,
          (0.0515, -0.3286, 0.13855, 0.13855)),
    "2": (LOGP, (1, 0), 0.25, 0.6, {"smoothing": 0.1}, 0.4275, 1.049593, 0.58305, 1.632643,
          (0.06885, -0.29224, 0.111695, 0.111695)),
    "3": (LOGP, (0, 0), 0.25, 0.6, {}, None, 0.693147, 0.5, 1.193147, (-0.75, 0.45, 0.15, 0.15)),
    "4": (LOGP, (1, 0), 0.25, -1.2, NOISE_ONLY, 0.0, 1.203973, 0.7, 1.903973, None),
    "5": (ZERO, (3, 2), 0.36, 0.5, {}, 0.43, 1.386294, 0.75, 2.136294, None),
    "bce": (LOGP, (1, 0), 0.25, 0.6, {"base": "bce"}, 0.4275, 0.461011, 0.6145 / 4, 0.461011 + 0.6145 / 4, None),
    "bce sum": (LOGP, (1, 0), 0.25, 0.6, {"base": "bce", "bce_reduction": "sum"}, 0.4275, 1.844045, 0.6145,
                1.844045 + 0.6145, None),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_examples(case, dtype):
    z, (b, a), lam0, lam_r, options, lam, base_loss, regulariser, total, grad = WORKED[case]
    options = {"smoothing": 0.0, **options}
    z, target, lam_r = z.to(dtype), make_target([b], [a], lam0), torch.tensor([lam_r])
    got, got_grad = loss_and_grad(LUMixLoss(**options), z, target, lam_r)
    without, _ = loss_and_grad(LUMixLoss(**options, eta=0.0), z, target, lam_r)
    assert got.item() == pytest.approx(total, abs=1e-5)
    assert without.item() == pytest.approx(base_loss, abs=1e-5)
    assert (got - without).item() == pytest.approx(regulariser, abs=1e-5)
    if lam is not None:
        assert LUMixLoss(**options).lam(z, target, lam_r).item() == pytest.approx(lam, abs=1e-5)
    if grad is not None:
        np.testing.assert_allclose(got_grad[0], grad, atol=1e-5)


NAMES = ("base", "bce_reduction", "detach_lam_s", "apply_to", "smoothing", "eta", "r_r", "r_s")
OPTIONS = [
    dict(zip(NAMES, row, strict=True))
    for row in itertools.chain.from_iterable(
        itertools.product([base], [bce], [True, False], ["cutmix", "all"], [0.0, 0.1], [0.0, 0.7], [r_r], [r_s])
        for base, bce in (("softmax", "mean"), ("bce", "mean"), ("bce", "sum"))
        for r_r, r_s in ((0.4, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_matches_the_oracle(options):
    for seed in range(2):
        logits, target, lam_r = random_case(seed=seed)
        loss, grad = loss_and_grad(LUMixLoss(**options, reduction="none"), logits, target, lam_r)
        expected, expected_grad = oracle(logits, target, lam_r, **options)
        np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("apply_to", ["cutmix", "all"])
def test_lam_matches_the_oracle_and_is_lam0_where_lumix_does_not_apply(apply_to):
    logits, target, lam_r = random_case()
    lam = LUMixLoss(apply_to=apply_to).lam(logits.requires_grad_(), target, lam_r)
    labels, partner_labels, lam0, _, kind, _ = (field.numpy() for field in target)
    expected = reference.lumix_lam(
        logits.detach().numpy(), labels, partner_labels, lam0, kind, lam_r.numpy(), apply_to=apply_to
    )
    np.testing.assert_allclose(lam, expected, atol=1e-12)
    assert not lam.requires_grad
    changed = lam != target.lam0
    plain = (target.kind == 0) | (target.lam0 == 0) | (target.lam0 == 1)
    if apply_to == "cutmix":
        plain |= target.kind != 2
    assert not changed[plain].any()
    assert set(target.kind[changed].tolist()) == ({2} if apply_to == "cutmix" else {1, 2, 3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lam_s_is_the_partners_share_of_the_two_probabilities(dtype):
    """p_a / (p_a + p_b) from the full softmax, in NumPy, for any shares and whether or not LUMix applies."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels, partners = torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor([4, 3, 1, 0, 2, 2])
    z = logits.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    own, other = p[range(6), labels], p[range(6), partners]
    for options in ({}, {"r_s": 0.0, "r_r": 0.0}, {"apply_to": "all"}):
        found = LUMixLoss(**options).lam_s(logits, make_target(labels, partners, 0.0))
        np.testing.assert_allclose(found.numpy(), other / (own + other), rtol=1e-6)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not found.requires_grad
    masked = torch.tensor([[-torch.inf, 0.0, 0.0], [-torch.inf, -torch.inf, 0.0]])
    assert LUMixLoss().lam_s(masked, make_target([0, 0], [1, 1], 0.5)).tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="target is a Tensor: pass a MixTarget"):
        LUMixLoss().lam_s(masked, torch.tensor([0, 0]))


def test_lam_of_labels_is_zero():
    assert LUMixLoss().lam(torch.zeros(3, 4), torch.tensor([0, 1, 2])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_detached_gradient_is_the_closed_form_with_lam_held_fixed(smoothing):
    logits, target, lam_r = random_case()
    criterion = LUMixLoss(smoothing=smoothing)
    _, grad = loss_and_grad(criterion, logits, target, lam_r)
    z, (labels, partner_labels, _, _, kind, _), classes = logits.numpy(), target, np.arange(7)
    lam = criterion.lam(logits, target, lam_r).numpy()[:, None]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = lam * np.eye(7)[partner_labels] + (1 - lam) * np.eye(7)[labels]
    y = (1 - smoothing) * y + smoothing / 7
    chosen = (classes == labels.numpy()[:, None]) | (classes == partner_labels.numpy()[:, None])
    active = (kind == 2) & (target.lam0 > 0) & (target.lam0 < 1)
    m = (chosen * y * p).sum(1, keepdims=True)
    expected = ((p - y) + active.numpy()[:, None] * p * (m - chosen * y)) / len(z)
    np.testing.assert_allclose(grad, expected, atol=1e-12)
    np.testing.assert_allclose(grad.sum(1), 0, atol=1e-12)


def test_attached_lam_s_changes_the_gradient_and_not_the_loss():
    case = random_case()
    detached, attached = (loss_and_grad(LUMixLoss(detach_lam_s=detach), *case) for detach in (True, False))
    assert torch.equal(detached[0], attached[0])
    assert (detached[1] - attached[1]).abs().max() > 1e-4


@pytest.mark.parametrize("lam0", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_lumix_it_equals_timm(lam0, smoothing):
    """timm weighs the canvas: its lam is 1 - lam0. All kinds, because with r_r = r_s = η = 0 they are equivalent."""
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    dense = mixup_target(labels, 10, 1 - lam0, smoothing)
    for base, timm_loss in (
        ("softmax", SoftTargetCrossEntropy()),
        ("bce", BinaryCrossEntropy(smoothing=0.0)),
    ):
        expected = loss_and_grad(timm_loss, logits, dense)
        criterion = LUMixLoss(r_r=0.0, r_s=0.0, eta=0.0, smoothing=smoothing, base=base)
        for kind in range(4):
            target = make_target(labels, labels.flip(0), lam0, kind)
            torch.testing.assert_close(loss_and_grad(criterion, logits, target), expected)


@pytest.mark.parametrize("lam0", [0.0, 1.0])
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_lam0_of_0_or_1_is_plain_cross_entropy(lam0, kind):
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    b, a = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 4, 3, 2])
    criterion = LUMixLoss(apply_to="all", smoothing=0.1)
    expected = torch.nn.functional.cross_entropy(logits, a if lam0 else b, label_smoothing=0.1)
    torch.testing.assert_close(criterion(logits, make_target(b, a, lam0, kind)), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_labels_get_smoothed_cross_entropy(smoothing):
    logits = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    expected = loss_and_grad(torch.nn.CrossEntropyLoss(label_smoothing=smoothing), logits, labels)
    torch.testing.assert_close(loss_and_grad(LUMixLoss(smoothing=smoothing), logits, labels), expected)
    bce, dense = BinaryCrossEntropy(smoothing=0.0), mixup_target(labels, 10, 1.0, smoothing).double()
    torch.testing.assert_close(
        loss_and_grad(LUMixLoss(smoothing=smoothing, base="bce"), logits, labels),
        loss_and_grad(bce, logits, dense),
        rtol=1e-6, atol=1e-7,  # timm's smoothed one-hots are float32
    )  # fmt: skip


def test_reductions():
    case = random_case()
    loss = LUMixLoss(reduction="none")(*case)
    assert loss.shape == (64,)
    assert LUMixLoss(reduction="mean")(*case).item() == pytest.approx(loss.mean().item(), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"base": "bce"}, {"detach_lam_s": False}])
@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-9),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 8e-3),
        (torch.float16, torch.float32, 1e-3),
    ],
)
def test_loss_is_at_least_float32_and_the_gradient_has_the_logits_dtype(dtype, result, tolerance, options):
    logits, target, lam_r = random_case(dtype=dtype)
    loss, grad = loss_and_grad(LUMixLoss(**options, reduction="none"), logits, target, lam_r)
    expected, expected_grad = oracle(logits, target, lam_r, smoothing=0.1, **options)
    assert loss.dtype == result
    assert grad.dtype == dtype
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # the logits are rounded; the sums are not
    np.testing.assert_allclose(grad.double(), expected_grad, rtol=tolerance, atol=min(tolerance, 1e-4))


@pytest.mark.parametrize("base", ["softmax", "bce"])
@pytest.mark.parametrize("detach", [True, False])
def test_large_logits_stay_finite_and_exact(base, detach):
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0], [-1e4, 1e4, 0.0, 5.0], [-1e4, -1e4, 1e4, -1e4]])
    target, lam_r = make_target([0, 0, 0], [3, 1, 1], 0.3), torch.tensor([0.5, 0.5, 0.5])
    for smoothing in (0.0, 0.1):
        options = {"base": base, "smoothing": smoothing, "detach_lam_s": detach}
        loss, grad = loss_and_grad(LUMixLoss(**options, reduction="none"), logits, target, lam_r)
        expected, expected_grad = oracle(logits, target, lam_r, **options)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_bce_keeps_float64_where_softplus_would_cut_it_short():
    logits, target, lam_r = random_case(batch=1, classes=3)
    logits = torch.tensor([[20.5, -20.5, 20.5]], dtype=torch.float64)
    loss, grad = loss_and_grad(LUMixLoss(base="bce", eta=0.0), logits, target, lam_r)
    expected, expected_grad = oracle(logits, target, lam_r, base="bce", eta=0.0, smoothing=0.1)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-14)
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=1e-14)


def test_a_masked_class_costs_nothing_without_smoothing():
    logits, target, lam_r = random_case(batch=8)
    masked = torch.cat((logits, torch.full((8, 1), -torch.inf)), 1)
    criterion = LUMixLoss(smoothing=0.0)
    loss, grad = loss_and_grad(criterion, logits, target, lam_r)
    masked_loss, masked_grad = loss_and_grad(criterion, masked, target, lam_r)
    torch.testing.assert_close(masked_loss, loss)
    torch.testing.assert_close(masked_grad[:, :7], grad)
    assert (masked_grad[:, 7] == 0).all()


# Row 0 masks class a, row 1 a class that is not in the target, row 2 class b; only row 3's label is masked.
MASKED = torch.tensor([[1, 2, 9, 0.5], [9, 0, 1, 3], [0.3, 0.1, 0.2, 9], [9, 1, 2, 3]])
MASKED[MASKED == 9] = -torch.inf
MASKED_LABELS = torch.tensor([0, 1, 1, 0])
MASKED_TARGET = make_target([0, 1, 3, 0], [2, 2, 1, 1], [0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("target", [MASKED_LABELS, MASKED_TARGET], ids=["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("detach", [True, False])
def test_a_masked_target_class_without_weight_matches_pytorch(target, smoothing, detach):
    """-inf logits: no 0·∞, and with smoothing PyTorch's infinity."""
    criterion = LUMixLoss(smoothing=smoothing, detach_lam_s=detach, reduction="none")
    expected, expected_grad = loss_and_grad(
        lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing), MASKED, MASKED_LABELS
    )
    loss, grad = loss_and_grad(criterion, MASKED, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert not expected.isnan().any() and not expected_grad.isnan().any()
    assert expected.isinf().tolist() == ([True] * 4 if smoothing else [False] * 3 + [True])


@pytest.mark.parametrize("target", [MASKED_LABELS, MASKED_TARGET], ids=["labels", "mixed"])
def test_a_masked_class_without_weight_adds_nothing_to_bce(target):
    """PyTorch returns NaN here, so the oracle is its sum over the other classes."""
    criterion = LUMixLoss(smoothing=0.0, base="bce", bce_reduction="sum", reduction="none")
    loss, grad = loss_and_grad(criterion, MASKED, target)
    one_hot, kept = F.one_hot(MASKED_LABELS, 4).float(), MASKED.isfinite()
    terms = F.binary_cross_entropy_with_logits(MASKED.where(kept, 0), one_hot, reduction="none")
    torch.testing.assert_close(loss[:3], (terms * kept).sum(1)[:3])
    assert loss[3] == torch.inf
    torch.testing.assert_close(grad, MASKED.sigmoid() - one_hot)


def test_two_masked_classes_are_infinite_and_not_nan():
    """λ_s = p_a / (p_a + p_b) is then 0/0."""
    logits, target = torch.tensor([[-torch.inf, -torch.inf, 1.0]]), make_target([0], [1], 0.3)
    assert LUMixLoss(smoothing=0.0)(logits, target) == torch.inf
    assert LUMixLoss(r_r=0.0, r_s=1.0).lam(logits, target) == 0.5


def test_nan_logits_stay_nan():
    logits, target, lam_r = random_case(batch=4)
    logits[1, 2] = torch.nan
    loss, grad = loss_and_grad(LUMixLoss(reduction="none"), logits, target, lam_r)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().any(1).tolist() == [False, True, False, False]


# Second derivatives. Finite differences include λ_s: they need it attached or absent.
TWICE = [
    {"r_s": 0.0},
    {"r_s": 0.0, "smoothing": 0.0},
    {"r_s": 0.0, "base": "bce"},
    {"r_s": 0.0, "eta": 0.0},
    {"detach_lam_s": False},
    {"detach_lam_s": False, "base": "bce"},
]


def smooth_case():
    """CutMix, the same class twice, and unmixed; all away from the clamp, where no second derivative exists."""
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lam0, kind = [0.3, 0.5, 0.7, 0.4, 0.6, 0.0], torch.tensor([2, 2, 2, 2, 2, 0])
    target = make_target([0, 1, 2, 3, 4, 0], [1, 2, 2, 0, 0, 3], lam0, kind)
    return logits, target, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def dense_loss(logits, target, lam, smoothing=0.1, eta=1.0):
    """Eqs. 6 and 7 on a dense target with λ held fixed, in plain PyTorch operations; summed over the batch."""
    classes = logits.shape[1]
    a, b = F.one_hot(target.partner_labels, classes), F.one_hot(target.labels, classes)
    y = (1 - smoothing) * (lam[:, None] * a + (1 - lam[:, None]) * b) + smoothing / classes
    active = (target.kind == 2) & (target.lam0 > 0) & (target.lam0 < 1)
    hinge = ((a | b) * y * (1 - logits.softmax(1))).sum(1)
    return F.cross_entropy(logits, y, reduction="sum") + eta * (active * hinge).sum()


@pytest.mark.parametrize("options", TWICE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_match_finite_differences(options, reduction):
    logits, target, lam_r = smooth_case()
    criterion = LUMixLoss(**options, reduction=reduction)
    _, expected = loss_and_grad(criterion, logits, target, lam_r)
    loss = criterion(logits.requires_grad_(), target, lam_r).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close(grad, expected)  # gradgradcheck accepts a wrong one
    assert torch.autograd.gradgradcheck(lambda z: criterion(z, target, lam_r), logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gradient_penalty_matches_pytorch(smoothing):
    """The gradient of the squared norm of the input's gradient; with labels and plain CutMix."""
    generator = torch.Generator().manual_seed(0)
    images, hidden, out = (
        torch.randn(size, dtype=torch.float64, generator=generator) for size in ((8, 6), (6, 12), (12, 10))
    )
    labels = torch.arange(8)
    target = make_target(labels, labels.flip(0), 0.3)._replace(lam0=torch.full((8,), 0.3, dtype=torch.float64))

    def penalty(loss):
        x, w = images.clone().requires_grad_(), hidden.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(torch.tanh(x @ w) @ out), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), w)[0]

    criterion = LUMixLoss(r_r=0.0, r_s=0.0, eta=0.0, smoothing=smoothing)
    for ours, theirs in (
        (labels, lambda z: F.cross_entropy(z, labels, label_smoothing=smoothing)),
        (target, lambda z: F.cross_entropy(z, target.dense(10, smoothing))),
    ):
        torch.testing.assert_close(penalty(lambda z, y=ours: criterion(z, y)), penalty(theirs))


def test_the_detached_second_derivative_holds_lam_fixed():
    logits, target, lam_r = smooth_case()
    criterion = LUMixLoss(reduction="none")
    lam = criterion.lam(logits, target, lam_r)
    expected = torch.func.hessian(lambda z: dense_loss(z, target, lam))(logits)
    got = torch.autograd.functional.hessian(lambda z: criterion(z, target, lam_r).sum(), logits)
    torch.testing.assert_close(got, expected)


def test_a_retained_graph_gives_the_same_gradient_twice():
    logits, target, lam_r = random_case()
    logits.requires_grad_()
    loss = LUMixLoss()(logits, target, lam_r)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(second, 3 * first)


class Card(TorchDispatchMode):
    """Meta tensors stand for a GPU's: no CPU tensor may meet them, and no value may be read on the host."""

    READS = frozenset({"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        assert all(tensor.is_meta for tensor in tensors), f"a CPU tensor reaches {name}"
        assert name not in self.READS, f"{name} waits for the GPU"
        if name == "_standard_gamma":  # it has no meta kernel
            return torch.empty_like(args[0])
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in made), f"{name} makes a CPU tensor"
        return result


@pytest.mark.parametrize("noise", [("beta", 2.0), ("beta", 0.8), ("normal", 0.0, 1.0), ("uniform",)], ids=str)
@pytest.mark.parametrize("on_card", [False, True], ids=["floats", "0-dim tensors"])
def test_on_a_gpu_nothing_of_the_cpu_takes_part_and_nothing_waits(noise, on_card):
    """PyTorch before 2.7 refuses a CPU number in some operators, and a captured graph would keep its value."""
    logits, target, lam_r = random_case(dtype=torch.float32)
    logits, target, lam_r = logits.to("meta").requires_grad_(), target.to("meta"), lam_r.to("meta")
    for options in OPTIONS if noise == ("beta", 2.0) else OPTIONS[:1]:
        criterion = LUMixLoss(**options, noise=noise)
        if on_card:
            criterion.r_r, criterion.r_s, criterion.eta = (torch.empty((), device="meta") for _ in range(3))
        with Card():
            for args in ((logits, target, lam_r), (logits, target), (logits, target.labels)):
                criterion(*args).backward()
            criterion.lam(logits, target)


class LargeTensors(TorchDispatchMode):
    """Counts the storages of at least `numel` elements that operators allocate."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.numel:
            self.made[result.untyped_storage().data_ptr()] = result  # kept, so that no address is reused
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_only_dense_tensor_besides_the_logits_is_their_gradient(smoothing):
    logits, target, lam_r = random_case(batch=64, classes=50, dtype=torch.float32)
    logits.requires_grad_()
    with LargeTensors(64 * 25) as large:
        loss = LUMixLoss(smoothing=smoothing)(logits, target, lam_r)
        (grad,) = torch.autograd.grad(loss, logits)
    assert list(large.made) == [grad.untyped_storage().data_ptr()]


LAWS = {
    ("beta", 2.0): ("beta", (2, 2)),
    ("beta", 0.8): ("beta", (0.8, 0.8)),
    ("beta", 1.0): ("uniform", ()),
    ("beta", 0.2): ("beta", (0.2, 0.2)),
    ("beta", 30.0): ("beta", (30, 30)),
    ("normal", 0.0, 1.0): ("norm", (0, 1)),
    ("normal", 0.5, 5**0.5): ("norm", (0.5, 5**0.5)),
    ("uniform",): ("uniform", ()),
}


@pytest.mark.parametrize("noise", LAWS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_follows_its_distribution(noise, seed):
    from scipy import stats  # not at the top: this file's GPU tests do not need it

    torch.manual_seed(seed)
    # Beta(.2, .2) puts 2 % of its draws closer to 1 than float32 can resolve.
    lam_r = LUMixLoss(noise=noise).draw(torch.empty(20_000, 2, dtype=torch.float64))
    assert lam_r.dtype == torch.float64
    assert stats.kstest(lam_r, *LAWS[noise]).pvalue > 1e-3
    assert abs(np.corrcoef(lam_r[1:], lam_r[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 2.0, 1e6])
def test_beta_noise_is_finite_in_float32(alpha):
    torch.manual_seed(0)
    lam_r = LUMixLoss(noise=("beta", alpha)).draw(torch.empty(20_000, 2))
    assert lam_r.dtype == torch.float32
    assert ((lam_r >= 0) & (lam_r <= 1)).all()
    assert lam_r.mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_loss_draws_per_sample_from_the_default_generator_and_only_when_needed():
    logits, target, lam_r = random_case()
    criterion = LUMixLoss(reduction="none")
    torch.manual_seed(1)
    drawn = criterion.draw(logits)
    assert len(set(drawn.tolist())) == 64
    torch.manual_seed(1)
    assert torch.equal(criterion(logits, target), criterion(logits, target, drawn))
    torch.manual_seed(2)
    assert not torch.equal(criterion(logits, target), criterion(logits, target, drawn))
    state = torch.get_rng_state()
    criterion(logits, target, lam_r)
    LUMixLoss(r_r=0.0)(logits, target)
    criterion(logits, target.labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("inductor", {}),
        ("aot_eager", {"smoothing": 0.0, "apply_to": "all", "noise": ("beta", 0.8)}),
        ("aot_eager", {"base": "bce", "detach_lam_s": False, "noise": ("normal", 0.0, 1.0)}),
    ],
)
def test_compiled_in_one_graph_it_equals_eager(backend, options):
    torch._dynamo.reset()
    logits, target, lam_r = random_case(batch=16, dtype=torch.float32)
    criterion = LUMixLoss(**options)
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        loss_and_grad(compiled, logits, target, lam_r), loss_and_grad(criterion, logits, target, lam_r)
    )
    losses = torch.stack([compiled(logits, target) for _ in range(3)])  # the draw is in the graph
    assert losses.isfinite().all()
    assert losses.unique().numel() == 3


@pytest.mark.parametrize("noise", [("beta", 0.8), ("normal", 0.5, 1.0), None], ids=str)
def test_a_schedule_recompiles_once_on_leaving_zero(noise):
    """r_r, r_s, η and the noise's numbers change at every step, from 0 on."""
    torch._dynamo.reset()
    logits, target, lam_r = random_case(batch=16)
    counter, criterion = CompileCounter(), LUMixLoss(noise=noise or ("beta", 2.0))
    compiled, twin = torch.compile(criterion, fullgraph=True, backend=counter), LUMixLoss()
    for step in range(12):
        for scheduled in (criterion, twin):
            scheduled.r_r, scheduled.r_s, scheduled.eta = 0.05 * step, 0.02 * step, 0.1 * step
        if noise:  # drawn in the graph
            criterion.noise = (noise[0], *(number + 0.01 * step for number in noise[1:]))
            assert compiled(logits, target).isfinite()
        else:
            torch.testing.assert_close(
                loss_and_grad(compiled, logits, target, lam_r), loss_and_grad(twin, logits, target, lam_r)
            )
    assert counter.frame_count <= (3 if noise else 2)  # one more where the noise's numbers change too


def test_scheduled_numbers_read_back_as_they_were_set():
    criterion = LUMixLoss(r_r=0.4, r_s=0.0)
    assert (criterion.r_r, criterion.r_s, criterion.eta, criterion.noise) == (0.4, 0.0, 1.0, ("beta", 2.0))
    criterion.r_r, criterion.r_s, criterion.eta, criterion.noise = 0.3, torch.tensor(0.5), 2, ("normal", 0, 1)
    assert (criterion.r_r, criterion.r_s, criterion.eta, criterion.noise) == (0.3, 0.5, 2.0, ("normal", 0.0, 1.0))
    assert type(criterion.r_r) is type(criterion.eta) is float
    assert "r_r=0.3, r_s=0.5, eta=2.0, noise=('normal', 0.0, 1.0)" in repr(criterion)
    assert not criterion.state_dict()
    case = random_case()
    expected = LUMixLoss(r_r=0.3, r_s=0.5, eta=2.0)(*case)
    for twin in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), criterion.half()):
        assert torch.equal(twin(*case), expected)


INVALID = [
    *(("r_r", value) for value in (-0.1, 1.1, float("nan"), "0.3", True, None, torch.ones(2))),
    *(("eta", value) for value in (-1, float("inf"), float("nan"), None)),
    *(("noise", value) for value in (None, "beta", ("beta", 0.0), ["beta", "2"], ("beta", 1e39), ("beta", 1e-300))),
    *(("noise", value) for value in (("normal", 0.0), ("normal", -1e300, 1.0), ("normal", 0.0, -1.0), ("gamma", 2.0))),
    *(("smoothing", value) for value in (1.0, -0.1, "a")),
    *(("detach_lam_s", value) for value in ("no", 1)),
    *((name, "sum") for name in ("base", "apply_to", "reduction")),
    ("bce_reduction", "none"),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_options_are_named(name, value):
    """When the loss is made and, for those that a schedule sets, when they are set."""
    with pytest.raises(ValueError, match=rf"^{name}.*: give "):
        LUMixLoss(**{name: value})
    if name in ("r_r", "eta", "noise"):
        criterion = LUMixLoss()
        with pytest.raises(ValueError, match=rf"^{name}.*: give "):
            setattr(criterion, name, value)
        assert getattr(criterion, name) == getattr(LUMixLoss(), name)


def test_shares_above_one_are_refused_by_the_next_loss():
    """The assignment does not refuse: between these two the sum is 1.8."""
    logits, target, lam_r = random_case()
    criterion = LUMixLoss(r_r=0.1, r_s=0.9)
    criterion.r_r, criterion.r_s = 0.9, 0.1
    assert torch.equal(criterion(logits, target, lam_r), LUMixLoss(r_r=0.9, r_s=0.1)(logits, target, lam_r))
    criterion.r_s = 0.2
    for method in (criterion, criterion.lam):
        with pytest.raises(ValueError, match=r"r_r=0\.9 and r_s=0\.2 add up to 1\.1: lower one"):
            method(logits, target, lam_r)


def test_shares_that_add_up_to_one_in_decimals_are_accepted():
    for tenths in range(11):
        LUMixLoss(r_r=tenths * 0.1, r_s=(10 - tenths) * 0.1)  # .7 + .3 rounds to more than 1


LABELS = torch.tensor([0, 1, 2])
GOOD = make_target(LABELS, LABELS.flip(0), 0.5)


@pytest.mark.parametrize(
    ("logits", "target", "lam_r", "message"),
    [
        (torch.zeros(3), GOOD, None, r"logits are float32 \[3\]"),
        (torch.zeros(3, 4, dtype=torch.int64), GOOD, None, r"logits are int64 \[3, 4\]"),
        (torch.zeros(5, 4), GOOD, None, "target has 3 rows and logits 5: pass one batch"),
        (torch.zeros(3, 4), GOOD.to("meta"), None, r"target is on meta, logits on cpu: .*target\.to"),
        (torch.zeros(3, 4), LABELS.int(), None, r"target is int32 \[3\]: pass int64"),
        (torch.zeros(3, 4), list(GOOD), None, "target is a list: pass a MixTarget"),
        (torch.zeros(3, 4), GOOD._replace(labels=LABELS.int()), None, r"labels is int32 \[3\]: pass int64"),
        (torch.zeros(3, 4), GOOD._replace(partner_labels=LABELS[:2]), None, r"partner_labels is int64 \[2\]"),
        (torch.zeros(3, 4), GOOD._replace(lam0=LABELS), None, r"lam0 is int64 \[3\]: pass a floating"),
        (torch.zeros(3, 4), GOOD._replace(lam0=torch.zeros(3, 1)), None, r"lam0 is float32 \[3, 1\]"),
        (torch.zeros(3, 4), GOOD._replace(kind=LABELS), None, r"kind is int64 \[3\]: pass int32"),
        (
            torch.zeros(3, 4),
            GOOD._replace(box=GOOD.box[:2]),
            None,
            r"box is int32 \[2, 4\]: pass int32 \[3, 4",
        ),
        (torch.zeros(3, 4), GOOD, torch.zeros(4), r"lam_r is float32 \[4\]: pass a floating dtype \[3\]"),
        (torch.zeros(3, 4), GOOD, torch.zeros(3, device="meta"), "lam_r is on meta"),
        (torch.zeros(3, 4), torch.zeros(3, 4), None, "soft labels, such as those of timm's Mixup: pass the MixTarget"),
        (torch.zeros(3, 4), GOOD._replace(box=None), None, "box is a NoneType: pass a tensor"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "lam"])
def test_invalid_tensors_are_named(logits, target, lam_r, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(LUMixLoss(), method)(logits, target, lam_r)


def rows(**fields):
    return GOOD._replace(**{name: torch.tensor(rows, dtype=getattr(GOOD, name).dtype) for name, rows in fields.items()})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (rows(labels=[0, 4, 1]), r"labels\[1\]=4 must lie in \[0, 4\): the model has 4 classes"),
        (torch.tensor([0, -100]), r"target\[1\]=-100 must lie in \[0, 4\): .* there is no ignore_index"),
        (rows(partner_labels=[9, 0, 1]), r"partner_labels\[0\]=9"),
        (rows(lam0=[0.5, 1.5, 0.5]), r"lam0\[1\]=1\.5 must lie in \[0, 1\]"),
        (rows(lam0=[0.5, 0.5, float("nan")]), r"lam0\[2\]=nan"),
        (rows(kind=[2, 2, 4]), r"kind\[2\]=4 must be 0, 1, 2 or 3"),
        (rows(box=[[0, 0, 1, 1], [2, 0, 1, 1], [0, 0, 1, 1]]), r"box\[1\]=\[2, 0, 1, 1\] must be \(y0"),
        (rows(kind=[2, 1, 2]), r"box\[1\]=\[8, 8, 24, 24\] must be zeros where kind is not 2"),
    ],
)
def test_check_target_names_the_first_wrong_value(target, message):
    with pytest.raises(ValueError, match=message):
        check_target(target, 4)


@pytest.mark.parametrize("target", [torch.tensor([0, 7, 1]), rows(labels=[0, 7, 1])], ids=["labels", "mixed"])
def test_on_a_cpu_the_loss_names_a_label_that_is_no_class(target):
    with pytest.raises(ValueError, match=r"\[1\]=7 must lie in \[0, 4\): the model has 4 classes"):
        LUMixLoss()(torch.zeros(3, 4), target)


def test_check_target_accepts_valid_targets():
    check_target(GOOD, 3)
    check_target(LABELS, 3)
    check_target(rows(kind=[0, 1, 3], box=[[0] * 4] * 3, lam0=[0.0, 1.0, 0.5]), 3)
