"""The distribution of mixing on the host: what `mixing.draw` draws, and what the loader's graph makes of it.

Boxes, kinds, weights and partners are compared with distributions computed here, with timm's, and with
`fn.mix`, which draws in the graph. The contract of the paste (`test_contracts.py`) is checked on the same arrays that
the loader's graph receives.
"""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from conftest import SmallFeed
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, ramps
from scipy import stats
from test_fn_law import ODD_AND_EVEN, SEEDS, P, assert_frequencies, box_law, emitted, minmax_law

from lumix_dali import reference
from lumix_dali.loading import pipelines
from lumix_dali.loading.plan import INDEX, LABEL, Plan, unpack
from lumix_dali.mixing import Mixing, derangement, draw, patches
from lumix_dali.target import Kind, MixTarget

DRAWS = 20_000


def drawn(size, seed, n=DRAWS, **options):
    return draw(np.random.default_rng(seed), n, size, Mixing(**options))


def drawn_in_batches(size, seed, batches, **options):
    """The first row of each of many small batches."""
    rng, mixing = np.random.default_rng(seed), Mixing(**options)
    rows = [draw(rng, 2, size, mixing) for _ in range(batches)]
    return type(rows[0])(*(np.stack([field[0] for field in fields]) for fields in zip(*rows, strict=True)))


def boxes(found):
    return [tuple(box) for box in found.box.tolist()]


# Against exact distributions


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_boxes_follow_their_distribution(mode, seed):
    found = drawn(ODD_AND_EVEN, seed) if mode == "elem" else drawn_in_batches(ODD_AND_EVEN, seed, 5000, mode="batch")
    assert_frequencies(boxes(found), box_law(ODD_AND_EVEN, alpha=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_minmax_boxes_follow_timms_distribution(seed):
    found = drawn((5, 4), seed, cutmix_minmax=(0.2, 0.8))
    assert_frequencies(boxes(found), minmax_law((5, 4), (0.2, 0.8)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_kinds_and_weights_follow_their_distributions(mode, seed):
    options = dict(mixup_alpha=0.4, cutmix_alpha=2.0, prob=0.8, switch_prob=0.3, mode=mode)
    find = drawn if mode == "elem" else drawn_in_batches
    found = find(ODD_AND_EVEN, seed, DRAWS if mode == "elem" else 5000, **options)
    assert_frequencies(found.kind.tolist(), {0: 0.2, 1: 0.8 * 0.7, 2: 0.8 * 0.3})
    for kind, alpha in ((Kind.MIXUP, 0.4), (Kind.CUTMIX, 2.0)):
        assert stats.kstest(found.weight[found.kind == kind], stats.beta(alpha, alpha).cdf).pvalue > P
    assert not found.weight[found.kind == Kind.NONE].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_sides_and_centres_at_size(seed):
    """Against a simulation of timm's distribution, on an image with too many boxes for a χ² test."""
    size, count = np.array((48, 64)), 100_000
    found = drawn(size, seed, cutmix_alpha=0.5)
    rng = np.random.default_rng([seed, 1])
    side = (size * np.sqrt(rng.beta(0.5, 0.5, size=(count, 1)))).astype(int)
    low = rng.integers(0, size, size=(count, 2)) - side // 2
    box = np.concatenate([np.clip(low, 0, size), np.clip(low + side, 0, size)], axis=1)
    for ours, theirs in [
        *zip(found.box.T, box.T, strict=True),
        ((found.box[:, 2:] - found.box[:, :2]).prod(1), (box[:, 2:] - box[:, :2]).prod(1)),
    ]:
        assert stats.ks_2samp(ours, theirs).pvalue > P


@pytest.mark.parametrize("seed", SEEDS)
def test_partners_are_uniform_over_the_other_samples(seed):
    n = 50
    found = [derangement(rng, n) for rng in [np.random.default_rng(seed)] for _ in range(400)]
    assert all(sorted(partner) == list(range(n)) for partner in found)
    offset = (np.stack(found) - np.arange(n)) % n
    assert_frequencies(offset.ravel().tolist(), dict.fromkeys(range(1, n), 1 / (n - 1)))


def test_every_derangement_of_four_is_equally_likely():
    rng = np.random.default_rng(0)
    law = [p for p in permutations(range(4)) if all(i != k for i, k in enumerate(p))]
    assert len(law) == 9
    assert_frequencies([tuple(derangement(rng, 4).tolist()) for _ in range(5000)], dict.fromkeys(law, 1 / 9))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup_alpha": 0.8, "prob": 0.7, "switch_prob": 0.4},
        {"cutmix_minmax": (0.2, 0.8)},
        {"cutmix_alpha": 0.3},
    ],
    ids=["cutmix", "mix", "minmax", "small alpha"],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_graph_draws_from_the_same_distribution(options, seed):
    """`fn.mix` against `draw`: kinds, drawn weights, and each edge of the box."""
    size = (9, 14)
    graph, host = emitted(size, seed, correct_lam=False, **options), drawn(size, seed, **options)
    table = [[Counter(kinds.tolist())[kind] for kind in (0, 1, 2)] for kinds in (graph.kind, host.kind)]
    table = [column for column in zip(*table, strict=True) if any(column)]
    if len(table) > 1:
        assert stats.chi2_contingency(np.transpose(table)).pvalue > P
    for kind in (Kind.MIXUP, Kind.CUTMIX):
        ours, theirs = graph.kind == kind, host.kind == kind
        if "cutmix_minmax" not in options and theirs.any():
            assert stats.ks_2samp(graph.lam0[ours], host.weight[theirs]).pvalue > P
        for edge in range(4 if theirs.any() and kind == Kind.CUTMIX else 0):
            assert stats.ks_2samp(graph.box[ours, edge], host.box[theirs, edge]).pvalue > P


# Boundary cases


def test_a_tiny_alpha_gives_nothing_or_everything():
    found = drawn((7, 9), 0, 2000, cutmix_alpha=1e-9)
    assert set(np.unique(found.weight)) == {0, 1}
    sides = found.box[:, 2:] - found.box[:, :2]
    assert (sides[found.weight == 0].min(1) == 0).all()
    assert np.isfinite(found.weight).all()


def test_a_huge_alpha_gives_halves():
    found = drawn((1000, 1000), 0, 500, cutmix_alpha=1e9)
    np.testing.assert_allclose(found.weight, 0.5, atol=1e-3)
    inner = (found.box > 0).all(1) & (found.box < 1000).all(1)
    assert np.isin(found.box[inner, 2] - found.box[inner, 0], (706, 707)).all()


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"prob": 0.0}, {0}),
        ({"mixup_alpha": 1.0, "prob": 0.0}, {0}),
        ({"mixup_alpha": 1.0, "switch_prob": 0.0}, {1}),
        ({"mixup_alpha": 1.0, "switch_prob": 1.0}, {2}),
        ({"mixup_alpha": 1.0, "cutmix_alpha": 0.0, "switch_prob": 1.0}, {1}),
        ({"switch_prob": 0.0}, {2}),
        ({"cutmix_alpha": 0.0, "cutmix_minmax": (0.0, 1.0)}, {2}),
        ({"prob": 0.5}, {0, 2}),
    ],
)
def test_kinds_that_occur(options, kinds):
    found = drawn((6, 5), 0, 500, **options)
    assert set(found.kind.tolist()) == kinds
    assert not found.box[found.kind != Kind.CUTMIX].any()


def test_minmax_from_nothing_to_almost_everything():
    """Sides from 0 to one less than the image's, because NumPy's `randint` excludes its end."""
    found = drawn((3, 4), 0, 5000, cutmix_minmax=(0.0, 1.0))
    sides = found.box[:, 2:] - found.box[:, :2]
    assert [set(side) for side in sides.T.tolist()] == [{0, 1, 2}, {0, 1, 2, 3}]
    assert (found.box[:, 2:] <= (3, 4)).all()
    assert (found.box[:, 2:].max(0) == (3, 4)).all()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("options", [{}, {"mixup_alpha": 1.0}, {"mode": "batch"}, {"cutmix_minmax": (0.0, 1.0)}])
def test_the_smallest_batches(n, options):
    for seed in range(20):
        found = drawn((6, 5), seed, n, **options)
        assert found.partner.tolist() == ([0] if n == 1 else [1, 0])
        if n == 1:
            assert not any(field.any() for field in found[1:])


def test_nothing_to_mix_and_no_samples():
    rng = np.random.default_rng(0)
    assert not any(field.any() for field in draw(rng, 5, (4, 4), None)[1:])
    empty = draw(rng, 0, (4, 4), Mixing())
    assert [len(field) for field in empty] == [0] * 4


@pytest.mark.parametrize("options", [{}, {"mixup_alpha": 0.8, "prob": 0.8}, {"cutmix_minmax": (0.2, 0.8)}])
def test_a_batch_has_one_draw_and_many_partners(options):
    for seed in range(20):
        found = drawn((16, 15), seed, 8, mode="batch", **options)
        assert all((field == field[0]).all() for field in (found.kind, found.box, found.weight))
        assert sorted(found.partner) == list(range(8))
        several = drawn((16, 15), seed, 8, mode="elem", **options)
        assert len(np.unique(several.box, axis=0)) > 1 or len(set(several.kind.tolist())) > 1


def test_draw_depends_only_on_the_generator():
    options = dict(mixup_alpha=0.8, prob=0.9)
    first, again, other = (drawn((6, 5), seed, 64, **options) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    before = np.random.default_rng(3)
    state = before.bit_generator.state
    one = draw(before, 8, (6, 5), Mixing(**options))
    assert before.bit_generator.state != state
    before.bit_generator.state = state
    assert all(np.array_equal(a, b) for a, b in zip(one, draw(before, 8, (6, 5), Mixing(**options)), strict=True))


# What the paste receives

MIXINGS = st.builds(
    Mixing,
    mixup_alpha=st.sampled_from([0.0, 1e-3, 0.8, 1e3]),
    cutmix_alpha=st.sampled_from([1e-3, 1.0, 1e3]),
    cutmix_minmax=st.sampled_from([None, (0.0, 1.0), (0.2, 0.8), (0.0, 0.01)]),
    prob=st.sampled_from([0.0, 0.5, 1.0]),
    switch_prob=st.sampled_from([0.0, 0.5, 1.0]),
    mode=st.sampled_from(["elem", "batch"]),
    correct_lam=st.booleans(),
)
SIDES = st.one_of(st.integers(1, 9), st.integers(1, 4096))


@settings(deadline=None, max_examples=200)
@given(mixing=MIXINGS, n=st.integers(1, 17), size=st.tuples(SIDES, SIDES), seed=st.integers(0, 2**32 - 1))
def test_no_box_leaves_the_image(mixing, n, size, seed):
    found = draw(np.random.default_rng(seed), n, size, mixing)
    assert [field.dtype for field in found] == [np.int32, np.int32, np.int32, np.float32]
    assert all(field.flags.c_contiguous for field in found)  # DALI accepts no strides
    assert ((found.partner >= 0) & (found.partner < n)).all()
    assert (found.box >= 0).all() and (found.box[:, 2:] <= size).all() and (found.box[:, :2] <= found.box[:, 2:]).all()
    assert not found.box[found.kind != Kind.CUTMIX].any()
    assert not found.weight[found.kind == Kind.NONE].any()
    ids, anchors, shapes = patches(found, size)
    assert [(a.dtype, a.flags.c_contiguous) for a in (ids, anchors, shapes)] == [(np.int32, True)] * 3
    assert ((ids >= 0) & (ids < n)).all() and (ids[:, 0] == np.arange(n)).all()
    assert (shapes >= 1).all() and (anchors >= 0).all() and (anchors + shapes <= size).all()
    assert not anchors[:, 0].any() and (shapes[:, 0] == size).all()
    for i, (kind, box) in enumerate(zip(found.kind, found.box.tolist(), strict=True)):
        patch = (ids[i, 1], *anchors[i, 1], *shapes[i, 1])
        if kind == Kind.MIXUP:
            assert patch == (found.partner[i], 0, 0, *size)
        elif (box[2] - box[0]) * (box[3] - box[1]):
            assert patch == (found.partner[i], *box[:2], box[2] - box[0], box[3] - box[1])
        else:
            assert patch == (i, 0, 0, 1, 1)


# The loader's graph, with its inputs

BATCHES = (8, 8, 3, 1, 2)
GRAPHS = {
    "cutmix": {},
    "batch": {"mode": "batch"},
    "prob": {"prob": 0.5},
    "mix": {"mixup_alpha": 0.8, "prob": 0.8},
    "minmax": {"cutmix_minmax": (0.0, 1.0)},
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
    "uncorrected": {"mixup_alpha": 0.8, "correct_lam": False},
    "uncorrected cutmix": {"correct_lam": False},
    "small boxes": {"cutmix_alpha": 0.05, "mixup_alpha": 0.05},
}


def contents(count=8):
    return [np.frombuffer(encoded(ramps(40, 48, blue=9 * k) * [4, 5, 1], "PNG"), np.uint8) for k in range(count)]


def delivered(size, mixing, batch_sizes=BATCHES):
    """Batches (images uint8 [n, H, W, 3], target, the graph's inputs) of `train_pipeline` on the CPU."""
    import torch

    transform = pipelines.TrainTransform(size=size, dtype="uint8", channels_last=True, hflip=0.0, scale=(1.0, 1.0))
    feed = SmallFeed(contents(), transform.size, mixing, batch_sizes=batch_sizes, paths=False)
    pipe = pipelines.train_pipeline(
        feed, transform, batch_size=8, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1
    )
    for step in range(len(batch_sizes)):
        images, *outputs = (torch.tensor(np.array(output.as_array())) for output in pipe.run())
        target, index = unpack(outputs, True)
        yield images.numpy(), MixTarget(*(field.numpy() for field in target)), index.numpy(), feed.planned[step]


@pytest.mark.parametrize("size", [(9, 20), (1, 1), (7, 1)])
@pytest.mark.parametrize("name", GRAPHS)
def test_pixels_and_lam0_match_the_target(name, size):
    """Against the oracle's mixing of the images that the same graph gives without mixing."""
    mixing = Mixing(**GRAPHS[name])
    plain = (images for images, *_ in delivered(size, None))
    for (mixed, target, index, planned), images in zip(delivered(size, mixing), plain, strict=True):
        expected = reference.mix_images(images, target.partner, target.box, target.kind, target.lam0)
        blended = target.kind == Kind.MIXUP
        np.testing.assert_array_equal(mixed[~blended], expected[~blended])
        np.testing.assert_allclose(mixed[blended].astype(int), expected[blended].astype(int), atol=1)
        np.testing.assert_array_equal(target.labels, index)
        np.testing.assert_array_equal(target.partner_labels, index[target.partner])
        assert_counted(target, size, mixing, planned)


def assert_counted(target, size, mixing, planned):
    """λ0 bit exact: the float32 quotient of pixel counts; for Mixup the drawn weight."""
    area = (target.box[:, 2:] - target.box[:, :2]).prod(1)
    counted = (area.astype(np.float32) / np.float32(np.prod(size))).astype(np.float32)
    drawn = planned.get("opacity", planned.get("lam0"))
    is_cutmix, is_mixup = target.kind == Kind.CUTMIX, target.kind == Kind.MIXUP
    if mixing.counts_lam0:
        np.testing.assert_array_equal(target.lam0[is_cutmix], counted[is_cutmix])
    else:
        np.testing.assert_array_equal(target.lam0, planned["lam0"])
    if is_mixup.any():
        np.testing.assert_array_equal(target.lam0[is_mixup], drawn[is_mixup])
    assert not target.lam0[target.kind == Kind.NONE].any()


@settings(deadline=None, max_examples=100)
@given(mixing=MIXINGS, n=st.integers(1, 9))
def test_a_plan_has_the_form_that_the_graph_takes(mixing, n):
    """dtype, dimensions and contiguity of each input; labels and indices travel unchanged."""
    plan, labels = Plan(1, 2, 3, (6, 5), mixing, True), np.arange(n) + 2**40
    arrays = plan.batch(4, labels, labels + 1)
    dtypes = {"target": np.int32, "is_mixup": bool, "opacity": np.float32, "lam0": np.float32}
    dimensions = {"target": 3, "ids": 2, "anchors": 3, "shapes": 3}
    for name, array in arrays.items():
        assert (array.dtype, array.ndim, len(array)) == (dtypes.get(name, np.int32), dimensions.get(name, 1), n), name
        assert array.flags.c_contiguous, name
    words = arrays["target"].view(np.int64)[..., 0]
    np.testing.assert_array_equal(words[:, LABEL], labels)
    np.testing.assert_array_equal(words[:, INDEX], labels + 1)
    again = plan.batch(4, labels, labels + 1)
    assert list(arrays) == list(again) and all(np.array_equal(arrays[name], again[name]) for name in arrays)


@pytest.mark.parametrize("word", range(4))
def test_plans_differ_by_seed_epoch_rank_and_iteration(word):
    def target(*words):
        *plan, iteration = words
        return Plan(*plan, (30, 40), Mixing(), True).batch(iteration, np.arange(16), np.arange(16))["target"]

    words = [5, 6, 7, 8]
    assert np.array_equal(target(*words), target(*words))
    words[word] += 1
    assert not np.array_equal(target(*words), target(5, 6, 7, 8))
