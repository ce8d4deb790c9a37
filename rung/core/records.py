"""Nouns made of tensors, small and frozen: the only values that cross a folder border besides `core.words`.

One layout serves everything.  A `Layout` is a forest on one flat token axis: a packed batch is a forest of chains, a
prompt shared by samples (or the beginning shared by prompts) is a node with several children, prefill is a chain, plain
decoding one node, a draft a chain or a tree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch

from rung.core.shapes import Bool, Float, Int, Tensor
from rung.core.words import Stop

FILLER = -1  # slot of a token that exists only to round T up to a bucket: seen by nobody, counted by nobody
ROOT = -1  # parent of a token that continues its slot's committed state, or starts it


@dataclass(frozen=True, eq=False)
class Layout:
    """Who continues whom.

    parent_T:   index on this axis of the token that this one continues; ROOT: it continues the slot's committed rows
    slot_T:     cache slot, or tree number where there is no cache; FILLER for padding
    position_T: absolute position in its sequence (what RoPE and the noise law see)

    A token sees itself, its ancestors, and its slot's committed rows.  Parents come before their children.  A parent
    may be of another slot where both slots are empty: the child's slot then holds its ancestors too.
    All three are int64 of shape [T].
    """

    parent_T: Int[Tensor, "T"]
    slot_T: Int[Tensor, "T"]
    position_T: Int[Tensor, "T"]

    def __len__(self) -> int:
        return self.parent_T.shape[0]

    @staticmethod
    def chain(length: int, *, slot: int = 0, start: int = 0) -> "Layout":
        """One run of `length` tokens at positions start, start + 1, ..."""
        index_T = torch.arange(length)
        return Layout(index_T - 1, torch.full_like(index_T, slot), index_T + start)

    @staticmethod
    def chains(
        lengths: Sequence[int], *, slots: Sequence[int] | None = None, starts: Sequence[int] | None = None
    ) -> "Layout":
        """Several runs one after another; slots default to 0, 1, ... and starts to 0."""
        slots = range(len(lengths)) if slots is None else slots
        starts = [0] * len(lengths) if starts is None else starts
        parts = [Layout.chain(n, slot=s, start=p) for n, s, p in zip(lengths, slots, starts, strict=True)]
        return Layout.concat(parts)

    @staticmethod
    def trie(
        sequences: Sequence[Sequence[int]], limits: Sequence[int], *, slots: Sequence[int] | None = None
    ) -> tuple["Layout", list[int]]:
        """Sequences of at least one token, each continuing the one before it for as far as the two begin alike.

        At most limits[i] tokens of sequence i are shared, and never its last one.  Returns the layout of what is left
        of every sequence, and how many tokens each shares; slots default to 0, 1, ...
        """
        slots = range(len(sequences)) if slots is None else slots
        parent: list[int] = []
        slot: list[int] = []
        position: list[int] = []
        shared: list[int] = []
        before: Sequence[int] = ()
        path: list[int] = []  # where the tokens of `before` stand
        for sequence, limit, own_slot in zip(sequences, limits, slots, strict=True):
            common = _common(before, sequence, min(limit, len(sequence) - 1))
            at, own = len(parent), len(sequence) - common
            parent += [path[common - 1] if common else ROOT, *range(at, at + own - 1)]
            slot += [own_slot] * own
            position += range(common, len(sequence))
            shared.append(common)
            before, path = sequence, [*path[:common], *range(at, at + own)]
        return Layout(torch.tensor(parent), torch.tensor(slot), torch.tensor(position)), shared

    @staticmethod
    def concat(parts: Sequence["Layout"]) -> "Layout":
        """Layouts one after another; parents are shifted, slots are kept."""
        parents, at = [], 0
        for part in parts:
            parents.append(torch.where(part.parent_T >= 0, part.parent_T + at, part.parent_T))
            at += len(part)
        return Layout(
            torch.cat(parents), torch.cat([p.slot_T for p in parts]), torch.cat([p.position_T for p in parts])
        )

    def ancestors_TT(self) -> Bool[Tensor, "T T"]:
        """Dense mask: may row see column among the tokens of this layout?  The plain twin of every attention path."""
        length = len(self)
        seen_TT = torch.zeros(length, length, dtype=torch.bool)
        for row, parent in enumerate(self.parent_T.tolist()):
            if parent >= 0:
                seen_TT[row] = seen_TT[parent]
            seen_TT[row, row] = True  # a filler sees only itself
        return seen_TT


def _common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """With how many equal tokens the two begin, up to a limit."""
    pairs = zip(one[:limit], other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), limit))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.  temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    stop_ids end a sample and belong to it (the end token is kept, and trained on).
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of one prompt.

    token_ids:      what was sampled, end token included; never re-tokenised
    logp_sampled:   log-probability under the distribution really drawn from (after temperature and filters)
    logp_raw:       under the model itself (temperature 1, no filter)
    policy_version: number of optimiser steps behind the weights that drew it
    weights_hash:   fingerprint of those weights
    key:            with the noise law, makes the draw repeatable
    """

    token_ids: tuple[int, ...]
    logp_sampled: tuple[float, ...]
    logp_raw: tuple[float, ...]
    stop: Stop
    policy_version: int
    weights_hash: str
    sampling: Sampling
    key: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer of an episode, and what stands between the answer before it and this one.

    given_ids:    end of the turn before, the environment's words, opening of this answer; () before a first answer
    given_origin: TEMPLATE or TOOL for each
    """

    completion: Completion
    given_ids: tuple[int, ...] = ()
    given_origin: tuple["Origin", ...] = ()


@dataclass(frozen=True, kw_only=True)
class GroupRequest:
    """One prompt and the keys of its samples: the prompt is computed once, then forked.

    matcher: makes, per sample, a function that takes each new token id and says whether a stop string is complete
    """

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]
    sampling: Sampling
    matcher: "Callable[[], Callable[[int], bool]] | None" = None


class Origin(IntEnum):
    """Where a token of a `Sample` came from."""

    PROMPT = 0
    SAMPLED = 1
    TOOL = 2
    TEMPLATE = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One flat token stream, with what is known of every token.

    token_ids, origin, policy_version int64 [T]; trainable bool [T]; streams: named per-token tensors [T] that the
    learner adds (advantage, weight, logp_sampled, logp_old, logp_ref, ...), meaningful where trainable.
    prompt_length: tokens that every sample of the group shares, and the learner may compute once.
    """

    token_ids: Int[Tensor, "T"]
    origin: Int[Tensor, "T"]
    trainable: Bool[Tensor, "T"]
    policy_version: Int[Tensor, "T"]
    problem_id: str
    group_id: int
    prompt_length: int
    reward: float
    streams: Mapping[str, Float[Tensor, "T"]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The denominators of one whole optimiser step, counted before it is split into micro-batches."""

    tokens: int  # trainable tokens
    sequences: int
    groups: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """A micro-batch: sequences on one flat axis, without padding, with the counts of the whole step.

    tokens_T int64; trainable_T bool; sequence_T int64: number of the sequence that a token belongs to alone, -1 for
    filler and for prompts that several sequences may share; last_S: index on T of each sequence's last token; group_S:
    its group.  A trainable token's log-probability is read at its parent.  A sequence stays in one micro-batch.
    """

    tokens_T: Int[Tensor, "T"]
    layout: Layout
    trainable_T: Bool[Tensor, "T"]
    sequence_T: Int[Tensor, "T"]
    last_S: Int[Tensor, "S"]
    group_S: Int[Tensor, "S"]
    streams: Mapping[str, Float[Tensor, "T"]]
    counts: Counts


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log-probability of every token given its ancestors, and entropy of the distribution it was drawn from, in nats.

    fp32 or fp64 [T]; zero where the batch is not trainable.  logp carries the gradient.
    """

    logp_T: Float[Tensor, "T"]
    entropy_T: Float[Tensor, "T"]


@runtime_checkable
class Policy(Protocol):
    """What an objective may ask of a model: a language model, a table and a toy all answer it."""

    def scores(self, batch: PackedBatch) -> TokenScores: ...


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a loss, to be minimised: sum of value where mask, over a denominator of the whole step."""

    value: Float[Tensor, "N"]
    mask: Bool[Tensor, "N"]
    denominator: float


Terms = Mapping[str, Term]
Objective = Callable[[Policy, PackedBatch], Terms]
