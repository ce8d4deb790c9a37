"""Hugging Face folders: in, out, and everything that can be wrong with one."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rung.core.errors import ModelError
from rung.lm import presets
from rung.lm.config import RopeSpec
from rung.lm.weights import hf
from rung.lm.weights.families import from_hugging_face, to_hugging_face
from rung.lm.weights.hf import load_folder, new_folder, save_folder, their_tensors
from rung.model import load, new_model

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {  # awkward on purpose: no width is a power of two, heads are not width / head_dim
    "tied": {"tie_word_embeddings": True},
    "untied, all biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "wide heads": {"head_dim": 14},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 3.0}},
    "longrope": {  # as Phi writes it: the trained length stands outside
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 300.0,
            "factor": 2.0,
            "short_factor": [1.0, 1.5, 2.0, 3.0, 5.0],
            "long_factor": [9.0] * 5,
        },
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def their_model(*, dtype=torch.float32, seed=0, **changes):
    """A tiny random Llama of transformers, biases and norms random too."""
    config = {
        "vocab_size": 51,
        "hidden_size": 30,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 128,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.to(dtype).eval()


def folder_of(model, path: Path, **options) -> Path:
    model.save_pretrained(path, **options)
    return path


def tokens(rows=2, length=40, vocab=51):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def edit_tensors(folder: Path, change) -> None:
    """Rewrite the one safetensors file of a folder with `change(tensors)` applied."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    return folder_of(their_model(), tmp_path / "theirs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_folder_gives_the_logits_of_transformers_and_saves_back_the_same_bytes(tmp_path, kind):
    theirs = their_model(**KINDS[kind])
    path = folder_of(theirs, tmp_path / "theirs")
    model = load(path, dtype="fp32")
    with torch.no_grad():
        expected = theirs(tokens()).logits
    torch.testing.assert_close(model.logits(tokens()), expected, atol=1e-5, rtol=1e-5)

    again = model.save(tmp_path / "ours")
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in path.iterdir())
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(again)
    with torch.no_grad():
        assert torch.equal(reloaded(tokens()).logits, expected)


def test_shards_are_kept_file_by_file(tmp_path):
    path = folder_of(their_model(), tmp_path / "theirs", max_shard_size="20KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 3
    again = load(path, dtype="fp32").save(tmp_path / "ours")
    for shard in shards:
        assert (again / shard.name).read_bytes() == shard.read_bytes()
    index = "model.safetensors.index.json"
    assert json.loads((again / index).read_text()) == json.loads((path / index).read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_stay_half_precision_through_fp32_weights(tmp_path, dtype):
    path = folder_of(their_model(dtype=dtype), tmp_path / "theirs")
    model = load(path, dtype="fp32")
    assert model.decoder.embedding.weight.dtype == torch.float32
    again = model.save(tmp_path / "ours")
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_weights_held_in_fewer_bits_than_their_file_lose_none_when_saved(tmp_path, folder):
    model = load(folder, dtype="bf16")
    again = model.save(tmp_path / "ours")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.decoder.norm.weight[3] = 0.5
    changed = load_file(model.save(tmp_path / "changed") / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert changed["model.norm.weight"][3] == 0.5
    assert torch.equal(
        changed["model.norm.weight"], before["model.norm.weight"].bfloat16().float().index_fill(0, torch.tensor(3), 0.5)
    )
    assert all(torch.equal(changed[name], before[name]) for name in before if name != "model.norm.weight")


def test_saving_writes_the_weights_it_is_given_in_place_of_the_decoders_own(tmp_path, folder):
    model = load(folder, dtype="bf16")
    masters = {name: torch.full_like(p, 0.123, dtype=torch.float32) for name, p in model.decoder.named_parameters()}
    held = load_file(model.save(tmp_path / "ours", masters) / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert held.keys() == before.keys()
    for name, value in held.items():
        assert torch.equal(value, torch.full_like(before[name], 0.123)), name


def test_unknown_fields_of_the_config_are_kept(tmp_path, folder):
    edit_config(folder, a_field_of_tomorrow={"deep": [1, None]}, rms_norm_eps=1e-4)
    again = load(folder, dtype="fp32").save(tmp_path / "ours")
    assert json.loads((again / "config.json").read_text())["a_field_of_tomorrow"] == {"deep": [1, None]}


def test_small_files_travel_with_the_weights_byte_for_byte(tmp_path, folder):
    held = {
        "generation_config.json": b'{"eos_token_id": [3, 5]}',
        "chat_template.jinja": b"{{ 1 }}\r\n",
        "LICENSE": b"\xff",
    }
    for name, content in held.items():
        (folder / name).write_bytes(content)
    model = load(folder, dtype="fp32")
    shutil.rmtree(folder)  # they are held, not looked up again
    again = model.save(tmp_path / "ours")
    assert {name: (again / name).read_bytes() for name in held} == held


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rope_is_read_in_the_form_of_transformers_4_and_of_5(tmp_path, field):
    raw = their_model(rope_parameters=LLAMA3).config.to_dict()
    assert raw.pop("rope_parameters")["factor"] == 4.0
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"} | {"rope_type": None, "type": "llama3"}
    raw |= {"rope_parameters": LLAMA3} if field == "rope_parameters" else {"rope_scaling": old, "rope_theta": 500.0}
    spec = from_hugging_face(raw, where="here").blocks[0].mixer.rope
    assert spec == RopeSpec(
        theta=500.0, scaling="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=32
    )


def test_what_an_old_config_leaves_out_is_what_transformers_takes_it_for():
    said = {"model_type": "llama", "vocab_size": 51, "hidden_size": 30, "intermediate_size": 37}
    said |= {"num_hidden_layers": 3, "num_attention_heads": 5}
    theirs = transformers.LlamaConfig(**said)
    config = from_hugging_face(said, where="here")
    mixer = config.blocks[0].mixer
    assert (mixer.kv_heads, mixer.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (5, 6)
    assert (config.norm_eps, config.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings) == (1e-6, False)
    assert (mixer.rope, config.max_positions) == (RopeSpec(theta=10_000.0), theirs.max_position_embeddings)


@pytest.mark.parametrize("inside", [True, False])
def test_longrope_ends_where_its_other_factors_would_begin(inside):
    raw = their_model(**KINDS["longrope"]).config.to_dict()
    outside = raw.pop("original_max_position_embeddings")
    assert raw["rope_parameters"].pop("original_max_position_embeddings") == outside == 64
    (raw["rope_parameters"] if inside else raw)["original_max_position_embeddings"] = 64
    config = from_hugging_face(raw, where="here")
    assert config.max_positions == config.blocks[0].mixer.rope.original_positions == 64


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(theta=777.0),
        RopeSpec(theta=500.0, scaling="llama3", factor=4.0, low_freq_factor=2.0, original_positions=16),
        RopeSpec(theta=500.0, scaling="yarn", factor=4.0, beta_fast=16.0, truncate=False, original_positions=16),
        RopeSpec(theta=500.0, scaling="linear", factor=2.0, original_positions=64),
    ],
)
def test_a_decoder_made_here_becomes_a_folder_that_transformers_loads(tmp_path, rope):
    config = presets.llama(
        vocab_size=51, width=30, layers=2, heads=6, kv_heads=3, head_dim=10, ffn_width=37,
        rope=rope, tied=False, attention_bias=True, mlp_bias=True, norm_eps=3e-4, max_positions=64,
    )  # fmt: skip
    assert from_hugging_face(to_hugging_face(config), where="here") == config
    from rung.lm.decoder import Decoder

    model = new_model(Decoder(config).init_(torch.Generator().manual_seed(3)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.save(tmp_path / "new"))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_head_that_was_written_all_the_same_is_read_checked_and_written_back(tmp_path):
    path = folder_of(their_model(tie_word_embeddings=True), tmp_path / "theirs")
    edit_tensors(path, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    model = load(path, dtype="fp32")
    again = load_file(model.save(tmp_path / "ours") / "model.safetensors")
    assert torch.equal(again["lm_head.weight"], again["model.embed_tokens.weight"])
    edit_tensors(path, lambda held: held["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"ties the head.*tie_word_embeddings"):
        load(path)


def test_a_save_that_fails_half_way_leaves_no_folder(tmp_path, folder):
    decoder, held = load_folder(folder)
    theirs = their_tensors(decoder.config, held.config, dict(decoder.named_parameters()))
    del theirs["model.norm.weight"]
    with pytest.raises(KeyError):
        save_folder(tmp_path / "ours", held, theirs)
    assert not (tmp_path / "ours").exists()


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing_behind(tmp_path, folder, monkeypatch):
    def full(*rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hf, "write_shard", full)
    with pytest.raises(ModelError, match=r"/ours could not be written \(No space left on device\): make room"):
        load(folder, dtype="fp32").save(tmp_path / "ours")
    assert not list(tmp_path.glob("ours*"))


def test_a_saved_folder_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(tmp_path, folder, monkeypatch):
    """Whoever finds the folder after a power cut takes it for whole."""
    order, fsync, rename = [], os.fsync, Path.rename
    synced = lambda number: order.append(Path(os.readlink(f"/proc/self/fd/{number}"))) or fsync(number)  # noqa: E731
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda old, new: order.append("rename") or rename(old, new))
    path = load(folder, dtype="fp32").save(tmp_path / "ours")
    aside = tmp_path / "ours.tmp"
    assert set(order[: order.index("rename")]) == {aside, *(aside / file.name for file in path.iterdir())}
    assert order[order.index("rename") :] == ["rename", tmp_path]


def test_a_model_is_never_written_over_another(folder):
    model = load(folder, dtype="fp32")
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        model.save(folder)


def test_a_new_folder_is_written_in_the_dtype_of_its_decoder():
    config = presets.llama(vocab_size=7, width=4, layers=1, heads=2, kv_heads=1, ffn_width=5)
    folder = new_folder(config, torch.bfloat16)
    assert {entry.dtype for shard in folder.shards for entry in shard.entries} == {"BF16"}
    assert folder.config["torch_dtype"] == "bfloat16"


def rename(held, old, new):
    held[new] = held.pop(old)


Q1 = "model.layers.1.self_attn.q_proj.weight"
BROKEN_TENSORS = {
    "missing": (lambda held: held.pop(Q1), rf"needed tensor '{Q1}' of shape \[60, 30\].*no unused tensor"),
    "misnamed": (lambda h: rename(h, Q1, Q1.replace("proj", "pro")), r"which no file has; the nearest.*q_pro.weight'"),
    "unused": (
        lambda held: held.update({Q1.replace("weight", "bias"): torch.zeros(60)}),
        rf"tensor 'model.layers.1.self_attn.q_proj.bias' has no place.*nearest known name is '{Q1}'",
    ),
    "wrong shape": (lambda h: h.update({Q1: torch.zeros(30, 60)}), r"needed shape \[60, 30\].*found \[30, 60\]"),
    "wrong dtype": (lambda h: h.update({Q1: torch.zeros(60, 30, dtype=torch.int8)}), r"of dtype I8; Rung reads"),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_a_folder_whose_tensors_do_not_fit_is_refused_by_the_tensors_name(folder, case):
    change, message = BROKEN_TENSORS[case]
    edit_tensors(folder, change)
    with pytest.raises(ModelError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_weight_file_is_refused_by_the_files_name(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load(folder)


def test_a_folder_without_weights_says_what_it_holds(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no weights: needed model\.safetensors .*found .*pytorch_model\.bin"):
        load(folder)


def test_a_folder_without_a_config_says_so(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    path = folder_of(their_model(), tmp_path / "theirs", max_shard_size="20KB")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"names \['{gone.name}'\], which the folder lacks"):
        load(path)


BROKEN_CONFIGS = {
    "another family": ({"model_type": "lama"}, r"no model family 'lama'\. Did you mean 'llama'\?"),
    "no family": ({"model_type": None}, "the field 'model_type', a name, and has None there"),
    "quantised": ({"quantization_config": {"bits": 4}}, "weights are quantised.*Take the folder"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Rung computes 'silu' only.*--foreign"),
    "rope": ({"rope_parameters": {"rope_type": "yarm"}}, r"unknown RoPE scaling 'yarm'\. Did you mean 'yarn'"),
    "partial rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "heads": ({"num_key_value_heads": 4}, "heads must be a multiple of kv_heads"),
    "a string for a number": ({"hidden_size": "big"}, "config.json"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_config_that_cannot_be_computed_is_refused_not_guessed(folder, case):
    changes, message = BROKEN_CONFIGS[case]
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_config_that_lacks_a_field_names_it(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"config\.json lacks the field 'num_hidden_layers'"):
        load(folder)


def test_a_config_that_is_not_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load(folder)
