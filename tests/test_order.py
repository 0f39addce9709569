"""Orders distribute samples fairly, by brute force over sample counts, batch sizes, ranks and epochs."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumix_dali.data.order import Order, Window


def epochs_of(n, batch_size, world_size, drop_last, shuffle=True, epochs=4, seed=0):
    """[epoch][rank]: the samples that each rank reads."""
    orders = [Order(n, batch_size, shuffle, drop_last, seed, rank, world_size) for rank in range(world_size)]
    for epoch in range(epochs):
        dealt = [order.epoch(epoch) for order in orders]
        for order, indices in zip(orders, dealt, strict=True):
            assert len(order) == -(-len(indices) // batch_size)
        yield dealt


def assert_fair_training(n, batch_size, world_size, drop_last):
    if drop_last and n < world_size * batch_size:
        message = (
            rf"batch_size={batch_size}: {n} samples do not fill a batch on each of {world_size} rank\(s\); "
            "give a smaller batch, or drop_last=False"
        )
        with pytest.raises(ValueError, match=message):
            Order(n, batch_size, True, drop_last, world_size=world_size)
        return
    for dealt in epochs_of(n, batch_size, world_size, drop_last):
        assert len({len(indices) for indices in dealt}) == 1
        times = np.bincount(np.concatenate(dealt), minlength=n)
        assert len(times) == n
        if drop_last:
            assert times.max() == 1
            assert (times == 0).sum() < world_size * batch_size
            assert len(dealt[0]) % batch_size == 0
        else:
            assert times.min() >= 1
            assert times.sum() - n < world_size
            assert times.max() <= 2 or n < world_size


def assert_exact_evaluation(n, batch_size, world_size):
    for dealt in epochs_of(n, batch_size, world_size, drop_last=False, shuffle=False, epochs=2):
        assert sorted(np.concatenate(dealt)) == list(range(n))
        assert all((np.diff(indices) > 0).all() for indices in dealt)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


CASES = [
    *itertools.product([1, 2, 3, 5, 7, 8, 9, 16, 23, 24, 25, 31, 32, 33, 40], [1, 2, 3, 8], [1, 2, 3, 4]),
    (97, 8, 4),
    (96, 8, 4),
    (127, 8, 4),
    (128, 8, 4),
]


@pytest.mark.parametrize("drop_last", [True, False])
def test_training_is_fair_by_brute_force(drop_last):
    for case in CASES:
        assert_fair_training(*case, drop_last)


def test_evaluation_is_exact_by_brute_force():
    for case in CASES:
        assert_exact_evaluation(*case)


@settings(max_examples=100, deadline=None, database=None)
@given(n=st.integers(1, 400), batch_size=st.integers(1, 50), world_size=st.integers(1, 12), drop_last=st.booleans())
def test_any_order_is_fair(n, batch_size, world_size, drop_last):
    assert_fair_training(n, batch_size, world_size, drop_last)
    assert_exact_evaluation(n, batch_size, world_size)


@pytest.mark.parametrize("n", [24, 97])
def test_epochs_and_seeds_differ_and_ranks_are_disjoint(n):
    seen = set()
    for seed in range(4):
        for dealt in epochs_of(n, 4, 2, True, seed=seed):
            seen |= {tuple(indices.tolist()) for indices in dealt}
            assert not set(dealt[0]) & set(dealt[1])
    assert len(seen) == 4 * 4 * 2


def test_what_is_left_out_changes():
    """No sample is always the one that drop_last leaves out, and each is equally likely in each position."""
    left_out = [set(range(7)) - set(dealt[0].tolist()) for dealt in epochs_of(7, 3, 1, True, epochs=100)]
    assert set.union(*left_out) == set(range(7))
    first = np.bincount([dealt[0][0] for dealt in epochs_of(7, 3, 1, True, epochs=700)], minlength=7)
    assert ((60 < first) & (first < 150)).all()  # 100 each on average


def test_an_epoch_is_a_pure_function_of_its_number():
    order = Order(40, 4, seed=3)
    third = order.epoch(2)
    for epoch in (5, 0, 2):
        again = order.epoch(epoch)
    np.testing.assert_array_equal(again, third)


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world(rank, world_size):
    with pytest.raises(ValueError, match=rf"^(rank={rank}|world_size={world_size}): give a "):
        Order(100, 1, rank=rank, world_size=world_size)


@pytest.mark.parametrize("repeats", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("n", [10, 255, 256, 700, 1024])
def test_repeated_augmentation_matches_timms(monkeypatch, n, world_size, repeats):
    """Given the same permutation, each rank reads the same samples as with timm's sampler."""
    torch = pytest.importorskip("torch")
    sampler = pytest.importorskip("timm.data.distributed_sampler").RepeatAugSampler
    shuffled = np.random.default_rng([5, 2]).permutation(n)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(shuffled))
    for rank in range(world_size):
        timms = sampler(range(n), world_size, rank, num_repeats=repeats)
        timms.set_epoch(2)
        options = dict(seed=5, rank=rank, world_size=world_size, repeats=repeats)
        kept = Order(n, 4, drop_last=False, **options)
        assert kept.epoch(2).tolist() == list(timms)
        assert len(kept) == -(-len(timms) // 4)
        if len(timms) >= 4:
            dropped = Order(n, 4, **options)
            assert len(dropped) == len(timms) // 4
            assert dropped.epoch(2).tolist() == list(timms)[: len(timms) // 4 * 4]


# The window


@st.composite
def windows(draw):
    """Arguments of `Window` that give every rank some samples."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum))
    return dict(
        n=sum(counts),
        counts=tuple(counts),
        window=draw(st.integers(1, 60)),
        seed=draw(st.integers(0, 5)),
        batch_size=draw(st.integers(1, 6)),
        drop_last=False,
    )


@settings(max_examples=200, deadline=None, database=None)
@given(options=windows(), world_size=st.integers(1, 5), epoch=st.integers(0, 4))
def test_a_window_covers_every_sample_and_deals_blocks(options, world_size, epoch):
    n = options["n"]
    ranks = [Window(**options, rank=rank, world_size=world_size).epoch(epoch).tolist() for rank in range(world_size)]
    dealt = list(itertools.chain(*ranks))
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(dealt[:n]) == list(range(n))  # then some samples from the start again
    assert dealt[n:] == list(itertools.islice(itertools.cycle(dealt[:n]), len(dealt) - n))
    assert len(dealt) - n < world_size
    for batch in range(1, 4):
        dropped = [
            options | dict(batch_size=batch, drop_last=True, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        if n < batch * world_size:
            continue
        ranks = [Window(**each).epoch(epoch).tolist() for each in dropped]
        assert {len(rank) for rank in ranks} == {n // (batch * world_size) * batch}
        assert list(itertools.chain(*ranks)) == dealt[: n // (batch * world_size) * batch * world_size]


@settings(max_examples=200, deadline=None, database=None)
@given(options=windows(), epoch=st.integers(0, 4))
def test_a_sample_moves_by_less_than_the_window(options, epoch):
    """The order of shards is drawn from (seed, epoch); with a window of one, samples keep theirs."""
    shards = np.random.default_rng([options["seed"], epoch]).permutation(len(options["counts"]))
    starts = np.cumsum([0, *options["counts"]])
    unmoved = [i for k in shards for i in range(starts[k], starts[k + 1])]
    order = Window(**options).epoch(epoch)
    np.testing.assert_array_equal(Window(**options | dict(window=1)).epoch(epoch), unmoved)
    places = np.empty(options["n"], int)
    places[order] = np.arange(options["n"])
    assert np.abs(places[unmoved] - np.arange(options["n"])).max() < options["window"]
    np.testing.assert_array_equal(Window(**options).epoch(epoch), order)  # a pure function


@settings(max_examples=100, deadline=None, database=None)
@given(options=windows(), world_size=st.integers(1, 5))
def test_a_window_is_exact_in_evaluation(options, world_size):
    ranks = [Window(**options, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    dealt = [rank.epoch(3).tolist() for rank in ranks]
    assert list(itertools.chain(*dealt)) == list(range(options["n"]))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert [len(rank) for rank in ranks] == [-(-len(each) // options["batch_size"]) for each in dealt]


@settings(max_examples=100, deadline=None, database=None)
@given(options=windows(), repeats=st.integers(2, 4), epoch=st.integers(0, 3))
def test_repeats_of_a_window_go_to_different_ranks(options, repeats, epoch):
    ranks = [Window(**options, repeats=repeats, rank=rank, world_size=repeats) for rank in range(repeats)]
    order, n = Window(**options).epoch(epoch), options["n"]
    share = n // 256 * 256 // repeats if n >= 256 else -(-n // repeats)  # timm's RepeatAugSampler
    for rank in ranks:
        np.testing.assert_array_equal(rank.epoch(epoch), order[:share])


def test_a_window_shuffles_and_every_epoch_differs():
    options = dict(n=4000, batch_size=1, counts=(1000,) * 4, window=400)
    order = Window(**options).epoch(0)
    moved = np.abs(np.argsort(order) - np.argsort(Window(**options | dict(window=1)).epoch(0)))
    assert 60 < moved.mean() < 140  # two draws from 400 positions differ by 133 on average, less at the ends
    orders = {tuple(Window(**options, seed=seed).epoch(epoch)) for seed in range(2) for epoch in range(3)}
    assert len(orders) == 6


@pytest.mark.parametrize("kind", [Order, partial(Window, counts=(3, 5))])
def test_a_seed_fits_in_one_word(kind):
    """SeedSequence([5 * 2**32 + 7, 3, 0]) is SeedSequence([7, 5, 3]); so a seed of more than 32 bits is refused."""
    same = [np.random.SeedSequence(words).generate_state(4).tolist() for words in ([5 * 2**32 + 7, 3, 0], [7, 5, 3])]
    assert same[0] == same[1]
    with pytest.raises(ValueError, match="seed=21474836487: give a whole number >= 0 and < 4294967296"):
        kind(8, 2, seed=5 * 2**32 + 7)
    with pytest.raises(ValueError, match="seed=-1"):
        kind(8, 2, seed=-1)
    orders = {tuple(kind(8, 2, seed=seed).epoch(0)) for seed in (0, 7, 2**32 - 1)}
    assert len(orders) == 3


def test_a_window_of_two_swaps_an_eighth_of_the_neighbours():
    """i comes after i + 1 if u_i > 1 + u_(i + 1), for two draws from [0, 2)."""
    order = Window(n=4000, batch_size=1, counts=(4000,), window=2).epoch(0)
    swapped = np.diff(np.argsort(order)) < 0
    assert abs(swapped.mean() - 1 / 8) < 5 * np.sqrt(1 / 8 * 7 / 8 / 4000)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_window_in_pieces_is_the_same(monkeypatch, world_size):
    """At millions of samples, a rank's part is made in pieces."""
    options = dict(n=500, batch_size=3, counts=(120, 80, 300), window=9, world_size=world_size)
    whole = [Window(**options, rank=rank).epoch(2) for rank in range(world_size)]
    monkeypatch.setattr("lumix_dali.data.order._PIECE", 7)
    for rank in range(world_size):
        np.testing.assert_array_equal(Window(**options, rank=rank).epoch(2), whole[rank])
