"""A run of a model that goes through `transformers`: equal to our own family's, resumable, by every method."""

import math
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from foreign_models import foreign_folder
from train.tiny import made_samples, stop_after, tiny_recipe, weights_of
from transformers import AutoModelForCausalLM

import rung
from rung.core.errors import ConfigError, RunError, TaskError
from rung.core.rundir import create, open_run
from rung.core.words import Message
from rung.lm.adapters.lora import Adapter
from rung.lm.adapters.spec import LoRA
from rung.model import load
from rung.model.generate import stream
from rung.objectives.reduce import total_loss
from rung.report import page
from rung.train import grpo
from rung.train.config import METHODS, Method, Optim
from rung.train.data import count, pack
from rung.train.methods import build_objective
from rung.train.policy import LanguagePolicy, frozen_copy
from rung.train.run import _place


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return foreign_folder(tmp_path_factory.mktemp("gpt2") / "model", "gpt2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return foreign_folder(tmp_path_factory.mktemp("llama") / "model", "llama")


def likely(sample):
    """With old and reference log-probabilities about those of a model of 258 words that knows nothing."""
    lower = {name: sample.streams[name] - math.log(258) for name in ("logp_old", "logp_ref")}
    return replace(sample, streams=sample.streams | lower)


def loss_and_gradients(model, method, *, share_prompts, tokens_per_batch=10**6, learnt=True):
    """Gradients by the names that tensors have in the folder, so that q, k and v are apart."""
    policy, objective = LanguagePolicy(model.decoder, temperature=0.7), build_objective(method)
    samples, total = [likely(sample) for sample in made_samples(dtype=torch.float32)], 0.0
    for batch in pack(samples, counts=count(samples), tokens_per_batch=tokens_per_batch, share_prompts=share_prompts):
        loss, _ = total_loss(objective(policy, batch))
        loss.backward()
        total += loss.item()
    return total, model.export({name: p.grad for name, p in model.decoder.named_parameters()}) if learnt else {}


def assert_equal(found, wanted, tolerance=1e-5):
    """Relative to the largest number of each gradient, and to the loss where that is above 1."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
    for name, gradient in wanted[1].items():
        largest = gradient.abs().max()
        assert largest > 1e-4, name
        assert (found[1][name] - gradient).abs().max() < tolerance * largest, name


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_llama_loaded_both_ways_gives_equal_loss_and_gradients(llama, name, share_prompts):
    native, foreign = (load(llama, dtype="fp32", foreign=way) for way in (False, True))
    assert type(native.decoder) is not type(foreign.decoder)
    wanted = loss_and_gradients(native, METHODS[name], share_prompts=share_prompts)
    assert_equal(loss_and_gradients(foreign, METHODS[name], share_prompts=share_prompts), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "nanochat", "mixtral", "mamba"])
def test_neither_sharing_prompts_nor_the_micro_batch_changes_a_foreign_gradient(tmp_path, kind):
    path, method = foreign_folder(tmp_path / "model", kind), Method(kl="k3_loss", kl_coef=0.3, entropy_coef=0.1)
    models = [load(path, dtype="fp32", foreign=True) for _ in range(3)]
    whole = loss_and_gradients(models[0], method, share_prompts=False)
    shared = loss_and_gradients(models[1], method, share_prompts=True)
    cut = loss_and_gradients(models[2], method, share_prompts=False, tokens_per_batch=14)
    for other in (shared, cut):
        assert_equal(other, whole)


def test_a_llama_draws_the_same_tokens_both_ways(llama):
    native, foreign = (load(llama, dtype="fp32", foreign=way) for way in (False, True))
    prompts = ["a", "a longer one", "another"]
    drawn = [rung.generate(model, prompts, max_tokens=20, seed=3) for model in (native, foreign)]
    assert [g.token_ids for g in drawn[0]] == [g.token_ids for g in drawn[1]]
    assert len({g.token_ids for g in drawn[0]}) == 3
    talk = [Message("user", "hello")]
    assert "".join(stream(foreign, talk, max_tokens=9)) == "".join(stream(native, talk, max_tokens=9))


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_a_run_of_a_family_that_is_not_ours_is_stopped_and_goes_on_bit_for_bit(tmp_path, kind):
    """With a reference in the loss; one model that has a cache, and one that is computed again at every token."""
    folder = foreign_folder(tmp_path / "model", kind)
    recipe = tiny_recipe(folder, method=METHODS["grpo"], optim=Optim(lr=1e-2), num_steps=4, eval_every=2)
    whole = rung.train(recipe, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(3))
    run = rung.resume(tmp_path / "run")
    assert weights_of(run.folder) == weights_of(whole.folder)
    assert weights_of(run.folder) != (folder / "model.safetensors").read_bytes()
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    metrics = [m for m in open_run(run.folder).read("metrics") if m["kind"] == "train"]
    assert max(m["gap_max"] for m in metrics) < 1e-4
    assert "Not recorded in this run" not in page.write(run.folder).read_text()
    again = load(run.folder / "model", dtype="fp32")
    assert rung.evaluate(again, recipe.task, problems=3, max_tokens=4).n == 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_a_foreign_model_towards_the_reward(gpt2, tmp_path, name):
    changes = {"num_steps": 8, "samples_per_prompt": 8, "eval_every": 0, "optim": Optim(lr=3e-2), "max_tokens": 3}
    run = rung.train(tiny_recipe(gpt2, method=METHODS[name], **changes), folder=tmp_path / "run")
    rewards = [r["reward"] for r in open_run(run.folder).read("metrics") if r["kind"] == "train"]
    assert rewards[-1] > rewards[0] + 0.1, rewards


def test_an_adapter_gets_equal_gradients_on_both_llamas(llama):
    spec, method = LoRA(rank=3), METHODS["grpo"]
    found = []
    for way in (False, True):
        model = load(llama, dtype="fp32", foreign=way)
        adapter = Adapter(model.decoder, model.sites, spec, seed=1)
        for name, parameter in adapter.parameters.items():
            if name.endswith("lora_B"):
                parameter.data.fill_(0.1)  # at zero, A has no gradient
        loss, _ = loss_and_gradients(model, method, share_prompts=not way, learnt=False)
        factors = adapter.factors({name: p.grad for name, p in adapter.parameters.items()})
        found.append((loss, {f"{name} {i}": g for name, pair in factors.pairs.items() for i, g in enumerate(pair)}))
    assert len(found[0][1]) == 2 * 7 * 2
    assert_equal(*found)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for it
def test_an_adapter_on_a_foreign_model_learns_resumes_and_is_read_by_peft(tmp_path):
    folder = foreign_folder(tmp_path / "model", "gpt_neox")
    recipe = tiny_recipe(folder, method=METHODS["grpo"], lora=LoRA(rank=3), optim=Optim(lr=3e-2), num_steps=3)
    whole = rung.train(recipe, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(2))
    run = rung.resume(tmp_path / "run")
    assert weights_of(run.folder) == weights_of(whole.folder)
    merged, adapted = (load(run.folder / name, dtype="fp32") for name in ("model", "adapter"))
    tokens_BT = torch.arange(12).reshape(2, 6)
    before = load(folder, dtype="fp32").logits(tokens_BT)
    assert (merged.logits(tokens_BT) - before).abs().max() > 0.01
    torch.testing.assert_close(adapted.logits(tokens_BT), merged.logits(tokens_BT), atol=1e-5, rtol=1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = peft.PeftModel.from_pretrained(theirs, run.folder / "adapter").eval()(tokens_BT).logits
    torch.testing.assert_close(merged.logits(tokens_BT), logits_BTV, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_no_layer_can_take_is_refused_before_the_run(gpt2, tmp_path):
    """GPT-2's layers are transposed matrices of transformers' own."""
    with pytest.raises(ConfigError, match="no linear layer that LoRA could stand beside"):
        rung.train(tiny_recipe(gpt2, lora=LoRA(rank=3)), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_activation_checkpointing_of_a_foreign_model_is_refused_before_the_run(llama, tmp_path):
    """Of the same model as one of ours it is not."""
    recipe = tiny_recipe(llama, foreign=True, activation_checkpointing=True, num_steps=1)
    for asked in (lambda: rung.train(recipe, folder=tmp_path / "run"), lambda: rung.estimate(recipe)):
        with pytest.raises(ConfigError, match="activation_checkpointing needs a family of Rung's own"):
            asked()
    assert not (tmp_path / "run").exists()
    assert rung.estimate(replace(recipe, foreign=False)).bytes > 0


def test_a_run_in_bf16_keeps_masters_and_follows_them(gpt2, tmp_path):
    recipe = tiny_recipe(gpt2, dtype="bf16", num_steps=2, eval_every=0, optim=Optim(lr=3e-2))
    run = rung.train(recipe, folder=tmp_path / "run")
    assert load(run.folder / "model").decoder.model.config.model_type == "gpt2"
    metrics = [m for m in open_run(run.folder).read("metrics") if m["kind"] == "train"]
    assert max(m["gap_max"] for m in metrics) < 0.5


def test_a_recipe_can_ask_for_transformers_although_the_family_is_ours(llama, tmp_path):
    heard = []
    recipe = tiny_recipe(llama, foreign=True, num_steps=1, eval_every=0)
    run = rung.train(recipe, folder=tmp_path / "run", listener=heard.append)
    assert sum("runs through transformers" in news.text for news in heard) == 1
    assert open_run(run.folder).config(type(recipe)).foreign
    assert rung.estimate(recipe).bytes > 0


def test_prompts_are_shared_in_the_learner_only_where_that_saves_work(llama, tmp_path, monkeypatch):
    """So that tokens_per_micro_batch are the tokens that are really computed."""
    asked, pack_one = [], grpo.pack_one
    monkeypatch.setattr(grpo, "pack_one", lambda *a, **k: asked.append(k["share_prompts"]) or pack_one(*a, **k))
    for way in (True, False):
        recipe = tiny_recipe(llama, foreign=way, num_steps=1, eval_every=0)
        rung.train(recipe, folder=tmp_path / str(way))
    assert asked == [False, True]


def test_a_problem_too_long_for_a_foreign_model_is_refused_before_the_run(gpt2, tmp_path):
    with pytest.raises(TaskError, match="must fit the model's 256 positions"):
        rung.train(tiny_recipe(gpt2, max_tokens=250), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reference_keeps_its_weights_while_the_model_learns(gpt2):
    decoder = load(gpt2, dtype="fp32").decoder
    reference = frozen_copy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(1.0)
    pairs = zip(decoder.parameters(), reference.parameters(), strict=True)
    assert all(not torch.equal(a, b) and not b.requires_grad for a, b in pairs)


def test_a_run_through_another_transformers_is_not_resumed_in_silence(llama, tmp_path):
    """A run of a family of ours does not name it, and is resumed whatever is installed."""
    recipe = tiny_recipe(llama, foreign=True)
    place = _place(recipe)
    assert place["transformers"] == transformers.__version__
    assert "transformers" not in _place(replace(recipe, foreign=False))
    run = create(tmp_path / "run", recipe, place | {"transformers": "4.0.0"})
    with pytest.raises(RunError, match=r"transformers was '4\.0\.0', is '5.*--allow-changed"):
        rung.resume(run.folder)
