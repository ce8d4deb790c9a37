"""Learners that predict: against plain loops on the same walk, against each other, and against the oracle.

Where no chance is named, both sides see the same walk and are equal."""

import math

import numpy as np
import pytest
import torch

from rung.core.errors import ConfigError, ModelError
from rung.mdp import prediction, zoo
from rung.mdp.oracle import oracle, uniform
from rung.mdp.values import fourier, polynomial, tiles
from rung.mdp.walk import Walk, episode, follow, keys
from rung.objectives.optimisers import harmonic, power


def after(generator, count: int):
    for _ in range(count - 1):
        next(generator)
    return next(generator)


def walked(mdp, key: int, count: int):
    """The episodes of one lane under the uniform policy: lists of (state, reward, discount, next state)."""
    walk = Walk(mdp, [key])
    choose = follow(torch.from_numpy(mdp.table(uniform(mdp), fill=0.0)))
    episodes, current = [], []
    while len(episodes) < count:
        taken = walk.step(choose(walk.state_N, walk.noise_NW))
        current.append((int(taken.state_N), float(taken.reward_N), float(taken.discount_N), int(taken.next_state_N)))
        if not bool(taken.same_N):
            episodes.append(current)
            current = []
    return episodes


def features(mdp) -> np.ndarray:
    """Three features a state, none of them one-hot."""
    return np.random.default_rng(0).normal(size=(mdp.num_states, 3)) * ~mdp.terminal_S[:, None]


def steps_of(episodes) -> int:
    return sum(map(len, episodes))


def test_td_lambda_with_traces_is_the_textbooks_loop():
    """Section 12.2; the walk of 7 states with gamma 0.9, lambda 0.6, ten episodes."""
    mdp, (key,) = zoo.random_walk(7, low=-1.0, gamma=0.9), keys(0, 1)
    x, w, episodes = features(mdp), np.zeros(3), walked(zoo.random_walk(7, low=-1.0, gamma=0.9), key, 10)
    for one in episodes:
        z = np.zeros(3)
        for state, reward, discount, there in one:
            z = 0.9 * 0.6 * z + x[state]
            w = w + 0.05 * (reward + discount * x[there] @ w - x[state] @ w) * z
    learner = prediction.td_lambda(mdp, uniform(mdp), [key], step=0.05, lambda_=0.6, features_SF=x)
    assert np.allclose(after(learner, steps_of(episodes))[0].numpy(), w, atol=1e-12)


def test_traces_end_where_an_episode_is_cut():
    """Cut after 3 steps: the last step still bootstraps from where it led, and its trace is not carried on."""
    mdp, (key,) = zoo.random_walk(9, low=-1.0, gamma=0.9), keys(13, 1)
    x, w, walk = features(mdp), np.zeros(3), Walk(mdp, keys(13, 1), max_steps=3)
    choose, z = follow(torch.from_numpy(mdp.table(uniform(mdp), fill=0.0))), np.zeros(3)
    for _ in range(40):
        taken = walk.step(choose(walk.state_N, walk.noise_NW))
        state, there, discount = int(taken.state_N), int(taken.next_state_N), float(taken.discount_N)
        z = 0.9 * 0.6 * z + x[state]
        w = w + 0.05 * (float(taken.reward_N) + discount * x[there] @ w - x[state] @ w) * z
        z = z if bool(taken.same_N) else np.zeros(3)
    learner = prediction.td_lambda(mdp, uniform(mdp), [key], step=0.05, lambda_=0.6, features_SF=x, max_steps=3)
    assert np.allclose(after(learner, 40)[0].numpy(), w, atol=1e-12)


@pytest.mark.parametrize("method", ["tdc", "etd"])
def test_off_policy_methods_are_the_textbooks_loops(method):
    """Sections 11.7 and 11.8, over episodes that end: the emphasis begins anew with each."""
    mdp, (key,) = zoo.grid("S..\n.#T", 0.9, target="end"), keys(14, 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3)) * ~mdp.terminal_S[:, None]
    pi_N = rng.random(mdp.num_pairs)
    pi_N /= np.bincount(mdp.state_N, pi_N, minlength=6)[mdp.state_N]
    ratio_SA = mdp.table(pi_N / uniform(mdp), fill=0.0)
    walk, choose = Walk(mdp, [key]), follow(torch.from_numpy(mdp.table(uniform(mdp), fill=0.0)))
    w, h, emphasis, carried = np.zeros(3), np.zeros(3), 0.0, 0.0
    for _ in range(150):
        taken = walk.step(choose(walk.state_N, walk.noise_NW))
        state, there, discount = int(taken.state_N), int(taken.next_state_N), float(taken.discount_N)
        rho = ratio_SA[state, int(taken.action_N)]
        error = float(taken.reward_N) + discount * x[there] @ w - x[state] @ w
        if method == "tdc":
            w, h = (
                w + 0.02 * rho * (error * x[state] - discount * x[there] * (x[state] @ h)),
                h + 0.1 * rho * (error - x[state] @ h) * x[state],
            )
        else:
            emphasis = carried * emphasis + 1
            w = w + 0.02 * emphasis * rho * error * x[state]
            carried = rho * discount if bool(taken.same_N) else 0.0
    learner = prediction.off_policy_td(
        mdp, pi_N, uniform(mdp), [key], method=method, step=0.02, second_step=0.1, features_SF=x
    )
    assert np.allclose(after(learner, 150)[0].numpy(), w, atol=1e-10)


@pytest.mark.parametrize("size", [0.1, power(0.5)])
@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_true_online_td_is_the_online_lambda_return(lambda_, size):
    """At every time the weights of the online lambda-return algorithm, which starts each episode over [S & B 12.4]."""
    mdp, (key,) = zoo.random_walk(7, low=-1.0, gamma=0.9), keys(1, 1)
    x, episodes = features(mdp), walked(mdp, key, 4)
    learner = prediction.td_lambda(
        mdp, uniform(mdp), [key], step=size, lambda_=lambda_, true_online=True, features_SF=x
    )
    begin, before = np.zeros(3), 0

    def size_at(time: int) -> float:
        return float(size(torch.tensor([time]))) if callable(size) else size

    for one in episodes:
        history = [begin]  # the weights at each time: the values that the targets of that horizon bootstrap from
        for horizon in range(1, len(one) + 1):
            w = begin
            for t in range(horizon):
                g = one[horizon - 1][1] + one[horizon - 1][2] * x[one[horizon - 1][3]] @ history[horizon - 1]
                for k in range(horizon - 2, t - 1, -1):
                    _, reward, discount, there = one[k]
                    g = reward + discount * ((1 - lambda_) * x[there] @ history[k] + lambda_ * g)
                w = w + size_at(before + t + 1) * (g - x[one[t][0]] @ w) * x[one[t][0]]
            history.append(w)
            assert np.allclose(next(learner)[0].numpy(), w, atol=1e-10)
        begin, before = history[-1], before + len(one)


def test_off_line_updates_of_the_backward_view_are_those_of_the_forward_view():
    """With weights fixed during the episode, accumulating traces sum to the lambda-return's updates [S & B 12.2]."""
    mdp, (key,) = zoo.random_walk(7, low=-1.0, gamma=0.9), keys(2, 1)
    x, w = features(mdp), np.array([0.3, -0.2, 0.5])
    (one,) = walked(mdp, key, 1)
    backward, z = np.zeros(3), np.zeros(3)
    for state, reward, discount, there in one:
        z = 0.9 * 0.6 * z + x[state]
        backward += (reward + discount * x[there] @ w - x[state] @ w) * z
    tiny = 1e-7  # so small that the weights stay where they are
    learner = prediction.by_episodes(mdp, uniform(mdp), [key], lambda_=0.6, step=tiny, features_SF=x, initial_NF=w)
    forward = (next(learner)[0].numpy() - w) / tiny
    assert np.allclose(forward, backward, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3, 50])
def test_n_step_td_is_the_textbooks_loop(n):
    """Section 7.1; an episode's last states are learnt from at its end, oldest first."""
    mdp, (key,) = zoo.random_walk(7, low=-1.0, gamma=0.9), keys(3, 1)
    x, w, episodes = features(mdp), np.zeros(3), walked(mdp, key, 6)
    for one in episodes:
        bootstraps = []
        done = 0
        for t, (_, _, discount, there) in enumerate(one):
            bootstraps.append(x[there] @ w if discount else 0.0)
            last = t == len(one) - 1
            while done <= t and (t - done + 1 == n or last):
                g = bootstraps[t]
                for k in range(t, done - 1, -1):
                    g = one[k][1] + one[k][2] * g
                w = w + 0.05 * (g - x[one[done][0]] @ w) * x[one[done][0]]
                done += 1
    learner = prediction.n_step_td(mdp, uniform(mdp), [key], n=n, step=0.05, features_SF=x)
    assert np.allclose(after(learner, steps_of(episodes))[0].numpy(), w, atol=1e-12)


def test_td_with_lambda_zero_is_td_with_one_step():
    mdp, lanes = zoo.random_walk(7), keys(4, 3)
    a = after(prediction.td_lambda(mdp, uniform(mdp), lanes), 200)
    b = after(prediction.n_step_td(mdp, uniform(mdp), lanes), 200)
    assert torch.allclose(a, b, atol=1e-14)


@pytest.mark.parametrize("first_visit", [True, False])
def test_monte_carlo_is_the_mean_of_returns(first_visit):
    mdp, (key,) = zoo.random_walk(5, low=-1.0, gamma=0.9), keys(5, 1)
    returns = {}
    walk, choose = Walk(mdp, [key]), follow(torch.from_numpy(mdp.table(uniform(mdp), fill=0.0)))
    for _ in range(30):
        seen = episode(walk, choose)
        states, g, found = seen.state_TN[:, 0].tolist(), 0.0, []
        for t in range(len(states) - 1, -1, -1):
            g = float(seen.reward_TN[t]) + float(seen.discount_TN[t]) * g
            if not first_visit or states[t] not in states[:t]:
                found.append((states[t], g))
        for state, g in found:
            returns.setdefault(state, []).append(g)
    learner = prediction.by_episodes(mdp, uniform(mdp), [key], step=harmonic(), first_visit=first_visit)
    found = after(learner, 30)[0].numpy()
    assert np.allclose([found[s] for s in returns], [np.mean(g) for g in returns.values()], atol=1e-12)


def test_first_visits_estimate_without_bias():
    """Figure of example 6.2: first returns from the middle state lie in [0, 1]; 400 lanes of 50 episodes.

    Their mean is within sqrt(ln(2 / 1e-7) / 2n) of 1/2 but for 1e-7 [Hoeffding]: 0.0205.  Catches: a return that
    misses its last reward (0), or one that is discounted."""
    mdp = zoo.random_walk(5)
    found = after(prediction.by_episodes(mdp, uniform(mdp), keys(6, 400), step=harmonic(), first_visit=True), 50)
    assert abs(float(found[:, 2].mean()) - 0.5) < math.sqrt(math.log(2 / 1e-7) / (2 * 400 * 50))


def test_batch_td_knows_the_model_and_batch_monte_carlo_the_returns():
    """Example 6.4: A, 0, B, 0 once; B, 1 six times; B, 0 once.  V(B) = 3/4; V(A) = 3/4 by TD and 0 by Monte Carlo."""
    from rung.mdp import finite

    model = {"A": {"go": [(1, "B", 0)]}, "B": {"go": [(0.75, None, 1.0), (0.25, "end", 0.0)]}}
    mdp = finite.from_dict(model, 1.0, start={"A": 0.125, "B": 0.875})
    for method in ("td", "mc"):
        learner = prediction.batch(mdp, np.zeros(4, int), keys(8, 3), method=method, step=0.01, tolerance=1e-6)
        found = after(learner, 40)
        walk = Walk(mdp, keys(8, 3))
        seen = [episode(walk, lambda s, noise: torch.zeros_like(s)) for _ in range(40)]
        for lane in range(3):
            through_a, ends = [], []
            for one in seen:
                paid = float(one.reward_TN[one.alive_TN[:, lane], lane].sum())
                ends.append(paid)
                if int(one.state_TN[0, lane]) == 0:
                    through_a.append(paid)
            assert float(found[lane, 1]) == pytest.approx(np.mean(ends), abs=1e-4)
            assert float(found[lane, 0]) == pytest.approx(np.mean(ends if method == "td" else through_a), abs=1e-4)


@pytest.mark.parametrize("weighted", [True, False])
def test_importance_sampling_finds_the_value_of_another_policy(weighted):
    """Blackjack's 18 against 2, by a policy that goes on hitting below 20; 1000 lanes of 100 episodes of the coin.

    Within six standard errors of the lanes (chance 2e-9, normal).  The ordinary estimate R has no bias, the weighted
    one -Cov(R, W) for mean weights W, of mean 1: at most sd(R) sd(W) [Hartley & Ross 1954], where E[w^2] of an episode
    solves u = 2 (chance to end + P u): ratios are 0 and 2.  Catches: ratios left out, or of one step only."""
    mdp = zoo.blackjack()
    state = mdp.state_names.index("18 against 2")
    totals = [int(name.split()[0]) if name[0].isdigit() else 21 for name in mdp.state_names]
    stick = mdp.action_names.index("stick")
    actions = np.array([stick if total >= 20 else 1 - stick for total in totals])
    learner = prediction.importance_sampling(mdp, actions, uniform(mdp), keys(9, 1000), state=state, weighted=weighted)
    found = after(learner, 100)
    matrix = oracle(mdp, actions)._matrix[0].toarray() * ~mdp.terminal_S
    square_S = np.linalg.solve(np.eye(len(matrix)) - 2 * matrix, 2 * (1 - matrix.sum(1)) * ~mdp.terminal_S)
    bias = float(found.std()) * math.sqrt((square_S[state] - 1) / 100) * weighted
    slack = 6 * float(found.std()) / 1000**0.5 + bias
    assert abs(float(found.mean()) - oracle(mdp, actions).v_S[state]) < slack
    assert abs(float(found.mean()) - oracle(mdp, uniform(mdp)).v_S[state]) > slack  # what ratios of 1 would find


def test_off_policy_td_on_policy_is_td():
    mdp, lanes = zoo.random_walk(7), keys(11, 2)
    plain = after(prediction.td_lambda(mdp, uniform(mdp), lanes, step=0.01), 300)
    off = after(prediction.off_policy_td(mdp, uniform(mdp), uniform(mdp), lanes, method="semi_gradient"), 300)
    assert torch.allclose(plain, off, atol=1e-14)


def test_methods_and_steps_that_cannot_be():
    mdp = zoo.random_walk(3)
    with pytest.raises(ConfigError, match="unknown method 'tcd'"):
        next(prediction.off_policy_td(mdp, uniform(mdp), uniform(mdp), keys(0, 1), method="tcd"))
    with pytest.raises(ConfigError, match='method is "td" or "mc"'):
        next(prediction.batch(mdp, uniform(mdp), keys(0, 1), method="tdd"))
    with pytest.raises(ConfigError, match=r"step 5\.0 is too large"):
        after(prediction.batch(mdp, uniform(mdp), keys(0, 1), method="mc", step=5.0), 5)
    with pytest.raises(ModelError, match="an episode may never end: give max_steps"):
        next(prediction.by_episodes(zoo.zhao(), uniform(zoo.zhao()), keys(0, 1)))


def test_a_behaviour_that_never_tries_is_refused():
    mdp = zoo.random_walk(3)
    chain = zoo.chain(3)
    with pytest.raises(ModelError, match="the behaviour never takes action right in state 0"):
        next(prediction.off_policy_td(chain, np.ones(4, int), np.zeros(4, int), keys(0, 1)))
    assert next(prediction.off_policy_td(mdp, uniform(mdp), uniform(mdp), keys(0, 1))).shape == (1, 4)


def test_features_have_their_shapes_and_values():
    points = np.array([[0.0, 0.0], [0.5, 1.0]])
    assert polynomial(points, 2)[1].tolist() == [1, 1.0, 0.5, 1.0, 0.5, 0.25]
    assert np.allclose(fourier(points, 1)[1], [1, -1, 0, 0], atol=1e-12)
    assert tiles(np.linspace(0, 1, 11), 5, 4).shape == (11, 24)
    assert (tiles(np.random.default_rng(0).random((50, 2)), 4, 8).sum(1) == 8).all()
    line = tiles(np.array([0.0, 0.19, 0.21, 0.99]), 5, 1)
    assert (line[0] == line[1]).all()
    assert (line[1] != line[2]).any()
    with pytest.raises(ConfigError, match=r"points in \[0, 1\]; got -1 to 1"):
        fourier(np.array([-1.0, 1.0]), 2)
