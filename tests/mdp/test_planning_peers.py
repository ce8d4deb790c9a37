"""Values of the planners against those of other people's solvers, asked for the same accuracy on the same arrays."""

import numpy as np
import pytest

from rung.mdp import zoo
from rung.mdp.planning import solve

STATES, ACTIONS, BRANCHING = 300, 4, 5


@pytest.fixture(scope="module")
def mdp():
    return zoo.garnet(STATES, ACTIONS, BRANCHING, gamma=0.95, seed=1)


@pytest.mark.parametrize("method", ["policy_iteration", "modified_policy_iteration"])
def test_quantecon_finds_the_same_values_and_policy(mdp, method):
    pytest.importorskip("quantecon")
    from quantecon.markov import DiscreteDP
    from scipy.sparse import csr_matrix

    rows = csr_matrix((mdp.prob_M, mdp.next_M, mdp.row_N1), shape=(mdp.num_pairs, STATES))
    theirs = DiscreteDP(mdp.reward_N, rows, mdp.gamma, mdp.state_N, mdp.action_N).solve(method, epsilon=1e-8)
    ours = solve(mdp, epsilon=1e-8)
    assert abs(ours.v_S - theirs.v).max() <= 2e-8
    assert (ours.action_S == theirs.sigma).all()


def test_mdpsolver_finds_the_same_values(mdp):
    package = pytest.importorskip("mdpsolver")
    shape, problem = (STATES, ACTIONS, BRANCHING), package.model()
    problem.mdp(
        discount=mdp.gamma,
        rewards=mdp.reward_N.reshape(STATES, ACTIONS).tolist(),
        tranMatProbs=mdp.prob_M.reshape(shape).tolist(),
        tranMatColumns=mdp.next_M.reshape(shape).tolist(),
    )
    problem.solve(algorithm="pi", tolerance=1e-9, verbose=False)
    assert abs(solve(mdp, epsilon=1e-8).v_S - np.array(problem.getValueVector())).max() <= 1e-6


def test_pymdptoolbox_finds_the_same_policy_and_value_by_policy_iteration(mdp):
    """Its other methods stop on the span of the last change and leave values off by far more than they were asked."""
    pytest.importorskip("mdptoolbox")
    from mdptoolbox.mdp import PolicyIteration

    dense_ASS = np.zeros((ACTIONS, STATES, STATES))
    owner_M = np.repeat(np.arange(mdp.num_pairs), BRANCHING)
    np.add.at(dense_ASS, (mdp.action_N[owner_M], mdp.state_N[owner_M], mdp.next_M), mdp.prob_M)
    theirs = PolicyIteration(dense_ASS, mdp.reward_N.reshape(STATES, ACTIONS), mdp.gamma)
    theirs.run()
    ours = solve(mdp, epsilon=1e-8)
    assert tuple(ours.action_S) == theirs.policy
    assert np.allclose(ours.v_S, theirs.V, atol=1e-7)
