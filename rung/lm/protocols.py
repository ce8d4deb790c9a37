"""What engine and learner may ask of a decoder, and a decoder of its mixers.

A decoder works on a flat token axis described by a `Layout`.  With a `State`, new tokens see their slot's committed
rows and their ancestors among the new tokens; their own rows are *pending* until `commit` accepts a path of them.  A
key-value cache could roll back by leaving dead rows, a recurrent mixer could not: hence `commit` from the first day.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from rung.core.records import Layout
from rung.core.shapes import Float, Int, Tensor


@runtime_checkable
class State(Protocol):
    """Cached rows of `slots` sequences, up to `capacity` rows each.  Slots are preallocated."""

    slots: int
    capacity: int
    length_S: Int[Tensor, "S"]  # committed rows of every slot; the next token's position is its slot's length

    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the committed rows of slot sources[i] to slot targets[i], all at once (a group's prompt, computed once;
        slots moved).  A target is named once, and what it held is not read."""

    def commit(self, slot_S: Int[Tensor, "S"], path_SN: Int[Tensor, "S N"], count_S: Int[Tensor, "S"]) -> None:
        """Accept pending rows of the last forward: of slot s, the count_S[s] first entries of path_SN[s], which number
        the slot's new tokens in the order of the layout (0 is its first).  All other pending rows are forgotten."""

    def free(self, slot_S: Int[Tensor, "S"]) -> None:
        """Forget all rows of these slots."""


@runtime_checkable
class Mixer(Protocol):
    """Moves information between tokens.  `branches` False (recurrent): accepts chains only."""

    branches: bool

    def plan(self, layout: Layout, new: Any) -> Any:
        """What all layers of one spec share in a forward (masks, indices, rotations); `new`: where the state puts the
        new tokens' rows, None without a state."""

    def forward(self, x_TD: Float[Tensor, "T D"], plan: Any, rows: Tensor | None) -> Float[Tensor, "T D"]:
        """A token sees its ancestors and its slot's committed rows; `rows` is this layer's part of the state."""


@runtime_checkable
class Decoder(Protocol):
    """Tokens in, hidden states out; the head is apart, because most rows never need it."""

    branches: bool
    logit_softcap: float  # c: logits z become c * tanh(z / c); 0 leaves them

    def forward(self, tokens_T: Int[Tensor, "T"], layout: Layout, state: Any = None) -> Float[Tensor, "T D"]:
        """Hidden states after the final norm, in the compute dtype.  `state` is one of this decoder's own."""

    def head(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in the compute dtype; equal to hidden_ND @ head_weight().T, soft-capped where the decoder is."""

    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's matrix (the embedding itself where the two are tied)."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights."""

    def new_state(self, slots: int, capacity: int) -> State:
        """An empty state in the compute dtype."""


@runtime_checkable
class StaticStep(Protocol):
    """Hidden states of one new token for each of the slots 0 .. R - 1; the same operations on the same tensors whatever
    the numbers in them are, and no question to the device: what CUDA can record."""

    def __call__(
        self, token_R: Int[Tensor, "R"], slot_R: Int[Tensor, "R"], position_R: Int[Tensor, "R"], rows: int
    ) -> Float[Tensor, "R D"]:
        """All three on the device.  A filler has a slot behind the first R that no sample uses, and position 0; rows:
        how many of each slot are read, more than any position."""


@runtime_checkable
class SettledState(State, Protocol):
    """A state whose rows stay where they are, and are finite as long as what was computed is."""

    def extend(self, slots: int) -> None:
        """Commit, of each of the first `slots` slots, the row that a static step writes."""


@runtime_checkable
class StaticDecoder(Decoder, Protocol):
    """A decoder whose step may be recorded.  Its weights then change in place only."""

    def new_state(self, slots: int, capacity: int) -> SettledState:
        """An empty state in the compute dtype."""

    def static_step(self, state: Any) -> StaticStep:
        """Its step on this empty state, whose rows are settled now."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a decoder holds, in numbers (not bytes).

    parameters: its weights; cached: what a state keeps of one token; activations: what one token leaves behind in a
    forward pass for its backward pass, and in how many blocks of a kind; vocab_size, width: of the head
    """

    parameters: int
    cached: int
    activations: int
    blocks: int
    vocab_size: int
    width: int


@runtime_checkable
class ModelDecoder(Decoder, Protocol):
    """The decoder of a whole model: it has a length, and names for its weights.

    max_positions: the longest sequence it is meant for
    """

    max_positions: int

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights by name, each once."""

    def footprint(self) -> Footprint:
        """Counted from its shapes alone, so that a decoder without weights (device `meta`) answers too."""
