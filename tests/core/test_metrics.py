import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.core.metrics import Max, Mean, Sum, flatten, merge

ROWS = st.lists(st.tuples(st.integers(-1000, 1000), st.integers(0, 9)), min_size=1, max_size=12)


@given(ROWS, st.data())
def test_the_numbers_do_not_depend_on_how_the_rows_were_split_or_ordered(rows, data):
    """Whole numbers, so that sums are exact: every split and order must give the very same numbers."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    order = data.draw(st.permutations(rows))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    merged = flatten(merge(*map(describe, parts)))
    total = sum(w for _, w in rows)
    expected = {"count": float(sum(w for _, w in rows)), "largest": float(max(v for v, _ in rows))}
    if total:
        expected["mean"] = sum(v * w for v, w in rows) / total
    assert merged == pytest.approx(expected, rel=1e-15)


def describe(rows):
    metrics = [
        {"mean": Mean.of(float(v), weight=float(w)), "count": Sum(float(w)), "largest": Max(float(v))} for v, w in rows
    ]
    return merge(*metrics)


def test_a_mean_of_means_is_weighted_not_averaged():
    assert flatten(merge({"x": Mean.of(1.0, weight=3)}, {"x": Mean.of(0.0, weight=1)})) == {"x": 0.75}


def test_a_mean_of_nothing_has_no_value_and_does_not_poison_others():
    nothing = {"x": Mean.of(math.nan, weight=0)}
    assert flatten(nothing) == {}
    assert flatten(merge(nothing, {"x": Mean.of(2.0)})) == {"x": 2.0}


def test_a_nan_is_not_hidden_by_the_order_of_merging():
    for parts in ([Max(math.nan), Max(1.0)], [Max(1.0), Max(math.nan)]):
        assert math.isnan(flatten(merge(*({"x": part} for part in parts)))["x"])


def test_one_name_cannot_be_two_kinds():
    with pytest.raises(AssertionError, match="'x'"):
        merge({"x": Sum(1.0)}, {"x": Max(1.0)})
