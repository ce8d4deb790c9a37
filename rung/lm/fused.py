"""A decoding step of a single row in bf16 on a CPU, in few passes over memory; and the sums that drawing needs.

One row is a stream of weights: what counts is that memory is read once and in order, and that little else happens.
oneDNN's product of one row reaches half of the reading speed (AVX512-BF16), and around the products PyTorch runs some
fifty small operations a layer.  Results differ from PyTorch's by the order of a sum.  In bf16 that is enough to part in
every token, so that steps of more rows stay with the operations of the learner, to which they are mostly bit-equal:
they would gain a tenth, and the log-probabilities of sampler and learner would be four times as far apart.

One thread computes a number, in one order, so that the number of threads changes no bit.  Numba compiles the loops
(`kernels.py`) when they are first used, in some ten seconds, and keeps the result on disk.  Its OpenMP layer takes the
libgomp that PyTorch has loaded, so that both run on one set of threads.
"""

from functools import cache, lru_cache
from types import ModuleType

import torch

from rung.core.shapes import Float, Tensor


def serves(x: Tensor) -> bool:
    """May `block_sums` take a tensor like this one?  In inference mode only: what a learner computes, with gradients or
    without, comes from one set of operations."""
    return torch.is_inference_mode_enabled() and _kernels(x.device.type, x.dtype) is not None


def serves_one(x: Tensor) -> bool:
    """May the functions of one row?"""
    return len(x) == 1 and serves(x)


def linear(x_1D: Float[Tensor, "1 D"], weight_ED: Float[Tensor, "E D"], bias_E: Tensor | None) -> Float[Tensor, "1 E"]:
    """x @ weight.T + bias."""
    out_1E = x_1D.new_empty(1, len(weight_ED))
    bias = 0 if bias_E is None else bias_E.data_ptr()
    addresses = (_address(x_1D), _address(weight_ED), bias, _address(out_1E))
    _loaded(x_1D).linear(*addresses, *reversed(weight_ED.shape), _threads())
    return out_1E


def rms_norm(x_1D: Float[Tensor, "1 D"], weight_D: Float[Tensor, "D"], eps: float) -> Float[Tensor, "1 D"]:
    """w * cast(x / sqrt(mean(x^2) + eps))."""
    out_1D = torch.empty_like(x_1D)
    _loaded(x_1D).rms_norm(_address(x_1D), _address(weight_D), _address(out_1D), x_1D.shape[1], eps)
    return out_1D


def silu_gate(gate_up_1E: Float[Tensor, "1 E"]) -> Float[Tensor, "1 F"]:
    """silu(gate) * up of the two halves of the row."""
    out_1F = gate_up_1E.new_empty(1, gate_up_1E.shape[1] // 2)
    _loaded(gate_up_1E).silu_gate(_address(gate_up_1E), _address(out_1F), out_1F.shape[1])
    return out_1F


def attend(
    qkv_1E: Float[Tensor, "1 E"],
    cos_11d: Float[Tensor, "1 1 d"],
    sin_11d: Float[Tensor, "1 1 d"],
    rows_2SKCd: Float[Tensor, "2 S K C d"],
    row: int,
    heads: int,
) -> Float[Tensor, "1 O"]:
    """A step of slot 0: turn q and k; k and v become its row `row`; attend to its rows up to that one."""
    _, slots, kv_heads, capacity, head_dim = rows_2SKCd.shape
    out_1O = qkv_1E.new_empty(1, heads * head_dim)
    addresses = [_address(tensor) for tensor in (qkv_1E, cos_11d, sin_11d, rows_2SKCd, out_1O)]
    _loaded(qkv_1E).attend(*addresses, row, heads, kv_heads, head_dim, slots, capacity, _threads())
    return out_1O


def block_sums(
    logits_NV: Float[Tensor, "N V"], beta_N1: Float[Tensor, "N 1"], block: int
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N M"], Float[Tensor, "N M"]]:
    """Of every block of `block` words (M of them): the largest beta z, log of the sum of exp(beta z), and of exp(z)."""
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
