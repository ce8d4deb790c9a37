"""GGUF files turned into a Hugging Face folder: weights, config, tokenizer, chat template.

Quantised tensors become fp32, so that nothing is lost that the file still had; 16-bit ones stay as they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rung.core.errors import ModelError
from rung.core.progress import Listener, Progress, silent
from rung.core.shapes import Tensor
from rung.lm.config import RopeSpec
from rung.lm.rope import frequencies
from rung.lm.weights.families import from_hugging_face
from rung.lm.weights.files import SINGLE, Entry, Shard, write_shard
from rung.lm.weights.gguf_file import GGUFFile, read_gguf
from rung.lm.weights.names import GGUF, HUGGING_FACE, rules, unpermute
from rung.lm.weights.vocabulary import tokenizer

ARCHITECTURES: Mapping[str, str] = {  # of the file -> the class of transformers
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PERMUTED = ("llama",)  # architectures whose rows of q and k llama.cpp has put into another order
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling: what every frequency is divided by
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # [Llama 3.1]
SPECIAL_IDS = {  # tokenizer.ggml.* -> tokenizer_config.json
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # each ends an answer
STORED = {"F16": ("F16", torch.float16), "BF16": ("BF16", torch.bfloat16)}  # all others: fp32
MAX_SIZE = 1 << 31  # of a width or a count: far beyond any model


def convert(path: Path, folder: Path, listener: Listener = silent) -> None:
    """Write the model of a GGUF file as a Hugging Face folder (`folder` exists and is empty).

    Raises ModelError for a file that cannot be parsed, another architecture, missing or unused tensors.
    """
    file = read_gguf(path)
    raw = hugging_face_config(file)
    config = from_hugging_face(raw, where=str(path))
    theirs = rules(config, GGUF, permuted=raw["model_type"] in PERMUTED)
    source = {  # our name of a tensor in a Hugging Face folder -> its part in the file
        here.name: part
        for rule, there in zip(rules(config, HUGGING_FACE), theirs, strict=True)
        for here, part in zip(rule.parts, there.parts, strict=True)
    }
    needed, found = {part.name for part in source.values()}, set(file.tensors) - {ROPE_FACTORS}
    if needed != found:
        raise ModelError(
            f"{path}: tensors do not fit its metadata; missing {sorted(needed - found)[:5]}, "
            f"unused {sorted(found - needed)[:5]}."
        )
    for part in source.values():
        if (shape := file.tensors[part.name].shape) != part.shape:
            raise ModelError(f"{path}: tensor {part.name!r} needed shape {list(part.shape)}, found {list(shape)}.")
    small = _companions(file, raw)  # before the weights: a vocabulary that cannot be used is found in a moment
    done = 0

    def tensor(entry: Entry) -> Tensor:
        nonlocal done
        done += 1
        listener(Progress(stage="load", done=done, total=len(source), text="converting GGUF"))
        part = source[entry.name]
        value = _values(file, part.name)
        return unpermute(value, part.heads) if part.heads else value

    entries = [Entry(name, _stored(file, part.name)[0], part.shape) for name, part in source.items()]
    write_shard(folder / SINGLE, Shard(file=SINGLE, entries=tuple(entries)), tensor)
    for name, content in small.items():
        (folder / name).write_text(content, encoding="utf-8")


def hugging_face_config(file: GGUFFile) -> dict[str, Any]:
    """config.json of a GGUF's metadata and tensor table."""
    facts, kind = file.facts, str(file.facts.get("general.architecture"))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{file.path}: needed a GGUF of architecture {known}, found {kind!r}. Load the "
            "model's Hugging Face folder, where Rung knows its family."
        )

    def whole(name: str, default: int | None = None) -> int:
        value = facts.get(f"{kind}.{name}", default)
        if type(value) is not int or not 0 < value < MAX_SIZE:
            what = "which is not there" if value is None else f"found {value!r}"
            raise ModelError(f"{file.path}: the metadata needed a whole number {kind}.{name}, {what}.")
        return value

    width, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim, layers = whole("attention.key_length", max(width // heads, 1)), whole("block_count")
    _only(file, kind, {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0})
    if layers > len(file.tensors) or "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: {layers} blocks and {len(file.tensors)} tensors do not fit each other.")
    raw = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _number(file, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(file, f"{kind}.rope.freq_base", 10_000.0),
        "max_position_embeddings": whole("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": str(_stored(file, "token_embd.weight")[1]).removeprefix("torch."),
    }
    if kind == "llama":
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
        raw |= {name: True for name, tensor in biases.items() if tensor in file.tensors}
    scaling = _scaling(file, kind, raw)
    return raw | ({"rope_scaling": scaling} if scaling else {}) | _ids(facts, "bos_token", "eos_token", "pad_token")


def _scaling(file: GGUFFile, kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Longer contexts than the trained one: linear and yarn by name, Llama 3's by the factors that came out of it."""
    name = file.facts.get(f"{kind}.rope.scaling.type", "none")
    given = {key for key in file.facts if key.startswith(f"{kind}.rope.scaling.")}
    known = {f"{kind}.rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned")}
    if name not in ("none", "linear", "yarn") or given - known:
        raise ModelError(
            f"{file.path}: RoPE scaling {name!r} with {sorted(given - known)} is not read from GGUF; load the Hugging "
            "Face folder instead."
        )
    if name != "none":
        original = file.facts.get(f"{kind}.rope.scaling.original_context_length", raw["max_position_embeddings"])
        factor = _number(file, f"{kind}.rope.scaling.factor")
        return {"rope_type": name, "factor": factor, "original_max_position_embeddings": original}
    if ROPE_FACTORS not in file.tensors:
        return {}
    factors, head_dim = torch.from_numpy(file.values(ROPE_FACTORS).astype("float32")), raw["head_dim"]
    spec = {"theta": raw["rope_theta"], "factor": factors.max().item(), "original_positions": 8192}
    made, _ = frequencies(RopeSpec(scaling="llama3", **spec), head_dim)
    plain, _ = frequencies(RopeSpec(theta=raw["rope_theta"]), head_dim)
    if factors.shape != plain.shape or not torch.allclose(plain / factors, made, rtol=1e-4, atol=0):
        raise ModelError(
            f"{file.path}: {ROPE_FACTORS} is not Llama 3's scaling of 8192 positions; load the Hugging Face folder."
        )
    return {"rope_type": "llama3", "factor": spec["factor"], **LLAMA3}


def _companions(file: GGUFFile, raw: Mapping[str, Any]) -> dict[str, str]:
    """The small files of the folder, by name."""
    made, words = tokenizer(file.facts, where=str(file.path)), file.facts["tokenizer.ggml.tokens"]
    ids = {name: i for name in SPECIAL_IDS for i in _ids(file.facts, name).values()}
    ends = [file.facts.get("tokenizer.ggml." + name) for name in ENDS]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    wrong = [i for i in (*ids.values(), *ends) if type(i) is not int or not 0 <= i < len(words)]
    if wrong or len(words) > raw["vocab_size"]:
        raise ModelError(
            f"{file.path}: the vocabulary cannot be used: {len(words)} tokens, {raw['vocab_size']} embeddings, special "
            f"tokens of number {wrong}."
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = {name: words[i] for name, i in ids.items()}
    generation = _ids(file.facts, "bos_token", "eos_token", "pad_token")
    files = {
        "tokenizer.json": made.to_str(pretty=True),
        "tokenizer_config.json": _json(settings | special | {"model_max_length": raw["max_position_embeddings"]}),
        "generation_config.json": _json(generation | ({"eos_token_id": ends} if len(ends) > 1 else {})),
        "config.json": _json(raw),
    }
    template = file.facts.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if isinstance(template, str) and template else {})


def _ids(facts: Mapping[str, Any], *names: str) -> dict[str, int]:
    found = {name + "_id": facts.get("tokenizer.ggml." + SPECIAL_IDS[name]) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _stored(file: GGUFFile, name: str) -> tuple[str, torch.dtype]:
    """safetensors' code and the dtype in which a tensor of the file is kept."""
    return STORED.get(file.tensors[name].kind, ("F32", torch.float32))


def _values(file: GGUFFile, name: str) -> Tensor:
    value, dtype = torch.from_numpy(file.values(name)), _stored(file, name)[1]
    return value.view(dtype) if dtype == torch.bfloat16 else value  # NumPy has no bf16: its bits came as uint16


def _only(file: GGUFFile, kind: str, values: Mapping[str, Any]) -> None:
    """Refuse a fact that is given and not the one value we compute."""
    for name, value in values.items():
        if (found := file.facts.get(f"{kind}.{name}", value)) != value:
            raise ModelError(f"{file.path}: {kind}.{name} is {found!r}; Rung computes {value!r} only.")


def _number(file: GGUFFile, name: str, default: float | None = None) -> float:
    """A positive number of the metadata, as the shortest decimal that is the same fp32: 1e-05, not 9.999999747e-06."""
    import numpy

    value = file.facts.get(name, default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ModelError(f"{file.path}: the metadata needed a positive number {name}, found {value!r}.")
    return float(str(numpy.float32(value)))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
