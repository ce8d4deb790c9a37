"""GGUF files of tiny Llama, Qwen2 and Qwen3 models, in every type, against transformers with the same numbers."""

import json

import gguf_twin
import pytest
import torch

from rung.core.errors import ModelError
from rung.lm.config import RopeSpec
from rung.lm.rope import frequencies
from rung.lm.weights import sources
from rung.model import load

BLOCKS = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q4_K": 256, "Q6_K": 256}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))


def tiny(arch: str, block: int = 1, **changes):
    """A tiny model whose rows are whole blocks; its heads together are wider than it is."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": len(gguf_twin.WORDS), "hidden_size": 30, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
    }  # fmt: skip
    if block > 1:
        sizes |= {
            "hidden_size": block,
            "intermediate_size": 3 * block,
            "num_attention_heads": 8,
            "head_dim": block // 4,
        }
    if arch == "qwen2":  # its heads are as wide together as it is
        sizes = {name: size for name, size in sizes.items() if name != "head_dim"}
        sizes |= {"num_attention_heads": 3 if block == 1 else 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1234.5}
    odd = {"rms_norm_eps": 1e-3, "rope_parameters": rope, "pad_token_id": None, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(arch, **sizes | odd | {"eos_token_id": None} | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def logits(model, rows=2, length=30):
    tokens = torch.randint(len(gguf_twin.WORDS), (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tokens, model(tokens).logits


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCKS])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_file_in_every_type_gives_the_logits_of_transformers_with_the_same_numbers(tmp_path, arch, kind):
    theirs = tiny(arch, BLOCKS.get(kind, 1), tie_word_embeddings=kind in ("Q8_0", "F16"))
    gguf_twin.write(tmp_path / "tiny.gguf", theirs, kind)
    tokens, expected = logits(theirs)
    ours = load(tmp_path / "tiny.gguf", dtype="fp32")
    torch.testing.assert_close(ours.logits(tokens), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_sixteen_bits_stay_sixteen_bits_on_disk(tmp_path, kind):
    gguf_twin.write(tmp_path / "tiny.gguf", tiny("qwen3"), kind)
    folder = sources.locate(tmp_path / "tiny.gguf")
    assert (
        json.loads((folder / "config.json").read_text())["torch_dtype"] == {"F16": "float16", "BF16": "bfloat16"}[kind]
    )
    assert (folder / "model.safetensors").stat().st_size < (tmp_path / "tiny.gguf").stat().st_size * 1.2


def test_a_converted_file_is_a_folder_that_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    for arch in ("llama", "qwen2", "qwen3"):
        theirs = tiny(arch)
        gguf_twin.write(tmp_path / f"{arch}.gguf", theirs, "F32")
        again = transformers.AutoModelForCausalLM.from_pretrained(sources.locate(tmp_path / f"{arch}.gguf"))
        assert torch.equal(logits(again)[1], logits(theirs)[1])


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scalings_of_rope_are_read_by_name(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 1234.5, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    theirs = tiny("qwen3", rope_parameters=rope)
    facts = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    gguf_twin.write(tmp_path / "tiny.gguf", theirs, "F32", facts)
    tokens, expected = logits(theirs, length=60)
    torch.testing.assert_close(
        load(tmp_path / "tiny.gguf", dtype="fp32").logits(tokens), expected, atol=2e-5, rtol=1e-4
    )


def with_factors(model, factors: torch.Tensor):
    """The model with llama.cpp's form of Llama 3's scaling: a tensor of what each frequency is divided by."""
    model.register_parameter("rope_freqs", torch.nn.Parameter(factors, requires_grad=False))
    return model


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_recognised_by_its_factors(tmp_path, factor):
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = tiny("llama", rope_parameters=rope, head_dim=32, max_position_embeddings=131_072)
    plain, _ = frequencies(RopeSpec(theta=500_000.0), 32)
    factors = plain / theirs.model.rotary_emb.inv_freq
    assert len(factors.unique()) >= 3  # untouched, divided, and between
    gguf_twin.write(tmp_path / "tiny.gguf", with_factors(theirs, factors), "F32")
    tokens, expected = logits(theirs)
    torch.testing.assert_close(
        load(tmp_path / "tiny.gguf", dtype="fp32").logits(tokens), expected, atol=2e-5, rtol=1e-4
    )


def test_other_factors_are_refused_not_guessed(tmp_path):
    theirs = tiny("llama", head_dim=32)
    gguf_twin.write(tmp_path / "tiny.gguf", with_factors(theirs, torch.linspace(1, 8, 16)), "F32")
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 8.0},
            "yarn_beta_fast",
        ),
        ({"expert_count": 8}, r"qwen3\.expert_count is 8; Rung computes 0 only"),
        ({"rope.dimension_count": 4}, r"rope\.dimension_count is 4; Rung computes 10 only"),
    ],
)
def test_what_rung_does_not_compute_is_refused_by_name(tmp_path, facts, message):
    gguf_twin.write(tmp_path / "tiny.gguf", tiny("qwen3"), "F32", facts)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "tiny.gguf")


def test_every_way_to_end_an_answer_ends_it(tmp_path):
    gguf_twin.write(tmp_path / "tiny.gguf", tiny("llama"), "F32", vocabulary={"eot_token_id": 0, "bos_token_id": 0})
    model = load(tmp_path / "tiny.gguf")
    assert set(model.tokenizer.eos_ids) == {0, 1}
    assert model.tokenizer.names == {"bos_token": "<|endoftext|>", "eos_token": "<|end|>"}
