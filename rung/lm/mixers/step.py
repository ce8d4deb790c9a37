"""Attention of a decoding step: one new token for each of the slots 0 .. R-1, fillers behind them.

No row is gathered and no key is repeated: the first R slots of the cache as they lie, the g query heads of a key-value
head folded into the time axis, one additive mask for all layers.
"""

from dataclasses import dataclass

import torch

from rung.core.records import Layout
from rung.core.shapes import Float, Tensor
from rung.lm import fused
from rung.lm.config import AttentionSpec
from rung.lm.rope import rotary_tables, rotate_
from rung.lm.state import Placement


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What all layers of a step share; fillers get zeros, and nothing of theirs is stored."""

    spec: AttentionSpec
    cos_R1d: Tensor
    sin_R1d: Tensor
    new: Placement
    mask_NgC: Tensor  # N = R * K: additive, 0 up to the new token's own row, -inf behind it and outside the window
    plain: bool  # no scale, soft-cap, partial rotation, and no row outside the window: what `fused.attend` computes

    @staticmethod
    def build(layout: Layout, spec: AttentionSpec, new: Placement, like: Tensor) -> "StepPlan":
        cos_R1d, sin_R1d = rotary_tables(spec, layout.position_T, like)
        new.state.scrub(len(new.slot_N))
        row_C = torch.arange(new.state.rows[0].shape[3])
        dead_RC = row_C > new.row_N[:, None]
        narrow = 0 < spec.window <= int(new.row_N.max())
        if narrow:
            dead_RC |= row_C <= new.row_N[:, None] - spec.window
        mask_RC = torch.zeros(dead_RC.shape).masked_fill_(dead_RC, -torch.inf).to(like)
        group = spec.heads // spec.kv_heads
        mask_NgC = mask_RC[:, None, None].expand(-1, spec.kv_heads, group, -1).flatten(0, 1)
        default = spec.score_scale == spec.head_dim**-0.5 and not spec.softcap
        plain = default and cos_R1d.shape[-1] == spec.head_dim and not narrow
        return StepPlan(spec, cos_R1d, sin_R1d, new, mask_NgC, plain)

    def attend(self, qkv_RE: Float[Tensor, "R E"], rows: Tensor | None) -> Float[Tensor, "R O"]:
        assert rows is not None
        if self.plain and fused.serves_one(qkv_RE):
            return fused.attend(qkv_RE, self.cos_R1d, self.sin_R1d, rows, int(self.new.row_N), self.spec.heads)
        heads, kv_heads, head_dim = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        active = len(self.new.slot_N)
        qkv_RHd = qkv_RE.view(-1, heads + 2 * kv_heads, head_dim)
        rotate_(qkv_RHd[:, : heads + kv_heads], self.cos_R1d, self.sin_R1d)
        _, slot_N, row_N = self.new.there
        rows[:, slot_N, :, row_N] = qkv_RHd[:active, heads:].unflatten(1, (2, kv_heads))
        k_NCd, v_NCd = rows[:, :active].flatten(1, 2)
        q_Ngd = qkv_RHd[:active, :heads].reshape(active * kv_heads, -1, head_dim)
        if softcap := self.spec.softcap:
            score_NgC = torch.bmm(q_Ngd, k_NCd.transpose(1, 2)).mul_(self.spec.score_scale)
            score_NgC.div_(softcap).tanh_().mul_(softcap).add_(self.mask_NgC)
        else:
            score_NgC = torch.baddbmm(self.mask_NgC, q_Ngd, k_NCd.transpose(1, 2), alpha=self.spec.score_scale)
        out_RO = torch.bmm(score_NgC.softmax(-1), v_NCd).view(active, heads * head_dim)
        if active == len(qkv_RE):
            return out_RO
        return torch.cat((out_RO, out_RO.new_zeros(len(qkv_RE) - active, heads * head_dim)))


def is_step(new: Placement) -> bool:
    """One node for each of the slots 0 .. R-1 in order, then fillers?"""
    active = len(new.index_N)
    straight_N = torch.arange(active)
    return active > 0 and torch.equal(new.index_N, straight_N) and torch.equal(new.slot_N, straight_N)
