"""Two turns with an environment between them, summed over everything that can happen, against plain loops."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from rung import truth
from rung.core.records import Completion, Origin, Sampling, Turn
from rung.train.config import METHODS, Method
from rung.train.data import sample_of
from rung.train.methods import build_objective, group_streams

PROMPT = (0,)
FIRST, SECOND = 2, 1  # tokens of the two turns
VOCABULARY = 3


def said(first):
    """The environment: its two tokens depend on what the policy said."""
    return (sum(first) % VOCABULARY, first[0])


class Conversations(truth.World):
    """A world whose completions are whole streams: a first answer, the environment's tokens, a second answer."""

    def completions(self):
        firsts = itertools.product(range(VOCABULARY), repeat=FIRST)
        seconds = itertools.product(range(VOCABULARY), repeat=SECOND)
        return [(*first, *said(first), *second) for first, second in itertools.product(firsts, seconds)]

    def sample(self, prompt, completion, *, group_id, reward):
        """By the code of the learner."""
        first, given, second = completion[:FIRST], completion[FIRST:-SECOND], completion[-SECOND:]
        later = Turn(completion=drawn(second), given_ids=given, given_origin=(Origin.TEMPLATE, Origin.TOOL))
        sample = sample_of(prompt, drawn(first), later=[later], problem_id="", group_id=group_id, reward=reward)
        return replace(sample, streams={})


class Leaky(Conversations):
    """The planted bug: one of the environment's tokens is taken for the policy's own."""

    def sample(self, prompt, completion, *, group_id, reward):
        sample = super().sample(prompt, completion, group_id=group_id, reward=reward)
        return replace(sample, trainable=sample.trainable | (sample.origin == Origin.TOOL))


def drawn(ids):
    return Completion(
        token_ids=tuple(ids), logp_sampled=(0.0,) * len(ids), logp_raw=(0.0,) * len(ids), stop="length",
        policy_version=0, weights_hash="", sampling=Sampling(max_tokens=FIRST), key=0,
    )  # fmt: skip


WORLD = Conversations(vocabulary=VOCABULARY, max_tokens=FIRST + 2 + SECOND, prompts=(PROMPT,))
POLICY = truth.TablePolicy.random(WORLD, torch.Generator().manual_seed(5))
REWARDS = dict(zip(WORLD.completions(), np.random.default_rng(3).normal(size=27), strict=True))


def reward(prompt, completion):
    return float(REWARDS[completion])


def exact_gradient():
    """Of J = sum over streams of probability x reward, where the environment chooses nothing.  In NumPy."""
    rows = {prefix: row for row, prefix in enumerate(WORLD.prefixes())}
    logits = POLICY.logits_NV.numpy()
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = np.zeros_like(logits)
    for first in itertools.product(range(VOCABULARY), repeat=FIRST):
        for second in itertools.product(range(VOCABULARY), repeat=SECOND):
            stream = (*PROMPT, *first, *said(first), *second)
            places = [1, 2, 5]  # of the policy's own tokens
            chance = np.prod([chances[rows[stream[:t]], stream[t]] for t in places])
            for t in places:
                score = np.eye(VOCABULARY)[stream[t]] - chances[rows[stream[:t]]]
                total[rows[stream[:t]]] += chance * REWARDS[stream[1:]] * score
    return total


def expected(method, policy=POLICY, *, group_size=2):
    """Of the loss, over all groups of two streams, by Rung's own streams and objective."""
    steps = truth.outcomes(
        policy,
        reward=reward,
        streams=partial(group_streams, method, max_tokens=FIRST + SECOND),
        group_size=group_size,
    )
    return truth.expected_gradient(build_objective(method), policy, steps).numpy()


UNBIASED = {  # method -> what the gradient of J is multiplied by, for groups of two
    "leave one out": (Method(advantage="leave_one_out", surrogate="pg", denominator="sequences"), 1.0),
    "reinforce": (METHODS["reinforce"], 0.5),
    "dr_grpo": (METHODS["dr_grpo"], 0.5 / (FIRST + SECOND)),
    "tokens, of equal lengths": (Method(advantage="leave_one_out", denominator="tokens"), 1 / (FIRST + SECOND)),
    "sequence_mean, of equal lengths": (Method(advantage="leave_one_out"), 1 / (FIRST + SECOND)),
    "ratio of the sequence": (
        Method(advantage="leave_one_out", surrogate="clip_sequence", denominator="sequences"),
        1.0,
    ),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_of_two_turns_is_that_of_the_expected_reward(name):
    method, scale = UNBIASED[name]
    exact = exact_gradient()
    assert np.linalg.norm(expected(method) + scale * exact) < 1e-10 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", UNBIASED)
def test_a_token_of_the_environment_s_under_the_mask_would_be_noticed(name):
    """As a choice of the policy's it has a probability of its own, which the environment does not ask for."""
    leaky = truth.TablePolicy(Leaky(**vars(WORLD)), POLICY.logits_NV)
    method, scale = UNBIASED[name]
    exact = exact_gradient()
    assert np.linalg.norm(expected(method, leaky) + scale * exact) > 0.05 * np.linalg.norm(exact)


def test_probabilities_of_the_streams_add_up_to_one_without_the_environment():
    logps = POLICY.logps(PROMPT)
    assert float(sum(logp.sum().exp() for logp in logps)) == pytest.approx(1.0, abs=1e-12)
    assert all(logp.tolist()[FIRST:-SECOND] == [0.0, 0.0] for logp in logps)
