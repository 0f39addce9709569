"""`lumix-dali check`: it finds what would stop a run, says why, and writes what is left for the loader."""

import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumix_dali import create_loader
from lumix_dali.cli import main
from lumix_dali.data import check, sources


def encoded(kind, seed=0, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def claiming(side):
    """A PNG of a few bytes whose header says side x side."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG, PNG = encoded("JPEG"), encoded("PNG")
DAMAGED = {
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "endless.jpg": JPEG[:-2],
    "empty.jpg": b"",
    "text.jpg": b"not an image at all",
    "page.jpg": b"<html><body>404</body></html>",
    "short.jpg": JPEG[:50],
    "cut.png": PNG[: len(PNG) // 2],
}


@pytest.fixture
def root(tmp_path):
    """Two classes of five good images, one of them CMYK, one with text behind its end."""
    for name in ("a", "b c"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.jpg").write_bytes(encoded("JPEG", i))
    Image.new("CMYK", (40, 40)).save(tmp_path / "a" / "0.jpg")
    (tmp_path / "a" / "1.jpg").write_bytes(encoded("JPEG", 1) + b"\0" * 1000)
    return tmp_path


def test_good_files_pass(root):
    report = check.scan(root, full=True)
    assert report.ok
    assert not report.bad
    assert report.counts == {"a": 5, "b c": 5}
    assert report.samples.digest == sources.folder(root).digest


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_every_damaged_file_is_found_with_a_reason(root, full):
    for name, content in DAMAGED.items():
        (root / "a" / name).write_bytes(content)
    (root / "b c" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    report = check.scan(root, full=full, workers=2)
    assert sorted(report.bad) == sorted([*(f"a/{name}" for name in DAMAGED), "b c/gone.jpg"])
    assert all(report.bad.values())
    assert report.counts == {"a": 5, "b c": 5}
    assert not report.ok


def test_the_full_scan_finds_what_only_decoding_shows(root):
    data = bytearray(PNG)
    data[len(data) // 2] ^= 0xFF  # inside the pixels: header and end are whole
    (root / "a" / "crc.png").write_bytes(data)
    assert check.scan(root).ok
    assert list(check.scan(root, full=True).bad) == ["a/crc.png"]


def test_a_header_that_claims_too_much(root):
    (root / "a" / "bomb.png").write_bytes(claiming(60_000))
    report = check.scan(root, full=True)  # decoding it would take 10 GB
    assert report.bad == {"a/bomb.png": "60000x60000 pixels, the limit is 100000000"}
    assert check.scan(root, max_pixels=64 * 48).bad.keys() == {"a/bomb.png"}
    assert "a/2.jpg" in check.scan(root, max_pixels=64 * 48 - 1).bad


def test_names_passed_over_and_empty_classes_are_listed(root):
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("x")
    (root / "a" / "._0.jpg").write_bytes(JPEG)
    (root / "a" / ".cache").mkdir()
    (root / "a" / ".cache" / "1.jpg").write_bytes(JPEG)
    report = check.scan(root)
    assert report.ignored == ["a/._0.jpg", "a/.cache/1.jpg", "c/notes.txt"]
    assert report.empty == ["c"]
    assert not report.ok


def test_the_manifest_is_what_the_loader_takes(root, tmp_path_factory):
    (root / "a" / "cut.jpg").write_bytes(DAMAGED["cut.jpg"])
    manifest = tmp_path_factory.mktemp("out") / "train.json"
    assert main(["check", str(root), "--manifest", str(manifest)]) == 1
    with create_loader(manifest, batch_size=5, is_training=False, input_size=32, device="cpu") as loader:
        labels = [label for _, batch in loader for label in batch.tolist()]
    assert labels == [0] * 5 + [1] * 5
    assert loader.classes == ["a", "b c"]
    assert not loader.bad


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"a/0.jpg"', '"a/9.jpg"'),
        lambda text: text[:-20],
        lambda text: text.replace('"labels": [0,', '"labels": [1,'),
        lambda text: text.replace('"digest"', '"digests"'),
    ],
    ids=["name", "cut", "label", "no digest"],
)
def test_a_changed_manifest_is_refused(root, tmp_path_factory, change):
    manifest = tmp_path_factory.mktemp("out") / "train.json"
    sources.write_manifest(sources.folder(root), manifest)
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(ValueError, match=r"source=.*train\.json.*write it again"):
        create_loader(manifest, batch_size=2, device="cpu")


def test_the_report_is_for_scripts(root, tmp_path_factory, capsys):
    report = tmp_path_factory.mktemp("out") / "report.json"
    assert main(["check", str(root), "--report", str(report), "--ranks", "2", "--batch-size", "2"]) == 0
    content = json.loads(report.read_text())
    assert content["ok"] is True
    assert content["images"] == 10
    assert content["shards"] == dict(ranks=2, batch_size=2, batches=2, left_out=2)
    assert "10 usable images in 2 classes" in capsys.readouterr().out
    assert main(["check", str(root / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_lists_are_checked_too(root):
    (root / "list.txt").write_text("a/0.jpg 0\nb c/1.jpg 1\na/gone.jpg 1\n")
    report = check.scan(root / "list.txt", full=True)
    assert list(report.bad) == ["a/gone.jpg"]
    assert list(report.samples.names) == ["a/0.jpg", "b c/1.jpg"]


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_a_film_behind_a_photo_is_fine(root, full):
    """As motion photos have it: more bytes behind the end marker than are searched for it."""
    (root / "a" / "motion.jpg").write_bytes(encoded("JPEG", 3) + bytes(5000))
    assert check.scan(root, full=full, workers=1).ok


def test_a_check_that_is_killed_takes_its_processes_along(root):
    for i in range(3000):
        os.link(root / "a" / "2.jpg", root / "a" / f"more {i}.jpg")
    run = subprocess.Popen(
        [sys.executable, "-m", "lumix_dali", "check", str(root), "--full", "--workers", "2"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    deadline = time.monotonic() + 60
    while len(found := children.read_text().split()) < 2:  # the pool's, and perhaps a resource tracker
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.terminate()
    run.communicate(timeout=30)  # would wait for ever for a child that holds the pipe
    while any(os.path.exists(f"/proc/{child}") for child in found):
        assert time.monotonic() < deadline
        time.sleep(0.02)
