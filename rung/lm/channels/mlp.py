"""The gated feed-forward layer."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from rung.core.shapes import Float, Tensor
from rung.lm.config import MLPSpec

ACTIVATIONS = {"silu": F.silu}


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one matrix, rows gate first.  [Shazeer 2020]"""

    def __init__(self, spec: MLPSpec, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        kind = {"bias": spec.bias, "dtype": dtype, "device": device}
        self.gate_up = skip_init(nn.Linear, width, 2 * spec.width, **kind)
        self.down = skip_init(nn.Linear, spec.width, width, **kind)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, -1)
        return self.down(self.activation(gate_TF) * up_TF)
