"""GGUF files of tiny `transformers` models: the gguf package writes them, and says which numbers they hold."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

WORDS = ["<|endoftext|>", "<|end|>", *"abcd12345 ", "Ġ", "ab", "12", "<think>", "Ċ"]
TYPES = [3, 3, *[1] * (len(WORDS) - 4), 4, 1]
VOCABULARY: dict[str, Any] = {
    "model": "gpt2", "pre": "smollm", "tokens": WORDS, "token_type": TYPES, "merges": ["a b", "1 2"], "eos_token_id": 1,
}  # fmt: skip


def llama_cpp_permute(weights, heads):
    """llama.cpp's own formula, from Hugging Face's order to GGUF's (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def gguf_name(name: str) -> str:
    for theirs, ours in {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "", "rope_freqs": "rope_freqs.weight",
    }.items():  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def packed(kind: str, value: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The bytes of a matrix in a type; the package packs no K-types: there they are random, with small scales."""
    if kind not in ("Q4_K", "Q6_K"):
        return gguf.quantize(value, gguf.GGMLQuantizationType[kind])
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = draw.integers(0, 256, (value.size // block, size), dtype=np.uint8)
    scales = {"Q4_K": {0: 1e-3, 2: 7.5e-3}, "Q6_K": {208: 1e-4}}[kind]  # the fp16 numbers of a block, by their place
    for at, scale in scales.items():
        raw[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return raw.reshape(value.shape[0], -1)


def write(path: Path, model: Any, kind: str, facts: dict[str, Any] | None = None, vocabulary: Any = None) -> None:
    """A file of architecture `model.config.model_type` with matrices in `kind`; the model gets the numbers it holds.

    facts: more metadata, by name without the architecture; vocabulary: of `tokenizer.ggml.*`
    """
    config, arch, draw = model.config, model.config.model_type, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
    }  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        numbers |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    for name, number in numbers.items():
        writer.add_uint32(f"{arch}.{name}", number)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    for name, value in (facts or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{arch}.{name}", value)
    add_vocabulary(writer, VOCABULARY | (vocabulary or {}))
    held = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2:][0], 0
        )
        permuted = heads and arch == "llama"
        stored = llama_cpp_permute(value, heads) if permuted else value
        here = kind if value.ndim > 1 else "F32"
        raw = packed(here, stored, draw)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType[here])
        exact = gguf.dequantize(raw, gguf.GGMLQuantizationType[here]).reshape(value.shape)
        if permuted:  # the inverse, by an argsort of row numbers and not by a formula
            exact = exact[np.argsort(llama_cpp_permute(np.arange(len(value)), heads))]
        held[name] = torch.from_numpy(exact.astype(np.float32))
    close(writer)
    missing, unused = model.load_state_dict(held, strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unused) == (True, [])


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: dict[str, Any]) -> None:
    for name, value in vocabulary.items():
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](f"tokenizer.ggml.{name}" if name != "chat_template" else "tokenizer.chat_template", value)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
