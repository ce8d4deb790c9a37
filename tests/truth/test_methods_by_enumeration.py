"""Expected gradients of every method and KL option, summed over all groups, against NumPy sums of the guide's formulas.

The left side is production code: `group_streams`, `build_objective`, autograd.  The right side imports none of it.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from worlds import SETUPS, by_numpy, direction, ours, places, relative

from rung.train.config import METHODS, Method

EXACT = 1e-10
LONG = SETUPS["ended"].world.prompts[1]
PLACES = [(*place, 2) for place in places("fixed", "ended")]
THREES = [(*place, 3) for place in places("ended")]
WITH_THREES = [*PLACES, *THREES]  # 729 and 225 groups of two, 3375 of three
KLS = {"none": 0.0, "k1_reward": 0.3, "square": 0.3, "k3_loss": 0.3}
CACHE = 2  # of 3 tokens: shaping is active, and unequal, in the world with an end token


def explicit(method, kl, **changes):
    """The preset with a KL option; the overlong cache is written out, because the oracle has no default for it."""
    cache = CACHE if method.overlong == "shape" else 0
    return replace(method, kl=kl, kl_coef=KLS[kl], overlong_cache=cache, **changes)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("setup", "prompt", "size"), WITH_THREES)
def test_expected_gradient_of_every_preset_with_every_kl_is_the_sum_over_all_groups(setup, prompt, size, name, kl):
    method = explicit(METHODS[name], kl)
    assert relative(ours(setup, prompt, size, method), by_numpy(setup, prompt, size, method)) < EXACT


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", [*(n for n in METHODS if METHODS[n].surrogate == "clip"), "rloo_sequence"])
def test_expected_gradient_off_policy_is_the_sum_over_all_groups_of_the_sampler(name, kl):
    presets = {**METHODS, "rloo_sequence": replace(METHODS["rloo"], surrogate="clip_sequence", eps_high=0.4)}
    method = explicit(presets[name], kl, eps_low=0.3)
    for setup, prompt in places("ended"):
        expected = by_numpy(setup, prompt, 2, method, on_policy=False)
        assert relative(ours(setup, prompt, 2, method, on_policy=False), expected) < EXACT
        unclipped = replace(method, eps_low=1e9, eps_high=1e9)
        assert relative(by_numpy(setup, prompt, 2, unclipped, on_policy=False), expected) > 0.01  # the clip was met


@pytest.mark.parametrize("denominator", ["sequence_mean", "tokens", "group_tokens", "constant", "sequences"])
@pytest.mark.parametrize("advantage", ["none", "mean", "leave_one_out", "std"])
def test_every_cell_of_the_spine_is_the_sum_over_all_groups(advantage, denominator):
    for surrogate, entropy_coef in itertools.product(("pg", "clip"), (0.0, 0.2)):
        method = Method(advantage=advantage, surrogate=surrogate, denominator=denominator, entropy_coef=entropy_coef)
        for setup, prompt in places("ended"):
            assert relative(ours(setup, prompt, 2, method), by_numpy(setup, prompt, 2, method)) < EXACT


# What those sums are, in closed form: the derivations of docs/guide/methods.md.


@pytest.mark.parametrize(("setup", "prompt", "size"), WITH_THREES)
def test_leave_one_out_is_unbiased_and_the_group_mean_is_too_small_by_exactly_one_over_g(setup, prompt, size):
    s = SETUPS[setup]
    true = -s.oracle(prompt).return_gradient(s.rewards(prompt))
    cells = {("leave_one_out", "sequences"): 1.0, ("mean", "sequences"): 1 - 1 / size}
    cells |= {("mean", "constant"): (1 - 1 / size) / 3}
    if size == 2:
        cells |= {("none", "sequences"): 1.0, ("leave_one_out", "constant"): 1 / 3}
    for (advantage, denominator), scale in cells.items():
        method = Method(advantage=advantage, surrogate="clip", denominator=denominator)
        assert relative(ours(setup, prompt, size, method), scale * true) < EXACT


@pytest.mark.parametrize(("setup", "prompt"), places("fixed", "ended"))
@pytest.mark.parametrize("kl", ["k1_reward", "square"])
def test_k1_in_the_reward_and_the_sequence_square_descend_exactly_the_reverse_kl(setup, prompt, kl):
    s, beta = SETUPS[setup], 0.3
    oracle = s.oracle(prompt)
    method = replace(METHODS["rloo"], kl=kl, kl_coef=beta)
    true = -oracle.return_gradient(s.rewards(prompt)) + beta * oracle.kl_gradient()
    assert relative(ours(setup, prompt, 2, method), true) < EXACT


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "dapo_paper"])
def test_the_sequence_square_adds_exactly_the_reverse_kl_under_every_denominator(name):
    for setup, prompt in places("fixed", "ended"):
        without = explicit(METHODS[name], "none")
        added = ours(setup, prompt, 2, explicit(METHODS[name], "square")) - ours(setup, prompt, 2, without)
        assert relative(added, KLS["square"] * SETUPS[setup].oracle(prompt).kl_gradient()) < EXACT


@pytest.mark.parametrize(("setup", "prompt"), places("fixed", "ended"))
def test_k3_as_a_loss_descends_the_forward_kl_of_every_token_it_visits(setup, prompt):
    s, beta = SETUPS[setup], 0.3
    oracle = s.oracle(prompt)
    policy, _, reference = s.tables()
    forward = np.zeros_like(s.policy.logits_NV.numpy())
    for prefix, chance in oracle.visits().items():  # grad KL(ref || pi) in the logits of one prefix is pi - ref
        p, q = (np.exp(t[prefix]) / np.exp(t[prefix]).sum() for t in (policy, reference))
        forward[oracle.rows[prefix]] += chance * (p - q)
    method = Method(advantage="mean", surrogate="pg", denominator="sequences")
    added = ours(setup, prompt, 2, replace(method, kl="k3_loss", kl_coef=beta)) - ours(setup, prompt, 2, method)
    assert relative(added, beta * forward) < EXACT
    assert direction(forward, oracle.kl_gradient()) > 0.05  # and that is another direction than the reverse KL


@pytest.mark.parametrize("prompt", SETUPS["ended"].world.prompts)
def test_the_sequence_mean_weighs_a_completion_by_one_over_its_length_and_points_elsewhere(prompt):
    s = SETUPS["ended"]
    oracle, reward = s.oracle(prompt), s.rewards(prompt)
    lengths = np.array([len(c) for c in s.world.completions()])
    derived = -(1 - 1 / 2) * oracle.return_gradient((reward - (oracle.chance * reward).sum()) / lengths)
    method = Method(advantage="mean", surrogate="pg", denominator="sequence_mean")
    found = ours("ended", prompt, 2, method)
    assert relative(found, derived) < EXACT
    assert direction(found, -oracle.return_gradient(reward)) > 0.05


def test_token_denominators_are_unbiased_for_equal_lengths_and_biased_otherwise():
    method = Method(advantage="leave_one_out", surrogate="pg", denominator="tokens")
    (setup, prompt), *uneven = places("fixed", "ended")
    true = -SETUPS[setup].oracle(prompt).return_gradient(SETUPS[setup].rewards(prompt))
    assert relative(ours(setup, prompt, 2, method), true / 3) < EXACT
    for setup, prompt in uneven:
        true = -SETUPS[setup].oracle(prompt).return_gradient(SETUPS[setup].rewards(prompt))
        assert direction(ours(setup, prompt, 2, method), true) > 0.05


def std_factor(p, size):
    """f_G(p) of the guide: E[A | right] - E[A | wrong] when the other G - 1 samples are right with probability p."""
    from math import comb

    def advantage(right, own):
        rewards = np.array([1.0] * right + [0.0] * (size - right))
        return (own - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)

    chance = [comb(size - 1, k) * p**k * (1 - p) ** (size - 1 - k) for k in range(size)]
    return sum(c * (advantage(k + 1, 1.0) - advantage(k, 0.0)) for k, c in enumerate(chance))


@pytest.mark.parametrize(("setup", "prompt", "size"), WITH_THREES)
def test_dividing_by_the_std_keeps_the_direction_for_right_or_wrong_and_reweights_prompts(setup, prompt, size):
    s = SETUPS[setup]
    oracle, right = s.oracle(prompt), s.rewards(prompt, binary=True)
    p = (oracle.chance * right).sum()
    method = Method(advantage="std", surrogate="pg", denominator="sequences")
    derived = -std_factor(p, size) * oracle.return_gradient(right)
    assert relative(ours(setup, prompt, size, method, binary=True), derived) < EXACT
    if size == 2:
        real = ours(setup, prompt, size, method)  # real-valued rewards: another direction
        assert direction(real, -oracle.return_gradient(s.rewards(prompt))) > 0.01


def has_contrast(group):
    return len({sample.reward for sample in group}) > 1


def test_dynamic_sampling_divides_by_the_chance_of_a_contrast():
    s, prompt = SETUPS["ended"], LONG
    oracle, right = s.oracle(prompt), s.rewards(prompt, binary=True)
    p = (oracle.chance * right).sum()
    method = Method(advantage="std", surrogate="clip", denominator="sequences")
    derived = -std_factor(p, 3) * oracle.return_gradient(right) / (1 - p**3 - (1 - p) ** 3)
    assert relative(ours("ended", prompt, 3, method, binary=True, accept=has_contrast), derived) < EXACT
    tokens = explicit(METHODS["dapo"], "none")
    expected = by_numpy("ended", prompt, 2, tokens, binary=True, accept=lambda rewards: len(set(rewards)) > 1)
    assert relative(ours("ended", prompt, 2, tokens, binary=True, accept=has_contrast), expected) < EXACT


@pytest.mark.parametrize(("setup", "prompt"), places("fixed", "ended"))
def test_off_policy_only_the_ratio_of_whole_sequences_is_unbiased(setup, prompt):
    s = SETUPS[setup]
    true = -s.oracle(prompt).return_gradient(s.rewards(prompt))
    wide = Method(advantage="leave_one_out", denominator="sequences", eps_low=1e9, eps_high=1e9)
    of_sequences = ours(setup, prompt, 2, replace(wide, surrogate="clip_sequence"), on_policy=False)
    of_tokens = ours(setup, prompt, 2, replace(wide, surrogate="clip"), on_policy=False)
    without = ours(setup, prompt, 2, replace(wide, surrogate="pg"), on_policy=False)
    # a baseline drawn from the same sampler is independent of the sample: the product of ratios stays exact
    assert relative(of_sequences, true) < EXACT
    assert direction(of_tokens, true) > 0.05
    assert direction(without, true) > 0.05


@pytest.mark.parametrize(("setup", "prompt"), places("fixed", "ended"))
def test_on_policy_the_gradient_of_the_clip_is_that_of_the_plain_policy_gradient(setup, prompt):
    for advantage in ("mean", "std"):
        method = Method(advantage=advantage, denominator="sequence_mean")
        clip, pg = (ours(setup, prompt, 2, replace(method, surrogate=name)) for name in ("clip", "pg"))
        assert relative(clip, pg) < 1e-14
