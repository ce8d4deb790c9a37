"""Advantages by their definitions, and their identities."""

import numpy as np
import pytest
import torch

from rung.objectives.advantages import ADVANTAGES, overlong_penalty, return_to_go

REWARDS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_each_advantage_is_its_definition_in_numpy():
    for reward_G in REWARDS:
        r = reward_G.numpy()
        assert np.allclose(ADVANTAGES["none"](reward_G), r)
        assert np.allclose(ADVANTAGES["mean"](reward_G), r - r.mean())
        others = [np.delete(r, i).mean() for i in range(len(r))]
        assert np.allclose(ADVANTAGES["leave_one_out"](reward_G), r - others)
        assert np.allclose(ADVANTAGES["std"](reward_G), (r - r.mean()) / (r.std(ddof=1) + 1e-4), atol=1e-15)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_many_groups_at_once_give_what_each_gives_alone(name):
    together = ADVANTAGES[name](REWARDS)
    assert torch.equal(together, torch.stack([ADVANTAGES[name](row) for row in REWARDS]))


def test_the_group_mean_is_one_minus_one_over_g_of_leave_one_out():
    assert torch.allclose(ADVANTAGES["mean"](REWARDS), (1 - 1 / 5) * ADVANTAGES["leave_one_out"](REWARDS), atol=1e-15)


@pytest.mark.parametrize("name", ["mean", "leave_one_out", "std"])
def test_a_group_of_one_gets_zero_and_never_its_raw_reward(name):
    assert ADVANTAGES[name](torch.tensor([3.7])).tolist() == [0.0]


@pytest.mark.parametrize("name", ["mean", "leave_one_out", "std"])
def test_equal_rewards_give_exactly_zero(name):
    reward_G = torch.full((3,), 0.1, dtype=torch.float64)
    assert float(reward_G.mean()) != 0.1  # rounding alone would make an advantage of it
    assert ADVANTAGES[name](reward_G).tolist() == [0.0, 0.0, 0.0]


def test_overlong_penalty_is_zero_then_linear_then_minus_one():
    """DAPO's equation 13 with a limit of 10 tokens and a cache of 4."""
    lengths = [0, 5, 6, 7, 8, 9, 10, 11, 99]
    expected = [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert [overlong_penalty(n, limit=10, cache=4) for n in lengths] == expected


def test_return_to_go_sums_a_sequence_from_each_token_on():
    value_T = torch.tensor([9.0, 1, 2, 3, 9, 9, 5, 7], dtype=torch.float64)
    sequence_T = torch.tensor([-1, 0, 0, 0, -1, -1, 1, 1])
    found = return_to_go(value_T, sequence_T, torch.tensor([3, 7]))
    assert found[sequence_T >= 0].tolist() == [6.0, 5.0, 3.0, 12.0, 7.0]
