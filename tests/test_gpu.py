"""What only a GPU shows between DALI and PyTorch: copies, waits, streams, graphs, precision, decoders, leaks.

Every test also runs on the CPU as far as possible, so that its logic is tested without a GPU.
Mixing itself is compared with the oracle in `test_fn.py`, damage and resume in `test_loader.py`, on both backends.
"""

import contextlib
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from images import ramp_samples
from PIL import Image
from torch import nn

from benchmarks import loss as benchmark
from lumix_dali import LUMixLoss, MixTarget, create_loader, reference
from lumix_dali.data.files import Files
from lumix_dali.log_softmax import log_softmax_at

MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
CLASSES = 20


@pytest.fixture
def where(device):
    """torch's name of the device under test."""
    return torch.device("cuda:0" if device == "gpu" else "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """20 lossless images, one class each."""
    return ramp_samples(tmp_path_factory.mktemp("ramps"), CLASSES)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """20 JPEGs with 4:4:4, 4:2:2 and 4:2:0 chroma; every fourth is progressive, sizes are odd, some are grey."""
    root = tmp_path_factory.mktemp("jpegs")
    for number, image in enumerate(pictures(CLASSES)):
        image = image.convert("L") if number % 7 == 6 else image
        image.save(root / f"{number:02}.jpg", quality=90, subsampling=number % 3, progressive=number % 4 == 3)
    return Files(str(root), sorted(os.listdir(root)), np.arange(CLASSES), [str(k) for k in range(CLASSES)])


def pictures(count):
    """Smooth colours with a little noise, in odd sizes."""
    for number in range(count):
        rng = np.random.default_rng(number)
        size = (241 + 16 * (number % 5), 177 + 18 * (number % 3))
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
        noise = rng.normal(0, 2, (size[1], size[0], 1))
        yield Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def make(samples, where, **options):
    defaults = {"batch_size": 4, "input_size": 32, "num_threads": 2, "device": where}
    return create_loader(samples, **defaults | options)


def flat(batch):
    images, target = batch
    return [tensor.cpu().clone() for tensor in (images, *target)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        for a, b in zip(our, their, strict=True):
            assert torch.equal(a, b)


def model_of(where, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).to(where, dtype)


def oracle(logits, target, lam_r, **options):
    """Float64 losses, and gradients of their batch mean by the logits."""
    labels, partner_labels, lam0, _, kind, _ = (field.cpu().numpy() for field in target)
    loss, grad = reference.lumix_loss(
        logits.detach().double().cpu().numpy(),
        labels,
        partner_labels,
        lam0,
        kind,
        lam_r.cpu().numpy(),
        smoothing=0.1,
        **options,
    )
    return loss.mean(), grad / len(loss)


@contextlib.contextmanager
def no_waiting(where):
    """On a GPU, PyTorch raises an error on any synchronisation."""
    if where.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if where.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# From DALI to PyTorch


def test_batches_share_dalis_memory(files, where, monkeypatch):
    """Neither images nor metadata are copied out of DALI: all are views of its three outputs."""
    given, take = set(), torch.from_dlpack

    def recorded(output):
        tensor = take(output)
        given.add((tensor.untyped_storage().data_ptr(), tensor.data_ptr()))
        return tensor

    monkeypatch.setattr("lumix_dali.loading.epoch.from_dlpack", recorded)
    images, target = next(iter(make(files, where, channels_last=True, **MIX)))
    tensors = (images, *target)
    assert {tensor.device for tensor in tensors} == {where}
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {storage for storage, _ in given}
    assert len(given) == 3


def test_a_training_step_never_synchronises_and_its_loss_matches_the_oracle(files, where):
    """From the loader's batch to the optimiser's step; loss and gradient are compared in float64."""
    model, criterion = model_of(where), LUMixLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen, batches, lam_r = [], iter(make(files, where, **MIX)), torch.linspace(0, 1, 4, device=where)
    for number in range(5):
        with no_waiting(where) if number else contextlib.nullcontext():  # the first step loads kernels
            images, target = next(batches)
            logits = model(images)
            logits.retain_grad()
            loss = criterion(logits, target, lam_r)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            criterion(logits.detach(), target)  # with its own draw
        seen.append((loss, logits, target))
    for loss, logits, target in seen:
        expected, gradient = oracle(logits, target, lam_r)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(logits.grad.cpu(), gradient, atol=1e-5)


# Names of a training step's kernels: PyTorch's own, and cuBLAS's up to Ampere and from Hopper on.
TRAINING_KERNELS = ("at::native", "gemm", "nvjet")


def copies(events):
    """Copies in a Chrome trace on the streams on which PyTorch's kernels ran, and these streams."""

    def on_gpu(category):
        return [(event["name"], event["args"]["stream"]) for event in events if event.get("cat") == category]

    streams = {stream for name, stream in on_gpu("kernel") if any(word in name for word in TRAINING_KERNELS)}
    return [name for name, stream in on_gpu("gpu_memcpy") if stream in streams], streams


@pytest.mark.parametrize(
    "kernel",
    [
        "ampere_sgemm_32x32_sliced1x4_nn",
        "nvjet_tst_128x64_64x6_2x1_v_bz_TNT",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)",
    ],
)
def test_copies_are_found_in_a_trace(kernel):
    """Copies on the training stream are found by any of its kernels; copies on DALI's stream do not count."""
    events = [
        {"cat": "kernel", "name": kernel, "args": {"stream": 7}},
        {"cat": "cpu_op", "name": "mm"},
        {"cat": "kernel", "name": "void dali::SliceKernel<float>()", "args": {"stream": 20}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "args": {"stream": 20}},
    ]
    assert copies(events) == ([], {7})
    events.append({"cat": "gpu_memcpy", "name": "Memcpy DtoD", "args": {"stream": 7}})
    assert copies(events) == (["Memcpy DtoD"], {7})


@pytest.mark.gpu
def test_nothing_is_copied_on_the_training_stream(files, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    criterion, weight = LUMixLoss(), torch.randn(3 * 32 * 32, CLASSES, device="cuda", requires_grad=True)
    activity = torch.profiler.ProfilerActivity
    loader = make(files, "cuda:0", **MIX)
    for images, target in loader:  # loads kernels
        criterion(images.flatten(1) @ weight, target).backward()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        for images, target in loader:
            criterion(images.flatten(1) @ weight, target).backward()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    found, streams = copies(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    if not streams:
        pytest.skip("the profiler saw no kernel of PyTorch's: CUPTI may not be allowed here")
    assert found == []


def test_another_stream_gets_the_same_batches(files, where):
    """Batches belong to the stream that is current when they are fetched."""
    expected = [flat(batch) for batch in make(files, where, **MIX)]
    with torch.cuda.stream(torch.cuda.Stream()) if where.type == "cuda" else contextlib.nullcontext():
        found = [flat(batch) for batch in make(files, where, **MIX)]
    assert_same(found, expected)


# Against the CPU


AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "const"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
        {"cutmix_alpha": 1.0},
        {**MIX, "prob": 0.5},
        {**MIX, **AUGMENTED},
        {"color_jitter": 0.4, "grayscale_prob": 0.2},
        {"is_training": False},
    ],
    ids=["plain", "mixup", "cutmix", "mix", "augmented", "jitter", "evaluation"],
)
def test_a_batch_matches_the_cpus(files, where, options):
    """Both backends draw on the CPU: targets are equal, and so are pixels up to interpolation."""
    ours, theirs = (
        next(iter(make(files, device, batch_size=CLASSES, dtype="uint8", **options))) for device in (where, "cpu")
    )
    (images, *target), (expected, *expected_target) = (
        [batch[0], *(batch[1] if isinstance(batch[1], MixTarget) else [batch[1]])] for batch in (ours, theirs)
    )
    assert {field.device for field in (images, *target)} == {where}
    for field, wanted in zip(target, expected_target, strict=True):
        torch.testing.assert_close(field.cpu(), wanted, rtol=1e-6, atol=0)
    off = (images.cpu().float() - expected.float()).abs().mean((1, 2, 3))
    # Equalize and similar operations stretch a difference of one grey level to several.
    assert off.max() < (4 if "auto_augment" in options else 1), off


# Decoding


@pytest.mark.parametrize("subsampling", [0, 2], ids=["4:4:4", "4:2:0"])
def test_decoded_pixels_match_pillows(device, where, subsampling):
    """Bit exact on the CPU; a GPU has another inverse transform and another chroma upsampling."""
    from nvidia.dali import fn, pipeline_def

    contents = []
    for image in pictures(8):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, subsampling=subsampling)
        contents.append(np.frombuffer(file.getvalue(), np.uint8))

    @pipeline_def(batch_size=len(contents), num_threads=2, device_id=where.index)
    def define():
        encoded = fn.external_source(lambda: contents, batch=True)
        return fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", adjust_orientation=False)

    (decoded,) = define().run()
    decoded = decoded.as_cpu() if device == "gpu" else decoded
    for i, content in enumerate(contents):
        off = np.abs(decoded.at(i).astype(int) - np.asarray(Image.open(io.BytesIO(content))))
        assert off.max() == 0 if device == "cpu" else off.mean() < 1.5, off.mean()


@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_jpegs_repeat_bit_for_bit_and_resume(jpegs, where, hw_decoder_load):
    """With either decoder: the same twice, with other thread counts, and from a state taken midway."""
    options = {**MIX, "decoder": {"hw_decoder_load": hw_decoder_load}}
    loader, batches = make(jpegs, where, **options), []
    for number, batch in enumerate(loader):
        batches.append(flat(batch))
        if number == 1:
            state = loader.state_dict()
    assert_same([flat(batch) for batch in make(jpegs, where, num_threads=1, **options)], batches)
    resumed = make(jpegs, where, prefetch_queue_depth=4, **options)
    resumed.load_state_dict(state)
    assert_same([flat(batch) for batch in resumed], batches[2:])


# The loss


def case(where, dtype, batch=16):
    """Logits, a target of every kind, and noise."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(batch, CLASSES)) * 3, dtype=dtype, device=where)
    kind = torch.arange(batch, dtype=torch.int32) % 3
    box = torch.tensor([[8, 8, 24, 24]], dtype=torch.int32) * (kind == 2)[:, None]
    labels, partner_labels = torch.tensor(rng.integers(CLASSES, size=(2, batch)))
    lam0 = torch.tensor(rng.random(batch), dtype=torch.float32) * (kind > 0)
    target = MixTarget(labels, partner_labels, lam0, box.int(), kind, torch.arange(batch)).to(where)
    return logits.requires_grad_(), target, torch.tensor(rng.random(batch), dtype=torch.float32, device=where)


def captured(step, where):
    """`step` as a CUDA graph; unchanged on the CPU."""
    return step if where.type == "cpu" else benchmark.captured(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_of_the_loss_follows_its_inputs(where, dtype):
    """Forward, backward and the draw are captured once and replayed on other logits, targets and noise."""
    criterion, (logits, target, lam_r) = LUMixLoss(), case(where, dtype)
    held = {}

    def step():
        logits.grad = None
        loss = criterion(logits, target, lam_r)
        loss.backward()
        held["loss"] = loss.detach()  # the autograd graph of a warm-up must not outlive it into the capture
        held["drawn"] = criterion.draw(logits)

    replay, draws = captured(step, where), []
    for number in range(3):
        with torch.no_grad():
            logits.copy_(torch.roll(logits, 1 + number, 0))
            target.lam0.copy_(torch.roll(target.lam0, 3, 0))  # the kinds repeat every three batches
            lam_r.copy_(torch.roll(lam_r, 1, 0))
            target.labels.copy_(torch.roll(target.labels, 1, 0))
        replay()
        expected, gradient = oracle(logits, target, lam_r)
        low = dtype != torch.float32
        assert held["loss"].item() == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(logits.grad.float().cpu(), gradient, atol=1e-3 if low else 1e-5)
        draws.append(held["drawn"].cpu().clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_a_step_is_captured_while_a_loader_works(files, where):
    """DALI's threads allocate and synchronise during the capture; neither may break the other."""

    def step():
        logits.grad = None
        LUMixLoss()(logits, target, lam_r).backward()

    expected = [flat(batch) for batch in make(files, where, **MIX)]
    logits, target, lam_r = case(where, torch.float32)
    found = []
    for batch in make(files, where, **MIX):
        replay = captured(step, where)
        found.append(flat(batch))
        replay()
    assert_same(found, expected)
    np.testing.assert_allclose(logits.grad.cpu(), oracle(logits, target, lam_r)[1], atol=1e-5)


@pytest.mark.parametrize("offset", [0, 1e5])  # no sum may see the logits' own size
@pytest.mark.parametrize("classes", [1, 7, 1000, 5000, 21841])  # PyTorch has a softmax kernel for each of some ranges
def test_log_softmax_written_over_itself_equals_numpys(where, classes, offset):
    """The softmax is made in place, for which PyTorch promises nothing; the oracle computes in float64."""
    rng = np.random.default_rng(classes)
    logits = torch.tensor(rng.normal(size=(8, classes)) * 3 + offset, dtype=torch.float32, device=where)
    columns = torch.tensor(rng.integers(classes, size=(8, 2)), device=where)
    log_p, total = log_softmax_at(logits.requires_grad_(), columns, torch.float32)
    (log_p.sum() + total.sum() / classes).backward()
    exact = logits.detach().double().cpu().numpy()
    exact = exact - np.logaddexp.reduce(exact, axis=1, keepdims=True)
    chosen = (columns.cpu().numpy()[:, :, None] == np.arange(classes)).sum(1)
    np.testing.assert_allclose(log_p.detach().cpu(), np.take_along_axis(exact, columns.cpu().numpy(), 1), atol=2e-5)
    np.testing.assert_allclose(total.detach().cpu() / classes, exact.mean(1), atol=2e-5)
    np.testing.assert_allclose(logits.grad.cpu(), chosen + 1 / classes - 3 * np.exp(exact), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["softmax", "bce"])
def test_low_precision_logits_only_round_the_gradient(where, dtype, base):
    """The loss of low-precision logits is float32 and equals the oracle's on the same logits."""
    logits, target, lam_r = case(where, dtype)
    loss = LUMixLoss(base=base)(logits, target, lam_r)
    loss.backward()
    expected, gradient = oracle(logits, target, lam_r, base=base)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert logits.grad.dtype == dtype
    np.testing.assert_allclose(logits.grad.float().cpu(), gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_loss_in_float32(files, where, dtype):
    """The model's logits have low precision, but their loss still matches the oracle's."""
    model, criterion = model_of(where), LUMixLoss()
    images, target = next(iter(make(files, where, batch_size=16, **MIX)))
    lam_r = torch.linspace(0, 1, 16, device=where)
    with torch.autocast(where.type, dtype):
        logits = model(images)
        logits.retain_grad()
        loss = criterion(logits, target, lam_r)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    expected, gradient = oracle(logits, target, lam_r)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(logits.grad.float().cpu(), gradient, rtol=1e-2, atol=1e-5)


def test_the_compiled_loss_matches_the_oracle(where):
    """One graph, and on a GPU inductor's kernels; aot_eager stands in for them on the CPU."""
    if where.type == "cuda":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    backend = "inductor" if where.type == "cuda" else "aot_eager"
    compiled = torch.compile(LUMixLoss(), fullgraph=True, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, lam_r = case(where, dtype)
        loss = compiled(logits, target, lam_r)
        loss.backward()
        expected, gradient = oracle(logits, target, lam_r)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(logits.grad.float().cpu(), gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_channels_last_batches_give_the_same_logits(files, where, dtype):
    model = model_of(where)
    images = {last: next(iter(make(files, where, channels_last=last, dtype=dtype, **MIX)))[0] for last in (False, True)}
    assert torch.equal(*images.values())
    assert images[True].is_contiguous(memory_format=torch.channels_last)
    last = model.to(memory_format=torch.channels_last)(images[True].float())
    # A GPU convolves in TF32.
    torch.testing.assert_close(last, model_of(where)(images[False].float()), rtol=1e-2, atol=5e-3)


# Memory


def used_mib(where):
    """Memory of this process, and of the GPU by all processes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    host = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    free, total = torch.cuda.mem_get_info(where) if where.type == "cuda" else (0, 0)
    return host, (total - free) / 2**20


@pytest.mark.slow
def test_memory_is_flat_over_2000_batches(jpegs, where):
    """20 epochs, each with its own pipeline."""
    repeated = np.tile(np.arange(CLASSES), 20)  # 100 batches per epoch
    samples = Files(jpegs.root, [jpegs.names[i] for i in repeated], jpegs.labels[repeated], jpegs.classes)
    loader, readings = make(samples, where, **MIX), []
    for _ in range(20):
        assert sum(1 for _ in loader) == 100
        readings.append(used_mib(where))
    print("MiB of the process and of the GPU after each 100 batches:", np.round(readings).tolist())
    growth = np.subtract(readings[-1], readings[5])
    assert growth[0] < 20
    assert growth[1] < 64
