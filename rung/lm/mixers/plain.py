"""Attention through the dense ancestor mask: holds for every forest, and is the twin that the faster plans equal."""

from dataclasses import dataclass

import torch

from rung.core.records import Layout
from rung.core.shapes import Bool, Float, Int, Tensor
from rung.lm.config import AttentionSpec
from rung.lm.rope import rotary_tables, rotate
from rung.lm.state import Placement


@dataclass(frozen=True, eq=False)
class PlainPlan:
    """Every new token against [committed rows of all slots in the layout, all new tokens].

    old: slot and row of the committed rows; new: where the new rows go; both None without a state
    """

    spec: AttentionSpec
    cos_T1d: Tensor
    sin_T1d: Tensor
    seen_TN: Bool[Tensor, "T N"]
    old: tuple[Tensor, Tensor] | None = None
    new: Placement | None = None

    @staticmethod
    def build(layout: Layout, spec: AttentionSpec, new: Placement | None, like: Tensor) -> "PlainPlan":
        cos_T1d, sin_T1d = rotary_tables(spec, layout.position_T, like)
        seen_TT = layout.ancestors_TT() & _near(layout.position_T, layout.position_T, spec.window)
        if new is None:
            return PlainPlan(spec, cos_T1d, sin_T1d, seen_TT.to(like.device))
        slots = new.slot_N.unique()
        which_N, row_N = (torch.arange(new.state.capacity) < new.state.length_S[slots, None]).nonzero(as_tuple=True)
        slot_N = slots[which_N]
        old_TN = (layout.slot_T[:, None] == slot_N) & _near(layout.position_T, row_N, spec.window)
        seen_TN = torch.cat((old_TN, seen_TT), 1).to(like.device)
        return PlainPlan(spec, cos_T1d, sin_T1d, seen_TN, (slot_N.to(like.device), row_N.to(like.device)), new)

    def attend(self, qkv_TE: Float[Tensor, "T E"], rows: Tensor | None) -> Float[Tensor, "T O"]:
        q_THd, k_TKd, v_TKd = rotated(qkv_TE, self.spec, self.cos_T1d, self.sin_T1d)
        if rows is not None and self.old is not None and self.new is not None:
            self.new.write(rows, torch.stack((k_TKd, v_TKd), 1))
            slot_N, row_N = self.old
            k_TKd = torch.cat((rows[0, slot_N, :, row_N], k_TKd))
            v_TKd = torch.cat((rows[1, slot_N, :, row_N], v_TKd))
        return attend(q_THd, k_TKd, v_TKd, self.seen_TN, self.spec)


def rotated(
    qkv_TE: Float[Tensor, "T E"], spec: AttentionSpec, cos_T1d: Tensor, sin_T1d: Tensor
) -> tuple[Float[Tensor, "T H d"], Float[Tensor, "T K d"], Float[Tensor, "T K d"]]:
    """Queries and keys, turned, and values."""
    qkv_THd = qkv_TE.unflatten(-1, (-1, spec.head_dim))
    last = spec.heads + spec.kv_heads
    turned_THd = rotate(qkv_THd[:, :last], cos_T1d, sin_T1d)
    return turned_THd[:, : spec.heads], turned_THd[:, spec.heads :], qkv_THd[:, last:]


def _near(query_T: Int[Tensor, "T"], key_N: Int[Tensor, "N"], window: int) -> Bool[Tensor, "T N"]:
    """Is a key, by its position, inside a query's window?  (Row r of a slot holds position r.)"""
    distance_TN = query_T[:, None] - key_N
    return distance_TN < window if window else torch.ones_like(distance_TN, dtype=torch.bool)


def attend(
    q_THd: Float[Tensor, "T H d"],
    k_NKd: Float[Tensor, "N K d"],
    v_NKd: Float[Tensor, "N K d"],
    seen_TN: Bool[Tensor, "T N"],
    spec: AttentionSpec,
) -> Float[Tensor, "T O"]:
    """softmax(cap(scale q k)) v over the columns that a row sees; query head h uses key-value head h // (H / K)."""
    tokens, heads, head_dim = q_THd.shape
    q_TKgd = q_THd.unflatten(1, (k_NKd.shape[1], -1))
    score_KgTN = torch.einsum("tkgd,nkd->kgtn", q_TKgd, k_NKd) * spec.score_scale
    if spec.softcap:
        score_KgTN = spec.softcap * (score_KgTN / spec.softcap).tanh()
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    weight_KgTN = score_KgTN.masked_fill(~seen_TN, -torch.inf).softmax(-1, dtype=wide).to(q_THd.dtype)
    return torch.einsum("kgtn,nkd->tkgd", weight_KgTN, v_NKd).reshape(tokens, heads * head_dim)
