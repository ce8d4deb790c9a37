"""Sutton & Barto's examples, the environments of Gymnasium, and answers that other solvers print."""

import gymnasium
import numpy as np
import pytest
from published import PUBLISHED, rounds_to

from rung.core.errors import ModelError
from rung.mdp import finite, zoo
from rung.mdp.horizons import finite_horizon
from rung.mdp.operators import backup
from rung.mdp.oracle import epsilon_greedy, epsilon_soft_optimum, oracle, uniform
from rung.mdp.planning import policy_iteration, solve, truncated_policy_iteration
from rung.mdp.zoo.grids import places


def start_value(mdp: finite.FiniteMDP, v_S: np.ndarray) -> float:
    return float(mdp.first_state_S @ v_S)


def test_the_grid_with_two_jumps():
    mdp = zoo.special_grid()
    assert rounds_to(oracle(mdp, uniform(mdp)).v_S, PUBLISHED["sb_3_2"]["printed"])
    assert rounds_to(solve(mdp).v_S, PUBLISHED["sb_3_5"]["printed"])


def test_the_random_policy_of_the_square():
    mdp = zoo.square()
    assert np.allclose(oracle(mdp, uniform(mdp)).v_S, np.ravel(PUBLISHED["sb_4_1"]["printed"]), atol=1e-9)


@pytest.mark.parametrize("method", ["value", "policy", "krylov", "truncated", "gauss-seidel", "prioritized"])
def test_the_windy_grid_takes_fifteen_steps_by_every_method(method):
    mdp = zoo.windy()
    assert round(start_value(mdp, solve(mdp, method).v_S), 5) == -PUBLISHED["sb_windy"]["steps"]


def test_the_cliff_for_greedy_and_soft_policies():
    mdp, published = zoo.cliff(), PUBLISHED["sb_cliff"]
    plan = solve(mdp, "policy", epsilon=1e-9)
    assert round(start_value(mdp, plan.v_S), 6) == published["greedy"]
    count_S = np.bincount(mdp.state_N, plan.optimal_N, minlength=mdp.num_states)
    share_N = plan.optimal_N / np.maximum(count_S, 1)[mdp.state_N]
    ties = 0.1 * uniform(mdp) + 0.9 * share_N
    first_S = np.full(mdp.num_states, -1)
    order = [
        mdp.action_names.index(name) for name in ("left", "right", "down", "up")
    ]  # the first of them is written last
    for action in order:
        best = np.flatnonzero(plan.optimal_N & (mdp.action_N == action))
        first_S[mdp.state_N[best]] = best
    around = published["epsilon_greedy_around_optimum"]
    assert round(oracle(mdp, ties).objective, 2) == around["ties"]
    assert round(oracle(mdp, epsilon_greedy(mdp, first_S, 0.1)).objective, 2) == around["first"]
    for epsilon, value in published["best_soft"].items():
        assert round(start_value(mdp, epsilon_soft_optimum(mdp, float(epsilon))[0]), 2) == value


def test_the_walk_of_five_states_and_that_of_nineteen():
    five, nineteen = zoo.random_walk(5), zoo.random_walk(19, low=-1.0)
    assert np.allclose(oracle(five, uniform(five)).v_S[:5], np.arange(1, 6) / 6)
    assert np.allclose(oracle(nineteen, uniform(nineteen)).v_S[:19], np.arange(-9, 10) / 10)


def test_the_short_corridor_has_its_best_policy_between_left_and_right():
    """All states look alike: one probability of right."""
    mdp, published = zoo.short_corridor(), PUBLISHED["sb_corridor"]

    def value(right: float) -> float:
        return oracle(mdp, np.where(mdp.action_N == 1, right, 1 - right)).objective

    chances = np.linspace(0.5853, 0.5863, 1001)
    values = [value(p) for p in chances]
    assert round(float(chances[int(np.argmax(values))]), 5) == round(published["right"], 5)
    assert round(value(published["right"]), 5) == round(published["best"], 5)
    assert [round(value(p), 1) for p in (0.05, 0.95)] == [published["greedy_left"], published["greedy_right"]]


def test_the_gambler_wins_from_fifty_as_often_as_the_coin():
    """One bold stake; and v(25) = 0.4 * 0.4, v(75) = 0.4 + 0.6 * 0.4 by two of them."""
    v_S = solve(zoo.gambler()).v_S
    assert np.allclose(v_S[[25, 50, 75]], [0.16, 0.4, 0.64], atol=1e-5)
    assert (np.diff(v_S[:-1]) > 0).all()


@pytest.mark.parametrize(("points", "actions"), [(41, 41), (161, 161)])
def test_the_regulator_on_a_grid_is_near_riccatis_answer(points, actions):
    """Linear interpolation of -p x^2 errs by at most gamma p h^2 / 4 a step, rounding u to the grid costs at most
    (r + gamma b^2 p) (k / 2)^2, both summed over 1 / (1 - gamma) steps; the walls are too far away to matter."""
    gamma, a, b, q, r, noise = 0.9, 0.9, 0.5, 1.0, 0.1, 0.1
    p = q
    for _ in range(1000):
        p = q + gamma * a * a * p - (gamma * a * b * p) ** 2 / (r + gamma * b * b * p)
    mdp = zoo.lqr(points, actions)
    x_S = np.linspace(-2, 2, points)
    exact_S = -(p * x_S**2 + gamma * p * noise**2 / (1 - gamma))
    h, k = 4 / (points - 1), 4 / (actions - 1)
    bound = (gamma * p * h**2 / 4 + (r + gamma * b * b * p) * (k / 2) ** 2) / (1 - gamma)
    near = abs(x_S) <= 1
    off_S = abs(solve(mdp).v_S - exact_S)[near]
    assert off_S.max() <= bound
    assert bound < (0.1 if points == 41 else 0.01)


def test_jacks_cars_moved_as_in_figure_4_2():
    """Five from a full first place to an empty second, four the other way, none where they are few."""
    mdp = zoo.car_rental()
    found = solve(mdp, "policy")
    action_S = {name: mdp.action_names[a] for name, a in zip(mdp.state_names, found.action_S, strict=True)}
    assert [action_S[s] for s in ("(20, 0)", "(0, 0)", "(0, 20)", "(10, 10)")] == ["5", "0", "-4", "0"]


@pytest.mark.parametrize("name", [name for name in PUBLISHED["gymnasium"] if name.endswith("-v1") or name == "Taxi-v4"])
def test_optima_of_the_toy_text_environments(name):
    published = PUBLISHED["gymnasium"][name]
    environment = gymnasium.make(name)
    mdp = finite.from_gymnasium(environment, 1.0)
    if "limited" in published:
        v_TS, _ = finite_horizon(mdp, published["steps"])
        assert round(start_value(mdp, v_TS[-1]), 6) == pytest.approx(published["limited"], abs=1e-6)
    assert round(start_value(mdp, solve(mdp, "policy", epsilon=1e-7).v_S), 6) == pytest.approx(
        published["endless"], abs=1e-6
    )
    for gamma in ("0.99", "0.9"):
        v_S = solve(mdp.with_gamma(float(gamma)), epsilon=1e-8).v_S
        assert round(start_value(mdp, v_S), 6) == pytest.approx(published[gamma], abs=1e-6)


def test_blackjack_by_its_three_rules():
    published = PUBLISHED["gymnasium"]["Blackjack"]
    for rules in ("sutton", "plain", "natural"):
        mdp = zoo.blackjack(rules)
        assert start_value(mdp, solve(mdp, "policy").v_S) == pytest.approx(published[rules], abs=5e-8)


def test_blackjack_is_played_as_in_figure_5_2():
    mdp = zoo.blackjack()
    found = solve(mdp, "policy")
    plays = dict(zip(mdp.state_names, found.action_S, strict=True))
    for dealer in range(1, 11):
        for total in range(12, 22):
            hits_hard = (
                total <= 11 or (total == 12 and dealer not in (4, 5, 6)) or (total <= 16 and dealer not in range(2, 7))
            )
            hits_soft = total <= 17 or (total == 18 and dealer in (9, 10, 1))
            for ace, hits in (("", hits_hard), (" with an ace", hits_soft)):
                assert mdp.action_names[plays[f"{total}{ace} against {dealer}"]] == ("hit" if hits else "stick")


def test_a_state_of_blackjack_under_a_plain_policy():
    """Stick on 20 and 21: the exact target of figure 5.3."""
    mdp = zoo.blackjack()
    stick = mdp.action_names.index("stick")
    totals = [int(name.split()[0]) if name[0].isdigit() else 0 for name in mdp.state_names]
    actions = np.array([stick if total >= 20 else 1 - stick for total in totals])
    state = mdp.state_names.index("13 with an ace against 2")
    assert oracle(mdp, actions).v_S[state] == pytest.approx(
        PUBLISHED["gymnasium"]["Blackjack"]["stick_on_20"], abs=5e-7
    )


@pytest.mark.parametrize("method", ["value", "policy", "krylov", "truncated", "gauss-seidel", "prioritized"])
def test_answers_of_other_solvers(method):
    puterman, forest = (PUBLISHED["solvers"][name] for name in ("puterman", "forest"))
    assert np.allclose(solve(zoo.puterman(puterman["gamma"]), method).v_S, puterman["values"], atol=1e-6)
    assert np.allclose(solve(zoo.forest(gamma=forest["gamma"]), method).v_S, forest["values"], atol=1e-5)


@pytest.mark.parametrize("name", ["puterman", "forest"])
def test_policy_iteration_takes_as_many_policies_as_others_print(name):
    """From the policy that is greedy for nothing to come."""
    published = PUBLISHED["solvers"][name]
    mdp = getattr(zoo, name)(gamma=published["gamma"])
    iterates = list(policy_iteration(mdp, backup(mdp, np.zeros(mdp.num_states))[1]))
    assert len(iterates) == published["policies"]
    assert np.allclose(iterates[-1].v_S, published["values"], atol=5e-9)


def test_modified_policy_iteration_on_putermans_model_prints_what_quantecon_does():
    """From 0, twenty sweeps a policy, until T v - v spreads by less than (1 - gamma) epsilon / gamma; the middle."""
    published, mdp = PUBLISHED["solvers"]["puterman_modified"], zoo.puterman(0.95)
    iterates = enumerate(truncated_policy_iteration(mdp, sweeps=published["sweeps"], v_S=np.zeros(2)), start=1)
    spread = 0.05 / 0.95 * published["epsilon"]
    count, last = next((k, it) for k, it in iterates if np.ptp(backup(mdp, it.v_S)[0] - it.v_S) < spread)
    assert count == published["iterations"]
    assert np.allclose(last.bounds.middle_S, published["values"], atol=5e-9)


def test_the_model_that_mushroom_rl_tests_with():
    """Four states, one of them an end; a step fails with chance 0.1."""
    published = PUBLISHED["solvers"]["mushroom"]
    moves = [[0, 2, 0, 1], [1, 3, 0, 1], [0, 2, 2, 3]]  # where an action leads; to stay is certain
    model = {
        s: {a: [(1.0, s, 0.0)] if to == s else [(0.9, to, float(to == 3)), (0.1, s, 0.0)] for a, to in enumerate(row)}
        for s, row in enumerate(moves)
    }
    found = solve(finite.from_dict(model, published["gamma"]), epsilon=1e-9)
    assert np.allclose(found.v_S, published["values"], atol=5e-9)
    assert all(found.optimal_N[4 * s + action] for s, action in enumerate(published["policy"]))


def test_the_model_of_mdpsolvers_first_page():
    published = PUBLISHED["solvers"]["mdpsolver"]
    prob = [[[0.9, 0.1, 0], [0.1, 0.9, 0]], [[0.4, 0.5, 0.1], [0.3, 0.5, 0.2]], [[0.2, 0.2, 0.6], [0.5, 0.5, 0]]]
    mdp = finite.from_arrays(np.array(prob), np.array([[5.0, -1], [1, -2], [50, 0]]), published["gamma"])
    assert solve(mdp).action_S.tolist() == published["policy"]


def test_a_solver_that_stops_on_the_span_prints_values_that_are_off_by_two():
    """pymdptoolbox's small model: what it prints are 26 sweeps of value iteration; the optimum is 2.4 higher."""
    small = PUBLISHED["solvers"]["small"]
    prob = np.array([[[0.5, 0.5], [0, 1]], [[0.8, 0.2], [0.1, 0.9]]])
    mdp = finite.from_arrays(prob, np.array([[5.0, 10.0], [-1.0, 2.0]]), small["gamma"])
    v_S = np.zeros(2)
    for _ in range(small["sweeps"]):
        v_S, _ = backup(mdp, v_S)
    assert np.allclose(v_S, small["values"], atol=1e-12)
    found = solve(mdp)
    assert found.action_S.tolist() == small["policy"]
    assert (found.v_S - v_S > 2).all()


def test_the_formula_of_putermans_model():
    for gamma in (0.92, 0.95, 0.99):
        expected = [(5 - 5.5 * gamma) / ((1 - 0.5 * gamma) * (1 - gamma)), -1 / (1 - gamma)]
        assert np.allclose(solve(zoo.puterman(gamma), "policy").v_S, expected)


def test_value_iteration_on_putermans_model_stops_where_quantecon_does():
    """Stopping rule |T v - v| < (1 - gamma) epsilon / (2 gamma) with epsilon 0.01, from 0: 162 sweeps."""
    published, mdp = PUBLISHED["solvers"]["puterman"], zoo.puterman(0.95)
    v_S, sweeps, change = np.zeros(2), 0, np.inf
    while not change < 0.05 * 0.01 / (2 * 0.95):
        new_S = backup(mdp, v_S)[0]
        v_S, sweeps, change = new_S, sweeps + 1, float(abs(new_S - v_S).max())
    assert sweeps == published["sweeps"]
    assert np.allclose(v_S, published["swept"], atol=5e-9)


def test_the_sixteen_values_of_the_frozen_lake():
    mdp = finite.from_gymnasium(gymnasium.make("FrozenLake-v1"), 0.99)
    assert np.allclose(
        solve(mdp, epsilon=1e-8).v_S, np.ravel(PUBLISHED["gymnasium"]["frozen_lake_values"]), atol=5.1e-5
    )


def test_a_gymnasium_environment_without_a_table_is_refused():
    with pytest.raises(ModelError, match="no table P of its transitions"):
        finite.from_gymnasium(gymnasium.make("CartPole-v1"), 0.9)


def test_a_grid_world_knows_its_places_and_other_models_have_none():
    cells, marks = places(zoo.zhao())
    assert cells[7].tolist() == [1, 2]
    assert "".join(marks) == "......##....#...#T#..#..."
    assert places(zoo.forest()) is None
