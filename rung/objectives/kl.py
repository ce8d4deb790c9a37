"""Estimators of KL(pi || reference) from samples of pi, per element.  [Schulman 2020, "Approximating KL divergence"]

With r = log pi - log ref at the sampled element, all three have an expectation near the KL of one decision.  What
matters for training is not the value but the *gradient*, and there they differ (derived in docs/guide/kl.md):

    k1 in the reward, return-to-go   exact, for sequences too
    k2 of whole sequences            exact on the policy's own samples   (the square of Kimi k1.5)
    k2 per token, as a loss          drops what a token does to later divergences
    k3 per token, as a loss          drops it too, and descends the forward KL of each token
    k1 as a loss                     zero in expectation: useless

A log-ratio is never clamped: that would kill the gradient exactly where the policy has moved most.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from rung.core.shapes import Float, Tensor


def k1(logp_N: Float[Tensor, "N"], logp_ref_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """r: unbiased, of either sign."""
    return logp_N - logp_ref_N


def k2(logp_N: Float[Tensor, "N"], logp_ref_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """r^2 / 2: a biased value with the gradient r grad log pi."""
    return (logp_N - logp_ref_N).square() / 2


def k3(logp_N: Float[Tensor, "N"], logp_ref_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """exp(-r) - 1 + r: unbiased, never negative; as a loss its gradient is (1 - exp(-r)) grad log pi."""
    r_N = logp_N - logp_ref_N
    return torch.expm1(-r_N) + r_N


Estimator = Callable[[Tensor, Tensor], Tensor]  # (logp, logp_ref) -> value per element


@dataclass(frozen=True)
class Penalty:
    """A KL penalty: which estimator, and where it acts.

    place: reward (detached, return-to-go, subtracted from the advantage), token or sequence (a loss per element)
    """

    estimate: Estimator
    place: Literal["reward", "token", "sequence"]


KLS: Mapping[str, Penalty | None] = {
    "none": None,
    "k1_reward": Penalty(k1, "reward"),
    "square": Penalty(k2, "sequence"),
    "k3_loss": Penalty(k3, "token"),
}
