"""The benchmarks measure what they claim: a known delay is found in any order and with any queue."""

import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("PIL")
torch = pytest.importorskip("torch")
from PIL import Image, JpegImagePlugin  # noqa: E402

from benchmarks import contenders, data, harness  # noqa: E402
from benchmarks.harness import Candidate, compare, throughput  # noqa: E402

RECIPES = ("none", "cutmix", "lumix")


class Clock:
    """A clock that only the tests advance: a busy machine does not change the measurement."""

    now = busy = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def work(self, seconds, threads=1):
        self.now += seconds
        self.busy += threads * seconds

    def process_time(self):
        self.busy += 1e-9
        return self.busy

    def perf_counter(self):
        self.now += 1e-9  # no call takes zero time
        return self.now


clock = Clock()


@pytest.fixture(autouse=True)
def _our_time(monkeypatch):
    monkeypatch.setattr(harness, "time", clock)


class Delayed:
    """A loader that takes `delay` seconds per batch and prefetches nothing."""

    def __init__(self, delay, length):
        self.delay, self.length = delay, length

    def __iter__(self):
        for _ in range(self.length):
            clock.sleep(self.delay)
            yield "batch"


class Prefetching:
    """A loader whose worker makes a batch in `delay` seconds and continues, even when idle, until `depth` are ready."""

    def __init__(self, delay, depth, length):
        self.delay, self.depth, self.length = delay, depth, length
        self.put, self.taken = [clock.now], []  # when the worker could queue each batch, and when it was taken

    def __iter__(self):
        for _ in range(self.length):
            number = len(self.taken)
            free = self.taken[number - self.depth] if number >= self.depth else 0.0
            self.put.append(max(self.put[-1] + self.delay, free))
            clock.now = max(clock.now, self.put[-1])
            self.taken.append(clock.now)
            yield "batch"


def run(candidates, out, **options):
    return compare(candidates, kind="loaders", unit="images/s", command="none", out=out, **options)


# --- harness


def test_a_known_delay_measures_as_that_delay():
    speed = throughput(Delayed(0.02, 9), batch_size=4, timed=8, ahead=0)
    assert speed == pytest.approx(200, rel=1e-3)


def test_a_queue_refilled_while_idle_earns_no_credit():
    loader = Prefetching(0.03, depth=4, length=17)
    clock.sleep(0.3)  # others have their turns
    fooled = throughput(loader, batch_size=1, timed=4, ahead=0)
    clock.sleep(0.3)
    speed = throughput(loader, batch_size=1, timed=6, ahead=5)
    assert speed == pytest.approx(1 / 0.03, rel=1e-3)
    assert fooled > 2 / 0.03  # this test would catch it


def test_cpu_time_counts_all_threads_and_no_waiting():
    def step():
        clock.sleep(0.5)
        clock.work(0.01, threads=3)

    assert harness.cpu_milliseconds(step, 4, "cpu") == pytest.approx(30, rel=1e-3)


def test_candidates_take_turns_and_the_first_round_is_not_counted(tmp_path):
    turns, values = [], {"a": iter((100.0, 1, 2, 3)), "b": iter((100.0, 2, 8, 6))}

    def candidate(name):
        return Candidate(name, lambda: turns.append(name) or next(values[name]), lambda: {"workers": 2})

    result = run([candidate("a"), candidate("b")], tmp_path / "x.json", rounds=3, references=["a"])
    a, b = result["rows"]
    assert turns == ["a", "b"] * 4
    assert (a["values"], a["median"], a["quartiles"], a["workers"]) == ([1, 2, 3], 2, [1.5, 2.5], 2)
    assert b["ratios"]["a"] == {"values": [2, 4, 2], "median": 2, "quartiles": [2, 3]}
    assert result["complete"]
    assert json.loads((tmp_path / "x.json").read_text()) == result


def test_ratios_compare_equal_conditions(tmp_path):
    candidates = [
        Candidate(name, lambda v=v * count: v, where={"count": count})
        for count in (1, 2)
        for name, v in (("a", 1.0), ("b", 3.0 * count))
    ]
    rows = run(candidates, tmp_path / "x.json", rounds=1, references=["a"])["rows"]
    assert [row["ratios"]["a"]["median"] for row in rows] == [1, 3, 1, 6]


def test_a_stage_has_its_own_cost_and_the_measured_times(tmp_path):
    """Times up to the end of a: 1, 2, 3; of b: 4, 5, 4; of c: 12, 10, 11; differences are taken round by round."""
    values = {"a": [9.0, 1, 2, 3], "b": [9.0, 4, 5, 4], "c": [9.0, 12, 10, 11]}
    left = {name: iter(found) for name, found in values.items()}

    def stage(name, after, part="model"):
        return Candidate(name, lambda: next(left[name]), where=dict(part=part), after=after)

    others = [Candidate("a", lambda: 100.0, where=dict(part="loader"))]  # the same name in another chain
    stages = [stage("a", None), stage("b", "a"), stage("c", "b")]
    result = compare([*others, *stages], kind="cost", unit="ms", command="none", out=tmp_path / "x.json", rounds=3)
    _, a, b, c = result["rows"]
    assert (a["values"], b["values"], c["values"]) == ([1, 2, 3], [3, 3, 1], [8, 5, 7])
    assert (b["median"], b["quartiles"], c["median"]) == (3, [2, 3], 7)
    assert "until" not in a
    assert c["until"] == {"values": [12, 10, 11], "median": 11, "quartiles": [10.5, 11.5]}
    assert json.loads((tmp_path / "x.json").read_text()) == result


@pytest.mark.parametrize("where", ["prepare", "first turn", "later turn"])
def test_a_failing_candidate_does_not_stop_the_run_and_keeps_its_error(where, tmp_path, capsys):
    turns = itertools.count()

    def fail(at):
        if at == where:
            raise RuntimeError("first line\nlast line")
        return {}

    def turn():
        number = next(turns)
        fail("first turn" if number == 0 else "later turn" if number == 2 else "")
        return 1.0

    rows = run(
        [Candidate("bad", turn, lambda: fail("prepare")), Candidate("good", lambda: 2.0)],
        tmp_path / "x.json",
        rounds=3,
        references=["bad"],
    )["rows"]
    assert rows[0]["error"] == "RuntimeError: last line"
    assert not rows[0]["excused"]
    assert rows[0]["values"] == ([1.0] if where == "later turn" else [])
    assert rows[1]["values"] == [2.0] * 3
    assert rows[1]["ratios"]["bad"]["median"] == (2.0 if where == "later turn" else None)


@pytest.mark.parametrize("interrupted_at", [0, 1, 3])
def test_ctrl_c_leaves_a_valid_partial_result(interrupted_at, tmp_path):
    turns = itertools.count()

    def turn():
        if next(turns) == interrupted_at:
            raise KeyboardInterrupt
        return 1.0

    result = run([Candidate("a", lambda: 5.0), Candidate("b", turn)], tmp_path / "x.json", rounds=4, references=["b"])
    assert result == json.loads((tmp_path / "x.json").read_text())
    assert not result["complete"]
    assert result["rows"][0]["values"] == [5.0] * interrupted_at
    assert result["rows"][1]["values"] == [1.0] * max(0, interrupted_at - 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_a_result_of_uncommitted_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "_clean", lambda: False)
    out, turns = tmp_path / "results" / "x.json", []
    candidate = Candidate("a", lambda: turns.append(1) or 1.0)
    with pytest.raises(ValueError, match=r"x\.json: the work tree differs .*commit first.*--allow-dirty"):
        run([candidate], out, rounds=1)
    assert not turns
    assert not out.exists()
    assert run([candidate], out, rounds=1, allow_dirty=True)["meta"]["clean"] is False
    run([candidate], tmp_path / "elsewhere.json", rounds=1)
    monkeypatch.setattr(harness, "_clean", lambda: True)
    run([candidate], out, rounds=1)


def test_results_and_figures_do_not_make_a_tree_dirty_but_code_does(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *command], cwd=tmp_path, check=True, capture_output=True
        )

    package = tmp_path / "lumix_dali" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package)))
    assert harness._clean()
    for folder in ("results", "figures"):
        (tmp_path / "benchmarks" / folder).mkdir(parents=True)
        (tmp_path / "benchmarks" / folder / "x").write_text("")
    assert harness._clean()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="/usr/lib/lumix.py"))
    assert not harness._clean()  # the code that runs differs from this commit
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package)))
    package.write_text("changed")
    assert not harness._clean()


# --- data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return data.generate(tmp_path_factory.mktemp("data") / "images", images=24, classes=4)


def test_generated_images_have_imagenets_statistics(folder):
    files = sorted(folder.rglob("*.jpg"))
    images = [Image.open(file) for file in files]
    assert len({file.parent for file in files}) == 4
    assert 85e3 < np.mean([file.stat().st_size for file in files]) < 135e3
    assert 0.17e6 < np.mean([image.width * image.height for image in images]) < 0.23e6
    samplings = [JpegImagePlugin.get_sampling(image) for image in images]
    assert (samplings.count(0), samplings.count(2)) == (18, 6)  # 4:4:4, 4:2:0


def test_generated_images_are_the_same_for_the_same_seed(folder):
    made = data.jpeg(np.random.default_rng([0, 5]), subsampled=False)
    assert made == (folder / "c0001" / "000005.jpg").read_bytes()
    assert made != data.jpeg(np.random.default_rng([1, 5]), subsampled=False)


def test_generated_images_are_made_once(folder, tmp_path):
    assert data.generate(folder, images=24, classes=4) == folder
    with pytest.raises(ValueError, match="holds a set made with"):
        data.generate(folder, images=24, classes=3)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        data.generate(tmp_path, images=1, classes=1)
    with pytest.raises(ValueError, match="--images 2: fewer than --classes 3"):
        data.generate(tmp_path / "x", images=2, classes=3)


# --- loaders


@pytest.fixture(scope="module")
def loaders():
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("torchvision")
    return importlib.import_module("benchmarks.loaders")


def quick(loaders, folder, out, *more):
    small = ["--quick", "--batch-size", "8", "--input-size", "32", "--threads", "1", "--device", "cpu"]
    loaders.main(["--data", str(folder), *small, "--out", str(out), *more])
    return json.loads(out.read_text())


def test_a_loader_runs_beside_the_ceiling(loaders, folder, tmp_path, capsys):
    result = quick(loaders, folder, tmp_path / "x.json", "--only", "lumix/cutmix+mixup elem,ffcv")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dali/+normalise", "lumix/cutmix+mixup elem", "ffcv"]
    assert rows["lumix/cutmix+mixup elem"]["ratios"]["dali/+normalise"]["median"] > 0
    assert rows["dali/+normalise"]["version"] == importlib.import_module("nvidia.dali").__version__
    said = capsys.readouterr().out
    assert "of plain DALI" in said
    assert "1 round(s): it runs, but a verdict needs 5." in said
    assert rows["ffcv"]["excused"] if rows["ffcv"]["error"] else rows["ffcv"]["median"] > 0


@pytest.mark.slow
def test_all_loaders_run_to_the_end_and_none_is_missing(loaders, folder, tmp_path):
    result = quick(loaders, folder, tmp_path / "x.json")
    assert [row["name"] for row in result["rows"]] == [entry.name for entry in contenders.ENTRIES]
    missing = {name for name, package in PEERS.items() if importlib.util.find_spec(package) is None}
    missing |= set() if has_spdl() else {"spdl"}
    assert {row["name"] for row in result["rows"] if row["error"]} == missing
    assert all(row["median"] > 0 for row in result["rows"] if not row["error"])


def has_spdl():
    try:
        import spdl.io

        spdl.io.demux_config()
    except (ImportError, RuntimeError):  # RuntimeError: no FFmpeg
        return False
    return True


COLOURS = np.array(list(itertools.product((40, 200), (30, 90, 150, 210), (60, 190))))  # one class per image


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A class folder with an image of one colour for each of `COLOURS`, in their order."""
    root = tmp_path_factory.mktemp("coloured")
    for number, colour in enumerate(COLOURS):
        (root / f"{number:02}").mkdir()
        Image.new("RGB", (72, 56), tuple(colour.tolist())).save(root / f"{number:02}" / "x.jpg", quality=95)
    return root


def opened(loaders, name, root, scratch, mixing=None, **options):
    """One epoch of the entry `name` over all images in `root`, as a list; `mixing` replaces the entry's own."""
    from benchmarks.contenders import Setting
    from lumix_dali.data.sources import load_files

    (entry,) = (entry for entry in contenders.ENTRIES if entry.name == name)
    if name in PEERS:
        pytest.importorskip(PEERS[name])
    if name == "spdl" and not has_spdl():
        pytest.skip("FFmpeg's libraries are missing")
    s = Setting(load_files(root), 4, 16, "cpu", scratch, **options)
    start = entry.open if mixing is None else partial(entry.open.func, mixing, *entry.open.args[1:])
    batches = list(start(s, 2, len(COLOURS) // 4))
    for batch in batches:
        s.check(batch)
    return batches


def rgb(images):
    """The mean colour of each normalised image, from 0 to 255."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's
    return 255 * (images.double().mean(dim=(2, 3)).numpy() * std + mean)


PEERS = {
    "lumix dynamic cutmix": "nvidia.dali.experimental.dynamic",
    "lumix tar": "webdataset",
    "webdataset": "webdataset",
    "webdataset worker batches": "webdataset",
    "litdata": "litdata",
    "mosaic streaming": "streaming",
    "ffcv": "ffcv",
}
RESAMPLED = {"webdataset", "webdataset worker batches"}  # shards are sampled with replacement
BY_TORCHVISION = ["torchvision v2 collate cutmix+mixup", "spdl", *(name for name in PEERS if "lumix" not in name)]
COMPILED = {"ffcv": pytest.mark.slow}  # Numba takes a minute


@pytest.mark.parametrize(
    "name",
    [
        "dali/+normalise",
        "lumix/none",
        "lumix tar",
        "lumix tfrecord",
        *(pytest.param(name, marks=COMPILED.get(name, ())) for name in BY_TORCHVISION),
    ],
)
def test_an_epoch_has_every_image_once_with_its_label(loaders, coloured, tmp_path, name):
    mixing = "none" if name in BY_TORCHVISION else None
    batches = opened(loaders, name, coloured, tmp_path, mixing, interpolation="bilinear")
    labels = np.concatenate([np.asarray(getattr(target, "labels", target)).reshape(-1) for _, target in batches])
    assert len(labels) == len(COLOURS)
    if name not in RESAMPLED:
        assert sorted(labels) == list(range(len(COLOURS)))
    colours = np.concatenate([rgb(images) for images, _ in batches])
    assert np.abs(colours - COLOURS[labels]).max() < 8  # rounding in JPEG and swscale; colours are 60 apart


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [
        ("dali+torchvision cutmix", 0.0),
        ("lumix/cutmix+mixup elem", 0.0),
        ("lumix dynamic cutmix", 0.0),
        ("timm FastCollateMixup elem", 0.1),
        ("timm Mixup afterwards", 0.1),
        ("torchvision v2 collate cutmix", 0.0),
        *(pytest.param(name, 0.0, marks=COMPILED.get(name, ())) for name in BY_TORCHVISION),
    ],
)
def test_mixed_images_have_the_colours_of_their_target(loaders, coloured, tmp_path, name, smoothing):
    """An image's mean colour is the weighted mean of its classes' colours, whether pasted or blended."""
    mixed = 0
    for images, target in opened(loaders, name, coloured, tmp_path):
        dense = target.dense(len(COLOURS)) if hasattr(target, "dense") else target
        dense = (dense.double().numpy() - smoothing / len(COLOURS)) / (1 - smoothing)
        assert dense.shape == (4, len(COLOURS))
        assert np.abs(dense.sum(1) - 1).max() < 1e-5
        assert np.abs(rgb(images) - dense @ COLOURS).max() < 8
        mixed += (dense.max(1) < 0.98).sum()
    assert mixed > 0


# --- cost


SMALL_COST = ["--quick", "--batch-size", "4", "--input-size", "32", "--model", "test_vit", "--device", "cpu"]


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ("cpu", {"today", "nearest neighbour"}),
        ("epoch,handover", {"build", "checkpoint", "dlpack", "copied", *(f"{r} first batch" for r in RECIPES)}),
        pytest.param("step", {f"{r} {fed}" for r in RECIPES for fed in ("replayed", "loaded")}, marks=pytest.mark.slow),
        pytest.param("tiny", {"today", "9ac746d"}, marks=pytest.mark.slow),
    ],
)
def test_parts_of_cost_run_and_are_compared(folder, tmp_path, capsys, parts, names):
    from benchmarks import cost

    out = tmp_path / "x.json"
    if parts == "tiny" and harness._run("git", "cat-file", "-e", "9ac746d") is None:
        pytest.skip("a shallow clone")
    cost.main([*SMALL_COST, "--data", str(folder), "--out", str(out), "--parts", parts])
    rows = json.loads(out.read_text())["rows"]
    assert {row["name"] for row in rows} == names
    assert [row["error"] for row in rows] == [None] * len(rows)
    if (reference := cost.COMPARED.get(parts)) in names:
        assert all(row["ratios"][reference]["values"] for row in rows)
    assert f"benchmarks.cost measures the parts {parts.replace(',', ', ')}:" in capsys.readouterr().out


# --- tune


def test_the_fastest_value_of_each_knob_is_chosen_unless_it_is_noise(monkeypatch):
    from benchmarks import tune

    seen, saved, speeds = [], [], {1: 100.0, 2: 120.0, 4: 110.0}

    def measure(values):
        seen.append(values)
        drift = 1 + len(seen)  # the machine keeps getting faster: only the comparison within rounds is valid
        return drift * (speeds[values["threads"]] + (1.0 if values["depth"] == 3 else 0.0))

    monkeypatch.setattr(tune, "GAIN", 1.1)
    values = {"threads": [1, 2, 4], "depth": [2, 3]}
    chosen, rows = tune.tune(measure, values, 10, lambda rows, chosen: saved.append(dict(chosen)))
    assert chosen == {"threads": 2, "depth": 2}  # a depth of 3 is faster, but by less than a tenth
    assert [row["name"] for row in rows if row["chosen"]] == ["threads=2", "depth=2"]
    assert all(values["threads"] == 2 for values in seen[-20:])
    assert saved[0] == {"threads": 1, "depth": 2}  # a run that is cut has choices too
    assert saved[-1] == chosen


# --- every program

PROGRAMS = ("loaders", "cost", "loss", "mix", "tune", "scaling", "gpu", "data", "device", "plot")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_imports_neither_torch_nor_dali(name):
    """Importing torch alone takes two seconds of CPU."""
    code = (
        f"import sys; from benchmarks import {name}\n"
        f"try: {name}.main(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'nvidia.dali', 'timm', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(default: None)" not in done.stdout


@pytest.mark.parametrize("name", ["loaders", "cost", "tune", "loss", "mix"])
@pytest.mark.parametrize("wrong", [["--device", "cuda:99"], ["--data", "nowhere"]])
def test_wrong_arguments_get_one_line(name, wrong, tmp_path, capsys):
    if name in ("loss", "mix") and "--data" in wrong:
        pytest.skip("it reads no data")
    program = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        program.main([*wrong, "--out", str(tmp_path / "x.json")])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert wrong[1] in last
    assert len(last) < 400
