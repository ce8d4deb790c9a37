"""Their names for weights <-> ours, as tables.

A `Rule` says which of their tensors, one below the other, make one of our parameters: q, k and v are the rows of
`qkv`, gate and up the rows of `gate_up`.  Read downwards it loads, read backwards it saves; there is no second table.
GGUF files of architecture `llama` hold the rows of q and k in another order inside every head: a part says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rung.core.shapes import Tensor
from rung.lm.config import BlockSpec, DecoderConfig

HUGGING_FACE: dict[str, str] = {  # Llama and most others
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
    "mixer_norm": "model.layers.{i}.input_layernorm",
    "channel_norm": "model.layers.{i}.post_attention_layernorm",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "out": "model.layers.{i}.self_attn.o_proj",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
POST_NORMS = HUGGING_FACE | {  # there `post_attention_layernorm` is what it says: behind the mixer
    "mixer_post_norm": "model.layers.{i}.post_attention_layernorm",
    "channel_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "channel_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
FUSED = HUGGING_FACE | {  # one tensor where others have three, or two
    "qkv": "model.layers.{i}.self_attn.qkv_proj",
    "gate_up": "model.layers.{i}.mlp.gate_up_proj",
}
OF_FAMILY: Mapping[str, Mapping[str, str]] = {  # model_type in config.json -> names; all others: HUGGING_FACE
    "gemma2": POST_NORMS,
    "gemma3_text": POST_NORMS,
    "olmo2": POST_NORMS,
    "phi3": FUSED,
}
GGUF: Mapping[str, str] = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "unembedding": "output",
    "mixer_norm": "blk.{i}.attn_norm",
    "channel_norm": "blk.{i}.ffn_norm",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "out": "blk.{i}.attn_output",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}


@dataclass(frozen=True)
class Part:
    """One of their tensors.  heads > 0: its rows are permuted inside that many heads (`unpermute`)."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Rule:
    """Our parameter, and the parts of which it is made, stacked along the rows."""

    ours: str
    parts: tuple[Part, ...]


def rules(config: DecoderConfig, names: Mapping[str, str], *, permuted: bool = False) -> tuple[Rule, ...]:
    """All rules of a decoder, in the order in which Hugging Face writes the tensors."""
    embedding = (config.vocab_size, config.width)
    found = [_rule("embedding.weight", (names["embedding"], embedding))]
    for index, block in enumerate(config.blocks):
        found += _block_rules(index, block, config.width, {k: v.format(i=index) for k, v in names.items()}, permuted)
    found.append(_rule("norm.weight", (names["norm"], (config.width,))))
    if not config.tied:
        found.append(_rule("unembedding.weight", (names["unembedding"], embedding)))
    return tuple(found)


def hugging_face_names(raw: Mapping[str, Any]) -> Mapping[str, str]:
    """The names in the files of a model folder, by its config.json."""
    return OF_FAMILY.get(str(raw.get("model_type")), HUGGING_FACE)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of a head's rows (pairs interleaved: 0, d/2, 1, d/2 + 1, ...) to Hugging Face's halves.

    Works on weights [heads * d, D] and biases [heads * d].
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def permute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `unpermute`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def split(rule: Rule, ours: Tensor) -> dict[str, Tensor]:
    """Our parameter as their tensors, by name (views where nothing is permuted)."""
    pieces = torch.split(ours, [part.shape[0] for part in rule.parts])
    return {
        part.name: permute(piece, part.heads) if part.heads else piece
        for part, piece in zip(rule.parts, pieces, strict=True)
    }


def _block_rules(index: int, block: BlockSpec, width: int, names: Mapping[str, str], permuted: bool) -> list[Rule]:
    mixer, channel, ours = block.mixer, block.channel, f"blocks.{index}."
    q, kv, ff = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim, channel.width
    heads = (mixer.heads, mixer.kv_heads) if permuted else (0, 0)
    normed = {"none": (), "head": (mixer.head_dim,) * 2, "width": (q, kv)}[mixer.qk_norm]
    qkv = _parts(names, "qkv", ("q", q, heads[0]), ("k", kv, heads[1]), ("v", kv))
    gate_up = _parts(names, "gate_up", ("gate", ff), ("up", ff))

    def norm(name: str) -> Rule:
        return _rule(ours + name + ".weight", (names[name], (width,)))

    found = [norm("mixer_norm")] if block.norms != "after" else []
    found += _linear(ours + "mixer.qkv", width, mixer.bias, *qkv)
    for name, size in zip(("q_norm", "k_norm"), normed, strict=False):
        found.append(_rule(f"{ours}mixer.{name}.weight", (names[name], (size,))))
    found += _linear(ours + "mixer.out", q, mixer.out_bias, (names["out"], width))
    found += [norm("mixer_post_norm")] if block.norms != "before" else []
    found += [norm("channel_norm")] if block.norms != "after" else []
    found += _linear(ours + "channel.gate_up", width, channel.bias, *gate_up)
    found += _linear(ours + "channel.down", ff, channel.bias, (names["down"], width))
    return found + ([norm("channel_post_norm")] if block.norms != "before" else [])


def _parts(names: Mapping[str, str], fused: str, *parts: tuple) -> tuple[tuple, ...]:
    """Under their names; one part where the table has a name for all of them together."""
    if fused in names:
        return ((names[fused], sum(rows for _, rows, *_ in parts)),)
    return tuple((names[name], *rest) for name, *rest in parts)


def _rule(ours: str, *parts: tuple) -> Rule:
    return Rule(ours, tuple(Part(name + ".weight", *rest) for name, *rest in parts))


def _linear(ours: str, inputs: int, bias: bool, *parts: tuple) -> list[Rule]:
    """Weight, and bias if there is one; a part is (name, rows) or (name, rows, heads)."""
    weight = Rule(
        ours + ".weight", tuple(Part(name + ".weight", (rows, inputs), *heads) for name, rows, *heads in parts)
    )
    biases = Rule(ours + ".bias", tuple(Part(name + ".bias", (rows,), *heads) for name, rows, *heads in parts))
    return [weight, biases] if bias else [weight]
