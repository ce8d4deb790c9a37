"""A block: norm, mixer, norm, channel, each added to the residual stream."""

import torch
from torch import nn

from rung.core.shapes import Float, Tensor
from rung.lm.channels.mlp import MLP
from rung.lm.config import AttentionSpec, BlockSpec, MLPSpec
from rung.lm.mixers.attention import Attention, Plan
from rung.lm.norm import RMSNorm

MIXERS = {AttentionSpec: Attention}
CHANNELS = {MLPSpec: MLP}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel(norm(x))."""

    def __init__(self, spec: BlockSpec, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, spec.norm_eps, dtype, device)
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, width, dtype, device)
        self.channel_norm = RMSNorm(width, spec.norm_eps, dtype, device)
        self.channel = CHANNELS[type(spec.channel)](spec.channel, width, dtype, device)

    def forward(self, x_TD: Float[Tensor, "T D"], plan: Plan, rows: Tensor | None) -> Float[Tensor, "T D"]:
        x_TD = x_TD + self.mixer(self.mixer_norm(x_TD), plan, rows)
        return x_TD + self.channel(self.channel_norm(x_TD))
