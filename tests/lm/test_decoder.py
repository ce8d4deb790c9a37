"""The decoder is Llama: parity with `transformers`, and what a decoder promises to its users."""

from dataclasses import replace

import pytest
import torch
from family_twins import their_config
from llama_twin import their_names, twins
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rung.core.errors import ConfigError
from rung.core.records import Layout
from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec, RopeSpec
from rung.lm.decoder import Decoder
from rung.lm.norm import RMSNorm
from rung.lm.presets import llama, smollm2_135m
from rung.lm.weights.families import from_hugging_face

SIZES = {"vocab_size": 37, "layers": 2, "ffn_width": 44, "max_positions": 16}
SHAPES = {
    "odd heads, one key-value head, untied": {"width": 30, "heads": 5, "kv_heads": 1, "head_dim": 6, "tied": False},
    "two key-value heads, all biases": {
        "width": 18, "heads": 6, "kv_heads": 2, "head_dim": 10, "attention_bias": True, "mlp_bias": True,
    },
    "three key-value heads, MLP bias": {"width": 36, "heads": 9, "kv_heads": 3, "head_dim": 6, "mlp_bias": True},
    "no grouping, attention bias, large eps": {
        "width": 20, "heads": 2, "kv_heads": 2, "head_dim": 10, "attention_bias": True, "norm_eps": 0.1,
    },
}  # fmt: skip
SEQUENCE = 23  # longer than max_positions: the scalings that look at the length are in force

# (our spec, their rope_parameters)
ROPES = {
    "linear": (RopeSpec(scaling="linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    "dynamic": (
        RopeSpec(scaling="dynamic", factor=2.5, original_positions=16, context=SEQUENCE),
        {"rope_type": "dynamic", "factor": 2.5},
    ),
    "llama3": (
        RopeSpec(scaling="llama3", factor=4.0, original_positions=12, low_freq_factor=1.0, high_freq_factor=3.0,
                 theta=50.0),
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 12, "low_freq_factor": 1.0,
         "high_freq_factor": 3.0, "rope_theta": 50.0},
    ),
    "yarn": (
        RopeSpec(scaling="yarn", factor=4.0, original_positions=9, beta_fast=4.0, beta_slow=1.5, truncate=False),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9, "beta_fast": 4.0,
         "beta_slow": 1.5, "truncate": False},
    ),
    "yarn as DeepSeek writes it": (
        RopeSpec(scaling="yarn", factor=4.0, original_positions=9, mscale=0.7, mscale_all_dim=0.4),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9, "mscale": 0.7,
         "mscale_all_dim": 0.4},
    ),
    "longrope": (
        RopeSpec(scaling="longrope", factor=2.0, original_positions=8, context=SEQUENCE, short_factor=(1.0, 1.5, 2.0),
                 long_factor=(1.1, 3.0, 5.0)),
        {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 8,
         "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.1, 3.0, 5.0]},
    ),
}  # fmt: skip


def assert_same_logits_and_gradients(config, rope, dtype, tolerance):
    theirs, ours = twins(config, dtype, rope)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(config.vocab_size, (2, SEQUENCE), generator=generator)
    weight_BTV = torch.randn(2, SEQUENCE, config.vocab_size, generator=generator, dtype=dtype)

    expected_BTV = theirs(tokens_BT).logits
    (expected_BTV.log_softmax(-1) * weight_BTV).sum().backward()
    hidden_TD = ours(tokens_BT.flatten(), Layout.chains([SEQUENCE] * 2))
    logits_BTV = ours.head(hidden_TD).view_as(expected_BTV)
    (logits_BTV.log_softmax(-1) * weight_BTV).sum().backward()

    assert expected_BTV.std() > 0.5  # else an absolute tolerance would say nothing
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=tolerance, atol=tolerance)
    for name, parameter in ours.named_parameters():
        gradient = torch.cat([theirs.get_parameter(part).grad for part in their_names(name)])
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_all_gradients_equal_transformers_llama(shape, dtype, tolerance):
    assert_same_logits_and_gradients(llama(**SIZES, **SHAPES[shape]), None, dtype, tolerance)


@pytest.mark.parametrize("scaling", ROPES)
def test_every_rope_scaling_equals_transformers(scaling):
    spec, theirs = ROPES[scaling]
    config = llama(**SIZES, width=12, heads=2, kv_heads=1, head_dim=6, rope=spec)
    assert_same_logits_and_gradients(config, theirs, torch.float64, 1e-10)


NORMS = {"plain": (LlamaRMSNorm, Qwen3RMSNorm), "wide": (Olmo2RMSNorm,), "offset": (Gemma2RMSNorm, Gemma3RMSNorm)}


@pytest.mark.parametrize(("kind", "norm"), [(kind, norm) for kind, norms in NORMS.items() for norm in norms])
def test_norm_is_that_of_transformers_in_bf16_but_for_the_order_of_a_sum(kind, norm):
    """Llama's rounds twice, and is bit-equal here."""
    generator = torch.Generator().manual_seed(0)
    theirs, ours = norm(576, 1e-5).bfloat16(), RMSNorm(576, 1e-5, torch.bfloat16, kind=kind)
    with torch.no_grad():
        theirs.weight.normal_(ours.neutral, 0.5, generator=generator)
        ours.weight.copy_(theirs.weight)
    x_ND = torch.randn(64, 576, generator=generator).bfloat16()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            different = (ours(x_ND) != theirs(x_ND)).float().mean()
            torch.testing.assert_close(ours(x_ND), theirs(x_ND), rtol=2**-7, atol=0)
        assert different == 0 if kind == "plain" else different < 1e-3


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_of_a_norm_pass_gradcheck_and_a_neutral_weight_leaves_a_root_mean_square_of_one(kind):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(7, 1e-2, torch.float64, kind=kind)
    x_ND = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm.weight.fill_(norm.neutral)
        mean_square_N = norm(x_ND).square().mean(-1)
        torch.testing.assert_close(mean_square_N, 1 - 1e-2 / (x_ND.square().mean(-1) + 1e-2), rtol=1e-12, atol=0)
        norm.weight.normal_(0.3, 0.5, generator=generator)
    call = lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x_ND, norm.weight))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "olmo2", "qwen3"])
def test_a_drawn_decoder_of_any_family_begins_with_neutral_norms(kind):
    """Then a block adds something of the size of what it reads: hidden states neither vanish nor explode."""
    config = from_hugging_face(their_config(kind, rms_norm_eps=1e-7).to_dict(), where="here")
    decoder = Decoder(config).init_(torch.Generator().manual_seed(0))
    norms = [module for module in decoder.modules() if isinstance(module, RMSNorm)]
    neutral = 0.0 if "gemma" in kind else 1.0
    assert all((norm.weight == neutral).all() for norm in norms)
    hidden_TD = decoder(torch.arange(9), Layout.chain(9))
    torch.testing.assert_close(hidden_TD.square().mean(-1), torch.ones(9), rtol=0.2, atol=0)


def test_embeddings_are_scaled_by_a_number_that_is_rounded_as_theirs():
    """Gemma's sqrt(width) is rounded to the compute dtype before it multiplies: 45.25 in bf16, not 45.2548."""
    config = replace(llama(**SIZES, width=2048, heads=2, kv_heads=1, head_dim=4), embedding_scale=2048**0.5, blocks=())
    theirs = Gemma2TextScaledWordEmbedding(37, 2048, None, 2048**0.5).bfloat16()
    ours = Decoder(config, torch.bfloat16).init_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs.weight.copy_(ours.embedding.weight)
        assert torch.equal(ours(torch.arange(37), Layout.chain(37)), ours.norm(theirs(torch.arange(37))))


def test_parameters_have_the_agreed_names_and_shapes():
    attention = AttentionSpec(heads=6, kv_heads=2, head_dim=4, bias=True)
    block = BlockSpec(mixer=attention, channel=MLPSpec(width=11, bias=True))
    decoder = Decoder(DecoderConfig(vocab_size=7, width=10, blocks=(block,), tied=False, max_positions=9))
    assert {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()} == {
        "embedding.weight": (7, 10),
        "blocks.0.mixer_norm.weight": (10,),
        "blocks.0.mixer.qkv.weight": (40, 10),
        "blocks.0.mixer.qkv.bias": (40,),
        "blocks.0.mixer.out.weight": (10, 24),
        "blocks.0.channel_norm.weight": (10,),
        "blocks.0.channel.gate_up.weight": (22, 10),
        "blocks.0.channel.gate_up.bias": (22,),
        "blocks.0.channel.down.weight": (10, 11),
        "blocks.0.channel.down.bias": (10,),
        "norm.weight": (10,),
        "unembedding.weight": (7, 10),
    }


def test_smollm2_has_its_published_number_of_parameters():
    decoder = Decoder(smollm2_135m(), device="meta")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 134_515_008


def test_making_and_drawing_a_decoder_leaves_the_global_generator_alone():
    config = llama(**SIZES, width=20, heads=2, kv_heads=1, mlp_bias=True)
    before = torch.random.get_rng_state()
    one, two = (Decoder(config).init_(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert abs(one.embedding.weight.std() - 0.02) < 0.002
    assert torch.equal(one.blocks[0].channel.down.bias, torch.zeros(20))
    assert torch.equal(one.norm.weight, torch.ones(20))


def test_a_tied_head_is_the_embedding_itself():
    tied = Decoder(llama(**SIZES, width=20, heads=2, kv_heads=1))
    assert tied.head_weight() is tied.embedding.weight
    untied = Decoder(llama(**SIZES, width=20, heads=2, kv_heads=1, tied=False))
    assert untied.head_weight() is untied.unembedding.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionSpec(heads=4, kv_heads=3, head_dim=8), "heads=4, kv_heads=3"),
        (lambda: AttentionSpec(heads=4, kv_heads=2, head_dim=7), "even head_dim; got 7"),
        (lambda: RopeSpec(scaling="yarn", factor=2.0), "original_positions > 0"),
        (lambda: AttentionSpec(heads=4, kv_heads=2, head_dim=8, rotary_dim=10), "from 0 to head_dim=8; got 10"),
        (lambda: AttentionSpec(heads=4, kv_heads=2, head_dim=8, window=-1), "must not be negative; got -1 and 0.0"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_numbers(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
