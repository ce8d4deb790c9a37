"""Chunked log-probabilities and entropies against their plain twin."""

import math

import pytest
import torch

from rung.objectives import logprobs
from rung.objectives.logprobs import plain_token_logprobs, softcapped, token_logprobs

ROWS, WIDTH, WORDS = 37, 16, 53  # no size divides another, nor a chunk


def problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, weight_VD = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (ROWS, WORDS))
    target_N = torch.randint(WORDS, (ROWS,), generator=generator)
    incoming = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    return hidden_ND.to(dtype), weight_VD.to(dtype), target_N, incoming


def both_ways(function, hidden_ND, weight_VD, target_N, incoming, **options):
    """Outputs, and gradients of sum(incoming x outputs)."""
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logp_N, entropy_N = function(hidden_ND, weight_VD, target_N, **options)
    (incoming[0] * logp_N + incoming[1] * entropy_N).sum().backward()
    return logp_N.detach(), entropy_N.detach(), hidden_ND.grad, weight_VD.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 10, ROWS, 1000])
@pytest.mark.parametrize("block", [1, 200, 1 << 20])
def test_values_and_gradients_are_those_of_the_dense_log_softmax(monkeypatch, temperature, softcap, chunk, block):
    monkeypatch.setattr(logprobs, "BLOCK_ELEMENTS", block)
    given = problem(torch.float64)
    fast = both_ways(token_logprobs, *given, temperature=temperature, softcap=softcap, chunk=chunk)
    plain = both_ways(plain_token_logprobs, *given, temperature=temperature, softcap=softcap)
    for ours, twin in zip(fast, plain, strict=True):
        assert float((ours - twin).abs().max()) < 1e-12 * float(twin.abs().max())


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_pass_gradcheck(softcap):
    hidden_ND, weight_VD, target_N, _ = problem(torch.float64, seed=1)
    inputs = hidden_ND[:5].requires_grad_(), weight_VD[:7].requires_grad_()
    target_N = target_N[:5] % 7
    options = {"temperature": 0.8, "softcap": softcap, "chunk": 2}
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, target_N, **options), inputs)


def test_a_cap_far_above_the_logits_changes_nothing_and_a_low_one_bounds_them():
    hidden_ND, weight_VD, target_N, _ = problem(torch.float64)
    free, entropy = token_logprobs(hidden_ND, weight_VD, target_N)
    high, low = (token_logprobs(hidden_ND, weight_VD, target_N, softcap=c) for c in (1e6, 1e-3))
    torch.testing.assert_close(high[0], free, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low[1], torch.full_like(entropy, math.log(WORDS)), rtol=1e-5, atol=0)
    assert not torch.allclose(free, low[0], rtol=0.1)


def test_what_is_scored_is_what_is_drawn_from_capped_and_rounded_alike():
    """The sampler's logits are capped and rounded to bf16; with a cap of 30 that is an eighth."""
    hidden_ND, weight_VD, target_N, _ = problem(torch.bfloat16)
    hidden_ND = hidden_ND * 20
    logits_NV = softcapped(hidden_ND @ weight_VD.T, 30.0)
    assert logits_NV.dtype == torch.bfloat16
    assert logits_NV.abs().max() == 30
    drawn_N = logits_NV.float().log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    scored_N, _ = token_logprobs(hidden_ND, weight_VD, target_N, softcap=30.0, chunk=10)
    torch.testing.assert_close(scored_N, drawn_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_gives_fp32_values_and_gradients_in_the_dtype_of_the_input(dtype, close):
    given = problem(dtype)
    fast = both_ways(token_logprobs, *given, chunk=10)
    plain = both_ways(plain_token_logprobs, *given)
    assert [x.dtype for x in fast] == [torch.float32, torch.float32, dtype, dtype]
    for ours, twin in zip(fast, plain, strict=True):
        assert float((ours.double() - twin.double()).norm()) < close * float(twin.double().norm())


def test_the_weights_gradient_of_many_chunks_loses_nothing_to_bf16():
    """600 equal contributions of 1 / 512: bf16 stops adding them up at 0.5, a sum in fp32 does not."""
    rows = 600
    hidden_ND = torch.full((rows, 1), 2.0**-8, dtype=torch.bfloat16)
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    logp_N, _ = token_logprobs(hidden_ND, weight_VD, torch.zeros(rows, dtype=torch.long), chunk=1)
    logp_N.sum().backward()
    assert weight_VD.grad[:, 0].tolist() == pytest.approx([rows / 512, -rows / 512], rel=2**-8)


def test_a_second_backward_through_the_same_graph_gives_the_same_gradient():
    hidden_ND, weight_VD, target_N, _ = problem(torch.float64)
    hidden_ND.requires_grad_()
    total = token_logprobs(hidden_ND, weight_VD, target_N, chunk=10)[0].sum()
    first, second = (torch.autograd.grad(total, hidden_ND, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_extreme_logits_stay_finite():
    weight_VD = torch.tensor([[3e4], [0.0], [-3e4]], requires_grad=True)
    logp_N, entropy_N = token_logprobs(torch.ones(3, 1), weight_VD, torch.arange(3))
    assert logp_N.tolist() == [0.0, -3e4, -6e4]
    assert entropy_N.tolist() == [0.0, 0.0, 0.0]
    (logp_N.sum() + entropy_N.sum()).backward()
    assert weight_VD.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    hidden_ND, weight_VD, target_N, _ = problem(torch.float64)
    hidden_ND.requires_grad_()
    token_logprobs(hidden_ND, weight_VD, target_N)[0].sum().backward()
    assert weight_VD.grad is None
    assert float(hidden_ND.grad.norm()) > 0
    with torch.no_grad():
        assert not token_logprobs(hidden_ND, weight_VD, target_N)[0].requires_grad


def test_an_entropy_not_asked_for_is_nan_and_changes_nothing_else():
    hidden_ND, weight_VD, target_N, _ = problem(torch.float64)
    hidden_ND.requires_grad_()
    with_entropy, without = (token_logprobs(hidden_ND, weight_VD, target_N, entropy=e) for e in (True, False))
    assert torch.equal(with_entropy[0], without[0])
    assert without[1].isnan().all()
    assert not without[1].requires_grad
    with_entropy[0].sum().backward()
    first, hidden_ND.grad = hidden_ND.grad, None
    without[0].sum().backward()
    assert torch.equal(first, hidden_ND.grad)


def test_no_rows_give_no_values_and_zero_gradients():
    weight_VD = torch.ones(3, 2, requires_grad=True)
    logp_N, entropy_N = token_logprobs(torch.ones(0, 2), weight_VD, torch.zeros(0, dtype=torch.long))
    assert len(logp_N) == len(entropy_N) == 0
    logp_N.sum().backward()
    assert not weight_VD.grad.any()


def test_no_tensor_of_all_rows_by_vocabulary_is_ever_made():
    """Every tensor that any operation makes is recorded: none has as many elements as half the dense logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (256, 300))
    target_N = torch.randint(300, (256,), generator=generator)
    with Recorder():
        logp_N, entropy_N = token_logprobs(hidden_ND, weight_VD, target_N, chunk=64)
        (logp_N.sum() + entropy_N.sum()).backward()
    assert 64 * 300 in sizes
    assert max(sizes) < 256 * 300 / 2
