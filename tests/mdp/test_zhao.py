"""Zhao's 5 x 5 grid: every printed digit, and the sets of optimal actions.  The digits stand in published.toml."""

import numpy as np
import pytest
from published import LETTERS, PUBLISHED, rounds_to

from rung.mdp import zoo
from rung.mdp.finite import FiniteMDP
from rung.mdp.horizons import finite_horizon
from rung.mdp.operators import backup
from rung.mdp.oracle import epsilon_greedy, epsilon_soft_optimum, oracle, uniform
from rung.mdp.planning import solve
from rung.mdp.values import fourier, polynomial

TERRIBLE = {"forbidden_reward": -10.0}
ESCAPE = {**TERRIBLE, "bump": "both"}


def letters(mdp: FiniteMDP, chosen_N: np.ndarray) -> list[str]:
    """The chosen actions of every state, as URDLS, a row of the grid as one string."""
    cells = [
        "".join("URDLS"[mdp.action_N[n]] for n in np.flatnonzero((mdp.state_N == s) & chosen_N)) for s in range(25)
    ]
    return [" ".join(cells[row : row + 5]) for row in range(0, 25, 5)]


@pytest.mark.parametrize(
    ("figure", "gamma", "options"),
    [("3_4_a", 0.9, {}), ("3_4_b", 0.5, {}), ("3_4_c", 0.0, {}), ("3_4_d", 0.9, TERRIBLE)],
)
def test_optimal_values_and_all_optimal_actions_of_figure_3_4(figure, gamma, options):
    published, mdp = PUBLISHED[f"zhao_{figure}"], zoo.zhao(gamma, **options)
    found = solve(mdp, epsilon=1e-9)
    assert rounds_to(found.v_S, published["printed"])
    if "exact" in published:
        assert np.allclose(found.v_S, np.ravel(published["exact"]), atol=5e-7)
        assert letters(mdp, found.optimal_N) == published["actions"]


def test_always_right_and_the_mixed_policy_of_figure_2_7():
    mdp = zoo.zhao(0.9)
    assert rounds_to(oracle(mdp, np.full(25, 1)).v_S, PUBLISHED["zhao_2_7_right"]["printed"])
    mixed = PUBLISHED["zhao_2_7_mixed"]
    actions = np.array([LETTERS[letter] for row in mixed["policy"] for letter in row])
    assert rounds_to(oracle(mdp, actions).v_S, mixed["printed"])


def test_the_uniform_policy_of_figure_8_6_visits_all_cells_alike():
    mdp = zoo.zhao(0.9)
    truth = oracle(mdp, uniform(mdp))
    assert rounds_to(truth.v_S, PUBLISHED["zhao_8_6"]["printed"])
    assert np.allclose(truth.stationary_S, 1 / 25, atol=1e-12)


def test_mc_basic_with_short_episodes_is_value_iteration_cut_short():
    """Figure 5.4: with exact returns of L steps, MC Basic ends where the finite horizon does."""
    published = PUBLISHED["zhao_5_4"]
    v_TS, _ = finite_horizon(zoo.zhao(0.9, **TERRIBLE), 100)
    for length, row in published["row_1"].items():
        assert rounds_to(v_TS[int(length), :5], row)
    for length, value in published["centre"].items():
        assert rounds_to(v_TS[int(length), 17:18], [value])
    assert np.allclose(v_TS[100], solve(zoo.zhao(0.9, **TERRIBLE)).v_S, atol=1e-3)


@pytest.mark.parametrize("epsilon", ["0.1", "0.2", "0.5"])
def test_epsilon_greedy_around_the_optimum_of_figure_5_6(epsilon):
    """Epsilon of all actions alike; standing on a forbidden cell, a bump costs 11."""
    plan = solve(zoo.zhao(0.9, **TERRIBLE))
    mdp = zoo.zhao(0.9, **ESCAPE)
    v_S = oracle(mdp, epsilon_greedy(mdp, plan.pair_S, float(epsilon))).v_S
    for row, values in PUBLISHED["zhao_5_6"][epsilon].items():
        assert rounds_to(v_S[5 * int(row) - 5 : 5 * int(row)], values)


def test_the_plain_rule_gives_other_digits_than_figure_5_6_prints():
    """With -1 for a bump anywhere, the cell (5,2) has 2.80, -2.79 and -15.24: so the book used -11."""
    mdp = zoo.zhao(0.9, **TERRIBLE)
    plan = solve(mdp)
    found = [oracle(mdp, epsilon_greedy(mdp, plan.pair_S, e)).v_S[21] for e in (0.1, 0.2, 0.5)]
    assert np.allclose(found, [2.80, -2.79, -15.24], atol=0.005)


@pytest.mark.parametrize("epsilon", ["0.2", "0.5"])
def test_the_best_epsilon_greedy_policies_of_figure_5_7(epsilon):
    v_S, pi_N = epsilon_soft_optimum(zoo.zhao(0.9, **ESCAPE), float(epsilon))
    printed = np.ravel(PUBLISHED["zhao_5_7"][epsilon])
    if epsilon == "0.2":
        assert round(float(v_S[10]), 3) == -1.134  # printed as -1.2, the only cell that differs
        printed[10] = -1.1
    assert rounds_to(v_S, printed)
    if epsilon == "0.5":
        assert "URDLS"[pi_N[17 * 5 : 18 * 5].argmax()] == "D"  # away from the target, past the forbidden cells


def test_the_two_policies_of_the_two_by_two_world():
    """Figures 2.4 and 2.5: down then right; or right into the forbidden cell half of the time."""
    mdp = zoo.grid(".#\n.T", 0.9)
    down, right, stay = LETTERS["D"], LETTERS["R"], LETTERS["S"]
    assert np.allclose(oracle(mdp, np.array([down, down, right, stay])).v_S, PUBLISHED["zhao_2_4"]["first"])
    table = np.zeros((4, 5))
    table[0, [down, right]] = 0.5
    table[[1, 2, 3], [down, right, stay]] = 1
    assert np.allclose(oracle(mdp, table).v_S, PUBLISHED["zhao_2_4"]["second"])


def test_two_sweeps_of_value_iteration_on_the_two_by_two_world():
    mdp = zoo.grid(".#\n.T", 0.9)
    first, _ = backup(mdp, np.zeros(4))
    second, _ = backup(mdp, first)
    assert first.tolist() == [0, 1, 1, 1]
    assert np.allclose(second, [0.9, 1.9, 1.9, 1.9])


@pytest.mark.parametrize("tolerance", ["1e-3", "1e-6", "1e-9", "1e-12"])
def test_how_many_sweeps_value_iteration_takes(tolerance):
    mdp, v_S, sweeps, change = zoo.zhao(0.9), np.zeros(25), 0, np.inf
    while change >= float(tolerance):
        new_S, _ = backup(mdp, v_S)
        change, v_S, sweeps = float(abs(new_S - v_S).max()), new_S, sweeps + 1
    assert sweeps == PUBLISHED["zhao_sweeps"]["sweeps"][tolerance]


def test_rewards_scaled_and_shifted_scale_and_shift_the_values():
    """Theorem 3.6: v' = a v + b / (1 - gamma), and the same optimal actions."""
    one = solve(zoo.zhao(0.9), epsilon=1e-9)
    rewards = {"other_reward": 2.0, "boundary_reward": -1.0, "forbidden_reward": -1.0, "target_reward": 5.0}
    other = solve(zoo.zhao(0.9, **rewards), epsilon=1e-9)  # 3 r + 2
    assert np.allclose(other.v_S, 3 * one.v_S + 2 / (1 - 0.9), atol=1e-7)
    assert (other.optimal_N == one.optimal_N).all()


def test_the_fixed_points_of_linear_td_in_figures_8_7_and_8_8():
    """RMSE to v_pi over cells; coordinates x along columns, y along rows."""
    mdp, published = zoo.zhao(0.9), PUBLISHED["zhao_8_8"]
    truth = oracle(mdp, uniform(mdp))
    row, column = np.divmod(np.arange(25), 5)
    signed = np.stack((column / 2 - 1, row / 2 - 1), axis=1)
    for degree, dimension in ((1, "3"), (2, "6"), (3, "10")):
        features = polynomial(signed, degree)
        assert features.shape == (25, int(dimension))
        w = truth.fixed_point(features)
        assert round(float(np.sqrt(np.mean((features @ w - truth.v_S) ** 2))), 4) == published["polynomial"][dimension]
        if dimension == "3":
            assert sorted(np.round(w, 2)) == sorted(published["weights_3"])
    for order, error in published["fourier"].items():
        features = fourier(np.stack((column / 4, row / 4), axis=1), int(order))
        w = truth.fixed_point(features)
        assert round(float(np.sqrt(np.mean((features @ w - truth.v_S) ** 2))), 4) == error
