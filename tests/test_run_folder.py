"""A run's folder: which run owns it, what is replaced in it, and what is reported about a run."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from pipelines import tracking, wait
from pipelines.checkpoint import Found
from pipelines.folder import claimed, write_log, write_text

NEW, REPLACED = SimpleNamespace(overwrite=False), SimpleNamespace(overwrite=True)


@pytest.mark.parametrize(
    ("name", "content", "worth"),
    [
        ("last.pth.tar", "x", True),
        ("checkpoint-3.pth.tar", "x", True),
        ("log.jsonl", "{}", True),
        ("args.yaml", "x", False),
        ("notes.txt", "x", False),
    ],
)
def test_a_run_is_not_replaced_unless_asked(name, content, worth, tmp_path):
    """Files from before a run's first checkpoint may be replaced; files with other names are never touched."""
    file = tmp_path / name
    file.write_text(content)
    if worth:
        says = f"it already holds a run .{name}.*--resume.*--experiment.*--overwrite"
        with pytest.raises(ValueError, match=says), claimed(tmp_path, NEW, None):
            pytest.fail("it was replaced")
        assert file.read_text() == content
    with claimed(tmp_path, REPLACED if worth else NEW, None):
        assert file.exists() == (name == "notes.txt")


def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "a" / "b"
    with (
        claimed(folder, NEW, None),
        pytest.raises(ValueError, match=f"{folder}: another run is writing there.*--experiment"),
        claimed(folder, REPLACED, None),
    ):
        pytest.fail("it is shared")
    with claimed(folder, NEW, None):
        pass


def test_only_the_folder_that_is_resumed_may_have_a_run(tmp_path):
    file = tmp_path / "one" / "last.pth.tar"
    file.parent.mkdir()
    file.write_text("x")
    found = Found(file, {}, file.stat().st_mtime_ns)
    with claimed(file.parent, NEW, found):
        assert file.exists()
    with claimed(tmp_path / "two", NEW, found):
        (tmp_path / "two" / "last.pth.tar").write_text("y")
    with pytest.raises(ValueError, match="it already holds a run"), claimed(tmp_path / "two", NEW, found):
        pytest.fail("it was replaced")
    os.utime(file, ns=(0, 0))  # written between reading and claiming
    with pytest.raises(ValueError, match="was replaced by another run"), claimed(file.parent, NEW, found):
        pytest.fail("an old state is resumed")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot be written \(Not a directory\); give a writable folder as --output"),
        claimed(tmp_path / "file" / "run", NEW, None),
    ):
        pytest.fail("it was written")


def test_text_is_replaced_atomically(tmp_path, monkeypatch):
    file = tmp_path / "args.yaml"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("args.yaml", "old")]


def test_rows_of_unequal_columns(tmp_path):
    """As in a run that was continued by a later version of the program, or is not validated in each epoch."""
    write_log(tmp_path, [{"epoch": 0, "a": None}, {"epoch": 1, "a": 2.0, "b": 3.0}])
    assert (tmp_path / "summary.csv").read_text().split() == ["epoch,a,b", "0,,", "1,2.0,3.0"]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"epoch": 0, "a": None},
        {"epoch": 1, "a": 2.0, "b": 3.0},
    ]


class Clock:
    """A perf_counter that only `spend` advances."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(wait.time, "perf_counter", lambda: self.now)

    def spend(self, seconds):
        self.now += seconds

    def batches(self, seconds, count):
        for number in range(count):
            self.spend(seconds)
            yield number


def test_waiting_is_the_time_between_step_and_batch(monkeypatch):
    clock = Clock(monkeypatch)
    waited = wait.DataWait(torch.device("cpu"))
    for _ in waited.batches(clock.batches(0.25, 8)):
        clock.spend(1.0)
    assert waited.seconds() == 8 * 0.25


FLAGS = SimpleNamespace(
    log_tensorboard=False, log_wandb=False, rank=0, wandb_project="p", wandb_tags=["a"], wandb_resume_id=""
)


def test_wandb_gets_each_row(tmp_path, monkeypatch):
    """A stand-in for the package, which needs an account, with `init` and `log` as documented."""

    class Run:
        logged, finished = [], False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.finished = True

        def log(self, row):
            self.logged.append(row)

    run, asked = Run(), {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: asked.update(given) or run))
    args = SimpleNamespace(**vars(FLAGS) | {"log_wandb": True, "wandb_resume_id": "x"})
    with tracking.tracking(args, tmp_path / "run", 3) as track:
        track({"epoch": 3, "top1": 50.0, "val_loss": None})
    assert run.logged == [{"epoch": 3, "top1": 50.0}]
    assert run.finished
    assert (asked["project"], asked["name"], asked["tags"]) == ("p", "run", ["a"])
    assert (asked["id"], asked["resume"]) == ("x", "must")
    with tracking.tracking(SimpleNamespace(**vars(args) | {"rank": 1}), tmp_path, 0) as track:
        track({"epoch": 4, "top1": 60.0})
    assert len(run.logged) == 1  # rank 0 only


def test_tensorboard_gets_each_row(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = SimpleNamespace(**vars(FLAGS) | {"log_tensorboard": True})
    for first, value in ((0, 10.0), (1, 20.0)):  # resumed after epoch 0: later rows are replaced
        with tracking.tracking(args, tmp_path, first) as track:
            for epoch in range(first, 3):
                track({"epoch": epoch, "top1": value + epoch, "val_loss": None})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["top1"]
    assert [(event.step, event.value) for event in events.Scalars("top1")] == [(0, 10.0), (1, 21.0), (2, 22.0)]
