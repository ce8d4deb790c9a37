"""Packing: neither the split into micro-batches, nor the sharing of prompts, nor the order changes loss or gradient."""

from dataclasses import replace

import pytest
import torch
from train.tiny import made_samples, tiny_decoder

from rung.core.records import Completion, Layout, Sampling
from rung.objectives.reduce import total_loss
from rung.train.config import METHODS, Method
from rung.train.data import count, inputs, pack, pack_one, sample_of, split, unpack
from rung.train.methods import build_objective
from rung.train.policy import LanguagePolicy

METHOD = Method(kl="k3_loss", kl_coef=0.3, entropy_coef=0.1)


def loss_and_gradients(samples, method=METHOD, *, tokens_per_batch=10**6, share_prompts=True):
    decoder = tiny_decoder(dtype=torch.float64)
    policy, objective = LanguagePolicy(decoder, temperature=0.7), build_objective(method)
    total = 0.0
    batches = pack(samples, counts=count(samples), tokens_per_batch=tokens_per_batch, share_prompts=share_prompts)
    for batch in batches:
        loss, _ = total_loss(objective(policy, batch))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in decoder.named_parameters()}, len(batches)


def assert_equal_losses(a, b):
    assert a[0] == pytest.approx(b[0], abs=1e-12)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], atol=1e-11, rtol=1e-9, msg=name)


@pytest.mark.parametrize("method", [METHOD, *METHODS.values()], ids=["all", *METHODS])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_split(method):
    samples = made_samples()
    whole = loss_and_gradients(samples, method)
    cut = loss_and_gradients(samples, method, tokens_per_batch=12)
    assert whole[2] == 1
    assert cut[2] > 2
    assert_equal_losses(whole, cut)


def test_loss_and_gradient_do_not_depend_on_sharing_the_prompt():
    samples = made_samples()
    assert_equal_losses(loss_and_gradients(samples), loss_and_gradients(samples, share_prompts=False))


def begin_alike(samples, beginning=(7, 8, 9)):
    """The same samples with these tokens before every prompt, as a template puts them there."""
    count = len(beginning)

    def longer(values_T):
        return torch.cat((values_T.new_zeros(count), values_T))

    return [
        replace(
            s,
            token_ids=torch.cat((torch.tensor(beginning), s.token_ids)),
            origin=longer(s.origin),
            trainable=longer(s.trainable),
            policy_version=longer(s.policy_version),
            prompt_length=s.prompt_length + count,
            streams={name: longer(values_T) for name, values_T in s.streams.items()},
        )
        for s in samples
    ]


@pytest.mark.parametrize("method", [METHOD, *METHODS.values()], ids=["all", *METHODS])
def test_loss_and_gradient_do_not_depend_on_sharing_what_prompts_begin_with(method):
    samples = begin_alike(made_samples())
    assert_equal_losses(loss_and_gradients(samples, method), loss_and_gradients(samples, method, share_prompts=False))


def test_what_prompts_have_in_common_is_read_once():
    """Two groups of three whose prompts begin with three equal tokens; what samples have in common is not shared."""
    samples = begin_alike(made_samples(groups=2, size=3))
    tokens_N, _, _ = inputs(pack_one(samples, counts=count(samples)))
    prompts = [samples[i].token_ids[: samples[i].prompt_length].tolist() for i in (0, 3)]
    alike = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
    assert alike >= 3
    completions = sum(len(s.token_ids) - s.prompt_length - 1 for s in samples)
    assert len(tokens_N) == sum(map(len, prompts)) - alike + completions

    twins = [samples[0], samples[0]]  # the same answer drawn twice
    batch = pack_one(twins, counts=count(twins))
    assert int(batch.trainable_T.sum()) == 2 * (len(twins[0].token_ids) - twins[0].prompt_length)


def test_loss_and_gradient_do_not_depend_on_the_order_of_groups_or_samples():
    samples = made_samples()
    assert_equal_losses(loss_and_gradients(samples), loss_and_gradients(samples[::-1]))


def test_what_lies_under_the_mask_changes_nothing():
    samples = made_samples()
    spoiled = [
        replace(s, streams={name: torch.where(s.trainable, v, torch.nan) for name, v in s.streams.items()})
        for s in samples
    ]
    a, b = loss_and_gradients(samples), loss_and_gradients(spoiled)
    assert a[0] == b[0]
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_a_wrong_prediction_row_would_be_seen():
    """The comparison above is not blind: with every log-probability read one row late, the loss is another."""
    samples = made_samples()
    batch = pack_one(samples, counts=count(samples))
    right = LanguagePolicy(tiny_decoder(dtype=torch.float64)).scores(batch).logp_T
    late = replace(batch, tokens_T=batch.tokens_T.roll(1))
    wrong = LanguagePolicy(tiny_decoder(dtype=torch.float64)).scores(late).logp_T
    assert (right - wrong).abs().max() > 0.1


def test_log_probabilities_of_a_packed_batch_are_those_of_each_sequence_alone():
    samples, decoder = made_samples(), tiny_decoder(dtype=torch.float64)
    batch = pack_one(samples, counts=count(samples))
    packed = unpack(batch, LanguagePolicy(decoder).scores(batch).logp_T.detach(), samples)
    for sample, logp_T in zip(samples, packed, strict=True):
        hidden_TD = decoder.forward(sample.token_ids, Layout.chain(len(sample.token_ids)))
        dense_TV = decoder.head(hidden_TD).log_softmax(-1)
        for t in range(sample.prompt_length, len(sample.token_ids)):
            assert logp_T[t].item() == pytest.approx(dense_TV[t - 1, sample.token_ids[t]].item(), abs=1e-12)
        assert not logp_T[: sample.prompt_length].any()


def test_a_decoder_reads_each_shared_prompt_once_and_no_last_token():
    samples = made_samples(groups=2, size=3)
    batch = pack_one(samples, counts=count(samples))
    tokens_N, layout, row_T = inputs(batch)
    prompts = sum(samples[i].prompt_length for i in (0, 3))
    completions = sum(len(s.token_ids) - s.prompt_length - 1 for s in samples)
    assert len(tokens_N) == len(layout) == prompts + completions
    parents = batch.layout.parent_T[batch.trainable_T]
    assert torch.equal(tokens_N[row_T[batch.trainable_T]], batch.tokens_T[parents])


def test_every_sample_is_packed_once_and_groups_too_large_are_spread():
    samples = made_samples(groups=4, size=5)
    parts = split(samples, tokens_per_batch=14)
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    for part in parts:
        batch = pack_one([samples[i] for i in part], counts=count(samples))
        assert len(batch.tokens_T) <= 14 or len(part) == 1


def test_counts_are_those_of_the_whole_step():
    samples = made_samples(groups=2, size=3)
    counts = count(samples)
    assert counts.tokens == sum(len(s.token_ids) - s.prompt_length for s in samples)
    assert (counts.sequences, counts.groups) == (6, 2)


def test_the_end_token_is_trained_on():
    completion = Completion(
        token_ids=(5, 257), logp_sampled=(-1.0, -2.0), logp_raw=(-1.0, -2.0), stop="eos", policy_version=3,
        weights_hash="", sampling=Sampling(max_tokens=4), key=1,
    )  # fmt: skip
    sample = sample_of((1, 2, 3), completion, problem_id="p", group_id=0, reward=1.0)
    assert sample.trainable.tolist() == [False, False, False, True, True]
    assert sample.streams["logp_sampled"].tolist() == [0, 0, 0, -1.0, -2.0]
    assert sample.policy_version.tolist() == [3] * 5
