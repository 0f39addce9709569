"""In which order a rank reads the samples of a source: pure functions of (seed, epoch, rank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import checks


@dataclass(frozen=True)
class Order:
    """One permutation of all samples per epoch, dealt out to the ranks in turn.

    Training shuffles with (seed, epoch), alike on all ranks; every rank gets the same number of batches. With
    `drop_last` the tail that does not fill a batch on every rank is left out (timm's rule); without it the order is
    continued from its start by fewer samples than there are ranks. Evaluation deals all samples out once, in order;
    ranks may then differ by one sample.

    With `repeats`, training follows timm's `RepeatAugSampler`: each sample stands `repeats` times in a row before
    the dealing, and an epoch keeps its length (from 256 samples on, cut to a multiple of 256), so that it shows
    about n / repeats of the samples.

    Args:
        n: number of samples.
        batch_size: samples per batch and rank.
        shuffle: draw a new order in every epoch.
        drop_last: leave out the incomplete last batch.
        seed: of the order, < 2**32; alike on all ranks.
        rank, world_size: which part of each epoch this is.
        repeats: repeated augmentation; 0: off.

    Raises:
        ValueError: an argument outside its range; with `drop_last`, fewer samples than one batch on every rank.
    """

    n: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeats: int = 0

    def __post_init__(self):
        # A SeedSequence takes a word of 32 bits from a smaller number, and two from a larger one: [5 * 2**32 + 7, 3]
        # would draw as [7, 5, 3].
        checks.whole("seed", self.seed, 0, 2**32)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: give a rank in [0, world_size), world_size={self.world_size}")
        if self.drop_last and len(self) == 0:
            raise ValueError(
                f"batch_size={self.batch_size}: {self.n} samples do not fill a batch on each of "
                f"{self.world_size} rank(s); give a smaller batch, or drop_last=False"
            )

    def __len__(self) -> int:
        """Number of batches."""
        if self.drop_last:
            return (self._share if self.repeats else self.n // self.world_size) // self.batch_size
        return -(-self._share // self.batch_size)

    @property
    def _share(self) -> int:
        """Samples of this rank per epoch, before the incomplete batch is left out."""
        if self.repeats and self.n >= 256:
            return self.n // 256 * 256 // self.world_size
        if self.shuffle:
            return -(-self.n // self.world_size)
        return len(self._dealt(range(self.n)))

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of this rank's samples in `epoch`, int64, in the order they are read."""
        if not self.shuffle:
            order = np.asarray(self._dealt(np.arange(self.n)))
        elif self.repeats:
            # Repetitions of a sample go to different ranks, whatever else the order is.
            order = np.repeat(self._shuffled(epoch), self.repeats)
            order = self._even(order)[self.rank :: self.world_size]
        else:
            order = self._shuffled(epoch)
            kept = len(self) * self.batch_size * self.world_size
            order = np.asarray(self._dealt(order[:kept] if self.drop_last else self._even(order)))
        return order[: min(self._share, len(self) * self.batch_size)]

    def _even(self, order: np.ndarray) -> np.ndarray:
        """Continued from its start until every rank has the same number."""
        return np.resize(order, -(-len(order) // self.world_size) * self.world_size)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All samples in the order of `epoch`, alike on all ranks."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)

    def _dealt(self, order: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        """This rank's part of an order."""
        return order[self.rank :: self.world_size]


@dataclass(frozen=True)
class Window(Order):
    """Shards in random order, their samples shuffled within a window; each rank reads neighbours.

    For storage where a jump costs much: a rank opens its shards one after another, and of each only the part that
    it reads. A sample moves by less than `window` places, so that shards must be written in random order
    (``lumix-dali convert`` does). In evaluation each rank reads one block of neighbours.

    Args:
        counts: samples of each shard.
        window: places within which samples are shuffled.
    """

    counts: tuple[int, ...] = ()
    window: int = 4096

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        counts = np.array(self.counts)
        starts = np.cumsum(counts) - counts
        order = np.concatenate([np.arange(starts[k], starts[k] + counts[k]) for k in rng.permutation(len(counts))])
        # A stable sort of jittered places: a window without edges.
        return order[np.argsort(np.arange(self.n) + rng.uniform(0, self.window, self.n), kind="stable")]

    def _dealt(self, order: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        n = len(order)
        return order[n * self.rank // self.world_size : n * (self.rank + 1) // self.world_size]
