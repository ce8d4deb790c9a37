"""A world of token sequences small enough to list, and a policy over it that is a table of logits.

The table has a row for every prefix at which a token can be drawn, so that it can represent any distribution over the
completions: what holds here exactly is the mathematics of a method, with no network and no sampling noise in the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rung.core.errors import ConfigError
from rung.core.records import Counts, Layout, Origin, PackedBatch, Sample, TokenScores
from rung.core.shapes import Float, Tensor

Reward = Callable[[tuple[int, ...], tuple[int, ...]], float]  # (prompt, completion) -> reward
MAX_TABLE = 1 << 24  # entries of the look-up from prefixes to rows


@dataclass(frozen=True, kw_only=True)
class World:
    """Prompts, and every completion there is.

    A completion ends with the token `eos` (which belongs to it) or after `max_tokens` tokens; eos None: only so.
    """

    vocabulary: int
    max_tokens: int
    prompts: tuple[tuple[int, ...], ...]
    eos: int | None = None

    def completions(self) -> list[tuple[int, ...]]:
        """All of them, each once."""
        ended: list[tuple[int, ...]] = []
        open_: list[tuple[int, ...]] = [()]
        for _ in range(self.max_tokens):
            longer = [(*head, token) for head in open_ for token in range(self.vocabulary)]
            ended += [c for c in longer if c[-1] == self.eos]
            open_ = [c for c in longer if c[-1] != self.eos]
        return ended + open_

    def prefixes(self) -> list[tuple[int, ...]]:
        """All states at which a token is drawn, prompt included."""
        heads = {c[:n] for c in self.completions() for n in range(len(c))}
        return sorted({(*prompt, *head) for prompt in self.prompts for head in heads})

    def sample(self, prompt: tuple[int, ...], completion: tuple[int, ...], *, group_id: int, reward: float) -> Sample:
        """A prompt and a completion as the record that learners use; the completion is trainable."""
        token_ids = torch.tensor([*prompt, *completion])
        origin = torch.tensor([Origin.PROMPT] * len(prompt) + [Origin.SAMPLED] * len(completion))
        return Sample(
            token_ids=token_ids,
            origin=origin,
            trainable=origin == Origin.SAMPLED,
            policy_version=torch.zeros_like(token_ids),
            problem_id=str(prompt),
            group_id=group_id,
            prompt_length=len(prompt),
            reward=reward,
        )


class TablePolicy:
    """Softmax of a table of logits [prefixes, vocabulary], in fp64; meets `rung.core.records.Policy`."""

    def __init__(self, world: World, logits_NV: Float[Tensor, "N V"]) -> None:
        prefixes = world.prefixes()
        if logits_NV.shape != (len(prefixes), world.vocabulary):
            raise ConfigError(
                f"A table for this world needs logits of shape {(len(prefixes), world.vocabulary)}, "
                f"not {tuple(logits_NV.shape)}."
            )
        size = (world.vocabulary + 1) ** max(len(p) for p in prefixes) + 1
        if size > MAX_TABLE:
            raise ConfigError(
                f"A world to enumerate must be small: this one needs {size} entries, {MAX_TABLE} at most."
            )
        self.world = world
        self.logits_NV = logits_NV
        self._row_of = torch.full((size * (world.vocabulary + 1),), -1)
        self._row_of[[self._code(p) for p in prefixes]] = torch.arange(len(prefixes))

    @staticmethod
    def random(world: World, generator: torch.Generator, *, scale: float = 1.0) -> "TablePolicy":
        """Normal logits of standard deviation `scale`."""
        shape = (len(world.prefixes()), world.vocabulary)
        return TablePolicy(world, scale * torch.randn(shape, generator=generator, dtype=torch.float64))

    def scores(self, batch: PackedBatch) -> TokenScores:
        """Log-probability and entropy of every trainable token, zero elsewhere."""
        logp_NV = self.logits_NV.log_softmax(-1)
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        row_T = self._row_of[self._codes(batch)]
        lost_T = batch.trainable_T & (row_T < 0)
        if bool(lost_T.any()):
            raise ConfigError(
                f"Token {int(lost_T.nonzero()[0])} of the batch follows a prefix that is not of this world."
            )
        row_T = row_T.clamp(min=0)
        return TokenScores(
            logp_T=torch.where(batch.trainable_T, logp_NV[row_T, batch.tokens_T], 0),
            entropy_T=torch.where(batch.trainable_T, entropy_N[row_T], 0),
        )

    def logps(self, prompt: tuple[int, ...]) -> list[Tensor]:
        """Of each completion of the world, the log-probabilities of its tokens."""
        samples = [self.world.sample(prompt, c, group_id=0, reward=0.0) for c in self.world.completions()]
        logp_T = self.scores(pack_chains(samples, Counts(tokens=1, sequences=1, groups=1))).logp_T
        parts = logp_T.split([len(sample.token_ids) for sample in samples])
        return [part[len(prompt) :] for part in parts]

    def _code(self, prefix: tuple[int, ...]) -> int:
        code = 0
        for token in prefix:
            code = code * (self.world.vocabulary + 1) + token + 1
        return code

    def _codes(self, batch: PackedBatch) -> Tensor:
        """The code of every token's prefix, read along the layout, level by level."""
        base, parent_T = self.world.vocabulary + 1, batch.layout.parent_T
        before_T = torch.zeros_like(parent_T)
        after_T = batch.tokens_T + 1
        for level in range(1, int(batch.layout.position_T.max()) + 1):
            here_N = (batch.layout.position_T == level).nonzero()[:, 0]
            before_T[here_N] = after_T[parent_T[here_N]]
            after_T[here_N] += base * before_T[here_N]
        return before_T


def pack_chains(samples: list[Sample], counts: Counts, *, group_S: Tensor | None = None) -> PackedBatch:
    """Samples one after another on one axis, without sharing prompts; `group_S` replaces their own group numbers."""
    lengths = torch.tensor([len(s.token_ids) for s in samples])
    end_S, total = lengths.cumsum(0), int(lengths.sum())
    sequence_T = torch.arange(len(samples)).repeat_interleave(lengths)
    index_T = torch.arange(total)
    position_T = index_T - (end_S - lengths)[sequence_T]
    return PackedBatch(
        tokens_T=torch.cat([s.token_ids for s in samples]),
        layout=Layout(torch.where(position_T > 0, index_T - 1, -1), sequence_T, position_T),
        trainable_T=torch.cat([s.trainable for s in samples]),
        sequence_T=sequence_T,
        last_S=end_S - 1,
        group_S=torch.tensor([s.group_id for s in samples]) if group_S is None else group_S,
        streams={name: torch.cat([s.streams[name] for s in samples]) for name in samples[0].streams},
        counts=counts,
    )


def expected_return(policy: TablePolicy, reward: Reward) -> Float[Tensor, ""]:
    """J: the expected reward of a completion, mean over the prompts; differentiable."""
    world, completions = policy.world, policy.world.completions()
    total = policy.logits_NV.new_zeros(())
    for prompt in world.prompts:
        for completion, logp_T in zip(completions, policy.logps(prompt), strict=True):
            total = total + logp_T.sum().exp() * reward(prompt, completion)
    return total / len(world.prompts)


def expected_kl(policy: TablePolicy, reference: TablePolicy) -> Float[Tensor, ""]:
    """KL(policy || reference) of whole completions, mean over the prompts; differentiable."""
    total = policy.logits_NV.new_zeros(())
    for prompt in policy.world.prompts:
        for logp_T, logp_ref_T in zip(policy.logps(prompt), reference.logps(prompt), strict=True):
            total = total + logp_T.sum().exp() * (logp_T.sum() - logp_ref_T.sum())
    return total / len(policy.world.prompts)
