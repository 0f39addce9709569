"""A run interrupted anywhere, by anything, resumes to the same end as an uninterrupted run, or is refused."""

import csv
import errno
import hashlib
import json
import os
import pickle
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_train import argv, write_folder

from pipelines import checkpoint, ranks, train, training

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
# Everything that is random or averaged: λ_r, dropout, drop path, mixing and augmentation; 12 batches, 6 updates.
NOISY = [
    "--drop",
    ".2",
    "--drop-path",
    ".2",
    "--model-ema",
    "--model-ema-decay",
    ".9",
    "--mixup",
    ".8",
    "--grad-accum-steps",
    "2",
    "--lumix-warmup-epochs",
    "1.5",
    "--sched-on-updates",
    "--log-interval",
    "2",
    "--checkpoint-hist",
    "1",
    "--mixup-off-epoch",
    "2",
    "--epochs",
    "3",
    "--checkpoint-interval",
    "1",
]


def load(file):
    return torch.load(file, weights_only=True)


def digest(file):
    """A hash of the weights, their average and the optimiser's state."""
    state, sha = load(file), hashlib.sha256()
    for part in (state["state_dict"], state["state_dict_ema"], *state["optimizer"]["state"].values()):
        for name, value in part.items():
            sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def results(folder):
    """Everything that a run leaves behind, except timings."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    with open(folder / "summary.csv") as file:
        table = list(csv.DictReader(file))
    rows = [json.loads(line) for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    for row in (*table, *rows, summary):
        del row["images_per_second"], row["data_wait"]
    return {file.name: digest(file) for file in folder.glob("*.pth.tar")}, table, rows, summary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), {"train": 33, "validation": 5})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run, and the checkpoints that it wrote on the way, by (epoch, batches done)."""
    output = tmp_path_factory.mktemp("whole")
    kept, replace = {}, os.replace

    def keep(source, target):
        replace(source, target)
        if Path(target).name == "last.pth.tar":
            state = load(target)["run"]
            place = state["epoch"], state["step"]
            kept[place] = shutil.copyfile(target, output / "-".join(map(str, place)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", keep)
        train.main(argv(data, output, *NOISY))
    return output / "run", kept


def folder_with(file, tmp_path):
    """A run's folder as a kill leaves it: only that checkpoint is intact."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(file, folder / "last.pth.tar")
    (folder / "tmp.pth.tar").write_bytes(b"half a checkpoint")
    (folder / ".part-x").write_text("half a log")
    (folder / "log.jsonl").write_text('{"epoch": 7}\n')
    return folder


# first update, within an epoch, its last update, after its validation, where mixing is switched off
@pytest.mark.parametrize(
    "place",
    [
        (0, 2),
        (0, 12),
        (1, 8),
        *(pytest.param(place, marks=pytest.mark.slow) for place in ((0, 6), (1, 0), (2, 0), (2, 10))),
    ],
)
def test_resume_is_bit_exact(place, whole, data, tmp_path):
    folder, kept = whole
    resumed = folder_with(kept[place], tmp_path)
    train.main(argv(data, tmp_path, *NOISY, "--resume"))
    checkpoints, *logs = results(resumed)
    expected, *expected_logs = results(folder)
    assert logs == expected_logs
    assert checkpoints["last.pth.tar"] == expected["last.pth.tar"]
    if place == (0, 2):  # from the other places, model_best may be older
        assert checkpoints == expected
    assert not list(resumed.glob("tmp*"))


def test_a_run_resumes_after_kill_9(whole, data, tmp_path):
    command = [sys.executable, "-m", "pipelines.train", *argv(data, tmp_path, *NOISY)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    last, deadline = tmp_path / "run" / "last.pth.tar", time.monotonic() + 100
    while not last.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert load(last)["run"]["epoch"] < 3
    assert not (tmp_path / "run" / "summary.json").exists()
    train.main(argv(data, tmp_path, *NOISY, "--resume"))
    assert results(tmp_path / "run") == results(whole[0])


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(whole, data, tmp_path, monkeypatch):
    """An epoch's best is already new, but last.pth.tar is the previous one: the whole epoch is repeated."""
    folder = folder_with(whole[1][1, 12], tmp_path)
    replace = os.replace

    def killed(source, target):
        if Path(target).name == "last.pth.tar":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv(data, tmp_path, *NOISY, "--resume", "--checkpoint-hist", "3"))
    state = load(folder / "last.pth.tar")["run"]
    assert (state["epoch"], state["step"]) == (1, 12)
    assert list(folder.glob("checkpoint-1*"))
    monkeypatch.undo()
    train.main(argv(data, tmp_path, *NOISY, "--resume"))
    assert results(folder)[0]["last.pth.tar"] == digest(whole[0] / "last.pth.tar")


def test_a_full_disk_leaves_the_old_checkpoint(whole, data, tmp_path, capsys):
    """The system refuses files larger than half a checkpoint; once there is space again, the run resumes."""
    folder = folder_with(whole[1][1, 4], tmp_path)
    last = folder / "last.pth.tar"
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=f"checkpoint cannot be written \\(File too large\\); {last} is intact"):
            train.main(argv(data, tmp_path, *NOISY, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last.read_bytes() == before
    assert not list(folder.glob("tmp*"))
    train.main(argv(data, tmp_path, *NOISY, "--resume"))
    assert results(folder)[1:] == results(whole[0])[1:]


def test_without_links_a_checkpoint_is_copied(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    train.main(argv(data, tmp_path, "--epochs", "1"))
    best, last = (tmp_path / "run" / f"{name}.pth.tar" for name in ("model_best", "last"))
    assert best.read_bytes() == last.read_bytes()
    assert not best.samefile(last)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_a_checkpoint(number, whole, data, tmp_path, monkeypatch, capsys):
    step = training.train_step

    def signalled(run, *rest):
        if (run.epoch, run.step) == (1, 2):  # an update takes two batches: it is finished first
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:  # clusters send it, and torchrun passes it on
                os.kill(os.getpid(), number)
        return step(run, *rest)

    monkeypatch.setattr(training, "train_step", signalled)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    more = [*NOISY, "--checkpoint-interval", "0"]
    with pytest.raises(SystemExit) as ended:
        train.main(argv(data, tmp_path, *more))
    assert ended.value.code == 128 + number
    last = tmp_path / "run" / "last.pth.tar"
    assert f"stopped by {number.name} in epoch 1: continue with --resume {last}\n" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert digest(last) == digest(whole[1][1, 4])
    monkeypatch.undo()
    train.main(argv(data, tmp_path, *more, "--resume"))
    assert results(tmp_path / "run") == results(whole[0])


@pytest.mark.parametrize("moment", ["validation", "saving"])
def test_a_signal_outside_training_loses_nothing(moment, whole, data, tmp_path, monkeypatch, capsys):
    """In the first epoch: all training is already in last.pth.tar, or is written there completely."""
    more, place = [*NOISY, "--checkpoint-interval", "0"], {"validation": (0, 12), "saving": (1, 2)}[moment]

    def signalled(original):
        def signal_first(*inputs):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*inputs)

        return signal_first

    owner, name = {"validation": (training, "validate"), "saving": (torch, "save")}[moment]
    original = getattr(owner, name)
    if moment == "saving":  # the epoch's second checkpoint, after its validation
        first, original_save = signalled(original), original
        calls = iter([original_save, first])
        monkeypatch.setattr(owner, name, lambda *inputs: next(calls, original_save)(*inputs))
    else:
        monkeypatch.setattr(owner, name, signalled(original))
    with pytest.raises(SystemExit) as ended:
        train.main(argv(data, tmp_path, *more))
    assert ended.value.code == 143
    assert "continue with --resume" in capsys.readouterr().err
    assert digest(tmp_path / "run" / "last.pth.tar") == digest(whole[1][place])
    monkeypatch.undo()
    train.main(argv(data, tmp_path, *more, "--resume"))
    assert results(tmp_path / "run") == results(whole[0])


def test_ignored_signals_stay_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ranks.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_closing_the_terminal_ends_the_run_with_a_checkpoint(data, tmp_path):
    """From then on, writing to it is an error, which must not prevent the checkpoint."""
    ours, theirs = pty.openpty()
    code = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import runpy; "
        "runpy.run_module('pipelines.train', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv(data, tmp_path, *NOISY, "--epochs", "1000")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    last, deadline = tmp_path / "run" / "last.pth.tar", time.monotonic() + 100
    while not last.exists() and time.monotonic() < deadline:
        select.select([ours], [], [], 0.05)[0] and os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=30) == 128 + signal.SIGHUP
    assert load(last)["run"]["step"] > 0


def test_a_longer_run_has_the_new_schedule(data, tmp_path, capsys):
    """--epochs 3 after two of two epochs: the third has the same learning rate as in a run of three."""
    plain = ["--epochs", "2", "--sched", "cosine", "--warmup-epochs", "0"]
    train.main(argv(data, tmp_path, *plain))
    train.main(argv(data, tmp_path, *plain[2:], "--epochs", "3", "--resume"))
    assert "--epochs was 2 and is 3" in capsys.readouterr().out
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([3e-3, 1.5e-3, 3e-3 * 0.25])
    with pytest.raises(ValueError, match="--epochs 2: 3 are done"):
        train.main(argv(data, tmp_path, *plain, "--resume"))


def test_a_run_is_stopped_and_continued(whole, data, tmp_path):
    """--stop-epoch leaves the schedule as it is."""
    calls = (["--stop-epoch", "1"], ["--stop-epoch", "2", "--resume"], ["--resume", "auto"])
    for done, more in enumerate(calls, 1):
        train.main(argv(data, tmp_path, *NOISY, *more))
        assert load(tmp_path / "run" / "last.pth.tar")["run"]["epoch"] == done
    assert results(tmp_path / "run") == results(whole[0])


def test_without_a_checkpoint_a_run_starts_from_scratch(data, tmp_path, capsys):
    train.main(argv(data, tmp_path, "--epochs", "1", "--resume"))
    assert f"--resume: {tmp_path}/run/last.pth.tar does not exist yet; starting from scratch" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_path_resumes_the_run_in_its_folder(given, whole, data, tmp_path, capsys):
    """Without --experiment the run resumes in its own folder; here nothing is left to do."""
    folder = folder_with(whole[1][3, 0], tmp_path)
    path = folder if given == "folder" else folder / "last.pth.tar"
    more = argv(data, tmp_path / "elsewhere", *NOISY, "--resume", str(path))
    more[more.index("--experiment") + 1] = ""
    train.main(more)
    (folder / "tmp.pth.tar").unlink()  # nothing replaced it
    assert results(folder)[1:] == results(whole[0])[1:]
    assert f"resumes from {folder}/last.pth.tar, epoch 3, batch 0" in capsys.readouterr().out


def test_some_things_may_change(whole, data, tmp_path):
    """The data may have moved; threads and the number of checkpoints do not matter; args.yaml has the rest."""
    folder_with(whole[1][2, 6], tmp_path)
    moved = shutil.copytree(data, tmp_path / "moved")
    train.main(
        [
            "--config",
            str(whole[0] / "args.yaml"),
            "--resume",
            "--data-dir",
            str(moved),
            "--workers",
            "1",
            "--output",
            str(tmp_path),
            "--checkpoint-interval",
            "0",
            "--checkpoint-hist",
            "3",
        ]
    )
    assert digest(tmp_path / "run" / "last.pth.tar") == digest(whole[0] / "last.pth.tar")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b", "16"], "--batch-size was 8 and is 16"),
        (["--model", "test_vit"], "--model was test_resnet and is test_vit"),
        (["--noise", "uniform"], r"--noise was \['beta', 2\.0\] and is \['uniform'\]"),
        (["--scale", ".5", "1"], "--scale was "),
        (["--validation-batch-size", "2"], "--validation-batch-size was None and is 2"),
    ],
)
def test_changed_flags_are_refused(flags, message, whole, data, tmp_path):
    folder = folder_with(whole[1][1, 4], tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()} | {".lock": b""}
    with pytest.raises(ValueError, match=message) as refused:
        train.main(argv(data, tmp_path, *NOISY, "--resume", *flags))
    assert str(folder / "last.pth.tar") in str(refused.value)
    assert str(folder / "args.yaml") in str(refused.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("validation", "validation")])
def test_different_data_are_refused(split, name, whole, data, tmp_path):
    folder_with(whole[1][1, 4], tmp_path)
    other = shutil.copytree(data, tmp_path / "other")
    file = next((other / split / "red").iterdir())
    file.rename(file.with_name("another.png"))
    with pytest.raises(ValueError, match=f"{name} data, state: it belongs to another loader: data was"):
        train.main(argv(other, tmp_path, *NOISY, "--resume"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["args"].update(world_size=2), "--world-size was 2 and is 1"),
        (lambda state: state["run"]["ranks"][0]["train"].update(place=(0, 1, None, None)), "training data.*checksum"),
        (lambda state: state["run"].pop("ranks"), "does not fit this run: 'ranks'"),
        (lambda state: state["state_dict"].popitem(), r"content, Error[^.]*Missing key"),
        (lambda state: state["run"].update(updates="many"), "content, invalid literal"),
        (lambda state: state.pop("run_format"), "is not a checkpoint of this program"),
    ],
)
def test_a_changed_state_is_refused(change, message, whole, data, tmp_path):
    folder = folder_with(whole[1][1, 4], tmp_path)
    state = load(folder / "last.pth.tar")
    change(state)
    torch.save(state, folder / "last.pth.tar")
    with pytest.raises(ValueError, match=message):
        train.main(argv(data, tmp_path, *NOISY, "--resume"))


class Executed:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(file, _):
    file.write_bytes(file.read_bytes()[:-1000])


def flip(file, _):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4  # within a tensor: torch.load reads it without an error
    file.write_bytes(content)


def empty(file, _):
    file.write_bytes(b"")


def hostile(file, trace):
    torch.save({"run_format": checkpoint.FORMAT, "run": Executed(trace)}, file)


def old_pickle(file, trace):
    file.write_bytes(pickle.dumps(Executed(trace)))


def missing(file, _):
    file.unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty, hostile, old_pickle, missing])
def test_a_damaged_file_is_named_and_nothing_in_it_runs(damage, whole, data, tmp_path):
    file = folder_with(whole[1][1, 4], tmp_path) / "last.pth.tar"
    damage(file, tmp_path / "trace")
    with pytest.raises(ValueError, match=f"{file} cannot be read") as refused:
        train.main(argv(data, tmp_path, *NOISY, "--resume", str(file)))
    assert "to start from scratch" in str(refused.value)
    assert not (tmp_path / "trace").exists()


def test_a_nan_loss_does_not_reach_the_checkpoint(whole, data, tmp_path, monkeypatch):
    folder = folder_with(whole[1][1, 4], tmp_path)
    monkeypatch.setattr(training, "lam_sums", lambda *_: torch.zeros(5))
    forward = training.LUMixLoss.forward
    monkeypatch.setattr(training.LUMixLoss, "forward", lambda *inputs: forward(*inputs) * torch.nan)
    with pytest.raises(FloatingPointError, match="epoch 1 is nan"):
        train.main(argv(data, tmp_path, *NOISY, "--resume"))
    assert digest(folder / "last.pth.tar") == digest(whole[1][1, 4])


@pytest.mark.slow
def test_plateau_resumes(data, tmp_path, monkeypatch):
    """The only schedule with state: after ten epochs without a better score it lowers the learning rate."""
    more = ["--sched", "plateau", "--epochs", "14", "--decay-rate", ".5", "--lr", "1e-6", "-b", "32"]
    warnings.simplefilter("ignore", FutureWarning)  # timm's, of the schedule
    train.main(argv(data, tmp_path / "whole", *more))
    save_epoch = training.save_epoch

    def stop(run, args):
        save_epoch(run, args)
        if run.epoch == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv(data, tmp_path, *more))
    monkeypatch.undo()
    train.main(argv(data, tmp_path, *more, "--resume"))
    rates, expected = (
        [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", tmp_path / "whole" / "run")
    )
    assert rates == expected
    assert set(rates) == {1e-6, 0.5e-6}
