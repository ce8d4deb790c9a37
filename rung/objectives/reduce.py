"""The only place where a mask meets a sum, and a sum its denominator.

Objectives return values per element (`Term`); what a step divides by is counted once, over the whole step, before it is
split into micro-batches.  Hence losses and gradients of micro-batches *add up* to those of the step, however it is cut.
A loss divided by its own micro-batch's count would change with the split (llm_rl pains: 18 trainers of one library).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rung.core.records import Counts, Terms
from rung.core.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Denominator:
    """How the tokens of a step are averaged: sum of weight x value, over a count of the step.

    weight: (tokens of the sequence, tokens of its group, token limit of a sample) -> weight of each of its tokens
    count:  what the weighted sum of the whole step is divided by (1 where nothing is trained: the sum is 0 then)
    """

    weight: Callable[[int, int, int], float]
    count: Callable[[Counts], float]


DENOMINATORS: Mapping[str, Denominator] = {
    # GRPO: mean over a sequence's tokens, then over sequences
    "sequence_mean": Denominator(lambda own, group, limit: 1 / max(own, 1), lambda counts: float(counts.sequences)),
    # DAPO as verl and trl have it: mean over the step's tokens
    "tokens": Denominator(lambda own, group, limit: 1.0, lambda counts: float(max(counts.tokens, 1))),
    # DAPO as its paper has it: mean over a group's tokens, then over groups
    "group_tokens": Denominator(lambda own, group, limit: 1 / max(group, 1), lambda counts: float(counts.groups)),
    # Dr. GRPO: sum over tokens, over the token limit, then mean over sequences
    "constant": Denominator(lambda own, group, limit: 1 / limit, lambda counts: float(counts.sequences)),
    # REINFORCE, RLOO: sum over tokens, mean over sequences
    "sequences": Denominator(lambda own, group, limit: 1.0, lambda counts: float(counts.sequences)),
}


def masked_sum(value_N: Float[Tensor, "N"], mask_N: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """Sum where the mask is true; what lies elsewhere, NaN included, cannot be seen."""
    return torch.where(mask_N, value_N, 0).sum()


def segment_sum(value_T: Float[Tensor, "T"], segment_T: Int[Tensor, "T"], num: int) -> Float[Tensor, "S"]:
    """Sum of the values of each segment 0 ... num - 1; tokens of segment -1 belong to none."""
    inside_T = segment_T >= 0
    value_T = torch.where(inside_T, value_T, 0)
    return value_T.new_zeros(num).index_add(0, segment_T.clamp(min=0), value_T)


def total_loss(terms: Terms) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss to be minimised, and each term's contribution to it (for the record)."""
    parts = {name: masked_sum(term.value, term.mask) / term.denominator for name, term in terms.items()}
    return torch.stack(list(parts.values())).sum(), {name: part.item() for name, part in parts.items()}
