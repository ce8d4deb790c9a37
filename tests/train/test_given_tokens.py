"""What the environment says is read by the model and trained on by nobody: masks, denominators and gradients."""

from dataclasses import replace

import pytest
import torch
from train.tiny import tiny_decoder

from rung.core.keys import derive_key
from rung.core.records import Completion, Layout, Origin, Sampling, Turn
from rung.objectives.reduce import total_loss
from rung.train.config import METHODS, Method
from rung.train.data import count, pack, pack_one, sample_of
from rung.train.grpo import gap
from rung.train.methods import build_objective, group_streams
from rung.train.policy import LanguagePolicy

METHOD = Method(kl="k3_loss", kl_coef=0.3, entropy_coef=0.1)
GIVEN = (257, 256, 9, 10, 256)
ORIGIN = (Origin.TEMPLATE, Origin.TEMPLATE, Origin.TOOL, Origin.TOOL, Origin.TEMPLATE)


def completion(draw, key):
    ids = torch.randint(258, (int(torch.randint(1, 5, (1,), generator=draw)),), generator=draw).tolist()
    return Completion(
        token_ids=tuple(ids),
        logp_sampled=tuple(-1.0 - n for n in range(len(ids))),
        logp_raw=(-1.0,) * len(ids),
        stop="length",
        policy_version=0,
        weights_hash="",
        sampling=Sampling(max_tokens=4),
        key=key,
    )


def episodes(method=METHOD, *, groups=2, size=3):
    """Groups of episodes of one to three turns, with the streams of a method and random log-probabilities."""
    draw = torch.Generator().manual_seed(0)
    out = []
    for group in range(groups):
        prompt = torch.randint(258, (4 + group,), generator=draw).tolist()
        samples = []
        for number in range(size):
            turns = [completion(draw, derive_key(group, number, turn)) for turn in range(1 + number % 3)]
            later = [
                Turn(completion=c, given_ids=GIVEN[turn:], given_origin=ORIGIN[turn:])
                for turn, c in enumerate(turns[1:])
            ]
            names = {"problem_id": str(group), "group_id": group, "reward": float(number)}
            samples.append(sample_of(prompt, turns[0], later=later, **names))
        for sample in group_streams(method, samples, max_tokens=12, cut=[False] * size):
            noise = {
                name: torch.randn(len(sample.token_ids), generator=draw).double() for name in ("logp_old", "logp_ref")
            }
            out.append(replace(sample, streams={**sample.streams, **noise}))
    return out


def loss_and_gradients(samples, method=METHOD, **how):
    decoder = tiny_decoder(dtype=torch.float64)
    policy, objective, total = LanguagePolicy(decoder), build_objective(method), 0.0
    for batch in pack(samples, counts=count(samples), **{"tokens_per_batch": 10**6} | how):
        loss, _ = total_loss(objective(policy, batch))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in decoder.named_parameters()}


def assert_equal(a, b):
    assert a[0] == pytest.approx(b[0], abs=1e-12)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], atol=1e-11, rtol=1e-9, msg=name)


@pytest.mark.parametrize("spoilt", [torch.nan, 1e6])
@pytest.mark.parametrize("method", [METHOD, *METHODS.values()], ids=["all", *METHODS])
def test_what_the_loss_would_be_on_the_environment_s_tokens_changes_nothing(method, spoilt):
    samples = episodes(method)
    changed = [
        replace(s, streams={name: torch.where(s.trainable, v, spoilt) for name, v in s.streams.items()})
        for s in samples
    ]
    assert_equal(loss_and_gradients(samples, method), loss_and_gradients(changed, method))


@pytest.mark.parametrize("method", [METHOD, *METHODS.values()], ids=["all", *METHODS])
def test_a_mask_that_lets_the_environment_s_tokens_in_would_be_noticed(method):
    """The comparisons of this file are not blind: loss, gradient and counts of the step are others."""
    samples = episodes(method)
    planted = [replace(s, trainable=s.trainable | (s.origin == Origin.TOOL)) for s in samples]
    right, wrong = loss_and_gradients(samples, method), loss_and_gradients(planted, method)
    assert right[0] != pytest.approx(wrong[0], abs=1e-6)
    assert max(float((right[1][name] - wrong[1][name]).abs().max()) for name in right[1]) > 1e-6
    assert count(planted).tokens > count(samples).tokens


def test_the_gradient_is_that_of_every_sampled_token_after_all_that_came_before_it():
    """Against a loop over sequences and tokens: minus the mean over sequences of advantage x log-probability."""
    method = METHODS["reinforce"]
    samples = episodes(method)
    decoder = tiny_decoder(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for s in samples:
        logits_TV = decoder.head(decoder.forward(s.token_ids, Layout.chain(len(s.token_ids))))
        for t, kind in enumerate(s.origin.tolist()):
            if kind == Origin.SAMPLED:
                logp = logits_TV[t - 1].log_softmax(-1)[s.token_ids[t]]
                total = total - (s.reward - 1.0) * logp / len(samples)  # rewards 0, 1, 2 have the mean 1
    total.backward()
    expected = {name: p.grad for name, p in decoder.named_parameters()}
    found = loss_and_gradients(samples, method)
    for name in expected:
        torch.testing.assert_close(found[1][name], expected[name], atol=1e-11, rtol=1e-9, msg=name)


@pytest.mark.parametrize("how", [{"tokens_per_batch": 20}, {"share_prompts": False}], ids=["split", "prompts apart"])
def test_neither_split_nor_sharing_changes_the_loss_of_episodes(how):
    samples = episodes()
    assert_equal(loss_and_gradients(samples), loss_and_gradients(samples, **how))


def test_the_environment_s_tokens_are_in_no_denominator():
    """sequence_mean divides by a sample's own tokens, group_tokens by its group's, tokens by those of the step."""
    samples = episodes(replace(METHOD, denominator="sequence_mean"))
    own = [int((s.origin == Origin.SAMPLED).sum()) for s in samples]
    assert count(samples).tokens == sum(own)
    assert [float(s.streams["weight"][-1]) for s in samples] == pytest.approx([1 / n for n in own])
    for s, total in zip(episodes(replace(METHOD, denominator="group_tokens")), [sum(own[:3])] * 3 + [sum(own[3:])] * 3, strict=True):  # fmt: skip  # noqa: E501
        assert float(s.streams["weight"][-1]) == pytest.approx(1 / total)


def test_overlong_shaping_counts_what_was_sampled():
    """Limit 12, cache 12: every sampled token costs 1/12."""
    plain = episodes(Method(advantage="none"))
    shaped = episodes(Method(advantage="none", overlong="shape", overlong_cache=12))
    for a, b in zip(plain, shaped, strict=True):
        cost = float(a.streams["advantage"][-1] - b.streams["advantage"][-1])
        assert cost == pytest.approx(int((a.origin == Origin.SAMPLED).sum()) / 12)


def test_the_gap_is_measured_over_the_sampled_tokens_of_all_turns():
    samples = episodes()
    batch = pack_one(samples, counts=count(samples))
    scores = LanguagePolicy(tiny_decoder(dtype=torch.float64)).scores(batch)
    assert len(gap(batch, scores)) == sum(int((s.origin == Origin.SAMPLED).sum()) for s in samples)
