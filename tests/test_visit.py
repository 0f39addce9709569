"""The visit to a GPU host continues whatever a step does, writes results as it goes, and compares correctly."""

import argparse
import ast
import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import cost, gpu, harness, loaders, loss, mix, probe, tune
from benchmarks import data as generated
from benchmarks.gpu import Step
from pipelines import train

SLEEPER = "import os, time; open({!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"


def lines_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def alive(pid):
    with contextlib.suppress(OSError):  # a zombie has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_visit_continues_whatever_a_step_does(tmp_path, monkeypatch, capsys):
    """One step succeeds, one fails, one hangs and ignores Ctrl-C, one lacks a module; each line is written at once."""
    out, pids, seen = tmp_path / "out", tmp_path / "pids", []
    sleep = SLEEPER.format(str(pids))
    stubborn = (
        "import signal, subprocess, sys; signal.signal(2, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {sleep!r}])"
    )

    def steps(args, scratch):
        yield Step("environment", ["timeit", "-n1", "-r1", "print('{\"gpu\": null}')"])
        yield Step("mix", ["timeit", "-n1", "-r1", "raise ValueError('broken')"])
        seen.extend(lines_of(out))
        (out / ".mix.json.partial").touch()  # a benchmark was stopped while writing
        yield Step("loss", ["timeit", "-n1", "-r1", "-s", stubborn, sleep])
        yield Step("tune", ["timeit"], needs=(("no_such_module", "a remedy"),))
        yield Step("training lumix 0", ["timeit"], skip="no --cifar")
        yield Step("tests", ["timeit", "-n1", "-r1", "pass"])

    monkeypatch.setattr(gpu, "steps", steps)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "SHARES", dict.fromkeys(gpu.SHARES, 1.0))
    argv = ["--out", str(out), "--minutes", "0.15", "--device", "cpu", "--only", "environment,mix,loss,tune,tests"]
    assert gpu.main(argv) == 1
    found = {line["step"]: line for line in lines_of(out)}
    assert {name: line["status"] for name, line in found.items()} == {
        "environment": "ok",
        "mix": "failed",
        "loss": "stopped at its limit",
        "tune": "skipped",
        "tests": "ok",
    } | {name: line["status"] for name, line in found.items() if name == "images"}
    assert found["mix"]["reason"].endswith("ValueError: broken")
    assert found["tune"]["reason"] == "no module no_such_module: a remedy"
    assert [line["step"] for line in seen] == ["environment", "mix"]
    assert "broken" in (out / "log.txt").read_text()
    assert sorted(os.listdir(out)) == ["log.txt", "results.jsonl"]
    assert len(pids.read_text().split()) == 2
    assert not any(map(alive, pids.read_text().split()))
    assert "stopped at its limit" in capsys.readouterr().out


class Parsed(Exception):
    """A command line was accepted."""


PROGRAMS = {
    "benchmarks.probe": probe,
    "benchmarks.data": generated,
    "benchmarks.mix": mix,
    "benchmarks.loss": loss,
    "benchmarks.tune": tune,
    "benchmarks.loaders": loaders,
    "benchmarks.cost": cost,
    "pipelines.train": train,
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_is_a_command_line_that_its_program_accepts(tmp_path, monkeypatch, device):
    """And at most 8 files in total."""
    for folder in ("images", "cifar/train", "cifar/test"):
        (tmp_path / folder).mkdir(parents=True)
    argv = ["--out", str(tmp_path), "--device", device, "--seeds", "2"]
    monkeypatch.setattr(gpu.Path, "iterdir", lambda self: iter(()))  # a stand-in for an empty folder
    args = gpu.parse_args([*argv, "--images", str(tmp_path / "images"), "--cifar", str(tmp_path / "cifar")])
    chosen = {"num_threads": 3, "decoder": {"hw_decoder_load": 0.12}}
    (tmp_path / "tune.json").write_text(json.dumps({"chosen": chosen}))
    parse = argparse.ArgumentParser.parse_args
    found = []

    def parsed(self, *args):
        found.append(parse(self, *args))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    steps = list(gpu.steps(args, tmp_path / "scratch"))
    for step in steps:
        if step.argv[0] != "pytest":
            with pytest.raises(Parsed):
                PROGRAMS[step.argv[0]].main(step.argv[1:])
    assert {step.name.partition(" ")[0] for step in steps} == set(gpu.SHARES)
    files = {step.result for step in steps if step.result and step.result.parent == tmp_path}
    assert len(files) + len(["results.jsonl", "log.txt"]) <= 8
    (given,) = (each for each in found if getattr(each, "only", None))
    assert (given.threads, given.decoder) == ([3], {"hw_decoder_load": 0.12})
    files = [arg for step in steps for arg in step.argv if arg.startswith("tests/")]
    assert len(files) == len(set(files)) == sum(map(len, gpu.TESTS.values()))
    assert all((harness.ROOT / file).is_file() for file in files)


def runs_on_a_gpu(path):
    """Whether a file has tests that ``-m gpu`` selects: marked ones, or ones with a fixture for both backends."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            given = {arg.arg for arg in node.args.args} - set(re.findall(r"\w+", decorators))
            fixtures = given & {"device", "graph"} if re.match("test_|make|where", node.name) else ()
            if fixtures or "mark.gpu" in decorators:
                return True
    return False


def test_every_test_that_needs_a_gpu_is_part_of_the_visit():
    """Operators come first and in their own process: everything else depends on what they pass to DALI."""
    found = {
        path.stem.removeprefix("test_") for path in (harness.ROOT / "tests").glob("test_*.py") if runs_on_a_gpu(path)
    }
    assert found == {name for names in gpu.TESTS.values() for name in names}
    assert list(gpu.TESTS) == ["operators", "decoding"]
    assert gpu.TESTS["operators"][:2] == ("fn", "augment")
    argv = gpu.tests("operators", "").argv
    assert argv[argv.index("-m") + 1] == "gpu and not slow"


def test_the_tests_take_a_third_of_eight_minutes(tmp_path, monkeypatch):
    """Eight of a command's ten minutes; the order is environment, tests, loaders and mixing, cost, loss, training."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    args = gpu.parse_args(["--out", str(tmp_path / "out")])
    assert args.minutes == 8
    assert sum(gpu.SHARES.values()) == 100
    assert gpu.SHARES["tests"] >= 33
    steps = [step.name for step in gpu.steps(args, tmp_path)]
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name in steps))
    assert (
        kinds
        == list(gpu.SHARES)
        == [
            "environment",
            "tests",
            "images",
            "tune",
            "loaders",
            "mix",
            "cost-deit",
            "cost-resnet50",
            "loss",
            "training",
        ]
    )
    assert sum(gpu.share(name, args.only, args.seeds) for name in steps) == pytest.approx(100)
    assert gpu.share("mix", ["loss"], 1) == 0


def test_a_crash_and_a_decoder_on_the_cpu_are_in_the_visits_table(tmp_path):
    crash = Step("mix", ["timeit", "-n1", "-r1", "import os; os.kill(os.getpid(), 11)"])
    line = gpu.run(crash, 60, tmp_path / "log.txt")
    assert (line["status"], line["reason"].partition(":")[0]) == ("failed", "killed by SIGSEGV")
    said = json.dumps({"warnings": ["the CPU decoded"]})
    line = gpu.run(Step("environment", ["timeit", "-n1", "-r1", f"print({said!r})"]), 60, tmp_path / "log.txt")
    assert (line["status"], line["reason"]) == ("ok", "WARNING: the CPU decoded")


def test_results_are_read_whatever_is_in_them(tmp_path):
    """Rows with and without an error, and misleading output."""
    result = tmp_path / "tune.json"
    result.write_text(json.dumps(dict(complete=True, rows=[dict(name="a"), dict(name="b", error="E: c")])))
    assert gpu.found(Step("tune", [""], result), "") == dict(file="tune.json", complete=True, errors={"b": "E: c"})
    argv = ["timeit", "-n1", "-r1", "print('{broken')"]
    line = gpu.run(Step("environment", argv), 60, tmp_path / "log.txt")
    assert (line["status"], line["reason"].partition(": ")[0]) == ("failed", "its result cannot be read")


def test_training_without_cifar_compares_nothing(tmp_path, monkeypatch):
    """Generated images are still trained on, but are also the validation set."""
    monkeypatch.setattr(gpu, "SHARES", dict.fromkeys(gpu.SHARES, 1.0))
    monkeypatch.setattr(gpu, "run", lambda step, *_: dict(step=step.name, status="ok", result=dict(top1=50.0)))
    (tmp_path / "cifar/train").mkdir(parents=True)
    for options, compared in (([], False), (["--cifar", str(tmp_path / "cifar")], True)):
        out = tmp_path / f"out {compared}"
        gpu.main(["--out", str(out), "--device", "cpu", *options])
        assert ("training, paired" in [line["step"] for line in lines_of(out)]) == compared
    args = gpu.parse_args(["--out", str(tmp_path / "new"), "--device", "cpu"])
    (tmp_path / "images").mkdir()
    argv = gpu.training(args, "lumix", 0, tmp_path / "images", tmp_path).argv
    for flag, value in (("--data-dir", str(tmp_path)), ("--train-split", "images"), ("--val-split", "images")):
        assert argv[argv.index(flag) + 1] == value
    assert gpu.training(args, "lumix", 0, tmp_path / "none", tmp_path).reason() == "there are no images"


def test_trainings_are_compared_over_the_seeds_that_both_finished():
    runs = [
        ("cutmix 0", "ok", 80.0),
        ("lumix 0", "ok", 81.0),
        ("cutmix 1", "ok", 70.0),
        ("lumix 1", "ok", 73.0),
        ("cutmix 2", "ok", 99.0),
        ("lumix 2", "stopped at its limit", 0.0),
        ("lumix 3", "ok", 9.0),
    ]
    lines = [dict(step=f"training {name}", status=status, result=dict(top1=top1)) for name, status, top1 in runs]
    found = gpu.paired(lines)
    assert (found["n"], found["difference"]["values"], found["difference"]["mean"]) == (2, [1.0, 3.0], 2.0)
    assert found["cutmix"]["mean"] == 75.0
    assert found["difference"]["deviation"] == pytest.approx(2**0.5)
    assert gpu.paired(lines[:1]) == {}


def test_outcomes_of_the_tests_are_read_from_the_output():
    output = (
        "collecting ... collected 30 items / 24 deselected / 6 selected\n\n"
        "tests/test_a.py::test_b[cpu-a b] PASSED [ 50%]\ntests/test_a.py::test_c FAILED [ 60%]\n"
        "tests/test_a.py::test_d SKIPPED (no triton) [ 70%]\nE   PASSED\ntests/test_a.py::test_e "
        "\n=== short test summary info ===\nERROR tests/test_f.py - ModuleNotFoundError: 'x'\n"
        "ERROR tests/test_a.py::test_g - of a fixture\n"
    )
    assert gpu.found(Step("tests", ["pytest"]), "collecting ... collected 2 items\n")["selected"] == 2
    assert gpu.found(Step("tests", ["pytest"]), output) == {
        "selected": 6,
        "passed": 1,
        "failed": ["tests/test_a.py::test_c"],
        "error": ["tests/test_f.py"],
        "skipped": ["tests/test_a.py::test_d"],
    }


@pytest.mark.parametrize("blend", mix.BLENDS)
def test_every_blend_is_mixup(blend):
    """Normalised, within a grey level of the float64 blend with the drawn weight and partner."""
    images = torch.randint(256, (8, 12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, weight, partner = (
        torch.from_dlpack(output.as_tensor()).double().numpy()
        for output in mix.build(mix.stages()[f"blend: {blend.__name__}"], images, 1).run()
    )
    w = weight.reshape(-1, 1, 1, 1)
    expected = images.numpy() * (1 - w) + images.numpy()[partner.astype(int)] * w
    levels = 255 * (found.transpose(0, 2, 3, 1) * mix.STD + mix.MEAN)
    assert np.abs(levels - expected).max() < 1.01
    assert 0.05 < weight.max() < 1


def test_kernels_are_summed_by_name():
    events = [
        {"cat": "kernel", "name": "a", "dur": 3.0},
        {"cat": "kernel", "name": "a", "dur": 5.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "dur": 2.0},
        {"cat": "cpu_op", "name": "c", "dur": 100.0},
    ]
    assert mix.summed(events, 2) == {
        "kernel_us": 5.0,
        "launches": 1.5,
        "copies": {"HtoD": 0.5},
        "longest": {"a": 4.0, "Memcpy HtoD (Pinned -> Device)": 1.0},
    }


def test_the_paste_by_itself_is_a_box_of_the_partners():
    """A quarter of the image, so that its cost is comparable with CutMix's paste."""
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).repeat(1, 8, 8, 3)
    found, _ = (np.array(output.as_array()) for output in mix.build(mix.stages(8)["paste"], images, 1).run())
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    for own, image in enumerate(found[..., 0]):
        assert (image[~inside] == own).all()
        assert len(set(image[inside])) == 1
        assert image[inside][0] != own


def test_the_probe_decodes_what_the_pipelines_decode():
    """Evaluation's centre crop to the pixel; in training the same crops in every run, to compare two devices."""
    images = probe.photographs(3)
    files = probe.jpegs(images, subsampling=2)
    wanted = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    (centres,) = probe.decoder(files, None, 3, "evaluation").run()
    for found, image in zip(centres, wanted, strict=True):
        side = min(image.shape[:2]) * 7 // 8
        top, left = ((length - side) // 2 for length in image.shape[:2])
        np.testing.assert_array_equal(found, image[top : top + side, left : left + side])
    (crops,), (again,) = (probe.decoder(files, None, 3).run() for _ in range(2))
    for found, same, image in zip(crops, again, wanted, strict=True):
        np.testing.assert_array_equal(found, same)
        area, ratio = np.prod(found.shape()[:2]) / np.prod(image.shape[:2]), found.shape()[1] / found.shape()[0]
        assert 0.07 < area < 1
        assert 0.72 < ratio < 1.36


PIXELS = {"training 4:2:0": dict(most=0), "training 4:2:0 fancy": dict(most=9), "evaluation 4:4:4": dict(most=3)}


@pytest.mark.parametrize(
    ("device", "ran"),
    [
        ("cpu", {"training 4:2:0": "cpu", "evaluation 4:4:4": "cpu"}),
        ("cuda:0", {"training 4:2:0": "cpu", "evaluation 4:4:4": "gpu"}),
    ],
)
def test_the_decoder_that_ran_is_identified_by_its_pixels(monkeypatch, device, ran):
    monkeypatch.setattr(probe, "loaded", lambda library: [f"/usr/lib/{library}"])

    def version(name):
        if name != "nvidia-nvimgcodec-cu13":
            raise probe.importlib.metadata.PackageNotFoundError(name)
        return "0.9.0.20"

    monkeypatch.setattr(probe.importlib.metadata, "version", version)
    found = probe.decoder_found(PIXELS, device)
    assert found == dict(nvimgcodec=["nvidia-nvimgcodec-cu13 0.9.0.20"], libnvjpeg=["/usr/lib/libnvjpeg.so"], ran=ran)


def speeds(cpu, *gpu):
    return {"cpu": dict(images_per_second=cpu)} | {
        f"hw_decoder_load={number}": dict(images_per_second=speed) for number, speed in enumerate(gpu)
    }


@pytest.mark.parametrize(
    ("ran", "libraries", "rates", "said"),
    [
        ({"a": "gpu", "b": "gpu"}, ["libnvjpeg.so.12"], speeds(1000.0, 1000.0, 9000.0), []),
        ({"a": "gpu", "b": "cpu"}, ["libnvjpeg.so.12"], speeds(1000.0, 9000.0), ["THE CPU DECODED, NOT THE GPU: b"]),
        ({"a": "gpu"}, [], speeds(1000.0, 9000.0), ["libnvjpeg is not loaded: install nvidia-nvjpeg-cu12"]),
        (
            {"a": "gpu"},
            ["libnvjpeg.so.12"],
            speeds(1000.0, 800.0, 1100.0),
            ["the mixed decoder reaches 1100 images/s, the CPU's 1000"],
        ),
    ],
    ids=["all is well", "on the CPU", "no library", "no faster"],
)
def test_a_decoder_that_is_not_the_gpus_is_named(ran, libraries, rates, said):
    found = probe.warnings(dict(decoder=dict(ran=ran, libnvjpeg=libraries), decoding=rates))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_the_decoder_is_reported_before_its_rates(monkeypatch, capsys):
    """The rates take longest, and a crash there must not hide that the CPU decodes."""

    def decoding(index):
        assert index == 0
        yield "cpu", dict(images_per_second=1000.0)
        yield "hw_decoder_load=0", dict(images_per_second=900.0)
        raise RuntimeError("of the decoder")

    monkeypatch.setattr(harness, "resolve_device", lambda device: "cuda:0")
    for name, value in (
        ("environment", lambda: dict(missing=[])),
        ("differences", lambda index: PIXELS),
        ("loaded", lambda library: ["libnvjpeg.so.12"]),
        ("decoding", decoding),
    ):
        monkeypatch.setattr(probe, name, value)
    with pytest.raises(RuntimeError, match="of the decoder"):
        probe.main([])
    said = [json.loads(line).get("warnings", []) for line in capsys.readouterr().out.splitlines()]
    assert [len(warnings) for warnings in said] == [0, 1, 1, 2]
    assert said[1] == ["THE CPU DECODED, NOT THE GPU: training 4:2:0 (pixels equal to the CPU decoder's)"]


def test_loaded_libraries_are_those_of_this_process():
    found = probe.loaded("libc.so") + probe.loaded("ld-")
    assert found
    assert all(Path(path).is_file() for path in found)
    assert probe.loaded("no such library") == []


def test_a_decoders_rate_is_measured_in_its_steady_state(monkeypatch):
    clock = [0.0]
    calls = []

    def run():
        calls.append(None)
        clock[0] += 5.0 if len(calls) <= 3 else 0.125

    monkeypatch.setattr(probe.time, "perf_counter", lambda: clock[0])
    assert probe.rate(run, 10) == pytest.approx(80)


def test_the_sources_digest_follows_the_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "lumix_dali").mkdir()
    (tmp_path / "lumix_dali/a.py").write_text("1")
    before = probe.digest()
    assert before == probe.digest()
    (tmp_path / "lumix_dali/a.py").write_text("2")
    assert probe.digest() != before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("a=1,b=0.5", {"a": 1, "b": 0.5}),
        ("a", None),
        ("a=b", None),
    ],
)
def test_decoder_options(text, value):
    if value is None:
        with pytest.raises(argparse.ArgumentTypeError, match="give NAME=NUMBER"):
            harness.options(text)
    else:
        assert harness.options(text) == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in tune.DECODER_KNOBS.items() for value in values]
)
def test_tuned_values_reach_the_decoder(name, value):
    """0 is a valid value; a default is left to DALI."""
    default = value == tune.DECODER_KNOBS[name][0]
    found = tune.arguments(dict(num_threads=2, **{name: value}))
    assert found == (dict(num_threads=2) if default else dict(num_threads=2, decoder={name: value}))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "mixx"], "--only mixx: no such step; give some of environment"),
        (["--minutes", "0"], "--minutes 0: give a number above 0"),
        (["--cifar", "nowhere"], "--cifar: no such folder: nowhere/train"),
    ],
)
def test_an_invalid_visit_is_named(tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out"), *argv])
    assert message in capsys.readouterr().err


def test_results_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("{}")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "not an empty folder; give another" in capsys.readouterr().err
    assert (tmp_path / "results.jsonl").read_text() == "{}"
    assert os.listdir(tmp_path) == ["results.jsonl"]
