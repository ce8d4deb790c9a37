"""Softmax attention over a layout.  One plan per forward, shared by all layers, holds what depends on the layout alone.

step     one new token per slot: a decoding step
static   the same, to be recorded (chosen by `Decoder.static_step`)
packed   any forest without committed rows: the learner's batch, a prefill
flex     the same on a GPU
plain    anything: chunks and trees behind committed rows, mixtures
"""

import torch
from torch import nn

from rung.core.records import Layout
from rung.core.shapes import Float, Tensor
from rung.lm.config import AttentionSpec
from rung.lm.linear import Linear
from rung.lm.mixers import flex
from rung.lm.mixers.flex import FlexPlan
from rung.lm.mixers.packed import PackedPlan
from rung.lm.mixers.plain import PlainPlan
from rung.lm.mixers.static import StaticPlan
from rung.lm.mixers.step import StepPlan, is_step
from rung.lm.norm import RMSNorm
from rung.lm.state import Placement

Plan = StepPlan | StaticPlan | PackedPlan | FlexPlan | PlainPlan


def choose_plan(layout: Layout, spec: AttentionSpec, new: Placement | None, like: Tensor) -> Plan:
    """The fastest plan that holds for this layout; `new` is None without a state."""
    if new is not None and is_step(new):
        return StepPlan.build(layout, spec, new, like)
    if new is None or not bool(new.state.length_S[new.slot_N].any()):
        plan = FlexPlan if flex.serves(layout, spec, like) else PackedPlan
        return plan.build(layout, spec, new, like)
    return PlainPlan.build(layout, spec, new, like)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; q, k and v are one matrix, rows in that order.  [Vaswani 2017]

    Where q and k are normed, that is over a head [Henry 2020; Qwen3] or over all heads at once [OLMo 2]."""

    branches = True

    def __init__(self, spec: AttentionSpec, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        inner, outer = (spec.heads + 2 * spec.kv_heads) * spec.head_dim, spec.heads * spec.head_dim
        self.qkv = Linear(width, inner, spec.bias, dtype, device)
        self.out = Linear(outer, width, spec.out_bias, dtype, device)
        sizes = {"none": (), "head": (spec.head_dim,) * 2, "width": (outer, spec.kv_heads * spec.head_dim)}
        norms = [RMSNorm(size, spec.norm_eps, dtype, device, spec.norm) for size in sizes[spec.qk_norm]]
        self.q_norm: RMSNorm | None
        self.k_norm: RMSNorm | None
        self.q_norm, self.k_norm = norms or (None, None)

    def plan(self, layout: Layout, new: Placement | None) -> Plan:
        """What all layers of this spec share in one forward."""
        return choose_plan(layout, self.spec, new, self.qkv.weight)

    def forward(self, x_TD: Float[Tensor, "T D"], plan: Plan, rows: Tensor | None) -> Float[Tensor, "T D"]:
        return self.out(plan.attend(self._normed(self.qkv(x_TD)), rows))

    def _normed(self, qkv_TE: Tensor) -> Tensor:
        """q and k normed, where this spec norms them."""
        if self.q_norm is None or self.k_norm is None:
            return qkv_TE
        spec = self.spec
        sizes = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        q_TO, k_TI, v_TI = qkv_TE.split(sizes, -1)
        q_TO, k_TI = (
            norm(x_TI.contiguous().view(-1, len(norm.weight))).view(len(x_TI), -1)  # a slice would keep all of qkv
            for norm, x_TI in ((self.q_norm, q_TO), (self.k_norm, k_TI))
        )
        return torch.cat((q_TO, k_TI, v_TI), -1)
