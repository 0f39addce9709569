"""Folders, lists, pairs and rows become the expected samples. Classes are numbered as in timm."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder

from lumix_dali import create_loader
from lumix_dali.data import sources
from lumix_dali.data.convert import convert
from lumix_dali.data.files import Files, Names, class_folder, file_list, write_manifest
from lumix_dali.data.rows import Rows


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


# Folders


@pytest.mark.parametrize(
    "classes",
    [
        ["1", "2", "10", "20", "100"],
        ["n02", "n10", "n1"],
        ["Zebra", "ant", "Bee"],
        ["class 9", "class 10", "été", "犬", "a\nb"],
        ["0", "x", "1x", "x1"],
    ],
)
def test_classes_are_numbered_as_timm_numbers_them(tmp_path, classes):
    root = touch(tmp_path, *(f"{name}/{i}.jpg" for name in classes for i in range(2)))
    assert class_folder(root).class_to_idx == create_dataset("", str(root)).reader.class_to_idx


def scan_in_order(monkeypatch, key, scandir=os.scandir):
    """Makes `os.scandir` list in the order of `key`, as another file system might."""
    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext(sorted(scandir(path), key=key)))


@pytest.mark.parametrize("names", [("1", "01", "001"), ("A", "a")])
def test_classes_of_one_natural_key_do_not_depend_on_the_file_system(tmp_path, monkeypatch, names):
    touch(tmp_path, *(f"{name}/x.jpg" for name in names))
    for order in itertools.permutations(names):
        scan_in_order(monkeypatch, lambda entry, order=order: order.index(entry.name) if entry.is_dir() else 0)
        assert class_folder(tmp_path).classes == sorted(names)


def test_labels_follow_the_folder_at_any_depth(tmp_path):
    root = touch(tmp_path, "cat/b.jpg", "cat/deep/er/a.jpg", "dog/a.jpg", "dog/cat/a.jpg")
    samples = class_folder(root)
    assert list(zip(samples.names, samples.labels.tolist(), strict=True)) == [
        ("cat/b.jpg", 0),
        ("cat/deep/er/a.jpg", 0),
        ("dog/a.jpg", 1),
        ("dog/cat/a.jpg", 1),
    ]
    assert samples.labels.dtype == np.int64
    assert samples.path(1) == os.path.join(root, "cat/deep/er/a.jpg")
    assert len(samples) == 4


def test_what_counts_as_an_image(tmp_path):
    wanted = {
        "a.jpg",
        "a.JPEG",
        "b.jpe",
        "c.jfif",
        "d.PNG",
        "e.bmp",
        "f.tif",
        "g.tiff",
        "h.webp",
        "i.ppm",
        "j.gif",
        "k.avif",
        "two.dots.jpg",
        "with space.jpg",
        "été 犬.jpg",
        "new\nline.jpg",
        "-rf.jpg",
        "'\"$.jpg",
    }
    others = {".hidden.jpg", "._a.jpg", ".jpg", "readme.txt", "noextension", "a.jpg.part", "jpg"}
    root = touch(tmp_path, *(f"x/{name}" for name in wanted | others), "x/.cache/thumb.jpg", ".git/a.jpg", "loose.jpg")
    samples = class_folder(root)
    assert set(samples.names) == {f"x/{name}" for name in wanted}
    assert samples.classes == ["x"]


def test_names_that_are_not_unicode(tmp_path):
    touch(tmp_path, "a/x.jpg")
    os.rename(tmp_path / "a/x.jpg", os.fsencode(tmp_path) + b"/a/\xff.jpg")
    samples = class_folder(tmp_path)
    assert os.path.exists(samples.path(0))
    assert len(samples.digest) == 64


def test_order_of_names_is_the_same_everywhere(tmp_path, monkeypatch):
    root = touch(tmp_path, *(f"{k}/{i}.jpg" for k in "ab" for i in range(9)), "a/0/x.jpg", "a/-/x.jpg")
    expected = class_folder(root)
    for turn in range(3):
        scan_in_order(monkeypatch, lambda entry, turn=turn: zlib.crc32(f"{turn} {entry.name}".encode()))
        assert list(class_folder(root).names) == list(expected.names)
        assert class_folder(root).digest == expected.digest


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no image in it \(.*\); lay images out"),
        ([".hidden/a.jpg"], "no image in it"),
        (["a/x.txt", "b/.x.jpg"], "no image in it"),
    ],
)
def test_unusable_folders(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=f"source='{tmp_path}': {message}"):
        sources.load(tmp_path)


def test_what_is_passed_over_is_named_in_one_warning(tmp_path):
    touch(
        tmp_path, "a/x.jpg", "a/notes.txt", "b/y.gif", "c/.x.jpg", "lost+found/z.jpg", "__MACOSX/z.jpg", "@eaDir/z.jpg"
    )
    with pytest.warns(UserWarning, match=r"4 folders that are no classes .* and 1 files .*'a/notes\.txt'") as caught:
        samples = sources.load(tmp_path)
    assert len(caught) == 1
    assert "'@eaDir', '__MACOSX', 'c'" in str(caught[0].message)
    assert (list(samples.names), samples.classes) == (["a/x.jpg", "b/y.gif"], ["a", "b"])


def test_images_without_classes_are_for_prediction(tmp_path):
    samples = sources.load(touch(tmp_path, "b.jpg", "a.jpg"))
    assert (list(samples.names), samples.labels.tolist(), list(samples.classes)) == (["a.jpg", "b.jpg"], [-1, -1], [])
    with pytest.raises(ValueError, match="training needs labels"):
        create_loader(tmp_path, batch_size=1, device="cpu")


def renumbering_sources(root):
    """{kind: source} of two bees and a cow."""
    touch(root, "val/bee/0.jpg", "val/bee/1.jpg", "val/cow/0.jpg")
    images = class_folder(root / "val")
    write_manifest(images, root / "val.json")
    rows = Rows([(b"x", 0), (b"y", 0), (b"z", 1)], classes=["bee", "cow"])
    pairs = SimpleNamespace(
        samples=[(images.path(i), int(k)) for i, k in enumerate(images.labels)], classes=["bee", "cow"]
    )
    convert(images, root / "shards", shard_size=3)
    return dict(folder=root / "val", manifest=root / "val.json", rows=rows, pairs=pairs, shards=root / "shards")


@pytest.mark.parametrize("kind", ["folder", "manifest", "rows", "pairs", "shards"])
def test_classes_number_every_source_by_name(tmp_path, kind):
    source = renumbering_sources(tmp_path)[kind]
    known = ["ant", "bee", "cow", "dog"]
    found = sources.load(source, classes=known)
    assert sorted(found.read(range(3))[1].tolist()) == [1, 1, 2]
    assert list(found.classes) == known
    assert found.digest != sources.load(source).digest
    assert sources.load(source, classes=["bee", "cow"]).digest == sources.load(source).digest
    with pytest.raises(ValueError, match=r"the source's 'bee' is not among these 2 \(ant, cow\)"):
        sources.load(source, classes=["ant", "cow"])


class Animals:
    """A data set of one's own, with class names."""

    def __init__(self, classes, digest=None):
        self.classes = classes
        if digest is not None:
            self.digest = digest

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return b"image", index % len(self.classes)


@pytest.mark.parametrize(
    "wrap", [lambda rows: rows, lambda rows: Subset(rows, [0, 1, 2, 3]), lambda rows: ConcatDataset([rows])]
)
def test_labels_of_a_wrapped_data_set_are_renumbered(wrap):
    found = sources.load(wrap(Animals(["ant", "cow"])), classes=["ant", "bee", "cow"])
    assert found.read([0, 1, 2, 3])[1].tolist() == [0, 2, 0, 2]


def test_a_wrapper_of_ones_own_speaks_for_itself():
    """Its labels may be others than those of the data set within."""

    class Mammals(Animals):
        dataset = Animals(["ant", "cow", "dog"])

    wrapper = Mammals(["cow", "dog"])
    assert sources.load(wrapper).classes == ["cow", "dog"]
    del wrapper.classes
    wrapper.__class__.__getitem__ = lambda self, index: (b"image", 0)
    assert sources.load(wrapper).classes is None


def test_a_subset_of_ones_own_speaks_for_itself(tmp_path):
    class Swapped(Subset):
        def __getitem__(self, index):
            path, label = self.dataset.samples[self.indices[index]]
            return path, 1 - label

        __getitems__ = None

    for k in "ab":
        touch(tmp_path, f"{k}/0.jpg")
    assert sources.load(Swapped(ImageFolder(tmp_path), [0, 1])).read([0, 1])[1].tolist() == [1, 0]
    assert sources.load(Subset(ImageFolder(tmp_path), [0, 1])).labels.tolist() == [0, 1]


def test_parts_without_class_names_leave_numbers():
    assert sources.load(ConcatDataset([Animals(["ant"]), [(b"image", 0)]])).classes is None


def test_indices_of_a_data_set_of_ones_own_may_be_anything():
    rows = Animals(["ant"])
    rows.indices = ["first", "second"]
    assert sources.load(rows).digest == sources.load(Animals(["ant"])).digest


def test_data_sets_of_other_classes_are_not_one():
    with pytest.raises(ValueError, match="the data sets of a ConcatDataset have different classes"):
        sources.load(ConcatDataset([Animals(["ant", "cow"]), Animals(["ant", "bee"])]))


def test_parts_of_a_data_set_have_different_digests():
    whole, other = Animals(["a"], "one"), Animals(["a"], "two")
    parts = [Subset(whole, [0, 1]), Subset(whole, range(2, 4)), Subset(other, [0, 1]), ConcatDataset([whole, other])]
    digests = [sources.load(part).digest for part in (whole, other, *parts)]
    assert len(set(digests)) == len(digests)
    assert sources.load(Subset(whole, np.array([0, 1]))).digest == digests[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(digest=None), "its digest is None; give a text"),
        (dict(gives_paths=True), "it gives paths, but no labels"),
        (dict(counts=[1, 2]), "its counts add up to 3, but it has 4 samples"),
        (dict(counts=[5, -1]), r"counts=array\(\[ 5, -1\]\): give the samples of each shard"),
        (dict(counts=[[2, 2]]), "give the samples of each shard"),
        (dict(classes=None, labels=[0, 1, 2, 7]), r"labels: 2: its label is 2, not a whole number in \[0, 2\)"),
        (dict(read=lambda indices: ([b"image"], [0])), r"read\(\) of 2 samples returned 1 images and 1 labels"),
    ],
)
def test_a_source_that_contradicts_itself_is_an_error(changes, message):
    source = SimpleNamespace(classes=["a"], digest="", name=str, read=lambda indices: ([b"x"] * len(indices), [0] * 2))

    class Own(SimpleNamespace):
        def __len__(self):
            return 4

    with pytest.raises(ValueError, match=message):
        sources.load(Own(**vars(source) | changes), classes=["x", "y"] if "classes" in changes else None).read([0, 1])


@pytest.mark.parametrize("wrong", [2, -1, 1.5, 2**70, True, np.True_, "a", None, torch.tensor([1]), torch.tensor(True)])
def test_a_label_that_is_no_class_spoils_its_sample_only(wrong):
    labels = [np.uint8(1), wrong, torch.tensor(0)]

    class Own(SimpleNamespace):
        def __len__(self):
            return 3

    source = Own(classes=["a", "b"], digest="", name=str, read=lambda indices: ([b"x"] * 3, labels))
    images, found = sources.load(source).read([0, 1, 2])
    assert images[::2] == [b"x"] * 2
    assert re.fullmatch(r"its label is .*, not a whole number in \[0, 2\)", str(images[1]))
    assert found[::2].tolist() == [1, 0]


def test_an_incomplete_source_is_told_what_it_lacks():
    with pytest.raises(ValueError, match="as a Source it lacks digest, __len__; see"):
        sources.load(SimpleNamespace(classes=["a"], name=str, read=str))


def test_images_without_labels_cannot_number_classes(tmp_path):
    touch(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=r"^classes: the images of .* have no labels; leave classes out to predict"):
        sources.load(tmp_path, classes=["x", "y"])


def test_labels_of_pairs_may_be_tensors(tmp_path):
    image = str(touch(tmp_path, "a.jpg") / "a.jpg")
    assert sources.load([(image, torch.tensor(1)), (image, np.uint8(0))]).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"a\.jpg': its label is tensor\(\[1\]\), not"):
        sources.load([(image, 0), (image, torch.tensor([1]))])


def test_classes_of_a_source_of_numbers(tmp_path):
    """The labels number the classes already, and must fit."""
    image = str(touch(tmp_path, "a.jpg") / "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg 1\n")
    for source in ([(image, 1)], tmp_path / "list.txt"):
        found = sources.load(source, classes=["x", "y", "z"])
        assert (found.classes, found.labels.tolist()) == (["x", "y", "z"], [1])
        with pytest.raises(ValueError, match=r"its label is 1, not a whole number in \[0, 1\)"):
            sources.load(source, classes=["x"])
    images, labels = sources.load([{"image": b"x", "label": k} for k in (0, 2)], classes=["x", "y"]).read([0, 1])
    assert labels[0] == 0
    assert str(images[1]) == "its label is 2, not a whole number in [0, 2)"
    for wrong in ("abc", [], ["x", "x"], [1, 2]):
        with pytest.raises(ValueError, match=r"classes=.*different class names"):
            sources.load([(image, 0)], classes=wrong)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"source='{tmp_path}/nowhere': no such folder or list file; give one"):
        sources.load(tmp_path / "nowhere")


# Lists


def write_list(path, content):
    file = path / "list.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("content", "names", "labels"),
    [
        ("a.jpg 0\nb.jpg 1\n", ["a.jpg", "b.jpg"], [0, 1]),
        ("a.jpg 2\nb.jpg 0", ["a.jpg", "b.jpg"], [2, 0]),
        ("\ufeffa.jpg 0\r\n\r\n  \nb.jpg 1\r\n", ["a.jpg", "b.jpg"], [0, 1]),
        ("my cat 7.jpg 3\n", ["my cat 7.jpg"], [3]),
        ("a.jpg\t3 \n", ["a.jpg"], [3]),
        ("  a.jpg 0\n", ["  a.jpg"], [0]),
        ("a\u2028b\x0c\x85c.jpg 0\n", ["a\u2028b\x0c\x85c.jpg"], [0]),
        ("été/犬.jpg 00012\n", ["été/犬.jpg"], [12]),
        (b"\xe9t\xe9.jpg 1\n", [os.fsdecode(b"\xe9t\xe9.jpg")], [1]),
    ],
)
def test_lists(tmp_path, content, names, labels):
    samples = sources.load(write_list(tmp_path, content))
    assert list(samples.names) == names
    assert samples.labels.tolist() == labels
    assert samples.labels.dtype == np.int64
    assert samples.classes == [str(k) for k in range(max(labels) + 1)]
    assert os.path.dirname(samples.path(0)).startswith(str(tmp_path))


def test_roots_of_lists(tmp_path):
    file = write_list(tmp_path, "a.jpg 0\n/b.jpg 1\n")
    (tmp_path / "elsewhere").mkdir()
    samples = file_list(file, root=tmp_path / "elsewhere")
    assert [samples.path(i) for i in range(2)] == [f"{tmp_path}/elsewhere/a.jpg", "/b.jpg"]


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg",
        "a.jpg 1.5",
        "a.jpg 1e3",
        "a.jpg 1000000",
        "a.jpg " + "9" * 5000,
        "  7",
        "a.jpg,7",
        "a.jpg ٣",
        "a.jpg 1_0",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    file = write_list(tmp_path, f"\ufeffgood.jpg 1\n\n{line}\nalso good.jpg 2\n")
    with pytest.raises(ValueError, match=r"line 3: .*; write PATH LABEL, LABEL in") as error:
        sources.load(file)
    assert str(file) in str(error.value)
    assert repr(line[:80]) in str(error.value)


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_an_empty_list_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"source='.*list.txt': no sample in it; write one PATH LABEL per line"):
        sources.load(write_list(tmp_path, content))


@settings(max_examples=200, deadline=None, database=None)
@given(content=st.binary(max_size=60) | st.text("ab. 019\n\r\t\ufeff-", max_size=60).map(str.encode))
def test_any_bytes_are_a_list_or_a_message(tmp_path_factory, content):
    file = write_list(tmp_path_factory.getbasetemp(), content)
    try:
        samples = sources.load(file)
    except ValueError as error:
        assert str(error).startswith("source=")  # noqa: PT017
    else:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
        assert len(lines) == len(samples)
        for line, name, label in zip(lines, samples.names, samples.labels, strict=True):
            assert line.startswith(name)
            assert int(line[len(name) :]) == label


# Labels


@pytest.mark.parametrize("labels", [[0], [0, 1, 1], [0, -1], [0, 2], [0.0, 1.0], [[0], [1]], ["0", "1"], None])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match=r"not a whole number in \[0, 2\)|give one whole number per name"):
        Files("/", ["a", "b"], labels, ["x", "y"])


# Links and unusual folders


def test_links_in_circles_and_to_parents_reach_each_folder_once(tmp_path):
    root = touch(tmp_path, "a/1.jpg", "a/deep/2.jpg", "b/3.jpg", "b/deep/4.jpg")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "deep" / "up").symlink_to("..")
    (root / "a" / "root").symlink_to(root)
    (root / "a" / "other").symlink_to(root / "b")
    (root / "a" / "again").symlink_to(root / "a" / "deep")
    (root / "b" / "loop").symlink_to("loop")
    (root / "b" / "5.jpg").symlink_to("3.jpg")
    samples = class_folder(root)
    files = {os.path.join(samples.root, name): label for name, label in zip(samples.names, samples.labels, strict=True)}
    assert sorted(os.path.realpath(name).removeprefix(f"{root}/") for name in files if not name.endswith("loop")) == [
        "a/1.jpg",
        "a/deep/2.jpg",
        "b/3.jpg",
        "b/3.jpg",
        "b/deep/4.jpg",
    ]
    assert {os.path.realpath(name)[len(str(root)) + 1 :][0]: label for name, label in files.items()} == {"a": 0, "b": 1}


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test")])
def test_the_parent_of_splits_is_warned_about(tmp_path, names):
    touch(tmp_path, *(f"{name}/cat/a.jpg" for name in names))
    with pytest.warns(UserWarning, match=f"its classes are {', '.join(sorted(names, key=str.lower))}") as caught:
        sources.load(tmp_path)
    assert "is the data set one of these folders?" in str(caught[0].message)


def test_classes_named_like_splits_and_others_are_no_splits(tmp_path, recwarn):
    sources.load(touch(tmp_path, "train/a.jpg", "tram/a.jpg"))
    assert not recwarn


def test_a_relative_folder_outlives_chdir(tmp_path, monkeypatch):
    touch(tmp_path, "data/a/x.jpg", "list/x.jpg")
    (tmp_path / "list" / "list.txt").write_text("x.jpg 0\n")
    monkeypatch.chdir(tmp_path)
    found = [sources.load("data"), sources.load("list/list.txt"), sources.load([("list/x.jpg", 0)])]
    monkeypatch.chdir("/")
    for samples in found:
        ((image,), _) = samples.read([0])
        assert image == b""


def test_a_root_that_moved_is_named_at_once(tmp_path):
    root = touch(tmp_path / "here", *(f"a/{i}.jpg" for i in range(3)))
    write_manifest(class_folder(root), tmp_path / "m.json")
    shutil.move(root, tmp_path / "there")
    with pytest.raises(ValueError, match=f"unusable manifest .*root='{root}': no such folder; give the one that"):
        sources.load(tmp_path / "m.json")
    with pytest.raises(ValueError, match=f"root='{root}': no such folder"):
        Files(root, ["a/0.jpg"], [0], ["a"])


def test_no_folder_stays_open(tmp_path):
    touch(tmp_path, "a/x.jpg", "b/c/y.jpg")
    code = f"import lumix_dali.data.sources as s; s.load({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Pairs and rows


def test_pairs(tmp_path):
    root = touch(tmp_path, "a.jpg", "b.jpg")
    samples = sources.load([(root / "a.jpg", 2), (str(root / "b.jpg"), np.int64(0))])
    assert [samples.path(i) for i in range(2)] == [f"{root}/a.jpg", f"{root}/b.jpg"]
    assert samples.labels.tolist() == [2, 0]
    assert samples.classes == ["0", "1", "2"]
    assert not samples.remote
    assert sources.load([("memory://x/a.jpg", 0)]).remote


def test_an_image_folder_of_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    root = touch(tmp_path, "10/a.jpg", "2/b.jpg", "2/c/d.png")
    theirs = datasets.ImageFolder(root)
    samples = sources.load(theirs)
    assert [(samples.path(i), label) for i, label in enumerate(samples.labels.tolist())] == theirs.samples
    assert samples.classes == theirs.classes == ["10", "2"]
    assert samples.class_to_idx == theirs.class_to_idx


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a.jpg", "b.jpg"], r"'a\.jpg' is not a shard; for images, give \(path, label\) pairs or a list file"),
        ([("a.jpg", 0), ("b.jpg",)], "give pairs of a path and a label"),
        ([("a.jpg", 0), ("b.jpg", "cat")], r"'.*/b\.jpg': its label is 'cat', not a whole number in \[0, 1000000\)"),
        ([("a.jpg", 0.0), ("b.jpg", 0.5)], r"'.*/b\.jpg': its label is 0\.5, not"),
        ([], r"source=\[\]: it is empty; give at least one sample"),
        ([1, 2], r"source: row 0 is int; give \(image, label\)"),
        ([{"jpg": b"", "cls": 1}], r"row 0 is a mapping of 'jpg', 'cls'; .* name its keys: data\.rows\.Rows\(rows"),
        (3, "source=3: give a folder, a list file, shards, pairs, or a map-style data set"),
    ],
)
def test_what_is_not_a_source_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        sources.load(source)


class Listed:
    """Like a list of bytes: a source that a user might write in five lines."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("wrap", [list, Listed])
def test_rows_of_bytes_and_paths(tmp_path, wrap):
    (tmp_path / "a.jpg").write_bytes(b"from a file")
    os.mkfifo(tmp_path / "pipe.jpg")
    rows = sources.load(
        wrap(
            [
                (b"bytes", 3),
                (bytearray(b"array"), np.int64(2)),
                (np.frombuffer(b"numpy", np.uint8), 1),
                {"image": {"bytes": b"hub", "path": "name.jpg"}, "label": 0},
                {"image": {"bytes": None, "path": str(tmp_path / "a.jpg")}, "label": 4},
                (tmp_path / "a.jpg", 5),
                (tmp_path / "gone.jpg", 6),
                (tmp_path / "pipe.jpg", 7),
                (np.zeros((2, 2, 3), np.uint8), 8),
                (None, 9),
                (b"x", -1),
                (b"x", 1.5),
                (b"x", "a"),
                (b"x", 10**6),
            ]
        )
    )
    images, labels = rows.read(range(len(rows)))
    assert [bytes(image) for image in images[:6]] == [
        b"bytes",
        b"array",
        b"numpy",
        b"hub",
        b"from a file",
        b"from a file",
    ]
    assert labels[:9].tolist() == [3, 2, 1, 0, 4, 5, 6, 7, 8]
    assert [str(image) for image in images[6:]] == [
        "No such file or directory",
        "not a regular file",
        "neither encoded bytes nor a path, but of type ndarray",
        "neither encoded bytes nor a path, but of type NoneType",
        *(f"its label is {label}, not a whole number in [0, 1000000)" for label in ("-1", "1.5", "'a'", "1000000")),
    ]
    assert rows.name(0) == "row 0"
    assert rows.name(3) == "row 3 ('name.jpg')"


def test_rows_of_hugging_faces_datasets():
    """Decoding is switched off for the image column, class names are taken over, and rows are read in one request."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    content = [encoded(np.full((4, 5, 3), k), "PNG") for k in range(3)]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": each, "path": None} for each in content], "label": [0, 1, 1]}, features=features
    )
    source = sources.load(rows)
    images, labels = source.read([2, 0])
    assert (images, labels.tolist(), source.classes) == ([content[2], content[0]], [1, 0], ["cat", "dog"])
    assert source.digest != sources.load(rows.select([0, 1])).digest
    assert Rows(rows.rename_column("label", "fine"), label="fine").read([1])[1].tolist() == [1]


def test_a_custom_source():
    class Digits:
        classes = ("zero", "one")
        digest = "digits of mine, version 1"

        def __len__(self):
            return 4

        def name(self, index):
            return f"digit {index}"

        def read(self, indices):
            return [encoded(np.full((8, 8, 3), 60 * i), "PNG") for i in indices], np.array(indices) % 2

    source = Digits()
    with create_loader(
        source,
        batch_size=2,
        is_training=False,
        input_size=8,
        crop_pct=1,
        dtype="uint8",
        device="cpu",
        return_index=True,
    ) as loader:
        batches = list(loader)
    assert [image.float().mean() for images, _, _ in batches for image in images] == [0, 60, 120, 180]
    assert [label for _, labels, _ in batches for label in labels.tolist()] == [0, 1, 0, 1]
    assert [i for _, _, index in batches for i in index.tolist()] == [0, 1, 2, 3]
    assert loader.classes == ("zero", "one")


# Names


@settings(max_examples=200, deadline=None, database=None)
@given(names=st.lists(st.binary(max_size=8).map(os.fsdecode), max_size=8), data=st.data())
def test_names_equal_the_list_they_were_made_from(names, data):
    ours = Names(names)
    assert (list(ours), len(ours), list(reversed(ours))) == (names, len(names), names[::-1])
    piece = data.draw(st.slices(max(1, len(names))))
    assert ours[piece] == names[piece]
    for i in range(-len(names), len(names)):
        assert ours[i] == names[i]
    for i in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            ours[i]
    assert repr(ours) == f"<{len(names)} names>"


class Merged:
    """A data set whose `samples` are not what it yields."""

    def __init__(self, paths):
        self.samples = [(path, number) for number, path in enumerate(paths)]

    def __len__(self):
        return len(self.samples) - 1

    def __getitem__(self, index):
        return Path(self.samples[index][0]).read_bytes(), torch.tensor(index // 2)


def test_a_data_set_of_ones_own_is_asked_for_its_rows(tmp_path):
    """An attribute `samples` is taken for the samples only from torchvision's and timm's classes."""
    paths = [str(touch(tmp_path, f"{number}.jpg") / f"{number}.jpg") for number in range(4)]
    samples = sources.load(Merged(paths))
    assert len(samples) == 3
    assert samples.read([0, 1, 2])[1].tolist() == [0, 0, 1]


def test_a_library_data_set_says_that_its_transform_is_not_applied(tmp_path):
    touch(tmp_path, "a/0.jpg", "b/1.jpg")
    with pytest.warns(UserWarning, match="transform is not applied"):
        samples = sources.load(ImageFolder(tmp_path, transform=str))
    assert samples.labels.tolist() == [0, 1]


def test_rows_are_identified_by_their_digest():
    first, second = ([(b"", 0)] * 2 for _ in range(2))
    rows = [
        Rows(type("Named", (list,), dict(digest=name))(values))
        for name, values in zip("ab", (first, second), strict=True)
    ]
    assert rows[0].digest != rows[1].digest


@pytest.mark.parametrize("label", ["cat", 0.5, -1, True, [1, 0]])
def test_a_label_that_is_no_class_is_named_at_once(label):
    with pytest.raises(ValueError, match=r"list\[0\]: its label is .*multilabel"):
        Rows([(b"", label)])


def test_an_error_of_ones_own_names_the_row():
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("disk gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="disk gone") as caught:
        Rows(Broken([(b"", 0)] * 2)).read([1])
    assert caught.value.__notes__ == ["from row 1 of the source, a Broken"]
