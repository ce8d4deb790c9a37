"""Metrics that merge exactly over micro-batches: a mean carries its weight.  Outputs only: no metric decides anything.

>>> flatten(merge({"reward": Mean.of(1.0, weight=3)}, {"reward": Mean.of(0.0, weight=1)}))
{'reward': 0.75}
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Number = int | float


@dataclass(frozen=True)
class Mean:
    """A weighted mean: total is the sum of weight times value.  Without weight it has no value."""

    total: Number
    weight: Number

    @staticmethod
    def of(value: Number, weight: Number = 1.0) -> "Mean":
        """The mean of values that are all `value`; a weight of 0 says nothing, whatever the value."""
        return Mean(value * weight if weight else 0.0, weight)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


@dataclass(frozen=True)
class Sum:
    """A count or an amount."""

    value: Number

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)


@dataclass(frozen=True)
class Max:
    """The largest value seen; NaN wins, so that the order of merging never hides it."""

    value: Number

    def __add__(self, other: "Max") -> "Max":
        return self if math.isnan(self.value) or self.value >= other.value else other


Metric = Mean | Sum | Max


def merge(*parts: Mapping[str, Metric]) -> dict[str, Metric]:
    """Metrics of the union of the parts.  One name has one kind in all parts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            seen = merged.get(name)
            assert seen is None or type(seen) is type(metric), (
                f"metric {name!r} is {seen} in one part, {metric} in another"
            )
            merged[name] = metric if seen is None else seen + metric  # type: ignore[operator]
    return merged


def flatten(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers by name; a mean without weight is left out."""
    return {name: float(value) for name, metric in metrics.items() if (value := metric.value) is not None}
