"""Advantages of the samples of one prompt, relative to their group, and what is added to a reward before.

A baseline that does not depend on the sample itself leaves the expected policy gradient unchanged [Williams 1992].  The
group's mean contains the sample: its expected gradient is exactly (1 - 1/G) of the true one.  Leaving the sample out
makes it exact.  Dividing by the standard deviation reweights prompts (derivation: docs/guide/methods.md).

All functions work on the last axis; a group of one has no baseline and gets 0, never its raw reward.
"""

from collections.abc import Callable, Mapping

import torch

from rung.core.shapes import Float, Int, Tensor

STD_EPS = 1e-4  # [trl 1.16, GRPO-Zero]; verl has 1e-6, oat 1e-8: in a group of nearly equal rewards it is the scale


def none(reward_G: Float[Tensor, "*n G"]) -> Float[Tensor, "*n G"]:
    """The reward itself: REINFORCE without a baseline.  [Williams 1992]"""
    return reward_G


def mean(reward_G: Float[Tensor, "*n G"]) -> Float[Tensor, "*n G"]:
    """R_i - mean(R); exactly 0 where all rewards are equal.  [Liu 2025 (Dr. GRPO)]"""
    equal = reward_G.amax(-1, keepdim=True) == reward_G.amin(-1, keepdim=True)
    return torch.where(equal, 0, reward_G - reward_G.mean(-1, keepdim=True))


def leave_one_out(reward_G: Float[Tensor, "*n G"]) -> Float[Tensor, "*n G"]:
    """R_i - mean of the other rewards = G / (G - 1) (R_i - mean(R)).  [Kool 2019; Ahmadian 2024 (RLOO)]"""
    group = reward_G.shape[-1]
    return mean(reward_G) * (group / max(group - 1, 1))


def std(reward_G: Float[Tensor, "*n G"]) -> Float[Tensor, "*n G"]:
    """(R_i - mean(R)) / (std(R) + 1e-4), with the sample standard deviation (ddof 1).  [Shao 2024 (GRPO)]

    The paper does not say which standard deviation: ddof 1 and 1e-4 are trl's.  ddof 0 is larger by
    sqrt(G / (G - 1)): 6.9 % at G = 8.
    """
    if reward_G.shape[-1] == 1:
        return torch.zeros_like(reward_G)
    return mean(reward_G) / (reward_G.std(-1, keepdim=True) + STD_EPS)


ADVANTAGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": none,
    "mean": mean,
    "leave_one_out": leave_one_out,
    "std": std,
}


def overlong_penalty(length: int, *, limit: int, cache: int) -> float:
    """What DAPO adds to the reward of a long sample of `length` tokens.  [Yu 2025, eq. 13]

    0 up to limit - cache, then linear down to -1 at `limit`.
    """
    return -min(max(length - (limit - cache), 0) / cache, 1.0)


def return_to_go(
    value_T: Float[Tensor, "T"], sequence_T: Int[Tensor, "T"], last_S: Int[Tensor, "S"]
) -> Float[Tensor, "T"]:
    """Sum of a sequence's values from each token to its last one, in fp64; a sequence's tokens lie side by side.

    Meaningless where sequence_T is -1.
    """
    total_T = value_T.double().cumsum(0)
    return total_T[last_S][sequence_T.clamp(min=0)] - total_T + value_T
