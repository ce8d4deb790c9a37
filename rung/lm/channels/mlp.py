"""The gated feed-forward layer."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rung.core.shapes import Float, Tensor
from rung.lm import fused
from rung.lm.config import MLPSpec
from rung.lm.linear import Linear


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one matrix, rows gate first.  [Shazeer 2020]"""

    def __init__(self, spec: MLPSpec, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * spec.width, spec.bias, dtype, device)
        self.down = Linear(spec.width, width, spec.bias, dtype, device)
        self.gate = GATES[spec.activation]

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.gate(self.gate_up(x_TD)))


def silu_gate(gate_up_TE: Float[Tensor, "T E"]) -> Float[Tensor, "T F"]:
    """silu(gate) * up of the two halves of the last dimension."""
    if torch.is_grad_enabled():
        return _SiluGate.apply(gate_up_TE)
    if fused.serves_one(gate_up_TE):
        return fused.silu_gate(gate_up_TE)
    gate_TF, up_TF = gate_up_TE.chunk(2, -1)
    return F.silu(gate_TF).mul_(up_TF)


class _SiluGate(torch.autograd.Function):
    """Keeps gate and up alone for the backward pass; autograd would keep silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate_up_TE: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TE)
        gate_TF, up_TF = gate_up_TE.chunk(2, -1)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TF: Tensor) -> Tensor:
        (gate_up_TE,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_TE.chunk(2, -1)
        dgate_TF = torch.ops.aten.silu_backward(dout_TF * up_TF, gate_TF)
        return torch.cat((dgate_TF, F.silu(gate_TF).mul_(dout_TF)), -1)


GATES = {"silu": silu_gate}
