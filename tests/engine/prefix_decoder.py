"""A decoder whose logits are a hash of the exact tokens before: whatever an engine mixes up shows as other tokens.

Equal prefixes give bit-equal logits in every batch, so that an engine over it must equal a one-token loop exactly.
It also refuses what the protocol forbids: wrong positions, paths never written, more rows than there are.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from rung.core.records import FILLER, ROOT, Layout
from rung.core.shapes import Tensor


class PrefixState:
    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.committed: list[list[int]] = [[] for _ in range(slots)]
        self.pending: list[list[int]] = [[] for _ in range(slots)]

    @property
    def length_S(self) -> Tensor:
        return torch.tensor([len(tokens) for tokens in self.committed])

    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        assert len(set(targets)) == len(targets) == len(sources)
        assert not set(sources) & set(targets), "a slot would be read and written at once"
        for source, target in zip(sources, targets, strict=True):
            assert self.committed[source], "nothing to fork"
            self.committed[target] = list(self.committed[source])

    def commit(self, slot_S: Tensor, path_SN: Tensor, count_S: Tensor) -> None:
        for slot, path, count in zip(slot_S.tolist(), path_SN.tolist(), count_S.tolist(), strict=True):
            self.committed[slot] += [self.pending[slot][index] for index in path[:count]]
            assert len(self.committed[slot]) <= self.capacity
        self.pending = [[] for _ in range(self.slots)]

    def free(self, slot_S: Tensor) -> None:
        for slot in slot_S.tolist():
            self.committed[slot], self.pending[slot] = [], []


class PrefixDecoder:
    branches = True
    logit_softcap = 0.0

    def __init__(self, vocabulary: int = 40, spread: float = 4.0) -> None:
        self.vocabulary, self.spread = vocabulary, spread
        self.forwards: list[list[tuple[int, int]]] = []  # slot and position of every token of every forward
        self.states: list[PrefixState] = []

    @cache  # noqa: B019  (one small decoder per test)
    def logits(self, prefix: tuple[int, ...]) -> Tensor:
        """The next token's logits [V] after these tokens."""
        draw = random.Random(hash(prefix))  # a hash of integers is the same in every process
        return torch.tensor([draw.random() * self.spread for _ in range(self.vocabulary)])

    def forward(self, tokens_T: Tensor, layout: Layout, state: PrefixState) -> Tensor:
        prefixes: list[tuple[int, ...]] = []
        hidden = []
        columns = (tokens_T, layout.parent_T, layout.slot_T, layout.position_T)
        self.forwards.append([(s, p) for s, p in zip(columns[2].tolist(), columns[3].tolist(), strict=True)])
        for token, parent, slot, position in zip(*(column.tolist() for column in columns), strict=True):
            if slot == FILLER:
                prefixes.append(())
                hidden.append(torch.full((self.vocabulary,), torch.nan))  # whoever reads a filler gets NaN
                continue
            before = tuple(state.committed[slot]) if parent == ROOT else prefixes[parent]
            if parent != ROOT and columns[2][parent] != slot:  # continues another slot's tokens, and holds them too
                assert not state.committed[slot]
                assert not state.pending[slot]
                state.pending[slot] = list(before)
            assert position == len(before), f"slot {slot} holds {len(before)} tokens before; position {position} came"
            state.pending[slot].append(token)
            prefixes.append((*before, token))
            hidden.append(self.logits(prefixes[-1]))
        return torch.stack(hidden)

    def head(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND.clone()

    def head_weight(self) -> Tensor:
        return torch.eye(self.vocabulary)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter(())

    def new_state(self, slots: int, capacity: int) -> PrefixState:
        self.states.append(PrefixState(slots, capacity))
        return self.states[-1]
