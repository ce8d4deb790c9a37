"""What a decoder remembers of its sequences: key and value rows in preallocated slots.

A forward writes the rows of its new tokens behind the committed ones: the i-th new token of slot s (in the order of the
layout) at row length_S[s] + i.  They are *pending* until `commit` accepts a path of them; the next forward overwrites
what was not accepted.  Where new tokens of an empty slot continue those of another one, the slot gets copies of these
too, before its own: the beginning that several prompts share is computed once.

Dead rows (behind the committed ones) may hold anything, even NaN: what an earlier sequence left.  A path that reads
whole blocks of the cache asks `scrub` to zero them first, because a weight of zero times NaN is NaN.

Lengths and places are counted on the host; what is stored goes to the device with one set of indices a forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rung.core.errors import RequestError
from rung.core.records import Layout
from rung.core.shapes import Float, Int, Tensor

ROW_BLOCK = 64  # rows of a slot exist in multiples of this, so that shapes (and their roundings) rarely change


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the rows of one forward go: index of a token on T, slot, and row there; a shared token has several."""

    state: "KVState"
    index_N: Int[Tensor, "N"]
    slot_N: Int[Tensor, "N"]
    row_N: Int[Tensor, "N"]

    @cached_property
    def there(self) -> tuple[Tensor, Tensor, Tensor]:
        """index_N, slot_N, row_N on the state's device: moved once, for all layers."""
        device = self.state.rows[0].device
        return self.index_N.to(device), self.slot_N.to(device), self.row_N.to(device)

    def write(self, rows: Float[Tensor, "2 S K C d"], kv_T2Kd: Float[Tensor, "T 2 K d"]) -> None:
        """Store one layer's new keys and values."""
        index_N, slot_N, row_N = self.there
        rows[:, slot_N, :, row_N] = kv_T2Kd[index_N]


class KVState:
    """Keys and values, one tensor per layer [2, S, K, C, d], of which only the needed rows exist.

    C is the longest slot rounded up to ROW_BLOCK, at most `capacity`: a decoding step reads all of it, contiguous (a
    slice of longer slots would be copied by every matrix product: 2.4 times the time of attention at 64 slots).
    On other devices all rows exist from the beginning (`settle`).
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.capacity = slots, capacity
        empty = torch.empty(2, slots, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.rows = [empty.clone() for _ in range(layers)]
        self.length_S = torch.zeros(slots, dtype=torch.int64)
        self.pending_S = torch.zeros(slots, dtype=torch.int64)
        self.clean_S = torch.zeros(slots, dtype=torch.int64)  # rows from length_S up to here are known to be finite
        self.settled = False
        if device.type != "cpu":
            self.settle()

    def settle(self) -> None:
        """Have all rows of an empty state from now on, as zeros, where they stay: a recorded step knows addresses, and
        counts on dead rows that are finite (`extend`)."""
        if not self.settled:
            assert not bool(self.length_S.any()), "rows cannot move once they hold something"
            shape = (*self.rows[0].shape[:3], self.capacity, self.rows[0].shape[4])
            self.rows = [rows.new_zeros(shape) for rows in self.rows]
            self.clean_S.fill_(self.capacity)
            self.settled = True

    def place(self, layout: Layout) -> Placement:
        """Announce a forward: its tokens get the rows behind the committed ones, which become pending."""
        index_N, slot_N = _seats(layout)
        count_S = torch.bincount(slot_N, minlength=self.slots)
        needed = int((self.length_S + count_S[: self.slots]).max())
        if len(count_S) > self.slots or needed > self.capacity:
            raise RequestError(
                f"the state has {self.slots} slots of {self.capacity} rows; needed: {len(count_S)} slots of {needed} "
                "rows. Make it larger with new_state(slots, capacity), or ask for fewer or shorter sequences."
            )
        rank_N = torch.zeros_like(slot_N)
        if int(count_S.max()) > 1:
            order_N = torch.argsort(slot_N, stable=True)
            first_S = count_S.cumsum(0) - count_S
            rank_N[order_N] = torch.arange(len(order_N)) - first_S[slot_N[order_N]]
        assert len(slot_N) == int((layout.slot_T >= 0).sum()) or not bool(self.length_S[slot_N].any()), (
            "only an empty slot can continue another one's tokens"
        )
        self._abandon_pending()
        self.pending_S = count_S
        self._resize(min(-(-needed // ROW_BLOCK) * ROW_BLOCK, self.capacity))
        return Placement(self, index_N, slot_N, self.length_S[slot_N] + rank_N)

    def extend(self, slots: int) -> None:
        """The first `slots` slots have one committed row more: a recorded step writes it, behind those they had.

        Nothing is asked of the device and no dead row is scrubbed: who finds something that is not finite in a sample
        gives up a settled state."""
        assert self.settled, "static_step() comes first"
        assert not bool(self.pending_S[:slots].any()), "a step follows what was committed"
        assert int(self.length_S[:slots].max()) < self.capacity, "the caller reserves the rows"
        self.length_S[:slots] += 1

    def scrub(self, slots: int) -> None:
        """Make the dead rows of the first `slots` slots finite; what was scrubbed is not touched again."""
        existing = self.rows[0].shape[3]
        dirty_N = (self.clean_S[:slots] < existing).nonzero()[:, 0]
        start_N = torch.maximum(self.clean_S[dirty_N], self.length_S[dirty_N])
        for start in start_N.unique().tolist():
            of_start_N = dirty_N[start_N == start].to(self.rows[0].device)
            for rows in self.rows:
                rows[:, of_start_N, :, start:] = 0
        self.clean_S[dirty_N] = existing

    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the committed rows of slot sources[i] to slot targets[i]; see `protocols.State`."""
        source_N, target_N = torch.tensor(sources), torch.tensor(targets)
        length_N = self.length_S[source_N]
        longest = int(length_N.max())
        from_N, to_N = (slots_N.to(self.rows[0].device) for slots_N in (source_N, target_N))
        for rows in self.rows:
            rows[:, to_N, :, :longest] = rows[:, from_N, :, :longest]
        self.length_S[target_N] = length_N
        self.pending_S[target_N] = 0
        self.clean_S[target_N] = length_N

    def commit(self, slot_S: Int[Tensor, "S"], path_SN: Int[Tensor, "S N"], count_S: Int[Tensor, "S"]) -> None:
        """Accept the first count_S[s] entries of path_SN[s] of slot slot_S[s]; see `protocols.State`."""
        straight_N = torch.arange(path_SN.shape[1])
        wanted_SN = straight_N < count_S[:, None]
        assert bool((path_SN < self.pending_S[slot_S][:, None])[wanted_SN].all()), "a path names rows never written"
        moved_SN = wanted_SN & (path_SN != straight_N)
        if bool(moved_SN.any()):
            sequence_N, rank_N = moved_SN.nonzero(as_tuple=True)
            slot_N, device = slot_S[sequence_N], self.rows[0].device
            to_N, from_N = self.length_S[slot_N] + rank_N, self.length_S[slot_N] + path_SN[moved_SN]
            slot_N, to_N, from_N = slot_N.to(device), to_N.to(device), from_N.to(device)
            for rows in self.rows:
                rows[:, slot_N, :, to_N] = rows[:, slot_N, :, from_N]
        self.length_S[slot_S] += count_S
        self.pending_S[slot_S] -= count_S
        self._abandon_pending()

    def free(self, slot_S: Int[Tensor, "S"]) -> None:
        """Forget all rows of these slots."""
        self.length_S[slot_S] = 0
        self.pending_S[slot_S] = 0
        self.clean_S[slot_S] = 0

    def _abandon_pending(self) -> None:
        """What is still pending becomes dead, and may not be finite."""
        self.clean_S = torch.where(self.pending_S > 0, torch.minimum(self.clean_S, self.length_S), self.clean_S)
        self.pending_S = torch.zeros_like(self.pending_S)

    def _resize(self, wanted: int) -> None:
        """Grow to `wanted` rows, or shrink where they are at most half of what exists; layer by layer.

        An empty state takes exactly `wanted`, in the memory that it has: shapes, and so roundings, depend on nothing
        that was there before (a resumed run begins with a fresh state)."""
        if self.settled:
            return
        existing = self.rows[0].shape[3]
        if existing != wanted and not bool(self.length_S.any()):
            for rows in self.rows:
                rows.resize_(*rows.shape[:3], wanted, rows.shape[4])
            self.clean_S.zero_()
            return
        if existing // 2 < wanted <= existing:
            return
        kept = min(wanted, existing)
        used = max(self.length_S.nonzero()[:, 0].tolist(), default=-1) + 1
        for layer, rows in enumerate(self.rows):
            fresh = rows.new_zeros(*rows.shape[:3], wanted, rows.shape[4])
            fresh[:, :used, :, :kept] = rows[:, :used, :, :kept]
            self.rows[layer] = fresh
        self.clean_S = torch.where(self.clean_S >= existing, wanted, self.clean_S)  # fresh rows are zeros


def _seats(layout: Layout) -> tuple[Tensor, Tensor]:
    """Which token's rows are wanted in which slot, in the order of each slot's rows."""
    index_N = (layout.slot_T >= 0).nonzero()[:, 0]
    slot_N = layout.slot_T[index_N]
    parent_N = layout.parent_T[index_N]
    across_N = (parent_N >= 0) & (layout.slot_T[parent_N.clamp(min=0)] != slot_N)
    if not bool(across_N.any()):
        return index_N, slot_N
    above, owner = [], []
    parents = layout.parent_T.tolist()
    for parent, slot in zip(parent_N[across_N].tolist(), slot_N[across_N].tolist(), strict=True):
        path = []
        while parent >= 0:
            path.append(parent)
            parent = parents[parent]
        above += path[::-1]
        owner += [slot] * len(path)
    return torch.cat((torch.tensor(above), index_N)), torch.cat((torch.tensor(owner), slot_N))
