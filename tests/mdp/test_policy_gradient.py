"""Policy gradients on tables: sampled ones are unbiased estimates of the oracle's, and ascent reaches the optimum."""

import itertools

import numpy as np
import pytest
import torch

from rung.mdp import policy_gradient, zoo
from rung.mdp.oracle import oracle, softmax
from rung.mdp.planning import solve
from rung.mdp.policy_gradient import actor_critic, exact, reinforce
from rung.mdp.walk import Walk, follow, keys
from rung.train import methods


def after(generator, count: int):
    for _ in range(count - 1):
        next(generator)
    return next(generator)


def slippery():
    return zoo.grid("S#\n.T", 0.9, slip=0.1, target="end", actions=("up", "right", "down", "left"))


@pytest.mark.parametrize("natural", [False, True])
def test_exact_ascent_reaches_the_optimum(natural):
    mdp = slippery()
    best = solve(mdp, "policy").v_S[0]
    path = [truth.objective for truth, _ in zip(exact(mdp, step=2.0, natural=natural), range(400), strict=False)]
    assert path[-1] == pytest.approx(best, abs=2e-2 if not natural else 1e-6)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(path))


def test_one_episode_of_reinforce_moves_along_the_exact_gradient():
    """From theta = 0 with a tiny step, the mean over 50 000 lanes is the oracle's gradient within six standard errors
    (chance 2e-9 a logit).  Catches: a missing discount^t, which changes the gradient of later states by a tenth."""
    mdp = slippery()
    lanes, tiny = 50_000, 1e-6
    found = next(reinforce(mdp, keys(0, lanes), step=tiny, max_steps=200)) / tiny
    truth = oracle(mdp, softmax(mdp, np.zeros(mdp.num_pairs)))
    exact_SA = torch.from_numpy(mdp.table(truth.gradient_N, fill=0.0))
    error, bound = (found.mean(0) - exact_SA).abs(), 6 * found.std(0) / lanes**0.5 + 1e-6
    assert bool((error <= bound).all()), (error - bound).max()
    assert float(exact_SA.abs().max()) > 8 * float(bound.max())


def test_the_surrogate_of_a_table_is_the_language_models():
    """One spine: the object, not a copy of it."""
    assert policy_gradient.pg is methods.SURROGATES["pg"]


def test_the_actor_critic_is_the_textbooks_loop_on_the_same_walk():
    """Section 10.2 of Zhao: the actor is pushed by q(s, a) as it was, then the critic learns; 300 steps, no chance."""
    mdp, (key,) = slippery(), keys(3, 1)
    walk, legal_SA = Walk(mdp, [key], max_steps=20), mdp.table(np.ones(mdp.num_pairs), fill=0.0) > 0
    theta, q = np.zeros((4, 4)), np.zeros((4, 4))

    def chances(state: int) -> np.ndarray:
        power = np.where(legal_SA[state], np.exp(theta[state]), 0.0)
        return power / max(power.sum(), 1e-300)

    def drawn(state: int) -> int:
        return int(follow(torch.from_numpy(chances(state)[None]))(torch.zeros(1, dtype=torch.int64), walk.noise_NW))

    action = drawn(int(walk.state_N))
    for _ in range(300):
        state = int(walk.state_N)
        taken = walk.step(torch.tensor([action]))
        there, goes_on = int(taken.next_state_N), float(taken.discount_N) > 0
        later = drawn(there) if goes_on else 0
        target = float(taken.reward_N) + float(taken.discount_N) * q[there, later]
        theta[state] += 0.1 * q[state, action] * (np.eye(4)[action] - chances(state))
        q[state, action] += 0.3 * (target - q[state, action])
        action = later if bool(taken.same_N) else drawn(int(walk.state_N))
    found = after(actor_critic(mdp, [key], step=0.1, critic_step=0.3, max_steps=20), 300)[0].numpy()
    assert abs(theta).max() > 0.1
    assert np.allclose(found, theta, atol=1e-12)
