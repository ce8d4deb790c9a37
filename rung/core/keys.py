"""Keys: 64-bit numbers derived from names, in pure integers (no torch: tasks and their grading child use them).

The mixer is SplitMix64 [Steele, Lea & Flood 2014]; `rung.core.rng` says what a key's noise is.
"""

import hashlib

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd  [SplitMix64]
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # Stafford's variant 13  [SplitMix64]
MASK = (1 << 64) - 1


def mix64(word: int) -> int:
    """SplitMix64's finaliser on one 64-bit word."""
    word = ((word ^ (word >> 30)) * MIX_1) & MASK
    word = ((word ^ (word >> 27)) * MIX_2) & MASK
    return word ^ (word >> 31)


def splitmix64(seed: int, index: int) -> int:
    """Word `index` (from 0) of the SplitMix64 stream that starts from `seed`."""
    return mix64((seed + (index + 1) * GOLDEN) & MASK)


def derive_key(*names: int | str) -> int:
    """A 64-bit key from a path of names; the order and the kind of every name matter.

    >>> derive_key(0, "a") != derive_key("0", "a")
    True
    """
    state = 0
    for name in names:
        kind = "i" if isinstance(name, int) else "s"
        word = int.from_bytes(hashlib.blake2b(f"{kind}{name}".encode(), digest_size=8).digest(), "little")
        state = mix64(((state + GOLDEN) & MASK) ^ word)
    return state


def signed(word: int) -> int:
    """A 64-bit word as the int64 of equal bits (torch has no arithmetic on uint64)."""
    return word - (1 << 64) if word >= 1 << 63 else word
