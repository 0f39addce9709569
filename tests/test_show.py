"""`lumix-dali show`: the picture's tiles show what the loader delivers, and an invalid call explains the error."""

import runpy
import sys

import numpy as np
import pytest
from images import ramp_samples, ramps, write
from PIL import Image

from lumix_dali import cli as program
from lumix_dali import create_loader

OPTIONS = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for number in range(6):
        write(ramps(30, 40) * 4 + 5 * np.uint8(number), root / f"class {number // 2}" / f"{number}.png")
    return root


def delivered(root, size):
    return next(iter(create_loader(root, batch_size=6, dtype="uint8", device="cpu", input_size=size, **OPTIONS)))


@pytest.mark.parametrize(("size", "zoom"), [((32, 32), 7), ((20, 56), 4), ((230, 250), 1)])
def test_tiles_hold_the_delivered_images(root, tmp_path, size, zoom):
    program.show(str(root), str(tmp_path / "mixed.png"), count=6, input_size=size, **OPTIONS)
    picture = np.array(Image.open(tmp_path / "mixed.png"))
    images, target = delivered(root, size)
    assert {1, 2} <= set(target.kind.tolist())
    height, width = size[0] * zoom + 58, size[1] * zoom + 8
    assert picture.shape == (2 * height, 4 * width, 3)
    rows = zip(images, target.box.tolist(), target.kind.tolist(), strict=True)
    for place, (image, box, kind) in enumerate(rows):
        tile = picture[place // 4 * height :, place % 4 * width :][:height, :width]
        expected = image.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
        drawn = (tile[4:-54, 4:-4] != expected).any(-1)
        outline = np.zeros_like(drawn)
        y0, x0, y1, x1 = (edge * zoom for edge in box)
        if kind == 2:
            outline[y0:y1, x0:x1] = True
            outline[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = False
        np.testing.assert_array_equal(drawn, outline)
        assert (tile[4:-54, 4:-4][drawn] == program.BOX_COLOUR).all()
        assert (tile[-54:] < 100).any()  # the text
        assert (tile[-54:] == program.BOX_COLOUR).all(-1).any() == (kind == 2)  # the pasted label, in the box's colour


def test_text_names_classes_and_weights(root, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(program.ImageDraw.ImageDraw, "text", lambda self, at, *line, font: lines.append(line))
    program.show(str(root), str(tmp_path / "mixed.png"), count=6, input_size=32, **OPTIONS)
    _, target = delivered(root, 32)
    expected = []
    for label, partner, lam0, _, kind in zip(*(field.tolist() for field in target[:5]), strict=True):
        assert kind in (1, 2)
        expected += [
            (f"{program.KINDS[kind]}  lam0 = {lam0:.3f}", "black"),
            (f"canvas {1 - lam0:.3f} class {label}", "black"),
            (f"pasted {lam0:.3f} class {partner}", (255, 64, 64))
            if kind == 2
            else (f"blended {lam0:.3f} class {partner}", "black"),
        ]
    assert lines == expected


def test_command_line(root, tmp_path, capsys):
    out = tmp_path / "mixed.jpg"
    assert (
        program.main(
            [
                "show",
                str(root),
                "-o",
                str(out),
                "--input-size",
                "28",
                "--count",
                "50",
                "--mixup",
                "0",
                "--hflip",
                "0",
                "--seed",
                "2",
                "--aa",
                "rand-m9-mstd0.5-inc1",
                "--reprob",
                "0.5",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"wrote {out}; {program.LEGEND}\n"
    assert Image.open(out).size == (4 * (28 * 8 + 8), 2 * (28 * 8 + 58))  # six files, one tile each


def test_a_list_of_files(tmp_path):
    samples = ramp_samples(tmp_path / "files", 3)
    (tmp_path / "list.txt").write_text("".join(f"{samples.path(i)} {i}\n" for i in range(3)))
    program.show(str(tmp_path / "list.txt"), str(tmp_path / "mixed.png"), input_size=32)
    assert Image.open(tmp_path / "mixed.png").width == 4 * (32 * 7 + 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "lumix-dali: source='nowhere': no such folder or list file; give one that exists"),
        (["ROOT", "--mixup", "-1"], "mixup_alpha=-1.0: give a finite number >= 0"),
        (["ROOT", "--mixup-mode", "pair"], "mode='pair': pair is not supported"),
        (["ROOT", "--count", "0"], "--count=0: give a whole number >= 1"),
        (["ROOT", "--input-size", "32", "-o", "TMP/mixed.xyz"], "mixed.xyz: Pillow knows no format of this ending"),
        (["ROOT", "--input-size", "32", "-o", "TMP/nowhere/mixed.png"], "No such file or directory"),
    ],
)
def test_an_invalid_call_exits_with_2(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("ROOT", str(root)).replace("TMP", str(tmp_path)) for a in arguments]
    assert program.main(["show", *arguments]) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert not written.out
    assert not list(tmp_path.iterdir())


def test_the_exit_status_of_the_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lumix-dali", "show", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "lumix_dali.cli")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("lumix_dali", run_name="__main__")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"lumix-dali: source='{tmp_path}': no image in it")
