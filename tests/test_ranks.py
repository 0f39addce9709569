"""Several ranks train one model: it is the same on all of them, and the same as a single process would train."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from images import damaged, ramps, write
from test_resume import NOISY, digest, results
from test_train import NOISELESS, argv, recomputed, rows, write_folder

from pipelines import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
RANK = """
import hashlib, json, os, sys
from pathlib import Path
from pipelines import train, training

fit = training.fit

def fit_and_tell(run, criterion, args, stop, track):
    if os.environ.get("FAILS") == str(args.rank):
        def fails(*_):
            raise ZeroDivisionError("this rank fails")
        training.check_target = fails
    fit(run, criterion, args, stop, track)
    sha = {}
    for name, model in {"model": run.model, "evaluated": run.evaluated}.items():
        tensors = [key.encode() + value.numpy().tobytes() for key, value in model.state_dict().items()]
        sha[name] = hashlib.sha256(b"".join(tensors)).hexdigest()
    found = {"sha": sha, "batches": len(run.train), "rows": run.rows}
    Path(os.environ["TOLD"], f"{args.rank}.json").write_text(json.dumps(found))

training.fit = fit_and_tell
train.main(sys.argv[1:])
"""

# Each rank has its own folder, as on nodes with local disks, and synchronises with the others at every step.
LOADER = """
import datetime, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from lumix_dali import create_loader

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
rank, steps = dist.get_rank(), []
for is_training in (True, False):
    loader = create_loader(f"{sys.argv[1]}/{rank}", batch_size=3, input_size=8, num_threads=1, device="cpu",
                           is_training=is_training, rank=rank, world_size=2)
    for epoch in range(2):
        count = torch.zeros(1)
        for images, target in loader:
            together = torch.ones(1)
            dist.all_reduce(together)
            count += together / 2
        steps.append(count.item())
Path(os.environ["TOLD"], f"{rank}.json").write_text(json.dumps({"steps": steps, "bad": len(loader.bad)}))
dist.destroy_process_group()
"""


def torchrun(ranks):
    """The command that runs a program in several ranks, on a free port."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks)]


@pytest.fixture
def start(tmp_path):
    """`start(ranks, flags, **environment)` starts torchrun on a program whose ranks report how they ended."""
    agents = []

    def run(ranks, flags, program=RANK, **environment):
        (tmp_path / "rank.py").write_text(program)
        told = tmp_path / "told"
        told.mkdir(exist_ok=True)
        base = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOLD": str(told)}
        command = [*torchrun(ranks), str(tmp_path / "rank.py"), *flags]
        agents.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | base | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        return agents[-1]

    yield run
    for agent in agents:
        if agent.poll() is None:
            kill(agent)


def workers(agent):
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def kill(agent):
    for pid in [agent.pid, *workers(agent)]:
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def finished(agent, tmp_path, ranks):
    """The report of each rank, after a successful run."""
    out, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0, out
    return [json.loads((tmp_path / "told" / f"{rank}.json").read_text()) for rank in range(ranks)], out


def wait_for(file, agent, seconds=100):
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert agent.poll() is None, agent.communicate()[0]
        assert time.monotonic() < deadline, f"no {file}"
        time.sleep(0.002)


def test_two_ranks_train_what_one_process_trains(start, tmp_path):
    """Without noise, two ranks with two batches of 2 per update train like batches of 8 at the same learning rate."""
    data = write_folder(tmp_path / "data", {"train": 33, "validation": 5}, size=(32, 32))
    plain = [
        "--model",
        "test_vit",
        *NOISELESS,
        "--opt",
        "sgd",
        "--lr-base",
        "3.2",
        "--clip-grad",
        "1",
        "--epochs",
        "1",
    ]
    flags = argv(data, tmp_path, *plain, "-b", "2", "--grad-accum-steps", "2")
    told, out = finished(start(2, without_lr(flags)), tmp_path, 2)
    assert told[0]["sha"] == told[1]["sha"]
    assert [each["batches"] for each in told] == [24, 24]  # of 99 images
    assert out.count("epoch   0") == 1  # only rank 0 prints

    whole = train.main(without_lr(argv(data, tmp_path / "whole", *plain, "-b", "8")))
    (row,) = told[0]["rows"]
    assert row["lr"] == pytest.approx(0.1)
    assert all(row[key] == pytest.approx(whole[key], abs=1e-3) for key in ("top1", "top5", "val_loss"))
    assert row["train_loss"] == pytest.approx(rows(tmp_path / "whole" / "run")[0]["train_loss"], abs=1e-3)
    states = [
        torch.load(folder / "run" / "last.pth.tar", weights_only=True)["state_dict"]
        for folder in (tmp_path, tmp_path / "whole")
    ]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)
    loss, top1 = recomputed(tmp_path / "run", data, "test_vit", img_size=32)
    assert row["val_loss"] == pytest.approx(loss, rel=0.02)
    assert row["top1"] == top1


@pytest.mark.slow
def test_damaged_files_on_one_rank_stall_no_rank(start, tmp_path):
    """Only rank 1 has the corpus, with one good file in six: both ranks take the same steps without delay."""
    for rank in range(2):
        for number in range(24):
            path = tmp_path / "data" / str(rank) / "a" / f"{number:02}.jpg"
            write(ramps(20, 24, number), path)
    for number, content in enumerate(damaged().values()):
        path = tmp_path / "data" / "1" / "a" / f"{3 * number:02}.jpg"
        path.unlink()
        if content is None:
            path.symlink_to("nowhere")
        else:
            path.write_bytes(content)
    told, out = finished(start(2, [str(tmp_path / "data")], program=LOADER), tmp_path, 2)
    assert [each["steps"] for each in told] == [[4, 4, 4, 4]] * 2
    assert [each["bad"] for each in told] == [
        0,
        3,
    ]  # of the seven bad files, those in this rank's half of the evaluation
    assert "takes its place" in out


def without_lr(flags):
    place = flags.index("--lr")
    return flags[:place] + flags[place + 2 :]


@pytest.mark.slow
def test_a_rank_without_validation_samples(start, tmp_path):
    """Three ranks, two validation images, batches of 8; batch norm and the average of the weights agree."""
    data = write_folder(tmp_path / "data", {"train": 25}, classes=["blue", "red"])
    write_folder(data, {"validation": 1}, classes=["blue", "red"])
    told, _ = finished(
        start(3, argv(data, tmp_path, "--model-ema", "--model-ema-decay", ".9", "--drop", ".1", "--epochs", "2")),
        tmp_path,
        3,
    )
    assert told[0]["sha"] == told[1]["sha"] == told[2]["sha"]
    assert told[0]["sha"]["model"] != told[0]["sha"]["evaluated"]
    loss, top1 = recomputed(tmp_path / "run", data)
    assert told[0]["rows"][-1]["val_loss"] == pytest.approx(loss, rel=0.02)
    assert told[0]["rows"][-1]["top1"] == top1


def test_sync_bn_needs_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = write_folder(tmp_path / "data", {"train": 9, "val": 2})
    with pytest.raises(ValueError, match="--sync-bn: PyTorch synchronises batch norm only on GPUs"):
        train.main(argv(data, tmp_path, "--sync-bn"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")
def test_sync_bn(start, tmp_path):
    """Two ranks with batches of 4 get the same statistics and weights as batches of 8."""
    data = write_folder(tmp_path / "data", {"train": 33, "validation": 5}, size=(32, 32))
    plain = [
        *NOISELESS,
        "--opt",
        "sgd",
        "--lr",
        ".01",
        "--device",
        "cuda",
        "--epochs",
        "1",
    ]
    finished(start(2, argv(data, tmp_path, *plain, "-b", "4", "--sync-bn")), tmp_path, 2)
    train.main(argv(data, tmp_path / "whole", *plain, "-b", "8"))
    states = [
        torch.load(folder / "run" / "last.pth.tar", weights_only=True, map_location="cpu")["state_dict"]
        for folder in (tmp_path, tmp_path / "whole")
    ]
    torch.testing.assert_close(*states, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])  # with three ranks, the order in which gradients are added matters
def test_ranks_resume_after_kill_9(ranks, start, tmp_path):
    data = write_folder(tmp_path / "data", {"train": 33, "validation": 5})
    told, _ = finished(start(ranks, argv(data, tmp_path / "whole", *NOISY, "-b", "4")), tmp_path, ranks)
    flags = argv(data, tmp_path, *NOISY, "-b", "4")
    agent = start(ranks, flags)
    last = tmp_path / "run" / "last.pth.tar"
    wait_for(last, agent)
    kill(agent)
    assert torch.load(last, weights_only=True)["run"]["epoch"] < 3
    again, out = finished(start(ranks, [*flags, "--resume"]), tmp_path, ranks)
    assert f"resumes from {last}" in out
    assert [each["sha"] for each in again] == [each["sha"] for each in told]
    assert results(tmp_path / "run") == results(tmp_path / "whole" / "run")


@pytest.mark.slow
def test_a_different_number_of_ranks_is_refused(start, tmp_path):
    data = write_folder(tmp_path / "data", {"train": 33, "validation": 5})
    train.main(argv(data, tmp_path, "--epochs", "1"))
    agent = start(2, argv(data, tmp_path, "--epochs", "1", "--resume"))
    out, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert "--world-size was 1 and is 2" in out


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_both_after_the_same_update(start, tmp_path):
    data = write_folder(tmp_path / "data", {"train": 33, "validation": 5})
    flags = argv(data, tmp_path, *NOISY, "-b", "4", "--epochs", "200")
    agent = start(2, flags)
    last = tmp_path / "run" / "last.pth.tar"
    wait_for(last, agent)
    pids = workers(agent)
    os.kill(pids[1], signal.SIGTERM)
    out, _ = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert "continue with --resume" in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    state = torch.load(last, weights_only=True)["run"]
    assert len({(rank["train"]["position"][0], rank["train"]["position"][1]) for rank in state["ranks"]}) == 1
    before = digest(last)
    agent = start(2, [*flags, "--resume", "--checkpoint-interval", "1"])
    deadline = time.monotonic() + 100
    while digest(last) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(agent)
    assert torch.load(last, weights_only=True)["run"]["updates"] > state["updates"]


@pytest.mark.slow
def test_a_failing_rank_ends_the_other(start, tmp_path):
    data = write_folder(tmp_path / "data", {"train": 33, "validation": 5})
    agent = start(2, argv(data, tmp_path), FAILS="1")
    out, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert "this rank fails" in out
