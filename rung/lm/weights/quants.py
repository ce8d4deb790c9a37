"""What the blocks of ggml's quantised tensors stand for, in fp32.  [ggml-common.h, ggml-quants.c]

A tensor is a row of blocks; a block holds a few scales (fp16) and small whole numbers q:

    Q8_0   32 numbers in 34 bytes    d | 32 x int8                            d q
    Q4_0   32 in 18                  d | 16 bytes                             d (q - 8)
    Q4_1   32 in 20                  d, m | 16 bytes                          d q + m
    Q5_0   32 in 22                  d | 32 high bits | 16 bytes              d (q - 16)
    Q4_K  256 in 144                 d, e | 8 x 6-bit (s, t) | 128 bytes      d s q - e t, (s, t) of each 32
    Q6_K  256 in 210                 128 bytes | 64 bytes | 16 x int8 s | d   d s (q - 32), s of each 16

The low halves of n bytes are n numbers, the high halves the next n.  The order of multiplications is ggml's, so that
results are equal to the last bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quant:
    """How a type of tensor is stored.

    code: its number in GGUF; block: numbers of a block; size: bytes of a block; dtype: where a block is one number
    """

    code: int
    block: int
    size: int
    dtype: str = ""

    def bytes_of(self, count: int) -> int:
        """Bytes of so many numbers, a whole number of blocks."""
        return count // self.block * self.size


QUANTS: Mapping[str, Quant] = {
    "F32": Quant(0, 1, 4, "<f4"),
    "F16": Quant(1, 1, 2, "<f2"),
    "BF16": Quant(30, 1, 2, "<u2"),
    "Q8_0": Quant(8, 32, 34),
    "Q4_0": Quant(2, 32, 18),
    "Q4_1": Quant(3, 32, 20),
    "Q5_0": Quant(6, 32, 22),
    "Q4_K": Quant(12, 256, 144),
    "Q6_K": Quant(14, 256, 210),
}


def dequantise(kind: str, raw: np.ndarray) -> np.ndarray:
    """The numbers of whole blocks, given as bytes."""
    return FORMULAS[kind](raw.reshape(-1, QUANTS[kind].size)).reshape(-1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 number at a byte of every block, as a column."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2 n]: the low halves, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    high = np.unpackbits(blocks[:, 2:6], axis=-1, bitorder="little")
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | high << 4).astype(np.float32) - 16)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    a, b, c = packed[:, 0], packed[:, 1], packed[:, 2]  # 4 low s, 4 low t, and the low halves of the other 4 of both
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=-1).astype(np.float32)
    shift = np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=-1).astype(np.float32)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    return (_half(blocks, 0) * scale)[..., None] * q - (_half(blocks, 2) * shift)[..., None]


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    two_bits = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> two_bits) & 3
    q = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    return (_half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))[..., None] * q


FORMULAS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q4_K": _q4_k, "Q6_K": _q6_k,
}  # fmt: skip
