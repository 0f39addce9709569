"""Tables, readings, figures and pages say what the numbers of a result say, and withhold what they do not."""

import json
import re

import pytest

from benchmarks import harness, plot, report

META = {
    "command": "python -m benchmarks.x --out x",
    "commit": "0123456789abcdef",
    "clean": True,
    "date": "2030-01-02T03:04:05+00:00",
    "machine": {"affinity": 2, "cpu": "A CPU", "gpu": None},
}
SIZE = dict(B=128, K=10, dtype="float32")


def result_of(kind, values, references=(), rounds=5, **fields):
    """A result with a row per name; each name's values are repeated to fill `rounds`."""
    filled = {name: [one[i % len(one)] for i in range(rounds)] for name, one in values.items()}
    rows = [
        dict(name=name, values=own, error=None, **harness.summary(own), **fields)
        | dict(ratios={other: harness.ratio(own, filled[other]) for other in references if other in filled})
        for name, own in filled.items()
    ]
    return dict(kind=kind, unit="ms", complete=True, rounds=rounds, meta=META, settings={}, rows=rows)


def loaders(rounds=5):
    speeds = {
        "dali/+normalise": [400.0],
        "lumix/none": [380.0],
        "lumix/cutmix+mixup elem": [300.0],
        "timm FastCollateMixup elem": [200.0, 100.0],
        "ffcv": [330.0, 290.0],
    }
    return result_of("loaders", speeds, ["dali/+normalise", "lumix/none", "timm FastCollateMixup elem", "ffcv"], rounds)


def steps(rounds=5):
    times = {"cutmix replayed": [100.0], "lumix replayed": [101.0, 99.0], "lumix loaded": [130.0]}
    return result_of("cost", times, ["cutmix replayed", "lumix replayed"], rounds, part="step")


def losses(rounds=5):
    times = {"LUMix eager": [0.5], "timm soft target": [1.0], "torch probabilities": [0.25]}
    return result_of("loss", times, ["timm soft target", "torch probabilities"], rounds, **SIZE)


def mix(rounds=5):
    return result_of(
        "mix",
        {"floor: copy": [2.0], "normalise": [8.0], "loader: cutmix+mixup elem": [6.0, 7.0]},
        ["floor: copy", "normalise"],
        rounds,
        cpu_ms=1.5,
    )


MADE = {"loaders": loaders, "cost": steps, "loss": losses, "mix": mix}
SAID = {
    "loaders": [
        "lumix/cutmix+mixup elem ÷ timm FastCollateMixup elem: 1.500 (1.500 – 3.000), faster.",
        "lumix/cutmix+mixup elem ÷ ffcv: 0.909 (0.909 – 1.034), no difference shown.",
        "lumix/cutmix+mixup elem ÷ dali/+normalise: 0.750 (0.750 – 0.750), slower.",
    ],
    "cost": [
        "LUMix ÷ CutMix, whole step: 1.010 (0.990 – 1.010), no difference shown.",
        "The loader is the bottleneck.",
    ],
    "loss": ["LUMix eager ÷ the best peer: 2.000 (2.000 – 2.000), slower."],
    "mix": ["loader: cutmix+mixup elem takes the time of 3.00 (3.00 – 3.50) copies."],
}


@pytest.mark.parametrize("kind", MADE)
def test_readings_say_what_the_rounds_show(kind):
    said, _ = report.read(MADE[kind]())
    assert set(SAID[kind]) <= set(said), said


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("rounds", [1, 4])
def test_a_verdict_needs_five_rounds(kind, rounds):
    text = report.report(MADE[kind](rounds))
    assert f"{rounds} round(s): it runs, but a verdict needs 5." in text
    assert not re.search("faster|slower|bottleneck|less time|more time", text)


# --- pages


@pytest.fixture
def page(tmp_path):
    """plot.main over a folder with two results, and a text with a table and a figure."""
    results, figures, text = tmp_path / "results", tmp_path / "figures", tmp_path / "README.md"
    harness.write(results / "loaders.json", loaders())
    harness.write(results / "loss.json", losses())
    text.write_text("a\n<!-- begin: loaders -->\n<!-- end: loaders -->\n![x](../benchmarks/figures/loss.svg)\n")
    figures.mkdir()
    (figures / "unused.svg").touch()

    def main(*more):
        return plot.main([str(text), "--results", str(results), "--figures", str(figures), *more])

    return main, text, figures, results


def test_pages_are_made_from_the_results_and_checked(page, capsys):
    main, text, figures, results = page
    assert main("--check") == 1
    assert [path.name for path in figures.iterdir()] == ["unused.svg"]  # a check changes nothing
    assert main() == 0
    assert "| lumix/none |  |  | none | 380 | 380 – 380 | 0.95 | 1.90 |" in text.read_text()
    assert [path.name for path in figures.iterdir()] == ["loss.svg"]  # what no text links is deleted
    before = (figures / "loss.svg").read_bytes()
    assert main("--check") == 0
    text.write_text(text.read_text().replace("380 – 380", "380 – 999"))
    assert main("--check") == 1
    assert main() == 0
    (figures / "loss.svg").unlink()
    main()
    assert (figures / "loss.svg").read_bytes() == before
    harness.write(results / "loss.json", losses() | dict(rounds=6))  # another result
    assert main("--check") == 1


def test_one_result_is_drawn_and_read(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(loaders()))
    assert plot.main([str(tmp_path / "mine.json"), "-o", str(tmp_path / "new" / "x.png")]) == 0
    assert capsys.readouterr().out == report.report(loaders()) + "\n"
    assert (tmp_path / "new" / "x.png").stat().st_size > 10_000


def test_the_committed_figures_and_tables_are_current():
    assert plot.main(["--check"]) == 0
