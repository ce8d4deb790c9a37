"""FlexAttention's plan: who sees whom in two comparisons a pair, blocks that leave nothing out, the law of `forests`.

The library's kernels need a GPU (tests/gpu); here its eager form computes, or a dense one that has gradients too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_flex import dense_flex
from elsewhere import DEVICE, elsewhere
from forests import FEATURES, Alone, assert_the_law, fillers, group, plainly, tiny_decoder, tokens, tree
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from rung.core.records import Layout
from rung.lm.config import AttentionSpec
from rung.lm.mixers import attention, flex
from rung.lm.mixers.flex import FlexPlan, preorder
from rung.lm.mixers.packed import PackedPlan
from rung.lm.mixers.plain import PlainPlan

LIKE = torch.zeros(1, dtype=torch.float64)


@contextmanager
def planned_by(build: Callable, kernel: Callable = dense_flex) -> Iterator[None]:
    """Every forward by this plan; FlexAttention itself by `kernel`."""
    kept = attention.choose_plan, flex.kernel
    attention.choose_plan, flex.kernel = build, lambda device: kernel
    try:
        yield
    finally:
        attention.choose_plan, flex.kernel = kept


def random_layout(rng: np.random.Generator, size: int = 1) -> Layout:
    """Trees in any order on the axis, groups, prompts that begin alike, chains, fillers in between and behind."""
    parts = []
    for slot in range(rng.integers(1, 6)):
        kind = rng.integers(4)
        if kind == 0:
            parts.append(tree(rng, int(rng.integers(1, 30 * size)), slot=slot, bushy=float(rng.random())))
        elif kind == 1:
            completions = rng.integers(0, 9 * size, size=rng.integers(1, 5)).tolist()
            parts.append(group(int(rng.integers(1, 9 * size)), completions, slot=slot))
        elif kind == 2:
            words = [rng.integers(2, size=rng.integers(1, 12 * size)).tolist() for _ in range(4)]
            parts.append(Layout.trie(words, [99] * 4, slots=[slot] * 4)[0])
        else:
            parts.append(Layout.chain(int(rng.integers(1, 20 * size)), slot=slot))
        parts.append(fillers(int(rng.integers(0, 3))))
    return Layout.concat(parts)


def spec_of(window: int = 0) -> AttentionSpec:
    return AttentionSpec(heads=2, kv_heads=1, head_dim=6, window=window)


def seen_by(layout: Layout, window: int) -> torch.Tensor:
    distance_TT = layout.position_T[:, None] - layout.position_T
    return layout.ancestors_TT() & (distance_TT < (window or 10**6))


def test_the_example_of_preorder_is_right():
    enter_T, exit_T = preorder(np.array([-1, 0, 0, 1]))
    assert (enter_T.tolist(), exit_T.tolist()) == ([0, 1, 3, 2], [4, 3, 4, 3])


@pytest.mark.parametrize("seed", range(60))
def test_the_mask_is_that_of_the_ancestors_and_the_window(seed):
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    for window in (0, 1, int(rng.integers(2, 9))):
        mask_mod = FlexPlan.build(layout, spec_of(window), None, LIKE).block_mask.mask_mod
        seen_TT = create_mask(mask_mod, None, None, len(layout), len(layout), "cpu")[0, 0]
        assert torch.equal(seen_TT, seen_by(layout, window))


@pytest.mark.parametrize("seed", range(30))
def test_blocks_cover_what_is_seen_and_full_ones_are_those_that_are(seed, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 4)
    rng = np.random.default_rng(seed)
    layout, blocks = random_layout(rng), flex.blocks
    found = []
    monkeypatch.setattr(flex, "blocks", lambda *given: found.append(blocks(*given)) or found[-1])
    for window in (0, 3, 9):
        FlexPlan.build(layout, spec_of(window), None, LIKE)
        part_QN, full_QN = found[-1]
        whole = -len(layout) % 4 + len(layout)
        seen_TT = np.zeros((whole, whole), dtype=bool)
        seen_TT[: len(layout), : len(layout)] = seen_by(layout, window)
        square_QiNj = seen_TT.reshape(whole // 4, 4, whole // 4, 4)
        assert not (square_QiNj.any((1, 3)) & ~(part_QN | full_QN)).any()
        assert (full_QN == square_QiNj.all((1, 3))).all()
        assert not (part_QN & full_QN).any()


def test_blocks_of_a_packed_batch_leave_out_all_that_is_not_seen():
    """Samples one after another, as the packer lays them: here the extremes rule out every empty block."""
    layout = Layout.concat([group(40, [30, 50, 7, 3]), Layout.chain(61, slot=1), group(11, [200, 190], slot=2)])
    enter_T, exit_T = preorder(layout.parent_T.numpy())
    part_QN, full_QN = flex.blocks([(enter_T, enter_T), (-exit_T, -enter_T - 1)], 16)
    seen_TT = np.zeros((-(-len(layout) // 16) * 16,) * 2, dtype=bool)
    seen_TT[: len(layout), : len(layout)] = layout.ancestors_TT()
    any_QN = seen_TT.reshape(len(part_QN), 16, len(part_QN), 16).any((1, 3))
    assert ((part_QN | full_QN) == any_QN).all()
    assert full_QN.sum() > any_QN.sum() / 3


@pytest.mark.parametrize("length", [5, 128, 129, 512, 700])
def test_the_block_mask_is_the_librarys_own(length):
    """`create_block_mask` asks all T x T pairs; where every block left in is one that is seen, all lists are equal."""
    layout = Layout.chain(length)
    for window in (0, 150):
        ours = FlexPlan.build(layout, spec_of(window), None, LIKE).block_mask
        theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
        assert (ours.shape, ours.BLOCK_SIZE) == (theirs.shape, theirs.BLOCK_SIZE)
        for name in ("kv", "full_kv", "q", "full_q"):
            count, other = (getattr(mask, f"{name}_num_blocks") for mask in (ours, theirs))
            assert torch.equal(count, other)
            listed, others = (getattr(mask, f"{name}_indices") for mask in (ours, theirs))
            used = torch.arange(listed.shape[-1]) < count[..., None]
            assert torch.equal(listed[used], others[used])
            assert listed.is_contiguous()
            assert listed.dtype == others.dtype == count.dtype


@pytest.mark.parametrize("feature", ["", *FEATURES])
def test_with_every_feature_a_token_sees_its_own_sequence_alone(feature):
    for seed in range(3):
        rng, decoder = np.random.default_rng(seed), tiny_decoder(kv_heads=seed + 1, feature=feature)
        layout = random_layout(rng)
        token_T = tokens(rng, len(layout))
        with planned_by(FlexPlan.build):
            hidden_TD = decoder(torch.tensor(token_T), layout)
        assert_the_law(hidden_TD, Alone(decoder), layout, token_T)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("feature", "dtype"), [("all", torch.float64), ("", torch.float32)])
def test_the_librarys_own_eager_form_equals_the_plain_plan(feature, dtype):
    rng, decoder = np.random.default_rng(1), tiny_decoder(dtype=dtype, feature=feature)
    layout = random_layout(rng)
    token_T = tokens(rng, len(layout))
    with torch.no_grad(), planned_by(FlexPlan.build, flex_attention):
        hidden_TD = decoder(torch.tensor(token_T), layout)
    real_T = layout.slot_T >= 0
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected_TD = plainly(decoder, token_T, layout)
    torch.testing.assert_close(hidden_TD[real_T], expected_TD[real_T], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("feature", ["", *FEATURES])
def test_gradients_equal_those_of_the_dense_mask(feature):
    rng, decoder = np.random.default_rng(5), tiny_decoder(feature=feature)
    layout = random_layout(rng)
    token_T, real_T = tokens(rng, len(layout)), layout.slot_T >= 0
    weight_TD = torch.from_numpy(rng.normal(size=(len(layout), 12)))

    def gradients(hidden_TD):
        return torch.autograd.grad((hidden_TD * weight_TD)[real_T].sum(), list(decoder.parameters())[:-1])

    with planned_by(FlexPlan.build):
        ours = gradients(decoder(torch.tensor(token_T), layout))
    for one, other in zip(ours, gradients(plainly(decoder, token_T, layout)), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_prefill_leaves_the_rows_that_the_packed_plan_leaves():
    decoder = tiny_decoder(feature="all")
    layout, _ = Layout.trie([[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8]], [5, 5, 5])
    token_T = torch.tensor([1, 2, 3, 4, 5, 9, 7, 8])

    def prefilled(build):
        state = decoder.new_state(slots=3, capacity=8)
        with planned_by(build):
            decoder(token_T, layout, state)
        state.commit(torch.arange(3), torch.arange(5).expand(3, -1), torch.tensor([5, 4, 2]))
        return [rows[:, s, :, :n] for rows in state.rows for s, n in enumerate((5, 4, 2))]

    for one, other in zip(prefilled(FlexPlan.build), prefilled(PackedPlan.build), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", [FlexPlan, PackedPlan, PlainPlan])
def test_on_another_device_nothing_of_the_host_is_mixed_in_and_nobody_waits(plan):
    rng, decoder = np.random.default_rng(2), tiny_decoder(feature="all")
    layout = random_layout(rng)
    token_T = torch.tensor(tokens(rng, len(layout)))

    def computed():
        place = decoder.embedding.weight.device
        hidden_TD = decoder(token_T.to(place), layout)
        return hidden_TD, *torch.autograd.grad(hidden_TD.sin().sum(), list(decoder.parameters())[:-1])

    with planned_by(plan.build):
        here = computed()
        with elsewhere() as traffic:
            decoder.to(DEVICE)
            there = computed()
            assert (there[0].device, traffic.down) == (DEVICE, 0)
            for one, other in zip(there, here, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-12)


def test_on_another_device_a_chunk_finds_committed_rows_and_nobody_waits():
    decoder = tiny_decoder()
    spec, state, rng = decoder.blocks[0].mixer.spec, decoder.new_state(slots=2, capacity=8), np.random.default_rng(0)
    state.place(Layout.chains([3, 4]))
    state.commit(torch.arange(2), torch.arange(4).expand(2, -1), torch.tensor([3, 4]))
    layout = Layout.chains([2, 1], starts=[3, 4])
    new = state.place(layout)
    rows = torch.from_numpy(rng.normal(size=state.rows[0].shape))
    qkv_TE = torch.from_numpy(rng.normal(size=(3, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)))
    here_TO = PlainPlan.build(layout, spec, new, qkv_TE).attend(qkv_TE, rows.clone())
    with elsewhere() as traffic:
        there_TE = qkv_TE.to(DEVICE)
        there_TO = PlainPlan.build(layout, spec, new, there_TE).attend(there_TE, rows.to(DEVICE))
        assert traffic.down == 0
        torch.testing.assert_close(there_TO.cpu(), here_TO, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 40])
def test_one_kernel_serves_micro_batches_of_all_lengths(window):
    """Dynamo alone, without the compiler behind it: it is what decides whether a call is compiled again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
    spec, rng = replace(spec_of(window), head_dim=16, softcap=0.7, scale=0.3), np.random.default_rng(0)
    for length in (300, 129, 513):  # not as many blocks at first as there are heads: torch would take the two for one
        layout = Layout.concat([random_layout(rng), Layout.chain(length, slot=9)])
        qkv_TE = torch.from_numpy(rng.normal(size=(len(layout), (2 + 2) * 16))).float()
        with torch.no_grad(), planned_by(FlexPlan.build, compiled):
            fast_TO = FlexPlan.build(layout, spec, None, qkv_TE).attend(qkv_TE, None)
        slow_TO = PlainPlan.build(layout, spec, None, qkv_TE).attend(qkv_TE, None)
        torch.testing.assert_close(fast_TO, slow_TO, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of the compiler's own
def test_the_compiled_form_equals_the_plain_plan():
    """Through torch's compiler to the end, which here means C++ for the CPU, and no backward pass."""
    spec, rng = replace(spec_of(40), head_dim=16, softcap=0.7, scale=0.3), np.random.default_rng(0)
    flex.kernel.cache_clear()
    compiled = flex.kernel("cuda")
    for length in (300, 129, 513):
        layout = Layout.concat([random_layout(rng), Layout.chain(length, slot=9)])
        qkv_TE = torch.from_numpy(rng.normal(size=(len(layout), (2 + 2) * 16))).float()
        with torch.no_grad(), planned_by(FlexPlan.build, compiled):
            fast_TO = FlexPlan.build(layout, spec, None, qkv_TE).attend(qkv_TE, None)
        slow_TO = PlainPlan.build(layout, spec, None, qkv_TE).attend(qkv_TE, None)
        torch.testing.assert_close(fast_TO, slow_TO, rtol=1e-4, atol=1e-5)


def test_it_serves_a_gpu_where_its_kernels_hold():
    from torch._subclasses.fake_tensor import FakeTensorMode

    long, short, spec = Layout.chain(flex.BLOCK + 1), Layout.chain(flex.BLOCK), replace(spec_of(), head_dim=16)
    with FakeTensorMode():
        there, wide = (torch.empty(1, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float64))
    assert flex.serves(long, spec, there)
    assert not flex.serves(long, spec, there.new_empty(1, device="cpu"))
    assert not flex.serves(long, spec, wide)
    assert not flex.serves(long, spec_of(), there)
    assert not flex.serves(short, spec, there)
