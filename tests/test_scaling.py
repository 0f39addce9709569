"""The model of many ranks against closed forms: constant stages, and exponential stages without prefetching."""

import json

import numpy as np
import pytest
from scipy.special import lambertw

from benchmarks import plot, scaling

CORE = {"decode": 200.0, "read": 5000.0, "kilobytes": 100.0}


def args(*more):
    return scaling.parse_args(["--out", "unused", "--spread", "0", *more])


@pytest.mark.parametrize(("ranks", "loader"), [(1, 300.0), (8, 300.0), (1000, 300.0), (7, 900.0)])
def test_constant_times_are_the_slower_of_loader_and_gpu(ranks, loader):
    assert scaling.simulate(loader, 500.0, ranks) == pytest.approx(min(loader, 500.0), rel=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 16, 200])
def test_the_slowest_of_n_exponential_times(ranks):
    """Without prefetching a step takes as long as the slowest of N: H_N times the mean."""
    harmonic = sum(1 / k for k in range(1, ranks + 1))
    found = scaling.simulate(300.0, 1e12, ranks, spread=1.0, ahead=1, steps=20_000)
    assert found == pytest.approx(300 / harmonic, rel=0.02)


def test_an_exponential_loader_and_a_constant_gpu():
    """E[max(T, S)] = T + μ·exp(-T/μ)."""
    mean, step = 128 / 600, 128 / 500
    found = scaling.simulate(600.0, 500.0, 1, spread=1.0, ahead=1, steps=40_000)
    assert found == pytest.approx(128 / (step + mean * np.exp(-step / mean)), rel=0.02)


def test_headroom():
    """An exponential loader feeding one GPU gives r·e^r = 99; constant times need .99 for 99 %."""
    assert scaling.headroom(1, spread=1.0, ahead=1, steps=20_000) == pytest.approx(lambertw(99).real, rel=0.03)
    assert scaling.headroom(64) == pytest.approx(0.99, abs=2e-3)
    assert scaling.headroom(1000, spread=0.2, steps=200) > scaling.headroom(8, spread=0.2, steps=200) > 1


@pytest.mark.parametrize(
    ("ranks", "flags", "expected", "bound"),
    [
        (16, ["--cores-per-gpu", "4"], 800, "decode"),  # 4 cores at 200 images/s
        (16, ["--files", "8000"], 500, "read"),  # a 16th of 8000 files/s
        (16, ["--link", "4"], 625, "network"),  # 4 Gbit/s are 5000 images/s of 100 kB, over 8 GPUs
        (1000, ["--store", "80"], 100, "network"),  # 100 000 images/s, over 1000 GPUs
        (8, ["--gpu-rate", "900"], 900, "GPU"),
    ],
)
def test_what_bounds_a_job(ranks, flags, expected, bound, monkeypatch):
    monkeypatch.setattr(scaling, "RANKS", (ranks,))
    local, shared = scaling.rows(CORE, args(*flags))
    assert (shared["median"], shared["bound"]) == (pytest.approx(expected), bound)
    assert local["bound"] in ("decode", "GPU")


def test_what_a_job_needs():
    """1000 GPUs at 7000 images/s of 100 kB: 5600 Gbit/s, and 35 cores each."""
    found = scaling.rows(CORE, args())
    local, row = (each for each in found if each["ranks"] == 1000)
    assert local["gbit_needed"] == 0
    assert row["gbit_needed"] == pytest.approx(5600)
    assert row["cores_needed"] == pytest.approx(35_000)


def loaders(tmp_path, **changes):
    rows = [
        {"name": "dali/read", "median": 9000.0, "threads": 2},
        {"name": "lumix/cutmix+mixup elem", "median": 420.0, "threads": 2},
        {"name": "ffcv", "median": None, "error": "ImportError"},
    ]
    result = {
        "kind": "loaders",
        "settings": {"device": "cpu", "mean_kb": 110.0},
        "rows": rows,
        "meta": {"machine": {"cpu": "a CPU"}, "commit": "abc", "date": "2026-01-01T00:00:00"},
    } | changes
    (tmp_path / "loaders.json").write_text(json.dumps(result))
    return tmp_path / "loaders.json"


def test_rates_come_from_the_result(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    scaling.main(["--out", str(out), "--results", str(loaders(tmp_path)), "--spread", "0"])
    result = json.loads(out.read_text())
    assert result["measured"]["decode"] == 210
    assert result["measured"]["read"] == 4500
    first = result["rows"][0]
    assert (first["name"], first["ranks"], first["bound"]) == ("a copy on each node", 1, "decode")
    assert first["median"] == pytest.approx(16 * 210)
    assert "at 1000 they get 6%, bound by network." in capsys.readouterr().out
    text = plot.table(result)
    assert "| one store | 1000 | 455 | 455 | 6% | network | 0.99 | 33,333 | 6,160.0 |" in text
    assert "measured: 210 images/s and 4500 files/s a core of a CPU (2 threads), 110.0 kB a file" in text
    plot.make_figure(result, "sha256:0", tmp_path / "scaling.svg")
    assert "what it takes" in (tmp_path / "scaling.svg").read_text()
