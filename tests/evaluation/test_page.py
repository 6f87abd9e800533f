"""What our charts show is where it belongs, and nothing is lost on the way."""

from itertools import pairwise

import numpy as np
import pytest

from evaluation.page import LINEAR, RATIO, chart, histogram


def test_a_chart_keeps_its_points_inside_and_in_order():
    it = chart("t", "x", {"loss": [(0, 100.0), (10, float("nan")), (20, 1.0), (40, 0.1)]})
    assert it is not None
    (line,) = it.series
    xs, ys = zip(*line.points, strict=True)
    assert len(xs) == 3  # the one that is not finite is left out
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # a falling loss goes down the page
    assert it.left <= min(xs) < max(xs) <= it.width - it.right
    assert it.top <= min(ys) < max(ys) <= it.height - it.bottom
    gaps = [y - x for x, y in pairwise(ys)]
    assert gaps[0] == pytest.approx(2 * gaps[1])  # logarithmic: 100 to 1 is twice 1 to 0.1
    assert {label for _, label in it.ticks_y} >= {"0.1", "1", "10", "100"}
    assert chart("t", "x", {"loss": []}) is None
    alone = chart("t", "x", {"loss": [(5, 2.0)]})
    assert alone is not None
    assert len(alone.series[0].points) == 1


def heights(it, group):
    """Column place -> height, of one group's bars."""
    return {round(bar.x, 3): bar.height for bar in it.bars if bar.group == group}


def test_a_histogram_counts_every_value_once_and_stacks_its_groups():
    rng = np.random.default_rng(0)
    kept, dropped = rng.normal(50, 9, 4000), rng.normal(60, 9, 1000)
    it = histogram("t", "x", {"kept": kept, "dropped": np.append(dropped, np.nan)})
    assert it is not None
    told = [dict(reversed(part.split(" ", 1)) for part in bar.told.split(", ")) for bar in it.bars]
    columns = {round(bar.x, 3): each for bar, each in zip(it.bars, told, strict=True)}
    for name, values in (("kept", kept), ("dropped", dropped)):
        counted = sum(int(each.get(name, "0").replace(",", "")) for each in columns.values())
        assert counted == len(values)
    assert 0 < it.beyond <= 10  # a thousandth at either end
    below, above = heights(it, 0), heights(it, 1)
    scale = sum(below.values()) / 4000
    assert sum(above.values()) == pytest.approx(1000 * scale, rel=0.05)
    both = {x for x in below if x in above}
    assert both
    for bar in it.bars:
        assert it.left <= bar.x < bar.x + bar.width <= it.width - it.right + 1e-6
        assert it.top <= bar.y < bar.y + bar.height <= it.height - it.bottom + 1e-6
        if bar.group == 1 and round(bar.x, 3) in both:
            (lower,) = [o for o in it.bars if (o.group, o.x) == (0, bar.x)]
            assert bar.y + bar.height == pytest.approx(lower.y, abs=0.7)


def test_few_whole_numbers_get_a_bar_each_and_whole_ticks():
    it = histogram("t", "x", {"": np.array([1, 1, 1, 2, 5])})
    assert it is not None
    assert [bar.told for bar in it.bars] == ["3 ", "1 ", "1 "]
    assert [label for _, label in it.ticks_x] == ["1", "2", "3", "4", "5"]
    places = {label: x for x, label in it.ticks_x}
    middles = [bar.x + bar.width / 2 for bar in it.bars]
    assert middles == pytest.approx([places["1"], places["2"], places["5"]])
    assert {label for _, label in it.ticks_y} >= {"0", "1", "2", "3"}
    spread = histogram("t", "x", {"": np.arange(400)}, bins=40)  # ten whole numbers a bar
    assert spread is not None
    assert {bar.told for bar in spread.bars} == {"10 "}


def test_a_wide_range_is_logarithmic_and_thresholds_lie_where_they_divide():
    values = np.repeat(10.0 ** np.arange(6), 5)
    it = histogram("t", "x", {"": values}, marks=[(3000, "min"), (1e30, "far")])
    assert it is not None
    ((mark, label),) = it.marks  # one so far away would leave no room for the values
    assert label == "min"
    assert sum(bar.x + bar.width <= mark for bar in it.bars) == 4
    assert [label for _, label in it.ticks_x] == ["1", "10", "100", "1 k", "10 k", "100 k"]
    even = histogram("t", "x", {"": values}, scale=LINEAR)
    assert even is not None
    assert [bar.told for bar in even.bars] == ["20 ", "5 ", "5 "]


def test_ratios_are_symmetrical():
    it = histogram("t", "x", {"": np.array([0.25, 0.5, 1, 2, 4])}, scale=RATIO)
    assert it is not None
    places = {label: x for x, label in it.ticks_x}
    middle = places["1:1"]
    assert middle - places["1:4"] == pytest.approx(places["4:1"] - middle)
    assert places["2:1"] - middle == pytest.approx((places["4:1"] - middle) / 2)
    assert len(it.bars) == 5


@pytest.mark.parametrize("values", [[], [np.nan, np.inf]])
def test_no_value_is_no_histogram(values):
    assert histogram("t", "x", {"": np.array(values)}) is None


@pytest.mark.parametrize("value", [0.0, 7.0, -0.25])
def test_one_value_is_a_bar(value):
    it = histogram("t", "x", {"a": np.array([value]), "b": np.empty(0)})
    assert it is not None
    assert [bar.told for bar in it.bars] == ["1 a"]
    assert it.groups == ["a", "b"]
