"""Kept blocks of a weight never show: the same bits, and every way a weight is changed is seen."""

import copy

import pytest
import torch
from torch.nn import functional as F

from rung.core.records import Layout
from rung.lm import linear
from rung.lm.decoder import Decoder
from rung.lm.linear import PACK_AFTER, PACK_ROWS, Linear
from rung.lm.presets import llama

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor multiplies no bf16: nothing is kept"
)


def used(width: int = 96, out: int = 160, bias: bool = True) -> Linear:
    """A layer whose blocks are kept."""
    generator = torch.Generator().manual_seed(width + out)
    layer = Linear(width, out, bias, torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for _ in range(PACK_AFTER + 1):
            layer(torch.zeros(2, width, dtype=torch.bfloat16))
    assert layer.kept.blocks is not None
    return layer


def expected(layer: Linear, x_ND: torch.Tensor) -> torch.Tensor:
    return F.linear(x_ND, layer.weight, layer.bias).detach()


@needs_bf16
@pytest.mark.parametrize("sizes", [(96, 160, True), (576, 960, False), (1536, 576, False), (576, 3072, True)])
@torch.inference_mode()
def test_kept_blocks_give_the_same_bits(sizes):
    with torch.inference_mode(False):
        layer = used(*sizes)
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 8, 16, 64, 100, PACK_ROWS, PACK_ROWS + 1):
        x_ND = torch.randn(rows, sizes[0], generator=generator).bfloat16()
        assert torch.equal(layer(x_ND), expected(layer, x_ND))


def _in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def _in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight[3, 5] += 1


def _copied(layer):
    with torch.no_grad():
        layer.weight.copy_(layer.weight * 3)


def _new_data(layer):
    layer.weight.data = layer.weight.detach() * 2


def _fused_optimiser(layer):
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1.0, fused=True)
    layer(torch.ones(3, 96, dtype=torch.bfloat16)).sum().backward()
    optimiser.step()


def _foreach(layer):
    torch._foreach_mul_([layer.weight.detach()], 2.0)


@needs_bf16
@pytest.mark.parametrize("change", [_in_place, _in_inference_mode, _copied, _new_data, _fused_optimiser, _foreach])
def test_a_changed_weight_is_seen_at_once(change):
    layer, x_ND = used(), torch.ones(2, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x_ND)
    change(layer)
    with torch.no_grad():
        after = layer(x_ND)
    assert torch.equal(after, expected(layer, x_ND))
    assert not torch.equal(after, before)


@needs_bf16
def test_a_learner_frees_the_blocks_and_a_copy_has_its_own():
    layer = used()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
        x_ND = torch.ones(2, 96, dtype=torch.bfloat16)
        assert not twin(x_ND).any()
        assert layer(x_ND).any()
    layer(x_ND)
    assert layer.kept.blocks is None


@needs_bf16
def test_a_learner_that_never_calls_the_head_changes_it_all_the_same():
    config = llama(vocab_size=64, width=32, layers=1, heads=2, kv_heads=1, ffn_width=32)
    decoder = Decoder(config, torch.bfloat16).init_(torch.Generator().manual_seed(0))
    hidden_ND = torch.ones(2, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(PACK_AFTER + 1):
            before_NV = decoder.head(hidden_ND)
    assert decoder.kept_head.blocks is not None
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=0.1, fused=True)
    F.linear(decoder(torch.arange(5), Layout.chain(5)), decoder.head_weight()).sum().backward()
    optimiser.step()
    with torch.no_grad():
        after_NV = decoder.head(hidden_ND)
    assert torch.equal(after_NV, F.linear(hidden_ND, decoder.head_weight()).detach())
    assert not torch.equal(after_NV, before_NV)


def test_nothing_is_kept_where_bf16_is_slow_or_for_other_dtypes(monkeypatch):
    layer = Linear(8, 4, False, torch.float32)
    with torch.no_grad():
        layer.weight.fill_(1)
        for _ in range(PACK_AFTER + 2):
            layer(torch.ones(1, 8))
    assert layer.kept.blocks is None
    assert not linear.keeps_blocks("cuda", torch.bfloat16)
