"""The loader end to end: its images match its target, and nothing disturbs its stream.

A folder of one-colour images (one colour per file) allows recounting λ0, box and both labels from the delivered
tensor. In all other tests, images carry column, row and file in their channels, so that two streams are equal only if
files, crops, flips and mixing are. A state is taken after every batch, and each must restore the same stream.
"""

import contextlib
import gc
import itertools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from images import colour_folder, damaged, ramp_samples
from timm.data import resolve_data_config

from lumix_dali import MixTarget, create_loader, decoding, reference
from lumix_dali.data.files import Files
from lumix_dali.data.order import Order
from lumix_dali.loading import faults

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COUNT, SIZE = 24, (12, 18)
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "interpolation": "random"}


@pytest.fixture
def make(device):
    """`make(source, …)`: `create_loader` on the device under test, small and with one thread."""
    defaults = {
        "batch_size": 4,
        "input_size": SIZE,
        "num_threads": 1,
        "mean": MEAN,
        "std": STD,
        "device": "cuda:0" if device == "gpu" else "cpu",
    }
    with contextlib.ExitStack() as stack:
        yield lambda source, **options: stack.enter_context(create_loader(source, **defaults | options))


@pytest.fixture(scope="module")
def colour_files(tmp_path_factory):
    """(root, uint8 [24, 3] colours, int [24] labels) of a folder of one-colour images."""
    root = tmp_path_factory.mktemp("colours")
    return root, colour_folder(root, COUNT), np.arange(COUNT) // 3


@pytest.fixture(scope="module")
def ramp_files(tmp_path_factory):
    """`Samples` of 20 images, one class each."""
    return ramp_samples(tmp_path_factory.mktemp("ramps"), 20)


def replaced(loader):
    """{index: substitute's index} of the replaced samples."""
    return {index: found[0] for index, found in loader.state_dict()["bad"].items()}


def grey_levels(images):
    """uint8 [B, H, W, C] of what the loader delivered."""
    images = images.cpu().permute(0, 2, 3, 1)
    if images.dtype != torch.uint8:
        images = ((images.float() * torch.tensor(STD) + torch.tensor(MEAN)) * 255).round()
        assert images.min() >= 0
        assert images.max() <= 255
    return images.numpy().astype(np.uint8)


def flat(batch):
    """Copies of all of a batch's tensors, on the host."""
    images, target = batch
    return [field.cpu().clone() for field in (images, *(target if isinstance(target, MixTarget) else [target]))]


def stream(batches):
    return [flat(batch) for batch in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        for a, b in zip(our, their, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def differ(ours, theirs):
    return all(not torch.equal(a[0], b[0]) for a, b in zip(ours, theirs, strict=False))


def epochs(loader, count):
    return [stream(loader) for _ in range(count)]


# The images match the target


def assert_types(loader, images, target, dtype, channels_last):
    count = len(target.labels)
    assert images.shape == (count, 3, *SIZE)
    assert images.dtype == getattr(torch, dtype)
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert isinstance(target, MixTarget)
    assert [field.dtype for field in target] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int32,
        torch.int32,
        torch.int64,
    ]
    assert [tuple(field.shape) for field in target] == [(count,), (count,), (count,), (count, 4), (count,), (count,)]
    assert {field.device for field in (images, *target)} == {loader.device}


def recount(levels, batch, colours, labels, target):
    """Finds each sample's files in `batch` by their colours and compares; returns the kinds that it saw."""
    near = np.abs(levels[:, :, :, None].astype(int) - colours[batch].astype(int)).max(-1)  # [B, H, W, file]
    rows = zip(batch, levels, *(field.tolist() for field in target), strict=True)
    for row, (file, image, own, partner_label, lam0, box, kind, place) in enumerate(rows):
        assert own == labels[file]
        assert partner_label == labels[batch[place]]
        assert place != row or len(batch) == 1 or kind == reference.NONE
        if kind == reference.MIXUP:
            pixel = image[0, 0].astype(float)
            assert np.ptp(image.reshape(-1, 3), axis=0).max() == 0
            way = colours[batch].astype(float) - colours[file]
            found = (1 - lam0) * colours[file] + lam0 * colours[batch].astype(float)
            fits = np.abs(found - pixel).max(1) <= 1.01
            assert partner_label in labels[batch[fits]]
            length = np.linalg.norm(way, axis=1)
            (partner,) = np.nonzero(fits & (labels[batch] == partner_label))[0][:1]
            assert partner != row or lam0 * length.max() < 2
            recounted = (pixel - colours[file]) @ way[partner] / length[partner] ** 2 if partner != row else lam0
            assert lam0 == pytest.approx(recounted, abs=2 / max(length[partner], 1))
            assert box == [0, 0, 0, 0]
            continue
        assert (near[row].min(-1) == 0).all()
        files = batch[near[row].argmin(-1)]
        pasted = files != file
        assert pasted.mean() == pytest.approx(lam0, abs=1e-6)
        if kind == reference.NONE:
            assert not pasted.any()
            assert box == [0, 0, 0, 0]
        else:
            assert kind == reference.CUTMIX
            y0, x0, y1, x1 = box
            inside = np.zeros(SIZE, bool)
            inside[y0:y1, x0:x1] = True
            np.testing.assert_array_equal(pasted, inside)
            assert {labels[f] for f in files[pasted]} <= {partner_label}
    return set(target.kind.tolist())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(("mixing", "kinds"), [({"cutmix_alpha": 1.0}, {2}), (MIX, {1, 2})], ids=["cutmix", "mix"])
def test_delivered_pixels_match_the_target(make, colour_files, mixing, kinds, dtype, channels_last):
    root, colours, labels = colour_files
    loader = make(root, batch_size=8, dtype=dtype, channels_last=channels_last, **mixing)
    order, seen = Order(COUNT, 8), set()
    for epoch in range(3):
        for batch, (images, target) in zip(order.epoch(epoch).reshape(-1, 8), loader, strict=True):
            assert_types(loader, images, target, dtype, channels_last)
            seen |= recount(grey_levels(images), batch, colours, labels, target.cpu())
    assert seen == kinds


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {0}),
        ({"cutmix_alpha": 1.0, "prob": 0.5}, {0, 2}),
        ({"mixup_alpha": 0.8, "switch_prob": 0.0}, {1}),
        ({**MIX, "mode": "batch"}, {1, 2}),
        ({"cutmix_minmax": (0.2, 0.8)}, {2}),
        ({**MIX, "batch_size": 7, "drop_last": False}, {1, 2}),
        ({**MIX, "batch_size": 23, "drop_last": False}, {0, 1, 2}),  # the last batch holds one sample
        ({**MIX, "batch_size": 1}, {0}),
    ],
)
def test_every_kind_of_mixing_matches_the_target(make, colour_files, options, kinds):
    root, colours, labels = colour_files
    options = {"batch_size": 8, **options}
    loader, seen = make(root, **options), set()
    order = Order(COUNT, options["batch_size"], drop_last=options.get("drop_last", True))
    for epoch in range(3):
        batches = [order.epoch(epoch)[i * order.batch_size :][: order.batch_size] for i in range(len(order))]
        for batch, (images, target) in zip(batches, loader, strict=True):
            seen |= recount(grey_levels(images), batch, colours, labels, target.cpu())
    assert seen == kinds


def test_erasing_comes_before_mixing(make, colour_files):
    """The partner's erased pixels inside the box are pasted with it: they stay erased, and λ0 counts them."""
    root, colours, _ = colour_files
    loader = make(
        root, batch_size=8, dtype="uint8", mean=(0.0, 0.0, 0.0), cutmix_alpha=1.0, re_prob=1.0, re_mode="const"
    )
    seen = 0
    for batch, (images, target) in zip(Order(COUNT, 8).epoch(0).reshape(-1, 8), loader, strict=True):
        levels, inside = grey_levels(images), np.zeros((8, *SIZE), bool)
        for mask, (y0, x0, y1, x1) in zip(inside, target.box.tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        black = (levels == 0).all(-1)
        files = np.abs(levels[:, :, :, None].astype(int) - colours[batch]).max(-1).argmin(-1)
        for row in range(8):
            assert (files[row] == row)[~inside[row] & ~black[row]].all()
            partners = np.unique(files[row][inside[row] & ~black[row]])
            assert len(partners) <= 1
            for partner in partners:
                both = inside[row] & ~inside[partner]
                np.testing.assert_array_equal(black[row][both], black[partner][both])
                seen += int(black[row][both].sum())
        np.testing.assert_allclose(inside.mean((1, 2)), target.lam0, atol=1e-6)
    assert seen > 20


def test_kept_batches_do_not_change(make, ramp_files):
    loader = make(ramp_files, batch_size=2, **MIX)
    kept, copies = [], []
    for batch in itertools.islice(itertools.chain.from_iterable([loader, loader]), 15):
        kept.append(batch)
        copies.append(flat(batch))
    loader.close()
    gc.collect()
    list(make(ramp_files, seed=1))  # new pipelines may reuse freed memory
    assert_same(stream(kept), copies)
    kept[0][0].fill_(0)  # the user may modify the batch
    assert_same(stream(kept[1:]), copies[1:])


def test_evaluation_with_more_ranks_than_samples(make, ramp_files):
    few = Files(ramp_files.root, ramp_files.names[:2], np.arange(2), ramp_files.classes)
    loaders = [make(few, is_training=False, rank=rank, world_size=4) for rank in range(4)]
    assert [len(loader) for loader in loaders] == [1, 1, 0, 0]
    assert [[target.tolist() for _, target in loader] for loader in loaders] == [[[0]], [[1]], [], []]


def test_length_and_what_a_training_loop_asks_for(make, colour_files):
    loader = make(colour_files[0], batch_size=5, drop_last=False)
    assert (len(loader), len(list(loader)), len(make(colour_files[0], batch_size=5))) == (5, 5, 4)
    assert (len(loader.dataset), loader.num_classes, loader.batch_size) == (COUNT, 8, 5)
    assert loader.classes == [f"class {k}" for k in range(8)]
    assert loader.dataset.class_to_idx == {name: k for k, name in enumerate(loader.classes)}


# The stream


def test_ranks_share_the_order_and_differ_in_their_draws(make, ramp_files):
    loaders = [make(ramp_files, batch_size=5, rank=rank, world_size=2, **MIX) for rank in range(2)]
    for _ in range(2):
        both = [stream(loader) for loader in loaders]
        assert [len(batches) for batches in both] == [2, 2]
        ours, theirs = (torch.cat([batch[1] for batch in batches]).tolist() for batches in both)
        assert sorted(ours + theirs) == list(range(20))
        ours, theirs = (torch.cat([batch[3] for batch in batches]) for batches in both)  # λ0
        assert (ours == theirs).sum() <= 2


def test_seeds_and_epochs_differ(make, ramp_files):
    first, second = epochs(make(ramp_files, **MIX), 2)
    other = stream(make(ramp_files, seed=1, **MIX))
    assert differ(first, second)
    assert differ(first, other)
    for column in (1, 3):  # the order, the draws
        values = [torch.cat([batch[column] for batch in batches]).tolist() for batches in (first, second, other)]
        assert len({tuple(value) for value in values}) == 3


@pytest.mark.parametrize(("threads", "prefetch"), [(2, 1), (1, 2), (2, 5)])
def test_threads_and_prefetch_change_nothing(make, ramp_files, threads, prefetch):
    expected = epochs(make(ramp_files, num_threads=1, prefetch_queue_depth=1, **MIX), 2)
    actual = epochs(make(ramp_files, num_threads=threads, prefetch_queue_depth=prefetch, **MIX), 2)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs)


def test_switching_mixing_off_takes_effect_at_the_next_epoch(make, ramp_files):
    mixed = epochs(make(ramp_files, **MIX), 3)
    loader, batches = make(ramp_files, **MIX), []
    for batch in loader:
        batches.append(flat(batch))
        loader.mixup_enabled = False
    assert_same(batches, mixed[0])
    plain = stream(loader)
    for ours, theirs in zip(plain, mixed[1], strict=True):
        assert torch.equal(ours[1], theirs[1])  # one label per file: the same files in the same positions
        assert torch.equal(ours[2], ours[1])
        assert not any(field.any() for field in ours[3:6])
    assert all(batch[5].all() for batch in mixed[1])
    loader.mixup_enabled = True
    assert_same(stream(loader), mixed[2])


def test_set_epoch(make, ramp_files):
    expected = epochs(make(ramp_files, **MIX), 4)
    loader = make(ramp_files, **MIX)
    for epoch in (2, 0, 0, 3):
        loader.set_epoch(epoch)
        assert_same(stream(loader), expected[epoch])
    with pytest.raises(ValueError, match="epoch=-1: give a whole number >= 0"):
        loader.set_epoch(-1)
    with pytest.raises(ValueError, match="epoch=2147483648: give a whole number >= 0 and < 2147483648"):
        loader.set_epoch(2**31)


def test_a_complete_epoch_follows_a_break(make, ramp_files):
    expected = epochs(make(ramp_files, **MIX), 3)
    loader = make(ramp_files, **MIX)
    assert_same(stream(itertools.islice(loader, 2)), expected[0][:2])
    assert_same(stream(loader), expected[1])
    iterator = iter(loader)
    assert_same([flat(next(iterator))], expected[2][:1])
    loader.set_epoch(0)
    assert_same(stream(loader), expected[0])
    with pytest.raises(RuntimeError, match="this iteration was abandoned"):
        next(iterator)


def test_an_epoch_that_has_ended_stays_ended(make, ramp_files):
    iterator = iter(make(ramp_files))
    assert len(list(iterator)) == 5
    assert list(iterator) == []


def test_two_loaders_at_once(make, ramp_files):
    options = [{"seed": 1, **MIX}, {"seed": 2}]
    alone = [stream(make(ramp_files, **each)) for each in options]
    together = list(zip(*(make(ramp_files, **each) for each in options), strict=True))
    for ours, theirs in zip(zip(*together, strict=True), alone, strict=True):
        assert_same(stream(ours), theirs)


def test_close(make, ramp_files):
    with make(ramp_files) as loader:
        iterator = iter(loader)
        next(iterator)
    with pytest.raises(RuntimeError, match="this iteration was abandoned"):
        next(iterator)
    with pytest.raises(ValueError, match="loader: it is closed; create a new one with create_loader"):
        iter(loader)
    loader.close()


# Resume


def test_every_state_leads_to_the_same_stream(make, ramp_files, tmp_path):
    """Two epochs of five batches, without mixing in the second; states before, between and after all batches."""
    options = {"batch_size": 4, **MIX}
    loader, batches, states = make(ramp_files, **options), [], []

    def keep():
        torch.save(loader.state_dict(), tmp_path / "state.pt")
        states.append((len(batches), torch.load(tmp_path / "state.pt", weights_only=True)))

    keep()
    for _ in range(2):
        iterator = iter(loader)
        keep()  # started, nothing delivered
        for batch in iterator:
            batches.append(flat(batch))
            loader.mixup_enabled = False  # takes effect in the next epoch, also in a resumed run
            keep()
        keep()  # ended
    batches += stream(itertools.islice(loader, 2))
    assert [bool(batch[5].any()) for batch in batches] == [True] * 5 + [False] * 7
    assert len(states) == 15
    runs = itertools.cycle([{"num_threads": 2, "prefetch_queue_depth": 5}, {"prefetch_queue_depth": 1}])
    # the first states precede the switch: their second epoch is mixed, so only their first is compared
    for (place, state), run in zip(states, runs, strict=False):
        resumed = make(ramp_files, **options, **run)
        resumed.load_state_dict(state)
        assert resumed.mixup_enabled == state["mixup_enabled"]
        expected = batches[place:][: 7 if not state["mixup_enabled"] else 5]
        endless = itertools.chain.from_iterable(itertools.repeat(resumed))
        assert_same(stream(itertools.islice(endless, len(expected))), expected)


def test_every_state_of_an_augmented_stream_leads_to_the_same(make, ramp_files):
    options = {"batch_size": 4, **MIX, **AUGMENTED, "num_aug_repeats": 2}
    loader, batches, states = make(ramp_files, **options), [], []
    for epoch in range(2):
        for batch in loader:
            batches.append(flat(batch))
            states.append(loader.state_dict())
            if epoch:
                break
    assert len(batches) == 6
    plain = stream(make(ramp_files, **options | {"auto_augment": None, "re_prob": 0.0}))
    assert differ(plain, batches)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, batches, strict=False))  # the same order
    for place, state in list(enumerate(states))[:4:2]:
        resumed = make(ramp_files, **options, num_threads=1 + place % 2, prefetch_queue_depth=1 + place)
        resumed.load_state_dict(state)
        assert_same(stream(itertools.islice(itertools.chain(resumed, resumed), 5 - place)), batches[place + 1 :])
    other = make(ramp_files, **options | {"re_prob": 0.25})
    with pytest.raises(ValueError, match=r"it belongs to another loader: re_prob was 0\.5 and is 0\.25"):
        other.load_state_dict(states[0])


def test_a_state_can_be_loaded_in_mid_epoch(make, ramp_files):
    loader, batches = make(ramp_files, **MIX), []
    for batch in loader:
        batches.append(flat(batch))
        if len(batches) == 2:
            state = loader.state_dict()
    loader.load_state_dict(state)
    assert_same(stream(loader), batches[2:])
    assert len(stream(loader)) == 5


def test_set_epoch_keeps_a_resumed_place(make, ramp_files):
    """A training loop calls it before every epoch, including the resumed one."""
    loader = make(ramp_files, **MIX)
    loader.set_epoch(3)
    iterator = iter(loader)
    next(iterator)
    state, expected = loader.state_dict(), stream(iterator)
    loader.load_state_dict(state)
    loader.set_epoch(3)
    assert_same(stream(loader), expected)
    loader.load_state_dict(state)
    loader.set_epoch(4)
    assert len(stream(loader)) == 5


def test_set_epoch_is_in_the_state(make, ramp_files):
    loader, resumed = make(ramp_files, **MIX), make(ramp_files, **MIX)
    next(iter(loader))
    loader.set_epoch(3)
    resumed.load_state_dict(loader.state_dict())
    assert_same(stream(resumed), stream(loader))


STATE_OPTIONS = {"batch_size": 2, "rank": 0, "world_size": 2, "seed": 3, **MIX}


@pytest.fixture
def state(make, ramp_files):
    loader = make(ramp_files, **STATE_OPTIONS)
    next(iter(loader))
    return loader.state_dict()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"rank": 1}, "rank was 0 and is 1"),
        ({"world_size": 3}, "world_size was 2 and is 3"),
        ({"drop_last": False}, "drop_last was True and is False"),
        ({"input_size": 12}, r"input_size was \(12, 18\) and is \(12, 12\)"),
        ({"interpolation": "bilinear"}, "interpolation was 'bicubic' and is 'bilinear'"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean was "),
        ({"std": (0.5, 0.5, 0.5)}, "std was "),
        ({"dtype": "float16"}, "dtype was 'float32' and is 'float16'"),
        ({"channels_last": True}, "channels_last was False and is True"),
        ({"scale": (0.5, 1)}, r"scale was \(0.08, 1.0\) and is \(0.5, 1.0\)"),
        ({"ratio": (1, 1)}, "ratio was "),
        ({"hflip": 0}, "hflip was 0.5 and is 0.0"),
        ({"mixup_alpha": 0.0}, "mixup_alpha was 0.8 and is 0.0"),
        ({"cutmix_alpha": 2.0}, "cutmix_alpha was 1.0 and is 2.0"),
        ({"cutmix_minmax": (0.1, 0.2)}, r"cutmix_minmax was None and is \(0.1, 0.2\)"),
        ({"prob": 0.5}, "prob was 1.0 and is 0.5"),
        ({"switch_prob": 0.7}, "switch_prob was 0.5 and is 0.7"),
        ({"mode": "batch"}, "mode was 'elem' and is 'batch'"),
        ({"correct_lam": False}, "correct_lam was True and is False"),
        ({"decoder": {"jpeg_fancy_upsampling": True}}, "decoder was 'None' and is "),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "cutmix_alpha was 1.0 and is None"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "is_training": False}, "shuffle was True and is False"),
    ],
)
def test_a_state_of_another_loader_is_refused(make, ramp_files, state, changed, named):
    other = make(ramp_files, **STATE_OPTIONS | changed)
    with pytest.raises(
        ValueError, match=f"state: it belongs to another loader: .*{named}.*Create the loader as it was"
    ):
        other.load_state_dict(state)
    assert other.state_dict()["position"][:2] == (0, 0)


@pytest.mark.parametrize("change", ["name", "label", "class", "sample"])
def test_a_state_of_other_data_is_refused(make, ramp_files, state, change):
    names, labels, classes = list(ramp_files.names), ramp_files.labels.copy(), list(ramp_files.classes)
    if change == "name":
        names[3], names[4] = names[4], names[3]
    elif change == "label":
        labels[3] = 0
    elif change == "class":
        classes[3] = "three"
    else:
        names, labels = names[:-1], labels[:-1]
    other = make(Files(ramp_files.root, names, labels, classes), **STATE_OPTIONS)
    with pytest.raises(ValueError, match="data was "):
        other.load_state_dict(state)


def test_a_state_of_another_dali_is_refused(make, ramp_files, state, monkeypatch):
    other = make(ramp_files, **STATE_OPTIONS)
    monkeypatch.setattr("nvidia.dali.__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"dali was .* and is '9\.9\.9'"):
        other.load_state_dict(state)


def test_what_does_not_change_the_stream_may_change(make, ramp_files, state, tmp_path):
    shutil.copytree(ramp_files.root, tmp_path / "moved")
    moved = Files(str(tmp_path / "moved"), ramp_files.names, ramp_files.labels, ramp_files.classes)
    make(moved, num_threads=2, prefetch_queue_depth=4, max_bad=3, **STATE_OPTIONS).load_state_dict(state)


def refusal(loader, damaged_state):
    before = loader.state_dict()
    with pytest.raises(ValueError, match=r"^state: (its|it is|its checksum)"):
        loader.load_state_dict(damaged_state)
    assert loader.state_dict() == before


def test_every_field_of_a_state_is_under_its_checksum(make, ramp_files, state):
    loader = make(ramp_files, **STATE_OPTIONS)
    for key in state:
        refusal(loader, {name: value for name, value in state.items() if name != key})
    epoch, iteration, checkpoint, *rest = state["position"]
    for changed in [
        {"position": (epoch, iteration + 1, checkpoint, *rest)},
        {"mixup_enabled": False},
        {"position": (epoch, iteration, checkpoint[:-1], *rest)},
        {"bad": {0: (1, "a", "b")}},
        {"new": 0},
        {"input_size": (8, 8)},
        {1: 0},
    ]:
        refusal(loader, state | changed)
    loader.load_state_dict(state)


@pytest.mark.parametrize("other", [None, [], {}, {"epoch": 3}, {"format": "lumix_dali.loader/1"}, b"state"])
def test_an_unknown_state_format_is_named(make, ramp_files, other):
    with pytest.raises(ValueError, match=r"state: its format is .*, but this version reads 'lumix_dali.loader/5'"):
        make(ramp_files).load_state_dict(other)


# Files that cannot be used


REPLACED = "takes its place"


@pytest.fixture
def spoilt(ramp_files, tmp_path):
    """(`Samples` of a copy, `spoil(index, …, content=…)`, which damages its files)."""

    def spoil(*indices, content=b""):
        for index in indices:
            path = tmp_path / "copy" / ramp_files.names[index]
            path.unlink() if content is None else path.write_bytes(content)

    shutil.copytree(ramp_files.root, tmp_path / "copy")
    return Files(str(tmp_path / "copy"), ramp_files.names, ramp_files.labels, ramp_files.classes), spoil


def substituted(samples, bad):
    """`samples` with the substitutes in place from the start: a different digest, but the same order and draws."""
    taken = [bad.get(i, i) for i in range(len(samples))]
    return Files(samples.root, [samples.names[i] for i in taken], samples.labels[taken], samples.classes)


def assert_named(caught, samples, *indices):
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(indices)
    for index in indices:
        assert sum(m.startswith(f"{samples.path(index)!r} cannot be used (") for m in messages) == 1, messages


@pytest.mark.parametrize("batch", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("damage", damaged())
def test_a_damaged_file_is_named_and_replaced(make, spoilt, damage, batch):
    samples, spoil = spoilt
    loader = make(samples, prefetch_queue_depth=1 + batch, **MIX)
    index = int(Order(20, 4).epoch(0)[4 * batch + 1])
    spoil(index, content=damaged()[damage])
    with pytest.warns(UserWarning, match=REPLACED) as caught:
        batches = stream(loader)
    assert_named(caught, samples, index)
    assert caught[0].filename == __file__
    assert replaced(loader) == {index: (index + 1) % 20}
    assert_same(batches, stream(make(substituted(samples, replaced(loader)), **MIX)))


def test_a_damaged_substitute_is_replaced(make, spoilt):
    samples, spoil = spoilt
    spoil(7)
    loader = make(samples, batch_size=20)
    with pytest.warns(UserWarning, match=REPLACED):
        list(loader)
    spoil(8)
    loader.set_epoch(2)  # the next epoch was prefetched
    with pytest.warns(UserWarning, match=REPLACED) as caught:
        ((_, target),) = loader
    assert_named(caught, samples, 8)
    assert replaced(loader) == {7: 8, 8: 9}
    assert sorted(target.labels.tolist()) == [*range(7), 9, 9, *range(9, 20)]


def test_ranks_stay_in_step(make, spoilt):
    samples, spoil = spoilt
    spoil(*Order(20, 4, world_size=2).epoch(0)[[0, 5]].tolist())
    with pytest.warns(UserWarning, match=REPLACED) as caught:
        batches = [stream(make(samples, batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    assert len({str(each.message) for each in caught}) == 2  # each rank meets both: the next epoch is prefetched
    assert [len(each) for each in batches] == [2, 2]


def test_a_substitute_does_not_count_in_evaluation(make, spoilt):
    """Each sample occurs once by its own number; the label of an unusable one is nobody's prediction."""
    samples, spoil = spoilt
    spoil(19)
    loader = make(samples, is_training=False, return_index=True)
    with pytest.warns(UserWarning, match=REPLACED):
        first = [(target.cpu(), index.cpu()) for _, target, index in loader]
    again = [(target.cpu(), index.cpu()) for _, target, index in loader]  # the fault is known from the start
    assert replaced(loader) == {19: 0}
    for batches in (first, again):
        labels, index = map(torch.cat, zip(*batches, strict=True))
        assert labels.tolist() == [*range(19), -100]
        assert index.tolist() == list(range(20))
    assert torch.nn.functional.cross_entropy(torch.randn(4, 20), first[-1][0]).isfinite()


def test_resume_after_a_replacement(make, spoilt):
    """A state from before the bad file finds it again; a state from after it already knows it."""
    samples, spoil = spoilt
    index = int(Order(20, 4).epoch(0)[9])
    spoil(index)
    loader = make(samples, **MIX)
    with pytest.warns(UserWarning, match=REPLACED):
        batches, states = zip(*((flat(batch), loader.state_dict()) for batch in loader), strict=True)
    for place, state in list(enumerate(states))[:4:2]:
        resumed = make(samples, **MIX)
        resumed.load_state_dict(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(stream(resumed), batches[place + 1 :])
        assert_named(caught, samples, *[index] * (place < 2))
        assert resumed.bad == loader.bad


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        ((32, 8), {}, "give all but the source by name"),
        ((), {"mixup": 0.8}, r"unknown argument mixup=; give mixup_alpha"),
        ((), {"pin_memory": True}, "pin_memory=; leave it out"),
        ((), {"colour": 1}, r"colour=; see help\(create_loader\)"),
        ((), {"scal": (0.2, 1)}, r"scal=; did you mean scale\?"),
    ],
)
def test_arguments_of_other_loaders_are_named(ramp_files, positional, named, message):
    with pytest.raises(TypeError, match=message):
        create_loader(ramp_files, *positional, **named)


@pytest.mark.parametrize("name", ["cutmix_alpha", "batch_size", "return_index", "seed"])
def test_an_option_that_is_assigned_would_change_nothing(make, ramp_files, name):
    loader = make(ramp_files)
    with pytest.raises(AttributeError, match=rf"loader\.{name}: it is fixed .* mixup_enabled or input_size"):
        setattr(loader, name, 0)
    with pytest.raises(ValueError, match="mixup_enabled='False': give True or False"):
        loader.mixup_enabled = "False"
    loader.mixup_enabled, loader.input_size, loader.comment = False, 16, "a user's own"


def test_raise_on_a_bad_file(make, spoilt):
    samples, spoil = spoilt
    spoil(5)
    loader = make(samples, max_bad=0)
    with pytest.raises(ValueError, match=rf"'{samples.path(5)}' cannot be used \(.*\), 0 replaced so far"):
        list(loader)
    assert loader.bad == {}


def test_more_bad_files_than_allowed(make, spoilt):
    samples, spoil = spoilt
    spoil(2, 11, 12)
    loader = make(samples, max_bad=2)
    message = rf"'{samples.root}/\d+.png' cannot be used \(.*\), 2 replaced so far; .*max_bad > 2"
    with pytest.warns(UserWarning, match=REPLACED), pytest.raises(ValueError, match=message):
        list(loader)
    assert len(loader.bad) == 2


def test_only_bad_files(make, spoilt):
    samples, spoil = spoilt
    spoil(*range(20))
    with pytest.raises(ValueError, match=r"'.*' cannot be used \(.*\), nor can any of the 19 samples after it"):
        list(make(samples))


def test_an_error_that_no_file_explains_is_not_hidden(make, spoilt, monkeypatch):
    samples, spoil = spoilt
    loader = make(samples)
    list(loader)
    spoil(3)  # marked as good, so that only DALI finds the fault
    monkeypatch.setattr(faults.Faults, "encoded", lambda *_: ({}, []))
    with pytest.raises(RuntimeError, match="encountered:"):
        list(loader)
    assert loader.bad == {}


def test_pillow_decodes_a_batch_that_no_image_explains(make, spoilt, monkeypatch):
    samples, spoil = spoilt
    good = Path(samples.path(3)).read_bytes()
    spoil(3, content=good[: len(good) // 2] + b"\xff" * 20 + good[len(good) // 2 + 20 :])  # in the pixels of a PNG
    monkeypatch.setattr(decoding, "refused", lambda *_, **__: {})
    monkeypatch.setattr(decoding, "sample_of", lambda _: None)
    loader = make(samples, is_training=False)
    with pytest.warns(UserWarning, match=REPLACED) as caught:
        batches = stream(loader)
    assert_named([one for one in caught if REPLACED in str(one.message)], samples, 3)
    assert len(caught) == 4  # each of the others that Pillow decodes from now on
    expected = substituted(samples, {3: 4})
    expected.labels[3] = -100
    assert_same(batches, stream(make(expected, is_training=False)))


# Arguments


@pytest.mark.parametrize(
    "name",
    [
        "deit_small_patch16_224.fb_in1k",
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    ],
)
def test_timms_data_config_is_accepted_unchanged(make, ramp_files, name):
    config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    for is_training in (True, False):
        images, _ = next(iter(make(ramp_files, batch_size=1, is_training=is_training, **config)))
        assert images.shape == (1, *config["input_size"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: give a whole number >= 1"),
        ({"batch_size": 21}, r"batch_size=21: 20 samples do not fill a batch on each of 1 rank\(s\); give a smaller"),
        ({"input_size": (1, 28, 28)}, r"input_size=\(1, 28, 28\): give a side"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': give one of 'float32', 'float16', 'uint8'"),
        (
            {"is_training": False, "interpolation": "random"},
            "interpolation='random': evaluation draws nothing",
        ),
        ({"auto_augment": "augmix-m3"}, "auto_augment='augmix-m3': 'augmix' is not supported"),
        ({"color_jitter": (0.4, 0.4)}, r"color_jitter=\(0.4, 0.4\): give a number >= 0, or three or four"),
        ({"color_jitter": 0.4, "color_jitter_prob": 2}, r"color_jitter_prob=2: give a number in \[0, 1\]"),
        ({"re_prob": -0.1}, r"re_prob=-0.1: give a number in \[0, 1\]"),
        ({"re_prob": 0.1, "re_mode": "noise"}, "re_mode='noise': give one of 'const', 'rand', 'pixel'"),
        ({"re_prob": 0.1, "re_count": 0}, "re_count=0: give a whole number >= 1"),
        ({"num_aug_repeats": -1}, "num_aug_repeats=-1: give a whole number >= 0"),
        (
            {"is_training": False, "re_prob": 0.25, "num_aug_repeats": 3},
            "is_training=False: evaluation augments nothing; leave out re_prob, num_aug_repeats",
        ),
        ({"scale": (0, 1)}, r"scale=\(0, 1\): give \(low, high\) with 0 < low <= high <= 1"),
        ({"ratio": (0, 1)}, r"ratio=\(0, 1\): give \(low, high\) with 0 < low <= high"),
        ({"hflip": 1.5}, r"hflip=1.5: give a number in \[0, 1\]"),
        ({"mean": 0.5}, "mean=0.5: give three numbers"),
        ({"std": (0, 1, 1)}, r"std=\(0, 1, 1\): give three numbers.*above 0"),
        ({"device": "tpu"}, "device='tpu': give 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:99"}, r"device='cuda:99': PyTorch sees \d+ GPU\(s\) here; give 'cpu' or 'auto'"),
        ({"device": "mps"}, "device='mps'"),
        ({"cutmix_alpha": -1}, "cutmix_alpha=-1: give a finite number >= 0"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha=nan: give a finite number >= 0"),
        ({"prob": 1.5}, r"prob=1.5: give a number in \[0, 1\]"),
        ({"cutmix_alpha": 1.0, "switch_prob": -1}, r"switch_prob=-1: give a number in \[0, 1\]"),
        ({"mode": "pair"}, "mode='pair': pair is not supported; give 'elem'"),
        ({"cutmix_minmax": (0.5, 0.2)}, r"cutmix_minmax=\(0.5, 0.2\): give \(low, high\)"),
        ({"is_training": False, "cutmix_alpha": 1.0}, "is_training=False: evaluation mixes nothing; leave"),
        ({"is_training": False, "crop_mode": "border"}, "crop_mode='border': give one of 'center', 'squash'"),
        ({"num_threads": 100_000}, "num_threads=100000: give"),
        ({"decoder": {"nonsense": 1}}, "decoder=.*'nonsense' is unknown; give .*hw_decoder_load"),
        ({"decoder": 5}, "decoder=5: give a dict"),
        ({"reader": {"nonsense": 1}}, "reader=.*'nonsense' is unknown; give .*dont_use_mmap"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
        ({"return_index": "no"}, "return_index='no': give True or False"),
        ({"channels_last": "no"}, "channels_last='no': give True or False"),
        ({"decode_regions": "no"}, "decode_regions='no': give True or False"),
        ({"is_training": False, "crop_pct": 1.5}, "crop_pct=1.5: give a number in"),
        ({"seed": -1}, "seed=-1: give a whole number >= 0"),
        ({"rank": 1}, r"rank=1: give a rank in \[0, world_size\), world_size=1"),
        ({"world_size": 0}, "world_size=0: give a whole number >= 1"),
        ({"prefetch_queue_depth": 0}, "prefetch_queue_depth=0: give a whole number >= 1"),
        ({"max_bad": -1}, "max_bad=-1: give a whole number >= 0"),
    ],
)
def test_a_bad_argument_is_named(ramp_files, options, message):
    with pytest.raises(ValueError, match=message):
        create_loader(ramp_files, **{"batch_size": 4, "device": "cpu"} | options)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_trace_shows_the_wait_for_each_batch(ramp_files, tmp_path, is_training):
    """As for a DataLoader, torch.profiler records a range for each batch, which a trace then shows."""
    options = dict(batch_size=4, input_size=SIZE, num_threads=1, is_training=is_training)
    with (
        create_loader(ramp_files, device="cpu", **options) as loader,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        for images, _ in loader:
            with torch.profiler.record_function("step"):
                images.sum()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {
        name: sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == name and e.get("ph") == "X")
        for name in ("lumix_dali.Loader", "step")
    }
    assert len(spans["step"]) == len(loader) > 1
    assert len(spans["lumix_dali.Loader"]) in (len(loader), len(loader) + 1)  # the last wait finds the end of the epoch
    for (_, ready), (begin, done), (asked, _) in zip(
        spans["lumix_dali.Loader"], spans["step"], [*spans["lumix_dali.Loader"][1:], (float("inf"),) * 2], strict=False
    ):
        assert ready <= begin <= done <= asked  # only the waits, not the work on a batch


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((123.0, 117.0, 104.0), (0.2, 0.2, 0.2)),
        ((0.5, 0.5, 0.5), (58.4, 57.1, 57.4)),
        ((123.7, 116.3, 103.5), (1, 1, 1)),
    ],
)
def test_mean_or_std_in_grey_levels_is_an_error(ramp_files, mean, std):
    with pytest.raises(ValueError, match=r"grey levels; give them .* divided by 255"):
        create_loader(ramp_files, batch_size=4, device="cpu", mean=mean, std=std)
    create_loader(ramp_files, batch_size=4, device="cpu", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(ramp_files):
    for device in ("cuda", "cuda:0", torch.device("cuda:0")):
        with pytest.raises(ValueError, match=r"device=.*cuda.*: PyTorch sees 0 GPU\(s\) here; give 'cpu' or 'auto'"):
            create_loader(ramp_files, batch_size=4, device=device)
    assert create_loader(ramp_files, batch_size=4).device == torch.device("cpu")


def test_local_ranks_share_the_threads(ramp_files, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(12))
    for ranks, threads in ((None, 12), ("4", 3), ("100", 1)):
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert create_loader(ramp_files, batch_size=4, device="cpu")._execution.threads == threads
