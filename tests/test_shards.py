"""Shards: what is read from them is what was written, in DALI's order, once, and again after a resume.

Every sample has a label of its own, so that the labels of a stream tell which samples it held. What `convert`
writes is compared with the wheel's own index tools, with `tarfile`, and with another implementation of CRC-32C.
"""

import io
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time

import google_crc32c
import numpy as np
import pytest
import torch
from images import damaged, encoded, ramp_samples
from test_train import argv, rows, write_folder

from lumix_dali import create_loader
from lumix_dali.data import check, index, sources
from lumix_dali.cli import main
from lumix_dali.data.convert import convert
from pipelines import train

KINDS = ["webdataset", "tfrecord"]
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
COUNT = 23


def make(source, **options):
    fixed = {"batch_size": 4, "input_size": (12, 18), "num_threads": 1, "device": "cpu"}
    return create_loader(source, **fixed | options)


def stream(batches):
    """[images, label, partner's label, λ0, …] of each batch."""
    return [[images.clone(), *(field.clone() for field in (target if isinstance(target, tuple) else [target]))]
            for images, target in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(our, their, strict=True))


def labels_of(batches):
    labels = [target if torch.is_tensor(target) else target.labels for _, target in batches]
    return [label for each in labels for label in each.tolist()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`Samples` of 23 images, a class each."""
    return ramp_samples(tmp_path_factory.mktemp("ramps"), COUNT)


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    """{kind: folder of 5 shards of `files`}."""
    root = tmp_path_factory.mktemp("shards")
    for kind in KINDS:
        convert(files, root / kind, to=kind, shard_size=5)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of `folder`, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


def pack(path, *members, index=True):
    """A tar of (name, content) or `TarInfo`, with the wheel's index."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    if index:
        wheels_index(path, path.with_suffix(".idx"))
    return path


def wheels_index(path, index):
    """The index that DALI's own tool writes."""
    tool = "wds2idx" if path.suffix == ".tar" else "tfrecord2idx"
    command = [sys.executable, os.path.join(os.path.dirname(sys.executable), tool), str(path), str(index)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return index.read_text()


JPEG = encoded(np.random.default_rng(0).integers(0, 256, (32, 40, 3)), "JPEG", quality=90)


# What is read


def test_shards_hold_what_the_files_hold(files, folder):
    """Unshuffled, the stream is that of a list in the order in which the shards were written."""
    order = np.random.default_rng(0).permutation(COUNT)
    written = sources.Files(files.root, [files.names[i] for i in order], files.labels[order], files.classes)
    loader = make(folder, is_training=False)
    assert_same(stream(loader), stream(make(written, is_training=False)))
    assert (len(loader), len(loader.dataset), loader.classes) == (6, COUNT, files.classes)
    assert loader.num_classes == COUNT
    assert loader.dataset.class_to_idx == files.class_to_idx


def test_every_way_to_name_shards(folder, kind, tmp_path):
    paths = sorted(str(path) for path in folder.glob(f"*{shards.SUFFIX[kind]}"))
    expected = sources.load(folder)
    assert len(paths) == 5
    for source in (str(folder), f"{folder}/shard-*", paths, tuple(paths), folder / "*"):
        assert sources.load(source).digest == expected.digest
        assert isinstance(sources.load(source), shards.Shards)
    assert sources.load(expected) is expected
    assert sources.load(paths[1:3]).counts.tolist() == [5, 5]
    assert sources.load(paths[4]).counts.tolist() == [3]
    assert sources.load(paths[4]).classes == expected.classes
    shutil.copytree(folder, tmp_path / "moved")
    assert sources.load(tmp_path / "moved").digest == expected.digest
    (tmp_path / "moved" / "shards.json").unlink()
    unknown = make(tmp_path / "moved")
    assert (unknown.classes, unknown.num_classes, unknown.dataset.class_to_idx) == (None, None, {})


def test_archives_beside_class_folders_are_passed_over(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(JPEG)
    pack(tmp_path / "old.tar", ("a.jpg", JPEG))
    assert sources.load(tmp_path).names == ["cat/a.jpg"]


@pytest.mark.parametrize("is_training", [True, False])
def test_labels_are_int64_scalars_whatever_holds_them(tmp_path, is_training):
    """Text of one to nine digits, newline or not; extensions in capitals; members that are no sample's."""
    labels = [0, 7, 10, 42, 999, 123456789, 100000000]
    texts = [b"0", b"7\n", b"10", b"042", b"999\r\n", b"123456789", b"100000000"]
    members = [("notes.txt", b"x"), ("._0.jpg", b"x")]
    for i, text in enumerate(texts):
        members += [(f"{i}.cls", text), (f"{i}.JPG", JPEG), (f"{i}.json", b"{}")]
    pack(tmp_path / "a.tar", *members)
    loader = make(tmp_path / "a.tar", batch_size=7, is_training=is_training, cutmix_alpha=float(is_training))
    ((_, target),) = loader
    for field in (target.labels, target.partner_labels) if is_training else (target,):
        assert (field.dtype, tuple(field.shape)) == (torch.int64, (7,))
        assert sorted(field.tolist()) == sorted(labels)


def message(number, content):
    """A field of protocol buffers, with a length."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def test_packed_and_unpacked_integers_of_tfrecords(tmp_path):
    """Protocol buffers allow both; TensorFlow, and `convert`, write the first."""
    content = b""
    for label in (3, 300, 70000):
        image = message(1, message(1, shards.IMAGE.encode()) + message(2, message(1, message(1, JPEG))))
        both = [message(1, image + message(1, message(1, shards.LABEL.encode()) + message(2, message(3, values))))
                for values in (message(1, varint(label)), b"\x08" + varint(label))]
        assert both[0] == shards.example({shards.IMAGE: JPEG, shards.LABEL: label})
        for example in both:
            assert shards.parse_example(example) == {shards.LABEL: [label], shards.IMAGE: [JPEG]}
            content += shards.record(example)
    (tmp_path / "a.tfrecord").write_bytes(content)
    wheels_index(tmp_path / "a.tfrecord", tmp_path / "a.tfrecord.idx")
    loader = make(tmp_path / "a.tfrecord", is_training=False)
    assert labels_of(loader) == [3, 3, 300, 300, 70000, 70000]


# Who reads what


def assert_fair(source, n, batch_size, world_size, epochs=4):
    """Training: equal batches, a sample at most once an epoch. Evaluation: each sample exactly once."""
    small = {"batch_size": batch_size, "world_size": world_size, "input_size": 4, "initial_fill": 6}
    val = [make(source, is_training=False, rank=rank, **small) for rank in range(world_size)]
    per_rank = [labels_of(loader) for loader in val]
    assert sorted(itertools.chain(*per_rank)) == list(range(n))
    assert [len(loader) for loader in val] == [-(-len(labels) // batch_size) for labels in per_rank]
    assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1
    if n < batch_size * world_size:
        return
    train = [make(source, rank=rank, hflip=0, **small) for rank in range(world_size)]
    seen = []
    for _ in range(epochs):
        batches = [list(loader) for loader in train]
        assert {len(each) for each in batches} == {n // (batch_size * world_size)}
        assert {len(images) for each in batches for images, _ in each} == {batch_size}
        labels = [labels_of(each) for each in batches]
        assert len(set(itertools.chain(*labels))) == len(list(itertools.chain(*labels)))
        seen.append(labels)
    assert n < 12 or len({str(labels) for labels in seen}) == epochs


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """`counted(kind, n)`: a folder of n samples, labels 0 to n - 1, in shards of 7."""
    pixel, made = tmp_path_factory.mktemp("pixel"), {}
    (pixel / "a.png").write_bytes(encoded(np.full((4, 4, 3), 9), "PNG"))

    def build(kind, n):
        if (kind, n) not in made:
            made[kind, n] = tmp_path_factory.mktemp("counted") / "shards"
            samples = sources.Files(str(pixel), ["a.png"] * n, np.arange(n), [str(k) for k in range(n)])
            convert(samples, made[kind, n], to=kind, shard_size=7)
        return made[kind, n]

    return build


@pytest.mark.parametrize(("n", "batch_size", "world_size"), [
    (97, 8, 4), (9, 2, 2), (6, 3, 2), (2, 1, 3), (25, 3, 3)])
def test_each_sample_once_by_brute_force(counted, kind, n, batch_size, world_size):
    assert_fair(counted(kind, n), n, batch_size, world_size)


@pytest.mark.slow
def test_each_sample_once_by_more_brute_force(counted, kind):
    for case in itertools.product([1, 7, 8, 16, 23, 24, 25, 31, 32, 33, 96, 97], [1, 3, 8], [1, 2, 3, 4]):
        assert_fair(counted(kind, case[0]), *case)


def test_ranks_seeds_and_epochs_differ(counted):
    loaders = [make(counted("webdataset", 97), batch_size=8, seed=seed, rank=rank, world_size=2)
               for seed in range(2) for rank in range(2)]
    assert len({tuple(labels_of(loader)) for loader in loaders for _ in range(3)}) == 12


def test_in_time_a_rank_reads_every_sample(counted):
    """One file, two ranks: they take the halves in turn."""
    (path,) = (counted("webdataset", 6)).glob("*.tar")
    loader = make(path, batch_size=3, world_size=2)
    assert sorted(labels_of(loader) + labels_of(loader)) == sorted(range(6))


def test_shards_come_in_a_new_order_every_epoch(folder, files):
    """With a buffer of one, only the order of the shards is left of the shuffle, drawn from (seed, epoch)."""
    written = np.random.default_rng(0).permutation(COUNT).tolist()
    loader = make(folder, batch_size=COUNT, initial_fill=1, seed=3)
    for epoch in range(3):
        order = np.random.default_rng([3, epoch]).permutation(5)
        assert labels_of(loader) == [label for shard in order for label in written[5 * shard :][:5]]


def test_the_window_reaches_as_far_as_it_is_wide(counted):
    """In a window of 4, a sample moves by 3 places at most, and most of them move."""
    root = counted("tfrecord", 97)
    expected = labels_of(make(root, batch_size=97, initial_fill=1))
    moved = [expected.index(label) - place for place, label in enumerate(labels_of(make(root, batch_size=97,
                                                                                       initial_fill=4)))]
    assert (min(moved), max(moved)) == (-3, 3)
    assert 40 < np.count_nonzero(moved)


# The stream


def test_threads_and_prefetch_change_nothing(folder):
    expected = [stream(loader) for loader in [make(folder, **MIX)] for _ in range(2)]
    loader = make(folder, num_threads=2, prefetch_queue_depth=5, **MIX)
    for each in expected:
        assert_same(stream(loader), each)


@pytest.mark.parametrize("is_training", [True, False])
def test_every_state_leads_to_the_same_stream(folder, is_training):
    options = {"batch_size": 3, "world_size": 2, "rank": 1, "initial_fill": 5, "is_training": is_training}
    options |= MIX if is_training else {}
    loader, batches = make(folder, **options), []
    states = [(0, loader.state_dict())]
    for _ in range(3):
        for batch in loader:
            batches += stream([batch])
            states.append((len(batches), loader.state_dict()))
    assert len(states) == (10 if is_training else 13)
    for place, state in states[:-1]:
        resumed = make(folder, **options)
        resumed.load_state_dict(state)
        endless = itertools.chain.from_iterable(itertools.repeat(resumed))
        expected = batches[place : place + 5]  # into the next epoch
        assert_same(stream(itertools.islice(endless, len(expected))), expected)


def test_after_a_break_comes_a_whole_epoch(folder):
    expected = [stream(loader) for loader in [make(folder)] for _ in range(2)]
    loader = make(folder)
    next(iter(loader))
    assert_same(stream(loader), expected[1])


@pytest.mark.parametrize("change", ["name", "size", "index", "classes", "order", "initial_fill"])
def test_a_state_of_other_shards_is_refused(folder, kind, copy, change):
    state, options = make(folder).state_dict(), {}
    first, source = sorted(copy.glob(f"*{shards.SUFFIX[kind]}"))[0], copy
    if change == "name":
        for path in (first, first.with_suffix(".idx")):
            path.rename(path.with_stem("another"))
    elif change == "size":
        if kind == "tfrecord":
            pytest.skip("its index covers its file")
        first.write_bytes(first.read_bytes() + bytes(10240))
    elif change == "index":
        first.with_suffix(".idx").write_text(first.with_suffix(".idx").read_text().replace(" ", "  ", 1))
    elif change == "classes":
        content = json.loads((copy / "shards.json").read_text())
        (copy / "shards.json").write_text(json.dumps(content | {"classes": ["x", *content["classes"][1:]]}))
    elif change == "order":
        source = sorted(map(str, copy.glob(f"*{shards.SUFFIX[kind]}")))[::-1]
    else:
        options = {"initial_fill": 7}
    with pytest.raises(ValueError, match=r"state: it is another loader's: .*(data|initial_fill) was"):
        make(source, **options).load_state_dict(state)


# Samples that cannot be used


@pytest.fixture
def spoilt(kind, tmp_path):
    """`spoilt(damage)`: shards of 12 good samples but for one, its number in them, and the words that name it."""
    def build(damage):
        for i in range(12):
            (tmp_path / f"{i}.jpg").write_bytes(damaged()[damage] if i == 7 else JPEG)
        names = [f"{i}.jpg" for i in range(12)]
        samples = sources.Files(str(tmp_path), names, np.arange(12), names)
        convert(samples, tmp_path / "out", to=kind, shard_size=5)
        place = np.random.default_rng(0).permutation(12).tolist().index(7)
        name = "sample '000000007.jpg'" if kind == "webdataset" else f"record {place % 5} "
        return tmp_path / "out", place, f"'{tmp_path}/out/shard-{place // 5:06}{shards.SUFFIX[kind]}', {name}"

    return build


DAMAGE = pytest.mark.parametrize("damage", ["truncated.jpg", "text.jpg", "zero bytes.jpg"])


@DAMAGE
@pytest.mark.parametrize("is_training", [True, False])
def test_a_damaged_sample_is_named_and_replaced(spoilt, damage, is_training):
    root, place, name = spoilt(damage)
    loader = make(root, batch_size=3, prefetch_queue_depth=3, is_training=is_training)
    with pytest.warns(UserWarning, match=rf"^{name}.* cannot be used .* takes its place") as caught:
        labels = labels_of(loader)
    assert len(caught) == 1
    assert loader.bad == {place: (place + 1) % 12}
    written = np.random.default_rng(0).permutation(12).tolist()
    assert sorted(labels) == sorted([*(set(range(12)) - {7}), written[(place + 1) % 12]])


@DAMAGE
def test_a_damaged_sample_can_be_an_error(spoilt, damage):
    root, _, name = spoilt(damage)
    loader = make(root, batch_size=3, on_bad_sample="raise")
    with pytest.raises(ValueError, match=rf"^{name}.* cannot be used .* repair or remove it"):
        list(loader)
    assert loader.bad == {}


@pytest.mark.parametrize("text", [
    b"cat", b"", b"-1", b"1.5", b"\n", b"1234567890", b"n01440764", b"0x1", b"1 ", b" 1",
    b"1 2", b"\t1\n", b"1\0"])
def test_a_label_that_is_no_number_is_named(tmp_path, text):
    pack(tmp_path / "a.tar", ("0.jpg", JPEG), ("0.cls", b"3"), ("1.jpg", JPEG), ("1.cls", text))
    loader = make(tmp_path / "a.tar", batch_size=2, is_training=False)
    if text == b"1 ":
        assert labels_of(loader) == [3, 1]
        return
    with pytest.warns(UserWarning, match=r"a\.tar', sample '1\.jpg' .* cannot be used \(its \.cls is"):
        assert labels_of(loader) == [3, 3]


def test_a_label_beyond_the_classes_is_named(copy, files):
    content = json.loads((copy / "shards.json").read_text())
    (copy / "shards.json").write_text(json.dumps(content | {"classes": files.classes[:-1]}))
    loader = make(copy, is_training=False)
    with pytest.warns(UserWarning, match="its label is 22, of 22 classes"):
        labels = labels_of(loader)
    assert max(labels) == 21


def test_a_shard_that_is_cut_under_the_run_is_an_error(copy, kind):
    loader = make(copy, is_training=False)
    list(loader)
    path = sorted(copy.glob(f"*{shards.SUFFIX[kind]}"))[2]
    offset, size = loader.samples.places[14, :2].tolist()  # the third shard's last sample, cut in its middle
    os.truncate(path, offset + size // 2)
    with pytest.raises(ValueError, match=rf"source='{path}': it ends before byte \d+; it was longer when the run"):
        list(loader)
    path.unlink()
    with pytest.raises(ValueError, match=rf"source='{path}': No such file .*; it was there when the run began"):
        list(loader)


def test_training_from_shards(kind, tmp_path):
    data = write_folder(tmp_path / "data", {"train": 33, "val": 5})
    for name in ("train", "val"):
        convert(sources.folder(data / name), tmp_path / "shards" / name, to=kind, shard_size=20)
    train.main(argv(data, tmp_path / "a", "--epochs", "1"))
    train.main(argv(tmp_path / "shards", tmp_path / "b", "--epochs", "1"))
    ours, theirs = (rows(tmp_path / name / "run")[0] for name in "ba")
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=.7)  # another order and other draws
    (tmp_path / "shards" / "train" / "shards.json").unlink()
    with pytest.raises(ValueError, match="nothing says which classes the shards in train have"):
        train.main(argv(tmp_path / "shards", tmp_path / "c"))


# Arguments and files


@pytest.mark.parametrize(("options", "message"), [
    ({"shuffle": "global"}, r"shuffle='global': shards are read in sequence; give 'buffer', and write .*convert"),
    ({"shuffle": "some"}, "shuffle='some': give one of 'auto', 'global', 'buffer'"),
    ({"drop_last": False}, "drop_last=False: training from shards drops the incomplete batch; leave it True"),
    ({"num_aug_repeats": 3}, "num_aug_repeats=3: shards are read in sequence; leave it at 0"),
    ({"initial_fill": 0}, "initial_fill=0: give a whole number >= 1"),
    ({"reader": {"dont_use_mmap": True}}, r"reader=.*: shards are read by the loader itself; leave it out"),
    ({"batch_size": 24}, "batch_size=24: 23 samples do not fill a batch"),
])
def test_a_bad_argument_is_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_a_folder_has_no_buffer(files, folder):
    with pytest.raises(ValueError, match="shuffle='buffer': a folder or a list is shuffled as a whole; give"):
        make(files, shuffle="buffer")
    assert_same(stream(make(files, shuffle="global")), stream(make(files)))
    assert_same(stream(make(folder, shuffle="buffer")), stream(make(folder)))


def test_shards_of_no_use(copy, kind):
    suffix = shards.SUFFIX[kind]
    first = copy / f"shard-000000{suffix}"
    index, content = first.with_suffix(".idx"), first.read_bytes()

    def refused(message, source=copy):
        with pytest.raises(ValueError, match=message):
            make(source)

    refused("give shards of one kind, each of them once", [first, first])
    refused("give shards of one kind, each of them once", [copy / "a.tar", copy / "b.tfrecord"])
    refused("no such shard; give one that exists", [copy / f"nowhere{suffix}"])
    refused("no shard in this list", [])
    first.write_bytes(content[:1000])
    refused(f"source='{first}': its index ends at byte .* of .*; write it again")
    first.write_bytes(content)
    text = index.read_text()
    for damage in ("", "v1.2", "1 2 3", "x y\n", "v9.9 1\njpg 512 9 a.jpg\n", "v1.2 1\njpg 512 9 a b.jpg\n"):
        index.write_text(damage)
        refused(f"source='{first}': its index ")
    index.write_text("".join(text.splitlines(keepends=True)[1:]))
    refused("its index is damaged" if kind == "webdataset" else r"4 samples in its index, 5 in shards\.json")
    index.unlink()
    tool = "wds2idx" if suffix == ".tar" else "tfrecord2idx"
    refused(rf"no shard-000000\.idx beside it; write it with DALI's {tool}")
    index.write_text(text)
    for damage in ("{", "{}", "[]", '{"format": "x"}'):
        (copy / "shards.json").write_text(damage)
        refused(r"shards\.json': (damaged|not all)")


@pytest.mark.parametrize(("members", "message"), [
    ([("0.jpg", JPEG)], r"sample '0\.jpg' has 1 image\(s\) and 0 \.cls"),
    ([("0.cls", b"1")], r"sample '0\.cls' has 0 image\(s\) and 1 \.cls"),
    ([("0.jpg", JPEG), ("0.png", JPEG), ("0.cls", b"1")], r"has 2 image\(s\) and 1 \.cls"),
    ([("0.jpg", JPEG), ("1.jpg", JPEG), ("0.cls", b"1"), ("1.cls", b"1")], r"has 1 image\(s\) and 0 \.cls"),
])
def test_a_sample_without_image_or_label_is_named(tmp_path, members, message):
    pack(tmp_path / "a.tar", ("good.jpg", JPEG), ("good.cls", b"0"), *members)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "a.tar", batch_size=1)


# Writing


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 255, 256, 257, 1000, 65537])
def test_crc32c_equals_another_implementation(size):
    content = np.random.default_rng(size).bytes(size)
    assert shards.crc32c(content) == google_crc32c.value(content)


def test_crc32c_of_rfc_3720():
    assert shards.crc32c(bytes(32)) == 0x8A9136AA
    assert shards.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert shards.crc32c(bytes(range(32))) == 0x46DD794E


def test_the_index_is_the_wheels(folder, kind, tmp_path):
    for path in sorted(folder.glob(f"*{shards.SUFFIX[kind]}")):
        assert path.with_suffix(".idx").read_text() == wheels_index(path, tmp_path / "index")


def test_bytes_and_labels_are_untouched(files, folders):
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    contents = {i: (f"{i:09}.png", shards.read_bytes(files.path(i)), str(i).encode()) for i in order}
    found = []
    for path in sorted(folders["webdataset"].glob("*.tar")):
        with tarfile.open(path) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]
        found += [(*image, label) for image, (_, label) in zip(members[::2], members[1::2], strict=True)]
    assert found == [contents[i] for i in order]
    content = b"".join(path.read_bytes() for path in sorted(folders["tfrecord"].glob("*.tfrecord")))
    for i in order:
        length, check = struct.unpack("<QI", content[:12])
        assert check == masked(content[:8])
        example = content[12 : 12 + length]
        assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked(example),)
        assert contents[i][1] in example
        assert files.names[i].encode() in example
        content = content[16 + length :]
    assert content == b""


def masked(content):
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_the_description(files, folder, kind):
    content = json.loads((folder / "shards.json").read_text())
    names = [f"shard-{i:06}{shards.SUFFIX[kind]}" for i in range(5)]
    assert content == {"format": "lumix_dali.shards/1", "complete": True, "kind": kind, "seed": 0, "shard_size": 5,
                       "digest": files.digest, "classes": files.classes, "counts": [1] * COUNT,
                       "shards": dict(zip(names, [5, 5, 5, 5, 3], strict=True))}
    indices = [f"shard-{i:06}.idx" for i in range(5)]
    assert sorted(os.listdir(folder)) == sorted(["shards.json", *names, *indices])


@pytest.mark.parametrize("stop", range(0, COUNT, 4))
def test_a_conversion_that_was_killed_goes_on(files, folder, kind, tmp_path, monkeypatch, stop):
    out, read, count = tmp_path / "out", shards.read_bytes, itertools.count()

    def killed(path):
        if next(count) == stop:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(shards, "read_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(files, out, to=kind, shard_size=5)
    monkeypatch.undo()
    whole = sorted(out.glob(f"*{shards.SUFFIX[kind]}"))
    assert len(whole) == stop // 5
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in whole)
    with pytest.raises(ValueError, match="not all shards are written; run the same `lumix-dali convert` again"):
        sources.load(out)
    before = [path.stat().st_mtime_ns for path in whole]
    convert(files, out, to=kind, shard_size=5)
    assert [path.stat().st_mtime_ns for path in whole] == before
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_has_a_shards_name_is_whole(files, folder, kind, tmp_path, monkeypatch):
    """Killed before each single renaming in turn: a shard that is there has its index, and both are right."""
    replace, out = os.replace, tmp_path / "out"
    for stop in itertools.count():
        count = itertools.count()

        def killed(*paths, count=count, stop=stop):
            if next(count) == stop:
                raise KeyboardInterrupt
            replace(*paths)

        shutil.rmtree(out, ignore_errors=True)
        monkeypatch.setattr(os, "replace", killed)
        try:
            convert(files, out, to=kind, shard_size=5)
            break
        except KeyboardInterrupt:
            for shard in out.glob(f"*{shards.SUFFIX[kind]}"):
                for path in (shard, shard.with_suffix(".idx")):
                    assert path.read_bytes() == (folder / path.name).read_bytes()
    assert stop == 12  # two for each of five shards, two for the description


def test_a_folder_of_something_else_is_left_alone(files, copy, kind, tmp_path):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for options, named in [({"seed": 1}, "seed"), ({"shard_size": 6}, "shard_size"),
                           ({"to": KINDS[kind == "webdataset"]}, "kind")]:
        with pytest.raises(ValueError, match=f"it holds shards of another {named}; give a new one"):
            convert(files, copy, **{"to": kind, "shard_size": 5} | options)
    with pytest.raises(ValueError, match="it holds shards of another digest"):
        convert(sources.Files(files.root, files.names[1:], files.labels[1:], files.classes), copy, to=kind,
                shard_size=5)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"'a\.txt' is in it; give an empty or a new folder"):
        convert(files, tmp_path / "full", to=kind)


def test_the_command(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(JPEG)
    (tmp_path / "in" / "cat" / "bad.jpg").write_bytes(b"no image")
    command = ["convert", str(tmp_path / "in"), "--to", "webdataset", "--out", str(tmp_path / "out")]
    assert main([*command, "--shard-size", "3"]) == 0
    out = capsys.readouterr()
    assert "left out 'cat/bad.jpg': " in out.err
    assert "8 samples in 3 shards" in out.out
    loader = make(tmp_path / "out", is_training=False)
    assert (sorted(labels_of(loader)), loader.classes) == ([0] * 4 + [1] * 4, ["cat", "dog"])
    assert main(command) == 2
    assert "it holds shards of another shard_size" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "out"), "-o", str(tmp_path / "a.png"), "--count", "4"]) == 0
    assert main(["convert", str(tmp_path / "out"), "--to", "tfrecord", "--out", str(tmp_path / "b")]) == 2
    assert "these are shards; give a class folder" in capsys.readouterr().err


# Checking


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_good_shards_pass(files, folder, kind, full):
    report = check.scan(folder, full=full, workers=1)
    assert report.ok
    assert (report.bad, report.ignored, report.warnings) == ({}, [], [])
    assert report.counts == dict.fromkeys(files.classes, 1)
    assert list(report.files.values()) == [5, 5, 5, 5, 3]
    assert f"{COUNT} usable images in {COUNT} classes\n" in check.show(report)
    assert "5 shards of 3 to 5 samples" in check.show(report)


def linked(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "0.jpg"
    return info


def test_every_fault_of_a_tar_is_named(tmp_path):
    good = [("0.jpg", JPEG), ("0.cls", b"0"), ("1.jpg", JPEG), ("1.cls", b"1")]
    faults = {
        "cut.jpg": [("cut.jpg", JPEG[: len(JPEG) // 2]), ("cut.cls", b"0")],
        "text.jpg": [("text.jpg", b"no image"), ("text.cls", b"0")],
        "unlabelled": [("unlabelled.jpg", JPEG)],
        "blind": [("blind.cls", b"1")],
        "word": [("word.jpg", JPEG), ("word.cls", b"cat")],
        "two": [("two.jpg", JPEG), ("two.png", JPEG), ("two.cls", b"0")],
        "a blank": [("a blank.jpg", JPEG), ("a blank.cls", b"0")],
        "0.jpg": [("0.jpg", JPEG), ("0.cls", b"1")],
        "huge.jpg": [("huge.jpg", JPEG), ("huge.cls", b"1000000")],
    }
    others = [linked("soft", tarfile.SYMTYPE), linked("hard", tarfile.LNKTYPE), linked("device", tarfile.CHRTYPE),
              linked("pipe", tarfile.FIFOTYPE), linked("folder", tarfile.DIRTYPE), (".hidden.jpg", JPEG)]
    pack(tmp_path / "a.tar", *good, *others, *itertools.chain(*faults.values()))
    report = check.scan(tmp_path / "a.tar", workers=1)
    assert report.bad.keys() == {"a.tar/index", *(f"a.tar/{name}" for name in faults)}  # the blank is in the index
    for name, reason in [("cut.jpg", "truncated"), ("text.jpg", "not an image"), ("unlabelled", "no .cls"),
                         ("blind", "0 images"), ("word", "its .cls is b'cat'"), ("two", "2 images"),
                         ("a blank", "blank"), ("0.jpg", "its key occurs twice"),
                         ("huge.jpg", "not below 1000000"), ("index", "blank")]:
        assert reason in report.bad[f"a.tar/{name}"]
    assert report.ignored == [f"a.tar/{name}" for name in ("soft", "hard", "device", "pipe", ".hidden.jpg")]
    assert not report.ok
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.tar"]  # nothing was extracted


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../up.jpg"])
def test_a_member_that_leads_out_is_refused(tmp_path, name):
    pack(tmp_path / "a.tar", ("0.jpg", JPEG), ("0.cls", b"0"), (name, JPEG))
    report = check.scan(tmp_path / "a.tar", workers=1)
    assert "leads out of the archive; refused" in report.bad["a.tar"]
    assert not report.ok
    assert main(["check", str(tmp_path / "a.tar"), "--workers", "1"]) == 1


def test_a_tfrecord_that_was_changed_is_named(copy, kind):
    """DALI itself reads on where a checksum does not match."""
    path = copy / f"shard-000001{shards.SUFFIX[kind]}"
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT") + 20
    content[place] ^= 1
    path.write_bytes(content)
    report = check.scan(copy, full=True, workers=1)
    assert len(report.bad) == 1
    ((name, reason),) = report.bad.items()
    assert name.startswith(f"{path.name}/")
    if kind == "tfrecord":
        assert "its checksum at byte 0 does not match" in reason


def test_cut_shards_and_their_indices(copy, kind):
    suffix = shards.SUFFIX[kind]
    cut, stale, bare = (copy / f"shard-00000{i}{suffix}" for i in range(3))
    cut.write_bytes(cut.read_bytes()[:1000])
    stale.with_suffix(".idx").write_text((copy / "shard-000003.idx").read_text())
    bare.with_suffix(".idx").unlink()
    report = check.scan(copy, workers=1)
    assert "cut" in report.bad[cut.name] or "no whole tar archive" in report.bad[cut.name]
    assert f"{cut.name}/index" in report.bad
    assert report.bad[f"{stale.name}/index"] == "its index is of another file"
    assert report.bad[f"{bare.name}/index"] == "no shard-000002.idx beside it"
    assert len(report.bad) == 4


def test_sorted_shards_and_repeated_keys_are_warned_of(tmp_path):
    def members(labels):
        return [pair for i, label in enumerate(labels)
                for pair in ((f"{i}.jpg", JPEG), (f"{i}.cls", str(label).encode()))]

    pack(tmp_path / "a.tar", *members([0] * 6 + [1] * 6))
    assert ["sorted by class" in warning for warning in check.scan(tmp_path, workers=1).warnings] == [True]
    pack(tmp_path / "a.tar", *members([0, 1, 1, 0, 1, 0, 0, 1]))
    assert check.scan(tmp_path, workers=1).warnings == []
    pack(tmp_path / "b.tar", *members([0, 1, 0]))
    report = check.scan(tmp_path, workers=1)
    assert report.warnings == ["3 keys occur in more than one shard: the same samples twice?"]
    assert report.ok  # they can be read


def test_the_report_of_shards(folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    command = ["check", str(folder), "--workers", "1"]
    assert main([*command, "--report", str(report), "--ranks", "2", "--batch-size", "3"]) == 0
    content = json.loads(report.read_text())
    assert content["ok"] is True
    assert content["images"] == COUNT
    assert content["shards"] == {"ranks": 2, "batch_size": 3, "batches": 3, "left_out": 5}
    assert list(content["files"].values()) == [5, 5, 5, 5, 3]
    assert main([*command, "--manifest", str(tmp_path / "m.json")]) == 2
    assert "a manifest lists files, not shards" in capsys.readouterr().err


# S3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A client of a server on the loopback, with an empty bucket; DALI reads the same environment."""
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A process of its own: DALI holds Python's lock while it waits for an answer.
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "DEFAULT_REGION": "us-east-1",
                            "ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(f"AWS_{name}", value)
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(.05)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        yield client
    server.kill()
    server.wait()


def upload(client, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "images", f"{prefix}/{path.relative_to(folder)}")


def test_s3_gives_what_the_disk_gives(bucket, files, folder, kind, tmp_path):
    upload(bucket, folder, f"some/{kind}")
    for source in (f"s3://images/some/{kind}", f"s3://images/some/{kind}/", f"s3://images/some/{kind}/shard-*"):
        assert sources.load(source).digest == sources.load(folder).digest
    local, remote = make(folder, **MIX), make(f"s3://images/some/{kind}", **MIX)
    assert_same(stream(remote), stream(local))
    remote.load_state_dict(local.state_dict())
    val = [make(source, is_training=False) for source in (f"s3://images/some/{kind}", folder)]
    assert_same(stream(val[0]), stream(val[1]))


def test_folders_and_lists_in_s3(bucket, files, tmp_path):
    for i, name in enumerate(files.names):
        path = tmp_path / "root" / f"class {i % 3}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.path(i), path)
    (tmp_path / "root" / ".hidden").mkdir()
    (tmp_path / "root" / ".hidden" / "a.jpg").write_bytes(b"")
    upload(bucket, tmp_path / "root", "train")
    local = make(tmp_path / "root", **MIX)
    assert sources.load("s3://images/train").digest == local.samples.digest
    assert_same(stream(make("s3://images/train/", **MIX)), stream(local))

    lines = [f"{name} {label}\n" for name, label in zip(local.samples.names, local.samples.labels, strict=True)]
    (tmp_path / "root" / "list.txt").write_text("".join(lines))
    upload(bucket, tmp_path / "root", "train")
    expected = stream(make(tmp_path / "root" / "list.txt", is_training=False))
    assert_same(stream(make("s3://images/train/list.txt", is_training=False)), expected)
    (tmp_path / "urls.txt").write_text("".join(f"s3://images/train/{line}" for line in lines))
    assert_same(stream(make(tmp_path / "urls.txt", is_training=False)), expected)


def test_what_is_not_in_s3_is_named(bucket, folder, kind):
    for source, message in [("s3://images/nowhere", "no class folder in it"), ("s3://nobucket/a", "NoSuchBucket"),
                            ("s3://images/nowhere.tar", "no such shard")]:
        with pytest.raises(ValueError, match=f"source='{source}'.*{message}"):
            make(source)
    with pytest.raises(ValueError, match="in S3 are not scanned; scan them before the upload"):
        check.scan("s3://images/train")


def test_a_damaged_object_in_s3_is_replaced(bucket, files, tmp_path):
    shutil.copytree(files.root, tmp_path / "root" / "a")
    upload(bucket, tmp_path / "root", "spoilt")
    bucket.put_object(Bucket="images", Key=f"spoilt/a/{files.names[3]}", Body=b"no image")
    loader = make("s3://images/spoilt", is_training=False)
    with pytest.warns(UserWarning, match=f"'s3://images/spoilt/a/{files.names[3]}' cannot be used"):
        assert len(list(loader)) == 6
    assert loader.bad == {3: 4}
