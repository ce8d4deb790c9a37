"""Tiny random models of `transformers` as folders, one of every kind that behaves in a way of its own."""

import json
from pathlib import Path

import torch
from byte_tokenizer import BYTES
from train.tiny import TEMPLATE
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging

VOCABULARY = 258
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA_LIKE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2_LIKE = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 256}
KINDS = {
    "llama": LLAMA_LIKE | {"tie_word_embeddings": True},  # a family of our own
    "gpt2": GPT2_LIKE,  # learned positions, transposed matrices, a tied head
    "gptj": GPT2_LIKE | {"rotary_dim": 4},  # a bias in the head
    "gpt_neox": LLAMA_LIKE | {"rotary_pct": 0.67},
    "stablelm": LLAMA_LIKE | {"partial_rotary_factor": 0.67},
    "cohere": LLAMA_LIKE,  # scaled logits
    "granite": LLAMA_LIKE | {"logits_scaling": 13.0},  # divided logits
    "nanochat": LLAMA_LIKE | {"final_logit_softcapping": 2.0},  # capped logits
    "mixtral": LLAMA_LIKE | {"num_local_experts": 3, "num_experts_per_tok": 2},  # the files' experts are fused
    "falcon": LLAMA_LIKE | {"alibi": True},  # positions by the distance of keys
    "mpt": {"d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": 256},  # by their place in the cache
    "starcoder2": LLAMA_LIKE | {"sliding_window": 4},
    "mamba": {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},  # recurrent
}
TASK = '''"""The reward is 1 without the share of letters that are not ASCII: a model that knows nothing has half."""

problems = [{"prompt": f"say a {n}"} for n in range(40)]


def reward(problem, text):
    return 1 - sum(not letter.isascii() for letter in text) / max(len(text), 1)
'''
CACHED = ("llama", "gpt2", "gptj", "gpt_neox", "stablelm", "cohere", "granite", "nanochat", "mixtral", "falcon")


def foreign_model(kind: str, **changes) -> PreTrainedModel:
    """In evaluation, in fp32.  Matrices are large: what a token sees changes its state by more than rounding."""
    config = CONFIG_MAPPING[kind](vocab_size=VOCABULARY, **(NO_ENDS | KINDS.get(kind, LLAMA_LIKE) | changes))
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "D")):  # of a state space model: decay rates, not weights
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model


def foreign_folder(path: Path, kind: str = "gpt2", *, model: PreTrainedModel | None = None, **changes) -> Path:
    """The model as a folder with a tokenizer of bytes, and beside it a task."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    (model or foreign_model(kind, **changes)).save_pretrained(path)
    if bars:
        logging.enable_progress_bar()
    (path / "tokenizer.json").write_text(BYTES._plain.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    (path.parent / "letters.py").write_text(TASK.replace('letter == "a"', "letter.isascii()"))
    return path


def edit_config(path: Path, **changes) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))
