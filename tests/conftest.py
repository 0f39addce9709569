"""Small graphs fed by hand: what goes in and what comes out are NumPy arrays, on either backend."""

import inspect
import signal

import numpy as np
import pytest

from lumix_dali.loading.plan import Plan
from lumix_dali.target import MixTarget

# A shell's background job ignores SIGINT, one under nohup SIGHUP, and so would the processes that tests start in
# order to interrupt them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """DALI's backend; "gpu" is skipped where there is none."""
    if request.param == "gpu":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from threads, which cost much where the CPUs are shared."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SmallFeed:
    """A feed for `train_pipeline` and `val_pipeline`: these files or encoded images over and over, labelled by place.

    Args:
        images: paths, or uint8 arrays; None: the graph is not run.
        batch_sizes: of the batches, the last one again and again.
    """

    def __init__(self, images, size, mixing=None, training=True, batch_sizes=(8,), paths=True, on_gpu=False):
        self.plan, self.gives_paths = Plan(0, 0, 0, size, mixing, training, on_gpu), paths
        self.images, self.batch_sizes, self.planned = images, batch_sizes, []

    def __call__(self, info):
        sizes = self.batch_sizes
        count = sizes[min(info.iteration, len(sizes) - 1)]
        places = (np.arange(count) + info.iteration * sizes[0]) % len(self.images)
        images = [self.images[i] for i in places]
        if self.gives_paths:
            images = [np.frombuffer(str(path).encode(), np.uint8) for path in images]
        self.planned.append(dict(zip(self.plan.inputs, self.plan.batch(info.iteration, places, places), strict=True)))
        return images, *self.planned[-1].values()


@pytest.fixture
def graph(device):
    """`graph(operation, batch_size, …)` builds a pipeline of one mixing operation and returns its `run`."""

    def build(operation, batch_size=8, *, seed=0, conditionals=False, **options):
        return _build(operation, batch_size, device, seed, conditionals, options)

    return build


def _build(operation, batch_size, device, seed, conditionals, options):
    """A function of (images, labels, **further inputs) that gives (mixed images, MixTarget) in NumPy.

    Args:
        operation: as `fn.mix`; after images and labels, parameters without a default are inputs too.
        options: keyword arguments of `operation`.
    """
    from nvidia.dali import fn, pipeline_def

    required = [
        p.name
        for p in inspect.signature(operation).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    further = [name for name in required[2:] if name not in options]

    # a depth of one lets `run` be fed batch by batch
    @pipeline_def(
        batch_size=batch_size,
        num_threads=2,
        device_id=0 if device == "gpu" else None,
        seed=seed,
        prefetch_queue_depth=1,
        enable_conditionals=conditionals,
    )
    def define():
        images = fn.external_source(name="images", layout="HWC")
        images = images.gpu() if device == "gpu" else images
        labels = fn.external_source(name="labels")
        inputs = {name: fn.external_source(name=name) for name in further}
        mixed, target = operation(images, labels, **inputs, **options)
        return mixed, *target

    pipe = define()
    pipe.build()

    def run(images, labels, **inputs):
        images = list(images)  # a list may hold images of unequal size
        outputs = pipe.run(images=images, labels=labels, **inputs)
        mixed, *target = (np.array(output.as_cpu().as_array()) for output in outputs)
        return mixed, MixTarget(*target)

    return run
