"""The learner: one AdamW step for all methods, on fp32 masters, or no step at all."""

from dataclasses import replace

import pytest
import torch
from train.tiny import made_samples, tiny_decoder

from rung.core.errors import NonFiniteError
from rung.objectives.reduce import total_loss
from rung.train.config import Method, Optim
from rung.train.data import count, pack
from rung.train.methods import build_objective
from rung.train.policy import LanguagePolicy
from rung.train.session import fingerprint
from rung.train.step import Learner

METHOD = Method(advantage="mean", denominator="tokens")


def learner_of(decoder, optim, *, num_steps=10, dtype=torch.float32):
    return Learner(dict(decoder.named_parameters()), optim, num_steps=num_steps, dtype=dtype)


def batches_of(samples, tokens_per_batch=20):
    return pack(samples, counts=count(samples), tokens_per_batch=tokens_per_batch)


def learn(decoder, learner, samples):
    return learner.step(batches_of(samples), LanguagePolicy(decoder), build_objective(METHOD))


def weights(decoder):
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def test_a_step_is_plain_torch_on_the_whole_batch():
    samples = made_samples(dtype=torch.float32)
    optim = Optim(lr=1e-2, weight_decay=0.1, grad_clip=0.005, warmup=2, schedule="linear")
    ours, plain = tiny_decoder(), tiny_decoder()
    learner = learner_of(ours, optim)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                              betas=(optim.beta1, optim.beta2), eps=optim.eps)  # fmt: skip
    for lr in (5e-3, 1e-2, 1e-2):  # warm-up over two updates; then the first of eight linear steps down
        result = learn(ours, learner, samples)
        (batch,) = batches_of(samples, 10**6)
        loss, _ = total_loss(build_objective(METHOD)(LanguagePolicy(plain), batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.005)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        assert result.lr == pytest.approx(lr)
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.grad_norm > 0.005, "clipping was not tried"
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 24), (3, 2048), (7, 1), (1,), (0, 5)])
def test_a_fingerprint_changes_with_any_value_with_the_order_of_rows_and_columns_and_with_names(dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {fingerprint({"a": weight}), fingerprint({"b": weight}), fingerprint({"a": weight, "b": weight})}
    assert len(seen) == 3
    assert fingerprint({"a": weight.clone()}) in seen
    others = []
    if weight.numel():
        others += [weight.clone(), weight.clone()]
        others[0].view(-1)[0] *= 1.01
        others[1].view(-1)[-1] += 1
    if weight.numel() > 1:
        others += [weight.roll(1, dims=0), weight.flip(0)]
    if weight.ndim == 2 and shape[1] > 1 and weight.numel():
        others += [weight.roll(1, dims=1), weight.roll(8, dims=1)]
    found = [fingerprint({"a": other}) for other in others]
    assert len({*found, *seen}) == len(found) + 3


def test_schedules_end_at_zero_and_are_half_way_in_the_middle():
    for schedule, middle in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        learner = learner_of(tiny_decoder(), Optim(lr=2.0, schedule=schedule), num_steps=10)
        assert learner.learning_rate(0) == pytest.approx(2.0)
        assert learner.learning_rate(5) == pytest.approx(2.0 * middle)
        assert learner.learning_rate(10) == pytest.approx(2.0 if schedule == "constant" else 0.0)


def test_masters_keep_what_bf16_would_lose():
    """Steps far below the rounding of most bf16 weights: twenty of them move every master."""
    decoder, samples = tiny_decoder(), made_samples(dtype=torch.float32)
    learner = learner_of(decoder, Optim(lr=2e-6), num_steps=10**6, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in decoder.parameters())
    start = {name: m.clone() for name, m in learner.masters.items()}
    for _ in range(20):
        learn(decoder, learner, samples)
    moved = {name: (m - start[name]).abs().max().item() for name, m in learner.masters.items()}
    assert all(m.dtype == torch.float32 for m in learner.masters.values())
    assert min(moved.values()) > 1e-5
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, learner.masters[name].bfloat16()), name


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32():
    samples = made_samples(groups=6, dtype=torch.float32)
    seen = []
    for size in (10**6, 16):
        decoder = tiny_decoder()
        learner = learner_of(decoder, Optim(grad_clip=1e9), dtype=torch.bfloat16)
        result = learner.step(batches_of(samples, size), LanguagePolicy(decoder), build_objective(METHOD))
        seen.append(result.grad_norm)
    assert seen[0] == pytest.approx(seen[1], rel=0.02)


@pytest.mark.parametrize("where", ["advantage", "weights"])
def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_first_bad_tensor(where):
    decoder, samples = tiny_decoder(), made_samples(dtype=torch.float32)
    learner = learner_of(decoder, Optim())
    learn(decoder, learner, samples)
    bad = samples
    if where == "advantage":
        streams = {**samples[-1].streams, "advantage": torch.full_like(samples[-1].streams["advantage"], torch.inf)}
        bad = [*samples[:-1], replace(samples[-1], streams=streams)]
    else:
        with torch.no_grad():
            decoder.norm.weight[0] = torch.nan
    before = weights(decoder)
    with pytest.raises(NonFiniteError, match="term 'policy'" if where == "advantage" else "logp"):
        learn(decoder, learner, bad)
    assert learner.num_updates == 1
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
        assert parameter.grad is None
    if where == "advantage":
        assert_undisturbed(decoder, learner, samples)


def test_a_gradient_that_is_not_finite_changes_nothing_names_the_weight_and_says_how_to_go_on():
    """The loss is finite: a square root at zero has a value, and no slope."""
    decoder, samples = tiny_decoder(), made_samples(dtype=torch.float32)
    learner = learner_of(decoder, Optim())
    learn(decoder, learner, samples)
    before, plain = weights(decoder), build_objective(METHOD)

    def steep(policy, batch):
        terms = dict(plain(policy, batch))
        term = terms["policy"]
        return terms | {"policy": replace(term, value=term.value + (term.value - term.value.detach()).abs().sqrt())}

    with pytest.raises(NonFiniteError, match=r"gradient of '.*weight' is not finite.*nothing was changed.*optim\.lr"):
        learner.step(batches_of(samples), LanguagePolicy(decoder), steep)
    assert learner.num_updates == 1
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert_undisturbed(decoder, learner, samples)


def assert_undisturbed(decoder, learner, samples):
    """After one sound step and a refused one, the next sound step is the second of a learner that was never refused."""
    twin = tiny_decoder()
    other = learner_of(twin, Optim())
    learn(twin, other, samples), learn(twin, other, samples)
    learn(decoder, learner, samples)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_a_restored_learner_goes_on_bit_for_bit():
    samples = made_samples(dtype=torch.float32)
    a, b = tiny_decoder(), tiny_decoder(seed=9)
    first = learner_of(a, Optim(lr=1e-2, schedule="cosine"), dtype=torch.bfloat16)
    learn(a, first, samples), learn(a, first, samples)
    state = {file: {name: t.clone() for name, t in tensors.items()} for file, tensors in first.state().items()}
    second = learner_of(b, Optim(lr=1e-2, schedule="cosine"), dtype=torch.bfloat16)
    second.restore(state, num_updates=2)
    for _ in range(2):
        learn(a, first, samples), learn(b, second, samples)
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, b.get_parameter(name)), name
    for name, master in first.masters.items():
        assert torch.equal(master, second.masters[name]), name


def test_a_step_without_batches_is_a_step_with_a_gradient_of_zero():
    """Momentum goes on, as it would if the dead groups had been computed."""
    samples = made_samples(dtype=torch.float32)
    dead = [replace(s, streams={**s.streams, "advantage": torch.zeros(len(s.token_ids))}) for s in samples]
    a, b = tiny_decoder(), tiny_decoder()
    first, second = learner_of(a, Optim(lr=1e-2)), learner_of(b, Optim(lr=1e-2))
    learn(a, first, samples), learn(b, second, samples)
    first.step([], LanguagePolicy(a), build_objective(METHOD))
    learn(b, second, dead)
    for name, parameter in a.named_parameters():
        torch.testing.assert_close(parameter, b.get_parameter(name), rtol=0, atol=1e-9)
