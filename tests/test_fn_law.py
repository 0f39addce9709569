"""The draws follow timm's distributions, computed exactly: at least 20 000 draws for each of three seeds.

On images of a few pixels the probability of every possible box can be computed, so one χ² test over the
boxes covers sides, centres, clipping and their independence: an edge of half weight, a rounded
side or a shifted centre shows up. Weights are compared with Beta's distribution function (Kolmogorov-Smirnov).
"""

from collections import Counter
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from scipy import stats

import lumix_dali.fn as mixfn
from lumix_dali import reference
from lumix_dali.target import Kind, MixTarget

BATCH, DRAWS = 500, 20_000
SEEDS = (11, 12, 13)
ODD_AND_EVEN, LARGE = (6, 5), (48, 64)
P = 1e-3

both_modes = pytest.mark.parametrize(
    ("mode", "draws", "seed"),
    [
        *(("elem", DRAWS, seed) for seed in SEEDS),
        # one draw per batch costs as much as a batch: a few here, all of them with -m slow
        ("batch", 500, SEEDS[0]),
        *(pytest.param("batch", DRAWS, seed, marks=pytest.mark.slow) for seed in SEEDS),
    ],
)


@cache
def emitted(size, seed, draws=DRAWS, mode="elem", **options):
    """Targets of `draws` draws, concatenated; `labels` are the samples' positions in their batch."""
    batch = BATCH if mode == "elem" else 2

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, seed=seed)
    def define():
        images = fn.constant(idata=[0], shape=[*size, 1], dtype=types.UINT8, layout="HWC")
        place = fn.external_source(source=lambda: np.arange(batch), batch=True)
        return tuple(mixfn.mix(images, place, mode=mode, **options)[1])

    pipe = define()
    pipe.build()
    rows = slice(None) if mode == "elem" else slice(1)
    runs = -(-draws // (batch if mode == "elem" else 1))
    steps = [[np.array(field.as_array())[rows] for field in pipe.run()] for _ in range(runs)]
    return MixTarget(*map(np.concatenate, zip(*steps, strict=True)))


def assert_frequencies(values, law):
    """χ² test of the hashable `values` against `law`, {value: probability}; rare values share one cell."""
    seen, total = Counter(values), len(values)
    assert set(seen) <= set(law)
    common = [value for value in law if law[value] * total >= 5]
    rest = 1 - sum(law[value] for value in common)
    expected, counts = [law[value] * total for value in common], [seen[value] for value in common]
    if rest > 1e-9:
        expected, counts = [*expected, rest * total], [*counts, total - sum(counts)]
    assert len(counts) > 1
    assert stats.chisquare(counts, expected).pvalue > P


def box_law(size, alpha):
    """Probability of every clipped box: λ0 ~ Beta(α, α) binned by the side that it gives, and a uniform centre."""
    steps = {(k / length) ** 2 for length in size for k in range(length + 1)}
    steps.add(1 - 2**-25)  # above it float32 rounds to 1, a full side that float64 would almost never draw
    law = Counter()
    for low, high in pairwise(sorted(steps)):
        share = np.diff(stats.beta(alpha, alpha).cdf([low, high]))[0] / np.prod(size)
        for centre in np.ndindex(size):
            law[reference.cut_box(size, np.float32((low + high) / 2), centre)] += share
    return law


def minmax_law(size, minmax):
    """timm 1.0.31: sides randint(int(size·low), int(size·high)), starts randint(0, size - side + 1)."""
    axes = []
    for length in size:
        sides = range(*(int(length * limit) for limit in minmax))
        axes.append(
            {
                (start, start + side): 1 / len(sides) / (length - side + 1)
                for side in sides
                for start in range(length - side + 1)
            }
        )
    return {(y[0], x[0], y[1], x[1]): axes[0][y] * axes[1][x] for y, x in product(*axes)}


def boxes(target):
    return [tuple(box) for box in target.box.tolist()]


@both_modes
def test_boxes(mode, draws, seed):
    target = emitted(ODD_AND_EVEN, seed, draws, mode)
    law = box_law(ODD_AND_EVEN, alpha=1)
    assert sum(law.values()) == pytest.approx(1)
    assert_frequencies(boxes(target), law)
    counted = reference.count_lam0(target.box, ODD_AND_EVEN)
    np.testing.assert_allclose(target.lam0, counted, rtol=1e-6)


@both_modes
def test_minmax_boxes(mode, draws, seed):
    size, minmax = (5, 4), (0.2, 0.8)
    target = emitted(size, seed, draws, mode, cutmix_minmax=minmax)
    assert_frequencies(boxes(target), minmax_law(size, minmax))


@both_modes
def test_kinds_and_drawn_weights(mode, draws, seed):
    """Each kind has its own α, and its weight is independent of the choice of kind."""
    target = emitted(
        ODD_AND_EVEN, seed, draws, mode, mixup_alpha=0.4, cutmix_alpha=2.0, prob=0.8, switch_prob=0.3, correct_lam=False
    )
    assert_frequencies(target.kind.tolist(), {0: 0.2, 1: 0.8 * 0.7, 2: 0.8 * 0.3})
    for kind, alpha in ((Kind.MIXUP, 0.4), (Kind.CUTMIX, 2.0)):
        lam0 = target.lam0[target.kind == kind]
        assert stats.kstest(lam0, stats.beta(alpha, alpha).cdf).pvalue > P


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_and_counted_weights_at_size(seed):
    """On a larger image and with another α, against a NumPy simulation of timm's distribution."""
    size, count = np.array(LARGE), 200_000
    target = emitted(LARGE, seed, cutmix_alpha=0.5)
    rng = np.random.default_rng(seed)
    side = (size * np.sqrt(rng.beta(0.5, 0.5, size=(count, 1)))).astype(int)
    low = rng.integers(0, size, size=(count, 2)) - side // 2
    box = np.concatenate([np.clip(low, 0, size), np.clip(low + side, 0, size)], axis=1)
    area = (box[:, 2:] - box[:, :2]).prod(1)
    assert stats.ks_2samp(target.lam0, area / size.prod()).pvalue > P
    for edge in range(4):
        assert stats.ks_2samp(target.box[:, edge], box[:, edge]).pvalue > P


@pytest.mark.parametrize("seed", SEEDS)
def test_centres_at_size(seed):
    """Boxes of at most a tenth of the area that reach no edge: all centres are equally likely."""
    target, reach = emitted(LARGE, seed, cutmix_alpha=0.5), int(max(LARGE) * 0.1**0.5) // 2 + 1
    start, stop = target.box[:, :2], target.box[:, 2:]
    whole = ((start > 0) & (stop < LARGE)).all(1) & (target.lam0 < 0.1)
    centre = (start + (stop - start) // 2)[whole]
    for axis, length in enumerate(LARGE):
        places = range(reach, length - reach)
        inner = [place for place in centre[:, axis].tolist() if place in places]
        assert len(inner) > 500
        assert_frequencies(inner, dict.fromkeys(places, 1 / len(places)))


@pytest.mark.parametrize("seed", SEEDS)
def test_samples_are_drawn_independently(seed):
    """Neighbours in a batch, and the same position in consecutive batches, are independent."""
    lam0 = emitted(ODD_AND_EVEN, seed).lam0
    for lag in (1, BATCH):
        assert stats.spearmanr(lam0[lag:], lam0[:-lag]).pvalue > P


@pytest.mark.parametrize("seed", SEEDS)
def test_partners_are_uniform_over_the_other_samples(seed):
    target = emitted(ODD_AND_EVEN, seed)
    offset = (target.partner_labels - target.labels) % BATCH
    assert_frequencies(offset.tolist(), dict.fromkeys(range(1, BATCH), 1 / (BATCH - 1)))


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_the_seed_determines_the_draws(mode):
    options = {"draws": 50, "mode": mode, "mixup_alpha": 0.8, "correct_lam": False}
    first, again, other = (emitted(ODD_AND_EVEN, seed, **options) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    for name in ("lam0", "box", "kind") + (("partner_labels",) if mode == "elem" else ()):
        assert (getattr(first, name) != getattr(other, name)).any()
    assert len(set(first.lam0.tolist())) > 40  # and different steps draw differently
