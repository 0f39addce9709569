"""Small graphs fed by hand: NumPy arrays in, NumPy arrays out, on either backend."""

import inspect
import signal

import numpy as np
import pytest

from lumix_dali.loading.plan import Plan
from lumix_dali.target import MixTarget

# A shell's background job ignores SIGINT, and a job under nohup ignores SIGHUP. Child processes inherit this, but tests
# interrupt theirs.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """DALI's backend; "gpu" is skipped on machines without one."""
    if request.param == "gpu":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from threads, and threads are expensive on shared CPUs."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SmallFeed:
    """A feed for `train_pipeline` and `val_pipeline`: repeats these files or encoded images, labelled by position.

    Args:
        images: paths, or uint8 arrays; None if the graph is not run.
        batch_sizes: sizes of the batches; the last one repeats.
    """

    def __init__(self, images, size, mixing=None, training=True, batch_sizes=(8,), paths=True):
        self.plan, self.gives_paths = Plan(0, 0, 0, size, mixing, training), paths
        self.contents, self.batch_sizes, self.planned = images, batch_sizes, []

    def places(self, info):
        sizes = self.batch_sizes
        count = sizes[min(info.iteration, len(sizes) - 1)]
        return (np.arange(count) + info.iteration * sizes[0]) % len(self.contents)

    def images(self, info):
        images = [self.contents[i] for i in self.places(info)]
        return [np.frombuffer(str(path).encode(), np.uint8) for path in images] if self.gives_paths else images

    def arrays(self, info, names):
        places = self.places(info)
        self.planned.append(self.plan.batch(info.iteration, places, places, np.ones(len(places), bool)))
        return [self.planned[-1][name] for name in names]


@pytest.fixture
def graph(device):
    """`graph(operation, batch_size, …)` builds a pipeline of one mixing operation and returns its `run`."""

    def build(operation, batch_size=8, *, seed=0, conditionals=False, **options):
        return _build(operation, batch_size, device, seed, conditionals, options)

    return build


def _build(operation, batch_size, device, seed, conditionals, options):
    """A function of (images, labels, **further inputs) that returns (mixed images, MixTarget) in NumPy.

    Args:
        operation: such as `fn.mix`; parameters without a default after images and labels are also inputs.
        options: keyword arguments of `operation`.
    """
    from nvidia.dali import fn, pipeline_def

    required = [
        p.name
        for p in inspect.signature(operation).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    further = [name for name in required[2:] if name not in options]

    # a queue depth of one allows feeding `run` batch by batch
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
        images = list(images)  # a list may hold images of different sizes
        outputs = pipe.run(images=images, labels=labels, **inputs)
        mixed, *target = (np.array(output.as_cpu().as_array()) for output in outputs)
        return mixed, MixTarget(*target)

    return run
