"""Targets: each equals its own definition as a sum, and they meet where their parameters say so."""

import pytest
import torch

from rung.objectives import values
from rung.objectives.returns import lambda_return, n_step, one_step


def segment(seed: int, length: int = 7, lanes: int = 3, endings: bool = False):
    """Rewards, discounts, next values, and where the next row is of the same episode: lane 1 ends, lane 2 is cut."""
    draw = torch.Generator().manual_seed(seed)
    reward, value = (torch.randn(length, lanes, generator=draw, dtype=torch.float64) for _ in range(2))
    discount = torch.full_like(reward, 0.9)
    same = torch.ones_like(reward, dtype=torch.bool)
    if endings:
        discount[3, 1], same[3, 1], same[4, 2] = 0.0, False, False
    return reward, discount, value, same


def by_definition(reward, discount, value, same, t, lane, n):
    """The n-step target from row t, rewards one by one."""
    total, factor = 0.0, 1.0
    for k in range(t, len(reward)):
        total += factor * reward[k, lane].item()
        factor *= discount[k, lane].item()
        if k - t + 1 == n or not same[k, lane] or k == len(reward) - 1:
            return total + factor * value[k, lane].item()
    raise AssertionError


@pytest.mark.parametrize("endings", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_n_steps_are_n_rewards_and_a_value_and_fewer_where_an_episode_is_over(n, endings):
    rows = segment(0, endings=endings)
    found = n_step(*rows[:3], n, rows[3])
    for t in range(7):
        for lane in range(3):
            assert found[t, lane].item() == pytest.approx(by_definition(*rows, t, lane, n))


@pytest.mark.parametrize("endings", [False, True])
def test_the_lambda_return_is_the_weighted_mean_of_n_step_targets(endings):
    rows = segment(1, endings=endings)
    found = lambda_return(*rows[:3], 0.7, rows[3])
    for t in range(7):
        for lane in range(3):
            last = next((k for k in range(t, 7) if not rows[3][k, lane]), 6)
            horizon = last - t + 1
            weights = [0.3 * 0.7 ** (n - 1) for n in range(1, horizon)] + [0.7 ** (horizon - 1)]
            targets = [by_definition(*rows, t, lane, n) for n in range(1, horizon + 1)]
            assert found[t, lane].item() == pytest.approx(sum(w * g for w, g in zip(weights, targets, strict=True)))


def test_lambda_zero_is_one_step_and_lambda_one_is_the_longest_n():
    reward, discount, value, same = segment(2, endings=True)
    assert torch.allclose(lambda_return(reward, discount, value, 0.0, same), one_step(reward, discount, value))
    assert torch.allclose(lambda_return(reward, discount, value, 1.0, same), n_step(reward, discount, value, 7, same))


def test_a_finished_episode_does_not_bootstrap_and_a_cut_one_does():
    reward, discount, value, same = segment(3, endings=True)
    changed = value.clone()
    changed[3, 1] += 100
    changed[4, 2] += 100
    before, after = (n_step(reward, discount, v, 3, same) for v in (value, changed))
    assert torch.equal(before[:, 1], after[:, 1])
    assert (after[2:5, 2] - before[2:5, 2]).tolist() == pytest.approx([72.9, 81.0, 90.0])


def test_next_values_part_where_the_methods_do():
    q, other = torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([[7.0, 2.0, 8.0]])
    legal, pi = torch.tensor([[True, True, False]]), torch.tensor([[0.25, 0.75, 0.0]])
    assert values.of_action(q, torch.tensor([0])).item() == 1
    assert values.expected(q, pi).item() == pytest.approx(4.0)
    assert values.best(q, legal).item() == 5
    assert values.double(q, other, legal).item() == 2


def test_a_state_without_actions_is_worth_nothing_even_where_its_cells_are_not_finite():
    q, none = torch.tensor([[float("nan"), float("inf")]]), torch.tensor([[False, False]])
    assert values.best(q, none).item() == 0
    assert values.double(q, q, none).item() == 0
    assert values.expected(q, torch.zeros(1, 2)).item() == 0
