"""Attention of a decoding step that can be recorded and replayed: shapes are fixed, and what varies lies on the device.

Row r of R feeds slot r; slots and positions are read on the device, so that one recording serves any samples.  A filler
names a slot that no sample has, and position 0: what it stores is never read.  The first C rows of the first R slots
are read as they lie, by every row alike; the mask hides what is behind a row's own position, or outside its window.
Hidden rows count for nothing only where they are finite (`KVState.settle`).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rung.core.shapes import Float, Int, Tensor
from rung.lm.config import AttentionSpec
from rung.lm.rope import rotate_

# the fused kernel that takes a mask, on any GPU; cuDNN's, which may come first on some, plans for every new shape
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """What all layers of a step share; every tensor lies on the device."""

    spec: AttentionSpec
    cos_R1d: Tensor
    sin_R1d: Tensor
    slot_R: Tensor
    position_R: Tensor
    mask_R11C: Tensor  # additive

    @staticmethod
    def build(
        spec: AttentionSpec,
        tables: tuple[Tensor, Tensor],
        slot_R: Int[Tensor, "R"],
        position_R: Int[Tensor, "R"],
        rows: int,
    ) -> "StaticPlan":
        """tables: `rope.rotary_tables` of all positions; rows: C, more than any position."""
        row_C, position_R1 = torch.arange(rows, device=position_R.device), position_R[:, None]
        hidden_RC = row_C > position_R1
        if spec.window:
            hidden_RC |= row_C <= position_R1 - spec.window
        cos_N1d, sin_N1d = tables
        far = torch.finfo(cos_N1d.dtype).min  # exp of what is left is 0, also in a block of rows all hidden
        mask_RC = torch.zeros(hidden_RC.shape, dtype=cos_N1d.dtype, device=row_C.device).masked_fill_(hidden_RC, far)
        cos_R1d, sin_R1d = cos_N1d.index_select(0, position_R), sin_N1d.index_select(0, position_R)
        return StaticPlan(spec, cos_R1d, sin_R1d, slot_R, position_R, mask_RC[:, None, None])

    def attend(self, qkv_RE: Float[Tensor, "R E"], rows: Tensor | None) -> Float[Tensor, "R O"]:
        assert rows is not None
        heads, kv_heads = self.spec.heads, self.spec.kv_heads
        qkv_RHd = qkv_RE.view(len(qkv_RE), heads + 2 * kv_heads, -1)
        rotate_(qkv_RHd[:, : heads + kv_heads], self.cos_R1d, self.sin_R1d)
        rows[:, self.slot_R, :, self.position_R] = qkv_RHd[:, heads:].unflatten(1, (2, kv_heads))
        q_RKgd = qkv_RHd[:, :heads].unflatten(1, (kv_heads, -1))  # g query heads as if g tokens: no key repeats
        k_RKCd, v_RKCd = rows[:, : len(qkv_RE), :, : self.mask_R11C.shape[-1]]
        if softcap := self.spec.softcap:
            score_RKgC = torch.matmul(q_RKgd, k_RKCd.transpose(-1, -2)).mul_(self.spec.score_scale / softcap)
            score_RKgC.tanh_().mul_(softcap).add_(self.mask_R11C)
            return torch.matmul(score_RKgC.softmax(-1), v_RKCd).flatten(1)
        with sdpa_kernel(FUSED):
            out_RKgd = F.scaled_dot_product_attention(
                q_RKgd, k_RKCd, v_RKCd, attn_mask=self.mask_R11C, scale=self.spec.score_scale
            )
        return out_RKgd.flatten(1)
