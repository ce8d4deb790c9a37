"""A causal language model made elsewhere, as a `protocols.ModelDecoder`.

The model is asked for the hidden states of plain sequences.  A layout is unfolded into one sequence a leaf, and every
token's state is read in the first sequence that holds it.  Sequences are padded on the right without a mask: a causal
model's token sees nothing behind it.  What is shared is computed again for every leaf, which is slower than a family of
ours, and no less exact.

A state holds the keys and values of every token where the model keeps just these; else the tokens themselves, and each
sequence is computed again from its beginning, which is right for any model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rung.core.records import FILLER, ROOT, Layout
from rung.core.shapes import Float, Int, Tensor
from rung.lm.protocols import Footprint
from rung.lm.state import KVState, Placement
from rung.objectives.logprobs import softcapped

ENDLESS = 1 << 30  # positions of a model whose config names no limit (recurrent ones)
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "context_length")  # names of a limit
BATCH_TOKENS = 8192  # padded tokens of one forward pass; a longer sequence goes alone
ALIKE = 0.75  # sequences of one pass are at least this share of its longest: a quarter of padding at most


@dataclass(frozen=True, eq=False)
class Unfolded:
    """A layout as sequences, one a leaf.

    paths: indices on T, root first; slots: of each leaf; row_T, column_T: where each token is read (a filler: 0, 0)
    """

    paths: Sequence[Sequence[int]]
    slots: Sequence[int]
    row_T: Int[Tensor, "T"]
    column_T: Int[Tensor, "T"]

    @staticmethod
    def of(layout: Layout) -> "Unfolded":
        parents, slots = layout.parent_T.tolist(), layout.slot_T.tolist()
        paths: list[list[int]] = []
        seen: dict[int, tuple[int, int]] = {}
        for leaf in sorted(set(range(len(parents))) - set(parents)):
            if slots[leaf] == FILLER:
                continue
            path, token = [], leaf
            while token != ROOT:
                path.append(token)
                token = parents[token]
            path.reverse()
            for column, token in enumerate(path):
                seen.setdefault(token, (len(paths), column))
            paths.append(path)
        places = torch.tensor([seen.get(token, (0, 0)) for token in range(len(parents))]).reshape(-1, 2)
        return Unfolded(paths, [slots[path[-1]] for path in paths], places[:, 0], places[:, 1])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a state keeps of one token: keys and values of every layer, or the token itself (the default).

    cache: makes an empty cache of the model's own kind, which keeps what it is given; None: tokens are kept
    """

    layers: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    cache: Callable[[], Any] | None = None


TOKENS = Rows()


class ForeignDecoder(nn.Module):
    """A causal language model of `transformers`, or what has its attributes; meets `protocols.ModelDecoder`.

    scale: the model multiplies its logits by it, and this decoder its hidden states.  A bias of the head becomes a
    column of `head_weight()`, and the hidden states end in a 1.  logit_softcap: see `protocols.Decoder`.
    """

    branches = False  # trees are computed, but nothing is gained by sharing: give chains

    def __init__(self, model: Any, *, scale: float = 1.0, logit_softcap: float = 0.0, rows: Rows = TOKENS) -> None:
        super().__init__()
        self.model, self.scale, self.logit_softcap, self.rows = model, scale, logit_softcap, rows
        self.max_positions = _max_positions(model.config.get_text_config(decoder=True))

    def forward(self, tokens_T: Int[Tensor, "T"], layout: Layout, state: KVState | None = None) -> Float[Tensor, "T D"]:
        """Hidden states after the final norm, in the compute dtype; a filler's are zero.

        With a state nothing is differentiated, and the new rows stay pending until `state.commit`."""
        unfolded, real_T = Unfolded.of(layout), layout.slot_T != FILLER
        new = None if state is None else state.place(layout)
        start_R = torch.zeros(len(unfolded.slots)).long() if state is None else state.length_S[unfolded.slots]
        counted_T = start_R[unfolded.row_T] + unfolded.column_T
        assert bool((counted_T == layout.position_T)[real_T].all()), "positions count a sequence's tokens from 0"
        if new is None:
            hidden_TD = self._recomputed(tokens_T, unfolded, None)
        else:
            with torch.no_grad():
                through = self._recomputed if self.rows.cache is None else self._continued
                hidden_TD = through(tokens_T, unfolded, new)
        return torch.where(real_T.to(hidden_TD.device)[:, None], hidden_TD, 0.0)

    def head(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in the compute dtype."""
        logits_NV = F.linear(hidden_ND, self.head_weight())
        return softcapped(logits_NV, self.logit_softcap) if self.logit_softcap else logits_NV

    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's matrix, its bias the last column where it has one."""
        head = self.model.get_output_embeddings()
        return head.weight if head.bias is None else torch.cat((head.weight, head.bias[:, None]), 1)

    def new_state(self, slots: int, capacity: int) -> KVState:
        """An empty state; what a row of it is: `Rows`."""
        kept = self.rows
        return KVState(
            layers=kept.layers,
            slots=slots,
            kv_heads=kept.kv_heads,
            capacity=capacity,
            head_dim=kept.head_dim,
            dtype=torch.int64 if kept.cache is None else self.model.dtype,
            device=self.model.device,
        )

    def footprint(self) -> Footprint:
        """Counted by config and shapes.  Activations: what goes into and out of every matrix, and half as much for what
        stands between them (too little where attention is not fused, and for recurrent models)."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None) or 0
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        head = self.model.get_output_embeddings().weight
        ends = {id(head), id(self.model.get_input_embeddings().weight)}
        matrices = [p for p in self.parameters() if p.ndim > 1 and id(p) not in ends]
        experts = getattr(config, "num_experts_per_tok", None) or 1  # theirs are one tensor of three dimensions
        return Footprint(
            parameters=sum(p.numel() for p in self.parameters()),
            cached=2 * 2 * config.num_hidden_layers * kv_heads * head_dim,  # they are handed over as a copy
            activations=3 * sum(sum(p.shape[-2:]) * (experts if p.ndim > 2 else 1) for p in matrices) // 2,
            blocks=config.num_hidden_layers,
            vocab_size=head.shape[0],
            width=head.shape[1],
        )

    def _recomputed(self, tokens_T: Tensor, unfolded: Unfolded, new: Placement | None) -> Tensor:
        """Every sequence from its beginning: the tokens committed in its slot, and the new ones."""
        before: list[list[int]] = [[] for _ in unfolded.paths]
        if new is not None:
            state = new.state
            state.rows[0][:, new.slot_N, 0, new.row_N, 0] = tokens_T[new.index_N]
            before = [state.rows[0][0, s, 0, : state.length_S[s], 0].tolist() for s in unfolded.slots]
        tokens = tokens_T.tolist()
        sequences = [[*b, *(tokens[i] for i in path)] for b, path in zip(before, unfolded.paths, strict=True)]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        start_R = lengths.cumsum(0) - lengths + torch.tensor([len(b) for b in before])
        return self._hidden(sequences)[(start_R[unfolded.row_T] + unfolded.column_T).to(tokens_T.device)]

    def _hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of sequences that start at position 0, one after another without padding."""
        found: dict[int, Tensor] = {}
        for batch in _batches([len(sequence) for sequence in sequences]):
            longest = len(sequences[batch[0]])
            padded = [[*sequences[i], *[0] * (longest - len(sequences[i]))] for i in batch]
            hidden_RND = self.body(torch.tensor(padded, device=self.model.device))
            found |= {i: hidden_RND[row, : len(sequences[i])] for row, i in enumerate(batch)}
        return torch.cat([found[i] for i in range(len(sequences))])

    def _continued(self, tokens_T: Tensor, unfolded: Unfolded, new: Placement) -> Tensor:
        """New tokens alone, behind the keys and values of their slots: each row's own, a gap, the new ones."""
        state, slot_R = new.state, torch.tensor(unfolded.slots)
        length_R1, count_R1 = state.length_S[slot_R, None], torch.tensor([[len(path)] for path in unfolded.paths])
        gap_ends, longest = int(length_R1.max()), int(count_R1.max())
        assert self.rows.cache is not None, "a state of keys and values comes with a cache"
        cache, device = self.rows.cache(), tokens_T.device
        dead_RC = torch.arange(gap_ends) >= length_R1  # may hold anything, and zero times NaN is NaN
        for layer, rows in enumerate(state.rows if gap_ends else ()):
            past_2RKCd = rows[:, slot_R.to(device), :, :gap_ends]  # a copy
            past_2RKCd.masked_fill_(dead_RC[None, :, None, :, None].to(device), 0.0)
            cache.update(past_2RKCd[0], past_2RKCd[1], layer)
        path_RN = torch.tensor([[*path, *[path[-1]] * (longest - len(path))] for path in unfolded.paths])
        column_N = torch.arange(longest)
        seen_RC = torch.cat((~dead_RC, column_N < count_R1), 1)
        hidden_RND = self.body(
            tokens_T[path_RN.to(device)],
            attention_mask=seen_RC.long().to(device),
            # a position of padding must exist too
            position_ids=(length_R1 + torch.minimum(column_N, count_R1 - 1)).to(device),
            past_key_values=cache,
            use_cache=True,
        )
        row_T, column_T = unfolded.row_T.to(device), unfolded.column_T.to(device)
        for rows, kept in zip(state.rows, cache.layers, strict=True):
            keys_TKd, values_TKd = (x[row_T, :, gap_ends + column_T] for x in (kept.keys, kept.values))
            new.write(rows, torch.stack((keys_TKd, values_TKd), 1).to(rows.dtype))
        return hidden_RND[row_T, column_T]

    def body(self, ids_RN: Tensor, *, use_cache: bool = False, **more: Any) -> Tensor:
        """Their model up to the head [R, N, D], as `head` wants it."""
        hidden_RND = self.model.base_model(input_ids=ids_RN, use_cache=use_cache, **more).last_hidden_state
        hidden_RND = hidden_RND if self.scale == 1.0 else hidden_RND * self.scale
        if self.model.get_output_embeddings().bias is None:
            return hidden_RND
        return torch.cat((hidden_RND, torch.ones_like(hidden_RND[..., :1])), -1)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Sequences that may be padded to one length, longest first; of similar length, and not too many."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (lengths[index] < ALIKE * longest or (len(batch) + 1) * longest > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _max_positions(config: Any) -> int:
    """The longest sequence it is meant for; of a RoPE scaling that follows the batch's length, the trained one."""
    named = [value for name in LENGTHS if type(value := getattr(config, name, None)) is int and value > 0]
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") in ("dynamic", "longrope") and type(original) is int:
        return original
    return named[0] if named else ENDLESS
