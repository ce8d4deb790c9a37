"""Every family is the one of `transformers`: logits and gradients, folders byte by byte, and what is refused."""

import copy

import pytest
import torch
from family_twins import KINDS, VOCABULARY, folder_of, in_fp64, their_config, their_model

from rung.core.errors import ModelError
from rung.core.records import Layout
from rung.lm.config import RopeSpec
from rung.lm.decoder import Decoder
from rung.lm.weights.families import FAMILIES, LEFT_OUT, from_hugging_face, to_hugging_face
from rung.lm.weights.hf import load_folder, save_folder, their_tensors
from rung.lm.weights.names import hugging_face_names, rules

transformers = pytest.importorskip("transformers")

SEQUENCE = 23  # some windows long


def tokens(rows: int = 2, length: int = SEQUENCE) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits_and_gradients(theirs, ours, table, tolerance):
    tokens_BT = tokens()
    generator = torch.Generator().manual_seed(2)
    expected_BTV = theirs(tokens_BT).logits
    weight_BTV = torch.randn(expected_BTV.shape, generator=generator, dtype=expected_BTV.dtype)
    (expected_BTV.log_softmax(-1) * weight_BTV).sum().backward()
    hidden_TD = ours(tokens_BT.flatten(), Layout.chains([SEQUENCE] * 2))
    logits_BTV = ours.head(hidden_TD).view_as(expected_BTV)
    (logits_BTV.log_softmax(-1) * weight_BTV).sum().backward()

    assert distance(logits_BTV, expected_BTV) < tolerance
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == {rule.ours for rule in table}
    for rule in table:
        gradient = torch.cat([theirs.get_parameter(part.name).grad for part in rule.parts])
        assert distance(parameters[rule.ours].grad, gradient) < tolerance, rule.ours


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative, of all elements together; NaN where theirs is zero."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_all_gradients_equal_transformers(tmp_path, kind):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        theirs = their_model(kind, dtype)
        ours, folder = load_folder(folder_of(theirs, tmp_path / str(dtype)))
        table = rules(ours.config, hugging_face_names(folder.config))
        if dtype == torch.float64:
            with in_fp64(theirs):
                assert_same_logits_and_gradients(theirs, ours, table, tolerance)
        else:
            assert_same_logits_and_gradients(theirs, ours, table, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_saved_back_byte_for_byte_and_transformers_reads_it(tmp_path, kind):
    theirs = their_model(kind)
    path = folder_of(theirs, tmp_path / "theirs")
    ours, folder = load_folder(path)
    save_folder(tmp_path / "ours", folder, their_tensors(ours.config, folder.config, dict(ours.named_parameters())))
    names = sorted(file.name for file in path.iterdir())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (path / name).read_bytes(), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "olmo2"])
def test_shards_of_a_family_with_names_of_its_own_are_kept_file_by_file(tmp_path, kind):
    path = folder_of(their_model(kind), tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    ours, folder = load_folder(path)
    save_folder(tmp_path / "ours", folder, their_tensors(ours.config, folder.config, dict(ours.named_parameters())))
    for file in path.iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "phi3", "olmo2", "qwen3"])
def test_weights_that_changed_are_what_transformers_reads(tmp_path, kind):
    ours, folder = load_folder(folder_of(their_model(kind), tmp_path / "theirs"))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.9)
    save_folder(tmp_path / "ours", folder, their_tensors(ours.config, folder.config, dict(ours.named_parameters())))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        logits_TV = ours.head(ours(tokens().flatten(), Layout.chains([SEQUENCE] * 2)))
        assert distance(logits_TV, theirs(tokens()).logits.flatten(0, 1)) < 1e-5


SIZES = {"vocab_size": 41, "hidden_size": 48, "intermediate_size": 37, "num_hidden_layers": 8, "num_attention_heads": 4}
OLD_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [4.0, 5.0, 6.0]}
OLD_FORMS = {  # as transformers 4 wrote them
    "mistral": [{"rope_theta": 1e6, "num_key_value_heads": 2}, {"sliding_window": None, "num_key_value_heads": 4}],
    "qwen2": [
        {"use_sliding_window": False, "sliding_window": 7, "num_key_value_heads": 4},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 5, "num_key_value_heads": 4},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, "rope_theta": 1e6}
        | {"num_key_value_heads": 4},
    ],
    "qwen3": [{"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "rope_theta": 1e6}],
    "gemma2": [{}, {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 5e4}],
    "gemma3_text": [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"sliding_window_pattern": 3, "sliding_window": 9},
    ],
    "phi3": [
        {"sliding_window": 2047},
        {"rope_scaling": OLD_LONGROPE, "partial_rotary_factor": 0.5, "max_position_embeddings": 131_072}
        | {"original_max_position_embeddings": 2048},
    ],
    "olmo2": [{"rope_theta": 5e5}, {"attention_bias": True, "num_key_value_heads": 2}],
    "smollm3": [
        {"rope_theta": 5e6},
        {"no_rope_layer_interval": 3},
        {"use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0] * 4},
        {"use_sliding_window": False, "sliding_window": 9, "attention_bias": True, "mlp_bias": True},
    ],
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in OLD_FORMS.items() for case in cases])
def test_what_a_config_leaves_out_is_what_transformers_takes_it_for(kind, case):
    said = SIZES | case
    completed = transformers.AutoConfig.for_model(kind, **copy.deepcopy(said)).to_dict()
    assert len(completed) > len(said) + 10
    ours = from_hugging_face({"model_type": kind} | said, where="here")
    assert ours == from_hugging_face(completed, where="there")
    if kind == "gemma3_text" and "rope_local_base_freq" in case:
        assert ours.blocks[5].mixer.rope == RopeSpec(
            theta=5e5, scaling="linear", factor=8.0, original_positions=131_072
        )
        assert ours.blocks[4].mixer.rope == RopeSpec(theta=2e4)


def test_longrope_by_its_first_name_is_longrope():
    said = {"model_type": "phi3"} | SIZES | {"original_max_position_embeddings": 2048, "partial_rotary_factor": 0.5}
    new, old = (
        from_hugging_face(said | {"rope_scaling": OLD_LONGROPE | {"type": name}}, where="here")
        for name in ("longrope", "su")
    )
    assert new == old
    assert new.blocks[0].mixer.rope.scaling == "longrope"
    assert new.max_positions == 2048


def test_every_default_is_the_one_of_transformers():
    assert LEFT_OUT.keys() == FAMILIES.keys() - {"gemma3"}
    for kind, fields in LEFT_OUT.items():
        theirs = transformers.AutoConfig.for_model(kind)
        known = {name: getattr(type(theirs), name) for name in fields if name in type(theirs).__dict__}
        assert {name: fields[name] for name in known} == known
        assert set(fields) - set(known) <= {"rope_theta", "rope_local_base_freq", "sliding_window_pattern"}


PUBLISHED = {  # sizes of published models, and the number of parameters that their pages name
    "Mistral-7B-v0.1": (7_241_732_096, "mistral 32000 4096 14336 32 32 8"),
    "Qwen2.5-0.5B": (494_032_768, "qwen2 151936 896 4864 24 14 2 tied"),
    "Qwen3-0.6B": (596_049_920, "qwen3 151936 1024 3072 28 16 8 tied"),
    "gemma-2-2b": (2_614_341_888, "gemma2 256000 2304 9216 26 8 4 tied"),
    "gemma-3-1b": (999_885_952, "gemma3_text 262144 1152 6912 26 4 1 tied"),
    "Phi-3-mini": (3_821_079_552, "phi3 32064 3072 8192 32 32 32"),
    "OLMo-2-1124-7B": (7_298_617_344, "olmo2 100352 4096 11008 32 32 32"),
    "SmolLM3-3B": (3_075_098_624, "smollm3 128256 2048 11008 36 16 4 tied"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    count, words = PUBLISHED[name]
    kind, vocabulary, width, ffn, layers, heads, kv_heads, *tied = words.split()
    raw = {"model_type": kind, "vocab_size": int(vocabulary), "hidden_size": int(width), "intermediate_size": int(ffn)}
    raw |= {"num_hidden_layers": int(layers), "num_attention_heads": int(heads), "num_key_value_heads": int(kv_heads)}
    decoder = Decoder(from_hugging_face(raw | {"tie_word_embeddings": bool(tied)}, where=name), device="meta")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


NESTED = {"full_attention": {"rope_type": "default"}}
REFUSED = {
    "qwen2: a window that is switched off": (
        {"layer_types": ["sliding_attention"] * 8, "use_sliding_window": False, "sliding_window": 4},
        "layers with 'sliding_attention', and sliding_window is None or switched off",
    ),
    "qwen2: a kind of layer": ({"layer_types": ["chunked_attention"] * 8}, r"\['chunked_attention'\]; Rung computes"),
    "qwen3: too few layer types": ({"layer_types": ["full_attention"] * 7}, "names 7 layers of 8"),
    "qwen3: activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "mistral: layer types": ({"layer_types": ["full_attention"] * 8}, "layer_types is"),
    "mistral: no window at all": ({"sliding_window": 0}, "sliding_window is 0"),
    "gemma2: activation": ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; Rung computes 'gelu_pytorch"),
    "gemma2: both directions": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "gemma3_text: a cap that transformers ignores": (
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0",
    ),
    "gemma3_text: one RoPE in the new form": (
        {"rope_parameters": {"rope_theta": 1.0}},
        "are those of 'full_attention'",
    ),
    "llama: two RoPEs": ({"rope_parameters": NESTED}, r"by kind of layer \(full_attention\)"),
    "phi3: an odd part of a head": (
        {"partial_rotary_factor": 0.25},
        "rotary_dim must be even, from 0 to head_dim=12; got 3",
    ),
    "phi3: factors of another size": (
        {"rope_scaling": OLD_LONGROPE},
        "longrope needs 6 factors, one per frequency, twice; got 3 and 3",
    ),
    "qwen3: a partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "smollm3: too few layers": ({"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers of 8"),
    "olmo2: no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be a number from 1 to 1024; got 0"),
    "gemma2: more layers than can be": ({"num_hidden_layers": 10**12}, "from 1 to 1024; got 1000000000000"),
    "llama: layers in words": ({"num_hidden_layers": "8"}, "from 1 to 1024; got '8'"),
    "olmo2: RoPE that is no table": ({"rope_parameters": "yarn"}, "rope_parameters must be an object; got 'yarn'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_not_guessed(case):
    changes, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        from_hugging_face(
            {"model_type": case.split(":")[0]} | SIZES | {"num_key_value_heads": 4} | changes, where="here"
        )


def test_a_gemma_3_that_sees_is_refused_with_a_way_to_its_text_model_that_works(tmp_path):
    text = SIZES | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5}
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sees |= {"image_size": 14, "patch_size": 7}
    special = {"image_token_index": 40, "boi_token_index": 38, "eoi_token_index": 39, "mm_tokens_per_image": 1}
    config = transformers.Gemma3Config(text_config=text, vision_config=sees, **special)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(ModelError, match="image encoder, which Rung does not compute") as refusal:
        load_folder(folder_of(whole, tmp_path / "whole"))
    way = str(refusal.value).split("With transformers: ")[1]
    way = way.replace("(FOLDER)", f"({str(tmp_path / 'whole')!r})").replace("(NEW)", f"({str(tmp_path / 'text')!r})")
    names = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    exec(way.removesuffix("."), {name: getattr(transformers, name) for name in names})
    ours, _ = load_folder(tmp_path / "text")
    with torch.no_grad():
        logits_TV = ours.head(ours(tokens(1)[0] % 38, Layout.chain(SEQUENCE)))
        assert distance(logits_TV, whole(tokens(1) % 38).logits[0]) < 1e-5


@pytest.mark.parametrize("kind", ["mistral, windows", "qwen2", "qwen3", "gemma2", "olmo2", "smollm3"])
def test_a_decoder_that_is_no_llama_is_not_written_as_one(kind):
    with pytest.raises(ModelError, match="Only a Llama can be written as a new folder"):
        to_hugging_face(from_hugging_face(their_config(kind).to_dict(), where="here"))
