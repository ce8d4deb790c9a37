"""A cache never shows: any history of chunks, steps, trees, forks and frees equals a plain pass over each sequence.

Every row that dies is filled with NaN at once, and fresh memory is NaN (conftest): a dead row that is read, shows.
"""

import copy

import numpy as np
import pytest
import torch
from family_twins import KINDS, their_config
from forests import FEATURES, Alone, assert_the_law, fillers, sequences, tiny_decoder, tokens, tree

from rung.core.errors import RequestError
from rung.core.records import Layout
from rung.lm.decoder import Decoder
from rung.lm.weights.families import from_hugging_face

SLOTS, CAPACITY = 4, 150


class History:
    """A state, and what it must hold: the committed tokens of every slot."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64, decoder=None, alone=None) -> None:
        self.rng = np.random.default_rng(seed)
        self.decoder = decoder or tiny_decoder(kv_heads=seed % 3 + 1, dtype=dtype)
        self.state = self.decoder.new_state(SLOTS, CAPACITY)
        self.alone = alone or Alone(copy.deepcopy(self.decoder).double())
        # what a token sees changes its state by some 1
        self.tolerance = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype]
        self.committed: dict[int, list[int]] = {slot: [] for slot in range(SLOTS)}

    def forward(self, layout: Layout, accept: str = "random") -> None:
        """Run a layout, check the law, and commit of every slot a random path, all rows or nothing."""
        token_T = tokens(self.rng, len(layout))
        hidden_TD = self.decoder(torch.tensor(token_T), layout, self.state)
        assert_the_law(hidden_TD, self.alone, layout, token_T, self.committed, self.tolerance)
        if accept != "nothing":
            self.commit(layout, sequences(layout, token_T, self.committed), accept)

    def commit(self, layout: Layout, paths: list[list[int]], accept: str) -> None:
        rows_of = {
            slot: (layout.slot_T == slot).nonzero()[:, 0].tolist() for slot in set(layout.slot_T.tolist()) - {-1}
        }
        before = self.state.length_S.tolist()
        chosen = []
        for slot, rows in rows_of.items():
            path, row = [], rows[-1]
            if accept == "random":
                row = int(self.rng.choice([*rows, rows[-1], -1]))  # -1: nothing is accepted
            if row >= 0:
                self.committed[slot] = paths[row]
            while row >= 0:
                path.insert(0, rows.index(row))
                row = int(layout.parent_T[row])
            chosen.append(path)
        width = max(len(path) for path in chosen) + 2
        path_SN = torch.tensor([path + [99] * (width - len(path)) for path in chosen])  # 99: not to be read
        self.state.commit(torch.tensor(list(rows_of)), path_SN, torch.tensor([len(path) for path in chosen]))
        assert self.state.length_S.tolist() == [len(self.committed[slot]) for slot in range(SLOTS)]
        for slot, rows in rows_of.items():
            self.kill(slot, len(self.committed[slot]), before[slot] + len(rows))

    def kill(self, slot: int, start: int, stop: int = CAPACITY) -> None:
        for rows in self.state.rows:
            rows[:, slot, :, start:stop] = torch.nan if rows.is_floating_point() else 10**9  # no token has this id

    def fork(self) -> None:
        """Some slots to some others, one source perhaps to many."""
        order = self.rng.permutation(SLOTS).tolist()
        cut = int(self.rng.integers(1, SLOTS))
        targets = order[cut:]
        sources = self.rng.choice(order[:cut], len(targets)).tolist()
        self.state.fork(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self.committed[target] = list(self.committed[source])
            self.kill(target, len(self.committed[target]))

    def free(self, slots: list[int] | None = None) -> None:
        slots = self.rng.permutation(SLOTS)[: self.rng.integers(1, 3)].tolist() if slots is None else slots
        self.state.free(torch.tensor(slots))
        for slot in slots:
            self.committed[slot] = []
            self.kill(slot, 0)

    def step(self) -> None:
        active = int(self.rng.integers(1, SLOTS + 1))
        starts = [len(self.committed[slot]) for slot in range(active)]
        layout = Layout.chains([1] * active, starts=starts)
        self.forward(Layout.concat([layout, fillers(8 - active)]) if self.rng.random() < 0.7 else layout)

    def chunks(self) -> None:
        slots = self.rng.permutation(SLOTS)[: self.rng.integers(1, SLOTS + 1)].tolist()
        lengths = self.rng.integers(1, 9, size=len(slots)).tolist()
        starts = [len(self.committed[slot]) for slot in slots]
        self.forward(Layout.concat([Layout.chains(lengths, slots=slots, starts=starts), fillers(2)]))

    def trees(self) -> None:
        slots = self.rng.permutation(SLOTS)[: self.rng.integers(1, SLOTS + 1)].tolist()
        sizes = self.rng.integers(1, 9, size=len(slots)).tolist()
        parts = [tree(self.rng, n, slot=s, start=len(self.committed[s])) for s, n in zip(slots, sizes, strict=True)]
        self.forward(Layout.concat(parts))

    def prompts(self) -> None:
        """Prompts that begin alike, in slots that are empty: what they share is computed in one of them."""
        slots = self.rng.permutation(SLOTS)[: self.rng.integers(1, SLOTS + 1)].tolist()
        self.free(slots)
        beginning = tokens(self.rng, 8)
        prompts = [[*beginning[: self.rng.integers(9)], *tokens(self.rng, self.rng.integers(1, 5))] for _ in slots]
        lengths = [len(prompt) for prompt in prompts]
        trie, shared = Layout.trie(prompts, lengths, slots=slots)
        layout = Layout.concat([trie, fillers(3)])
        token_T = [token for prompt, start in zip(prompts, shared, strict=True) for token in prompt[start:]] + [0] * 3
        hidden_TD = self.decoder(torch.tensor(token_T), layout, self.state)
        assert_the_law(hidden_TD, self.alone, layout, token_T, self.committed, self.tolerance)
        self.state.commit(torch.tensor(slots), torch.arange(max(lengths)).expand(len(slots), -1), torch.tensor(lengths))
        for slot, prompt in zip(slots, prompts, strict=True):
            self.committed[slot] = prompt
            self.kill(slot, len(prompt))

    def happen(self) -> None:
        if max(map(len, self.committed.values())) > CAPACITY - 10:
            self.free()
            return
        kinds = [self.step, self.step, self.step, self.chunks, self.trees, self.fork, self.free, self.prompts]
        self.rng.choice(kinds)()


@pytest.mark.parametrize("seed", range(12))
def test_no_history_of_a_state_shows_in_a_hidden_state(seed):
    history = History(seed)
    for _ in range(25):
        history.happen()


@pytest.mark.parametrize("feature", FEATURES)
def test_no_history_shows_with_any_feature(feature):
    history = History(3, decoder=tiny_decoder(kv_heads=3, feature=feature))
    history.forward(Layout.chains([9, 2]), accept="all")
    for _ in range(25):
        history.happen()


@pytest.mark.parametrize("kind", KINDS)
def test_no_history_shows_in_any_family(kind):
    """Chunks, steps, trees and forks of several slots, accepted in part or not at all, on a model of every family."""
    config = from_hugging_face(their_config(kind).to_dict(), where="here")
    decoder = Decoder(config, torch.float64).init_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(15 if parameter.dim() > 1 else 1)  # of order one: what a token sees must show
    history = History(len(kind), decoder=decoder)
    history.forward(Layout.chains([9, 2]), accept="all")
    for _ in range(15):
        history.happen()


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_no_history_shows_in_bf16_by_more_than_rounding(seed):
    """In inference mode, so that a step runs through the kernels of `fused.py` where there are such."""
    history = History(seed, torch.bfloat16)
    history.forward(Layout.chains([60, 62, 3]), accept="all")
    for _ in range(25):
        history.happen()


@pytest.mark.parametrize("feature", FEATURES)
@torch.inference_mode()
def test_no_history_shows_in_bf16_with_any_feature(feature):
    """A step of one row goes through the kernels where they serve, and only there."""
    history = History(0, torch.bfloat16, tiny_decoder(3, torch.bfloat16, feature))
    for done in range(9):
        history.forward(Layout.chain(1, start=done), accept="all")
    for _ in range(5):
        history.happen()


@pytest.mark.parametrize("prompt", [62, CAPACITY - 4])
def test_steps_cross_the_borders_of_the_row_buckets(prompt):
    """From row 62 to row 66, and up to a capacity that is no multiple of a bucket."""
    history = History(0)
    history.forward(Layout.chains([prompt, 3]), accept="all")
    for done in range(4):
        history.forward(Layout.chains([1, 1], starts=[prompt + done, 3 + done]), accept="all")
    assert history.state.length_S.tolist() == [prompt + 4, 7, 0, 0]


def test_only_the_needed_rows_exist_and_the_law_holds_while_they_grow_and_shrink():
    history = History(4)
    sizes = []
    for prompt in (3, 130, 5, 60, 130, 100):
        history.forward(Layout.chains([prompt, 2]), accept="all")
        for done in range(3):
            history.forward(Layout.chains([1, 1], starts=[prompt + done, 2 + done]), accept="all")
        sizes.append(history.state.rows[0].shape[3])
        history.state.free(torch.arange(2))
        history.committed |= {0: [], 1: []}
        history.kill(0, 0), history.kill(1, 0)
    # 192 rows would be more than the capacity; an empty state takes what is needed, whatever was there before
    assert sizes == [64, CAPACITY, 64, 64, CAPACITY, 128]


def test_a_sequence_that_overflowed_leaves_nothing_in_its_slot():
    """Its keys and values became NaN, it was freed: the next one in its slot and its neighbour are clean."""
    history = History(1)
    history.forward(Layout.chains([9, 70]), accept="all")
    history.kill(0, 0, 9)
    history.state.free(torch.tensor([0]))
    history.committed[0] = []
    for start in range(3):
        history.forward(Layout.chains([1, 1], starts=[start, 70 + start]), accept="all")


def test_what_is_not_committed_may_be_taken_again():
    history = History(2)
    for _ in range(3):
        history.forward(Layout.chains([1, 1]), accept="nothing")
        history.forward(Layout.chains([3, 2]), accept="nothing")
    assert history.state.length_S.tolist() == [0] * SLOTS


def test_a_state_that_is_too_small_is_refused_with_its_numbers():
    decoder = tiny_decoder()
    state = decoder.new_state(slots=2, capacity=5)
    with pytest.raises(RequestError, match="2 slots of 5 rows; needed: 2 slots of 6 rows"):
        decoder(torch.zeros(6, dtype=torch.int64), Layout.chain(6), state)
    with pytest.raises(RequestError, match="needed: 3 slots"):
        decoder(torch.zeros(2, dtype=torch.int64), Layout.chain(2, slot=2), state)
    assert state.length_S.tolist() == [0, 0]


def test_committing_rows_that_were_never_written_is_our_own_error():
    decoder = tiny_decoder()
    state = decoder.new_state(slots=2, capacity=5)
    decoder(torch.zeros(2, dtype=torch.int64), Layout.chain(2), state)
    with pytest.raises(AssertionError, match="never written"):
        state.commit(torch.tensor([0]), torch.tensor([[0, 1, 2]]), torch.tensor([3]))


def test_a_slot_that_holds_rows_cannot_continue_the_tokens_of_another():
    decoder = tiny_decoder()
    state = decoder.new_state(slots=2, capacity=5)
    decoder(torch.zeros(1, dtype=torch.int64), Layout.chain(1, slot=1), state)
    state.commit(torch.tensor([1]), torch.tensor([[0]]), torch.tensor([1]))
    trie, _ = Layout.trie([[1, 2], [1, 3]], [2, 2])
    with pytest.raises(AssertionError, match="only an empty slot"):
        decoder(torch.zeros(3, dtype=torch.int64), trie, state)


def test_nothing_is_differentiated_through_a_state():
    decoder = tiny_decoder()
    hidden_TD = decoder(torch.zeros(2, dtype=torch.int64), Layout.chain(2), decoder.new_state(1, 5))
    assert not hidden_TD.requires_grad
