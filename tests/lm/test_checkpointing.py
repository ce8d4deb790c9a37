"""Activation checkpointing: a block is computed again in the backward pass, with the same bits, and keeps less."""

from dataclasses import replace

import pytest
import torch
from train.tiny import made_samples, tiny_decoder

from rung.core.records import Layout
from rung.lm.adapters.lora import Adapter, native_sites
from rung.lm.adapters.spec import LoRA
from rung.lm.block import Block
from rung.lm.decoder import Decoder
from rung.lm.weights.names import POST_NORMS
from rung.train.config import Method
from rung.train.data import count, pack_one
from rung.train.methods import build_objective
from rung.train.policy import LanguagePolicy


def deep_decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    """Six blocks, every second with norms everywhere, normed heads and a window."""
    config = tiny_decoder().config
    plain = config.blocks[0]
    other = replace(plain, norms="both", mixer=replace(plain.mixer, qk_norm="head", window=3, softcap=2.0))
    return Decoder(replace(config, blocks=(plain, other) * 3), dtype).init_(torch.Generator().manual_seed(1))


def gradients(dtype: torch.dtype, *, again: bool, lora: bool) -> dict[str, torch.Tensor]:
    """Of a packed micro-batch whose groups share their prompts."""
    decoder = deep_decoder(dtype)
    decoder.activation_checkpointing = again
    parameters = dict(decoder.named_parameters())
    if lora:
        parameters = Adapter(decoder, native_sites(decoder, POST_NORMS), LoRA(rank=3), seed=0, dtype=dtype).parameters
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1)  # B is zero at the start, and A would have no gradient
    samples = made_samples(dtype=torch.float32)
    (term,) = build_objective(Method(advantage="mean", denominator="tokens"))(
        LanguagePolicy(decoder), pack_one(samples, counts=count(samples))
    ).values()
    term.value[term.mask].sum().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bit_equal_with_and_without(dtype, lora):
    kept, again = (gradients(dtype, again=again, lora=lora) for again in (False, True))
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, again[name]), name


def kept_bytes(decoder: Decoder, tokens: int) -> int:
    """Of all tensors kept for the backward pass but the weights."""
    weights = {parameter.data_ptr() for parameter in decoder.parameters()}
    sizes = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = decoder(torch.zeros(tokens).long(), Layout.chain(tokens))
    assert len(kept_alive) == tokens
    return sum(size for size, _ in sizes.values())


def test_what_is_kept_is_the_input_of_every_block_byte_for_byte():
    """Beside them the last norm's input and the token's id, as without."""
    decoder = deep_decoder()
    width, blocks = decoder.config.width, len(decoder.blocks)
    without = (kept_bytes(decoder, 80) - kept_bytes(decoder, 40)) / 40
    decoder.activation_checkpointing = True
    a_token = (kept_bytes(decoder, 80) - kept_bytes(decoder, 40)) / 40
    assert a_token == 4 * width * blocks + 4 * width + 8
    assert a_token < without / 5


def test_a_block_is_computed_twice_where_gradients_are_taken_and_once_elsewhere(monkeypatch):
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *given: calls.append(self) or forward(self, *given))
    decoder = deep_decoder()
    decoder.activation_checkpointing = True
    hidden_TD = decoder(torch.arange(9), Layout.chain(9))
    assert len(calls) == 6
    hidden_TD.sum().backward()
    assert calls[6:] == calls[5::-1], "the last block is gone through first"
    calls.clear()
    with torch.no_grad():
        decoder(torch.arange(9), Layout.chain(9))
    decoder(torch.arange(9), Layout.chain(9), decoder.new_state(1, 16))
    assert len(calls) == 12
