"""`--device`: what is typed reaches the model, and a GPU that is not here is refused, or counted by a dry run."""

import json

import pytest
import torch

import rung
from rung.cli import main as cli
from rung.cli.train import read

QUESTIONS = "\n".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(40))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_dry_run_for_a_gpu_that_is_not_here_counts_its_memory_and_says_what_it_does_not_know(
    tmp_path, capsys, monkeypatch, no_gpu
):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(QUESTIONS)
    words = "train gpu_jsonl --model smollm2-135m --data d.jsonl"
    assert cli.main([*words.split(), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "AdamW moments" in said
    assert "GB, of a size not known here" in said
    assert "unknown for 300 steps" in said
    assert "Counted for a device that is not here" in said
    assert "device cuda needs CUDA" in said
    assert cli.main(words.split()) == 2
    assert "error: device cuda needs CUDA" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", ["generate smollm2-135m hello", "eval smollm2-135m arithmetic", "chat smollm2-135m"])
def test_every_verb_that_loads_a_model_takes_a_device(words, monkeypatch, capsys, no_gpu):
    assert cli.main([*words.split(), "--device", "cuda:1"]) == 2
    assert "error: device cuda:1 needs CUDA" in capsys.readouterr().err


def test_a_device_that_is_typed_is_in_the_recipe():
    _, recipe = read(["arithmetic", "--device", "cuda:1", "--activation-checkpointing"])
    assert (recipe.device, recipe.activation_checkpointing) == ("cuda:1", True)
    default = rung.recipes.arithmetic()
    assert (default.device, default.activation_checkpointing) == ("cpu", False)
