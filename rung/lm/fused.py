"""What a decoding step does on a CPU in bf16, in few passes over memory.

One row is a stream of weights: what counts is that memory is read once and in order, and that little else happens.
oneDNN's product of one row reaches half of the reading speed (AVX512-BF16), and around the products PyTorch runs some
fifty small operations a layer.  Results differ from PyTorch's by the order of a sum, and in attention by fewer
roundings; a number is computed by one thread in one order, so that the number of threads changes no bit.

Numba compiles the loops (`kernels.py`) when they are first used, in some five seconds, and keeps the result on disk.
Its OpenMP layer takes the libgomp that PyTorch has loaded, so that both run on one set of threads.
"""

from functools import cache, lru_cache
from types import ModuleType

import torch

from rung.core.shapes import Float, Int, Tensor

ROWS_A_THREAD = 32  # of a norm or a gate: with fewer, another thread costs more than it saves


def serves(x: Tensor) -> bool:
    """May the functions below take tensors like this one?  In inference mode only: what a learner computes, with or
    without gradients, comes from one set of operations, so that its ratios are exactly 1 before its first update."""
    return torch.is_inference_mode_enabled() and _kernels(x.device.type, x.dtype) is not None


def linear_of_one(x_1D: Float[Tensor, "1 D"], weight_ED: Float[Tensor, "E D"], bias_E: Tensor | None) -> Tensor:
    """x @ weight.T + bias of a single row, [1, E]."""
    out_1E = x_1D.new_empty(1, len(weight_ED))
    bias = 0 if bias_E is None else bias_E.data_ptr()
    kernels = _loaded(x_1D)
    kernels.linear_of_one(
        _address(x_1D), _address(weight_ED), bias, _address(out_1E), *reversed(weight_ED.shape), _threads()
    )
    return out_1E


def rms_norm(x_ND: Float[Tensor, "N D"], weight_D: Float[Tensor, "D"], eps: float) -> Float[Tensor, "N D"]:
    """w * cast(x / sqrt(mean(x^2) + eps))."""
    out_ND = torch.empty_like(x_ND)
    parts = min(_threads(), 1 + len(x_ND) // ROWS_A_THREAD)
    _loaded(x_ND).rms_norm(_address(x_ND), _address(weight_D), _address(out_ND), *x_ND.shape, eps, parts)
    return out_ND


def silu_gate(gate_up_NE: Float[Tensor, "N E"]) -> Float[Tensor, "N F"]:
    """silu(gate) * up of the two halves of each row."""
    out_NF = gate_up_NE.new_empty(len(gate_up_NE), gate_up_NE.shape[1] // 2)
    parts = min(_threads(), 1 + len(gate_up_NE) // ROWS_A_THREAD)
    _loaded(gate_up_NE).silu_gate(_address(gate_up_NE), _address(out_NF), *out_NF.shape, parts)
    return out_NF


def attend(
    qkv_RE: Float[Tensor, "R E"],
    cos_R1d: Float[Tensor, "R 1 d"],
    sin_R1d: Float[Tensor, "R 1 d"],
    rows_2SKCd: Float[Tensor, "2 S K C d"],
    row_N: Int[Tensor, "N"],
    heads: int,
) -> Float[Tensor, "R O"]:
    """A step of slots 0 .. N-1: turn q and k; k and v become row row_N[i] of slot i; attend to its rows up to that one.

    Rows N .. R-1 of the result, of fillers, are zeros."""
    _, slots, kv_heads, capacity, head_dim = rows_2SKCd.shape
    out_RO = qkv_RE.new_empty(len(qkv_RE), heads * head_dim)
    out_RO[len(row_N) :] = 0
    addresses = [_address(tensor) for tensor in (qkv_RE, cos_R1d, sin_R1d, rows_2SKCd, out_RO)]
    _loaded(qkv_RE).attend(*addresses, row_N.numpy(), heads, kv_heads, head_dim, slots, capacity, _threads())
    return out_RO


def block_sums(
    logits_NV: Float[Tensor, "N V"], beta_N1: Float[Tensor, "N 1"], block: int
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N M"], Float[Tensor, "N M"]]:
    """Of every block of the vocabulary: the largest beta z, the log of the sum of exp(beta z), and that of exp(z)."""
    rows, vocabulary = logits_NV.shape
    top_NM, lse_NM, raw_NM = (torch.empty(rows, -(-vocabulary // block)) for _ in range(3))
    numbers = (tensor.numpy() for tensor in (top_NM, lse_NM, raw_NM))
    beta_N = beta_N1[:, 0].float().contiguous().numpy()
    _loaded(logits_NV).block_sums(_address(logits_NV), beta_N, rows, vocabulary, block, *numbers, _threads())
    return top_NM, lse_NM, raw_NM


@cache
def _kernels(device: str, dtype: torch.dtype) -> ModuleType | None:
    if device != "cpu" or dtype != torch.bfloat16:
        return None
    try:
        from rung.lm import kernels
    except ImportError:  # no OpenMP for Numba on this machine
        return None
    return kernels


def _loaded(x: Tensor) -> ModuleType:
    kernels = _kernels(x.device.type, x.dtype)
    assert kernels is not None, "ask serves() first"
    return kernels


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _threads() -> int:
    return _shared(torch.get_num_threads())


@lru_cache(maxsize=1)  # the last number: telling Numba takes 5 us
def _shared(threads: int) -> int:
    """PyTorch's number of threads, made Numba's too."""
    import numba

    threads = min(threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    return threads
