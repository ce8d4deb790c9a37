"""A random Llama of `transformers`, and our decoder with the same weights, copied by hand."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rung.lm.config import DecoderConfig
from rung.lm.decoder import Decoder


def twins(config: DecoderConfig, dtype: torch.dtype, rope: dict | None = None) -> tuple[LlamaForCausalLM, Decoder]:
    """Their model (eager attention rounds to fp32: hence SDPA), weights of order one so that logits are too, and ours.

    Their RMSNorm rounds to fp32 even in fp64; there torch's own takes its place.
    """
    mixer, channel = config.blocks[0].mixer, config.blocks[0].channel
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=channel.width,
            num_hidden_layers=len(config.blocks),
            num_attention_heads=mixer.heads,
            num_key_value_heads=mixer.kv_heads,
            head_dim=mixer.head_dim,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            attention_bias=mixer.bias,
            mlp_bias=channel.bias,
            rope_parameters={"rope_type": "default", "rope_theta": mixer.rope.theta} | (rope or {}),
            attn_implementation="sdpa",
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.25)
    theirs.to(dtype)
    if dtype == torch.float64:
        _widen_norms(theirs)
    ours = Decoder(config, dtype)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.cat([theirs.get_parameter(part) for part in their_names(name)]))
    return theirs, ours


def their_names(ours: str) -> list[str]:
    """The parameters of `transformers` that, one above the other, are our parameter."""
    if not ours.startswith("blocks."):
        top = {"embedding": "model.embed_tokens", "norm": "model.norm", "unembedding": "lm_head"}
        return [f"{top[ours.split('.')[0]]}.weight"]
    _, layer, module, kind = ours.split(".", 3)
    part, _, leaf = kind.rpartition(".")
    inside = {
        ("mixer_norm", ""): ["input_layernorm"],
        ("channel_norm", ""): ["post_attention_layernorm"],
        ("mixer", "qkv"): ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ("mixer", "out"): ["self_attn.o_proj"],
        ("channel", "gate_up"): ["mlp.gate_proj", "mlp.up_proj"],
        ("channel", "down"): ["mlp.down_proj"],
    }[module, part]
    return [f"model.layers.{layer}.{name}.{leaf}" for name in inside]


def _widen_norms(model: LlamaForCausalLM) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                wide = torch.nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                wide.weight = child.weight
                setattr(module, name, wide)
