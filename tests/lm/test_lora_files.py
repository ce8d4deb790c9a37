"""PEFT's folders: what we write loads there, what it writes loads here, and what is another method is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm.lora_twins import PROMPTS, adapted, config, filled, peft_of, their_folder, without_future_warnings
from safetensors.torch import load_file, save_file

from rung.core.errors import ModelError
from rung.lm.adapters.lora import Factors
from rung.lm.adapters.peft import CONFIG, WEIGHTS, is_adapter, load_adapter, save_adapter
from rung.lm.adapters.spec import LoRA
from rung.lm.decoder import Decoder
from rung.model.model import load

SPECS = {
    "plain": LoRA(rank=3, alpha=5.0),
    "rslora": LoRA(rank=3, alpha=5.0, rslora=True),
    "some layers": LoRA(rank=2, alpha=7.0, targets="q_proj,v_proj,down_proj"),
}


def factors_of(spec: LoRA) -> Factors:
    return adapted(filled(Decoder(config())), spec).factors()


def their_adapter(folder: Path, **settings) -> Path:
    """An adapter that PEFT made and saved, with random B's, and the logits of its model."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with without_future_warnings():
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    model.eval()
    model.save_pretrained(folder.parent / "theirs")
    with torch.no_grad():
        torch.save(model(PROMPTS).logits, folder.parent / "logits.pt")
    return folder.parent / "theirs"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with `base`, and `adapter` beside it."""
    path = tmp_path_factory.mktemp("saved")
    folder = their_folder(path)
    save_adapter(path / "adapter", factors_of(SPECS["plain"]), base=str(folder))
    return path


@pytest.fixture
def here(saved, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(adapter: Path, **changes) -> None:
    raw = json.loads((adapter / CONFIG).read_text()) | changes
    (adapter / CONFIG).write_text(json.dumps({name: value for name, value in raw.items() if value != "dropped"}))


@pytest.mark.parametrize("kind", SPECS)
def test_what_is_saved_here_gives_the_same_logits_in_peft_and_merged_here(tmp_path, kind):
    folder = their_folder(tmp_path)
    theirs = peft_of(folder, factors_of(SPECS[kind]))
    with torch.no_grad():
        expected = theirs(PROMPTS).logits
        base = load(folder, dtype="fp32").logits(PROMPTS)
    merged = load(tmp_path / "adapter", dtype="fp32")
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(merged.logits(PROMPTS), expected, atol=2e-5, rtol=1e-4)
    again = load(merged.save(tmp_path / "merged"), dtype="fp32")
    assert torch.equal(again.logits(PROMPTS), merged.logits(PROMPTS))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"},
        {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
        {"r": 2, "target_modules": "all-linear", "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
)
def test_what_peft_saved_gives_its_logits_here(tmp_path, settings):
    adapter = their_adapter(their_folder(tmp_path), **settings)
    expected = torch.load(tmp_path / "logits.pt")
    for given in ({}, {"base": tmp_path / "base"}):
        if given:
            edit_config(adapter, base_model_name_or_path="somewhere/else")
        model = load(adapter, dtype="fp32", **given)
        torch.testing.assert_close(model.logits(PROMPTS), expected, atol=2e-5, rtol=1e-4)


def test_an_adapter_comes_back_as_it_was_saved(tmp_path):
    for number, spec in enumerate(SPECS.values()):
        factors = factors_of(spec)
        save_adapter(tmp_path / str(number), factors, base="smollm2-135m")
        again, base = load_adapter(tmp_path / str(number))
        assert base == "smollm2-135m"
        assert replace(again.spec, targets=spec.targets) == spec
        assert again.pairs.keys() == factors.pairs.keys()
        for name, pair in factors.pairs.items():
            assert all(map(torch.equal, again.pairs[name], pair)), name
        assert is_adapter(tmp_path / str(number))
    with pytest.raises(ModelError, match="never written over another"):
        save_adapter(tmp_path / "0", factors, base="")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_merged_in_fp32_and_written_in_its_own_dtype(tmp_path, dtype):
    """Held in bf16 or not, the merged weight is the file's, plus the product, rounded once."""
    folder = their_folder(tmp_path, dtype)
    factors = factors_of(SPECS["plain"])
    model = load(folder, dtype="bf16")
    merged = load_file(model.save(tmp_path / "merged", change=factors.merged) / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert merged.keys() == before.keys()
    for name, weight in before.items():
        if name.removesuffix(".weight") not in factors.pairs:
            assert torch.equal(merged[name], weight), name
            continue
        a_RD, b_ER = factors.pairs[name.removesuffix(".weight")]
        expected = (weight.double() + 5 / 3 * b_ER.double() @ a_RD.double()).to(dtype)
        assert (merged[name] != expected).float().mean() < 2e-3, "fp32 and fp64 round apart only next to a tie"
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=2.0**-7)


BROKEN_CONFIGS = {
    "another method": ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; Rung reads LORA"),
    "dora": ({"use_dora": True}, r"use_dora is True; Rung computes plain LoRA, use_dora False.*merge_and_unload"),
    "biases": ({"bias": "all"}, r"bias is 'all'"),
    "alphas": ({"alpha_pattern": {"q_proj": 3}}, r"alpha_pattern is \{'q_proj': 3\}"),
    "a changed base": ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "transposed": ({"fan_in_fan_out": True}, r"fan_in_fan_out is True"),
    "activated": ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]"),
    "no rank": ({"r": "dropped"}, r"adapter_config\.json lacks the field 'r'"),
    "a rank of words": ({"r": "many"}, r"adapter_config\.json: invalid literal"),
    "a negative rank": ({"r": -2}, r"adapter_config\.json: lora\.rank must be at least 1"),
    "another rank": ({"r": 4}, r"lora_[AB]\.weight' of shape .* needed a matrix of rank 4"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_config_that_means_another_model_is_refused_by_its_field(here, case):
    changes, message = BROKEN_CONFIGS[case]
    edit_config(here, **changes)
    with pytest.raises(ModelError, match=message):
        load(here)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
BROKEN_TENSORS = {
    "half a pair": (lambda held: held.pop(Q + "A.weight"), rf"'{Q}A\.weight' is one of no pair"),
    "a magnitude": (lambda held: held.update({Q + "magnitude_vector": torch.ones(60)}), r"magnitude_vector.* no pair"),
    "no prefix": (lambda held: held.update({"x.lora_A.weight": held.pop(Q + "A.weight")}), r"is one of no pair"),
    "a vector": (lambda held: held.update({Q + "A.weight": torch.ones(3)}), r"shape \[3\].*needed a matrix of rank 3"),
    "whole numbers": (
        lambda held: held.update({Q + "A.weight": torch.ones(3, 30, dtype=torch.int8)}),
        r"dtype I8; needed a matrix",
    ),
    "another width": (
        lambda held: held.update({Q + "A.weight": torch.ones(3, 31)}),
        r"adapts 'model\.layers\.1\.self_attn\.q_proj' of shape \[60, 31\], and its base has \[60, 30\]",
    ),
    "another layer": (
        lambda held: [held.update({Q.replace("1", "7") + e: held.pop(Q + e)}) for e in ("A.weight", "B.weight")],
        r"adapts 'model\.layers\.7\.self_attn\.q_proj'.*Did you mean 'model\.layers\.\d\.self_attn\.q_proj\.weight'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(here, case):
    change, message = BROKEN_TENSORS[case]
    held = load_file(here / WEIGHTS)
    change(held)
    save_file(held, here / WEIGHTS)
    with pytest.raises(ModelError, match=message):
        load(here)


def test_an_adapter_without_its_base_or_its_weights_says_what_is_missing(here):
    edit_config(here, base_model_name_or_path=str(here / "gone"))
    with pytest.raises(ModelError, match=r"is an adapter of '.*gone', which cannot be had.*base=\.\.\."):
        load(here)
    edit_config(here, base_model_name_or_path=None)
    with pytest.raises(ModelError, match=r"does not say of which model.*base=\.\.\."):
        load(here)
    (here / WEIGHTS).write_bytes((here / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ModelError, match="truncated"):
        load(here)
    (here / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load(here)


def test_a_base_of_the_hub_is_named_with_its_commit_as_peft_names_it(here):
    import peft

    commit = "0123456789abcdef0123456789abcdef01234567"
    save_adapter(here.parent / "new", factors_of(SPECS["plain"]), base=f"org/name@{commit}")
    theirs = peft.LoraConfig.from_pretrained(here.parent / "new")
    assert (theirs.base_model_name_or_path, theirs.revision) == ("org/name", commit)
    assert load_adapter(here.parent / "new")[1] == f"org/name@{commit}"
    edit_config(here, base_model_name_or_path="org/name", revision="v2")
    assert load_adapter(here)[1] == "org/name@v2"
    edit_config(here, base_model_name_or_path=str(here), revision="v2")
    assert load_adapter(here)[1] == str(here)


def test_an_adapter_of_a_head_that_is_the_embedding_is_not_left_out_in_silence(tmp_path):
    base = their_folder(tmp_path)
    held = load_file(base / "model.safetensors")
    embedding = held["model.embed_tokens.weight"]
    save_file({**held, "lm_head.weight": embedding.clone()}, base / "model.safetensors", {"format": "pt"})
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    load(base)
    pair = torch.ones(2, embedding.shape[1]), torch.ones(embedding.shape[0], 2)
    save_adapter(tmp_path / "head", Factors(LoRA(rank=2), {"lm_head": pair}), base=str(base))
    with pytest.raises(ModelError, match=r"config\.json ties the head to the embedding"):
        load(tmp_path / "head")
