"""What a value is moved towards: every temporal-difference and Monte Carlo method is `q += step * (target - q)`, and
differs in the target alone.  The same functions serve tables, linear features and networks.

Time-major, [T, N].  `discount_TN` is gamma where the episode goes on and 0 where it ended: there is no `done`.  A row
whose successor is of another episode, ended or merely cut (a time limit, the end of a rollout), has `same_TN` False;
where it was cut it keeps its discount, and its own next value bootstraps.  `values.py` has the next values.

    one step        r + discount v'                                  TD(0), Sarsa, expected Sarsa, Q-learning, double Q
    n steps         r_t + ... + discount^n v_{t+n}                                       [Sutton & Barto, chapter 7]
    lambda-return   (1 - lambda) sum of lambda^(n-1) times the n-step target             [Sutton & Barto, chapter 12]
    Monte Carlo     the lambda-return at lambda = 1
"""

import torch

from rung.core.shapes import Bool, Float, Tensor


def one_step(
    reward_TN: Float[Tensor, "T N"], discount_TN: Float[Tensor, "T N"], next_value_TN: Float[Tensor, "T N"]
) -> Float[Tensor, "T N"]:
    """r + discount v'."""
    return reward_TN + discount_TN * next_value_TN


def n_step(
    reward_TN: Float[Tensor, "T N"],
    discount_TN: Float[Tensor, "T N"],
    next_value_TN: Float[Tensor, "T N"],
    steps: int,
    same_TN: Bool[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:
    """The next `steps` rewards, then a value; fewer rewards where the segment ends first.

    same_TN: False where the next row is of another episode; default: all of one."""
    target_TN = one_step(reward_TN, discount_TN, next_value_TN)
    for _ in range(1, steps):
        later_TN = torch.cat((target_TN[1:], next_value_TN[-1:]))
        later_TN = later_TN if same_TN is None else torch.where(same_TN, later_TN, next_value_TN)
        target_TN = one_step(reward_TN, discount_TN, later_TN)
    return target_TN


def lambda_return(
    reward_TN: Float[Tensor, "T N"],
    discount_TN: Float[Tensor, "T N"],
    next_value_TN: Float[Tensor, "T N"],
    lambda_: float,
    same_TN: Bool[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:
    """G_t = r_t + discount_t ((1 - lambda) v_{t+1} + lambda G_{t+1}), from the last row backwards."""
    target_TN = torch.empty_like(reward_TN)
    later_N = next_value_TN[-1]
    for t in range(len(reward_TN) - 1, -1, -1):
        mixed_N = torch.lerp(next_value_TN[t], later_N, lambda_)
        if same_TN is not None:
            mixed_N = torch.where(same_TN[t], mixed_N, next_value_TN[t])
        later_N = target_TN[t] = one_step(reward_TN[t : t + 1], discount_TN[t : t + 1], mixed_N[None])[0]
    return target_TN
