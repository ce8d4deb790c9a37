"""The matrix of a policy, its incomplete LU and what Krylov methods make of them, against dense algebra."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.mdp import finite, linear, zoo
from rung.mdp.certificates import distances, ending_pairs
from rung.mdp.linear import incomplete_lu, krylov, richardson, rows_of, solve_lu, times
from rung.mdp.planning import policy_iteration


def drawn(seed: int) -> tuple[finite.FiniteMDP, np.ndarray, np.ndarray]:
    """A sparse model with loops, leaks, a terminal state and transitions listed twice; a policy; an order."""
    rng = np.random.default_rng(seed)
    states = int(rng.integers(2, 9))
    counts_N = rng.integers(1, 5, size=2 * (states - 1))
    prob_M = rng.random(int(counts_N.sum())) * (rng.random(int(counts_N.sum())) < 0.9)
    row_N1 = np.concatenate(([0], np.cumsum(counts_N)))
    prob_M /= np.repeat(np.maximum(finite.sums(prob_M, row_N1), 0.1) / rng.choice([0.9, 1.0], len(counts_N)), counts_N)
    mdp = finite.FiniteMDP(
        first_S1=np.append(np.arange(0, 2 * states - 1, 2), 2 * (states - 1)),
        action_N=np.tile([0, 1], states - 1),
        row_N1=row_N1,
        next_M=rng.integers(states, size=len(prob_M)),
        prob_M=prob_M,
        reward_N=rng.normal(size=len(counts_N)),
        gamma=float(rng.choice([0.5, 0.99])),
        num_actions=2,
    )
    pair_S = np.append(2 * np.arange(states - 1) + rng.integers(2, size=states - 1), -1)
    return mdp, pair_S, rng.permutation(states)


def whole(rows: linear.Rows) -> np.ndarray:
    """The matrix in the order of elimination, written out."""
    matrix = np.diag(rows.diagonal_I)
    for i in range(len(matrix)):
        for k in range(rows.first_I1[i], rows.first_I1[i + 1]):
            matrix[i, rows.place_K[k]] += rows.value_K[k]
    return matrix


def product_of(factors: linear.Rows) -> np.ndarray:
    """L U, written out."""
    both = whole(factors)
    return (np.tril(both, -1) + np.eye(len(both))) @ np.triu(both)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_rows_products_and_factors_equal_their_twins(seed):
    mdp, pair_S, order_I = drawn(seed)
    rows, twin = rows_of(mdp, pair_S, order_I), rows_of(mdp, pair_S, order_I, twin=True)
    x_I = np.random.default_rng(seed).normal(size=mdp.num_states)
    assert np.allclose(whole(rows), whole(twin), atol=1e-15)
    assert np.allclose(times(rows, x_I), whole(rows) @ x_I, atol=1e-14)
    assert np.allclose(times(rows, x_I), times(rows, x_I, twin=True), atol=1e-14)
    right_I = np.random.default_rng(seed + 1).normal(size=mdp.num_states)
    swept_I, spread = richardson(rows, right_I, x_I)
    expected_I, expected = richardson(rows, right_I, x_I, twin=True)
    assert np.allclose(swept_I, expected_I, atol=1e-14)
    assert spread == pytest.approx(expected, abs=1e-14)
    for relaxed in (0.0, 0.9):
        factors = incomplete_lu(rows, relaxed)
        assert np.allclose(whole(factors), whole(incomplete_lu(rows, relaxed, twin=True)), atol=1e-12)
        assert np.allclose(solve_lu(factors, x_I), solve_lu(factors, x_I, twin=True), atol=1e-10)
        assert np.allclose(product_of(factors) @ solve_lu(factors, x_I), x_I, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["bicgstab", "gmres"]), st.sampled_from([0, linear.LONG_ROWS]))
def test_krylov_methods_solve_what_a_dense_solve_does(seed, method, long_rows):
    """With the incomplete LU and without it."""
    mdp, pair_S, order_I = drawn(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LONG_ROWS", long_rows)
        rows = rows_of(mdp, pair_S, order_I)
        x_S = np.random.default_rng(seed).normal(size=mdp.num_states)
        right_S = np.empty_like(x_S)
        right_S[order_I] = whole(rows) @ x_S[order_I]
        found_S, products = krylov(rows, right_S, np.zeros_like(x_S), method, gain=1e-10)
    assert np.allclose(found_S, x_S, atol=1e-6)
    assert products > 0


def test_dropped_entries_move_to_the_diagonal_so_that_constants_stay_right():
    """With all of them moved, L U 1 = (I - gamma P) 1; with none it is not."""
    mdp = zoo.open_maze(12, 12)
    rows = rows_of(mdp, ending_pairs(mdp), np.argsort(-distances(mdp), kind="stable"))
    ones_I, lost = np.ones(mdp.num_states), []
    for relaxed in (1.0, 0.9, 0.0):
        product = product_of(incomplete_lu(rows, relaxed))
        lost.append(float(abs(product @ ones_I - times(rows, ones_I)).max()))
    assert lost[0] < 1e-14
    assert 1e-4 < lost[1] < 0.2 * lost[2]


def test_on_a_tree_the_incomplete_factors_are_whole():
    """A perfect maze under the policy that goes to the goal: farthest first, nothing is ever filled in."""
    mdp = zoo.maze(9, 9)
    distance_S = distances(mdp)
    rows = rows_of(mdp, ending_pairs(mdp), np.argsort(-distance_S, kind="stable"))
    assert abs(product_of(incomplete_lu(rows, 0.0)) - whole(rows)).max() < 1e-14
    nearest_first = rows_of(mdp, ending_pairs(mdp), np.argsort(distance_S, kind="stable"))
    assert abs(product_of(incomplete_lu(nearest_first, 0.0)) - whole(nearest_first)).max() > 1e-3


def products_of(mdp: finite.FiniteMDP, **patched) -> int:
    """Of policy iteration by BiCGSTAB."""
    with pytest.MonkeyPatch.context() as patch:
        for name, other in patched.items():
            patch.setattr(linear, name, other)
        iterates = list(policy_iteration(mdp, krylov="bicgstab"))
    assert iterates[-1].bounds.gap < 1e-6
    return iterates[-1].policy_products


def test_the_factors_save_most_of_the_products():
    mdp = zoo.open_maze(40, 40)
    assert products_of(mdp) < products_of(mdp, LONG_ROWS=0) / 4


def test_what_is_moved_to_the_diagonal_saves_more_in_a_large_maze():
    """docs/log.md has the counts of other sizes and shares."""
    mdp = zoo.open_maze(300, 300)
    assert products_of(mdp) < 0.9 * products_of(mdp, incomplete_lu=partial(incomplete_lu, relaxed=0.0))
