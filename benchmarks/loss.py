"""Time of the loss, forward and backward, against the losses that it replaces.

LUMixLoss, eager and compiled, is compared with what it replaces: timm's `mixup_target` with `SoftTargetCrossEntropy`,
and PyTorch's cross entropy on probabilities; on a GPU also with Liger's fused cross entropy, on hard labels only.
OpenMP's threads wait as PyTorch lets them: they spin. Every candidate includes building the target, which is new for
every batch. "graphed" is a step captured in a CUDA graph: its kernels without the time to launch them. The floor reads
the logits twice and writes the gradient once, which any loss has to do.

    python -m benchmarks.loss --quick
    python -m benchmarks.loss --batch-sizes 256,1024 --classes 1000,21841 --dtypes float32
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import harness, report
from .harness import ratio
from .report import compared, is_shown, ratio_cell, timed

if TYPE_CHECKING:
    import torch

    from lumix_dali import MixTarget

SMOOTHING = 0.1
REFERENCE, FLOOR, PROBABILITIES = "timm soft target", "floor", "torch probabilities"
PEERS = {
    REFERENCE: "timm's mixup_target with SoftTargetCrossEntropy",
    PROBABILITIES: "torch.nn.functional.cross_entropy with probability targets",
}
SECONDS = 0.3  # approximate duration of a turn


def table(result: dict[str, Any]) -> list[list[str]]:
    """One line per size and way to run the loss, with its ratio to each loss that it replaces."""
    lines = [["loss", "B", "K", "dtype", "ms", "quartiles", "of timm's", "of cross_entropy's"]]
    for row in result["rows"]:
        if row["name"] not in (*PEERS, FLOOR):
            size = [str(row["B"]), str(row["K"]), row["dtype"]]
            ratios = [ratio_cell(row, REFERENCE), ratio_cell(row, PROBABILITIES)]
            lines.append([row["name"], *size, *timed(row), *ratios])
    return lines


def to_best_peer(result: dict[str, Any]) -> list[dict[str, Any]]:
    """LUMix' time relative to the fastest loss it can replace, one row per size and way to run it.

    A step captured in a CUDA graph is compared only with captured steps.

    Returns:
        name, B, K, dtype, peer (its name), and the ratio round by round: values, median, quartiles.
    """
    ours = []
    for row in result["rows"]:
        graphed = row["name"].endswith(" graphed")
        names = [name + " graphed" * graphed for name in PEERS]
        where = {key: row[key] for key in ("B", "K", "dtype")}
        rivals = [r for r in result["rows"] if r["name"] in names and r["values"] and where.items() <= r.items()]
        if row["name"].startswith("LUMix") and row["values"] and rivals:
            best = min(rivals, key=lambda rival: rival["median"])
            peer = best["name"].removesuffix(" graphed")
            ours.append(dict(name=row["name"], **where, peer=peer, **ratio(row["values"], best["values"])))
    return ours


def reading(result: dict[str, Any]) -> report.Reading:
    """One sentence about all sizes for each way to run the loss."""
    ratios, said = to_best_peer(result), []
    for name in dict.fromkeys(row["name"] for row in ratios):
        rows = [row for row in ratios if row["name"] == name]
        if len(rows) == 1:
            said += compared(f"{name} ÷ the best peer", rows[0], "faster", "slower")
            continue
        medians = sorted(row["median"] for row in rows)
        faster = sum(is_shown(row) and row["median"] < 1 for row in rows)
        slower = sum(is_shown(row) and row["median"] > 1 for row in rows)
        said.append(
            f"{name} takes {medians[0]:.2f} to {medians[-1]:.2f} times the time of the best peer: faster at {faster} "
            f"of {len(rows)} sizes, slower at {slower}, no difference shown at {len(rows) - faster - slower}."
        )
    sizes = {peer: sum(row["peer"] == peer for row in ratios) for peer in PEERS}
    if best := [f"{PEERS[peer]} ({count})" for peer, count in sizes.items() if count]:
        said.append(f"The best peer, and at how many sizes: {'; '.join(best)}.")
    return report.Reading(said, "python -m benchmarks.cost --parts step --model M weighs the loss against a whole step")


def chart(result: dict[str, Any]) -> report.Chart:
    """LUMix' time relative to the fastest loss that it can replace, the slowest size on top."""
    ratios = to_best_peer(result)
    dtype = ratios[0]["dtype"] if ratios else ""  # the others differ little
    rows = sorted((row for row in ratios if row["dtype"] == dtype), key=lambda row: -row["median"])
    dots = [report.dot(f"{row['name']}, {row['B']:,} × {row['K']:,}", row) for row in rows]
    faster = sum(row["median"] < 1 for row in rows)
    title = f"The loss is faster than the best it replaces at {faster} of {len(rows)} sizes"
    xlabel = f"time, forward + backward, {dtype}, ÷ that of the fastest loss it replaces"
    return report.Chart(title if faster else "Time of the loss", [report.Panel(xlabel, dots, line=1.0, log=True)])


KIND = report.Kind(table, reading, chart)


class Turn:
    """One candidate on one problem."""

    def __init__(
        self,
        loss: Callable,
        shape: tuple[int, int],
        dtype: str,
        device: str,
        graphed: bool = False,
    ):
        self.loss, self.shape, self.dtype, self.device, self.graphed = loss, shape, dtype, device, graphed
        self.count, self.run = 1, self.step

    def step(self) -> None:
        """Forward and backward."""
        self.logits.grad = None
        self.loss(self.logits, self.target).backward()

    def prepare(self) -> dict[str, Any]:
        """Creates the problem, and measures the number of steps per turn."""
        import torch

        from lumix_dali import MixTarget

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
        logits = torch.randn(self.shape, generator=generator).to(self.device, getattr(torch, self.dtype))
        self.logits = logits.requires_grad_()
        for _ in range(3):
            self.step()
        self.logits.grad = None
        if self.graphed:
            self.run = captured(self.step)
        self.count = max(1, round(1000 * SECONDS / self.measure()))
        return {}

    def measure(self) -> float:
        """Milliseconds per step."""
        return harness.milliseconds(self.run, self.count, self.device)


class Floor(Turn):
    """The memory traffic that every loss needs."""

    def step(self) -> None:
        """Reads the logits twice and writes a tensor of the gradient's size."""
        import torch

        if self.logits.grad is None:
            self.logits.grad, self.twin = torch.empty_like(self.logits), self.logits.detach().clone()
        torch.add(self.logits.detach(), self.twin, out=self.logits.grad)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step in a CUDA graph, following PyTorch's notes on graphs; a loader may run at the same time."""
    import torch

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


def timm_loss(logits: "torch.Tensor", target: "MixTarget") -> "torch.Tensor":
    """timm: dense soft targets, then soft target cross entropy; its λ weighs the canvas."""
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    dense = mixup_target(target.labels, logits.shape[1], 1 - target.lam0[:, None], SMOOTHING)
    return SoftTargetCrossEntropy()(logits, dense)


def torch_loss(logits: "torch.Tensor", target: "MixTarget") -> "torch.Tensor":
    """PyTorch: cross entropy on class probabilities."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), target.dense(logits.shape[1], SMOOTHING))


def liger_loss(logits: "torch.Tensor", target: "MixTarget") -> "torch.Tensor":
    """Liger's fused cross entropy, which only takes hard labels."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(label_smoothing=SMOOTHING)(logits, target.labels)


def candidates(
    batch_sizes: Sequence[int], classes: Sequence[int], dtypes: Sequence[str], device: str
) -> Iterator[harness.Candidate]:
    """Measures every candidate on every problem."""
    import torch

    from lumix_dali import LUMixLoss

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
                    turn = Turn(loss, (b, k), dtype, device, name.endswith("graphed"))
                    yield harness.Candidate(
                        name, turn.measure, turn.prepare, where=dict(B=b, K=k, dtype=dtype), excused=loss is liger_loss
                    )
                turn = Floor(timm_loss, (b, k), dtype, device)
                yield harness.Candidate(FLOOR, turn.measure, turn.prepare, where=dict(B=b, K=k, dtype=dtype))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    # Not passive, as beside loaders: a loss has the cores to itself, and to wake a thread takes 100 µs.
    os.environ.pop("OMP_WAIT_POLICY", None)
    parser = harness.parser("loss", __doc__)
    add = parser.add_argument
    add("--batch-sizes", type=harness.positives, default=[128, 256, 1024, 4096], metavar="LIST")
    add("--classes", type=harness.positives, default=[10, 1000, 21841], metavar="LIST")
    add("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"], metavar="LIST")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batch_sizes, args.classes = 1, args.batch_sizes[:1], args.classes[:1]
        args.dtypes = args.dtypes[:1]
    problems = len(args.batch_sizes) * len(args.classes) * len(args.dtypes)
    harness.begin("loss", args, 20 + problems * 5 * (args.rounds + 3) * 0.5, f"the loss at {problems} sizes")
    with harness.one_line(parser):
        import torch

        device = harness.resolve_device(args.device)
        chosen = harness.named(candidates(args.batch_sizes, args.classes, args.dtypes, device), args.only)
        result = harness.compare(
            chosen,
            kind="loss",
            unit="ms",
            command=harness.command("loss", argv),
            out=args.out,
            rounds=args.rounds,
            references=[REFERENCE, FLOOR, PROBABILITIES],
            allow_dirty=args.allow_dirty,
            settings=dict(device=device, smoothing=SMOOTHING, torch_threads=torch.get_num_threads()),
        )
    report.finish(result)


if __name__ == "__main__":
    main()
