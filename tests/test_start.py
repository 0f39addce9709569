"""`benchmarks.start` on a few samples: its sources hold what their names say, and its result becomes a table."""

import json

import pytest

from benchmarks import plot, start
from lumix_dali.data import sources


def test_every_source_holds_what_its_name_says(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "PER_SHARD", 200)
    monkeypatch.setattr(start, "LINKS", 700)
    made = start.prepare(tmp_path, 2500, 600)
    lengths = {name: len(sources.load(path)) for name, kind, path in made if kind not in ("shards", "pairs")}
    assert lengths == {"few files": 1000, "folder": 2500, "list file": 2500, "manifest": 2500}
    labels = [sources.load(path).labels.tolist() for _, kind, path in made[1:4]]
    assert labels[0] == labels[1] == labels[2] == sorted(i % 1000 for i in range(2500))
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3
    shard = sources.load(tmp_path / "shards" / "000002.tar")
    assert shard.read([0, 199])[1].tolist() == [0, 199]


@pytest.mark.slow
def test_the_result_becomes_a_table(tmp_path, capsys):
    out = tmp_path / "start.json"
    start.main(["--out", str(out), "--files", "1200", "--index", "20000", "--rounds", "1", "--folder", str(tmp_path)])
    result = json.loads(out.read_text())
    assert [row["samples"] for row in result["rows"]] == [1000, 1200, 1200, 1200, 1200, 20_000, 20_000]
    assert all(0 < row["open"] < row["first"] for row in result["rows"])
    assert result["rows"][0]["held"] == 0
    printed = capsys.readouterr().out
    assert "One round is a smoke test" in printed
    assert "tar shards, again" in printed
    assert "| tar shards, again | 20,000 |" in plot.table(result)
    plot.make_figure(result, "sha256:0", tmp_path / "start.svg")
    assert "first batch" in (tmp_path / "start.svg").read_text()
