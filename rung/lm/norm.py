"""RMSNorm.  [Zhang & Sennrich 2019]"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rung.core.shapes import Float, Tensor
from rung.lm import fused
from rung.lm.config import Norm


class RMSNorm(nn.Module):
    """Of n = x / sqrt(mean(x^2) + eps), statistics in fp32 (fp64 for fp64):

    plain   w * cast(n)          Llama and most others
    wide    cast(w * n)          OLMo 2
    offset  cast((1 + w) * n)    Gemma
    """

    def __init__(
        self, width: int, eps: float, dtype: torch.dtype, device: torch.device | None = None, kind: Norm = "plain"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.eps, self.kind = eps, kind
        self.neutral = 0.0 if kind == "offset" else 1.0  # the weight that changes nothing

    def forward(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        if torch.is_grad_enabled():
            return _Normalise.apply(x_ND, self.weight, self.eps, self.kind)
        if self.kind == "plain" and fused.serves_one(x_ND):
            return fused.rms_norm(x_ND, self.weight, self.eps)
        if x_ND.is_cuda:
            return _in_few_kernels(x_ND, self.weight, self.eps, self.kind)
        return _normalised(x_ND, self.weight, self.eps, self.kind)


def _normalised(x_ND: Tensor, weight_D: Tensor, eps: float, kind: Norm = "plain") -> Tensor:
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    normed_ND = wide_ND * _scale(wide_ND, eps)
    if kind == "plain":
        return normed_ND.to(x_ND.dtype).mul_(weight_D)
    return normed_ND.mul_(_factor(weight_D, kind, normed_ND.dtype)).to(x_ND.dtype)


def _in_few_kernels(x_ND: Tensor, weight_D: Tensor, eps: float, kind: Norm) -> Tensor:
    """`_normalised` but for the order of a sum: one kernel of CUDA's, or two, where that has nine."""
    if kind == "offset":
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        return F.rms_norm(x_ND.to(wide), weight_D.shape, _factor(weight_D, kind, wide), eps).to(x_ND.dtype)
    if kind == "wide":
        return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)
    return F.rms_norm(x_ND, weight_D.shape, None, eps).mul_(weight_D)


def _factor(weight_D: Tensor, kind: Norm, wide: torch.dtype) -> Tensor:
    return weight_D.to(wide) + (1.0 if kind == "offset" else 0.0)


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
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, kind: Norm) -> Tensor:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps, ctx.kind = eps, kind
        return _normalised(x_ND, weight_D, eps, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weight_D = ctx.saved_tensors
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        scale_N1 = _scale(wide_ND, ctx.eps)
        normed_ND = wide_ND * scale_N1
        if ctx.kind == "plain":
            dweight_D = (dy_ND * normed_ND.to(dy_ND.dtype)).sum(0)
            g_ND = (dy_ND * weight_D).to(wide_ND.dtype)
        else:
            dweight_D = (dy_ND * normed_ND).sum(0).to(weight_D.dtype)
            g_ND = dy_ND * _factor(weight_D, ctx.kind, wide_ND.dtype)
        mean_N1 = (g_ND * normed_ND).mean(-1, keepdim=True)
        return g_ND.addcmul(normed_ND, mean_N1, value=-1).mul_(scale_N1).to(x_ND.dtype), dweight_D, None, None
