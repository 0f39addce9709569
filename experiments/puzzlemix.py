"""Puzzle Mix (Kim, Choo & Song, ICML 2020, arXiv 2009.06962), for Table 6 of LUMix (arXiv 2211.15846).

Each image is cut into blocks. A labelling of the blocks, z in {0, 1/2, 1}, is the sample's share of each block: it
keeps salient blocks, prefers equal labels for neighbours, and follows a prior whose mean is the drawn λ. Then each
image's salient blocks are transported to where its own label is above 0.

The labelling minimises Σ_i U_i(z_i) + Σ_ij w_ij (z_i - z_j)². The pair cost is convex, so the minimum is a cut of
Ishikawa's graph (PAMI 2003), which SciPy finds exactly; the authors' α-β swap is approximate.
"""

from collections.abc import Callable
from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Tensor

from lumix_dali import MixTarget

OTHER = 3  # MixTarget's kind: mixed by something other than a box or one weight


class Settings(NamedTuple):
    """The settings, by default the authors' for ImageNet.

    Attributes:
        labels: number of labels of a block.
        beta: weight of label smoothness, divided by 16 times the number of blocks along a side.
        gamma: weight of the images' discontinuities in the smoothness term.
        eta: weight of the prior.
        neighbourhood: side of the pixel groups whose difference is a discontinuity, at most the side of a block.
        transport_cost: ε, the cost of moving a block across the image.
        alpha: α of Beta(α, α), the distribution of the drawn λ.
        grids: numbers of blocks along a side; one is drawn per batch.
    """

    labels: int = 3
    beta: float = 1.2
    gamma: float = 0.5
    eta: float = 0.2
    neighbourhood: int = 2
    transport_cost: float = 0.8
    alpha: float = 1.0
    grids: tuple[int, ...] = (2, 4, 8, 16)


AUTHORS = Settings()


class Energy(NamedTuple):
    """The energy of a batch's labellings, in integers as in the authors' code.

    Attributes:
        unary: int64 [B, N, N, L], cost of each label of each block.
        down: int64 [B, N - 1, N], weight of (z_i - z_j)² between a block and the block below.
        right: int64 [B, N, N - 1], the same for the block to the right.
    """

    unary: np.ndarray
    down: np.ndarray
    right: np.ndarray


def saliency(loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Square root of the mean squared gradient over the channels, [B, H, W].

    Args:
        loss: a scalar function of `inputs`; the model should be in evaluation mode.
        inputs: [B, C, H, W].
    """
    inputs = inputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(inputs), inputs)
    return gradient.square().mean(1).sqrt()


def puzzle_mix(
    images: Tensor,
    labels: Tensor,
    salient: Tensor,
    rng: np.random.Generator,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    settings: Settings = AUTHORS,
) -> tuple[Tensor, MixTarget]:
    """Draws partners, λ and a grid for a batch, and mixes it.

    Args:
        images: float [B, C, S, S], normalised; S is a multiple of the grid that is drawn.
        labels: int64 [B].
        salient: [B, S, S], from `saliency`.
        rng: random generator of all draws.
        mean, std: normalisation of the images, scalars or [C, 1, 1]; discontinuities are measured in [0, 1].
        settings: by default the authors'.

    Returns:
        Mixed images, and their target: kind 3, no box, λ0 = 1 - the share of the sample's own label.

    Raises:
        ValueError: the images are not square, or their side is not a multiple of the grid.

    Note:
        Partners form one cycle; the authors' permutation may pair a sample with itself. Grid and λ are drawn once
        per batch, as in their code.
    """
    order = rng.permutation(len(images))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    lam, grid = rng.beta(settings.alpha, settings.alpha), int(rng.choice(settings.grids))
    places = torch.from_numpy(partner).to(labels.device)
    mixed, own = mix_pairs(images, salient, places, lam, grid, mean, std, settings)
    kind = torch.full_like(labels, OTHER, dtype=torch.int32)
    return mixed, MixTarget(labels, labels[places], 1 - own, kind.new_zeros(len(labels), 4), kind, places)


def mix_pairs(
    images: Tensor,
    salient: Tensor,
    partner: Tensor,
    lam: float,
    grid: int,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    settings: Settings = AUTHORS,
) -> tuple[Tensor, Tensor]:
    """Mixes each image with its partner; see `puzzle_mix`.

    Args:
        partner: int64 [B], indices in the batch.
        lam: λ in [0, 1], the prior's mean of the sample's own share.
        grid: N, the number of blocks along a side.

    Returns:
        Mixed images, and float32 [B], the share of each sample's own label: the mean of its mask.
    """
    size = images.size(-1)
    if images.size(-2) != size or size % grid:
        raise ValueError(
            f"images of {images.size(-2)} x {size}: Puzzle Mix needs squares, a multiple "
            f"of the {grid} blocks along a side; give such images"
        )
    share = F.avg_pool2d(salient[:, None], size // grid)[:, 0]
    share = share / share.sum((1, 2), keepdim=True)
    found = energy(images * std + mean, share, partner, lam, settings)
    steps = np.stack([cut(*(term[i] for term in found)) for i in range(len(images))])
    mask = 1 - torch.from_numpy(steps).to(images) / (settings.labels - 1)
    own = move(images, transport(mask, share, settings.transport_cost))
    other = move(images[partner], transport(1 - mask, share[partner], settings.transport_cost))
    mask = F.interpolate(mask[:, None], size=size)
    return mask * own + (1 - mask) * other, mask.mean((1, 2, 3))


def energy(images: Tensor, share: Tensor, partner: Tensor, lam: float, settings: Settings) -> Energy:
    """The cost of every labelling (Eq. 4 and 5 of the paper), scaled and truncated to integers as in the authors' code.

    Args:
        images: [B, C, S, S] in [0, 1].
        share: [B, N, N], each block's share of its image's saliency.
        partner, lam, settings: as for `mix_pairs`.

    Returns:
        `Energy`; label l means that (L - 1 - l) / (L - 1) of the block is the sample's own.
    """
    grid, size = share.size(-1), images.size(-1)
    beta = settings.beta / grid / 16
    side = min(settings.neighbourhood, size // grid)
    pooled = F.avg_pool2d(images, side)
    own, other = share.clone(), share[partner]  # cost of losing the sample's block, and the partner's
    weights = []
    for axis in (1, 2):
        # gap[a, b]: difference of image a from image b across the border between two blocks; 1 is the sample.
        pair = (pooled[partner], pooled)
        gap = [[beta * settings.gamma * _gap(a, b, axis, size // grid // side) for b in pair] for a in pair]
        first, second = (_sides(term, axis) for term in (own, other))
        first[0].add_((gap[0][1] + gap[0][0]) / 2)
        second[0].add_((gap[1][0] + gap[1][1]) / 2)
        first[1].add_((gap[1][0] + gap[0][0]) / 2)
        second[1].add_((gap[0][1] + gap[1][1]) / 2)
        weights.append((gap[1][0] + gap[0][1] - gap[1][1] - gap[0][0]) / 2 + beta)
    scale = 1000 * grid**2
    steps = np.linspace(0, 1, settings.labels)
    lost, kept = own.cpu().numpy(), other.cpu().numpy()
    unary = np.stack(
        [
            (1 - step) * kept + step * lost + settings.eta * prior / grid**2
            for step, prior in zip(steps, _prior(lam, settings.labels), strict=True)
        ],
        -1,
    )
    return Energy(
        *(
            (scale * term).astype(np.int32).astype(np.int64)
            for term in (unary, *(weight.cpu().numpy() for weight in weights))
        )
    )


def _sides(blocks: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Views of the blocks on either side of the borders along `axis`."""
    count = blocks.size(axis) - 1
    return blocks.narrow(axis, 0, count), blocks.narrow(axis, 1, count)


def _gap(first: Tensor, second: Tensor, axis: int, block: int) -> Tensor:
    """Mean |first - second| of adjacent pixels across each border along `axis`: [B, ...], one value per border."""
    before, _ = _sides(first, axis + 1)
    _, after = _sides(second, axis + 1)
    across = (before - after).abs().mean(1)
    borders = across[:, block - 1 :: block] if axis == 1 else across[:, :, block - 1 :: block]
    return F.avg_pool2d(borders, (1, block) if axis == 1 else (block, 1))


def _prior(lam: float, labels: int, eps: float = 1e-8) -> list[float]:
    """-log of the binomial distribution of a block's label, l of L - 1 steps away from the sample."""
    n = labels - 1
    return [-np.log(comb(n, away) * lam ** (n - away) * (1 - lam) ** away + eps) for away in range(labels)]


def cost(labels: np.ndarray, unary: np.ndarray, down: np.ndarray, right: np.ndarray) -> float:
    """The energy of one labelling, integers [N, N] in [0, L)."""
    own = np.take_along_axis(unary, labels[..., None], -1).sum()
    pairs = (down * np.diff(labels, axis=0) ** 2).sum() + (right * np.diff(labels, axis=1) ** 2).sum()
    return own + pairs / (unary.shape[-1] - 1) ** 2


def cut(unary: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The labelling with the minimum `cost`.

    Args:
        unary: integers [N, N, L].
        down, right: non-negative integers [N - 1, N] and [N, N - 1].

    Returns:
        int64 [N, N] in [0, L).

    Note:
        Block i has one node for each step l = 1 .. L - 1, on the source's side if z_i ≥ l. With these nodes,
        (z_i - z_j)² = Σ_kl |[z_i ≥ k] - [z_j ≥ l]| + q(z_i) + q(z_j), q(z) = z² - (L - 1) z.
        Usually, edges of infinite capacity keep a block's nodes in order. They are not needed here: the sum is linear
        in the number of nodes on the source's side, so a cut out of order is never cheaper than both ordered ones.
    """
    grid, n = unary.shape[0], unary.shape[-1] - 1
    graph = _ishikawa(grid, n)
    degree = np.zeros((grid, grid), np.int64)
    for one, weight in ((degree[:-1], down), (degree[1:], down), (degree[:, :-1], right), (degree[:, 1:], right)):
        one += weight
    level = np.arange(n + 1)
    chain = n**2 * unary + degree[..., None] * (level**2 - n * level)
    chain = chain - chain.min(-1, keepdims=True)  # a constant for each block; capacities are at least 0
    pairs = np.concatenate([down.ravel(), right.ravel()])
    capacities = np.concatenate([chain.ravel(), np.repeat(pairs, n**2), np.repeat(pairs, n**2)])
    data = capacities[graph.source].astype(np.int32)
    count = n * grid**2
    network = sparse.csr_array((data, graph.indices, graph.indptr), shape=(count + 2, count + 2))
    residual = network - maximum_flow(network, count, count + 1).flow
    residual.eliminate_zeros()
    reached = np.zeros(count + 2, bool)
    reached[breadth_first_order(residual, count, return_predecessors=False)] = True
    return reached[:count].reshape(grid, grid, n).sum(-1)


class _Graph(NamedTuple):
    """Rows of a sparse matrix, and for each entry the index of its capacity in `cut`'s list."""

    indices: np.ndarray
    indptr: np.ndarray
    source: np.ndarray


@lru_cache
def _ishikawa(grid: int, n: int) -> _Graph:
    """The graph of `cut`: a chain from source to sink through each block's nodes, and pair edges in both directions."""
    nodes = np.arange(n * grid**2).reshape(grid, grid, n)
    first, last = n * grid**2, n * grid**2 + 1
    ends = np.full((grid, grid, 1), first), np.full((grid, grid, 1), last)
    chain = np.concatenate([ends[0], nodes, ends[1]], -1)
    edges = [(chain[..., :-1].ravel(), chain[..., 1:].ravel())]
    adjacent = [(nodes[:-1], nodes[1:]), (nodes[:, :-1], nodes[:, 1:])]
    tail = np.concatenate([np.repeat(one.reshape(-1, n), n, 1).ravel() for one, _ in adjacent])
    head = np.concatenate([np.tile(other.reshape(-1, n), n).ravel() for _, other in adjacent])
    edges += [(tail, head), (head, tail)]
    tails, heads = (np.concatenate([edge[side] for edge in edges]) for side in (0, 1))
    order = np.lexsort((heads, tails))
    indptr = np.searchsorted(tails[order], np.arange(last + 2))
    return _Graph(heads[order].astype(np.int32), indptr.astype(np.int32), order)


def transport(mask: Tensor, share: Tensor, eps: float) -> Tensor:
    """The destination of each block: the authors' approximate assignment, in N rounds of bids and rejections.

    Args:
        mask: [B, N, N], the image's label for each block.
        share: [B, N, N], each block's share of the image's saliency.
        eps: cost of moving across the image.

    Returns:
        [B, N², N²] of 0 and 1: block i moves to j. Positions where the mask is 0 may receive none.
    """
    grid = mask.size(-1)
    place = torch.stack(torch.meshgrid(*[torch.arange(grid, device=mask.device)] * 2, indexing="ij"), -1)
    place = place.reshape(-1, 2).to(mask.dtype)
    far = (place[:, None] - place).square().sum(-1) / (grid - 1) ** 2
    wanted = (mask > 0).to(mask.dtype).flatten(1)
    costs = eps * far - share.flatten(1)[:, :, None] * wanted[:, None, :]
    for _ in range(grid):
        bids = torch.zeros_like(costs).scatter_(-1, costs.argmin(-1, keepdim=True), 1)
        wins = torch.zeros_like(costs).scatter_(-2, (bids * costs).argmin(-2, keepdim=True), 1) * bids
        costs = costs + (1 - wins) * bids
    return wins


def move(images: Tensor, plan: Tensor) -> Tensor:
    """Images [B, C, S, S] with their blocks moved by `plan` [B, N², N²]; positions without a block are 0."""
    grid = round(plan.size(-1) ** 0.5)
    batch, channels, size, _ = images.shape
    cells = images.reshape(batch, channels, grid, size // grid, grid, size // grid).transpose(3, 4)
    cells = cells.reshape(batch, channels, grid**2, -1)
    moved = torch.einsum("bij,bcip->bcjp", plan, cells)
    moved = moved.reshape(batch, channels, grid, grid, size // grid, size // grid).transpose(3, 4)
    return moved.reshape(images.shape)
