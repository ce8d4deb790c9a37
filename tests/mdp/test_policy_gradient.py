"""Policy gradients on tables: sampled ones are unbiased estimates of the oracle's, and ascent reaches the optimum."""

import itertools

import numpy as np
import pytest
import torch

from rung.mdp import policy_gradient, zoo
from rung.mdp.oracle import oracle, softmax
from rung.mdp.planning import solve
from rung.mdp.policy_gradient import actor_critic, exact, reinforce
from rung.mdp.walk import keys
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


def test_the_baseline_changes_the_variance_and_not_the_mean():
    mdp = slippery()
    lanes, tiny = 3000, 1e-6

    def pushes(baseline_step: float) -> torch.Tensor:
        learner = reinforce(mdp, keys(1, lanes), step=tiny, baseline_step=baseline_step, max_steps=200)
        before = after(learner, 20).clone()
        return (next(learner) - before) / tiny

    plain, based = pushes(0.0), pushes(0.1)
    error = (plain.mean(0) - based.mean(0)).abs()
    assert bool((error <= 6 * (plain.var(0) + based.var(0)).sqrt() / lanes**0.5 + 1e-6).all())
    assert float(based.var(0).sum()) < 0.8 * float(plain.var(0).sum())


def test_reinforce_on_the_short_corridor_finds_the_best_mixture():
    """Figure 13.1: all states share two logits; J* = -11.66 at p(right) = 0.586, started at p = 0.2."""
    mdp = zoo.short_corridor()
    groups, start = [0, 0, 0, 0], np.array([np.log(4.0), 0.0])
    learner = reinforce(mdp, keys(2, 20), step=2**-10, groups_S=groups, initial=start, max_steps=400)
    theta = after(learner, 200)[:, 0]
    right = theta.softmax(-1)[:, 1]
    values = [oracle(mdp, np.where(mdp.action_N == 1, p, 1 - p)).objective for p in right.tolist()]
    assert np.median(values) > -13.5


def test_the_surrogate_of_a_table_is_the_language_models():
    """One spine: the object, not a copy of it."""
    assert policy_gradient.pg is methods.SURROGATES["pg"]


def test_the_actor_critic_reaches_a_good_policy():
    mdp = slippery()
    theta = after(actor_critic(mdp, keys(3, 20), step=0.1, critic_step=0.3), 2500)
    best = solve(mdp, "policy").v_S[0]
    pairs = (torch.from_numpy(mdp.state_N), torch.from_numpy(mdp.action_N))
    values = [oracle(mdp, softmax(mdp, lane[pairs].numpy())).v_S[0] for lane in theta]
    start = oracle(mdp, softmax(mdp, np.zeros(mdp.num_pairs))).v_S[0]
    assert np.median(values) > best - 0.15 * (best - start)
