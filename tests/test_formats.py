"""Whatever Pillow reads is delivered with timm's pixels, or as far from them as `formats.STATEMENTS` says.

One loader per image size, set so that nothing is resized, and timm's own data set over the same folder.
"""

import io
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import formats
import numpy as np
import pytest
from PIL import Image

from lumix_dali import create_loader
from lumix_dali.data import formats as lumix_formats

timm_data = pytest.importorskip("timm.data")
Image.init()
if "AVIF" not in Image.SAVE:
    pytest.skip("this Pillow writes no AVIF", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:IM image format is deprecated"),
    pytest.mark.filterwarnings("ignore:Palette images with Transparency"),
]
# Formats that Pillow passes on to another program, or to a handler that is not installed.
NOT_READ_AGAIN = {"BUFR", "EPS", "GRIB", "HDF5", "WMF"}
# Formats that Pillow reads but neither it nor tests/formats.py writes. Its MPEG reader reads only the size.
NOT_WRITTEN = {"FLI", "FTEX", "IMT", "IPTC", "MCIDAS", "MPEG", "PCD"}
BEGIN, END = "<!-- formats -->\n", "\n<!-- /formats -->"
RELIABILITY = Path(__file__).parents[1] / "docs" / "reliability.md"


class Delivered(NamedTuple):
    row: formats.Row
    ours: np.ndarray
    timms: np.ndarray
    by_pillow: bool


def content_of(file):
    """Bytes of the argument of `Image.open`."""
    if not hasattr(file, "read"):
        return Path(file).read_bytes()
    file.seek(0)
    content = file.read()
    file.seek(0)
    return content


def ours(root, size):
    """uint8 [N, H, W, C] from the loader, and the contents of the files that Pillow decoded meanwhile."""
    opened, pillows = set(), lumix_formats.pillow_pixels

    def spy(file, *args, **kwargs):
        opened.add(content_of(file))
        return pillows(file, *args, **kwargs)

    untouched = {"input_size": size, "crop_pct": 1.0, "crop_mode": "squash", "dtype": "uint8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumix_formats, "pillow_pixels", spy)
        with create_loader(root, **untouched, batch_size=64, is_training=False, device="cpu") as loader:
            images = np.concatenate([images.numpy() for images, _ in loader])
            assert not loader.bad
    return images.transpose(0, 2, 3, 1), opened


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    """{statement's name: everything delivered for it}"""
    root, by_size = tmp_path_factory.mktemp("formats"), defaultdict(list)
    for row in formats.rows():
        file = root / "all" / "class" / "row.jpg"  # one suffix for all: it has no influence
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row.content)
        image, _ = timm_data.create_dataset("", root=file.parents[1])[0]
        by_size[image.size[::-1]].append((row, np.asarray(image)))
    found = defaultdict(list)
    for size, rows in by_size.items():
        folder = root / f"{size}" / "class"
        folder.mkdir(parents=True)
        for number, (row, _) in enumerate(rows):
            (folder / f"{number:04}.jpg").write_bytes(row.content)
        images, opened = ours(folder.parent, size)
        for (row, timms), image in zip(rows, images, strict=True):
            found[row.format, row.contents].append(Delivered(row, image, timms, row.content in opened))
    return found


@pytest.mark.parametrize("name", formats.STATEMENTS, ids=": ".join)
def test_pixels_match_timms(delivered, name):
    """As far from timm's as stated and no closer: the table must be true."""
    stated = formats.STATEMENTS[name]
    for each in delivered[name]:
        difference = np.abs(each.ours.astype(int) - each.timms)
        found = round(difference.mean(), 1), difference.max()
        assert found == (stated.mean, stated.largest), each.row[:3]
    assert delivered[name]


@pytest.mark.parametrize("name", formats.STATEMENTS, ids=": ".join)
def test_who_decodes(delivered, name):
    wanted = formats.STATEMENTS[name].decoder == "Pillow"
    assert [each.row.what for each in delivered[name] if each.by_pillow != wanted] == []


@pytest.mark.parametrize("name", formats.STATEMENTS, ids=": ".join)
def test_what_check_notes(delivered, name):
    """It notes each file that Pillow decodes or whose pixels differ from timm's."""
    stated = formats.STATEMENTS[name]
    for each in delivered[name]:
        look = lumix_formats.look(io.BytesIO(each.row.content))
        assert look.decoder.name == stated.decoder.upper(), each.row[:3]
        assert bool(look.why) == (stated.decoder == "Pillow" or stated.largest > 0), each.row[:3]
        assert ("clips" in look.why) == (stated.largest > 1), each.row[:3]


def test_nothing_is_resized(delivered):
    """The pixels equal those that were written, not only those that timm reads."""
    for each in delivered["PNG", "RGB of 8 bits"]:
        np.testing.assert_array_equal(each.ours, formats.picture())


def test_16_bits_are_scaled_and_rounded(delivered):
    for name, colour in {"grey": 0, "grey with alpha,": 4, "RGB, with alpha or without,": 2}.items():
        values = formats.samples(colour, 16, formats.SIZE)[..., : 3 if colour == 2 else 1]
        for each in delivered["PNG", f"{name} of 16 bits"]:
            assert np.abs(each.ours - values / 257).max() <= 0.5, each.row[:3]


def test_every_format_that_pillow_reads_is_covered(tmp_path):
    (tmp_path / "file").touch()
    found = set()
    for row in formats.rows():
        (tmp_path / "file").write_bytes(row.content)
        with Image.open(tmp_path / "file") as image:
            found.add(image.format.upper())
    assert found == {*Image.OPEN} - NOT_READ_AGAIN - NOT_WRITTEN | {"MPO"}


def test_every_file_has_a_statement():
    assert {row[:2] for row in formats.rows()} == {*formats.STATEMENTS}


def test_the_table_in_the_docs_is_current():
    _, begin, rest = RELIABILITY.read_text(encoding="utf-8").partition(BEGIN)
    table, end, _ = rest.partition(END)
    assert begin and end, f"{RELIABILITY.name} lacks its markers"
    assert table.strip() == formats.table(), "print it with `python -m tests.formats`"
