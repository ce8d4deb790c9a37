"""Recorded steps on the CPU: a recording that calls the step again stands in for CUDA's, all else is the real thing.

What is recorded, when, and what a replay reads and writes is then what a GPU would see; that CUDA replays what it
recorded is the one thing left to tests/gpu/.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from elsewhere import DEVICE, elsewhere
from lm import forests
from test_engine_on_a_decoder import tiny_decoder

from rung.core.errors import NonFiniteError
from rung.core.records import GroupRequest, Sampling
from rung.engine import graphs
from rung.engine.engine import Engine
from rung.engine.graphs import CudaGraphs, context_bucket
from rung.lm.adapters.lora import Adapter, native_sites
from rung.lm.adapters.spec import LoRA
from rung.lm.decoder import Decoder

CLOSE = 2e-6  # of log-probabilities: `draw` computes them in fp32, from logits that agree to 1e-12


class Again:
    """Records a step by keeping it.  before: called before every replay."""

    def __init__(self, before=lambda: None) -> None:
        self.recorded, self.replays, self.before = 0, 0, before

    def record(self, step):
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replays += 1
            self.before()
            return step()

        return replay


def motley(vocabulary: int, longest: int = 40) -> list[GroupRequest]:
    """Groups of 1 to 4, ragged prompts and limits, end tokens, five laws."""
    laws = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.6}, {"min_p": 0.3}]
    return [
        GroupRequest(
            prompt_ids=tuple((31 * i + 7 * j) % vocabulary for j in range(1 + 23 * i % longest)),
            keys=tuple(1000 * i + j for j in range(1 + i % 4)),
            sampling=Sampling(**{"max_tokens": 2 + 5 * i % 13, "stop_ids": (11, 12)} | laws[i % 5]),
        )
        for i in range(11)
    ]


def drawn(engine: Engine, asked: list[GroupRequest]) -> dict[int, list[tuple[int, float, float]]]:
    groups, _ = engine.run(asked)
    return {c.key: list(zip(c.token_ids, c.logp_sampled, c.logp_raw, strict=True)) for group in groups for c in group}


def assert_the_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert [token for token, *_ in one[key]] == [token for token, *_ in other[key]]
        for (_, *logps), (_, *logps_) in zip(one[key], other[key], strict=True):
            assert logps == pytest.approx(logps_, abs=CLOSE)


@pytest.mark.parametrize("slots", [1, 5, 64])
def test_recorded_steps_draw_what_plain_steps_draw(slots):
    decoder, asked = tiny_decoder().double(), motley(300)
    recorder = Again()
    assert_the_same(drawn(Engine(decoder, slots=slots, recorder=recorder), asked), drawn(Engine(decoder), asked))
    assert recorder.replays > 10


@pytest.mark.parametrize("feature", ["window", "soft-cap", "normed heads", "all"])
def test_recorded_steps_draw_what_plain_steps_draw_with_any_feature(feature):
    decoder, asked = forests.tiny_decoder(3, feature=feature), motley(forests.VOCABULARY)
    assert_the_same(drawn(Engine(decoder, slots=5, recorder=Again()), asked), drawn(Engine(decoder, slots=5), asked))


def test_with_an_adapter_they_draw_what_plain_steps_draw_and_not_what_the_base_draws():
    decoder, asked = tiny_decoder().double(), motley(300)
    base = drawn(Engine(decoder), asked)
    adapter = Adapter(decoder, native_sites(decoder), LoRA(rank=2), seed=1, dtype=torch.float64)
    with torch.no_grad():
        for name, factor in adapter.parameters.items():
            factor.add_(0.5 if name.endswith("lora_B") else 0)
    adapted = drawn(Engine(decoder, recorder=Again()), asked)
    assert_the_same(adapted, drawn(Engine(decoder), asked))
    assert adapted != base


def test_nothing_that_dead_rows_or_fillers_hold_reaches_a_sample_and_no_filler_touches_a_row():
    """Before every step dead rows become large and the fillers' slot NaN; after it no committed row has changed."""
    decoder, asked = tiny_decoder().double(), motley(300)
    engine = Engine(decoder, slots=5, recorder=Again(lambda: poison()))
    kept: list[torch.Tensor] = []
    lengths: list[int] = []

    def poison() -> None:
        state = engine.runner.state
        for number, rows in enumerate(state.rows):
            rows[:, -1] = torch.nan
            for slot, length in enumerate(state.length_S.tolist()[:-1]):
                rows[:, slot, :, length:] = 1e3
            kept[number:] = [rows.clone()]
        lengths[:] = state.length_S.tolist()

    plain_decode = engine.runner.decode

    def decode(tokens, positions, laws):
        out, state = plain_decode(tokens, positions, laws), engine.runner.state
        for rows, before in zip(state.rows, kept, strict=True):
            for slot, length in enumerate(lengths[:-1]):
                committed = length - (slot < len(tokens))  # the step writes the last row of every slot that it feeds
                assert torch.equal(rows[:, slot, :, :committed], before[:, slot, :, :committed])
                assert torch.equal(rows[:, slot, :, length:], before[:, slot, :, length:])
        return out

    engine.runner.decode = decode
    assert_the_same(drawn(engine, asked), drawn(Engine(decoder, slots=5), asked))
    assert lengths[-1] == 0


def test_recordings_are_one_per_shape_and_kind_of_law_and_serve_later_calls_until_the_state_is_replaced():
    decoder, recorder = tiny_decoder().double(), Again()
    engine, plain = Engine(decoder, slots=8, recorder=recorder), Engine(decoder, slots=8)

    def asking(prompt: int, keys: int, **sampling) -> list[GroupRequest]:
        sampling = Sampling(**{"max_tokens": 6} | sampling)
        return [GroupRequest(prompt_ids=tuple(range(prompt)), keys=tuple(range(keys)), sampling=sampling)]

    shapes = [
        (asking(124, 8, max_tokens=12), 2),  # 8 rows, 128 and then all 192 of each slot
        (asking(3, 2), 0),
        (asking(3, 1), 1),  # one row
        (asking(3, 2, temperature=0.5), 1),
        (asking(3, 2, temperature=0.0), 0),  # greedy needs no other operation
        (asking(3, 2, temperature=0.5, top_k=4), 1),
        (asking(3, 2, temperature=0.8, top_k=7), 0),
        (asking(3, 2, top_p=0.5), 1),
        (asking(130, 2), 0),
        (asking(300, 2), 1),  # a larger state: everything anew
    ]
    for request, new in shapes:
        before = recorder.recorded
        assert_the_same(drawn(engine, request), drawn(plain, request))
        assert recorder.recorded - before == new


def test_weights_changed_in_place_change_the_next_sample_without_a_new_recording():
    decoder, asked, recorder = tiny_decoder().double(), motley(300), Again()
    engine = Engine(decoder, slots=8, recorder=recorder)
    before, recorded = drawn(engine, asked), recorder.recorded
    with torch.no_grad():
        decoder.embedding.weight[40:90] += 0.5
    after = drawn(engine, asked)
    assert after != before
    assert_the_same(after, drawn(Engine(decoder, slots=8), asked))
    assert recorder.recorded == recorded


def test_what_was_not_finite_once_is_gone_when_the_weights_are_mended():
    """A recorded step reads dead rows; NaN among them would reach the next sample of the slot."""
    decoder = tiny_decoder().double()
    long, short = ([GroupRequest(prompt_ids=(5,) * n, keys=(1, 2), sampling=Sampling(max_tokens=9))] for n in (30, 2))
    recorder = Again()
    engine = Engine(decoder, slots=8, recorder=recorder)
    before, row = drawn(engine, short), decoder.blocks[0].mixer.qkv.weight[-1]
    kept, last = row.detach().clone(), recorder.replays + 3
    with torch.no_grad():
        recorder.before = lambda: row.fill_(torch.nan if recorder.replays == last else 0)
        with pytest.raises(NonFiniteError):
            engine.run(long)
        recorder.before = lambda: None
        row.copy_(kept)
    assert drawn(engine, short) == before


def test_a_step_moves_one_tensor_up_and_one_down():
    """On the simulated device, with the same tokens as on the host; laws go up when the set of samples changes."""
    asked = [GroupRequest(prompt_ids=(1, 2, 3), keys=(1, 2, 3), sampling=Sampling(max_tokens=9))]
    wanted = drawn(Engine(tiny_decoder(), recorder=Again()), asked)
    with elsewhere() as traffic:
        decoder = tiny_decoder().to(DEVICE)
        engine, seen = Engine(decoder, recorder=Again()), []
        plain_decode = engine.runner.decode

        def decode(*args):
            before = (traffic.up, traffic.down, traffic.host_indices)
            out = plain_decode(*args)
            after = (traffic.up, traffic.down, traffic.host_indices)
            seen.append(tuple(b - a for a, b in zip(before, after, strict=True)))
            return out

        engine.runner.decode = decode
        with torch.inference_mode():  # the simulated device cannot go in and out of it
            assert drawn(engine, asked) == wanted
        assert len(seen) == 8
        assert set(seen[1:]) == {(1, 1, 0)}
        assert traffic.host_indices == 0  # of prompts and copies neither


def test_the_transfers_of_a_prompt_do_not_grow_with_the_layers():
    def traffic_of(layers: int) -> tuple[int, int, int]:
        config = tiny_decoder().config
        with elsewhere() as traffic:
            deep = Decoder(type(config)(**vars(config) | {"blocks": config.blocks[:1] * layers}))
            deep = deep.init_(torch.Generator().manual_seed(0)).to(DEVICE)
            engine = Engine(deep, recorder=Again())
            before = (traffic.up, traffic.down, traffic.host_indices)
            with torch.inference_mode():
                engine.run([GroupRequest(prompt_ids=(1, 2, 3), keys=(1, 2), sampling=Sampling(max_tokens=2))])
            after = (traffic.up, traffic.down, traffic.host_indices)
        return tuple(b - a for a, b in zip(before, after, strict=True))

    assert traffic_of(1) == traffic_of(3)


def test_context_buckets_hold_the_rows_waste_little_and_are_few():
    buckets = [context_bucket(rows, 1 << 20) for rows in range(1, 40_000)]
    assert all(bucket >= rows for rows, bucket in enumerate(buckets, 1))
    assert all(bucket - rows < max(128, rows / 8 + 1) for rows, bucket in enumerate(buckets, 1))
    assert all(bucket % 128 == 0 for bucket in buckets)
    assert len(set(buckets)) <= 8 * 9
    assert context_bucket(130, 192) == 192


def test_cuda_graphs_warm_up_aside_record_once_without_deterministic_kernels_and_replay(monkeypatch):
    """By a stand-in for torch.cuda, which notes what is asked of it."""
    told, inside = [], []

    @contextmanager
    def within(name):
        inside.append(name)
        yield
        inside.remove(name)

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: told.append(f"{name} waits"))

    def capture(graph, *, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        return within("capture")

    fake = SimpleNamespace(
        graph_pool_handle=lambda: "pool",
        device=lambda device: nullcontext(),
        current_stream=lambda: stream("here"),
        Stream=lambda device: stream("aside"),
        stream=lambda _: within("aside"),
        CUDAGraph=Graph,
        graph=capture,
    )
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    out = torch.zeros(2, 4)

    def step() -> torch.Tensor:
        assert not torch.are_deterministic_algorithms_enabled()
        told.append("+".join(inside))
        return out

    replay = CudaGraphs(torch.device("cuda", 1)).record(step)
    assert told == ["aside waits", *["aside"] * graphs.WARM_UP, "here waits", "capture"]
    assert torch.are_deterministic_algorithms_enabled()
    assert replay() is out
    assert told[-2:] == ["capture", "replay"]
