"""The order in which a rank reads the samples of a source: pure functions of (seed, epoch, rank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import checks

_PIECE = 1 << 18  # positions that are sorted at once


@dataclass(frozen=True)
class Order:
    """One permutation of all samples per epoch, dealt to the ranks in turn.

    Training shuffles with (seed, epoch), equally on all ranks, and every rank gets the same number of batches. With
    `drop_last` the samples that do not fill a batch on every rank are left out, as in timm. Without it the ranks are
    evened out by repeating samples from the start of the order, fewer than there are ranks. Evaluation deals every
    sample once, in order; the shares of the ranks may then differ by one sample.

    With `repeats`, training follows timm's `RepeatAugSampler`: every sample is repeated `repeats` times in a row before
    dealing, and the length of an epoch stays the same (cut to a multiple of 256 if there are at least 256 samples), so
    an epoch shows about n / repeats of the samples.

    Args:
        n: number of samples.
        batch_size: samples per batch and rank.
        shuffle: draw a new order in every epoch.
        drop_last: leave out the incomplete last batch.
        seed: of the order, < 2**32; the same on all ranks.
        rank, world_size: this process's part of each epoch.
        repeats: repeated augmentation; 0: off.

    Raises:
        ValueError: an argument is out of range; with `drop_last`, there is not one batch for each rank.
    """

    n: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeats: int = 0

    def __post_init__(self) -> None:
        # A SeedSequence takes a word of 32 bits from a smaller number, and two from a larger one: [5 * 2**32 + 7, 3]
        # would draw as [7, 5, 3].
        checks.assign(
            self,
            batch_size=checks.whole("batch_size", self.batch_size, 1),
            seed=checks.whole("seed", self.seed, 0, 2**32),
            rank=checks.whole("rank", self.rank, 0),
            world_size=checks.whole("world_size", self.world_size, 1),
            repeats=checks.whole("num_aug_repeats", self.repeats, 0),
        )
        if self.rank >= self.world_size:
            raise ValueError(f"rank={self.rank}: give a rank in [0, world_size), world_size={self.world_size}")
        if self.drop_last and len(self) == 0:
            raise ValueError(
                f"batch_size={self.batch_size}: {self.n} samples do not fill a batch on each of "
                f"{self.world_size} rank(s); give a smaller batch, or drop_last=False"
            )

    def __len__(self) -> int:
        """Number of batches."""
        if self.drop_last:
            return (self._per_rank if self.repeats else self.n // self.world_size) // self.batch_size
        return -(-self._per_rank // self.batch_size)

    @property
    def _per_rank(self) -> int:
        """Number of this rank's samples per epoch, before the incomplete batch is left out."""
        if self.repeats and self.n >= 256:
            return self.n // 256 * 256 // self.world_size
        if self.shuffle:
            return -(-self.n // self.world_size)
        return len(self._dealt(range(self.n)))

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of this rank's samples in `epoch`, int64, in reading order."""
        if not self.shuffle:
            order = np.asarray(self._dealt(np.arange(self.n)))
        elif self.repeats:
            # Not `_dealt`: the repetitions of a sample go to different ranks, even in a `Window`.
            order = np.repeat(self._shuffled(epoch), self.repeats)
            order = self._even(order)[self.rank :: self.world_size]
        else:
            order = self._shuffled(epoch)
            kept = len(self) * self.batch_size * self.world_size
            order = np.asarray(self._dealt(order[:kept] if self.drop_last else self._even(order)))
        return order[: min(self._per_rank, len(self) * self.batch_size)]

    def _even(self, order: np.ndarray) -> np.ndarray:
        """The order, repeated from its start until all ranks get the same number of samples."""
        return np.resize(order, -(-len(order) // self.world_size) * self.world_size)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All samples in the order of `epoch`, the same on all ranks."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)

    def _dealt(self, order: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        """This rank's part of an order."""
        return order[self.rank :: self.world_size]


@dataclass(frozen=True)
class Window(Order):
    """Shards in random order, with their samples shuffled within a window; each rank reads consecutive samples.

    This is for storage with slow random access: a rank opens its shards one after another. A sample moves by less than
    `window` places, so the shards must be written in random order, as ``lumix-dali convert`` does. In evaluation each
    rank reads one contiguous block.

    Args:
        counts: samples of each shard.
        window: places within which samples are shuffled.
    """

    counts: tuple[int, ...] = ()
    window: int = 4096

    def __post_init__(self) -> None:
        checks.assign(self, window=checks.whole("window", self.window, 1))
        super().__post_init__()

    def epoch(self, epoch: int) -> np.ndarray:
        """As `Order`; without repetitions a rank makes only its own part."""
        count = len(self) * self.batch_size * self.world_size if self.drop_last else self._per_rank * self.world_size
        if not self.shuffle or self.repeats or count > self.n:
            return super().epoch(epoch)
        block = self._dealt(range(count))
        return self._block(epoch, block[0], block[-1] + 1)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return self._block(epoch, 0, self.n)

    def _block(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions `start` to `stop` of the epoch's order, in pieces that take little memory."""
        order = np.empty(stop - start, np.int64)
        size = max(_PIECE, 4 * self.window)
        for k in range(0, len(order), size):
            order[k : k + size] = self._piece(epoch, start + k, min(start + k + size, stop))
        return order

    def _piece(self, epoch: int, start: int, stop: int) -> np.ndarray:
        bits = np.random.PCG64([self.seed, epoch])
        rng = np.random.Generator(bits)
        counts = np.array(self.counts)
        shards = rng.permutation(len(counts))
        # A stable sort of jittered positions is a window without edges. Nothing moves by `window` or more, so only
        # these positions can get to this piece; `advance` skips the jitter of the others.
        low, high = max(0, start - self.window), min(self.n, stop + self.window)
        bits.advance(low)
        jittered = np.arange(low, high) + rng.uniform(0, self.window, high - low)
        positions = low + np.argsort(jittered, kind="stable")[start - low : stop - low]
        ends = np.cumsum(counts[shards])
        number = np.searchsorted(ends, positions, side="right")
        before = np.cumsum(counts) - counts  # samples before each shard
        return np.asarray(positions - (ends - counts[shards])[number] + before[shards[number]])

    def _dealt(self, order: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        n = len(order)
        return order[n * self.rank // self.world_size : n * (self.rank + 1) // self.world_size]
