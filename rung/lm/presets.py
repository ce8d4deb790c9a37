"""Configurations by name."""

from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec, RopeSpec

PLAIN_ROPE = RopeSpec()


def llama(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn_width: int,
    head_dim: int = 0,
    rope: RopeSpec = PLAIN_ROPE,
    norm_eps: float = 1e-5,
    tied: bool = True,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    max_positions: int = 2048,
) -> DecoderConfig:
    """A Llama of `layers` equal blocks; head_dim 0 is width / heads.  [Touvron 2023]"""
    attention = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or width // heads,
        rope=rope,
        bias=attention_bias,
        out_bias=attention_bias,
    )
    block = BlockSpec(mixer=attention, channel=MLPSpec(width=ffn_width, bias=mlp_bias), norm_eps=norm_eps)
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        blocks=(block,) * layers,
        norm_eps=norm_eps,
        tied=tied,
        max_positions=max_positions,
    )


def smollm2_135m() -> DecoderConfig:
    """SmolLM2-135M: 30 blocks, 9 query heads on 3 key-value heads.  [Allal 2025]"""
    return llama(
        vocab_size=49_152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        ffn_width=1536,
        rope=RopeSpec(theta=100_000.0),
        max_positions=8192,
    )
