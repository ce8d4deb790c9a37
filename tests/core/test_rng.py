"""Keys and noise: published vectors, tensors against integers, and names that never meet."""

import math
import random

import pytest
import torch

from rung.core import rng

# The first words of SplitMix64 from seed 1234567, as published with Vigna's reference code (prng.di.unimi.it).
PUBLISHED = (
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)
EDGES = (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15)


def uniform_by_integers(key: int, position: int, index: int) -> float:
    """The law of the module's docstring, word by word, in Python's own integers."""
    seed = rng.mix64(key ^ rng.mix64(position))
    return ((rng.splitmix64(seed, index) >> 12) + 0.5) / 2**52


def test_splitmix64_gives_the_published_words():
    assert tuple(rng.splitmix64(1234567, index) for index in range(5)) == PUBLISHED


def test_noise_of_tensors_is_that_of_integers_bit_for_bit():
    draw = random.Random(0)
    keys = [*EDGES, *(draw.getrandbits(64) for _ in range(50))]
    positions = [*range(len(EDGES)), *(draw.randrange(10**6) for _ in range(50))]
    indices = [0, 1, 255, 256, 49_151, 1 << 40, (1 << 40) + 191]
    got = rng.uniforms(torch.tensor([rng.signed(k) for k in keys]), torch.tensor(positions), torch.tensor(indices))
    wanted = [[uniform_by_integers(k, p, i) for i in indices] for k, p in zip(keys, positions, strict=True)]
    assert got.tolist() == wanted


def test_gumbel_noise_is_minus_log_minus_log_of_the_uniform():
    key, position = 2**64 - 3, 17
    got = rng.gumbels(torch.tensor([rng.signed(key)]), torch.tensor([position]), torch.arange(500))[0].tolist()
    wanted = [-math.log(-math.log(uniform_by_integers(key, position, i))) for i in range(500)]
    assert got == pytest.approx(wanted, rel=1e-14, abs=1e-14)


def index_of_word(word: int, key: int, position: int) -> int:
    """Where the stream of (key, position) holds this word: SplitMix64 run backwards."""
    for shift, factor in ((31, rng.MIX_2), (27, rng.MIX_1)):
        word = undo_shift(word, shift) * pow(factor, -1, 2**64) % 2**64
    state = undo_shift(word, 30)
    seed = rng.mix64(key ^ rng.mix64(position))
    return (state - seed) * pow(rng.GOLDEN, -1, 2**64) % 2**64 - 1


def undo_shift(word: int, shift: int) -> int:
    """x from x ^ (x >> shift)."""
    x = word
    for _ in range(64 // shift):
        x = word ^ (x >> shift)
    return x


def test_noise_is_finite_where_the_word_is_all_zeros_or_all_ones():
    key, position = 11, 3
    indices = [index_of_word(word, key, position) for word in (0, 2**64 - 1)]
    place = (torch.tensor([key]), torch.tensor([position]), torch.tensor([rng.signed(i) for i in indices]))
    assert rng.uniforms(*place)[0].tolist() == [0.5 / 2**52, 1 - 0.5 / 2**52]
    assert rng.gumbels(*place).isfinite().all()


def test_index_may_differ_from_row_to_row():
    key_N, position_N = torch.tensor([5, -6]), torch.tensor([0, 9])
    rows = rng.uniforms(key_N, position_N, torch.tensor([[3, 4], [8, 1]]))
    whole = rng.uniforms(key_N, position_N, torch.arange(10))
    assert rows.tolist() == [[whole[0, 3], whole[0, 4]], [whole[1, 8], whole[1, 1]]]


def test_uniforms_are_uniform_over_keys_over_positions_and_over_indices():
    """Kolmogorov's distance of 20 000 uniforms stays under its 1e-6 quantile, 2.69 / sqrt(n), along each name."""
    count = 20_000
    ones, ramp = torch.ones(count, dtype=torch.long), torch.arange(count)
    for noise in (
        rng.uniforms(ramp, ones, ones[:1]),
        rng.uniforms(ones, ramp, ones[:1]),
        rng.uniforms(ones[:1], ones[:1], ramp),
    ):
        sorted_N = noise.flatten().sort().values
        distance = (sorted_N - (ramp + 0.5) / count).abs().max()
        assert distance < 2.69 / math.sqrt(count)


def test_every_name_of_a_path_its_order_and_its_kind_change_the_key():
    paths = [(), (0,), ("0",), (0, 0), (1,), (0, 1), (1, 0), ("a", "b"), ("b", "a"), ("ab",), ("a", "b", 0), (-1,)]
    assert len({rng.derive_key(*path) for path in paths}) == len(paths)
    assert all(0 <= rng.derive_key(*path) < 2**64 for path in paths)


def test_no_two_requests_of_a_run_share_a_key():
    """Every (step, problem, draw) of a run of 30 steps x 16 problems x 16 draws, beside those of the next seed.

    By chance, 15 360 keys of 64 bits hold an equal pair with probability 6e-12.
    """
    keys = {
        rng.derive_key(seed, step, f"problem-{problem}", draw)
        for seed in (0, 1)
        for step in range(30)
        for problem in range(16)
        for draw in range(16)
    }
    assert len(keys) == 2 * 30 * 16 * 16


def test_signed_keeps_the_bits():
    for word in EDGES:
        assert rng.signed(word) % 2**64 == word
        assert -(2**63) <= rng.signed(word) < 2**63
