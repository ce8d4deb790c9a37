"""Exact checks of objectives on a policy small enough to enumerate: for Rung's own, and for anybody's."""

from rung.truth.exact import Outcome, Verdict, check, compare, expected_gradient, gradient, outcomes
from rung.truth.tabular import Reward, TablePolicy, World, expected_kl, expected_return

__all__ = [
    "Outcome",
    "Reward",
    "TablePolicy",
    "Verdict",
    "World",
    "check",
    "compare",
    "expected_gradient",
    "expected_kl",
    "expected_return",
    "gradient",
    "outcomes",
]
