"""config.json <-> DecoderConfig.  A family is one function; what it cannot express is an error, not a guess.

What a config.json leaves out is what transformers takes it for (`LEFT_OUT`).  transformers 5 writes `rope_parameters`,
4 wrote `rope_theta` and `rope_scaling`: both are read, and the older form, which both understand, is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from rung.core.errors import ConfigError, ModelError, nearest
from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec, RopeSpec

Raw = dict[str, Any]  # of a config.json, completed
SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layer in `layer_types`
COMMON: Raw = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}
QWEN: Raw = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
QWEN |= {"sliding_window": 4096, "max_window_layers": 28}
GEMMA: Raw = {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
GEMMA |= {"sliding_window": 4096, "tie_word_embeddings": True}
CAPS: Raw = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
TWO_ROPES: Raw = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}
PHI: Raw = {"rms_norm_eps": 1e-5, "num_key_value_heads": None, "original_max_position_embeddings": 4096}
SMOL: Raw = {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4}
LEFT_OUT: Mapping[str, Raw] = {  # of a family, where it differs from the common one
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
    "gemma2": GEMMA | CAPS | {"max_position_embeddings": 8192},
    "gemma3_text": GEMMA | TWO_ROPES | {"max_position_embeddings": 131_072},
    "phi3": PHI | {"max_position_embeddings": 4096},
    "olmo2": {"num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "smollm3": SMOL | {"max_position_embeddings": 32_768, "tie_word_embeddings": True},
}
MOST_LAYERS = 1024  # several times the deepest published decoder; a broken file must not fill the memory
MOST = 1 << 30  # of every other size, several times the largest
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "sliding_window"),
)
FIELDS: Mapping[str, tuple[str, ...]] = {  # of a RoPE scaling, with the same name here and there
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}


def from_hugging_face(raw: Mapping[str, Any], *, where: str) -> DecoderConfig:
    """The decoder that a config.json describes; `where` names the file in errors."""
    if not isinstance(kind := raw.get("model_type"), str):
        raise ModelError(f"{where} needs the field 'model_type', a name, and has {kind!r} there.")
    if kind not in FAMILIES:
        code = " Its folder asks for code of its own (auto_map), which Rung never runs." if raw.get("auto_map") else ""
        raise ModelError(f"{where}: Rung has no model family {kind!r}. {nearest(kind, FAMILIES)}{code}")
    if raw.get("quantization_config"):
        raise ModelError(
            f"{where}: the weights are quantised; needed plain safetensors in fp32, fp16 or bf16. Take the folder that "
            "they were made from, or its GGUF."
        )
    try:
        _sizes(raw)
        return FAMILIES[kind](COMMON | LEFT_OUT.get(kind, {}) | dict(raw))
    except KeyError as error:
        raise ModelError(f"{where} lacks the field {error}.") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, ConfigError) as error:
        raise ModelError(f"{where}: {error}") from error


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a decoder that was made here, which must be a Llama: read again, it is the same."""
    block = config.blocks[0]
    mixer, channel, rope = block.mixer, block.channel, block.mixer.rope or RopeSpec()
    scaling = None
    if rope.scaling != "none":
        kept = {name: getattr(rope, name) for name in FIELDS[rope.scaling] if getattr(rope, name) is not None}
        scaling = {"rope_type": rope.scaling, "original_max_position_embeddings": rope.original_positions, **kept}
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": channel.width,
        "num_hidden_layers": len(config.blocks),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_positions,
        "attention_bias": mixer.bias,
        "mlp_bias": channel.bias,
        "tie_word_embeddings": config.tied,
    }
    if from_hugging_face(raw, where="this decoder") != config:
        raise ModelError(
            "Only a Llama can be written as a new folder: equal blocks, all attention biases or none, no windows, "
            "soft-caps or further norms. For another family, load a folder of it, set its weights and save that."
        )
    return raw


def llama(raw: Raw) -> DecoderConfig:
    """Llama 1 to 3, SmolLM and everything else that calls itself `llama`."""
    _only(raw, hidden_act="silu", pretraining_tp=1)
    bias = bool(raw.get("attention_bias"))
    mixer = replace(_attention(raw), bias=bias, out_bias=bias)
    return _decoder(raw, [mixer] * _layers(raw), mlp_bias=bool(raw.get("mlp_bias")))


def mistral(raw: Raw) -> DecoderConfig:
    """Mistral: a Llama without biases; every layer has the window, or none has."""
    _only(raw, hidden_act="silu", layer_types=None, attention_bias=False, mlp_bias=False)
    window = raw["sliding_window"]
    mixer, windows = _attention(raw), _windows(raw, [window is not None] * _layers(raw), window)
    return _decoder(raw, [replace(mixer, window=window) for window in windows])


def qwen2(raw: Raw) -> DecoderConfig:
    """Qwen2 and 2.5: biases on q, k and v, none on the output."""
    _only(raw, hidden_act="silu")
    mixer = replace(_attention(raw), bias=True)
    return _decoder(raw, [replace(mixer, window=window) for window in _qwen_windows(raw)])


def qwen3(raw: Raw) -> DecoderConfig:
    """Qwen3, dense: q and k normed head by head, a head's size of its own."""
    _only(raw, hidden_act="silu")
    bias = bool(raw.get("attention_bias"))
    mixer = replace(_attention(raw), bias=bias, out_bias=bias, qk_norm="head", norm_eps=float(raw["rms_norm_eps"]))
    return _decoder(raw, [replace(mixer, window=window) for window in _qwen_windows(raw)])


def gemma2(raw: Raw) -> DecoderConfig:
    """Gemma 2: soft-caps, and a window in every other layer, beginning with the first."""
    mixer = replace(_gemma_attention(raw), softcap=float(raw["attn_logit_softcapping"] or 0.0))
    layers = _layers(raw)
    windows = _windows(raw, [layer % 2 == 0 for layer in range(layers)], raw["sliding_window"])
    return _gemma(raw, [replace(mixer, window=window) for window in windows])


def gemma3_text(raw: Raw) -> DecoderConfig:
    """Gemma 3's text model: q and k normed, five layers with a window and a short RoPE for each one without."""
    _only(raw, attn_logit_softcapping=None)  # transformers reads it and computes without
    plain = _gemma_attention(raw | {"rope_parameters": None, "rope_scaling": None})
    mixer = replace(plain, qk_norm="head", norm="offset", norm_eps=float(raw["rms_norm_eps"]))
    layers, pattern = _layers(raw), raw["sliding_window_pattern"]
    windows = _windows(raw, [(layer + 1) % pattern != 0 for layer in range(layers)], raw["sliding_window"])
    given = raw.get("rope_parameters") or {FULL: raw.get("rope_scaling")}
    if set(given) - {FULL, SLIDING}:
        raise ConfigError(f"rope_parameters of Gemma 3 are those of {FULL!r} and {SLIDING!r}; got {sorted(given)}.")
    near = _rope(raw | {"rope_theta": raw["rope_local_base_freq"]}, given.get(SLIDING) or {})
    far = _rope(raw, given.get(FULL) or {})
    return _gemma(raw, [replace(mixer, window=window, rope=near if window else far) for window in windows])


def phi3(raw: Raw) -> DecoderConfig:
    """Phi-3 and Phi-4: fused matrices on disk, longrope, and in Phi-4-mini heads that turn in part."""
    _only(raw, hidden_act="silu", attention_bias=False, mlp_bias=False)
    given = _scaling(raw)
    fraction = given.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    kind = given.get("rope_type") or given.get("type")
    if kind in ("su", "yarn"):  # as longrope was once called
        given["rope_type"] = "longrope"
    mixer = _attention(
        raw | {"partial_rotary_factor": None, "rope_parameters": given, "rope_scaling": None}, float(fraction)
    )
    window = raw.get("sliding_window")
    windows = _windows(raw, [window is not None] * _layers(raw), window)
    return _decoder(raw, [replace(mixer, window=window) for window in windows])


def olmo2(raw: Raw) -> DecoderConfig:
    """OLMo 2: norms behind mixer and channel, on what is added; q and k normed over all heads at once."""
    _only(raw, hidden_act="silu")
    bias = bool(raw.get("attention_bias"))
    plain = replace(_attention(raw), bias=bias, out_bias=bias)
    mixer = replace(plain, qk_norm="width", norm="wide", norm_eps=float(raw["rms_norm_eps"]))
    return _decoder(raw, [mixer] * _layers(raw), norms="after", norm="wide")


def smollm3(raw: Raw) -> DecoderConfig:
    """SmolLM3: a Llama of which every fourth layer has no positions."""
    _only(raw, hidden_act="silu")
    layers, bias = _layers(raw), bool(raw.get("attention_bias"))
    interval = raw["no_rope_layer_interval"]
    turns = (raw.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)])[:layers]
    if len(turns) < layers:
        raise ConfigError(f"no_rope_layers names {len(turns)} layers of {layers}.")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    windows = _windows(raw, [window is not None and not turn for turn in turns], window)
    mixer = replace(_attention(raw), bias=bias, out_bias=bias)
    mixers = [
        replace(mixer, window=window, rope=mixer.rope if turn else None)
        for window, turn in zip(windows, turns, strict=True)
    ]
    return _decoder(raw, mixers, mlp_bias=bool(raw.get("mlp_bias")))


def gemma3(raw: Raw) -> DecoderConfig:
    """Gemma 3 with its image encoder: not a decoder of text alone.  (transformers' own Gemma3ForCausalLM reads such a
    folder without an error and draws every weight anew.)"""
    raise ConfigError(
        "this Gemma 3 has an image encoder, which Rung does not compute; needed its text model alone. With "
        "transformers: whole = Gemma3ForConditionalGeneration.from_pretrained(FOLDER); "
        "text = Gemma3ForCausalLM(whole.config.text_config); text.model = whole.model.language_model; "
        "text.tie_weights(); text.save_pretrained(NEW)."
    )


FAMILIES: Mapping[str, Callable[[Raw], DecoderConfig]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "phi3": phi3,
    "olmo2": olmo2,
    "smollm3": smollm3,
}


def _layers(raw: Raw) -> int:
    layers = raw["num_hidden_layers"]
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(f"num_hidden_layers must be a number from 1 to {MOST_LAYERS}; got {layers!r}")
    return layers


def _attention(raw: Raw, turned: float = 1.0) -> AttentionSpec:
    """What all families have: heads, their size, RoPE of that part of a head."""
    _only(raw, partial_rotary_factor=1.0)
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    return AttentionSpec(
        heads=heads,
        kv_heads=raw["num_key_value_heads"] or heads,
        head_dim=head_dim,
        rotary_dim=0 if turned == 1.0 else int(head_dim * turned),
        rope=_rope(raw, _scaling(raw)),
    )


def _decoder(
    raw: Raw, mixers: Sequence[AttentionSpec], *, mlp_bias: bool = False, activation: Any = "silu", **rest: Any
) -> DecoderConfig:
    """What all families have: a block for each mixer, an embedding and a head.  rest: of the blocks."""
    eps = float(raw["rms_norm_eps"])
    channel = MLPSpec(width=raw["intermediate_size"], bias=mlp_bias, activation=activation)
    blocks = tuple(BlockSpec(mixer=mixer, channel=channel, norm_eps=eps, **rest) for mixer in mixers)
    # beyond the trained length longrope would need its other set of factors (`RopeSpec.context`)
    trained = [mixer.rope.original_positions for mixer in mixers if mixer.rope and mixer.rope.scaling == "longrope"]
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        blocks=blocks,
        norm=blocks[0].norm,
        norm_eps=eps,
        tied=bool(raw["tie_word_embeddings"]),
        max_positions=min([raw["max_position_embeddings"], *trained]),
    )


def _gemma_attention(raw: Raw) -> AttentionSpec:
    _only(raw, hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    bias = bool(raw.get("attention_bias"))
    return replace(_attention(raw), bias=bias, out_bias=bias, scale=float(raw["query_pre_attn_scalar"]) ** -0.5)


def _gemma(raw: Raw, mixers: Sequence[AttentionSpec]) -> DecoderConfig:
    """Norms before and behind, with weights around zero; embeddings times the square root of the width."""
    config = _decoder(raw, mixers, activation="gelu_tanh", norms="both", norm="offset")
    cap = float(raw.get("final_logit_softcapping") or 0.0)
    return replace(config, embedding_scale=config.width**0.5, logit_softcap=cap)


def _qwen_windows(raw: Raw) -> list[int]:
    """The last layers may have a window, if it is switched on."""
    window = raw["sliding_window"] if raw.get("use_sliding_window") else None
    below = raw["max_window_layers"]
    return _windows(raw, [window is not None and n >= below for n in range(_layers(raw))], window)


def _windows(raw: Raw, sliding: Sequence[bool], window: int | None) -> list[int]:
    """The window of each layer, 0 where there is none: as `layer_types` says, else as `sliding` does."""
    types = raw.get("layer_types") or [SLIDING if slides else FULL for slides in sliding]
    unknown = set(types) - {FULL, SLIDING}
    if unknown:
        raise ConfigError(f"layer_types has {sorted(unknown)}; Rung computes {FULL!r} and {SLIDING!r}.")
    if len(types) != _layers(raw):
        raise ConfigError(f"layer_types names {len(types)} layers of {raw['num_hidden_layers']}.")
    if SLIDING in types and not window:
        raise ConfigError(f"there are layers with {SLIDING!r}, and sliding_window is {window!r} or switched off.")
    return [(window or 0) if kind == SLIDING else 0 for kind in types]


def _scaling(raw: Raw) -> Raw:
    """What a config.json says of RoPE, in the form of transformers 5 or of 4; a copy."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters must be an object; got {given!r}")
    return dict(given)


def _rope(raw: Raw, given: Raw) -> RopeSpec:
    theta = float(given.get("rope_theta") or raw["rope_theta"])
    kind = given.get("rope_type") or given.get("type") or "default"
    _only(given, partial_rotary_factor=1.0)
    nested = [name for name, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(f"rope_parameters differ by kind of layer ({', '.join(nested)}); this family has one RoPE.")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in FIELDS:
        raise ConfigError(f"unknown RoPE scaling {kind!r}. {nearest(kind, ['default', *FIELDS])}")
    longest = raw["max_position_embeddings"]
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or longest
    kept = {name: given[name] for name in FIELDS[kind] if given.get(name) is not None}
    kept = {name: tuple(map(float, v)) if isinstance(v, list) else v for name, v in kept.items()}
    kept = {name: float(v) if type(v) is int else v for name, v in kept.items()}
    kept.setdefault("factor", longest / original)
    return RopeSpec(theta=theta, scaling=cast(Any, kind), original_positions=original, **kept)


def _sizes(raw: Mapping[str, Any]) -> None:
    """Refuse what is no size of a model before anything is made as large or as often as it says."""
    for name in SIZES:
        value = raw.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= MOST):
            raise ConfigError(f"{name} is {value!r}; needed a whole number from 1 to {MOST}.")


def _only(raw: Raw, **values: Any) -> None:
    """Refuse a field that is given and not the one value we compute."""
    for name, value in values.items():
        if raw.get(name) not in (None, value):
            raise ConfigError(
                f"{name} is {raw[name]!r}; Rung computes {value!r} only. transformers may compute it: --foreign "
                "(foreign=True)."
            )
