"""Random layouts, and what every token of one must equal: a plain pass over its own sequence alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rung.core.records import FILLER, ROOT, Layout
from rung.lm.config import MLPSpec
from rung.lm.decoder import Decoder
from rung.lm.mixers import attention
from rung.lm.mixers.plain import PlainPlan
from rung.lm.presets import llama

VOCABULARY = 41
FEATURES: dict[str, dict[str, Any]] = {  # of attention, beyond Llama's; a window is some tokens, sequences are longer
    "window": {"window": 4},
    "window of one": {"window": 1},
    "soft-cap": {"softcap": 0.8},
    "scale": {"scale": 0.3},
    "no positions": {"rope": None},
    "turned in part": {"rotary_dim": 4},
    "normed heads": {"qk_norm": "head", "norm_eps": 0.1},
    "normed width, offset": {"qk_norm": "width", "norm": "offset"},
    "all": {"window": 3, "softcap": 1.1, "scale": 0.7, "qk_norm": "head", "norm": "wide", "rotary_dim": 2},
}


def tiny_decoder(kv_heads: int = 2, dtype: torch.dtype = torch.float64, feature: str = "") -> Decoder:
    """Two layers, weights of order one: what a token sees changes its hidden state by far more than rounding.

    With "all" features, norms are behind mixer and channel too, and the second layer has no window."""
    heads = {1: 3, 2: 6, 3: 3}[kv_heads]
    config = llama(
        vocab_size=VOCABULARY, width=12, layers=2, heads=heads, kv_heads=kv_heads, head_dim=6, ffn_width=14,
        attention_bias=kv_heads == 2, tied=False,
    )  # fmt: skip
    if feature:
        mixer = replace(config.blocks[0].mixer, **FEATURES[feature])
        config = replace(config, blocks=(replace(config.blocks[0], mixer=mixer),) * 2)
    if feature == "all":
        first = replace(config.blocks[0], norms="both", norm="offset", channel=MLPSpec(width=9, activation="gelu_tanh"))
        second = replace(first, norms="after", mixer=replace(first.mixer, window=0))
        config = replace(config, blocks=(first, second), norm="wide", embedding_scale=1.7, logit_softcap=2.0)
    decoder = Decoder(config, dtype)
    generator = torch.Generator().manual_seed(kv_heads)
    with torch.no_grad():
        for parameter in decoder.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return decoder


def tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(VOCABULARY, size=count).tolist()


def tree(rng: np.random.Generator, size: int, *, slot: int, start: int = 0, bushy: float = 0.5) -> Layout:
    """A random forest in one slot: each token continues its neighbour, or with probability `bushy` any earlier one."""
    parent = [int(rng.integers(ROOT, index)) if index and rng.random() < bushy else index - 1 for index in range(size)]
    depth: list[int] = []
    for above in parent:
        depth.append(start if above == ROOT else depth[above] + 1)
    return Layout(torch.tensor(parent), torch.full((size,), slot), torch.tensor(depth))


def group(prompt: int, completions: Sequence[int], *, slot: int = 0) -> Layout:
    """A shared prompt of `prompt` tokens (at least one) and the completions that continue it."""
    parent, position, at = list(range(-1, prompt - 1)), list(range(prompt)), prompt
    for length in completions:
        parent += [prompt - 1, *range(at, at + length - 1)][:length]
        position += range(prompt, prompt + length)
        at += length
    return Layout(torch.tensor(parent), torch.full((at,), slot), torch.tensor(position))


def fillers(count: int) -> Layout:
    empty = torch.zeros(count, dtype=torch.int64)
    return Layout(empty + ROOT, empty + FILLER, empty + 7)


def sequences(layout: Layout, token_T: list[int], committed: dict[int, list[int]] | None = None) -> list[list[int]]:
    """Of every token: the committed tokens of its slot, its ancestors, and itself.  A filler has none."""
    found: list[list[int]] = []
    for token, parent, slot in zip(token_T, layout.parent_T.tolist(), layout.slot_T.tolist(), strict=True):
        if slot == FILLER:
            found.append([])
        elif parent == ROOT:
            found.append([*(committed or {}).get(slot, []), token])
        else:
            found.append([*found[parent], token])
    return found


class Alone:
    """Hidden state of the last token of one sequence by the plain plan [D]; one pass answers for all its prefixes."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, sequence: list[int]) -> torch.Tensor:
        key = tuple(sequence)
        if key not in self.known:
            hidden_TD = plainly(self.decoder, sequence, Layout.chain(len(sequence))).detach()
            self.known |= {key[: end + 1]: hidden_TD[end] for end in range(len(key))}
        return self.known[key]


def assert_the_law(
    hidden_TD: torch.Tensor,
    alone: Alone,
    layout: Layout,
    token_T: list[int],
    committed: dict[int, list[int]] | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Every token's hidden state is that of its own sequence alone."""
    for row, sequence in reversed(list(enumerate(sequences(layout, token_T, committed)))):
        if sequence:
            torch.testing.assert_close(hidden_TD[row].double(), alone(sequence), rtol=tolerance, atol=tolerance)


def plainly(decoder: Decoder, token_T: list[int], layout: Layout) -> torch.Tensor:
    """The decoder with every faster plan switched off [T, D]."""
    choose = attention.choose_plan
    attention.choose_plan = PlainPlan.build
    try:
        return decoder(torch.tensor(token_T), layout)
    finally:
        attention.choose_plan = choose
