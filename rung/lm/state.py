"""What a decoder remembers of its sequences: key and value rows in preallocated slots.

A forward writes the rows of its new tokens behind the committed ones: the i-th new token of slot s (in the order of the
layout) at row length_S[s] + i.  They are *pending* until `commit` accepts a path of them; the next forward overwrites
what was not accepted.
"""

from collections.abc import Sequence

import torch

from rung.core.errors import RequestError
from rung.core.records import Layout
from rung.core.shapes import Int, Tensor


class KVState:
    """Keys and values of every layer in one tensor `rows` [L, 2, S, K, C, d]; lengths live on the CPU."""

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
        self.rows = torch.zeros(layers, 2, slots, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.length_S = torch.zeros(slots, dtype=torch.int64)
        self.pending_S = torch.zeros(slots, dtype=torch.int64)

    def place(self, layout: Layout) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"], Int[Tensor, "N"]]:
        """Announce a forward: the indices on T of its tokens without filler, their slots, and the rows they get."""
        index_N = (layout.slot_T >= 0).nonzero()[:, 0]
        slot_N = layout.slot_T[index_N]
        order_N = torch.argsort(slot_N, stable=True)
        count_S = torch.bincount(slot_N, minlength=self.slots)
        if len(count_S) > self.slots or bool((self.length_S + count_S > self.capacity).any()):
            longest = int((self.length_S + count_S[: self.slots]).max())
            raise RequestError(
                f"the state has {self.slots} slots of {self.capacity} rows; needed: slot {int(slot_N.max())} and "
                f"{longest} rows. Make it larger with new_state(slots, capacity), or shorten the request."
            )
        first_S = count_S.cumsum(0) - count_S
        rank_N = torch.empty_like(order_N)
        rank_N[order_N] = torch.arange(len(order_N)) - first_S[slot_N[order_N]]
        self.pending_S = count_S
        return index_N, slot_N, self.length_S[slot_N] + rank_N

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Copy the committed rows of slot `source` to the slots `targets`."""
        length = int(self.length_S[source])
        self.rows[:, :, list(targets), :, :length] = self.rows[:, :, [source], :, :length]
        self.length_S[list(targets)] = length
        self.pending_S[list(targets)] = 0

    def commit(self, slot_S: Int[Tensor, "S"], path_SN: Int[Tensor, "S N"], count_S: Int[Tensor, "S"]) -> None:
        """Accept the first count_S[s] entries of path_SN[s] of slot slot_S[s]; see `protocols.State`."""
        wanted_SN = torch.arange(path_SN.shape[1]) < count_S[:, None]
        assert bool((path_SN < self.pending_S[slot_S][:, None])[wanted_SN].all()), "a path names rows never written"
        moved_SN = wanted_SN & (path_SN != torch.arange(path_SN.shape[1]))
        if bool(moved_SN.any()):
            sequence_N, rank_N = moved_SN.nonzero(as_tuple=True)
            slot_N = slot_S[sequence_N]
            start_N = self.length_S[slot_N]
            self.rows[:, :, slot_N, :, start_N + rank_N] = self.rows[:, :, slot_N, :, start_N + path_SN[moved_SN]]
        self.length_S[slot_S] += count_S
        self.pending_S[slot_S] = 0

    def free(self, slot_S: Int[Tensor, "S"]) -> None:
        """Forget all rows of these slots."""
        self.length_S[slot_S] = 0
        self.pending_S[slot_S] = 0
