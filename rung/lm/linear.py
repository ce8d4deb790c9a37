"""A matrix product that gets faster when its weight is used again and again.

oneDNN copies a bf16 weight into blocks of its own before every product; at few rows that copy is most of the time
(8 rows: half of it; 64 rows: a fifth).  So the blocks are kept, once a weight has been used PACK_AFTER times
unchanged: by then, what was lost is about what a copy costs.  The results are bit-equal (tested), so that it never
shows when this happens.  A single row needs no blocks: it has a kernel of its own (`fused.py`).
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from rung.core.shapes import Float, Tensor
from rung.lm import fused

PACK_AFTER = 12  # uses; a kept copy pays for itself in 8 to 12 products, at 8 rows as at 64 (AVX512-BF16)
PACK_ROWS = 256  # beyond, the copy is a small part of the product


class KeptBlocks:
    """The blocks of one weight, valid as long as its storage and its version counter stay, and no gradient is taken.

    So every in-place change (`weight.copy_(...)`), every learner's step and a new `weight.data` are seen.  A change
    *through* `weight.data` (`weight.data.add_(...)`) is not: PyTorch does not count it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the blocks, and the count of uses."""
        self.source: Tensor | None = None  # shares the weight's storage, so that its address cannot be given to another
        self.version = 0
        self.uses = 0
        self.blocks: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return KeptBlocks, ()  # copied or pickled, it starts empty

    def linear(self, x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias."""
        if torch.is_grad_enabled():
            self.forget()  # fused optimisers do not count their changes, and learners need the memory
            return F.linear(x_ND, weight_ED, bias_E)
        if fused.serves_one(x_ND):
            return fused.linear(x_ND, weight_ED, bias_E)
        if len(x_ND) > PACK_ROWS or not self._kept(weight_ED):
            return F.linear(x_ND, weight_ED, bias_E)
        return torch.ops.mkldnn._linear_pointwise.default(x_ND, self.blocks, bias_E, "none", [], "")

    def _kept(self, weight_ED: Tensor) -> bool:
        """Are there blocks of this very weight?  Counts the use, and makes them when it is time."""
        if not keeps_blocks(weight_ED.device.type, weight_ED.dtype) or weight_ED.is_inference():
            return False
        source, version = self.source, weight_ED._version
        if source is None or source.data_ptr() != weight_ED.data_ptr() or self.version != version:
            self.forget()
            self.source, self.version = weight_ED.detach(), version
        if self.blocks is None:
            self.uses += 1
            if self.uses > PACK_AFTER:
                self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight_ED.detach(), PACK_ROWS)
        return self.blocks is not None


class Linear(nn.Module):
    """y = x @ weight.T + bias, weight [E, D].  Uninitialised."""

    def __init__(
        self, width: int, out: int, bias: bool, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out, dtype=dtype, device=device)) if bias else None
        self.kept = KeptBlocks()

    def forward(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        return self.kept.linear(x_ND, self.weight, self.bias)


@cache
def keeps_blocks(device: str, dtype: torch.dtype) -> bool:
    """Are blocks of such weights kept?  Then a sampler holds its weights twice."""
    return device == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
