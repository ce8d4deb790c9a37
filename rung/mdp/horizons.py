"""Planning where nothing is discounted: so many steps to go, or the average reward a step for ever."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rung.core.errors import ModelError
from rung.mdp.finite import FiniteMDP, Floats, Ints
from rung.mdp.operators import backup


def backward_induction(mdp: FiniteMDP, final_S: Floats | None = None) -> Iterator[tuple[Floats, Ints]]:
    """With 1, 2, ... steps to go: the best value, [S], and the pairs that reach it, [S]; final_S: with none to go."""
    v_S = np.zeros(mdp.num_states) if final_S is None else final_S
    while True:
        v_S, pair_S = backup(mdp, v_S)
        yield v_S, pair_S


def finite_horizon(mdp: FiniteMDP, steps: int, *, final_S: Floats | None = None) -> tuple[Floats, Ints]:
    """Backward induction: the best value with t steps to go, [steps + 1, S], and its pairs, [steps, S]."""
    v_TS, pair_TS = np.zeros((steps + 1, mdp.num_states)), np.zeros((steps, mdp.num_states), np.int64)
    if final_S is not None:
        v_TS[0] = final_S
    for t, (v_S, pair_S) in enumerate(itertools.islice(backward_induction(mdp, final_S), steps)):
        v_TS[t + 1], pair_TS[t] = v_S, pair_S
    return v_TS, pair_TS


@dataclass(frozen=True, eq=False, kw_only=True)
class Gain:
    """Average reward a step of the best policy, lower <= gain <= upper, and its relative values."""

    gain: float
    lower: float
    upper: float
    relative_S: Floats
    pair_S: Ints
    iterations: int


def relative_value_iteration(mdp: FiniteMDP, *, stay: float = 0.1) -> Iterator[Gain]:
    """With a chance to stay put, so that nothing is periodic.  [Puterman 1994, 8.5.5]

    Raises ModelError for episodes that end."""
    if mdp.terminal_S.any() or (mdp.weight_N < 1 - 1e-9).any():
        raise ModelError("an average reward needs episodes that never end; this model ends them")
    endless, v_S = mdp.with_gamma(1.0), np.zeros(mdp.num_states)
    for count in itertools.count(1):
        next_S, pair_S = backup(endless, v_S)
        change_S, next_S = next_S - v_S, (1 - stay) * next_S + stay * v_S
        lower, upper = float(change_S.min()), float(change_S.max())
        v_S = next_S - next_S[0]
        gain = (lower + upper) / 2
        yield Gain(gain=gain, lower=lower, upper=upper, relative_S=v_S, pair_S=pair_S, iterations=count)


def average_reward(
    mdp: FiniteMDP, *, epsilon: float = 1e-6, max_iterations: int = 1_000_000, stay: float = 0.1
) -> Gain:
    """The best gain to within epsilon, by relative value iteration.

    Raises ModelError for episodes that end, or when no common gain is found (several classes of states)."""
    for found in relative_value_iteration(mdp, stay=stay):
        if found.upper - found.lower <= 2 * epsilon:
            return found
        if found.iterations >= max_iterations:
            break
    raise ModelError(
        f"after {max_iterations} iterations the gain lies between {found.lower:.6g} and {found.upper:.6g}: "
        "several classes?"
    )
