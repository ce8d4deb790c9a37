"""RMSNorm.  [Zhang & Sennrich 2019]"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rung.core.shapes import Float, Tensor
from rung.lm import fused


class RMSNorm(nn.Module):
    """y = w * cast(x / sqrt(mean(x^2) + eps)): statistics in fp32 (fp64 for fp64), w after the cast, as in Llama."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        if torch.is_grad_enabled():
            return _Normalise.apply(x_ND, self.weight, self.eps)
        if fused.serves_one(x_ND):
            return fused.rms_norm(x_ND, self.weight, self.eps)
        return _normalised(x_ND, self.weight, self.eps)


def _normalised(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    return (wide_ND * _scale(wide_ND, eps)).to(x_ND.dtype).mul_(weight_D)


def _scale(wide_ND: Tensor, eps: float) -> Tensor:
    """(mean(x^2) + eps)^(-1/2), [N, 1].  By way of the norm: the mean of x.square() writes a tensor of squares first
    (102 us against 64 at 256 rows of 576, 2-core Zen 4)."""
    norm_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True)
    return norm_N1.square_().div_(wide_ND.shape[-1]).add_(eps).rsqrt_()


class _Normalise(torch.autograd.Function):
    """Keeps x alone for the backward pass, where autograd would keep two fp32 copies of it; half the time.

    With n = x s, s = (mean(x^2) + eps)^(-1/2) and g = w dy:  dx = s (g - n mean(g n)),  dw = sum of dy n.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps = eps
        return _normalised(x_ND, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D = ctx.saved_tensors
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        scale_N1 = _scale(wide_ND, ctx.eps)
        normed_ND = wide_ND * scale_N1
        dweight_D = (dy_ND * normed_ND.to(dy_ND.dtype)).sum(0)
        g_ND = (dy_ND * weight_D).to(wide_ND.dtype)
        mean_N1 = (g_ND * normed_ND).mean(-1, keepdim=True)
        return g_ND.addcmul(normed_ND, mean_N1, value=-1).mul_(scale_N1).to(x_ND.dtype), dweight_D, None
