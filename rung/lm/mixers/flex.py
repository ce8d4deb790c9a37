"""Attention of a learner's packed batch, and of a prefill into empty slots, on a GPU: FlexAttention.  [Dong 2024]

The twin of `packed.py` for CUDA; it has never run on one.  Tokens are numbered in preorder: of each, all that continues
it follows in one stretch [enter, exit).  So a pair costs two comparisons, whatever the forest: query i sees key j iff

    enter_j <= enter_i < exit_j      and, with a window,  position_j >= position_i - window + 1

and the extremes of these numbers in a block of keys and in one of queries say whether any pair of the two can meet, and
whether all do (then no mask is computed).  Nothing is of size T x T.  A filler is a tree of its own.

What the library asks for (torch 2.13: nn/attention/flex_attention.py, _inductor/kernel/flex/, _dynamo/):

- It is compiled once, with symbolic lengths, so that micro-batches of other lengths compile nothing.  Training,
  `no_grad`, inference and windowed layers have a kernel each; so has a number of blocks that was equal to one of heads
  when it was first seen.  Torch keeps eight of a function unless told; beyond, it would fall back to all T x T scores,
  in silence: `fullgraph` makes that an error.
- A number that a function captures is a tensor: a float would become symbolic, which a captured value must not be.  So
  the cap is a table by head, as ALiBi's slopes are.  The scale, an argument, is made constant again behind Dynamo.
- T may be ragged: kernels guard the last block, if it is not called full (`create_block_mask` never does).  There is
  more than one block, though: below, torch would take another kernel, and compile sizes of 1 apart.
- tl.dot needs heads of at least 16 and has no fp64.  What does not fit takes `PackedPlan`, on a GPU too.
- In the backward pass each row of dq, dk and dv is summed by one program, in fp32 and without atomics: it is
  deterministic, as training asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, flex_attention

from rung.core.records import Layout
from rung.core.shapes import Float, Tensor
from rung.lm.config import AttentionSpec
from rung.lm.mixers.packed import runs
from rung.lm.mixers.plain import rotated
from rung.lm.rope import rotary_tables
from rung.lm.state import Placement

BLOCK = 128  # tokens of a block: the library's default, which the tiles of all its kernels divide
SMALLEST_HEAD = 16  # tl.dot
KERNELS = 32  # that torch may keep, in place of eight
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # score, then the same


def serves(layout: Layout, spec: AttentionSpec, like: Tensor) -> bool:
    """Is there a kernel for this?"""
    fits = spec.head_dim >= SMALLEST_HEAD and like.dtype in DTYPES and len(layout) > BLOCK
    return fits and like.device.type == "cuda"


def preorder(parent_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(enter_T, exit_T): i continues j, or is j, iff enter[j] <= enter[i] < exit[j].  Parents come before children.

    The forest 0 - 1, 0 - 2, 1 - 3 (parents -1 0 0 1): enter 0 1 3 2, exit 4 3 4 3."""
    first_R, length_R = runs(parent_T)
    run_T = np.repeat(np.arange(len(first_R)), length_R)
    parent_R = parent_T[first_R]
    above = np.where(parent_R < 0, len(first_R), run_T[parent_R]).tolist()  # behind the last run: what holds all trees
    size = [*length_R.tolist(), 0]
    for run in reversed(range(len(first_R))):
        size[above[run]] += size[run]
    begin, free = [0] * len(size), [0] * len(size)  # of a run's subtree; where its next child's begins
    for run, length in enumerate(length_R.tolist()):
        begin[run] = free[above[run]]
        free[above[run]] += size[run]
        free[run] = begin[run] + length
    begin_R, size_R = np.array(begin[:-1]), np.array(size[:-1])
    return (begin_R - first_R)[run_T] + np.arange(len(parent_T)), (begin_R + size_R)[run_T]


def blocks(limits: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys a block of queries meets in part, and which in full, [Q, N] each.

    limits: (key_T, query_T), ...; key j is seen by query i iff key[j] <= query[i] in all.  Full is exact, but for a
    ragged last block, which counts as part; in part may be a block of which nothing is seen."""
    start = np.arange(0, len(limits[0][0]), size)
    some_QN = np.ones((len(start), len(start)), dtype=bool)
    full_QN = some_QN.copy()
    for key_T, query_T in limits:
        some_QN &= np.minimum.reduceat(key_T, start) <= np.maximum.reduceat(query_T, start)[:, None]
        full_QN &= np.maximum.reduceat(key_T, start) <= np.minimum.reduceat(query_T, start)[:, None]
    if len(limits[0][0]) % size:
        full_QN[-1] = full_QN[:, -1] = False
    return some_QN & ~full_QN, full_QN


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """What FlexAttention is told of a layout; score_mod None leaves scores as they are."""

    spec: AttentionSpec
    cos_T1d: Tensor
    sin_T1d: Tensor
    block_mask: BlockMask
    score_mod: ScoreMod | None
    new: Placement | None

    @staticmethod
    def build(layout: Layout, spec: AttentionSpec, new: Placement | None, like: Tensor) -> "FlexPlan":
        enter_T, exit_T = preorder(layout.parent_T.numpy())
        limits = [(enter_T, enter_T), (-exit_T, -enter_T - 1)]
        mask_mod = _continues(_on(enter_T, like), _on(exit_T, like))
        if spec.window:
            position_T = layout.position_T.numpy()
            first_T = position_T - spec.window + 1
            limits.append((-position_T, -first_T))
            mask_mod = and_masks(mask_mod, _near(_on(position_T, like), _on(first_T, like)))
        part_QN, full_QN = blocks(limits, BLOCK)
        keys, full_keys, queries, full_queries = (_listed(of, like) for of in (part_QN, full_QN, part_QN.T, full_QN.T))
        lengths, sizes = (len(layout), len(layout)), (BLOCK, BLOCK)
        block_mask = BlockMask(lengths, *keys, *full_keys, *queries, *full_queries, sizes, mask_mod)
        cos_T1d, sin_T1d = rotary_tables(spec, layout.position_T, like)
        return FlexPlan(spec, cos_T1d, sin_T1d, block_mask, _capped(spec, like) if spec.softcap else None, new)

    def attend(self, qkv_TE: Float[Tensor, "T E"], rows: Tensor | None) -> Float[Tensor, "T O"]:
        q_THd, k_TKd, v_TKd = rotated(qkv_TE, self.spec, self.cos_T1d, self.sin_T1d)
        if rows is not None and self.new is not None:
            self.new.write(rows, torch.stack((k_TKd, v_TKd), 1))
        q_1HTd, k_1KTd, v_1KTd = (x_THd.transpose(0, 1)[None] for x_THd in (q_THd, k_TKd, v_TKd))
        attention, scale = kernel(qkv_TE.device.type), self.spec.scale
        out_1HTd = attention(q_1HTd, k_1KTd, v_1KTd, self.score_mod, self.block_mask, scale, enable_gqa=True)
        return out_1HTd[0].transpose(0, 1).flatten(1)


@cache
def kernel(device: str) -> Callable[..., Tensor]:
    """FlexAttention as it runs on a device: fused on CUDA; on a CPU, where there is no backward pass, as it is."""
    if device != "cuda":
        return flex_attention
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=KERNELS)(compiled)


def _continues(enter_T: Tensor, exit_T: Tensor) -> MaskMod:
    return lambda batch, head, i, j: (enter_T[j] <= enter_T[i]) & (enter_T[i] < exit_T[j])


def _near(position_T: Tensor, first_T: Tensor) -> MaskMod:
    return lambda batch, head, i, j: position_T[j] >= first_T[i]


def _capped(spec: AttentionSpec, like: Tensor) -> ScoreMod:
    cap_H = torch.full((spec.heads,), spec.softcap, dtype=torch.promote_types(like.dtype, torch.float32))
    cap_H = cap_H.to(like.device)  # in the precision that scores have
    return lambda score, batch, head, i, j: cap_H[head] * torch.tanh(score / cap_H[head])


def _listed(chosen_QN: np.ndarray, like: Tensor) -> tuple[Tensor, Tensor]:
    """How many are chosen of every row, and their columns, before the others, [1, 1, Q] and [1, 1, Q, N]."""
    order_QN = np.argsort(~chosen_QN, axis=1, kind="stable")
    return _on(chosen_QN.sum(1)[None, None], like), _on(order_QN[None, None], like)


def _on(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32)).to(like.device)
