"""The plan is a permutation per epoch, whoever reads it and wherever reading begins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan import BatchPlan, draw

few = settings(max_examples=40, deadline=None)

plans = st.builds(
    BatchPlan,
    samples_per_shard=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any).map(tuple),
    digest=st.sampled_from(["a", "b"]),
    seed=st.integers(-3, 3),
    global_batch=st.integers(1, 40),
    block_shards=st.integers(1, 5),
)


@few
@given(plans, st.integers(0, 5))
def test_each_epoch_holds_each_sample_once(plan, epoch):
    positions = np.arange(plan.samples) + epoch * plan.samples
    assert sorted(plan.at(positions)) == list(range(plan.samples))


@few
@given(plans)
def test_batches_are_the_sequence_of_epochs_cut_evenly(plan):
    steps = 3 * plan.samples // plan.global_batch + 1
    sequence = np.concatenate([plan.batch(step) for step in range(steps)])
    np.testing.assert_array_equal(sequence, plan.at(np.arange(steps * plan.global_batch)))


@few
@given(plans, st.integers(0, 1000), st.sampled_from([1, 2, 4, 8]))
def test_any_number_of_workers_shares_the_same_batch(plan, step, workers):
    if workers > plan.global_batch:
        with pytest.raises(ValueError, match=f"0 of {workers}"):
            plan.slice(step, 0, workers)
        return
    shares = [plan.slice(step, worker, workers) for worker in range(workers)]
    rows = np.concatenate([rows for rows, _ in shares])
    np.testing.assert_array_equal(rows, np.arange(plan.global_batch))
    samples = np.concatenate([samples for _, samples in shares])
    np.testing.assert_array_equal(samples, plan.batch(step))
    sizes = [len(rows) for rows, _ in shares]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1  # every worker takes every step


@few
@given(plans, st.integers(0, 60), st.integers(1, 8))
def test_a_fresh_plan_goes_on_where_another_stopped(plan, step, more):
    unbroken = [plan.batch(s) for s in range(step + more)]
    fresh = BatchPlan(
        plan.samples_per_shard, plan.digest, plan.seed, plan.global_batch, plan.block_shards
    )
    for s in range(step, step + more):
        np.testing.assert_array_equal(fresh.batch(s), unbroken[s])


@few
@given(plans)
def test_a_block_holds_whole_shards(plan):
    """What bounds the files in use: at no point are more shards begun and not yet finished."""
    shard_of = np.repeat(np.arange(len(plan.samples_per_shard)), plan.samples_per_shard)
    order = shard_of[plan.at(np.arange(plan.samples))]
    places = [np.flatnonzero(order == shard) for shard in np.unique(order)]
    begun = np.array([(at[0] <= place <= at[-1]) for at in places for place in range(plan.samples)])
    assert begun.reshape(len(places), -1).sum(0).max() <= plan.block_shards


def test_epochs_seeds_and_data_shuffle_differently():
    def epoch(number, digest="a", seed=0):
        return BatchPlan((50, 50), digest, seed, 100).batch(number).tolist()

    orders = [epoch(0), epoch(1), epoch(0, digest="b"), epoch(0, seed=1), list(range(100))]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_shuffle_is_uniform():
    """Each of 6 samples is first in a sixth of 6,000 epochs; neighbours do not stay together."""
    plan = BatchPlan((2, 2, 2), "", 0, 6)
    order = plan.at(np.arange(36_000)).reshape(6_000, 6)
    counts = np.array(
        [[(order[:, place] == sample).sum() for sample in range(6)] for place in range(6)]
    )
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    follows = (order[:, 1:] == order[:, :-1] + 1).sum() / 6_000
    assert abs(follows - 5 / 6) < 0.06  # 5 pairs, each in that order side by side with chance 1/6


def test_known_orders():
    """The words of Philox are the same everywhere; these must never change, or resumed runs do."""
    plan = BatchPlan((3, 2, 4), "0123456789abcdef", 7, 5, block_shards=2)
    assert [plan.batch(step).tolist() for step in (0, 1, 1_000_000)] == KNOWN


KNOWN = [[0, 3, 4, 2, 1], [8, 6, 5, 7, 2], [7, 6, 5, 8, 5]]


def test_far_steps_cost_what_near_ones_do():
    plan = BatchPlan((2048,) * 1000, "", 0, 256)
    batch = plan.batch(10**12)
    assert len(set(batch.tolist())) == 256


WORKING = {"samples_per_shard": (3,), "digest": "", "seed": 0, "global_batch": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_shard": ()}, "no samples"),
        ({"samples_per_shard": (0, 0)}, "2 shards, all empty"),
        ({"global_batch": 0}, "global_batch"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**WORKING | arguments)


def test_draws_are_uniform_and_depend_on_seed_purpose_and_position():
    positions = np.arange(100_000)
    x = draw(0, "caption", positions)
    assert x.min() >= 0
    assert x.max() < 1
    counts, _ = np.histogram(x, 20, (0, 1))
    assert np.abs(counts - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.02
    for other in (draw(1, "caption", positions), draw(0, "noise", positions)):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.02
    np.testing.assert_array_equal(draw(0, "caption", positions[500:600]), x[500:600])
