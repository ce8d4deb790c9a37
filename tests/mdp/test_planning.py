"""Every planner against a dense linear solve, on random models; bounds that hold; sub-stochastic rows and gamma 1."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.core.errors import ConfigError, ModelError
from rung.mdp import certificates, finite, operators, planning, zoo
from rung.mdp.certificates import bounds, distances, ending_pairs, expected_steps
from rung.mdp.oracle import oracle
from rung.mdp.planning import METHODS, choose, evaluate, policy_iteration, solve, truncated_policy_iteration


def random_model(seed: int, *, gamma: float | None = None, ends: bool = False) -> finite.FiniteMDP:
    """3 to 7 states, 1 to 3 legal actions, sparse rows, some sub-stochastic, some transitions discounted of their own;
    with `ends`, a terminal state and a chance to end everywhere."""
    rng = np.random.default_rng(seed)
    states, actions = int(rng.integers(3, 8)), int(rng.integers(1, 4))
    prob = rng.dirichlet(np.full(states, 0.3), size=(states, actions))
    prob[prob < 0.05] = 0.0
    prob /= prob.sum(-1, keepdims=True)
    prob *= rng.choice([1.0, 1.0, 0.8], size=(states, actions, 1))
    legal = rng.random((states, actions)) < 0.7
    legal[np.arange(states), rng.integers(actions, size=states)] = True
    if ends:
        prob = 0.9 * prob  # every action ends with a chance
        legal[-1] = False
    gamma = float(rng.choice([0.0, 0.5, 0.9, 0.97])) if gamma is None else gamma
    mdp = finite.from_arrays(prob, rng.normal(size=(states, actions)), gamma, legal_SA=legal)
    keep_M = rng.choice([1.0, 1.0, 0.6, 0.0], size=len(mdp.prob_M))
    return replace(mdp, keep_M=keep_M) if rng.random() < 0.3 else mdp


def proper_model(seed: int) -> finite.FiniteMDP:
    """gamma 1, full rows, rewards of 0 and less, loops that cost nothing; from everywhere an end is in reach."""
    rng = np.random.default_rng(seed)
    states, actions = int(rng.integers(2, 6)), int(rng.integers(1, 4))
    prob = np.zeros((states, actions, states))
    for s in range(states - 1):
        for a in range(actions):
            ahead = s + 1 if a == 0 else int(rng.integers(states))  # action 0 leads on
            prob[s, a, ahead] += 1.0
            if rng.random() < 0.4:
                prob[s, a] = 0.8 * prob[s, a] + 0.2 * np.eye(states)[rng.integers(states)]
    legal = np.ones((states, actions), bool)
    legal[-1] = False
    return finite.from_arrays(prob, -rng.choice([0.0, 0.0, 0.5, 1.0], size=(states, actions)), 1.0, legal_SA=legal)


def dense(mdp: finite.FiniteMDP) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, S] and rewards, written out without any of Rung's operators."""
    rows = np.zeros((mdp.num_pairs, mdp.num_states))
    for pair in range(mdp.num_pairs):
        for m in range(mdp.row_N1[pair], mdp.row_N1[pair + 1]):
            keep = 1.0 if mdp.keep_M is None else mdp.keep_M[m]
            rows[pair, mdp.next_M[m]] += mdp.gamma * keep * mdp.prob_M[m]
    return rows, mdp.reward_N


def best_by_enumeration(mdp: finite.FiniteMDP) -> np.ndarray:
    """The largest value of all deterministic policies, each by a dense solve."""
    rows, reward_N = dense(mdp)
    best = np.full(mdp.num_states, -np.inf)
    choices = [range(mdp.first_S1[s], mdp.first_S1[s + 1]) for s in range(mdp.num_states)]
    acting = [s for s in range(mdp.num_states) if len(choices[s])]
    for pairs in itertools.product(*(choices[s] for s in acting)):
        matrix, right = np.eye(mdp.num_states), np.zeros(mdp.num_states)
        matrix[acting] -= rows[list(pairs)]
        right[acting] = reward_N[list(pairs)]
        if mdp.gamma == 1 and not ends(matrix, acting):
            continue
        best = np.maximum(best, np.linalg.solve(matrix, right))
    return best


def ends(matrix: np.ndarray, acting: list[int]) -> bool:
    """Does the policy of this I - P leave the acting states with certainty?"""
    flow = (np.eye(len(matrix)) - matrix)[np.ix_(acting, acting)]
    return bool(np.linalg.matrix_power(flow, 10_000).max(initial=0.0) < 1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_all_planners_agree_with_the_best_of_all_policies(seed, ends):
    mdp = random_model(seed, ends=ends)
    exact_S = best_by_enumeration(mdp)
    for method in METHODS:
        found = solve(mdp, method, epsilon=1e-7)
        assert abs(found.v_S - exact_S).max() <= 1.01e-7, method
        assert (found.lower_S <= exact_S + 1e-9).all(), method
        assert (exact_S <= found.upper_S + 1e-9).all(), method
        assert found.error <= 1e-7
        chosen = np.where(found.pair_S >= 0, found.pair_S, 0)
        q_N = operators.q_values(mdp, exact_S)
        assert np.allclose(q_N[chosen][found.pair_S >= 0], exact_S[found.pair_S >= 0], atol=1e-6), method


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_with_gamma_one_all_planners_agree_where_every_policy_ends(seed):
    mdp = random_model(seed, gamma=1.0, ends=True)
    exact_S = best_by_enumeration(mdp)
    for method in METHODS:
        found = solve(mdp, method, epsilon=1e-7)
        assert abs(found.v_S - exact_S).max() <= 1.01e-7, method
        assert (found.lower_S <= exact_S + 1e-9).all(), method
        assert (exact_S <= found.upper_S + 1e-9).all(), method


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_with_gamma_one_and_loops_that_cost_nothing_the_policy_returned_ends(seed):
    """v* is the best of the policies that end; the bounds contain it, and the policy returned has it."""
    mdp = proper_model(seed)
    exact_S = best_by_enumeration(mdp)
    rows, reward_N = dense(mdp)
    for method in METHODS:
        found = solve(mdp, method, epsilon=1e-7)
        assert abs(found.v_S - exact_S).max() <= 1.01e-7, method
        assert (found.lower_S <= exact_S + 1e-9).all(), method
        assert (exact_S <= found.upper_S + 1e-9).all(), method
        acting = [s for s in range(mdp.num_states) if found.pair_S[s] >= 0]
        matrix, right = np.eye(mdp.num_states), np.zeros(mdp.num_states)
        matrix[acting] -= rows[found.pair_S[acting]]
        right[acting] = reward_N[found.pair_S[acting]]
        assert ends(matrix, acting), method
        assert np.allclose(np.linalg.solve(matrix, right), exact_S, atol=1e-6), method


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_bounds_with_gamma_one_contain_the_optimum_from_any_values(seed, other):
    mdp = proper_model(seed)
    v_S = np.where(mdp.terminal_S, 0.0, np.random.default_rng(other).normal(size=mdp.num_states) * 3)
    found, exact_S = bounds(mdp, v_S), best_by_enumeration(mdp)
    assert (found.lower_S <= exact_S + 1e-9).all()
    assert (exact_S <= found.upper_S + 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_where_every_way_costs_nothing(method):
    """All steps are tied; the first greedy pair walks in circles for ever."""
    found = solve(zoo.zhao(1.0, target="end"), method)
    assert np.allclose(found.v_S, [0.0 if s == 17 else 1.0 for s in range(25)], atol=1e-6)
    chain = zoo.chain(3)
    assert [chain.action_names[a] for a in solve(chain, method).action_S[:3]] == ["right"] * 3
    costly = finite.from_dict({"a": {"loop": [(1, "a", 0)], "end": [(1, None, -5)]}}, 1.0)
    assert solve(costly, method).v_S[0] == pytest.approx(-5, abs=1e-6)


def test_a_loop_that_pays_for_ever_is_explained():
    model = finite.from_dict({"a": {"end": [(1, None, 0)], "loop": [(1, "b", 1)]}, "b": {"back": [(1, "a", 0)]}}, 1.0)
    with pytest.raises(ModelError, match="a loop through state a pays for ever"):
        solve(model)


def test_what_fp64_rounds_off_is_inside_the_bounds():
    """Two states, gamma 0.999999: values of a million, in which the last digit counts a million times."""
    for reward in np.linspace(0.1, 1, 50):
        mdp = finite.from_dict({"a": {"go": [(1, "b", reward)]}, "b": {"go": [(1, "a", reward)]}}, 0.999999)
        found = solve(mdp, "policy", epsilon=None)
        assert abs(found.v_S - reward / (1 - 0.999999)).max() <= found.error + 1e-12
    with pytest.raises(ModelError, match="fp64 itself cannot tell values closer"):
        solve(mdp, "policy", epsilon=1e-6)


@pytest.mark.parametrize("method", ["value", "truncated", "gauss-seidel", "krylov"])
def test_a_method_that_only_rounds_is_stopped(method):
    """Values near -100, of which fp64 tells 1e-14, asked for to 1e-12 where gamma multiplies that by 100."""
    seen = []
    with pytest.raises(ModelError, match="fp64 itself cannot tell values closer"):
        solve(zoo.random_walk(30, gamma=0.99, low=-1e6), method, epsilon=1e-9, listener=seen.append)
    assert len(seen) < 20_000
    assert seen[-1].bounds.gap < 1e-3


def test_rows_whose_sum_is_a_rounded_one_do_not_end():
    near = float(np.nextafter(1.0, 0.0))
    mdp = finite.from_dict({"a": {"go": [(near, "b", -1)]}, "b": {"go": [(near, "a", -1)]}}, 1.0)
    assert 1 - 1e-12 < mdp.weight_N[0] < 1
    with pytest.raises(ModelError, match="no end can be reached"):
        solve(mdp)


def test_the_number_of_sweeps_and_the_krylov_method_can_be_chosen():
    mdp = zoo.garnet(200, 3, 4, gamma=0.99)
    exact_S = solve(mdp, "policy").v_S
    few, many = (solve(mdp, partial(truncated_policy_iteration, sweeps=n)) for n in (2, 50))
    assert np.allclose(few.v_S, exact_S, atol=2e-6)
    assert np.allclose(many.v_S, exact_S, atol=2e-6)
    assert few.method == "truncated_policy_iteration"
    assert few.products > many.products
    with pytest.raises(ConfigError, match="value goes on without end"):
        solve(mdp, "value", epsilon=None)


def test_iterates_stay_as_they_were():
    for method in METHODS:
        seen = []
        solve(zoo.garnet(20, 2, 3, gamma=0.9), method, listener=lambda x, seen=seen: seen.append((x, x.v_S.copy())))
        assert all(np.array_equal(iterate.v_S, copy) for iterate, copy in seen), method


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_bounds_from_any_values_contain_the_optimum(seed, other):
    mdp = random_model(seed)
    v_S = np.random.default_rng(other).normal(size=mdp.num_states) * 10
    exact_S = best_by_enumeration(mdp)
    found = bounds(mdp, v_S)
    slack = 1e-9 * (1 + abs(exact_S).max())
    assert (found.lower_S <= exact_S + slack).all()
    assert (exact_S <= found.upper_S + slack).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_operators_are_monotone_contract_and_equal_their_twins(seed, other):
    mdp, rng = random_model(seed), np.random.default_rng(other)
    low_S = rng.normal(size=mdp.num_states)
    high_S = low_S + rng.random(mdp.num_states)
    low, high = operators.backup(mdp, low_S)[0], operators.backup(mdp, high_S)[0]
    assert (low <= high + 1e-12).all()
    assert abs(high - low).max() <= operators.modulus(mdp) * abs(high_S - low_S).max() + 1e-12
    rows, reward_N = dense(mdp)
    assert np.allclose(operators.q_values(mdp, low_S), reward_N + rows @ low_S, atol=1e-12)
    pair_S = solve(mdp).pair_S
    for function, args in (
        (operators.q_values, (low_S,)),
        (operators.backup, (low_S,)),
        (operators.follow, (pair_S, low_S)),
    ):
        ours, twin = function(mdp, *args), function(mdp, *args, twin=True)
        for one, same in zip(np.atleast_2d(ours), np.atleast_2d(twin), strict=True):
            assert np.allclose(one, same, atol=1e-12)
    allowed_N = rng.random(mdp.num_pairs) < 0.7
    for allowed in (None, allowed_N):
        assert (distances(mdp, allowed_N=allowed) == distances(mdp, allowed_N=allowed, twin=True)).all()
    order_S = rng.permutation(mdp.num_states)
    swept, twin_S, best_S, twin_best_S = low_S.copy(), low_S.copy(), pair_S.copy(), pair_S.copy()
    operators.sweep_(mdp, order_S, swept, best_S)
    operators.sweep_(mdp, order_S, twin_S, twin_best_S, twin=True)
    assert np.allclose(swept, twin_S, atol=1e-12)
    assert (best_S == twin_best_S).all()
    renewed, twin_S, change_S = low_S.copy(), low_S.copy(), abs(operators.backup(mdp, low_S)[0] - low_S)
    into_S1, into_K = operators.leading(mdp)
    for s in range(mdp.num_states):
        before = mdp.state_N[np.repeat(np.arange(mdp.num_pairs), mdp.counts_N)[mdp.next_M == s]]
        assert into_K[into_S1[s] : into_S1[s + 1]].tolist() == sorted(set(before.tolist()))
    times = int(rng.integers(3 * mdp.num_states))
    operators.renew_(mdp, into_S1, into_K, change_S, renewed, times)
    operators.renew_(mdp, into_S1, into_K, change_S, twin_S, times, twin=True)
    assert np.allclose(renewed, twin_S, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(-3, 3))
def test_affine_rewards_move_values_affinely(seed, scale, shift):
    """v' = a v + b w, where w is the expected discounted length: 1 / (1 - gamma) where no row leaks."""
    mdp = random_model(seed)
    one = solve(mdp, "policy", epsilon=1e-9)
    other = replace(mdp, reward_N=scale * mdp.reward_N)
    assert np.allclose(solve(other, "policy", epsilon=1e-9).v_S, scale * one.v_S, atol=1e-6)
    full = finite.from_arrays(np.full((3, 2, 3), 1 / 3), np.arange(6.0).reshape(3, 2), 0.9)
    moved = replace(full, reward_N=scale * full.reward_N + shift)
    expected_S = scale * solve(full, epsilon=1e-9).v_S + shift / (1 - 0.9)
    assert np.allclose(solve(moved, epsilon=1e-9).v_S, expected_S, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_policy_is_evaluated_by_every_method(seed, other):
    """As the model in which nothing is left to choose."""
    mdp = random_model(seed)
    weights_N = np.random.default_rng(other).random(mdp.num_pairs)
    policy_N = weights_N / finite.sums(weights_N, mdp.first_S1)[mdp.state_N]
    rows, reward_N = dense(mdp)
    mix = np.zeros((mdp.num_states, mdp.num_pairs))
    mix[mdp.state_N, np.arange(mdp.num_pairs)] = policy_N
    exact_S = np.linalg.solve(np.eye(mdp.num_states) - mix @ rows, mix @ reward_N)
    alone = operators.under(mdp, policy_N)
    for method in METHODS:
        found = solve(alone, method, epsilon=1e-7)
        assert abs(found.v_S - exact_S).max() <= 1.01e-7, method
    assert np.allclose(oracle(mdp, policy_N).v_S, exact_S)
    assert np.allclose(oracle(alone, np.ones(alone.num_pairs)).variance_S, oracle(mdp, policy_N).variance_S)


def test_a_krylov_solve_begins_where_it_is_told():
    """From v* itself nothing is left to do: fewer products than from zero."""
    mdp = zoo.garnet(500, 3, 4, gamma=0.99)
    best = solve(mdp, "policy", epsilon=1e-10)
    cold = next(policy_iteration(mdp, best.pair_S, krylov="bicgstab"))
    warm = next(policy_iteration(mdp, best.pair_S, v_S=best.v_S, krylov="bicgstab"))
    assert warm.policy_products < cold.policy_products
    assert warm.residual < cold.residual


def test_all_optimal_actions_are_found_where_they_tie():
    """Two ways round: both first steps are optimal, and the third action is not."""
    model = {
        "a": {"left": [(1, "b", 0)], "right": [(1, "c", 0)], "stay": [(1, "a", 0)]},
        "b": {"on": [(1, None, 1)]},
        "c": {"on": [(1, None, 1)]},
    }
    found = solve(finite.from_dict(model, 0.9))
    assert found.optimal_N.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("method", METHODS)
def test_epsilon_asked_for_is_epsilon_kept(method):
    mdp = zoo.garnet(60, 3, 4, gamma=0.99, seed=1)
    exact_S = solve(mdp, "policy", epsilon=1e-10).v_S
    for epsilon in (1e-1, 1e-4):
        found = solve(mdp, method, epsilon=epsilon)
        assert abs(found.v_S - exact_S).max() <= found.error + 1e-9 <= epsilon + 1e-9


def test_gamma_one_without_an_end_is_explained():
    endless = finite.from_dict({"a": {"go": [(1, "b", -1)]}, "b": {"go": [(1, "a", -1)]}}, 1.0)
    with pytest.raises(ModelError, match="from state a no end can be reached"):
        solve(endless)
    with pytest.raises(ModelError, match="gamma is 1, and the policy does not end from state a"):
        evaluate(endless, np.ones(2))


def test_an_unreachable_target_is_explained_with_gamma_one_and_allowed_below():
    walled = zoo.grid("T#.", 1.0, forbidden="block", target="end", actions=("left", "right"))
    with pytest.raises(ModelError, match=r"from state \(1,3\) no end can be reached"):
        solve(walled)
    assert np.isfinite(solve(walled.with_gamma(0.9)).v_S).all()


def test_auto_looks_at_the_model():
    wide = finite.from_arrays(np.full((60, 1, 60), 0.9 / 60), np.zeros((60, 1)), 0.9)
    for mdp, name in (
        (zoo.open_maze(9, 9), "policy"),
        (zoo.open_maze(80, 80), "krylov"),
        (zoo.garnet(50, 2, 3, gamma=0.9), "truncated"),
        (zoo.gambler(), "policy"),
        (wide, "truncated"),
    ):
        assert choose(mdp) == name
        assert solve(mdp).method == name


def test_with_gamma_one_large_models_are_followed_by_krylov(monkeypatch):
    """Expected steps and values like those of the LU; a policy that does not end is named."""
    mdp = zoo.open_maze(14, 14, gamma=1.0)
    by_lu, pair_S = solve(mdp), ending_pairs(mdp)
    steps_S = expected_steps(mdp, pair_S)
    monkeypatch.setattr(certificates, "SMALL", 0)
    monkeypatch.setattr(planning, "SMALL", 0)
    monkeypatch.setattr(certificates, "factor", None)  # would be called, and fail
    assert np.allclose(expected_steps(mdp, pair_S), steps_S, rtol=1e-8)
    found = solve(mdp)
    assert found.method == "krylov"
    assert abs(found.v_S - by_lu.v_S).max() <= found.error + by_lu.error
    with pytest.raises(ModelError, match="does not end from"):
        expected_steps(mdp, np.where(pair_S >= 0, mdp.first_S1[:-1], -1))


def test_methods_and_epsilon_are_checked_by_name():
    with pytest.raises(ConfigError, match="Did you mean 'value'"):
        solve(zoo.forest(), "valve")
    with pytest.raises(ConfigError, match="epsilon is a positive number"):
        solve(zoo.forest(), epsilon=-1.0)


def test_too_few_iterations_say_how_far_the_bounds_are():
    with pytest.raises(ModelError, match=r"bounds .* apart after 3 iterations"):
        solve(zoo.zhao(0.99), "value", max_iterations=3)
