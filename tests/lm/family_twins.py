"""Tiny random models of `transformers`, one of every family and shape, and what makes them compute in fp64."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 41
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 5
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 300.0, "short_factor": [1.0, 1.2, 1.7], "long_factor": [1.1, 3.0, 5.0],
}  # fmt: skip

# name: model_type, and what differs from COMMON
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, windows": ("mistral", {"sliding_window": WINDOW}),
    "mistral, none, tied, one kv head": (
        "mistral",
        {"sliding_window": None, "head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 1}
        | {"tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2, last layers with windows, yarn": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "rope_parameters": YARN}
        | {"num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "qwen2, layer types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, biases, windows, yarn": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
        | {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 6, "rope_parameters": YARN},
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 17, "attn_logit_softcapping": 0.7}
        | {"final_logit_softcapping": 1.3},
    ),
    "gemma2, biases, untied, one cap, layer types": (
        "gemma2",
        {"sliding_window": 3, "query_pre_attn_scalar": 10, "attn_logit_softcapping": None, "attention_bias": True}
        | {"final_logit_softcapping": 2.0, "tie_word_embeddings": False, "head_dim": 4, "num_key_value_heads": 1}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "num_hidden_layers": 7, "query_pre_attn_scalar": 12}
        | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
    ),
    "gemma3, biases, untied, capped": (
        "gemma3_text",
        {"sliding_window": 3, "num_hidden_layers": 4, "sliding_window_pattern": 2, "attention_bias": True}
        | {"tie_word_embeddings": False, "final_logit_softcapping": 1.5},
    ),
    "phi3": ("phi3", {"head_dim": 6, "hidden_size": 36}),
    "phi3, windows, in part, one kv head, tied": (
        "phi3",
        {"sliding_window": WINDOW, "num_key_value_heads": 1, "hidden_size": 48, "head_dim": 8}
        | {"tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.75}},
    ),
    "phi3, longrope in part": (
        "phi3",
        {"hidden_size": 48, "head_dim": 8, "original_max_position_embeddings": 32, "max_position_embeddings": 128}
        | {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, biases, tied, llama3": (
        "olmo2",
        {"attention_bias": True, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4}
        | {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "rope_parameters": YARN}),
    "smollm3, biases, windows where nothing turns": (
        "smollm3",
        {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True}
        | {"mlp_bias": True, "tie_word_embeddings": False, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
}


def their_config(kind: str, **changes: Any) -> Any:
    family, differs = KINDS[kind]
    return transformers.AutoConfig.for_model(family, **COMMON | differs | changes)


def their_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Weights of order one, so that logits are too, and what a token sees changes them."""
    model = transformers.AutoModelForCausalLM.from_config(their_config(kind, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 0.0 if parameter.dim() > 1 or name.endswith("bias") or "gemma" in kind else 1.0
            spread = 0.25 if parameter.dim() == 1 else 1.3 * parameter.shape[1] ** -0.5
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * spread)
    return model.to(dtype).eval()


def folder_of(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


class WideNorm(torch.nn.Module):
    """RMSNorm in the dtype of its input: theirs rounds to fp32 even in fp64."""

    def __init__(self, theirs: torch.nn.Module) -> None:
        super().__init__()
        self.weight = theirs.weight
        self.offset = 1.0 if type(theirs).__name__.startswith("Gemma") else 0.0
        self.eps = theirs.eps if self.offset else theirs.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight + self.offset) * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@contextmanager
def in_fp64(model: Any) -> Iterator[None]:
    """Their norms, and the softmax of their eager attention, in fp64."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, WideNorm(child))
    softmax = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda x, dim, dtype: softmax(x, dim=dim, dtype=x.dtype)
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax
