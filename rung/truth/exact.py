"""The exact expected gradient of an objective: a sum over everything that one optimiser step can draw.

    E[gradient] = sum over outcomes of probability(outcome) x gradient of the loss of that outcome

An outcome is a whole step: a group of G completions for each prompt, so that baselines, normalisers and random
denominators are all inside the expectation.  `check` compares the result with what the objective claims to descend; it
is meant for objectives of others as much as for those of `rung.objectives`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from rung.core.errors import ConfigError
from rung.core.records import Counts, Objective, Sample
from rung.core.shapes import Float, Tensor
from rung.objectives.reduce import masked_sum
from rung.truth.tabular import Reward, TablePolicy, expected_return, pack_chains

Streams = Callable[[Sequence[Sample]], Sequence[Sample]]  # the samples of a group -> the same, with streams attached


@dataclass(frozen=True, eq=False)
class Outcome:
    """One step that can happen: its samples (group by group), and how likely it is."""

    probability: float
    samples: tuple[Sample, ...]
    counts: Counts


@dataclass(frozen=True, eq=False)
class Verdict:
    """How an expected gradient compares with the claimed one.

    error:     |expected - claimed| / |claimed|
    direction: the same after the best scaling of the expected gradient: what no learning rate can repair
    scale:     expected = scale x claimed, in least squares
    """

    expected_NV: Tensor
    claimed_NV: Tensor
    error: float
    direction: float
    scale: float


def outcomes(
    sampler: TablePolicy,
    *,
    reward: Reward,
    streams: Streams,
    group_size: int,
    prompts: Sequence[tuple[int, ...]] | None = None,
    policies: Iterable[tuple[str, TablePolicy]] = (),
    accept: Callable[[Sequence[Sample]], bool] = lambda group: True,
) -> list[Outcome]:
    """Every step of `group_size` samples per prompt drawn by `sampler`.

    prompts:  of one step; default all of the sampler's world
    policies: (stream name, policy) pairs, such as ("logp_ref", reference): their log-probabilities become streams
    accept:   groups refused are drawn again until one is accepted (dynamic sampling without a limit)
    """
    world = sampler.world
    prompts = world.prompts if prompts is None else prompts
    of_prompts = []
    for number, prompt in enumerate(prompts):
        singles = _singles(sampler, prompt, number, reward, tuple(policies))
        groups = []
        for draws in itertools.product(singles, repeat=group_size):
            group = [sample for sample, _ in draws]
            if accept(group):
                likelihood = float(torch.stack([p for _, p in draws]).prod())
                groups.append((likelihood, tuple(streams(group))))
        accepted = sum(likelihood for likelihood, _ in groups)
        of_prompts.append([(likelihood / accepted, group) for likelihood, group in groups])
    steps = []
    for step in itertools.product(*of_prompts):
        samples = tuple(sample for _, group in step for sample in group)
        tokens = sum(int(s.trainable.sum()) for s in samples)
        counts = Counts(tokens=tokens, sequences=len(samples), groups=len(step))
        steps.append(Outcome(math.prod(likelihood for likelihood, _ in step), samples, counts))
    return steps


def expected_gradient(
    objective: Objective, policy: TablePolicy, steps: Sequence[Outcome], *, together: bool = True
) -> Float[Tensor, "N V"]:
    """Expected gradient of the loss in the policy's logits.

    together: steps of equal counts are evaluated in one call, and each value is weighted by its step's probability;
    right for objectives that never mix values of different groups.  Otherwise one call per step: slow and plain.
    """
    parts: dict[Counts | int, list[Outcome]] = {}
    for number, step in enumerate(steps):
        parts.setdefault(step.counts if together else number, []).append(step)
    logits_NV = policy.logits_NV.detach().requires_grad_()
    varied = TablePolicy(policy.world, logits_NV)
    losses = [_expected_loss(objective, varied, part) for part in parts.values()]
    return torch.autograd.grad(torch.stack(losses).sum(), logits_NV)[0]


def gradient(function: Callable[[TablePolicy], Tensor], policy: TablePolicy) -> Float[Tensor, "N V"]:
    """Gradient of an exact quantity, such as `expected_return` or `expected_kl`, in the policy's logits."""
    logits_NV = policy.logits_NV.detach().requires_grad_()
    return torch.autograd.grad(function(TablePolicy(policy.world, logits_NV)), logits_NV)[0]


def compare(expected_NV: Float[Tensor, "N V"], claimed_NV: Float[Tensor, "N V"]) -> Verdict:
    """Relative errors of an expected gradient against a claimed one."""
    square = float((expected_NV * expected_NV).sum())
    inner = float((expected_NV * claimed_NV).sum())
    length = float(claimed_NV.norm())
    best = inner / square if square else 0.0
    return Verdict(
        expected_NV=expected_NV,
        claimed_NV=claimed_NV,
        error=float((expected_NV - claimed_NV).norm()) / length,
        direction=float((best * expected_NV - claimed_NV).norm()) / length,
        scale=inner / length**2,
    )


def check(
    objective: Objective,
    policy: TablePolicy,
    *,
    reward: Reward,
    streams: Streams,
    group_size: int,
    claim: Callable[[TablePolicy], Tensor] | None = None,
    policies: Iterable[tuple[str, TablePolicy]] = (),
    sampler: TablePolicy | None = None,
) -> Verdict:
    """Does the objective, in expectation, descend the loss it claims to?  One prompt's groups at a time.

    claim:   the loss as a function of the policy; default minus the expected reward
    sampler: who draws the samples; default the policy itself (on-policy)
    Other arguments as in `outcomes`.
    """
    policies = tuple(policies)
    total_NV = torch.zeros_like(policy.logits_NV)
    for prompt in policy.world.prompts:
        steps = outcomes(
            sampler or policy,
            reward=reward,
            streams=streams,
            group_size=group_size,
            prompts=(prompt,),
            policies=policies,
        )
        total_NV += expected_gradient(objective, policy, steps)
    claimed_NV = gradient(claim or (lambda p: -expected_return(p, reward)), policy)
    return compare(total_NV / len(policy.world.prompts), claimed_NV)


def _singles(
    sampler: TablePolicy,
    prompt: tuple[int, ...],
    group_id: int,
    reward: Reward,
    policies: tuple[tuple[str, TablePolicy], ...],
) -> list[tuple[Sample, Tensor]]:
    """Every completion of a prompt as a sample with its streams, and its probability."""
    streams = [(name, policy.logps(prompt)) for name, policy in policies]
    singles = []
    for number, (completion, logp_T) in enumerate(zip(sampler.world.completions(), sampler.logps(prompt), strict=True)):
        sample = sampler.world.sample(prompt, completion, group_id=group_id, reward=reward(prompt, completion))
        blank = torch.zeros(len(prompt), dtype=logp_T.dtype)
        known = {name: torch.cat([blank, logps[number].detach()]) for name, logps in streams}
        singles.append((replace(sample, streams=known), logp_T.sum().exp().detach()))
    return singles


def _expected_loss(objective: Objective, policy: TablePolicy, steps: Sequence[Outcome]) -> Tensor:
    """Sum over steps of equal counts of probability x loss."""
    samples = [sample for step in steps for sample in step.samples]
    step_S = torch.arange(len(steps)).repeat_interleave(torch.tensor([len(step.samples) for step in steps]))
    groups = max(sample.group_id for sample in samples) + 1
    group_S = step_S * groups + torch.tensor([sample.group_id for sample in samples])
    batch = pack_chains(samples, steps[0].counts, group_S=group_S)
    chance_S = torch.tensor([step.probability for step in steps], dtype=torch.float64)[step_S]
    chances = {len(batch.tokens_T): chance_S[batch.sequence_T], len(chance_S): chance_S}
    total = policy.logits_NV.new_zeros(())
    for name, term in objective(policy, batch).items():
        if len(term.value) not in chances:
            raise ConfigError(
                f"Term {name!r} has {len(term.value)} values for {len(batch.tokens_T)} tokens and {len(chance_S)} "
                "sequences: an objective must return one value per token or per sequence."
            )
        total = total + masked_sum(chances[len(term.value)] * term.value, term.mask) / term.denominator
    return total
