"""docs/experiments.md matches the committed results: every table is recomputed here from the runs."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("torchmetrics")

from experiments import ablations, evidence  # noqa: E402

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/experiments.md").read_text()
TABLES = dict(re.findall(r"<!-- begin: (accuracy-[\w-]+) -->\n(.*?)<!-- end: \1 -->", TEXT, re.DOTALL))
METRICS = {"top-1, %": ("top1", 2), "NLL, nats": ("nll", 3), "ECE, %": ("ece", 2)}


def last(name, metric):
    """{row: {seed: value after the last epoch}} from a result."""
    result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return {row["name"]: {run["seed"]: run[metric][-1] for run in row["runs"]} for row in result["rows"]}


def compared(name, metric):
    """{row: (mean, half of the 95 % interval, p after Holm's correction)} of the differences from CutMix."""
    values, found = last(name, metric), {}
    base = values["CutMix"]
    for row in values.keys() - {"CutMix"}:
        pairs = [(value, base[seed]) for seed, value in values[row].items() if seed in base]
        if len(pairs) > 1:
            gaps = np.subtract(*np.transpose(pairs))
            half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
            found[row] = (gaps.mean(), half, stats.ttest_rel(*np.transpose(pairs)).pvalue)
    found = {row: found[row] for row in values if row in found}
    ascending = sorted(found, key=lambda row: found[row][2])
    for place, row in enumerate(ascending):
        before = found[ascending[place - 1]][2] if place else 0
        found[row] = (*found[row][:2], min(1, max(before, found[row][2] * (len(found) - place))))
    return found


def test_every_accuracy_is_in_the_text():
    assert TABLES.keys() == {file.stem for file in (ROOT / "benchmarks/results").glob("accuracy-*.json")}


@pytest.mark.parametrize("name", TABLES)
def test_each_table_matches_its_result(name):
    """Means, deviations, intervals, p after Holm's correction, and the sentence below."""
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in TABLES[name].splitlines() if line.startswith("|")
    ]
    holding = []
    for title, (metric, digits) in METRICS.items():
        if title not in head:
            continue
        column, values, differences = head.index(title), last(name, metric), compared(name, metric)
        for line in lines:
            runs = np.array([*values[line[0]].values()])
            if not len(runs):
                continue
            assert int(line[head.index("n")]) == len(runs)
            assert line[column] == f"{runs.mean():.{digits}f} ± {runs.std(ddof=1):.{digits}f}"
            if line[0] in differences:
                mean, half, p = differences[line[0]]
                low, high = mean - half, mean + half
                assert line[column + 1] == (f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}; {p:.2g})")
        rows = [f"{row} ({mean:+.{digits}f})" for row, (mean, _, p) in differences.items() if p < 0.05]
        holding.append(f"{title.split(',')[0]}: {', '.join(rows) or 'none'}")
    assert f"within the table. {'; '.join(holding)}." in TABLES[name]


def test_the_evidence_is_what_its_results_say():
    for page in evidence.PAGES:
        assert evidence.with_evidence(page.read_text(), evidence.load()) == page.read_text()
    names = evidence.MODELS.keys() | evidence.FIGURES.keys() | {"answer"}
    assert set(re.findall(r"<!-- evidence: (\w+) -->", TEXT)) == names


def test_the_runs_are_the_plans():
    """Rows and seeds of PLAN.md's table: LUMix without its parts only for the ResNet, on 15 of its 30 seeds."""
    rows, parts = ["no mixing", "CutMix", "LUMix"], [f"LUMix without {part}" for part in ("λ_r", "λ_s", "R")]
    for model, names, seeds in (("resnet", rows + parts, 30), ("vit", rows, 20)):
        args = ablations.parse_args([*shlex.split(evidence.MODELS[model]), "--data", "x", "--out", "x"])
        assert {row.name: row.max_seeds for row in ablations.wanted(args)} == {
            name: 15 if name in parts else None for name in names
        }
        assert (args.seeds, args.first_seed) == (seeds, 100)


def test_the_plans_comparisons():
    """Primary and regime without correction; Holm over the secondary ones: two for LUMix, three for each part."""
    rng = np.random.default_rng(0)
    values = {
        name: rng.normal(size=(seeds, 3))
        for name, seeds in (("no mixing", 6), ("CutMix", 6), ("LUMix", 6), ("LUMix without R", 4))
    }
    rows = [
        dict(name=name, runs=[dict(seed=s, top1=[0, a], nll=[0, b], ece=[0, c]) for s, (a, b, c) in enumerate(v)])
        for name, v in values.items()
    ]
    primary, regime, *secondary = evidence.compare(dict(rows=rows))
    for one, (row, reference) in ((primary, ("LUMix", "CutMix")), (regime, ("CutMix", "no mixing"))):
        test = stats.ttest_rel(values[row][:, 0], values[reference][:, 0])
        assert one.difference.mean == pytest.approx((values[row] - values[reference])[:, 0].mean())
        assert one.difference.interval == pytest.approx(test.confidence_interval())
        assert one.p == pytest.approx(test.pvalue)
    raw = [stats.ttest_rel(values["LUMix"][:, k], values["CutMix"][:, k]).pvalue for k in (1, 2)]
    raw += [stats.ttest_rel(values["LUMix without R"][:, k], values["LUMix"][:4, k]).pvalue for k in range(3)]
    order = np.argsort(raw)
    corrected = np.minimum(1, np.maximum.accumulate(np.take(raw, order) * np.arange(5, 0, -1)))
    assert [secondary[place].p for place in order] == pytest.approx(corrected)


def test_the_paragraph_on_the_evidence():
    """Each statement below the answer: an interval without 0 where a difference is claimed, with 0 where none is."""
    intervals = {
        (model, c.row, c.reference, c.metric): c.difference.interval
        for model, result in evidence.load().items()
        for c in evidence.compare(result)
    }
    for model in ("resnet", "vit"):
        assert intervals[model, "CutMix", "no mixing", "top1"][0] > 0  # "CutMix helps both models"
        assert intervals[model, "LUMix", "CutMix", "ece"][1] < 0
    low, high = intervals["resnet", "LUMix", "CutMix", "top1"]
    assert low < 0 < high
    assert intervals["vit", "LUMix", "CutMix", "top1"][1] < 0 < intervals["vit", "LUMix", "CutMix", "nll"][0]
    ece = last("evidence-resnet", "ece")
    for part in ("λ_r", "R"):
        pairs = [(value, ece["CutMix"][seed]) for seed, value in ece[f"LUMix without {part}"].items()]
        assert np.mean(np.subtract(*np.transpose(pairs))) > 0  # "without either, ECE is above CutMix'"
    assert intervals["resnet", "LUMix without λ_r", "LUMix", "top1"][0] > 0
    assert intervals["resnet", "LUMix without λ_r", "LUMix", "nll"][1] < 0
