"""Surrogates, KL estimators and denominators, element by element."""

import math

import pytest
import torch

from rung.core.records import Counts, Term
from rung.objectives.kl import KLS, k1, k2, k3
from rung.objectives.policy import SURROGATES, clip, clipped, pg
from rung.objectives.reduce import DENOMINATORS, masked_sum, segment_sum, total_loss
from rung.train.config import Method

RATIOS = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0]


def gradient(function, value_N):
    value_N = value_N.clone().requires_grad_()
    return torch.autograd.grad(function(value_N).sum(), value_N)[0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_stops_the_gradient_beyond_either_bound_only_where_it_would_go_further(sign):
    """Bounds 0.8 and 1.28.  A > 0: no gradient above 1.28.  A < 0: none below 0.8.  Elsewhere r A."""
    old_N = torch.full((len(RATIOS),), -1.5, dtype=torch.float64)
    logp_N = old_N + torch.tensor(RATIOS, dtype=torch.float64).log()
    advantage_N = torch.full_like(old_N, 2 * sign)
    found = gradient(lambda x: clip(x, old_N, advantage_N, eps_low=0.2, eps_high=0.28), logp_N)
    passes = [r <= 1.28 if sign > 0 else r >= 0.8 for r in RATIOS]
    expected = [2 * sign * r * p for r, p in zip(RATIOS, passes, strict=True)]
    assert found.tolist() == pytest.approx(expected)
    low_N, high_N = clipped(logp_N, old_N, advantage_N, eps_low=0.2, eps_high=0.28)
    assert (~(low_N | high_N)).tolist() == passes
    assert not (low_N & high_N).any()
    assert bool(low_N.any()) == (sign < 0)


def test_the_clip_is_the_smaller_of_both_branches():
    old_N = torch.zeros(len(RATIOS), dtype=torch.float64)
    logp_N = torch.tensor(RATIOS, dtype=torch.float64).log()
    for a in (1.5, -1.5):
        expected = [min(r * a, min(max(r, 0.8), 1.28) * a) for r in RATIOS]
        assert clip(logp_N, old_N, old_N + a, eps_low=0.2, eps_high=0.28).tolist() == pytest.approx(expected)


def test_at_ratio_one_the_clip_has_the_gradient_of_the_policy_gradient():
    logp_N = torch.tensor([-0.1, -2.0, -7.0], dtype=torch.float64)
    advantage_N = torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64)
    by_clip = gradient(lambda x: clip(x, logp_N, advantage_N), logp_N)
    by_pg = gradient(lambda x: pg(x, logp_N, advantage_N), logp_N)
    assert by_clip.tolist() == by_pg.tolist() == advantage_N.tolist()


def test_kl_estimators_and_their_gradients_are_those_of_the_guide():
    r_N = torch.tensor([-3.0, -0.2, 0.0, 1e-6, 0.7, 4.0], dtype=torch.float64)
    zero_N = torch.zeros_like(r_N)
    assert k1(r_N, zero_N).tolist() == r_N.tolist()
    assert k2(r_N, zero_N).tolist() == pytest.approx([r * r / 2 for r in r_N.tolist()])
    assert k3(r_N, zero_N).tolist() == pytest.approx([math.expm1(-r) + r for r in r_N.tolist()])
    assert gradient(lambda x: k2(x, zero_N), r_N).tolist() == pytest.approx(r_N.tolist())
    assert gradient(lambda x: k3(x, zero_N), r_N).tolist() == pytest.approx([1 - math.exp(-r) for r in r_N.tolist()])


def test_a_large_log_ratio_keeps_its_gradient():
    """verl, SkyRL and OpenRLHF clamp k3 to 10: no gradient where the policy fell furthest behind the reference."""
    r_N = torch.tensor([-5.0, 30.0], dtype=torch.float64)
    assert gradient(lambda x: k3(x, torch.zeros_like(x)), r_N).tolist() == pytest.approx([1 - math.exp(5), 1.0])


def test_every_name_in_a_method_has_an_entry():
    fields = {"surrogate": SURROGATES, "kl": KLS, "denominator": DENOMINATORS}
    for field, table in fields.items():
        assert set(Method.__annotations__[field].__args__) == set(table)


def test_denominators_average_a_ragged_step_as_they_say():
    """Two groups: sequences of 1 and 3 tokens, and of 2 and 2; every token's value is its sequence's number."""
    groups, values, limit = [[1, 3], [2, 2]], [[1.0, 2.0], [4.0, 8.0]], 5
    counts = Counts(tokens=8, sequences=4, groups=2)
    expected = {
        "sequence_mean": (1 + 2 + 4 + 8) / 4,
        "tokens": (1 + 3 * 2 + 2 * 4 + 2 * 8) / 8,
        "group_tokens": ((1 + 3 * 2) / 4 + (2 * 4 + 2 * 8) / 4) / 2,
        "constant": (1 + 3 * 2 + 2 * 4 + 2 * 8) / 5 / 4,
        "sequences": (1 + 3 * 2 + 2 * 4 + 2 * 8) / 4,
    }
    for name, denominator in DENOMINATORS.items():
        total = sum(
            own * denominator.weight(own, sum(group), limit) * value
            for group, of_group in zip(groups, values, strict=True)
            for own, value in zip(group, of_group, strict=True)
        )
        assert total / denominator.count(counts) == pytest.approx(expected[name]), name


@pytest.mark.parametrize("name", DENOMINATORS)
def test_a_step_without_a_single_trainable_token_divides_by_no_zero(name):
    denominator = DENOMINATORS[name]
    assert math.isfinite(denominator.weight(0, 0, 5))
    assert denominator.count(Counts(tokens=0, sequences=2, groups=1)) > 0


def test_masked_values_are_never_seen_not_even_nan():
    value_N = torch.tensor([1.0, math.nan, 2.0, math.inf])
    mask_N = torch.tensor([True, False, True, False])
    assert masked_sum(value_N, mask_N).item() == 3.0
    total, parts = total_loss({"a": Term(value_N, mask_N, 2.0), "b": Term(-value_N, mask_N, 6.0)})
    assert (total.item(), parts) == (1.0, {"a": 1.5, "b": -0.5})
    nan_outside = segment_sum(torch.tensor([math.nan, 1, 2, 4]), torch.tensor([-1, 1, 0, 1]), 3)
    assert nan_outside.tolist() == [2.0, 5.0, 0.0]
