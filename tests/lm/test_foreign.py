"""A model of `transformers` as a decoder: its numbers on every layout and state; what is no such model is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import BYTES
from foreign_models import CACHED, KINDS, edit_config, foreign_folder, foreign_model
from forests import Alone, assert_the_law, fillers, group, tokens, tree
from safetensors.torch import load_file, save_file
from test_state import History

import rung
from rung.core.errors import ModelError, RequestError
from rung.core.records import Layout
from rung.lm.foreign import load_foreign
from rung.lm.wrapper import TOKENS, Unfolded
from rung.model import load
from rung.model.model import outline


def their_hidden(model, sequence):
    """The last hidden states of one sequence, by their model alone [T, D]."""
    return model.base_model(torch.tensor([sequence]), use_cache=False).last_hidden_state[0]


class TheirsAlone(Alone):
    """As the decoder scales and ends its states, computed by their model on one sequence at a time."""

    def __init__(self, model, decoder):
        self.model, self.ours, self.known = model, decoder, {}

    def __call__(self, sequence):
        key = tuple(sequence)
        if key not in self.known:
            hidden_TD = their_hidden(self.model, sequence).detach() * self.ours.scale
            if self.model.get_output_embeddings().bias is not None:
                hidden_TD = torch.cat((hidden_TD, torch.ones(len(sequence), 1)), 1)
            self.known |= {key[: end + 1]: hidden_TD[end].double() for end in range(len(key))}
        return self.known[key]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """kind -> their model, ours, and what was said while it was loaded; each made once."""
    made = {}

    def of(kind):
        if kind not in made:
            model, said = foreign_model(kind), []
            path = foreign_folder(tmp_path_factory.mktemp(kind) / "model", model=model)
            ours = load(path, dtype="fp32", foreign=True, listener=said.append)
            made[kind] = model, ours, [news.text for news in said if news.stage == "notice"]
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(loaded, kind):
    theirs, ours, _ = loaded(kind)
    tokens_BT = torch.randint(258, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
    assert expected.std() > (0.01 if kind in ("cohere", "granite") else 0.3)
    torch.testing.assert_close(ours.logits(tokens_BT), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_the_matrix_that_the_learner_multiplies_by(loaded, kind):
    _, ours, _ = loaded(kind)
    hidden_ND = ours.decoder(torch.arange(5), Layout.chain(5))
    logits_NV, cap = hidden_ND @ ours.decoder.head_weight().T, ours.decoder.logit_softcap
    assert (cap != 0) == (kind == "nanochat")
    torch.testing.assert_close(ours.decoder.head(hidden_ND), cap * (logits_NV / cap).tanh() if cap else logits_NV)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_token_of_a_forest_has_the_state_of_its_own_sequence(loaded, kind):
    """Trees, a shared prompt, chains and fillers in one layout; lengths differ by more than one padded batch allows."""
    theirs, ours, _ = loaded(kind)
    rng = np.random.default_rng(5)
    parts = [tree(rng, 9, slot=0), fillers(2), group(6, [1, 4, 30], slot=1), Layout.chain(3, slot=2), fillers(1)]
    layout = Layout.concat(parts)
    token_T = tokens(rng, len(layout))
    hidden_TD = ours.decoder(torch.tensor(token_T), layout)
    assert_the_law(hidden_TD, TheirsAlone(theirs, ours.decoder), layout, token_T, tolerance=2e-4)
    assert not hidden_TD[layout.slot_T < 0].any()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_no_history_of_a_state_shows(loaded, kind):
    """Chunks, steps, trees, forks, frees and shared prompts, every dead row spoiled."""
    theirs, ours, _ = loaded(kind)
    assert (ours.decoder.rows != TOKENS) == (kind in CACHED)
    history = History(7, torch.float32, ours.decoder, TheirsAlone(theirs, ours.decoder))
    for _ in range(20):
        history.happen()


def test_a_state_that_is_too_small_is_refused_with_its_numbers(loaded):
    _, ours, _ = loaded("gpt2")
    state = ours.decoder.new_state(slots=2, capacity=5)
    with pytest.raises(RequestError, match="2 slots of 5 rows; needed: 3 slots"):
        ours.decoder(torch.zeros(2, dtype=torch.int64), Layout.chain(2, slot=2), state)


def test_positions_that_do_not_count_from_the_beginning_are_our_own_error(loaded):
    _, ours, _ = loaded("gpt2")
    with pytest.raises(AssertionError, match="positions count"):
        ours.decoder(torch.zeros(3, dtype=torch.int64), Layout.chain(3, start=2))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_said_once_that_generation_is_slower_and_where_a_cache_is_wanting(loaded, kind):
    _, _, said = loaded(kind)
    assert len(said) == 1
    assert "runs through transformers: slower than Rung's families" in said[0]
    assert ("every new token costs its whole sequence again" in said[0]) == (kind not in CACHED)


def test_a_layout_is_unfolded_into_its_leaves_and_each_token_is_read_once():
    """0 -> 1 -> 2 and 1 -> 3, and 4 alone: three rows; what both rows hold is read in the first."""
    layout = Layout(torch.tensor([-1, 0, 1, 1, -1]), torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 2, 0]))
    unfolded = Unfolded.of(layout)
    assert unfolded.paths == [[0, 1, 2], [0, 1, 3], [4]]
    assert unfolded.slots == [0, 0, 1]
    assert list(zip(unfolded.row_T.tolist(), unfolded.column_T.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 2), (2, 0),
    ]  # fmt: skip


def test_a_greedy_generation_is_transformers_own(loaded):
    theirs, ours, _ = loaded("gpt_neox")
    (made,) = rung.generate(ours, ["Once"], max_tokens=12, temperature=0.0, chat=False)
    asked = torch.tensor([BYTES.encode("Once")])
    wanted = theirs.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=257,
        pad_token_id=0,
    )
    assert made.token_ids == tuple(wanted[0, asked.shape[1] :].tolist())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mamba"])  # theirs cannot multiply bf16 on a CPU
def test_what_was_not_changed_is_saved_byte_for_byte(tmp_path, kind, dtype):
    path = foreign_folder(tmp_path / "model", kind)
    edit_config(path, of_no_meaning=[1, 2])
    again = load(path, dtype=dtype, foreign=True).save(tmp_path / "again")
    for file in path.iterdir():
        if file.name == "config.json":
            assert json.loads((again / file.name).read_text()) == json.loads(file.read_text())
        else:
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "mixtral", "falcon"])
def test_masters_are_what_is_saved_and_transformers_reads_them(tmp_path, kind):
    model = load(foreign_folder(tmp_path / "model", kind), dtype="bf16", foreign=True)
    masters = {name: p.detach().float() * 1.01 for name, p in model.decoder.named_parameters()}
    again = model.save(tmp_path / "again", weights=masters)
    theirs = type(model.decoder.model).from_pretrained(again, dtype=torch.float32).eval()
    ours = load(again, dtype="fp32", foreign=True)
    held = dict(ours.decoder.named_parameters())
    assert all(torch.equal(held[name], master) for name, master in masters.items())
    tokens_BT = torch.arange(6)[None]
    torch.testing.assert_close(ours.logits(tokens_BT), theirs(tokens_BT).logits, atol=1e-5, rtol=1e-5)


def test_tables_and_names_that_transformers_drops_are_kept(tmp_path):
    """As old GPT-2 files are: names without the body's prefix, a mask beside the weights, a tied head written too."""
    path = foreign_folder(tmp_path / "model")
    held = {name.removeprefix("transformer."): value for name, value in load_file(path / "model.safetensors").items()}
    held["h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    held["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    held["lm_head.weight"] = held["wte.weight"].clone()
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    model = load(path, dtype="fp32")
    again = load_file(model.save(tmp_path / "again") / "model.safetensors")
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], value) for name, value in held.items())
    moved = {name: p + 1 for name, p in model.decoder.named_parameters()}
    written = load_file(model.save(tmp_path / "moved", weights=moved) / "model.safetensors")
    for name in ("wte.weight", "lm_head.weight", "h.1.mlp.c_fc.weight"):
        assert torch.equal(written[name], held[name] + 1), name


def test_the_shapes_alone_answer_as_the_model_does(tmp_path):
    path = foreign_folder(tmp_path / "model", "gpt_neox")
    model = load(path, dtype="fp32")
    (path / "model.safetensors").unlink()
    shapes = outline(path)
    assert shapes.decoder.footprint() == model.decoder.footprint()
    assert shapes.decoder.max_positions == 256
    assert shapes.tokenizer.eos_ids == (257,)


@pytest.mark.parametrize(
    ("kind", "changes", "longest"),
    [
        ("mamba", {}, 1 << 30),
        ("gpt2", {}, 256),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                    "short_factor": [1.0] * 3,
                    "long_factor": [2.0] * 3,
                },
                "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
)
def test_the_longest_sequence_is_the_configs_and_the_trained_one_where_frequencies_follow_the_length(
    tmp_path, kind, changes, longest
):
    assert outline(foreign_folder(tmp_path / "model", kind, **changes), foreign=True).decoder.max_positions == longest


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "cohere", "nanochat", "mixtral", "starcoder2"])
def test_the_estimate_of_activations_is_a_little_more_than_autograd_keeps(loaded, kind):
    decoder = loaded(kind)[1].decoder
    weights = {parameter.data_ptr() for parameter in decoder.parameters()}

    def kept(tokens):
        sizes = {}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert len(decoder(torch.zeros(tokens).long(), Layout.chain(tokens))) == tokens
        return sum(size for size, _ in sizes.values())

    assert 0.6 < (kept(80) - kept(40)) / 40 / (4 * decoder.footprint().activations) < 1


def test_code_that_a_folder_brings_is_never_run(tmp_path):
    """transformers has the family: its own code is taken, and nothing that config.json points to."""
    path = foreign_folder(tmp_path / "model")
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...")
    edit_config(
        path,
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        transformers_weights="../evil.bin",
        fusion_config={"x": 1},
        _attn_implementation="evil/kernels",
    )
    assert load(path, dtype="fp32").logits(torch.tensor([[1, 2]])).isfinite().all()
    edit_config(path, model_type="evil")
    with pytest.raises(ModelError, match=r"no model family 'evil'\..*code of its own \(auto_map\), which is never run"):
        load(path)
    assert not (tmp_path / "ran").exists()


BROKEN = {
    "quantised": ("gpt2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantised"),
    "encoder and decoder": ("gpt2", {"model_type": "t5"}, "'t5' is no causal language model"),
    "an encoder": ("gpt2", {"model_type": "distilbert"}, "'distilbert' is no causal language model"),
    "a masked model": (
        "gpt2",
        {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
        "config.json says that this is a RobertaForMaskedLM; needed a RobertaForCausalLM",
    ),
    "misspelt": ("gpt2", {"model_type": "gpt-2"}, "no model family 'gpt-2'. Did you mean 'gpt2'?"),
    "other shapes": ("gpt2", {"n_embd": 27}, "mismatched_keys: "),
    "far larger than its files": ("gpt2", {"n_embd": 9000}, "weights, and the files hold"),
    "nonsense": ("gpt2", {"n_layer": "two"}, "cannot make this model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_no_plain_causal_model_is_refused_by_name(tmp_path, case):
    kind, changes, message = BROKEN[case]
    path = foreign_folder(tmp_path / "model", kind)
    edit_config(path, **changes)
    with pytest.raises(ModelError) as error:
        load(path, dtype="fp32")
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("lost", "added"), [("transformer.ln_f.weight", None), (None, "transformer.extra.weight")])
def test_a_tensor_that_is_missing_or_has_no_place_is_named(tmp_path, lost, added):
    path = foreign_folder(tmp_path / "model")
    held = load_file(path / "model.safetensors")
    held |= {added: torch.ones(2, 2)} if added else {}
    save_file({name: value for name, value in held.items() if name != lost}, path / "model.safetensors")
    with pytest.raises(ModelError, match=f"(missing|unexpected)_keys: {lost or added}"):
        load(path, dtype="fp32")


def test_weights_that_are_no_safetensors_are_not_opened(tmp_path):
    path = foreign_folder(tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(path, dtype="fp32")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {}, "its logits are not a matrix times the last hidden state"),
        ("rwkv", {"max_position_embeddings": 64}, "it changes its own weights when it is run"),
    ],
)
def test_a_model_that_does_not_behave_is_refused_with_the_reason(tmp_path, kind, changes, message):
    path = foreign_folder(tmp_path / "model", kind, **changes)
    with pytest.raises(ModelError, match=message):
        load(path, dtype="fp32")


def test_a_model_whose_tokens_look_ahead_is_refused(tmp_path, monkeypatch):
    path = foreign_folder(tmp_path / "model")
    from transformers import GPT2Model

    forward = GPT2Model.forward

    def looking_ahead(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out["last_hidden_state"] = out.last_hidden_state + 0.1 * out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(GPT2Model, "forward", looking_ahead)
    with pytest.raises(ModelError, match="depends on what stands behind or beside it"):
        load(path, dtype="fp32")


def test_without_the_extra_an_unknown_family_names_both_ways_out(tmp_path, monkeypatch):
    path = foreign_folder(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"no model family 'gpt2'\.") as error:
        load(path)
    assert "pip install 'rung[transformers]'" in str(error.value)
    assert "a model of a family that Rung has" in str(error.value)
    with pytest.raises(ModelError, match=r"loaded as foreign\. Two ways out"):
        load(foreign_folder_of_ours(tmp_path), foreign=True)


def foreign_folder_of_ours(tmp_path):
    from train.tiny import tiny_folder

    return tiny_folder(tmp_path / "ours")


def test_the_code_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "guide" / "models.md").read_text()
    (code,) = re.findall(
        r"```python\n(.*?)```", page.partition("## Any other model\n")[2].partition("\n## ")[0], re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "gpt2 runs through transformers: slower than Rung's families"
    assert said[1] == "torch.Size([1, 3, 258])"
    assert (tmp_path / "runs" / "again" / "model.safetensors").is_file()


def test_transformers_says_nothing_of_its_own(tmp_path, capfd):
    load_foreign(foreign_folder(tmp_path / "model"), dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
