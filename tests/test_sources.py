"""Folders, lists, pairs and rows become the samples they should. Classes are numbered as timm numbers them."""

import contextlib
import itertools
import os
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import create_dataset

from lumix_dali.data import sources


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


# Folders


@pytest.mark.parametrize("classes", [
    ["1", "2", "10", "20", "100"],
    ["n02", "n10", "n1"],
    ["Zebra", "ant", "Bee"],
    ["class 9", "class 10", "été", "犬", "a\nb"],
    ["0", "x", "1x", "x1"],
])
def test_classes_are_numbered_as_timm_numbers_them(tmp_path, classes):
    root = touch(tmp_path, *(f"{name}/{i}.jpg" for name in classes for i in range(2)))
    assert sources.folder(root).class_to_idx == create_dataset("", str(root)).reader.class_to_idx


def test_natural_order_is_not_alphabetical(tmp_path):
    samples = sources.folder(touch(tmp_path, "10/a.png", "2/a.png", "1/a.png"))
    assert samples.classes == ["1", "2", "10"]
    assert samples.class_to_idx == {"1": 0, "2": 1, "10": 2}


def scan_in_order(monkeypatch, key, scandir=os.scandir):
    """Lets `os.scandir` list in the order of `key`, as another file system might."""
    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext(sorted(scandir(path), key=key)))


@pytest.mark.parametrize("names", [("1", "01", "001"), ("A", "a")])
def test_classes_of_one_natural_key_do_not_depend_on_the_file_system(tmp_path, monkeypatch, names):
    touch(tmp_path, *(f"{name}/x.jpg" for name in names))
    for order in itertools.permutations(names):
        scan_in_order(monkeypatch, lambda entry, order=order: order.index(entry.name) if entry.is_dir() else 0)
        assert sources.folder(tmp_path).classes == sorted(names)


def test_labels_follow_the_folder_at_any_depth(tmp_path):
    root = touch(tmp_path, "cat/b.jpg", "cat/deep/er/a.jpg", "dog/a.jpg", "dog/cat/a.jpg")
    samples = sources.folder(root)
    assert list(zip(samples.names, samples.labels.tolist(), strict=True)) == [
        ("cat/b.jpg", 0), ("cat/deep/er/a.jpg", 0), ("dog/a.jpg", 1), ("dog/cat/a.jpg", 1)]
    assert samples.labels.dtype == np.int64
    assert samples.path(1) == os.path.join(root, "cat/deep/er/a.jpg")
    assert len(samples) == 4


def test_what_counts_as_an_image(tmp_path):
    wanted = {"a.jpg", "a.JPEG", "b.jpe", "c.jfif", "d.PNG", "e.bmp", "f.tif", "g.tiff", "h.webp", "i.ppm",
              "two.dots.jpg", "with space.jpg", "été 犬.jpg", "new\nline.jpg", "-rf.jpg", "'\"$.jpg"}
    others = {".hidden.jpg", "._a.jpg", ".jpg", "readme.txt", "noextension", "a.gif", "a.jpg.part", "jpg"}
    root = touch(tmp_path, *(f"x/{name}" for name in wanted | others), "x/.cache/thumb.jpg", ".git/a.jpg",
                 "loose.jpg")
    samples = sources.folder(root)
    assert set(samples.names) == {f"x/{name}" for name in wanted}
    assert samples.classes == ["x"]


def test_names_that_are_not_unicode(tmp_path):
    touch(tmp_path, "a/x.jpg")
    os.rename(tmp_path / "a/x.jpg", os.fsencode(tmp_path) + b"/a/\xff.jpg")
    samples = sources.folder(tmp_path)
    assert os.path.exists(samples.path(0))
    assert len(samples.digest) == 64


def test_links_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/deep/a.jpg", "root/b/b.jpg")
    (tmp_path / "root/a").symlink_to(tmp_path / "elsewhere")
    assert list(sources.folder(tmp_path / "root").names) == ["a/deep/a.jpg", "b/b.jpg"]


def test_order_of_names_is_the_same_everywhere(tmp_path, monkeypatch):
    root = touch(tmp_path, *(f"{k}/{i}.jpg" for k in "ab" for i in range(9)), "a/0/x.jpg", "a/-/x.jpg")
    expected = sources.folder(root)
    for turn in range(3):
        scan_in_order(monkeypatch, lambda entry, turn=turn: zlib.crc32(f"{turn} {entry.name}".encode()))
        assert list(sources.folder(root).names) == list(expected.names)
        assert sources.folder(root).digest == expected.digest


@pytest.mark.parametrize(("files", "message"), [
    ([], "no class folder in it; lay images out"),
    (["loose.jpg"], "no class folder in it; lay images out"),
    ([".hidden/a.jpg"], "no class folder in it; lay images out"),
    (["a/x.jpg", "b/x.txt"], r"class 'b' has no image \(.*\); remove its folder, or put images into it"),
    (["a/x.jpg", "b/.x.jpg"], "class 'b' has no image"),
])
def test_folders_of_no_use(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=f"source='{tmp_path}': {message}"):
        sources.load(tmp_path)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"source='{tmp_path}/nowhere': no such folder or list file; give one"):
        sources.load(tmp_path / "nowhere")


def test_load_takes_each_source(tmp_path):
    root = touch(tmp_path / "root", "a/x.jpg")
    (tmp_path / "list.txt").write_text("root/a/x.jpg 0\n")
    samples = sources.load(root)
    assert list(sources.load(str(root)).names) == list(samples.names)
    assert sources.load(samples) is samples
    assert os.path.samefile(sources.load(tmp_path / "list.txt").path(0), samples.path(0))


# Lists


def write_list(path, content):
    file = path / "list.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(("content", "names", "labels"), [
    ("a.jpg 0\nb.jpg 1\n", ["a.jpg", "b.jpg"], [0, 1]),
    ("a.jpg 2\nb.jpg 0", ["a.jpg", "b.jpg"], [2, 0]),
    ("a.jpg 0\r\nb.jpg 1\r\n", ["a.jpg", "b.jpg"], [0, 1]),
    ("\ufeffa.jpg 0\n", ["a.jpg"], [0]),
    ("\ufeffa.jpg 0\r\n\r\n  \nb.jpg 1\r\n", ["a.jpg", "b.jpg"], [0, 1]),
    ("my cat 7.jpg 3\n", ["my cat 7.jpg"], [3]),
    ("a.jpg\t3 \n", ["a.jpg"], [3]),
    ("  a.jpg 0\n", ["  a.jpg"], [0]),
    ("a\u2028b\x0c\x85c.jpg 0\n", ["a\u2028b\x0c\x85c.jpg"], [0]),
    ("été/犬.jpg 00012\n", ["été/犬.jpg"], [12]),
    (b"\xe9t\xe9.jpg 1\n", [os.fsdecode(b"\xe9t\xe9.jpg")], [1]),
])
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
    samples = sources.file_list(file, root=tmp_path / "elsewhere")
    assert [samples.path(i) for i in range(2)] == [f"{tmp_path}/elsewhere/a.jpg", "/b.jpg"]


@pytest.mark.parametrize("line", [
    "a.jpg", "a.jpg -1", "a.jpg 1.5", "a.jpg 1e3", "a.jpg one", "a.jpg 99999999999", f"a.jpg {2**31 - 1}",
    "a.jpg 1000000", "a.jpg " + "9" * 5000, "7", "  7", "a.jpg,7", "a.jpg ٣", "a.jpg 0x1", "a.jpg +1", "a.jpg 1_0",
])
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
            assert int(line[len(name):]) == label


# The digest


def test_the_digest_tells_samples_apart(tmp_path):
    def digest(names=("a", "b"), labels=(0, 1), classes=("x", "y"), root="/"):
        return sources.Files(root, names, np.int64(labels), classes).digest

    assert digest() == digest(root=str(tmp_path))
    different = {digest(), digest(names=("b", "a")), digest(names=("a", "c")), digest(labels=(1, 0)),
                 digest(classes=("x", "z")), digest(names=("a",), labels=(0,), classes=("b", "x", "y"))}
    assert len(different) == 6


@pytest.mark.parametrize("labels", [[0], [0, 1, 1], [0, -1], [0, 2], [0.0, 1.0], [[0], [1]], ["0", "1"], None])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match=r"(?s)labels=.*: give 2 integers, one per name, in \[0, 2\)"):
        sources.Files("/", ["a", "b"], labels, ["x", "y"])


def test_labels_of_any_integer_type():
    digests = {sources.Files("/", ["a", "b"], labels, ["x", "y"]).digest
               for labels in ([0, 1], (0, 1), np.uint8([0, 1]), np.int32([0, 1]))}
    assert len(digests) == 1


def test_a_folder_that_moves_keeps_its_digest(tmp_path):
    root = touch(tmp_path / "here", "a/x.jpg", "b/y.jpg")
    before = sources.folder(root).digest
    shutil.move(root, tmp_path / "there")
    assert sources.folder(tmp_path / "there").digest == before
