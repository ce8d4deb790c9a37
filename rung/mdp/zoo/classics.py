"""Textbook models whose answers are known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rung.mdp.finite import FiniteMDP, from_arrays, from_dict, from_function

Rows = Mapping[str, list[tuple[Any, ...]]]


def puterman(gamma: float = 0.95) -> FiniteMDP:
    """Two states; for gamma > 10/11  v* = ((5 - 5.5 gamma) / ((1 - gamma / 2)(1 - gamma)), -1 / (1 - gamma)).

    [Puterman 1994, 3.1]"""
    return from_dict(
        {
            "s1": {"a11": [(0.5, "s1", 5.0), (0.5, "s2", 5.0)], "a12": [(1.0, "s2", 10.0)]},
            "s2": {"a21": [(1.0, "s2", -1.0)]},
        },
        gamma,
    )


def forest(states: int = 3, *, gamma: float = 0.9, old: float = 4.0, cut: float = 2.0, fire: float = 0.1) -> FiniteMDP:
    """Wait for the forest to grow, or cut it; a fire takes it back to its youth.  [pymdptoolbox, forest()]"""
    prob, reward = np.zeros((states, 2, states)), np.zeros((states, 2))
    for age in range(states):
        prob[age, 0, 0] += fire
        prob[age, 0, min(age + 1, states - 1)] += 1 - fire
        prob[age, 1, 0] = 1.0
        reward[age, 1] = 1.0 if age else 0.0
    reward[-1] = old, cut
    return from_arrays(prob, reward, gamma)


def chain(length: int, *, gamma: float = 1.0, step: float = 0.0, end: float = 1.0) -> FiniteMDP:
    """States 0 .. length - 1, left or right; right of the last the episode ends and pays `end`."""

    def outcomes(state: int) -> Rows:
        if state == length:
            return {}
        right = end if state == length - 1 else step
        return {"left": [(1.0, max(state - 1, 0), step)], "right": [(1.0, state + 1, right)]}

    return from_function(outcomes, list(range(length + 1)), gamma, start={0: 1.0})


def random_walk(
    states: int = 5, *, reach: int = 1, low: float = 0.0, high: float = 1.0, gamma: float = 1.0
) -> FiniteMDP:
    """A walk without choice on `states` states between two ends; each step leads 1 .. reach to either side.

    Off the left end pays `low`, off the right end `high`; starts in the middle.  5 states, 0 and 1: example 6.2;
    19 states, -1 and 1: 7.1; 1000 states, reach 100, -1 and 1: 9.1.                            [Sutton & Barto]"""

    def outcomes(state: int | None) -> Rows:
        if state is None:
            return {}
        rows: dict[object, list[float]] = {}
        for distance in range(1, reach + 1):
            for there in (state - distance, state + distance):
                inside = 0 <= there < states
                reward = 0.0 if inside else low if there < 0 else high
                # two ways out that pay differently are two outcomes
                key: object = there if inside else ("end", reward)
                rows.setdefault(key, [0.0, reward])[0] += 1 / (2 * reach)
        found = [(p, None if isinstance(there, tuple) else there, reward) for there, (p, reward) in rows.items()]
        return {"walk": found}  # type: ignore[dict-item]

    return from_function(outcomes, [*range(states), None], gamma, start={states // 2: 1.0})


def gambler(*, heads: float = 0.4, goal: int = 100) -> FiniteMDP:
    """Stake part of the capital on a coin until it is 0 or the goal, which pays 1; gamma is 1.  [S & B, example 4.3]"""

    def outcomes(capital: int) -> Rows:
        if capital in (0, goal):
            return {}
        return {
            str(stake): [
                (heads, capital + stake, 1.0 if capital + stake == goal else 0.0),
                (1 - heads, capital - stake, 0.0),
            ]
            for stake in range(1, min(capital, goal - capital) + 1)
        }

    return from_function(outcomes, list(range(goal + 1)), 1.0)


def car_rental(
    *,
    cars: int = 20,
    moves: int = 5,
    requests: Sequence[float] = (3, 4),
    returns: Sequence[float] = (3, 2),
    rent: float = 10.0,
    cost: float = 2.0,
    gamma: float = 0.9,
) -> FiniteMDP:
    """Jack's two locations: cars moved at night at a cost, rented by day, Poisson requests and returns.

    State: cars at either place; action: cars moved from the first to the second, -moves .. moves.  [S & B, 4.2]"""
    from scipy.stats import poisson

    size = cars + 1
    kept, income = np.zeros((2, size, size)), np.zeros((2, size))
    for place in range(2):
        wanted = poisson.pmf(np.arange(4 * size), requests[place])
        back = poisson.pmf(np.arange(4 * size), returns[place])
        for morning in range(size):
            for asked, chance in enumerate(wanted):
                rented = min(morning, asked)
                income[place, morning] += chance * rent * rented
                left = morning - rented
                room = cars - left
                kept[place, morning, left:cars] += chance * back[:room]
                kept[place, morning, cars] += chance * (1 - back[:room].sum())
        kept[place] /= kept[place].sum(1, keepdims=True)  # what lies beyond the tables: under 1e-20

    def outcomes(state: tuple[int, int]) -> Rows:
        found = {}
        for moved in range(-moves, moves + 1):
            first, second = state[0] - moved, state[1] + moved
            if first < 0 or second < 0 or (moved > 0 and moved > state[0]) or (moved < 0 and -moved > state[1]):
                continue
            first, second = min(first, cars), min(second, cars)
            reward = income[0, first] + income[1, second] - cost * abs(moved)
            both = np.outer(kept[0, first], kept[1, second])
            found[str(moved)] = [(p, divmod(n, size), reward) for n, p in enumerate(both.ravel()) if p > 0]
        return found

    return from_function(outcomes, [(a, b) for a in range(size) for b in range(size)], gamma)


def lqr(
    points: int = 41,
    actions: int = 41,
    *,
    gamma: float = 0.9,
    drift: float = 0.9,
    push: float = 0.5,
    state_cost: float = 1.0,
    action_cost: float = 0.1,
    noise: float = 0.1,
    reach: float = 2.0,
) -> FiniteMDP:
    """The linear-quadratic regulator on a grid: x' = drift x + push u + noise N(0, 1), a step costs x^2 and u^2.

    States and actions are points of [-reach, reach]; x' is shared out between its two neighbours (the mean stays), and
    the normal is three points of the same mean and variance.  Without the grid the answer is -(p x^2 + c) by Riccati's
    equation.  [Bertsekas 2012, 4.1]"""
    x_S, u_A = np.linspace(-reach, reach, points), np.linspace(-reach, reach, actions)
    mean_N = (drift * x_S[:, None] + push * u_A).ravel()
    chance_K, shift_K = np.array([1 / 6, 2 / 3, 1 / 6]), noise * np.sqrt(3.0) * np.array([-1, 0, 1])
    place_NK = (np.clip(mean_N[:, None] + shift_K, -reach, reach) + reach) / (2 * reach) * (points - 1)
    left_NK = np.minimum(place_NK.astype(np.int64), points - 2)
    share_NK = np.clip(place_NK - left_NK, 0.0, 1.0)
    pairs = points * actions
    return FiniteMDP(
        first_S1=np.arange(0, pairs + 1, actions),
        action_N=np.tile(np.arange(actions), points),
        row_N1=np.arange(0, 6 * pairs + 1, 6),
        next_M=np.stack((left_NK, left_NK + 1), axis=-1).ravel(),
        prob_M=np.stack((chance_K * (1 - share_NK), chance_K * share_NK), axis=-1).ravel(),
        reward_N=-(state_cost * x_S[:, None] ** 2 + action_cost * u_A**2).ravel(),
        gamma=gamma,
        num_actions=actions,
        state_names=[f"x = {x:g}" for x in x_S],
        action_names=[f"u = {u:g}" for u in u_A],
    )


def short_corridor() -> FiniteMDP:
    """Three states that look alike; in the second, left and right are exchanged; a step costs 1.  [S & B, 13.1]"""
    step = -1.0
    return from_dict(
        {
            0: {"left": [(1.0, 0, step)], "right": [(1.0, 1, step)]},
            1: {"left": [(1.0, 2, step)], "right": [(1.0, 0, step)]},
            2: {"left": [(1.0, 1, step)], "right": [(1.0, None, step)]},
        },
        1.0,
        start={0: 1.0},
    )


def maximization_bias(*, actions: int = 10, mean: float = -0.1, spread: float = 1.0) -> FiniteMDP:
    """From A, right ends with 0; left leads to B, whose actions end with mean -0.1.  [Sutton & Barto, example 6.7]

    The published rewards are N(-0.1, 1); here mean - spread or mean + spread with equal chance: the same mean and
    variance, in a finite model."""
    ends = [(0.5, None, mean - spread), (0.5, "-", mean + spread)]
    return from_dict(
        {
            "A": {"left": [(1.0, "B", 0.0)], "right": [(1.0, None, 0.0)]},
            "B": {f"try {n}": ends for n in range(actions)},  # type: ignore[dict-item]
        },
        1.0,
        start={"A": 1.0},
    )


def baird(gamma: float = 0.99) -> tuple[FiniteMDP, np.ndarray]:
    """Seven states, a solid action to the last and a dashed one to the first six, no rewards; and features [7, 8].

    Semi-gradient TD under the behaviour that is dashed six times in seven diverges for the solid policy.
    [Baird 1995; Sutton & Barto, figure 11.1]"""
    upper = [(1 / 6, state, 0.0) for state in range(6)]
    model = {state: {"dashed": upper, "solid": [(1.0, 6, 0.0)]} for state in range(7)}
    features = np.zeros((7, 8))
    features[np.arange(6), np.arange(6)] = 2.0
    features[:6, 7] = 1.0
    features[6, 6], features[6, 7] = 1.0, 2.0
    return from_dict(model, gamma, start=dict.fromkeys(range(7), 1 / 7)), features  # type: ignore[arg-type]
