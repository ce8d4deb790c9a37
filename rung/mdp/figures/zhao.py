"""Zhao's book, the figures without chance: the 5 x 5 grid unless it says otherwise.  [Zhao 2025]"""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from rung.mdp import zoo
from rung.mdp.figures.base import Figure, Maker, grid_picture, letters, optimal_picture, rows
from rung.mdp.finite import FiniteMDP, Floats
from rung.mdp.horizons import finite_horizon
from rung.mdp.operators import backup, policy_matrix, policy_of, q_values, ties
from rung.mdp.oracle import epsilon_greedy, epsilon_soft_optimum, oracle, uniform
from rung.mdp.planning import policy_iteration, solve
from rung.mdp.values import fourier, polynomial

TERRIBLE = -10.0  # the reward of a forbidden cell from figure 3.4 (d) on
ESCAPE: Mapping[str, Any] = {"forbidden_reward": TERRIBLE, "bump": "both"}  # the rule of figures 5.6 and 5.7
MIXED = ("RLLUU", "DSRDR", "LRDLS", "SDUUR", "SRSRS")  # the lower policy of figure 2.7 (b)
TARGET = 17  # the cell (4,3)


def two_by_two() -> FiniteMDP:
    """The world of the first examples: the forbidden cell in the upper right, the target in the lower right."""
    return zoo.grid(".#\n.T", 0.9)


def numbers_of(mdp: FiniteMDP, *names: str) -> list[int]:
    """The numbers of these actions."""
    return [mdp.action_names.index(name) for name in names]


def two_policies() -> Figure:
    """A policy that avoids the forbidden cell, and one that enters it half of the time."""
    mdp = two_by_two()
    down, right, stay = numbers_of(mdp, "down", "right", "stay")
    first = oracle(mdp, np.array([down, down, right, stay]))
    table_SA = np.zeros((4, 5))
    table_SA[0, [down, right]] = 0.5
    table_SA[[1, 2, 3], [down, right, stay]] = 1
    second = oracle(mdp, table_SA)
    return Figure(
        title="Figures 2.4 and 2.5: two policies",
        settings="2 x 2, gamma 0.9, forbidden -1, boundary -1, target 1; the second goes right half of the time",
        numbers={"first": first.v_S, "second": second.v_S},
        draw=grid_picture(mdp, second.v_S, table_SA),
    )


def always_right() -> Figure:
    """A poor policy: bumps for ever."""
    mdp = zoo.zhao(0.9)
    actions_S = np.full(25, mdp.action_names.index("right"))
    v_S = oracle(mdp, actions_S).v_S
    return Figure(
        title="Figure 2.7 (b), above: always right",
        settings="gamma 0.9, forbidden -1, boundary -1, target 1",
        numbers={"printed": rows(v_S)},
        draw=grid_picture(mdp, v_S, actions_S),
    )


def mixed() -> Figure:
    """A policy that leads nowhere from most cells."""
    mdp = zoo.zhao(0.9)
    actions_S = np.array(["URDLS".index(letter) for row in MIXED for letter in row])
    v_S = oracle(mdp, actions_S).v_S
    return Figure(
        title="Figure 2.7 (b), below: a policy without a plan",
        settings="gamma 0.9, forbidden -1, boundary -1, target 1",
        numbers={"policy": list(MIXED), "printed": rows(v_S)},
        draw=grid_picture(mdp, v_S, actions_S),
    )


def optimal(letter: str, gamma: float, forbidden_reward: float, *, exact: bool = False) -> Figure:
    """exact: the values in full and all optimal actions, too."""
    mdp = zoo.zhao(gamma, forbidden_reward=forbidden_reward)
    found = solve(mdp, epsilon=1e-9)
    more = {"exact": rows(found.v_S), "actions": letters(mdp, found.optimal_N)} if exact else {}
    return Figure(
        title=f"Figure 3.4 ({letter}): optimal values",
        settings=f"gamma {gamma:g}, forbidden {forbidden_reward:g}, boundary -1, target 1",
        numbers={"printed": rows(found.v_S), **more},
        draw=optimal_picture(mdp, found.v_S, found.optimal_N),
    )


def value_iteration_by_hand() -> Figure:
    """Two sweeps on four cells."""
    mdp = two_by_two()
    first_S, _ = backup(mdp, np.zeros(4))
    second_S, pair_S = backup(mdp, first_S)
    plan = solve(mdp, epsilon=1e-9)
    return Figure(
        title="Tables 4.2 and 4.3: value iteration by hand",
        settings="2 x 2, gamma 0.9, from 0; values after one and after two sweeps",
        numbers={"v_1": first_S, "v_2": second_S},
        claims={"the greedy policy of the second sweep is optimal": bool(plan.optimal_N[pair_S].all())},
    )


def policy_iteration_by_hand() -> Figure:
    """One improvement on two cells."""
    mdp = zoo.grid(".T", 0.9, actions=("left", "stay", "right"))
    left = mdp.action_names.index("left")
    pair_S = np.array([mdp.pair(s, left) for s in range(2)])
    sweeps, v_S = [], np.zeros(2)
    for _ in range(3):
        v_S = q_values(mdp, v_S)[pair_S]
        sweeps.append(v_S[0])
    first, second = list(policy_iteration(mdp, pair_S))[:2]
    return Figure(
        title="Section 4.2.3 and table 4.5: policy iteration by hand",
        settings="two cells, the right one the target; left, stay, right; gamma 0.9; begins with left everywhere",
        numbers={"values": first.v_S, "sweeps_of_s1": sweeps, "q": mdp.table(q_values(mdp, first.v_S))},
        claims={
            "one improvement makes it optimal": bool(
                solve(mdp, epsilon=1e-9).optimal_N[second.pair_S].all() and second.residual < 1e-9
            )
        },
    )


def policy_iteration_from_staying() -> Figure:
    """Policies that only get better, from the worst where it stands on a forbidden cell."""
    mdp = zoo.zhao(0.9, forbidden_reward=TERRIBLE)
    stay = mdp.action_names.index("stay")
    iterates = list(policy_iteration(mdp, np.array([mdp.pair(s, stay) for s in range(25)])))
    best_S = solve(mdp, epsilon=1e-9).v_S
    return Figure(
        title="Figure 4.4: policy iteration from staying everywhere",
        settings="gamma 0.9, forbidden -10, boundary -1, target 1; how many improvements it takes depends on ties",
        numbers={"all_stay": rows(iterates[0].v_S)},
        claims={
            "no state's value ever falls": all(
                bool((after.v_S >= before.v_S - 1e-9).all()) for before, after in pairwise(iterates)
            ),
            "it ends at the optimal values": bool(np.allclose(iterates[-1].v_S, best_S, atol=1e-8)),
        },
        draw=grid_picture(mdp, iterates[0].v_S, np.full(25, stay)),
    )


def sweeps_of_value_iteration() -> Figure:
    """How many sweeps a tolerance takes."""
    mdp, v_S, count = zoo.zhao(0.9), np.zeros(25), 0
    tolerances = ("1e-3", "1e-6", "1e-9", "1e-12")
    found: dict[str, int] = {}
    while len(found) < len(tolerances):
        new_S, _ = backup(mdp, v_S)
        count, change, v_S = count + 1, float(abs(new_S - v_S).max()), new_S
        for name in tolerances:
            if change < float(name):
                found.setdefault(name, count)
    return Figure(
        title="Section 4.1: sweeps of value iteration",
        settings="gamma 0.9, from 0, until no value changes by as much as the tolerance",
        numbers={"sweeps": found},
    )


def short_episodes() -> Figure:
    """MC Basic estimates the return of L steps; here exactly."""
    mdp = zoo.zhao(0.9, forbidden_reward=TERRIBLE)
    v_TS, _ = finite_horizon(mdp, 100)
    return Figure(
        title="Figure 5.4: MC Basic and the length of its episodes",
        settings="gamma 0.9, forbidden -10; exact returns of L steps; row 1, and the target",
        numbers={
            "row_1": {str(length): v_TS[length, :5] for length in (14, 15, 30)},
            "centre": {str(length): v_TS[length, TARGET] for length in (1, 2, 3, 4)},
        },
        claims={
            "episodes of 100 steps are long enough": bool(
                np.allclose(v_TS[100], solve(mdp, epsilon=1e-9).v_S, atol=1e-3)
            )
        },
        draw=optimal_picture(mdp, v_TS[15], ties(mdp, q_values(mdp, v_TS[15]))),
    )


def soft_around_the_optimum() -> Figure:
    """What exploring costs a policy that was the best without it."""
    plan, mdp = solve(zoo.zhao(0.9, forbidden_reward=TERRIBLE), epsilon=1e-9), zoo.zhao(0.9, **ESCAPE)
    grids = {e: rows(oracle(mdp, epsilon_greedy(mdp, plan.pair_S, e)).v_S) for e in (0.1, 0.2, 0.5)}
    return Figure(
        title="Figure 5.6: epsilon-greedy around the optimum",
        settings="gamma 0.9, forbidden -10, a bump inside a forbidden cell -11; rows 4 and 5",
        numbers={
            "0.1": {"4": grids[0.1][3], "5": grids[0.1][4]},
            "0.2": {"5": grids[0.2][4]},
            "0.5": {"4": grids[0.5][3], "5": grids[0.5][4]},
        },
        draw=optimal_picture(mdp, grids[0.2].ravel(), plan.optimal_N),
    )


def best_soft() -> Figure:
    """The best that can be done while exploring."""
    mdp = zoo.zhao(0.9, **ESCAPE)
    found = {e: epsilon_soft_optimum(mdp, e) for e in (0.2, 0.5)}
    v_S, pi_N = found[0.5]
    at_the_target = np.flatnonzero((mdp.state_N == TARGET) & (pi_N > 0.5))
    return Figure(
        title="Figure 5.7: the best epsilon-greedy policies",
        settings="gamma 0.9, forbidden -10, a bump inside a forbidden cell -11; the cell (3,1) at 0.2 in full",
        numbers={str(e): rows(values_S) for e, (values_S, _) in found.items()} | {"cell_3_1": found[0.2][0][10]},
        claims={
            "at epsilon 0.5 the best policy leaves the target downwards": [
                mdp.action_names[a] for a in mdp.action_N[at_the_target]
            ]
            == ["down"]
        },
        draw=optimal_picture(mdp, v_S, pi_N > 0.5),
    )


def stationary() -> Figure:
    """Where an epsilon-greedy policy spends its time."""
    mdp = two_by_two()
    table_SA = np.full((4, 5), 0.1)
    table_SA[np.arange(4), numbers_of(mdp, "down", "down", "right", "stay")] = 0.6
    flow, _ = policy_matrix(mdp.with_gamma(1.0), policy_of(mdp, table_SA))
    return Figure(
        title="Section 8.2: a stationary distribution",
        settings="2 x 2, epsilon-greedy with epsilon 0.5; eigenvalues of the chain",
        numbers={
            "distribution": oracle(mdp, table_SA).stationary_S,
            "eigenvalues": np.sort(np.linalg.eigvals(flow.toarray()).real),
        },
    )


def uniform_values() -> Figure:
    """Values of the policy that learning with features is shown with."""
    mdp = zoo.zhao(0.9)
    truth = oracle(mdp, uniform(mdp))
    return Figure(
        title="Figure 8.6: the uniform policy",
        settings="gamma 0.9, forbidden -1, boundary -1, target 1",
        numbers={"printed": rows(truth.v_S)},
        claims={"all cells are visited alike": bool(np.allclose(truth.stationary_S, 1 / 25, atol=1e-12))},
        draw=grid_picture(mdp, truth.v_S, uniform(mdp)),
    )


def cells() -> Floats:
    """Column and row of the 25 cells, each from 0 to 1, [25, 2]."""
    row, column = np.divmod(np.arange(25), 5)
    return np.stack((column, row), 1) / 4


def td_limits() -> Figure:
    """The projected fixed points."""
    mdp = zoo.zhao(0.9)
    truth = oracle(mdp, uniform(mdp))
    weights = {name: truth.fixed_point(x) for name, x in td_features().items()}
    errors = {name: rmse(x @ weights[name], truth.v_S) for name, x in td_features().items()}
    constant, along_columns, along_rows = 0, 2, 1  # powers are in the order (0, 0), (0, 1), (1, 0) of (x, y)
    return Figure(
        title="Figures 8.7 and 8.8: where linear TD ends",
        settings="gamma 0.9, uniform policy; RMSE of the projected fixed point, by dimension and by order; weights of "
        "1, x and y",
        numbers={
            "polynomial": {"3": errors["polynomial 1"], "6": errors["polynomial 2"], "10": errors["polynomial 3"]},
            "fourier": {str(q): errors[f"Fourier {q}"] for q in (1, 2, 3)},
            "weights_3": weights["polynomial 1"][[constant, along_columns, along_rows]],
        },
    )


def td_features() -> dict[str, Floats]:
    """Polynomials of coordinates in [-1, 1], waves of coordinates in [0, 1]."""
    points = cells()
    found = {f"polynomial {degree}": polynomial(2 * points - 1, degree) for degree in (1, 2, 3)}
    return found | {f"Fourier {order}": fourier(points, order) for order in (1, 2, 3)}


def rmse(values_S: Floats, truth_S: Floats) -> float:
    """Root of the mean square error over all states."""
    return float(np.sqrt(np.mean((values_S - truth_S) ** 2)))


FIGURES: Mapping[str, Maker] = {
    "zhao_2_4": two_policies,
    "zhao_2_7_right": always_right,
    "zhao_2_7_mixed": mixed,
    "zhao_3_4_a": partial(optimal, "a", 0.9, -1.0, exact=True),
    "zhao_3_4_b": partial(optimal, "b", 0.5, -1.0),
    "zhao_3_4_c": partial(optimal, "c", 0.0, -1.0),
    "zhao_3_4_d": partial(optimal, "d", 0.9, TERRIBLE, exact=True),
    "zhao_4_2": value_iteration_by_hand,
    "zhao_4_5": policy_iteration_by_hand,
    "zhao_4_4": policy_iteration_from_staying,
    "zhao_sweeps": sweeps_of_value_iteration,
    "zhao_5_4": short_episodes,
    "zhao_5_6": soft_around_the_optimum,
    "zhao_5_7": best_soft,
    "zhao_8_2": stationary,
    "zhao_8_6": uniform_values,
    "zhao_8_8": td_limits,
}
