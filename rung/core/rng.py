"""Randomness as a pure function of names: keys, and a counter-based hash.  There is no generator and no global state.

A key is a 64-bit number derived from names (`derive_key(seed, step, problem, draw)`).  The noise of a key at a position
is the SplitMix64 stream [Steele, Lea & Flood 2014] whose seed is mix64(key XOR mix64(position)); its n-th word is
mix64(seed + (n + 1) * GOLDEN).  Any word can be computed alone, in any order, on any device, so that a token does not
depend on the batch it was drawn in, and a resumed run draws what the uninterrupted one would have drawn.

`NOISE_LAW` names this file's arithmetic together with `engine/sampling.py`; every run records it.
"""

from rung.core.keys import GOLDEN, MASK, MIX_1, MIX_2, derive_key, mix64, signed, splitmix64
from rung.core.shapes import Float, Int, Tensor

__all__ = ["MASK", "NOISE_LAW", "derive_key", "gumbels", "mix64", "signed", "splitmix64", "uniforms"]

NOISE_LAW = "gumbel2-splitmix64-v1"
UNIFORM_BITS = 52  # (word >> 12) + 1/2 is exact in fp64, and never 0 or 1 after scaling


def uniforms(key_N: Int[Tensor, "N"], position_N: Int[Tensor, "N"], index: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Uniform noise in the open interval (0, 1), fp64.

    `key_N` and `position_N` are int64 (a key through `signed`); `index` has shape [N, M] or [M] and names the words
    wanted of each row's stream.  Returns [N, M].
    """
    seed_N1 = _mix64(key_N ^ _mix64(position_N))[:, None]
    words = _mix64(seed_N1 + (index + 1) * signed(GOLDEN))
    return (_shift(words, 64 - UNIFORM_BITS).double() + 0.5) * 2.0**-UNIFORM_BITS


def gumbels(key_N: Int[Tensor, "N"], position_N: Int[Tensor, "N"], index: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard Gumbel noise -log(-log u), fp64; arguments and shape as in `uniforms`."""
    return uniforms(key_N, position_N, index).log_().neg_().log_().neg_()


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 words (torch's own keeps the sign)."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(word: Tensor) -> Tensor:
    """`mix64` on int64 tensors: the products wrap around as those of unsigned words do."""
    word = (word ^ _shift(word, 30)) * signed(MIX_1)
    word = (word ^ _shift(word, 27)) * signed(MIX_2)
    return word ^ _shift(word, 31)
