"""A block: a mixer and a channel, normed, each added to the residual stream."""

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
    """x + mixer(x), then x + channel(x), with norms where the spec has them."""

    def __init__(self, spec: BlockSpec, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()

        def norm(wanted: bool) -> nn.Module:
            return RMSNorm(width, spec.norm_eps, dtype, device, spec.norm) if wanted else nn.Identity()

        before, after = spec.norms != "after", spec.norms != "before"
        self.mixer_norm = norm(before)
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, width, dtype, device)
        self.mixer_post_norm = norm(after)
        self.channel_norm = norm(before)
        self.channel = CHANNELS[type(spec.channel)](spec.channel, width, dtype, device)
        self.channel_post_norm = norm(after)

    def forward(self, x_TD: Float[Tensor, "T D"], plan: Plan, rows: Tensor | None) -> Float[Tensor, "T D"]:
        x_TD = x_TD + self.mixer_post_norm(self.mixer(self.mixer_norm(x_TD), plan, rows))
        return x_TD + self.channel_post_norm(self.channel(self.channel_norm(x_TD)))
