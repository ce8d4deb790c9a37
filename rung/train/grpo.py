"""Group-based RL on one machine: REINFORCE, RLOO, GRPO, Dr. GRPO and DAPO are rows of one loop.

    problems -> groups of samples -> grades -> advantages -> one optimiser step -> record; now and then: evaluate, save

`train_step` is the whole idea; `Trainer` holds what it needs, and `rung.train.run` starts, resumes and records runs.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rung.core.errors import RunError
from rung.core.metrics import Max, Mean, Metric, flatten, merge
from rung.core.records import Objective, PackedBatch, Sample, TokenScores
from rung.core.words import Problem
from rung.engine.types import WeightsRef
from rung.lm.protocols import Decoder
from rung.tasks.sandbox import UnknownWatch
from rung.train.config import GroupRL
from rung.train.data import count, pack_one, sample_of, split, unpack, with_stream
from rung.train.methods import build_objective, group_streams, is_dead, measure, needs_reference, without_contrast
from rung.train.policy import LanguagePolicy
from rung.train.rollouts import Group, RolloutSource, asks_of
from rung.train.step import Learner

GAP_LIMITS = {  # nats between sampler and learner that rounding alone does not reach on a right engine
    torch.float32: {"gap_max": 1e-4},
    torch.bfloat16: {"gap_mean": 0.05, "gap_max": 4.0},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """What a step works with.

    problems(step, refill, count): training problems, a function of its arguments alone
    weights(): names the weights that sample now
    phase(name): hears "sample", "backward" and "update" as they begin
    """

    recipe: GroupRL
    decoder: Decoder
    reference: Decoder | None
    learner: Learner
    source: RolloutSource
    problems: Callable[[int, int, int], Sequence[Problem]]
    weights: Callable[[], WeightsRef]
    phase: Callable[[str], None]
    watch: UnknownWatch
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", build_objective(self.recipe.method))

    @property
    def share_prompts(self) -> bool:
        """Only where computing a prompt once is cheaper: a micro-batch's tokens are what is really computed."""
        return self.recipe.share_prompts and self.decoder.branches

    def policy(self, decoder: Decoder) -> LanguagePolicy:
        return LanguagePolicy(decoder, self.recipe.temperature)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step leaves: every group sampled (those not trained on too), advantages of the trained ones, metrics."""

    groups: Sequence[Group]
    trained: Sequence[tuple[Group, Sequence[Sample]]]
    metrics: dict[str, float]


def train_step(trainer: Trainer, step: int) -> StepRecord:
    """Sample, grade, and learn from step `step` (counted from 1)."""
    recipe, method, began = trainer.recipe, trainer.recipe.method, time.perf_counter()
    trainer.phase("sample")
    weights = trainer.weights()
    dropped = trainer.watch.dropped
    groups, chosen = gather(trainer, step, weights)
    refuse_stale(groups, weights)
    sampled = time.perf_counter()
    trained = [(group, samples_of(trainer, group, number)) for number, group in enumerate(chosen)]
    metrics = describe_rollouts(groups, chosen) | {"groups_dropped": float(trainer.watch.dropped - dropped)}
    if trained:
        metrics |= learn(trainer, [samples for _, samples in trained])
    metrics["no_signal"] = sum(without_contrast(g.rewards) for g in groups if len(g.rewards) > 1) / max(len(groups), 1)
    metrics["seconds_learn"] = time.perf_counter() - sampled
    metrics["seconds"] = time.perf_counter() - began
    metrics["refills"] = float(len(groups) > recipe.prompts_per_step and method.dynamic_sampling)
    return StepRecord(groups=groups, trained=trained, metrics=metrics)


def gather(trainer: Trainer, step: int, weights: WeightsRef) -> tuple[list[Group], list[Group]]:
    """All groups sampled in this step, and those to train on.

    A group with fewer than two known grades is dropped.  With dynamic sampling, so is one whose rewards are all equal,
    and other problems are drawn in its place, at most `max_refills` times.
    """
    recipe, method = trainer.recipe, trainer.recipe.method
    drawn: Counter[str] = Counter()
    groups: list[Group] = []
    chosen: list[Group] = []
    for refill in range(method.max_refills + 1 if method.dynamic_sampling else 1):
        problems = trainer.problems(step, refill, recipe.prompts_per_step - len(chosen))
        trainer.source.submit(asks_of(step, problems, recipe.samples_per_prompt, drawn), weights)
        new = trainer.source.poll()
        groups += new
        for group in new:
            known = trainer.watch.add(group.grades)
            if known and not (method.dynamic_sampling and without_contrast(group.rewards)):
                chosen.append(group)
        if len(chosen) == recipe.prompts_per_step:
            break
    return groups, chosen


def samples_of(trainer: Trainer, group: Group, number: int) -> list[Sample]:
    """The samples of known grade of a group, with their advantages and weights."""
    recipe = trainer.recipe
    known = [(e, grade.score) for e, grade in zip(group.episodes, group.grades, strict=True) if grade.score is not None]
    samples = [
        sample_of(
            group.prompt_ids,
            episode.turns[0].completion,
            later=episode.turns[1:],
            problem_id=group.ask.problem.id,
            group_id=number,
            reward=score,
        )
        for episode, score in known
    ]
    cut = [episode.cut for episode, _ in known]
    return group_streams(recipe.method, samples, max_tokens=recipe.max_tokens * recipe.max_turns, cut=cut)


def learn(trainer: Trainer, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """One optimiser step per slice of the groups (`updates_per_rollout` slices); returns metrics."""
    recipe = trainer.recipe
    scored = with_scores(trainer, groups)
    parts: list[dict[str, Metric]] = []
    last = {}
    for update, part in enumerate(slices(scored, recipe.updates_per_rollout)):
        counts = count([sample for group in part for sample in group])
        alive = [sample for group in part if not is_dead(recipe.method, group) for sample in group]
        batches = [
            pack_one([alive[i] for i in which], counts=counts, share_prompts=trainer.share_prompts)
            for which in split(
                alive, tokens_per_batch=recipe.tokens_per_micro_batch, share_prompts=trainer.share_prompts
            )
        ]
        seen = Observed(trainer, with_gap=update == 0)
        policy = trainer.policy(trainer.decoder)
        result = trainer.learner.step(batches, policy, trainer.objective, seen, phase=trainer.phase)
        last = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
        last |= {f"loss_{name}": value for name, value in result.terms.items() if len(result.terms) > 1}
        parts.append(seen.metrics)
    return flatten(merge(*parts)) | last


class Observed:
    """Collects the metrics of an update's batches; meets `step.Observer`."""

    def __init__(self, trainer: Trainer, *, with_gap: bool) -> None:
        self.method, self.with_gap = trainer.recipe.method, with_gap
        self.metrics: dict[str, Metric] = {}

    def __call__(self, batch: PackedBatch, scores: TokenScores) -> None:
        tokens = int(batch.trainable_T.sum())
        sums = measure(self.method, batch, scores)
        new: dict[str, Metric] = {name: Mean(value, tokens) for name, value in sums.items()}
        new["clip_share"] = Mean(sums["clipped_low"] + sums["clipped_high"], tokens)
        if self.with_gap and tokens:  # only before the first update are sampler and learner the same weights
            gap_N = gap(batch, scores)
            new |= {"gap_mean": Mean(float(gap_N.sum()), tokens), "gap_max": Max(float(gap_N.max()))}
        self.metrics = merge(self.metrics, new)


def gap_notice(metrics: Mapping[str, float], dtype: torch.dtype) -> str:
    """What a step's distance between sampler and learner calls for; empty where rounding explains it."""
    over = [name for name, limit in GAP_LIMITS.get(dtype, {}).items() if metrics.get(name, 0.0) > limit]
    told = " and ".join(f"{name} {metrics[name]:.2g} (limit {GAP_LIMITS[dtype][name]:g})" for name in over)
    return f"sampler and learner disagree, in nats a token: {told}" if over else ""


def gap(batch: PackedBatch, scores: TokenScores) -> torch.Tensor:
    """Distance in nats of the sampler's and the learner's log-probability, per trainable token."""
    mask_T = batch.trainable_T
    return (scores.logp_T.detach() - batch.streams["logp_sampled"])[mask_T].abs()


def with_scores(trainer: Trainer, groups: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """Adds what must be known before the first update: logp_ref, and logp_old where one rollout serves many updates."""
    recipe = trainer.recipe
    wanted: list[tuple[str, Decoder]] = []
    if trainer.reference is not None and needs_reference(recipe.method):
        wanted.append(("logp_ref", trainer.reference))
    if recipe.updates_per_rollout > 1:
        wanted.append(("logp_old", trainer.decoder))
    out = [list(group) for group in groups]
    for name, decoder in wanted:
        flat = [sample for group in out for sample in group]
        scored = iter(score(trainer, flat, name, decoder))
        out = [[next(scored) for _ in group] for group in out]
    return out


def score(trainer: Trainer, samples: Sequence[Sample], name: str, decoder: Decoder) -> list[Sample]:
    """The samples with a stream `name`: log-probabilities under a decoder, without gradients."""
    recipe, counts, out = trainer.recipe, count(samples), list(samples)
    for which in split(samples, tokens_per_batch=recipe.tokens_per_micro_batch, share_prompts=trainer.share_prompts):
        part = [samples[i] for i in which]
        batch = pack_one(part, counts=counts, share_prompts=trainer.share_prompts)
        with torch.no_grad():
            logp_T = trainer.policy(decoder).scores(batch).logp_T
        for i, values_T in zip(which, unpack(batch, logp_T, part), strict=True):
            out[i] = with_stream(samples[i], name, values_T)
    return out


def slices(groups: Sequence[list[Sample]], number: int) -> Iterator[Sequence[list[Sample]]]:
    """`number` slices of nearly equal length, in order."""
    for k in range(number):
        part = groups[k * len(groups) // number : (k + 1) * len(groups) // number]
        if part:
            yield part


def refuse_stale(groups: Sequence[Group], weights: WeightsRef) -> None:
    """Samples of other weights than those about to learn would be off-policy in silence.  Raises RunError."""
    found = {(c.policy_version, c.weights_hash) for group in groups for c in group.completions}
    if found - {(weights.version, weights.hash)}:
        raise RunError(
            f"samples were drawn by weights {sorted(found)}, and those about to learn are {weights}: "
            "the rollout source must sample with the weights it was handed."
        )


def describe_rollouts(groups: Sequence[Group], chosen: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths and endings of everything sampled in a step."""
    episodes = [episode for group in groups for episode in group.episodes]
    grades = [grade for group in groups for grade in group.grades]
    known = [grade for grade in grades if grade.known]
    lengths = [episode.num_sampled for episode in episodes]
    return {
        "reward": sum(g.score or 0.0 for g in known) / len(known) if known else math.nan,
        "right": sum(g.right for g in known) / len(known) if known else math.nan,
        "length": sum(lengths) / len(lengths),
        "length_max": float(max(lengths)),
        "ended": sum(episode.last.stop == "eos" for episode in episodes) / len(episodes),
        "turns": sum(len(episode.turns) for episode in episodes) / len(episodes),
        "tokens": float(sum(lengths)),
        "unknown": 1 - len(known) / len(grades),
        "groups": float(len(groups)),
        "groups_trained": float(len(chosen)),
    }
