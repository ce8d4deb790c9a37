"""The two-level law against its definition in Python's own numbers, and against counted frequencies."""

import math

import pytest
import torch

from rung.core.records import Sampling
from rung.core.rng import mix64, splitmix64
from rung.engine import sampling
from rung.engine.sampling import BLOCK, BLOCK_STREAM, Laws, draw
from rung.lm import fused

FALSE_ALARM = 1e-6  # of every chi-square test below; the seeds are fixed, so it rings always or never


def asked(**options) -> Sampling:
    return Sampling(max_tokens=1, **options)


MIXTURE = [
    asked(),
    asked(temperature=0.0),
    asked(temperature=0.7),
    asked(temperature=1.6, top_k=5),
    asked(top_k=40, top_p=0.8),
    asked(top_p=0.5),
    asked(min_p=0.2),
    asked(temperature=0.5, top_k=30, top_p=0.9, min_p=0.05),
    asked(temperature=0.0, top_k=2, top_p=0.1),
    asked(top_k=10**6),
]


def gumbel(key: int, position: int, index: int) -> float:
    word = splitmix64(mix64(key ^ mix64(position)), index)
    return -math.log(-math.log(((word >> 12) + 0.5) / 2**52))


def kept_logits(logits: list[float], s: Sampling) -> list[float]:
    """Logits after temperature and filters, as the definitions say it: sort, walk down, drop."""
    if s.temperature == 0:
        best = logits.index(max(logits))
        return [0.0 if v == best else -math.inf for v in range(len(logits))]
    z = [x / s.temperature for x in logits]
    if s.top_k:
        kth = sorted(z, reverse=True)[min(s.top_k, len(z)) - 1]
        z = [x if x >= kth else -math.inf for x in z]
    total = sum(math.exp(x) for x in z)
    if s.top_p < 1:
        nucleus = {x for x in z if sum(math.exp(y) for y in z if y > x) < s.top_p * total}
        z = [x if x in nucleus else -math.inf for x in z]
    return [x if s.min_p == 0 or math.exp(x - max(z)) >= s.min_p else -math.inf for x in z]


def log_softmax(z: list[float]) -> list[float]:
    top = max(z)
    lse = top + math.log(sum(math.exp(x - top) for x in z))
    return [x - lse for x in z]


def best_two(scores: dict[int, float]) -> tuple[int, float]:
    ranked = sorted(scores, key=lambda i: -scores[i])
    return ranked[0], scores[ranked[0]] - scores[ranked[1]] if len(ranked) > 1 else math.inf


def draw_by_definition(logits: list[float], s: Sampling, key: int, position: int) -> tuple[int, float, float, float]:
    """Token, logp_sampled, logp_raw and gap of one row, token by token."""
    if s.temperature == 0:
        token, gap = best_two(dict(enumerate(logits)))
        return token, 0.0, log_softmax(logits)[token], gap
    z = kept_logits(logits, s)
    blocks = {b: z[b * BLOCK : (b + 1) * BLOCK] for b in range(math.ceil(len(z) / BLOCK))}
    lse = {b: math.log(sum(math.exp(x) for x in zs)) for b, zs in blocks.items() if max(zs) > -math.inf}
    block, gap_b = best_two({b: value + gumbel(key, position, BLOCK_STREAM + b) for b, value in lse.items()})
    inside = {block * BLOCK + i: x for i, x in enumerate(blocks[block]) if x > -math.inf}
    token, gap_v = best_two({v: x + gumbel(key, position, v) for v, x in inside.items()})
    return token, log_softmax(z)[token], log_softmax(logits)[token], min(gap_b, gap_v)


def some_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2.5


@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 600])
def test_a_mixed_batch_draws_what_the_definition_draws(vocabulary):
    logits_NV = some_logits(len(MIXTURE), vocabulary)
    keys = [(7919**5 * (i + 1)) % 2**64 for i in range(len(MIXTURE))]
    positions = [3 * i for i in range(len(MIXTURE))]
    got = draw(logits_NV, torch.tensor(positions), Laws.of(MIXTURE, keys))
    for row, (s, key, position) in enumerate(zip(MIXTURE, keys, positions, strict=True)):
        token, logp_sampled, logp_raw, gap = draw_by_definition(logits_NV[row].tolist(), s, key, position)
        assert got.token_N[row] == token
        assert got.logp_sampled_N[row].item() == pytest.approx(logp_sampled, abs=2e-6)
        assert got.logp_raw_N[row].item() == pytest.approx(logp_raw, abs=2e-6)
        assert min(got.gap_N[row].item(), 1e29) == pytest.approx(
            min(gap, 1e29), abs=4e-6
        )  # beyond: nothing else is left


@pytest.mark.parametrize("s", [s for s in MIXTURE if s.temperature > 0], ids=str)
def test_probability_of_block_times_probability_within_it_is_the_filtered_softmax(s):
    logits_NV = some_logits(1, 600, seed=1)
    laws = Laws.of([s], [0])
    _, lse_NM, _, floor_N = sampling._levels(logits_NV, torch.tensor([[1 / s.temperature]]), laws, slice(0, 1))
    z_V = logits_NV[0] / s.temperature
    z_V = torch.where(z_V < floor_N, -torch.inf, z_V)
    block_V = (lse_NM - lse_NM.logsumexp(1))[0].exp()[torch.arange(600) // BLOCK]
    within_V = (z_V - lse_NM[0][torch.arange(600) // BLOCK]).exp()
    wanted_V = torch.tensor(log_softmax(kept_logits(logits_NV[0].tolist(), s))).exp()
    assert torch.allclose(block_V * within_V, wanted_V, atol=1e-6)
    assert torch.equal(block_V * within_V > 0, wanted_V > 0)


# Token 0, whose noise word would be that of block 0, and the other blocks' first tokens carry the mass.
FEW = torch.full((600,), -math.inf)
FEW[[0, 1, 2, 100, 256, 300, 512, 599]] = torch.tensor([2.0, 1.0, 1.5, 0.5, 1.2, 1.8, 0.8, 0.3])


def p_value(count_C: torch.Tensor, law_C: torch.Tensor) -> float:
    """Pearson's chi-square: probability of a larger distance between these counts and this law."""
    wanted_C = law_C * count_C.sum()
    assert wanted_C.min() > 5
    distance = ((count_C - wanted_C) ** 2 / wanted_C).sum().double()
    return torch.special.gammaincc(torch.tensor((len(law_C) - 1) / 2, dtype=torch.double), distance / 2).item()


def frequencies_p(s: Sampling, draws: int = 4000) -> float:
    laws = Laws.of([s] * draws, range(draws))
    token_N = draw(FEW.expand(draws, -1), torch.full((draws,), 9), laws).token_N
    law_V = torch.tensor(log_softmax(kept_logits(FEW.tolist(), s)), dtype=torch.double).exp()
    count_V = token_N.bincount(minlength=600)
    assert count_V[law_V == 0].sum() == 0
    return p_value(count_V[law_V > 0], law_V[law_V > 0])


def pairs_p(draws: int = 4000) -> float:
    """Tokens of one key at positions 4 and 5 are to be independent."""
    laws = Laws.of([asked()] * draws, range(draws))
    first_N = draw(FEW.expand(draws, -1), torch.full((draws,), 4), laws).token_N
    second_N = draw(FEW.expand(draws, -1), torch.full((draws,), 5), laws).token_N
    law_V = FEW.double().softmax(0)
    law_C = torch.outer(law_V, law_V).flatten()
    count_C = (first_N * 600 + second_N).bincount(minlength=600 * 600)
    return p_value(count_C[law_C > 0], law_C[law_C > 0])


@pytest.mark.parametrize("s", [asked(), asked(temperature=0.6), asked(temperature=1.5, top_k=4), asked(top_p=0.7)])
def test_tokens_come_as_often_as_the_law_says(s):
    assert frequencies_p(s) > FALSE_ALARM


def test_tokens_of_successive_positions_are_independent():
    assert pairs_p() > FALSE_ALARM


def test_the_count_notices_noise_shared_by_the_two_levels(monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK_STREAM", 0)
    assert frequencies_p(asked()) < FALSE_ALARM


def test_the_count_notices_noise_that_ignores_the_position(monkeypatch):
    true_gumbels = sampling.gumbels
    monkeypatch.setattr(
        sampling, "gumbels", lambda key_N, position_N, index: true_gumbels(key_N, position_N * 0, index)
    )
    assert pairs_p() < FALSE_ALARM


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    logits_NV, keys, positions = some_logits(20, 700, seed=2), list(range(20)), torch.arange(20)
    samplings = (MIXTURE * 2)[:20]
    together = draw(logits_NV, positions, Laws.of(samplings, keys))
    for row in range(20):
        alone = draw(logits_NV[row : row + 1], positions[row : row + 1], Laws.of([samplings[row]], [keys[row]]))
        for name in ("token_N", "logp_sampled_N", "logp_raw_N", "gap_N"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_logits_wrong_by_less_than_half_the_gap_draw_the_same_token():
    """The gap is what the tests of batch independence lean on: errors below it cannot move a token."""
    samplings, keys, positions = [asked()] * 400, range(400), torch.arange(400)
    logits_NV = some_logits(400, 600, seed=3)
    exact = draw(logits_NV, positions, Laws.of(samplings, keys))
    error_NV = (torch.rand(400, 600, generator=torch.Generator().manual_seed(4)) - 0.5) * 0.98
    moved = draw(logits_NV + error_NV * exact.gap_N[:, None].clamp(max=5).float(), positions, Laws.of(samplings, keys))
    assert torch.equal(moved.token_N, exact.token_N)
    coarse = draw(logits_NV + error_NV * 4, positions, Laws.of(samplings, keys))
    assert not torch.equal(coarse.token_N, exact.token_N)  # the same errors without the bound do move tokens


def test_greedy_takes_the_lowest_id_of_equal_logits():
    logits_NV = torch.zeros(1, 600)
    logits_NV[0, [70, 300, 301]] = 1.0
    got = draw(logits_NV, torch.tensor([0]), Laws.of([asked(temperature=0.0)], [5]))
    assert (got.token_N.item(), got.logp_sampled_N.item(), got.gap_N.item()) == (70, 0.0, 0.0)


def test_filters_keep_every_token_that_equals_the_last_one_kept():
    logits_NV = torch.log(torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    for s, kept in (
        (asked(top_k=2), {0, 1, 2}),
        (asked(top_p=0.5), {0, 1, 2}),
        (asked(top_p=0.3), {0}),
        (asked(top_p=0.85), {0, 1, 2, 3, 4}),
        (asked(top_k=1, top_p=0.99), {0}),
        (asked(min_p=0.5), {0, 1, 2}),
        (asked(min_p=1.0), {0}),
    ):
        draws = 400  # a token of probability 1/10 stays unseen with probability 5e-19
        got = draw(logits_NV.expand(draws, -1), torch.zeros(draws).long(), Laws.of([s] * draws, range(draws)))
        assert set(got.token_N.tolist()) == kept, s


def test_filters_are_those_of_transformers_where_nothing_ties():
    from transformers.generation import logits_process as theirs

    logits_NV = some_logits(6, 3000, seed=5)
    for k, p, m in (
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.02, 0.0),
        (0, 1.0, 0.05),
        (200, 0.7, 0.01),
        (2999, 0.999, 0.0),
    ):
        wanted_NV = logits_NV / 0.8
        wanted_NV = theirs.TopKLogitsWarper(k)(None, wanted_NV) if k else wanted_NV
        wanted_NV = theirs.TopPLogitsWarper(p)(None, wanted_NV) if p < 1 else wanted_NV
        wanted_NV = theirs.MinPLogitsWarper(m)(None, wanted_NV) if m else wanted_NV
        laws = Laws.of([asked(temperature=0.8, top_k=k, top_p=p, min_p=m)] * 6, range(6))
        floor_N = sampling._floors(logits_NV * (1 / laws.temperature_N[:, None]), laws, slice(0, 6))
        smallest_N = wanted_NV.masked_fill(wanted_NV == -math.inf, math.inf).amin(1)
        kept_N = (logits_NV / 0.8 >= floor_N[:, None] - 1e-6).sum(1)
        assert torch.equal(kept_N, wanted_NV.isfinite().sum(1)), (k, p, m)
        assert (floor_N <= smallest_N + 1e-6).all()


def test_bf16_logits_draw_as_their_fp32_copies_do():
    logits_NV = some_logits(16, 600, seed=6).bfloat16()
    laws = Laws.of([asked()] * 16, range(16))
    low, high = draw(logits_NV, torch.arange(16), laws), draw(logits_NV.float(), torch.arange(16), laws)
    assert torch.equal(low.token_N, high.token_N)
    assert torch.equal(low.logp_raw_N, high.logp_raw_N)
    assert low.logp_raw_N.dtype == torch.float32


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_shows_in_logp_raw(poison):
    logits_NV = some_logits(2, 600)
    logits_NV[0, 411] = poison
    got = draw(logits_NV, torch.tensor([0, 0]), Laws.of([asked(), asked()], [1, 2]))
    assert got.logp_raw_N.isfinite().tolist() == [False, True]


def test_far_logits_neither_overflow_nor_lose_the_law():
    """A block 3000 below the others has probability 0, not NaN; a shift of all logits changes no token."""
    logits_NV, positions_N, laws = some_logits(8, 600, seed=7), torch.arange(8), Laws.of([asked()] * 8, range(8))
    far_NV = logits_NV.clone()
    far_NV[:, :256] -= 3000
    got = draw(far_NV, positions_N, laws)
    assert (got.token_N >= 256).all()
    wanted_NV = logits_NV[:, 256:].log_softmax(1)
    assert torch.allclose(got.logp_raw_N, wanted_NV.gather(1, got.token_N[:, None] - 256)[:, 0])
    shifted = draw(logits_NV + 1024, positions_N, laws)
    assert torch.equal(shifted.token_N, draw(logits_NV, positions_N, laws).token_N)


def test_the_law_named_v1_draws_these_tokens():
    """Whoever changes these changes the law: give `NOISE_LAW` a new name.  The tokens are those of the definition."""
    logits_V = [math.sin(v) * 3 for v in range(600)]
    keys = [0, 1, 2**63, 2**64 - 1]
    by_hand = [draw_by_definition(logits_V, asked(), key, 12)[0] for key in keys]
    logits_NV = torch.tensor(logits_V).expand(4, -1)
    got = draw(logits_NV, torch.full((4,), 12), Laws.of([asked()] * 4, keys)).token_N.tolist()
    assert got == by_hand == [423, 441, 322, 246]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.2])
def test_bf16_logits_draw_alike_through_the_kernel_and_through_torch(monkeypatch, temperature):
    logits_NV, position_N = some_logits(40, 1000).bfloat16(), torch.arange(40)
    laws = Laws.of([asked(temperature=temperature)] * 40, range(40))
    with torch.inference_mode():
        kernel = draw(logits_NV, position_N, laws)
        monkeypatch.setattr(fused, "serves", lambda x: False)
        twin = draw(logits_NV, position_N, laws)
    assert torch.equal(kernel.token_N, twin.token_N)
    torch.testing.assert_close(kernel.logp_sampled_N, twin.logp_sampled_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(kernel.logp_raw_N, twin.logp_raw_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(kernel.gap_N, twin.gap_N, rtol=0, atol=1e-5)
