"""A method as streams and an objective: invariances, what is dead, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from rung import truth
from rung.core.errors import ConfigError
from rung.core.records import Counts, Origin, TokenScores
from rung.objectives.reduce import total_loss
from rung.train.config import METHODS, Method
from rung.train.data import count, pack, pack_one
from rung.train.methods import (
    build_objective,
    check_method,
    group_streams,
    is_dead,
    measure,
    needs_reference,
    without_contrast,
)

WORLD = truth.World(vocabulary=3, max_tokens=6, prompts=((0,), (1, 0, 2), (2, 2)))
LENGTHS = [[6, 1, 4], [2, 2, 5], [3, 6, 1]]  # of the samples of each prompt's group
METHODS_TRIED = {
    **METHODS,
    "rloo_sequence": replace(METHODS["rloo"], surrogate="clip_sequence"),
    "square": replace(METHODS["dr_grpo"], kl="square", kl_coef=0.2, entropy_coef=0.1),
    "k1_tokens": replace(METHODS["dapo"], kl="k1_reward", kl_coef=0.2),
}


def random_policy(seed):
    return truth.TablePolicy.random(WORLD, torch.Generator().manual_seed(seed))


POLICY, OLD, REFERENCE = (random_policy(seed) for seed in range(3))


def random_groups(method, *, off_policy=True, holes=True):
    """Ragged groups of three prompts; with holes, a sample's third completion token came from a tool."""
    generator = torch.Generator().manual_seed(3)
    groups = []
    for number, (prompt, lengths) in enumerate(zip(WORLD.prompts, LENGTHS, strict=True)):
        group = []
        for length in lengths:
            completion = tuple(torch.randint(3, (length,), generator=generator).tolist())
            reward = float(torch.randn((), generator=generator))
            sample = WORLD.sample(prompt, completion, group_id=number, reward=reward)
            if holes and length > 3:
                hole = len(prompt) + 2
                sample.trainable[hole], sample.origin[hole] = False, Origin.TOOL
            group.append(sample)
        for name, policy in {"logp_ref": REFERENCE, **({"logp_old": OLD} if off_policy else {})}.items():
            group = [with_scores(sample, name, policy) for sample in group]
        groups.append(group_streams(method, group, max_tokens=WORLD.max_tokens))
    return groups


def with_scores(sample, name, policy):
    logp_T = policy.scores(pack_one([sample], counts=count([sample]))).logp_T.detach()
    return replace(sample, streams={**sample.streams, name: logp_T})


def loss_and_gradient(method, batches):
    """Summed over the batches, as the learner does."""
    logits_NV = POLICY.logits_NV.clone().requires_grad_()
    policy = truth.TablePolicy(WORLD, logits_NV)
    total = torch.stack([total_loss(build_objective(method)(policy, batch))[0] for batch in batches]).sum()
    return total.detach(), torch.autograd.grad(total, logits_NV)[0]


def flat(groups):
    return [sample for group in groups for sample in group]


def same(left, right, close=1e-13):
    return all(float((a - b).norm()) <= close * float(b.norm()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_split_packing_or_shared_prompts(name):
    method = METHODS_TRIED[name]
    samples = flat(random_groups(method))
    counts = count(samples)
    whole = loss_and_gradient(method, [pack_one(samples, counts=counts, share_prompts=False)])
    assert float(whole[1].norm()) > 1e-3
    for share in (False, True):
        for tokens_per_batch in (1, 9, 17, 1000):
            batches = pack(samples, counts=counts, tokens_per_batch=tokens_per_batch, share_prompts=share)
            assert same(loss_and_gradient(method, batches), whole), (share, tokens_per_batch)
    assert len(pack(samples, counts=counts, tokens_per_batch=1)) == len(samples)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_loss_and_gradient_do_not_depend_on_the_order_of_groups_and_samples(name):
    method = METHODS_TRIED[name]
    samples = flat(random_groups(method))
    counts = count(samples)
    expected = loss_and_gradient(method, [pack_one(samples, counts=counts)])
    shuffled = [samples[i] for i in (7, 6, 8, 2, 0, 1, 5, 4, 3)]
    assert same(loss_and_gradient(method, [pack_one(shuffled, counts=counts)]), expected)


@pytest.mark.parametrize("advantage", ["none", "mean", "leave_one_out", "std"])
def test_streams_follow_their_sample_when_a_group_is_reordered(advantage):
    method = Method(advantage=advantage, denominator="group_tokens")
    group = random_groups(method)[0]
    order = [2, 0, 1]
    again = group_streams(method, [group[i] for i in order], max_tokens=WORLD.max_tokens)
    for sample, i in zip(again, order, strict=True):
        for name in ("advantage", "weight"):
            assert torch.allclose(sample.streams[name], group[i].streams[name], atol=1e-15)


class Fixed:
    """A policy whose scores are given, so that the gradient that reaches every single token can be read."""

    def __init__(self, scores):
        self.logp_T, self.entropy_T = (x.detach().clone().requires_grad_() for x in (scores.logp_T, scores.entropy_T))

    def scores(self, batch):
        return TokenScores(logp_T=self.logp_T, entropy_T=self.entropy_T)

    def loss_and_gradients(self, method, batch):
        total, _ = total_loss(build_objective(method)(self, batch))
        inputs = (self.logp_T, self.entropy_T)
        return [total.detach(), *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("name", METHODS_TRIED)
def test_nothing_under_the_mask_changes_a_bit_of_loss_or_gradient(name, garbage):
    method = METHODS_TRIED[name]
    samples = flat(random_groups(method))
    clean = pack_one(samples, counts=count(samples))
    mask_T, scores = clean.trainable_T, POLICY.scores(clean)
    dirty = replace(clean, streams={n: torch.where(mask_T, x, garbage) for n, x in clean.streams.items()})
    bad = TokenScores(*(torch.where(mask_T, x, garbage) for x in (scores.logp_T, scores.entropy_T)))
    found = Fixed(bad).loss_and_gradients(method, dirty)
    for ours, expected in zip(found, Fixed(scores).loss_and_gradients(method, clean), strict=True):
        assert torch.equal(ours, expected)
    assert not found[1][~mask_T].any()
    assert found[1][mask_T].any()
    assert measure(method, dirty, bad) == measure(method, clean, scores)


def test_with_one_update_the_old_log_probability_is_the_learners_own_and_logp_sampled_is_never_read():
    method = replace(METHODS["rloo"], surrogate="clip")
    samples = flat(random_groups(method, off_policy=False))
    own = [with_scores(sample, "logp_old", POLICY) for sample in samples]
    counts = count(samples)
    expected = loss_and_gradient(method, [pack_one(own, counts=counts)])
    assert same(loss_and_gradient(method, [pack_one(samples, counts=counts)]), expected)
    lies = [replace(s, streams={**s.streams, "logp_sampled": torch.full(s.token_ids.shape, -9.0)}) for s in samples]
    for found, unlied in zip(
        loss_and_gradient(method, [pack_one(lies, counts=counts)]),
        loss_and_gradient(method, [pack_one(samples, counts=counts)]),
        strict=True,
    ):
        assert torch.equal(found, unlied)


def test_k1_in_the_reward_is_subtracted_after_normalisation_as_a_return_to_go():
    """Loss -sum A_t log pi: the coefficient of each token's log pi is read off its gradient."""
    beta = 0.5
    method = Method(advantage="std", surrogate="pg", kl="k1_reward", kl_coef=beta, denominator="sequences")
    group = random_groups(method, holes=False)[1]
    batch = pack_one(group, counts=Counts(tokens=9, sequences=1, groups=1))
    _, coefficient_T, _ = Fixed(OLD.scores(batch)).loss_and_gradients(method, batch)
    expected = []
    for sample in group:
        rate = (sample.streams["logp_old"] - sample.streams["logp_ref"])[sample.trainable].tolist()
        advantage = float(sample.streams["advantage"][-1])
        expected += [advantage - beta * sum(rate[t:]) for t in range(len(rate))]
    assert (-coefficient_T[batch.trainable_T]).tolist() == pytest.approx(expected)


def group_of(rewards, lengths=(2, 2), **fields):
    prompt = WORLD.prompts[0]
    samples = [
        WORLD.sample(prompt, (1,) * n, group_id=0, reward=float(r)) for r, n in zip(rewards, lengths, strict=True)
    ]
    return [replace(s, **fields) for s in samples]


def test_a_group_is_dead_only_if_every_term_of_its_loss_is_zero():
    plain = METHODS["dr_grpo"]
    for rewards, dead in (((1, 1), True), ((0, 0), True), ((1, 0), False)):
        assert is_dead(plain, group_streams(plain, group_of(rewards), max_tokens=6)) == dead
    alive = [replace(plain, kl=kl, kl_coef=0.1) for kl in ("k1_reward", "square", "k3_loss")] + [
        replace(plain, entropy_coef=0.01),
        replace(plain, advantage="none"),
    ]
    for method in alive:
        assert not is_dead(method, group_streams(method, group_of((1, 1)), max_tokens=6))
    idle = replace(plain, kl="k3_loss", kl_coef=0.0)
    assert is_dead(idle, group_streams(idle, group_of((1, 1)), max_tokens=6))


@pytest.mark.parametrize("name", ["dr_grpo", "dapo_paper"])
def test_a_dead_group_has_zero_gradient_and_leaving_it_out_changes_nothing_if_its_tokens_are_counted(name):
    method = replace(METHODS[name], overlong="none")
    groups = random_groups(method)
    equal = [replace(s, reward=1.0) for s in groups[1]]
    groups[1] = group_streams(method, equal, max_tokens=WORLD.max_tokens)
    assert [is_dead(method, g) for g in groups] == [False, True, False]
    counts = count(flat(groups))
    everything = loss_and_gradient(method, [pack_one(flat(groups), counts=counts)])
    alive = loss_and_gradient(method, [pack_one(flat([groups[0], groups[2]]), counts=counts)])
    assert same(alive, everything)


def test_contrast_is_judged_on_grades_and_not_on_lengths():
    assert without_contrast([1.0, 1.0, 1.0])
    assert without_contrast([0.25])
    assert not without_contrast([0.0, 0.0, 1e-9])
    method = replace(METHODS["dapo"], overlong_cache=4)
    shaped = group_streams(method, group_of((1, 1), lengths=(2, 6)), max_tokens=6)
    assert without_contrast([s.reward for s in shaped])  # shaping tells them apart, the grades do not
    assert float(shaped[0].streams["advantage"][-1]) > 0 > float(shaped[1].streams["advantage"][-1])


def test_overlong_shaping_adds_equation_13_and_its_default_cache_is_a_fifth_of_the_limit():
    method = replace(METHODS["dapo"], advantage="none")
    group = group_of((1.0, 1.0, 1.0, 1.0), lengths=(16, 17, 19, 20))
    shaped = [float(s.streams["advantage"][-1]) for s in group_streams(method, group, max_tokens=20)]
    assert shaped == [1.0, 0.75, 0.25, 0.0]
    wider = replace(method, overlong_cache=10)
    shaped = [float(s.streams["advantage"][-1]) for s in group_streams(wider, group, max_tokens=20)]
    assert shaped == pytest.approx([0.4, 0.3, 0.1, 0.0])


def test_overlong_shaping_takes_a_sample_that_was_cut_off_early_to_be_as_long_as_the_limit():
    """As an episode is that max_length ends; one that really is as long gets the same."""
    method = replace(METHODS["dapo"], advantage="none")
    group = group_of((1.0, 1.0, 1.0), lengths=(3, 3, 20))
    shaped = group_streams(method, group, max_tokens=20, cut=[True, False, False])
    assert [float(s.streams["advantage"][-1]) for s in shaped] == [0.0, 1.0, 0.0]
    assert all(bool(s.trainable.any()) for s in shaped)


def test_overlong_mask_trains_no_token_of_a_cut_sample_and_keeps_it_in_the_baseline():
    method = replace(METHODS["dapo"], overlong="mask", advantage="mean")
    first, second = group_streams(method, group_of((1.0, 0.0)), max_tokens=6, cut=[False, True])
    assert (int(first.trainable.sum()), int(second.trainable.sum())) == (2, 0)
    assert float(first.streams["advantage"][0]) == 0.5
    assert count([first, second]) == Counts(tokens=2, sequences=2, groups=1)
    with pytest.raises(ConfigError, match="pass cut="):
        group_streams(method, group_of((1.0, 0.0)), max_tokens=6)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_a_step_whose_samples_were_all_cut_off_has_loss_zero_and_not_nan(name):
    method = replace(METHODS_TRIED[name], overlong="mask", overlong_cache=0)
    groups = [group_streams(method, g, max_tokens=6, cut=[True] * 3) for g in random_groups(METHODS_TRIED[name])]
    samples = flat(groups)
    loss, gradient = loss_and_gradient(method, [pack_one(samples, counts=count(samples))])
    assert all(is_dead(method, group) for group in groups)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_a_cut_sample_adds_nothing_to_loss_and_gradient_though_it_is_counted(name):
    method = replace(METHODS_TRIED[name], overlong="mask", overlong_cache=0)
    cut = [True, False, False]
    samples = flat(group_streams(method, g, max_tokens=6, cut=cut) for g in random_groups(METHODS_TRIED[name]))
    counts = count(samples)
    rest = [sample for sample in samples if bool(sample.trainable.any())]
    assert len(rest) == 6
    found, expected = (loss_and_gradient(method, [pack_one(part, counts=counts)]) for part in (samples, rest))
    assert same(found, expected)


def test_measure_counts_what_the_clip_stops_and_sums_entropy_and_kl():
    method = replace(METHODS["grpo"], eps_low=0.3, eps_high=0.4)
    samples = flat(random_groups(method))
    batch = pack_one(samples, counts=count(samples))
    found = measure(method, batch, POLICY.scores(batch))
    scores = POLICY.scores(batch)
    expected = dict.fromkeys(found, 0.0)
    for t in batch.trainable_T.nonzero()[:, 0].tolist():
        logp, old, ref, advantage = (
            float(x[t])
            for x in (scores.logp_T, batch.streams["logp_old"], batch.streams["logp_ref"], batch.streams["advantage"])
        )
        ratio, r = math.exp(logp - old), logp - ref
        expected["clipped_low"] += ratio < 0.7 and advantage < 0
        expected["clipped_high"] += ratio > 1.4 and advantage > 0
        expected["entropy"] += float(scores.entropy_T[t])
        expected["kl_k1"] += r
        expected["kl_k3"] += math.exp(-r) - 1 + r
    assert found == pytest.approx(expected)
    assert min(found["clipped_low"], found["clipped_high"]) > 0
    assert "kl_k1" not in measure(METHODS["dr_grpo"], batch, scores)


def test_only_methods_with_a_kl_of_some_weight_need_a_reference():
    needed = {name for name, method in METHODS.items() if needs_reference(method)}
    assert needed == {"rloo", "grpo"}
    assert not needs_reference(replace(METHODS["grpo"], kl_coef=0.0))


@pytest.mark.parametrize("kl", ["none", "k1_reward", "square", "k3_loss"])
def test_a_coefficient_of_zero_is_no_kl_at_all_and_reads_no_reference(kl):
    method = replace(METHODS["dr_grpo"], kl=kl, kl_coef=0.0)
    samples = flat(random_groups(method))
    without = [replace(s, streams={n: x for n, x in s.streams.items() if n != "logp_ref"}) for s in samples]
    found, expected = (
        loss_and_gradient(m, [pack_one(without, counts=count(without))]) for m in (method, METHODS["dr_grpo"])
    )
    assert same(found, expected, close=0.0)


USUAL = {"samples_per_prompt": 8, "updates_per_rollout": 1, "max_tokens": 16}


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_every_preset_is_accepted(name):
    check_method(METHODS_TRIED[name], **USUAL)


@pytest.mark.parametrize(
    ("changes", "usual", "message"),
    [
        ({"advantage": "stdd"}, {}, r"method.advantage has no choice 'stdd'. Did you mean 'std'\?"),
        ({"denominator": "token"}, {}, r"Did you mean 'tokens'\?"),
        ({"kl_coef": math.nan}, {}, r"method.kl_coef must be a finite number, not nan"),
        ({"kl_coef": -0.1}, {}, r"cannot be negative, but are -0.1"),
        ({"kl": "none"}, {}, r"kl_coef is 0.04, but method.kl is 'none'"),
        ({"eps_low": 0.0}, {}, r"eps_low and eps_high must be above 0, not 0.0 and 0.2"),
        ({}, {"samples_per_prompt": 1}, r"samples_per_prompt must be 2 or more, not 1"),
        ({"surrogate": "pg"}, {"updates_per_rollout": 4}, r"wrong from the second of 4 updates"),
        ({"surrogate": "clip_sequence"}, {}, r"must be 'sequences', not 'sequence_mean'"),
        ({"overlong_cache": 3}, {}, r"overlong_cache does nothing with overlong 'none'"),
        ({"overlong": "shape", "overlong_cache": 17}, {}, r"0 ... max_tokens \(16\), not 17"),
    ],
)
def test_a_method_that_would_not_do_what_it_says_is_refused(changes, usual, message):
    method = replace(METHODS["grpo"])
    for name, value in changes.items():
        object.__setattr__(method, name, value)  # past the type checks of tests, as a configuration file would be
    with pytest.raises(ConfigError, match=message):
        check_method(method, **{**USUAL, **usual})
