"""Surrogates of a policy's return, per element, to be maximised; the caller brings mask, weight and denominator.

An element is a token, or a whole sequence (then logp is its sum).  `logp_old` is what the policy that is being improved
gave the same element, by the learner's own arithmetic: never what the sampler reported.
"""

from collections.abc import Callable, Mapping

import torch

from rung.core.shapes import Bool, Float, Tensor


def pg(
    logp_N: Float[Tensor, "N"],
    logp_old_N: Float[Tensor, "N"],
    advantage_N: Float[Tensor, "N"],
    *,
    eps_low: float = 0.0,
    eps_high: float = 0.0,
) -> Float[Tensor, "N"]:
    """A log pi: the policy gradient theorem as a loss; right only on the policy's own samples.  [Williams 1992]

    `logp_old_N` and the bounds are ignored: there is no ratio.
    """
    return advantage_N * logp_N


def clip(
    logp_N: Float[Tensor, "N"],
    logp_old_N: Float[Tensor, "N"],
    advantage_N: Float[Tensor, "N"],
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Float[Tensor, "N"]:
    """PPO's pessimistic surrogate.  [Schulman 2017, eq. 7]

    min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)  with  r = exp(logp - logp_old)

    Differs from the paper: the two bounds are separate [Yu 2025 (DAPO)].  At r = 1 its gradient is that of `pg`.
    """
    ratio_N = (logp_N - logp_old_N).exp()
    return torch.min(ratio_N * advantage_N, ratio_N.clamp(1 - eps_low, 1 + eps_high) * advantage_N)


def clipped(
    logp_N: Float[Tensor, "N"],
    logp_old_N: Float[Tensor, "N"],
    advantage_N: Float[Tensor, "N"],
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "N"]]:
    """Which elements `clip` gives no gradient: (too low with A < 0, too high with A > 0).  For the record only."""
    ratio_N = (logp_N - logp_old_N).exp()
    return (ratio_N < 1 - eps_low) & (advantage_N < 0), (ratio_N > 1 + eps_high) & (advantage_N > 0)


SURROGATES: Mapping[str, Callable[..., Tensor]] = {
    "pg": pg,
    "clip": clip,
    "clip_sequence": clip,  # of whole sequences: the ratio is the product of the tokens' ratios  [trl's RLOO]
}
