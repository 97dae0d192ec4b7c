"""The order of an epoch, as numbers: every row once, ranks alike, repeats in succession."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofb_hf.data.epochs import Batching, EpochPlan


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 3),
    workers=st.integers(1, 4),
    shuffle_buffer=st.sampled_from([1, 2, 5, 1000]),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_and_ranks_get_equally_much(
    rows, batch_size, world_size, workers, shuffle_buffer, epoch
):
    total = sum(rows)
    if total < world_size:
        rows, total = [*rows, world_size], total + world_size
    seen, lengths = [], []
    for rank in range(world_size):
        batching = Batching(batch_size, rank, world_size, workers)
        plan = EpochPlan(
            np.array(rows), batching, seed=3, epoch=epoch, shuffle_buffer=shuffle_buffer
        )
        first, last = total * rank // world_size, total * (rank + 1) // world_size
        orders = [plan.order(worker).tolist() for worker in range(workers)]
        assert [len(order) for order in orders] == [
            len(range(worker, plan.num_batches, workers)) * batch_size for worker in range(workers)
        ]
        given_out = [position for order in orders for position in order]
        repeated = len(given_out) - (last - first)
        # Whatever comes more often than once are the first positions of the rank, in their order.
        expected = Counter(range(first, last)) + Counter(
            first + i % (last - first) for i in range(repeated)
        )
        assert Counter(given_out) == expected
        seen += set(given_out)
        lengths.append(len(given_out))
    assert sorted(seen) == list(range(total))
    assert len(set(lengths)) == 1
    assert lengths[0] - total / world_size < batch_size + 1
    blocks, row, number = plan.locate(np.arange(total))
    assert sorted(zip(blocks.tolist(), row.tolist(), strict=True)) == [
        (b, r) for b, n in enumerate(rows) for r in range(n)
    ]
    assert sorted(number.tolist()) == list(range(total))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_dropping_the_last_batch_repeats_nothing(rows, batch_size, world_size, workers):
    total = sum(rows)
    if total // world_size < batch_size:
        with pytest.raises(
            ValueError, match=f"{total} training examples are too few for {world_size} processes"
        ):
            Batching(batch_size, 0, world_size, workers, drop_last=True).num_batches(total)
        return
    given_out = []
    for rank in range(world_size):
        batching = Batching(batch_size, rank, world_size, workers, drop_last=True)
        plan = EpochPlan(np.array(rows), batching, seed=3, epoch=0, shuffle_buffer=4)
        assert plan.num_batches == total // world_size // batch_size
        given_out += [
            position for worker in range(workers) for position in plan.order(worker).tolist()
        ]
    assert (
        len(given_out)
        == len(set(given_out))
        == total // world_size // batch_size * batch_size * world_size
    )


@given(
    rows=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    batching=st.builds(Batching, st.integers(1, 7), workers=st.integers(1, 3)),
    world_size=st.integers(1, 3),
    repeats=st.integers(2, 4),
)
def test_repeats_come_in_succession_and_as_many_epochs_have_every_row(
    rows, batching, world_size, repeats
):
    seen, total = Counter(), sum(rows)
    for epoch, rank, worker in product(
        range(3 * repeats), range(world_size), range(batching.workers)
    ):
        own = replace(batching, rank=rank, world_size=world_size)
        plan, plain = (
            EpochPlan(np.array(rows), own, seed=3, epoch=epoch, shuffle_buffer=8, repeats=times)
            for times in (repeats, 1)
        )
        order = plan.order(worker)
        assert len(order) == len(plain.order(worker))  # an epoch is no longer than without
        counts = plan.repetitions(order)
        assert counts.tolist() == [
            next(
                back
                for back in range(len(order) + 1)
                if back == i or order[i - back - 1] != order[i]
            )
            % repeats
            for i in range(len(order))
        ]
        seen.update(zip(plan.locate(order)[2].tolist(), counts.tolist(), strict=True))
        assert (plain.repetitions(plain.order(worker)) == 0).all()
    assert {number for number, _ in seen} == set(range(total))


def test_one_block_is_shuffled_anew_in_every_epoch():
    orders = [
        EpochPlan(np.array([40]), Batching(4), seed=0, epoch=epoch, shuffle_buffer=8)
        .order(0)
        .tolist()
        for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_a_worker_holds_no_more_than_its_buffer():
    """A row may come late, but not before it can have arrived: at most `shuffle_buffer` rows wait
    at any time."""
    plan = EpochPlan(np.array([500]), Batching(10), seed=0, epoch=0, shuffle_buffer=16)
    order = plan.order(0)
    assert (order - np.arange(500)).max() < 16
    assert np.corrcoef(order[:-1], order[1:])[0, 1] < 0.9999
    assert (np.diff(order) != 1).mean() > 0.8


def test_blocks_come_in_another_order_every_epoch():
    """Without a buffer, blocks stay whole, and it is their order alone that changes."""
    orders = []
    for epoch in range(3):
        plan = EpochPlan(np.full(20, 3), Batching(4), seed=0, epoch=epoch, shuffle_buffer=1)
        block, row, _ = plan.locate(plan.order(0))
        assert row.tolist() == [0, 1, 2] * 20
        orders.append(block[::3].tolist())
        assert sorted(orders[-1]) == list(range(20))
        assert orders[-1] != list(range(20))
    assert orders[0] != orders[1] != orders[2]


def test_too_few_examples_for_the_processes():
    with pytest.raises(
        ValueError, match="3 training examples are too few for 4 processes with batches of 2"
    ):
        Batching(2, 0, 4).num_batches(3)
