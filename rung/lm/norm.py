"""RMSNorm.  [Zhang & Sennrich 2019]"""

import torch
from torch import nn

from rung.core.shapes import Float, Tensor


class RMSNorm(nn.Module):
    """y = w * cast(x / sqrt(mean(x^2) + eps)): statistics in fp32 (fp64 for fp64), w after the cast, as in Llama."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        scale_N1 = torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_ND * scale_N1).to(x_ND.dtype)
