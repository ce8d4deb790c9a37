"""A decoder as a policy: token log-probabilities and entropies of a packed batch.

The law scored is the law sampled from: logits are divided by the same temperature on both sides.
"""

import copy
from dataclasses import dataclass

import torch

from rung.core.records import PackedBatch, TokenScores
from rung.lm.protocols import Decoder
from rung.objectives.logprobs import token_logprobs
from rung.train.data import inputs


@dataclass(frozen=True, eq=False)
class LanguagePolicy:
    """Meets `rung.core.records.Policy`: the decoder runs once over the batch, the head on trainable rows only.

    Batches and scores are of the host, wherever the decoder is; gradients find the way back."""

    decoder: Decoder
    temperature: float = 1.0

    def scores(self, batch: PackedBatch) -> TokenScores:
        tokens_N, layout, row_T = inputs(batch)
        wanted_T, device = batch.trainable_T, next(self.decoder.parameters()).device
        hidden_ND = self.decoder.forward(tokens_N.to(device), layout)
        logp_M, entropy_M = token_logprobs(
            hidden_ND[row_T[wanted_T].to(device)],
            self.decoder.head_weight(),
            batch.tokens_T[wanted_T].to(device),
            temperature=self.temperature,
            softcap=self.decoder.logit_softcap,
        )
        logp_M, entropy_M = logp_M.cpu(), entropy_M.cpu()  # the one wait of a micro-batch's forward pass
        zeros_T = torch.zeros(len(wanted_T), dtype=logp_M.dtype)
        where = wanted_T.nonzero(as_tuple=True)
        return TokenScores(logp_T=zeros_T.index_put(where, logp_M), entropy_T=zeros_T.index_put(where, entropy_M))


class Recorded:
    """A policy that remembers its last scores, so that metrics need no second forward pass."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy = policy
        self.last: TokenScores | None = None

    def scores(self, batch: PackedBatch) -> TokenScores:
        self.last = self.policy.scores(batch)
        return self.last


def frozen_copy(decoder: Decoder) -> Decoder:
    """A reference policy: the same decoder with weights of its own that never change."""
    reference = copy.deepcopy(decoder)
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return reference
