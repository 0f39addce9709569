"""The graph matches its target: pixels, pairing, checkpoints, devices, bad input.

Every batch is checked against the NumPy oracle, given the target that the graph emitted. Partners are
read from unique labels, and λ0 is recounted from pixels that carry the colour of one sample.
The distributions of the draws are tested in `test_fn_law.py`.
"""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

import lumix_dali.fn as mixfn
from lumix_dali import reference
from lumix_dali.mixing import Draw, Mixing
from lumix_dali.target import Kind, MixTarget

BATCH_SIZES = (1, 2, 7, 8)
SIZES = {"square": (16, 16), "odd": (15, 15), "non-square": (9, 20)}
OPERATIONS = {
    "cutmix": (mixfn.cutmix, {}),
    "mixup": (mixfn.mixup, {}),
    "mix": (mixfn.mix, {"mixup_alpha": 0.8, "prob": 0.8}),
}
MODES = ("elem", "batch")
ON_GPU = ("images", *MixTarget._fields)


def batch_of(count, size=(16, 16), seed=0):
    """Random images whose channel 0 is a constant unique in the batch, and unique labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    images[..., 0] = rng.permutation(256)[:count, None, None]
    return images, rng.permutation(1000)[:count]


def pairing(labels, partner_labels):
    """Index of each sample's partner, from unique labels."""
    rows, partner = np.nonzero(partner_labels[:, None] == labels)
    np.testing.assert_array_equal(rows, np.arange(len(labels)))
    return partner


def assert_types(images, mixed, target):
    count = len(images)
    assert (mixed.shape, mixed.dtype) == (images.shape, np.uint8)
    assert [field.dtype for field in target] == [np.int64, np.int64, np.float32, np.int32, np.int32, np.int64]
    assert [field.shape for field in target] == [(count,), (count,), (count,), (count, 4), (count,), (count,)]


def assert_pixels(images, partner, mixed, target):
    """Bit exact, except for Mixup, which may differ from the rounded float64 blend by one grey level."""
    expected = reference.mix_images(images, partner, target.box, target.kind, target.lam0)
    blended = target.kind == Kind.MIXUP
    np.testing.assert_array_equal(mixed[~blended], expected[~blended])
    np.testing.assert_allclose(mixed[blended].astype(int), expected[blended].astype(int), atol=1)


def assert_true(images, labels, mixed, target, counted=True):
    """`mixed` matches `images` and `target`; with `counted`, λ0 is the share of pixels from the partner."""
    assert_types(images, mixed, target)
    np.testing.assert_array_equal(target.labels, labels)
    partner = pairing(labels, target.partner_labels)
    np.testing.assert_array_equal(target.partner, partner)
    assert sorted(partner) == list(range(len(labels)))
    assert_pixels(images, partner, mixed, target)
    assert not target.box[target.kind != Kind.CUTMIX].any()
    assert not target.lam0[target.kind == Kind.NONE].any()
    if len(labels) == 1:
        assert target.kind == Kind.NONE
        return
    assert (partner != np.arange(len(labels))).all()
    if counted:
        colour, pasted = images[:, 0, 0, 0], target.kind != Kind.MIXUP
        arrived = (mixed[..., 0] == colour[partner][:, None, None]).mean((1, 2))
        np.testing.assert_allclose(target.lam0[pasted], arrived[pasted], rtol=1e-6)


def assert_one_draw(target):
    """One kind, box and λ0 per batch."""
    for field in (target.kind, target.lam0, target.box):
        assert (field == field[0]).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", BATCH_SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_match_the_target(graph, name, mode, count, size):
    operation, options = OPERATIONS[name]
    run = graph(operation, count, mode=mode, **options)
    varied = False
    for step in range(6):
        images, labels = batch_of(count, SIZES[size], seed=step)
        mixed, target = run(images, labels)
        assert_true(images, labels, mixed, target)
        if mode == "batch":
            assert_one_draw(target)
        varied |= len(np.unique(target.lam0)) > 1
    assert varied == (mode == "elem" and count > 1)


@pytest.mark.parametrize("mode", MODES)
def test_partial_batches(graph, mode):
    run = graph(mixfn.mix, 8, mixup_alpha=0.8, mode=mode)
    for step, count in enumerate((8, 8, 3, 8, 1, 2, 8, 7)):
        images, labels = batch_of(count, seed=step)
        assert_true(images, labels, *run(images, labels))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_labels_from_readers_and_from_lists(graph, shape, dtype):
    images, labels = batch_of(7)
    labels = (labels % 97 + np.arange(7) * 2).astype(dtype)
    if dtype == np.int64:
        labels += 2**53 + 1  # beyond the integers that a float32 can represent
    mixed, target = graph(mixfn.cutmix)(images, labels.reshape(7, *shape))
    assert len(set(labels)) == 7
    assert_true(images, labels, mixed, target)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(graph, channels):
    images, labels = batch_of(8)
    images = np.resize(images.transpose(3, 0, 1, 2), (channels, 8, 16, 16)).transpose(1, 2, 3, 0).copy()
    assert_true(images, labels, *graph(mixfn.mix, mixup_alpha=0.8)(images, labels))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"prob": 0.0}, {0}),
        ({"prob": 0.0, "mixup_alpha": 0.8}, {0}),
        ({"prob": 0.5}, {0, 2}),
        ({"prob": 0.5, "cutmix_alpha": 0.0, "mixup_alpha": 0.8}, {0, 1}),
        ({"prob": 0.5, "mixup_alpha": 0.8}, {0, 1, 2}),
        ({"mixup_alpha": 0.8}, {1, 2}),
        ({"mixup_alpha": 0.8, "switch_prob": 1.0}, {2}),
        ({"mixup_alpha": 0.8, "switch_prob": 0.0}, {1}),
        ({"cutmix_alpha": 0.0, "cutmix_minmax": (0.2, 0.8)}, {2}),
    ],
)
def test_kinds_that_occur(graph, mode, options, kinds):
    run, seen = graph(mixfn.mix, mode=mode, **options), set()
    for step in range(30):
        images, labels = batch_of(8, (6, 6), seed=step)
        mixed, target = run(images, labels)
        assert_true(images, labels, mixed, target)
        seen |= set(target.kind.tolist())
    assert seen == kinds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alphas", [{}, {"mixup_alpha": 0.8}, {"mixup_alpha": 0.8, "cutmix_alpha": 0.0}])
def test_prob_changes_at_run_time(graph, mode, alphas):
    def gated(images, labels, gate):
        return mixfn.mix(images, labels, prob=gate, mode=mode, **alphas)

    run = graph(gated)
    for step, gate in enumerate((1.0, 0.0, 1.0, 1.0, 0.0)):
        images, labels = batch_of(8, seed=step)
        mixed, target = run(images, labels, gate=np.full(8, gate, np.float32))
        assert_true(images, labels, mixed, target)
        assert ((target.kind > 0) == gate).all()
    images, labels = batch_of(1)
    assert_true(images, labels, *run(images, labels, gate=np.ones(1, np.float32)))


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.8])
def test_drawn_weight_without_correction(graph, mixup_alpha):
    """λ0 is then the drawn weight: at some centre its box is the emitted one."""
    size = (9, 20)
    run, clipped = graph(mixfn.mix, mixup_alpha=mixup_alpha, correct_lam=False), 0
    for step in range(5):
        images, labels = batch_of(8, size, seed=step)
        mixed, target = run(images, labels)
        assert_true(images, labels, mixed, target, counted=False)
        for lam0, box, kind in zip(target.lam0, target.box, target.kind, strict=True):
            if kind == Kind.CUTMIX:
                boxes = {reference.cut_box(size, lam0, centre) for centre in np.ndindex(size)}
                assert tuple(box) in boxes
                clipped += abs(reference.count_lam0([box], size)[0] - lam0) > 0.1
    assert clipped


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("correct_lam", [True, False])
def test_minmax_counts_its_boxes(graph, correct_lam, mode):
    size = (10, 20)
    run = graph(mixfn.mix, cutmix_minmax=(0.2, 0.6), correct_lam=correct_lam, mode=mode)
    for step in range(5):
        images, labels = batch_of(8, size, seed=step)
        mixed, target = run(images, labels)
        assert_true(images, labels, mixed, target)  # λ0 is counted in both cases, as in timm
        sides = target.box[:, 2:] - target.box[:, :2]
        assert (([2, 4] <= sides) & (sides < [6, 12])).all()


def apply_given(images, labels, partner, kind, box, weight):
    return mixfn.apply(images, labels, Draw(partner, kind, box, weight), Mixing(mixup_alpha=1.0))


def given_batch(size=(9, 20)):
    """Eight samples of every kind, with boxes at every edge, and partners that are not a permutation."""
    height, width = size
    box = [
        [2, 3, 7, 11],
        [0, 0, 0, 0],
        [0, 0, height, width],
        [4, 5, 4, 9],
        [height - 1, 0, height, width],
        [1, 2, 3, 4],
        [0, 0, height, width],
        [3, width, 6, width],
    ]
    kind = np.int32([2, 2, 2, 2, 2, 1, 0, 2])
    return {
        "partner": np.int32([3, 3, 3, 0, 4, 7, 6, 2]),
        "kind": kind,
        "box": np.int32(box) * (kind == Kind.CUTMIX)[:, None],
        "weight": np.float32([0.9, 0.9, 0.9, 0.9, 0.9, 0.3, 0.0, 0.9]),
    }


def test_given_draws(graph):
    size, drawn = (9, 20), given_batch()
    images, labels = batch_of(8, size)
    mixed, target = graph(apply_given)(images, labels, **drawn)
    assert_types(images, mixed, target)
    is_cutmix = drawn["kind"] == Kind.CUTMIX
    box = drawn["box"] * is_cutmix[:, None]
    lam0 = reference.count_lam0(box, size) + drawn["weight"] * (drawn["kind"] == Kind.MIXUP)
    expected = MixTarget(
        labels, labels[drawn["partner"]], lam0.astype(np.float32), box, drawn["kind"], drawn["partner"]
    )
    for field, wanted in zip(target, expected, strict=True):
        np.testing.assert_allclose(field, wanted, rtol=1e-6)
    assert_pixels(images, drawn["partner"], mixed, target)
    assert set(target.lam0) >= {0, 1}  # empty boxes and a whole image


def apply_boxes(images, labels, partner, kind, box):
    return mixfn.apply(images, labels, Draw(partner, kind, box, partner * 0.0), Mixing())


def apply_weights(images, labels, partner, kind, weight, size=None):
    drawn = Draw(partner, kind, kind * np.zeros(4, np.int32), weight)
    return mixfn.apply(images, labels, drawn, Mixing(mixup_alpha=1.0, cutmix_alpha=0.0), size)


@pytest.mark.parametrize(("operation", "kind"), [(apply_boxes, Kind.CUTMIX), (apply_weights, Kind.MIXUP)])
def test_only_boxes_or_only_weights_given(graph, operation, kind):
    images, labels = batch_of(8, (9, 20))
    drawn = given_batch() | {"kind": np.int32([kind, 0] * 4)}
    drawn["box"] *= (drawn["kind"] == Kind.CUTMIX)[:, None]
    drawn["weight"] *= drawn["kind"] == Kind.MIXUP
    del drawn["weight" if kind == Kind.CUTMIX else "box"]
    mixed, target = graph(operation)(images, labels, **drawn)
    assert_types(images, mixed, target)
    np.testing.assert_array_equal(target.kind, drawn["kind"])
    np.testing.assert_array_equal(target.partner_labels, labels[drawn["partner"]])
    assert_pixels(images, drawn["partner"], mixed, target)


@pytest.mark.parametrize("size", [None, (256, 256)], ids=["by bytes", "by words"])
def test_every_pair_of_levels_blends_within_one_level(graph, size):
    """Includes weights that split white into two parts ending in .5: both rounded up would give 256."""
    own, other = np.mgrid[:256, :256].astype(np.uint8)
    weight = np.float32([0, 1, 0.5, 1e-6, *(np.arange(0, 255, 10) + 0.5) / 255, 1 / 3, 0.999, 1 - 2**-24])
    count = len(weight)
    drawn = {"partner": np.int32([count] * count + [0]), "kind": np.int32([Kind.MIXUP] * count + [0])}
    images = np.stack([own] * count + [other])[..., None]
    weight = np.append(weight, np.float32(0))
    mixed, _ = graph(partial(apply_weights, size=size), count + 1)(images, np.arange(count + 1), weight=weight, **drawn)
    weight = weight[:, None, None, None].astype(np.float64)
    blend = images * (1 - weight) + images[drawn["partner"]] * weight
    # both halves are rounded
    assert np.abs(mixed - blend).max() <= 1 + 1e-4


def test_the_drawn_lam0_is_emitted_unchanged(graph):
    def weighed(images, labels, partner, kind, box, weight):
        return mixfn.apply(images, labels, Draw(partner, kind, box, weight), Mixing(mixup_alpha=1.0, correct_lam=False))

    images, labels = batch_of(8, (9, 20))
    drawn = given_batch()
    _, target = graph(weighed)(images, labels, **drawn)
    np.testing.assert_array_equal(target.lam0, drawn["weight"])


def apply_sized(images, labels, partner, kind, box, size):
    return mixfn.apply(images, labels, Draw(partner, kind, box, partner * 0.0), Mixing(), size)


@pytest.mark.parametrize("known", [(9, 20), (5, 20), (5, 7), (9, 21), (10, 20)])
def test_a_wrong_size_never_corrupts(graph, known):
    """Smaller: the images leave cropped, and λ0 is right for them, or the batch is not uniform. Larger: an error."""
    images, labels = batch_of(8, (9, 20))
    drawn = given_batch()
    drawn["kind"][:] = Kind.CUTMIX
    drawn["box"][:] = 1, 2, 5, 6
    del drawn["weight"]
    run = graph(apply_sized, size=known)
    if max(np.array(known) - (9, 20)) > 0:
        with pytest.raises(RuntimeError):
            run(images, labels, **drawn)
        return
    mixed, target = run(images, labels, **drawn)
    assert_true_but_partner = reference.mix_images(
        images[:, : known[0], : known[1]], drawn["partner"], target.box, target.kind, target.lam0
    )
    np.testing.assert_array_equal(mixed, assert_true_but_partner)
    np.testing.assert_allclose(target.lam0, 16 / np.prod(known), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.int32, 1), (np.float32, 2)])
def test_masks_are_pasted_with_the_boxes_of_their_images(device, dtype, channels):
    """`paste` moves exactly the pixels that CutMix moves; samples of Mixup keep their own."""
    images, labels = batch_of(8, (15, 20))
    masks = (np.random.default_rng(1).random((8, 15, 20, channels)) * 100).astype(dtype)
    mixing = Mixing(mixup_alpha=0.8, prob=0.8)

    @pipeline_def(batch_size=8, num_threads=1, device_id=0 if device == "gpu" else None, seed=2)
    def define():
        given = fn.external_source(lambda: (images, labels, masks), num_outputs=3, layout=["HWC", "", "HWC"])
        on_device = [node.gpu() if device == "gpu" else node for node in given]
        drawn = mixfn.draw((15, 20), mixing)
        return mixfn.paste(on_device[2], drawn), *mixfn.apply(on_device[0], given[1], drawn, mixing)[1]

    pipe, kinds = define(), set()
    for _ in range(4):
        pasted, *target = (np.array(output.as_cpu().as_array()) for output in pipe.run())
        target = MixTarget(*target)
        for own, mask, partner, (y0, x0, y1, x1) in zip(masks, pasted, target.partner, target.box, strict=True):
            expected = own.copy()
            expected[y0:y1, x0:x1] = masks[partner][y0:y1, x0:x1]
            np.testing.assert_array_equal(mask, expected)
        kinds |= set(target.kind.tolist())
    assert kinds == {Kind.NONE, Kind.MIXUP, Kind.CUTMIX}


@pytest.mark.parametrize("options", [{"prob": 0.5}, {"mixup_alpha": 0.8, "prob": 0.9}], ids=str)
def test_images_without_a_layout_are_mixed(options):
    """`multi_paste` names its layout, the samples that bypass it must agree."""
    images, labels = batch_of(16)

    @pipeline_def(batch_size=16, num_threads=1, device_id=None, seed=1)
    def define():
        mixed, target = mixfn.mix(*fn.external_source(lambda: (images, labels), num_outputs=2), **options)
        return mixed, *target

    pipe = define()
    for _ in range(5):
        mixed, *target = (np.array(output.as_array()) for output in pipe.run())
        assert_true(images, labels, mixed, MixTarget(*target))


def test_unmixed(graph, device):
    def plain(images, labels):
        return images, mixfn.unmixed(labels, device)

    images, labels = batch_of(5)
    mixed, target = graph(plain)(images, labels[:, None])
    assert_types(images, mixed, target)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(target.labels, labels)
    np.testing.assert_array_equal(target.partner_labels, labels)
    assert not any(field.any() for field in (target.lam0, target.box, target.kind, target.partner))


def checkpointed(device, seed, checkpoint=None, **options):
    def source(info):
        step = info.iteration + 100 * info.epoch_idx
        return batch_of(8, (6, 7), seed=step)

    @pipeline_def(
        batch_size=8,
        num_threads=2,
        device_id=0 if device == "gpu" else None,
        seed=seed,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    def define():
        images, labels = fn.external_source(source=source, num_outputs=2, batch_info=True, layout=("HWC", ""))
        mixed, target = mixfn.mix(images.gpu() if device == "gpu" else images, labels, **options)
        return mixed, *target

    pipe = define()
    pipe.build()
    return pipe


def run_steps(pipe, steps):
    return [[np.array(output.as_cpu().as_array()) for output in pipe.run()] for _ in range(steps)]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 0.8, "prob": 0.7},
        {"mode": "batch"},
        {"cutmix_minmax": (0.2, 0.8)},
    ],
    ids=["mix", "batch", "minmax"],
)
def test_checkpoints_restore_bit_exactly(device, options, steps):
    pipe = checkpointed(device, 1, **options)
    run_steps(pipe, steps)
    checkpoint = pipe.checkpoint()
    expected = run_steps(pipe, 3)
    restored = run_steps(checkpointed(device, 2, checkpoint, **options), 3)
    for before, after in zip(expected, restored, strict=True):
        for wanted, got in zip(before, after, strict=True):
            np.testing.assert_array_equal(got, wanted)
    if steps:  # otherwise the seed alone would explain it
        other = run_steps(checkpointed(device, 2, **options), 1)
        assert any((wanted != got).any() for wanted, got in zip(expected[0], other[0], strict=True))


def gpu_graph(operation, **options):
    """A GPU graph, defined without a GPU: operators by device, their names, and the outputs' devices."""
    outputs = {}

    @pipeline_def(batch_size=8, num_threads=2, device_id=0, seed=0)
    def define():
        images = fn.external_source(name="images", layout="HWC").gpu()
        labels = fn.external_source(name="labels")
        mixed, target = operation(images, labels, **options)
        outputs.update(zip(ON_GPU, (mixed, *target), strict=False))
        return mixed, *target

    pipe = define()
    pipe._build_graph()
    devices = Counter(op._op.device for op in pipe._ops)
    names = " ".join(type(op._op).__name__ for op in pipe._ops).lower()
    return devices, names, {name: node.device for name, node in outputs.items()}


@pytest.mark.parametrize(
    ("alphas", "budget"),
    [
        ({}, 33),
        ({"mixup_alpha": 0.8}, 43),
        ({"mixup_alpha": 0.8, "cutmix_alpha": 0.0}, 8),
    ],
    ids=["cutmix", "mix", "mixup"],
)
def test_gpu_graph_stays_within_the_budget(alphas, budget):
    """All outputs are made on the GPU, and the draw adds few CPU operators. Constants cost nothing."""
    without, _, _ = gpu_graph(lambda images, labels: (images, (labels,)))
    devices, names, outputs = gpu_graph(mixfn.mix, **alphas)
    assert outputs == dict.fromkeys(ON_GPU, "gpu")
    assert devices["cpu"] - without["cpu"] - names.count("constant") <= budget
    assert devices["gpu"]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "batch", "mixup_alpha": 0.8},
        {"cutmix_minmax": (0.2, 0.8)},
        {"mixup_alpha": 0.8, "correct_lam": False},
    ],
)
def test_every_gpu_graph_delivers_from_the_gpu(options):
    assert gpu_graph(mixfn.mix, **options)[2] == dict.fromkeys(ON_GPU, "gpu")


def test_unmixed_delivers_from_the_gpu():
    outputs = gpu_graph(lambda images, labels: (images, mixfn.unmixed(labels, "gpu")))[2]
    assert outputs == dict.fromkeys(ON_GPU, "gpu")


def test_disabled_mixing_is_not_in_the_graph():
    blend, paste = ("brightnesscontrast",), ("multipaste", "uniform")
    both = gpu_graph(mixfn.mix, mixup_alpha=0.8)[1]
    assert all(name in both for name in (*blend, *paste))
    assert not any(name in gpu_graph(mixfn.cutmix)[1] for name in blend)
    assert not any(name in gpu_graph(mixfn.mixup)[1] for name in paste)


BAD = [
    ({"cutmix_alpha": -1.0}, "cutmix_alpha=-1.0", "a finite number >= 0"),
    ({"mixup_alpha": -0.1}, "mixup_alpha=-0.1", "a finite number >= 0"),
    ({"mixup_alpha": float("nan")}, "mixup_alpha=nan", "finite"),
    ({"cutmix_alpha": float("inf")}, "cutmix_alpha=inf", "finite"),
    ({"cutmix_alpha": None}, "cutmix_alpha=None", "finite"),
    ({"cutmix_alpha": 0.0}, "mixup_alpha=0, cutmix_alpha=0", "give one of them"),
    ({"prob": 1.5}, "prob=1.5", r"\[0, 1\]"),
    ({"prob": -0.1}, "prob=-0.1", r"\[0, 1\]"),
    ({"prob": float("nan")}, "prob=nan", r"\[0, 1\]"),
    ({"switch_prob": 2}, "switch_prob=2", r"\[0, 1\]"),
    ({"switch_prob": -1}, "switch_prob=-1", r"\[0, 1\]"),
    ({"mode": "pair"}, "mode='pair'", "not supported.*'elem'.*'batch'"),
    ({"mode": "half"}, "mode='half'", "'elem'.*'batch'"),
    ({"cutmix_minmax": (0.8, 0.2)}, r"cutmix_minmax=\(0.8, 0.2\)", "low < high"),
    ({"cutmix_minmax": (0.2, 1.2)}, r"cutmix_minmax=\(0.2, 1.2\)", r"two numbers, each a number in \[0, 1\]"),
    ({"cutmix_minmax": (-0.1, 0.5)}, r"cutmix_minmax=\(-0.1, 0.5\)", r"two numbers, each a number in \[0, 1\]"),
    ({"cutmix_minmax": 0.5}, "cutmix_minmax=0.5", "two numbers"),
    ({"cutmix_minmax": (0.2, 0.3, 0.4)}, r"cutmix_minmax=\(0.2, 0.3, 0.4\)", "two numbers"),
]


@pytest.mark.parametrize(("options", "value", "remedy"), BAD, ids=[value.replace("\\", "") for _, value, _ in BAD])
def test_invalid_arguments_are_named_with_a_remedy(options, value, remedy):
    with pytest.raises(ValueError, match=f"{value}.*{remedy}"):
        gpu_graph(mixfn.mix, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cutmix", "must have the same shape.*16 x 16 and 16 x 17|must have the same shape.*16 x 17 and 16 x 16"),
        ("mixup", "(?s)broadcast shapes.*16 x 1[67] x 3.*16 x 1[67] x 3"),
    ],
)
def test_images_of_unequal_size_are_an_error(graph, name, message):
    images = [np.zeros((16, width, 3), np.uint8) for width in (16, 17)]
    with pytest.raises(RuntimeError, match=message):
        graph(OPERATIONS[name][0])(images, np.arange(2))
