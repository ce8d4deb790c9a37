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
}


def _config(kind: str, **changes: Any) -> Any:
    family, differs = KINDS[kind]
    return transformers.AutoConfig.for_model(family, **COMMON | differs | changes)


def their_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Weights of order one, so that logits are too, and what a token sees changes them."""
    model = transformers.AutoModelForCausalLM.from_config(_config(kind, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 0.0 if parameter.dim() > 1 or name.endswith("bias") or "gemma" in kind else 1.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.25)
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
