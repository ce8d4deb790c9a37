"""Quantised blocks: numbers packed here by the published layouts, and the gguf package's own dequantisation."""

import gguf
import numpy as np
import pytest

from rung.lm.weights.quants import QUANTS, dequantise

DRAW = np.random.default_rng(0)


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def nibbles(q: list[int]) -> bytes:
    """n numbers of 4 bits: number i in the low half of byte i, number i + n/2 in its high half."""
    middle = len(q) // 2
    return bytes(low | high << 4 for low, high in zip(q[:middle], q[middle:], strict=True))


def q8_0() -> tuple[bytes, list[float]]:
    q = [-128, 127, 0, *range(-14, 15)]
    return half(0.5) + bytes(x & 0xFF for x in q), [0.5 * x for x in q]


def q4_0() -> tuple[bytes, list[float]]:
    q = [*range(16), *range(15, -1, -1)]
    return half(-0.25) + nibbles(q), [-0.25 * (x - 8) for x in q]


def q4_1() -> tuple[bytes, list[float]]:
    q = [*range(16), *range(15, -1, -1)]
    return half(0.25) + half(-3.0) + nibbles(q), [0.25 * x - 3.0 for x in q]


def q5_0() -> tuple[bytes, list[float]]:
    q = [(7 * i) % 32 for i in range(32)]
    high = sum((x >> 4) << i for i, x in enumerate(q))  # bit i of a 32-bit number is the fifth bit of number i
    return half(0.5) + high.to_bytes(4, "little") + nibbles([x & 15 for x in q]), [0.5 * (x - 16) for x in q]


def q4_k() -> tuple[bytes, list[float]]:
    """8 sub-blocks of 32: 6-bit scales s and shifts t, packed as `get_scale_min_k4` of ggml-quants.c unpacks them."""
    s, t = [63, 1, 17, 40, 62, 33, 16, 5], [2, 63, 21, 0, 48, 31, 50, 15]
    q = [int(x) for x in DRAW.integers(0, 16, 256)]
    packed = [s[j] | (s[j + 4] >> 4) << 6 for j in range(4)]
    packed += [t[j] | (t[j + 4] >> 4) << 6 for j in range(4)]
    packed += [(s[j + 4] & 15) | (t[j + 4] & 15) << 4 for j in range(4)]
    bits = b"".join(nibbles(q[at : at + 64]) for at in range(0, 256, 64))
    values = [0.5 * s[i // 32] * x - 0.25 * t[i // 32] for i, x in enumerate(q)]
    return half(0.5) + half(0.25) + bytes(packed) + bits, values


def q6_k() -> tuple[bytes, list[float]]:
    """Two halves of 128: number 32 k + l has its low bits in ql[l + 32 (k mod 2)], half k // 2, and its high bits in
    qh[l], bits 2 k and 2 k + 1; a scale for each 16."""
    s = [int(x) for x in DRAW.integers(-128, 128, 16)]
    q = [int(x) for x in DRAW.integers(0, 64, 256)]
    ql, qh = bytearray(128), bytearray(64)
    for i, x in enumerate(q):
        half_, k, place = i // 128, i % 128 // 32, i % 32
        ql[64 * half_ + 32 * (k % 2) + place] |= (x & 15) << 4 * (k // 2)
        qh[32 * half_ + place] |= (x >> 4) << 2 * k
    values = [2.0 * s[i // 16] * (x - 32) for i, x in enumerate(q)]
    return bytes(ql) + bytes(qh) + bytes(x & 0xFF for x in s) + half(2.0), values


PACKED = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q4_K": q4_k, "Q6_K": q6_k}


@pytest.mark.parametrize("kind", PACKED)
def test_a_block_packed_by_hand_becomes_the_numbers_that_went_in(kind):
    raw, values = PACKED[kind]()
    assert dequantise(kind, np.frombuffer(raw, np.uint8)).tolist() == values  # all are whole in fp32: nothing rounds


@pytest.mark.parametrize("kind", PACKED)
def test_random_bytes_become_the_numbers_of_the_gguf_package_to_the_last_bit(kind):
    raw = DRAW.integers(0, 256, (500, QUANTS[kind].size), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are infinite and NaN too
        ours, theirs = dequantise(kind, raw.reshape(-1)), gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ours, theirs.reshape(-1), equal_nan=True)
    assert np.isfinite(ours).mean() > 0.9


def test_sizes_and_numbers_of_the_types_are_those_of_the_gguf_package():
    for kind, quant in QUANTS.items():
        theirs = gguf.GGMLQuantizationType[kind]
        assert (quant.code, quant.block, quant.size) == (theirs.value, *gguf.GGML_QUANT_SIZES[theirs]), kind
