"""Given timm's partner, box and λ, images and dense targets match timm's, and so does the rule for boxes.

Tested with timm 1.0.31. Before 1.0.29 timm's boxes of odd sides lose a pixel, so nothing is compared there.
timm flips the batch to pair it and weighs the canvas: lam_timm = 1 - lam0.
"""

from copy import deepcopy

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types

import lumix_dali.fn as mixfn
from lumix_dali.mixing import Draw, Mixing
from lumix_dali.target import Kind, MixTarget

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
timm_mixup = pytest.importorskip("timm.data.mixup")

pytestmark = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 29),
    reason=f"timm {timm.__version__}: its boxes of odd sides lose a pixel before 1.0.29",
)

CLASSES = 10
OPTIONS = {
    "cutmix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.7},
    "minmax": {"mixup_alpha": 0.0, "cutmix_minmax": (0.2, 0.8)},
    "uncorrected": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "correct_lam": False},
}


def record(monkeypatch, owner, name):
    """Records the results of `owner.name`, in order, without changing them."""
    results, original = [], getattr(owner, name)

    def recorded(*args, **kwargs):
        result = original(*args, **kwargs)
        results.append(deepcopy(result))  # timm modifies its draws in place
        return result

    monkeypatch.setattr(owner, name, recorded)
    return results


def run_timm(monkeypatch, images, labels, mode, seed, options):
    """timm's images [B, H, W, C] and dense targets, and what it drew: kind [B], box [B, 4], lam0 [B]."""
    np.random.seed(seed)  # noqa: NPY002  timm draws from NumPy's global generator
    mixup = timm_mixup.Mixup(mode=mode, num_classes=CLASSES, label_smoothing=0.1, **options)
    params = record(monkeypatch, mixup, f"_params_per_{mode}")
    cuts = record(monkeypatch, timm_mixup, "cutmix_bbox_and_lam")
    x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)
    mixed, dense = mixup(x, torch.tensor(labels))

    count = len(images)
    lam, is_cutmix = (np.broadcast_to(value, count) for value in params[0])
    lam0, box = 1.0 - lam, np.zeros((count, 4), np.int32)
    kind = np.where(lam == 1, 0, np.where(is_cutmix, Kind.CUTMIX, Kind.MIXUP)).astype(np.int32)
    cut = np.flatnonzero(kind == Kind.CUTMIX)
    for row, ((yl, yh, xl, xh), cut_lam) in zip(cut, cuts * (len(cut) if mode == "batch" else 1), strict=True):
        box[row], lam0[row] = (yl, xl, yh, xh), 1 - cut_lam
    return mixed.numpy().transpose(0, 2, 3, 1), dense, kind, box, lam0.astype(np.float32)


def given(images, labels, partner, kind, box, weight, correct_lam):
    mixing = Mixing(mixup_alpha=1.0, correct_lam=correct_lam)
    return mixfn.apply(images, labels, Draw(partner, kind, box, weight), mixing)


@pytest.mark.parametrize("size", [(16, 16), (15, 15), (9, 20)])
@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_images_and_dense_targets(graph, monkeypatch, name, mode, size):
    count, kinds = 8, set()
    inputs = {"partner": np.arange(count, dtype=np.int32)[::-1].copy()}
    run = graph(given, count, correct_lam=name != "uncorrected")
    for seed in range(6):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
        labels = rng.integers(CLASSES, size=count)
        with monkeypatch.context() as patch:
            wanted, dense, kind, box, lam0 = run_timm(patch, images, labels, mode, seed, OPTIONS[name])
        inputs |= {"kind": kind, "box": box, "weight": lam0}
        mixed, target = run(images, labels, **inputs)

        blended = kind == Kind.MIXUP
        np.testing.assert_array_equal(mixed[~blended], wanted[~blended])
        np.testing.assert_allclose(mixed[blended], wanted[blended], atol=1)
        np.testing.assert_allclose(target.lam0, lam0, atol=1e-6)
        ours = MixTarget(*map(torch.tensor, target)).dense(CLASSES, smoothing=0.1)
        torch.testing.assert_close(ours, dense.float().expand_as(ours), atol=1e-6, rtol=0)
        kinds |= set(kind.tolist())
    drawn = {"cutmix": {2}, "minmax": {2}, "mixup": {1}, "mix": {0, 1, 2}, "uncorrected": {1, 2}}
    assert kinds == drawn[name]


def our_boxes(rule, size, uniforms, lam=None):
    """Boxes from a rule of `fn` whose uniform draw is replaced by `uniforms` [N, …]; `lam` [N]."""
    count = len(uniforms)

    @pipeline_def(batch_size=count, num_threads=2, device_id=None, seed=0)
    def define():
        uniform = fn.external_source(source=[uniforms.astype(np.float32)])
        drawn = () if lam is None else (fn.external_source(source=[lam.astype(np.float32)]),)
        length = fn.constant(idata=list(size), dtype=types.INT32)
        return rule(length, *drawn, lambda node: uniform)

    pipe = define()
    pipe.build()
    return np.array(pipe.run()[0].as_array())


class Replayed:
    """Replaces `numpy.random` in timm: `randint(low, high)` maps a given uniform to that range."""

    def __init__(self, uniforms):
        self.uniforms = iter(uniforms)

    def randint(self, low, high, size=None):
        return low + int(next(self.uniforms) * (high - low))


def timm_boxes(monkeypatch, rule, uniforms, arguments):
    """(y0, x0, y1, x1) of timm's `rule` for every row of `uniforms`, in the order in which timm draws."""
    rows = []
    for row, given_arguments in zip(uniforms, arguments, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(timm_mixup.np, "random", Replayed(row))
            yl, yh, xl, xh = rule(*given_arguments)
        rows.append((yl, xl, yh, xh))
    return np.array(rows)


SIZES = [(16, 16), (15, 15), (9, 20), (224, 224), (1, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_box_rule(monkeypatch, size):
    """Every side, even and odd, around centres that reach every edge of the image."""
    rng = np.random.default_rng(0)
    sides = np.arange(max(size))
    lam = np.concatenate([((sides + 0.5) / max(size)) ** 2, [0.25, 1.0, 0.0]]).repeat(20)
    centre = rng.integers(0, size, size=(len(lam), 2))
    centre[::5], centre[1::5] = 0, np.array(size) - 1
    uniforms = (centre + 0.5) / size
    arguments = [((3, *size), 1 - weight) for weight in lam]
    wanted = timm_boxes(monkeypatch, timm_mixup.rand_bbox, uniforms, arguments)
    np.testing.assert_array_equal(our_boxes(mixfn._box, size, uniforms, lam), wanted)


@pytest.mark.parametrize("size", [(16, 16), (15, 15), (10, 20), (224, 224)])
def test_minmax_rule(monkeypatch, size):
    minmax = (0.2, 0.8)
    # neither on the edge between two integers nor at the ends, where float32 may differ from timm's float64
    uniforms = np.random.default_rng(0).uniform(0.001, 0.999, size=(300, 2, 2))
    uniforms[:20, 1] = 0.99999
    wanted = timm_boxes(
        monkeypatch, timm_mixup.rand_bbox_minmax, uniforms.reshape(300, 4), [((3, *size), minmax)] * 300
    )

    def rule(length, share):
        return mixfn._inner_box(length, minmax, share)

    np.testing.assert_array_equal(our_boxes(rule, size, uniforms), wanted)
