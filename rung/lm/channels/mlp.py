"""The gated feed-forward layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rung.core.shapes import Float, Tensor
from rung.lm import fused
from rung.lm.config import MLPSpec
from rung.lm.linear import Linear

Activation = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor, Tensor], Tensor]  # from the gradient of its result, and its argument


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
    if not torch.is_grad_enabled() and fused.serves_one(gate_up_TE):
        return fused.silu_gate(gate_up_TE)
    return _gated(gate_up_TE, F.silu, torch.ops.aten.silu_backward)


def gelu_tanh_gate(gate_up_TE: Float[Tensor, "T E"]) -> Float[Tensor, "T F"]:
    """gelu(gate) * up, by the tanh approximation."""
    return _gated(gate_up_TE, _gelu, _gelu_backward)


def _gated(gate_up_TE: Tensor, activation: Activation, gradient: Gradient) -> Tensor:
    if torch.is_grad_enabled():
        return _Gate.apply(gate_up_TE, activation, gradient)
    gate_TF, up_TF = gate_up_TE.chunk(2, -1)
    return activation(gate_TF).mul_(up_TF)


class _Gate(torch.autograd.Function):
    """Keeps gate and up alone for the backward pass; autograd would keep activation(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate_up_TE: Tensor, activation: Activation, gradient: Gradient) -> Tensor:
        ctx.save_for_backward(gate_up_TE)
        ctx.activation, ctx.gradient = activation, gradient
        gate_TF, up_TF = gate_up_TE.chunk(2, -1)
        return activation(gate_TF).mul_(up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TF: Tensor) -> tuple[Tensor, None, None]:
        (gate_up_TE,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_TE.chunk(2, -1)
        dgate_TF = ctx.gradient(dout_TF * up_TF, gate_TF)
        return torch.cat((dgate_TF, ctx.activation(gate_TF).mul_(dout_TF)), -1), None, None


def _gelu(gate_TF: Tensor) -> Tensor:
    return F.gelu(gate_TF, approximate="tanh")


def _gelu_backward(dout_TF: Tensor, gate_TF: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dout_TF, gate_TF, approximate="tanh")


GATES = {"silu": silu_gate, "gelu_tanh": gelu_tanh_gate}
