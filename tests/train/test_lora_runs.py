"""Runs whose weights rest and whose adapter learns: what they learn, hold, save and resume, and what is refused."""

import re
import shutil
import subprocess
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_tokenizer import BYTES
from safetensors.torch import load_file
from train.kills import check_continuation, command, environment, kill_in
from train.tiny import stop_after, tiny_folder, tiny_recipe, weights_of

import rung
from rung.cli.main import main
from rung.core.config import dumps_json, from_dict, to_dict
from rung.core.errors import ConfigError, ModelError, RungError
from rung.core.progress import silent
from rung.core.rundir import create, open_run
from rung.lm.adapters.lora import BaseDecoder
from rung.lm.adapters.spec import LoRA
from rung.train import estimate as estimates
from rung.train import session as sessions
from rung.train.config import METHODS, GroupRL, Method, Optim
from rung.train.grpo import train_step

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "lora.md"
LORA = LoRA(rank=4, alpha=8.0)
KL = Method(advantage="mean", kl="k3_loss", kl_coef=0.5)


@pytest.fixture(scope="module")
def loud(folder, tmp_path_factory):
    """The tiny model with a longer row for the letter a: the head rests, and must be able to be sure of it."""
    place = tmp_path_factory.mktemp("loud")
    model = rung.load(folder, dtype="fp32")
    with torch.no_grad():
        model.decoder.embedding.weight[BYTES.encode("a")] *= 3
    model.save(place / "model")
    shutil.copy(folder.parent / "letters.py", place)
    return place / "model"


def adapter_of(run_folder) -> bytes:
    return (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def opened(loud, tmp_path):
    """A session of a recipe, in a folder of its own."""

    @contextmanager
    def open_one(**changes):
        recipe = tiny_recipe(loud, **{"lora": LORA, "optim": Optim(lr=3e-2)} | changes)
        run = create(tmp_path / "session", recipe, {})
        with sessions.PhaseLog(run) as phase, sessions.open_session(recipe, run, 1, phase, silent) as session:
            yield session

    return open_one


def test_a_tiny_model_learns_the_rewarded_letter_with_an_adapter_alone(loud, tmp_path):
    """The optimum is reward 1, at the start the letter is rare; what learnt is in three places, which agree: the run's
    last answers, its merged model, and its adapter on the base in PEFT."""
    recipe = tiny_recipe(
        loud, num_steps=12, samples_per_prompt=16, eval_every=0, max_tokens=2, optim=Optim(lr=3e-2), lora=LORA
    )
    run = rung.train(recipe, folder=tmp_path / "run")
    metrics = [r for r in open_run(run.folder).read("metrics") if r["kind"] == "train"]
    assert metrics[0]["reward"] < 0.1
    assert metrics[-1]["reward"] > 0.95
    assert {r["text"] for r in open_run(run.folder).read("evals") if r["step"] == 12} == {"aa"}
    assert max(m["gap_max"] for m in metrics if "gap_max" in m) < 1e-4

    merged, base = (load_file(place / "model.safetensors") for place in (run.folder / "model", loud))
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert moved == {name for name in base if name.endswith("_proj.weight")}
    for model in (run.folder / "model", run.folder / "adapter"):
        made = rung.generate(rung.load(model, dtype="fp32"), ["say a 3"], max_tokens=2, temperature=0.0)
        assert made[0].text == "aa"


def test_the_adapter_of_a_run_gives_the_merged_models_logits_in_peft(loud, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    lora = replace(LORA, rslora=True, targets="q_proj,v_proj,up_proj,o_proj")
    run = rung.train(tiny_recipe(loud, num_steps=3, optim=Optim(lr=3e-2), lora=lora), folder=tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(loud)
    tokens = torch.randint(258, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = base(tokens).logits
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls what transformers has renamed
            model = peft.PeftModel.from_pretrained(base, run.folder / "adapter")
        after = model(tokens).logits
    merged = rung.load(run.folder / "model", dtype="fp32").logits(tokens)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(merged, after, atol=1e-4, rtol=1e-5)


KINDS = {
    "bf16": {"dtype": "bf16"},
    "a reference in the loss": {"method": KL},
    "two updates a rollout, some layers": {
        "method": METHODS["grpo"],
        "updates_per_rollout": 2,
        "lora": replace(LORA, targets="v_proj,down_proj", rslora=True),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_with_an_adapter_goes_on_bit_for_bit(loud, tmp_path, kind):
    values = {"num_steps": 4, "eval_every": 0, "optim": Optim(lr=3e-2), "lora": LORA, "samples_per_prompt": 8}
    recipe = tiny_recipe(loud, **values | KINDS[kind])
    rung.train(recipe, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(3))
    rung.resume(tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    held = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "masters.safetensors")
    assert all(name.endswith((".lora_A", ".lora_B")) and t.dtype == torch.float32 for name, t in held.items())
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    down = saved["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    assert torch.equal(down, held["blocks.1.channel.down.lora_B"]), "saved from what learns, not from its rounded copy"


def test_a_run_with_an_adapter_killed_while_it_learns_goes_on_bit_for_bit(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    recipe = tiny_recipe(folder, num_steps=8, max_tokens=24, lora=LORA)
    (tmp_path / "recipe.json").write_text(dumps_json(recipe))
    words = command("train", tmp_path / "recipe.json", "--folder", tmp_path / "whole")
    subprocess.run(words, check=True, capture_output=True, env=environment())
    kill_in("backward", 0.0, tmp_path / "recipe.json", tmp_path / "run")
    check_continuation(tmp_path / "run", tmp_path / "whole", "adapter/adapter_model.safetensors")


def test_a_run_that_dies_between_adapter_and_model_writes_both_when_it_is_resumed(loud, tmp_path, monkeypatch):
    def dies(*rest, **options):
        raise MemoryError("killed")

    recipe = tiny_recipe(loud, num_steps=2, eval_every=0, lora=LORA)
    with monkeypatch.context() as patch:
        patch.setattr(rung.Model, "save", dies)
        with pytest.raises(MemoryError):
            rung.train(recipe, folder=tmp_path / "run")
    before = adapter_of(tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"half of i")
    rung.resume(tmp_path / "run")
    assert adapter_of(tmp_path / "run") == before
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_without_an_adapter_a_run_is_what_it_was(whole, folder):
    """The default recipe's bytes: `lora` is a field of the config, and nothing else."""
    written = to_dict(tiny_recipe(folder))
    assert written["lora"] == {"rank": 0, "alpha": 32.0, "rslora": False, "targets": "all-linear"}
    del written["lora"]
    assert from_dict(GroupRL, written) == tiny_recipe(folder), "a configuration from before adapters"
    assert not (whole.folder / "adapter").exists()


def test_only_the_adapter_has_gradients_masters_and_moments_and_the_base_is_there_once(opened):
    with opened(method=KL, dtype="bf16", num_steps=2) as session:
        weights = dict(session.model.decoder.named_parameters())
        before = {name: weight.clone() for name, weight in weights.items()}
        train_step(session.trainer, 1)
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
        assert not any(weight.requires_grad or weight.grad is not None for weight in weights.values())
        assert isinstance(session.trainer.reference, BaseDecoder)
        assert list(map(id, session.trainer.reference.parameters())) == list(map(id, weights.values()))
        state = session.learner.state()
        assert set(state) == {"masters", "adam_m", "adam_v"}
        assert all(set(tensors) == set(session.adapter.parameters) for tensors in state.values())
        assert sum(t.numel() for t in state["masters"].values()) == estimates.num_learnt(session.model, LORA)
        assert any(bool(t.any()) for name, t in state["masters"].items() if name.endswith("lora_B")), (
            "nothing was learnt"
        )


def test_the_reference_of_a_run_is_its_first_policy_at_every_step(opened):
    """So the divergence from it is zero before the first update, and is not after it."""
    with opened(method=KL, samples_per_prompt=8) as session:
        metrics = [train_step(session.trainer, step).metrics for step in (1, 2, 3)]
    seen = [m["kl_k3"] for m in metrics if "kl_k3" in m]
    assert abs(metrics[0]["kl_k3"]) < 1e-9
    assert min(seen[1:]) > 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [0.01, 32.0, 1000.0])
def test_the_self_test_sees_the_adapter_and_leaves_it_as_it_was(opened, dtype, alpha):
    """However little, or much, an adapter adds."""
    with opened(dtype=dtype, lora=replace(LORA, alpha=alpha)) as session:
        before = {name: p.detach().clone() for name, p in session.adapter.parameters.items()}
        sessions.self_test(session, silent)
        assert all(torch.equal(p, before[name]) for name, p in session.adapter.parameters.items())


def test_the_self_test_notices_a_sampler_without_the_adapter(opened):
    with opened() as session:
        session.adapter.on = False
        with pytest.raises(RungError, match="self-test failed"):
            sessions.self_test(session, silent)


def test_weights_hash_follows_the_adapter_and_the_base_is_in_the_runs_fingerprint(opened, loud, tmp_path):
    with opened() as session:
        first = session.trainer.weights().hash
        with torch.no_grad():
            session.adapter.parameters["blocks.1.channel.down.lora_B"][3, 1] += 0.1
        assert session.trainer.weights().hash != first
    place = tmp_path / "mine"
    shutil.copytree(loud, place)
    shutil.copy(loud.parent / "letters.py", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        rung.train(tiny_recipe(place, lora=LORA), folder=tmp_path / "run", listener=stop_after(2))
    held = bytearray((place / "model.safetensors").read_bytes())
    held[-2] ^= 1
    (place / "model.safetensors").write_bytes(held)
    with pytest.raises(RungError, match="fingerprint"):
        rung.resume(tmp_path / "run")


def test_the_estimate_holds_the_weights_once_and_the_rest_for_the_adapter_alone(loud):
    full, lora = tiny_recipe(loud, method=KL, dtype="bf16"), tiny_recipe(loud, method=KL, dtype="bf16", lora=LORA)
    model = rung.load(loud)
    parts, before = (estimates.memory(recipe, model, 9) for recipe in (lora, full))
    weights = sum(p.numel() for p in model.decoder.parameters())
    # 4 ranks of q, k, v (24 -> 24, 8, 8), o (24 -> 24), gate, up (24 -> 40), down (40 -> 24), in two blocks
    learnt = 2 * 4 * (3 * 24 + 40 + 24 + 24 + 2 * 24 + 80 + 40 + 24)
    assert estimates.num_learnt(model, LORA) == learnt
    adapter = "adapter in fp32", "adapter, compute copy", "gradients", "AdamW moments"
    assert [parts[name] / learnt for name in adapter] == [4, 2, 4, 8]
    assert parts["weights, at rest"] == 2 * weights
    assert parts["reference"] == 0 < before["reference"]
    rows = lora.tokens_per_micro_batch
    assert parts["activations"] - before["activations"] == rows * 2 * (2 * 7 * 4), "A x of seven parts in two blocks"
    assert before["learner's logits"] - parts["learner's logits"] == 258 * 24 * (2 + 4), "the head's gradient"
    assert "libraries" in parts
    assert rung.estimate(lora).bytes < rung.estimate(full).bytes
    seconds = [estimates.duration(recipe, model, 1e9, 9.0) for recipe in (lora, full)]
    assert 0.7 < seconds[0] / seconds[1] < 1


def test_blocks_that_only_the_sampler_keeps_count_where_they_are_more_than_the_learner_holds(loud, monkeypatch):
    recipe = tiny_recipe(loud, dtype="bf16", lora=LORA, tokens_per_micro_batch=1)
    model = rung.load(loud)
    parts = {}
    for kept in (True, False):
        monkeypatch.setattr(estimates, "keeps_blocks", lambda device, dtype, kept=kept: kept)
        monkeypatch.setattr(estimates, "CHUNK_ROWS", 1)
        parts[kept] = estimates.memory(recipe, model, 9)
    extra = parts[True].pop("sampler beyond learner")
    assert parts[True] == parts[False]
    held = parts[True]["learner's logits"] + parts[True]["activations"]
    assert held + extra == parts[True]["weights, at rest"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoRA(alpha=16.0)}, r"lora has settings and lora\.rank is 0"),
        ({"lora": LoRA(rank=4, targets="qproj")}, r"'qproj'.*Did you mean 'q_proj'\?"),
    ],
)
def test_an_adapter_that_cannot_be_meant_is_refused_before_anything_is_made(loud, tmp_path, changes, message):
    for start in (lambda recipe: rung.train(recipe, folder=tmp_path / "run"), rung.estimate):
        with pytest.raises(ConfigError, match=message):
            start(tiny_recipe(loud, **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_start_from_an_adapter_whose_reference_would_be_another_model(loud, tmp_path):
    run = rung.train(tiny_recipe(loud, num_steps=1, lora=LORA), folder=tmp_path / "run")
    with pytest.raises(ModelError, match=r"is an adapter: .*rung\.load\(adapter, dtype=\"fp32\"\)\.save\(folder\)"):
        rung.train(replace(tiny_recipe(loud), model=str(run.folder / "adapter")), folder=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_command_line_trains_an_adapter_and_uses_what_it_wrote(loud, tmp_path, monkeypatch, capsys):
    """The built-in recipe on the tiny model, then every verb that takes a model, on both of the folders."""
    monkeypatch.chdir(tmp_path)
    small = (
        "--num-steps 2 --prompts-per-step 2 --eval-problems 3 --eval-every 0 --max-tokens 3 --dtype fp32 --threads 1"
    )
    words = f"train arithmetic --model {loud} --name sums --lora.rank 2 --lora.targets q_proj,up_proj --optim.lr 1e-3"
    assert main([*words.split(), *small.split(), "--dry-run"]) == 0
    assert "adapter in fp32" in capsys.readouterr().out
    assert main([*words.split(), *small.split()]) == 0, capsys.readouterr().err
    assert "finished: 2 steps" in capsys.readouterr().out
    texts = set()
    for place in ("model", "adapter"):
        assert main(["generate", f"runs/sums/{place}", "2 + 3", "--max-tokens", "4", "--dtype", "fp32"]) == 0
        texts.add(capsys.readouterr().out)
        assert main(["eval", f"runs/sums/{place}", "arithmetic", "--problems", "3", "--max-tokens", "3"]) == 0
        assert capsys.readouterr().out.startswith("accuracy ")
    assert len(texts) == 1
    assert main([*words.replace("--lora.rank 2", "--lora.rank -2").split(), *small.split()]) == 2
    assert "lora.rank must be at least 1" in capsys.readouterr().err


def test_the_code_of_the_guide_page_runs(loud, tmp_path, monkeypatch, capsys):
    """On the tiny model, and two steps: its recipe asks for the packaged one, and for many."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    whole = rung.recipes.arithmetic
    quick = {"model": str(loud), "num_steps": 2, "prompts_per_step": 2, "eval_problems": 2, "eval_every": 0}
    monkeypatch.setattr(rung.recipes, "arithmetic", lambda **options: replace(whole(**options), dtype="fp32", **quick))
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(names["merged"].logits(tokens), names["same"].logits(tokens))
    assert capsys.readouterr().out == f"{2 * 4 * (24 + 24 + 24 + 8)} parameters learn\n"
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"adapted", "merged", "untrained"}
