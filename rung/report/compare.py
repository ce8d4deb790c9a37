"""Two runs side by side: what was set differently, what came out, and whether the difference is more than chance.

Where both answered the same held-out problems they are compared problem by problem: only those that one of them solved
and the other did not say anything, and under chance alone each run has half of them (McNemar's test, exact).  Else the
two accuracies are independent shares, with Newcombe's interval of their difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rung.core.config import diff
from rung.report.load import Z_95, Accuracy, Pair, Record, Row, wilson

CHANCE = 0.05  # a difference that chance alone makes less often than this is called more than chance
TENTHS = 10  # a curve is summed up by the means of its first and its last tenth
CURVES = ("reward", "right", "length", "turns", "ended", "entropy", "kl_k3", "no_signal", "gap_max", "seconds")
UNCOMPARED = ("name",)  # of the configuration: it differs by itself


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of the second run less that of the first, with a 95 % interval.

    paired:  by problem, on `n` problems that both answered; else by two independent samples
    only_first, only_second: problems that one solved and the other did not (paired)
    p: two-sided probability of as uneven a split by chance alone (paired; exact), else None
    more_than_chance: p < 0.05, or without pairs, the interval does not hold 0
    """

    value: float
    low: float
    high: float
    n: int
    paired: bool
    only_first: int = 0
    only_second: int = 0
    p: float | None = None
    more_than_chance: bool


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A problem that one run solved in its last evaluation, and the other did not."""

    by: Literal["first", "second"]
    problem: str
    prompt: str
    answer: str
    texts: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs side by side; pairs are (first, second).

    config, environment: dotted path -> values, where they differ
    before, after: difference of the held-out accuracies before and after training, None where a run lacks one
    curves: metric -> for each run the means of its first and its last tenth of steps, None where it was not recorded
    """

    config: Mapping[str, tuple[Any, Any]]
    environment: Mapping[str, tuple[Any, Any]]
    before: Difference | None
    after: Difference | None
    curves: Mapping[str, tuple[tuple[float, float] | None, tuple[float, float] | None]]
    solved: Sequence[Solved]


def compare(first: Record, second: Record) -> Comparison:
    """Everything in which two runs differ."""
    config = diff(first.config, second.config)
    return Comparison(
        config={path: values for path, values in config.items() if path not in UNCOMPARED},
        environment=diff(*({k: v for k, v in run.environment.items() if k != "earlier"} for run in (first, second))),
        before=_difference(first, second, last=False),
        after=_difference(first, second, last=True),
        curves={name: both for name in CURVES if any(both := (_summary(first, name), _summary(second, name)))},
        solved=_solved(first.pairs, second.pairs),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test.  [McNemar 1947]

    2 P(X <= min(b, c)), at most 1, with X binomial over b + c problems and 1/2: under chance alone each problem that
    exactly one run solved is the first's or the second's with equal probability.

    >>> mcnemar(0, 5)
    0.0625
    """
    n, least = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def paired_interval(only_first: int, only_second: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Bounds of the difference (c - b) / n of two shares on the same n problems.  [Agresti & Min 2005]

    d ± z sqrt(b + c - (c - b)^2 / n) / n  with half a problem added to each of the four cells
    """
    b, c, total = only_first + 0.5, only_second + 0.5, n + 2.0
    centre, half = (c - b) / total, z * math.sqrt(b + c - (c - b) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def independent_interval(first: Accuracy, second: Accuracy) -> tuple[float, float]:
    """Bounds of the difference of two independent shares, from Wilson's of each.  [Newcombe 1998, method 10]

    d - sqrt((p2 - l2)^2 + (u1 - p1)^2)  to  d + sqrt((u2 - p2)^2 + (p1 - l1)^2)
    """
    (l1, u1), (l2, u2) = (wilson(round(a.value * a.n), a.n) for a in (first, second))
    d = second.value - first.value
    return (
        d - math.hypot(second.value - l2, u1 - first.value),
        d + math.hypot(u2 - second.value, first.value - l1),
    )


def _difference(first: Record, second: Record, *, last: bool) -> Difference | None:
    """Of the first or the last evaluations; None where a run has none."""
    if not (first.accuracies and second.accuracies) or (last and not (first.finished and second.finished)):
        return None
    one, other = (run.accuracies[-1 if last else 0] for run in (first, second))
    mine, theirs = (_answers(run.pairs, last=last) for run in (first, second))
    common = [name for name in mine if name in theirs]
    if not common:
        if not (one.n and other.n):
            return None
        low, high = independent_interval(one, other)
        return Difference(
            value=other.value - one.value,
            low=low,
            high=high,
            n=min(one.n, other.n),
            paired=False,
            more_than_chance=low > 0 or high < 0,
        )
    b = sum(mine[name] and not theirs[name] for name in common)
    c = sum(theirs[name] and not mine[name] for name in common)
    low, high = paired_interval(b, c, len(common))
    p = mcnemar(b, c)
    return Difference(
        value=(c - b) / len(common),
        low=low,
        high=high,
        n=len(common),
        paired=True,
        only_first=b,
        only_second=c,
        p=p,
        more_than_chance=p < CHANCE,
    )


def _answers(pairs: Sequence[Pair], *, last: bool) -> dict[str, bool]:
    """Problem -> solved?, where the grade is known."""
    rows: list[tuple[str, Row]] = [(pair.problem, pair.after if last else pair.before) for pair in pairs]
    return {name: bool(row.get("right")) for name, row in rows if row.get("known", True)}


def _solved(first: Sequence[Pair], second: Sequence[Pair]) -> list[Solved]:
    mine, theirs = _answers(first, last=True), _answers(second, last=True)
    rows = {pair.problem: pair.after for pair in second}
    return [
        Solved(
            by="first" if mine[pair.problem] else "second",
            problem=pair.problem,
            prompt=pair.prompt,
            answer=pair.answer,
            texts=(str(pair.after.get("text", "")), str(rows[pair.problem].get("text", ""))),
        )
        for pair in first
        if pair.problem in mine and pair.problem in theirs and mine[pair.problem] != theirs[pair.problem]
    ]


def _summary(record: Record, name: str) -> tuple[float, float] | None:
    values = [value for _, value in record.points(name)]
    if not values:
        return None
    part = max(len(values) // TENTHS, 1)
    return math.fsum(values[:part]) / part, math.fsum(values[-part:]) / part
