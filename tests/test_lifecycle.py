"""The loader's lifetime: abandoned, closed, signalled, forked or run for long, without a leak, an orphan or a hang."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumix_dali import create_loader
from lumix_dali.loading.epoch import Epoch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve noisy images of two classes."""
    root, rng = tmp_path_factory.mktemp("life"), np.random.default_rng(0)
    for i in range(12):
        (root / f"c{i % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"c{i % 2}" / f"{i}.png")
    return root


def make(folder, **options):
    fixed = dict(batch_size=4, input_size=32, device="cpu", num_threads=2, cutmix_alpha=1.0)
    return create_loader(folder, **fixed | options)


def native_threads():
    """Number of threads of this process, including DALI's."""
    return len(os.listdir("/proc/self/task"))


def settled_threads(expected):
    """Number of threads of this process, once it is as expected or after a timeout.

    A joined thread is listed until the kernel has removed it.
    """
    end = time.monotonic() + 5
    while (found := native_threads()) != expected and time.monotonic() < end:
        time.sleep(0.01)
    return found


def threads_at_rest():
    """Number of threads of this process when none has ended for half a second: a dropped epoch ends in its own time."""
    found = native_threads()
    while True:
        time.sleep(0.5)
        if (now := native_threads()) == found:
            return found
        found = now


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_close_break_and_garbage_collection_free_every_thread(folder):
    for depth in (1, 2):
        list(make(folder, prefetch_queue_depth=depth))  # from now on DALI has what it keeps for the life of the process
    gc.collect()
    before = threads_at_rest()
    with make(folder) as loader:
        batches = iter(loader)
        next(batches)
        assert native_threads() > before
    assert settled_threads(before) == before
    gc.disable()  # the reference count alone must suffice
    try:
        loader = make(folder, prefetch_queue_depth=1, batch_size=1)
        for _ in loader:
            break
        assert settled_threads(before) == before
        for _ in loader:  # to the end: the next epoch is being prefetched
            pass
        assert native_threads() > before
        del loader
        assert settled_threads(before) == before
        batches = iter(make(folder))
        next(batches)
        del batches
        assert settled_threads(before) == before
    finally:
        gc.enable()


def test_an_error_in_user_code_leaves_nothing_running(folder):
    next(iter(make(folder)))
    gc.collect()
    before = threads_at_rest()

    def step():
        with make(folder) as loader:
            for _ in loader:
                raise RuntimeError("user's")

    with pytest.raises(RuntimeError, match="user's"):
        step()
    assert settled_threads(before) == before


def test_an_abandoned_iterator_says_so(folder):
    loader = make(folder)
    first = iter(loader)
    next(first)
    second = iter(loader)
    with pytest.raises(RuntimeError, match="this iteration was abandoned"):
        next(first)
    assert len(list(second)) == len(loader)
    with pytest.raises(RuntimeError, match="this iteration was abandoned"):
        list(zip(loader, loader, strict=True))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(folder, copied):
    loader = make(folder)
    batches = iter(loader)
    for each in (loader, batches):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(each)
    assert len(list(batches)) == len(loader)


def run(program, folder, **options):
    """A process in its own process group that has printed "ready"."""
    code = "import sys\nfrom lumix_dali import create_loader\nloader = create_loader(sys.argv[1], batch_size=4, "
    code += "input_size=32, device='cpu', num_threads=2, cutmix_alpha=1.0)\n" + textwrap.dedent(program)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    assert process.stdout.readline() == "ready\n", process.communicate(timeout=60)[1]
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_process_and_leave_no_orphan(folder, number):
    process = run(
        """
        next(iter(loader))
        print("ready", flush=True)
        while True:
            for batch in loader:
                pass
    """,
        folder,
    )
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode in (-number, 128 + number, 1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_use_after_a_fork_is_an_error_not_a_hang(folder):
    process = run(
        """
        import os
        batches = iter(loader)
        next(batches)
        print("ready", flush=True)
        if os.fork() == 0:
            for what in (lambda: next(batches), lambda: iter(loader)):
                try:
                    what()
                except RuntimeError as error:
                    print(error, flush=True)
            os._exit(0)
        os.wait()
    """,
        folder,
    )
    out, _ = process.communicate(timeout=60)
    assert out.count("create a separate loader in each process") == 2


def test_other_threads_may_iterate(folder):
    """A separate loader in its own thread, as a prefetching wrapper would use it."""
    expected = [target.lam0.tolist() for _, target in make(folder)]
    found = []
    thread = threading.Thread(target=lambda: found.extend(target.lam0.tolist() for _, target in make(folder)))
    thread.start()
    thread.join(timeout=60)
    assert found == expected


@pytest.mark.slow
def test_memory_is_flat_over_2000_batches(folder, record_property):
    loader = make(folder)
    readings = []
    for _ in range(10):
        for _ in range(200 // len(loader) + 1):
            for _ in loader:
                pass
        readings.append(resident_mib())
    record_property("resident_mib", readings)
    print("resident MiB after each 200 batches:", [round(r) for r in readings])
    assert readings[-1] - readings[2] < 20


@pytest.mark.slow
def test_50_loaders_made_and_dropped_leave_neither_memory_nor_threads(folder):
    readings = []
    for _ in range(50):
        with make(folder) as loader:
            next(iter(loader))
        readings.append((native_threads(), resident_mib()))
    print("threads, resident MiB:", readings[0], readings[-1])
    assert readings[-1][0] == readings[5][0]
    assert readings[-1][1] - readings[5][1] < 20


def test_truncating_files_during_reading_does_not_end_the_process(tmp_path):
    """Every file is overwritten while DALI reads and decodes; a memory map would raise SIGBUS."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    for i in range(64):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"c{i % 2}" / f"{i}.jpg", quality=90)
    program = """
        import pathlib
        batches = iter(loader)
        next(batches)
        for path in sorted(pathlib.Path(sys.argv[1]).glob("*/*.jpg")):
            path.write_bytes(b"no image")
        try:
            for _ in batches:
                pass
        except ValueError as error:  # none is left to take a sample's place
            print(error, file=sys.stderr)
        print("ready", flush=True)
    """
    process = run(program, tmp_path)  # which is waiting for "ready"
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_next_epoch_is_built_on_a_thread_of_its_own(folder, monkeypatch):
    """The training thread builds the first epoch only."""
    names, build = [], Epoch._build

    def recorded(self):
        names.append((self.position.epoch, threading.current_thread().name))
        build(self)

    monkeypatch.setattr(Epoch, "_build", recorded)
    with make(folder) as loader:
        for _ in range(3):
            list(loader)
    main = threading.current_thread().name
    assert sorted(names) == [(0, main), *((epoch, "lumix_dali-next") for epoch in (1, 2, 3))]


def test_an_interrupted_next_loses_no_batch(folder):
    """A signal's handler raises at any place within ``next``: the batch is delivered by the call after."""
    expected = [target.lam0.tolist() for _, target in make(folder)]

    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    def interrupted(delay):
        batches, found, rung = iter(make(folder)), [], 0
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay * (len(found) == 1 and not rung))
                _, target = next(batches)
                signal.setitimer(signal.ITIMER_REAL, 0)
                found.append(target.lam0.tolist())
            except Alarm:
                rung = 1
            except StopIteration:
                return found, rung

    previous, hits = signal.signal(signal.SIGALRM, ring), 0
    try:
        for delay in np.geomspace(1e-4, 0.1, 12):
            for _ in range(3):  # it may ring between the end of `next` and the assignment, where nobody can help
                found, rung = interrupted(delay)
                if found == expected:
                    break
            assert found == expected
            hits += rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert hits


def test_exit_with_an_epoch_under_way_is_silent(folder):
    process = run(
        """
        batches = iter(loader)
        next(batches)
        import queue
        del queue.Empty  # modules may be torn down in this order
        print("ready", flush=True)
    """,
        folder,
    )
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (0, "")
