"""Forward and backward of the loss: time, and peak memory beyond the logits and their gradient.

LUMixLoss, eager and compiled, is compared with what it replaces: timm's `mixup_target` with `SoftTargetCrossEntropy`,
and PyTorch's cross entropy on probabilities; on a GPU also with Liger's fused cross entropy, on hard labels only.
Every candidate includes building the target, which is new for every batch. "graphed" is a step captured in a CUDA
graph: its kernels without the time to launch them. The floor reads the logits twice and writes the gradient once,
which any loss has to do.

    python -m benchmarks.loss --out FILE.json
    python -m benchmarks.loss --batch-sizes 256,1024 --classes 1000,21841 --dtypes float32 --out FILE.json
"""

import argparse
import shlex
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumix_dali import LUMixLoss, MixTarget

from . import harness, readings

SMOOTHING = 0.1
REFERENCE, FLOOR, PROBABILITIES = "timm soft target", "floor", "torch probabilities"
SECONDS = 0.3  # approximate duration of a turn


class PeakBytes(TorchDispatchMode):
    """Tracks the bytes of tensors that operators create and that are alive at the same time (eager mode)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            where, size = storage.data_ptr(), storage.nbytes()
            if where not in known and where not in self.seen and size:
                self.seen.add(where)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, where, size)
        return result

    def _free(self, where: int, size: int) -> None:
        self.seen.discard(where)
        self.alive -= size


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def peak_bytes(step: Callable[[], None], device: str, compiled: bool) -> int | None:
    """Bytes that a step holds at its peak, without the logits; None if they cannot be measured."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if compiled:  # its allocations bypass the dispatcher
        return None
    with PeakBytes() as counter:
        step()
    return counter.peak


class Turn:
    """One candidate on one problem."""

    def __init__(
        self,
        loss: Callable,
        shape: tuple[int, int],
        dtype: str,
        device: str,
        compiled: bool = False,
        graphed: bool = False,
    ):
        self.loss, self.shape, self.device, self.compiled, self.graphed = loss, shape, device, compiled, graphed
        self.dtype = getattr(torch, dtype)
        self.count, self.run = 1, self.step

    def step(self) -> None:
        """Forward and backward."""
        self.logits.grad = None
        self.loss(self.logits, self.target).backward()

    def prepare(self) -> dict[str, Any]:
        """Creates the problem, and measures the memory of a step and the number of steps per turn."""
        batch_size, classes = self.shape
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(classes, (batch_size,), generator=generator)
        box = torch.tensor([[0, 0, 112, 112]], dtype=torch.int32).repeat(batch_size, 1)
        target = MixTarget(
            labels,
            labels.flip(0),
            torch.rand(batch_size, generator=generator),
            box,
            torch.full((batch_size,), 2, dtype=torch.int32),
            torch.arange(batch_size).flip(0),
        )
        self.target = target.to(self.device)
        logits = torch.randn(self.shape, generator=generator).to(self.device, self.dtype)
        self.logits = logits.requires_grad_()
        for _ in range(3):
            self.step()
        self.logits.grad = None
        peak = None if self.graphed else peak_bytes(self.step, self.device, self.compiled)
        if self.graphed:
            self.run = captured(self.step)
        self.count = max(1, round(1000 * SECONDS / self.measure()))
        gradient = logits.numel() * logits.element_size()
        return dict(peak_bytes=peak, beyond_gradient=None if peak is None else peak - gradient)

    def measure(self) -> float:
        """Milliseconds per step."""
        return harness.milliseconds(self.run, self.count, self.device)


class Floor(Turn):
    """The memory traffic that every loss needs."""

    def step(self) -> None:
        """Reads the logits twice and writes a tensor of the gradient's size."""
        if self.logits.grad is None:
            self.logits.grad, self.twin = torch.empty_like(self.logits), self.logits.detach().clone()
        torch.add(self.logits.detach(), self.twin, out=self.logits.grad)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step in a CUDA graph, following PyTorch's notes on graphs; a loader may run at the same time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # In the default mode any thread's allocation or synchronisation fails the capture, and DALI's threads do both.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def timm_loss(logits: torch.Tensor, target: MixTarget) -> torch.Tensor:
    """timm: dense soft targets, then soft target cross entropy; its λ weighs the canvas."""
    dense = mixup_target(target.labels, logits.shape[1], 1 - target.lam0[:, None], SMOOTHING)
    return SoftTargetCrossEntropy()(logits, dense)


def torch_loss(logits: torch.Tensor, target: MixTarget) -> torch.Tensor:
    """PyTorch: cross entropy on class probabilities."""
    return F.cross_entropy(logits.float(), target.dense(logits.shape[1], SMOOTHING))


def liger_loss(logits: torch.Tensor, target: MixTarget) -> torch.Tensor:
    """Liger's fused cross entropy, which only takes hard labels."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(label_smoothing=SMOOTHING)(logits, target.labels)


def candidates(
    batch_sizes: Sequence[int], classes: Sequence[int], dtypes: Sequence[str], device: str
) -> Iterator[harness.Candidate]:
    """Measures every candidate on every problem."""
    criterion = LUMixLoss(smoothing=SMOOTHING)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True)
    losses: list[tuple[str, Callable]] = [
        ("LUMix eager", criterion),
        ("LUMix compiled", compiled),
        (REFERENCE, timm_loss),
        (PROBABILITIES, torch_loss),
    ]
    if device != "cpu":
        losses += [
            ("LUMix graphed", criterion),
            (f"{REFERENCE} graphed", timm_loss),
            ("Liger, hard labels", liger_loss),
        ]
    for dtype in dtypes:
        for k in classes:
            for b in batch_sizes:
                for name, loss in losses:
                    turn = Turn(loss, (b, k), dtype, device, loss is compiled, name.endswith("graphed"))
                    yield harness.Candidate(
                        name, turn.measure, turn.prepare, where=dict(B=b, K=k, dtype=dtype), excused=loss is liger_loss
                    )
                turn = Floor(timm_loss, (b, k), dtype, device)
                yield harness.Candidate(FLOOR, turn.measure, turn.prepare, where=dict(B=b, K=k, dtype=dtype))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_arguments(parser)
    add = parser.add_argument
    add("--batch-sizes", type=harness.positives, default=[128, 256, 1024, 4096], metavar="LIST")
    add("--classes", type=harness.positives, default=[10, 1000, 21841], metavar="LIST")
    add("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"], metavar="LIST")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batch_sizes, args.classes = 1, args.batch_sizes[:1], args.classes[:1]
    device = harness.resolve_device(args.device)
    result = harness.compare(
        list(candidates(args.batch_sizes, args.classes, args.dtypes, device)),
        kind="loss",
        unit="ms",
        command=shlex.join(["python", "-m", "benchmarks.loss", *(sys.argv[1:] if argv is None else argv)]),
        out=args.out,
        rounds=args.rounds,
        references=[REFERENCE, FLOOR, PROBABILITIES],
        allow_dirty=args.allow_dirty,
        settings=dict(device=device, smoothing=SMOOTHING, torch_threads=torch.get_num_threads()),
    )
    print(readings.report(result))


if __name__ == "__main__":
    main()
