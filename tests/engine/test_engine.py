"""The engine over a decoder that hashes its prefix: every batch must equal the one-token loop, exactly."""

import math
from functools import cache

import pytest
import torch
from prefix_decoder import PrefixDecoder

from rung.core.errors import NonFiniteError, RequestError
from rung.core.records import GroupRequest, Sampling
from rung.engine import graphs
from rung.engine import runner as runner_module
from rung.engine.engine import Engine
from rung.engine.sampling import Laws, draw
from rung.engine.types import EngineStats, Event, WeightsRef

DECODER = PrefixDecoder()


def asking(prompt=(1, 2, 3), keys=(7,), matcher=None, **sampling) -> GroupRequest:
    return GroupRequest(
        prompt_ids=tuple(prompt), keys=tuple(keys), sampling=Sampling(**{"max_tokens": 5} | sampling), matcher=matcher
    )


@cache
def one_at_a_time(decoder: PrefixDecoder, request: GroupRequest, key: int):
    """Tokens, logp_sampled, logp_raw and stop of one sample, without slots, batch or state."""
    tokens, sampled, raw, s = list(request.prompt_ids), [], [], request.sampling
    matches = request.matcher() if request.matcher else lambda _: False
    while True:
        one = draw(decoder.logits(tuple(tokens))[None], torch.tensor([len(tokens)]), Laws.of([s], [key]))
        tokens.append(one.token_N.item())
        sampled.append(one.logp_sampled_N.item())
        raw.append(one.logp_raw_N.item())
        length = len(tokens) - len(request.prompt_ids)
        if tokens[-1] in s.stop_ids:
            return tokens[-length:], sampled, raw, "eos"
        if matches(tokens[-1]):
            return tokens[-length:], sampled, raw, "stop"
        if length == s.max_tokens:
            return tokens[-length:], sampled, raw, "length"


def pair_of_equal_tokens():
    """A stop "string": the same token twice in a row."""
    seen = []

    def matches(token: int) -> bool:
        seen.append(token)
        return len(seen) > 1 and seen[-1] == seen[-2]

    return matches


def motley() -> list[GroupRequest]:
    """Groups of 1 to 6, prompts of 1 to 90 tokens, limits of 1 to 14, every kind of end and of sampling."""
    laws = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 9},
        {"top_p": 0.6},
        {"min_p": 0.3, "temperature": 1.4},
    ]
    return [
        asking(
            prompt=[(3 * i + j) % 40 for j in range(1 + 17 * i % 90)],
            keys=[100 * i + j for j in range(1 + 5 * i % 6)],
            matcher=pair_of_equal_tokens if i % 3 == 0 else None,
            max_tokens=1 + 9 * i % 14,
            stop_ids=(5, 6) if i % 2 else (),
            **laws[i % len(laws)],
        )
        for i in range(15)
    ]


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_every_completion_equals_the_one_token_loop_in_any_batch_and_order(slots):
    requests = motley()
    engine = Engine(DECODER, slots=slots)
    for order in (range(15), range(14, -1, -1)):
        groups, _ = engine.run([requests[i] for i in order])
        stops = set()
        for request, group in zip([requests[i] for i in order], groups, strict=True):
            assert [c.key for c in group] == list(request.keys)
            for completion in group:
                tokens, sampled, raw, stop = one_at_a_time(DECODER, request, completion.key)
                assert (completion.token_ids, completion.stop) == (tuple(tokens), stop)
                assert (completion.logp_sampled, completion.logp_raw) == (tuple(sampled), tuple(raw))
                assert completion.sampling == request.sampling
                stops.add(stop)
        assert stops == {"eos", "stop", "length"}


def test_a_prompt_is_computed_once_however_many_samples_and_slots():
    for slots in (1, 3, 64):
        decoder = PrefixDecoder()
        request = asking(prompt=range(10, 30), keys=range(9), max_tokens=4)
        _, stats = Engine(decoder, slots=slots).run([request])
        computed = [(s, p) for forward in decoder.forwards for s, p in forward if s >= 0 and p < 20]
        assert len(computed) == 20 == stats.prompt_tokens
        decoded = [(s, p) for forward in decoder.forwards for s, p in forward if s >= 0 and p >= 20]
        assert len(decoded) == 9 * 3 == stats.row_steps


def test_what_prompts_have_in_common_is_computed_once_in_a_forward():
    decoder, beginning = PrefixDecoder(), tuple(range(10, 20))
    prompts = [(*beginning, 1), (*beginning, 2, 3), (*beginning[:6], 4), beginning, beginning]
    requests = [asking(prompt=prompt, keys=(i,), max_tokens=3) for i, prompt in enumerate(prompts)]
    together, stats = Engine(decoder, slots=8).run(requests)
    computed = [(s, p) for s, p in decoder.forwards[0] if s >= 0]
    assert len(computed) == 11 + 2 + 1 + 4 + 1  # of an equal prompt the last token: its logits are wanted
    assert stats.prompt_tokens == 11 + 12 + 7 + 10 + 10
    alone = [Engine(PrefixDecoder()).run([request])[0][0] for request in requests]
    assert [[c.token_ids for c in group] for group in together] == [[c.token_ids for c in group] for group in alone]


def test_steps_put_slots_in_order_and_fillers_behind_up_to_a_bucket():
    decoder = PrefixDecoder()
    Engine(decoder, slots=64).run([asking(keys=range(n), max_tokens=3) for n in (3, 9, 20)])
    decoding = [forward for forward in decoder.forwards if any(p >= 3 for s, p in forward if s >= 0)]
    for forward in decoding:
        slots = [s for s, _ in forward]
        rows = sum(s >= 0 for s in slots)
        assert slots == [*range(rows), *[-1] * (len(slots) - rows)]
        assert len(slots) in graphs.ROW_BUCKETS
    assert {len(forward) for forward in decoder.forwards if forward not in decoding} == {runner_module.TOKEN_BUCKET}
    assert [graphs.row_bucket(n) for n in (1, 2, 8, 9, 64, 65, 128, 129)] == [1, 8, 8, 16, 64, 128, 128, 256]


def test_a_slot_that_decodes_nothing_holds_no_rows():
    """Otherwise the longest finished sample would keep the memory of all slots at its length."""
    decoder = PrefixDecoder()
    engine, seen = Engine(decoder, slots=8), []
    plain_decode = engine.runner.decode

    def decode(tokens, positions, laws):
        drawn = plain_decode(tokens, positions, laws)
        seen.append([len(rows) for rows in decoder.states[-1].committed[:8]])
        return drawn

    engine.runner.decode = decode
    engine.run([asking(prompt=(1,), keys=(i,), max_tokens=i + 2) for i in range(8)])
    assert seen == [[step + 2] * (8 - step) + [0] * step for step in range(8)]


def test_stats_count_prompts_tokens_steps_and_rows():
    requests = [asking(prompt=[1] * 4, keys=(1, 2), max_tokens=3), asking(prompt=[2] * 6, keys=(3,), max_tokens=7)]
    _, stats = Engine(PrefixDecoder(), slots=8).run(requests)
    assert (stats.prompt_tokens, stats.sampled_tokens, stats.steps, stats.row_steps) == (10, 13, 6, 2 + 2 + 6)
    assert stats.context_steps == 2 * (5 + 6) + (7 + 8 + 9 + 10 + 11 + 12)  # a step reads the row of its own token too
    assert min(stats.seconds_prefill, stats.seconds_decode) > 0
    doubled = stats + stats
    assert (doubled.steps, doubled.seconds_decode) == (12, 2 * stats.seconds_decode)
    assert Engine(PrefixDecoder()).run([]) == ([], EngineStats())


def test_96_requests_on_64_slots_take_at_most_a_tenth_more_steps_than_the_ideal():
    lengths = [8 + (i * 97) % 249 for i in range(96)]
    _, stats = Engine(PrefixDecoder(vocabulary=3), slots=64).run(
        [asking(prompt=(1,), keys=(i,), max_tokens=n) for i, n in enumerate(lengths)]
    )
    assert stats.row_steps == sum(n - 1 for n in lengths)
    assert stats.steps <= 1.1 * max(max(lengths) - 1, math.ceil(stats.row_steps / 64))


def test_events_tell_every_token_once_in_order_and_end_with_the_completion():
    requests = motley()[:8]
    engine, heard = Engine(PrefixDecoder(), slots=4), []
    groups, _ = engine.run(requests, on_event=heard.append)
    assert list(engine.stream(requests)) == heard
    for i, group in enumerate(groups):
        for j, completion in enumerate(group):
            mine = [event for event in heard if (event.request, event.sample) == (i, j)]
            assert tuple(event.token for event in mine) == completion.token_ids
            assert tuple(event.logp_raw for event in mine) == completion.logp_raw
            assert [event.completion for event in mine] == [None] * (len(mine) - 1) + [completion]


def test_a_stream_yields_a_token_before_the_next_step_is_computed():
    decoder = PrefixDecoder()
    stream = Engine(decoder).stream([asking(max_tokens=9)])
    for computed in (1, 2, 3):
        assert isinstance(next(stream), Event)
        assert len(decoder.forwards) == computed


def test_an_engine_serves_one_stream_at_a_time_and_a_closed_one_leaves_it_free():
    decoder = PrefixDecoder()
    engine = Engine(decoder)
    stream = engine.stream([asking(max_tokens=9)])
    next(stream)
    with pytest.raises(RequestError, match="one call at a time; finish or close"):
        engine.run([asking()])
    stream.close()
    (completion,), *_ = engine.run([asking()])[0]
    assert list(completion.token_ids) == one_at_a_time(decoder, asking(), 7)[0]


def test_the_state_is_allocated_once_and_grows_only_for_longer_or_more_samples():
    decoder = PrefixDecoder()
    engine = Engine(decoder, slots=4)
    sizes = []
    for request in (
        asking(max_tokens=60),  # 3 + 60 - 1 rows, 1 slot + 1 for the prompt
        asking(max_tokens=62),  # 64 rows fit
        asking(max_tokens=1),
        asking(max_tokens=63),  # 65 rows do not
        asking(keys=range(9)),  # 4 slots + 1
        asking(keys=range(4)),
    ):
        engine.run([request])
        sizes.append((decoder.states[-1].slots, decoder.states[-1].capacity))
    assert sizes == [(2, 64), (2, 64), (2, 64), (2, 128), (5, 128), (5, 128)]
    assert len(decoder.states) == 3


def test_weights_are_named_in_every_completion():
    groups, _ = Engine(PrefixDecoder()).run([asking(keys=(1, 2))], weights=WeightsRef(version=41, hash="abc"))
    assert [(c.policy_version, c.weights_hash) for c in groups[0]] == [(41, "abc")] * 2


def test_the_end_token_wins_over_stop_string_and_limit():
    """All three at once: greedy on a vocabulary of one."""
    request = asking(prompt=(0,), max_tokens=2, stop_ids=(0,), matcher=lambda: lambda _: True)
    (completion,) = Engine(PrefixDecoder(vocabulary=1)).run([request])[0][0]
    assert (completion.token_ids, completion.stop) == ((0,), "eos")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (asking(prompt=()), "a prompt of at least one token is needed; an empty one came"),
        (asking(prompt=(1, 40)), r"token ids lie in 0 .. 39; 40 came"),
        (asking(stop_ids=(-1,)), r"token ids lie in 0 .. 39; -1 came"),
        (asking(keys=(2**64,)), "a key is a 64-bit number, 0 or more; 18446744073709551616 came"),
        (asking(max_tokens=0), "max_tokens must be at least 1; 0 came"),
        (asking(max_tokens=8), r"must fit the model's 10 positions; 3 \+ 8 came. Shorten the prompt"),
        (asking(temperature=-0.5), "temperature must be 0 .greedy. or positive and finite; -0.5 came"),
        (asking(temperature=math.nan), "nan came"),
        (asking(top_k=-1), "top_k must be 0 .off. or the number of tokens to keep; -1 came"),
        (asking(top_p=0.0), r"top_p must lie in \(0, 1\], 1 being off; 0.0 came"),
        (asking(top_p=1.5), "1.5 came"),
        (asking(min_p=1.5), r"min_p must lie in \[0, 1\], 0 being off; 1.5 came"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_anything_is_computed(request_, sentence):
    decoder = PrefixDecoder()
    with pytest.raises(RequestError, match=f"request 1: .*{sentence}"):
        Engine(decoder, max_positions=10).run([asking(), request_])
    assert not decoder.forwards


def test_an_engine_without_slots_is_refused():
    with pytest.raises(RequestError, match="at least one slot; slots=0 came"):
        Engine(PrefixDecoder(), slots=0)


def test_logits_that_are_not_finite_stop_the_engine_and_leave_it_usable():
    decoder = PrefixDecoder()
    engine = Engine(decoder)
    decoder.spread = math.nan
    with pytest.raises(NonFiniteError, match="position 3 of request 0, sample 0, weights of version 6"):
        engine.run([asking()], weights=WeightsRef(version=6))
    decoder.spread = 4.0
    decoder.logits.cache_clear()
    assert len(engine.run([asking()])[0][0]) == 1
