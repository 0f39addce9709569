"""`lumix-dali check` finds what would stop a run, says why, and writes the remaining samples for the loader."""

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
from formats import chunk, png
from PIL import Image

from lumix_dali import create_loader
from lumix_dali.cli import main
from lumix_dali.data import check, children
from lumix_dali.data.files import class_folder, write_manifest
from lumix_dali.data.protocol import Source


def encoded(kind, seed=0, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def claiming(side):
    """A PNG of a few bytes whose header claims side x side."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND")


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
    """Two classes of five good images, one of them CMYK, one with text after its end."""
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
    assert report.samples.digest == class_folder(root).digest


def test_a_scan_without_a_process_is_refused(root):
    with pytest.raises(ValueError, match=r"workers=-1: give a whole number >= 1"):  # it would wait for ever
        check.scan(root, workers=-1)


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_every_damaged_file_is_found_with_a_reason(root, full):
    for name, content in DAMAGED.items():
        (root / "a" / name).write_bytes(content)
    (root / "b c" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    report = check.scan(root, full=full, workers=2)
    assert sorted(report.bad) == sorted([*(f"a/{name}" for name in DAMAGED), "b c/gone.jpg"])
    assert all(report.bad.values())
    assert "what to do: --manifest FILE writes a list of the others" in check.show(report)
    assert report.counts == {"a": 5, "b c": 5}
    assert not report.ok


def test_the_full_scan_finds_what_only_decoding_shows(root):
    data = bytearray(PNG)
    data[len(data) // 2] ^= 0xFF  # inside the pixels: header and end are intact
    (root / "a" / "crc.png").write_bytes(data)
    assert check.scan(root).ok
    assert list(check.scan(root, full=True).bad) == ["a/crc.png"]


def test_a_header_that_claims_too_much(root):
    (root / "a" / "bomb.png").write_bytes(claiming(60_000))
    report = check.scan(root, full=True)  # decoding it would need 10 GB
    assert report.bad == {"a/bomb.png": "60000x60000 pixels, the limit is 100000000"}
    assert check.scan(root, max_pixels=64 * 48).bad.keys() == {"a/bomb.png"}
    assert "a/2.jpg" in check.scan(root, max_pixels=64 * 48 - 1).bad


def test_only_max_pixels_limits_a_header(root):
    """Pillow refuses 180 million pixels by itself, and reads this header."""
    small = encoded("BMP")
    (root / "a" / "wide.bmp").write_bytes(small[:18] + struct.pack("<II", 20_000, 20_000) + small[26:])
    assert check.scan(root, max_pixels=400_000_000, workers=1).ok
    report = check.scan(root, max_pixels=399_999_999, workers=1)
    assert report.bad.keys() == {"a/wide.bmp"}


def test_skipped_names_and_empty_classes_are_listed(root):
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("x")
    (root / "a" / "._0.jpg").write_bytes(JPEG)
    (root / "a" / ".cache").mkdir()
    (root / "a" / ".cache" / "1.jpg").write_bytes(JPEG)
    report = check.scan(root)
    assert report.ignored == ["a/._0.jpg", "a/.cache/1.jpg", "c/notes.txt"]
    assert report.empty == ["c"]
    assert not report.ok


def test_the_loader_accepts_the_manifest(root, tmp_path_factory):
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
    write_manifest(class_folder(root), manifest)
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(ValueError, match=r"source=.*train\.json.*write it again"):
        create_loader(manifest, batch_size=2, device="cpu")


def test_the_report_is_for_scripts(root, tmp_path_factory, capsys):
    report = tmp_path_factory.mktemp("out") / "report.json"
    assert main(["check", str(root), "--report", str(report), "--ranks", "2", "--batch-size", "2"]) == 0
    content = json.loads(report.read_text())
    assert content["ok"] is True
    assert content["images"] == 10
    assert content["epoch"] == dict(ranks=2, batch_size=2, batches=2, left_out=2)
    assert "10 usable images in 2 classes" in capsys.readouterr().out
    assert main(["check", str(root), "--batch-size", "11"]) == 0
    assert "0 per rank, 10 samples left out\ntoo few for a batch on each rank" in capsys.readouterr().out
    assert main(["check", str(root / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_lists_are_also_checked(root):
    (root / "list.txt").write_text("a/0.jpg 0\nb c/1.jpg 1\na/gone.jpg 1\n")
    report = check.scan(root / "list.txt", full=True)
    assert list(report.bad) == ["a/gone.jpg"]
    assert list(report.samples.names) == ["a/0.jpg", "b c/1.jpg"]


class TwoShards(Source):
    """A source of one's own that tells the sizes of its shards, but has no names for them."""

    classes, digest, counts = ["a", "b"], "", np.array([2, 3])

    def __len__(self):
        return 5

    def name(self, index):
        return f"sample {index}"

    def read(self, indices):
        return [JPEG if i else b"text" for i in indices], np.array([i % 2 for i in indices])


def test_shards_of_a_source_of_ones_own_are_numbered():
    report = check.scan(TwoShards(), workers=1)
    assert report.bad.keys() == {"sample 0"}
    assert report.shards == {"shard 0": 1, "shard 1": 3}


@pytest.mark.parametrize("wrong", [2, -1])
def test_a_label_of_a_source_of_ones_own_that_is_no_class_is_bad_in_check_and_loader(wrong):
    source, image = TwoShards(), encoded("JPEG", 1)
    source.read = lambda indices: (
        [image for _ in indices],
        [[0, np.uint8(1), wrong, np.int32(1), 0][i] for i in indices],
    )
    report = check.scan(source, workers=1)
    assert report.bad == {"sample 2": f"its label is {wrong!r}, not a whole number in [0, 2)"}
    assert report.counts == {"a": 2, "b": 2}
    with create_loader(source, batch_size=5, device="cpu", input_size=8) as loader:
        with pytest.warns(UserWarning, match="sample 2 cannot be used"):
            ((_, target),) = loader
        assert loader.bad == report.bad
    assert target.labels.tolist().count(1) == 3  # sample 3 takes its place


def test_known_labels_of_a_source_of_ones_own_are_checked_before_the_first_batch():
    source = TwoShards()
    source.labels = np.array([0, 1, 0, 7, 1])
    with pytest.raises(ValueError, match=r"^labels: 3: its label is 7, not a whole number in \[0, 2\)"):
        create_loader(source, batch_size=5, device="cpu")


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_check_works_with_descriptors_closed(root, closed):
    script = f"from lumix_dali.data import check; import json; r = check.scan({str(root)!r}, full=True); "
    script += f"open('{root}.json', 'w').write(json.dumps(r.as_dict()))"
    subprocess.run(f'{sys.executable} -c "{script}" {closed}', shell=True, timeout=120)
    assert json.loads(Path(f"{root}.json").read_text())["images"] == 10


def test_classes_may_be_an_array(root):
    source = TwoShards()
    source.classes = np.array(["a", "b"])
    assert check.scan(source, workers=1).counts == {"a": 2, "b": 2}


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_a_video_after_a_photo_is_accepted(root, full):
    """As in motion photos: more bytes after the end marker than are searched for it."""
    (root / "a" / "motion.jpg").write_bytes(encoded("JPEG", 3) + bytes(5000))
    assert check.scan(root, full=full, workers=1).ok


def test_killing_a_check_ends_its_processes(root):
    for i in range(3000):
        os.link(root / "a" / "2.jpg", root / "a" / f"more {i}.jpg")
    run = subprocess.Popen(
        [sys.executable, "-m", "lumix_dali", "check", str(root), "--full", "--workers", "2"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    tasks = Path(f"/proc/{run.pid}/task")  # the children of each thread
    deadline = time.monotonic() + 60
    while len(found := [child for each in tasks.glob("*/children") for child in each.read_text().split()]) < 2:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.terminate()
    run.communicate(timeout=30)  # would wait forever for a child that holds the pipe
    while any(os.path.exists(f"/proc/{child}") for child in found):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def notable():
    """{name: content} of files that Pillow decodes, or that DALI decodes to pixels other than timm's."""
    animated, first = io.BytesIO(), Image.new("RGB", (8, 8))
    first.save(animated, "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    exif = Image.Exif()
    exif[274] = 6
    webp, cmyk = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP", exif=exif)
    Image.new("CMYK", (8, 8)).save(cmyk, "JPEG")
    found = {f"{kind}-{i}.tif": encoded("TIFF", i) for i in range(3) for kind in ("a", "b")}
    found |= {"still.gif": encoded("GIF"), "moving.png": animated.getvalue(), "turned.webp": webp.getvalue()}
    found |= {"print.jpg": cmyk.getvalue(), "plain.png": PNG, "flat.webp": encoded("WEBP")}
    return found | {f"deep-{colour}.png": png(colour, 16) for colour in (0, 2, 4, 6)}


# By format: which decoder reads how many of `notable`, and what its line says.
NOTES = {
    ("TIFF", "PILLOW", 6, "only JPEG, PNG and WebP"),
    ("GIF", "PILLOW", 1, "only JPEG, PNG and WebP"),
    ("PNG", "PILLOW", 1, "animated"),
    ("WEBP", "PILLOW", 1, "EXIF"),
    ("JPEG", "PILLOW", 1, "three components"),
    ("PNG", "DALI", 1, "grey of 16 bits is scaled to 8 bits, where Pillow clips it at 255"),
    ("PNG", "DALI", 3, "16 bits are rounded to 8, where Pillow takes the upper byte"),
}


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_slow_and_differing_decoding_is_counted_by_format(tmp_path, full):
    """The truncated TIFF counts until decoding shows that it is bad."""
    (tmp_path / "c").mkdir()
    for name, content in notable().items():
        (tmp_path / "c" / name.replace(".gif", ".jpg")).write_bytes(content)
    (tmp_path / "c" / "cut.tif").write_bytes(encoded("TIFF")[:200])
    stated = {(kind, decoder, count + (kind == "TIFF" and not full)): why for kind, decoder, count, why in NOTES}
    report = check.scan(tmp_path, full=full, workers=1)
    found = {(note["format"], note["decoder"], note["images"]): note["why"] for note in report.as_dict()["notes"]}
    assert found.keys() == stated.keys()
    lines = [line for line in check.show(report).splitlines() if line.startswith("note: ")]
    assert len(lines) == len(NOTES)
    for (kind, decoder, number), why in stated.items():
        assert why in found[kind, decoder, number]
        start = f"note: {number} {kind} decoded {'by Pillow' if decoder == 'PILLOW' else 'to other pixels'}"
        assert [line.endswith(found[kind, decoder, number]) for line in lines if line.startswith(start)] == [True]
    assert lines[0].startswith(f"note: {6 if full else 7} TIFF")  # the most frequent first
    assert [Path(name).name for name in report.bad] == ["cut.tif"] * full


def test_the_full_scan_reports_what_dali_refuses(root):
    """A PNG with an unknown critical chunk, as in test_feed.py: only decoding shows it."""
    (root / "a" / "odd.png").write_bytes(PNG[:33] + chunk(b"ABCD") + PNG[33:])
    expected = check.scan(root, workers=1).notes
    assert [(note.format, number) for note, number in expected.items()] == [("JPEG", 1)]  # the CMYK file of `root`
    report = check.scan(root, full=True, workers=1)
    assert report.ok
    assert report.notes == expected | {check.Note("PNG", "PILLOW", "DALI refuses them"): 1}


def test_the_full_scan_finds_damaged_scans_that_dali_delivers_grey(tmp_path):
    """libjpeg's fatal errors in a scan count as success in nvImageCodec; Pillow refuses these images."""
    good = encoded("JPEG", 1, (256, 192))
    start = good.index(b"\xff\xda") + 14
    middle, rng, bad = start + (len(good) - start) // 4, np.random.default_rng(0), {"a/marker.jpg"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "good.jpg").write_bytes(good)
    (tmp_path / "a" / "marker.jpg").write_bytes(good[:middle] + b"\xff\xc0\0\x11" + good[middle + 4 :])
    for k in range(12):
        at = int(rng.integers(start, len(good) - 700))
        content = good[:at] + rng.integers(0, 256, 512).astype(np.uint8).tobytes() + good[at + 512 :]
        (tmp_path / "a" / f"{k}.jpg").write_bytes(content)
        try:
            Image.open(io.BytesIO(content)).convert("RGB")
        except OSError:
            bad.add(f"a/{k}.jpg")
    assert len(bad) > 5
    assert check.scan(tmp_path, full=True, workers=1).bad.keys() == bad
    assert "a/marker.jpg" in check.scan(tmp_path, workers=1).bad  # stray markers show without decoding


def mortal(items):
    if "fatal" in items:
        os.kill(os.getpid(), 9)
    return [item.upper() for item in items]


def test_an_item_that_ends_its_process_is_found():
    chunks = [["a", "b"], ["c", "fatal", "d"], ["e"]]
    found = [each for part in children.run(mortal, chunks, 2) for each in part]
    assert found == ["A", "B", "C", "the process that decoded it died (signal 9)", "D", "E"]
    assert isinstance(found[3], children.Died)


def test_neither_a_main_guard_nor_a_filter_nor_pillows_limit_matters(root, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "scan.py"
    script.write_text(
        "import sys, PIL.Image; from lumix_dali.data import check; PIL.Image.MAX_IMAGE_PIXELS = 10\n"
        "report = check.scan(sys.argv[1], full=True, workers=2); print(len(report.labels), report.bad)"
    )
    done = subprocess.run([sys.executable, "-W", "error", script, root], capture_output=True, text=True, timeout=120)
    assert done.stdout == "10 {}\n", done.stderr
