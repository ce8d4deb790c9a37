"""What FlexAttention computes, by its signature and from the same functions; dense, and so with gradients on a CPU."""

import torch

from rung.core.shapes import Tensor
from rung.lm.mixers.flex import BlockMask, ScoreMod


def dense_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None,
    block_mask: BlockMask,
    scale: float | None,
    *,
    enable_gqa: bool,
) -> Tensor:
    """softmax over the keys that mask_mod lets through of score_mod(scale q k); the blocks are not looked at."""
    assert enable_gqa
    heads, length, head_dim = query.shape[1:]
    head = torch.arange(heads, device=query.device)[:, None, None]
    i = torch.arange(length, device=query.device)[:, None]
    j, batch = i.T, torch.zeros_like(i[0])
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    score = query @ key.transpose(2, 3) * (head_dim**-0.5 if scale is None else scale)
    if score_mod is not None:
        score = score_mod(score, batch, head, i, j)
    hidden = ~block_mask.mask_mod(batch, head, i, j)
    return score.masked_fill(hidden, -torch.inf).softmax(-1) @ value
