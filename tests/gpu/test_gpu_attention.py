"""FlexAttention's compiled kernels against the dense mask in fp64, on a CUDA device; elsewhere these are skipped."""

import numpy as np
import pytest
import torch
from lm.forests import FEATURES, fillers, group, tree

from rung.core.records import Layout
from rung.lm.config import AttentionSpec
from rung.lm.mixers.attention import choose_plan
from rung.lm.mixers.flex import FlexPlan
from rung.lm.mixers.plain import PlainPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]
# of the largest entry: a few roundings of what a kernel holds in its dtype; the inputs of both sides are the same
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 16 * 2.0**-9}
LENGTHS = (900, 130, 517, 1280)  # ragged and whole blocks; not as many at first as there are heads


def layout_of(rng: np.random.Generator, length: int) -> Layout:
    """A chain, a group whose prompt crosses blocks, a tree in any order, fillers."""
    return Layout.concat(
        [Layout.chain(length), group(150, [40, 170, 3], slot=1), tree(rng, 90, slot=2, bushy=0.3), fillers(2)]
    )


def attended(plan, qkv_TE: torch.Tensor, weight_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the gradient of its weighted sum."""
    qkv_TE = qkv_TE.detach().requires_grad_()
    out_TO = plan.attend(qkv_TE, None)
    (gradient_TE,) = torch.autograd.grad((out_TO * weight_TO).sum(), qkv_TE)
    return out_TO.detach(), gradient_TE


def drawn(rng: np.random.Generator, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(rows, width))).to("cuda", dtype)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_values_and_gradients_are_those_of_the_dense_mask(head_dim, dtype):
    check(AttentionSpec(heads=4, kv_heads=2, head_dim=head_dim), dtype)


@pytest.mark.parametrize("feature", [name for name in FEATURES if "norm" not in name and name != "all"])
def test_values_and_gradients_are_those_of_the_dense_mask_with_every_feature(feature):
    check(AttentionSpec(heads=6, kv_heads=3, head_dim=32, **FEATURES[feature]), torch.float32)


def check(spec: AttentionSpec, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        layout = layout_of(rng, length)
        qkv_TE = drawn(rng, len(layout), (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype)
        weight_TO = drawn(rng, len(layout), spec.heads * spec.head_dim, dtype)
        plan = choose_plan(layout, spec, None, qkv_TE)
        assert isinstance(plan, FlexPlan)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            ours = attended(plan, qkv_TE, weight_TO)
        here, weights = qkv_TE.cpu().double(), weight_TO.cpu().double()
        for one, other in zip(ours, attended(PlainPlan.build(layout, spec, None, here), here, weights), strict=True):
            limit = LIMIT[dtype] * other.abs().max().item()
            torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=limit)


def test_a_second_time_every_bit_is_the_same():
    rng, spec = np.random.default_rng(1), AttentionSpec(heads=4, kv_heads=2, head_dim=64, softcap=5.0)
    layout = layout_of(rng, 700)
    qkv_TE, weight_TO = drawn(rng, len(layout), 8 * 64, torch.bfloat16), drawn(rng, len(layout), 4 * 64, torch.bfloat16)
    once, again = (attended(FlexPlan.build(layout, spec, None, qkv_TE), qkv_TE, weight_TO) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
