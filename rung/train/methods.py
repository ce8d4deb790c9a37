"""A `Method` made into functions: streams of a group, and the objective of a step.

    group of samples --group_streams--> advantage and weight of every token --pack--> PackedBatch --objective--> Terms

Every name of a `Method` is looked up here, once; formulas, sources and equivalences: docs/guide/methods.md, kl.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import torch

from rung.core.errors import ConfigError, nearest
from rung.core.records import Objective, Origin, PackedBatch, Policy, Sample, Term, Terms, TokenScores
from rung.core.shapes import Tensor
from rung.objectives.advantages import ADVANTAGES, overlong_penalty, return_to_go
from rung.objectives.kl import KLS, Estimator, k1, k3
from rung.objectives.policy import SURROGATES, clipped
from rung.objectives.reduce import DENOMINATORS, masked_sum, segment_sum
from rung.train.config import Method

OVERLONG_SHARE = 5  # without a cache of its own, DAPO's is a fifth of the token limit, as in the paper (4096 of 20480)


def check_method(method: Method, *, samples_per_prompt: int, updates_per_rollout: int, max_tokens: int) -> None:
    """Refuse what would train on something else than it says.  Raises ConfigError."""
    for name, kind in get_type_hints(Method).items():
        value = getattr(method, name)
        if get_args(kind) and value not in get_args(kind):
            raise ConfigError(f"method.{name} has no choice {value!r}. {nearest(str(value), get_args(kind))}")
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"method.{name} must be a finite number, not {value}.")
    if method.advantage != "none" and samples_per_prompt < 2:
        raise ConfigError(
            f"advantage {method.advantage!r} compares the samples of one prompt: samples_per_prompt must be 2 or more, "
            f"not {samples_per_prompt}. Or set method.advantage to 'none'."
        )
    if method.eps_low <= 0 or method.eps_high <= 0:
        raise ConfigError(f"eps_low and eps_high must be above 0, not {method.eps_low} and {method.eps_high}.")
    if method.kl_coef < 0 or method.max_refills < 0:
        raise ConfigError(
            f"kl_coef and max_refills cannot be negative, but are {method.kl_coef} and {method.max_refills}."
        )
    if method.kl == "none" and method.kl_coef:
        raise ConfigError(
            f"kl_coef is {method.kl_coef}, but method.kl is 'none', so it would do nothing. "
            "Set method.kl to k1_reward, square or k3_loss, or kl_coef to 0."
        )
    if method.surrogate == "pg" and updates_per_rollout > 1:
        raise ConfigError(
            f"surrogate 'pg' has no ratio, so it is wrong from the second of {updates_per_rollout} updates on. "
            "Set method.surrogate to 'clip', or updates_per_rollout to 1."
        )
    if method.surrogate == "clip_sequence" and method.denominator != "sequences":
        raise ConfigError(
            f"surrogate 'clip_sequence' has one value per sequence: method.denominator must be 'sequences', "
            f"not {method.denominator!r}."
        )
    if method.overlong_cache and method.overlong != "shape":
        raise ConfigError(f"overlong_cache does nothing with overlong {method.overlong!r}. Set overlong to 'shape'.")
    if not 0 <= method.overlong_cache <= max_tokens:
        raise ConfigError(f"overlong_cache must lie in 0 ... max_tokens ({max_tokens}), not {method.overlong_cache}.")


def needs_reference(method: Method) -> bool:
    """Does a term read the stream `logp_ref`?"""
    return KLS[method.kl] is not None and method.kl_coef != 0


def without_contrast(rewards: Sequence[float]) -> bool:
    """Are all rewards of a group equal, so that dynamic sampling replaces it?  [Yu 2025: 0 < number correct < G]

    Judged on the grades themselves, before overlong shaping: lengths alone are no contrast.
    """
    return min(rewards) == max(rewards)


def group_streams(
    method: Method, group: Sequence[Sample], *, max_tokens: int, cut: Sequence[bool] | None = None
) -> list[Sample]:
    """The samples of one prompt with their streams `advantage` and `weight` (fp64, constant over a sample's tokens).

    Takes the whole group, without samples of unknown grade: they must be in no baseline and no count.
    max_tokens: the limit of a sample; cut: which samples a limit cut off.  Overlong "shape" takes them to be as long as
    the limit; "mask" must be told them: they stay in the baseline and among the sequences, but train no token.
    """
    if method.overlong == "mask":
        if cut is None:
            raise ConfigError("overlong 'mask' must be told which samples were cut off; pass cut=.")
        nothing = [torch.zeros_like(sample.trainable) for sample in group]
        group = [replace(s, trainable=no) if c else s for s, no, c in zip(group, nothing, cut, strict=True)]
    rewards = [sample.reward for sample in group]
    if method.overlong == "shape":
        cache = method.overlong_cache or max(max_tokens // OVERLONG_SHARE, 1)
        lengths = [int((sample.origin == Origin.SAMPLED).sum()) for sample in group]
        lengths = [max_tokens if c else n for n, c in zip(lengths, cut or [False] * len(group), strict=True)]
        rewards = [
            r + overlong_penalty(n, limit=max_tokens, cache=cache) for r, n in zip(rewards, lengths, strict=True)
        ]
    advantages = ADVANTAGES[method.advantage](torch.tensor(rewards, dtype=torch.float64)).tolist()
    own = [int(sample.trainable.sum()) for sample in group]
    weigh = DENOMINATORS[method.denominator].weight
    return [
        replace(
            sample,
            streams={
                **sample.streams,
                "advantage": torch.full(sample.token_ids.shape, advantage, dtype=torch.float64),
                "weight": torch.full(sample.token_ids.shape, weigh(n, sum(own), max_tokens), dtype=torch.float64),
            },
        )
        for sample, advantage, n in zip(group, advantages, own, strict=True)
    ]


def is_dead(method: Method, group: Sequence[Sample]) -> bool:
    """Is every loss term of this group exactly zero, so that no backward pass is needed?

    Its tokens still belong to the denominators of the step.
    """
    if not any(bool(s.trainable.any()) for s in group):
        return True  # all were cut off, and overlong is "mask"
    silent = all(not bool((s.streams["advantage"][s.trainable] != 0).any()) for s in group)
    return silent and not needs_reference(method) and method.entropy_coef == 0


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What the terms of an objective read: tensors of one batch, zero wherever it is not trainable."""

    batch: PackedBatch
    logp_T: Tensor
    logp_old_T: Tensor
    entropy_T: Tensor

    def stream(self, name: str) -> Tensor:
        return torch.where(self.batch.trainable_T, self.batch.streams[name], 0)

    def per_sequence(self, value_T: Tensor) -> Tensor:
        return segment_sum(value_T, self.batch.sequence_T, len(self.batch.last_S))

    def trained_S(self) -> Tensor:
        return self.per_sequence(self.batch.trainable_T.double()) > 0


def build_objective(method: Method) -> Objective:
    """The loss of a method, as terms "policy", "kl" and "entropy" per token (or per sequence).

    Reads the streams advantage and weight; logp_ref where `needs_reference`; logp_old if the batch has it, else the
    policy's own log-probability, detached (the first and only update on its samples).  `logp_sampled` is never read.
    """
    builders: dict[str, Callable[[_Tokens], Term]] = {"policy": _policy_term(method)}
    penalty = KLS[method.kl]
    if penalty is not None and needs_reference(method) and penalty.place != "reward":
        builders["kl"] = {"token": _kl_per_token, "sequence": _kl_per_sequence}[penalty.place](method, penalty.estimate)
    if method.entropy_coef:
        builders["entropy"] = _entropy_term(method)

    def objective(policy: Policy, batch: PackedBatch) -> Terms:
        view = _view(policy.scores(batch), batch)
        return {name: build(view) for name, build in builders.items()}

    return objective


def measure(method: Method, batch: PackedBatch, scores: TokenScores) -> Mapping[str, float]:
    """Sums over the trainable tokens of a batch, for the record; divide by the step's `counts.tokens`.

    entropy; clipped_low and clipped_high (tokens without gradient, of surrogate "clip"); with a reference, the k1 and
    k3 estimates of the divergence per token.
    """
    with torch.no_grad():
        x, mask_T = _view(scores, batch), batch.trainable_T
        low_T, high_T = clipped(
            x.logp_T, x.logp_old_T, x.stream("advantage"), eps_low=method.eps_low, eps_high=method.eps_high
        )
        values = {"entropy": x.entropy_T, "clipped_low": low_T.double(), "clipped_high": high_T.double()}
        if needs_reference(method):
            logp_ref_T = x.stream("logp_ref")
            values |= {"kl_k1": k1(x.logp_T, logp_ref_T), "kl_k3": k3(x.logp_T, logp_ref_T)}
        return {name: masked_sum(value_T.double(), mask_T).item() for name, value_T in values.items()}


def _view(scores: TokenScores, batch: PackedBatch) -> _Tokens:
    """NaN under a mask would come back through 0 x NaN in a backward pass: everything is masked before it is used."""
    mask_T = batch.trainable_T
    logp_T = torch.where(mask_T, scores.logp_T, 0)
    logp_old_T = torch.where(mask_T, batch.streams["logp_old"], 0) if "logp_old" in batch.streams else logp_T.detach()
    return _Tokens(batch, logp_T, logp_old_T, torch.where(mask_T, scores.entropy_T, 0))


def _policy_term(method: Method) -> Callable[[_Tokens], Term]:
    surrogate, count = SURROGATES[method.surrogate], DENOMINATORS[method.denominator].count
    bounds = {"eps_low": method.eps_low, "eps_high": method.eps_high}
    penalised = needs_reference(method) and method.kl == "k1_reward"
    advantage = _penalised_advantage(method) if penalised else _plain_advantage

    def per_token(x: _Tokens) -> Term:
        value_T = surrogate(x.logp_T, x.logp_old_T, advantage(x), **bounds)
        return Term(-x.stream("weight") * value_T, x.batch.trainable_T, count(x.batch.counts))

    def per_sequence(x: _Tokens) -> Term:
        first_S = _first_trainable(x)
        value_S = surrogate(x.per_sequence(x.logp_T), x.per_sequence(x.logp_old_T), advantage(x)[first_S], **bounds)
        return Term(-value_S, x.trained_S(), count(x.batch.counts))

    return per_sequence if method.surrogate == "clip_sequence" else per_token


def _plain_advantage(x: _Tokens) -> Tensor:
    return x.stream("advantage")


def _penalised_advantage(method: Method) -> Callable[[_Tokens], Tensor]:
    """A_t - beta sum_{s >= t} (log pi_old - log ref)_s: after normalisation, so that beta is never divided by a std."""

    def advantage(x: _Tokens) -> Tensor:
        rate_T = k1(x.logp_old_T, x.stream("logp_ref"))
        penalty_T = return_to_go(rate_T, x.batch.sequence_T, x.batch.last_S)
        return torch.where(x.batch.trainable_T, x.stream("advantage") - method.kl_coef * penalty_T, 0)

    return advantage


def _first_trainable(x: _Tokens) -> Tensor:
    """Index on T of each sequence's first trainable token, where the return-to-go is that of the whole sequence."""
    trainable_T, length = x.batch.trainable_T, len(x.batch.trainable_T)
    place_T = torch.where(trainable_T, torch.arange(length, device=trainable_T.device), length - 1)
    start_S = torch.full_like(x.batch.last_S, length - 1)
    return start_S.scatter_reduce(0, x.batch.sequence_T.clamp(min=0), place_T, "amin")


def _kl_per_token(method: Method, estimate: Estimator) -> Callable[[_Tokens], Term]:
    """Weighted and averaged as the method's own tokens are (GRPO's equation 3)."""
    count = DENOMINATORS[method.denominator].count

    def term(x: _Tokens) -> Term:
        value_T = method.kl_coef * x.stream("weight") * estimate(x.logp_T, x.stream("logp_ref"))
        return Term(value_T, x.batch.trainable_T, count(x.batch.counts))

    return term


def _kl_per_sequence(method: Method, estimate: Estimator) -> Callable[[_Tokens], Term]:
    """Always a mean over sequences: its gradient is that of kl_coef x KL, whatever the method's denominator."""

    def term(x: _Tokens) -> Term:
        value_S = estimate(x.per_sequence(x.logp_T), x.per_sequence(x.stream("logp_ref")))
        return Term(method.kl_coef * value_S, x.trained_S(), float(x.batch.counts.sequences))

    return term


def _entropy_term(method: Method) -> Callable[[_Tokens], Term]:
    """Always a mean over the step's tokens, so that the coefficient means the same in every method (as in trl)."""

    def term(x: _Tokens) -> Term:
        return Term(-method.entropy_coef * x.entropy_T, x.batch.trainable_T, float(max(x.batch.counts.tokens, 1)))

    return term
