"""The step that can be recorded equals a plain pass over each sequence, whatever lies in rows that it must not see."""

import copy

import pytest
import torch
from forests import FEATURES, VOCABULARY, Alone, tiny_decoder

from rung.core.records import Layout
from rung.lm.decoder import Decoder
from rung.lm.foreign import ForeignDecoder
from rung.lm.norm import RMSNorm, _in_few_kernels
from rung.lm.protocols import StaticDecoder

CAPACITY, SLOTS = 24, 7  # the last slot is the fillers'
FAR = 1e3  # what dead rows hold: a weight of 1e-12 would show


def garbage_behind(state) -> None:
    """Dead rows hold large numbers, the fillers' slot NaN."""
    for rows in state.rows:
        for slot, length in enumerate(state.length_S.tolist()):
            rows[:, slot, :, length:] = FAR if slot < SLOTS - 1 else torch.nan


def step_inputs(sequences: list[list[int]], bucket: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, slots and positions of a step that feeds every sequence's last token."""
    fillers = bucket - len(sequences)
    return (
        torch.tensor([sequence[-1] for sequence in sequences] + [3] * fillers),
        torch.tensor([*range(len(sequences))] + [SLOTS - 1] * fillers),
        torch.tensor([len(sequence) - 1 for sequence in sequences] + [0] * fillers),
    )


@torch.no_grad()
def assert_static_steps_equal_plain_passes(decoder: Decoder, alone: Alone, tolerance: float) -> None:
    """Prompts of 1, 9 and 5 tokens in the first slots, another sequence behind them, then six steps."""
    state = decoder.new_state(SLOTS, CAPACITY)
    step = decoder.static_step(state)
    prompts = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 4, 6, 8, 10]]
    waiting = [5, 5, 5]  # in slot 4: a prompt that waits where fillers look
    decoder(
        torch.tensor([token for prompt in [*prompts, waiting] for token in prompt]),
        Layout.chains([1, 9, 5, 3], slots=[0, 1, 2, 4]),
        state,
    )
    state.commit(torch.tensor([0, 1, 2, 4]), torch.arange(9).expand(4, -1), torch.tensor([1, 9, 5, 3]))
    before = [rows[:, 4, :, :3].clone() for rows in state.rows]
    for number in range(6):
        for index, prompt in enumerate(prompts):
            prompt.append((11 * number + 5 * index) % VOCABULARY)
        garbage_behind(state)
        read = 16 if number < 3 else CAPACITY
        hidden_RD = step(*step_inputs(prompts, bucket=5 if number % 2 else 3), read)
        state.extend(3)
        for row, sequence in enumerate(prompts):
            torch.testing.assert_close(hidden_RD[row].double(), alone(sequence), rtol=tolerance, atol=tolerance)
    assert state.length_S.tolist() == [7, 15, 11, 0, 3, 0, 0]
    assert all(torch.equal(rows[:, 4, :, :3], kept) for rows, kept in zip(state.rows, before, strict=True))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_a_static_step_equals_a_plain_pass(kv_heads):
    decoder = tiny_decoder(kv_heads)
    assert_static_steps_equal_plain_passes(decoder, Alone(decoder), 1e-10)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_static_step_equals_a_plain_pass_with_any_feature(feature):
    decoder = tiny_decoder(3, feature=feature)
    assert_static_steps_equal_plain_passes(decoder, Alone(decoder), 1e-10)


@pytest.mark.parametrize("feature", ["", "soft-cap", "window"])
def test_in_bf16_it_differs_by_rounding(feature):
    decoder = tiny_decoder(2, torch.bfloat16, feature)
    assert_static_steps_equal_plain_passes(decoder, Alone(copy.deepcopy(decoder).double()), 0.2)


def test_only_our_own_decoder_has_a_static_step():
    assert isinstance(tiny_decoder(), StaticDecoder)
    assert "static_step" not in dir(ForeignDecoder)


@torch.no_grad()
def test_rows_that_are_settled_are_all_there_finite_and_never_move():
    decoder = tiny_decoder()
    state = decoder.new_state(2, CAPACITY)
    decoder.static_step(state)
    addresses = [rows.data_ptr() for rows in state.rows]
    assert all(rows.shape[3] == CAPACITY and not rows.any() for rows in state.rows)  # fresh memory is NaN in tests
    decoder(torch.zeros(20, dtype=torch.long), Layout.chain(20), state)
    state.commit(torch.tensor([0]), torch.arange(20)[None], torch.tensor([20]))
    state.fork([0], [1])
    state.free(torch.arange(2))
    decoder(torch.zeros(2, dtype=torch.long), Layout.chain(2), state)
    assert [rows.data_ptr() for rows in state.rows] == addresses


def test_a_state_that_holds_rows_cannot_be_settled_and_one_that_is_not_cannot_be_extended():
    decoder = tiny_decoder()
    state = decoder.new_state(1, CAPACITY)
    with pytest.raises(AssertionError, match="static_step"):
        state.extend(1)
    decoder(torch.zeros(2, dtype=torch.long), Layout.chain(2), state)
    state.commit(torch.tensor([0]), torch.arange(2)[None], torch.tensor([2]))
    with pytest.raises(AssertionError, match="cannot move"):
        decoder.static_step(state)


@pytest.mark.parametrize("kind", ["plain", "wide", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_norm_in_few_kernels_is_the_norm_but_for_the_order_of_a_sum(kind, dtype):
    norm = RMSNorm(33, 1e-3, dtype, kind=kind)
    norm.weight.copy_(torch.linspace(-1, 2, 33))
    x_ND = torch.randn(50, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    got_ND, wanted_ND = _in_few_kernels(x_ND, norm.weight, norm.eps, kind), norm(x_ND)
    assert got_ND.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]
    torch.testing.assert_close(got_ND, wanted_ND, rtol=tolerance, atol=tolerance)
    assert (got_ND != wanted_ND).float().mean() < (0.01 if dtype == torch.bfloat16 else 1)
