"""config.json <-> DecoderConfig.  A family is one function; what it cannot express is an error, not a guess.

transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`: both are read, and the older form,
which both understand, is written.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

from rung.core.errors import ConfigError, ModelError, nearest
from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec, RopeSpec

Raw = Mapping[str, Any]
THETA = 10_000.0  # transformers' default
FIELDS: Mapping[str, tuple[str, ...]] = {  # of a RoPE scaling, with the same name here and there
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}


def from_hugging_face(raw: Raw, *, where: str) -> DecoderConfig:
    """The decoder that a config.json describes; `where` names the file in errors."""
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(f"{where}: Rung has no model family {kind!r}. {nearest(kind, FAMILIES)}")
    if raw.get("quantization_config"):
        raise ModelError(f"{where}: the weights are quantised; needed plain safetensors in fp32, fp16 or bf16.")
    try:
        return FAMILIES[kind](raw)
    except KeyError as error:
        raise ModelError(f"{where} lacks the field {error}.") from error
    except (TypeError, ConfigError) as error:
        raise ModelError(f"{where}: {error}") from error


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a decoder that was made here: a Llama, all of whose blocks must be equal."""
    block = config.blocks[0]
    mixer, channel, rope = block.mixer, block.channel, block.mixer.rope
    if any(other != block for other in config.blocks) or mixer.bias != mixer.out_bias:
        raise ModelError("A Llama's blocks are equal, with all attention biases or none; this decoder is another kind.")
    scaling = None
    if rope.scaling != "none":
        kept = {name: getattr(rope, name) for name in FIELDS[rope.scaling] if getattr(rope, name) is not None}
        scaling = {"rope_type": rope.scaling, "original_max_position_embeddings": rope.original_positions, **kept}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": channel.width,
        "num_hidden_layers": len(config.blocks),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": channel.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_positions,
        "attention_bias": mixer.bias,
        "mlp_bias": channel.bias,
        "tie_word_embeddings": config.tied,
    }


def llama(raw: Raw) -> DecoderConfig:
    """Llama 1 to 3, SmolLM and everything else that calls itself `llama`."""
    _only(raw, hidden_act="silu", pretraining_tp=1, partial_rotary_factor=1.0)
    width, heads, eps = raw["hidden_size"], raw["num_attention_heads"], float(raw.get("rms_norm_eps", 1e-6))
    bias = bool(raw.get("attention_bias", False))
    rope = _rope(raw)
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or width // heads,
        rope=rope,
        bias=bias,
        out_bias=bias,
    )
    channel = MLPSpec(width=raw["intermediate_size"], bias=bool(raw.get("mlp_bias", False)))
    block = BlockSpec(mixer=mixer, channel=channel, norm_eps=eps)
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        width=width,
        blocks=(block,) * raw["num_hidden_layers"],
        norm_eps=eps,
        tied=bool(raw.get("tie_word_embeddings", False)),
        # beyond the trained length longrope would need its other set of factors (`RopeSpec.context`)
        max_positions=rope.original_positions
        if rope.scaling == "longrope"
        else raw.get("max_position_embeddings", 2048),
    )


FAMILIES: Mapping[str, Callable[[Raw], DecoderConfig]] = {"llama": llama}


def _rope(raw: Raw) -> RopeSpec:
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or THETA)
    kind = given.get("rope_type") or given.get("type") or "default"
    _only(given, partial_rotary_factor=1.0)
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in FIELDS:
        raise ConfigError(f"unknown RoPE scaling {kind!r}. {nearest(kind, ['default', *FIELDS])}")
    longest = raw.get("max_position_embeddings", 2048)
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    kept = {name: given[name] for name in FIELDS[kind] if given.get(name) is not None}
    kept = {name: tuple(map(float, v)) if isinstance(v, list) else v for name, v in kept.items()}
    kept = {name: float(v) if type(v) is int else v for name, v in kept.items()}
    kept.setdefault("factor", longest / original)
    return RopeSpec(theta=theta, scaling=cast(Any, kind), original_positions=original, **kept)


def _only(raw: Raw, **values: Any) -> None:
    """Refuse a field that is given and not the one value we compute."""
    for name, value in values.items():
        if raw.get(name) not in (None, value):
            raise ConfigError(f"{name} is {raw[name]!r}; Rung computes {value!r} only.")
