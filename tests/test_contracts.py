"""DALI's GPU kernels receive only what they can handle; checked on a CPU with the graph's own arguments.

Three contracts hold for `lumix_dali.fn`, `lumix_dali.augment` and the two pipelines:

- No region of zero height or width reaches `fn.multi_paste`: on a GPU it would spill over the image.
- All inputs of a paste have the image's size: a GPU reads every input as if it had the size of the first.
- No CPU operator reads GPU data: `exec_dynamic=False` refuses such a graph.

`gpu_paste` is DALI 2.4's GPU kernel in NumPy, including these faults. On the recorded arguments it must give the
same pixels as the CPU.
"""

from collections import Counter, defaultdict
from typing import NamedTuple, get_args

import numpy as np
import pytest
from conftest import SmallFeed
from images import encoded, ramps
from nvidia.dali import fn, pipeline_def, types
from test_fn import assert_true, batch_of, given_batch

import lumix_dali.fn as mixfn
from lumix_dali import augment
from lumix_dali.graph import branch
from lumix_dali.loading import pipelines
from lumix_dali.mixing import Draw, Mixing, draw, graph_inputs
from lumix_dali.target import Kind, MixTarget


def gpu_paste(images, in_anchors, out_anchors, shapes, size):
    """One sample: `CreateSampleDescriptors` and `PasteKernel` of DALI's kernels/imgproc/paste/paste_gpu.h.

    The image is split into patches at each region's edges. A sweep over them opens and closes regions, and the
    open region with the highest number provides the patch's pixels. -1 is the black background.
    """
    stops = out_anchors + shapes
    ys, xs = (sorted({0, size[d], *out_anchors[:, d].tolist(), *stops[:, d].tolist()}) for d in (0, 1))
    regions = {
        i: (ys.index(top), ys.index(bottom), xs.index(left), xs.index(right))
        for i, ((top, left), (bottom, right)) in enumerate(zip(out_anchors, stops, strict=True))
    }
    regions[-1] = 0, len(ys) - 1, 0, len(xs) - 1
    pitch = images[0].shape[1]
    mixed = np.zeros((*size, images[0].shape[2]), np.uint8)
    starting, ending, opened = defaultdict(set), defaultdict(set), set()
    for y in range(len(ys) - 1):
        for i, (top, _, left, right) in regions.items():
            if top == y:
                starting[left].add(i)
                ending[right].add(i)
        for x in range(len(xs) - 1):
            opened |= starting[x]
            last = max(opened)
            if last >= 0:
                rows, columns = np.mgrid[ys[y] : ys[y + 1], xs[x] : xs[x + 1]]
                row, column = in_anchors[last] - out_anchors[last]
                memory = images[last].reshape(-1, mixed.shape[2])
                mixed[rows, columns] = memory[(rows + row) * pitch + columns + column]
            opened -= ending[x + 1]
        for i, (_, bottom, left, right) in regions.items():
            if bottom == y + 1:
                starting[left].discard(i)
                ending[right].discard(i)
    return mixed


class Paste(NamedTuple):
    """One sample of a `multi_paste`: its inputs and its output."""

    images: list
    in_anchors: np.ndarray
    out_anchors: np.ndarray
    shapes: np.ndarray
    mixed: np.ndarray

    def on_gpu(self):
        size = self.mixed.shape[:2]
        return gpu_paste(self.images, self.in_anchors, self.out_anchors, self.shapes, size)


def recording(monkeypatch, operation, batch_size, names, seed=0):
    """A function of the named inputs that returns `operation(**nodes)` on the CPU and each sample's pastes."""
    original, calls = fn.multi_paste, []

    def multi_paste(*images, **arguments):
        calls.append((images, arguments, original(*images, **arguments)))
        return calls[-1][-1]

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=None, seed=seed, prefetch_queue_depth=1)
    def define():
        nodes = {name: fn.external_source(name=name, layout="HWC" * (name == "images")) for name in names}
        with monkeypatch.context() as patch:
            patch.setattr(fn, "multi_paste", multi_paste)
            outputs = operation(**nodes)
        count.append(len(outputs))
        recorded = [(*images, *arguments.values(), mixed) for images, arguments, mixed in calls]
        return *outputs, *(node for nodes in recorded for node in nodes)

    count = []
    pipe = define()
    pipe.build()

    def run(**inputs):
        found = [
            [np.array(sample) for sample in output]
            for output in pipe.run(**{name: list(values) for name, values in inputs.items()})
        ]
        outputs, rest, pastes = found[: count[0]], iter(found[count[0] :]), []
        for images, arguments, _ in calls:
            batches = [next(rest) for _ in images]
            given = {name: next(rest) for name in arguments}
            for i, mixed in enumerate(next(rest)):
                ids = given["in_ids"][i] if "in_ids" in given else None
                sources = [batch[i] for batch in batches] if ids is None else [batches[0][j] for j in ids]
                pastes.append(Paste(sources, *(given[name][i] for name in Paste._fields[1:4]), mixed))
        return outputs, pastes

    return run


def assert_contract(pastes):
    for paste in pastes:
        assert (paste.shapes > 0).all()
        assert {image.shape for image in paste.images} == {paste.mixed.shape}
        np.testing.assert_array_equal(paste.on_gpu(), paste.mixed)


# Mixing

OPTIONS = {
    "cutmix": {},
    "prob": {"prob": 0.5},
    "mix": {"mixup_alpha": 0.8, "prob": 0.8},
    "minmax": {"cutmix_minmax": (0.0, 1.0), "prob": 0.8},
    "small boxes": {"cutmix_alpha": 0.05},
    "uncorrected": {"mixup_alpha": 0.8, "correct_lam": False},
}
SIZES = [(9, 20), (4, 3), (1, 1), (1, 7), (7, 1)]
BATCHES = (8, 3, 8, 1, 2)


@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_pastes_of_a_mix(monkeypatch, size, name, mode):
    def operation(images, labels):
        mixed, target = mixfn.mix(images, labels, mode=mode, **OPTIONS[name])
        return mixed, *target

    run = recording(monkeypatch, operation, 8, ("images", "labels"))
    for step, count in enumerate(BATCHES):
        images, labels = batch_of(count, size, seed=step)
        outputs, pastes = run(images=images, labels=labels)
        mixed, *target = map(np.stack, outputs)
        target = MixTarget(*target)
        assert_true(images, labels, mixed, target, counted=name != "uncorrected")
        assert_contract(pastes)
        has_box = (target.box[:, 2:] > target.box[:, :2]).all(1)
        assert len(pastes) == has_box.sum()


def test_pastes_when_prob_changes_at_run_time(monkeypatch):
    def operation(images, labels, gate):
        mixed, target = mixfn.mix(images, labels, prob=gate, mixup_alpha=0.8)
        return mixed, *target

    run = recording(monkeypatch, operation, 8, ("images", "labels", "gate"))
    for step, gate in enumerate((0.0, 1.0, 0.5, 0.0)):
        images, labels = batch_of(8, (6, 5), seed=step)
        outputs, pastes = run(images=images, labels=labels, gate=np.full(8, gate, np.float32))
        mixed, *target = map(np.stack, outputs)
        assert_true(images, labels, mixed, MixTarget(*target))
        assert_contract(pastes)
        assert gate or not pastes


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_pastes_of_given_boxes(monkeypatch, known, with_weight):
    """They include empty boxes at each edge and the whole image. The emitted boxes are the given ones."""
    size, drawn = (9, 20), given_batch()
    if not with_weight:
        drawn["kind"][drawn["kind"] == Kind.MIXUP] = Kind.NONE
        del drawn["weight"]
    drawn["box"][4], drawn["box"][7] = (9, 20, 9, 20), (3, 20, 6, 20)

    def operation(images, labels, weight=None, **given):
        mixing = Mixing(mixup_alpha=1.0 * with_weight)
        mixed, target = mixfn.apply(
            images,
            labels,
            Draw(weight=given["partner"] * 0.0 if weight is None else weight, **given),
            mixing,
            size if known else None,
        )
        return mixed, *target

    images, labels = batch_of(8, size)
    inputs = {"images": images, "labels": labels} | drawn
    outputs, pastes = recording(monkeypatch, operation, 8, tuple(inputs))(**inputs)
    mixed, target = outputs[0], MixTarget(*map(np.stack, outputs[1:]))
    assert_contract(pastes)
    is_cutmix = drawn["kind"] == Kind.CUTMIX
    np.testing.assert_array_equal(target.box, drawn["box"] * is_cutmix[:, None])
    np.testing.assert_array_equal(target.kind, drawn["kind"])
    empty = np.flatnonzero(is_cutmix & (target.lam0 == 0))
    assert list(empty) == [1, 3, 4, 7]
    for i in empty:
        np.testing.assert_array_equal(mixed[i], images[i])


@pytest.mark.parametrize(
    ("box", "spills"),
    [
        ((2, 3, 7, 11), False),
        ((0, 0, 9, 20), False),
        ((0, 0, 1, 1), False),
        ((0, 0, 0, 0), True),
        ((4, 5, 4, 9), True),
        ((4, 5, 8, 5), True),
        ((4, 5, 4, 5), True),
        ((9, 20, 9, 20), False),
    ],
)
def test_an_empty_region_spills_on_a_gpu(box, spills):
    """The emulation reproduces the kernel's fault: samples without a box get the partner's pixels."""
    (own, partner), _ = batch_of(2, (9, 20))
    starts, stops = np.int32([[0, 0], box[:2]]), np.int32([[9, 20], box[2:]])
    found = gpu_paste([own, partner], starts, starts, stops - starts, (9, 20))
    wanted = own.copy()
    wanted[box[0] : box[2], box[1] : box[3]] = partner[box[0] : box[2], box[1] : box[3]]
    assert (found != wanted).any() == spills


def test_a_small_input_is_read_past_its_end_on_a_gpu():
    (own,), _ = batch_of(1, (9, 20))
    noise = np.full((4, 5, 3), 7, np.uint8)
    starts, stops = np.int32([[0, 0], [2, 3]]), np.int32([[9, 20], [6, 8]])
    with pytest.raises(IndexError):
        gpu_paste([own, noise], starts * 0, starts, stops - starts, (9, 20))


@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [(9, 20), (1, 1), (7, 1)])
def test_pastes_of_the_loaders_graph(monkeypatch, size, name, mode):
    transform = pipelines.TrainTransform(size=size)
    contents = [np.frombuffer(encoded(ramps(30, 40, blue=25 * k) * [5, 6, 1], "PNG"), np.uint8) for k in range(8)]
    feed = SmallFeed(contents, size, Mixing(mode=mode, **OPTIONS[name]), batch_sizes=BATCHES, paths=False)
    run = recording(monkeypatch, lambda: pipelines.train_pipeline.__wrapped__(feed, transform), 8, ())
    for count in BATCHES:
        _, pastes = run()
        assert len(pastes) == count  # every sample has two patches, whether it is mixed or not
        assert_contract(pastes)


# Labels


def test_labels_that_are_not_one_integer_are_an_error(graph):
    """A sum would turn each one-hot vector into class 1."""

    def mixed(images, labels):
        return mixfn.mix(images, fn.one_hot(labels, num_classes=10))

    images, labels = batch_of(4)
    with pytest.raises(RuntimeError, match=r"labels: give one integer per sample, not fn\.one_hot"):
        graph(mixed)(images, labels % 10)


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4, 4, 3), (4.0, 4), 4])
def test_a_wrong_size_is_named(size):
    with pytest.raises(ValueError, match=r"size=.*give \(height, width\)"):
        mixfn.draw(size, Mixing())


# Erasing


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [(24, 30), (2, 3), (1, 1), (1, 7)])
@pytest.mark.parametrize("mode", get_args(augment.EraseMode))
def test_pastes_of_erasing(monkeypatch, mode, size, known):
    def operation(images):
        options = {"size": size} if known else {}
        return (augment.erase(images, prob=0.7, mode=mode, count=2, **options),)

    run, pasted = recording(monkeypatch, operation, 16, ("images",)), 0
    for count in (16, 5, 1):
        images, _ = batch_of(count, size)
        (erased,), pastes = run(images=images)
        assert {image.shape for image in erased} == {images[0].shape}
        assert_contract(pastes)
        pasted += len(pastes)
    assert (pasted > 0) == (min(size) > 1)


def test_pastes_of_erasing_images_of_many_sizes(monkeypatch):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*rng.integers(1, 20, 2), 3), dtype=np.uint8) for _ in range(64)]
    run = recording(monkeypatch, lambda images: (augment.erase(images, prob=1.0),), 64, ("images",))
    (erased,), pastes = run(images=images)
    assert [image.shape for image in erased] == [image.shape for image in images]
    assert_contract(pastes)
    assert len(pastes) > 32


# Devices


def offenders(pipe):
    """Names of the CPU operators that read GPU data, in a graph that is defined but not built."""
    pipe._build_graph()
    return [
        type(op._op).__name__
        for op in pipe._ops
        if op._op.device == "cpu" and any(node.device == "gpu" for node in op.inputs)
    ]


TRAINING = [
    {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "mixing": {"mixup_alpha": 0.8, "prob": 0.9}},
    {
        "auto_augment": "rand-m9-n3",
        "interpolation": "random",
        "re_prob": 0.5,
        "re_count": 3,
        "re_mode": "rand",
        "mixing": {"cutmix_minmax": (0.2, 0.8), "mode": "batch"},
    },
    {
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "grayscale_prob": 0.1,
        "re_prob": 0.25,
        "re_mode": "const",
        "mixing": {"correct_lam": False},
    },
    {"mixing": {"cutmix_alpha": 0.0, "mixup_alpha": 0.8}},
    {},
]


@pytest.mark.parametrize("paths", [True, False], ids=["files", "shards"])
@pytest.mark.parametrize("options", TRAINING)
def test_no_cpu_operator_of_training_reads_gpu_data(options, paths):
    options = dict(options)
    mixing = Mixing(**options.pop("mixing")) if "mixing" in options else None
    transform = pipelines.TrainTransform(**options)
    feed = SmallFeed(None, transform.size, mixing, paths=paths)
    assert offenders(pipelines.train_pipeline(feed, transform, batch_size=8, num_threads=1, device_id=0)) == []


@pytest.mark.parametrize("paths", [True, False], ids=["files", "shards"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_no_cpu_operator_of_evaluation_reads_gpu_data(crop_mode, paths):
    transform = pipelines.EvalTransform(crop_mode=crop_mode)
    feed = SmallFeed(None, transform.size, training=False, paths=paths)
    assert offenders(pipelines.val_pipeline(feed, transform, batch_size=8, num_threads=1, device_id=0)) == []


@pytest.mark.parametrize(
    "operation",
    [
        mixfn.mix,
        lambda images, labels: augment.erase(images),
        lambda images, labels: augment.rand_augment(images),
    ],
    ids=["mix", "erase", "rand_augment"],
)
def test_an_unknown_size_is_read_by_the_cpu(operation):
    """Without `size` there is such an operator, so the tests above are able to fail."""

    @pipeline_def(batch_size=8, num_threads=1, device_id=0)
    def define():
        images = fn.external_source(name="images", layout="HWC").gpu()
        found = operation(images, fn.external_source(name="labels"))
        return (found[0], *found[1]) if isinstance(found, tuple) else found

    assert set(offenders(define())) == {"_Shape"}


# Operators


def training_graph(augmentation, mixing, on_gpu):
    transform = pipelines.TrainTransform(**augmentation)
    feed = SmallFeed(None, transform.size, mixing)
    pipe = pipelines.train_pipeline(feed, transform, batch_size=8, num_threads=1, device_id=0 if on_gpu else None)
    pipe._build_graph()
    return pipe


def operators(augmentation, mixing, on_gpu):
    """Operators on the CPU, those on the GPU, and copies to the GPU, of a training graph.

    Each output of the source counts: it costs as much as an operator.
    """
    pipe = training_graph(augmentation, mixing, on_gpu)
    found = Counter()
    for op in pipe._ops:
        found[op._op.device] += len(op.outputs) if type(op._op).__name__ == "ExternalSource" else 1
    made_on = {node.name: op._op.device for op in pipe._ops for node in op.outputs}
    taken = {(node.name, node.device) for op in pipe._ops for node in op.inputs}
    taken |= {(node.name, node.device) for node in pipe._graph_outputs}
    copies = sum(device == "gpu" and made_on[name] == "cpu" for name, device in taken)
    return found["cpu"], found["gpu"], copies


CUTMIX, MIXUP, BOTH = {}, {"cutmix_alpha": 0.0, "mixup_alpha": 0.8}, {"mixup_alpha": 0.8}


@pytest.mark.parametrize(
    ("augmentation", "mixing", "on_cpu", "on_gpu"),
    [
        ({}, None, 14, (15, 3, 2)),
        ({}, CUTMIX, 21, (19, 6, 3)),
        ({}, {"cutmix_minmax": (0.2, 0.8)}, 21, (19, 6, 3)),
        ({}, {"correct_lam": False}, 18, (18, 4, 2)),
        ({}, MIXUP, 30, (19, 7, 2)),
        ({}, BOTH, 35, (21, 10, 4)),
        ({"re_prob": 0.25}, BOTH, 100, (77, 19, 4)),
        ({"re_prob": 0.25, "re_mode": "const"}, BOTH, 100, (77, 19, 4)),
        ({"re_prob": 0.25, "re_mode": "rand"}, BOTH, 105, (81, 20, 5)),
        ({"auto_augment": "rand-m9-mstd0.5-inc1"}, BOTH, 301, (171, 126, 12)),
    ],
    ids=["plain", "cutmix", "minmax", "uncorrected", "mixup", "both", "pixel", "const", "rand", "rand_augment"],
)
def test_no_graph_grows_unseen(augmentation, mixing, on_cpu, on_gpu):
    """Operators of a CPU graph; and of a GPU graph on the CPU, on the GPU, and copies between them."""
    mixing = None if mixing is None else Mixing(**mixing)
    found = (*operators(augmentation, mixing, False), *operators(augmentation, mixing, True))
    assert all(count <= bound for count, bound in zip(found, (on_cpu, 0, 0, *on_gpu), strict=True)), found


def upstream(pipe, last):
    """An operator and all on which it depends."""
    makers = {node.name: op for op in pipe._ops for node in op.outputs}
    found, left = [], [last]
    while left:
        found.append(op := left.pop())
        left += [makers[node.name] for node in op.inputs]
    return found


@pytest.mark.parametrize(
    "mixing", [CUTMIX, {"correct_lam": False}, MIXUP, BOTH], ids=["cutmix", "raw", "mixup", "both"]
)
def test_a_gpus_graph_pastes_and_blends_like_a_cpus(mixing):
    """The operators that change pixels, and those that compute λ0 where it is counted, are on the images' device."""
    found = []
    for on_gpu in (False, True):
        pipe = training_graph({}, Mixing(**mixing), on_gpu)
        device, lam0 = "gpu" if on_gpu else "cpu", pipe._graph_outputs[2]
        made = next(op for op in pipe._ops if lam0.name in [node.name for node in op.outputs])
        counted = "cutmix_alpha" not in mixing and "correct_lam" not in mixing
        assert (type(made._op).__name__ == "_ArithmeticGenericOp") == counted
        assert {op._op.device for op in upstream(pipe, made) if type(op._op).__name__ == "_ArithmeticGenericOp"} <= {
            device
        }
        names = [type(op._op).__name__ for op in pipe._ops if op._op.device == device]
        found.append(Counter(name for name in names if name in ("MultiPaste", "PermuteBatch", "BrightnessContrast")))
    assert found[0] == found[1]
    assert found[0]["BrightnessContrast"] == 2 * ("mixup_alpha" in mixing)


# DALI's AutoGraph, and its private branches


def lay_host_draw(images, labels):
    mixing = Mixing(mixup_alpha=0.8, prob=0.8)
    drawn = draw(np.random.default_rng(0), 8, (16, 16), mixing)
    planned = graph_inputs(drawn, (16, 16), mixing)
    inputs = {name: fn.external_source(source=[array], cycle=True) for name, array in planned.items()}
    return mixfn.lay(images, inputs, (16, 16))


def shift(images, _):
    share = fn.constant(fdata=[0.1, 0.2])
    return augment.warp(images, 9.0, share, share, fill=(0, 0, 0))


def two(images, _, operation):
    return operation(images, fn.constant(fdata=2.0, shape=[]))


def place(*_):
    uniform = fn.random.uniform(range=[0.0, 1.0], shape=[11, 3])
    return augment.region_of(fn.constant(fdata=[16.0, 16.0]), uniform, fn.constant(fdata=1.0, shape=[]))[1]


GRAPH_FUNCTIONS = {
    "mix": lambda images, labels: mixfn.mix(images, labels, mixup_alpha=0.8, prob=0.5)[0],
    "cutmix": lambda images, labels: mixfn.cutmix(images, labels)[0],
    "mixup": lambda images, labels: mixfn.mixup(images, labels)[0],
    "unmixed": lambda images, labels: mixfn.unmixed(labels).labels,
    "draw": lambda images, labels: mixfn.draw((16, 16), Mixing(mixup_alpha=0.8)).box,
    "apply": lambda images, labels: mixfn.apply(images, labels, mixfn.draw((16, 16), Mixing()), Mixing())[0],
    "paste": lambda images, labels: mixfn.paste(images, mixfn.draw((16, 16), Mixing())),
    "lay": lay_host_draw,
    "box_lam0": lambda images, labels: mixfn.box_lam0(images.shape(dtype=types.INT32), (16, 16)),
    "augment.draw": lambda images, labels: augment.draw(augment.parse("rand-m9-mstd0.5"))[1],
    "region_of": place,
    "warp": shift,
    "color_jitter": lambda images, labels: augment.color_jitter(images, 0.4, prob=0.5, grayscale_prob=0.2),
    "rand_augment": lambda images, labels: augment.rand_augment(images, "rand-m9-mstd0.5-inc1"),
    **{
        f"erase {mode}": lambda images, labels, mode=mode: augment.erase(images, prob=0.5, mode=mode, count=2)
        for mode in get_args(augment.EraseMode)
    },
    **{
        name: lambda images, labels, name=name: getattr(augment, name)(images)
        for name in ("invert", "auto_contrast", "equalize")
    },
    **{
        name: lambda images, labels, name=name: two(images, labels, getattr(augment, name))
        for name in ("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "solarize_add")
    },
}


@pytest.mark.parametrize("name", GRAPH_FUNCTIONS)
def test_conditionals_change_nothing(name):
    """The same batches with and without ``enable_conditionals``, which rewrites the code of graph functions."""
    images, labels = batch_of(8)

    def run(conditionals):
        @pipeline_def(batch_size=8, num_threads=1, device_id=None, seed=3, enable_conditionals=conditionals)
        def define():
            given = fn.external_source(lambda: (images, labels), num_outputs=2, layout=["HWC", ""])
            return GRAPH_FUNCTIONS[name](*given)

        pipe = define()
        return [np.array(sample) for _ in range(2) for sample in pipe.run()[0]]

    assert all(map(np.array_equal, run(False), run(True)))


def test_a_branch_takes_each_sample_its_own_way():
    """The canary of DALI's private `fn._conditional`, on which every branch of this package relies."""

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def define():
        values = fn.external_source(lambda: [np.int32(i) for i in range(6)], batch=True)
        return branch(values % 2 == 0, lambda x: x * 10, lambda x: x - 100, values)

    assert [int(np.array(value)) for value in define().run()[0]] == [0, -99, 20, -97, 40, -95]
