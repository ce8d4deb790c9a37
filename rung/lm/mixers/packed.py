"""Attention of a learner's packed batch, and of a prefill into empty slots: any forest without committed rows.

Linears, norms and the head see every token once.  Only here tokens are gathered into rectangles: a *run* is a stretch
of tokens without a branch, a *piece* is up to QUERY_BLOCK queries of one run with the keys before them (the runs above
it, then the run itself), a *tile* is pieces of like size, padded to the largest.  Key `j` of a piece is seen by its
query `i` if j < visible + i: one rule for chains, completions and blocks of long runs.  A window adds j >= visible + i
- window, and a piece then begins with the first key that its first query sees.

The backward pass is written out: scores are recomputed, so that a layer keeps nothing but q, k and v, and the rows of
a shared prompt collect the gradients of all that continues it in fp32.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from rung.core.records import Layout
from rung.core.shapes import Float, Int, Tensor
from rung.lm.config import AttentionSpec
from rung.lm.rope import rotary_tables, rotate_
from rung.lm.state import Placement

QUERY_BLOCK = 256  # of a long run, so that half of the causal square is never computed
TILE_SCORES = 1 << 21  # scores of one tile, over all heads: the working set stays near the caches
WASTE, SLACK = 1.25, 1 << 12  # a tile may hold this multiple of its useful scores per head, and this many more


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries [query, query + count); keys: the rows `above_P`, then `visible - P + count - 1` rows from `own` on."""

    query: int
    count: int
    above_P: np.ndarray  # the ancestors of the run, in order, as far as a query sees them
    own: int
    visible: int  # keys that the first query sees

    @property
    def keys(self) -> int:
        return self.visible + self.count - 1


def runs(parent_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First tokens, and lengths.  A run ends where something branches off, so that all of it is above what follows."""
    starts_T = parent_T != np.arange(len(parent_T)) - 1
    starts_T[:1] = True
    joint_N = parent_T[starts_T & (parent_T >= 0)]
    starts_T[joint_N[joint_N + 1 < len(starts_T)] + 1] = True
    first_R = np.flatnonzero(starts_T)
    return first_R, np.diff(first_R, append=len(parent_T))


def pieces(layout: Layout, window: int = 0) -> list[Piece]:
    """Cut the runs of a layout into pieces."""
    parent_T, slot_T = layout.parent_T.numpy(), layout.slot_T.numpy()
    first_R, length_R = runs(parent_T)
    paths = {-1: np.empty(0, np.int64)}  # of the last token of every run: its ancestors and itself
    found = []
    for first, length in zip(first_R.tolist(), length_R.tolist(), strict=True):
        if slot_T[first] < 0:
            continue
        above_P = paths[int(parent_T[first])]
        paths[first + length - 1] = np.concatenate((above_P, np.arange(first, first + length)))
        for start in range(0, length, QUERY_BLOCK):
            count = min(QUERY_BLOCK, length - start)
            piece = Piece(first + start, count, above_P, first, len(above_P) + start + 1)
            found.append(_without(piece, piece.visible - window) if 0 < window < piece.visible else piece)
    return found


def _without(piece: Piece, keys: int) -> Piece:
    """Without its first keys."""
    own = piece.own + max(keys - len(piece.above_P), 0)
    return replace(piece, above_P=piece.above_P[keys:], own=own, visible=piece.visible - keys)


def tiles(all_pieces: Iterable[Piece], heads: int) -> list[list[Piece]]:
    """Pieces of like size together: few tiles, little padding, and none too large."""
    found: list[list[Piece]] = []
    useful = 0
    for piece in sorted(all_pieces, key=lambda p: (p.count, p.keys), reverse=True):
        useful += piece.count * piece.keys
        if found:
            together = [*found[-1], piece]
            area = len(together) * together[0].count * max(p.keys for p in together)
            if area <= WASTE * useful + SLACK and area * heads <= TILE_SCORES:
                found[-1].append(piece)
                continue
        found.append([piece])
        useful = piece.count * piece.keys
    return found


@dataclass(frozen=True, eq=False)
class Tile:
    """Slices of the gathered rows, and the additive mask."""

    queries: slice
    keys: slice
    mask_B1CN: Tensor


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """The tiles of a layout, as rows of width d to gather: of q [T * H], and of k and v together [T * 2K].

    query_M, key_N, value_N: of all tiles one after another, head by head; query T * H is a row of zeros (padding)
    back_M: where the result of each row of q lies; result M is a row of zeros (fillers)
    """

    spec: AttentionSpec
    cos_T1d: Tensor
    sin_T1d: Tensor
    tiles: tuple[Tile, ...]
    query_M: Int[Tensor, "M"]
    key_N: Int[Tensor, "N"]
    value_N: Int[Tensor, "N"]
    back_M: Int[Tensor, "_"]
    new: Placement | None

    @staticmethod
    def build(layout: Layout, spec: AttentionSpec, new: Placement | None, like: Tensor) -> "PackedPlan":
        heads, kv_heads = spec.heads, spec.kv_heads
        made, query_parts, key_parts, at_query, at_key = [], [], [], 0, 0
        for group in tiles(pieces(layout, spec.window), heads):
            query_BC, key_BN, visible_B = _rows(group, padding=len(layout))
            query_BHC = np.minimum(query_BC[:, None] * heads + np.arange(heads)[:, None], len(layout) * heads)
            key_BKN = key_BN[:, None] * (2 * kv_heads) + np.arange(kv_heads)[:, None]
            hidden_B1CN = torch.from_numpy(~_seen(visible_B, query_BC.shape[1], key_BN.shape[1], spec.window)[:, None])
            mask_B1CN = torch.zeros(hidden_B1CN.shape).masked_fill_(hidden_B1CN, -torch.inf)
            queries, keys = slice(at_query, at_query + query_BHC.size), slice(at_key, at_key + key_BKN.size)
            made.append(Tile(queries, keys, mask_B1CN.to(like)))
            query_parts.append(query_BHC.ravel())
            key_parts.append(key_BKN.ravel())
            at_query, at_key = queries.stop, keys.stop
        query_M = np.concatenate([np.empty(0, np.int64), *query_parts])
        key_N = np.concatenate([np.empty(0, np.int64), *key_parts])
        back_M = np.full(len(layout) * heads + 1, at_query)
        back_M[query_M] = np.arange(at_query)
        query, key, back = (torch.from_numpy(part).to(like.device) for part in (query_M, key_N, back_M[:-1]))
        cos_T1d, sin_T1d = rotary_tables(spec, layout.position_T, like)
        return PackedPlan(spec, cos_T1d, sin_T1d, tuple(made), query, key, key + kv_heads, back, new)

    def attend(self, qkv_TE: Float[Tensor, "T E"], rows: Tensor | None) -> Float[Tensor, "T O"]:
        out_TO, kv_TKd = _Attend.apply(qkv_TE, self)
        if rows is not None and self.new is not None:
            self.new.write(rows, kv_TKd.unflatten(1, (2, -1)))
        return out_TO


def _rows(group: list[Piece], *, padding: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a tile's queries [B, C] and keys [B, N], and the keys that each first query sees [B].

    A query beyond its piece is `padding`; a key beyond its piece repeats the last one, which no query of it sees.
    """
    query_BC = np.full((len(group), max(piece.count for piece in group)), padding)
    key_BN = np.empty((len(group), max(piece.keys for piece in group)), np.int64)
    for query_C, key_N, piece in zip(query_BC, key_BN, group, strict=True):
        above, keys = len(piece.above_P), piece.keys
        query_C[: piece.count] = np.arange(piece.query, piece.query + piece.count)
        key_N[:above] = piece.above_P
        key_N[above:keys] = np.arange(piece.own, piece.own + keys - above)
        key_N[keys:] = key_N[keys - 1]
    return query_BC, key_BN, np.array([piece.visible for piece in group])


def _seen(visible_B: np.ndarray, queries: int, keys: int, window: int) -> np.ndarray:
    """Which keys a query of a tile sees [B, C, N]: at least one, padding too (softmax over nothing is NaN), because the
    first query of a piece sees no more keys than the window has, and C <= N."""
    end_BC1 = (visible_B[:, None] + np.arange(queries))[..., None]
    seen_BCN = np.arange(keys) < end_BC1
    if window:
        seen_BCN &= np.arange(keys) >= end_BC1 - window
    return seen_BCN


class _Attend(torch.autograd.Function):
    """Rotate q and k, attend within the tiles.  Also returns rotated keys and values, [T, 2K, d], for a cache."""

    @staticmethod
    def forward(ctx: Any, qkv_TE: Tensor, plan: PackedPlan) -> tuple[Tensor, Tensor]:
        heads, kv_heads, head_dim = plan.spec.heads, plan.spec.kv_heads, plan.spec.head_dim
        qkv_THd = qkv_TE.view(-1, heads + 2 * kv_heads, head_dim)
        q_Nd = _with_zero_row(qkv_TE, len(qkv_TE) * heads, head_dim)
        q_THd = q_Nd[:-1].view(-1, heads, head_dim).copy_(qkv_THd[:, :heads])
        kv_TKd = qkv_THd[:, heads:].contiguous()
        rotate_(q_THd, plan.cos_T1d, plan.sin_T1d)
        rotate_(kv_TKd[:, :kv_heads], plan.cos_T1d, plan.sin_T1d)
        q_Md, k_Nd, v_Nd = _gather(q_Nd, kv_TKd, plan)
        out_Md = _with_zero_row(q_Md, len(q_Md), head_dim)
        for tile in plan.tiles:
            q, k, v, out = _views(tile, kv_heads, (q_Md, k_Nd, v_Nd, out_Md))
            torch.bmm(_weights(q, k, tile, plan.spec)[0], v, out=out)
        ctx.plan = plan
        ctx.save_for_backward(q_Nd, kv_TKd)
        ctx.mark_non_differentiable(kv_TKd)
        return out_Md.index_select(0, plan.back_M).view(len(qkv_TE), -1), kv_TKd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TO: Tensor, _: Tensor) -> tuple[Tensor, None]:
        plan: PackedPlan = ctx.plan
        q_Nd, kv_TKd = ctx.saved_tensors
        heads, kv_heads, head_dim = plan.spec.heads, plan.spec.kv_heads, plan.spec.head_dim
        q_Md, k_Nd, v_Nd = _gather(q_Nd, kv_TKd, plan)
        dout_Nd = torch.cat((dout_TO.reshape(-1, head_dim), dout_TO.new_zeros(1, head_dim)))
        dout_Md = dout_Nd.index_select(0, plan.query_M)
        dq_Md = _with_zero_row(q_Md, len(q_Md), head_dim)
        dk_Nd, dv_Nd = torch.empty_like(k_Nd), torch.empty_like(v_Nd)
        for tile in plan.tiles:
            q, k, v, dout = _views(tile, kv_heads, (q_Md, k_Nd, v_Nd, dout_Md))
            dq, dk, dv, _ = _views(tile, kv_heads, (dq_Md, dk_Nd, dv_Nd, dout_Md))
            weight, slope = _weights(q, k, tile, plan.spec)
            torch.bmm(weight.transpose(1, 2), dout, out=dv)
            dweight = torch.bmm(dout, v.transpose(1, 2))
            dscore = torch.ops.aten._softmax_backward_data(dweight, weight, -1, weight.dtype)
            dscore = (dscore if slope is None else dscore.mul_(slope)).mul_(plan.spec.score_scale)
            torch.bmm(dscore, k, out=dq)
            torch.bmm(dscore.transpose(1, 2), q, out=dk)
        dq_THd = dq_Md.index_select(0, plan.back_M).view(-1, heads, head_dim)
        wide = torch.promote_types(q_Md.dtype, torch.float32)
        dkv_Nd = torch.zeros(kv_TKd.numel() // head_dim, head_dim, dtype=wide, device=q_Md.device)
        dkv_Nd.index_add_(0, plan.key_N, dk_Nd.to(wide)).index_add_(0, plan.value_N, dv_Nd.to(wide))
        dkv_TKd = dkv_Nd.to(q_Md.dtype).view_as(kv_TKd)
        rotate_(dq_THd, plan.cos_T1d, -plan.sin_T1d)
        rotate_(dkv_TKd[:, :kv_heads], plan.cos_T1d, -plan.sin_T1d)
        return torch.cat((dq_THd, dkv_TKd), 1).flatten(1), None


def _with_zero_row(like: Tensor, rows: int, head_dim: int) -> Tensor:
    """Room for `rows` rows, and one row of zeros behind them."""
    room = like.new_empty(rows + 1, head_dim)
    room[-1] = 0
    return room


def _gather(q_Nd: Tensor, kv_TKd: Tensor, plan: PackedPlan) -> tuple[Tensor, Tensor, Tensor]:
    kv_Nd = kv_TKd.flatten(0, 1)
    key_Nd, value_Nd = kv_Nd.index_select(0, plan.key_N), kv_Nd.index_select(0, plan.value_N)
    return q_Nd.index_select(0, plan.query_M), key_Nd, value_Nd


def _views(tile: Tile, kv_heads: int, parts: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """A tile's queries (first and last) [B * K, g * C, d] and keys, values [B * K, N, d]: g heads folded into time."""
    (first, keys, values, last), groups = parts, tile.mask_B1CN.shape[0] * kv_heads
    cuts = ((first, tile.queries), (keys, tile.keys), (values, tile.keys), (last, tile.queries))
    return tuple(rows[cut].view(groups, -1, rows.shape[-1]) for rows, cut in cuts)


def _weights(q: Tensor, k: Tensor, tile: Tile, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """Attention weights, and where scores are capped the slope 1 - tanh^2 of the cap, for the backward pass."""
    pieces_B, _, queries_C, keys_N = tile.mask_B1CN.shape
    score, slope = torch.bmm(q, k.transpose(1, 2)).mul_(spec.score_scale), None
    if spec.softcap:
        score.div_(spec.softcap).tanh_()
        slope = score.square().neg_().add_(1)
        score.mul_(spec.softcap)
    score.view(pieces_B, -1, queries_C, keys_N).add_(tile.mask_B1CN)
    return score.softmax(-1), slope
