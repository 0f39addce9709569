"""`lumix-dali speed`: ratios and sentences of known rates, and one short run."""

import numpy as np
import pytest
from PIL import Image

from lumix_dali import cli
from lumix_dali.speed import CACHED, MIXED, TIMM, TRAINED, UNMIXED, YOURS, Candidate, Speed, _take_turns

LOADERS = {UNMIXED: [100, 110, 90, 100, 100], MIXED: [90, 99, 81, 90, 90], TIMM: [45, 33, 81, 30, 45]}


def my_loader():
    return [(np.zeros((4, 3)), np.zeros(4))] * 3


def measured(waits=0.2, device="cpu", **training):
    return Speed(LOADERS | training, [waits] * 5, device)


def test_ratios_are_taken_round_by_round():
    assert measured().ratio(MIXED, TIMM) == (2, 2, 3)  # of 2, 3, 1, 3, 2


def test_a_slow_loader_is_the_bottleneck_and_a_remedy_is_named():
    rates = {CACHED: [50, 50, 60, 50, 50], TRAINED: [40, 40, 48, 44, 40]}
    text = str(measured(**rates))
    assert "The loader is the bottleneck: training on it runs at 0.80 times (0.80 to 0.80)" in text
    assert "lumix-dali convert --max-size" in text


def test_a_loader_that_only_shares_the_cpus_is_not_the_bottleneck():
    rates = {CACHED: [50, 50, 60, 50, 50], TRAINED: [40, 40, 48, 44, 40]}
    text = str(measured(waits=0.04, **rates))
    assert "The loader is not the bottleneck: training on it runs at 0.80 times" in text
    assert "waits for batches in 4% of its time" in text
    assert "The loader is the bottleneck" in str(measured(waits=0.04, device="cuda", **rates))


def test_noise_is_no_bottleneck():
    rates = {CACHED: [50, 50, 60, 50, 50], TRAINED: [40, 51, 61, 50, 49]}
    text = str(measured(**rates))
    assert "The loader is not the bottleneck" in text
    assert "lumix-dali convert" not in text


def test_two_rounds_give_no_verdict():
    text = str(Speed({UNMIXED: [1.0, 2.0], MIXED: [2.0, 3.0]}, [], "cpu"))
    assert "too few for a verdict" in text
    assert "times" not in text


def test_an_interrupt_keeps_what_was_measured():
    def batches():
        yield from [(np.zeros(4), None)] * 8
        raise KeyboardInterrupt

    candidate, lines = Candidate(batches()), []
    _take_turns({"one": candidate}, 9, 0.0, lines.append)  # nothing is timed in 0 s
    assert "interrupted" in lines[-1]


@pytest.fixture
def folder(tmp_path):
    for k in range(24):
        path = tmp_path / "images" / str(k % 3) / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), (9 * k, 20, 30)).save(path)
    return tmp_path / "images"


def test_the_command_measures_every_candidate(folder, capsys):
    options = ["--batch-size", "4", "--input-size", "32", "--device", "cpu", "--minutes", "0.01", "--rounds", "2"]
    yours = ["--against", "test_speed:my_loader"]
    assert cli.main(["speed", str(folder), "--model", "resnet10t", *options, *yours]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (UNMIXED, MIXED, TIMM, YOURS, CACHED, TRAINED))
    assert "too few for a verdict" in printed


def test_a_run_of_no_rounds_is_refused(folder, capsys):
    assert cli.main(["speed", str(folder), "--batch-size", "4", "--rounds", "0"]) == 2
    assert "--rounds=0: give a whole number >= 1" in capsys.readouterr().err


def test_an_unknown_model_is_named(folder, capsys):
    assert cli.main(["speed", str(folder), "--model", "resnet10x", "--batch-size", "4", "--device", "cpu"]) == 2
    assert "resnet10x" in capsys.readouterr().err
