"""Shards through the loader: it reads what was written, once per epoch, and the same after a resume.

Every sample has a unique label, so a stream's labels identify its samples. The output of `convert`
is compared with `tarfile`.
"""

import io
import itertools
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import as_records, pack
from images import encoded, ramp_samples
from PIL import Image
from test_train import argv, rows, write_folder

from benchmarks.records import int_feature
from lumix_dali import create_loader
from lumix_dali.cli import main
from lumix_dali.data import check, sources, storage
from lumix_dali.data.convert import convert
from lumix_dali.data.files import Files, class_folder
from lumix_dali.data.shards import Shards
from pipelines import train

SUFFIX = {"webdataset": ".tar", "tfrecord": ".tfrecord"}
KINDS = list(SUFFIX)
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
COUNT = 23


def make(source, **options):
    fixed = {"batch_size": 4, "input_size": (12, 18), "num_threads": 1, "device": "cpu"}
    return create_loader(source, **fixed | options)


def stream(batches):
    """[images, label, partner's label, λ0, …] of each batch."""
    return [
        [images.clone(), *(field.clone() for field in (target if isinstance(target, tuple) else [target]))]
        for images, target in batches
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(our, their, strict=True))


def labels_of(batches):
    labels = [target if torch.is_tensor(target) else target.labels for _, target in batches]
    return [label for each in labels for label in each.tolist()]


def write(files, out, kind, shard_size):
    """Writes shards of either kind, with a description."""
    convert(files, out, shard_size=shard_size)
    if kind == "tfrecord":
        for path in out.glob("*.tar"):
            path.unlink()
        as_records(files, out, shard_size)
        description = (out / "shards.json").read_text()
        (out / "shards.json").write_text(description.replace(".tar", ".tfrecord"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`Files` of 23 images, one class each."""
    return ramp_samples(tmp_path_factory.mktemp("ramps"), COUNT)


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    """{kind: folder of 5 shards of `files`}."""
    root = tmp_path_factory.mktemp("shards")
    for kind in KINDS:
        write(files, root / kind, kind, 5)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of `folder`, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


JPEG = encoded(np.random.default_rng(0).integers(0, 256, (32, 40, 3)), "JPEG", quality=90)


# Contents


def test_shards_hold_what_the_files_hold(files, folder):
    """Without shuffling, the stream equals that of a list in the order in which the shards were written."""
    order = np.random.default_rng(0).permutation(COUNT)
    written = Files(files.root, [files.names[i] for i in order], files.labels[order], files.classes)
    loader = make(folder, is_training=False)
    assert_same(stream(loader), stream(make(written, is_training=False)))
    assert (len(loader), len(loader.dataset), loader.classes) == (6, COUNT, files.classes)
    assert loader.num_classes == COUNT
    assert loader.dataset.class_to_idx == files.class_to_idx


def test_every_way_to_name_shards(folder, kind, tmp_path):
    paths = sorted(str(path) for path in folder.glob(f"*{SUFFIX[kind]}"))
    expected = sources.load(folder)
    assert len(paths) == 5
    for source in (str(folder), f"{folder}/shard-*", paths, tuple(paths), folder / "*"):
        assert sources.load(source).digest == expected.digest
        assert isinstance(sources.load(source), Shards)
    assert sources.load(expected) is expected
    assert sources.load(paths[1:3]).counts.tolist() == [5, 5]
    assert sources.load(paths[4]).counts.tolist() == [3]
    assert sources.load(paths[4]).classes == expected.classes
    shutil.copytree(folder, tmp_path / "moved")
    assert sources.load(tmp_path / "moved").digest == expected.digest
    (tmp_path / "moved" / "shards.json").unlink()
    unknown = make(tmp_path / "moved")
    assert (unknown.classes, unknown.dataset.class_to_idx) == (None, {})
    with pytest.raises(AttributeError, match="no class names; give classes="):
        unknown.num_classes  # noqa: B018  # None would make timm.create_model choose a thousand


def test_archives_beside_class_folders_are_ignored(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(JPEG)
    pack(tmp_path / "old.tar", ("a.jpg", JPEG))
    assert list(sources.load(tmp_path).names) == ["cat/a.jpg"]


@pytest.mark.parametrize("is_training", [True, False])
def test_labels_are_int64_scalars_whatever_holds_them(tmp_path, is_training):
    """Text of one to nine digits, with or without a newline; uppercase extensions; members that belong to no sample."""
    labels = [0, 7, 10, 42, 999, 123456, 5]
    texts = [b"0", b"7\n", b"10", b"042", b"999\r\n", b"123456", b"000000005"]
    members = [("notes.txt", b"x"), ("._0.jpg", b"x")]
    for i, text in enumerate(texts):
        members += [(f"{i}.cls", text), (f"{i}.JPG", JPEG), (f"{i}.json", b"{}")]
    pack(tmp_path / "a.tar", *members)
    loader = make(tmp_path / "a.tar", batch_size=7, is_training=is_training, cutmix_alpha=float(is_training))
    ((_, target),) = loader
    for field in (target.labels, target.partner_labels) if is_training else (target,):
        assert (field.dtype, tuple(field.shape)) == (torch.int64, (7,))
        assert sorted(field.tolist()) == sorted(labels)


# Which rank reads what


def test_shards_come_in_a_new_order_every_epoch(folder, files):
    """With a window of one, the shuffle only reorders the shards, drawn from (seed, epoch)."""
    written = np.random.default_rng(0).permutation(COUNT).tolist()
    loader = make(folder, batch_size=COUNT, shuffle="window", window=1, seed=3)
    for epoch in range(3):
        order = np.random.default_rng([3, epoch]).permutation(5)
        assert labels_of(loader) == [label for shard in order for label in written[5 * shard :][:5]]


# The stream


@pytest.mark.parametrize("is_training", [True, False])
def test_every_state_leads_to_the_same_stream(folder, is_training):
    options = {"batch_size": 3, "world_size": 2, "rank": 1, "is_training": is_training}
    options |= MIX | {"shuffle": "window", "window": 5} if is_training else {}
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


@pytest.mark.parametrize("change", ["name", "size", "label", "classes", "order", "window"])
def test_a_state_of_other_shards_is_refused(folder, kind, copy, change):
    options = {"shuffle": "window"}
    state = make(folder, **options).state_dict()
    first, source = sorted(copy.glob(f"*{SUFFIX[kind]}"))[0], copy
    if change == "name":
        first.rename(first.with_stem("another"))
        (copy / "shards.json").write_text((copy / "shards.json").read_text().replace(first.stem, "another"))
    elif change == "size":
        if kind == "tfrecord":
            pytest.skip("nothing may follow its records")
        first.write_bytes(first.read_bytes() + bytes(10240))
    elif change == "label":
        label, content = int(sources.load(copy).read([0])[1][0]), first.read_bytes()
        old, new = (str(k).encode().ljust(512, b"\0") if kind == "webdataset" else int_feature(k) for k in (label, 3))
        assert content.count(old) == 1
        first.write_bytes(content.replace(old, new))
    elif change == "classes":
        content = json.loads((copy / "shards.json").read_text())
        (copy / "shards.json").write_text(json.dumps(content | {"classes": ["x", *content["classes"][1:]]}))
    elif change == "order":
        source = sorted(map(str, copy.glob(f"*{SUFFIX[kind]}")))[::-1]
    else:
        options |= {"window": 7}
    with pytest.raises(ValueError, match=r"state: it belongs to another loader: .*(data|window) was"):
        make(source, **options).load_state_dict(state)


# Samples that cannot be used


def test_a_label_beyond_the_classes_is_named(copy, files):
    content = json.loads((copy / "shards.json").read_text())
    (copy / "shards.json").write_text(json.dumps(content | {"classes": files.classes[:-1]}))
    loader = make(copy, is_training=False)
    with pytest.warns(UserWarning, match=r"its label is 22, not a whole number in \[0, 22\)"):
        labels = labels_of(loader)
    assert max(labels) == 21


@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_shard_that_changed_before_it_was_opened_is_an_error(copy, kind, change):
    loader = make(copy, is_training=False)
    path = sorted(copy.glob(f"*{SUFFIX[kind]}"))[2]
    if change == "cut":
        os.truncate(path, 1000)
    else:
        path.unlink()
    message = {"cut": "its size has changed since", "gone": "No such file or directory; it existed when"}[change]
    with pytest.raises(ValueError, match=f"source='{path}': {message} the run began"):
        list(loader)


@pytest.mark.slow
@pytest.mark.slow  # the promises of test_promises.py, through the training program
def test_training_from_shards(kind, tmp_path):
    data = write_folder(tmp_path / "data", {"train": 33, "val": 5})
    for name in ("train", "val"):
        write(class_folder(data / name), tmp_path / "shards" / name, kind, 20)
    train.main(argv(data, tmp_path / "a", "--epochs", "1"))
    train.main(argv(tmp_path / "shards", tmp_path / "b", "--epochs", "1"))
    ours, theirs = (rows(tmp_path / name / "run")[0] for name in "ba")
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=0.7)  # a different order and different draws
    (tmp_path / "shards" / "train" / "shards.json").unlink()
    with pytest.raises(ValueError, match="nothing says which classes the shards in train have"):
        train.main(argv(tmp_path / "shards", tmp_path / "c"))


# Arguments and files


def test_only_shards_have_a_window(files, folder):
    with pytest.raises(ValueError, match="shuffle='window': only shards have neighbours; give 'global'"):
        make(files, shuffle="window")
    assert_same(stream(make(files, shuffle="global")), stream(make(files)))
    assert_same(stream(make(folder, shuffle="global")), stream(make(folder)))


def test_unusable_shards(copy, kind):
    suffix = SUFFIX[kind]
    first = copy / f"shard-000000{suffix}"
    content = first.read_bytes()

    def refused(message, source=copy):
        with pytest.raises(ValueError, match=message):
            make(source)

    refused("give shards of one kind, each only once", [first, first])
    refused("give shards of one kind, each only once", [copy / "a.tar", copy / "b.tfrecord"])
    refused("no such file; give one that exists", [copy / f"nowhere{suffix}"])
    refused(f"source='{copy}/nowhere': No such file or directory; give a folder", [copy / "nowhere" / f"a{suffix}"])
    refused(f"source='{copy}/nowhere{suffix}': no such folder or list file", copy / f"nowhere{suffix}")
    refused("it matches no shard; give a pattern that matches existing files", copy / f"none*{suffix}")
    refused("it is empty; give at least one sample", [])
    first.write_bytes(content[:1000])
    refused(f"source='{first}': .*cut short.*; repair or remove it")
    first.write_bytes(b"")
    refused(f"source='{first}': .*(no sample in it|empty file)")
    first.write_bytes((copy / f"shard-000004{suffix}").read_bytes())
    refused(f"source='{first}': it contains 3 samples, its description says 5")
    first.write_bytes(content)
    for damage in ("{", "{}", "[]", '{"format": "x"}', "x", '{"format": "lumix_dali.shards/1", "complete": true}'):
        (copy / "shards.json").write_text(damage)
        refused(r"shards\.json': (damaged|not all)")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.jpg", JPEG)], "no label"),
        ([("0.cls", b"1")], "no image"),
        ([("0.jpg", JPEG), ("0.png", JPEG), ("0.cls", b"1")], "more than one image"),
        ([("0.jpg", JPEG), ("0.jpg", JPEG), ("0.cls", b"1")], "two members of one name"),
        ([("0.jpg", JPEG), ("1.jpg", JPEG), ("0.cls", b"1"), ("1.cls", b"1")], "no label"),
    ],
)
def test_a_sample_without_image_or_label_is_replaced(tmp_path, members, reason):
    pack(tmp_path / "a.tar", ("good.jpg", JPEG), ("good.cls", b"3"), *members)
    loader = make(tmp_path / "a.tar", batch_size=1, is_training=False)
    with pytest.warns(UserWarning, match=rf"'0\.(jpg|cls)' \(byte \d+\) cannot be used \({reason}"):
        labels = labels_of(loader)
    assert labels[0] == 3
    assert set(labels[1:]) == {-100}


def test_a_mask_beside_an_image_is_not_a_second_image(tmp_path):
    pack(
        tmp_path / "a.tar",
        ("0.cls", b"4"),
        ("0.jpg", JPEG),
        ("0.mask.png", b"x"),
        ("0.json", b"{}"),
        ("1.old.jpg", JPEG),
        ("1.cls", b"5"),
    )
    assert labels_of(make(tmp_path / "a.tar", is_training=False)) == [4, 5]


# Writing


def test_bytes_and_labels_are_untouched(files, folders):
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    contents = {i: (f"{i:09}.png", storage.read_bytes(files.path(i)), str(i).encode()) for i in order}
    found = []
    for path in sorted(folders["webdataset"].glob("*.tar")):
        with tarfile.open(path) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]
        found += [(*image, label) for image, (_, label) in zip(members[::2], members[1::2], strict=True)]
    assert found == [contents[i] for i in order]


def test_large_images_are_reduced_as_pillow_does(tmp_path):
    root, rng = tmp_path / "in" / "a", np.random.default_rng(0)
    root.mkdir(parents=True)
    for name, size in (
        ("small.jpg", (40, 30)),
        ("wide.png", (90, 20)),
        ("tall.bmp", (7, 101)),
        ("edge.webp", (50, 50)),
    ):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(root / name)
    options = ["--max-size", "50", "--quality", "80", "--workers", "2"]
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 0
    samples, found = class_folder(tmp_path / "in"), {}
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        found = {each.name: archive.extractfile(each).read() for each in archive if not each.name.endswith("cls")}
    expected = {}
    for i, name in enumerate(samples.names):
        content, size = (tmp_path / "in" / name).read_bytes(), {"wide": (50, 11), "tall": (3, 50)}.get(name[2:6])
        if size:
            reduced = io.BytesIO()
            image = Image.open(io.BytesIO(content)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
            image.save(reduced, "JPEG", quality=80)
            content = reduced.getvalue()
        expected[f"{i:09}{'.jpg' if size else Path(name).suffix}"] = content
    assert found == expected
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2  # shards of another encoding


@pytest.fixture(scope="module")
def converted(folders):
    return folders["webdataset"]


@pytest.mark.parametrize("stop", range(0, COUNT, 4))
def test_a_killed_conversion_resumes(files, converted, tmp_path, monkeypatch, stop):
    out, read, count = tmp_path / "out", storage.read_bytes, itertools.count()

    def killed(path):
        if next(count) == stop:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(storage, "read_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(files, out, shard_size=5)
    monkeypatch.undo()
    whole = sorted(out.glob("*.tar"))
    assert len(whole) == stop // 5
    assert all(path.read_bytes() == (converted / path.name).read_bytes() for path in whole)
    with pytest.raises(ValueError, match="not all shards are written; run the same `lumix-dali convert` again"):
        sources.load(out)
    before = [path.stat().st_mtime_ns for path in whole]
    convert(files, out, shard_size=5)
    assert [path.stat().st_mtime_ns for path in whole] == before
    assert contents(out) == contents(converted)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_file_with_a_shards_name_is_complete(files, converted, tmp_path, monkeypatch):
    """Killed before each rename in turn: every shard that exists is complete."""
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
            convert(files, out, shard_size=5)
            break
        except KeyboardInterrupt:
            for shard in out.glob("*.tar"):
                assert shard.read_bytes() == (converted / shard.name).read_bytes()
    assert stop == 7  # one for each of five shards, two for the description


def test_a_folder_of_something_else_is_left_alone(files, converted, tmp_path):
    copy = shutil.copytree(converted, tmp_path / "copy")
    before = contents(copy)
    for options, named in [({"seed": 1}, "seed"), ({"shard_size": 6}, "shard_size")]:
        with pytest.raises(ValueError, match=f"it contains shards of another {named}; give a new folder"):
            convert(files, copy, **{"shard_size": 5} | options)
    with pytest.raises(ValueError, match="it contains shards of another digest"):
        convert(Files(files.root, files.names[1:], files.labels[1:], files.classes), copy, shard_size=5)
    assert contents(copy) == before
    for damage in ("[]", "x", "3"):
        (copy / "shards.json").write_text(damage)
        with pytest.raises(ValueError, match=r"(shards\.json is damaged|another format); give a new"):
            convert(files, copy, shard_size=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"it contains 'a\.txt'; give an empty or a new folder"):
        convert(files, tmp_path / "full")
    with pytest.raises(ValueError, match=r"out='s3://b/p': shards are written to a local folder; upload that"):
        convert(files, "s3://b/p")
    assert not os.path.exists("s3:")


def test_the_command(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(JPEG)
    (tmp_path / "in" / "cat" / "bad.jpg").write_bytes(b"no image")
    command = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main([*command, "--shard-size", "3"]) == 0
    out = capsys.readouterr()
    assert "left out 'cat/bad.jpg': " in out.err
    assert "8 samples in 3 shards" in out.out
    loader = make(tmp_path / "out", is_training=False)
    assert (sorted(labels_of(loader)), loader.classes) == ([0] * 4 + [1] * 4, ["cat", "dog"])
    assert main(command) == 2
    assert "it contains shards of another shard_size" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "out"), "-o", str(tmp_path / "a.png"), "--count", "4"]) == 0
    assert main(["convert", str(tmp_path / "out"), "--out", str(tmp_path / "b")]) == 2
    assert "it does not consist of image files; give a class folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "in" / "cat" / "shards")]) == 2
    assert "it lies in the source, which it would spoil; give another folder" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "in" / "cat")) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "bad.jpg"]


def test_nothing_is_converted_where_every_image_is_bad(tmp_path, capsys):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "bad.jpg").write_bytes(b"no image")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "none of the samples can be used; see lumix-dali check" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("convert", "--seed", -1),
        ("convert", "--shard-size", 0),
        ("check", "--batch-size", 0),
        ("show", "--input-size", 0),
    ],
)
def test_an_impossible_number_is_named_by_its_flag(tmp_path, capsys, command, flag, value):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(JPEG)
    out = ["--out", str(tmp_path / "out")] if command == "convert" else []
    assert main([command, str(tmp_path), *out, flag, str(value)]) == 2
    assert capsys.readouterr().err.startswith(f"lumix-dali: {flag}={value}: give a whole number >= ")


# Checking


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_good_shards_pass(files, folder, kind, full):
    report = check.scan(folder, full=full, workers=1)
    assert report.ok
    assert (report.bad, report.ignored, report.warnings) == ({}, [], [])
    assert report.counts == dict.fromkeys(files.classes, 1)
    assert list(report.shards.values()) == [5, 5, 5, 5, 3]
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
        "unlabelled.jpg": [("unlabelled.jpg", JPEG)],
        "blind.cls": [("blind.cls", b"1")],
        "word.jpg": [("word.jpg", JPEG), ("word.cls", b"cat")],
        "two.jpg": [("two.jpg", JPEG), ("two.png", JPEG), ("two.cls", b"0")],
        "0.jpg": [("0.jpg", JPEG), ("0.cls", b"1")],
        "huge.jpg": [("huge.jpg", JPEG), ("huge.cls", b"1000000")],
    }
    others = [
        linked("soft", tarfile.SYMTYPE),
        linked("hard", tarfile.LNKTYPE),
        linked("device", tarfile.CHRTYPE),
        linked("pipe", tarfile.FIFOTYPE),
        linked("folder", tarfile.DIRTYPE),
        (".hidden.jpg", JPEG),
    ]
    pack(tmp_path / "a.tar", *good, *others, *itertools.chain(*faults.values()))
    report = check.scan(tmp_path / "a.tar", workers=1)
    assert report.bad.keys() == {f"a.tar/{name}" for name in faults}
    for name, reason in [
        ("cut.jpg", "truncated"),
        ("text.jpg", "not an image"),
        ("unlabelled.jpg", "no label"),
        ("blind.cls", "no image"),
        ("word.jpg", "its .cls is b'cat'"),
        ("two.jpg", "more than one image"),
        ("0.jpg", "its key occurs twice"),
        ("huge.jpg", "not a whole number in [0, 1000000)"),
    ]:
        assert reason in report.bad[f"a.tar/{name}"]
    assert report.ignored == [f"a.tar/{name}" for name in ("soft", "hard", "device", "pipe", ".hidden.jpg")]
    assert not report.ok
    assert sorted(os.listdir(tmp_path)) == [".lumix_dali", "a.tar"]  # nothing was extracted
    assert re.search("what to do: copy a shard again .*lumix-dali convert", check.show(report))


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../up.jpg"])
def test_a_member_outside_its_folder_is_refused(tmp_path, name):
    pack(tmp_path / "a.tar", ("0.jpg", JPEG), ("0.cls", b"0"), (name, JPEG))
    report = check.scan(tmp_path / "a.tar", workers=1)
    assert "leads out of the archive; refused" in report.bad["a.tar"]
    assert not report.ok
    assert main(["check", str(tmp_path / "a.tar"), "--workers", "1"]) == 1


def test_a_tfrecord_that_was_changed_is_named(copy, kind):
    """DALI itself reads on after a checksum mismatch."""
    path = copy / f"shard-000001{SUFFIX[kind]}"
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT") + 20
    content[place] ^= 1
    path.write_bytes(content)
    report = check.scan(copy, full=True, workers=1)
    assert len(report.bad) == 1
    ((name, reason),) = report.bad.items()
    assert name.startswith(f"{path.name}/")
    if kind == "tfrecord":
        assert reason == "its checksum at byte 0 does not match"


def test_truncated_shards(copy, kind):
    cut = copy / f"shard-000000{SUFFIX[kind]}"
    cut.write_bytes(cut.read_bytes()[:1000])
    report = check.scan(copy, workers=1)
    assert report.bad.keys() == {cut.name}
    assert "cut short" in report.bad[cut.name]
    report = check.scan(cut, workers=1)  # and none is left
    assert (len(report.labels), report.samples, report.shards) == (0, None, {cut.name: 0})


def test_sorted_shards_and_repeated_keys_are_warned_about(tmp_path):
    def members(labels):
        return [
            pair for i, label in enumerate(labels) for pair in ((f"{i}.jpg", JPEG), (f"{i}.cls", str(label).encode()))
        ]

    pack(tmp_path / "a.tar", *members([0] * 6 + [1] * 6))
    (warning,) = check.scan(tmp_path, workers=1).warnings
    assert re.match("sorted by class: .*give shuffle='global'.*lumix-dali convert", warning)
    pack(tmp_path / "a.tar", *members([0, 1, 1, 0, 1, 0, 0, 1]))
    assert check.scan(tmp_path, workers=1).warnings == []
    pack(tmp_path / "b.tar", *members([0, 1, 0]))
    report = check.scan(tmp_path, workers=1)
    (warning,) = report.warnings
    assert re.match(r"3 keys occur in more than one shard: .*leave one of them out$", warning)
    assert report.ok  # they can still be read


def test_the_report_of_shards(folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    command = ["check", str(folder), "--workers", "1"]
    assert main([*command, "--report", str(report), "--ranks", "2", "--batch-size", "3"]) == 0
    content = json.loads(report.read_text())
    assert content["ok"] is True
    assert content["images"] == COUNT
    assert content["epoch"] == {"ranks": 2, "batch_size": 3, "batches": 3, "left_out": 5}
    assert list(content["shards"].values()) == [5, 5, 5, 5, 3]
    assert main([*command, "--manifest", str(tmp_path / "m.json")]) == 2
    assert "a manifest lists files, not shards" in capsys.readouterr().err
