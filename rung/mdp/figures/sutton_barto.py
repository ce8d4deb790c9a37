"""Sutton & Barto's book, the figures without chance.  [Sutton & Barto 2018]"""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import brentq

from rung.mdp import zoo
from rung.mdp.figures.base import Figure, Maker, curves, grid_picture, optimal_picture, rows
from rung.mdp.finite import FiniteMDP, Floats
from rung.mdp.operators import policy_matrix
from rung.mdp.oracle import Oracle, epsilon_greedy, epsilon_soft_optimum, oracle, uniform
from rung.mdp.planning import Solution, solve
from rung.mdp.values import aggregation, fourier, tiles


def jumps() -> Figure:
    """Values of the random policy."""
    mdp = zoo.special_grid()
    v_S = oracle(mdp, uniform(mdp)).v_S
    return Figure(
        title="Example 3.5, figure 3.2: the random policy of the grid with two jumps",
        settings="gamma 0.9",
        numbers={"printed": rows(v_S)},
        draw=grid_picture(mdp, v_S, uniform(mdp)),
    )


def jumps_solved() -> Figure:
    """Optimal values and all optimal actions."""
    mdp = zoo.special_grid()
    found = solve(mdp, epsilon=1e-9)
    return Figure(
        title="Example 3.8, figure 3.5: its optimum",
        settings="gamma 0.9",
        numbers={"printed": rows(found.v_S)},
        draw=optimal_picture(mdp, found.v_S, found.optimal_N),
    )


def square() -> Figure:
    """Values of the random policy, undiscounted."""
    mdp = zoo.square()
    v_S = oracle(mdp, uniform(mdp)).v_S
    return Figure(
        title="Example 4.1, figure 4.1: the random policy of a square",
        settings="4 x 4, two corners end, gamma 1, a step costs 1",
        numbers={"printed": rows(v_S)},
        draw=grid_picture(mdp, v_S, uniform(mdp)),
    )


def walks() -> Figure:
    """Chances to leave on the right, scaled."""
    five, nineteen = zoo.random_walk(5), zoo.random_walk(19, low=-1.0)
    return Figure(
        title="Examples 6.2 and 7.1: true values of the walks",
        settings="5 states, the right end pays 1; 19 states, the left end pays -1, the right one 1",
        numbers={
            "five": oracle(five, uniform(five)).v_S[:5],
            "nineteen": oracle(nineteen, uniform(nineteen)).v_S[:19],
        },
    )


def windy() -> Figure:
    """The fewest steps."""
    mdp = zoo.windy()
    found = solve(mdp, "policy", epsilon=1e-9)
    return Figure(
        title="Example 6.5: the shortest way through the wind",
        settings="gamma 1, a step costs 1",
        numbers={"steps": -float(mdp.first_state_S @ found.v_S)},
        draw=optimal_picture(mdp, found.v_S, found.optimal_N),
    )


def cliff() -> Figure:
    """What learners should come to: with and without exploring."""
    mdp = zoo.cliff()
    plan, soft = solve(mdp, "policy", epsilon=1e-9), {e: epsilon_soft_optimum(mdp, e) for e in (0.1, 0.01)}
    careful_N = (soft[0.1][1] > 0.5).astype(float)
    around_N = {e: e * uniform(mdp) + (1 - e) * among_ties(mdp, plan) for e in (0.1, 0.01)}
    return Figure(
        title="Example 6.6: exact values at the cliff",
        settings="gamma 1; the optimum, the same with epsilon 0.1 (ties alike, or the first of up, down, right) and "
        "0.01, and the best policies that explore so much",
        numbers={
            "greedy": float(mdp.first_state_S @ plan.v_S),
            "epsilon_greedy_around_optimum": {
                "ties": oracle(mdp, around_N[0.1]).objective,
                "first": oracle(mdp, epsilon_greedy(mdp, first_of_ties(mdp, plan), 0.1)).objective,
            },
            "around_0.01": oracle(mdp, around_N[0.01]).objective,
            "best_soft": {str(e): float(mdp.first_state_S @ v_S) for e, (v_S, _) in soft.items()},
            "best_soft_without_exploring": oracle(mdp, careful_N).objective,
        },
    )


def among_ties(mdp: FiniteMDP, plan: Solution) -> Floats:
    """All optimal actions of a state alike, [N]."""
    count_S = np.bincount(mdp.state_N, plan.optimal_N, minlength=mdp.num_states)
    return plan.optimal_N / np.maximum(count_S, 1)[mdp.state_N]


def first_of_ties(mdp: FiniteMDP, plan: Solution) -> np.ndarray:
    """The pair of every state whose action comes first among the optimal ones; -1 where the state is terminal."""
    pair_S = np.full(mdp.num_states, -1)
    for name in ("left", "right", "down", "up"):  # the first of them is written last
        best = np.flatnonzero(plan.optimal_N & (mdp.action_N == mdp.action_names.index(name)))
        pair_S[mdp.state_N[best]] = best
    return pair_S


def thousand_states() -> Figure:
    """The fixed points of linear TD."""
    mdp = zoo.random_walk(1000, reach=100, low=-1.0)
    truth = oracle(mdp, uniform(mdp))
    place_S = np.r_[np.arange(1000) / 999, 0.0]
    acting_S1 = ~mdp.terminal_S[:, None]
    features = {
        "10 groups": aggregation(np.r_[np.arange(1000) // 100, 0]) * acting_S1,
        "50 tilings": tiles(place_S, 5, 50) * acting_S1,
        "Fourier 5": fourier(place_S, 5) * acting_S1,
    }
    found = {name: x @ projected(truth, x) for name, x in features.items()}
    errors = {name: np.sqrt(truth.occupancy_S @ (v_S - truth.v_S) ** 2) for name, v_S in found.items()}
    lines = {"true": truth.v_S} | found
    return Figure(
        title="Figures 9.1, 9.2, 9.5 and 9.10: linear values of a walk of 1000 states",
        settings="gamma 1, the left end pays -1, the right one 1; fixed points of linear TD with 10 groups, with 50 "
        "tilings of tiles 200 states wide, with Fourier features of order 5",
        claims={
            "tilings and Fourier features come nearer to the values than groups": bool(
                max(errors["50 tilings"], errors["Fourier 5"]) < errors["10 groups"]
            ),
            "groups are constant inside and jump between": len(set(np.round(found["10 groups"][:1000], 9))) == 10,
        },
        draw=curves({name: v_S[:1000] for name, v_S in lines.items()}, across="state", up="value"),
    )


def projected(truth: Oracle, x: Floats) -> Floats:
    """Weights of the fixed point under the visits of the policy; where features depend on each other, the shortest."""
    matrix, reward_S = policy_matrix(truth.mdp, truth.pi_N)
    weighted = x.T * truth.occupancy_S
    return np.linalg.lstsq(weighted @ (x - matrix @ x), weighted @ reward_S, rcond=1e-10)[0]


def corridor() -> Figure:
    """One chance for three states that look alike."""
    chances = np.linspace(0.02, 0.98, 97)
    best = best_of_corridor()
    return Figure(
        title="Example 13.1: the short corridor",
        settings="one chance of right in all three states; the best one, its value, and those of epsilon-greedy left "
        "and right with epsilon 0.1",
        numbers={
            "right": best,
            "best": corridor_oracle(best).objective,
            "greedy_left": corridor_oracle(0.05).objective,
            "greedy_right": corridor_oracle(0.95).objective,
        },
        draw=curves(
            {"J": [corridor_oracle(float(right)).objective for right in chances]},
            across="chance of right",
            up="value of the start",
            at=chances,
            within=(-100, 0),
        ),
    )


def best_of_corridor() -> float:
    """The chance of right where the value of the start is flat."""
    return float(brentq(lambda right: corridor_slope(corridor_oracle(right)), 0.3, 0.9, xtol=1e-12))


def corridor_oracle(right: float) -> Oracle:
    """The exact answers of the policy that goes right with this chance wherever it is."""
    mdp = zoo.short_corridor()
    return oracle(mdp, np.where(mdp.action_N == mdp.action_names.index("right"), right, 1 - right))


def corridor_slope(truth: Oracle) -> float:
    """dJ / d right: over the visits, what right is worth more than left."""
    sign_N = np.where(truth.mdp.action_N == truth.mdp.action_names.index("right"), 1.0, -1.0)
    return float(truth.occupancy_S[truth.mdp.state_N] @ (sign_N * truth.q_N))


FIGURES: Mapping[str, Maker] = {
    "sb_3_2": jumps,
    "sb_3_5": jumps_solved,
    "sb_4_1": square,
    "sb_walks": walks,
    "sb_windy": windy,
    "sb_cliff": cliff,
    "sb_9": thousand_states,
    "sb_corridor": corridor,
}
