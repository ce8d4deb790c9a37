"""Softmax attention over a layout.  One plan per forward, shared by all layers, holds what depends on tokens alone.

The plain plan builds the dense ancestor mask and holds for every forest; it is the twin that faster plans equal.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import skip_init

from rung.core.records import Layout
from rung.core.shapes import Bool, Float, Tensor
from rung.lm.config import AttentionSpec
from rung.lm.rope import rotary_tables, rotate
from rung.lm.state import KVState


@dataclass(frozen=True, eq=False)
class PlainPlan:
    """Any forest, with or without state: every new token against [committed rows of all its slots, all new tokens]."""

    cos_T1d: Tensor
    sin_T1d: Tensor
    seen_TN: Bool[Tensor, "T N"]
    old: tuple[Tensor, Tensor] | None  # slot and row of the committed rows
    new: tuple[Tensor, Tensor, Tensor] | None  # index on T, slot and row of the rows to be written

    @staticmethod
    def build(layout: Layout, spec: AttentionSpec, state: KVState | None, dtype: torch.dtype) -> "PlainPlan":
        cos_T1d, sin_T1d = rotary_tables(spec.rope, spec.head_dim, layout.position_T, dtype)
        seen_TT = layout.ancestors_TT()
        if state is None:
            return PlainPlan(cos_T1d, sin_T1d, seen_TT, None, None)
        new = state.place(layout)
        slots = new[1].unique()
        row_SC = torch.arange(state.capacity) < state.length_S[slots][:, None]
        which_N, row_N = row_SC.nonzero(as_tuple=True)
        slot_N = slots[which_N]
        seen_TN = torch.cat((layout.slot_T[:, None] == slot_N, seen_TT), 1)
        return PlainPlan(cos_T1d, sin_T1d, seen_TN, (slot_N, row_N), new)

    def attend(self, qkv_THd: Tensor, heads: int, kv_heads: int, rows: Tensor | None) -> Float[Tensor, "T H*d"]:
        turned_THd = rotate(qkv_THd[:, : heads + kv_heads], self.cos_T1d, self.sin_T1d)
        q_THd, k_TKd, v_TKd = turned_THd[:, :heads], turned_THd[:, heads:], qkv_THd[:, heads + kv_heads :]
        if rows is not None and self.old is not None and self.new is not None:
            index_N, slot_N, row_N = self.new
            rows[0, slot_N, :, row_N] = k_TKd[index_N]
            rows[1, slot_N, :, row_N] = v_TKd[index_N]
            slot_N, row_N = self.old
            k_TKd = torch.cat((rows[0, slot_N, :, row_N], k_TKd))
            v_TKd = torch.cat((rows[1, slot_N, :, row_N], v_TKd))
        return attend_plain(q_THd, k_TKd, v_TKd, self.seen_TN)


def attend_plain(
    q_THd: Float[Tensor, "T H d"], k_NKd: Float[Tensor, "N K d"], v_NKd: Float[Tensor, "N K d"], seen_TN: Tensor
) -> Float[Tensor, "T H*d"]:
    """softmax(q k / sqrt(d)) v over the columns that a row sees; query head h uses key-value head h // (H / K)."""
    tokens, heads, head_dim = q_THd.shape
    q_TKgd = q_THd.unflatten(1, (k_NKd.shape[1], -1))
    score_KgTN = torch.einsum("tkgd,nkd->kgtn", q_TKgd, k_NKd) * head_dim**-0.5
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    weight_KgTN = score_KgTN.masked_fill(~seen_TN, -torch.inf).softmax(-1, dtype=wide).to(q_THd.dtype)
    return torch.einsum("kgtn,nkd->tkgd", weight_KgTN, v_NKd).reshape(tokens, heads * head_dim)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; q, k and v are one matrix, rows in that order.  [Vaswani 2017]"""

    branches = True

    def __init__(self, spec: AttentionSpec, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        inner, outer = (spec.heads + 2 * spec.kv_heads) * spec.head_dim, spec.heads * spec.head_dim
        self.qkv = skip_init(nn.Linear, width, inner, bias=spec.bias, dtype=dtype, device=device)
        self.out = skip_init(nn.Linear, outer, width, bias=spec.out_bias, dtype=dtype, device=device)

    def plan(self, layout: Layout, state: KVState | None) -> PlainPlan:
        """What all layers of this spec share in one forward."""
        return PlainPlan.build(layout, self.spec, state, self.qkv.weight.dtype)

    def forward(self, x_TD: Float[Tensor, "T D"], plan: PlainPlan, rows: Tensor | None) -> Float[Tensor, "T D"]:
        qkv_THd = self.qkv(x_TD).unflatten(-1, (-1, self.spec.head_dim))
        return self.out(plan.attend(qkv_THd, self.spec.heads, self.spec.kv_heads, rows))
