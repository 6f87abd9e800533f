"""The plan is a permutation per epoch, whoever reads it and wherever reading begins."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan import BatchPlan, BucketedPlan, dealt, draw

few = settings(max_examples=40, deadline=None)

plans = st.builds(
    BatchPlan,
    samples_per_shard=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any).map(tuple),
    digest=st.sampled_from(["a", "b"]),
    seed=st.integers(-3, 3),
    global_batch=st.integers(1, 40),
    block_shards=st.integers(1, 5),
)


@st.composite
def bucketed_plans(draw):
    """Up to 5 buckets, with fewer samples than a batch or more, in shards that may lack any."""
    shards = draw(st.integers(1, 6))
    counts = st.lists(st.integers(0, 9), min_size=shards, max_size=shards).filter(any).map(tuple)
    return BucketedPlan(
        samples_per_shard=draw(st.lists(counts, min_size=1, max_size=5).map(tuple)),
        digest=draw(st.sampled_from(["a", "b"])),
        seed=draw(st.integers(-3, 3)),
        global_batch=draw(st.integers(1, 40)),
        block_shards=draw(st.integers(1, 5)),
    )


all_plans = plans | bucketed_plans()


def bucket_of(plan, samples):
    """Which bucket each sample is in, by the numbers of samples alone."""
    sizes = [sum(counts) for counts in plan.samples_per_shard]
    return np.searchsorted(np.cumsum(sizes), samples, side="right")


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
@given(all_plans, st.integers(0, 1000), st.sampled_from([1, 2, 4, 8]))
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


@given(st.integers(1, 40), st.integers(1, 40))
def test_micro_batches_are_dealt_evenly_and_in_order(parts, workers):
    if workers > parts:
        with pytest.raises(ValueError, match=f"worker 0 of {workers} at {parts} micro-batches"):
            dealt(parts, 0, workers)
        return
    shares = [dealt(parts, worker, workers) for worker in range(workers)]
    assert [part for share in shares for part in share] == list(range(parts))
    assert {len(share) for share in shares} <= {parts // workers, -(-parts // workers)}


@few
@given(all_plans, st.integers(0, 60), st.integers(1, 8))
def test_a_fresh_plan_goes_on_where_another_stopped(plan, step, more):
    unbroken = [(plan.epoch(s), plan.batch(s).tolist()) for s in range(step + more)]
    fresh = replace(plan)
    resumed = [(fresh.epoch(s), fresh.batch(s).tolist()) for s in range(step, step + more)]
    assert resumed == unbroken[step:]


def epochs(plan, count):
    """The global batches of the first epochs, epoch by epoch."""
    found, step = [[] for _ in range(count)], 0
    while (epoch := plan.epoch(step)) < count:
        found[epoch].append(plan.batch(step))
        step += 1
    return found


@few
@given(bucketed_plans())
def test_a_batch_is_of_one_bucket_and_a_bucket_has_a_sequence_of_its_own(plan):
    batches = [batch for epoch in epochs(plan, 3) for batch in epoch]
    buckets = [set(bucket_of(plan, batch).tolist()) for batch in batches]
    assert all(len(bucket) == 1 for bucket in buckets)
    for bucket, counts in enumerate(plan.samples_per_shard):
        own = [batch for batch, of in zip(batches, buckets, strict=True) if of == {bucket}]
        first = sum(map(sum, plan.samples_per_shard[:bucket]))
        alone = BatchPlan(
            counts, plan.digest, plan.seed, plan.global_batch, plan.block_shards, bucket
        )
        for number, batch in enumerate(own):
            np.testing.assert_array_equal(batch, first + alone.batch(number))


@few
@given(bucketed_plans())
def test_each_epoch_covers_each_sample_once_apart_from_what_fills_its_last_batch(plan):
    """A sample comes early only as what fills up a batch of its own bucket, and then not again."""
    shown = Counter()
    sizes = [sum(counts) for counts in plan.samples_per_shard]
    for epoch, batches in enumerate(epochs(plan, 4)):
        of_bucket = Counter(int(bucket_of(plan, batch[:1])[0]) for batch in batches)
        for batch in batches:
            shown.update(batch.tolist())
        for bucket, size in enumerate(sizes):
            first = sum(sizes[:bucket])
            times = [shown[sample] for sample in range(first, first + size)]
            assert min(times) >= epoch + 1
            assert max(times) - min(times) <= 1
            assert sum(times) - (epoch + 1) * size < plan.global_batch  # less than one batch more
            more = -(-(epoch + 1) * size // plan.global_batch) + (
                epoch * -size // plan.global_batch
            )
            assert of_bucket[bucket] == more
        assert len(batches) == of_bucket.total()


@few
@given(plans, st.integers(0, 10_000))
def test_a_single_bucket_is_the_plan_without_buckets(plan, step):
    one = BucketedPlan(
        (plan.samples_per_shard,), plan.digest, plan.seed, plan.global_batch, plan.block_shards
    )
    assert one.epoch(step) == plan.epoch(step)
    np.testing.assert_array_equal(one.batch(step), plan.batch(step))


def test_steps_are_dealt_to_the_buckets_at_random():
    plan = BucketedPlan(((300,), (100,), (100,)), "a", 0, 10)
    orders = [[plan.turn(50 * epoch + step)[0] for step in range(50)] for epoch in range(200)]
    assert all(Counter(order) == {0: 30, 1: 10, 2: 10} for order in orders)
    assert len(set(map(tuple, orders))) == 200
    share = np.mean(np.array(orders) == 0, axis=0)  # of epochs, in which a step is of bucket 0
    assert np.abs(share - 0.6).max() < 5 * (0.6 * 0.4 / 200) ** 0.5
    other = BucketedPlan(((300,), (100,), (100,)), "a", 1, 10)
    assert [other.turn(step)[0] for step in range(50)] != orders[0]


def test_buckets_read_the_same_shards_at_the_same_time():
    """Or each would keep files of its own open."""
    plan = BucketedPlan(((10,) * 40, (5,) * 40), "a", 0, 10, block_shards=4)
    shard_of = np.concatenate([np.repeat(np.arange(40), n) for n in (10, 5)])
    read = [[], []]
    for step in range(60):
        read[plan.turn(step)[0]] += shard_of[plan.batch(step)].tolist()
    orders = [list(dict.fromkeys(shards)) for shards in read]
    for first in range(0, 40, 4):
        assert set(orders[0][first : first + 4]) == set(orders[1][first : first + 4])


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


def test_known_orders_of_buckets():
    plan = BucketedPlan(((3, 2, 4), (0, 2, 1)), "0123456789abcdef", 7, 5, block_shards=2)
    assert [plan.batch(step).tolist() for step in (0, 1, 2, 1_000_000)] == KNOWN_BUCKETS


KNOWN_BUCKETS = [[9, 10, 11, 11, 10], [0, 3, 4, 2, 1], [8, 6, 5, 7, 2], [6, 8, 5, 0, 4]]


@pytest.mark.parametrize(
    "plan",
    [
        BatchPlan((2048,) * 1000, "", 0, 256),
        BucketedPlan(((1024,) * 1000, (700,) * 1000, (324,) * 1000), "", 0, 256),
    ],
)
def test_far_steps_cost_what_near_ones_do(plan):
    batch = plan.batch(10**12)
    assert len(set(batch.tolist())) == 256
    assert plan.epoch(10**12) == 10**12 * 256 // 2_048_000


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
    bucketed = WORKING | arguments
    with pytest.raises(ValueError, match=message):
        BucketedPlan(**bucketed | {"samples_per_shard": (bucketed["samples_per_shard"],)})


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
