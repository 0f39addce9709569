"""The summary that a benchmark prints at its end, from hand-made results with a known reading."""

import json
import re

import pytest
from PIL import Image

pytest.importorskip("tqdm")
from benchmarks import harness, readings

COMMAND = "python -m benchmarks.x"
META = dict(
    command=COMMAND,
    commit="0123456789",
    clean=True,
    date="2030-01-02T00:00:00+00:00",
    machine=dict(affinity=2, cpu="A CPU", gpu=None),
)


def rows_of(named, references, **where):
    """Rows as `harness.compare` returns them, from {name: values}."""
    return [
        dict(
            name=name,
            **where,
            values=values,
            error=None,
            ratios={other: harness.ratio(values, named[other]) for other in references if other in named},
            **harness.summary(values),
        )
        for name, values in named.items()
    ]


def result_of(kind, rows, rounds=3, **more):
    return dict(kind=kind, rounds=rounds, complete=True, meta=META, rows=rows, **more)


TIMM, TORCH = "timm soft target", "torch probabilities"


def loss(eager, timm, torch, k=10, compiled=None):
    named = {"LUMix eager": eager, TIMM: timm, TORCH: torch, "floor": [0.001] * 3}
    named |= {"LUMix compiled": compiled} if compiled else {}
    return rows_of(named, [TIMM, "floor"], B=128, K=k, dtype="float32")


def test_the_loss_is_compared_with_its_best_peer():
    """PyTorch's loss is faster here, so taking half of timm's time is no merit."""
    said, _ = readings.read(result_of("loss", loss([2.0, 2.2, 2.1], [4.0, 4.0, 4.0], [1.0, 1.1, 1.0])))
    assert said == [
        "LUMix eager ÷ the best peer: 2.000 (2.000 – 2.050), slower.",
        "The best peer, and at how many sizes: torch.nn.functional.cross_entropy with probability targets (1).",
    ]


def test_sizes_share_one_reading():
    rows = [
        *loss([0.5] * 3, [1.0] * 3, [2.0] * 3, k=10),
        *loss([3.0] * 3, [2.0] * 3, [1.0] * 3, k=20),
        *loss([0.9, 1.1, 1.0], [2.0] * 3, [1.0] * 3, k=30),
    ]
    said, then = readings.read(result_of("loss", rows))
    assert said == [
        "LUMix eager takes 0.50 to 3.00 times the time of the best peer: faster at 1 of 3 sizes, slower at 1, no "
        "difference shown at 1.",
        "The best peer, and at how many sizes: timm's mixup_target with SoftTargetCrossEntropy (1); "
        "torch.nn.functional.cross_entropy with probability targets (2).",
    ]
    assert "benchmarks.cost" in then


def test_a_captured_step_is_compared_with_captured_steps():
    named = {"LUMix graphed": [1.0] * 3, f"{TIMM} graphed": [2.0] * 3, TIMM: [0.1] * 3, "Liger, hard labels": [0.1] * 3}
    (found,) = readings.to_best_peer(result_of("loss", rows_of(named, [], B=1, K=2, dtype="float32")))
    assert (found["peer"], found["median"]) == (TIMM, 0.5)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0.8, 0.9, 0.95], ["x: 0.900 (0.850 – 0.925), less."]),
        ([1.2, 1.3, 1.4], ["x: 1.300 (1.250 – 1.350), more."]),
        ([0.8, 0.9, 1.2], ["x: 0.900 (0.850 – 1.050), no difference shown."]),
        ([1.0, 1.0, 1.0], ["x: 1.000 (1.000 – 1.000), no difference shown."]),
        ([], []),
    ],
)
def test_there_is_no_verdict_where_the_quartiles_straddle_1(ratios, said):
    assert readings.compared("x", harness.ratio(ratios, [1.0] * len(ratios)), "less", "more") == said


def steps(loaded, replayed, cutmix):
    named = {"cutmix replayed": cutmix, "lumix replayed": replayed, "lumix loaded": loaded}
    return rows_of(named, ["cutmix replayed", "lumix replayed"], part="step")


def stage(name, values, until=None):
    more = dict(until=dict(values=until)) if until else {}
    return dict(name=name, part="loader", values=values, error=None, ratios={}, **harness.summary(values), **more)


@pytest.mark.parametrize(
    ("loaded", "words", "then"),
    [
        ([13.0, 14.0, 15.0], "more time", "The loader is the bottleneck.|python -m benchmarks.tune"),
        ([10.1, 10.2, 10.2], "more time", "The loader is not the bottleneck.|a faster model"),
        ([9.0, 10.0, 12.0], "no difference shown", "|more --rounds"),
    ],
)
def test_what_bounds_a_step(loaded, words, then):
    rows = [stage("read", [1.0] * 3), stage("decode", [6.0] * 3, [7.0] * 3), *steps(loaded, [10.0] * 3, [8.0] * 3)]
    said, found = readings.read(result_of("cost", rows))
    assert said[0] == "The loader's longest stage is decode: 6.0 of 7.0 ms per batch."
    assert said[1] == "LUMix ÷ CutMix, whole step: 1.250 (1.250 – 1.250), more time."
    assert said[2].endswith(f", {words}.")
    verdict, start = then.split("|")
    assert said[3:] == [verdict] * bool(verdict)
    assert found.startswith(start)


def loaders(kind="loaders", **where):
    named = {
        "dali/+normalise": [400.0] * 3,
        "lumix/none": [380.0] * 3,
        "lumix/cutmix elem": [390.0, 400.0, 410.0],
        "lumix/cutmix+mixup elem": [300.0] * 3,
        "timm FastCollateMixup elem": [200.0] * 3,
    }
    return result_of(kind, rows_of(named, ["dali/+normalise", "lumix/none", "timm FastCollateMixup elem"], **where))


def test_loaders():
    result = loaders()
    result["rows"].append(dict(name="ffcv", median=None, quartiles=None, values=[], ratios={}, error="No ffcv"))
    lines = readings.report(result).splitlines()
    assert lines[0].split("  ")[0] == "loader"
    assert lines[2].split() == ["lumix/none", "none", "380", "380", "–", "380", "0.95", "1.90"]
    assert lines[-6:] == [
        "",
        "ffcv failed: No ffcv",
        "lumix/cutmix+mixup elem ÷ timm FastCollateMixup elem: 1.500 (1.500 – 1.500), faster.",
        "lumix/cutmix elem ÷ dali/+normalise: 1.000 (0.988 – 1.012), no difference shown.",
        "lumix/cutmix+mixup elem ÷ lumix/none: 0.789 (0.789 – 0.789), slower.",
        "Next: python -m benchmarks.tune finds this loader's fastest arguments, python -m benchmarks.cost its longest "
        "stage",
    ]


def mix():
    named = {"floor: copy": [2.0] * 3, "normalise": [8.0] * 3, "loader: cutmix elem": [6.0, 7.0, 6.0]}
    return result_of("mix", rows_of(named, ["floor: copy", "normalise"], cpu_ms=1.5))


def start():
    names = ("few files", "folder", "manifest", "tar shards, again")
    numbers = zip(names, (0.1, 9.0, 6.0, 0.2), strict=True)
    rows = [
        dict(name=name, samples=10.0, open=opened, first=opened + 1, held=1e6, quartiles={"open": [0, 1]})
        for name, opened in numbers
    ]
    return result_of("start", rows)


def scaling():
    rows = [
        dict(name=name, ranks=ranks, loader=2.0, median=median, bound=bound, headroom=1, cores_needed=1, gbit_needed=1)
        for name, ranks, median, bound in (
            ("a copy on each node", 1, 100.0, "GPU"),
            ("a copy on each node", 8, 96.0, "GPU"),
            ("one store", 1, 97.0, "GPU"),
            ("one store", 8, 20.0, "network"),
        )
    ]
    return result_of("scaling", rows, rounds=None, assumed=dict(gpu_rate=100.0))


def augment():
    rows = [dict(name=f"op {i}", mean=float(i), largest=i, beyond_one=0.0) for i in range(4)]
    return result_of("augment", rows, rounds=None)


def tune():
    values = {"num_threads=2": [100.0] * 3, "num_threads=4": [120.0] * 3}
    rows = rows_of(values, ["num_threads=2"])
    for row in rows:
        row |= dict(knob="num_threads", value=0, ratios=dict(default=row["ratios"]["num_threads=2"]))
        row["chosen"] = row["name"] == "num_threads=4"
    return result_of("tune", rows, chosen=dict(num_threads=4, prefetch_queue_depth=2))


OTHERS = {
    "mix": (mix, "loader: cutmix elem takes the time of 3.00 copies (3.00 – 3.25).", "python -m benchmarks.cost"),
    "start": (
        start,
        "opened within 5 s: all but manifest; the slowest first batch is that of folder, after 10.",
        "",
    ),
    "scaling": (
        scaling,
        "With one store, up to 1 GPU(s) get 95 % of what they take; at 8 they get 20%, bound by network.",
        "a copy of the images on each node",
    ),
    "augment": (
        augment,
        "2 of 4 operations are within one grey level of timm's; op 3 is the farthest, by 3.",
        "docs/",
    ),
    "tune": (
        tune,
        "num_threads=4: 1.200 (1.200 – 1.200) of the default, faster.",
        "create_loader(..., num_threads=4, prefetch_queue_depth=2)",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_readings(kind):
    make, sentence, then = OTHERS[kind]
    said, found = readings.read(make())
    assert any(line.startswith(sentence) for line in said), said
    assert found.startswith(then)


MADE = {
    "loss": lambda: result_of("loss", loss([1.0] * 3, [2.0] * 3, [3.0] * 3)),
    "cost": lambda: result_of("cost", steps([1.0] * 3, [2.0] * 3, [3.0] * 3)),
    "loaders": loaders,
    "loaders-threads": lambda: loaders("loaders-threads", count=2),
    **{kind: made for kind, (made, *_) in OTHERS.items()},
}


@pytest.mark.parametrize("kind", MADE)
def test_one_round_gives_no_verdict_and_every_run_has_its_table(kind):
    result = MADE[kind]() | dict(rounds=1)
    lines = readings.report(result).splitlines()
    assert len(lines) == 1 + len(result["rows"]) + 3  # header, rows, blank line, verdict, next step
    assert lines[-2] == "One round is a smoke test: everything ran, and no figure of it is a verdict."
    assert lines[-1].startswith("Next: the same without --quick, and with --rounds 5")


def test_an_interrupted_run_says_so():
    said, _ = readings.read(loaders() | dict(complete=False))
    assert said[0].startswith("The run was broken off")


# --- one figure of one result


@pytest.fixture
def plot(tmp_path, capsys):
    """`plot(content, *arguments)`: exit status, printed output, and the figure's path."""
    program = pytest.importorskip("benchmarks.plot")

    def run(content, *arguments):
        (tmp_path / "mine.json").write_text(content)
        try:
            status = program.main([str(tmp_path / "mine.json"), *arguments])
        except SystemExit as exit_:
            status = exit_.code
        return status, capsys.readouterr()

    return run


@pytest.mark.parametrize("kind", MADE)
def test_any_result_can_be_drawn(plot, tmp_path, kind):
    out = tmp_path / "new" / "mine.png"
    status, said = plot(json.dumps(MADE[kind]()), "-o", str(out))
    assert status == 0
    assert said.out == readings.report(MADE[kind]()) + "\n"
    with Image.open(out) as image:
        assert image.width > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_a_result_is_drawn_where_something_failed(plot, tmp_path):
    for kind in ("mix", "loaders", "loss"):
        result = MADE[kind]()
        result["rows"][-1] |= dict(median=None, quartiles=None, values=[], ratios={}, error="E")
        assert plot(json.dumps(result), "-o", str(tmp_path / "x.svg"))[0] == 0
        assert (tmp_path / "x.svg").read_text().count("sha256:") == 1


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("{", ["-o", "x.png"], "mine.json: not JSON .*give what a benchmark wrote with --out"),
        ("[1]", ["-o", "x.png"], "mine.json: its kind is None; give a result of a benchmark, one of loaders, "),
        ('{"kind": "odd"}', ["-o", "x.png"], "its kind is 'odd'"),
        ('{"kind": "tune", "rows": [{"name": "x"}]}', ["-o", "x.png"], "a tune result without what its figure shows"),
        (json.dumps(loaders()), [], "-o draws a single result: give FILE.json -o FILE.png"),
        (json.dumps(loaders()), ["--check", "-o", "x.png"], "-o draws a single result"),
        (json.dumps(loaders()), ["README.md", "-o", "x.png"], "-o draws a single result"),
        (json.dumps(loaders()), ["-o", "x.xyz"], "xyz.*not supported"),
    ],
)
def test_what_cannot_be_drawn_is_named(plot, tmp_path, monkeypatch, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, said = plot(content, *arguments)
    assert status == 2
    assert re.search(message, said.err.replace("\n", " ")), said.err
    assert not list(tmp_path.glob("x.*"))


def test_a_missing_file_is_named(tmp_path, capsys):
    program = pytest.importorskip("benchmarks.plot")
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / "no.json"), "-o", str(tmp_path / "x.png")])
    assert "no.json" in capsys.readouterr().err
