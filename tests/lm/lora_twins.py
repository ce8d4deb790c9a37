"""A tiny Llama as a folder of transformers, an adapter of random numbers, and PEFT's own model around both."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from rung.core.records import Layout
from rung.lm import presets
from rung.lm.adapters.lora import Adapter, Factors, native_sites
from rung.lm.adapters.peft import save_adapter
from rung.lm.adapters.spec import LoRA
from rung.lm.config import DecoderConfig
from rung.lm.decoder import Decoder

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = torch.randint(51, (3, 13), generator=torch.Generator().manual_seed(1))


def config() -> DecoderConfig:
    """Awkward on purpose: no width is a power of two, heads are not width / head_dim, odd groups."""
    return presets.llama(vocab_size=51, width=30, layers=2, heads=6, kv_heads=2, head_dim=10, ffn_width=37)


def filled(decoder: Decoder) -> Decoder:
    """Random weights of order one, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder


def adapted(decoder: Decoder, spec: LoRA) -> Adapter:
    """An adapter on it whose B's are random too."""
    adapter = Adapter(decoder, native_sites(decoder), spec, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def dense_logits(decoder) -> torch.Tensor:
    """Logits [B, T, V] of PROMPTS."""
    hidden_ND = decoder.forward(PROMPTS.reshape(-1), Layout.chains([PROMPTS.shape[1]] * len(PROMPTS)))
    return decoder.head(hidden_ND).unflatten(0, PROMPTS.shape)


def their_folder(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random Llama as transformers writes it."""
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=51,
            hidden_size=30,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=128,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.to(dtype).save_pretrained(path / "base")
    return path / "base"


def peft_of(folder: Path, factors: Factors):
    """PEFT's model of a folder and an adapter that was written by us."""
    import transformers

    place = folder.parent / "adapter"
    save_adapter(place, factors, base=str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return peft_load(base, place)


def peft_load(base, place: Path):
    """An adapter on a model of transformers, ready to learn.  A missing or superfluous tensor is an error."""
    import peft

    with without_future_warnings():
        return peft.PeftModel.from_pretrained(base, place, is_trainable=True)


@contextmanager
def without_future_warnings():
    """PEFT calls what transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
