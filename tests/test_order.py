"""Orders deal samples out fairly, by brute force over numbers of samples, batch sizes, ranks and epochs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumix_dali.data.order import Order


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
        message = (rf"batch_size={batch_size}: {n} samples do not fill a batch on each of {world_size} rank\(s\); "
                   "give a smaller batch, or drop_last=False")
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


CASES = [*itertools.product([1, 2, 3, 5, 7, 8, 9, 16, 23, 24, 25, 31, 32, 33, 40], [1, 2, 3, 8], [1, 2, 3, 4]),
         (97, 8, 4), (96, 8, 4), (127, 8, 4), (128, 8, 4)]


@pytest.mark.parametrize("drop_last", [True, False])
def test_training_is_fair_by_brute_force(drop_last):
    for case in CASES:
        assert_fair_training(*case, drop_last)


def test_evaluation_is_exact_by_brute_force():
    for case in CASES:
        assert_exact_evaluation(*case)


@settings(max_examples=100, deadline=None, database=None)
@given(n=st.integers(1, 400), batch_size=st.integers(1, 50), world_size=st.integers(1, 12),
       drop_last=st.booleans())
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
    """No sample is always the one that drop_last leaves out, and each is as likely in each place."""
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
    message = rf"rank={rank}: give a rank in \[0, world_size\), world_size={world_size}"
    with pytest.raises(ValueError, match=message):
        Order(100, 1, rank=rank, world_size=world_size)


@pytest.mark.parametrize("repeats", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("n", [10, 255, 256, 700, 1024])
def test_repeated_augmentation_is_timms(monkeypatch, n, world_size, repeats):
    """Given the same permutation, each rank reads what timm's sampler gives it."""
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
