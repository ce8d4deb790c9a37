"""From completions to packed micro-batches, and back.

A `Sample` is one flat token stream, of one turn or of several.  `pack` lays samples on one token axis without padding;
with `share_prompts`, what a prompt has in common with the one before it (in a group: all of it) stands there once.
Neither the split into micro-batches nor the sharing is visible to an objective: denominators are counted on the whole
step before it is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rung.core.records import ROOT, Completion, Counts, Layout, Origin, PackedBatch, Sample, Turn
from rung.core.shapes import Float, Tensor


def sample_of(
    prompt_ids: Sequence[int],
    completion: Completion,
    *,
    later: Sequence[Turn] = (),
    problem_id: str,
    group_id: int,
    reward: float,
) -> Sample:
    """A prompt and the answers to it as one stream: sampled tokens, end tokens included, are trainable, and no others.

    later: the second answer and those after it, with what the template and the environment said before each
    """
    parts = [(Turn(completion=completion), tuple(prompt_ids), (Origin.PROMPT,) * len(prompt_ids))]
    parts += [(turn, turn.given_ids, turn.given_origin) for turn in later]
    ids: list[int] = []
    kinds: list[int] = []
    versions: list[int] = []
    logps: list[float] = []
    for turn, given, origin in parts:
        drawn = turn.completion
        ids += [*given, *drawn.token_ids]
        kinds += [*origin, *[Origin.SAMPLED] * len(drawn.token_ids)]
        versions += [drawn.policy_version] * (len(given) + len(drawn.token_ids))
        logps += [*[0.0] * len(given), *drawn.logp_sampled]
    origin_T = torch.tensor(kinds)
    return Sample(
        token_ids=torch.tensor(ids),
        origin=origin_T,
        trainable=origin_T == Origin.SAMPLED,
        policy_version=torch.tensor(versions),
        problem_id=problem_id,
        group_id=group_id,
        prompt_length=len(prompt_ids),
        reward=float(reward),
        streams={"logp_sampled": torch.tensor(logps)},
    )


def count(samples: Sequence[Sample]) -> Counts:
    """The denominators of a step that trains on these samples."""
    return Counts(
        tokens=sum(int(s.trainable.sum()) for s in samples),
        sequences=len(samples),
        groups=len({s.group_id for s in samples}),
    )


def with_stream(sample: Sample, name: str, values_T: Float[Tensor, "T"]) -> Sample:
    """The sample with one more named stream of its own length."""
    if values_T.shape != sample.token_ids.shape:
        raise AssertionError(f"stream {name!r} is not as long as its sample: {tuple(values_T.shape)}")
    return replace(sample, streams={**sample.streams, name: values_T})


def split(samples: Sequence[Sample], *, tokens_per_batch: int, share_prompts: bool = True) -> list[list[int]]:
    """Which samples form which micro-batch, as indices; a sequence is never cut.

    Groups stay together and in order of length, so that the rectangles of attention waste little.  A group larger than
    a micro-batch is spread over several, each with its own copy of the prompt.
    """
    by_group: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_group.setdefault(sample.group_id, []).append(index)
    groups = sorted(by_group.values(), key=lambda group: -max(len(samples[i].token_ids) for i in group))
    parts: list[list[int]] = []
    room = 0
    for group in groups:
        for position, index in enumerate(group):
            length, prompt = len(samples[index].token_ids), samples[index].prompt_length
            cost = length - prompt if share_prompts and position else length
            if not parts or cost > room:
                parts.append([])
                room, cost = tokens_per_batch, length
            parts[-1].append(index)
            room -= cost
    return parts


def pack_one(samples: Sequence[Sample], *, counts: Counts, share_prompts: bool = True) -> PackedBatch:
    """One micro-batch of these samples, in this order; prompts that begin alike are best neighbours."""
    limits = [sample.prompt_length if share_prompts else 0 for sample in samples]
    layout, shared = Layout.trie([sample.token_ids.tolist() for sample in samples], limits)

    def joined(of: Callable[[Sample], Tensor]) -> Tensor:
        return torch.cat([of(sample)[start:] for sample, start in zip(samples, shared, strict=True)])

    def owner(index: int, length: int) -> Tensor:
        return torch.where(torch.arange(length) < limits[index], -1, index)

    lengths = [len(sample.token_ids) for sample in samples]
    return PackedBatch(
        tokens_T=joined(lambda sample: sample.token_ids),
        layout=layout,
        trainable_T=joined(lambda sample: sample.trainable),
        sequence_T=torch.cat([owner(i, length)[shared[i] :] for i, length in enumerate(lengths)]),
        last_S=(torch.tensor(lengths) - torch.tensor(shared)).cumsum(0) - 1,
        group_S=torch.tensor([s.group_id for s in samples]),
        streams={name: joined(lambda sample: sample.streams[name]) for name in samples[0].streams},  # noqa: B023
        counts=counts,
    )


def pack(
    samples: Sequence[Sample], *, counts: Counts, tokens_per_batch: int, share_prompts: bool = True
) -> list[PackedBatch]:
    """The samples as micro-batches of about `tokens_per_batch` tokens (more where one sequence alone is longer)."""
    parts = split(samples, tokens_per_batch=tokens_per_batch, share_prompts=share_prompts)
    return [pack_one([samples[i] for i in part], counts=counts, share_prompts=share_prompts) for part in parts]


def unpack(batch: PackedBatch, values_T: Float[Tensor, "T"], samples: Sequence[Sample]) -> list[Tensor]:
    """Per-token values of a batch as one stream per packed sample, zero where not trainable."""
    out = []
    for index, sample in enumerate(samples):
        values = torch.zeros(len(sample.token_ids), dtype=values_T.dtype)
        values[sample.trainable] = values_T[(batch.sequence_T == index) & batch.trainable_T]
        out.append(values)
    return out


def inputs(batch: PackedBatch) -> tuple[Tensor, Layout, Tensor]:
    """What a decoder must read to score the batch: tokens that some token continues.

    Returns tokens_N, their layout, and row_T: where the hidden state that predicts token t stands among the N rows.
    A sequence's last token is only ever a target, so no row is spent on it.
    """
    parent_T = batch.layout.parent_T
    kept_T = torch.zeros(len(parent_T), dtype=torch.bool)
    kept_T[parent_T[parent_T >= 0]] = True
    number_T = torch.cumsum(kept_T, 0) - 1
    row_T = torch.where(parent_T >= 0, number_T[parent_T.clamp(min=0)], ROOT)
    layout = Layout(row_T[kept_T], batch.layout.slot_T[kept_T], batch.layout.position_T[kept_T])
    return batch.tokens_T[kept_T], layout, row_T
