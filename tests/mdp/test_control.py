"""Learners that act: each is the textbook's loop on the same walk, step for step, and ends at the oracle's answer."""

import numpy as np
import pytest
import torch

from rung.core.errors import ConfigError
from rung.mdp import zoo
from rung.mdp.control import NEXT_VALUES, monte_carlo, temporal_difference
from rung.mdp.values import Linear, per_action
from rung.mdp.walk import Walk, draw_soft_greedy, episode, keys, soft_greedy


def after(generator, count: int):
    for _ in range(count - 1):
        next(generator)
    return next(generator)


def textbook(mdp, method: str, key: int, steps: int, *, n: int, epsilon: float = 0.3, size: float = 0.2) -> np.ndarray:
    """One lane in plain Python: Sutton & Barto's boxes of sections 6.4 to 6.7 and 7.2; double Q returns the mean."""
    walk = Walk(mdp, [key], max_steps=30)
    tables = [np.zeros((mdp.num_states, mdp.num_actions)) for _ in range(2 if method == "double_q" else 1)]
    legal = walk.tables.legal_SA

    def choose(state: int) -> int:
        q = torch.from_numpy(sum(tables) / len(tables))[state][None]
        return int(draw_soft_greedy(q, legal[state][None], epsilon, walk.noise_NW))

    memory, action = [], choose(int(walk.state_N))
    for _ in range(steps):
        state, coin = int(walk.state_N), float(walk.noise_NW[0, 2]) < 0.5
        taken = walk.step(torch.tensor([action]))
        there, discount, same = int(taken.next_state_N), float(taken.discount_N), bool(taken.same_N)
        own, other = (tables[0], tables[-1]) if coin else (tables[-1], tables[0])
        chosen = choose(there)
        allowed = [a for a in range(mdp.num_actions) if legal[there, a]]
        value = 0.0
        if discount > 0:
            law = soft_greedy(torch.from_numpy(sum(tables) / len(tables))[there][None], legal[there][None], epsilon)[0]
            value = {
                "sarsa": own[there, chosen],
                "expected_sarsa": float(law @ torch.from_numpy(own[there])),
                "q_learning": max((own[there, a] for a in allowed), default=0.0),
                "double_q": other[there, max(allowed, key=lambda a: (own[there, a], -a))] if allowed else 0.0,
            }[method]
        memory.append((state, action, float(taken.reward_N), discount, value))
        while memory and (len(memory) == n or not same):
            target = memory[-1][4]
            for _, _, reward, keep, _ in reversed(memory):
                target = reward + keep * target
            s, a, *_ = memory.pop(0)
            own[s, a] += size * (target - own[s, a])
        again = choose(int(walk.state_N))
        action = chosen if method == "sarsa" and same else again
    return sum(tables) / len(tables)


@pytest.mark.parametrize(("method", "n"), [*((name, 1) for name in NEXT_VALUES), ("sarsa", 4), ("q_learning", 3)])
def test_a_learner_is_the_textbooks_loop_on_the_same_walk(method, n):
    """Windy grid with a slip: 400 steps in three lanes, episodes cut after 30; the lanes do not see each other."""
    mdp, lane_keys = zoo.zhao(slip=0.1, forbidden_reward=-3.0, target="end"), keys(5, 3, method)
    found = after(temporal_difference(mdp, method, lane_keys, step=0.2, epsilon=0.3, n=n, max_steps=30), 400).q_NSA()
    for lane, key in enumerate(lane_keys):
        expected = textbook(mdp, method, key, 400, n=n)
        assert abs(expected).max() > 0.3
        assert np.allclose(found[lane].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("first_visit", [True, False])
def test_monte_carlo_control_is_the_textbooks_loop(first_visit):
    mdp, lane_keys = zoo.grid("S.#\n..T", 0.9, slip=0.1, target="end"), keys(9, 2)
    found = after(monte_carlo(mdp, lane_keys, epsilon=0.2, first_visit=first_visit, max_steps=25), 40)
    for lane, key in enumerate(lane_keys):
        walk = Walk(mdp, [key], max_steps=25)
        q, count = np.zeros((6, 5)), np.zeros((6, 5))
        for _ in range(40):
            seen = episode(
                walk,
                lambda s, noise, walk=walk, q=q: draw_soft_greedy(
                    torch.from_numpy(q)[s], walk.tables.legal_SA[s], 0.2, noise
                ),
            )
            cells = list(zip(seen.state_TN[:, 0].tolist(), seen.action_TN[:, 0].tolist(), strict=True))
            returns, g = [], 0.0
            for reward, discount in zip(
                seen.reward_TN[:, 0].tolist()[::-1], seen.discount_TN[:, 0].tolist()[::-1], strict=True
            ):
                g = reward + discount * g
                returns.insert(0, g)
            for t, cell in enumerate(cells):
                if not first_visit or cell not in cells[:t]:
                    count[cell] += 1
                    q[cell] += (returns[t] - q[cell]) / count[cell]
        assert np.allclose(found[lane].numpy(), q, atol=1e-12)


def test_a_lane_that_explores_its_starts_does_not_see_the_others():
    mdp = zoo.blackjack()
    alone, beside = (after(monte_carlo(mdp, keys(4, n), exploring_starts=True), 30)[0] for n in (1, 3))
    assert torch.equal(alone, beside)


def test_linear_values_with_one_feature_a_state_are_a_table():
    mdp, lane_keys = zoo.zhao(slip=0.1), keys(6, 3)
    linear = Linear(3, per_action(np.eye(25), 5))
    a = after(temporal_difference(mdp, "sarsa", lane_keys, values=[linear], max_steps=20), 300).q_NSA()
    b = after(temporal_difference(mdp, "sarsa", lane_keys, max_steps=20), 300).q_NSA()
    assert torch.allclose(a, b, atol=1e-12)
    assert float(b.abs().max()) > 0.1


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'sarsa'"):
        next(temporal_difference(zoo.chain(3), "sarza", keys(0, 1)))
    with pytest.raises(ConfigError, match="double_q learns 2 of values; got 1"):
        next(temporal_difference(zoo.chain(3), "double_q", keys(0, 1), values=[Linear(1, np.eye(4))]))
    with pytest.raises(ConfigError, match="at least one reward; n = 0"):
        next(temporal_difference(zoo.chain(3), "sarsa", keys(0, 1), n=0))
