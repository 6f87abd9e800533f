"""Metrics against known answers: closed forms, copies, and estimates whose bias would show."""

import numpy as np
import pytest

from evaluation import metrics
from evaluation.metrics import Interval, interval, kid, paired_difference

DRAWS = np.random.default_rng(7)


def normal(count, width, mean=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)) + mean


@pytest.mark.parametrize(
    ("degrees", "confidence", "table"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (7, 0.95, 2.3646),
        (15, 0.95, 2.1314),
        (30, 0.99, 2.7500),
        (5, 0.9, 2.0150),
    ],
)
def test_student_t_is_that_of_the_tables(degrees, confidence, table):
    assert metrics.student_t(degrees, confidence) == pytest.approx(table, abs=2e-4)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(1).standard_normal((2000, 8)) + 3
    covered = [it.low <= 3 <= it.high for it in map(interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_an_interval_of_too_little_or_of_nan_is_refused(values):
    with pytest.raises(ValueError, match="at least 2 finite"):
        interval(values)


def test_a_share_has_an_interval_even_where_all_succeed():
    perfect = metrics.proportion(np.ones(512))
    assert (perfect.mean, perfect.high) == pytest.approx((1.0, 1.0))
    assert perfect.low == pytest.approx(
        1 - 1.96**2 / (512 + 1.96**2), abs=1e-4
    )  # Wilson, closed form at 1
    half = metrics.proportion([0, 1] * 50)
    assert (half.low, half.high) == (
        pytest.approx(0.4038, abs=1e-3),
        pytest.approx(0.5962, abs=1e-3),
    )


def test_a_paired_difference_is_sharper_than_its_parts():
    luck = normal(512, 1)[:, 0]
    champion = luck + 0.1 * normal(512, 1, seed=1)[:, 0]
    candidate = luck + 0.1 * normal(512, 1, seed=2)[:, 0] + 0.05
    found = paired_difference(candidate, champion)
    assert isinstance(found, Interval)
    assert found.blocks == 16
    assert 0 < found.low < 0.05 < found.high < 0.09
    assert paired_difference(champion, champion).high == 0
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(champion, candidate[:100])


def test_paired_blocks_are_taken_as_they_are():
    found = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], blocks=None)
    assert (found.mean, found.blocks) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.3027 / 3**0.5, abs=1e-3)


def test_kid_of_one_distribution_is_zero_on_average_and_not_of_two():
    same = np.concatenate(
        [kid(normal(640, 16, seed=s), normal(640, 16, seed=100 + s), block=32) for s in range(8)]
    )
    found = interval(same)
    assert found.low <= 0 <= found.high
    assert same.min() < 0  # unbiased: it falls below zero as often as above
    assert (
        interval(kid(normal(640, 16), normal(640, 16, mean=0.5, seed=1), block=32)).low
        > 5 * found.high
    )


def test_kid_is_unbiased_at_every_block_size():
    """Width 1: with k(a, b) = (ab + 1)^3 the squared MMD of N(m, 1) and N(0, 1) is that of their
    first three moments.
    """
    x, y = normal(60_000, 1, mean=0.4, seed=3), normal(60_000, 1, seed=4)
    moments = np.array([0.4, 1 + 0.16, 3 * 0.4 + 0.4**3]) - np.array([0.0, 1.0, 0.0])
    exact = (np.array([3, 3, 1]) * moments**2).sum()
    for block in (4, 50, 500):
        blocks = kid(x, y, block=block)
        assert abs(blocks.mean() - exact) < 4 * blocks.std(ddof=1) / len(blocks) ** 0.5
        assert blocks.mean() == pytest.approx(exact, rel=0.15)


def test_kid_equals_its_definition():
    x, y = normal(6, 3), normal(6, 3, seed=1)
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    within = lambda z: np.mean([k(z[i], z[j]) for i in range(6) for j in range(6) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y, block=6) == pytest.approx([within(x) + within(y) - 2 * between])


def test_fid_of_a_set_with_itself_is_zero():
    x = normal(300, 40)
    assert metrics.fid(x, x) == pytest.approx(0, abs=1e-10)
    few = normal(20, 64)  # fewer pictures than features: the covariance is singular
    assert metrics.fid(few, few[::-1]) == pytest.approx(0, abs=1e-10)
    assert metrics.fid(x, x + 3) == pytest.approx(
        40 * 9
    )  # a mere shift: the squared distance of the means


def test_frechet_distance_of_gaussians_in_closed_form():
    mean, scale = DRAWS.standard_normal(5), np.array([0.5, 1, 2, 3, 4.0])
    exact = (mean**2).sum() + ((scale - 1) ** 2).sum()  # covariances that commute
    assert metrics.frechet(mean, np.diag(scale), np.zeros(5), np.eye(5)) == pytest.approx(exact)
    a, b = DRAWS.standard_normal((2, 5, 5))
    root = np.linalg.cholesky(a.T @ a).T
    eigen = np.linalg.eigvals(a.T @ a @ b.T @ b).real
    expected = np.trace(a.T @ a + b.T @ b) - 2 * np.sqrt(eigen).sum()
    assert metrics.frechet(mean, root, mean, b) == pytest.approx(expected)


def test_fid_is_biased_by_the_sample_count():
    """The reason that it is information only."""
    small, large = (metrics.fid(normal(n, 32, seed=1), normal(n, 32, seed=2)) for n in (100, 4000))
    assert small > 10 * large > 0


def test_precision_and_recall_see_different_failures():
    real = normal(400, 4)
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(normal(400, 4, mean=50, seed=1), real) == (0.0, 0.0)
    collapsed = np.repeat(real[:10], 40, 0) + 1e-3 * normal(400, 4, seed=2)
    precision, recall = metrics.precision_recall(collapsed, real)
    assert precision > 0.95 > 0.2 > recall
    scattered = np.concatenate([real[:200], normal(200, 4, mean=50, seed=3)])
    precision, recall = metrics.precision_recall(scattered, real)
    assert precision == pytest.approx(0.5, abs=0.02)
    assert recall > 0.8
    with pytest.raises(ValueError, match="neighbours"):
        metrics.precision_recall(real[:3], real)


def test_clip_score_is_100_cosine_and_never_negative():
    e = np.eye(3)
    images = np.stack([2 * e[0], e[0], e[0]])
    texts = np.stack([5 * e[0], e[0] + e[1], -e[0]])
    assert metrics.clip_score(images, texts) == pytest.approx([100, 100 / 2**0.5, 0])


def test_retrieval_finds_the_own_caption_and_forgives_a_repeated_one():
    texts = normal(200, 32)
    assert metrics.retrieval_at_1(texts, texts).tolist() == [1.0] * 200
    assert metrics.retrieval_at_1(
        normal(2000, 8, seed=1), normal(2000, 8, seed=2), 10
    ).mean() == pytest.approx(0.1, abs=0.03)
    twice = np.repeat(texts[:50], 2, 0)
    assert metrics.retrieval_at_1(twice, twice).all()
    with pytest.raises(ValueError, match="among 100"):
        metrics.retrieval_at_1(texts[:50], texts[:50])


def test_retrieval_is_among_captions_of_the_same_group_first():
    e = np.eye(4)
    texts, groups = e[[0, 1, 2, 3]], ["a", "b", "a", "b"]
    images = e[[1, 1, 2, 2]]  # the first is nearest to a "b", the last to an "a": both elsewhere
    images = images + 0.1 * e[[0, 1, 2, 3]]
    assert metrics.retrieval_at_1(images, texts, 2, groups).tolist() == [1, 1, 1, 1]
    assert metrics.retrieval_at_1(images, texts, 4, groups).tolist() == [0, 1, 1, 0]


def test_memorisation_is_positive_for_copies_and_not_for_fresh_pictures():
    train, heldout, fresh = (normal(500, 8, seed=s) for s in range(3))
    copies = metrics.memorisation(train[:200] + 1e-4, train, heldout)
    assert copies.min() > 0.05
    assert interval(metrics.memorisation(fresh, train, heldout)).low < 0.01
    assert metrics.nearest(train[:7], train, chunk=64) == pytest.approx(np.ones(7))
