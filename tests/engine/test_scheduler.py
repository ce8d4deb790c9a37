"""The scheduler driven by lengths alone: slots are dictionary entries, a decoding step is a number."""

import heapq
import math
import random
from collections import Counter

import pytest

from rung.engine.scheduler import PROMPT_TOKENS, Scheduler, prompt_slots


def drive(lengths: list[list[int]], *, slots: int, prompts: list[int] | None = None, limits: list[int] | None = None):
    """Decode `lengths[request][sample]` tokens each; checks every copy.  Returns steps, rows per step, prompt batches.

    A sample's first token comes with its prompt.  `held` says whose rows lie in a slot: a request (its prompt's rows,
    alone) or a (request, sample).
    """
    prompts = prompts or [10] * len(lengths)
    limits = limits or [max(of_samples) for of_samples in lengths]
    schedule, held, left = Scheduler(prompts, limits, slots=slots), {}, {}
    rows_per_step, batches, started = [], [], Counter()
    while True:
        for copy in schedule.fill():
            for slot in copy.targets:
                request, _ = seat = schedule.active[slot]
                assert held[copy.source] == request, "a sample starts from another prompt's rows"
                assert 0 <= slot < slots
                held[slot] = seat
                started[seat] += 1
        if fresh := schedule.prompts():
            batches.append(list(fresh))
            for request, slot in fresh.items():
                assert slots <= slot < slots + prompt_slots(slots)
                held[slot] = request
            left |= {(r, s): n - 1 for r in fresh for s, n in enumerate(lengths[r])}
            schedule.ready([seat for seat in left if seat[0] in fresh and left[seat]])
            continue
        for copy in schedule.compact():
            (slot,) = copy.targets
            held[slot] = held[copy.source]
        assert [held[slot] for slot in range(len(schedule.active))] == schedule.active, "holes, or rows left behind"
        if not schedule.active:
            break
        rows_per_step.append(len(schedule.active))
        for seat in schedule.active:
            left[seat] -= 1
        schedule.retire([slot for slot, seat in enumerate(schedule.active) if not left[seat]])
    assert not any(left.values()), "a sample was forgotten"
    assert sorted(r for batch in batches for r in batch) == list(range(len(lengths))), "each prompt is computed once"
    assert started == Counter(
        {(r, s): 1 for r, of_samples in enumerate(lengths) for s, n in enumerate(of_samples) if n > 1}
    )
    return len(rows_per_step), rows_per_step, batches


def uneven(seed: int, count: int = 96, low: int = 8, high: int = 256) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(low, high) for _ in range(count)]


def ideal_steps(lengths: list[int], slots: int) -> int:
    """No schedule is shorter than its longest sample, or than all rows over all slots."""
    return max(max(lengths) - 1, math.ceil(sum(n - 1 for n in lengths) / slots))


@pytest.mark.parametrize("seed", range(5))
def test_96_requests_of_8_to_256_tokens_take_at_most_a_tenth_more_steps_than_the_ideal(seed):
    lengths = uneven(seed)
    steps, _, _ = drive([[n] for n in lengths], slots=64)
    assert steps <= 1.1 * ideal_steps(lengths, 64)


@pytest.mark.parametrize("seed", range(5))
def test_where_lengths_are_unknown_a_free_slot_is_never_left_idle(seed):
    """End tokens come when they come.  The best that ignorance allows is list scheduling: whoever waits first takes the
    first free slot, at once.  Its makespan is simulated here with a heap of the slots' finishing times."""
    lengths = uneven(seed, count=200)
    ends = [0] * 64
    for n in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + n - 1)
    steps, _, _ = drive([[n] for n in lengths], slots=64, limits=[256] * len(lengths))
    assert steps == max(ends)


@pytest.mark.parametrize("slots", [1, 2, 7, 64])
def test_groups_of_any_size_are_all_drawn_from_their_own_prompt(slots):
    draw = random.Random(slots)
    lengths = [[draw.randint(1, 30) for _ in range(draw.choice([1, 2, 8, 100]))] for _ in range(30)]
    _, rows, _ = drive(lengths, slots=slots)
    assert sum(rows) == sum(n - 1 for of_samples in lengths for n in of_samples)
    assert max(rows) == slots


def test_samples_that_end_with_their_first_token_need_no_slot():
    steps, _, batches = drive([[1, 1]] * 20, slots=4)
    assert steps == 0
    assert len(batches) == math.ceil(20 / prompt_slots(4))


def test_rows_stay_dense_while_the_last_samples_finish_one_by_one():
    lengths = [5, 3, 9, 2, 7]
    _, rows, _ = drive([lengths], slots=8)
    assert rows == [sum(n - 1 > step for n in lengths) for step in range(8)]


def test_prompts_are_computed_together_within_the_budget_and_a_longer_one_alone():
    third = PROMPT_TOKENS // 3
    _, _, batches = drive(
        [[2]] * 6, slots=64, prompts=[third, third, third, third, 5 * PROMPT_TOKENS, 1], limits=[9] * 6
    )
    assert batches == [[0, 1, 2], [3], [4], [5]]
    _, _, batches = drive([[2]] * 20, slots=64, prompts=[1] * 20)
    assert [len(batch) for batch in batches] == [8, 8, 4]


def test_prompts_are_not_computed_before_a_slot_is_free():
    schedule = Scheduler([5] * 20, [9] * 20, slots=2)
    assert list(schedule.prompts()) == list(range(8))
    schedule.ready([(r, 0) for r in range(8)])
    schedule.fill()
    assert schedule.prompts() == {}  # two decode, six are ready
    for request in range(2, 8, 2):
        schedule.retire([0, 1])
        assert [copy.source for copy in schedule.fill()] == [2 + request, 3 + request]
        assert schedule.prompts() == {}
    schedule.retire([1])
    assert list(schedule.prompts()) == list(range(8, 16))
