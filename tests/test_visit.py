"""The visit to a GPU host continues whatever a step does, and writes results as it goes."""

import argparse
import contextlib
import importlib
import json
import os
from pathlib import Path

import pytest

from benchmarks import gpu, harness
from benchmarks.gpu import Step

SLEEPER = "import os, time; open({!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"


def lines_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def alive(pid):
    with contextlib.suppress(OSError):  # a zombie has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def program(*lines):
    """A step's arguments that run `lines`; `timeit` is a module that runs a program given as text."""
    return ["timeit", "-n1", "-r1", "; ".join(lines)]


def test_a_visit_continues_whatever_a_step_does(tmp_path, monkeypatch, capsys):
    """Steps succeed, fail, crash, hang and ignore Ctrl-C, are cut with half a file, and lack a module."""
    out, pids, seen = tmp_path / "out", tmp_path / "pids", []
    sleep = SLEEPER.format(str(pids))
    stubborn = (
        "import signal, subprocess, sys; signal.signal(2, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {sleep!r}])"
    )
    half, kept = out / "tune.json", out / "loaders.json"
    partial = {"complete": False, "rows": [{"name": "a", "values": [1.0]}]}  # neither chosen nor error

    def steps(args, scratch):
        yield Step("environment", program("print('{\"gpu\": null}')"))
        yield Step("mix", program("raise ValueError('broken')"))
        seen.extend(lines_of(out))
        yield Step(
            "decode-whole", program("print('{\"pixels\": 1}', flush=True)", "import os", "os.kill(os.getpid(), 11)")
        )
        yield Step(
            "tune", program(f"open({str(half)!r}, 'w').write('{{\"rows\": [')", "import time", "time.sleep(60)"), half
        )
        write = f"import json; json.dump({partial!r}, open({str(kept)!r}, 'w'))"
        yield Step("loaders", program(write, "import time", "time.sleep(60)"), kept)
        (out / ".part-mix").touch()  # a benchmark was stopped while writing
        yield Step("loss", ["timeit", "-n1", "-r1", "-s", stubborn, sleep])
        yield Step("decode-old", ["timeit"], needs=(("no_such_module", "a remedy"),))
        yield Step("tests", program("pass"))

    names = ["environment", "mix", "decode-whole", "tune", "loaders", "loss", "decode-old", "tests"]
    monkeypatch.setattr(gpu, "steps", steps)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "SHARES", dict.fromkeys(names, 1.0))
    argv = ["--out", str(out), "--minutes", "0.2", "--device", "cpu", "--only", ",".join(names)]
    assert gpu.main(argv) == 1
    found = {line["step"]: line for line in lines_of(out)}
    assert {name: line["status"] for name, line in found.items()} == {
        "environment": "ok",
        "mix": "failed",
        "decode-whole": "failed",
        "tune": "failed",
        "loaders": "stopped at its limit",
        "loss": "stopped at its limit",
        "decode-old": "skipped",
        "tests": "ok",
    }
    assert found["mix"]["reason"].endswith("ValueError: broken")
    assert found["decode-whole"]["reason"].startswith("killed by SIGSEGV")
    assert found["decode-whole"]["result"] == {"pixels": 1}
    assert found["loaders"]["result"] == {"file": "loaders.json", "complete": False, "errors": {}}
    assert found["decode-old"]["reason"] == "no module no_such_module: a remedy"
    assert [line["step"] for line in seen] == ["environment", "mix"]
    assert sorted(os.listdir(out)) == ["loaders.json", "log.txt", "results.jsonl", "tune.json"]
    assert len(pids.read_text().split()) == 2
    assert not any(map(alive, pids.read_text().split()))
    assert "stopped at its limit" in capsys.readouterr().out


class Parsed(Exception):
    """A command line was accepted."""


@pytest.mark.parametrize("where", ["cpu", "cuda:0"])
@pytest.mark.parametrize("images", [True, False])
def test_every_step_is_a_command_line_that_its_program_accepts(tmp_path, monkeypatch, where, images):
    """Whether or not another step left images; and at most 8 files come back."""
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(harness, "resolve_device", lambda name: name)
    args = gpu.parse_args(["--out", str(tmp_path / "out"), "--device", where, "--old-dali", str(tmp_path / "old")])
    if images:
        (tmp_path / "images").mkdir()
    parse = argparse.ArgumentParser.parse_args
    accepted = []

    def parsed(self, *given):
        accepted.append(parse(self, *given))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    steps = list(gpu.steps(args, tmp_path))
    for step in steps:
        if step.argv[0] != "pytest":
            with pytest.raises(Parsed):
                importlib.import_module(step.argv[0]).main(step.argv[1:])
    assert list(dict.fromkeys(step.name.partition(" ")[0] for step in steps)) == list(gpu.SHARES)
    files = {step.result for step in steps if step.result and step.result.parent == args.out}
    assert len(files) + len(["results.jsonl", "log.txt"]) <= 8
    loaders = next(each for each in accepted if getattr(each, "workers", 0) is None)
    assert len(loaders.threads) == 1
    old = next(step for step in steps if step.name == "decode-old")
    assert old.variables["PYTHONPATH"].startswith(str(tmp_path / "old"))


def test_the_tests_of_the_visit_exist():
    for file, names in gpu.TESTS.items():
        text = (harness.ROOT / f"tests/test_{file}.py").read_text()
        for name in names:
            assert f"def {name}(" in text
