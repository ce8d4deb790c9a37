"""Walks: a lane is a function of its key; outcomes have the model's chances; endings are two different things."""

import math

import numpy as np
import pytest
import torch

from rung.core.errors import ModelError
from rung.mdp import finite, zoo
from rung.mdp.walk import Walk, draw_soft_greedy, episode, follow, keys, soft_greedy

FALSE_ALARM = 1e-7  # of one comparison; no test here makes more than ten: under 1e-6 together


def within(count: int) -> float:
    """How far a share of `count` draws is from its chance, but for FALSE_ALARM.  [Hoeffding 1963]"""
    return math.sqrt(math.log(2 / FALSE_ALARM) / (2 * count))


def leaky() -> finite.FiniteMDP:
    """One action with three outcomes, and a fourth that is missing: it ends."""
    model = {"a": {"go": [(0.5, "a", 1.0), (0.2, "b", 2.0), (0.2, None, 3.0)]}, "b": {"go": [(1.0, "a", 0.0)]}}
    return finite.from_dict(model, 0.9, start={"a": 0.7, "b": 0.3})


def some_steps(mdp, lane_keys, count=70, **options):
    walk = Walk(mdp, lane_keys, **options)
    choose = follow(torch.from_numpy(mdp.table(np.ones(mdp.num_pairs) / 5, fill=0.0)))
    return [walk.step(choose(walk.state_N, walk.noise_NW)) for _ in range(count)]


def test_a_lane_does_not_depend_on_the_lanes_beside_it():
    """Over 70 steps, more than a block of noise."""
    mdp, lane_keys = zoo.zhao(slip=0.1), keys(3, 5)
    together = some_steps(mdp, lane_keys)
    alone = some_steps(mdp, lane_keys[2:3])
    for one, same in zip(together, alone, strict=True):
        for name in ("state_N", "action_N", "reward_N", "next_state_N", "same_N"):
            assert torch.equal(getattr(one, name)[2:3], getattr(same, name)), name
    assert len({tuple(torch.stack([s.state_N for s in together])[:, lane].tolist()) for lane in range(5)}) == 5


def test_outcomes_rewards_and_starts_have_the_models_chances():
    """Catches: a column of the cumulative chances off by one, which moves a share by 0.2 or more."""
    mdp, lanes = leaky(), 60_000
    walk = Walk(mdp, keys(0, lanes))
    assert abs(float((walk.state_N == 0).double().mean()) - 0.7) < within(lanes)
    walk.restart(torch.zeros(lanes, dtype=torch.int64))
    taken = walk.step(torch.zeros(lanes, dtype=torch.int64))
    for reward, chance, goes_on in ((1.0, 0.5, True), (2.0, 0.2, True), (3.0, 0.2, False), (0.0, 0.1, False)):
        these = taken.reward_N == reward
        assert abs(float(these.double().mean()) - chance) < within(lanes)
        assert bool((taken.same_N[these] == goes_on).all())
        assert bool((taken.discount_N[these] == (0.9 if goes_on else 0.0)).all())
    assert abs(float((walk.state_N[~taken.same_N] == 0).double().mean()) - 0.7) < within(int((~taken.same_N).sum()))


def test_a_cut_episode_keeps_its_discount_and_its_next_state():
    mdp = zoo.chain(6)
    steps = some_steps(
        finite.from_dict({0: {"on": [(1, 1, 0)]}, 1: {"on": [(1, 0, 0)]}}, 0.9, start={0: 1}),
        keys(0, 2),
        7,
        max_steps=3,
    )
    assert [bool(s.same_N[0]) for s in steps] == [True, True, False, True, True, False, True]
    assert [int(s.state_N[0]) for s in steps] == [0, 1, 0, 0, 1, 0, 0]
    assert int(steps[2].next_state_N[0]) == 1
    assert float(steps[2].discount_N[0]) == 0.9
    ended = Walk(mdp, keys(0, 1), start_N=torch.tensor([5])).step(torch.tensor([mdp.action_names.index("right")]))
    assert (float(ended.discount_N), bool(ended.same_N), float(ended.reward_N)) == (0.0, False, 1.0)


def test_an_episode_is_whole_in_every_lane():
    mdp = zoo.random_walk(5)
    seen = episode(Walk(mdp, keys(1, 50)), lambda state_N, noise: torch.zeros_like(state_N))
    lengths = seen.alive_TN.sum(0)
    for lane, length in enumerate(lengths.tolist()):
        assert int(seen.state_TN[0, lane]) == 2
        assert seen.same_TN[:length, lane].tolist() == [True] * (length - 1) + [False]
    assert int(lengths.max()) == len(seen.state_TN) > int(lengths.min())


def test_soft_greedy_actions_are_drawn_by_their_law_with_ties_and_illegal_actions():
    lanes = 60_000
    q_NA, legal_NA = torch.tensor([[1.0, 3.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    law = soft_greedy(q_NA, legal_NA, 0.3)[0]
    assert law.tolist() == pytest.approx([0.1, 0.45, 0.45, 0.0])
    noise_NW = torch.rand(lanes, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_soft_greedy(q_NA.expand(lanes, -1), legal_NA.expand(lanes, -1), 0.3, noise_NW)
    for action in range(4):
        assert abs(float((drawn == action).double().mean()) - float(law[action])) <= within(lanes)
    assert not bool((drawn == 3).any())


def test_an_illegal_action_and_a_terminal_start_are_refused():
    mdp = finite.from_dict({"a": {"go": [(1, "b", 0)], "wait": [(1, "a", 0)]}, "b": {"go": [(1, None, 0)]}}, 0.9)
    with pytest.raises(ModelError, match="action wait is illegal in state b"):
        Walk(mdp, keys(0, 2), start_N=torch.tensor([0, 1])).step(torch.tensor([1, 1]))
    with pytest.raises(ModelError, match="cannot begin in a terminal state"):
        Walk(mdp, keys(0, 1), start_N=torch.tensor([2]))
