"""Curves as small SVG drawings, written by hand: no script, no font, no network; colours come from the page's CSS.

A drawing is WIDTH x HEIGHT units, about one unit a pixel on a telephone.  Classes: `axis`, `grid`, `raw` (each step),
`line` (the curve to look at), `band` and `whisker` (an interval), `second` (a second curve).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, BAR_HEIGHT = 400, 210, 22
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 24  # margins
CAP = 4  # half the width of a whisker's ends
MAX_MARKS = 12  # points of a curve that are marked one by one
MAX_POINTS = 300  # drawn per curve: more are means of neighbours (or maxima, where the curve is one of maxima)
SMOOTH_FROM, SMOOTH_SHARE = 20, 15  # curves of at least 20 steps get a moving mean over 1/15 of them

Real = int | float
Points = Sequence[tuple[Real, Real]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart.

    low, high: an interval around every point, or empty
    style:     line, or second (a thinner line in another colour)
    joined:    points alone where False: nothing was measured between them
    smooth:    draw the points faintly and their moving mean on top
    worst:     thin by the maximum of neighbours, not by their mean
    """

    name: str
    points: Points
    low: Sequence[Real] = ()
    high: Sequence[Real] = ()
    style: str = "line"
    joined: bool = True
    smooth: bool = False
    worst: bool = False


def chart(
    curves: Sequence[Curve], *, share: bool = False, log: bool = False, span: tuple[Real, Real] | None = None
) -> str:
    """An SVG drawing of these curves over the step.

    share: values are shares, written in per cent, and the axis is cut at 0 and 1
    log:   logarithmic axis; values that are not positive are left out
    span:  first and last step of the axis; default: those of the curves
    """
    curves = [_thinned(_positive(curve) if log else curve) for curve in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    x_low, x_high = _range(span or [x for curve in curves for x, _ in curve.points])
    values = [y for curve in curves for y in (*(y for _, y in curve.points), *curve.low, *curve.high)]
    ticks = _log_ticks(values) if log else _ticks(*_share_range(values)) if share else _ticks(*_range(values))
    y_low, y_high = ticks[0], ticks[-1]
    scale = math.log if log else float
    height = HEIGHT - TOP - BOTTOM

    def at_x(x: Real) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: Real) -> float:
        return TOP + (scale(y_high) - scale(y)) / (scale(y_high) - scale(y_low)) * height

    parts = [
        _y_axis(ticks, at_y, share),
        _x_axis([x for x in _ticks(x_low, x_high, whole=True) if x_low <= x <= x_high], at_x),
    ]
    parts += [_drawn(curve, at_x, at_y, share) for curve in curves]
    return _svg(HEIGHT, _said(curves, share), parts)


def bars(parts: Sequence[tuple[str, Real]]) -> str:
    """One horizontal bar cut into parts, in the order given; classes part0, part1, ..."""
    total = math.fsum(value for _, value in parts)
    if total <= 0:
        return ""
    drawn, at = [], 0.0
    for number, (name, value) in enumerate(parts):
        width = WIDTH * value / total
        place = f'x="{at:.2f}" y="0" width="{width:.2f}" height="{BAR_HEIGHT}"'
        drawn.append(
            f'<rect class="part{number}" {place}><title>{escape(f"{name}: {value / total:.0%}")}</title></rect>'
        )
        at += width
    said = ", ".join(f"{name} {value / total:.0%}" for name, value in parts)
    return _svg(BAR_HEIGHT, said, drawn, 'class="bar" preserveAspectRatio="none" ')


def moving_mean(points: Points, window: int) -> list[tuple[Real, Real]]:
    """The mean over the `window` (odd) nearest points; shorter, and still centred, near the ends."""
    smoothed: list[tuple[Real, Real]] = []
    for index, (x, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        near = [y for _, y in points[index - reach : index + reach + 1]]
        smoothed.append((x, math.fsum(near) / len(near)))
    return smoothed


def window_of(points: Points) -> int:
    """How many points the moving mean of a curve covers: odd, 1 for short curves."""
    return len(points) // SMOOTH_SHARE // 2 * 2 + 1 if len(points) >= SMOOTH_FROM else 1


def number(value: Real) -> str:
    """At most three digits, and no more than it needs: 0, 0.25, 1.5, 1200, 3e-05."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:,.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"


def _svg(height: int, said: str, parts: Sequence[str], more: str = "") -> str:
    box = f'viewBox="0 0 {WIDTH} {height}"'
    return f'<svg {more}{box} role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def _drawn(curve: Curve, at_x: Callable[[Real], float], at_y: Callable[[Real], float], share: bool) -> str:
    places = [(at_x(x), at_y(y)) for x, y in curve.points]
    drawn = []
    if curve.low:
        low, high = [at_y(y) for y in curve.low], [at_y(y) for y in curve.high]
        steps = [x for x, _ in places]
        if curve.joined:
            ring = [*zip(steps, high, strict=True), *reversed([*zip(steps, low, strict=True)])]
            drawn.append(f'<polygon class="band {curve.style}" points="{_path(ring)}"/>')
        whiskers = (
            f"M{x - CAP:.1f} {a:.1f}h{2 * CAP}M{x:.1f} {a:.1f}V{b:.1f}m{-CAP} 0h{2 * CAP}"
            for x, a, b in zip(steps, low, high, strict=True)
        )
        drawn.append(f'<path class="whisker {curve.style}" d="{"".join(whiskers)}"/>')
    window = window_of(curve.points) if curve.smooth else 1
    if window > 1:
        drawn.append(f'<polyline class="raw" points="{_path(places)}"/>')
        places = [(at_x(x), at_y(y)) for x, y in moving_mean(curve.points, window)]
    if curve.joined:
        drawn.append(f'<polyline class="{curve.style}" points="{_path(places)}"/>')
    if len(places) <= MAX_MARKS:
        for (x, y), (step, value) in zip(places, curve.points, strict=True):
            title = escape(f"step {number(step)}: {_label(value, share)}")
            drawn.append(
                f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>'
            )
    return "".join(drawn)


def _y_axis(ticks: Sequence[float], at_y: Callable[[Real], float], share: bool) -> str:
    return "".join(
        f'<path class="grid" d="M{LEFT} {at_y(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{escape(_label(tick, share))}</text>'
        for tick in ticks
    )


def _x_axis(ticks: Sequence[float], at_x: Callable[[Real], float]) -> str:
    return "".join(
        f'<text x="{at_x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(number(tick))}</text>'
        for tick in ticks
    )


def _said(curves: Sequence[Curve], share: bool) -> str:
    """The chart in words, for those who do not see it."""
    return "; ".join(
        f"{curve.name}: {_label(curve.points[0][1], share)} at step {number(curve.points[0][0])}, "
        f"{_label(curve.points[-1][1], share)} at step {number(curve.points[-1][0])}"
        for curve in curves
    )


def _label(value: Real, share: bool) -> str:
    """`value` as it is read on the page; shares below one in a hundred keep two decimals, as their axes need."""
    return f"{number(round(100 * value, 1 if value > 0.01 else 2))} %" if share else number(value)


def _path(places: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _positive(curve: Curve) -> Curve:
    return Curve(name=curve.name, points=[p for p in curve.points if p[1] > 0], style=curve.style, worst=curve.worst)


def _thinned(curve: Curve) -> Curve:
    """At most MAX_POINTS points: neighbours become their mean, or their maximum.  Curves with intervals stay whole."""
    size = math.ceil(len(curve.points) / MAX_POINTS)
    if size <= 1 or curve.low:
        return curve
    points = []
    for start in range(0, len(curve.points), size):
        part = curve.points[start : start + size]
        values = [y for _, y in part]
        points.append((part[-1][0], max(values) if curve.worst else math.fsum(values) / len(values)))
    return Curve(name=curve.name, points=points, style=curve.style, smooth=curve.smooth, worst=curve.worst)


def _range(values: Sequence[Real]) -> tuple[float, float]:
    """Smallest and largest, apart."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return float(low), float(high)


def _share_range(values: Sequence[Real]) -> tuple[float, float]:
    """From 0 to 1 where the values fill it; a small share gets a smaller axis that still starts at 0."""
    return 0.0, (1.0 if max(values) > 0.5 else float(max(*values, 0.01)))


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """about five round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover [low, high]."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    step = float(math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(values: Sequence[Real]) -> list[float]:
    """Powers of ten that cover the values, at most about five."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    step = math.ceil((high - low) / 5)
    return [10.0**power for power in range(low, high + step, step)]
