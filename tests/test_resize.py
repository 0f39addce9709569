"""The resize of training on a CPU, against Pillow and against DALI's own."""

import os
import subprocess
import sys
import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image

from lumix_dali import create_loader
from lumix_dali.loading import resize

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(scope="module")
def photographs():
    """Two photographs, and crops of odd sizes and shapes."""
    from sklearn.datasets import load_sample_images

    whole = [np.ascontiguousarray(image) for image in load_sample_images().images]
    crops = [
        (0, 0, 427, 640),
        (13, 7, 331, 501),
        (100, 200, 101, 400),
        (0, 5, 427, 6),
        (50, 60, 51, 61),
        (1, 1, 80, 90),
    ]
    return [np.ascontiguousarray(image[y:b, x:r]) for image in whole for y, x, b, r in crops]


def resized(images, size, interpolation, hflip=0.0, threads=2, batches=1):
    @pipeline_def(batch_size=len(images), num_threads=threads, device_id=None, seed=5)
    def define():
        encoded = fn.external_source(lambda: images, batch=True, layout="HWC")
        return resize.resize_mirror(encoded, size, interpolation, hflip)

    pipe = define()
    return [np.array(image) for _ in range(batches) for image in pipe.run()[0]]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(224, 224), (97, 131), (64, 65)])
def test_pixels_are_pillows(photographs, size, interpolation):
    pillow = [Image.fromarray(image).resize(size[::-1], FILTERS[interpolation]) for image in photographs]
    apart = [
        np.abs(ours.astype(int) - np.asarray(theirs)).astype(float)
        for ours, theirs in zip(resized(photographs, size, interpolation), pillow, strict=True)
    ]
    assert max(map(np.mean, apart)) <= 0.05
    assert max(map(np.max, apart)) <= 1


def test_an_extreme_shape_is_pillows():
    image = np.random.default_rng(0).integers(0, 256, (30000, 2, 3)).astype(np.uint8)
    (ours,) = resized([image], (224, 224), "bicubic")
    theirs = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
def test_flips_and_filters_are_those_that_dali_draws(photographs, interpolation, monkeypatch):
    draw = dict(images=photographs, size=(96, 80), interpolation=interpolation, hflip=0.5, batches=4)
    ours = resized(**draw)
    monkeypatch.setattr(resize, "kernel", lambda *_: "dali")
    apart = [np.abs(a.astype(int) - b).mean() for a, b in zip(ours, resized(**draw), strict=True)]
    assert max(apart) < 1  # another flip or filter changes a photograph by more


def test_the_number_of_threads_changes_nothing(photographs):
    one, many = (resized(photographs, (80, 80), "random", 0.5, threads) for threads in (1, 5))
    assert all(map(np.array_equal, one, many))


@pytest.mark.parametrize(("size", "who"), [((64, 64), "torch"), ((224, 10), "dali"), ((32, 32), "dali")])
def test_small_images_stay_with_dali(size, who):
    assert resize.kernel(size, "cpu") == who
    assert resize.kernel(size, "cuda") == "dali"


def test_without_avx2_dali_resizes():
    code = "from lumix_dali.loading.resize import kernel; print(kernel((224, 224), 'cpu'))"
    env = os.environ | dict(ATEN_CPU_CAPABILITY="default")
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "dali\n"


class Failure(Exception):
    pass


def test_an_error_waits_for_every_thread(photographs, monkeypatch):
    """DALI frees the images once the error reaches it, so no thread may still read them."""
    running = []
    one = resize._Resize._one

    def fail_at_one_pixel(self, image, *is_cubic):
        if image.shape[:2] == (1, 1):
            raise Failure("one pixel")
        running.append(threading.current_thread())
        for _ in range(20):
            found = one(self, image, *is_cubic)
        running.pop()
        return found

    monkeypatch.setattr(resize._Resize, "_one", fail_at_one_pixel)
    with pytest.raises(RuntimeError, match="one pixel"):
        resized(photographs, (96, 96), "bilinear", threads=4)
    assert not running


@pytest.fixture
def folder(tmp_path, photographs):
    for k, image in enumerate(photographs[:3] * 8):
        path = tmp_path / "images" / str(k % 3) / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(image, k, axis=1)).save(path)
    return tmp_path / "images"


OPTIONS = dict(batch_size=5, input_size=72, device="cpu", cutmix_alpha=1.0, interpolation="random", dtype="uint8")


def stream(loader):
    return [(images.clone(), target.lam0.clone()) for images, target in loader]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_every_state_resumes_bit_for_bit(folder):
    with create_loader(folder, **OPTIONS, num_threads=2) as loader:
        states, whole = [loader.state_dict()], []
        for images, target in loader:
            whole.append((images.clone(), target.lam0.clone()))
            states.append(loader.state_dict())
        later = stream(loader)
    for step, state in enumerate(states):
        with create_loader(folder, **OPTIONS, num_threads=1) as loader:
            loader.load_state_dict(state)
            assert equal(stream(loader), whole[step:] or later), step


@pytest.mark.parametrize("moved", [False, True])
def test_a_state_restores_a_size_that_changed_on_the_way(folder, moved):
    """From 32 pixels, which DALI resizes, to 72; the epoch under way keeps its size."""
    small = OPTIONS | dict(input_size=32)
    with create_loader(folder, **small) as loader:
        batches = iter(loader)
        next(batches)
        loader.input_size = 72
        assert next(batches)[0].shape[-1] == 32
        if moved:
            batches = iter(loader)
            assert next(batches)[0].shape[-1] == 72
        state = loader.state_dict()
        rest = [(images.clone(), target.lam0.clone()) for images, target in batches]
        later = stream(loader)
    with create_loader(folder, **small) as loader:
        loader.load_state_dict(state)
        assert equal(stream(loader), rest)
        assert equal(stream(loader), later)


def test_two_loaders_take_turns(folder):
    with create_loader(folder, **OPTIONS) as alone:
        want = stream(alone)
    with create_loader(folder, **OPTIONS) as first, create_loader(folder, **OPTIONS, num_threads=3) as second:
        pairs = list(zip(first, second, strict=True))
    for turn in (0, 1):
        assert equal([(pair[turn][0], pair[turn][1].lam0) for pair in pairs], want)


def test_the_process_keeps_its_threads(folder):
    """A process with a loader has PyTorch's number of threads unchanged, in new threads too, and one pool of ours."""
    count = []

    def ask():
        count.append(torch.get_num_threads())

    ask()
    with create_loader(folder, **OPTIONS) as loader, create_loader(folder, **OPTIONS, num_threads=3) as other:
        stream(loader)
        stream(other)
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        ours = [each for each in threading.enumerate() if each.name.startswith("lumix_dali.resize")]
    assert len(set(count)) == 1
    assert len(ours) <= os.cpu_count()


SCRIPT = """
import os, sys
from lumix_dali import create_loader
def run():
    with create_loader(sys.argv[1], batch_size=5, input_size=72, device="cpu", num_threads=2) as loader:
        # Not a tensor's sum: after a fork PyTorch waits for ever for its own OpenMP threads.
        return sum(float(images.numpy().sum(dtype="float64")) for images, _ in loader)
if __name__ == "__main__":
    want = run()
    child = os.fork()
    if child == 0:
        os._exit(run() != want)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = create_loader(sys.argv[1], batch_size=5, input_size=72, device="cpu", num_threads=2)
    next(iter(left))
"""


def test_a_forked_child_resizes_too_and_an_epoch_under_way_does_not_disturb_the_exit(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", script, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_crops_are_those_that_dali_draws(monkeypatch, tmp_path):
    """The draws of the whole training graph are those of a graph with DALI's resize."""
    y, x = np.mgrid[:200, :300]
    pairs = []
    for k in range(8):
        content = BytesIO()
        Image.fromarray(np.stack([x * (k + 1) / 10, y, x / 2 + y / 2], -1).astype(np.uint8)).save(content, "PNG")
        path = tmp_path / f"{k}.png"
        path.write_bytes(content.getvalue())
        pairs.append((path, k))

    def images():
        with create_loader(pairs, **OPTIONS | dict(drop_last=False)) as loader:
            return torch.cat([images for images, _ in loader]).int()

    ours = images()
    monkeypatch.setattr(resize, "kernel", lambda *_: "dali")
    assert (ours - images()).abs().max() <= 3
