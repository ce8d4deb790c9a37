"""The drawings, measured: places are derived here from the margins and the ticks that are printed."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rung.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, bars, chart, moving_mean, number

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


def drawn(svg):
    """Places of the first polyline."""
    line = next(e for e in ElementTree.fromstring(svg).iter("polyline"))
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def labels(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter("text")]


def test_points_are_where_the_axes_say():
    svg = chart([Curve(name="c", points=[(0, 0.0), (5, 0.25), (10, 1.0)])])
    assert labels(svg)[:5] == ["0", "0.25", "0.5", "0.75", "1"]
    bottom, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert drawn(svg) == [(LEFT, bottom), (middle, round(bottom - height / 4, 1)), (WIDTH - RIGHT, TOP)]


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    places = drawn(chart([Curve(name="c", points=[(1, 1e-6), (2, 1e-4), (3, 1e-2)])], log=True))
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.11)  # one decimal is written
    assert len(drawn(chart([Curve(name="c", points=[(1, 0.0), (2, 1e-4), (3, 1e-2)])], log=True))) == 2


@given(VALUES)
def test_nothing_is_drawn_outside_the_frame(values):
    svg = chart([Curve(name="c", points=list(enumerate(values)))])
    for x, y in drawn(svg):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_an_axis_of_shares_never_leaves_zero_to_a_hundred_per_cent(values):
    svg = chart([Curve(name="c", points=list(enumerate(values)))], share=True)
    shares = [float(text.removesuffix(" %")) for text in labels(svg) if text.endswith("%")]
    assert shares[0] == 0
    assert shares[-1] <= 100
    assert shares[-1] >= 100 * max(values) - 0.1


def test_the_marks_of_a_small_share_are_written_where_they_stand():
    svg = chart([Curve(name="c", points=[(1, 0.0), (2, 0.009)])], share=True)
    assert [text for text in labels(svg) if text.endswith("%")] == ["0 %", "0.25 %", "0.5 %", "0.75 %", "1 %"]


def test_no_point_is_no_drawing():
    assert chart([]) == ""
    assert chart([Curve(name="c", points=[])]) == ""
    assert chart([Curve(name="c", points=[(1, -1.0)])], log=True) == ""
    assert bars([("a", 0.0)]) == ""


def test_an_interval_is_drawn_around_its_point():
    svg = chart(
        [Curve(name="c", points=[(0, 0.5), (1, 0.5)], low=[0.25, 0.5], high=[1.0, 0.5], joined=False)], share=True
    )
    height = HEIGHT - TOP - BOTTOM
    ends = re.search(r'class="whisker line" d="M[\d.]+ ([\d.]+)h.*?V([\d.]+)', svg)
    assert float(ends[1]) == TOP + 0.75 * height  # from 25 % ...
    assert float(ends[2]) == TOP  # ... up to 100 %
    assert "polyline" not in svg  # nothing was measured between the two


def test_a_long_curve_is_thinned_without_losing_its_mean_or_its_worst_value():
    values = [math.sin(step / 50) for step in range(3000)]
    values[1234] = 9.0
    frame = Curve(name="frame", points=[(0, 0.0), (2999, 10.0)])  # 10 is at TOP, 0 at the bottom or above it
    mean, worst = (Curve(name="c", points=list(enumerate(values)), worst=worst) for worst in (False, True))
    highest = [min(y for _, y in drawn(chart([curve, frame]))) for curve in (mean, worst)]
    assert highest[1] < TOP + 0.1 * (HEIGHT - TOP - BOTTOM)  # 9 of 10
    assert highest[0] > TOP + 0.5 * (HEIGHT - TOP - BOTTOM)  # one in ten of a mean
    assert len(drawn(chart([mean]))) <= 300


def test_the_moving_mean_is_centred_and_keeps_the_ends():
    points = [(x, float(y)) for x, y in enumerate([0, 0, 9, 0, 0])]
    assert moving_mean(points, 3) == [(0, 0), (1, 3), (2, 3), (3, 3), (4, 0)]
    assert moving_mean(points, 1) == points


def test_parts_of_a_bar_share_its_width():
    parts = ElementTree.fromstring(bars([("a", 1.0), ("b", 3.0)])).findall("rect")
    assert [float(part.get("width")) for part in parts] == [WIDTH / 4, 3 * WIDTH / 4]
    assert [float(part.get("x")) for part in parts] == [0, WIDTH / 4]


def test_names_are_escaped():
    svg = chart([Curve(name='<script>"&', points=[(0, 1.0)])]) + bars([("<b>", 1.0)])
    assert "<script>" not in svg
    assert "<b>" not in svg


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (1.5, "1.5"),
        (1200, "1,200"),
        (3e-5, "3e-05"),
        (-0.5, "-0.5"),
        (20.0, "20"),
        (1e6, "1e+06"),
    ],
)
def test_numbers_say_no_more_than_they_need(value, said):
    assert number(value) == said
