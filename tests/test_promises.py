"""The same promises for every source: folder, list, manifest, pairs, tar, TFRecord, rows, and a remote tar.

Every source holds the same samples in the same order, so all of them must give the same stream.
"""

import itertools
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import pack
from fsspec.implementations.memory import MemoryFileSystem
from images import encoded, ramps

from benchmarks.records import write_records
from lumix_dali import create_loader
from lumix_dali.data import sources
from lumix_dali.data.files import class_folder, write_manifest
from lumix_dali.data.order import Order

N, BAD = 13, 5
KINDS = ["folder", "list", "manifest", "pairs", "tar", "tfrecord", "rows", "memory"]
MIX = dict(mixup_alpha=0.8, cutmix_alpha=1.0)
SUBSTITUTE = BAD + 1


def images(bad):
    """One label per sample; the ramps' blue identifies it."""
    found = [encoded(ramps(8, 10, 12 * i) * [16, 16, 1], "PNG") for i in range(N)]
    if bad:
        found[BAD] = b"no image"
    return found


def write_source(kind, root, bad=False):
    """The source for `create_loader`, and part of the bad sample's name."""
    content = images(bad)
    names = [f"{i:02}/{i:02}.png" for i in range(N)]
    if kind in ("folder", "list", "manifest", "pairs"):
        for name, image in zip(names, content, strict=True):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_bytes(image)
        (root / "list.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
        write_manifest(class_folder(root), root / "m.json")
        given = {
            "folder": root,
            "list": root / "list.txt",
            "manifest": root / "m.json",
            "pairs": [(root / name, i) for i, name in enumerate(names)],
        }
        return given[kind], f"'{root}/{names[BAD]}'"
    if kind == "rows":
        return [(image, i) for i, image in enumerate(content)], f"row {BAD}"
    root.mkdir()
    for k in range(0, N, 4):
        part = range(k, min(N, k + 4))
        if kind == "tfrecord":
            write_records(root / f"{k:02}.tfrecord", [(content[i], i, names[i]) for i in part])
        else:
            pack(
                root / f"{k:02}.tar",
                *(member for i in part for member in ((f"{i:02}.png", content[i]), (f"{i:02}.cls", str(i).encode()))),
            )
    if kind == "memory":
        fs = MemoryFileSystem()
        for path in root.glob("*.tar"):
            fs.pipe(f"/{root}/{path.name}".replace("//", "/"), path.read_bytes())
        return f"memory:/{root}", "'05.png'"
    return root, "'05.png'" if kind == "tar" else "record 1 (05/05.png)"


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMIX_DALI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    return sources.load(write_source(kind, tmp_path_factory.mktemp(kind) / "good")[0])


@pytest.fixture(scope="module")
def spoilt(kind, tmp_path_factory):
    given, name = write_source(kind, tmp_path_factory.mktemp(kind) / "bad", bad=True)
    return sources.load(given), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The stream of the rows, which the others must equal."""
    return sources.load(write_source("rows", tmp_path_factory.mktemp("reference"))[0])


def make(source, **options):
    fixed = dict(batch_size=3, input_size=8, num_threads=1, device="cpu", dtype="uint8", shuffle="global", seed=4)
    if not options.get("is_training", True):
        del fixed["shuffle"]
    return create_loader(source, **fixed | options)


def stream(batches):
    """[images, each field of the target, index] of each batch."""
    return [
        [torch.clone(each) for part in batch for each in (part if isinstance(part, tuple) else (part,))]
        for batch in batches
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert len(our) == len(their)
        assert all(torch.equal(a, b) for a, b in zip(our, their, strict=True))


def labels_of(batches):
    return [label for _, target in batches for label in target.labels.tolist()]


def test_every_source_gives_the_same_stream(source, reference):
    options = dict(return_index=True, drop_last=False, **MIX)
    with make(source, **options) as ours, make(reference, **options) as theirs:
        for _ in range(2):
            epoch = stream(ours)
            assert_same(epoch, stream(theirs))
    assert [len(batch[0]) for batch in epoch] == [3, 3, 3, 3, 1]
    order = Order(N, 3, drop_last=False, seed=4).epoch(1).tolist()
    assert [label for batch in epoch for label in batch[1].tolist()] == order  # a sample's label is its number
    assert [index for batch in epoch for index in batch[-1].tolist()] == order


@pytest.mark.filterwarnings("ignore:.*cannot be used")
def test_evaluation_gives_each_sample_once(source):
    ranks = [list(make(source, is_training=False, rank=rank, world_size=2, return_index=True)) for rank in range(2)]
    found = [
        (label, index, int(image[2].float().mean().round()) // 12)
        for batches in ranks
        for images, labels, indices in batches
        for label, index, image in zip(labels.tolist(), indices.tolist(), images, strict=True)
    ]
    assert sorted(found) == [(i, i, i) for i in range(N)]


def test_ranks_have_equal_batches_and_disjoint_samples(source):
    ranks = [labels_of(make(source, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(labels) for labels in ranks] == [6, 6]
    assert len(set(itertools.chain(*ranks))) == 12
    ranks = [labels_of(make(source, rank=rank, world_size=2, drop_last=False)) for rank in range(2)]
    assert [len(labels) for labels in ranks] == [7, 7]
    assert set(itertools.chain(*ranks)) == set(range(N))


def test_repeated_augmentation(source):
    ranks = [make(source, rank=rank, world_size=2, num_aug_repeats=2, hflip=0.5, drop_last=False) for rank in range(2)]
    found = [list(loader) for loader in ranks]
    expected = Order(N, 3, drop_last=False, seed=4).epoch(0)[: -(-N // 2)].tolist()
    assert [labels_of(batches) for batches in found] == [expected, expected]
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(*found, strict=True))  # each repeat is augmented separately


def test_a_bad_sample_is_named_replaced_and_counted(spoilt, source):
    (bad, name), options = spoilt, dict(drop_last=False, return_index=True, max_bad=1)
    with make(bad, **options) as ours, make(source, **options) as theirs:
        for epoch in range(2):
            if epoch:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # known bad samples are not detected again
                    found = stream(ours)
            else:
                with pytest.warns(UserWarning, match="takes its place") as caught:
                    found = stream(ours)
                assert len(caught) == 1
                assert name in str(caught[0].message)
            assert len(ours.bad) == 1
            assert name in next(iter(ours.bad))
            for our, their in zip(found, stream(theirs), strict=True):
                at = their[-1] == BAD
                expected = torch.where(at, SUBSTITUTE, their[-1])
                assert torch.equal(our[-1], expected)
                assert torch.equal(our[1], expected)
                assert torch.equal(our[0][~at], their[0][~at])
    loader = make(bad, max_bad=0, drop_last=False)
    with pytest.raises(ValueError, match=r"cannot be used .*; repair or remove it") as error:
        list(loader)
    assert name in str(error.value)


@pytest.mark.filterwarnings("ignore:.*cannot be used")
@pytest.mark.parametrize("is_training", [True, False])
def test_resume_is_exact(spoilt, is_training):
    """At several points of two epochs, including before and after the bad sample."""
    options = dict(is_training=is_training, return_index=True) | (MIX if is_training else {})
    loader, batches = make(spoilt[0], **options), []
    states = [loader.state_dict()]
    for _ in range(2):
        for batch in loader:
            batches += stream([batch])
            states.append(loader.state_dict())
    for place in (0, 1, len(loader), len(loader) + 2):
        resumed = make(spoilt[0], **options)
        resumed.load_state_dict(states[place])
        endless = itertools.chain.from_iterable(itertools.repeat(resumed))
        expected = batches[place : place + 3]
        assert_same(stream(itertools.islice(endless, len(expected))), expected)


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_a_shard_that_shrinks_during_the_run_is_an_error(kind, tmp_path):
    """Each one that is open, at once; never a SIGBUS."""
    root = write_source(kind, tmp_path / "data")[0]
    loader = make(root, drop_last=False, prefetch_queue_depth=1)
    list(loader)
    for path in Path(root).glob(f"*.{kind}*"):
        os.truncate(path, 100)
    with pytest.raises(ValueError, match=rf"source='{root}/\d\d\.{kind}': it ends before byte \d+; it was longer when"):
        list(loader)


def test_labels_are_the_samples_own(source, reference):
    assert source.read(range(N))[1].tolist() == list(range(N))
    np.testing.assert_array_equal(reference.read([3, 1])[1], [3, 1])


def test_an_iterator_is_dropped_while_its_reads_wait(reference):
    """Garbage collection may drop it in the very thread that its reads wait for."""
    gate = threading.Event()

    class Waiting:
        classes, digest, name = reference.classes, "waiting", reference.name

        def __len__(self):
            return len(reference)

        def read(self, indices):
            if max(indices) >= 3:  # after the first batch
                gate.wait(60)
            return reference.read(indices)

    loader = make(Waiting(), is_training=False, prefetch_queue_depth=1)
    iterators = [iter(loader)]
    next(iterators[0])
    dropping = threading.Thread(target=iterators.clear, daemon=True)
    dropping.start()
    dropping.join(20)
    still_waits = dropping.is_alive()
    gate.set()
    dropping.join()
    assert not still_waits
