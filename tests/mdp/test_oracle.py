"""The oracle against definitions: sums over long horizons, finite differences, simulation-free identities."""

from dataclasses import replace

import numpy as np
import pytest

from rung.core.errors import ModelError
from rung.mdp import finite, zoo
from rung.mdp.oracle import epsilon_soft_optimum, oracle, softmax, uniform


def random_model(seed: int, states: int = 6, actions: int = 3, gamma: float = 0.9) -> finite.FiniteMDP:
    """Dense, with rewards on transitions, some of which end the episode."""
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.ones(states), size=(states, actions)) * rng.uniform(0.7, 1.0, size=(states, actions, 1))
    start = rng.dirichlet(np.ones(states))
    return finite.from_arrays(prob, rng.normal(size=(states, actions, states)), gamma, start_S=start)


@pytest.mark.parametrize("seed", range(5))
def test_values_occupancy_and_objective_are_sums_over_time(seed):
    mdp = random_model(seed)
    pi_N = softmax(mdp, np.random.default_rng(seed).normal(size=mdp.num_pairs))
    truth = oracle(mdp, pi_N)
    table, flow = mdp.table(pi_N), np.zeros((6, 6))
    for pair, state in enumerate(mdp.state_N):
        row = slice(mdp.row_N1[pair], mdp.row_N1[pair + 1])
        flow[state, mdp.next_M[row]] += pi_N[pair] * mdp.prob_M[row]
    reward = np.bincount(mdp.state_N, pi_N * mdp.reward_N)
    v, visits, step = np.zeros(6), np.zeros(6), np.eye(6)
    for _ in range(400):
        v, visits = v + step @ reward, visits + mdp.first_state_S @ step
        step = 0.9 * step @ flow
    assert np.allclose(truth.v_S, v, atol=1e-12)
    assert np.allclose(truth.occupancy_S, visits, atol=1e-12)
    assert np.isclose(truth.objective, mdp.first_state_S @ v)
    assert np.allclose(truth.v_S, np.nansum(table * mdp.table(truth.q_N), axis=1))


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_that_of_finite_differences(seed):
    mdp, rng = random_model(seed), np.random.default_rng(seed)
    theta = rng.normal(size=mdp.num_pairs)
    gradient = oracle(mdp, softmax(mdp, theta)).gradient_N
    for pair in range(mdp.num_pairs):
        nudge = 1e-5 * (np.arange(mdp.num_pairs) == pair)
        up, down = (oracle(mdp, softmax(mdp, theta + sign * nudge)).objective for sign in (1, -1))
        assert np.isclose((up - down) / 2e-5, gradient[pair], atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_fisher_turns_the_gradient_into_advantages(seed):
    mdp = random_model(seed)
    truth = oracle(mdp, softmax(mdp, np.random.default_rng(seed).normal(size=mdp.num_pairs)))
    natural = np.linalg.lstsq(truth.fisher_NN, truth.gradient_N, rcond=1e-12)[0]
    centred = natural - (np.bincount(mdp.state_N, natural) / 3)[mdp.state_N]
    expected = truth.advantage_N - (np.bincount(mdp.state_N, truth.advantage_N) / 3)[mdp.state_N]
    assert np.allclose(centred, expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_performance_difference_lemma(seed):
    mdp, rng = random_model(seed), np.random.default_rng(seed)
    one, two = (oracle(mdp, softmax(mdp, rng.normal(size=mdp.num_pairs))) for _ in range(2))
    assert np.isclose(one.regret(two), two.objective - one.objective, atol=1e-12)


def test_the_variance_of_a_return_is_that_of_its_distribution():
    """A coin that pays 1 or 0 each step, gamma 0.5, ends with chance 1/4: moments by recursion over 200 steps."""
    prob = np.full((1, 1, 1), 0.75)
    mdp = finite.from_arrays(prob, np.array([[[2.0]]]), 0.5)
    truth = oracle(mdp, uniform(mdp))
    first, second = 0.0, 0.0
    for _ in range(200):  # G = 2 + G' / 2 with chance 3/4, else 0: what is missing pays nothing
        first, second = 0.75 * (2 + first / 2), 0.75 * (4 + 2 * first + second / 4)
    assert np.isclose(truth.v_S[0], first)
    assert np.isclose(truth.variance_S[0], second - first**2)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("by_outcome", [True, False])
def test_the_variance_is_that_of_dense_moments(seed, by_outcome):
    """E[G^2] = sum of p (r^2 + 2 r c v' + c^2 m'), c = gamma keep; what is missing pays the pair's, or 0."""
    rng = np.random.default_rng(seed)
    mdp = random_model(seed)
    if not by_outcome:
        mdp = replace(mdp, reward_M=None)
    mdp = replace(mdp, keep_M=rng.choice([0.0, 0.5, 1.0], size=len(mdp.prob_M)))
    pi_N = softmax(mdp, rng.normal(size=mdp.num_pairs))
    truth = oracle(mdp, pi_N)
    constant_S, matrix = np.zeros(6), np.eye(6)
    for pair, state in enumerate(mdp.state_N):
        missing = 1.0
        for m in range(mdp.row_N1[pair], mdp.row_N1[pair + 1]):
            chance, keep = pi_N[pair] * mdp.prob_M[m], mdp.gamma * mdp.keep_M[m]
            reward = mdp.reward_N[pair] if mdp.reward_M is None else mdp.reward_M[m]
            constant_S[state] += chance * (reward**2 + 2 * reward * keep * truth.v_S[mdp.next_M[m]])
            matrix[state, mdp.next_M[m]] -= chance * keep**2
            missing -= mdp.prob_M[m]
        constant_S[state] += pi_N[pair] * missing * (0.0 if by_outcome else mdp.reward_N[pair] ** 2)
    second_S = np.linalg.solve(matrix, constant_S)
    assert np.allclose(truth.variance_S, second_S - truth.v_S**2, atol=1e-10)


def test_the_stationary_distribution_of_a_walk_that_begins_again():
    mdp = zoo.random_walk(5)
    truth = oracle(mdp, uniform(mdp))
    assert np.allclose(truth.stationary_S, np.array([1, 2, 3, 2, 1, 0]) / 9)
    loop = finite.from_dict({"a": {"go": [(1.0, "b", 0.0, 0.5)]}, "b": {"go": [(1.0, "a", 0.0)]}}, 0.9)
    assert np.allclose(oracle(loop, uniform(loop)).stationary_S, 0.5)  # a discount does not end a walk
    assert loop.keep_M.tolist() == [0.5, 1.0]


def test_features_of_terminal_states_play_no_part():
    """As in the learners, where the discount is 0."""
    mdp = zoo.random_walk(5, gamma=0.9)
    truth = oracle(mdp, uniform(mdp))
    features = np.stack((np.ones(6), np.arange(6.0)), axis=1)
    without = features * ~mdp.terminal_S[:, None]
    assert np.allclose(truth.fixed_point(features), truth.fixed_point(without))
    w, x = truth.fixed_point(features), without
    matrix, reward_S = truth._matrix
    assert np.allclose(x.T @ (truth.stationary_S * (reward_S + matrix @ x @ w - x @ w)), 0.0, atol=1e-12)


def test_a_policy_that_never_ends_has_no_answers_with_gamma_one():
    mdp = zoo.zhao(1.0)
    with pytest.raises(ModelError, match=r"no end can be reached|the policy does not end from"):
        _ = oracle(mdp, uniform(mdp)).v_S
    chain = zoo.chain(3)
    with pytest.raises(ModelError, match="the policy does not end from state 0"):
        _ = oracle(chain, np.zeros(4, int)).occupancy_S
    with pytest.raises(ModelError, match="probability of state 0, action left is nan"):
        oracle(chain, np.full((4, 2), np.nan))


def test_the_optimum_of_a_long_chain_is_as_close_as_it_comes():
    mdp = zoo.chain(2000)
    best = oracle(mdp, np.ones(2001, int)).best
    assert np.allclose(best.v_S[:2000], 1.0, atol=1e-8)
    assert best.error < 1e-8


def test_features_of_every_state_have_the_values_as_their_fixed_point():
    mdp = random_model(0)
    truth = oracle(mdp, uniform(mdp))
    assert np.allclose(truth.fixed_point(np.eye(6)), truth.v_S)
    with pytest.raises(ModelError, match="linear in others"):
        truth.fixed_point(np.ones((6, 2)))


def test_the_best_soft_policy_of_the_cliff():
    """-20.71 from the start for epsilon = 0.1, where the greedy optimum is -13.  [exact]"""
    mdp = zoo.cliff()
    v_S, _ = epsilon_soft_optimum(mdp, 0.1)
    assert round(float(mdp.first_state_S @ v_S), 2) == -20.71
    assert round(mdp.first_state_S @ oracle(mdp, uniform(mdp)).best.v_S) == -13
