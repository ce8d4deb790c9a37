"""The compiled kernels against their twins in PyTorch, and against the same sums in fp64."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forests import FEATURES, group, tiny_decoder

from rung.core.records import Layout
from rung.lm import fused
from rung.lm.channels import mlp
from rung.lm.decoder import Decoder
from rung.lm.norm import _normalised
from rung.lm.presets import llama
from rung.lm.rope import rotate

pytestmark = pytest.mark.skipif(
    fused._kernels("cpu", torch.bfloat16) is None, reason="Numba finds no OpenMP here: PyTorch's operations serve"
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def nearly(got: torch.Tensor, exact: torch.Tensor) -> bool:
    """Equal up to one rounding to bf16, and what fp32 loses in a sum."""
    return torch.allclose(got.double(), exact.double(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("width", [576, 33, 48, 2])
def test_the_norm_equals_its_twin_but_for_the_order_of_a_sum(width):
    different = 0
    for seed in range(30):
        x_1D, weight_D = numbers(1, width, seed=seed) * 3, numbers(width, seed=1)
        with torch.no_grad():
            got_1D, twin_1D = fused.rms_norm(x_1D, weight_D, 0.1), _normalised(x_1D, weight_D, 0.1)
        assert torch.allclose(got_1D.float(), twin_1D.float(), rtol=2**-6, atol=0)  # one step of each rounding
        different += int((got_1D != twin_1D).sum())
    assert different < 30 * width / 500


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(576, 960), (1536, 576), (33, 7), (5, 1)])
def test_a_product_of_one_row(width, out, bias):
    x_1D, weight_ED = numbers(1, width), numbers(out, width, seed=1)
    bias_E = numbers(out, seed=2) if bias else None
    exact = torch.nn.functional.linear(x_1D.double(), weight_ED.double(), bias_E.double() if bias else None)
    assert nearly(fused.linear(x_1D, weight_ED, bias_E), exact)


@pytest.mark.parametrize("width", [1536, 7])
def test_the_gate_equals_its_twin_but_for_the_last_bit_of_exp(width):
    gate_up_1E = numbers(1, 2 * width) * 10
    gate_up_1E[0, :3] = torch.tensor([0.0, 300.0, -60.0])
    got_1F = fused.silu_gate(gate_up_1E)
    gate_1F, up_1F = gate_up_1E.double().chunk(2, -1)
    assert torch.allclose(got_1F.double(), torch.nn.functional.silu(gate_1F) * up_1F, rtol=2**-7, atol=1e-30)
    with torch.no_grad():
        assert (got_1F != mlp.silu_gate(gate_up_1E)).float().mean() < 1e-3
    gate_up_1E[0, 0] = torch.nan
    assert fused.silu_gate(gate_up_1E)[0, 0].isnan()


def step(heads: int, kv_heads: int, head_dim: int, count: int) -> tuple[torch.Tensor, ...]:
    """qkv, cos, signed sin, and a cache whose dead rows are NaN."""
    rows_2SKCd = numbers(2, 3, kv_heads, 64, head_dim, seed=3)
    rows_2SKCd[:, 0, :, count:] = torch.nan
    angle_11d = numbers(1, 1, head_dim // 2, seed=4)
    cos_11d, sin_11d = angle_11d.cos(), angle_11d.sin()
    turn = torch.cat((cos_11d, cos_11d), -1), torch.cat((-sin_11d, sin_11d), -1)
    return numbers(1, (heads + 2 * kv_heads) * head_dim, seed=5), *turn, rows_2SKCd


def attention_by_hand(qkv_1E, cos_11d, sin_11d, rows_2SKCd, row, heads, *, rounded: bool):
    """One head at a time, from rows that `attend` has written: in fp64, or rounded as the learner does."""
    head_dim = cos_11d.shape[-1]
    turned_Hd = rotate(qkv_1E.unflatten(1, (-1, head_dim))[:, :heads], cos_11d, sin_11d)[0].double()
    group, out = heads // rows_2SKCd.shape[2], torch.zeros(heads, head_dim).double()

    def round_(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().double() if rounded else x

    for head in range(heads):
        k_Cd, v_Cd = rows_2SKCd[:, 0, head // group, : row + 1].double()
        score_C = round_(round_(k_Cd @ turned_Hd[head]) * head_dim**-0.5)
        out[head] = round_(score_C.softmax(0)) @ v_Cd
    return out.flatten()[None]


def assert_attention(out_1O: torch.Tensor, *arguments) -> None:
    """As the learner rounds, but where a sum in another order falls on the other side; near the exact one."""
    rounded_1O = attention_by_hand(*arguments, rounded=True)
    distance_1O = (out_1O.double() - rounded_1O).abs()
    assert (distance_1O <= 2**-8 * rounded_1O.abs() + 1e-5).double().mean() > 0.9
    assert torch.allclose(out_1O.double(), attention_by_hand(*arguments, rounded=False), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("count", [0, 5, 63, 17, 1])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (6, 1, 10), (1, 1, 2)])
def test_attention_of_a_step(heads, kv_heads, head_dim, count):
    qkv_1E, cos_11d, sin_11d, rows_2SKCd = step(heads, kv_heads, head_dim, count)
    before = rows_2SKCd.clone()
    out_1O = fused.attend(qkv_1E, cos_11d, sin_11d, rows_2SKCd, count, heads)
    assert_attention(out_1O, qkv_1E, cos_11d, sin_11d, rows_2SKCd, count, heads)
    qkv_1Hd = qkv_1E.unflatten(1, (-1, head_dim))
    k_1Kd = rotate(qkv_1Hd[:, heads : heads + kv_heads], cos_11d, sin_11d)
    assert torch.equal(rows_2SKCd[0, 0, :, count], k_1Kd[0])
    assert torch.equal(rows_2SKCd[1, 0, :, count], qkv_1Hd[0, heads + kv_heads :])
    rows_2SKCd[:, 0, :, count] = before[:, 0, :, count]
    assert torch.equal(rows_2SKCd.nan_to_num(7), before.nan_to_num(7)), "a row that is not the step's own was written"


def test_attention_to_very_unequal_scores():
    qkv_1E, cos_11d, sin_11d, rows_2SKCd = step(2, 1, 16, 40)
    rows_2SKCd[0, 0, :, :40] *= 60  # differences of some hundreds: most weights are zero
    out_1O = fused.attend(qkv_1E, cos_11d, sin_11d, rows_2SKCd, 40, 2)
    assert_attention(out_1O, qkv_1E, cos_11d, sin_11d, rows_2SKCd, 40, 2)


def test_what_is_not_finite_is_not_hidden():
    weight_D = torch.ones(32).bfloat16()
    for bad in (torch.nan, torch.inf):
        x_1D = numbers(1, 32)
        x_1D[0, 5] = bad
        assert not torch.isfinite(fused.linear(x_1D, numbers(3, 32, seed=1), None)).any()
        assert fused.rms_norm(x_1D, weight_D, 1e-5).isnan().any()
    for place in (0, 1):  # a key, a value
        qkv_1E, cos_11d, sin_11d, rows_2SKCd = step(4, 2, 16, 5)
        rows_2SKCd[place, 0, 0, 2] = torch.nan
        out_Hd = fused.attend(qkv_1E, cos_11d, sin_11d, rows_2SKCd, 5, 4).view(4, 16)
        assert out_Hd[:2].isnan().all()
        assert torch.isfinite(out_Hd[2:]).all()


@pytest.mark.parametrize(("rows", "vocabulary", "block"), [(3, 1000, 256), (2, 256, 256), (1, 7, 3)])
def test_log_sums_over_blocks_of_the_vocabulary(rows, vocabulary, block):
    logits_NV = numbers(rows, vocabulary) * 4
    logits_NV[0, :block] = -torch.inf
    logits_NV[-1, -1] = 90.0  # the rest of its block is nothing beside it
    beta_N1 = torch.tensor([[1.0], [1 / 1.2], [3.0]])[-rows:]
    top_NM, lse_NM, raw_NM = fused.block_sums(logits_NV, beta_N1, block)
    blocks = logits_NV.double().split(block, 1)
    beta_N = beta_N1[:, 0].double()
    assert nearly(top_NM, torch.stack([z.amax(1) * beta_N for z in blocks], 1))
    for got, exact in (
        (lse_NM, torch.stack([(z * beta_N1).logsumexp(1) for z in blocks], 1)),
        (raw_NM, torch.stack([z.logsumexp(1) for z in blocks], 1)),
    ):
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)
    for bad in (torch.nan, torch.inf):
        logits_NV[-1, 5] = bad
        _, lse_NM, raw_NM = fused.block_sums(logits_NV, beta_N1, block)
        assert not torch.isfinite(lse_NM[-1, 5 // block])
        assert not torch.isfinite(raw_NM[-1, 5 // block])


@pytest.mark.skipif(torch.get_num_threads() > 1, reason="starts from one thread")
def test_the_number_of_threads_changes_no_bit():
    x_1D, weight_ED, arguments = numbers(1, 576), numbers(101, 576, seed=1), step(9, 3, 64, 50)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            rows_2SKCd = arguments[3].clone()
            attended = fused.attend(*arguments[:3], rows_2SKCd, 50, 9)
            product = fused.linear(x_1D, weight_ED, None)
            results.append((attended, rows_2SKCd.nan_to_num(7), product))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_steps_of_a_decoder_with_and_without_the_kernels(monkeypatch):
    config = llama(vocab_size=97, width=48, layers=3, heads=6, kv_heads=2, ffn_width=80)
    decoder = Decoder(config, torch.bfloat16).init_(torch.Generator().manual_seed(0))
    for parameter in decoder.parameters():
        parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    exact, ours = steps(copy.deepcopy(decoder).double(), 1), steps(decoder, 1)
    of_three = steps(decoder, 3)
    monkeypatch.setattr(fused, "serves", lambda x: False)
    twin = steps(decoder, 1)
    assert not torch.equal(ours, twin), "the kernels never served"
    assert torch.equal(of_three, steps(decoder, 3)), "the kernels serve one row"
    assert (ours - exact).norm() < 1.2 * (twin - exact).norm() < 0.03 * exact.norm()


SERVED = {"": True, "no positions": True, "normed heads": True, "window of 8": True, "soft-cap": False, "scale": False}
SERVED |= {"turned in part": False, "window": False}


@pytest.mark.parametrize("feature", SERVED)
def test_the_kernel_of_attention_serves_what_it_computes_and_nothing_else(feature, monkeypatch):
    """Eight steps reach no further than a window of 8."""
    decoder = tiny_decoder(2, torch.bfloat16, feature.removesuffix(" of 8"))
    for block in decoder.blocks if feature == "window of 8" else ():
        block.mixer.spec = replace(block.mixer.spec, window=8)
    exact, calls, attend = steps(copy.deepcopy(decoder).double(), 1), [], fused.attend
    monkeypatch.setattr(fused, "attend", lambda *a: calls.append(len(calls)) or attend(*a))
    ours = steps(decoder, 1)
    first = 2 * FEATURES.get(feature, {}).get("window", 0)  # before a row is out of the window it makes no difference
    assert len(calls) == (2 * 8 if SERVED[feature] else first)
    assert (ours - exact).norm() < 0.03 * exact.norm()


@torch.inference_mode()
def steps(decoder: Decoder, slots: int) -> torch.Tensor:
    """Hidden states of eight steps, in fp64."""
    state, hidden, slot_S = decoder.new_state(slots, 16), [], torch.arange(slots)
    for position in range(8):
        chains = Layout.chains([1] * slots, slots=slot_S.tolist())
        layout = Layout(chains.parent_T, chains.slot_T, torch.full((slots,), position))
        hidden.append(decoder((slot_S + 7 * position) % decoder.config.vocab_size, layout, state).double())
        state.commit(slot_S, torch.zeros(slots, 1).long(), torch.ones(slots).long())
    return torch.stack(hidden)


def test_kernels_serve_bf16_on_a_cpu_and_no_learner():
    with torch.inference_mode():
        assert fused.serves(numbers(2, 4))
        assert fused.serves_one(numbers(1, 4))
        assert not fused.serves_one(numbers(2, 4))
        assert not fused.serves(numbers(1, 4).float())
        assert not fused.serves(numbers(1, 4).to("meta"))
    assert not fused.serves(numbers(1, 4))
    with torch.no_grad():
        assert not fused.serves(numbers(1, 4))


def test_what_a_learner_scores_is_what_it_differentiates():
    config = llama(vocab_size=97, width=48, layers=3, heads=6, kv_heads=2, ffn_width=80)
    decoder = Decoder(config, torch.bfloat16).init_(torch.Generator().manual_seed(0))
    tokens_T, layout = torch.arange(20), group(5, [7, 8])
    with torch.no_grad():
        scored_TD = decoder(tokens_T, layout)
    assert torch.equal(decoder(tokens_T, layout), scored_TD)


def test_without_a_folder_for_machine_code_the_kernels_are_compiled_all_the_same(tmp_path):
    package = Path(fused.__file__).parent
    (tmp_path / "kernels.py").write_bytes((package / "kernels.py").read_bytes())
    script = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import kernels, numpy as np\n"
        "x = np.full(8, 0x3F80, np.uint16); y = np.zeros(8, np.uint16)\n"
        "kernels.rms_norm(x.ctypes.data, x.ctypes.data, y.ctypes.data, 8, 0.0)\n"
        "assert (y == 0x3F80).all()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
