"""One law for every layout: a token's hidden state is that of a plain pass over its own sequence alone."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from forests import FEATURES, Alone, assert_the_law, fillers, group, plainly, tiny_decoder, tokens, tree

from rung.core.records import Layout
from rung.lm.config import AttentionSpec, RopeSpec
from rung.lm.decoder import Decoder
from rung.lm.mixers import packed
from rung.lm.mixers.attention import choose_plan
from rung.lm.mixers.packed import PackedPlan, pieces, tiles
from rung.lm.mixers.plain import PlainPlan
from rung.lm.mixers.step import StepPlan


def random_packed_layout(rng: np.random.Generator) -> Layout:
    """What a learner packs: groups (also of one, also with empty completions), chains, trees, fillers in between."""
    parts = []
    for slot in range(rng.integers(1, 5)):
        kind = rng.random()
        if kind < 0.3:
            parts.append(tree(rng, int(rng.integers(1, 16)), slot=slot, bushy=0.3))
        elif kind < 0.8:
            completions = rng.integers(0, 9, size=rng.integers(1, 5)).tolist()
            parts.append(group(int(rng.integers(1, 9)), completions, slot=slot))
        else:
            parts.append(Layout.chain(int(rng.integers(1, 14)), slot=slot))
        if rng.random() < 0.3:
            parts.append(fillers(int(rng.integers(1, 4))))
    return Layout.concat(parts)


def assert_law(decoder: Decoder, layout: Layout, token_T: list[int]) -> None:
    assert_the_law(decoder(torch.tensor(token_T), layout), Alone(decoder), layout, token_T)


def spec_of(decoder):
    return decoder.blocks[0].mixer.spec


@pytest.mark.parametrize("seed", range(12))
def test_packed_groups_chains_and_trees_equal_each_sequence_alone(seed):
    rng, decoder = np.random.default_rng(seed), tiny_decoder(kv_heads=seed % 3 + 1)
    layout = random_packed_layout(rng)
    assert isinstance(choose_plan(layout, spec_of(decoder), None, decoder.embedding.weight), PackedPlan)
    assert_law(decoder, layout, tokens(rng, len(layout)))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("feature", FEATURES)
def test_with_every_feature_packed_layouts_equal_each_sequence_alone(feature, seed, monkeypatch):
    monkeypatch.setattr(packed, "QUERY_BLOCK", 4)
    rng, decoder = np.random.default_rng(seed), tiny_decoder(kv_heads=seed % 3 + 1, feature=feature)
    layout = Layout.concat([random_packed_layout(rng), Layout.chain(13, slot=9)])
    assert isinstance(choose_plan(layout, spec_of(decoder), None, decoder.embedding.weight), PackedPlan)
    assert_law(decoder, layout, tokens(rng, len(layout)))


@pytest.mark.parametrize("seed", range(4))
def test_trees_equal_each_path_alone(seed):
    rng, decoder = np.random.default_rng(seed), tiny_decoder()
    deep = Layout(torch.tensor([-1, 0, 0, 2, 2]), torch.zeros(5).long(), torch.tensor([0, 1, 1, 2, 2]))
    layout = Layout.concat([tree(rng, 12, slot=1), fillers(2), deep, tree(rng, 9, slot=2, bushy=0.9)])
    assert isinstance(choose_plan(layout, spec_of(decoder), None, decoder.embedding.weight), PackedPlan)
    assert_law(decoder, layout, tokens(rng, len(layout)))


@pytest.mark.parametrize(
    ("seed", "feature"), [*((s, "") for s in range(6)), *((s, f) for s in (6, 7) for f in FEATURES)]
)
def test_packed_gradients_equal_those_of_the_dense_mask(seed, feature, monkeypatch):
    monkeypatch.setattr(packed, "QUERY_BLOCK", 4)  # so that runs of 5 to 13 tokens are cut too
    monkeypatch.setattr(packed, "SLACK", 8)
    rng, decoder = np.random.default_rng(seed), tiny_decoder(kv_heads=seed % 3 + 1, feature=feature)
    layout = random_packed_layout(rng)
    token_T, real_T = tokens(rng, len(layout)), layout.slot_T >= 0
    weight_TD = torch.from_numpy(rng.normal(size=(len(layout), 12)))

    def gradients(hidden_TD):
        return torch.autograd.grad((hidden_TD * weight_TD)[real_T].sum(), list(decoder.parameters())[:-1])

    fast = gradients(decoder(torch.tensor(token_T), layout))
    slow = gradients(plainly(decoder, token_T, layout))
    for ours, twin in zip(fast, slow, strict=True):
        assert twin.abs().max() > 0
        torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("feature", ["", "all"])
def test_a_shared_prompt_collects_the_gradients_of_unshared_copies(feature):
    """The group's prompt once, or once per completion: one loss over the completions, one gradient."""
    rng, decoder = np.random.default_rng(3), tiny_decoder(feature=feature)
    prompt, completions = tokens(rng, 5), [tokens(rng, n) for n in (3, 7, 1)]
    lengths = [len(c) for c in completions]
    shared = decoder(torch.tensor([*prompt, *chain.from_iterable(completions)]), group(5, lengths))[5:]
    copies = torch.tensor([token for completion in completions for token in (*prompt, *completion)])
    unshared = decoder(copies, Layout.chains([5 + n for n in lengths]))
    unshared = torch.cat([part[5:] for part in unshared.split([5 + n for n in lengths])])
    inputs = [*decoder.blocks.parameters(), decoder.embedding.weight]
    for one, other in zip(*(torch.autograd.grad(h.sin().sum(), inputs) for h in (shared, unshared)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_linears_and_norms_see_every_token_of_a_group_once():
    decoder, seen = tiny_decoder(), []
    for module in decoder.modules():
        if type(module).__name__ in ("Linear", "RMSNorm"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    layout = Layout.concat([group(6, [2, 5, 3]), group(4, [1, 1], slot=1)])
    decoder(torch.zeros(len(layout), dtype=torch.int64), layout)
    prompts_and_completions = (6 + 2 + 5 + 3) + (4 + 1 + 1)
    assert seen == [prompts_and_completions] * (2 * 6 + 1)  # per block 2 norms and 4 matrices; the final norm


@pytest.mark.parametrize("kind", ["packed", "tree"])
def test_what_fillers_hold_changes_nothing_even_gradients(kind):
    rng, decoder = np.random.default_rng(0), tiny_decoder()
    body = group(4, [3, 2]) if kind == "packed" else tree(rng, 9, slot=0)
    layout, body_T = Layout.concat([fillers(1), body, fillers(3)]), tokens(rng, 9)

    def result(before: int, behind: list[int]):
        hidden_TD = decoder(torch.tensor([before, *body_T, *behind]), layout)[1:10]
        return hidden_TD, *torch.autograd.grad(hidden_TD.sin().sum(), decoder.blocks.parameters())

    for one, other in zip(result(0, [0, 0, 0]), result(40, [1, 2, 3]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_tiles_hold_every_query_once_with_little_padding(seed):
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in np.exp(rng.uniform(0, 6.5, size=60))]
    layout = Layout.concat([group(30, lengths[:30]), Layout.chains(lengths[30:], slots=range(1, 31))])
    cut = pieces(layout)
    queries = sorted(query for piece in cut for query in range(piece.query, piece.query + piece.count))
    assert queries == list(range(len(layout)))
    found = tiles(cut, heads=9)
    useful = sum(piece.count * piece.keys for piece in cut)
    padded = sum(len(tile) * max(p.count for p in tile) * max(p.keys for p in tile) for tile in found)
    assert padded <= packed.WASTE * useful + len(found) * packed.SLACK
    assert len(found) < len(cut) / 2


@pytest.mark.parametrize("window", [1, 3, 40])
def test_a_window_leaves_no_key_in_a_piece_that_none_of_its_queries_sees(window, monkeypatch):
    monkeypatch.setattr(packed, "QUERY_BLOCK", 8)
    layout = Layout.concat([group(30, [5, 20]), Layout.chain(50, slot=1)])
    whole, cut = pieces(layout), pieces(layout, window)
    for piece, narrow in zip(whole, cut, strict=True):
        assert (piece.query, piece.count) == (narrow.query, narrow.count)
        assert narrow.visible == min(piece.visible, window)  # of the first query; each further one sees one key more
        keys, kept = ([*p.above_P.tolist(), *range(p.own, p.own + p.keys - len(p.above_P))] for p in (piece, narrow))
        assert kept == keys[len(keys) - len(kept) :]


@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_a_tile_sees_a_key_padding_too(seed):
    rng = np.random.default_rng(seed)
    for window in (1, 2, 5, 30):
        for tile in tiles(pieces(random_packed_layout(rng), window), heads=3):
            query_BC, key_BN, visible_B = packed._rows(tile, padding=99)
            assert packed._seen(visible_B, query_BC.shape[1], key_BN.shape[1], window).any(-1).all()


def test_each_kind_of_layout_takes_its_own_plan():
    decoder = tiny_decoder()
    spec, weight = spec_of(decoder), decoder.embedding.weight

    def plan(layout, *lengths):
        state = decoder.new_state(slots=4, capacity=40)
        state.length_S[: len(lengths)] = torch.tensor(lengths)
        return type(choose_plan(layout, spec, state.place(layout), weight))

    one_each = Layout.concat([Layout.chains([1, 1, 1], starts=[3, 1, 2]), fillers(5)])
    assert plan(one_each, 3, 1, 2) is StepPlan
    assert plan(Layout.chains([1, 1], slots=[1, 0]), 3, 1) is PlainPlan  # not in order
    assert plan(Layout.chains([4, 2], slots=[3, 1])) is PackedPlan  # a prefill
    assert plan(Layout.chains([4, 2], starts=[2, 0]), 2) is PlainPlan  # a chunk behind committed rows
    assert plan(Layout.concat([Layout.chains([1]), Layout.chains([2], slots=[1])]), 3, 1) is PlainPlan


def test_two_kinds_of_attention_in_one_decoder_each_follow_their_own_plan():
    base = tiny_decoder().config
    other = AttentionSpec(heads=4, kv_heads=2, head_dim=6, rope=RopeSpec(theta=100.0, scaling="linear", factor=2.0))
    config = replace(base, blocks=(base.blocks[0], replace(base.blocks[1], mixer=other)))
    decoder = Decoder(config, torch.float64).init_(torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    layout = group(5, [3, 4])
    assert_law(decoder, layout, tokens(rng, len(layout)))
