"""Log-probabilities of given tokens, and entropies, from hidden states: never a tensor of all rows x vocabulary.

The forward keeps two numbers a row (log-sum-exp and entropy); the backward computes the logits of a chunk again.  Only
the last chunk's are still there, and the backward begins with it: the peak is one chunk all the same.  With p the
softmax of z = logits / temperature, H its entropy, g and h the incoming gradients of log-prob and entropy:

    d loss / d z = g (onehot - p) - h p (log p + H)

Where logits are soft-capped (`softcapped`), z is capped in the precision of the logits, as it is where tokens are
drawn, and the gradient is multiplied by the cap's slope 1 - tanh(z / c)^2.

Two sizes: a *chunk* of rows is one matrix product; a *block* of its rows is what the elementwise passes work on, small
enough to stay in a core's cache.  Plain twin: `plain_token_logprobs`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rung.core.shapes import Float, Int, Tensor

CHUNK_ROWS = 1024  # a chunk's logits are the peak: 100 MB in bf16 for 49 152 words
BLOCK_ELEMENTS = 1 << 19  # 2 MB of fp32: about a core's second cache


def token_logprobs(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, "N"],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    entropy: bool = True,
    chunk: int = CHUNK_ROWS,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Log-probability of each row's target, and entropy of each row's distribution, in nats, both differentiable.

    Logits are `hidden_ND @ weight_VD.T` in the dtype given, soft-capped there unless `softcap` is 0, then fp32 (fp64
    stays fp64), divided by `temperature`.
    Gradients are accumulated over chunks in fp32 and returned in the dtype of their input.  An entropy that no loss
    uses costs nothing in the backward; with `entropy=False` it is NaN and costs nothing at all.
    """
    return _TokenLogprobs.apply(hidden_ND, weight_VD, target_N, temperature, softcap, entropy, chunk)


def softcapped(logits_NV: Float[Tensor, "N V"], cap: float) -> Float[Tensor, "N V"]:
    """cap * tanh(logits / cap), computed in fp32 or wider, in the dtype given.  [Bello 2017; Gemma 2]"""
    return ((logits_NV.to(_wide(logits_NV.dtype)) / cap).tanh() * cap).to(logits_NV.dtype)


def plain_token_logprobs(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, "N"],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """`token_logprobs` by the definition, through the dense [N, V] tensor."""
    logits_NV = hidden_ND @ weight_VD.T
    logits_NV = softcapped(logits_NV, softcap) if softcap else logits_NV
    logp_NV = (logits_NV.to(_wide(logits_NV.dtype)) / temperature).log_softmax(-1)
    return logp_NV.gather(1, target_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        temperature: float,
        softcap: float,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logp_N, lse_N, entropy_N = (hidden_ND.new_empty(len(hidden_ND), dtype=_wide(hidden_ND.dtype)) for _ in range(3))
        if not entropy:
            entropy_N.fill_(torch.nan)
        logits_NV = None
        for rows in _spans(len(hidden_ND), chunk):
            del logits_NV  # before the next chunk's are made
            logits_NV = hidden_ND[rows] @ weight_VD.T
            for at, z_RV in _blocks(logits_NV, temperature, softcap):
                block = slice(rows.start + at.start, rows.start + at.stop)
                top_R1 = z_RV.amax(-1, keepdim=True)
                logp_N[block] = z_RV.gather(1, target_N[block, None])[:, 0]
                weight_RV = (z_RV - top_R1).exp_()
                mass_R = weight_RV.sum(-1)
                lse_N[block] = top_R1[:, 0] + mass_R.log()
                if entropy:
                    entropy_N[block] = lse_N[block] - torch.linalg.vecdot(weight_RV, z_RV) / mass_R
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, lse_N, entropy_N)
        ctx.temperature, ctx.softcap, ctx.chunk, ctx.last_logits_NV = temperature, softcap, chunk, logits_NV
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N.sub_(lse_N), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        g_N = torch.zeros_like(lse_N) if g_N is None else g_N
        d_hidden_ND = torch.empty_like(hidden_ND) if want_hidden else None
        d_weight_VD = _Accumulator(weight_VD) if want_weight else None
        logits_NV, ctx.last_logits_NV = ctx.last_logits_NV, None  # overwritten below: a second backward makes its own
        for rows in reversed(_spans(len(hidden_ND), ctx.chunk)):
            logits_NV = hidden_ND[rows] @ weight_VD.T if logits_NV is None else logits_NV
            for at, z_RV in _blocks(logits_NV, ctx.temperature, ctx.softcap):
                block = slice(rows.start + at.start, rows.start + at.stop)
                z_RV.sub_(lse_N[block, None])
                p_RV = z_RV.exp()
                if h_N is None:
                    p_RV.mul_(-g_N[block, None])
                else:
                    p_RV.mul_(z_RV.add_(entropy_N[block, None]).mul_(h_N[block, None]).add_(g_N[block, None]).neg_())
                p_RV.scatter_add_(1, target_N[block, None], g_N[block, None])
                if ctx.softcap:
                    p_RV.mul_(_slope(logits_NV[at], ctx.softcap))
                logits_NV[at] = p_RV if ctx.temperature == 1.0 else p_RV.div_(ctx.temperature)
            if d_hidden_ND is not None:
                torch.mm(logits_NV, weight_VD, out=d_hidden_ND[rows])
            if d_weight_VD is not None:
                d_weight_VD.add_product(logits_NV.T, hidden_ND[rows])
            logits_NV = None
        return d_hidden_ND, d_weight_VD.total() if d_weight_VD else None, None, None, None, None, None


class _Accumulator:
    """A sum of matrix products in fp32 at least; a single product is taken as it is."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        wide = _wide(self._like.dtype)
        if self._sum is None:
            self._sum = a @ b
        elif a.dtype == wide:
            self._sum.addmm_(a, b)
        else:
            self._sum = self._sum.to(wide).add_(a @ b)

    def total(self) -> Tensor:
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spans(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _slope(logits_RV: Tensor, cap: float) -> Tensor:
    """d softcapped / d logits, in fp32 or wider."""
    return logits_RV.to(_wide(logits_RV.dtype), copy=True).div_(cap).tanh_().square_().neg_().add_(1)


def _blocks(logits_NV: Tensor, temperature: float, softcap: float) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, with a copy of their capped logits / temperature in fp32 or wider; one block on a GPU."""
    size = len(logits_NV) if logits_NV.is_cuda else max(BLOCK_ELEMENTS // logits_NV.shape[1], 1)
    for at in _spans(len(logits_NV), max(size, 1)):
        capped_RV = softcapped(logits_NV[at], softcap) if softcap else logits_NV[at]
        z_RV = capped_RV.to(_wide(logits_NV.dtype), copy=True)
        yield at, z_RV if temperature == 1.0 else z_RV.div_(temperature)
