"""Runs of families with windows, soft-caps and names of their own, from a folder to a folder."""

import json

import pytest
import torch
from byte_tokenizer import BYTES
from lm.family_twins import folder_of, their_model
from train.tiny import TASK, TEMPLATE, tiny_recipe

import rung
from rung.core.rundir import open_run

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3, windows, in part, one kv head, tied"])
def test_a_run_samples_and_learns_by_one_law_and_transformers_reads_what_it_leaves(kind, tmp_path):
    """Prompts are longer than the windows."""
    path = folder_of(their_model(kind, vocab_size=258, final_logit_softcapping=4.0), tmp_path / "model")
    (path / "tokenizer.json").write_text(BYTES._plain.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    (tmp_path / "letters.py").write_text(TASK.replace('letter == "a"', "ord(letter) % 2"))  # contrast in every group
    run = rung.train(tiny_recipe(path, num_steps=2, eval_every=0), folder=tmp_path / "run")
    metrics = [record for record in open_run(run.folder).read("metrics") if record["kind"] == "train"]
    assert len(metrics) == 2
    assert all(record["gap_max"] < 1e-4 for record in metrics)

    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        for folder in (path, run.folder / "model")
    )
    changed = dict(after.named_parameters())
    assert all(not torch.equal(weight, changed[name]) for name, weight in before.named_parameters())
    ids_BT = torch.arange(60).view(2, 30)
    with torch.no_grad():
        ours_BTV = rung.load(run.folder / "model", dtype="fp32").logits(ids_BT)
        torch.testing.assert_close(ours_BTV, after(ids_BT).logits, atol=1e-4, rtol=1e-4)
