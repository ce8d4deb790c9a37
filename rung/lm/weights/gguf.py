"""GGUF files of architecture `llama`, turned into a Hugging Face folder: weights, config, tokenizer, chat template.

Quantised tensors become fp32, so that nothing is lost that the file still had.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rung.core.errors import ModelError, nearest
from rung.core.progress import Listener, Progress, silent
from rung.core.shapes import Tensor
from rung.lm.weights.families import from_hugging_face
from rung.lm.weights.files import SINGLE, Entry, Shard, write_shard
from rung.lm.weights.names import GGUF, HUGGING_FACE, Part, rules, unpermute

CONTROL, UNKNOWN, USER_DEFINED = 3, 2, 4  # token types  [gguf specification]
SPECIAL_IDS = {  # tokenizer.ggml.* -> tokenizer_config.json
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def convert(path: Path, folder: Path, listener: Listener = silent) -> None:
    """Write the model of a GGUF file as a Hugging Face folder (`folder` exists and is empty).

    Raises ModelError for a file that cannot be parsed, another architecture, missing or unused tensors.
    """
    reader = _reader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    raw = hugging_face_config(facts, tied="output.weight" not in tensors, where=str(path))
    config = from_hugging_face(raw, where=str(path))
    theirs = [part for rule in rules(config, GGUF, permuted=True) for part in rule.parts]
    target = [part for rule in rules(config, HUGGING_FACE) for part in rule.parts]
    source = {there.name: here for here, there in zip(theirs, target, strict=True)}
    needed = {part.name for part in theirs}
    if needed != set(tensors):
        raise ModelError(
            f"{path}: tensors do not fit its metadata; missing {sorted(needed - set(tensors))[:5]}, "
            f"unused {sorted(set(tensors) - needed)[:5]}."
        )
    done = 0

    def tensor(entry: Entry) -> Tensor:
        nonlocal done
        done += 1
        listener(Progress(stage="load", done=done, total=len(target), text="converting GGUF"))
        return _dequantised(tensors[source[entry.name].name], source[entry.name], path)

    write_shard(
        folder / SINGLE, Shard(file=SINGLE, entries=tuple(Entry(p.name, "F32", p.shape) for p in target)), tensor
    )
    for name, content in _companions(facts, str(path)).items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "config.json").write_text(_json(raw | _ids(facts, "bos_token", "eos_token", "pad_token")), "utf-8")


def hugging_face_config(facts: Mapping[str, Any], *, tied: bool, where: str) -> dict[str, Any]:
    """config.json of a GGUF's metadata."""
    kind = facts.get("general.architecture")
    if kind != "llama":
        raise ModelError(f"{where}: needed a GGUF of architecture 'llama', found {kind!r}.")
    scaling = facts.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(
            f"{where}: RoPE scaling {scaling!r} is not read from GGUF; load the Hugging Face folder instead."
        )
    try:
        width, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": facts.get("llama.vocab_size") or len(facts["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "intermediate_size": facts["llama.feed_forward_length"],
            "num_hidden_layers": facts["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": facts.get("llama.attention.head_count_kv", heads),
            "head_dim": facts.get("llama.attention.key_length") or width // heads,
            "hidden_act": "silu",
            "rms_norm_eps": _shortest(facts["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _shortest(facts.get("llama.rope.freq_base", 10_000.0)),
            "max_position_embeddings": facts["llama.context_length"],
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
        }
    except KeyError as error:
        raise ModelError(f"{where}: the metadata lacks {error}.") from error


def tokenizer(facts: Mapping[str, Any], *, where: str):
    """The `tokenizers.Tokenizer` of a GGUF's own vocabulary: byte-level BPE."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    model, split = facts.get("tokenizer.ggml.model"), str(facts.get("tokenizer.ggml.pre", "default"))
    if model != "gpt2":
        raise ModelError(f"{where}: needed a byte-level BPE vocabulary ('gpt2'), found {model!r}.")
    if split not in PRE_TOKENIZERS:
        raise ModelError(f"{where}: unknown pre-tokenizer {split!r}. {nearest(split, PRE_TOKENIZERS)}")
    words, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[split]())
    made.decoder = decoders.ByteLevel()
    for word, kind in zip(words, kinds, strict=True):
        if kind in (CONTROL, UNKNOWN):
            made.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            made.add_tokens([tokenizers.AddedToken(word, special=False, normalized=False)])
    return made


def _smollm() -> list:
    """Single digits first, then GPT-2's expression."""
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _gpt2() -> list:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


PRE_TOKENIZERS: Mapping[str, Callable[[], list]] = {"smollm": _smollm, "gpt-2": _gpt2}


def _companions(facts: Mapping[str, Any], where: str) -> dict[str, str]:
    try:
        made = tokenizer(facts, where=where)
    except ModelError:
        raise
    except Exception as error:  # missing lists are KeyErrors, and the tokenizer library raises bare Exceptions
        raise ModelError(f"{where}: the vocabulary cannot be used ({error}).") from error
    words = facts["tokenizer.ggml.tokens"]
    special = {name: words[i] for name in SPECIAL_IDS for i in _ids(facts, name).values()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": made.to_str(pretty=True),
        "tokenizer_config.json": _json(settings | special | {"model_max_length": facts["llama.context_length"]}),
        "generation_config.json": _json(_ids(facts, "bos_token", "eos_token", "pad_token")),
    }
    if template := facts.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _ids(facts: Mapping[str, Any], *names: str) -> dict[str, int]:
    found = {name + "_id": facts.get("tokenizer.ggml." + SPECIAL_IDS[name]) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _dequantised(tensor: Any, part: Part, path: Path) -> Tensor:
    import gguf

    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(
            f"{path}: tensor {tensor.name!r} has type {tensor.tensor_type.name}, not supported."
        ) from error
    if values.shape != part.shape:
        raise ModelError(f"{path}: tensor {part.name!r} needed shape {list(part.shape)}, found {list(values.shape)}.")
    value = torch.from_numpy(values.astype("float32"))
    return unpermute(value, part.heads) if part.heads else value


def _reader(path: Path):
    import gguf

    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file.") from None
    except Exception as error:  # the parser raises whatever a broken byte leads to
        raise ModelError(f"{path} is not a readable GGUF file ({error}). Fetch it again.") from error


def _shortest(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05 and not 9.999999747378752e-06."""
    import numpy

    return float(str(numpy.float32(value)))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
