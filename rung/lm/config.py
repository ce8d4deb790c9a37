"""What a decoder is, as frozen values: a tuple of blocks, each a mixer (between tokens) and a channel (within one).

Which module a spec becomes is looked up once, in `block.MIXERS` and `block.CHANNELS`; a new mixer is a new spec.
"""

from dataclasses import dataclass
from typing import Literal

from rung.core.errors import ConfigError

Norm = Literal["plain", "wide", "offset"]  # RMSNorm's ways with its weight; formulas in `norm.py`


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding, half-split (Llama's order), and its published scalings; formulas in `rope.py`.

    theta:          base of the wavelengths
    scaling:        none, linear, dynamic (NTK), llama3, yarn, longrope
    factor:         how much longer than `original_positions` a sequence may be          [all scalings]
    original_positions: length the model was trained on before scaling                   [all but linear]
    context:        length of sequence the frequencies are made for; 0 is `original_positions`. transformers takes
                    the longest sequence of each batch instead, so that a token's logits depend on the batch around
                    it and on how it was cut into chunks; here they never do             [dynamic, longrope]
    low_freq_factor, high_freq_factor: borders of the interpolated band                  [llama3]
    beta_fast, beta_slow: rotations at the borders of the ramp; truncate rounds them     [yarn]
    attention_factor: multiplies cos and sin; None takes the published formula           [yarn, longrope]
    mscale, mscale_all_dim: DeepSeek's form of that formula                              [yarn]
    short_factor, long_factor: one factor per frequency, up to and beyond `original_positions`  [longrope]
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_positions: int = 0
    context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear") and self.original_positions <= 0:
            raise ConfigError(f"RoPE scaling {self.scaling!r} needs original_positions > 0: the trained length.")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Softmax attention: multi-head (kv_heads = heads), grouped-query, or multi-query (kv_heads = 1).

    rope:       None: no positions (NoPE)
    rotary_dim: leading dimensions of a head that turn; 0 is all of them
    bias:       of the projections to q, k and v; out_bias: of the output projection
    qk_norm:    RMSNorm of q and k before they turn: of each head, or over the whole width of all heads
    norm, norm_eps: how those norms compute
    window:     a key is seen by queries fewer than this many positions behind it; 0 is all of them
    softcap:    scores s become softcap * tanh(s / softcap); 0 leaves them
    scale:      of the scores; None is 1 / sqrt(head_dim)
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None = RopeSpec()
    rotary_dim: int = 0
    bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    norm: Norm = "plain"
    norm_eps: float = 1e-5
    window: int = 0
    softcap: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(f"heads must be a multiple of kv_heads; got heads={self.heads}, kv_heads={self.kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"rotary embedding needs an even head_dim; got {self.head_dim}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ConfigError(f"rotary_dim must be even, from 0 to head_dim={self.head_dim}; got {self.rotary_dim}")
        factors = (self.rope.short_factor, self.rope.long_factor) if self.rope else ()
        if self.rope and self.rope.scaling == "longrope" and {len(f) for f in factors} != {self.turned // 2}:
            found = " and ".join(str(len(f)) for f in factors)
            raise ConfigError(f"longrope needs {self.turned // 2} factors, one per frequency, twice; got {found}")
        if self.window < 0 or self.softcap < 0:
            raise ConfigError(f"window and softcap must not be negative; got {self.window} and {self.softcap}")

    @property
    def turned(self) -> int:
        """How many dimensions of a head turn."""
        return self.rotary_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """What the products of q and k are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)); with silu it is SwiGLU, with gelu_tanh GeGLU (the
    tanh approximation of GELU).  [Shazeer 2020]"""

    width: int
    bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """x + mixer(x), then x + channel(x), with norms before each of them, after each (on what is added), or both."""

    mixer: AttentionSpec
    channel: MLPSpec
    norms: Literal["before", "after", "both"] = "before"
    norm: Norm = "plain"
    norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder.

    norm, norm_eps:  of the last norm
    tied:            the head's matrix is the embedding
    max_positions:   the longest sequence it is meant for
    embedding_scale: multiplies embeddings
    logit_softcap:   logits z become logit_softcap * tanh(z / logit_softcap); 0 leaves them
    """

    vocab_size: int
    width: int
    blocks: tuple[BlockSpec, ...]
    norm: Norm = "plain"
    norm_eps: float = 1e-5
    tied: bool = True
    max_positions: int
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
