"""The real thing: `make gpu` on a machine with a CUDA device.  Everywhere else these are skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.tiny import made_samples, stop_after, tiny_decoder, tiny_folder, tiny_recipe, weights_of

import rung
from rung.core.device import open_device
from rung.core.rundir import open_run
from rung.lm.adapters.spec import LoRA
from rung.objectives.reduce import total_loss
from rung.train.config import METHODS, Method, Optim
from rung.train.data import count, pack_one
from rung.train.methods import build_objective
from rung.train.policy import LanguagePolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]
EPS = 2.0**-24  # half a unit in the last place of fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_log_probabilities_and_gradients_are_the_cpus_but_for_the_order_of_sums(again):
    """A sum of n products added up in another order is off by at most 2 n EPS of the sum of their sizes [Higham 2002,
    (3.5)], and some sqrt(n) EPS of the result as a rule.  The longest sums have 258 terms (the vocabulary); a path from
    the ids to a gradient has 30 operations at most, none of which enlarges a relative error much: 30 x 16 EPS = 3e-5 of
    the largest entry, and ten times that is allowed.  A wrong index or mask moves entries by their own size."""
    samples = made_samples(dtype=torch.float32)
    batch, found = pack_one(samples, counts=count(samples)), []
    for device in (torch.device("cpu"), open_device("cuda")):
        decoder = tiny_decoder().to(device)
        decoder.activation_checkpointing = again
        policy = LanguagePolicy(decoder)
        loss, _ = total_loss(build_objective(Method(advantage="mean", entropy_coef=0.1))(policy, batch))
        loss.backward()
        gradients = {name: parameter.grad.cpu() for name, parameter in decoder.named_parameters()}
        found.append({"logp": policy.scores(batch).logp_T.detach(), **gradients})
    here, there = found
    for name, expected in here.items():
        limit = 10 * 30 * 258**0.5 * EPS * expected.abs().max().item()
        torch.testing.assert_close(there[name], expected, rtol=0, atol=limit, msg=name)


KINDS = {
    "fp32": {},
    "bf16, a reference, checkpointed": {
        "dtype": "bf16",
        "activation_checkpointing": True,
        "method": Method(advantage="mean", kl="k3_loss", kl_coef=0.5),
    },
    "LoRA": {"lora": LoRA(rank=4), "optim": Optim(lr=3e-2)},
    "two updates a rollout": {"method": METHODS["grpo"], "updates_per_rollout": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_and_ends_bit_equal_to_a_whole_one(folder, tmp_path, kind):
    recipe = tiny_recipe(folder, **{"device": "cuda", "num_steps": 4, "eval_every": 0} | KINDS[kind])
    rung.train(recipe, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rung.train(recipe, folder=tmp_path / "run", listener=stop_after(3))
    rung.resume(tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    for name in ("samples.jsonl", "evals.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert open_run(tmp_path / "run").environment()["gpu"] == torch.cuda.get_device_name()


def test_sampler_and_learner_agree_on_a_gpu(folder, tmp_path):
    run = rung.train(tiny_recipe(folder, device="cuda", num_steps=2, eval_every=0), folder=tmp_path / "run")
    steps = [m for m in open_run(run.folder).read("metrics") if m["kind"] == "train"]
    assert max(m["gap_max"] for m in steps) < 1e-4


def test_the_command_line_trains_measures_and_generates_on_a_gpu(folder, tmp_path):
    task, environment = f"{folder.parent / 'letters.py'}:reward", dict(os.environ, RUNG_TRACEBACK="1")

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "rung.cli.main", *words, "--device", "cuda"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=500
        ).stdout

    sizes = "--num-steps 2 --prompts-per-step 2 --samples-per-prompt 2 --max-tokens 4 --eval-problems 3 --eval-every 0"
    model = ("--model", str(folder), "--task.name", task)
    said("train", "arithmetic", *model, *sizes.split(), "--folder", "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["device"] == "cuda"
    assert "accuracy" in said("eval", str(tmp_path / "run" / "model"), task, "--problems", "3")
    assert said("generate", str(folder), "say a", "--max-tokens", "4")
