"""On a real GPU: a replay draws what its step draws, and both what plain steps draw.  `pytest -m gpu tests/gpu`"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # conftest asks for deterministic algorithms

import pytest
import torch
from engine.test_engine_on_a_decoder import assert_equal_up_to_near_ties, requests, streams, tiny_decoder

from rung.core.records import Layout
from rung.engine.engine import Engine
from rung.lm.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAWS = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}]


class Again:
    """The static step itself, every time."""

    def record(self, step):
        return step


class Plain:
    """A decoder without its static step."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.branches, self.logit_softcap = decoder, decoder.branches, decoder.logit_softcap
        self.head, self.head_weight, self.parameters = decoder.head, decoder.head_weight, decoder.parameters
        self.new_state = decoder.new_state

    def forward(self, tokens_T: torch.Tensor, layout: Layout, state=None) -> torch.Tensor:
        return self._decoder.forward(tokens_T, layout, state)


def asked():
    """Prompts that cross from one context bucket to the next, under every kind of law."""
    groups = [request for law in LAWS for request in requests(6, **law)]
    long = [type(r)(prompt_ids=(r.prompt_ids * 130)[:124], keys=r.keys, sampling=r.sampling) for r in requests(3)]
    numbered = [*groups, *long]
    return [
        type(r)(prompt_ids=r.prompt_ids, keys=tuple(100 * i + j for j in range(len(r.keys))), sampling=r.sampling)
        for i, r in enumerate(numbered)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 12, 64])
def test_replays_draw_bit_for_bit_what_their_steps_draw(dtype, slots):
    decoder = tiny_decoder().to("cuda", dtype)
    replayed = streams(Engine(decoder, slots=slots), asked())
    assert replayed == streams(Engine(decoder, slots=slots, recorder=Again()), asked())


def test_replays_draw_what_plain_steps_draw_here_and_on_the_host_up_to_near_ties():
    decoder = tiny_decoder()
    host = streams(Engine(decoder), asked())
    decoder = decoder.cuda()
    replayed = streams(Engine(decoder), asked())
    assert_equal_up_to_near_ties(replayed, streams(Engine(Plain(decoder)), asked()))
    assert_equal_up_to_near_ties(replayed, host)


def test_weights_changed_in_place_change_what_a_replay_draws_and_changed_back_restore_it():
    decoder = tiny_decoder().cuda()
    engine = Engine(decoder)
    before = streams(engine, asked())
    with torch.no_grad():
        decoder.embedding.weight[40:90] += 0.5
        changed = streams(engine, asked())
        decoder.embedding.weight.copy_(tiny_decoder().embedding.weight)
    assert changed != before
    assert streams(engine, asked()) == before


def test_a_steady_step_waits_for_the_device_once():
    """PyTorch warns of every wait but that of the transfer out, which `tolist` is."""
    decoder = tiny_decoder().cuda()
    engine = Engine(decoder, slots=8)
    streams(engine, asked())
    plain_decode, waits = engine.runner.decode, []

    def decode(*args):
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing") as told:
            out = plain_decode(*args)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in told))
        return out

    engine.runner.decode = decode
    streams(engine, requests(1))
    assert min(waits) <= 2  # the transfers in and out
