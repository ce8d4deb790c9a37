"""The engine on a real decoder with random weights, in fp32: batch independence, cached rows, log-probabilities."""

import pytest
import torch

from rung.core.records import GroupRequest, Layout, Sampling
from rung.engine.engine import Engine
from rung.lm.decoder import Decoder
from rung.lm.presets import llama

CLOSE = 1e-4  # two perturbed scores nearer than this may change places when a matrix product changes its shape


def tiny_decoder(seed: int = 0) -> Decoder:
    """Two blocks with weights large enough that every position's logits matter (standard deviation about 2)."""
    config = llama(vocab_size=300, width=48, layers=2, heads=6, kv_heads=2, ffn_width=64, max_positions=256)
    decoder = Decoder(config).init_(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(15.0 if weight.dim() > 1 else 1.0)
    return decoder


def requests(count: int = 12, **sampling) -> list[GroupRequest]:
    """Groups of 1 to 4 with prompts of 1 to 70 tokens, up to 20 tokens each."""
    return [
        GroupRequest(
            prompt_ids=tuple((31 * i + 7 * j) % 300 for j in range(1 + 23 * i % 70)),
            keys=tuple(1000 * i + j for j in range(1 + i % 4)),
            sampling=Sampling(**{"max_tokens": 4 + 5 * i % 17, "stop_ids": (11, 12)} | sampling),
        )
        for i in range(count)
    ]


def streams(engine: Engine, asked: list[GroupRequest]) -> dict[int, list[tuple[int, float, float]]]:
    """key -> (token, logp_raw, gap) of every token."""
    told = {}
    for event in engine.stream(asked):
        told.setdefault(asked[event.request].keys[event.sample], []).append((event.token, event.logp_raw, event.gap))
    return told


def assert_equal_up_to_near_ties(one: dict, other: dict) -> None:
    """Two samples of a key may part only where the gap is under CLOSE; up to there their log-probs are equal."""
    assert one.keys() == other.keys()
    for key in one:
        for (token, logp, gap), (token_, logp_, gap_) in zip(one[key], other[key], strict=False):
            if token != token_:
                assert min(gap, gap_) < CLOSE
                break
            assert abs(logp - logp_) < CLOSE
        else:
            assert len(one[key]) == len(other[key])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_depend_neither_on_the_batch_nor_on_the_order_of_calls(temperature):
    decoder, asked = tiny_decoder(), requests(7, temperature=temperature)
    engine = Engine(decoder, slots=64)
    together = streams(engine, asked)
    assert sum(len(tokens) for tokens in together.values()) > 100
    assert_equal_up_to_near_ties(together, streams(engine, asked[::-1]))
    for slots in (1, 5):
        assert_equal_up_to_near_ties(together, streams(Engine(decoder, slots=slots), asked))
    alone = {}
    for request in asked:
        alone |= streams(engine, [request])
    assert_equal_up_to_near_ties(together, alone)


def test_tokens_do_not_depend_on_what_prompts_have_in_common():
    """Prompts behind one long beginning, served together and alone."""
    decoder, beginning = tiny_decoder(), tuple(range(40, 90))
    asked = [
        GroupRequest(prompt_ids=(*beginning, *r.prompt_ids), keys=r.keys, sampling=r.sampling) for r in requests(6)
    ]
    alone = {}
    for request in asked:
        alone |= streams(Engine(decoder), [request])
    assert_equal_up_to_near_ties(streams(Engine(decoder), asked), alone)


def test_what_an_engine_served_before_changes_no_bit():
    """A resumed run begins with a fresh engine; the one that was never stopped does not."""
    decoder, asked = tiny_decoder(), requests(7)
    used = Engine(decoder, slots=8)
    list(used.stream([GroupRequest(prompt_ids=tuple(range(150)), keys=(1, 2), sampling=Sampling(max_tokens=30))]))
    assert streams(used, asked) == streams(Engine(decoder, slots=8), asked)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_in_bf16_a_batch_parts_from_single_requests_only_at_near_ties(temperature):
    """One row, a few and many are computed by different kernels, each within the rounding of bf16."""
    decoder, asked = tiny_decoder().bfloat16(), requests(7, temperature=temperature)
    together, parted, tokens = streams(Engine(decoder, slots=64), asked), 0, 0
    for request in asked:
        for key, single in streams(Engine(decoder, slots=1), [request]).items():
            for (token, logp, gap), (token_, logp_, gap_) in zip(together[key], single, strict=False):
                tokens += 1
                if token != token_:
                    assert min(gap, gap_) < 0.5
                    parted += 1
                    break
                assert abs(logp - logp_) < 0.5
    assert parted < 0.1 * tokens
    assert tokens > 100


def test_another_key_another_prompt_and_another_position_draw_other_tokens():
    """What the test above would miss: an engine that ignores them."""
    decoder, prompt = tiny_decoder(), (5, 6, 7)
    asked = GroupRequest(prompt_ids=prompt, keys=tuple(range(40)), sampling=Sampling(max_tokens=2))
    completions = Engine(decoder).run([asked])[0][0]
    assert len({c.token_ids[0] for c in completions}) > 10
    assert sum(c.token_ids[0] != c.token_ids[1] for c in completions) > 20
    (shifted,) = Engine(decoder).run([GroupRequest(prompt_ids=(9, *prompt), keys=asked.keys, sampling=asked.sampling)])[
        0
    ]
    assert sum(a.token_ids != b.token_ids for a, b in zip(completions, shifted, strict=True)) > 20


def raw_logps(decoder: Decoder, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of the tokens from one plain pass over the whole sequence, in fp64 from fp32 logits."""
    whole_T = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        logits_TV = decoder.head(decoder(whole_T, Layout.chain(len(whole_T)))).double()
    logp_TV = logits_TV.log_softmax(1)[len(prompt) - 1 : -1]
    return logp_TV.gather(1, whole_T[len(prompt) :, None])[:, 0]


def worst_distance(decoder: Decoder, asked: list[GroupRequest]) -> float:
    groups, _ = Engine(decoder, slots=8).run(asked)
    return max(
        (torch.tensor(c.logp_raw) - raw_logps(decoder, request.prompt_ids, c.token_ids)).abs().max().item()
        for request, group in zip(asked, groups, strict=True)
        for c in group
    )


def test_logp_raw_is_that_of_a_full_forward_and_a_position_wrong_by_one_is_seen(monkeypatch):
    decoder, asked = tiny_decoder(), requests(temperature=0.7, top_k=50)
    right = worst_distance(decoder, asked)
    assert right < 1e-5
    forward = Decoder.forward

    def off_by_one(self, tokens_T, layout, state=None):
        if state is not None and bool((layout.parent_T < 0).all()):  # decoding steps only
            layout = Layout(layout.parent_T, layout.slot_T, layout.position_T + 1)
        return forward(self, tokens_T, layout, state)

    monkeypatch.setattr(Decoder, "forward", off_by_one)
    assert worst_distance(decoder, asked) > 100 * max(right, 1e-5)


def test_logp_sampled_is_logp_raw_at_temperature_one_without_filters():
    groups, _ = Engine(tiny_decoder()).run(requests())
    assert all(c.logp_sampled == pytest.approx(c.logp_raw, abs=1e-6) for group in groups for c in group)
    assert any(logp < -1 for group in groups for c in group for logp in c.logp_raw)


def test_cached_rows_are_those_of_a_fresh_prefill_after_every_step():
    """Every row of every slot, across prompts copied to their samples and samples moved into holes."""
    decoder, asked = tiny_decoder(), requests(8)
    engine, checked = Engine(decoder, slots=5), 0
    sequence = {key: list(request.prompt_ids) for request in asked for key in request.keys}
    plain_decode = engine.runner.decode

    def decode(tokens, positions, laws):
        nonlocal checked
        drawn, state = plain_decode(tokens, positions, laws), engine.runner.state
        for slot, key in enumerate(laws.key_N.tolist()):
            fed = sequence[key]
            assert (fed[-1], len(fed)) == (tokens[slot], positions[slot] + 1)
            assert state.length_S[slot] == len(fed)
            with torch.inference_mode():
                fresh = decoder.new_state(1, len(fed))
                decoder(torch.tensor(fed), Layout.chain(len(fed)), fresh)
            for layer, wanted in zip(state.rows, fresh.rows, strict=True):
                got_KCd, wanted_KCd = layer[:, slot, :, : len(fed)], wanted[:, 0, :, : len(fed)]
                assert torch.allclose(got_KCd, wanted_KCd, rtol=1e-5, atol=1e-5)
            checked += 1
        return drawn

    engine.runner.decode = decode
    for event in engine.stream(asked):
        sequence[asked[event.request].keys[event.sample]].append(event.token)
    assert checked > 100


def test_weights_changed_in_place_change_the_next_sample_and_changed_back_restore_it():
    decoder, asked = tiny_decoder(), requests(3)
    engine = Engine(decoder)
    before = streams(engine, asked)
    with torch.no_grad():
        decoder.embedding.weight[40:90] += 0.5
    assert streams(engine, asked) != before
    with torch.no_grad():
        decoder.embedding.weight.copy_(tiny_decoder().embedding.weight)
    assert streams(engine, asked) == before


def test_a_prompt_of_the_longest_kind_and_a_completion_up_to_the_last_position_fit():
    decoder = tiny_decoder()
    asked = GroupRequest(prompt_ids=(3,) * 250, keys=(1, 2, 3), sampling=Sampling(max_tokens=6))
    (group,), stats = Engine(decoder, slots=2, max_positions=256).run([asked])
    assert [len(c.token_ids) for c in group] == [6, 6, 6]
    assert stats.prompt_tokens == 250
