"""What the next state is worth to a target of `returns.py`: here the classic methods part.

    Sarsa               q(s', a') of the action that is taken next                       [Rummery & Niranjan 1994]
    expected Sarsa      sum of pi(a|s') q(s', a)                                         [van Seijen et al. 2009]
    Q-learning          max of q(s', a)                                                  [Watkins 1989]
    double Q            q_other(s', argmax of q(s', a))                                  [van Hasselt 2010]

An action that is illegal has no value, whatever stands in its cell; a state without actions (terminal) is worth 0.
"""

import torch

from rung.core.shapes import Bool, Float, Int, Tensor


def of_action(q_TNA: Float[Tensor, "*n A"], action_TN: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """q(s, a)."""
    return q_TNA.gather(-1, action_TN[..., None])[..., 0]


def expected(q_TNA: Float[Tensor, "*n A"], pi_TNA: Float[Tensor, "*n A"]) -> Float[Tensor, "*n"]:
    """Sum of pi q; illegal actions have pi = 0."""
    return torch.where(pi_TNA > 0, pi_TNA * q_TNA, 0.0).sum(-1)


def best(q_TNA: Float[Tensor, "*n A"], legal_TNA: Bool[Tensor, "*n A"]) -> Float[Tensor, "*n"]:
    """The largest q of a legal action."""
    return torch.where(legal_TNA.any(-1), q_TNA.masked_fill(~legal_TNA, -torch.inf).amax(-1), 0.0)


def double(
    q_TNA: Float[Tensor, "*n A"], other_TNA: Float[Tensor, "*n A"], legal_TNA: Bool[Tensor, "*n A"]
) -> Float[Tensor, "*n"]:
    """One estimate chooses, the other is believed."""
    chosen_TN = q_TNA.masked_fill(~legal_TNA, -torch.inf).argmax(-1)
    return torch.where(legal_TNA.any(-1), of_action(other_TNA, chosen_TN), 0.0)
