"""The truth kit against NumPy, and against its own plain path."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from worlds import ENDED, FIXED, MAX_TOKENS, SETUPS, relative

from rung import truth
from rung.core.errors import ConfigError
from rung.core.records import Counts, Term
from rung.train.config import METHODS
from rung.train.data import count, pack_one
from rung.train.methods import build_objective, group_streams
from rung.truth.tabular import pack_chains


def test_a_world_lists_27_completions_or_15_with_an_end_token_and_every_prefix_once():
    assert len(set(FIXED.completions())) == 27
    assert len(FIXED.prefixes()) == 1 + 3 + 9
    ended = ENDED.completions()
    assert len(set(ended)) == 15  # 1 + 2 + 4 end themselves, 8 are cut off
    assert sum(c[-1] == 2 for c in ended) == 1 + 2 + 8 // 2
    assert all(2 not in c[:-1] for c in ended)
    assert len(ENDED.prefixes()) == 2 * (1 + 2 + 4)


@pytest.mark.parametrize("name", SETUPS)
def test_probabilities_of_all_completions_and_of_all_groups_sum_to_one(name):
    s = SETUPS[name]
    for prompt in s.world.prompts:
        assert sum(float(logp.sum().exp()) for logp in s.policy.logps(prompt)) == pytest.approx(1.0, abs=1e-14)
    steps = truth.outcomes(s.policy, reward=s.reward, streams=list, group_size=2, prompts=s.world.prompts[:1])
    assert len(steps) == len(s.world.completions()) ** 2
    assert sum(step.probability for step in steps) == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("name", SETUPS)
def test_scores_are_those_of_numpy_whatever_the_packing(name):
    s = SETUPS[name]
    samples, expected, entropies = [], [], []
    for number, prompt in enumerate(s.world.prompts):
        oracle = s.oracle(prompt)
        for c, logp in zip(s.world.completions(), oracle.logp, strict=True):
            samples.append(s.world.sample(prompt, c, group_id=number, reward=0.0))
            expected += logp
            table = s.tables()[0]
            laws = [np.exp(z - z.max()) for z in (table[(*prompt, *c[:t])] for t in range(len(c)))]
            entropies += [-(p / p.sum() * np.log(p / p.sum())).sum() for p in laws]
    for batch in (
        pack_chains(samples, count(samples)),
        pack_one(samples, counts=count(samples), share_prompts=True),
        pack_one(samples, counts=count(samples), share_prompts=False),
    ):
        scores = s.policy.scores(batch)
        assert np.allclose(scores.logp_T[batch.trainable_T].numpy(), expected, atol=1e-14)
        assert np.allclose(scores.entropy_T[batch.trainable_T].numpy(), entropies, atol=1e-14)
        assert bool((scores.logp_T[~batch.trainable_T] == 0).all())


@pytest.mark.parametrize("name", SETUPS)
def test_exact_return_and_kl_have_the_gradients_that_numpy_sums(name):
    s = SETUPS[name]
    prompts = s.world.prompts
    value = sum((s.oracle(p).chance * s.rewards(p)).sum() for p in prompts) / len(prompts)
    assert float(truth.expected_return(s.policy, s.reward)) == pytest.approx(value, abs=1e-14)
    by_return = sum(s.oracle(p).return_gradient(s.rewards(p)) for p in prompts) / len(prompts)
    assert relative(truth.gradient(lambda p: truth.expected_return(p, s.reward), s.policy).numpy(), by_return) < 1e-13
    by_kl = sum(s.oracle(p).kl_gradient() for p in prompts) / len(prompts)
    assert relative(truth.gradient(lambda p: truth.expected_kl(p, s.reference), s.policy).numpy(), by_kl) < 1e-13


@pytest.mark.parametrize("name", ["grpo", "dapo", "dapo_paper"])
def test_steps_of_equal_counts_in_one_call_give_what_one_call_per_step_gives(name):
    s = SETUPS["ended"]
    method = METHODS[name]
    steps = truth.outcomes(
        s.policy,
        reward=s.reward,
        streams=partial(group_streams, method, max_tokens=MAX_TOKENS),
        group_size=2,
        prompts=s.world.prompts[1:],
        policies=[("logp_ref", s.reference)],
    )
    together, apart = (
        truth.expected_gradient(build_objective(method), s.policy, steps, together=how).numpy() for how in (True, False)
    )
    assert relative(together, apart) < 1e-13


@pytest.mark.parametrize("name", ["grpo", "dapo", "dapo_paper"])
def test_a_step_of_two_prompts_shares_its_denominators_between_their_groups(name):
    """Two tokens of which one ends, at most two: 3 completions, 9 groups a prompt, 81 steps; NumPy on whole steps."""
    world = truth.World(vocabulary=2, max_tokens=2, prompts=((0,), (1, 0)), eos=1)
    policy = truth.TablePolicy.random(world, torch.Generator().manual_seed(5))
    completions, rewards = world.completions(), [0.3, -1.0, 0.5]
    method = replace(METHODS[name], kl="none", kl_coef=0.0, overlong="none")

    steps = truth.outcomes(
        policy,
        reward=lambda prompt, c: rewards[completions.index(c)] + len(prompt),
        streams=partial(group_streams, method, max_tokens=2),
        group_size=2,
    )
    found = truth.expected_gradient(build_objective(method), policy, steps).numpy()

    lengths = np.array([len(c) for c in completions])
    logps = [[float(x.sum()) for x in policy.logps(prompt)] for prompt in world.prompts]
    gradients = [sequence_gradients(policy, prompt) for prompt in world.prompts]
    expected, pairs = np.zeros_like(found), [(i, j) for i in range(3) for j in range(3)]
    for first in pairs:
        for second in pairs:
            chance = np.exp(sum(logps[n][i] for n, pair in enumerate((first, second)) for i in pair))
            tokens = [lengths[list(pair)].sum() for pair in (first, second)]
            for n, pair in enumerate((first, second)):
                difference = rewards[pair[0]] - rewards[pair[1]]
                for i, advantage in zip(pair, (difference / 2, -difference / 2), strict=True):
                    advantage /= abs(difference) / 2**0.5 + 1e-4
                    share = {"grpo": 1 / 4 / lengths[i], "dapo": 1 / sum(tokens), "dapo_paper": 1 / 2 / tokens[n]}[name]
                    expected -= chance * share * advantage * gradients[n][i]
    assert relative(found, expected) < 1e-10


def sequence_gradients(policy, prompt):
    """grad log pi(y | prompt) of every completion: one-hot minus softmax at each of its prefixes."""
    prefixes = policy.world.prefixes()
    out = []
    for completion in policy.world.completions():
        total = np.zeros(policy.logits_NV.shape)
        for t, token in enumerate(completion):
            row = prefixes.index((*prompt, *completion[:t]))
            weights = np.exp(policy.logits_NV[row].numpy())
            total[row] += np.eye(policy.world.vocabulary)[token] - weights / weights.sum()
        out.append(total)
    return out


def test_check_tells_a_right_loss_from_a_scaled_and_from_a_wrong_one():
    s = SETUPS["fixed"]

    def reinforce(scale, power):
        def objective(policy, batch):
            value_T = -scale * batch.streams["reward"] * policy.scores(batch).logp_T * batch.streams["reward"] ** power
            return {"loss": Term(value_T, batch.trainable_T, float(batch.counts.sequences))}

        return objective

    def with_reward(group):
        of = [torch.full(x.token_ids.shape, x.reward, dtype=torch.float64) for x in group]
        return [replace(x, streams={"reward": r}) for x, r in zip(group, of, strict=True)]

    verdicts = [
        truth.check(reinforce(*how), s.policy, reward=s.reward, streams=with_reward, group_size=1)
        for how in ((1.0, 0), (0.5, 0), (1.0, 1))
    ]
    right, scaled, wrong = verdicts
    assert right.error < 1e-13
    assert scaled.error == pytest.approx(0.5)
    assert scaled.direction < 1e-13
    assert scaled.scale == pytest.approx(0.5)
    assert wrong.direction > 0.5


def test_what_the_truth_kit_cannot_judge_it_refuses():
    s = SETUPS["fixed"]
    with pytest.raises(ConfigError, match=r"one value per token or per sequence"):
        truth.check(
            lambda policy, batch: {"loss": Term(policy.scores(batch).logp_T[:1], batch.trainable_T[:1], 1.0)},
            s.policy,
            reward=s.reward,
            streams=list,
            group_size=1,
        )
    with pytest.raises(ConfigError, match=r"small: this one needs"):
        truth.TablePolicy.random(truth.World(vocabulary=9, max_tokens=2, prompts=((0,) * 9,)), torch.Generator())
    stranger = s.world.sample((1, 1), (0, 0, 0), group_id=0, reward=0.0)
    with pytest.raises(ConfigError, match=r"not of this world"):
        s.policy.scores(pack_chains([stranger], Counts(tokens=3, sequences=1, groups=1)))
    with pytest.raises(ConfigError, match=r"needs logits of shape \(13, 3\)"):
        truth.TablePolicy(FIXED, torch.zeros(3, 3))
