"""GGUF files packed by hand: dequantisation, the order of q and k, the vocabulary; then files that are broken."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_twin import WORDS, gguf_name, llama_cpp_permute
from safetensors.torch import load_file

from rung.core.errors import ModelError
from rung.lm.weights import sources
from rung.text.pretrained import Tokenizer

WIDTH, HEADS, KV, HEAD_DIM, FFN = 32, 4, 2, 8, 64  # blocks hold 32 numbers of a row


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def their_tensors(tied=True) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names."""
    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(WORDS), WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(2):
        block = f"model.layers.{i}."
        shapes |= {block + "input_layernorm.weight": (WIDTH,), block + "post_attention_layernorm.weight": (WIDTH,)}
        shapes |= {block + f"self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qo"}
        shapes |= {block + f"self_attn.{n}_proj.weight": (KV * HEAD_DIM, WIDTH) for n in "kv"}
        shapes |= {block + f"mlp.{n}_proj.weight": (FFN, WIDTH) for n in ("gate", "up")}
        shapes[block + "mlp.down_proj.weight"] = (WIDTH, FFN)
    shapes |= {} if tied else {"lm_head.weight": (len(WORDS), WIDTH)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def q4_1(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32 numbers as d (fp16), m (fp16), 16 bytes of 4-bit q: bytes and the numbers they stand for.

    value = d q + m; the low halves of the 16 bytes are numbers 0 to 15, the high halves 16 to 31.  [ggml-quants.c]
    """
    blocks = rows.reshape(-1, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    d, m = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    q = np.clip(np.rint((blocks - m) / d), 0, 15).astype(np.uint8)
    packed = np.concatenate([d.view(np.uint8), m.view(np.uint8), q[:, :16] | (q[:, 16:] << 4)], axis=1)
    values = d.astype(np.float32) * q + m.astype(np.float32)
    return packed.reshape(rows.shape[0], -1), values.reshape(rows.shape)


def q8_0(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32 numbers as d (fp16) and 32 signed bytes: value = d q."""
    blocks = rows.reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    q = np.rint(blocks / d.astype(np.float32)).clip(-127, 127).astype(np.int8)
    packed = np.concatenate([d.view(np.uint8), q.view(np.uint8)], axis=1)
    return packed.reshape(rows.shape[0], -1), (d.astype(np.float32) * q).reshape(rows.shape)


def write(path: Path, *, tied=True, leave_out=(), **changes) -> dict[str, np.ndarray]:
    """A GGUF file of random weights: matrices in Q4_1, the embedding in Q8_0, norms in fp32, values in one F16.

    Returns the numbers it really holds, under Hugging Face's names and in Hugging Face's order.
    """
    writer = gguf.GGUFWriter(path, changes.get("general.architecture", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1234.5)
    writer.add_tokenizer_model(changes.get("tokenizer.ggml.model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("tokenizer.ggml.pre", "smollm"))
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 4), 4, 1])
    writer.add_token_merges(changes.get("merges", ["a b", "1 2"]))
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    held = {}
    for name, value in their_tensors(tied).items():
        heads = HEADS if ".q_proj" in name else KV if ".k_proj" in name else 0
        stored = llama_cpp_permute(value, heads) if heads else value
        kind = None
        if value.ndim == 1:
            exact = stored
        elif ".v_proj" in name:
            stored = stored.astype(np.float16)
            exact = stored.astype(np.float32)
        elif "embed" in name:
            (stored, exact), kind = q8_0(stored), gguf.GGMLQuantizationType.Q8_0
        else:
            (stored, exact), kind = q4_1(stored), gguf.GGMLQuantizationType.Q4_1
        if heads:  # the inverse of the permutation, by an argsort of row numbers and not by a formula
            order = llama_cpp_permute(np.arange(len(value)), heads)
            exact = exact[np.argsort(order)]
        held[name] = exact
        if name not in leave_out:
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_dequantised_and_put_into_hugging_faces_order(tmp_path, tied):
    held = write(tmp_path / "tiny.gguf", tied=tied)
    found = load_file(sources.locate(tmp_path / "tiny.gguf") / "model.safetensors")
    assert found.keys() == held.keys()
    for name, value in held.items():
        assert torch.equal(found[name], torch.from_numpy(value)), name


def test_the_order_of_q_and_k_is_a_real_permutation_here():
    rows = np.arange(KV * HEAD_DIM)
    assert (llama_cpp_permute(rows, KV) != rows).mean() > 0.5


def test_the_config_comes_from_the_metadata(tmp_path):
    write(tmp_path / "tiny.gguf", tied=False)
    raw = json.loads((sources.locate(tmp_path / "tiny.gguf") / "config.json").read_text())
    expected = {
        "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 1234.5, "max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": 1,
    }  # fmt: skip
    assert expected.items() <= raw.items()


def test_the_vocabulary_becomes_a_tokenizer(tmp_path):
    write(tmp_path / "tiny.gguf")
    folder = sources.locate(tmp_path / "tiny.gguf")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
    tokenizer = Tokenizer.from_files(files, {}, where=str(folder))
    words = [tokenizer.token_of(i) for i in tokenizer.encode("ab12 a<think>")]
    assert words == ["ab", "1", "2", "Ġ", "a", "<think>"]  # digits stand alone, though 12 is a word
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.special == {"<|endoftext|>": 0, "<|end|>": 1}
    assert tokenizer.template == "{{ messages[0]['content'] }}"


def test_a_second_load_converts_nothing(tmp_path):
    write(tmp_path / "tiny.gguf")
    first, second = [], []
    folder = sources.locate(tmp_path / "tiny.gguf", first.append)
    assert sources.locate(tmp_path / "tiny.gguf", second.append) == folder
    assert first
    assert not second


@pytest.mark.parametrize("keep", [0, 3, 100, 700, 4000, -1])
def test_a_truncated_file_is_named_and_leaves_nothing_in_the_cache(tmp_path, cache, keep):
    path = tmp_path / "tiny.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf is not a readable GGUF file"):
        sources.locate(path)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_bytes_that_are_no_gguf_are_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(ModelError, match=r"model\.gguf is not a readable GGUF file"):
        sources.locate(tmp_path / "model.gguf")


BROKEN = {
    "architecture": ({"general.architecture": "gemma"}, "architecture llama, qwen2, qwen3, found 'gemma'"),
    "vocabulary": ({"tokenizer.ggml.model": "t5"}, "needed a vocabulary of kind 'gpt2' or 'llama', found 't5'"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "smolm"}, r"unknown pre-tokenizer 'smolm'\. Did you mean 'smollm'"),
    "merges": ({"merges": ["a z"]}, "vocabulary cannot be used"),
    "tensor": (
        {"leave_out": ["model.layers.1.mlp.up_proj.weight"]},
        r"missing \['blk\.1\.ffn_up\.weight'\], unused \[\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_what_we_read_says_why_and_leaves_nothing_in_the_cache(tmp_path, cache, case):
    changes, message = BROKEN[case]
    write(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ModelError, match=message):
        sources.locate(tmp_path / "tiny.gguf")
    assert not [p for p in cache.rglob("*") if p.is_file()]
