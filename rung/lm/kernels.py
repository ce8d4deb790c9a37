"""The loops behind `fused.py`, compiled by Numba: LLVM makes vector code of them; no C compiler is needed.

Sums are in fp32, rounded where PyTorch rounds.  One thread computes a number, in one order, however many there are.
Arguments are addresses of contiguous bf16 tensors, and sizes; nothing is checked here.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, prange, types
from numba.extending import intrinsic
from numba.np.ufunc import omppool  # type: ignore[attr-defined]  # noqa: F401 - fails where there is no OpenMP

config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
FLOATS = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; what is not finite stays so


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Unwrapped first: the tests' shape checks wrap every function."""
    return njit(error_model="numpy", fastmath=FLOATS, **options)(inspect.unwrap(function))


def _kept(function: Callable[..., Any], **options: Any) -> Any:
    """The machine code stays on disk, where there is a folder for it; else every process compiles anew."""
    try:
        return _compiled(function, cache=True, **options)
    except RuntimeError:
        return _compiled(function, **options)


def _threaded(function: Callable[..., Any]) -> Any:
    return _kept(function, parallel=True)


def _pointer(_context: Any, _address: Any) -> Any:
    """An address as a pointer to the bits of bf16 numbers, a type that neither NumPy nor Numba has."""

    def cast(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.int64), cast


_at: Any = intrinsic(inspect.unwrap(_pointer))


@_compiled
def _wide(bits):
    """bf16 to fp32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_compiled
def _narrow(number):
    """fp32 to the nearest bf16, ties to even."""
    bits = np.float32(number).view(np.uint32)
    if number != number:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled
def _exp(x):
    """e^x for x <= 0, to 2e-7 of its size: 2^n times a polynomial in the rest.  [Cephes expf]  Branch-free, so that
    loops over it become vector code."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    p = p * rest + np.float32(8.3334519073e-3)
    p = p * rest + np.float32(4.1665795894e-2)
    p = p * rest + np.float32(1.6666665459e-1)
    p = p * rest + np.float32(5.0000001201e-1)
    power = np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)
    return (p * rest * rest + rest + np.float32(1)) * power


@_compiled
def _dot(x_D, w_D):
    total = np.float32(0)
    for i in range(len(x_D)):
        total += x_D[i] * _wide(w_D[i])
    return total


@_threaded
def linear(x, weight, bias, out, width, outs, threads):
    """out[e] = x . weight[e] + bias[e]; a bias of 0 is none."""
    x_D, w_ED = carray(_at(x), (width,)), carray(_at(weight), (outs, width))
    bias_E, out_E = carray(_at(bias), (outs,)), carray(_at(out), (outs,))
    wide_D = np.empty(width, np.float32)
    for i in range(width):
        wide_D[i] = _wide(x_D[i])
    for t in prange(threads):
        for e in range(outs * t // threads, outs * (t + 1) // threads):
            offset = _wide(bias_E[e]) if bias else np.float32(0)
            out_E[e] = _narrow(_dot(wide_D, w_ED[e]) + offset)


@_kept
def rms_norm(x, weight, out, width, eps):
    """Rounded twice, as `norm._normalised`: after the scale and after the weight."""
    x_D, w_D, out_D = carray(_at(x), (width,)), carray(_at(weight), (width,)), carray(_at(out), (width,))
    total = np.float32(0)
    for i in range(width):
        total += _wide(x_D[i]) * _wide(x_D[i])
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(width) + np.float32(eps)))
    for i in range(width):
        out_D[i] = _narrow(_wide(_narrow(_wide(x_D[i]) * scale)) * _wide(w_D[i]))


@_kept
def silu_gate(gate_up, out, width):
    """Rounded twice, as `mlp.silu_gate`: after silu and after the product."""
    x_E, out_F = carray(_at(gate_up), (2 * width,)), carray(_at(out), (width,))
    for i in range(width):
        gate = _wide(x_E[i])
        low = _exp(-abs(gate))  # sigmoid(gate) = 1 / (1 + low), or low / (1 + low) below zero
        silu = gate * (np.float32(1) if gate >= 0 else low) / (np.float32(1) + low)
        out_F[i] = _narrow(_wide(_narrow(silu)) * _wide(x_E[width + i]))


@_compiled
def _turn(x_d, cos_d, sin_d, out_d):
    """A head, turned, as bf16: rounded after the product with the cosine, as `rope.rotate_` does.  In two halves, each
    of which becomes vector code."""
    half = len(x_d) // 2
    for i in range(half):
        cosine = _wide(_narrow(_wide(x_d[i]) * _wide(cos_d[i])))
        out_d[i] = _narrow(cosine + _wide(x_d[i + half]) * _wide(sin_d[i]))
    for i in range(half, 2 * half):
        cosine = _wide(_narrow(_wide(x_d[i]) * _wide(cos_d[i])))
        out_d[i] = _narrow(cosine + _wide(x_d[i - half]) * _wide(sin_d[i]))


@_compiled
def _softmax(p_C):
    highest = p_C[0]
    for p in p_C:
        highest = p if p > highest else highest
    total = np.float32(0)
    for c in range(len(p_C)):
        power = _exp(p_C[c] - highest)
        p_C[c] = power
        total += power
    for c in range(len(p_C)):
        p_C[c] = _wide(_narrow(p_C[c] / total))


@_compiled
def _mixture(p_C, v_Cd, sum_d):
    """sum of p[c] v[c], four rows a time: the sum is then read and written a quarter as often."""
    whole = len(p_C) // 4 * 4
    for i in range(len(sum_d)):
        sum_d[i] = 0
    for c in range(0, whole, 4):
        p, q, r, s = p_C[c], p_C[c + 1], p_C[c + 2], p_C[c + 3]
        for i in range(len(sum_d)):
            pair = p * _wide(v_Cd[c, i]) + q * _wide(v_Cd[c + 1, i])
            sum_d[i] += pair + r * _wide(v_Cd[c + 2, i]) + s * _wide(v_Cd[c + 3, i])
    for c in range(whole, len(p_C)):
        for i in range(len(sum_d)):
            sum_d[i] += p_C[c] * _wide(v_Cd[c, i])


@_threaded
def attend(qkv, cos, sin, rows, out, row, heads, kv_heads, head_dim, slots, capacity, threads):
    """Slot 0: one key-value head after another, with the query heads that share it.

    Scores and weights are rounded to bf16, as the learner's attention (`mixers/packed.py`) rounds them."""
    group, count, scale = heads // kv_heads, row + 1, np.float32(1 / math.sqrt(head_dim))
    qkv_Hd, out_Hd = carray(_at(qkv), (heads + 2 * kv_heads, head_dim)), carray(_at(out), (heads, head_dim))
    cos_d, sin_d = carray(_at(cos), (head_dim,)), carray(_at(sin), (head_dim,))
    rows_2SKCd = carray(_at(rows), (2, slots, kv_heads, capacity, head_dim))
    for t in prange(threads):
        turned_d, sum_d = np.empty(head_dim, np.uint16), np.empty(head_dim, np.float32)
        q_d, p_C = np.empty(head_dim, np.float32), np.empty(count, np.float32)
        for head in range(kv_heads * t // threads, kv_heads * (t + 1) // threads):
            k_Cd, v_Cd = rows_2SKCd[0, 0, head, :count], rows_2SKCd[1, 0, head, :count]
            _turn(qkv_Hd[heads + head], cos_d, sin_d, k_Cd[row])
            for i in range(head_dim):
                v_Cd[row, i] = qkv_Hd[heads + kv_heads + head, i]
            for h in range(head * group, (head + 1) * group):
                _turn(qkv_Hd[h], cos_d, sin_d, turned_d)
                for i in range(head_dim):
                    q_d[i] = _wide(turned_d[i])
                for c in range(count):
                    p_C[c] = _wide(_narrow(_wide(_narrow(_dot(q_d, k_Cd[c]))) * scale))
                _softmax(p_C)
                _mixture(p_C, v_Cd, sum_d)
                for i in range(head_dim):
                    out_Hd[h, i] = _narrow(sum_d[i])


@_threaded
def block_sums(logits, beta_N, rows, vocabulary, block, top_NM, lse_NM, raw_NM, threads):
    """Of every block: the largest z = beta logit, log of the sum of exp(z), and the same sum at beta = 1."""
    logit_NV, blocks = carray(_at(logits), (rows, vocabulary)), top_NM.shape[1]
    for t in prange(threads):
        for pair in range(rows * blocks * t // threads, rows * blocks * (t + 1) // threads):
            n, m = pair // blocks, pair % blocks
            bits_W, beta = logit_NV[n, m * block : min((m + 1) * block, vocabulary)], beta_N[n]
            top = _wide(bits_W[0])
            for i in range(len(bits_W)):
                top = _wide(bits_W[i]) if _wide(bits_W[i]) > top else top
            tempered, raw = np.float32(0), np.float32(0)
            for i in range(len(bits_W)):
                raw += _exp(_wide(bits_W[i]) - top)
            if beta == 1:
                tempered = raw
            else:
                for i in range(len(bits_W)):
                    tempered += _exp(_wide(bits_W[i]) * beta - top * beta)
            empty = top == -np.inf
            top_NM[n, m] = top * beta
            lse_NM[n, m] = top if empty else top * beta + np.float32(math.log(tempered))
            raw_NM[n, m] = top if empty else top + np.float32(math.log(raw))
