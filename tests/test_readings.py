"""Tables, readings, figures and pages say what the numbers of a result say, and withhold what they do not."""

import json
import re

import pytest

from benchmarks import accuracy, harness, loss, pages, plot, report

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


def test_a_stopped_run_says_so():
    assert report.read(loaders() | dict(complete=False)).said[0].startswith("The run was stopped")


def test_graphed_steps_are_compared_with_graphed_ones():
    times = {"LUMix eager": [4.0], "LUMix graphed": [2.0], "timm soft target": [3.0], "timm soft target graphed": [4.0]}
    found = {row["name"]: row["median"] for row in loss.to_best_peer(result_of("loss", times, **SIZE))}
    assert found == {"LUMix eager": pytest.approx(4 / 3), "LUMix graphed": 0.5}


# --- figures


@pytest.mark.parametrize("kind", MADE)
def test_a_figure_shows_every_ratio_sorted(kind):
    chart = report.kind_of(MADE[kind]()).chart(MADE[kind]())
    assert chart.title
    for panel in chart.panels:
        assert len(panel.dots) > 0
        if kind != "cost":
            assert [dot.middle for dot in panel.dots] == sorted((dot.middle for dot in panel.dots), reverse=True)
    figure = plot.draw(MADE[kind]())
    drawn = [len(axes.lines) for axes in figure.axes]
    assert drawn == [3 * len(panel.dots) + (panel.line is not None) for panel in chart.panels]
    sizes = [text.get_fontsize() for axes in figure.axes for text in (*axes.get_yticklabels(), axes.xaxis.label)]
    assert min(sizes) * 96 / 72 * 690 / (96 * plot.WIDTH) >= 10  # pixels, where a page is 690 wide


def test_figures_without_data_are_errors():
    empty = result_of("loaders", {"lumix/none": [1.0]})
    with pytest.raises(ValueError, match="no data for"):
        plot.draw(empty)
    with pytest.raises(ValueError, match="no data for any panel"):
        plot.draw(result_of("cost", {"build": [1.0]}, part="epoch"))


def test_a_method_has_one_colour_that_is_read_on_white_and_on_black():
    for name in ("lumix/none", "LUMix eager", "loader: cutmix elem", "cpu: today", "lumix tar"):
        assert plot.colour(name) == plot.COLOURS["lumix"]
    for shade in {*plot.COLOURS.values(), plot.GREY}:
        channels = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) > 2.5


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: nothing -->\n<!-- end: nothing -->\n", "begin: nothing -->: no .*nothing.json; measure it"),
        ("<!-- begin: loaders -->\n", "markers: one has no counterpart"),
    ],
)
def test_invalid_markers_are_named(page, text, message, capsys):
    main, path, *_ = page
    path.write_text(text)
    with pytest.raises(SystemExit):
        main()
    assert re.search(message, capsys.readouterr().err)


def test_missed_targets_come_first_with_their_bounds(tmp_path, monkeypatch):
    harness.write(tmp_path / "loaders.json", loaders())
    to = ("loaders", "lumix/cutmix+mixup elem")
    wanted = [
        pages.Target("met", 0.7, *to, "dali/+normalise", {}, "x"),
        pages.Target("absent", 1.0, *to, "nobody", {}, "x"),
        pages.Target("missed", -0.7, *to, "dali/+normalise", {}, "decoding"),
    ]
    monkeypatch.setattr(pages, "TARGETS", wanted)
    assert pages.targets(tmp_path).splitlines()[2:] == [
        "| missed | ≤ 0.7 | 0.750 | 0.750 – 0.750 | missed: decoding |",
        "| absent | ≥ 1 | not measured yet |  |  |",
        "| met | ≥ 0.7 | 0.750 | 0.750 – 0.750 | met |",
        "",
        f"Measured: `loaders`, {report.source_of(loaders())}.",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "mine.json: not JSON .*give what a benchmark wrote with --out"),
        ('{"kind": "odd"}', "its kind is 'odd'; give a result of a benchmark, one of loaders, "),
        ('{"kind": "tune", "rows": [{"name": "x"}]}', "a tune result without what its figure shows"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, capsys, content, message):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "mine.json"), "-o", str(tmp_path / "x.png")])
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_one_result_is_drawn_and_read(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(loaders()))
    assert plot.main([str(tmp_path / "mine.json"), "-o", str(tmp_path / "new" / "x.png")]) == 0
    assert capsys.readouterr().out == report.report(loaders()) + "\n"
    assert (tmp_path / "new" / "x.png").stat().st_size > 10_000


def test_accuracy_rows_are_sorted_by_their_difference():
    def runs(*top1):
        return [dict(seed=seed, top1=[value]) for seed, value in enumerate(top1)]

    rows = [
        dict(name=name, runs=runs(*top1), error=None)
        for name, top1 in (("CutMix", (50, 51, 52)), ("LUMix", (52, 53.1, 54.2)), ("Mixup", (49, 50, 52)))
    ]
    (panel,) = accuracy.chart(dict(rows=rows)).panels
    assert [dot.label for dot in panel.dots] == ["LUMix", "Mixup"]
    assert panel.dots[0].middle == pytest.approx(2.1)
    assert panel.dots[1].values == [-1, -1, 0]


def test_the_committed_figures_and_tables_are_current():
    assert plot.main(["--check"]) == 0
